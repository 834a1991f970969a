// layout.h: where each parameter stands in an array of all of them, for both engines.
//
// First the parameters that adapters leave unchanged (group 0), then the trained ones (group 1). In
// each group by layer and branch, and last those outside branches. So the parameters of a branch,
// the unit of updates and reductions, are contiguous, and frozen layers are a prefix of the trained
// group: gradients and moments are the same array without its first n_frozen elements.
#ifndef LAYOUT_H
#define LAYOUT_H

#include "gpt.h"

typedef struct { size_t at, n; } Slice;                   // elements of an array of parameters

typedef struct {
    size_t offset[N_PARAMS];          // of layer 0, or the only one
    size_t layer_size[2];             // between two layers of a group
    Slice span[2][BRANCHES + 1];       // of a branch in layer 0; the last: outside branches
    size_t n, n_base, n_frozen;       // elements: all; of group 0; without gradients and moments
} Layout;

// Whether it exists and is trained, in layers that are not frozen.
static inline int layout_trains(const GptConfig *c, int param) {
    return gpt_param_layers(c, param) > 0 && gpt_group_trains(c, gpt_param[param].group);
}

// capacity: elements of one layer of each parameter, at least gpt_param_size. A branch's elements
// are a multiple of `unit`. The first `frozen` layers are not trained.
static inline Layout layout_of(const GptConfig *c, int frozen, const size_t capacity[N_PARAMS],
                               size_t unit) {
    Layout a;
    memset(&a, 0, sizeof a);
    for (int trains = 0; trains < 2; trains++) {
        a.n_base = a.n;
        for (int branch = 0; branch <= NO_BRANCH; branch++) {
            Slice *span = &a.span[trains][branch];
            if (branch == NO_BRANCH) {
                a.layer_size[trains] = a.n - a.n_base;
                a.n = a.n_base + a.layer_size[trains] * (size_t)c->L;
            }
            span->at = a.n;
            for (int p = 0; p < N_PARAMS; p++)
                if (gpt_param[p].branch == branch && gpt_param_layers(c, p) &&
                    layout_trains(c, p) == trains)
                    a.offset[p] = a.n, a.n += capacity[p];
            span->n = (a.n - span->at + unit - 1) / unit * unit;
            a.n = span->at + span->n;
        }
    }
    a.n_frozen = a.n_base + a.layer_size[1] * (size_t)frozen;
    return a;
}

// The offset of one layer's part of a parameter.
static inline size_t layout_at(const Layout *a, const GptConfig *c, int param, int layer) {
    if (gpt_param[param].branch == NO_BRANCH) return a->offset[param];
    return a->offset[param] + (size_t)layer * a->layer_size[layout_trains(c, param)];
}

// The parameters of a group in branch i, as gpt_branch_index counts.
static inline Slice layout_span(const Layout *a, const GptConfig *c, size_t i, int trains) {
    if (i == gpt_branch_index(c, 0, NO_BRANCH)) return a->span[trains][NO_BRANCH];
    Slice s = a->span[trains][i % BRANCHES];
    s.at += i / BRANCHES * a->layer_size[trains];
    return s;
}

#endif
