// rng.h: randomness as a function of position. Philox4x32-10, the counter-based generator of
// Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
//
// A draw is identified by (seed, stream, step, a, b): the same tuple gives the same bits on every
// machine, engine and rank, in any order, and after any resume. There is no state to save.
#ifndef RNG_H
#define RNG_H

#include "../check.h"
#include <math.h>

#ifdef __CUDACC__
#define RNG_FN static inline __host__ __device__
#else
#define RNG_FN static inline
#endif

// One stream per purpose, so that a new use never shifts the draws of an existing one.
enum { STREAM_INIT = 1, STREAM_DATA = 2, STREAM_DROP = 3, STREAM_DROP_ORDER = 4, STREAM_SAMPLE = 5,
       STREAM_TEST = 6,
       STREAM_ROUND = 7, STREAM_NOISE = 8, STREAM_SPECULATE = 9 };

typedef struct { uint32_t v[4]; } Philox;

// Ten rounds over a 128-bit counter with a 64-bit key (SC 2011, section 4.3 and table 2).
RNG_FN Philox philox4x32_10(const uint32_t counter[4], const uint32_t key[2]) {
    Philox x = {{counter[0], counter[1], counter[2], counter[3]}};
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * x.v[0], p1 = (uint64_t)0xCD9E8D57u * x.v[2];
        uint32_t y0 = (uint32_t)(p1 >> 32) ^ x.v[1] ^ k0, y2 = (uint32_t)(p0 >> 32) ^ x.v[3] ^ k1;
        x.v[0] = y0;
        x.v[1] = (uint32_t)p1;
        x.v[2] = y2;
        x.v[3] = (uint32_t)p0;
        k0 += 0x9E3779B9u;                               // the golden ratio
        k1 += 0xBB67AE85u;                               // sqrt(3) - 1
    }
    return x;
}

// Four words for (stream, step, a, b); step < 2^56.
RNG_FN Philox rng_words(uint64_t seed, int stream, uint64_t step, uint32_t a, uint32_t b) {
    uint32_t counter[4] = {b, a, (uint32_t)step, ((uint32_t)(step >> 32) << 8) | (uint32_t)stream};
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    return philox4x32_10(counter, key);
}

// A number in (0, 1): the middle of one of 2^32 equal cells.
RNG_FN double uniform01(uint32_t word) { return ((double)word + 0.5) * (1.0 / 4294967296.0); }

// Two independent standard normals from two words (Box and Muller 1958).
static inline void normal_pair(double z[2], uint32_t w0, uint32_t w1) {
    double r = sqrt(-2.0 * log(uniform01(w0))), angle = 6.283185307179586476925 * uniform01(w1);
    z[0] = r * cos(angle);
    z[1] = r * sin(angle);
}

#endif
