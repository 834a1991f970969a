// peak.h: measures this machine's peak, which the speeds of runs and benchmarks are compared with.
#ifndef PEAK_H
#define PEAK_H

#include "matmul.h"
#include <time.h>
#include <unistd.h>

// CPU time of the calling thread, which excludes time that other programs use its core.
static inline double thread_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

enum { PEAK_STEPS = 20000 };

// The FLOPs of multiply-adds on as many accumulators as a matmul has, with `pairs` of bf16 dot
// products; *sum keeps the loop from being optimized away.
static inline double peak_vectors(int pairs, double *sum) {
    real a[TILE_ROWS], y[TILE_ROWS * TILE_COLS];
    Vector b[TILE_VECTORS], acc[TILE_ROWS][TILE_VECTORS] = {{{0}}};
    for (int i = 0; i < TILE_ROWS; i++) a[i] = (real)1e-3 * (real)i;
    for (int j = 0; j < TILE_VECTORS; j++) b[j] = acc[0][0] + (real)1e-3 * (real)(j + 1);
    for (int k = 0; k < PEAK_STEPS; k++) {
#pragma GCC unroll 16
        for (int i = 0; i < TILE_ROWS; i++)
            for (int j = 0; j < TILE_VECTORS; j++) {
                if (pairs) acc[i][j] = pairs_dot(acc[i][j], a[i], b[j]);
                else acc[i][j] = acc[i][j] * b[j] + a[i];
            }
    }
    memcpy(y, acc, sizeof y);
    for (int i = 0; i < TILE_ROWS * TILE_COLS; i++) *sum += (double)y[i];
    return (pairs ? 4.0 : 2.0) * PEAK_STEPS * TILE_ROWS * TILE_COLS;
}

// The same for products of tiles, on four tiles of sums.
static inline double peak_tiles(double *sum) {
    real one[TILE_SIDE * TILE_SIDE], y[TILE_SIDE * TILE_SIDE] = {0};
    const Vector ones = vector_of(1), pair = pairs_of_lines(ones, ones);
    for (size_t i = 0; i < TILE_SIDE * TILE_SIDE; i += LANES) vector_store(one + i, pair);
    tiles_begin();
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    tile_load(4, one, TILE_SIDE);
    tile_load(5, one, TILE_SIDE);
    tile_load(6, one, TILE_SIDE);
    tile_load(7, one, TILE_SIDE);
    for (int k = 0; k < PEAK_STEPS; k++) {
        tile_dot(0, 4, 6);
        tile_dot(1, 4, 7);
        tile_dot(2, 5, 6);
        tile_dot(3, 5, 7);
    }
    tile_store(0, y, TILE_SIDE);
    tiles_end();
    *sum += (double)y[0];
    return 2.0 * PEAK_STEPS * 4 * TILE_SIDE * TILE_SIDE * 2 * TILE_SIDE;
}

// Multiply-adds on registers, on all threads: no code does more per second with these instructions.
// Takes the best of many short runs, measuring each thread's own CPU time, so that other programs
// do not lower the peak. Runs at least five times, but not for more than five times `seconds`,
// since a busy machine may not schedule us. Threads that share a core share its peak.
static inline double machine_peak(int bf16, double seconds) {
    const int tiled = bf16 && tiles_allowed(), pairs = bf16 ? PAIRS : 0;
    const double begin = clock_seconds(), online = (double)sysconf(_SC_NPROCESSORS_ONLN);
    const double share = online >= 1 && online < team_most() ? online / team_most() : 1;
    double best = 0, elapsed = 0;
    for (int run = 0; elapsed < seconds || (run < 5 && elapsed < 5 * seconds); run++) {
        double sum = 0, rate = 0;                        // rate: FLOPs per second of all threads
#pragma omp parallel reduction(+:sum, rate)
        {
            const double from = thread_seconds(),
                flops = tiled ? peak_tiles(&sum) : peak_vectors(pairs, &sum);
            rate += flops / fmax(thread_seconds() - from, 1e-6);
        }
        // sum > 0: keeps the loop from being optimized away
        if (sum > 0) best = fmax(best, share * rate);
        elapsed = clock_seconds() - begin;
    }
    return best;
}

#endif
