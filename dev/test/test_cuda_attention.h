// test_cuda_attention.h: attention on the GPU against plain sums in double, at odd shapes. Part of
// test_cuda.cu, which includes train_gpt.cu.
//
// Tolerances: a rounding to the storage type or to fp32 is one step of a random walk; E below is
// the error of one term of a sum, and the sum of the squares of all E is that of the walk.
#ifndef TEST_CUDA_ATTENTION_H
#define TEST_CUDA_ATTENTION_H

#include "../model/rng.h"
#include "test.h"

// sharp: factor of q; rows: by the kernels that hold whole rows of scores
struct AttentionCase { size_t n, T, NH, HS; int bf16; double sharp; int rows = 0; };

// What a case computes, in double: host copies of the device's arrays, in their own type.
typedef struct { size_t tokens, C; double *qkv, *dy, *y, *lse, *dqkv; } AttentionRun;

static double *attention_numbers(size_t n, int id) {
    double *x = (double *)xcalloc(n + 1, sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = 2 * uniform01(rng_words(0, STREAM_TEST, i, (uint32_t)id, 9).v[0]) - 1;
    return x;
}

// Copies n elements to the device and back; x is rounded to the type. NULL: uninitialized memory.
template <class N> static N *attention_upload(double *x, size_t n) {
    N *device, *host = (N *)xcalloc(n + 1, sizeof *host);
    CUDA_CHECK(cudaMalloc((void **)&device, n * sizeof *device));
    for (size_t i = 0; x && i < n; i++)
        host[i] = from_float<N>((float)x[i]), x[i] = (double)to_float(host[i]);
    if (x) CUDA_CHECK(cudaMemcpy(device, host, n * sizeof *device, cudaMemcpyHostToDevice));
    else CUDA_CHECK(cudaMemset(device, 0xFF, n * sizeof *device));             // NaN
    free(host);
    return device;
}

template <class N> static double *attention_download(N *device, size_t n) {
    N *host = (N *)xcalloc(n + 1, sizeof *host);
    double *x = (double *)xcalloc(n + 1, sizeof *x);
    CUDA_CHECK(cudaMemcpy(host, device, n * sizeof *host, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++) x[i] = (double)to_float(host[i]);
    free(host);
    CUDA_CHECK(cudaFree(device));
    return x;
}

// Both passes by attention_rows.h, in blocks that ROWS_SCORES keeps small here.
static void attention_run_rows(const AttentionRun *r, const AttentionCase *c, void *y, float *lse,
                               void *dqkv, float *inner, const void *qkv, const void *dy) {
    Gpu g = test_gpu(c->bf16 ? DTYPE_BF16 : DTYPE_FP32, r->C);
    AttentionRows w;
    const RowsShape a = {NULL, SCORES_PLAIN, {NULL, NULL, 0}, NULL, c->n, c->T, NULL, NULL};
    const size_t number = size_of_number(&g),
        bytes = rows_open(&w, NULL, c->n, c->T, r->C, c->NH, number, g.stream);
    char *const memory = (char *)device_new(bytes), *at = memory;
    rows_open(&w, &at, c->n, c->T, r->C, c->NH, number, g.stream);
    attention_rows_forward(&g, y, lse, &w, qkv, &a);
    attention_rows_backward(&g, dqkv, inner, &w, dy, qkv, y, lse, &a);
    CUDA_CHECK(cudaStreamSynchronize(g.stream));
    device_free(memory);
    test_gpu_close(&g);
}

template <class N> static void attention_run_as(AttentionRun *r, const AttentionCase *c) {
    const size_t numbers = r->tokens * r->C, heads = r->tokens * c->NH;
    N *qkv = attention_upload<N>(r->qkv, 3 * numbers), *dy = attention_upload<N>(r->dy, numbers);
    N *y = attention_upload<N>(NULL, numbers), *dqkv = attention_upload<N>(NULL, 3 * numbers);
    float *lse = attention_upload<float>(NULL, heads),
        *inner = attention_upload<float>(NULL, heads);
    if (c->rows) attention_run_rows(r, c, y, lse, dqkv, inner, qkv, dy);
    else {
        attention_forward(y, lse, qkv, NULL, c->n, c->T, r->C, c->NH, c->bf16, NULL);
        attention_backward(dqkv, inner, dy, qkv, y, lse, NULL, c->n, c->T, r->C, c->NH, c->bf16,
                           NULL);
    }
    CUDA_CHECK(cudaDeviceSynchronize());
    r->y = attention_download(y, numbers), r->dqkv = attention_download(dqkv, 3 * numbers);
    r->lse = attention_download(lse, heads);
    CUDA_CHECK(cudaFree(qkv));
    CUDA_CHECK(cudaFree(dy));
    CUDA_CHECK(cudaFree(inner));
}

static AttentionRun attention_inputs(const AttentionCase *c) {
    AttentionRun r = {c->n * c->T, c->NH * c->HS, NULL, NULL, NULL, NULL, NULL};
    r.qkv = attention_numbers(3 * r.tokens * r.C, 1), r.dy = attention_numbers(r.tokens * r.C, 2);
    for (size_t i = 0; i < 3 * r.tokens * r.C; i++) r.qkv[i] *= i % (3 * r.C) < r.C ? c->sharp : 1;
    return r;
}

static void attention_run(AttentionRun *r, const AttentionCase *c) {
    if (c->bf16) attention_run_as<bf16>(r, c);
    else attention_run_as<float>(r, c);
}

static void attention_free(AttentionRun *r) {
    free(r->qkv), free(r->dy), free(r->y), free(r->lse), free(r->dqkv);
}

// ---- The reference: one head of one row ----

typedef struct {
    size_t T, C, HS;
    // of the head; rows are 3 C or C apart
    const double *q, *k, *v, *dy, *y, *lse, *dq, *dk, *dv;
    double *p, *ds, *p_error, *ds_error;  // (T,T): P, ds, and their errors E
    double scale, unit;                   // the storage type rounds by up to `unit` of an element
    char name[160];
} AttentionHead;

// tiny: underflow of many P, of fp32 or bf16
static const double fp32_unit = 1.0 / (1 << 24), fp32_tiny = 1e-34;

static double dot(const double *a, const double *b, size_t n, double *size) {
    double sum = 0, squares = 0;
    for (size_t d = 0; d < n; d++) sum += a[d] * b[d], squares += a[d] * b[d] * a[d] * b[d];
    *size = sqrt(squares);
    return sum;
}

// The error of a sum of n terms in fp32; `size` is the root of the sum of their squares.
static double sum_error(size_t n, double size) {
    return 2 * fp32_unit * (sqrt((double)n) + 4) * size + fp32_tiny;
}

// P and its relative error, lse and y.
static void attention_expect_forward(AttentionHead *h, size_t i) {
    double *p = h->p + i * h->T, *error = h->p_error + i * h->T, top = -INFINITY, sum = 0, walk = 0;
    for (size_t j = 0; j <= i; j++) {
        double size;
        p[j] = h->scale * dot(h->q + i * 3 * h->C, h->k + j * 3 * h->C, h->HS, &size);
        error[j] = sum_error(h->HS, h->scale * size) + 4 * fp32_unit * fabs(p[j]);
        top = fmax(top, p[j]);
    }
    for (size_t j = 0; j <= i; j++) sum += exp(p[j] - top);
    const double lse = top + log(sum);
    for (size_t j = 0; j <= i; j++) {
        error[j] += 4 * fp32_unit * (1 + fabs(p[j] - top));          // from the exponential
        p[j] = exp(p[j] - lse);
        walk += p[j] * error[j] * p[j] * error[j];
    }
    EXPECT_CLOSE(h->lse[i], lse, 4 * sqrt(walk) + sum_error(i, 1) + 4 * fp32_unit * fabs(lse),
                 h->name);
    for (size_t j = 0; j <= i; j++) error[j] += 4 * fp32_unit * (1 + fabs(lse));
    for (size_t d = 0; d < h->HS; d++) {
        double y = 0, squares = 0, shares = 0;
        for (size_t j = 0; j <= i; j++) {
            const double E = p[j] * (error[j] + h->unit);
            y += p[j] * h->v[j * 3 * h->C + d];
            squares += E * h->v[j * 3 * h->C + d] * E * h->v[j * 3 * h->C + d];
            shares += E * E;
        }
        const double tolerance = 4 * sqrt(squares) + (4 * sqrt(shares) + 1.01 * h->unit) * fabs(y) +
            sum_error(i, 1);
        EXPECT_CLOSE(h->y[i * h->C + d], y, tolerance, h->name);
    }
}

// ds and its error, and dq. <dy, y> uses the device's y.
static void attention_expect_queries(AttentionHead *h, size_t i) {
    double size, *ds = h->ds + i * h->T, *error = h->ds_error + i * h->T;
    const double *p = h->p + i * h->T, inner = dot(h->dy + i * h->C, h->y + i * h->C, h->HS, &size);
    const double inner_error = sum_error(h->HS, size);
    for (size_t j = 0; j <= i; j++) {
        const double dp = dot(h->dy + i * h->C, h->v + j * 3 * h->C, h->HS, &size);
        ds[j] = p[j] * (dp - inner);
        error[j] = fabs(ds[j]) * (h->p_error[i * h->T + j] + h->unit) + p[j] * sum_error(h->HS,
            size);
        error[j] += p[j] * (inner_error + fp32_unit * (fabs(dp) + fabs(inner)));
    }
    for (size_t d = 0; d < h->HS; d++) {
        // shift: one error of `inner` affects all terms
        double dq = 0, squares = 0, terms = 0, shift = 0;
        for (size_t j = 0; j <= i; j++) {
            const double k = h->k[j * 3 * h->C + d];
            dq += ds[j] * k, squares += error[j] * k * error[j] * k, terms += ds[j] * k * ds[j] * k;
            shift += p[j] * inner_error * fabs(k) + fabs(ds[j] * k) * 4 * fp32_unit *
                (1 + fabs(h->lse[i]));
        }
        const double tolerance = 4 * sqrt(squares) + shift + sum_error(i + 1, sqrt(terms)) +
            1.01 * h->unit * fabs(dq);
        EXPECT_CLOSE(h->dq[i * 3 * h->C + d], h->scale * dq, h->scale * tolerance, h->name);
    }
}

static void attention_expect_keys(AttentionHead *h, size_t j) {
    for (size_t d = 0; d < h->HS; d++) {
        double dk = 0, dk_squares = 0, dk_terms = 0, dv = 0, dv_squares = 0, dv_terms = 0;
        for (size_t i = j; i < h->T; i++) {
            const size_t at = i * h->T + j;
            const double q = h->q[i * 3 * h->C + d], dy = h->dy[i * h->C + d],
                E = h->p[at] * (h->p_error[at] + h->unit);
            dk += h->ds[at] * q, dk_terms += h->ds[at] * q * h->ds[at] * q;
            dk_squares += h->ds_error[at] * q * h->ds_error[at] * q;
            dv += h->p[at] * dy, dv_terms += h->p[at] * dy * h->p[at] * dy,
                dv_squares += E * dy * E * dy;
        }
        const double dk_tolerance = 4 * sqrt(dk_squares) + sum_error(h->T - j, sqrt(dk_terms)) +
            1.01 * h->unit * fabs(dk);
        const double dv_tolerance = 4 * sqrt(dv_squares) + sum_error(h->T - j, sqrt(dv_terms)) +
            1.01 * h->unit * fabs(dv);
        EXPECT_CLOSE(h->dk[j * 3 * h->C + d], h->scale * dk, h->scale * dk_tolerance, h->name);
        EXPECT_CLOSE(h->dv[j * 3 * h->C + d], dv, dv_tolerance, h->name);
    }
}

static void attention_expect(const AttentionRun *r, const AttentionCase *c) {
    const size_t T = c->T, C = r->C;
    double *buffer = (double *)xcalloc(4 * T * T, sizeof *buffer);
    for (size_t row = 0; row < c->n; row++)
        for (size_t head = 0; head < c->NH; head++) {
            const size_t at = row * T * C + head * c->HS, at3 = row * T * 3 * C + head * c->HS;
            AttentionHead h = {
                T, C, c->HS, r->qkv + at3, r->qkv + at3 + C, r->qkv + at3 + 2 * C, r->dy + at,
                r->y + at,
                r->lse + (row * c->NH + head) * T, r->dqkv + at3, r->dqkv + at3 + C,
                r->dqkv + at3 + 2 * C,
                buffer, buffer + T * T, buffer + 2 * T * T, buffer + 3 * T * T,
                1 / sqrt((double)c->HS),
                c->bf16 ? 1.0 / (1 << 8) : fp32_unit, "",
            };
            snprintf(h.name, sizeof h.name, "%s, T %zu, HS %zu, row %zu of %zu, head %zu of %zu",
                     c->bf16 ? "bf16" : "fp32", T, c->HS, row, c->n, head, c->NH);
            for (size_t i = 0; i < T; i++)
                attention_expect_forward(&h, i), attention_expect_queries(&h, i);
            for (size_t j = 0; j < T; j++) attention_expect_keys(&h, j);
        }
    free(buffer);
}

static void attention_case(AttentionCase c) {
    AttentionRun r = attention_inputs(&c);
    attention_run(&r, &c);
    attention_expect(&r, &c);
    attention_free(&r);
}

// ---- The tests ----

// Around the tiles of all kernels: 16, 32, 64 and 128 rows; heads that fill a tile or not, or are
// no multiple of 16 bytes.
static void attention_shapes(int in_bf16, int rows) {
    static const size_t tokens[] = {1, 2, 15, 16, 17, 63, 64, 65, 127, 130, 200},
        sizes[] = {4, 8, 20, 32, 64, 80, 128};
    for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++)
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
            attention_case(AttentionCase{1 + (t + s) % 2, tokens[t], 1 + (t + 2 * s) % 3, sizes[s],
                                         in_bf16, 3, rows});
}

void test_cuda_attention_fp32(void) { attention_shapes(0, 0); }
void test_cuda_attention_bf16(void) { attention_shapes(1, 0); }
void test_cuda_attention_rows_fp32(void) { attention_shapes(0, 1); }
void test_cuda_attention_rows_bf16(void) { attention_shapes(1, 1); }

void test_cuda_attention_wide_heads(void) {
    static const size_t tokens[] = {1, 17, 65}, sizes[] = {136, 250, 256};
    for (int i = 0; i < 36; i++)
        attention_case(AttentionCase{1, tokens[i / 2 % 3], 2, sizes[i / 6 % 3], i % 2, 3, i / 18});
}

// Scores in the hundreds: one key gets nearly all the weight, exponentials underflow, nothing
// overflows.
void test_cuda_attention_sharp(void) {
    for (int i = 0; i < 8; i++)
        attention_case(AttentionCase{1, 150, 2, (size_t)(i / 2 % 2 ? 128 : 64), i % 2, 300, i / 4});
}

// The same bits for every order of threads and blocks that the emulator tries, and for every launch
// on a GPU.
void test_cuda_attention_same_bits(void) {
    static const size_t sizes[] = {20, 64, 128};
    const char *seed = getenv("EMU_SEED");
    char *before = seed ? xprintf("%s", seed) : NULL;
    for (int i = 0; i < 12; i++) {
        const AttentionCase c = {2, 150, 2, sizes[i / 2 % 3], i % 2, 3, i / 6};
        AttentionRun first = attention_inputs(&c);
        attention_run(&first, &c);
        const size_t numbers = first.tokens * first.C;
        for (int other = 2; other < 5; other++) {
            char text[16];
            snprintf(text, sizeof text, "%d", other);
            setenv("EMU_SEED", text, 1);
            AttentionRun r = attention_inputs(&c);
            attention_run(&r, &c);
            EXPECT(!memcmp(r.y, first.y, numbers * sizeof(double)), "y differs: case %d, seed %d",
                   i, other);
            EXPECT(!memcmp(r.lse, first.lse, first.tokens * c.NH * sizeof(double)),
                   "lse differs: case %d, seed %d", i, other);
            EXPECT(!memcmp(r.dqkv, first.dqkv, 3 * numbers * sizeof(double)),
                   "dqkv differs: case %d, seed %d", i, other);
            attention_free(&r);
        }
        attention_free(&first);
        if (before) setenv("EMU_SEED", before, 1);
        else unsetenv("EMU_SEED");
    }
    free(before);
}

// Neither other rows nor other heads are read: NaN in them stays there.
void test_cuda_attention_neighbours(void) {
    static const size_t sizes[] = {40, 64, 80};
    for (int i = 0; i < 12; i++) {
        const AttentionCase c = {3, 70, 3, sizes[i / 2 % 3], i % 2, 3, i / 6};
        AttentionRun r = attention_inputs(&c);
        for (size_t token = 0; token < r.tokens; token++)
            for (size_t d = 0; d < r.C; d++) {
                if (token / c.T == 1 && d / c.HS == 1) continue;
                for (int part = 0; part < 3; part++) r.qkv[(3 * token + part) * r.C + d] = NAN;
                r.dy[token * r.C + d] = NAN;
            }
        attention_run(&r, &c);
        for (size_t token = 0; token < r.tokens; token++)
            for (size_t d = 0; d < 3 * r.C; d++) {
                const int own = token / c.T == 1 && d % r.C / c.HS == 1;
                EXPECT(isnan(r.dqkv[token * 3 * r.C + d]) == !own,
                       "case %d: dqkv of token %zu, %zu", i, token, d);
            }
        attention_free(&r);
    }
}

static void attention_check_257(void *unused) {
    (void)unused;
    attention_check(2 * 257, 2);
}

// No rows: nothing is launched, and no pointer is accessed.
void test_cuda_attention_refused(void) {
    for (int in_bf16 = 0; in_bf16 < 2; in_bf16++) {
        attention_forward(NULL, NULL, NULL, NULL, 0, 16, 64, 1, in_bf16, NULL);
        attention_backward(NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 16, 64, 1, in_bf16, NULL);
    }
    attention_check(2 * 256, 2);
    EXPECT_EXIT(1, "heads of 257 channels: the GPU takes at most 256", attention_check_257, NULL);
}

#endif
