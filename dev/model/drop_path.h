// drop_path.h: drop path (stochastic depth): which rows run which branch of which layer in a
// micro-batch.
//
//     x <- x + s * branch(LN(x))      for rows that keep the branch
//     x <- x                          for rows that drop it
//
// The rate is p(l, t) = p_max * D(l) * R(t): deeper layers are dropped more often (D), and the
// rates are ramped with the optimizer step t (R). A plan is a pure function of (seed, step,
// micro-batch, layer, branch, row): engines draw nothing, checkpoints store nothing, evaluation
// draws nothing.
//
// Sources: Huang et al. 2016, "Deep Networks with Stochastic Depth" (linear D, survival scaling);
// Fan et al. 2019, LayerDrop (uniform D, no scaling); Zhang and He 2020, progressive layer dropping
// (exp R); Elhoushi et al. 2024, LayerSkip (exp D); timm and DINOv2 (linear0 D, inverted scaling,
// systematic counts per batch); Liu et al. 2023, "Dropout Reduces Underfitting" (ramp-down).
#ifndef DROP_PATH_H
#define DROP_PATH_H

#include "gpt.h"
#include "rng.h"
#include "schedule.h"

// ---- The plan: all that an engine knows about drop path ----

typedef struct {
    int n;              // number of rows that run the branch; 0 skips it in forward and backward
    const int *rows;    // (n) their indices, ascending
    double scale;       // multiplies the branch's output before it is added to the residual stream
} BranchPlan;

typedef struct {
    int layers, batch;   // L, and the number of rows B of this micro-batch
    int tied;            // the block is scaled once, x + s*(a + mlp(LN(x + a))): attn and mlp have
                         // the same rows and scale
    BranchPlan *branch;  // (2L) branch[2*l + ATTN], branch[2*l + MLP]
    int *storage;        // (2L, B) holds the row indices
} DropPlan;

// ---- The policy, set by options ----

// Values in the order of their names in options.h.
enum { DEPTH_LINEAR, DEPTH_LINEAR0, DEPTH_UNIFORM, DEPTH_EXP, DEPTH_ALTERNATE };
enum { UNIT_BATCH, UNIT_ROW };
enum { BRANCHES_SEPARATE, BRANCHES_TIED, BRANCHES_ATTN, BRANCHES_MLP };
enum { SAMPLING_SYSTEMATIC, SAMPLING_BERNOULLI };
enum { SCALE_INVERTED, SCALE_NONE, SCALE_SURVIVAL, SCALE_INVERTED_EACH };
enum { PROTECT_NONE, PROTECT_FIRST, PROTECT_LAST, PROTECT_BOTH };
enum { DROP_LAYERS = 1024 };  // the most that --layers takes

typedef struct {
    uint64_t seed;
    int layers;
    int64_t steps;                               // of the whole run
    double p_max;                                // in [0, 1)
    int depth, shape, unit, branches, sampling, scale;
    int sync;                                    // batch unit: all ranks share the plan of a
                                                 // micro-step
    int64_t start, ramp_up, ramp_down, recover;  // in steps
    double ramp_from;
    int frozen;                                  // number of bottom layers that run but are not
                                                 // trained
    int protect;                                 // layers that are never dropped: PROTECT_*
    int listed;                                  // if not 0, D(l) is list[l - 1]
    double list[DROP_LAYERS];                    // rates as fractions of p_max, in [0, 1]
    // row unit: kappa of --drop-adapt, and of the rows of the micro-batch how many are easier than
    // each (NULL: unknown, all have the same rate)
    double adapt;
    const int *rank;
} DropPath;

// D(l) for layer l = 1..L, in [0, 1].
static inline double drop_path_depth(const DropPath *d, int l) {
    double L = d->layers;
    if (l == 1 && (d->protect & PROTECT_FIRST)) return 0;
    if (l == d->layers && (d->protect & PROTECT_LAST)) return 0;
    if (d->listed) return d->list[l - 1];
    if (d->layers == 1) return 1;
    switch (d->depth) {
        case DEPTH_LINEAR:  return l / L;
        case DEPTH_LINEAR0: return (l - 1) / (L - 1);
        case DEPTH_EXP:     return exp2((l - 1) / (L - 1)) - 1;
        case DEPTH_ALTERNATE: return l % 2 == 0;  // every other layer, never the first
        default:            return 1;
    }
}

// Whether one draw decides for both branches of a layer.
static inline int drop_path_one_mask(const DropPath *d) { return d->branches == BRANCHES_TIED; }

// Whether a layer is scaled once, as a block: DropPlan.tied. With inverted-each the branches share
// their mask, but each is scaled, as in the code of progressive layer dropping and in equation 6 of
// arXiv 2609.05275; the expected output is then not that of the full model.
static inline int drop_path_tied(const DropPath *d) {
    return d->branches == BRANCHES_TIED && d->scale != SCALE_INVERTED_EACH;
}

// R(t) for optimizer step t = 0, 1, ...
static inline double drop_path_ramp(const DropPath *d, int64_t t) {
    const Ramp r = {d->shape, d->steps, d->start, d->ramp_up, d->ramp_down, d->recover,
                    d->ramp_from};
    return ramp_at(&r, t);
}

// p(l, t) for branch b of layer l = 1..L, as a multiple of 2^-32: the exact value that is compared
// with the draw and that determines the scale, so that E[mask * scale] = 1 holds exactly.
static inline uint32_t drop_path_rate_bits(const DropPath *d, int l, int b, int64_t t) {
    if ((d->branches == BRANCHES_ATTN && b != ATTN) || (d->branches == BRANCHES_MLP && b != MLP))
        return 0;
    double p = d->p_max * drop_path_depth(d, l) * drop_path_ramp(d, t) * 4294967296.0;
    return p >= 4294967295.0 ? 4294967295u : (uint32_t)nearbyint(p);
}

static inline double drop_path_rate(const DropPath *d, int l, int b, int64_t t) {
    return drop_path_rate_bits(d, l, b, t) / 4294967296.0;
}

// The scale of a kept branch in training.
static inline double drop_path_scale(const DropPath *d, int l, int b, int64_t t) {
    const int inverted = d->scale == SCALE_INVERTED || d->scale == SCALE_INVERTED_EACH;
    return inverted ? 1 / (1 - drop_path_rate(d, l, b, t)) : 1;
}

// The scale of a branch in evaluation: (1-p) at the final rates with survival scaling, else 1.
static inline double drop_path_eval_scale(const DropPath *d, int l, int b) {
    return d->scale == SCALE_SURVIVAL ? 1 - drop_path_rate(d, l, b, d->steps - 1) : 1;
}

// The expected FLOPs of step t, as a fraction of a step that trains the full model, for rows of T
// tokens.
static inline double drop_path_expected_compute(const DropPath *d, const GptConfig *c, int T,
                                                int64_t t) {
    double kept = gpt_head_step_flops(c, T);
    for (int l = 1; l <= c->L; l++)
        for (int b = 0; b < BRANCHES; b++)
            kept += (1 - drop_path_rate(d, l, b, t)) *
                    gpt_branch_step_flops(c, b, T, l - 1, d->frozen);
    return kept / (3 * gpt_row_flops(c, T));
}

// The share of the branches' FLOPs that step t is expected to drop.
static inline double drop_path_expected_share(const DropPath *d, const GptConfig *c, int T,
                                              int64_t t) {
    double dropped = 0, all = 0;
    for (int l = 1; l <= c->L; l++)
        for (int b = 0; b < BRANCHES; b++) {
            dropped += drop_path_rate(d, l, b, t) * gpt_branch_flops(c, b, T);
            all += gpt_branch_flops(c, b, T);
        }
    return dropped / all;
}

// Whether a run drops a larger share, on average over its layers and steps, than has been reported
// to do no harm. NULL, or the name of the size; *usual receives the share. `falls`: whether its
// rates end at 0.
//
// 5% of a small model, 10% of a medium and 20% of a large one, which constant rates of up to 0.1,
// 0.2 and 0.4, linear in depth, drop of many layers, and a little more of few; at least 16% if the
// rates fall to 0, as those do that begin at 0.6, linear in depth. These rest on arXiv 2609.05275
// (falling rates: 5% at 271M to 906M parameters, 15% at 1.8B, 20% at 3.9B; one seed each), on its
// replication at 124M by yaroslavvb/gradient-dissent (constant and falling rates that drop 20% cost
// 0.13 and 0.22 nats in a short run; three seeds) and on dev/studies (165k parameters, equal FLOPs,
// 16 seeds: falling rates that drop 15% gain; rising and constant ones that drop 5% to 16% do not).
static inline const char *drop_path_excess(double share, int falls, size_t parameters, int layers,
                                           double *usual) {
    const char *size = parameters < 250e6 ? "small" : parameters < 600e6 ? "medium" : "large";
    const double rate = parameters < 250e6 ? 0.1 : parameters < 600e6 ? 0.2 : 0.4;
    *usual = rate * (layers + 1) / (2.0 * layers);
    if (falls) *usual = fmax(*usual, 0.16);
    return share > *usual + 1e-9 ? size : NULL;
}

// ---- Building plans ----

// Allocates plans of `layers` layers and at most `batch` rows. Free with drop_plan_free.
static inline DropPlan drop_plan_new(int layers, int batch) {
    DropPlan p = {layers, batch, 0, NULL, NULL};
    p.branch = (BranchPlan *)xcalloc((size_t)layers * BRANCHES, sizeof *p.branch);
    p.storage = (int *)xcalloc((size_t)layers * BRANCHES * (size_t)batch, sizeof *p.storage);
    return p;
}

static inline void drop_plan_free(DropPlan *p) {
    free(p->branch);
    free(p->storage);
    p->branch = NULL;
    p->storage = NULL;
}

// Sets the rows of branch i to those with kept[row] != 0. `batch`: number of rows, at most the
// plan's capacity.
static inline void drop_plan_keep(DropPlan *p, int i, const unsigned char *kept, int batch,
                                  double scale) {
    int *rows = p->storage + (size_t)i * (size_t)batch, n = 0;
    for (int row = 0; row < batch; row++)
        if (kept[row]) rows[n++] = row;
    p->branch[i].n = n;
    p->branch[i].rows = rows;
    p->branch[i].scale = scale;
}

// The plan in which all rows run every branch, with factors scale (2L); NULL: 1. A branch whose
// factor is 0 does not run: evaluation at reduced depth.
static inline void drop_plan_keep_all(DropPlan *p, const double *scale, int tied, int batch) {
    unsigned char *kept = (unsigned char *)xcalloc((size_t)batch, 1);
    p->batch = batch;
    p->tied = tied;
    for (int i = 0; i < p->layers * BRANCHES; i++) {
        const double factor = scale ? scale[i] : 1;
        memset(kept, factor != 0, (size_t)batch);
        drop_plan_keep(p, i, kept, batch, factor);
    }
    free(kept);
}

// For evaluation: everything runs; with d, each branch has its evaluation scale.
static inline void drop_plan_full(DropPlan *p, const DropPath *d, int batch) {
    double *scale = (double *)xcalloc((size_t)p->layers * BRANCHES, sizeof *scale);
    for (int i = 0; i < p->layers * BRANCHES; i++)
        scale[i] = d ? drop_path_eval_scale(d, i / BRANCHES + 1, i % BRANCHES) : 1;
    drop_plan_keep_all(p, scale, d && drop_path_tied(d), batch);
    free(scale);
}

// A random permutation of n units (Fisher and Yates), one per (step, place).
static inline void drop_path_order(int *order, int n, uint64_t seed, int64_t step, uint32_t place) {
    for (int i = 0; i < n; i++) order[i] = i;
    for (int i = n - 1; i > 0; i--) {
        uint32_t word = rng_words(seed, STREAM_DROP_ORDER, (uint64_t)step, place, (uint32_t)i).v[0];
        int j = (int)(((uint64_t)word * (uint32_t)(i + 1)) >> 32), t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
}

// Systematic sampling (Madow 1949) in fixed point, 2^32 = 1: with S_i the running sum of the
// probabilities in the given order, unit i is dropped iff an integer lies in (S_{i-1} - u, S_i -
// u]. So floor(S_n) or ceil(S_n) units are dropped, each with exactly its probability over u. Over
// u, u + 1/M, ..., u + (M-1)/M (rounded down, mod 1), each unit is dropped floor(M p) or ceil(M p)
// times.
static inline void drop_path_systematic(unsigned char *kept, const uint32_t *p, const int *order,
                                        int n, uint32_t u) {
    uint64_t sum = ((uint64_t)1 << 32) - u;
    for (int k = 0; k < n; k++) {
        uint64_t before = sum >> 32;
        sum += p[order[k]];
        kept[order[k]] = (sum >> 32) == before;
    }
}

// ---- Reductions over a warp or a block: all threads get the same bits, every time ----
static inline void drop_path_draw(unsigned char *kept, const uint32_t *p, int n, const DropPath *d,
                                  int64_t step, int micro, int micros, uint32_t place) {
    if (d->sampling == SAMPLING_BERNOULLI) {
        for (int i = 0; i < n; i++) {
            const uint32_t unit = (place << 20) + (uint32_t)i;
            kept[i] = rng_words(d->seed, STREAM_DROP, (uint64_t)step, (uint32_t)micro, unit).v[0] >=
                p[i];
        }
        return;
    }
    int *order = (int *)xcalloc((size_t)n, sizeof *order);
    drop_path_order(order, n, d->seed, step, place);
    uint32_t u0 = rng_words(d->seed, STREAM_DROP, (uint64_t)step, 0, place << 20).v[0];
    uint32_t shift = (uint32_t)(((uint64_t)micro << 32) / (uint64_t)micros);
    drop_path_systematic(kept, p, order, n, u0 + shift);
    free(order);
}

// Batch unit: one decision per (layer, branch), or per layer if tied, for all rows.
static inline void drop_plan_sample_batch(DropPlan *plan, const DropPath *d, int64_t step,
                                          int micro, int micros, int batch) {
    int each = drop_path_one_mask(d) ? 1 : BRANCHES, n = plan->layers * each;
    uint32_t *p = (uint32_t *)xcalloc((size_t)n, sizeof *p);
    unsigned char *kept = (unsigned char *)xcalloc((size_t)n, 1),
        *rows = (unsigned char *)xcalloc((size_t)batch, 1);
    for (int i = 0; i < n; i++) p[i] = drop_path_rate_bits(d, i / each + 1, i % each, step);
    drop_path_draw(kept, p, n, d, step, micro, micros, 0);
    for (int i = 0; i < plan->layers * BRANCHES; i++) {
        memset(rows, kept[i / BRANCHES * each + i % each], (size_t)batch);
        drop_plan_keep(plan, i, rows, batch, drop_path_scale(d, i / BRANCHES + 1, i % BRANCHES,
                                                             step));
    }
    free(p);
    free(kept);
    free(rows);
}

// The rate of one row, from the mean rate p: p (1 + kappa) for the easiest, p (1 - kappa) for the
// hardest, linear in the rank between them. The sum over the rows is exactly batch * p, and so cost
// and counts are those of p; where a rate would exceed 0.95, kappa is smaller.
static inline uint32_t drop_path_row_bits(const DropPath *d, uint32_t p, int row, int batch) {
    if (!d->rank || d->adapt <= 0 || batch < 2 || !p) return p;
    const double kappa = fmin(d->adapt, fmax(0.95 * 4294967296.0 / p - 1, 0));
    const double tilt = kappa * p * (batch - 1 - 2 * d->rank[row]) / (batch - 1);
    return (uint32_t)((int64_t)p + (int64_t)tilt);       // towards 0: ranks k and B-1-k cancel
}

// Row unit: one decision per sequence and (layer, branch), or per layer if tied.
static inline void drop_plan_sample_rows(DropPlan *plan, const DropPath *d, int64_t step, int micro,
                                         int micros, int batch) {
    uint32_t *p = (uint32_t *)xcalloc((size_t)batch, sizeof *p);
    unsigned char *kept = (unsigned char *)xcalloc((size_t)batch, 1);
    for (int i = 0; i < plan->layers * BRANCHES; i++) {
        int l = i / BRANCHES + 1, b = i % BRANCHES;
        int place = drop_path_one_mask(d) ? i - b : i;
        for (int row = 0; row < batch; row++)
            p[row] = drop_path_row_bits(d, drop_path_rate_bits(d, l, b, step), row, batch);
        drop_path_draw(kept, p, batch, d, step, micro, micros, 1 + (uint32_t)place);
        drop_plan_keep(plan, i, kept, batch, drop_path_scale(d, l, b, step));
    }
    free(p);
    free(kept);
}

// The plan of micro-batch m = 0..M-1 (over all ranks) of an optimizer step, with `world` ranks.
// With sync and the batch unit, the ranks share the plan of their micro-step m / world; otherwise
// each m has its own, independent of world.
static inline void drop_plan_sample(DropPlan *plan, const DropPath *d, int64_t step, int m, int M,
                                    int world, int batch) {
    CHECK(batch <= 1 << 20 && d->layers == plan->layers, "a plan of %d layers, %d rows",
          plan->layers, batch);
    int shared = d->sync && d->unit == UNIT_BATCH ? world : 1;
    plan->batch = batch;
    plan->tied = drop_path_tied(d);
    if (d->unit == UNIT_BATCH) drop_plan_sample_batch(plan, d, step, m / shared, M / shared, batch);
    else drop_plan_sample_rows(plan, d, step, m, M, batch);
}

// The most rows that any plan of the run can keep for a backward pass, over the trained layers:
// attention branches, MLP branches, both. Only systematic sampling guarantees less than everything,
// and only if the rate is above zero throughout.
static inline void drop_path_bound(const DropPath *d, int batch, int *attn_rows, int *mlp_rows,
                                   int *rows) {
    // R rises and then falls: its minimum is at an end of the run
    const int64_t last = d->steps - 1;
    const int64_t at = drop_path_ramp(d, last) < drop_path_ramp(d, 0) ? last : 0;
    // frozen: units that may absorb drops meant for trained ones
    int each[BRANCHES] = {0, 0}, frozen = 0;
    uint64_t sum = 0;
    for (int l = 1; l <= d->layers; l++)
        for (int b = 0; b < BRANCHES; b++) {
            const uint64_t p = d->sampling == SAMPLING_SYSTEMATIC ? drop_path_rate_bits(d, l, b, at)
                : 0;
            const int unit = b == ATTN || d->branches != BRANCHES_TIED;
            if (l > d->frozen)
                each[b] += batch - (d->unit == UNIT_ROW ? (int)(((uint64_t)batch * p) >> 32) : 0);
            else frozen += unit && p;
            if (unit) sum += p;
        }
    // batch unit: of L tied blocks, or of 2L branches
    int dropped = (int)(sum >> 32) - frozen;
    if (dropped < 0) dropped = 0;
    int one = d->branches == BRANCHES_ATTN, other = d->branches == BRANCHES_MLP,
        tied = d->branches == BRANCHES_TIED;
    if (d->unit == UNIT_BATCH && (one || tied)) each[ATTN] -= dropped * batch;
    if (d->unit == UNIT_BATCH && (other || tied)) each[MLP] -= dropped * batch;
    *attn_rows = each[ATTN];
    *mlp_rows = each[MLP];
    *rows = each[ATTN] + each[MLP] - (d->unit == UNIT_BATCH &&
                                      d->branches == BRANCHES_SEPARATE ? dropped * batch : 0);
}

// ---- Plans as text: the bitmap in metrics.jsonl, and --drop-replay ----
//
// Batch unit: one digit per layer; 0 nothing kept, 1 attention, 2 MLP, 3 both: "3313". Row unit:
// per layer and branch the kept rows as a hexadecimal number, row 0 being its lowest bit, separated
// by dots: "f.f.b.f". Micro-batches are separated by spaces.

static inline int drop_plan_has_row(const BranchPlan *b, int row) {
    for (int i = 0; i < b->n; i++)
        if (b->rows[i] == row) return 1;
    return 0;
}

// Appends one plan to the text. `unit` is the policy's: a row plan that happens to keep all rows is
// still written as rows.
static inline void drop_plan_write(Text *text, const DropPlan *plan, int unit) {
    for (int i = 0; i < plan->layers * BRANCHES; i++) {
        const BranchPlan *b = &plan->branch[i];
        if (unit == UNIT_BATCH) {
            if (i % BRANCHES == ATTN) text_printf(text, "%d", (b[ATTN].n > 0) + 2 * (b[MLP].n > 0));
            continue;
        }
        if (i) text_append(text, ".", 1);
        for (int digit = (plan->batch + 3) / 4 - 1; digit >= 0; digit--) {
            int bits = 0;
            for (int k = 0; k < 4; k++) bits |= drop_plan_has_row(b, 4 * digit + k) << k;
            text_printf(text, "%x", (unsigned)bits);
        }
    }
}

static inline int drop_plan_hex(char c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

// Reads the plan of micro-batch m from such a text, with the scales of (d, step). Returns NULL, or
// what is wrong.
static inline const char *drop_plan_read(DropPlan *plan, const DropPath *d, int64_t step,
                                         const char *text, int m, int batch) {
    for (; m > 0 && text; m--) text = strchr(text, ' ') ? strchr(text, ' ') + 1 : NULL;
    if (!text || !*text) return "there is no plan for this micro-batch";
    unsigned char *kept = (unsigned char *)xcalloc((size_t)batch + 4, 1);
    const char *end = text + strcspn(text, " "), *error = NULL;
    int rows = memchr(text, '.', (size_t)(end - text)) != NULL, digits = (batch + 3) / 4;
    plan->batch = batch;
    plan->tied = drop_path_tied(d);
    for (int i = 0; i < plan->layers * BRANCHES && !error; i++) {
        if (!rows) {
            int digit = text < end ? drop_plan_hex(*text) : -1;
            if (digit < 0 || digit > 3)
                error = "the plan has too few layers, or a digit that is not 0 to 3";
            else memset(kept, digit >> i % BRANCHES & 1, (size_t)batch);
            text += i % BRANCHES == MLP;
        } else {
            for (int k = digits - 1; k >= 0 && !error; k--, text++) {
                int bits = text < end ? drop_plan_hex(*text) : -1;
                // rows >= batch
                const int beyond = k == digits - 1 && batch % 4 ? bits >> batch % 4 : 0;
                if (bits < 0 || beyond) error = "the plan has other rows or layers";
                for (int bit = 0; bit < 4; bit++)
                    kept[4 * k + bit] = (unsigned char)(bits >> bit & 1);
            }
            if (!error && i + 1 < plan->layers * BRANCHES && *text++ != '.')
                error = "the plan has more rows than this batch";
        }
        if (!error)
            drop_plan_keep(plan, i, kept, batch, drop_path_scale(d, i / BRANCHES + 1, i % BRANCHES,
                                                                 step));
    }
    if (!error && text != end) error = "the plan has more layers or rows than this model";
    for (int l = 0; l < plan->layers && drop_path_one_mask(d) && !error; l++) {
        const BranchPlan *b = &plan->branch[BRANCHES * l];
        if (b[ATTN].n != b[MLP].n ||
            memcmp(b[ATTN].rows, b[MLP].rows, sizeof(int) * (size_t)b[ATTN].n))
            error = "its branches differ, but --drop-branches is tied";
    }
    free(kept);
    return error;
}

#endif
