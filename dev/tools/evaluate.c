// evaluate.c: loss, perplexity and bits per byte of a checkpoint on token shards, and beside it those of the same weights
// with fewer layers: --depth 0.5 or --keep-layers 0,2,3. A layer that is left out costs nothing.
//
//     build/evaluate runs/gpt/latest --val 'data/text/val_*.bin' --depth 0.5
//
// --depth X keeps round(X*L) layers, at least one, at equal distances from the first to the last. Fan et al. 2019
// (LayerDrop) prune "every other" layer, which this is for X = 0.5, but that the last layer always stays.

#include "../check.h"
#include "../options.h"
#include "../trainer.h"
#include "load.h"

//  OPTION(field, name, type, default, domain, help)
#define EVALUATE_OPTIONS(HEADING, OPTION)                                                                            \
  HEADING("Data")                                                                                                    \
    OPTION(val, "val", TEXT, "", "GLOB", "token shards to evaluate on; quote a pattern: 'data/val_*.bin'")           \
    OPTION(eval_tokens, "eval-tokens", INTEGER, "0", "[0,1e15]",                                                     \
           "tokens of --val to read, from the first on, rounded up to whole rows; 0: all")                           \
    OPTION(seq_len, "seq-len", INTEGER, "0", "[0,1048576]", "tokens of a row; 0: as many as the model has positions")\
    OPTION(batch, "batch", INTEGER, "8", "[1,65536]", "rows at a time")                                              \
    OPTION(tokenizer, "tokenizer", TEXT, "", "FILE",                                                                 \
           "for bits per byte; if not given: beside the checkpoint's files, beside --val, else the training run's")  \
    OPTION(threads, "threads", INTEGER, "0", "[0,4096]", "CPU threads; 0: as many as the machine offers")            \
  HEADING("Reduced depth, beside the full one")                                                                      \
    OPTION(keep_layers, "keep-layers", TEXT, "", "LIST", "run these layers only, counted from 0: 0,1,5; or none")    \
    OPTION(depth, "depth", NUMBER, "1", "(0,1]",                                                                     \
           "run this fraction of the layers, rounded, at equal distances from the first to the last")                \
  HEADING("Output")                                                                                                  \
    OPTION(json, "json", TEXT, "", "FILE", "write the numbers to this file too")

OPTION_TABLE(EVALUATE_OPTIONS, EvaluateOptions, evaluate_options)

// ---- Which layers: kept (L), 1 for those that run ----

// As --keep-layers lists them.
static void keep_listed(unsigned char *kept, int L, const char *list) {
    if (!strcmp(list, "none")) return;
    for (const char *s = list;; s++) {
        char *end;
        const long l = strtol(s, &end, 10);
        if (*s < '0' || *s > '9' || (*end && *end != ','))
            die("--keep-layers %s: layers are whole numbers with commas between them, such as 0,1,5", list);
        if (l >= L) die("--keep-layers %s: the model's layers are 0 to %d", list, L - 1);
        kept[l] = 1;
        if (!*end) return;
        s = end;
    }
}

static void keep_spaced(unsigned char *kept, int L, double depth) {
    int n = (int)lround(depth * L);
    if (n < 1) n = 1;
    for (int i = 0; i < n; i++) kept[n == 1 ? 0 : (i * (L - 1) + (n - 1) / 2) / (n - 1)] = 1;   // to the nearest
}

// "0,1,5", or "none"; with brackets "[0,1,5]" or "[]".
static void write_layers(Text *t, const unsigned char *kept, int L, int brackets) {
    const size_t start = t->n;
    for (int l = 0; l < L; l++)
        if (kept[l]) text_printf(t, "%s%d", t->n > start ? "," : brackets ? "[" : "", l);
    if (t->n == start) text_printf(t, brackets ? "[]" : "none");
    else if (brackets) text_printf(t, "]");
}

// ---- Numbers ----

typedef struct {
    const char *name;                                    // "full", "reduced"
    unsigned char *kept;                                 // (L)
    Evaluation v;
    double flops_fraction;                               // of the full model's
} Result;

// Mean loss of the first `rows` windows with the kept layers alone: a factor of 0 leaves a branch out.
static Result evaluate_layers(const char *name, unsigned char *kept, Loaded *m, const Shards *shards, int64_t rows, int B) {
    const GptConfig *c = &m->config;
    const int branches = BRANCHES * c->L;
    double *scale = xcalloc((size_t)branches, sizeof *scale), flops = gpt_head_flops(c, shards->T);
    const Tokenizer *t = m->has_tokenizer ? &m->tokenizer : NULL;
    Result r = {.name = name, .kept = kept};
    for (int i = 0; i < branches; i++) scale[i] = kept[i / BRANCHES] ? m->scale[i] : 0;
    r.v = evaluate_shards(m->engine, m->model, shards, rows, t, B, &m->plan, scale, m->tied, NULL);
    for (int i = 0; i < branches; i++) flops += m->plan.branch[i].n ? gpt_branch_flops(c, i % BRANCHES, shards->T) : 0;
    r.flops_fraction = flops / gpt_row_flops(c, shards->T);
    free(scale);
    return r;
}

static void print_result(const Result *r, int L) {
    Text layers = {NULL, 0, 0};
    char bits[32] = "-";
    if (!isnan(r->v.bits_per_byte)) snprintf(bits, sizeof bits, "%.6f", r->v.bits_per_byte);
    write_layers(&layers, r->kept, L, 0);
    printf("%-8s %10.6f %12.4f %14s %7.1f%%  %s\n", r->name, r->v.loss, exp(r->v.loss), bits, 100 * r->flops_fraction,
           layers.s);
    text_free(&layers);
}

// The names are those of metrics.jsonl.
static void json_result(Text *t, const Result *r, int L) {
    const double value[4] = {r->flops_fraction, r->v.loss, exp(r->v.loss), r->v.bits_per_byte};
    static const char *const name[4] = {"flops_fraction", "val_loss", "val_ppl", "val_bpb"};
    text_printf(t, ",\n  \"%s\": {\"layers\": ", r->name);
    write_layers(t, r->kept, L, 1);
    for (int i = 0; i < (isnan(r->v.bits_per_byte) ? 3 : 4); i++) {
        text_printf(t, ", \"%s\": ", name[i]);
        json_write_number(t, value[i]);
    }
    text_printf(t, "}");
}

static void write_json(const char *path, const Loaded *m, const char *val, int T, const Result *r, int n) {
    Text t = {NULL, 0, 0};
    text_printf(&t, "{\n  \"checkpoint\": ");
    json_write_string(&t, m->dir);
    text_printf(&t, ",\n  \"val\": ");
    json_write_string(&t, val);
    text_printf(&t, ",\n  \"seq_len\": %d,\n  \"tokens\": %lld", T, (long long)r->v.tokens);
    for (int i = 0; i < n; i++) json_result(&t, &r[i], m->config.L);
    text_printf(&t, "\n}\n");
    file_write_whole(path, t.s, t.n);
    text_free(&t);
}

// ---- The program ----

// Evaluates at full depth and, if kept is not NULL, with these layers (L) alone.
static void evaluate(Loaded *m, const EvaluateOptions *o, unsigned char *kept) {
    const int T = o->seq_len ? (int)o->seq_len : m->config.T, L = m->config.L, n = kept ? 2 : 1;
    if (T > m->config.T) die("--seq-len %d: %s has %d positions", T, m->dir, m->config.T);
    Shards shards;
    shards_open(&shards, o->val, T, m->config.V);
    const int64_t rows = shards_rows(&shards, o->eval_tokens);
    const int B = rows < o->batch ? (int)rows : (int)o->batch;
    load_model(m, engine_default(), B, T, (int)o->threads);

    unsigned char *all = (unsigned char *)xcalloc((size_t)L, 1);
    memset(all, 1, (size_t)L);
    static const char *const name[2] = {"full", "reduced"};
    Result r[2];
    printf("%s on %lld tokens of %s in rows of %d\n", m->dir, (long long)rows * T, o->val, T);
    printf("%-8s %10s %12s %14s %8s  %s\n", "", "loss", "perplexity", "bits per byte", "FLOPs", "layers");
    for (int i = 0; i < n; i++) {
        r[i] = evaluate_layers(name[i], i ? kept : all, m, &shards, rows, B);
        print_result(&r[i], L);
    }
    if (*o->json) write_json(o->json, m, o->val, T, r, n);
    free(all);
    shards_close(&shards);
}

int main(int argc, char **argv) {
    EvaluateOptions o;
    Options options;
    Loaded m;
    options_init(&options, "evaluate CHECKPOINT --val GLOB [options]");
    options_add(&options, evaluate_options(), &o);
    options.max_arguments = 1;
    options_parse(&options, argc, argv);
    if (options.n_arguments < 1) die("the checkpoint is missing\n  hint: evaluate runs/gpt/latest --val GLOB");
    if (!*o.val) die("--val is missing\n  hint: --val 'data/val_*.bin'; data/README.md tells how to make token shards");
    const int by_list = options_from(&options, &o.keep_layers) != FROM_DEFAULT;
    const int by_depth = options_from(&options, &o.depth) != FROM_DEFAULT;
    if (by_list && by_depth) die("--keep-layers and --depth exclude each other");

    load_config(&m, options.arguments[0]);
    load_tokenizer(&m, o.tokenizer, o.val);
    unsigned char *kept = (unsigned char *)xcalloc((size_t)m.config.L, 1);
    if (by_list) keep_listed(kept, m.config.L, o.keep_layers);
    else keep_spaced(kept, m.config.L, o.depth);
    evaluate(&m, &o, by_list || by_depth ? kept : NULL);
    free(kept);
    load_close(&m);
    options_free(&options);
    return 0;
}
