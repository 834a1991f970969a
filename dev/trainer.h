// trainer.h: the training loop, written once against engine.h: data order, gradient accumulation, schedules, drop path,
// evaluation, checkpoints, resume, samples, metrics. `main` is one call: trainer_main(argc, argv, &engine).
//
// Several processes (comm.h) run the same loop: rank r of W has micro-batches r, r + W, ... of each step and every W-th
// batch of an evaluation. Whatever decides something is the same bits on all of them; rank 0 alone prints and writes.
#ifndef TRAINER_H
#define TRAINER_H

#include "check.h"
#include "checkpoint.h"
#include "drop_path.h"
#include "engine.h"
#include "gpu_model.h"
#include "lock.h"
#include "manifest.h"
#include "metrics.h"
#include "numbers.h"
#include "options.h"
#include "sample.h"
#include "schedule.h"
#include "selfcheck.h"
#include "shards.h"
#include "signals.h"
#include "tokenizer.h"
#include <sys/resource.h>

typedef struct {
    const TrainOptions *options;
    const char *program;                                 // how it was called, to be called so again
    const char *config_text;                             // the options as config.txt
    char *data_line, *run_text;                          // what the train shards are; both together, for checkpoints
    const Engine *engine;
    Model *model;
    GptConfig config;
    DropPath drop;
    Ramp dropout;                                        // when it is on
    Noise noise;                                         // of the pass under way
    Objective objective;                                 // of every training pass
    Schedule schedule;
    Shards train, val;
    Tokenizer tokenizer;
    char *tokenizer_path;                                // NULL: none
    TokenizerFiles tokenizer_files;                      // for checkpoints, on rank 0
    Manifest manifest[MANIFEST_SIDES];                   // of the train and val shards; V = 0 where there is none
    int has_val, has_tokenizer;
    Comm *comm;                                          // NULL: alone
    int rank, world;                                     // this process among equal ones; they share a step's micro-batches
    int B, T, M;                                         // rows and tokens of a micro-batch, micro-batches of a step
    int64_t steps, eval_rows;
    MetricsLog replay;
    double peak_flops;                                   // per second, measured

    CheckpointState state;
    char *whole;                                         // the newest checkpoint that this run knows: it is from there, or
                                                         // has written it; NULL: none
    char *report;                                        // of the last step that was not finite; NULL: none
    int bad_micro;                                       // this rank's first micro-batch of the step whose loss is not finite,
    int bad_forward;                                     // or -1; and what numbers_finite_branches says of it
    DropPlan plan;
    int *tokens, *targets;                               // (B,T)
    real *losses;                                        // (B,T)
    double *micro;                                       // (M) losses of the current step's micro-batches
    int *kept;                                           // (2L) rows of the current step that ran each branch, on any rank
    unsigned char *reduce;                               // (2L+1) whether any did: these gradients are to be summed
    int64_t *adamw_steps;                                // (2L+1) what this update uses
    Text plan_text;
    MetricsFile metrics;
    int metrics_wait;                                    // the last attempt to write to it has failed
    int console_lost;                                    // and so has one to write to standard output
    int directory, lock;                                 // the output directory and its lock, on rank 0; -1: not taken
    int stop, save_now;                                  // what a signal has asked for, all ranks agreeing
} Trainer;

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

// ---- Before all else: does this machine compute what it should? ----

// Each rank checks itself, on its own device; all learn if one is wrong, and end with code 4.
static inline void trainer_selfcheck(const Engine *engine, const TrainOptions *o, Comm *comm) {
    Selfcheck got;
    EngineArgs args;
    if (!o->selfcheck) return;
    memset(&args, 0, sizeof args);
    args.threads = (int)o->threads, args.dtype = trainer_dtype(engine, o), args.recompute = o->recompute, args.comm = comm;
    selfcheck_run(&got, engine, args);
    char *wrong = selfcheck_judge(&got, &selfcheck_numbers, args.dtype, NULL);
    double failed = wrong != NULL;
    if (wrong) {
        fflush(stdout);
        fprintf(stderr, "error: the self-check of %s has failed on rank %d: %s\n  hint: this machine or this build computes "
                "wrong numbers: make clean and build again, or try another machine; --selfcheck 0 trains all the same\n",
                engine->name, comm ? comm->rank : 0, wrong);
    }
    free(wrong);
    comm_sum(comm, &failed, 1);
    if (failed == 0) return;
    comm_close(comm);
    exit(4);
}

// ---- From options to a run: everything that can be refused is refused here, before anything is written ----

// The tokenizer that is named, else that beside the shards, else that of the model `from` (NULL: a new one), which may have
// been moved away from its shards.
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
    for (int i = 0; i < MANIFEST_SIDES; i++) manifest_check_tokenizer(&tr->manifest[i], &tr->tokenizer, path);
    tr->has_tokenizer = 1;
    tr->tokenizer_path = path;
}

// The tokenizer's files for the checkpoints, whatever becomes of those that they are from.
static inline void trainer_take_tokenizer(Trainer *tr) {
    const char *near = tr->tokenizer_path ? tr->tokenizer_path : tr->options->train;
    size_t n = tr->tokenizer_path ? strlen(near) : strcspn(near, ",");
    while (n > 0 && near[n - 1] != '/') n--;
    char *beside = xprintf("%.*s", (int)n, near);
    char *wrong = tokenizer_files_take(&tr->tokenizer_files, tr->has_tokenizer ? &tr->tokenizer : NULL, tr->tokenizer_path,
                                       beside, tr->config.V, tr->config.T, tr->state.eot);
    if (wrong && !tr->tokenizer_files.file[TOKENIZER_JSON].n)
        warn("checkpoints are without a tokenizer.json for transformers: %s", wrong);
    tr->state.tokenizer = &tr->tokenizer_files;
    free(beside), free(wrong);
}

// Sizes: of the checkpoint that the run starts from, else of the preset, changed by single options.
static inline void trainer_config(Trainer *tr, const char *from) {
    const TrainOptions *o = tr->options;
    GptConfig *c = &tr->config;
    if (from) {
        double *scale;
        int tied;
        checkpoint_read_config(from, c, &scale, &tied);
        free(scale);
        const int64_t given[4] = {o->layers, o->heads, o->channels, o->vocab_size}, have[4] = {c->L, c->NH, c->C, c->V};
        static const char *const name[4] = {"layers", "heads", "channels", "vocab-size"};
        for (int i = 0; i < 4; i++)
            if (given[i] && given[i] != have[i])
                die("--%s %lld: %s has %lld", name[i], (long long)given[i], from, (long long)have[i]);
        tr->T = o->seq_len ? (int)o->seq_len : c->T;
        if (tr->T > c->T) die("--seq-len %d: %s has %d positions\n  hint: --seq-len %d is the most", tr->T, from, c->T, c->T);
    } else {
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
    const char *error = gpt_config_error(c);
    if (error)
        die("%s: --layers %d --heads %d --channels %d --seq-len %d --vocab-size %d", error, c->L, c->NH, c->C, c->T, c->V);
    for (int i = 0; i < MANIFEST_SIDES; i++) manifest_check_model(&tr->manifest[i], c->V, from);
    if (tr->has_tokenizer && tr->tokenizer.V > c->V)
        die("the tokenizer has %d tokens, the model only %d\n  hint: --vocab-size 0 takes the tokenizer's", tr->tokenizer.V,
            c->V);
}

// A whole number among the options of a checkpoint's run; 0 where it is not there.
static inline int64_t trainer_option_then(const char *options, const char *name) {
    char *line = xprintf("\n%s = ", name), *all = xprintf("\n%s", options), *at = strstr(all, line);
    const int64_t value = at ? strtoll(at + strlen(line), NULL, 10) : 0;
    free(line), free(all);
    return value;
}

// Where a resumed run stands in its data: after the samples that the checkpoint's run has consumed,
// however many rows a step had. Older checkpoints count tokens only; their samples had --seq-len each.
// With another --seq-len all windows are others: the run continues after as many tokens.
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
        warn("--seq-len %d, but the checkpoint's run had rows of %d tokens: the samples are others from here on\n"
             "  hint: the run continues after as many tokens; some text of this epoch comes twice, some not at all",
             tr->T, then.seq_len);
    free((char *)(uintptr_t)then.options);
}

// The samples consumed when `step` steps are done.
static inline double trainer_consumed(const Trainer *tr, int64_t step) {
    return (double)tr->state.consumed + (double)(step - tr->state.step) * tr->M * tr->B;
}

static inline double trainer_epochs(const Trainer *tr) {
    return trainer_consumed(tr, tr->steps) / (double)tr->train.windows;
}

// Micro-batches of a step, steps of the run, rows of an evaluation. --epochs counts samples: a resumed
// run divides those that are left into its own steps.
static inline void trainer_sizes(Trainer *tr) {
    const TrainOptions *o = tr->options;
    tr->B = (int)o->batch;
    const int64_t micro = (int64_t)tr->B * tr->T, least = micro * tr->world, total = o->total_batch ? o->total_batch : least;
    if (total % least || total / micro > 1 << 20)
        die("--total-batch %lld tokens cannot be made of micro-batches of %d rows x %d tokens x %d processes\n"
            "  hint: --total-batch %lld", (long long)total, tr->B, tr->T, tr->world,
            (long long)((total + least - 1) / least * least));
    tr->M = (int)(total / micro);
    tr->steps = o->steps;
    if (o->epochs > 0)
        tr->steps = (int64_t)llround((o->epochs * (double)tr->train.windows - trainer_consumed(tr, 0)) /
                                     ((double)tr->B * tr->M));
    if (tr->steps < 1) die("--epochs %g is less than one step of %lld tokens", o->epochs, (long long)total);
    if (tr->has_val) tr->eval_rows = shards_rows(&tr->val, o->eval_tokens);
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
    return d;
}

// When dropout is on.
static inline Ramp trainer_dropout_ramp(const TrainOptions *o, int64_t steps) {
    Ramp r = {SHAPE_LINEAR, steps, span_steps(o->dropout_start, steps), span_steps(o->dropout_ramp_up, steps),
              span_steps(o->dropout_ramp_down, steps), span_steps(o->dropout_recover, steps), 0};
    return r;
}

static inline Schedule trainer_schedule(const TrainOptions *o, int64_t steps) {
    Schedule s = {o->lr_schedule, o->lr, o->lr_final, steps, span_steps(o->warmup, steps), span_steps(o->lr_decay, steps)};
    return s;
}

// Dies where options that are sound one by one are none together in the type that computes with them: the largest factor of
// the moments, which is that of the first step, and what weight decay leaves; or where the rates of drop path all round to 0.
static inline void trainer_check_numbers(const TrainOptions *o) {
    if (!isfinite((real)(o->lr / (1 - o->beta1))))
        die("--lr %g with --beta1 %g: their quotient lr / (1 - beta1) is infinite in " REAL_NAME, o->lr, o->beta1);
    if (!isfinite((real)(1 - o->lr * o->weight_decay)))
        die("--lr %g with --weight-decay %g: their product is infinite in " REAL_NAME, o->lr, o->weight_decay);
    if (o->drop_path > 0 && o->drop_path * 4294967296.0 < 0.5)
        die("--drop-path %g rounds to 0: rates are multiples of 2^-32\n  hint: 0 is plain training", o->drop_path);
}

// Plans recorded in a metrics.jsonl, one per step; their text says whether their unit is the row.
static inline void trainer_open_replay(Trainer *tr) {
    const char *path = tr->options->drop_replay;
    tr->replay = metrics_read(path);
    for (int64_t s = 0; s < tr->replay.n; s++) {
        const Metrics *r = &tr->replay.record[s];
        if (r->step != (double)(s + 1) || !r->plan)
            die("%s: line %lld has no plan of step %lld", path, (long long)s + 1, (long long)s + 1);
        for (int m = 0; m < tr->M; m++) {
            const char *error = drop_plan_read(&tr->plan, &tr->drop, s, r->plan, m, tr->B);
            if (error) die("%s, step %lld, micro-batch %d: %s", path, (long long)s + 1, m, error);
        }
    }
    if (tr->replay.n < tr->steps)
        die("%s has the plans of %lld steps, this run has %lld", path, (long long)tr->replay.n, (long long)tr->steps);
    tr->drop.unit = strchr(tr->replay.record[0].plan, '.') ? UNIT_ROW : UNIT_BATCH;
}

static inline MemoryBound trainer_memory_bound(const Trainer *tr) {
    MemoryBound b;
    DropPath d = tr->drop;
    if (tr->replay.n) d.p_max = 0;                       // recorded plans keep no promise
    drop_path_bound(&d, tr->B, &b.attn_rows, &b.mlp_rows, &b.rows);
    return b;
}

// The output directory is this process' alone, until it ends.
static inline void trainer_lock(Trainer *tr) {
    if (tr->lock >= 0) return;
    files_die(lock_take(&tr->lock, tr->options->out));
    tr->directory = file_open_read(tr->options->out);
    if (tr->directory < 0) die("cannot open %s: %s", tr->options->out, strerror(errno));
}

// A new run wants a directory without one: its checkpoints would replace that one's, or be mixed with them.
static inline void trainer_refuse_used(const char *out, const char *hint) {
    char *metrics = xprintf("%s/metrics.jsonl", out);
    CheckpointList list = checkpoint_list(out);
    if (path_must_exist_or_not(metrics) || list.n) die("%s holds a run already\n  hint: %s", out, hint);
    free(metrics), free(list.step);
}

// Where the run starts: a checkpoint of ours to resume (*resume = 1), weights to start from, or nothing (NULL).
static inline char *trainer_start(Trainer *tr, int *resume) {
    const TrainOptions *o = tr->options;
    *resume = 0;
    if (o->dry_run) {                                    // looks only
        char *from = !*o->resume ? NULL : strcmp(o->resume, "latest") ? xstrdup(o->resume) : checkpoint_latest(o->out);
        *resume = from != NULL;
        return from || !*o->init_from ? from : checkpoint_find(o->init_from);
    }
    // What is decided from the directory is decided under its lock: another run may begin and end meanwhile.
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
        char *latest = xprintf("%s/latest", o->out);     // is made with the first checkpoint
        if (path_exists(latest))
            die("%s is there, but no checkpoint\n  hint: they were moved or removed: bring one back, or give another --out",
                latest);
        free(latest);
        printf("resume: no checkpoint in %s yet, starting at step 0\n", o->out);
    }
    return from || !*o->init_from ? from : checkpoint_find(o->init_from);
}

// Rank 0 looks where to start, the others follow: by the time they looked, it might have written something.
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

// One line where resumed options differ from the checkpoint's: allowed, but not the same run any more.
static inline void trainer_compare_options(const char *now, const char *then) {
    static const char *const free_to_change[] = {"out", "threads", "eval-every", "eval-tokens", "save-every", "keep",
                                                 "log-every", "sample-every", "sample-tokens", "prompt", "val", "init-from",
                                                 "zero", "graphs", "on-save-error", "max-bad-steps", "selfcheck"};
    Text changed = {NULL, 0, 0};
    for (const char *line = now, *end; *line; line = end + 1) {
        end = strchr(line, '\n');
        const size_t n = (size_t)(end - line), name = strcspn(line, " =#");
        int ignored = name == 0 || name > n;
        for (size_t i = 0; i < sizeof free_to_change / sizeof free_to_change[0]; i++)
            ignored |= name == strlen(free_to_change[i]) && !strncmp(line, free_to_change[i], name);
        char *whole = xprintf("\n%.*s\n", (int)n, line), *all = xprintf("\n%s", then);
        if (!ignored && !strstr(all, whole)) text_printf(&changed, "%s--%.*s", changed.n ? ", " : "", (int)name, line);
        free(whole);
        free(all);
    }
    if (changed.n) warn("resumed with other options than the checkpoint was made with: %s", changed.s);
    text_free(&changed);
}

// What a checkpoint says of the shards, as a comment under its options.
static inline void trainer_describe_data(Trainer *tr) {
    char hex[SHA256_HEX];
    shards_fingerprint(&tr->train, hex);
    tr->data_line = xprintf("# train: %d shard%s, %lld tokens, %.16s\n", tr->train.n, tr->train.n == 1 ? "" : "s",
                            (long long)tr->train.tokens, hex);
    tr->run_text = xprintf("%s%s", tr->config_text, tr->data_line);
}

// One line where the shards are others than the checkpoint's: sample i is another one then. Older checkpoints do not say.
static inline void trainer_compare_data(const Trainer *tr, const char *then) {
    const char *line = strstr(then, "\n# train: ");
    if (!line || !strcmp(line + 1, tr->data_line)) return;
    warn("the training shards have changed since the checkpoint: they were %.*s, now %.*s\n"
         "  hint: samples come in another order from here on; with the shards of before it would be the same run",
         (int)strcspn(line + 10, "\n"), line + 10, (int)strcspn(tr->data_line + 9, "\n"), tr->data_line + 9);
}

// From an older checkpoint into a directory with later ones, two runs would be mixed: the next --resume would take a later one.
static inline void trainer_refuse_later(const Trainer *tr) {
    CheckpointList list = checkpoint_list(tr->options->out);
    if (list.n && list.step[0] > tr->state.step)
        die("%s has a checkpoint of step %lld, after the %lld to resume from\n  hint: give another --out, or move that "
            "checkpoint away", tr->options->out, (long long)list.step[0], (long long)tr->state.step);
    free(list.step);
}

// All ranks must run the same options.
static inline void trainer_agree(const Trainer *tr) {
    char mine[SHA256_HEX], first[SHA256_HEX];
    sha256_hex(mine, tr->config_text, strlen(tr->config_text));
    memcpy(first, mine, sizeof first);
    comm_broadcast(tr->comm, first, sizeof first);
    if (strcmp(first, mine))
        die("rank %d has other options than rank 0\n  hint: start all ranks with the same command and the same files",
            tr->rank);
}

// The weights to start from. What trained them with survival scaling scales its branches in evaluation (tied: both of a layer
// as one). A run that does not scale so itself has these factors folded into the weights, as build/export has; tied ones no
// weights can express.
static inline void trainer_load_weights(Trainer *tr, const char *from) {
    const GptConfig *c = &tr->config;
    GptConfig same;
    double *scale;
    int tied, factors = 0;
    free(checkpoint_check_weights(from));
    checkpoint_load_weights(from, tr->engine, tr->model, c);
    checkpoint_read_config(from, &same, &scale, &tied);
    for (int i = 0; i < BRANCHES * c->L; i++) factors |= scale[i] != 1;
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
            warn("%s was trained with --drop-scale survival and --drop-branches tied: this run goes on without its factors\n"
                 "  hint: give it these two options as well", from);
        else printf("%s: its survival scaling goes into the weights\n", from);
    }
    free(scale);
}

static inline void trainer_open(Trainer *tr, const Engine *engine, const TrainOptions *o, const char *config_text,
                                Comm *comm) {
    memset(tr, 0, sizeof *tr);
    tr->options = o;
    tr->config_text = config_text;
    tr->engine = engine;
    tr->comm = comm;
    tr->directory = tr->lock = tr->metrics.fd = -1;
    tr->rank = comm ? comm->rank : 0;
    tr->world = comm ? comm->world : *o->device ? gpu_wish(o->device).ranks : 1;
    if (!*o->train)
        die("--train is missing\n  hint: --train 'data/train_*.bin'; data/README.md tells how to make token shards");
    if (!*o->out) die("--out is empty\n  hint: the directory of this run's checkpoints and metrics.jsonl");
    trainer_check_numbers(o);
    int resume;
    trainer_agree(tr);
    char *from = trainer_start_together(tr, &resume);
    trainer_open_tokenizer(tr, from);
    trainer_config(tr, from);
    shards_open(&tr->train, o->train, tr->T, tr->config.V);
    tr->has_val = *o->val != 0;
    if (tr->has_val) shards_open(&tr->val, o->val, tr->T, tr->config.V);
    manifest_check_shards(&tr->manifest[MANIFEST_TRAIN], &tr->train);
    if (tr->has_val) manifest_check_shards(&tr->manifest[MANIFEST_VAL], &tr->val);
    if (resume) trainer_find_position(tr, from);
    trainer_sizes(tr);
    trainer_describe_data(tr);
    tr->drop = trainer_drop_path(o, tr->config.L, tr->steps);
    tr->dropout = trainer_dropout_ramp(o, tr->steps);
    tr->objective.smoothing = o->label_smoothing;
    tr->schedule = trainer_schedule(o, tr->steps);
    if (o->train_last > tr->config.L)
        die("--train-last %lld: this model has %d layers\n  hint: --train-last 0 trains all", (long long)o->train_last,
            tr->config.L);
    if (o->train_last) tr->drop.frozen = tr->config.L - (int)o->train_last;
    tr->plan = drop_plan_new(tr->config.L, tr->B);
    if (*o->drop_replay) trainer_open_replay(tr);

    const size_t BT = (size_t)tr->B * (size_t)tr->T, branches = (size_t)(BRANCHES * tr->config.L);
    EngineArgs args;
    memset(&args, 0, sizeof args);
    args.B = tr->B, args.T = tr->T, args.threads = (int)o->threads, args.dtype = trainer_dtype(engine, o);
    args.bound = trainer_memory_bound(tr), args.recompute = o->recompute, args.frozen = tr->state.frozen = tr->drop.frozen;
    args.attention_noise = o->dropout_attn > 0;
    args.comm = comm, args.zero = o->zero, args.reduce_fp32 = o->reduce_fp32;
    args.graphs = o->graphs, args.rounding = o->rounding, args.seed = (uint64_t)o->seed, args.dry = o->dry_run;
    tr->tokens = (int *)xcalloc(BT, sizeof(int));
    tr->targets = (int *)xcalloc(BT, sizeof(int));
    tr->losses = (real *)xcalloc(BT, sizeof(real));
    tr->kept = (int *)xcalloc(branches, sizeof(int));
    tr->micro = (double *)xcalloc((size_t)tr->M, sizeof(double));
    tr->reduce = (unsigned char *)xcalloc(branches + 1, 1);
    tr->adamw_steps = (int64_t *)xcalloc(branches + 1, sizeof(int64_t));
    tr->state.adamw_steps = (int64_t *)xcalloc(branches + 1, sizeof(int64_t));
    tr->state.eval_scale = (double *)xcalloc(branches, sizeof(double));
    for (int i = 0; i < (int)branches; i++)
        tr->state.eval_scale[i] = drop_path_eval_scale(&tr->drop, i / BRANCHES + 1, i % BRANCHES);
    tr->state.tied = tr->drop.branches == BRANCHES_TIED;
    const Manifest *made = &tr->manifest[MANIFEST_TRAIN];
    tr->state.eot = tr->has_tokenizer ? tr->tokenizer.eot : made->V ? made->eot : -1;
    tr->state.tokenizer_sha256 = made->sha256;
    if (tr->rank == 0 && !o->dry_run) trainer_take_tokenizer(tr);
    tr->model = engine_open(engine, &tr->config, &args);
    if (o->dry_run) {}                                   // no weights
    else if (resume) {
        const int64_t consumed = tr->state.consumed;
        checkpoint_load(from, engine, tr->model, &tr->config, &tr->state);
        tr->state.consumed = consumed;                   // in rows of this run
        if (tr->rank == 0 && strcmp(o->resume, "latest")) trainer_refuse_later(tr);
        if (tr->rank == 0) trainer_compare_options(config_text, tr->state.options), trainer_compare_data(tr, tr->state.options);
        free((char *)(uintptr_t)tr->state.options);
    } else if (from) trainer_load_weights(tr, from);
    else engine_init_weights(engine, tr->model, &tr->config, (uint64_t)o->seed);
    tr->state.options = tr->run_text;
    tr->state.seq_len = tr->T;
    if (resume) tr->whole = xstrdup(from);
    if (from && tr->rank == 0 && !o->dry_run) printf("%s: %s\n", resume ? "resumed" : "weights", from);
    free(from);
}

static inline void trainer_close(Trainer *tr) {
    tr->engine->close(tr->model);
    shards_close(&tr->train);
    if (tr->has_val) shards_close(&tr->val);
    if (tr->has_tokenizer) tokenizer_free(&tr->tokenizer);
    for (int i = 0; i < MANIFEST_SIDES; i++) manifest_free(&tr->manifest[i]);
    metrics_log_free(&tr->replay);
    drop_plan_free(&tr->plan);
    text_free(&tr->plan_text);
    free(tr->tokens), free(tr->targets), free(tr->losses), free(tr->kept), free(tr->reduce), free(tr->adamw_steps);
    free(tr->micro);
    free(tr->state.adamw_steps), free(tr->state.eval_scale), free(tr->data_line), free(tr->run_text), free(tr->whole);
    free(tr->report), free(tr->tokenizer_path);
    tokenizer_files_free(&tr->tokenizer_files);
    metrics_file_close(&tr->metrics);
    lock_release(&tr->lock);
    if (tr->directory >= 0) close(tr->directory);
}

// ---- OUT: do its names still lead to what this run has open? ----

// PATH.what, or with a number after it if that is taken. From malloc.
static inline char *trainer_unused_name(const char *path, const char *what) {
    char *name = xprintf("%s.%s", path, what);
    for (int i = 2; path_exists(name); i++) {
        free(name);
        name = xprintf("%s.%s%d", path, what, i);
    }
    return name;
}

// OUT was renamed, replaced or removed. What is open is still this run's, wherever it is now: lines that
// wait are written. Returns an error, from malloc.
static inline char *trainer_lost_directory(Trainer *tr) {
    const char *out = tr->options->out;
    char link[64], now[4096] = "";
    free(metrics_file_flush(&tr->metrics));
    snprintf(link, sizeof link, "/proc/self/fd/%d", tr->directory);      // on Linux; elsewhere nothing tells
    const ssize_t n = readlink(link, now, sizeof now - 1);
    now[n > 0 ? n : 0] = 0;
    if (n > 0 && path_leads_to(now, tr->directory, 1) == PATH_SAME)
        return xprintf("%s is not this run's directory any more: that is %s now\n"
                       "  hint: --out %s --resume continues from its last whole checkpoint", out, now, now);
    return xprintf("%s is not this run's directory any more: that was removed or renamed\n"
                   "  hint: where it still exists, --out and --resume continue from its last whole checkpoint", out);
}

// .lock was removed or replaced: the lock is taken again, unless another process has it. Returns NULL, or
// an error, from malloc.
static inline char *trainer_lock_again(Trainer *tr) {
    const char *out = tr->options->out;
    int lock;
    char *taken = lock_take(&lock, out), *error = NULL;
    if (taken) error = xprintf("%s/.lock was removed or replaced, and %s", out, taken);
    else {
        warn("%s/.lock was removed or replaced: the run has taken the lock again", out);
        lock_release(&tr->lock);
        tr->lock = lock;
    }
    free(taken);
    return error;
}

// metrics.jsonl was removed or replaced: it is written again, with all lines, and what had its name is kept
// under another. Returns NULL, or an error, from malloc.
static inline char *trainer_restore_metrics(Trainer *tr, int replaced) {
    const char *path = tr->metrics.path;
    char *aside = replaced ? trainer_unused_name(path, "replaced") : NULL, *error = NULL;
    if (aside) error = file_try_rename(path, aside);
    if (!error) error = metrics_file_restore(&tr->metrics);
    if (!error)
        warn("%s was %s: it is written again%s%s", path, replaced ? "replaced" : "removed",
             aside ? "; what was there is now " : "", aside ? aside : "");
    free(aside);
    return error;
}

// Rank 0 calls this before it writes to OUT. Returns NULL, or, from malloc, why it must not be written to:
// for now or, with *ends, by this run any more, since OUT or its lock may be another run's.
static inline char *trainer_watch(Trainer *tr, int *ends) {
    const char *out = tr->options->out;
    *ends = 1;
    if (path_leads_to(out, tr->directory, 1) != PATH_SAME) return trainer_lost_directory(tr);
    char *path = xprintf("%s/.lock", out), *error = NULL;
    const int locked = tr->lock >= 0 && path_leads_to(path, tr->lock, 0) == PATH_SAME;
    const int log = tr->metrics.fd < 0 ? PATH_SAME : path_leads_to(tr->metrics.path, tr->metrics.fd, 0);
    if (!locked && log == PATH_OTHER)
        error = xprintf("%s is not locked by this run any more, and its metrics.jsonl is another: another run was "
                        "started there\n  hint: its files are left as they are; give one of the two another --out", out);
    else if (!locked && tr->lock >= 0) error = trainer_lock_again(tr);
    free(path);
    *ends = error != NULL;
    return error || log == PATH_SAME ? error : trainer_restore_metrics(tr, log == PATH_OTHER);
}

// ---- OUT: config.txt and metrics.jsonl ----

// A metrics.jsonl that is not what a run leaves is copied before it is mended: the run goes on with the lines that fit.
static inline void trainer_set_aside(const char *path, const FileMap *map, int64_t line, const char *wrong) {
    char *aside = trainer_unused_name(path, "damaged");
    file_replace(aside, map->data, map->size);
    warn("%s, line %lld: %s\n  hint: the run goes on with the lines that fit; all of it is kept as %s", path, (long long)line,
         wrong, aside);
    free(aside);
}

// Opens metrics.jsonl to append after step `done`: of an interrupted run, the lines of later steps give way, since those steps
// will be done again. `again`, if it is of a step, takes the place of the last line.
static inline void trainer_open_metrics(Trainer *tr, int64_t done, const Metrics *again) {
    const char *out = tr->options->out;
    char *path = xprintf("%s/metrics.jsonl", out), *config = xprintf("%s/config.txt", out);
    int ends;
    char *lost = trainer_watch(tr, &ends);
    if (lost) {
        lock_begun();                                    // what has these names is not to be removed
        die("%s", lost);
    }
    file_replace(config, tr->config_text, strlen(tr->config_text));
    lock_begun();
    const int own = done > 0 && !strcmp(tr->options->resume, "latest");   // no checkpoint is ahead of its metrics
    if (path_must_exist_or_not(path)) {
        Text kept = {NULL, 0, 0};
        FileMap map;
        Metrics last;
        size_t at;
        int64_t number;
        const char *error = file_map(&map, path);
        if (error) die("cannot read %s: %s", path, error);
        error = metrics_keep(&kept, (const char *)map.data, map.size, done, &last, &at, &number);
        if (!error && own && isnan(last.step)) error = "it has no line of the checkpoint's step or before";
        if (error) trainer_set_aside(path, &map, number, error);
        if (!isnan(again->step)) kept.n = at, metrics_write(&kept, again);
        file_replace(path, kept.s, kept.n);
        free((char *)(uintptr_t)last.plan);
        file_unmap(&map);
        text_free(&kept);
    } else if (own) warn("%s is gone: it begins again with step %lld", path, (long long)done + 1);
    metrics_file_open(&tr->metrics, path);
    free(path);
    free(config);
}

// A line that cannot be written waits for the next one, unless a failure is to end the run.
static inline void trainer_record(Trainer *tr, const Metrics *r) {
    int ends;
    metrics_write(&tr->metrics.waiting, r);
    char *error = trainer_watch(tr, &ends);
    if (ends) die("%s", error);
    if (!error) error = metrics_file_flush(&tr->metrics);
    if (error && tr->options->on_save_error == ON_ERROR_STOP)
        die("%s\n  hint: --resume continues from the last whole checkpoint", error);
    if (error && !tr->metrics_wait) warn("%s: its lines wait in memory until it can be", error);
    tr->metrics_wait = error != NULL;
    free(error);
}

// ---- Evaluation ----

typedef struct { double loss, bits_per_byte; int64_t tokens, bytes; int stopped; } Evaluation;

// Mean loss over the first `rows` windows of the shards, each token with the same weight whatever the batch, under the
// plan of all rows with each branch times its factor (2L), 0 to leave it out; plan is room for B rows. bits_per_byte is
// NaN without a tokenizer (t NULL). The ranks of comm (NULL: alone) share the batches; rows are added up in their order,
// so that neither the batch nor the number of ranks changes the sum. A signal to any rank ends it after the batch: `stopped`,
// and the loss is NaN unless that batch was the last.
static inline Evaluation evaluate_shards(const Engine *e, Model *m, const Shards *shards, int64_t rows, const Tokenizer *t,
                                         int B, DropPlan *plan, const double *scale, int tied, const Comm *comm) {
    const int T = shards->T;
    const size_t BT = (size_t)B * (size_t)T;
    int *tokens = (int *)xcalloc(BT, sizeof *tokens), *targets = (int *)xcalloc(BT, sizeof *targets);
    real *losses = (real *)xcalloc(BT, sizeof *losses);
    double *loss = (double *)xcalloc((size_t)rows, sizeof *loss), bytes = 0;
    const int64_t stride = (int64_t)B * (comm ? comm->world : 1);
    Evaluation sum = {0, NAN, rows * T, 0, 0};
    for (int64_t first = 0, row = (int64_t)B * (comm ? comm->rank : 0); first < rows; first += stride, row += stride) {
        double asked = signals_stop ? 1 : 0;
        comm_sum(comm, &asked, 1);
        if (asked > 0) {
            sum.stopped = 1;
            sum.loss = NAN;
            break;
        }
        const int n = rows - row < B ? (int)(rows - row) : B;
        if (n <= 0) continue;                            // the last batch of other ranks
        for (int b = 0; b < n; b++) shards_read_window(shards, row + b, tokens + b * T, targets + b * T);
        drop_plan_keep_all(plan, scale, tied, n);
        engine_forward(e, m, T, tokens, targets, plan);
        e->losses(m, losses);
        for (int i = 0; i < n * T; i++) {
            loss[row + i / T] += (double)losses[i];
            if (t) bytes += targets[i] < t->V ? tokenizer_text_length(t, targets[i]) : 0;
        }
    }
    comm_sum(comm, loss, (size_t)rows);                  // of each row, one rank has the loss and the others 0
    double last[2] = {bytes, signals_stop ? 1.0 : 0.0};
    comm_sum(comm, last, 2);
    for (int64_t row = 0; row < rows; row++) sum.loss += loss[row];
    sum.bytes = (int64_t)last[0];
    sum.stopped |= last[1] > 0;
    if (t && sum.bytes) sum.bits_per_byte = sum.loss / 0.69314718055994530942 / (double)sum.bytes;
    sum.loss /= sum.tokens ? (double)sum.tokens : 1;
    free(tokens);
    free(targets);
    free(losses);
    free(loss);
    return sum;
}

static inline int trainer_due(int64_t every, int64_t step, int64_t steps) {
    return step == steps || (every > 0 && step % every == 0);
}

static inline void trainer_evaluate(Trainer *tr, Metrics *r) {
    const Tokenizer *t = tr->has_tokenizer ? &tr->tokenizer : NULL;
    Evaluation v = evaluate_shards(tr->engine, tr->model, &tr->val, tr->eval_rows, t, tr->B, &tr->plan, tr->state.eval_scale,
                                   tr->state.tied, tr->comm);
    tr->stop |= v.stopped;                               // of an evaluation cut short nothing is recorded: trainer_catch_up
    if (!v.stopped && !isfinite(v.loss) && tr->rank == 0)
        warn("step %lld: the validation loss is not finite, though the step's loss and gradient were",
             (long long)tr->state.step);
    r->val_loss = v.loss;
    r->val_ppl = exp(v.loss);
    r->val_bpb = t ? v.bits_per_byte : manifest_bits_per_byte(&tr->manifest[MANIFEST_VAL], MANIFEST_VAL, v.loss);
}

// A signal may have ended the run before the evaluation of its last step: it is done now, so that metrics.jsonl has no gap.
// Returns whether it was owed; then *last is the whole record of that step, its plan from malloc.
static inline int trainer_catch_up(Trainer *tr, Metrics *last) {
    const int64_t step = tr->state.step;
    int owed = 0;
    *last = metrics_new();
    if (tr->rank == 0 && tr->has_val && step > 0 && trainer_due(tr->options->eval_every, step, tr->steps)) {
        char *path = xprintf("%s/metrics.jsonl", tr->options->out);
        FileMap map;
        Text kept = {NULL, 0, 0};
        size_t at;
        int64_t number;
        if (!file_map(&map, path)) {
            metrics_keep(&kept, (const char *)map.data, map.size, step, last, &at, &number);
            owed = last->step == (double)step && isnan(last->val_loss);
            file_unmap(&map);
        }
        text_free(&kept);
        free(path);
    }
    comm_broadcast(tr->comm, &owed, sizeof owed);
    if (owed) trainer_evaluate(tr, last);
    if (owed && !isnan(last->val_loss)) return 1;
    free((char *)(uintptr_t)last->plan);
    *last = metrics_new();
    return 0;
}

// ---- One optimizer step ----

// The sample in row b of micro-batch m of the next step: its samples follow those consumed.
static inline int64_t trainer_row_sample(const Trainer *tr, int m, int b) {
    return tr->state.consumed + (int64_t)m * tr->B + b;
}

// Reads micro-batch m of the step, one of this rank's.
static inline void trainer_read_batch(Trainer *tr, int m) {
    for (int b = 0; b < tr->B; b++)
        shards_read_sample(&tr->train, (uint64_t)tr->options->seed, trainer_row_sample(tr, m, b),
                           tr->tokens + b * tr->T, tr->targets + b * tr->T);
}

// The plan of micro-batch m, this rank's or another's: it is a function of (seed, step, m).
static inline void trainer_plan(Trainer *tr, int64_t t, int m) {
    if (!tr->replay.n) drop_plan_sample(&tr->plan, &tr->drop, t, m, tr->M, tr->world, tr->B);
    else {
        const char *error = drop_plan_read(&tr->plan, &tr->drop, t, tr->replay.record[t].plan, m, tr->B);
        CHECK(!error, "%s", error);                      // trainer_open_replay has read them all
    }
}

// What the engine is called with for micro-batch m of step t, one of this rank's: what it reads, until the next is read,
static inline Batch trainer_batch(Trainer *tr, int m) {
    trainer_read_batch(tr, m);
    return batch_of(tr->B, tr->T, tr->tokens, tr->targets);
}

// and what it does; the gradients are summed over the ranks with the last of the step.
static inline Pass trainer_pass(Trainer *tr, int64_t t, int m) {
    const TrainOptions *o = tr->options;
    const double on = ramp_at(&tr->dropout, t);
    trainer_plan(tr, t, m);
    Pass pass = pass_of(&tr->plan, 1.0 / tr->M);
    Noise noise = {(uint64_t)o->seed, t, (uint32_t)m * (uint32_t)tr->B, noise_rate_of(on * o->dropout_embd),
                   noise_rate_of(on * o->dropout_attn), noise_rate_of(on * o->dropout_resid)};
    tr->noise = noise;
    if (noise.embd || noise.attn || noise.resid) pass.noise = &tr->noise;
    if (tr->objective.smoothing != 0) pass.objective = &tr->objective;
    if (tr->world > 1 && m + tr->world >= tr->M) pass.reduce = tr->reduce;
    return pass;
}

// Whether branch i (as UpdateArgs.t counts) is of a layer that is not trained.
static inline int trainer_is_frozen(const Trainer *tr, int i) { return i < BRANCHES * tr->drop.frozen; }

// What the step's plans keep, over all ranks: known before anything runs.
static inline void trainer_plan_step(Trainer *tr, int64_t t) {
    const int branches = BRANCHES * tr->config.L;
    memset(tr->kept, 0, (size_t)branches * sizeof *tr->kept);
    tr->plan_text.n = 0;
    for (int m = 0; m < tr->M; m++) {
        trainer_plan(tr, t, m);
        if (tr->plan_text.n) text_append(&tr->plan_text, " ", 1);
        drop_plan_write(&tr->plan_text, &tr->plan, tr->drop.unit);
        for (int i = 0; i < branches; i++) tr->kept[i] += tr->plan.branch[i].n;
    }
    for (int i = 0; i <= branches; i++) tr->reduce[i] = i == branches || (tr->kept[i] > 0 && !trainer_is_frozen(tr, i));
}

// The AdamW step of every branch in this update: one more than before, or 0 (untouched) for what was dropped throughout and
// for what is not trained.
static inline void trainer_count_updates(Trainer *tr) {
    const int branches = BRANCHES * tr->config.L;
    for (int i = 0; i <= branches; i++) {
        const int dropped = tr->options->drop_adam == ADAM_SKIP && i < branches && tr->kept[i] == 0;
        const int skipped = dropped || (i < branches && trainer_is_frozen(tr, i));
        tr->adamw_steps[i] = skipped ? 0 : tr->state.adamw_steps[i] + 1;
    }
}

// What the plans of the step have cost, and kept.
static inline void trainer_account(Trainer *tr, Metrics *r) {
    const GptConfig *c = &tr->config;
    const double rows = (double)tr->B * tr->M;
    double flops = 3 * rows * gpt_head_flops(c, tr->T), kept[BRANCHES] = {0, 0};
    for (int i = 0; i < BRANCHES * c->L; i++) {
        flops += gpt_layer_passes(i / BRANCHES, tr->drop.frozen) * tr->kept[i] * gpt_branch_flops(c, i % BRANCHES, tr->T);
        kept[i % BRANCHES] += tr->kept[i];
    }
    r->flops = flops;
    r->flops_fraction = flops / (3 * rows * gpt_row_flops(c, tr->T));
    r->kept_attn = kept[ATTN] / (rows * c->L);
    r->kept_mlp = kept[MLP] / (rows * c->L);
    r->drop_p = fmax(drop_path_rate(&tr->drop, c->L, ATTN, tr->state.step),
                     drop_path_rate(&tr->drop, c->L, MLP, tr->state.step));
    r->plan = tr->plan_text.s;
}

// ---- A step that is not finite: what is wrong, and how to see it again ----

// What each rank knows of the step. All ranks call it and get the same; (world), from malloc.
typedef struct { double loss, micro, forward; } RankNumbers;         // mean of its micro-batches; as Trainer's bad_*

static inline RankNumbers *trainer_ask_ranks(const Trainer *tr, double loss) {
    RankNumbers *all = (RankNumbers *)xcalloc((size_t)tr->world, sizeof *all);
    all[tr->rank].loss = loss * tr->world, all[tr->rank].micro = tr->bad_micro, all[tr->rank].forward = tr->bad_forward;
    comm_sum(tr->comm, (double *)all, (size_t)tr->world * (sizeof *all / sizeof(double)));
    return all;
}

// Where a forward pass that gives `finite` branches (numbers_finite_branches) stops being finite.
static inline void trainer_write_place(const Trainer *tr, Text *t, int finite) {
    if (finite < 0) text_printf(t, "the embeddings or the head");
    else if (finite >= BRANCHES * tr->config.L) text_printf(t, "the whole, in training alone");
    else text_printf(t, "h.%d.%s", finite / BRANCHES, finite % BRANCHES == ATTN ? "attn" : "mlp");
}

// The command that comes to the same step again: from the newest checkpoint, or from the start.
static inline void trainer_write_replay(const Trainer *tr, Text *t) {
    char *config = xprintf("%s/config.txt", tr->options->out);
    char *out = xprintf("%s/replay_%08lld", tr->options->out, (long long)tr->state.step + 1);
    const char *const words[] = {tr->program, "--config", config, "--out", out, tr->whole ? "--resume" : NULL, tr->whole};
    for (size_t i = 0; i < sizeof words / sizeof words[0] && words[i]; i++) {
        if (i) text_append(t, " ", 1);
        numbers_quote(t, words[i]);
    }
    text_printf(t, " --max-bad-steps %d", tr->state.bad_steps);
    free(config);
    free(out);
}

// Rates by branch, shards, and of each micro-batch the rows: index of the shard, the token where the row begins.
static inline void trainer_write_data(const Trainer *tr, Text *t) {
    const int64_t step = tr->state.step;
    for (int b = 0; b < BRANCHES; b++) {
        text_printf(t, ",\n  \"drop_rate_%s\": [", b == ATTN ? "attn" : "mlp");
        for (int l = 1; l <= tr->config.L; l++) {
            if (l > 1) text_printf(t, ", ");
            numbers_write(t, drop_path_rate(&tr->drop, l, b, step));
        }
        text_printf(t, "]");
    }
    text_printf(t, ",\n  \"shards\": [");
    for (int i = 0; i < tr->train.n; i++) {
        if (i) text_printf(t, ", ");
        json_write_string(t, tr->train.file[i].path);
    }
    text_printf(t, "],\n  \"rows_of\": \"by micro-batch: [shard, first token] of each row\",\n  \"rows\": [");
    for (int m = 0; m < tr->M; m++) {
        text_printf(t, m ? ",\n    [" : "\n    [");
        for (int b = 0; b < tr->B; b++) {
            const int64_t sample = trainer_row_sample(tr, m, b);
            int64_t start, window = shards_sample(&tr->train, (uint64_t)tr->options->seed, sample);
            const ShardFile *file = shards_find(&tr->train, window, &start);
            text_printf(t, "%s[%d, %lld]", b ? ", " : "", (int)(file - tr->train.file), (long long)start);
        }
        text_printf(t, "]");
    }
    text_printf(t, "\n  ]");
}

static inline void trainer_write_tensors(Text *t, const TensorPlace *places, const TensorNumbers *tensors, int n) {
    text_printf(t, ",\n  \"tensors_of\": \"in backward order: norms of what is finite, and how many numbers are not\",\n"
                "  \"tensors\": [");
    for (int i = 0; i < n; i++) {
        char *name = gpt_param_name(places[i].param, places[i].layer);
        text_printf(t, "%s\n    {\"name\": \"%s\"", i ? "," : "", name);
        for (int which = 0; which < 2; which++) {
            text_printf(t, ", \"%s_norm\": ", which ? "grad" : "weight");
            numbers_write(t, tensors[i].norm[which]);
            text_printf(t, ", \"%s_not_finite\": %.0f", which ? "grad" : "weight", tensors[i].bad[which]);
        }
        text_printf(t, "}");
        free(name);
    }
    text_printf(t, "\n  ]");
}

// OUT/bad_step_NNNNNNNN.json. A disk that refuses it does not end the run.
static inline void trainer_save_report(Trainer *tr, const Text *t) {
    char *path = xprintf("%s/bad_step_%08lld.json", tr->options->out, (long long)tr->state.step + 1);
    int ends;
    char *error = trainer_watch(tr, &ends);
    if (!error) error = file_try_replace(path, t->s, t->n);
    if (error) warn("%s", error);
    free(error);
    free(tr->report);
    tr->report = path;
}

// What people need first, on the console; the rest in the report.
static inline void trainer_report_bad_step(Trainer *tr, const Metrics *r, const RankNumbers *ranks, const TensorPlace *places,
                                           const TensorNumbers *tensors, int n) {
    Text t = {NULL, 0, 0}, said = {NULL, 0, 0}, place = {NULL, 0, 0};
    static const char *const what[2] = {"weight", "gradient"};
    text_printf(&t, "{\n  \"step\": %lld,\n  \"loss\": ", (long long)tr->state.step + 1);
    numbers_write(&t, r->loss);
    text_printf(&t, ",\n  \"grad_norm\": ");
    numbers_write(&t, r->grad_norm);
    text_printf(&t, ",\n  \"lr\": ");
    numbers_write(&t, r->lr);
    text_printf(&t, ",\n  \"bad_steps_in_a_row\": %d,\n  \"seed\": %lld,\n  \"replay\": ", tr->state.bad_steps,
                (long long)tr->options->seed);
    trainer_write_replay(tr, &place);
    json_write_string(&t, place.s);
    text_printf(&t, ",\n  \"ranks\": [");
    for (int i = 0; i < tr->world; i++) {
        text_printf(&t, "%s\n    {\"rank\": %d, \"loss\": ", i ? "," : "", i);
        numbers_write(&t, ranks[i].loss);
        if (ranks[i].micro >= 0) {
            place.n = 0;
            trainer_write_place(tr, &place, (int)ranks[i].forward);
            text_printf(&t, ", \"micro_batch\": %.0f, \"forward_not_finite_from\": \"%s\"", ranks[i].micro, place.s);
            text_printf(&said, "; rank %d, micro-batch %.0f: the forward pass is not finite from %s", i, ranks[i].micro,
                        place.s);
        }
        text_printf(&t, "}");
    }
    text_printf(&t, "\n  ],\n");
    for (int which = 1; which >= 0; which--) {
        const int first = numbers_first_bad(tensors, n, which);
        char *name = first < 0 ? NULL : gpt_param_name(places[first].param, places[first].layer);
        text_printf(&t, "  \"first_%s_not_finite\": %s%s%s,\n", what[which], name ? "\"" : "", name ? name : "null",
                    name ? "\"" : "");
        if (name) text_printf(&said, "; non-finite %s: %s%s", what[which], name, which ? ", the first in backward order" : "");
        else text_printf(&said, "; all %ss are finite", what[which]);
        free(name);
    }
    text_printf(&t, "  \"plan\": ");
    json_write_string(&t, tr->plan_text.s);
    trainer_write_data(tr, &t);
    trainer_write_tensors(&t, places, tensors, n);
    text_printf(&t, "\n}\n");
    trainer_save_report(tr, &t);
    warn("step %lld:%s\n  %s has more", (long long)tr->state.step + 1, said.s + strlen(";"), tr->report);
    text_free(&t), text_free(&said), text_free(&place);
}

// After an update that was not taken, when the gradients can still be read. All ranks look, at the first and the last step of a
// row of such steps; loss: this rank's part of the step's.
static inline void trainer_examine(Trainer *tr, const Metrics *r, double loss) {
    TensorPlace *places;
    const int n = numbers_places(&places, &tr->config);
    tr->bad_forward = BRANCHES * tr->config.L;
    if (tr->bad_micro >= 0) {
        const Batch batch = trainer_batch(tr, tr->bad_micro);
        const Pass pass = trainer_pass(tr, tr->state.step, tr->bad_micro);
        tr->bad_forward = numbers_finite_branches(tr->engine, tr->model, &batch, &pass);
    }
    RankNumbers *ranks = trainer_ask_ranks(tr, loss);
    TensorNumbers *tensors = numbers_of_tensors(tr->engine, tr->model, &tr->config, tr->drop.frozen, places, n, tr->comm);
    if (tr->rank == 0) trainer_report_bad_step(tr, r, ranks, places, tensors, n);
    free(places), free(ranks), free(tensors);
}

// Whether all numbers in a file of a checkpoint are finite: its weights or, in optimizer.safetensors, its moments.
static inline int trainer_file_finite(const char *dir, const char *name) {
    char *path = xprintf("%s/%s", dir, name);
    FileMap map;
    Safetensors t;
    int finite = !file_map(&map, path);
    free(path);
    if (!finite) return 0;
    finite = !safetensors_parse(&t, map.data, map.size);
    for (int i = 0; finite && i < t.n; i++)
        for (size_t k = 0; finite && t.entry[i].dtype <= SAFETENSORS_BF16 && k < t.entry[i].count; k++)
            finite = isfinite(safetensors_real(&t.entry[i], k));
    safetensors_free(&t);
    file_unmap(&map);
    return finite;
}

// The newest checkpoint that is whole and finite: of OUT, else the one that the run comes from; NULL: none. From malloc.
static inline char *trainer_last_good(const Trainer *tr) {
    CheckpointList list = checkpoint_list(tr->options->out);
    char *good = NULL;
    for (int i = 0; i <= list.n && !good; i++) {
        char *path = i < list.n ? checkpoint_path(tr->options->out, list.step[i]) : tr->whole ? xstrdup(tr->whole) : NULL;
        char *wrong = path ? checkpoint_verify(path) : NULL;
        if (path && !wrong && trainer_file_finite(path, "model.safetensors") &&
            trainer_file_finite(path, "optimizer.safetensors"))
            good = path;
        else free(path);
        free(wrong);
    }
    free(list.step);
    return good;
}

// Ends the run with code 3. `why` is told by rank 0; all ranks come here together.
static inline void NORETURN trainer_give_up(Trainer *tr, const char *why) {
    if (tr->rank == 0) {
        char *good = trainer_last_good(tr);
        fflush(stdout);
        fprintf(stderr, "error: %s\n  last good checkpoint: %s\n", why, good ? good : "none");
        if (tr->report) {
            Text replay = {NULL, 0, 0};
            tr->state.step--;                            // it has counted the step that the report is of
            trainer_write_replay(tr, &replay);
            fprintf(stderr, "  report: %s\n  replay: %s\n", tr->report, replay.s);
        }
        fprintf(stderr, "  hint: a lower --lr, a longer --warmup%s\n", good ? "; --resume continues from that checkpoint" : "");
    }
    comm_close(tr->comm);
    leave_memory();
    exit(3);
}

static inline void trainer_check_bad_steps(Trainer *tr) {
    if (tr->state.bad_steps < tr->options->max_bad_steps) return;
    char *why = xprintf("%d steps in a row were not finite", tr->state.bad_steps);
    trainer_give_up(tr, why);
}

// ---- The update ----

static inline void trainer_count_bad_step(Trainer *tr, Metrics *r, double loss) {
    const int64_t bad = ++tr->state.bad_steps;
    r->skipped = SKIPPED_BAD;
    if (tr->rank == 0)
        warn("step %lld: loss %g, gradient norm %g: %s, so the weights stay as they were", (long long)tr->state.step + 1,
             numbers_unsigned(r->loss), numbers_unsigned(r->grad_norm),
             isfinite(r->loss) && isfinite(r->grad_norm) ? "its square is not finite in " REAL_NAME : "not finite");
    if (bad == 1 || bad == tr->options->max_bad_steps) trainer_examine(tr, r, loss);
}

static inline void trainer_warn_of_spike(const Trainer *tr, const Metrics *r) {
    const int of_loss = r->skipped == SKIPPED_LOSS;
    if (tr->rank == 0)
        warn("step %lld: %s %g is %.1f standard deviations above the last %d: a spike, so the weights stay as they were",
             (long long)tr->state.step + 1, of_loss ? "loss" : "gradient norm", of_loss ? r->loss : r->grad_norm,
             of_loss ? r->loss_z : r->norm_z, SPIKES_WINDOW);
}

// Takes the step, or leaves it out: then nothing changes but the counts. r->loss is known; loss: this rank's part of it.
static inline void trainer_update(Trainer *tr, Metrics *r, double loss) {
    const TrainOptions *o = tr->options;
    CheckpointState *s = &tr->state;
    const double limit = spikes_limit(&s->norms, o->skip_norm_zscore);
    const int finite = isfinite(r->loss), spike = finite && r->loss > spikes_limit(&s->losses, o->skip_loss_zscore);
    trainer_count_updates(tr);
    UpdateArgs args = {r->lr, o->beta1, o->beta2, o->eps, o->weight_decay, o->grad_clip, tr->adamw_steps, 0,
                       spike || !finite ? -1 : isfinite(limit) ? limit : 0};
    r->grad_norm = tr->engine->update(tr->model, &args);
    const int taken = update_is_taken(&args, r->grad_norm);
    if (o->skip_loss_zscore > 0) r->loss_z = spikes_z(&s->losses, r->loss);
    if (o->skip_norm_zscore > 0) r->norm_z = spikes_z(&s->norms, r->grad_norm);
    if (!finite || !update_is_finite(&args, r->grad_norm)) trainer_count_bad_step(tr, r, loss);
    else {
        s->bad_steps = 0;
        if (!taken) r->skipped = spike ? SKIPPED_LOSS : SKIPPED_NORM, trainer_warn_of_spike(tr, r);
    }
    for (int i = 0; taken && i <= BRANCHES * tr->config.L; i++)
        if (tr->adamw_steps[i]) s->adamw_steps[i] = tr->adamw_steps[i];
    args.discard = 1;
    if (!taken) tr->engine->update(tr->model, &args);    // only now: what was left out can be looked at until here
    spikes_add(&s->losses, r->loss);
    spikes_add(&s->norms, r->grad_norm);
}

// Step t = state.step: of M micro-batches this rank's forward and backward, one update.
static inline Metrics trainer_step(Trainer *tr) {
    const int64_t t = tr->state.step;
    Metrics r = metrics_new();
    double loss = 0, nll = 0;
    trainer_plan_step(tr, t);
    tr->bad_micro = -1;
    memset(tr->micro, 0, (size_t)tr->M * sizeof *tr->micro);
    for (int m = tr->rank; m < tr->M; m += tr->world) {
        const Batch batch = trainer_batch(tr, m);
        const Pass pass = trainer_pass(tr, t, m);
        double part[N_PARTS];
        tr->micro[m] = tr->engine->run(tr->model, &batch, &pass);
        loss += tr->micro[m] / tr->M;
        tr->engine->parts(tr->model, part);
        nll += part[PART_NLL] / tr->M;
        if (!isfinite(loss) && tr->bad_micro < 0) tr->bad_micro = m;
    }
    double sum[4] = {loss, signals_stop ? 1.0 : 0.0, signals_take_save() ? 1.0 : 0.0, nll};
    comm_sum(tr->comm, sum, 4);
    r.loss = sum[0], tr->stop = sum[1] > 0, tr->save_now = sum[2] > 0;
    if (tr->objective.smoothing != 0) r.nll = sum[3];
    if (tr->options->record_micro) {
        comm_sum(tr->comm, tr->micro, (size_t)tr->M);    // of each, one rank has the loss and the others 0
        r.micro = tr->micro, r.micros = tr->M;
    }
    r.lr = schedule_lr(&tr->schedule, t);
    trainer_update(tr, &r, loss);
    trainer_account(tr, &r);
    tr->state.step++;
    tr->state.consumed += (int64_t)tr->M * tr->B;
    tr->state.tokens += (int64_t)tr->M * tr->B * tr->T;
    r.step = (double)tr->state.step;
    r.tokens = (double)tr->state.tokens;
    return r;
}

// ---- What a person sees ----

// One character per layer for the step's plans: # both branches ran on every row, . neither on any, a or m one of them
// alone, 1 to 9 the kept tenths of the rest.
static inline void trainer_kept_map(const Trainer *tr, char *map) {
    const int rows = tr->B * tr->M;
    for (int l = 0; l < tr->config.L; l++) {
        const int attn = tr->kept[BRANCHES * l + ATTN], mlp = tr->kept[BRANCHES * l + MLP];
        const int tenths = 10 * (attn + mlp) / (2 * rows);
        if (attn + mlp == 2 * rows) map[l] = '#';
        else if (attn + mlp == 0) map[l] = '.';
        else if (attn == rows && !mlp) map[l] = 'a';
        else if (mlp == rows && !attn) map[l] = 'm';
        else map[l] = (char)('0' + (tenths < 1 ? 1 : tenths));
    }
    map[tr->config.L] = 0;
}

// The part of the full model's FLOPs that the run is expected to execute; of a long run by every n-th step, since --steps may
// be a number that nobody means to reach.
static inline double trainer_expected_compute(const Trainer *tr) {
    const int64_t every = tr->steps / 100000 + 1;
    double sum = 0, n = 0;
    if (tr->options->drop_path == 0 && !tr->replay.n && !tr->drop.frozen) return 1;
    for (int64_t t = every / 2; t < tr->steps; t += every, n++)
        sum += drop_path_expected_compute(&tr->drop, &tr->config, tr->T, t);
    return sum / n;
}

// Of several strong regularizers each should be weaker; and where each token is seen once there is little to regularize.
static inline void trainer_warn_of_many(const Trainer *tr, double usual_drop) {
    const TrainOptions *o = tr->options;
    const double dropout = fmax(o->dropout_embd, fmax(o->dropout_attn, o->dropout_resid));
    const double epochs = (double)tr->steps * tr->M * tr->B / (double)tr->train.windows;
    const struct { const char *name; double value, strong; } all[] = {
        {"--drop-path", o->drop_path, usual_drop}, {"--dropout", dropout, 0.1},
        {"--label-smoothing", o->label_smoothing, 0.1}, {"--weight-decay", o->weight_decay, 0.3}};
    Text names = {NULL, 0, 0};
    int n = 0;
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        if (all[i].value >= all[i].strong - 1e-9) text_printf(&names, "%s%s %g", n++ ? ", " : "", all[i].name, all[i].value);
    if (n >= 3) warn("%s: each is strong alone, and together they may underfit; weaken some", names.s);
    if (dropout > 0 && epochs <= 1)
        warn("dropout, and no token is seen twice: it usually costs loss there (arXiv 2505.24788); compare with --dropout 0");
    text_free(&names);
}

static inline void trainer_print_start(const Trainer *tr) {
    const GptConfig *c = &tr->config;
    const TrainOptions *o = tr->options;
    char count[32], tokens[32];
    const size_t parameters = gpt_params_count(c);
    const double mib = 1048576;
    static const char *const products[] = {"", ", matrix products of bf16", "", ", matrix products of tf32"};
    EngineMemory memory;
    double usual;
    metrics_grouped(count, (double)parameters);
    metrics_grouped(tokens, (double)tr->train.tokens);
    tr->engine->memory(tr->model, &memory);
    printf("engine:  %s%s; peak %.0f GFLOP/s, %s\n", tr->engine->name, products[trainer_dtype(tr->engine, o)],
           tr->peak_flops / 1e9, *o->device ? "by its data sheet" : "measured");
    printf("model:   %s parameters: %d layers, %d heads, %d channels, %d tokens a row, vocabulary %d\n", count, c->L, c->NH,
           c->C, tr->T, c->V);
    printf("data:    %s tokens in %d shard%s; evaluation on %lld tokens\n", tokens, tr->train.n, tr->train.n == 1 ? "" : "s",
           (long long)tr->eval_rows * tr->T);
    printf("step:    %d rows x %d tokens x %d micro-batch%s; %lld steps are %.2f epochs\n", tr->B, tr->T, tr->M,
           tr->M == 1 ? "" : "es", (long long)tr->steps, trainer_epochs(tr));
    if (tr->world > 1)
        printf("ranks:   %d processes, each %d micro-batch%s of a step; numbers of memory are of each, of speed of all\n",
               tr->world, tr->M / tr->world, tr->M == tr->world ? "" : "es");
    printf("memory:  parameters %.0f MiB, gradients %.0f MiB, moments %.0f MiB, activations %.0f MiB",
           (double)memory.parameters / mib, (double)memory.gradients / mib, (double)memory.moments / mib,
           (double)memory.activations / mib);
    if (memory.activations < memory.activations_full)
        printf(" of %.0f MiB without drop path", (double)memory.activations_full / mib);
    printf("\n");
    if (tr->drop.frozen) {
        metrics_grouped(count, (double)gpt_params_trained(c, tr->drop.frozen));
        printf("trains:  %s parameters: the last %d layer%s, ln_f and wte\n", count, c->L - tr->drop.frozen,
               c->L - tr->drop.frozen == 1 ? "" : "s");
    }
    if (o->drop_path > 0 || tr->replay.n) {
        printf("drop:    up to %.3g in layer %d, %.3g in layer 1; expected to execute %.1f%% of the FLOPs\n", o->drop_path,
               c->L, o->drop_path * drop_path_depth(&tr->drop, 1), 100 * trainer_expected_compute(tr));
        const char *size = drop_path_excess(o->drop_path, parameters, &usual);
        if (size)
            warn("--drop-path %g is high: %g is usual for a %s model; compare with a run without it", o->drop_path, usual,
                 size);
    }
    drop_path_excess(0, parameters, &usual);
    trainer_warn_of_many(tr, usual);
    printf("output:  %s\n", o->out);
    fflush(stdout);
}

// How long a run takes whose steps reach a part of the measured peak: half of it, 80% and 20%.
static inline void trainer_print_time(const char *least, const char *most, const char *time, int frozen, int drops,
                                      const char *saved) {
    printf("time:    %s if steps reach half of that peak, evaluations left out; %s %s\n", time,
           !frozen ? "drop path saves" : drops ? "drop path and --train-last save" : "--train-last saves", saved);
    printf("         not sure: %s at 80%% of it, %s at 20%%, more on a busy machine; a run of a few steps tells more\n", least,
           most);
}

// --dry-run: what the run would take. Steps of large models reach about half of the peak or more, of tiny ones less.
static inline void trainer_print_estimate(const Trainer *tr) {
    const double tokens = (double)tr->steps * tr->M * tr->B * tr->T, mib = 1048576, share = 0.5;
    const double full = 3 * tokens / tr->T * gpt_row_flops(&tr->config, tr->T), flops = full * trainer_expected_compute(tr);
    char grouped[32], time[32], least[32], most[32], saved[32];
    metrics_grouped(grouped, tokens);
    metrics_duration(time, flops / (share * tr->peak_flops));
    metrics_duration(least, flops / (0.8 * tr->peak_flops));
    metrics_duration(most, flops / (0.2 * tr->peak_flops));
    metrics_duration(saved, (full - flops) / (share * tr->peak_flops));
    const double epochs = trainer_epochs(tr);
    if (epochs >= 100) warn("%.0f epochs: the model will learn the data by heart; --epochs 4 is a usual most", epochs);
    const int drops = tr->options->drop_path > 0 || tr->replay.n;
    printf("flops:   %.3e on %s tokens; %.3e without %s\n", flops, grouped, full,
           tr->drop.frozen ? "drop path, all trained" : "drop path");
    if (*tr->options->device) gpu_model_print(&tr->drop, tr->M, tr->steps);
    else trainer_print_time(least, most, time, tr->drop.frozen, drops, saved);
    printf("disk:    %.0f MiB a checkpoint\n", (double)sizeof(real) / mib *
           (double)(gpt_params_count(&tr->config) + 2 * gpt_params_trained(&tr->config, tr->drop.frozen)));
    printf("dry run: nothing has been trained or written\n");
}

static inline void trainer_sample(Trainer *tr) {
    const TrainOptions *o = tr->options;
    const SampleArgs args = {0.8, 0, 1, (uint64_t)o->seed};
    const Text prompt = {o->prompt, strlen(o->prompt), 0};
    Sampler sampler;
    memset(&sampler, 0, sizeof sampler);
    sampler.engine = tr->engine, sampler.model = tr->model, sampler.layers = tr->config.L, sampler.V = tr->config.V;
    sampler.T = tr->T, sampler.batch = 1, sampler.scale = tr->state.eval_scale, sampler.tied = tr->state.tied;
    sampler.tokenizer = &tr->tokenizer, sampler.args = args, sampler.optional = 1;
    printf("---- sample after step %lld ----\n", (long long)tr->state.step);
    sample_texts(stdout, &sampler, &prompt, 1, 1, o->sample_tokens);
    printf("----\n");
    fflush(stdout);
}

// ---- The loop ----

// Runs in several processes that take turns, so that what disturbs the machine disturbs them alike (compare): a run
// waits for a byte on `go`, works for about `seconds`, and writes a byte to `done`. `until` starts at 0. `peak` is
// memory that the runs share, or NULL: the first of them stores the measured peak in it, so that mfu means the same in all.
typedef struct { const char *label; int go, done; double seconds, until, *peak; } TrainerTurn;

// Between two steps: ends the turn if its time is over, and waits for the next one.
static inline void trainer_take_turn(TrainerTurn *turn) {
    char byte = 0;
    if (!turn || clock_seconds() < turn->until) return;
    const int first = turn->until == 0;
    if ((!first && write(turn->done, &byte, 1) != 1) || read(turn->go, &byte, 1) != 1) exit(1);   // nobody gives turns
    turn->until = clock_seconds() + turn->seconds;
}

// What rank 0 does after a step: metrics, the console, a sample.
static inline void trainer_report(Trainer *tr, Metrics *r, const TrainerTurn *turn, int first, double seconds_left) {
    const TrainOptions *o = tr->options;
    const int64_t step = tr->state.step;
    char *map = (char *)xcalloc((size_t)tr->config.L + 1, 1);
    r->peak_bytes = trainer_peak_bytes();
    trainer_record(tr, r);
    trainer_kept_map(tr, map);
    if (trainer_due(o->log_every, step, tr->steps) || first || !isnan(r->val_loss))
        metrics_print(r, turn ? turn->label : "", (double)tr->steps, map, seconds_left);
    if (o->sample_every && trainer_due(o->sample_every, step, tr->steps)) trainer_sample(tr);
    if (ferror(stdout) && !tr->console_lost++)
        warn("standard output cannot be written: the run goes on, and %s/metrics.jsonl has its numbers", o->out);
    free(map);
}

// What a failed save means: a warning, if another one follows. ends: as trainer_watch says.
static inline void trainer_save_failed(const Trainer *tr, const char *error, int last, int ends) {
    const char *kept = tr->whole ? tr->whole : "none yet";
    if (ends) message("error", "step %lld: %s", (long long)tr->state.step, error);
    else if (last)
        message("error", "step %lld is not saved: %s\n  hint: --resume continues from the last whole checkpoint: %s",
                (long long)tr->state.step, error, kept);
    else
        warn("step %lld is not saved: %s\n  hint: the run goes on to the next save; the last whole checkpoint: %s",
             (long long)tr->state.step, error, kept);
}

// Rank 0 writes a checkpoint; where each rank has a share of the moments, all take part. If it cannot be written and the run
// is to end, or has come to its end, all ranks exit with code 1. Weights or moments that are not finite, which a huge learning rate can
// make out of finite gradients, end the run with code 3: no step mends them. In a row of steps that were not finite no older
// checkpoint gives way: it may be the last that is good.
static inline void trainer_save(Trainer *tr) {
    const TrainOptions *o = tr->options;
    const int last = o->on_save_error == ON_ERROR_STOP || tr->stop || tr->state.step == tr->steps;
    char *error = NULL, *bad = NULL, *lost;
    int ends = 0;
    if (tr->rank == 0) error = trainer_watch(tr, &ends);
    if (tr->rank == 0 && !error) error = metrics_file_sync(&tr->metrics);  // no checkpoint is ahead of its metrics
    if (tr->rank == 0 && !error) error = checkpoint_try_save(o->out, tr->engine, tr->model, &tr->config, &tr->state, &bad);
    else if (tr->rank == 0 || o->zero) checkpoint_attend(tr->engine, tr->model, &tr->config, tr->drop.frozen, &bad);
    if (tr->rank == 0 && !ends && (lost = trainer_watch(tr, &ends)) != NULL) {   // it may have happened meanwhile
        free(error);
        error = lost;
    }
    int outcome[3] = {error != NULL, bad != NULL, ends};
    comm_broadcast(tr->comm, outcome, sizeof outcome);
    if (outcome[1])
        trainer_give_up(tr, xprintf("step %lld has made numbers that are not finite, first of %s, so it is not saved",
                                    (long long)tr->state.step, bad ? bad : ""));
    if (error) trainer_save_failed(tr, error, last, ends);
    else if (tr->rank == 0) {
        free(tr->whole);
        tr->whole = checkpoint_path(o->out, tr->state.step);
        if (!tr->state.bad_steps) checkpoint_prune(o->out, o->keep, tr->state.step);
    }
    free(error), free(bad);
    if (!outcome[0] || !(last || outcome[2])) return;
    comm_close(tr->comm);
    exit(1);
}

// The last words of a run that a signal has ended.
static inline void trainer_stopped(const Trainer *tr) {
    if (tr->rank == 0)
        printf("stopped by %s after step %lld of %lld: %s is saved; --resume continues\n", signals_name(),
               (long long)tr->state.step, (long long)tr->steps, tr->whole);
}

// Runs what the options say, from the step where it stands to the last. config_text is these options as config.txt;
// program is how a user starts it; turn is NULL for a run that has the machine to itself, comm for one that is alone.
static inline void trainer_run(const char *program, const Engine *engine, const TrainOptions *o, const char *config_text,
                               TrainerTurn *turn, Comm *comm) {
    Trainer trainer, *tr = &trainer;
    Metrics again;
    signals_begin();
    if (*o->device && !o->dry_run) die("--device predicts, and trains nothing\n  hint: add --dry-run, or leave out --device");
    if (*o->device) engine = gpu_model_engine(o->device);
    if (!o->dry_run) trainer_selfcheck(engine, o, comm);
    trainer_open(tr, engine, o, config_text, comm);
    tr->program = program;
    if (o->dry_run) {
        tr->peak_flops = engine->peak(tr->model, 0.2) * (*o->device ? tr->world : 1);
        comm_sum(comm, &tr->peak_flops, 1);
        if (tr->rank == 0) trainer_print_start(tr), trainer_print_estimate(tr);
        trainer_close(tr);
        return;
    }
    if (!turn) signals_catch();                          // with turns, compare decides
    const int owed = trainer_catch_up(tr, &again);
    if (tr->state.step >= tr->steps) {
        if (owed && tr->rank == 0) trainer_open_metrics(tr, tr->state.step, &again);
        free((char *)(uintptr_t)again.plan);
        if (tr->rank == 0) printf("%s has all %lld steps already\n", o->out, (long long)tr->steps);
        trainer_close(tr);
        return;
    }
    if (*o->drop_replay && o->drop_path == 0 && tr->rank == 0)
        warn("--drop-replay without --drop-path: branches drop as recorded, with scale 1");
    if (!tr->has_val && tr->rank == 0) warn("no --val: the run will not be evaluated");
    if (o->sample_every && !tr->has_tokenizer)
        die("--sample-every needs a tokenizer\n  hint: --tokenizer FILE, see data/README.md");
    if (o->sample_every && *o->prompt && tr->tokenizer.decode_only)
        die("--prompt: this tokenizer splits text otherwise than GPT-2's\n  hint: --sample-every without --prompt");
    if (turn && turn->peak && *turn->peak > 0) tr->peak_flops = *turn->peak;
    else {
        tr->peak_flops = engine->peak(tr->model, 0.2);
        comm_sum(comm, &tr->peak_flops, 1);
    }
    if (turn && turn->peak) *turn->peak = tr->peak_flops;
    if (tr->rank == 0) {
        trainer_print_start(tr);
        trainer_open_metrics(tr, tr->state.step, &again);
    }
    free((char *)(uintptr_t)again.plan);
    double busy = 0;
    for (int64_t first = tr->state.step; tr->state.step < tr->steps && !tr->stop;) {
        trainer_take_turn(turn);
        const double start = clock_seconds();
        Metrics r = trainer_step(tr);
        const double seconds = clock_seconds() - start;
        const int64_t step = tr->state.step;
        busy += seconds;
        r.ms = 1000 * seconds;
        r.tok_per_s = (double)tr->M * tr->B * tr->T / seconds;
        r.mfu = r.flops / seconds / tr->peak_flops;
        if (tr->has_val && !tr->stop && trainer_due(o->eval_every, step, tr->steps)) trainer_evaluate(tr, &r);
        if (tr->rank == 0)
            trainer_report(tr, &r, turn, step == first + 1, busy / (double)(step - first) * (double)(tr->steps - step));
        trainer_check_bad_steps(tr);
        if (trainer_due(tr->state.bad_steps ? 0 : o->save_every, step, tr->steps) || tr->stop || tr->save_now) trainer_save(tr);
    }
    if (tr->stop) trainer_stopped(tr);
    trainer_close(tr);
}

// The other processes of this run, if a launcher has started several. NULL: alone.
static inline Comm *trainer_ranks(const TrainOptions *o) {
    CommLaunch launch;
    char *error = comm_launch(&launch, o->rendezvous, o->job_token, comm_look, NULL);
    if (error) die("%s", error);
    return launch.world > 1 ? comm_open(&launch, &comm_times) : NULL;
}

// The whole program: reads the options, trains. Returns the exit code.
static inline int trainer_main(int argc, char **argv, const Engine *engine) {
    TrainOptions o;
    Options options;
    Text config = {NULL, 0, 0};
    options_init(&options, "train_gpt --train GLOB [--val GLOB] [options]");
    options.engine = engine->name, options.notes = SIGNALS_HELP;
    options_add(&options, train_options(), &o);
    options_parse(&options, argc, argv);
    options_apply_recipe(&options, &o);
    Comm *comm = trainer_ranks(&o);
    const TrainOptions given = o;
    o.resume = o.rendezvous = o.job_token = (char *)(uintptr_t)"";        // config.txt is of the run, however it is started
    options_dump(&options, &config);
    o = given;
    trainer_run(argv[0], engine, &o, config.s, NULL, comm);
    comm_close(comm);
    text_free(&config);
    options_free(&options);
    return 0;
}

#endif
