// study_again.h: final runs of a study once more: whether they give the same bits, and what their
// weights are good for besides the loss: life with fewer layers, and drafts of their first layers.
//
//     RESULTS/uses/KEY.json    one line: what the weights of the run KEY are good for
#ifndef STUDY_AGAIN_H
#define STUDY_AGAIN_H

#include "../run/speculate.h"
#include "layers.h"
#include "load.h"
#include "study_queue.h"

// ---- The same bits ----

// Whether a run's directory has its last weights, with that hash.
static inline int study_has_bits(const char *out, const char *bits) {
    char *path = xprintf("%s/latest/model.safetensors", out), now[SHA256_HEX] = "";
    if (path_exists(path)) study_bits(out, now);
    free(path);
    return !strcmp(now, bits);
}

static inline int study_same_depths(const Study *s, const StudyResult *a, const StudyResult *b) {
    int same = 1;
    for (int i = 0; i < s->depths.n * KEEP_KINDS; i++) {
        const int kind = i % KEEP_KINDS;
        const double share = s->depths.share[i / KEEP_KINDS];
        same &= study_depth_loss(a, kind, share) == study_depth_loss(b, kind, share);
    }
    return same;
}

// Trains a run once more, into the new directory `out`, which is in that folder of OUT, and tells
// whether its losses and its weights are those of the result `then`. The caller holds its claim.
static inline int study_again(const Study *s, const char *trainer, const StudyRun *run,
                              const StudyResult *then, const char *folder, const char *out) {
    const char *arm = s->arm[run->arm].name;
    StudyResult now;
    study_remove(out);
    if (child_wait(study_run_start(s, trainer, run, folder)))
        study_show_log(s, run->key), die("the run of [arm %s] has failed", arm);
    Text text = study_result_text(s, run, out, 0);
    if (!text.n || study_result_parse(&now, text.s, text.n - 1))
        die("the run of [arm %s] did not end", arm);
    const int same = now.val_loss == then->val_loss && !strcmp(now.bits, then->bits) &&
                     study_same_depths(s, &now, then);
    printf("%s, seed %lld: val loss %.17g, weights %.16s: %s", arm, (long long)run->seed,
           now.val_loss, now.bits, same ? "the same bits\n" : "DIFFERS");
    if (!same)
        printf(" from %.17g, %.16s, which is of commit %s on %s\n", then->val_loss, then->bits,
               then->commit, then->machine);
    fflush(stdout);
    study_result_free(&now);
    text_free(&text);
    return same;
}

// ---- What weights are good for ----

enum { USE_SHARES = 2, USE_DRAFTS = 4,                   // drafts of a round
       USE_TRAIN_TOKENS = 16384, USE_VAL_TOKENS = 65536, USE_DRAFT_TOKENS = 8192, USE_ROWS = 16 };

// removed: the loss without that share of the layers. Of validation text, token by token, the
// chance that a draft of that share of the layers, the first ones, is accepted: sampled at
// temperature 1, or greedy. gain: speculate_gain of greedy drafts by the best number of layers.
enum { USE_LOSS, USE_REMOVED, USE_SAMPLED = USE_REMOVED + USE_SHARES,
       USE_GREEDY = USE_SAMPLED + USE_SHARES, USE_GAIN = USE_GREEDY + USE_SHARES, USES };

static const double use_share[USE_SHARES] = {0.25, 0.5};
static const char *const use_name[USES] = {"loss",        "removed_0.25", "removed_0.5",
                                           "sampled_0.25", "sampled_0.5", "greedy_0.25",
                                           "greedy_0.5",   "gain"};

typedef struct { char key[STUDY_KEY], bits[SHA256_HEX]; double value[USES]; } StudyUse;
typedef struct { StudyUse *use; int n; } StudyUses;

// A share of L layers: at least one, and not all.
static inline int use_layers(double share, int L) {
    const int n = (int)nearbyint(share * L);
    return n < 1 ? 1 : n < L ? n : L - 1;
}

static inline LayersModel use_model(Loaded *m, const Shards *shards, int tokens) {
    const int64_t rows = (tokens + shards->T - 1) / shards->T;
    const LayersModel l = {.engine = m->engine, .model = m->model, .config = m->config,
                           .plan = &m->plan, .scale = m->scale, .tied = m->tied, .B = USE_ROWS,
                           .shards = shards,
                           .rows = rows < shards->windows ? rows : shards->windows};
    return l;
}

// The validation loss with all layers, and without those that cost least on training text, removed
// one after the other.
static inline void use_removal(Loaded *m, const Shards *train, const Shards *val, double *value) {
    const int L = m->config.L, most = use_layers(use_share[USE_SHARES - 1], L);
    const LayersModel on_train = use_model(m, train, USE_TRAIN_TOKENS),
                      on_val = use_model(m, val, USE_VAL_TOKENS);
    LayersLosses train_losses = {NULL, 0}, val_losses = {NULL, 0};
    int *order = (int *)xcalloc((size_t)L, sizeof *order);
    double *loss = (double *)xcalloc((size_t)L, sizeof *loss);
    unsigned char *kept = (unsigned char *)xcalloc((size_t)(BRANCHES * L), 1);
    memset(kept, 1, (size_t)(BRANCHES * L));
    value[USE_LOSS] = layers_loss(&on_val, &val_losses, kept)->mean;
    layers_greedy(&on_train, &train_losses, most, order, loss);
    for (int i = 0, removed = 0; i < USE_SHARES; i++) {
        while (removed < use_layers(use_share[i], L)) layers_keep(kept, order[removed++], 0);
        value[USE_REMOVED + i] = layers_loss(&on_val, &val_losses, kept)->mean;
    }
    layers_losses_free(&train_losses), layers_losses_free(&val_losses);
    free(order), free(loss), free(kept);
}

// accept[temperature][l]: the mean over validation text of the chance that a token drafted by the
// first l + 1 layers is accepted.
static inline void use_accept(Loaded *m, const Shards *val, double *accept[2]) {
    const int T = val->T, L = m->config.L, V = m->config.V;
    const int64_t want = (USE_DRAFT_TOKENS + T - 1) / T,
                  rows = want < val->windows ? want : val->windows;
    const Tokenizer all = {.V = V};
    Sampler s = {.engine = m->engine, .model = m->model, .cached = 1, .layers = L, .V = V, .T = T,
                 .batch = 1, .scale = m->scale, .tied = m->tied,
                 .tokenizer = m->has_tokenizer ? &m->tokenizer : &all, .args = {1, 0, 1, 0},
                 .plan = drop_plan_new(L, 1)};
    int *tokens = (int *)xcalloc(2 * (size_t)T, sizeof *tokens), zero = 0;
    real *logits = (real *)xcalloc((size_t)L * (size_t)T * (size_t)V, sizeof *logits);
    drop_plan_keep_all(&s.plan, m->scale, m->tied, 1);
    for (int64_t row = 0; row < rows; row++) {
        const DecodeArgs a = {.n = T, .tokens = tokens, .seq = &zero, .at = &zero};
        shards_read_window(val, row * val->windows / rows, tokens, tokens + T);
        speculate_layers(&s, &a, T, logits);
        for (int temperature = 0; temperature < 2; temperature++) {
            s.args.temperature = temperature;
            for (int i = 0; i < L * T; i++)
                accept[temperature][i / T] +=
                    speculate_agree(&s, logits + (size_t)i * (size_t)V,
                                    logits + (size_t)((L - 1) * T + i % T) * (size_t)V) /
                    ((double)rows * T);
        }
    }
    drop_plan_free(&s.plan);
    free(tokens), free(logits);
}

static inline void use_drafts(Loaded *m, const Shards *val, double *value) {
    const int L = m->config.L;
    double *accept[2] = {(double *)xcalloc((size_t)L, sizeof(double)),
                         (double *)xcalloc((size_t)L, sizeof(double))};
    use_accept(m, val, accept);
    for (int i = 0; i < USE_SHARES; i++) {
        value[USE_SAMPLED + i] = accept[1][use_layers(use_share[i], L) - 1];
        value[USE_GREEDY + i] = accept[0][use_layers(use_share[i], L) - 1];
    }
    value[USE_GAIN] = 1;                                 // without drafts
    for (int l = 1; l < L; l++)
        value[USE_GAIN] = fmax(value[USE_GAIN],
                               speculate_gain(&m->config, l, USE_DRAFTS, accept[0][l - 1]));
    free(accept[0]), free(accept[1]);
}

// Measures the checkpoint at `path`, a run of that arm, which has several layers, and writes
// RESULTS/uses/KEY.json.
static inline void study_use(const Study *s, const StudyRun *run, const char *path,
                             const char *bits) {
    const StudyArm *a = &s->arm[run->arm];
    double value[USES];
    Loaded m;
    Shards train, val;
    Text text = {NULL, 0, 0};
    load_config(&m, path);
    shards_open(&train, run->o.train, a->T, m.config.V);
    shards_open(&val, run->o.val, a->T, m.config.V);
    const EngineArgs args = {.B = USE_ROWS, .T = a->T, .threads = (int)run->o.threads,
                             .dtype = DTYPE_FP32, .cache = 1};
    load_model_as(&m, engine_default(), &args);
    load_tokenizer(&m, "", run->o.train);
    use_removal(&m, &train, &val, value);
    use_drafts(&m, &val, value);
    load_close(&m), shards_close(&train), shards_close(&val);
    text_printf(&text, "{\"format\": \"droppath.c uses 1\", \"key\": \"%s\", \"bits\": \"%s\"",
                run->key, bits);
    for (int i = 0; i < USES; i++) {
        text_printf(&text, ", \"%s\": ", use_name[i]);
        json_write_number(&text, value[i]);
    }
    text_printf(&text, "}\n");
    char *to = xprintf("%s/uses/%s.json", s->results, run->key);
    file_replace(to, text.s, text.n);
    text_free(&text), free(to);
    printf("%s, seed %lld: loss %.4f, %.4f without a quarter of the layers, %.4f without half; "
           "drafts by a quarter %.0f%% accepted, by half %.0f%%\n", a->name, (long long)run->seed,
           value[USE_LOSS], value[USE_REMOVED], value[USE_REMOVED + 1], 100 * value[USE_SAMPLED],
           100 * value[USE_SAMPLED + 1]);
    fflush(stdout);
}

// Reads one line of RESULTS/uses. Returns NULL, or what is wrong.
static inline const char *study_use_parse(StudyUse *u, const char *line, size_t n) {
    Json doc;
    char format[32];
    int whole = 1;
    if (json_parse(&doc, line, n)) return "it is not a whole line of JSON";
    study_json_text(&doc, "format", format, sizeof format);
    study_json_text(&doc, "key", u->key, sizeof u->key);
    study_json_text(&doc, "bits", u->bits, sizeof u->bits);
    for (int i = 0; i < USES; i++)
        whole &= json_number(&doc, json_get(&doc, 0, use_name[i]), &u->value[i]);
    json_free(&doc);
    return strcmp(format, "droppath.c uses 1") ? "its format is not \"droppath.c uses 1\""
           : strlen(u->key) != STUDY_KEY - 1   ? "it has no key"
           : !whole                            ? "a number is missing"
                                               : NULL;
}

static inline const char *study_uses_take(void *self, const char *line, size_t n) {
    StudyUses *all = (StudyUses *)self;
    StudyUse u;
    const char *error = study_use_parse(&u, line, n);
    if (error) return error;
    all->use = (StudyUse *)xrealloc(all->use, (size_t)(all->n + 1), sizeof *all->use);
    all->use[all->n++] = u;
    return NULL;
}

static inline void study_uses_read(StudyUses *all, const Study *s) {
    char *dir = xprintf("%s/uses", s->results);
    memset(all, 0, sizeof *all);
    study_each_file(dir, all, study_uses_take);
    free(dir);
}

static inline void study_uses_free(StudyUses *all) {
    free(all->use);
    memset(all, 0, sizeof *all);
}

// Those of a result, if of the same weights; or NULL.
static inline const StudyUse *study_uses_find(const StudyUses *all, const StudyResult *r) {
    for (int i = 0; r && i < all->n; i++)
        if (!strcmp(all->use[i].key, r->key) && !strcmp(all->use[i].bits, r->bits))
            return &all->use[i];
    return NULL;
}

#endif
