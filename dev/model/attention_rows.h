// attention_rows.h: attention on the CPU that holds whole rows of scores, for everything that edits
// or reads them: AttentionDrop (arXiv 2504.12088) and a teacher's maps. Beside the tiles with a
// running softmax in train_gpt.c, whose results it has up to rounding when it edits nothing.
//
// A block of queries of one head at a time: its scores are (keys, QUERIES), transposed as in
// attention_tiles.h, so loops over a row of scores run over keys for LANES queries at once. The
// order within a row (backward in reverse):
//
//     q k^T / sqrt(HS) -> causal -> blur -> drop of the largest -> softmax -> dropout -> times v
//
// Backward makes the same scores again with the same instructions, so the k largest of a row are
// the same keys, and nothing is saved for it except the log-sum-exp of the edited scores.
#ifndef ATTENTION_ROWS_H
#define ATTENTION_ROWS_H

#include "attention_tiles.h"
#include "noise.h"

// One thread's workspace; four arrays of (keys_padded(T),QUERIES) follow it in memory.
typedef struct {
    real q[QUERIES * HEAD_MAX] __attribute__((aligned(64)));           // (QUERIES,W)
    real dy[QUERIES * HEAD_MAX];                                       // (QUERIES,W)
    real qt[HEAD_MAX * QUERIES], dyt[HEAD_MAX * QUERIES];              // (W,QUERIES)
    real k[KEYS * HEAD_MAX];                                           // (KEYS,W) keys or values
    real out[QUERIES * HEAD_MAX];                                      // (QUERIES,W) of y or dq
    real lse[QUERIES], inner[QUERIES];
    int dropped[QUERIES][HARD_MOST], n_dropped[QUERIES];               // keys of each query
    real *s, *blurred, *ds, *keep;
} RowsWorkspace;

typedef struct { real *at; int threads; size_t T; } RowsWorkspaces;

enum { ROWS_ARRAYS = 4 };
static inline size_t keys_padded(size_t T) { return round_up(T, KEYS) + KEYS; }

// Elements of a thread's workspace, for rows of T tokens.
static inline size_t rows_workspace(size_t T) {
    return round_up(sizeof(RowsWorkspace), 64) / sizeof(real) +
        ROWS_ARRAYS * keys_padded(T) * QUERIES;
}

static inline RowsWorkspace *rows_workspace_of(const RowsWorkspaces *works, int thread) {
    real *at = works->at + (size_t)thread * rows_workspace(works->T);
    RowsWorkspace *work = (RowsWorkspace *)(void *)at;
    real **const array[ROWS_ARRAYS] = {&work->s, &work->blurred, &work->ds, &work->keep};
    at += round_up(sizeof(RowsWorkspace), 64) / sizeof(real);
    for (size_t i = 0; i < ROWS_ARRAYS; i++) *array[i] = at + i * keys_padded(works->T) * QUERIES;
    return work;
}

// A block: ni queries from i0 on of one head of a row of the step, which see keys [0, i0 + ni).
typedef struct { size_t row, head, i0, ni, HS, W, ld; } RowsBlock;

static inline RowsBlock rows_block(size_t row, size_t head, size_t i0, size_t T, size_t C,
                                   size_t HS) {
    const RowsBlock b = {row, head, i0, at_most(T - i0, QUERIES), HS, round_up(HS, LANES), 3 * C};
    return b;
}

// How many keys are computed for the queries from lane i (a multiple of LANES) on: up to the last
// one that a query of its PAD sees.
static inline size_t rows_seen(const RowsBlock *b, size_t i) {
    return at_most(b->i0 + i / PAD * PAD + PAD, b->i0 + b->ni);
}

// All bits in the lanes of the queries from i on that see key j.
static inline ALWAYS_INLINE Mask rows_sees(const RowsBlock *b, size_t i, size_t j) {
    return lane_numbers() >= (int)j - (int)(b->i0 + i);
}

// s (keys,QUERIES) = the products of keys (T,HS), rows b->ld apart, with qt (W,QUERIES). Not
// inlined, so that forward and backward get the same bits.
static __attribute__((noinline)) void rows_products(real *s, RowsWorkspace *work, const real *keys,
                                                    const real *qt, const RowsBlock *b) {
    const size_t end = b->i0 + b->ni, lanes = round_up(b->ni, PAD);
    for (size_t j0 = 0; j0 < end; j0 += KEYS) {
        const size_t nj = at_most(end - j0, KEYS);
        load_rows(work->k, keys + j0 * b->ld, b->ld, 1, nj, b->HS, b->W);
        for (size_t j = 0; j < nj; j += STRIP_ROWS) {
            const size_t blind = j0 + j > b->i0 ? j0 + j - b->i0 : 0, lane = blind / PAD * PAD;
            strip_by_rows(s + (j0 + j) * QUERIES + lane, QUERIES, NULL, work->k + j * b->W, b->W,
                          qt + lane, QUERIES, STRIP_ROWS, lanes - lane, b->W);
        }
    }
}

// ---- Blur: each score becomes a mean of its neighbours', over the keys that the query sees ----

// The sum of the kernel's weights over the keys around j that each query from i on sees.
static inline ALWAYS_INLINE Vector blur_sum(const ScoreEdit *e, const RowsBlock *b, size_t i,
                                            size_t j, int h) {
    Vector sum = {0};
    for (int d = -h; d <= h; d++)
        if ((int)j + d >= 0)
            sum += select_lanes(rows_sees(b, i, j + (size_t)d), (Vector){0} + e->weight[d < 0 ? -d
                                : d], (Vector){0});
    return sum;
}

// to (keys,QUERIES) = from, blurred: L_j + the weighted mean of L_j' - L_j, so that equal scores
// stay what they are.
static inline void rows_blur(real *to, const real *from, const ScoreEdit *e, const RowsBlock *b) {
    const int h = e->width / 2;
    for (size_t i = 0; i < b->ni; i += LANES)
        for (size_t j = 0, seen = rows_seen(b, i); j < seen; j++) {
            const Vector at = *(const Vector *)(from + j * QUERIES + i);
            Vector sum = {0};
            for (int d = -h; d <= h; d++) {
                const size_t near = j + (size_t)d;
                if ((int)j + d < 0 || near >= seen) continue;
                const Vector apart = *(const Vector *)(from + near * QUERIES + i) - at;
                sum += select_lanes(rows_sees(b, i, near), e->weight[d < 0 ? -d : d] * apart,
                                    (Vector){0});
            }
            *(Vector *)(to + j * QUERIES + i) = at + sum / blur_sum(e, b, i, j, h);
        }
}

// Its transpose: to = the gradient with respect to the scores before the blur; from is 0 where a
// query does not see a key.
static inline void rows_blur_backward(real *to, const real *from, const ScoreEdit *e,
                                      const RowsBlock *b) {
    const int h = e->width / 2;
    for (size_t i = 0; i < b->ni; i += LANES) {
        const size_t seen = rows_seen(b, i);
        for (size_t j = 0; j < seen; j++) *(Vector *)(to + j * QUERIES + i) = (Vector){0};
        for (size_t j = 0; j < seen; j++) {
            const Vector share = select_lanes(rows_sees(b, i, j), *(const Vector *)(from + j *
                                              QUERIES + i) / blur_sum(e, b, i, j, h), (Vector){0});
            for (int d = -h; d <= h; d++) {
                const size_t near = j + (size_t)d;
                if ((int)j + d < 0 || near >= seen) continue;
                Vector *at = (Vector *)(to + near * QUERIES + i);
                *at += select_lanes(rows_sees(b, i, near), e->weight[d < 0 ? -d : d] * share,
                                    (Vector){0});
            }
        }
    }
}

// ---- Drop of the largest scores ----

// The largest scores of a query, in descending order; of equal ones the lower key comes first.
typedef struct { int n, key[HARD_MOST]; real score[HARD_MOST]; } Largest;

// Adds a score; keys come in ascending order.
static inline void largest_add(Largest *a, int most, real score, int key) {
    int at = a->n < most ? a->n++ : most - 1;
    for (; at > 0 && score > a->score[at - 1]; at--)
        a->score[at] = a->score[at - 1], a->key[at] = a->key[at - 1];
    a->score[at] = score, a->key[at] = key;
}

// Drops scores of the queries from i on: in `s` they become 0, or -infinity. Lists them in
// work->dropped.
static inline void rows_drop(RowsWorkspace *work, real *s, const ScoreEdit *e, const RowsBlock *b,
                             size_t i) {
    Largest all[LANES];
    Vector least = (Vector){0} - (real)INFINITY;             // a score must exceed it to enter
    for (int l = 0; l < LANES; l++) all[l].n = 0;
    for (size_t j = 0, seen = rows_seen(b, i); j < seen; j++) {
        const Vector at = *(const Vector *)(s + j * QUERIES + i);
        const Mask enters = (at > least) & rows_sees(b, i, j);
        const Mask none = {0};
        if (!memcmp(&enters, &none, sizeof none)) continue;
        for (int l = 0; l < LANES; l++) {
            if (!enters[l]) continue;
            largest_add(&all[l], e->k, at[l], (int)j);
            if (all[l].n == e->k) least[l] = all[l].score[e->k - 1];
        }
    }
    for (size_t l = 0; l < at_most(b->ni - i, LANES); l++) {
        const size_t query = b->i0 + i + l;
        int *dropped = work->dropped[i + l], n = 0;
        for (int r = 0; r < all[l].n; r++) {
            const uint32_t key = (uint32_t)all[l].key[r];
            const Philox w = noise_words(e->topk.key, noise_row(&e->topk, (uint32_t)b->row),
                                         (uint32_t)b->head, (uint32_t)query, key / NOISE_EACH);
            if (noise_half(w, key % NOISE_EACH) < e->topk.rate) dropped[n++] = (int)key;
        }
        // a query must see something: then its largest score stays
        if (e->masks && (size_t)n == query + 1)
            for (int r = 0; r < n; r++)
                if (dropped[r] == all[l].key[0]) {
                    dropped[r] = dropped[--n];
                    break;
                }
        for (int r = 0; r < n; r++)
            s[(size_t)dropped[r] * QUERIES + i + l] = e->masks ? -(real)INFINITY : 0;
        work->n_dropped[i + l] = n;
    }
}

// The scores of a block, edited: (keys,QUERIES), in work->s or work->blurred.
static inline real *rows_scores(RowsWorkspace *work, const real *k, const ScoreEdit *e,
                                const RowsBlock *b) {
    real *s = work->s;
    rows_products(s, work, k, work->qt, b);
    if (e->kind == SCORES_BLUR) rows_blur(s = work->blurred, work->s, e, b);
    for (size_t i = 0; e->kind == SCORES_HARD && i < b->ni; i += LANES)
        rows_drop(work, s, e, b, i);
    return s;
}

// keep (keys,QUERIES): dropout's factors for the block's probabilities.
static inline void rows_noise(real *keep, const NoisePlace *z, const RowsBlock *b) {
    const real scale = (real)noise_scale(z->rate);
    for (size_t j = 0; j < b->i0 + b->ni; j += NOISE_EACH)
        for (size_t i = 0; i < round_up(b->ni, PAD); i++) {
            const Philox w = noise_words(z->key, noise_row(z, (uint32_t)b->row),
                                         (uint32_t)b->head, (uint32_t)(b->i0 + i),
                                         (uint32_t)(j / NOISE_EACH));
            for (int n = 0; n < NOISE_EACH; n++)
                keep[(j + (size_t)n) * QUERIES + i] = noise_half(w, n) >= z->rate ? scale : 0;
        }
}

// ---- Forward ----

// s becomes the probabilities, 0 for keys that a query does not see, times dropout's factors; sum
// and top of each query give its log-sum-exp, work->lse.
static inline void rows_softmax(RowsWorkspace *work, real *s, const real *keep,
                                const RowsBlock *b) {
    for (size_t i = 0; i < b->ni; i += LANES) {
        const size_t seen = rows_seen(b, i);
        Vector top = (Vector){0} - (real)INFINITY, sum = {0};
        for (size_t j = 0; j < seen; j++) {
            Vector *at = (Vector *)(s + j * QUERIES + i);
            if (j > b->i0 + i) *at = select_lanes(rows_sees(b, i, j), *at, (Vector){0} -
                                                  (real)INFINITY);
            top = select_lanes(*at > top, *at, top);
        }
        for (size_t j = 0; j < seen; j++) {
            Vector *at = (Vector *)(s + j * QUERIES + i);
            sum += *at = exp_lanes(*at - top);
        }
        const Vector share = (real)1 / sum;
        for (size_t j = 0; j < seen; j++) {
            Vector *at = (Vector *)(s + j * QUERIES + i);
            *at *= share;
            if (keep) *at *= *(const Vector *)(keep + j * QUERIES + i);
        }
        for (size_t l = 0; l < at_most(b->ni - i, LANES); l++)
            work->lse[i + l] = top[l] + log_real(sum[l]);
    }
}

// out (QUERIES,W) = s^T (keys,QUERIES) times keys (T,HS).
static inline void rows_times(RowsWorkspace *work, const real *s, const real *keys,
                              const RowsBlock *b) {
    static const real ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};  // >= STRIP_ROWS
    const size_t end = b->i0 + b->ni;
    for (size_t j0 = 0; j0 < end; j0 += KEYS) {
        const size_t nj = at_most(end - j0, KEYS);
        load_rows(work->k, keys + j0 * b->ld, b->ld, 1, nj, b->HS, b->W);
        for (size_t i = j0 > b->i0 ? j0 - b->i0 : 0; i < b->ni; i += STRIP_ROWS)
            strip_by_columns(work->out + i * b->W, b->W, j0 ? ones : NULL, s + j0 * QUERIES + i,
                             QUERIES, work->k, b->W, STRIP_ROWS, b->W,
                             at_most(b->i0 + i + STRIP_ROWS - j0, nj));
    }
}

static inline void rows_load_queries(RowsWorkspace *work, const real *q, const RowsBlock *b) {
    load_rows(work->q, q, b->ld, (real)(1 / sqrt((double)b->HS)), b->ni, b->HS, b->W);
    load_transposed(work->qt, work->q, b->ni, b->W);
}

// y (n,T,C) and lse (n,NH,T) from qkv (n,T,3C), with the scores edited; the arguments are
// attention_forward's.
static inline void attention_rows_forward(real *y, real *lse, const RowsWorkspaces *works,
                                          const real *qkv, const ScoreEdit *edit,
                                          const NoisePlace *noise, const int *rows, size_t n,
                                          size_t T, size_t C, size_t NH) {
    const size_t HS = C / NH;
#pragma omp parallel num_threads(works->threads)
    {
        RowsWorkspace *work = rows_workspace_of(works, team_member());
#pragma omp for collapse(3) schedule(dynamic)
        for (size_t row = 0; row < n; row++)
            for (size_t h = 0; h < NH; h++)
                for (size_t i0 = 0; i0 < T; i0 += QUERIES) {
                    const RowsBlock b = rows_block(rows ? (size_t)rows[row] : row, h, i0, T, C, HS);
                    const real *q = qkv + row * T * 3 * C + h * HS;
                    rows_load_queries(work, q + i0 * b.ld, &b);
                    real *s = rows_scores(work, q + C, edit, &b);
                    if (noise->rate) rows_noise(work->keep, noise, &b);
                    rows_softmax(work, s, noise->rate ? work->keep : NULL, &b);
                    rows_times(work, s, q + 2 * C, &b);
                    for (size_t i = 0; i < b.ni; i++)
                        memcpy(y + (row * T + i0 + i) * C + h * HS, work->out + i * b.W,
                               HS * sizeof(real));
                    memcpy(lse + (row * NH + h) * T + i0, work->lse, b.ni * sizeof(real));
                }
    }
}

// ---- Backward ----

// s and dP (keys,QUERIES), which is in ds, become P~ and the gradient of the edited scores. With
// `more` (keys,QUERIES), it is added to dP: the gradient of a loss by the probabilities before
// dropout.
static inline void rows_softmax_backward(RowsWorkspace *work, real *s, const real *keep,
                                         const real *more, const RowsBlock *b) {
    for (size_t i = 0; i < b->ni; i += LANES) {
        const Vector lse = *(const Vector *)(work->lse + i);
        Vector inner = *(const Vector *)(work->inner + i);
        const size_t seen = rows_seen(b, i);
        for (size_t j = 0; j < seen; j++) {
            Vector *at = (Vector *)(s + j * QUERIES + i);
            *at = exp_lanes(select_lanes(rows_sees(b, i, j), *at - lse, (Vector){0} -
                                         (real)INFINITY));
            if (more) inner += *at * *(const Vector *)(more + j * QUERIES + i);
        }
        for (size_t j = 0; j < seen; j++) {
            Vector *at = (Vector *)(s + j * QUERIES + i), *ds = (Vector *)(work->ds + j * QUERIES +
                i);
            const Vector p = *at;
            if (keep) {
                const Vector factor = *(const Vector *)(keep + j * QUERIES + i);
                *at = p * factor, *ds *= factor;
            }
            if (more) *ds += *(const Vector *)(more + j * QUERIES + i);
            *ds = p * (*ds - inner);
        }
    }
}

// dk and dv (T,HS), rows b->ld apart, += ds q and P~ dy; the first queries that see a key set them.
static inline void rows_keys_backward(RowsWorkspace *work, real *dk, real *dv, const real *s,
                                      const real *ds, const RowsBlock *b) {
    static const real ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    const size_t W = b->W;
    for (size_t j = 0; j < b->i0 + b->ni; j += STRIP_ROWS) {
        const size_t i = j > b->i0 ? j - b->i0 : 0, n = at_most(b->i0 + b->ni - j, STRIP_ROWS);
        const real *add = j >= b->i0 ? NULL : ones;
        strip_by_rows(dv + j * b->ld, b->ld, add, s + j * QUERIES + i, QUERIES, work->dy + i * W, W,
                      n, b->HS, b->ni - i);
        strip_by_rows(dk + j * b->ld, b->ld, add, ds + j * QUERIES + i, QUERIES, work->q + i * W,
                      W, n, b->HS, b->ni - i);
    }
}

// One block of queries of a head. more: as in rows_softmax_backward, or NULL.
static inline void rows_block_backward(RowsWorkspace *work, real *dq, const real *dy, const real *q,
                                       const real *y, const real *lse, const ScoreEdit *edit,
                                       const NoisePlace *noise, const real *more,
                                       const RowsBlock *b, size_t C) {
    const real scale = (real)(1 / sqrt((double)b->HS));
    real *ds = work->ds;
    rows_load_queries(work, q + b->i0 * b->ld, b);
    load_rows(work->dy, dy, C, 1, b->ni, b->HS, b->W);
    load_transposed(work->dyt, work->dy, b->ni, b->W);
    memset(work->inner, 0, sizeof work->inner), memset(work->lse, 0, sizeof work->lse);
    memcpy(work->lse, lse, b->ni * sizeof(real));
    for (size_t i = 0; i < b->ni; i++) {
        real inner = 0;
#pragma omp simd reduction(+:inner)
        for (size_t d = 0; d < b->HS; d++) inner += dy[i * C + d] * y[i * C + d];
        work->inner[i] = inner;
    }
    real *s = rows_scores(work, q + C, edit, b);
    rows_products(ds, work, q + 2 * C, work->dyt, b);
    if (noise->rate) rows_noise(work->keep, noise, b);
    rows_softmax_backward(work, s, noise->rate ? work->keep : NULL, more, b);
    for (size_t i = 0; edit->kind == SCORES_HARD && i < b->ni; i++)
        for (int r = 0; r < work->n_dropped[i]; r++)
            ds[(size_t)work->dropped[i][r] * QUERIES + i] = 0;
    // the scores before the blur are no longer needed
    if (edit->kind == SCORES_BLUR) rows_blur_backward(ds = work->s, work->ds, edit, b);
    rows_keys_backward(work, dq + C, dq + 2 * C, s, ds, b);
    rows_times(work, ds, q + C, b);
    for (size_t i = 0; i < b->ni; i++)
        for (size_t d = 0; d < b->HS; d++)
            dq[(b->i0 + i) * b->ld + d] = scale * work->out[i * b->W + d];
}

// dqkv (n,T,3C) from dy (n,T,C); y and lse are attention_rows_forward's. more (n,blocks of
// queries,T,QUERIES), NULL: none.
static inline void attention_rows_backward(real *dqkv, const RowsWorkspaces *works, const real *dy,
                                           const real *qkv, const real *y, const real *lse,
                                           const ScoreEdit *edit, const NoisePlace *noise,
                                           const real *more, const int *rows, size_t n, size_t T,
                                           size_t C, size_t NH) {
    const size_t HS = C / NH, blocks = (T + QUERIES - 1) / QUERIES;
#pragma omp parallel num_threads(works->threads)
    {
        RowsWorkspace *work = rows_workspace_of(works, team_member());
#pragma omp for collapse(2) schedule(dynamic)
        for (size_t row = 0; row < n; row++)
            for (size_t h = 0; h < NH; h++)
                for (size_t i0 = 0; i0 < T; i0 += QUERIES) {
                    const RowsBlock b = rows_block(rows ? (size_t)rows[row] : row, h, i0, T, C, HS);
                    const size_t from = (row * T + i0) * C + h * HS, all = row * T * 3 * C + h * HS;
                    rows_block_backward(work, dqkv + all, dy + from, qkv + all, y + from,
                                        lse + (row * NH + h) * T + i0, edit, noise,
                                        more ? more + (row * blocks + i0 / QUERIES) * T * QUERIES
                                        : NULL, &b, C);
                }
    }
}

#endif
