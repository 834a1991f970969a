// noise.h: dropout (Srivastava et al. 2014) in which each decision is a function of its place:
// seed, step, row of the step, layer, place in the layer, head, position and element. So a step
// draws the same noise however its rows are split into micro-batches, distributed over ranks,
// packed by drop path or computed by threads, and a repeated pass (recomputation, a replay, another
// engine) draws it again.
//
//     place             what is dropped                        a position      its elements
//     NOISE_EMBD        the sum of the embeddings              a token         C channels
//     NOISE_ATTN        attention's probabilities, by head     a query         T keys
//     NOISE_ATTN_OUT    the attention branch's output          a token         C channels
//     NOISE_MLP_OUT     the MLP branch's output                a token         C channels
//     NOISE_LORA + t    the input of the adapter of matmul t   a token         its inputs
//     NOISE_SCORES      attention's largest scores, by head    a query         T keys
//
// The first four are GPT-2's places (and transformers' GPT2Model's); the two outputs are dropped
// before drop path's scale. Dropout is inverted: kept elements are multiplied by 1/(1-p), and
// evaluation uses none.
//
// Element i of a position is kept iff half i%8 (16 bits, the lower half first) of the words
// Philox(counter {i/8, position, head, row}, key) is at least the rate times 2^16; the key is two
// words of (seed, STREAM_NOISE, step, place, layer). Rates are multiples of 2^-16, so the threshold
// and the scale agree exactly.
#ifndef NOISE_H
#define NOISE_H

#include "rng.h"

enum {
    NOISE_EMBD, NOISE_ATTN, NOISE_ATTN_OUT, NOISE_MLP_OUT, NOISE_LORA,
    NOISE_SCORES = NOISE_LORA + 4, NOISE_PLACES,
    NOISE_SIGMA = NOISE_PLACES                           // one number a step, of no layer
};
// a rate of 1; elements of a Philox call; calls at once
enum { NOISE_ONE = 1 << 16, NOISE_EACH = 8, NOISE_CALLS = 32 };

// The noise of one pass. Rates are in 2^-16.
typedef struct {
    uint64_t seed;
    int64_t step;
    uint32_t first_row;                // the number in the step of the batch's row 0
    uint32_t embd, attn, resid, lora;  // rates; resid: of both branches; lora: of adapters' inputs
    uint32_t twins;                    // rows from this one on are the first ones again, with noise
                                       // of their own; 0: none
    // AttentionDrop: how attention's scores are edited, SCORES_*, and in which layers (L); NULL: in
    // all
    int scores;
    const unsigned char *layers;
    // SCORES_HARD: each of the k largest scores of a query is dropped at the rate `hard`: it
    // becomes 0 or, if `masks`, -infinity
    uint32_t hard;
    int k, masks;
    // SCORES_BLUR: width, which is odd, and deviation of the Gaussian, in keys
    int width;
    double sigma;
} Noise;

// What is done to a query's scores before the softmax: AttentionDrop (arXiv 2504.12088), over the
// keys that the query sees.
enum { SCORES_PLAIN, SCORES_HARD, SCORES_BLUR };
enum { HARD_MOST = 64, BLUR_MOST = 17 };                 // largest k, largest width
#define BLUR_LEAST 1e-3                                  // a smaller deviation is no blur

// Noise at one place in one layer: a rate, the key of its draws, Noise.first_row and .twins. rate
// 0: none.
typedef struct { uint32_t rate, key[2], first_row, twins; } NoisePlace;

// The number in the step of a batch's row: bit 31 marks a twin.
RNG_FN uint32_t noise_row(const NoisePlace *z, uint32_t row) {
    return z->first_row + row + (z->twins && row >= z->twins ? 0x80000000u - z->twins : 0);
}

static inline uint32_t noise_rate(const Noise *z, int place) {
    return !z ? 0 : place == NOISE_EMBD ? z->embd : place == NOISE_ATTN ? z->attn
        : place < NOISE_LORA ? z->resid : place < NOISE_SCORES ? z->lora
        : z->scores == SCORES_HARD ? z->hard : 0;
}

// z NULL: no noise. Layers count from 0; the embedding belongs to layer 0.
static inline NoisePlace noise_place(const Noise *z, int place, int layer) {
    NoisePlace p = {noise_rate(z, place), {0, 0}, 0, 0};
    if (!p.rate) return p;
    p.first_row = z->first_row, p.twins = z->twins;
    const Philox w = rng_words(z->seed, STREAM_NOISE, (uint64_t)z->step, (uint32_t)place,
                               (uint32_t)layer);
    p.key[0] = w.v[0], p.key[1] = w.v[1];
    return p;
}

// The same for one layer's scores; weight: the kernel's, by distance.
typedef struct {
    int kind, k, masks, width;
    real weight[BLUR_MOST / 2 + 1];
    NoisePlace topk;
} ScoreEdit;

static inline ScoreEdit noise_scores(const Noise *z, int layer) {
    ScoreEdit e;
    memset(&e, 0, sizeof e);
    if (!z || (z->layers && !z->layers[layer])) return e;
    if (z->scores == SCORES_HARD && z->hard) {
        e.kind = SCORES_HARD, e.k = z->k, e.masks = z->masks;
        e.topk = noise_place(z, NOISE_SCORES, layer);
    }
    if (z->scores == SCORES_BLUR && z->sigma >= BLUR_LEAST) {
        e.kind = SCORES_BLUR, e.width = z->width;
        for (int d = 0; d <= BLUR_MOST / 2; d++)
            e.weight[d] = (real)exp(-d * d / (2 * z->sigma * z->sigma));
    }
    return e;
}

// The deviation of a step's blur: uniform in (0, most).
static inline double noise_sigma(uint64_t seed, int64_t step, double most) {
    return most * uniform01(rng_words(seed, STREAM_NOISE, (uint64_t)step, NOISE_SIGMA, 0).v[0]);
}

// The factor of a kept element.
RNG_FN double noise_scale(uint32_t rate) { return (double)NOISE_ONE / (double)(NOISE_ONE - rate); }

// Rounded to fp32; in fp32, since the quotient of two numbers of 17 bits is never so near to the
// middle between two floats that it would be rounded differently.
RNG_FN float noise_scale_fp32(uint32_t rate) {
    return (float)NOISE_ONE / (float)(NOISE_ONE - rate);
}

// The words of elements 8*i .. 8*i + 7 of a position; element 8*i + e is kept iff noise_half(words,
// e) >= rate.
RNG_FN Philox noise_words(const uint32_t key[2], uint32_t row, uint32_t head, uint32_t position,
                          uint32_t i) {
    const uint32_t counter[4] = {i, position, head, row};
    return philox4x32_10(counter, key);
}

RNG_FN uint32_t noise_half(Philox w, int e) { return w.v[e / 2] >> 16 * (e % 2) & 0xffff; }

// keep (n) = the factors, 0 or 1/(1-p), of elements first .. first + n of a position. first is a
// multiple of NOISE_EACH, n at most NOISE_CALLS * NOISE_EACH; an odd n writes one extra element.
static inline void noise_factors(real *keep, const NoisePlace *z, uint32_t row, uint32_t position,
                                 size_t first, size_t n) {
    const real scale = (real)noise_scale(z->rate);
    uint32_t words[NOISE_CALLS * 4];
    for (uint32_t i = 0; i < NOISE_CALLS; i++) {         // compilers see that calls fill vectors
        const Philox w = noise_words(z->key, noise_row(z, row), 0, position,
                                     (uint32_t)(first / NOISE_EACH) + i);
        for (int j = 0; j < 4; j++) words[4 * i + (uint32_t)j] = w.v[j];
    }
    for (size_t i = 0; i < n; i += 2) {                  // noise_half
        keep[i] = (words[i / 2] & 0xffff) >= z->rate ? scale : 0;
        keep[i + 1] = words[i / 2] >> 16 >= z->rate ? scale : 0;
    }
}

// The rate of probability p in [0, 1) in units of 2^-16: the nearest, but never 1.
static inline uint32_t noise_rate_of(double p) {
    const double rate = floor(p * NOISE_ONE + 0.5);
    return rate >= NOISE_ONE ? NOISE_ONE - 1 : (uint32_t)rate;
}

#endif
