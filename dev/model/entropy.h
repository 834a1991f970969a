// entropy.h: the mean entropy of attention's probabilities, from one more attention.
//
// A query's entropy is -sum_j p_j ln p_j with ln p_j = <q, k_j> / sqrt(HS) - lse, that is lse minus
// <q, sum_j p_j k_j> / sqrt(HS); and sum_j p_j k_j is what attention gives with the keys in place
// of the values.
#ifndef ENTROPY_H
#define ENTROPY_H

#include "vector.h"

// qkk (nT,3C) = qkv (nT,3C) with the keys once more in place of the values.
static inline void entropy_keys_as_values(real *qkk, const real *qkv, size_t nT, size_t C) {
#pragma omp parallel for
    for (size_t t = 0; t < nT; t++) {
        memcpy(qkk + t * 3 * C, qkv + t * 3 * C, 2 * C * sizeof(real));
        memcpy(qkk + t * 3 * C + 2 * C, qkv + t * 3 * C + C, C * sizeof(real));
    }
}

// The mean over rows, heads and queries, in nats: mean (n,T,C) is attention's result for qkk
// (n,T,3C), lse (n,NH,T) its log-sum-exp. Summed in double, in order; 0 without rows.
static inline double entropy_mean(const real *qkk, const real *mean, const real *lse, size_t n,
                                  size_t T, size_t C, size_t NH) {
    double *sum = (double *)xcalloc(n * T, sizeof *sum), all = 0;
#pragma omp parallel for
    for (size_t t = 0; t < n * T; t++) {
        for (size_t c = 0; c < C; c++)
            sum[t] -= (double)qkk[t * 3 * C + c] * (double)mean[t * C + c];
        sum[t] /= sqrt((double)(C / NH));
        for (size_t h = 0; h < NH; h++) sum[t] += (double)lse[(t / T * NH + h) * T + t % T];
    }
    for (size_t t = 0; t < n * T; t++) all += sum[t];
    free(sum);
    return n ? all / (double)(n * T * NH) : 0;
}

#endif
