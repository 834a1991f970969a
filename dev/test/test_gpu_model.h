// test_gpu_model.h: the predicted GPU step (dev/run/gpu_model.h) against a manual roofline, and
// properties that hold whatever the assumptions.
#ifndef TEST_GPU_MODEL_H
#define TEST_GPU_MODEL_H

#include "../run/gpu_model.h"
#include "test.h"
#include "test_cuda.h"
#include "test_trainer.h"

enum { GPU_LAYERS_MAX = 48 };

static inline GpuRun gpu_test_run(const char *preset, int B) {
    GpuRun r;
    memset(&r, 0, sizeof r);
    const GptConfig gpt2 = {50257, 1024, 12, 12, 768}, medium = {50257, 1024, 24, 16, 1024};
    const GptConfig xl = {50257, 1024, 48, 25, 1600};
    r.c = !strcmp(preset, "gpt2") ? gpt2 : !strcmp(preset, "xl") ? xl : medium;
    r.B = B, r.T = 1024, r.micros = r.ranks = 1;
    return r;
}

// The totals of a manual roofline of an H100, in ms, after all known fixes. It ignored what the
// backward pass recomputes, and bias gradients outside matmuls.
static inline void test_gpu_model_roofline(void) {
    static const struct { const char *preset; int B; double part[6], all; } by_hand[] = {
        // layers  head   attention norms  loss  update   all
        {"gpt2",   32, {26.94, 11.69, 12.49, 6.74, 1.6, 1.62}, 62.0},
        {"medium", 32, {91.35, 15.12, 33.13, 17.3, 1.6, 4.62}, 164.2},
        {"xl",     16, {213.2, 11.47, 52.03, 27.2, 0.8, 20.3}, 324.9}};
    static const int part[6] = {GPU_PART_matmuls, GPU_PART_head, GPU_PART_attention,
                                GPU_PART_norms,    GPU_PART_loss, GPU_PART_update};
    for (int i = 0; i < 3; i++) {
        const GpuRun r = gpu_test_run(by_hand[i].preset, by_hand[i].B);
        const GpuStep s = gpu_step(&gpu_specs[0], &r);
        for (int k = 0; k < 6; k++)
            EXPECT_CLOSE(1e3 * s.time.part[part[k]], by_hand[i].part[k],
                         0.08 * by_hand[i].part[k] + 0.8, gpu_part_names[part[k]]);
        const double later = s.time.part[GPU_PART_recompute] + s.time.part[GPU_PART_biases];
        EXPECT_CLOSE(1e3 * (s.seconds - later), by_hand[i].all, 0.03 * by_hand[i].all,
                     by_hand[i].preset);
    }
}

// Every part is counted once, a step is their sum, and no GPU exceeds its peak.
static inline void test_gpu_model_parts(void) {
    static const char *const presets[] = {"gpt2", "medium", "xl"};
    for (int d = 0; d < N_GPU_SPECS; d++)
        for (int p = 0; p < 3; p++)
            for (int ranks = 1; ranks <= 8; ranks *= 8) {
                GpuRun r = gpu_test_run(presets[p], 8);
                r.ranks = ranks, r.micros = 3, r.zero = ranks > 1;
                const GpuStep s = gpu_step(&gpu_specs[d], &r);
                double sum = 0;
                for (int i = 0; i < N_GPU_PARTS; i++) {
                    EXPECT(s.time.part[i] > 0 || (i == GPU_PART_communication && ranks == 1),
                           "%s takes %g s", gpu_part_names[i], s.time.part[i]);
                    sum += s.time.part[i];
                }
                EXPECT_CLOSE(sum, s.seconds, 1e-12 * sum, "the sum of the parts");
                EXPECT(s.mfu > 0 && s.mfu < gpu_specs[d].matmul / gpu_specs[d].peak, "MFU %g",
                       s.mfu);
                EXPECT_CLOSE(s.flops, 24 * 3 * gpt_row_flops(&r.c, r.T), 1e-9 * s.flops, "FLOPs");
            }
}

// A step is faster the more is dropped, and saves about the fraction of FLOPs that is skipped.
static inline void test_gpu_model_drop_path(void) {
    double kept[BRANCHES * GPU_LAYERS_MAX], before = 1e9;
    GpuRun r = gpu_test_run("xl", 16);
    r.micros = 4;
    const GpuStep all = gpu_step(&gpu_specs[0], &r);
    r.kept = kept;
    for (int drop = 0; drop <= 10; drop++) {
        for (int i = 0; i < BRANCHES * r.c.L; i++) kept[i] = 1 - drop / 10.0;
        const GpuStep s = gpu_step(&gpu_specs[0], &r);
        const double saved = 1 - s.seconds / all.seconds, left_out = 1 - s.flops / all.flops;
        EXPECT(s.seconds < before, "at a rate of %g a step takes %g s, before %g", drop / 10.0,
               s.seconds, before);
        EXPECT_CLOSE(saved, left_out, 0.02 + 0.05 * left_out, "what drop path saves");
        before = s.seconds;
    }
}

// The mean over a run whose rates rise from 0 to p: half of p, or what the plans give.
static inline void test_gpu_model_expected(void) {
    double kept[BRANCHES * 4], spent[BRANCHES * 4];
    DropPath d;
    memset(&d, 0, sizeof d);
    d.layers = 4, d.p_max = 0.5, d.steps = 5000, d.ramp_up = 5000, d.depth = DEPTH_UNIFORM;
    gpu_expect(kept, spent, &d, 1);
    EXPECT_CLOSE(kept[5], 0.75, 1e-3, "kept while rates rise");
    EXPECT_CLOSE(spent[5], 0.25, 1e-3, "dropped by the one micro-batch");
    d.ramp_up = 0;
    gpu_expect(kept, spent, &d, 4);
    EXPECT_CLOSE(kept[0], 0.5, 1e-9, "kept");
    EXPECT(spent[0] == 0, "systematic: dropped by all four micro-batches with %g", spent[0]);
    d.sampling = SAMPLING_BERNOULLI;
    gpu_expect(kept, spent, &d, 4);
    EXPECT_CLOSE(spent[0], 0.0625, 1e-9, "dropped by four micro-batches");
}

// One GPU sends nothing; several send each gradient once, hide what they can, and a branch that all
// have dropped is not sent.
static inline void test_gpu_model_ranks(void) {
    double spent[BRANCHES * GPU_LAYERS_MAX] = {0}, kept[BRANCHES * GPU_LAYERS_MAX];
    for (int d = 0; d < N_GPU_SPECS; d++) {
        const GpuSpec *g = &gpu_specs[d];
        GpuRun r = gpu_test_run("gpt2", 8);
        const double bytes = 2.0 * (double)gpt_params_count(&r.c);
        double before = gpu_step(g, &r).seconds;
        EXPECT(gpu_step(g, &r).sent_bytes == 0, "one GPU sends something");
        for (r.ranks = 2; r.ranks <= 8; r.ranks *= 2) {
            const GpuStep s = gpu_step(g, &r);
            const double least = 2.0 * (r.ranks - 1) / r.ranks * bytes / g->link;
            const double exposed = s.time.part[GPU_PART_communication];
            EXPECT_CLOSE(s.sent_bytes, bytes, 1e-6 * bytes, "bytes");
            EXPECT(exposed > 0 && s.overlapped > 0 && exposed + s.overlapped >= least,
                   "%g s behind the backward pass, %g s not, of %g", s.overlapped, exposed, least);
            EXPECT(s.seconds > before, "%d GPUs take %g s, fewer %g", r.ranks, s.seconds, before);
            before = s.seconds;
        }
        r.ranks = 8;
        const double all = gpu_step(g, &r).sent_bytes;
        for (int i = 0; i < BRANCHES * r.c.L; i++) kept[i] = 1;
        spent[3] = 1, kept[3] = 0, r.kept = kept, r.spent = spent;
        EXPECT_CLOSE(all - gpu_step(g, &r).sent_bytes, 2 * gpu_branch_params(&r.c, MLP), 1,
                     "saved");
        spent[3] = 0;
    }
}

// --dry-run --device needs no GPU, in any program, and is refused where it is meaningless.
static inline void test_gpu_model_dry_run(void) {
    const char *dir = test_directory();
    ToolRun r = trainer_test_run("--out %s/run --steps 8 --drop-path 0.2 --dry-run --device 2xh100 "
                                 "--total-batch 1024", dir);
    static const char *const told[] = {"engine:  2xh100, predicted", "ranks:   2 processes", "MFU ",
                                       "drop path saves", "2 GPUs sum ", " of 80 GB are used"};
    for (int i = 0; i < 6; i++)
        EXPECT(strstr(r.out.s, told[i]), "no \"%s\" in %s", told[i], r.out.s);
    EXPECT(r.code == 0, "exit code %d: %s", r.code, r.err.s);
    tool_free(&r);
    EXPECT_REFUSED(1, "--device h1000: h100, a100 or", "--out %s/run --dry-run --device h1000",
                   dir);
    EXPECT_REFUSED(1, "--device 0xh100: h100, a100", "--out %s/run --dry-run --device 0xh100", dir);
    EXPECT_REFUSED(1, "--device only predicts", "--out %s/run --device h100", dir);
    EXPECT_REFUSED(1, "--device predicts bf16 only",
                   "--out %s/run --dry-run --device h100 --dtype fp32", dir);
}

#ifdef WITH_CUDA_ENGINE
#ifdef CUDA_EMULATED                                     // matches the Makefile's flags for the
                                                         // tests' engine
enum { GPU_TEST_WORKSPACE = 65536 };
#else
enum { GPU_TEST_WORKSPACE = GPU_WORKSPACE };
#endif

// The reported memory is what the engine allocates, except gaps between arrays and padding.
static inline void test_gpu_model_memory(void) {
    const GptConfig c = {100, 64, 3, 4, 128};            // all logits fit in one chunk
    for (int k = 0; k < 6; k++) {
        const int recompute = k / 2, frozen = k % 2, rows = 16 * (3 - frozen);
        EngineArgs a;
        memset(&a, 0, sizeof a);
        a.B = 16, a.T = 64, a.dtype = DTYPE_BF16, a.recompute = recompute, a.frozen = frozen;
        a.bound.attn_rows = a.bound.mlp_rows = rows, a.bound.rows = 2 * rows, a.dry = 1;
        GpuRun r = gpu_test_run("gpt2", 16);
        r.c = c, r.T = 64, r.recompute = recompute, r.frozen = frozen;
        const EngineMemory told = gpu_memory(&r, a.bound);
        EngineMemory got;
        Model *m = engine_cuda()->open(&c, &a);
        engine_cuda()->memory(m, &got);
        engine_cuda()->close(m);
        const double other = GPU_WORKSPACE - GPU_TEST_WORKSPACE;
        const double is[] = {(double)told.parameters, (double)told.gradients, (double)told.moments,
                             (double)told.activations - other};
        const double want[] = {(double)got.parameters, (double)got.gradients, (double)got.moments,
                               (double)got.activations};
        for (int i = 0; i < 4; i++) EXPECT_CLOSE(is[i], want[i], 0.04 * want[i], "memory");
    }
}
#define GPU_MODEL_MEMORY_TESTS(X) X(gpu_model_memory)
#else
#define GPU_MODEL_MEMORY_TESTS(X)
#endif

#define GPU_MODEL_TESTS(X)                                                                        \
    X(gpu_model_roofline) X(gpu_model_parts) X(gpu_model_drop_path) X(gpu_model_expected)         \
    X(gpu_model_ranks) X(gpu_model_dry_run) GPU_MODEL_MEMORY_TESTS(X)

#endif
