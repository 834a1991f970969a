// tiles.h: Intel's AMX, which multiplies whole tiles of bf16: 16 rows of 16 words (pairs of
// elements along K) by 16 words of 16 columns, onto 16 x 16 sums in fp32.
//
// The order of the sums is the processor's own: over the 32 elements of a tile, those of even and
// of odd index apart, a rounding for each multiply-add; then the two are added, and then onto the
// sum. Numbers below the smallest normal one count as zero. So results have other bits than with
// dot products, and an engine with tiles has another name.
//
// EMULATE_TILES has the same bits on any processor with bf16 dot products, for tests; NO_TILES has
// none (make AMX=0).
#ifndef TILES_H
#define TILES_H

#include "vector.h"
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { TILE_SIDE = 16 };             // rows of a tile; words of a row
typedef struct { float word[TILE_SIDE][TILE_SIDE]; } Tile;

// x, or a zero of its sign.
static inline float tile_normal(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

// One of a word's two elements.
static inline float tile_element(float word, int second) {
    union { float f; uint32_t bits; } x = {word};
    x.bits = second ? x.bits & 0xFFFF0000u : x.bits << 16;
    return tile_normal(x.f);
}

// y += a b, as the processor does it.
static inline void tile_dot_plain(Tile *y, const Tile *a, const Tile *b) {
    for (int i = 0; i < TILE_SIDE; i++)
        for (int j = 0; j < TILE_SIDE; j++) {
            float sum[2] = {0, 0}, *to = &y->word[i][j];
            for (int k = 0; k < TILE_SIDE; k++)
                for (int second = 0; second < 2; second++)
                    sum[second] = tile_normal(fmaf(tile_element(a->word[i][k], second),
                                                   tile_element(b->word[k][j], second),
                                                   sum[second]));
            *to = tile_normal(tile_normal(*to) + tile_normal(sum[0] + sum[1]));
        }
}

// Asks the kernel to let this process use tiles, as it must be once; returns whether it does.
static inline int tiles_request(void) {
#ifdef SYS_arch_prctl
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}

// TILES: whether matmuls can use them; tiles_allowed: whether the kernel lets this process;
// tiles_begin, tiles_end: of a thread, around its use of them. tile_load and tile_store: rows that
// are `stride` words apart; tile_dot: y += a b. t, y, a, b are constants.
#if defined(NO_TILES) || defined(NO_PAIRS) || defined(REAL_DOUBLE) ||                              \
    !defined(__AVX512BF16__) || !(defined(EMULATE_TILES) ||                                        \
    ((defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__linux__)))
#undef NO_TILES
#define NO_TILES
enum { TILES = 0 };
static inline int tiles_allowed(void) { return 0; }
static inline void tiles_begin(void) {}
static inline void tiles_end(void) {}
#define tile_zero(t) (void)0
#define tile_load(t, from, stride) (void)(from)
#define tile_store(t, to, stride) (void)(to)
#define tile_dot(y, a, b) (void)0
#else
#undef INSTRUCTIONS
#define INSTRUCTIONS "AVX-512 + AMX"
enum { TILES = 1 };
#ifdef EMULATE_TILES
static _Thread_local Tile tile_register[8];
static inline int tiles_allowed(void) { return 1; }
static inline void tiles_begin(void) {}
static inline void tiles_end(void) {}
static inline void tile_zero(int t) { memset(&tile_register[t], 0, sizeof(Tile)); }
static inline void tile_load(int t, const real *from, size_t stride) {
    for (size_t i = 0; i < TILE_SIDE; i++)
        memcpy(tile_register[t].word[i], from + i * stride, sizeof tile_register[t].word[i]);
}
static inline void tile_store(int t, real *to, size_t stride) {
    for (size_t i = 0; i < TILE_SIDE; i++)
        memcpy(to + i * stride, tile_register[t].word[i], sizeof tile_register[t].word[i]);
}
static inline void tile_dot(int y, int a, int b) {
    tile_dot_plain(&tile_register[y], &tile_register[a], &tile_register[b]);
}
#else
static inline int tiles_allowed(void) { return tiles_request(); }

// Before an intrinsic that reads memory: some compilers do not know that it reads all of it, and
// leave out what was written there.
static inline void tile_memory(const void *from) {
    __asm__ volatile("" : : "r"(from) : "memory");
}

// All eight tiles are whole.
static inline void tiles_begin(void) {
    struct __attribute__((packed)) {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {1, 0, {0}, {0}, {0}};
    for (int t = 0; t < 8; t++) shape.row_bytes[t] = 4 * TILE_SIDE, shape.rows[t] = TILE_SIDE;
    tile_memory(&shape);
    _tile_loadconfig(&shape);
}
static inline void tiles_end(void) { _tile_release(); }  // the kernel then has less to save

#define tile_zero(t) _tile_zero(t)
#define tile_load(t, from, stride)                                                                 \
    do {                                                                                           \
        tile_memory(from);                                                                         \
        _tile_loadd(t, from, (stride) * sizeof(real));                                             \
    } while (0)
#define tile_store(t, to, stride) _tile_stored(t, to, (stride) * sizeof(real))
#define tile_dot(y, a, b) _tile_dpbf16ps(y, a, b)
#endif
#endif

#endif
