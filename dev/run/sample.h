// sample.h: generates text from a model, one token at a time, for several texts at once.
//
// A text is a function of the model, the prompt, SampleArgs and the text's index. If the engine's
// rows are independent of each other (CAN_ANY_BATCH), it is so bit for bit, whatever other texts
// are generated beside it.
#ifndef SAMPLE_H
#define SAMPLE_H

#include "../files/tokenizer.h"
#include "../model/engine.h"
#include "../model/rng.h"

typedef struct {
    double temperature;  // divides the logits; 0: always the most likely token
    int top_k;           // only the k most likely; 0: all
    double top_p;        // only the fewest tokens whose total probability reaches it (Holtzman et
                         // al. 2020)
    uint64_t seed;
} SampleArgs;

typedef struct { real logit; int token; } SampleCandidate;

static inline int sample_before(SampleCandidate a, SampleCandidate b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

// Sifts c[i] down in the heap c (n), whose root is the most likely.
static inline void sample_sift(SampleCandidate *c, int n, int i) {
    const SampleCandidate moved = c[i];
    for (int child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && sample_before(c[child + 1], c[child])) child++;
        if (!sample_before(c[child], moved)) break;
        c[i] = c[child];
    }
    c[i] = moved;
}

// Moves the most likely of the heap c (n) to c[n-1], behind the remaining heap.
static inline void sample_pop(SampleCandidate *c, int n) {
    const SampleCandidate best = c[0];
    c[0] = c[n - 1];
    sample_sift(c, n - 1, 0);
    c[n - 1] = best;
}

// The most likely token, the lowest if there are several.
static inline int sample_best(const real *logits, int V) {
    int best = 0;
    for (int v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    return best;
}

// Fills c (V) so that c[V-1-i], i < n, are the tokens that survive the cuts: softmax(logits (V) /
// temperature), cut to top_k, then to top_p. Returns n; *part is the sum of their weights,
// exp((logit - top) / temperature) with the highest logit top. Ties are resolved in favour of lower
// tokens. Only the tokens that survive a cut are sorted.
static inline int sample_cut(SampleCandidate *c, double *mass, const real *logits, int V,
                             const SampleArgs *a, double top) {
    const int most = a->top_k > 0 && a->top_k < V ? a->top_k : V;
    int popped = 0, n = 0;
    SampleCandidate *last = c + V - 1;                   // last[-i]: the i-th most likely
    double sum = 0, part = 0;
    for (int v = 0; v < V; v++) c[V - 1 - v].logit = logits[v], c[V - 1 - v].token = v;
#define SAMPLE_WEIGHT(candidate) exp(((double)(candidate).logit - top) / a->temperature)
    if (most < V || a->top_p < 1)
        for (int i = V / 2 - 1; i >= 0; i--) sample_sift(c, V, i);
    else popped = V;                                     // no cut: any order will do
    for (; most < V && popped < most; popped++) sample_pop(c, V - popped);
    for (int i = 0; i < most; i++) sum += SAMPLE_WEIGHT(last[-i]);
    // with top_p 1 all of them, or all until the rest is zero
    for (; n < most && part < sum * a->top_p; n++) {
        if (n == popped) sample_pop(c, V - popped), popped++;
        part += SAMPLE_WEIGHT(last[-n]);
    }
    *mass = part;
    return n;
}

// Draws a token that survives the cuts, using the uniform u in (0, 1).
static inline int sample_token(const real *logits, int V, const SampleArgs *a, double u) {
    const int best = sample_best(logits, V);
    int chosen = 0;
    if (a->temperature == 0) return best;
    SampleCandidate *c = (SampleCandidate *)xcalloc((size_t)V, sizeof *c), *last = c + V - 1;
    const double top = (double)logits[best];
    double mass, part = 0;
    const int n = sample_cut(c, &mass, logits, V, a, top);
    for (int i = 0; i < n; i++) {
        part += SAMPLE_WEIGHT(last[-i]);
        chosen = last[-i].token;
        if (part > mass * u) break;
    }
    free(c);
    return chosen;
}

// The probability with which sample_token draws each token, p (V).
static inline void sample_distribution(double *p, const real *logits, int V, const SampleArgs *a) {
    const int best = sample_best(logits, V);
    memset(p, 0, (size_t)V * sizeof *p);
    p[best] = 1;
    if (a->temperature == 0) return;
    SampleCandidate *c = (SampleCandidate *)xcalloc((size_t)V, sizeof *c), *last = c + V - 1;
    const double top = (double)logits[best];
    double mass;
    const int n = sample_cut(c, &mass, logits, V, a, top);
    for (int i = 0; i < n; i++) p[last[-i].token] = SAMPLE_WEIGHT(last[-i]) / mass;
    free(c);
}
#undef SAMPLE_WEIGHT

// ---- Texts ----

typedef struct Sampler Sampler;
typedef struct SampleText SampleText;

// How texts are generated, and statistics.
struct Sampler {
    const Engine *engine;
    Model *model;                          // opened with a cache of `batch` sequences, or
    int cached;                            // 0: without one; then its whole context is recomputed
                                           // for each token
    int layers, V, T, batch;               // the model's; T: its context length; batch: texts at a
                                           // time
    const double *scale;                   // as for drop_plan_keep_all
    int tied;
    const Tokenizer *tokenizer;
    SampleArgs args;
    int optional;                          // a text that cannot be written does not end the program
    uint32_t round;                        // different rounds draw different texts
    int64_t prompt_tokens, decoded, made;  // tokens processed in prompts; one by one; generated
    double prompt_seconds, seconds;        // spent on prompts; on everything else
    DropPlan plan;                         // for `batch` rows
    real *logits;                          // (batch, V)
    // NULL, or how single tokens are made otherwise: a call that leaves the logits of the last
    // layer to be used; and a whole round for texts with one unread token, which appends one or more to
    // each (speculate.h). self belongs to them
    void *self;
    void (*decode)(Sampler *, const DecodeArgs *);
    void (*round_of)(Sampler *, SampleText *, const int *which, int rows, int64_t most);
};

// A text being generated. The model sees tokens[from] onwards, of which `cached` are in its cache.
struct SampleText {
    int *tokens;
    int64_t have, from, cached, made;
    uint32_t number;                                     // of the texts of its prompt
    Text waiting;                                        // bytes not written yet
    int done;
};

// The tokens of a prompt (n bytes), from malloc with capacity for `more` further ones; an empty
// prompt stands for a newline or, if the tokenizer cannot encode, for the start of a document. Dies
// if the tokenizer cannot encode the prompt.
static inline int *sample_prompt(const Tokenizer *t, const char *prompt, size_t n, int64_t more,
                                 int64_t *count) {
    static int warned;
    const char *text = n ? prompt : "\n";
    const size_t length = n ? n : 1;
    int *tokens = (int *)xcalloc(length + (size_t)more, sizeof *tokens);
    *count = tokenizer_encode(t, text, length, tokens);
    if (*count == -2 && !n) *tokens = t->eot, *count = 1;
    if (*count == -2)
        die("this tokenizer does not split text as GPT-2's does: a prompt cannot be encoded here\n"
            "  hint: generate without a prompt, or with transformers (build/export)");
    if (*count < 0) die("the tokenizer has no token for a byte of the prompt");
    if (!warned && (warned = tokenizer_may_differ(t, text, length)))
        warn("the prompt has non-ASCII characters that may be split differently from GPT-2");
    return tokens;
}

// How many of the n bytes of s can be written without cutting a UTF-8 character that may still be
// completed.
static inline size_t sample_whole(const char *s, size_t n) {
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        const unsigned char c = (unsigned char)s[n - back];
        // a continuation byte: the first byte gives the length
        if (c >= 0x80 && c < 0xC0) continue;
        const size_t length = c >= 0xF8 ? 1 : c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : c >= 0xC0 ? 2 : 1;
        return length > back ? n - back : n;
    }
    return n;
}

// Writes what can be written of the current text; everything once it is finished.
static inline void sample_write(FILE *f, SampleText *t) {
    const size_t n = t->done ? t->waiting.n : sample_whole(t->waiting.s, t->waiting.n);
    if (!n) return;
    fwrite(t->waiting.s, 1, n, f);
    fflush(f);                                           // sample_texts checks ferror
    memmove(t->waiting.s, t->waiting.s + n, t->waiting.n -= n);
}

// Runs the last n tokens of texts which[0 .. rows) and computes their logits. The cache holds the
// tokens before them; without a cache n is all tokens, and rows is 1.
static inline void sample_decode(Sampler *s, SampleText *text, const int *which, int rows,
                                 int64_t n) {
    int *tokens = (int *)xcalloc((size_t)rows * (size_t)n, sizeof *tokens),
        *at = (int *)xcalloc((size_t)rows, sizeof *at);
    real *logits = (real *)xcalloc((size_t)rows * (size_t)s->V, sizeof *logits);
    for (int i = 0; i < rows; i++) {
        SampleText *t = &text[which[i]];
        memcpy(tokens + i * n, t->tokens + t->from + t->cached, (size_t)n * sizeof *tokens);
        at[i] = (int)t->cached;
        t->cached += n;
    }
    if (s->plan.batch != rows) drop_plan_keep_all(&s->plan, s->scale, s->tied, rows);
    const DecodeArgs args = {.n = (int)n, .tokens = tokens, .seq = which, .at = at,
                             .logits = logits};
    if (s->decode) s->decode(s, &args);
    else if (s->cached) s->engine->decode(s->model, &args, &s->plan);
    else {
        engine_forward(s->engine, s->model, (int)n, tokens, NULL, &s->plan);
        s->engine->logits(s->model, 0, (int)n - 1, logits);
        text[which[0]].cached = 0;
    }
    for (int i = 0; i < rows; i++)
        memcpy(s->logits + (size_t)which[i] * (size_t)s->V, logits + (size_t)i * (size_t)s->V,
               (size_t)s->V * sizeof *logits);
    free(tokens), free(at), free(logits);
}

// Ends a text whose logits (n) are not finite, so that no token is more likely than another; also
// the program, unless the texts are optional. Returns whether they are finite.
static inline int sample_check(const Sampler *s, SampleText *t, const real *logits, int n) {
    for (int v = 0; v < n; v++) {
        if (isfinite(logits[v])) continue;
        fflush(stdout);
        if (!s->optional)
            die("token %lld of a text: the model's logits are not finite\n  hint: its weights are "
                "too large for --dtype or were damaged by the run that made them",
                (long long)t->made + 1);
        warn("token %lld of a text: the model's logits are not finite, so the text ends here",
             (long long)t->made + 1);
        t->done = 1;
        return 0;
    }
    return 1;
}

// The number of logits that stand for tokens: a model's V may be padded.
static inline int sample_V(const Sampler *s) {
    return s->V < s->tokenizer->V ? s->V : s->tokenizer->V;
}

// Appends a token to a text, which may end it.
static inline void sample_append(Sampler *s, SampleText *t, int token, int64_t most) {
    const Tokenizer *k = s->tokenizer;
    int length;
    if (token == k->eot) {
        t->done = 1;
        return;
    }
    const char *bytes = tokenizer_bytes(k, token, &length);
    text_append(&t->waiting, bytes, (size_t)length);
    t->tokens[t->have++] = token;
    t->made++, s->made++;
    t->done = t->made == most;
}

// Draws a text's next token from its logits.
static inline void sample_next(Sampler *s, SampleText *t, int row, int64_t most) {
    const real *logits = s->logits + (size_t)row * (size_t)s->V;
    if (!sample_check(s, t, logits, sample_V(s))) return;
    const double u = uniform01(rng_words(s->args.seed, STREAM_SAMPLE, (uint64_t)t->made, t->number,
                                         s->round).v[0]);
    sample_append(s, t, sample_token(logits, sample_V(s), &s->args, u), most);
}

// Generates one token, or some, for each unfinished text in [first, end); text i uses slot i %
// batch. Tokens not yet in a text's cache are processed alone, single tokens of all texts together.
// When a text fills the T positions, the model continues from the second half of its context.
static inline void sample_step(Sampler *s, SampleText *text, int64_t first, int64_t end,
                               int64_t most) {
    int *which = (int *)xcalloc((size_t)s->batch, sizeof *which), rows = 0;
    int *next = (int *)xcalloc((size_t)s->batch, sizeof *next), drawn = 0;
    const double from = clock_seconds();
    double alone = 0;
    for (int64_t i = first; i < end; i++) {
        const int place = (int)(i % s->batch);
        SampleText *t = &text[place];
        if (t->done) continue;
        if (t->have - t->from > s->T)
            t->from = t->made ? t->have - (s->T + 1) / 2 : t->have - s->T, t->cached = 0;
        const int64_t n = t->have - t->from - t->cached;
        if (t->cached) {                                 // then n is 1
            which[rows++] = place;
            continue;
        }
        const double begin = clock_seconds();
        sample_decode(s, text, &place, 1, n);
        next[drawn++] = place;
        if (!t->made) s->prompt_tokens += n, alone += clock_seconds() - begin;
    }
    const int64_t made = s->made;
    for (int i = 0; i < drawn; i++) sample_next(s, &text[next[i]], next[i], most);
    const int64_t first_tokens = s->made - made;
    if (rows && s->round_of) s->round_of(s, text, which, rows, most);
    else if (rows) {
        sample_decode(s, text, which, rows, 1);
        for (int i = 0; i < rows; i++) sample_next(s, &text[which[i]], which[i], most);
    }
    // a text's end is a token, too
    s->decoded += s->made - made - first_tokens;
    for (int i = 0; i < rows; i++)
        s->decoded += text[which[i]].done && text[which[i]].made < most;
    s->prompt_seconds += alone, s->seconds += clock_seconds() - from - alone;
    free(which), free(next);
}

// Writes to f, for each prompt in turn, `samples` texts: the prompt and up to `most` tokens, until
// end of text. A line "---" separates texts. The current text is written as it is generated; up to
// `batch` are generated at a time.
static inline void sample_texts(FILE *f, Sampler *s, const Text *prompt, int64_t prompts,
                                int64_t samples, int64_t most) {
    SampleText *text = (SampleText *)xcalloc((size_t)s->batch, sizeof *text);
    s->plan = drop_plan_new(s->layers, s->batch);
    s->plan.batch = 0;                                   // no rows yet
    s->logits = (real *)xcalloc((size_t)s->batch * (size_t)s->V, sizeof *s->logits);
    for (int64_t turn = 0, begun = 0; turn < prompts * samples;) {
        for (; begun < prompts * samples && begun < turn + s->batch; begun++) {
            SampleText *t = &text[begun % s->batch];
            const Text *p = &prompt[begun / samples];
            memset(t, 0, sizeof *t);
            t->tokens = sample_prompt(s->tokenizer, p->s, p->n, most, &t->have);
            text_append(&t->waiting, p->s, p->n);
            t->number = (uint32_t)(begun % samples);
            t->done = most == 0;
            if (begun == turn) sample_write(f, t);       // before the model has processed it
        }
        sample_step(s, text, turn, begun, most);
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
