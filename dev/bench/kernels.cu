// kernels.cu: the GPU engine's kernels, as fractions of what the device can do at that moment.
//
//     build/kernels_cuda                                   all tables; writes
//                                                          build/kernels_cuda.json
//     build/kernels_cuda --only attention --preset gpt2    one table, one preset
//
// Peaks come first: for matmuls the largest cuBLASLt matmul, for memory a copy on the device.
// README.md in this directory explains the rows, measure.h how they are measured; times come from
// events on the device. Every row is first checked against a plain computation in double precision;
// a wrong result ends the program with exit code 1.
#define ENGINE_ONLY
#include "../../train_gpt.cu"                            // the kernels are static
#include "../files/files.h"
#include "../run/options.h"
#include "adam.h"
#include "cuda_cases.h"

// ---- Options ----

//  OPTION(field, name, type, default, domain, help)
#define BENCH_OPTIONS(HEADING, OPTION)                                                   \
  HEADING("Bench")                                                                       \
    OPTION(only, "only", CHOICE, "all", "all|peak|matmul|layers|attention", "one table") \
    OPTION(size, "size", INTEGER, "8192", "[16,32768]",                                  \
           "side of the product that shows the peak; 4 size^2 bytes are copied")         \
    CUDA_BENCH_OPTIONS(OPTION, "build/kernels_cuda.json")

OPTION_TABLE(BENCH_OPTIONS, BenchOptions, bench_options)
enum { ONLY_ALL, ONLY_PEAK, ONLY_MATMUL, ONLY_LAYERS, ONLY_ATTENTION };
enum { ROUNDS = 6 };

// ---- Time on the device ----

// For a row whose arg begins with a Timer.
static double timer_slice(const MeasureRow *r, int runs) {
    const Timer *t = (const Timer *)r->arg;
    timer_start(t);
    for (int i = 0; i < runs; i++) r->run(r->arg);
    return 1e-3 * timer_stop(t);
}

static MeasureRow *timed_row(MeasureTable *t, const char *name, const char *unit, double work,
                             void (*run)(void *), double (*check)(void *), void *arg,
                             double tolerance, MeasureRow *peak) {
    MeasureRow *r = measure_row(t, "%s", name);
    r->unit = unit, r->work = work, r->run = run, r->check = check, r->arg = arg,
        r->tolerance = tolerance, r->peak = peak;
    r->slice = timer_slice;
    return r;
}

// ---- Inputs, and a plain matmul as reference ----

template <class N> __global__ void fill_kernel(void *x, size_t n, float size, int id) {
    const size_t i = thread_index();
    if (i >= n) return;
    const float u = 2 * (float)uniform01(rng_words(0, STREAM_TEST, i, (uint32_t)id, 0).v[0]) - 1;
    ((N *)x)[i] = from_float<N>(size * u);
}

// n elements uniform in (-size, size), of the model's type N (or with `sums` float), in their own
// memory.
static void *device_filled(const Gpu *g, int sums, size_t n, float size, int id) {
    const int half = g->half && !sums;
    void *x = device_alloc("a benchmark's arrays", n * (half ? sizeof(bf16) : sizeof(float)));
    if (half) LAUNCH(fill_kernel<bf16>, blocks_for(n), BLOCK, 0, g->stream, x, n, size, id);
    else LAUNCH(fill_kernel<float>, blocks_for(n), BLOCK, 0, g->stream, x, n, size, id);
    return x;
}

// host (n) = elements from `first` on of an array of N, or with `sums` of float.
static void device_read(const Gpu *g, float *host, const void *from, int sums, size_t first,
                        size_t n) {
    const int half = g->half && !sums;
    bf16 *work = (bf16 *)xcalloc(n, sizeof *work);
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    if (half)
        CUDA_CHECK(cudaMemcpy(work, (const bf16 *)from + first, n * sizeof(bf16),
                              cudaMemcpyDeviceToHost));
    else
        CUDA_CHECK(cudaMemcpy(host, (const float *)from + first, n * sizeof(float),
                              cudaMemcpyDeviceToHost));
    for (size_t i = 0; half && i < n; i++) host[i] = to_float(work[i]);
    free(work);
}

static double device_number(const Gpu *g, const void *from, int sums, size_t i) {
    float x;
    device_read(g, &x, from, sums, i, 1);
    return (double)x;
}

typedef struct { size_t i, j; } Place;

template <class N>
__global__ void matmul_reference_kernel(double *sums, const Place *place, Matrix a, Matrix b,
                                         size_t n, size_t K) {
    const size_t s = thread_index();
    if (s >= n) return;
    const Place p = place[s];
    const N *x = (const N *)a.at + (a.transposed ? p.i : p.i * a.ld),
        *y = (const N *)b.at + (b.transposed ? p.j * b.ld : p.j);
    double sum = 0;
    for (size_t k = 0; k < K; k++)
        sum += (double)to_float(x[a.transposed ? k * a.ld : k]) *
            (double)to_float(y[b.transposed ? k : k * b.ld]);
    sums[s] = sum;
}

// sums (n): of a (M,K) b (K,N), in double, the elements at the places (n).
static void matmul_reference(const Gpu *g, double *sums, const Place *place, Matrix a, Matrix b,
                              size_t n, size_t K) {
    double *work = (double *)device_alloc("a reference", n * sizeof *work);
    Place *places = (Place *)device_alloc("a reference", n * sizeof *places);
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    CUDA_CHECK(cudaMemcpy(places, place, n * sizeof *places, cudaMemcpyHostToDevice));
    if (g->half)
        LAUNCH(matmul_reference_kernel<bf16>, blocks_for(n), BLOCK, 0, g->stream, work, places, a,
               b, n, K);
    else
        LAUNCH(matmul_reference_kernel<float>, blocks_for(n), BLOCK, 0, g->stream, work, places, a,
               b, n, K);
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    CUDA_CHECK(cudaMemcpy(sums, work, n * sizeof *sums, cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaFree(work));
    CUDA_CHECK(cudaFree(places));
}

// The error of rounding a stored element: half a unit of an element six times the root mean square.
static double stored_error(const Gpu *g) { return g->half ? 6.0 / 512 : 0; }

// The error of a matmul with K terms: fp32 sums, which tensor cores truncate rather than round;
// tf32 keeps 10 bits of an operand.
static double matmul_error(const Gpu *g, int sums, size_t K) {
    return 4 * rounding((double)K) + (sums ? 0 : stored_error(g)) + (g->tf32 ? 8.0 / 2048 : 0);
}

static double gelu_double(double x) {
    return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
}

static double gelu_slope_double(double x) {
    const double th = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + th) + 0.5 * x * (1 - th * th) * 0.7978845608028654 *
        (1 + 3 * 0.044715 * x * x);
}

// ---- Matmuls ----

typedef struct {
    Timer timer;
    Gpu *g;
    Matrix a, b;
    Result y;
    size_t M, N, K;
    double times;                                        // how often a training step performs it
} MatmulRow;

static void matmul_row_run(void *arg) {
    const MatmulRow *p = (const MatmulRow *)arg;
    multiply(p->g, p->y, p->a, p->b, p->M, p->N, p->K);
}

static double matmul_row_check(void *arg) {
    const MatmulRow *p = (const MatmulRow *)arg;
    const Gpu *g = p->g;
    double want[SAMPLES];
    Place place[SAMPLES];
    Deviation y = {0, 0, 0}, gelu = {0, 0, 0};
    for (int s = 0; s < SAMPLES; s++) place[s].i = pick(p->M, s, 0), place[s].j = pick(p->N, s, 1);
    matmul_reference(g, want, place, p->a, p->b, SAMPLES, p->K);
    for (int s = 0; s < SAMPLES; s++) {
        const size_t at = place[s].i * p->y.ld + place[s].j;
        if (p->y.add) want[s] += device_number(g, p->y.at, p->y.sums, at);
        if (p->y.bias) want[s] += device_number(g, p->y.bias, 0, place[s].j);
        if (p->y.h) want[s] *= gelu_slope_double(device_number(g, p->y.h, 0, at));
    }
    matmul_row_run(arg);
    for (int s = 0; s < SAMPLES; s++) {
        const size_t at = place[s].i * p->y.ld + place[s].j;
        deviation_add(&y, device_number(g, p->y.at, p->y.sums, at), want[s]);
        if (p->y.gelu)
            deviation_add(&gelu, device_number(g, p->y.gelu, 0, at), gelu_double(want[s]));
    }
    return fmax(deviation(&y), p->y.gelu ? deviation(&gelu) : 0);
}

// A matmul y (M,N) = a (M,K) b (K,N) on its own inputs; "transposed" operands are stored
// transposed.
static void matmul_row_new(MatmulRow *p, Gpu *g, int a_transposed, int b_transposed, int sums,
                            size_t M, size_t N, size_t K) {
    memset(p, 0, sizeof *p);
    p->timer = timer_new(g->stream);
    p->g = g, p->M = M, p->N = N, p->K = K, p->times = 1;
    const void *a = device_filled(g, 0, M * K, 1, 4), *b = device_filled(g, 0, K * N, 1, 5);
    void *y = device_filled(g, sums, M * N, 1, 3);
    p->a = a_transposed ? transposed(a, M) : matrix(a, K);
    p->b = b_transposed ? transposed(b, K) : matrix(b, N);
    p->y = sums ? summed((float *)y, N, 0) : fresh(y, N, NULL);
}

static void matmul_row_free(MatmulRow *p) {
    const void *const array[] = {p->a.at, p->b.at, p->y.at, p->y.bias, p->y.gelu, p->y.h};
    for (size_t i = 0; i < sizeof array / sizeof array[0]; i++)
        CUDA_CHECK(cudaFree((void *)(uintptr_t)array[i]));
    timer_free(&p->timer);
}

static MeasureRow *matmul_row_add(MeasureTable *t, MatmulRow *p, const char *name,
                                   MeasureRow *peak) {
    MeasureRow *r = timed_row(t, name, "GFLOP/s", 2.0 * (double)p->M * (double)p->N * (double)p->K,
                              matmul_row_run, matmul_row_check, p,
                              matmul_error(p->g, p->y.sums, p->K), peak);
    snprintf(r->shape, sizeof r->shape, "%zu x %zu x %zu", p->M, p->N, p->K);
    return r;
}

// A layer's matmuls: in -> out channels, as multiples of C.
static const struct { const char *name; int in, out; } linears[] = {
    {"qkv", 1, 3}, {"attproj", 1, 1}, {"fc", 1, 4}, {"fcproj", 4, 1},
};
enum { LINEARS = sizeof linears / sizeof linears[0], PRODUCTS = 3 * (LINEARS + 1) };

// As the engine runs them without recomputation: forward adds the bias, and for fc applies GELU;
// fcproj's d_input is multiplied by GELU'.
static void linear_rows(MeasureTable *t, MatmulRow p[3], Gpu *g, int layer, size_t BT, size_t C,
                        double times, MeasureRow *peak) {
    const size_t in = (size_t)linears[layer].in * C, out = (size_t)linears[layer].out * C;
    const char *const form[] = {"forward", "d_input", "d_weight"};
    matmul_row_new(&p[0], g, 0, 0, 0, BT, out, in);
    matmul_row_new(&p[1], g, 0, 1, 0, BT, in, out);
    matmul_row_new(&p[2], g, 1, 0, 1, in, out, BT);
    p[0].y.bias = device_filled(g, 0, out, 1, 6);
    if (!strcmp(linears[layer].name, "fc")) p[0].y.gelu = device_filled(g, 0, BT * out, 1, 7);
    if (!strcmp(linears[layer].name, "fcproj")) p[1].y.h = device_filled(g, 0, BT * in, 2, 8);
    for (int f = 0; f < 3; f++) {
        char *name = xprintf("%s %s", linears[layer].name, form[f]);
        p[f].times = times;
        matmul_row_add(t, &p[f], name, peak);
        free(name);
    }
}

// The head's, on a chunk of tokens.
static void head_rows(MeasureTable *t, MatmulRow p[3], Gpu *g, size_t BT, size_t C, size_t V,
                      MeasureRow *peak) {
    const size_t chunk = classifier_chunk(BT, V, size_of_number(g)), n = at_most(BT, chunk),
        Vp = padded_vocabulary(V);
    const char *const name[] = {"head forward", "head d_input", "head d_weight"};
    matmul_row_new(&p[0], g, 0, 1, 0, n, Vp, C);
    matmul_row_new(&p[1], g, 0, 0, 0, n, C, Vp);
    matmul_row_new(&p[2], g, 1, 0, 1, Vp, C, n);
    p[2].y.add = BT > chunk;
    for (int f = 0; f < 3; f++)
        p[f].times = (double)BT / (double)n, matmul_row_add(t, &p[f], name[f], peak);
}

// For n rows, weighted by how often a training step performs them: all FLOPs / what the peak would
// have achieved in the same time.
static double matmuls_of_peak(const MeasureTable *t, int n) {
    double work = 0, peak_work = 0;
    for (int i = 0; i < n; i++) {
        const double flops = ((const MatmulRow *)t->row[i].arg)->times * t->row[i].work;
        work += flops, peak_work += flops / measure_median(t->row[i].fraction, t->rounds);
    }
    return work / peak_work;
}

// ---- What the tables of a preset share ----

typedef struct {
    Bench *bench;
    Text attention;              // JSON array: shapes and times, for sdpa.py
    MeasureRow *product, *copy;  // the peaks
    const Case *c;
    GptConfig config;
    Model *work;                 // one layer: provides its Gpu and the classifier's chunk
    Gpu *g;
    size_t B, T, BT, C, NH, V;
    int rounds;
    double rate[2];              // of the peaks
    const char *json;            // rewritten after every table
} Lab;

static void bench_write(const Lab *l);

static void lab_print(Lab *l, MeasureTable *t, const char *what) {
    char *title = xprintf("%s: %s, B %zu, T %zu, %s", what, l->c->preset, l->B, l->T,
                          dtype_name[l->bench->dtype]);
    measure_table(t);
    measure_print(t, title, &l->bench->rows);
    free(title);
    bench_write(l);
}

static void lab_matmul(Lab *l) {
    MeasureTable t = measure_new(l->rounds);
    MatmulRow p[PRODUCTS];
    for (int k = 0; k < LINEARS; k++)
        linear_rows(&t, p + 3 * k, l->g, k, l->BT, l->C, l->config.L, l->product);
    head_rows(&t, p + 3 * LINEARS, l->g, l->BT, l->C, l->V, l->product);
    lab_print(l, &t, "matrix products, (M,N) over K");
    const double layers = matmuls_of_peak(&t, 3 * LINEARS), all = matmuls_of_peak(&t, PRODUCTS);
    printf("all matmuls of a step: %.1f%% of peak in the layers, %.1f%% with the head\n",
           100 * layers, 100 * all);
    measure_json_open(&l->bench->rows);
    measure_json_text(&l->bench->rows, "name", "all matmuls of a step");
    measure_json_text(&l->bench->rows, "preset", l->c->preset);
    measure_json_text(&l->bench->rows, "dtype", dtype_name[l->bench->dtype]);
    measure_json(&l->bench->rows, "of_peak_layers", layers);
    measure_json(&l->bench->rows, "of_peak", all);
    text_printf(&l->bench->rows, "}");
    measure_free(&t);
    for (int k = 0; k < PRODUCTS; k++) matmul_row_free(&p[k]);
}

// ---- Attention ----

typedef struct {
    Timer timer;
    const Lab *l;
    void *qkv, *dqkv, *y, *dy;
    float *lse, *inner;
    NoisePlace noise;                                    // rate 0: without dropout
    NoisePlace *place;                                   // the same on the device
    uint32_t *words;
    int *rows;
} Attention;

// The bits of dropout, drawn again as in a step; NULL: none.
static const KeptKeys *attention_bits(const Attention *a, KeptKeys *keep) {
    const Lab *l = a->l;
    const size_t stride = kept_keys_stride(l->T), n = l->B * l->NH * l->T * stride;
    if (!a->noise.rate) return NULL;
    LAUNCH(attention_keep_kernel, blocks_for(n), BLOCK, 0, l->g->stream, a->words,
           (const NoisePlace *)a->place, (const int *)a->rows, n, (int)l->T, (int)l->NH,
           (int)stride);
    const KeptKeys made = {a->words, a->place, (int)stride};
    *keep = made;
    return keep;
}

static void attention_forward_run(void *arg) {
    const Attention *a = (const Attention *)arg;
    const Lab *l = a->l;
    KeptKeys keep;
    attention_forward(a->y, a->lse, a->qkv, attention_bits(a, &keep), l->B, l->T, l->C, l->NH,
                      l->g->half, l->g->stream);
}

static void attention_backward_run(void *arg) {
    const Attention *a = (const Attention *)arg;
    const Lab *l = a->l;
    KeptKeys keep;
    attention_backward(a->dqkv, a->inner, a->dy, a->qkv, a->y, a->lse, attention_bits(a, &keep),
                       l->B, l->T, l->C, l->NH, l->g->half, l->g->stream);
}

// Adds noise of a rate of 0.1 and memory for its bits.
static void attention_drops(Attention *a) {
    const Lab *l = a->l;
    const Noise z = {7, 3, 0, 0, noise_rate_of(0.1), 0};
    int *rows = (int *)xcalloc(l->B, sizeof *rows);
    for (size_t b = 0; b < l->B; b++) rows[b] = (int)b;
    a->noise = noise_place(&z, NOISE_ATTN, 0);
    const size_t words = l->B * l->NH * l->T * kept_keys_stride(l->T);
    a->words = (uint32_t *)device_alloc("a benchmark's bits", words * sizeof *a->words);
    a->place = (NoisePlace *)device_alloc("a benchmark's noise", sizeof *a->place);
    a->rows = (int *)device_alloc("a benchmark's rows", l->B * sizeof *a->rows);
    CUDA_CHECK(cudaMemcpy(a->place, &a->noise, sizeof a->noise, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(a->rows, rows, l->B * sizeof *rows, cudaMemcpyHostToDevice));
    free(rows);
}

// Compares the first head of the first row and the last head of the last row: y or, with
// `backward`, the worst of dq, dk and dv.
static double attention_compare(const Attention *a, int backward) {
    const Lab *l = a->l;
    const size_t T = l->T, C = l->C, HS = C / l->NH;
    Deviation d[4] = {{0, 0, 0}};                        // dq, dk, dv, y
    float *qkv = (float *)xcalloc(T * 3 * C, sizeof *qkv),
        *dqkv = (float *)xcalloc(T * 3 * C, sizeof *dqkv);
    float *y = (float *)xcalloc(T * C, sizeof *y), *dy = (float *)xcalloc(T * C, sizeof *dy);
    for (int end = 0; end < 2; end++) {
        const size_t row = end ? l->B - 1 : 0, head = end ? C - HS : 0;
        double *want_y = (double *)xcalloc(T * HS, sizeof *want_y),
            *want = (double *)xcalloc(3 * T * HS, sizeof *want);
        device_read(l->g, qkv, a->qkv, 0, row * T * 3 * C, T * 3 * C);
        device_read(l->g, dqkv, a->dqkv, 0, row * T * 3 * C, T * 3 * C);
        device_read(l->g, y, a->y, 0, row * T * C, T * C);
        device_read(l->g, dy, a->dy, 0, row * T * C, T * C);
        attention_reference(want_y, want, dy + head, qkv + head, &a->noise, row, head / HS, T, C,
                            HS);
        for (size_t i = 0; i < T * HS; i++) {
            const size_t t = i / HS, h = head + i % HS;
            deviation_add(&d[3], (double)y[t * C + h], want_y[i]);
            for (size_t part = 0; part < 3; part++)
                deviation_add(&d[part], (double)dqkv[t * 3 * C + part * C + h],
                              want[part * T * HS + i]);
        }
        free(want_y);
        free(want);
    }
    float *const host[] = {qkv, dqkv, y, dy};
    for (int i = 0; i < 4; i++) free(host[i]);
    return backward ? fmax(deviation(&d[0]), fmax(deviation(&d[1]), deviation(&d[2])))
        : deviation(&d[3]);
}

static double attention_forward_check(void *arg) {
    attention_forward_run(arg);
    return attention_compare((const Attention *)arg, 0);
}

static double attention_backward_check(void *arg) {
    attention_forward_run(arg);
    attention_backward_run(arg);
    return attention_compare((const Attention *)arg, 1);
}

// FLOPs as counted by gpt.h: causal, without what the backward pass recomputes. In bf16,
// probabilities and their gradients are rounded before the second matmuls, and the first queries,
// whose elements are the largest, see few keys: the longer the rows, the further they exceed the
// root mean square. (T 20, 80, 256, 384: errors of 0.023 to 0.044.)
static void lab_attention(Lab *l) {
    MeasureTable t = measure_new(l->rounds);
    Attention a = {}, drops;
    const double flops = 4 * (double)l->C * (double)l->B * (double)l->T * ((double)l->T + 1) / 2;
    const double error = l->g->half ? 0.05 + 0.002 * sqrt((double)l->T)
                                    : 4 * rounding((double)l->T);
    a.l = l;
    a.timer = timer_new(l->g->stream);
    a.qkv = device_filled(l->g, 0, 3 * l->BT * l->C, 2, 20),
        a.dqkv = device_filled(l->g, 0, 3 * l->BT * l->C, 1, 21);
    a.y = device_filled(l->g, 0, l->BT * l->C, 1, 22),
        a.dy = device_filled(l->g, 0, l->BT * l->C, 1, 23);
    a.lse = (float *)device_filled(l->g, 1, l->BT * l->NH, 1, 24);
    a.inner = (float *)device_filled(l->g, 1, l->BT * l->NH, 1, 25);
    timed_row(&t, "attention forward", "GFLOP/s", flops, attention_forward_run,
              attention_forward_check, &a, error, l->product);
    timed_row(&t, "attention backward", "GFLOP/s", 2.5 * flops, attention_backward_run,
              attention_backward_check, &a, error, l->product);
    drops = a;
    attention_drops(&drops);
    timed_row(&t, "attention forward, dropout", "GFLOP/s", flops, attention_forward_run,
              attention_forward_check, &drops, error, l->product);
    timed_row(&t, "attention backward, dropout", "GFLOP/s", 2.5 * flops, attention_backward_run,
              attention_backward_check, &drops, error, l->product);
    for (int i = 0; i < t.n; i++)
        snprintf(t.row[i].shape, sizeof t.row[i].shape, "%zu x %zu x %zu", l->B * l->NH, l->T,
                 l->C / l->NH);
    lab_print(l, &t, "attention, (B NH, T, HS)");
    measure_json_open(&l->attention);
    measure_json_text(&l->attention, "preset", l->c->preset);
    measure_json_text(&l->attention, "dtype", dtype_name[l->bench->dtype]);
    const char *const key[] = {"batch", "heads", "seq_len", "head_size"};
    const size_t size[] = {l->B, l->NH, l->T, l->C / l->NH};
    for (int i = 0; i < 4; i++) measure_json(&l->attention, key[i], (double)size[i]);
    measure_json(&l->attention, "forward_ms", 1e3 * measure_median(t.row[0].seconds, t.rounds));
    measure_json(&l->attention, "backward_ms", 1e3 * measure_median(t.row[1].seconds, t.rounds));
    measure_json(&l->attention, "forward_flops", t.row[0].work);
    measure_json(&l->attention, "backward_flops", t.row[1].work);
    text_printf(&l->attention, "}");
    measure_free(&t);
    void *const array[] = {a.qkv, a.dqkv, a.y, a.dy, a.lse, a.inner, drops.words, drops.place,
                           drops.rows};
    for (size_t i = 0; i < sizeof array / sizeof array[0]; i++) CUDA_CHECK(cudaFree(array[i]));
    timer_free(&a.timer);
}

// ---- LayerNorm with the residual stream, GELU, column sums ----

typedef struct {
    Timer timer;
    const Lab *l;
    float *x, *dx, *rstd, *dw, *db;                      // (BT,C) (BT,C) (BT) (C) (4C)
    void *w, *b;                                         // (C) each
    float *scale;                                        // all_scale
    void *out, *ln, *xhat, *dy, *dout;                   // (BT,C) each
    void *wide, *wide_y;                                 // (BT,4C)
} Layers;

static const float all_scale = 0.5f;

static void layers_open(Layers *s, const Lab *l) {
    const Gpu *g = l->g;
    const size_t BTC = l->BT * l->C;
    CUDA_CHECK(cudaMalloc(&s->scale, sizeof *s->scale));
    CUDA_CHECK(cudaMemcpy(s->scale, &all_scale, sizeof all_scale, cudaMemcpyHostToDevice));
    s->timer = timer_new(g->stream);
    s->l = l;
    s->x = (float *)device_filled(g, 1, BTC, 2, 30), s->dx = (float *)device_filled(g, 1, BTC, 1,
        31);
    s->rstd = (float *)device_filled(g, 1, l->BT, 1, 32), s->w = device_filled(g, 0, l->C, 2, 33);
    s->b = device_filled(g, 0, l->C, 2, 34), s->dw = (float *)device_filled(g, 1, l->C, 1, 35);
    s->db = (float *)device_filled(g, 1, 4 * l->C, 1, 36);
    s->out = device_filled(g, 0, BTC, 1, 37), s->ln = device_filled(g, 0, BTC, 1, 38);
    s->xhat = device_filled(g, 0, BTC, 1, 39);
    s->dy = device_filled(g, 0, BTC, 2, 40), s->dout = device_filled(g, 0, BTC, 1, 41);
    s->wide = device_filled(g, 0, 4 * BTC, 3, 42), s->wide_y = device_filled(g, 0, 4 * BTC, 1, 43);
}

static void layers_close(Layers *s) {
    void *const array[] = {s->x,  s->dx,   s->rstd, s->w,    s->b,    s->dw,     s->db, s->out,
                           s->ln, s->xhat, s->dy,   s->dout, s->wide, s->wide_y, s->scale};
    for (size_t i = 0; i < sizeof array / sizeof array[0]; i++) CUDA_CHECK(cudaFree(array[i]));
    timer_free(&s->timer);
}

// like a branch that every row keeps, with its scale
static Rows all_rows(const Layers *s) {
    const Rows r = {NULL, s->scale};
    return r;
}

static void layernorm_forward_run(void *arg) {
    const Layers *s = (const Layers *)arg;
    const Lab *l = s->l;
    residual_layernorm_forward(l->g, s->x, s->ln, s->xhat, s->rstd, s->out, all_rows(s),
                               all_rows(s), 0, s->w, s->b, l->B, l->T, l->C);
}

static void layernorm_backward_run(void *arg) {
    const Layers *s = (const Layers *)arg;
    const Lab *l = s->l;
    residual_layernorm_backward(l->g, s->dx, s->dout, s->dw, s->db, 0, s->dy, s->xhat, s->rstd,
                                all_rows(s), all_rows(s), 0, 0, s->w, l->B, l->T, l->C);
}

static void gelu_run(void *arg) {
    const Layers *s = (const Layers *)arg;
    gelu_forward(s->l->g, s->wide_y, s->wide, 4 * s->l->BT * s->l->C);
}

static void column_sums_run(void *arg) {
    const Layers *s = (const Layers *)arg;
    column_sums(s->l->g, s->db, 0, s->wide, s->l->BT, 4 * s->l->C);
}

// Some tokens: x + scale * out, and its LayerNorm.
static double layernorm_forward_check(void *arg) {
    const Layers *s = (const Layers *)arg;
    const size_t C = s->l->C;
    const Gpu *g = s->l->g;
    Deviation x = {0, 0, 0}, y = {0, 0, 0};
    float *row = (float *)xcalloc((size_t)SAMPLES * C, sizeof *row),
        *out = (float *)xcalloc(C, sizeof *out);
    float *ln = (float *)xcalloc(C, sizeof *ln), *w = (float *)xcalloc(C, sizeof *w),
        *b = (float *)xcalloc(C, sizeof *b);
    device_read(g, w, s->w, 0, 0, C);
    device_read(g, b, s->b, 0, 0, C);
    for (int k = 0; k < SAMPLES; k++) {
        device_read(g, row + (size_t)k * C, s->x, 1, pick(s->l->BT, k, 0) * C, C);
        device_read(g, out, s->out, 0, pick(s->l->BT, k, 0) * C, C);
        for (size_t c = 0; c < C; c++) row[(size_t)k * C + c] += all_scale * out[c];
    }
    layernorm_forward_run(arg);
    for (int k = 0; k < SAMPLES; k++) {
        const size_t at = pick(s->l->BT, k, 0) * C;
        double mean, rstd;
        layernorm_reference(&mean, &rstd, row + (size_t)k * C, C);
        device_read(g, out, s->x, 1, at, C);
        device_read(g, ln, s->ln, 0, at, C);
        for (size_t c = 0; c < C; c++) {
            const double want = (double)row[(size_t)k * C + c];
            deviation_add(&x, (double)out[c], want);
            deviation_add(&y, (double)ln[c], (want - mean) * rstd * (double)w[c] + (double)b[c]);
        }
    }
    float *const host[] = {row, out, ln, w, b};
    for (int i = 0; i < 5; i++) free(host[i]);
    if (deviation(&x) > rounding(1)) return INFINITY;    // stored as float, so no larger errors
    return deviation(&y);
}

// dw and db of some channels: columns of dy * xhat and of dy. Both are (BT,C) on the host.
static double layernorm_columns(const float *dw, const float *db, const float *dy,
                                const float *xhat, size_t BT, size_t C) {
    Deviation d[2] = {{0, 0, 0}};
    for (int k = 0; k < SAMPLES; k++) {
        const size_t c = pick(C, k, 1);
        double sum_w = 0, sum_b = 0;
        for (size_t t = 0; t < BT; t++) {
            sum_w += (double)dy[t * C + c] * (double)xhat[t * C + c];
            sum_b += (double)dy[t * C + c];
        }
        deviation_add(&d[0], (double)dw[c], sum_w);
        deviation_add(&d[1], (double)db[c], sum_b);
    }
    return fmax(deviation(&d[0]), deviation(&d[1]));
}

// dx and dout of some tokens; dw and db.
static double layernorm_backward_check(void *arg) {
    const Layers *s = (const Layers *)arg;
    const size_t C = s->l->C, BT = s->l->BT;
    const Gpu *g = s->l->g;
    Deviation dx = {0, 0, 0}, dout = {0, 0, 0};
    float *before = (float *)xcalloc((size_t)SAMPLES * C, sizeof *before),
        *row = (float *)xcalloc(4 * C, sizeof *row);
    float *dy = (float *)xcalloc(BT * C, sizeof *dy),
        *xhat = (float *)xcalloc(BT * C, sizeof *xhat);
    float *w = row + C, *dw = w + C, *db = dw + C, *rstd = (float *)xcalloc(BT, sizeof *rstd);
    layernorm_forward_run(arg);
    device_read(g, dy, s->dy, 0, 0, BT * C);
    device_read(g, xhat, s->xhat, 0, 0, BT * C);
    device_read(g, rstd, s->rstd, 1, 0, BT);
    device_read(g, w, s->w, 0, 0, C);
    for (int k = 0; k < SAMPLES; k++)
        device_read(g, before + (size_t)k * C, s->dx, 1, pick(BT, k, 0) * C, C);
    layernorm_backward_run(arg);
    device_read(g, dw, s->dw, 1, 0, C);
    device_read(g, db, s->db, 1, 0, C);
    for (int k = 0; k < SAMPLES; k++) {
        const size_t t = pick(BT, k, 0);
        const float *dyt = dy + t * C, *ht = xhat + t * C;
        double mean = 0, along = 0;
        for (size_t c = 0; c < C; c++) {
            mean += (double)dyt[c] * (double)w[c] / (double)C;
            along += (double)dyt[c] * (double)w[c] * (double)ht[c] / (double)C;
        }
        for (int what = 0; what < 2; what++) {
            device_read(g, row, what ? s->dout : (void *)s->dx, !what, t * C, C);
            for (size_t c = 0; c < C; c++) {
                const double want = (double)before[(size_t)k * C + c] +
                                    (double)rstd[t] * ((double)dyt[c] * (double)w[c] - mean -
                                                       (double)ht[c] * along);
                deviation_add(what ? &dout : &dx, (double)row[c],
                              what ? (double)all_scale * want : want);
            }
        }
    }
    const double columns = layernorm_columns(dw, db, dy, xhat, BT, C);
    float *const host[] = {before, row, dy, xhat, rstd};
    for (int i = 0; i < 5; i++) free(host[i]);
    // accumulated in float
    if (deviation(&dx) > rounding((double)C) || columns > rounding((double)BT)) return INFINITY;
    return deviation(&dout);
}

static double gelu_check(void *arg) {
    const Layers *s = (const Layers *)arg;
    Deviation y = {0, 0, 0};
    gelu_run(arg);
    for (int k = 0; k < SAMPLES; k++) {
        const size_t i = pick(4 * s->l->BT * s->l->C, k, 0);
        deviation_add(&y, device_number(s->l->g, s->wide_y, 0, i),
                      gelu_double(device_number(s->l->g, s->wide, 0, i)));
    }
    return deviation(&y);
}

static double column_sums_check(void *arg) {
    enum { COLUMNS = 8 };
    const Layers *s = (const Layers *)arg;
    const size_t BT = s->l->BT, width = 4 * s->l->C;
    Deviation d = {0, 0, 0};
    double want[COLUMNS] = {0};
    float *row = (float *)xcalloc(width, sizeof *row);
    column_sums_run(arg);
    for (size_t t = 0; t < BT; t++) {
        device_read(s->l->g, row, s->wide, 0, t * width, width);
        for (int k = 0; k < COLUMNS; k++) want[k] += (double)row[pick(width, k, 1)];
    }
    for (int k = 0; k < COLUMNS; k++)
        deviation_add(&d, device_number(s->l->g, s->db, 1, pick(width, k, 1)), want[k]);
    free(row);
    return deviation(&d);
}

// ---- The classifier on a chunk of tokens, and its softmax alone ----

typedef struct {
    Timer timer;
    const Lab *l;
    size_t n;                     // tokens: one chunk
    void *x, *dx, *wte, *logits;  // (n,C) (n,C) (Vp,C), zeros from V on, (n,Vp)
    float *dwte, *losses;         // (Vp,C) (n)
    int *targets, *host_targets;  // (n)
} Head;

static void head_open(Head *h, const Lab *l) {
    const Gpu *g = l->g;
    const size_t Vp = padded_vocabulary(l->V), rest = (Vp - l->V) * l->C;
    h->timer = timer_new(g->stream);
    h->l = l;
    h->n = at_most(l->BT, classifier_chunk(l->BT, l->V, size_of_number(g)));
    h->x = device_filled(g, 0, h->n * l->C, 2, 50), h->dx = device_filled(g, 0, h->n * l->C, 1, 51);
    // so that logits have their usual size in training
    h->wte = device_filled(g, 0, Vp * l->C, 0.03f, 52);
    CUDA_CHECK(cudaMemsetAsync((char *)h->wte + l->V * l->C * size_of_number(g), 0,
                               rest * size_of_number(g), g->stream));
    h->logits = device_filled(g, 0, h->n * Vp, 1, 53);
    h->dwte = (float *)device_filled(g, 1, Vp * l->C, 1, 54),
        h->losses = (float *)device_filled(g, 1, h->n, 1, 55);
    h->host_targets = (int *)xcalloc(h->n, sizeof *h->host_targets);
    fill_tokens(h->host_targets, h->n, (int)l->V, 7);
    h->targets = (int *)device_alloc("a benchmark's targets", h->n * sizeof(int));
    CUDA_CHECK(cudaMemcpy(h->targets, h->host_targets, h->n * sizeof(int), cudaMemcpyHostToDevice));
}

static void head_close(Head *h) {
    void *const array[] = {h->x, h->dx, h->wte, h->logits, h->dwte, h->losses, h->targets};
    for (size_t i = 0; i < sizeof array / sizeof array[0]; i++) CUDA_CHECK(cudaFree(array[i]));
    free(h->host_targets);
    timer_free(&h->timer);
}

static void head_run(void *arg) {
    const Head *h = (const Head *)arg;
    const Scoring y = {h->losses, NULL, NULL, NULL, h->targets, 1 / (float)h->n, 0, {}, {}};
    classifier(h->l->g, &y, h->dx, h->dwte, 0, h->logits, h->x, h->wte, h->n, h->l->C, h->l->V);
}


static void softmax_run(void *arg) {
    const Head *h = (const Head *)arg;
    const Gpu *g = h->l->g;
    const Scoring y = {h->losses, NULL, NULL, NULL, h->targets, 1 / (float)h->n, 0, {}, {}};
    if (g->half) softmax_loss<bf16>(g, &y, h->logits, 0, h->n, h->l->V);
    else softmax_loss<float>(g, &y, h->logits, 0, h->n, h->l->V);
}

// One token against logits (V) in double: its loss, and its row of gradients, which has replaced
// the logits.
static void head_token(Deviation *loss, Deviation *grad, const Head *h, const double *logit,
                       size_t t) {
    const size_t V = h->l->V, Vp = padded_vocabulary(V), target = (size_t)h->host_targets[t];
    float *row = (float *)xcalloc(Vp, sizeof *row);
    double sum = 0;
    for (size_t v = 0; v < V; v++) sum += exp(logit[v]);
    deviation_add(loss, device_number(h->l->g, h->losses, 1, t), log(sum) - logit[target]);
    device_read(h->l->g, row, h->logits, 0, t * Vp, Vp);
    for (size_t v = 0; v < Vp; v++)
        deviation_add(grad, (double)row[v],
                      v < V ? (exp(logit[v]) / sum - (v == target)) / (double)h->n : 0);
    free(row);
}

// Losses and gradients of a few tokens, then dx and dwte against matmuls of the gradients that the
// chunk now holds.
static double head_check(void *arg) {
    enum { TOKENS = 4 };
    const Head *h = (const Head *)arg;
    const size_t V = h->l->V, C = h->l->C, Vp = padded_vocabulary(V);
    const Gpu *g = h->l->g;
    Deviation loss = {0, 0, 0}, grad = {0, 0, 0}, d[2] = {{0, 0, 0}};
    Place *place = (Place *)xcalloc(V, sizeof *place);
    double *want = (double *)xcalloc(V, sizeof *want);
    head_run(arg);
    for (int k = 0; k < TOKENS; k++) {
        const size_t t = pick(h->n, k, 0);
        for (size_t v = 0; v < V; v++) place[v].i = t, place[v].j = v;
        matmul_reference(g, want, place, matrix(h->x, C), transposed(h->wte, C), V, C);
        head_token(&loss, &grad, h, want, t);
    }
    const int samples = (int)at_most(SAMPLES, V);
    // dx, then dwte rows of some targets and some other tokens
    for (int what = 0; what < 2; what++) {
        for (int k = 0; k < samples; k++) {
            place[k].i = what == 0 ? pick(h->n, k, 2) : k % 2 ? pick(V, k, 3)
                : (size_t)h->host_targets[pick(h->n, k, 3)];
            place[k].j = pick(C, k, 4);
        }
        if (what == 0)
            matmul_reference(g, want, place, matrix(h->logits, Vp), matrix(h->wte, C),
                              (size_t)samples, Vp);
        else
            matmul_reference(g, want, place, transposed(h->logits, Vp), matrix(h->x, C),
                              (size_t)samples, h->n);
        for (int k = 0; k < samples; k++)
            deviation_add(&d[what], device_number(g, what ? (void *)h->dwte : h->dx, what,
                                                  place[k].i * C + place[k].j), want[k]);
    }
    free(place);
    free(want);
    return fmax(fmax(deviation(&loss), deviation(&grad) / sqrt((double)V)),
                fmax(deviation(&d[0]), deviation(&d[1])));
}

// The same without the matmuls: on logits that are restored each time.
static double softmax_check(void *arg) {
    const Head *h = (const Head *)arg;
    const size_t V = h->l->V, Vp = padded_vocabulary(V), t = h->n - 1;
    const Gpu *g = h->l->g;
    Deviation loss = {0, 0, 0}, grad = {0, 0, 0};
    float *row = (float *)xcalloc(Vp, sizeof *row);
    double *logit = (double *)xcalloc(Vp, sizeof *logit);
    if (g->half)
        LAUNCH(fill_kernel<bf16>, blocks_for(h->n * Vp), BLOCK, 0, g->stream, h->logits, h->n * Vp,
               2, 53);
    else
        LAUNCH(fill_kernel<float>, blocks_for(h->n * Vp), BLOCK, 0, g->stream, h->logits, h->n * Vp,
               2, 53);
    device_read(g, row, h->logits, 0, t * Vp, Vp);
    for (size_t v = 0; v < Vp; v++) logit[v] = (double)row[v];
    softmax_run(arg);
    head_token(&loss, &grad, h, logit, t);
    free(row);
    free(logit);
    return fmax(deviation(&loss), deviation(&grad) / sqrt((double)V));
}

// ---- AdamW ----

typedef struct { Timer timer; Adam a; } AdamRow;

static void adam_row_run(void *arg) { adam_run(&((AdamRow *)arg)->a); }
static double adam_row_check(void *arg) { return adam_check(&((AdamRow *)arg)->a); }

// ---- The table of layers; bytes that must move at least once ----

static void lab_layers(Lab *l) {
    MeasureTable t = measure_new(l->rounds);
    Layers s;
    Head h;
    AdamRow adam;
    const double BTC = (double)l->BT * (double)l->C, N = (double)size_of_number(l->g),
        stored = stored_error(l->g);
    layers_open(&s, l);
    head_open(&h, l);
    adam_open(&adam.a, l->bench->engine, &l->config, l->bench->dtype);
    adam.timer = timer_new(adam.a.m->gpu.stream);
    const double logits = (double)h.n * (double)padded_vocabulary(l->V),
        parameters = (double)gpt_params_count(&adam.a.c);
    timed_row(&t, "residual, LayerNorm", "GB/s", (8 + 3 * N) * BTC, layernorm_forward_run,
              layernorm_forward_check, &s, rounding((double)l->C) + 2 * stored, l->copy);
    timed_row(&t, "LayerNorm backward", "GB/s", (8 + 3 * N) * BTC, layernorm_backward_run,
              layernorm_backward_check, &s, rounding((double)l->C) + stored, l->copy);
    timed_row(&t, "GELU again", "GB/s", 8 * N * BTC, gelu_run, gelu_check, &s,
              rounding(16) + stored, l->copy);
    timed_row(&t, "gradient of a bias", "GB/s", 4 * N * BTC, column_sums_run, column_sums_check, &s,
              rounding((double)l->BT), l->copy);
    for (int i = 0; i < t.n; i++)
        snprintf(t.row[i].shape, sizeof t.row[i].shape, "%zu x %zu x %zu", l->B, l->T,
                 (i < 2 ? 1 : 4) * l->C);
    timed_row(&t, "head, loss, gradients", "GFLOP/s", 6 * (double)h.n * (double)l->C * (double)l->V,
              head_run, head_check, &h, matmul_error(l->g, 0, l->V), l->product);
    timed_row(&t, "softmax, loss, gradient", "GB/s", 2 * N * logits, softmax_run, softmax_check, &h,
              rounding((double)l->V) + stored, l->copy);
    for (int i = t.n - 2; i < t.n; i++)
        snprintf(t.row[i].shape, sizeof t.row[i].shape, "%zu x %zu x %zu", h.n, l->V, l->C);
    MeasureRow *r = timed_row(&t, "norm and AdamW", "GB/s",
                              (8 * sizeof(float) + (l->g->half ? sizeof(bf16) : 0)) * parameters,
                              adam_row_run, adam_row_check, &adam, rounding(16), l->copy);
    snprintf(r->shape, sizeof r->shape, "%.1f M", 1e-6 * parameters);
    lab_print(l, &t, "layers");
    measure_free(&t);
    timer_free(&adam.timer);
    adam.a.engine->close(adam.a.m);
    head_close(&h);
    layers_close(&s);
}

// ---- Peaks ----

typedef struct { Timer timer; Gpu *g; char *x, *y; size_t bytes; } Copy;

static void copy_run(void *arg) {
    const Copy *c = (const Copy *)arg;
    CUDA_CHECK(cudaMemcpyAsync(c->y, c->x, c->bytes, cudaMemcpyDeviceToDevice, c->g->stream));
}

static double copy_check(void *arg) {
    const Copy *c = (const Copy *)arg;
    const size_t n = c->bytes / sizeof(float);
    int wrong = 0;
    CUDA_CHECK(cudaMemsetAsync(c->y, 0xff, c->bytes, c->g->stream));
    copy_run(arg);
    for (int k = 0; k < SAMPLES; k++)
        wrong += !(device_number(c->g, c->y, 1, pick(n, k, 0)) == device_number(c->g, c->x, 1,
            pick(n, k, 0)));
    return wrong;
}

typedef struct { Gpu g; MatmulRow product; Copy copy; } Peaks;

// Both peaks as rows, and prepared as slices for other tables.
static void peaks_open(Peaks *p, Bench *b, size_t size) {
    memset(p, 0, sizeof *p);
    gpu_open(&p->g, b->dtype, NULL);
    matmul_row_new(&p->product, &p->g, 0, 1, 0, size, size, size);
    p->copy.timer = timer_new(p->g.stream);
    p->copy.g = &p->g, p->copy.bytes = 4 * size * size;
    p->copy.x = (char *)device_filled(&p->g, 1, size * size, 1, 60);
    p->copy.y = (char *)device_filled(&p->g, 1, size * size, 1, 61);
    matmul_row_add(&b->peaks, &p->product, "largest product", NULL);
    MeasureRow *r = timed_row(&b->peaks, "copy", "GB/s", 2 * (double)p->copy.bytes, copy_run,
                              copy_check, &p->copy, 0, NULL);
    snprintf(r->shape, sizeof r->shape, "%.0f MiB", (double)p->copy.bytes / (1 << 20));
    for (int i = 0; i < b->peaks.n; i++) measure_prepare(&b->peaks.row[i], MEASURE_PEAK_SLICE);
}

static void peaks_close(Peaks *p) {
    matmul_row_free(&p->product);
    CUDA_CHECK(cudaFree(p->copy.x));
    CUDA_CHECK(cudaFree(p->copy.y));
    timer_free(&p->copy.timer);
    gpu_close(&p->g);
}

// Prints their table; returns the medians, in FLOP/s and in bytes per second.
static void peaks_print(const Bench *b, double rate[2], int rounds, Text *json) {
    MeasureTable t = b->peaks;
    t.rounds = rounds;
    measure_table(&t);
    measure_print(&t, "peaks", json);
    for (int i = 0; i < 2; i++) rate[i] = t.row[i].work / measure_median(t.row[i].seconds, rounds);
    if (b->sheet_peak > 0)
        printf("the data sheet says %.0f TFLOP/s: %.1f%%\n", 1e-12 * b->sheet_peak,
               100 * rate[0] / b->sheet_peak);
    measure_free(&t);
}

// ---- The program ----

static void bench_write(const Lab *l) {
    const Bench *b = l->bench;
    Text out = {NULL, 0, 0};
    text_printf(&out, "{");
    measure_json_text(&out, "engine", b->engine->name);
    measure_json_text(&out, "dtype", dtype_name[b->dtype]);
    measure_json(&out, "sheet_peak", b->sheet_peak > 0 ? b->sheet_peak : NAN);
    measure_json(&out, "measured_peak", l->rate[0]);
    measure_json(&out, "copy_bandwidth", l->rate[1]);
    text_printf(&out, ", \"rows\": %s\n], \"attention\": %s\n]}\n", b->rows.s, l->attention.s);
    file_write_whole(l->json, out.s, out.n);
    text_free(&out);
}

static void lab_case(Lab *l, const Case *c, int only) {
    EngineArgs args;
    memset(&args, 0, sizeof args);
    args.B = c->B, args.T = c->T, args.dtype = l->bench->dtype;
    l->c = c, l->config = gpt_preset(c->preset)->config;
    l->B = (size_t)c->B, l->T = (size_t)c->T, l->BT = l->B * l->T;
    l->C = (size_t)l->config.C, l->NH = (size_t)l->config.NH, l->V = (size_t)l->config.V;
    GptConfig one = l->config;
    one.L = 1;
    l->work = engine_open(l->bench->engine, &one, &args);
    l->g = &l->work->gpu;
    if (only == ONLY_ALL || only == ONLY_ATTENTION) lab_attention(l);
    if (only == ONLY_ALL || only == ONLY_MATMUL) lab_matmul(l);
    if (only == ONLY_ALL || only == ONLY_LAYERS) lab_layers(l);
    l->bench->engine->close(l->work);
}

int main(int argc, char **argv) {
    BenchOptions o;
    Options options;
    Bench b;
    Case only;
    Lab l;
    Peaks peaks;
    options_init(&options, "kernels_cuda [options]");
    options_add(&options, bench_options(), &o);
    options_parse(&options, argc, argv);
    const int one = case_of(&only, (int)o.preset, o.batch, o.seq_len, cuda_cases, N_CUDA_CASES);
    fclose(file_open(o.json, "ab"));                     // fail now rather than after minutes
    setvbuf(stdout, NULL, _IOLBF, 0);
    memset(&b, 0, sizeof b);
    memset(&l, 0, sizeof l);
    b.engine = engine_cuda(), b.dtype = o.dtype == DTYPE_AUTO ? b.engine->dtype : (int)o.dtype;
    b.sheet_peak = sheet_peak(b.engine->name, b.dtype);
    l.bench = &b, l.json = o.json, l.rounds = o.rounds ? (int)o.rounds : ROUNDS;
    text_printf(&b.rows, "[");
    text_printf(&l.attention, "[");
    printf("%s\n", b.engine->name);
    peaks_open(&peaks, &b, (size_t)o.size);
    l.product = &b.peaks.row[0], l.copy = &b.peaks.row[1];
    peaks_print(&b, l.rate, l.rounds, &b.rows);
    for (int i = 0; i < (o.only == ONLY_PEAK ? 0 : one ? 1 : N_CUDA_DEFAULTS); i++)
        lab_case(&l, one ? &only : &cuda_cases[i], (int)o.only);
    bench_write(&l);
    printf("\nalso in %s\n", o.json);
    peaks_close(&peaks);
    text_free(&b.rows);
    text_free(&l.attention);
    options_free(&options);
    return 0;
}
