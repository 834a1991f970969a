// engine.h: the small interface that an engine implements: train_gpt.c on the CPU, train_gpt.cu on
// the GPU. Trainer, tools, checkpoints and tests are written once against it.
//
// An engine makes no decisions: which rows run which branch, the scales, the learning rate and
// AdamW's step counts are passed in as data. It draws no random numbers except the bits of
// ROUNDING_STOCHASTIC, a function of (seed, step, parameter, element). All pointers refer to host
// memory and are read or written before a call returns; by then, all work that the call started on
// a device has finished.
#ifndef ENGINE_H
#define ENGINE_H

#include "gpt.h"
#include "pass.h"

typedef struct Model Model;                              // defined by the engine
typedef struct Comm Comm;                                // run/comm.h

// The most that a training pass may have to save for the backward pass, summed over the trained
// layers of one plan: rows of attention branches, rows of MLP branches, and both together, which
// drop_path_bound() computes; and how many exits a pass may have (Objective.exit), in evaluation,
// too.
typedef struct { int attn_rows, mlp_rows, rows, exits; } MemoryBound;

// The most bytes that plans within a bound save, if a row of a branch saves size[] bytes;
// evaluation needs one layer at a time.
static inline size_t memory_bound_most(const MemoryBound *b, const size_t size[BRANCHES], int B) {
    const int rows[BRANCHES] = {b->attn_rows, b->mlp_rows},
        larger = size[MLP] > size[ATTN] ? MLP : ATTN;
    const int first = b->rows < rows[larger] ? b->rows : rows[larger], second = b->rows - first;
    const size_t most = (size_t)first * size[larger] + (size_t)second * size[!larger];
    const size_t one = (size_t)B * (size[ATTN] + size[MLP]);
    return most > one ? most : one;
}

// The bound if every branch of every trained layer could be kept.
static inline MemoryBound memory_bound_full(int layers, int frozen, int B, int trains) {
    const int branch = B * (layers - frozen);
    const MemoryBound all = {branch, branch, trains ? BRANCHES * branch : 0, 0};
    return all;
}

// The type that matmul operands are rounded to. Sums, weights, gradients and moments are always
// fp32 (fp64 when built with REAL=double), as is attention on the CPU. On the GPU, bf16 is also how
// activations are stored; tf32 is fp32 of which the tensor cores read 10 bits of fraction.
// auto: the engine's default, for options only
enum { DTYPE_FP32, DTYPE_BF16, DTYPE_AUTO, DTYPE_TF32 };

// What forward does not save and backward recomputes: the outputs of LayerNorm and GELU; nothing;
// everything between a branch's LayerNorm and its end. The CPU supports only the first.
enum { RECOMPUTE_GELU, RECOMPUTE_NONE, RECOMPUTE_BRANCH };

// How AdamW rounds the fp32 weights to the ones that forward and backward read, if those differ: to
// nearest, or up or down at random so that the mean is exact. GPU only.
enum { ROUNDING_NEAREST, ROUNDING_STOCHASTIC };

typedef struct {
    int B, T;             // the largest batch and row length of any call
    int threads;          // of the whole process; 0: OpenMP's default, all cores
    int dtype;            // DTYPE_*
    MemoryBound bound;    // all zero: this model only evaluates (and has no gradients)
    int attention_noise;  // 1: passes may use dropout on attention probabilities, for which a GPU
                          // allocates mask bits
    int score_rows;       // 1: passes may edit attention's scores (Noise.scores)
    // (L) whose attention stays readable after a run, for a student's Align; NULL: none
    const unsigned char *maps;
    int align;            // 1: passes may have Objective.align
    int twins;            // 1: passes may have Objective.consistency
    double lora_scale;    // alpha / rank of a config with adapters
    int lora_noise;       // 1: passes may use dropout on what adapters read
    int frozen;           // the first `frozen` layers, and wpe, do not change: no gradients, no
                          // moments, no backward pass (gpt_param_trains)
    int recompute;        // RECOMPUTE_*
    const Comm *comm;     // the ranks that train this model together; NULL: a single process
    int zero;             // 1: each rank keeps only its share of the moments, and of fp32 weights
                          // that only the optimizer reads
    int reduce_fp32;      // sum gradients over the ranks in fp32, whatever the dtype
    int graphs;           // 1: launch each branch's kernels as one CUDA graph, with the same bits.
                          // GPU only
    int rounding;         // ROUNDING_*; rounding_seed: for its random bits
    uint64_t seed;
    int dry;              // 1: only memory, peak and close will be called. The CPU then allocates
                          // nothing; a GPU does, to find out whether it fits
    int cache;            // number of sequences of T tokens that decode can cache; 0: none
} EngineArgs;

// One AdamW update (Loshchilov and Hutter 2019, algorithm 2) with gradients clipped to a norm of
// grad_clip (0: never).
typedef struct {
    double lr, beta1, beta2, eps, weight_decay, grad_clip;
    const int64_t *t;   // (2L+1): the AdamW step 1, 2, ... of each branch and, last, of everything
                        // else. 0 leaves a branch untouched that no backward pass has reached since
                        // the last update, so that its gradient is zero
    int discard;        // only zero the gradients: this step is skipped
    double norm_limit;  // no step is taken above it; 0: no limit, negative: no step at all
} UpdateArgs;

// Bytes by purpose. Activations: what is allocated for forward and backward under EngineArgs.bound;
// _full: the same if every branch could be kept at once; _used: the most that calls have used so
// far.
typedef struct { size_t parameters, gradients, moments, activations, activations_full,
                 activations_used; } EngineMemory;

// The factor for gradients of this norm, as in PyTorch's clip_grad_norm_.
static inline double update_clip(double grad_clip, double norm) {
    return grad_clip > 0 ? fmin(1, grad_clip / (norm + 1e-6)) : 1;
}

// No element of a clipped gradient exceeds its norm: up to this one, all squares and thus the
// moments are finite.
#define UPDATE_MOST (sizeof(real) == 8 ? 1.3e154 : 1.8e19)

// Whether the moments can take a gradient of this norm: an infinite moment would freeze its weight
// forever.
static inline int update_is_finite(const UpdateArgs *a, double norm) {
    return isfinite(norm) && norm * update_clip(a->grad_clip, norm) <= UPDATE_MOST;
}

// Whether an update of this gradient norm changes the weights.
static inline int update_is_taken(const UpdateArgs *a, double norm) {
    return !a->discard && update_is_finite(a, norm) &&
        !(a->norm_limit != 0 && norm > a->norm_limit);
}

// One call of decode: tokens that continue sequences of the cache, through all layers or some.
typedef struct {
    int n;                        // tokens per row
    // (rows,n) (rows) (rows): row r continues sequence seq[r] at positions at[r], at[r] + 1, ...
    const int *tokens, *seq, *at;
    int from, to;                 // layers from .. to-1; to 0: all. With from > 0 the tokens are
                                  // not read: an earlier call stopped at that layer with them
    int keys_only;                // 1: the layers only cache the keys and values of the stream as
                                  // it is, which does not change
    int all;                      // 1: logits after each token, (rows,n,V)
    real *logits;                 // (rows,V) after each row's last token; NULL: none
    real *stream;                 // (rows,n,C) after the call; NULL: not wanted
} DecodeArgs;

static inline int decode_to(const DecodeArgs *a, int layers) { return a->to ? a->to : layers; }

// For tune. The bits of a step depend on what was chosen, so the choices are kept in a file, and a
// model that finds them there measures nothing.
typedef struct {
    const char *file;     // read if it exists; written if something was measured
    const char *before;   // read if `file` does not exist; NULL: none
    int by_rows;          // 1: branches run on 1 .. B rows; 0: on B only
} TuneArgs;

typedef enum { SLOT_PARAM, SLOT_GRAD, SLOT_M, SLOT_V } Slot;

// Capabilities that only some engines have.
enum {
    CAN_TF32 = 1,                                        // DTYPE_TF32
    CAN_RECOMPUTE = 2,                                   // RECOMPUTE_NONE, RECOMPUTE_BRANCH
    CAN_GRAPH = 4,                                       // EngineArgs.graphs
    CAN_ROUND = 8,                                       // ROUNDING_STOCHASTIC
    CAN_SHARE = 16,                                      // EngineArgs.zero
    // a row's losses have the same bits whatever other rows run beside it; without, only for calls
    // of equal shapes, and they differ by rounding otherwise
    CAN_ANY_BATCH = 32
};

typedef struct {
    const char *name;
    int dtype;                                           // the meaning of --dtype auto
    unsigned can;                                        // CAN_*

    // Creates a model with all parameters, gradients and moments zero. Callers use engine_open.
    Model *(*open)(const GptConfig *config, const EngineArgs *args);

    // Runs a batch: forward and, if pass->weight != 0, backward. Returns the mean loss in nats over
    // the non-negative targets, 0 without targets: objective_loss of the parts that the objective
    // defines.
    double (*run)(Model *, const Batch *batch, const Pass *pass);

    // From the last run: -log p of its targets (rows, T), 0 where negative; the parts of its loss;
    // the logits (V) at (row, t).
    void (*losses)(Model *, real *host);
    void (*parts)(Model *, double part[N_PARTS]);
    void (*logits)(Model *, int row, int t, real *host);

    // Generation, on a model opened with a cache. Each of plan->batch rows continues a sequence by
    // n tokens; the tokens before them have been decoded under the same plan, and in layers >= from
    // any at or after them are forgotten. Only cached keys and values are read for earlier tokens,
    // so the cost is that of n tokens per row. No sequence may occur twice; batch * n is at most
    // B * T, and batch may exceed B. A call may stop between layers: the cache keeps the stream,
    // and another call continues from there. Logits are read from the stream where the call stops,
    // through ln_f and the head; at the last layer they equal up to rounding those of run over the
    // whole sequence. With CAN_ANY_BATCH they have the same bits whatever rows are beside a row and
    // however its tokens and layers are divided among calls.
    void (*decode)(Model *, const DecodeArgs *, const DropPlan *plan);

    // Clips and applies the gradients, zeroes them and returns their norm before clipping. If the
    // norm is not finite, too large for the moments or above args->norm_limit, nothing changes, not
    // even the gradients: they can be read, and a call with args->discard must follow to zero them.
    // All ranks call it with the same arguments and get the same norm.
    double (*update)(Model *, const UpdateArgs *);

    // Copy one layer of one parameter, gpt_param_size() elements, from or to a slot. Frozen
    // parameters exist only in SLOT_PARAM, where those under adapters may be rounded to dtype. With
    // args->zero all ranks call read in the same order, since each holds a share.
    void (*read)(Model *, Slot, int param, int layer, real *host);
    void (*write)(Model *, Slot, int param, int layer, const real *host);

    // Call on all ranks after writing weights that have t (2L+1) AdamW steps behind them, counted
    // as UpdateArgs.t: repeats the stochastic rounding of the last of them, so that a resumed run
    // has the same bits.
    void (*resumed)(Model *, const int64_t *t);

    void (*memory)(const Model *, EngineMemory *);

    // Measures the machine's peak in FLOP/s for about that many seconds, on multiply-adds of this
    // model's dtype.
    double (*peak)(Model *, double seconds);

    void (*close)(Model *);

    // Call on all ranks before the first step, when the weights are there: measures what a training
    // step consists of and chooses accordingly, so that no step measures anything. NULL: this
    // engine has nothing to choose. Gradients are zero afterwards.
    void (*tune)(Model *, const TuneArgs *);
} Engine;

// ---- Preconditions, checked by the engines ----

// For run, on a model of sizes c opened with args a.
static inline void engine_check_run(const GptConfig *c, const EngineArgs *a, const Batch *b,
                                    const Pass *pass) {
    const DropPlan *plan = pass->plan;
    CHECK(plan->layers == c->L && plan->batch == b->rows,
          "a plan of %d layers and %d rows for a model of %d and %d rows", plan->layers,
          plan->batch, c->L, b->rows);
    CHECK(b->rows > 0 && b->rows <= a->B && b->T > 0 && b->T <= a->T,
          "%d rows of %d tokens; opened for %d of %d", b->rows, b->T, a->B, a->T);
    CHECK(pass->weight == 0 || (a->bound.rows > 0 && b->targets),
          "this model was opened to evaluate");
    CHECK(pass->weight != 0 || !pass->reduce, "an evaluation has no gradients to reduce");
    int exits = 0;
    for (int l = 0; l < c->L; l++) exits += pass_exits(pass, l);
    CHECK(exits <= a->bound.exits && pass_exit(pass, c->L - 1) > 0, "%d exits; opened for %d",
          exits, a->bound.exits);
    CHECK(pass_consistency(pass) == 0 || (a->twins && b->rows % 2 == 0),
          "this model was opened without twins, or %d rows are not twice as many", b->rows);
    CHECK(!pass->objective || !pass->objective->align || a->align,
          "this model was opened without a comparison of maps");
    CHECK(a->score_rows || !pass->noise || pass->noise->scores == SCORES_PLAIN,
          "this model was opened without edits of scores");
    CHECK(!pass->watch || !pass->watch->see_gradient || !a->frozen,
          "backward ends above the embeddings");
    for (int l = 0; pass->watch && plan->tied && l < c->L; l++)
        CHECK(!pass->watch->want[watch_after(l, ATTN)],
              "a tied plan has no stream between its branches");
    for (size_t i = 0, n = (size_t)b->rows * (size_t)b->T; i < n; i++) {
        CHECK(b->tokens[i] >= 0 && b->tokens[i] < c->V, "token %d is outside the vocabulary of %d",
              b->tokens[i], c->V);
        CHECK(!b->targets || b->targets[i] < c->V, "target %d is outside the vocabulary of %d",
              b->targets[i], c->V);
    }
}

// For decode; stopped (cache,T): at which layer each position's stream stands.
static inline void engine_check_decode(const GptConfig *c, const EngineArgs *a,
                                       const DecodeArgs *d, const DropPlan *plan,
                                       const int *stopped) {
    const int B = plan->batch, n = d->n, to = decode_to(d, c->L), *seq = d->seq, *at = d->at;
    CHECK(plan->layers == c->L, "a plan of %d layers for a model of %d", plan->layers, c->L);
    CHECK(B > 0 && B <= a->cache && n > 0 && (size_t)B * (size_t)n <= (size_t)a->B * (size_t)a->T,
          "%d rows of %d tokens; opened for %d sequences and %d tokens", B, n, a->cache,
          a->B * a->T);
    for (int row = 0; row < B; row++) {
        CHECK(seq[row] >= 0 && seq[row] < a->cache, "sequence %d of %d", seq[row], a->cache);
        CHECK(at[row] >= 0 && at[row] <= a->T - n, "%d tokens at position %d of %d", n, at[row],
              a->T);
        for (int other = 0; other < row; other++)
            CHECK(seq[other] != seq[row], "sequence %d twice in a call", seq[row]);
    }
    CHECK(d->from >= 0 && d->from <= to && to <= c->L, "layers %d to %d of %d", d->from, to, c->L);
    for (int i = 0; i < B * n; i++) {
        const int here = d->from ? stopped[(size_t)seq[i / n] * (size_t)a->T +
                                           (size_t)(at[i / n] + i % n)] : 0;
        CHECK(here == d->from, "position %d stopped at layer %d, not %d", at[i / n] + i % n, here,
              d->from);
        CHECK(d->from || (d->tokens[i] >= 0 && d->tokens[i] < c->V),
              "token %d is outside the vocabulary of %d", d->tokens[i], c->V);
    }
}

// ---- What callers use ----

// Opens a model, or dies naming what this engine does not support.
static inline Model *engine_open(const Engine *e, const GptConfig *config, const EngineArgs *a) {
    const struct { unsigned needs; int asked; const char *what, *hint; } wish[] = {
        {CAN_TF32, a->dtype == DTYPE_TF32, "--dtype tf32",
         "--dtype fp32 or bf16; or build with make CUDA=1"},
        {CAN_RECOMPUTE, a->recompute != RECOMPUTE_GELU, "--recompute",
         "--recompute gelu; memory is not scarce on the CPU"},
        {CAN_GRAPH, a->graphs, "--graphs", "--graphs 0"},
        {CAN_ROUND, a->rounding != ROUNDING_NEAREST, "--rounding stochastic",
         "--rounding nearest; the CPU keeps no rounded weights"},
        {CAN_SHARE, a->zero, "--zero", "--zero 0; on the CPU every rank keeps everything"},
    };
    const char *error = gpt_config_error(config);
    if (error) die("this model cannot be built: %s", error);
    for (size_t i = 0; i < sizeof wish / sizeof wish[0]; i++)
        if (wish[i].asked && !(e->can & wish[i].needs))
            die("%s is for GPUs\n  hint: %s", wish[i].what, wish[i].hint);
    CHECK(!config->lora || (isfinite(a->lora_scale) && !a->frozen),
          "adapters need a scale, and no frozen layers");
    CHECK(a->B > 0 && a->T > 0 && a->T <= config->T, "a batch of %d rows of %d tokens", a->B, a->T);
    return e->open(config, a);
}

// The losses of plan->batch rows of T tokens by a plain pass; below, with the gradient.
static inline double engine_forward(const Engine *e, Model *m, int T, const int *tokens,
                                    const int *targets, const DropPlan *plan) {
    const Batch batch = batch_of(plan->batch, T, tokens, targets);
    const Pass pass = pass_of(plan, 0);
    return e->run(m, &batch, &pass);
}

static inline double engine_forward_backward(const Engine *e, Model *m, int T, const int *tokens,
                                             const int *targets, const DropPlan *plan,
                                             double weight) {
    const Batch batch = batch_of(plan->batch, T, tokens, targets);
    const Pass pass = pass_of(plan, weight);
    return e->run(m, &batch, &pass);
}

// Decodes n tokens per row through all layers; the logits (batch, V) after the last, or NULL.
static inline void engine_decode(const Engine *e, Model *m, int n, const int *tokens,
                                 const int *seq, const int *at, const DropPlan *plan,
                                 real *logits) {
    const DecodeArgs args = {.n = n, .tokens = tokens, .seq = seq, .at = at, .logits = logits};
    e->decode(m, &args, plan);
}

// Initial weights of one parameter in the first c->L layers of a model that has `depth` layers in
// the end. Each is a function of (seed, parameter, layer, position), so all engines get the same.
static inline void engine_init_param(const Engine *e, Model *m, const GptConfig *c, int p,
                                     int depth, uint64_t seed) {
    const size_t n = gpt_param_size(c, p);
    const int init = gpt_param[p].init;
    const double sigma = init == INIT_RESIDUAL ? 0.02 / sqrt(2.0 * depth) : 0.02;
    const double bound = 1 / sqrt((double)gpt_param_cols(c, p));
    real *host = (real *)xcalloc(n + 1, sizeof *host);
    for (int l = 0; l < gpt_param_layers(c, p); l++) {
#ifdef _OPENMP
#pragma omp parallel for
#endif
        for (size_t i = 0; i < n; i += 2) {
            const double constant = init == INIT_ONE ? 1 : 0;
            double z[2] = {constant, constant};
            if (init == INIT_NORMAL || init == INIT_RESIDUAL || init == INIT_ADAPTER) {
                Philox w = rng_words(seed, STREAM_INIT, (uint64_t)i, (uint32_t)p, (uint32_t)l);
                normal_pair(z, w.v[0], w.v[1]);
                z[0] *= sigma, z[1] *= sigma;
                for (int k = 0; init == INIT_ADAPTER && k < 2; k++)
                    z[k] = bound * (2 * uniform01(w.v[k]) - 1);
            }
            host[i] = (real)z[0], host[i + 1] = (real)z[1];
        }
        e->write(m, SLOT_PARAM, p, l, host);
    }
    free(host);
}

// GPT-2's initial weights.
static inline void engine_init_layers(const Engine *e, Model *m, const GptConfig *c, int depth,
                                      uint64_t seed) {
    for (int p = 0; p < N_PARAMS; p++) engine_init_param(e, m, c, p, depth, seed);
}

static inline void engine_init_weights(const Engine *e, Model *m, const GptConfig *c,
                                       uint64_t seed) {
    engine_init_layers(e, m, c, c->L, seed);
}

// New adapters: B is zero, so that they change nothing yet.
static inline void engine_init_adapters(const Engine *e, Model *m, const GptConfig *c,
                                        uint64_t seed) {
    for (int p = 0; p < N_PARAMS; p++)
        if (gpt_param[p].group == GROUP_ADAPTER) engine_init_param(e, m, c, p, c->L, seed);
}

#endif
