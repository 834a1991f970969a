// test_stats.h: moments by hand, Student's t against printed tables and against its own density.
#ifndef TEST_STATS_H
#define TEST_STATS_H

#include "../golden/stats.h"
#include "../tools/stats.h"
#include "test.h"

static void test_stats_moments(void) {
    static const double x[8] = {2, 4, 4, 4, 5, 5, 7, 9}, far[3] = {1e9 + 4, 1e9 + 7, 1e9 + 13},
        same[2] = {0.1, 0.1};
    EXPECT_CLOSE(stats_mean(x, 8), 5, 0, "mean");
    EXPECT_CLOSE(stats_sd(x, 8), sqrt(32.0 / 7), 1e-15, "standard deviation");
    EXPECT_CLOSE(stats_sd(far, 3), sqrt(21), 1e-12, "standard deviation of large numbers");
    EXPECT_CLOSE(stats_sd(same, 2), 0, 0, "standard deviation of equal numbers");
    EXPECT_CLOSE(stats_mean(x, 1), 2, 0, "mean of one");
    EXPECT(isnan(stats_sd(x, 1)), "one number has the standard deviation %g", stats_sd(x, 1));
}

static void test_stats_t_table(void) {
    static const struct { double level; int df; double t; } table[] = {
        // as printed, to six digits or more; df 1: tan(pi level / 2), df 2: level sqrt(2 / (1 -
        // level^2))
        {0.95, 1, 12.7062047364}, {0.95, 2, 4.30265272991}, {0.95, 3, 3.18244630528},
        {0.95, 4, 2.77644510520}, {0.95, 5, 2.57058183661}, {0.95, 10, 2.22813885196},
        {0.95, 30, 2.04227245630}, {0.95, 100, 1.98397151845}, {0.95, 1000, 1.96233908083},
        {0.99, 1, 63.6567411629}, {0.99, 10, 3.16927267262}, {0.50, 3, 0.76489232840},
    };
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        char *what = xprintf("t(%g, %d)", table[i].level, table[i].df);
        EXPECT_CLOSE(stats_t(table[i].level, table[i].df), table[i].t, 1e-9 * table[i].t, what);
        free(what);
    }
    for (double level = 0.05; level < 1; level += 0.05) {
        const double one = tan(1.5707963267948966 * level),
            two = level * sqrt(2 / (1 - level * level));
        EXPECT_CLOSE(stats_t(level, 1), one, 1e-10 * one, "t of one degree");
        EXPECT_CLOSE(stats_t(level, 2), two, 1e-10 * two, "t of two degrees");
    }
    // z + (z^3 + z)/4df
    EXPECT_CLOSE(stats_t(0.95, 1000000), 1.959963984540 + 2.372e-6, 1e-8, "t of a million degrees");
}

// The density of t, integrated with Simpson's rule, recovers the level, for all small df, odd and
// even.
static void test_stats_t_density(void) {
    for (int df = 1; df <= 40; df++) {
        const double t = stats_t(0.95, df), pi = 3.14159265358979323846;
        const double scale = exp(lgamma((df + 1) / 2.0) - lgamma(df / 2.0)) / sqrt(df * pi);
        const int n = 4000;
        double sum = 0;
        for (int i = 0; i <= n; i++) {
            double x = t * i / n;
            sum += (i == 0 || i == n ? 1 : i % 2 ? 4 : 2) * scale * pow(1 + x * x / df,
                -(df + 1) / 2.0);
        }
        char *what = xprintf("P(|t| < %.9g), %d degrees", t, df);
        EXPECT_CLOSE(2 * sum * t / n / 3, 0.95, 1e-9, what);
        free(what);
        EXPECT(df == 1 || t < stats_t(0.95, df - 1), "t does not fall at %d degrees", df);
    }
}

static void test_stats_paired(void) {
    // differences 0.1, 0.2, -0.1, 0.6
    static const double a[4] = {3.1, 5.4, 2.2, 8.7}, b[4] = {3.0, 5.2, 2.3, 8.1};
    const double error = sqrt((0.1 * 0.1 + 0.0 + 0.3 * 0.3 + 0.4 * 0.4) / 3) / 2;
    StatsDifference d = stats_paired(a, b, 4);
    EXPECT_CLOSE(d.mean, 0.2, 1e-15, "mean difference");
    EXPECT_CLOSE(d.error, error, 1e-15, "its standard error");
    EXPECT_CLOSE(d.low, 0.2 - 3.18244630528 * error, 1e-9, "lower end");
    EXPECT_CLOSE(d.high, 0.2 + 3.18244630528 * error, 1e-9, "upper end");
    d = stats_paired(a, b, 1);
    EXPECT_CLOSE(d.mean, 0.1, 1e-15, "one difference");
    EXPECT(isnan(d.error) && isnan(d.low) && isnan(d.high), "one pair has an interval: %g .. %g",
           d.low, d.high);
    d = stats_paired(a, a, 4);
    EXPECT(d.mean == 0 && d.low == 0 && d.high == 0, "no difference gave %g, %g .. %g", d.mean,
           d.low, d.high);
}

// ---- Against SciPy: dev/golden/make_stats.py ----

static void test_stats_scipy(void) {
    for (size_t k = 0; k < sizeof golden_samples / sizeof golden_samples[0]; k++) {
        const int n = golden_samples[k].n;
        const double *x = golden_samples[k].x, zero[12] = {0};
        const StatsDifference d = stats_paired(x, zero, n);
        const StatsInterval b = stats_bootstrap(stats_mean_of, x, n, 0.95, 20000, 7);
        const StatsInterval again = stats_bootstrap(stats_mean_of, x, n, 0.95, 20000, 7);
        const double wide = golden_samples[k].bca_high - golden_samples[k].bca_low;
        EXPECT_CLOSE(d.mean, golden_samples[k].mean, 1e-12, "mean");
        EXPECT_CLOSE(d.low, golden_samples[k].low, 1e-9, "low end");
        EXPECT_CLOSE(d.high, golden_samples[k].high, 1e-9, "high end");
        EXPECT_CLOSE(stats_p(d.mean, d.error, n - 1), golden_samples[k].p, 1e-10, "p");
        EXPECT_CLOSE(stats_equivalence_p(d.mean, d.error, n - 1, GOLDEN_MARGIN),
                     golden_samples[k].equivalent, 1e-10, "p, equivalent");
        EXPECT_CLOSE(stats_not_inferior_p(d.mean, d.error, n - 1, GOLDEN_MARGIN),
                     golden_samples[k].not_inferior, 1e-10, "p, not inferior");
        EXPECT_CLOSE(b.low, golden_samples[k].bca_low, 0.03 * wide, "bootstrap's low end");
        EXPECT_CLOSE(b.high, golden_samples[k].bca_high, 0.03 * wide, "bootstrap's high end");
        EXPECT(b.low == again.low && b.high == again.high, "the same seed gave another interval");
    }
    for (size_t k = 0; k < sizeof golden_power / sizeof golden_power[0]; k++)
        EXPECT_CLOSE(stats_power(golden_power[k].effect, golden_power[k].n, golden_power[k].alpha),
                     golden_power[k].power, 1e-6, "power");
    for (size_t k = 0; k < sizeof golden_smallest / sizeof golden_smallest[0]; k++)
        EXPECT_CLOSE(stats_smallest_effect(golden_smallest[k].n, golden_smallest[k].alpha, 0.8),
                     golden_smallest[k].effect, 1e-6, "smallest effect");
}

// By hand: 4 p-values; the smallest times 4, the next times 3, ..., never less than the one before.
// NaN does not count.
static void test_stats_holm(void) {
    const double p[5] = {0.03, 0.01, NAN, 0.02, 0.9};
    double adjusted[5];
    stats_holm(adjusted, p, 5);
    EXPECT_CLOSE(adjusted[1], 0.04, 1e-15, "the smallest");
    EXPECT_CLOSE(adjusted[3], 0.06, 1e-15, "the second");
    EXPECT_CLOSE(adjusted[0], 0.06, 1e-15, "the third: 0.06 again");
    EXPECT_CLOSE(adjusted[4], 0.9, 1e-15, "the last");
    EXPECT(isnan(adjusted[2]), "NaN became %g", adjusted[2]);
    const double tied[2] = {0.8, 0.9};
    stats_holm(adjusted, tied, 2);
    EXPECT(adjusted[0] == 1 && adjusted[1] == 1, "more than 1: %g, %g", adjusted[0], adjusted[1]);
}

static void test_stats_edges(void) {
    const double same[3] = {0.1, 0.1, 0.1};
    const StatsInterval one = stats_bootstrap(stats_mean_of, same, 1, 0.95, 100, 1),
                        all = stats_bootstrap(stats_mean_of, same, 3, 0.95, 100, 1);
    EXPECT(isnan(one.low) && isnan(one.high), "one value has an interval");
    EXPECT_CLOSE(all.low, 0.1, 1e-15, "equal values");
    EXPECT_CLOSE(all.high, 0.1, 1e-15, "equal values");
    EXPECT(isnan(stats_p(1, NAN, 0)), "one seed has a p-value");
    EXPECT(stats_p(0, 0, 2) == 1 && stats_p(0.1, 0, 2) == 0, "p of equal differences");
    EXPECT(stats_equivalence_p(0, 0, 2, 0.1) == 0 && stats_equivalence_p(0.2, 0, 2, 0.1) == 1,
           "equivalence of equal differences");
    EXPECT_CLOSE(stats_power(0, 6, 0.05), 0.05, 1e-8, "power without an effect");
}

// ---- The law of scaling, on losses that follow one ----

// Normal noise of sd `noise`, of which half of the variance is a seed's own, on E + A (s F)^-b at
// five budgets, five seeds.
static void stats_test_losses(double *F, double *none, double *arm, double s, double noise,
                              uint32_t draw) {
    for (int i = 0; i < 25; i++) {
        const Philox w = rng_words(9, STATS_STREAM, draw, (uint32_t)i, 1),
                     v = rng_words(9, STATS_STREAM, draw, (uint32_t)(i / 5), 2);
        double z[2], seed[2];
        normal_pair(z, w.v[0], w.v[1]);
        normal_pair(seed, v.v[0], v.v[1]);
        F[i] = 1e12 * exp2(i % 5);
        none[i] = 1.2 + 2.0 * pow(F[i] / 1e12, -0.3) + noise * (z[0] + seed[0]) / sqrt(2);
        arm[i] = 1.2 + 2.0 * pow(s * F[i] / 1e12, -0.3) + noise * (z[1] + seed[0]) / sqrt(2);
    }
}

static void test_stats_law_is_found(void) {
    double F[25], none[25], arm[25];
    const StatsCells c = {F, none, arm, F, 25};
    stats_test_losses(F, none, arm, 1.25, 0, 0);
    const StatsLaw law = stats_law(&c);
    EXPECT_CLOSE(law.E, 1.2, 1e-3, "E");
    EXPECT_CLOSE(law.b, 0.3, 1e-3, "b");
    EXPECT_CLOSE(law.s, 1.25, 1e-3, "s");
    EXPECT_CLOSE(law.A * pow(1e12, -0.3), 2.0, 1e-3, "A");
    for (int i = 0; i < 25; i++) arm[i] = none[i] = 1.5;
    EXPECT(isnan(stats_law(&c).s), "losses that do not fall have a law");
}

// The 95% interval of s holds the truth in at least 93 of 100 draws: for no shift, and for one.
static void test_stats_law_covers(void) {
    for (int shift = 0; shift < 2; shift++) {
        const double s = shift ? 1.3 : 1;
        int covers = 0, beyond_one = 0;
        for (uint32_t draw = 0; draw < 100; draw++) {
            double F[25], none[25], arm[25];
            const StatsCells c = {F, none, arm, F, 25};
            stats_test_losses(F, none, arm, s, 0.01, draw + 1000 * (uint32_t)shift);
            const StatsLaw law = stats_law(&c);
            const StatsInterval i = stats_law_interval(&c, &law, 0.95, 200, draw);
            covers += i.low <= s && s <= i.high;
            beyond_one += i.low > 1;
        }
        EXPECT(covers >= 93, "s = %g: %d of 100 intervals hold it", s, covers);
        if (shift) EXPECT(beyond_one >= 90, "a shift of 1.3 is seen in %d of 100", beyond_one);
        else EXPECT(beyond_one <= 5, "no shift, but %d of 100 see one", beyond_one);
    }
}

#define STATS_TESTS(X)                                                                             \
    X(stats_moments) X(stats_t_table) X(stats_t_density) X(stats_paired) X(stats_scipy)            \
    X(stats_holm) X(stats_edges) X(stats_law_is_found) X(stats_law_covers)

#endif
