// test_drop_path.h: the arithmetic of drop path: rates, sampling, plans and their text form. No
// engine is involved.
#ifndef TEST_DROP_PATH_H
#define TEST_DROP_PATH_H

#include "../model/drop_path.h"
#include "test.h"

#define DROP_PATH_TESTS(X)                                                                      \
    X(drop_depth) X(drop_ramp) X(drop_ramp_ends) X(drop_rate) X(drop_scale) X(drop_full_plan)   \
    X(drop_marginals)                                                                           \
    X(drop_order) X(drop_counts) X(drop_micro_counts) X(drop_systematic_exact) X(drop_unbiased) \
    X(drop_branches)                                                                            \
    X(drop_deterministic) X(drop_known_answers) X(drop_sync) X(drop_zero) X(drop_compute)       \
    X(drop_adapt) X(drop_bound)                                                                 \
    X(drop_text) X(drop_text_micros) X(drop_text_damaged) X(drop_excess) X(drop_share)          \
    X(drop_depth_kinds) X(drop_inverted_each)

enum { N_DEPTHS = 4, N_SHAPES = 4, N_UNITS = 2, N_BRANCH_KINDS = 4, N_SAMPLINGS = 2, N_SCALES = 3 };

// A policy over 100 steps at a constant rate; all choices 0: linear, batch, separate, systematic,
// inverted.
static DropPath drop_policy(int layers, double p_max) {
    DropPath d;
    memset(&d, 0, sizeof d);
    d.seed = 42;
    d.layers = layers;
    d.steps = 100;
    d.p_max = p_max;
    return d;
}

// Calls f for every unit, kind of branches and sampling, on a copy of the policy.
static void drop_each_policy(DropPath d, void (*f)(const DropPath *)) {
    for (int i = 0; i < N_UNITS * N_BRANCH_KINDS * N_SAMPLINGS; i++) {
        d.unit = i % N_UNITS;
        d.branches = i / N_UNITS % N_BRANCH_KINDS;
        d.sampling = i / N_UNITS / N_BRANCH_KINDS;
        f(&d);
    }
}

static int drop_plans_equal(const DropPlan *a, const DropPlan *b) {
    if (a->layers != b->layers || a->batch != b->batch || a->tied != b->tied) return 0;
    for (int i = 0; i < a->layers * BRANCHES; i++) {
        const BranchPlan *x = &a->branch[i], *y = &b->branch[i];
        if (x->n != y->n || x->scale != y->scale ||
            memcmp(x->rows, y->rows, sizeof(int) * (size_t)x->n))
            return 0;
    }
    return 1;
}

// ---- Rates ----

static const double drop_depth_of_4[N_DEPTHS][4] = {     // D(l) of four layers, by hand
    {0.25, 0.5, 0.75, 1}, {0, 1 / 3., 2 / 3., 1}, {1, 1, 1, 1},
    {0, 0.25992104989487316, 0.5874010519681994, 1},
};

static void test_drop_depth(void) {
    DropPath d = drop_policy(4, 0.5);
    for (d.depth = 0; d.depth < N_DEPTHS; d.depth++)
        for (int l = 1; l <= 4; l++)
            EXPECT_CLOSE(drop_path_depth(&d, l), drop_depth_of_4[d.depth][l - 1], 1e-15, "D(l)");
    for (d.depth = 0; d.depth < N_DEPTHS; d.depth++)
        for (d.layers = 1; d.layers <= 50; d.layers++) {
            double first = drop_path_depth(&d, 1), last = drop_path_depth(&d, d.layers);
            EXPECT(last == 1, "depth %d of %d layers ends at %.17g", d.depth, d.layers, last);
            int from_zero = d.layers > 1 && (d.depth == DEPTH_LINEAR0 || d.depth == DEPTH_EXP);
            if (from_zero)
                EXPECT(first == 0, "depth %d of %d layers begins at %.17g", d.depth, d.layers,
                       first);
            for (int l = 2; l <= d.layers; l++)
                EXPECT(drop_path_depth(&d, l) >= drop_path_depth(&d, l - 1),
                       "D falls at layer %d of %d", l, d.layers);
        }
}

static void test_drop_ramp(void) {
    static const struct { int64_t start, up, down, recover; double from; int shape; int64_t t;
                          double want; } row[] = {
        // constant
        {0, 0, 0, 0, 0, SHAPE_LINEAR, 0, 1},         {0, 0, 0, 0, 0, SHAPE_LINEAR, 99, 1},
        // a step
        {10, 0, 0, 0, 0, SHAPE_LINEAR, 9, 0},        {10, 0, 0, 0, 0, SHAPE_LINEAR, 10, 1},
        // up
        {0, 20, 0, 0, 0, SHAPE_LINEAR, 0, 0},        {0, 20, 0, 0, 0, SHAPE_LINEAR, 5, 0.25},
        {0, 20, 0, 0, 0, SHAPE_LINEAR, 20, 1},       {0, 20, 0, 0, 0, SHAPE_LINEAR, 99, 1},
        {5, 20, 0, 0, 0.25, SHAPE_LINEAR, 4, 0},     {5, 20, 0, 0, 0.25, SHAPE_LINEAR, 5, 0.25},
        {5, 20, 0, 0, 0.25, SHAPE_LINEAR, 15, 0.625}, {5, 20, 0, 0, 0.25, SHAPE_LINEAR, 25, 1},
        {0, 20, 0, 0, 0, SHAPE_COSINE, 5, 0.14644660940672624},
        {0, 20, 0, 0, 0, SHAPE_COSINE, 10, 0.5}, {0, 20, 0, 0, 0, SHAPE_EXP, 10, 0.9},
        {0, 20, 0, 0, 0, SHAPE_EXP, 5, 0.683772233983162},
        {0, 20, 0, 0, 0, SHAPE_EXP2, 10, 0.41421356237309503},
        {0, 20, 0, 0, 0.5, SHAPE_EXP2, 10, 0.7071067811865476},
        // down
        {0, 0, 20, 0, 0, SHAPE_LINEAR, 80, 1},       {0, 0, 20, 0, 0, SHAPE_LINEAR, 99, 0.05},
        {0, 0, 20, 10, 0, SHAPE_LINEAR, 70, 1},      {0, 0, 20, 10, 0, SHAPE_LINEAR, 80, 0.5},
        {0, 0, 20, 10, 0, SHAPE_LINEAR, 90, 0},      {0, 0, 20, 10, 0, SHAPE_LINEAR, 99, 0},
        // recovery only
        {0, 0, 0, 10, 0, SHAPE_LINEAR, 89, 1},       {0, 0, 0, 10, 0, SHAPE_LINEAR, 90, 0},
        {0, 0, 0, 1, 0, SHAPE_LINEAR, 98, 1},        {0, 0, 0, 1, 0, SHAPE_LINEAR, 99, 0},
        // they cross
        {0, 80, 80, 0, 0, SHAPE_LINEAR, 40, 0.5},    {0, 80, 80, 0, 0, SHAPE_LINEAR, 60, 0.5},
        // the whole run
        {0, 0, 100, 0, 0, SHAPE_LINEAR, 0, 1},       {0, 0, 100, 0, 0, SHAPE_LINEAR, 50, 0.5},
        {0, 0, 20, 0, 0, SHAPE_COSINE, 95, 0.14644660940672624},
    };
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        DropPath d = drop_policy(4, 0.5);
        d.start = row[i].start;
        d.ramp_up = row[i].up;
        d.ramp_down = row[i].down;
        d.recover = row[i].recover;
        d.ramp_from = row[i].from;
        d.shape = row[i].shape;
        char what[32];
        snprintf(what, sizeof what, "row %zu, R(%d)", i, (int)row[i].t);
        EXPECT_CLOSE(drop_path_ramp(&d, row[i].t), row[i].want, 1e-15, what);
    }
}

// The four corners of the trapezoid are exact and the sides monotone, for every shape and many
// lengths.
static void test_drop_ramp_ends(void) {
    static const double from[] = {0, 0.1, 0.3, 0.7, 1};
    for (int i = 0; i < N_SHAPES * 5 * 30; i++) {
        DropPath d = drop_policy(4, 0.5);
        d.shape = i % N_SHAPES;
        d.ramp_from = from[i / N_SHAPES % 5];
        d.ramp_up = 1 + i / N_SHAPES / 5;
        d.ramp_down = 31 - d.ramp_up;
        d.start = 7;
        d.recover = 9;
        int64_t top = d.start + d.ramp_up, fall = d.steps - d.recover - d.ramp_down,
            end = d.steps - d.recover;
        EXPECT(drop_path_ramp(&d, d.start - 1) == 0, "R before the start");
        EXPECT(drop_path_ramp(&d, d.start) == d.ramp_from, "R(start) is %.17g",
               drop_path_ramp(&d, d.start));
        EXPECT(drop_path_ramp(&d, top) == 1, "shape %d: R at the top is %.17g", d.shape,
               drop_path_ramp(&d, top));
        EXPECT(drop_path_ramp(&d, fall) == 1, "shape %d: R before the fall is %.17g", d.shape,
               drop_path_ramp(&d, fall));
        EXPECT(drop_path_ramp(&d, end) == 0, "R at the end is %.17g", drop_path_ramp(&d, end));
        for (int64_t t = 1; t < d.steps; t++) {
            double before = drop_path_ramp(&d, t - 1), now = drop_path_ramp(&d, t);
            EXPECT(now >= 0 && now <= 1 && (t <= fall ? now >= before : now <= before),
                   "shape %d: R(%d) is %g after %g", d.shape, (int)t, now, before);
        }
    }
}

// p = p_max D R to 2^-33, and only for branches that may be dropped.
static void test_drop_rate(void) {
    DropPath d = drop_policy(4, 0.7);
    d.ramp_up = 50;
    for (int i = 0; i < N_DEPTHS * N_BRANCH_KINDS; i++)
        for (int k = 0; k < 4 * BRANCHES * 3; k++) {
            d.depth = i % N_DEPTHS;
            d.branches = i / N_DEPTHS;
            int l = 1 + k % 4, b = k / 4 % BRANCHES, half = k / 8;       // R = 0, 1/2, 1
            int never = (d.branches == BRANCHES_ATTN && b == MLP) ||
                (d.branches == BRANCHES_MLP && b == ATTN);
            double want = never ? 0 : 0.7 * drop_depth_of_4[d.depth][l - 1] * half / 2;
            double got = drop_path_rate(&d, l, b, 25 * half);
            EXPECT_CLOSE(got, want, 1.2e-10, "p(l, t)");
            EXPECT(got * 4294967296.0 == drop_path_rate_bits(&d, l, b, 25 * half),
                   "the rate is not the one drawn against");
        }
    d.p_max = 1 - 1e-12;
    d.depth = DEPTH_UNIFORM;
    d.branches = BRANCHES_SEPARATE;
    const double rate = drop_path_rate(&d, 1, ATTN, 99);
    EXPECT(rate > 0.999 && rate < 1 && isfinite(drop_path_scale(&d, 1, ATTN, 99)),
           "a rate that rounds to 1: %.17g", rate);
}

static void test_drop_scale(void) {
    DropPath d = drop_policy(2, 0.5);
    // for the last layer, p = 1/2
    static const double train[N_SCALES] = {2, 1, 1}, eval[N_SCALES] = {1, 1, 0.5};
    for (d.scale = 0; d.scale < N_SCALES; d.scale++) {
        EXPECT(drop_path_scale(&d, 2, MLP, 0) == train[d.scale], "scale %d in training", d.scale);
        EXPECT(drop_path_eval_scale(&d, 2, MLP) == eval[d.scale], "scale %d in evaluation",
               d.scale);
    }
    d.scale = SCALE_SURVIVAL;
    d.branches = BRANCHES_ATTN;
    EXPECT(drop_path_eval_scale(&d, 2, MLP) == 1, "the MLP is never dropped, yet scaled");
    d.ramp_up = 100;                                     // the final rate is that of step 99
    EXPECT_CLOSE(drop_path_eval_scale(&d, 2, ATTN), 1 - 0.5 * 0.99, 1e-9,
                 "survival of the last step");
    d.recover = 10;                                      // the final rates are 0
    EXPECT(drop_path_eval_scale(&d, 2, ATTN) == 1, "survival after recovery");
}

static void test_drop_full_plan(void) {
    DropPath d = drop_policy(3, 0.6);
    d.scale = SCALE_SURVIVAL;
    d.branches = BRANCHES_TIED;
    DropPlan plan = drop_plan_new(3, 5);
    for (int with = 0; with < 2; with++) {
        drop_plan_full(&plan, with ? &d : NULL, 4);
        EXPECT(plan.batch == 4 && plan.tied == with, "batch %d, tied %d", plan.batch, plan.tied);
        for (int i = 0; i < 3 * BRANCHES; i++) {
            EXPECT(plan.branch[i].n == 4 && plan.branch[i].rows[0] == 0 && plan.branch[i].rows[3] ==
                   3, "branch %d", i);
            EXPECT_CLOSE(plan.branch[i].scale, with ? 1 - 0.2 * (i / BRANCHES + 1) : 1, 1e-9,
                         "scale");
        }
    }
    const double scale[6] = {1, 0, 0.5, 2, 1, 0};        // a factor of 0: the branch does not run
    drop_plan_keep_all(&plan, scale, 0, 5);
    for (int i = 0; i < 3 * BRANCHES; i++)
        EXPECT(plan.branch[i].n == (scale[i] != 0 ? 5 : 0) && plan.branch[i].scale == scale[i],
               "branch %d", i);
    drop_plan_keep_all(&plan, NULL, 1, 2);
    for (int i = 0; i < 3 * BRANCHES; i++)
        EXPECT(plan.branch[i].n == 2 && plan.branch[i].scale == 1, "branch %d", i);
    d.branches = BRANCHES_MLP;                           // only these have factors
    drop_plan_full(&plan, &d, 4);
    for (int i = 0; i < 3 * BRANCHES; i++)
        EXPECT_CLOSE(plan.branch[i].scale, i % 2 == MLP ? 1 - 0.2 * (i / BRANCHES + 1) : 1, 1e-9,
                     "scale");
    drop_plan_free(&plan);
    EXPECT(!plan.branch && !plan.storage, "a plan that is freed can be freed again");
}

// ---- Sampling ----

// Each row of each branch is dropped with its rate, counted over many seeds; and if draws should be
// independent, a branch and the next one are dropped together with the product of their rates.
static void drop_check_marginals(const DropPath *policy) {
    enum { L = 4, B = 3, DRAWS = 2000, M = 3, N = L * BRANCHES };
    DropPlan plan = drop_plan_new(L, B);
    for (int half = 1; half <= 2; half++) {              // in the middle of the ramp, and above it
        DropPath d = *policy;
        int dropped[N][B] = {{0}}, both[N] = {0}, independent = d.unit == UNIT_ROW ||
            d.sampling == SAMPLING_BERNOULLI;
        for (int draw = 0; draw < DRAWS; draw++) {
            d.seed = (uint64_t)(1000 * half + draw);
            drop_plan_sample(&plan, &d, 25 * half, draw % M, M, 1, B);
            for (int i = 0; i < N; i++) {
                for (int row = 0; row < B; row++)
                    dropped[i][row] += !drop_plan_has_row(&plan.branch[i], row);
                both[i] += !drop_plan_has_row(&plan.branch[i], 0) &&
                    !drop_plan_has_row(&plan.branch[(i + 1) % N], 0);
            }
        }
        double p[N];
        for (int i = 0; i < N; i++) {
            int never = (d.branches == BRANCHES_ATTN && i % 2 == MLP) ||
                (d.branches == BRANCHES_MLP && i % 2 == ATTN);
            p[i] = never ? 0 : d.p_max * drop_depth_of_4[d.depth][i / 2] * half / 2;
        }
        for (int i = 0; i < N; i++) {
            double together = d.branches == BRANCHES_TIED &&
                i % 2 == ATTN ? p[i] : p[i] * p[(i + 1) % N];
            double error = sqrt(DRAWS * together * (1 - together));
            for (int row = 0; row < B; row++)
                EXPECT_CLOSE(dropped[i][row], DRAWS * p[i], 4.5 * sqrt(DRAWS * p[i] * (1 - p[i])),
                             "dropped");
            if (independent) EXPECT_CLOSE(both[i], DRAWS * together, 4.5 * error, "both dropped");
        }
    }
    drop_plan_free(&plan);
}

static void test_drop_marginals(void) {
    DropPath d = drop_policy(4, 0.6);
    d.ramp_up = 50;
    for (d.depth = 0; d.depth < N_DEPTHS; d.depth++) drop_each_policy(d, drop_check_marginals);
}

// A random order puts every unit at every position equally often; so no two branches always exclude
// each other, as neighbours in a fixed order would with systematic sampling.
static void test_drop_order(void) {
    enum { N = 8, DRAWS = 4000 };
    int order[N], at[N][N] = {{0}}, both[N][N] = {{0}};
    DropPath d = drop_policy(N / BRANCHES, 0.3);
    d.depth = DEPTH_UNIFORM;
    DropPlan plan = drop_plan_new(N / BRANCHES, 1);
    for (int step = 0; step < DRAWS; step++) {
        drop_path_order(order, N, d.seed, step, 0);
        drop_plan_sample(&plan, &d, step, 0, 1, 1, 1);
        for (int i = 0; i < N; i++) {
            at[order[i]][i]++;
            for (int j = 0; j < N; j++) both[i][j] += !plan.branch[i].n && !plan.branch[j].n;
        }
    }
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            EXPECT_CLOSE(at[i][j], DRAWS / N, 4.5 * sqrt(DRAWS * (1. / N) * (1 - 1. / N)),
                         "times at a place");
            EXPECT(both[i][j] > DRAWS / 50, "branches %d and %d are dropped together %d times", i,
                   j, both[i][j]);
        }
    drop_plan_free(&plan);
}

// Whether `dropped` is the floor or the ceiling of sum / 2^32.
static int drop_floor_or_ceil(int64_t dropped, uint64_t sum) {
    int64_t least = (int64_t)(sum >> 32);
    return dropped == least || (dropped == least + 1 && (uint32_t)sum);
}

// In every plan: rows are ascending; the batch unit keeps all rows or none; systematic sampling
// drops floor or ceil of the sum.
static void drop_check_counts(const DropPath *d) {
    enum { L = 5, B = 7, M = 3 };
    DropPlan plan = drop_plan_new(L, B);
    for (int draw = 0; draw < 60 * M; draw++) {
        int64_t step = draw / M, dropped = 0;
        uint64_t sum = 0;
        drop_plan_sample(&plan, d, step, draw % M, M, 1, B);
        for (int i = 0; i < L * BRANCHES; i++) {
            const BranchPlan *b = &plan.branch[i];
            uint64_t p = drop_path_rate_bits(d, i / 2 + 1, i % 2, step);
            for (int k = 0; k < b->n; k++)
                EXPECT(b->rows[k] < B && b->rows[k] > (k ? b->rows[k - 1] : -1),
                       "row %d of branch %d", k, i);
            if (d->unit == UNIT_BATCH)
                EXPECT(b->n == 0 || b->n == B, "%d of %d rows in a batch unit", b->n, B);
            else if (d->sampling == SAMPLING_SYSTEMATIC)
                EXPECT(drop_floor_or_ceil(B - b->n, B * p), "%d of %d dropped at p %g", B - b->n, B,
                       (double)p / 0x1p32);
            if (i % 2 == MLP && d->branches == BRANCHES_TIED) continue;
            sum += p;
            dropped += b->n == 0;
        }
        if (d->unit == UNIT_BATCH && d->sampling == SAMPLING_SYSTEMATIC)
            EXPECT(drop_floor_or_ceil(dropped, sum), "%d dropped, the rates sum to %g",
                   (int)dropped, (double)sum / 0x1p32);
    }
    drop_plan_free(&plan);
}

static void test_drop_counts(void) {
    DropPath d = drop_policy(5, 0.8);
    d.ramp_up = 50;
    drop_each_policy(d, drop_check_counts);
}

// --drop-adapt: the easiest row is dropped at p (1 + kappa), the hardest at p (1 - kappa), linear
// in between, at most 0.95; the sum is that of equal rates to the bit, and with it the counts.
// Kappa 0 changes no plan.
static void test_drop_adapt(void) {
    enum { B = 6, STEPS = 40000, L = 2 };
    static const int rank[B] = {3, 0, 5, 1, 4, 2};
    static const double kappas[] = {0, 0.4, 1}, p_max[] = {0.3, 0.7};
    DropPlan plan = drop_plan_new(L, B), plain = drop_plan_new(L, B);
    for (int k = 0; k < 2 * 3 * 2; k++) {
        DropPath d = drop_policy(L, p_max[k / 6]), without;
        d.unit = UNIT_ROW, d.depth = DEPTH_UNIFORM, d.sampling = k & 1, d.steps = STEPS;
        without = d;
        d.adapt = kappas[k / 2 % 3], d.rank = rank;
        const uint32_t p = drop_path_rate_bits(&d, 1, ATTN, 0);
        const double most = fmin(d.adapt, 0.95 / p_max[k / 6] - 1);
        double dropped[B] = {0};
        uint64_t sum = 0;
        for (int row = 0; row < B; row++) {
            const uint32_t bits = drop_path_row_bits(&d, p, row, B);
            sum += bits;
            EXPECT_CLOSE(bits / 4294967296.0, p_max[k / 6] * (1 + most * (1 - 2 * rank[row] / 5.0)),
                         1e-9, "a row's rate");
        }
        EXPECT(sum == (uint64_t)B * p, "%llu of %llu", (unsigned long long)sum,
               (unsigned long long)B * p);
        for (int t = 0; t < STEPS; t++) {
            drop_plan_sample(&plan, &d, t, 0, 1, 1, B);
            const BranchPlan *b = &plan.branch[ATTN];
            for (int row = 0; row < B; row++) dropped[row] += !drop_plan_has_row(b, row);
            if (d.sampling == SAMPLING_SYSTEMATIC)
                EXPECT(drop_floor_or_ceil(B - b->n, (uint64_t)B * p), "%d rows", b->n);
            if (d.adapt > 0 || t > 100) continue;
            drop_plan_sample(&plain, &without, t, 0, 1, 1, B);
            for (int i = 0; i < L * BRANCHES; i++)
                EXPECT(plain.branch[i].n == plan.branch[i].n &&
                       !memcmp(plain.branch[i].rows, plan.branch[i].rows,
                               (size_t)plan.branch[i].n * sizeof(int)), "another plan");
        }
        for (int row = 0; row < B; row++) {
            const double want = drop_path_row_bits(&d, p, row, B) / 4294967296.0;
            EXPECT(fabs(dropped[row] / STEPS - want) <= 5.5 * sqrt(want * (1 - want) / STEPS),
                   "case %d, row %d: %g of the steps, not %g", k, row, dropped[row] / STEPS, want);
        }
    }
    drop_plan_free(&plan), drop_plan_free(&plain);
}

// Over the M micro-batches of a step each unit is dropped floor(M p) or ceil(M p) times.
static void drop_check_micro_counts(const DropPath *d) {
    static const int micros[] = {1, 2, 3, 4, 5, 8, 12};
    enum { L = 4, B = 3 };
    if (d->sampling != SAMPLING_SYSTEMATIC) return;
    DropPlan plan = drop_plan_new(L, B);
    for (int k = 0; k < 7 * 40; k++) {
        int M = micros[k % 7], dropped[L * BRANCHES][B] = {{0}};
        int64_t step = k / 7;
        for (int m = 0; m < M; m++) {
            drop_plan_sample(&plan, d, step, m, M, 1, B);
            for (int i = 0; i < L * BRANCHES; i++)
                for (int row = 0; row < B; row++)
                    dropped[i][row] += !drop_plan_has_row(&plan.branch[i], row);
        }
        for (int i = 0; i < L * BRANCHES; i++) {
            uint64_t p = drop_path_rate_bits(d, i / 2 + 1, i % 2, step);
            for (int row = 0; row < B; row++)
                EXPECT(drop_floor_or_ceil(dropped[i][row], (uint64_t)M * p),
                       "branch %d row %d dropped in %d of %d at p %g", i, row, dropped[i][row], M,
                       (double)p / 0x1p32);
        }
    }
    drop_plan_free(&plan);
}

static void test_drop_micro_counts(void) {
    static const double p_max[] = {0.1, 1 / 3., 0.5, 0.9};
    for (int i = 0; i < 4; i++) drop_each_policy(drop_policy(4, p_max[i]), drop_check_micro_counts);
}

static int drop_by_size(const void *a, const void *b) {
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

// All 2^32 values of u, by intervals: a decision can only change where a running sum meets u. Over
// all of them each unit is dropped exactly p of 2^32 times, so that E[mask] * 1/(1-p) = 1, and
// always floor or ceil of the sum are dropped.
static void test_drop_systematic_exact(void) {
    enum { MOST = 8 };
    for (uint32_t trial = 0; trial < 300; trial++) {
        int order[MOST], n = 1 + (int)(trial % MOST), cuts = 1;
        uint32_t p[MOST], cut[MOST + 2] = {0, 1};        // u = 0, and where u passes no unit's sum
        uint64_t sum = 0, dropped[MOST] = {0};
        drop_path_order(order, n, 3, 0, trial);
        for (int i = 0; i < n; i++) {
            Philox word = rng_words(3, STREAM_TEST, 2, trial, (uint32_t)i);
            static const uint32_t special[] = {0, 1, 0x80000000u, 0xffffffffu};
            p[i] = word.v[1] % 4 ? word.v[0] : special[word.v[2] % 4];
        }
        for (int k = 0; k < n; k++) {
            sum += p[order[k]];
            cut[++cuts] = (uint32_t)sum + 1;
        }
        qsort(cut, (size_t)cuts + 1, sizeof *cut, drop_by_size);
        for (int c = 0; c <= cuts; c++) {
            uint64_t end = c < cuts ? cut[c + 1] : (uint64_t)1 << 32, length = end - cut[c];
            unsigned char kept[MOST], last[MOST];
            int count = 0;
            if (!length) continue;
            drop_path_systematic(kept, p, order, n, cut[c]);
            drop_path_systematic(last, p, order, n, (uint32_t)(end - 1));
            EXPECT(!memcmp(kept, last, (size_t)n), "a decision changes within an interval");
            for (int i = 0; i < n; i++) dropped[i] += kept[i] ? 0 : length, count += !kept[i];
            EXPECT(drop_floor_or_ceil(count, sum), "%d dropped of a sum of %g", count,
                   (double)sum / 0x1p32);
        }
        for (int i = 0; i < n; i++)
            EXPECT(dropped[i] == p[i], "unit %d of %d is dropped for %g of u at p %g", i, n,
                   (double)dropped[i] / 0x1p32, p[i] / 0x1p32);
    }
}

// E[mask * scale] = (1 - p) * scale = 1 up to the last bit or two, with the scale in the actual
// plans.
static void drop_check_unbiased(const DropPath *d) {
    enum { L = 4, B = 2 };
    DropPlan plan = drop_plan_new(L, B);
    for (int64_t step = 0; step < d->steps; step++) {
        drop_plan_sample(&plan, d, step, 0, 1, 1, B);
        for (int i = 0; i < L * BRANCHES; i++) {
            double keep = (4294967296.0 - drop_path_rate_bits(d, i / 2 + 1, i % 2, step)) /
                4294967296.0;
            EXPECT_CLOSE(keep * plan.branch[i].scale, 1, 4.5e-16, "E[mask * scale]");
        }
    }
    drop_plan_free(&plan);
}

static void test_drop_unbiased(void) {
    DropPath d = drop_policy(4, 0.9);
    d.ramp_up = 37;
    drop_each_policy(d, drop_check_unbiased);
}

// Tied branches share rows and scale; attn and mlp never drop the other branch.
static void drop_check_branches(const DropPath *d) {
    enum { L = 3, B = 4 };
    DropPlan plan = drop_plan_new(L, B);
    int differ = 0;
    for (int64_t step = 0; step < 50; step++) {
        drop_plan_sample(&plan, d, step, 1, 2, 1, B);
        EXPECT(plan.tied == (d->branches == BRANCHES_TIED), "tied is %d", plan.tied);
        for (int l = 0; l < L; l++) {
            const BranchPlan *attn = &plan.branch[2 * l + ATTN], *mlp = &plan.branch[2 * l + MLP];
            int same = attn->n == mlp->n &&
                !memcmp(attn->rows, mlp->rows, sizeof(int) * (size_t)attn->n);
            differ += !same;
            if (d->branches == BRANCHES_TIED)
                EXPECT(same && attn->scale == mlp->scale, "layer %d is not tied", l);
            if (d->branches == BRANCHES_ATTN)
                EXPECT(mlp->n == B && mlp->scale == 1, "the MLP of layer %d is dropped", l);
            if (d->branches == BRANCHES_MLP)
                EXPECT(attn->n == B && attn->scale == 1, "attention of layer %d is dropped", l);
        }
    }
    if (d->branches != BRANCHES_TIED) EXPECT(differ, "separate branches never differ");
    drop_plan_free(&plan);
}

static void test_drop_branches(void) { drop_each_policy(drop_policy(3, 0.6), drop_check_branches); }

// The plan of (seed, step, m) does not depend on earlier draws; another seed, step or m gives
// another plan.
static void drop_check_deterministic(const DropPath *d) {
    enum { L = 8, B = 4, M = 4 };
    DropPlan first = drop_plan_new(L, B), again = drop_plan_new(L, 2 * B);
    DropPath other = *d;
    int steps = 0, seeds = 0, micros = 0;
    other.seed++;
    for (int64_t step = 0; step < 50; step++) {
        drop_plan_sample(&first, d, step, 1, M, 1, B);
        drop_plan_sample(&again, d, step + 1, 1, M, 1, B);
        steps += !drop_plans_equal(&first, &again);
        drop_plan_sample(&again, &other, step, 1, M, 1, B);
        seeds += !drop_plans_equal(&first, &again);
        drop_plan_sample(&again, d, step, 3, M, 1, B);
        micros += !drop_plans_equal(&first, &again);
        drop_plan_sample(&again, d, step, 1, M, 1, B);
        EXPECT(drop_plans_equal(&first, &again), "step %d: the same place gave another plan",
               (int)step);
    }
    EXPECT(steps > 40 && seeds > 40 && micros > 40,
           "of 50 plans %d, %d, %d differ by step, seed, m", steps, seeds, micros);
    drop_plan_free(&first);
    drop_plan_free(&again);
}

static void test_drop_deterministic(void) {
    drop_each_policy(drop_policy(8, 0.6), drop_check_deterministic);
}

// Plans are the same in every build and in every later version, otherwise a resumed run would drop
// other branches: four steps of the first two of three micro-batches, for each unit, sampling, and
// separate or tied branches.
static void test_drop_known_answers(void) {
    static const char *const want[2 * N_UNITS * N_SAMPLINGS] = {
        "133112 332122 332032 331301 333300 330303 312303 331130",
        "1b.1a.14.03 0f.1d.0a.0c 16.0d.12.03 1b.1e.05.0c 19.0f.03.0c 07.15.0c.03 13.1e.0c.06 "
        "1d.0f.18.05",
        "323033 333310 333020 331321 223110 323003 300220 320101",
        "12.14.12.0d 17.19.0d.00 0a.1f.08.0b 1f.1f.04.1c 1e.13.00.11 01.1f.0f.17 1a.16.10.05 "
        "0b.1f.02.14",
        "330303 333030 330303 333030 033330 330303 333300 303030",
        "16.16.14.14 19.19.09.09 13.13.0a.0a 1d.1d.05.05 0f.0f.18.18 13.13.14.14 1d.1d.09.09 "
        "0b.0b.12.12",
        "333000 303330 033300 303330 333330 333000 330300 333300",
        "0b.0b.12.12 1e.1e.08.08 1e.1e.1d.1d 1e.1e.00.00 1d.1d.00.00 1f.1f.00.00 13.13.16.16 "
        "13.13.00.00",
    };
    for (int i = 0; i < 2 * N_UNITS * N_SAMPLINGS; i++) {
        const int batch = i % N_UNITS == UNIT_ROW ? 5 : 3;
        DropPath d = drop_policy(i % N_UNITS == UNIT_ROW ? 2 : 6, 0.6);
        DropPlan plan = drop_plan_new(d.layers, batch);
        Text text = {NULL, 0, 0};
        d.unit = i % N_UNITS;
        d.sampling = i / N_UNITS % N_SAMPLINGS;
        d.branches = i / N_UNITS / N_SAMPLINGS ? BRANCHES_TIED : BRANCHES_SEPARATE;
        d.seed = (uint64_t)i << 32 | 7;
        for (int64_t step = 0; step < 4; step++)
            for (int m = 0; m < 2; m++) {
                if (text.n) text_append(&text, " ", 1);
                drop_plan_sample(&plan, &d, step << 33 | step, m, 3, 1, batch);
                drop_plan_write(&text, &plan, d.unit);
            }
        EXPECT_TEXT(text.s, want[i]);
        text_free(&text);
        drop_plan_free(&plan);
    }
}

// With sync and the batch unit, the ranks share micro-step k's plan, which is that of a single-rank
// run with M/W micro-batches. Otherwise the plan of m is independent of the number of ranks.
static void drop_check_sync(const DropPath *policy) {
    enum { L = 4, B = 3, K = 3 };
    DropPlan many = drop_plan_new(L, B), one = drop_plan_new(L, B);
    DropPath d = *policy;
    for (int k = 0; k < 2 * 3 * 20 * 4 * K; k++) {
        int W = 1 + k % 4, m = k / 4 % K * W + k / 12 % W;
        int64_t step = k / 12 % 20;
        d.sync = k / 240 % 2;
        int shared = d.sync && d.unit == UNIT_BATCH;
        drop_plan_sample(&many, &d, step, m, K * W, W, B);
        drop_plan_sample(&one, &d, step, shared ? m / W : m, shared ? K : K * W, 1, B);
        EXPECT(drop_plans_equal(&many, &one), "unit %d, sync %d, m %d on %d ranks", d.unit, d.sync,
               m, W);
    }
    drop_plan_free(&many);
    drop_plan_free(&one);
}

static void test_drop_sync(void) { drop_each_policy(drop_policy(4, 0.6), drop_check_sync); }

// A rate of zero, by p_max or by the ramp, gives the full plan with scales of exactly 1.
static void drop_check_zero(const DropPath *d) {
    enum { B = 3 };
    DropPlan plan = drop_plan_new(d->layers, B), full = drop_plan_new(d->layers, B);
    drop_plan_full(&full, NULL, B);
    full.tied = d->branches == BRANCHES_TIED;
    for (int64_t step = 0; step < 50; step++) {
        drop_plan_sample(&plan, d, step, (int)(step % 5), 5, 1, B);
        EXPECT(drop_plans_equal(&plan, &full), "step %d drops or scales something", (int)step);
    }
    drop_plan_free(&plan);
    drop_plan_free(&full);
}

static void test_drop_zero(void) {
    DropPath late = drop_policy(4, 0.9);
    late.start = 50;
    drop_each_policy(drop_policy(4, 0), drop_check_zero);
    drop_each_policy(late, drop_check_zero);
    // a seed whose draw for branch 4 is 0: found by search
    DropPath rare = drop_policy(3, 0);
    rare.sampling = SAMPLING_BERNOULLI;
    rare.seed = 371490725;
    EXPECT(rng_words(rare.seed, STREAM_DROP, 0, 0, 4).v[0] == 0, "another generator: search again");
    drop_check_zero(&rare);
}

// ---- Cost ----

// The expected compute, compared with what sampled plans keep, within 4.5 standard errors of their
// mean.
static void drop_check_compute(const DropPath *policy) {
    enum { L = 4, B = 3, DRAWS = 1000, T = 16 };
    const GptConfig c = {50, T, L, 2, 8};
    DropPlan plan = drop_plan_new(L, B);
    DropPath d = *policy;
    double sum = 0, squares = 0;
    for (int draw = 0; draw < DRAWS; draw++) {
        d.seed = (uint64_t)draw;
        drop_plan_sample(&plan, &d, 20, 0, 1, 1, B);
        double flops = B * gpt_head_flops(&c, T);
        for (int i = 0; i < L * BRANCHES; i++)
            flops += plan.branch[i].n * gpt_branch_flops(&c, i % 2, T);
        double fraction = flops / (B * gpt_row_flops(&c, T));
        sum += fraction;
        squares += fraction * fraction;
    }
    double mean = sum / DRAWS, error = sqrt(fmax(0, squares / DRAWS - mean * mean) / DRAWS);
    EXPECT_CLOSE(mean, drop_path_expected_compute(&d, &c, T, 20), 4.5 * error + 1e-12,
                 "executed fraction");
    drop_plan_free(&plan);
}

static void test_drop_compute(void) {
    const GptConfig c = {50, 16, 4, 2, 8};
    DropPath d = drop_policy(4, 0.6);
    d.ramp_up = 40;
    drop_each_policy(d, drop_check_compute);
    EXPECT(drop_path_expected_compute(&d, &c, 16, 0) == 1, "at rate 0 everything is computed");
    d.p_max = 0.5, d.depth = DEPTH_UNIFORM;              // half of all branches, by hand
    double head = 2 * 16 * 8 * 50, row = head + 4 * 16 * (2 * 8 * 8 * 12 + 2 * 8 * 17);
    EXPECT_CLOSE(drop_path_expected_compute(&d, &c, 16, 99), 0.5 + 0.5 * head / row, 1e-12, "half");
}

// No plan of the run keeps more than the bound, and with systematic sampling some keep exactly
// that.
static void drop_check_bound(const DropPath *d) {
    enum { L = 3, B = 4, M = 4 };
    DropPlan plan = drop_plan_new(L, B);
    int bound[3], most[3] = {0, 0, 0};
    drop_path_bound(d, B, &bound[ATTN], &bound[MLP], &bound[2]);
    for (int k = 0; k < M * (int)d->steps; k++) {
        int kept[3] = {0, 0, 0};
        drop_plan_sample(&plan, d, k / M, k % M, M, 1, B);
        for (int i = BRANCHES * d->frozen; i < L * BRANCHES; i++) kept[i % 2] += plan.branch[i].n;
        kept[2] = kept[ATTN] + kept[MLP];
        for (int b = 0; b < 3; b++) most[b] = kept[b] > most[b] ? kept[b] : most[b];
    }
    for (int b = 0; b < 3; b++) {
        EXPECT(most[b] <= bound[b], "branches %d: %d rows, the bound is %d", d->branches, most[b],
               bound[b]);
        if (d->sampling == SAMPLING_SYSTEMATIC)
            EXPECT(most[b] == bound[b] || d->frozen, "never more than %d of %d", most[b], bound[b]);
        else
            EXPECT(bound[b] == (b < 2 ? 1 : 2) * (L - d->frozen) * B,
                   "%d rows, but independent draws may keep all", bound[b]);
    }
    drop_plan_free(&plan);
}

static void test_drop_bound(void) {
    DropPath d = drop_policy(3, 0.6);
    drop_each_policy(d, drop_check_bound);               // a constant rate
    for (d.frozen = 1; d.frozen < 3; d.frozen++) drop_each_policy(d, drop_check_bound);
    d.frozen = 0;
    d.ramp_up = 60;
    d.ramp_from = 0.7;
    drop_each_policy(d, drop_check_bound);
    d.ramp_up = 0;                                       // falling: the last steps keep the most
    d.ramp_down = 30;
    drop_each_policy(d, drop_check_bound);
    d.ramp_down = 1;                                     // it would reach 0 after the last step
    drop_each_policy(d, drop_check_bound);
    d.ramp_down = 0;
    d.start = 1;                                         // throughout step 0
    drop_each_policy(d, drop_check_bound);
    d = drop_policy(3, 0.6);                             // only step 0 keeps all rows
    d.unit = UNIT_ROW, d.ramp_up = 2, d.ramp_from = 0.3;
    int attn, mlp, rows;
    drop_path_bound(&d, 4, &attn, &mlp, &rows);
    EXPECT(attn == 12 && mlp == 12 && rows == 24, "%d, %d, %d rows", attn, mlp, rows);
    // only the last step keeps all but the last layer's first row
    d.ramp_up = 0, d.ramp_down = 2;
    drop_path_bound(&d, 4, &attn, &mlp, &rows);
    EXPECT(attn == 11 && mlp == 11 && rows == 22, "%d, %d, %d rows", attn, mlp, rows);
    d.ramp_up = 1;                                       // and step 0 keeps that one, too
    drop_path_bound(&d, 4, &attn, &mlp, &rows);
    EXPECT(attn == 12 && mlp == 12 && rows == 24, "%d, %d, %d rows", attn, mlp, rows);
}

// ---- Plans as text ----

static void drop_check_text(const DropPath *d) {
    enum { L = 3, MOST = 9 };
    DropPlan plan = drop_plan_new(L, MOST), back = drop_plan_new(L, MOST);
    for (int k = 0; k < 20 * MOST; k++) {
        Text text = {NULL, 0, 0};
        drop_plan_sample(&plan, d, k, 0, 1, 1, 1 + k % MOST);
        drop_plan_write(&text, &plan, d->unit);
        const char *error = drop_plan_read(&back, d, k, text.s, 0, 1 + k % MOST);
        EXPECT(!error && drop_plans_equal(&plan, &back), "%s of %d rows reads as another plan: %s",
               text.s, 1 + k % MOST, error ? error : "no error");
        text_free(&text);
    }
    drop_plan_free(&plan);
    drop_plan_free(&back);
}

static void test_drop_text(void) {
    drop_each_policy(drop_policy(3, 0.6), drop_check_text);
    DropPath d = drop_policy(2, 0.5);                    // and the documented form
    DropPlan plan = drop_plan_new(2, 5);
    static const char *const row = "1f.01.10.00";
    EXPECT(!drop_plan_read(&plan, &d, 0, row, 0, 5), "%s is refused", row);
    EXPECT(plan.branch[0].n == 5 && plan.branch[1].n == 1 && plan.branch[2].n == 1 &&
           plan.branch[3].n == 0, "%s", row);
    EXPECT(plan.branch[1].rows[0] == 0 && plan.branch[2].rows[0] == 4, "%s", row);
    EXPECT(!drop_plan_read(&plan, &d, 0, "12", 0, 5), "12 is refused");
    EXPECT(plan.branch[0].n == 5 && !plan.branch[1].n && !plan.branch[2].n && plan.branch[3].n == 5,
           "12");
    drop_plan_free(&plan);
}

static void test_drop_text_micros(void) {
    DropPath d = drop_policy(4, 0.7);
    DropPlan plan = drop_plan_new(4, 3), back = drop_plan_new(4, 3);
    for (d.unit = 0; d.unit < N_UNITS; d.unit++) {
        Text text = {NULL, 0, 0};
        for (int m = 0; m < 5; m++) {
            if (m) text_append(&text, " ", 1);
            drop_plan_sample(&plan, &d, 9, m, 5, 1, 3);
            drop_plan_write(&text, &plan, d.unit);
        }
        for (int m = 0; m < 5; m++) {
            drop_plan_sample(&plan, &d, 9, m, 5, 1, 3);
            const char *error = drop_plan_read(&back, &d, 9, text.s, m, 3);
            EXPECT(!error && drop_plans_equal(&plan, &back), "plan %d of %s", m, text.s);
        }
        EXPECT_ERROR(drop_plan_read(&back, &d, 9, text.s, 5, 3), "no plan for this micro-batch");
        text_free(&text);
    }
    drop_plan_free(&plan);
    drop_plan_free(&back);
}

// A text with one byte replaced, or cut short, is refused or describes the plan that was read.
static void drop_damage_text(const DropPath *d, const char *good, int batch) {
    DropPlan plan = drop_plan_new(2, batch);
    size_t n = strlen(good);
    for (size_t at = 0; at < n; at++)
        for (int c = 0; c < 128; c++) {
            char *text = xstrdup(good);
            text[at] = (char)c;
            if (!drop_plan_read(&plan, d, 0, text, 0, batch)) {
                Text back = {NULL, 0, 0};
                drop_plan_write(&back, &plan, d->unit);
                EXPECT(!strncmp(text, back.s, back.n) && (text[back.n] == 0 || text[back.n] == ' '),
                       "\"%s\" was read as %s", text, back.s);
                text_free(&back);
            }
            free(text);
        }
    drop_plan_free(&plan);
}

static void test_drop_text_damaged(void) {
    static const struct { const char *text, *error; } bad[] = {          // for 2 layers, 3 rows
        {"", "no plan"}, {" 33", "too few layers"}, {"3", "too few layers"}, {"333", "more layers"},
        {"34", "0 to 3"}, {"3f", "0 to 3"}, {"3-", "0 to 3"}, {"33x", "more layers"},
        {"7.7.7", "more rows"}, {"7.7.7.", "other rows"}, {"7.7.7.7.7", "more layers"},
        {"8.7.7.7", "other rows"}, {"77.7.7.7", "more rows"}, {"7.7.7.77", "more layers"},
        {"7..7.7", "other rows"}, {".7.7.7", "other rows"}, {"g.7.7.7", "other rows"},
        {"7.7.7.F", "other rows"}, {"7.7.7 7", "more rows"}, {"\xff\xff", "0 to 3"},
        {"........", "other rows"},
    };
    DropPath d = drop_policy(2, 0.5);
    DropPlan plan = drop_plan_new(2, 3);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        EXPECT_ERROR(drop_plan_read(&plan, &d, 0, bad[i].text, 0, 3), bad[i].error);
    drop_damage_text(&d, "30 12", 3);
    d.unit = UNIT_ROW;
    drop_damage_text(&d, "7.1.0.6", 3);
    drop_damage_text(&d, "1f.01.10.00", 5);
    d.branches = BRANCHES_TIED;
    EXPECT_ERROR(drop_plan_read(&plan, &d, 0, "7.7.7.6", 0, 3), "tied");
    EXPECT_ERROR(drop_plan_read(&plan, &d, 0, "31", 0, 3), "tied");
    // as many rows, but different ones
    EXPECT_ERROR(drop_plan_read(&plan, &d, 0, "3.5.0.0", 0, 3), "tied");
    EXPECT(!drop_plan_read(&plan, &d, 0, "6.6.0.0", 0, 3), "a tied plan is refused");
    drop_plan_free(&plan);
}

// ---- How much a run drops, and how much is usual for its size ----

static void test_drop_excess(void) {
    static const struct { double share; int falls; double parameters; int layers; const char *size;
                          double usual; } row[] = {
        {0.0, 0, 124e6, 12, NULL, 13 / 240.}, {13 / 240., 0, 124e6, 12, NULL, 13 / 240.},
        {0.055, 0, 124e6, 12, "small", 13 / 240.}, {0.075, 0, 1e6, 2, NULL, 0.075},
        {0.1, 0, 355e6, 24, NULL, 25 / 240.}, {0.11, 0, 355e6, 24, "medium", 25 / 240.},
        {0.2, 0, 774e6, 36, NULL, 37 / 180.}, {0.25, 0, 1.5e9, 48, "large", 49 / 240.},
        {0.11, 0, 250e6, 24, "medium", 25 / 240.}, {0.3, 0, 600e6, 24, "large", 25 / 120.},
        {0.16, 1, 1e6, 12, NULL, 0.16}, {0.17, 1, 1e6, 12, "small", 0.16},
        {0.16, 1, 355e6, 24, NULL, 0.16}, {0.2, 1, 1.5e9, 48, NULL, 49 / 240.},
    };
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        double usual = 0;
        const char *size = drop_path_excess(row[i].share, row[i].falls, (size_t)row[i].parameters,
                                            row[i].layers, &usual);
        EXPECT_CLOSE(usual, row[i].usual, 1e-15, "usual share");
        EXPECT(size && row[i].size ? !strcmp(size, row[i].size) : size == row[i].size,
               "share %g of %g parameters: %s", row[i].share, row[i].parameters,
               size ? size : "not above");
    }
}

// What is judged is the mean: constant linear rates of 0.4 drop what uniform ones of 0.4 (L+1)/2L
// do; and a run that falls from 0.4 to 0, with linear0, a quarter of 0.4.
static void test_drop_share(void) {
    const GptConfig c = {257, 64, 12, 1, 32};
    DropPath d = drop_policy(12, 0.4);
    EXPECT_CLOSE(drop_path_expected_share(&d, &c, 64, 0), 0.4 * 13 / 24, 1e-9, "linear");
    d.depth = DEPTH_UNIFORM;
    EXPECT_CLOSE(drop_path_expected_share(&d, &c, 64, 0), 0.4, 1e-9, "uniform");
    d.branches = BRANCHES_ATTN;
    const double attn = gpt_branch_flops(&c, ATTN, 64), both = attn + gpt_branch_flops(&c, MLP, 64);
    EXPECT_CLOSE(drop_path_expected_share(&d, &c, 64, 0), 0.4 * attn / both, 1e-9,
                 "attention alone");
    d.branches = BRANCHES_TIED, d.depth = DEPTH_LINEAR0, d.steps = d.ramp_down = 1000;
    double sum = 0;
    for (int64_t t = 0; t < d.steps; t++) sum += drop_path_expected_share(&d, &c, 64, t) / 1000;
    EXPECT_CLOSE(sum, 0.4 / 4, 1e-3, "elhoushi2026: p_max / 4");
}

// ---- Alternate layers, listed rates, protected layers ----

static void test_drop_depth_kinds(void) {
    DropPath d = drop_policy(5, 0.4);
    static const double alternate[5] = {0, 1, 0, 1, 0}, listed[5] = {0, 0.25, 1, 0.5, 0};
    d.depth = DEPTH_ALTERNATE;
    for (int l = 1; l <= 5; l++)
        EXPECT_CLOSE(drop_path_depth(&d, l), alternate[l - 1], 0, "alternate");
    d.listed = 5;
    memcpy(d.list, listed, sizeof listed);
    for (int l = 1; l <= 5; l++)
        EXPECT_CLOSE(drop_path_rate(&d, l, ATTN, 0), 0.4 * listed[l - 1], 1e-9, "listed");
    d = drop_policy(5, 0.4);
    d.depth = DEPTH_UNIFORM;
    for (d.protect = PROTECT_NONE; d.protect <= PROTECT_BOTH; d.protect++)
        for (int l = 1; l <= 5; l++) {
            const int first = l == 1 && (d.protect == PROTECT_FIRST || d.protect == PROTECT_BOTH);
            const int last = l == 5 && (d.protect == PROTECT_LAST || d.protect == PROTECT_BOTH);
            EXPECT_CLOSE(drop_path_depth(&d, l), !first && !last, 0, "protected");
        }
    d = drop_policy(1, 0.4);
    d.protect = PROTECT_LAST;
    EXPECT_CLOSE(drop_path_depth(&d, 1), 0, 0, "the only layer, protected");
}

// inverted-each draws the very masks of tied inverted scaling, and has each branch scaled by
// itself: x + s a, then + s m of that.
static void test_drop_inverted_each(void) {
    for (int unit = 0; unit < N_UNITS; unit++)
        for (int sampling = 0; sampling < N_SAMPLINGS; sampling++) {
            DropPath block = drop_policy(6, 0.5), each;
            block.unit = unit, block.sampling = sampling, block.branches = BRANCHES_TIED;
            each = block;
            each.scale = SCALE_INVERTED_EACH;
            DropPlan a = drop_plan_new(6, 8), b = drop_plan_new(6, 8);
            int dropped = 0;
            for (int64_t t = 0; t < 20; t++) {
                drop_plan_sample(&a, &block, t, 0, 1, 1, 8);
                drop_plan_sample(&b, &each, t, 0, 1, 1, 8);
                EXPECT(a.tied && !b.tied, "tied: %d, %d", a.tied, b.tied);
                b.tied = a.tied;
                EXPECT(drop_plans_equal(&a, &b), "step %lld: other rows or scales", (long long)t);
                for (int i = 0; i < 12; i++) {
                    const double scale = 1 / (1 - drop_path_rate(&each, i / 2 + 1, i % 2, t));
                    EXPECT_CLOSE(b.branch[i].scale, scale, 0, "scale");
                    EXPECT(b.branch[i].n == b.branch[i - i % 2].n,
                           "branches of layer %d have other rows", i / 2);
                    dropped += 8 - b.branch[i].n;
                }
            }
            EXPECT(dropped > 0, "nothing was dropped");
            drop_plan_full(&b, &each, 8);
            for (int i = 0; i < 12; i++)
                EXPECT(b.branch[i].n == 8 && b.branch[i].scale == 1, "evaluation");
            EXPECT(!drop_plan_read(&a, &each, 0, "3.3.3.3.3.3.3.3.3.3.3.3", 0, 2),
                   "a plan of one mask is not read back");
            EXPECT_ERROR(drop_plan_read(&a, &each, 0, "1.3.3.3.3.3.3.3.3.3.3.3", 0, 2), "tied");
            drop_plan_free(&a), drop_plan_free(&b);
        }
}

#endif
