// speculate.h: self-speculative decoding (LayerSkip: Elhoushi et al. 2024, section 4.3; Leviathan
// et al. 2023): the first E layers draft some tokens, one by one, and the others then verify all of
// them in one call, continuing from where the drafts' layers stopped. So nothing is computed twice,
// and there is one cache: keys and values of refused tokens are overwritten by the next.
//
// Greedy texts are those without speculation, bit for bit where the engine's logits are
// (CAN_ANY_BATCH). Sampled texts have the full model's distribution, after temperature, top-k and
// top-p, but are other texts: they take other random numbers.
#ifndef SPECULATE_H
#define SPECULATE_H

#include "sample.h"

typedef struct {
    int layer, drafts;                   // E; tokens drafted in a round
    int64_t rounds, drafted, accepted;   // over all texts
    // to choose E, by speculate_probe: the sum over `probed` tokens of the chance that a draft of
    // each layer is accepted (L); how many tokens are enough
    double *accept;
    int64_t probed, enough;
    const GptConfig *config;
} Speculation;

// How a round of one text stands.
typedef struct {
    SampleText *text;
    int slot, n;         // its sequence; tokens to draft
    int *token;          // (drafts + 1) the unread one, then the drafts
    double *q;           // (drafts,V) the distributions that they were drawn from
} SpeculateRow;

// The random numbers of a text's next token but `ahead`: to draft it, to accept it, to draw another
// instead. A token that is drafted again in a later round, after a refusal before it, may use the
// same ones: nothing has depended on them.
static inline Philox speculate_words(const Sampler *s, const SampleText *t, int ahead) {
    return rng_words(s->args.seed, STREAM_SPECULATE, (uint64_t)(t->made + ahead), t->number,
                     s->round);
}

// Draws from weights p (V) that sum to `sum`.
static inline int speculate_draw(const double *p, int V, double sum, double u) {
    int chosen = 0;
    double part = 0;
    for (int v = 0; v < V && part <= sum * u; v++)
        if (p[v] > 0) part += p[v], chosen = v;
    return chosen;
}

// The token that follows draft number j, or the unread one, according to all layers: the next draft
// if that is accepted (Leviathan et al., algorithm 1), which *accepted tells. p (V) is workspace.
static inline int speculate_verify(const Sampler *s, const SpeculateRow *r, int j,
                                   const real *logits, double *p, int *accepted) {
    const int V = sample_V(s), draft = j < r->n ? r->token[j + 1] : -1;
    if (s->args.temperature == 0) {
        const int best = sample_best(logits, V);
        *accepted = best == draft;
        return best;
    }
    const Philox w = speculate_words(s, r->text, 0);
    const double *q = r->q + (size_t)j * (size_t)V;
    double sum = 0;
    sample_distribution(p, logits, V, &s->args);
    *accepted = draft >= 0 && uniform01(w.v[1]) * q[draft] < p[draft];
    if (*accepted) return draft;
    for (int v = 0; v < V; v++) {
        if (draft >= 0) p[v] = fmax(p[v] - q[v], 0);
        sum += p[v];
    }
    // p = q up to rounding, and yet refused
    if (sum == 0) sample_distribution(p, logits, V, &s->args), sum = 1;
    return speculate_draw(p, V, sum, uniform01(w.v[2]));
}

// Runs tokens first .. first+n-1 of each row in `some` through layers from .. to-1.
static inline void speculate_decode(Sampler *s, SpeculateRow *const *some, int rows, int first,
                                    int n, int from, int to, real *logits) {
    int *tokens = (int *)xcalloc((size_t)(rows * n), sizeof *tokens),
        *seq = (int *)xcalloc((size_t)rows * 2, sizeof *seq), *at = seq + rows;
    for (int i = 0; i < rows; i++) {
        memcpy(tokens + i * n, some[i]->token + first, (size_t)n * sizeof *tokens);
        seq[i] = some[i]->slot, at[i] = (int)some[i]->text->cached + first;
    }
    const DecodeArgs a = {n, tokens, seq, at, from, to, 0, 1, logits, NULL};
    if (s->plan.batch != rows) drop_plan_keep_all(&s->plan, s->scale, s->tied, rows);
    s->engine->decode(s->model, &a, &s->plan);
    free(tokens), free(seq);
}

// Drafts: the unread token and then each draft through the first layers.
static inline void speculate_draft(Sampler *s, SpeculateRow *row, int rows, SpeculateRow **some,
                                   real *logits) {
    Speculation *k = (Speculation *)s->self;
    const int V = sample_V(s);
    for (int j = 0, n = 1; n > 0; j++) {
        int drafts = 0;
        n = 0;
        for (int i = 0; i < rows; i++)
            if (row[i].n >= j) drafts += row[i].n > j, some[n++] = &row[i];
        if (n) speculate_decode(s, some, n, j, 1, 0, k->layer, drafts ? logits : NULL);
        for (int i = 0; i < n; i++) {
            SpeculateRow *r = some[i];
            const real *z = logits + (size_t)i * (size_t)s->V;
            if (r->n <= j) continue;
            if (s->args.temperature == 0) r->token[j + 1] = sample_best(z, V);
            else {
                double *q = r->q + (size_t)j * (size_t)V;
                sample_distribution(q, z, V, &s->args);
                r->token[j + 1] = speculate_draw(q, V, 1, uniform01(speculate_words(s, r->text,
                    j).v[0]));
            }
            k->drafted++;
        }
    }
}

// Takes what the other layers say of a row's drafts, logits (n+1,V): the accepted ones, and one
// token more.
static inline void speculate_take(Sampler *s, SpeculateRow *r, const real *logits, double *p,
                                  int64_t most) {
    Speculation *k = (Speculation *)s->self;
    SampleText *t = r->text;
    for (int j = 0, accepted = 1; j <= r->n && accepted && !t->done; j++) {
        const real *z = logits + (size_t)j * (size_t)s->V;
        if (!sample_check(s, t, z, sample_V(s))) return;
        const int token = speculate_verify(s, r, j, z, p, &accepted);
        k->accepted += accepted;
        t->cached++;
        sample_append(s, t, token, most);
    }
}

// Sampler.round_of: a round for the texts which[0 .. rows), each with one unread token.
static inline void speculate_round(Sampler *s, SampleText *text, const int *which, int rows,
                                   int64_t most) {
    Speculation *k = (Speculation *)s->self;
    const size_t V = (size_t)s->V, each = (size_t)k->drafts + 1, n = (size_t)rows;
    const size_t sampled = s->args.temperature == 0 ? 0 : n * (size_t)k->drafts * V;
    SpeculateRow *row = (SpeculateRow *)xcalloc(n, sizeof *row),
        **some = (SpeculateRow **)xcalloc(n, sizeof(SpeculateRow *));
    int *tokens = (int *)xcalloc(n * each, sizeof *tokens);
    double *q = (double *)xcalloc(sampled + V, sizeof *q), *p = q + sampled;
    // rows that are verified in one call: 256 MiB of logits at most, unless one row has more
    const size_t fit = (1 << 26) / (each * V), chunk = fit < 1 ? 1 : fit < n ? fit : n;
    const size_t held = chunk * each > n ? chunk * each : n;
    real *logits = (real *)xcalloc(held * V, sizeof *logits);
    for (int i = 0; i < rows; i++) {
        SampleText *t = &text[which[i]];
        // as many as fit into the context, and as the text still takes
        const int64_t room = s->T - 1 - t->cached, left = most - t->made - 1;
        const int64_t drafts = room < left ? room : left;
        const SpeculateRow r = {t, which[i], drafts < k->drafts ? (int)drafts : k->drafts,
                                tokens + (size_t)i * each,
                                q + (sampled ? (size_t)i * (size_t)k->drafts * V : 0)};
        row[i] = r;
        r.token[0] = t->tokens[t->have - 1];
    }
    speculate_draft(s, row, rows, some, logits);
    for (int drafts = 0; drafts <= k->drafts; drafts++) {            // equally long ones together
        int count = 0;
        for (int i = 0; i < rows; i++)
            if (row[i].n == drafts) some[count++] = &row[i];
        for (int first = 0, now; first < count; first += now) {
            now = count - first < (int)chunk ? count - first : (int)chunk;
            speculate_decode(s, some + first, now, 0, drafts + 1, k->layer, s->layers, logits);
            for (int i = 0; i < now; i++)
                speculate_take(s, some[first + i], logits + (size_t)(i * (drafts + 1)) * V, p,
                               most);
        }
    }
    k->rounds += rows;
    free(row), free(some), free(tokens), free(q), free(logits);
}

// ---- Choosing the exit layer ----

// How many times faster than plain decoding a round is expected to be if a draft of the first
// `layer` layers is accepted with chance `accept`, independently of others. Costs are those of
// reading the weights, of which a verified token but the first takes SPECULATE_SHARE.
#define SPECULATE_SHARE 0.15
static inline double speculate_gain(const GptConfig *c, int layer, int drafts, double accept) {
    const double block = 12.0 * c->C * c->C, head = (double)c->V * c->C, n = drafts;
    const double all = c->L * block + head, draft = layer * block + head;
    const double rest = (c->L - layer) * block + head;
    const double tokens = accept < 1 ? (1 - pow(accept, n + 1)) / (1 - accept) : n + 1;
    const double cost = n * draft + layer * block + rest * (1 + SPECULATE_SHARE * n);
    return tokens * all / cost;
}

// The layer after which drafts promise most, or 0 if plain decoding is as fast.
static inline int speculate_choose(const Speculation *k) {
    double best = 1;
    int layer = 0;
    for (int l = 1; l < k->config->L; l++) {
        const double accept = k->accept[l - 1] / (double)k->probed;
        const double gain = speculate_gain(k->config, l, k->drafts, accept);
        if (gain > best) best = gain, layer = l;
    }
    return layer;
}

// The chance that a draft drawn from logits q is accepted by logits p.
static inline double speculate_agree(const Sampler *s, const real *q, const real *p) {
    const int V = sample_V(s);
    if (s->args.temperature == 0) return sample_best(q, V) == sample_best(p, V);
    double *a = (double *)xcalloc(2 * (size_t)V, sizeof *a), *b = a + V, sum = 0;
    sample_distribution(a, q, V, &s->args);
    sample_distribution(b, p, V, &s->args);
    for (int v = 0; v < V; v++) sum += fmin(a[v], b[v]);
    free(a);
    return sum;
}

// Runs the last `n` of a call's tokens layer by layer: logits (L,rows,n,V) after each layer and
// token; the tokens before them as usual.
static inline void speculate_layers(Sampler *s, const DecodeArgs *a, int n, real *logits) {
    const int rows = s->plan.batch, before = a->n - n;
    int *part = (int *)xcalloc((size_t)(rows * a->n), sizeof *part),
        *at = (int *)xcalloc((size_t)rows, sizeof *at);
    DecodeArgs d = {.n = before, .tokens = part, .seq = a->seq, .at = a->at};
    for (int i = 0; i < rows * before; i++) part[i] = a->tokens[i / before * a->n + i % before];
    if (before) s->engine->decode(s->model, &d, &s->plan);
    for (int i = 0; i < rows; i++) at[i] = a->at[i] + before;
    for (int i = 0; i < rows * n; i++) part[i] = a->tokens[i / n * a->n + before + i % n];
    d.n = n, d.at = at, d.all = 1;
    for (int l = 0; l < s->layers; l++) {
        d.from = l, d.to = l + 1, d.logits = logits + (size_t)(l * rows * n) * (size_t)s->V;
        s->engine->decode(s->model, &d, &s->plan);
    }
    free(part), free(at);
}

// Sampler.decode until enough tokens have been seen, in prompts or in the first texts: gives the
// same logits, observes how often each layer's drafts would be accepted, then chooses.
static inline void speculate_probe(Sampler *s, const DecodeArgs *a) {
    Speculation *k = (Speculation *)s->self;
    const size_t V = (size_t)s->V, L = (size_t)s->layers;
    const int rows = s->plan.batch;
    // 64 MiB of logits at most, unless a single token has more
    const int64_t fit = (int64_t)((1 << 24) / (L * (size_t)rows * V)), left = k->enough - k->probed;
    const int64_t most = fit < left ? fit : left;
    const int n = most < 1 ? 1 : most < a->n ? (int)most : a->n;
    real *logits = (real *)xcalloc(L * (size_t)(rows * n) * V, sizeof *logits);
    const real *last = logits + (L - 1) * (size_t)(rows * n) * V;
    speculate_layers(s, a, n, logits);
    for (size_t i = 0; i < (size_t)(rows * n); i++)
        for (size_t l = 0; l < L; l++)
            k->accept[l] += speculate_agree(s, logits + (l * (size_t)(rows * n) + i) * V,
                                            last + i * V);
    for (int row = 0; row < rows && a->logits; row++)
        memcpy(a->logits + (size_t)row * V, last + (size_t)(row * n + n - 1) * V,
               V * sizeof *logits);
    free(logits);
    k->probed += rows * n;
    if (k->probed < k->enough) return;
    s->decode = NULL;
    k->layer = speculate_choose(k);
    if (k->layer) s->round_of = speculate_round;
}

#endif
