// attention_rows.h: attention on the GPU that holds whole rows of scores, for everything that edits
// or reads them: AttentionDrop (arXiv 2504.12088) and a teacher's maps. Beside the flash attention
// of train_gpt.cu, whose results it has up to rounding when it edits nothing. A part of
// train_gpt.cu, which includes it after its matmuls and its attention; dev/model/attention_rows.h
// is the CPU's.
//
// Heads are copied to (heads,Tp,W), so that each one is a matrix, and all products of a block of
// queries of several heads are one batched matmul of cuBLASLt. Between the products stands one
// kernel, a warp to a row of scores; backward in reverse:
//
//     q k^T / sqrt(HS) -> causal -> blur -> drop of the largest -> softmax -> dropout -> times v
//
// Backward makes the same scores again by the same matmul, so the k largest of a row are the same
// keys, and nothing is saved for it except the log-sum-exp of the edited scores. The scores of a
// block are in memory, of which ROWS_SCORES bounds the size for any length of rows: a block has as
// many queries and rows of the batch as fit, at least ROWS_UNIT queries of the heads of one row.
// Its keys end with its last query, so the work is nearly that of the causal half.
#ifndef CUDA_ATTENTION_ROWS_H
#define CUDA_ATTENTION_ROWS_H

#include "../model/noise.h"

#ifndef ROWS_SCORES
#define ROWS_SCORES (1 << 24)  // scores in a block
#endif
// queries, keys and channels are padded to multiples: of 16 elements, and as heads begin at
// multiples of 256 bytes; queries of a block at most, so that causality saves work
enum { ROWS_UNIT = 16, ROWS_QUERIES = 256, ROWS_WARPS = 4 };

// A model's workspace. Heads of `rows` rows of the batch, and of each `queries` queries, at a time.
typedef struct {
    size_t rows, queries, T, C, NH;
    float *s, *t;                                        // (rows,NH,queries,Tp) scores, and theirs
    void *p, *ds;                                        // (rows,NH,queries,Tp) of N
    void *q, *k, *v, *dy;                                // (rows,NH,Tp,W) of N
    float *dq, *dk, *dv;                                 // (rows,NH,Tp,W)
    float *map, *map_t;                                  // (rows,queries,Tp) means over heads
} AttentionRows;

static inline size_t rows_tokens(size_t T) { return round_up(T, ROWS_UNIT); }
static inline size_t rows_width(size_t C, size_t NH) { return round_up(C / NH, ROWS_UNIT); }

// Cuts the workspace for B rows of T tokens from an arena at *at, and returns its bytes; with at
// NULL only returns them. number: bytes of an N.
static size_t rows_open(AttentionRows *w, char **at, size_t B, size_t T, size_t C, size_t NH,
                        size_t number, cudaStream_t stream) {
    const size_t Tp = rows_tokens(T), W = rows_width(C, NH);
    const size_t least = ROWS_UNIT, fit = ROWS_SCORES / (NH * Tp) / ROWS_UNIT * ROWS_UNIT,
        queries = at_most(at_most(fit > least ? fit : least, ROWS_QUERIES), Tp),
        most = ROWS_SCORES / (NH * Tp * queries);
    const size_t rows = strips(B, strips(B, at_most(most ? most : 1, B)));
    const size_t scores = rows * NH * queries * Tp, heads = rows * NH * Tp * W,
        maps = rows * queries * Tp, one = sizeof(float);
    const struct { void **to; size_t bytes; } all[] = {
        {(void **)&w->s, scores * one}, {(void **)&w->t, scores * one}, {&w->p, scores * number},
        {&w->ds, scores * number}, {&w->q, heads * number}, {&w->k, heads * number},
        {&w->v, heads * number}, {&w->dy, heads * number}, {(void **)&w->dq, heads * one},
        {(void **)&w->dk, heads * one}, {(void **)&w->dv, heads * one},
        {(void **)&w->map, maps * one}, {(void **)&w->map_t, maps * one}};
    size_t bytes = 0;
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        if (at) *all[i].to = arena_cut(at, all[i].bytes, stream);
        bytes += arena_bytes(all[i].bytes);
    }
    w->rows = rows, w->queries = queries, w->T = T, w->C = C, w->NH = NH;
    return bytes;
}

// A block: the queries from i0 on, of all heads of n packed rows from row0 on. They see keys [0,
// keys); scores are (n,NH,queries,ld), of `count` queries in all. Queries from T on are padding.
typedef struct { int row0, n, i0, queries, keys, ld, T, NH, count; } RowsBlock;

// What a warp or a thread works on: a query's head among those of the block, its position, the keys
// that it sees (0 of padding), and its place in (rows,NH,T).
typedef struct { int head, t, seen; size_t at; } RowsQuery;

static __device__ RowsQuery rows_query(const RowsBlock &b, int query) {
    RowsQuery q;
    q.head = query / b.queries, q.t = b.i0 + query % b.queries;
    q.seen = q.t < b.T ? q.t + 1 : 0;
    q.at = ((size_t)b.row0 * (size_t)b.NH + (size_t)q.head) * (size_t)b.T + (size_t)q.t;
    return q;
}

// ---- Heads as matrices ----

// to (n,NH,Tp,W) = heads of n rows of `from`, whose rows of HS channels a head are ld apart, and
// zeros around them. rows (n): which rows they are; NULL: the first ones. A thread moves a piece of
// V elements, of which there are `count`.
template <class N, int V>
static __global__ void heads_split_kernel(N *to, const N *from, size_t ld, const int *rows,
                                          unsigned count, unsigned T, unsigned Tp, unsigned HS,
                                          unsigned W, unsigned NH) {
    const unsigned i = (unsigned)thread_index(), pieces = W / V, line = i / pieces,
        d = i % pieces * V, t = line % Tp, head = line / Tp, n = head / NH;
    if (i >= count) return;
    Floats<V> x = {};
    if (t < T && d < HS)
        x = load<N, V>(from, ((size_t)(rows ? (unsigned)rows[n] : n) * T + t) * ld +
                       head % NH * HS + d);
    store<N, V>(to, (size_t)i * V, x);
}

// The converse: to = from (n,NH,Tp,W).
template <class N, int V>
static __global__ void heads_merge_kernel(N *to, size_t ld, const float *from, unsigned count,
                                          unsigned T, unsigned Tp, unsigned HS, unsigned W,
                                          unsigned NH) {
    const unsigned i = (unsigned)thread_index(), pieces = HS / V * NH, line = i / pieces,
        c = i % pieces * V, t = line % T, n = line / T;
    if (i >= count) return;
    const Floats<V> x = load<float, V>(from, (((size_t)n * NH + c / HS) * Tp + t) * W + c % HS);
    store<N, V>(to, (size_t)line * ld + c, x);
}

// A thread for each piece of so many elements.
static unsigned heads_pieces(size_t elements, size_t width) {
    CHECK(elements / width <= UINT_MAX, "%zu elements of heads", elements);
    return (unsigned)(elements / width);
}

template <class N>
static void heads_split_as(const Gpu *g, const AttentionRows *w, void *to, const void *from,
                           size_t ld, const int *rows, size_t n) {
    constexpr int V = 16 / sizeof(N);
    const size_t Tp = rows_tokens(w->T), W = rows_width(w->C, w->NH), HS = w->C / w->NH;
    const int wide = HS % V == 0;
    const unsigned count = heads_pieces(n * w->NH * Tp * W, wide ? V : 1);
    LAUNCH_PACKED(heads_split_kernel, N, V, wide, blocks_for(count), BLOCK, 0, g->stream, (N *)to,
                  (const N *)from, ld, rows, count, (unsigned)w->T, (unsigned)Tp, (unsigned)HS,
                  (unsigned)W, (unsigned)w->NH);
}

template <class N>
static void heads_merge_as(const Gpu *g, const AttentionRows *w, void *to, size_t ld,
                           const float *from, size_t n) {
    constexpr int V = WIDE;
    const size_t Tp = rows_tokens(w->T), W = rows_width(w->C, w->NH), HS = w->C / w->NH;
    const int wide = HS % V == 0;
    const unsigned count = heads_pieces(n * w->T * w->C, wide ? V : 1);
    LAUNCH_PACKED(heads_merge_kernel, N, V, wide, blocks_for(count), BLOCK, 0, g->stream, (N *)to,
                  ld, from, count, (unsigned)w->T, (unsigned)Tp, (unsigned)HS, (unsigned)W,
                  (unsigned)w->NH);
}

static void heads_split(const Gpu *g, const AttentionRows *w, void *to, const void *from, size_t ld,
                        const int *rows, size_t n) {
    if (g->half) heads_split_as<bf16>(g, w, to, from, ld, rows, n);
    else heads_split_as<float>(g, w, to, from, ld, rows, n);
}

static void heads_merge(const Gpu *g, const AttentionRows *w, void *to, size_t ld,
                        const float *from, size_t n) {
    if (g->half) heads_merge_as<bf16>(g, w, to, ld, from, n);
    else heads_merge_as<float>(g, w, to, ld, from, n);
}

// ---- Blur: each score becomes a mean of its neighbours', over the keys that the query sees ----

// The sum of the kernel's weights over the keys around j.
static __device__ float blur_sum(const ScoreEdit *e, int j, int seen) {
    float sum = 0;
    for (int d = -(e->width / 2); d <= e->width / 2; d++)
        if (j + d >= 0 && j + d < seen) sum += e->weight[d < 0 ? -d : d];
    return sum;
}

// The weighted sum of those scores, each less `base`.
static __device__ float blur_scores(const ScoreEdit *e, const float *row, int j, int seen,
                                    float base) {
    float sum = 0;
    for (int d = -(e->width / 2); d <= e->width / 2; d++)
        if (j + d >= 0 && j + d < seen) sum += e->weight[d < 0 ? -d : d] * (row[j + d] - base);
    return sum;
}

// to = from, blurred: L_j + the weighted mean of L_j' - L_j, so that equal scores stay what they
// are. A thread makes one score.
static __global__ void rows_blur_kernel(float *to, const float *from, const ScoreEdit *e,
                                        RowsBlock b) {
    const size_t i = thread_index();
    const int query = (int)(i / (size_t)b.keys), j = (int)(i % (size_t)b.keys);
    if (query >= b.count) return;
    const int seen = rows_query(b, query).seen;
    const float *row = from + (size_t)query * (size_t)b.ld;
    to[(size_t)query * (size_t)b.ld + (size_t)j] =
        j < seen ? row[j] + blur_scores(e, row, j, seen, row[j]) / blur_sum(e, j, seen) : 0;
}

// Its transpose: ds = the gradient with respect to the scores before the blur, from that after it,
// divided by the sums of weights.
template <class N>
static __global__ void rows_blur_backward_kernel(N *ds, const float *from, const ScoreEdit *e,
                                                 RowsBlock b) {
    const size_t i = thread_index();
    const int query = (int)(i / (size_t)b.keys), j = (int)(i % (size_t)b.keys);
    if (query >= b.count) return;
    const int seen = rows_query(b, query).seen;
    const float *row = from + (size_t)query * (size_t)b.ld;
    ds[(size_t)query * (size_t)b.ld + (size_t)j] =
        from_float<N>(j < seen ? blur_scores(e, row, j, seen, 0) : 0);
}

// ---- Drop of the largest scores, by the warp of a row ----

// Keys that a lane remembers of those dropped, by rank: number `lane` and `lane` + WARP of the
// largest scores; -1: none.
typedef struct { int key[HARD_MOST / WARP]; } RowsDropped;

// A score and its key; INT_MAX: none. Of equal scores the one of the lower key comes first.
typedef struct { float score; int key; } RowsScore;

static __device__ bool rows_before(float a, int a_key, float b, int b_key) {
    return a > b || (a == b && a_key < b_key);
}

// The first of this lane's scores that comes after `last`. A lane has every WARP-th key.
static __device__ RowsScore rows_next(const float *row, int seen, RowsScore last) {
    RowsScore best = {-INFINITY, INT_MAX};
    for (int j = (int)threadIdx.x % WARP; j < seen; j += WARP)
        if (rows_before(last.score, last.key, row[j], j) &&
            rows_before(row[j], j, best.score, best.key)) best.score = row[j], best.key = j;
    return best;
}

// The first of all lanes' scores.
static __device__ RowsScore rows_first(RowsScore best) {
    for (int apart = WARP / 2; apart > 0; apart /= 2) {
        const float score = __shfl_xor_sync(0xffffffffu, best.score, apart);
        const int key = __shfl_xor_sync(0xffffffffu, best.key, apart);
        if (rows_before(score, key, best.score, best.key)) best.score = score, best.key = key;
    }
    return best;
}

// Drops scores of a row: they become 0 or -infinity. row_number: of the batch's row (noise_row).
static __device__ RowsDropped rows_drop(float *row, const ScoreEdit *e, uint32_t row_number,
                                        uint32_t head, int t, int seen) {
    const int lane = (int)threadIdx.x % WARP;
    RowsDropped dropped;
    UNROLL for (int i = 0; i < HARD_MOST / WARP; i++) dropped.key[i] = -1;
    RowsScore last = {INFINITY, -1}, mine = rows_next(row, seen, last);
    int n = 0;
    for (int r = 0; r < e->k && r < seen; r++) {
        last = rows_first(mine);
        if (last.key == INT_MAX) break;
        const uint32_t key = (uint32_t)last.key;
        const Philox w = noise_words(e->topk.key, row_number, head, (uint32_t)t, key / NOISE_EACH);
        const bool drops = noise_half(w, (int)(key % NOISE_EACH)) < e->topk.rate;
        n += drops;
        UNROLL for (int i = 0; i < HARD_MOST / WARP; i++)
            if (drops && r == lane + i * WARP) dropped.key[i] = last.key;
        if (last.key % WARP == lane) mine = rows_next(row, seen, last);
    }
    // a query must see something: then its largest score stays
    if (e->masks && n == seen && lane == 0) dropped.key[0] = -1;
    __syncwarp();                                        // all have read the row
    UNROLL for (int i = 0; i < HARD_MOST / WARP; i++)
        if (dropped.key[i] >= 0) row[dropped.key[i]] = e->masks ? -INFINITY : 0;
    __syncwarp();
    return dropped;
}

// ---- Rows of scores, forward and backward: a warp to a row, a lane to every WARP-th key ----

static __device__ RowsDropped rows_edit(float *row, const ScoreEdit *edit, int kind,
                                        const int *rows, const RowsBlock &b, const RowsQuery &l) {
    RowsDropped none;
    UNROLL for (int i = 0; i < HARD_MOST / WARP; i++) none.key[i] = -1;
    if (kind != SCORES_HARD || !l.seen) return none;
    const uint32_t row_number = noise_row(&edit->topk,
                                          (uint32_t)rows[b.row0 + l.head / b.NH]);
    return rows_drop(row, edit, row_number, (uint32_t)(l.head % b.NH), l.t, l.seen);
}

// p (count,ld) = softmax of s, which is edited first, times dropout's factors, and 0 for keys that
// a query does not see; lse (rows,NH,T). rows: which rows of the batch the packed ones are.
template <class N>
static __global__ void rows_softmax_kernel(N *p, float *lse, float *s, const ScoreEdit *edit,
                                           int kind, KeptKeys keep, const int *rows, RowsBlock b) {
    const int query = (int)(thread_index() / WARP), lane = (int)threadIdx.x % WARP;
    if (query >= b.count) return;
    const RowsQuery l = rows_query(b, query);
    float *const row = s + (size_t)query * (size_t)b.ld, kept = kept_scale(keep);
    N *const to = p + (size_t)query * (size_t)b.ld;
    rows_edit(row, edit, kind, rows, b, l);
    float top = -INFINITY, sum = 0;
    for (int j = lane; j < l.seen; j += WARP) top = fmaxf(top, row[j]);
    top = warp_max(top);
    for (int j = lane; j < l.seen; j += WARP) sum += row[j] = expf(row[j] - top);
    sum = warp_sum(sum);
    const float share = 1 / sum;
    for (int j = lane; j < b.keys; j += WARP) {
        float x = j < l.seen ? row[j] * share : 0;
        if (keep.words && j < l.seen)
            x *= kept_factor(keep, l.at - (size_t)l.t, l.t, j, b.T, kept);
        to[j] = from_float<N>(x);
    }
    if (lane == 0 && l.seen) lse[l.at] = top + logf(sum);
}

// p = P~, and from dP, ds = the gradient of the scores; of blurred ones it replaces dP, divided by
// the sums of the blur's weights. With `more` (rows,queries,ld), it is added to dP: the gradient of
// a loss with respect to every head's probabilities, before dropout.
template <class N>
static __global__ void rows_softmax_backward_kernel(N *p, N *ds, float *s, float *dp,
                                                    const float *lse, const float *inner,
                                                    const float *more, const ScoreEdit *edit,
                                                    int kind, KeptKeys keep, const int *rows,
                                                    RowsBlock b) {
    const int query = (int)(thread_index() / WARP), lane = (int)threadIdx.x % WARP;
    if (query >= b.count) return;
    const RowsQuery l = rows_query(b, query);
    const size_t at = (size_t)query * (size_t)b.ld;
    const size_t of_map = ((size_t)(l.head / b.NH) * (size_t)b.queries + (size_t)(l.t - b.i0)) *
        (size_t)b.ld;
    float *const row = s + at, kept = kept_scale(keep), along = 0;
    const RowsDropped dropped = rows_edit(row, edit, kind, rows, b, l);
    const float lse_of = l.seen ? lse[l.at] : 0;
    for (int j = lane; j < l.seen; j += WARP) {
        row[j] = expf(row[j] - lse_of);
        if (more) along += row[j] * more[of_map + (size_t)j];
    }
    const float inner_of = (l.seen ? inner[l.at] : 0) + (more ? warp_sum(along) : 0);
    for (int j = lane; j < b.keys; j += WARP) {
        const bool seen = j < l.seen;
        const float factor = keep.words && seen
            ? kept_factor(keep, l.at - (size_t)l.t, l.t, j, b.T, kept) : 1;
        const float probability = seen ? row[j] : 0;
        float d = seen ? dp[at + (size_t)j] * factor : 0;
        if (more && seen) d += more[of_map + (size_t)j];
        d = probability * (d - inner_of);
        p[at + (size_t)j] = from_float<N>(probability * factor);
        if (kind == SCORES_BLUR) dp[at + (size_t)j] = seen ? d / blur_sum(edit, j, l.seen) : 0;
        else ds[at + (size_t)j] = from_float<N>(d);
    }
    __syncwarp();
    UNROLL for (int i = 0; i < HARD_MOST / WARP; i++)    // a dropped score passes nothing on
        if (dropped.key[i] >= 0) ds[at + (size_t)dropped.key[i]] = from_float<N>(0);
}

// ---- Blocks ----

// What attention_rows_forward and _backward work on: n packed rows; edit, of `kind`, is on the
// device, as are rows (n), which rows of the batch they are. keep.words NULL: no dropout.
// more: NULL, or makes w->map (rows,queries,ld), a gradient with respect to every head's
// probabilities, from a block's scores w->s.
typedef struct {
    const ScoreEdit *edit;
    int kind;
    KeptKeys keep;
    const int *rows;
    size_t n, T;
    void (*more)(Gpu *g, const void *self, const AttentionRows *w, const RowsBlock *b);
    const void *self;
} RowsShape;

static RowsBlock rows_block(const AttentionRows *w, size_t row0, size_t n, size_t i0, size_t T,
                            size_t queries) {
    const size_t Tp = rows_tokens(T), here = at_most(queries, Tp - i0);
    const RowsBlock b = {(int)row0, (int)n, (int)i0, (int)here, (int)(i0 + here), (int)Tp, (int)T,
                         (int)w->NH, (int)(n * w->NH * here)};
    return b;
}

static dim3 rows_grid(const RowsBlock *b) {
    return dim3((unsigned)strips((size_t)b->count, ROWS_WARPS));
}

static const void *head_numbers(const Gpu *g, const void *at, size_t i) {
    return (const char *)at + i * size_of_number(g);
}

// s = scale times queries a (heads,Tp,W) by keys b (heads,Tp,W).
static void rows_products(Gpu *g, const AttentionRows *w, float *s, const void *a, const void *keys,
                          float scale, const RowsBlock *b) {
    const size_t W = rows_width(w->C, w->NH), head = (size_t)b->ld * W;
    Result y = summed(s, (size_t)b->ld, 0);
    y.alpha = scale, y.count = (size_t)b->n * w->NH, y.stride = (size_t)b->queries * (size_t)b->ld;
    multiply(g, y, matrices(head_numbers(g, a, (size_t)b->i0 * W), W, 0, head),
             matrices(keys, W, 1, head), (size_t)b->queries, (size_t)b->keys, W);
}

// to (heads,Tp,W), the block's queries, = scale times p (count,ld) by keys (heads,Tp,W).
static void rows_times(Gpu *g, const AttentionRows *w, float *to, const void *p, const void *keys,
                       float scale, const RowsBlock *b) {
    const size_t W = rows_width(w->C, w->NH), head = (size_t)b->ld * W;
    Result y = summed(to + (size_t)b->i0 * W, W, 0);
    y.alpha = scale, y.count = (size_t)b->n * w->NH, y.stride = head;
    multiply(g, y, matrices(p, (size_t)b->ld, 0, (size_t)b->queries * (size_t)b->ld),
             matrices(keys, W, 0, head), (size_t)b->queries, W, (size_t)b->keys);
}

// to (heads,Tp,W), the keys' gradient, += scale times p^T (count,ld) by the block's queries a.
static void rows_keys_backward(Gpu *g, const AttentionRows *w, float *to, const void *p,
                               const void *a, float scale, const RowsBlock *b) {
    const size_t W = rows_width(w->C, w->NH), head = (size_t)b->ld * W;
    Result y = summed(to, W, 1);
    y.alpha = scale, y.count = (size_t)b->n * w->NH, y.stride = head;
    multiply(g, y, matrices(p, (size_t)b->ld, 1, (size_t)b->queries * (size_t)b->ld),
             matrices(head_numbers(g, a, (size_t)b->i0 * W), W, 0, head), (size_t)b->keys, W,
             (size_t)b->queries);
}

// The scores of a block before the drop of the largest; *other is the array that they are not in.
static float *rows_scores(Gpu *g, const AttentionRows *w, const RowsShape *a, float **other,
                          const RowsBlock *b) {
    rows_products(g, w, w->s, w->q, w->k, (float)(1 / sqrt((double)(w->C / w->NH))), b);
    *other = w->t;
    if (a->kind != SCORES_BLUR) return w->s;
    LAUNCH(rows_blur_kernel, blocks_for((size_t)b->count * (size_t)b->keys), BLOCK, 0, g->stream,
           w->t, (const float *)w->s, a->edit, *b);
    *other = w->s;
    return w->t;
}

// Workspace w as it is for rows of T tokens; a model may be run on shorter ones than it was opened
// for.
static AttentionRows rows_for(const AttentionRows *w, size_t T) {
    AttentionRows now = *w;
    CHECK(w->s && T <= w->T, "this model was opened without rows of scores");
    now.T = T, now.queries = at_most(w->queries, rows_tokens(T));
    return now;
}

template <class N>
static void attention_rows_forward_as(Gpu *g, void *y, float *lse, const AttentionRows *w,
                                      const void *qkv, const RowsShape *a) {
    for (size_t row0 = 0; row0 < a->n; row0 += w->rows) {
        const size_t n = at_most(a->n - row0, w->rows), C = w->C;
        const N *from = (const N *)qkv + row0 * a->T * 3 * C;
        float *other;
        heads_split(g, w, w->q, from, 3 * C, NULL, n);
        heads_split(g, w, w->k, from + C, 3 * C, NULL, n);
        heads_split(g, w, w->v, from + 2 * C, 3 * C, NULL, n);
        for (size_t i0 = 0; i0 < rows_tokens(a->T); i0 += w->queries) {
            const RowsBlock b = rows_block(w, row0, n, i0, a->T, w->queries);
            float *s = rows_scores(g, w, a, &other, &b);
            LAUNCH(rows_softmax_kernel<N>, rows_grid(&b), ROWS_WARPS * WARP, 0, g->stream,
                   (N *)w->p, lse, s, a->edit, a->kind, a->keep, a->rows, b);
            rows_times(g, w, w->dq, w->p, w->v, 1, &b);
        }
        heads_merge(g, w, (N *)y + row0 * a->T * C, C, w->dq, n);
    }
}

// y (n,T,C) and lse (n,NH,T) from qkv (n,T,3C), with the scores edited.
static void attention_rows_forward(Gpu *g, void *y, float *lse, const AttentionRows *works,
                                   const void *qkv, const RowsShape *a) {
    const AttentionRows w = rows_for(works, a->T);
    if (g->half) attention_rows_forward_as<bf16>(g, y, lse, &w, qkv, a);
    else attention_rows_forward_as<float>(g, y, lse, &w, qkv, a);
}

template <class N>
static void attention_rows_backward_as(Gpu *g, void *dqkv, const float *inner,
                                       const AttentionRows *w, const void *dy, const void *qkv,
                                       const float *lse, const RowsShape *a) {
    const size_t Tp = rows_tokens(a->T), W = rows_width(w->C, w->NH), C = w->C;
    const float scale = (float)(1 / sqrt((double)(C / w->NH)));
    for (size_t row0 = 0; row0 < a->n; row0 += w->rows) {
        const size_t n = at_most(a->n - row0, w->rows), bytes = n * w->NH * Tp * W * sizeof(float);
        const N *from = (const N *)qkv + row0 * a->T * 3 * C;
        N *to = (N *)dqkv + row0 * a->T * 3 * C;
        float *dp;
        heads_split(g, w, w->q, from, 3 * C, NULL, n);
        heads_split(g, w, w->k, from + C, 3 * C, NULL, n);
        heads_split(g, w, w->v, from + 2 * C, 3 * C, NULL, n);
        heads_split(g, w, w->dy, (const N *)dy + row0 * a->T * C, C, NULL, n);
        CUDA_CHECK(cudaMemsetAsync(w->dk, 0, bytes, g->stream));
        CUDA_CHECK(cudaMemsetAsync(w->dv, 0, bytes, g->stream));
        for (size_t i0 = 0; i0 < Tp; i0 += w->queries) {
            const RowsBlock b = rows_block(w, row0, n, i0, a->T, w->queries);
            float *s = rows_scores(g, w, a, &dp, &b);
            if (a->more) a->more(g, a->self, w, &b);
            rows_products(g, w, dp, w->dy, w->v, 1, &b);
            LAUNCH(rows_softmax_backward_kernel<N>, rows_grid(&b), ROWS_WARPS * WARP, 0, g->stream,
                   (N *)w->p, (N *)w->ds, s, dp, lse, inner, a->more ? w->map : NULL, a->edit,
                   a->kind, a->keep, a->rows, b);
            if (a->kind == SCORES_BLUR)
                LAUNCH(rows_blur_backward_kernel<N>,
                       blocks_for((size_t)b.count * (size_t)b.keys), BLOCK, 0, g->stream,
                       (N *)w->ds, (const float *)dp, a->edit, b);
            rows_times(g, w, w->dq, w->ds, w->k, scale, &b);
            rows_keys_backward(g, w, w->dk, w->ds, w->q, scale, &b);
            rows_keys_backward(g, w, w->dv, w->p, w->dy, 1, &b);
        }
        heads_merge(g, w, to, 3 * C, w->dq, n);
        heads_merge(g, w, to + C, 3 * C, w->dk, n);
        heads_merge(g, w, to + 2 * C, 3 * C, w->dv, n);
    }
}

// dqkv (n,T,3C) from dy (n,T,C); y and lse are attention_rows_forward's, or attention_forward's if
// nothing is edited. inner (n,NH,T) is workspace for <dy, y>.
static void attention_rows_backward(Gpu *g, void *dqkv, float *inner, const AttentionRows *works,
                                    const void *dy, const void *qkv, const void *y,
                                    const float *lse, const RowsShape *a) {
    const AttentionRows w = rows_for(works, a->T);
    const KeptKeys all = {NULL, NULL, 0};
    const AttentionShape whole = {a->n, a->T, w.C, w.NH, g->stream, all};
    if (a->n == 0) return;
    if (g->half) attention_inner<bf16>(inner, dy, y, &whole);
    else attention_inner<float>(inner, dy, y, &whole);
    if (g->half) attention_rows_backward_as<bf16>(g, dqkv, inner, &w, dy, qkv, lse, a);
    else attention_rows_backward_as<float>(g, dqkv, inner, &w, dy, qkv, lse, a);
}

#endif
