// sample.h: text from a model: one token at a time, drawn from its next-token distribution.
#ifndef SAMPLE_H
#define SAMPLE_H

#include "engine.h"
#include "rng.h"
#include "tokenizer.h"

typedef struct {
    double temperature;                                  // divides the logits; 0: always the likeliest token
    int top_k;                                           // only the k likeliest; 0: all
    double top_p;                                        // only the fewest that together reach it (Holtzman et al. 2020)
    uint64_t seed;
} SampleArgs;

typedef struct { real logit; int token; } SampleCandidate;

static inline int sample_order(const void *a, const void *b) {
    const SampleCandidate *x = (const SampleCandidate *)a, *y = (const SampleCandidate *)b;
    return x->logit != y->logit ? (x->logit < y->logit ? 1 : -1) : x->token - y->token;
}

// A token drawn with the uniform number u in (0, 1): softmax(logits (V) / temperature), cut to top_k, then to top_p,
// then renormalised.
static inline int sample_token(const real *logits, int V, const SampleArgs *a, double u) {
    SampleCandidate *c = (SampleCandidate *)xcalloc((size_t)V, sizeof *c);
    for (int v = 0; v < V; v++) c[v].logit = logits[v], c[v].token = v;
    qsort(c, (size_t)V, sizeof *c, sample_order);
    int n = a->temperature == 0 ? 1 : a->top_k > 0 && a->top_k < V ? a->top_k : V, chosen = 0;
    double sum = 0, part = 0, temperature = a->temperature == 0 ? 1 : a->temperature;
    for (int i = 0; i < n; i++) sum += exp((double)(c[i].logit - c[0].logit) / temperature);
    double want = sum * (a->top_p < 1 ? a->top_p : 1);
    for (int i = 0; i < n && part < want; i++) {
        part += exp((double)(c[i].logit - c[0].logit) / temperature);
        if (part >= want) n = i + 1;
    }
    sum = part * u, part = 0;
    for (int i = 0; i < n; i++) {
        part += exp((double)(c[i].logit - c[0].logit) / temperature);
        chosen = c[i].token;
        if (part > sum) break;
    }
    free(c);
    return chosen;
}

// The tokens of a prompt, from malloc; an empty one stands for a line's start. Dies when the tokenizer cannot write it.
static inline int *sample_prompt(const Tokenizer *t, const char *prompt, int64_t *n) {
    const char *text = *prompt ? prompt : "\n";
    int *tokens = (int *)xcalloc(strlen(text), sizeof *tokens);
    *n = tokenizer_encode(t, text, strlen(text), tokens);
    if (*n < 0) die("the tokenizer has no token for a byte of the prompt");
    return tokens;
}

// Writes the prompt's continuation of at most n tokens to f, until end of text. The model sees the last T tokens at
// most; plan (of one row or more) says how it runs. Sample number `index` of the seed. Returns the tokens written.
static inline int64_t sample_text(FILE *f, const Engine *e, Model *m, int V, int T, DropPlan *plan, const Tokenizer *t,
                                  const char *prompt, int64_t n, const SampleArgs *a, uint32_t index) {
    int64_t have, written = 0;
    int *tokens = sample_prompt(t, prompt, &have);
    real *logits = (real *)xcalloc((size_t)V, sizeof *logits);
    tokens = (int *)xrealloc(tokens, (size_t)(have + n), sizeof *tokens);
    for (; written < n; written++) {
        int seen = have < T ? (int)have : T, length;
        e->forward(m, seen, tokens + have - seen, NULL, plan);
        e->logits(m, 0, seen - 1, logits);
        uint32_t word = rng_words(a->seed, STREAM_SAMPLE, (uint64_t)written, index, 0).v[0];
        int token = sample_token(logits, V < t->V ? V : t->V, a, uniform01(word));   // a model's V may be rounded up
        if (token == t->eot) break;
        const char *bytes = tokenizer_bytes(t, token, &length);
        fwrite(bytes, 1, (size_t)length, f);
        fflush(f);
        tokens[have++] = token;
    }
    free(tokens);
    free(logits);
    return written;
}

#endif
