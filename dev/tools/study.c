// study.c: does it pay? Arms that differ in any options of train_gpt, each tuned on seeds of its
// own, over several seeds at equal FLOPs, steps or seconds; what is shown, with intervals, and what
// not.
//
//     build/study PLAN                          plan, run, report
//     build/study plan PLAN                     runs, FLOPs, hours, the smallest effect it can see
//     build/study run PLAN --jobs 2 --for 3h    works off the queue, which several machines may
//     build/study report PLAN                   tables, words and pictures of what has ended
//     build/study verify PLAN                   trains one seed of each arm again, compares bits
//     build/study uses PLAN                     the same, and measures what weights are good for
//     build/study fit --arm NAME PLAN PLAN ...  L = E + A (s F)^-b: is its compute worth more?
//     build/study syntax                        what a plan may say
//
// A plan is a text: study_plan.h; scripts/studies/ has some. `compare` is the small form: one drop
// setting, no tuning.
#include "study_report.h"

#define STUDY_COMMAND_OPTIONS(HEADING, OPTION)                                                     \
  HEADING("Study")                                                                                 \
    OPTION(jobs, "jobs", INTEGER, "0", "[0,1024]", "run: runs at a time; 0: as the plan says")     \
    OPTION(for_time, "for", TEXT, "", "TIME",                                                      \
           "run: stop after this time, 90s, 30m or 3h; what is under way is saved")                \
    OPTION(seeds, "seeds", INTEGER, "1", "[0,10000]",                                              \
           "verify, uses: train the first so many final seeds of each arm again")                  \
    OPTION(out, "out", TEXT, "", "DIR", "instead of the plan's")                                   \
    OPTION(results, "results", TEXT, "", "DIR", "instead of the plan's")                           \
    OPTION(picture, "picture", FLAG, "1", "0|1",                                                   \
           "report: also draw OUT/report.png and .svg, if python3 has matplotlib")                 \
    OPTION(against, "against", TEXT, "", "NAME",                                                   \
           "report: compare with this arm instead of the baseline, into OUT/report-NAME.*")        \
    OPTION(arm, "arm", TEXT, "", "NAME", "fit: the arm that is compared with the baseline")        \
    OPTION(draws, "draws", INTEGER, "2000", "[100,1e6]", "fit: of its bootstrap")

OPTION_TABLE(STUDY_COMMAND_OPTIONS, StudyCommand, study_command)

enum { COMMAND_ALL, COMMAND_PLAN, COMMAND_RUN, COMMAND_REPORT, COMMAND_VERIFY, COMMAND_USES,
       COMMAND_FIT, COMMAND_SYNTAX, COMMANDS };
static const char *const command_name[COMMANDS] = {"",       "plan", "run", "report",
                                                   "verify", "uses", "fit", "syntax"};

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
    study_report_open(&r, s, s->base);
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

// ---- verify, uses ----

enum { AGAIN_NOT, AGAIN_DONE, AGAIN_DIFFERS };

// One final run once more; `all`: NULL, or what its weights are good for is measured too, unless it
// is among these. Trains it only if asked to: the weights of a run that is kept can be measured as
// they are.
static int again_run(const Study *s, const char *trainer, const StudyRun *run,
                     const StudyResult *then, int train, const StudyUses *all) {
    char *kept = xprintf("%s/runs/%s", s->out, run->key),
         *out = xprintf("%s/again/%s", s->out, run->key), *claim = study_claim_path(s, run->key);
    const int has = all && study_has_bits(kept, then->bits);
    const int wanted = (has || train) && !(all && study_uses_find(all, then));
    int done = AGAIN_NOT;
    if (wanted && !study_claim(s, run->key))
        printf("%s, seed %lld: another process has claimed it\n", s->arm[run->arm].name,
               (long long)run->seed);
    else if (wanted) {
        done = has || study_again(s, trainer, run, then, "again", out) ? AGAIN_DONE : AGAIN_DIFFERS;
        if (all && done == AGAIN_DONE && s->arm[run->arm].config.L > 1)
            study_use(s, run, has ? kept : out, then->bits);
        study_remove(out);
        study_unclaim_at(claim);
    }
    free(kept), free(out), free(claim);
    return done;
}

// Trains the first `seeds` final runs of each arm once more and compares their bits; with `uses`,
// also measures what these weights, and those of all runs that are kept, are good for. Returns how
// many differ.
static int again(Study *s, const char *trainer, int seeds, int uses) {
    StudyReport r;
    const char *const folder[] = {"%s/claims", "%s/again", "%s/uses"};
    int tally[3] = {0, 0, 0}, ended = 0;
    for (int i = 0; i < 2 + uses; i++) {
        char *path = xprintf(folder[i], i < 2 ? s->out : s->results);
        directory_make(path);
        free(path);
    }
    study_report_open(&r, s, s->base);
    for (int k = 0; k < s->own.seeds; k++)
        for (int arm = 0; arm < s->n_arms; arm++) {
            const StudyTuned *t = &r.state.tuned[arm];
            if (!t->done || t->diverged) continue;
            const StudyRun run =
                study_run(s, arm, RUN_FINAL, t->place, s->own.first_seed + k, 1);
            const StudyResult *then = study_result(&r.all, run.key);
            if (!then || then->status != RESULT_OK) continue;
            ended++;
            tally[again_run(s, trainer, &run, then, k < seeds, uses ? &r.uses : NULL)]++;
        }
    study_report_close(&r);
    if (!ended) die("no arm has a final run that has ended");
    if (!uses && tally[AGAIN_NOT] == ended) die("no run was trained again");
    return tally[AGAIN_DIFFERS];
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

static void open_study(Study *s, const char *path, const StudyCommand *c, const char *trainer,
                       int look) {
    study_open(s, path);
    if (*c->out) {
        if (!*s->own.results) free(s->results), s->results = xprintf("%s/results", c->out);
        free(s->out), s->out = xstrdup(c->out);
    }
    if (*c->results) free(s->results), s->results = xstrdup(c->results);
    study_prepare(s, trainer, look);
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
        study_report(s, program, c->picture, c->against);
    if (command != COMMAND_VERIFY && command != COMMAND_USES) return 0;
    return again(s, trainer, (int)c->seeds, command == COMMAND_USES) ? 1 : 0;
}

int main(int argc, char **argv) {
    Options options;
    StudyCommand c;
    int command = COMMAND_ALL, code = 0;
    program_begin(argv);
    options_init(&options, "study [plan|run|report|verify|uses|fit|syntax] PLAN [options]");
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
    if (*c.against && command != COMMAND_REPORT) die("--against is for study report");
    if ((command == COMMAND_FIT) != (*c.arm != 0))
        die(*c.arm ? "--arm is for study fit" : "study fit needs --arm NAME");
    char *trainer = study_trainer(argv[0]);
    read_time(c.for_time);
    Study *study = (Study *)xcalloc((size_t)plans, sizeof *study), *all[64];
    for (int k = 0; k < plans; k++) {
        open_study(all[k] = &study[k], options.arguments[first + k], &c, trainer,
                   command == COMMAND_REPORT || command == COMMAND_FIT);
        if (command == COMMAND_FIT) study_times(&study[k], trainer, 0);
    }
    if (command == COMMAND_FIT) study_fit(all, plans, c.arm, (int)c.draws);
    else code = run_command(command, study, &c, trainer, argv[0]);
    for (int k = 0; k < plans; k++) study_close(&study[k]);
    free(study), free(trainer);
    options_free(&options);
    return code;
}
