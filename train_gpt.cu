// train_gpt.cu: GPT-2 with drop path on the GPU: every layer forward and backward, AdamW, and
// nothing else.
//
// Read it top to bottom, beside train_gpt.c: the same functions in the same order, with the same
// letters. B rows, T tokens per row, C channels, NH heads of HS = C/NH channels, L layers, V tokens
// in the vocabulary (Vp: V rounded up to a multiple of 128). Every pointer has its shape beside it;
// a gradient is d + name.
//
// Storage: N is the type of matmul operands, bf16 or float. The residual stream x (B,T,C), its
// gradient, all sums, the optimizer's weights, gradients and moments are float in every mode; in
// bf16, forward and backward read only a rounded copy of the weights.
//
// Drop path is in the block loop (block_forward, block_backward): a branch runs on the n rows that
// keep it, packed as (n,T,...). With n = 0 nothing is launched. One kernel joins the end of a
// branch and the start of the next one that runs: it adds the scaled output of the former to its
// rows of the stream and normalizes the rows of the latter.
//
// The order of every sum depends only on the shapes, and there are no atomics: the same call gives
// the same bits. All work is on one stream; a call that returns values waits for it once.
// Reductions over the ranks of a run are on a second stream, concurrent with the backward pass.

#include "dev/check.h"
#include "dev/files/matmul_choices.h"
#include "dev/model/cuda.h"
#include "dev/model/engines.h"
#include "dev/model/layout.h"
#include "dev/run/comm.h"
#include <limits.h>
#ifndef NO_NCCL
#include <nccl.h>
#endif

// ---- The device, and elements in memory ----

typedef struct Matmul Matmul;

// What layers run on. `half`: N is bf16, else float.
typedef struct {
    cudaStream_t stream;
    cublasLtHandle_t blas;
    // search: time a matmul's algorithms at its first use; plain: this file's kernels apply the
    // epilogues; sums_inside: matmuls also compute bias gradients
    int half, tf32, search, plain, sums_inside;
    // since the model's tune: `measure`: forms of a matmul compete by time; choices: what was
    // chosen
    int measure, measured, told;
    MatmulChoices choices;
    double least_flops;                          // of matmuls that are worth a measurement
    void *workspace;                             // (WORKSPACE) bytes for matmuls
    float *partial, *sum;                        // column sums: (PARTIAL * C) partial, (4C) whole
    Matmul *matmul;                             // those used so far, by shape
    int n_matmuls, matmul_capacity;
} Gpu;

#ifndef WORKSPACE_BYTES
#define WORKSPACE_BYTES (32 << 20)  // NVIDIA's advice for compute capability 9.0
#endif
enum { WARP = 32, WORKSPACE = WORKSPACE_BYTES };
enum { CHANNELS_MAX = 12288 };                           // two rows of them fit in shared memory

// LayerNorm backward is a loop over tokens that is bound by memory latency: with 4 warps per block,
// 1024 blocks keep 31 warps on each of 132 multiprocessors. Each block leaves the sums of 2C
// columns; column_sums leaves COLUMN_PARTS of up to 4C.
enum { NORM_BLOCKS = 1024, COLUMN_PARTS = 128, PARTIAL = 2 * NORM_BLOCKS };

static inline size_t size_of_number(const Gpu *g) { return g->half ? sizeof(bf16) : sizeof(float); }
static inline __host__ __device__ size_t at_most(size_t n, size_t most) {
    return n < most ? n : most;
}
static inline __host__ __device__ size_t strips(size_t n, size_t width) {
    return (n + width - 1) / width;
}
static inline size_t round_up(size_t n, size_t unit) { return strips(n, unit) * unit; }

// W consecutive elements of an array of N, as floats: a single memory access if they make up 4, 8
// or 16 bytes.
template <int W> struct Floats { float x[W]; };
template <class N, int W> struct alignas(W * sizeof(N)) Stored { N x[W]; };

template <class N, int W> static __device__ inline Floats<W> load(const void *from, size_t i) {
    const Stored<N, W> s = *(const Stored<N, W> *)((const N *)from + i);
    Floats<W> v;
    for (int k = 0; k < W; k++) v.x[k] = to_float(s.x[k]);
    return v;
}

template <class N, int W> static __device__ inline void store(void *to, size_t i, Floats<W> v) {
    Stored<N, W> s;
    for (int k = 0; k < W; k++) s.x[k] = from_float<N>(v.x[k]);
    *(Stored<N, W> *)((N *)to + i) = s;
}

// Launches kernel<N, V>, which moves V elements at a time, if `wide`; else kernel<N, 1>.
#define LAUNCH_PACKED(kernel, N, V, wide, ...)                \
    do {                                                     \
        if (wide) LAUNCH((kernel<N, V>), __VA_ARGS__);       \
        else LAUNCH((kernel<N, 1>), __VA_ARGS__);            \
    } while (0)

// The same for the model's storage type, and 4 elements.
#define LAUNCH_AS(kernel, g, wide, grid, block, shared, ...)                                      \
    do {                                                                                          \
        if ((g)->half)                                                                            \
            LAUNCH_PACKED(kernel, bf16, 4, wide, grid, block, shared, (g)->stream, __VA_ARGS__);  \
        else LAUNCH_PACKED(kernel, float, 4, wide, grid, block, shared, (g)->stream, __VA_ARGS__); \
    } while (0)

// The same for a kernel<W> with fixed types.
#define LAUNCH_WIDE(kernel, wide, ...)                    \
    do {                                                 \
        if (wide) LAUNCH((kernel<4>), __VA_ARGS__);      \
        else LAUNCH((kernel<1>), __VA_ARGS__);           \
    } while (0)

// default threads per block; elements per access
enum { BLOCK = 256, WIDE = 4 };

// Blocks for n work items, one thread each.
static inline dim3 blocks_for(size_t n) { return dim3((unsigned)strips(n, BLOCK)); }

// Threads of a block that processes one row of C elements, WIDE each.
static inline unsigned threads_for(size_t C) {
    return (unsigned)at_most(round_up(strips(C, WIDE), WARP), BLOCK);
}

static __device__ inline size_t thread_index(void) {
    return (size_t)blockIdx.x * blockDim.x + threadIdx.x;
}

// ---- GELU, tanh form (Hendrycks, Gimpel 2016): x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
//
// If cuBLASLt supports it, it is a matmul's epilogue; these functions serve the other cases, and
// recomputation.

typedef struct { float y, slope; } Gelu;

// 1 / (1 + e^u), as accurately as the storage N requires.
template <class N> static __device__ inline float sigmoid_of(float u);
template <> __device__ inline float sigmoid_of<float>(float u) {
    return 1 / (1 + expf(u > 87 ? 87 : u));
}
template <> __device__ inline float sigmoid_of<bf16>(float u) {
    return reciprocal_fast(1 + exp2_fast(u * 1.44269504f));
}

// As gelu_lanes in dev/model/matmul.h: beyond -30 and 30 the sigmoid rounds to 0 or 1, so infinity
// is never multiplied by 0.
template <class N> static __device__ inline Gelu gelu_of(float x) {
    const float h = x < -30 ? -30 : x, z = h > 30 ? 30 : h, square = z * z;
    const float s = sigmoid_of<N>(-1.5957691216057308f * (z + 0.044715f * square * z));
    const Gelu g =
        {h * s, s + z * s * (1 - s) * (1.5957691216057308f * (1 + 3 * 0.044715f * square))};
    return g;
}

// The part of an epilogue that a matmul could not do itself: y (M,N) += bias (N); gelu (M,N) =
// GELU(y). With h (M,N): y *= GELU'(h), and gelu = GELU(h). Each of bias, gelu and h may be NULL.
template <class N, int W>
static __global__ void epilogue_kernel(void *y, const void *bias, void *gelu, const void *h,
                                       size_t n, size_t columns) {
    const size_t i = thread_index() * W;
    if (i >= n) return;
    Floats<W> v = load<N, W>(y, i), g = v;
    if (bias) {
        const Floats<W> b = load<N, W>(bias, i % columns);
        for (int k = 0; k < W; k++) v.x[k] += b.x[k];
    }
    if (h) {
        const Floats<W> x = load<N, W>(h, i);
        for (int k = 0; k < W; k++) {
            const Gelu both = gelu_of<N>(x.x[k]);
            v.x[k] *= both.slope;
            g.x[k] = both.y;
        }
    }
    if (bias || h) store<N, W>(y, i, v);
    if (bias) v = load<N, W>(y, i);                      // GELU sees the stored value
    for (int k = 0; k < W && !h; k++) g.x[k] = gelu_of<N>(v.x[k]).y;
    if (gelu) store<N, W>(gelu, i, g);
}

// y (n) = GELU(x).
template <class N, int W> static __global__ void gelu_forward_kernel(void *y, const void *x,
                                                                     size_t n) {
    const size_t i = thread_index() * W;
    if (i >= n) return;
    Floats<W> v = load<N, W>(x, i);
    for (int k = 0; k < W; k++) v.x[k] = gelu_of<N>(v.x[k]).y;
    store<N, W>(y, i, v);
}

static void gelu_forward(const Gpu *g, void *y, const void *x, size_t n) {
    const int wide = n % WIDE == 0;
    LAUNCH_AS(gelu_forward_kernel, g, wide, blocks_for(n / (wide ? WIDE : 1)), BLOCK, 0, y, x, n);
}

// ---- Matmul: y (M,N) = a (M,K) b (K,N), by cuBLASLt ----
//
// cuBLASLt is column-major, so it is asked for the transpose: y^T = b^T a^T; its A is our b and its
// m our N.
//
// Descriptors, layouts and the algorithm of a matmul are created at its first use and cached by
// shape. Among the algorithms proposed by the heuristic, the fastest whose result has the same bits
// as the first one's is chosen: the choice, which load on the device may affect, changes no result.
// DROPPATH_GEMM_SEARCH=0 always takes the first; DROPPATH_GEMM_EPILOGUE=0 lets cuBLASLt do only
// matmuls, =1 also the sums for bias gradients. By default the engine computes those: libcublasLt
// 13.1 names kernels with them for bf16 and fp32 results only for compute capability 8.0, which on
// 9.0 take 1.6 times as long (estimated) and would cost more than reading dy once more.
//
// A training run does not rely on that default: model_tune measures both forms of each matmul, with
// the epilogue fused and with this file's kernels after it, and records the choice in a file, since
// the two forms round differently. DROPPATH_GEMM_SEARCH=all also measures small matmuls.

// Rows of elements, ld apart; a matmul reads the matrix or, with `transposed`, its transpose. All
// N. stride: from the first element of one matrix to that of the next, if the matmul is of several.
typedef struct { const void *at; size_t ld; int transposed; size_t stride; } Matrix;

// The destination of a matmul: y (M,N) = a b + bias (N), or with `add` y += a b. `sums`: y is
// float, otherwise N. With `gelu` (M,N) also gelu = GELU(y); with `h` (M,N), too, that is GELU(h),
// and y is multiplied by GELU'(h). With `b_sum` (N), where y is float, also b_sum = the columns of
// b. `alpha` multiplies a b; if it is not 1, nothing else is fused, nor if there are several
// matrices: `count` products of the same shape, `stride` apart.
typedef struct {
    void *at;
    size_t ld;
    int sums, add;
    const void *bias, *h;
    void *gelu;
    float *b_sum, alpha;
    size_t count, stride;
} Result;

static inline Matrix matrices(const void *at, size_t ld, int transposed, size_t stride) {
    const Matrix m = {at, ld, transposed, stride};
    return m;
}
static inline Matrix matrix(const void *at, size_t ld) { return matrices(at, ld, 0, 0); }
static inline Matrix transposed(const void *at, size_t ld) { return matrices(at, ld, 1, 0); }
static inline Result fresh(void *at, size_t ld, const void *bias) {
    const Result y = {at, ld, 0, 0, bias, NULL, NULL, NULL, 1, 1, 0};
    return y;
}
static inline Result summed(float *at, size_t ld, int add) {
    const Result y = {at, ld, 1, add, NULL, NULL, NULL, NULL, 1, 1, 0};
    return y;
}

typedef struct {
    size_t M, N, K, lda, ldb, ldy, count, stride_a, stride_b, stride_y;
    int a_transposed, b_transposed, sums, add, epilogue;
} MatmulKey;

static inline double matmul_flops(const MatmulKey *k) {
    return 2.0 * (double)k->count * (double)k->M * (double)k->N * (double)k->K;
}

struct Matmul {
    MatmulKey key;
    cublasLtMatmulDesc_t what;
    cublasLtMatrixLayout_t a, b, y;                      // our a and b
    cublasLtMatmulAlgo_t algorithm;
    int fused;                                           // it applies the epilogue itself
};

#define SET_OF_PRODUCT(p, attribute, value)                                                  \
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute((p)->what, CUBLASLT_MATMUL_DESC_##attribute, \
                                                &(value), sizeof(value)))

// count matrices, stride apart.
static cublasLtMatrixLayout_t matmul_layout(int type, size_t columns, size_t rows, size_t ld,
                                            size_t count, size_t stride) {
    const int32_t matrices = (int32_t)count;
    const int64_t apart = (int64_t)stride;
    cublasLtMatrixLayout_t layout;
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&layout, (cudaDataType)type, columns, rows,
                                            (int64_t)ld));
    if (count == 1) return layout;
    CUBLAS_CHECK(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                                                  &matrices, sizeof matrices));
    CUBLAS_CHECK(cublasLtMatrixLayoutSetAttribute(
        layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &apart, sizeof apart));
    return layout;
}

// The pointers of one call: bias and pre-activation.
static void matmul_pointers(Matmul *p, const Result *y) {
    const void *aux = y->h ? y->h : y->at;
    if (!p->fused) return;
    if (y->bias) SET_OF_PRODUCT(p, BIAS_POINTER, y->bias);
    if (y->b_sum) SET_OF_PRODUCT(p, BIAS_POINTER, y->b_sum);
    if (y->gelu || y->h) SET_OF_PRODUCT(p, EPILOGUE_AUX_POINTER, aux);
}

static void matmul_describe(const Gpu *g, Matmul *p, const Result *y) {
    const MatmulKey *k = &p->key;
    const int number = g->half ? CUDA_R_16BF : CUDA_R_32F;
    const cublasOperation_t no = CUBLAS_OP_N, yes = CUBLAS_OP_T;
    const cublasLtEpilogue_t epilogue = p->fused ? (cublasLtEpilogue_t)k->epilogue
        : CUBLASLT_EPILOGUE_DEFAULT;
    const cudaDataType bias = (cudaDataType)(y->b_sum ? CUDA_R_32F : number);
    const int64_t ld = (int64_t)k->ldy;
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&p->what, g->tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32
                                          : CUBLAS_COMPUTE_32F, CUDA_R_32F));
    SET_OF_PRODUCT(p, TRANSA, *(k->b_transposed ? &yes : &no));
    SET_OF_PRODUCT(p, TRANSB, *(k->a_transposed ? &yes : &no));
    SET_OF_PRODUCT(p, EPILOGUE, epilogue);
    if (p->fused && (y->bias || y->b_sum)) SET_OF_PRODUCT(p, BIAS_DATA_TYPE, bias);
    if (p->fused && (y->gelu || y->h)) SET_OF_PRODUCT(p, EPILOGUE_AUX_LD, ld);
    matmul_pointers(p, y);
    p->b = k->b_transposed ? matmul_layout(number, k->K, k->N, k->ldb, k->count, k->stride_b)
        : matmul_layout(number, k->N, k->K, k->ldb, k->count, k->stride_b);
    p->a = k->a_transposed ? matmul_layout(number, k->M, k->K, k->lda, k->count, k->stride_a)
        : matmul_layout(number, k->K, k->M, k->lda, k->count, k->stride_a);
    p->y = matmul_layout(k->sums ? CUDA_R_32F : number, k->N, k->M, k->ldy, k->count, k->stride_y);
}

static cublasStatus_t matmul_run(const Gpu *g, const Matmul *p,
                                  const cublasLtMatmulAlgo_t *algorithm, float alpha, void *y,
                                  const Matrix *a, const Matrix *b) {
    const float beta = p->key.add ? 1 : 0;
    return cublasLtMatmul(g->blas, p->what, &alpha, b->at, p->b, a->at, p->a, &beta, y, p->y, y,
                          p->y, algorithm, g->workspace, WORKSPACE, g->stream);
}

static __global__ void differ_kernel(int *differ, const unsigned *a, const unsigned *b, size_t n) {
    for (size_t i = thread_index(); i < n; i += (size_t)gridDim.x * blockDim.x)
        if (a[i] != b[i]) *differ = 1;                   // any thread writes the same
}

enum { ALGORITHMS = 8, ALGORITHM_RUNS = 3 };

// Seconds of the fastest of a few runs into y; negative if it does not run.
static double matmul_time(const Gpu *g, const Matmul *p, const cublasLtMatmulAlgo_t *algorithm,
                          void *y, const Matrix *a, const Matrix *b, const Timer *timer) {
    double best = -1;
    for (int i = 0; i < ALGORITHM_RUNS; i++) {
        timer_start(timer);
        if (matmul_run(g, p, algorithm, 1, y, a, b) != CUBLAS_STATUS_SUCCESS) return -1;
        const double ms = timer_stop(timer);
        if (best < 0 || ms < best) best = ms;
    }
    return best;
}

// The index of the fastest of n algorithms whose result has the bits of the first that runs.
// Results go to memory allocated for this purpose; if there is none, the first algorithm is chosen.
// Negative if none of them runs.
static int matmul_search(const Gpu *g, const Matmul *p,
                          const cublasLtMatmulHeuristicResult_t *found, int n, const Matrix *a,
                          const Matrix *b, const float *b_sum) {
    const size_t numbers = p->key.M * p->key.ldy + (p->key.count - 1) * p->key.stride_y,
        bytes = round_up(numbers * (p->key.sums ? 4 : size_of_number(g)), ALIGN);
    const size_t sum_bytes = b_sum && p->fused ? p->key.N * sizeof *b_sum : 0;
    char *work = NULL;
    int first = -1, best = -1, differs;
    double least = -1;
    if (cudaMalloc((void **)&work, 2 * bytes + round_up(sum_bytes, ALIGN) + ALIGN) != cudaSuccess) {
        (void)cudaGetLastError();                        // it has been reported
        return 0;
    }
    char *first_sum = work + 2 * bytes;
    int *differ = (int *)(void *)(first_sum + round_up(sum_bytes, ALIGN));
    const Timer timer = timer_new(g->stream);
    for (int i = 0; i < n; i++) {
        void *y = first < 0 ? work : work + bytes;
        CUDA_CHECK(cudaMemsetAsync(y, 0, bytes, g->stream));
        if (matmul_run(g, p, &found[i].algo, 1, y, a, b) != CUBLAS_STATUS_SUCCESS) continue;
        if (first < 0) first = best = i;
        if (first == i && sum_bytes)
            CUDA_CHECK(cudaMemcpyAsync(first_sum, b_sum, sum_bytes, cudaMemcpyDeviceToDevice,
                                       g->stream));
        CUDA_CHECK(cudaMemsetAsync(differ, 0, sizeof *differ, g->stream));
        if (first < i)
            LAUNCH(differ_kernel, 256, BLOCK, 0, g->stream, differ, (unsigned *)work, (unsigned *)y,
                   bytes / 4);
        if (first < i && sum_bytes)
            LAUNCH(differ_kernel, 1, BLOCK, 0, g->stream, differ, (unsigned *)first_sum,
                   (unsigned *)b_sum, sum_bytes / 4);
        CUDA_CHECK(cudaMemcpyAsync(&differs, differ, sizeof differs, cudaMemcpyDeviceToHost,
                                   g->stream));
        CUDA_CHECK(cudaStreamSynchronize(g->stream));
        if (differs) continue;
        // the first one's result is preserved
        const double time = matmul_time(g, p, &found[i].algo, work + bytes, a, b, &timer);
        if (time >= 0 && (least < 0 || time < least)) least = time, best = i;
    }
    timer_free(&timer);
    CUDA_CHECK(cudaFree(work));
    return best;
}

// Chooses an algorithm; returns 0 if there is none that runs for these types, shapes and this
// epilogue.
static int matmul_choose(const Gpu *g, Matmul *p, const Matrix *a, const Matrix *b,
                          const float *b_sum) {
    const size_t work = WORKSPACE;
    cublasLtMatmulPreference_t wish;
    cublasLtMatmulHeuristicResult_t found[ALGORITHMS];
    int n = 0;
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&wish));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(wish,
                                                      CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                      &work, sizeof work));
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(g->blas, p->what, p->b, p->a, p->y,
                                                                 p->y, wish, ALGORITHMS, found, &n);
    CUBLAS_CHECK(cublasLtMatmulPreferenceDestroy(wish));
    int usable = 0;
    for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < n; i++)
        if (found[i].state == CUBLAS_STATUS_SUCCESS) found[usable++] = found[i];
    if (!usable) return 0;
    const int worth_it = matmul_flops(&p->key) > g->least_flops;
    const int chosen = g->search && worth_it && (usable > 1 || g->measure)
        ? matmul_search(g, p, found, usable, a, b, b_sum) : 0;
    if (chosen < 0) return 0;
    p->algorithm = found[chosen].algo;
    return 1;
}

static void matmul_free(Matmul *p) {
    CUBLAS_CHECK(cublasLtMatmulDescDestroy(p->what));
    CUBLAS_CHECK(cublasLtMatrixLayoutDestroy(p->a));
    CUBLAS_CHECK(cublasLtMatrixLayoutDestroy(p->b));
    CUBLAS_CHECK(cublasLtMatrixLayoutDestroy(p->y));
}

static int matmul_epilogue(const Result *y) {
    if (y->h) return CUBLASLT_EPILOGUE_DGELU;
    if (y->b_sum) return CUBLASLT_EPILOGUE_BGRADA;       // its A is our b
    if (y->gelu) return CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    return y->bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
}

// Whether the library may apply the epilogue. GELU only in bf16: the library has no fp32 kernel
// named for it, and a tanh.approx in one (2^-11) would be the largest error of an fp32 run.
static int matmul_may_fuse(const Gpu *g, const Result *y) {
    if (g->plain) return 0;
    if (!y->gelu && !y->h) return 1;
    // with adapters, GELU applies to the whole sum
    if (y->add) return 0;
    return g->half && y->ld % 8 == 0;                    // by cublasLt.h, EPILOGUE_AUX_LD
}

// The form that is used without a measurement.
static int matmul_usual(const Gpu *g, const Result *y) {
    return matmul_may_fuse(g, y) && (!y->b_sum || g->sums_inside);
}

// Opens *p in one form; returns 0 if the library has no algorithm that runs.
static int matmul_form(const Gpu *g, Matmul *p, int fused, const Result *y, const Matrix *a,
                       const Matrix *b) {
    p->fused = fused;
    matmul_describe(g, p, y);
    if (matmul_choose(g, p, a, b, y->b_sum)) return 1;
    // a descriptor that still names a bias would be refused again
    matmul_free(p);
    return 0;
}

static void matmul_finish(const Gpu *g, Matmul *p, const Result *y, const Matrix *a,
                          const Matrix *b);

// The recorded choice for p->key. Returns 0 if there is none, or the library cannot take it.
static int matmul_recorded(Gpu *g, Matmul *p, const uint64_t key[MATMUL_KEY], const Result *y) {
    cublasLtMatmulHeuristicResult_t checked;
    const MatmulChoice *c = matmul_choices_find(&g->choices, key);
    if (!c || (c->fused && !matmul_may_fuse(g, y))) return 0;
    p->fused = c->fused;
    memcpy(&p->algorithm, c->algorithm, sizeof p->algorithm);
    matmul_describe(g, p, y);
    if (cublasLtMatmulAlgoCheck(g->blas, p->what, p->b, p->a, p->y, p->y, &p->algorithm,
                                &checked) == CUBLAS_STATUS_SUCCESS &&
        checked.workspaceSize <= WORKSPACE)
        return 1;
    matmul_free(p);
    return 0;
}

// Milliseconds of a whole matmul with its epilogue, in the form of p: the least of a few runs.
static double matmul_form_time(const Gpu *g, Matmul *p, const Result *y, const Matrix *a,
                               const Matrix *b) {
    enum { RUNS = 5 };                                   // and one before them
    double best = -1;
    const Timer timer = timer_new(g->stream);
    for (int i = 0; i <= RUNS; i++) {
        timer_start(&timer);
        matmul_finish(g, p, y, a, b);
        const double ms = timer_stop(&timer);
        if (i && (best < 0 || ms < best)) best = ms;
    }
    timer_free(&timer);
    return best;
}

// Opens *p in the faster form and records it; returns 0 if neither runs. What y points at is
// written several times, and accumulated into as often.
static int matmul_measure(Gpu *g, Matmul *p, const uint64_t key[MATMUL_KEY], const Result *y,
                          const Matrix *a, const Matrix *b) {
    const double MARGIN = 0.97;
    MatmulChoice c;
    Matmul form[2];
    int runs[2];
    memset(&c, 0, sizeof c);
    for (int fused = 0; fused < 2; fused++) {
        const int asked = !fused || (p->key.epilogue != CUBLASLT_EPILOGUE_DEFAULT &&
                                     matmul_may_fuse(g, y));
        form[fused] = *p, c.ms[fused] = -1;
        runs[fused] = asked && matmul_form(g, &form[fused], fused, y, a, b);
        if (runs[fused]) c.ms[fused] = matmul_form_time(g, &form[fused], y, a, b);
        else if (fused && asked && !g->told++)
            warn("cuBLASLt has no algorithm that runs with epilogue %d, of (%zu,%zu) and "
                 "(%zu,%zu): a kernel after the matmul applies it, here and in the like",
                 p->key.epilogue, p->key.M, p->key.K, p->key.K, p->key.N);
    }
    // the default form, unless the other is clearly faster: two new runs should choose alike
    const int usual = runs[matmul_usual(g, y)] ? matmul_usual(g, y) : !matmul_usual(g, y);
    c.fused = runs[!usual] && c.ms[!usual] < MARGIN * c.ms[usual] ? !usual : usual;
    if (!runs[c.fused]) return 0;
    if (runs[!c.fused]) matmul_free(&form[!c.fused]);
    *p = form[c.fused];
    memcpy(c.key, key, sizeof c.key);
    memcpy(c.algorithm, &p->algorithm, sizeof c.algorithm);
    matmul_choices_add(&g->choices, &c);
    g->measured++;
    return 1;
}

static Matmul *matmul_find(Gpu *g, const Result *y, const Matrix *a, const Matrix *b, size_t M,
                             size_t N, size_t K) {
    MatmulKey key;
    // including padding: keys are compared as bytes
    memset(&key, 0, sizeof key);
    key.M = M, key.N = N, key.K = K, key.lda = a->ld, key.ldb = b->ld, key.ldy = y->ld;
    key.a_transposed = a->transposed, key.b_transposed = b->transposed, key.sums = y->sums,
        key.add = y->add;
    key.count = y->count, key.stride_a = a->stride, key.stride_b = b->stride,
        key.stride_y = y->stride;
    key.epilogue = matmul_epilogue(y);
    for (int i = 0; i < g->n_matmuls; i++)
        if (!memcmp(&g->matmul[i].key, &key, sizeof key)) return &g->matmul[i];
    if (g->n_matmuls == g->matmul_capacity) {
        g->matmul_capacity = 2 * g->matmul_capacity + 64;
        g->matmul = (Matmul *)xrealloc(g->matmul, (size_t)g->matmul_capacity, sizeof *g->matmul);
    }
    Matmul *p = &g->matmul[g->n_matmuls++];
    memset(p, 0, sizeof *p);
    p->key = key;
    const uint64_t recorded[MATMUL_KEY] = {
        M, N, K, a->ld, b->ld, y->ld, (uint64_t)a->transposed, (uint64_t)b->transposed,
        (uint64_t)y->sums, (uint64_t)y->add, (uint64_t)key.epilogue, y->count, a->stride, b->stride,
        y->stride};
    if (matmul_recorded(g, p, recorded, y)) return p;
    if (g->measure && matmul_flops(&key) > g->least_flops &&
        matmul_measure(g, p, recorded, y, a, b))
        return p;
    if ((matmul_usual(g, y) && matmul_form(g, p, 1, y, a, b)) || matmul_form(g, p, 0, y, a, b))
        return p;
    die("cuBLASLt has no product of (%zu,%zu) and (%zu,%zu)", M, K, K, N);
}

// sums (parts,N): column sums of y (M,N), whose rows are divided into `parts` equal parts. A block
// processes WARP * W columns of one part; its warps divide the rows.
template <class N, int W>
static __global__ void column_sums_kernel(float *sums, const void *y, size_t M, size_t columns,
                                          size_t part) {
    SHARED(float, work);                                 // (warps, WARP * W)
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const size_t column = ((size_t)blockIdx.x * WARP + lane) * W,
        end = at_most(M, (blockIdx.y + 1) * part);
    Floats<W> sum;
    for (int k = 0; k < W; k++) sum.x[k] = 0;
    if (column < columns)
        for (size_t i = blockIdx.y * part + warp; i < end; i += warps) {
            const Floats<W> v = load<N, W>(y, i * columns + column);
            for (int k = 0; k < W; k++) sum.x[k] += v.x[k];
        }
    for (int k = 0; k < W; k++) work[(warp * W + k) * WARP + lane] = sum.x[k];
    __syncthreads();
    if (warp > 0 || column >= columns) return;
    for (int k = 0; k < W; k++) {
        float total = 0;
        for (int w = 0; w < warps; w++) total += work[(w * W + k) * WARP + lane];
        sums[blockIdx.y * columns + column + k] = total;
    }
}

enum { SUM_THREADS = 1024 };

// first (n), then second (n) if given: = the column sums of sums (parts, n or 2n), or += with
// `add`. A block processes WARP columns; its warps divide the parts.
static __global__ void __launch_bounds__(SUM_THREADS)
sum_parts_kernel(float *first, float *second, const float *sums, size_t n, size_t parts, int add) {
    BOUNDS(SUM_THREADS);
    SHARED(float, work);                                 // (warps, WARP)
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const size_t columns = second ? 2 * n : n, column = (size_t)blockIdx.x * WARP + lane,
        share = strips(parts, warps);
    float sum = 0;
    if (column < columns)
        for (size_t i = warp * share; i < at_most(parts, (warp + 1) * share); i++)
            sum += sums[i * columns + column];
    work[warp * WARP + lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= columns) return;
    sum = 0;
    for (int w = 0; w < warps; w++) sum += work[w * WARP + lane];
    float *to = column < n ? &first[column] : &second[column - n];
    *to = add ? *to + sum : sum;
}

static void sum_parts(const Gpu *g, float *first, float *second, const float *sums, size_t n,
                      size_t parts, int add) {
    const unsigned blocks = (unsigned)strips(second ? 2 * n : n, WARP);
    // so many that a warp adds at most 32 parts
    const int threads = parts > COLUMN_PARTS ? (int)SUM_THREADS : (int)BLOCK;
    LAUNCH(sum_parts_kernel, blocks, threads, (size_t)threads * sizeof(float), g->stream, first,
           second, sums, n, parts, add);
}

// sum (N) = the column sums of y (M,N), or += with `add`. N is at most 4 C, the capacity of
// g->partial.
static void column_sums(const Gpu *g, float *sum, int add, const void *y, size_t M, size_t N) {
    const size_t part = strips(M, at_most(strips(M, 64), COLUMN_PARTS)), parts = strips(M, part);
    const int wide = N % WIDE == 0;
    const dim3 grid((unsigned)strips(N, WARP * (wide ? WIDE : 1)), (unsigned)parts);
    LAUNCH_AS(column_sums_kernel, g, wide, grid, BLOCK, BLOCK * WIDE * sizeof(float), g->partial, y,
              M, N, part);
    sum_parts(g, sum, NULL, g->partial, N, parts, add);
}

// Computes all of y: a matmul, and what it could not do itself.
static void matmul_finish(const Gpu *g, Matmul *p, const Result *y, const Matrix *a,
                          const Matrix *b) {
    const size_t M = p->key.M, N = p->key.N;
    const int gelu_inside = p->fused && y->gelu && !y->h;
    matmul_pointers(p, y);
    CUBLAS_CHECK(matmul_run(g, p, &p->algorithm, y->alpha, gelu_inside ? y->gelu : y->at, a, b));
    if (!p->fused && (y->bias || y->gelu || y->h)) {
        const int wide = N % WIDE == 0;
        LAUNCH_AS(epilogue_kernel, g, wide, blocks_for(M * N / (wide ? WIDE : 1)), BLOCK, 0, y->at,
                  y->bias, y->gelu, y->h, M * N, N);
    } else if (y->h && y->gelu) gelu_forward(g, y->gelu, y->h, M * N);
    if (!p->fused && y->b_sum) column_sums(g, y->b_sum, 0, b->at, p->key.K, N);
}

// y (M,N) from a (M,K) b (K,N), or y.count of them; y must not overlap a, b or h, nor b_sum
// g->partial.
static void multiply(Gpu *g, Result y, Matrix a, Matrix b, size_t M, size_t N, size_t K) {
    matmul_finish(g, matmul_find(g, &y, &a, &b, M, N, K), &y, &a, &b);
}

// y = x (BT,C) w (C,OC), plus y's epilogue (bias, GELU, accumulate).
static void matmul_forward(Gpu *g, Result y, const void *x, const void *w, size_t BT, size_t C,
                           size_t OC) {
    multiply(g, y, matrix(x, C), matrix(w, OC), BT, OC, C);
}

// Of y = x w + bias, from dy (BT,OC): dx (BT,C) = dy w^T; dw (C,OC) = x^T dy and dbias (OC) = the
// columns of dy, or += with `add`; NULL: w stays as it is. dx is finished before x is read, since a
// recomputed x may come with it.
static void matmul_backward(Gpu *g, Result dx, float *dw, float *dbias, int add, const void *dy,
                            const void *x, const void *w, size_t BT, size_t C, size_t OC) {
    Result y = summed(dw, OC, add);                      // b_sum is always overwritten
    y.b_sum = g->sum;
    multiply(g, dx, matrix(dy, OC), transposed(w, OC), BT, C, OC);
    if (!dw) return;
    multiply(g, y, transposed(x, C), matrix(dy, OC), C, OC, BT);
    sum_parts(g, dbias, NULL, g->sum, OC, 1, add);
}

// ---- Embedding: tokens (B,T) -> x (B,T,C) ----
//
// A block processes one token. `at` (B): the positions of the rows' first tokens; NULL: 0.
template <class N, int W>
static __global__ void embedding_forward_kernel(float *x, const int *tokens, const int *at,
                                                const void *wte, const void *wpe, size_t T,
                                                size_t C) {
    const unsigned row = blockIdx.x / (unsigned)T;
    const size_t bt = blockIdx.x, token = (size_t)tokens[bt],
        t = blockIdx.x % (unsigned)T + (at ? at[row] : 0);
    for (size_t c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        const Floats<W> p = load<N, W>(wpe, t * C + c);
        Floats<W> v = load<N, W>(wte, token * C + c);
        for (int k = 0; k < W; k++) v.x[k] += p.x[k];
        store<float, W>(x, bt * C + c, v);
    }
}

static void embedding_forward(const Gpu *g, float *x, const int *tokens, const int *at,
                              const void *wte, const void *wpe, size_t B, size_t T, size_t C) {
    LAUNCH_AS(embedding_forward_kernel, g, C % WIDE == 0, (unsigned)(B * T), threads_for(C), 0, x,
              tokens, at, wte, wpe, T, C);
}

// dwte (V,C) +=: group i is one token, at positions order[first[i]] .. order[first[i + 1]] of the
// batch. A block processes WARP * W channels of a group; its warps divide the positions.
template <int W>
static __global__ void embedding_backward_kernel(float *dwte, const int *tokens, const int *order,
                                                 const int *first, const float *dx, size_t C) {
    SHARED(float, work);                                 // (warps, WARP * W)
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int from = first[blockIdx.x], end = first[blockIdx.x + 1];
    const size_t c = ((size_t)blockIdx.y * WARP + lane) * W;
    Floats<W> sum;
    for (int k = 0; k < W; k++) sum.x[k] = 0;
    if (c < C)
        for (int i = from + warp; i < end; i += warps) {
            const Floats<W> v = load<float, W>(dx, (size_t)order[i] * C + c);
            for (int k = 0; k < W; k++) sum.x[k] += v.x[k];
        }
    for (int k = 0; k < W; k++) work[(warp * W + k) * WARP + lane] = sum.x[k];
    __syncthreads();
    if (warp > 0 || c >= C) return;
    const size_t to = (size_t)tokens[order[from]] * C + c;
    Floats<W> total = load<float, W>(dwte, to);
    for (int k = 0; k < W; k++)
        for (int w = 0; w < warps && w < end - from; w++)
            total.x[k] += work[(w * W + k) * WARP + lane];
    store<float, W>(dwte, to, total);
}

// dwpe (T_all,C) = the sum over the rows of dx (B,T,C), or += with `add`; positions from T on have
// no gradient.
static __global__ void position_backward_kernel(float *dwpe, const float *dx, size_t B, size_t T,
                                                size_t T_all, size_t C, int add) {
    const size_t i = thread_index();
    if (i >= T_all * C || (add && i >= T * C)) return;
    float sum = 0;
    for (size_t b = 0; b < B && i < T * C; b++) sum += dx[b * T * C + i];
    dwpe[i] = add ? dwpe[i] + sum : sum;
}

// x (n) += shift.
static __global__ void shift_kernel(float *x, const float *shift, size_t n) {
    const size_t i = thread_index();
    if (i < n) x[i] += shift[i];
}

// The same with shift (n) on the host; work (n) is on the device.
static void shift_stream(const Gpu *g, float *x, float *work, const float *shift, size_t n) {
    CUDA_CHECK(cudaMemcpyAsync(work, shift, n * sizeof *work, cudaMemcpyHostToDevice, g->stream));
    LAUNCH(shift_kernel, blocks_for(n), BLOCK, 0, g->stream, x, (const float *)work, n);
}

// The batch's positions grouped by token, each group in batch order.
// (BT) (groups + 1), on the device
typedef struct { int groups; const int *order, *first; } Grouped;

// dwte (V,C) += and dwpe (T_all,C) =, or += with `add`.
static void embedding_backward(const Gpu *g, float *dwte, float *dwpe, int add, const int *tokens,
                               Grouped by, const float *dx, size_t B, size_t T, size_t T_all,
                               size_t C) {
    const int wide = C % WIDE == 0;
    const dim3 grid((unsigned)by.groups, (unsigned)strips(C, WARP * (wide ? WIDE : 1)));
    const size_t shared = BLOCK * WIDE * sizeof(float);
    if (wide)
        LAUNCH(embedding_backward_kernel<WIDE>, grid, BLOCK, shared, g->stream, dwte, tokens,
               by.order, by.first, dx, C);
    else
        LAUNCH(embedding_backward_kernel<1>, grid, BLOCK, shared, g->stream, dwte, tokens, by.order,
               by.first, dx, C);
    LAUNCH(position_backward_kernel, blocks_for(T_all * C), BLOCK, 0, g->stream, dwpe, dx, B, T,
           T_all, C, add);
}

// ---- Dropout: whether an element is kept is a function of its position (dev/model/noise.h) ----
//
// Rates and keys are read on the device, where they arrive with a call's tokens, rather than being
// kernel arguments, which a CUDA graph would freeze. rows (n): which rows of the batch the n packed
// ones are; NULL: all, in order.

// x (n,T,C): multiplies each element by its factor. A thread draws those of one Philox call, and
// moves V at a time.
template <class N, int V>
static __global__ void dropout_kernel(N *x, const NoisePlace *noise, const int *rows, unsigned nT,
                                      unsigned T, unsigned C) {
    const NoisePlace z = *noise;
    const unsigned groups = (C + NOISE_EACH - 1) / NOISE_EACH, at = (unsigned)thread_index(),
        token = at / groups, group = at % groups, c = group * NOISE_EACH;
    if (token >= nT) return;
    const unsigned row = rows ? (unsigned)rows[token / T] : token / T;
    const Philox w = noise_words(z.key, noise_row(&z, row), 0, token % T, group);
    const float scale = noise_scale_fp32(z.rate);
    N *const to = x + (size_t)token * C;
    UNROLL for (unsigned e = 0; e < NOISE_EACH; e += V)
        if (c + e < C) {
            Floats<V> v = load<N, V>(to, c + e);
            for (int k = 0; k < V; k++)
                v.x[k] = noise_half(w, (int)e + k) >= z.rate ? v.x[k] * scale : 0;
            store<N, V>(to, c + e, v);
        }
}

template <class N>
static void dropout_as(const Gpu *g, N *x, const NoisePlace *noise, const int *rows, size_t nT,
                       size_t T, size_t C) {
    constexpr int V = 16 / sizeof(N);
    const size_t threads = nT * strips(C, NOISE_EACH);
    CHECK(threads <= UINT_MAX, "dropout of %zu groups of elements", threads);
    LAUNCH_PACKED(dropout_kernel, N, V, C % V == 0, blocks_for(threads), BLOCK, 0, g->stream, x,
                  noise, rows, (unsigned)nT, (unsigned)T, (unsigned)C);
}

// For the residual stream, in fp32, and for a branch's end, in N. Backward is the same, applied to
// the gradient.
static void dropout_stream(const Gpu *g, float *x, const NoisePlace *noise, size_t nT, size_t T,
                           size_t C) {
    dropout_as<float>(g, x, noise, NULL, nT, T, C);
}

static void dropout_end(const Gpu *g, void *x, const NoisePlace *noise, const int *rows, size_t nT,
                        size_t T, size_t C) {
    if (g->half) dropout_as<bf16>(g, (bf16 *)x, noise, rows, nT, T, C);
    else dropout_as<float>(g, (float *)x, noise, rows, nT, T, C);
}

// ---- The residual stream x (B,T,C) and LayerNorm (Ba, Kiros, Hinton 2016) ----
//
// A branch that runs on n of the B rows has them packed: place[row] is a row's packed index, or -1
// if it drops the branch. NULL stands for all rows in order. For each token, one kernel handles the
// end of one branch and the start of the next, so that the stream is read and written once between
// two branches. A warp processes one token.
//
// Tied branches (x + s (a + mlp(LN(x + a)))): what is normalized includes the first branch
// unscaled; the same in backward.

// of one branch, on the device
typedef struct { const int *place; const float *scale; } Rows;

static __device__ inline long row_place(const int *place, size_t row) {
    return place ? place[row] : (long)row;
}

// Forward: x += end.scale * out (n,T,C) on the rows of `end`; then ln (n',T,C) = xhat * w + b, xhat
// (n',T,C), rstd (n',T) on the rows of `begin`. Without out, nothing is added. xhat is rounded to N
// first, so that layernorm_recompute gives the same ln.
template <class N, int W>
static __global__ void residual_layernorm_forward_kernel(float *x, void *ln, void *xhat,
                                                         float *rstd, const void *out, Rows end,
                                                         Rows begin, int tied, const void *w,
                                                         const void *b, size_t BT, size_t T,
                                                         size_t C) {
    SHARED(float, work);                                 // (warps, C)
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const size_t token = (size_t)blockIdx.x * (blockDim.x / WARP) + warp;
    const unsigned row = (unsigned)token / (unsigned)T, t = (unsigned)token % (unsigned)T;
    if (token >= BT) return;
    const long ended = out ? row_place(end.place, row) : -1, begun = row_place(begin.place, row);
    if (ended < 0 && begun < 0) return;
    const float scale = ended < 0 ? 0 : *end.scale;
    // each lane accesses only its own elements of z
    float *z = work + warp * C, sum = 0, squares = 0;
    for (size_t c = lane * W; c < C; c += WARP * W) {
        Floats<W> v = load<float, W>(x, token * C + c), seen = v;
        if (ended >= 0) {
            const Floats<W> o = load<N, W>(out, ((size_t)ended * T + t) * C + c);
            for (int k = 0; k < W; k++) {
                seen.x[k] = v.x[k] + o.x[k];
                v.x[k] += scale * o.x[k];
            }
            store<float, W>(x, token * C + c, v);
        }
        if (!tied) seen = v;
        for (int k = 0; k < W; k++) sum += seen.x[k];
        store<float, W>(z, c, seen);
    }
    if (begun < 0) return;
    const float mean = warp_sum(sum) / C;
    for (size_t c = lane * W; c < C; c += WARP * W) {
        const Floats<W> v = load<float, W>(z, c);
        for (int k = 0; k < W; k++) squares += (v.x[k] - mean) * (v.x[k] - mean);
    }
    const float r = 1 / sqrtf(warp_sum(squares) / C + 1e-5f);
    const size_t to = (size_t)begun * T + t;
    if (lane == 0) rstd[to] = r;
    for (size_t c = lane * W; c < C; c += WARP * W) {
        const Floats<W> v = load<float, W>(z, c), weight = load<N, W>(w, c),
                        bias = load<N, W>(b, c);
        Floats<W> h, y;
        for (int k = 0; k < W; k++) {
            h.x[k] = to_float(from_float<N>((v.x[k] - mean) * r));
            y.x[k] = h.x[k] * weight.x[k] + bias.x[k];
        }
        store<N, W>(xhat, to * C + c, h);
        store<N, W>(ln, to * C + c, y);
    }
}

// Warps per block that fit in shared memory, each using `rows` of C floats.
static inline unsigned warps_for(size_t C, size_t rows) {
    return C * rows * 4 * sizeof(float) <= 96 << 10 ? 4 : 1;
}

static void residual_layernorm_forward(const Gpu *g, float *x, void *ln, void *xhat, float *rstd,
                                       const void *out, Rows end, Rows begin, int tied,
                                       const void *w, const void *b, size_t B, size_t T, size_t C) {
    const unsigned warps = warps_for(C, 1), blocks = (unsigned)strips(B * T, warps);
    LAUNCH_AS(residual_layernorm_forward_kernel, g, C % WIDE == 0, blocks, warps * WARP,
              warps * C * sizeof(float), x, ln, xhat, rstd, out, end, begin, tied, w, b, B * T, T,
              C);
}

// Recomputes y (n,T,C) from xhat: the backward pass needs it as the input of a matmul. A block
// processes one token.
template <class N, int W>
static __global__ void layernorm_recompute_kernel(void *y, const void *xhat, const void *w,
                                              const void *b, size_t C) {
    for (size_t c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        const Floats<W> weight = load<N, W>(w, c), bias = load<N, W>(b, c);
        Floats<W> v = load<N, W>(xhat, blockIdx.x * C + c);
        for (int k = 0; k < W; k++) v.x[k] = v.x[k] * weight.x[k] + bias.x[k];
        store<N, W>(y, blockIdx.x * C + c, v);
    }
}

static void layernorm_recompute(const Gpu *g, void *y, const void *xhat, const void *w,
                            const void *b, size_t nT, size_t C) {
    LAUNCH_AS(layernorm_recompute_kernel, g, C % WIDE == 0, (unsigned)nT, threads_for(C), 0, y,
              xhat, w, b, C);
}

// Backward: dx += dz = rstd * (v - mean(v) - xhat * mean(v * xhat)), v = dy * w (n,T,C), on the
// rows of `begin`, or = dz with `fresh`; then dout (n',T,C) = end.scale * dx on the rows of `end`,
// the preceding branch (tied: scale * the previous dx, + dz). sums (blocks,2C): each block's sums
// of dy * xhat and dy over its tokens. Without dout nothing is passed on.
template <class N, int W>
static __global__ void residual_layernorm_backward_kernel(float *dx, void *dout, float *sums,
                                                          const void *__restrict__ dy,
                                                          const void *__restrict__ xhat,
                                                          const float *__restrict__ rstd,
                                                          Rows begin, Rows end, int fresh, int tied,
                                                          const void *__restrict__ w, size_t BT,
                                                          size_t T, size_t C) {
    SHARED(float, work);                                 // (warps, 2C)
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    // each lane accesses only its own elements until the end
    float *dw = work + warp * 2 * C, *db = dw + C;
    Floats<W> zero;
    for (int k = 0; k < W; k++) zero.x[k] = 0;
    for (size_t c = lane * W; c < C; c += WARP * W)
        store<float, W>(dw, c, zero), store<float, W>(db, c, zero);
    for (size_t token = (size_t)blockIdx.x * warps + warp; token < BT;
         token += (size_t)gridDim.x * warps) {
        const unsigned row = (unsigned)token / (unsigned)T, t = (unsigned)token % (unsigned)T;
        const long begun = row_place(begin.place, row),
            ended = dout ? row_place(end.place, row) : -1;
        if (begun < 0 && ended < 0) continue;
        const size_t from = ((size_t)begun * T + t) * C, to = ((size_t)ended * T + t) * C;
        const float scale = ended < 0 ? 0 : *end.scale;
        float mean = 0, along = 0, r = 0;
        if (begun >= 0) {
#pragma unroll 2
            for (size_t c = lane * W; c < C; c += WARP * W) {
                const Floats<W> g = load<N, W>(dy, from + c), h = load<N, W>(xhat, from + c),
                    weight = load<N, W>(w, c);
                Floats<W> dwc = load<float, W>(dw, c), dbc = load<float, W>(db, c);
                for (int k = 0; k < W; k++) {
                    mean += g.x[k] * weight.x[k];
                    along += g.x[k] * weight.x[k] * h.x[k];
                    dwc.x[k] += g.x[k] * h.x[k];
                    dbc.x[k] += g.x[k];
                }
                store<float, W>(dw, c, dwc), store<float, W>(db, c, dbc);
            }
            mean = warp_sum(mean) / C;
            along = warp_sum(along) / C;
            r = rstd[(size_t)begun * T + t];
        }
#pragma unroll 2
        for (size_t c = lane * W; c < C; c += WARP * W) {
            Floats<W> old = zero, z = zero, sum;
            if (!fresh) old = load<float, W>(dx, token * C + c);
            if (begun >= 0) {
                const Floats<W> g = load<N, W>(dy, from + c), h = load<N, W>(xhat, from + c),
                    weight = load<N, W>(w, c);
                for (int k = 0; k < W; k++)
                    z.x[k] = r * (g.x[k] * weight.x[k] - mean - h.x[k] * along);
            }
            for (int k = 0; k < W; k++) sum.x[k] = old.x[k] + z.x[k];
            if (begun >= 0) store<float, W>(dx, token * C + c, sum);
            for (int k = 0; k < W; k++)
                sum.x[k] = tied ? scale * old.x[k] + z.x[k] : scale * sum.x[k];
            if (ended >= 0) store<N, W>(dout, to + c, sum);
        }
    }
    __syncthreads();
    for (size_t c = threadIdx.x; c < 2 * C; c += blockDim.x) {
        float total = 0;
        for (int i = 0; i < warps; i++) total += work[i * 2 * C + c];
        sums[blockIdx.x * 2 * C + c] = total;
    }
}

// dw, db (C) =, or += with `add`; NULL: not needed.
static void residual_layernorm_backward(const Gpu *g, float *dx, void *dout, float *dw, float *db,
                                        int add, const void *dy, const void *xhat,
                                        const float *rstd, Rows begin, Rows end, int fresh,
                                        int tied, const void *w, size_t B, size_t T, size_t C) {
    const unsigned warps = warps_for(C, 2),
        blocks = (unsigned)at_most(strips(B * T, warps), NORM_BLOCKS);
    LAUNCH_AS(residual_layernorm_backward_kernel, g, C % WIDE == 0, blocks, warps * WARP,
              warps * 2 * C * sizeof(float), dx, dout, g->partial, dy, xhat, rstd, begin, end,
              fresh, tied, w, B * T, T, C);
    if (dw) sum_parts(g, dw, db, g->partial, C, blocks, add);
}

// ---- Attention: qkv (n,T,3C) -> y (n,T,C), causal; saves lse (n,NH,T), the log-sum-exp ----
//
// Softmax in tiles that stay on the chip, after Dao 2023 (FlashAttention-2). Forward and dQ: a
// thread block owns rows of queries and iterates over the keys before them. dK and dV: it owns keys
// and iterates over the queries after them. So every result has one owner, and nothing is
// accumulated from two sides; both backward kernels recompute S and P = exp(S - lse): 7 matmuls,
// where atomics would need 5.
//
// In bf16 on tensor cores: a warp owns 16 M rows. Tiles of 8 N rows of the other side are loaded to
// shared memory one tile ahead, and serve all warps. Scores leave mma in the layout in which the
// next matmul takes them as its first operand (PTX ISA, figures of mma.m16n8k16), so they never
// leave the warp's registers. Heads are zero-padded to W = 64 or 128 elements. Wider heads, heads
// that are not a multiple of 8 elements (16 bytes), and fp32 use the plain kernels below.
//
// Causality also separates rows past T, which are read as zeros, from those before T: as keys they
// are too late, and as queries they are not stored.

enum { ATTENTION_WARPS = 4, ATTENTION_THREADS = 32 * ATTENTION_WARPS, ATTENTION_WIDEST = 256 };

// Rejects unsupported head sizes when the model is opened.
static void attention_check(size_t C, size_t NH) {
    if (C / NH > ATTENTION_WIDEST)
        die("heads of %zu channels: the GPU takes at most %d\n  hint: more heads (--heads)", C / NH,
            ATTENTION_WIDEST);
}

// The block's head, h of NH of one row, and its index among the head's blocks. The blocks of a head
// run at about the same time, so that K and V come from L2.
typedef struct { int row, h, block; } AttentionPlace;

static __device__ AttentionPlace attention_place(int block, int blocks, int NH) {
    const int head = block / blocks;
    return AttentionPlace{head / NH, head % NH, block % blocks};
}

// The start of the head in a matrix (n,T,numbers) and in (n,NH,T).
static __device__ size_t head_start(AttentionPlace p, size_t numbers, int T, int HS) {
    return p.row * T * numbers + p.h * HS;
}
static __device__ size_t head_tokens(AttentionPlace p, int NH, int T) {
    return ((size_t)p.row * NH + p.h) * T;
}

// Rows of a head, HS elements each, ld elements apart; reads past T or HS give 0.
template <class N> struct HeadRows { N *at; int ld, T, HS; };

template <class N> static __device__ N *head_row(HeadRows<N> x, int i) {
    return x.at + (ptrdiff_t)i * x.ld;
}

// Part 0, 1 or 2 (q, k or v) of a head of qkv or dqkv, and a head of y or dy.
template <class N> static __device__ HeadRows<N> head_of_qkv(N *qkv, AttentionPlace p, int part,
                                                              int T, int C, int HS) {
    return HeadRows<N>{qkv + head_start(p, 3 * (size_t)C, T, HS) + part * C, 3 * C, T, HS};
}

template <class N> static __device__ HeadRows<N> head_of_y(N *y, AttentionPlace p, int T, int C,
                                                            int HS) {
    return HeadRows<N>{y + head_start(p, C, T, HS), C, T, HS};
}

// ---- Dropout of attention probabilities ----
//
// One bit per query and key, generated before the kernels that need them: drawing inside those
// would waste most of each Philox call, whose eight keys belong to different lanes.

// words (n,NH,T,stride): bit j % 32 of word j / 32 tells if a query keeps key j; bits after the
// query are unset. words NULL: all are kept. The factor of kept ones follows from *noise.
typedef struct { const uint32_t *words; const NoisePlace *noise; int stride; } KeptKeys;

static inline size_t kept_keys_stride(size_t T) { return strips(T, 32); }

static __global__ void attention_keep_kernel(uint32_t *words, const NoisePlace *noise,
                                             const int *rows, size_t count, int T, int NH,
                                             int stride) {
    const size_t at = thread_index();
    const NoisePlace z = *noise;
    if (at >= count) return;
    const int word = (int)(at % (size_t)stride), t = (int)(at / (size_t)stride % (size_t)T);
    const size_t head = at / (size_t)stride / (size_t)T;
    const uint32_t row = noise_row(&z, (uint32_t)rows[head / (size_t)NH]);
    uint32_t bits = 0;
    for (int i = 0; i < 32 / NOISE_EACH && 32 * word <= t; i++) {
        const Philox w = noise_words(z.key, row, (uint32_t)(head % (size_t)NH), (uint32_t)t,
                                     (uint32_t)(4 * word + i));
        for (int e = 0; e < NOISE_EACH; e++)
            bits |= (uint32_t)(noise_half(w, e) >= z.rate) << (NOISE_EACH * i + e);
    }
    words[at] = bits;
}

static __device__ float kept_scale(KeptKeys keep) {
    return keep.words ? noise_scale_fp32(keep.noise->rate) : 1;
}

// The word with key j of query i of a head, whose tokens begin at `head`; 0 past T.
static __device__ uint32_t kept_word(KeptKeys keep, size_t head, int i, int j, int T) {
    return i < T && j < T ? keep.words[(head + (size_t)i) * (size_t)keep.stride + (size_t)(j / 32)]
        : 0;
}

static __device__ float kept_factor(KeptKeys keep, size_t head, int i, int j, int T, float scale) {
    return kept_word(keep, head, i, j, T) >> j % 32 & 1 ? scale : 0;
}

// ---- Attention in bf16: tiles in shared memory ----

// A tile's rows have W elements in pieces of 16 bytes. Slice p of row i is at position p ^ (i & 7):
// the same piece of eight rows, which ldmatrix reads together, covers all 32 banks.
template <int W> static __device__ bf16 *tile_piece(bf16 *tile, int row, int piece) {
    return tile + row * W + ((piece ^ (row & 7)) << 3);
}

// The pieces that one thread copies of a head's tiles: one piece of every STEP-th row. `left`: rows
// from its first one to T; none for a piece past HS.
template <int W> struct TileSource {
    enum { PIECES = W / 8, STEP = ATTENTION_THREADS / PIECES };
    const bf16 *from;
    int step, left;
};

template <int W> static __device__ TileSource<W> tile_source(HeadRows<const bf16> x, int first) {
    const int row = first + (int)threadIdx.x / TileSource<W>::PIECES,
        piece = (int)threadIdx.x % TileSource<W>::PIECES;
    return TileSource<W>{head_row(x, row) + piece * 8, TileSource<W>::STEP * x.ld,
                         piece * 8 < x.HS ? x.T - row : 0};
}

// Copies the next ROWS of a head asynchronously, `further` elements on in each row (v after k).
template <int ROWS, int W> static __device__ void tile_load(bf16 *tile, const TileSource<W> *x,
                                                             int further) {
    constexpr int PIECES = TileSource<W>::PIECES, STEP = TileSource<W>::STEP, TIMES = ROWS / STEP;
    static_assert(ROWS % STEP == 0 && STEP % 8 == 0,
                  "a thread's pieces have the same place in each row");
    bf16 *to = tile_piece<W>(tile, (int)threadIdx.x / PIECES, (int)threadIdx.x % PIECES);
    UNROLL for (int r = 0; r < TIMES; r++)
        cp_async16(to + r * STEP * W, x->from + further + (ptrdiff_t)r * x->step,
                   r * STEP < x->left);
}

template <int ROWS, int W> static __device__ void tile_advance(TileSource<W> *x) {
    x->from += (ptrdiff_t)(ROWS / TileSource<W>::STEP) * x->step, x->left -= ROWS;
}

// The rows that a block owns: one tile.
template <int ROWS, int W> static __device__ void tile_load_own(bf16 *tile,
                                                                 HeadRows<const bf16> x,
                                                                 int first) {
    const TileSource<W> source = tile_source<W>(x, first);
    tile_load<ROWS>(tile, &source, 0);
}

// The address of this lane's row of a 16 by 16 corner of a tile, for ldmatrix_x4: as the first
// operand of mma, or transposed as two second operands, ... `row` is a multiple of 8 and `piece`
// is even, both constants: the sum is ordered so that all but a few terms are constants or the same
// for every tile.
template <int W> static __device__ bf16 *tile_lane(bf16 *tile, int row, int piece) {
    const int lane = (int)threadIdx.x % 32;
    return (bf16 *)((char *)tile + (lane % 16 * 2 * W + ((lane / 16 ^ lane % 8 ^ piece) << 4)) +
                    row * 2 * W);
}

// ... and as two second operands that are not transposed.
template <int W> static __device__ bf16 *tile_lane_second(bf16 *tile, int row, int piece) {
    const int lane = (int)threadIdx.x % 32;
    return (bf16 *)((char *)tile + ((lane / 16 * 8 + lane % 8) * 2 * W +
                                    ((lane / 8 % 2 ^ lane % 8 ^ piece) << 4)) +
                    row * 2 * W);
}

// Step k of the 16 M rows that a warp owns, as first operands; all steps if they are KEPT in
// registers. `row`: the second of the two tiles of such rows is ROWS rows after the first, a
// constant in the address instead of another pointer.
template <int W, int M> static __device__ void own_read(uint32_t a[M][4], bf16 *tile, int row,
                                                        int k) {
    UNROLL for (int m = 0; m < M; m++) ldmatrix_x4(a[m], tile_lane<W>(tile, row + 16 * m, 2 * k));
}

template <int W, int M, bool KEPT> struct OwnRows { uint32_t a[KEPT ? W / 16 : 1][M][4]; };

template <int W, int M, bool KEPT> static __device__ void own_keep(OwnRows<W, M, KEPT> *own,
                                                                   bf16 *tile, int row) {
    if (KEPT) {
        UNROLL for (int k = 0; k < W / 16; k++) own_read<W, M>(own->a[k], tile, row, k);
    }
}

// s (16M,8N) += own (16M,W) tile (8N,W)^T.
template <int W, int M, int N, bool KEPT>
static __device__ void tile_scores(float s[M][N][4], OwnRows<W, M, KEPT> *own, bf16 *own_tile,
                                   int row, bf16 *tile) {
    UNROLL for (int k = 0; k < W / 16; k++) {
        if (!KEPT) own_read<W, M>(own->a[0], own_tile, row, k);
        UNROLL for (int n = 0; n < N; n += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, tile_lane_second<W>(tile, 8 * n, 2 * k));
            UNROLL for (int m = 0; m < M; m++) {
                mma_bf16(s[m][n], own->a[KEPT ? k : 0][m], b);
                mma_bf16(s[m][n + 1], own->a[KEPT ? k : 0][m], b + 2);
            }
        }
    }
}

// out (16M,W) += p (16M,8N) tile (8N,W); p is rounded to bf16.
template <int W, int M, int N>
static __device__ void tile_matmul(float out[M][W / 8][4], const float p[M][N][4], bf16 *tile) {
    UNROLL for (int n = 0; n < N; n += 2) {
        uint32_t a[M][4];
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int e = 0; e < 4; e++)
                a[m][e] = pack_bf16(p[m][n + e / 2][e % 2 * 2], p[m][n + e / 2][e % 2 * 2 + 1]);
        UNROLL for (int d = 0; d < W / 8; d += 2) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, tile_lane<W>(tile, 8 * n, d));
            UNROLL for (int m = 0; m < M; m++) {
                mma_bf16(out[m][d], a[m], b);
                mma_bf16(out[m][d + 1], a[m], b + 2);
            }
        }
    }
}

// Stores out (16M,W) to 16 M rows of x from `first` on, through the warp's own tile, so that whole
// pieces are written. The tile's contents are no longer needed: there has been a barrier since.
template <int W, int M>
static __device__ void own_store(HeadRows<bf16> x, int first, const float out[M][W / 8][4],
                                 bf16 *tile) {
    const int lane = (int)threadIdx.x % 32;
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int d = 0; d < W / 8; d++)
            UNROLL for (int half = 0; half < 2; half++) {
                bf16 *to = tile_piece<W>(tile, 16 * m + 8 * half + lane / 4, d) + lane % 4 * 2;
                to[0] = from_float<bf16>(out[m][d][2 * half]);
                to[1] = from_float<bf16>(out[m][d][2 * half + 1]);
            }
    __syncwarp();
    for (int at = lane; at < 16 * M * (W / 8); at += 32) {
        const int row = at / (W / 8), piece = at % (W / 8), i = first + row;
        if (i < x.T && piece * 8 < x.HS)
            pack_store(head_row(x, i) + piece * 8, pack_load(tile_piece<W>(tile, row, piece)));
    }
}

// ---- Attention in bf16: scores in registers ----
//
// For each 16 by 8 tile of scores s[m][n], lane l of a warp holds rows l / 4 and l / 4 + 8, and of
// each columns l % 4 * 2 and the next.

// Scores whose key is later than the query become -inf. Rows are queries and columns keys, or vice
// versa; row0 and column0 are those of s[0][0][0] in lane 0.
template <bool ROWS_ARE_KEYS, int M, int N>
static __device__ void causal(float s[M][N][4], int row0, int column0) {
    const int lane = (int)threadIdx.x % 32, ahead = row0 + lane / 4 - column0 - lane % 4 * 2;
    if (ROWS_ARE_KEYS ? column0 >= row0 + 16 * M - 1 : row0 >= column0 + 8 * N - 1) return;
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int n = 0; n < N; n++)
            UNROLL for (int e = 0; e < 4; e++) {
                const int row_ahead = ahead + 16 * m + e / 2 * 8 - 8 * n - e % 2;
                if (ROWS_ARE_KEYS ? row_ahead > 0 : row_ahead < 0) s[m][n][e] = -INFINITY;
            }
}

// s times the factors of dropout. Rows are queries; columns begin at a multiple of 32, which is a
// word of bits.
template <int M, int N>
static __device__ void tile_keep(float s[M][N][4], KeptKeys keep, size_t head, int row0,
                                 int column0, int T) {
    const float scale = kept_scale(keep);
    const int lane = thread_reread() % 32;               // else rows' addresses take registers
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int half = 0; half < 2; half++)
            UNROLL for (int n = 0; n < N; n += 4) {
                const int i = row0 + lane / 4 + 16 * m + 8 * half;
                const uint32_t word = kept_word(keep, head, i, column0 + 8 * n, T) >> lane % 4 * 2;
                UNROLL for (int k = 0; k < 8; k++)
                    s[m][n + k / 2][2 * half + k % 2] *=
                        word >> (k / 2 * 8 + k % 2) & 1 ? scale : 0;
            }
}

// The bits of a tile whose rows are keys, in the order of s[m][n][e]: one register, not a factor
// for each.
template <int M, int N>
static __device__ uint32_t tile_kept(KeptKeys keep, size_t head, int row0, int column0, int T) {
    static_assert(4 * M * N <= 32, "a bit for each element");
    const int thread = thread_reread(), row = row0 + thread % 32 / 4,
        column = column0 + thread % 4 * 2;
    uint32_t bits = 0;
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int n = 0; n < N; n++)
            UNROLL for (int e = 0; e < 4; e++) {
                const int j = row + 16 * m + e / 2 * 8;
                const uint32_t word = kept_word(keep, head, column + 8 * n + e % 2, j, T);
                bits |= (word >> j % 32 & 1) << (4 * (m * N + n) + e);
            }
    return bits;
}

// Over the four lanes of a row.
static __device__ float line_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}

static __device__ float line_sum(float x) {
    x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}

// Adds one tile of scores to the running softmax: s becomes 2^(scale2 (s - top)); `sum`, over this
// lane's columns, and the accumulated y are rescaled to the new top. A query's first tile has a key
// that it sees, so top is finite after it.
template <int W, int M, int N>
static __device__ void softmax_tile(float s[M][N][4], float out[M][W / 8][4], float top[M][2],
                                    float sum[M][2], float scale2) {
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int half = 0; half < 2; half++) {
            float high = top[m][half], total = 0;
            UNROLL for (int n = 0; n < N; n++)
                high = fmaxf(high, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
            high = line_max(high);
            const float shrink = exp2_fast((top[m][half] - high) * scale2), high2 = high * scale2;
            UNROLL for (int n = 0; n < N; n++)
                UNROLL for (int e = 2 * half; e < 2 * half + 2; e++)
                    total += s[m][n][e] = exp2_fast(s[m][n][e] * scale2 - high2);
            UNROLL for (int d = 0; d < W / 8; d++)
                out[m][d][2 * half] *= shrink, out[m][d][2 * half + 1] *= shrink;
            sum[m][half] = sum[m][half] * shrink + total;
            top[m][half] = high;
        }
}

// ---- Attention in bf16: the three kernels ----
//
// scale = 1/sqrt(HS), scale2 = scale log2(e): exponentials are powers of 2.

static __device__ int blocks_of(int T, int rows) { return (T + rows - 1) / rows; }

// What a thread works on: `lane` of a warp that owns 16 M of the block's rows, which are a head's
// from `first` on, from its row `own` on. `late_first`: the blocks are counted from the last.
struct AttentionOwn { AttentionPlace p; int first, own, lane; };

template <int M> static __device__ AttentionOwn attention_own(int thread, int block, int T, int NH,
                                                              bool late_first) {
    constexpr int ROWS = 16 * M * ATTENTION_WARPS;
    const int blocks = blocks_of(T, ROWS);
    const AttentionPlace p = attention_place(block, blocks, NH);
    return AttentionOwn{p, (late_first ? blocks - 1 - p.block : p.block) * ROWS,
                        16 * M * (thread / 32), thread % 32};
}

// DROPS: with dropout, without which no code for it is compiled.
template <int W, int M, int N, bool KEPT, bool DROPS>
static __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
attention_forward_kernel(bf16 *y, float *lse, const bf16 *qkv, KeptKeys keep, int T, int C, int NH,
                         float scale) {
    BOUNDS(ATTENTION_THREADS);
    constexpr int ROWS = 16 * M * ATTENTION_WARPS, KEYS = 8 * N;
    // q (ROWS,W); k and v (2,KEYS,W): current and next tile
    SHARED(bf16, shared);
    bf16 *const k_tiles = shared + ROWS * W, *const v_tiles = k_tiles + 2 * KEYS * W;
    // the longest loops start first
    const AttentionOwn o = attention_own<M>((int)threadIdx.x, (int)blockIdx.x, T, NH, true);
    const AttentionPlace p = o.p;
    const int HS = C / NH, i0 = o.first, i_own = i0 + o.own;
    TileSource<W> keys = tile_source<W>(head_of_qkv(qkv, p, 1, T, C, HS), 0);
    const float scale2 = scale * 1.44269504f;
    bf16 *const q_tile = shared + o.own * W;
    OwnRows<W, M, KEPT> q;
    float out[M][W / 8][4] = {}, top[M][2], sum[M][2] = {};
    UNROLL for (int m = 0; m < M; m++) top[m][0] = top[m][1] = -INFINITY;

    tile_load_own<ROWS, W>(shared, head_of_qkv(qkv, p, 0, T, C, HS), i0);
    tile_load<KEYS>(k_tiles, &keys, 0);
    tile_load<KEYS>(v_tiles, &keys, C);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    own_keep<W, M, KEPT>(&q, q_tile, 0);
    const int end = i0 + ROWS < T ? i0 + ROWS : T;
    for (int j0 = 0, at = 0; j0 < end; j0 += KEYS, at ^= 1) {
        if (j0 + KEYS < end) {
            tile_advance<KEYS>(&keys);
            tile_load<KEYS>(k_tiles + (at ^ 1) * KEYS * W, &keys, 0);
            tile_load<KEYS>(v_tiles + (at ^ 1) * KEYS * W, &keys, C);
            cp_async_commit();
        }
        // not too late for all queries of this warp
        if (j0 < i_own + 16 * M) {
            float s[M][N][4] = {};
            tile_scores<W, M, N, KEPT>(s, &q, q_tile, 0, k_tiles + at * KEYS * W);
            causal<false, M, N>(s, i_own, j0);
            softmax_tile<W, M, N>(s, out, top, sum, scale2);
            if (DROPS) tile_keep<M, N>(s, keep, head_tokens(p, NH, T), i_own, j0, T);
            tile_matmul<W, M, N>(out, s, v_tiles + at * KEYS * W);
        }
        cp_async_wait<0>();
        // the next tile is here, and nobody reads this one any longer
        __syncthreads();
    }

    const AttentionOwn to = attention_own<M>(thread_reread(), block_reread(), T, NH, true);
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int half = 0; half < 2; half++) {
            const int i = to.first + to.own + 16 * m + 8 * half + to.lane / 4;
            const float all = line_sum(sum[m][half]), share = 1 / all;
            UNROLL for (int d = 0; d < W / 8; d++)
                out[m][d][2 * half] *= share, out[m][d][2 * half + 1] *= share;
            if (to.lane % 4 == 0 && i < T)
                lse[head_tokens(to.p, NH, T) + i] = top[m][half] * scale + logf(all);
        }
    own_store<W, M>(head_of_y(y, to.p, T, C, C / NH), to.first + to.own, out, shared + to.own * W);
}

// dQ = scale ds K, ds = P (dP - inner), dP = dy V^T (Dao et al. 2022, algorithm 4), times the
// factor of dropout.
template <int W, int M, int N, bool KEPT, bool DROPS>
static __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
attention_backward_queries_kernel(bf16 *dqkv, const bf16 *dy, const bf16 *qkv, const float *lse,
                                  const float *inner, KeptKeys keep, int T, int C, int NH,
                                  float scale) {
    BOUNDS(ATTENTION_THREADS);
    constexpr int ROWS = 16 * M * ATTENTION_WARPS, KEYS = 8 * N;
    SHARED(bf16, shared);                                // q and dy (ROWS,W); k and v (2,KEYS,W)
    bf16 *const k_tiles = shared + 2 * ROWS * W, *const v_tiles = k_tiles + 2 * KEYS * W;
    const AttentionOwn o = attention_own<M>((int)threadIdx.x, (int)blockIdx.x, T, NH, true);
    const AttentionPlace p = o.p;
    const int HS = C / NH, i0 = o.first, i_own = i0 + o.own;
    TileSource<W> keys = tile_source<W>(head_of_qkv(qkv, p, 1, T, C, HS), 0);
    const float scale2 = scale * 1.44269504f;
    // the warp's rows; those of dy are ROWS further
    bf16 *const q_tile = shared + o.own * W;
    OwnRows<W, M, KEPT> q, g;                            // g: dy
    float dq[M][W / 8][4] = {}, lse2[M][2], minus_inner[M][2];

    tile_load_own<ROWS, W>(shared, head_of_qkv(qkv, p, 0, T, C, HS), i0);
    tile_load_own<ROWS, W>(shared + ROWS * W, head_of_y(dy, p, T, C, HS), i0);
    tile_load<KEYS>(k_tiles, &keys, 0);
    tile_load<KEYS>(v_tiles, &keys, C);
    cp_async_commit();
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int half = 0; half < 2; half++) {
            const int i = i_own + 16 * m + 8 * half + o.lane / 4;
            const size_t at = head_tokens(p, NH, T) + i;
            lse2[m][half] = i < T ? lse[at] * 1.44269504f : 0;
            minus_inner[m][half] = i < T ? -inner[at] : 0;
        }
    cp_async_wait<0>();
    __syncthreads();
    own_keep<W, M, KEPT>(&q, q_tile, 0);
    own_keep<W, M, KEPT>(&g, q_tile, ROWS);
    const int end = i0 + ROWS < T ? i0 + ROWS : T;
    for (int j0 = 0, at = 0; j0 < end; j0 += KEYS, at ^= 1) {
        if (j0 + KEYS < end) {
            tile_advance<KEYS>(&keys);
            tile_load<KEYS>(k_tiles + (at ^ 1) * KEYS * W, &keys, 0);
            tile_load<KEYS>(v_tiles + (at ^ 1) * KEYS * W, &keys, C);
            cp_async_commit();
        }
        if (j0 < i_own + 16 * M) {
            float s[M][N][4] = {}, ds[M][N][4];
            tile_scores<W, M, N, KEPT>(s, &q, q_tile, 0, k_tiles + at * KEYS * W);
            causal<false, M, N>(s, i_own, j0);
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int n = 0; n < N; n++)
                    // initial value of dP
                    UNROLL for (int e = 0; e < 4; e++)
                        ds[m][n][e] = DROPS ? 0 : minus_inner[m][e / 2];
            tile_scores<W, M, N, KEPT>(ds, &g, q_tile, ROWS, v_tiles + at * KEYS * W);
            if (DROPS) {
                tile_keep<M, N>(ds, keep, head_tokens(p, NH, T), i_own, j0, T);
                UNROLL for (int m = 0; m < M; m++)
                    UNROLL for (int n = 0; n < N; n++)
                        UNROLL for (int e = 0; e < 4; e++) ds[m][n][e] += minus_inner[m][e / 2];
            }
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int n = 0; n < N; n++)
                    UNROLL for (int e = 0; e < 4; e++)
                        ds[m][n][e] *= exp2_fast(s[m][n][e] * scale2 - lse2[m][e / 2]);
            tile_matmul<W, M, N>(dq, ds, k_tiles + at * KEYS * W);
        }
        cp_async_wait<0>();
        __syncthreads();                                 // as in the forward kernel
    }

    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int d = 0; d < W / 8; d++)
            UNROLL for (int e = 0; e < 4; e++) dq[m][d][e] *= scale;
    const AttentionOwn to = attention_own<M>(thread_reread(), block_reread(), T, NH, true);
    own_store<W, M>(head_of_qkv(dqkv, to.p, 0, T, C, C / NH), to.first + to.own, dq,
                    shared + to.own * W);
}

// lse log2(e) and -inner of the next QUERIES queries, one for each of the first 2 QUERIES threads.
// Past T, 0 is fine: dy is 0 there, so P dy and ds are.
template <int QUERIES> struct QueryElements { const float *from; float factor; int left; };

template <int QUERIES>
static __device__ QueryElements<QUERIES> query_elements(const float *lse, const float *inner,
                                                      size_t start, int i0, int T) {
    const int x = (int)threadIdx.x, i = i0 + x % QUERIES;
    const bool first = x < QUERIES;
    return QueryElements<QUERIES>{(first ? lse : inner) + start + i, first ? 1.44269504f : -1,
                                 x < 2 * QUERIES ? T - i : 0};
}

template <int QUERIES> static __device__ float query_read(QueryElements<QUERIES> *x) {
    const float number = x->left > 0 ? *x->from * x->factor : 0;
    x->from += QUERIES, x->left -= QUERIES;
    return number;
}

template <int QUERIES> static __device__ void query_write(float *numbers, float number) {
    if ((int)threadIdx.x < 2 * QUERIES) numbers[threadIdx.x] = number;
}

// dV = P^T dy, dK = scale ds^T Q. Rows are keys here, so that the warp has P^T and ds^T. With
// dropout, dV uses P after dropout.
template <int W, int M, int N, bool KEPT, bool DROPS>
static __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
attention_backward_keys_kernel(bf16 *dqkv, const bf16 *dy, const bf16 *qkv, const float *lse,
                               const float *inner, KeptKeys keep, int T, int C, int NH,
                               float scale) {
    BOUNDS(ATTENTION_THREADS);
    constexpr int ROWS = 16 * M * ATTENTION_WARPS, QUERIES = 8 * N;
    static_assert(2 * QUERIES <= ATTENTION_THREADS, "query_elements: a thread for each");
    // k and v (ROWS,W); q and dy (2,QUERIES,W); numbers (2,2,QUERIES)
    SHARED(bf16, shared);
    bf16 *const q_tiles = shared + 2 * ROWS * W, *const dy_tiles = q_tiles + 2 * QUERIES * W;
    float *const numbers = (float *)(void *)(dy_tiles + 2 * QUERIES * W);
    const AttentionOwn o = attention_own<M>((int)threadIdx.x, (int)blockIdx.x, T, NH, false);
    const AttentionPlace p = o.p;
    const int HS = C / NH, j0 = o.first, j_own = j0 + o.own;
    // the first tile with a query that sees a key of the block
    int i0 = j0 / QUERIES * QUERIES;
    TileSource<W> q = tile_source<W>(head_of_qkv(qkv, p, 0, T, C, HS), i0);
    TileSource<W> g = tile_source<W>(head_of_y(dy, p, T, C, HS), i0);
    const float scale2 = scale * 1.44269504f;
    QueryElements<QUERIES> source = query_elements<QUERIES>(lse, inner, head_tokens(p, NH, T), i0,
                                                            T);
    // the warp's rows; those of v are ROWS further
    bf16 *const k_tile = shared + o.own * W;
    OwnRows<W, M, KEPT> k, v;
    float dk[M][W / 8][4] = {}, dv[M][W / 8][4] = {};

    tile_load_own<ROWS, W>(shared, head_of_qkv(qkv, p, 1, T, C, HS), j0);
    tile_load_own<ROWS, W>(shared + ROWS * W, head_of_qkv(qkv, p, 2, T, C, HS), j0);
    tile_load<QUERIES>(q_tiles, &q, 0);
    tile_load<QUERIES>(dy_tiles, &g, 0);
    cp_async_commit();
    query_write<QUERIES>(numbers, query_read(&source));
    cp_async_wait<0>();
    __syncthreads();
    own_keep<W, M, KEPT>(&k, k_tile, 0);
    own_keep<W, M, KEPT>(&v, k_tile, ROWS);
    for (int at = 0; i0 < T; i0 += QUERIES, at ^= 1) {
        float next = 0;
        if (i0 + QUERIES < T) {
            tile_advance<QUERIES>(&q), tile_advance<QUERIES>(&g);
            tile_load<QUERIES>(q_tiles + (at ^ 1) * QUERIES * W, &q, 0);
            tile_load<QUERIES>(dy_tiles + (at ^ 1) * QUERIES * W, &g, 0);
            cp_async_commit();
            next = query_read(&source);
        }
        if (i0 + QUERIES > j_own) {                      // not too early for all keys of this warp
            float s[M][N][4] = {}, ds[M][N][4];
            tile_scores<W, M, N, KEPT>(s, &k, k_tile, 0, q_tiles + at * QUERIES * W);
            causal<true, M, N>(s, j_own, i0);
            const float *lse2 = numbers + at * 2 * QUERIES + o.lane % 4 * 2,
                *minus_inner = lse2 + QUERIES;
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int n = 0; n < N; n++)
                    UNROLL for (int e = 0; e < 4; e++)
                        s[m][n][e] = exp2_fast(s[m][n][e] * scale2 - lse2[8 * n + e % 2]);
            if (DROPS) {
                const float kept = kept_scale(keep);
                const uint32_t bits = tile_kept<M, N>(keep, head_tokens(p, NH, T), j_own, i0, T);
                float left[M][N][4];
                UNROLL for (int m = 0; m < M; m++)
                    UNROLL for (int n = 0; n < N; n++)
                        UNROLL for (int e = 0; e < 4; e++) {
                            const bool stays = bits >> (4 * (m * N + n) + e) & 1;
                            left[m][n][e] = stays ? s[m][n][e] * kept : 0, ds[m][n][e] = 0;
                        }
                tile_matmul<W, M, N>(dv, left, dy_tiles + at * QUERIES * W);
                tile_scores<W, M, N, KEPT>(ds, &v, k_tile, ROWS, dy_tiles + at * QUERIES * W);
                UNROLL for (int m = 0; m < M; m++)
                    UNROLL for (int n = 0; n < N; n++)
                        UNROLL for (int e = 0; e < 4; e++) {
                            const bool stays = bits >> (4 * (m * N + n) + e) & 1;
                            ds[m][n][e] = (stays ? ds[m][n][e] * kept : 0) +
                                minus_inner[8 * n + e % 2];
                        }
            } else {
                tile_matmul<W, M, N>(dv, s, dy_tiles + at * QUERIES * W);
                UNROLL for (int m = 0; m < M; m++)
                    UNROLL for (int n = 0; n < N; n++)
                        // initial value of dP
                        UNROLL for (int e = 0; e < 4; e++) ds[m][n][e] = minus_inner[8 * n + e % 2];
                tile_scores<W, M, N, KEPT>(ds, &v, k_tile, ROWS, dy_tiles + at * QUERIES * W);
            }
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int n = 0; n < N; n++)
                    UNROLL for (int e = 0; e < 4; e++) ds[m][n][e] *= s[m][n][e];
            tile_matmul<W, M, N>(dk, ds, q_tiles + at * QUERIES * W);
        }
        query_write<QUERIES>(numbers + (at ^ 1) * 2 * QUERIES, next);
        cp_async_wait<0>();
        __syncthreads();
    }

    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int d = 0; d < W / 8; d++)
            UNROLL for (int e = 0; e < 4; e++) dk[m][d][e] *= scale;
    const AttentionOwn to = attention_own<M>(thread_reread(), block_reread(), T, NH, false);
    own_store<W, M>(head_of_qkv(dqkv, to.p, 1, T, C, C / NH), to.first + to.own, dk,
                    shared + to.own * W);
    own_store<W, M>(head_of_qkv(dqkv, to.p, 2, T, C, C / NH), to.first + to.own, dv,
                    shared + (ROWS + to.own) * W);
}

// inner (n,NH,T) = <dy, y> for each head of each token, by `lanes` threads, a power of 2, each
// reading SIZE elements at a time.
template <class N, int SIZE>
static __global__ void attention_inner_kernel(float *inner, const N *dy, const N *y, unsigned heads,
                                              unsigned T, unsigned C, unsigned NH, unsigned lanes) {
    // lanes divides blockDim.x
    const unsigned lane = threadIdx.x % lanes, HS = C / NH;
    // head at % NH of a token
    const unsigned at = blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
    const bool valid = at < heads;
    const size_t from = (size_t)at * HS;
    float sum = 0;
    for (unsigned d = lane * SIZE; valid && d < HS; d += lanes * SIZE) {
        if (SIZE > 1) {
            const Pack<N> a = pack_load(dy + from + d), b = pack_load(y + from + d);
            UNROLL for (int e = 0; e < SIZE; e++) sum += to_float(a.x[e]) * to_float(b.x[e]);
        } else sum += to_float(dy[from + d]) * to_float(y[from + d]);
    }
    for (unsigned other = lanes / 2; other; other /= 2)
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, (int)other);
    const unsigned token = at / NH, row = token / T;
    if (valid && lane == 0) inner[((size_t)row * NH + at % NH) * T + token % T] = sum;
}

// ---- Attention with plain sums in fp32: any storage, heads of up to 256 ----
//
// The same loops with 256 threads, 16 by 16, on tiles of 4096 / W rows: thread (y, x) has rows y +
// 16 r and columns x + 16 c of the scores, and columns 4 x + 64 c and three more of the results. A
// row belongs to half a warp.

// padded rows: pieces of 8 rows cover all banks
enum { PLAIN_THREADS = 256, PLAIN_TILE = 4096, PLAIN_PAD = 4 };

template <int W> struct Plain {
    enum { ROWS = PLAIN_TILE / W, R = ROWS / 16, LD = W + PLAIN_PAD, P_LD = ROWS + PLAIN_PAD,
           TILE = ROWS * LD, P_TILE = ROWS * P_LD };
};

template <class N, int W> static __device__ void plain_load(float *tile, HeadRows<const N> x,
                                                            int first) {
    for (int at = (int)threadIdx.x; at < PLAIN_TILE; at += PLAIN_THREADS) {
        const int row = at / W, d = at % W;
        const bool valid = first + row < x.T && d < x.HS;
        tile[row * Plain<W>::LD + d] = valid ? to_float(head_row(x, first + row)[d]) : 0;
    }
}

// s = a b^T, over the HS elements of the rows.
template <int W, int R> static __device__ void plain_scores(float s[R][R], const float *a,
                                                            const float *b, int HS) {
    constexpr int LD = Plain<W>::LD;
    a += (int)threadIdx.x / 16 * LD, b += (int)threadIdx.x % 16 * LD;
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < R; c++) s[r][c] = 0;
    for (int d = 0; d < HS; d += 4) {
        Pack<float> from_a[R], from_b[R];
        UNROLL for (int r = 0; r < R; r++) from_a[r] = pack_load(a + 16 * r * LD + d);
        UNROLL for (int c = 0; c < R; c++) from_b[c] = pack_load(b + 16 * c * LD + d);
        UNROLL for (int e = 0; e < 4; e++)
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int c = 0; c < R; c++) s[r][c] += from_a[r].x[e] * from_b[c].x[e];
    }
}

// Stores the scores where the other threads of their row read them.
template <int W, int R> static __device__ void plain_share(float *p, const float s[R][R]) {
    __syncwarp();
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < R; c++)
            p[((int)threadIdx.x / 16 + 16 * r) * Plain<W>::P_LD + (int)threadIdx.x % 16 + 16 * c] =
                s[r][c];
    __syncwarp();
}

// out (ROWS,W) += p (ROWS,ROWS) tile (ROWS,W).
template <int W, int R>
static __device__ void plain_matmul(float out[R][W / 64][4], const float *p, const float *tile) {
    constexpr int LD = Plain<W>::LD, P_LD = Plain<W>::P_LD;
    p += (int)threadIdx.x / 16 * P_LD, tile += (int)threadIdx.x % 16 * 4;
    for (int j = 0; j < Plain<W>::ROWS; j += 4) {
        Pack<float> shares[R];
        UNROLL for (int r = 0; r < R; r++) shares[r] = pack_load(p + 16 * r * P_LD + j);
        UNROLL for (int e = 0; e < 4; e++)
            UNROLL for (int c = 0; c < W / 64; c++) {
                const Pack<float> row = pack_load(tile + (j + e) * LD + 64 * c);
                UNROLL for (int r = 0; r < R; r++)
                    UNROLL for (int l = 0; l < 4; l++) out[r][c][l] += shares[r].x[e] * row.x[l];
            }
    }
}

template <class N, int W, int R>
static __device__ void plain_store(HeadRows<N> x, int first, const float out[R][W / 64][4],
                                   const float factor[R]) {
    UNROLL for (int r = 0; r < R; r++) {
        const int i = first + (int)threadIdx.x / 16 + 16 * r;
        UNROLL for (int c = 0; c < W / 64; c++)
            UNROLL for (int l = 0; l < 4; l++) {
                const int d = (int)threadIdx.x % 16 * 4 + 64 * c + l;
                if (i < x.T && d < x.HS)
                    head_row(x, i)[d] = from_float<N>(out[r][c][l] * factor[r]);
            }
    }
}

// softmax_tile on plain scores; a row is 16 threads.
template <int W, int R>
static __device__ void plain_softmax(float s[R][R], float out[R][W / 64][4], float top[R],
                                     float sum[R]) {
    UNROLL for (int r = 0; r < R; r++) {
        float high = top[r], total = 0;
        UNROLL for (int c = 0; c < R; c++) high = fmaxf(high, s[r][c]);
        UNROLL for (int other = 8; other; other /= 2)
            high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFF, high, other));
        const float shrink = expf(top[r] - high);
        UNROLL for (int c = 0; c < R; c++) total += s[r][c] = expf(s[r][c] - high);
        UNROLL for (int c = 0; c < W / 64; c++)
            UNROLL for (int l = 0; l < 4; l++) out[r][c][l] *= shrink;
        sum[r] = sum[r] * shrink + total;
        top[r] = high;
    }
}

template <class N, int W>
static __global__ void __launch_bounds__(PLAIN_THREADS, 1)
attention_forward_plain(N *y, float *lse, const N *qkv, KeptKeys keep, int T, int C, int NH,
                        float scale) {
    BOUNDS(PLAIN_THREADS);
    constexpr int ROWS = Plain<W>::ROWS, R = Plain<W>::R;
    SHARED(float, q);
    float *const k = q + Plain<W>::TILE, *const v = k + Plain<W>::TILE,
        *const shares = v + Plain<W>::TILE;
    const int blocks = blocks_of(T, ROWS), HS = C / NH, row = (int)threadIdx.x / 16,
        column = (int)threadIdx.x % 16;
    const AttentionPlace p = attention_place((int)blockIdx.x, blocks, NH);
    const int i0 = (blocks - 1 - p.block) * ROWS;
    const float kept = kept_scale(keep);
    float out[R][W / 64][4] = {}, top[R], sum[R] = {}, share[R];
    UNROLL for (int r = 0; r < R; r++) top[r] = -INFINITY;
    plain_load<N, W>(q, head_of_qkv(qkv, p, 0, T, C, HS), i0);
    for (int j0 = 0; j0 <= i0; j0 += ROWS) {
        __syncthreads();                                 // all are done with the previous tiles
        plain_load<N, W>(k, head_of_qkv(qkv, p, 1, T, C, HS), j0);
        plain_load<N, W>(v, head_of_qkv(qkv, p, 2, T, C, HS), j0);
        __syncthreads();
        float s[R][R];
        plain_scores<W, R>(s, q, k, HS);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < R; c++)
                s[r][c] = j0 + column + 16 * c <= i0 + row + 16 * r ? s[r][c] * scale : -INFINITY;
        plain_softmax<W, R>(s, out, top, sum);
        UNROLL for (int r = 0; r < R && keep.words; r++)
            UNROLL for (int c = 0; c < R; c++)
                s[r][c] *= kept_factor(keep, head_tokens(p, NH, T), i0 + row + 16 * r,
                                       j0 + column + 16 * c, T, kept);
        plain_share<W, R>(shares, s);
        plain_matmul<W, R>(out, shares, v);
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int other = 8; other; other /= 2)
            sum[r] += __shfl_xor_sync(0xFFFFFFFF, sum[r], other);
        share[r] = 1 / sum[r];
        const int i = i0 + row + 16 * r;
        if (column == 0 && i < T) lse[head_tokens(p, NH, T) + i] = top[r] + logf(sum[r]);
    }
    plain_store<N, W, R>(head_of_y(y, p, T, C, HS), i0, out, share);
}

// Both backward kernels: of four tiles the block owns the first two; the others are loaded with
// rows `first` on of a and b, and s and ds are the products of own and other rows.
template <class N, int W, int R>
static __device__ void plain_scores_twice(float s[R][R], float ds[R][R], float *tiles,
                                          HeadRows<const N> a, HeadRows<const N> b, int first) {
    float *const others = tiles + 2 * Plain<W>::TILE;
    __syncthreads();                                     // all are done with the previous rows
    plain_load<N, W>(others, a, first);
    plain_load<N, W>(others + Plain<W>::TILE, b, first);
    __syncthreads();
    plain_scores<W, R>(s, tiles, others, a.HS);
    plain_scores<W, R>(ds, tiles + Plain<W>::TILE, others + Plain<W>::TILE, a.HS);
}

template <class N, int W>
static __global__ void __launch_bounds__(PLAIN_THREADS, 1)
attention_backward_queries_plain(N *dqkv, const N *dy, const N *qkv, const float *lse,
                                 const float *inner, KeptKeys keep, int T, int C, int NH,
                                 float scale) {
    BOUNDS(PLAIN_THREADS);
    constexpr int ROWS = Plain<W>::ROWS, R = Plain<W>::R;
    SHARED(float, q);                                    // q, dy, k and v, then the shared scores
    float *const g = q + Plain<W>::TILE, *const k = g + Plain<W>::TILE,
        *const shares = k + 2 * Plain<W>::TILE;
    const int blocks = blocks_of(T, ROWS), HS = C / NH, row = (int)threadIdx.x / 16,
        column = (int)threadIdx.x % 16;
    const AttentionPlace p = attention_place((int)blockIdx.x, blocks, NH);
    const int i0 = (blocks - 1 - p.block) * ROWS;
    const float kept = kept_scale(keep);
    float dq[R][W / 64][4] = {}, lse_of[R], inner_of[R], factor[R];
    UNROLL for (int r = 0; r < R; r++) {
        const int i = i0 + row + 16 * r;
        const size_t at = head_tokens(p, NH, T) + i;
        lse_of[r] = i < T ? lse[at] : 0, inner_of[r] = i < T ? inner[at] : 0, factor[r] = scale;
    }
    plain_load<N, W>(q, head_of_qkv(qkv, p, 0, T, C, HS), i0);
    plain_load<N, W>(g, head_of_y(dy, p, T, C, HS), i0);
    for (int j0 = 0; j0 <= i0; j0 += ROWS) {
        float s[R][R], ds[R][R];
        plain_scores_twice<N, W, R>(s, ds, q, head_of_qkv(qkv, p, 1, T, C, HS),
                                    head_of_qkv(qkv, p, 2, T, C, HS), j0);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < R; c++) {
                const int i = i0 + row + 16 * r, j = j0 + column + 16 * c;
                const bool seen = j <= i;
                if (keep.words) ds[r][c] *= kept_factor(keep, head_tokens(p, NH, T), i, j, T, kept);
                ds[r][c] = seen ? expf(s[r][c] * scale - lse_of[r]) * (ds[r][c] - inner_of[r]) : 0;
            }
        plain_share<W, R>(shares, ds);
        plain_matmul<W, R>(dq, shares, k);
    }
    plain_store<N, W, R>(head_of_qkv(dqkv, p, 0, T, C, HS), i0, dq, factor);
}

template <class N, int W>
static __global__ void __launch_bounds__(PLAIN_THREADS, 1)
attention_backward_keys_plain(N *dqkv, const N *dy, const N *qkv, const float *lse,
                              const float *inner, KeptKeys keep, int T, int C, int NH,
                              float scale) {
    BOUNDS(PLAIN_THREADS);
    constexpr int ROWS = Plain<W>::ROWS, R = Plain<W>::R;
    SHARED(float, k);                                    // k, v, q and dy, then the shared scores
    float *const v = k + Plain<W>::TILE, *const q = v + Plain<W>::TILE,
        *const g = q + Plain<W>::TILE;
    float *const shares = g + Plain<W>::TILE;
    const int blocks = blocks_of(T, ROWS), HS = C / NH, row = (int)threadIdx.x / 16,
        column = (int)threadIdx.x % 16;
    const AttentionPlace p = attention_place((int)blockIdx.x, blocks, NH);
    const int j0 = p.block * ROWS;
    const float kept = kept_scale(keep);
    float dk[R][W / 64][4] = {}, dv[R][W / 64][4] = {}, factor[R], one[R];
    UNROLL for (int r = 0; r < R; r++) factor[r] = scale, one[r] = 1;
    lse += head_tokens(p, NH, T), inner += head_tokens(p, NH, T);
    plain_load<N, W>(k, head_of_qkv(qkv, p, 1, T, C, HS), j0);
    plain_load<N, W>(v, head_of_qkv(qkv, p, 2, T, C, HS), j0);
    for (int i0 = j0; i0 < T; i0 += ROWS) {
        float s[R][R], ds[R][R];
        plain_scores_twice<N, W, R>(s, ds, k, head_of_qkv(qkv, p, 0, T, C, HS),
                                    head_of_y(dy, p, T, C, HS), i0);
        UNROLL for (int c = 0; c < R; c++) {
            const int i = i0 + column + 16 * c;
            const float lse_of = i < T ? lse[i] : 0, inner_of = i < T ? inner[i] : 0;
            UNROLL for (int r = 0; r < R; r++) {
                const bool seen = i < T && j0 + row + 16 * r <= i;
                const float left = keep.words
                    ? kept_factor(keep, head_tokens(p, NH, T), i, j0 + row + 16 * r, T, kept) : 1;
                const float probability = seen ? expf(s[r][c] * scale - lse_of) : 0;
                s[r][c] = probability * left;
                ds[r][c] = probability * (ds[r][c] * left - inner_of);
            }
        }
        plain_share<W, R>(shares, s);
        plain_matmul<W, R>(dv, shares, g);
        plain_share<W, R>(shares, ds);
        plain_matmul<W, R>(dk, shares, q);
    }
    plain_store<N, W, R>(head_of_qkv(dqkv, p, 1, T, C, HS), j0, dk, factor);
    plain_store<N, W, R>(head_of_qkv(dqkv, p, 2, T, C, HS), j0, dv, one);
}

// ---- Attention: which kernel for which heads ----

// The shapes of one pass: kernels are launched for n NH heads, in blocks of `rows`.
typedef struct { size_t n, T, C, NH; cudaStream_t stream; KeptKeys keep; } AttentionShape;

static unsigned attention_grid(const AttentionShape *a, size_t rows) {
    const size_t blocks = a->n * a->NH * ((a->T + rows - 1) / rows);
    CHECK(blocks <= INT_MAX, "%zu rows of %zu tokens and %zu heads in one launch", a->n, a->T,
          a->NH);
    return (unsigned)blocks;
}

static float attention_scale(const AttentionShape *a) {
    return (float)(1 / sqrt((double)(a->C / a->NH)));
}

template <int W, int M, int N, bool KEPT, bool DROPS>
static void attention_forward_mma(void *y, float *lse, const void *qkv, const AttentionShape *a) {
    constexpr size_t rows = 16 * M * ATTENTION_WARPS,
        shared = (rows + 4 * 8 * N) * W * sizeof(bf16);
    LAUNCH((attention_forward_kernel<W, M, N, KEPT, DROPS>), attention_grid(a, rows),
           ATTENTION_THREADS, shared, a->stream, (bf16 *)y, lse, (const bf16 *)qkv, a->keep,
           (int)a->T, (int)a->C, (int)a->NH, attention_scale(a));
}

template <int W, int M, int N, bool KEPT, bool DROPS>
static void attention_backward_queries_mma(void *dqkv, const void *dy, const void *qkv,
                                           const float *lse, const float *inner,
                                           const AttentionShape *a) {
    constexpr size_t rows = 16 * M * ATTENTION_WARPS,
        shared = (2 * rows + 4 * 8 * N) * W * sizeof(bf16);
    LAUNCH((attention_backward_queries_kernel<W, M, N, KEPT, DROPS>), attention_grid(a, rows),
           ATTENTION_THREADS, shared, a->stream, (bf16 *)dqkv, (const bf16 *)dy, (const bf16 *)qkv,
           lse, inner, a->keep, (int)a->T, (int)a->C, (int)a->NH, attention_scale(a));
}

template <int W, int M, int N, bool KEPT, bool DROPS>
static void attention_backward_keys_mma(void *dqkv, const void *dy, const void *qkv,
                                        const float *lse, const float *inner,
                                        const AttentionShape *a) {
    constexpr size_t rows = 16 * M * ATTENTION_WARPS;
    constexpr size_t shared = (2 * rows + 4 * 8 * N) * W * sizeof(bf16) +
        4 * 8 * N * sizeof(float);
    LAUNCH((attention_backward_keys_kernel<W, M, N, KEPT, DROPS>), attention_grid(a, rows),
           ATTENTION_THREADS, shared, a->stream, (bf16 *)dqkv, (const bf16 *)dy, (const bf16 *)qkv,
           lse, inner, a->keep, (int)a->T, (int)a->C, (int)a->NH, attention_scale(a));
}

template <class N, int W>
static void attention_forward_plain_launch(void *y, float *lse, const void *qkv,
                                           const AttentionShape *a) {
    const size_t shared = (3 * Plain<W>::TILE + Plain<W>::P_TILE) * sizeof(float);
    LAUNCH((attention_forward_plain<N, W>), attention_grid(a, Plain<W>::ROWS), PLAIN_THREADS,
           shared, a->stream, (N *)y, lse, (const N *)qkv, a->keep, (int)a->T, (int)a->C,
           (int)a->NH, attention_scale(a));
}

template <class N, int W>
static void attention_backward_plain_launch(void *dqkv, const void *dy, const void *qkv,
                                            const float *lse, const float *inner,
                                            const AttentionShape *a) {
    const size_t shared = (4 * Plain<W>::TILE + Plain<W>::P_TILE) * sizeof(float);
    const unsigned grid = attention_grid(a, Plain<W>::ROWS);
    LAUNCH((attention_backward_keys_plain<N, W>), grid, PLAIN_THREADS, shared, a->stream, (N *)dqkv,
           (const N *)dy, (const N *)qkv, lse, inner, a->keep, (int)a->T, (int)a->C, (int)a->NH,
           attention_scale(a));
    LAUNCH((attention_backward_queries_plain<N, W>), grid, PLAIN_THREADS, shared, a->stream,
           (N *)dqkv, (const N *)dy, (const N *)qkv, lse, inner, a->keep, (int)a->T, (int)a->C,
           (int)a->NH, attention_scale(a));
}

template <class N>
static void attention_forward_plainly(void *y, float *lse, const void *qkv,
                                      const AttentionShape *a) {
    const size_t HS = a->C / a->NH;
    if (HS <= 64) attention_forward_plain_launch<N, 64>(y, lse, qkv, a);
    else if (HS <= 128) attention_forward_plain_launch<N, 128>(y, lse, qkv, a);
    else attention_forward_plain_launch<N, 256>(y, lse, qkv, a);
}

template <class N>
static void attention_backward_plainly(void *dqkv, const void *dy, const void *qkv,
                                       const float *lse, const float *inner,
                                       const AttentionShape *a) {
    const size_t HS = a->C / a->NH;
    if (HS <= 64) attention_backward_plain_launch<N, 64>(dqkv, dy, qkv, lse, inner, a);
    else if (HS <= 128) attention_backward_plain_launch<N, 128>(dqkv, dy, qkv, lse, inner, a);
    else attention_backward_plain_launch<N, 256>(dqkv, dy, qkv, lse, inner, a);
}

template <class N>
static void attention_inner(float *inner, const void *dy, const void *y, const AttentionShape *a) {
    constexpr int SIZE = 16 / sizeof(N);
    const size_t heads = a->n * a->T * a->NH, HS = a->C / a->NH, whole = HS % SIZE == 0;
    size_t lanes = 1;
    while (lanes < 32 && lanes * (whole ? SIZE : 1) < HS) lanes *= 2;
    const size_t blocks = (heads * lanes + 255) / 256;
    CHECK(heads <= INT_MAX, "%zu heads in one launch", heads);
    if (whole)
        LAUNCH((attention_inner_kernel<N, SIZE>), (unsigned)blocks, 256, 0, a->stream, inner,
               (const N *)dy, (const N *)y, (unsigned)heads, (unsigned)a->T, (unsigned)a->C,
               (unsigned)a->NH, (unsigned)lanes);
    else
        LAUNCH((attention_inner_kernel<N, 1>), (unsigned)blocks, 256, 0, a->stream, inner,
               (const N *)dy, (const N *)y, (unsigned)heads, (unsigned)a->T, (unsigned)a->C,
               (unsigned)a->NH, (unsigned)lanes);
}

// The tensor-core kernels for the heads that they support; false: there are none.
template <bool DROPS> static bool attention_forward_fast(void *y, float *lse, const void *qkv,
                                                         const AttentionShape *a) {
    const size_t HS = a->C / a->NH;
    if (HS % 8 || HS > 128) return false;
    // registers for the bits
    if (HS <= 64) attention_forward_mma<64, 2, DROPS ? 4 : 8, true, DROPS>(y, lse, qkv, a);
    else attention_forward_mma<128, 1, 8, true, DROPS>(y, lse, qkv, a);
    return true;
}

template <bool DROPS>
static bool attention_backward_fast(void *dqkv, const void *dy, const void *qkv, const float *lse,
                                    const float *inner, const AttentionShape *a) {
    const size_t HS = a->C / a->NH;
    if (HS % 8 || HS > 128) return false;
    if (HS <= 64) {
        attention_backward_keys_mma<64, 1, 8, true, DROPS>(dqkv, dy, qkv, lse, inner, a);
        attention_backward_queries_mma<64, 2, 4, true, DROPS>(dqkv, dy, qkv, lse, inner, a);
    } else {
        attention_backward_keys_mma<128, 1, 2, false, DROPS>(dqkv, dy, qkv, lse, inner, a);
        attention_backward_queries_mma<128, 1, 4, true, DROPS>(dqkv, dy, qkv, lse, inner, a);
    }
    return true;
}

// All pointers are 16-byte aligned; with in_bf16, qkv, y, dy and dqkv are bf16, else fp32. keep
// NULL: no dropout.
static void attention_forward(void *y, float *lse, const void *qkv, const KeptKeys *keep, size_t n,
                              size_t T, size_t C, size_t NH, int in_bf16, cudaStream_t stream) {
    const KeptKeys all = {NULL, NULL, 0};
    const AttentionShape a = {n, T, C, NH, stream, keep ? *keep : all};
    CHECK(C / NH <= ATTENTION_WIDEST, "heads of %zu channels", C / NH);
    if (n == 0) return;
    if (in_bf16 &&
        (keep ? attention_forward_fast<true>(y, lse, qkv, &a)
              : attention_forward_fast<false>(y, lse, qkv, &a)))
        return;
    if (in_bf16) attention_forward_plainly<bf16>(y, lse, qkv, &a);
    else attention_forward_plainly<float>(y, lse, qkv, &a);
}

// dqkv (n,T,3C) from dy (n,T,C); y and lse are attention_forward's. inner (n,NH,T) is workspace for
// <dy, y>.
static void attention_backward(void *dqkv, float *inner, const void *dy, const void *qkv,
                               const void *y, const float *lse, const KeptKeys *keep, size_t n,
                               size_t T, size_t C, size_t NH, int in_bf16, cudaStream_t stream) {
    const KeptKeys all = {NULL, NULL, 0};
    const AttentionShape a = {n, T, C, NH, stream, keep ? *keep : all};
    CHECK(C / NH <= ATTENTION_WIDEST, "heads of %zu channels", C / NH);
    if (n == 0) return;
    if (in_bf16) attention_inner<bf16>(inner, dy, y, &a);
    else attention_inner<float>(inner, dy, y, &a);
    if (in_bf16 && (keep ? attention_backward_fast<true>(dqkv, dy, qkv, lse, inner, &a)
                         : attention_backward_fast<false>(dqkv, dy, qkv, lse, inner, &a))) return;
    if (in_bf16) attention_backward_plainly<bf16>(dqkv, dy, qkv, lse, inner, &a);
    else attention_backward_plainly<float>(dqkv, dy, qkv, lse, inner, &a);
}

// ---- Attention with whole rows of scores, for what edits or reads them ----

#include "dev/cuda/attention_rows.h"
#include "dev/cuda/align.h"
#include "dev/cuda/entropy.h"

// ---- Attention over cached keys and values: one query at a time ----
//
// The cache of a layer is (sequences,2,T,C): the keys of a sequence, then its values. Packed row i
// of qkv and y is that of the row with place i; `seq` and `at` (B) give the sequence that a row
// continues, and the position.

typedef struct { void *at; size_t T; } Cache;

// Stores k and v of qkv (n,T,3C) in the cache. A block processes one token of a row.
template <class N, int W>
static __global__ void cache_append_kernel(void *cache, const void *qkv, const int *place,
                                           const int *seq, const int *at, size_t T, size_t T_cache,
                                           size_t C) {
    const unsigned row = blockIdx.x / (unsigned)T, t = blockIdx.x % (unsigned)T;
    const long slot = row_place(place, row);
    if (slot < 0) return;
    const size_t from = ((size_t)slot * T + t) * 3 * C + C,
        to = (size_t)seq[row] * 2 * T_cache + (size_t)at[row] + t;
    for (size_t c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        store<N, W>(cache, to * C + c, load<N, W>(qkv, from + c));
        store<N, W>(cache, (to + T_cache) * C + c, load<N, W>(qkv, from + C + c));
    }
}

// per block, which processes as many keys at a time
enum { QUERY_THREADS = 128 };

// y (n,T,C) for the queries of qkv: a block processes one head of one token, each thread one key;
// then the threads divide the channels, `parts` of them the keys of a channel.
template <class N>
static __global__ void attention_query_kernel(N *y, const N *qkv, const N *cache, const int *place,
                                              const int *seq, const int *at, int T, int T_cache,
                                              int C, int NH, float scale) {
    SHARED(float, q);                                    // (HS)
    const int HS = C / NH, h = (int)blockIdx.x % NH, t = (int)blockIdx.x / NH % T,
        row = (int)blockIdx.x / NH / T;
    const int width = (HS + WARP - 1) / WARP * WARP;     // threads per part
    const int parts = width < QUERY_THREADS ? QUERY_THREADS / width : 1;
    const int part = (int)threadIdx.x / width, first = (int)threadIdx.x % width;
    // (QUERY_THREADS) (WARP) (parts,HS)
    float *const p = q + width, *const work = p + QUERY_THREADS, *const joined = work + WARP;
    const long slot = row_place(place, (size_t)row);
    if (slot < 0) return;
    const size_t from = ((size_t)slot * T + t) * 3 * C + h * HS;
    const N *const keys = cache + ((size_t)seq[row] * 2 * T_cache) * C + h * HS,
        *const values = keys + (size_t)T_cache * C;
    const int seen = at[row] + t + 1;
    // for channels `first` and first + QUERY_THREADS
    float top = -INFINITY, sum = 0, out[2] = {0, 0};
    for (int d = (int)threadIdx.x; d < HS; d += QUERY_THREADS)
        q[d] = scale * to_float(qkv[from + d]);
    __syncthreads();
    for (int j0 = 0; j0 < seen; j0 += QUERY_THREADS) {
        const int j = j0 + (int)threadIdx.x,
            n = seen - j0 < QUERY_THREADS ? seen - j0 : QUERY_THREADS;
        float s = -INFINITY;
        if (j < seen) {
            s = 0;
            for (int d = 0; d < HS; d++) s += q[d] * to_float(keys[(size_t)j * C + d]);
        }
        const float high = fmaxf(top, block_max(s, work)), shrink = expf(top - high);
        p[threadIdx.x] = expf(s - high);
        sum = sum * shrink + block_sum(p[threadIdx.x], work);        // makes p visible to all
        for (int e = 0; e < 2; e++) {
            const int d = first + e * QUERY_THREADS;
            out[e] *= shrink;
            for (int i = part; d < HS && part < parts && i < n; i += parts)
                out[e] += p[i] * to_float(values[(size_t)(j0 + i) * C + d]);
        }
        top = high;
        __syncthreads();                                 // all are done with p
    }
    for (int e = 0; e < 2; e++)
        if (part < parts && first + e * QUERY_THREADS < HS)
            joined[part * HS + first + e * QUERY_THREADS] = out[e];
    __syncthreads();
    for (int d = (int)threadIdx.x; d < HS; d += QUERY_THREADS) {
        float total = 0;
        for (int i = 0; i < parts; i++) total += joined[i * HS + d];
        y[((size_t)slot * T + t) * C + h * HS + d] = from_float<N>(total / sum);
    }
}

// Without y, keys and values are only cached. B: the number of rows of the call, in `place` or not.
static void attention_cached(const Gpu *g, void *y, const void *qkv, Cache cache, const int *place,
                             const int *seq, const int *at, size_t B, size_t T, size_t C,
                             size_t NH) {
    const size_t HS = C / NH, blocks = B * T * NH;
    const size_t shared = (round_up(HS, WARP) + QUERY_THREADS + WARP + QUERY_THREADS + HS) *
        sizeof(float);
    const float scale = (float)(1 / sqrt((double)HS));
    CHECK(blocks <= INT_MAX, "%zu rows of %zu tokens and %zu heads in one launch", B, T, NH);
    LAUNCH_AS(cache_append_kernel, g, C % WIDE == 0, (unsigned)(B * T), threads_for(C), 0, cache.at,
              qkv, place, seq, at, T, cache.T, C);
    if (!y) return;
    if (g->half)
        LAUNCH(attention_query_kernel<bf16>, (unsigned)blocks, QUERY_THREADS, shared, g->stream,
               (bf16 *)y, (const bf16 *)qkv, (const bf16 *)cache.at, place, seq, at, (int)T,
               (int)cache.T, (int)C, (int)NH, scale);
    else
        LAUNCH(attention_query_kernel<float>, (unsigned)blocks, QUERY_THREADS, shared, g->stream,
               (float *)y, (const float *)qkv, (const float *)cache.at, place, seq, at, (int)T,
               (int)cache.T, (int)C, (int)NH, scale);
}

// ---- Classifier and loss: x (BT,C) against wte (Vp,C), a chunk of rows at a time ----
//
// Logits and probabilities of the whole batch never exist. With weight 0 only the losses are
// computed; otherwise a chunk of logits becomes its gradient in place and is immediately propagated
// to dx and dwte.

#ifndef LOGITS_BYTES
#define LOGITS_BYTES (512 << 20)  // per chunk: each one reads and writes dwte again
#endif
// chunks begin at whole memory lines and fill tiles
enum { CHUNK_UNIT = 128, V_UNIT = 128 };

static inline size_t padded_vocabulary(size_t V) { return round_up(V, V_UNIT); }

// Rows per chunk; chunks are nearly equal.
static size_t classifier_chunk(size_t BT, size_t V, size_t number) {
    const size_t most = at_most(LOGITS_BYTES, SIZE_MAX) / (padded_vocabulary(V) * number);
    return round_up(strips(BT, strips(BT, most > CHUNK_UNIT ? most : (size_t)CHUNK_UNIT)),
                    CHUNK_UNIT);
}

// e^x of x <= 0, as accurately as the storage N requires.
template <class N> static __device__ inline float exp_stored(float x);
template <> __device__ inline float exp_stored<float>(float x) { return expf(x); }
template <> __device__ inline float exp_stored<bf16>(float x) { return exp2_fast(x * 1.44269504f); }

// A thread's maximum logit so far and its sum of e^(logit - top); adds `count` of z's W elements.
template <class N, int W>
static __device__ inline void softmax_join(float *top, float *sum, Floats<W> z, unsigned count) {
    float high = *top;
    UNROLL for (unsigned k = 0; k < W; k++) high = fmaxf(high, k < count ? z.x[k] : -INFINITY);
    if (high > *top) *sum *= exp_stored<N>(*top - high), *top = high;
    UNROLL for (unsigned k = 0; k < W; k++) *sum += k < count ? exp_stored<N>(z.x[k] - *top) : 0;
}

enum { SOFTMAX_THREADS = 512 };

// A block processes one row: its loss = -log softmax(logits)[target], 0 for a negative target; with
// grad != 0, logits (Vp) become grad * (softmax - onehot), 0 from V on. The few elements after the
// last multiple of W are processed one by one. SMOOTHS: the target's 1 becomes 1-s, plus s/V
// everywhere, and *uniform the mean of -log softmax, which then has weight s.
template <class N, bool SMOOTHS>
static __global__ void __launch_bounds__(SOFTMAX_THREADS)
softmax_loss_kernel(float *losses, float *uniform, void *logits, const int *targets, float grad,
                    float smoothing, unsigned V, unsigned Vp) {
    BOUNDS(SOFTMAX_THREADS);
    constexpr unsigned W = 16 / sizeof(N);
    SHARED(float, shared);                               // (2 * 32)
    N *const row = (N *)logits + (size_t)blockIdx.x * Vp;
    const unsigned first = threadIdx.x * W, step = blockDim.x * W, whole = V / W * W;
    const int target = targets[blockIdx.x];
    const float at_target = target < 0 ? 0 : to_float(row[target]);
    float top = -INFINITY, sum = 0;
    for (unsigned v = first; v < whole; v += step)
        softmax_join<N, W>(&top, &sum, load<N, W>(row, v), W);
    if (first == 0 && whole < V) softmax_join<N, W>(&top, &sum, load<N, W>(row, whole), V - whole);
    const float highest = block_max(top, shared);
    // sum 0: this thread had no elements
    sum = block_sum(sum == 0 ? 0 : sum * exp_stored<N>(top - highest), shared + WARP);
    if (threadIdx.x == 0) losses[blockIdx.x] = target < 0 ? 0 : logf(sum) - (at_target - highest);
    if (SMOOTHS) {
        float all = 0;
        for (unsigned v = first; v < V; v += step)
            UNROLL for (unsigned k = 0; k < W; k++) all += v + k < V ? to_float(row[v + k]) : 0;
        __syncthreads();
        all = block_sum(all, shared);
        if (threadIdx.x == 0)
            uniform[blockIdx.x] = target < 0 ? 0 : logf(sum) - (all / (float)V - highest);
    }
    if (grad == 0) return;
    const float scale = grad / sum, one = SMOOTHS ? grad * (1 - smoothing) : grad,
        share = grad * smoothing / (float)V;
    for (unsigned v = first; v < Vp; v += step) {
        Floats<W> z = {};
        if (target >= 0 && v < V) {
            z = load<N, W>(row, v);
            UNROLL for (unsigned k = 0; k < W; k++)
                z.x[k] = exp_stored<N>(z.x[k] - highest) * scale;
            if (SMOOTHS) UNROLL for (unsigned k = 0; k < W; k++) z.x[k] -= share;
            if (v >= whole) UNROLL for (unsigned k = 0; k < W; k++) z.x[k] = v + k < V ? z.x[k] : 0;
            if ((unsigned)target - v < W)
                UNROLL for (unsigned k = 0; k < W; k++)
                    z.x[k] -= v + k == (unsigned)target ? one : 0;
        }
        store<N, W>(row, v, z);
    }
}

// A block processes one token: *distilled = t^2 KL(p || q) with p = softmax(teacher / t), q =
// softmax(student / t), 0 for a negative target; teacher (Vp) becomes rate * (q - p), 0 from V on
// (dev/model/distill.h).
template <class N>
static __global__ void __launch_bounds__(SOFTMAX_THREADS)
distill_kernel(float *distilled, void *teacher, const void *student, const int *targets, float rate,
               float temperature, unsigned V, unsigned Vp) {
    BOUNDS(SOFTMAX_THREADS);
    constexpr unsigned W = 16 / sizeof(N);
    SHARED(float, shared);                               // (2 * 32)
    N *const soft = (N *)teacher + (size_t)blockIdx.x * Vp;
    const N *const row = (const N *)student + (size_t)blockIdx.x * Vp;
    const unsigned first = threadIdx.x * W, step = blockDim.x * W;
    const float cool = 1 / temperature;
    const bool scored = targets[blockIdx.x] >= 0;
    float top[2], sum[2], kl = 0;
    UNROLL for (int side = 0; side < 2; side++) {
        float high = -INFINITY, total = 0;
        for (unsigned v = first; v < V; v += step) {
            Floats<W> z = load<N, W>(side ? row : soft, v);
            UNROLL for (unsigned k = 0; k < W; k++) z.x[k] *= cool;
            softmax_join<N, W>(&high, &total, z, V - v < W ? V - v : W);
        }
        top[side] = block_max(high, shared);
        // total 0: this thread had no elements
        sum[side] = block_sum(total == 0 ? 0 : total * exp_stored<N>(high - top[side]),
                              shared + WARP);
        __syncthreads();
    }
    const float apart = logf(sum[0]) - logf(sum[1]), p_share = 1 / sum[0], q_share = 1 / sum[1];
    for (unsigned v = first; v < Vp; v += step) {
        Floats<W> g = {};
        if (v < V) {
            const Floats<W> a = load<N, W>(soft, v), b = load<N, W>(row, v);
            UNROLL for (unsigned k = 0; k < W; k++) {
                const float x = a.x[k] * cool - top[0], y = b.x[k] * cool - top[1];
                const float p = exp_stored<N>(x) * p_share, q = exp_stored<N>(y) * q_share;
                const bool in = scored && v + k < V;
                kl += in && p > 0 ? p * (x - y - apart) : 0;
                g.x[k] = in ? rate * (q - p) : 0;
            }
        }
        store<N, W>(soft, v, g);
    }
    kl = block_sum(kl, shared);
    if (threadIdx.x == 0) distilled[blockIdx.x] = scored ? kl * temperature * temperature : 0;
}

// logits (n) = keep * logits + soft.
template <class N, int W>
static __global__ void soft_add_kernel(void *logits, const void *soft, float keep, size_t n) {
    const size_t i = thread_index() * W;
    if (i >= n) return;
    Floats<W> z = load<N, W>(soft, i);
    const Floats<W> hard = load<N, W>(logits, i);
    UNROLL for (int k = 0; k < W; k++) z.x[k] += keep != 0 ? hard.x[k] : 0;
    store<N, W>(logits, i, z);
}

// A teacher's last run: features x (BT,C) and the head's wte (Vp,C), with its workspace for a chunk
// of logits (chunk,Vp). weight: that of a token's term; x NULL: none.
typedef struct {
    const void *x, *wte;
    void *logits;
    size_t C;
    float weight, temperature;
} Soft;

// Pairs of tokens that are twins: x (chunk,C) and d (chunk,Vp) are workspace; weight: that of a
// pair's divergence. on 0: none.
typedef struct { void *x, *d; float weight; int on, symmetric; } Pairs;

// Arguments of the head: losses (BT) of targets (BT), 0 for negative ones; grad: the weight of one
// token's loss, 0: no gradients; uniform (BT): as in softmax_loss_kernel, if smoothing is not 0;
// soft: a teacher, and distilled (BT) its terms; pairs: tokens t and t + BT/2 are twins, apart (BT)
// their divergence.
typedef struct {
    float *losses, *uniform, *distilled, *apart;
    const int *targets;
    float grad, smoothing;
    Soft soft;
    Pairs pairs;
} Scoring;

// n rows of logits from row t0 of the batch on.
template <class N> static void softmax_loss(const Gpu *g, const Scoring *y, void *logits, size_t t0,
                                            size_t n, size_t V) {
    const size_t Vp = padded_vocabulary(V), shared = 2 * WARP * sizeof(float);
    const int threads = Vp <= 1024 ? 128 : SOFTMAX_THREADS;
    const Soft *s = &y->soft;
    if (s->x)
        LAUNCH(distill_kernel<N>, (unsigned)n, threads, shared, g->stream, y->distilled + t0,
               s->logits, (const void *)logits, y->targets + t0, s->weight * s->temperature,
               s->temperature, (unsigned)V, (unsigned)Vp);
    if (y->smoothing != 0)
        LAUNCH((softmax_loss_kernel<N, true>), (unsigned)n, threads, shared, g->stream,
               y->losses + t0, y->uniform + t0, logits, y->targets + t0, y->grad, y->smoothing,
               (unsigned)V, (unsigned)Vp);
    else
        LAUNCH((softmax_loss_kernel<N, false>), (unsigned)n, threads, shared, g->stream,
               y->losses + t0, (float *)NULL, logits, y->targets + t0, y->grad, 0.f, (unsigned)V,
               (unsigned)Vp);
    if (s->weight != 0)
        LAUNCH((soft_add_kernel<N, 16 / sizeof(N)>), blocks_for(n * Vp / (16 / sizeof(N))), BLOCK,
               0, g->stream, logits, (const void *)s->logits, y->grad, n * Vp);
}

#include "dev/cuda/twins.h"

// Computes them and, with grad, dx (BT,C) = and dwte (Vp,C) =, or += with `add`. logits (chunk,Vp)
// is workspace.
static void classifier(Gpu *g, const Scoring *y, void *dx, float *dwte, int add, void *logits,
                       const void *x, const void *wte, size_t BT, size_t C, size_t V) {
    const size_t number = size_of_number(g), chunk = classifier_chunk(BT, V, number),
        Vp = padded_vocabulary(V);
    const Soft *s = &y->soft;
    if (y->pairs.on) {
        classifier_twins(g, y, dx, dwte, add, logits, x, wte, BT, C, V);
        return;
    }
    for (size_t t0 = 0; t0 < BT; t0 += chunk) {
        const size_t n = at_most(BT - t0, chunk);
        const void *from = (const char *)x + t0 * C * number;
        multiply(g, fresh(logits, Vp, NULL), matrix(from, C), transposed(wte, C), n, Vp, C);
        if (s->x)
            multiply(g, fresh(s->logits, Vp, NULL),
                     matrix((const char *)s->x + t0 * s->C * number, s->C),
                     transposed(s->wte, s->C), n, Vp, s->C);
        if (g->half) softmax_loss<bf16>(g, y, logits, t0, n, V);
        else softmax_loss<float>(g, y, logits, t0, n, V);
        if (y->grad == 0 && s->weight == 0) continue;
        multiply(g, fresh((char *)dx + t0 * C * number, C, NULL), matrix(logits, Vp),
                 matrix(wte, C), n, C, Vp);
        if (dwte)
            multiply(g, summed(dwte, C, add || t0), transposed(logits, Vp), matrix(from, C), Vp, C,
                     n);
    }
}

// logits (rows,V) = x wte^T of single tokens, for sampling: x (rows,C) has rows `ld` apart, wte
// (V,C). A warp computes one element.
template <class N, int W>
static __global__ void logits_kernel(float *logits, const void *x, size_t ld, const void *wte,
                                     size_t V, size_t C) {
    const size_t v = thread_index() / WARP, lane = threadIdx.x % WARP, from = blockIdx.y * ld;
    float sum = 0;
    if (v >= V) return;
    for (size_t c = lane * W; c < C; c += WARP * W) {
        const Floats<W> a = load<N, W>(x, from + c), b = load<N, W>(wte, v * C + c);
        for (int k = 0; k < W; k++) sum += a.x[k] * b.x[k];
    }
    sum = warp_sum(sum);
    if (lane == 0) logits[blockIdx.y * V + v] = sum;
}

// ---- Ranks: reductions over the processes of a run, by NCCL, on a separate stream ----
//
// All ranks make the same calls in the same order. What a call reads must be complete on the main
// stream when ranks_begin is called; after ranks_end, that stream waits for what the calls write.

typedef struct {
    int rank, world;
    int shares;         // world, if each rank keeps only its share of the optimizer state; else 1
    cudaStream_t stream;
    cudaEvent_t event;
#ifndef NO_NCCL
    ncclComm_t nccl;
#endif
} Ranks;

static void ranks_begin(const Ranks *r, const Gpu *g) {
    CUDA_CHECK(cudaEventRecord(r->event, g->stream));
    CUDA_CHECK(cudaStreamWaitEvent(r->stream, r->event, 0));
}

static void ranks_end(const Ranks *r, const Gpu *g) {
    CUDA_CHECK(cudaEventRecord(r->event, r->stream));
    CUDA_CHECK(cudaStreamWaitEvent(g->stream, r->event, 0));
}

#ifdef NO_NCCL
static void ranks_start(Ranks *, const Comm *) {
    die("this program was built without NCCL: it runs on one GPU\n  hint: install NCCL "
        "(libnccl-dev) and build again");
}
static void ranks_stop(Ranks *) {}
static void ranks_abort(const Ranks *) {}
static const char *ranks_error(const Ranks *) { return NULL; }
static void ranks_sum(const Ranks *, void *, size_t, int) {}
static void ranks_sum_double(const Ranks *, double *) {}
static void ranks_gather(const Ranks *, void *, size_t, int) {}
static void ranks_send(const Ranks *, float *, const float *, size_t, int) {}
#else
static void ranks_start(Ranks *r, const Comm *comm) {
    ncclUniqueId id;
    if (r->rank == 0) NCCL_CHECK(ncclGetUniqueId(&id));
    comm_broadcast(comm, &id, sizeof id);
    NCCL_CHECK(ncclCommInitRank(&r->nccl, r->world, id, r->rank));
}

static void ranks_stop(Ranks *r) { NCCL_CHECK(ncclCommDestroy(r->nccl)); }
static void ranks_abort(const Ranks *r) { ncclCommAbort(r->nccl); }

// Any error since ranks_start, or NULL.
static const char *ranks_error(const Ranks *r) {
    ncclResult_t error;
    NCCL_CHECK(ncclCommGetAsyncError(r->nccl, &error));
    return error == ncclSuccess || error == ncclInProgress ? NULL : ncclGetErrorString(error);
}

// x (n), of bf16 or float, becomes the sum over all ranks; with shares, only this rank's share of
// it does.
static void ranks_sum(const Ranks *r, void *x, size_t n, int half) {
    const ncclDataType_t type = half ? ncclBfloat16 : ncclFloat32;
    const size_t share = n / (size_t)r->shares,
        bytes = share * (half ? sizeof(bf16) : sizeof(float));
    if (r->shares == 1) NCCL_CHECK(ncclAllReduce(x, x, n, type, ncclSum, r->nccl, r->stream));
    else
        NCCL_CHECK(ncclReduceScatter(x, (char *)x + (size_t)r->rank * bytes, share, type, ncclSum,
                                     r->nccl, r->stream));
}

static void ranks_sum_double(const Ranks *r, double *x) {
    NCCL_CHECK(ncclAllReduce(x, x, 1, ncclFloat64, ncclSum, r->nccl, r->stream));
}

// Gathers x (n), of bf16 or float, from the ranks' shares.
static void ranks_gather(const Ranks *r, void *x, size_t n, int half) {
    const size_t share = n / (size_t)r->world,
        bytes = share * (half ? sizeof(bf16) : sizeof(float));
    NCCL_CHECK(ncclAllGather((char *)x + (size_t)r->rank * bytes, x, share,
                             half ? ncclBfloat16 : ncclFloat32, r->nccl, r->stream));
}

// to (n) = rank `root`'s from (n).
static void ranks_send(const Ranks *r, float *to, const float *from, size_t n, int root) {
    NCCL_CHECK(ncclBroadcast(r->rank == root ? from : to, to, n, ncclFloat32, root, r->nccl,
                             r->stream));
}
#endif

static void ranks_open(Ranks *r, const EngineArgs *args) {
    r->rank = args->comm ? args->comm->rank : 0;
    r->world = args->comm ? args->comm->world : 1;
    r->shares = args->zero ? r->world : 1;
    if (r->world == 1) return;
    CUDA_CHECK(cudaStreamCreateWithFlags(&r->stream, cudaStreamNonBlocking));
    CUDA_CHECK(cudaEventCreateWithFlags(&r->event, cudaEventDisableTiming));
    ranks_start(r, args->comm);
}

static void ranks_close(Ranks *r) {
    if (r->world == 1) return;
    CUDA_CHECK(cudaStreamSynchronize(r->stream));
    ranks_stop(r);
    CUDA_CHECK(cudaEventDestroy(r->event));
    CUDA_CHECK(cudaStreamDestroy(r->stream));
}

// Waits for the main stream while watching for a rank that has died: then the preceding work never
// ends, or has no result.
static void ranks_wait(const Ranks *r, const Gpu *g) {
    const char *wrong = NULL;
    for (cudaError_t e = cudaErrorNotReady; r->world > 1 && e == cudaErrorNotReady && !wrong;) {
        e = cudaStreamQuery(g->stream);
        if (e != cudaSuccess && e != cudaErrorNotReady) CUDA_CHECK(e);
        wrong = ranks_error(r);
    }
    if (wrong) {
        // if a rank has died, comm.h's thread knows which, and ends this process
        sleep(2);
        // a kernel that waits forever would block the exit
        ranks_abort(r);
        die("rank %d of %d: NCCL: %s\n  hint: NCCL_DEBUG=WARN tells more", r->rank, r->world,
            wrong);
    }
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
}

static __global__ void round_kernel(bf16 *to, const float *from, size_t n) {
    const size_t i = thread_index();
    if (i < n) to[i] = from_float<bf16>(from[i]);
}

static __global__ void widen_kernel(float *to, const bf16 *from, size_t n) {
    const size_t i = thread_index();
    if (i < n) to[i] = to_float(from[i]);
}

// ---- Graphs: a branch's launches, recorded and then launched at once (--graphs 1) ----
//
// A branch's launches are a function of this key: the sizes and addresses passed to its kernels.
// Everything else that changes from step to step (rows, scales, values) is read from memory that
// does not move. A key is recorded when it occurs for the second time, when all matmuls have their
// algorithms; the most recently used graphs of each branch and direction are kept.

typedef struct {
    const void *saved;  // where the branch saves what backward needs
    // n: rows it runs; before: the branch that ran before it, or -1, with before_n rows
    int B, T, n, add, tied, noise, before, before_n;
} GraphKey;
// used: the number of its last call; 0: free
typedef struct { GraphKey key; cudaGraphExec_t exec; uint64_t used; } Graph;
#ifndef GRAPHS
#define GRAPHS 32                                        // per branch and direction
#endif

// ---- The model: its memory ----

enum { UPDATE_CHUNK = 1 << 14 };
// A piece of one tensor (param | layer << 8), n elements from `element` on: its offsets among all
// parameters, in p, in the gradients, and in m and v; branch: index in UpdateArgs.t.
typedef struct {
    size_t at, master, grad, moment, n, element, branch;
    uint32_t tensor;
    int decay;
} UpdateChunk;
// of one branch in one update; t as in UpdateArgs
typedef struct { float rate, unbias; int64_t t; int spent; } BranchUpdate;

// What forward saves for backward; rstd and lse are float, everything else N. What a model
// recomputes is not saved but is in workspace that all branches share: ln and gelu, or
// (RECOMPUTE_BRANCH) all but xhat and rstd.
// (n,T,C) (n,T) (n,T,C) (n,T,3C) (n,NH,T) (n,T,C)
typedef struct { void *xhat; float *rstd; void *ln, *qkv; float *lse; void *y; } AttentionSaved;
// (n,T,C) (n,T) (n,T,C) (n,T,4C) (n,T,4C)
typedef struct { void *xhat; float *rstd; void *ln, *h, *gelu; } MlpSaved;
// (B,T,C) (B,T) (B,T,C): of a loss read after a layer, dy being its gradient
typedef struct { void *xhat; float *rstd; void *dy; } ExitSaved;

// Values that go to the device with each call, in one copy, and their addresses there. `place` and
// `scale` are by branch. row is the inverse of place, the packed rows of a branch; noise is by
// place and layer.
typedef struct {
    int *place;         // (2L,rows)
    float *scale;       // (2L)
    // (2L,rows) (rows) (rows) (BT) (BT) (BT) (BT + 1)
    int *row, *seq, *at, *tokens, *targets, *order, *first;
    NoisePlace *noise;  // (NOISE_PLACES,L)
    ScoreEdit *edit;    // (L)
} Inputs;

struct Model {
    GptConfig config;
    EngineArgs args;
    Gpu gpu;
    Ranks ranks;                         // those of this run
    Layout layout;                       // of every slot, if it is not divided among the ranks
    // elements of m and v, and of fp32 parameters, stored here: all, or this rank's share
    size_t n_moments, n_master;
    float *slot[4];                      // parameters (n_master), gradients (layout.n - n_frozen),
                                         // m, v (n_moments)
    bf16 *copy;                          // (layout.n) the rounded parameters; NULL if N is float
    bf16 *wire;                          // gradients being reduced over the ranks; NULL: in place
    UpdateChunk *chunk;                  // (n_chunks) on the device
    int n_chunks;
    double *norms;                       // (n_chunks + 1) squared norms: of chunks and, last, of
                                         // everything
    BranchUpdate *update, *host_update;  // (2L+1)
    double *host_norm;
    unsigned char *spent;                // (2L+1) by branch, as UpdateArgs.t: gradients already
                                         // applied by an update, which count as zeros whatever the
                                         // memory contains

    char *activations;                   // everything below, up to the inputs
    char *saved, *saved_end;             // what forward saves for backward, one branch after the
                                         // other
    size_t activation_bytes, saved_capacity, saved_peak;  // bytes allocated; the most that was used
                                                         // for saving
    AttentionSaved *attention;            // (L) into `saved`
    MlpSaved *mlp;                        // (L)
    ExitSaved *exit;                      // (L)
    int exits;                           // how many there were in this call

    float *x, *dx;                       // (B,T,C) the residual stream
    void *lnf, *lnf_xhat;                // (B,T,C) (B,T,C)
    float *lnf_rstd;                     // (B,T)
    float *losses, *uniform, *distilled, *apart;  // (B,T) each, from the kernels of the head
    void *twin_x, *twin_d;               // (chunk,C) (chunk,Vp) of twins
    uint32_t *keep;                      // (B,NH,T,T/32) bits of attention's dropout; NULL: none
    AttentionRows score_rows;            // for whole rows of scores; s NULL: none
    char *maps;                          // qkv (B,T,3C) and lse (B,NH,T) of args.maps' layers
    float *aligned, *host_aligned;       // (L,2,B,T) distances and cosines of maps; NULL: none
    unsigned char *compared;             // (L) which layers have them in this call
    void *ln, *gelu, *out;               // (B,T,C) (B,T,4C) (B,T,C): for one branch at a time
    void *redo;                          // (B,T,4C) qkv and y, or h, if they are recomputed
    float *lse;                          // (B,NH,T) likewise
    void *dwide, *dy, *dout;             // (B,T,4C) (B,T,C) (B,T,C)
    float *inner;                        // (B,NH,T)
    void *lora_u, *lora_v, *lora_x;      // (B,T,r) (B,T,r) (B,T,4C) of adapters; x with dropout
    void *logits;                        // (chunk,Vp)
    float *token_logits;                 // (V)

    Inputs host, device;
    size_t rows;                         // the most in a call
    Cache cache;                         // (L,sequences,2,T,C)
    float *stream;                       // (sequences,T,C) where decode has stopped,
    int *stopped;                        // (sequences,T) and before which layer
    int decoding, begins;                // a decode is in progress; all its rows begin a sequence
    int *group;                          // (V) of each token, -1 if it is not in the batch
    float *host_losses, *host_uniform;   // (1+exits,B,T) (1+exits,B,T) the last layer's first
    float *host_distilled, *host_apart;  // (B,T) (B,T)
    float *shown;                        // (B,T,C) passed to a Watch; NULL: not used yet
    double part[N_PARTS];                // of the last run
    const void *ended;                   // the last branch's output, still to be added to x, or
                                         // NULL, and
    Rows end;                            // its rows
    int last_B, last_T;                  // of the last forward
    Graph *graph, *recorded;             // (2L,2,GRAPHS) or NULL; the one being recorded
    uint64_t graph_calls;
};

static void memory_error(const char *what, size_t bytes) {
    size_t left = 0, all = 0;
    if (cudaMemGetInfo(&left, &all) != cudaSuccess) left = all = 0;
    die("out of memory on the GPU: %s needs %.0f MiB; %.0f of %.0f MiB are free\n"
        "  hint: a smaller --batch (with the same --total-batch the run is the same), or "
        "--recompute branch", what, (double)bytes / 1048576, (double)left / 1048576,
        (double)all / 1048576);
}

// Allocates bytes on the device; their contents are undefined.
static void *device_alloc(const char *what, size_t bytes) {
    void *p = NULL;
    if (cudaMalloc(&p, bytes + !bytes) != cudaSuccess) memory_error(what, bytes);
    return p;
}

static float *zeros_new(const Gpu *g, const char *what, size_t n) {
    float *p = (float *)device_alloc(what, n * sizeof *p);
    CUDA_CHECK(cudaMemsetAsync(p, 0, n * sizeof *p, g->stream));
    return p;
}

// Pinned host memory, which the device can copy from asynchronously.
static void *host_new(size_t bytes) {
    void *p = NULL;
    CUDA_CHECK(cudaMallocHost(&p, bytes + !bytes));
    memset(p, 0, bytes);
    return p;
}

// Layer l's parameters as forward and backward read them: elements of N.
typedef struct {
#define X(id, name, branch, dims, rows, cols, init, group) const void *id;
    GPT_PARAMS(X)
#undef X
} Operands;

// The offset of one layer's part of a parameter among all.
static size_t param_offset(const Model *m, int param, int l) {
    return layout_at(&m->layout, &m->config, param, l);
}

static const void *weight_at(const Model *m, int param, int l) {
    const char *base = m->copy ? (const char *)m->copy : (const char *)m->slot[SLOT_PARAM];
    return base + param_offset(m, param, l) * size_of_number(&m->gpu);
}

static Operands weights_at(const Model *m, int l) {
    Operands w;
#define X(id, name, branch, dims, rows, cols, init, group) w.id = weight_at(m, P_##id, l);
    GPT_PARAMS(X)
#undef X
    return w;
}

static float *gradient_at(const Model *m, int param, int l) {
    const size_t at = param_offset(m, param, l);
    return at < m->layout.n_frozen ? NULL : m->slot[SLOT_GRAD] + (at - m->layout.n_frozen);
}

static Params gradients_at(const Model *m, int l) {
    Params dw;
#define X(id, name, branch, dims, rows, cols, init, group) dw.id = gradient_at(m, P_##id, l);
    GPT_PARAMS(X)
#undef X
    return dw;
}

// Elements of one layer of a parameter: wte has Vp rows, the last of which are always zeros.
static size_t param_elements(const GptConfig *c, int p) {
    return p == P_wte ? padded_vocabulary((size_t)c->V) * (size_t)c->C : gpt_param_size(c, p);
}

// The space allocated for them in every array of parameters. Reductions over ranks include the
// gaps: there are none then.
static size_t param_capacity(const Model *m, int p) {
    const size_t bytes = arena_bytes(param_elements(&m->config, p) * sizeof(bf16)) -
        (m->ranks.world > 1 ? ARENA_GAP : 0);
    return bytes / sizeof(bf16);
}

// Call before a backward pass through a branch: returns whether it must accumulate into the
// branch's gradients, which it writes once each; if not, they are spent, and it must overwrite
// them. With `now` they become zeros here, and must be accumulated into.
static int gradient_add(Model *m, int l, int branch, int now) {
    const size_t index = gpt_branch_index(&m->config, l, branch);
    if (!m->spent[index]) return 1;
    m->spent[index] = 0;
    for (int p = 0; p < N_PARAMS && now; p++)
        if (gpt_param[p].branch == branch && layout_trains(&m->config, p))
            CUDA_CHECK(cudaMemsetAsync(gradient_at(m, p, l), 0,
                                       param_elements(&m->config, p) * sizeof(float),
                                       m->gpu.stream));
    return now;
}

// The elements at the beginning of a slot that this rank does not have: of what never trains there
// are no gradients and no moments. Of a base in bf16 under adapters, there are no fp32 weights
// beside the rounded ones: nobody saves it.
static size_t absent_of(const Model *m, Slot slot) {
    const int whole = slot == SLOT_PARAM && !(m->gpu.half && m->config.lora);
    return whole ? 0 : m->layout.n_frozen / (size_t)m->ranks.shares;
}

// The parameters of a branch divide evenly among the ranks.
static void params_layout(Model *m) {
    const size_t shares = (size_t)m->ranks.shares;
    size_t work[N_PARAMS];
    for (int p = 0; p < N_PARAMS; p++) work[p] = param_capacity(m, p);
    m->layout = layout_of(&m->config, m->args.frozen, work, shares * (ALIGN / sizeof(bf16)));
    m->n_moments = m->layout.n / shares - absent_of(m, SLOT_M);
    // in float, all ranks read all
    m->n_master = m->gpu.half ? m->layout.n / shares - absent_of(m, SLOT_PARAM) : m->layout.n;
}

// An array of all parameters but the first `absent`, with elements of that many bytes, is an arena:
// the gaps between tensors must not be accessed.
static void params_seal(const Model *m, void *array, size_t number, size_t absent) {
    for (int p = 0; p < N_PARAMS && m->ranks.world == 1; p++)
        for (int l = 0; l < gpt_param_layers(&m->config, p); l++) {
            const size_t n = param_elements(&m->config, p), at = param_offset(m, p, l);
            if (at < absent) continue;
            arena_seal((char *)array + (at - absent + n) * number, (param_capacity(m,
                       p) - n) * number, m->gpu.stream);
        }
}

// Whether each rank has only a share of this slot, with the layout of m and v.
static int is_shared(const Model *m, Slot slot) {
    return m->ranks.shares > 1 && slot != SLOT_GRAD && (slot != SLOT_PARAM || m->gpu.half);
}

// The part of n elements at `at`, within branch i, that a rank owns; *place: their offset in an
// array of such shares of all parameters. (In m and v, frozen layers are omitted.)
static Slice share_of(const Model *m, size_t i, int rank, size_t at, size_t n, size_t *place) {
    const Slice s = layout_span(&m->layout, &m->config, i, at >= m->layout.n_base);
    const size_t share = s.n / (size_t)m->ranks.shares,
        from = s.at + (m->ranks.shares > 1 ? (size_t)rank * share : 0);
    const size_t first = at > from ? at : from, end = at_most(at + n, from + share);
    const Slice part = {first, end > first ? end - first : 0};
    *place = s.at / (size_t)m->ranks.shares + first - from;
    return part;
}

// Divides every trained tensor into pieces of UPDATE_CHUNK elements, the unit of work for norm and
// update.
static void params_chunks(Model *m) {
    GptPiece *piece;
    const int n = gpt_trained_pieces(&piece, &m->config, m->args.frozen, UPDATE_CHUNK);
    UpdateChunk *all = (UpdateChunk *)xcalloc((size_t)n, sizeof *all);
    for (int i = 0; i < n; i++) {
        const int p = piece[i].param, l = piece[i].layer;
        const size_t branch = gpt_branch_index(&m->config, l, gpt_param[p].branch),
            begin = param_offset(m, p, l);
        size_t place;
        const Slice part = share_of(m, branch, m->ranks.rank, begin + piece[i].at, piece[i].n,
                                    &place);
        const UpdateChunk chunk = {part.at, (is_shared(m, SLOT_PARAM) ? place : part.at) -
                                   absent_of(m, SLOT_PARAM), part.at - m->layout.n_frozen,
                                   place - absent_of(m, SLOT_M), part.n, part.at - begin, branch,
                                   (uint32_t)p | (uint32_t)l << 8, gpt_param[p].dims == 2};
        if (part.n) all[m->n_chunks++] = chunk;
    }
    free(piece);
    // 0 for a rank without a share of such a small model
    const size_t bytes = (size_t)m->n_chunks * sizeof *all;
    m->chunk = (UpdateChunk *)device_alloc("the table of parameters", bytes);
    CUDA_CHECK(cudaMemcpy(m->chunk, all, bytes, cudaMemcpyHostToDevice));
    free(all);
    m->norms = (double *)device_alloc("the gradient norms",
                                  ((size_t)m->n_chunks + 1) * sizeof *m->norms);
}

// Bytes that one row of a kept branch saves.
static size_t saved_per_row(const Model *m, int branch) {
    const size_t N = size_of_number(&m->gpu), C = (size_t)m->config.C, NH = (size_t)m->config.NH;
    const int recompute = m->args.recompute;
    // per token: xhat and rstd, then what is not recomputed
    size_t bytes = N * C + sizeof(float);
    if (recompute != RECOMPUTE_BRANCH)
        bytes += branch == ATTN ? N * 4 * C + NH * sizeof(float) : N * 4 * C;
    if (recompute == RECOMPUTE_NONE) bytes += branch == ATTN ? N * C : N * 5 * C;
    return (size_t)m->args.T * bytes;
}

// The most that a plan within the bound saves; evaluation needs one layer at a time.
static size_t saved_bound(const Model *m, const MemoryBound *b) {
    enum { ARRAYS = 6 };                                 // per branch; each is rounded up to ALIGN
    const size_t size[BRANCHES] = {saved_per_row(m, ATTN), saved_per_row(m, MLP)};
    const size_t gaps = (size_t)m->config.L * BRANCHES * ARRAYS * (ALIGN + ARENA_GAP);
    const size_t exit = (size_t)m->args.B * (size_t)m->args.T *
        (2 * size_of_number(&m->gpu) * (size_t)m->config.C + sizeof(float));
    const size_t exits = b->rows > 0 ? (size_t)m->args.bound.exits : 0;
    return round_up(memory_bound_most(b, size, m->args.B), ALIGN) + gaps +
        exits * (round_up(exit, ALIGN) + ARRAYS * (ALIGN + ARENA_GAP));
}

typedef struct { void **at; size_t bytes; } Buffer;
enum { N_BUFFERS = 33, N_TRAINING_BUFFERS = 8 };

// Tokens in a chunk of logits.
static size_t logits_rows(const Model *m) {
    const size_t BT = (size_t)m->args.B * (size_t)m->args.T, V = (size_t)m->config.V,
        N = size_of_number(&m->gpu), twins = m->args.twins ? 2 * twins_chunk(BT, V, N) : 0,
        rows = at_most(round_up(BT, CHUNK_UNIT), classifier_chunk(BT, V, N));
    return twins > rows ? twins : rows;
}

// Bytes of a layer's queries, keys, values and log-sum-exps that stay after a run.
static size_t maps_bytes(const Model *m) {
    const size_t BT = (size_t)m->args.B * (size_t)m->args.T, C = (size_t)m->config.C;
    return round_up(BT * 3 * C * size_of_number(&m->gpu), ALIGN) +
        round_up(BT * (size_t)m->config.NH * sizeof(float), ALIGN);
}

// All activation arrays except the saved ones; the last ones are for training.
static int model_buffers(Model *m, Buffer buffers[N_BUFFERS]) {
    const GptConfig *c = &m->config;
    const size_t BT = (size_t)m->args.B * (size_t)m->args.T, C = (size_t)c->C, V = (size_t)c->V,
        N = size_of_number(&m->gpu), logits = logits_rows(m) * padded_vocabulary(V) * N;
    const size_t one = sizeof(float), heads = BT * (size_t)c->NH * one, r = (size_t)c->lora;
    size_t maps = 0;
    for (int l = 0; m->args.maps && l < c->L; l++) maps += m->args.maps[l] ? maps_bytes(m) : 0;
    const size_t again = m->args.recompute == RECOMPUTE_BRANCH;
    const Buffer all[N_BUFFERS] = {
        {(void **)&m->x, BT * C * one}, {&m->lnf, BT * C * N}, {&m->lnf_xhat, BT * C * N},
        {(void **)&m->lnf_rstd, BT * one}, {(void **)&m->losses, BT * one},
        {(void **)&m->uniform, BT * one}, {(void **)&m->distilled, BT * one},
        {(void **)&m->keep, m->args.attention_noise ? (size_t)c->NH * BT *
         kept_keys_stride((size_t)m->args.T) * one : 0},
        {&m->ln, BT * C * N}, {&m->gelu, BT * 4 * C * N}, {&m->out, BT * C * N},
        {&m->logits, logits}, {&m->twin_d, m->args.twins ? logits : 0},
        {&m->twin_x, m->args.twins ? logits_rows(m) * C * N : 0},
        {(void **)&m->apart, m->args.twins ? BT * one : 0}, {(void **)&m->maps, maps},
        {(void **)&m->aligned, m->args.align ? (size_t)c->L * 2 * BT * one : 0},
        {(void **)&m->token_logits, (m->args.cache ? m->rows : 1) * V * one},
        {&m->cache.at, (size_t)m->args.cache * (size_t)c->L * 2 * (size_t)m->args.T * C * N},
        {(void **)&m->stream, (size_t)m->args.cache * (size_t)m->args.T * C * one},
        {(void **)&m->gpu.partial, PARTIAL * C * one}, {(void **)&m->gpu.sum, 4 * C * one},
        {&m->lora_u, BT * r * N}, {&m->lora_x, m->args.lora_noise ? BT * 4 * C * N : 0},
        {(void **)&m->saved, 0},                          // has its own size
        {&m->lora_v, BT * r * N},
        {(void **)&m->dx, BT * C * one}, {&m->dy, BT * C * N}, {&m->dout, BT * C * N},
        {&m->dwide, BT * 4 * C * N}, {(void **)&m->inner, heads},
        {&m->redo, again * (BT * 4 * C * N + ALIGN)}, {(void **)&m->lse, again * heads},
    };
    memcpy(buffers, all, sizeof all);
    return m->args.bound.rows > 0 ? N_BUFFERS : N_BUFFERS - N_TRAINING_BUFFERS;
}

// Cuts the workspace for whole rows of scores from an arena, if the model needs it; at NULL: only
// returns its bytes.
static size_t score_rows_open(Model *m, char **at) {
    const GptConfig *c = &m->config;
    if (!m->args.score_rows && !m->args.align && !m->args.maps) return 0;
    return rows_open(&m->score_rows, at, (size_t)m->args.B, (size_t)m->args.T, (size_t)c->C,
                     (size_t)c->NH, size_of_number(&m->gpu), m->gpu.stream);
}

static size_t buffers_bytes(Model *m, size_t saved) {
    Buffer buffers[N_BUFFERS];
    size_t bytes = 0;
    for (int i = 0, n = model_buffers(m, buffers); i < n; i++)
        bytes += arena_bytes(buffers[i].at == (void **)&m->saved ? saved : buffers[i].bytes);
    return bytes + score_rows_open(m, NULL);
}

static void buffers_new(Model *m) {
    Buffer buffers[N_BUFFERS];
    m->saved_capacity = saved_bound(m, &m->args.bound);
    m->activation_bytes = buffers_bytes(m, m->saved_capacity);
    char *at = m->activations = (char *)device_alloc("what forward and backward write",
                                                 m->activation_bytes);
    for (int i = 0, n = model_buffers(m, buffers); i < n; i++)
        *buffers[i].at = arena_cut(&at, buffers[i].at == (void **)&m->saved ? m->saved_capacity
                                 : buffers[i].bytes, m->gpu.stream);
    score_rows_open(m, &at);
}

// Lays out the inputs in one array, on the host or the device; returns the number of elements.
static size_t inputs_layout(const Model *m, Inputs *in, int *at) {
    const size_t BT = (size_t)m->args.B * (size_t)m->args.T,
        branches = (size_t)BRANCHES * m->config.L;
    in->place = at;
    in->scale = (float *)(void *)(in->place + branches * m->rows);
    in->row = in->place + branches * m->rows + branches;
    in->seq = in->row + branches * m->rows;
    in->at = in->seq + m->rows;
    in->tokens = in->at + m->rows;
    in->targets = in->tokens + BT;
    in->order = in->targets + BT;
    in->first = in->order + BT;
    in->noise = (NoisePlace *)(void *)(in->first + BT + 1);
    const size_t L = (size_t)m->config.L, places = (size_t)NOISE_PLACES * L;
    in->edit = (ScoreEdit *)(void *)(in->noise + places);
    return 2 * branches * m->rows + branches + 2 * m->rows + 4 * BT + 1 +
        (places * sizeof(NoisePlace) + L * sizeof(ScoreEdit)) / sizeof(int);
}

static void inputs_new(Model *m) {
    int dummy = 0;
    const size_t bytes = inputs_layout(m, &m->host, &dummy) * sizeof(int);
    inputs_layout(m, &m->host, (int *)host_new(bytes));
    inputs_layout(m, &m->device, (int *)device_alloc("the inputs", bytes));
    const size_t BT = (size_t)m->args.B * (size_t)m->args.T,
        losses = (1 + (size_t)m->args.bound.exits) * BT;
    m->host_losses = (float *)host_new((2 * losses + 2 * BT) * sizeof(float));
    m->host_uniform = m->host_losses + losses, m->host_distilled = m->host_uniform + losses,
        m->host_apart = m->host_distilled + BT;
    if (m->args.align) {
        m->host_aligned = (float *)host_new((size_t)m->config.L * 2 * BT * sizeof(float));
        m->compared = (unsigned char *)xcalloc((size_t)m->config.L, 1);
    }
    m->group = (int *)xcalloc((size_t)m->config.V, sizeof *m->group);
    for (int v = 0; v < m->config.V; v++) m->group[v] = -1;
}

// The device of this process: among those visible, the one with its local rank. A launcher may make
// only one visible.
static int gpu_of(const Comm *comm, int count) {
    const int local = comm ? comm->local_rank : 0;
    if (local < count) return local;
    if (count > 1)
        die("rank %d is number %d on its machine, which has %d GPUs\n  hint: start as many ranks "
            "on each machine as it has GPUs", comm->rank, local, count);
    return 0;
}

static void gpu_open(Gpu *g, int dtype, const Comm *comm) {
    const char *search = getenv("DROPPATH_GEMM_SEARCH"),
        *epilogue = getenv("DROPPATH_GEMM_EPILOGUE");
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count < 1)
        die("no CUDA device: %s\n  hint: nvidia-smi lists them; build/train_gpt runs on the CPU",
            error != cudaSuccess ? cudaGetErrorString(error) : "the driver knows none");
    cudaDeviceProp device;
    const int number = gpu_of(comm, count);
    CUDA_CHECK(cudaGetDeviceProperties(&device, number));
    if (device.major < 8)
        die("%s is too old: compute capability %d.%d, and this engine needs 8.0", device.name,
            device.major, device.minor);
    CUDA_CHECK(cudaSetDevice(number));
    CUDA_CHECK(cudaStreamCreate(&g->stream));
    CUBLAS_CHECK(cublasLtCreate(&g->blas));
    g->half = dtype == DTYPE_BF16;
    g->tf32 = dtype == DTYPE_TF32;
    g->search = !search || strcmp(search, "0");
    // below, a launch takes as long as the computation
    g->least_flops = search && !strcmp(search, "all") ? 0 : 1e8;
    g->plain = epilogue && !strcmp(epilogue, "0");
    g->sums_inside = epilogue && !strcmp(epilogue, "1");
    g->workspace = device_alloc("the workspace of products", WORKSPACE);
}

static void gpu_close(Gpu *g) {
    for (int i = 0; i < g->n_matmuls; i++) matmul_free(&g->matmul[i]);
    free(g->matmul);
    matmul_choices_free(&g->choices);
    CUDA_CHECK(cudaFree(g->workspace));
    CUBLAS_CHECK(cublasLtDestroy(g->blas));
    CUDA_CHECK(cudaStreamDestroy(g->stream));
}

static Model *model_open(const GptConfig *config, const EngineArgs *args) {
    attention_check((size_t)config->C, (size_t)config->NH);
    if (config->C > CHANNELS_MAX)
        die("%d channels: this engine takes at most %d", config->C, CHANNELS_MAX);
    if ((double)args->B * args->T > INT_MAX)
        die("a micro-batch of %d rows of %d tokens: 2^31 are too many", args->B, args->T);
    Model *m = (Model *)xcalloc(1, sizeof *m);
    const size_t branches = (size_t)BRANCHES * (size_t)config->L + 1;
    const int train = args->bound.rows > 0;
    m->config = *config;
    m->args = *args;
    m->rows = (size_t)(args->cache > args->B ? args->cache : args->B);
    m->cache.T = (size_t)args->T;
    // nothing is saved; there is no workspace for recomputation
    if (!train) m->args.recompute = RECOMPUTE_GELU;
    if (args->rounding == ROUNDING_STOCHASTIC && args->dtype != DTYPE_BF16)
        die("--rounding stochastic rounds weights to bf16, and this --dtype does not\n  hint: "
            "--dtype bf16");
    gpu_open(&m->gpu, args->dtype, args->comm);
    ranks_open(&m->ranks, args);
    params_layout(m);
    m->slot[SLOT_PARAM] = zeros_new(&m->gpu, "parameters", m->n_master);
    params_seal(m, m->slot[SLOT_PARAM], sizeof(float), absent_of(m, SLOT_PARAM));
    if (m->gpu.half) {
        m->copy = (bf16 *)zeros_new(&m->gpu, "the rounded parameters", strips(m->layout.n, 2));
        params_seal(m, m->copy, sizeof(bf16), 0);
    }
    if (train) {
        params_chunks(m);
        const size_t trained = m->layout.n - m->layout.n_frozen;
        m->slot[SLOT_GRAD] = zeros_new(&m->gpu, "gradients", trained);
        m->slot[SLOT_M] = zeros_new(&m->gpu, "the optimizer's moments", 2 * m->n_moments);
        m->slot[SLOT_V] = m->slot[SLOT_M] + m->n_moments;
        for (int slot = SLOT_GRAD; slot <= SLOT_V; slot++)
            params_seal(m, m->slot[slot], sizeof(float), m->layout.n_frozen);
        if (m->gpu.half && m->ranks.world > 1 && !args->reduce_fp32)
            m->wire = (bf16 *)zeros_new(&m->gpu, "gradients on their way", strips(trained, 2));
        m->update = (BranchUpdate *)device_alloc("step counts", branches * sizeof *m->update);
        m->host_update = (BranchUpdate *)host_new(branches * sizeof *m->host_update);
        m->host_norm = (double *)host_new(sizeof *m->host_norm);
    }
    m->spent = (unsigned char *)xcalloc(branches, sizeof *m->spent);
    m->attention = (AttentionSaved *)xcalloc((size_t)config->L, sizeof *m->attention);
    m->mlp = (MlpSaved *)xcalloc((size_t)config->L, sizeof *m->mlp);
    m->exit = (ExitSaved *)xcalloc((size_t)config->L, sizeof *m->exit);
    m->stopped = (int *)xcalloc((size_t)args->cache * (size_t)args->T + 1, sizeof *m->stopped);
    if (args->graphs) m->graph = (Graph *)xcalloc(2 * branches * GRAPHS, sizeof *m->graph);
    buffers_new(m);
    inputs_new(m);
    CUDA_CHECK(cudaStreamSynchronize(m->gpu.stream));
    return m;
}

static void model_close(Model *m) {
    CUDA_CHECK(cudaStreamSynchronize(m->gpu.stream));
    ranks_close(&m->ranks);
    for (int i = 0; m->graph && i < 2 * BRANCHES * m->config.L * GRAPHS; i++)
        if (m->graph[i].exec) CUDA_CHECK(cudaGraphExecDestroy(m->graph[i].exec));
    void *const device[] = {m->activations, m->slot[SLOT_PARAM], m->slot[SLOT_GRAD],
                            m->slot[SLOT_M], m->copy, m->wire,
                            m->chunk, m->norms, m->update, m->device.place};
    void *const pinned[] = {m->host.place, m->host_losses, m->host_update, m->host_norm,
                            m->host_aligned};
    void *const host[] = {m->shown, m->graph, m->group, m->spent, m->attention, m->mlp, m->exit,
                          m->stopped, m->compared, m};
    gpu_close(&m->gpu);
    for (size_t i = 0; i < sizeof device / sizeof device[0]; i++) CUDA_CHECK(cudaFree(device[i]));
    for (size_t i = 0; i < sizeof pinned / sizeof pinned[0]; i++)
        CUDA_CHECK(cudaFreeHost(pinned[i]));
    for (size_t i = 0; i < sizeof host / sizeof host[0]; i++) free(host[i]);
}

// Parameters include the rounded copy, activations the matmuls' workspace.
static void model_memory(const Model *m, EngineMemory *bytes) {
    const size_t trained = m->layout.n - m->layout.n_frozen, train = m->args.bound.rows > 0;
    const MemoryBound all = memory_bound_full(m->config.L, m->args.frozen, m->args.B, (int)train);
    Model copy = *m;
    bytes->parameters = m->n_master * sizeof(float) + (m->copy ? m->layout.n * sizeof(bf16) : 0);
    bytes->gradients = train * trained * (sizeof(float) + (m->wire ? sizeof(bf16) : 0));
    bytes->moments = train * 2 * m->n_moments * sizeof(float);
    bytes->activations = WORKSPACE + m->activation_bytes;
    bytes->activations_full = WORKSPACE + buffers_bytes(&copy, saved_bound(m, &all));
    bytes->activations_used = WORKSPACE + buffers_bytes(&copy, m->saved_peak);
}

// Allocates what a branch saves, in an arena that each forward pass divides anew.
static void *save(Model *m, size_t bytes) {
    const size_t used = (size_t)(m->saved_end - m->saved) + arena_bytes(bytes);
    CHECK(used <= m->saved_capacity, "the plan keeps more branches than the model was opened for");
    if (used > m->saved_peak) m->saved_peak = used;
    return arena_cut(&m->saved_end, bytes, m->gpu.stream);
}

static void save_nothing(Model *m) {
    m->saved_end = m->saved;
    arena_unseal(m->saved, m->saved_capacity, m->gpu.stream);
}

// The last branch before i that runs, or -1. An early exit between them is a branch that adds
// nothing: its LayerNorm, not branch i's, is next to that branch.
static int branch_before(const Pass *pass, int i) {
    do {
        if (i-- % BRANCHES == 0 && i > 0 && pass_exits(pass, i / BRANCHES)) return -1;
    } while (i >= 0 && !pass->plan->branch[i].n);
    return i;
}

// The same for the exit after layer l.
static int branch_before_exit(const Pass *pass, int l) {
    const int i = BRANCHES * l + MLP;
    return pass->plan->branch[i].n ? i : branch_before(pass, i);
}

// Returns 0 if branch i was launched as a graph; 1 if it must be launched kernel by kernel,
// followed by graph_end.
static int graph_begin(Model *m, const Pass *pass, int i, int backward, int add,
                       const void *saved) {
    const DropPlan *plan = pass->plan;
    const int before = branch_before(pass, i);
    GraphKey key;
    const int aligns = pass->objective && pass->objective->align;
    // a watch may come between, an entropy waits, and a teacher has memory of its own
    if (!m->graph || m->decoding || pass->watch || pass->entropy || aligns) return 1;
    memset(&key, 0, sizeof key);                         // including padding
    key.saved = saved, key.B = m->last_B, key.T = m->last_T;
    key.n = plan->branch[i].n, key.add = add, key.tied = plan->tied;
    key.noise = !!noise_rate(pass->noise, NOISE_ATTN) +
                2 * !!noise_rate(pass->noise, NOISE_ATTN_OUT) +
                4 * !!noise_rate(pass->noise, NOISE_LORA) +
                8 * noise_scores(pass->noise, i / BRANCHES).kind;
    key.before = before, key.before_n = before < 0 ? 0 : plan->branch[before].n;
    // the same key, or the oldest
    Graph *all = m->graph + (size_t)(2 * i + backward) * GRAPHS, *g = all;
    for (int k = 0; k < GRAPHS && memcmp(&g->key, &key, sizeof key); k++)
        if (!memcmp(&all[k].key, &key, sizeof key) || all[k].used < g->used) g = &all[k];
    const int met = !memcmp(&g->key, &key, sizeof key);
    g->used = ++m->graph_calls;
    if (met && g->exec) {
        CUDA_CHECK(cudaGraphLaunch(g->exec, m->gpu.stream));
        return 0;
    }
    if (met) {
        CUDA_CHECK(cudaStreamBeginCapture(m->gpu.stream, cudaStreamCaptureModeThreadLocal));
        m->recorded = g;
        return 1;
    }
    if (g->exec) CUDA_CHECK(cudaGraphExecDestroy(g->exec));
    g->key = key, g->exec = NULL;
    return 1;
}

static void graph_end(Model *m) {
    cudaGraph_t graph = NULL;
    if (!m->recorded) return;
    CUDA_CHECK(cudaStreamEndCapture(m->gpu.stream, &graph));
    CUDA_CHECK(cudaGraphInstantiateWithFlags(&m->recorded->exec, graph, 0));
    CUDA_CHECK(cudaGraphDestroy(graph));
    CUDA_CHECK(cudaGraphLaunch(m->recorded->exec, m->gpu.stream));
    m->recorded = NULL;
}

// ---- The two branches, on the rows that keep them ----

// The rows of branch i; a branch that all rows run needs no index.
static Rows rows_of(const Model *m, const DropPlan *plan, int i) {
    const BranchPlan *b = &plan->branch[i];
    const Rows r = {b->n == m->last_B ? NULL : m->device.place + (size_t)i * m->rows,
                    m->device.scale + i};
    return r;
}

static size_t tokens_of(const Model *m, const BranchPlan *b) {
    return (size_t)b->n * (size_t)m->last_T;
}

// Where noise is on the device.
static const NoisePlace *noise_at(const Model *m, int place, int l) {
    return m->device.noise + place * m->config.L + l;
}

// x (nT,C), with dropout for that matmul's adapter: x itself without dropout, otherwise in a
// buffer.
static const void *adapter_dropout(Model *m, const Pass *pass, int l, int param, void *to,
                                   const void *x, size_t nT) {
    const size_t C = (size_t)gpt_param_rows(&m->config, param);
    const int place = NOISE_LORA + gpt_matmul_of(param),
        i = BRANCHES * l + gpt_param[param].branch;
    if (!noise_rate(pass->noise, place)) return x;
    CHECK(m->lora_x, "this model was opened without dropout of adapters");
    if (to != x)
        CUDA_CHECK(cudaMemcpyAsync(to, x, nT * C * size_of_number(&m->gpu),
                                   cudaMemcpyDeviceToDevice, m->gpu.stream));
    dropout_end(&m->gpu, to, noise_at(m, place, l), m->device.row + (size_t)i * m->rows, nT,
                (size_t)m->last_T, C);
    return to;
}

// y = s D(x) A^T B^T of a matmul's adapter A, B, s = alpha / r; returns how the matmul with w must
// then write y.
static Result adapter_forward(Model *m, int l, int A, Result y, const void *x, size_t nT) {
    const size_t r = (size_t)m->config.lora, C = (size_t)gpt_param_cols(&m->config, A);
    const size_t OC = (size_t)gpt_param_rows(&m->config, A + 1);
    Result only = fresh(y.at, y.ld, NULL);
    only.alpha = (float)m->args.lora_scale;
    multiply(&m->gpu, fresh(m->lora_u, r, NULL), matrix(x, C), transposed(weight_at(m, A, l), C),
             nT, r, C);
    multiply(&m->gpu, only, matrix(m->lora_u, r), transposed(weight_at(m, A + 1, l), r), nT, OC, r);
    y.add = 1;
    return y;
}

// v = s dy B and dx = v A: the gradient of D(x), still without dropout and the matmul with w.
static Result adapter_backward_input(Model *m, int l, int A, Result dx, const void *dy, size_t nT) {
    const size_t r = (size_t)m->config.lora, C = (size_t)gpt_param_cols(&m->config, A);
    const size_t OC = (size_t)gpt_param_rows(&m->config, A + 1);
    Result v = fresh(m->lora_v, r, NULL);
    v.alpha = (float)m->args.lora_scale;
    multiply(&m->gpu, v, matrix(dy, OC), matrix(weight_at(m, A + 1, l), r), nT, r, OC);
    multiply(&m->gpu, fresh(dx.at, dx.ld, NULL), matrix(m->lora_v, r), matrix(weight_at(m, A, l),
             C), nT, C, r);
    dx.add = 1;
    return dx;
}

// dA = v^T D(x) and dB = s dy^T u, u = D(x) A^T is recomputed; or += with `add`.
static void adapter_backward(Model *m, int l, int A, int add, const void *dy, const void *x,
                             size_t nT) {
    const size_t r = (size_t)m->config.lora, C = (size_t)gpt_param_cols(&m->config, A);
    const size_t OC = (size_t)gpt_param_rows(&m->config, A + 1);
    Result dB = summed(gradient_at(m, A + 1, l), r, add);
    dB.alpha = (float)m->args.lora_scale;
    multiply(&m->gpu, fresh(m->lora_u, r, NULL), matrix(x, C), transposed(weight_at(m, A, l), C),
             nT, r, C);
    multiply(&m->gpu, dB, transposed(dy, OC), matrix(m->lora_u, r), OC, r, nT);
    multiply(&m->gpu, summed(gradient_at(m, A, l), C, add), transposed(m->lora_v, r), matrix(x, C),
             r, C, nT);
}

// y (nT,OC) = x (nT,C) w (C,OC) with y's epilogue (bias, GELU); w is parameter `param` of layer l,
// and may have an adapter.
static void linear_forward(Model *m, const Pass *pass, int l, int param, Result y, const void *x,
                           size_t nT) {
    const size_t C = (size_t)gpt_param_rows(&m->config, param),
        OC = (size_t)gpt_param_cols(&m->config, param);
    const int A = gpt_adapter_of(&m->config, param);
    if (A >= 0)
        y = adapter_forward(m, l, A, y, adapter_dropout(m, pass, l, param, m->lora_x, x, nT), nT);
    matmul_forward(&m->gpu, y, x, weight_at(m, param, l), nT, C, OC);
}

// The same layer backward, from dy (nT,OC) and its input x (nT,C): dx (nT,C) = dy w^T with dx's
// epilogue, and the gradients of w, of its bias, which is the next parameter in the table, and of
// the adapter. Overwrites them, or adds to them with `add`.
static void linear_backward(Model *m, const Pass *pass, int l, int param, Result dx, const void *dy,
                            const void *x, int add, size_t nT) {
    const size_t C = (size_t)gpt_param_rows(&m->config, param),
        OC = (size_t)gpt_param_cols(&m->config, param);
    const int A = gpt_adapter_of(&m->config, param);
    if (A >= 0) {
        dx = adapter_backward_input(m, l, A, dx, dy, nT);
        adapter_dropout(m, pass, l, param, dx.at, dx.at, nT);
    }
    matmul_backward(&m->gpu, dx, gradient_at(m, param, l), gradient_at(m, param + 1, l), add, dy, x,
                    weight_at(m, param, l), nT, C, OC);
    if (A >= 0)
        adapter_backward(m, l, A, add, dy, adapter_dropout(m, pass, l, param, m->lora_x, x, nT),
                         nT);
}

// Adds the previous branch's output to x, and normalizes the rows of branch i.
static void begin_branch(Model *m, void *ln, void *xhat, float *rstd, Rows rows, int tied,
                         const void *w, const void *b) {
    residual_layernorm_forward(&m->gpu, m->x, ln, xhat, rstd, m->ended, m->end, rows, tied, w, b,
                               (size_t)m->last_B, (size_t)m->last_T, (size_t)m->config.C);
    m->ended = NULL;
}

// out (n,T,C) remains to be added to these rows.
static void end_branch(Model *m, const void *out, Rows rows) { m->ended = out, m->end = rows; }

// Where a branch of nT tokens saves what backward needs.
static AttentionSaved attention_save(Model *m, size_t nT) {
    const size_t C = (size_t)m->config.C, NH = (size_t)m->config.NH, N = size_of_number(&m->gpu);
    AttentionSaved k;
    k.xhat = save(m, nT * C * N), k.rstd = (float *)save(m, nT * sizeof(float));
    k.ln = m->args.recompute == RECOMPUTE_NONE ? save(m, nT * C * N) : m->ln;
    if (m->args.recompute == RECOMPUTE_BRANCH) {
        k.qkv = m->redo, k.lse = m->lse, k.y = (char *)m->redo + round_up(nT * 3 * C * N, ALIGN);
        return k;
    }
    k.qkv = save(m, nT * 3 * C * N), k.lse = (float *)save(m, nT * NH * sizeof(float)),
        k.y = save(m, nT * C * N);
    return k;
}

static MlpSaved mlp_save(Model *m, size_t nT) {
    const size_t C = (size_t)m->config.C, N = size_of_number(&m->gpu);
    MlpSaved k;
    k.xhat = save(m, nT * C * N), k.rstd = (float *)save(m, nT * sizeof(float));
    k.ln = m->args.recompute == RECOMPUTE_NONE ? save(m, nT * C * N) : m->ln;
    k.h = m->args.recompute == RECOMPUTE_BRANCH ? m->redo : save(m, nT * 4 * C * N);
    k.gelu = m->args.recompute == RECOMPUTE_NONE ? save(m, nT * 4 * C * N) : m->gelu;
    return k;
}

// The bits of layer l's dropout of attention, made anew; NULL: it has none.
static const KeptKeys *attention_keep_keys(Model *m, const Pass *pass, int l, KeptKeys *keep) {
    const BranchPlan *b = &pass->plan->branch[BRANCHES * l + ATTN];
    const size_t T = (size_t)m->last_T, NH = (size_t)m->config.NH, stride = kept_keys_stride(T),
        n = (size_t)b->n * NH * T * stride;
    if (!noise_rate(pass->noise, NOISE_ATTN)) return NULL;
    CHECK(m->args.attention_noise, "this model was opened without dropout of attention");
    LAUNCH(attention_keep_kernel, blocks_for(n), BLOCK, 0, m->gpu.stream, m->keep,
           noise_at(m, NOISE_ATTN, l), m->device.row + (size_t)(BRANCHES * l + ATTN) * m->rows, n,
           (int)T, (int)NH, (int)stride);
    const KeptKeys made = {m->keep, noise_at(m, NOISE_ATTN, l), (int)stride};
    *keep = made;
    return keep;
}

#include "dev/cuda/teacher.h"

// What edits layer l's scores, on nT tokens, with its dropout.
static RowsShape score_edits(const Model *m, const Pass *pass, int l, const KeptKeys *keep) {
    const BranchPlan *b = &pass->plan->branch[BRANCHES * l + ATTN];
    const KeptKeys all = {NULL, NULL, 0};
    const RowsShape a = {m->device.edit + l, noise_scores(pass->noise, l).kind, keep ? *keep : all,
                         m->device.row + (size_t)(BRANCHES * l + ATTN) * m->rows, (size_t)b->n,
                         (size_t)m->last_T, NULL, NULL};
    return a;
}

// Dropout at the end of branch i, packed in x (n,T,C), or of its gradient.
static void end_dropout(Model *m, const Pass *pass, int i, void *x) {
    const int place = NOISE_ATTN_OUT + i % BRANCHES;
    if (noise_rate(pass->noise, place))
        dropout_end(&m->gpu, x, noise_at(m, place, i / BRANCHES),
                    m->device.row + (size_t)i * m->rows, tokens_of(m, &pass->plan->branch[i]),
                    (size_t)m->last_T, (size_t)m->config.C);
}

// The mean entropy of layer l's probabilities, with which k was computed; waits for it.
static double attention_entropy(Model *m, const AttentionSaved *k, size_t n) {
    const size_t C = (size_t)m->config.C, NH = (size_t)m->config.NH, T = (size_t)m->last_T;
    double all = 0;
    if (m->gpu.half)
        entropy_sums<bf16>(&m->gpu, m->losses, m->gelu, m->out, k->lse, k->qkv, n, T, C, NH);
    else entropy_sums<float>(&m->gpu, m->losses, m->gelu, m->out, k->lse, k->qkv, n, T, C, NH);
    CUDA_CHECK(cudaMemcpyAsync(m->host_losses, m->losses, n * T * sizeof(float),
                               cudaMemcpyDeviceToHost, m->gpu.stream));
    CUDA_CHECK(cudaStreamSynchronize(m->gpu.stream));
    for (size_t t = 0; t < n * T; t++) all += (double)m->host_losses[t];
    return all / (double)(n * T * NH);
}

// y = attention of ln, before the last matmul.
static void attention_inside(Model *m, const Pass *pass, int l, const AttentionSaved *k,
                             size_t nT) {
    const Gpu *g = &m->gpu;
    const size_t C = (size_t)m->config.C, NH = (size_t)m->config.NH, T = (size_t)m->last_T;
    KeptKeys made;
    linear_forward(m, pass, l, P_qkvw, fresh(k->qkv, 3 * C, weight_at(m, P_qkvb, l)), k->ln, nT);
    if (m->decoding && !m->begins) return;
    const KeptKeys *keep = attention_keep_keys(m, pass, l, &made);
    const RowsShape rows = score_edits(m, pass, l, keep);
    if (rows.kind) attention_rows_forward(&m->gpu, k->y, k->lse, &m->score_rows, k->qkv, &rows);
    else attention_forward(k->y, k->lse, k->qkv, keep, nT / T, T, C, NH, g->half, g->stream);
}

// Its remainder in decode: caches keys and values and, unless all rows begin a sequence, computes
// the attention.
static void attention_continue(Model *m, int l, const AttentionSaved *k, Rows rows) {
    const size_t C = (size_t)m->config.C,
        layer = 2 * (size_t)m->args.cache * m->cache.T * C * size_of_number(&m->gpu);
    const Cache cache = {(char *)m->cache.at + (size_t)l * layer, m->cache.T};
    if (m->decoding)
        attention_cached(&m->gpu, m->begins ? NULL : k->y, k->qkv, cache, rows.place, m->device.seq,
                         m->device.at, (size_t)m->last_B, (size_t)m->last_T, C,
                         (size_t)m->config.NH);
}

// gelu = GELU(h), h from ln, before the last product
static void mlp_inside(Model *m, const Pass *pass, int l, const MlpSaved *k, size_t nT) {
    Result h = fresh(k->h, 4 * (size_t)m->config.C, weight_at(m, P_fcb, l));
    h.gelu = k->gelu;
    linear_forward(m, pass, l, P_fcw, h, k->ln, nT);
}

// dx[rows] += the gradient through LN, from dy (n,T,C); then dout is that of the last branch before
// i that runs: its scale times dx on its rows.
static void begin_branch_backward(Model *m, const Pass *pass, int i, float *dw, float *db, int add,
                                  const void *xhat, const float *rstd, const void *w) {
    const DropPlan *plan = pass->plan;
    const int last = i == BRANCHES * plan->layers, tied = plan->tied && !last &&
        i % BRANCHES == MLP;
    const Rows all = {NULL, NULL}, rows = last ? all : rows_of(m, plan, i);
    const int before = branch_before(pass, i);
    residual_layernorm_backward(&m->gpu, m->dx, before < 0 ? NULL : m->dout, dw, db, add, m->dy,
                                xhat, rstd, rows, before < 0 ? all : rows_of(m, plan, before), last,
                                tied, w, (size_t)m->last_B, (size_t)m->last_T, (size_t)m->config.C);
}

// out: attn(LN(x[rows])).
static void attention_branch_forward(Model *m, const Pass *pass, int l) {
    const int i = BRANCHES * l + ATTN;
    const size_t nT = tokens_of(m, &pass->plan->branch[i]);
    const Operands w = weights_at(m, l);
    const AttentionSaved *k = &m->attention[l];
    begin_branch(m, k->ln, k->xhat, k->rstd, rows_of(m, pass->plan, i), 0, w.ln1w, w.ln1b);
    attention_inside(m, pass, l, k, nT);
    attention_continue(m, l, k, rows_of(m, pass->plan, i));
    maps_save(m, l, k, nT);
    if (pass->entropy) pass->entropy[l] = attention_entropy(m, k, nT / (size_t)m->last_T);
    if (pass->weight == 0) align_layer(m, pass, l);      // a training pass does so in backward
    linear_forward(m, pass, l, P_attprojw, fresh(m->out, (size_t)m->config.C, w.attprojb), k->y,
                   nT);
}

// From dout (n,T,C), which carries the scale, to dy (n,T,C), the gradient of the LayerNorm's
// output.
static void attention_branch_backward(Model *m, const Pass *pass, int l, int add) {
    const size_t C = (size_t)m->config.C, NH = (size_t)m->config.NH, T = (size_t)m->last_T;
    const size_t nT = tokens_of(m, &pass->plan->branch[BRANCHES * l + ATTN]);
    const Operands w = weights_at(m, l);
    const AttentionSaved *k = &m->attention[l];
    const Gpu *g = &m->gpu;
    KeptKeys made;
    void *dqkv = m->dwide, *dln = m->dy;
    if (k->ln == m->ln) layernorm_recompute(g, k->ln, k->xhat, w.ln1w, w.ln1b, nT, C);
    if (k->qkv == m->redo) attention_inside(m, pass, l, k, nT);
    linear_backward(m, pass, l, P_attprojw, fresh(m->dy, C, NULL), m->dout, k->y, add, nT);
    const KeptKeys *keep = attention_keep_keys(m, pass, l, &made);
    const Alignment align = align_layer(m, pass, l);
    RowsShape rows = score_edits(m, pass, l, keep);
    AttentionRows works = m->score_rows;
    if (align.works.s) {
        rows.more = align_block, rows.self = &align;
        works = align_works(&works, &align);
    }
    if (rows.kind || rows.more)
        attention_rows_backward(&m->gpu, dqkv, m->inner, &works, m->dy, k->qkv, k->y, k->lse,
                                &rows);
    else
        attention_backward(dqkv, m->inner, m->dy, k->qkv, k->y, k->lse, keep, nT / T, T, C, NH,
                           g->half, g->stream);
    linear_backward(m, pass, l, P_qkvw, fresh(dln, C, NULL), dqkv, k->ln, add, nT);
}

// out: mlp(LN(x[rows])); tied: of x[rows] + the attention's out, which joins the stream when it is
// read.
static void mlp_branch_forward(Model *m, const Pass *pass, int l) {
    const int i = BRANCHES * l + MLP;
    const size_t nT = tokens_of(m, &pass->plan->branch[i]);
    const Operands w = weights_at(m, l);
    const MlpSaved *k = &m->mlp[l];
    begin_branch(m, k->ln, k->xhat, k->rstd, rows_of(m, pass->plan, i), pass->plan->tied, w.ln2w,
                 w.ln2b);
    mlp_inside(m, pass, l, k, nT);
    linear_forward(m, pass, l, P_fcprojw, fresh(m->out, (size_t)m->config.C, w.fcprojb), k->gelu,
                   nT);
}

static void mlp_branch_backward(Model *m, const Pass *pass, int l, int add) {
    const size_t C = (size_t)m->config.C,
        nT = tokens_of(m, &pass->plan->branch[BRANCHES * l + MLP]);
    const Operands w = weights_at(m, l);
    const MlpSaved *k = &m->mlp[l];
    Result dh = fresh(m->dwide, 4 * C, NULL);
    void *dln = m->dy;
    if (k->ln == m->ln) layernorm_recompute(&m->gpu, k->ln, k->xhat, w.ln2w, w.ln2b, nT, C);
    if (k->h == m->redo) mlp_inside(m, pass, l, k, nT);
    dh.h = k->h;
    dh.gelu = m->args.recompute == RECOMPUTE_GELU ? k->gelu : NULL;
    linear_backward(m, pass, l, P_fcprojw, dh, m->dout, k->gelu, add, nT);
    linear_backward(m, pass, l, P_fcw, fresh(dln, C, NULL), dh.at, k->ln, add, nT);
}

// ---- Watches ----

// x[rows] += scale * out (n,T,C): adds a branch's pending output on its own.
template <class N> static __global__ void residual_kernel(float *x, const N *out, Rows end,
                                                          size_t BT, unsigned T, unsigned C) {
    const size_t i = thread_index(), token = i / C;
    const long place = token < BT ? row_place(end.place, token / T) : -1;
    if (place >= 0) x[i] += *end.scale * to_float(out[((size_t)place * T + token % T) * C + i % C]);
}

// Waits for n elements, in fp32 or N, and passes them on, through memory that is allocated only if
// a watch is used.
static void show(Model *m, const Watch *w, int point, const void *from, int is_float, size_t n) {
    const size_t number = is_float ? sizeof(float) : size_of_number(&m->gpu);
    if (!m->shown)
        m->shown = (float *)xcalloc((size_t)m->args.B * (size_t)m->args.T * (size_t)m->config.C,
                                    sizeof(float));
    CUDA_CHECK(cudaMemcpyAsync(m->shown, from, n * number, cudaMemcpyDeviceToHost, m->gpu.stream));
    CUDA_CHECK(cudaStreamSynchronize(m->gpu.stream));
    for (size_t i = n; number == sizeof(bf16) && i-- > 0;)
        m->shown[i] = to_float(((const bf16 *)(const void *)m->shown)[i]);
    if (point < 0) w->see_gradient(w->self, m->shown);
    else w->see(w->self, point, m->shown);
}

// Adds the last branch's output, which is still pending, to the stream.
static void settle(Model *m) {
    const size_t BT = (size_t)m->last_B * (size_t)m->last_T, n = BT * (size_t)m->config.C;
    const unsigned T = (unsigned)m->last_T, C = (unsigned)m->config.C;
    if (m->ended && m->gpu.half)
        LAUNCH(residual_kernel<bf16>, blocks_for(n), BLOCK, 0, m->gpu.stream, m->x,
               (const bf16 *)m->ended, m->end, BT, T, C);
    else if (m->ended)
        LAUNCH(residual_kernel<float>, blocks_for(n), BLOCK, 0, m->gpu.stream, m->x,
               (const float *)m->ended, m->end, BT, T, C);
    m->ended = NULL;
}

// Passes the stream to the watch that requested it: the last branch's output is then added first,
// and not as the next one begins.
static void look(Model *m, const Pass *pass, int point) {
    if (!pass->watch || !pass->watch->want[point]) return;
    settle(m);
    show(m, pass->watch, point, m->x, 1,
         (size_t)m->last_B * (size_t)m->last_T * (size_t)m->config.C);
}

// ---- A block with drop path ----
//
//     x <- x + s_a attn(LN(x))
//     x <- x + s_m mlp(LN(x))                          tied: x <- x + s (a + mlp(LN(x + a))),
//                                                            a = attn(LN(x))


// A branch on the rows that keep it: launched as a graph, or kernel by kernel.
static void branch_forward(Model *m, const Pass *pass, int l, int branch) {
    const int i = BRANCHES * l + branch;
    const size_t nT = tokens_of(m, &pass->plan->branch[i]);
    if (!nT) return;
    if (branch == ATTN) m->attention[l] = attention_save(m, nT);
    else m->mlp[l] = mlp_save(m, nT);
    if (graph_begin(m, pass, i, 0, 0, branch == ATTN ? m->attention[l].xhat : m->mlp[l].xhat)) {
        if (branch == ATTN) attention_branch_forward(m, pass, l);
        else mlp_branch_forward(m, pass, l);
        end_dropout(m, pass, i, m->out);
        graph_end(m);
    }
    end_branch(m, m->out, rows_of(m, pass->plan, i));
}

static void branch_backward(Model *m, const Pass *pass, int l, int branch) {
    const int i = BRANCHES * l + branch;
    if (!pass->plan->branch[i].n) return;
    const int add = gradient_add(m, l, branch, 0);
    const Operands w = weights_at(m, l);
    const Params dw = gradients_at(m, l);
    const AttentionSaved *a = &m->attention[l];
    const MlpSaved *k = &m->mlp[l];
    if (!graph_begin(m, pass, i, 1, add, branch == ATTN ? a->xhat : k->xhat)) return;
    end_dropout(m, pass, i, m->dout);
    if (branch == ATTN) {
        attention_branch_backward(m, pass, l, add);
        begin_branch_backward(m, pass, i, dw.ln1w, dw.ln1b, add, a->xhat, a->rstd, w.ln1w);
    } else {
        mlp_branch_backward(m, pass, l, add);
        begin_branch_backward(m, pass, i, dw.ln2w, dw.ln2b, add, k->xhat, k->rstd, w.ln2w);
    }
    graph_end(m);
}

static void block_forward(Model *m, const Pass *pass, int l) {
    branch_forward(m, pass, l, ATTN);
    look(m, pass, watch_after(l, ATTN));
    branch_forward(m, pass, l, MLP);
    look(m, pass, watch_after(l, MLP));
}

static void block_backward(Model *m, const Pass *pass, int l) {
    branch_backward(m, pass, l, MLP);
    branch_backward(m, pass, l, ATTN);
}

// ---- Forward and backward of the whole model ----

// Groups the batch's positions by token, in the order in which tokens first appear; returns the
// number of groups.
static int group_tokens(Model *m, const int *tokens, size_t BT) {
    int groups = 0, *first = m->host.first, *order = m->host.order;
    for (size_t i = 0; i <= BT; i++) first[i] = 0;
    for (size_t i = 0; i < BT; i++) {
        int *group = &m->group[tokens[i]];
        if (*group < 0) *group = groups++;
        first[*group + 1]++;
    }
    for (int g = 0; g < groups; g++) first[g + 1] += first[g];
    // moves first[g] to the start of group g + 1
    for (size_t i = 0; i < BT; i++) order[first[m->group[tokens[i]]]++] = (int)i;
    for (int g = groups; g > 0; g--) first[g] = first[g - 1];
    first[0] = 0;
    for (size_t i = 0; i < BT; i++) m->group[tokens[i]] = -1;
    return groups;
}

// Sends everything that a call reads from the host to the device at once. Returns the number of
// groups of equal tokens.
static int send_inputs(Model *m, const Batch *batch, const Pass *pass) {
    const size_t BT = (size_t)batch->rows * (size_t)batch->T, B = m->rows;
    const DropPlan *plan = pass->plan;
    int dummy = 0, groups = 0;
    Inputs unused;
    for (int i = 0; i < BRANCHES * plan->layers; i++) {
        int *place = m->host.place + (size_t)i * B;
        for (size_t row = 0; row < B; row++) place[row] = -1;
        for (int j = 0; j < plan->branch[i].n; j++) place[plan->branch[i].rows[j]] = j;
        memcpy(m->host.row + (size_t)i * B, plan->branch[i].rows,
               (size_t)plan->branch[i].n * sizeof(int));
        m->host.scale[i] = (float)plan->branch[i].scale;
    }
    for (int i = 0; i < NOISE_PLACES * plan->layers; i++)
        m->host.noise[i] = noise_place(pass->noise, i / plan->layers, i % plan->layers);
    for (int l = 0; l < plan->layers; l++) m->host.edit[l] = noise_scores(pass->noise, l);
    if (batch->tokens) memcpy(m->host.tokens, batch->tokens, BT * sizeof(int));
    if (batch->targets) memcpy(m->host.targets, batch->targets, BT * sizeof(int));
    if (pass->weight != 0) groups = group_tokens(m, batch->tokens, BT);
    CUDA_CHECK(cudaMemcpyAsync(m->device.place, m->host.place,
                               inputs_layout(m, &unused, &dummy) * sizeof(int),
                               cudaMemcpyHostToDevice, m->gpu.stream));
    return groups;
}

// The teacher of the loss read after layer l, if that has one, for tokens of this weight; its last
// run was on this batch. Exits have none.
static Soft soft_targets(const Model *m, const Pass *pass, int l, double weight) {
    const Soft none = {};
    if (pass_distill(pass) == 0 || pass_exits(pass, l)) return none;
    const Model *teacher = pass->objective->teacher;
    CHECK(teacher && teacher->last_B == m->last_B && teacher->last_T == m->last_T &&
          teacher->config.V == m->config.V, "the teacher has not run on this batch");
    const Soft soft = {teacher->lnf, weights_at(teacher, 0).wte, teacher->logits,
                       (size_t)teacher->config.C, (float)(weight * pass_distill(pass)),
                       (float)pass->objective->temperature};
    return soft;
}

// The pairs of tokens of the loss read after layer l, if it compares twins. Exits do not.
static Pairs twin_tokens(const Model *m, const Pass *pass, int l, double weight) {
    const Pairs none = {}, pairs = {m->twin_x, m->twin_d,
                                    (float)(2 * weight * pass_consistency(pass)), 1,
                                    pass->objective ? pass->objective->symmetric : 0};
    return pass_consistency(pass) == 0 || pass_exits(pass, l) ? none : pairs;
}

// The losses read after layer l, from lnf; in training also dy, the gradient of their share of the
// mean loss times weight with respect to lnf. They reach the host, as losses number `place`, at the
// end of the call.
static void model_loss(Model *m, const Batch *batch, const Pass *pass, int l, void *dy, int place) {
    const size_t BT = (size_t)batch->rows * (size_t)batch->T,
        at = (size_t)place * (size_t)m->args.B * (size_t)m->args.T;
    float *dwte = pass->weight != 0 ? gradients_at(m, 0).wte : NULL;
    const int add = pass->weight != 0 && !m->spent[gpt_branch_index(&m->config, 0, NO_BRANCH)];
    const double smoothing = pass_smoothing(pass),
        each = pass->weight / (double)batch_scored(batch),
        weight = pass_exit(pass, l) * pass->weight / (double)batch_scored(batch);
    const Soft soft = soft_targets(m, pass, l, weight);
    const Scoring y = {m->losses, m->uniform, m->distilled, m->apart, m->device.targets,
                       (float)(soft.x ? weight * (1 - pass_distill(pass)) : weight),
                       (float)smoothing, soft, twin_tokens(m, pass, l, each)};
    classifier(&m->gpu, &y, dy, dwte, add, m->logits, m->lnf, weights_at(m, 0).wte, BT,
               (size_t)m->config.C, (size_t)m->config.V);
    CUDA_CHECK(cudaMemcpyAsync(m->host_losses + at, m->losses, BT * sizeof(float),
                               cudaMemcpyDeviceToHost, m->gpu.stream));
    if (smoothing != 0)
        CUDA_CHECK(cudaMemcpyAsync(m->host_uniform + at, m->uniform, BT * sizeof(float),
                                   cudaMemcpyDeviceToHost, m->gpu.stream));
    if (y.soft.x)
        CUDA_CHECK(cudaMemcpyAsync(m->host_distilled, m->distilled, BT * sizeof(float),
                                   cudaMemcpyDeviceToHost, m->gpu.stream));
    if (y.pairs.on)
        CUDA_CHECK(cudaMemcpyAsync(m->host_apart, m->apart, BT * sizeof(float),
                                   cudaMemcpyDeviceToHost, m->gpu.stream));
}

// The loss read after layer l, whose losses number `place` have reached the host.
static double model_finish_exit(Model *m, const Batch *batch, const Pass *pass, int l, int place) {
    const size_t at = (size_t)place * (size_t)m->args.B * (size_t)m->args.T;
    const PartLosses losses = {{m->host_losses + at,
                                pass_smoothing(pass) != 0 ? m->host_uniform + at : NULL,
                                pass_distill(pass) != 0 && !place ? m->host_distilled : NULL,
                                pass_consistency(pass) != 0 && !place ? m->host_apart : NULL}};
    return pass_loss(m->part, batch, pass, l, &losses);
}

// Waits for the call to end; returns the loss.
static double model_finish(Model *m, const Batch *batch, const Pass *pass) {
    double loss = 0;
    align_send(m);
    CUDA_CHECK(cudaStreamSynchronize(m->gpu.stream));
    align_finish(m, pass);
    m->part[PART_EXITS] = 0;
    for (int l = 0, place = 0; l < m->config.L - 1 && batch->targets; l++)
        if (pass_exits(pass, l)) loss += model_finish_exit(m, batch, pass, l, ++place);
    return loss + model_finish_exit(m, batch, pass, m->config.L - 1, 0);
}

// An early exit, if there is one after layer l: the loss of the stream as it is there, through the
// same LayerNorm and head. Backward needs what its LayerNorm saves; frozen layers do not.
static void exit_forward(Model *m, const Batch *batch, const Pass *pass, int l) {
    const size_t nT = (size_t)batch->rows * (size_t)batch->T, C = (size_t)m->config.C;
    const size_t N = size_of_number(&m->gpu);
    const int trains = pass->weight != 0, saved = trains && l >= m->args.frozen;
    const Rows all = {NULL, NULL};
    const Operands w = weights_at(m, 0);
    ExitSaved *k = &m->exit[l];
    if (!pass_exits(pass, l) || !batch->targets) return;
    k->xhat = saved ? save(m, nT * C * N) : m->lnf_xhat;
    k->rstd = saved ? (float *)save(m, nT * sizeof(float)) : m->lnf_rstd;
    k->dy = saved ? save(m, nT * C * N) : m->dy;
    begin_branch(m, m->lnf, k->xhat, k->rstd, all, 0, w.lnfw, w.lnfb);
    if (trains) gradient_add(m, 0, NO_BRANCH, 1);        // each exit adds to them
    model_loss(m, batch, pass, l, k->dy, ++m->exits);
    if (!trains || saved) return;
    const Params dw = gradients_at(m, 0);
    residual_layernorm_backward(&m->gpu, m->dx, NULL, dw.lnfw, dw.lnfb, 1, k->dy, k->xhat, k->rstd,
                                all, all, 1, 0, w.lnfw, (size_t)batch->rows, (size_t)batch->T, C);
}

// dx += its gradient; then dout is that of the branch before it.
static void exit_backward(Model *m, const Pass *pass, int l) {
    const int before = branch_before_exit(pass, l);
    const Rows all = {NULL, NULL};
    const Params dw = gradients_at(m, 0);
    const ExitSaved *k = &m->exit[l];
    if (!pass_exits(pass, l)) return;
    residual_layernorm_backward(&m->gpu, m->dx, before < 0 ? NULL : m->dout, dw.lnfw, dw.lnfb, 1,
                                k->dy, k->xhat, k->rstd, all,
                                before < 0 ? all : rows_of(m, pass->plan, before), 0, 0,
                                weights_at(m, 0).lnfw, (size_t)m->last_B, (size_t)m->last_T,
                                (size_t)m->config.C);
}

static Grouped run_forward(Model *m, const Batch *batch, const Pass *pass) {
    const size_t B = (size_t)batch->rows, T = (size_t)batch->T, C = (size_t)m->config.C;
    const Rows all = {NULL, NULL};
    const Operands w = weights_at(m, 0);
    const Grouped by = {send_inputs(m, batch, pass), m->device.order, m->device.first};
    m->last_B = batch->rows;
    m->last_T = batch->T;
    save_nothing(m);
    m->ended = NULL;
    m->exits = 0;
    for (int l = 0; pass->entropy && l < m->config.L; l++) pass->entropy[l] = 0;
    if (m->compared) memset(m->compared, 0, (size_t)m->config.L);
    embedding_forward(&m->gpu, m->x, m->device.tokens, NULL, w.wte, w.wpe, B, T, C);
    if (pass->objective && pass->objective->shift)
        shift_stream(&m->gpu, m->x, m->dx, pass->objective->shift, B * T * C);
    if (noise_rate(pass->noise, NOISE_EMBD))
        dropout_stream(&m->gpu, m->x, noise_at(m, NOISE_EMBD, 0), B * T, T, C);
    look(m, pass, WATCH_EMBEDDINGS);
    for (int l = 0; l < m->config.L; l++) {
        // frozen layers need only one layer at a time
        if (pass->weight == 0 || l <= m->args.frozen) save_nothing(m);
        block_forward(m, pass, l);
        exit_forward(m, batch, pass, l);
    }
    begin_branch(m, m->lnf, m->lnf_xhat, m->lnf_rstd, all, 0, w.lnfw, w.lnfb);
    if (pass->watch && pass->watch->want[watch_features(m->config.L)])
        show(m, pass->watch, watch_features(m->config.L), m->lnf, 0, B * T * C);
    if (batch->targets) model_loss(m, batch, pass, m->config.L - 1, m->dy, 0);
    return by;
}

// Reduces the gradients of branch i over the ranks, concurrently with what follows on the main
// stream.
static void reduce_branch(Model *m, int i) {
    const int last = i == BRANCHES * m->config.L;
    const Ranks *r = &m->ranks;
    const Slice s = layout_span(&m->layout, &m->config, (size_t)i, 1);
    const size_t at = s.at - m->layout.n_frozen, share = s.n / (size_t)r->shares;
    const size_t mine = at + (r->shares > 1 ? (size_t)r->rank * share : 0);
    float *grad = m->slot[SLOT_GRAD];
    if (!s.n) return;
    // zeros, if only this rank dropped it
    gradient_add(m, last ? 0 : i / BRANCHES, last ? NO_BRANCH : i % BRANCHES, 1);
    ranks_begin(r, &m->gpu);
    if (m->wire)
        LAUNCH(round_kernel, blocks_for(s.n), BLOCK, 0, r->stream, m->wire + at, grad + at, s.n);
    ranks_sum(r, m->wire ? (void *)(m->wire + at) : grad + at, s.n, m->wire != NULL);
    if (m->wire)
        LAUNCH(widen_kernel, blocks_for(share), BLOCK, 0, r->stream, grad + mine, m->wire + mine,
               share);
}

static void run_backward(Model *m, const Batch *batch, const Pass *pass, Grouped by) {
    const int add = gradient_add(m, 0, NO_BRANCH, 0);
    const Operands w = weights_at(m, 0);
    const Params dw = gradients_at(m, 0);
    const unsigned char *reduce = m->ranks.world > 1 ? pass->reduce : NULL;
    begin_branch_backward(m, pass, BRANCHES * m->config.L, dw.lnfw, dw.lnfb, add, m->lnf_xhat,
                          m->lnf_rstd, w.lnfw);
    for (int l = m->config.L - 1; l >= m->args.frozen; l--) {
        exit_backward(m, pass, l);
        block_backward(m, pass, l);
        for (int i = BRANCHES * l + MLP; i >= BRANCHES * l + ATTN; i--)
            if (reduce && reduce[i]) reduce_branch(m, i);
    }
    if (!m->args.frozen && noise_rate(pass->noise, NOISE_EMBD))
        dropout_stream(&m->gpu, m->dx, noise_at(m, NOISE_EMBD, 0),
                       (size_t)batch->rows * (size_t)batch->T, (size_t)batch->T,
                       (size_t)m->config.C);
    if (pass->watch && pass->watch->see_gradient)
        show(m, pass->watch, -1, m->dx, 1,
             (size_t)batch->rows * (size_t)batch->T * (size_t)m->config.C);
    if (dw.wte && !m->args.frozen)
        embedding_backward(&m->gpu, dw.wte, dw.wpe, add, m->device.tokens, by, m->dx,
                           (size_t)batch->rows, (size_t)batch->T, (size_t)m->config.T,
                           (size_t)m->config.C);
    if (reduce) reduce_branch(m, BRANCHES * m->config.L);
}

static double model_run(Model *m, const Batch *batch, const Pass *pass) {
    engine_check_run(&m->config, &m->args, batch, pass);
    const Grouped by = run_forward(m, batch, pass);
    if (pass->weight != 0) run_backward(m, batch, pass, by);
    return model_finish(m, batch, pass);
}

static void model_losses(Model *m, real *host) {
    memcpy(host, m->host_losses, (size_t)m->last_B * (size_t)m->last_T * sizeof(real));
}

static void model_parts(Model *m, double part[N_PARTS]) { memcpy(part, m->part, sizeof m->part); }

static void model_logits(Model *m, int row, int t, real *host) {
    const size_t C = (size_t)m->config.C, V = (size_t)m->config.V;
    const Gpu *g = &m->gpu;
    CHECK(row >= 0 && row < m->last_B && t >= 0 && t < m->last_T,
          "no logits at row %d, position %d", row, t);
    const char *x = (const char *)m->lnf + ((size_t)row * (size_t)m->last_T + (size_t)t) * C *
        size_of_number(g);
    LAUNCH_AS(logits_kernel, g, C % WIDE == 0, blocks_for(V * WARP), BLOCK, 0, m->token_logits, x,
              C, weights_at(m, 0).wte, V, C);
    CUDA_CHECK(cudaMemcpyAsync(host, m->token_logits, V * sizeof(real), cudaMemcpyDeviceToHost,
                               g->stream));
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
}

// ---- Generation ----

// Caches keys and values of the stream as it is.
static void keys_forward(Model *m, const Pass *pass, int l) {
    const int i = BRANCHES * l + ATTN;
    const size_t nT = tokens_of(m, &pass->plan->branch[i]);
    const Operands w = weights_at(m, l);
    if (!nT) return;
    const AttentionSaved k = attention_save(m, nT);
    begin_branch(m, k.ln, k.xhat, k.rstd, rows_of(m, pass->plan, i), 0, w.ln1w, w.ln1b);
    linear_forward(m, pass, l, P_qkvw, fresh(k.qkv, 3 * (size_t)m->config.C, w.qkvb), k.ln, nT);
    m->begins = 1;                                       // nothing attends to them yet
    attention_continue(m, l, &k, rows_of(m, pass->plan, i));
}

// x (B,T,C) = the streams (sequences,most,C) at these positions or, with `stop`, the reverse.
static __global__ void stream_kernel(float *x, float *stream, const int *seq, const int *at,
                                     int stop, size_t n, unsigned T, unsigned most, unsigned C) {
    const size_t i = thread_index(), token = i / C, row = token / T;
    if (i >= n) return;
    const size_t place = ((size_t)seq[row] * most + (size_t)at[row] + token % T) * C + i % C;
    if (stop) stream[place] = x[i];
    else x[i] = stream[place];
}

// Reads the streams of a call's positions from the cache or, with `stop`, writes them there: they
// have stopped before layer `stop`.
static void stream_move(Model *m, int stop) {
    const size_t T = (size_t)m->last_T, most = (size_t)m->args.T, BT = (size_t)m->last_B * T,
        n = BT * (size_t)m->config.C;
    for (size_t i = 0; i < BT && stop; i++)
        m->stopped[(size_t)m->host.seq[i / T] * most + (size_t)m->host.at[i / T] + i % T] = stop;
    if (stop < m->config.L)
        LAUNCH(stream_kernel, blocks_for(n), BLOCK, 0, m->gpu.stream, m->x, m->stream,
               m->device.seq, m->device.at, stop, n, (unsigned)T, (unsigned)most,
               (unsigned)m->config.C);
}

// The logits of the stream as it is: after each row's last token, or after all.
static void decode_logits(Model *m, real *logits, int all) {
    const size_t B = (size_t)m->last_B, T = (size_t)m->last_T, C = (size_t)m->config.C,
        V = (size_t)m->config.V, n = all ? T : 1;
    const Rows every = {NULL, NULL};
    const Operands w = weights_at(m, 0);
    const Gpu *g = &m->gpu;
    const dim3 grid(blocks_for(V * WARP).x, (unsigned)B);
    begin_branch(m, m->lnf, m->lnf_xhat, m->lnf_rstd, every, 0, w.lnfw, w.lnfb);
    for (size_t t = T - n; t < T; t++) {
        const char *from = (const char *)m->lnf + t * C * size_of_number(g);
        LAUNCH_AS(logits_kernel, g, C % WIDE == 0, grid, BLOCK, 0, m->token_logits, from, T * C,
                  w.wte, V, C);
        for (size_t row = 0; row < (all ? B : 1); row++)
            CUDA_CHECK(cudaMemcpyAsync(logits + (row * n + t - (T - n)) * V,
                                       m->token_logits + row * V,
                                       (all ? 1 : B) * V * sizeof(real), cudaMemcpyDeviceToHost,
                                       g->stream));
    }
}

static void model_decode(Model *m, const DecodeArgs *a, const DropPlan *plan) {
    const size_t B = (size_t)plan->batch, T = (size_t)a->n, C = (size_t)m->config.C;
    const int to = decode_to(a, m->config.L);
    const Operands w = weights_at(m, 0);
    const Batch batch = batch_of(plan->batch, a->n, a->tokens, NULL);
    const Pass pass = pass_of(plan, 0);
    Gpu *g = &m->gpu;
    engine_check_decode(&m->config, &m->args, a, plan, m->stopped);
    memcpy(m->host.seq, a->seq, B * sizeof(int));
    memcpy(m->host.at, a->at, B * sizeof(int));
    send_inputs(m, &batch, &pass);
    m->last_B = plan->batch, m->last_T = a->n;
    m->ended = NULL;
    m->decoding = 1, m->begins = a->n > 1;
    for (size_t row = 0; row < B; row++) m->begins &= a->at[row] == 0;
    if (a->from) stream_move(m, 0);
    else embedding_forward(g, m->x, m->device.tokens, m->device.at, w.wte, w.wpe, B, T, C);
    for (int l = a->from; l < to; l++) {
        save_nothing(m);
        if (a->keys_only) keys_forward(m, &pass, l);
        else block_forward(m, &pass, l);
    }
    m->decoding = 0;
    if (to < m->config.L || a->stream) settle(m);
    stream_move(m, to);
    if (a->stream)
        CUDA_CHECK(cudaMemcpyAsync(a->stream, m->x, B * T * C * sizeof(real),
                                   cudaMemcpyDeviceToHost, g->stream));
    if (a->logits) decode_logits(m, a->logits, a->all);
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
}

// ---- AdamW (Loshchilov and Hutter 2019, algorithm 2), with the gradients clipped to a norm ----

// The sum of one value per thread, returned to the first thread; shared (blockDim.x).
static __device__ inline double block_sum_double(double x, double *shared) {
    shared[threadIdx.x] = x;
    __syncthreads();
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    return shared[0];
}

// norms[i] = the squared norm of chunk i's gradient, 0 for branches without one.
template <int W>
static __global__ void chunk_norms_kernel(double *norms, const float *grad,
                                          const UpdateChunk *chunk, const BranchUpdate *branch) {
    SHARED(double, shared);
    const UpdateChunk k = chunk[blockIdx.x];
    const BranchUpdate b = branch[k.branch];
    double each[W] = {}, sum = 0;
    if (b.t > 0 && !b.spent) {
#pragma unroll 4
        for (unsigned i = threadIdx.x * W; i < (unsigned)k.n; i += blockDim.x * W) {
            const Floats<W> g = load<float, W>(grad, k.grad + i);
            UNROLL for (int e = 0; e < W; e++) each[e] += (double)g.x[e] * (double)g.x[e];
        }
    }
    for (int e = 0; e < W; e++) sum += each[e];
    sum = block_sum_double(sum, shared);
    if (threadIdx.x == 0) norms[blockIdx.x] = sum;
}

// to = the sum of norms (n), or its square root. One block.
static __global__ void total_norm_kernel(double *to, const double *norms, int n, int root) {
    SHARED(double, shared);
    double sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += norms[i];
    sum = block_sum_double(sum, shared);
    if (threadIdx.x == 0) *to = root ? sqrt(sum) : sum;
}

// keep: what weight decay leaves of p
typedef struct { float b1, b2, eps, keep; double grad_clip, norm_limit; } AdamArgs;

typedef struct { int at_random; uint64_t seed; } Rounding;

// One of the two bf16 values around x, chosen at random such that their mean is x; x itself if it
// is exact in bf16. Adds 16 random bits below the bits that bf16 keeps (Gupta et al. 2015,
// stochastic rounding).
static __host__ __device__ inline float round_at_random(float x, uint32_t bits) {
    uint32_t word;
    if (!isfinite(x)) return x;
    memcpy(&word, &x, sizeof word);
    word = (word + bits) & 0xffff0000u;
    memcpy(&x, &word, sizeof x);
    return x;
}

// Copies elements j ... of chunk k, whose AdamW step is t, rounded. Random bits are a function of
// (seed, t, tensor, element).
template <int W>
static __device__ inline void store_rounded(bf16 *copy, const UpdateChunk &k, size_t j, Floats<W> p,
                                            int64_t t, Rounding r) {
    if (r.at_random) {
        const size_t element = k.element + j;            // a multiple of W
        const Philox bits = rng_words(r.seed, STREAM_ROUND, (uint64_t)t, k.tensor,
                                      (uint32_t)(element / 4));
        for (int e = 0; e < W; e++)
            p.x[e] = round_at_random(p.x[e], bits.v[W == 4 ? e : (int)(element % 4)] >> 16);
    }
    store<bf16, W>(copy, k.at + j, p);
}

// Rewrites the copy from p, as update number t of each branch left it.
template <int W>
static __global__ void round_chunks_kernel(bf16 *copy, const float *p, const UpdateChunk *chunk,
                                           const BranchUpdate *branch, Rounding r) {
    const UpdateChunk k = chunk[blockIdx.x];
    const int64_t t = branch[k.branch].t;
    if (t <= 0) return;                                  // as it was written
    for (size_t j = threadIdx.x * W; j < k.n; j += blockDim.x * W)
        store_rounded<W>(copy, k, j, load<float, W>(p, k.master + j), t, r);
}

// A block processes one chunk: updates p, m, v and the rounded copy of p from g; does nothing if
// the norm is not finite, too large for the moments or above the limit (update_is_taken).
template <int W>
static __global__ void adamw_kernel(float *p, bf16 *copy, const float *grad, float *m, float *v,
                                    const UpdateChunk *chunk, const BranchUpdate *branch,
                                    const double *norm, AdamArgs a, Rounding r) {
    const UpdateChunk k = chunk[blockIdx.x];
    const BranchUpdate b = branch[k.branch];
    // update_clip
    const double clip = a.grad_clip > 0 ? fmin(1.0, a.grad_clip / (*norm + 1e-6)) : 1;
    if (b.t <= 0 || !isfinite(*norm) || *norm * clip > UPDATE_MOST ||
        (a.norm_limit != 0 && *norm > a.norm_limit))
        return;
    const float shrink = (float)clip, keep = k.decay ? a.keep : 1;
    for (size_t j = threadIdx.x * W; j < k.n; j += blockDim.x * W) {
        Floats<W> pj = load<float, W>(p, k.master + j), g;
        Floats<W> mj = load<float, W>(m, k.moment + j), vj = load<float, W>(v, k.moment + j);
        for (int e = 0; e < W; e++) g.x[e] = 0;
        if (!b.spent) g = load<float, W>(grad, k.grad + j);
        for (int e = 0; e < W; e++) {
            const float ge = g.x[e] * shrink;
            mj.x[e] = a.b1 * mj.x[e] + (1 - a.b1) * ge;
            vj.x[e] = a.b2 * vj.x[e] + (1 - a.b2) * ge * ge;
            pj.x[e] = keep * pj.x[e] - b.rate * mj.x[e] / (sqrtf(vj.x[e]) * b.unbias + a.eps);
        }
        store<float, W>(m, k.moment + j, mj), store<float, W>(v, k.moment + j, vj), store<float,
            W>(p, k.master + j, pj);
        if (copy) store_rounded<W>(copy, k, j, pj, b.t, r);
    }
}

// The norm of the gradient, which is complete on all ranks or divided among them, to
// norms[n_chunks].
static void gradient_norm(Model *m) {
    const cudaStream_t stream = m->gpu.stream;
    double *total = m->norms + m->n_chunks;
    if (m->n_chunks)
        LAUNCH_WIDE(chunk_norms_kernel, m->config.C % WIDE == 0, (unsigned)m->n_chunks, BLOCK,
                    BLOCK * sizeof(double), stream, m->norms, m->slot[SLOT_GRAD], m->chunk,
                    m->update);
    LAUNCH(total_norm_kernel, 1, BLOCK, BLOCK * sizeof(double), stream, total, m->norms,
           m->n_chunks, m->ranks.shares == 1);
    if (m->ranks.shares == 1) return;
    ranks_begin(&m->ranks, &m->gpu);
    ranks_sum_double(&m->ranks, total);
    ranks_end(&m->ranks, &m->gpu);
    LAUNCH(total_norm_kernel, 1, BLOCK, BLOCK * sizeof(double), stream, total, total, 1, 1);
}

// After an update of shares, gathers the parameters that forward reads on all ranks, except those
// that no rank has updated (t (2L+1) is 0).
static void gather_parameters(Model *m, const int64_t *t) {
    ranks_begin(&m->ranks, &m->gpu);
    for (size_t i = 0; i <= (size_t)BRANCHES * (size_t)m->config.L; i++) {
        const Slice s = layout_span(&m->layout, &m->config, i, 1);
        if (t[i] <= 0 || !s.n) continue;
        ranks_gather(&m->ranks, m->copy ? (void *)(m->copy + s.at) : m->slot[SLOT_PARAM] + s.at,
                     s.n, m->copy != NULL);
    }
    ranks_end(&m->ranks, &m->gpu);
}

static Rounding rounding_of(const Model *m) {
    const Rounding r = {m->args.rounding == ROUNDING_STOCHASTIC, m->args.seed};
    return r;
}

static double model_update(Model *m, const UpdateArgs *a) {
    CHECK(m->slot[SLOT_GRAD], "this model was opened to evaluate");
    const size_t branches = (size_t)BRANCHES * (size_t)m->config.L + 1;
    const cudaStream_t stream = m->gpu.stream;
    const AdamArgs args = {(float)a->beta1, (float)a->beta2, (float)a->eps,
                           (float)(1 - a->lr * a->weight_decay),
                           a->grad_clip, a->norm_limit};
    for (size_t i = 0; i < branches; i++) {
        const double t = (double)a->t[i];
        const BranchUpdate b = {t > 0 ? (float)(a->lr / (1 - pow(a->beta1, t))) : 0,
                                t > 0 ? (float)(1 / sqrt(1 - pow(a->beta2, t))) : 0, a->t[i],
                                m->spent[i]};
        m->host_update[i] = b;
    }
    CUDA_CHECK(cudaMemcpyAsync(m->update, m->host_update, branches * sizeof *m->update,
                               cudaMemcpyHostToDevice, stream));
    if (m->ranks.world > 1) ranks_end(&m->ranks, &m->gpu);
    gradient_norm(m);
    if (!a->discard && m->n_chunks)
        LAUNCH_WIDE(adamw_kernel, m->config.C % WIDE == 0, (unsigned)m->n_chunks, BLOCK, 0, stream,
                    m->slot[SLOT_PARAM], m->copy, m->slot[SLOT_GRAD], m->slot[SLOT_M],
                    m->slot[SLOT_V], m->chunk, m->update, m->norms + m->n_chunks, args,
                    rounding_of(m));
    if (!a->discard && m->ranks.shares > 1) gather_parameters(m, a->t);
    CUDA_CHECK(cudaMemcpyAsync(m->host_norm, m->norms + m->n_chunks, sizeof(double),
                               cudaMemcpyDeviceToHost, stream));
    ranks_wait(&m->ranks, &m->gpu);
    if (a->discard || update_is_taken(a, *m->host_norm)) memset(m->spent, 1, branches);
    return *m->host_norm;
}

// Written weights were rounded to nearest.
static void model_resumed(Model *m, const int64_t *t) {
    const size_t branches = (size_t)BRANCHES * (size_t)m->config.L + 1;
    if (m->args.rounding == ROUNDING_NEAREST || !m->slot[SLOT_GRAD]) return;
    for (size_t i = 0; i < branches; i++) m->host_update[i].t = t[i];
    CUDA_CHECK(cudaMemcpyAsync(m->update, m->host_update, branches * sizeof *m->update,
                               cudaMemcpyHostToDevice, m->gpu.stream));
    if (m->n_chunks)
        LAUNCH_WIDE(round_chunks_kernel, m->config.C % WIDE == 0, (unsigned)m->n_chunks, BLOCK, 0,
                    m->gpu.stream, m->copy, m->slot[SLOT_PARAM], m->chunk, m->update,
                    rounding_of(m));
    if (m->ranks.shares > 1) gather_parameters(m, t);
    ranks_wait(&m->ranks, &m->gpu);
}

// ---- The engine ----

static float *param_at(Model *m, Slot slot, int param, int layer) {
    CHECK(m->slot[slot], "this model was opened to evaluate");
    CHECK(param >= 0 && param < N_PARAMS && layer >= 0 &&
          layer < gpt_param_layers(&m->config, param),
          "no parameter %d in layer %d", param, layer);
    CHECK(slot == SLOT_PARAM || gpt_param_trains(&m->config, param, layer, m->args.frozen),
          "parameter %d of layer %d is frozen", param, layer);
    if (slot == SLOT_GRAD) gradient_add(m, layer, gpt_param[param].branch, 1);
    const size_t absent = slot == SLOT_GRAD ? m->layout.n_frozen : absent_of(m, slot);
    return m->slot[slot] + (param_offset(m, param, layer) - absent);
}

// Whether a tensor exists rounded only.
static int is_only_rounded(const Model *m, Slot slot, int param, int layer) {
    return slot == SLOT_PARAM && absent_of(m, slot) &&
        !gpt_param_trains(&m->config, param, layer, m->args.frozen);
}

// Gathers a tensor whose parts are divided among the ranks on all of them.
static void read_shared(Model *m, Slot slot, int param, int layer, real *host) {
    const size_t n = gpt_param_size(&m->config, param), at = param_offset(m, param, layer);
    const size_t branch = gpt_branch_index(&m->config, layer, gpt_param[param].branch);
    float *whole = (float *)device_alloc("a tensor to be saved", n * sizeof *whole);
    ranks_begin(&m->ranks, &m->gpu);
    for (int rank = 0; rank < m->ranks.world; rank++) {
        size_t place;
        const Slice part = share_of(m, branch, rank, at, n, &place);
        if (part.n)
            ranks_send(&m->ranks, whole + (part.at - at),
                       m->slot[slot] + (place - absent_of(m, slot)), part.n, rank);
    }
    ranks_end(&m->ranks, &m->gpu);
    CUDA_CHECK(cudaMemcpyAsync(host, whole, n * sizeof(real), cudaMemcpyDeviceToHost,
                               m->gpu.stream));
    ranks_wait(&m->ranks, &m->gpu);
    CUDA_CHECK(cudaFree(whole));
}

// The values of the rounded copy of one tensor.
static void read_copy(Model *m, int param, int layer, real *host) {
    const size_t n = gpt_param_size(&m->config, param);
    bf16 *rounded = (bf16 *)xcalloc(n, sizeof *rounded);
    CUDA_CHECK(cudaMemcpyAsync(rounded, m->copy + param_offset(m, param, layer),
                               n * sizeof *rounded, cudaMemcpyDeviceToHost, m->gpu.stream));
    CUDA_CHECK(cudaStreamSynchronize(m->gpu.stream));
    for (size_t i = 0; i < n; i++) host[i] = to_float(rounded[i]);
    free(rounded);
}

// The rounded copy of one tensor, from the host's values.
static void write_copy(Model *m, int param, int layer, const real *host) {
    const size_t n = gpt_param_size(&m->config, param);
    bf16 *rounded = (bf16 *)xcalloc(n, sizeof *rounded);
    for (size_t i = 0; i < n; i++) rounded[i] = from_float<bf16>(host[i]);
    CUDA_CHECK(cudaMemcpyAsync(m->copy + param_offset(m, param, layer), rounded,
                               n * sizeof *rounded, cudaMemcpyHostToDevice, m->gpu.stream));
    CUDA_CHECK(cudaStreamSynchronize(m->gpu.stream));
    free(rounded);
}

// This rank's part of it, which may be empty.
static void write_shared(Model *m, Slot slot, int param, int layer, const real *host) {
    const size_t n = gpt_param_size(&m->config, param), at = param_offset(m, param, layer);
    size_t place;
    const Slice part = share_of(m, gpt_branch_index(&m->config, layer, gpt_param[param].branch),
                                m->ranks.rank, at, n, &place);
    if (part.n)
        CUDA_CHECK(cudaMemcpyAsync(m->slot[slot] + (place - absent_of(m, slot)),
                                   host + (part.at - at), part.n * sizeof(real),
                                   cudaMemcpyHostToDevice, m->gpu.stream));
    CUDA_CHECK(cudaStreamSynchronize(m->gpu.stream));
}

static void model_read(Model *m, Slot slot, int param, int layer, real *host) {
    const size_t n = gpt_param_size(&m->config, param);
    if (is_only_rounded(m, slot, param, layer)) {
        read_copy(m, param, layer, host);
        return;
    }
    if (is_shared(m, slot)) {
        read_shared(m, slot, param, layer, host);
        return;
    }
    // reductions of gradients may be in flight
    if (m->ranks.world > 1) ranks_end(&m->ranks, &m->gpu);
    CUDA_CHECK(cudaMemcpyAsync(host, param_at(m, slot, param, layer), n * sizeof(real),
                               cudaMemcpyDeviceToHost, m->gpu.stream));
    CUDA_CHECK(cudaStreamSynchronize(m->gpu.stream));
}

static void model_write(Model *m, Slot slot, int param, int layer, const real *host) {
    if (is_only_rounded(m, slot, param, layer)) {
        write_copy(m, param, layer, host);
        return;
    }
    if (is_shared(m, slot)) write_shared(m, slot, param, layer, host);
    else {
        float *to = param_at(m, slot, param, layer);
        CUDA_CHECK(cudaMemcpyAsync(to, host, gpt_param_size(&m->config, param) * sizeof(real),
                                   cudaMemcpyHostToDevice, m->gpu.stream));
        CUDA_CHECK(cudaStreamSynchronize(m->gpu.stream));
    }
    if (slot == SLOT_PARAM && m->copy) write_copy(m, param, layer, host);
}

// Values in (-1, 1), for a measurement: matmuls of zeros are faster, since they use less power.
template <class N, int W> static __global__ void fill_kernel(void *to, size_t n) {
    const size_t i = thread_index() * W;
    if (i >= n) return;
    Floats<W> v;
    for (int k = 0; k < W; k++)
        v.x[k] = (float)((unsigned)(i + k) * 2654435761u >> 8) * 0x1p-23f - 1;
    store<N, W>(to, i, v);
}

// Square matmuls, growing until a few take a while; then the best of many groups of them, each
// timed by the device, since the host's clock would add 20 us for launch and wait. (8192: more than
// a device runs at once.)
static double model_peak(Model *m, double seconds) {
    enum { LEAST = 128, MOST = 8192, GROUP = 4 };
    Gpu *g = &m->gpu;
    const double end = clock_seconds() + seconds;
    double best = 0;
    const Timer timer = timer_new(g->stream);
    for (size_t n = LEAST, enough = 0; best == 0 || clock_seconds() < end;) {
        const size_t bytes = n * n * size_of_number(g);
        char *work = (char *)device_alloc("the measurement of the peak", 3 * bytes);
        LAUNCH_AS(fill_kernel, g, 1, blocks_for(2 * n * n / WIDE), BLOCK, 0, work, 2 * n * n);
        // chooses its algorithm
        multiply(g, fresh(work + 2 * bytes, n, NULL), matrix(work, n), transposed(work + bytes, n),
                 n, n, n);
        CUDA_CHECK(cudaStreamSynchronize(g->stream));
        do {
            timer_start(&timer);
            for (int i = 0; i < GROUP; i++)
                multiply(g, fresh(work + 2 * bytes, n, NULL), matrix(work, n),
                         transposed(work + bytes, n), n, n, n);
            // the resolution of events is 0.5 us
            const double run = 1e-3 * fmax(timer_stop(&timer), 1e-3) / GROUP;
            best = fmax(best, 2.0 * (double)n * (double)n * (double)n / run);
            enough = run > 2e-3 || n == MOST;
        } while (enough && clock_seconds() < end);
        CUDA_CHECK(cudaFree(work));
        n *= enough ? 1 : 2;
    }
    timer_free(&timer);
    return best;
}

// Where choices hold: the device, the library's version and the dtype.
static char *tune_where(const Gpu *g) {
    cudaDeviceProp device;
    int number;
    CUDA_CHECK(cudaGetDevice(&number));
    CUDA_CHECK(cudaGetDeviceProperties(&device, number));
    return xprintf("%s, compute capability %d.%d, cublasLt %zu, %s", device.name, device.major,
                   device.minor, cublasLtGetVersion(), g->half ? "bf16" : g->tf32 ? "tf32"
                   : "fp32");
}

// Reads the choices of a file. Returns 0, after one line on standard error, if that is impossible.
static int tune_read(MatmulChoices *c, const char *where, const char *path) {
    FileMap map;
    const char *error = file_map(&map, path);
    if (!error) {
        error = matmul_choices_parse(c, where, map.data, map.size);
        file_unmap(&map);
    }
    if (error)
        warn("%s is not used: %s; matmuls are measured again, so the bits of a resumed run may "
             "differ", path, error);
    return !error;
}

// Runs every shape of matmul of a training step once, in the last layer: a branch on 1 .. B rows,
// or on B only; twice, since only the first backward pass after an update overwrites the gradients.
static void tune_rehearse(Model *m, int by_rows) {
    const int L = m->config.L, B = m->args.B, T = m->args.T, train = m->slot[SLOT_GRAD] != NULL;
    int *tokens = (int *)xcalloc((size_t)B * (size_t)T, sizeof *tokens);
    unsigned char *kept = (unsigned char *)xcalloc((size_t)B, 1);
    DropPlan plan = drop_plan_new(L, B);
    Graph *const graphs = m->graph;
    const size_t peak = m->saved_peak;
    for (int i = 0; i < BRANCHES * L; i++) drop_plan_keep(&plan, i, kept, B, 1);
    m->graph = NULL;                                     // nothing is recorded
    for (int n = by_rows ? 1 : B; n <= B; n++) {
        for (int i = 0; i < n; i++) kept[i] = 1;
        memset(m->spent, 1, (size_t)BRANCHES * (size_t)L + 1);
        for (int b = 0; b < BRANCHES; b++)
            drop_plan_keep(&plan, BRANCHES * (L - 1) + b, kept, B, 1);
        const Batch batch = batch_of(B, T, tokens, tokens);
        const Pass pass = pass_of(&plan, train ? 1 : 0);
        for (int i = 0; i <= train; i++) model_run(m, &batch, &pass);
    }
    m->graph = graphs, m->saved_peak = peak;
    drop_plan_free(&plan);
    free(kept), free(tokens);
}

// Zeroes the gradients of a rehearsal.
static void tune_forget(Model *m) {
    const size_t branches = (size_t)BRANCHES * (size_t)m->config.L + 1;
    int64_t *t = (int64_t *)xcalloc(branches, sizeof *t);
    UpdateArgs args;
    memset(&args, 0, sizeof args);
    for (size_t i = 0; i < branches; i++) t[i] = 1;
    args.t = t, args.discard = 1;
    if (m->slot[SLOT_GRAD]) model_update(m, &args);
    free(t);
}

// Chooses each matmul's form and algorithm. Rank 0 reads, measures what the file lacks and writes;
// the others do as it does, and where they have another device take the default, so that no choice
// depends on more than this file. Afterwards nothing is measured: a shape that comes later gets the
// default form and the first algorithm.
static void model_tune(Model *m, const TuneArgs *args) {
    Gpu *g = &m->gpu;
    const Comm *comm = m->args.comm;
    const int first = !comm || comm->rank == 0;
    if (!g->search || g->plain || g->sums_inside) return;        // asked for otherwise
    char *where = tune_where(g);
    Text text = {NULL, 0, 0};
    if (first) {
        const char *from = args->file && path_exists(args->file) ? args->file : args->before;
        const int read = from && path_exists(from) && tune_read(&g->choices, where, from);
        for (int i = 0; i < g->n_matmuls; i++) matmul_free(&g->matmul[i]);
        g->n_matmuls = 0, g->measure = 1;
        tune_rehearse(m, args->by_rows);
        g->measure = 0;
        text = matmul_choices_text(&g->choices, where);
        char *error = args->file && (g->measured || !read || from != args->file)
            ? file_try_replace(args->file, text.s, text.n) : NULL;
        if (error)
            warn("%s: a resumed run will measure its matmuls anew, and may differ in bits", error);
        free(error);
    }
    uint64_t size = text.n;
    comm_broadcast(comm, &size, sizeof size);
    if (!first) text.s = (char *)xcalloc(size + 1, 1);
    comm_broadcast(comm, text.s, size);
    if (!first && matmul_choices_parse(&g->choices, where, text.s, size))
        warn("rank %d has another device than rank 0 (%s): its matmuls are not measured",
             comm->rank, where);
    tune_forget(m);
    g->search = 0;
    free(where), free(text.s);
}

#ifndef CUDA_ENGINE
#define CUDA_ENGINE engine_cuda
#endif

// Its name is the device's, which must be queried first.
const Engine *CUDA_ENGINE(void) {
    static char name[300] = "GPU";
    static const Engine engine = {
        name, DTYPE_BF16, CAN_TF32 | CAN_RECOMPUTE | CAN_GRAPH | CAN_ROUND | CAN_SHARE,
        model_open, model_run, model_losses, model_parts, model_logits, model_decode, model_update,
        model_read, model_write, model_resumed, model_memory, model_peak, model_close,
        model_tune,
    };
    cudaDeviceProp device;
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0 &&
        cudaGetDeviceProperties(&device, 0) == cudaSuccess)
        snprintf(name, sizeof name, "GPU, %s", device.name);
    return &engine;
}

#ifndef ENGINE_ONLY                                      // the tools and the tests link the engine
                                                         // without its main
#include "dev/run/trainer.h"

int main(int argc, char **argv) {
    program_begin(argv);
    return trainer_main(argc, argv, engine_cuda());
}
#endif
