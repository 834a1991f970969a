// adam.h: the gradient norm and AdamW's update of a few layers, on either engine, and the formulas
// in double. Include the engine's source first: its Model is accessed.
#ifndef ADAM_H
#define ADAM_H

#include "reference.h"

enum { ADAM_LAYERS = 4 };

typedef struct {
    const Engine *engine;
    GptConfig c;
    Model *m;
    int64_t t[BRANCHES * ADAM_LAYERS + 1];
    UpdateArgs update;
} Adam;

static inline void adam_run(void *arg) {
    Adam *a = (Adam *)arg;
    // reuse the same gradients
    for (int i = 0; i <= BRANCHES * ADAM_LAYERS; i++) a->t[i]++, a->m->spent[i] = 0;
    a->engine->update(a->m, &a->update);
}

// The preset's sizes, but with a tiny vocabulary and row length.
static inline void adam_open(Adam *a, const Engine *engine, const GptConfig *c, int dtype) {
    const GptConfig config = {2, 1, ADAM_LAYERS, c->NH, c->C};
    const UpdateArgs update = {6e-4, 0.9, 0.95, 1e-8, 0.1, 1, a->t, 0, 0};
    EngineArgs args;
    memset(&args, 0, sizeof args);
    args.B = args.T = 1, args.dtype = dtype;
    args.bound.attn_rows = args.bound.mlp_rows = ADAM_LAYERS,
        args.bound.rows = BRANCHES * ADAM_LAYERS;
    a->engine = engine;
    a->c = config;
    a->update = update;
    a->m = engine_open(engine, &a->c, &args);
    memset(a->t, 0, sizeof a->t);
}

// A slot of a parameter before the update, in every layer; the second moment is no less than the
// first moment's square.
static inline void adam_fill(real *x, size_t n, Slot slot, int param) {
    const double size[] = {0.05, 1, 0.001, 0.02};
    fill(x, n, size[slot], 40 + 4 * param + (int)slot);
    for (size_t i = 0; i < n && slot == SLOT_V; i++) x[i] *= x[i];
}

// Checks some elements of each parameter's last layer after one update with step count 10.
static inline double adam_check(void *arg) {
    Adam *a = (Adam *)arg;
    const UpdateArgs *u = &a->update;
    Deviation d[4] = {{0, 0, 0}}, norms = {0, 0, 0};
    double squares = 0;
    real *x[4], *before[4];
    for (int s = 0; s < 4; s++)                          // fcw is the largest
        x[s] = (real *)xcalloc(gpt_param_size(&a->c, P_fcw), sizeof(real)),
        before[s] = (real *)xcalloc(gpt_param_size(&a->c, P_fcw), sizeof(real));
    for (int p = 0; p < N_PARAMS; p++)
        for (int s = 0; s < 4; s++) {
            const size_t n = gpt_param_size(&a->c, p);
            adam_fill(x[0], n, (Slot)s, p);
            for (int l = 0; l < gpt_param_layers(&a->c, p); l++)
                a->engine->write(a->m, (Slot)s, p, l, x[0]);
            if (s == SLOT_GRAD) squares += gpt_param_layers(&a->c, p) * dot_double(x[0], x[0], n);
        }
    for (int i = 0; i <= BRANCHES * ADAM_LAYERS; i++) a->t[i] = 10;
    deviation_add(&norms, a->engine->update(a->m, u), sqrt(squares));
    for (int p = 0; p < N_PARAMS; p++) {
        const size_t n = gpt_param_size(&a->c, p);
        if (!gpt_param_layers(&a->c, p)) continue;       // of adapters, which it lacks
        for (int s = 0; s < 4; s++) {
            adam_fill(before[s], n, (Slot)s, p);
            a->engine->read(a->m, (Slot)s, p, gpt_param_layers(&a->c, p) - 1, x[s]);
        }
        for (int k = 0; k < SAMPLES; k++) {
            const size_t i = pick(n, k, (uint32_t)p);
            const double g = (double)before[SLOT_GRAD][i] * fmin(1,
                                                                 u->grad_clip /
                                                                 (sqrt(squares) + 1e-6));
            const double m = u->beta1 * (double)before[SLOT_M][i] + (1 - u->beta1) * g;
            const double v = u->beta2 * (double)before[SLOT_V][i] + (1 - u->beta2) * g * g;
            const double decay = gpt_param[p].dims ==
                2 ? u->lr * u->weight_decay * (double)before[SLOT_PARAM][i] : 0;
            const double step = u->lr * m / (1 - pow(u->beta1, 10)) /
                (sqrt(v / (1 - pow(u->beta2, 10))) + u->eps);
            const double want[4] = {(double)before[SLOT_PARAM][i] - decay - step, 0, m, v};
            for (int s = 0; s < 4; s++) deviation_add(&d[s], (double)x[s][i], want[s]);
        }
    }
    for (int s = 0; s < 4; s++) free(x[s]), free(before[s]);
    return fmax(fmax(deviation(&norms), deviation(&d[SLOT_GRAD])),
                fmax(deviation(&d[SLOT_PARAM]),
                     fmax(deviation(&d[SLOT_M]), deviation(&d[SLOT_V]))));
}

#endif
