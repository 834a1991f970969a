// entropy.h: the mean entropy of attention's probabilities on the GPU, for metrics. Of a query it
// is the log-sum-exp of its scores less their mean, <q, sum_j p_j k_j> / sqrt(HS), and that sum is
// attention with the keys in place of the values: so no row of scores exists. A part of
// train_gpt.cu.
#ifndef CUDA_ENTROPY_H
#define CUDA_ENTROPY_H

// qkk (nT,3C) = queries, keys and keys of qkv (nT,3C); n: elements.
template <class N>
static __global__ void keys_as_values_kernel(N *qkk, const N *qkv, size_t n, size_t C) {
    const size_t i = thread_index();
    if (i < n) qkk[i] = qkv[i % (3 * C) < 2 * C ? i : i - C];
}

// sums (nT) = the entropies of a token's heads, added; mean (nT,C): the mean keys. A warp processes
// one token.
template <class N>
static __global__ void entropy_kernel(float *sums, const N *qkv, const N *mean, const float *lse,
                                      float scale, size_t nT, size_t T, size_t C, size_t NH) {
    const size_t token = thread_index() / WARP, lane = threadIdx.x % WARP;
    float along = 0, all = 0;
    if (token >= nT) return;
    for (size_t c = lane; c < C; c += WARP)
        along += to_float(qkv[token * 3 * C + c]) * to_float(mean[token * C + c]);
    for (size_t h = lane; h < NH; h += WARP) all += lse[(token / T * NH + h) * T + token % T];
    all = warp_sum(all - scale * along);
    if (lane == 0) sums[token] = all;
}

// sums (n,T) from qkv (n,T,3C); lse (n,NH,T) is made again. qkk (n,T,3C) and mean (n,T,C) are
// workspace.
template <class N>
static void entropy_sums(const Gpu *g, float *sums, void *qkk, void *mean, float *lse,
                         const void *qkv, size_t n, size_t T, size_t C, size_t NH) {
    LAUNCH(keys_as_values_kernel<N>, blocks_for(n * T * 3 * C), BLOCK, 0, g->stream, (N *)qkk,
           (const N *)qkv, n * T * 3 * C, C);
    attention_forward(mean, lse, qkk, NULL, n, T, C, NH, g->half, g->stream);
    LAUNCH(entropy_kernel<N>, blocks_for(n * T * WARP), BLOCK, 0, g->stream, sums, (const N *)qkv,
           (const N *)mean, (const float *)lse, (float)(1 / sqrt((double)(C / NH))), n * T, T, C,
           NH);
}

#endif
