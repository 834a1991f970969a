// test_cuda_arenas.h: arrays of one allocation do not overlap, and the emulator would detect it.
// Part of test_cuda.cu.
#ifndef TEST_CUDA_ARENAS_H
#define TEST_CUDA_ARENAS_H

// Some arrays of each arena: bf16 elements, or floats counted as two.
typedef struct { bf16 *at; size_t n; } ArenaArray;
enum { ARENA_ARRAYS = 8 };

static Model *arena_model(ArenaArray array[ARENA_ARRAYS]) {
    const GptConfig c = {11, 5, 2, 2, 12};               // V T L NH C: no array fills its space
    Model *m = update_model(&c, ROUNDING_NEAREST);
    const size_t bias = param_offset(m, P_fcb, 0), weight = param_offset(m, P_qkvw, 1),
        C = (size_t)c.C;
    save_nothing(m);
    void *first = save(m, 3 * sizeof(bf16)), *second = save(m, 5 * sizeof(bf16));
    const ArenaArray all[ARENA_ARRAYS] = {
        {(bf16 *)(m->slot[SLOT_PARAM] + bias), 8 * C}, {m->copy + weight, 3 * C * C},
        {(bf16 *)(m->slot[SLOT_GRAD] + bias), 8 * C},
        {(bf16 *)(m->slot[SLOT_V] + weight), 6 * C * C}, {(bf16 *)m->lnf_rstd, 4},
        {(bf16 *)m->dwide, 8 * C}, {(bf16 *)first, 3}, {(bf16 *)second, 5}};
    memcpy(array, all, sizeof all);
    return m;
}

static __global__ void touch(bf16 *x, size_t i) { x[i] = from_float<bf16>(1); }

// The last element of every array, or the one behind array k.
static void run_overrun(void *arg) {
    const int k = *(int *)arg;
    ArenaArray array[ARENA_ARRAYS];
    Model *m = arena_model(array);
    for (int i = 0; k < 0 && i < ARENA_ARRAYS; i++)
        LAUNCH(touch, 1, 1, 0, m->gpu.stream, array[i].at, array[i].n - 1);
    if (k >= 0) LAUNCH(touch, 1, 1, 0, m->gpu.stream, array[k].at, array[k].n);
    model_close(m);
    fprintf(stderr, "not found out\n");
}

// Saved arrays may be written while they exist; after save_nothing the whole arena is available.
static void run_cut_anew(void *) {
    ArenaArray array[ARENA_ARRAYS];
    Model *m = arena_model(array);
    LAUNCH(touch, 1, 1, 0, m->gpu.stream, array[6].at, 2);
    save_nothing(m);
    bf16 *larger = (bf16 *)save(m, ARENA_GAP + 2 * ALIGN);
    LAUNCH(touch, 1, 1, 0, m->gpu.stream, larger, array[6].n);
    model_close(m);
    fprintf(stderr, "not found out\n");
}

void test_cuda_arenas(void) {
    ArenaArray array[ARENA_ARRAYS];
    Model *m = arena_model(array);
    for (int k = 0; k < ARENA_ARRAYS; k++)
        EXPECT((uintptr_t)array[k].at % ALIGN == 0, "array %d begins at %p", k, array[k].at);
    EXPECT(array[7].at == array[6].at + arena_bytes(3 * sizeof(bf16)) / sizeof(bf16),
           "what is kept does not lie side by side");
    model_close(m);
#ifdef CUDA_EMULATED                                     // a driver does not survive a fork
    int none = -1;
    EXPECT_EXIT_EMULATED(0, "not found out", run_overrun, &none);
    for (int k = 0; k < ARENA_ARRAYS; k++)
        EXPECT_EXIT_EMULATED(1, EMU_ASAN ? "AddressSanitizer: use-after-poison" : "between two "
                             "arrays", run_overrun, &k);
    for (int lazy = 0; lazy < 2; lazy++) {
        setenv("EMU_LAZY", lazy ? "1" : "0", 1);
        EXPECT_EXIT_EMULATED(0, "not found out", run_cut_anew, NULL);
    }
    unsetenv("EMU_LAZY");
#endif
}

#endif
