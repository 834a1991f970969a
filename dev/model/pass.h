// pass.h: one call of an engine as data. A Batch is its input, a Pass what to do with it. Optional
// members are NULL or 0; with all of them absent, a pass is that of the plain GPT under a drop-path
// plan. A feature that changes the pass becomes a member here, so no engine function gets another
// argument.
#ifndef PASS_H
#define PASS_H

#include "drop_path.h"
#include "noise.h"

// Rows of T tokens, each in [0, V), and their targets. A negative target is not scored; only
// evaluation may have those.
typedef struct {
    int rows, T;
    const int *tokens, *targets;  // (rows,T); targets NULL: no loss, the pass ends before the head
} Batch;

// A teacher's attention maps (model/align.h), with which those of the kept rows are compared.
typedef struct {
    // of the same engine, opened with these layers as EngineArgs.maps; its last run was on this
    // batch
    struct Model *teacher;
    const int *layer;   // (L) the teacher's layer beside each of the student's, -1: not compared.
                        // Frozen layers are not
    int layers;         // how many are
    int kl;             // 0: distance of directions, 1: divergence
    double gamma;       // weight of the mean over rows, compared layers and queries t >= 1 of the
                        // branch's scale times the distance: so its expectation under drop path is
                        // that without
} Align;

// The terms of a training pass's loss besides -log p of the targets. All zero: none.
typedef struct {
    // label smoothing (Szegedy et al. 2016): this share of the target's weight is spread over all V
    // tokens
    double smoothing;
    // (L) the weight of the loss read after each layer (exits.h); NULL: after the last one only, 1.
    // The last layer's is not 0
    const double *exit;
    // distillation (Hinton et al. 2015): this share of the loss is temperature^2 KL(teacher ||
    // student) of the softmax at that temperature; the rest is as without. The teacher is a model
    // of the same engine, dtype and vocabulary, opened for the same B and T, whose last run was on
    // this batch
    double distill, temperature;
    struct Model *teacher;
    // rows r and r + rows/2 are one row seen twice, under one plan and with their own noise
    // (Noise.twins): this times KL(first || second) of their predictions is added, or the mean of
    // both directions (R-Drop, Wu et al. 2021). 0: none
    double consistency;
    int symmetric;
    const Align *align;  // NULL: none
    const real *shift;   // (rows,T,C) added to the sum of the embeddings; NULL: 0
} Objective;

// An observer of the residual stream. Its points, in the order in which they are seen:
// WATCH_EMBEDDINGS, one after each branch of the model (whether or not the plan runs it), and the
// features, which are the head's input.
enum { WATCH_EMBEDDINGS };
static inline int watch_after(int layer, int branch) { return 1 + BRANCHES * layer + branch; }
static inline int watch_features(int layers) { return 1 + BRANCHES * layers; }

typedef struct {
    void *self;         // passed to each call
    // (2L+2) by point: whether it is observed. In a tied plan the stream between a block's branches
    // does not exist
    const unsigned char *want;
    // x (rows,T,C) on the host, valid during the call
    void (*see)(void *self, int point, const real *x);
    // NULL, or in a training pass: the gradient (rows,T,C) with respect to the sum of the
    // embeddings, times Pass.weight. Not with frozen layers
    void (*see_gradient)(void *self, const real *dx);
} Watch;

typedef struct {
    const DropPlan *plan;        // of Batch.rows rows: which run which branch, with which scale
    const Noise *noise;          // dropout; NULL: none
    const Objective *objective;  // NULL: the mean of -log p
    const Watch *watch;          // NULL: no observer
    // NULL, or (L): in an evaluation receives the mean entropy of each layer's rows of
    // probabilities, in nats, over the rows that ran, heads and queries; 0 if none did
    double *entropy;
    // 0: evaluation; otherwise the gradient of the mean loss times this is added to the gradients
    double weight;
    // (2L+1) by branch, the last for everything else. If not NULL, this is the rank's last
    // micro-batch before an update, and the gradients with a set flag are summed over all ranks;
    // the sums may continue after the call, and the update waits for them. The other gradients are
    // zero on every rank, or frozen. All ranks pass the same flags
    const unsigned char *reduce;
} Pass;

// The terms of a loss: means over the targets. Terms that the objective does not use are 0.
enum {
    PART_NLL,                                            // -log p of the target
    PART_UNIFORM,                                        // -log p of all V tokens, in the mean
    PART_DISTILL,                                        // temperature^2 KL(teacher || student)
    PART_CONSISTENCY,                                    // the divergence of twins
    PART_TOKENS,                                         // the parts before are means over targets
    PART_EXITS = PART_TOKENS,                            // the weighted losses read before the last
                                                         // layer
    PART_ALIGN,                                          // the mean distance of Align
    PART_COSINE,                                         // sums over what was compared, divided by
    PART_COMPARED,                                       // what could be: of cosines, of 1
    N_PARTS
};

// The loss of the targets; and with a teacher's share, as it is read after the last layer.
static inline double objective_hard(const Objective *o, const double part[N_PARTS]) {
    return !o || o->smoothing == 0 ? part[PART_NLL]
                                   : (1 - o->smoothing) * part[PART_NLL] +
                                       o->smoothing * part[PART_UNIFORM];
}

static inline double objective_loss(const Objective *o, const double part[N_PARTS]) {
    const double loss = objective_hard(o, part);
    return !o || o->distill == 0 ? loss
                                 : (1 - o->distill) * loss + o->distill * part[PART_DISTILL];
}

// Losses of a batch's tokens (rows,T), by part; NULL: none.
typedef struct { const real *token[PART_TOKENS]; } PartLosses;

// The number of scored targets in a batch, but at least 1: the divisor of sums over them.
static inline size_t batch_scored(const Batch *b) {
    size_t count = 0;
    for (size_t t = 0; b->targets && t < (size_t)b->rows * (size_t)b->T; t++)
        count += b->targets[t] >= 0;
    return count ? count : 1;
}

// A smaller probability counts as this in a divergence of maps.
#define ALIGN_LEAST 1e-30

// What layer l's attention is compared with, in rows of T tokens, of a model whose first `frozen`
// layers are frozen; NULL: with nothing.
static inline const Align *pass_align(const Pass *pass, int l, int frozen, int T) {
    const Align *a = pass->objective ? pass->objective->align : NULL;
    return a && a->layer[l] >= 0 && l >= frozen && T >= 2 ? a : NULL;
}

// The share of one query's comparison, in a batch of B rows of T tokens, in the terms of Align.
static inline double align_share(const Align *a, int B, int T) {
    return 1 / ((double)B * a->layers * (T - 1));
}

// What the comparison of maps adds to the loss. A training pass knows it after backward only.
static inline double pass_align_loss(const Pass *pass, const double part[N_PARTS]) {
    const Align *a = pass->objective ? pass->objective->align : NULL;
    return a ? a->gamma * part[PART_ALIGN] : 0;
}

// The weight of the loss read after layer l.
static inline double pass_exit(const Pass *pass, int l) {
    return pass->objective && pass->objective->exit ? pass->objective->exit[l]
                                                    : l == pass->plan->layers - 1;
}

// Whether the loss is read after layer l, which is not the last one.
static inline int pass_exits(const Pass *pass, int l) {
    return l < pass->plan->layers - 1 && pass_exit(pass, l) > 0;
}

// The terms of a batch's loss read after layer l, and its share of the loss, from its tokens'.
// Summed in double in the batch's order. Of exits only PART_EXITS remains: call it for the last
// layer last. That one has the terms which exits do not have.
static inline double pass_loss(double part[N_PARTS], const Batch *b, const Pass *pass, int l,
                               const PartLosses *losses) {
    const Objective *o = pass->objective;
    const size_t n = b->targets ? (size_t)b->rows * (size_t)b->T : 0;
    for (int k = 0; k < PART_TOKENS; k++) {
        double sum = 0;
        for (size_t t = 0; losses->token[k] && t < n; t++) sum += (double)losses->token[k][t];
        part[k] = sum / (double)batch_scored(b);
    }
    double loss = pass_exit(pass, l) *
        (pass_exits(pass, l) ? objective_hard(o, part) : objective_loss(o, part));
    if (pass_exits(pass, l)) {
        part[PART_EXITS] += loss;
        return loss;
    }
    if (o && o->consistency != 0) loss += o->consistency * part[PART_CONSISTENCY];
    return loss + pass_align_loss(pass, part);
}

static inline double pass_distill(const Pass *pass) {
    return pass->objective ? pass->objective->distill : 0;
}

static inline double pass_smoothing(const Pass *pass) {
    return pass->objective ? pass->objective->smoothing : 0;
}

static inline double pass_consistency(const Pass *pass) {
    return pass->objective ? pass->objective->consistency : 0;
}

static inline Batch batch_of(int rows, int T, const int *tokens, const int *targets) {
    Batch b = {rows, T, tokens, targets};
    return b;
}

// A plain pass: evaluation, or with weight != 0 one rank's part of a step.
static inline Pass pass_of(const DropPlan *plan, double weight) {
    Pass p = {plan, NULL, NULL, NULL, NULL, weight, NULL};
    return p;
}

#endif
