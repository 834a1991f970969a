// test_cuda.cu: the GPU engine's kernels, each against a plain computation in double, at sizes
// around those of its tiles, in every storage type. The engine is part of this object, because its
// kernels are static; the tests of whole steps (test_engine.h, test_parity.h) run on it as well.
//
// Under the emulator, all device memory starts as NaN, and each array is exactly sized, so that a
// sanitizer detects accesses outside it.

#define ENGINE_ONLY
#define GRAPHS 4                                         // so few that they evict each other
#include "../../train_gpt.cu"
#include "test.h"
#include "test_cuda.h"

// ---- Arrays ----

// Element i of array `id`, in (-1, 1), exact in bf16.
static float number(int id, size_t i) {
    return to_float(
        from_float<bf16>((float)(2 * uniform01(rng_words(0, STREAM_TEST, i, (uint32_t)id, 9).v[0]) -
                                 1)));
}

static float *numbers(int id, size_t n) {
    float *x = (float *)xcalloc(n + 1, sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = number(id, i);
    return x;
}

static void *device_new(size_t bytes) {
    void *p = NULL;
    CUDA_CHECK(cudaMalloc(&p, bytes));
    return p;
}

static void *device_copy(const void *host, size_t bytes) {
    void *p = device_new(bytes);
    CUDA_CHECK(cudaMemcpy(p, host, bytes, cudaMemcpyHostToDevice));
    return p;
}

static float *device_floats(int id, size_t n) {
    float *host = numbers(id, n), *p = (float *)device_copy(host, n * sizeof *host);
    free(host);
    return p;
}

// n elements of the storage type: those of numbers(id, n) or, without an id, uninitialized.
static void *device_numbers(const Gpu *g, int id, size_t n) {
    if (id < 0) return device_new(n * size_of_number(g));
    float *host = numbers(id, n);
    bf16 *half = (bf16 *)xcalloc(n + 1, sizeof *half);
    for (size_t i = 0; i < n; i++) half[i] = from_float<bf16>(host[i]);
    void *p = device_copy(g->half ? (const void *)half : host, n * size_of_number(g));
    free(host);
    free(half);
    return p;
}

static float *host_floats(const Gpu *g, const void *device, size_t n, int half) {
    float *x = (float *)xcalloc(n + 1, sizeof *x);
    bf16 *raw = (bf16 *)xcalloc(n + 1, sizeof *raw);
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    CUDA_CHECK(cudaMemcpy(half ? (void *)raw : x, device, n * (half ? sizeof *raw : sizeof *x),
                          cudaMemcpyDeviceToHost));
    for (size_t i = 0; half && i < n; i++) x[i] = to_float(raw[i]);
    free(raw);
    return x;
}

static void device_free(void *p) { CUDA_CHECK(cudaFree(p)); }

// ---- Expectations ----

static const int dtypes[] = {DTYPE_FP32, DTYPE_TF32, DTYPE_BF16};
static const char *const dtype_names[] = {"fp32", "bf16", "auto", "tf32"};   // by DTYPE_*
#define EACH_DTYPE(dtype) for (int dtype : dtypes)

static Gpu test_gpu(int dtype, size_t C) {
    Gpu g;
    memset(&g, 0, sizeof g);
    gpu_open(&g, dtype, NULL);
    g.partial = (float *)device_new(PARTIAL * C * sizeof(float));
    g.sum = (float *)device_new(4 * C * sizeof(float));
    return g;
}

static void test_gpu_close(Gpu *g) {
    device_free(g->partial);
    device_free(g->sum);
    gpu_close(g);
}

// The elements at `device` (of N, or floats) equal want (n) within the rounding of the storage
// type, and of float sums of n terms whose squares sum to size^2.
static void expect_numbers(const Gpu *g, const void *device, const double *want, size_t n, int sums,
                           double terms, double size, const char *what) {
    float *got = host_floats(g, device, n, g->half && !sums);
    const double stored = g->half && !sums ? 1.0 / 256 : 1.2e-7,
        made = 4 * 1.2e-7 * (sqrt(terms) + 4) * size;
    int wrong = 0;
    for (size_t i = 0; i < n && wrong < 3; i++)
        if (!(fabs((double)got[i] - want[i]) <= made + stored * (fabs(want[i]) + made)))
            wrong++, EXPECT(0, "%s: number %zu of %zu is %.9g, want %.9g +- %.2g", what, i, n,
                            (double)got[i], want[i], made + stored * fabs(want[i]));
    free(got);
}

static double *doubles(size_t n) { return (double *)xcalloc(n + 1, sizeof(double)); }

static double gelu_double(double x) {
    return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

static double gelu_slope_double(double x) {
    const double u = sqrt(2 / M_PI) * (x + 0.044715 * x * x * x), t = tanh(u);
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}

// ---- Matmuls ----

// gelu: 1 of y, 2 of h
typedef struct { size_t M, N, K; int a_transposed, b_transposed, sums, add, bias, gelu, b_sum;
                 } MatmulCase;

// What the matmul should write: y and gelu (M,N); if it accumulates, y was array 5 (float or N).
static void matmul_by_hand(double *y, double *gelu, const MatmulCase *p, int half) {
    for (size_t i = 0; i < p->M; i++)
        for (size_t j = 0; j < p->N; j++) {
            double sum = p->bias ? number(3, j) : 0;
            for (size_t k = 0; k < p->K; k++)
                sum += (double)number(1, p->a_transposed ? k * p->M + i : i * p->K + k) *
                       (double)number(2, p->b_transposed ? j * p->K + k : k * p->N + j);
            const size_t at = i * p->N + j;
            const double h = number(4, at);
            y[at] = (p->add ? number(5, at) : 0) +
                (p->gelu == 2 ? sum * gelu_slope_double(h) : sum);
            gelu[at] = gelu_double(p->gelu == 2 ? h : half ? to_float(from_float<bf16>((float)sum))
                                   : sum);
        }
}

static void expect_product(Gpu *g, const MatmulCase *p, int dtype) {
    const size_t n = p->M * p->N;
    double *want = doubles(n), *want_gelu = doubles(n);
    void *a = device_numbers(g, 1, p->M * p->K), *b = device_numbers(g, 2, p->K * p->N),
        *bias = device_numbers(g, 3, p->N);
    void *h = device_numbers(g, 4, n), *gelu = device_numbers(g, -1, n);
    void *at = p->sums ? device_floats(5, n) : device_numbers(g, 5, n);
    const Result y = {at, p->N, p->sums, p->add, p->bias ? bias : NULL, p->gelu == 2 ? h : NULL,
                      p->gelu ? gelu : NULL,
                      p->b_sum ? g->sum : NULL, 1, 1, 0};
    char *name = xprintf("%s (%zu,%zu,%zu)%s%s%s%s%s%s%s", dtype_names[dtype], p->M, p->N, p->K,
                         p->a_transposed ? " a transposed" : "", p->b_transposed ?
                             " b transposed" : "",
                         p->sums ? " float" : "", p->add ? " +=" : "", p->bias ? " bias" : "",
                         p->gelu == 1 ? " gelu" : p->gelu ? " gelu'" : "",
                         p->b_sum ? " b_sum" : "");
    multiply(g, y, p->a_transposed ? transposed(a, p->M) : matrix(a, p->K),
             p->b_transposed ? transposed(b, p->K) : matrix(b, p->N), p->M, p->N, p->K);
    matmul_by_hand(want, want_gelu, p, g->half);
    // tf32 has the 8 bits that these elements need, so its products are exact as well. GELU' can
    // double an error, and if y was rounded before its epilogue there are two roundings.
    const double twice = g->half ? 4000 * (p->bias + p->gelu) : 0;
    expect_numbers(g, at, want, n, p->sums, (double)p->K, 2 * sqrt((double)p->K) / 3 + twice, name);
    double *want_sum = doubles(p->N);
    for (size_t i = 0; i < p->K * p->N; i++) want_sum[i % p->N] += number(2, i);
    if (p->b_sum)
        expect_numbers(g, g->sum, want_sum, p->N, 1, (double)p->K, sqrt((double)p->K), name);
    free(want_sum);
    if (p->gelu)
        expect_numbers(g, gelu, want_gelu, n, 0, (double)p->K,
                       2 * sqrt((double)p->K) + (g->half ? 4000 : 10), name);
    free(name), free(want), free(want_gelu);
    device_free(a), device_free(b), device_free(bias), device_free(h), device_free(gelu),
        device_free(at);
}

// Which epilogues the emulated library supports (dev/emu/cublasLt.h); no effect on a device.
static void emulated_epilogues(const char *which) {
    if (which) setenv("EMU_EPILOGUES", which, 1);
    else unsetenv("EMU_EPILOGUES");
}

// Those that the engine uses, at sizes that are, and are not, multiples of what cuBLASLt requires
// for its epilogues.
void test_cuda_matmuls(void) {
    static const size_t sizes[][3] = {{1, 1, 1}, {3, 8, 5}, {17, 21, 33}, {40, 24, 16}, {5, 64, 70},
                                      {64, 12, 3}};
    enum { FUSED, PLAIN, REFUSED, WAYS };                // refused: requested, but the library has
                                                         // no kernel for it
    EACH_DTYPE(dtype) for (int way = 0; way < WAYS; way++) {
        Gpu g = test_gpu(dtype, 64);
        g.plain = way == PLAIN, g.sums_inside = 1;
        emulated_epilogues(way == REFUSED ? "0" : NULL);
        for (auto s : sizes) {
            const size_t M = s[0], N = s[1], K = s[2];
            const MatmulCase cases[] = {
                {M, N, K, 0, 0, 0, 0, 0, 0, 0}, {M, N, K, 0, 0, 0, 0, 1, 0, 0},
                {M, N, K, 0, 0, 0, 0, 1, 1, 0}, {M, N, K, 0, 1, 0, 0, 0, 0, 0},
                {M, N, K, 0, 1, 0, 0, 0, 2, 0}, {M, N, K, 1, 0, 1, 0, 0, 0, 0},
                {M, N, K, 1, 0, 1, 1, 0, 0, 0}, {M, N, K, 1, 0, 1, 0, 0, 0, 1},
                {M, N, K, 1, 0, 1, 1, 0, 0, 1},
            };
            for (const MatmulCase &p : cases) expect_product(&g, &p, dtype);
        }
        test_gpu_close(&g);
    }
    emulated_epilogues(NULL);
}

// An algorithm that fails is not chosen, whichever it is; if all fail, there is none.
void test_cuda_search_fails(void) {
#ifdef CUDA_EMULATED
    const size_t M = 384, N = 384, K = 352;
    for (int fails = 0; fails < 2; fails++) {
        Gpu g = test_gpu(DTYPE_BF16, N);
        g.search = 1;
        void *a = device_numbers(&g, 1, M * K), *b = device_numbers(&g, 2, K * N);
        float *y = device_floats(3, M * N);
        const Matrix left = transposed(a, M), right = matrix(b, N);
        Result to = summed(y, N, 0);
        to.b_sum = g.sum, g.sums_inside = 1;
        setenv("EMU_ALGORITHMS_FAIL", fails ? "2" : "1", 1);
        multiply(&g, to, left, right, M, N, K);
        const Matmul *p = &g.matmul[0];
        EXPECT(p->algorithm.data[1] == (uint64_t)!fails, "algorithm %d fails and is taken", fails);
        EXPECT(p->fused, "an algorithm runs with the epilogue, but is not taken");
        setenv("EMU_ALGORITHMS_FAIL", "3", 1);
        cublasLtMatmulHeuristicResult_t all[2];
        for (int i = 0; i < 2; i++) all[i].algo = p->algorithm, all[i].algo.data[1] = (uint64_t)i;
        EXPECT(matmul_search(&g, p, all, 2, &left, &right, NULL) < 0,
               "no algorithm runs, and one is taken");
        unsetenv("EMU_ALGORITHMS_FAIL");
        device_free(a), device_free(b), device_free(y);
        test_gpu_close(&g);
    }
#endif
}

// Bias gradients are computed by the library only if requested.
void test_cuda_bias_sums(void) {
    for (int inside = 0; inside < 2; inside++) {
        Gpu g = test_gpu(DTYPE_BF16, 64);
        EXPECT(!g.sums_inside, "they are the library's by default");
        g.sums_inside = inside;
        const MatmulCase p = {64, 64, 32, 1, 0, 1, 0, 0, 0, 1};
        expect_product(&g, &p, DTYPE_BF16);
        EXPECT(g.matmul[0].fused == inside, "asked for: %d, done: %d", inside, g.matmul[0].fused);
        test_gpu_close(&g);
    }
}

// A search gives the bits of the first algorithm, does not change what it accumulates into, and
// runs once per shape.
void test_cuda_products_search(void) {
    const size_t M = 384, N = 384, K = 352;
    EACH_DTYPE(dtype) {
        float *results[2];
        for (int search = 0; search < 2; search++) {
            Gpu g = test_gpu(dtype, N);
            g.search = search;
            void *a = device_numbers(&g, 1, M * K), *b = device_numbers(&g, 2, K * N);
            float *y = device_floats(3, M * N);
            Result to = summed(y, N, 1);
            to.b_sum = g.sum, g.sums_inside = 1;
            for (int i = 0; i < 2; i++) multiply(&g, to, transposed(a, M), matrix(b, N), M, N, K);
            EXPECT(g.n_matmuls == 1, "%d products for one shape", g.n_matmuls);
            results[search] = host_floats(&g, y, M * N, 0);
            device_free(a), device_free(b), device_free(y);
            test_gpu_close(&g);
        }
        EXPECT(!memcmp(results[0], results[1], M * N * sizeof(float)),
               "%s: the search changes bits", dtype_names[dtype]);
        free(results[0]), free(results[1]);
    }
}

// All algorithms can turn out to be the fastest, also when accumulating: here the second is the
// same as the first, so that it wins now and then.
void test_cuda_search_compares(void) {
    const size_t n = 32;
    for (int add = 0; add < 2; add++) {
        Gpu g = test_gpu(DTYPE_FP32, n);
        float *a = device_floats(1, n * n), *b = device_floats(2, n * n),
            *y = device_floats(3, n * n);
        const Matrix left = matrix(a, n), right = matrix(b, n);
        multiply(&g, summed(y, n, add), left, right, n, n, n);
        cublasLtMatmulHeuristicResult_t twice[2];
        twice[0].algo = twice[1].algo = g.matmul[0].algorithm;
        int second = 0;
        for (int i = 0; i < 200 && !second; i++)
            second = matmul_search(&g, &g.matmul[0], twice, 2, &left, &right, NULL);
        EXPECT(second, "with add %d the second algorithm is never taken", add);
        device_free(a), device_free(b), device_free(y);
        test_gpu_close(&g);
    }
}

void test_cuda_column_sums(void) {
    static const size_t sizes[][2] = {{1, 1}, {2, 3}, {63, 40}, {65, 5}, {200, 130}, {9000, 4},
                                      {8300, 3}};
    EACH_DTYPE(dtype)
        for (auto s : sizes)
            for (int add = 0; add < 2; add++) {
                const size_t M = s[0], N = s[1];
                Gpu g = test_gpu(dtype, N);
                void *y = device_numbers(&g, 1, M * N);
                float *sum = device_floats(2, N);
                double *want = doubles(N);
                for (size_t i = 0; i < M * N; i++) want[i % N] += number(1, i);
                for (size_t j = 0; add && j < N; j++) want[j] += number(2, j);
                column_sums(&g, sum, add, y, M, N);
                expect_numbers(&g, sum, want, N, 1, (double)M, sqrt((double)M), "column sums");
                free(want), device_free(y), device_free(sum);
                test_gpu_close(&g);
            }
}

void test_cuda_gelu(void) {
    static const float special[] = {0, -30, -31, 30, 100, -1e30f, 1e30f, -INFINITY, INFINITY, NAN};
    enum { SPECIAL = sizeof special / sizeof special[0] };
    EACH_DTYPE(dtype)
        for (size_t n = 1; n < 2100; n = n * 3 + 1) {
            Gpu g = test_gpu(dtype, 1);
            float *x = numbers(1, n);
            double *want = doubles(n);
            bf16 *half = (bf16 *)xcalloc(n, sizeof *half);
            for (size_t i = 0; i < n; i++) {
                x[i] = i % 2 && i / 2 < SPECIAL ? special[i / 2] : 8 * x[i];
                half[i] = from_float<bf16>(x[i]);
                want[i] = gelu_double(to_float(g.half ? half[i] : from_float<bf16>(x[i])));
            }
            void *from = device_copy(g.half ? (const void *)half : x, n * size_of_number(&g)),
                *y = device_numbers(&g, -1, n);
            gelu_forward(&g, y, from, n);
            float *got = host_floats(&g, y, n, g.half);
            for (size_t i = 0; i < n; i++) {
                const float seen = g.half ? to_float(half[i]) : x[i];
                const double value = seen < -30 ? 0 : seen > 30 ? (double)seen
                    : gelu_double((double)seen);
                EXPECT(isnan(seen) ? isnan(got[i]) : value == (double)got[i] ||
                       fabs((double)got[i] - value) <= (g.half ? 1.0 / 256 : 1e-6) * fabs(value) +
                       1e-6,
                       "GELU(%g) is %g, want %g", (double)seen, (double)got[i], value);
            }
            free(got), free(x), free(want), free(half), device_free(from), device_free(y);
            test_gpu_close(&g);
        }
}

// ---- Embedding ----

// Tokens that occur once, a few times, and more often than a block has warps; positions without any
// token.
void test_cuda_embedding(void) {
    // B T C V
    static const size_t sizes[][4] = {{1, 1, 1, 1}, {2, 3, 5, 7}, {3, 40, 20, 3}, {5, 9, 64, 50},
                                      {1, 70, 132, 2}};
    for (auto s : sizes)
        for (int add = 0; add < 2; add++) {
            const size_t B = s[0], T = s[1], C = s[2], V = s[3], T_all = T + 2, BT = B * T;
            Gpu g = test_gpu(DTYPE_FP32, C);
            Model m;
            memset(&m, 0, sizeof m);
            m.group = (int *)xcalloc(V, sizeof(int));
            m.host.order = (int *)xcalloc(BT, sizeof(int)),
                m.host.first = (int *)xcalloc(BT + 1, sizeof(int));
            for (size_t v = 0; v < V; v++) m.group[v] = -1;
            int *tokens = (int *)xcalloc(BT, sizeof(int));
            for (size_t i = 0; i < BT; i++) tokens[i] = (int)(i * i % V);
            const int groups = group_tokens(&m, tokens, BT);
            int *on_device = (int *)device_copy(tokens, BT * sizeof(int));
            const Grouped by = {groups, (int *)device_copy(m.host.order, BT * sizeof(int)),
                                (int *)device_copy(m.host.first,
                                                   (size_t)(groups + 1) * sizeof(int))};
            float *x = (float *)device_new(BT * C * sizeof(float)), *dx = device_floats(3, BT * C);
            void *wte = device_numbers(&g, 1, V * C), *wpe = device_numbers(&g, 2, T_all * C);
            float *dwte = device_floats(4, V * C), *dwpe = device_floats(5, T_all * C);
            double *want = doubles(BT * C), *want_te = doubles(V * C),
                *want_pe = doubles(T_all * C);
            for (size_t i = 0; i < V * C; i++) want_te[i] = number(4, i);
            for (size_t i = 0; i < T_all * C; i++) want_pe[i] = add ? number(5, i) : 0;
            for (size_t i = 0; i < BT * C; i++) {
                const size_t te = (size_t)tokens[i / C] * C + i % C, pe = i / C % T * C + i % C;
                want[i] = (double)number(1, te) + (double)number(2, pe);
                want_te[te] += number(3, i), want_pe[pe] += number(3, i);
            }
            embedding_forward(&g, x, on_device, NULL, wte, wpe, B, T, C);
            expect_numbers(&g, x, want, BT * C, 1, 2, 1, "embedding");
            embedding_backward(&g, dwte, dwpe, add, on_device, by, dx, B, T, T_all, C);
            expect_numbers(&g, dwte, want_te, V * C, 1, (double)BT, sqrt((double)BT),
                           "gradient of tokens");
            expect_numbers(&g, dwpe, want_pe, T_all * C, 1, (double)B, sqrt((double)B),
                           "gradient of positions");
            void *const device[] = {on_device, (void *)by.order, (void *)by.first, x, dx, wte, wpe,
                                    dwte, dwpe};
            for (void *p : device) device_free(p);
            free(m.group), free(m.host.order), free(m.host.first), free(tokens), free(want),
                free(want_te), free(want_pe);
            test_gpu_close(&g);
        }
}

// ---- The residual stream and LayerNorm ----

enum { ROWS_MAX = 8 };
// device, scale: on the device
typedef struct { int n, place[ROWS_MAX], *device; float *scale; } TestRows;

// Of B rows, those whose bits are set; all rows need no index, and get one with `index`.
static TestRows rows_new(size_t B, unsigned bits, float scale, int index) {
    TestRows r;
    r.n = 0, r.scale = (float *)device_copy(&scale, sizeof scale);
    for (size_t row = 0; row < B; row++) r.place[row] = bits >> row & 1 ? r.n++ : -1;
    r.device = (size_t)r.n < B || index ? (int *)device_copy(r.place, B * sizeof(int)) : NULL;
    return r;
}

static Rows rows_given(const TestRows *r) {
    const Rows rows = {r->device, r->scale};
    return rows;
}

// bits of rows; end 0: no preceding branch
typedef struct { size_t B, T, C; unsigned end, begin; int tied, index; } NormCase;

static const NormCase norm_cases[] = {
    {1, 1, 1, 0, 1, 0, 0}, {1, 2, 5, 1, 1, 0, 0}, {3, 5, 20, 5, 7, 0, 0}, {3, 5, 21, 7, 2, 0, 1},
    {4, 3, 128, 9, 6, 0, 0}, {4, 3, 132, 15, 15, 0, 1}, {4, 3, 100, 5, 5, 1, 0},
    {2, 7, 64, 3, 3, 1, 0}, {5, 2, 7, 16, 16, 1, 0},
    {2, 3, 300, 0, 2, 0, 0},
    {2, 1, 3200, 1, 3, 0, 0}, {2, 1, 6400, 1, 3, 0, 0},
};

static void layernorm_by_hand(double *ln, double *xhat, double *rstd, const double *z,
                              const float *w, const float *b, size_t C) {
    double mean = 0, variance = 0;
    for (size_t c = 0; c < C; c++) mean += z[c] / (double)C;
    for (size_t c = 0; c < C; c++) variance += (z[c] - mean) * (z[c] - mean) / (double)C;
    *rstd = 1 / sqrt(variance + 1e-5);
    for (size_t c = 0; c < C; c++) xhat[c] = (z[c] - mean) * *rstd, ln[c] = xhat[c] * w[c] + b[c];
}

static void expect_layernorm_forward(int dtype, const NormCase *k) {
    const size_t B = k->B, T = k->T, C = k->C, n = B * T * C;
    Gpu g = test_gpu(dtype, C);
    TestRows end = rows_new(B, k->end, 1.25f, k->index), begin = rows_new(B, k->begin, 1, k->index);
    const size_t n_end = (size_t)end.n * T * C, n_begin = (size_t)begin.n * T * C;
    float *x = device_floats(1, n), *w = numbers(3, C), *b = numbers(4, C),
        *rstd = (float *)device_new(n_begin / C * 4);
    void *out = device_numbers(&g, 2, n_end + 1), *ln = device_numbers(&g, -1, n_begin);
    void *xhat = device_numbers(&g, -1, n_begin);
    void *again = device_numbers(&g, -1, n_begin), *dw = device_numbers(&g, 3, C),
        *db = device_numbers(&g, 4, C);
    double *want_x = doubles(n), *want_ln = doubles(n), *want_xhat = doubles(n),
        *want_rstd = doubles(B * T), *z = doubles(C);
    for (size_t i = 0; i < n; i++) want_x[i] = number(1, i);
    for (size_t row = 0; row < B; row++)
        for (size_t t = 0; t < T; t++) {
            double *at = want_x + (row * T + t) * C;
            for (size_t c = 0; c < C; c++) {
                const double o = end.place[row] <
                    0 ? 0 : number(2, ((size_t)end.place[row] * T + t) * C + c);
                z[c] = at[c] + o;
                at[c] += 1.25 * o;
                if (!k->tied) z[c] = at[c];
            }
            if (begin.place[row] < 0) continue;
            const size_t to = (size_t)begin.place[row] * T + t;
            layernorm_by_hand(want_ln + to * C, want_xhat + to * C, want_rstd + to, z, w, b, C);
        }
    residual_layernorm_forward(&g, x, ln, xhat, rstd, k->end ? out : NULL, rows_given(&end),
                               rows_given(&begin), k->tied, dw, db, B, T, C);
    layernorm_recompute(&g, again, xhat, dw, db, n_begin / C, C);
    expect_numbers(&g, x, want_x, n, 1, 2, 1, "stream");
    expect_numbers(&g, xhat, want_xhat, n_begin, 0, (double)C, 1, "xhat");
    // from a rounded xhat
    expect_numbers(&g, ln, want_ln, n_begin, 0, (double)C, g.half ? 2000 : 1, "LayerNorm");
    for (size_t i = 0; i < n_begin / C; i++) want_rstd[i] = fmin(want_rstd[i], 1e3);
    if (C > 1) expect_numbers(&g, rstd, want_rstd, n_begin / C, 1, (double)C, 4, "1 / sigma");
    float *first = host_floats(&g, ln, n_begin, g.half),
        *second = host_floats(&g, again, n_begin, g.half);
    if (C > 1)
        EXPECT(g.half ? !memcmp(first, second, n_begin * 4) : 1,
               "LayerNorm made again has other bits");
    void *const device[] = {end.device, end.scale, begin.device, begin.scale, x, rstd, out, ln,
                            xhat, again, dw, db};
    void *const host[] = {w, b, want_x, want_ln, want_xhat, want_rstd, z, first, second};
    for (void *p : device) device_free(p);
    for (void *p : host) free(p);
    test_gpu_close(&g);
}

void test_cuda_layernorm_forward(void) {
    EACH_DTYPE(dtype)
        for (const NormCase &k : norm_cases) expect_layernorm_forward(dtype, &k);
}

// The kernel's `begin` is the branch whose gradient comes in, `end` the preceding one, which gets
// dout.
static void expect_layernorm_backward(int dtype, const NormCase *k, int fresh, int add) {
    const size_t B = k->B, T = k->T, C = k->C, n = B * T * C;
    Gpu g = test_gpu(dtype, C);
    TestRows end = rows_new(B, k->end, 1.25f, k->index),
        begin = rows_new(B, fresh ? ~0u : k->begin, 1, k->index);
    const size_t n_end = (size_t)end.n * T * C, n_begin = (size_t)begin.n * T * C;
    float *rstd = device_floats(4, n_begin / C), *dw = device_floats(6, C),
        *db = device_floats(7, C);
    float *dx = fresh ? (float *)device_new(n * sizeof(float)) : device_floats(1, n);
    void *dy = device_numbers(&g, 2, n_begin), *xhat = device_numbers(&g, 3, n_begin);
    void *dout = device_numbers(&g, -1, n_end + 1), *w = device_numbers(&g, 5, C);
    double *want_dx = doubles(n), *want_dout = doubles(n), *want_dw = doubles(C),
        *want_db = doubles(C);
    for (size_t c = 0; c < C && add; c++) want_dw[c] = number(6, c), want_db[c] = number(7, c);
    for (size_t row = 0; row < B; row++)
        for (size_t t = 0; t < T; t++) {
            double *to = want_dx + (row * T + t) * C, mean = 0, along = 0;
            const size_t from = ((size_t)begin.place[row] * T + t) * C;
            for (size_t c = 0; c < C && begin.place[row] >= 0; c++) {
                const double dyc = number(2, from + c), h = number(3, from + c),
                    v = dyc * number(5, c);
                mean += v / (double)C, along += v * h / (double)C;
                want_dw[c] += dyc * h, want_db[c] += dyc;
            }
            for (size_t c = 0; c < C; c++) {
                const double old = fresh ? 0 : number(1, (row * T + t) * C + c);
                const double z = begin.place[row] < 0 ? 0 : number(4, from / C) *
                                 (number(2, from + c) * number(5, c) - mean - number(3, from + c) *
                                  along);
                to[c] = old + z;
                if (end.place[row] < 0) continue;
                want_dout[((size_t)end.place[row] * T + t) * C + c] = k->tied ? 1.25 * old +
                    z : 1.25 * to[c];
            }
        }
    residual_layernorm_backward(&g, dx, k->end ? dout : NULL, dw, db, add, dy, xhat, rstd,
                                rows_given(&begin), rows_given(&end), fresh, k->tied, w, B, T, C);
    expect_numbers(&g, dx, want_dx, n, 1, (double)C, 2, "dx");
    if (k->end) expect_numbers(&g, dout, want_dout, n_end, 0, (double)C, 2, "dout");
    expect_numbers(&g, dw, want_dw, C, 1, (double)(B * T), sqrt((double)(B * T)), "dw");
    expect_numbers(&g, db, want_db, C, 1, (double)(B * T), sqrt((double)(B * T)), "db");
    void *const device[] = {end.device, end.scale, begin.device, begin.scale, rstd, w, dw, db, dx,
                            dy, xhat, dout};
    void *const host[] = {want_dx, want_dout, want_dw, want_db};
    for (void *p : device) device_free(p);
    for (void *p : host) free(p);
    test_gpu_close(&g);
}

void test_cuda_layernorm_backward(void) {
    EACH_DTYPE(dtype)
        for (const NormCase &k : norm_cases)
            for (int add = 0; add < 2; add++) {
                expect_layernorm_backward(dtype, &k, 0, add);
                if (!k.tied) expect_layernorm_backward(dtype, &k, 1, add);
            }
    // more tokens than warps run at once
    const NormCase many = {8, 600, 12, 0xAA, 0x5F, 0, 0};
    expect_layernorm_backward(DTYPE_FP32, &many, 0, 1);
}

// ---- Classifier ----

// The logits of row t, spread so that some probabilities are large.
static double logit(size_t t, size_t v, size_t V) { return 8 * (double)number(1, t * V + v); }

static void expect_softmax(int dtype, size_t rows, size_t V, float grad) {
    const size_t Vp = padded_vocabulary(V);
    Gpu g = test_gpu(dtype, 1);
    // the padding is not zero: it must not be read
    float *host = numbers(2, rows * Vp);
    int *targets = (int *)xcalloc(rows, sizeof(int));
    bf16 *half = (bf16 *)xcalloc(rows * Vp, sizeof *half);
    double *want = doubles(rows), *want_grad = doubles(rows * Vp);
    for (size_t t = 0; t < rows; t++) {
        double sum = 0;
        targets[t] = t % 4 == 3 ? -5 : (int)((t * 7 + V - 1) % V);
        for (size_t v = 0; v < V; v++)
            host[t * Vp + v] = (float)logit(t, v, V), sum += exp(logit(t, v, V));
        if (targets[t] < 0) continue;
        want[t] = log(sum) - logit(t, (size_t)targets[t], V);
        for (size_t v = 0; v < V; v++)
            want_grad[t * Vp + v] =
                (double)grad * (exp(logit(t, v, V)) / sum - (v == (size_t)targets[t]));
    }
    for (size_t i = 0; i < rows * Vp; i++) half[i] = from_float<bf16>(host[i]);
    void *logits = device_copy(g.half ? (const void *)half : host, rows * Vp * size_of_number(&g));
    int *on_device = (int *)device_copy(targets, rows * sizeof(int));
    float *losses = (float *)device_new(rows * sizeof(float));
    float *const none = NULL;
    if (g.half)
        LAUNCH((softmax_loss_kernel<bf16, false>), (unsigned)rows, 128, 256, g.stream, losses, none,
               logits, on_device, grad, 0.f, V, Vp);
    else
        LAUNCH((softmax_loss_kernel<float, false>), (unsigned)rows, 128, 256, g.stream, losses,
               none, logits, on_device, grad, 0.f, V, Vp);
    expect_numbers(&g, losses, want, rows, 1, (double)V, 4, "loss");
    if (grad != 0)
        expect_numbers(&g, logits, want_grad, rows * Vp, 0, 16, (double)grad,
                       "gradient of the logits");
    free(host), free(half), free(targets), free(want), free(want_grad);
    device_free(logits), device_free(on_device), device_free(losses);
    test_gpu_close(&g);
}

void test_cuda_softmax_loss(void) {
    static const size_t sizes[] = {1, 2, 7, 127, 128, 129, 500, 1024, 1031, 4100};
    EACH_DTYPE(dtype)
        for (size_t V : sizes) expect_softmax(dtype, 5, V, 0), expect_softmax(dtype, 6, V, 0.125f);
}

// Chunk by chunk, the same losses, dx and dwte, set or accumulated, as one matmul would give.
void test_cuda_classifier_chunks(void) {
    enum { BT = 300, C = 6, V = 301 };
    EXPECT(classifier_chunk(BT, V, sizeof(float)) < BT,
           "chunks of %zu rows: too many for this test", classifier_chunk(BT, V, sizeof(float)));
    for (int add = 0; add < 2; add++) {
        const size_t Vp = padded_vocabulary(V);
        Gpu g = test_gpu(DTYPE_FP32, C);
        int targets[BT];
        float *wte = numbers(2, Vp * C);
        double *loss = doubles(BT), *dx = doubles(BT * C), *dwte = doubles(Vp * C), z[V];
        for (size_t i = V * C; i < Vp * C; i++) wte[i] = 0;
        for (size_t i = 0; add && i < Vp * C; i++) dwte[i] = number(3, i);
        for (size_t t = 0; t < BT; t++) {
            double sum = 0;
            targets[t] = (int)(t * 13 % V);
            for (size_t v = 0; v < V; v++) {
                z[v] = 0;
                for (size_t c = 0; c < C; c++)
                    z[v] += (double)number(1, t * C + c) * (double)wte[v * C + c];
                sum += exp(z[v]);
            }
            loss[t] = log(sum) - z[targets[t]];
            for (size_t v = 0; v < V; v++) {
                const double p = 0.5 * (exp(z[v]) / sum - ((int)v == targets[t]));
                for (size_t c = 0; c < C; c++) {
                    dx[t * C + c] += p * (double)wte[v * C + c];
                    dwte[v * C + c] += p * (double)number(1, t * C + c);
                }
            }
        }
        float *x = device_floats(1, BT * C), *losses = (float *)device_new(BT * 4),
            *got_dx = (float *)device_new(BT * C * 4);
        float *got_dwte = device_floats(3, Vp * C),
            *logits = (float *)device_new(classifier_chunk(BT, V, 4) * Vp * 4);
        void *on_device = device_copy(wte, Vp * C * 4),
            *where = device_copy(targets, sizeof targets);
        const Scoring y = {losses, NULL, NULL, NULL, (int *)where, 0.5f, 0, {}, {}};
        classifier(&g, &y, got_dx, got_dwte, add, logits, x, on_device, BT, C, V);
        expect_numbers(&g, losses, loss, BT, 1, V, 2, "losses");
        expect_numbers(&g, got_dx, dx, BT * C, 1, V, 1, "dx");
        expect_numbers(&g, got_dwte, dwte, Vp * C, 1, BT, 2, "dwte");
        void *const device[] = {x, losses, got_dx, got_dwte, logits, on_device, where};
        for (void *p : device) device_free(p);
        free(wte), free(loss), free(dx), free(dwte);
        test_gpu_close(&g);
    }
}

void test_cuda_logits(void) {
    static const size_t sizes[][2] = {{1, 1}, {9, 5}, {33, 64}, {257, 132}, {12, 129}};
    EACH_DTYPE(dtype)
        for (auto s : sizes) {
            const size_t V = s[0], C = s[1];
            Gpu g = test_gpu(dtype, 1);
            void *x = device_numbers(&g, 1, C), *wte = device_numbers(&g, 2, V * C);
            float *logits = (float *)device_new(V * sizeof(float));
            double *want = doubles(V);
            for (size_t i = 0; i < V * C; i++)
                want[i / C] += (double)number(2, i) * (double)number(1, i % C);
            LAUNCH_AS(logits_kernel, &g, C % WIDE == 0, blocks_for(V * WARP), BLOCK, 0, logits, x,
                      C, wte, V, C);
            expect_numbers(&g, logits, want, V, 1, (double)C, sqrt((double)C), "logits");
            free(want), device_free(x), device_free(wte), device_free(logits);
            test_gpu_close(&g);
        }
}

// ---- The norm: reduction of its parts, more of them than a block has threads ----

void test_cuda_norm(void) {
    static const int sizes[] = {1, 2, 255, 256, 257, 1000};
    Gpu g = test_gpu(DTYPE_FP32, 1);
    for (int n : sizes) {
        double sum = 0, *host = doubles((size_t)n + 1), got;
        for (int i = 0; i < n; i++) sum += host[i] = fabs((double)number(1, (size_t)i));
        void *norms = device_copy(host, ((size_t)n + 1) * sizeof *host);
        LAUNCH(total_norm_kernel, 1, BLOCK, BLOCK * sizeof(double), g.stream, (double *)norms + n,
               (double *)norms, n, 1);
        CUDA_CHECK(cudaStreamSynchronize(g.stream));
        CUDA_CHECK(cudaMemcpy(&got, (double *)norms + n, sizeof got, cudaMemcpyDeviceToHost));
        EXPECT_CLOSE(got, sqrt(sum), 1e-14 * n, "norm");
        free(host), device_free(norms);
    }
    test_gpu_close(&g);
}

// ---- Internals of the engine ----

#include "test_cuda_attention.h"
#include "test_cuda_choices.h"
#include "test_cuda_graphs.h"
#include "test_cuda_update.h"
#include "test_cuda_arenas.h"
