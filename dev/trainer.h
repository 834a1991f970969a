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
#include "manifest.h"
#include "metrics.h"
#include "options.h"
#include "sample.h"
#include "schedule.h"
#include "shards.h"
#include "tokenizer.h"
#include <sys/resource.h>

typedef struct {
    const TrainOptions *options;
    const char *config_text;                             // the options as config.txt
    const Engine *engine;
    Model *model;
    GptConfig config;
    DropPath drop;
    Schedule schedule;
    Shards train, val;
    Tokenizer tokenizer;
    Manifest manifest[MANIFEST_SIDES];                   // of the train and val shards; V = 0 where there is none
    int has_val, has_tokenizer;
    Comm *comm;                                          // NULL: alone
    int rank, world;                                     // this process among equal ones; they share a step's micro-batches
    int B, T, M;                                         // rows and tokens of a micro-batch, micro-batches of a step
    int64_t steps, eval_rows;
    MetricsLog replay;
    double peak_flops;                                   // per second, measured

    CheckpointState state;
    int bad_steps;                                       // in a row
    DropPlan plan;
    int *tokens, *targets;                               // (B,T)
    real *losses;                                        // (B,T)
    int *kept;                                           // (2L) rows of the current step that ran each branch, on any rank
    unsigned char *reduce;                               // (2L+1) whether any did: these gradients are to be summed
    int64_t *adamw_steps;                                // (2L+1) what this update uses
    Text plan_text;
    FILE *metrics;
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

// ---- From options to a run: everything that can be refused is refused here, before anything is written ----

// A file to read must exist; a missing one is the user's commonest mistake.
static inline void trainer_open_tokenizer(Trainer *tr) {
    const TrainOptions *o = tr->options;
    char *path = *o->tokenizer ? xstrdup(o->tokenizer) : tokenizer_find(o->train);
    manifest_find(&tr->manifest[MANIFEST_TRAIN], o->train);
    manifest_find(&tr->manifest[MANIFEST_VAL], *o->val ? o->val : o->train);
    manifest_check_pair(&tr->manifest[MANIFEST_TRAIN], &tr->manifest[MANIFEST_VAL]);
    if (!path) return;
    tokenizer_load(&tr->tokenizer, path);
    for (int i = 0; i < MANIFEST_SIDES; i++) manifest_check_tokenizer(&tr->manifest[i], &tr->tokenizer, path);
    tr->has_tokenizer = 1;
    free(path);
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
        if (tr->T > c->T) die("--seq-len %d: %s has %d positions", tr->T, from, c->T);
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

// Micro-batches of a step, steps of the run, rows of an evaluation.
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
    if (o->epochs > 0) tr->steps = (int64_t)llround(o->epochs * (double)tr->train.windows / ((double)tr->B * tr->M));
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

static inline Schedule trainer_schedule(const TrainOptions *o, int64_t steps) {
    Schedule s = {o->lr_schedule, o->lr, o->lr_final, steps, span_steps(o->warmup, steps), span_steps(o->lr_decay, steps)};
    return s;
}

// Plans recorded in a metrics.jsonl, one per step; their text says whether their unit is the row.
static inline void trainer_open_replay(Trainer *tr) {
    const char *path = tr->options->drop_replay;
    tr->replay = metrics_read(path);
    for (int64_t s = 0; s < tr->replay.n; s++) {
        const Metrics *r = &tr->replay.record[s];
        if ((int64_t)r->step != s + 1 || !r->plan)
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

// Where the run starts: a checkpoint of ours to resume (*resume = 1), weights to start from, or nothing (NULL).
static inline char *trainer_start(const TrainOptions *o, int *resume) {
    char *metrics = xprintf("%s/metrics.jsonl", o->out);
    *resume = 0;
    if (!*o->resume) {
        if (path_exists(metrics))
            die("%s holds a run already\n  hint: --resume continues it; another --out starts a new one", o->out);
        free(metrics);
        return *o->init_from ? xstrdup(o->init_from) : NULL;
    }
    free(metrics);
    char *from = strcmp(o->resume, "latest") ? xstrdup(o->resume) : checkpoint_latest(o->out);
    *resume = from != NULL;
    if (!from) printf("resume: no checkpoint in %s yet, starting at step 0\n", o->out);
    return from || !*o->init_from ? from : xstrdup(o->init_from);
}

// Rank 0 looks where to start, the others follow: by the time they looked, it might have written something.
static inline char *trainer_start_together(const Trainer *tr, int *resume) {
    struct { int some, resume; char path[4096]; } found;
    char *from = NULL;
    memset(&found, 0, sizeof found);
    if (tr->rank == 0) {
        from = trainer_start(tr->options, &found.resume);
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
                                                 "zero", "graphs"};
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

static inline void trainer_open(Trainer *tr, const Engine *engine, const TrainOptions *o, const char *config_text,
                                Comm *comm) {
    memset(tr, 0, sizeof *tr);
    tr->options = o;
    tr->config_text = config_text;
    tr->engine = engine;
    tr->comm = comm;
    tr->rank = comm ? comm->rank : 0;
    tr->world = comm ? comm->world : 1;
    if (!*o->train)
        die("--train is missing\n  hint: --train 'data/train_*.bin'; data/README.md tells how to make token shards");
    int resume;
    trainer_agree(tr);
    char *from = trainer_start_together(tr, &resume);
    trainer_open_tokenizer(tr);
    trainer_config(tr, from);
    shards_open(&tr->train, o->train, tr->T, tr->config.V);
    tr->has_val = *o->val != 0;
    if (tr->has_val) shards_open(&tr->val, o->val, tr->T, tr->config.V);
    manifest_check_shards(&tr->manifest[MANIFEST_TRAIN], &tr->train);
    if (tr->has_val) manifest_check_shards(&tr->manifest[MANIFEST_VAL], &tr->val);
    trainer_sizes(tr);
    tr->drop = trainer_drop_path(o, tr->config.L, tr->steps);
    tr->schedule = trainer_schedule(o, tr->steps);
    tr->plan = drop_plan_new(tr->config.L, tr->B);
    if (*o->drop_replay) trainer_open_replay(tr);

    const size_t BT = (size_t)tr->B * (size_t)tr->T, branches = (size_t)(BRANCHES * tr->config.L);
    EngineArgs args;
    memset(&args, 0, sizeof args);
    args.B = tr->B, args.T = tr->T, args.threads = (int)o->threads, args.dtype = trainer_dtype(engine, o);
    args.bound = trainer_memory_bound(tr), args.recompute = o->recompute;
    args.comm = comm, args.zero = o->zero, args.reduce_fp32 = o->reduce_fp32;
    args.graphs = o->graphs, args.rounding = o->rounding, args.seed = (uint64_t)o->seed;
    tr->tokens = (int *)xcalloc(BT, sizeof(int));
    tr->targets = (int *)xcalloc(BT, sizeof(int));
    tr->losses = (real *)xcalloc(BT, sizeof(real));
    tr->kept = (int *)xcalloc(branches, sizeof(int));
    tr->reduce = (unsigned char *)xcalloc(branches + 1, 1);
    tr->adamw_steps = (int64_t *)xcalloc(branches + 1, sizeof(int64_t));
    tr->state.adamw_steps = (int64_t *)xcalloc(branches + 1, sizeof(int64_t));
    tr->state.eval_scale = (double *)xcalloc(branches, sizeof(double));
    for (int i = 0; i < (int)branches; i++)
        tr->state.eval_scale[i] = drop_path_eval_scale(&tr->drop, i / BRANCHES + 1, i % BRANCHES);
    tr->state.tied = tr->drop.branches == BRANCHES_TIED;
    tr->state.eot = tr->has_tokenizer ? tr->tokenizer.eot : tr->manifest[MANIFEST_TRAIN].V ? tr->manifest[MANIFEST_TRAIN].eot : -1;
    tr->state.tokenizer_sha256 = tr->manifest[MANIFEST_TRAIN].sha256;
    tr->model = engine->open(&tr->config, &args);
    if (resume) {
        checkpoint_load(from, engine, tr->model, &tr->config, &tr->state);
        if (tr->rank == 0) trainer_compare_options(config_text, tr->state.options);
        free((char *)(uintptr_t)tr->state.options);
    } else if (from) checkpoint_load_weights(from, engine, tr->model, &tr->config);
    else engine_init_weights(engine, tr->model, &tr->config, (uint64_t)o->seed);
    tr->state.options = config_text;
    if (from && tr->rank == 0) printf("%s: %s\n", resume ? "resumed" : "weights", from);
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
    free(tr->state.adamw_steps), free(tr->state.eval_scale);
    if (tr->metrics) fclose(tr->metrics);
}

// ---- OUT: config.txt and metrics.jsonl ----

// Opens metrics.jsonl to append after step `done`: of an interrupted run, the lines of later steps give way, since
// those steps will be done again.
static inline void trainer_open_metrics(Trainer *tr, int64_t done) {
    const char *out = tr->options->out;
    char *path = xprintf("%s/metrics.jsonl", out), *config = xprintf("%s/config.txt", out);
    directory_make(out);
    file_write_whole(config, tr->config_text, strlen(tr->config_text));
    if (path_exists(path)) {
        Text kept = {NULL, 0, 0};
        MetricsLog log = metrics_read(path);
        for (int64_t i = 0; i < log.n; i++)
            if (log.record[i].step <= (double)done) metrics_write(&kept, &log.record[i]);
        file_write_whole(path, kept.s, kept.n);
        metrics_log_free(&log);
        text_free(&kept);
    }
    tr->metrics = file_open(path, "ab");
    free(path);
    free(config);
}

static inline void trainer_record(Trainer *tr, const Metrics *r) {
    Text line = {NULL, 0, 0};
    char *path = xprintf("%s/metrics.jsonl", tr->options->out);
    metrics_write(&line, r);
    file_write(tr->metrics, path, line.s, line.n);
    if (fflush(tr->metrics)) die("cannot write %s: %s", path, strerror(errno));
    free(path);
    text_free(&line);
}

// ---- Evaluation ----

typedef struct { double loss, bits_per_byte; int64_t tokens, bytes; } Evaluation;

// Mean loss over the first `rows` windows of the shards, each token with the same weight whatever the batch, under the
// plan of all rows with each branch times its factor (2L), 0 to leave it out; plan is room for B rows. bits_per_byte is
// NaN without a tokenizer (t NULL). The ranks of comm (NULL: alone) share the batches; rows are added up in their order,
// so that neither the batch nor the number of ranks changes the sum.
static inline Evaluation evaluate_shards(const Engine *e, Model *m, const Shards *shards, int64_t rows, const Tokenizer *t,
                                         int B, DropPlan *plan, const double *scale, int tied, const Comm *comm) {
    const int T = shards->T;
    const size_t BT = (size_t)B * (size_t)T;
    int *tokens = (int *)xcalloc(BT, sizeof *tokens), *targets = (int *)xcalloc(BT, sizeof *targets);
    real *losses = (real *)xcalloc(BT, sizeof *losses);
    double *loss = (double *)xcalloc((size_t)rows, sizeof *loss), bytes = 0;
    const int64_t stride = (int64_t)B * (comm ? comm->world : 1);
    Evaluation sum = {0, NAN, rows * T, 0};
    for (int64_t row = (int64_t)B * (comm ? comm->rank : 0); row < rows; row += stride) {
        const int n = rows - row < B ? (int)(rows - row) : B;
        for (int b = 0; b < n; b++) shards_read_window(shards, row + b, tokens + b * T, targets + b * T);
        drop_plan_keep_all(plan, scale, tied, n);
        e->forward(m, T, tokens, targets, plan);
        e->losses(m, losses);
        for (int i = 0; i < n * T; i++) {
            loss[row + i / T] += (double)losses[i];
            if (t) bytes += targets[i] < t->V ? tokenizer_text_length(t, targets[i]) : 0;
        }
    }
    comm_sum(comm, loss, (size_t)rows);                  // of each row, one rank has the loss and the others 0
    comm_sum(comm, &bytes, 1);
    for (int64_t row = 0; row < rows; row++) sum.loss += loss[row];
    sum.bytes = (int64_t)bytes;
    if (t && sum.bytes) sum.bits_per_byte = sum.loss / 0.69314718055994530942 / (double)sum.bytes;
    sum.loss /= sum.tokens ? (double)sum.tokens : 1;
    free(tokens);
    free(targets);
    free(losses);
    free(loss);
    return sum;
}

static inline void trainer_evaluate(Trainer *tr, Metrics *r) {
    const Tokenizer *t = tr->has_tokenizer ? &tr->tokenizer : NULL;
    Evaluation v = evaluate_shards(tr->engine, tr->model, &tr->val, tr->eval_rows, t, tr->B, &tr->plan, tr->state.eval_scale,
                                   tr->state.tied, tr->comm);
    r->val_loss = v.loss;
    r->val_ppl = exp(v.loss);
    r->val_bpb = t ? v.bits_per_byte : manifest_bits_per_byte(&tr->manifest[MANIFEST_VAL], MANIFEST_VAL, v.loss);
}

// ---- One optimizer step ----

// This rank's micro-batch m of step t: global row g = m*B + b is sample t*M*B + g.
static inline void trainer_read_batch(Trainer *tr, int64_t t, int m) {
    for (int b = 0; b < tr->B; b++) {
        const int64_t sample = (t * tr->M + m) * tr->B + b;
        shards_read_sample(&tr->train, (uint64_t)tr->options->seed, sample, tr->tokens + b * tr->T, tr->targets + b * tr->T);
    }
}

// The plan of micro-batch m, this rank's or another's: it is a function of (seed, step, m).
static inline void trainer_plan(Trainer *tr, int64_t t, int m) {
    if (!tr->replay.n) drop_plan_sample(&tr->plan, &tr->drop, t, m, tr->M, tr->world, tr->B);
    else {
        const char *error = drop_plan_read(&tr->plan, &tr->drop, t, tr->replay.record[t].plan, m, tr->B);
        CHECK(!error, "%s", error);                      // trainer_open_replay has read them all
    }
}

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
    for (int i = 0; i <= branches; i++) tr->reduce[i] = i == branches || tr->kept[i] > 0;
}

// The AdamW step of every branch in this update: one more than before, or 0 (untouched) for what was dropped throughout.
static inline void trainer_count_updates(Trainer *tr) {
    const int branches = BRANCHES * tr->config.L;
    for (int i = 0; i <= branches; i++) {
        int skipped = tr->options->drop_adam == ADAM_SKIP && i < branches && tr->kept[i] == 0;
        tr->adamw_steps[i] = skipped ? 0 : tr->state.adamw_steps[i] + 1;
    }
}

// What the plans of the step have cost, and kept.
static inline void trainer_account(Trainer *tr, Metrics *r) {
    const GptConfig *c = &tr->config;
    const double rows = (double)tr->B * tr->M;
    double flops = rows * gpt_head_flops(c, tr->T), kept[BRANCHES] = {0, 0};
    for (int i = 0; i < BRANCHES * c->L; i++) {
        flops += tr->kept[i] * gpt_branch_flops(c, i % BRANCHES, tr->T);
        kept[i % BRANCHES] += tr->kept[i];
    }
    r->flops = 3 * flops;
    r->flops_fraction = flops / (rows * gpt_row_flops(c, tr->T));
    r->kept_attn = kept[ATTN] / (rows * c->L);
    r->kept_mlp = kept[MLP] / (rows * c->L);
    r->drop_p = fmax(drop_path_rate(&tr->drop, c->L, ATTN, tr->state.step),
                     drop_path_rate(&tr->drop, c->L, MLP, tr->state.step));
    r->plan = tr->plan_text.s;
}

static inline void trainer_bad_step(Trainer *tr, double loss, double norm) {
    if (tr->rank == 0)
        warn("step %lld: loss %g, gradient norm %g: not finite, so the weights stay as they were",
             (long long)tr->state.step + 1, loss, norm);
    if (++tr->bad_steps < tr->options->max_bad_steps) return;
    if (tr->rank == 0)
        fprintf(stderr, "error: %d steps in a row were not finite\n  hint: a lower --lr, a longer --warmup; --resume "
                "continues from the last checkpoint in %s\n", tr->bad_steps, tr->options->out);
    comm_close(tr->comm);                                // all ranks come here together
    exit(3);
}

// Step t = state.step: of M micro-batches this rank's forward and backward, one update.
static inline Metrics trainer_step(Trainer *tr) {
    const TrainOptions *o = tr->options;
    const int64_t t = tr->state.step;
    const int branches = BRANCHES * tr->config.L;
    Metrics r = metrics_new();
    trainer_plan_step(tr, t);
    r.loss = 0;
    for (int m = tr->rank; m < tr->M; m += tr->world) {
        const unsigned char *reduce = tr->world > 1 && m + tr->world >= tr->M ? tr->reduce : NULL;
        trainer_read_batch(tr, t, m);
        trainer_plan(tr, t, m);
        r.loss += tr->engine->forward_backward(tr->model, tr->T, tr->tokens, tr->targets, &tr->plan, 1.0 / tr->M, reduce) /
                  tr->M;
    }
    comm_sum(tr->comm, &r.loss, 1);
    r.lr = schedule_lr(&tr->schedule, t);
    trainer_count_updates(tr);
    const UpdateArgs args = {r.lr, o->beta1, o->beta2, o->eps, o->weight_decay, o->grad_clip, tr->adamw_steps,
                             !isfinite(r.loss)};
    r.grad_norm = tr->engine->update(tr->model, &args);
    if (!isfinite(r.loss) || !isfinite(r.grad_norm)) trainer_bad_step(tr, r.loss, r.grad_norm);
    else {
        tr->bad_steps = 0;
        for (int i = 0; i <= branches; i++)
            if (tr->adamw_steps[i]) tr->state.adamw_steps[i] = tr->adamw_steps[i];
    }
    trainer_account(tr, &r);
    tr->state.step++;
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

static inline void trainer_print_start(const Trainer *tr) {
    const GptConfig *c = &tr->config;
    const TrainOptions *o = tr->options;
    char count[32], tokens[32];
    const size_t parameters = gpt_params_count(c);
    const double mib = 1048576;
    static const char *const products[] = {"", ", matrix products of bf16", "", ", matrix products of tf32"};
    EngineMemory memory;
    double usual, fraction = 0;
    metrics_grouped(count, (double)parameters);
    metrics_grouped(tokens, (double)tr->train.tokens);
    tr->engine->memory(tr->model, &memory);
    printf("engine:  %s%s; peak %.0f GFLOP/s, measured\n", tr->engine->name,
           products[trainer_dtype(tr->engine, o)], tr->peak_flops / 1e9);
    printf("model:   %s parameters: %d layers, %d heads, %d channels, %d tokens a row, vocabulary %d\n", count, c->L, c->NH,
           c->C, tr->T, c->V);
    printf("data:    %s tokens in %d shard%s; evaluation on %lld tokens\n", tokens, tr->train.n, tr->train.n == 1 ? "" : "s",
           (long long)tr->eval_rows * tr->T);
    printf("step:    %d rows x %d tokens x %d micro-batch%s; %lld steps are %.2f epochs\n", tr->B, tr->T, tr->M,
           tr->M == 1 ? "" : "es", (long long)tr->steps, (double)tr->steps * tr->M * tr->B / (double)tr->train.windows);
    if (tr->world > 1)
        printf("ranks:   %d processes, each %d micro-batch%s of a step; numbers of memory are of each, of speed of all\n",
               tr->world, tr->M / tr->world, tr->M == tr->world ? "" : "es");
    printf("memory:  parameters %.0f MiB, gradients %.0f MiB, moments %.0f MiB, activations %.0f MiB",
           (double)memory.parameters / mib, (double)memory.gradients / mib, (double)memory.moments / mib,
           (double)memory.activations / mib);
    if (memory.activations < memory.activations_full)
        printf(" of %.0f MiB without drop path", (double)memory.activations_full / mib);
    printf("\n");
    if (o->drop_path > 0 || tr->replay.n) {
        for (int64_t t = 0; t < tr->steps; t++) fraction += drop_path_expected_compute(&tr->drop, c, tr->T, t);
        printf("drop:    up to %.3g in layer %d, %.3g in layer 1; expected to execute %.1f%% of the FLOPs\n", o->drop_path,
               c->L, o->drop_path * drop_path_depth(&tr->drop, 1), 100 * fraction / (double)tr->steps);
        const char *size = drop_path_excess(o->drop_path, parameters, &usual);
        if (size)
            warn("--drop-path %g is high: %g is usual for a %s model; compare with a run without it", o->drop_path, usual,
                 size);
    }
    printf("output:  %s\n", o->out);
    fflush(stdout);
}

static inline void trainer_sample(Trainer *tr) {
    const TrainOptions *o = tr->options;
    const SampleArgs args = {0.8, 0, 1, (uint64_t)o->seed};
    drop_plan_keep_all(&tr->plan, tr->state.eval_scale, tr->state.tied, 1);
    printf("---- sample after step %lld ----\n", (long long)tr->state.step);
    sample_text(stdout, tr->engine, tr->model, tr->config.V, tr->T, &tr->plan, &tr->tokenizer, o->prompt, o->sample_tokens,
                &args, 0);
    printf("\n----\n");
    fflush(stdout);
}

// ---- The loop ----

// Runs in several processes that take turns, so that what disturbs the machine disturbs them alike (compare): a run
// waits for a byte on `go`, works for about `seconds`, and writes a byte to `done`. `until` starts at 0.
typedef struct { const char *label; int go, done; double seconds, until; } TrainerTurn;

// Between two steps: ends the turn if its time is over, and waits for the next one.
static inline void trainer_take_turn(TrainerTurn *turn) {
    char byte = 0;
    if (!turn || clock_seconds() < turn->until) return;
    const int first = turn->until == 0;
    if ((!first && write(turn->done, &byte, 1) != 1) || read(turn->go, &byte, 1) != 1) exit(1);   // nobody gives turns
    turn->until = clock_seconds() + turn->seconds;
}

static inline int trainer_due(int64_t every, int64_t step, int64_t steps) {
    return step == steps || (every > 0 && step % every == 0);
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
    free(map);
}

// Rank 0 writes a checkpoint; where each rank has a share of the moments, all take part.
static inline void trainer_save(Trainer *tr) {
    const TrainOptions *o = tr->options;
    if (tr->rank) {
        if (o->zero) checkpoint_attend(tr->engine, tr->model, &tr->config);
        return;
    }
    fsync(fileno(tr->metrics));                          // no checkpoint is ahead of its metrics
    checkpoint_save(o->out, tr->engine, tr->model, &tr->config, &tr->state);
    checkpoint_prune(o->out, o->keep);
}

// Runs what the options say, from the step where it stands to the last. config_text is these options as config.txt;
// turn is NULL for a run that has the machine to itself, comm for one that is alone.
static inline void trainer_run(const Engine *engine, const TrainOptions *o, const char *config_text, TrainerTurn *turn,
                               Comm *comm) {
    Trainer trainer, *tr = &trainer;
    trainer_open(tr, engine, o, config_text, comm);
    if (tr->state.step >= tr->steps) {
        if (tr->rank == 0) printf("%s has all %lld steps already\n", o->out, (long long)tr->steps);
        trainer_close(tr);
        return;
    }
    if (*o->drop_replay && o->drop_path == 0 && tr->rank == 0)
        warn("--drop-replay without --drop-path: branches drop as recorded, with scale 1");
    if (!tr->has_val && tr->rank == 0) warn("no --val: the run will not be evaluated");
    if (o->sample_every && !tr->has_tokenizer)
        die("--sample-every needs a tokenizer\n  hint: --tokenizer FILE, see data/README.md");
    tr->peak_flops = engine->peak(tr->model, 0.2);
    comm_sum(comm, &tr->peak_flops, 1);
    if (tr->rank == 0) {
        trainer_print_start(tr);
        trainer_open_metrics(tr, tr->state.step);
    }
    double busy = 0;
    for (int64_t first = tr->state.step; tr->state.step < tr->steps;) {
        trainer_take_turn(turn);
        const double start = clock_seconds();
        Metrics r = trainer_step(tr);
        const double seconds = clock_seconds() - start;
        const int64_t step = tr->state.step;
        busy += seconds;
        r.ms = 1000 * seconds;
        r.tok_per_s = (double)tr->M * tr->B * tr->T / seconds;
        r.mfu = r.flops / seconds / tr->peak_flops;
        if (tr->has_val && trainer_due(o->eval_every, step, tr->steps)) trainer_evaluate(tr, &r);
        if (tr->rank == 0)
            trainer_report(tr, &r, turn, step == first + 1, busy / (double)(step - first) * (double)(tr->steps - step));
        if (trainer_due(o->save_every, step, tr->steps)) trainer_save(tr);
    }
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
    options_add(&options, train_option_specs, N_TRAIN_OPTION_SPECS, &o);
    options_parse(&options, argc, argv);
    options_apply_recipe(&options, &o);
    Comm *comm = trainer_ranks(&o);
    const TrainOptions given = o;
    o.resume = o.rendezvous = o.job_token = (char *)(uintptr_t)"";        // config.txt is of the run, however it is started
    options_dump(&options, &config);
    o = given;
    trainer_run(engine, &o, config.s, NULL, comm);
    comm_close(comm);
    text_free(&config);
    options_free(&options);
    return 0;
}

#endif
