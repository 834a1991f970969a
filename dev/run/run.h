// run.h: a run, and how it is opened from its options. All checks that can fail are made here,
// before anything is written.
#ifndef RUN_H
#define RUN_H

#include "../check.h"
#include "../files/files.h"
#include "../files/lock.h"
#include "../files/manifest.h"
#include "../files/shards.h"
#include "../files/tokenizer.h"
#include "../model/drop_path.h"
#include "../model/engine.h"
#include "../model/exits.h"
#include "../model/layer_list.h"
#include "../model/schedule.h"
#include "attention_drop.h"
#include "checkpoint.h"
#include "comm.h"
#include "difficulty.h"
#include "gpu_model.h"
#include "growth.h"
#include "metrics.h"
#include "numbers.h"
#include "options.h"
#include "selfcheck.h"
#include "teacher.h"
#include <sys/resource.h>

typedef struct {
    const TrainOptions *options;
    const char *program;                // how it was called, to be restarted likewise
    const char *config_text;            // the options, as in config.txt
    char *data_line, *run_text;         // describes the train shards; both together, for
                                        // checkpoints
    const Engine *engine;
    Model *model;
    GptConfig config;                   // of the current layers
    LoraConfig lora;                    // rank 0: no adapters
    char base_sha256[SHA256_HEX];       // of the adapters' base, on rank 0
    int depth;                          // final number of layers
    Growth growth;
    DropPath drop;
    Ramp dropout;                       // when it is on
    Ramp attention_warm;                // the warm-up of AttentionDrop
    unsigned char *attention_layers;    // (depth) where it is; NULL: there is none
    DropPlan twins;                     // of 2 B rows, with --consistency
    Noise noise;                        // of the current pass
    Objective objective;                // of every training pass
    Difficulty difficulty;              // of rows, for --drop-adapt
    Exits exits;
    double *exit_weight;                // (depth) of the current step
    Teacher teacher;
    Align align;
    unsigned char *align_layers;        // (depth) those of --align-layers
    int *align_pairs;                   // (depth) Align.layer
    Attribution attribution;            // of --align attribution; e NULL: none
    double *token_scores, *align_target;        // (V) of --align-scores, or NULL; (B,T)
    Schedule schedule;
    Shards train, val;
    Tokenizer tokenizer;
    char *tokenizer_path;               // NULL: none
    TokenizerFiles tokenizer_files;     // for checkpoints, on rank 0
    Manifest manifest[MANIFEST_SIDES];  // of the train and val shards; V = 0: none
    int has_val, has_tokenizer;
    Comm *comm;                         // NULL: a single process
    int rank, world;                    // of this process; ranks share a step's micro-batches
    int B, T, M;                        // rows and tokens per micro-batch, micro-batches per step
    int64_t steps, eval_rows;
    DepthShares eval_depths;
    MetricsLog replay;
    double peak_flops;                  // per second, measured

    CheckpointState state;
    // the newest checkpoint that this run resumed from or wrote; NULL: none
    char *whole;
    char *report;                       // of the last step that was not finite; NULL: none
    // this rank's first micro-batch of the step whose loss is not finite, or -1; and the result of
    // numbers_finite_branches for it
    int bad_micro, bad_forward;
    DropPlan plan;
    int *tokens, *targets;              // (B,T)
    real *losses;                       // (B,T)
    double *micro;                      // (M) losses of the current step's micro-batches
    int *kept;                          // (2L) rows of the current step that ran each branch, on
                                        // any rank
    unsigned char *reduce;              // (2L+1) whether any did: these gradients are summed
    int64_t *adamw_steps;               // (2L+1) for the current update
    Text plan_text;
    MetricsFile metrics;
    int metrics_wait;                   // the last attempt to write to it failed
    int console_lost;                   // and so did one to write to standard output
    int directory, lock;                // the output directory and its lock, on rank 0; -1: none
    int stop, save_now;                 // requested by a signal, agreed on by all ranks
} Trainer;

// How often a step reads each row: twice with --consistency.
static inline int trainer_sides(const Trainer *tr) {
    return tr->objective.consistency > 0 ? 2 : 1;
}

static inline int trainer_dtype(const Engine *engine, const TrainOptions *o) {
    return o->dtype == DTYPE_AUTO ? engine->dtype : o->dtype;
}

static inline double trainer_peak_bytes(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    return (double)usage.ru_maxrss;
#else
    return 1024.0 * (double)usage.ru_maxrss;
#endif
}

// The model after all phases of --grow have begun.
static inline GptConfig trainer_whole(const Trainer *tr) {
    GptConfig c = tr->config;
    c.L = tr->depth;
    return c;
}

// Whether a task done every `every` steps, and after the last, is due after this step.
static inline int trainer_due(int64_t every, int64_t step, int64_t steps) {
    return step == steps || (every > 0 && step % every == 0);
}

// ---- First: does this machine compute correctly? ----

// Each rank checks itself, on its own device; if one fails, all learn of it and exit with code 4.
static inline void trainer_selfcheck(const Engine *engine, const TrainOptions *o, Comm *comm) {
    Selfcheck got;
    EngineArgs args;
    if (!o->selfcheck) return;
    memset(&args, 0, sizeof args);
    args.threads = (int)o->threads, args.dtype = trainer_dtype(engine, o),
        args.recompute = o->recompute, args.comm = comm;
    selfcheck_run(&got, engine, args);
    char *wrong = selfcheck_judge(&got, &selfcheck_numbers, args.dtype, NULL);
    double failed = wrong != NULL;
    if (wrong) {
        fflush(stdout);
        fprintf(stderr, "error: the self-check of %s has failed on rank %d: %s\n  hint: this "
                "machine or this build computes wrong numbers: make clean and build again, or try "
                "another machine; --selfcheck 0 trains all the same\n", engine->name,
                comm ? comm->rank : 0, wrong);
    }
    free(wrong);
    comm_sum(comm, &failed, 1);
    if (failed == 0) return;
    comm_close(comm);
    exit(4);
}

// ---- From options to a run: everything is checked before anything is written ----

// The tokenizer given by option, otherwise the one next to the shards, otherwise that of the model
// `from` (NULL: a new one), which may have been moved away from its shards.
static inline void trainer_open_tokenizer(Trainer *tr, const char *from) {
    const TrainOptions *o = tr->options;
    char *path = *o->tokenizer ? xstrdup(o->tokenizer) : tokenizer_find(o->train);
    char *inside = path || !from ? NULL : xprintf("%s/", from);
    if (inside) path = tokenizer_find(inside);
    free(inside);
    manifest_find(&tr->manifest[MANIFEST_TRAIN], o->train);
    manifest_find(&tr->manifest[MANIFEST_VAL], *o->val ? o->val : o->train);
    manifest_check_pair(&tr->manifest[MANIFEST_TRAIN], &tr->manifest[MANIFEST_VAL]);
    if (!path) return;
    tokenizer_load(&tr->tokenizer, path);
    for (int i = 0; i < MANIFEST_SIDES; i++)
        manifest_check_tokenizer(&tr->manifest[i], &tr->tokenizer, path);
    tr->has_tokenizer = 1;
    tr->tokenizer_path = path;
}

// Loads the tokenizer's files for the checkpoints, in case the originals change.
static inline void trainer_take_tokenizer(Trainer *tr) {
    const char *near = tr->tokenizer_path ? tr->tokenizer_path : tr->options->train;
    size_t n = tr->tokenizer_path ? strlen(near) : strcspn(near, ",");
    while (n > 0 && near[n - 1] != '/') n--;
    char *beside = xprintf("%.*s", (int)n, near);
    char *wrong = tokenizer_files_take(&tr->tokenizer_files,
                                       tr->has_tokenizer ? &tr->tokenizer : NULL,
                                       tr->tokenizer_path, beside, tr->config.V,
                                       tr->config.T, tr->state.eot);
    if (wrong && !tr->tokenizer_files.file[TOKENIZER_JSON].n)
        warn("checkpoints are without a tokenizer.json for transformers: %s", wrong);
    tr->state.tokenizer = &tr->tokenizer_files;
    free(beside), free(wrong);
}

// Dies if options of adapters contradict each other.
static inline void trainer_check_lora(const TrainOptions *o) {
    unsigned targets;
    if (!o->lora) {
        if (o->lora_alpha > 0 || o->lora_dropout > 0 || o->lora_norms)
            die("--lora-alpha, --lora-dropout and --lora-norms need --lora\n  hint: --lora 16 "
                "trains adapters of rank 16");
        return;
    }
    char *error = lora_parse_targets(&targets, o->lora_targets);
    if (error) die("--lora-targets: %s", error);
    if (o->train_last)
        die("--lora and --train-last exclude each other\n  hint: with --lora all weights stay as "
            "they are");
    if (o->drop_scale == SCALE_SURVIVAL && o->drop_path > 0)
        die("--lora with --drop-scale survival: an adapter's files cannot hold its factors\n  "
            "hint: --drop-scale inverted");
    if (!*o->init_from && !*o->resume)
        die("--lora without --init-from: there is nothing to adapt\n  hint: --init-from names a "
            "checkpoint's directory");
}

// The run's adapters and their base, from --lora and from where the run starts. An adapter that it
// continues must match.
static inline void trainer_lora(Trainer *tr, const char *from, int resume) {
    const TrainOptions *o = tr->options;
    LoraConfig *mine = &tr->lora, then;
    const char *how = resume ? "--resume" : "--init-from";
    memset(&then, 0, sizeof then);
    if (lora_is_adapter(from)) lora_open(&then, from);
    if (resume && then.rank != (int)o->lora)
        die("--resume %s was trained with --lora %d, this run has %lld\n  hint: --init-from starts "
            "a new run from it", from, then.rank, (long long)o->lora);
    if (o->lora) {
        mine->rank = (int)o->lora, mine->norms = o->lora_norms, mine->dropout = o->lora_dropout;
        mine->alpha = o->lora_alpha > 0 ? o->lora_alpha : 2 * (double)o->lora;
        char *wrong = lora_parse_targets(&mine->targets, o->lora_targets);
        CHECK(!wrong, "%s", wrong);
        const int same = then.rank == mine->rank && then.alpha == mine->alpha &&
            then.norms == mine->norms;
        if (then.rank &&
            (!same || (resume ? then.targets != mine->targets : then.targets & ~mine->targets)))
            die("%s %s has other adapters: rank %d, alpha %g, norms %d, targets 0x%x; this run: "
                "%d, %g, %d, 0x%x\n"
                "  hint: the same --lora options; or export it, and adapt that", how, from,
                then.rank, then.alpha, then.norms, then.targets, mine->rank, mine->alpha,
                mine->norms, mine->targets);
        char *base = realpath(then.rank ? then.base : from, NULL);
        if (!base) die("cannot find %s: %s", then.rank ? then.base : from, strerror(errno));
        mine->base = xstrdup(base);
        free(base);
        tr->config.lora = mine->rank, tr->config.lora_targets = mine->targets,
            tr->config.lora_norms = mine->norms;
        tr->state.lora = mine, tr->state.base_sha256 = tr->base_sha256;
    }
    free(then.base);
}

// Sizes: of the checkpoint that the run starts from, otherwise of the preset, changed by single
// options.
static inline void trainer_config(Trainer *tr, const char *from, int resume) {
    const TrainOptions *o = tr->options;
    GptConfig *c = &tr->config;
    if (from) {
        double *scale;
        int tied;
        checkpoint_read_config(from, c, &scale, &tied);
        free(scale);
        const int64_t layers = *o->grow ? c->L : o->layers;            // those of a phase
        const int64_t given[4] = {layers, o->heads, o->channels, o->vocab_size},
            have[4] = {c->L, c->NH, c->C, c->V};
        static const char *const name[4] = {"layers", "heads", "channels", "vocab-size"};
        for (int i = 0; i < 4; i++)
            if (given[i] && given[i] != have[i])
                die("--%s %lld: %s has %lld", name[i], (long long)given[i], from,
                    (long long)have[i]);
        trainer_lora(tr, from, resume);
        tr->T = o->seq_len ? (int)o->seq_len : c->T;
        if (tr->T > c->T)
            die("--seq-len %d: %s has %d positions\n  hint: --seq-len %d is the most", tr->T, from,
                c->T, c->T);
    } else {
        if (o->lora)
            die("--lora without --init-from: there is nothing to adapt\n  hint: --init-from names "
                "a checkpoint's directory");
        *c = gpt_presets[o->preset].config;
        if (tr->manifest[MANIFEST_TRAIN].V) c->V = tr->manifest[MANIFEST_TRAIN].V;
        if (tr->has_tokenizer) c->V = tr->tokenizer.V;
        if (o->vocab_size) c->V = (int)o->vocab_size;
        if (o->layers) c->L = (int)o->layers;
        if (o->heads) c->NH = (int)o->heads;
        if (o->channels) c->C = (int)o->channels;
        if (o->seq_len) c->T = (int)o->seq_len;
        tr->T = c->T;
    }
    tr->depth = !*o->grow || !from ? c->L : o->layers ? (int)o->layers
        : gpt_presets[o->preset].config.L;
    const char *error = gpt_config_error(c);
    if (error)
        die("%s: --layers %d --heads %d --channels %d --seq-len %d --vocab-size %d", error, c->L,
            c->NH, c->C, c->T, c->V);
    for (int i = 0; i < MANIFEST_SIDES; i++) manifest_check_model(&tr->manifest[i], c->V, from);
    if (tr->has_tokenizer && tr->tokenizer.V > c->V)
        die("the tokenizer has %d tokens, the model only %d\n  hint: --vocab-size 0 takes the "
            "tokenizer's", tr->tokenizer.V, c->V);
}

// An integer among the options of a checkpoint's run; 0 if absent.
static inline int64_t trainer_option_then(const char *options, const char *name) {
    char *line = xprintf("\n%s = ", name), *all = xprintf("\n%s", options), *at = strstr(all, line);
    const int64_t value = at ? strtoll(at + strlen(line), NULL, 10) : 0;
    free(line), free(all);
    return value;
}

// The position of a resumed run in its data: after the samples that the checkpoint's run consumed,
// however many rows a step had. Older checkpoints only count tokens; their samples had --seq-len
// each. With another --seq-len all windows change: the run continues after the same number of
// tokens.
static inline void trainer_find_position(Trainer *tr, const char *from) {
    CheckpointState *s = &tr->state, then;
    memset(&then, 0, sizeof then);
    checkpoint_read_trainer(from, &then);
    if (!then.seq_len) then.seq_len = (int)trainer_option_then(then.options, "seq-len");
    if (then.seq_len < 1) then.seq_len = tr->config.T;
    const int64_t tokens = then.consumed < 0 ? then.tokens : then.consumed * then.seq_len;
    s->step = then.step;
    s->consumed = tokens / tr->T + (tokens % tr->T != 0);
    if (then.seq_len != tr->T && tr->rank == 0)
        warn("--seq-len %d, but the checkpoint's run had rows of %d tokens: the samples are others "
             "from here on\n"
             "  hint: the run continues after as many tokens; some text of this epoch comes twice, "
             "some not at all", tr->T, then.seq_len);
    free((char *)(uintptr_t)then.options);
}

// The samples consumed after `step` steps.
static inline double trainer_consumed(const Trainer *tr, int64_t step) {
    return (double)tr->state.consumed + (double)(step - tr->state.step) * tr->M * tr->B;
}

static inline double trainer_epochs(const Trainer *tr) {
    return trainer_consumed(tr, tr->steps) / (double)tr->train.windows;
}

// Micro-batches per step, steps of the run, rows per evaluation. --epochs counts samples: a resumed
// run divides the remaining ones into its own steps.
static inline void trainer_sizes(Trainer *tr) {
    const TrainOptions *o = tr->options;
    tr->B = (int)o->batch;
    const int64_t micro = (int64_t)tr->B * tr->T, least = micro * tr->world,
        total = o->total_batch ? o->total_batch : least;
    if (total % least || total / micro > 1 << 20)
        die("--total-batch %lld tokens cannot be made of micro-batches of %d rows x %d tokens x %d "
            "processes\n"
            "  hint: --total-batch %lld", (long long)total, tr->B, tr->T, tr->world,
            (long long)((total + least - 1) / least * least));
    tr->M = (int)(total / micro);
    tr->steps = o->steps;
    if (o->epochs > 0)
        tr->steps = (int64_t)llround((o->epochs * (double)tr->train.windows -
                                      trainer_consumed(tr, 0)) /
                                     ((double)tr->B * tr->M));
    if (tr->steps < 1)
        die("--epochs %g is less than one step of %lld tokens", o->epochs, (long long)total);
    if (tr->has_val) tr->eval_rows = shards_rows(&tr->val, o->eval_tokens);
    depth_shares_parse(&tr->eval_depths, o->eval_depths);              // has been checked
}

static inline DropPath trainer_drop_path(const TrainOptions *o, int layers, int64_t steps) {
    DropPath d;
    memset(&d, 0, sizeof d);
    d.seed = (uint64_t)o->seed;
    d.layers = layers;
    d.steps = steps;
    d.p_max = o->drop_path;
    d.depth = o->drop_depth;
    d.shape = o->drop_ramp_shape;
    d.unit = o->drop_unit;
    d.branches = o->drop_branches;
    d.sampling = o->drop_sampling;
    d.scale = o->drop_scale;
    d.sync = o->drop_sync;
    d.start = span_steps(o->drop_start, steps);
    d.ramp_from = o->drop_ramp_from;
    d.ramp_up = span_steps(o->drop_ramp_up, steps);
    d.ramp_down = span_steps(o->drop_ramp_down, steps);
    d.recover = span_steps(o->drop_recover, steps);
    d.protect = o->drop_protect;
    if (*o->drop_rates) {
        d.listed = rates_read(d.list, DROP_LAYERS, o->drop_rates);
        if (d.listed != layers)
            die("--drop-rates %s has %d rates: this model has %d layers", o->drop_rates, d.listed,
                layers);
        for (int l = 0; l < layers && d.p_max > 0; l++) d.list[l] /= d.p_max;
    }
    return d;
}

// The schedule of dropout.
static inline Ramp trainer_dropout_ramp(const TrainOptions *o, int64_t steps) {
    Ramp r = {SHAPE_LINEAR, steps, span_steps(o->dropout_start, steps),
              span_steps(o->dropout_ramp_up, steps),
              span_steps(o->dropout_ramp_down, steps), span_steps(o->dropout_recover, steps), 0};
    return r;
}

// AttentionDrop's layers and warm-up, and consistency.
static inline void trainer_attention_drop(Trainer *tr) {
    const TrainOptions *o = tr->options;
    const Ramp warm = {SHAPE_LINEAR, tr->steps, 0, span_steps(o->attentiondrop_warmup, tr->steps),
                       0, 0, 0};
    tr->attention_warm = warm;
    tr->objective.consistency = o->consistency, tr->objective.symmetric = o->consistency_kl;
    if (o->attentiondrop != SCORES_PLAIN)
        tr->attention_layers = layer_list_open("attentiondrop-layers", o->attentiondrop_layers,
                                               tr->depth);
}

static inline Schedule trainer_schedule(const TrainOptions *o, int64_t steps) {
    Schedule s = {o->lr_schedule, o->lr, o->lr_final, steps, span_steps(o->warmup, steps),
                  span_steps(o->lr_decay, steps)};
    return s;
}

// Dies if options that are valid individually do not work together in the type used for computing:
// the largest factor of the moments, which is the first step's, and the remainder after weight
// decay; if all rates of drop path round to 0; or if --eval-depths is not a list of shares.
static inline void trainer_check_numbers(const TrainOptions *o) {
    DepthShares depths;
    const char *wrong = depth_shares_parse(&depths, o->eval_depths);
    if (wrong) die("--eval-depths %s: %s", o->eval_depths, wrong);
    if (depths.n && !*o->val) die("--eval-depths without --val: there is nothing to evaluate on");
    if (!isfinite((real)(o->lr / (1 - o->beta1))))
        die("--lr %g with --beta1 %g: their quotient lr / (1 - beta1) is infinite in " REAL_NAME,
            o->lr, o->beta1);
    if (!isfinite((real)(1 - o->lr * o->weight_decay)))
        die("--lr %g with --weight-decay %g: their product is infinite in " REAL_NAME, o->lr,
            o->weight_decay);
    const double listed = *o->drop_rates ? rates_largest(o->drop_rates) : o->drop_path;
    if (isnan(listed))
        die("--drop-rates %s: a rate in [0,1) for each layer, with commas between them, as "
            "0,0,0.1,0.2", o->drop_rates);
    if (listed != o->drop_path)
        die("--drop-rates %s has the largest rate %g, but --drop-path is %g\n"
            "  hint: leave out --drop-path", o->drop_rates, listed, o->drop_path);
    if (o->drop_path > 0 && o->drop_path * 4294967296.0 < 0.5)
        die("--drop-path %g rounds to 0: rates are multiples of 2^-32\n  hint: 0 is plain training",
            o->drop_path);
}

// Plans recorded in a metrics.jsonl, one per step; their text shows whether the unit is the row.
static inline void trainer_open_replay(Trainer *tr) {
    const char *path = tr->options->drop_replay;
    DropPath drop = tr->drop;
    DropPlan plan = drop_plan_new(tr->depth, tr->B);
    tr->replay = metrics_read(path);
    for (int64_t s = 0; s < tr->replay.n; s++) {
        drop.layers = plan.layers = growth_layers(&tr->growth, tr->depth, s);
        const Metrics *r = &tr->replay.record[s];
        if (r->step != (double)(s + 1) || !r->plan)
            die("%s: line %lld has no plan of step %lld", path, (long long)s + 1, (long long)s + 1);
        for (int m = 0; m < tr->M; m++) {
            const char *error = drop_plan_read(&plan, &drop, s, r->plan, m, tr->B);
            if (error) die("%s, step %lld, micro-batch %d: %s", path, (long long)s + 1, m, error);
        }
    }
    drop_plan_free(&plan);
    if (tr->replay.n < tr->steps)
        die("%s has the plans of %lld steps, this run has %lld", path, (long long)tr->replay.n,
            (long long)tr->steps);
    tr->drop.unit = strchr(tr->replay.record[0].plan, '.') ? UNIT_ROW : UNIT_BATCH;
}

// The phases of --grow, and the depth in which this run starts or resumes: a checkpoint has the
// layers of the step before it.
static inline void trainer_growth(Trainer *tr, const char *from, int resume) {
    const TrainOptions *o = tr->options;
    Growth *g = &tr->growth;
    char *error = growth_parse(g, o->grow, tr->depth, tr->steps);
    if (error) die("%s", error);
    g->init = o->grow_init, g->at = o->grow_at, g->warmup = span_steps(o->grow_warmup, tr->steps);
    if (!g->n) return;
    if (o->lora)
        die("--grow and --lora exclude each other: new layers would be adapters of nothing");
    if (o->train_last)
        die("--grow and --train-last exclude each other: new layers would be trained on frozen "
            "ones");
    const int64_t last = resume && tr->state.step > 0 ? tr->state.step - 1 : 0;
    const int layers = growth_layers(g, tr->depth, last);
    if (from && tr->config.L != layers)
        die("%s has %d layers, but --grow has %d %s", from, tr->config.L, layers,
            resume ? "before its step" : "at step 0");
    tr->config.L = layers;
}

// Counts the training tokens if rows have their own rates.
static inline void trainer_drop_adapt(Trainer *tr) {
    const TrainOptions *o = tr->options;
    if (o->drop_adapt == 0) return;
    if (o->drop_unit != UNIT_ROW)
        die("--drop-adapt needs --drop-unit row: otherwise all rows drop the same branches");
    if (tr->B < 2)
        die("--drop-adapt compares the rows of a micro-batch, which has one\n  hint: --batch 2 or "
            "more");
    tr->difficulty = difficulty_open(&tr->train, tr->config.V, tr->B);
    tr->drop.adapt = o->drop_adapt, tr->drop.rank = tr->difficulty.rank;
}

static inline void trainer_exits(Trainer *tr) {
    const TrainOptions *o = tr->options;
    const Exits e = {o->exit_scale, o->exit_curriculum, (int)o->exit_every, tr->steps};
    if (e.scale > 0 && tr->depth < 3)
        die("--exit-scale %g: a model of %d layer%s has no exit, as layer 0 weighs nothing\n"
            "  hint: --layers 3 or more", e.scale, tr->depth, tr->depth == 1 ? "" : "s");
    tr->exits = e;
    tr->exit_weight = (double *)xcalloc((size_t)tr->depth, sizeof *tr->exit_weight);
}

// The mean number of exits of the run's steps; in a long run, of every n-th step.
static inline double exits_mean(const Exits *e, const Growth *g, int layers) {
    const int64_t every = e->steps / 100000 + 1;
    double sum = 0, n = 0;
    if (!(e->scale > 0)) return 0;
    for (int64_t t = every / 2; t < e->steps; t += every, n++)
        sum += exits_count(e, growth_layers(g, layers, t), t);
    return sum / n;
}

// What exits add to the run's FLOPs, as a fraction of what it costs to train the full model c.
static inline double exits_run_compute(const Exits *e, const Growth *g, const GptConfig *c, int T) {
    return exits_mean(e, g, c->L) * gpt_head_step_flops(c, T) / (3 * gpt_row_flops(c, T));
}

static inline MemoryBound trainer_memory_bound(const Trainer *tr) {
    MemoryBound b;
    DropPath d = tr->drop;
    if (tr->replay.n) d.p_max = 0;                       // recorded plans may exceed it
    drop_path_bound(&d, tr->B, &b.attn_rows, &b.mlp_rows, &b.rows);
    b.exits = exits_most(&tr->exits, tr->config.L);
    const int sides = trainer_sides(tr);
    b.attn_rows *= sides, b.mlp_rows *= sides, b.rows *= sides;
    return b;
}

// Locks the output directory for this process, until it ends.
static inline void trainer_lock(Trainer *tr) {
    if (tr->lock >= 0) return;
    files_die(lock_take(&tr->lock, tr->options->out));
    tr->directory = file_open_read(tr->options->out);
    if (tr->directory < 0) die("cannot open %s: %s", tr->options->out, strerror(errno));
}

// A new run needs a directory without a run: its checkpoints would replace or be mixed with the old
// ones.
static inline void trainer_refuse_used(const char *out, const char *hint) {
    char *metrics = xprintf("%s/metrics.jsonl", out);
    CheckpointList list = checkpoint_list(out);
    if (path_must_exist_or_not(metrics) || list.n)
        die("%s holds a run already\n  hint: %s", out, hint);
    free(metrics), free(list.step);
}

// Where the run starts: a checkpoint of ours to resume (*resume = 1), weights to start from, or
// nothing (NULL).
static inline char *trainer_start(Trainer *tr, int *resume) {
    const TrainOptions *o = tr->options;
    *resume = 0;
    if (o->dry_run) {                                    // read-only
        char *from = !*o->resume ? NULL : strcmp(o->resume, "latest") ? xstrdup(o->resume)
            : checkpoint_latest(o->out);
        *resume = from != NULL;
        return from || !*o->init_from ? from : checkpoint_find(o->init_from);
    }
    // Decisions that depend on the directory are made under its lock: another run may begin and end
    // meanwhile.
    lock_directory_make(o->out);
    trainer_lock(tr);
    if (!*o->resume) {
        trainer_refuse_used(o->out, "--resume continues it; another --out starts a new one");
        return *o->init_from ? checkpoint_find(o->init_from) : NULL;
    }
    checkpoint_recover(o->out);
    char *from = strcmp(o->resume, "latest") ? xstrdup(o->resume) : checkpoint_latest(o->out);
    if (from && !strcmp(o->resume, "latest")) checkpoint_settle(o->out, strrchr(from, '/') + 1);
    *resume = from != NULL;
    if (!from) {
        char *latest = xprintf("%s/latest", o->out);     // created with the first checkpoint
        if (path_exists(latest))
            die("%s is there, but no checkpoint\n  hint: they were moved or removed: bring one "
                "back, or give another --out", latest);
        free(latest);
        printf("resume: no checkpoint in %s yet, starting at step 0\n", o->out);
    }
    return from || !*o->init_from ? from : checkpoint_find(o->init_from);
}

// Rank 0 decides where to start, and the others follow: it might have written something before they
// look.
static inline char *trainer_start_together(Trainer *tr, int *resume) {
    struct { int some, resume; char path[4096]; } found;
    char *from = NULL;
    memset(&found, 0, sizeof found);
    if (tr->rank == 0) {
        from = trainer_start(tr, &found.resume);
        found.some = from != NULL;
        if (from && strlen(from) >= sizeof found.path) die("this path is too long: %s", from);
        if (from) strcpy(found.path, from);
        free(from);
    }
    comm_broadcast(tr->comm, &found, sizeof found);
    *resume = found.resume;
    return found.some ? xstrdup(found.path) : NULL;
}

// One warning if resumed options differ from the checkpoint's: allowed, but no longer the same run.
static inline void trainer_compare_options(const char *now, const char *then) {
    static const char *const free_to_change[] = {"out", "threads", "eval-every", "eval-tokens",
                                                 "eval-depths", "save-every", "keep",
                                                 "log-every", "sample-every", "sample-tokens",
                                                 "prompt", "val", "init-from", "teacher",
                                                 "zero", "graphs", "on-save-error", "max-bad-steps",
                                                 "selfcheck"};
    Text changed = {NULL, 0, 0};
    for (const char *line = now, *end; *line; line = end + 1) {
        end = strchr(line, '\n');
        const size_t n = (size_t)(end - line), name = strcspn(line, " =#");
        int ignored = name == 0 || name > n;
        for (size_t i = 0; i < sizeof free_to_change / sizeof free_to_change[0]; i++)
            ignored |= name == strlen(free_to_change[i]) && !strncmp(line, free_to_change[i], name);
        char *whole = xprintf("\n%.*s\n", (int)n, line), *all = xprintf("\n%s", then);
        if (!ignored && !strstr(all, whole))
            text_printf(&changed, "%s--%.*s", changed.n ? ", " : "", (int)name, line);
        free(whole);
        free(all);
    }
    if (changed.n)
        warn("resumed with other options than the checkpoint was made with: %s", changed.s);
    text_free(&changed);
}

// A checkpoint's description of the shards, as a comment after its options.
static inline void trainer_describe_data(Trainer *tr) {
    char hex[SHA256_HEX];
    shards_fingerprint(&tr->train, hex);
    tr->data_line = xprintf("# train: %d shard%s, %lld tokens, %.16s\n", tr->train.n,
                            tr->train.n == 1 ? "" : "s", (long long)tr->train.tokens, hex);
    tr->run_text = xprintf("%s%s%s%s%s", tr->config_text, *tr->options->teacher ? "# teacher: "
                           : "", tr->teacher.sha256, *tr->options->teacher ? "\n" : "",
                           tr->data_line);
}

// One warning if the shards differ from the checkpoint's: then sample i is a different one. Older
// checkpoints do not record them.
static inline void trainer_compare_data(const Trainer *tr, const char *then) {
    const char *line = strstr(then, "\n# train: ");
    if (!line || !strcmp(line + 1, tr->data_line)) return;
    warn("the training shards have changed since the checkpoint: they were %.*s, now %.*s\n"
         "  hint: samples come in another order from here on; with the shards of before it would "
         "be the same run", (int)strcspn(line + 10, "\n"), line + 10,
         (int)strcspn(tr->data_line + 9, "\n"), tr->data_line + 9);
}

// The same for the teacher's weights, wherever they are now.
static inline void trainer_compare_teacher(const Trainer *tr, const char *then) {
    const char *line = strstr(then, "\n# teacher: ");
    if (!line || !*tr->options->teacher) return;
    if (strncmp(line + strlen("\n# teacher: "), tr->teacher.sha256, SHA256_HEX - 1))
        warn("--teacher %s has other weights than the checkpoint's run was taught by",
             tr->options->teacher);
}

// Resuming from an older checkpoint into a directory with later ones would mix two runs: the next
// --resume would use a later one.
static inline void trainer_refuse_later(const Trainer *tr) {
    CheckpointList list = checkpoint_list(tr->options->out);
    if (list.n && list.step[0] > tr->state.step)
        die("%s has a checkpoint of step %lld, after the %lld to resume from\n  hint: give another "
            "--out, or move that checkpoint away", tr->options->out, (long long)list.step[0],
            (long long)tr->state.step);
    free(list.step);
}

// Removes the checkpoints that --keep does not keep, on rank 0: after a save, and when the newest
// has been read again, for the run may have been killed between its save and this. During a series
// of non-finite steps all stay: an older one may be the last good one.
static inline void trainer_prune(const Trainer *tr) {
    if (tr->rank || tr->state.bad_steps || tr->options->dry_run) return;
    checkpoint_prune(tr->options->out, tr->options->keep, tr->state.step);
}

// All ranks must run the same options.
static inline void trainer_agree(const Trainer *tr) {
    char mine[SHA256_HEX], first[SHA256_HEX];
    sha256_hex(mine, tr->config_text, strlen(tr->config_text));
    memcpy(first, mine, sizeof first);
    comm_broadcast(tr->comm, first, sizeof first);
    if (strcmp(first, mine))
        die("rank %d has other options than rank 0\n  hint: start all ranks with the same command "
            "and the same files", tr->rank);
}

// The weights to start from. If they were trained with survival scaling, their branches are scaled
// in evaluation (tied: both branches of a layer together). A run that does not use survival scaling
// itself gets these factors folded into the weights, as in build/export; tied ones cannot be
// expressed by weights.
static inline void trainer_load_weights(Trainer *tr, const char *from) {
    const GptConfig *c = &tr->config;
    GptConfig same;
    double *scale;
    int tied, factors = 0;
    free(checkpoint_check_weights(from));
    if (c->lora) engine_init_adapters(tr->engine, tr->model, c, (uint64_t)tr->options->seed);
    checkpoint_load_weights(from, tr->engine, tr->model, c);
    checkpoint_read_config(from, &same, &scale, &tied);
    for (int i = 0; i < BRANCHES * c->L; i++) factors |= scale[i] != 1;
    if (factors && c->lora)
        die("%s was trained with --drop-scale survival: its weights alone are no base of adapters\n"
            "  hint: build/export folds the factors into them", from);
    const int keeps = tr->drop.scale == SCALE_SURVIVAL && tr->drop.p_max > 0;
    for (int p = 0; factors && !tied && !keeps && p < N_PARAMS; p++) {
        real *host = (real *)xcalloc(gpt_param_size(c, p), sizeof *host);
        for (int l = 0; gpt_param_ends_branch(p) && l < c->L; l++) {
            tr->engine->read(tr->model, SLOT_PARAM, p, l, host);
            for (size_t i = 0; i < gpt_param_size(c, p); i++)
                host[i] = (real)((double)host[i] * scale[BRANCHES * l + gpt_param[p].branch]);
            tr->engine->write(tr->model, SLOT_PARAM, p, l, host);
        }
        free(host);
    }
    if (factors && !keeps && tr->rank == 0) {
        if (tied)
            warn("%s was trained with --drop-scale survival and --drop-branches tied: this run "
                 "continues without its factors\n"
                 "  hint: give it these two options as well", from);
        else printf("%s: its survival scaling goes into the weights\n", from);
    }
    free(scale);
}

// Whether the next step is the first of a phase with more layers.
static inline int trainer_growth_due(const Trainer *tr) {
    return tr->state.step < tr->steps &&
           growth_layers(&tr->growth, tr->depth, tr->state.step) != tr->config.L;
}

// The branches' factors in evaluation at the current step.
static inline void trainer_eval_scale(Trainer *tr) {
    for (int i = 0; i < BRANCHES * tr->config.L; i++)
        tr->state.eval_scale[i] = drop_path_eval_scale(&tr->drop, i / BRANCHES + 1, i % BRANCHES) *
                                  (trainer_growth_due(tr) ? 1 : growth_scale(&tr->growth,
                                      i / BRANCHES, tr->state.step));
}

// The run's teacher: on every rank, beside the student.
static inline void trainer_open_teacher(Trainer *tr) {
    const TrainOptions *o = tr->options;
    EngineArgs args;
    if (!*o->teacher) return;
    memset(&args, 0, sizeof args);
    args.B = trainer_sides(tr) * tr->B, args.T = tr->T, args.threads = (int)o->threads,
        args.dtype = trainer_dtype(tr->engine, o), args.comm = tr->comm, args.dry = o->dry_run;
    if (o->align == ALIGN_ATTENTION)
        tr->align_layers = layer_list_open("align-layers", o->align_layers, tr->depth);
    teacher_open(&tr->teacher, tr->engine, o->teacher, args, tr->config.V,
                 tr->has_tokenizer ? &tr->tokenizer : NULL, tr->align_layers,
                 tr->growth.n ? 1 : tr->depth, tr->depth,
                 o->align == ALIGN_ATTRIBUTION && !*o->align_scores);
    tr->objective.teacher = tr->teacher.model, tr->objective.distill = o->distill,
        tr->objective.temperature = o->distill_temperature;
    if (o->align != ALIGN_ATTENTION) return;
    tr->align_pairs = (int *)xcalloc((size_t)tr->depth, sizeof(int));
    tr->objective.align = &tr->align;
}

// What --align attribution needs on every rank.
static inline void trainer_open_attribution(Trainer *tr) {
    const TrainOptions *o = tr->options;
    const size_t V = (size_t)tr->config.V;
    if (o->align != ALIGN_ATTRIBUTION) return;
    if (trainer_dtype(tr->engine, o) != DTYPE_FP32)
        die("--align attribution takes differences of gradients\n  hint: --dtype fp32");
    tr->attribution = attribution_new((size_t)tr->B, (size_t)tr->T, &tr->config);
    tr->align_target = (double *)xcalloc((size_t)tr->B * (size_t)tr->T, sizeof(double));
    if (!*o->align_scores) return;
    FileMap map;
    tr->token_scores = (double *)xcalloc(V, sizeof(double));
    const char *error = file_map(&map, o->align_scores);
    if (error) die("cannot read %s: %s", o->align_scores, error);
    if ((error = scores_parse(tr->token_scores, tr->config.V, map.data, map.size)))
        die("--align-scores %s: %s\n  hint: %d numbers, one for each token", o->align_scores, error,
            tr->config.V);
    file_unmap(&map);
}

// The teacher's layer beside each of the current layers that is trained and to be compared.
static inline void trainer_pair_layers(Trainer *tr) {
    const int L = tr->config.L;
    tr->align.teacher = tr->teacher.model, tr->align.layer = tr->align_pairs;
    tr->align.kl = tr->options->align_loss, tr->align.layers = 0;
    for (int l = 0; l < L; l++) {
        const int compared = l >= tr->drop.frozen && tr->align_layers[l];
        tr->align_pairs[l] = compared ? teacher_layer(&tr->teacher, l, L) : -1;
        tr->align.layers += compared;
    }
    if (!tr->align.layers) tr->align.layers = 1;         // of those that do not exist yet
}

// The engine's model, and everything whose size depends on the current layers.
static inline void trainer_open_model(Trainer *tr) {
    const TrainOptions *o = tr->options;
    const size_t branches = (size_t)(BRANCHES * tr->config.L);
    EngineArgs args;
    memset(&args, 0, sizeof args);
    tr->drop.layers = tr->config.L;
    tr->plan = drop_plan_new(tr->config.L, tr->B);
    args.B = trainer_sides(tr) * tr->B, args.T = tr->T, args.threads = (int)o->threads,
        args.dtype = trainer_dtype(tr->engine, o);
    args.score_rows = o->attentiondrop != SCORES_PLAIN, args.twins = trainer_sides(tr) > 1;
    args.align = o->align == ALIGN_ATTENTION;
    if (args.align) trainer_pair_layers(tr);
    if (args.twins) tr->twins = drop_plan_new(tr->config.L, args.B);
    args.bound = trainer_memory_bound(tr), args.recompute = o->recompute,
        args.frozen = tr->state.frozen = tr->drop.frozen;
    args.attention_noise = o->dropout_attn > 0, args.lora_noise = tr->lora.dropout > 0;
    if (tr->lora.rank) args.lora_scale = tr->lora.alpha / tr->lora.rank;
    args.comm = tr->comm, args.zero = o->zero, args.reduce_fp32 = o->reduce_fp32;
    args.graphs = o->graphs, args.rounding = o->rounding, args.seed = (uint64_t)o->seed,
        args.dry = o->dry_run;
    tr->kept = (int *)xcalloc(branches, sizeof(int));
    tr->reduce = (unsigned char *)xcalloc(branches + 1, 1);
    tr->adamw_steps = (int64_t *)xcalloc(branches + 1, sizeof(int64_t));
    tr->state.adamw_steps = (int64_t *)xcalloc(branches + 1, sizeof(int64_t));
    tr->state.eval_scale = (double *)xcalloc(branches, sizeof(double));
    trainer_eval_scale(tr);
    tr->model = engine_open(tr->engine, &tr->config, &args);
}

// Lets the engine measure and choose before the first step. The choices are kept in the run's
// directory; a run that resumes another directory's checkpoint makes that run's choices.
static inline void trainer_tune(Trainer *tr) {
    if (!tr->engine->tune) return;
    TuneArgs args;
    char *file = xprintf("%s/matmuls.txt", tr->options->out),
        *before = xprintf("%s/../matmuls.txt", tr->whole ? tr->whole : "");
    memset(&args, 0, sizeof args);
    args.file = file, args.before = tr->whole ? before : NULL;
    args.by_rows = tr->drop.p_max > 0 && tr->drop.unit == UNIT_ROW;
    tr->engine->tune(tr->model, &args);
    free(file), free(before);
}

static inline void trainer_close_model(Trainer *tr) {
    tr->engine->close(tr->model);
    drop_plan_free(&tr->plan), drop_plan_free(&tr->twins);
    free(tr->kept), free(tr->reduce), free(tr->adamw_steps), free(tr->state.adamw_steps),
        free(tr->state.eval_scale);
}

static inline void trainer_grow(Trainer *tr) {
    const int before = tr->config.L, after = growth_layers(&tr->growth, tr->depth, tr->state.step);
    GrowthState state = growth_take(tr->engine, tr->model, &tr->config);
    int64_t *counts = tr->state.adamw_steps;
    tr->state.adamw_steps = NULL;
    trainer_close_model(tr);
    tr->config.L = after;
    trainer_open_model(tr);
    growth_give(&state, &tr->growth, tr->engine, tr->model, &tr->config, tr->depth,
                (uint64_t)tr->options->seed);
    growth_counts(tr->state.adamw_steps, counts, &tr->growth, before, after);
    tr->engine->resumed(tr->model, tr->state.adamw_steps);
    free(counts);
    if (tr->rank == 0 && !tr->options->dry_run)
        printf("grows:   from %d to %d layers at step %lld\n", before, after,
               (long long)tr->state.step);
}

static inline void trainer_open(Trainer *tr, const Engine *engine, const TrainOptions *o,
                                const char *config_text, Comm *comm) {
    memset(tr, 0, sizeof *tr);
    tr->options = o;
    tr->config_text = config_text;
    tr->engine = engine;
    tr->comm = comm;
    tr->directory = tr->lock = tr->metrics.fd = -1;
    tr->rank = comm ? comm->rank : 0;
    tr->world = comm ? comm->world : *o->device ? gpu_wish(o->device).ranks : 1;
    if (!*o->train)
        die("--train is missing\n  hint: --train 'data/train_*.bin'; data/README.md tells how to "
            "make token shards");
    if (!*o->out)
        die("--out is empty\n  hint: the directory of this run's checkpoints and metrics.jsonl");
    trainer_check_numbers(o);
    trainer_check_lora(o);
    teacher_check(o);
    attention_drop_check(o);
    int resume;
    trainer_agree(tr);
    char *from = trainer_start_together(tr, &resume);
    trainer_open_tokenizer(tr, from);
    trainer_config(tr, from, resume);
    shards_open(&tr->train, o->train, tr->T, tr->config.V);
    tr->has_val = *o->val != 0;
    if (tr->has_val) shards_open(&tr->val, o->val, tr->T, tr->config.V);
    manifest_check_shards(&tr->manifest[MANIFEST_TRAIN], &tr->train);
    if (tr->has_val) manifest_check_shards(&tr->manifest[MANIFEST_VAL], &tr->val);
    if (resume) trainer_find_position(tr, from);
    if (tr->lora.rank && tr->rank == 0 && !o->dry_run)
        lora_base_sha256(tr->base_sha256, tr->lora.base);
    trainer_sizes(tr);
    trainer_growth(tr, from, resume);
    trainer_attention_drop(tr);
    trainer_open_teacher(tr);
    trainer_open_attribution(tr);
    trainer_describe_data(tr);
    tr->drop = trainer_drop_path(o, tr->depth, tr->steps);
    tr->drop.layers = tr->config.L;
    trainer_drop_adapt(tr);
    tr->dropout = trainer_dropout_ramp(o, tr->steps);
    tr->objective.smoothing = o->label_smoothing;
    trainer_exits(tr);
    tr->schedule = trainer_schedule(o, tr->steps);
    if (o->train_last > tr->config.L)
        die("--train-last %lld: this model has %d layers\n  hint: --train-last 0 trains all",
            (long long)o->train_last, tr->config.L);
    if (o->train_last) tr->drop.frozen = tr->config.L - (int)o->train_last;
    if (*o->drop_replay) trainer_open_replay(tr);
    const size_t BT = (size_t)trainer_sides(tr) * (size_t)tr->B * (size_t)tr->T;
    tr->tokens = (int *)xcalloc(BT, sizeof(int));
    tr->targets = (int *)xcalloc(BT, sizeof(int));
    tr->losses = (real *)xcalloc(BT, sizeof(real));
    tr->micro = (double *)xcalloc((size_t)tr->M, sizeof(double));
    tr->state.tied = drop_path_tied(&tr->drop);
    const Manifest *made = &tr->manifest[MANIFEST_TRAIN];
    tr->state.eot = tr->has_tokenizer ? tr->tokenizer.eot : made->V ? made->eot : -1;
    tr->state.tokenizer_sha256 = made->sha256;
    if (tr->rank == 0 && !o->dry_run) trainer_take_tokenizer(tr);
    trainer_open_model(tr);
    if (o->dry_run) {}                                   // no weights
    else if (resume) {
        const int64_t consumed = tr->state.consumed;
        checkpoint_load(from, engine, tr->model, &tr->config, &tr->state);
        tr->state.consumed = consumed;                   // in rows of this run
        if (!strcmp(o->resume, "latest")) trainer_prune(tr);
        else if (tr->rank == 0) trainer_refuse_later(tr);
        if (tr->rank == 0)
            trainer_compare_options(config_text, tr->state.options),
                trainer_compare_data(tr, tr->state.options),
                trainer_compare_teacher(tr, tr->state.options);
        free((char *)(uintptr_t)tr->state.options);
    } else if (from) trainer_load_weights(tr, from);
    else engine_init_layers(engine, tr->model, &tr->config, tr->depth, (uint64_t)o->seed);
    tr->state.options = tr->run_text;
    tr->state.seq_len = tr->T;
    if (resume) tr->whole = xstrdup(from);
    trainer_eval_scale(tr);
    if (from && tr->rank == 0 && !o->dry_run)
        printf("%s: %s\n", resume ? "resumed" : "weights", from);
    free(from);
}

static inline void trainer_close(Trainer *tr) {
    trainer_close_model(tr);
    teacher_close(&tr->teacher, tr->engine);
    shards_close(&tr->train);
    if (tr->has_val) shards_close(&tr->val);
    if (tr->has_tokenizer) tokenizer_free(&tr->tokenizer);
    for (int i = 0; i < MANIFEST_SIDES; i++) manifest_free(&tr->manifest[i]);
    metrics_log_free(&tr->replay);
    text_free(&tr->plan_text);
    free(tr->tokens), free(tr->targets), free(tr->losses), free(tr->micro), free(tr->exit_weight);
    difficulty_free(&tr->difficulty);
    free(tr->attention_layers), free(tr->align_layers), free(tr->align_pairs);
    attribution_free(&tr->attribution);
    free(tr->token_scores), free(tr->align_target);
    free(tr->data_line), free(tr->run_text), free(tr->whole), free(tr->report),
        free(tr->tokenizer_path);
    free(tr->lora.base);
    tokenizer_files_free(&tr->tokenizer_files);
    metrics_file_close(&tr->metrics);
    lock_release(&tr->lock);
    if (tr->directory >= 0) close(tr->directory);
}

#endif
