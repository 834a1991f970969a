// layers.h: attention, LayerNorm, GELU, the head with its loss, AdamW: the timed calls, and their
// checks against formulas in double precision.
#ifndef LAYERS_H
#define LAYERS_H

#include "kernels.h"
#include "adam.h"

// ---- Layers: inputs and outputs ----

typedef struct {
    Model *work;
    size_t B, T, C, NH, V, BT, head_BT;  // head_BT: two chunks, since all are alike
    int *targets;                        // (BT)
    // LayerNorm: (BT,C), rstd (BT), w and b (C)
    real *x, *y, *dx, *dy, *xhat, *rstd, *w, *b, *dw, *db;
    real *qkv, *dqkv, *att, *lse;        // attention: (BT,3C) (BT,3C) (BT,C) (B,NH,T)
    real *h, *gelu, *dgelu, *dh;         // GELU: (BT,4C)
    real *wte, *dwte, *losses;           // head: (V,C) (V,C) (BT)
    NoisePlace noise;                    // of attention
} Layers;

enum { N_LAYER_ARRAYS = 21 };

static void layers_arrays(Layers *s, real **array[N_LAYER_ARRAYS], size_t n[N_LAYER_ARRAYS]) {
    const size_t BTC = s->BT * s->C;
    const struct { real **array; size_t n; } all[N_LAYER_ARRAYS] = {
        {&s->x, BTC}, {&s->y, BTC}, {&s->dx, BTC}, {&s->dy, BTC}, {&s->xhat, BTC},
        {&s->rstd, s->BT}, {&s->w, s->C}, {&s->b, s->C}, {&s->dw, s->C}, {&s->db, s->C},
        {&s->qkv, 3 * BTC}, {&s->dqkv, 3 * BTC}, {&s->att, BTC}, {&s->lse, s->BT * s->NH},
        {&s->h, 4 * BTC}, {&s->gelu, 4 * BTC}, {&s->dgelu, 4 * BTC}, {&s->dh, 4 * BTC},
        {&s->wte, s->V * s->C}, {&s->dwte, s->V * s->C}, {&s->losses, s->BT},
    };
    for (int i = 0; i < N_LAYER_ARRAYS; i++) array[i] = all[i].array, n[i] = all[i].n;
}

static void layers_open(Layers *s, const GptConfig *c, int B, int T) {
    real **array[N_LAYER_ARRAYS];
    size_t n[N_LAYER_ARRAYS];
    s->work = work_open(*c, B, T, DTYPE_FP32);
    s->B = (size_t)B, s->T = (size_t)T, s->C = (size_t)c->C, s->NH = (size_t)c->NH,
        s->V = (size_t)c->V;
    s->BT = s->B * s->T;
    s->head_BT = at_most(s->BT, 2 * head_chunk(s->BT, s->V));
    layers_arrays(s, array, n);
    for (int i = 0; i < N_LAYER_ARRAYS; i++) *array[i] = filled(n[i], 2, 10 + i);
    // so that logits have their usual size in training
    fill(s->wte, s->V * s->C, 0.03, 9);
    s->targets = xcalloc(s->BT, sizeof *s->targets);
    fill_tokens(s->targets, s->BT, c->V, 7);
}

static void layers_close(Layers *s) {
    real **array[N_LAYER_ARRAYS];
    size_t n[N_LAYER_ARRAYS];
    layers_arrays(s, array, n);
    for (int i = 0; i < N_LAYER_ARRAYS; i++) free(*array[i]);
    free(s->targets);
    cpu_engine.close(s->work);
}

// ---- Layers: the timed calls, and their checks against formulas in double ----

// With dropout at the usual rate, or none.
static void attention_noisy(Layers *s, double rate) {
    const Noise z = {.seed = 1, .attn = noise_rate_of(rate)};
    s->noise = noise_place(&z, NOISE_ATTN, 0);
}

static void attention_forward_run(void *arg) {
    const Layers *s = arg;
    attention_forward(s->att, s->lse, &s->work->work, s->qkv, &s->noise, NULL, s->B, s->T, s->C,
                      s->NH);
}

static void attention_backward_run(void *arg) {
    const Layers *s = arg;
    attention_backward(s->dqkv, &s->work->work, s->dy, s->qkv, s->att, s->lse, &s->noise, NULL,
                       s->B, s->T, s->C, s->NH);
}

// The same over whole rows of scores, as AttentionDrop needs them, here without an edit.
static void rows_forward_run(void *arg) {
    const Layers *s = arg;
    const ScoreEdit none = {0};
    attention_rows_forward(s->att, s->lse, &s->work->score_rows, s->qkv, &none, &s->noise, NULL,
                           s->B, s->T, s->C, s->NH);
}

static void rows_backward_run(void *arg) {
    const Layers *s = arg;
    const ScoreEdit none = {0};
    attention_rows_backward(s->dqkv, &s->work->score_rows, s->dy, s->qkv, s->att, s->lse, &none,
                            &s->noise, NULL, NULL, s->B, s->T, s->C, s->NH);
}

static void layernorm_forward_run(void *arg) {
    const Layers *s = arg;
    layernorm_forward(s->y, s->xhat, s->rstd, s->x, NULL, NULL, s->w, s->b, s->BT, s->T, s->C);
}

static void layernorm_backward_run(void *arg) {
    const Layers *s = arg;
    layernorm_backward(s->dx, NULL, s->dw, s->db, s->dy, s->xhat, s->rstd, NULL, s->w, s->BT, s->T,
                       s->C);
}

static void gelu_forward_run(void *arg) {
    const Layers *s = arg;
#pragma omp parallel for
    for (size_t t = 0; t < s->BT; t++)
        gelu_forward(s->gelu + t * 4 * s->C, s->h + t * 4 * s->C, 4 * s->C);
}

static void gelu_backward_run(void *arg) {
    const Layers *s = arg;
#pragma omp parallel for
    for (size_t t = 0; t < s->BT; t++) {
        const size_t at = t * 4 * s->C;
        memcpy(s->dh + at, s->dgelu + at, 4 * s->C * sizeof(real));
        gelu_backward(s->dh + at, s->gelu + at, s->h + at, 4 * s->C);
    }
}

static void head_run(void *arg) {
    const Layers *s = arg;
    head_all(s->losses, s->dx, s->dwte, s->work, s->x, s->wte, s->targets, s->head_BT, s->C, s->V);
}

// Compares the first head of the first row and the last head of the last row: y or, with
// `backward`, the worst of dq, dk and dv.
static double attention_compare(const Layers *s, int backward) {
    const size_t T = s->T, C = s->C, HS = C / s->NH;
    Deviation d[4] = {{0}};                              // dq, dk, dv, y
    for (int end = 0; end < 2; end++) {
        const size_t at = end ? (s->B - 1) * T * C + C - HS : 0,
            at3 = end ? (s->B - 1) * T * 3 * C + C - HS : 0;
        double *y = xcalloc(T * HS, sizeof *y), *dqkv = xcalloc(3 * T * HS, sizeof *dqkv);
        attention_reference(y, dqkv, s->dy + at, s->qkv + at3, &s->noise, end ? s->B - 1 : 0,
                            end ? s->NH - 1 : 0, T, C, HS);
        for (size_t i = 0; i < T * HS; i++) {
            const size_t t = i / HS, h = i % HS;
            deviation_add(&d[3], (double)s->att[at + t * C + h], y[i]);
            for (size_t part = 0; part < 3; part++)
                deviation_add(&d[part], (double)s->dqkv[at3 + t * 3 * C + part * C + h],
                              dqkv[part * T * HS + i]);
        }
        free(y);
        free(dqkv);
    }
    return backward ? fmax(deviation(&d[0]), fmax(deviation(&d[1]), deviation(&d[2])))
        : deviation(&d[3]);
}

static double attention_forward_check(void *arg) {
    attention_forward_run(arg);
    return attention_compare(arg, 0);
}

static double attention_backward_check(void *arg) {
    attention_forward_run(arg);
    attention_backward_run(arg);
    return attention_compare(arg, 1);
}

static void attention_forward_run_noisy(void *arg) {
    attention_noisy(arg, 0.1);
    attention_forward_run(arg);
    attention_noisy(arg, 0);
}

static void attention_backward_run_noisy(void *arg) {
    attention_noisy(arg, 0.1);
    attention_backward_run(arg);
    attention_noisy(arg, 0);
}

static double rows_forward_check(void *arg) {
    rows_forward_run(arg);
    return attention_compare(arg, 0);
}

static double rows_backward_check(void *arg) {
    rows_forward_run(arg);
    rows_backward_run(arg);
    return attention_compare(arg, 1);
}

static double attention_noisy_check(Layers *s, int backward) {
    attention_noisy(s, 0.1);
    attention_forward_run(s);
    if (backward) attention_backward_run(s);
    const double worst = attention_compare(s, backward);
    attention_noisy(s, 0);
    return worst;
}

static double attention_forward_check_noisy(void *arg) { return attention_noisy_check(arg, 0); }
static double attention_backward_check_noisy(void *arg) { return attention_noisy_check(arg, 1); }

static double layernorm_forward_check(void *arg) {
    const Layers *s = arg;
    Deviation d = {0};
    layernorm_forward_run(arg);
    for (int k = 0; k < SAMPLES; k++) {
        const size_t t = pick(s->BT, k, 0);
        const real *x = s->x + t * s->C, *y = s->y + t * s->C;
        double mean, rstd;
        layernorm_reference(&mean, &rstd, x, s->C);
        for (size_t c = 0; c < s->C; c++)
            deviation_add(&d, (double)y[c], ((double)x[c] - mean) * rstd * (double)s->w[c] +
                          (double)s->b[c]);
    }
    return deviation(&d);
}

// dx of some tokens; dw and db of some channels.
static double layernorm_backward_check(void *arg) {
    const Layers *s = arg;
    const size_t C = s->C;
    Deviation dx = {0}, dw = {0}, db = {0};
    double *mean = xcalloc(s->BT, sizeof *mean), *rstd = xcalloc(s->BT, sizeof *rstd);
    memset(s->dw, 0, C * sizeof(real));
    memset(s->db, 0, C * sizeof(real));
    memset(s->dx, 0, s->BT * C * sizeof(real));
    layernorm_forward_run(arg);
    layernorm_backward_run(arg);
    for (size_t t = 0; t < s->BT; t++) layernorm_reference(&mean[t], &rstd[t], s->x + t * C, C);
    for (int k = 0; k < SAMPLES; k++) {
        const size_t t = pick(s->BT, k, 0), c0 = pick(C, k, 1);
        const real *x = s->x + t * C, *dy = s->dy + t * C;
        double g_mean = 0, along = 0, sum_w = 0, sum_b = 0;
        for (size_t c = 0; c < C; c++) {
            const double g = (double)dy[c] * (double)s->w[c];
            g_mean += g / (double)C;
            along += g * ((double)x[c] - mean[t]) * rstd[t] / (double)C;
        }
        for (size_t c = 0; c < C; c++)
            deviation_add(&dx, (double)s->dx[t * C + c],
                          rstd[t] * ((double)dy[c] * (double)s->w[c] - g_mean -
                                     ((double)x[c] - mean[t]) * rstd[t] * along));
        for (size_t i = 0; i < s->BT; i++) {
            sum_w += (double)s->dy[i * C + c0] * ((double)s->x[i * C + c0] - mean[i]) * rstd[i];
            sum_b += (double)s->dy[i * C + c0];
        }
        deviation_add(&dw, (double)s->dw[c0], sum_w);
        deviation_add(&db, (double)s->db[c0], sum_b);
    }
    free(mean);
    free(rstd);
    return fmax(deviation(&dx), fmax(deviation(&dw), deviation(&db)));
}

static double gelu_compare(const Layers *s, int backward) {
    Deviation y = {0}, dx = {0};
    for (int k = 0; k < 100 * SAMPLES; k++) {
        const size_t i = pick(4 * s->BT * s->C, k, 0);
        const double x = (double)s->h[i],
            th = tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x));
        const double slope = sqrt(2 / 3.14159265358979323846) * (1 + 3 * 0.044715 * x * x);
        deviation_add(&y, (double)s->gelu[i], 0.5 * x * (1 + th));
        deviation_add(&dx, (double)s->dh[i],
                      (double)s->dgelu[i] * (0.5 * (1 + th) + 0.5 * x * (1 - th * th) * slope));
    }
    return backward ? fmax(deviation(&y), deviation(&dx)) : deviation(&y);
}

static double gelu_forward_check(void *arg) {
    gelu_forward_run(arg);
    return gelu_compare(arg, 0);
}

static double gelu_backward_check(void *arg) {
    gelu_backward_run(arg);
    return gelu_compare(arg, 1);
}

// The gradient of the logit of word v at token t.
static double head_gradient(const Layers *s, const double *lse, size_t t, size_t v) {
    const double logit = dot_double(s->x + t * s->C, s->wte + v * s->C, s->C);
    return (exp(logit - lse[t]) - (v == (size_t)s->targets[t])) / (double)s->head_BT;
}

// All losses, dx of some tokens, dwte of some words: the first few are targets, whose gradients are
// far larger.
static double head_check(void *arg) {
    const Layers *s = arg;
    const size_t n = s->head_BT, C = s->C, V = s->V;
    Deviation losses = {0}, dx = {0};
    double *lse = xcalloc(n, sizeof *lse), worst = 0;
    memset(s->dwte, 0, V * C * sizeof(real));
    head_run(arg);
#pragma omp parallel for
    for (size_t t = 0; t < n; t++) {
        for (size_t v = 0; v < V; v++) lse[t] += exp(dot_double(s->x + t * C, s->wte + v * C, C));
        lse[t] = log(lse[t]);
    }
    for (size_t t = 0; t < n; t++) {
        const size_t target = (size_t)s->targets[t];
        deviation_add(&losses, (double)s->losses[t],
                      lse[t] - dot_double(s->x + t * C, s->wte + target * C, C));
    }
    for (int k = 0; k < 8; k++) {
        const size_t word = k < 4 ? (size_t)s->targets[pick(n, k, 0)] : pick(V, k - 4, 1),
            token = pick(n, k, 2);
        double *want_dwte = xcalloc(C, sizeof(double)), *want_dx = xcalloc(C, sizeof(double));
        Deviation dwte = {0};
        for (size_t t = 0; t < n; t++) {
            const double g = head_gradient(s, lse, t, word);
            for (size_t c = 0; c < C; c++) want_dwte[c] += g * (double)s->x[t * C + c];
        }
        for (size_t v = 0; v < V; v++) {
            const double g = head_gradient(s, lse, token, v);
            for (size_t c = 0; c < C; c++) want_dx[c] += g * (double)s->wte[v * C + c];
        }
        for (size_t c = 0; c < C; c++) {
            deviation_add(&dwte, (double)s->dwte[word * C + c], want_dwte[c]);
            deviation_add(&dx, (double)s->dx[token * C + c], want_dx[c]);
        }
        worst = fmax(worst, deviation(&dwte));
        free(want_dwte);
        free(want_dx);
    }
    free(lse);
    return fmax(worst, fmax(deviation(&losses), deviation(&dx)));
}

// ---- Layers: the table ----

static void layer_row(MeasureTable *t, Bench *b, const char *name, const char *unit, double work,
                      double terms, void (*run)(void *), double (*check)(void *), void *arg) {
    MeasureRow *r = measure_row(t, "%s", name);
    r->peak = &b->peaks.row[*unit == 'G' && unit[1] == 'F' ? PEAK_FMA : PEAK_UPDATE];
    r->unit = unit, r->work = work, r->tolerance = rounding(terms);
    r->run = run, r->check = check, r->arg = arg;
}

// FLOPs of matmuls as counted by gpt.h; bytes that must move at least once.
static void layer_rows(MeasureTable *t, Bench *b, Layers *s, Adam *a) {
    const double BT = (double)s->BT, T = (double)s->T, C = (double)s->C, V = (double)s->V;
    const double attention = 4 * C * (double)s->B * T * (T + 1) / 2, bytes = sizeof(real) * BT * C;
    const double parameters = (double)gpt_params_count(&a->c);
    const char *flops = "GFLOP/s", *memory = "GB/s";
    layer_row(t, b, "attention forward", flops, attention, T, attention_forward_run,
              attention_forward_check, s);
    layer_row(t, b, "attention backward", flops, 2.5 * attention, T, attention_backward_run,
              attention_backward_check, s);
    layer_row(t, b, "attention forward, dropout", flops, attention, T, attention_forward_run_noisy,
              attention_forward_check_noisy, s);
    layer_row(t, b, "attention backward, dropout", flops, 2.5 * attention, T,
              attention_backward_run_noisy, attention_backward_check_noisy, s);
    layer_row(t, b, "attention forward, whole rows", flops, attention, T, rows_forward_run,
              rows_forward_check, s);
    layer_row(t, b, "attention backward, whole rows", flops, 2.5 * attention, T, rows_backward_run,
              rows_backward_check, s);
    layer_row(t, b, "LayerNorm forward", memory, 3 * bytes, C, layernorm_forward_run,
              layernorm_forward_check, s);
    layer_row(t, b, "LayerNorm backward", memory, 3 * bytes, BT, layernorm_backward_run,
              layernorm_backward_check, s);
    layer_row(t, b, "GELU forward", memory, 2 * 4 * bytes, 16, gelu_forward_run, gelu_forward_check,
              s);
    layer_row(t, b, "GELU backward", memory, 4 * 4 * bytes, 16, gelu_backward_run,
              gelu_backward_check, s);
    for (int i = 0; i < t->n; i++)
        snprintf(t->row[i].shape, sizeof t->row[i].shape, "%zu x %zu x %zu", s->B, s->T,
                 (i < 6 ? 1 : 4) * s->C);
    layer_row(t, b, "head, loss, gradients", flops, 6 * (double)s->head_BT * C * V, V, head_run,
              head_check, s);
    snprintf(t->row[t->n - 1].shape, sizeof t->row[0].shape, "%zu x %zu x %zu", s->head_BT, s->V,
             s->C);
    layer_row(t, b, "norm and AdamW", memory, 8 * sizeof(real) * parameters, 16, adam_run,
              adam_check, a);
    snprintf(t->row[t->n - 1].shape, sizeof t->row[0].shape, "%.1f M", 1e-6 * parameters);
}

static void bench_layers(Bench *b, const Case *cases, int n, int rounds) {
    for (int i = 0; i < n; i++) {
        const GptConfig c = gpt_preset(cases[i].preset)->config;
        MeasureTable t = {.rounds = rounds};
        Layers s;
        Adam a;
        layers_open(&s, &c, cases[i].B, cases[i].T);
        adam_open(&a, b->engine, &c, DTYPE_FP32);
        layer_rows(&t, b, &s, &a);
        measure_table(&t);
        char *title = xprintf("layers: %s, B %d, T %d", cases[i].preset, cases[i].B, cases[i].T);
        measure_print(&t, title, &b->rows);
        measure_free(&t);
        free(title);
        layers_close(&s);
        cpu_engine.close(a.m);
    }
}

#endif
