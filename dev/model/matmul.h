// matmul.h: the CPU engine's matmuls, the counterpart of cuBLASLt. Bias, GELU, scale and
// accumulation are applied as a tile is written.
//
// The order of every sum depends only on the shapes, so results have the same bits for any number
// of threads.
#ifndef MATMUL_H
#define MATMUL_H

#include "../check.h"
#include "tiles.h"
#ifdef _OPENMP
#include <omp.h>
static inline int team_size(void) { return omp_get_num_threads(); }
static inline int team_most(void) { return omp_get_max_threads(); }
static inline int team_member(void) { return omp_get_thread_num(); }
#else
static inline int team_size(void) { return 1; }
static inline int team_most(void) { return 1; }
static inline int team_member(void) { return 0; }
#endif

// ---- GELU, tanh form (Hendrycks, Gimpel 2016): x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
//
// Applied to pieces of a row that a matmul has just written.

// Beyond these the sigmoid rounds to 0 or 1: x is clamped, so that infinity is never multiplied by
// 0.
static const real gelu_least = -30, gelu_most = 30, gelu_exponent = 87;

typedef struct { Vector y, slope; } Gelu;

// GELU(x) within 4 ulp for x >= -1, within 2^-24 below (2^-53 in fp64), less than 1e-36 for x <
// -30; infinity for infinity, NaN for NaN. Its derivative within 20 * 2^-23 for x >= 0, where 1 - s
// cancels, and 2^-23 below (80 * 2^-52 and 2^-52 in fp64), less than 1e-33 for x < -30; NaN for
// NaN.
static inline ALWAYS_INLINE Gelu gelu_lanes(Vector x) {
    const Vector h = select_lanes(x < gelu_least, vector_of(gelu_least), x);
    const Vector z = select_lanes(h > gelu_most, vector_of(gelu_most), h), square = z * z;
    const Vector u = (real)-1.5957691216057308 * (z + (real)0.044715 * square * z);
    const Vector s =
        1 / (1 + exp_lanes(select_lanes(u > gelu_exponent, vector_of(gelu_exponent), u)));
    const Gelu g =
        {h * s, s + z * s * (1 - s) *
         ((real)1.5957691216057308 * (1 + 3 * (real)0.044715 * square))};
    return g;
}

static inline void gelu_forward(real *y, const real *x, size_t n) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) vector_store(y + i, gelu_lanes(vector_load(x + i)).y);
    if (i < n) vector_store_some(y + i, gelu_lanes(vector_load_some(x + i, n - i)).y, n - i);
}

// Recomputes y = GELU(x) for the matmul that follows, and multiplies dx by GELU'(x).
static inline void gelu_backward(real *dx, real *y, const real *x, size_t n) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Gelu g = gelu_lanes(vector_load(x + i));
        vector_store(y + i, g.y);
        vector_store(dx + i, vector_load(dx + i) * g.slope);
    }
    if (i == n) return;
    const Gelu g = gelu_lanes(vector_load_some(x + i, n - i));
    vector_store_some(y + i, g.y, n - i);
    vector_store_some(dx + i, vector_load_some(dx + i, n - i) * g.slope, n - i);
}

// ---- Matmul: y (M,N) = a (M,K) b (K,N) ----
//
// b is packed into strips of TILE_COLS columns and a into strips of TILE_ROWS rows, K_BLOCK terms
// at a time; the kernel keeps one (TILE_ROWS, TILE_COLS) tile of y in registers. Each element of y
// is summed over K in order.
//
// In bf16 the operands are rounded as they are packed, and accumulated in fp32. With bf16 dot
// products (dev/model/vector.h), each packed word is two consecutive elements along K; otherwise it
// is one, with the two of a pair in the order in which those instructions add them, so that the
// sums have the same bits.
//
// With tiles (dev/model/tiles.h), a strip of a has STRIP_TILES of them, each 16 rows with their
// words in order, and K is filled up with zeros; b is packed as for dot products.
//
// K_BLOCK is the C of a small GPT-2, so that y is written once; a strip of b and ROW_STRIPS strips
// of a stay in L2. The panels are as large as the matmuls of a micro-batch, so that little is
// packed twice (measurements: dev/bench/SPEED.md).

enum { K_BLOCK = 768, M_BLOCK = 128 * TILE_ROWS, N_BLOCK = 96 * TILE_COLS, ROW_STRIPS = 8 };
// elements packed at a time by one thread; prefetch distance
enum { PACK_ELEMENTS = 128, PACK_AHEAD = 64 };
// with tiles: rows of a strip, and of these what is packed of TILE_SIDE words of K
enum { STRIP_TILES = 2, TILED_ROWS = STRIP_TILES * TILE_SIDE,
       TILED_BLOCK = TILED_ROWS * TILE_SIDE };

// Rows of contiguous elements, ld apart; a matmul reads the matrix or, with `transposed`, its
// transpose. With `rows`, the matrix's rows are tokens of the residual stream (B,T,ld): row t is
// the t-th token of those rows of the batch.
typedef struct { const real *at; size_t ld; int transposed; const int *rows; size_t T; } Matrix;

// The output of a matmul: y (M,N), addressed as above; y = scale * (a b + bias (N)), or y += that.
// With `gelu` (M,N), also gelu = GELU(y); with `h` (M,N) too, gelu = GELU(h) instead, and y is
// multiplied by GELU'(h).
typedef struct {
    real *at;
    size_t ld;
    const int *rows;                                     // NULL: all
    size_t T;
    int add;
    real scale;
    const real *bias, *h;
    real *gelu;
} Result;

// (M_BLOCK, K_BLOCK) and (K_BLOCK, N_BLOCK); tiled: bf16 with tiles
typedef struct { real *a, *b; int bf16, tiled; } PackWorkspace;

static inline size_t at_most(size_t n, size_t most) { return n < most ? n : most; }
static inline size_t strips(size_t n, size_t width) { return (n + width - 1) / width; }
static inline size_t round_up(size_t n, size_t unit) { return strips(n, unit) * unit; }

// The index in the residual stream of the t-th token of `rows`; t itself if rows is NULL (all
// rows).
static inline size_t token_place(const int *rows, size_t T, size_t t) {
    return rows ? (size_t)rows[t / T] * T + t % T : t;
}

static inline const real *line_of(const Matrix *m, size_t i) {
    return m->at + token_place(m->rows, m->T, i) * m->ld;
}

static inline Matrix matrix(const real *at, size_t ld) {
    const Matrix m = {at, ld, 0, NULL, 0};
    return m;
}
static inline Matrix transposed(const real *at, size_t ld) {
    const Matrix m = {at, ld, 1, NULL, 0};
    return m;
}
static inline Result fresh(real *at, size_t ld, const real *bias) {
    const Result y = {at, ld, NULL, 0, 0, 1, bias, NULL, NULL};
    return y;
}
static inline Result scaled(real *at, size_t ld, real scale, int add) {
    const Result y = {at, ld, NULL, 0, add, scale, NULL, NULL, NULL};
    return y;
}

// Whether a packed word is two bf16 elements, for dot products of pairs.
static inline int in_pairs(const PackWorkspace *work) { return work->bf16 ? PAIRS : 0; }

// Rows of a strip of a.
static inline size_t strip_rows(const PackWorkspace *work) {
    return TILES && work->tiled ? (size_t)TILED_ROWS : (size_t)TILE_ROWS;
}

// Packed words for K elements.
static inline size_t pack_words(const PackWorkspace *work, size_t K) {
    const size_t words = !work->bf16 ? K : PAIRS ? (K + 1) / 2 : K + K % 2;
    return TILES && work->tiled ? round_up(words, TILE_SIDE) : words;
}

// Rounds a packed fp32 strip to bf16 without bf16 dot products: swaps each pair, second element
// first.
static inline void pack_round(real *strip, size_t width, size_t K) {
    for (size_t k = 0; k < K + K % 2; k += 2, strip += 2 * width)
        for (size_t i = 0; i < width; i++) {
            const real first = bf16_round(strip[i]),
                second = k + 1 < K ? bf16_round(strip[width + i]) : 0;
            strip[i] = second, strip[width + i] = first;
        }
}

// The words of `width` <= LANES rows from word w on, transposed: v[j] has word w + j of each. Rows
// after n and elements after K are zero.
static inline ALWAYS_INLINE void pack_square(Vector v[LANES], const real *const *line, size_t n,
                                             size_t width, size_t w, size_t K, int pairs) {
    const size_t from = pairs ? 2 * w : w, count = pairs ? 2 * LANES : LANES;
    if (n >= width && from + count <= K) {
#pragma GCC unroll 16
        for (size_t i = 0; i < width; i++) {
            v[i] = pairs ? pairs_of_line(line[i] + from) : vector_load(line[i] + from);
            __builtin_prefetch(line[i] + from + PACK_AHEAD);
        }
    } else {
        for (size_t i = 0; i < at_most(n, width); i++) {
            real part[2 * LANES] = {0};
            memcpy(part, line[i] + from, at_most(K - from, count) * sizeof(real));
            v[i] = pairs ? pairs_of_line(part) : vector_load(part);
        }
        for (size_t i = n; i < width; i++) v[i] = (Vector){0};
    }
#pragma GCC unroll 16
    for (size_t i = width; i < LANES; i++) v[i] = (Vector){0};
    vector_transpose(v);
}

// Packs n <= width rows, from element k on, transposed into a strip (K, width).
static inline ALWAYS_INLINE void pack_turning(real *to, const Matrix *m, size_t i, size_t n,
                                              size_t width, size_t k, size_t K, int pairs) {
    const real *line[TILE_COLS];
    const size_t words = pairs ? (K + 1) / 2 : K;
    for (size_t j = 0; j < n; j++) line[j] = line_of(m, i + j) + k;
    for (size_t w = 0; w < words; w += LANES)
#pragma GCC unroll 4
        for (size_t j = 0; j < width; j += LANES) {
            Vector v[LANES];
            pack_square(v, line + j, n > j ? n - j : 0, at_most(width - j, LANES), w, K, pairs);
            if (words - w >= LANES) {
#pragma GCC unroll 16
                for (size_t p = 0; p < LANES; p++)
                    memcpy(to + (w + p) * width + j, &v[p],
                           at_most(width - j, LANES) * sizeof(real));
            } else {
                for (size_t p = 0; p < words - w; p++)
                    memcpy(to + (w + p) * width + j, &v[p],
                           at_most(width - j, LANES) * sizeof(real));
            }
        }
}

// n elements or, if there are more, LANES.
static inline ALWAYS_INLINE Vector pack_load(const real *x, size_t n) {
    return n >= LANES ? vector_load(x) : vector_load_some(x, n);
}

// Packs one word of K for a strip: n elements of its row, at most `width`, and zeros; `second` is
// the other row of a pair. Beyond n nothing is read.
static inline ALWAYS_INLINE void pack_word(real *to, const real *first, const real *second,
                                           size_t n, size_t width, int pairs) {
#pragma GCC unroll 4
    for (size_t c = 0; c < width; c += LANES) {
        const size_t left = n > c ? n - c : 0;
        Vector x = pack_load(first + c, left);
        if (pairs) x = pairs_of_lines(x, pack_load(second + c, left));
        memcpy(to + c, &x, at_most(width - c, LANES) * sizeof(real));
    }
}

// Packs columns j .. j+n of rows k .. k+K into strips (K, width), one every `size` words; sum (n),
// if given, += scale * the columns. Processes a few rows at a time, so that few places are written
// at once.
static inline ALWAYS_INLINE void pack_copying(real *to, size_t size, const Matrix *m, size_t j,
                                              size_t n, size_t width, size_t k, size_t K, int pairs,
                                              real *sum, real scale) {
    enum { AT_ONCE = 16 };
    static const real zeros[PACK_ELEMENTS] = {0};
    const real *line[AT_ONCE + 1];
    real total[PACK_ELEMENTS] = {0};
    for (size_t w = 0; w < K; w += AT_ONCE) {
        const size_t count = at_most(K - w, AT_ONCE), step = pairs ? 2 : 1;
        for (size_t i = 0; i < count; i++) line[i] = line_of(m, k + w + i) + j;
        // the partner of the last row, if their number is odd
        line[count] = zeros;
        for (size_t s = 0; s < n; s += width)
            for (size_t i = 0; i < count; i += step)
                pack_word(to + s / width * size + (w + i) / step * width, line[i] + s,
                          pairs ? line[i + 1] + s : NULL, n - s, width, pairs);
        for (size_t i = 0; sum && i < count; i++)
            for (size_t c = 0; c < n; c++) total[c] += line[i][c];
    }
    for (size_t c = 0; sum && c < n; c++) sum[c] += scale * total[c];
}

// Packs n rows (or columns) from i on into strips of `width` words.
static inline ALWAYS_INLINE void pack_strips(real *to, const Matrix *m, int turning, size_t i,
                                             size_t n, size_t width, size_t k, size_t K,
                                             const PackWorkspace *work, real *sum, real scale) {
    const size_t size = pack_words(work, K) * width, used = (K + 1) / 2 * width;
    const int pairs = in_pairs(work);
    if (!turning) pack_copying(to, size, m, i, n, width, k, K, pairs, sum, scale);
    for (size_t s = 0; s < n; s += width, to += size) {
        if (turning) pack_turning(to, m, i + s, at_most(n - s, width), width, k, K, pairs);
        if (work->bf16 && !PAIRS) pack_round(to, width, K);
        if (TILES && work->tiled) memset(to + used, 0, (size - used) * sizeof *to);
    }
}

// Words w .. w + TILE_SIDE of n <= TILE_SIDE rows of a, as a tile; K elements from k on exist.
static inline ALWAYS_INLINE void pack_tile(real *to, const Matrix *m, size_t i, size_t n, size_t k,
                                           size_t w, size_t K) {
    Vector v[TILE_SIDE];
    for (size_t p = 0; p < TILE_SIDE; p++) {
        const size_t from = m->transposed ? 2 * (w + p) : 2 * w;
        v[p] = (Vector){0};
        if (from >= K || (!m->transposed && p >= n)) continue;
        if (m->transposed) {                             // a word of all rows
            const real *first = line_of(m, k + from) + i;
            v[p] = pack_load(first, n);
            v[p] = pairs_of_lines(v[p], from + 1 < K ? pack_load(line_of(m, k + from + 1) + i, n)
                                                     : (Vector){0});
        } else {                                         // the words of a row
            const real *line = line_of(m, i + p) + k + from;
            real part[2 * LANES] = {0};
            if (from + 2 * LANES > K) line = (real *)memcpy(part, line, (K - from) * sizeof *part);
            v[p] = pairs_of_line(line);
        }
    }
    if (m->transposed && (int)LANES == (int)TILE_SIDE) vector_transpose(v);
    memcpy(to, v, sizeof v);
}

// Packs n rows of a from row i on into strips.
static inline ALWAYS_INLINE void pack_rows(real *to, const Matrix *a, size_t i, size_t n, size_t k,
                                           size_t K, const PackWorkspace *work) {
    const size_t words = pack_words(work, K);
    if (!(TILES && work->tiled)) {
        pack_strips(to, a, !a->transposed, i, n, TILE_ROWS, k, K, work, NULL, 0);
        return;
    }
    for (size_t s = 0; s < n; s += TILED_ROWS)
        for (size_t w = 0; w < words; w += TILE_SIDE, to += TILED_BLOCK)
            for (size_t r = 0; r < TILED_ROWS; r += TILE_SIDE)
                pack_tile(to + r * TILE_SIDE, a, i + s + r,
                          n > s + r ? at_most(n - s - r, TILE_SIDE) : 0, k, w, K);
}

// sum += the product of strips a (K,TILE_ROWS) and b (K,TILE_COLS), over K elements or K pairs.
static inline ALWAYS_INLINE void tile_sums(Vector sum[TILE_ROWS][TILE_VECTORS], const real *a,
                                           const real *b, size_t K, int pairs) {
    for (size_t k = 0; k < K; k++, a += TILE_ROWS, b += TILE_COLS) {
        Vector bk[TILE_VECTORS];
        for (int j = 0; j < TILE_VECTORS; j++) {
            bk[j] = vector_load(b + j * LANES);
            __builtin_prefetch(b + j * LANES + 16 * TILE_COLS);
        }
        __builtin_prefetch(a + 32 * TILE_ROWS);
#pragma GCC unroll 16
        for (size_t i = 0; i < TILE_ROWS; i++)
            for (int j = 0; j < TILE_VECTORS; j++) {
                if (pairs) sum[i][j] = pairs_dot(sum[i][j], a[i], bk[j]);
                else sum[i][j] += a[i] * bk[j];
            }
    }
}

// Writes the tile of y at (i,j), of which M x N elements exist. One expression covers all cases, so
// that the multiply-add is contracted alike in every row of a tile: results must not depend on a
// token's position within a tile.
static inline ALWAYS_INLINE void tile_write(Result y, size_t i0, size_t j0,
                                            Vector sum[TILE_ROWS][TILE_VECTORS], size_t M,
                                            size_t N) {
    real edge[TILE_ROWS][TILE_COLS];
    Vector bias[TILE_VECTORS] = {{0}};
    if (N < TILE_COLS) memcpy(edge, sum, sizeof edge);
    else if (y.bias)
        for (size_t j = 0; j < TILE_VECTORS; j++) bias[j] = vector_load(y.bias + j0 + j * LANES);
#pragma GCC unroll 16
    for (size_t i = 0; i < TILE_ROWS; i++) {
        if (i == M) return;
        real *to = y.at + token_place(y.rows, y.T, i0 + i) * y.ld + j0;
        for (size_t j = 0; N == TILE_COLS && j < TILE_VECTORS; j++) {
            Vector old = {0};
            if (y.add) old = vector_load(to + j * LANES);
            vector_store(to + j * LANES, old + (sum[i][j] + bias[j]) * y.scale);
        }
        for (size_t j = 0; N < TILE_COLS && j < N; j++) {
            const real old = y.add ? to[j] : 0;
            to[j] = old + (edge[i][j] + (y.bias ? y.bias[j0 + j] : 0)) * y.scale;
        }
    }
}

// Prefetches the rows that tile_write will touch, while the sums are computed.
static inline ALWAYS_INLINE void tile_prefetch(Result y, size_t i0, size_t j0, size_t M, size_t N) {
    for (size_t i = 0; i < M; i++) {
        const real *to = y.at + token_place(y.rows, y.T, i0 + i) * y.ld + j0;
        for (size_t j = 0; j < N; j += 64 / sizeof(real)) __builtin_prefetch(to + j, 1);
    }
}

static inline void multiply_tile(Result y, size_t i, size_t j, const real *a, const real *b,
                                 size_t M, size_t N, size_t K) {
    Vector sum[TILE_ROWS][TILE_VECTORS] = {{{0}}};
    tile_prefetch(y, i, j, M, N);
    tile_sums(sum, a, b, K, 0);
    tile_write(y, i, j, sum, M, N);
}

static inline void multiply_tile_pairs(Result y, size_t i, size_t j, const real *a, const real *b,
                                       size_t M, size_t N, size_t K) {
    Vector sum[TILE_ROWS][TILE_VECTORS] = {{{0}}};
    tile_prefetch(y, i, j, M, N);
    tile_sums(sum, a, b, K, 1);
    tile_write(y, i, j, sum, M, N);
}

// By tiles: strips a (words,TILED_ROWS) and b (words,TILE_COLS), of which two tiles are abreast.
static inline void multiply_tile_tiled(Result y, size_t i, size_t j, const real *a, const real *b,
                                       size_t M, size_t N, size_t words) {
    enum { SUM_ROWS = (TILED_ROWS + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS };
    real sum[SUM_ROWS][TILE_COLS] __attribute__((aligned(64)));
    tile_prefetch(y, i, j, M, N);
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    for (size_t w = 0; w < words; w += TILE_SIDE, a += TILED_BLOCK, b += TILE_SIDE * TILE_COLS) {
        tile_load(4, a, TILE_SIDE);
        tile_load(6, b, TILE_COLS);
        tile_load(7, b + TILE_SIDE, TILE_COLS);
        tile_dot(0, 4, 6);
        tile_dot(1, 4, 7);
        if (M <= TILE_SIDE) continue;
        tile_load(5, a + TILE_SIDE * TILE_SIDE, TILE_SIDE);
        tile_dot(2, 5, 6);
        tile_dot(3, 5, 7);
    }
    tile_store(0, sum[0], TILE_COLS);
    tile_store(1, sum[0] + TILE_SIDE, TILE_COLS);
    tile_store(2, sum[TILE_SIDE], TILE_COLS);
    tile_store(3, sum[TILE_SIDE] + TILE_SIDE, TILE_COLS);
    for (size_t r = 0; r < M; r += TILE_ROWS) {
        Vector part[TILE_ROWS][TILE_VECTORS];
        memcpy(part, sum[r], sizeof part);
        tile_write(y, i + r, j, part, M - r, N);
    }
}

// M rows from i, N columns from j, K terms from k
typedef struct { size_t i, j, k, M, N, K; } Block;

// Call from every thread of a parallel region, like the functions below.
static inline void block_pack(const PackWorkspace *work, const Matrix *a, const Matrix *b, Block k,
                              real *b_sum, real scale) {
    enum { B_GROUP = PACK_ELEMENTS / TILE_COLS * TILE_COLS };
    const size_t words = pack_words(work, k.K),
        group = PACK_ELEMENTS / strip_rows(work) * strip_rows(work);
#pragma omp for schedule(dynamic) nowait
    for (size_t i = 0; i < (a ? k.M : 0); i += group)
        pack_rows(work->a + i * words, a, k.i + i, at_most(k.M - i, group), k.k, k.K, work);
#pragma omp for schedule(dynamic)
    for (size_t j = 0; j < (b ? k.N : 0); j += B_GROUP)
        pack_strips(work->b + j * words, b, b->transposed, k.j + j, at_most(k.N - j, B_GROUP),
                    TILE_COLS, k.k, k.K, work, b_sum ? b_sum + k.j + j : NULL, scale);
}

static inline void block_gelu(const Result *y, size_t i0, size_t i1, size_t j0, size_t j1) {
    for (size_t i = i0; i < i1; i++) {
        real *yi = y->at + i * y->ld, *gelu = y->gelu + i * y->ld;
        if (y->h) gelu_backward(yi + j0, gelu + j0, y->h + i * y->ld + j0, j1 - j0);
        else gelu_forward(gelu + j0, yi + j0, j1 - j0);
    }
}

typedef void MultiplyTile(Result y, size_t i, size_t j, const real *a, const real *b, size_t M,
                          size_t N, size_t words);

static inline MultiplyTile *multiply_tile_of(const PackWorkspace *work) {
    return TILES && work->tiled ? multiply_tile_tiled
           : in_pairs(work)     ? multiply_tile_pairs
                                : multiply_tile;
}

// Distributes tasks of ROW_STRIPS x `across` tiles over the threads.
static inline void block_multiply(const Result *y, const PackWorkspace *work, Block k) {
    const size_t height = strip_rows(work), down = strips(k.M, height),
        right = strips(k.N, TILE_COLS), words = pack_words(work, k.K);
    MultiplyTile *const tile = multiply_tile_of(work);
    size_t across = 8;
    while (across > 1 && strips(down, ROW_STRIPS) * strips(right, across) < 8 * (size_t)team_size())
        across /= 2;
#pragma omp for collapse(2) schedule(dynamic)
    for (size_t i0 = 0; i0 < down; i0 += ROW_STRIPS)
        for (size_t j0 = 0; j0 < right; j0 += across) {
            const size_t i1 = at_most(i0 + ROW_STRIPS, down), j1 = at_most(j0 + across, right);
            for (size_t j = j0; j < j1; j++)
                for (size_t i = i0; i < i1; i++)
                    tile(*y, k.i + i * height, k.j + j * TILE_COLS, work->a + i * height * words,
                         work->b + j * TILE_COLS * words, at_most(k.M - i * height, height),
                         at_most(k.N - j * TILE_COLS, TILE_COLS), words);
            if (y->gelu)
                block_gelu(y, k.i + i0 * height, k.i + at_most(i1 * height, k.M),
                           k.j + j0 * TILE_COLS, k.j + at_most(j1 * TILE_COLS, k.N));
        }
}

// y (M,N) from a (M,K) b (K,N); y must not overlap a, b or h. b_sum (N), if given and b is not
// transposed, += y.scale * the columns of b.
static inline void multiply(Result y, const PackWorkspace *work, Matrix a, Matrix b, size_t M,
                            size_t N, size_t K, real *b_sum) {
    const size_t K_most = work->bf16 ? 2 * K_BLOCK : K_BLOCK;
#pragma omp parallel
    {
        if (work->tiled) tiles_begin();
        for (size_t k = 0; k < K; k += K_most) {
            Result part = y;
            if (k > 0) part.add = 1, part.bias = NULL;
            if (k + K_most < K) part.gelu = NULL;
            for (size_t i = 0; i < M; i += M_BLOCK)
                for (size_t j = 0; j < N; j += N_BLOCK) {
                    const Block block = {i, j, k, at_most(M - i, M_BLOCK), at_most(N - j, N_BLOCK),
                                         at_most(K - k, K_most)};
                    // differ from those packed
                    const int other_a = j == 0, other_b = i == 0 || N > N_BLOCK;
                    block_pack(work, other_a ? &a : NULL, other_b ? &b : NULL, block,
                               i == 0 ? b_sum : NULL, y.scale);
                    block_multiply(&part, work, block);
                }
        }
        if (work->tiled) tiles_end();
    }
}

// y = x (BT,C) w (C,OC), plus y's epilogue (bias, GELU, scale, accumulate).
static inline void matmul_forward(Result y, const PackWorkspace *work, const real *x, const real *w,
                                  size_t BT, size_t C, size_t OC) {
    multiply(y, work, matrix(x, C), matrix(w, OC), BT, OC, C, NULL);
}

// ---- Matmuls with few rows, by weights packed in advance ----
//
// Their time is the time to load the weights, so each element is read once, in memory order: the
// strips of `multiply` one after the other, FEW_STRIPS at a time, over all of K. The order of the
// sums, and so the bits, are those of `multiply`.

// most rows; strips per task; prefetch distance
enum { FEW_ROWS = 2 * TILE_ROWS, FEW_STRIPS = 2, FEW_AHEAD = 1024 };

static inline size_t few_K(const PackWorkspace *work) { return work->bf16 ? 2 * K_BLOCK : K_BLOCK; }

// Elements of b (K,N) once packed.
static inline size_t packed_size(const PackWorkspace *work, size_t N, size_t K) {
    size_t words = 0;
    for (size_t k = 0; k < K; k += few_K(work))
        words += pack_words(work, at_most(K - k, few_K(work)));
    return words * round_up(N, TILE_COLS);
}

// Packs all strips of b (K,N): first those of the first K_BLOCK terms (twice as many in bf16), then
// of the next.
static inline void pack_weights(real *to, const PackWorkspace *work, Matrix b, size_t N, size_t K) {
    enum { GROUP = PACK_ELEMENTS / TILE_COLS * TILE_COLS };
    for (size_t k = 0; k < K; k += few_K(work)) {
        const size_t part = at_most(K - k, few_K(work)), words = pack_words(work, part);
#pragma omp parallel for
        for (size_t j = 0; j < N; j += GROUP)
            pack_strips(to + j * words, &b, b.transposed, j, at_most(N - j, GROUP), TILE_COLS, k,
                        part, work, NULL, 0);
        to += words * round_up(N, TILE_COLS);
    }
}

// tile_sums of the first `rows` rows of a strip, for `count` strips of b that are `next` elements
// apart.
static inline ALWAYS_INLINE void few_sums(Vector sum[FEW_STRIPS][TILE_ROWS][TILE_VECTORS],
                                          const real *a, const real *b, size_t next, size_t words,
                                          size_t rows, size_t count, int pairs) {
    for (size_t k = 0; k < words; k++, a += TILE_ROWS, b += TILE_COLS)
#pragma GCC unroll 2
        for (size_t s = 0; s < count; s++)
#pragma GCC unroll 4
            for (size_t j = 0; j < TILE_VECTORS; j++) {
                const Vector bk = vector_load(b + s * next + j * LANES);
                __builtin_prefetch(b + s * next + j * LANES + FEW_AHEAD);
#pragma GCC unroll 16
                for (size_t i = 0; i < rows; i++) {
                    if (pairs) sum[s][i][j] = pairs_dot(sum[s][i][j], a[i], bk);
                    else sum[s][i][j] += a[i] * bk;
                }
            }
}

// Computes up to `rows` rows of y from `count` strips; M x N elements exist.
static inline ALWAYS_INLINE void few_tile(Result y, size_t i, size_t j, const real *a,
                                          const real *b, size_t M, size_t N, size_t words,
                                          size_t rows, size_t count, int pairs) {
    Vector sum[FEW_STRIPS][TILE_ROWS][TILE_VECTORS] = {{{{0}}}};
    few_sums(sum, a, b, words * TILE_COLS, words, rows, count, pairs);
    for (size_t s = 0; s < count; s++)
        tile_write(y, i, j + s * TILE_COLS, sum[s], M, at_most(N - s * TILE_COLS, TILE_COLS));
}

static inline void few_task(Result y, size_t i, size_t j, const real *a, const real *b, size_t M,
                            size_t N, size_t words, size_t count, int pairs) {
    enum { SOME = TILE_ROWS / 2 };
    if (M == 1 && count == 2 && pairs) few_tile(y, i, j, a, b, M, N, words, 1, 2, 1);
    else if (M == 1 && count == 2) few_tile(y, i, j, a, b, M, N, words, 1, 2, 0);
    else if (M == 1 && pairs) few_tile(y, i, j, a, b, M, N, words, 1, 1, 1);
    else if (M == 1) few_tile(y, i, j, a, b, M, N, words, 1, 1, 0);
    else if (count == 2 && pairs) few_tile(y, i, j, a, b, M, N, words, SOME, 2, 1);
    else if (count == 2) few_tile(y, i, j, a, b, M, N, words, SOME, 2, 0);
    else if (pairs) few_tile(y, i, j, a, b, M, N, words, SOME, 1, 1);
    else few_tile(y, i, j, a, b, M, N, words, SOME, 1, 0);
}

// Computes `count` strips of y from column j on, over all of K.
static inline void few_columns(const Result *y, const PackWorkspace *work, const real *packed,
                               size_t j, size_t count, size_t M, size_t N, size_t K) {
    const real *a = work->a;
    const size_t here = at_most(N - j, count * TILE_COLS);
    Result part = *y;
    for (size_t k = 0; k < K; k += few_K(work)) {
        const size_t words = pack_words(work, at_most(K - k, few_K(work)));
        for (size_t s = 0; TILES && work->tiled && s < here; s += TILE_COLS)
            multiply_tile_tiled(part, 0, j + s, a, packed + (j + s) * words, M,
                                at_most(here - s, TILE_COLS), words);
        for (size_t i = 0; !(TILES && work->tiled) && i < M; i += TILE_ROWS / 2)
            few_task(part, i, j, a + i / TILE_ROWS * TILE_ROWS * words + i % TILE_ROWS,
                     packed + j * words, at_most(M - i, TILE_ROWS / 2), here, words, count,
                     in_pairs(work));
        a += round_up(M, strip_rows(work)) * words;
        packed += words * round_up(N, TILE_COLS);
        part.add = 1, part.bias = NULL;
    }
    if (y->gelu) block_gelu(y, 0, M, j, j + here);
}

// y (M,N) from a (M,K) and the packed weights of b (K,N) (pack_weights); M <= FEW_ROWS. Here
// work->a holds all of a.
static inline void multiply_few(Result y, const PackWorkspace *work, Matrix a, const real *packed,
                                size_t M, size_t N, size_t K) {
#pragma omp parallel
    {
        const size_t all = strips(N, TILE_COLS), count = all >= 4 * (size_t)team_size() ? FEW_STRIPS
            : 1;
        if (work->tiled) tiles_begin();
#pragma omp for schedule(static)
        for (size_t k = 0; k < K; k += few_K(work)) {
            // of the preceding parts
            const size_t words = k / few_K(work) * pack_words(work, few_K(work));
            pack_rows(work->a + round_up(M, strip_rows(work)) * words, &a, 0, M, k,
                      at_most(K - k, few_K(work)), work);
        }
#pragma omp for schedule(dynamic)
        for (size_t s = 0; s < all; s += count)
            few_columns(&y, work, packed, s * TILE_COLS, at_most(all - s, count), M, N, K);
        if (work->tiled) tiles_end();
    }
}

// Backward of y = x w + bias, from scale * dy (BT,OC): dx (BT,C) = dy w^T; dw (C,OC) = x^T dy, or
// += with `add`; dbias (OC) += the columns of dy; both NULL: w does not change. dx carries the
// scale; it is complete before x is read, since dx's epilogue may recompute x.
static inline void matmul_backward(Result dx, real *dw, int add, real *dbias,
                                   const PackWorkspace *work, Matrix dy, const real *x,
                                       const real *w, size_t BT, size_t C, size_t OC) {
    multiply(dx, work, dy, transposed(w, OC), BT, C, OC, NULL);
    if (!dw) return;
    multiply(scaled(dw, OC, dx.scale, add), work, transposed(x, C), dy, C, OC, BT, dbias);
}

// sum (N) += the columns of y (M,N); with xhat (M,N), also scaled (N) += the columns of y * xhat.
static inline void column_sums(real *sum, real *scaled, const real *y, const real *xhat, size_t M,
                               size_t N) {
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

#endif
