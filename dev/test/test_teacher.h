// test_teacher.h: what a run learns from a teacher: distillation, on every engine, compared with
// the reference in test_engine.h, with finite differences and with PyTorch
// (golden/teacher.safetensors); and whole runs.
#ifndef TEST_TEACHER_H
#define TEST_TEACHER_H

#include "test_checkpoint.h"
#include "test_engine.h"
#include "test_trainer.h"
#include "../files/files.h"
#include "../run/attribution.h"

#ifdef REAL_DOUBLE
#define TEACHER_DOUBLE_TESTS(X) X(distill_differences) X(align_differences)
#else
#define TEACHER_DOUBLE_TESTS(X)
#endif
#define TEACHER_ENGINE_TESTS(X)                                                       \
    X(distill_off_is_off) X(distill_of_itself) X(distill_reference) X(distill_golden) \
    X(distill_chunks) X(distill_bf16_is_near) X(align_of_itself) X(align_reference)   \
    X(align_golden) X(align_threads) X(attribution_golden) TEACHER_DOUBLE_TESTS(X)
#define TEACHER_TESTS(X) X(teacher_teaches) X(teacher_resume) X(teacher_refuses) X(align_teaches) \
    X(attribution_scores) X(attribution_teaches)

// Other depth, heads and width than the shapes of test_engine.h, but the student's V.
static GptConfig teacher_config(int V, int T) {
    const GptConfig c = {V, T + 3, 2, 3, 18};
    return c;
}

// A teacher for the rig: its tokens, and half of its rows' branches scaled; it has run on them.
static Rig teacher_open_for(const Rig *student, int dtype) {
    static const unsigned char all[] = {1, 1, 1};
    const EngineArgs args = {.B = student->B, .T = student->T, .threads = 1, .dtype = dtype,
                             .maps = all};
    Rig r = rig_new(teacher_config(student->c.V, student->T), &args, student->B);
    const size_t n = (size_t)(student->B * student->T) * sizeof(int);
    memcpy(r.tokens, student->tokens, n), memcpy(r.targets, student->targets, n);
    plan_force(&r.plan, FULL, r.B);
    return r;
}

// It runs on the batch, without targets, as a trainer's teacher does.
static void teacher_reads(const Rig *teacher) {
    const Batch batch = batch_of(teacher->plan.batch, teacher->T, teacher->tokens, NULL);
    const Pass pass = pass_of(&teacher->plan, 0);
    test_engine->run(teacher->model, &batch, &pass);
}

// (B,L,T,T) the teacher's maps by the reference.
static double *teacher_maps(Rig *teacher) {
    const int T = teacher->T, each = teacher->c.L * T * T;
    double *w = rig_weights_double(teacher), *all = doubles(teacher->B * each),
        *losses = doubles(T), *logits = doubles(T * teacher->c.V);
    for (int row = 0; row < teacher->B; row++)
        ref_row(losses, logits, all + row * each, NULL, w, &teacher->c, &teacher->plan, NULL, NULL,
                row, T, teacher->tokens + row * T, teacher->targets + row * T);
    free(w), free(losses), free(logits);
    return all;
}

// (B,T,V) the teacher's logits by the reference.
static double *teacher_logits(Rig *teacher) {
    const int TV = teacher->T * teacher->c.V;
    double *w = rig_weights_double(teacher), *all = doubles(teacher->B * TV),
        *losses = doubles(teacher->T);
    for (int row = 0; row < teacher->B; row++)
        ref_row(losses, all + row * TV, NULL, NULL, w, &teacher->c, &teacher->plan, NULL, NULL,
                row, teacher->T, teacher->tokens + row * teacher->T,
                teacher->targets + row * teacher->T);
    free(w), free(losses);
    return all;
}

// A teacher that the objective does not use changes no bit.
static void test_distill_off_is_off(void) {
    Rig r = rig_open(small_config, SMALL_B, SMALL_T), teacher = teacher_open_for(&r, DTYPE_FP32);
    const Objective off = {.temperature = 2, .teacher = teacher.model};
    double want_loss, loss;
    plan_force(&r.plan, ROW, r.B);
    real *want = rig_gradient(&r, &want_loss);
    teacher_reads(&teacher);
    r.objective = &off;
    real *got = rig_gradient(&r, &loss);
    EXPECT(loss == want_loss && slot_same_bits(&r.c, got, want), "other bits");
    free(want), free(got);
    rig_close(&r), rig_close(&teacher);
}

// A student learns nothing from itself, whatever the temperature: the term is 0, and its gradient.
static void test_distill_of_itself(void) {
    static const double temperature[] = {1, 2, 0.5, 7};
    Rig r = rig_open(small_config, SMALL_B, SMALL_T), same = rig_open(small_config, SMALL_B,
        SMALL_T);
    for (int k = 0; k < 4; k++) {
        const Objective o = {.distill = 1, .temperature = temperature[k], .teacher = same.model};
        double loss;
        plan_force(&r.plan, k % 2 ? ROW : FULL, r.B), plan_force(&same.plan, k % 2 ? ROW : FULL,
            r.B);
        teacher_reads(&same);
        r.objective = &o;
        real *got = rig_gradient(&r, &loss);
        const size_t n = gpt_params_count(&r.c);
        const double most = test_engine == engine_cpu() ? 0 : 1e-7;
        EXPECT(fabs(loss) <= most && rms(got, n) <= most, "loss %g, gradient %g", loss,
               rms(got, n));
        free(got);
    }
    rig_close(&r), rig_close(&same);
}

static const Objective distill_cases[] = {
    {.distill = 0.5, .temperature = 1}, {.distill = 1, .temperature = 2},
    {.distill = 0.25, .temperature = 0.5, .smoothing = 0.1}, {.distill = 0.9, .temperature = 10}};
enum { DISTILL_CASES = sizeof distill_cases / sizeof distill_cases[0] };

// Losses, parts and slopes under every kind of plan, and with noise, which a teacher does not have.
static void test_distill_reference(void) {
    static const int plans[] = {FULL, ROW, TIED_ROW, BATCH};
    const Noise noise = {.seed = 3, .step = 5, .attn = 6554, .resid = 6554};
    for (int k = 0; k < DISTILL_CASES; k++) {
        const GptConfig c = {67, 31, 2, 2, 18};
        Rig r = rig_open(c, 3, 29), teacher = teacher_open_for(&r, DTYPE_FP32);
        double *w = rig_weights_double(&r), *soft = teacher_logits(&teacher), loss, part[N_PARTS];
        static const double exits[] = {0.3, 0.7};        // which have no teacher
        Objective o = distill_cases[k], hard = {.smoothing = o.smoothing};
        const double last = k > 1 ? exits[1] : 1;
        if (k > 1) o.exit = hard.exit = exits;
        plan_force(&r.plan, plans[k], r.B);
        teacher_reads(&teacher);
        o.teacher = teacher.model;
        r.objective = &o, r.soft = soft, r.noise = k == 1 ? &noise : NULL;
        const double want = ref_loss(&r, w, NULL), tolerance = 8 * rounding(4 * c.C + r.T);
        real *gradient = rig_gradient(&r, &loss);
        test_engine->parts(r.model, part);
        EXPECT_CLOSE(loss, want, tolerance * (1 + want), "loss");
        r.objective = &hard;
        const double without = ref_loss(&r, w, NULL);
        hard.exit = NULL;
        const double kl = (want - without + last * o.distill * ref_loss(&r, w, NULL)) / o.distill /
            last;
        r.objective = &o;
        EXPECT(kl > 0.01, "%g", kl);
        EXPECT_CLOSE(part[PART_DISTILL], kl, tolerance * (1 + kl) / o.distill, "the term");
        EACH_TENSOR(&c)
            expect_slope(&r, w, gradient, slot_at(&c, p, l), gpt_param_size(&c, p),
                         gpt_param[p].name);
        free(gradient), free(w), free(soft);
        rig_close(&r), rig_close(&teacher);
    }
}

// Tokens that are not scored have no term either, and a vocabulary so large that the logits come in
// several chunks has the same mean.
static void test_distill_chunks(void) {
    const GptConfig c = {50257, 100, 1, 2, 4};
    Rig r = rig_open(c, 2, 100), teacher = teacher_open_for(&r, DTYPE_FP32);
    const Objective o = {.distill = 0.5, .temperature = 2, .teacher = teacher.model};
    double *w = rig_weights_double(&r), *soft = teacher_logits(&teacher), *logits = doubles(100 *
        c.V), *losses = doubles(100), want = 0, part[N_PARTS];
    for (int row = 0; row < 2; row++) {
        ref_row(losses, logits, NULL, NULL, w, &c, &r.plan, NULL, NULL, row, 100,
                r.tokens + row * 100, r.targets + row * 100);
        for (int t = 0; t < 100; t += 1 + t % 3)
            want += 4 * ref_kl(soft + (size_t)(row * 100 + t) * (size_t)c.V, logits +
                               (size_t)t * (size_t)c.V, 2, c.V);
    }
    int scored = 0;
    for (int i = 0; i < 200; i++) r.targets[i] = -1;
    for (int row = 0; row < 2; row++)
        for (int t = 0; t < 100; t += 1 + t % 3) r.targets[row * 100 + t] = t, scored++;
    teacher_reads(&teacher);
    r.objective = &o;
    const double loss = rig_forward(&r);
    test_engine->parts(r.model, part);
    EXPECT_CLOSE(part[PART_DISTILL], want / scored, 64 * rounding(c.C) * (1 + want / scored),
                 "the term");
    EXPECT_CLOSE(loss, (part[PART_NLL] + part[PART_DISTILL]) / 2, 1e-9, "the loss");
    free(w), free(soft), free(logits), free(losses);
    rig_close(&r), rig_close(&teacher);
}

// A teacher made of the model's own tensors, its last layer alone; it has run on the batch.
static Rig golden_teacher(const Rig *r, const unsigned char *maps) {
    GptConfig one = r->c;
    one.L = 1;
    EngineArgs args = {.B = r->B, .T = r->T, .threads = 1, .dtype = DTYPE_FP32, .maps = maps};
    Rig teacher = rig_new(one, &args, r->B);
    real *weights = slot_read(&r->c, r->model, SLOT_PARAM);
    EACH_TENSOR(&one)
        test_engine->write(teacher.model, SLOT_PARAM, p, l,
                           weights + slot_at(&r->c, p, gpt_param[p].branch == NO_BRANCH ? 0
                                             : r->c.L - 1));
    free(weights);
    memcpy(teacher.tokens, r->tokens, (size_t)(r->B * r->T) * sizeof(int));
    plan_force(&teacher.plan, FULL, r->B);
    teacher_reads(&teacher);
    return teacher;
}

// The same from PyTorch in float64: kl_div of torch on a teacher made of the model's own tensors,
// its last layer alone.
static void test_distill_golden(void) {
    static const char *const cases[] = {"half/", "soft/", "smooth/"};
    Golden g = golden_open(), more = golden_more(&g, "dev/golden/teacher.safetensors");
    Rig *r = &more.rig;
    Rig teacher = golden_teacher(r, NULL);
    for (int i = 0; i < 3; i++) {
        const Objective o = {.smoothing = golden_number(&more, cases[i], "objective", 0),
                             .distill = golden_number(&more, cases[i], "objective", 1),
                             .temperature = golden_number(&more, cases[i], "objective", 2),
                             .teacher = teacher.model};
        const double tolerance = golden_tolerance(&more);
        r->objective = &o;
        golden_gradients(&more, cases[i], tolerance);
        double part[N_PARTS];
        test_engine->parts(r->model, part);
        EXPECT_CLOSE(part[PART_DISTILL], golden_number(&more, cases[i], "distill", 0), 4 *
                     tolerance, cases[i]);
    }
    rig_close(&teacher);
    golden_close_more(&more);
    golden_close(&g);
}

static void test_distill_bf16_is_near(void) {
    const GptConfig c = {53, 150, 2, 2, 32};
    Rig fp32 = rig_open(c, 2, 137), bf16 = rig_open_dtype(c, 2, 137, 1, DTYPE_BF16);
    Rig exact = teacher_open_for(&fp32, DTYPE_FP32), rounded = teacher_open_for(&bf16, DTYPE_BF16);
    Objective o = {.distill = 0.7, .temperature = 2, .teacher = exact.model}, p = o;
    double want_loss, loss;
    p.teacher = rounded.model;
    teacher_reads(&exact), teacher_reads(&rounded);
    fp32.objective = &o, bf16.objective = &p;
    real *want = rig_gradient(&fp32, &want_loss), *got = rig_gradient(&bf16, &loss);
    EXPECT_CLOSE(loss, want_loss, want_loss / 128, "loss");
    expect_near(&c, got, want, 1.0 / 32, "a teacher");
    free(want), free(got);
    rig_close(&fp32), rig_close(&bf16), rig_close(&exact), rig_close(&rounded);
}

#ifdef REAL_DOUBLE
static void test_distill_differences(void) {
    const GptConfig c = {37, 20, 3, 2, 12};
    for (int k = 0; k < DISTILL_CASES; k++) {
        Rig same = rig_open(c, 3, 17), teacher = teacher_open_for(&same, DTYPE_FP32);
        Objective o = distill_cases[k];
        o.teacher = teacher.model;
        teacher_reads(&teacher);
        expect_differences(c, 3, 17, 2, NULL, &o);
        rig_close(&same), rig_close(&teacher);
    }
}
#endif

// ---- Attention maps ----

static const int align_ends[] = {0, -1, 1}, align_last[] = {-1, -1, 1}, align_all[] = {0, 1, 1};
static const Align align_cases[] = {
    {.layer = align_ends, .layers = 2, .gamma = 1}, {.layer = align_last, .layers = 1, .kl = 1,
                                                     .gamma = 0.3},
    {.layer = align_all, .layers = 3, .gamma = 5}, {.layer = align_all, .layers = 3, .kl = 1,
                                                    .gamma = 2}};
enum { ALIGN_CASES = sizeof align_cases / sizeof align_cases[0] };

// The model compares its maps with its own: nothing to learn, to the bit but for rounding, and the
// cosine of everything that is compared is 1.
static void test_align_of_itself(void) {
    static const int same[] = {0, 1, 2};
    static const unsigned char all[] = {1, 1, 1};
    for (int kl = 0; kl < 2; kl++) {
        EngineArgs args = {.B = 3, .T = 70, .threads = 2, .maps = all};
        Rig r = rig_open(small_config, 3, 70), teacher = rig_new(small_config, &args, 3);
        const Align a = {teacher.model, same, 3, kl, 10};
        const Objective with = {.align = &a};
        double want_loss, loss, part[N_PARTS];
        memcpy(teacher.tokens, r.tokens, 3 * 70 * sizeof(int));
        plan_force(&teacher.plan, FULL, 3);
        teacher_reads(&teacher);
        real *want = rig_gradient(&r, &want_loss);
        r.objective = &with;
        real *got = rig_gradient(&r, &loss);
        test_engine->parts(r.model, part);
        EXPECT(part[PART_ALIGN] >= -1e-7 && part[PART_ALIGN] < 1e-6, "%g", part[PART_ALIGN]);
        EXPECT_CLOSE(part[PART_COSINE], 1, 1e-6, "the cosine");
        EXPECT_CLOSE(part[PART_COMPARED], 1, 1e-9, "compared");
        EXPECT_CLOSE(loss, want_loss, 2e-5, "the loss");
        expect_slot(&r.c, got, want, 64 * rounding(4 * r.c.C), "the gradient");
        free(want), free(got);
        rig_close(&r), rig_close(&teacher);
    }
}

// Losses, parts and slopes: under plans that drop rows, scaled branches and tied ones, with noise,
// and beside a distillation; rows of several blocks of queries.
static void test_align_reference(void) {
    static const int plans[] = {FULL, ROW, TIED_ROW, BATCH};
    static const GptConfig configs[] = {{67, 31, 3, 2, 18}, {29, 150, 3, 1, 20}};
    const Noise noise = {.seed = 3, .step = 5, .attn = 6554};
    for (int k = 0; k < 2 * ALIGN_CASES; k++) {
        const GptConfig c = configs[k / ALIGN_CASES];
        Rig r = rig_open(c, 3, k < ALIGN_CASES ? 29 : 141), teacher = teacher_open_for(&r,
            DTYPE_FP32);
        Align a = align_cases[k % ALIGN_CASES];
        Objective o = {.distill = k == 2 ? 0.5 : 0, .temperature = 2, .align = &a};
        double *w = rig_weights_double(&r), *maps = teacher_maps(&teacher),
            *soft = teacher_logits(&teacher), loss, part[N_PARTS];
        a.teacher = o.teacher = teacher.model;
        plan_force(&r.plan, plans[k % 4], r.B);
        teacher_reads(&teacher);
        r.objective = &o, r.maps = maps, r.soft = soft, r.noise = k == 1 ? &noise : NULL;
        const double want = ref_loss(&r, w, NULL), tolerance = 16 * rounding(4 * c.C + r.T);
        EXPECT_CLOSE(rig_forward(&r), want, tolerance * (1 + want), "the loss alone");
        real *gradient = rig_gradient(&r, &loss);
        test_engine->parts(r.model, part);
        EXPECT_CLOSE(loss, want, tolerance * (1 + want), "the loss");
        EXPECT(part[PART_ALIGN] > 1e-3 && part[PART_COSINE] < part[PART_COMPARED], "%g, %g of %g",
               part[PART_ALIGN], part[PART_COSINE], part[PART_COMPARED]);
        if (k >= ALIGN_CASES) expect_slope(&r, w, gradient, 0, gpt_params_count(&c), "all");
        else EACH_TENSOR(&c)
            expect_slope(&r, w, gradient, slot_at(&c, p, l), gpt_param_size(&c, p),
                         gpt_param[p].name);
        free(gradient), free(w), free(maps), free(soft);
        rig_close(&r), rig_close(&teacher);
    }
}

// The same from PyTorch in float64: the teacher of distill_golden, whose layer is compared with the
// student's first and last.
static void test_align_golden(void) {
    static const char *const cases[] = {"cosine/", "kl/"};
    static const int pairs[] = {0, -1, 0};
    static const unsigned char first[] = {1};
    Golden g = golden_open(), more = golden_more(&g, "dev/golden/teacher.safetensors");
    Rig *r = &more.rig;
    for (int i = 0; i < 2; i++) {
        Rig teacher = golden_teacher(r, first);
        const Align a = {teacher.model, pairs, 2, i, golden_number(&more, cases[i], "gamma", 0)};
        const Objective o = {.align = &a};
        const double tolerance = 2 * golden_tolerance(&more);
        r->objective = &o;
        golden_gradients(&more, cases[i], tolerance);
        double part[N_PARTS];
        test_engine->parts(r->model, part);
        EXPECT_CLOSE(part[PART_ALIGN], golden_number(&more, cases[i], "align", 0), tolerance,
                     cases[i]);
        EXPECT_CLOSE(part[PART_COSINE] / part[PART_COMPARED],
                     golden_number(&more, cases[i], "align", 1), tolerance, cases[i]);
        rig_close(&teacher);
    }
    golden_close_more(&more);
    golden_close(&g);
}

// ---- Attributions ----

// Second derivatives by differences, beside double backpropagation in PyTorch. The bar is that of
// the design, 1e-3 of each gradient; in float64 the error of the difference remains.
static void test_attribution_golden(void) {
    Golden g = golden_open(), more = golden_more(&g, "dev/golden/teacher.safetensors");
    Rig *r = &more.rig;
    {
        const double gamma = golden_number(&more, "attribution/", "gamma", 0);
        Attribution a = attribution_new((size_t)r->B, (size_t)r->T, &r->c);
        double *target = doubles(r->B * r->T);
        real *zero = slot_new(&r->c);
        for (int i = 0; i < r->B * r->T; i++)
            target[i] = golden_number(&more, "attribution/", "target", (size_t)i);
        golden_plan(&more, "attribution/", 0);
        slot_write(&r->c, r->model, SLOT_GRAD, zero);
        const Batch batch = batch_of(r->B, r->T, r->tokens, r->targets);
        const Pass pass = pass_of(&r->plan, 1);
        const double loss = attribution_train(&a, test_engine, r->model, &batch, &pass, target,
                                              gamma);
        real *got = slot_read(&r->c, r->model, SLOT_GRAD),
            *want = golden_slot(&more, "attribution/grad/");
        EXPECT_CLOSE(loss, golden_number(&more, "attribution/", "loss", 0), 1e-5, "the loss");
        EXPECT_CLOSE(a.cosine, golden_number(&more, "attribution/", "cosine", 0), 1e-5, "cosine");
        EACH_TENSOR(&r->c) {
            const size_t at = slot_at(&r->c, p, l), n = gpt_param_size(&r->c, p);
            double apart = 0, size = 0;
            for (size_t i = at; i < at + n; i++) {
                apart += pow((double)got[i] - (double)want[i], 2);
                size += pow((double)want[i], 2);
            }
            EXPECT(apart <= 1e-6 * size, "%s of layer %d: %g of it apart", gpt_param[p].name, l,
                   sqrt(apart / size));
        }
        free(zero), free(got), free(want), free(target);
        attribution_free(&a);
    }
    golden_close_more(&more);
    golden_close(&g);
}

static void test_attribution_scores(void) {
    static const struct { const char *text, *wrong; } cases[] = {
        {"1 -2.5\n0", NULL}, {"# three\n1\t2 # two\n\r\n-3", NULL}, {"1 2", "fewer"},
        {"1 2 3 4", "more numbers"}, {"1 2 x", "more than numbers"},
        {"1 2 nan", "more than numbers"},
        {"1 2 21", "between"}, {"1 2 1e999", "between"}, {"1 2 --3", "more than numbers"},
        {"", "fewer"}, {"#", "fewer"}, {"1 2 3x", "more than numbers"}};
    double score[3];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *error = scores_parse(score, 3, cases[i].text, strlen(cases[i].text));
        if (cases[i].wrong) EXPECT_ERROR(error, cases[i].wrong);
        else EXPECT(!error, "%s: %s", cases[i].text, error);
    }
    const int tokens[] = {0, 1, 2};
    const real e[] = {3, 4, 0, 2, 5, 5};
    double target[3];
    EXPECT(!scores_parse(score, 3, "1 -2 0", 6), "%g", score[0]);
    scores_target(target, score, tokens, e, 3, 2);
    EXPECT_CLOSE(target[0], 5 * exp(1), 1e-5, "a positive score");
    EXPECT_CLOSE(target[1], -2 * exp(2), 1e-5, "a negative one");
    EXPECT(target[2] == 0, "%g", target[2]);
}

// Any number of threads gives the same bits; a weight of 0 those without a comparison.
static void test_align_threads(void) {
    const GptConfig c = {61, 140, 3, 3, 48};
    real *want = NULL;
    double want_loss = 0, loss, want_plain;
    for (int threads = 1; threads <= 3; threads++) {
        Rig r = rig_open_threads(c, 3, 137, threads), teacher = teacher_open_for(&r, DTYPE_FP32);
        Align a = align_cases[2];
        const Objective o = {.align = &a};
        a.teacher = teacher.model;
        teacher_reads(&teacher);
        plan_force(&r.plan, ROW, 3);
        r.objective = &o;
        real *got = rig_gradient(&r, &loss);
        if (!want) want = got, want_loss = loss;
        else EXPECT(loss == want_loss && slot_same_bits(&c, got, want), "%d threads", threads);
        if (got != want) free(got);
        a.gamma = 0;
        real *off = rig_gradient(&r, &loss);
        r.objective = NULL;
        real *plain = rig_gradient(&r, &want_plain);
        EXPECT(loss == want_plain && slot_same_bits(&c, off, plain), "weight 0: other bits");
        free(off), free(plain);
        rig_close(&r), rig_close(&teacher);
    }
    free(want);
}

#ifdef REAL_DOUBLE
static void test_align_differences(void) {
    const GptConfig c = {37, 20, 3, 2, 12};
    for (int k = 0; k < ALIGN_CASES; k++) {
        Rig same = rig_open(c, 3, 17), teacher = teacher_open_for(&same, DTYPE_FP32);
        Align a = align_cases[k];
        const Objective o = {.align = &a};
        a.teacher = teacher.model;
        teacher_reads(&teacher);
        expect_differences(c, 3, 17, 2, NULL, &o);
        rig_close(&same), rig_close(&teacher);
    }
}
#endif

// ---- Whole runs ----

// The last step's record of a run.
static Metrics teacher_last(const char *dir, const char *name) {
    char *path = xprintf("%s/%s/metrics.jsonl", dir, name);
    MetricsLog log = metrics_read(path);
    Metrics r = log.record[log.n - 1];
    r.plan = NULL, r.micro = NULL;
    metrics_log_free(&log);
    free(path);
    return r;
}

// A teacher of another shape: its term falls, the metrics have it and -log p, and its forward pass
// is counted. The same steps in other micro-batches give the same losses. Without its share the
// run is a plain one, whatever the temperature.
static void test_teacher_teaches(void) {
    const char *dir = test_directory();
    char a[400], b[400];
    EXPECT_RUN("--out %s/teacher --steps 60 --lr 1e-2 --layers 1 --heads 4 --channels 24", dir);
    EXPECT_RUN("--out %s/short --steps 1 --teacher %s/teacher --distill 0.7 "
               "--distill-temperature 2", dir, dir);
    EXPECT_RUN("--out %s/long --steps 60 --lr 3e-3 --teacher %s/teacher/latest --distill 0.7 "
               "--distill-temperature 2", dir, dir);
    EXPECT_RUN("--out %s/cut --steps 60 --lr 3e-3 --teacher %s/teacher/latest --distill 0.7 "
               "--distill-temperature 2 --batch 2", dir, dir);
    EXPECT_RUN("--out %s/plain --steps 1", dir);
    EXPECT_RUN("--out %s/off --steps 1 --distill-temperature 2", dir);
    const Metrics first = teacher_last(dir, "short"), last = teacher_last(dir, "long"),
        cut = teacher_last(dir, "cut"), plain = teacher_last(dir, "plain");
    EXPECT(first.distill > 0.5 && last.distill < first.distill / 2, "from %g to %g", first.distill,
           last.distill);
    EXPECT_CLOSE(first.loss, 0.3 * first.nll + 0.7 * first.distill, 1e-9, "the loss");
    EXPECT_CLOSE(first.nll, plain.loss, 1e-6, "-log p of the first step");
    EXPECT_CLOSE(cut.loss, last.loss, 1e-4, "in other micro-batches");
    EXPECT(isnan(plain.distill), "%g", plain.distill);
    EXPECT(first.flops > 1.1 * plain.flops && first.flops_fraction == 1, "%g of %g, %g",
           first.flops, plain.flops, first.flops_fraction);
    snprintf(a, sizeof a, "%s/plain/latest", dir), snprintf(b, sizeof b, "%s/off/latest", dir);
    EXPECT_SAME(a, b, "model.safetensors");
    EXPECT_SAME(a, b, "optimizer.safetensors");
}

// Also with a teacher that has moved; one with other weights is noticed.
static void test_teacher_resume(void) {
    const char *dir = test_directory(), *how = "--distill 0.5 --drop-path 0.4 --drop-unit row";
    char a[400], b[400];
    EXPECT_RUN("--out %s/teacher --steps 20 --lr 1e-2 --layers 1 --heads 4 --channels 24", dir);
    EXPECT_RUN("--out %s/a --steps 30 --teacher %s/teacher %s --save-every 10 --keep 0", dir, dir,
               how);
    EXPECT_RUN("--out %s/t2 --steps 21 --lr 1e-2 --layers 1 --heads 4 --channels 24", dir);
    tool_expect(0, "", shell_runf("mv %s/teacher %s/moved", dir, dir), __FILE__, __LINE__);
    ToolRun r = trainer_test_run("--out %s/b --steps 30 --teacher %s/moved %s --resume "
                                 "%s/a/step_00000010", dir, dir, how, dir);
    EXPECT(r.code == 0 && !strstr(r.err.s, "teacher") && !strstr(r.err.s, "other options"), "%s",
           r.err.s);
    tool_free(&r);
    snprintf(a, sizeof a, "%s/a/latest", dir), snprintf(b, sizeof b, "%s/b/latest", dir);
    EXPECT_SAME(a, b, "model.safetensors");
    EXPECT_SAME(a, b, "optimizer.safetensors");
    EXPECT_REFUSED(0, "has other weights", "--out %s/c --steps 30 --teacher %s/t2 %s --resume "
                   "%s/a/step_00000010", dir, dir, how, dir);
}

// Attention comes closer to that of a teacher of other depth and heads; runs resume to the same
// bits, also with a weight that decays.
static void test_align_teaches(void) {
    const char *dir = test_directory();
    static const char *const how[] = {"--align attention --align-gamma 3",
                                      "--align attention --align-gamma 3 --align-loss kl "
                                      "--align-layers last --drop-path 0.3 --drop-unit row "
                                      "--dropout-attn 0.1",
                                      "--align attention --distill 0.5 --align-decay 0.5"};
    char a[400], b[400];
    EXPECT_RUN("--out %s/teacher --steps 60 --lr 1e-2 --layers 3 --heads 4 --channels 24", dir);
    EXPECT_RUN("--out %s/off --steps 30 --lr 3e-3 --teacher %s/teacher --align attention "
               "--align-gamma 0", dir, dir);
    EXPECT_RUN("--out %s/plain --steps 30 --lr 3e-3", dir);
    snprintf(a, sizeof a, "%s/plain/latest", dir), snprintf(b, sizeof b, "%s/off/latest", dir);
    EXPECT_SAME(a, b, "model.safetensors");
    for (int i = 0; i < 3; i++) {
        EXPECT_RUN("--out %s/%d --steps 30 --lr 3e-3 --teacher %s/teacher %s --save-every 10 "
                   "--keep 0", dir, i, dir, how[i]);
        EXPECT_RUN("--out %s/%d_part --steps 30 --lr 3e-3 --teacher %s/teacher %s --resume "
                   "%s/%d/step_00000010 --threads 2", dir, i, dir, how[i], dir, i);
        snprintf(a, sizeof a, "%s/%d/latest", dir, i);
        snprintf(b, sizeof b, "%s/%d_part/latest", dir, i);
        EXPECT_SAME(a, b, "model.safetensors");
        EXPECT_SAME(a, b, "optimizer.safetensors");
    }
    const Metrics off = teacher_last(dir, "off"), on = teacher_last(dir, "0"),
        kl = teacher_last(dir, "1");
    EXPECT(1 - on.align_cos < (1 - off.align_cos) / 2 && on.align_loss < off.align_loss,
           "cosine %g without, %g with", off.align_cos, on.align_cos);
    EXPECT(kl.align_loss >= 0 && kl.nll < kl.loss && kl.align_cos <= 1, "%g, %g", kl.align_loss,
           kl.align_cos);
    EXPECT(on.loss > on.nll && isnan(on.distill), "%g, %g", on.loss, on.nll);
    EXPECT_REFUSED(1, "exclude each other", "--out %s/x --teacher %s/teacher --align attention "
                   "--attentiondrop hard", dir, dir);
    EXPECT_REFUSED(1, "needs --teacher", "--out %s/x --align attention", dir);
    EXPECT_REFUSED(1, "there is no such layer", "--out %s/x --teacher %s/teacher --align attention "
                   "--align-layers 0-2", dir, dir);
    EXPECT_REFUSED(0, "", "--out %s/g --steps 12 --teacher %s/teacher --align attention --grow "
                   "1:0,all:50%%", dir, dir);
}

// Attributions follow a teacher's, or scores of tokens; runs resume to the same bits.
static void test_attribution_teaches(void) {
    const char *dir = test_directory();
    char a[400], b[400];
    char *path = xprintf("%s/scores", dir);
    FILE *f = file_open(path, "wb");
    for (int v = 0; v < 257; v++) fprintf(f, "%d\n", v == 'c' || v == 'm' ? 3 : v == ' ' ? -1 : 0);
    fclose(f);
    char *how[] = {xprintf("--teacher %s/teacher --align attribution --align-gamma 0.3", dir),
                   xprintf("--align attribution --align-scores %s --align-gamma 0.3 "
                           "--drop-path 0.3 --dropout-resid 0.1 --label-smoothing 0.1", path),
                   xprintf("--teacher %s/teacher --align attribution --align-gamma 0", dir)};
    EXPECT_RUN("--out %s/teacher --steps 60 --lr 1e-2 --layers 1 --heads 4 --channels 24", dir);
    EXPECT_RUN("--out %s/plain --steps 40 --lr 3e-3", dir);
    for (int i = 0; i < 3; i++) {
        EXPECT_RUN("--out %s/%d --steps 40 --lr 3e-3 %s --save-every 20 --keep 0", dir, i, how[i]);
        EXPECT_RUN("--out %s/%d_part --steps 40 --lr 3e-3 %s --resume %s/%d/step_00000020 "
                   "--threads 2", dir, i, how[i], dir, i);
        snprintf(a, sizeof a, "%s/%d/latest", dir, i);
        snprintf(b, sizeof b, "%s/%d_part/latest", dir, i);
        EXPECT_SAME(a, b, "model.safetensors");
        EXPECT_SAME(a, b, "optimizer.safetensors");
    }
    snprintf(b, sizeof b, "%s/plain/latest", dir);
    EXPECT_SAME(a, b, "model.safetensors");              // a weight of 0
    const Metrics on = teacher_last(dir, "0"), off = teacher_last(dir, "2"),
        scored = teacher_last(dir, "1"), plain = teacher_last(dir, "plain");
    EXPECT(on.align_cos > off.align_cos && on.align_loss < off.align_loss, "cosine %g, %g without",
           on.align_cos, off.align_cos);
    EXPECT(isfinite(scored.align_cos) && scored.nll < scored.loss, "%g", scored.align_cos);
    EXPECT(on.flops > 3 * plain.flops && off.flops > plain.flops && off.flops < 3 * plain.flops,
           "%g, %g of %g", on.flops, off.flops, plain.flops);
    EXPECT_REFUSED(1, "--dtype fp32", "--out %s/x --dtype bf16 %s", dir, how[0]);
    EXPECT_REFUSED(1, "without dropout", "--out %s/x --dropout-embd 0.1 %s", dir, how[0]);
    EXPECT_REFUSED(1, "exclude each other", "--out %s/x --dropout-attn 0.1 --consistency 1 %s", dir,
                   how[0]);
    EXPECT_REFUSED(1, "needs --align attribution", "--out %s/x --align-scores %s", dir, path);
    EXPECT_REFUSED(1, "fewer numbers", "--out %s/x --vocab-size 300 %s", dir, how[1]);
    EXPECT_REFUSED(1, "cannot read", "--out %s/x --align attribution --align-scores %s/none", dir,
                   dir);
    for (int i = 0; i < 3; i++) free(how[i]);
    free(path);
}

static void test_teacher_refuses(void) {
    const char *dir = test_directory();
    EXPECT_RUN("--out %s/t --steps 1", dir);
    EXPECT_RUN("--out %s/v --steps 1 --vocab-size 300", dir);
    EXPECT_RUN("--out %s/s --steps 1 --seq-len 8 --total-batch 64", dir);
    EXPECT_REFUSED(1, "nothing to learn", "--out %s/x --teacher %s/t", dir, dir);
    EXPECT_REFUSED(1, "needs --teacher", "--out %s/x --distill 0.5", dir);
    EXPECT_REFUSED(1, "300 tokens, the model 257", "--out %s/x --distill 1 --teacher %s/v", dir,
                   dir);
    EXPECT_REFUSED(1, "8 positions, rows have 16", "--out %s/x --distill 1 --teacher %s/s", dir,
                   dir);
    EXPECT_REFUSED(1, "--distill", "--out %s/x --distill 1.5 --teacher %s/t", dir, dir);
    EXPECT_REFUSED(1, "--distill-temperature", "--out %s/x --distill 1 --distill-temperature 0 "
                   "--teacher %s/t", dir, dir);
    EXPECT_REFUSED(1, "no-such", "--out %s/x --distill 1 --teacher %s/no-such", dir, dir);
    EXPECT_REFUSED(1, "--device", "--out %s/x --distill 1 --teacher %s/t --dry-run --device h100",
                   dir, dir);
    EXPECT_REFUSED(0, "", "--out %s/x --distill 1 --teacher %s/t --dry-run", dir, dir);
}

#endif
