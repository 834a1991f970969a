// adaptive.h: adaptive depth (CALM: Schuster et al. 2022, arXiv 2207.07061): a token leaves the
// model after an early layer if a measure of confidence there reaches a threshold. The logits are
// then read from the stream as it is, and the other layers get only its keys and values, so that
// later tokens can attend to it ("state propagation").
//
// Policies are files that build/exits makes, exits.json:
//
//     {"confidence": "saturation", "layers": [4, 6, 8], "of": 12, "lambda": 0.93, "tau": 4,
//      "risk": 0.05, "error": 0.05, "weights": []}
#ifndef ADAPTIVE_H
#define ADAPTIVE_H

#include "../files/files.h"
#include "../files/json.h"
#include "../model/engine.h"

// What is compared with the threshold: the cosine of the streams before and after the layer; the
// difference of the two largest probabilities, which costs a head at each exit; and the probability
// of agreeing with all layers by a trained logistic regression on the stream.
enum { CONFIDENCE_SATURATION, CONFIDENCE_SOFTMAX, CONFIDENCE_LEARNED, N_CONFIDENCES };
static const char *const confidence_names[N_CONFIDENCES] = {"saturation", "softmax", "learned"};

typedef struct {
    int confidence, of;      // of: the layers of the model
    int n, *layer;           // after how many layers a token may leave, rising
    double lambda, tau;      // the threshold, and how fast it falls along a text
    double risk, error;      // what build/exits was asked to guarantee
    int weights;             // C + 1 numbers for a learned confidence, otherwise 0
    double *weight;
} Adaptive;

// The threshold of the token at position t of T. It falls along a text as CALM's does (equation 5,
// 0.9 lambda + 0.1 exp(-tau t/T)), since an early change is felt longest; but the tenth is one of
// 1 - lambda, so that 1 is a threshold of 1 everywhere, which the cosines of streams need: they are
// close to it. More than 1 of lambda: no token leaves; 0 or less: all do.
static inline double adaptive_threshold(double lambda, double tau, int t, int T) {
    if (lambda > 1) return INFINITY;
    if (lambda <= 0) return -INFINITY;
    return lambda + 0.1 * (1 - lambda) * exp(-tau * t / T);
}

static inline void adaptive_free(Adaptive *a) { free(a->layer), free(a->weight); }

static inline void adaptive_write(Text *t, const Adaptive *a) {
    text_printf(t, "{\"confidence\": \"%s\", \"layers\": [", confidence_names[a->confidence]);
    for (int i = 0; i < a->n; i++) text_printf(t, i ? ", %d" : "%d", a->layer[i]);
    text_printf(t, "], \"of\": %d, \"lambda\": ", a->of);
    json_write_number(t, a->lambda), text_printf(t, ", \"tau\": ");
    json_write_number(t, a->tau), text_printf(t, ", \"risk\": ");
    json_write_number(t, a->risk), text_printf(t, ", \"error\": ");
    json_write_number(t, a->error), text_printf(t, ",\n \"weights\": [");
    for (int i = 0; i < a->weights; i++) {
        if (i) text_printf(t, ", ");
        json_write_number(t, a->weight[i]);
    }
    text_printf(t, "]}\n");
}

static inline const char *adaptive_read_layers(Adaptive *a, const Json *doc) {
    const int array = json_get(doc, 0, "layers");
    if (json_type(doc, array) != JSON_ARRAY || json_count(doc, array) > 1024)
        return "it has no list of layers";
    a->layer = (int *)xcalloc((size_t)json_count(doc, array) + 1, sizeof *a->layer);
    for (int k = json_first(doc, array); k >= 0; k = json_next(doc, k)) {
        int64_t layer;
        if (!json_int64(doc, k, &layer) || layer < 1 || layer >= a->of)
            return "its layers must be from 1 to one less than all";
        if (a->n && layer <= a->layer[a->n - 1]) return "its layers do not rise";
        a->layer[a->n++] = (int)layer;
    }
    if (!a->n) return "it has no layers";
    if (a->confidence == CONFIDENCE_SATURATION && a->layer[0] < 2)
        return "saturation needs a layer before the exit: none after layer 1";
    return NULL;
}

static inline const char *adaptive_read(Adaptive *a, const Json *doc) {
    const char *error;
    int64_t of = 0;
    if (json_type(doc, 0) != JSON_OBJECT) return "it is not an object";
    if (json_duplicate(doc, 0) >= 0) return "a key is there twice";
    const int name = json_get(doc, 0, "confidence");
    a->confidence = 0;
    while (a->confidence < N_CONFIDENCES &&
           !json_equals(doc, name, confidence_names[a->confidence])) a->confidence++;
    if (name < 0 || a->confidence == N_CONFIDENCES)
        return "its confidence is none of saturation, softmax, learned";
    if (!json_int64(doc, json_get(doc, 0, "of"), &of) || of < 2 || of > 1024)
        return "it does not name the number of layers, 2 to 1024";
    a->of = (int)of;
    if ((error = adaptive_read_layers(a, doc))) return error;
    if (!json_number(doc, json_get(doc, 0, "lambda"), &a->lambda) || !isfinite(a->lambda) ||
        !json_number(doc, json_get(doc, 0, "tau"), &a->tau) || !(a->tau >= 0) || a->tau > 1e6)
        return "lambda and tau must be numbers, tau from 0 to 1e6";
    if (!json_number(doc, json_get(doc, 0, "risk"), &a->risk) || !(a->risk > 0 && a->risk < 1) ||
        !json_number(doc, json_get(doc, 0, "error"), &a->error) || !(a->error > 0 && a->error < 1))
        return "risk and error must be between 0 and 1";
    const int array = json_get(doc, 0, "weights");
    if (json_type(doc, array) != JSON_ARRAY) return "it has no list of weights";
    a->weight = (double *)xcalloc((size_t)json_count(doc, array) + 1, sizeof *a->weight);
    for (int k = json_first(doc, array); k >= 0; k = json_next(doc, k))
        if (!json_number(doc, k, &a->weight[a->weights++]) || !isfinite(a->weight[a->weights - 1]))
            return "a weight is not a finite number";
    if ((a->confidence == CONFIDENCE_LEARNED) != (a->weights > 0))
        return "a learned confidence has weights, and no other";
    return NULL;
}

// Parses exits.json. Returns NULL, or what is wrong; then nothing is to be freed.
static inline const char *adaptive_parse(Adaptive *a, const void *mem, size_t size) {
    Json doc;
    memset(a, 0, sizeof *a);
    const char *error = json_parse(&doc, mem, size);
    if (error) return error;
    error = adaptive_read(a, &doc);
    json_free(&doc);
    if (error) adaptive_free(a);
    return error;
}

// Opens a policy for a model, or dies.
static inline Adaptive adaptive_open(const char *path, const GptConfig *c) {
    FileMap map;
    Adaptive a;
    const char *error = file_map(&map, path);
    if (error) die("cannot read %s: %s\n  hint: build/exits makes it", path, error);
    if ((error = adaptive_parse(&a, map.data, map.size))) die("%s: %s", path, error);
    file_unmap(&map);
    if (a.of != c->L)
        die("%s is for a model of %d layers, and this one has %d\n  hint: build/exits CHECKPOINT",
            path, a.of, c->L);
    if (a.weights && a.weights != c->C + 1)
        die("%s is for a model of %d channels, and this one has %d", path, a.weights - 1, c->C);
    return a;
}

// ---- Running a policy ----

typedef struct {
    const Engine *engine;
    Model *model;
    const Adaptive *policy;
    const GptConfig *config;
    const double *scale;         // as for drop_plan_keep_all
    int tied, T;                 // T: the text length that tau refers to
    DropPlan plan;               // capacity: the rows of a step
    int64_t tokens;              // so far
    double layers, heads;        // run for them; heads: read, one for each token at least
} AdaptiveRun;

// The confidence in a stream x (C) after a layer, which read `before` (C), with logits (V).
static inline double adaptive_confidence(const Adaptive *a, const real *x, const real *before,
                                         const real *logits, int C, int V) {
    double dot = 0, xx = 0, bb = 0, sum = 0;
    for (int c = 0; c < C; c++) xx += (double)x[c] * (double)x[c];
    if (a->confidence == CONFIDENCE_SATURATION) {
        for (int c = 0; c < C; c++) dot += (double)x[c] * (double)before[c];
        for (int c = 0; c < C; c++) bb += (double)before[c] * (double)before[c];
        return xx > 0 && bb > 0 ? dot / sqrt(xx * bb) : 0;
    }
    if (a->confidence == CONFIDENCE_LEARNED) {           // on a stream of root mean square 1
        const double scale = xx > 0 ? sqrt(C / xx) : 0;
        for (int c = 0; c < C; c++) dot += a->weight[c] * (double)x[c] * scale;
        return 1 / (1 + exp(-(dot + a->weight[C])));
    }
    real first = -INFINITY, second = -INFINITY;
    for (int v = 0; v < V; v++)
        if (logits[v] > first) second = first, first = logits[v];
        else if (logits[v] > second) second = logits[v];
    for (int v = 0; v < V; v++) sum += exp((double)logits[v] - (double)first);
    return (1 - exp((double)second - (double)first)) / sum;
}

// One token per row in a call: the rows that are still running, and their workspace.
typedef struct {
    int rows, *row;              // their indices in the caller's arrays
    int *tokens, *seq, *at;      // packed
    real *before, *after, *read; // (rows,C) (rows,C) (rows,V)
} AdaptiveRows;

static inline void adaptive_decode_rows(AdaptiveRun *r, const AdaptiveRows *w, int from, int to,
                                        int keys_only, real *logits, real *stream) {
    const DecodeArgs a = {1, w->tokens, w->seq, w->at, from, to, keys_only, 0, logits, stream};
    drop_plan_keep_all(&r->plan, r->scale, r->tied, w->rows);
    r->engine->decode(r->model, &a, &r->plan);
}

// The rows among w whose flag is set leave after layer `exit`, the others stay: logits (rows,V) of
// the caller, left (rows) the layers that each ran.
static inline void adaptive_leave(AdaptiveRun *r, AdaptiveRows *w, const unsigned char *leaves,
                                  int exit, real *logits, int *left) {
    const size_t V = (size_t)r->config->V;
    AdaptiveRows gone = *w;
    int stay = 0, *held = (int *)xcalloc(4 * (size_t)w->rows, sizeof *held);
    gone.rows = 0, gone.row = held, gone.tokens = held + w->rows, gone.seq = held + 2 * w->rows,
        gone.at = held + 3 * w->rows;
    for (int i = 0; i < w->rows; i++) {
        AdaptiveRows *to = leaves[i] ? &gone : w;
        const int k = leaves[i] ? gone.rows++ : stay++;
        to->row[k] = w->row[i], to->tokens[k] = w->tokens[i], to->seq[k] = w->seq[i],
            to->at[k] = w->at[i];
        if (!leaves[i] && k < i)
            memcpy(w->after + (size_t)k * (size_t)r->config->C, w->after + (size_t)i *
                   (size_t)r->config->C, (size_t)r->config->C * sizeof *w->after);
    }
    w->rows = stay;
    if (gone.rows) adaptive_decode_rows(r, &gone, exit, 0, 1, w->read, NULL);
    for (int i = 0; i < gone.rows; i++) {
        memcpy(logits + (size_t)gone.row[i] * V, w->read + (size_t)i * V, V * sizeof *logits);
        left[gone.row[i]] = exit;
    }
    free(held);
}

// Layers after exit number e - 1 to exit number e of the policy, and who leaves there.
static inline void adaptive_exit(AdaptiveRun *r, AdaptiveRows *w, int e, real *logits, int *left) {
    const Adaptive *a = r->policy;
    const int C = r->config->C, V = r->config->V, exit = a->layer[e];
    const int from = e ? a->layer[e - 1] : 0;
    const int saturation = a->confidence == CONFIDENCE_SATURATION,
        softmax = a->confidence == CONFIDENCE_SOFTMAX;
    unsigned char *leaves = (unsigned char *)xcalloc((size_t)w->rows, 1);
    int at = from;
    if (saturation && exit - 1 > from)
        adaptive_decode_rows(r, w, from, at = exit - 1, 0, NULL, w->before);
    else memcpy(w->before, w->after, (size_t)w->rows * (size_t)C * sizeof *w->before);
    adaptive_decode_rows(r, w, at, exit, 0, softmax ? w->read : NULL, w->after);
    if (softmax) r->heads += w->rows;
    for (int i = 0; i < w->rows; i++) {
        const double confidence = adaptive_confidence(a, w->after + i * C, w->before + i * C,
                                                      w->read + (size_t)i * (size_t)V, C, V);
        leaves[i] = confidence >= adaptive_threshold(a->lambda, a->tau, w->at[i], r->T);
    }
    adaptive_leave(r, w, leaves, exit, logits, left);
    free(leaves);
}

// Decodes one token per row under the policy: logits (rows,V), left (rows) how many layers each
// token ran.
static inline void adaptive_step(AdaptiveRun *r, int rows, const int *tokens, const int *seq,
                                 const int *at, real *logits, int *left) {
    const size_t n = (size_t)rows, C = (size_t)r->config->C, V = (size_t)r->config->V;
    int *held = (int *)xcalloc(4 * n, sizeof *held);
    real *room = (real *)xcalloc(2 * n * C + n * V, sizeof *room);
    AdaptiveRows w = {rows, held, held + n, held + 2 * n, held + 3 * n, room, room + n * C,
                      room + 2 * n * C};
    for (int i = 0; i < rows; i++)
        w.row[i] = i, w.tokens[i] = tokens[i], w.seq[i] = seq[i], w.at[i] = at[i];
    for (int e = 0; e < r->policy->n && w.rows; e++) adaptive_exit(r, &w, e, logits, left);
    if (w.rows) {
        adaptive_decode_rows(r, &w, r->policy->layer[r->policy->n - 1], 0, 0, w.read, NULL);
        for (int i = 0; i < w.rows; i++) {
            memcpy(logits + (size_t)w.row[i] * V, w.read + (size_t)i * V, V * sizeof *logits);
            left[w.row[i]] = r->config->L;
        }
    }
    r->tokens += rows, r->heads += rows;
    for (int i = 0; i < rows; i++) r->layers += left[i];
    free(held), free(room);
}

// FLOPs of the run so far as a fraction of those of all layers, in rows of T tokens. A token that
// has left still needs its keys and values: a quarter of a layer's weights with the queries, which
// are computed, too.
static inline double adaptive_flops(const AdaptiveRun *r) {
    const GptConfig *c = r->config;
    const double block = (gpt_branch_flops(c, ATTN, r->T) + gpt_branch_flops(c, MLP, r->T)) / r->T;
    const double head = gpt_head_flops(c, r->T) / r->T, n = (double)r->tokens;
    const double keys = 2.0 * 3 * c->C * c->C;
    return (r->layers * block + (n * c->L - r->layers) * keys + r->heads * head) /
        (n * (c->L * block + head));
}

#endif
