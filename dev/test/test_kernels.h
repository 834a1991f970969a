// test_kernels.h: the CPU engine's kernels, each against a plain computation in double, at sizes
// around those of its tiles.
//
// train_gpt.c is compiled into this program a second time, under another name, because its kernels
// are static. A third copy is linked without the processor's bf16 dot products (NO_PAIRS), which
// must not change any bit. (The copy in here may be compiled differently, with another order of
// lanes in a sum.)
#ifndef TEST_KERNELS_H
#define TEST_KERNELS_H

#define ENGINE_ONLY
#define CPU_ENGINE kernels_engine

#include "../../train_gpt.c"
#include "test.h"
#include "test_engine.h"
#include <float.h>

#define KERNELS_TESTS(X)                                                                     \
    X(kernels_products_options) X(kernels_products_shapes)                                   \
    X(kernels_products_blocks) X(kernels_tiles) KERNELS_PAIRS_TESTS(X)                       \
    X(kernels_exp) X(kernels_log) X(kernels_gelu) X(kernels_bf16_round) X(kernels_transpose) \
    X(kernels_max) X(kernels_column_sums)                                                    \
    X(kernels_layernorm_forward) X(kernels_layernorm_backward) X(kernels_softmax_loss)       \
    X(kernels_classifier_chunks)

static void kernels_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

// Element i of array `id`, in (-1, 1).
static real kernels_number(int id, size_t i) {
    return (real)(2 * uniform01(rng_words(0, STREAM_TEST, i, (uint32_t)id, 7).v[0]) - 1);
}

static real *kernels_numbers(int id, size_t n) {
    real *x = (real *)xcalloc(n + 1, sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = kernels_number(id, i);
    return x;
}

// Rounding of a sum of n terms, as a random walk; `size` is the root of the sum of their squares.
static double kernels_rounding(double n, double size) {
    return 2 * REAL_EPSILON * (sqrt(n) + 4) * size;
}

// ---- Memory after which nothing may be read ----

typedef struct { char *map; size_t size; real *end; } Wall;

// Memory for n elements up to `end`, where an inaccessible page begins.
static Wall wall_new(size_t n) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE),
        size = strips(n * sizeof(real), page) * page + page;
    char *map = (char *)mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                             0);
    if (map == MAP_FAILED || mprotect(map + size - page, page, PROT_NONE))
        die("mmap: %s", strerror(errno));
    return (Wall){map, size, (real *)(void *)(map + size - page)};
}

static void wall_free(Wall *w) { munmap(w->map, w->size); }

// ---- Sheets: a matrix whose last element is before a wall, with NaN in all other memory ----

enum { SHEET_ROWS = 4096, SHEET_NUMBERS = 6 << 20, SHEET_BEFORE = 64 };

typedef struct {
    Wall wall;
    real *at;
    size_t lines, width, ld, n;                          // n elements from `at` to the wall
    size_t T;
    int gathered, rows[SHEET_ROWS];
} Sheet;

static size_t sheet_place(const Sheet *s, size_t line, size_t i) {
    const size_t place = s->gathered ? (size_t)s->rows[line / s->T] * s->T + line % s->T : line;
    return place * s->ld + i;
}

// Rows of `width` elements, with a gap of `pad`; gathered: tokens of rows 0 2 3 5 6 8 ... of a
// residual stream. All NaN.
static void sheet_lay(Sheet *s, size_t count, size_t width, size_t pad, int gathered) {
    s->lines = count, s->width = width, s->ld = width + pad, s->gathered = gathered;
    s->T = count % 3 == 0 ? 3 : count % 13 == 0 ? 13 : 1;
    const int n = (int)(count / s->T);
    for (int row = 0; gathered && row < n; row++) s->rows[row] = row + (row + 1) / 2;
    s->n = sheet_place(s, count - 1, width);
    CHECK(s->n + SHEET_BEFORE <= SHEET_NUMBERS && (!gathered || n <= SHEET_ROWS),
          "a sheet of %zu numbers", s->n);
    s->at = s->wall.end - s->n;
    for (real *x = s->at - SHEET_BEFORE; x < s->wall.end; x++) *x = NAN;
}

static void sheet_fill(Sheet *s, int id) {
    for (size_t line = 0; line < s->lines; line++)
        for (size_t i = 0; i < s->width; i++)
            s->at[sheet_place(s, line, i)] = kernels_number(id, line * s->width + i);
}

// Number of elements that are not NaN, minus those of the matrix: writes outside it.
static long sheet_outside(const Sheet *s) {
    long n = -(long)(s->lines * s->width);
    for (const real *x = s->at - SHEET_BEFORE; x < s->wall.end; x++) n += !isnan(*x);
    return n;
}

static Matrix sheet_matrix(const Sheet *s, int turn) {
    return (Matrix){.at = s->at, .ld = s->ld, .transposed = turn, .rows = s->gathered ?
                    s->rows : NULL, .T = s->T};
}

// ---- Matmuls ----

typedef struct {
    size_t M, N, K;
    // gelu: 1 of y, 2 of h
    int a_transposed, b_transposed, a_on, b_on, y_on, add, bias, b_sum, pad, bf16, gelu;
    double scale;
} Matmul;

// The matmul whose options are the bits of a number below 2^12.
enum { PRODUCT_OPTIONS = 1 << 12 };
static Matmul matmul_of(size_t M, size_t N, size_t K, unsigned bits) {
    const int gelu = (int)(bits >> 10 & 3) % 3, b_transposed = bits >> 1 & 1;
    return (Matmul){
        .M = M, .N = N, .K = K, .a_transposed = bits & 1, .b_transposed = b_transposed, .a_on =
            bits >> 2 & 1, .b_on = bits >> 3 & 1,
        .y_on = !gelu && bits >> 4 & 1, .add = bits >> 5 & 1, .bias = bits >> 6 & 1,
        .b_sum = !b_transposed && bits >> 7 & 1,
        .pad = bits >> 8 & 1, .bf16 = bits >> 9 & 1, .gelu = gelu,
        .scale = __builtin_parity(bits) ? 1.25 : 1,
    };
}

static char *matmul_name(const Matmul *p) {
    return xprintf("(%zu,%zu,%zu)%s%s%s%s%s%s%s%s%s%s%s scale %g", p->M, p->N, p->K,
                   p->a_transposed ? " a transposed" : "", p->b_transposed ? " b transposed" : "",
                   p->a_on ? " a gathered" : "", p->b_on ? " b gathered" : "",
                   p->y_on ? " scattered" : "", p->add ? " +=" : "", p->bias ? " bias" : "",
                   p->b_sum ? " b_sum" : "", p->pad ? " ld" : "", p->bf16 ? " bf16" : "",
                   p->gelu == 1 ? " gelu" : p->gelu ? " gelu'" : "", p->scale);
}

typedef struct { Sheet a, b, y, h, gelu, bias, sum; Wall work_a,
                work_b; PackWorkspace work; } Products;

// The workspaces of packed panels are as large as model_buffers() makes them, and end at walls,
// too.
static Products *matmuls_new(void) {
    Products *s = (Products *)xcalloc(1, sizeof *s);
    Sheet *const all[] = {&s->a, &s->b, &s->y, &s->h, &s->gelu, &s->bias, &s->sum};
    for (int i = 0; i < 7; i++) all[i]->wall = wall_new(SHEET_NUMBERS);
    s->work_a = wall_new(2 * M_BLOCK * K_BLOCK);
    s->work_b = wall_new(2 * K_BLOCK * N_BLOCK);
    return s;
}

static void matmuls_free(Products *s) {
    Wall *const all[] = {&s->a.wall, &s->b.wall, &s->y.wall, &s->h.wall, &s->gelu.wall,
                         &s->bias.wall, &s->sum.wall,
                         &s->work_a, &s->work_b};
    for (int i = 0; i < 9; i++) wall_free(all[i]);
    free(s);
}

// Sets the operands, and the previous y and sum; without `add` these are NaN.
static void matmuls_lay(Products *s, const Matmul *p) {
    const size_t pad = p->pad ? 5 : 0, wide = p->bf16 && !PAIRS ? 2 : 1;
    sheet_lay(&s->a, p->a_transposed ? p->K : p->M, p->a_transposed ? p->M : p->K, pad, p->a_on);
    sheet_lay(&s->b, p->b_transposed ? p->N : p->K, p->b_transposed ? p->K : p->N, pad + p->pad,
              p->b_on);
    sheet_lay(&s->y, p->M, p->N, pad, p->y_on);
    sheet_lay(&s->h, p->M, p->N, pad, 0);
    sheet_lay(&s->gelu, p->M, p->N, pad, 0);
    sheet_lay(&s->bias, 1, p->N, 0, 0);
    sheet_lay(&s->sum, 1, p->N, 0, 0);
    sheet_fill(&s->a, 1), sheet_fill(&s->b, 2), sheet_fill(&s->bias, 4), sheet_fill(&s->sum, 5);
    if (p->gelu == 2) sheet_fill(&s->h, 3);
    if (p->add) sheet_fill(&s->y, 6);
    s->work = (PackWorkspace){s->work_a.end - wide * M_BLOCK * K_BLOCK,
                         s->work_b.end - wide * K_BLOCK * N_BLOCK, p->bf16,
                         p->bf16 && tiles_allowed()};
}

static void matmuls_run(Products *s, const Matmul *p) {
    const Result y = {
        .at = s->y.at, .ld = s->y.ld, .rows = p->y_on ? s->y.rows : NULL, .T = s->y.T,
        .add = p->add, .scale = (real)p->scale,
        .bias = p->bias ? s->bias.at : NULL, .h = p->gelu == 2 ? s->h.at : NULL,
        .gelu = p->gelu ? s->gelu.at : NULL,
    };
    multiply(y, &s->work, sheet_matrix(&s->a, p->a_transposed), sheet_matrix(&s->b,
             p->b_transposed), p->M, p->N, p->K, p->b_sum ? s->sum.at : NULL);
}

static double gelu_wide(double x) {
    return x / (1 + exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)));
}
static double gelu_slope_wide(double x) {
    const double u = 1.5957691216057308 * (x + 0.044715 * x * x * x), s = 1 / (1 + exp(-u));
    return s + x * s / (1 + exp(u)) * 1.5957691216057308 * (1 + 3 * 0.044715 * x * x);
}

// The operand as (rows,K) in double, rounded as by a bf16 matmul.
static double *matmul_operand(const Sheet *s, int k_is_line, size_t count, size_t K, int bf16) {
    double *x = doubles((int)(count * K));
    for (size_t i = 0; i < count; i++)
        for (size_t k = 0; k < K; k++) {
            const real at = s->at[k_is_line ? sheet_place(s, k, i) : sheet_place(s, i, k)];
            x[i * K + k] = (double)(bf16 ? bf16_round(at) : at);
        }
    return x;
}

// Element (i,j), if y was `before`.
static void matmul_expect_element(const Products *s, const Matmul *p, size_t i, size_t j,
                                   const double *a, const double *b, double before,
                                   const char *name) {
    double sum = p->bias ? (double)s->bias.at[j] : 0, squares = sum * sum;
    for (size_t k = 0; k < p->K; k++) sum += a[k] * b[k], squares += a[k] * b[k] * a[k] * b[k];
    double want = before + sum * p->scale;
    double tolerance = kernels_rounding((double)p->K, sqrt(squares) * p->scale + fabs(before));
    const double got = (double)s->y.at[sheet_place(&s->y, i, j)],
        gelu = (double)s->gelu.at[sheet_place(&s->gelu, i, j)];
    const double h = p->gelu == 2 ? (double)s->h.at[sheet_place(&s->h, i, j)] : got;
    if (p->gelu == 2)
        want *= gelu_slope_wide(h), tolerance = 2 * tolerance + 8 * REAL_EPSILON * fabs(want);
    EXPECT(fabs(got - want) <= tolerance, "%s: y[%zu,%zu] is %.9g, want %.9g +- %.2g", name, i, j,
           got, want, tolerance);
    if (p->gelu) EXPECT_CLOSE(gelu, gelu_wide(h), 8 * REAL_EPSILON * (1 + fabs(h)), name);
}

static void matmul_expect(Products *s, const Matmul *p) {
    matmuls_lay(s, p);
    char *name = matmul_name(p);
    double *before = doubles((int)(p->M * p->N));
    for (size_t i = 0; p->add && i < p->M * p->N; i++)
        before[i] = (double)s->y.at[sheet_place(&s->y, i / p->N, i % p->N)];
    matmuls_run(s, p);
    double *a = matmul_operand(&s->a, p->a_transposed, p->M, p->K, p->bf16);
    double *b = matmul_operand(&s->b, !p->b_transposed, p->N, p->K, p->bf16);
    for (size_t i = 0; i < p->M; i++)
        for (size_t j = 0; j < p->N; j++)
            matmul_expect_element(s, p, i, j, a + i * p->K, b + j * p->K, before[i * p->N + j],
                                   name);
    for (size_t j = 0; j < p->N; j++) {
        double sum = 0, squares = 0, first = (double)kernels_number(5, j);
        for (size_t k = 0; p->b_sum && k < p->K; k++) {
            const double bk = (double)s->b.at[sheet_place(&s->b, k, j)] * p->scale;
            sum += bk, squares += bk * bk;
        }
        EXPECT_CLOSE((double)s->sum.at[j], first + sum,
                     kernels_rounding((double)p->K, sqrt(squares) + fabs(first)), name);
    }
    EXPECT(sheet_outside(&s->y) == 0, "%s: %ld numbers written beside y", name,
           sheet_outside(&s->y));
    EXPECT(sheet_outside(&s->gelu) == (p->gelu ? 0 : -(long)(p->M * p->N)), "%s: wrote beside gelu",
           name);
    EXPECT(sheet_outside(&s->sum) == 0, "%s: wrote beside b_sum", name);
    free(name), free(before), free(a), free(b);
}

// All options at a shape that fills no tile, and at a whole tile.
static void test_kernels_products_options(void) {
    Products *s = matmuls_new();
    kernels_threads(1);
    for (unsigned bits = 0; bits < PRODUCT_OPTIONS; bits++) {
        const int tile = bits % 5 == 0;
        const Matmul p = matmul_of(tile ? TILE_ROWS : TILE_ROWS + 1,
                                     tile ? TILE_COLS : TILE_COLS + 1, tile ? 6 : 5, bits);
        matmul_expect(s, &p);
    }
    matmuls_free(s);
}

// The options vary with the shapes; every shape has every layout of the operands, in both types.
static void test_kernels_products_shapes(void) {
    static const size_t rows[] = {1, TILE_ROWS - 1, TILE_ROWS, TILE_ROWS + 1, 29};
    static const size_t cols[] = {1, TILE_COLS - 1, TILE_COLS, TILE_COLS + 1,
                                  2 * TILE_COLS + LANES + 3};
    static const size_t depths[] = {1, 2, 3, LANES, 2 * LANES + 1, 61};
    Products *s = matmuls_new();
    kernels_threads(1);
    for (unsigned i = 0; i < 5 * 5 * 6 * 8; i++) {
        const unsigned shape = i / 8, others = rng_words(0, STREAM_TEST, i, 0, 8).v[0] & 0xDFC;
        const unsigned options = others | (i & 3) | (i & 4) << 7;
        const Matmul p = matmul_of(rows[shape % 5], cols[shape / 5 % 5], depths[shape / 25],
                                     options);
        matmul_expect(s, &p);
    }
    matmuls_free(s);
}

// Shapes around the panel sizes, with several threads.
static void test_kernels_products_blocks(void) {
    static const size_t shapes[][3] = {
        {TILE_ROWS + 1, TILE_COLS + 1, K_BLOCK - 1}, {TILE_ROWS + 1, 3, K_BLOCK},
        {2, TILE_COLS + 1, K_BLOCK + 1}, {5, 7, 2 * K_BLOCK},
        {TILE_ROWS + 1, TILE_COLS + 1, 2 * K_BLOCK + 1}, {3, 2, 4 * K_BLOCK + 1},
        {2 * PACK_ELEMENTS + 7, 3, 19}, {3, 2 * PACK_ELEMENTS + 7, 19}, {M_BLOCK + 1, 2, 3},
        {2, N_BLOCK + 1, 3}, {M_BLOCK + TILE_ROWS + 1, TILE_COLS + 3, 5}, {101, 131, 37},
    };
    Products *s = matmuls_new();
    kernels_threads(3);
    for (unsigned i = 0; i < sizeof shapes / sizeof shapes[0] * 16; i++) {
        const unsigned others = rng_words(1, STREAM_TEST, i, 0, 8).v[0] & 0xDF0,
            options = others | (i & 7) | (i & 8) << 6;
        const size_t *shape = shapes[i / 16];
        const Matmul p = matmul_of(shape[0], shape[1], shape[2], options | (i & 4) << 1);
        matmul_expect(s, &p);
    }
    // b is packed again for every panel of rows
    const Matmul both = matmul_of(M_BLOCK + 1, N_BLOCK + 1, 2, 0xC0);
    matmul_expect(s, &both);
    kernels_threads(1);
    matmuls_free(s);
}

// ---- bf16 dot products, and their replacement elsewhere ----

#ifdef CPU_ENGINES                                       // a fat build has engines for other
                                                         // processors, which round differently
#define KERNELS_PAIRS_TESTS(X)
#else
#define KERNELS_PAIRS_TESTS(X) X(kernels_pairs_are_the_same_bits)
extern const Engine no_pairs_engine;
#ifndef NO_TILES                                         // which have other bits
extern const Engine no_tiles_engine;
#endif

typedef struct { real *slot[4], *losses; double loss[4]; } Steps;

// Training steps on an engine: all slots, and each step's losses.
static Steps steps_run(const Engine *engine, GptConfig c, int B, int T, int dtype) {
    static const int plans[] = {FULL, ROW, TIED_ROW, BATCH};
    const Engine *const usual = test_engine;
    test_engine = engine;
    Rig r = rig_open_dtype(c, B, T, 1, dtype);
    Steps s = {{NULL}, (real *)xcalloc((size_t)(4 * B * T), sizeof(real)), {0}};
    for (int k = 0; k < 4; k++) {
        int64_t t[] = {k + 1, k + 1, k + 1, k + 1, k + 1};
        const UpdateArgs args = {1e-2, 0.9, 0.95, 1e-8, 0.1, 1, t, 0, 0};
        plan_force(&r.plan, plans[k], B);
        s.loss[k] = engine_forward_backward(engine, r.model, T, r.tokens, r.targets, &r.plan, 0.5);
        engine->losses(r.model, s.losses + k * B * T);
        if (k < 3) engine->update(r.model, &args);
    }
    for (int slot = 0; slot < 4; slot++) s.slot[slot] = slot_read(&c, r.model, (Slot)slot);
    rig_close(&r);
    test_engine = usual;
    return s;
}

static void steps_free(Steps *s) {
    for (int slot = 0; slot < 4; slot++) free(s->slot[slot]);
    free(s->losses);
}

// Losses, gradients, moments and weights. If the processor lacks these instructions, both engines
// are the same code and cannot differ. (Sums below the smallest normal number, which the processor
// flushes to zero, do not occur here.)
static void test_kernels_pairs_are_the_same_bits(void) {
    static const struct { GptConfig c; int B, T; } sizes[] = {          // V T L NH C
        {{53, 80, 2, 2, 20}, 3, 13}, {{131, 21, 2, 3, 33}, 5, 21}, {{67, 9, 2, 1, 1}, 2, 9},
        {{97, 70, 2, 3, 105}, 2, 67},
    };
    for (int i = 0; i < 4; i++)
        for (int dtype = DTYPE_FP32; dtype <= DTYPE_BF16; dtype++) {
            const GptConfig c = sizes[i].c;
            const int n = 4 * sizes[i].B * sizes[i].T;
#ifdef NO_TILES
            const Engine *const pairs_engine = test_engine;
#else
            const Engine *const pairs_engine = &no_tiles_engine;
#endif
            Steps a = steps_run(pairs_engine, c, sizes[i].B, sizes[i].T, dtype);
            Steps b = steps_run(&no_pairs_engine, c, sizes[i].B, sizes[i].T, dtype);
            EXPECT(!memcmp(a.loss, b.loss, sizeof a.loss), "size %d, dtype %d: other losses", i,
                   dtype);
            EXPECT(!memcmp(a.losses, b.losses, (size_t)n * sizeof(real)),
                   "size %d, dtype %d: other losses of tokens", i, dtype);
            for (int slot = 0; slot < 4; slot++)
                EXPECT(slot_same_bits(&c, a.slot[slot], b.slot[slot]),
                       "size %d, dtype %d: other bits in slot %d", i, dtype, slot);
            steps_free(&a), steps_free(&b);
        }
}
#endif

// ---- Tiles ----

// A word of two random bf16: of all sizes, and now and then zero, subnormal, infinite or no number.
static float tile_test_word(int seed, int i) {
    const uint32_t *w = rng_words((uint64_t)seed, STREAM_TEST, (uint64_t)i, 0, 0).v;
    uint32_t half[2];
    for (int h = 0; h < 2; h++) {
        const uint32_t sign = w[h] & 0x8000, digits = w[h] >> 16 & 0x7F,
            kind = w[2] >> (8 * h) & 0xFF;
        uint32_t exponent = 117 + w[h] % 20;             // around 1
        if (seed > 1 && kind < 8) exponent = kind % 4 == 0 ? 0 : kind % 4 == 1 ? 1 : 64 + kind;
        if (seed > 2 && kind == 9) exponent = 255;
        half[h] = sign | exponent << 7 | digits;
    }
    union { uint32_t bits; float f; } word = {half[0] | half[1] << 16};
    return word.f;
}

// The processor's products of tiles have the bits of tile_dot_plain (any of the NaNs for a NaN).
static void test_kernels_tiles(void) {
    if (!TILES || !tiles_allowed()) return;
    static Tile a, b, y, plain;
    tiles_begin();
    for (int seed = 1; seed <= 60; seed++) {
        for (int i = 0; i < TILE_SIDE * TILE_SIDE; i++) {
            a.word[i / TILE_SIDE][i % TILE_SIDE] = tile_test_word(seed, i);
            b.word[i / TILE_SIDE][i % TILE_SIDE] = tile_test_word(seed, 1000 + i);
            y.word[i / TILE_SIDE][i % TILE_SIDE] = (float)kernels_number(seed, (size_t)i) *
                (seed % 7 == 3 ? 1e-38f : 1);
        }
        plain = y;
        tile_load(0, (const real *)y.word, TILE_SIDE);
        tile_load(1, (const real *)a.word, TILE_SIDE);
        tile_load(2, (const real *)b.word, TILE_SIDE);
        tile_dot(0, 1, 2);
        tile_store(0, (real *)y.word, TILE_SIDE);
        tile_dot_plain(&plain, &a, &b);
        for (int i = 0; i < TILE_SIDE * TILE_SIDE; i++) {
            const float got = y.word[i / TILE_SIDE][i % TILE_SIDE],
                want = plain.word[i / TILE_SIDE][i % TILE_SIDE];
            EXPECT((isnan(got) && isnan(want)) || !memcmp(&got, &want, sizeof got),
                   "seed %d, element %d: %a, want %a", seed, i, (double)got, (double)want);
        }
    }
    tiles_end();
}

// ---- Functions of one variable, over all floats ----
//
// Tests every 61st bit pattern or fewer (an odd stride, so that the last bits vary), including
// infinities and NaNs; with SWEEP=1 in the environment all 2^32, and prints the worst error.

#ifdef REAL_DOUBLE
typedef long double Wide;                                // type of the references
static Wide wide_exp(Wide x) { return expl(x); }
static Wide wide_log(Wide x) { return logl(x); }
#else
typedef double Wide;
static Wide wide_exp(Wide x) { return exp(x); }
static Wide wide_log(Wide x) { return log(x); }
#endif

// y = f(x), applied to rows as in the engine
typedef void LineFunction(real *y, const real *x, size_t n);
// in its own units; INFINITY: violates the promise
typedef double ErrorOf(real x, real y);

static real real_of(uint32_t bits) {
    union { uint32_t bits; float f; } x = {bits};
    return (real)x.f;
}

static int same_real(real x, real y) { return (isnan(x) && isnan(y)) || !memcmp(&x, &y, sizeof x); }

// The spacing of floats at w.
static double ulp_at(double w) {
    int e;
    frexp(w, &e);
#ifndef REAL_DOUBLE
    if (e < -125) e = -125;                              // below the smallest normal number
#endif
    return ldexp(REAL_EPSILON, e - 1);
}

enum { SWEEP_LINE = 4093 };

// The worst error in a row of elements; INFINITY also if an element alone gets other bits than
// within a row, since where a row ends depends on the number of threads.
static double sweep_line(LineFunction *f, ErrorOf *error, const real *x, size_t n, real *at) {
    real y[SWEEP_LINE], alone;
    double worst = 0;
    f(y, x, n);
    for (size_t i = 0; i < n; i++) {
        double e = error(x[i], y[i]);
        if (i % 7 == 0 && (f(&alone, x + i, 1), !same_real(alone, y[i]))) e = INFINITY;
        if (!(e <= worst)) worst = isnan(e) ? INFINITY : e, *at = x[i];
    }
    return worst;
}

static void sweep(const char *name, LineFunction *f, ErrorOf *error, double bound,
                  uint32_t usual_stride) {
    const int all = getenv("SWEEP") != NULL;
    // long double is slow
    const uint64_t stride = all ? 1 : sizeof(real) > 4 ? 16 * usual_stride + 1 : usual_stride;
    const uint64_t count = ((uint64_t)1 << 32) / stride + 1;
    double worst = 0;
    real worst_at = 0;
#pragma omp parallel for schedule(dynamic)
    for (uint64_t from = 0; from < count; from += SWEEP_LINE) {
        real x[SWEEP_LINE], at = 0;
        for (size_t i = 0; i < SWEEP_LINE; i++) x[i] = real_of((uint32_t)((from + i) * stride));
        const double e = sweep_line(f, error, x, SWEEP_LINE, &at);
#pragma omp critical
        if (e > worst) worst = e, worst_at = at;
    }
    EXPECT(worst <= bound, "%s(%.9g): error %.4g, allowed is %.4g", name, (double)worst_at, worst,
           bound);
    if (all) printf("    %s: worst error %.4f at %.9g\n", name, worst, (double)worst_at);
}

// The same for selected values: zeros, the smallest, limits and their neighbours, infinities,
// various NaNs.
static void sweep_edges(const char *name, LineFunction *f, ErrorOf *error, double bound) {
    static const uint32_t bits[] = {
        0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x3F7FFFFF, 0x3F800000, 0x42AE0000,
        0x42AE0001, 0x42B00000,
        0x42B00001, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FBFFFFF,
        0x7FC00000, 0x7FFFFFFF,
        0x5F800000, 0x42AFFFFF, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x41200000,
        0x41F00000, 0x41F00001,
    };
    for (size_t i = 0; i < 2 * sizeof bits / sizeof bits[0]; i++) {
        real x[SWEEP_LINE], at = 0;
        for (size_t j = 0; j < 64; j++) x[j] = real_of(bits[i / 2] | (uint32_t)(i & 1) << 31);
        const double e = sweep_line(f, error, x, 64, &at);
        EXPECT(e <= bound, "%s(%.9g): error %.4g, allowed is %.4g", name, (double)x[0], e, bound);
    }
}

static void exp_line(real *y, const real *x, size_t n) {
    for (size_t i = 0; i < n; i += LANES) {
        const size_t some = at_most(n - i, LANES);
        vector_store_some(y + i, exp_lanes(vector_load_some(x + i, some)), some);
    }
}

// In ulp where it is promised; elsewhere only the promised values are allowed.
static double exp_error(real x, real y) {
    if (isnan(x)) return isnan(y) ? 0 : INFINITY;
    if (x < -87) return y == 0 || (sizeof x > 4 && y < 1e-37) ? 0 : INFINITY;
    if (x > 88) return 0;                                // not specified
    const double small = fabs((double)x);
    const Wide want = small < 1e-9 ? 1 + (Wide)x : wide_exp((Wide)x);
    return fabs((double)((Wide)y - want)) / ulp_at((double)want);
}

static void test_kernels_exp(void) {
    sweep("exp", exp_line, exp_error, 1.25, 61);
    sweep_edges("exp", exp_line, exp_error, 1.25);
}

static void log_line(real *y, const real *x, size_t n) {
    for (size_t i = 0; i < n; i += LANES) {
        const size_t some = at_most(n - i, LANES);
        vector_store_some(y + i, log_lanes(vector_load_some(x + i, some)), some);
    }
}

static double log_error(real x, real y) {
    if (!(x >= (real)FLT_MIN && x <= (real)FLT_MAX)) return 0;   // not specified
    const Wide want = wide_log((Wide)x);
    return want == 0 ? (y == 0 ? 0 : INFINITY)
                     : fabs((double)((Wide)y - want)) / ulp_at((double)want);
}

static void test_kernels_log(void) {
    sweep("log", log_line, log_error, 3, 61);
    sweep_edges("log", log_line, log_error, 3);
}

// GELU and its derivative are near 0 where a sum of much larger values is: their errors there are
// relative to x.
static double gelu_error(real x, real y) {
    if (isnan(x)) return isnan(y) ? 0 : INFINITY;
    if (x > 11) return y == x ? 0 : INFINITY;
    if (x < -30) return fabs((double)y) < 1e-36 ? 0 : INFINITY;
    const Wide want =
        (Wide)x / (1 +
                   wide_exp((Wide)-1.5957691216057308 * ((Wide)x + (Wide)0.044715 * x * x * x)));
    const double error = fabs((double)((Wide)y - want));
    return x < -1 ? error / (REAL_EPSILON / 2) : error / ulp_at((double)want) / 4;
}

static void gelu_backward_line(real *dx, const real *x, size_t n) {
    real y[SWEEP_LINE], again[SWEEP_LINE];
    for (size_t i = 0; i < n; i++) dx[i] = 1;
    gelu_backward(dx, y, x, n);
    gelu_forward(again, x, n);
    for (size_t i = 0; i < n; i++)
        if (!same_real(y[i], again[i])) dx[i] = 1000;    // backward recomputes the same GELU(x)
}

static double gelu_backward_error(real x, real y) {
    if (isnan(x)) return isnan(y) ? 0 : INFINITY;
    if (x > 11) return y == 1 ? 0 : INFINITY;
    if (x < -30) return fabs((double)y) < 1e-33 ? 0 : INFINITY;
    const Wide u = (Wide)1.5957691216057308 * ((Wide)x + (Wide)0.044715 * x * x * x),
        s = 1 / (1 + wide_exp(-u));
    const Wide want = s + x * s / (1 + wide_exp(u)) * (Wide)1.5957691216057308 *
        (1 + 3 * (Wide)0.044715 * x * x);
    return fabs((double)((Wide)y - want)) / (REAL_EPSILON * (x < 0 ? 1 : sizeof x > 4 ? 80 : 20));
}

// Errors as fractions of those stated in dev/model/matmul.h.
static void test_kernels_gelu(void) {
    sweep("GELU", gelu_forward, gelu_error, 1, 509);
    sweep_edges("GELU", gelu_forward, gelu_error, 1);
    sweep("GELU'", gelu_backward_line, gelu_backward_error, 1, 509);
    sweep_edges("GELU'", gelu_backward_line, gelu_backward_error, 1);
}

static void bf16_line(real *y, const real *x, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = bf16_round(x[i]);
}

// The two packing functions, unpacked again: one row, and two rows of which the second is -x.
static void pairs_of_line_line(real *y, const real *x, size_t n) {
    real part[2 * LANES];
    uint32_t words[LANES];
    for (size_t i = 0; i < n; i += 2 * LANES) {
        memset(part, 0, sizeof part);
        memcpy(part, x + i, at_most(n - i, 2 * LANES) * sizeof(real));
        const Vector v = pairs_of_line(part);
        memcpy(words, &v, sizeof words);
        for (size_t j = 0; j < at_most(n - i, 2 * LANES); j++)
            y[i + j] = real_of(words[j / 2] >> 16 * (j % 2) << 16);
    }
}

static void pairs_of_lines_line(real *y, const real *x, size_t n) {
    real part[2][LANES];
    uint32_t words[LANES];
    for (size_t i = 0; i < n; i += LANES) {
        memset(part, 0, sizeof part);
        for (size_t j = 0; j < at_most(n - i, LANES); j++)
            part[0][j] = x[i + j], part[1][j] = -x[i + j];
        const Vector v = pairs_of_lines(vector_load(part[0]), vector_load(part[1]));
        memcpy(words, &v, sizeof words);
        for (size_t j = 0; j < at_most(n - i, LANES); j++)
            y[i + j] = isnan(x[i + j]) || (words[j] ^ words[j] << 16) >> 16 ==
                0x8000 ? real_of(words[j] << 16) : 1;
    }
}

// To 8 bits, ties to even, infinity from 2^128 on; 0 below the smallest normal number.
static double bf16_error(real x, real y) {
    if (isnan(x)) return isnan(y) ? 0 : INFINITY;
    int e;
    const double m = frexp((double)(float)x, &e), rounded = ldexp(nearbyint(m * 256), e - 8);
    const double want = fabs((double)(float)x) < 0x1p-126 ? 0 : fabs(rounded) >=
        0x1p128 ? (double)INFINITY : fabs(rounded);
    return fabs((double)y) == want && !signbit(x) == !signbit(y) ? 0 : INFINITY;
}

static void test_kernels_bf16_round(void) {
    sweep("bf16_round", bf16_line, bf16_error, 0, 251);
    sweep_edges("bf16_round", bf16_line, bf16_error, 0);
    if (!PAIRS) return;                                  // no instructions to compare with
    sweep("pairs_of_line", pairs_of_line_line, bf16_error, 0, 1021);
    sweep_edges("pairs_of_line", pairs_of_line_line, bf16_error, 0);
    sweep("pairs_of_lines", pairs_of_lines_line, bf16_error, 0, 1021);
    sweep_edges("pairs_of_lines", pairs_of_lines_line, bf16_error, 0);
}

// ---- Vectors ----

static void test_kernels_transpose(void) {
    real x[LANES][LANES];
    Vector v[LANES];
    for (size_t i = 0; i < LANES * LANES; i++) x[i / LANES][i % LANES] = (real)(i + 1);
    memcpy(v, x, sizeof v);
    vector_transpose(v);
    memcpy(x, v, sizeof x);
    for (size_t i = 0; i < LANES * LANES; i++)
        EXPECT((size_t)x[i % LANES][i / LANES] == i + 1, "(%zu,%zu) is %g", i % LANES, i / LANES,
               (double)x[i % LANES][i / LANES]);
}

// The maximum at every position of every length, among NaNs and infinities, too; nothing is read
// past the end.
static void test_kernels_max(void) {
    Wall wall = wall_new(3 * LANES);
    for (size_t n = 1; n <= 3 * LANES; n++)
        for (size_t at = 0; at < n; at++) {
            real *x = wall.end - n, largest = -INFINITY;
            for (size_t i = 0; i < n; i++) x[i] = kernels_number((int)n, i) - 2;
            for (size_t i = 0; i < n; i++) largest = x[i] > largest ? x[i] : largest;
            EXPECT(max_of(x, n) == largest, "of %zu below 0: %g, want %g", n, (double)max_of(x, n),
                   (double)largest);
            x[at] = 5;
            EXPECT(max_of(x, n) == 5, "of %zu, 5 at %zu: %g", n, at, (double)max_of(x, n));
            x[(at + n / 2) % n] = -INFINITY, x[at] = INFINITY;
            EXPECT(max_of(x, n) == INFINITY, "of %zu, infinity at %zu: %g", n, at,
                   (double)max_of(x, n));
            for (size_t i = 0; i < n; i++)
                x[i] = i == at ? (real)-5 : i % 3 ? (real)NAN : -INFINITY;
            EXPECT(max_of(x, n) == -5, "of %zu, -5 at %zu among NaNs: %g", n, at,
                   (double)max_of(x, n));
            for (size_t i = 0; i < n; i++) x[i] = i == at ? (real)NAN : (real)-5;
            EXPECT(max_of(x, n) == (n > 1 ? (real)-5 : -INFINITY), "of %zu, NaN at %zu: %g", n, at,
                   (double)max_of(x, n));
        }
    wall_free(&wall);
}

// ---- LayerNorm and sums over rows ----

static void test_kernels_column_sums(void) {
    static const size_t heights[] = {1, 2, 17}, widths[] = {1, 7, 63, 64, 65, 131};
    for (int i = 0; i < 3 * 6 * 2; i++) {
        const size_t M = heights[i / 2 % 3], N = widths[i / 6];
        real *y = kernels_numbers(1, M * N), *xhat = kernels_numbers(2, M * N),
            *sum = kernels_numbers(3, N);
        real *scaled = kernels_numbers(4, N);
        column_sums(sum, i % 2 ? scaled : NULL, y, i % 2 ? xhat : NULL, M, N);
        for (size_t n = 0; n < N; n++) {
            double want = (double)kernels_number(3, n), along = (double)kernels_number(4, n);
            for (size_t m = 0; m < M; m++) {
                want += (double)y[m * N + n];
                if (i % 2) along += (double)y[m * N + n] * (double)xhat[m * N + n];
            }
            EXPECT_CLOSE((double)sum[n], want, kernels_rounding((double)M, sqrt((double)M + 1)),
                         "sum");
            EXPECT_CLOSE((double)scaled[n], along, kernels_rounding((double)M, sqrt((double)M + 1)),
                         "sum of products");
        }
        EXPECT(sum[N] == 0 && scaled[N] == 0, "wrote after the last column");
        free(y), free(xhat), free(sum), free(scaled);
    }
}

// A LayerNorm of rows 0 2 3 5 of x, or of all; bits: gathered, with `more` or `also`.
enum { NORM_T = 3, NORM_ROWS = 4, NORM_B = 6, NORM_LINES = NORM_ROWS * NORM_T };
static const int norm_rows[NORM_ROWS] = {0, 2, 3, 5};
static const size_t norm_widths[] = {1, 2, 7, 16, 33, 64, 65, 131};

static size_t norm_place(int gathered, size_t t) {
    return gathered ? (size_t)norm_rows[t / NORM_T] * NORM_T + t % NORM_T : t;
}

static void test_kernels_layernorm_forward(void) {
    for (int i = 0; i < 8 * 4; i++) {
        const size_t C = norm_widths[i / 4], n = NORM_LINES * C;
        real *x = kernels_numbers(1, NORM_B * NORM_T * C), *more = kernels_numbers(2, n),
            *w = kernels_numbers(3, C);
        real *b = kernels_numbers(4, C), *y = kernels_numbers(5, n), *xhat = kernels_numbers(6, n);
        real rstd[NORM_LINES + 1] = {0};
        // so that the mean matters
        for (size_t c = 0; c < NORM_B * NORM_T * C; c++) x[c] += 3;
        layernorm_forward(y, xhat, rstd, x, i & 2 ? more : NULL, i & 1 ? norm_rows : NULL, w, b,
                          NORM_LINES, NORM_T, C);
        for (size_t t = 0; t < NORM_LINES; t++) {
            double mean = 0, variance = 0, *z = doubles((int)C);
            for (size_t c = 0; c < C; c++) {
                z[c] = (double)x[norm_place(i & 1, t) * C + c] +
                    (i & 2 ? (double)more[t * C + c] : 0);
                mean += z[c] / (double)C;
            }
            for (size_t c = 0; c < C; c++) variance += (z[c] - mean) * (z[c] - mean) / (double)C;
            const double want = 1 / sqrt(variance + 1e-5),
                tolerance = kernels_rounding((double)C, 4 * want);
            EXPECT_CLOSE((double)rstd[t], want, want * tolerance, "1/sigma");
            for (size_t c = 0; c < C; c++) {
                const double hat = (z[c] - mean) * want;
                EXPECT_CLOSE((double)xhat[t * C + c], hat, (1 + fabs(hat)) * tolerance,
                             "normalised");
                EXPECT_CLOSE((double)y[t * C + c], hat * (double)w[c] + (double)b[c],
                             (1 + fabs(hat)) * tolerance, "scaled");
            }
            free(z);
        }
        EXPECT(y[n] == 0 && xhat[n] == 0 && rstd[NORM_LINES] == 0, "wrote after the last line");
        memset(x, 0, n * sizeof(real));
        layernorm_recompute(x, xhat, w, b, NORM_LINES, C);
        for (size_t k = 0; k < n; k++)
            EXPECT_CLOSE((double)x[k], (double)y[k], kernels_rounding(1, 1), "again");
        free(x), free(more), free(w), free(b), free(y), free(xhat);
    }
}

// One row of the gradient: dx, `also` and the contributions to dw and db, from the kernel's own
// inputs.
static void norm_backward_line(double *dz, double *dw, double *db, const real *dy, const real *xhat,
                               double rstd, const real *w, size_t C) {
    double mean = 0, along = 0;
    for (size_t c = 0; c < C; c++) {
        const double g = (double)dy[c] * (double)w[c];
        mean += g / (double)C, along += g * (double)xhat[c] / (double)C;
        dw[c] += (double)dy[c] * (double)xhat[c], db[c] += (double)dy[c];
    }
    for (size_t c = 0; c < C; c++)
        dz[c] = rstd * ((double)dy[c] * (double)w[c] - mean - (double)xhat[c] * along);
}

static void test_kernels_layernorm_backward(void) {
    for (int i = 0; i < 8 * 4; i++) {
        const size_t C = norm_widths[i / 4], n = NORM_LINES * C, all = NORM_B * NORM_T * C;
        real *dx = kernels_numbers(1, all), *also = kernels_numbers(2, n),
            *dw = kernels_numbers(3, C);
        real *db = kernels_numbers(4, C), *dy = kernels_numbers(5, n),
            *xhat = kernels_numbers(6, n);
        real *w = kernels_numbers(7, C), *rstd = kernels_numbers(8, NORM_LINES);
        double *want = doubles((int)all), *want_w = doubles((int)C), *want_b = doubles((int)C),
            *dz = doubles((int)C);
        const double tolerance = kernels_rounding((double)(C + NORM_LINES), 4);
        layernorm_backward(dx, i & 2 ? also : NULL, dw, db, dy, xhat, rstd,
                           i & 1 ? norm_rows : NULL, w, NORM_LINES, NORM_T, C);
        for (size_t t = 0; t < NORM_LINES; t++) {
            norm_backward_line(dz, want_w, want_b, dy + t * C, xhat + t * C, (double)rstd[t], w, C);
            for (size_t c = 0; c < C; c++) {
                want[norm_place(i & 1, t) * C + c] = dz[c];
                const double more = (double)kernels_number(2, t * C + c) + (i & 2 ? dz[c] : 0);
                EXPECT_CLOSE((double)also[t * C + c], more, i & 2 ? tolerance : 0, "also");
            }
        }
        // must be exactly 0: rows that the branch does not run
        for (size_t k = 0; k < all; k++) {
            const double before = (double)kernels_number(1, k);
            EXPECT_CLOSE((double)dx[k], before + want[k], want[k] == 0 ? 0 : tolerance, "dx");
        }
        for (size_t c = 0; c < C; c++) {
            EXPECT_CLOSE((double)dw[c], (double)kernels_number(3, c) + want_w[c], tolerance, "dw");
            EXPECT_CLOSE((double)db[c], (double)kernels_number(4, c) + want_b[c], tolerance, "db");
        }
        free(dx), free(also), free(dw), free(db), free(dy), free(xhat), free(w), free(rstd);
        free(want), free(want_w), free(want_b), free(dz);
    }
}

// ---- The loss ----

// Logits of the given size around the given height; size 0: all equal.
static void softmax_expect(size_t V, double size, double height) {
    const real grad = (real)-0.75;
    const int target = (int)(V / 2);
    real *x = kernels_numbers((int)V, V);
    double *z = doubles((int)V), top = -INFINITY, sum = 0;
    for (size_t v = 0; v < V; v++) {
        x[v] = (real)((double)x[v] * size + height);
        if ((double)x[v] > top) top = (double)x[v];      // gcc 12 for ARM fails on fmax here
    }
    for (size_t v = 0; v < V; v++) sum += z[v] = exp((double)x[v] - top);
    const double want = log(sum) - ((double)x[target] - top),
        error = kernels_rounding((double)V, 1 + 2 * size);
    EXPECT_CLOSE((double)softmax_loss(x, target, 0, 0, NULL, V), want, error, "loss alone");
    EXPECT_CLOSE((double)softmax_loss(x, target, grad, 0, NULL, V), want, error, "loss");
    for (size_t v = 0; v < V; v++)
        EXPECT_CLOSE((double)x[v], (double)grad * (z[v] / sum - ((int)v == target)), error,
                     "gradient of a logit");
    EXPECT(x[V] == 0, "wrote after the last logit");
    free(x), free(z);
}

static void test_kernels_softmax_loss(void) {
    static const size_t sizes[] = {1, 2, 15, 16, 17, 50, 1000};
    for (int i = 0; i < 7; i++) {
        const double spreads[] = {0, 1, 30, 1e4};
        for (int k = 0; k < 4; k++) softmax_expect(sizes[i], spreads[k], 0);
        softmax_expect(sizes[i], 0, 1e30);
        softmax_expect(sizes[i], 0, -1e30);
    }
    real x[] = {1, NAN, 2}, far[] = {(real)-3e38, (real)3e38};
    EXPECT(isnan(softmax_loss(x, 0, 1, 0, NULL, 3)), "a NaN among the logits is not in the loss");
    EXPECT(!(softmax_loss(far, 0, 1, 0, NULL, 2) < (real)3e38),
           "the loss of a target that far below is small");
    EXPECT_CLOSE((double)far[0], -1, 0, "its gradient");
}

// Rows of logits are processed in chunks; each row alone has a loss of the same bits, and gradients
// are those of fewer chunks.
static void test_kernels_classifier_chunks(void) {
    enum { V = 8200, C = 3, BT = 600, PART = 450 };
    EXPECT(classifier_chunk(BT, V) < BT && classifier_chunk(PART, V) == PART, "chunks of %zu",
           classifier_chunk(BT, V));
    Products *s = matmuls_new();
    const Matmul p = matmul_of(1, 1, 1, 0);
    matmuls_lay(s, &p);
    real *x = kernels_numbers(1, BT * C), *wte = kernels_numbers(2, V * C),
        *dx = kernels_numbers(3, BT * C);
    real *dwte = kernels_numbers(4, V * C), *dx_parts = kernels_numbers(3, BT * C),
        *dwte_parts = kernels_numbers(4, V * C);
    real *losses = kernels_numbers(5, BT), *losses_parts = kernels_numbers(5, BT);
    real *logits = (real *)xcalloc(PART * V, sizeof *logits);
    int targets[BT];
    for (int t = 0; t < BT; t++) targets[t] = t % 7 ? (t * 13) % V : -1;
    real uniform[BT];                                    // of both terms that are not used
    const Scoring whole = {losses, uniform, uniform, uniform, targets, (real)0.1, 0, {0}, {0}},
        first = {losses_parts, uniform, uniform, uniform, targets, (real)0.1, 0, {0}, {0}};
    const Scoring second = {losses_parts + PART, uniform, uniform, uniform, targets + PART,
                            (real)0.1, 0, {0}, {0}};
    classifier(&whole, dx, dwte, 1, logits, &s->work, x, wte, BT, C, V);
    classifier(&first, dx_parts, dwte_parts, 1, logits, &s->work, x, wte, PART, C, V);
    classifier(&second, dx_parts + PART * C, dwte_parts, 1, logits, &s->work, x + PART * C, wte,
               BT - PART, C, V);
    EXPECT(!memcmp(losses, losses_parts, BT * sizeof(real)), "other losses in other chunks");
    EXPECT(!memcmp(dx, dx_parts, BT * C * sizeof(real)), "other gradients in other chunks");
    EXPECT(losses[0] == 0 && dx[0] == 0 && losses[1] > 5, "losses %g and %g", (double)losses[0],
           (double)losses[1]);
    for (size_t i = 0; i < V * C; i++)
        EXPECT_CLOSE((double)dwte[i], (double)dwte_parts[i], kernels_rounding(BT, 1), "dwte");
    free(x), free(wte), free(dx), free(dwte), free(dx_parts), free(dwte_parts), free(losses);
    free(losses_parts), free(logits);
    matmuls_free(s);
}

#endif
