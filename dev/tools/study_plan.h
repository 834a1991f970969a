// study_plan.h: a study as a text: arms that differ in any options, grids in which each is tuned,
// seeds, what is held equal. From it come runs, each with a key: a hash of all that its bits depend
// on. Runs of equal key are one run, of whatever arm or study.
//
//     [study]       equal = flops, seeds = 8, ...: STUDY_OPTIONS
//     [all]         options of train_gpt for every arm; data and steps of the baseline
//     [grid]        lr = 5e-3 1e-2 2e-2: every arm is tuned in the product of such lists
//     [grid NAME]   lists of one arm
//     [arm NAME]    options that differ; the first arm is the baseline
#ifndef STUDY_PLAN_H
#define STUDY_PLAN_H

#include "../files/sha256.h"
#include "../model/engines.h"
#include "../run/trainer.h"
#include "budget.h"
#include "report.h"
#include "stats.h"

enum { EQUAL_STEPS, EQUAL_FLOPS, EQUAL_SECONDS };
enum { ENDPOINT_LOSS, ENDPOINT_BPB };

//  OPTION(field, name, type, default, domain, help)
#define STUDY_OPTIONS(HEADING, OPTION)                                                             \
  HEADING("Options of [study] in a plan")                                                          \
    OPTION(out, "out", TEXT, "", "DIR",                                                            \
           "the queue: claims, runs under way, the report; if not given, runs/studies/NAME of "    \
           "the plan NAME.txt")                                                                    \
    OPTION(results, "results", TEXT, "", "DIR",                                                    \
           "one small JSON line for each finished run, in files of their own. Studies may share "  \
           "it, and with it their baselines. If not given, OUT/results")                           \
    OPTION(equal, "equal", CHOICE, "flops", "steps|flops|seconds",                                 \
           "what all arms get as much of as the baseline, which has the steps of [all]; the "      \
           "steps of the others are solved for, and each schedule ends at its own end")            \
    OPTION(endpoint, "endpoint", CHOICE, "val-loss", "val-loss|val-bpb",                           \
           "what is compared at the end of the runs")                                              \
    OPTION(baseline, "baseline", TEXT, "", "NAME",                                                 \
           "the arm that the others are compared with; if not given, the first")                   \
    OPTION(seeds, "seeds", INTEGER, "3", "[2,1000]",                                               \
           "final runs of each arm, paired by seed: the same initial weights and order of data")   \
    OPTION(first_seed, "first-seed", INTEGER, "1001", "[0,1e15]", "of the final runs")             \
    OPTION(tune_seeds, "tune-seeds", INTEGER, "1", "[1,1000]",                                     \
           "runs of each place of a grid; the place with the lowest mean is the arm's")            \
    OPTION(first_tune_seed, "first-tune-seed", INTEGER, "1", "[0,1e15]",                           \
           "of these; never one of the final seeds")                                               \
    OPTION(extend, "extend", INTEGER, "2", "[0,100]",                                              \
           "a grid of numbers grows so often at each end while the best place is there, by the "   \
           "ratio of its last two")                                                                \
    OPTION(drop_worse, "drop-worse", SPAN, "0%", "",                                               \
           "an arm whose tuned endpoint lies more than this above the baseline's gets no final "   \
           "runs; 0%: all get them")                                                               \
    OPTION(margin, "margin", SPAN, "0.5%", "",                                                     \
           "of the baseline's endpoint: differences within it are equivalent")                     \
    OPTION(curve, "curve", TEXT, "", "LIST",                                                       \
           "the baseline is trained with these multiples of its budget too, as 0.5,0.7,1.4; the "  \
           "FLOP ratio at equal loss is read from them")                                           \
    OPTION(jobs, "jobs", INTEGER, "1", "[1,1024]",                                                 \
           "runs at a time, of one thread each unless [all] says otherwise")                       \
    OPTION(turns, "turns", INTEGER, "7", "[2,1000]",                                               \
           "equal = seconds: how often each arm is timed, in turns")                               \
    OPTION(turn_steps, "turn-steps", INTEGER, "30", "[3,1e6]", "steps of such a turn")             \
    OPTION(turn_error, "turn-error", SPAN, "2%", "",                                               \
           "equal = seconds: refuse if the standard error of an arm's time is more")               \
    OPTION(stale, "stale", INTEGER, "120", "[1,1e6]",                                              \
           "seconds without a sign of life after which another process takes a run over")          \
    OPTION(keep_runs, "keep-runs", FLAG, "0", "0|1",                                               \
           "keep metrics.jsonl and the last checkpoint of finished runs")                          \
    OPTION(data_sha256, "data-sha256", TEXT, "", "HASH",                                           \
           "refuse other data; `study plan` prints it")                                            \
    OPTION(note, "note", TEXT, "", "TEXT",                                                         \
           "what was decided beforehand, in words; the report begins with it")

OPTION_TABLE(STUDY_OPTIONS, StudyOptions, study_options)

enum { STUDY_GRIDS = 4, STUDY_CURVE = 8, STUDY_KEY = 17 };

// Values of one option, as text; numbers ascend. `given` are the plan's, the others extensions, low
// at the front.
typedef struct { const OptionSpec *spec; int n, given, low, high; char **value; } StudyGrid;

typedef struct {
    char *name;
    Options options;
    TrainOptions train;
    GptConfig config;
    int T, grids;
    int64_t step_tokens;
    StudyGrid grid[STUDY_GRIDS];
    // calibrated: at full depth; at the top rates, which cost that
    double step_seconds, drop_seconds, drop_compute;
} StudyArm;

typedef struct { int arm; double budget, flops; int64_t steps; char *text; } StudySolved;

typedef struct {
    const char *path;                                    // of the plan
    Options study_options;
    StudyOptions own;
    char *out, *results;
    Options all_options, default_options;
    TrainOptions all, defaults;
    int n_arms, base, n_curve;
    StudyArm *arm;
    double curve[STUDY_CURVE];
    DepthShares depths;                                  // of eval-depths: a further endpoint
    char train_sha256[SHA256_HEX], val_sha256[SHA256_HEX], data_sha256[SHA256_HEX];
    int64_t steps;                                       // of the baseline
    const char *engine;
    StudySolved *solved;                                 // (n_solved) budgets that were solved for
    int n_solved;
} Study;

// ---- Reading the plan ----

enum { SECTION_NONE, SECTION_STUDY, SECTION_ALL, SECTION_GRID, SECTION_ARM };

typedef struct { int section, line; char *arm; const char *begin, *end; } StudyLine;
typedef struct { StudyLine *line; int n; } StudyLines;

static inline void NORETURN PRINTF_LIKE(3, 4)
    study_refuse(const Study *s, int line, const char *format, ...) {
    int length;
    va_list args;
    va_start(args, format);
    char *text = xprintf_v(&length, format, args);
    va_end(args);
    if (line) die("%s:%d: %s", s->path, line, text);
    die("%s: %s", s->path, text);
}

// A section's name, of the line "[arm NAME]".
static inline int study_section(const Study *s, int line, const char *begin, const char *end,
                                char **arm) {
    static const struct { const char *word; int section, named;
    } known[] = {{"study", SECTION_STUDY, 0},
                 {"all", SECTION_ALL, 0},
                 {"grid", SECTION_GRID, 0},
                 {"grid", SECTION_GRID, 1},
                 {"arm", SECTION_ARM, 1}};
    const char *close = (const char *)memchr(begin, ']', (size_t)(end - begin));
    char word[16] = "", name[65] = "", more[2],
         *text = xprintf("%.*s", close ? (int)(close - begin - 1) : 0, begin + 1);
    const int words = sscanf(text, "%15s %64s %1s", word, name, more);
    const char *rest = close ? options_skip_blanks(close + 1, end) : end;
    int section = SECTION_NONE;
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (!strcmp(word, known[i].word) && words == 1 + known[i].named) section = known[i].section;
    if (section == SECTION_NONE || (rest < end && *rest != '#'))
        study_refuse(s, line, "'%.*s' is none of [study], [all], [grid], [grid NAME], [arm NAME]",
                     (int)(end - begin), begin);
    if (name[strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")])
        study_refuse(s, line, "an arm's name is of letters, digits, '.', '_' and '-': '%s'", name);
    free(*arm), free(text);
    *arm = *name ? xstrdup(name) : NULL;
    return section;
}

// The lines that say something, each with its section.
static inline StudyLines study_lines(const Study *s, const FileMap *map) {
    const char *at = (const char *)map->data, *end = map->size ? at + map->size : at;
    StudyLines lines = {NULL, 0};
    char *arm = NULL;
    if (map->size > OPTIONS_MAX_CONFIG) study_refuse(s, 0, "not a plan: it is larger than 1 MiB");
    if (map->size && memchr(map->data, 0, map->size))
        study_refuse(s, 0, "not a plan: it has zero bytes");
    for (int number = 1, section = SECTION_NONE; at < end; number++) {
        const char *feed = (const char *)memchr(at, '\n', (size_t)(end - at)),
                   *stop = feed ? feed : end;
        const char *begin = options_skip_blanks(at, stop);
        at = feed ? feed + 1 : end;
        if (begin == stop || *begin == '#') continue;
        const int is_section = *begin == '[';
        if (is_section) section = study_section(s, number, begin, stop, &arm);
        else if (section == SECTION_NONE)
            study_refuse(s, number, "a plan begins with a section, as [study]");
        lines.line = (StudyLine *)xrealloc(lines.line, (size_t)(lines.n + 1), sizeof *lines.line);
        const StudyLine line = {section, number, arm ? xstrdup(arm) : NULL,
                                is_section ? NULL : begin, stop};
        lines.line[lines.n++] = line;
    }
    free(arm);
    return lines;
}

// Options that the study itself decides, or that would make two arms' losses those of different
// things.
static inline const char *study_option_error(const char *name, int in_arm) {
    static const char *const never[] = {"out",       "resume",      "seed",      "dry-run",
                                        "device",    "drop-replay", "init-from", "rendezvous",
                                        "job-token", "config"};
    static const char *const all_only[] = {"train", "val",    "tokenizer",
                                           "steps", "epochs", "eval-tokens", "eval-depths"};
    for (size_t i = 0; i < sizeof never / sizeof never[0]; i++)
        if (options_same_name(name, never[i]))
            return "a plan cannot set it: the study does, or has no use for it";
    for (size_t i = 0; in_arm && i < sizeof all_only / sizeof all_only[0]; i++)
        if (options_same_name(name, all_only[i]))
            return "belongs in [all]: it is the same for every arm";
    return NULL;
}

// Applies one line `name = value` to a chain of options.
static inline void study_apply(const Study *s, Options *o, const StudyLine *line, int source) {
    char *name = xprintf("%.*s", (int)strcspn(line->begin, " \t=\n"), line->begin);
    const int trains = line->section != SECTION_STUDY;
    const char *wrong = trains ? study_option_error(name, line->section == SECTION_ARM) : NULL;
    char *error = wrong ? xprintf("--%s: %s", name, wrong)
                        : options_config_line(o, line->begin, line->end, source);
    if (error)
        study_refuse(s, line->line, "%s%s%s%s", line->arm ? "[arm " : "",
                     line->arm ? line->arm : "", line->arm ? "]: " : "", error);
    free(name);
}

// What stands for other options, or changes the model.
#define STUDY_NO_GRID                                                                             \
    "drop-recipe dropout preset layers heads channels seq-len vocab-size batch total-batch "      \
    "train-last threads dtype grow drop-rates"

static inline StudyArm *study_find_arm(const Study *s, const char *name) {
    for (int i = 0; i < s->n_arms; i++)
        if (!strcmp(s->arm[i].name, name)) return &s->arm[i];
    return NULL;
}

static inline int study_grid_is_numeric(const StudyGrid *g) {
    return g->spec->type == OPTION_NUMBER || g->spec->type == OPTION_INTEGER;
}

// Puts a value into its place; g has room for it by realloc. Returns 0 where it is there already.
static inline int study_grid_add(StudyGrid *g, const char *text) {
    int at = 0;
    const int numeric = study_grid_is_numeric(g);
    for (int i = 0; i < g->n; i++) {
        if (!strcmp(g->value[i], text) ||
            (numeric && strtod(g->value[i], NULL) == strtod(text, NULL)))
            return 0;
        if (!numeric || strtod(g->value[i], NULL) < strtod(text, NULL)) at = i + 1;
    }
    g->value = (char **)xrealloc(g->value, (size_t)(g->n + 1), sizeof *g->value);
    memmove(g->value + at + 1, g->value + at, (size_t)(g->n - at) * sizeof *g->value);
    g->value[at] = xstrdup(text);
    g->n++;
    return 1;
}

// A line of a grid, name = value value ..., for one arm; a list for the same option is replaced.
static inline void study_grid_line(const Study *s, StudyArm *a, const StudyLine *line) {
    const char *equals = (const char *)memchr(line->begin, '=', (size_t)(line->end - line->begin));
    char *name = xprintf("%.*s", (int)strcspn(line->begin, " \t=\n"), line->begin);
    OptionRef r;
    OptionValue ignored;
    Text list = {NULL, 0, 0};
    if (!equals) study_refuse(s, line->line, "a line must be name = value value ...");
    const char *wrong =
        options_config_value(&list, options_skip_blanks(equals + 1, line->end), line->end);
    char *error = wrong ? xprintf("%s: %s", name, wrong) : options_find(&a->options, name, &r);
    if (error) study_refuse(s, line->line, "%s", error);
    wrong = study_option_error(name, 1);
    if (!wrong && (r.spec->type == OPTION_TEXT || r.spec->type > OPTION_FLAG ||
                   options_among(STUDY_NO_GRID, r.spec->name)))
        wrong = "a grid cannot be of it: make arms of it";
    if (wrong) study_refuse(s, line->line, "--%s: %s", name, wrong);
    int k = 0;
    while (k < a->grids && a->grid[k].spec != r.spec) k++;
    if (k == STUDY_GRIDS) study_refuse(s, line->line, "more than %d grids", STUDY_GRIDS);
    if (k == a->grids) a->grids++;
    StudyGrid *g = &a->grid[k];
    for (int i = 0; i < g->n; i++) free(g->value[i]);
    g->spec = r.spec, g->n = 0;
    for (char *word = strtok(list.s, " \t,"); word; word = strtok(NULL, " \t,")) {
        char *wanted = options_wanted(r.spec);
        if (!options_read(r.spec, word, &ignored))
            study_refuse(s, line->line, "--%s: '%s' is not %s", name, word, wanted);
        if (!study_grid_add(g, word))
            study_refuse(s, line->line, "--%s: %s is there twice", name, word);
        free(wanted);
    }
    if (!g->n) study_refuse(s, line->line, "--%s: a grid without values", name);
    g->given = g->n;
    free(name), text_free(&list);
}

// The arms, each with the options of [all] below its own.
static inline void study_read_arms(Study *s, const StudyLines *lines) {
    for (int i = 0; i < lines->n; i++) {
        const StudyLine *line = &lines->line[i];
        if (line->section != SECTION_ARM || line->begin) continue;
        if (study_find_arm(s, line->arm))
            study_refuse(s, line->line, "[arm %s] is there twice", line->arm);
        s->n_arms++;
        s->arm = (StudyArm *)xrealloc(s->arm, (size_t)s->n_arms, sizeof *s->arm);
        memset(&s->arm[s->n_arms - 1], 0, sizeof *s->arm);
        s->arm[s->n_arms - 1].name = xstrdup(line->arm);
    }
    if (s->n_arms < 2) study_refuse(s, 0, "a study needs two arms or more: [arm NAME]");
    // only now: options keep the address of their values
    for (int k = 0; k < s->n_arms; k++) {
        StudyArm *a = &s->arm[k];
        options_init(&a->options, "study PLAN");
        options_add(&a->options, train_options(), &a->train);
        a->train.threads = 1;
        for (int i = 0; i < lines->n; i++) {
            const StudyLine *line = &lines->line[i];
            if (!line->begin) continue;
            if (line->section == SECTION_ALL) study_apply(s, &a->options, line, FROM_CONFIG);
            if (line->section == SECTION_ARM && !strcmp(line->arm, a->name))
                study_apply(s, &a->options, line, FROM_COMMAND);
        }
        options_apply_recipe(&a->options, &a->train);
        for (int named = 0; named < 2; named++)
            for (int i = 0; i < lines->n; i++) {
                const StudyLine *line = &lines->line[i];
                if (!line->begin || line->section != SECTION_GRID || (line->arm != NULL) != named)
                    continue;
                if (!named || !strcmp(line->arm, a->name)) study_grid_line(s, a, line);
            }
    }
}

static inline void study_read_curve(Study *s) {
    char *list = xstrdup(s->own.curve);
    for (char *word = strtok(list, " ,"); word; word = strtok(NULL, " ,")) {
        char *end;
        const double x = strtod(word, &end);
        if (*end || !(x > 0.01 && x < 100) || x == 1)
            study_refuse(s, 0, "curve: '%s' is no multiple such as 0.5 or 1.4", word);
        if (s->n_curve == STUDY_CURVE)
            study_refuse(s, 0, "curve: more than %d multiples", STUDY_CURVE);
        s->curve[s->n_curve++] = x;
    }
    free(list);
}

static inline double study_share(const Study *s, Span span, const char *name) {
    if (!span.percent) study_refuse(s, 0, "%s: a percentage, as 0.5%%", name);
    return span.value / 100;
}

static inline void study_check(Study *s, const StudyLines *lines) {
    const StudyOptions *o = &s->own;
    for (int i = 0; i < lines->n; i++)
        if (lines->line[i].section == SECTION_GRID && lines->line[i].arm &&
            !study_find_arm(s, lines->line[i].arm))
            study_refuse(s, lines->line[i].line, "[grid %s]: there is no such arm",
                         lines->line[i].arm);
    if (*o->baseline) {
        const StudyArm *base = study_find_arm(s, o->baseline);
        if (!base) study_refuse(s, 0, "baseline = %s: there is no such arm", o->baseline);
        s->base = (int)(base - s->arm);
    }
    const int64_t tune = o->first_tune_seed, first = o->first_seed;
    if (tune < first + o->seeds && first < tune + o->tune_seeds)
        study_refuse(s, 0, "the seeds %lld to %lld of tuning overlap the final ones, %lld to %lld",
                     (long long)tune, (long long)(tune + o->tune_seeds - 1), (long long)first,
                     (long long)(first + o->seeds - 1));
    if (!*s->arm[s->base].train.train || !*s->arm[s->base].train.val)
        study_refuse(s, 0, "[all] needs train and val");
    const char *error = depth_shares_parse(&s->depths, s->arm[s->base].train.eval_depths);
    if (error)
        study_refuse(s, 0, "[all] eval-depths = %s: %s", s->arm[s->base].train.eval_depths, error);
    if (study_share(s, o->margin, "margin") <= 0) study_refuse(s, 0, "margin: more than 0%%");
    study_share(s, o->drop_worse, "drop-worse"), study_share(s, o->turn_error, "turn-error");
    study_read_curve(s);
    for (int k = 0; o->equal == EQUAL_SECONDS && k < s->n_arms; k++)
        for (int i = 0; i < s->arm[k].grids; i++)
            if (strncmp(s->arm[k].grid[i].spec->name, "lr", 2) &&
                strncmp(s->arm[k].grid[i].spec->name, "weight", 6) &&
                strncmp(s->arm[k].grid[i].spec->name, "warmup", 6))
                study_refuse(
                    s, 0,
                    "equal = seconds: a grid of --%s may change the time of a step: make arms of "
                    "it",
                    s->arm[k].grid[i].spec->name);
}

// ---- Data and sizes ----

// SHA-256 over the SHA-256 of every file that the pattern names, in the order in which shards are
// read.
static inline void study_data_sum(char hex[SHA256_HEX], const char *pattern) {
    glob_t found = shards_glob(pattern);
    Sha256 all;
    sha256_init(&all);
    for (size_t i = 0; i < found.gl_pathc; i++) {
        FileMap map;
        char one[SHA256_HEX];
        const char *error = file_map(&map, found.gl_pathv[i]);
        if (error) die("cannot read %s: %s", found.gl_pathv[i], error);
        if (map.size > 1u << 30) fprintf(stderr, "SHA-256 of %s ...\n", found.gl_pathv[i]);
        sha256_hex(one, map.data, map.size);
        sha256_update(&all, one, strlen(one));
        file_unmap(&map);
    }
    sha256_final(&all, hex);
    globfree(&found);
}

static inline void study_read_data(Study *s) {
    const TrainOptions *o = &s->arm[s->base].train;
    study_data_sum(s->train_sha256, o->train);
    study_data_sum(s->val_sha256, o->val);
    char *both = xprintf("%s %s", s->train_sha256, s->val_sha256);
    sha256_hex(s->data_sha256, both, strlen(both));
    free(both);
    if (*s->own.data_sha256 && strcmp(s->own.data_sha256, s->data_sha256))
        study_refuse(s, 0, "the data have changed: data-sha256 = %s, but these have %s",
                     s->own.data_sha256, s->data_sha256);
}

// Sizes and steps, as the trainer will see them; dies as it would. No engine is opened.
static inline void study_read_sizes(Study *s, StudyArm *a) {
    Trainer tr;
    memset(&tr, 0, sizeof tr);
    tr.options = &a->train;
    tr.world = tr.has_val = 1;
    trainer_open_tokenizer(&tr, NULL);
    trainer_config(&tr, NULL, 0);
    shards_open(&tr.train, a->train.train, tr.T, tr.config.V);
    shards_open(&tr.val, a->train.val, tr.T, tr.config.V);
    trainer_sizes(&tr);
    a->config = tr.config;
    a->T = tr.T;
    a->step_tokens = (int64_t)tr.B * tr.T * tr.M;
    if (a == &s->arm[s->base]) s->steps = tr.steps;
    shards_close(&tr.train);
    shards_close(&tr.val);
    if (tr.has_tokenizer) tokenizer_free(&tr.tokenizer);
    free(tr.tokenizer_path);
    for (int i = 0; i < MANIFEST_SIDES; i++) manifest_free(&tr.manifest[i]);
}

// ---- One run ----

enum { RUN_TUNE, RUN_FINAL, RUN_CURVE };

typedef struct {
    int arm, kind, place[STUDY_GRIDS];                   // which value of each grid
    int64_t seed;
    double budget;                                       // as a multiple of the baseline's
    TrainOptions o;                                      // texts are the arm's
    double flops;                                        // expected
    char key[STUDY_KEY];
} StudyRun;

// Stores the place's values of the arm's grids.
static inline void study_place(const StudyArm *a, const int *place, TrainOptions *o) {
    for (int k = 0; k < a->grids; k++) {
        OptionSet set = {NULL, 0, o, NULL};
        const OptionRef r = {&set, a->grid[k].spec};
        OptionValue v;
        const int ok = options_read(r.spec, a->grid[k].value[place[k]], &v);
        CHECK(ok, "--%s has no value %s", r.spec->name, a->grid[k].value[place[k]]);
        options_store(r, v);
    }
}

// Expected FLOPs of so many steps: of forward and backward products, as --dry-run counts them.
static inline double study_flops(const StudyArm *a, const TrainOptions *o, int64_t steps) {
    const Budget b = {o, &a->config, a->T};
    return budget_cost(&b, steps) * 3 * gpt_row_flops(&a->config, a->T) *
           (double)(a->step_tokens / a->T);
}

// Expected seconds of so many steps: linear in the expected compute, between the two that were
// timed.
static inline double study_seconds(const StudyArm *a, const TrainOptions *o, int64_t steps) {
    const Budget b = {o, &a->config, a->T};
    const double dropped = (double)steps - budget_cost(&b, steps);
    const double saved =
        a->drop_compute < 1 ? (a->step_seconds - a->drop_seconds) / (1 - a->drop_compute) : 0;
    return a->step_seconds * (double)steps - saved * dropped;
}

// The steps of a run: such that `budget` times what the baseline gets is spent.
static inline int64_t study_steps(const Study *s, const StudyArm *a, const TrainOptions *o,
                                  double budget) {
    const StudyArm *base = &s->arm[s->base];
    const double share = budget * (double)s->steps;
    if (s->own.equal == EQUAL_STEPS || a == base) return llround(share) < 1 ? 1 : llround(share);
    const Budget b = {o, &a->config, a->T};
    const int flops = s->own.equal == EQUAL_FLOPS;
    const double step = flops ? study_flops(base, &base->train, s->steps)
                              : study_seconds(base, &base->train, s->steps);
    if (flops) {
        const double row = 3 * gpt_row_flops(&a->config, a->T) * (double)(a->step_tokens / a->T);
        return budget_steps(&b, budget * step / row, 1);
    }
    int64_t low = 0, high = 1;
    while (study_seconds(a, o, high) < budget * step) low = high, high *= 2;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (study_seconds(a, o, middle) < budget * step) low = middle;
        else high = middle;
    }
    return high;
}

// The steps and FLOPs of a run at that place of its arm's grids: solved once, since places that
// differ in the learning rate alone cost the same.
static inline const StudySolved *study_solved(Study *s, int arm, const int *place,
                                              const TrainOptions *o, double budget) {
    const StudyArm *a = &s->arm[arm];
    Text text = {NULL, 0, 0};
    text_append(&text, "", 0);
    for (int k = 0; k < a->grids; k++)
        if (strncmp(a->grid[k].spec->name, "lr", 2))
            text_printf(&text, "%s ", a->grid[k].value[place[k]]);
    for (int i = 0; i < s->n_solved; i++)
        if (s->solved[i].arm == arm && s->solved[i].budget == budget &&
            !strcmp(s->solved[i].text, text.s)) {
            text_free(&text);
            return &s->solved[i];
        }
    const int64_t steps = study_steps(s, a, o, budget);
    const StudySolved solved = {arm, budget, study_flops(a, o, steps), steps, text.s};
    s->solved = (StudySolved *)xrealloc(s->solved, (size_t)(s->n_solved + 1), sizeof *s->solved);
    s->solved[s->n_solved] = solved;
    return &s->solved[s->n_solved++];
}

// What changes no bit of the result, or is said in another way: data by their hash, sizes resolved.
static inline int study_is_incidental(const TrainOptions *o, const char *name) {
    static const char *const names[] = {
        "train",      "val",          "tokenizer",     "out",          "preset",
        "layers",     "heads",        "channels",      "seq-len",      "vocab-size",
        "epochs",     "resume",       "threads",       "graphs",       "max-bad-steps",
        "selfcheck",  "dry-run",      "device",        "dropout",      "eval-every",
        "save-every", "keep",         "on-save-error", "sample-every", "sample-tokens",
        "prompt",     "record-micro", "log-every",     "rendezvous",   "job-token",
        "zero",       "drop-recipe",  "drop-replay"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (!strcmp(name, names[i])) return 1;
    // plain training, whatever they say
    if (o->drop_path == 0 && !strncmp(name, "drop-", 5)) return 1;
    return o->dropout_embd == 0 && o->dropout_attn == 0 && o->dropout_resid == 0 &&
           !strncmp(name, "dropout-", 8);
}

// All that a result depends on, but its data and its engine: options that are not at their default,
// in the order of the table, spans in steps. With eval-depths, which no bit of the weights depends
// on: a result without these losses cannot serve a plan that reports them.
static inline void study_canonical(const Study *s, const StudyArm *a, const TrainOptions *given,
                                   Text *out) {
    TrainOptions o = *given;
    const OptionTable table = train_options();
    OptionSet set = {table.specs, table.n, &o, NULL},
              initial = {table.specs, table.n, (void *)(uintptr_t)&s->defaults, NULL};
    const GptConfig *c = &a->config;
    Text depths = {NULL, 0, 0};
    for (int i = 0; i < s->depths.n; i++)
        text_printf(&depths, "%s%g", i ? "," : "", s->depths.share[i]);
    o.total_batch = a->step_tokens;
    if (depths.n) o.eval_depths = depths.s;
    text_printf(out, "layers=%d heads=%d channels=%d seq-len=%d vocab-size=%d", c->L, c->NH, c->C,
                a->T, c->V);
    for (int i = 0; i < table.n; i++) {
        const OptionSpec *spec = &table.specs[i];
        const OptionRef now = {&set, spec}, then = {&initial, spec};
        if (spec->type == OPTION_HEADING || study_is_incidental(given, spec->name)) continue;
        Text value = {NULL, 0, 0}, usual = {NULL, 0, 0};
        if (spec->type == OPTION_SPAN) {
            const int64_t steps = span_steps(*(const Span *)options_field(then), o.steps);
            Span *span = (Span *)options_field(now);
            span->value = (double)span_steps(*span, o.steps), span->percent = 0;
            text_printf(&usual, "%lld", (long long)steps);
        } else options_print(&usual, then);
        options_print(&value, now);
        if (strcmp(value.s, usual.s) || !strcmp(spec->name, "seed") || !strcmp(spec->name, "steps"))
            text_printf(out, " %s=%s", spec->name, value.s);
        text_free(&value), text_free(&usual);
    }
    text_free(&depths);
}

// The run's key: 64 bits of a SHA-256, in hexadecimal.
static inline void study_key(const Study *s, const StudyArm *a, StudyRun *r) {
    Text text = {NULL, 0, 0};
    char hex[SHA256_HEX];
    study_canonical(s, a, &r->o, &text);
    text_printf(&text, "\ntrain %s\nval %s\nengine %s, version " PROGRAM_VERSION "\n",
                s->train_sha256, s->val_sha256, s->engine);
    sha256_hex(hex, text.s, text.n);
    snprintf(r->key, sizeof r->key, "%.16s", hex);
    text_free(&text);
}

static inline StudyRun study_run(Study *s, int arm, int kind, const int *place, int64_t seed,
                                 double budget) {
    const StudyArm *a = &s->arm[arm];
    StudyRun r;
    memset(&r, 0, sizeof r);
    r.arm = arm, r.kind = kind, r.seed = seed, r.budget = budget, r.o = a->train;
    memcpy(r.place, place, sizeof r.place);
    study_place(a, place, &r.o);
    r.o.seed = seed;
    r.o.epochs = 0;
    r.o.drop_recipe = 0;
    const StudySolved *solved = study_solved(s, arm, place, &r.o, budget);
    r.o.steps = solved->steps;
    r.flops = solved->flops;
    study_key(s, a, &r);
    return r;
}

// "lr=1e-2 warmup=5%", or "" where nothing was tuned; from malloc.
static inline char *study_place_text(const StudyArm *a, const int *place) {
    Text t = {NULL, 0, 0};
    text_append(&t, "", 0);
    for (int k = 0; k < a->grids; k++)
        text_printf(&t, "%s%s=%s", k ? " " : "", a->grid[k].spec->name, a->grid[k].value[place[k]]);
    return t.s;
}

// ---- Opening ----

static inline void study_open(Study *s, const char *path) {
    FileMap map;
    memset(s, 0, sizeof *s);
    s->path = path;
    s->engine = engine_default_name();
    const char *error = file_map(&map, path);
    if (error) die("cannot read %s: %s", path, error);
    const StudyLines lines = study_lines(s, &map);
    options_init(&s->study_options, "study PLAN");
    options_add(&s->study_options, study_options(), &s->own);
    options_init(&s->default_options, "study PLAN");
    options_add(&s->default_options, train_options(), &s->defaults);
    for (int i = 0; i < lines.n; i++)
        if (lines.line[i].section == SECTION_STUDY && lines.line[i].begin)
            study_apply(s, &s->study_options, &lines.line[i], FROM_CONFIG);
    study_read_arms(s, &lines);
    study_check(s, &lines);
    for (int i = 0; i < lines.n; i++) free(lines.line[i].arm);
    free(lines.line);
    file_unmap(&map);
    const char *slash = strrchr(path, '/'), *file = slash ? slash + 1 : path,
               *dot = strrchr(file, '.');
    s->out = *s->own.out
                 ? xstrdup(s->own.out)
                 : xprintf("runs/studies/%.*s", dot ? (int)(dot - file) : (int)strlen(file), file);
    s->results = *s->own.results ? xstrdup(s->own.results) : xprintf("%s/results", s->out);
}

static inline void study_close(Study *s) {
    for (int k = 0; k < s->n_arms; k++) {
        StudyArm *a = &s->arm[k];
        for (int g = 0; g < a->grids; g++) {
            for (int i = 0; i < a->grid[g].n; i++) free(a->grid[g].value[i]);
            free(a->grid[g].value);
        }
        options_free(&a->options);
        free(a->name);
    }
    for (int i = 0; i < s->n_solved; i++) free(s->solved[i].text);
    free(s->arm), free(s->solved), free(s->out), free(s->results);
    options_free(&s->study_options);
    options_free(&s->default_options);
}

#endif
