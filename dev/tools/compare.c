// compare.c: does drop path pay? Trains without it and with it, on the same data in the same order,
// for one seed or several, and compares loss, FLOPs, time and memory.
//
//     build/compare --train 'data/train_*.bin' --val 'data/val_*.bin' --drop-path 0.1 --seeds 3
//         --out runs/compare
//
// Accepts every option of train_gpt. Each run is the same as train_gpt's, in its own folder,
// OUT/none_s1337, OUT/drop_s1337, ...; repeating the command continues where it stopped, or with
// more --seeds adds the missing runs. The result is printed and written to OUT/compare.md and
// OUT/compare.json. The signals that stop train_gpt (see signals.h) stop and save every run after
// its step.
#include "../files/files.h"
#include "../model/engines.h"
#include "../run/trainer.h"
#include "budget.h"
#include "collapse.h"
#include "report.h"
#include "stats.h"
#include <poll.h>
#include <sys/file.h>
#include <sys/mman.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

// ---- Options: the trainer's, and these ----

#define COMPARE_OPTIONS(HEADING, OPTION)                                                          \
  HEADING("Compare: every run is made without and with drop path")                                \
    OPTION(seeds, "seeds", INTEGER, "1", "[1,1000]",                                              \
           "runs of each kind, with seeds --seed, --seed + 1, ...; differences have an interval " \
               "from 2 on")                                                                       \
    OPTION(equal_flops, "equal-flops", FLAG, "1", "0|1",                                          \
           "also train with drop path at equal FLOPs, for correspondingly more steps")             \
    OPTION(take_turns, "take-turns", FLAG, "1", "0|1",                                            \
           "the runs of a seed work in turn, half a second each, so that a noisy machine slows "  \
               "all alike; 0: one "                                                               \
           "after the other, in less memory")                                                     \
    OPTION(collapse, "collapse", INTEGER, "0", "[0,1e15]",                                        \
           "neural collapse of each final model: build/collapse with this many tokens of "        \
               "--train; 0: not measured")                                                        \
    OPTION(picture, "picture", FLAG, "1", "0|1",                                                  \
           "also draw OUT/compare.png and .svg, where python3 has matplotlib")

OPTION_TABLE(COMPARE_OPTIONS, CompareOptions, compare_options)

// ---- Compared results ----

#define TURN_SECONDS 0.5

enum { NONE, DROP, DROP_FLOPS, MAX_ARMS };
// of folders, and in compare.json
static const char *const arm_name[MAX_ARMS] = {"none", "drop", "drop_flops"};

// The results of a run: name in compare.json, row in the table, its unit, and its format.
#define NUMBERS(X)                                                                   \
    X(steps,            "optimizer steps",                     1,       "%.0f")      \
    X(tokens,           "tokens trained on",                   1,       "%.0f")      \
    X(flops,            "FLOPs executed",                      1,       "%.4g")      \
    X(val_loss,         "validation loss (nats per token)",    1,       "%.4f")      \
    X(val_ppl,          "validation perplexity",               1,       "%.4f")      \
    X(val_bpb,          "validation bits per byte",            1,       "%.4f")      \
    X(tok_per_s,        "training tokens per second",          1,       "%.0f")      \
    X(seconds,          "wall time of the steps (s)",          1,       "%.2f")      \
    X(peak_bytes,       "peak memory (MiB)",                   1048576, "%.1f")      \
    X(speedup_measured, "speed-up, measured",                  1,       "%.3fx")     \
    X(speedup_ideal,    "speed-up, ideal (ratio of FLOPs)",    1,       "%.3fx")

#define X(name, title, unit, format) N_##name,
enum { NUMBERS(X) N_NUMBERS };
#undef X

static const struct { const char *name, *title; double unit; const char *format;
                      } number[N_NUMBERS] = {
#define X(name, title, unit, format) {#name, title, unit, format},
    NUMBERS(X)
#undef X
};

// What else is measured on request, in a table of its own: the loss at a reduced depth, or a number
// of neural collapse.
typedef struct {
    char *name, *title;      // in compare.json, and in the table
    double *value[MAX_ARMS]; // (seeds) each
} Extra;

typedef struct {
    Options options;
    TrainOptions train;
    CompareOptions own;
    GptConfig config;
    int T, seeds, arms;
    int64_t step_tokens, steps[MAX_ARMS];
    double *value[MAX_ARMS][N_NUMBERS];  // (seeds) each
    DepthShares depths;                  // of --eval-depths
    int depth_cells, extras;             // shares times kinds, which come first; all
    Extra *extra;                        // (extras)
    double *peak;                        // FLOP/s, shared by the runs; 0 until one has measured it
} Compare;

// ---- Checks before anything is written ----

static void read_options(Compare *c, int argc, char **argv) {
    const TrainOptions *o = &c->train;
    options_init(&c->options, "compare --train GLOB --val GLOB --drop-path X [--seeds N] "
                 "[options]");
    c->options.engine = engine_default_name();
    c->options.notes = SIGNALS_HELP;
    options_add(&c->options, train_options(), &c->train);
    options_add(&c->options, compare_options(), &c->own);
    options_parse(&c->options, argc, argv);
    options_apply_recipe(&c->options, &c->train);
    if (!*o->train || !*o->val)
        die("compare needs --train and --val\n  hint: data/README.md tells how to make token "
            "shards");
    if (o->drop_path == 0)
        die("compare needs a --drop-path above 0\n  hint: 0.1 is usual for a small model");
    if (o->dry_run)
        die("compare has no --dry-run\n  hint: build/train_gpt --dry-run, with these options");
    if (*o->resume)
        die("compare does without --resume: the same command continues where it stopped");
    if (*o->grow) die("compare weighs drop path alone\n  hint: leave out --grow");
    if (*o->drop_replay)
        die("--drop-replay: compare draws its plans\n  hint: train_gpt replays them");
    CommLaunch launch;
    char *error = comm_launch(&launch, "tcp://localhost:1", "unused", comm_look, NULL);
    if (error || launch.world > 1)
        die("compare is one process: start it without mpirun, srun or scripts/launch.sh");
    if (o->seed > INT64_MAX - c->own.seeds)
        die("--seed %lld leaves no room for %lld seeds", (long long)o->seed,
            (long long)c->own.seeds);
    c->seeds = (int)c->own.seeds;
    c->arms = c->own.equal_flops ? MAX_ARMS : DROP_FLOPS;
}

// The model, the steps and the data, as the trainer will see them. Does not open an engine: its
// threads would not survive a fork.
static void read_sizes(Compare *c) {
    Trainer tr;
    memset(&tr, 0, sizeof tr);
    tr.options = &c->train;
    tr.world = tr.has_val = 1;
    char *from = *c->train.init_from ? checkpoint_find(c->train.init_from) : NULL;
    trainer_open_tokenizer(&tr, from);
    trainer_config(&tr, from, 0);
    free(from), free(tr.lora.base);
    shards_open(&tr.train, c->train.train, tr.T, tr.config.V);
    shards_open(&tr.val, c->train.val, tr.T, tr.config.V);
    trainer_sizes(&tr);
    c->config = tr.config;
    c->T = tr.T;
    c->step_tokens = (int64_t)tr.B * tr.T * tr.M;
    c->steps[NONE] = c->steps[DROP] = tr.steps;
    c->depths = tr.eval_depths;
    shards_close(&tr.train);
    shards_close(&tr.val);
    if (tr.has_tokenizer) tokenizer_free(&tr.tokenizer);
    free(tr.tokenizer_path);
    for (int i = 0; i < MANIFEST_SIDES; i++) manifest_free(&tr.manifest[i]);
}

// The steps with drop path whose FLOPs equal the run without it.
static int64_t equal_flops_steps(const Compare *c) {
    const Budget b = {&c->train, &c->config, c->T};
    return budget_steps(&b, (double)c->steps[NONE], c->steps[NONE]);
}

// ---- One run ----

// The options of a run; `out` is from malloc, the other texts are the user's.
static TrainOptions run_options(const Compare *c, int arm, int s) {
    TrainOptions o = c->train;
    o.seed += s;
    o.out = xprintf("%s/%s_s%lld", c->train.out, arm_name[arm], (long long)o.seed);
    o.steps = c->steps[arm];
    o.epochs = 0;
    if (arm == NONE) o.drop_path = 0;
    return o;
}

// The run's config.txt: what train_gpt would write.
static Text run_config(const Compare *c, TrainOptions *o) {
    Text text = {NULL, 0, 0};
    Options view = c->options;
    view.n_sets = 2;                                     // the parser's own and the trainer's
    view.set[1].values = o;
    options_dump(&view, &text);
    return text;
}

// Whether the run was started before; dies if that was with other options.
static int run_started(const char *out, const Text *config) {
    char *path = xprintf("%s/config.txt", out);
    FileMap map;
    const int started = path_exists(path);
    const char *error = started ? file_map(&map, path) : NULL;
    if (error) die("cannot read %s: %s", path, error);
    if (started && (map.size != config->n || memcmp(map.data, config->s, config->n))) {
        size_t i = 0;
        while (i < map.size && i < config->n && (char)map.data[i] == config->s[i]) i++;
        while (i > 0 && config->s[i - 1] != '\n') i--;
        die("%s was run with other options\n  now: %.*s\n  hint: another --out starts anew", out,
            (int)strcspn(config->s + i, "\n"), config->s + i);
    }
    if (started) file_unmap(&map);
    free(path);
    return started;
}

static void add_extra(Compare *c, char *name, char *title) {
    c->extra = (Extra *)xrealloc(c->extra, (size_t)(c->extras + 1), sizeof *c->extra);
    Extra *e = &c->extra[c->extras++];
    e->name = name, e->title = title;
    for (int arm = 0; arm < MAX_ARMS; arm++) {
        e->value[arm] = (double *)xcalloc((size_t)c->seeds, sizeof(double));
        for (int s = 0; s < c->seeds; s++) e->value[arm][s] = NAN;
    }
}

static void open_extras(Compare *c) {
    c->depth_cells = c->depths.n * KEEP_KINDS;
    for (int i = 0; i < c->depth_cells; i++) {
        const double share = c->depths.share[i / KEEP_KINDS];
        const int kind = i % KEEP_KINDS;
        add_extra(c, xprintf("val_%s_%g", keep_kind_name[kind], share),
                  xprintf("%s %g%%", kind == KEEP_PREFIX ? "the first" : "evenly spaced",
                          100 * share));
    }
#define X(field, label, meaning) \
    if (c->own.collapse)                                                                          \
        add_extra(c, xstrdup("collapse_" #field), xstrdup(&label[strspn(label, " ")]));
    COLLAPSE_NUMBERS(X)
#undef X
}

static void close_extras(Compare *c) {
    for (int i = 0; i < c->extras; i++) {
        free(c->extra[i].name), free(c->extra[i].title);
        for (int arm = 0; arm < MAX_ARMS; arm++) free(c->extra[i].value[arm]);
    }
    free(c->extra);
}

// Reads the results of a run from its metrics.jsonl; returns whether training and the final
// evaluation are complete.
static int run_read(Compare *c, int arm, int s, const char *out) {
    char *path = xprintf("%s/metrics.jsonl", out);
    MetricsLog log = {NULL, 0};
    if (path_exists(path)) log = metrics_read(path);
    free(path);
    const int64_t n = log.n;
    const Metrics *last = n ? &log.record[n - 1] : NULL;
    // written after the last record
    char *checkpoint = checkpoint_path(out, c->steps[arm]);
    const int finished = n == c->steps[arm] && last->step == (double)n &&
        isfinite(last->val_loss) && path_exists(checkpoint);
    free(checkpoint);
    if (finished) {
        double flops = 0, ms = 0, peak = 0;
        for (const Metrics *r = log.record; r <= last; r++) {
            flops += r->flops;
            ms += r->ms;
            peak = fmax(peak, r->peak_bytes);
        }
        const double value[N_NUMBERS] = {
            [N_steps] = last->step, [N_tokens] = last->tokens, [N_flops] = flops,
            [N_val_loss] = last->val_loss, [N_val_ppl] = last->val_ppl, [N_val_bpb] = last->val_bpb,
            [N_tok_per_s] = last->tokens / (ms / 1000), [N_seconds] = ms / 1000,
            [N_peak_bytes] = peak,
            [N_speedup_measured] = arm == NONE ? 1 : c->value[NONE][N_seconds][s] / (ms / 1000),
            [N_speedup_ideal] = arm == NONE ? 1 : c->value[NONE][N_flops][s] / flops,
        };
        for (int k = 0; k < N_NUMBERS; k++) c->value[arm][k][s] = value[k];
        for (int i = 0; i < c->depth_cells; i++)
            c->extra[i].value[arm][s] =
                metrics_depth_loss(last->depth, last->depths, i % KEEP_KINDS,
                                   c->depths.share[i / KEEP_KINDS]);
    }
    metrics_log_free(&log);
    return finished;
}

// ---- The runs of one seed: one process each, to measure its own peak memory, in turns ----

typedef struct {
    TrainOptions o;
    Text config;
    char *title, label[16];
    int started, finished;  // before this program, wholly before
    int begun, stopping;    // has had a turn; was handed the signal that stops it
    pid_t pid;              // 0: no process
    int go, done;           // our ends of the pipes of TrainerTurn
} Run;

static void run_open(Compare *c, Run *r, int arm, int s) {
    memset(r, 0, sizeof *r);
    r->o = run_options(c, arm, s);
    r->config = run_config(c, &r->o);
    r->title = xprintf("run %d of %d: %s, seed %lld", s * c->arms + arm + 1, c->seeds * c->arms,
                       arm_name[arm], (long long)r->o.seed);
    snprintf(r->label, sizeof r->label, "%-10s ", arm_name[arm]);
    r->started = run_started(r->o.out, &r->config);
    r->finished = run_read(c, arm, s, r->o.out);
}

static void run_close(Run *r) {
    text_free(&r->config);
    free(r->title);
    free(r->o.out);
}

// Starts a process that trains from its first turn on. `others` (n) are already started.
static void run_start(Run *r, double seconds, double *peak, const Run *others, int n) {
    int go[2], done[2];
    fflush(NULL);
    if (pipe(go) || pipe(done)) die("cannot make a pipe: %s", strerror(errno));
    r->pid = fork();
    if (r->pid < 0) die("cannot start a process: %s", strerror(errno));
    if (r->pid == 0) {
#ifdef __linux__
        prctl(PR_SET_PDEATHSIG, SIGKILL);                // who kills compare means its runs too
#endif
        // or they would not see that compare has ended
        for (int i = 0; i < n; i++)
            if (others[i].pid) close(others[i].go), close(others[i].done);
        close(go[1]);
        close(done[0]);
        TrainerTurn turn = {r->label, go[0], done[1], seconds, 0, peak};
        trainer_take_turn(&turn);
        printf("\n%s -> %s\n", r->title, r->o.out);
        r->o.resume = (char *)(uintptr_t)(r->started ? "latest" : "");
        trainer_run("build/train_gpt", engine_default(), &r->o, r->config.s, &turn, NULL);
        exit(0);
    }
    close(go[0]);
    close(done[1]);
    r->go = go[1];
    r->done = done[0];
}

// Forwards signals that this process received to the runs (n).
static void hand_on(Run *run, int n) {
    const int save = signals_take_save();
    for (int i = 0; i < n; i++) {
        if (!run[i].pid) continue;
        if (save) kill(run[i].pid, SIGUSR1);
        if (signals_stop && !run[i].stopping++) kill(run[i].pid, signals_stop);
    }
}

// Gives run i of n a turn and waits until the run reports its end (1) or exits (0).
static int take_turn(Run *run, int n, int i) {
    Run *r = &run[i];
    char byte = 0;
    struct pollfd done = {r->done, POLLIN, 0};
    r->begun = 1;
    hand_on(run, n);
    if (write(r->go, &byte, 1) != 1) return 0;
    // a signal that comes just before poll waits 100 ms
    while (poll(&done, 1, 100) <= 0) hand_on(run, n);
    ssize_t got;
    while ((got = read(r->done, &byte, 1)) < 0 && errno == EINTR) {}
    return got == 1;
}

// One turn of run i of n; returns whether more remains. Exits with the run's code if it failed: the
// others end with this process.
static int run_turn(Run *run, int n, int i) {
    Run *r = &run[i];
    const int cancelled = signals_stop && !r->begun;     // there is nothing to save
    if (cancelled) kill(r->pid, SIGKILL);
    else if (take_turn(run, n, i)) return 1;
    const int status = child_wait(r->pid);
    close(r->go);
    close(r->done);
    r->pid = 0;
    if (status == 0 || cancelled) return 0;
    // as a shell counts
    const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    fprintf(stderr, "error: %s ended with exit code %d\n  hint: the same command again continues "
            "with it\n", r->title, code);
    exit(code);
}

// All runs of seed s; returns whether they finished. With --take-turns 0 a turn is a whole run.
static int run_seed(Compare *c, int s) {
    Run run[MAX_ARMS];
    const double seconds = c->own.take_turns ? TURN_SECONDS : INFINITY;
    for (int arm = 0; arm < c->arms; arm++) {
        run_open(c, &run[arm], arm, s);
        if (run[arm].finished)
            printf("%s: finished before, in %s\n", run[arm].title, run[arm].o.out);
        else run_start(&run[arm], seconds, c->peak, run, arm);
    }
    for (int busy = 1; busy;) {
        busy = 0;
        for (int arm = 0; arm < c->arms; arm++) busy |= run[arm].pid && run_turn(run, c->arms, arm);
    }
    int finished = 1;
    for (int arm = 0; arm < c->arms; arm++) {
        const int ended = run_read(c, arm, s, run[arm].o.out);
        if (!ended && !signals_stop)
            die("%s ended without a finite validation loss\n  hint: a lower --lr", run[arm].title);
        finished &= ended;
        run_close(&run[arm]);
    }
    return finished;
}

// ---- Neural collapse of a final model, by build/collapse ----

#ifdef CUDA_BUILD
#define COLLAPSE_PROGRAM "collapse_cuda"
#else
#define COLLAPSE_PROGRAM "collapse"
#endif

static void collapse_read(Compare *c, int arm, int s, const char *path) {
    FileMap map;
    Json doc;
    const char *error = file_map(&map, path);
    if (error) die("cannot read %s: %s", path, error);
    if ((error = json_parse(&doc, map.data, map.size))) die("%s: %s", path, error);
    const int numbers = json_first(&doc, json_get(&doc, 0, "checkpoints"));
    for (int i = c->depth_cells; i < c->extras; i++)
        json_number(&doc, json_get(&doc, numbers, c->extra[i].name + strlen("collapse_")),
                    &c->extra[i].value[arm][s]);
    json_free(&doc);
    file_unmap(&map);
}

// Measures one run, unless that was done before. A model that cannot be measured, because too few
// tokens come twice, has no numbers, and collapse's own words say why. Returns 0 if a signal came.
static int collapse_run(Compare *c, const char *program, int arm, int s) {
    TrainOptions o = run_options(c, arm, s);
    char *json = xprintf("%s/collapse_%lld.json", o.out, (long long)c->own.collapse),
         *latest = xprintf("%s/latest", o.out),
         *tokens = xprintf("%lld", (long long)c->own.collapse),
         *threads = xprintf("%lld", (long long)o.threads), *seq_len = xprintf("%d", c->T);
    char *arguments[] = {program_beside(program, COLLAPSE_PROGRAM), latest, "--train", o.train,
                         "--val", o.val, "--tokens", tokens, "--seq-len", seq_len, "--threads",
                         threads, "--json", json, NULL};
    if (!path_exists(json)) {
        fflush(NULL);
        const pid_t pid = fork();
        if (pid < 0) die("cannot start a process: %s", strerror(errno));
        if (pid == 0) {
            const int null = open("/dev/null", O_WRONLY);
            dup2(null, STDOUT_FILENO);
            execvp(arguments[0], arguments);
            die("cannot start %s: %s", arguments[0], strerror(errno));
        }
        child_wait(pid);
    }
    if (path_exists(json)) collapse_read(c, arm, s, json);
    else if (!signals_stop) warn("%s: neural collapse was not measured", o.out);
    free(arguments[0]), free(json), free(latest), free(tokens), free(threads), free(seq_len);
    free(o.out);
    return !signals_stop;
}

// Only one compare at a time per folder. The lock is held until all processes of this compare have
// ended, including orphaned runs.
static void lock_folder(const char *out) {
    const int fd = open(out, O_RDONLY);
    // some network disks have no locks
    if (fd < 0 || flock(fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) return;
    printf("waiting for another compare in %s to end\n", out);
    fflush(stdout);
    while (flock(fd, LOCK_EX) && errno == EINTR) {}
}

// ---- Results ----

static double mean_of(const Compare *c, int arm, int k) {
    return stats_mean(c->value[arm][k], c->seeds);
}

static StatsDifference minus_none(const Compare *c, int arm, int k) {
    return stats_paired(c->value[arm][k], c->value[NONE][k], c->seeds);
}

// A loss more than 3% above the baseline's, and, if that can be tested, by more than chance.
static int underfits(const Compare *c, int arm) {
    const StatsDifference d = minus_none(c, arm, N_val_loss);
    return d.mean > 0.03 * mean_of(c, NONE, N_val_loss) && (c->seeds < 2 || d.mean > 2 * d.error);
}

static char *arm_title(const Compare *c, int arm) {
    if (arm == NONE) return xstrdup("no drop path");
    return xprintf("drop path %g%s", c->train.drop_path, arm == DROP ? "" : ", equal FLOPs");
}

// "1.9012 (sd 0.0031)"; without the sd if all seeds agree or there is only one; "n/a" without a
// value.
static char *mean_cell(const Compare *c, int arm, int k) {
    const double mean = mean_of(c, arm, k), sd = stats_sd(c->value[arm][k], c->seeds);
    if (isnan(mean)) return xstrdup("n/a");
    Text t = {NULL, 0, 0};
    text_printf(&t, number[k].format, mean / number[k].unit);
    if (sd > 0) {
        text_printf(&t, " (sd ");
        text_printf(&t, number[k].format, sd / number[k].unit);
        text_printf(&t, ")");
    }
    return t.s;
}

// "+0.0123, 95% interval -0.0040 .. +0.0286"; without the interval for one seed
static char *difference_text(const Compare *c, int arm, int k) {
    const StatsDifference d = minus_none(c, arm, k);
    if (isnan(d.mean)) return xstrdup("n/a");
    if (isnan(d.low)) return xprintf("%+.4f", d.mean);
    return xprintf("%+.4f, 95%% interval %+.4f .. %+.4f", d.mean, d.low, d.high);
}

// Counts as they are, numbers of usual size with four decimals.
static char *extra_cell(double x) {
    if (isnan(x)) return xstrdup("n/a");
    const int usual = fabs(x) < 1e4 && fabs(x) >= 1e-3;
    return xprintf(x == floor(x) && fabs(x) < 1e9 ? "%.0f" : usual ? "%.4f" : "%.4g", x);
}

// The extra measures [first, end), for every arm and minus those without drop path.
static void report_extras(const Compare *c, const char *title, int first, int end, Text *out) {
    Table t = table_new(1 + end - first, 2 * c->arms);
    *table_cell(&t, 0, 0) = xstrdup(title);
    for (int arm = 0; arm < c->arms; arm++) {
        *table_cell(&t, 0, 1 + arm) = arm_title(c, arm);
        if (arm == NONE) continue;
        char *title = arm_title(c, arm);
        *table_cell(&t, 0, c->arms + arm) = xprintf("%s, minus none", title);
        free(title);
    }
    for (int i = first, row = 1; i < end; i++, row++) {
        const Extra *e = &c->extra[i];
        *table_cell(&t, row, 0) = xstrdup(e->title);
        for (int arm = 0; arm < c->arms; arm++) {
            const StatsDifference d = stats_paired(e->value[arm], e->value[NONE], c->seeds);
            *table_cell(&t, row, 1 + arm) = extra_cell(stats_mean(e->value[arm], c->seeds));
            if (arm == NONE) continue;
            *table_cell(&t, row, c->arms + arm) =
                isnan(d.mean)  ? xstrdup("n/a")
                : isnan(d.low) ? xprintf("%+.4f", d.mean)
                               : xprintf("%+.4f, %+.4f .. %+.4f", d.mean, d.low, d.high);
        }
    }
    text_printf(out, "\n");
    table_print(out, &t);
    table_free(&t);
}

static void report_tables(const Compare *c, Text *out) {
    Table means = table_new(1 + N_NUMBERS, 1 + c->arms), differences = table_new(4, c->arms);
    *table_cell(&means, 0, 0) = xprintf("mean of %d seed%s", c->seeds, c->seeds == 1 ? "" : "s");
    *table_cell(&differences, 0, 0) = xstrdup("minus no drop path, paired by seed");
    for (int arm = 0; arm < c->arms; arm++) {
        *table_cell(&means, 0, 1 + arm) = arm_title(c, arm);
        if (arm != NONE) *table_cell(&differences, 0, arm) = arm_title(c, arm);
    }
    for (int k = 0; k < N_NUMBERS; k++) {
        *table_cell(&means, 1 + k, 0) = xstrdup(number[k].title);
        for (int arm = 0; arm < c->arms; arm++)
            *table_cell(&means, 1 + k, 1 + arm) = mean_cell(c, arm, k);
    }
    for (int k = N_val_loss, row = 1; k <= N_val_bpb; k++, row++) {
        *table_cell(&differences, row, 0) = xstrdup(number[k].title);
        for (int arm = DROP; arm < c->arms; arm++)
            *table_cell(&differences, row, arm) = difference_text(c, arm, k);
    }
    table_print(out, &means);
    text_printf(out, "\n");
    table_print(out, &differences);
    table_free(&means);
    table_free(&differences);
    const int depths = c->depth_cells;
    if (depths) report_extras(c, "validation loss with a share of the layers", 0, depths, out);
    if (c->own.collapse) report_extras(c, "neural collapse", depths, c->extras, out);
}

static void report_verdict(const Compare *c, Text *out) {
    text_printf(out, "\nTimes are sums over the steps, without evaluation and saving. %s.\n"
                "What else the machine did is in them: trust a speed-up as far as the seeds agree. "
                "%s\n\n", c->own.take_turns ? "The runs of a seed took turns" : "One run followed "
                "the other", c->seeds > 1 ? "sd: standard\ndeviation over the seeds."
                             : "One seed\ncannot tell an effect from chance: with --seeds 2 or "
                             "more differences have an interval.");
    for (int arm = DROP; arm < c->arms; arm++) {
        char *title = arm_title(c, arm);
        if (underfits(c, arm))
            text_printf(out, "underfitting: the validation loss with %s is %.1f%% above the one "
                        "without.\n"
                        "  hint: lower --drop-path, or train longer\n\n", title,
                        100 * (mean_of(c, arm, N_val_loss) / mean_of(c, NONE, N_val_loss) - 1));
        free(title);
    }
    const double none = mean_of(c, NONE, N_val_loss);
    char *difference = difference_text(c, DROP, N_val_loss);
    text_printf(out, "drop path %g: validation loss %.4f vs %.4f (%s), with %.1f%% fewer FLOPs and "
                "%.2fx the speed, measured (ideal %.2fx)", c->train.drop_path,
                mean_of(c, DROP, N_val_loss), none, difference,
                100 * (1 - mean_of(c, DROP, N_flops) / mean_of(c, NONE, N_flops)),
                mean_of(c, DROP, N_speedup_measured), mean_of(c, DROP, N_speedup_ideal));
    free(difference);
    if (c->arms > DROP_FLOPS) {
        difference = difference_text(c, DROP_FLOPS, N_val_loss);
        text_printf(out, "; at equal FLOPs (%lld steps) %.4f vs %.4f (%s)",
                    (long long)c->steps[DROP_FLOPS], mean_of(c, DROP_FLOPS, N_val_loss), none,
                    difference);
        free(difference);
    }
    text_printf(out, ".\n");
}

// ---- compare.md and compare.json ----

static void markdown(const Compare *c, Text *out, const char *command, const Text *report) {
    const GptConfig *g = &c->config;
    char parameters[32];
    metrics_grouped(parameters, (double)gpt_params_count(g));
    text_printf(out, "# Drop path %g compared with none\n\n    %s\n\n", c->train.drop_path,
                command);
    text_printf(out, "%s parameters: %d layers, %d heads, %d channels, %d tokens a row, vocabulary "
                "%d.\n", parameters, g->L, g->NH, g->C, c->T, g->V);
    text_printf(out, "%lld steps of %lld tokens", (long long)c->steps[NONE],
                (long long)c->step_tokens);
    if (c->arms > DROP_FLOPS)
        text_printf(out, "; at equal FLOPs %lld steps", (long long)c->steps[DROP_FLOPS]);
    text_printf(out, ". Seeds %lld to %lld.\n\n%s", (long long)c->train.seed,
                (long long)c->train.seed + c->seeds - 1, report->s);
}

static void json_run(const Compare *c, Text *out, int arm, int s) {
    TrainOptions o = run_options(c, arm, s);
    text_printf(out, "    {\"arm\": \"%s\", \"seed\": %lld, \"out\": ", arm_name[arm],
                (long long)o.seed);
    json_write_string(out, o.out);
    for (int k = 0; k < N_NUMBERS; k++) {
        text_printf(out, ", ");
        json_numbers(out, 1, &number[k].name, &c->value[arm][k][s]);
    }
    for (int i = 0; i < c->extras; i++) {
        text_printf(out, ", \"%s\": ", c->extra[i].name);
        json_write_number(out, c->extra[i].value[arm][s]);
    }
    text_printf(out, "}");
    free(o.out);
}

static void json_arm(const Compare *c, Text *out, int arm) {
    static const char *const moments[2] = {"mean", "sd"},
        *const interval[3] = {"mean", "low", "high"};
    text_printf(out, "    \"%s\": {\n", arm_name[arm]);
    for (int k = 0; k < N_NUMBERS; k++) {
        const double value[2] = {mean_of(c, arm, k), stats_sd(c->value[arm][k], c->seeds)};
        text_printf(out, "%s      \"%s\": {", k ? ",\n" : "", number[k].name);
        json_numbers(out, 2, moments, value);
        text_printf(out, "}");
    }
    for (int k = N_val_loss; arm != NONE && k <= N_val_bpb; k++) {
        const StatsDifference d = minus_none(c, arm, k);
        const double value[3] = {d.mean, d.low, d.high};
        text_printf(out, "%s\"%s\": {", k == N_val_loss ? ",\n      \"minus_none\": {" : ", ",
                    number[k].name);
        json_numbers(out, 3, interval, value);
        text_printf(out, k == N_val_bpb ? "}}" : "}");
    }
    for (int i = 0; i < c->extras; i++) {
        const double *x = c->extra[i].value[arm], *none = c->extra[i].value[NONE];
        const StatsDifference d = stats_paired(x, none, c->seeds);
        const double value[3] = {d.mean, d.low, d.high},
                     both[2] = {stats_mean(x, c->seeds), stats_sd(x, c->seeds)};
        text_printf(out, ",\n      \"%s\": {", c->extra[i].name);
        json_numbers(out, 2, moments, both);
        if (arm != NONE) {
            text_printf(out, ", \"minus_none\": {");
            json_numbers(out, 3, interval, value);
            text_printf(out, "}");
        }
        text_printf(out, "}");
    }
    if (arm != NONE)
        text_printf(out, ",\n      \"underfitting\": %s", underfits(c, arm) ? "true" : "false");
    text_printf(out, "\n    }");
}

static void json(const Compare *c, Text *out, const char *command) {
    const GptConfig *g = &c->config;
    text_printf(out, "{\n  \"format\": \"droppath.c comparison 1\",\n  \"command\": ");
    json_write_string(out, command);
    text_printf(out, ",\n  \"drop_path\": ");
    json_write_number(out, c->train.drop_path);
    text_printf(out, ",\n  \"model\": {\"parameters\": %zu, \"layers\": %d, \"heads\": %d, "
                "\"channels\": %d, \"seq_len\": %d, \"vocab_size\": %d},\n  \"step_tokens\": "
                "%lld,\n  \"seeds\": %d,\n  \"runs\": [", gpt_params_count(g), g->L, g->NH, g->C,
                c->T, g->V, (long long)c->step_tokens, c->seeds);
    for (int i = 0; i < c->seeds * c->arms; i++) {
        text_printf(out, i ? ",\n" : "\n");
        json_run(c, out, i % c->arms, i / c->arms);
    }
    text_printf(out, "\n  ],\n  \"arms\": {");
    for (int arm = 0; arm < c->arms; arm++) {
        text_printf(out, arm ? ",\n" : "\n");
        json_arm(c, out, arm);
    }
    text_printf(out, "\n  },\n  \"underfitting\": %s\n}\n", underfits(c, DROP) ? "true" : "false");
}

// ---- compare.png and compare.svg, by scripts/plot.py: optional ----

static void write_picture(const Compare *c, const char *program) {
    char *plot = picture_plot(program), *out = xprintf("%s/compare", c->train.out);
    char **arguments = (char **)xcalloc((size_t)(c->seeds * c->arms) + 5, sizeof *arguments);
    int n = 0;
    arguments[n++] = "python3";
    arguments[n++] = plot;
    arguments[n++] = "--out";
    arguments[n++] = out;
    for (int i = 0; i < c->seeds * c->arms; i++) {
        TrainOptions o = run_options(c, i / c->seeds, i % c->seeds);
        arguments[n++] = o.out;
    }
    if (plot && picture_draw(arguments)) printf("drawn:   %s.png, %s.svg\n", out, out);
    for (int i = 4; i < n; i++) free(arguments[i]);
    free(arguments);
    free(plot);
    free(out);
}

static void write_report(const Compare *c, int argc, char **argv) {
    Text command = {NULL, 0, 0}, report = {NULL, 0, 0}, md = {NULL, 0, 0}, js = {NULL, 0, 0};
    char *md_path = xprintf("%s/compare.md", c->train.out),
        *js_path = xprintf("%s/compare.json", c->train.out);
    for (int i = 0; i < argc; i++) {
        if (i) text_append(&command, " ", 1);
        shell_word(&command, argv[i]);
    }
    report_tables(c, &report);
    report_verdict(c, &report);
    markdown(c, &md, command.s, &report);
    json(c, &js, command.s);
    file_write_whole(md_path, md.s, md.n);
    file_write_whole(js_path, js.s, js.n);
    printf("\n%s\nwritten: %s, %s\n", report.s, md_path, js_path);
    text_free(&command), text_free(&report), text_free(&md), text_free(&js);
    free(md_path);
    free(js_path);
}

int main(int argc, char **argv) {
    Compare compare, *c = &compare;
    program_begin(argv);
    memset(c, 0, sizeof *c);
    read_options(c, argc, argv);
    if (c->own.collapse) free(program_beside(argv[0], COLLAPSE_PROGRAM));    // before anything runs
    read_sizes(c);
    if (c->arms > DROP_FLOPS) c->steps[DROP_FLOPS] = equal_flops_steps(c);
    for (int i = 0; i < MAX_ARMS * N_NUMBERS; i++)
        c->value[i / N_NUMBERS][i % N_NUMBERS] = (double *)xcalloc((size_t)c->seeds,
                                                                   sizeof(double));
    open_extras(c);
    directory_make(c->train.out);
    lock_folder(c->train.out);
    // a run that has died is reported by its exit code, not SIGPIPE
    signals_begin();
    signals_catch();
    c->peak = (double *)mmap(NULL, sizeof *c->peak, PROT_READ | PROT_WRITE,
                             MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (c->peak == MAP_FAILED) die("cannot share memory: %s", strerror(errno));
    int s = 0;
    while (s < c->seeds && run_seed(c, s)) s++;
    int measured = 0;
    const int measures = c->own.collapse && s == c->seeds ? c->seeds * c->arms : 0;
    while (measured < measures &&
           collapse_run(c, argv[0], measured % c->arms, measured / c->arms))
        measured++;
    if (s < c->seeds || measured < measures)
        printf("stopped by %s: every run is saved; the same command continues from here\n",
               signals_name());
    else {
        write_report(c, argc, argv);
        if (c->own.picture) write_picture(c, argv[0]);
    }
    for (int i = 0; i < MAX_ARMS * N_NUMBERS; i++) free(c->value[i / N_NUMBERS][i % N_NUMBERS]);
    close_extras(c);
    options_free(&c->options);
    return 0;
}
