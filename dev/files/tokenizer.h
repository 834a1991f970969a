// tokenizer.h: converts between tokens and bytes, with a tokenizer file in one of two formats:
//
//     tokenizer.bin   llm.c's: 256 words of 32 bits, little-endian (magic 20240328, version 2,
//                     number of tokens, end-of-text token), then each token as one byte of length,
//                     1 to 255, and its bytes. Version 1 is GPT-2's only and does not name its
//                     end-of-text token, 50256. Version 3 is ours: another header word is 1 if text
//                     is not split as GPT-2 splits it, and lengths have 32 bits
//     vocab.json      GPT-2's, also called encoder.json: {"token": id, ...}, with bytes written in
//                     GPT-2's alphabet
//
// Merges need no file of their own: the rank of a merge is the id of the token that it produces, as
// in tiktoken. That holds for GPT-2, whose ids follow the order in which its merges were learned.
#ifndef TOKENIZER_H
#define TOKENIZER_H

#include "../check.h"
#include "files.h"
#include "json.h"
#include "shards.h"                                      // llm.c's header

#define TOKENIZER_EOT "<|endoftext|>"

enum { TOKENIZER_MAGIC = 20240328, TOKENIZER_MAX = 1 << 24, TOKENIZER_LONGEST = 1 << 20 };

typedef struct {
    int V, eot;         // tokens; the end-of-text token, or -1
    int decode_only;    // text is split or normalized differently from GPT-2: tokenizer_encode
                        // would be wrong
    Text bytes;         // of all tokens, concatenated
    size_t *start;      // (V+1) token i is bytes[start[i]] to bytes[start[i+1] - 1]
    int *slot;          // (slots) hash table from bytes to 1 + token; 0 is a free slot
    size_t slots;       // a power of two, at least 2V
    char error[160];    // holds a message composed by tokenizer_parse
} Tokenizer;

static inline void tokenizer_free(Tokenizer *t) {
    text_free(&t->bytes);
    free(t->start);
    free(t->slot);
    t->start = NULL;
    t->slot = NULL;
    t->V = 0;
}

// The bytes of a token in [0, V): *n of them, not NUL-terminated. For end-of-text, the bytes of its
// name.
static inline const char *tokenizer_bytes(const Tokenizer *t, int token, int *n) {
    CHECK(0 <= token && token < t->V, "token %d of %d", token, t->V);
    *n = (int)(t->start[token + 1] - t->start[token]);
    return t->bytes.s + t->start[token];
}

// The number of text bytes a token stands for, as bits per byte counts them: 0 for end-of-text.
static inline int tokenizer_text_length(const Tokenizer *t, int token) {
    int n;
    tokenizer_bytes(t, token, &n);
    return token == t->eot ? 0 : n;
}

// ---- From bytes to tokens: a hash table with linear probing ----

static inline uint64_t tokenizer_hash(uint64_t hash, const char *bytes, int n) {   // FNV-1a
    for (int i = 0; i < n; i++) hash = (hash ^ (unsigned char)bytes[i]) * 1099511628211u;
    return hash;
}

// The slot of the token whose bytes are a (an) followed by b (bn), or the free slot for it.
static inline size_t tokenizer_slot(const Tokenizer *t, const char *a, int an, const char *b,
                                    int bn) {
    size_t i = (size_t)tokenizer_hash(tokenizer_hash(14695981039346656037u, a, an), b, bn);
    for (;; i++) {
        i &= t->slots - 1;
        if (!t->slot[i]) return i;
        int n;
        const char *bytes = tokenizer_bytes(t, t->slot[i] - 1, &n);
        if (n == an + bn && !memcmp(bytes, a, (size_t)an) && !memcmp(bytes + an, b, (size_t)bn))
            return i;
    }
}

// The token whose bytes are those of token a followed by those of token b; -1 if there is none.
static inline int tokenizer_pair(const Tokenizer *t, int a, int b) {
    int an, bn;
    const char *a_bytes = tokenizer_bytes(t, a, &an), *b_bytes = tokenizer_bytes(t, b, &bn);
    return t->slot[tokenizer_slot(t, a_bytes, an, b_bytes, bn)] - 1;
}

// Builds the table once all tokens are known. End-of-text is left out: text never encodes to it.
static inline void tokenizer_index(Tokenizer *t) {
    for (t->slots = 2; t->slots < 2 * (size_t)t->V; t->slots *= 2) {}
    t->slot = (int *)xcalloc(t->slots, sizeof *t->slot);
    for (int token = 0; token < t->V; token++) {
        int n;
        const char *bytes = tokenizer_bytes(t, token, &n);
        int *slot = &t->slot[tokenizer_slot(t, bytes, n, bytes, 0)];
        // of duplicates the first, which has the lower rank
        if (token != t->eot && !*slot) *slot = token + 1;
    }
}

// ---- Reading ----

static inline void tokenizer_add(Tokenizer *t, const char *bytes, size_t n) {
    text_append(&t->bytes, bytes, n);
    t->start[++t->V] = t->bytes.n;
}

static inline const char *tokenizer_parse_llmc(Tokenizer *t, const unsigned char *p, size_t size) {
    const char *cut = "cut short: its header counts more tokens than it holds";
    if (size < LLMC_HEADER_BYTES) return "cut short: a tokenizer file has a header of 1024 bytes";
    uint32_t version = llmc_word(p, 1), V = llmc_word(p, 2),
        eot = version == 1 ? 50256 : llmc_word(p, 3);
    if (version < 1 || version > 3) return "a tokenizer file of an unknown version";
    const size_t prefix = version == 3 ? 4 : 1;          // bytes per token length
    if (V > TOKENIZER_MAX) return "a tokenizer file with more than 16777216 tokens";
    // each has at least one byte: bounds the allocation
    if (V > (size - LLMC_HEADER_BYTES) / (prefix + 1)) return cut;
    if (eot >= V) return "its end-of-text token is outside its vocabulary";
    if (version == 3 && llmc_word(p, 4) > 1)
        return "a tokenizer file with an unknown text-splitting flag";
    t->decode_only = version == 3 && llmc_word(p, 4);
    t->eot = (int)eot;
    t->start = (size_t *)xcalloc((size_t)V + 1, sizeof *t->start);
    size_t at = LLMC_HEADER_BYTES;
    for (uint32_t i = 0; i < V; i++) {
        if (size - at < prefix) return cut;
        size_t n = 0;
        for (size_t b = 0; b < prefix; b++) n |= (size_t)p[at++] << 8 * b;
        if (n == 0) return "damaged: a token without bytes";
        if (n > size - at) return cut;
        if (n > TOKENIZER_LONGEST) return "damaged: a token of more than 1 MiB";
        tokenizer_add(t, (const char *)p + at, n);
        at += n;
    }
    return at < size ? "damaged: bytes follow its last token" : NULL;
}

// GPT-2's alphabet (bytes_to_unicode in its encoder.py): a byte that is printable in Latin-1 is
// written as that character, the other 68, in order, as U+0100, U+0101, ... byte[c] is the byte of
// character c, or -1.
enum { TOKENIZER_ALPHABET = 256 + 68 };

static inline void tokenizer_alphabet(int byte[TOKENIZER_ALPHABET]) {
    for (int c = 0; c < TOKENIZER_ALPHABET; c++) byte[c] = -1;
    for (int b = 0, others = 256; b < 256; b++) {
        int prints = (b >= 33 && b <= 126) || (b >= 161 && b != 173);
        byte[prints ? b : others++] = b;
    }
}

// Converts s (n bytes of valid UTF-8) from that alphabet to bytes, in place. Returns the number of
// bytes; 0 if a character is not in the alphabet.
static inline size_t tokenizer_written(const int byte[TOKENIZER_ALPHABET], char *s, size_t n) {
    size_t m = 0;
    for (size_t i = 0; i < n; m++) {
        unsigned char lead = (unsigned char)s[i++];
        int c = lead < 0x80 ? lead : lead < 0xE0 ? (lead & 31) << 6 | (s[i++] & 63)
            : TOKENIZER_ALPHABET;
        if (c >= TOKENIZER_ALPHABET || byte[c] < 0) return 0;
        s[m] = (char)byte[c];                            // in place: m < i
    }
    return m;
}

// Reads the tokens from a JSON object in which node key[i] - 1 is the key of token i.
static inline const char *tokenizer_read_keys(Tokenizer *t, const Json *doc, const int *key,
                                              int V) {
    int byte[TOKENIZER_ALPHABET];
    tokenizer_alphabet(byte);
    t->start = (size_t *)xcalloc((size_t)V + 1, sizeof *t->start);
    for (int i = 0; i < V; i++) {
        if (json_equals(doc, key[i] - 1, TOKENIZER_EOT)) t->eot = i;
        size_t n = 0;
        char *s = json_string(doc, key[i] - 1, &n);
        n = tokenizer_written(byte, s, n);
        if (n) tokenizer_add(t, s, n);
        free(s);
        if (n) continue;
        snprintf(t->error, sizeof t->error, "token %d is not written in GPT-2's alphabet", i);
        return t->error;
    }
    return NULL;
}

static inline const char *tokenizer_parse_json(Tokenizer *t, const void *mem, size_t size) {
    Json doc;
    const char *error = json_parse(&doc, mem, size);
    if (error) {
        snprintf(t->error, sizeof t->error, "no valid JSON: %s", error);
        return t->error;
    }
    int V = json_count(&doc, 0), *key = (int *)xcalloc((size_t)V, sizeof *key);
    if (V > TOKENIZER_MAX) error = "a vocabulary of more than 16777216 tokens";
    if (V == 0) error = "a vocabulary without tokens";
    if (json_type(&doc, json_get(&doc, 0, "model")) == JSON_OBJECT)
        error = "not a vocab.json but a tokenizer.json; data/prepare.py converts it to "
            "tokenizer.bin";
    for (int k = json_first(&doc, 0); k >= 0 && !error; k = json_next(&doc, k)) {
        int64_t id;
        if (!json_int64(&doc, k + 1, &id)) error = "not a vocab.json: a value is not an integer";
        else if (id < 0 || id >= V || key[id])
            error = "not a vocab.json: its ids are not exactly 0, 1, 2, ...";
        else key[id] = k + 1;
    }
    if (!error) error = tokenizer_read_keys(t, &doc, key, V);
    free(key);
    json_free(&doc);
    return error;
}

// Parses a tokenizer file of `size` bytes at mem and keeps no pointer into it. Returns NULL, or
// what is wrong (the message may be stored in *t; nothing needs to be freed).
static inline const char *tokenizer_parse(Tokenizer *t, const void *mem, size_t size) {
    const unsigned char *p = (const unsigned char *)mem;
    const char *error;
    memset(t, 0, sizeof *t);
    t->eot = -1;
    // a byte-order mark, before JSON
    if (size >= 3 && !memcmp(p, "\xEF\xBB\xBF", 3)) p += 3, size -= 3;
    if (lfs_pointer_error(p, size)) error = lfs_pointer_error(p, size);
    else if (size >= 4 && llmc_word(p, 0) == TOKENIZER_MAGIC)
        error = tokenizer_parse_llmc(t, p, size);
    else if (size >= 1 && p[0] == '{') error = tokenizer_parse_json(t, p, size);
    else if (size >= 2 && p[0] == 0x1F && p[1] == 0x8B) error = "compressed: gunzip it first";
    else error = "not a tokenizer file: neither llm.c's tokenizer.bin nor GPT-2's vocab.json";
    if (error) tokenizer_free(t);
    else tokenizer_index(t);
    return error;
}

// ---- Whether a tokenizer.json calls for an encoding that differs from tokenizer_encode ----

// Whether a member is present and is neither null, false, "" nor an empty object or array.
static inline int tokenizer_has(const Json *d, int object, const char *name) {
    const int node = json_get(d, object, name), type = json_type(d, node);
    if (type == JSON_OBJECT && json_equals(d, json_get(d, node, "type"), "Sequence"))
        return json_count(d, json_get(d, node, "normalizers")) > 0;
    if (type == JSON_OBJECT || type == JSON_ARRAY) return json_count(d, node) > 0;
    return type == JSON_TRUE || type == JSON_NUMBER ||
        (type == JSON_STRING && !json_equals(d, node, ""));
}

// Whether the merges ("a b" or ["a", "b"]) are in the order of the ids of the tokens that they
// produce, which serve as ranks here.
static inline int tokenizer_merges_in_order(const Tokenizer *t, const Json *d, int merges) {
    int byte[TOKENIZER_ALPHABET], last = -1, ok = 1;
    tokenizer_alphabet(byte);
    for (int k = json_first(d, merges); k >= 0 && ok; k = json_next(d, k)) {
        const int pair = json_type(d, k) == JSON_ARRAY, first = pair ? json_first(d, k) : k;
        size_t an = 0, bn = 0;
        char *a = json_string(d, first, &an), *b = pair &&
            first >= 0 ? json_string(d, json_next(d, first), &bn) : NULL;
        char *space = a && !pair ? (char *)memchr(a, ' ', an) : NULL, *second = b;
        if (space) second = space + 1, bn = an - (size_t)(second - a), an = (size_t)(space - a);
        ok = a && second && (an = tokenizer_written(byte, a, an)) > 0 &&
            (bn = tokenizer_written(byte, second, bn)) > 0;
        const int token = ok ? t->slot[tokenizer_slot(t, a, (int)an, second, (int)bn)] - 1 : -1;
        ok = ok && token > last;
        last = token;
        free(a), free(b);
    }
    return ok;
}

// Mirrors differs_from_gpt2 in data/vocabulary.py.
static inline int tokenizer_json_differs(const Tokenizer *t, const Json *d) {
    static const char *const odd[] = {"dropout", "ignore_merges", "byte_fallback",
                                      "continuing_subword_prefix",
                                      "end_of_word_suffix"};
    const int model = json_get(d, 0, "model"), type = json_get(d, model, "type"),
        added = json_get(d, 0, "added_tokens");
    int splits = json_get(d, 0, "pre_tokenizer"), differs = tokenizer_has(d, 0, "normalizer");
    if (type >= 0 && !json_equals(d, type, "BPE")) return 1;
    while (json_equals(d, json_get(d, splits, "type"), "Sequence") &&
           json_count(d, json_get(d, splits, "pretokenizers")) == 1)
        splits = json_first(d, json_get(d, splits, "pretokenizers"));
    if (!json_equals(d, json_get(d, splits, "type"), "ByteLevel")) return 1;
    differs |= json_type(d, json_get(d, splits, "add_prefix_space")) != JSON_FALSE;
    differs |= json_type(d, json_get(d, splits, "use_regex")) == JSON_FALSE;
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++)
        differs |= tokenizer_has(d, model, odd[i]);
    for (int k = json_first(d, added); k >= 0; k = json_next(d, k)) {
        int64_t id = -1;
        json_int64(d, json_get(d, k, "id"), &id);
        differs |= json_type(d, json_get(d, k, "special")) != JSON_TRUE && id != t->eot;
    }
    return differs || !tokenizer_merges_in_order(t, d, json_get(d, model, "merges"));
}

// Checks the tokenizer.json beside a tokenizer file: the model was trained with it, so ours must
// agree.
static inline void tokenizer_look_beside(Tokenizer *t, const char *path) {
    const char *slash = strrchr(path, '/');
    char *beside = xprintf("%.*stokenizer.json", slash ? (int)(slash + 1 - path) : 0, path);
    FileMap map;
    Json doc;
    if (!t->decode_only && path_exists(beside) && !file_map(&map, beside)) {
        if (lfs_pointer_error(map.data, map.size))
            die("%s: %s", beside, lfs_pointer_error(map.data, map.size));
        if (!json_parse(&doc, map.data ? (const void *)map.data : "", map.size)) {
            if (json_type(&doc, json_get(&doc, 0, "model")) == JSON_OBJECT)
                t->decode_only = tokenizer_json_differs(t, &doc);
            json_free(&doc);
        }
        file_unmap(&map);
    }
    free(beside);
}

// Reads a tokenizer file, or dies. A tokenizer.json beside it decides how text is split. End with
// tokenizer_free().
static inline void tokenizer_load(Tokenizer *t, const char *path) {
    FileMap map;
    const char *error = file_map(&map, path);
    if (error)
        die("cannot read %s: %s\n  hint: data/README.md lists the tokenizer files that can be read",
            path, error);
    error = tokenizer_parse(t, map.data, map.size);
    if (error) die("%s: %s", path, error);
    file_unmap(&map);
    tokenizer_look_beside(t, path);
}

// The tokenizer file in the directory of the first of the comma-separated patterns: a path from
// malloc, or NULL.
static inline char *tokenizer_find(const char *shards_pattern) {
    static const char *const names[3] = {"tokenizer.bin", "vocab.json", "encoder.json"};
    size_t n = strcspn(shards_pattern, ",");
    while (n > 0 && shards_pattern[n - 1] != '/') n--;
    for (int i = 0; i < 3; i++) {
        char *path = xprintf("%.*s%s", (int)n, shards_pattern, names[i]);
        if (path_exists(path)) return path;
        free(path);
    }
    return NULL;
}

// ---- Encoding ----

enum { TOKENIZER_SPACE, TOKENIZER_LETTER, TOKENIZER_DIGIT, TOKENIZER_OTHER };

static inline int tokenizer_class(char c) {
    unsigned char u = (unsigned char)c;
    if (u == ' ' || (u >= '\t' && u <= '\r')) return TOKENIZER_SPACE;
    if (u >= 128 || ((u | 32) >= 'a' && (u | 32) <= 'z')) return TOKENIZER_LETTER;
    return u >= '0' && u <= '9' ? TOKENIZER_DIGIT : TOKENIZER_OTHER;
}

// The length of the first piece of s (n >= 1 bytes). Merges stay within pieces, which GPT-2 splits
// by
//     's|'t|'re|'ve|'m|'ll|'d| ?letters+| ?digits+| ?others+|\s+(?!\S)|\s+
static inline size_t tokenizer_piece(const char *s, size_t n) {
    static const char *const endings[7] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (int i = 0; i < 7; i++)
        if (strlen(endings[i]) <= n && !memcmp(s, endings[i], strlen(endings[i])))
            return strlen(endings[i]);
    // that space belongs to the word
    size_t first = n > 1 && s[0] == ' ' && tokenizer_class(s[1]) != TOKENIZER_SPACE;
    size_t end = first + 1;
    while (end < n && tokenizer_class(s[end]) == tokenizer_class(s[first])) end++;
    // as does the last of several
    if (tokenizer_class(s[first]) == TOKENIZER_SPACE && end < n && end > 1) end--;
    return end;
}

// Merges tokens (m) in place, always the pair that yields the lowest token, leftmost first, until
// no pair merges. Returns the number of tokens left. `made` (m) is workspace: the token that each
// would form with its right neighbour.
static inline size_t tokenizer_merge(const Tokenizer *t, int *tokens, int *made, size_t m) {
    for (size_t i = 0; i + 1 < m; i++) made[i] = tokenizer_pair(t, tokens[i], tokens[i + 1]);
    while (m > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < m; i++)
            if ((unsigned)made[i] < (unsigned)made[best]) best = i;   // -1 (none) compares highest
        if (made[best] < 0) break;
        tokens[best] = made[best];
        m--;
        memmove(tokens + best + 1, tokens + best + 2, (m - best - 1) * sizeof *tokens);
        memmove(made + best, made + best + 1, (m - best) * sizeof *made);
        if (best > 0) made[best - 1] = tokenizer_pair(t, tokens[best - 1], tokens[best]);
        if (best + 1 < m) made[best] = tokenizer_pair(t, tokens[best], tokens[best + 1]);
    }
    return m;
}

// Whether tokenizer_encode might split text (n) differently from GPT-2: a merge could matter, and a
// non-ASCII character is not a Latin, Cyrillic, Chinese, Japanese or Korean letter.
static inline int tokenizer_may_differ(const Tokenizer *t, const char *text, size_t n) {
    static const uint32_t letters[][2] = {{0xC0, 0xD6}, {0xD8, 0xF6}, {0xF8, 0x24F}, {0x400, 0x481},
                                          {0x48A, 0x52F},
                                          {0x3041, 0x3096}, {0x30A1, 0x30FA}, {0x4E00, 0x9FFF},
                                          {0xAC00, 0xD7A3}};
    if (t->bytes.n <= 256 + sizeof TOKENIZER_EOT) return 0;   // single bytes only
    for (size_t i = 0, m; i < n; i += m) {
        const unsigned char *p = (const unsigned char *)text + i;
        m = (size_t)json_utf8_length(text + i, text + n);
        if (m == 1) continue;
        uint32_t c = m == 2 ? p[0] & 31u : p[0] & 15u;
        int known = 0;
        for (size_t b = 1; b < m; b++) c = c << 6 | (p[b] & 63u);
        for (size_t r = 0; r < sizeof letters / sizeof *letters && (m == 2 || m == 3); r++)
            known |= letters[r][0] <= c && c <= letters[r][1];
        if (!known) return 1;
    }
    return 0;
}

// Byte-pair encoding of text (n) as in GPT-2 (Radford et al. 2019, section 2.2) into tokens, with
// capacity n. Returns the number of tokens, -1 if the vocabulary lacks a byte of the text, or -2 if
// the tokenizer splits text differently (decode_only). ASCII text gets exactly GPT-2's tokens.
// Every non-ASCII character is treated as a letter, so punctuation and spaces outside ASCII may be
// split differently from GPT-2 (decoding still restores the same bytes). "<|endoftext|>" in the
// text is ordinary text. Time is quadratic in the length of a word.
static inline int64_t tokenizer_encode(const Tokenizer *t, const char *text, size_t n,
                                       int *tokens) {
    if (t->decode_only) return -2;
    int *made = (int *)xcalloc(n, sizeof *made);
    int64_t count = 0;
    for (size_t at = 0; at < n && count >= 0; ) {
        size_t m = tokenizer_piece(text + at, n - at);
        int *piece = tokens + count, lacks = 0;
        for (size_t i = 0; i < m; i++) {
            piece[i] = t->slot[tokenizer_slot(t, text + at + i, 1, text, 0)] - 1;
            lacks |= piece[i] < 0;
        }
        count = lacks ? -1 : count + (int64_t)tokenizer_merge(t, piece, made, m);
        at += m;
    }
    free(made);
    return count;
}

// ---- The byte tokenizer: token b is byte b, token 256 is end-of-text ----

enum { TOKENIZER_BYTES_V = 257, TOKENIZER_BYTES_EOT = 256 };

// Appends its tokenizer.bin.
static inline void tokenizer_bytes_file(Text *file) {
    unsigned char header[LLMC_HEADER_BYTES];
    uint32_t words[4] = {TOKENIZER_MAGIC, 2, TOKENIZER_BYTES_V, TOKENIZER_BYTES_EOT};
    llmc_header(header, words, 4);
    text_append(file, header, sizeof header);
    for (int b = 0; b < 256; b++) {
        unsigned char token[2] = {1, (unsigned char)b};
        text_append(file, token, 2);
    }
    unsigned char length = sizeof TOKENIZER_EOT - 1;
    text_append(file, &length, 1);
    text_append(file, TOKENIZER_EOT, length);
}

static inline void tokenizer_write_bytes(const char *path) {
    Text file = {NULL, 0, 0};
    tokenizer_bytes_file(&file);
    file_write_whole(path, file.s, file.n);
    text_free(&file);
}

#endif
