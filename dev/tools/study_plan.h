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

enum { STUDY_ARMS = 256, STUDY_GRIDS = 4, STUDY_CURVE = 8, STUDY_KEY = 17 };

// Values of one option, as text; numbers ascend. `given` are the plan's, the others extensions, low
// at the front.
typedef struct { const OptionSpec *spec; int n, given, low, high; char **value; } StudyGrid;

// Options that name what a run reads beside the data: their content is part of its key, and not
// where it is.
enum { STUDY_TEACHER, STUDY_INITIAL, STUDY_SCORES, STUDY_CONTENTS };
static const char *const study_content_names[STUDY_CONTENTS] = {"teacher", "init-from",
                                                                "align-scores"};

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
    char content[STUDY_CONTENTS][SHA256_HEX];            // "": the option names nothing
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
    char *engine, *version;                              // whose results these are
    StudySolved *solved;                                 // (n_solved) budgets that were solved for
    int n_solved;
} Study;

// ---- Reading the plan: functions return NULL or, from malloc, "LINE: what is wrong" ----

enum { SECTION_NONE, SECTION_STUDY, SECTION_ALL, SECTION_GRID, SECTION_ARM };

typedef struct { int section, line; char *arm; const char *begin, *end; } StudyLine;
typedef struct { StudyLine *line; int n, capacity; } StudyLines;

// An error in that line; 0: of the plan as a whole.
static inline char *PRINTF_LIKE(2, 3) study_wrong(int line, const char *format, ...) {
    int length;
    va_list args;
    va_start(args, format);
    char *text = xprintf_v(&length, format, args);
    va_end(args);
    char *error = line ? xprintf("%d: %s", line, text) : xprintf(" %s", text);
    free(text);
    return error;
}

static inline void NORETURN PRINTF_LIKE(2, 3)
    study_refuse(const Study *s, const char *format, ...) {
    int length;
    va_list args;
    va_start(args, format);
    char *text = xprintf_v(&length, format, args);
    va_end(args);
    die("%s: %s", s->path, text);
}

// A section's name, of the line "[arm NAME]"; *arm is replaced by its NAME or NULL.
static inline char *study_section(int line, const char *begin, const char *end, int *section,
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
    free(text);
    *section = SECTION_NONE;
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (!strcmp(word, known[i].word) && words == 1 + known[i].named)
            *section = known[i].section;
    if (*section == SECTION_NONE || (rest < end && *rest != '#'))
        return study_wrong(line,
                           "'%.*s' is none of [study], [all], [grid], [grid NAME], [arm NAME]",
                           (int)(end - begin), begin);
    if (name[strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")])
        return study_wrong(line, "an arm's name is of letters, digits, '.', '_' and '-': '%s'",
                           name);
    free(*arm);
    *arm = *name ? xstrdup(name) : NULL;
    return NULL;
}

static inline void study_lines_free(StudyLines *lines) {
    for (int i = 0; i < lines->n; i++) free(lines->line[i].arm);
    free(lines->line);
}

// The lines that say something, each with its section.
static inline char *study_lines(StudyLines *lines, const void *mem, size_t size) {
    const char *at = (const char *)mem, *end = size ? at + size : at;
    char *arm = NULL, *error = NULL;
    if (size > OPTIONS_MAX_CONFIG) return study_wrong(0, "not a plan: it is larger than 1 MiB");
    if (size && memchr(mem, 0, size)) return study_wrong(0, "not a plan: it has zero bytes");
    for (int number = 1, section = SECTION_NONE; at < end && !error; number++) {
        const char *feed = (const char *)memchr(at, '\n', (size_t)(end - at)),
                   *stop = feed ? feed : end;
        const char *begin = options_skip_blanks(at, stop);
        at = feed ? feed + 1 : end;
        if (begin == stop || *begin == '#') continue;
        const int is_section = *begin == '[';
        if (is_section) error = study_section(number, begin, stop, &section, &arm);
        else if (section == SECTION_NONE)
            error = study_wrong(number, "a plan begins with a section, as [study]");
        if (error) break;
        if (lines->n == lines->capacity)
            lines->line = (StudyLine *)xrealloc(
                lines->line, (size_t)(lines->capacity = 2 * lines->capacity + 64),
                sizeof *lines->line);
        const StudyLine line = {section, number, arm ? xstrdup(arm) : NULL,
                                is_section ? NULL : begin, stop};
        lines->line[lines->n++] = line;
    }
    free(arm);
    return error;
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

// The name before '=', or as far as there is one; from malloc.
static inline char *study_name(const StudyLine *line) {
    const char *end = line->begin;
    while (end < line->end && !strchr(" \t=\n", *end)) end++;
    return xprintf("%.*s", (int)(end - line->begin), line->begin);
}

// Applies one line `name = value` to a chain of options.
static inline char *study_apply(Options *o, const StudyLine *line, int source) {
    char *name = study_name(line), *error = NULL, *whole = NULL;
    const int trains = line->section != SECTION_STUDY;
    const char *wrong = trains ? study_option_error(name, line->section == SECTION_ARM) : NULL;
    error = wrong ? xprintf("--%s: %s", name, wrong)
                  : options_config_line(o, line->begin, line->end, source);
    if (error)
        whole = study_wrong(line->line, "%s%s%s%s", line->arm ? "[arm " : "",
                            line->arm ? line->arm : "", line->arm ? "]: " : "", error);
    free(name), free(error);
    return whole;
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

// The values of a grid's line, in `list`, whose words are separated.
static inline char *study_grid_values(StudyGrid *g, int line, const char *name, char *list) {
    char *state = NULL;
    for (char *word = strtok_r(list, " \t,", &state); word;
         word = strtok_r(NULL, " \t,", &state)) {
        OptionValue ignored;
        if (!options_read(g->spec, word, &ignored)) {
            char *wanted = options_wanted(g->spec);
            char *error = study_wrong(line, "--%s: '%s' is not %s", name, word, wanted);
            free(wanted);
            return error;
        }
        if (!study_grid_add(g, word))
            return study_wrong(line, "--%s: %s is there twice", name, word);
    }
    g->given = g->n;
    return g->n ? NULL : study_wrong(line, "--%s: a grid without values", name);
}

// The option of a grid's line, in *found, and its values as text.
static inline char *study_grid_option(StudyArm *a, const StudyLine *line, const char *name,
                                      OptionRef *found, Text *list) {
    const char *equals = (const char *)memchr(line->begin, '=', (size_t)(line->end - line->begin));
    if (!equals) return study_wrong(line->line, "a line must be name = value value ...");
    const char *wrong =
        options_config_value(list, options_skip_blanks(equals + 1, line->end), line->end);
    char *error = wrong ? xprintf("%s: %s", name, wrong) : options_find(&a->options, name, found);
    char *whole = error ? study_wrong(line->line, "%s", error) : NULL;
    free(error);
    if (whole) return whole;
    wrong = study_option_error(name, 1);
    if (!wrong && (found->spec->type == OPTION_TEXT || found->spec->type > OPTION_FLAG ||
                   options_among(STUDY_NO_GRID, found->spec->name)))
        wrong = "a grid cannot be of it: make arms of it";
    return wrong ? study_wrong(line->line, "--%s: %s", name, wrong) : NULL;
}

// A line of a grid, name = value value ..., for one arm; a list for the same option is replaced.
static inline char *study_grid_line(StudyArm *a, const StudyLine *line) {
    char *name = study_name(line);
    OptionRef r;
    Text list = {NULL, 0, 0};
    text_append(&list, "", 0);
    char *error = study_grid_option(a, line, name, &r, &list);
    int k = 0;
    while (!error && k < a->grids && a->grid[k].spec != r.spec) k++;
    if (!error && k == STUDY_GRIDS)
        error = study_wrong(line->line, "more than %d grids", STUDY_GRIDS);
    if (!error) {
        StudyGrid *g = &a->grid[k];
        a->grids += k == a->grids;
        for (int i = 0; i < g->n; i++) free(g->value[i]);
        g->spec = r.spec, g->n = 0;
        error = study_grid_values(g, line->line, name, list.s);
    }
    free(name), text_free(&list);
    return error;
}

// Makes the arms; their options come when none is added anymore, since they keep addresses.
static inline char *study_make_arms(Study *s, const StudyLines *lines) {
    int n = 0;
    for (int i = 0; i < lines->n; i++) {
        const StudyLine *line = &lines->line[i];
        n += line->section == SECTION_ARM && !line->begin;
        if (n > STUDY_ARMS)
            return study_wrong(line->line, "a study has at most %d arms", STUDY_ARMS);
    }
    s->arm = (StudyArm *)xcalloc((size_t)n + 1, sizeof *s->arm);
    for (int i = 0; i < lines->n; i++) {
        const StudyLine *line = &lines->line[i];
        if (line->section != SECTION_ARM || line->begin) continue;
        if (study_find_arm(s, line->arm))
            return study_wrong(line->line, "[arm %s] is there twice", line->arm);
        s->arm[s->n_arms++].name = xstrdup(line->arm);
    }
    return s->n_arms < 2 ? study_wrong(0, "a study needs two arms or more: [arm NAME]") : NULL;
}

// The options of one arm, those of [all] below its own, and its grids.
static inline char *study_read_arm(StudyArm *a, const StudyLines *lines) {
    char *error = NULL;
    options_init(&a->options, "study PLAN");
    options_add(&a->options, train_options(), &a->train);
    a->train.threads = 1;
    for (int i = 0; i < lines->n && !error; i++) {
        const StudyLine *line = &lines->line[i];
        if (!line->begin) continue;
        if (line->section == SECTION_ALL) error = study_apply(&a->options, line, FROM_CONFIG);
        else if (line->section == SECTION_ARM && !strcmp(line->arm, a->name))
            error = study_apply(&a->options, line, FROM_COMMAND);
    }
    if (error) return error;
    options_apply_recipe(&a->options, &a->train);
    for (int named = 0; named < 2; named++)
        for (int i = 0; i < lines->n && !error; i++) {
            const StudyLine *line = &lines->line[i];
            if (!line->begin || line->section != SECTION_GRID || (line->arm != NULL) != named)
                continue;
            if (!named || !strcmp(line->arm, a->name)) error = study_grid_line(a, line);
        }
    return error;
}

static inline char *study_read_curve(Study *s) {
    char *list = xstrdup(s->own.curve), *error = NULL, *state = NULL;
    for (char *word = strtok_r(list, " ,", &state); word && !error;
         word = strtok_r(NULL, " ,", &state)) {
        char *end;
        const double x = strtod(word, &end);
        if (*end || !(x > 0.01 && x < 100) || x == 1)
            error = study_wrong(0, "curve: '%s' is no multiple such as 0.5 or 1.4", word);
        else if (s->n_curve == STUDY_CURVE)
            error = study_wrong(0, "curve: more than %d multiples", STUDY_CURVE);
        else s->curve[s->n_curve++] = x;
    }
    free(list);
    return error;
}

static inline char *study_check_shares(const StudyOptions *o) {
    const struct { const char *name; Span span; } share[] = {
        {"margin", o->margin}, {"drop-worse", o->drop_worse}, {"turn-error", o->turn_error}};
    for (size_t i = 0; i < sizeof share / sizeof share[0]; i++)
        if (!share[i].span.percent)
            return study_wrong(0, "%s: a percentage, as 0.5%%", share[i].name);
    return o->margin.value > 0 ? NULL : study_wrong(0, "margin: more than 0%%");
}

static inline char *study_check_seeds(const StudyOptions *o) {
    const int64_t tune = o->first_tune_seed, first = o->first_seed;
    if (tune >= first + o->seeds || first >= tune + o->tune_seeds) return NULL;
    return study_wrong(0, "the seeds %lld to %lld of tuning overlap the final ones, %lld to %lld",
                       (long long)tune, (long long)(tune + o->tune_seeds - 1), (long long)first,
                       (long long)(first + o->seeds - 1));
}

// What the plan says as a whole.
static inline char *study_check(Study *s, const StudyLines *lines) {
    const StudyOptions *o = &s->own;
    for (int i = 0; i < lines->n; i++)
        if (lines->line[i].section == SECTION_GRID && lines->line[i].arm &&
            !study_find_arm(s, lines->line[i].arm))
            return study_wrong(lines->line[i].line, "[grid %s]: there is no such arm",
                               lines->line[i].arm);
    if (*o->baseline) {
        const StudyArm *base = study_find_arm(s, o->baseline);
        if (!base) return study_wrong(0, "baseline = %s: there is no such arm", o->baseline);
        s->base = (int)(base - s->arm);
    }
    const TrainOptions *all = &s->arm[s->base].train;
    if (!*all->train || !*all->val) return study_wrong(0, "[all] needs train and val");
    const char *wrong = depth_shares_parse(&s->depths, all->eval_depths);
    if (wrong) return study_wrong(0, "[all] eval-depths = %s: %s", all->eval_depths, wrong);
    char *error = study_check_seeds(o);
    if (!error) error = study_check_shares(o);
    if (!error) error = study_read_curve(s);
    for (int k = 0; o->equal == EQUAL_SECONDS && k < s->n_arms && !error; k++)
        for (int i = 0; i < s->arm[k].grids && !error; i++) {
            const char *name = s->arm[k].grid[i].spec->name;
            if (strncmp(name, "lr", 2) && strncmp(name, "weight", 6) && strncmp(name, "warmup", 6))
                error = study_wrong(0, "equal = seconds: a grid of --%s may change the time of a "
                                    "step: make arms of it", name);
        }
    return error;
}

// Reads a plan (size bytes) into a Study of zeros, which study_close frees in any case.
static inline char *study_parse(Study *s, const void *mem, size_t size) {
    StudyLines lines = {NULL, 0, 0};
    options_init(&s->study_options, "study PLAN");
    options_add(&s->study_options, study_options(), &s->own);
    options_init(&s->default_options, "study PLAN");
    options_add(&s->default_options, train_options(), &s->defaults);
    char *error = study_lines(&lines, mem, size);
    for (int i = 0; i < lines.n && !error; i++)
        if (lines.line[i].section == SECTION_STUDY && lines.line[i].begin)
            error = study_apply(&s->study_options, &lines.line[i], FROM_CONFIG);
    if (!error) error = study_make_arms(s, &lines);
    for (int k = 0; k < s->n_arms && !error; k++) error = study_read_arm(&s->arm[k], &lines);
    if (!error) error = study_check(s, &lines);
    study_lines_free(&lines);
    return error;
}

// ---- Data and sizes ----

static inline void study_file_sum(char hex[SHA256_HEX], const char *path) {
    FileMap map;
    const char *error = file_map(&map, path);
    if (error) die("cannot read %s: %s", path, error);
    if (map.size > 1u << 30) fprintf(stderr, "SHA-256 of %s ...\n", path);
    sha256_hex(hex, map.data, map.size);
    file_unmap(&map);
}

// SHA-256 over the SHA-256 of every file that the pattern names, in the order in which shards are
// read.
static inline void study_data_sum(char hex[SHA256_HEX], const char *pattern) {
    glob_t found = shards_glob(pattern);
    Sha256 all;
    sha256_init(&all);
    for (size_t i = 0; i < found.gl_pathc; i++) {
        char one[SHA256_HEX];
        study_file_sum(one, found.gl_pathv[i]);
        sha256_update(&all, one, strlen(one));
    }
    sha256_final(&all, hex);
    globfree(&found);
}

// SHA-256 over the SHA-256 of every file with weights of a checkpoint, and of its configuration.
static inline void study_weights_sum(char hex[SHA256_HEX], const char *path) {
    char *dir = checkpoint_find(path), *config = xprintf("%s/config.json", dir);
    char one[SHA256_HEX];
    Weights w;
    Sha256 all;
    sha256_init(&all);
    weights_open(&w, dir);
    for (int i = 0; i < w.files + (w.lora.rank > 0); i++) {
        const FileMap *map = i < w.files ? &w.file[i].map : &w.adapter.map;
        sha256_hex(one, map->data, map->size);
        sha256_update(&all, one, strlen(one));
    }
    weights_close(&w);
    if (path_exists(config)) {
        study_file_sum(one, config);
        sha256_update(&all, one, strlen(one));
    }
    sha256_final(&all, hex);
    free(dir), free(config);
}

static inline const char *study_content_path(const TrainOptions *o, int content) {
    return content == STUDY_TEACHER ? o->teacher
         : content == STUDY_INITIAL ? o->init_from : o->align_scores;
}

// The SHA-256 of what an arm's options name beside the data; what arms share is read once.
static inline void study_read_contents(Study *s, int arm) {
    StudyArm *a = &s->arm[arm];
    for (int i = 0; i < STUDY_CONTENTS; i++) {
        const char *path = study_content_path(&a->train, i);
        int same = 0;
        if (!*path) continue;
        while (strcmp(study_content_path(&s->arm[same].train, i), path)) same++;
        if (same < arm) memcpy(a->content[i], s->arm[same].content[i], sizeof a->content[i]);
        else if (i == STUDY_SCORES) study_file_sum(a->content[i], path);
        else study_weights_sum(a->content[i], path);
    }
}

// The SHA-256 of the data, from those of its two parts; dies if the plan wants other data.
static inline void study_sum_data(Study *s) {
    char *both = xprintf("%s %s", s->train_sha256, s->val_sha256);
    sha256_hex(s->data_sha256, both, strlen(both));
    free(both);
    if (*s->own.data_sha256 && strcmp(s->own.data_sha256, s->data_sha256))
        study_refuse(s, "the data have changed: data-sha256 = %s, but these have %s",
                     s->own.data_sha256, s->data_sha256);
}

static inline void study_read_data(Study *s) {
    const TrainOptions *o = &s->arm[s->base].train;
    study_data_sum(s->train_sha256, o->train);
    study_data_sum(s->val_sha256, o->val);
    study_sum_data(s);
}

// Sizes and steps, as the trainer will see them; dies as it would. No engine is opened. Without
// data the options have the size of the vocabulary.
static inline void study_read_sizes(Study *s, StudyArm *a, int has_data) {
    Trainer tr;
    memset(&tr, 0, sizeof tr);
    tr.options = &a->train;
    tr.world = 1, tr.has_val = has_data;
    if (has_data) trainer_open_tokenizer(&tr, NULL);
    trainer_config(&tr, NULL, 0);
    if (has_data) {
        shards_open(&tr.train, a->train.train, tr.T, tr.config.V);
        shards_open(&tr.val, a->train.val, tr.T, tr.config.V);
    }
    trainer_sizes(&tr);
    a->config = tr.config;
    a->T = tr.T;
    a->step_tokens = (int64_t)tr.B * tr.T * tr.M;
    if (a == &s->arm[s->base]) s->steps = tr.steps;
    if (has_data) shards_close(&tr.train), shards_close(&tr.val);
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

// The SHA-256 of what an option names, or "" if it is none of these options.
static inline const char *study_content(const StudyArm *a, const char *name) {
    for (int i = 0; i < STUDY_CONTENTS; i++)
        if (!strcmp(name, study_content_names[i])) return a->content[i];
    return "";
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
        const char *content = study_content(a, spec->name);
        if (*content) text_printf(&value, "%s", content);
        else options_print(&value, now);
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
    text_printf(&text, "\ntrain %s\nval %s\nengine %s, version %s\n", s->train_sha256,
                s->val_sha256, s->engine, s->version);
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
    s->engine = xstrdup(engine_default_name());
    s->version = xstrdup(PROGRAM_VERSION);
    const char *error = file_map(&map, path);
    if (error) die("cannot read %s: %s", path, error);
    char *wrong = study_parse(s, map.data, map.size);
    if (wrong) die("%s:%s", path, wrong);
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
    free(s->engine), free(s->version);
    options_free(&s->study_options);
    options_free(&s->default_options);
}

#endif
