// generation.h: what only generation needs on the CPU: attention for tokens that continue a
// sequence, one query at a time, over cached keys and values, and packed weights for matmuls with
// few tokens. attention_forward in train_gpt.c computes the same attention for whole rows.
//
// A head's keys are stored in tiles (HS,KEYS), so that a vector holds one channel of LANES keys,
// and its values as rows of W, which is HS rounded up to whole vectors. All sums have the order,
// and so the bits, of attention_forward: how tokens are divided among calls does not matter.
#ifndef GENERATION_H
#define GENERATION_H

#include "drop_path.h"
#include "matmul.h"
#include "vector.h"

enum { KEYS = 64, HEAD_MAX = 256 };                      // keys per tile; channels per head

typedef struct { real *at; size_t T; } HeadCache;        // one head after the other, T tokens each,
                                                         // a multiple of KEYS

static inline size_t head_cache(size_t T, size_t HS) { return T * (HS + round_up(HS, LANES)); }

// Stores k and v (n,HS), rows ld apart, at the positions from `first` on.
static inline void cache_append(real *head, size_t T, const real *k, const real *v, size_t ld,
                                size_t first, size_t n, size_t HS) {
    const size_t W = round_up(HS, LANES);
    real *values = head + T * HS;
    for (size_t t = 0; t < n; t++) {
        const size_t j = first + t;
        for (size_t d = 0; d < HS; d++) head[(j / KEYS * HS + d) * KEYS + j % KEYS] = k[t * ld + d];
        memcpy(values + j * W, v + t * ld, HS * sizeof(real));       // the elements after HS stay 0
    }
}

// s (KEYS) = q (HS) times a tile of keys.
static inline void query_scores(real *s, const real *q, const real *k, size_t HS) {
    enum { AT_ONCE = 4 };
    for (size_t j = 0; j < KEYS; j += AT_ONCE * LANES) {
        Vector sum[AT_ONCE] = {{0}};
        for (size_t d = 0; d < HS; d++)
#pragma GCC unroll 4
            for (size_t g = 0; g < AT_ONCE; g++)
                sum[g] += q[d] * vector_load(k + d * KEYS + j + g * LANES);
        for (size_t g = 0; g < AT_ONCE; g++) vector_store(s + j + g * LANES, sum[g]);
    }
}

// out (vectors * LANES) = p (n) v (n,W), plus shrink * out unless this is the first tile.
static inline ALWAYS_INLINE void query_values(real *out, const real *p, const real *v, size_t n,
                                              size_t W, real shrink, int add, size_t vectors) {
    Vector sum[4] = {{0}};
    for (size_t j = 0; j < n; j++)
#pragma GCC unroll 4
        for (size_t g = 0; g < vectors; g++) sum[g] += p[j] * vector_load(v + j * W + g * LANES);
    for (size_t g = 0; g < vectors; g++) {
        if (add) sum[g] += shrink * vector_load(out + g * LANES);
        vector_store(out + g * LANES, sum[g]);
    }
}

// y (HS) from q (HS) and the first `seen` tokens of a head.
static inline void attention_query(real *y, const real *q, const real *head, size_t T, size_t seen,
                                   size_t HS) {
    const size_t W = round_up(HS, LANES);
    const real scale = (real)(1 / sqrt((double)HS)), *k = head, *v = head + T * HS;
    real scaled_q[HEAD_MAX], out[HEAD_MAX + LANES], s[KEYS], sum = 0;
    Vector top = vector_of(-(real)INFINITY);
    for (size_t d = 0; d < HS; d++) scaled_q[d] = scale * q[d];
    for (size_t j0 = 0; j0 < seen; j0 += KEYS, k += KEYS * HS, v += KEYS * W) {
        const size_t n = at_most(seen - j0, KEYS);
        query_scores(s, scaled_q, k, HS);
        for (size_t j = n; j < KEYS; j++) s[j] = -(real)INFINITY;
        const Vector block = vector_of(max_of(s, n)), high = select_lanes(block > top, block, top);
        const Vector shrink = exp_lanes(top - high);
        real total = 0;
        for (size_t j = 0; j < KEYS; j += LANES)
            vector_store(s + j, exp_lanes(vector_load(s + j) - high));
        for (size_t j = 0; j < n; j++) total += s[j];
        size_t d = 0;
        for (; d + 4 * LANES <= W; d += 4 * LANES)
            query_values(out + d, s, v + d, n, W, shrink[0], j0 > 0, 4);
        for (; d < W; d += LANES) query_values(out + d, s, v + d, n, W, shrink[0], j0 > 0, 1);
        sum = sum * shrink[0] + total;
        top = high;
    }
    const real share = 1 / sum;
    for (size_t d = 0; d < HS; d++) y[d] = out[d] * share;
}

// y (n,T,C) from qkv (n,T,3C). Packed row i of the branch is row b->rows[i] of the batch: its
// tokens continue sequence seq[row] of the cache at position at[row], and their keys and values are
// stored there. With y NULL they are only stored.
static inline void attention_cached(real *y, const real *qkv, HeadCache cache, const BranchPlan *b,
                                    const int *seq, const int *at, size_t T, size_t C, size_t NH) {
    const size_t HS = C / NH;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (size_t i = 0; i < (size_t)b->n; i++)
        for (size_t h = 0; h < NH; h++) {
            const size_t row = (size_t)b->rows[i], first = (size_t)at[row];
            const real *q = qkv + i * T * 3 * C + h * HS;
            real *head = cache.at + ((size_t)seq[row] * NH + h) * head_cache(cache.T, HS);
            cache_append(head, cache.T, q + C, q + 2 * C, 3 * C, first, T, HS);
            for (size_t t = 0; y && t < T; t++)
                attention_query(y + (i * T + t) * C + h * HS, q + t * 3 * C, head, cache.T,
                                first + t + 1, HS);
        }
}

// ---- Packed weights, for matmuls with few tokens ----

// The matrices of each layer, layer by layer, then the head.
typedef struct {
    real *at;                             // NULL: this model does not generate
    size_t offset[N_PARAMS], layer_size;  // param p of layer l is at offset[p] + l * layer_size
    int stale;                            // the weights have changed since they were packed
} PackedWeights;

static inline int is_packed(int param) {
    return gpt_param[param].branch != NO_BRANCH && gpt_param[param].dims == 2 &&
           gpt_param[param].group != GROUP_ADAPTER;
}

static inline void packed_layout(PackedWeights *w, const GptConfig *c, const PackWorkspace *work) {
    for (int p = 0; p < N_PARAMS; p++) {
        if (!is_packed(p)) continue;
        w->offset[p] = w->layer_size;
        w->layer_size += packed_size(work, (size_t)gpt_param_cols(c, p),
                                     (size_t)gpt_param_rows(c, p));
    }
    w->offset[P_wte] = w->layer_size * (size_t)c->L;
    w->stale = 1;
}

static inline size_t packed_total(const PackedWeights *w, const GptConfig *c,
                                  const PackWorkspace *work) {
    return w->offset[P_wte] + packed_size(work, (size_t)c->V, (size_t)c->C);
}

static inline const real *packed_at(const PackedWeights *w, int param, int layer) {
    return w->at + w->offset[param] + (size_t)layer * w->layer_size;
}

// Packs one layer's part of a parameter: rows of it as they are, or of wte, whose transpose is the
// head.
static inline void packed_write(PackedWeights *w, const GptConfig *c, const PackWorkspace *work,
                                int param, int layer, const real *from) {
    const size_t rows = (size_t)gpt_param_rows(c, param), cols = (size_t)gpt_param_cols(c, param);
    real *to = w->at + w->offset[param] + (param == P_wte ? 0 : (size_t)layer * w->layer_size);
    if (param == P_wte) pack_weights(to, work, transposed(from, cols), rows, cols);
    else pack_weights(to, work, matrix(from, cols), cols, rows);
}

#endif
