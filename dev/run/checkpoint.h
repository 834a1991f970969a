// checkpoint.h: a run's state as a directory, complete or absent, with weights that other programs
// can open.
//
//     OUT/step_00001000/model.safetensors      weights, Hugging Face's names and layouts
//                       config.json            GPT-2's configuration, as transformers reads it
//                       optimizer.safetensors  AdamW's moments "m.NAME", "v.NAME", and its step
//                                              counts "adamw_steps"
//                       trainer.json           step, tokens, samples consumed, options, and the
//                                              SHA-256 of the other files and of itself ("sizes"
//                                              and "marks" locate damage in a file)
//                       tokenizer.bin          the run's tokenizer, if any, so that the directory
//                                              is self-contained: ours (or vocab.json), and
//                                              tokenizer.json and tokenizer_config.json for
//                                              transformers
//     OUT/latest -> step_00001000
//
// A run with --lora has adapter_model.safetensors and adapter_config.json instead of the first two,
// which peft opens on the base; trainer.json then names the base and its SHA-256.
//
// A checkpoint is written under a temporary name, synced and renamed; `latest` changes last: see
// checkpoint_try_save.
#ifndef CHECKPOINT_H
#define CHECKPOINT_H

#include "../files/files.h"
#include "../files/json.h"
#include "../files/safetensors.h"
#include "../files/sha256.h"
#include "../files/tokenizer_json.h"
#include "../model/engine.h"
#include "numbers.h"
#include "weights.h"
#include <dirent.h>

typedef struct {
    int64_t step, tokens;             // optimizer steps completed, tokens trained on
    int64_t consumed;                 // samples read; -1: an older checkpoint, unknown
    int seq_len;                      // tokens per sample
    int64_t *adamw_steps;             // (2L+1) as in UpdateArgs.t
    int bad_steps;                    // number of consecutive bad steps up to now
    Spikes losses, norms;             // of recent steps: the reference for spikes
    double *eval_scale;               // (2L) the branches' factors in evaluation; see drop_path.h
    int tied;                         // how those factors apply: DropPlan.tied
    int frozen;                       // layers that are not trained: EngineArgs.frozen
    int eot;                          // the end-of-text token, or -1
    const char *options;              // the run's options, as config.txt
    const char *tokenizer_sha256;     // of the shards' manifest; NULL or "": none
    const TokenizerFiles *tokenizer;  // NULL: none
    const LoraConfig *lora;           // the adapter's; NULL: all weights are written
    const char *base_sha256;          // its base's
} CheckpointState;

// The first CHECKPOINT_FILES are in every checkpoint.
enum { CHECKPOINT_FILES = 3, CHECKPOINT_ALL = CHECKPOINT_FILES + TOKENIZER_FILES };
static const char *const checkpoint_file[CHECKPOINT_ALL + 1] = {"model.safetensors", "config.json",
                                                                "optimizer.safetensors",
                                                                TOKENIZER_FILE_NAMES,
                                                                "trainer.json"};

// If the checkpoint is an adapter, its first files differ.
static inline const char *checkpoint_file_of(int adapter, int i) {
    static const char *const first[] = {LORA_MODEL, LORA_CONFIG};
    return adapter && i < 2 ? first[i] : checkpoint_file[i];
}

// Whether a trainer.json belongs to an adapter.
static inline int checkpoint_is_adapter(const Json *trainer) {
    return json_get(trainer, json_get(trainer, 0, "files"), LORA_MODEL) >= 0;
}

// ---- Writing ----

// hex is "" if there is no such file
typedef struct { FileSum file[CHECKPOINT_ALL]; } CheckpointSums;

// Whether a slot's tensor is in a file: moments only of trained parameters, and with adapters
// weights likewise.
static inline int checkpoint_has(const GptConfig *c, Slot slot, int param, int layer, int frozen) {
    return (slot == SLOT_PARAM && !c->lora) || gpt_param_trains(c, param, layer, frozen);
}

// One slot's tensors, "<prefix><name>", in the table's order.
static inline void checkpoint_declare(SafetensorsWriter *w, const GptConfig *c, Slot slot,
                                      int frozen) {
    static const char *const prefixes[] = {"transformer.", NULL, "m.", "v."};
    const char *prefix = slot == SLOT_PARAM && c->lora ? LORA_PREFIX : prefixes[slot];
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            if (!checkpoint_has(c, slot, p, l, frozen)) continue;
            int64_t shape[2];
            const int dims = gpt_param_shape(c, p, shape);
            char *name = gpt_param_name(p, l), *full = xprintf("%s%s", prefix, name);
            safetensors_declare(w, full, REAL_DTYPE, dims, shape);
            free(name);
            free(full);
        }
}

// Reads one slot's tensors from the engine, in the table's order, and appends them to w (NULL:
// nowhere). Unless bad is NULL, *bad is set to the name of the first tensor that is not finite,
// from malloc, prefixed with "m." or "v." for a moment: so one pass both checks and writes.
static inline void checkpoint_read_slot(SafetensorsWriter *w, const Engine *e, Model *m,
                                        const GptConfig *c, Slot slot, int frozen, char **bad) {
    for (int p = 0; p < N_PARAMS; p++) {
        const size_t n = gpt_param_size(c, p);
        real *host = (real *)xcalloc(n, sizeof *host);
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            if (!checkpoint_has(c, slot, p, l, frozen)) continue;
            e->read(m, slot, p, l, host);
            if (bad && !*bad && !numbers_finite(host, n)) {
                char *name = gpt_param_name(p, l);
                *bad = xprintf("%s%s", slot == SLOT_M ? "m." : slot == SLOT_V ? "v." : "", name);
                free(name);
            }
            if (w) safetensors_append(w, host, n * sizeof *host);
        }
        free(host);
    }
}

// Below, *error is NULL, or the first failure, from malloc, after which nothing more is written.
// Tensors are still read from the engine: with EngineArgs.zero all ranks take part in that.
static inline FILE *checkpoint_begin(SafetensorsWriter *w, const char *path, FileSum *sum,
                                     char **error) {
    FILE *f = NULL;
    safetensors_writer_init(w);
    file_sum_init(sum);
    w->sum = sum;
    w->error = error;
    if (!*error) *error = file_try_open_new(&f, path);
    return f;
}

static inline void checkpoint_end(SafetensorsWriter *w, const char *path, FILE *f, char **error) {
    safetensors_end(w);
    file_sum_end(w->sum);
    if (f) files_keep(error, file_try_sync_close(f, path));
}

static inline void checkpoint_write_model(const char *path, FileSum *sum, const Engine *e, Model *m,
                                          const GptConfig *c, char **bad, char **error) {
    SafetensorsWriter w;
    FILE *f = checkpoint_begin(&w, path, sum, error);
    checkpoint_declare(&w, c, SLOT_PARAM, 0);
    safetensors_begin(&w, f, path);
    checkpoint_read_slot(&w, e, m, c, SLOT_PARAM, 0, bad);
    checkpoint_end(&w, path, f, error);
}

static inline void checkpoint_write_optimizer(const char *path, FileSum *sum, const Engine *e,
                                              Model *m, const GptConfig *c,
                                              const CheckpointState *s, char **bad, char **error) {
    SafetensorsWriter w;
    FILE *f = checkpoint_begin(&w, path, sum, error);
    const int64_t branches = BRANCHES * c->L + 1;
    safetensors_declare(&w, "adamw_steps", "I64", 1, &branches);
    checkpoint_declare(&w, c, SLOT_M, s->frozen);
    checkpoint_declare(&w, c, SLOT_V, s->frozen);
    safetensors_begin(&w, f, path);
    safetensors_append(&w, s->adamw_steps, (size_t)branches * sizeof *s->adamw_steps);
    checkpoint_read_slot(&w, e, m, c, SLOT_M, s->frozen, bad);
    checkpoint_read_slot(&w, e, m, c, SLOT_V, s->frozen, bad);
    checkpoint_end(&w, path, f, error);
}

static inline void checkpoint_write_text(const char *path, const Text *t, char **error) {
    FILE *f = NULL;
    if (*error || (*error = file_try_open_new(&f, path))) return;
    *error = file_try_write(f, path, t->s, t->n);
    files_keep(error, file_try_sync_close(f, path));
}

// GPT-2's configuration in transformers' terms; the factors of survival scaling that are not 1, in
// ours. dtype: "float32", the stored type. With tokenizer_class, AutoTokenizer refuses a directory
// without a tokenizer.json; otherwise it would silently make a tokenizer with one token.
static inline void checkpoint_config_json(Text *t, const GptConfig *c, const CheckpointState *s,
                                          const char *dtype) {
    int scaled = 0;
    for (int i = 0; i < BRANCHES * c->L; i++) scaled |= s->eval_scale[i] != 1;
    text_printf(t, "{\n  \"architectures\": [\"GPT2LMHeadModel\"],\n  \"model_type\": \"gpt2\",\n"
                "  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n"
                "  \"vocab_size\": %d,\n  \"n_positions\": %d,\n  \"n_embd\": %d,\n  \"n_layer\": "
                "%d,\n  \"n_head\": %d,\n"
                "  \"activation_function\": \"gelu_new\",\n  \"layer_norm_epsilon\": 1e-05,\n  "
                "\"initializer_range\": 0.02,\n"
                "  \"resid_pdrop\": 0.0,\n  \"embd_pdrop\": 0.0,\n  \"attn_pdrop\": 0.0,\n  "
                "\"tie_word_embeddings\": true,\n", c->V, c->T, c->C, c->L, c->NH);
    char eot[16] = "null";
    if (s->eot >= 0) snprintf(eot, sizeof eot, "%d", s->eot);
    text_printf(t, "  \"bos_token_id\": %s,\n  \"eos_token_id\": %s,\n  \"torch_dtype\": \"%s\"",
                eot, eot, dtype);
    if (s->tokenizer_sha256 && *s->tokenizer_sha256)
        text_printf(t, ",\n  \"tokenizer_sha256\": \"%s\"", s->tokenizer_sha256);
    for (int i = 0; scaled && i < BRANCHES * c->L; i++) {
        text_printf(t, i ? ", " : ",\n  \"drop_path_eval_scale\": [");
        json_write_number(t, s->eval_scale[i]);
    }
    text_printf(t, scaled ? "],\n  \"drop_path_tied\": %s\n}\n" : "\n}\n",
                s->tied ? "true" : "false");
}

#define CHECKPOINT_FORMAT "droppath.c checkpoint 1"
#define CHECKPOINT_SELF "  \"sha256\": \""               // trainer.json's own sum: of all bytes
                                                         // before this line

static inline void checkpoint_write_spikes(Text *t, const char *name, const Spikes *s) {
    text_printf(t, ",\n  \"%s\": [", name);
    for (int i = 0; i < s->n; i++) {
        if (i) text_append(t, ", ", 2);
        json_write_number(t, s->value[i]);
    }
    text_append(t, "]", 1);
}

static inline void checkpoint_trainer_json(Text *t, const CheckpointState *s,
                                           const CheckpointSums *sums) {
    char hex[SHA256_HEX];
    text_printf(t, "{\n  \"format\": \"" CHECKPOINT_FORMAT
                "\",\n  \"step\": %lld,\n  \"tokens\": %lld,\n"
                "  \"consumed\": %lld,\n  \"seq_len\": %d,\n  \"options\": ",
                (long long)s->step, (long long)s->tokens, (long long)s->consumed, s->seq_len);
    json_write_string(t, s->options);
    text_printf(t, ",\n  \"bad_steps\": %d", s->bad_steps);
    // absent otherwise, as in older ones
    if (s->frozen) text_printf(t, ",\n  \"frozen\": %d", s->frozen);
    if (s->lora) {
        text_printf(t, ",\n  \"base\": ");
        json_write_string(t, s->lora->base);
        text_printf(t, ",\n  \"base_sha256\": \"%s\"", s->base_sha256);
    }
    checkpoint_write_spikes(t, "losses", &s->losses);
    checkpoint_write_spikes(t, "grad_norms", &s->norms);
    text_printf(t, ",\n  \"files\": {");
    for (int i = 0; i < CHECKPOINT_ALL; i++)
        if (*sums->file[i].hex)
            text_printf(t, "%s\n    \"%s\": \"%s\"", i ? "," : "",
                        checkpoint_file_of(s->lora != NULL, i), sums->file[i].hex);
    text_printf(t, "\n  },\n  \"sizes\": {");
    for (int i = 0; i < CHECKPOINT_ALL; i++)
        if (*sums->file[i].hex)
            text_printf(t, "%s\"%s\": %llu", i ? ", " : "", checkpoint_file_of(s->lora != NULL, i),
                        (unsigned long long)sums->file[i].size);
    text_printf(t, "},\n  \"marks\": {");              // for file_sum_differs
    for (int i = 0; i < CHECKPOINT_ALL; i++)
        if (*sums->file[i].hex)
            text_printf(t, "%s\"%s\": \"%s\"", i ? ", " : "",
                        checkpoint_file_of(s->lora != NULL, i),
                        sums->file[i].marks.n ? sums->file[i].marks.s : "");
    text_printf(t, "},\n");
    sha256_hex(hex, t->s, t->n);
    text_printf(t, CHECKPOINT_SELF "%s\"\n}\n", hex);
}

// Removes a checkpoint's files and then its directory, which stays if it contains anything else.
// trainer.json goes first: without it, the directory is not a checkpoint.
static inline void checkpoint_remove(const char *dir) {
    // e.g. a link to another run's: its target is not ours
    if (!path_is_own_directory(dir)) {
        if (disk_unlink(dir) && errno != ENOENT) warn("cannot remove %s: %s", dir, strerror(errno));
        return;
    }
    char *adapter = xprintf("%s/" LORA_MODEL, dir), *link = xprintf("%s/base", dir), to[2];
    const int of_adapter = path_exists(adapter);
    if (of_adapter && readlink(link, to, sizeof to) > 0) disk_unlink(link);      // lora.h
    free(adapter), free(link);
    for (int i = CHECKPOINT_ALL; i >= 0; i--) {
        char *path = xprintf("%s/%s", dir, checkpoint_file_of(of_adapter, i));
        if (disk_unlink(path) && errno != ENOENT)
            warn("cannot remove %s: %s", path, strerror(errno));
        free(path);
    }
    if (disk_rmdir(dir) && errno != ENOENT) warn("cannot remove %s: %s", dir, strerror(errno));
}

// Performs the same reads as checkpoint_try_save in the same order, without writing: for the other
// ranks, if each has a share of the tensors. *bad likewise.
static inline void checkpoint_attend(const Engine *e, Model *m, const GptConfig *c, int frozen,
                                     char **bad) {
    checkpoint_read_slot(NULL, e, m, c, SLOT_PARAM, 0, bad);
    checkpoint_read_slot(NULL, e, m, c, SLOT_M, frozen, bad);
    checkpoint_read_slot(NULL, e, m, c, SLOT_V, frozen, bad);
}

// Makes OUT/latest point to the checkpoint with that name.
static inline char *checkpoint_point(const char *out, const char *name) {
    char *link = xprintf("%s/.latest.tmp", out), *latest = xprintf("%s/latest", out), *error = NULL;
    if (path_exists(link)) disk_unlink(link);
    if (disk_symlink(name, link))
        error = xprintf("cannot make the link %s: %s", link, strerror(errno));
    if (!error) error = file_try_rename(link, latest);
    free(link), free(latest);
    return error;
}

// `latest` is a convenience: without it programs use the newest checkpoint (load.h). If it cannot
// be updated, a link to an older one is removed.
static inline void checkpoint_point_or_warn(const char *out, const char *name) {
    static int warned;
    char *error = checkpoint_point(out, name), *latest = xprintf("%s/latest", out), target[64];
    if (error && !warned++)
        warn("%s\n  hint: checkpoints are saved all the same; programs that are given %s take the "
             "newest", error, out);
    if (error && readlink(latest, target, sizeof target) >= 0) disk_unlink(latest);
    free(error), free(latest);
}

// Writes OUT/step_NNNNNNNN, replacing an older one of that step. Returns NULL, or why it failed,
// from malloc: then everything that existed still exists, or OUT/step_NNNNNNNN is complete but may
// not survive a power failure. Weights or moments that are not finite are not saved: *bad, NULL
// before, is then set to the name of the first such tensor, from malloc, regardless of other
// failures.
//
// Why a crash between any two calls loses nothing, and what it leaves behind:
//   1. The files are written to .step_N.tmp, each is synced, and then the directory itself. Up to
//      here no name that others read has changed. A crash leaves .step_N.tmp, which nobody reads
//      and checkpoint_recover removes.
//   2. If there is a step_N, it is renamed to .step_N.old. A crash leaves it complete under that
//      name; checkpoint_recover, which runs before any search for checkpoints, renames it back.
//   3. .step_N.tmp is renamed to step_N: either all files are there or none, since a rename is
//      atomic and all bytes are already on disk. Syncing OUT makes the rename durable. A crash
//      leaves step_N or, if the power fails before the sync, the state after step 1 or 2.
//      trainer.json holds the sums of all files, which reveals disks that falsely reported a sync.
//   4. `latest` is also replaced by a rename: it is the old link or the new one. --resume does not
//      read it, and repairs it; if it cannot be created, the checkpoint is still valid.
//   5. .step_N.old is removed and, by the caller, the oldest checkpoints: only after step 3 is on
//      disk. A crash leaves a directory without trainer.json, which is not a checkpoint; it is
//      older than a complete one, and removed with the oldest.
static inline char *checkpoint_try_save(const char *out, const Engine *e, Model *m,
                                        const GptConfig *c, const CheckpointState *s, char **bad) {
    char *name = xprintf("step_%08lld", (long long)s->step), *final = xprintf("%s/%s", out, name),
        *error = NULL;
    char *temporary = xprintf("%s/.%s.tmp", out, name), *old = xprintf("%s/.%s.old", out, name),
        *path[CHECKPOINT_ALL + 1];
    CheckpointSums sums;
    Text config = {NULL, 0, 0}, trainer = {NULL, 0, 0};
    memset(&sums, 0, sizeof sums);
    for (int i = 0; i <= CHECKPOINT_ALL; i++)
        path[i] = xprintf("%s/%s", temporary, checkpoint_file_of(s->lora != NULL, i));
    if (path_exists(temporary)) checkpoint_remove(temporary);
    error = directory_try_make(temporary);
    checkpoint_write_model(path[0], &sums.file[0], e, m, c, bad, &error);
    if (*bad && !error) error = xprintf("%s is not finite", *bad);
    if (s->lora) lora_write(&config, s->lora);
    else checkpoint_config_json(&config, c, s, sizeof(real) == 4 ? "float32" : "float64");
    file_sum(&sums.file[1], config.s, config.n);
    checkpoint_write_text(path[1], &config, &error);
    checkpoint_write_optimizer(path[2], &sums.file[2], e, m, c, s, bad, &error);
    if (*bad && !error) error = xprintf("%s is not finite", *bad);
    for (int i = 0; s->tokenizer && i < TOKENIZER_FILES; i++) {
        const Text *file = &s->tokenizer->file[i];
        if (!file->n) continue;
        file_sum(&sums.file[CHECKPOINT_FILES + i], file->s, file->n);
        checkpoint_write_text(path[CHECKPOINT_FILES + i], file, &error);
    }
    checkpoint_trainer_json(&trainer, s, &sums);
    checkpoint_write_text(path[CHECKPOINT_ALL], &trainer, &error);
    if (!error) error = directory_try_sync(temporary);

    int moved = 0;
    if (!error && path_exists(final)) {
        if (path_exists(old)) checkpoint_remove(old);
        error = file_try_rename(final, old);
        moved = !error;
    }
    if (!error) error = file_try_rename(temporary, final);
    if (error && moved) files_keep(&error, file_try_rename(old, final));
    if (error) {                                         // the disk may be full because of it
        if (path_exists(temporary)) checkpoint_remove(temporary);
    } else {
        error = directory_try_sync(out);
        if (!error) checkpoint_point_or_warn(out, name);
        if (!error) error = directory_try_sync(out);
        if (!error && moved) checkpoint_remove(old);
    }
    text_free(&config);
    text_free(&trainer);
    for (int i = 0; i < CHECKPOINT_ALL; i++) text_free(&sums.file[i].marks);
    for (int i = 0; i <= CHECKPOINT_ALL; i++) free(path[i]);
    free(name), free(final), free(temporary), free(old);
    return error;
}

static inline void checkpoint_save(const char *out, const Engine *e, Model *m, const GptConfig *c,
                                   const CheckpointState *s) {
    char *bad = NULL;
    files_die(checkpoint_try_save(out, e, m, c, s, &bad));
}

// ---- Search ----

typedef struct { int64_t *step; int n; } CheckpointList;

static inline int checkpoint_newer(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

// The step in a directory's name, or -1. Only the names that checkpoint_path gives are accepted.
static inline int64_t checkpoint_named(const char *name) {
    char exact[40];
    if (strncmp(name, "step_", 5)) return -1;
    const long long step = strtoll(name + 5, NULL, 10);
    snprintf(exact, sizeof exact, "step_%08lld", step);
    return step < 0 || strcmp(name, exact) ? -1 : (int64_t)step;
}

// The steps of all OUT/step_*, newest first, from malloc; none if OUT does not exist. Returns NULL
// or, from malloc, why OUT cannot be read: then the list is empty.
static inline char *checkpoint_try_list(CheckpointList *found, const char *out) {
    CheckpointList list = {NULL, 0};
    *found = list;
    DIR *d = opendir(out);
    if (!d)
        return errno == ENOENT || errno == ENOTDIR ? NULL : xprintf("cannot list %s: %s", out,
                                                                    strerror(errno));
    for (struct dirent *entry; errno = 0, (entry = readdir(d)) != NULL;) {
        const int64_t step = checkpoint_named(entry->d_name);
        if (step < 0) continue;
        list.step = (int64_t *)xrealloc(list.step, (size_t)list.n + 1, sizeof *list.step);
        list.step[list.n++] = step;
    }
    char *error = errno ? xprintf("cannot list %s: %s", out, strerror(errno)) : NULL;
    closedir(d);
    if (error) {
        free(list.step);
        return error;
    }
    if (list.n) qsort(list.step, (size_t)list.n, sizeof *list.step, checkpoint_newer);
    *found = list;
    return NULL;
}

static inline CheckpointList checkpoint_list(const char *out) {
    CheckpointList list;
    files_die(checkpoint_try_list(&list, out));
    return list;
}

static inline char *checkpoint_path(const char *out, int64_t step) {
    return xprintf("%s/step_%08lld", out, (long long)step);
}

// Whether a directory has weights, or an adapter.
static inline int checkpoint_has_config(const char *dir) {
    char *config = xprintf("%s/config.json", dir);
    const int has = path_exists(config) || lora_is_adapter(dir);
    free(config);
    return has;
}

// The weights that a user means by `path`: path itself; or, for a run's directory, or RUN/latest if
// there is none, the target of its link `latest`, otherwise its newest checkpoint. From malloc.
static inline char *checkpoint_find(const char *path) {
    char *run = xstrdup(path), *slash = strrchr(run, '/'), *dir = NULL;
    if (!path_is_directory(path) && slash && !strcmp(slash, "/latest")) *slash = 0;
    char *latest = xprintf("%s/latest", run);
    if (!checkpoint_has_config(path) && checkpoint_has_config(latest)) dir = xstrdup(latest);
    else if (!checkpoint_has_config(path)) {
        CheckpointList list = checkpoint_list(run);
        // an interrupted removal leaves one without trainer.json
        for (int i = 0; i < list.n && !dir; i++) {
            char *step = checkpoint_path(run, list.step[i]),
                *trainer = xprintf("%s/trainer.json", step);
            if (path_exists(trainer)) dir = xstrdup(step);
            free(step), free(trainer);
        }
        free(list.step);
    }
    free(latest), free(run);
    return dir ? dir : xstrdup(path);
}

// Removes all but the newest `keep` checkpoints of OUT; 0 keeps all. Those after step `written`,
// the last complete one, are not counted and stay: had they been sound, the run would have resumed
// from them.
static inline void checkpoint_prune(const char *out, int64_t keep, int64_t written) {
    CheckpointList list;
    char *error = checkpoint_try_list(&list, out);
    int64_t kept = 0;
    if (error) warn("old checkpoints stay for now: %s", error);
    free(error);
    for (int i = 0; keep > 0 && i < list.n; i++) {
        if (list.step[i] > written || ++kept <= keep) continue;
        char *path = checkpoint_path(out, list.step[i]);
        checkpoint_remove(path);
        free(path);
    }
    free(list.step);
}

// Repairs what a crash in checkpoint_try_save left in OUT, as described there. Only for the process
// that writes to OUT.
static inline void checkpoint_recover(const char *out) {
    char *link = xprintf("%s/.latest.tmp", out);
    DIR *d = opendir(out);
    if (!d && errno != ENOENT) die("cannot list %s: %s", out, strerror(errno));
    if (d && path_exists(link)) disk_unlink(link);
    free(link);
    if (!d) return;
    for (struct dirent *entry; errno = 0, (entry = readdir(d)) != NULL;) {
        const char *end = strrchr(entry->d_name, '.');
        if (strncmp(entry->d_name, ".step_", 6) || (strcmp(end, ".tmp") && strcmp(end, ".old")))
            continue;
        char *path = xprintf("%s/%s", out, entry->d_name);
        char *final = xprintf("%s/%.*s", out, (int)(end - entry->d_name - 1), entry->d_name + 1);
        if (!strcmp(end, ".tmp") || path_exists(final)) checkpoint_remove(path);
        else file_rename(path, final);
        free(path), free(final);
    }
    if (errno) die("cannot list %s: %s", out, strerror(errno));
    closedir(d);
}

// ---- Verification ----

// Parses trainer.json and checks its own sum. Returns NULL or what is wrong; free doc only after
// NULL.
static inline const char *checkpoint_parse_trainer(Json *doc, const void *mem, size_t size) {
    const char *text = (const char *)mem;
    const size_t name = strlen(CHECKPOINT_SELF), tail = name + SHA256_HEX - 1 + strlen("\"\n}\n");
    char hex[SHA256_HEX];
    if (size < tail || memcmp(text + size - tail, CHECKPOINT_SELF, name))
        return "it is cut short or not ours";
    sha256_hex(hex, text, size - tail);
    if (memcmp(hex, text + size - tail + name, SHA256_HEX - 1))
        return "its contents do not match its SHA-256";
    if (json_parse(doc, text, size)) return "it is not JSON";
    return NULL;
}

#define CHECKPOINT_MOST ((int64_t)1 << 60)               // steps, tokens, bytes: additions by a run
                                                         // cannot overflow

// The reference for spikes, which older checkpoints lack. Returns NULL, or what is wrong.
static inline const char *checkpoint_parse_spikes(const Json *doc, const char *key, Spikes *s) {
    const int list = json_get(doc, 0, key);
    s->n = 0;
    if (list < 0) return NULL;
    if (json_type(doc, list) != JSON_ARRAY || json_count(doc, list) > SPIKES_WINDOW)
        return "\"losses\" and \"grad_norms\" must be lists of at most 128 numbers";
    for (int i = 0, node = json_first(doc, list); i < json_count(doc, list);
         i++, node = json_next(doc, node)) {
        double x;
        if (!json_number(doc, node, &x))
            return "\"losses\" or \"grad_norms\" has what is no finite number";
        spikes_add(s, x);
    }
    return NULL;
}

// The position in the data, which older checkpoints lack. Returns NULL, or what is wrong.
static inline const char *checkpoint_parse_position(const Json *doc, CheckpointState *s) {
    const int consumed = json_get(doc, 0, "consumed"), seq_len = json_get(doc, 0, "seq_len");
    int64_t length = 0;
    s->consumed = -1, s->seq_len = 0;
    if (consumed < 0) return NULL;
    if (!json_int64(doc, seq_len, &length) || length < 0 || length > 1 << 24)
        return "\"seq_len\" is missing or out of range";
    const int64_t most = CHECKPOINT_MOST / (length ? length : 1);
    if (!json_int64(doc, consumed, &s->consumed) || s->consumed < 0 || s->consumed > most)
        return "\"consumed\" is out of range";
    s->seq_len = (int)length;
    return NULL;
}

// Whether a node is a string of n lowercase hexadecimal digits.
static inline int checkpoint_is_hex(const Json *doc, int node, size_t n) {
    char *s = json_string(doc, node, NULL);
    const int is = s && strlen(s) == n && strspn(s, "0123456789abcdef") == n;
    free(s);
    return is;
}

// Whether a checkpoint has file i: the first ones always, tokenizer files if trainer.json lists
// them.
static inline int checkpoint_has_file(const Json *trainer, int i) {
    return i < CHECKPOINT_FILES || json_get(trainer, json_get(trainer, 0, "files"),
                                            checkpoint_file[i]) >= 0;
}

// Checks what trainer.json says about the other files; older ones lack "sizes" and "marks". Returns
// NULL, or what is wrong.
static inline const char *checkpoint_check_files(const Json *doc) {
    const int files = json_get(doc, 0, "files"), sizes = json_get(doc, 0, "sizes"),
        marks = json_get(doc, 0, "marks");
    const int adapter = checkpoint_is_adapter(doc);
    if (json_duplicate(doc, files) >= 0 || json_duplicate(doc, sizes) >= 0 ||
        json_duplicate(doc, marks) >= 0)
        return "a file is there twice in \"files\", \"sizes\" or \"marks\"";
    for (int i = 0; i < CHECKPOINT_ALL; i++) {
        int64_t size = -1;
        const char *file = checkpoint_file_of(adapter, i);
        if (!checkpoint_has_file(doc, i)) continue;
        if (!checkpoint_is_hex(doc, json_get(doc, files, file), SHA256_HEX - 1))
            return "\"files\" must have the SHA-256 of each file";
        if (sizes < 0) continue;
        if (!json_int64(doc, json_get(doc, sizes, file), &size) || size < 0 ||
            size > CHECKPOINT_MOST)
            return "\"sizes\" must have the bytes of each file";
        if (marks >= 0 && !checkpoint_is_hex(doc, json_get(doc, marks, file),
                                             (size_t)size / FILE_SUM_BLOCK * 8))
            return "\"marks\" must have 8 digits for each MiB of each file";
    }
    return NULL;
}

// Reads a parsed trainer.json into all of s but adamw_steps and eval_scale. Returns NULL, with
// options from malloc, or what is wrong.
static inline const char *checkpoint_read_state(CheckpointState *s, const Json *doc) {
    const int bad_steps = json_get(doc, 0, "bad_steps"), some = json_get(doc, 0, "frozen");
    int64_t bad = 0, frozen = 0;
    s->step = s->tokens = -1;
    json_int64(doc, json_get(doc, 0, "step"), &s->step);
    json_int64(doc, json_get(doc, 0, "tokens"), &s->tokens);
    if (json_duplicate(doc, 0) >= 0) return "a name is there twice";
    if (!json_equals(doc, json_get(doc, 0, "format"), CHECKPOINT_FORMAT))
        return "\"format\" is not " CHECKPOINT_FORMAT;
    if (s->step < 0 || s->step > CHECKPOINT_MOST) return "\"step\" is missing or out of range";
    if (s->tokens < 0 || s->tokens > CHECKPOINT_MOST)
        return "\"tokens\" is missing or out of range";
    if (bad_steps >= 0 && (!json_int64(doc, bad_steps, &bad) || bad < 0 || bad > 1000000000))
        return "\"bad_steps\" is out of range";
    if (some >= 0 && (!json_int64(doc, some, &frozen) || frozen < 0 || frozen > 1024))
        return "\"frozen\" is out of range";
    s->bad_steps = (int)bad, s->frozen = (int)frozen;
    const char *error = checkpoint_parse_position(doc, s);
    if (!error) error = checkpoint_parse_spikes(doc, "losses", &s->losses);
    if (!error) error = checkpoint_parse_spikes(doc, "grad_norms", &s->norms);
    if (!error) error = checkpoint_check_files(doc);
    if (error) return error;
    s->options = json_string(doc, json_get(doc, 0, "options"), NULL);
    return s->options ? NULL : "\"options\" is missing";
}

// The same for a trainer.json of `size` bytes at mem.
static inline const char *checkpoint_parse_state(CheckpointState *s, const void *mem, size_t size) {
    Json doc;
    const char *error = checkpoint_parse_trainer(&doc, mem, size);
    if (error) return error;
    error = checkpoint_read_state(s, &doc);
    json_free(&doc);
    return error;
}

// A file that exists but cannot be read now (a disk error, a server that does not respond, no
// memory) is not known to be damaged: that is no reason to continue from an older checkpoint.
static inline void checkpoint_unreadable(const char *path, const char *error) {
    die("cannot read %s: %s\n  hint: try again when it can be read; if it never can, rename its "
        "directory, and an older checkpoint is taken", path, error);
}

// The sum of a regular file, of which at most one byte more than `most` is read. It is read, not
// mapped, so an I/O error is reported instead of ending the program. Returns NULL, or what is
// wrong; free sum->marks only after NULL.
static inline const char *checkpoint_sum(FileSum *sum, const char *path, int64_t most) {
    struct stat st;
    const int fd = file_open_read(path);
    if (fd < 0 && errno != ENOENT && errno != ENOTDIR) checkpoint_unreadable(path, strerror(errno));
    if (fd < 0) return strerror(errno);                  // missing, which is damage
    if (fstat(fd, &st)) checkpoint_unreadable(path, strerror(errno));
    if (!S_ISREG(st.st_mode)) {
        close(fd);
        return "not a regular file";
    }
    char *block = (char *)xcalloc(FILE_SUM_BLOCK, 1);
    ssize_t n = 1;
    file_sum_init(sum);
    while (n > 0 && (int64_t)sum->size <= most)
        if ((n = read(fd, block, FILE_SUM_BLOCK)) > 0) file_sum_update(sum, block, (size_t)n);
    if (n < 0) checkpoint_unreadable(path, strerror(errno));
    const char *error = NULL;
    file_sum_end(sum);
    free(block);
    close(fd);
    return error;
}

// Checks file i of a checkpoint against trainer.json. Returns NULL or, from malloc, what is wrong
// and where.
static inline char *checkpoint_verify_file(const Json *trainer, const char *dir, int i) {
    const char *name = checkpoint_file_of(checkpoint_is_adapter(trainer), i);
    char *path = xprintf("%s/%s", dir, name), *wrong = NULL;
    FileSum sum;
    // values that an older trainer.json lacks are not compared
    int64_t size = -1;
    json_int64(trainer, json_get(trainer, json_get(trainer, 0, "sizes"), name), &size);
    const char *error = checkpoint_sum(&sum, path, size < 0 ? INT64_MAX : size);
    if (error) wrong = xprintf("%s: %s", path, error);
    else {
        if (size >= 0 && size != (int64_t)sum.size)
            wrong = xprintf("%s: it has %s%llu bytes, but %lld were written", path,
                            (int64_t)sum.size > size ? "at least " : "",
                            (unsigned long long)sum.size, (long long)size);
        else if (!json_equals(trainer, json_get(trainer, json_get(trainer, 0, "files"), name),
                              sum.hex)) {
            const int node = json_get(trainer, json_get(trainer, 0, "marks"), name);
            char *marks = json_type(trainer, node) == JSON_STRING ? json_string(trainer, node, NULL)
                : NULL;
            const uint64_t from = marks ? file_sum_differs(&sum, marks) : 0;
            const uint64_t to = marks && from + FILE_SUM_BLOCK < sum.size ? from + FILE_SUM_BLOCK
                : sum.size;
            wrong = xprintf("%s: its contents do not match the SHA-256 in trainer.json; the first "
                            "difference is in bytes %llu to %llu", path, (unsigned long long)from,
                            (unsigned long long)to);
            free(marks);
        }
        text_free(&sum.marks);
    }
    free(path);
    return wrong;
}

// Checks every file of one of our checkpoints against its sum and, if its directory is named for a
// step, that the step matches. Returns NULL or, from malloc, what is wrong.
static inline char *checkpoint_verify(const char *dir) {
    char *path = xprintf("%s/trainer.json", dir), *wrong = NULL;
    const char *slash = strrchr(dir, '/'), *name = slash ? slash + 1 : dir;
    CheckpointState s;
    FileMap map;
    Json doc;
    const char *error = file_map(&map, path);
    if (error && path_must_exist_or_not(path) && strcmp(error, "not a regular file"))
        checkpoint_unreadable(path, error);
    if (error) wrong = xprintf("%s: %s", path, error);
    else if ((error = checkpoint_parse_trainer(&doc, map.data, map.size)))
        wrong = xprintf("%s: %s (%zu bytes)", path, error, map.size);
    else {
        if ((error = checkpoint_read_state(&s, &doc))) wrong = xprintf("%s: %s", path, error);
        else free((char *)(uintptr_t)s.options);
        if (!wrong && checkpoint_named(name) >= 0 && checkpoint_named(name) != s.step)
            wrong = xprintf("%s: it is of step %lld", path, (long long)s.step);
        for (int i = 0; i < CHECKPOINT_ALL && !wrong; i++)
            if (checkpoint_has_file(&doc, i)) wrong = checkpoint_verify_file(&doc, dir, i);
        json_free(&doc);
    }
    file_unmap(&map);
    free(path);
    return wrong;
}

// A file that exists but cannot be opened (no permission, too many open files, a server that does
// not respond) is not damaged: that is no reason to go back to an older checkpoint, or to the
// beginning.
static inline void checkpoint_must_open(const char *path) {
    const int fd = file_open_read(path);
    if (fd < 0 && errno != ENOENT && errno != ENOTDIR)
        die("cannot open %s: %s\n  hint: the run can continue from it once it can be read",
            path, strerror(errno));
    if (fd >= 0) close(fd);
}

// The newest intact checkpoint of OUT, from malloc, or NULL if there are none at all. Reports
// damaged ones; dies if all are damaged, or one cannot be examined.
static inline char *checkpoint_latest(const char *out) {
    checkpoint_must_open(out);
    CheckpointList list = checkpoint_list(out);
    char *found = NULL;
    for (int i = 0; i < list.n && !found; i++) {
        char *path = checkpoint_path(out, list.step[i]);
        for (int k = 0; k < 2 * (CHECKPOINT_ALL + 1); k++) {
            char *file = xprintf("%s/%s", path, checkpoint_file_of(k % 2, k / 2));
            checkpoint_must_open(file);
            free(file);
        }
        char *wrong = checkpoint_verify(path);
        if (!wrong) found = path;
        else {
            warn("this checkpoint is damaged, an older one is tried: %s", wrong);
            free(wrong);
            free(path);
        }
    }
    if (list.n && !found)
        die("all %d checkpoints of %s are damaged\n  hint: start again with another --out", list.n,
            out);
    free(list.step);
    return found;
}

// Before a run continues from OUT/name, the newest intact checkpoint: renames the later ones, all
// damaged, and makes `latest` point to it.
static inline void checkpoint_settle(const char *out, const char *name) {
    CheckpointList list = checkpoint_list(out);
    char *latest = xprintf("%s/latest", out), target[64] = "";
    const int64_t step = strtoll(name + 5, NULL, 10);
    for (int i = 0; i < list.n; i++) {
        if (list.step[i] <= step) continue;
        char *path = checkpoint_path(out, list.step[i]), *aside = xprintf("%s.damaged", path),
            *error = NULL;
        if (path_exists(aside)) error = xprintf("%s is there already", aside);
        else error = file_try_rename(path, aside);
        warn("%s %s%s", path, error ? "stays: " : "is now ", error ? error : aside);
        free(path), free(aside), free(error);
    }
    if (readlink(latest, target, sizeof target - 1) < 0 || strcmp(target, name))
        checkpoint_point_or_warn(out, name);
    free(list.step);
    free(latest);
}

// ---- Reading ----

// Names the architecture of a config.json if it is not GPT-2: its model_type or, without one, the
// class that loads it. Returns NULL or, from malloc, what is wrong.
static inline char *checkpoint_check_architecture(const Json *doc) {
    static const char hint[] = "\n  hint: only GPT-2 is computed here: learned positions, "
        "LayerNorm, tanh-GELU";
    const int type = json_get(doc, 0, "model_type"),
        class_name = json_first(doc, json_get(doc, 0, "architectures"));
    const int node = type >= 0 ? type : class_name;
    char *name = json_string(doc, node, NULL), *error = NULL;
    if (type >= 0 && (!name || strcmp(name, "gpt2")))
        error = xprintf("a model of another architecture: its \"model_type\" is %.80s, not gpt2%s",
                        name ? name : "no text", hint);
    if (type < 0 && name && strncmp(name, "GPT2", 4))
        error = xprintf("a model of another architecture: %.80s, not GPT2LMHeadModel%s", name,
                        hint);
    free(name);
    return error;
}

// Checks that config.json describes a model that this program computes; absent settings have
// GPT-2's values. Returns NULL or, from malloc, what is wrong.
static inline char *checkpoint_check_config(const Json *doc) {
    static const struct { const char *key; int type; const char *value; } fixed[] = {
        {"scale_attn_weights", JSON_TRUE, "true"},
        {"scale_attn_by_inverse_layer_idx", JSON_FALSE, "false"},
        {"tie_word_embeddings", JSON_TRUE, "true"}};
    for (size_t i = 0; i < sizeof fixed / sizeof fixed[0]; i++) {
        const int node = json_get(doc, 0, fixed[i].key);
        if (node >= 0 && json_type(doc, node) != fixed[i].type)
            return xprintf("\"%s\" must be %s: this is another kind of model", fixed[i].key,
                           fixed[i].value);
    }
    int gelu = json_get(doc, 0, "activation_function");
    if (gelu >= 0 && !json_equals(doc, gelu, "gelu_new") &&
        !json_equals(doc, gelu, "gelu_pytorch_tanh"))
        return xstrdup("\"activation_function\" must be gelu_new, GPT-2's tanh-GELU");
    double eps = 1e-5;
    json_number(doc, json_get(doc, 0, "layer_norm_epsilon"), &eps);
    if (eps != 1e-5) return xstrdup("\"layer_norm_epsilon\" must be 1e-5");
    int64_t inner = 0, channels = 0;
    if (json_int64(doc, json_get(doc, 0, "n_inner"), &inner) &&
        json_int64(doc, json_get(doc, 0, "n_embd"), &channels) &&
        inner != 4 * channels)
        return xstrdup("\"n_inner\" must be null or 4 times n_embd: this is another kind of model");
    return NULL;
}

// The sizes of an llm.c model, which has no factors.
static inline void checkpoint_read_llmc(const char *path, GptConfig *c, double **eval_scale,
                                        int *tied) {
    Weights w;
    weights_open(&w, path);
    *c = w.llmc.config;
    weights_close(&w);
    *eval_scale = (double *)xcalloc((size_t)(BRANCHES * c->L), sizeof **eval_scale);
    for (int i = 0; i < BRANCHES * c->L; i++) (*eval_scale)[i] = 1;
    *tied = 0;
}

// The branches' factors in evaluation (2L). Returns NULL or, from malloc, what is wrong.
static inline char *checkpoint_read_scale(const Json *doc, int L, double *eval_scale, int *tied) {
    const int scale = json_get(doc, 0, "drop_path_eval_scale");
    if (scale >= 0 && json_count(doc, scale) != BRANCHES * L)
        return xprintf("\"drop_path_eval_scale\" must have %d numbers", BRANCHES * L);
    for (int i = 0, node = json_first(doc, scale); i < BRANCHES * L; i++) {
        eval_scale[i] = 1;
        if (scale < 0) continue;
        if (!json_number(doc, node, &eval_scale[i]) || !(eval_scale[i] >= 0 && eval_scale[i] <= 1))
            return xstrdup("\"drop_path_eval_scale\" must have numbers from 0 to 1");
        node = json_next(doc, node);
    }
    *tied = json_type(doc, json_get(doc, 0, "drop_path_tied")) == JSON_TRUE;
    for (int l = 0; *tied && l < L; l++)
        if (eval_scale[BRANCHES * l + ATTN] != eval_scale[BRANCHES * l + MLP])
            return xstrdup("\"drop_path_eval_scale\" of a tied model must be equal in both "
                           "branches of a layer");
    return NULL;
}

static inline char *checkpoint_read_sizes(const Json *doc, GptConfig *c) {
    memset(c, 0, sizeof *c);
    const char *key[5] = {"vocab_size", "n_positions", "n_layer", "n_head", "n_embd"};
    int *size[5] = {&c->V, &c->T, &c->L, &c->NH, &c->C};
    for (int i = 0; i < 5; i++) {
        int64_t v;
        if (!json_int64(doc, json_get(doc, 0, key[i]), &v))
            return xprintf("\"%s\" is missing or no integer", key[i]);
        if (v < 1 || v > 1 << 24) return xprintf("\"%s\" is %lld", key[i], (long long)v);
        *size[i] = (int)v;
    }
    const char *error = gpt_config_error(c);
    return error ? xstrdup(error) : NULL;
}

// Reads a config.json of `size` bytes at mem: sizes, and the branches' factors in evaluation:
// *eval_scale (2L) from malloc, *tied. Returns NULL or, from malloc, what is wrong; then there is
// nothing else to free.
static inline char *checkpoint_parse_config(GptConfig *c, double **eval_scale, int *tied,
                                            const void *mem, size_t size) {
    Json doc;
    const char *wrong = json_parse(&doc, mem, size);
    *eval_scale = NULL;
    if (wrong) return xstrdup(wrong);
    // before the sizes, which other architectures name differently
    char *error = checkpoint_check_architecture(&doc);
    if (!error) error = checkpoint_read_sizes(&doc, c);
    if (!error) error = checkpoint_check_config(&doc);
    if (!error) {
        *eval_scale = (double *)xcalloc((size_t)(BRANCHES * c->L), sizeof **eval_scale);
        error = checkpoint_read_scale(&doc, c->L, *eval_scale, tied);
    }
    json_free(&doc);
    if (error) {
        free(*eval_scale);
        *eval_scale = NULL;
    }
    return error;
}

// The sizes of the model in a checkpoint directory, ours or Hugging Face's, or in an llm.c file,
// and its branches' factors in evaluation: *eval_scale (2L) from malloc, *tied. Dies if there is
// none, or if the weights do not have these sizes. For an adapter they are its base's.
static inline void checkpoint_read_config(const char *dir, GptConfig *c, double **eval_scale,
                                          int *tied) {
    Weights w;
    memset(c, 0, sizeof *c);
    if (lora_is_adapter(dir)) {
        LoraConfig lora;
        lora_open(&lora, dir);
        checkpoint_read_config(lora.base, c, eval_scale, tied);
        free(lora.base);
        weights_open(&w, dir);
        weights_check(&w, c);
        weights_close(&w);
        return;
    }
    if (path_exists(dir) && !path_is_directory(dir)) {
        checkpoint_read_llmc(dir, c, eval_scale, tied);
        return;
    }
    char *path = xprintf("%s/config.json", dir);
    FileMap map;
    const char *error = file_map(&map, path);
    if (error)
        die("cannot read %s: %s\n  hint: a checkpoint is a directory with config.json and "
            "model.safetensors", path, error);
    if ((error = checkpoint_parse_config(c, eval_scale, tied, map.data, map.size)))
        die("%s: %s", path, error);
    file_unmap(&map);
    free(path);
    weights_open(&w, dir);
    weights_check(&w, c);
    weights_close(&w);
}

// Dies if one of the n elements is not finite: such a model computes nothing useful, and no average
// of its outputs may look as if it did.
static inline void checkpoint_check_finite(const Weights *w, const char *prefix, int param,
                                           int layer, const real *x, size_t n) {
    if (numbers_finite(x, n)) return;
    size_t i = 0;
    while (isfinite(x[i])) i++;
    die("%s: %s%s has a number that is not finite, %g at place %zu\n  hint: take an older "
        "checkpoint", w->path, prefix, gpt_param_name(param, layer), numbers_unsigned((double)x[i]),
        i);
}

// Loads one slot of the model, each tensor as "<prefix><name>"; dies if one is missing, has the
// wrong shape, or is not finite. Frozen layers have no moments.
static inline void checkpoint_load_slot(const Engine *e, Model *m, const GptConfig *c, Slot slot,
                                        int frozen, const Weights *w, const char *prefix) {
    for (int p = 0; p < N_PARAMS; p++) {
        real *host = (real *)xcalloc(gpt_param_size(c, p), sizeof *host);
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            if (!checkpoint_has(c, slot, p, l, frozen)) continue;
            weights_read(w, c, prefix, p, l, host);
            checkpoint_check_finite(w, prefix, p, l, host, gpt_param_size(c, p));
            e->write(m, slot, p, l, host);
        }
        free(host);
    }
}

// Dies if the weights, configuration or tokenizer of one of our checkpoints do not match their
// sums: for callers that load nothing else. Returns its run's options, from malloc; NULL if it is
// not ours.
static inline char *checkpoint_check_weights(const char *dir) {
    char *path = xprintf("%s/trainer.json", dir), *options = NULL;
    FileMap map;
    Json doc;
    if (path_exists(path)) {
        const char *error = file_map(&map, path);
        if (!error) error = checkpoint_parse_trainer(&doc, map.data, map.size);
        if (error) die("this checkpoint is damaged: %s: %s", path, error);
        for (int i = 0; i < CHECKPOINT_ALL; i++) {
            char *file = xprintf("%s/%s", dir, checkpoint_file_of(checkpoint_is_adapter(&doc), i));
            // only the weights were copied
            const int left_out = i >= CHECKPOINT_FILES && !path_exists(file);
            const int needed = strcmp(checkpoint_file[i], "optimizer.safetensors") &&
                checkpoint_has_file(&doc, i) && !left_out;
            const char *wrong = needed ? checkpoint_verify_file(&doc, dir, i) : NULL;
            if (wrong) die("this checkpoint is damaged: %s", wrong);
            free(file);
        }
        if (checkpoint_is_adapter(&doc)) lora_check_base(&doc, dir);
        options = json_string(&doc, json_get(&doc, 0, "options"), NULL);
        json_free(&doc);
        file_unmap(&map);
    }
    free(path);
    return options;
}

// Loads the weights of a checkpoint, in any format of weights.h, into a model of
// checkpoint_read_config's sizes. A model with adapters gets the checkpoint's, if it has any;
// otherwise they are left unchanged.
static inline void checkpoint_load_weights(const char *from, const Engine *e, Model *m,
                                           const GptConfig *c) {
    Weights w;
    weights_open(&w, from);
    for (int p = 0; p < N_PARAMS; p++) {
        real *host = (real *)xcalloc(gpt_param_size(c, p), sizeof *host);
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            if (gpt_param[p].group == GROUP_ADAPTER && !weights_adapter_tensor(&w, c, p, l))
                continue;
            weights_read(&w, c, w.prefix, p, l, host);
            checkpoint_check_finite(&w, w.prefix, p, l, host, gpt_param_size(c, p));
            e->write(m, SLOT_PARAM, p, l, host);
        }
        free(host);
    }
    weights_close(&w);
}

// Reads trainer.json of one of our checkpoints into all of s but adamw_steps and eval_scale;
// s->options from malloc. Dies if it is damaged.
static inline void checkpoint_read_trainer(const char *dir, CheckpointState *s) {
    char *path = xprintf("%s/trainer.json", dir);
    FileMap map;
    const char *error = file_map(&map, path);
    if (!error) error = checkpoint_parse_state(s, map.data, map.size);
    if (error)
        die("this checkpoint is damaged: %s: %s\n"
            "  hint: --resume without a path takes the latest that is whole", path, error);
    file_unmap(&map);
    free(path);
}

// Loads one of our checkpoints into the model and s; the caller provides s->adamw_steps (2L+1);
// s->options from malloc. Dies if a file does not match its sum. s->frozen is the model's: layers
// that are no longer trained lose their moments, and newly trained ones start with none.
static inline void checkpoint_load(const char *dir, const Engine *e, Model *m, const GptConfig *c,
                                   CheckpointState *s) {
    char *wrong = checkpoint_verify(dir), *path;
    const int frozen = s->frozen;
    const char *error;
    Weights w;
    if (wrong)
        die("this checkpoint is damaged: %s\n  hint: --resume without a path takes the latest that "
            "is whole", wrong);
    checkpoint_read_trainer(dir, s);
    const int then = s->frozen, kept = then > frozen ? then : frozen;
    if (then > c->L) die("%s/trainer.json: %d frozen layers of a model of %d", dir, then, c->L);
    s->frozen = frozen;

    if (lora_is_adapter(dir)) free(checkpoint_check_weights(dir));       // its base
    checkpoint_load_weights(dir, e, m, c);
    path = xprintf("%s/optimizer.safetensors", dir);
    weights_open_file(&w, path, "--init-from takes the weights alone and starts at step 0");
    checkpoint_load_slot(e, m, c, SLOT_M, kept, &w, "m.");
    checkpoint_load_slot(e, m, c, SLOT_V, kept, &w, "v.");
    const SafetensorsEntry *steps = weights_find(&w, "adamw_steps");
    if (!steps || steps->count != (size_t)(BRANCHES * c->L + 1))
        die("%s: adamw_steps is missing or has another size", path);
    if ((error = safetensors_to_int64(steps, s->adamw_steps)))
        die("%s: adamw_steps: %s", path, error);
    for (int i = 0; i <= BRANCHES * c->L; i++)
        if (s->adamw_steps[i] < 0 || s->adamw_steps[i] > s->step)
            die("%s: adamw_steps has %lld, but the run did %lld steps", path,
                (long long)s->adamw_steps[i], (long long)s->step);
    for (int i = BRANCHES * frozen; i < BRANCHES * then; i++) s->adamw_steps[i] = 0;
    weights_close(&w);
    free(path);
    e->resumed(m, s->adamw_steps);
}

#endif
