// kernels.h: the engine's kernels as rows of a table: the machine's peaks and the matrix products.
#ifndef KERNELS_H
#define KERNELS_H

#define ENGINE_ONLY
#include "../../train_gpt.c"                             // the kernels are static
#include "measure.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// ---- What all tables share ----

typedef struct { const char *preset; int B, T; } Case;   // a model, and B rows of T tokens

typedef struct {
    MeasureTable peaks;                                  // PEAK_*, prepared as slices beside others
    Text rows, drop;                                     // JSON arrays
} Bench;

// ---- Adapters: with the layers' runs in layers.h, all that the benchmark knows of the kernels' signatures ----

static void set_threads(int n) {
#ifdef _OPENMP
    if (n > 0) omp_set_num_threads(n);
#else
    (void)n;
#endif
}

static int thread_count(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// A model of one layer that only lends the room that kernels need besides their arguments.
static Model *room_open(GptConfig config, int B, int T) {
    const EngineArgs args = {B, T, 0, DTYPE_FP32, {0, 0, 0}};
    config.L = 1;
    return cpu_engine.open(&config, &args);
}

// y (M,N) = a (M,K) b (K,N), += with add; "turned" operands are stored transposed.
static void product(real *y, Model *room, const real *a, int a_turned, const real *b, int b_turned, size_t M, size_t N,
                    size_t K, int add) {
    multiply(add ? added(y, N, 1) : fresh(y, N, NULL), &room->pack, a_turned ? turned(a, M) : lines(a, K),
             b_turned ? turned(b, K) : lines(b, N), M, N, K, NULL);
}

// y (M,N) = a (M,K) b (K,N) + bias (N)
static void product_bias(real *y, Model *room, const real *a, const real *b, const real *bias, size_t M, size_t N,
                         size_t K) {
    matmul_forward(fresh(y, N, bias), &room->pack, a, b, M, K, N);
}

static size_t head_chunk(size_t BT, size_t V) { return classifier_chunk(BT, V); }

// losses (BT), dx (BT,C) =, dwte (V,C) +=, each token with the weight 1/BT
static void head_all(real *losses, real *dx, real *dwte, Model *room, const real *x, const real *wte, const int *targets,
                 size_t BT, size_t C, size_t V) {
    classifier(losses, dx, dwte, room->logits, &room->pack, x, wte, targets, (real)(1 / (double)BT), BT, C, V);
}

// From here on engine->memory reports what the plans that follow use.
static void memory_forget(Model *m) { m->kept_peak = 0; }

// ---- Numbers to work on ----

// x (n) uniform in (-size, size), a function of id and place.
static void fill(real *x, size_t n, double size, int id) {
#pragma omp parallel for
    for (size_t i = 0; i < n; i += 4) {
        const Philox w = rng_words(0, STREAM_TEST, i, (uint32_t)id, 0);
        for (size_t j = i; j < n && j < i + 4; j++) x[j] = (real)(size * (2 * uniform01(w.v[j - i]) - 1));
    }
}

static real *filled(size_t n, double size, int id) {
    real *x = room_new(n);
    fill(x, n, size, id);
    return x;
}

static void fill_tokens(int *x, size_t n, int V, int id) {
    for (size_t i = 0; i < n; i++) x[i] = (int)(rng_words(0, STREAM_TEST, i, (uint32_t)id, 1).v[0] % (uint32_t)V);
}

// The k-th place among n to compare: the ends, then random ones. Another axis has another salt.
static size_t pick(size_t n, int k, uint32_t salt) {
    return k == 0 ? n - 1 : k == 1 ? 0 : rng_words(0, STREAM_TEST, (uint64_t)k, salt, 2).v[0] % n;
}

// What rounding explains in a sum of n terms, relative to its size.
static double rounding(double n) { return 8 * REAL_EPSILON * sqrt(n); }

// ---- Peaks ----

enum { PEAK_FMA, PEAK_UPDATE, PEAK_READ, PEAK_COPY, PEAK_BF16 };

// Threads take small pieces as they come, as those of a product do: one that the system stops must not hold up the rest.
enum { FMA_CHAINS = TILE_ROWS * TILE_VECTORS, BF16_CHAINS = 24, PIECE_STEPS = 10000, PIECES = 64 };     // per thread

// Multiply-adds on registers, a <- a/2 + 1 in independent chains: 2 in the end, wherever a began.
static double fma_piece(int from) {
    Vector a[FMA_CHAINS], zero = {0};
    const Vector half = zero + (real)0.5, one = zero + (real)1;
    real end[FMA_CHAINS * LANES];
    double sum = 0;
#pragma GCC unroll 32
    for (int i = 0; i < FMA_CHAINS; i++) a[i] = zero + (real)(from + i);
    for (int k = 0; k < PIECE_STEPS; k++) {
#pragma GCC unroll 32
        for (int i = 0; i < FMA_CHAINS; i++) a[i] = a[i] * half + one;
    }
    memcpy(end, a, sizeof end);
    for (int i = 0; i < FMA_CHAINS * (int)LANES; i++) sum += (double)end[i];
    return sum;
}

static void fma_run(void *sum_of_all) {
    double sum = 0;
#pragma omp parallel for schedule(dynamic) reduction(+:sum)
    for (int i = 0; i < PIECES * thread_count(); i++) sum += fma_piece(i);
    *(double *)sum_of_all = sum;
}

static double fma_check(void *sum) {
    fma_run(sum);
    return fabs(*(double *)sum / (2.0 * FMA_CHAINS * LANES * PIECES * thread_count()) - 1);
}

#ifdef __AVX512BF16__
// Dot products of two pairs, added up in fp32: each step adds 2, which is exact here.
static double bf16_piece(int from) {
    __m512 a[BF16_CHAINS];
    float end[BF16_CHAINS * 16];
    const __m512bh one = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1), _mm512_set1_ps(1));
    double sum = 0;
#pragma GCC unroll 32
    for (int i = 0; i < BF16_CHAINS; i++) a[i] = _mm512_set1_ps((float)(from + i));
    for (int k = 0; k < PIECE_STEPS; k++) {
#pragma GCC unroll 32
        for (int i = 0; i < BF16_CHAINS; i++) a[i] = _mm512_dpbf16_ps(a[i], one, one);
    }
    memcpy(end, a, sizeof end);
    for (int i = 0; i < BF16_CHAINS * 16; i++) sum += (double)end[i] - (from + i / 16);
    return sum;
}

static void bf16_run(void *sum_of_all) {
    double sum = 0;
#pragma omp parallel for schedule(dynamic) reduction(+:sum)
    for (int i = 0; i < PIECES * thread_count(); i++) sum += bf16_piece(i);
    *(double *)sum_of_all = sum;
}

static double bf16_check(void *sum) {
    bf16_run(sum);
    return fabs(*(double *)sum / (2.0 * PIECE_STEPS * BF16_CHAINS * 16 * PIECES * thread_count()) - 1);
}
#endif

enum { STREAM_PIECE = 1 << 16 };                         // numbers that a thread takes at a time

typedef struct { real *x, *y; size_t n; double sum; } Stream;

// x <- 1 - x: every cache line is read and written back.
static void update_run(void *arg) {
    const Stream *s = arg;
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < s->n; i += STREAM_PIECE) {
        real *x = s->x + i;
        for (size_t j = 0; j < STREAM_PIECE; j++) x[j] = 1 - x[j];
    }
}

static void read_run(void *arg) {
    enum { WIDTH = 4 * LANES };
    Stream *s = arg;
    double sum = 0;
#pragma omp parallel for schedule(dynamic) reduction(+:sum)
    for (size_t i = 0; i < s->n; i += STREAM_PIECE) {
        Vector part[4] = {{0}};
        real end[WIDTH];
        for (size_t j = i; j < i + STREAM_PIECE; j += WIDTH)
            for (size_t v = 0; v < 4; v++) part[v] += *(const Vector *)(s->x + j + v * LANES);
        memcpy(end, part, sizeof end);
        for (size_t j = 0; j < WIDTH; j++) sum += (double)end[j];
    }
    s->sum = sum;
}

static void copy_run(void *arg) {
    const Stream *s = arg;
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < s->n; i += STREAM_PIECE) memcpy(s->y + i, s->x + i, STREAM_PIECE * sizeof(real));
}

static double update_check(void *arg) {
    Stream *s = arg;
    Deviation d = {0};
    for (size_t i = 0; i < s->n; i++) s->x[i] = (real)0.25;
    update_run(s);
    for (size_t i = 0; i < s->n; i++) deviation_add(&d, (double)s->x[i], 0.75);
    return deviation(&d);
}

static double read_check(void *arg) {
    Stream *s = arg;
    for (size_t i = 0; i < s->n; i++) s->x[i] = i & 1;
    read_run(s);
    return fabs(s->sum - (double)s->n / 2);
}

static double copy_check(void *arg) {
    const Stream *s = arg;
    memset(s->y, 0, s->n * sizeof(real));
    copy_run(arg);
    return memcmp(s->x, s->y, s->n * sizeof(real)) ? INFINITY : 0;
}

static void peak_row(MeasureTable *t, const char *name, double flops, double bytes, void (*run)(void *),
                     double (*check)(void *), void *arg) {
    MeasureRow *r = measure_row(t, "%s", name);
    if (flops > 0) snprintf(r->shape, sizeof r->shape, "%d threads", thread_count());
    else snprintf(r->shape, sizeof r->shape, "%.0f MiB", bytes / (1 << 20));
    r->unit = flops > 0 ? "GFLOP/s" : "GB/s";
    r->work = flops > 0 ? flops : bytes;
    r->run = run, r->check = check, r->arg = arg;
}

static void peak_rows(MeasureTable *t) {
    static double fma_sum, bf16_sum;
    static Stream s;
    if (!s.x) {
        s.n = ((size_t)128 << 20) / sizeof(real);        // larger than the caches
        s.x = filled(s.n, 1, 1), s.y = filled(s.n, 1, 2);
    }
    const double all = (double)PIECE_STEPS * PIECES * thread_count(), bytes = (double)s.n * sizeof(real);
    peak_row(t, "multiply-add, " REAL_NAME, 2 * FMA_CHAINS * LANES * all, 0, fma_run, fma_check, &fma_sum);
    peak_row(t, "memory, update", 0, 2 * bytes, update_run, update_check, &s);
    peak_row(t, "memory, read", 0, bytes, read_run, read_check, &s);
    peak_row(t, "memory, copy", 0, 2 * bytes, copy_run, copy_check, &s);
#ifdef __AVX512BF16__
    peak_row(t, "dot product, bf16", 4 * BF16_CHAINS * 16 * all, 0, bf16_run, bf16_check, &bf16_sum);
#else
    (void)bf16_sum;
#endif
}

static void bench_peak(Bench *b, const Case *cases, int n, int rounds) {
    (void)cases, (void)n;
    MeasureTable t = {.rounds = rounds};
    peak_rows(&t);
    for (int i = 0; i < t.n; i++) t.row[i].peak = &b->peaks.row[i == PEAK_FMA || i == PEAK_BF16 ? PEAK_FMA : PEAK_UPDATE];
    measure_table(&t);
    measure_print(&t, "peaks, against the first of their kind", &b->rows);
    measure_free(&t);
}

// ---- Matrix products ----

enum { SIZE_BT, SIZE_IN, SIZE_OUT };
enum { FORM_SET, FORM_ADD, FORM_BIAS };

// y (m,n) of a (m,k) and b (k,n); a linear layer's weights are (in,out), the head's (out,in).
static const struct { const char *name; int m, n, k, a_turned, b_turned, how; } forms[2][3] = {
    {{"forward",  SIZE_BT,  SIZE_OUT, SIZE_IN,  0, 0, FORM_BIAS},
     {"d_input",  SIZE_BT,  SIZE_IN,  SIZE_OUT, 0, 1, FORM_SET},
     {"d_weight", SIZE_IN,  SIZE_OUT, SIZE_BT,  1, 0, FORM_ADD}},
    {{"forward",  SIZE_BT,  SIZE_OUT, SIZE_IN,  0, 1, FORM_SET},
     {"d_input",  SIZE_BT,  SIZE_IN,  SIZE_OUT, 0, 0, FORM_SET},
     {"d_weight", SIZE_OUT, SIZE_IN,  SIZE_BT,  1, 0, FORM_ADD}},
};

static const struct { const char *name; int in, out; } linears[] = {        // in channels
    {"qkv", 1, 3}, {"attproj", 1, 1}, {"fc", 1, 4}, {"fcproj", 4, 1},
};
enum { N_LINEARS = sizeof linears / sizeof linears[0], N_PRODUCTS = 3 * (N_LINEARS + 1) };

typedef struct { Model *room; real *y, *a, *b, *bias; size_t M, N, K; int a_turned, b_turned, how; } Product;

static void product_run(void *arg) {
    const Product *p = arg;
    if (p->how == FORM_BIAS) product_bias(p->y, p->room, p->a, p->b, p->bias, p->M, p->N, p->K);
    else product(p->y, p->room, p->a, p->a_turned, p->b, p->b_turned, p->M, p->N, p->K, p->how == FORM_ADD);
}

static double product_check(void *arg) {
    enum { SAMPLES = 200 };
    const Product *p = arg;
    double want[SAMPLES];
    Deviation d = {0};
    for (int s = 0; s < SAMPLES; s++) {
        const size_t i = pick(p->M, s, 0), j = pick(p->N, s, 1), M = p->M, N = p->N, K = p->K;
        want[s] = p->how == FORM_ADD ? (double)p->y[i * N + j] : p->how == FORM_BIAS ? (double)p->bias[j] : 0;
        for (size_t k = 0; k < K; k++)
            want[s] += (double)p->a[p->a_turned ? k * M + i : i * K + k] * (double)p->b[p->b_turned ? j * K + k : k * N + j];
    }
    product_run(arg);
    for (int s = 0; s < SAMPLES; s++) deviation_add(&d, (double)p->y[pick(p->M, s, 0) * p->N + pick(p->N, s, 1)], want[s]);
    return deviation(&d);
}

// The three products of one layer, in -> out, or with is_head of the head.
static void product_rows(MeasureTable *t, Product *p, Model *room, MeasureRow *peak, const char *name, int is_head,
                         size_t BT, size_t in, size_t out) {
    const size_t size[] = {BT, in, out};
    for (int f = 0; f < 3; f++, p++) {
        p->room = room;
        p->M = size[forms[is_head][f].m], p->N = size[forms[is_head][f].n], p->K = size[forms[is_head][f].k];
        p->a_turned = forms[is_head][f].a_turned, p->b_turned = forms[is_head][f].b_turned;
        p->how = forms[is_head][f].how;
        p->y = filled(p->M * p->N, 1, 3), p->a = filled(p->M * p->K, 1, 4), p->b = filled(p->K * p->N, 1, 5);
        p->bias = filled(p->N, 1, 6);
        MeasureRow *r = measure_row(t, "%s %s", name, forms[is_head][f].name);
        snprintf(r->shape, sizeof r->shape, "%zu x %zu x %zu", p->M, p->N, p->K);
        r->unit = "GFLOP/s", r->peak = peak;
        r->work = 2.0 * (double)p->M * (double)p->N * (double)p->K;
        r->run = product_run, r->check = product_check, r->arg = p;
        r->tolerance = rounding((double)p->K);
    }
}

static void bench_matmul(Bench *b, const Case *cases, int n, int rounds) {
    for (int i = 0; i < n; i++) {
        const GptConfig c = gpt_preset(cases[i].preset)->config;
        const size_t BT = (size_t)cases[i].B * (size_t)cases[i].T, C = (size_t)c.C, V = (size_t)c.V;
        MeasureTable t = {.rounds = rounds};
        MeasureRow *peak = &b->peaks.row[PEAK_FMA];
        Product p[N_PRODUCTS];
        Model *room = room_open(c, cases[i].B, cases[i].T);
        for (int k = 0; k < N_LINEARS; k++)
            product_rows(&t, p + 3 * k, room, peak, linears[k].name, 0, BT, (size_t)linears[k].in * C,
                         (size_t)linears[k].out * C);
        product_rows(&t, p + 3 * N_LINEARS, room, peak, "head", 1, head_chunk(BT, V), C, V);
        measure_table(&t);
        char *title = xprintf("matrix products, (M,N) over K: %s, B %d, T %d", cases[i].preset, cases[i].B, cases[i].T);
        measure_print(&t, title, &b->rows);
        measure_free(&t);
        free(title);
        for (int k = 0; k < N_PRODUCTS; k++) free(p[k].y), free(p[k].a), free(p[k].b), free(p[k].bias);
        cpu_engine.close(room);
    }
}

#endif
