// test_cuda.h: the tests of test_cuda.cu, which is an object of its own: compiled for the emulator, or by nvcc for a GPU.
#ifndef TEST_CUDA_H
#define TEST_CUDA_H

#define CUDA_TESTS(X)                                                                                                 \
    X(cuda_products) X(cuda_products_search) X(cuda_column_sums) X(cuda_gelu) X(cuda_embedding)                       \
    X(cuda_layernorm_forward) X(cuda_layernorm_backward) X(cuda_softmax_loss) X(cuda_classifier_chunks) X(cuda_logits) \
    X(cuda_norm)

#ifdef __cplusplus
extern "C" {
#endif
#define X(name) void test_##name(void);
CUDA_TESTS(X)
#undef X
#ifdef __cplusplus
}
#endif

#endif
