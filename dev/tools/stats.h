// stats.h: what a comparison over a few seeds needs: moments, Student's t, paired differences, the
// bootstrap, corrections for several comparisons, equivalence, power.
//
// Sources: Efron 1987 (BCa bootstrap intervals), Holm 1979 (step-down correction), Schuirmann 1987
// (two one-sided tests).
#ifndef STATS_H
#define STATS_H

#include "../check.h"
#include "../model/rng.h"
#include <math.h>

static inline double stats_mean(const double *x, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += x[i];
    return sum / n;
}

// The standard deviation of the population that x (n) is a sample of: squares over n - 1. NaN for n
// < 2.
static inline double stats_sd(const double *x, int n) {
    if (n < 2) return NAN;
    double mean = stats_mean(x, n), sum = 0;
    for (int i = 0; i < n; i++) sum += (x[i] - mean) * (x[i] - mean);
    return sqrt(sum / (n - 1));
}

// P(|t| < sqrt(df) tan(angle)) for Student's t with df degrees of freedom: a finite sum of cosines,
// all of one sign (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4). angle in [0, pi/2].
static inline double stats_t_inside(double angle, int df) {
    const double pi = 3.14159265358979323846, c = cos(angle);
    double sum = 0, term = df % 2 ? c : 1;
    for (int k = 2 + df % 2; k <= df; k += 2) {
        sum += term;
        term *= c * c * (k - 1) / k;
    }
    return df % 2 ? (angle + sin(angle) * sum) * 2 / pi : sin(angle) * sum;
}

// The t with P(|T| < t) = level: stats_t(0.95, df) is half the width of a 95% interval, in standard
// errors. level in (0, 1), df >= 1; time in proportion to df.
static inline double stats_t(double level, int df) {
    CHECK(level > 0 && level < 1 && df >= 1, "no t for level %g, %d degrees of freedom", level, df);
    // bisection of the angle, which unlike t is bounded
    double low = 0, high = 1.5707963267948966;
    for (double middle; middle = (low + high) / 2, middle > low && middle < high;) {
        if (stats_t_inside(middle, df) < level) low = middle;
        else high = middle;
    }
    return sqrt(df) * tan(low);
}

// The mean of a[i] - b[i], its standard error, and the ends of its 95% t-interval; all but the mean
// are NaN for n < 2.
typedef struct { double mean, error, low, high; } StatsDifference;

static inline StatsDifference stats_paired(const double *a, const double *b, int n) {
    double *x = (double *)xcalloc((size_t)n, sizeof *x);
    for (int i = 0; i < n; i++) x[i] = a[i] - b[i];
    StatsDifference d = {stats_mean(x, n), stats_sd(x, n) / sqrt(n), NAN, NAN};
    if (n >= 2) {
        const double half = d.error * stats_t(0.95, n - 1);
        d.low = d.mean - half, d.high = d.mean + half;
    }
    free(x);
    return d;
}

// ---- Probabilities ----

static inline double stats_normal(double z) { return erfc(-z / 1.4142135623730951) / 2; }

// The z with P(Z < z) = p; p in (0, 1).
static inline double stats_normal_quantile(double p) {
    CHECK(p > 0 && p < 1, "no quantile of %g", p);
    double low = -40, high = 40;
    for (double middle; middle = (low + high) / 2, middle > low && middle < high;) {
        if (stats_normal(middle) < p) low = middle;
        else high = middle;
    }
    return low;
}

// P(T < t) for Student's t; +-infinity is allowed.
static inline double stats_t_below(double t, int df) {
    const double inside = stats_t_inside(atan(fabs(t) / sqrt(df)), df);
    return t < 0 ? (1 - inside) / 2 : (1 + inside) / 2;
}

// The two-sided p-value of "the mean is 0" for a mean and its standard error over df + 1 values. 1
// where both are 0, NaN where the error is not known.
static inline double stats_p(double mean, double error, int df) {
    if (isnan(error) || df < 1) return NAN;
    if (error == 0) return mean == 0 ? 1 : 0;
    return 1 - stats_t_inside(atan(fabs(mean / error) / sqrt(df)), df);
}

// p-values (m) adjusted for m comparisons: reject those at most alpha, and the chance of any false
// one is at most alpha. NaN stays NaN, and does not count.
static inline void stats_holm(double *adjusted, const double *p, int m) {
    int *order = (int *)xcalloc((size_t)m, sizeof *order), n = 0;
    for (int i = 0; i < m; i++) {
        adjusted[i] = p[i];
        int at = n;
        if (isnan(p[i])) continue;
        for (n++; at > 0 && p[order[at - 1]] > p[i]; at--) order[at] = order[at - 1];
        order[at] = i;
    }
    double least = 0;
    for (int k = 0; k < n; k++) {
        least = fmax(least, fmin(1, (n - k) * p[order[k]]));
        adjusted[order[k]] = least;
    }
    free(order);
}

// The p-value of "the mean is outside of (-margin, margin)", by two one-sided t-tests: small means
// equivalent.
static inline double stats_equivalence_p(double mean, double error, int df, double margin) {
    if (isnan(error) || df < 1) return NAN;
    if (error == 0) return fabs(mean) < margin ? 0 : 1;
    return 1 - fmin(stats_t_below((mean + margin) / error, df),
                    stats_t_below((margin - mean) / error, df));
}

// The p-value of "the mean is at least margin": small means not inferior by as much.
static inline double stats_not_inferior_p(double mean, double error, int df, double margin) {
    if (isnan(error) || df < 1) return NAN;
    if (error == 0) return mean < margin ? 0 : 1;
    return stats_t_below((mean - margin) / error, df);
}

// ---- Power ----

// The chance that a two-sided paired t-test at level alpha over n seeds sees a true difference of
// `effect` standard deviations of the pairs' differences: the normal probabilities given the
// sample's standard deviation, averaged over that one's distribution (chi with n - 1 degrees of
// freedom) by Simpson's rule.
static inline double stats_power(double effect, int n, double alpha) {
    const int df = n - 1, cells = 4000;
    const double width = 12 / sqrt(2.0 * df), low = fmax(0, 1 - width), high = 1 + width;
    const double t = stats_t(1 - alpha, df), shift = effect * sqrt(n);
    const double scale = log(2) + df / 2.0 * log(df / 2.0) - lgamma(df / 2.0);
    double sum = 0;
    for (int i = 0; i <= cells; i++) {
        const double s = low + (high - low) * i / cells;
        const double density = s > 0     ? exp(scale + (df - 1) * log(s) - df * s * s / 2)
                               : df == 1 ? exp(scale)
                                         : 0;
        const double seen = stats_normal(shift - t * s) + stats_normal(-shift - t * s);
        sum += (i == 0 || i == cells ? 1 : i % 2 ? 4 : 2) * density * seen;
    }
    return sum * (high - low) / cells / 3;
}

// The smallest true difference, in standard deviations of the pairs' differences, that n >= 2 seeds
// see with that power.
static inline double stats_smallest_effect(int n, double alpha, double power) {
    double low = 0, high = 1;
    while (stats_power(high, n, alpha) < power) high *= 2;
    while (high - low > 1e-9 * high) {
        const double middle = (low + high) / 2;
        if (stats_power(middle, n, alpha) < power) low = middle;
        else high = middle;
    }
    return high;
}

// ---- The bootstrap: intervals for any statistic of n values, by drawing n of them with
// replacement ----

// A statistic of the values that index (n) names, some of them several times.
typedef double StatsOf(const int *index, int n, const void *data);
typedef struct { double low, high; } StatsInterval;

// of rng.h: apart from the streams of training
enum { STATS_STREAM = 255 };

static inline int stats_compare(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Draw number `draw` of n indices below n.
static inline void stats_resample(int *index, int n, uint64_t seed, int draw) {
    for (int i = 0; i < n; i++) {
        const uint32_t word = rng_words(seed, STATS_STREAM, (uint64_t)draw, (uint32_t)i, 0).v[0];
        index[i] = (int)(((uint64_t)word * (uint32_t)n) >> 32);
    }
}

// The value below which a fraction p of the sorted values (n) lie, interpolated.
static inline double stats_quantile(const double *sorted, int n, double p) {
    const double at = fmin(fmax(p * (n - 1), 0), n - 1);
    const int i = (int)at, next = i + 1 < n ? i + 1 : i;
    return sorted[i] + (at - i) * (sorted[next] - sorted[i]);
}

// How skewed the statistic's distribution is, from leaving out one value at a time (Efron 1987,
// equation 6.6).
static inline double stats_acceleration(StatsOf *of, const void *data, int n) {
    int *index = (int *)xcalloc((size_t)n, sizeof *index);
    double *x = (double *)xcalloc((size_t)n, sizeof *x), squares = 0, cubes = 0;
    for (int left = 0; left < n; left++) {
        for (int i = 0, k = 0; i < n; i++)
            if (i != left) index[k++] = i;
        x[left] = of(index, n - 1, data);
    }
    const double mean = stats_mean(x, n);
    for (int i = 0; i < n; i++)
        squares += (mean - x[i]) * (mean - x[i]), cubes += pow(mean - x[i], 3);
    free(index), free(x);
    return squares > 0 ? cubes / (6 * pow(squares, 1.5)) : 0;
}

// The BCa interval (Efron 1987) of a statistic of n values from `draws` resamples; the same seed
// gives the same bits. NaN for n < 2, or where the statistic is not finite. With fewer than about 8
// values it is too narrow: read the t-interval.
static inline StatsInterval stats_bootstrap(StatsOf *of, const void *data, int n, double level,
                                            int draws, uint64_t seed) {
    StatsInterval none = {NAN, NAN};
    if (n < 2) return none;
    int *index = (int *)xcalloc((size_t)n, sizeof *index), finite = 1;
    double *x = (double *)xcalloc((size_t)draws, sizeof *x), below = 0;
    for (int i = 0; i < n; i++) index[i] = i;
    const double all = of(index, n, data);
    for (int k = 0; k < draws; k++) {
        stats_resample(index, n, seed, k);
        x[k] = of(index, n, data);
        below += x[k] < all ? 1 : x[k] == all ? 0.5 : 0;
        finite &= isfinite(x[k]) != 0;
    }
    StatsInterval result = none;
    if (finite && isfinite(all)) {
        qsort(x, (size_t)draws, sizeof *x, stats_compare);
        const double p = fmin(fmax(below, 0.5), draws - 0.5) / draws, z0 = stats_normal_quantile(p);
        const double a = stats_acceleration(of, data, n),
                     z = stats_normal_quantile((1 + level) / 2);
        result.low = stats_quantile(x, draws, stats_normal(z0 + (z0 - z) / (1 - a * (z0 - z))));
        result.high = stats_quantile(x, draws, stats_normal(z0 + (z0 + z) / (1 - a * (z0 + z))));
    }
    free(index), free(x);
    return result;
}

static inline double stats_mean_of(const int *index, int n, const void *data) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += ((const double *)data)[index[i]];
    return sum / n;
}

// ---- A law of scaling: L = E + A (s F)^-b, with s = 1 for the baseline and one s for the other
// arm ----

// What an arm's FLOPs are worth in the baseline's: s > 1 is less compute for the same loss.
typedef struct { double E, A, b, s, rms; } StatsLaw;
// (n) FLOPs and losses of each arm, paired
typedef struct { const double *F, *none, *arm, *F_arm; int n; } StatsCells;

// Solves the 3 x 3 system m x = y by elimination with pivots; returns whether it has one solution.
static inline int stats_solve3(double x[3], double m[3][3], double y[3]) {
    for (int k = 0; k < 3; k++) {
        int best = k;
        for (int r = k + 1; r < 3; r++)
            if (fabs(m[r][k]) > fabs(m[best][k])) best = r;
        if (fabs(m[best][k]) < 1e-300) return 0;
        for (int c = 0; c < 3; c++) {
            const double t = m[k][c];
            m[k][c] = m[best][c], m[best][c] = t;
        }
        const double t = y[k];
        y[k] = y[best], y[best] = t;
        for (int r = k + 1; r < 3; r++) {
            const double f = m[r][k] / m[k][k];
            for (int c = k; c < 3; c++) m[r][c] -= f * m[k][c];
            y[r] -= f * y[k];
        }
    }
    for (int k = 2; k >= 0; k--) {
        x[k] = y[k];
        for (int c = k + 1; c < 3; c++) x[k] -= m[k][c] * x[c];
        x[k] /= m[k][k];
    }
    return 1;
}

// The best E, A and s for an exponent: linear least squares of E, A and A s^-b. `unit` scales F.
// Returns the sum of squares.
static inline double stats_law_at(StatsLaw *law, const StatsCells *c, double b, double unit) {
    double m[3][3] = {{0}}, y[3] = {0}, x[3], squares = 0;
    for (int i = 0; i < 2 * c->n; i++) {
        const int arm = i >= c->n, k = i - arm * c->n;
        const double f = pow((arm ? c->F_arm[k] : c->F[k]) / unit, -b),
                     loss = arm ? c->arm[k] : c->none[k];
        const double row[3] = {1, arm ? 0 : f, arm ? f : 0};
        for (int r = 0; r < 3; r++) {
            y[r] += row[r] * loss;
            for (int q = 0; q < 3; q++) m[r][q] += row[r] * row[q];
        }
    }
    if (!stats_solve3(x, m, y) || x[1] <= 0 || x[2] <= 0) return INFINITY;
    for (int i = 0; i < 2 * c->n; i++) {
        const int arm = i >= c->n, k = i - arm * c->n;
        const double f = pow((arm ? c->F_arm[k] : c->F[k]) / unit, -b),
                     loss = arm ? c->arm[k] : c->none[k];
        const double e = loss - x[0] - f * x[1 + arm];
        squares += e * e;
    }
    law->E = x[0], law->A = x[1] * pow(unit, b), law->b = b, law->s = pow(x[1] / x[2], 1 / b);
    law->rms = sqrt(squares / (2 * c->n));
    return squares;
}

// of a first look, from 0.01 to 3, evenly in their logarithm
enum { STATS_EXPONENTS = 24 };

// The least squares of all four; every number is NaN where nothing falls with F.
static inline StatsLaw stats_law(const StatsCells *c) {
    StatsLaw law = {NAN, NAN, NAN, NAN, NAN}, ignored;
    double unit = 0, best = INFINITY, at = 0;
    for (int i = 0; i < c->n; i++) unit += log(c->F[i]) / c->n;
    unit = exp(unit);
    for (int k = 0; k < STATS_EXPONENTS; k++) {
        const double b = log(0.01) + k * log(300) / (STATS_EXPONENTS - 1),
                     e = stats_law_at(&ignored, c, exp(b), unit);
        if (e < best) best = e, at = b;
    }
    if (!isfinite(best)) return law;
    double low = at - log(300) / (STATS_EXPONENTS - 1), high = 2 * at - low;
    const double golden = 0.6180339887498949;
    for (int k = 0; k < 30; k++) {
        const double x = high - golden * (high - low), y = low + golden * (high - low);
        if (stats_law_at(&ignored, c, exp(x), unit) < stats_law_at(&ignored, c, exp(y), unit))
            high = y;
        else low = x;
    }
    if (!isfinite(stats_law_at(&law, c, exp((low + high) / 2), unit)))
        stats_law_at(&law, c, exp(at), unit);
    if (law.A * pow(unit, -law.b) < 1e-9 * fabs(law.E)) law.s = NAN;           // they are flat
    return law;
}

// The interval of s at that level: pairs of residuals, of both arms in a cell, are drawn again onto
// the fitted curves, as wide as n - 4 degrees of freedom ask for. Paired, since arms of a seed
// share its data and weights: a pair counts once.
static inline StatsInterval stats_law_interval(const StatsCells *c, const StatsLaw *law,
                                               double level, int draws, uint64_t seed) {
    const int n = c->n;
    StatsInterval interval = {NAN, NAN};
    if (isnan(law->s) || n < 6) return interval;
    double *none = (double *)xcalloc((size_t)n, sizeof(double)),
           *arm = (double *)xcalloc((size_t)n, sizeof(double));
    double *s = (double *)xcalloc((size_t)draws, sizeof(double));
    int *index = (int *)xcalloc((size_t)n, sizeof *index), got = 0;
    const double wide =
        sqrt((double)n / (n - 4)) * stats_t(level, n - 4) / stats_normal_quantile((1 + level) / 2);
    for (int k = 0; k < draws; k++) {
        stats_resample(index, n, seed, k);
        for (int i = 0; i < n; i++) {
            const int from = index[i];
            const double at_none = law->E + law->A * pow(c->F[from], -law->b);
            const double at_arm = law->E + law->A * pow(law->s * c->F_arm[from], -law->b);
            none[i] = law->E + law->A * pow(c->F[i], -law->b) + wide * (c->none[from] - at_none);
            arm[i] = law->E + law->A * pow(law->s * c->F_arm[i], -law->b) +
                     wide * (c->arm[from] - at_arm);
        }
        const StatsCells again = {c->F, none, arm, c->F_arm, n};
        s[got] = stats_law(&again).s;
        got += isfinite(s[got]) != 0;
    }
    if (got > draws * 9 / 10) {                          // else the data do not tell a law at all
        qsort(s, (size_t)got, sizeof *s, stats_compare);
        interval.low = stats_quantile(s, got, (1 - level) / 2);
        interval.high = stats_quantile(s, got, (1 + level) / 2);
    }
    free(none), free(arm), free(s), free(index);
    return interval;
}

#endif
