// tokenizer_json.h: writes our tokenizer as Hugging Face's tokenizer.json and
// tokenizer_config.json, which AutoTokenizer opens, and collects the tokenizer files that belong
// beside a model's weights.
#ifndef TOKENIZER_JSON_H
#define TOKENIZER_JSON_H

#include "files.h"
#include "json.h"
#include "tokenizer.h"

// GPT-2's alphabet inverted: the UTF-8 character that stands for each byte.
static inline void tokenizer_json_alphabet(char written[256][5]) {
    int byte[TOKENIZER_ALPHABET];
    tokenizer_alphabet(byte);
    memset(written, 0, 256 * sizeof written[0]);
    for (int c = 0; c < TOKENIZER_ALPHABET; c++)
        if (byte[c] >= 0) json_utf8_encode((uint32_t)c, written[byte[c]]);
}

// A token as written in the vocabulary: in that alphabet; end-of-text by its name. From malloc.
static inline char *tokenizer_json_token(const Tokenizer *t, char written[256][5], int token) {
    int n;
    const char *bytes = tokenizer_bytes(t, token, &n);
    Text s = {NULL, 0, 0};
    if (token == t->eot) text_append(&s, bytes, (size_t)n);
    else for (int i = 0; i < n; i++) text_printf(&s, "%s", written[(unsigned char)bytes[i]]);
    return s.s;
}

// The two tokens whose merge produces `token`: what the merges of lower tokens leave of its bytes.
// Returns 0 if that is not two tokens, so no merge produces it. This is how tiktoken's ranks become
// merges (Hugging Face converts its vocabularies the same way).
static inline int tokenizer_json_merge(const Tokenizer *t, int token, int *pieces, int pair[2]) {
    int n;
    const char *bytes = tokenizer_bytes(t, token, &n);
    for (int i = 0; i < n; i++) {
        pieces[i] = t->slot[tokenizer_slot(t, bytes + i, 1, bytes, 0)] - 1;
        if (pieces[i] < 0) return 0;
    }
    while (n > 2) {
        int at = -1, lowest = token;
        for (int i = 0; i + 1 < n; i++) {
            const int made = tokenizer_pair(t, pieces[i], pieces[i + 1]);
            if (made >= 0 && made < lowest) lowest = made, at = i;
        }
        if (at < 0) return 0;
        pieces[at] = lowest;
        memmove(pieces + at + 1, pieces + at + 2, (size_t)(n - at - 2) * sizeof *pieces);
        n--;
    }
    if (n < 2) return 0;
    memcpy(pair, pieces, 2 * sizeof *pair);
    return 1;
}

// Whether two tokens have the same spelling, which a JSON object cannot represent.
static inline int tokenizer_json_ambiguous(const Tokenizer *t) {
    for (int token = 0; token < t->V; token++) {
        int n;
        const char *bytes = tokenizer_bytes(t, token, &n);
        if (token != t->eot && t->slot[tokenizer_slot(t, bytes, n, bytes, 0)] != token + 1)
            return 1;
    }
    return 0;
}

// The name of end-of-text is written literally: it must be UTF-8 without a NUL, and no other token
// may be spelled the same. Returns NULL, or why that is impossible.
static inline const char *tokenizer_json_end_error(const Tokenizer *t, char written[256][5]) {
    int n, same = 0;
    if (t->eot < 0) return NULL;
    const char *bytes = tokenizer_bytes(t, t->eot, &n);
    for (int i = 0, length; i < n; i += length)
        if (!bytes[i] || !(length = json_utf8_length(bytes + i, bytes + n)))
            return "its end-of-text token is not UTF-8 text";
    for (int token = 0; token < t->V && !same; token++) {
        char *name = token != t->eot ? tokenizer_json_token(t, written, token) : NULL;
        same = name && strlen(name) == (size_t)n && !memcmp(name, bytes, (size_t)n);
        free(name);
    }
    return same ? "its end-of-text token is spelled like another token" : NULL;
}

// Appends the tokenizer.json. Returns NULL, or why there can be none.
static inline const char *tokenizer_json_write(Text *out, const Tokenizer *t) {
    static const char byte_level[] =
        "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, "
        "\"use_regex\": true}";
    char written[256][5];
    if (t->decode_only) return "it does not specify how text is split";
    if (tokenizer_json_ambiguous(t)) return "two of its tokens have the same bytes";
    tokenizer_json_alphabet(written);
    const char *error = tokenizer_json_end_error(t, written);
    if (error) return error;
    text_printf(out, "{\n\"version\": \"1.0\", \"truncation\": null, \"padding\": "
                "null,\n\"added_tokens\": [");
    if (t->eot >= 0) {
        char *name = tokenizer_json_token(t, written, t->eot);
        text_printf(out, "{\"id\": %d, \"content\": ", t->eot);
        json_write_string(out, name);
        text_printf(out, ", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, "
                    "\"normalized\": false, \"special\": true}");
        free(name);
    }
    text_printf(out, "],\n\"normalizer\": null,\n\"pre_tokenizer\": %s,\n\"post_processor\": "
                "null,\n\"decoder\": %s,\n", byte_level, byte_level);
    text_printf(out, "\"model\": {\"type\": \"BPE\", \"dropout\": null, \"unk_token\": null, "
                "\"continuing_subword_prefix\": \"\", \"end_of_word_suffix\": \"\", \"fuse_unk\": "
                "false, \"byte_fallback\": false,\n\"vocab\": {");
    for (int token = 0; token < t->V; token++) {
        char *name = tokenizer_json_token(t, written, token);
        text_printf(out, token ? ",\n" : "\n");
        json_write_string(out, name);
        text_printf(out, ": %d", token);
        free(name);
    }
    text_printf(out, "},\n\"merges\": [");
    int *pieces = (int *)xcalloc(t->bytes.n + 1, sizeof *pieces), pair[2], merges = 0;
    for (int token = 0; token < t->V; token++) {
        if (token == t->eot || !tokenizer_json_merge(t, token, pieces, pair)) continue;
        char *a = tokenizer_json_token(t, written, pair[0]),
            *b = tokenizer_json_token(t, written, pair[1]);
        char *line = xprintf("%s %s", a, b);
        text_printf(out, merges++ ? ",\n" : "\n");
        json_write_string(out, line);
        free(a), free(b), free(line);
    }
    text_printf(out, "]}\n}\n");
    free(pieces);
    return NULL;
}

// Appends the tokenizer_config.json of a model with T positions; eot is the name of the end-of-text
// token, or NULL.
static inline void tokenizer_json_config(Text *out, int T, const char *eot) {
    static const char *const role[3] = {"bos_token", "eos_token", "unk_token"};
    text_printf(out, "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n  "
                "\"clean_up_tokenization_spaces\": false");
    for (int i = 0; eot && i < 3; i++) {
        text_printf(out, ",\n  \"%s\": ", role[i]);
        json_write_string(out, eot);
    }
    text_printf(out, ",\n  \"model_max_length\": %d\n}\n", T);
}

// ---- Reading one: only enough to identify it ----

// Reads a tokenizer.json: *last is its highest token, *eot_name the name of token eot (from malloc)
// or NULL. Returns NULL, or an error message from malloc; then nothing else needs to be freed.
static inline char *tokenizer_json_read(const void *mem, size_t size, int eot, int64_t *last,
                                        char **eot_name) {
    Json doc;
    int64_t id = 0;
    *last = -1, *eot_name = NULL;
    const char *error = json_parse(&doc, mem, size);
    if (error) return xprintf("no valid JSON: %s", error);
    const int model = json_get(&doc, 0, "model"), added = json_get(&doc, 0, "added_tokens");
    const int vocab = json_get(&doc, model, "vocab");
    if (json_type(&doc, model) != JSON_OBJECT) error = "it has no \"model\"";
    for (int k = json_first(&doc, vocab); !error && k >= 0 && json_type(&doc, vocab) == JSON_OBJECT;
         k = json_next(&doc, k)) {
        if (!json_int64(&doc, k + 1, &id)) continue;
        if (id > *last) *last = id;
        if (id == eot && !*eot_name) *eot_name = json_string(&doc, k, NULL);
    }
    for (int k = json_first(&doc, added); !error && k >= 0; k = json_next(&doc, k)) {
        if (!json_int64(&doc, json_get(&doc, k, "id"), &id)) continue;
        if (id > *last) *last = id;
        if (id != eot) continue;
        free(*eot_name);
        *eot_name = json_string(&doc, json_get(&doc, k, "content"), NULL);
    }
    json_free(&doc);
    return error ? xstrdup(error) : NULL;
}

// The name of end-of-text, from malloc, or NULL.
static inline char *tokenizer_json_eot_name(const Tokenizer *t) {
    int n = 0;
    const char *bytes = t->eot >= 0 ? tokenizer_bytes(t, t->eot, &n) : NULL;
    return bytes ? xprintf("%.*s", n, bytes) : NULL;
}

// ---- The files beside a model's weights: the one our tools read, and Hugging Face's two ----

#define TOKENIZER_FILE_NAMES \
    "tokenizer.bin", "vocab.json", "tokenizer.json", "tokenizer_config.json"
enum { TOKENIZER_BIN, TOKENIZER_VOCAB, TOKENIZER_JSON, TOKENIZER_CONFIG, TOKENIZER_FILES };

// an empty text: there is no such file
typedef struct { Text file[TOKENIZER_FILES]; } TokenizerFiles;

static inline void tokenizer_files_free(TokenizerFiles *f) {
    for (int i = 0; i < TOKENIZER_FILES; i++) text_free(&f->file[i]);
}

// Appends a file's contents; returns NULL, or errno's text.
static inline const char *tokenizer_file_append(Text *t, const char *path) {
    FileMap map;
    const char *error = file_map(&map, path);
    if (!error && map.size) text_append(t, map.data, map.size);
    file_unmap(&map);
    return error;
}

// Which of the names a tokenizer file of ours has beside weights.
static inline int tokenizer_file_kind(const Text *t) {
    return t->n >= 4 && llmc_word((const unsigned char *)t->s, 0) == TOKENIZER_MAGIC ? TOKENIZER_BIN
        : TOKENIZER_VOCAB;
}

// Collects the files of tokenizer t, read from `path` (both NULL: we have none), for a model of V
// tokens and T positions with end-of-text token eot (-1: none). A tokenizer.json in the directory
// `beside` (ending in a slash, or "") carries more than ours and is copied; otherwise one is
// generated from t. Returns NULL or, from malloc, why there is no tokenizer.json.
static inline char *tokenizer_files_take(TokenizerFiles *f, const Tokenizer *t, const char *path,
                                         const char *beside, int V, int T, int eot) {
    char *json = xprintf("%stokenizer.json", beside), *name = NULL, *wrong = NULL;
    Text ours = {NULL, 0, 0}, *whole = &f->file[TOKENIZER_JSON];
    int64_t last = -1;
    memset(f, 0, sizeof *f);
    const char *error = path ? tokenizer_file_append(&ours, path) : NULL;
    if (error) die("cannot read %s: %s", path, error);
    if (ours.n) f->file[tokenizer_file_kind(&ours)] = ours;
    if (path_exists(json)) {
        char *bad = NULL;
        error = tokenizer_file_append(whole, json);
        if (!error)
            error = bad = tokenizer_json_read(whole->s ? whole->s : "", whole->n, eot, &last,
                                              &name);
        if (!error && last >= V) error = "it has more tokens than the model";
        if (error) text_free(whole), wrong = xprintf("%s: %s", json, error);
        free(bad);
    }
    if (!whole->n && t) {
        free(name);
        name = tokenizer_json_eot_name(t);
        error = tokenizer_json_write(whole, t);
        if (error) text_free(whole);
        if (error && !wrong) wrong = xprintf("%s: %s", path, error);
    }
    if (whole->n) tokenizer_json_config(&f->file[TOKENIZER_CONFIG], T, name);
    free(json), free(name);
    return wrong;
}

#endif
