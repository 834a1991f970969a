// test_stats.h: moments by hand, Student's t against the printed tables and against its own distribution.
#ifndef TEST_STATS_H
#define TEST_STATS_H

#include "../tools/stats.h"
#include "test.h"

static void test_stats_moments(void) {
    static const double x[8] = {2, 4, 4, 4, 5, 5, 7, 9}, far[3] = {1e9 + 4, 1e9 + 7, 1e9 + 13}, same[2] = {0.1, 0.1};
    EXPECT_CLOSE(stats_mean(x, 8), 5, 0, "mean");
    EXPECT_CLOSE(stats_sd(x, 8), sqrt(32.0 / 7), 1e-15, "standard deviation");
    EXPECT_CLOSE(stats_sd(far, 3), sqrt(21), 1e-12, "standard deviation of large numbers");
    EXPECT_CLOSE(stats_sd(same, 2), 0, 0, "standard deviation of equal numbers");
    EXPECT_CLOSE(stats_mean(x, 1), 2, 0, "mean of one");
    EXPECT(isnan(stats_sd(x, 1)), "one number has the standard deviation %g", stats_sd(x, 1));
}

static void test_stats_t_table(void) {
    static const struct { double level; int df; double t; } table[] = {
        // as printed, to six digits or more; df 1: tan(pi level / 2), df 2: level sqrt(2 / (1 - level^2))
        {0.95, 1, 12.7062047364}, {0.95, 2, 4.30265272991}, {0.95, 3, 3.18244630528}, {0.95, 4, 2.77644510520},
        {0.95, 5, 2.57058183661}, {0.95, 10, 2.22813885196}, {0.95, 30, 2.04227245630}, {0.95, 100, 1.98397151845},
        {0.95, 1000, 1.96233908083}, {0.99, 1, 63.6567411629}, {0.99, 10, 3.16927267262}, {0.50, 3, 0.76489232840},
    };
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        char *what = xprintf("t(%g, %d)", table[i].level, table[i].df);
        EXPECT_CLOSE(stats_t(table[i].level, table[i].df), table[i].t, 1e-9 * table[i].t, what);
        free(what);
    }
    for (double level = 0.05; level < 1; level += 0.05) {
        const double one = tan(1.5707963267948966 * level), two = level * sqrt(2 / (1 - level * level));
        EXPECT_CLOSE(stats_t(level, 1), one, 1e-10 * one, "t of one degree");
        EXPECT_CLOSE(stats_t(level, 2), two, 1e-10 * two, "t of two degrees");
    }
    EXPECT_CLOSE(stats_t(0.95, 1000000), 1.959963984540 + 2.372e-6, 1e-8, "t of a million degrees");   // z + (z^3 + z)/4df
}

// The density of t, integrated with Simpson's rule, gives the level back; for all small df, odd and even.
static void test_stats_t_density(void) {
    for (int df = 1; df <= 40; df++) {
        const double t = stats_t(0.95, df), pi = 3.14159265358979323846;
        const double scale = exp(lgamma((df + 1) / 2.0) - lgamma(df / 2.0)) / sqrt(df * pi);
        const int n = 4000;
        double sum = 0;
        for (int i = 0; i <= n; i++) {
            double x = t * i / n;
            sum += (i == 0 || i == n ? 1 : i % 2 ? 4 : 2) * scale * pow(1 + x * x / df, -(df + 1) / 2.0);
        }
        char *what = xprintf("P(|t| < %.9g), %d degrees", t, df);
        EXPECT_CLOSE(2 * sum * t / n / 3, 0.95, 1e-9, what);
        free(what);
        EXPECT(df == 1 || t < stats_t(0.95, df - 1), "t does not fall at %d degrees", df);
    }
}

static void test_stats_paired(void) {
    static const double a[4] = {3.1, 5.4, 2.2, 8.7}, b[4] = {3.0, 5.2, 2.3, 8.1};     // differences 0.1, 0.2, -0.1, 0.6
    const double error = sqrt((0.1 * 0.1 + 0.0 + 0.3 * 0.3 + 0.4 * 0.4) / 3) / 2;
    StatsDifference d = stats_paired(a, b, 4);
    EXPECT_CLOSE(d.mean, 0.2, 1e-15, "mean difference");
    EXPECT_CLOSE(d.error, error, 1e-15, "its standard error");
    EXPECT_CLOSE(d.low, 0.2 - 3.18244630528 * error, 1e-9, "lower end");
    EXPECT_CLOSE(d.high, 0.2 + 3.18244630528 * error, 1e-9, "upper end");
    d = stats_paired(a, b, 1);
    EXPECT_CLOSE(d.mean, 0.1, 1e-15, "one difference");
    EXPECT(isnan(d.error) && isnan(d.low) && isnan(d.high), "one pair has an interval: %g .. %g", d.low, d.high);
    d = stats_paired(a, a, 4);
    EXPECT(d.mean == 0 && d.low == 0 && d.high == 0, "no difference gave %g, %g .. %g", d.mean, d.low, d.high);
}

#define STATS_TESTS(X) X(stats_moments) X(stats_t_table) X(stats_t_density) X(stats_paired)

#endif
