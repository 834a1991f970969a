// pass.h: one call of an engine as data. A Batch is what it reads, a Pass what it does with it. Whatever may be absent is
// NULL or 0, and with all of it absent a pass is that of the plain GPT under a plan of drop path: a feature that changes
// a pass is a part of its own here, and no engine function gets another argument.
#ifndef PASS_H
#define PASS_H

#include "drop_path.h"
#include "noise.h"

// Rows of T tokens, each in [0, V). Targets likewise; one that is negative is not scored, which only evaluation may have.
typedef struct {
    int rows, T;
    const int *tokens, *targets;                         // (rows,T); targets NULL: no loss, the pass ends before the head
} Batch;

// What the loss of a training pass is, beside -log p of the targets. All zero: nothing.
typedef struct {
    double smoothing;    // label smoothing (Szegedy et al. 2016): this share of the target's weight goes to all V tokens alike
} Objective;

// Who looks on. Points of the residual stream, in the order in which they are seen: WATCH_EMBEDDINGS, after each branch that
// the model has (whether the plan runs it or not), and the features, which are what the head reads.
enum { WATCH_EMBEDDINGS };
static inline int watch_after(int layer, int branch) { return 1 + BRANCHES * layer + branch; }
static inline int watch_features(int layers) { return 1 + BRANCHES * layers; }

typedef struct {
    void *self;                                          // comes with each call
    const unsigned char *want;                           // (2L+2) by point, whether it is to be seen. In a tied plan the
                                                         // stream between a block's branches does not exist
    void (*see)(void *self, int point, const real *x);   // x (rows,T,C) on the host, until it returns
    void (*see_gradient)(void *self, const real *dx);    // NULL, or of a training pass: the gradient (rows,T,C) by the sum of
                                                         // the embeddings, times Pass.weight. Not with frozen layers
} Watch;

typedef struct {
    const DropPlan *plan;                                // of Batch.rows rows: which run which branch, with which scale
    const Noise *noise;                                  // dropout; NULL: none
    const Objective *objective;                          // NULL: the mean of -log p
    const Watch *watch;                                  // NULL: nobody looks on
    double weight;                                       // 0: evaluation; else this times the gradient of the mean loss
                                                         // is added to the gradients
    const unsigned char *reduce;                         // (2L+1) by branch and last of all else. Not NULL: this is the
                                                         // rank's last micro-batch before an update, and the gradients
                                                         // whose flag is set are summed over all ranks, which may go on
                                                         // behind the call and which update waits for. Those of the
                                                         // others are zero on every rank, or frozen. All ranks give the
                                                         // same flags
} Pass;

// What a loss is made of: means over the targets. Of those that the objective does not ask for, 0.
enum {
    PART_NLL,                                            // -log p of the target
    PART_UNIFORM,                                        // -log p of all V tokens, in the mean
    N_PARTS
};

static inline double objective_loss(const Objective *o, const double part[N_PARTS]) {
    return !o || o->smoothing == 0 ? part[PART_NLL]
                                   : (1 - o->smoothing) * part[PART_NLL] + o->smoothing * part[PART_UNIFORM];
}

// How many targets of a batch are scored, but at least 1: what sums over them are divided by.
static inline size_t batch_scored(const Batch *b) {
    size_t count = 0;
    for (size_t t = 0; b->targets && t < (size_t)b->rows * (size_t)b->T; t++) count += b->targets[t] >= 0;
    return count ? count : 1;
}

// The parts of a batch's loss, and the loss, from those of its targets: losses (rows,T), and uniform (rows,T), NULL: not asked
// for. Summed in double in the order of the batch.
static inline double pass_loss(double part[N_PARTS], const Batch *b, const Pass *pass, const real *losses,
                               const real *uniform) {
    double nll = 0, all = 0;
    for (size_t t = 0; b->targets && t < (size_t)b->rows * (size_t)b->T; t++) {
        nll += (double)losses[t];
        if (uniform) all += (double)uniform[t];
    }
    part[PART_NLL] = nll / (double)batch_scored(b), part[PART_UNIFORM] = all / (double)batch_scored(b);
    return objective_loss(pass->objective, part);
}

static inline double pass_smoothing(const Pass *pass) { return pass->objective ? pass->objective->smoothing : 0; }

static inline Batch batch_of(int rows, int T, const int *tokens, const int *targets) {
    Batch b = {rows, T, tokens, targets};
    return b;
}

// A plain pass: evaluation, or with weight != 0 a step's part on one rank.
static inline Pass pass_of(const DropPlan *plan, double weight) {
    Pass p = {plan, NULL, NULL, NULL, weight, NULL};
    return p;
}

#endif
