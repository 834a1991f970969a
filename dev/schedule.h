// schedule.h: the learning rate as a function of the optimizer step, and of nothing else.
//
//     lr    _________                 warm-up: linear, step t uses lr * (t+1) / warmup, as in nanoGPT and llm.c
//          /         \                then one of
//         /           \                 cosine    half a cosine from lr to lr * final_fraction (Loshchilov, Hutter 2017)
//        /             \ lr * final     linear    a straight line to lr * final_fraction
//       t=0 warmup     steps            wsd       lr, then a straight line over the last `decay` steps (Hu et al. 2024)
//                                       constant  lr
#ifndef SCHEDULE_H
#define SCHEDULE_H

#include "check.h"
#include <math.h>

enum { SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_WSD, SCHEDULE_CONSTANT };  // in the order of --lr-schedule

typedef struct {
    int kind;
    double lr, final_fraction;                           // the peak; where the fall ends, as a fraction of the peak
    int64_t steps, warmup, decay;                        // optimizer steps: the run, the warm-up, the fall of wsd
} Schedule;

// The learning rate of step t = 0 .. steps-1. The fall is nanoGPT's with lr_decay_iters = steps: it reaches its end
// at t = steps, one step after the last. A warm-up longer than the run never ends; a fall begins after the warm-up.
static inline double schedule_lr(const Schedule *s, int64_t t) {
    if (t < s->warmup) return s->lr * ((double)(t + 1) / (double)s->warmup);
    int64_t start = s->warmup;
    if (s->kind == SCHEDULE_WSD && s->steps - s->decay > start) start = s->steps - s->decay;
    if (s->kind == SCHEDULE_CONSTANT || t < start) return s->lr;
    if (t >= s->steps) return s->lr * s->final_fraction;
    double u = (double)(t - start) / (double)(s->steps - start);
    double fallen = s->kind == SCHEDULE_COSINE ? 0.5 * (1 - cos(3.14159265358979323846 * u)) : u;
    return s->lr * (1 - (1 - s->final_fraction) * fallen);
}

#endif
