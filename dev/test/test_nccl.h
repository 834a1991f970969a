// test_nccl.h: the tests of test_nccl.cu, a separate object built by a C++ compiler.
#ifndef TEST_NCCL_H
#define TEST_NCCL_H

#define NCCL_TESTS(X) \
    X(nccl_collectives) X(nccl_dead_rank) X(nccl_ranks_disagree) X(nccl_same_device)

#ifdef __cplusplus
extern "C" {
#endif
#define X(name) void test_##name(void);
NCCL_TESTS(X)
#undef X
#ifdef __cplusplus
}
#endif

#endif
