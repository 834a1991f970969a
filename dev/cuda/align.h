// align.h: the comparison on the GPU of a student's attention maps with a teacher's, over the same
// rows; dev/model/align.h has the definitions. A part of train_gpt.cu, beside attention_rows.h,
// whose blocks of scores it reads: neither a map of a whole row nor its gradient exists.
#ifndef CUDA_ALIGN_H
#define CUDA_ALIGN_H

// What attention has computed in a layer: qkv (n,T,3C) and lse (n,NH,T).
typedef struct { const void *qkv; const float *lse; } Maps;

// A comparison of packed rows of the student, which are `rows` (n) of the batch, with the
// teacher's, which has all of the batch. weight: of the gradient with respect to a head's
// probabilities, 0: only compares; sums (2,B,T): by packed row and query, the distance and the
// cosine; B: rows of that array.
typedef struct {
    Maps student, teacher;
    AttentionRows works;                                 // the teacher's, for rows of as many
                                                         // tokens
    const int *rows;
    int kl;
    float weight, *sums;
    size_t B;
} Alignment;

// map (rows,queries,ld) = the mean over heads of the probabilities of scores s, 0 for keys that a
// query does not see. A thread makes one element. rows: which rows lse (B,NH,T) has them at; NULL:
// the packed ones.
static __global__ void align_map_kernel(float *map, const float *s, const float *lse,
                                        const int *rows, RowsBlock b) {
    const size_t i = thread_index(), j = i % (size_t)b.keys, query = i / (size_t)b.keys;
    const int n = (int)(query / (size_t)b.queries), q = (int)(query % (size_t)b.queries),
        t = b.i0 + q;
    if (n >= b.n) return;
    const size_t row = rows ? (size_t)rows[b.row0 + n] : (size_t)(b.row0 + n);
    const float share = 1 / (float)b.NH;
    float sum = 0;
    for (int h = 0; h < b.NH && t < b.T && j <= (size_t)t; h++) {
        const size_t head = (size_t)(n * b.NH + h) * (size_t)b.queries + (size_t)q;
        sum += share * expf(s[head * (size_t)b.ld + j] -
                            lse[(row * (size_t)b.NH + (size_t)h) * (size_t)b.T + (size_t)t]);
    }
    map[query * (size_t)b.ld + j] = sum;
}

// A warp compares the row of a query t >= 1; with weight not 0, a (rows,queries,ld) becomes weight
// times the gradient with respect to the student's probabilities a, and 0 for the others.
static __global__ void align_kernel(float *a, const float *other, float *sums, int kl, float weight,
                                    size_t B, RowsBlock b) {
    const int query = (int)(thread_index() / WARP), lane = (int)threadIdx.x % WARP,
        n = query / b.queries, t = b.i0 + query % b.queries;
    if (n >= b.n) return;
    float *const x = a + (size_t)query * (size_t)b.ld;
    const float *const y = other + (size_t)query * (size_t)b.ld;
    const int seen = t >= 1 && t < b.T ? t + 1 : 0;
    constexpr float least = (float)ALIGN_LEAST;
    float ab = 0, aa = 0, bb = 0, divergence = 0;
    for (int j = lane; j < seen; j += WARP) {
        ab += x[j] * y[j], aa += x[j] * x[j], bb += y[j] * y[j];
        if (kl && y[j] > 0)
            divergence += y[j] * (logf(fmaxf(y[j], least)) - logf(fmaxf(x[j], least)));
    }
    ab = warp_sum(ab), aa = warp_sum(aa), bb = warp_sum(bb), divergence = warp_sum(divergence);
    const float size = sqrtf(aa) * sqrtf(bb), cosine = seen ? ab / size : 0;
    const size_t at = (size_t)(b.row0 + n) * (size_t)b.T + (size_t)t;
    if (lane == 0 && t < b.T) {
        sums[at] = kl ? divergence : seen ? 2 - 2 * cosine : 0;
        sums[B * (size_t)b.T + at] = cosine;
    }
    for (int j = lane; j < b.keys && weight != 0; j += WARP) {
        const float g = kl ? -y[j] / fmaxf(x[j], least) : -2 / size * (y[j] - ab / aa * x[j]);
        x[j] = j < seen ? weight * g : 0;
    }
}

static void align_map(const Gpu *g, float *map, const float *s, const float *lse, const int *rows,
                      const RowsBlock *b) {
    const size_t count = (size_t)b->n * (size_t)b->queries * (size_t)b->keys;
    LAUNCH(align_map_kernel, blocks_for(count), BLOCK, 0, g->stream, map, s, lse, rows, *b);
}

// Compares a block, whose scores of the student are w->s; RowsShape.more.
static void align_block(Gpu *g, const void *self, const AttentionRows *w, const RowsBlock *b) {
    const Alignment *a = (const Alignment *)self;
    const AttentionRows *o = &a->works;
    const size_t C = o->C, n = (size_t)b->n;
    const RowsBlock its = rows_block(o, (size_t)b->row0, n, (size_t)b->i0, (size_t)b->T,
                                     (size_t)b->queries);
    const int *rows = a->rows + b->row0;
    if (b->i0 == 0) {
        heads_split(g, o, o->q, a->teacher.qkv, 3 * C, rows, n);
        heads_split(g, o, o->k, head_numbers(g, a->teacher.qkv, C), 3 * C, rows, n);
    }
    align_map(g, w->map, w->s, a->student.lse, NULL, b);
    rows_products(g, o, o->s, o->q, o->k, (float)(1 / sqrt((double)(C / o->NH))), &its);
    align_map(g, w->map_t, o->s, a->teacher.lse, a->rows, &its);
    LAUNCH(align_kernel, dim3((unsigned)strips(n * (size_t)b->queries, ROWS_WARPS)),
           ROWS_WARPS * WARP, 0, g->stream, w->map, (const float *)w->map_t, a->sums, a->kl,
           a->weight, a->B, *b);
}

// The student's workspace, cut to blocks that the teacher's holds as well.
static AttentionRows align_works(const AttentionRows *w, const Alignment *a) {
    AttentionRows cut = *w;
    cut.rows = at_most(w->rows, a->works.rows), cut.queries = at_most(w->queries, a->works.queries);
    return cut;
}

// Compares n packed rows of T tokens, without a gradient.
static void align_maps(Gpu *g, const AttentionRows *works, const Alignment *a, size_t n, size_t T) {
    const AttentionRows cut = align_works(works, a), w = rows_for(&cut, T);
    const size_t C = w.C;
    for (size_t row0 = 0; row0 < n; row0 += w.rows) {
        const size_t here = at_most(n - row0, w.rows);
        const void *from = head_numbers(g, a->student.qkv, row0 * T * 3 * C);
        heads_split(g, &w, w.q, from, 3 * C, NULL, here);
        heads_split(g, &w, w.k, head_numbers(g, from, C), 3 * C, NULL, here);
        for (size_t i0 = 0; i0 < rows_tokens(T); i0 += w.queries) {
            const RowsBlock b = rows_block(&w, row0, here, i0, T, w.queries);
            rows_products(g, &w, w.s, w.q, w.k, (float)(1 / sqrt((double)(C / w.NH))), &b);
            align_block(g, a, &w, &b);
        }
    }
}

#endif
