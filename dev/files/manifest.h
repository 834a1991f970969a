// manifest.h: manifest.json, in which data/prepare.py describes the shards beside it: the
// tokenizer, and how many tokens and bytes of text each split has. From it a run learns its
// vocabulary size and refuses shards, tokenizers and models that do not belong together. Shards
// without a manifest are used unchecked. data/README.md lists its members.
#ifndef MANIFEST_H
#define MANIFEST_H

#include "../check.h"
#include "files.h"
#include "json.h"
#include "sha256.h"
#include "shards.h"
#include "tokenizer.h"
#include <stddef.h>

enum { MANIFEST_TRAIN, MANIFEST_VAL, MANIFEST_SIDES };
static const char *const manifest_side[MANIFEST_SIDES] = {"train", "val"};

typedef struct { char *file; int64_t tokens; } ManifestShard;

typedef struct {
    int V, eot;                                  // the tokenizer's; V = 0: there is no manifest
    char *tokenizer, *file, sha256[SHA256_HEX];  // its name; its file beside the shards, and that
                                                 // file's SHA-256
    int64_t tokens[MANIFEST_SIDES], bytes[MANIFEST_SIDES];   // bytes: of text
    ManifestShard *shard;                        // (shards) of both splits
    int shards;
    char *path;                                  // where it was read from; NULL after
                                                 // manifest_parse alone
    char error[160];
} Manifest;

static inline void manifest_free(Manifest *m) {
    for (int i = 0; i < m->shards; i++) free(m->shard[i].file);
    free(m->shard), free(m->tokenizer), free(m->file), free(m->path);
    memset(m, 0, offsetof(Manifest, error));
}

// ---- Parsing ----

static inline const char *manifest_fail(Manifest *m, const char *what, const char *key) {
    snprintf(m->error, sizeof m->error, "%s: \"%.100s\"", what, key);
    return m->error;
}

// Reads the count under a key, in [least, most]. Returns NULL, or what is wrong.
static inline const char *manifest_count(Manifest *m, const Json *doc, int object, const char *key,
                                         int64_t least, int64_t most, int64_t *out) {
    if (!json_int64(doc, json_get(doc, object, key), out))
        return manifest_fail(m, "missing, or no whole number", key);
    return *out < least || *out > most ? manifest_fail(m, "out of range", key) : NULL;
}

// Reads a file name within the manifest's own directory, from malloc. Returns NULL, or what is
// wrong.
static inline const char *manifest_name(Manifest *m, const Json *doc, int object, char **out) {
    *out = json_string(doc, json_get(doc, object, "file"), NULL);
    if (!*out) return manifest_fail(m, "missing, or no text", "file");
    return !**out || strchr(*out, '/') ? manifest_fail(m, "not a plain file name", *out) : NULL;
}

static inline const char *manifest_parse_tokenizer(Manifest *m, const Json *doc) {
    const int node = json_get(doc, 0, "tokenizer");
    int64_t V = 0, eot = 0;
    const char *error = manifest_count(m, doc, node, "vocab_size", 1, TOKENIZER_MAX, &V);
    if (!error) error = manifest_count(m, doc, node, "end_of_text", 0, V - 1, &eot);
    if (!error) error = manifest_name(m, doc, node, &m->file);
    if (error) return error;
    m->tokenizer = json_string(doc, json_get(doc, node, "name"), NULL);
    if (!m->tokenizer) return manifest_fail(m, "missing, or no text", "name");
    char *sum = json_string(doc, json_get(doc, node, "sha256"), NULL);
    const int ok = sum && strlen(sum) == SHA256_HEX - 1 &&
                   strspn(sum, "0123456789abcdef") == SHA256_HEX - 1;
    if (ok) memcpy(m->sha256, sum, SHA256_HEX);
    free(sum);
    if (!ok) return manifest_fail(m, "missing, or not 64 hex digits", "sha256");
    m->V = (int)V;
    m->eot = (int)eot;
    return NULL;
}

static inline const char *manifest_parse_side(Manifest *m, const Json *doc, int side) {
    const int node = json_get(doc, json_get(doc, 0, "splits"), manifest_side[side]),
        list = json_get(doc, node, "shards");
    const char *error = manifest_count(m, doc, node, "tokens", 0, INT64_MAX, &m->tokens[side]);
    if (!error) error = manifest_count(m, doc, node, "bytes", 0, INT64_MAX, &m->bytes[side]);
    if (!error && json_type(doc, list) != JSON_ARRAY)
        error = manifest_fail(m, "missing, or no list", "shards");
    if (error) return error;
    m->shard = (ManifestShard *)xrealloc(m->shard, (size_t)m->shards + (size_t)json_count(doc,
        list), sizeof *m->shard);
    int64_t left = m->tokens[side];
    for (int k = json_first(doc, list); k >= 0; k = json_next(doc, k)) {
        ManifestShard *s = &m->shard[m->shards++];
        s->tokens = 0;
        if ((error = manifest_name(m, doc, k, &s->file))) return error;
        if ((error = manifest_count(m, doc, k, "tokens", 1, left, &s->tokens))) return error;
        left -= s->tokens;
    }
    return left ? manifest_fail(m, "not the sum of its shards' tokens", manifest_side[side]) : NULL;
}

// Parses a manifest of `size` bytes at mem and keeps no pointer into it. Returns NULL, or what is
// wrong (the message may be stored in *m; nothing needs to be freed).
static inline const char *manifest_parse(Manifest *m, const void *mem, size_t size) {
    Json doc;
    memset(m, 0, sizeof *m);
    const char *error = json_parse(&doc, mem, size);
    if (error) {
        snprintf(m->error, sizeof m->error, "no valid JSON: %s", error);
        return m->error;
    }
    if (!json_equals(&doc, json_get(&doc, 0, "format"), "droppath.c token shards 1"))
        error = manifest_fail(m, "not a manifest of this version of data/prepare.py", "format");
    if (!error) error = manifest_parse_tokenizer(m, &doc);
    for (int side = 0; side < MANIFEST_SIDES && !error; side++)
        error = manifest_parse_side(m, &doc, side);
    json_free(&doc);
    if (error) manifest_free(m);
    return error;
}

// ---- Finding a manifest, and refusing what does not belong together ----

// Reads the manifest in the directory of the first of the comma-separated patterns; V = 0 if there
// is none. Dies if it is damaged.
static inline void manifest_find(Manifest *m, const char *shards_pattern) {
    size_t n = strcspn(shards_pattern, ",");
    while (n > 0 && shards_pattern[n - 1] != '/') n--;
    char *path = xprintf("%.*smanifest.json", (int)n, shards_pattern);
    memset(m, 0, sizeof *m);
    if (path_exists(path)) {
        FileMap map;
        const char *error = file_map(&map, path);
        if (error) die("cannot read %s: %s", path, error);
        error = manifest_parse(m, map.data, map.size);
        if (error)
            die("%s: %s\n  hint: without this file the shards are used as they are", path, error);
        file_unmap(&map);
        m->path = path;
    } else free(path);
}

// Checks that the tokenizer file at `path` is the one that made the shards: by its SHA-256 if the
// manifest names that file, else by its size and end-of-text token.
static inline void manifest_check_tokenizer(const Manifest *m, const Tokenizer *t,
                                            const char *path) {
    if (!m->V) return;
    const char *slash = strrchr(path, '/');
    char hex[SHA256_HEX];
    int same = t->V == m->V && t->eot == m->eot;
    if (same && !strcmp(slash ? slash + 1 : path, m->file)) {
        FileMap map;
        const char *error = file_map(&map, path);
        if (error) die("cannot read %s: %s", path, error);
        sha256_hex(hex, map.data, map.size);
        same = !strcmp(hex, m->sha256);
        file_unmap(&map);
    }
    if (!same)
        die("%s is not the tokenizer of the shards: %s says %s, of %d tokens\n  hint: --tokenizer "
            "names another file", path, m->path, m->tokenizer, m->V);
}

// Training and validation shards must come from one tokenizer. Either may lack a manifest.
static inline void manifest_check_pair(const Manifest *train, const Manifest *val) {
    if (train->V && val->V && strcmp(train->sha256, val->sha256))
        die("--train and --val have different tokenizers: %s, of %d tokens (%s), and %s, of %d "
            "tokens (%s)\n"
            "  hint: make both with the same tokenizer: data/README.md", train->tokenizer, train->V,
            train->path, val->tokenizer, val->V, val->path);
}

// Checks that a model of V tokens fits; `from` is the directory of its weights, or NULL for a fresh
// model. A fresh model needs at least the tokenizer's tokens; loaded weights may exceed them only
// by padding to a multiple of 128. Our checkpoints record their tokenizer's SHA-256.
static inline void manifest_check_model(const Manifest *m, int V, const char *from) {
    if (!m->V) return;
    if (V < m->V || (from && V - m->V >= 128))
        die("%s has %d tokens, but the shards' tokenizer %s has %d (%s)\n  hint: %s",
            from ? from : "--vocab-size", V, m->tokenizer, m->V, m->path,
            from ? "make the shards with the model's tokenizer" : "leave it out");
    char *path = xprintf("%s/config.json", from ? from : "");
    FileMap map;
    Json doc;
    if (from && !file_map(&map, path)) {
        const char *error = json_parse(&doc, map.data, map.size);
        if (error) die("%s: %s", path, error);
        const int sum = json_get(&doc, 0, "tokenizer_sha256");
        if (sum >= 0 && !json_equals(&doc, sum, m->sha256))
            die("%s was trained with another tokenizer than the shards', %s (%s)\n"
                "  hint: take the shards that it was trained on, or train a new model", from,
                m->tokenizer, m->path);
        json_free(&doc);
        file_unmap(&map);
    }
    free(path);
}

// Opened shards in the manifest's directory must be listed in it, with the same number of tokens.
static inline void manifest_check_shards(const Manifest *m, const Shards *shards) {
    if (!m->V) return;
    // up to and including the directory's slash
    const size_t n = strlen(m->path) - strlen("manifest.json");
    for (int i = 0; i < shards->n; i++) {
        const char *path = shards->file[i].path;
        if (strncmp(path, m->path, n) || strchr(path + n, '/')) continue;
        int k = 0;
        while (k < m->shards && strcmp(m->shard[k].file, path + n)) k++;
        if (k == m->shards || m->shard[k].tokens != shards->file[i].shard.count)
            die("%s is not a shard that %s lists\n  hint: keep other shards in another directory",
                path, m->path);
    }
}

// Bits per byte for a mean loss in nats per token over that split, when no tokenizer file gives the
// bytes of each token. It uses the mean bytes per token, so it is exact only if the whole split was
// evaluated. NaN without a manifest.
static inline double manifest_bits_per_byte(const Manifest *m, int side, double loss) {
    return m->V && m->bytes[side] ? loss / 0.69314718055994530942 * (double)m->tokens[side] /
        (double)m->bytes[side] : NAN;
}

#endif
