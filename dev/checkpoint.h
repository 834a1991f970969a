// checkpoint.h: a run's state as a directory, whole or absent, and weights that others can open.
//
//     OUT/step_00001000/model.safetensors      weights, Hugging Face's names and layouts
//                       config.json            GPT-2's configuration, as transformers reads it
//                       optimizer.safetensors  AdamW's moments "m.NAME", "v.NAME", and the step counts "adamw_steps"
//                       trainer.json           step, tokens, options, and the SHA-256 of the other files and of itself
//     OUT/latest -> step_00001000
//
// A checkpoint is written under a temporary name, synced and renamed; `latest` moves last.
#ifndef CHECKPOINT_H
#define CHECKPOINT_H

#include "engine.h"
#include "json.h"
#include "safetensors.h"
#include "sha256.h"
#include "weights.h"
#include <dirent.h>

typedef struct {
    int64_t step, tokens;                                // optimizer steps done, tokens trained on
    int64_t *adamw_steps;                                // (2L+1) as UpdateArgs.t counts them
    double *eval_scale;                                  // (2L) factors of the branches in evaluation; see drop_path.h
    int tied;                                            // how those factors apply: DropPlan.tied
    int eot;                                             // the end-of-text token, or -1
    const char *options;                                 // the run's options, as config.txt
    const char *tokenizer_sha256;                        // of the shards' manifest; NULL or "" where there is none
} CheckpointState;

enum { CHECKPOINT_FILES = 3 };
static const char *const checkpoint_file[CHECKPOINT_FILES] = {"model.safetensors", "config.json", "optimizer.safetensors"};

// ---- Writing ----

typedef struct { char hex[CHECKPOINT_FILES][SHA256_HEX]; } CheckpointSums;

// One slot's tensors, "<prefix><name>", in the order of the table.
static inline void checkpoint_declare(SafetensorsWriter *w, const GptConfig *c, const char *prefix) {
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            int64_t shape[2];
            const int dims = gpt_param_shape(c, p, shape);
            char *name = gpt_param_name(p, l), *full = xprintf("%s%s", prefix, name);
            safetensors_declare(w, full, REAL_DTYPE, dims, shape);
            free(name);
            free(full);
        }
}

static inline void checkpoint_append(SafetensorsWriter *w, const Engine *e, Model *m, const GptConfig *c, Slot slot) {
    for (int p = 0; p < N_PARAMS; p++) {
        const size_t n = gpt_param_size(c, p);
        real *host = (real *)xcalloc(n, sizeof *host);
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            e->read(m, slot, p, l, host);
            safetensors_append(w, host, n * sizeof *host);
        }
        free(host);
    }
}

static inline void checkpoint_write_model(const char *path, char hex[SHA256_HEX], const Engine *e, Model *m,
                                          const GptConfig *c) {
    SafetensorsWriter w;
    FILE *f = file_open(path, "wb");
    safetensors_writer_init(&w);
    checkpoint_declare(&w, c, "transformer.");
    safetensors_begin(&w, f, path);
    checkpoint_append(&w, e, m, c, SLOT_PARAM);
    safetensors_end(&w);
    sha256_final(&w.sha, hex);
    file_sync_close(f, path);
}

static inline void checkpoint_write_optimizer(const char *path, char hex[SHA256_HEX], const Engine *e, Model *m,
                                              const GptConfig *c, const CheckpointState *s) {
    SafetensorsWriter w;
    FILE *f = file_open(path, "wb");
    const int64_t branches = BRANCHES * c->L + 1;
    safetensors_writer_init(&w);
    safetensors_declare(&w, "adamw_steps", "I64", 1, &branches);
    checkpoint_declare(&w, c, "m.");
    checkpoint_declare(&w, c, "v.");
    safetensors_begin(&w, f, path);
    safetensors_append(&w, s->adamw_steps, (size_t)branches * sizeof *s->adamw_steps);
    checkpoint_append(&w, e, m, c, SLOT_M);
    checkpoint_append(&w, e, m, c, SLOT_V);
    safetensors_end(&w);
    sha256_final(&w.sha, hex);
    file_sync_close(f, path);
}

static inline void checkpoint_write_text(const char *path, char hex[SHA256_HEX], const Text *t) {
    FILE *f = file_open(path, "wb");
    file_write(f, path, t->s, t->n);
    file_sync_close(f, path);
    sha256_hex(hex, t->s, t->n);
}

// GPT-2's configuration in transformers' words; the factors of survival scaling, where not 1, in ours.
// dtype: "float32", what the weights are stored in.
static inline void checkpoint_config_json(Text *t, const GptConfig *c, const CheckpointState *s, const char *dtype) {
    int scaled = 0;
    for (int i = 0; i < BRANCHES * c->L; i++) scaled |= s->eval_scale[i] != 1;
    text_printf(t, "{\n  \"architectures\": [\"GPT2LMHeadModel\"],\n  \"model_type\": \"gpt2\",\n"
                "  \"vocab_size\": %d,\n  \"n_positions\": %d,\n  \"n_embd\": %d,\n  \"n_layer\": %d,\n  \"n_head\": %d,\n"
                "  \"activation_function\": \"gelu_new\",\n  \"layer_norm_epsilon\": 1e-05,\n  \"initializer_range\": 0.02,\n"
                "  \"resid_pdrop\": 0.0,\n  \"embd_pdrop\": 0.0,\n  \"attn_pdrop\": 0.0,\n  \"tie_word_embeddings\": true,\n",
                c->V, c->T, c->C, c->L, c->NH);
    char eot[16] = "null";
    if (s->eot >= 0) snprintf(eot, sizeof eot, "%d", s->eot);
    text_printf(t, "  \"bos_token_id\": %s,\n  \"eos_token_id\": %s,\n  \"torch_dtype\": \"%s\"", eot, eot,
                dtype);
    if (s->tokenizer_sha256 && *s->tokenizer_sha256)
        text_printf(t, ",\n  \"tokenizer_sha256\": \"%s\"", s->tokenizer_sha256);
    for (int i = 0; scaled && i < BRANCHES * c->L; i++) {
        text_printf(t, i ? ", " : ",\n  \"drop_path_eval_scale\": [");
        json_write_number(t, s->eval_scale[i]);
    }
    text_printf(t, scaled ? "],\n  \"drop_path_tied\": %s\n}\n" : "\n}\n", s->tied ? "true" : "false");
}

#define CHECKPOINT_SELF "  \"sha256\": \""               // trainer.json's own sum: of every byte before this line

static inline void checkpoint_trainer_json(Text *t, const CheckpointState *s, const CheckpointSums *sums) {
    char hex[SHA256_HEX];
    text_printf(t, "{\n  \"format\": \"droppath.c checkpoint 1\",\n  \"step\": %lld,\n  \"tokens\": %lld,\n  \"options\": ",
                (long long)s->step, (long long)s->tokens);
    json_write_string(t, s->options);
    text_printf(t, ",\n  \"files\": {");
    for (int i = 0; i < CHECKPOINT_FILES; i++)
        text_printf(t, "%s\n    \"%s\": \"%s\"", i ? "," : "", checkpoint_file[i], sums->hex[i]);
    text_printf(t, "\n  },\n");
    sha256_hex(hex, t->s, t->n);
    text_printf(t, CHECKPOINT_SELF "%s\"\n}\n", hex);
}

// Removes the files of a checkpoint and then its directory; anything else in it stays, and so does it.
static inline void checkpoint_remove(const char *dir) {
    for (int i = 0; i <= CHECKPOINT_FILES; i++) {
        char *path = xprintf("%s/%s", dir, i < CHECKPOINT_FILES ? checkpoint_file[i] : "trainer.json");
        if (unlink(path) && errno != ENOENT) warn("cannot remove %s: %s", path, strerror(errno));
        free(path);
    }
    if (rmdir(dir) && errno != ENOENT) warn("cannot remove %s: %s", dir, strerror(errno));
}

// What the other ranks do while rank 0 writes, if each has a share of what is read: the same reads in the same order.
static inline void checkpoint_attend(const Engine *e, Model *m, const GptConfig *c) {
    static const Slot slots[3] = {SLOT_PARAM, SLOT_M, SLOT_V};
    for (int s = 0; s < 3; s++)
        for (int p = 0; p < N_PARAMS; p++) {
            real *host = (real *)xcalloc(gpt_param_size(c, p), sizeof *host);
            for (int l = 0; l < gpt_param_layers(c, p); l++) e->read(m, slots[s], p, l, host);
            free(host);
        }
}

// Writes OUT/step_NNNNNNNN whole, or dies and leaves what was there. An older one of that step gives way.
static inline void checkpoint_save(const char *out, const Engine *e, Model *m, const GptConfig *c, const CheckpointState *s) {
    char *name = xprintf("step_%08lld", (long long)s->step), *final = xprintf("%s/%s", out, name);
    char *temporary = xprintf("%s/.%s.tmp", out, name), *old = xprintf("%s/.%s.old", out, name);
    char *link = xprintf("%s/.latest.tmp", out), *latest = xprintf("%s/latest", out), *path[CHECKPOINT_FILES + 1];
    CheckpointSums sums;
    Text config = {NULL, 0, 0}, trainer = {NULL, 0, 0};
    char unused[SHA256_HEX];
    if (path_exists(temporary)) checkpoint_remove(temporary);
    if (path_exists(old)) checkpoint_remove(old);
    directory_make(temporary);
    for (int i = 0; i <= CHECKPOINT_FILES; i++)
        path[i] = xprintf("%s/%s", temporary, i < CHECKPOINT_FILES ? checkpoint_file[i] : "trainer.json");
    checkpoint_write_model(path[0], sums.hex[0], e, m, c);
    checkpoint_config_json(&config, c, s, sizeof(real) == 4 ? "float32" : "float64");
    checkpoint_write_text(path[1], sums.hex[1], &config);
    checkpoint_write_optimizer(path[2], sums.hex[2], e, m, c, s);
    checkpoint_trainer_json(&trainer, s, &sums);
    checkpoint_write_text(path[3], unused, &trainer);
    directory_sync(temporary);
    if (path_exists(final)) file_rename(final, old);
    file_rename(temporary, final);
    directory_sync(out);
    unlink(link);
    if (symlink(name, link)) die("cannot make the link %s: %s", link, strerror(errno));
    file_rename(link, latest);
    directory_sync(out);
    if (path_exists(old)) checkpoint_remove(old);
    text_free(&config);
    text_free(&trainer);
    for (int i = 0; i <= CHECKPOINT_FILES; i++) free(path[i]);
    free(name), free(final), free(temporary), free(old), free(link), free(latest);
}

// ---- Finding ----

typedef struct { int64_t *step; int n; } CheckpointList;

static inline int checkpoint_newer(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

// The steps of all OUT/step_*, newest first, from malloc; none when OUT does not exist.
static inline CheckpointList checkpoint_list(const char *out) {
    CheckpointList list = {NULL, 0};
    DIR *d = opendir(out);
    if (!d) return list;
    for (struct dirent *entry; (entry = readdir(d)) != NULL;) {
        char *end;
        if (strncmp(entry->d_name, "step_", 5)) continue;
        long long step = strtoll(entry->d_name + 5, &end, 10);
        if (end < entry->d_name + 13 || *end || step < 0) continue;
        list.step = (int64_t *)xrealloc(list.step, (size_t)list.n + 1, sizeof *list.step);
        list.step[list.n++] = step;
    }
    closedir(d);
    if (list.n) qsort(list.step, (size_t)list.n, sizeof *list.step, checkpoint_newer);
    return list;
}

static inline char *checkpoint_path(const char *out, int64_t step) { return xprintf("%s/step_%08lld", out, (long long)step); }

// Removes all but the newest `keep` checkpoints of OUT; 0 keeps all.
static inline void checkpoint_prune(const char *out, int64_t keep) {
    CheckpointList list = checkpoint_list(out);
    for (int i = 0; keep > 0 && i < list.n; i++)
        if (i >= keep) {
            char *path = checkpoint_path(out, list.step[i]);
            checkpoint_remove(path);
            free(path);
        }
    free(list.step);
}

// ---- Checking ----

// Parses trainer.json against its own sum. Returns NULL or what is wrong; doc is to be freed only after NULL.
static inline const char *checkpoint_parse_trainer(Json *doc, const void *mem, size_t size) {
    const char *text = (const char *)mem;
    const size_t name = strlen(CHECKPOINT_SELF), tail = name + SHA256_HEX - 1 + strlen("\"\n}\n");
    char hex[SHA256_HEX];
    if (size < tail || memcmp(text + size - tail, CHECKPOINT_SELF, name)) return "it is cut short or not ours";
    sha256_hex(hex, text, size - tail);
    if (memcmp(hex, text + size - tail + name, SHA256_HEX - 1)) return "its contents do not match its SHA-256";
    if (json_parse(doc, text, size)) return "it is not JSON";
    return NULL;
}

// Checks every file of a checkpoint of ours against its sum. Returns NULL or, from malloc, what is wrong.
static inline char *checkpoint_verify(const char *dir) {
    char *path = xprintf("%s/trainer.json", dir), *wrong = NULL, hex[SHA256_HEX];
    FileMap map, file;
    Json doc;
    const char *error = file_map(&map, path);
    if (!error && (error = checkpoint_parse_trainer(&doc, map.data, map.size))) file_unmap(&map);
    if (error) wrong = xprintf("%s: %s", path, error);
    free(path);
    if (wrong) return wrong;
    for (int i = 0; i < CHECKPOINT_FILES && !wrong; i++) {
        path = xprintf("%s/%s", dir, checkpoint_file[i]);
        error = file_map(&file, path);
        if (!error) {
            sha256_hex(hex, file.data, file.size);
            file_unmap(&file);
            if (!json_equals(&doc, json_get(&doc, json_get(&doc, 0, "files"), checkpoint_file[i]), hex))
                error = "its contents do not match the SHA-256 in trainer.json";
        }
        if (error) wrong = xprintf("%s: %s", path, error);
        free(path);
    }
    json_free(&doc);
    file_unmap(&map);
    return wrong;
}

// The newest checkpoint of OUT that is whole, from malloc, or NULL when there is none at all. Damaged ones are named;
// dies when all are damaged.
static inline char *checkpoint_latest(const char *out) {
    CheckpointList list = checkpoint_list(out);
    char *found = NULL;
    for (int i = 0; i < list.n && !found; i++) {
        char *path = checkpoint_path(out, list.step[i]), *wrong = checkpoint_verify(path);
        if (!wrong) found = path;
        else {
            warn("this checkpoint is damaged: %s", wrong);
            free(wrong);
            free(path);
        }
    }
    if (list.n && !found) die("all %d checkpoints of %s are damaged\n  hint: start again with another --out", list.n, out);
    free(list.step);
    return found;
}

// ---- Reading ----

static inline int64_t checkpoint_integer(const Json *doc, const char *path, const char *key) {
    int64_t v = 0;
    if (!json_int64(doc, json_get(doc, 0, key), &v)) die("%s: \"%s\" is missing or no integer", path, key);
    return v;
}

// config.json must describe a model that this program computes; a setting that is absent has GPT-2's value.
static inline void checkpoint_check_config(const Json *doc, const char *path) {
    static const struct { const char *key; int type; const char *value; } fixed[] = {
        {"model_type", JSON_STRING, "gpt2"}, {"scale_attn_weights", JSON_TRUE, "true"},
        {"scale_attn_by_inverse_layer_idx", JSON_FALSE, "false"}, {"tie_word_embeddings", JSON_TRUE, "true"}};
    for (size_t i = 0; i < sizeof fixed / sizeof fixed[0]; i++) {
        const int node = json_get(doc, 0, fixed[i].key), text = fixed[i].type == JSON_STRING;
        if (node >= 0 && (json_type(doc, node) != fixed[i].type || (text && !json_equals(doc, node, fixed[i].value))))
            die("%s: \"%s\" must be %s: this is another kind of model", path, fixed[i].key, fixed[i].value);
    }
    int gelu = json_get(doc, 0, "activation_function");
    if (gelu >= 0 && !json_equals(doc, gelu, "gelu_new") && !json_equals(doc, gelu, "gelu_pytorch_tanh"))
        die("%s: \"activation_function\" must be gelu_new, GPT-2's tanh-GELU", path);
    double eps = 1e-5;
    json_number(doc, json_get(doc, 0, "layer_norm_epsilon"), &eps);
    if (eps != 1e-5) die("%s: \"layer_norm_epsilon\" must be 1e-5", path);
    int64_t inner = 0, channels = 0;
    if (json_int64(doc, json_get(doc, 0, "n_inner"), &inner) && json_int64(doc, json_get(doc, 0, "n_embd"), &channels) &&
        inner != 4 * channels)
        die("%s: \"n_inner\" must be null or 4 times n_embd: this is another kind of model", path);
}

// The sizes of a model of llm.c, which has no factors.
static inline void checkpoint_read_llmc(const char *path, GptConfig *c, double **eval_scale, int *tied) {
    Weights w;
    weights_open(&w, path);
    *c = w.llmc.config;
    weights_close(&w);
    *eval_scale = (double *)xcalloc((size_t)(BRANCHES * c->L), sizeof **eval_scale);
    for (int i = 0; i < BRANCHES * c->L; i++) (*eval_scale)[i] = 1;
    *tied = 0;
}

// The sizes of the model in a checkpoint directory, ours or Hugging Face's, or in a file of llm.c, and how its branches count
// in evaluation: *eval_scale (2L) from malloc, *tied. Dies with the reason when there is none.
static inline void checkpoint_read_config(const char *dir, GptConfig *c, double **eval_scale, int *tied) {
    if (path_exists(dir) && !path_is_directory(dir)) {
        checkpoint_read_llmc(dir, c, eval_scale, tied);
        return;
    }
    char *path = xprintf("%s/config.json", dir);
    FileMap map;
    Json doc;
    const char *error = file_map(&map, path);
    if (error)
        die("cannot read %s: %s\n  hint: a checkpoint is a directory with config.json and model.safetensors", path, error);
    if ((error = json_parse(&doc, map.data, map.size))) die("%s: %s", path, error);
    const char *key[5] = {"vocab_size", "n_positions", "n_layer", "n_head", "n_embd"};
    int *size[5] = {&c->V, &c->T, &c->L, &c->NH, &c->C};
    for (int i = 0; i < 5; i++) {
        int64_t v = checkpoint_integer(&doc, path, key[i]);
        if (v < 1 || v > 1 << 24) die("%s: \"%s\" is %lld", path, key[i], (long long)v);
        *size[i] = (int)v;
    }
    if ((error = gpt_config_error(c))) die("%s: %s", path, error);
    checkpoint_check_config(&doc, path);
    int scale = json_get(&doc, 0, "drop_path_eval_scale"), node = json_first(&doc, scale);
    if (scale >= 0 && json_count(&doc, scale) != BRANCHES * c->L)
        die("%s: \"drop_path_eval_scale\" must have %d numbers", path, BRANCHES * c->L);
    *eval_scale = (double *)xcalloc((size_t)(BRANCHES * c->L), sizeof **eval_scale);
    for (int i = 0; i < BRANCHES * c->L; i++) {
        (*eval_scale)[i] = 1;
        if (scale < 0) continue;
        if (!json_number(&doc, node, &(*eval_scale)[i]) || !((*eval_scale)[i] >= 0 && (*eval_scale)[i] <= 1))
            die("%s: \"drop_path_eval_scale\" must have numbers from 0 to 1", path);
        node = json_next(&doc, node);
    }
    *tied = json_type(&doc, json_get(&doc, 0, "drop_path_tied")) == JSON_TRUE;
    for (int l = 0; *tied && l < c->L; l++)
        if ((*eval_scale)[BRANCHES * l + ATTN] != (*eval_scale)[BRANCHES * l + MLP])
            die("%s: \"drop_path_eval_scale\" of a tied model must be equal in both branches of a layer", path);
    json_free(&doc);
    file_unmap(&map);
    free(path);
}

// One slot of the model, each tensor as "<prefix><name>"; dies when one is missing or misshapen.
static inline void checkpoint_load_slot(const Engine *e, Model *m, const GptConfig *c, Slot slot, const Weights *w,
                                        const char *prefix) {
    for (int p = 0; p < N_PARAMS; p++) {
        real *host = (real *)xcalloc(gpt_param_size(c, p), sizeof *host);
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            weights_read(w, c, prefix, p, l, host);
            e->write(m, slot, p, l, host);
        }
        free(host);
    }
}

// The weights of a checkpoint, in any form of weights.h, into a model of the sizes that checkpoint_read_config gave.
static inline void checkpoint_load_weights(const char *from, const Engine *e, Model *m, const GptConfig *c) {
    Weights w;
    weights_open(&w, from);
    checkpoint_load_slot(e, m, c, SLOT_PARAM, &w, w.prefix);
    weights_close(&w);
}

// All of a checkpoint of ours into the model and s, whose adamw_steps (2L+1) is the caller's; s->options from malloc.
// Dies when a file does not match its sum.
static inline void checkpoint_load(const char *dir, const Engine *e, Model *m, const GptConfig *c, CheckpointState *s) {
    char *wrong = checkpoint_verify(dir), *path = xprintf("%s/trainer.json", dir);
    FileMap map;
    Json doc;
    Weights w;
    if (wrong) die("this checkpoint is damaged: %s\n  hint: --resume without a path takes the latest that is whole", wrong);
    const char *error = file_map(&map, path);
    if (!error) error = checkpoint_parse_trainer(&doc, map.data, map.size);
    if (error) die("%s: %s", path, error);
    s->step = checkpoint_integer(&doc, path, "step");
    s->tokens = checkpoint_integer(&doc, path, "tokens");
    s->options = json_string(&doc, json_get(&doc, 0, "options"), NULL);
    if (!s->options) die("%s: \"options\" is missing", path);
    json_free(&doc);
    file_unmap(&map);
    free(path);

    checkpoint_load_weights(dir, e, m, c);
    path = xprintf("%s/optimizer.safetensors", dir);
    weights_open_file(&w, path, "--init-from takes the weights alone and starts at step 0");
    checkpoint_load_slot(e, m, c, SLOT_M, &w, "m.");
    checkpoint_load_slot(e, m, c, SLOT_V, &w, "v.");
    const SafetensorsEntry *steps = weights_find(&w, "adamw_steps");
    if (!steps || steps->count != (size_t)(BRANCHES * c->L + 1)) die("%s: adamw_steps is missing or has another size", path);
    if ((error = safetensors_to_int64(steps, s->adamw_steps))) die("%s: adamw_steps: %s", path, error);
    weights_close(&w);
    free(path);
    e->resumed(m, s->adamw_steps);
}

#endif
