// reference.h: the references for kernels: plain formulas in double precision on the host, and
// their inputs.
#ifndef REFERENCE_H
#define REFERENCE_H

#include "common.h"

// elements that are compared, if not all are
enum { SAMPLES = 100 };

// x (n) uniform in (-size, size), a function of id and index.
static inline void fill(real *x, size_t n, double size, int id) {
#pragma omp parallel for
    for (size_t i = 0; i < n; i += 4) {
        const Philox w = rng_words(0, STREAM_TEST, i, (uint32_t)id, 0);
        for (size_t j = i; j < n && j < i + 4; j++)
            x[j] = (real)(size * (2 * uniform01(w.v[j - i]) - 1));
    }
}

static inline double dot_double(const real *a, const real *b, size_t n) {
    double sum = 0;
#pragma omp simd reduction(+:sum)
    for (size_t i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

// Dropout's factor for an attention probability.
static inline double attention_factor(const NoisePlace *z, size_t row, size_t head, size_t i,
                                      size_t j) {
    if (!z->rate) return 1;
    const Philox w = noise_words(z->key, z->first_row + (uint32_t)row, (uint32_t)head, (uint32_t)i,
                                 (uint32_t)j / NOISE_EACH);
    return noise_half(w, (int)(j % NOISE_EACH)) >= z->rate ? noise_scale(z->rate) : 0;
}

// One head of one row: y (T,HS) and, if dy is given, dqkv (3,T,HS), which must start as zeros.
static inline void attention_reference(double *y, double *dqkv, const real *dy, const real *qkv,
                                       const NoisePlace *z, size_t row, size_t head, size_t T,
                                       size_t C, size_t HS) {
    const real *q = qkv, *k = q + C, *v = k + C;
    const double scale = 1 / sqrt((double)HS);
    double *p = (double *)xcalloc(T, sizeof *p), *keep = (double *)xcalloc(T, sizeof *keep),
        *dq = dqkv, *dk = dq + T * HS, *dv = dk + T * HS;
    for (size_t i = 0; i < T; i++) {
        double sum = 0, inner = 0;
        for (size_t j = 0; j <= i; j++) keep[j] = attention_factor(z, row, head, i, j);
        for (size_t j = 0; j <= i; j++)
            sum += p[j] = exp(scale * dot_double(q + i * 3 * C, k + j * 3 * C, HS));
        for (size_t d = 0; d < HS; d++) {
            y[i * HS + d] = 0;
            for (size_t j = 0; j <= i; j++)
                y[i * HS + d] += keep[j] * p[j] / sum * (double)v[j * 3 * C + d];
            inner += y[i * HS + d] * (double)dy[i * C + d];
        }
        for (size_t j = 0; j <= i; j++) {
            const double pj = p[j] / sum;
            const double ds = scale * pj * (keep[j] * dot_double(dy + i * C, v + j * 3 * C, HS) -
                                            inner);
            for (size_t d = 0; d < HS; d++) {
                dq[i * HS + d] += ds * (double)k[j * 3 * C + d];
                dk[j * HS + d] += ds * (double)q[i * 3 * C + d];
                dv[j * HS + d] += keep[j] * pj * (double)dy[i * C + d];
            }
        }
    }
    free(p), free(keep);
}

// Mean and 1/sigma of x (C), in double.
static inline void layernorm_reference(double *mean, double *rstd, const real *x, size_t C) {
    double sum = 0, squares = 0;
    for (size_t c = 0; c < C; c++) sum += (double)x[c];
    *mean = sum / (double)C;
    for (size_t c = 0; c < C; c++) squares += ((double)x[c] - *mean) * ((double)x[c] - *mean);
    *rstd = 1 / sqrt(squares / (double)C + 1e-5);
}

#endif
