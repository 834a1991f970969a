// dense.h: dense linear algebra in double precision for the tools: matmuls, Gram matrices, Cholesky
// factors, and the condition number of a symmetric matrix.
//
// Matrices are row-major; `ld` is the distance between the starts of two rows. Each sum is computed
// in the order of its terms, starting from the previous value: the same bits for any number of
// threads, and whether rows arrive in one call or in several.
#ifndef DENSE_H
#define DENSE_H

#include "../check.h"
#include "../model/matmul.h"                             // the shape of a tile, at_most, strips

// ---- Matmuls: y (M,N) = a (M,K) b (K,N) ----
//
// As in model/matmul.h, both operands are packed into strips, and a tile of y stays in registers.

typedef double DenseVector __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
enum { DENSE_LANES = VECTOR_BYTES / 8, DENSE_COLS = TILE_VECTORS * DENSE_LANES };
enum { DENSE_K = 256, DENSE_M = 16 * TILE_ROWS, DENSE_N = 24 * DENSE_COLS };   // a panel

// Elements of type double, or with `single` of type real. A matmul uses the matrix or, with
// `turned`, its transpose.
typedef struct { const void *at; size_t ld; int turned, single; } DenseMatrix;

static inline DenseMatrix dense_of(const double *at, size_t ld) {
    const DenseMatrix m = {at, ld, 0, 0};
    return m;
}
static inline DenseMatrix dense_of_real(const real *at, size_t ld) {
    const DenseMatrix m = {at, ld, 0, 1};
    return m;
}
static inline DenseMatrix dense_transposed(DenseMatrix m) {
    m.turned = !m.turned;
    return m;
}

// y = a b, y += a b or y -= a b. DENSE_LOWER is added to one of these when only elements on and
// below the diagonal are needed; some of those above are written too.
enum { DENSE_SET, DENSE_ADD, DENSE_SUBTRACT, DENSE_LOWER = 4 };

// out (K, width): rows k0.. of K elements each, `width` of them side by side, those past `lines` 0,
// times sign. Element k of row i is m(i0 + i, k0 + k), or transposed m(k0 + k, i0 + i).
static inline void dense_pack(double *out, DenseMatrix m, size_t i0, size_t lines, size_t width,
                              size_t k0, size_t K, double sign) {
    const double *d = (const double *)m.at;
    const real *s = (const real *)m.at;
    for (size_t k = 0; k < K; k++)
        for (size_t i = lines; i < width; i++) out[k * width + i] = 0;
    if (m.turned)
        for (size_t k = 0; k < K; k++) {
            const size_t at = (k0 + k) * m.ld + i0;
            double *to = out + k * width;
            if (m.single)
                for (size_t i = 0; i < lines; i++) to[i] = sign * (double)s[at + i];
            else
                for (size_t i = 0; i < lines; i++) to[i] = sign * d[at + i];
        }
    else
        for (size_t i = 0; i < lines; i++) {
            const size_t at = (i0 + i) * m.ld + k0;
            if (m.single)
                for (size_t k = 0; k < K; k++) out[k * width + i] = sign * (double)s[at + k];
            else
                for (size_t k = 0; k < K; k++) out[k * width + i] = sign * d[at + k];
        }
}

// y (TILE_ROWS, DENSE_COLS) += a (K, TILE_ROWS) b (K, DENSE_COLS), term by term.
static inline void dense_tile(double *restrict y, size_t ld, const double *restrict a,
                              const double *restrict b, size_t K) {
    DenseVector sum[TILE_ROWS][TILE_VECTORS];
    for (size_t i = 0; i < TILE_ROWS; i++)
        for (size_t j = 0; j < TILE_VECTORS; j++)
            sum[i][j] = *(const DenseVector *)(y + i * ld + j * DENSE_LANES);
    for (size_t k = 0; k < K; k++, a += TILE_ROWS, b += DENSE_COLS) {
        DenseVector line[TILE_VECTORS];
#pragma GCC unroll 4
        for (size_t j = 0; j < TILE_VECTORS; j++)
            line[j] = *(const DenseVector *)(b + j * DENSE_LANES);
#pragma GCC unroll 16
        for (size_t i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 4
            for (size_t j = 0; j < TILE_VECTORS; j++) sum[i][j] += a[i] * line[j];
    }
    for (size_t i = 0; i < TILE_ROWS; i++)
        for (size_t j = 0; j < TILE_VECTORS; j++)
            *(DenseVector *)(y + i * ld + j * DENSE_LANES) = sum[i][j];
}

// The same for a tile at the edge, of which only (rows, cols) exist.
static inline void dense_tile_edge(double *y, size_t ld, const double *a, const double *b, size_t K,
                                   size_t rows, size_t cols) {
    double whole[TILE_ROWS * DENSE_COLS] = {0};
    for (size_t i = 0; i < rows; i++)
        memcpy(whole + i * DENSE_COLS, y + i * ld, cols * sizeof *y);
    dense_tile(whole, DENSE_COLS, a, b, K);
    for (size_t i = 0; i < rows; i++)
        memcpy(y + i * ld, whole + i * DENSE_COLS, cols * sizeof *y);
}

// Panel (m0, n0) of the matmul, by one thread. buffer: DENSE_K (DENSE_M + DENSE_N) elements.
static inline void dense_block(double *y, size_t ld, DenseMatrix a, DenseMatrix b, size_t M,
                               size_t N, size_t K, size_t m0, size_t n0, int how, double *buffer) {
    const size_t rows = at_most(M - m0, DENSE_M), cols = at_most(N - n0, DENSE_N);
    const double sign = (how & 3) == DENSE_SUBTRACT ? -1 : 1;
    double *packed_b = buffer + (size_t)DENSE_K * DENSE_M;
    const DenseMatrix across = dense_transposed(b);          // its rows are the columns of b
    if ((how & 3) == DENSE_SET)
        for (size_t i = 0; i < rows; i++) memset(y + (m0 + i) * ld + n0, 0, cols * sizeof *y);
    for (size_t k0 = 0; k0 < K; k0 += DENSE_K) {
        const size_t k = at_most(K - k0, DENSE_K);
        for (size_t i = 0; i < rows; i += TILE_ROWS)
            dense_pack(buffer + i * k, a, m0 + i, at_most(rows - i, TILE_ROWS), TILE_ROWS, k0, k,
                       sign);
        for (size_t j = 0; j < cols; j += DENSE_COLS) {
            const size_t most = at_most(cols - j, DENSE_COLS);
            dense_pack(packed_b, across, n0 + j, most, DENSE_COLS, k0, k, 1);
            for (size_t i = 0; i < rows; i += TILE_ROWS) {
                const size_t here = at_most(rows - i, TILE_ROWS);
                double *to = y + (m0 + i) * ld + n0 + j;
                if (how & DENSE_LOWER && n0 + j > m0 + i + here - 1) continue;
                if (here == TILE_ROWS && most == DENSE_COLS)
                    dense_tile(to, ld, buffer + i * k, packed_b, k);
                else dense_tile_edge(to, ld, buffer + i * k, packed_b, k, here, most);
            }
        }
    }
}

// y (M,N) = a (M,K) b (K,N), or as `how` says. y overlaps neither operand. In a parallel region the
// calling thread does all the work.
static inline void dense_product(double *y, size_t ld, DenseMatrix a, DenseMatrix b, size_t M,
                                 size_t N, size_t K, int how) {
    const size_t down = strips(M, DENSE_M), across = strips(N, DENSE_N), blocks = down * across;
#ifdef _OPENMP
#pragma omp parallel if (blocks > 1)
#endif
    {
        double *buffer = (double *)xcalloc((size_t)DENSE_K * (DENSE_M + DENSE_N), sizeof *buffer);
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
        for (size_t i = 0; i < blocks; i++) {
            const size_t m0 = i / across * DENSE_M, n0 = i % across * DENSE_N;
            if (how & DENSE_LOWER && n0 > m0 + DENSE_M - 1) continue;
            dense_block(y, ld, a, b, M, N, K, m0, n0, how, buffer);
        }
        free(buffer);
    }
}

// gram (N,N) += x^T x of x (K,N), on and below the diagonal; dense_mirror fills in the rest.
static inline void dense_gram(double *gram, DenseMatrix x, size_t N, size_t K) {
    dense_product(gram, N, dense_transposed(x), x, N, N, K, DENSE_ADD | DENSE_LOWER);
}

static inline void dense_mirror(double *a, size_t n) {
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < i; j++) a[j * n + i] = a[i * n + j];
}

static inline double dense_dot(const double *a, const double *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static inline double dense_trace(const double *a, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += a[i * n + i];
    return sum;
}

// ---- Cholesky: a = L L^T ----

enum { DENSE_PANEL = 96 };

// Factors the diagonal block a (n,n) in place. Returns the first row whose pivot is not above
// `least`, or n.
static inline size_t dense_cholesky_block(double *a, size_t ld, size_t n, double least) {
    for (size_t j = 0; j < n; j++) {
        double pivot = a[j * ld + j];
        for (size_t k = 0; k < j; k++) pivot -= a[j * ld + k] * a[j * ld + k];
        if (!(pivot > least)) return j;
        a[j * ld + j] = sqrt(pivot);
        for (size_t i = j + 1; i < n; i++) {
            double sum = a[i * ld + j];
            for (size_t k = 0; k < j; k++) sum -= a[i * ld + k] * a[j * ld + k];
            a[i * ld + j] = sum / a[j * ld + j];
        }
    }
    return n;
}

// Factors the symmetric a (n,n) in place; only elements on and below the diagonal are read and
// written. Returns n; or, if a is not positive definite, the row at which that shows: a pivot
// within rounding of zero (n eps times the largest diagonal element) or not finite. Then the
// contents of a are undefined.
static inline size_t dense_cholesky(double *a, size_t n) {
    double largest = 0;
    for (size_t i = 0; i < n; i++) largest = fmax(largest, fabs(a[i * n + i]));
    const double least = 2.220446049250313e-16 * (double)n * largest;
    for (size_t at = 0; at < n; at += DENSE_PANEL) {
        const size_t width = at_most(n - at, DENSE_PANEL), after = at + width;
        double *block = a + at * n + at;
        const size_t good = dense_cholesky_block(block, n, width, least);
        if (good < width) return at + good;
#ifdef _OPENMP
#pragma omp parallel for
#endif
        for (size_t i = after; i < n; i++) {             // L21 = A21 L11^-T, row by row
            double *line = a + i * n + at;
            for (size_t j = 0; j < width; j++) {
                double sum = line[j];
                for (size_t k = 0; k < j; k++) sum -= line[k] * block[j * n + k];
                line[j] = sum / block[j * n + j];
            }
        }
        if (after == n) break;
        const DenseMatrix panel = dense_of(a + after * n + at, n);
        dense_product(a + after * n + after, n, panel, dense_transposed(panel), n - after,
                      n - after, width, DENSE_SUBTRACT | DENSE_LOWER);
    }
    return n;
}

// Solves rows [at, at + width) of L y = x (with `back`: L^T y = x); all other rows of y are known
// and already subtracted from x. In place, column by column.
static inline void dense_solve_panel(const double *l, size_t n, size_t at, size_t width, double *x,
                                     size_t cols, int back) {
    enum { TOGETHER = 64 };
#ifdef _OPENMP
#pragma omp parallel for if (cols > TOGETHER)
#endif
    for (size_t c0 = 0; c0 < cols; c0 += TOGETHER) {
        const size_t here = at_most(cols - c0, TOGETHER);
        for (size_t step = 0; step < width; step++) {
            const size_t i = at + (back ? width - 1 - step : step);
            double *to = x + i * cols + c0;
            for (size_t other = 0; other < step; other++) {
                const size_t j = at + (back ? width - 1 - other : other);
                const double factor = back ? l[j * n + i] : l[i * n + j];
                const double *from = x + j * cols + c0;
                for (size_t c = 0; c < here; c++) to[c] -= factor * from[c];
            }
            for (size_t c = 0; c < here; c++) to[c] /= l[i * n + i];
        }
    }
}

// x (n, cols) = (L L^T)^-1 x, in place, with dense_cholesky's factor l (n,n).
static inline void dense_solve(const double *l, size_t n, double *x, size_t cols) {
    for (size_t at = 0; at < n; at += DENSE_PANEL) {
        const size_t width = at_most(n - at, DENSE_PANEL), after = at + width;
        dense_solve_panel(l, n, at, width, x, cols, 0);
        if (after < n)
            dense_product(x + after * cols, cols, dense_of(l + after * n + at, n),
                          dense_of(x + at * cols, cols), n - after, cols, width, DENSE_SUBTRACT);
    }
    for (size_t panel = strips(n, DENSE_PANEL); panel-- > 0;) {
        const size_t at = panel * DENSE_PANEL, width = at_most(n - at, DENSE_PANEL);
        dense_solve_panel(l, n, at, width, x, cols, 1);
        if (at > 0)
            dense_product(x, cols, dense_transposed(dense_of(l + at * n, n)),
                          dense_of(x + at * cols, cols), at, cols, width, DENSE_SUBTRACT);
    }
}

// The largest absolute row sum of the symmetric a (n,n), which is its 1-norm; only elements on and
// below the diagonal are read.
static inline double dense_norm1(const double *a, size_t n) {
    double *sum = (double *)xcalloc(n, sizeof *sum), most = 0;
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j <= i; j++) {
            const double size = fabs(a[i * n + j]);
            sum[i] += size;
            if (j < i) sum[j] += size;
        }
    for (size_t i = 0; i < n; i++) most = fmax(most, sum[i]);
    free(sum);
    return most;
}

// An estimate, from below and rarely off by more than a factor of 3, of the condition number of the
// matrix with the factor l (n,n) and the 1-norm `norm`: norm times the 1-norm of the inverse, by
// Higham's algorithm ("FORTRAN codes for estimating the one-norm", 1988, algorithm 4.1; LAPACK's
// xLACON).
static inline double dense_condition(const double *l, size_t n, double norm) {
    double *x = (double *)xcalloc(n, sizeof *x), *sign = (double *)xcalloc(n, sizeof *sign),
           best = 0;
    size_t at = n; // x is unit vector `at`; n: 1/n in every element
    for (int turn = 0; turn < 5; turn++) {
        for (size_t i = 0; i < n; i++) x[i] = at == n ? 1 / (double)n : i == at;
        dense_solve(l, n, x, 1);
        double size = 0;
        int same = turn > 0;
        for (size_t i = 0; i < n; i++) {
            const double s = x[i] < 0 ? -1 : 1;
            size += fabs(x[i]);
            same = same && s == sign[i];
            sign[i] = s;
        }
        if (turn > 0 && size <= best) break;
        best = fmax(best, size);
        if (same) break;
        memcpy(x, sign, n * sizeof *x);
        dense_solve(l, n, x, 1);
        size_t largest = 0;
        for (size_t i = 1; i < n; i++)
            if (fabs(x[i]) > fabs(x[largest])) largest = i;
        if (at < n && fabs(x[largest]) <= x[at]) break;
        at = largest;
    }
    double size = 0; // alternating and growing: another lower bound
    for (size_t i = 0; i < n; i++)
        x[i] = (i % 2 ? -1 : 1) * (1 + (n > 1 ? (double)i / (double)(n - 1) : 0));
    dense_solve(l, n, x, 1);
    for (size_t i = 0; i < n; i++) size += fabs(x[i]);
    best = fmax(best, 2 * size / (3 * (double)n));
    free(x), free(sign);
    return norm * best;
}

#endif
