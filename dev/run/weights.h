// weights.h: GPT-2 weights behind one interface, in the forms in which they are published:
//
//     DIR/model.safetensors               one file, ours or Hugging Face's
//     DIR/model.safetensors.index.json    several files:
//                                         {"weight_map": {"wte.weight": "model-1.safetensors",
//                                             ...}}
//     FILE                                an llm.c model
//     DIR/adapter_model.safetensors       an adapter (lora.h): the weights of its base, with the
//                                         adapter merged into them unless the reader has adapters
//
// Tensor names may have the prefix "transformer."; dtypes are F64, F32, F16 or BF16.
#ifndef WEIGHTS_H
#define WEIGHTS_H

#include "../files/files.h"
#include "../files/llmc.h"
#include "../files/safetensors.h"
#include "../model/gpt.h"
#include "lora.h"

// ---- Which file contains which tensor ----

typedef struct { char *tensor, *name; int file; } WeightsPlace;

typedef struct {
    int n, files;
    WeightsPlace *place;                                 // (n) in ascending order of tensor
    char **file;                                         // (files) unique names; owned by `place`
    char error[256];
} WeightsIndex;

static inline void weights_index_free(WeightsIndex *x) {
    for (int i = 0; i < x->n; i++) free(x->place[i].tensor), free(x->place[i].name);
    free(x->place), free(x->file);
    x->place = NULL, x->file = NULL;
    x->n = x->files = 0;
}

static inline int weights_by_tensor(const void *a, const void *b) {
    return strcmp(((const WeightsPlace *)a)->tensor, ((const WeightsPlace *)b)->tensor);
}

static inline int weights_by_name(const void *a, const void *b) {
    return strcmp(((const WeightsPlace *)a)->name, ((const WeightsPlace *)b)->name);
}

// Only a file in the same directory is accepted: an index must not choose what else is read.
static inline int weights_name_is_plain(const char *name) {
    const size_t n = strlen(name), tail = strlen(".safetensors");
    return n > tail && n < 256 && *name != '.' && !strpbrk(name, "/\\") &&
        !strcmp(name + n - tail, ".safetensors");
}

static inline const char *weights_index_fail(WeightsIndex *x, const char *what, const char *name) {
    Text quoted = {NULL, 0, 0};
    json_write_string(&quoted, name);
    snprintf(x->error, sizeof x->error, "%s: %.120s", what, quoted.s);
    text_free(&quoted);
    return x->error;
}

static inline const char *weights_index_read(WeightsIndex *x, const Json *doc) {
    const int map = json_get(doc, 0, "weight_map");
    if (json_type(doc, map) != JSON_OBJECT || !json_count(doc, map))
        return "\"weight_map\" must name a file for each tensor";
    x->place = (WeightsPlace *)xcalloc((size_t)json_count(doc, map), sizeof *x->place);
    x->file = (char **)xcalloc((size_t)json_count(doc, map), sizeof *x->file);
    for (int k = json_first(doc, map); k >= 0; k = json_next(doc, k)) {
        WeightsPlace *place = &x->place[x->n++];
        place->tensor = json_string(doc, k, NULL);
        place->name = json_string(doc, k + 1, NULL);
        if (!place->tensor) return "a tensor's name contains a NUL";
        if (!place->name)
            return weights_index_fail(x, "a tensor's file must be a string", place->tensor);
        if (!weights_name_is_plain(place->name))
            return weights_index_fail(x, "not the name of a .safetensors file in the same "
                                      "directory", place->name);
    }
    qsort(x->place, (size_t)x->n, sizeof *x->place, weights_by_name);
    for (int i = 0; i < x->n; i++) {
        if (!i || weights_by_name(&x->place[i - 1], &x->place[i]))
            x->file[x->files++] = x->place[i].name;
        x->place[i].file = x->files - 1;
    }
    qsort(x->place, (size_t)x->n, sizeof *x->place, weights_by_tensor);
    for (int i = 1; i < x->n; i++)
        if (!weights_by_tensor(&x->place[i - 1], &x->place[i]))
            return weights_index_fail(x, "the tensor is there twice", x->place[i].tensor);
    return NULL;
}

// Parses a model.safetensors.index.json of `size` bytes at mem and keeps no pointer into it.
// Returns NULL, or what is wrong (the message may be stored in *x; nothing needs to be freed).
static inline const char *weights_index_parse(WeightsIndex *x, const void *mem, size_t size) {
    Json doc;
    memset(x, 0, sizeof *x);
    const char *error = json_parse(&doc, mem, size);
    if (error) {
        snprintf(x->error, sizeof x->error, "no valid JSON: %s", error);
        return x->error;
    }
    error = weights_index_read(x, &doc);
    json_free(&doc);
    if (error) weights_index_free(x);
    return error;
}

// The entry of that tensor, or NULL.
static inline const WeightsPlace *weights_index_find(const WeightsIndex *x, const char *tensor) {
    WeightsPlace key = {(char *)(uintptr_t)tensor, NULL, 0};
    return (const WeightsPlace *)(x->n ? bsearch(&key, x->place, (size_t)x->n, sizeof key,
                                                 weights_by_tensor) : NULL);
}

// ---- Opening ----

typedef struct { char *path; FileMap map; Safetensors tensors; } WeightsFile;

typedef struct {
    char *path;                                          // for messages
    int files;
    WeightsFile *file;                                   // (files)
    WeightsIndex index;                                  // empty if one file holds everything
    LlmcModel llmc;                                      // data NULL: safetensors
    const char *prefix;                                  // "transformer." or ""
    LoraConfig lora;                                     // rank 0: no adapter
    WeightsFile adapter;
} Weights;

static inline void weights_map_file(WeightsFile *f, char *path, const char *hint) {
    f->path = path;
    const char *error = file_map(&f->map, path);
    if (error) die("cannot read %s: %s\n  hint: %s", path, error, hint);
    if ((error = safetensors_parse(&f->tensors, f->map.data, f->map.size)))
        die("%s: %s", path, error);
}

static inline void weights_add_file(Weights *w, char *path, const char *hint) {
    weights_map_file(&w->file[w->files++], path, hint);
}

// Opens one safetensors file.
static inline void weights_open_file(Weights *w, const char *path, const char *hint) {
    memset(w, 0, sizeof *w);
    w->path = xstrdup(path);
    w->prefix = "";
    w->file = (WeightsFile *)xcalloc(1, sizeof *w->file);
    weights_add_file(w, xstrdup(path), hint);
}

static inline void weights_open_llmc(Weights *w) {
    w->file = (WeightsFile *)xcalloc(1, sizeof *w->file);
    w->file[w->files++].path = xstrdup(w->path);
    const char *error = file_map(&w->file->map, w->path);
    if (error)
        die("cannot read %s: %s\n  hint: name a checkpoint directory or an llm.c model", w->path,
            error);
    if ((error = llmc_model_parse(&w->llmc, w->file->map.data, w->file->map.size)))
        die("%s: %s\n  hint: a file must be an llm.c model; our and Hugging Face's checkpoints are "
            "directories", w->path, error);
}

static inline void weights_open_shards(Weights *w, const char *index) {
    FileMap map;
    const char *error = file_map(&map, index);
    if (error) die("cannot read %s: %s", index, error);
    if ((error = weights_index_parse(&w->index, map.data, map.size))) die("%s: %s", index, error);
    file_unmap(&map);
    w->file = (WeightsFile *)xcalloc((size_t)w->index.files, sizeof *w->file);
    for (int i = 0; i < w->index.files; i++)
        weights_add_file(w, xprintf("%s/%s", w->path, w->index.file[i]),
                         "model.safetensors.index.json names it: was the model downloaded "
                         "completely?");
}

// The tensor of that full name, or NULL.
static inline const SafetensorsEntry *weights_find(const Weights *w, const char *name) {
    if (!w->index.n) return safetensors_find(&w->file[0].tensors, name);
    const WeightsPlace *place = weights_index_find(&w->index, name);
    const SafetensorsEntry *t = place ? safetensors_find(&w->file[place->file].tensors, name)
        : NULL;
    if (place && !t)
        die("%s has no tensor %s\n  hint: model.safetensors.index.json lists it there",
            w->file[place->file].path, name);
    return t;
}

// Opens the weights of a directory that is no adapter, or of an llm.c file.
static inline void weights_open_base(Weights *w, const char *path) {
    char *one = xprintf("%s/model.safetensors", path), *index = xprintf("%s.index.json", one);
    char *pickle = xprintf("%s/pytorch_model.bin", path);
    memset(w, 0, sizeof *w);
    w->path = xstrdup(path);
    w->prefix = "";
    if (!path_is_directory(path)) weights_open_llmc(w);
    else if (!path_exists(one) && path_exists(index)) weights_open_shards(w, index);
    else {
        w->file = (WeightsFile *)xcalloc(1, sizeof *w->file);
        weights_add_file(w, xstrdup(one), path_exists(pickle)
                         ? "pytorch_model.bin is not supported: load it in transformers and "
                         "save_pretrained() as safetensors"
                         : "a checkpoint is a directory with config.json and model.safetensors");
    }
    if (!w->llmc.data && (weights_find(w, "transformer.wte.weight") ||
                          weights_find(w, "transformer.wpe.weight")))
        w->prefix = "transformer.";
    free(one), free(index), free(pickle);
}

// Opens the weights of a checkpoint: a directory, or a file of llm.c. Dies with the reason. End
// with weights_close.
static inline void weights_open(Weights *w, const char *path) {
    LoraConfig lora;
    if (!lora_is_adapter(path)) {
        weights_open_base(w, path);
        return;
    }
    lora_open(&lora, path);
    weights_open_base(w, lora.base);
    w->lora = lora;
    weights_map_file(&w->adapter, xprintf("%s/" LORA_MODEL, path),
                     "an adapter is a directory with adapter_config.json and "
                     "adapter_model.safetensors");
}

static inline void weights_close(Weights *w) {
    if (w->lora.rank) {
        safetensors_free(&w->adapter.tensors);
        file_unmap(&w->adapter.map);
        free(w->adapter.path), free(w->lora.base);
    }
    for (int i = 0; i < w->files; i++) {
        safetensors_free(&w->file[i].tensors);
        file_unmap(&w->file[i].map);
        free(w->file[i].path);
    }
    weights_index_free(&w->index);
    free(w->file), free(w->path);
}

// ---- Reading ----

// The name of the head, which is the token embedding: when saving tied tensors, safetensors may
// have kept this one of their two names.
#define WEIGHTS_HEAD "lm_head.weight"

// The tensor "<prefix><name>" of one layer of a parameter, from safetensors. Dies if it is missing
// or has the wrong shape.
static inline const SafetensorsEntry *weights_tensor(const Weights *w, const GptConfig *c,
                                                     const char *prefix, int param, int layer) {
    int64_t shape[2];
    const int dims = gpt_param_shape(c, param, shape);
    char *name = gpt_param_name(param, layer), *full = xprintf("%s%s", prefix, name);
    const SafetensorsEntry *t = weights_find(w, full);
    if (!t && param == P_wte && prefix == w->prefix) t = weights_find(w, WEIGHTS_HEAD);
    if (!t)
        die("%s has no tensor %s\n  hint: is it a GPT-2 of the sizes in config.json?", w->path,
            full);
    if (t->ndim != dims || memcmp(t->shape, shape, (size_t)dims * sizeof *shape))
        die("%s: %s does not have the shape given by config.json", w->path, full);
    free(name);
    free(full);
    return t;
}

// Dies if there is a head that differs from the token embedding: the model was trained untied,
// whatever its config.json says.
static inline void weights_check_head(const Weights *w, const GptConfig *c) {
    const SafetensorsEntry *wte = weights_tensor(w, c, w->prefix, P_wte, 0),
        *head = weights_find(w, WEIGHTS_HEAD);
    if (!head || head == wte) return;
    int same = head->ndim == wte->ndim && head->count == wte->count &&
        head->dtype <= SAFETENSORS_BF16 &&
               wte->dtype <= SAFETENSORS_BF16;
    if (same && (head->dtype != wte->dtype || memcmp(head->data, wte->data, wte->bytes)))
        for (size_t i = 0; same && i < wte->count; i++)
            same = safetensors_real(head, i) == safetensors_real(wte, i);
    if (!same)
        die("%s: " WEIGHTS_HEAD " differs from %s: this model has an untied head\n"
            "  hint: only heads tied to the token embedding are supported; remove a stray head "
            "from the file", w->path, wte->name);
}

// The sizes of the adapter's tensors, where the base has those of c.
static inline GptConfig weights_adapter_config(const Weights *w, const GptConfig *c) {
    GptConfig a = *c;
    a.lora = w->lora.rank, a.lora_targets = w->lora.targets, a.lora_norms = w->lora.norms;
    return a;
}

// The adapter's tensor, named as peft names it, of AutoModelForCausalLM or of GPT2Model. NULL: it
// has none.
static inline const SafetensorsEntry *weights_adapter_tensor(const Weights *w, const GptConfig *c,
                                                             int param, int layer) {
    const GptConfig a = weights_adapter_config(w, c);
    int64_t shape[2];
    if (!w->lora.rank || gpt_param[param].group == GROUP_BASE ||
        layer >= gpt_param_layers(&a, param) ||
        !gpt_param_trains(&a, param, layer, 0))
        return NULL;
    const int dims = gpt_param_shape(&a, param, shape);
    char *name = gpt_param_name(param, layer), *full = xprintf(LORA_PREFIX "%s", name);
    char *bare = xprintf("base_model.model.%s", name);
    const SafetensorsEntry *t = safetensors_find(&w->adapter.tensors, full);
    if (!t) t = safetensors_find(&w->adapter.tensors, bare);
    if (!t)
        die("%s has no tensor %s\n  hint: adapter_config.json says that it has; is the base the "
            "one it was trained on?",
                w->adapter.path, full);
    if (t->ndim != dims || memcmp(t->shape, shape, (size_t)dims * sizeof *shape))
        die("%s: %s has another shape than r and the base say", w->adapter.path, t->name);
    free(name), free(full), free(bare);
    return t;
}

// Dies unless the adapter has what its configuration says, and nothing else, all of it finite.
static inline void weights_check_adapter(const Weights *w, const GptConfig *c) {
    const GptConfig a = weights_adapter_config(w, c);
    int known = 0;
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(&a, p); l++) {
            const SafetensorsEntry *t = weights_adapter_tensor(w, c, p, l);
            known += t != NULL;
            for (size_t i = 0; t && t->dtype <= SAFETENSORS_BF16 && i < t->count; i++)
                if (!isfinite((real)safetensors_real(t, i)))
                    die("%s: %s has a number that is not finite", w->adapter.path, t->name);
        }
    if (known != w->adapter.tensors.n)
        die("%s has %d tensors, but only %d are of the targets in adapter_config.json\n"
            "  hint: let peft merge it: merge_and_unload(), then save_pretrained()",
            w->adapter.path, w->adapter.tensors.n, known);
}

// Dies unless a model of sizes c has all its parameters, before memory is allocated for sizes that
// only config.json claims.
static inline void weights_check(const Weights *w, const GptConfig *c) {
    if (w->lora.rank) weights_check_adapter(w, c);
    if (w->llmc.data) return;                            // its parser has checked the size
    weights_check_head(w, c);
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(c, p); l++) weights_tensor(w, c, w->prefix, p, l);
}

// Numbers of the adapter's tensor, which exists.
static inline void weights_read_adapter(const Weights *w, const GptConfig *c, int param, int layer,
                                        real *host) {
    const SafetensorsEntry *t = weights_adapter_tensor(w, c, param, layer);
    const char *error = safetensors_to_real(t, host);
    if (error) die("%s: %s: %s", w->adapter.path, t->name, error);
}

// host (in,out) += alpha / r A^T B^T of the adapter of that weight, summed in double.
static inline void weights_merge(const Weights *w, const GptConfig *c, int param, int layer,
                                 real *host) {
    const GptConfig a = weights_adapter_config(w, c);
    const int A = gpt_adapter_of(&a, param), R = a.lora;
    if (A < 0) return;
    const size_t in = (size_t)gpt_param_rows(c, param), out = (size_t)gpt_param_cols(c, param);
    real *down = (real *)xcalloc(gpt_param_size(&a, A), sizeof *down),
        *up = (real *)xcalloc(gpt_param_size(&a, A + 1), sizeof *up);
    weights_read_adapter(w, c, A, layer, down), weights_read_adapter(w, c, A + 1, layer, up);
#ifdef _OPENMP
#pragma omp parallel for
#endif
    for (size_t i = 0; i < in; i++)
        for (size_t j = 0; j < out; j++) {
            double sum = 0;
            for (int k = 0; k < R; k++)
                sum += (double)down[(size_t)k * in + i] * (double)up[j * (size_t)R + (size_t)k];
            host[i * out + j] = (real)((double)host[i * out + j] + w->lora.alpha / R * sum);
        }
    free(down), free(up);
}

// Reads one layer of a parameter of a model of sizes c, gpt_param_size() elements, from the tensor
// "<prefix><its name>". With w->prefix, of an adapter: its own tensor if it has one, else the
// base's with the adapter merged into it, unless c has adapters. Dies if it is missing or has the
// wrong shape.
static inline void weights_read(const Weights *w, const GptConfig *c, const char *prefix, int param,
                                int layer, real *host) {
    if (prefix == w->prefix && weights_adapter_tensor(w, c, param, layer)) {
        weights_read_adapter(w, c, param, layer, host);
        return;
    }
    if (w->llmc.data) {
        const GptConfig *have = &w->llmc.config;
        CHECK(c->V == have->V && c->T == have->T && c->L == have->L && c->C == have->C,
              "%s has other sizes", w->path);
        llmc_model_read(&w->llmc, param, layer, host);
        if (prefix == w->prefix && w->lora.rank && !c->lora)
            weights_merge(w, c, param, layer, host);
        return;
    }
    const SafetensorsEntry *t = weights_tensor(w, c, prefix, param, layer);
    const char *error = safetensors_to_real(t, host);
    if (error) die("%s: %s: %s", w->path, t->name, error);
    if (prefix == w->prefix && w->lora.rank && !c->lora) weights_merge(w, c, param, layer, host);
}

#endif
