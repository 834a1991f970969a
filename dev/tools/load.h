// load.h: a trained model for the tools that only run it: a checkpoint directory, ours or a Hugging
// Face GPT-2, or an adapter of one, and its tokenizer.
#ifndef LOAD_H
#define LOAD_H

#include "../check.h"
#include "../files/files.h"
#include "../files/tokenizer.h"
#include "../run/checkpoint.h"
#include "../run/options.h"

// Rows of option tables that these tools share.
#define LOAD_SEQ_LEN(OPTION)                                                                       \
    OPTION(seq_len, "seq-len", INTEGER, "0", "[0,1048576]",                                        \
           "tokens per row; 0: as many as the model has positions")
#define LOAD_THREADS(OPTION)                                                                       \
    OPTION(threads, "threads", INTEGER, "0", "[0,4096]",                                           \
           "CPU threads; 0: all that the machine offers")

typedef struct {
    char *dir;                                           // the checkpoint
    // where config.json is: dir, or the base of an adapter, which is merged into the weights on
    // loading
    char *base;
    GptConfig config;
    double *scale;      // (2L) the branches' factors in evaluation
    int tied;           // how they apply: DropPlan.tied
    char *run;          // options of the run that made it, as in config.txt, or NULL
    const Engine *engine;
    Model *model;
    DropPlan plan;      // capacity: the rows it was opened for
    Tokenizer tokenizer;
    int has_tokenizer;
} Loaded;

// Reads the sizes of the checkpoint at `path`; load_model reads the weights. Dies if it is missing
// or damaged.
static inline void load_config(Loaded *m, const char *path) {
    memset(m, 0, sizeof *m);
    m->dir = checkpoint_find(path);
    m->run = checkpoint_check_weights(m->dir);
    m->base = xstrdup(m->dir);
    if (lora_is_adapter(m->dir)) {
        LoraConfig lora;
        lora_open(&lora, m->dir);
        free(m->base);
        m->base = lora.base;
    }
    checkpoint_read_config(m->dir, &m->config, &m->scale, &m->tied);
}

// Opens it on an engine with the given args.
static inline void load_model_as(Loaded *m, const Engine *engine, const EngineArgs *args) {
    m->engine = engine;
    m->model = engine_open(engine, &m->config, args);
    m->plan = drop_plan_new(m->config.L, args->B);
    checkpoint_load_weights(m->dir, engine, m->model, &m->config);
}

// For B rows of T tokens per pass, T at most config.T.
static inline void load_model(Loaded *m, const Engine *engine, int B, int T, int threads) {
    const EngineArgs args = {.B = B, .T = T, .threads = threads, .dtype = DTYPE_FP32};
    load_model_as(m, engine, &args);
}

// The run's tokenizer: its --tokenizer, or the one next to its --train. A path from malloc, or
// NULL.
static inline char *load_run_tokenizer(const char *run) {
    TrainOptions t;
    Options o;
    options_init(&o, "");
    options_add(&o, train_options(), &t);
    char *error = options_config(&o, run, strlen(run), FROM_CONFIG, "trainer.json");
    // an option of another version; --train comes first
    free(error);
    char *path = *t.tokenizer ? xstrdup(t.tokenizer) : tokenizer_find(t.train);
    if (path && !path_exists(path)) {
        free(path);
        path = NULL;
    }
    options_free(&o);
    return path;
}

// Loads the tokenizer from the file `given`; if that is "", from next to the checkpoint's files,
// otherwise next to `shards` (NULL: none), otherwise the run's. Finding none is not an error; one
// with more tokens than the model is.
static inline void load_tokenizer(Loaded *m, const char *given, const char *shards) {
    char *inside = xprintf("%s/", m->dir), *path = *given ? xstrdup(given) : tokenizer_find(inside);
    if (!path && strcmp(m->base, m->dir)) {
        free(inside);
        inside = xprintf("%s/", m->base);
        path = tokenizer_find(inside);
    }
    if (!path && shards) path = tokenizer_find(shards);
    if (!path && m->run) path = load_run_tokenizer(m->run);
    free(inside);
    if (!path) return;
    tokenizer_load(&m->tokenizer, path);
    if (m->tokenizer.V > m->config.V)
        die("%s has %d tokens, the model only %d\n  hint: --tokenizer FILE names another", path,
            m->tokenizer.V, m->config.V);
    m->has_tokenizer = 1;
    free(path);
}

static inline void load_close(Loaded *m) {
    if (m->has_tokenizer) tokenizer_free(&m->tokenizer);
    m->engine->close(m->model);
    drop_plan_free(&m->plan);
    free(m->dir), free(m->base);
    free(m->scale);
    free(m->run);
}

#endif
