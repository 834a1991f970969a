// score.h: losses of rows of unequal lengths, of which the last few targets count (through
// engine.h): choices given their context, and sliding windows over documents.
#ifndef SCORE_H
#define SCORE_H

#include "../files/choices.h"
#include "../files/shards.h"
#include "../files/tokenizer.h"
#include "../model/engine.h"

// ---- Rows ----

typedef struct {
    int64_t at;                 // where the row's tokens are, for ScoreRead
    int file, inputs, counted;  // input tokens; the last `counted` targets count
    double loss;                // out: the sum over the counted targets, in nats
} ScoreRow;

// tokens (inputs + 1): the inputs, then the last one's target.
typedef void (*ScoreRead)(const void *source, const ScoreRow *row, int *tokens);

// For the plan of an evaluation: each branch's factor (2L), 0 to leave it out.
typedef struct {
    const Engine *engine;
    Model *model;
    DropPlan *plan;
    const double *scale;
    int B, T, tied;
} Scorer;

// Rows are padded to a multiple of this: there are few lengths, each a function of the row alone,
// so a row's loss does not depend on the rows around it (as far as CAN_ANY_BATCH promises).
enum { SCORE_MULTIPLE = 16 };

static inline int score_padded(int inputs, int T) {
    const int padded = (inputs + SCORE_MULTIPLE - 1) / SCORE_MULTIPLE * SCORE_MULTIPLE;
    return padded < T ? padded : T;
}

typedef struct { int64_t index; int padded; } ScoreOrder;

// Longest first: running out of memory shows at once.
static inline int score_compare(const void *a, const void *b) {
    const ScoreOrder *x = (const ScoreOrder *)a, *y = (const ScoreOrder *)b;
    if (x->padded != y->padded) return y->padded - x->padded;
    return (x->index > y->index) - (x->index < y->index);
}

// Sets the losses of rows (n), each of at most T inputs; at most B of one padded length per batch.
static inline void score_rows(const Scorer *s, ScoreRow *row, int64_t n, ScoreRead read,
                              const void *source) {
    const size_t BT = (size_t)s->B * (size_t)s->T;
    ScoreOrder *order = (ScoreOrder *)xcalloc((size_t)n, sizeof *order);
    int *tokens = (int *)xcalloc(BT, sizeof *tokens),
        *targets = (int *)xcalloc(BT, sizeof *targets);
    int *line = (int *)xcalloc((size_t)s->T + 1, sizeof *line);
    real *losses = (real *)xcalloc(BT, sizeof *losses);
    for (int64_t i = 0; i < n; i++) {
        CHECK(1 <= row[i].counted && row[i].counted <= row[i].inputs && row[i].inputs <= s->T,
              "row %lld: %d of %d targets", (long long)i, row[i].counted, row[i].inputs);
        order[i].index = i;
        order[i].padded = score_padded(row[i].inputs, s->T);
    }
    qsort(order, (size_t)n, sizeof *order, score_compare);
    for (int64_t first = 0, end; first < n; first = end) {
        const int T = order[first].padded;
        for (end = first; end < n && end - first < s->B && order[end].padded == T; end++) {
            const ScoreRow *r = &row[order[end].index];
            int *in = tokens + (end - first) * T, *out = targets + (end - first) * T;
            read(source, r, line);
            for (int t = 0; t < T; t++) {
                in[t] = t < r->inputs ? line[t] : 0;     // padding cannot change what precedes it
                out[t] = t < r->inputs && t >= r->inputs - r->counted ? line[t + 1] : -1;
            }
        }
        drop_plan_keep_all(s->plan, s->scale, s->tied, (int)(end - first));
        engine_forward(s->engine, s->model, T, tokens, targets, s->plan);
        s->engine->losses(s->model, losses);
        for (int64_t i = first; i < end; i++) {
            ScoreRow *r = &row[order[i].index];
            r->loss = 0;
            for (int t = 0; t < r->inputs; t++) r->loss += (double)losses[(i - first) * T + t];
        }
    }
    free(order), free(tokens), free(targets), free(line), free(losses);
}

// ---- Choices given their context ----

static inline void score_read_choice(const void *source, const ScoreRow *row, int *tokens) {
    const Choices *c = (const Choices *)source;
    const ChoicesRow *r = &c->row[row->at];
    // dropped from the start of the context
    const int cut = r->context_n + r->choice_n - row->inputs - 1;
    for (int i = 0; i <= row->inputs; i++) tokens[i] = choices_token(c, r, cut + i);
}

// loss (rows): for each choice, the sum over its tokens of -log p given the context and the
// preceding tokens. Contexts that are too long for T lose their first tokens, as in EleutherAI's
// harness; returns how many rows were cut. The caller refuses choices of more than T tokens.
static inline int64_t score_choices(const Scorer *s, const Choices *c, double *loss) {
    ScoreRow *row = (ScoreRow *)xcalloc((size_t)c->rows, sizeof *row);
    int64_t cut = 0;
    for (int64_t i = 0; i < c->rows; i++) {
        const int inputs = c->row[i].context_n + c->row[i].choice_n - 1;
        row[i].at = i;
        row[i].inputs = inputs < s->T ? inputs : s->T;
        row[i].counted = c->row[i].choice_n;
        cut += inputs > s->T;
    }
    score_rows(s, row, c->rows, score_read_choice, c);
    for (int64_t i = 0; i < c->rows; i++) loss[i] = row[i].loss;
    free(row);
    return cut;
}

// ---- Sliding windows over documents ----
//
// As in "Perplexity of fixed-length models" in the documentation of Hugging Face's transformers:
// windows of T tokens begin at 0, S, 2S, ... of a document until one reaches its end, and each
// counts the targets that no earlier window counted. So after a document's first T targets, which
// have all the context there is, each target is predicted from at least T - S + 1 tokens.
//
// A document runs from one end-of-text token to the next, inclusive: the first predicts its first
// token, the second is its last target. So every token of a shard except its first is a target
// exactly once.

typedef struct {
    double loss;                                         // nats per token: the mean over all tokens
    double document_loss;                                // the mean of the documents' own means
    double bits_per_byte;                                // NaN without a tokenizer
    int64_t tokens, bytes, documents;
} ScoreDocuments;

static inline void score_read_window(const void *source, const ScoreRow *row, int *tokens) {
    const Shards *s = (const Shards *)source;
    // tokens overlap with targets
    shards_read_tokens(s, &s->file[row->file], row->at, row->inputs + 1, tokens, tokens + 1);
}

enum { SCORE_WINDOWS = 1 << 12 };                        // scored together, grouped by length

typedef struct {
    const Scorer *scorer;
    const Shards *shards;
    ScoreRow row[SCORE_WINDOWS];
    unsigned char last[SCORE_WINDOWS];        // whether the window ends its document
    int n;
    double sum, document_sum, documents_sum;  // sums of losses: all, the open document's; and of
                                              // documents' means
    int64_t document_tokens;
    ScoreDocuments result;
} ScoreWindows;

// Scores the pending windows and adds them up in order.
static inline void score_windows_flush(ScoreWindows *w) {
    score_rows(w->scorer, w->row, w->n, score_read_window, w->shards);
    for (int i = 0; i < w->n; i++) {
        w->sum += w->row[i].loss;
        w->document_sum += w->row[i].loss;
        w->document_tokens += w->row[i].counted;
        if (!w->last[i]) continue;
        w->documents_sum += w->document_sum / (double)w->document_tokens;
        w->document_sum = 0, w->document_tokens = 0;
    }
    w->n = 0;
}

// The windows over the n targets that follow token `at` of a file.
static inline void score_document(ScoreWindows *w, int file, int64_t at, int64_t n, int stride) {
    const int T = w->scorer->T;
    int64_t counted = 0;
    for (int64_t begin = 0; counted < n; begin += stride) {
        const int64_t end = begin + T < n ? begin + T : n;
        const ScoreRow row = {at + begin, file, (int)(end - begin), (int)(end - counted), 0};
        if (w->n == SCORE_WINDOWS) score_windows_flush(w);
        w->last[w->n] = end == n;
        w->row[w->n++] = row;
        counted = end;
    }
    w->result.tokens += n;
    w->result.documents++;
}

// Over the first `tokens` tokens (0: all), as if the shards ended there. eot: the end-of-text
// token, or -1: each shard is one document. The stride is in [1, T].
static inline ScoreDocuments score_documents(const Scorer *s, const Shards *shards, int eot,
                                             int stride, int64_t tokens, const Tokenizer *t) {
    CHECK(1 <= stride && stride <= s->T, "stride %d, T %d", stride, s->T);
    ScoreWindows *w = (ScoreWindows *)xcalloc(1, sizeof *w);
    w->scorer = s;
    w->shards = shards;
    enum { PIECE = 4096 };
    int piece[PIECE];
    for (int f = 0; f < shards->n; f++) {
        const int64_t count = shards->file[f].shard.count;
        for (int64_t at = 0, i = 1, from = 0, end = 0;
             i < count && (!tokens || w->result.tokens < tokens); i++) {
            // the next piece, preceded by its previous token
            if (i >= end) {
                from = i - 1, end = count - from < PIECE ? count : from + PIECE;
                shards_read_tokens(shards, &shards->file[f], from, end - from, piece, piece + 1);
            }
            const int token = piece[i - from];
            if (t && token < t->V) w->result.bytes += tokenizer_text_length(t, token);
            if (token != eot && i < count - 1 && w->result.tokens + i - at != tokens) continue;
            score_document(w, f, at, i - at, stride);
            at = i;
        }
    }
    score_windows_flush(w);
    ScoreDocuments r = w->result;
    r.loss = w->sum / (double)r.tokens;
    r.document_loss = w->documents_sum / (double)r.documents;
    r.bits_per_byte = t && r.bytes ? w->sum / 0.69314718055994530942 / (double)r.bytes : NAN;
    free(w);
    return r;
}

#endif
