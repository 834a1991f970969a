// collapse.c: neural collapse of a checkpoint's features, or of all checkpoints of a run
// (collapse.h).
//
//     build/collapse runs/gpt/latest --train 'data/text/train_*.bin' --val 'data/text/val_*.bin'
//     build/collapse runs/gpt --every 500 --train 'data/text/train_*.bin' --csv collapse.csv
//
// Class means and variances come from the training shards, the agreement of head and nearest mean
// from the validation shards. A class is a next token: each value is reported with the number of
// classes it covers and the share of tokens that belong to them.

#include "../check.h"
#include "../files/files.h"
#include "../files/shards.h"
#include "../model/engines.h"
#include "../run/options.h"
#include "collapse.h"
#include "load.h"

//  OPTION(field, name, type, default, domain, help)
#define COLLAPSE_OPTIONS(HEADING, OPTION)                                                          \
  HEADING("Data")                                                                                  \
    OPTION(train, "train", TEXT, "", "GLOB",                                                       \
           "token shards for the class means; quote a pattern: 'data/train_*.bin'")                \
    OPTION(val, "val", TEXT, "", "GLOB",                                                           \
           "token shards for the agreement (NC4); default: none")                   \
    OPTION(tokens, "tokens", INTEGER, "2e6", "[0,1e15]",                                           \
           "tokens of --train, in whole rows, evenly spaced; 0: all")                          \
    OPTION(val_tokens, "val-tokens", INTEGER, "20000", "[0,1e15]",                                 \
           "tokens of --val, likewise; each costs two matmuls with the vocabulary")         \
    OPTION(min_count, "min-count", INTEGER, "2", "[1,1e15]",                                       \
           "least occurrences of a next token to count as a class; 1 has no variance")        \
    LOAD_SEQ_LEN(OPTION)                                                                           \
    OPTION(batch, "batch", INTEGER, "8", "[1,65536]", "rows per batch")                            \
    LOAD_THREADS(OPTION)                                                                           \
  HEADING("Several checkpoints")                                                                   \
    OPTION(every, "every", INTEGER, "0", "[0,1e15]",                                               \
           "given a run's folder: all checkpoints whose step is a multiple of this"   \
           ", and the last one; 0: one checkpoint")                                            \
  HEADING("Output")                                                                                \
    OPTION(csv, "csv", TEXT, "", "FILE",                                                           \
           "one line per checkpoint; scripts/plot_collapse.py draws it")                        \
    OPTION(json, "json", TEXT, "", "FILE", "write the results to this file too")

OPTION_TABLE(COLLAPSE_OPTIONS, CollapseOptions, collapse_options)

// ---- A checkpoint ----

typedef struct {
    const CollapseOptions *o;
    Loaded m;
    int T, B;
    CollapseClasses classes;
    real *head;                                          // (V,C) the token embedding
    double *half;                                        // (V), in the pass over val
    CollapseAgreement agreement;
    const int *targets;                                  // of the current batch
    size_t n;
} Collapse;

static void see_train(void *self, int point, const real *h) {
    Collapse *c = self;
    (void)point;
    collapse_add(&c->classes, h, c->targets, c->n);
}

static void see_val(void *self, int point, const real *h) {
    Collapse *c = self;
    (void)point;
    collapse_agree(&c->agreement, &c->classes, c->half, c->head, h, c->targets, c->n);
}

// Passes on the features of at least `tokens` tokens (0: all), from evenly spaced windows; returns
// their number.
static int64_t look(Collapse *c, const char *what, const Shards *s, int64_t tokens,
                    void (*see)(void *, int, const real *)) {
    const int64_t rows = shards_rows(s, tokens);
    const size_t BT = (size_t)c->B * (size_t)c->T;
    int *in = xcalloc(BT, sizeof *in), *targets = xcalloc(BT, sizeof *targets);
    unsigned char *want = xcalloc((size_t)watch_features(c->m.config.L) + 1, 1);
    const Watch watch = {c, want, see, NULL};
    Progress progress = progress_begin(what, (double)rows);
    want[watch_features(c->m.config.L)] = 1;
    c->targets = targets;
    for (int64_t first = 0; first < rows; first += c->B) {
        const int n = rows - first < c->B ? (int)(rows - first) : c->B;
        for (int b = 0; b < n; b++) {
            const int64_t at = (int64_t)((double)(first + b) / (double)rows * (double)s->windows);
            shards_read_window(s, at, in + b * c->T, targets + b * c->T);
        }
        drop_plan_keep_all(&c->m.plan, c->m.scale, c->m.tied, n);
        const Batch batch = batch_of(n, c->T, in, NULL);
        Pass pass = pass_of(&c->m.plan, 0);
        pass.watch = &watch;
        c->n = (size_t)n * (size_t)c->T;
        c->m.engine->run(c->m.model, &batch, &pass);
        progress_add(&progress, n);
    }
    progress_clear(&progress);
    free(in), free(targets), free(want);
    return rows * c->T;
}

typedef struct {
    char *dir;
    int64_t step;                                        // -1: not in its name
    const char *error; // why it has only classes and coverage
    CollapseNumbers r;
} Point;

static int64_t step_of(const char *dir) {
    char *real_path = realpath(dir, NULL), *slash = real_path ? strrchr(real_path, '/') : NULL;
    const int64_t step = slash ? checkpoint_named(slash + 1) : -1;
    free(real_path);
    return step;
}

static void numbers_missing(CollapseNumbers *r) {
#define X(field, label, meaning) r->field = NAN;
    COLLAPSE_NUMBERS(X)
#undef X
    r->equal_pairs = r->pointless = 0;
}

// Measures one checkpoint; *tokens (2) are set to the tokens read of train and of val.
static void measure(Point *p, const CollapseOptions *o, const char *path, int64_t tokens[2]) {
    Collapse c;
    Shards shards;
    memset(&c, 0, sizeof c);
    memset(p, 0, sizeof *p);
    c.o = o;
    load_config(&c.m, path);
    const GptConfig *g = &c.m.config;
    c.T = o->seq_len ? (int)o->seq_len : g->T;
    c.B = (int)o->batch;
    if (c.T > g->T) die("--seq-len %d: %s has %d positions", c.T, c.m.dir, g->T);
    shards_open(&shards, o->train, c.T, g->V);
    load_model(&c.m, engine_default(), c.B, c.T, (int)o->threads);
#ifdef _OPENMP
    if (o->threads) omp_set_num_threads((int)o->threads);
#endif
    c.head = xcalloc(gpt_param_size(g, P_wte), sizeof *c.head);
    c.m.engine->read(c.m.model, SLOT_PARAM, P_wte, 0, c.head);
    c.classes = collapse_classes_new((size_t)g->V, (size_t)g->C);
    p->dir = xstrdup(c.m.dir);
    p->step = step_of(c.m.dir);
    numbers_missing(&p->r);

    tokens[0] = look(&c, "features of the training data", &shards, o->tokens, see_train);
    shards_close(&shards);
    size_t K = 0;
    for (int v = 0; v < g->V; v++) K += c.classes.count[v] >= o->min_count;
    Progress pairs = progress_begin("pairs of classes", (double)K * (double)K * g->C);
    p->error = collapse_measure(&p->r, &c.classes, o->min_count, c.head, &pairs);
    progress_clear(&pairs);
    tokens[1] = 0;
    if (*o->val && !p->error) {
        shards_open(&shards, o->val, c.T, g->V);
        c.half = collapse_half_norms(&c.classes);
        tokens[1] = look(&c, "head and nearest mean", &shards, o->val_tokens, see_val);
        collapse_agreement(&p->r, &c.agreement);
        shards_close(&shards);
    }
    free(c.head), free(c.half);
    collapse_classes_free(&c.classes);
    load_close(&c.m);
}

// ---- Output ----

typedef struct { const char *name, *label, *meaning; size_t offset; } Number;
static const Number numbers[] = {
#define X(field, label, meaning) {#field, label, meaning, offsetof(CollapseNumbers, field)},
    COLLAPSE_NUMBERS(X)
#undef X
};
enum { N_NUMBERS = sizeof numbers / sizeof *numbers };

static double number_of(const CollapseNumbers *r, const Number *n) {
    double value;
    memcpy(&value, (const char *)r + n->offset, sizeof value);
    return value;
}

// Twelve columns; very small and very large numbers in scientific notation.
static void print_number(double x) {
    if (isnan(x)) printf(" %12s", "-");
    else if (x == floor(x) && fabs(x) < 1e9) printf(" %12.0f", x);
    else if (fabs(x) >= 1e-3 && fabs(x) < 1e5) printf(" %12.6f", x);
    else printf(" %12.4e", x);
}

static void print_one(const Point *p) {
    for (size_t i = 0; i < N_NUMBERS; i++) {
        const Number *n = &numbers[i];
        const double x = number_of(&p->r, n);
        const int counts = n->offset >= offsetof(CollapseNumbers, equal_pairs);
        if (isnan(x) || (counts && x == 0)) continue;
        printf("%-28s", n->label);
        print_number(x);
        printf("  %s\n", n->meaning);
    }
}

static void print_many(const Point *p, int n) {
    static const struct {
        const char *title;
        size_t offset;
    } column[] = {{"classes", offsetof(CollapseNumbers, classes)},
                  {"share", offsetof(CollapseNumbers, coverage)},
                  {"NC1 CDNV", offsetof(CollapseNumbers, cdnv)},
                  {"NC2 norms", offsetof(CollapseNumbers, norm_cov)},
                  {"NC2 ETF", offsetof(CollapseNumbers, etf_error)},
                  {"GNC2 var", offsetof(CollapseNumbers, log_kernel_var)},
                  {"NC3 dual", offsetof(CollapseNumbers, duality)},
                  {"UNC3 var", offsetof(CollapseNumbers, duality_var)},
                  {"NC4 agree", offsetof(CollapseNumbers, agreement)}};
    enum { COLUMNS = sizeof column / sizeof *column };
    printf("%10s", "step");
    for (int k = 0; k < COLUMNS; k++) printf(" %12s", column[k].title);
    printf("\n");
    for (int i = 0; i < n; i++) {
        printf("%10lld", (long long)p[i].step);
        for (int k = 0; k < COLUMNS; k++) {
            const Number at = {NULL, NULL, NULL, column[k].offset};
            print_number(number_of(&p[i].r, &at));
        }
        printf("\n");
    }
}

static void write_csv(const char *path, const Point *p, int n) {
    Text t = {NULL, 0, 0};
    text_printf(&t, "checkpoint,step");
    for (size_t k = 0; k < N_NUMBERS; k++) text_printf(&t, ",%s", numbers[k].name);
    text_printf(&t, "\n");
    for (int i = 0; i < n; i++) {
        text_append(&t, "\"", 1);
        for (const char *c = p[i].dir; *c; c++) text_printf(&t, *c == '"' ? "\"\"" : "%c", *c);
        text_printf(&t, "\",");
        if (p[i].step >= 0) text_printf(&t, "%lld", (long long)p[i].step);
        for (size_t k = 0; k < N_NUMBERS; k++) {
            const double x = number_of(&p[i].r, &numbers[k]);
            text_printf(&t, isfinite(x) ? ",%.17g" : ",", x);
        }
        text_printf(&t, "\n");
    }
    file_write_whole(path, t.s, t.n);
    text_free(&t);
}

static void write_json(const CollapseOptions *o, const Point *p, int n, const int64_t tokens[2]) {
    Text t = {NULL, 0, 0};
    text_printf(&t, "{\n  \"train\": ");
    json_write_string(&t, o->train);
    text_printf(&t, ",\n  \"tokens\": %lld,\n  \"min_count\": %lld", (long long)tokens[0],
                (long long)o->min_count);
    if (*o->val) {
        text_printf(&t, ",\n  \"val\": ");
        json_write_string(&t, o->val);
        text_printf(&t, ",\n  \"val_tokens\": %lld", (long long)tokens[1]);
    }
    text_printf(&t, ",\n  \"checkpoints\": [");
    for (int i = 0; i < n; i++) {
        text_printf(&t, "%s\n    {\"checkpoint\": ", i ? "," : "");
        json_write_string(&t, p[i].dir);
        if (p[i].step >= 0) text_printf(&t, ", \"step\": %lld", (long long)p[i].step);
        if (p[i].error) {
            text_printf(&t, ", \"error\": ");
            json_write_string(&t, p[i].error);
        }
        for (size_t k = 0; k < N_NUMBERS; k++) {
            text_printf(&t, ", \"%s\": ", numbers[k].name);
            json_write_number(&t, number_of(&p[i].r, &numbers[k]));
        }
        text_printf(&t, "}");
    }
    text_printf(&t, "\n  ]\n}\n");
    file_write_whole(o->json, t.s, t.n);
    text_free(&t);
}

// ---- The program ----

// The requested paths, from malloc, earliest first.
static char **find_paths(const CollapseOptions *o, const char *path, int *n) {
    char **all = xcalloc(1, sizeof *all);
    *n = 1;
    if (!o->every) {
        all[0] = xstrdup(path);
        return all;
    }
    CheckpointList list = checkpoint_list(path);
    if (!list.n)
        die("%s has no checkpoints step_*\n  hint: --every is for the folder of a run, "
            "trained with --keep 0", path);
    all = xrealloc(all, (size_t)list.n, sizeof *all);
    *n = 0;
    for (int i = list.n - 1; i >= 0; i--)                // newest first, so backwards
        if (i == 0 || list.step[i] % o->every == 0)
            all[(*n)++] = checkpoint_path(path, list.step[i]);
    free(list.step);
    return all;
}

int main(int argc, char **argv) {
    CollapseOptions o;
    Options options;
    int n;
    int64_t tokens[2] = {0, 0};
    program_begin(argv);
    options_init(&options, "collapse CHECKPOINT --train GLOB [--val GLOB] [options]");
    options.engine = engine_default_name();
    options_add(&options, collapse_options(), &o);
    options.max_arguments = 1;
    options_parse(&options, argc, argv);
    if (options.n_arguments < 1)
        die("the checkpoint is missing\n  hint: collapse runs/gpt/latest --train GLOB --val GLOB");
    if (!*o.train)
        die("--train is missing\n  hint: --train 'data/train_*.bin': class means need many tokens");
    char **path = find_paths(&o, options.arguments[0], &n);
    Point *point = xcalloc((size_t)n, sizeof *point);
    for (int i = 0; i < n; i++) {
        measure(&point[i], &o, path[i], tokens);
        const Point *p = &point[i];
        if (p->error && n == 1)
            die("%s, %lld tokens: %s\n  hint: more --tokens, or a smaller --min-count", p->dir,
                (long long)tokens[0], p->error);
        if (p->error) warn("%s: %s", p->dir, p->error);
        if (p->r.equal_pairs > 0 || p->r.pointless > 0)
            warn("%s: %.0f pairs of classes have equal means, %.0f classes no direction: left out",
                 p->dir, p->r.equal_pairs, p->r.pointless);
        free(path[i]);
    }
    printf("%s: means of %lld tokens of %s", n == 1 ? point[0].dir : options.arguments[0],
           (long long)tokens[0], o.train);
    if (*o.val) printf(", agreement on %lld tokens of %s", (long long)tokens[1], o.val);
    printf("\n");
    if (n == 1) print_one(&point[0]);
    else print_many(point, n);
    if (*o.csv) write_csv(o.csv, point, n);
    if (*o.json) write_json(&o, point, n, tokens);
    for (int i = 0; i < n; i++) free(point[i].dir);
    free(point), free(path);
    options_free(&options);
    if (fflush(stdout) || ferror(stdout)) die("cannot write the results: %s", strerror(errno));
    return 0;
}
