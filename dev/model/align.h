// align.h: the CPU's comparison of a student's attention maps with a teacher's, over the same rows.
//
// A map A (T,T) is the mean over the heads of a layer's probabilities, before dropout: so the
// numbers of heads may differ. Each query t >= 1 of a kept row has the distance
//
//     cosine    |A/|A| - B/|B||^2 = 2 (1 - cos(A, B))        KL    sum_j B_j log(B_j / A_j)
//
// of the student's row of scores A and the teacher's B. Cosine is the distance of LAAT
// (arXiv 2011.15035), here of attention instead of attributions; KL is that of MiniLM (Wang et al.
// 2020). The gradient with respect to A reaches every head divided by their number, and joins
// attention's backward pass as `more` (attention_rows.h).
#ifndef ALIGN_H
#define ALIGN_H

#include "attention_rows.h"
#include "pass.h"

// What attention has computed in a layer: qkv (n,T,3C) and lse (n,NH,T).
typedef struct { const real *qkv, *lse; size_t C, NH; } Maps;

// Sums over queries t >= 1: the distances, the cosines, and how many there are.
typedef struct { double distance, cosine, n; } AlignSums;

// map (keys,QUERIES) = the mean over heads of the probabilities of row `row` and the queries from
// i0 on; keys that a query does not see have 0.
static inline void align_map(real *map, RowsWorkspace *work, const Maps *m, size_t row, size_t i0,
                             size_t T) {
    const size_t HS = m->C / m->NH;
    const real share = (real)(1 / (double)m->NH);
    for (size_t h = 0; h < m->NH; h++) {
        const RowsBlock b = rows_block(row, h, i0, T, m->C, HS);
        const real *q = m->qkv + row * T * 3 * m->C + h * HS,
            *lse = m->lse + (row * m->NH + h) * T + i0;
        rows_load_queries(work, q + i0 * b.ld, &b);
        rows_products(work->s, work, q + m->C, work->qt, &b);
        memset(work->lse, 0, sizeof work->lse);
        memcpy(work->lse, lse, b.ni * sizeof(real));
        for (size_t i = 0; i < b.ni; i += LANES)
            for (size_t j = 0, seen = rows_seen(&b, i); j < seen; j++) {
                const Vector s = *(const Vector *)(work->s + j * QUERIES + i) -
                    *(const Vector *)(work->lse + i);
                const Vector p = exp_lanes(select_lanes(rows_sees(&b, i, j), s, (Vector){0} -
                                                        (real)INFINITY));
                Vector *to = (Vector *)(map + j * QUERIES + i);
                *to = h ? *to + share * p : share * p;
            }
    }
}

static inline ALWAYS_INLINE Vector align_floor(Vector x) {
    return select_lanes(x > (real)ALIGN_LEAST, x, vector_of((real)ALIGN_LEAST));
}

// The queries from lane i on of a block: adds their distances to *sums; with `more`, it becomes
// weight times the gradient with respect to each head's probabilities.
static inline void align_queries(AlignSums *sums, real *more, const real *a, const real *b, int kl,
                                 real weight, const RowsBlock *block, size_t i) {
    const size_t seen = rows_seen(block, i);
    Vector ab = {0}, aa = {0}, bb = {0}, divergence = {0};
    for (size_t j = 0; j < seen; j++) {
        const Vector x = *(const Vector *)(a + j * QUERIES + i), y = *(const Vector *)(b + j *
            QUERIES + i);
        ab += x * y, aa += x * x, bb += y * y;
        if (kl) divergence += y * (log_lanes(align_floor(y)) - log_lanes(align_floor(x)));
    }
    const Mask query = lane_numbers() + (int)i;
    const Mask counts = (query < (int)block->ni) & (query + (int)block->i0 > 0);   // t >= 1
    Vector size = {0}, cosine = {0};
    for (int l = 0; l < LANES; l++) {
        size[l] = sqrt_real(aa[l]) * sqrt_real(bb[l]);
        cosine[l] = counts[l] ? ab[l] / size[l] : 0;
        if (!counts[l]) continue;
        sums->distance += (double)(kl ? divergence[l] : 2 - 2 * cosine[l]);
        sums->cosine += (double)cosine[l], sums->n++;
    }
    for (size_t j = 0; more && j < seen; j++) {
        const Vector x = *(const Vector *)(a + j * QUERIES + i), y = *(const Vector *)(b + j *
            QUERIES + i);
        const Vector g = kl ? -y / align_floor(x) : -2 / size * (y - ab / aa * x);
        *(Vector *)(more + j * QUERIES + i) = select_lanes(counts & rows_sees(block, i, j),
                                                           weight * g, (Vector){0});
    }
}

// Compares the maps of n rows, which are `rows` of the batch; the teacher's has all of the batch.
// With `more` (n,blocks of queries,T,QUERIES), it becomes weight times the gradient with respect to
// each head's probabilities. The sums are in the order of rows and queries.
static inline AlignSums align_maps(real *more, const RowsWorkspaces *works, const Maps *student,
                                   const Maps *teacher, int kl, double weight, const int *rows,
                                   size_t n, size_t T) {
    const size_t blocks = (T + QUERIES - 1) / QUERIES;
    AlignSums *part = (AlignSums *)xcalloc(n * blocks, sizeof *part), sum = {0, 0, 0};
#pragma omp parallel num_threads(works->threads)
    {
        RowsWorkspace *work = rows_workspace_of(works, team_member());
#pragma omp for collapse(2) schedule(dynamic)
        for (size_t row = 0; row < n; row++)
            for (size_t k = 0; k < blocks; k++) {
                const RowsBlock b = rows_block(row, 0, k * QUERIES, T, student->C, 1);
                real *at = more ? more + (row * blocks + k) * T * QUERIES : NULL;
                align_map(work->blurred, work, student, row, b.i0, T);
                align_map(work->ds, work, teacher, rows ? (size_t)rows[row] : row, b.i0, T);
                for (size_t i = 0; i < b.ni; i += LANES)
                    align_queries(&part[row * blocks + k], at, work->blurred, work->ds, kl,
                                  (real)(weight / (double)student->NH), &b, i);
            }
    }
    for (size_t i = 0; i < n * blocks; i++)
        sum.distance += part[i].distance, sum.cosine += part[i].cosine, sum.n += part[i].n;
    free(part);
    return sum;
}

#endif
