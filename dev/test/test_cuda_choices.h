// test_cuda_choices.h: the form and algorithm of a matmul that model_tune chooses by measured time.
// Under the emulator times come from a table of costs (dev/emu/cublasLt.h), so that each outcome
// can be forced. Part of test_cuda.cu.
#ifndef TEST_CUDA_CHOICES_H
#define TEST_CUDA_CHOICES_H

// Microseconds of a matmul with an epilogue, of one without, of a kernel; what algorithms 0 and 1
// take in addition; which of them fail, as a bit mask.
typedef struct { int fused, plain, kernel, first, second, fail; } ChoiceCosts;

static void choice_set(const char *name, int value) {
    char text[16];
    snprintf(text, sizeof text, "%d", value);
    setenv(name, text, 1);
}

static void choice_costs(const ChoiceCosts *c) {
    choice_set("EMU_COST_FUSED", c->fused), choice_set("EMU_COST_PLAIN", c->plain);
    choice_set("EMU_COST_KERNEL", c->kernel), choice_set("EMU_COST_FIRST", c->first);
    choice_set("EMU_COST_SECOND", c->second), choice_set("EMU_ALGORITHMS_FAIL", c->fail);
}

static void choice_costs_end(void) {
    static const char *const names[] = {"FUSED", "PLAIN", "KERNEL", "FIRST", "SECOND"};
    for (const char *name : names) {
        char *variable = xprintf("EMU_COST_%s", name);
        unsetenv(variable);
        free(variable);
    }
    unsetenv("EMU_ALGORITHMS_FAIL");
}

// Each product that has an epilogue (bias, GELU, GELU', bias gradient), under these costs: the form
// (a bit of `fused` each), the algorithm, and its numbers.
static void choice_expect(const ChoiceCosts *costs, const char *epilogues, int fused,
                          int algorithm, const char *what) {
#ifdef CUDA_EMULATED
    const size_t M = 64, N = 64, K = 32;
    const MatmulCase cases[] = {{M, N, K, 0, 0, 0, 0, 1, 0, 0}, {M, N, K, 0, 0, 0, 0, 1, 1, 0},
                                {M, N, K, 0, 1, 0, 0, 0, 2, 0}, {M, N, K, 1, 0, 1, 0, 0, 0, 1}};
    Gpu g = test_gpu(DTYPE_BF16, N);
    choice_costs(costs);
    emulated_epilogues(epilogues);
    g.search = g.measure = 1, g.least_flops = 0, g.told = 1;
    for (int i = 0; i < 4; i++) {
        expect_product(&g, &cases[i], DTYPE_BF16);
        const Matmul *p = &g.matmul[i];
        const int want = fused >> i & 1;
        EXPECT(p->fused == want && p->algorithm.data[1] == (uint64_t)algorithm,
               "%s: product %d: fused %d, algorithm %d", what, i, p->fused,
               (int)p->algorithm.data[1]);
        EXPECT(g.choices.n == i + 1 && g.choices.all[i].fused == want &&
               g.choices.all[i].algorithm[1] == (uint64_t)algorithm, "%s: not recorded", what);
    }
    emulated_epilogues(NULL);
    choice_costs_end();
    test_gpu_close(&g);
#else
    (void)costs, (void)epilogues, (void)fused, (void)algorithm, (void)what;
#endif
}

void test_cuda_choice_fused_wins(void) {
    const ChoiceCosts all = {9, 10, 2, 0, 0, 0}, most = {10, 9, 2, 0, 0, 0};
    choice_expect(&all, NULL, 15, 0, "fused 9, else 10 + 2");
    // kernels count as well: with GELU' they also compute GELU, which the fused form leaves to one
    choice_expect(&most, NULL, 11, 0, "fused 10, else 9 + 2");
}

void test_cuda_choice_unfused_wins(void) {
    const ChoiceCosts costs = {20, 9, 2, 0, 0, 0};
    choice_expect(&costs, NULL, 0, 0, "fused 20, else 9 + 2");
}

void test_cuda_choice_algorithm(void) {
    const ChoiceCosts first = {10, 20, 2, 0, 3, 0}, second = {10, 20, 2, 3, 0, 0};
    choice_expect(&first, NULL, 15, 0, "the first is faster");
    choice_expect(&second, NULL, 15, 1, "the second is faster");
}

#ifdef CUDA_EMULATED
static void choice_none(void *costs) {
    choice_expect((const ChoiceCosts *)costs, NULL, 1, 0, "none");
}
#endif

// An algorithm that fails is skipped, a form without one that runs loses; without any there is no
// product.
void test_cuda_choice_fails(void) {
    const ChoiceCosts first = {10, 20, 2, 0, 5, 1}, second = {10, 20, 2, 5, 0, 2},
        fast = {10, 20, 2, 0, 0, 0};
    choice_expect(&first, NULL, 15, 1, "the first fails");
    choice_expect(&second, NULL, 15, 0, "the second fails");
    choice_expect(&fast, "0", 0, 0, "no fused form");
#ifdef CUDA_EMULATED
    ChoiceCosts all = {10, 20, 2, 0, 0, 3};
    EXPECT_EXIT_EMULATED(1, "cuBLASLt has no product of", choice_none, &all);
#endif
}

// ---- The file ----

static const GptConfig choice_config = {11, 8, 2, 2, 16};                       // V T L NH C

static Model *choice_model(int by_rows, const char *file, const char *before) {
    EngineArgs args;
    TuneArgs tune;
    memset(&args, 0, sizeof args), memset(&tune, 0, sizeof tune);
    args.B = 3, args.T = 8, args.dtype = DTYPE_BF16;
    args.bound = memory_bound_full(2, 0, 3, 1);
    Model *m = model_open(&choice_config, &args);
    m->gpu.least_flops = 0;
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(&choice_config, p); l++) {
            float *w = numbers(p, gpt_param_size(&choice_config, p));
            model_write(m, SLOT_PARAM, p, l, w);
            free(w);
        }
    tune.file = file, tune.before = before, tune.by_rows = by_rows;
    model_tune(m, &tune);
    return m;
}

// The loss of a step that keeps everything; its gradients are zeroed.
static double choice_step(Model *m) {
    int tokens[3 * 8];
    const double one[4] = {1, 1, 1, 1};
    DropPlan plan = drop_plan_new(2, 3);
    drop_plan_keep_all(&plan, one, 0, 3);
    for (int i = 0; i < 3 * 8; i++) tokens[i] = i * i % 11;
    const Batch batch = batch_of(3, 8, tokens, tokens);
    const Pass pass = pass_of(&plan, 1);
    const double loss = model_run(m, &batch, &pass);
    drop_plan_free(&plan);
    return loss;
}

// Every shape of a step is measured before it, and none in it; what a file has is not measured, and
// has the bits of when it was, whatever is faster now.
void test_cuda_choice_kept(void) {
#ifdef CUDA_EMULATED
    const ChoiceCosts fused = {10, 20, 2, 0, 5, 0}, apart = {20, 5, 2, 5, 0, 0};
    char *file = xprintf("%s/matmuls.txt", test_directory());
    for (int by_rows = 0; by_rows < 2; by_rows++) {
        unlink(file);
        choice_costs(&fused);
        Model *m = choice_model(by_rows, file, NULL);
        const int n = m->gpu.n_matmuls, measured = m->gpu.measured;
        EXPECT(measured == n && m->gpu.choices.n == n && n > 12, "%d of %d measured", measured, n);
        for (int p = 0; p < N_PARAMS; p++)
            for (int l = 0; l < gpt_param_layers(&choice_config, p); l++) {
                const size_t size = gpt_param_size(&choice_config, p);
                float *d = (float *)xcalloc(size, sizeof *d), *w = numbers(p, size),
                    *now = (float *)xcalloc(size, sizeof *now);
                model_read(m, SLOT_GRAD, p, l, d), model_read(m, SLOT_PARAM, p, l, now);
                double sum = 0;
                for (size_t i = 0; i < size; i++) sum += fabs((double)d[i]);
                EXPECT(sum == 0, "parameter %d, layer %d has a gradient", p, l);
                EXPECT(!memcmp(w, now, size * sizeof *w), "parameter %d changed", p);
                free(d), free(w), free(now);
            }
        choice_step(m);                                  // the first one of a step
        const uint64_t calls = emu_lt_calls;
        const double loss = choice_step(m);              // and one that accumulates
        const uint64_t each = emu_lt_calls - calls;
        EXPECT(m->gpu.n_matmuls == n && m->gpu.measured == n, "a step measures");
        model_close(m);
        Text before = test_read_file(file);

        choice_costs(&apart);                            // now the other forms would win
        const uint64_t start = emu_lt_calls;
        m = choice_model(by_rows, file, NULL);
        EXPECT(emu_lt_calls - start <= each * 2 * (by_rows ? 3 : 1), "%d matmuls with a file",
               (int)(emu_lt_calls - start));
        EXPECT(m->gpu.measured == 0 && m->gpu.choices.n == n, "measured in spite of the file");
        choice_step(m);
        EXPECT(choice_step(m) == loss, "other bits with the same file");
        EXPECT(m->gpu.n_matmuls == n, "a step has %d shapes, the file %d", m->gpu.n_matmuls, n);
        for (int i = 0; i < m->gpu.n_matmuls && i < n; i++)
            EXPECT(m->gpu.matmul[i].algorithm.data[1] == 0 &&
                   m->gpu.matmul[i].fused == m->gpu.choices.all[i].fused,
                   "matmul %d: another choice: algorithm %d, fused %d", i,
                   (int)m->gpu.matmul[i].algorithm.data[1], m->gpu.matmul[i].fused);
        model_close(m);
        Text after = test_read_file(file);
        EXPECT(before.n == after.n && !memcmp(before.s, after.s, after.n), "the file changed");
        text_free(&before), text_free(&after);

        m = choice_model(by_rows, NULL, NULL);           // and without it they do
        EXPECT(m->gpu.measured == n, "%d of %d measured", m->gpu.measured, n);
        choice_step(m);
        EXPECT(choice_step(m) != loss, "the forms have the same bits: nothing was tested");
        model_close(m);
    }
    choice_costs_end();
    free(file);
#endif
}

// A resumed run with a directory of its own makes the choices of the run before.
void test_cuda_choice_inherited(void) {
#ifdef CUDA_EMULATED
    const ChoiceCosts fused = {10, 20, 2, 0, 5, 0}, apart = {20, 5, 2, 5, 0, 0};
    char *old = xprintf("%s/matmuls.txt", test_directory()),
        *file = xprintf("%s/matmuls.txt", test_directory());
    choice_costs(&fused);
    model_close(choice_model(0, old, NULL));
    choice_costs(&apart);
    Model *m = choice_model(0, file, old);
    EXPECT(m->gpu.measured == 0, "measured in spite of the file before");
    model_close(m);
    Text a = test_read_file(old), b = test_read_file(file);
    EXPECT(a.n == b.n && !memcmp(a.s, b.s, a.n), "not taken over");
    m = choice_model(1, file, NULL);                     // now with other numbers of rows
    EXPECT(m->gpu.measured > 0 && m->gpu.choices.n > m->gpu.measured, "%d of %d measured",
           m->gpu.measured, m->gpu.choices.n);
    model_close(m);
    Text more = test_read_file(file);
    EXPECT(more.n > b.n, "new shapes are not added");
    text_free(&a), text_free(&b), text_free(&more);
    choice_costs_end();
    free(old), free(file);
#endif
}

// A file that is damaged, or of another device, library or dtype, is measured again and replaced.
void test_cuda_choice_damaged(void) {
#ifdef CUDA_EMULATED
    const ChoiceCosts fused = {10, 20, 2, 0, 5, 0}, apart = {20, 5, 2, 5, 0, 0};
    char *file = xprintf("%s/matmuls.txt", test_directory());
    enum { CUT, FLIPPED, EMPTY, MORE, LIBRARY, DEVICE, WAYS };
    for (int way = 0; way < WAYS; way++) {
        unlink(file);
        choice_costs(&fused);
        if (way == LIBRARY) setenv("EMU_LT_VERSION", "120000", 1);
        if (way == DEVICE) setenv("EMU_CAPABILITY", "80", 1);
        model_close(choice_model(0, file, NULL));
        unsetenv("EMU_LT_VERSION"), unsetenv("EMU_CAPABILITY");
        Text t = test_read_file(file);
        if (way == CUT) t.n -= 70;
        if (way == FLIPPED) *strstr(t.s, " fused 1") = '\t';
        if (way == EMPTY) t.n = 0;
        if (way == MORE) text_append(&t, "\n", 1);
        file_replace(file, t.s, t.n);
        text_free(&t);
        choice_costs(&apart);
        Model *m = choice_model(0, file, NULL);
        EXPECT(m->gpu.measured == m->gpu.n_matmuls, "way %d: %d measured", way, m->gpu.measured);
        char *where = tune_where(&m->gpu);
        MatmulChoices c = {NULL, 0, 0};
        t = test_read_file(file);
        EXPECT(!matmul_choices_parse(&c, where, t.s, t.n) && c.n == m->gpu.n_matmuls &&
               !c.all[0].fused, "way %d: not replaced", way);
        matmul_choices_free(&c), text_free(&t), free(where);
        model_close(m);
    }
    // replaced even if nothing is worth a measurement
    Model *m = choice_model(0, NULL, NULL);
    TuneArgs tune;
    memset(&tune, 0, sizeof tune);
    tune.file = file;
    file_replace(file, "x", 1);
    matmul_choices_free(&m->gpu.choices);
    m->gpu.search = 1, m->gpu.measured = 0, m->gpu.least_flops = 1e18;
    model_tune(m, &tune);
    char *where = tune_where(&m->gpu);
    MatmulChoices none = {NULL, 0, 0};
    Text text = test_read_file(file);
    EXPECT(m->gpu.measured == 0 && !matmul_choices_parse(&none, where, text.s, text.n) &&
           none.n == 0, "not replaced: %s", text.s);
    text_free(&text), free(where);
    model_close(m);
    char *nowhere = xprintf("%s/none/matmuls.txt", test_directory());
    m = choice_model(0, nowhere, NULL);                  // a run does not need the file
    EXPECT(m->gpu.measured > 0 && !path_exists(nowhere), "it was written");
    model_close(m);
    choice_costs_end();
    free(file), free(nowhere);
#endif
}

#endif
