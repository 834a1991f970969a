// exits.h: the early-exit loss (LayerSkip: Elhoushi et al. 2024, arXiv 2404.16710, equations 5 and
// 6): the loss is also read after layers before the last, through the same ln_f and head. Which
// layers, and with which weight, is a function of the step alone.
#ifndef EXITS_H
#define EXITS_H

#include <stdint.h>

// Which exits a step has, in the order of --exit-curriculum.
enum {
    EXITS_ROTATIONAL,  // every R-th layer; the next step's are one layer higher
    EXITS_GRADUAL,     // from the top down: another layer every T / 2L steps of a run of T
    EXITS_ALL
};

typedef struct {
    double scale;      // e_scale; 0: no exits
    int curriculum, every;
    int64_t steps;     // of the whole run
} Exits;

// Whether step t = 0, 1, ... reads the loss after layer l = 0 .. layers-2. Not after layer 0, whose
// weight is 0.
static inline int exits_on(const Exits *e, int layers, int l, int64_t t) {
    if (!(e->scale > 0) || l < 1 || l >= layers - 1) return 0;
    if (e->curriculum == EXITS_ROTATIONAL) return (l - t) % e->every == 0;
    return e->curriculum == EXITS_ALL || 2.0 * layers * (double)t >=
        (double)(layers - 1 - l) * (double)e->steps;
}

// w (layers): the weights of step t, which sum to 1. Layer l weighs scale * (0 + 1 + ... + l), the
// last one L-1 + scale * (0 + 1 + ... + L-2), and layers whose exit is off 0. Returns the number of
// exits before the last layer.
static inline int exits_weights(double *w, const Exits *e, int layers, int64_t t) {
    const double below = layers - 1;
    int n = 0;
    double sum = w[layers - 1] = layers > 1 ? below + e->scale * below * (below - 1) / 2 : 1;
    for (int l = 0; l < layers - 1; l++) {
        const int on = exits_on(e, layers, l, t);
        w[l] = on ? e->scale * l * (l + 1) / 2 : 0;
        sum += w[l], n += on;
    }
    for (int l = 0; l < layers; l++) w[l] /= sum;
    return n;
}

// The number of exits of step t before the last layer; exits_most: the most of any step.
static inline int exits_count(const Exits *e, int layers, int64_t t) {
    int n = 0;
    for (int l = 0; l < layers - 1; l++) n += exits_on(e, layers, l, t);
    return n;
}

static inline int exits_most(const Exits *e, int layers) {
    int most = 0;
    if (e->curriculum != EXITS_ROTATIONAL) return exits_count(e, layers, e->steps);
    for (int t = 0; t < e->every; t++) {
        const int n = exits_count(e, layers, t);
        most = n > most ? n : most;
    }
    return most;
}

#endif
