// twins.h: the head on the GPU when rows are seen twice (R-Drop, Wu et al. 2021): the divergence of
// both predictions of a token joins the loss (dev/model/distill.h). A part of train_gpt.cu, which
// includes it after the head.
#ifndef CUDA_TWINS_H
#define CUDA_TWINS_H

// Two sums of a block at once, as block_sum.
static __device__ inline void block_sums(float sum[2], float *shared32) {
    UNROLL for (int i = 0; i < 2; i++) sum[i] = block_sum(sum[i], shared32);
}

// A block processes one pair, tokens t and n + t of logits (2n,Vp): apart[t] = apart[half + t] =
// KL(p || q) of their softmax, or the mean of both directions, 0 for a negative target; d (2n,Vp) =
// grad times its gradient, 0 from V on. Equal logits give 0 exactly.
template <class N>
static __global__ void __launch_bounds__(SOFTMAX_THREADS)
twins_kernel(float *apart, N *d, const N *logits, const int *targets, float grad, int symmetric,
             size_t half, unsigned V, unsigned Vp) {
    BOUNDS(SOFTMAX_THREADS);
    constexpr unsigned W = 16 / sizeof(N);
    SHARED(float, shared);                               // (2 * 32)
    const size_t own = (size_t)blockIdx.x * Vp, other = ((size_t)gridDim.x + blockIdx.x) * Vp;
    const unsigned first = threadIdx.x * W, step = blockDim.x * W;
    const bool scored = targets[blockIdx.x] >= 0;
    float top[2], sum[2], kl[2] = {0, 0};
    UNROLL for (int side = 0; side < 2; side++) {
        float high = -INFINITY, total = 0;
        for (unsigned v = first; v < V; v += step)
            softmax_join<N, W>(&high, &total, load<N, W>(logits, (side ? other : own) + v),
                               V - v < W ? V - v : W);
        top[side] = block_max(high, shared);
        // total 0: this thread had no elements
        sum[side] = block_sum(total == 0 ? 0 : total * exp_stored<N>(high - top[side]),
                              shared + WARP);
        __syncthreads();
    }
    const float difference = logf(sum[0]) - logf(sum[1]), p_share = 1 / sum[0],
        q_share = 1 / sum[1];
    for (unsigned v = first; v < V; v += step) {
        const Floats<W> a = load<N, W>(logits, own + v), b = load<N, W>(logits, other + v);
        UNROLL for (unsigned k = 0; k < W; k++) {
            const float x = a.x[k] - top[0], y = b.x[k] - top[1], ratio = x - y - difference;
            kl[0] += v + k < V ? exp_stored<N>(x) * p_share * ratio : 0;
            kl[1] -= v + k < V ? exp_stored<N>(y) * q_share * ratio : 0;
        }
    }
    block_sums(kl, shared);
    if (threadIdx.x == 0)
        apart[blockIdx.x] = apart[half + blockIdx.x] =
            !scored ? 0 : symmetric ? (kl[0] + kl[1]) / 2 : kl[0];
    if (grad == 0) return;
    const float rate = symmetric ? grad / 2 : grad;
    for (unsigned v = first; v < Vp; v += step) {
        Floats<W> da = {}, db = {};
        if (v < V && scored) {
            const Floats<W> a = load<N, W>(logits, own + v), b = load<N, W>(logits, other + v);
            UNROLL for (unsigned k = 0; k < W; k++) {
                const float x = a.x[k] - top[0], y = b.x[k] - top[1], ratio = x - y - difference;
                const float p = exp_stored<N>(x) * p_share, q = exp_stored<N>(y) * q_share;
                float one = p * (ratio - kl[0]), two = q - p;
                if (symmetric) one += p - q, two -= q * (ratio + kl[1]);
                da.x[k] = v + k < V ? rate * one : 0, db.x[k] = v + k < V ? rate * two : 0;
            }
        }
        store<N, W>(d, own + v, da), store<N, W>(d, other + v, db);
    }
}

// Pairs in a chunk of the head: half of a chunk's tokens, in whole units.
static size_t twins_chunk(size_t BT, size_t V, size_t number) {
    const size_t most = classifier_chunk(BT, V, number) / 2 / CHUNK_UNIT * CHUNK_UNIT,
        all = round_up(BT / 2, CHUNK_UNIT);
    return at_most(most ? most : (size_t)CHUNK_UNIT, all);
}

// n pairs of logits (2n,Vp) from pair t0 on: their losses, and in place their gradients, with that
// of the divergence. A teacher sees twins alike, so both have the first one's targets.
template <class N>
static void twins_loss(Gpu *g, const Scoring *y, void *logits, size_t t0, size_t n, size_t half,
                       size_t V, int trains) {
    const size_t Vp = padded_vocabulary(V), shared = 2 * WARP * sizeof(float);
    const Soft *s = &y->soft;
    const int threads = Vp <= 1024 ? 128 : SOFTMAX_THREADS;
    LAUNCH(twins_kernel<N>, (unsigned)n, threads, shared, g->stream, y->apart + t0,
           (N *)y->pairs.d, (const N *)logits, y->targets + t0, y->pairs.weight,
           y->pairs.symmetric, half, (unsigned)V, (unsigned)Vp);
    for (size_t side = 0; side < 2; side++) {
        if (s->x)
            multiply(g, fresh(s->logits, Vp, NULL),
                     matrix((const N *)s->x + t0 * s->C, s->C), transposed(s->wte, s->C), n, Vp,
                     s->C);
        softmax_loss<N>(g, y, (N *)logits + side * n * Vp, t0 + side * half, n, V);
    }
    if (trains)
        LAUNCH((soft_add_kernel<N, 16 / sizeof(N)>), blocks_for(2 * n * Vp / (16 / sizeof(N))),
               BLOCK, 0, g->stream, logits, (const void *)y->pairs.d,
               (float)(y->grad != 0 || s->weight != 0), 2 * n * Vp);
}

// classifier, if tokens t and t + BT/2 are twins: they are in the same chunk.
static void classifier_twins(Gpu *g, const Scoring *y, void *dx, float *dwte, int add, void *logits,
                             const void *x, const void *wte, size_t BT, size_t C, size_t V) {
    const size_t number = size_of_number(g), Vp = padded_vocabulary(V), half = BT / 2,
        chunk = twins_chunk(BT, V, number);
    const int trains = y->grad != 0 || y->soft.weight != 0 || y->pairs.weight != 0;
    char *both = (char *)y->pairs.x;                     // (2n,C) their features, then gradients
    for (size_t t0 = 0; t0 < half; t0 += chunk) {
        const size_t n = at_most(half - t0, chunk), bytes = n * C * number;
        for (size_t side = 0; side < 2; side++)
            CUDA_CHECK(cudaMemcpyAsync(both + side * bytes,
                                       (const char *)x + (side * half + t0) * C * number, bytes,
                                       cudaMemcpyDeviceToDevice, g->stream));
        multiply(g, fresh(logits, Vp, NULL), matrix(both, C), transposed(wte, C), 2 * n, Vp, C);
        if (g->half) twins_loss<bf16>(g, y, logits, t0, n, half, V, trains);
        else twins_loss<float>(g, y, logits, t0, n, half, V, trains);
        if (!trains) continue;
        if (dwte)
            multiply(g, summed(dwte, C, add || t0), transposed(logits, Vp), matrix(both, C), Vp, C,
                     2 * n);
        multiply(g, fresh(both, C, NULL), matrix(logits, Vp), matrix(wte, C), 2 * n, C, Vp);
        for (size_t side = 0; side < 2; side++)
            CUDA_CHECK(cudaMemcpyAsync((char *)dx + (side * half + t0) * C * number,
                                       both + side * bytes, bytes, cudaMemcpyDeviceToDevice,
                                       g->stream));
    }
}

#endif
