// tensor.h: emulates the PTX instructions used by dev/model/cuda.h: warp operations on tensor cores
// (mma, ldmatrix) and asynchronous copies to shared memory. Fragment layouts: PTX ISA, "Matrix
// fragments for mma.m16n8k16" and "ldmatrix".
#ifndef EMU_TENSOR_H
#define EMU_TENSOR_H

#include "cuda_bf16.h"

// Checks for 16 aligned bytes within the block's shared memory.
inline void emu_check_shared(const void *p, const char *what, const char *file, int line) {
    const EmuCore *c = emu_core_of_kernel(what);
    const uintptr_t at = (uintptr_t)p, from = (uintptr_t)c->shared;
    if (at % 16) emu_fail("%s at %s:%d: address %p is not a multiple of 16", what, file, line, p);
    if (at < from || at + 16 > from + c->shared_bytes)
        emu_fail("%s at %s:%d: address %p is not in the block's %zu bytes of shared memory", what,
                 file, line, p, c->shared_bytes);
}

// ---- Tensor cores ----

struct EmuMma { float *d; const uint32_t *a, *b; };

inline float emu_half(uint32_t word, int upper) {
    return emu_bf16_value((unsigned short)(upper ? word >> 16 : word));
}

// d (16,8) += a (16,16) b (16,8): gathered from the registers of 32 lanes, summed over k in order
// or, with EMU_ERRORS=1, as in hardware, and scattered.
inline void emu_mma_step(void *const operands[32]) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const EmuMma *m = (const EmuMma *)operands[lane];
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int r = 0; r < 4; r++)
            for (int i = 0; i < 2; i++)
                a[group + r % 2 * 8][pair + r / 2 * 8 + i] = emu_half(m->a[r], i);
        for (int r = 0; r < 2; r++)
            for (int i = 0; i < 2; i++) b[pair + r * 8 + i][group] = emu_half(m->b[r], i);
    }
    for (int lane = 0; lane < 32; lane++) {
        float *d = ((const EmuMma *)operands[lane])->d;
        for (int r = 0; r < 4; r++) {
            const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
            float product[16];
            for (int k = 0; k < 16; k++) product[k] = a[row][k] * b[k][column];   // exact
            for (int k = 0; emu_errors() && k < 16; k += EMU_MMA_GROUP)
                d[r] = emu_mma_sum(d[r], product + k, EMU_MMA_GROUP);
            for (int k = 0; !emu_errors() && k < 16; k++) d[r] += product[k];
        }
    }
}

inline void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2], EMU_FROM) {
    EmuMma m = {d, a, b};
    emu_collect("mma_bf16", EMU_FULL, &m, emu_mma_step, file, line);
}

struct EmuLdmatrix { uint32_t *r; const void *row; int transpose; };

// Lane l gives the address of row l % 8 of matrix l / 8, and gets two adjacent elements of row l /
// 4 of each matrix or, transposed, of its column l / 4.
inline void emu_ldmatrix_step(void *const operands[32]) {
    uint16_t matrix[4][8][8];
    for (int lane = 0; lane < 32; lane++)
        memcpy(matrix[lane / 8][lane % 8], ((const EmuLdmatrix *)operands[lane])->row, 16);
    for (int lane = 0; lane < 32; lane++) {
        const EmuLdmatrix *to = (const EmuLdmatrix *)operands[lane];
        const int line = lane / 4, pair = lane % 4 * 2;
        for (int j = 0; j < 4; j++) {
            const uint16_t low = to->transpose ? matrix[j][pair][line] : matrix[j][line][pair];
            const uint16_t high = to->transpose ? matrix[j][pair + 1][line]
                : matrix[j][line][pair + 1];
            to->r[j] = (uint32_t)high << 16 | low;
        }
    }
}

inline void emu_ldmatrix(uint32_t r[4], const void *row, int transpose, const char *what,
                         const char *file, int line) {
    emu_check_shared(row, what, file, line);
    EmuLdmatrix m = {r, row, transpose};
    emu_collect(what, EMU_FULL, &m, emu_ldmatrix_step, file, line);
}
inline void ldmatrix_x4(uint32_t r[4], const void *row, EMU_FROM) {
    emu_ldmatrix(r, row, 0, "ldmatrix_x4", file, line);
}
inline void ldmatrix_x4_trans(uint32_t r[4], const void *row, EMU_FROM) {
    emu_ldmatrix(r, row, 1, "ldmatrix_x4_trans", file, line);
}

// ---- Asynchronous copies ----
//
// They complete as late as CUDA allows, when their group is waited for; until then the target is
// NaN.

inline void cp_async16(void *shared, const void *global, bool valid, EMU_FROM) {
    emu_check_shared(shared, "cp_async16", file, line);
    if (valid && ((uintptr_t)global % 16 || !emu_is_device(global, 16)))
        emu_fail("cp_async16 at %s:%d: source %p is not 16 bytes of device memory, aligned", file,
                 line, global);
    EmuLane *l = emu_core->lane;
    if (l->copies == l->capacity) {
        l->capacity = 2 * l->capacity + 16;
        if (!(l->copy = (EmuCopy *)realloc(l->copy, l->capacity * sizeof *l->copy)))
            emu_fail("no memory for asynchronous copies");
    }
    l->copy[l->copies++] = {shared, valid ? global : NULL, l->group};
    memset(shared, EMU_POISON, 16);
}

inline void cp_async_commit(void) { emu_core_of_kernel("cp_async_commit")->lane->group++; }

// Waits until at most the last N groups are in flight.
template <int N> inline void cp_async_wait(void) {
    EmuLane *l = emu_core_of_kernel("cp_async_wait")->lane;
    unsigned kept = 0;
    for (unsigned i = 0; i < l->copies; i++) {
        const EmuCopy copy = l->copy[i];
        if (copy.group + N >= l->group) l->copy[kept++] = copy;
        else if (copy.from) memcpy(copy.to, copy.from, 16);
        else memset(copy.to, 0, 16);
    }
    l->copies = kept;
}

inline uint32_t pack_bf16(float low, float high) {
    return (uint32_t)emu_bf16_round(high) << 16 | emu_bf16_round(low);
}

#endif
