// kernels.h: the engine's kernels as rows of a table: the machine's peaks and the matmuls.
#ifndef KERNELS_H
#define KERNELS_H

#define ENGINE_ONLY
#include "../../train_gpt.c"                             // the kernels are static
#include "reference.h"

// ---- Adapters: with layers.h, all that the benchmark knows of the kernels' signatures ----

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

// A model of one layer that only provides the workspace that kernels need besides their arguments.
static Model *work_open(GptConfig config, int B, int T, int dtype) {
    const EngineArgs args = {.B = B, .T = T, .dtype = dtype, .score_rows = 1};
    config.L = 1;
    return cpu_engine.open(&config, &args);
}

// y (M,N) = a (M,K) b (K,N), += with add; "transposed" operands are stored transposed.
static void product(real *y, Model *work, const real *a, int a_transposed, const real *b,
                    int b_transposed, size_t M, size_t N, size_t K, int add) {
    multiply(scaled(y, N, 1, add), &work->pack, a_transposed ? transposed(a, M) : matrix(a, K),
             b_transposed ? transposed(b, K) : matrix(b, N), M, N, K, NULL);
}

// y (M,N) = a (M,K) b (K,N) + bias (N).
static void matmul_bias(real *y, Model *work, const real *a, const real *b, const real *bias,
                         size_t M, size_t N, size_t K) {
    matmul_forward(fresh(y, N, bias), &work->pack, a, b, M, K, N);
}

static size_t head_chunk(size_t BT, size_t V) { return classifier_chunk(BT, V); }

// losses (BT), dx (BT,C) =, dwte (V,C) +=, each token with weight 1/BT.
static void head_all(real *losses, real *dx, real *dwte, Model *work, const real *x,
                     const real *wte, const int *targets, size_t BT, size_t C, size_t V) {
    const Scoring y = {losses, work->uniform, work->distilled, work->apart, targets,
                       (real)(1 / (double)BT), 0, {0}, {0}};
    classifier(&y, dx, dwte, 1, work->logits, &work->pack, x, wte, BT, C, V);
}

// From here on engine->memory reports what later plans use.
static void memory_forget(Model *m) { m->saved_peak = 0; }

// ---- Inputs ----

static real *filled(size_t n, double size, int id) {
    real *x = vectors_new(n);
    fill(x, n, size, id);
    return x;
}

// Small weights, uniform in (-size, size), in the model's own memory.
static void weights_fill(Model *m, double size, int id) {
    fill(m->slot[SLOT_PARAM], m->layout.n, size, id);
}

// ---- Peaks ----

enum { PEAK_FMA, PEAK_UPDATE, PEAK_READ, PEAK_COPY, PEAK_BF16, PEAK_TILES };

// Threads take small pieces dynamically, like those of a matmul: one that is preempted must not
// delay the others.
// per thread
enum { FMA_CHAINS = TILE_ROWS * TILE_VECTORS, PIECE_STEPS = 10000, PIECES = 64 };

// Multiply-adds on registers, a <- a/2 + 1 in independent chains: converges to 2 from any start.
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

// Dot products of two pairs of ones, if the processor has them, accumulated in fp32: each step adds
// 2, which is exact here.
static double bf16_piece(int from) {
    Vector a[FMA_CHAINS], zero = {0};
    const Vector ones = pairs_of_lines(zero + (real)1, zero + (real)1);
    real one, end[FMA_CHAINS * LANES];
    double sum = 0;
    memcpy(&one, &ones, sizeof one);                     // a word holds a pair
#pragma GCC unroll 32
    for (int i = 0; i < FMA_CHAINS; i++) a[i] = zero + (real)(from + i);
    for (int k = 0; k < PIECE_STEPS; k++) {
#pragma GCC unroll 32
        for (int i = 0; i < FMA_CHAINS; i++) a[i] = pairs_dot(a[i], one, ones);
    }
    memcpy(end, a, sizeof end);
    for (int i = 0; i < FMA_CHAINS * (int)LANES; i++)
        sum += (double)end[i] - (from + i / (int)LANES);
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
    return fabs(*(double *)sum / (2.0 * PIECE_STEPS * FMA_CHAINS * LANES * PIECES *
                                  thread_count()) - 1);
}

// Products of tiles of ones (dev/model/peak.h): each adds 32 to every element, exact here, too.
static void tiles_run(void *sum_of_all) {
    double sum = 0;
#pragma omp parallel for schedule(dynamic) reduction(+:sum)
    for (int i = 0; i < PIECES * thread_count(); i++) peak_tiles(&sum);
    *(double *)sum_of_all = sum;
}

static double tiles_check(void *sum) {
    tiles_run(sum);
    return fabs(*(double *)sum / (2.0 * TILE_SIDE * PEAK_STEPS * PIECES * thread_count()) - 1);
}

enum { STREAM_PIECE = 1 << 16 };                         // elements that a thread takes at a time

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
    for (size_t i = 0; i < s->n; i += STREAM_PIECE)
        memcpy(s->y + i, s->x + i, STREAM_PIECE * sizeof(real));
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

static void peak_row(MeasureTable *t, const char *name, double flops, double bytes,
                     void (*run)(void *), double (*check)(void *), void *arg) {
    MeasureRow *r = measure_row(t, "%s", name);
    if (flops > 0) snprintf(r->shape, sizeof r->shape, "%d threads", thread_count());
    else snprintf(r->shape, sizeof r->shape, "%.0f MiB", bytes / (1 << 20));
    r->unit = flops > 0 ? "GFLOP/s" : "GB/s";
    r->work = flops > 0 ? flops : bytes;
    r->run = run, r->check = check, r->arg = arg;
}

static void peak_rows(MeasureTable *t) {
    static double fma_sum, bf16_sum, tiles_sum;
    static Stream s;
    if (!s.x) {
        s.n = ((size_t)128 << 20) / sizeof(real);        // larger than the caches
        s.x = filled(s.n, 1, 1), s.y = filled(s.n, 1, 2);
    }
    const double all = (double)PIECE_STEPS * PIECES * thread_count(),
        bytes = (double)s.n * sizeof(real);
    peak_row(t, "multiply-add, " REAL_NAME, 2 * FMA_CHAINS * LANES * all, 0, fma_run, fma_check,
             &fma_sum);
    peak_row(t, "memory, update", 0, 2 * bytes, update_run, update_check, &s);
    peak_row(t, "memory, read", 0, bytes, read_run, read_check, &s);
    peak_row(t, "memory, copy", 0, 2 * bytes, copy_run, copy_check, &s);
    if (PAIRS)
        peak_row(t, "dot product, bf16", 4 * FMA_CHAINS * LANES * all, 0, bf16_run, bf16_check,
                 &bf16_sum);
    if (TILES && tiles_allowed())
        peak_row(t, "tiles, bf16", 2.0 * PEAK_STEPS * 4 * TILE_SIDE * TILE_SIDE * 2 * TILE_SIDE *
                 PIECES * thread_count(), 0, tiles_run, tiles_check, &tiles_sum);
}

// The bound of matmuls in that dtype: without tiles and dot products, bf16 is multiplied as fp32.
static void matmul_peaks(Bench *b) {
    b->matmul_peak[DTYPE_FP32] = &b->peaks.row[PEAK_FMA];
    b->matmul_peak[DTYPE_BF16] = &b->peaks.row[TILES && tiles_allowed() ? PEAK_TILES
                                               : PAIRS                  ? PEAK_BF16
                                                                        : PEAK_FMA];
}

static void bench_peak(Bench *b, const Case *cases, int n, int rounds) {
    (void)cases, (void)n;
    MeasureTable t = {.rounds = rounds};
    peak_rows(&t);
    for (int i = 0; i < t.n; i++)
        t.row[i].peak = &b->peaks.row[t.row[i].unit[1] == 'F' ? PEAK_FMA : PEAK_UPDATE];
    measure_table(&t);
    measure_print(&t, "peaks, against the first of their kind", &b->rows);
    measure_free(&t);
}

// ---- Matmuls ----

enum { SIZE_BT, SIZE_IN, SIZE_OUT };
enum { FORM_SET, FORM_ADD, FORM_BIAS };

// y (m,n) of a (m,k) and b (k,n); a linear layer's weights are (in,out), the head's (out,in).
static const struct { const char *name; int m, n, k, a_transposed, b_transposed,
                     how; } forms[2][3] = {
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
enum { N_LINEARS = sizeof linears / sizeof linears[0], N_PRODUCTS = 3 * (N_LINEARS + 1),
       CPU_DTYPES = DTYPE_BF16 + 1 };

typedef struct {
    Model *work;
    real *y, *a, *b, *bias;
    size_t M, N, K;
    int a_transposed, b_transposed, how, dtype;
    double times;                                        // how often a training step performs it
} Matmul;

static void matmul_run(void *arg) {
    const Matmul *p = arg;
    if (p->how == FORM_BIAS) matmul_bias(p->y, p->work, p->a, p->b, p->bias, p->M, p->N, p->K);
    else
        product(p->y, p->work, p->a, p->a_transposed, p->b, p->b_transposed, p->M, p->N, p->K,
                p->how == FORM_ADD);
}

// An operand as the matmul reads it: in bf16 only operands are rounded, not the sum or what it is
// added to.
static double matmul_operand(const Matmul *p, real x) {
    return (double)(p->dtype == DTYPE_BF16 ? bf16_round(x) : x);
}

static double matmul_check(void *arg) {
    enum { SAMPLES = 200 };
    const Matmul *p = arg;
    const size_t M = p->M, N = p->N, K = p->K;
    double want[SAMPLES];
    Deviation d = {0};
    fill(p->y, M * N, 1, 3);
    for (int s = 0; s < SAMPLES; s++) {
        const size_t i = pick(M, s, 0), j = pick(N, s, 1);
        want[s] = p->how == FORM_ADD ? (double)p->y[i * N + j] : p->how ==
            FORM_BIAS ? (double)p->bias[j] : 0;
        for (size_t k = 0; k < K; k++)
            want[s] += matmul_operand(p, p->a[p->a_transposed ? k * M + i : i * K + k]) *
                       matmul_operand(p, p->b[p->b_transposed ? j * K + k : k * N + j]);
    }
    matmul_run(arg);
    for (int s = 0; s < SAMPLES; s++)
        deviation_add(&d, (double)p->y[pick(M, s, 0) * N + pick(N, s, 1)], want[s]);
    return deviation(&d);
}

// The three matmuls of one layer, in -> out, or with is_head of the head; a training step performs
// `times` of each.
static void matmuls_new(Matmul *p, int is_head, size_t BT, size_t in, size_t out, double times) {
    const size_t size[] = {BT, in, out};
    for (int f = 0; f < 3; f++, p++) {
        p->M = size[forms[is_head][f].m], p->N = size[forms[is_head][f].n],
            p->K = size[forms[is_head][f].k];
        p->a_transposed = forms[is_head][f].a_transposed, p->b_transposed =
            forms[is_head][f].b_transposed;
        p->how = forms[is_head][f].how;
        p->times = times;
        p->y = vectors_new(p->M * p->N), p->a = filled(p->M * p->K, 1, 4),
            p->b = filled(p->K * p->N, 1, 5);
        p->bias = filled(p->N, 1, 6);
    }
}

// The rows of one dtype: those of p (N_PRODUCTS), with `copy` (N_PRODUCTS) on the same inputs.
static void matmul_rows(MeasureTable *t, Matmul *copy, const Matmul *p, Model *work, Bench *b,
                         int dtype) {
    for (int i = 0; i < N_PRODUCTS; i++) {
        const int layer = i / 3, is_head = layer == N_LINEARS;
        copy[i] = p[i], copy[i].work = work, copy[i].dtype = dtype;
        MeasureRow *r = measure_row(t, "%s %s%s", is_head ? "head" : linears[layer].name,
                                    forms[is_head][i % 3].name,
                                    dtype == DTYPE_BF16 ? ", bf16" : "");
        snprintf(r->shape, sizeof r->shape, "%zu x %zu x %zu", p[i].M, p[i].N, p[i].K);
        r->unit = "GFLOP/s", r->peak = b->matmul_peak[dtype];
        r->work = 2.0 * (double)p[i].M * (double)p[i].N * (double)p[i].K;
        r->run = matmul_run, r->check = matmul_check, r->arg = &copy[i];
        r->tolerance = rounding((double)p[i].K);
    }
}

// For n consecutive rows, weighted by how often a training step performs them: all FLOPs / the
// FLOPs that the peak would have achieved in the same time, by the rows' medians.
static double matmuls_of_peak(const MeasureTable *t, const MeasureRow *rows, int n) {
    double work = 0, peak_work = 0;
    for (int i = 0; i < n; i++) {
        const double flops = ((const Matmul *)rows[i].arg)->times * rows[i].work;
        work += flops, peak_work += flops / measure_median(rows[i].fraction, t->rounds);
    }
    return work / peak_work;
}

static void matmuls_print(const MeasureTable *t, const char *title, Text *json) {
    for (int dtype = 0; dtype < CPU_DTYPES; dtype++) {
        const MeasureRow *rows = &t->row[dtype * N_PRODUCTS];
        const double layers = matmuls_of_peak(t, rows, 3 * N_LINEARS),
            all = matmuls_of_peak(t, rows, N_PRODUCTS);
        printf("all matmuls of a step, %s: %.1f%% of peak in the layers, %.1f%% with the head\n",
               dtype_name[dtype], 100 * layers, 100 * all);
        measure_json_open(json);
        measure_json_text(json, "table", title);
        measure_json_text(json, "name", "all matmuls of a step");
        measure_json_text(json, "dtype", dtype_name[dtype]);
        measure_json(json, "of_peak_layers", layers);
        measure_json(json, "of_peak", all);
        text_printf(json, "}");
    }
}

static void bench_matmul(Bench *b, const Case *cases, int n, int rounds) {
    for (int i = 0; i < n; i++) {
        const GptConfig c = gpt_preset(cases[i].preset)->config;
        const size_t BT = (size_t)cases[i].B * (size_t)cases[i].T, C = (size_t)c.C, V = (size_t)c.V;
        MeasureTable t = {.rounds = rounds};
        Matmul p[N_PRODUCTS] = {{0}}, row[CPU_DTYPES][N_PRODUCTS];
        Model *work[CPU_DTYPES];
        for (int k = 0; k < N_LINEARS; k++)
            matmuls_new(p + 3 * k, 0, BT, (size_t)linears[k].in * C, (size_t)linears[k].out * C,
                         c.L);
        matmuls_new(p + 3 * N_LINEARS, 1, head_chunk(BT, V), C, V,
                     (double)BT / (double)head_chunk(BT, V));
        for (int d = 0; d < CPU_DTYPES; d++) {
            work[d] = work_open(c, cases[i].B, cases[i].T, d);
            matmul_rows(&t, row[d], p, work[d], b, d);
        }
        measure_table(&t);
        char *title = xprintf("matrix products, (M,N) over K: %s, B %d, T %d", cases[i].preset,
                              cases[i].B, cases[i].T);
        measure_print(&t, title, &b->rows);
        matmuls_print(&t, title, &b->rows);
        measure_free(&t);
        free(title);
        for (int k = 0; k < N_PRODUCTS; k++)
            free(p[k].y), free(p[k].a), free(p[k].b), free(p[k].bias);
        for (int d = 0; d < CPU_DTYPES; d++) cpu_engine.close(work[d]);
    }
}

#endif
