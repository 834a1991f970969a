// choices.h: multiple-choice questions, such as HellaSwag, in llm.c's evaluation format
// (write_evalfile in its dev/data/data_common.py), and accuracies from a model's losses.
//
//     byte 0       256 words of 32 bits, little-endian: magic 20240522, version, examples, bytes of
//                  the longest example; ours have the SHA-256 of the tokenizer file in words 8 to
//                      15;
//                  all other words are zero
//     byte 1024    the examples, in words of 16 bits (version 1, llm.c's) or 32 bits (version 2,
//                  ours, for tokens or lengths that do not fit in 16 bits). Each consists of a word
//                  of all ones; the example's size in bytes, including this header; its index; the
//                  index of the right choice; the number of choices; the context's length and
//                  tokens; and each choice's length and tokens
#ifndef CHOICES_H
#define CHOICES_H

#include "../check.h"
#include "files.h"
#include "sha256.h"
#include "shards.h"                                      // llm.c's header
#include "tokenizer.h"
#include <math.h>

// position of the SHA-256; words before the context's tokens
enum { CHOICES_SUM_WORD = 8, CHOICES_EXAMPLE_WORDS = 6 };

// choices: row[first] ... row[first + n - 1]
typedef struct { int64_t first; int n, label; } ChoicesExample;
// offsets in words, and lengths in tokens
typedef struct { int64_t context, choice; int context_n, choice_n; } ChoicesRow;

typedef struct {
    int64_t examples, rows, words;      // rows: choices of all examples; words: after the header
    ChoicesExample *example;            // (examples)
    ChoicesRow *row;                    // (rows)
    const unsigned char *data;          // the words, within the parsed memory
    int width;                          // bytes per word
    char tokenizer_sha256[SHA256_HEX];  // "": not recorded
    char *path;                         // set by choices_open
    FileMap map;
    char error[160];
} Choices;

static inline void choices_free(Choices *c) {
    free(c->example), free(c->row);
    c->example = NULL, c->row = NULL;
    c->examples = c->rows = 0;
}

// ---- Parsing ----

static inline uint32_t choices_word(const Choices *c, int64_t i) {
    const unsigned char *p = c->data + (size_t)i * (size_t)c->width;
    return c->width == 2 ? (uint32_t)p[0] | (uint32_t)p[1] << 8 : llmc_word(p, 0);
}

static inline const char *choices_fail(Choices *c, int64_t at, const char *what) {
    snprintf(c->error, sizeof c->error, "example %lld, at byte %lld: %s", (long long)c->examples,
             (long long)(LLMC_HEADER_BYTES + at * c->width), what);
    return c->error;
}

static inline void choices_add_row(Choices *c, ChoicesRow row) {
    if ((c->rows & (c->rows - 1)) == 0)                  // the capacity is a power of two
        c->row = (ChoicesRow *)xrealloc(c->row, c->rows ? 2 * (size_t)c->rows : 1, sizeof *c->row);
    c->row[c->rows++] = row;
}

// Parses the example that begins at word `at`; *end receives where the next one begins.
static inline const char *choices_parse_example(Choices *c, int64_t at, int64_t *end) {
    const uint32_t mark = c->width == 2 ? 0xFFFF : 0xFFFFFFFF;
    if (c->words - at < CHOICES_EXAMPLE_WORDS)
        return choices_fail(c, at, "cut short: the header counts more examples");
    if (choices_word(c, at) != mark) return choices_fail(c, at, "damaged: no example begins here");
    const int64_t bytes = choices_word(c, at + 1), n = choices_word(c, at + 4);
    *end = at + bytes / c->width;
    if (bytes % c->width || *end < at + CHOICES_EXAMPLE_WORDS)
        return choices_fail(c, at + 1, "damaged: its size is wrong");
    if (*end > c->words) return choices_fail(c, at + 1, "cut short, or its size is wrong");
    if (choices_word(c, at + 2) != c->examples)
        return choices_fail(c, at + 2, "damaged: its index is wrong");
    if (n < 2 || n > *end - at)
        return choices_fail(c, at + 4, "damaged: an example has at least two choices");
    if (choices_word(c, at + 3) >= n)
        return choices_fail(c, at + 3, "damaged: the index of the right choice is out of range");
    const int64_t context_n = choices_word(c, at + 5), context = at + CHOICES_EXAMPLE_WORDS;
    if (context_n < 1)
        return choices_fail(c, at + 5, "its context is empty: at least one token is needed");
    if (context_n > *end - context)
        return choices_fail(c, at + 5, "damaged: the context ends outside the example");
    const ChoicesExample example = {c->rows, (int)n, (int)choices_word(c, at + 3)};
    int64_t p = context + context_n;
    for (int64_t k = 0; k < n; k++) {
        const int64_t length = p < *end ? (int64_t)choices_word(c, p) : -1;
        if (length == 0) return choices_fail(c, p, "damaged: a choice is empty");
        if (length < 0 || length > *end - p - 1)
            return choices_fail(c, p, "damaged: a choice ends outside the example");
        const ChoicesRow row = {context, p + 1, (int)context_n, (int)length};
        choices_add_row(c, row);
        p += 1 + length;
    }
    if (p != *end) return choices_fail(c, p, "damaged: data follow its last choice");
    c->example[c->examples++] = example;
    return NULL;
}

static inline const char *choices_parse_examples(Choices *c, uint32_t examples, uint32_t longest) {
    int64_t at = 0, end = 0, most = 0;
    const char *error;
    if (examples > c->words / CHOICES_EXAMPLE_WORDS)
        return "cut short: its header counts more examples than it holds";
    c->example = (ChoicesExample *)xcalloc(examples, sizeof *c->example);
    while (c->examples < examples) {
        if ((error = choices_parse_example(c, at, &end))) return error;
        if (end - at > most) most = end - at;
        at = end;
    }
    if (at != c->words) return choices_fail(c, at, "damaged: data follow the last example");
    if (most * c->width != longest)
        return "damaged: the longest example does not have the size given in the header";
    return NULL;
}

// Parses an evaluation file of `size` bytes at mem, which must outlive *c. Returns NULL, or what is
// wrong (the message may be stored in *c; nothing needs to be freed). Tokens are not checked: see
// choices_check.
static inline const char *choices_parse(Choices *c, const void *mem, size_t size) {
    const unsigned char *p = (const unsigned char *)mem;
    memset(c, 0, sizeof *c);
    if (lfs_pointer_error(mem, size)) return lfs_pointer_error(mem, size);
    if (size < 4 || llmc_word(p, 0) != SHARD_EVAL_MAGIC)
        return "not an evaluation file (wrong magic number)\n  hint: data/choices.py creates one: "
            "data/README.md";
    if (size < LLMC_HEADER_BYTES) return "cut short: an evaluation file has a header of 1024 bytes";
    const uint32_t version = llmc_word(p, 1), examples = llmc_word(p, 2);
    if (version != 1 && version != 2) return "an evaluation file of an unknown version";
    if (examples == 0) return "an evaluation file without examples";
    c->width = version == 1 ? 2 : 4;
    c->words = (int64_t)((size - LLMC_HEADER_BYTES) / (size_t)c->width);
    c->data = p + LLMC_HEADER_BYTES;
    if ((size - LLMC_HEADER_BYTES) % (size_t)c->width) return "cut short: it ends within a word";
    const char *error = choices_parse_examples(c, examples, llmc_word(p, 3));
    if (error) choices_free(c);
    int some = 0;
    for (int i = 0; i < 32; i++) {
        const unsigned char byte = p[4 * CHOICES_SUM_WORD + i];
        snprintf(c->tokenizer_sha256 + 2 * i, 3, "%02x", byte);
        some |= byte;
    }
    if (!some) c->tokenizer_sha256[0] = 0;
    return error;
}

// ---- Reading ----

// Dies if a token is not in [0, V).
static inline void choices_check(const Choices *c, int V) {
    for (int64_t e = 0; e < c->examples; e++)
        for (int64_t r = c->example[e].first; r < c->example[e].first + c->example[e].n; r++)
            for (int side = 0; side < 2; side++) {
                const int64_t at = side ? c->row[r].choice : c->row[r].context;
                const int n = side ? c->row[r].choice_n : c->row[r].context_n;
                for (int i = 0; i < n; i++)
                    if (choices_word(c, at + i) >= (uint32_t)V)
                        die("%s: example %lld has the token %u, but the model has %d tokens\n"
                            "  hint: create the file with the model's tokenizer: data/choices.py",
                            c->path, (long long)e, choices_word(c, at + i), V);
            }
}

// Opens a file for a model of V tokens, or dies. Close with choices_close.
static inline void choices_open(Choices *c, const char *path, int V) {
    FileMap map;
    const char *error = file_map(&map, path);
    if (error)
        die("cannot read %s: %s\n  hint: data/choices.py creates such files: data/README.md", path,
            error);
    if ((error = choices_parse(c, map.data, map.size))) die("%s: %s", path, error);
    c->map = map;
    c->path = xstrdup(path);
    choices_check(c, V);
}

// Keeps only the first n > 0 examples.
static inline void choices_limit(Choices *c, int64_t n) {
    if (n >= c->examples) return;
    c->rows = c->example[n].first;
    c->examples = n;
}

static inline void choices_close(Choices *c) {
    choices_free(c);
    file_unmap(&c->map);
    free(c->path);
}

// Token i of a row: the context followed by the choice.
static inline int choices_token(const Choices *c, const ChoicesRow *r, int i) {
    return (int)choices_word(c, i < r->context_n ? r->context + i : r->choice + i - r->context_n);
}

// The number of characters (Unicode code points) of a row's choice without its leading space, as
// EleutherAI's harness counts them; at least 1. t must cover all tokens.
static inline int choices_characters(const Choices *c, const ChoicesRow *r, const Tokenizer *t) {
    int characters = 0, first = 1;
    for (int i = 0; i < r->choice_n; i++) {
        const int token = (int)choices_word(c, r->choice + i);
        int n;
        const char *bytes = tokenizer_bytes(t, token, &n);
        if (token == t->eot) continue;
        for (int k = 0; k < n; k++, first = 0)
            if (((unsigned char)bytes[k] & 0xC0) != 0x80 && !(first && bytes[k] == ' '))
                characters++;
    }
    return characters ? characters : 1;
}

// ---- Answers: the choice with the smallest loss ----

// What losses are divided by: nothing; tokens, as in llm.c's acc_norm; characters, as in acc_norm
// of EleutherAI's harness.
enum { CHOICES_BY_SUM, CHOICES_BY_TOKEN, CHOICES_BY_CHARACTER, CHOICES_NORMS };

typedef struct {
    double acc[CHOICES_NORMS];        // fraction of examples answered correctly
    double stderr_of[CHOICES_NORMS];  // sqrt(p (1 - p) / (n - 1)); NaN for one example
    double loss;                      // nats per token of the right choice, averaged over examples
} ChoicesResult;

// The first index of the smallest loss[i] / length[i], i < n; -1 if all are NaN.
static inline int choices_best(const double *loss, const int *length, int n) {
    int best = -1;
    double least = INFINITY;
    for (int i = 0; i < n; i++) {
        const double x = loss[i] / (length ? length[i] : 1);
        if (x < least) least = x, best = i;
    }
    return best;
}

// From each row's total loss and its length in characters (NULL: unknown, and that accuracy is
// NaN).
static inline ChoicesResult choices_result(const Choices *c, const double *loss,
                                           const int *characters) {
    ChoicesResult result;
    memset(&result, 0, sizeof result);
    int *tokens = (int *)xcalloc((size_t)c->rows, sizeof *tokens);
    for (int64_t r = 0; r < c->rows; r++) tokens[r] = c->row[r].choice_n;
    const int *const length[CHOICES_NORMS] = {NULL, tokens, characters};
    const double n = (double)c->examples;
    for (int k = 0; k < CHOICES_NORMS; k++) {
        int64_t right = 0;
        for (int64_t e = 0; e < c->examples; e++) {
            const ChoicesExample *x = &c->example[e];
            const int best = choices_best(loss + x->first,
                                          length[k] ? length[k] + x->first : NULL, x->n);
            right += best == x->label;
        }
        const double p = k == CHOICES_BY_CHARACTER && !characters ? NAN : (double)right / n;
        result.acc[k] = p;
        result.stderr_of[k] = n > 1 ? sqrt(p * (1 - p) / (n - 1)) : NAN;
    }
    for (int64_t e = 0; e < c->examples; e++) {
        const int64_t r = c->example[e].first + c->example[e].label;
        result.loss += loss[r] / tokens[r] / n;
    }
    free(tokens);
    return result;
}

// The expected accuracy of random guessing.
static inline double choices_chance(const Choices *c) {
    double sum = 0;
    for (int64_t e = 0; e < c->examples; e++) sum += 1.0 / c->example[e].n;
    return sum / (double)c->examples;
}

#endif
