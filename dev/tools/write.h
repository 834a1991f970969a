// write.h: writes a model as a directory that transformers opens: weights, configuration,
// tokenizer. Shared by export and prune, which provide the weights through a function.
#ifndef WRITE_H
#define WRITE_H

#include "../check.h"
#include "../files/files.h"
#include "../files/llmc.h"
#include "../files/tokenizer_json.h"
#include "../run/checkpoint.h"
#include "load.h"

#define WRITE_TOKENIZER(OPTION)                                                                    \
    OPTION(tokenizer, "tokenizer", TEXT, "", "FILE",                                               \
           "a tokenizer.json, or one of our tokenizer files to make one from; default: next to "   \
           "the checkpoint's files, otherwise the training run's")

typedef struct { const char *name, *torch; int dtype; } WriteDtype;
static const WriteDtype write_dtypes[3] = {{"f32", "float32", SAFETENSORS_F32},
                                           {"f16", "float16", SAFETENSORS_F16},
                                           {"bf16", "bfloat16", SAFETENSORS_BF16}};

typedef struct {
    GptConfig config;                                    // of the model to write
    const WriteDtype *to;
    const char *from, *run; // the checkpoint's directory; its run's options, or NULL
    const char *base;       // where its config.json is: an adapter's base, otherwise NULL or `from`
    const char *given;                                   // --tokenizer, or ""
    int llmc;                                            // the layout of llm.c's files
    void *self;
    void (*tensor)(void *self, int param, int layer,
                   real *host); // one layer's part of a parameter, with all factors applied
    Text tokenizer, tokenizer_config; // the two files; empty: no tokenizer
    Text ours; // the tokenizer file for our tools, if it came from one
    const char *ours_name;
    int eot;                                             // the end-of-text token, or -1
} ModelOut;

static inline void write_free(ModelOut *x) {
    text_free(&x->tokenizer), text_free(&x->tokenizer_config), text_free(&x->ours);
}

// ---- Weights ----

// One layer's part of a parameter as it is stored, from malloc; *bytes long. llm.c's file has the
// transpose, and rows of zeros after the last token's. NULL after setting *error, from malloc, to
// what is wrong.
static inline void *write_tensor(const ModelOut *x, int p, int l, size_t *bytes, char **error) {
    const GptConfig *c = &x->config;
    const size_t n = gpt_param_size(c, p), width = safetensors_dtype[x->to->dtype].size;
    const size_t padding =
        x->llmc && p == P_wte ? (size_t)(llmc_vocab(c->V) - c->V) * (size_t)c->C : 0;
    real *host = (real *)xcalloc(n, sizeof *host), *transposed = NULL;
    void *out = xcalloc(n + padding, width);
    x->tensor(x->self, p, l, host);
    if (x->llmc && llmc_transposed(p)) {
        transposed = (real *)xcalloc(n, sizeof *transposed);
        llmc_transpose(transposed, host, (size_t)gpt_param_rows(c, p),
                       (size_t)gpt_param_cols(c, p));
    }
    const real *from = transposed ? transposed : host;
    const size_t bad = safetensors_from_real(x->to->dtype, from, n, out);
    if (bad < n) {
        char *name = gpt_param_name(p, l);
        *error = xprintf("%s: a weight of %s is %g, which is not finite in %s%s", x->from, name,
                         (double)from[bad], x->to->name,
                         isfinite(from[bad]) ? "\n  hint: --dtype bf16 has the range of f32" : "");
        free(name), free(out);
        out = NULL;
    }
    *bytes = (n + padding) * width;
    free(host), free(transposed);
    return out;
}

// Writes all tensors to the open file of either format. Returns NULL, or from malloc what is wrong.
static inline char *write_tensors(const ModelOut *x, SafetensorsWriter *w, FILE *f,
                                  const char *path) {
    char *error = NULL;
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(&x->config, p); l++) {
            size_t bytes;
            void *data = write_tensor(x, p, l, &bytes, &error);
            if (!data) return error;
            if (w) safetensors_append(w, data, bytes);
            else file_write(f, path, data, bytes);
            free(data);
        }
    return NULL;
}

static inline char *write_safetensors(const ModelOut *x, const char *path) {
    const GptConfig *c = &x->config;
    SafetensorsWriter w;
    FILE *f = file_open(path, "wb");
    safetensors_writer_init(&w);
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            int64_t shape[2];
            const int dims = gpt_param_shape(c, p, shape);
            char *name = gpt_param_name(p, l), *full = xprintf("transformer.%s", name);
            safetensors_declare(&w, full, safetensors_dtype[x->to->dtype].name, dims, shape);
            free(name), free(full);
        }
    safetensors_begin(&w, f, path);
    char *error = write_tensors(x, &w, f, path);
    if (error) return error;
    safetensors_end(&w);
    file_sync_close(f, path);
    return NULL;
}

// ---- Tokenizer ----

static inline Text write_read(const char *path) {
    FileMap map;
    Text t = {NULL, 0, 0};
    const char *error = file_map(&map, path);
    if (error) die("cannot read %s: %s", path, error);
    if (map.size > SIZE_MAX / 4) die("%s is too large", path);
    if (map.data) text_append(&t, map.data, map.size);
    else text_append(&t, "", 0);
    file_unmap(&map);
    return t;
}

// Uses a tokenizer.json unchanged, after checking that its tokens are the model's. Finds the name
// of end-of-text, from malloc, or NULL.
static inline char *write_take_json(ModelOut *x, const char *path) {
    char *eot;
    int64_t last;
    x->tokenizer = write_read(path);
    char *error = tokenizer_json_read(x->tokenizer.s, x->tokenizer.n, x->eot, &last, &eot);
    if (error) die("%s: %s", path, error);
    if (last >= x->config.V)
        die("%s has a token %lld, the model only %d tokens\n  hint: --tokenizer FILE names another",
            path, (long long)last, x->config.V);
    return eot;
}

// Makes a tokenizer.json from one of our tokenizer files, and keeps that file too, for our tools.
static inline char *write_make_json(ModelOut *x, const char *path) {
    Tokenizer t;
    tokenizer_load(&t, path);
    if (t.V > x->config.V)
        die("%s has %d tokens, the model only %d\n  hint: --tokenizer FILE names another", path,
            t.V, x->config.V);
    const char *error = tokenizer_json_write(&x->tokenizer, &t);
    if (error)
        die("%s: no tokenizer.json can be made of it: %s\n  hint: --tokenizer names a "
            "tokenizer.json",
            path, error);
    x->ours = write_read(path);
    x->ours_name = x->ours.s[0] == '{' ? "vocab.json" : "tokenizer.bin";
    if (x->eot < 0) x->eot = t.eot;
    char *eot = tokenizer_json_eot_name(&t);
    tokenizer_free(&t);
    return eot;
}

// Whether the file is a tokenizer.json, which has an object "model", rather than a vocab.json,
// which has not.
static inline int write_is_json(const char *path) {
    FileMap map;
    Json doc;
    int is = 0;
    if (file_map(&map, path)) return 0;
    if (map.size && map.data[0] == '{' && !json_parse(&doc, map.data, map.size)) {
        is = json_type(&doc, json_get(&doc, 0, "model")) == JSON_OBJECT;
        json_free(&doc);
    }
    file_unmap(&map);
    return is;
}

// The checkpoint's tokenizer: a tokenizer.json if there is one, since it holds more than our files.
// From malloc, or NULL.
static inline char *write_find_tokenizer(const ModelOut *x) {
    if (*x->given) return xstrdup(x->given);
    char *json = xprintf("%s/tokenizer.json", x->from), *inside = xprintf("%s/", x->from);
    char *here = tokenizer_find(inside);
    if (!path_exists(json) && !here && x->base) {        // an adapter without: its base's
        free(json), free(inside);
        json = xprintf("%s/tokenizer.json", x->base), inside = xprintf("%s/", x->base);
    }
    free(here);
    char *ours = path_exists(json) ? NULL : tokenizer_find(inside);
    if (!path_exists(json) && !ours && x->run) ours = load_run_tokenizer(x->run);
    if (ours) {
        const char *slash = strrchr(ours, '/');
        free(json);
        json = xprintf("%.*stokenizer.json", slash ? (int)(slash + 1 - ours) : 0, ours);
    }
    free(inside);
    if (write_is_json(json)) {
        free(ours);
        return json;
    }
    free(json);
    return ours;
}

// Keeps the file for our tools if it is next to the tokenizer.json.
static inline void write_keep_ours(ModelOut *x, const char *json) {
    char *beside = xprintf("%.*s/", (int)(strrchr(json, '/') - json), json),
         *path = tokenizer_find(beside);
    if (path)
        x->ours = write_read(path),
        x->ours_name = x->ours.s[0] == '{' ? "vocab.json" : "tokenizer.bin";
    free(beside), free(path);
}

static inline void write_tokenizer(ModelOut *x) {
    char *path = write_find_tokenizer(x), *eot;
    if (!path) {
        warn("found no tokenizer for %s: the output has none\n  hint: --tokenizer FILE", x->from);
        return;
    }
    eot = write_is_json(path) ? write_take_json(x, path) : write_make_json(x, path);
    if (!x->ours.n && !*x->given) write_keep_ours(x, path);
    tokenizer_json_config(&x->tokenizer_config, x->config.T, eot);
    free(eot), free(path);
}

// ---- The directory ----
// The end-of-text token that config.json names, or -1.
static inline int write_eot(const char *dir, int V) {
    char *path = xprintf("%s/config.json", dir);
    FileMap map;
    Json doc;
    int64_t eot = -1;
    if (path_is_directory(dir) && !file_map(&map, path)) {
        if (!json_parse(&doc, map.data, map.size)) {
            if (!json_int64(&doc, json_get(&doc, 0, "eos_token_id"), &eot) || eot < 0 || eot >= V)
                eot = -1;
            json_free(&doc);
        }
        file_unmap(&map);
    }
    free(path);
    return (int)eot;
}

static const char *const write_files[] = {"model.safetensors",
                                          "config.json",
                                          "generation_config.json",
                                          "tokenizer.json",
                                          "tokenizer_config.json",
                                          "tokenizer.bin",
                                          "vocab.json",
                                          "prune.json",
                                          LORA_MODEL,
                                          LORA_CONFIG};
enum { N_WRITE_FILES = sizeof write_files / sizeof write_files[0] };

// Removes what a tool left under its temporary name: only files of these names.
static inline void write_clean(const char *temporary) {
    for (int i = 0; path_is_directory(temporary) && i < N_WRITE_FILES; i++) {
        char *path = xprintf("%s/%s", temporary, write_files[i]);
        unlink(path);
        free(path);
    }
    if (path_exists(temporary) &&
        (path_is_directory(temporary) ? rmdir(temporary) : unlink(temporary)))
        die("cannot remove %s: %s", temporary, strerror(errno));
}

static inline void write_text(const char *dir, const char *name, const Text *t) {
    char *path = xprintf("%s/%s", dir, name);
    FILE *f = file_open(path, "wb");
    file_write(f, path, t->s, t->n);
    file_sync_close(f, path);
    free(path);
}

static inline void write_tokenizer_files(const ModelOut *x, const char *dir) {
    if (x->tokenizer.n) write_text(dir, "tokenizer.json", &x->tokenizer);
    if (x->tokenizer.n) write_text(dir, "tokenizer_config.json", &x->tokenizer_config);
    if (x->ours.n) write_text(dir, x->ours_name, &x->ours);
}

// Writes the directory `temporary`. Returns NULL, or from malloc what is wrong; then the caller
// removes it with write_clean.
static inline char *write_huggingface(ModelOut *x, const char *temporary) {
    const GptConfig *c = &x->config;
    CheckpointState s;
    Text config = {NULL, 0, 0}, generation = {NULL, 0, 0};
    char *weights = xprintf("%s/model.safetensors", temporary);
    memset(&s, 0, sizeof s);
    s.eot = x->eot;
    s.eval_scale = (double *)xcalloc((size_t)(BRANCHES * c->L), sizeof *s.eval_scale);
    // already applied to the weights
    for (int i = 0; i < BRANCHES * c->L; i++) s.eval_scale[i] = 1;
    directory_make(temporary);
    char *error = write_safetensors(x, weights);
    if (!error) {
        checkpoint_config_json(&config, c, &s, x->to->torch);
        write_text(temporary, "config.json", &config);
        text_printf(&generation, "{\n");
        if (x->eot >= 0)
            text_printf(&generation, "  \"bos_token_id\": %d,\n  \"eos_token_id\": %d,\n", x->eot,
                        x->eot);
        text_printf(&generation, "  \"_from_model_config\": true\n}\n");
        write_text(temporary, "generation_config.json", &generation);
        write_tokenizer_files(x, temporary);
        directory_sync(temporary);
    }
    text_free(&config), text_free(&generation);
    free(weights), free(s.eval_scale);
    return error;
}

// "a/b" -> "a/.b.tmp": on the same disk, so that a rename moves it into place. Creates a, or uses
// ".". From malloc.
static inline char *write_temporary(const char *out, char **parent) {
    char *name = xstrdup(out);
    for (size_t n = strlen(name); n > 1 && name[n - 1] == '/'; n--) name[n - 1] = 0;
    char *slash = strrchr(name, '/');
    *parent = slash ? xprintf("%.*s", slash > name ? (int)(slash - name) : 1, name) : xstrdup(".");
    char *temporary = xprintf("%s/.%s.tmp", *parent, slash ? slash + 1 : name);
    free(name);
    return temporary;
}

// Moves the complete directory from its temporary name to `out`.
static inline void write_commit(const char *temporary, const char *out, const char *parent) {
    if (path_exists(out)) {
        write_clean(temporary);
        die("%s was created meanwhile\n  hint: choose another --out; nothing is overwritten", out);
    }
    file_rename(temporary, out);
    directory_sync(parent);
}

#endif
