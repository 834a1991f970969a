// matmul_choices.h: which form and which algorithm of each matmul was the fastest on a GPU, as a
// text file (matmuls.txt) beside a run, so that a resumed run computes the same bits.
//
//   droppath matmuls 1
//   on NVIDIA H100 80GB HBM3, compute capability 9.0, cublasLt 130100, bf16
//   matmul 32768 3072 768 768 3072 3072 0 0 0 0 164 1 0 0 0 fused 1 ms 0.2513 0.3020 algorithm ...
//   sha256 <of everything above>
//
// The fifteen numbers of a matmul are its key: M N K, leading dimensions of a, b and y, whether a
// and b are transposed, whether y is fp32, whether it accumulates, cuBLASLt's epilogue, how many
// matrices, and their strides in a, b and y. The
// milliseconds are those of the form with the epilogue fused and of the form without; negative if
// a form was not measured. An algorithm is the library's opaque 64 bytes, valid for one version.
#ifndef MATMUL_CHOICES_H
#define MATMUL_CHOICES_H

#include "files.h"
#include "sha256.h"
#include <math.h>

enum { MATMUL_KEY = 15, MATMUL_ALGORITHM = 8, MATMULS_MOST = 1 << 16 };

typedef struct {
    uint64_t key[MATMUL_KEY];
    int fused;
    double ms[2];                                        // unfused, fused
    uint64_t algorithm[MATMUL_ALGORITHM];
} MatmulChoice;

typedef struct { MatmulChoice *all; int n, capacity; } MatmulChoices;

#define MATMUL_CHOICES_HEAD "droppath matmuls 1\non "

static inline void matmul_choices_free(MatmulChoices *c) {
    free(c->all);
    memset(c, 0, sizeof *c);
}

static inline const MatmulChoice *matmul_choices_find(const MatmulChoices *c,
                                                      const uint64_t key[MATMUL_KEY]) {
    for (int i = 0; i < c->n; i++)
        if (!memcmp(c->all[i].key, key, sizeof c->all[i].key)) return &c->all[i];
    return NULL;
}

static inline void matmul_choices_add(MatmulChoices *c, const MatmulChoice *one) {
    if (c->n == c->capacity) {
        c->capacity = 2 * c->capacity + 64;
        c->all = (MatmulChoice *)xrealloc(c->all, (size_t)c->capacity, sizeof *c->all);
    }
    c->all[c->n++] = *one;
}

// The file's text, measured on `where`: one line. Free with text_free.
static inline Text matmul_choices_text(const MatmulChoices *c, const char *where) {
    Text t = {NULL, 0, 0};
    char sum[SHA256_HEX];
    Sha256 state;
    text_printf(&t, MATMUL_CHOICES_HEAD "%s\n", where);
    for (int i = 0; i < c->n; i++) {
        const MatmulChoice *m = &c->all[i];
        text_printf(&t, "matmul");
        for (int k = 0; k < MATMUL_KEY; k++)
            text_printf(&t, " %llu", (unsigned long long)m->key[k]);
        text_printf(&t, " fused %d ms %.4f %.4f algorithm", m->fused, m->ms[1], m->ms[0]);
        for (int k = 0; k < MATMUL_ALGORITHM; k++)
            text_printf(&t, " %llx", (unsigned long long)m->algorithm[k]);
        text_printf(&t, "\n");
    }
    sha256_init(&state);
    sha256_update(&state, t.s, t.n);
    sha256_final(&state, sum);
    text_printf(&t, "sha256 %s\n", sum);
    return t;
}

// Reads n numbers of this base, each after one space; advances *at. Returns 0 if there are fewer.
static inline int matmul_choices_numbers(const char **at, uint64_t *to, int n, int base) {
    for (int i = 0; i < n; i++) {
        char *end;
        if (**at != ' ' || !strchr("0123456789abcdef", (*at)[1]) || !(*at)[1]) return 0;
        errno = 0;
        to[i] = strtoull(*at + 1, &end, base);
        if (errno || end == *at + 1) return 0;
        *at = end;
    }
    return 1;
}

static inline int matmul_choices_word(const char **at, const char *word) {
    const size_t n = strlen(word);
    if (strncmp(*at, word, n)) return 0;
    *at += n;
    return 1;
}

// One line after "matmul", up to and including its end.
static inline int matmul_choices_line(const char **at, MatmulChoice *m) {
    uint64_t fused;
    if (!matmul_choices_numbers(at, m->key, MATMUL_KEY, 10) ||
        !matmul_choices_word(at, " fused") || !matmul_choices_numbers(at, &fused, 1, 10) ||
        fused > 1 || !matmul_choices_word(at, " ms"))
        return 0;
    m->fused = (int)fused;
    for (int i = 1; i >= 0; i--) {
        char *end;
        m->ms[i] = strtod(*at, &end);
        if (end == *at || !isfinite(m->ms[i])) return 0;
        *at = end;
    }
    return matmul_choices_word(at, " algorithm") &&
        matmul_choices_numbers(at, m->algorithm, MATMUL_ALGORITHM, 16) &&
        matmul_choices_word(at, "\n");
}

// Reads a file's contents, if it was measured on `where`; what was in *c is freed. Returns NULL, or
// what is wrong with it, and then *c is empty.
static inline const char *matmul_choices_parse(MatmulChoices *c, const char *where,
                                               const void *mem, size_t size) {
    static const char damaged[] = "it is damaged";
    const char *error = NULL;
    matmul_choices_free(c);
    char *text = (char *)xcalloc(size + 1, 1);           // so that it ends with 0
    if (size) memcpy(text, mem, size);
    const char *at = text, *line;
    if (strlen(text) != size || !matmul_choices_word(&at, MATMUL_CHOICES_HEAD)) error = damaged;
    else if (!(line = strchr(at, '\n'))) error = damaged;
    else if ((size_t)(line - at) != strlen(where) || strncmp(at, where, strlen(where)))
        error = "it was made on another device, with another version of cuBLASLt or another dtype";
    else at = line + 1;
    while (!error && matmul_choices_word(&at, "matmul")) {
        MatmulChoice one;
        memset(&one, 0, sizeof one);
        if (!matmul_choices_line(&at, &one) || c->n >= MATMULS_MOST ||
            matmul_choices_find(c, one.key))
            error = damaged;
        else matmul_choices_add(c, &one);
    }
    if (!error) {                                        // also compares the sum
        Text again = matmul_choices_text(c, where);
        if (again.n != size || memcmp(again.s, text, size)) error = damaged;
        text_free(&again);
    }
    free(text);
    if (error) matmul_choices_free(c);
    return error;
}

#endif
