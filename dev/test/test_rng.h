// test_rng.h: Philox against its authors' known answers, and the numbers derived from it against
// their moments.
#ifndef TEST_RNG_H
#define TEST_RNG_H

#include "../model/rng.h"
#include "test.h"

#define RNG_TESTS(X) X(rng_known_answers) X(rng_places) X(rng_uniform) X(rng_normal)

// The vectors of Random123's kat_vectors file, lines "philox4x32 10".
static void test_rng_known_answers(void) {
    static const struct { uint32_t counter[4], key[2], want[4]; } known[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (int k = 0; k < 3; k++) {
        Philox got = philox4x32_10(known[k].counter, known[k].key);
        for (int i = 0; i < 4; i++)
            EXPECT(got.v[i] == known[k].want[i], "vector %d, word %d: %08x, want %08x", k, i,
                   got.v[i], known[k].want[i]);
    }
}

// Every component of the tuple counts, up to its highest bit.
static void test_rng_places(void) {
    static const struct { uint64_t seed; int stream; uint64_t step; uint32_t a, b; } place[] = {
        {1, STREAM_DROP, 5, 2, 3},         {1, STREAM_DROP, 5, 2, 3},
        {2, STREAM_DROP, 5, 2, 3}, {1 + (1ull << 63), STREAM_DROP, 5, 2, 3},
        {1, STREAM_DROP_ORDER, 5, 2, 3}, {1, STREAM_DROP, 6, 2, 3},
        {1, STREAM_DROP, 5 + (1ull << 32), 2, 3}, {1, STREAM_DROP, 5 + (1ull << 55), 2, 3},
        {1, STREAM_DROP, 5, 3, 2},         {1, STREAM_DROP, 5, 2 + (1u << 31), 3},
        {1, STREAM_DROP, 5, 2, 3 + (1u << 31)},
    };
    enum { N = sizeof place / sizeof *place };
    Philox x[N];
    for (int i = 0; i < N; i++)
        x[i] = rng_words(place[i].seed, place[i].stream, place[i].step, place[i].a, place[i].b);
    EXPECT(!memcmp(&x[0], &x[1], sizeof x[0]), "the same place gave other words");
    for (int i = 1; i < N; i++)
        for (int j = i + 1; j < N; j++)
            EXPECT(memcmp(&x[i], &x[j], sizeof x[i]), "places %d and %d agree", i, j);
}

// Strictly inside (0, 1), symmetric, and uniform in ten cells (chi-squared, 9 degrees: 33.7 is the
// 1e-4 quantile).
static void test_rng_uniform(void) {
    enum { N = 100000 };
    double low = uniform01(0), high = uniform01(0xffffffffu), chi = 0;
    EXPECT(low > 0 && high < 1 && low == 1 - high, "ends %.17g and %.17g", low, high);
    int cell[10] = {0};
    for (uint32_t i = 0; i < N / 4; i++)
        for (int k = 0; k < 4; k++)
            cell[(int)(10 * uniform01(rng_words(7, STREAM_TEST, 0, 0, i).v[k]))]++;
    for (int k = 0; k < 10; k++) chi += pow(cell[k] - N / 10, 2) / (N / 10);
    EXPECT(chi < 33.7, "chi-squared %.1f over ten cells", chi);
}

// Moments 1 to 4 of each of a pair, and their product: 0, 1, 0, 3, 0, within 4.5 standard errors.
static void test_rng_normal(void) {
    enum { N = 200000 };
    // E[z^2k] - E[z^k]^2
    static const double want[4] = {0, 1, 0, 3}, variance[4] = {1, 2, 15, 96};
    double moment[2][4] = {{0}}, product = 0, error = 4.5 / sqrt((double)N);
    for (uint32_t i = 0; i < N; i++) {
        double z[2];
        Philox w = rng_words(11, STREAM_TEST, 1, 0, i);
        normal_pair(z, w.v[0], w.v[1]);
        product += z[0] * z[1] / N;
        for (int j = 0; j < 2; j++)
            for (int k = 0; k < 4; k++) moment[j][k] += pow(z[j], k + 1) / N;
    }
    for (int j = 0; j < 2; j++)
        for (int k = 0; k < 4; k++)
            EXPECT_CLOSE(moment[j][k], want[k], error * sqrt(variance[k]), "moment");
    EXPECT_CLOSE(product, 0, error, "correlation of a pair");
    double extreme[2];
    normal_pair(extreme, 0, 0);
    EXPECT(isfinite(extreme[0]) && isfinite(extreme[1]), "the smallest word gives %g", extreme[0]);
}

#endif
