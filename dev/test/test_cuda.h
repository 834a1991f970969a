// test_cuda.h: the tests of test_cuda.cu, a separate object, compiled for the emulator or by nvcc
// for a GPU.
#ifndef TEST_CUDA_H
#define TEST_CUDA_H

// the GPU engine has no fp64
#if (defined CUDA_EMULATED || defined CUDA_BUILD) && !defined REAL_DOUBLE
#define WITH_CUDA_ENGINE 1
#endif

#define CUDA_ATTENTION_TESTS(X)                                                \
    X(cuda_attention_fp32) X(cuda_attention_bf16) X(cuda_attention_wide_heads) \
    X(cuda_attention_sharp)                                                    \
    X(cuda_attention_rows_fp32) X(cuda_attention_rows_bf16)                    \
    X(cuda_attention_same_bits) X(cuda_attention_neighbours) X(cuda_attention_refused)

#define CUDA_TESTS(X)                                                                        \
    X(cuda_matmuls) X(cuda_products_search) X(cuda_bias_sums) X(cuda_search_compares)       \
    X(cuda_search_fails) X(cuda_choice_fused_wins) X(cuda_choice_unfused_wins)               \
    X(cuda_choice_algorithm) X(cuda_choice_fails) X(cuda_choice_kept)                        \
    X(cuda_choice_inherited) X(cuda_choice_damaged)                                          \
    X(cuda_column_sums) X(cuda_gelu) X(cuda_embedding) X(cuda_layernorm_forward)             \
    X(cuda_layernorm_backward) X(cuda_softmax_loss) X(cuda_classifier_chunks) X(cuda_logits) \
    X(cuda_norm) X(cuda_round_at_random) X(cuda_update_rounds) X(cuda_graphs) X(cuda_arenas) \
    CUDA_ATTENTION_TESTS(X)

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
