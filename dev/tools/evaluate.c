// evaluate.c: a checkpoint's loss, perplexity and bits per byte on token shards, and its answers to
// multiple-choice questions, optionally also with fewer layers: --depth 0.5 or --keep-layers 0,2,3.
// Layers that are left out cost nothing.
//
//     build/evaluate runs/gpt/latest --val 'data/text/val_*.bin' --depth 0.5
//     build/evaluate runs/gpt/latest --val 'data/text/val_*.bin' --stride 256
//     build/evaluate runs/gpt/latest --choices data/hellaswag/validation.bin
//
// --depth X keeps round(X*L) layers, at least one, evenly spaced from the first to the last. Fan et
// al. 2019 (LayerDrop) prune "every other" layer, which X = 0.5 does, except that the last layer
// always stays.

#include "../check.h"
#include "../files/choices.h"
#include "../files/files.h"
#include "../model/engines.h"
#include "../model/layer_list.h"
#include "../run/options.h"
#include "../run/trainer.h"
#include "exits.h"
#include "load.h"
#include "score.h"

//  OPTION(field, name, type, default, domain, help)
#define EVALUATE_OPTIONS(HEADING, OPTION)                                                          \
  HEADING("Data: --val, --choices or both")                                                        \
    OPTION(val, "val", TEXT, "", "GLOB",                                                           \
           "token shards to evaluate on; quote a pattern: 'data/val_*.bin'")                       \
    OPTION(choices, "choices", TEXT, "", "FILE",                                                   \
           "multiple-choice questions in llm.c's format (hellaswag_val.bin); data/choices.py "     \
               "makes them")                                                                       \
    OPTION(eval_tokens, "eval-tokens", INTEGER, "0", "[0,1e15]",                                   \
           "tokens of --val to read, from the first on, rounded up to whole rows unless --stride " \
               "is given; 0: all")                                                                 \
    OPTION(stride, "stride", INTEGER, "0", "[0,1048576]",                                          \
           "of --val: start a window of --seq-len tokens every so many tokens of each document, "  \
               "counting only targets not counted yet; 0: consecutive rows, across documents")     \
    OPTION(examples, "examples", INTEGER, "0", "[0,1e15]",                                         \
           "of --choices: how many, from the first on; 0: all")                                    \
    LOAD_SEQ_LEN(OPTION)                                                                           \
    OPTION(batch, "batch", INTEGER, "8", "[1,65536]", "rows per batch")                            \
    OPTION(tokenizer, "tokenizer", TEXT, "", "FILE",                                               \
           "for bytes and characters; default: next to the checkpoint or the data, or the "        \
               "training run's")                                                                   \
    LOAD_THREADS(OPTION)                                                                           \
  HEADING("Reduced depth, in addition to full depth")                                              \
    OPTION(keep_layers, "keep-layers", TEXT, "", "LIST",                                           \
           "run only these layers or branches, counted from 0: 0,2-5,7.attn; or none")             \
    OPTION(depth, "depth", NUMBER, "1", "(0,1]",                                                   \
           "run this fraction of the layers, rounded, evenly spaced from the first to the last")   \
  HEADING("Adaptive depth, in addition: of --val, token by token, which is slow")                  \
    OPTION(adaptive, "adaptive", TEXT, "", "FILE",                                                 \
           "a policy that build/exits made; calibrate it on other text than this")                 \
  HEADING("Output")                                                                                \
    OPTION(json, "json", TEXT, "", "FILE", "write the results to this file too")                   \
    OPTION(scores, "scores", TEXT, "", "FILE",                                                     \
           "of --choices: write each choice's scores, one line of JSON per example")

OPTION_TABLE(EVALUATE_OPTIONS, EvaluateOptions, evaluate_options)

// ---- Layer selection: kept (2L), 1 for the branches that run ----

static void keep_listed(unsigned char *kept, int L, const char *list) {
    const char *error = strcmp(list, "none") ? layer_list_parse(kept, L, list) : NULL;
    if (error)
        die("--keep-layers %s: %s\n  hint: the model's layers are 0 to %d", list, error, L - 1);
}

// Appends [0,1,"3.attn"].
static void json_layers(Text *t, const unsigned char *kept, int L) {
    text_printf(t, "[");
    for (int l = 0, n = 0; l < L; l++) {
        const unsigned char *k = kept + BRANCHES * l;
        if (!k[ATTN] && !k[MLP]) continue;
        text_printf(t, n++ ? "," : "");
        if (k[ATTN] && k[MLP]) text_printf(t, "%d", l);
        else text_printf(t, "\"%d.%s\"", l, layer_list_branch[k[ATTN] ? ATTN : MLP]);
    }
    text_printf(t, "]");
}

// ---- A depth ----

enum { FULL, REDUCED, DEPTHS };

typedef struct {
    const char *name;
    const unsigned char *kept;  // (2L)
    double *scale;              // (2L) factors of the branches, 0 for those left out
    double flops_fraction;      // relative to the full model, in rows of T tokens
    ScoreDocuments val;         // document_loss is NaN without --stride
    ChoicesResult choices;
    double *choice_loss;        // (rows of the questions)
} Result;

// --adaptive: the policy and full depth, on the same rows by the same calls.
typedef struct { ExitsScore full, policy; int64_t rows; } AdaptiveResult;

typedef struct {
    Loaded *m;
    const EvaluateOptions *o;
    int T, B, stride, eot, depths;                       // eot: the end-of-text token, or -1
    Shards shards;
    int64_t rows;                                        // windows, without --stride
    Choices choices;
    int *characters;                                     // (rows of the questions), or NULL
    int64_t cut;                                         // rows whose context lost its first tokens
    Result result[DEPTHS];
    AdaptiveResult adaptive;
} Evaluate;

static void open_depth(Result *r, const char *name, const unsigned char *kept, const Loaded *m,
                       int T) {
    const GptConfig *c = &m->config;
    double flops = gpt_head_flops(c, T);
    r->name = name;
    r->kept = kept;
    r->scale = xcalloc((size_t)(BRANCHES * c->L), sizeof *r->scale);
    for (int i = 0; i < BRANCHES * c->L; i++) {
        r->scale[i] = kept[i] ? m->scale[i] : 0;
        flops += r->scale[i] != 0 ? gpt_branch_flops(c, i % BRANCHES, T) : 0;
    }
    r->flops_fraction = flops / gpt_row_flops(c, T);
}

static Scorer scorer(const Evaluate *e, const Result *r) {
    Loaded *m = e->m;
    const Scorer s = {m->engine, m->model, &m->plan, r->scale, e->B, e->T, m->tied};
    return s;
}

static void print_layers(const Result *r, int L) {
    Text layers = {NULL, 0, 0};
    layer_list_write(&layers, r->kept, L);
    printf(" %7.1f%%  %s\n", 100 * r->flops_fraction, layers.s);
    text_free(&layers);
}

static void json_number_at(Text *t, const char *name, double value) {
    text_printf(t, ", \"%s\": ", name);
    json_write_number(t, value);
}

// ---- Token shards ----

// The end-of-text token, which ends documents: the tokenizer's, otherwise the manifest's; -1 if
// neither names it.
static int find_eot(const Evaluate *e) {
    Manifest manifest;
    if (e->m->has_tokenizer) return e->m->tokenizer.eot;
    manifest_find(&manifest, e->o->val);
    const int eot = manifest.V ? manifest.eot : -1;
    manifest_free(&manifest);
    return eot;
}

// Losses that are not finite get no score: averages and comparisons of them would look like one.
static void check_finite(const Evaluate *e, const Result *r, const char *what, double loss) {
    if (isfinite(loss)) return;
    die("%s: the %s of %s is %g: its losses are not finite, so it has no score\n  hint: its "
        "weights are too large, or were damaged by the run that made them", e->m->dir, what,
        r->name, loss);
}

static void evaluate_val(const Evaluate *e, Result *r) {
    const Tokenizer *t = e->m->has_tokenizer ? &e->m->tokenizer : NULL;
    const Scorer s = scorer(e, r);
    if (e->stride) {
        r->val = score_documents(&s, &e->shards, e->eot, e->stride, e->o->eval_tokens, t);
        check_finite(e, r, "loss", r->val.loss);
        return;
    }
    const Evaluation v = evaluate_shards(s.engine, s.model, &e->shards, e->rows, t, e->B, s.plan,
                                         r->scale, s.tied, NULL);
    check_finite(e, r, "loss", v.loss);
    r->val.loss = v.loss;
    r->val.document_loss = NAN;
    r->val.bits_per_byte = v.bits_per_byte;
    r->val.tokens = v.tokens;
}

static void print_val(const Evaluate *e) {
    const Result *full = &e->result[FULL];
    printf("%s on %lld tokens of %s in rows of %d", e->m->dir, (long long)full->val.tokens,
           e->o->val, e->T);
    if (e->stride) {
        const long long n = full->val.documents;
        printf(" every %d, %lld %s%s", e->stride, n, e->eot < 0 ? "shard" : "document",
               n == 1 ? "" : "s");
        if (e->eot < 0) printf(" (no end-of-text token is known)");
    }
    printf("\n%-8s %10s %12s %14s%s %8s  %s\n", "", "loss", "perplexity", "bits per byte",
           e->stride ? "  by document" : "",
           "FLOPs", "layers");
    for (int i = 0; i < e->depths; i++) {
        const Result *r = &e->result[i];
        char bits[32] = "-";
        if (!isnan(r->val.bits_per_byte)) snprintf(bits, sizeof bits, "%.6f", r->val.bits_per_byte);
        printf("%-8s %10.6f %12.4f %14s", r->name, r->val.loss, exp(r->val.loss), bits);
        if (e->stride) printf(" %12.6f", r->val.document_loss);
        print_layers(r, e->m->config.L);
    }
}

// Reads the rows of --val in the order of full depth, so that losses can be compared.
static void evaluate_adaptive(Evaluate *e) {
    const GptConfig *c = &e->m->config;
    const Adaptive none = {.confidence = CONFIDENCE_LEARNED, .of = c->L, .n = 1,
                           .layer = (int[]){1}, .lambda = 2, .weight = (double *)xcalloc(
                               (size_t)c->C + 1, sizeof(double))};
    Adaptive a = adaptive_open(e->o->adaptive, c);
    AdaptiveRun run = {.engine = e->m->engine, .model = e->m->model, .policy = &none, .config = c,
                       .scale = e->m->scale, .tied = e->m->tied, .T = e->T,
                       .plan = drop_plan_new(c->L, e->B)};
    ExitsRows rows = exits_rows_first(&e->shards, (int)e->rows);
    Progress progress = progress_begin("adaptive", 2 * (double)rows.n * rows.T);
    e->adaptive.rows = e->rows;
    e->adaptive.full = exits_score(&run, &rows, e->B, 1, &progress);
    run.policy = &a;
    e->adaptive.policy = exits_score(&run, &rows, e->B, 0, &progress);
    progress_clear(&progress);
    exits_rows_free(&rows), adaptive_free(&a), drop_plan_free(&run.plan), free(none.weight);
}

static void print_adaptive(const Evaluate *e) {
    const ExitsScore *p = &e->adaptive.policy, *full = &e->adaptive.full;
    char layers[64];
    snprintf(layers, sizeof layers, "%.2f of %d a token", p->layers, e->m->config.L);
    printf("%-8s %10.6f %12.4f %14s %7.1f%%  %s\n", "adaptive", p->loss, exp(p->loss), "-",
           100 * p->flops, layers);
    printf("the most likely token is full depth's for %.2f%%; loss %+.2f%%; %.1f s, full depth "
           "token by token %.1f s\n", 100 * (1 - p->apart), 100 * (p->loss / full->loss - 1),
           p->seconds, full->seconds);
}

static void json_adaptive(Text *t, const Evaluate *e) {
    const ExitsScore *p = &e->adaptive.policy;
    text_printf(t, ",\n  \"adaptive\": {\"val_loss\": ");
    json_write_number(t, p->loss);
    json_number_at(t, "layers", p->layers);
    json_number_at(t, "flops_fraction", p->flops);
    json_number_at(t, "disagree", p->apart);
    json_number_at(t, "seconds", p->seconds);
    json_number_at(t, "full_loss", e->adaptive.full.loss);
    json_number_at(t, "full_seconds", e->adaptive.full.seconds);
    text_printf(t, "}");
}

// The names match metrics.jsonl.
static void json_val(Text *t, const Result *r, int L) {
    text_printf(t, ",\n  \"%s\": {\"layers\": ", r->name);
    json_layers(t, r->kept, L);
    json_number_at(t, "flops_fraction", r->flops_fraction);
    json_number_at(t, "val_loss", r->val.loss);
    json_number_at(t, "val_ppl", exp(r->val.loss));
    if (!isnan(r->val.bits_per_byte)) json_number_at(t, "val_bpb", r->val.bits_per_byte);
    if (!isnan(r->val.document_loss)) json_number_at(t, "val_document_loss", r->val.document_loss);
    text_printf(t, "}");
}

// ---- Multiple-choice questions ----

// The checkpoint may record its tokenizer's checksum, and the file that of the tokenizer that made
// it.
static void check_choices_tokenizer(const Evaluate *e) {
    char *path = xprintf("%s/config.json", e->m->base);
    FileMap map;
    Json doc;
    if (*e->choices.tokenizer_sha256 && path_is_directory(e->m->base) && !file_map(&map, path)) {
        const char *error = json_parse(&doc, map.data, map.size);
        if (error) die("%s: %s", path, error);
        const int sum = json_get(&doc, 0, "tokenizer_sha256");
        if (sum >= 0 && !json_equals(&doc, sum, e->choices.tokenizer_sha256))
            die("%s was made with another tokenizer than %s was trained with\n"
                "  hint: give data/choices.py the --tokenizer that made the shards", e->o->choices,
                e->m->dir);
        json_free(&doc);
        file_unmap(&map);
    }
    free(path);
}

static void open_choices(Evaluate *e) {
    const Tokenizer *t = &e->m->tokenizer;
    int known = e->m->has_tokenizer;
    choices_open(&e->choices, e->o->choices, e->m->config.V);
    check_choices_tokenizer(e);
    if (e->o->examples) choices_limit(&e->choices, e->o->examples);
    const Choices *c = &e->choices;
    for (int64_t i = 0; i < c->examples; i++)
        for (int64_t r = c->example[i].first; r < c->example[i].first + c->example[i].n; r++) {
            if (c->row[r].choice_n > e->T)
                die("%s: example %lld has a choice of %d tokens, and rows have %d\n  hint: use a "
                    "model with more positions", c->path, (long long)i, c->row[r].choice_n, e->T);
            for (int k = 0; k < c->row[r].choice_n; k++)
                known = known && choices_word(c, c->row[r].choice + k) < (uint32_t)t->V;
        }
    if (!known) return;
    e->characters = xcalloc((size_t)c->rows, sizeof *e->characters);
    for (int64_t r = 0; r < c->rows; r++) e->characters[r] = choices_characters(c, &c->row[r], t);
}

static void evaluate_choices(Evaluate *e, Result *r) {
    const Scorer s = scorer(e, r);
    r->choice_loss = xcalloc((size_t)e->choices.rows, sizeof *r->choice_loss);
    e->cut = score_choices(&s, &e->choices, r->choice_loss);
    for (int64_t i = 0; i < e->choices.rows; i++)
        check_finite(e, r, "loss of a choice", r->choice_loss[i]);
    r->choices = choices_result(&e->choices, r->choice_loss, e->characters);
}

static void print_choices(const Evaluate *e) {
    printf("%s on %lld examples of %s, chance %.4f", e->m->dir, (long long)e->choices.examples,
           e->o->choices, choices_chance(&e->choices));
    if (e->cut) printf("; %lld contexts cut to rows of %d", (long long)e->cut, e->T);
    printf("\n%-8s %17s %17s %17s %10s %8s  %s\n", "", "acc", "per token", "per character", "loss",
           "FLOPs", "layers");
    for (int i = 0; i < e->depths; i++) {
        const ChoicesResult *c = &e->result[i].choices;
        printf("%-8s", e->result[i].name);
        for (int k = 0; k < CHOICES_NORMS; k++) {
            if (isnan(c->acc[k])) printf(" %17s", "-");
            else printf("   %.4f +- %.4f", c->acc[k], c->stderr_of[k]);
        }
        printf(" %10.6f", c->loss);
        print_layers(&e->result[i], e->m->config.L);
    }
}

static void json_choices(Text *t, const Evaluate *e) {
    static const char *const name[CHOICES_NORMS] = {"acc", "acc_per_token", "acc_per_character"};
    static const char *const error[CHOICES_NORMS] = {"acc_stderr", "acc_per_token_stderr",
                                                     "acc_per_character_stderr"};
    text_printf(t, ",\n  \"choices\": {\"file\": ");
    json_write_string(t, e->o->choices);
    text_printf(t, ", \"examples\": %lld, \"contexts_cut\": %lld", (long long)e->choices.examples,
                (long long)e->cut);
    json_number_at(t, "chance", choices_chance(&e->choices));
    for (int i = 0; i < e->depths; i++) {
        const Result *r = &e->result[i];
        text_printf(t, ",\n    \"%s\": {\"layers\": ", r->name);
        json_layers(t, r->kept, e->m->config.L);
        json_number_at(t, "flops_fraction", r->flops_fraction);
        for (int k = 0; k < CHOICES_NORMS; k++) {
            if (isnan(r->choices.acc[k])) continue;
            json_number_at(t, name[k], r->choices.acc[k]);
            json_number_at(t, error[k], r->choices.stderr_of[k]);
        }
        json_number_at(t, "loss", r->choices.loss);
        text_printf(t, "}");
    }
    text_printf(t, "}");
}

// One line per example and depth: the right choice and, for each choice, the sum of -log p, its
// tokens and its characters.
static void write_scores(const Evaluate *e) {
    const Choices *c = &e->choices;
    Text t = {NULL, 0, 0};
    for (int64_t i = 0; i < c->examples; i++)
        for (int d = 0; d < e->depths; d++) {
            const ChoicesExample *x = &c->example[i];
            text_printf(&t, "{\"example\": %lld, \"depth\": \"%s\", \"label\": %d, \"loss\": [",
                        (long long)i, e->result[d].name, x->label);
            for (int k = 0; k < x->n; k++) {
                if (k) text_printf(&t, ", ");
                json_write_number(&t, e->result[d].choice_loss[x->first + k]);
            }
            text_printf(&t, "], \"tokens\": [");
            for (int k = 0; k < x->n; k++)
                text_printf(&t, "%s%d", k ? ", " : "", c->row[x->first + k].choice_n);
            text_printf(&t, "]");
            for (int k = 0; e->characters && k < x->n; k++)
                text_printf(&t, "%s%d", k ? ", " : ", \"characters\": [",
                            e->characters[x->first + k]);
            text_printf(&t, e->characters ? "]}\n" : "}\n");
        }
    file_write_whole(e->o->scores, t.s, t.n);
    text_free(&t);
}

// ---- The program ----

static void write_json(const Evaluate *e) {
    Text t = {NULL, 0, 0};
    text_printf(&t, "{\n  \"checkpoint\": ");
    json_write_string(&t, e->m->dir);
    text_printf(&t, ",\n  \"seq_len\": %d", e->T);
    if (*e->o->val) {
        text_printf(&t, ",\n  \"val\": ");
        json_write_string(&t, e->o->val);
        text_printf(&t, ",\n  \"tokens\": %lld", (long long)e->result[FULL].val.tokens);
        if (e->stride)
            text_printf(&t, ",\n  \"stride\": %d,\n  \"documents\": %lld", e->stride,
                        (long long)e->result[FULL].val.documents);
        for (int i = 0; i < e->depths; i++) json_val(&t, &e->result[i], e->m->config.L);
        if (*e->o->adaptive) json_adaptive(&t, e);
    }
    if (*e->o->choices) json_choices(&t, e);
    text_printf(&t, "\n}\n");
    file_write_whole(e->o->json, t.s, t.n);
    text_free(&t);
}

// Evaluates at full depth and, if kept is not NULL, with only the branches in kept (2L).
static void evaluate(Loaded *m, const EvaluateOptions *o, const unsigned char *kept) {
    Evaluate e;
    memset(&e, 0, sizeof e);
    e.m = m, e.o = o;
    e.T = o->seq_len ? (int)o->seq_len : m->config.T;
    e.stride = (int)o->stride;
    e.B = (int)o->batch;
    e.depths = kept ? 2 : 1;
    if (e.T > m->config.T) die("--seq-len %d: %s has %d positions", e.T, m->dir, m->config.T);
    if (e.stride > e.T)
        die("--stride %d: rows have %d tokens\n  hint: --stride %d leaves none out", e.stride, e.T,
            e.T);
    if (*o->choices) open_choices(&e);
    if (*o->val) {
        // a document may be shorter than a row
        shards_open(&e.shards, o->val, e.stride ? 1 : e.T, m->config.V);
        e.rows = e.stride ? 0 : shards_rows(&e.shards, o->eval_tokens);
        e.eot = e.stride ? find_eot(&e) : -1;
        if (e.rows && e.rows < e.B && !*o->choices) e.B = (int)e.rows;
    }
    const EngineArgs args = {.B = e.B, .T = e.T, .threads = (int)o->threads, .dtype = DTYPE_FP32,
                             .cache = *o->adaptive ? e.B : 0};
    load_model_as(m, engine_default(), &args);

    unsigned char *all = (unsigned char *)xcalloc((size_t)(BRANCHES * m->config.L), 1);
    memset(all, 1, (size_t)(BRANCHES * m->config.L));
    open_depth(&e.result[FULL], "full", all, m, e.T);
    if (kept) open_depth(&e.result[REDUCED], "reduced", kept, m, e.T);
    for (int i = 0; *o->val && i < e.depths; i++) evaluate_val(&e, &e.result[i]);
    if (*o->adaptive) evaluate_adaptive(&e);
    if (*o->val) print_val(&e);
    if (*o->adaptive) print_adaptive(&e);
    if (*o->val && *o->choices) printf("\n");
    for (int i = 0; *o->choices && i < e.depths; i++) evaluate_choices(&e, &e.result[i]);
    if (*o->choices) print_choices(&e);
    if (*o->json) write_json(&e);
    if (*o->scores) write_scores(&e);
    for (int i = 0; i < e.depths; i++) free(e.result[i].scale), free(e.result[i].choice_loss);
    if (*o->val) shards_close(&e.shards);
    if (*o->choices) choices_close(&e.choices);
    free(e.characters), free(all), free(e.adaptive.full.disagree);
    free(e.adaptive.policy.disagree);
}

int main(int argc, char **argv) {
    EvaluateOptions o;
    Options options;
    Loaded m;
    program_begin(argv);
    options_init(&options, "evaluate CHECKPOINT --val GLOB [--choices FILE] [options]");
    options.engine = engine_default_name();
    options_add(&options, evaluate_options(), &o);
    options.max_arguments = 1;
    options_parse(&options, argc, argv);
    if (options.n_arguments < 1)
        die("the checkpoint is missing\n  hint: evaluate runs/gpt/latest --val GLOB");
    if (!*o.val && !*o.choices)
        die("--val is missing\n  hint: --val 'data/val_*.bin', or --choices FILE; data/README.md "
            "tells how to make them");
    if (o.stride && !*o.val) die("--stride is for --val, which is missing");
    if ((*o.scores || o.examples) && !*o.choices)
        die("--%s is for --choices, which is missing", *o.scores ? "scores" : "examples");
    if (*o.adaptive && (!*o.val || o.stride))
        die("--adaptive is for %s", *o.val ? "whole rows: it excludes --stride" :
            "--val, which is missing");
    const int by_list = options_from(&options, &o.keep_layers) != FROM_DEFAULT;
    const int by_depth = options_from(&options, &o.depth) != FROM_DEFAULT;
    if (by_list && by_depth) die("--keep-layers and --depth exclude each other");

    load_config(&m, options.arguments[0]);
    load_tokenizer(&m, o.tokenizer, *o.val ? o.val : o.choices);
    unsigned char *kept = (unsigned char *)xcalloc((size_t)(BRANCHES * m.config.L), 1);
    if (by_list) keep_listed(kept, m.config.L, o.keep_layers);
    else layer_list_share(kept, m.config.L, KEEP_EVEN, o.depth);
    evaluate(&m, &o, by_list || by_depth ? kept : NULL);
    free(kept);
    load_close(&m);
    options_free(&options);
    if (fflush(stdout) || ferror(stdout)) die("cannot write the results: %s", strerror(errno));
    return 0;
}
