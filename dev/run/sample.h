// sample.h: text from a model: one token at a time, drawn from its next-token distribution, of several texts at once.
//
// A text is a function of the model, the prompt, SampleArgs and its number. Where the engine's rows do not depend on each
// other (CAN_ANY_BATCH) it is so to the bit, whatever texts are made beside it.
#ifndef SAMPLE_H
#define SAMPLE_H

#include "../files/tokenizer.h"
#include "../model/engine.h"
#include "../model/rng.h"

typedef struct {
    double temperature;                                  // divides the logits; 0: always the likeliest token
    int top_k;                                           // only the k likeliest; 0: all
    double top_p;                                        // only the fewest that together reach it (Holtzman et al. 2020)
    uint64_t seed;
} SampleArgs;

typedef struct { real logit; int token; } SampleCandidate;

static inline int sample_before(SampleCandidate a, SampleCandidate b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

// Moves c[i] down to its place in the heap c (n), whose first is the likeliest.
static inline void sample_sift(SampleCandidate *c, int n, int i) {
    const SampleCandidate moved = c[i];
    for (int child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && sample_before(c[child + 1], c[child])) child++;
        if (!sample_before(c[child], moved)) break;
        c[i] = c[child];
    }
    c[i] = moved;
}

// Puts the likeliest of the heap c (n) behind what is left of it, at c[n-1].
static inline void sample_pop(SampleCandidate *c, int n) {
    const SampleCandidate best = c[0];
    c[0] = c[n - 1];
    sample_sift(c, n - 1, 0);
    c[n - 1] = best;
}

// A token drawn with the uniform number u in (0, 1): softmax(logits (V) / temperature), cut to top_k, then to top_p,
// then renormalised. Of tokens as likely as each other the lowest come first. Only those that a cut leaves are sorted.
static inline int sample_token(const real *logits, int V, const SampleArgs *a, double u) {
    const int most = a->top_k > 0 && a->top_k < V ? a->top_k : V;
    int best = 0, popped = 0, n = 0, chosen = 0;
    for (int v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    if (a->temperature == 0) return best;
    SampleCandidate *c = (SampleCandidate *)xcalloc((size_t)V, sizeof *c), *last = c + V - 1;   // last[-i]: the i-th likeliest
    const double top = (double)logits[best];
    double sum = 0, part = 0;
    for (int v = 0; v < V; v++) c[V - 1 - v].logit = logits[v], c[V - 1 - v].token = v;
#define SAMPLE_WEIGHT(candidate) exp(((double)(candidate).logit - top) / a->temperature)
    if (most < V || a->top_p < 1)
        for (int i = V / 2 - 1; i >= 0; i--) sample_sift(c, V, i);
    else popped = V;                                     // no cut: any order will do
    for (; most < V && popped < most; popped++) sample_pop(c, V - popped);
    for (int i = 0; i < most; i++) sum += SAMPLE_WEIGHT(last[-i]);
    for (; n < most && part < sum * a->top_p; n++) {     // with top_p 1 all of them, or those before what is nothing
        if (n == popped) sample_pop(c, V - popped), popped++;
        part += SAMPLE_WEIGHT(last[-n]);
    }
    sum = part * u, part = 0;
    for (int i = 0; i < n; i++) {
        part += SAMPLE_WEIGHT(last[-i]);
        chosen = last[-i].token;
        if (part > sum) break;
    }
#undef SAMPLE_WEIGHT
    free(c);
    return chosen;
}

// ---- Texts ----

// How texts are made, and what it has taken.
typedef struct {
    const Engine *engine;
    Model *model;                                        // opened with a cache of `batch` sequences, or
    int cached;                                          // 0: without; then all that it sees is read again for each token
    int layers, V, T, batch;                             // the model's; T: how many tokens it sees; texts at a time
    const double *scale;                                 // as drop_plan_keep_all wants them
    int tied;
    const Tokenizer *tokenizer;
    SampleArgs args;
    int optional;                                        // texts that cannot be written are no reason to end the program
    uint32_t round;                                      // other rounds draw other texts
    int64_t prompt_tokens, decoded, made;                // tokens read in prompts; read one by one; made
    double prompt_seconds, seconds;                      // of reading prompts; of all else
    DropPlan plan;                                       // of `batch` rows
    real *logits;                                        // (batch, V)
} Sampler;

// A text in the making. The model sees tokens[from] and what follows, of which `cached` are in its cache.
typedef struct {
    int *tokens;
    int64_t have, from, cached, made;
    Text waiting;                                        // bytes that are not written yet
    int done;
} SampleText;

// The tokens of a prompt (n bytes), from malloc with room for `more`; an empty one stands for a line's start, or, where
// the tokenizer cannot be asked, for a document's. Dies when the tokenizer cannot write it.
static inline int *sample_prompt(const Tokenizer *t, const char *prompt, size_t n, int64_t more, int64_t *count) {
    static int warned;
    const char *text = n ? prompt : "\n";
    const size_t length = n ? n : 1;
    int *tokens = (int *)xcalloc(length + (size_t)more, sizeof *tokens);
    *count = tokenizer_encode(t, text, length, tokens);
    if (*count == -2 && !n) *tokens = t->eot, *count = 1;
    if (*count == -2)
        die("this tokenizer splits text otherwise than GPT-2's: a prompt cannot be encoded here\n"
            "  hint: generate without a prompt, or with transformers (build/export)");
    if (*count < 0) die("the tokenizer has no token for a byte of the prompt");
    if (!warned && (warned = tokenizer_may_differ(t, text, length)))
        warn("the prompt has characters beyond ASCII that may be split otherwise than by GPT-2");
    return tokens;
}

// How many of the n bytes of s can be written without cutting a UTF-8 character that may still become whole.
static inline size_t sample_whole(const char *s, size_t n) {
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        const unsigned char c = (unsigned char)s[n - back];
        if (c >= 0x80 && c < 0xC0) continue;             // inside a character: its first byte says how long it is
        const size_t length = c >= 0xF8 ? 1 : c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : c >= 0xC0 ? 2 : 1;
        return length > back ? n - back : n;
    }
    return n;
}

// Writes what can be written of the text whose turn it is; all of it when it is done.
static inline void sample_write(FILE *f, SampleText *t) {
    const size_t n = t->done ? t->waiting.n : sample_whole(t->waiting.s, t->waiting.n);
    if (!n) return;
    fwrite(t->waiting.s, 1, n, f);
    fflush(f);                                           // sample_texts looks at ferror
    memmove(t->waiting.s, t->waiting.s + n, t->waiting.n -= n);
}

// Runs the last n tokens of the texts which[0 .. rows), for their logits. The cache has those before; without a cache n is
// all of them, and rows is 1.
static inline void sample_decode(Sampler *s, SampleText *text, const int *which, int rows, int64_t n) {
    int *tokens = (int *)xcalloc((size_t)rows * (size_t)n, sizeof *tokens), *at = (int *)xcalloc((size_t)rows, sizeof *at);
    real *logits = (real *)xcalloc((size_t)rows * (size_t)s->V, sizeof *logits);
    for (int i = 0; i < rows; i++) {
        SampleText *t = &text[which[i]];
        memcpy(tokens + i * n, t->tokens + t->from + t->cached, (size_t)n * sizeof *tokens);
        at[i] = (int)t->cached;
        t->cached += n;
    }
    if (s->plan.batch != rows) drop_plan_keep_all(&s->plan, s->scale, s->tied, rows);
    if (s->cached) s->engine->decode(s->model, (int)n, tokens, which, at, &s->plan, logits);
    else {
        engine_forward(s->engine, s->model, (int)n, tokens, NULL, &s->plan);
        s->engine->logits(s->model, 0, (int)n - 1, logits);
        text[which[0]].cached = 0;
    }
    for (int i = 0; i < rows; i++)
        memcpy(s->logits + (size_t)which[i] * (size_t)s->V, logits + (size_t)i * (size_t)s->V, (size_t)s->V * sizeof *logits);
    free(tokens), free(at), free(logits);
}

// Ends a text whose logits (n) are not finite, of which no token is likelier than another: the program with it, unless the
// texts are optional. Returns whether they are.
static inline int sample_check(const Sampler *s, SampleText *t, const real *logits, int n) {
    for (int v = 0; v < n; v++) {
        if (isfinite(logits[v])) continue;
        fflush(stdout);
        if (!s->optional)
            die("token %lld of a text: the model's logits are not finite\n  hint: its weights are too large for --dtype, or"
                " were damaged by the run that made them", (long long)t->made + 1);
        warn("token %lld of a text: the model's logits are not finite, so the text ends here", (long long)t->made + 1);
        t->done = 1;
        return 0;
    }
    return 1;
}

// Draws the next token of a text, the one of that number.
static inline void sample_next(Sampler *s, SampleText *t, int row, uint32_t number, int64_t most) {
    const Tokenizer *k = s->tokenizer;
    if (!sample_check(s, t, s->logits + (size_t)row * (size_t)s->V, s->V < k->V ? s->V : k->V)) return;
    const double u = uniform01(rng_words(s->args.seed, STREAM_SAMPLE, (uint64_t)t->made, number, s->round).v[0]);
    const int token = sample_token(s->logits + (size_t)row * (size_t)s->V, s->V < k->V ? s->V : k->V, &s->args, u);
    int length;
    if (token == k->eot) {
        t->done = 1;
        return;
    }
    const char *bytes = tokenizer_bytes(k, token, &length);  // a model's V may be rounded up
    text_append(&t->waiting, bytes, (size_t)length);
    t->tokens[t->have++] = token;
    t->made++, s->made++;
    t->done = t->made == most;
}

// One token more for each of the texts first .. end that are not done; text i is in place i % batch. What a text has before
// its cache is read alone, single tokens of all texts together. When a text has filled the T positions, the model goes on
// from the later half of what it saw.
static inline void sample_step(Sampler *s, SampleText *text, int64_t first, int64_t end, int64_t samples, int64_t most) {
    int *which = (int *)xcalloc((size_t)s->batch, sizeof *which), rows = 0;
    const double from = clock_seconds();
    double alone = 0;
    for (int64_t i = first; i < end; i++) {
        const int place = (int)(i % s->batch);
        SampleText *t = &text[place];
        if (t->done) continue;
        if (t->have - t->from > s->T) t->from = t->made ? t->have - (s->T + 1) / 2 : t->have - s->T, t->cached = 0;
        const int64_t n = t->have - t->from - t->cached;
        if (t->cached) which[rows++] = place;            // then n is 1
        else {
            const double begin = clock_seconds();
            sample_decode(s, text, &place, 1, n);
            if (!t->made) s->prompt_tokens += n, alone += clock_seconds() - begin;
        }
    }
    if (rows) sample_decode(s, text, which, rows, 1);
    s->decoded += rows;
    for (int64_t i = first; i < end; i++)
        if (!text[i % s->batch].done)
            sample_next(s, &text[i % s->batch], (int)(i % s->batch), (uint32_t)(i % samples), most);
    s->prompt_seconds += alone, s->seconds += clock_seconds() - from - alone;
    free(which);
}

// Writes to f, for each of the prompts in turn, `samples` texts: the prompt and up to `most` tokens, until end of text. A
// line "---" stands between two texts. The text in turn is written as it is made; up to `batch` are made at a time.
static inline void sample_texts(FILE *f, Sampler *s, const Text *prompt, int64_t prompts, int64_t samples, int64_t most) {
    SampleText *text = (SampleText *)xcalloc((size_t)s->batch, sizeof *text);
    s->plan = drop_plan_new(s->layers, s->batch);
    s->plan.batch = 0;                                   // of no rows yet
    s->logits = (real *)xcalloc((size_t)s->batch * (size_t)s->V, sizeof *s->logits);
    for (int64_t turn = 0, begun = 0; turn < prompts * samples;) {
        for (; begun < prompts * samples && begun < turn + s->batch; begun++) {
            SampleText *t = &text[begun % s->batch];
            const Text *p = &prompt[begun / samples];
            memset(t, 0, sizeof *t);
            t->tokens = sample_prompt(s->tokenizer, p->s, p->n, most, &t->have);
            text_append(&t->waiting, p->s, p->n);
            t->done = most == 0;
            if (begun == turn) sample_write(f, t);       // before the model has read it
        }
        sample_step(s, text, turn, begun, samples, most);
        for (SampleText *t; turn < begun; turn++) {
            sample_write(f, t = &text[turn % s->batch]);
            if (ferror(f) && !s->optional) die("cannot write the text: %s", strerror(errno));
            if (!t->done) break;
            fputs(turn + 1 < prompts * samples ? "\n---\n" : "\n", f);
            free(t->tokens);
            text_free(&t->waiting);
        }
    }
    if ((fflush(f) || ferror(f)) && !s->optional) die("cannot write the text: %s", strerror(errno));
    drop_plan_free(&s->plan);
    free(s->logits);
    free(text);
}

#endif
