// test_cuda_graphs.h: branches launched as graphs have the same bits as their kernels launched
// individually. Part of test_cuda.cu.
#ifndef TEST_CUDA_GRAPHS_H
#define TEST_CUDA_GRAPHS_H

enum { GRAPHS_B = 4, GRAPHS_T = 3, GRAPHS_MICRO = 2 };
static const GptConfig graphs_config = {11, 5, 2, 2, 16};                       // V T L NH C

typedef struct { int steps, unit, branches, recompute, dtype; double p_max; } GraphsCase;

// The rates rise throughout, so that the same rows occur with other scales. Row unit: more keys
// than are cached.
static const GraphsCase graphs_cases[] = {
    {4, UNIT_BATCH, BRANCHES_SEPARATE, RECOMPUTE_GELU, DTYPE_FP32, 0},
    {5, UNIT_BATCH, BRANCHES_SEPARATE, RECOMPUTE_NONE, DTYPE_BF16, 0.4},
    {5, UNIT_BATCH, BRANCHES_TIED, RECOMPUTE_BRANCH, DTYPE_BF16, 0.4},
    {6, UNIT_ROW, BRANCHES_SEPARATE, RECOMPUTE_GELU, DTYPE_FP32, 0.9},
};

static Model *graphs_model(const GraphsCase *k, const DropPath *drop, int graphs) {
    EngineArgs args;
    memset(&args, 0, sizeof args);
    args.B = GRAPHS_B, args.T = GRAPHS_T, args.dtype = k->dtype, args.recompute = k->recompute,
        args.graphs = graphs;
    drop_path_bound(drop, GRAPHS_B, &args.bound.attn_rows, &args.bound.mlp_rows, &args.bound.rows);
    Model *m = model_open(&graphs_config, &args);
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(&graphs_config, p); l++) {
            float *w = numbers(p, gpt_param_size(&graphs_config, p));
            model_write(m, SLOT_PARAM, p, l, w);
            free(w);
        }
    return m;
}

static void graphs_expect_same(Model *a, Model *b, const char *what) {
    static const Slot slots[] = {SLOT_PARAM, SLOT_M, SLOT_V};
    for (Slot slot : slots)
        for (int p = 0; p < N_PARAMS; p++)
            for (int l = 0; l < gpt_param_layers(&graphs_config, p); l++) {
                const size_t n = gpt_param_size(&graphs_config, p);
                float *x = (float *)xcalloc(n, sizeof *x), *y = (float *)xcalloc(n, sizeof *y);
                model_read(a, slot, p, l, x), model_read(b, slot, p, l, y);
                EXPECT(!memcmp(x, y, n * sizeof *x),
                       "%s: slot %d, parameter %d of layer %d: other bits", what, slot, p, l);
                free(x), free(y);
            }
}

// Kernel launches so far, without those of graphs. Only the emulator counts them.
static uint64_t graphs_launches(void) {
#ifdef CUDA_EMULATED
    return emu_launches;
#else
    return 0;
#endif
}

// One step of both models, then an evaluation with fewer rows. launches: of each model's gradients.
static void graphs_step(Model *const model[2], const GraphsCase *k, const DropPath *drop,
                        DropPlan *plan, int step, uint64_t launches[2], const char *what) {
    const int64_t t[5] = {step + 1, step + 1, step + 1, step + 1, step + 1};
    const UpdateArgs update = {1e-2, 0.9, 0.95, 1e-2, 0.1, 1, t, 0, 0};
    const double one[4] = {1, 1, 1, 1};
    int tokens[GRAPHS_B * GRAPHS_T];
    double got[2];
    for (int micro = 0; micro < GRAPHS_MICRO; micro++) {
        for (int i = 0; i < GRAPHS_B * GRAPHS_T; i++)
            tokens[i] = (i * i + 5 * step + micro) % graphs_config.V;
        drop_plan_sample(plan, drop, step, micro, GRAPHS_MICRO, 1, GRAPHS_B);
        for (int i = 0; i < 2; i++) {
            const uint64_t before = graphs_launches();
            const Batch batch = batch_of(plan->batch, GRAPHS_T, tokens, tokens);
            const Pass pass = pass_of(plan, 0.5);
            got[i] = model_run(model[i], &batch, &pass);
            launches[i] += graphs_launches() - before;
        }
        EXPECT(got[0] == got[1], "%s, step %d: a loss of %.9g and with graphs %.9g", what, step,
               got[0], got[1]);
    }
    for (int i = 0; i < 2; i++) got[i] = model_update(model[i], &update);
    EXPECT(got[0] == got[1], "%s, step %d: a norm of %.9g and with graphs %.9g", what, step, got[0],
           got[1]);
    drop_plan_keep_all(plan, one, k->branches == BRANCHES_TIED, GRAPHS_B - 1);
    const Batch batch = batch_of(plan->batch, GRAPHS_T - 1, tokens, tokens);
    const Pass pass = pass_of(plan, 0);
    for (int i = 0; i < 2; i++) got[i] = model_run(model[i], &batch, &pass);
    EXPECT(got[0] == got[1], "%s, step %d: evaluation %.9g and with graphs %.9g", what, step,
           got[0], got[1]);
}

void test_cuda_graphs(void) {
    for (const GraphsCase &k : graphs_cases) {
        DropPath drop;
        memset(&drop, 0, sizeof drop);
        drop.seed = 2, drop.layers = graphs_config.L, drop.steps = k.steps, drop.p_max = k.p_max,
            drop.ramp_from = 0.5;
        drop.ramp_up = k.steps, drop.unit = k.unit, drop.branches = k.branches;
        DropPlan plan = drop_plan_new(graphs_config.L, GRAPHS_B);
        Model *const model[2] = {graphs_model(&k, &drop, 0), graphs_model(&k, &drop, 1)};
        char *what = xprintf("unit %d, branches %d, recompute %d, dtype %d", k.unit, k.branches,
                             k.recompute, k.dtype);
        uint64_t launches[2] = {0, 0};
        for (int step = 0; step < k.steps; step++)
            graphs_step(model, &k, &drop, &plan, step, launches, what);
        graphs_expect_same(model[0], model[1], what);
        int recorded = 0;
        for (int i = 0; i < 2 * BRANCHES * graphs_config.L * GRAPHS; i++)
            recorded += model[1]->graph[i].exec != NULL;
        if (k.unit == UNIT_BATCH) EXPECT(recorded > 0, "%s: no graph", what);
#ifdef CUDA_EMULATED
        if (k.p_max == 0)
            EXPECT(launches[1] < 0.8 * launches[0], "%llu launches, %llu without graphs",
                                 (unsigned long long)launches[1], (unsigned long long)launches[0]);
#endif
        EXPECT(!model[0]->graph, "%s: graphs that nobody asked for", what);
        drop_plan_free(&plan);
        model_close(model[0]), model_close(model[1]);
        free(what);
    }
}

#endif
