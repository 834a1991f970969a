// test_emu.h: the tests of test_emu.cu, a separate object built by a C++ compiler; empty without
// such a compiler.
#ifndef TEST_EMU_H
#define TEST_EMU_H

#ifdef CUDA_EMULATED
#define EMU_TESTS(X)                                                                           \
    X(emu_grid) X(emu_shuffles) X(emu_sums) X(emu_barrier_missing) X(emu_barrier_divergent)    \
    X(emu_lanes_missing) X(emu_shared_bounds) X(emu_global_bounds) X(emu_copies_checked)       \
    X(emu_launch_limits) X(emu_forked) X(emu_opt_in) X(emu_bounds) X(emu_cp_async)             \
    X(emu_cp_async_wrong) X(emu_mma) X(emu_mma_sum) X(emu_ldmatrix) X(emu_bf16) X(emu_streams) \
    X(emu_streams_wrong) X(emu_matmul) X(emu_matmul_epilogues) X(emu_matmul_refuses) X(emu_hardware)
#else
#define EMU_TESTS(X)
#endif

#ifdef __cplusplus
extern "C" {
#endif
#define X(name) void test_##name(void);
EMU_TESTS(X)
#undef X
#ifdef __cplusplus
}
#endif

#endif
