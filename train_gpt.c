// train_gpt.c: GPT-2 with drop path on the CPU: every layer forward and backward, AdamW, and nothing else.
//
// Read it top to bottom. Sizes are letters: B rows, T tokens of a row, C channels, NH heads of HS = C/NH channels,
// L layers, V tokens in the vocabulary. A shape stands with every pointer; a gradient is d + the name.
//
// Drop path is in the block loop (block_forward, block_backward): a branch runs on the n rows that keep it, packed
// together as (n,T,...), and adds its scaled output to those rows of the residual stream x (B,T,C). With n = 0 it
// does not run at all. Which rows, and which scale, is the plan's matter (dev/drop_path.h).
//
// Every sum is taken in an order that depends on the shapes alone, so the results are the same bits for any number
// of threads.

#include "dev/check.h"
#include "dev/engine.h"
#include <math.h>
#ifdef _OPENMP
#include <omp.h>
#endif

// ---- Numbers ----

// The widest vectors of the target, by the compiler's vector extension; LANES numbers each.
#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, TILE_ROWS = 12, TILE_VECTORS = 2 };      // 24 accumulators of 32 registers
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32, TILE_ROWS = 6, TILE_VECTORS = 2 };       // 12 of 16
#elif defined(__aarch64__)
enum { VECTOR_BYTES = 16, TILE_ROWS = 8, TILE_VECTORS = 3 };       // 24 of 32
#else
enum { VECTOR_BYTES = 16, TILE_ROWS = 4, TILE_VECTORS = 2 };       // 8 of 16
#endif
enum { LANES = VECTOR_BYTES / sizeof(real), TILE_COLS = TILE_VECTORS * LANES };
#define ALWAYS_INLINE __attribute__((always_inline))
typedef real Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

#ifdef REAL_DOUBLE
static inline real exp_real(real x) { return exp(x); }
static inline real sqrt_real(real x) { return sqrt(x); }
#else
static inline real sqrt_real(real x) { return sqrtf(x); }

// e^x in a form that compilers vectorise, within 1.25 ulp for -87 <= x <= 88; 0 below, inf above, NaN for NaN.
// x = n ln2 + r with |r| <= ln2/2; e^r by its Taylor polynomial of degree 7 (the remainder is below 2^-27).
static inline real exp_real(real x) {
    const float magic = 12582912.0f;                     // 1.5 * 2^23: adding it rounds to an integer
    float t = x * 1.44269504f + magic, n = t - magic;
    float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union { float f; uint32_t bits; } shift = {t}, y = {p};
    y.bits += (shift.bits - 0x4B400000u) << 23;          // times 2^n
    return x < -87.0f ? 0.0f : x <= 88.0f ? y.f : x + INFINITY;      // the last for NaN, too
}
#endif

// The largest of x (n), n >= 1, in independent lanes because no compiler may reorder a plain maximum. NaNs are passed over.
static inline real max_of(const real *x, size_t n) {
    real top[LANES];
    for (size_t j = 0; j < LANES; j++) top[j] = x[0];
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t j = 0; j < LANES; j++) top[j] = x[i + j] > top[j] ? x[i + j] : top[j];
    for (; i < n; i++) top[0] = x[i] > top[0] ? x[i] : top[0];
    for (size_t j = 1; j < LANES; j++) top[0] = top[j] > top[0] ? top[j] : top[0];
    return top[0];
}

// ---- Matrix products: y (M,N) = a (M,K) b (K,N), any of them seen transposed ----
// b is packed into strips of TILE_COLS columns and a into strips of TILE_ROWS rows, for K_BLOCK of the K at a time;
// the kernel keeps one (TILE_ROWS, TILE_COLS) tile of y in registers. Each y is summed over K in order.
//
// K_BLOCK is the C of a small GPT-2, so that y is written once; a strip of b and ROW_STRIPS strips of a stay in L2. The
// blocks are as large as the products of a micro-batch, so that little is packed twice (measured: dev/bench/SPEED.md).

enum { K_BLOCK = 768, M_BLOCK = 128 * TILE_ROWS, N_BLOCK = 96 * TILE_COLS, ROW_STRIPS = 8, COL_STRIPS = 8 };

typedef struct { const real *at; size_t row, col; } View;          // element (i, j) is at[i*row + j*col]
typedef struct { real *a, *b; } PackRoom;                          // (M_BLOCK, K_BLOCK) and (K_BLOCK, N_BLOCK)

static inline size_t at_most(size_t n, size_t most) { return n < most ? n : most; }
static inline size_t strips(size_t n, size_t width) { return (n + width - 1) / width; }

static inline View view(const real *at, size_t row, size_t col) {
    View v = {at, row, col};
    return v;
}

// One strip, n <= width of the `step`-spaced lines, to (K, width), with zeros for the lines that are missing.
static void pack_strip(real *to, const real *from, size_t step, size_t k_step, size_t n, size_t width, size_t K) {
    if (step == 1) {
        for (size_t k = 0; k < K; k++) {
            memcpy(to + k * width, from + k * k_step, n * sizeof(real));
            for (size_t i = n; i < width; i++) to[k * width + i] = 0;
        }
        return;
    }
    enum { AT_ONCE = 16 };                               // a cache line of each line, to few enough places to stay in L1
    for (size_t k0 = 0; k0 < K; k0 += AT_ONCE) {
        const size_t k1 = at_most(k0 + AT_ONCE, K);
        for (size_t i = 0; i < n; i++)
            for (size_t k = k0; k < k1; k++) to[k * width + i] = from[i * step + k * k_step];
        for (size_t i = n; i < width; i++)
            for (size_t k = k0; k < k1; k++) to[k * width + i] = 0;
    }
}

// What a product is added to: nothing, the old y, or the same bias (N) in every row.
typedef struct { int old; const real *bias; } Start;

// sum += a (TILE_ROWS,K) b (K,TILE_COLS), with a[i*a_row + k*a_k] and b[k*b_k + j]: of packed strips, or in place.
static inline ALWAYS_INLINE void tile_sums(Vector sum[TILE_ROWS][TILE_VECTORS], const real *a, size_t a_row, size_t a_k,
                                           const real *b, size_t b_k, size_t K) {
    for (size_t k = 0; k < K; k++, a += a_k, b += b_k) {
        Vector bk[TILE_VECTORS];
        for (int j = 0; j < TILE_VECTORS; j++) bk[j] = *(const Vector *)(b + j * LANES);
#pragma GCC unroll 16
        for (size_t i = 0; i < TILE_ROWS; i++)
            for (int j = 0; j < TILE_VECTORS; j++) sum[i][j] += a[i * a_row] * bk[j];
    }
}

// y (M,N), rows ldy apart, M <= TILE_ROWS, N <= TILE_COLS: start + strip a (K,TILE_ROWS) x strip b (K,TILE_COLS).
static void multiply_tile(real *y, size_t ldy, const real *a, const real *b, size_t M, size_t N, size_t K, Start start) {
    Vector sum[TILE_ROWS][TILE_VECTORS] = {0};
    tile_sums(sum, a, 1, TILE_ROWS, b, TILE_COLS, K);
    if (M == TILE_ROWS && N == TILE_COLS) {
#pragma GCC unroll 16
        for (int i = 0; i < TILE_ROWS; i++)
            for (int j = 0; j < TILE_VECTORS; j++) {
                Vector *to = (Vector *)(y + (size_t)i * ldy + j * LANES);
                if (start.old) *to += sum[i][j];
                else if (start.bias) *to = *(const Vector *)(start.bias + j * LANES) + sum[i][j];
                else *to = sum[i][j];
            }
        return;
    }
    real edge[TILE_ROWS][TILE_COLS];
    memcpy(edge, sum, sizeof edge);
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++)
            y[i * ldy + j] = (start.old ? y[i * ldy + j] : start.bias ? start.bias[j] : 0) + edge[i][j];
}

// One block y (M,N) = start + a (M,K) b (K,N): tasks of ROW_STRIPS x COL_STRIPS tiles over the threads.
static void multiply_block(real *y, size_t ldy, PackRoom room, View a, View b, size_t M, size_t N, size_t K, Start start) {
    size_t row_strips = strips(M, TILE_ROWS), col_strips = strips(N, TILE_COLS);
#pragma omp parallel
    {
#pragma omp for nowait
        for (size_t s = 0; s < row_strips; s++)
            pack_strip(room.a + s * TILE_ROWS * K, a.at + s * TILE_ROWS * a.row, a.row, a.col,
                       at_most(M - s * TILE_ROWS, TILE_ROWS), TILE_ROWS, K);
#pragma omp for
        for (size_t s = 0; s < col_strips; s++)
            pack_strip(room.b + s * TILE_COLS * K, b.at + s * TILE_COLS * b.col, b.col, b.row,
                       at_most(N - s * TILE_COLS, TILE_COLS), TILE_COLS, K);
#pragma omp for collapse(2) schedule(dynamic)
        for (size_t i0 = 0; i0 < row_strips; i0 += ROW_STRIPS)
            for (size_t j0 = 0; j0 < col_strips; j0 += COL_STRIPS)
                for (size_t j = j0; j < at_most(j0 + COL_STRIPS, col_strips); j++) {
                    const Start from = {start.old, start.bias ? start.bias + j * TILE_COLS : NULL};
                    for (size_t i = i0; i < at_most(i0 + ROW_STRIPS, row_strips); i++)
                        multiply_tile(y + i * TILE_ROWS * ldy + j * TILE_COLS, ldy, room.a + i * TILE_ROWS * K,
                                      room.b + j * TILE_COLS * K, at_most(M - i * TILE_ROWS, TILE_ROWS),
                                      at_most(N - j * TILE_COLS, TILE_COLS), K, from);
                }
    }
}

static const Start FRESH = {0, NULL}, ADD = {1, NULL};

// y (M,N) = start + a b; y must not overlap a or b.
static void multiply(real *y, PackRoom room, View a, View b, size_t M, size_t N, size_t K, Start start) {
    for (size_t n = 0; n < N; n += N_BLOCK)
        for (size_t k = 0; k < K; k += K_BLOCK) {
            const Start from = {k > 0 || start.old, start.bias ? start.bias + n : NULL};
            for (size_t i = 0; i < M; i += M_BLOCK)
                multiply_block(y + i * N + n, N, room, view(a.at + i * a.row + k * a.col, a.row, a.col),
                               view(b.at + k * b.row + n * b.col, b.row, b.col), at_most(M - i, M_BLOCK),
                               at_most(N - n, N_BLOCK), at_most(K - k, K_BLOCK), from);
        }
}

// y (BT,OC) = x (BT,C) w (C,OC) + bias (OC)
static void matmul_forward(real *y, PackRoom room, const real *x, const real *w, const real *bias,
                           size_t BT, size_t C, size_t OC) {
    const Start from = {0, bias};
    multiply(y, room, view(x, C, 1), view(w, OC, 1), BT, OC, C, from);
}

// sum (N) += the columns of y (M,N); with xhat (M,N) also scaled (N) += the columns of y * xhat.
static void column_sums(real *sum, real *scaled, const real *y, const real *xhat, size_t M, size_t N) {
    enum { WIDTH = 64 };
#pragma omp parallel for
    for (size_t n = 0; n < N; n += WIDTH) {
        size_t width = at_most(N - n, WIDTH);
        real s[WIDTH] = {0}, z[WIDTH] = {0};
        for (size_t i = 0; i < M; i++) {
            const real *yi = y + i * N + n, *xi = xhat ? xhat + i * N + n : NULL;
            for (size_t j = 0; j < width; j++) s[j] += yi[j];
            for (size_t j = 0; xi && j < width; j++) z[j] += yi[j] * xi[j];
        }
        for (size_t j = 0; j < width; j++) sum[n + j] += s[j];
        for (size_t j = 0; xhat && j < width; j++) scaled[n + j] += z[j];
    }
}

// dx (BT,C) = dy (BT,OC) w^T;  dw (C,OC) += x^T dy;  dbias (OC) += the columns of dy
static void matmul_backward(real *dx, real *dw, real *dbias, PackRoom room, const real *dy, const real *x, const real *w,
                            size_t BT, size_t C, size_t OC) {
    multiply(dx, room, view(dy, OC, 1), view(w, 1, OC), BT, C, OC, FRESH);
    multiply(dw, room, view(x, 1, C), view(dy, OC, 1), C, OC, BT, ADD);
    column_sums(dbias, NULL, dy, NULL, BT, OC);
}

// ---- Embedding: tokens (B,T) -> x (B,T,C) ----

static void embedding_forward(real *x, const int *tokens, const real *wte, const real *wpe, size_t B, size_t T, size_t C) {
#pragma omp parallel for
    for (size_t bt = 0; bt < B * T; bt++)
        for (size_t c = 0; c < C; c++) x[bt * C + c] = wte[(size_t)tokens[bt] * C + c] + wpe[bt % T * C + c];
}

// dwte (V,C) and dwpe (T,C) +=. Threads share out the channels, not the tokens: one token may occur many times.
static void embedding_backward(real *dwte, real *dwpe, const int *tokens, const real *dx, size_t B, size_t T, size_t C) {
    enum { WIDTH = 16 };
#pragma omp parallel for
    for (size_t c0 = 0; c0 < C; c0 += WIDTH)
        for (size_t bt = 0; bt < B * T; bt++)
            for (size_t c = c0; c < at_most(c0 + WIDTH, C); c++) {
                dwte[(size_t)tokens[bt] * C + c] += dx[bt * C + c];
                dwpe[bt % T * C + c] += dx[bt * C + c];
            }
}

// ---- The residual stream x (B,T,C), seen by a branch that runs on n of its B rows ----

// x[rows] += scale * out (n,T,C)
static void residual_forward(real *x, const real *out, const BranchPlan *b, size_t T, size_t C) {
    const real scale = (real)b->scale;
#pragma omp parallel for
    for (size_t t = 0; t < (size_t)b->n * T; t++) {
        real *to = x + ((size_t)b->rows[t / T] * T + t % T) * C;
        for (size_t c = 0; c < C; c++) to[c] += scale * out[t * C + c];
    }
}

// dout (n,T,C) = scale * dx[rows]
static void residual_backward(real *dout, const real *dx, const BranchPlan *b, size_t T, size_t C) {
    const real scale = (real)b->scale;
#pragma omp parallel for
    for (size_t t = 0; t < (size_t)b->n * T; t++) {
        const real *from = dx + ((size_t)b->rows[t / T] * T + t % T) * C;
        for (size_t c = 0; c < C; c++) dout[t * C + c] = scale * from[c];
    }
}

// ---- LayerNorm (Ba, Kiros, Hinton 2016): reads x by row index, writes packed rows; keeps xhat and 1/sigma ----

// y (n,T,C) = xhat * w + b with xhat (n,T,C) = (z - mean) * rstd of z = x[rows], plus `more` (n,T,C) where given.
static void layernorm_forward(real *y, real *xhat, real *rstd, const real *x, const real *more, const int *rows,
                              const real *w, const real *b, size_t n, size_t T, size_t C) {
#pragma omp parallel for
    for (size_t t = 0; t < n * T; t++) {
        const real *from = x + ((size_t)rows[t / T] * T + t % T) * C;
        real *z = xhat + t * C, mean = 0, variance = 0;
        for (size_t c = 0; c < C; c++) z[c] = from[c] + (more ? more[t * C + c] : 0);
#pragma omp simd reduction(+:mean)
        for (size_t c = 0; c < C; c++) mean += z[c];
        mean /= (real)C;
#pragma omp simd reduction(+:variance)
        for (size_t c = 0; c < C; c++) variance += (z[c] - mean) * (z[c] - mean);
        rstd[t] = (real)(1 / sqrt((double)variance / (double)C + 1e-5));
        for (size_t c = 0; c < C; c++) {
            z[c] = (z[c] - mean) * rstd[t];
            y[t * C + c] = z[c] * w[c] + b[c];
        }
    }
}

// y (n,T,C) again, from what was kept: the backward pass needs it as the input of a matrix product.
static void layernorm_again(real *y, const real *xhat, const real *w, const real *b, size_t nT, size_t C) {
#pragma omp parallel for
    for (size_t t = 0; t < nT; t++)
        for (size_t c = 0; c < C; c++) y[t * C + c] = xhat[t * C + c] * w[c] + b[c];
}

// dz (n,T,C) = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * w;  dw, db (C) +=. dz may be dy.
static void layernorm_backward(real *dz, real *dw, real *db, const real *dy, const real *xhat, const real *rstd,
                               const real *w, size_t nT, size_t C) {
    column_sums(db, dw, dy, xhat, nT, C);
#pragma omp parallel for
    for (size_t t = 0; t < nT; t++) {
        const real *g = dy + t * C, *z = xhat + t * C;
        real mean = 0, along = 0;
#pragma omp simd reduction(+:mean, along)
        for (size_t c = 0; c < C; c++) {
            mean += g[c] * w[c];
            along += g[c] * w[c] * z[c];
        }
        mean /= (real)C;
        along /= (real)C;
        for (size_t c = 0; c < C; c++) dz[t * C + c] = rstd[t] * (g[c] * w[c] - mean - z[c] * along);
    }
}

// ---- Transposing LANES x LANES numbers: as dev/vector.h, from where it comes when both are merged ----

#ifndef __has_builtin
#define __has_builtin(x) 0
#endif
#if !__has_builtin(__builtin_shufflevector)
#define VECTOR_NO_SHUFFLE 1                              // gcc before 12
#elif defined(__AVX512F__) && !defined(REAL_DOUBLE)
#define VECTOR_LOW  0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define VECTOR_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX512F__) || (defined(__AVX__) && !defined(REAL_DOUBLE))
#define VECTOR_LOW  0, 8, 1, 9, 2, 10, 3, 11
#define VECTOR_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#elif defined(__AVX__) || !defined(REAL_DOUBLE)
#define VECTOR_LOW  0, 4, 1, 5
#define VECTOR_HIGH 2, 6, 3, 7
#else
#define VECTOR_LOW  0, 2
#define VECTOR_HIGH 1, 3
#endif

// Line i of v becomes column i: log2(LANES) times, line i of the first half and of the second are dealt out in turn.
static inline ALWAYS_INLINE void vector_transpose(Vector v[LANES]) {
#ifdef VECTOR_NO_SHUFFLE
    for (size_t i = 0; i < LANES; i++)
        for (size_t j = 0; j < i; j++) {
            const real x = v[i][j];
            v[i][j] = v[j][i], v[j][i] = x;
        }
#else
#pragma GCC unroll 4
    for (size_t round = LANES; round > 1; round /= 2) {
        Vector w[LANES];
#pragma GCC unroll 8
        for (size_t i = 0; i < LANES / 2; i++) {
            w[2 * i] = __builtin_shufflevector(v[i], v[i + LANES / 2], VECTOR_LOW);
            w[2 * i + 1] = __builtin_shufflevector(v[i], v[i + LANES / 2], VECTOR_HIGH);
        }
        memcpy(v, w, sizeof w);
    }
#endif
}

// ---- Attention: qkv (n,T,3C) -> y (n,T,C), causal; keeps the log-sum-exp (n,NH,T) for the backward pass ----
// Blocks of queries against blocks of keys with a running softmax (Milakov and Gimelshein 2018; Dao et al. 2022):
// no (T,T) matrix exists.
//
// Scores stand transposed, as (keys, queries), so that a vector of maxima and one of sums serve LANES queries. Of every
// product one operand is then read number by number, in either direction, and the other by vectors along its lines: only q
// (and in the backward pass dy) is transposed, once per block. Copies of the lines of one head, W = HS rounded up to
// whole vectors, have no edges, and none of the distances that let few lines of a cache serve all of them.

enum {
    QUERIES = 512 / sizeof(real), KEYS = 64, HEAD_MAX = 256,       // of a block (its room: 850 KB); channels of a head
    STRIP_ROWS = TILE_ROWS < 8 ? 4 : 8, STRIP_VECTORS = 2,         // a tile here: these divide the blocks and most heads
    PAD = (int)LANES > (int)STRIP_ROWS ? (int)LANES : (int)STRIP_ROWS
};

typedef struct {                                         // one thread's room
    _Alignas(64) real q[QUERIES * HEAD_MAX], dy[QUERIES * HEAD_MAX];         // (QUERIES,W); q carries the scale 1/sqrt(HS)
    real qt[HEAD_MAX * QUERIES], dyt[HEAD_MAX * QUERIES];    // (W,QUERIES) the same, transposed
    real k[KEYS * HEAD_MAX], v[KEYS * HEAD_MAX];         // (KEYS,W) keys
    real out[QUERIES * HEAD_MAX];                        // (QUERIES,W) queries: of y or dq
    real s[KEYS * QUERIES], ds[KEYS * QUERIES];          // (keys,queries)
    real top[QUERIES], sum[QUERIES], shrink[QUERIES], inner[QUERIES];   // of each query
} AttentionRoom;

static const real ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};    // >= STRIP_ROWS

static inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// to (n,W) = scale * from (n,HS), lines ld apart, with zeros in the columns after HS and in lines up to a multiple of PAD.
static void load_lines(real *to, const real *from, size_t ld, real scale, size_t n, size_t HS, size_t W) {
    for (size_t i = 0; i < n; i++) {
        size_t d = 0;
        for (; d + LANES <= HS; d += LANES) *(Vector *)(to + i * W + d) = scale * *(const Vector *)(from + i * ld + d);
        for (; d < HS; d++) to[i * W + d] = scale * from[i * ld + d];
        for (; d < W; d++) to[i * W + d] = 0;
    }
    memset(to + n * W, 0, (round_up(n, PAD) - n) * W * sizeof(real));
}

// to (W,QUERIES) = from (n,W) transposed, in squares of LANES.
static void load_turned(real *to, const real *from, size_t n, size_t W) {
    for (size_t i = 0; i < n; i += LANES)
        for (size_t d = 0; d < W; d += LANES) {
            Vector v[LANES];
#pragma GCC unroll 16
            for (size_t j = 0; j < LANES; j++) v[j] = *(const Vector *)(from + (i + j) * W + d);
            vector_transpose(v);
#pragma GCC unroll 16
            for (size_t j = 0; j < LANES; j++) *(Vector *)(to + (d + j) * QUERIES + i) = v[j];
        }
}

// y (M,N), lines ldy apart, = keep (M) * y + a (M,K) b (K,N), with a[i*a_row + k*a_k] and b[k*ldb + j]. M <= STRIP_ROWS and
// N <= vectors * LANES say what of y is written; a and b are read as if they were equal. Without keep, y is not read.
static inline ALWAYS_INLINE void strip_tile(real *y, size_t ldy, const real *keep, const real *a, size_t a_row, size_t a_k,
                                            const real *b, size_t ldb, size_t M, size_t N, size_t K, size_t vectors) {
    Vector sum[STRIP_ROWS][STRIP_VECTORS] = {0};
    for (size_t k = 0; k < K; k++, a += a_k, b += ldb) {
        Vector bk[STRIP_VECTORS];
        for (size_t j = 0; j < vectors; j++) bk[j] = *(const Vector *)(b + j * LANES);
#pragma GCC unroll 8
        for (size_t i = 0; i < STRIP_ROWS; i++)
            for (size_t j = 0; j < vectors; j++) sum[i][j] += a[i * a_row] * bk[j];
    }
    if (M == STRIP_ROWS && N == vectors * LANES) {
#pragma GCC unroll 8
        for (size_t i = 0; i < STRIP_ROWS; i++)
            for (size_t j = 0; j < vectors; j++) {
                Vector *to = (Vector *)(y + i * ldy + j * LANES);
                if (keep) sum[i][j] += keep[i] * *to;
                *to = sum[i][j];
            }
        return;
    }
    real edge[STRIP_ROWS][STRIP_VECTORS * LANES];
    memcpy(edge, sum, sizeof edge);
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++) y[i * ldy + j] = (keep ? keep[i] * y[i * ldy + j] : 0) + edge[i][j];
}

// The same for any N.
static inline ALWAYS_INLINE void strip_columns(real *y, size_t ldy, const real *keep, const real *a, size_t a_row,
                                               size_t a_k, const real *b, size_t ldb, size_t M, size_t N, size_t K) {
    size_t j = 0;
    for (; j + LANES < N; j += STRIP_VECTORS * LANES)
        strip_tile(y + j, ldy, keep, a, a_row, a_k, b + j, ldb, M, at_most(N - j, STRIP_VECTORS * LANES), K, STRIP_VECTORS);
    if (j < N) strip_tile(y + j, ldy, keep, a, a_row, a_k, b + j, ldb, M, N - j, K, 1);
}

// With the lines of a contiguous, a[i*lda + k], ...
static void strip_by_lines(real *y, size_t ldy, const real *keep, const real *a, size_t lda, const real *b, size_t ldb,
                           size_t M, size_t N, size_t K) {
    strip_columns(y, ldy, keep, a, lda, 1, b, ldb, M, N, K);
}

// ... and with its columns, a[i + k*lda].
static void strip_by_columns(real *y, size_t ldy, const real *keep, const real *a, size_t lda, const real *b, size_t ldb,
                             size_t M, size_t N, size_t K) {
    strip_columns(y, ldy, keep, a, 1, lda, b, ldb, M, N, K);
}

// How many queries of the block from i0 on come before key j: they do not see it.
static inline size_t blind(size_t i0, size_t j) { return j > i0 ? j - i0 : 0; }

// The first of the block's queries for which scores with key j are made: that of the PAD with the first that sees it.
static inline size_t first_lane(size_t i0, size_t j) { return blind(i0, j) / PAD * PAD; }

// s (nj,lanes) = k (nj,HS) qt (HS,lanes), each from first_lane on.
static void attention_scores(real *s, const real *k, const real *qt, size_t i0, size_t j0, size_t nj,
                             size_t lanes, size_t HS, size_t W) {
    for (size_t j = 0; j < nj; j += STRIP_ROWS) {
        const size_t lane = first_lane(i0, j0 + j);
        strip_by_lines(s + j * QUERIES + lane, QUERIES, NULL, k + j * W, W, qt + lane, QUERIES, STRIP_ROWS, lanes - lane,
                       HS);
    }
}

#ifdef REAL_DOUBLE
typedef int64_t Mask __attribute__((vector_size(VECTOR_BYTES)));
static inline real log_real(real x) { return log(x); }
#else
typedef int32_t Mask __attribute__((vector_size(VECTOR_BYTES)));
static inline real log_real(real x) { return logf(x); }
#endif

static inline ALWAYS_INLINE Vector select_lanes(Mask first, Vector a, Vector b) {
    return (Vector)(((Mask)a & first) | ((Mask)b & ~first));
}

// exp_real of each, for x <= 88: the same bits, in vectors since gcc would mask every line of that one.
static inline ALWAYS_INLINE Vector exp_lanes(Vector x) {
#ifdef REAL_DOUBLE
    for (int l = 0; l < LANES; l++) x[l] = exp(x[l]);
    return x;
#else
    const Vector t = x * 1.44269504f + 12582912.0f, n = t - 12582912.0f;
    const Vector r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Vector p = r * 1.98412698e-4f + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    p *= (Vector)(((Mask)t - 0x4B400000 + 127) << 23);   // times 2^n; NaN stays NaN
    return (Vector)((Mask)p & ~(x < -87.0f));
#endif
}

// Of nj keys from j0 on, those with scores for query i of the block: up to the last that the queries of its PAD see.
static inline size_t keys_seen(size_t i0, size_t i, size_t j0, size_t nj) {
    const size_t end = i0 + i / PAD * PAD + PAD;
    return end <= j0 ? 0 : at_most(end - j0, nj);
}

// The scores of key j with queries i .. i + LANES: -inf where the key is later than the query.
static inline ALWAYS_INLINE Vector causal(Vector s, size_t i, size_t j) {
    if (j <= i) return s;
    Mask lane;
    for (int l = 0; l < LANES; l++) lane[l] = l;
    return select_lanes(lane >= (int)(j - i), s, (Vector){0} - (real)INFINITY);
}

// One block of scores into the running softmax: s becomes exp(s - top), and sum is brought to the new top, as what was
// summed up of y must be: times shrink. A query's first block has a key that it sees, so top is finite after it.
static void softmax_block(AttentionRoom *room, size_t i0, size_t j0, size_t nj, size_t lanes) {
    for (size_t i = 0; i < lanes; i += LANES) {
        const size_t seen = keys_seen(i0, i, j0, nj);
        Vector *top = (Vector *)(room->top + i), *sum = (Vector *)(room->sum + i), high = *top, total = {0};
        for (size_t j = 0; j < seen; j++) {
            Vector *s = (Vector *)(room->s + j * QUERIES + i);
            if (j0 + j > i0 + i) *s = causal(*s, i0 + i, j0 + j);
            high = select_lanes(*s > high, *s, high);
        }
        const Vector shrink = exp_lanes(*top - high);
        for (size_t j = 0; j < seen; j++) {
            Vector *s = (Vector *)(room->s + j * QUERIES + i);
            total += *s = exp_lanes(*s - high);
        }
        *(Vector *)(room->shrink + i) = shrink;
        *sum = *sum * shrink + total;
        *top = high;
    }
}

// One block of queries of one head: y (T,HS), lines C apart, and lse (T), from q, k and v (T,HS), lines 3C apart.
static void attention_forward_block(real *y, real *lse, const real *q, AttentionRoom *room, size_t i0, size_t T, size_t C,
                                    size_t HS) {
    const size_t ld = 3 * C, W = round_up(HS, LANES), ni = at_most(T - i0, QUERIES), lanes = round_up(ni, PAD);
    const real *k = q + C, *v = k + C;
    load_lines(room->q, q + i0 * ld, ld, (real)(1 / sqrt((double)HS)), ni, HS, W);
    load_turned(room->qt, room->q, ni, W);
    for (size_t i = 0; i < QUERIES; i++) room->top[i] = -INFINITY, room->sum[i] = 0;
    for (size_t j0 = 0; j0 < i0 + ni; j0 += KEYS) {
        const size_t nj = at_most(T - j0, KEYS);
        load_lines(room->k, k + j0 * ld, ld, 1, nj, HS, W);
        load_lines(room->v, v + j0 * ld, ld, 1, nj, HS, W);
        attention_scores(room->s, room->k, room->qt, i0, j0, nj, lanes, HS, W);
        softmax_block(room, i0, j0, nj, lanes);
        for (size_t i = blind(i0, j0); i < ni; i += STRIP_ROWS)
            strip_by_columns(room->out + i * W, W, j0 ? room->shrink + i : NULL, room->s + i, QUERIES, room->v, W,
                             STRIP_ROWS, W, at_most(i0 + i + STRIP_ROWS - j0, nj));
    }
    for (size_t i = 0; i < ni; i++) {
        const real share = 1 / room->sum[i];
#pragma omp simd
        for (size_t d = 0; d < HS; d++) y[(i0 + i) * C + d] = room->out[i * W + d] * share;
        lse[i0 + i] = room->top[i] + log_real(room->sum[i]);
    }
}

static void attention_forward(real *y, real *lse, const real *qkv, size_t n, size_t T, size_t C, size_t NH) {
    const size_t HS = C / NH;
#pragma omp parallel
    {
        AttentionRoom room;
#pragma omp for collapse(3) schedule(dynamic)
        for (size_t row = 0; row < n; row++)
            for (size_t h = 0; h < NH; h++)
                for (size_t i0 = 0; i0 < T; i0 += QUERIES)
                    attention_forward_block(y + row * T * C + h * HS, lse + (row * NH + h) * T,
                                            qkv + row * T * 3 * C + h * HS, &room, i0, T, C, HS);
    }
}

// One block of queries before the keys come: q and dy both ways, and inner = <dy, y>.
static void attention_backward_queries(AttentionRoom *room, const real *q, const real *dy, const real *y, size_t ni,
                                       size_t C, size_t HS, size_t W) {
    load_lines(room->q, q, 3 * C, (real)(1 / sqrt((double)HS)), ni, HS, W);
    load_lines(room->dy, dy, C, 1, ni, HS, W);
    load_turned(room->qt, room->q, ni, W);
    load_turned(room->dyt, room->dy, ni, W);
    memset(room->inner, 0, sizeof room->inner);
    for (size_t i = 0; i < ni; i++) {
        real inner = 0;
#pragma omp simd reduction(+:inner)
        for (size_t d = 0; d < HS; d++) inner += dy[i * C + d] * y[i * C + d];
        room->inner[i] = inner;
    }
}

// s and dP (nj,lanes), which is in ds, become P and dP's share of ds; both 0 where the key is later than the query.
static void attention_backward_scores(AttentionRoom *room, size_t i0, size_t j0, size_t nj, size_t lanes) {
    for (size_t i = 0; i < lanes; i += LANES) {
        const Vector lse = *(const Vector *)(room->top + i), inner = *(const Vector *)(room->inner + i);
        for (size_t j = 0, seen = keys_seen(i0, i, j0, nj); j < seen; j++) {
            Vector *s = (Vector *)(room->s + j * QUERIES + i), *ds = (Vector *)(room->ds + j * QUERIES + i);
            const Vector p = exp_lanes(causal(*s, i0 + i, j0 + j) - lse);
            *s = p;
            *ds = p * (*ds - inner);
        }
    }
}

// With P = exp(s - lse): dV = P^T dy, dP = dy V^T, ds = P * (dP - <dy, y>), dQ = ds K * scale, dK = ds^T Q * scale
// (Dao et al. 2022, algorithm 4). One thread does one head of one row: nothing is added from two sides.
static void attention_backward_head(real *dq, const real *dy, const real *q, const real *y, const real *lse,
                                    AttentionRoom *room, size_t T, size_t C, size_t HS) {
    const size_t ld = 3 * C, W = round_up(HS, LANES);
    const real scale = (real)(1 / sqrt((double)HS)), *k = q + C, *v = k + C;
    real *dk = dq + C, *dv = dk + C, *s = room->s, *ds = room->ds;
    for (size_t i0 = 0; i0 < T; i0 += QUERIES) {
        const size_t ni = at_most(T - i0, QUERIES), lanes = round_up(ni, PAD);
        attention_backward_queries(room, q + i0 * ld, dy + i0 * C, y + i0 * C, ni, C, HS, W);
        memset(room->top, 0, sizeof room->top);
        memcpy(room->top, lse + i0, ni * sizeof(real));
        for (size_t j0 = 0; j0 < i0 + ni; j0 += KEYS) {
            const size_t nj = at_most(T - j0, KEYS);
            const real *keys = j0 >= i0 ? NULL : ones;   // the first queries that see these keys set dK and dV
            load_lines(room->k, k + j0 * ld, ld, 1, nj, HS, W);
            load_lines(room->v, v + j0 * ld, ld, 1, nj, HS, W);
            attention_scores(s, room->k, room->qt, i0, j0, nj, lanes, HS, W);
            attention_scores(ds, room->v, room->dyt, i0, j0, nj, lanes, HS, W);
            attention_backward_scores(room, i0, j0, nj, lanes);
            for (size_t j = 0; j < nj; j += STRIP_ROWS) {
                const size_t i = blind(i0, j0 + j), rows = at_most(nj - j, STRIP_ROWS);
                const size_t at = j * QUERIES + i, to = (j0 + j) * ld;
                strip_by_lines(dv + to, ld, keys, s + at, QUERIES, room->dy + i * W, W, rows, HS, ni - i);
                strip_by_lines(dk + to, ld, keys, ds + at, QUERIES, room->q + i * W, W, rows, HS, ni - i);
            }
            for (size_t i = blind(i0, j0); i < ni; i += STRIP_ROWS)
                strip_by_columns(room->out + i * W, W, j0 ? ones : NULL, ds + i, QUERIES, room->k, W, STRIP_ROWS, W,
                                 at_most(i0 + i + STRIP_ROWS - j0, nj));
        }
        for (size_t i = 0; i < ni; i++)
            for (size_t d = 0; d < HS; d++) dq[(i0 + i) * ld + d] = scale * room->out[i * W + d];
    }
}

// dqkv (n,T,3C) from dy (n,T,C); y and lse are attention_forward's.
static void attention_backward(real *dqkv, const real *dy, const real *qkv, const real *y, const real *lse, size_t n,
                               size_t T, size_t C, size_t NH) {
    const size_t HS = C / NH;
#pragma omp parallel
    {
        AttentionRoom room;
#pragma omp for collapse(2) schedule(dynamic)
        for (size_t row = 0; row < n; row++)
            for (size_t h = 0; h < NH; h++) {
                const size_t at = row * T * C + h * HS, at3 = row * T * 3 * C + h * HS;
                attention_backward_head(dqkv + at3, dy + at, qkv + at3, y + at, lse + (row * NH + h) * T, &room, T, C, HS);
            }
    }
}

// ---- GELU, the tanh form (Hendrycks and Gimpel 2016): x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3) ----

static inline real gelu_sigmoid(real x) {
    return 1 / (1 + exp_real((real)-1.5957691216057308 * (x + (real)0.044715 * x * x * x)));
}

static void gelu_forward(real *y, const real *x, size_t n) {
#pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) y[i] = x[i] * gelu_sigmoid(x[i]);
}

// y = gelu(x) again, for the product that follows it, and dx = dy * gelu'(x). dx may be dy.
static void gelu_backward(real *dx, real *y, const real *dy, const real *x, size_t n) {
#pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) {
        const real s = gelu_sigmoid(x[i]), slope = (real)1.5957691216057308 * (1 + 3 * (real)0.044715 * x[i] * x[i]);
        y[i] = x[i] * s;
        dx[i] = dy[i] * (s + x[i] * s * (1 - s) * slope);
    }
}

// ---- Classifier and loss: x (BT,C) against wte (V,C), a chunk of rows at a time ----
// Neither logits nor probabilities of the whole batch exist. With weight 0 only the losses are made; else the chunk
// of logits turns into its gradient in place and goes on into dx and dwte at once.

enum { CHUNK_NUMBERS = 1 << 22, CHUNK_LEAST = 240 };     // a chunk: 16 MiB of logits in fp32, or rows enough for wte

static size_t classifier_chunk(size_t BT, size_t V) {
    return at_most(BT, CHUNK_NUMBERS / V > CHUNK_LEAST ? CHUNK_NUMBERS / V : CHUNK_LEAST);
}

// One row: returns -log softmax(logits)[target]; with grad != 0 logits (V) become grad * (softmax - onehot).
static real softmax_loss(real *logits, int target, real grad, size_t V) {
    const real top = max_of(logits, V), at_target = logits[target] - top;
    real sum = 0;
#pragma omp simd reduction(+:sum)
    for (size_t v = 0; v < V; v++) {
        const real e = exp_real(logits[v] - top);
        if (grad != 0) logits[v] = e;
        sum += e;
    }
    if (grad != 0) {
        const real scale = grad / sum;
        for (size_t v = 0; v < V; v++) logits[v] *= scale;
        logits[target] -= grad;
    }
    return (real)(log((double)sum) - (double)at_target);
}

// losses (BT), 0 for negative targets; with grad (the weight of one token's loss) dx (BT,C) = and dwte (V,C) +=.
static void classifier(real *losses, real *dx, real *dwte, real *logits, PackRoom room, const real *x, const real *wte,
                       const int *targets, real grad, size_t BT, size_t C, size_t V) {
    const size_t chunk = classifier_chunk(BT, V);
    for (size_t t0 = 0; t0 < BT; t0 += chunk) {
        const size_t n = at_most(BT - t0, chunk);
        multiply(logits, room, view(x + t0 * C, C, 1), view(wte, 1, C), n, V, C, FRESH);
#pragma omp parallel for
        for (size_t t = 0; t < n; t++) {
            const int target = targets[t0 + t];
            losses[t0 + t] = target < 0 ? 0 : softmax_loss(logits + t * V, target, grad, V);
            if (target < 0) memset(logits + t * V, 0, V * sizeof(real));
        }
        if (grad == 0) continue;
        multiply(dx + t0 * C, room, view(logits, V, 1), view(wte, C, 1), n, C, V, FRESH);
        multiply(dwte, room, view(logits, 1, V), view(x + t0 * C, C, 1), V, C, n, ADD);
    }
}

// ---- The model: its memory ----

typedef struct { size_t at, n; int branch, decay; } UpdateChunk;   // a piece of one tensor; branch: index into UpdateArgs.t
typedef struct { real *xhat, *rstd, *qkv, *lse, *y; } AttentionKept;   // (n,T,C) (n,T) (n,T,3C) (n,NH,T) (n,T,C)
typedef struct { real *xhat, *rstd, *h; } MlpKept;                 // (n,T,C) (n,T) (n,T,4C)

struct Model {
    GptConfig config;
    EngineArgs args;
    size_t offset[N_PARAMS], layer_size, n_params;       // param p of layer l is at offset[p] + l * layer_size
    real *slot[4];                                       // parameters, gradients, m, v: (n_params) each
    UpdateChunk *chunk;
    int n_chunks;
    double *partial;                                     // (n_chunks) squared norms

    real *kept, *kept_end;                               // what forward keeps for backward, one branch after the other
    size_t kept_room, kept_peak;
    AttentionKept *attention;                            // (L) into `kept`
    MlpKept *mlp;                                        // (L)

    real *x, *dx;                                        // (B,T,C) the residual stream
    real *lnf, *lnf_xhat, *lnf_rstd;                     // (B,T,C) (B,T,C) (B,T)
    real *losses;                                        // (B,T)
    real *ln, *gelu, *attn_out, *mlp_out;                // (B,T,C) (B,T,4C) (B,T,C) (B,T,C): one branch at a time
    real *dwide, *dy, *dattn, *dmlp;                     // (B,T,4C) (B,T,C) (B,T,C) (B,T,C)
    real *logits;                                        // (chunk,V)
    PackRoom pack;
    int *all_rows;                                       // (B) 0, 1, ..., B-1
    int last_B, last_T;                                  // of the last forward
};

static real *room_new(size_t n) {
    void *p = NULL;
    if (posix_memalign(&p, 64, (n ? n : 1) * sizeof(real))) die("out of memory: %zu bytes for the model", n * sizeof(real));
    return (real *)p;
}

static Params params_at(const Model *m, Slot slot, int l) {
    Params w;
    real *base = m->slot[slot];
#define X(id, name, branch, dims, rows, cols, init) \
    w.id = base + m->offset[P_##id] + (branch == NO_BRANCH ? 0 : (size_t)l * m->layer_size);
    GPT_PARAMS(X)
#undef X
    return w;
}

static void params_layout(Model *m) {
    const GptConfig *c = &m->config;
    for (int p = 0; p < N_PARAMS; p++)
        if (gpt_param[p].branch != NO_BRANCH) m->offset[p] = m->layer_size, m->layer_size += gpt_param_size(c, p);
    m->n_params = m->layer_size * (size_t)c->L;
    for (int p = 0; p < N_PARAMS; p++)
        if (gpt_param[p].branch == NO_BRANCH) m->offset[p] = m->n_params, m->n_params += gpt_param_size(c, p);
}

// Every tensor in pieces of CHUNK numbers, the unit of work of norm and update.
static void params_chunks(Model *m) {
    enum { CHUNK = 1 << 14 };
    const GptConfig *c = &m->config;
    for (int fill = 0; fill < 2; fill++) {
        int n = 0;
        for (int p = 0; p < N_PARAMS; p++)
            for (int l = 0; l < gpt_param_layers(c, p); l++)
                for (size_t at = 0, size = gpt_param_size(c, p); at < size; at += CHUNK, n++) {
                    if (!fill) continue;
                    const int branch = gpt_param[p].branch, decay = gpt_param[p].dims == 2;
                    UpdateChunk chunk = {m->offset[p] + (size_t)l * m->layer_size + at, at_most(size - at, CHUNK),
                                         branch == NO_BRANCH ? BRANCHES * c->L : BRANCHES * l + branch, decay};
                    m->chunk[n] = chunk;
                }
        if (!fill) m->chunk = xcalloc((size_t)n, sizeof *m->chunk);
        m->n_chunks = n;
    }
    m->partial = xcalloc((size_t)m->n_chunks, sizeof *m->partial);
}

// Numbers that a kept branch of one row needs.
static size_t kept_per_row(const GptConfig *c, int branch, int T) {
    return (size_t)T * (branch == ATTN ? 5 * (size_t)c->C + (size_t)c->NH + 1 : 5 * (size_t)c->C + 1);
}

static size_t kept_bound(const Model *m) {
    const GptConfig *c = &m->config;
    const MemoryBound *b = &m->args.bound;
    const size_t attn = kept_per_row(c, ATTN, m->args.T), mlp = kept_per_row(c, MLP, m->args.T);
    const int attn_rows = b->attn_rows < b->rows ? b->attn_rows : b->rows, mlp_rows = b->rows - attn_rows;   // attn is larger
    const size_t most = (size_t)attn_rows * attn + (size_t)mlp_rows * mlp, one = (size_t)m->args.B * (attn + mlp);
    return most > one ? most : one;                      // evaluation needs one layer at a time
}

static Model *model_open(const GptConfig *config, const EngineArgs *args) {
    const char *error = gpt_config_error(config);
    if (error) die("this model cannot be built: %s", error);
    if (config->C / config->NH > HEAD_MAX)
        die("heads of %d channels: this engine takes at most %d", config->C / config->NH, HEAD_MAX);
    CHECK(args->B > 0 && args->T > 0 && args->T <= config->T, "a batch of %d rows of %d tokens", args->B, args->T);
#ifdef _OPENMP
    if (args->threads > 0) omp_set_num_threads(args->threads);
#endif
    Model *m = xcalloc(1, sizeof *m);
    const size_t BT = (size_t)args->B * (size_t)args->T, C = (size_t)config->C, V = (size_t)config->V, L = (size_t)config->L;
    const int train = args->bound.rows > 0;
    m->config = *config;
    m->args = *args;
    params_layout(m);
    params_chunks(m);
    for (int s = 0; s < (train ? 4 : 1); s++) {
        m->slot[s] = room_new(m->n_params);
        memset(m->slot[s], 0, m->n_params * sizeof(real));
    }
    m->kept_room = kept_bound(m);
    m->kept = room_new(m->kept_room);
    m->attention = xcalloc(L, sizeof *m->attention);
    m->mlp = xcalloc(L, sizeof *m->mlp);
    real **of_bt[] = {&m->losses, &m->lnf_rstd};
    real **of_btc[] = {&m->x, &m->lnf, &m->lnf_xhat, &m->ln, &m->attn_out, &m->mlp_out};
    real **of_training[] = {&m->dx, &m->dy, &m->dattn, &m->dmlp};
    for (int i = 0; i < 2; i++) *of_bt[i] = room_new(BT);
    for (int i = 0; i < 6; i++) *of_btc[i] = room_new(BT * C);
    for (int i = 0; i < 4 && train; i++) *of_training[i] = room_new(BT * C);
    m->gelu = room_new(BT * 4 * C);
    if (train) m->dwide = room_new(BT * 4 * C);
    m->all_rows = xcalloc((size_t)args->B, sizeof *m->all_rows);
    for (int row = 0; row < args->B; row++) m->all_rows[row] = row;
    m->logits = room_new(classifier_chunk(BT, V) * V);
    m->pack.a = room_new((size_t)M_BLOCK * K_BLOCK);
    m->pack.b = room_new((size_t)K_BLOCK * N_BLOCK);
    return m;
}

static void model_close(Model *m) {
    real *rooms[] = {m->slot[0], m->slot[1], m->slot[2], m->slot[3], m->kept, m->x, m->dx, m->lnf, m->lnf_xhat, m->lnf_rstd,
                     m->losses, m->ln, m->gelu, m->attn_out, m->mlp_out, m->dwide, m->dy, m->dattn, m->dmlp, m->logits,
                     m->pack.a, m->pack.b};
    for (size_t i = 0; i < sizeof rooms / sizeof rooms[0]; i++) free(rooms[i]);
    free(m->all_rows);
    free(m->chunk);
    free(m->partial);
    free(m->attention);
    free(m->mlp);
    free(m);
}

static real *keep(Model *m, size_t n) {
    real *p = m->kept_end;
    m->kept_end += n;
    const size_t used = (size_t)(m->kept_end - m->kept);
    CHECK(used <= m->kept_room, "the plan keeps more branches than the model was opened for");
    if (used > m->kept_peak) m->kept_peak = used;
    return p;
}

// ---- The two branches, on the rows that keep them ----

// attn_out (n,T,C) = attn(LN(x[rows]))
static void attention_branch_forward(Model *m, int l, const BranchPlan *b, int T) {
    const size_t C = (size_t)m->config.C, NH = (size_t)m->config.NH, n = (size_t)b->n, nT = n * (size_t)T;
    const Params w = params_at(m, SLOT_PARAM, l);
    AttentionKept *k = &m->attention[l];
    k->xhat = keep(m, nT * C), k->rstd = keep(m, nT);
    k->qkv = keep(m, nT * 3 * C), k->lse = keep(m, nT * NH), k->y = keep(m, nT * C);
    layernorm_forward(m->ln, k->xhat, k->rstd, m->x, NULL, b->rows, w.ln1w, w.ln1b, n, (size_t)T, C);
    matmul_forward(k->qkv, m->pack, m->ln, w.qkvw, w.qkvb, nT, C, 3 * C);
    attention_forward(k->y, k->lse, k->qkv, n, (size_t)T, C, NH);
    matmul_forward(m->attn_out, m->pack, k->y, w.attprojw, w.attprojb, nT, C, C);
}

// dattn (n,T,C): in, the gradient of attn_out; out, that of the rows the branch has read
static void attention_branch_backward(Model *m, int l, const BranchPlan *b, int T) {
    const size_t C = (size_t)m->config.C, NH = (size_t)m->config.NH, n = (size_t)b->n, nT = n * (size_t)T;
    const Params w = params_at(m, SLOT_PARAM, l), dw = params_at(m, SLOT_GRAD, l);
    const AttentionKept *k = &m->attention[l];
    real *dqkv = m->dwide;
    matmul_backward(m->dy, dw.attprojw, dw.attprojb, m->pack, m->dattn, k->y, w.attprojw, nT, C, C);
    attention_backward(dqkv, m->dy, k->qkv, k->y, k->lse, n, (size_t)T, C, NH);
    layernorm_again(m->ln, k->xhat, w.ln1w, w.ln1b, nT, C);
    matmul_backward(m->dattn, dw.qkvw, dw.qkvb, m->pack, dqkv, m->ln, w.qkvw, nT, C, 3 * C);
    layernorm_backward(m->dattn, dw.ln1w, dw.ln1b, m->dattn, k->xhat, k->rstd, w.ln1w, nT, C);
}

// mlp_out (n,T,C) = mlp(LN(x[rows])), or of x[rows] + more (n,T,C)
static void mlp_branch_forward(Model *m, int l, const BranchPlan *b, const real *more, int T) {
    const size_t C = (size_t)m->config.C, n = (size_t)b->n, nT = n * (size_t)T;
    const Params w = params_at(m, SLOT_PARAM, l);
    MlpKept *k = &m->mlp[l];
    k->xhat = keep(m, nT * C), k->rstd = keep(m, nT), k->h = keep(m, nT * 4 * C);
    layernorm_forward(m->ln, k->xhat, k->rstd, m->x, more, b->rows, w.ln2w, w.ln2b, n, (size_t)T, C);
    matmul_forward(k->h, m->pack, m->ln, w.fcw, w.fcb, nT, C, 4 * C);
    gelu_forward(m->gelu, k->h, nT * 4 * C);
    matmul_forward(m->mlp_out, m->pack, m->gelu, w.fcprojw, w.fcprojb, nT, 4 * C, C);
}

// dmlp (n,T,C): in, the gradient of mlp_out; out, that of the rows the branch has read
static void mlp_branch_backward(Model *m, int l, const BranchPlan *b, int T) {
    const size_t C = (size_t)m->config.C, nT = (size_t)b->n * (size_t)T;
    const Params w = params_at(m, SLOT_PARAM, l), dw = params_at(m, SLOT_GRAD, l);
    const MlpKept *k = &m->mlp[l];
    real *dh = m->dwide;
    multiply(dh, m->pack, view(m->dmlp, C, 1), view(w.fcprojw, 1, C), nT, 4 * C, C, FRESH);
    gelu_backward(dh, m->gelu, dh, k->h, nT * 4 * C);
    multiply(dw.fcprojw, m->pack, view(m->gelu, 1, 4 * C), view(m->dmlp, C, 1), 4 * C, C, nT, ADD);
    column_sums(dw.fcprojb, NULL, m->dmlp, NULL, nT, C);
    layernorm_again(m->ln, k->xhat, w.ln2w, w.ln2b, nT, C);
    matmul_backward(m->dmlp, dw.fcw, dw.fcb, m->pack, dh, m->ln, w.fcw, nT, C, 4 * C);
    layernorm_backward(m->dmlp, dw.ln2w, dw.ln2b, m->dmlp, k->xhat, k->rstd, w.ln2w, nT, C);
}

// ---- A block with drop path ----
//     x <- x + s_a attn(LN(x));   x <- x + s_m mlp(LN(x));     tied: x <- x + s (a + mlp(LN(x + a))), a = attn(LN(x))

static void block_forward(Model *m, int l, const DropPlan *plan, int T) {
    const size_t C = (size_t)m->config.C;
    const BranchPlan *attn = &plan->branch[BRANCHES * l + ATTN], *mlp = &plan->branch[BRANCHES * l + MLP];
    if (attn->n) attention_branch_forward(m, l, attn, T);
    if (!plan->tied) residual_forward(m->x, m->attn_out, attn, (size_t)T, C);
    if (mlp->n) mlp_branch_forward(m, l, mlp, plan->tied ? m->attn_out : NULL, T);
    if (plan->tied) residual_forward(m->x, m->attn_out, attn, (size_t)T, C);
    residual_forward(m->x, m->mlp_out, mlp, (size_t)T, C);
}

// dx[rows] += dz (n,T,C): what a branch has read from the residual stream
static void residual_add(real *dx, const real *dz, const BranchPlan *b, int T, size_t C) {
    const BranchPlan plain = {b->n, b->rows, 1};
    residual_forward(dx, dz, &plain, (size_t)T, C);
}

static void block_backward(Model *m, int l, const DropPlan *plan, int T) {
    const size_t C = (size_t)m->config.C;
    const BranchPlan *attn = &plan->branch[BRANCHES * l + ATTN], *mlp = &plan->branch[BRANCHES * l + MLP];
    residual_backward(m->dmlp, m->dx, mlp, (size_t)T, C);
    if (mlp->n) mlp_branch_backward(m, l, mlp, T);
    if (!plan->tied) residual_add(m->dx, m->dmlp, mlp, T, C);
    residual_backward(m->dattn, m->dx, attn, (size_t)T, C);
    if (plan->tied) {
        residual_add(m->dx, m->dmlp, mlp, T, C);
#pragma omp parallel for
        for (size_t i = 0; i < (size_t)attn->n * (size_t)T * C; i++) m->dattn[i] += m->dmlp[i];   // the MLP has read x + a
    }
    if (attn->n) attention_branch_backward(m, l, attn, T);
    residual_add(m->dx, m->dattn, attn, T, C);
}

// ---- Forward and backward of the whole model ----

static void check_call(const Model *m, int T, const int *tokens, const int *targets, const DropPlan *plan) {
    CHECK(plan->layers == m->config.L, "a plan of %d layers for a model of %d", plan->layers, m->config.L);
    CHECK(plan->batch > 0 && plan->batch <= m->args.B && T > 0 && T <= m->args.T, "%d rows of %d tokens; opened for %d of %d",
          plan->batch, T, m->args.B, m->args.T);
    for (size_t i = 0, n = (size_t)plan->batch * (size_t)T; i < n; i++) {
        CHECK(tokens[i] >= 0 && tokens[i] < m->config.V, "token %d is outside the vocabulary of %d", tokens[i], m->config.V);
        CHECK(!targets || targets[i] < m->config.V, "target %d is outside the vocabulary of %d", targets[i], m->config.V);
    }
}

// The mean loss; with weight != 0 also dx = its gradient times weight, at the end of the residual stream.
static double model_loss(Model *m, int T, const int *targets, const DropPlan *plan, double weight) {
    const size_t BT = (size_t)plan->batch * (size_t)T, C = (size_t)m->config.C;
    const Params w = params_at(m, SLOT_PARAM, 0);
    size_t count = 0;
    double sum = 0;
    for (size_t t = 0; t < BT; t++) count += targets[t] >= 0;
    if (!count) count = 1;
    real *dwte = weight != 0 ? params_at(m, SLOT_GRAD, 0).wte : NULL;
    classifier(m->losses, m->dx, dwte, m->logits, m->pack, m->lnf, w.wte, targets, (real)(weight / (double)count), BT, C,
               (size_t)m->config.V);
    for (size_t t = 0; t < BT; t++) sum += (double)m->losses[t];
    return sum / (double)count;
}

static double run_forward(Model *m, int T, const int *tokens, const int *targets, const DropPlan *plan, double weight) {
    const size_t B = (size_t)plan->batch, C = (size_t)m->config.C;
    check_call(m, T, tokens, targets, plan);
    const Params w = params_at(m, SLOT_PARAM, 0);
    m->last_B = plan->batch;
    m->last_T = T;
    m->kept_end = m->kept;
    embedding_forward(m->x, tokens, w.wte, w.wpe, B, (size_t)T, C);
    for (int l = 0; l < m->config.L; l++) {
        if (weight == 0) m->kept_end = m->kept;          // evaluation keeps nothing
        block_forward(m, l, plan, T);
    }
    layernorm_forward(m->lnf, m->lnf_xhat, m->lnf_rstd, m->x, NULL, m->all_rows, w.lnfw, w.lnfb, B, (size_t)T, C);
    return targets ? model_loss(m, T, targets, plan, weight) : 0;
}

static double model_forward(Model *m, int T, const int *tokens, const int *targets, const DropPlan *plan) {
    return run_forward(m, T, tokens, targets, plan, 0);
}

static double model_forward_backward(Model *m, int T, const int *tokens, const int *targets, const DropPlan *plan,
                                     double weight) {
    CHECK(m->slot[SLOT_GRAD] && targets && weight != 0, "this model was opened to evaluate");
    const size_t BT = (size_t)plan->batch * (size_t)T, C = (size_t)m->config.C;
    const double loss = run_forward(m, T, tokens, targets, plan, weight);
    const Params w = params_at(m, SLOT_PARAM, 0), dw = params_at(m, SLOT_GRAD, 0);
    layernorm_backward(m->dx, dw.lnfw, dw.lnfb, m->dx, m->lnf_xhat, m->lnf_rstd, w.lnfw, BT, C);
    for (int l = m->config.L - 1; l >= 0; l--) block_backward(m, l, plan, T);
    embedding_backward(dw.wte, dw.wpe, tokens, m->dx, (size_t)plan->batch, (size_t)T, C);
    return loss;
}

static void model_losses(Model *m, real *host) {
    memcpy(host, m->losses, (size_t)m->last_B * (size_t)m->last_T * sizeof(real));
}

static void model_logits(Model *m, int row, int t, real *host) {
    const size_t C = (size_t)m->config.C, V = (size_t)m->config.V;
    CHECK(row >= 0 && row < m->last_B && t >= 0 && t < m->last_T, "no logits at row %d, position %d", row, t);
    const real *x = m->lnf + ((size_t)row * (size_t)m->last_T + (size_t)t) * C;
    multiply(host, m->pack, view(x, C, 1), view(params_at(m, SLOT_PARAM, 0).wte, 1, C), 1, V, C, FRESH);
}

// ---- AdamW (Loshchilov and Hutter 2019, algorithm 2), with the gradients clipped to a norm ----

static double gradient_norm(Model *m, const int64_t *step) {
#pragma omp parallel for schedule(dynamic, 8)
    for (int i = 0; i < m->n_chunks; i++) {
        const UpdateChunk *k = &m->chunk[i];
        const real *g = m->slot[SLOT_GRAD] + k->at;
        double sum = 0;
        if (step[k->branch] > 0) {                       // an untouched branch has no gradient
#pragma omp simd reduction(+:sum)
            for (size_t j = 0; j < k->n; j++) sum += (double)g[j] * (double)g[j];
        }
        m->partial[i] = sum;
    }
    double sum = 0;
    for (int i = 0; i < m->n_chunks; i++) sum += m->partial[i];
    return sqrt(sum);
}

// One chunk: p, m, v from g, which is zeroed. `step` counts from 1.
static void adamw(real *p, real *g, real *m, real *v, size_t n, const UpdateArgs *a, int64_t step, double clip, int decay) {
    const real b1 = (real)a->beta1, b2 = (real)a->beta2, eps = (real)a->eps, shrink = (real)clip;
    const real keep_p = (real)(decay ? 1 - a->lr * a->weight_decay : 1);
    const real rate = (real)(a->lr / (1 - pow(a->beta1, (double)step)));
    const real unbias = (real)(1 / sqrt(1 - pow(a->beta2, (double)step)));
#pragma omp simd
    for (size_t i = 0; i < n; i++) {
        const real gi = g[i] * shrink;
        m[i] = b1 * m[i] + (1 - b1) * gi;
        v[i] = b2 * v[i] + (1 - b2) * gi * gi;
        p[i] = keep_p * p[i] - rate * m[i] / (sqrt_real(v[i]) * unbias + eps);
        g[i] = 0;
    }
}

static double model_update(Model *m, const UpdateArgs *a) {
    CHECK(m->slot[SLOT_GRAD], "this model was opened to evaluate");
    const double norm = gradient_norm(m, a->t);
    if (a->discard || !isfinite(norm)) {
        memset(m->slot[SLOT_GRAD], 0, m->n_params * sizeof(real));
        return norm;
    }
    const double clip = a->grad_clip > 0 ? fmin(1, a->grad_clip / (norm + 1e-6)) : 1;   // as PyTorch's clip_grad_norm_
#pragma omp parallel for schedule(dynamic, 8)
    for (int i = 0; i < m->n_chunks; i++) {
        const UpdateChunk *k = &m->chunk[i];
        if (a->t[k->branch] > 0)
            adamw(m->slot[SLOT_PARAM] + k->at, m->slot[SLOT_GRAD] + k->at, m->slot[SLOT_M] + k->at, m->slot[SLOT_V] + k->at,
                  k->n, a, a->t[k->branch], clip, k->decay);
    }
    return norm;
}

// ---- The engine ----

static real *param_at(const Model *m, Slot slot, int param, int layer) {
    CHECK(m->slot[slot], "this model was opened to evaluate");
    CHECK(param >= 0 && param < N_PARAMS && layer >= 0 && layer < gpt_param_layers(&m->config, param),
          "no parameter %d in layer %d", param, layer);
    return m->slot[slot] + m->offset[param] + (size_t)layer * m->layer_size;
}

static void model_read(Model *m, Slot slot, int param, int layer, real *host) {
    memcpy(host, param_at(m, slot, param, layer), gpt_param_size(&m->config, param) * sizeof(real));
}

static void model_write(Model *m, Slot slot, int param, int layer, const real *host) {
    memcpy(param_at(m, slot, param, layer), host, gpt_param_size(&m->config, param) * sizeof(real));
}

static void model_memory(const Model *m, size_t bytes[4]) {
    const size_t BT = (size_t)m->args.B * (size_t)m->args.T, C = (size_t)m->config.C, V = (size_t)m->config.V;
    const size_t one = m->n_params * sizeof(real), train = m->slot[SLOT_GRAD] != NULL;
    bytes[0] = one;
    bytes[1] = train * one;
    bytes[2] = train * 2 * one;
    bytes[3] = sizeof(real) * (m->kept_peak + BT * C * (10 + 8 * train) + 2 * BT + classifier_chunk(BT, V) * V);
}

// Multiply-adds on registers, on all threads: no machine does more per second with these instructions. The best of
// many short runs, since other programs can only slow one down.
static double model_peak(Model *m, double seconds) {
    enum { INNER = 20000 };
    double best = 0, elapsed = 0;
    (void)m;
    while (elapsed < seconds) {
        double sum = 0, flops = 0;
        const double from = clock_seconds();
#pragma omp parallel reduction(+:sum, flops)
        {
            real a[TILE_ROWS], y[TILE_ROWS * TILE_COLS];
            Vector b[TILE_VECTORS], acc[TILE_ROWS][TILE_VECTORS] = {0};
            for (int i = 0; i < TILE_ROWS; i++) a[i] = (real)1e-3 * (real)i;
            for (int j = 0; j < TILE_VECTORS; j++) b[j] = acc[0][0] + (real)1e-3 * (real)(j + 1);
            for (int k = 0; k < INNER; k++) {
#pragma GCC unroll 16
                for (int i = 0; i < TILE_ROWS; i++)
                    for (int j = 0; j < TILE_VECTORS; j++) acc[i][j] = acc[i][j] * b[j] + a[i];
            }
            memcpy(y, acc, sizeof y);
            for (int i = 0; i < TILE_ROWS * TILE_COLS; i++) sum += (double)y[i];
            flops += 2.0 * INNER * TILE_ROWS * TILE_COLS;
        }
        const double run = clock_seconds() - from;
        if (sum > 0 && flops / run > best) best = flops / run;     // sum > 0: the loop must not be optimised away
        elapsed += run;
    }
    return best;
}

const Engine cpu_engine = {
    "CPU, " REAL_NAME, model_open, model_forward, model_forward_backward, model_losses, model_logits, model_update,
    model_read, model_write, model_memory, model_peak, model_close,
};

#ifndef ENGINE_ONLY                                      // the tools and the tests link the engine without its main
#include "dev/trainer.h"

int main(int argc, char **argv) { return trainer_main(argc, argv, &cpu_engine); }
#endif
