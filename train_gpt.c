// train_gpt.c: GPT-2 with drop path on the CPU: every layer forward and backward, AdamW, and
// nothing else.
//
// Read it top to bottom. Sizes are letters: B rows, T tokens per row, C channels, NH heads of HS =
// C/NH channels, L layers, V tokens in the vocabulary. Every pointer has its shape beside it; a
// gradient is d + name.
//
// Drop path is in the block loop (block_forward, block_backward): a branch runs on the n rows that
// keep it, packed as (n,T,...), and adds its scaled output to those rows of the residual stream x
// (B,T,C). With n = 0 it does not run at all. The plan decides which rows run, and with which scale
// (dev/model/drop_path.h).
//
// The order of every sum depends only on the shapes, so results have the same bits for any number
// of threads.
//
// Elsewhere: matmuls (dev/model/matmul.h), the head and its losses (scoring.h), what a model
// allocates (cpu_model.h), and the companions of drop path, each in a file of its own.

#include "dev/check.h"
#include "dev/model/adapter.h"
#include "dev/model/attention_rows.h"
#include "dev/model/attention_tiles.h"
#include "dev/model/cpu_model.h"
#include "dev/model/engines.h"
#include "dev/model/entropy.h"
#include "dev/model/matmul.h"
#include "dev/model/peak.h"
#include "dev/model/scoring.h"
#include "dev/model/teacher_cpu.h"
#include "dev/run/comm.h"

// ---- Embedding: tokens (B,T) -> x (B,T,C) ----

// `at` (B): the positions of the rows' first tokens; NULL: 0.
static void embedding_forward(real *x, const int *tokens, const int *at, const real *wte,
                              const real *wpe, size_t B, size_t T, size_t C) {
#pragma omp parallel for
    for (size_t bt = 0; bt < B * T; bt++) {
        const size_t position = (at ? (size_t)at[bt / T] : 0) + bt % T;
        for (size_t c = 0; c < C; c++)
            x[bt * C + c] = wte[(size_t)tokens[bt] * C + c] + wpe[position * C + c];
    }
}

// dwte (V,C) and dwpe (T,C) +=. Threads divide the channels, not the tokens: a token may occur many
// times.
static void embedding_backward(real *dwte, real *dwpe, const int *tokens, const real *dx, size_t B,
                               size_t T, size_t C) {
    enum { WIDTH = 16 };
#pragma omp parallel for
    for (size_t c0 = 0; c0 < C; c0 += WIDTH)
        for (size_t bt = 0; bt < B * T; bt++)
            for (size_t c = c0; c < at_most(c0 + WIDTH, C); c++) {
                dwte[(size_t)tokens[bt] * C + c] += dx[bt * C + c];
                dwpe[bt % T * C + c] += dx[bt * C + c];
            }
}

// ---- Dropout: whether an element is kept is a function of its position (dev/model/noise.h) ----

// Multiplies x (n,T,C), for a branch's rows, by each element's factor. Backward is the same,
// applied to the gradient.
static void dropout(real *x, const NoisePlace *z, const int *rows, size_t nT, size_t T, size_t C) {
    enum { EACH = NOISE_CALLS * NOISE_EACH };
    if (!z->rate) return;
#pragma omp parallel for
    for (size_t t = 0; t < nT; t++) {
        const size_t place = token_place(rows, T, t);
        for (size_t c = 0; c < C; c += EACH) {
            const size_t n = at_most(C - c, EACH);
            real keep[EACH];
            noise_factors(keep, z, (uint32_t)(place / T), (uint32_t)(place % T), c, n);
            for (size_t i = 0; i < n; i++) x[t * C + c + i] *= keep[i];
        }
    }
}

// ---- The residual stream x (B,T,C), accessed by a branch that runs on n of its B rows ----
//
// Matmuls read and write its rows in place (Matrix.rows, Result.rows). These two functions serve
// branches whose end is packed: tied attention, which reaches the stream only after the MLP has
// read it, and dropout.

// x[rows] += scale * out (n,T,C).
static void residual_forward(real *x, const real *out, const BranchPlan *b, size_t T, size_t C) {
    const real scale = (real)b->scale;
#pragma omp parallel for
    for (size_t t = 0; t < (size_t)b->n * T; t++) {
        real *to = x + token_place(b->rows, T, t) * C;
        for (size_t c = 0; c < C; c++) to[c] += scale * out[t * C + c];
    }
}

// dout (n,T,C) = scale * dx[rows].
static void residual_backward(real *dout, const real *dx, const BranchPlan *b, size_t T, size_t C) {
    const real scale = (real)b->scale;
#pragma omp parallel for
    for (size_t t = 0; t < (size_t)b->n * T; t++) {
        const real *from = dx + token_place(b->rows, T, t) * C;
        for (size_t c = 0; c < C; c++) dout[t * C + c] = scale * from[c];
    }
}

// ---- LayerNorm (Ba, Kiros, Hinton 2016): reads x by row index, writes packed rows ----

// y (n,T,C) = xhat * w + b, xhat (n,T,C) = (z - mean) * rstd, with z = x[rows], plus `more` (n,T,C)
// if given. Saves xhat and rstd for the backward pass. Without `rows` all rows are read.
static void layernorm_forward(real *y, real *xhat, real *rstd, const real *x, const real *more,
                              const int *rows, const real *w, const real *b, size_t nT, size_t T,
                              size_t C) {
#pragma omp parallel for
    for (size_t t = 0; t < nT; t++) {
        const real *from = x + token_place(rows, T, t) * C;
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

// Recomputes y (n,T,C) from xhat: the backward pass needs it as the input of a matmul.
static void layernorm_recompute(real *y, const real *xhat, const real *w, const real *b, size_t nT,
                            size_t C) {
#pragma omp parallel for
    for (size_t t = 0; t < nT; t++)
        for (size_t c = 0; c < C; c++) y[t * C + c] = xhat[t * C + c] * w[c] + b[c];
}

// dx[rows] += dz = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * w (n,T,C); dw, db (C) +=,
// if given. `also` (n,T,C), if given, += dz: the gradient of `more`.
static void layernorm_backward(real *dx, real *also, real *dw, real *db, const real *dy,
                               const real *xhat, const real *rstd, const int *rows, const real *w,
                               size_t nT, size_t T, size_t C) {
    if (dw) column_sums(db, dw, dy, xhat, nT, C);
#pragma omp parallel for
    for (size_t t = 0; t < nT; t++) {
        const real *g = dy + t * C, *z = xhat + t * C;
        real *to = dx + token_place(rows, T, t) * C, mean = 0, along = 0;
#pragma omp simd reduction(+:mean, along)
        for (size_t c = 0; c < C; c++) {
            mean += g[c] * w[c];
            along += g[c] * w[c] * z[c];
        }
        mean /= (real)C;
        along /= (real)C;
        for (size_t c = 0; c < C; c++) to[c] += rstd[t] * (g[c] * w[c] - mean - z[c] * along);
        if (!also) continue;
        for (size_t c = 0; c < C; c++)
            also[t * C + c] += rstd[t] * (g[c] * w[c] - mean - z[c] * along);
    }
}

// ---- Attention: qkv (n,T,3C) -> y (n,T,C), causal; saves the log-sum-exp (n,NH,T) ----
//
// Tiles of queries against tiles of keys with a running softmax (Milakov and Gimelshein 2018; Dao
// et al. 2022): there is no (T,T) matrix.
//
// Scores are stored transposed, as (keys, queries); dev/model/attention_tiles.h has the matmuls,
// and explains why.

static const real ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};    // >= STRIP_ROWS

// s (nj,lanes) = k (nj,HS) qt (HS,lanes), each from first_lane on.
static void attention_scores(real *s, const real *k, const real *qt, size_t i0, size_t j0,
                             size_t nj, size_t lanes, size_t HS, size_t W) {
    for (size_t j = 0; j < nj; j += STRIP_ROWS) {
        const size_t lane = first_lane(i0, j0 + j);
        strip_by_rows(s + j * QUERIES + lane, QUERIES, NULL, k + j * W, W, qt + lane, QUERIES,
                      STRIP_ROWS, lanes - lane, HS);
    }
}

// Adds one tile of scores to the running softmax: s becomes exp(s - top), and sum is rescaled to
// the new top, as the accumulated y must be: times shrink. A query's first tile has a key that it
// sees, so top is finite after it. With `keep`, dropout applies to what is accumulated into y, but
// not to sum.
static inline ALWAYS_INLINE void softmax_block(AttentionWorkspace *work, const real *keep,
                                               size_t i0, size_t j0, size_t nj, size_t lanes) {
    for (size_t i = 0; i < lanes; i += LANES) {
        const size_t seen = keys_seen(i0, i, j0, nj);
        Vector *top = (Vector *)(work->top + i), *sum = (Vector *)(work->sum + i), high = *top,
            total = {0};
        for (size_t j = 0; j < seen; j++) {
            Vector *s = (Vector *)(work->s + j * QUERIES + i);
            if (j0 + j > i0 + i) *s = causal(*s, i0 + i, j0 + j);
            high = select_lanes(*s > high, *s, high);
        }
        const Vector shrink = exp_lanes(*top - high);
        for (size_t j = 0; j < seen; j++) {
            Vector *s = (Vector *)(work->s + j * QUERIES + i);
            total += *s = exp_lanes(*s - high);
            if (keep) *s *= *(const Vector *)(keep + j * QUERIES + i);
        }
        *(Vector *)(work->shrink + i) = shrink;
        *sum = *sum * shrink + total;
        *top = high;
    }
}

// A head and a row, by their index in the model and the batch: its noise is a function of them.
typedef struct { const NoisePlace *noise; size_t row, head; } HeadPlace;

// One tile of queries of one head: y (T,HS), rows C apart, and lse (T), from q, k and v (T,HS),
// rows 3C apart.
static void attention_forward_block(real *y, real *lse, const real *q, AttentionWorkspace *work,
                                    HeadPlace at, size_t i0, size_t T, size_t C, size_t HS) {
    const size_t ld = 3 * C, W = round_up(HS, LANES), ni = at_most(T - i0, QUERIES),
        lanes = round_up(ni, PAD);
    const real *k = q + C, *v = k + C;
    load_rows(work->q, q + i0 * ld, ld, (real)(1 / sqrt((double)HS)), ni, HS, W);
    load_transposed(work->qt, work->q, ni, W);
    for (size_t i = 0; i < QUERIES; i++) work->top[i] = -INFINITY, work->sum[i] = 0;
    for (size_t j0 = 0; j0 < i0 + ni; j0 += KEYS) {
        const size_t nj = at_most(T - j0, KEYS);
        load_rows(work->k, k + j0 * ld, ld, 1, nj, HS, W);
        load_rows(work->v, v + j0 * ld, ld, 1, nj, HS, W);
        attention_scores(work->s, work->k, work->qt, i0, j0, nj, lanes, HS, W);
        if (at.noise->rate) {
            attention_noise(work->keep, at.noise, at.row, at.head, i0, j0, nj, lanes);
            softmax_block(work, work->keep, i0, j0, nj, lanes);
        } else softmax_block(work, NULL, i0, j0, nj, lanes);
        for (size_t i = blind(i0, j0); i < ni; i += STRIP_ROWS)
            strip_by_columns(work->out + i * W, W, j0 ? work->shrink + i : NULL, work->s + i,
                             QUERIES, work->v, W, STRIP_ROWS, W,
                             at_most(i0 + i + STRIP_ROWS - j0, nj));
    }
    for (size_t i = 0; i < ni; i++) {
        const real share = 1 / work->sum[i];
#pragma omp simd
        for (size_t d = 0; d < HS; d++) y[(i0 + i) * C + d] = work->out[i * W + d] * share;
        lse[i0 + i] = work->top[i] + log_real(work->sum[i]);
    }
}

// n rows of T tokens; `rows`: which rows of the batch they are, NULL: all, in order.
static void attention_forward(real *y, real *lse, const AttentionWorkspaces *all, const real *qkv,
                              const NoisePlace *noise, const int *rows, size_t n, size_t T,
                              size_t C, size_t NH) {
    const size_t HS = C / NH;
#pragma omp parallel num_threads(all->threads)
    {
        AttentionWorkspace *work = (AttentionWorkspace *)all->at + team_member();
#pragma omp for collapse(3) schedule(dynamic)
        for (size_t row = 0; row < n; row++)
            for (size_t h = 0; h < NH; h++)
                for (size_t i0 = 0; i0 < T; i0 += QUERIES) {
                    const HeadPlace at = {noise, rows ? (size_t)rows[row] : row, h};
                    attention_forward_block(y + row * T * C + h * HS, lse + (row * NH + h) * T,
                                            qkv + row * T * 3 * C + h * HS, work, at, i0, T, C, HS);
                }
    }
}

// Prepares one tile of queries: q and dy in both layouts, and inner = <dy, y>.
static void attention_backward_queries(AttentionWorkspace *work, const real *q, const real *dy,
                                       const real *y, size_t ni, size_t C, size_t HS, size_t W) {
    load_rows(work->q, q, 3 * C, (real)(1 / sqrt((double)HS)), ni, HS, W);
    load_rows(work->dy, dy, C, 1, ni, HS, W);
    load_transposed(work->qt, work->q, ni, W);
    load_transposed(work->dyt, work->dy, ni, W);
    memset(work->inner, 0, sizeof work->inner);
    for (size_t i = 0; i < ni; i++) {
        real inner = 0;
#pragma omp simd reduction(+:inner)
        for (size_t d = 0; d < HS; d++) inner += dy[i * C + d] * y[i * C + d];
        work->inner[i] = inner;
    }
}

// s and dP (nj,lanes), which is in ds, become P and ds; both 0 if the key is later than the query.
// With `keep`, s becomes P after dropout, and dP refers to that.
static inline ALWAYS_INLINE void attention_backward_scores(AttentionWorkspace *work,
                                                           const real *keep, size_t i0, size_t j0,
                                                           size_t nj, size_t lanes) {
    for (size_t i = 0; i < lanes; i += LANES) {
        const Vector lse = *(const Vector *)(work->top + i),
            inner = *(const Vector *)(work->inner + i);
        for (size_t j = 0, seen = keys_seen(i0, i, j0, nj); j < seen; j++) {
            Vector *s = (Vector *)(work->s + j * QUERIES + i),
                *ds = (Vector *)(work->ds + j * QUERIES + i);
            const Vector p = exp_lanes(causal(*s, i0 + i, j0 + j) - lse);
            if (keep) {
                const Vector factor = *(const Vector *)(keep + j * QUERIES + i);
                *s = p * factor;
                *ds = p * (*ds * factor - inner);
                continue;
            }
            *s = p;
            *ds = p * (*ds - inner);
        }
    }
}

// With P = exp(s - lse): dV = P^T dy, dP = dy V^T, ds = P * (dP - <dy, y>), dQ = ds K * scale, dK =
// ds^T Q * scale (Dao et al. 2022, algorithm 4). One thread handles one head of one row, so nothing
// is accumulated from two sides. With dropout, P~ replaces P in dV, and dP passes through it; <dy,
// y> is still the sum of P dP, since y is computed from P~.
static void attention_backward_head(real *dq, const real *dy, const real *q, const real *y,
                                    const real *lse, AttentionWorkspace *work, HeadPlace at,
                                    size_t T, size_t C, size_t HS) {
    const size_t ld = 3 * C, W = round_up(HS, LANES);
    const real scale = (real)(1 / sqrt((double)HS)), *k = q + C, *v = k + C;
    real *dk = dq + C, *dv = dk + C, *s = work->s, *ds = work->ds;
    for (size_t i0 = 0; i0 < T; i0 += QUERIES) {
        const size_t ni = at_most(T - i0, QUERIES), lanes = round_up(ni, PAD);
        attention_backward_queries(work, q + i0 * ld, dy + i0 * C, y + i0 * C, ni, C, HS, W);
        memset(work->top, 0, sizeof work->top);
        memcpy(work->top, lse + i0, ni * sizeof(real));
        for (size_t j0 = 0; j0 < i0 + ni; j0 += KEYS) {
            const size_t nj = at_most(T - j0, KEYS);
            // the first queries that see these keys set dK and dV
            const real *keys = j0 >= i0 ? NULL : ones;
            load_rows(work->k, k + j0 * ld, ld, 1, nj, HS, W);
            load_rows(work->v, v + j0 * ld, ld, 1, nj, HS, W);
            attention_scores(s, work->k, work->qt, i0, j0, nj, lanes, HS, W);
            attention_scores(ds, work->v, work->dyt, i0, j0, nj, lanes, HS, W);
            if (at.noise->rate) {
                attention_noise(work->keep, at.noise, at.row, at.head, i0, j0, nj, lanes);
                attention_backward_scores(work, work->keep, i0, j0, nj, lanes);
            } else attention_backward_scores(work, NULL, i0, j0, nj, lanes);
            for (size_t j = 0; j < nj; j += STRIP_ROWS) {
                const size_t i = blind(i0, j0 + j), rows = at_most(nj - j, STRIP_ROWS);
                const size_t from = j * QUERIES + i, to = (j0 + j) * ld;
                strip_by_rows(dv + to, ld, keys, s + from, QUERIES, work->dy + i * W, W, rows, HS,
                              ni - i);
                strip_by_rows(dk + to, ld, keys, ds + from, QUERIES, work->q + i * W, W, rows, HS,
                              ni - i);
            }
            for (size_t i = blind(i0, j0); i < ni; i += STRIP_ROWS)
                strip_by_columns(work->out + i * W, W, j0 ? ones : NULL, ds + i, QUERIES, work->k,
                                 W, STRIP_ROWS, W, at_most(i0 + i + STRIP_ROWS - j0, nj));
        }
        for (size_t i = 0; i < ni; i++)
            for (size_t d = 0; d < HS; d++) dq[(i0 + i) * ld + d] = scale * work->out[i * W + d];
    }
}

// dqkv (n,T,3C) from dy (n,T,C); y and lse are attention_forward's.
static void attention_backward(real *dqkv, const AttentionWorkspaces *all, const real *dy,
                               const real *qkv, const real *y, const real *lse,
                               const NoisePlace *noise, const int *rows, size_t n, size_t T,
                               size_t C, size_t NH) {
    const size_t HS = C / NH;
#pragma omp parallel num_threads(all->threads)
    {
        AttentionWorkspace *work = (AttentionWorkspace *)all->at + team_member();
#pragma omp for collapse(2) schedule(dynamic)
        for (size_t row = 0; row < n; row++)
            for (size_t h = 0; h < NH; h++) {
                const size_t from = row * T * C + h * HS, from3 = row * T * 3 * C + h * HS;
                const HeadPlace at = {noise, rows ? (size_t)rows[row] : row, h};
                attention_backward_head(dqkv + from3, dy + from, qkv + from3, y + from,
                                        lse + (row * NH + h) * T, work, at, T, C, HS);
            }
    }
}

// ---- The two branches, on the rows that keep them ----

// The branch's rows of the residual stream; a branch that all rows run needs no index.
static const int *rows_of(const Model *m, const BranchPlan *b) {
    return b->n == m->last_B ? NULL : b->rows;
}

// Whether a branch's end is packed, in `out`, before it joins the stream, because something stands
// between. Otherwise it joins as the branch's last matmul is written, and in backward that matmul
// reads the stream's gradient in place.
static int end_is_packed(const Pass *pass, int branch) {
    return (branch == ATTN && pass->plan->tied) || noise_rate(pass->noise, NOISE_ATTN_OUT + branch);
}

// The end of a branch: out (n,T,C) = the matmul + bias, or x[rows] += scale * that.
static Result branch_end(const Model *m, const Pass *pass, int l, int branch, const real *bias) {
    const BranchPlan *b = &pass->plan->branch[BRANCHES * l + branch];
    const size_t C = (size_t)m->config.C;
    if (end_is_packed(pass, branch)) return fresh(m->out, C, bias);
    return (Result){.at = m->x, .ld = C, .rows = rows_of(m, b), .T = (size_t)m->last_T, .add = 1,
                    .scale = (real)b->scale, .bias = bias};
}

// Its gradient: dout (n,T,C), or dx[rows], whose scale the matmuls then apply; *scale is 1 or that
// scale.
static Matrix branch_end_gradient(const Model *m, const Pass *pass, int l, int branch, real *dout,
                                  real *scale) {
    const BranchPlan *b = &pass->plan->branch[BRANCHES * l + branch];
    const size_t C = (size_t)m->config.C;
    *scale = end_is_packed(pass, branch) ? 1 : (real)b->scale;
    if (end_is_packed(pass, branch)) return matrix(dout, C);
    return (Matrix){.at = m->dx, .ld = C, .rows = rows_of(m, b), .T = (size_t)m->last_T};
}

static size_t tokens_of(const Model *m, const BranchPlan *b) {
    return (size_t)b->n * (size_t)m->last_T;
}

// The adapter of the matmul with weight `param` in layer l.
static Adapter adapter_at(const Model *m, int l, int param) {
    const int A = gpt_adapter_of(&m->config, param);
    if (A < 0) return (Adapter){0};
    return (Adapter){tensor_at(m, SLOT_PARAM, A, l), tensor_at(m, SLOT_PARAM, A + 1, l),
                     tensor_at(m, SLOT_GRAD, A, l), tensor_at(m, SLOT_GRAD, A + 1, l),
                     m->lora_u, m->lora_v, (size_t)gpt_param_rows(&m->config, param),
                     (size_t)gpt_param_cols(&m->config, param), (size_t)m->config.lora,
                     (real)m->args.lora_scale};
}

// x (nT,C), with dropout for that matmul's adapter: x itself without dropout, otherwise in a
// buffer.
static const real *adapter_dropout(Model *m, const Pass *pass, int l, int param, real *to,
                                   const real *x, size_t nT) {
    const size_t C = (size_t)gpt_param_rows(&m->config, param);
    const NoisePlace noise = noise_place(pass->noise, NOISE_LORA + gpt_matmul_of(param), l);
    if (!noise.rate) return x;
    CHECK(m->lora_x, "this model was opened without dropout of adapters");
    if (to != x) memcpy(to, x, nT * C * sizeof(real));
    dropout(to, &noise, pass->plan->branch[BRANCHES * l + gpt_param[param].branch].rows, nT,
            (size_t)m->last_T, C);
    return to;
}

// y (nT,OC) = x (nT,C) w (C,OC) with y's epilogue (bias, GELU, scale, accumulate); w is parameter
// `param` of layer l, and may have an adapter. Decoding few tokens uses its packed copy.
static void linear_forward(Model *m, const Pass *pass, int l, int param, Result y, const real *x,
                           size_t nT) {
    const size_t C = (size_t)gpt_param_rows(&m->config, param),
        OC = (size_t)gpt_param_cols(&m->config, param);
    const PackWorkspace work = {m->few, NULL, m->pack.bf16, m->pack.tiled};
    const Adapter a = adapter_at(m, l, param);
    if (a.A)
        y = adapter_forward(&a, y, &m->pack, adapter_dropout(m, pass, l, param, m->lora_x, x, nT),
                            nT);
    if (m->at && nT <= FEW_ROWS)
        multiply_few(y, &work, matrix(x, C), packed_at(&m->packed, param, l), nT, OC, C);
    else matmul_forward(y, &m->pack, x, tensor_at(m, SLOT_PARAM, param, l), nT, C, OC);
}

// The same layer backward, from dy (nT,OC) and its input x (nT,C): dx (nT,C) = dy w^T with dx's
// epilogue, and the gradients of w, of its bias, which is the next parameter in the table, and of
// the adapter. Overwrites dw, or adds to it with `add`.
static void linear_backward(Model *m, const Pass *pass, int l, int param, Result dx, Matrix dy,
                            const real *x, int add, size_t nT) {
    const size_t C = (size_t)gpt_param_rows(&m->config, param),
        OC = (size_t)gpt_param_cols(&m->config, param);
    const Adapter a = adapter_at(m, l, param);
    if (a.A) {
        dx = adapter_backward_input(&a, dx, &m->pack, dy, nT);
        adapter_dropout(m, pass, l, param, dx.at, dx.at, nT);
    }
    matmul_backward(dx, tensor_at(m, SLOT_GRAD, param, l), add,
                    tensor_at(m, SLOT_GRAD, param + 1, l), &m->pack, dy, x,
                    tensor_at(m, SLOT_PARAM, param, l), nT, C, OC);
    if (a.A)
        adapter_backward(&a, add, dx.scale, &m->pack, dy,
                         adapter_dropout(m, pass, l, param, m->lora_x, x, nT), nT);
}

// The mean entropy of the probabilities with which k was computed (dev/model/entropy.h).
static double attention_entropy(Model *m, const AttentionSaved *k, size_t n) {
    const size_t C = (size_t)m->config.C, NH = (size_t)m->config.NH, T = (size_t)m->last_T;
    const NoisePlace none = {0};
    real *qkk = m->gelu, *mean = m->out;                 // (n,T,3C) (n,T,C)
    entropy_keys_as_values(qkk, k->qkv, n * T, C);
    attention_forward(mean, k->lse, &m->work, qkk, &none, NULL, n, T, C, NH);
    return entropy_mean(qkk, mean, k->lse, n, T, C, NH);
}

// y = attention of qkv; in decode, attention that continues sequences, or the ordinary one if all
// of them begin.
static void attention_inside(Model *m, const Pass *pass, int l, const AttentionSaved *k,
                             size_t nT) {
    const BranchPlan *b = &pass->plan->branch[BRANCHES * l + ATTN];
    const size_t C = (size_t)m->config.C, NH = (size_t)m->config.NH, T = (size_t)m->last_T;
    const NoisePlace noise = noise_place(pass->noise, NOISE_ATTN, l);
    const ScoreEdit edit = noise_scores(pass->noise, l);
    int begins = T > 1;
    for (int i = 0; m->at && i < b->n; i++) begins &= m->at[b->rows[i]] == 0;
    if (edit.kind)
        attention_rows_forward(k->y, k->lse, &m->score_rows, k->qkv, &edit, &noise, b->rows, nT / T,
                               T, C, NH);
    else if (!m->at || begins)
        attention_forward(k->y, k->lse, &m->work, k->qkv, &noise, b->rows, nT / T, T, C, NH);
    if (!m->at) return;
    HeadCache layer = m->cache;
    layer.at += (size_t)l * (size_t)m->args.cache * NH * head_cache(m->cache.T, C / NH);
    attention_cached(begins ? NULL : k->y, k->qkv, layer, b, m->seq, m->at, T, C, NH);
}

// To the end of the branch: attn(LN(x[rows])).
static void attention_branch_forward(Model *m, const Pass *pass, int l) {
    const BranchPlan *b = &pass->plan->branch[BRANCHES * l + ATTN];
    const size_t C = (size_t)m->config.C, NH = (size_t)m->config.NH, T = (size_t)m->last_T,
        nT = tokens_of(m, b);
    const Params w = params_at(m, SLOT_PARAM, l);
    AttentionSaved *k = &m->attention[l];
    k->xhat = save(m, nT * C), k->rstd = save(m, nT);
    k->qkv = save(m, nT * 3 * C), k->lse = save(m, nT * NH), k->y = save(m, nT * C);
    layernorm_forward(m->ln, k->xhat, k->rstd, m->x, NULL, rows_of(m, b), w.ln1w, w.ln1b, nT, T, C);
    linear_forward(m, pass, l, P_qkvw, fresh(k->qkv, 3 * C, w.qkvb), m->ln, nT);
    attention_inside(m, pass, l, k, nT);
    maps_save(m, l, k, nT);
    if (pass->entropy) pass->entropy[l] = attention_entropy(m, k, (size_t)b->n);
    if (pass->weight == 0) align_layer(m, pass, l);      // a training pass does so in backward
    linear_forward(m, pass, l, P_attprojw, branch_end(m, pass, l, ATTN, w.attprojb), k->y, nT);
}

// dx[rows] += the gradient through the branch, from that of its end.
static void attention_branch_backward(Model *m, const Pass *pass, int l) {
    const BranchPlan *b = &pass->plan->branch[BRANCHES * l + ATTN];
    const size_t C = (size_t)m->config.C, NH = (size_t)m->config.NH, T = (size_t)m->last_T,
        nT = tokens_of(m, b);
    const Params w = params_at(m, SLOT_PARAM, l), dw = params_at(m, SLOT_GRAD, l);
    const AttentionSaved *k = &m->attention[l];
    const NoisePlace noise = noise_place(pass->noise, NOISE_ATTN, l);
    const ScoreEdit edit = noise_scores(pass->noise, l);
    const int add = gradient_add(m, l, ATTN, 1);
    Result dy = {.at = m->dy, .ld = C};
    const Matrix dout = branch_end_gradient(m, pass, l, ATTN, m->dout, &dy.scale);
    real *dqkv = m->dwide, *dln = m->dy;
    linear_backward(m, pass, l, P_attprojw, dy, dout, k->y, add, nT);
    const real *more = align_layer(m, pass, l);
    if (edit.kind || more)
        attention_rows_backward(dqkv, &m->score_rows, m->dy, k->qkv, k->y, k->lse, &edit, &noise,
                                more, b->rows, nT / T, T, C, NH);
    else
        attention_backward(dqkv, &m->work, m->dy, k->qkv, k->y, k->lse, &noise, b->rows, nT / T, T,
                           C, NH);
    layernorm_recompute(m->ln, k->xhat, w.ln1w, w.ln1b, nT, C);
    linear_backward(m, pass, l, P_qkvw, fresh(dln, C, NULL), matrix(dqkv, 3 * C), m->ln, add, nT);
    layernorm_backward(m->dx, NULL, dw.ln1w, dw.ln1b, dln, k->xhat, k->rstd, rows_of(m, b), w.ln1w,
                       nT, T, C);
}

// To the end of the branch: mlp(LN(x[rows])); tied: of x[rows] + out, which joins the stream as
// soon as it has been read.
static void mlp_branch_forward(Model *m, const Pass *pass, int l) {
    const BranchPlan *b = &pass->plan->branch[BRANCHES * l + MLP];
    const size_t C = (size_t)m->config.C, T = (size_t)m->last_T, nT = tokens_of(m, b);
    const Params w = params_at(m, SLOT_PARAM, l);
    MlpSaved *k = &m->mlp[l];
    k->xhat = save(m, nT * C), k->rstd = save(m, nT), k->h = save(m, nT * 4 * C);
    Result h = fresh(k->h, 4 * C, w.fcb);
    h.gelu = m->gelu;
    const real *attn = pass->plan->tied ? m->out : NULL;
    layernorm_forward(m->ln, k->xhat, k->rstd, m->x, attn, rows_of(m, b), w.ln2w, w.ln2b, nT, T, C);
    if (attn) residual_forward(m->x, attn, b, T, C);
    linear_forward(m, pass, l, P_fcw, h, m->ln, nT);
    linear_forward(m, pass, l, P_fcprojw, branch_end(m, pass, l, MLP, w.fcprojb), m->gelu, nT);
}

// dx[rows] += the gradient through the branch, from that of its end in m->dy; tied: also m->dout
// (n,T,C) += it.
static void mlp_branch_backward(Model *m, const Pass *pass, int l) {
    const BranchPlan *b = &pass->plan->branch[BRANCHES * l + MLP];
    const size_t C = (size_t)m->config.C, T = (size_t)m->last_T, nT = tokens_of(m, b);
    const Params w = params_at(m, SLOT_PARAM, l), dw = params_at(m, SLOT_GRAD, l);
    const MlpSaved *k = &m->mlp[l];
    const int add = gradient_add(m, l, MLP, 1);
    Result dh = {.at = m->dwide, .ld = 4 * C, .h = k->h, .gelu = m->gelu};
    const Matrix dout = branch_end_gradient(m, pass, l, MLP, m->dy, &dh.scale);
    real *dln = m->dy, *dattn = pass->plan->tied ? m->dout : NULL;
    linear_backward(m, pass, l, P_fcprojw, dh, dout, m->gelu, add, nT);
    layernorm_recompute(m->ln, k->xhat, w.ln2w, w.ln2b, nT, C);
    linear_backward(m, pass, l, P_fcw, fresh(dln, C, NULL), matrix(dh.at, 4 * C), m->ln, add, nT);
    layernorm_backward(m->dx, dattn, dw.ln2w, dw.ln2b, dln, k->xhat, k->rstd, rows_of(m, b), w.ln2w,
                       nT, T, C);
}

// Passes the stream, or the features, to the watch that requested it.
static void look(const Pass *pass, int point, const real *x) {
    if (pass->watch && pass->watch->want[point]) pass->watch->see(pass->watch->self, point, x);
}

// ---- A block with drop path ----
//
//     x <- x + s_a attn(LN(x))
//     x <- x + s_m mlp(LN(x))                          tied: x <- x + s (a + mlp(LN(x + a))),
//                                                            a = attn(LN(x))
//
// With dropout D at the branches' ends: D(attn(..)), D(mlp(..)).

// A branch's packed end: applies what stands between and, unless the MLP reads it first, adds it to
// the stream.
static void end_forward(Model *m, const Pass *pass, int l, int branch) {
    const BranchPlan *b = &pass->plan->branch[BRANCHES * l + branch];
    const NoisePlace noise = noise_place(pass->noise, NOISE_ATTN_OUT + branch, l);
    if (!end_is_packed(pass, branch)) return;
    dropout(m->out, &noise, b->rows, tokens_of(m, b), (size_t)m->last_T, (size_t)m->config.C);
    if (branch == MLP || !pass->plan->tied)
        residual_forward(m->x, m->out, b, (size_t)m->last_T, (size_t)m->config.C);
}

// Its gradient dout (n,T,C), from the stream's; for tied attention it already holds that, plus what
// came through the MLP.
static void end_backward(Model *m, const Pass *pass, int l, int branch, real *dout) {
    const BranchPlan *b = &pass->plan->branch[BRANCHES * l + branch];
    const NoisePlace noise = noise_place(pass->noise, NOISE_ATTN_OUT + branch, l);
    if (!end_is_packed(pass, branch)) return;
    if (branch == MLP || !pass->plan->tied)
        residual_backward(dout, m->dx, b, (size_t)m->last_T, (size_t)m->config.C);
    dropout(dout, &noise, b->rows, tokens_of(m, b), (size_t)m->last_T, (size_t)m->config.C);
}

static void branch_forward(Model *m, const Pass *pass, int l, int branch) {
    if (!pass->plan->branch[BRANCHES * l + branch].n) return;
    if (branch == ATTN) attention_branch_forward(m, pass, l);
    else mlp_branch_forward(m, pass, l);
    end_forward(m, pass, l, branch);
}

static void branch_backward(Model *m, const Pass *pass, int l, int branch) {
    if (!pass->plan->branch[BRANCHES * l + branch].n) return;
    end_backward(m, pass, l, branch, branch == ATTN ? m->dout : m->dy);
    if (branch == ATTN) attention_branch_backward(m, pass, l);
    else mlp_branch_backward(m, pass, l);
}

static void block_forward(Model *m, const Pass *pass, int l) {
    branch_forward(m, pass, l, ATTN);
    look(pass, watch_after(l, ATTN), m->x);
    branch_forward(m, pass, l, MLP);
    look(pass, watch_after(l, MLP), m->x);
}

static void block_backward(Model *m, const Pass *pass, int l) {
    const BranchPlan *attn = &pass->plan->branch[BRANCHES * l + ATTN];
    if (pass->plan->tied)
        residual_backward(m->dout, m->dx, attn, (size_t)m->last_T, (size_t)m->config.C);
    branch_backward(m, pass, l, MLP);
    branch_backward(m, pass, l, ATTN);
}

// ---- Forward and backward of the whole model ----

// The share of the loss read after layer l, from lnf; in training also dy, its gradient times
// weight with respect to lnf.
static double model_loss(Model *m, const Batch *batch, const Pass *pass, int l) {
    const size_t BT = (size_t)batch->rows * (size_t)batch->T, C = (size_t)m->config.C;
    const Params w = params_at(m, SLOT_PARAM, 0);
    const double each = pass->weight / (double)batch_scored(batch),
        weight = pass_exit(pass, l) * pass->weight / (double)batch_scored(batch);
    const Soft soft = soft_targets(m, pass, l, weight);
    const Scoring y = {m->losses, m->uniform, m->distilled, m->apart, batch->targets,
                       (real)(soft.x ? weight * (1 - pass_distill(pass)) : weight),
                       (real)pass_smoothing(pass), soft, twin_tokens(m, pass, l, each)};
    const PartLosses losses = {{m->losses, m->uniform, soft.x ? m->distilled : NULL,
                                y.pairs.on ? m->apart : NULL}};
    real *dwte = pass->weight != 0 ? params_at(m, SLOT_GRAD, 0).wte : NULL;
    const int add = pass->weight != 0 ? gradient_add(m, 0, NO_BRANCH, 1) : 0;
    classifier(&y, m->dy, dwte, add, m->logits, &m->pack, m->lnf, w.wte, BT, C,
               (size_t)m->config.V);
    return pass_loss(m->part, batch, pass, l, &losses);
}

// An early exit, if there is one after layer l: the loss of the stream as it is there, through the
// same LayerNorm and head. Its gradient with respect to the stream waits until backward gets there;
// frozen layers do not need it.
static double exit_forward(Model *m, const Batch *batch, const Pass *pass, int l) {
    const size_t BT = (size_t)batch->rows * (size_t)batch->T, T = (size_t)batch->T,
        C = (size_t)m->config.C;
    const Params w = params_at(m, SLOT_PARAM, 0);
    if (!pass_exits(pass, l) || !batch->targets) return 0;
    layernorm_forward(m->lnf, m->lnf_xhat, m->lnf_rstd, m->x, NULL, NULL, w.lnfw, w.lnfb, BT, T, C);
    const double loss = model_loss(m, batch, pass, l);
    if (pass->weight == 0) return loss;
    const Params dw = params_at(m, SLOT_GRAD, 0);
    real *dx = m->exit[l] = l < m->args.frozen ? m->dx : save(m, BT * C);
    memset(dx, 0, BT * C * sizeof(real));
    layernorm_backward(dx, NULL, dw.lnfw, dw.lnfb, m->dy, m->lnf_xhat, m->lnf_rstd, NULL, w.lnfw,
                       BT, T, C);
    return loss;
}

// dx += its gradient.
static void exit_backward(Model *m, const Pass *pass, int l) {
    const size_t n = (size_t)m->last_B * (size_t)m->last_T * (size_t)m->config.C;
    const real *from = m->exit[l];
    if (!pass_exits(pass, l)) return;
#pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) m->dx[i] += from[i];
}

static double run_forward(Model *m, const Batch *batch, const Pass *pass) {
    const size_t B = (size_t)batch->rows, T = (size_t)batch->T, C = (size_t)m->config.C;
    const Params w = params_at(m, SLOT_PARAM, 0);
    m->last_B = batch->rows;
    m->last_T = batch->T;
    m->saved_end = m->saved;
    memset(m->part, 0, sizeof m->part);
    for (int l = 0; pass->entropy && l < m->config.L; l++) pass->entropy[l] = 0;
    double loss = 0;
    const NoisePlace noise = noise_place(pass->noise, NOISE_EMBD, 0);
    embedding_forward(m->x, batch->tokens, NULL, w.wte, w.wpe, B, T, C);
    for (size_t i = 0; pass->objective && pass->objective->shift && i < B * T * C; i++)
        m->x[i] += pass->objective->shift[i];
    dropout(m->x, &noise, NULL, B * T, T, C);
    look(pass, WATCH_EMBEDDINGS, m->x);
    for (int l = 0; l < m->config.L; l++) {
        // nothing is saved for what is not trained
        if (pass->weight == 0 || l <= m->args.frozen) m->saved_end = m->saved;
        block_forward(m, pass, l);
        loss += exit_forward(m, batch, pass, l);
    }
    layernorm_forward(m->lnf, m->lnf_xhat, m->lnf_rstd, m->x, NULL, NULL, w.lnfw, w.lnfb, B * T, T,
                      C);
    look(pass, watch_features(m->config.L), m->lnf);
    return batch->targets ? loss + model_loss(m, batch, pass, m->config.L - 1) : 0;
}

// The flagged gradients of all ranks, added in rank order, branch by branch.
static void reduce_gradients(Model *m, const unsigned char *reduce) {
    const int shared = BRANCHES * m->config.L;
    for (int i = shared; i >= BRANCHES * m->args.frozen; i--) {
        const Slice s = layout_span(&m->layout, &m->config, (size_t)i, 1);
        if (!reduce[i]) continue;
        // zeros, if only this rank has dropped it
        gradient_add(m, i == shared ? 0 : i / BRANCHES, i == shared ? NO_BRANCH : i % BRANCHES, 0);
        if (s.n)
            comm_sum_reals(m->args.comm, m->slot[SLOT_GRAD] + (s.at - m->layout.n_frozen), s.n);
    }
}

static void run_backward(Model *m, const Batch *batch, const Pass *pass) {
    const size_t B = (size_t)batch->rows, T = (size_t)batch->T, C = (size_t)m->config.C;
    const Params w = params_at(m, SLOT_PARAM, 0), dw = params_at(m, SLOT_GRAD, 0);
    memset(m->dx, 0, B * T * C * sizeof(real));
    layernorm_backward(m->dx, NULL, dw.lnfw, dw.lnfb, m->dy, m->lnf_xhat, m->lnf_rstd, NULL, w.lnfw,
                       B * T, T, C);
    for (int l = m->config.L - 1; l >= m->args.frozen; l--) {
        exit_backward(m, pass, l);
        block_backward(m, pass, l);
    }
    if (!m->args.frozen) {
        const NoisePlace noise = noise_place(pass->noise, NOISE_EMBD, 0);
        dropout(m->dx, &noise, NULL, B * T, T, C);
        if (pass->watch && pass->watch->see_gradient)
            pass->watch->see_gradient(pass->watch->self, m->dx);
        if (dw.wte) embedding_backward(dw.wte, dw.wpe, batch->tokens, m->dx, B, T, C);
    }
    if (pass->reduce) reduce_gradients(m, pass->reduce);
}

static double model_run(Model *m, const Batch *batch, const Pass *pass) {
    engine_check_run(&m->config, &m->args, batch, pass);
    const double loss = run_forward(m, batch, pass);
    if (pass->weight == 0) return loss;
    run_backward(m, batch, pass);
    return loss + pass_align_loss(pass, m->part);        // known only now
}

static void model_losses(Model *m, real *host) {
    memcpy(host, m->losses, (size_t)m->last_B * (size_t)m->last_T * sizeof(real));
}

static void model_parts(Model *m, double part[N_PARTS]) { memcpy(part, m->part, sizeof m->part); }

static void model_logits(Model *m, int row, int t, real *host) {
    const size_t C = (size_t)m->config.C, V = (size_t)m->config.V;
    CHECK(row >= 0 && row < m->last_B && t >= 0 && t < m->last_T,
          "no logits at row %d, position %d", row, t);
    const real *x = m->lnf + ((size_t)row * (size_t)m->last_T + (size_t)t) * C;
    multiply(fresh(host, V, NULL), &m->pack, matrix(x, C),
             transposed(params_at(m, SLOT_PARAM, 0).wte, C), 1, V, C, NULL);
}

// ---- Generation ----

// Caches keys and values of the stream as it is.
static void keys_forward(Model *m, const Pass *pass, int l) {
    const BranchPlan *b = &pass->plan->branch[BRANCHES * l + ATTN];
    const size_t C = (size_t)m->config.C, NH = (size_t)m->config.NH, T = (size_t)m->last_T,
        nT = tokens_of(m, b);
    const Params w = params_at(m, SLOT_PARAM, l);
    HeadCache layer = m->cache;
    layer.at += (size_t)l * (size_t)m->args.cache * NH * head_cache(m->cache.T, C / NH);
    if (!nT) return;
    real *xhat = save(m, nT * C), *rstd = save(m, nT), *qkv = save(m, nT * 3 * C);
    layernorm_forward(m->ln, xhat, rstd, m->x, NULL, rows_of(m, b), w.ln1w, w.ln1b, nT, T, C);
    linear_forward(m, pass, l, P_qkvw, fresh(qkv, 3 * C, w.qkvb), m->ln, nT);
    attention_cached(NULL, qkv, layer, b, m->seq, m->at, T, C, NH);
}

// Reads the streams of a call's positions from the cache or, with `stop`, writes them there: they
// have stopped before layer `stop`.
static void stream_move(Model *m, int stop) {
    const size_t C = (size_t)m->config.C, T = (size_t)m->last_T, most = (size_t)m->args.T;
    for (size_t i = 0; i < (size_t)m->last_B * T; i++) {
        const size_t at = (size_t)m->seq[i / T] * most + (size_t)m->at[i / T] + i % T;
        if (stop) m->stopped[at] = stop;
        if (!stop) memcpy(m->x + i * C, m->stream + at * C, C * sizeof(real));
        else if (stop < m->config.L) memcpy(m->stream + at * C, m->x + i * C, C * sizeof(real));
    }
}

// The logits of the stream as it is: after each row's last token, or after all.
static void decode_logits(Model *m, real *logits, int all) {
    const size_t B = (size_t)m->last_B, T = (size_t)m->last_T, C = (size_t)m->config.C,
        V = (size_t)m->config.V, n = all ? B * T : B;
    const Params w = params_at(m, SLOT_PARAM, 0);
    const PackWorkspace work = {m->few, NULL, m->pack.bf16, m->pack.tiled};
    layernorm_forward(m->lnf, m->lnf_xhat, m->lnf_rstd, m->x, NULL, NULL, w.lnfw, w.lnfb, B * T, T,
                      C);
    const Matrix x = all ? matrix(m->lnf, C) : matrix(m->lnf + (T - 1) * C, T * C);
    if (n <= FEW_ROWS)
        multiply_few(fresh(logits, V, NULL), &work, x, packed_at(&m->packed, P_wte, 0), n, V, C);
    else multiply(fresh(logits, V, NULL), &m->pack, x, transposed(w.wte, C), n, V, C, NULL);
}

static void model_decode(Model *m, const DecodeArgs *a, const DropPlan *plan) {
    const size_t B = (size_t)plan->batch, T = (size_t)a->n, C = (size_t)m->config.C;
    const int to = decode_to(a, m->config.L);
    const Params w = params_at(m, SLOT_PARAM, 0);
    const Pass pass = pass_of(plan, 0);
    engine_check_decode(&m->config, &m->args, a, plan, m->stopped);
    for (int p = 0; p < N_PARAMS && m->packed.stale; p++)
        for (int i = 0; (is_packed(p) || p == P_wte) && i < gpt_param_layers(&m->config, p); i++)
            packed_write(&m->packed, &m->config, &m->pack, p, i, tensor_at(m, SLOT_PARAM, p, i));
    m->packed.stale = 0;
    m->last_B = plan->batch, m->last_T = a->n;
    m->seq = a->seq, m->at = a->at;
    if (a->from) stream_move(m, 0);
    else embedding_forward(m->x, a->tokens, a->at, w.wte, w.wpe, B, T, C);
    for (int l = a->from; l < to; l++) {
        m->saved_end = m->saved;
        if (a->keys_only) keys_forward(m, &pass, l);
        else block_forward(m, &pass, l);
    }
    stream_move(m, to);
    m->seq = m->at = NULL;
    if (a->stream) memcpy(a->stream, m->x, B * T * C * sizeof(real));
    if (a->logits) decode_logits(m, a->logits, a->all);
}

// ---- AdamW (Loshchilov and Hutter 2019, algorithm 2), with the gradients clipped to a norm ----

static double gradient_norm(Model *m, const int64_t *step) {
#pragma omp parallel for schedule(dynamic, 8)
    for (int i = 0; i < m->n_chunks; i++) {
        const UpdateChunk *k = &m->chunk[i];
        const real *g = m->slot[SLOT_GRAD] + (k->at - m->layout.n_frozen);
        double sum = 0;
        if (step[k->branch] > 0 && !m->spent[k->branch]) {         // others have no gradient
#pragma omp simd reduction(+:sum)
            for (size_t j = 0; j < k->n; j++) sum += (double)g[j] * (double)g[j];
        }
        m->partial[i] = sum;
    }
    double sum = 0;
    for (int i = 0; i < m->n_chunks; i++) sum += m->partial[i];
    return sqrt(sum);
}

// One chunk: updates p, m, v from g. `step` counts from 1.
static void adamw(real *p, const real *g, real *m, real *v, size_t n, const UpdateArgs *a,
                  int64_t step, double clip, int decay) {
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
    }
}

static double model_update(Model *m, const UpdateArgs *a) {
    CHECK(m->slot[SLOT_GRAD], "this model was opened to evaluate");
    const double norm = gradient_norm(m, a->t);
    const double clip = update_clip(a->grad_clip, norm);
    const int taken = update_is_taken(a, norm);
    static const real zeros[UPDATE_CHUNK];
#pragma omp parallel for schedule(dynamic, 8)
    for (int i = 0; i < (taken ? m->n_chunks : 0); i++) {
        const UpdateChunk *k = &m->chunk[i];
        const size_t at = k->at - m->layout.n_frozen;
        const real *g = m->spent[k->branch] ? zeros : m->slot[SLOT_GRAD] + at;
        if (a->t[k->branch] > 0)
            adamw(m->slot[SLOT_PARAM] + k->at, g, m->slot[SLOT_M] + at, m->slot[SLOT_V] + at, k->n,
                  a, a->t[k->branch], clip, k->decay);
    }
    if (taken || a->discard) memset(m->spent, 1, (size_t)BRANCHES * (size_t)m->config.L + 1);
    m->packed.stale = 1;
    return norm;
}

// There is nothing to round again: bf16 is made as matmuls read the weights.
static void model_resumed(Model *m, const int64_t *t) { (void)m, (void)t; }

// ---- The engine ----

static real *param_at(Model *m, Slot slot, int param, int layer) {
    CHECK(m->slot[slot], "this model was opened to evaluate");
    CHECK(param >= 0 && param < N_PARAMS && layer >= 0 &&
          layer < gpt_param_layers(&m->config, param),
          "no parameter %d in layer %d", param, layer);
    CHECK(slot == SLOT_PARAM || gpt_param_trains(&m->config, param, layer, m->args.frozen),
          "parameter %d of layer %d is frozen", param, layer);
    if (slot == SLOT_GRAD) gradient_add(m, layer, gpt_param[param].branch, 0);
    return tensor_at(m, slot, param, layer);
}

static void model_read(Model *m, Slot slot, int param, int layer, real *host) {
    memcpy(host, param_at(m, slot, param, layer), gpt_param_size(&m->config, param) * sizeof(real));
}

static void model_write(Model *m, Slot slot, int param, int layer, const real *host) {
    m->packed.stale |= slot == SLOT_PARAM;
    memcpy(param_at(m, slot, param, layer), host, gpt_param_size(&m->config, param) * sizeof(real));
}

static double model_peak(Model *m, double seconds) { return machine_peak(m->pack.bf16, seconds); }

#ifndef CPU_ENGINE           // a fat build names each of its engines; dev/model/engines.c chooses
#define CPU_ENGINE cpu_engine
extern const Engine CPU_ENGINE;

// The only engine: a request for another one is refused, as in a fat build that lacks it.
const Engine *engine_cpu(void) {
    const char *wanted = getenv("DROPPATH_ENGINE");
    if (wanted && *wanted)
        die("DROPPATH_ENGINE=%s: this build has one engine\n  hint: make FAT=1 builds several",
            wanted);
    return &CPU_ENGINE;
}
#endif

const Engine CPU_ENGINE = {
    "CPU, " REAL_NAME ", " INSTRUCTIONS, DTYPE_FP32,
    CAN_ANY_BATCH,
    model_open, model_run, model_losses, model_parts, model_logits, model_decode,
    model_update, model_read, model_write, model_resumed, model_memory, model_peak, model_close,
    NULL,
};

#ifndef ENGINE_ONLY          // the Makefile links main.c with an engine instead
#include "dev/main.c"
#endif
