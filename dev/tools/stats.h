// stats.h: what a comparison over a few seeds needs: mean, standard deviation, Student's t, paired differences.
#ifndef STATS_H
#define STATS_H

#include "../check.h"
#include <math.h>

static inline double stats_mean(const double *x, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += x[i];
    return sum / n;
}

// The standard deviation of the population that x (n) is a sample of: squares over n - 1. NaN for n < 2.
static inline double stats_sd(const double *x, int n) {
    if (n < 2) return NAN;
    double mean = stats_mean(x, n), sum = 0;
    for (int i = 0; i < n; i++) sum += (x[i] - mean) * (x[i] - mean);
    return sqrt(sum / (n - 1));
}

// P(|t| < sqrt(df) tan(angle)) for Student's t with df degrees of freedom: a finite sum of cosines, all of one sign
// (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4). angle in [0, pi/2].
static inline double stats_t_inside(double angle, int df) {
    const double pi = 3.14159265358979323846, c = cos(angle);
    double sum = 0, term = df % 2 ? c : 1;
    for (int k = 2 + df % 2; k <= df; k += 2) {
        sum += term;
        term *= c * c * (k - 1) / k;
    }
    return df % 2 ? (angle + sin(angle) * sum) * 2 / pi : sin(angle) * sum;
}

// The t with P(|T| < t) = level: stats_t(0.95, df) is half the width of a 95% interval, in standard errors. level in
// (0, 1), df >= 1; time in proportion to df.
static inline double stats_t(double level, int df) {
    CHECK(level > 0 && level < 1 && df >= 1, "no t for level %g, %d degrees of freedom", level, df);
    double low = 0, high = 1.5707963267948966;           // bisection of the angle, which unlike t is bounded
    for (double middle; middle = (low + high) / 2, middle > low && middle < high;) {
        if (stats_t_inside(middle, df) < level) low = middle;
        else high = middle;
    }
    return sqrt(df) * tan(low);
}

// The mean of a[i] - b[i], its standard error, and the ends of its 95% t-interval; all but the mean are NaN for n < 2.
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

#endif
