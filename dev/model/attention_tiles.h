// attention_tiles.h: the small matmuls inside attention on the CPU, over the rows of one head.
//
// Each tile of a head's rows is copied and padded to W, HS rounded up to whole vectors. The copies
// need no code for edges, and avoid the strides that map all rows to a few sets of a cache. Scores
// are stored transposed, as (keys, queries), so that one vector of maxima and one of sums serve
// LANES queries. Every matmul then reads one operand element by element, along its rows or columns,
// and the other in vectors along its rows: only q (and dy in the backward pass) is transposed, once
// per tile of queries.
#ifndef ATTENTION_TILES_H
#define ATTENTION_TILES_H

#include "generation.h"
#include "matmul.h"
#include "noise.h"
#include "vector.h"

enum {
    // of a tile, with KEYS (workspace: 880 KB)
    QUERIES = 512 / sizeof(real),
    // of a strip: they divide tiles and most heads
    STRIP_ROWS = TILE_ROWS < 8 ? 4 : 8, STRIP_VECTORS = 2,
    PAD = (int)LANES > (int)STRIP_ROWS ? (int)LANES : (int)STRIP_ROWS
};

typedef struct {                                         // one thread's workspace
    // (QUERIES,W); q carries the scale 1/sqrt(HS)
    __attribute__((aligned(64))) real q[QUERIES * HEAD_MAX], dy[QUERIES * HEAD_MAX];
    real qt[HEAD_MAX * QUERIES], dyt[HEAD_MAX * QUERIES];    // (W,QUERIES) the same, transposed
    real k[KEYS * HEAD_MAX], v[KEYS * HEAD_MAX];  // (KEYS,W) keys
    real out[QUERIES * HEAD_MAX];                 // (QUERIES,W) queries: of y or dq
    real s[KEYS * QUERIES], ds[KEYS * QUERIES], keep[KEYS * QUERIES];        // (keys,queries)
    real top[QUERIES], sum[QUERIES], shrink[QUERIES], inner[QUERIES];   // per query
} AttentionWorkspace;

// AttentionWorkspace at[threads]: too large for some stacks
typedef struct { real *at; int threads; } AttentionWorkspaces;

// to (n,W) = scale * from (n,HS), rows ld apart, padded with zero columns up to W and with zero
// rows up to a multiple of PAD.
static inline void load_rows(real *to, const real *from, size_t ld, real scale, size_t n, size_t HS,
                             size_t W) {
    for (size_t i = 0; i < n; i++) {
        size_t d = 0;
        for (; d + LANES <= HS; d += LANES)
            *(Vector *)(to + i * W + d) = scale * *(const Vector *)(from + i * ld + d);
        for (; d < HS; d++) to[i * W + d] = scale * from[i * ld + d];
        for (; d < W; d++) to[i * W + d] = 0;
    }
    memset(to + n * W, 0, (round_up(n, PAD) - n) * W * sizeof(real));
}

// to (W,QUERIES) = the transpose of from (n,W), in squares of LANES x LANES.
static inline void load_transposed(real *to, const real *from, size_t n, size_t W) {
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

// y (M,N), rows ldy apart, = beta (M) * y + a (M,K) b (K,N), with a[i*a_row + k*a_k] and b[k*ldb +
// j]. M <= STRIP_ROWS and N <= vectors * LANES limit what is written; a and b are read up to the
// full tile. If beta is NULL, y is not read.
static inline ALWAYS_INLINE void strip_tile(real *y, size_t ldy, const real *beta, const real *a,
                                            size_t a_row, size_t a_k, const real *b, size_t ldb,
                                            size_t M, size_t N, size_t K, size_t vectors) {
    Vector sum[STRIP_ROWS][STRIP_VECTORS] = {{{0}}};
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
                if (beta) sum[i][j] += beta[i] * *to;
                *to = sum[i][j];
            }
        return;
    }
    real edge[STRIP_ROWS][STRIP_VECTORS * LANES];
    memcpy(edge, sum, sizeof edge);
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++)
            y[i * ldy + j] = (beta ? beta[i] * y[i * ldy + j] : 0) + edge[i][j];
}

// The same for any N.
static inline ALWAYS_INLINE void strip_columns(real *y, size_t ldy, const real *beta, const real *a,
                                               size_t a_row, size_t a_k, const real *b,
                                               size_t ldb, size_t M, size_t N, size_t K) {
    size_t j = 0;
    for (; j + LANES < N; j += STRIP_VECTORS * LANES)
        strip_tile(y + j, ldy, beta, a, a_row, a_k, b + j, ldb, M,
                   at_most(N - j, STRIP_VECTORS * LANES), K, STRIP_VECTORS);
    if (j < N) strip_tile(y + j, ldy, beta, a, a_row, a_k, b + j, ldb, M, N - j, K, 1);
}

// The rows of a are contiguous: a[i*lda + k].
static inline void strip_by_rows(real *y, size_t ldy, const real *beta, const real *a, size_t lda,
                                 const real *b, size_t ldb,
                           size_t M, size_t N, size_t K) {
    strip_columns(y, ldy, beta, a, lda, 1, b, ldb, M, N, K);
}

// The columns of a are contiguous: a[i + k*lda].
static inline void strip_by_columns(real *y, size_t ldy, const real *beta, const real *a,
                                    size_t lda, const real *b, size_t ldb, size_t M, size_t N,
                                        size_t K) {
    strip_columns(y, ldy, beta, a, 1, lda, b, ldb, M, N, K);
}

// ---- Where the causal mask cuts a tile: queries i0 .. i0 + QUERIES, keys j0 .. j0 + KEYS ----

// How many queries of the tile from i0 on come before key j: they do not see it.
static inline size_t blind(size_t i0, size_t j) { return j > i0 ? j - i0 : 0; }

// The first query of the tile whose score with key j is computed: that of the first PAD with a
// query that sees it.
static inline size_t first_lane(size_t i0, size_t j) { return blind(i0, j) / PAD * PAD; }

// Of nj keys from j0 on, those whose scores with query i of the tile are computed: up to the last
// one that a query of its PAD sees.
static inline size_t keys_seen(size_t i0, size_t i, size_t j0, size_t nj) {
    const size_t end = i0 + i / PAD * PAD + PAD;
    return end <= j0 ? 0 : at_most(end - j0, nj);
}

// The scores of key j with queries i .. i + LANES: -inf if the key is later than the query.
static inline ALWAYS_INLINE Vector causal(Vector s, size_t i, size_t j) {
    if (j <= i) return s;
    return select_lanes(lane_numbers() >= (int)(j - i), s, (Vector){0} - (real)INFINITY);
}

// keep (nj,lanes): dropout's factors for a head's probabilities; nj is rounded up to a multiple of
// NOISE_EACH.
static inline void attention_noise(real *keep, const NoisePlace *z, size_t row, size_t head,
                                   size_t i0, size_t j0, size_t nj, size_t lanes) {
    const real scale = (real)noise_scale(z->rate);
    for (size_t j = 0; j < nj; j += NOISE_EACH)
        for (size_t i = 0; i < lanes; i++) {
            const Philox w = noise_words(z->key, noise_row(z, (uint32_t)row), (uint32_t)head,
                                         (uint32_t)(i0 + i), (uint32_t)((j0 + j) / NOISE_EACH));
            for (int e = 0; e < NOISE_EACH; e++)
                keep[(j + (size_t)e) * QUERIES + i] = noise_half(w, e) >= z->rate ? scale : 0;
        }
}

#endif
