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
    r.args.B = B, r.args.T = 1024, r.micros = r.ranks = 1;
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

// What a plain step on so many GPUs does not have.
static inline int gpu_test_absent(int part, int ranks) {
    return part == GPU_PART_rows || part == GPU_PART_dropout || part == GPU_PART_teacher ||
        (part == GPU_PART_communication && ranks == 1);
}

// Every part is counted once, a step is their sum, and no GPU exceeds its peak.
static inline void test_gpu_model_parts(void) {
    static const char *const presets[] = {"gpt2", "medium", "xl"};
    for (int d = 0; d < N_GPU_SPECS; d++)
        for (int p = 0; p < 3; p++)
            for (int ranks = 1; ranks <= 8; ranks *= 8) {
                GpuRun r = gpu_test_run(presets[p], 8);
                r.ranks = ranks, r.micros = 3, r.args.zero = ranks > 1;
                const GpuStep s = gpu_step(&gpu_specs[d], &r);
                double sum = 0;
                for (int i = 0; i < N_GPU_PARTS; i++) {
                    EXPECT(gpu_test_absent(i, ranks) == (s.time.part[i] == 0), "%s takes %g s",
                           gpu_part_names[i], s.time.part[i]);
                    sum += s.time.part[i];
                }
                EXPECT_CLOSE(sum, s.seconds, 1e-12 * sum, "the sum of the parts");
                EXPECT(s.mfu > 0 && s.mfu < gpu_specs[d].matmul / gpu_specs[d].peak, "MFU %g",
                       s.mfu);
                const double flops = 24 * 3 * gpt_row_flops(&r.c, r.args.T);
                EXPECT_CLOSE(s.flops, flops, 1e-9 * flops, "FLOPs");
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
    const Growth none = {0}, late = {2, {{1, 0}, {4, 4000}}, GROW_RANDOM, GROW_TOP, 0};
    DropPath d;
    memset(&d, 0, sizeof d);
    d.layers = 4, d.p_max = 0.5, d.steps = 5000, d.ramp_up = 5000, d.depth = DEPTH_UNIFORM;
    gpu_expect(kept, spent, &d, &none, 1);
    EXPECT_CLOSE(kept[5], 0.75, 1e-3, "kept while rates rise");
    EXPECT_CLOSE(spent[5], 0.25, 1e-3, "dropped by the one micro-batch");
    d.ramp_up = 0;
    gpu_expect(kept, spent, &d, &none, 4);
    EXPECT_CLOSE(kept[0], 0.5, 1e-9, "kept");
    EXPECT(spent[0] == 0, "systematic: dropped by all four micro-batches with %g", spent[0]);
    d.sampling = SAMPLING_BERNOULLI;
    gpu_expect(kept, spent, &d, &none, 4);
    EXPECT_CLOSE(spent[0], 0.0625, 1e-9, "dropped by four micro-batches");
    gpu_expect(kept, spent, &d, &late, 4);
    EXPECT_CLOSE(kept[0], 0.5, 1e-9, "the first layer");
    EXPECT_CLOSE(kept[7], 0.2 * 0.5, 1e-3, "a layer that exists for a fifth of the run");
    EXPECT_CLOSE(spent[7], 0.8 + 0.2 * 0.0625, 1e-3, "and has no gradient before");
}

// Each companion adds to its own part, about as much as its arithmetic says, and changes no other.
static inline void test_gpu_model_companions(void) {
    const GpuSpec *g = &gpu_specs[0];
    const GpuRun plain = gpu_test_run("gpt2", 32);
    const GpuStep before = gpu_step(g, &plain);
    const double BT = 32 * 1024, C = 768, V = 50304, ms = 1e-3;
    GpuRun teacher = gpu_test_run("gpt2", 32);
    enum { EMBD, RESID, ATTENTION, HARD, BLUR, HALF, ALIGN, DISTILL, TWINS, CASES };
    const unsigned char half[12] = {1, 1, 1, 1, 1, 1};
    // the least and the most, in ms, that a part gains
    const struct { int part; double least, most; } row[CASES] = {
        [EMBD] = {GPU_PART_dropout, 1e3 * 2 * 8 * BT * C / g->copy, 0.2},
        [RESID] = {GPU_PART_dropout, 1e3 * 48 * 4 * BT * C / g->copy, 2.5},
        // 5e9 elements of noise, forward and backward
        [ATTENTION] = {GPU_PART_dropout, 1e3 * 24 * 32 * 12 * 5e5 * 10 / g->ints, 5},
        // forward 2, backward 5 matmuls of 64 channels
        [HARD] = {GPU_PART_rows, 1e3 * 12 * 7 * 2 * 64 * 32 * 12 * 5e5 / g->matmul, 60},
        [BLUR] = {GPU_PART_rows, 1e3 * 12 * 24 * 32 * 12 * 5e5 / g->copy, 80},
        [HALF] = {GPU_PART_rows, 0.5e3 * 12 * 7 * 2 * 64 * 32 * 12 * 5e5 / g->matmul, 30},
        [ALIGN] = {GPU_PART_rows, 1e3 * 12 * 5 * 2 * 64 * 32 * 12 * 5e5 / g->matmul, 60},
        // a third of a step at least, without its update
        [DISTILL] = {GPU_PART_teacher, 15, 25},
        [TWINS] = {GPU_PART_loss, 1e3 * 10 * BT * V / g->copy, 7}};
    for (int k = 0; k < CASES; k++) {
        GpuRun r = plain;
        if (k == EMBD) r.noise.embd = 1;
        if (k == RESID) r.noise.resid = 1;
        if (k == ATTENTION) r.noise.attn = 1;
        if (k == HARD || k == HALF) r.noise.scores = SCORES_HARD;
        if (k == BLUR) r.noise.scores = SCORES_BLUR;
        if (k == HALF) r.noise.layers = half;
        r.args.align = k == ALIGN, r.args.twins = k == TWINS, r.distills = k == DISTILL;
        if (k == ALIGN || k == DISTILL) r.teacher = &teacher;
        const GpuStep s = gpu_step(g, &r);
        const double more = (s.time.part[row[k].part] - before.time.part[row[k].part]) / ms;
        EXPECT(more > row[k].least && more < row[k].most, "case %d: %g ms, not in %g..%g", k, more,
               row[k].least, row[k].most);
        for (int i = 0; i < N_GPU_PARTS; i++)
            EXPECT(i == row[k].part || (k >= HARD && k <= ALIGN) ||
                   s.time.part[i] == before.time.part[i], "case %d: %s", k, gpu_part_names[i]);
        EXPECT(k < HARD || k > ALIGN || s.time.part[GPU_PART_attention] <
               before.time.part[GPU_PART_attention], "case %d: attention runs, too", k);
        EXPECT((s.flops > before.flops) == !!r.teacher, "case %d: FLOPs", k);
    }
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
    r = trainer_test_run("--out %s/run --steps 8 --layers 2 --grow 1:0,all:50%% --dropout 0.1 "
                         "--attentiondrop blur --consistency 1 --dry-run --device h100", dir);
    EXPECT(r.code == 0 && strstr(r.out.s, ", rows of scores ") && strstr(r.out.s, ", dropout ") &&
           strstr(r.out.s, "growth saves ") && !strstr(r.out.s, "communication"),
           "exit code %d: %s%s", r.code, r.out.s, r.err.s);
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
enum { GPU_TEST_WORKSPACE = 65536, GPU_TEST_SCORES = 4096 };
#else
enum { GPU_TEST_WORKSPACE = GPU_WORKSPACE, GPU_TEST_SCORES = 4096 };
#endif

// The reported memory is what the engine allocates, except gaps between arrays and padding: with
// each way to recompute, and with each companion that needs memory.
static inline void test_gpu_model_memory(void) {
    enum { PLAIN = 6, KEEP = 6, ROWS, ALIGN, TWINS, LORA, MAPS, EVALUATES, CASES };
    static const unsigned char maps[] = {1, 0, 1};
    for (int k = 0; k < CASES; k++) {
        const int recompute = k < PLAIN ? k / 2 : 0, frozen = k < PLAIN ? k % 2 : 0,
            rows = k == EVALUATES || k == MAPS ? 0 : 16 * (3 - frozen);
        GptConfig c = {100, 64, 3, 4, 128};              // all logits fit in one chunk
        c.lora = k == LORA ? 8 : 0, c.lora_targets = k == LORA ? 15 : 0;
        EngineArgs a;
        memset(&a, 0, sizeof a);
        a.B = 16, a.T = 64, a.dtype = DTYPE_BF16, a.recompute = recompute, a.frozen = frozen;
        a.bound.attn_rows = a.bound.mlp_rows = rows, a.bound.rows = 2 * rows, a.dry = 1;
        a.attention_noise = k == KEEP, a.score_rows = k == ROWS, a.align = k == ALIGN;
        a.twins = k == TWINS, a.lora_noise = k == LORA, a.maps = k == MAPS ? maps : NULL;
        a.lora_scale = 1;
        GpuRun r = gpu_test_run("gpt2", 16);
        r.c = c, r.args = a;
        const EngineMemory told = gpu_memory(&r, a.bound);
        EngineMemory got;
        Model *m = engine_cuda()->open(&c, &a);
        engine_cuda()->memory(m, &got);
        engine_cuda()->close(m);
        const double other = GPU_WORKSPACE - GPU_TEST_WORKSPACE +
            (k == ROWS || k == ALIGN || k == MAPS) *
            (gpu_rows_bytes(&r, GPU_ROWS_SCORES) - gpu_rows_bytes(&r, GPU_TEST_SCORES));
        const double is[] = {(double)told.parameters, (double)told.gradients, (double)told.moments,
                             (double)told.activations - other};
        const double want[] = {(double)got.parameters, (double)got.gradients, (double)got.moments,
                               (double)got.activations};
        for (int i = 0; i < 4; i++) {
            char *what = xprintf("case %d: memory %d", k, i);
            // the padding of small tensors is more of them
            EXPECT_CLOSE(is[i], want[i], (k == LORA ? 0.08 : 0.04) * want[i], what);
            free(what);
        }
    }
}
#define GPU_MODEL_MEMORY_TESTS(X) X(gpu_model_memory)
#else
#define GPU_MODEL_MEMORY_TESTS(X)
#endif

#define GPU_MODEL_TESTS(X)                                                                        \
    X(gpu_model_roofline) X(gpu_model_parts) X(gpu_model_drop_path) X(gpu_model_expected)         \
    X(gpu_model_ranks) X(gpu_model_companions) X(gpu_model_dry_run) GPU_MODEL_MEMORY_TESTS(X)

#endif
