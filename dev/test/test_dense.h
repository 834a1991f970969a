// Tests of the tools' linear algebra: against plain loops, and against matrices whose factors,
// inverse and condition are known.
#ifndef TEST_DENSE_H
#define TEST_DENSE_H

#include "../model/rng.h"
#include "../tools/dense.h"
#include "test.h"

static inline void dense_test_random(double *x, size_t n, uint32_t which) {
    for (size_t i = 0; i < n; i += 2) {
        double z[2];
        const Philox w = rng_words(7, STREAM_TEST, i, which, 0);
        normal_pair(z, w.v[0], w.v[1]);
        x[i] = z[0];
        if (i + 1 < n) x[i + 1] = z[1];
    }
}

// Sizes below, at and above a tile, a block of K and a block of the result.
static void test_dense_matmuls(void) {
    static const size_t sizes[][3] = {{1, 1, 1},
                                      {3, 5, 7},
                                      {TILE_ROWS, DENSE_COLS, DENSE_K},
                                      {13, 17, 300},
                                      {DENSE_M + 1, 20, 5},
                                      {30, DENSE_N + 3, DENSE_K + 1},
                                      {7, 2, 2 * DENSE_K + 9}};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        const size_t M = sizes[s][0], N = sizes[s][1], K = sizes[s][2];
        double *a = xcalloc(M * K, 8), *b = xcalloc(K * N, 8), *y = xcalloc(M * N, 8);
        double *at = xcalloc(M * K, 8);
        real *bt = xcalloc(K * N, sizeof *bt);
        dense_test_random(a, M * K, 1), dense_test_random(b, K * N, 2);
        for (size_t i = 0; i < M * K; i++) at[i % K * M + i / K] = a[i];
        for (size_t i = 0; i < K * N; i++) {
            b[i] = (double)(real)b[i];
            bt[i % N * K + i / N] = (real)b[i];
        }
        for (int how = DENSE_SET; how <= DENSE_SUBTRACT; how++)
            for (int transposed = 0; transposed < 2; transposed++) {
                dense_test_random(y, M * N, 3);
                double *want = xcalloc(M * N, 8);
                for (size_t i = 0; i < M; i++)
                    for (size_t j = 0; j < N; j++) {
                        double sum = 0;
                        for (size_t k = 0; k < K; k++) sum += a[i * K + k] * b[k * N + j];
                        if (how == DENSE_SUBTRACT) sum = -sum;
                        want[i * N + j] = how == DENSE_SET ? sum : y[i * N + j] + sum;
                    }
                const DenseMatrix left =
                    transposed ? dense_transposed(dense_of(at, M)) : dense_of(a, K);
                const DenseMatrix right =
                    transposed ? dense_transposed(dense_of_real(bt, K)) : dense_of(b, N);
                dense_product(y, N, left, right, M, N, K, how);
                double worst = 0;
                for (size_t i = 0; i < M * N; i++) worst = fmax(worst, fabs(y[i] - want[i]));
                EXPECT(worst <= 1e-14 * (double)K, "%zu x %zu x %zu, %d, transposed %d: off by %g",
                       M, N, K, how, transposed, worst);
                free(want);
            }
        free(a), free(b), free(y), free(at), free(bt);
    }
}

// A Gram matrix of rows that arrive at once, in two unequal parts, and with one thread: the same
// bits.
static void test_dense_gram_bits(void) {
    enum { N = 210, K = 700, CUT = 333 };
    real *x = xcalloc((size_t)K * N, sizeof *x);
    double *z = xcalloc((size_t)K * N, 8), worst = 0;
    double *whole = xcalloc((size_t)N * N, 8), *parts = xcalloc((size_t)N * N, 8);
    dense_test_random(z, (size_t)K * N, 4);
    for (size_t i = 0; i < (size_t)K * N; i++) x[i] = (real)z[i];
    dense_gram(whole, dense_of_real(x, N), N, K);
#ifdef _OPENMP
    const int threads = omp_get_max_threads();
    omp_set_num_threads(threads == 1 ? 3 : 1);
#endif
    dense_gram(parts, dense_of_real(x, N), N, CUT);
    dense_gram(parts, dense_of_real(x + (size_t)CUT * N, N), N, K - CUT);
#ifdef _OPENMP
    omp_set_num_threads(threads);
#endif
    dense_mirror(whole, N), dense_mirror(parts, N);
    EXPECT(!memcmp(whole, parts, (size_t)N * N * 8), "the bits depend on threads or cuts");
    for (size_t i = 0; i < N; i++)
        for (size_t j = 0; j < N; j++) {
            double sum = 0;
            for (size_t k = 0; k < K; k++) sum += (double)x[k * N + i] * (double)x[k * N + j];
            worst = fmax(worst, fabs(sum - whole[i * N + j]));
        }
    EXPECT(worst <= 1e-11, "off by %g", worst);
    free(x), free(z), free(whole), free(parts);
}

// L L^T = a, and solving gives back what was multiplied, for sizes around a panel.
static void test_dense_cholesky(void) {
    static const size_t sizes[] = {
        1, 2, 5, DENSE_PANEL - 1, DENSE_PANEL, DENSE_PANEL + 1, 2 * DENSE_PANEL + 37};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        const size_t n = sizes[s], cols = n % 2 ? 3 : 70;
        double *r = xcalloc(n * (n + 5), 8), *a = xcalloc(n * n, 8), *l = xcalloc(n * n, 8);
        double *x = xcalloc(n * cols, 8), *b = xcalloc(n * cols, 8), worst = 0;
        dense_test_random(r, n * (n + 5), 5), dense_test_random(x, n * cols, 6);
        dense_gram(a, dense_of(r, n), n, n + 5);
        dense_mirror(a, n);
        for (size_t i = 0; i < n; i++) a[i * n + i] += 1;
        memcpy(l, a, n * n * 8);
        EXPECT(dense_cholesky(l, n) == n, "%zu: refused", n);
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j <= i; j++)
                worst = fmax(worst, fabs(dense_dot(l + i * n, l + j * n, j + 1) - a[i * n + j]));
        EXPECT(worst <= 1e-13 * (double)n * dense_norm1(a, n), "%zu: L L^T is off by %g", n, worst);
        dense_product(b, cols, dense_of(a, n), dense_of(x, cols), n, cols, n, DENSE_SET);
        dense_solve(l, n, b, cols);
        for (size_t i = worst = 0; i < n * cols; i++) worst = fmax(worst, fabs(b[i] - x[i]));
        EXPECT(worst <= 1e-9, "%zu: the solution is off by %g", n, worst);
        free(r), free(a), free(l), free(x), free(b);
    }
}

// Hilbert's matrix, whose condition in the 1-norm is known from its inverse in whole numbers; and
// diagonals.
static void test_dense_condition(void) {
    static const struct { size_t n; double condition; } hilbert[] = {
        {3, 748.0}, {6, 29070279.0}, {9, 1.0996538e12}};
    for (size_t s = 0; s < 3; s++) {
        const size_t n = hilbert[s].n;
        double a[81];
        for (size_t i = 0; i < n * n; i++) a[i] = 1 / (double)(i / n + i % n + 1);
        const double norm = dense_norm1(a, n);
        EXPECT(dense_cholesky(a, n) == n, "%zu: refused", n);
        const double got = dense_condition(a, n, norm);
        EXPECT(got <= hilbert[s].condition * 1.01 && got >= hilbert[s].condition / 3,
               "Hilbert %zu: %.9g", n, got);
    }
    double d[16] = {1e3, 0, 0, 0, 0, 10, 0, 0, 0, 0, 1e-3, 0, 0, 0, 0, 2}, one[1] = {7};
    EXPECT(dense_cholesky(d, 4) == 4, "refused");
    EXPECT_CLOSE(dense_condition(d, 4, 1e3), 1e6, 1e-6, "of a diagonal");
    EXPECT(dense_cholesky(one, 1) == 1, "refused");
    EXPECT_CLOSE(dense_condition(one, 1, 7), 1, 1e-15, "of a number");
}

// Matrices without a factor: too few rows, zero, negative, not a number. The line is named; where
// rounding hides it, the condition tells.
static void test_dense_cholesky_refuses(void) {
    enum { N = 150, K = 120 };
    double *x = xcalloc((size_t)K * N, 8), *a = xcalloc((size_t)N * N, 8);
    dense_test_random(x, (size_t)K * N, 8);
    dense_gram(a, dense_of(x, N), N, K);
    const double norm = dense_norm1(a, N);
    const size_t at = dense_cholesky(a, N);
    EXPECT(at >= K - 1 && (at < N || dense_condition(a, N, norm) > 1e13), "rank %d of %d: line %zu",
           K, N, at);
    memset(a, 0, (size_t)N * N * 8);
    EXPECT(dense_cholesky(a, N) == 0, "zero");
    double nan[4] = {1, 0, NAN, 1}, negative[4] = {1, 0, 2, 1};
    EXPECT(dense_cholesky(nan, 2) == 1, "not a number");
    EXPECT(dense_cholesky(negative, 2) == 1, "indefinite");
    free(x), free(a);
}

#define DENSE_TESTS(X) X(dense_matmuls) X(dense_gram_bits) X(dense_cholesky) X(dense_condition) \
    X(dense_cholesky_refuses)

#endif
