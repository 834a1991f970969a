// schedule.h: values that are a function of the optimizer step alone: the learning rate, and the
// ramp of anything that is active in a part of the run (drop path, dropout).
//
//     lr    _________                 warm-up: linear, step t uses lr * (t+1) / warmup, as in
//                                     nanoGPT
//          /         \                and llm.c; then one of
//         /           \                 cosine    half a cosine from lr to lr * final_fraction
//        /             \ lr * final                 (Loshchilov and Hutter 2017)
//       t=0 warmup     steps            linear    a straight line to lr * final_fraction
//                                       wsd       lr, then a straight line over the last `decay`
//                                                 steps (Hu et al. 2024)
//                                       constant  lr
#ifndef SCHEDULE_H
#define SCHEDULE_H

#include "../check.h"
#include <math.h>

// in the order of --lr-schedule
enum { SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_WSD, SCHEDULE_CONSTANT };

typedef struct {
    int kind;
    double lr, final_fraction;     // the peak; the final value, as a fraction of the peak
    int64_t steps, warmup, decay;  // in optimizer steps: the run, the warm-up, the decay of wsd
} Schedule;

// The learning rate of step t = 0 .. steps-1. The decay matches nanoGPT's with lr_decay_iters =
// steps: it reaches its end at t = steps, one step after the last. A warm-up longer than the run
// never completes; decay starts after the warm-up.
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

// ---- Ramps ----

// in the order of --drop-ramp-shape
enum { SHAPE_LINEAR, SHAPE_COSINE, SHAPE_EXP, SHAPE_EXP2 };

// 0 up to `start`, then from `from` to 1 over `up` steps, and to 0 over `down` steps before the
// last `recover` steps.
typedef struct { int shape; int64_t steps, start, up, down, recover; double from; } Ramp;

// The shape of a ramp: from exactly 0 at u <= 0 to exactly 1 at u >= 1.
static inline double ramp_shape(int shape, double u) {
    if (u <= 0) return 0;
    if (u >= 1) return 1;
    switch (shape) {
        case SHAPE_COSINE: return 0.5 - 0.5 * cos(3.14159265358979323846 * u);
        case SHAPE_EXP:    return 1 - pow(0.01, u);      // 1 - exp(-gamma t), 0.99 at the end of
                                                         // the ramp
        case SHAPE_EXP2:   return exp2(u) - 1;
        default:           return u;
    }
}

// R(t) of optimizer step t = 0, 1, ...: the trapezoid, in [0, 1]; if its sides cross, the lower one
// holds.
static inline double ramp_at(const Ramp *r, int64_t t) {
    const int64_t end = r->steps - r->recover;           // 0 from here on
    if (t < r->start || ((r->recover > 0 || r->down > 0) && t >= end)) return 0;
    const double up = r->up > 0 ? ramp_shape(r->shape, (double)(t - r->start) / (double)r->up) : 1;
    const double down = r->down > 0 ? ramp_shape(r->shape, (double)(end - t) / (double)r->down) : 1;
    return fmin(r->from + (1 - r->from) * up, down);
}

#endif
