// teacher.h: a trained model of the same vocabulary from which a run learns (--teacher). It reads
// each micro-batch before the student does, on the same engine; the student's pass then uses what
// it has left there (Objective in model/pass.h). Depth, width and heads may differ.
#ifndef TEACHER_H
#define TEACHER_H

#include "attribution.h"
#include "checkpoint.h"
#include "options.h"

enum { ALIGN_NONE, ALIGN_ATTENTION, ALIGN_ATTRIBUTION }; // in the order of --align

typedef struct {
    Model *model;                                        // NULL: there is none
    GptConfig config;
    DropPlan plan;                                       // every row runs
    double *scale;                                       // (2L) its branches' factors
    int tied;
    char sha256[SHA256_HEX];                             // of its weights, as this run reads them
    unsigned char *maps;                                 // (L) of its layers, whose attention is
                                                         // compared; NULL: none is
    Attribution own;                                     // if it attributes; e NULL: it does not
    int64_t *untouched;                                  // (2L+1) zeros, for updates that none is
} Teacher;

// Dies if options that need a teacher lack one, or if one is given that nothing uses.
static inline void teacher_check(const TrainOptions *o) {
    if (*o->teacher && o->distill == 0 && o->align == ALIGN_NONE)
        die("--teacher without --distill or --align: there is nothing to learn from it\n  hint: "
            "--distill 0.5 gives its distribution half of the loss");
    const int scored = o->align == ALIGN_ATTRIBUTION && *o->align_scores;
    if (*o->align_scores && !scored)
        die("--align-scores needs --align attribution");
    if (scored && *o->teacher && o->distill == 0)
        die("--align-scores and --teacher exclude each other: both would name the target\n  hint: "
            "omit one of them");
    if (o->align == ALIGN_ATTRIBUTION && o->consistency > 0)
        die("--align attribution and --consistency exclude each other");
    if (o->align == ALIGN_ATTRIBUTION && o->dropout_embd > 0)
        die("--align attribution is of embeddings without dropout\n  hint: --dropout-embd 0");
    if (o->align == ALIGN_ATTRIBUTION && (o->train_last || o->grow[0]))
        die("--align attribution needs the gradient of the embeddings, of one depth\n  hint: "
            "without --train-last and --grow");
    if (!*o->teacher && !scored && (o->distill > 0 || o->align != ALIGN_NONE))
        die("--%s needs --teacher\n  hint: --teacher PATH names a checkpoint",
            o->distill > 0 ? "distill" : "align");
    if (o->align == ALIGN_ATTENTION && o->attentiondrop != SCORES_PLAIN)
        die("--align attention and --attentiondrop exclude each other: the student's map would be "
            "of edited scores\n  hint: omit one of them");
    if (*o->teacher && *o->device)
        die("--device predicts a step without a teacher\n  hint: omit --teacher or --device");
}

// Compares its tokens with those of the run's tokenizer, if both are known: with other tokens it
// would teach nonsense.
static inline void teacher_check_tokens(const char *dir, const Tokenizer *mine) {
    Tokenizer t;
    char *inside = xprintf("%s/", dir), *path = tokenizer_find(inside);
    int an, bn;
    free(inside);
    if (!path) return;
    tokenizer_load(&t, path);
    for (int i = 0; i < t.V && i < mine->V; i++) {
        const char *a = tokenizer_bytes(&t, i, &an), *b = tokenizer_bytes(mine, i, &bn);
        if (an != bn || memcmp(a, b, (size_t)an))
            die("--teacher %s has another tokenizer: token %d differs\n  hint: a teacher must have "
                "been trained on the same tokens", dir, i);
    }
    tokenizer_free(&t);
    free(path);
}

// A checksum of all weights, in the order of the table of parameters.
static inline void teacher_sum(Teacher *t, const Engine *e) {
    Sha256 sum;
    sha256_init(&sum);
    for (int p = 0; p < N_PARAMS; p++) {
        const size_t n = gpt_param_size(&t->config, p);
        real *host = (real *)xcalloc(n + 1, sizeof *host);
        for (int l = 0; l < gpt_param_layers(&t->config, p); l++) {
            e->read(t->model, SLOT_PARAM, p, l, host);
            sha256_update(&sum, host, n * sizeof *host);
        }
        free(host);
    }
    sha256_final(&sum, t->sha256);
}

// The teacher's layer beside layer l of a student's L: at the same share of the depth, so the last
// beside the last.
static inline int teacher_layer(const Teacher *t, int l, int L) {
    return ((l + 1) * t->config.L + L - 1) / L - 1;
}

// Opens the checkpoint at `path` to run on batches of args.B rows of args.T tokens, for a student
// of V tokens; mine: the run's tokenizer, or NULL. With args.dry its weights are not read.
// compared (most): the student's layers whose attention is compared, in each depth from `least` to
// `most`; NULL: none.
// attributes: whether its attributions are needed, for which it is opened to train.
static inline void teacher_open(Teacher *t, const Engine *e, const char *path, EngineArgs args,
                                int V, const Tokenizer *mine, const unsigned char *compared,
                                int least, int most, int attributes) {
    char *dir = checkpoint_find(path);
    checkpoint_read_config(dir, &t->config, &t->scale, &t->tied);
    if (attributes) args.bound = memory_bound_full(t->config.L, 0, args.B, 1);
    if (compared) args.maps = t->maps = (unsigned char *)xcalloc((size_t)t->config.L, 1);
    for (int L = least; compared && L <= most; L++)
        for (int l = 0; l < L; l++) t->maps[teacher_layer(t, l, L)] |= compared[l];
    if (t->config.V != V)
        die("--teacher %s has %d tokens, the model %d\n  hint: a teacher must have been trained on "
            "the same tokens", path, t->config.V, V);
    if (t->config.T < args.T)
        die("--teacher %s has %d positions, rows have %d\n  hint: --seq-len %d", path, t->config.T,
            args.T, t->config.T);
    if (mine) teacher_check_tokens(dir, mine);
    t->model = engine_open(e, &t->config, &args);
    t->plan = drop_plan_new(t->config.L, args.B);
    if (args.bound.rows > 0) {
        t->own = attribution_new((size_t)args.B, (size_t)args.T, &t->config);
        t->untouched = (int64_t *)xcalloc((size_t)(BRANCHES * t->config.L) + 1, sizeof(int64_t));
    }
    if (!args.dry) {
        free(checkpoint_check_weights(dir));
        checkpoint_load_weights(dir, e, t->model, &t->config);
        teacher_sum(t, e);
    }
    free(dir);
}

// Reads a batch, up to its features; or to its gradient, if it attributes. No weight changes.
static inline void teacher_run(Teacher *t, const Engine *e, const Batch *batch) {
    if (t->own.e) {
        UpdateArgs none;
        drop_plan_keep_all(&t->plan, t->scale, t->tied, batch->rows);
        const Pass pass = pass_of(&t->plan, 1);
        attribution_run(&t->own, e, t->model, batch, &pass);
        memset(&none, 0, sizeof none);
        none.t = t->untouched, none.discard = 1;
        e->update(t->model, &none);
        return;
    }
    const Batch unscored = batch_of(batch->rows, batch->T, batch->tokens, NULL);
    drop_plan_keep_all(&t->plan, t->scale, t->tied, batch->rows);
    const Pass pass = pass_of(&t->plan, 0);
    e->run(t->model, &unscored, &pass);
}

// FLOPs for one row of T tokens; 0 without a teacher.
static inline double teacher_row_flops(const Teacher *t, int T) {
    return t->model ? (t->own.e ? 3 : 1) * gpt_row_flops(&t->config, T) : 0;
}

static inline void teacher_close(Teacher *t, const Engine *e) {
    if (!t->model) return;
    e->close(t->model);
    drop_plan_free(&t->plan);
    free(t->scale), free(t->maps), free(t->untouched);
    attribution_free(&t->own);
    t->model = NULL;
}

#endif
