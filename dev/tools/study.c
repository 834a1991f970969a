// study.c: does it pay? Arms that differ in any options of train_gpt, each tuned on seeds of its
// own, over several seeds at equal FLOPs, steps or seconds; what is shown, with intervals, and what
// not.
//
//     build/study PLAN                          plan, run, report
//     build/study plan PLAN                     runs, FLOPs, hours, the smallest effect it can see
//     build/study run PLAN --jobs 2 --for 3h    works off the queue: may be stopped, resumed, and
//     run
//                                               by several machines at once
//     build/study report PLAN                   tables, words and pictures of what has ended
//     build/study verify PLAN                   runs one seed of each arm again, compares the bits
//     build/study fit --arm NAME PLAN PLAN ...  L = E + A (s F)^-b: is the arm's compute worth
//     more? build/study syntax                        what a plan may say
//
// A plan is a text: study_plan.h; scripts/studies/ has some. `compare` is the small form: one drop
// setting, no tuning.
#include "study_report.h"

#define STUDY_COMMAND_OPTIONS(HEADING, OPTION)                                                     \
  HEADING("Study")                                                                                 \
    OPTION(jobs, "jobs", INTEGER, "0", "[0,1024]", "run: runs at a time; 0: as the plan says")     \
    OPTION(for_time, "for", TEXT, "", "TIME",                                                      \
           "run: stop after this time, 90s, 30m or 3h; what is under way is saved")                \
    OPTION(out, "out", TEXT, "", "DIR", "instead of the plan's")                                   \
    OPTION(results, "results", TEXT, "", "DIR", "instead of the plan's")                           \
    OPTION(picture, "picture", FLAG, "1", "0|1",                                                   \
           "report: also draw OUT/report.png and .svg, if python3 has matplotlib")                 \
    OPTION(arm, "arm", TEXT, "", "NAME", "fit: the arm that is compared with the baseline")        \
    OPTION(draws, "draws", INTEGER, "2000", "[100,1e6]", "fit: of its bootstrap")

OPTION_TABLE(STUDY_COMMAND_OPTIONS, StudyCommand, study_command)

enum { COMMAND_ALL, COMMAND_PLAN, COMMAND_RUN, COMMAND_REPORT, COMMAND_VERIFY, COMMAND_FIT,
       COMMAND_SYNTAX, COMMANDS };
static const char *const command_name[COMMANDS] = {"",       "plan", "run",   "report",
                                                   "verify", "fit",  "syntax"};

// Seconds of "90s", "30m", "3h", "2d", or "90"; infinity for "".
static double read_time(const char *text) {
    static const struct {
        const char *unit;
        double seconds;
    } units[] = {{"", 1}, {"s", 1}, {"m", 60}, {"h", 3600}, {"d", 86400}};
    char *end;
    const double x = strtod(text, &end);
    if (!*text) return INFINITY;
    for (size_t i = 0; i < sizeof units / sizeof units[0] && end > text && x > 0 && x < 1e9; i++)
        if (!strcmp(end, units[i].unit)) return x * units[i].seconds;
    die("--for %s: a time such as 90s, 30m or 3h", text);
}

// FLOP/s of one run on this machine: of the results that are there, else of a few steps of the
// baseline.
static double measured_rate(Study *s, const char *trainer, const StudyResults *all,
                            int *from_results) {
    double flops = 0, seconds = 0;
    for (int i = 0; i < all->n; i++)
        if (all->result[i].seconds > 0)
            flops += all->result[i].flops, seconds += all->result[i].seconds;
    *from_results = seconds > 0;
    if (seconds > 0) return flops / seconds;
    char *dir = study_temporary(), *out = s->out, *claims;
    s->out = dir;
    claims = xprintf("%s/claims", dir);
    directory_make(claims);
    const int place[STUDY_GRIDS] = {0};
    StudyRun r;
    memset(&r, 0, sizeof r);
    r.arm = s->base, r.o = s->arm[s->base].train;
    study_place(&s->arm[s->base], place, &r.o);
    const double time = study_time_steps(s, trainer, &r);
    study_remove(dir);
    s->out = out;
    free(dir), free(claims);
    return study_flops(&s->arm[s->base], &r.o, 1000) / 1000 / time;
}

static void print_runs(const StudyReport *r, double *flops, int *left) {
    const Study *s = r->s;
    static const char *const head[] = {"arm", "tuning runs", "final runs", "FLOPs of all", "ended"};
    Table t = table_new(1 + s->n_arms, 5);
    Text text = {NULL, 0, 0};
    for (int k = 0; k < 5; k++) study_set(&t, 0, k, xstrdup(head[k]));
    *flops = 0, *left = 0;
    for (int arm = 0; arm < s->n_arms; arm++) {
        int tune = 0, final = 0, ended = 0;
        double sum = 0, each = 0;
        for (int i = 0; i < r->state.n; i++) {
            const StudyRun *run = &r->state.run[i];
            if (run->arm != arm) continue;
            *(run->kind == RUN_TUNE ? &tune : &final) += 1;
            const int has = study_result(&r->all, run->key) != NULL;
            ended += has, sum += run->flops, each = run->flops;
            *flops += has ? 0 : run->flops;
            *left += !has;
        }
        if (!r->state.tuned[arm].done) {                 // its final runs have no key yet
            double multiples = 1;
            for (int k = 0; arm == s->base && k < s->n_curve; k++) multiples += s->curve[k];
            final = (int)s->own.seeds * (arm == s->base ? 1 + s->n_curve : 1);
            sum += each * multiples * (double)s->own.seeds;
            *flops += each * multiples * (double)s->own.seeds;
            *left += final;
        }
        study_set(&t, 1 + arm, 0, xstrdup(s->arm[arm].name));
        study_set(&t, 1 + arm, 1, xprintf("%d", tune));
        study_set(&t, 1 + arm, 2, xprintf("%d", final));
        study_set(&t, 1 + arm, 3, xprintf("%.3g", sum));
        study_set(&t, 1 + arm, 4, xprintf("%d", ended));
    }
    table_print(&text, &t);
    printf("%s\n", text.s);
    table_free(&t);
    text_free(&text);
}

// The smallest difference that the seeds can see: in standard deviations of the pairs, and with
// those that are known.
static void print_effect(const StudyReport *r) {
    const Study *s = r->s;
    const int n = (int)s->own.seeds, arms = s->n_arms - 1;
    printf(
        "%d seeds see a difference of %.2f paired standard deviations with a power of %.0f%% "
        "(%.2f of %d arms by Holm's first step)\n",
        n, stats_smallest_effect(n, STUDY_ALPHA, STUDY_POWER), 100 * STUDY_POWER,
        stats_smallest_effect(n, STUDY_ALPHA / arms, STUDY_POWER), arms);
    double most = 0;
    for (int arm = 0; arm < s->n_arms; arm++)
        if (arm != s->base && r->arm[arm].n > 1)
            most = fmax(most, stats_sd(r->arm[arm].difference, r->arm[arm].n));
    if (most > 0)
        printf("the largest such deviation so far is %.4f: %.4f is seen\n", most,
               most * stats_smallest_effect(n, STUDY_ALPHA, STUDY_POWER));
    else
        printf("with one of 0.010 nats that is %.4f; with 0.020, %.4f\n",
               0.010 * stats_smallest_effect(n, STUDY_ALPHA, STUDY_POWER),
               0.020 * stats_smallest_effect(n, STUDY_ALPHA, STUDY_POWER));
}

static void print_plan(Study *s, const char *trainer, int jobs) {
    StudyReport r;
    Text text = {NULL, 0, 0};
    char time[32];
    double flops;
    int left, known;
    study_report_open(&r, s);
    printf("data-sha256 = %s\n\n", s->data_sha256);
    study_table_arms(&r, &text);
    printf("%s\n", text.s);
    print_runs(&r, &flops, &left);
    const double rate = left ? measured_rate(s, trainer, &r.all, &known) : 1;
    metrics_duration(time, flops / rate / jobs);
    if (left)
        printf(
            "%d runs left, %.3g FLOPs: %s with %d at a time, each at %.3g FLOP/s (%s); grids that "
            "grow take more\n",
            left, flops, time, jobs, rate,
            known ? "of the runs that have ended" : "of a few steps of the baseline, alone");
    else printf("every run has ended\n");
    print_effect(&r);
    text_free(&text);
    study_report_close(&r);
}

// ---- verify ----

// Runs one final seed of each arm again, apart, and compares its loss and its weights' hash.
// Returns how many differ.
static int verify(Study *s, const char *trainer) {
    StudyReport r;
    char *claims = xprintf("%s/claims", s->out), *again = xprintf("%s/verify", s->out);
    int differ = 0, checked = 0;
    directory_make(claims);
    directory_make(again);
    study_report_open(&r, s);
    for (int arm = 0; arm < s->n_arms; arm++) {
        if (!r.state.tuned[arm].done || r.state.tuned[arm].diverged) continue;
        StudyRun run = study_run(s, arm, RUN_FINAL, r.state.tuned[arm].place, s->own.first_seed, 1);
        const StudyResult *then = study_result(&r.all, run.key);
        if (!then || then->status != RESULT_OK) continue;
        char *out = xprintf("%s/%s", again, run.key), *claim = study_claim_path(s, run.key);
        int status;
        StudyResult now;
        study_remove(out);
        if (!study_claim(s, run.key)) die("%s is claimed: a study run is under way", run.key);
        const pid_t pid = study_run_start(s, trainer, &run, "verify");
        while (waitpid(pid, &status, 0) < 0)
            if (errno != EINTR) die("waitpid: %s", strerror(errno));
        if (status)
            study_show_log(s, run.key), die("the run of [arm %s] has failed", s->arm[arm].name);
        Text text = study_result_text(s, &run, out, 0);
        if (!text.n || study_result_parse(&now, text.s, text.n - 1))
            die("the run of [arm %s] did not end", s->arm[arm].name);
        int same = now.val_loss == then->val_loss && !strcmp(now.bits, then->bits);
        for (int i = 0; i < s->depths.n * KEEP_KINDS; i++)
            same &= study_depth_loss(&now, i % KEEP_KINDS, s->depths.share[i / KEEP_KINDS]) ==
                    study_depth_loss(then, i % KEEP_KINDS, s->depths.share[i / KEEP_KINDS]);
        printf("%s, seed %lld: val loss %.17g, weights %.16s: %s", s->arm[arm].name,
               (long long)run.seed, now.val_loss, now.bits, same ? "the same bits\n" : "DIFFERS");
        if (!same)
            printf(" from %.17g, %.16s, which is of commit %s on %s\n", then->val_loss, then->bits,
                   then->commit, then->machine);
        fflush(stdout);
        differ += !same, checked++;
        study_result_free(&now);
        study_unclaim_at(claim);
        study_remove(out);
        text_free(&text), free(out), free(claim);
    }
    rmdir(again);
    study_report_close(&r);
    free(claims), free(again);
    if (!checked) die("no arm has a final run to verify yet");
    return differ;
}

// ---- The program ----

// What a plan may say: its sections, and the options of [study] as --help prints options.
static void print_syntax(void) {
    Options o;
    StudyOptions values;
    Text text = {NULL, 0, 0};
    options_init(
        &o,
        "a plan is a text of sections, each with lines name = value; # begins a comment\n\n"
        "  [study]       the options below\n"
        "  [all]         options of train_gpt, for every arm: data, steps of the baseline, sizes\n"
        "  [grid]        option = value value ...: every arm is tuned in the product of these "
        "lists\n"
        "  [arm NAME]    options of train_gpt in which this arm differs; the first arm is the "
        "baseline\n"
        "  [grid NAME]   lists of that arm, instead of those of [grid]");
    o.set[0].n = 0;                                      // not --config, --help, --version
    options_add(&o, study_options(), &values);
    options_help(&o, &text);
    fputs(text.s + strlen("Usage: "), stdout);
    text_free(&text);
    options_free(&o);
}

static void open_study(Study *s, const char *path, const StudyCommand *c, const char *trainer) {
    study_open(s, path);
    if (*c->out) {
        if (!*s->own.results) free(s->results), s->results = xprintf("%s/results", c->out);
        free(s->out), s->out = xstrdup(c->out);
    }
    if (*c->results) free(s->results), s->results = xstrdup(c->results);
    study_prepare(s, trainer);
}

static int run_command(int command, Study *s, const StudyCommand *c, const char *trainer,
                       const char *program) {
    const int jobs = c->jobs ? (int)c->jobs : (int)s->own.jobs;
    int complete = 1;
    if (command != COMMAND_RUN && command != COMMAND_ALL) study_times(s, trainer, 0);
    if (command == COMMAND_ALL && s->own.equal == EQUAL_SECONDS)
        printf("equal = seconds: the arms are timed first\n");
    else if (command == COMMAND_ALL || command == COMMAND_PLAN) print_plan(s, trainer, jobs);
    fflush(stdout);
    if (command == COMMAND_ALL || command == COMMAND_RUN) {
        complete = study_work(s, trainer, jobs, read_time(c->for_time));
        if (!complete)
            printf("stopped%s%s: what was under way is saved; the same command continues from "
                   "here\n", signals_stop ? " by " : "", signals_stop ? signals_name() : "");
        else if (command == COMMAND_RUN)
            printf("every run has ended: build/study report %s\n", s->path);
    }
    if (command == COMMAND_REPORT || (command == COMMAND_ALL && complete))
        study_report(s, program, c->picture);
    return command == COMMAND_VERIFY && verify(s, trainer) ? 1 : 0;
}

int main(int argc, char **argv) {
    Options options;
    StudyCommand c;
    int command = COMMAND_ALL, code = 0;
    program_begin(argv);
    options_init(&options, "study [plan|run|report|verify|fit|syntax] PLAN [options]");
    options.engine = engine_default_name();
    options.notes =
        "Signals: as for train_gpt; runs under way are saved, and the same command continues. "
        "Example: "
        "build/study scripts/studies/quick.txt";
    options.max_arguments = 64;
    options_add(&options, study_command(), &c);
    options_parse(&options, argc, argv);
    for (int i = 1; i < COMMANDS && options.n_arguments; i++)
        if (!strcmp(options.arguments[0], command_name[i])) command = i;
    if (command == COMMAND_SYNTAX) {
        print_syntax();
        return 0;
    }
    const int first = command != COMMAND_ALL, plans = options.n_arguments - first;
    if (plans < 1 || (plans > 1 && command != COMMAND_FIT))
        die("study needs %s plan\n  hint: build/study scripts/studies/quick.txt",
            plans < 1 ? "a" : "one");
    if ((command == COMMAND_FIT) != (*c.arm != 0))
        die(*c.arm ? "--arm is for study fit" : "study fit needs --arm NAME");
    char *trainer = study_trainer(argv[0]);
    read_time(c.for_time);
    Study *study = (Study *)xcalloc((size_t)plans, sizeof *study), *all[64];
    for (int k = 0; k < plans; k++) {
        open_study(all[k] = &study[k], options.arguments[first + k], &c, trainer);
        if (command == COMMAND_FIT) study_times(&study[k], trainer, 0);
    }
    if (command == COMMAND_FIT) study_fit(all, plans, c.arm, (int)c.draws);
    else code = run_command(command, study, &c, trainer, argv[0]);
    for (int k = 0; k < plans; k++) study_close(&study[k]);
    free(study), free(trainer);
    options_free(&options);
    return code;
}
