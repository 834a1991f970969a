// memory.h: the memory of a training step, compared with an engine that stores everything.
//
// Each row is a process of its own, in which the engine is opened and performs one step, so that
// the system's count of that process's memory is the row's. The processes are forked before
// anything else is measured: children share what their parent holds, but not its threads.
#ifndef MEMORY_H
#define MEMORY_H

#include "../run/signals.h"
#include "kernels.h"
#include "steps.h"
#include <sys/resource.h>

// ---- An engine that stores every tensor of a step: llm.c's act_sizes (Karpathy 2024) ----

//      name       how many  elements per token
#define NAIVE_ACTIVATIONS(X)                                                                     \
    X(encoded,   1, C)                                                                           \
    X(ln1,       L, C) X(ln1_mean,  L, 1) X(ln1_rstd, L, 1) X(qkv,       L, 3 * C)               \
    X(atty,      L, C)     X(preatt,    L, NH * T)   X(att,      L, NH * T)   X(attproj,   L, C) \
    X(residual2, L, C)     X(ln2,       L, C)        X(ln2_mean, L, 1)        X(ln2_rstd,  L, 1) \
    X(fch,       L, 4 * C) X(fch_gelu,  L, 4 * C)    X(fcproj,   L, C)        X(residual3, L, C) \
    X(lnf,       1, C)     X(lnf_mean,  1, 1)        X(lnf_rstd, 1, 1)                           \
    X(logits,    1, V)     X(probs,     1, V)        X(losses,   1, 1)

// Total number of elements for B rows of T tokens. Each tensor has a gradient of the same size.
static size_t naive_activations(const GptConfig *c, int rows, int tokens) {
    const size_t L = (size_t)c->L, C = (size_t)c->C, NH = (size_t)c->NH, V = (size_t)c->V,
        T = (size_t)tokens;
    size_t per_token = 0;
#define X(name, layers, numbers) per_token += (layers) * (numbers);
    NAIVE_ACTIVATIONS(X)
#undef X
    return per_token * (size_t)rows * T;
}

// ---- One step in its own process ----

typedef struct {
    EngineMemory memory;
    double peak;                                         // the most bytes that were resident
    double loss, norm;
} MemoryStep;

static const double memory_rates[] = {0, 0.2};           // systematic, batch unit, constant rates

static double bytes_together(const EngineMemory *m) {
    return (double)m->parameters + (double)m->gradients + (double)m->moments +
        (double)m->activations;
}

// Runs in the child. Weights are made in place: engine_init_weights would add a copy of the largest
// tensor to the peak.
static void memory_step(MemoryStep *out, const Bench *b, const Case *c, double rate) {
    const GptConfig config = gpt_preset(c->preset)->config;
    const DropPath policy = {.layers = config.L, .steps = 1, .p_max = rate};
    EngineArgs args = {.B = c->B, .T = c->T, .dtype = b->dtype};
    struct rusage usage;
    Step s;
    drop_path_bound(&policy, c->B, &args.bound.attn_rows, &args.bound.mlp_rows, &args.bound.rows);
    step_open(&s, b, b->dtype, &config, engine_open(b->engine, &config, &args), c->B, c->T);
    weights_fill(s.m, 0.02, 8);
    drop_plan_sample(&s.plan, &policy, 0, 0, 1, 1, c->B);
    out->loss = engine_forward_backward(b->engine, s.m, s.T, s.tokens, s.targets, &s.plan, 1);
    for (int i = 0; i <= BRANCHES * config.L; i++) s.t[i]++;
    out->norm = b->engine->update(s.m, &s.update);
    b->engine->memory(s.m, &out->memory);
    if (getrusage(RUSAGE_SELF, &usage)) die("getrusage: %s", strerror(errno));
#ifdef __APPLE__
    out->peak = (double)usage.ru_maxrss;                 // in bytes there, in KiB elsewhere
#else
    out->peak = 1024 * (double)usage.ru_maxrss;
#endif
}

static void memory_fork(MemoryStep *out, const Bench *b, const Case *c, double rate) {
    int ends[2];
    fflush(stdout);
    if (pipe(ends)) die("pipe: %s", strerror(errno));
    const pid_t child = fork();
    if (child < 0) die("fork: %s", strerror(errno));
    if (child == 0) {
        memory_step(out, b, c, rate);
        _exit(write(ends[1], out, sizeof *out) == (ssize_t)sizeof *out ? 0 : 1);
    }
    close(ends[1]);
    const ssize_t got = read(ends[0], out, sizeof *out);
    close(ends[0]);
    const int status = child_wait(child);
    if (got != (ssize_t)sizeof *out || status)
        die("the process that did the step of %s with B %d, T %d %s", c->preset, c->B, c->T,
            WIFSIGNALED(status) ? "was ended by a signal: out of memory?" : "failed");
}

// Checks that a step was performed, and that resident memory is what the engine reports, plus only
// the program, its libraries, thread stacks and the tokens.
static void memory_check(const MemoryStep *s, const Case *c, double rate) {
    const double said = bytes_together(&s->memory), most = 1.02 * said + (32 << 20);
    const double fresh = log(gpt_preset(c->preset)->config.V);
    if (!(fabs(s->loss - fresh) < 0.5) || !(s->norm > 0) || !isfinite(s->norm))
        die("memory, %s at rate %g: the step's loss is %g, near ln V = %g expected, its gradient "
            "norm %g", c->preset, rate, s->loss, fresh, s->norm);
    if (!(s->peak <= most) || !(s->memory.activations_used <= s->memory.activations))
        die("memory, %s at rate %g: the engine says %.0f MiB, and %.0f MiB were resident",
            c->preset, rate, said / (1 << 20), s->peak / (1 << 20));
}

// ---- The table ----

static void memory_print(const MemoryStep *s, const Case *c, int dtype, double rate, Text *json) {
    const GptConfig config = gpt_preset(c->preset)->config;
    const EngineMemory *m = &s->memory;
    const double params = (double)gpt_params_count(&config),
        acts = (double)naive_activations(&config, c->B, c->T);
    const double naive = sizeof(real) * (4 * params + acts),
        naive_grads = naive + sizeof(real) * acts, MiB = 1 << 20;
    printf("%5.2f %10.1f %10.1f %10.1f %11.1f %10.1f %9.1f %10.1f %7.1f%% %10.1f %7.1f%%\n", rate,
           (double)m->parameters / MiB, (double)m->gradients / MiB, (double)m->moments / MiB,
           (double)m->activations / MiB, bytes_together(m) / MiB, s->peak / MiB, naive / MiB,
           100 * s->peak / naive, naive_grads / MiB, 100 * s->peak / naive_grads);
    measure_json_open(json);
    measure_json_text(json, "preset", c->preset);
    measure_json_text(json, "dtype", dtype_name[dtype]);
    measure_json(json, "batch", c->B);
    measure_json(json, "seq_len", c->T);
    measure_json(json, "rate", rate);
    measure_json(json, "parameters", (double)m->parameters);
    measure_json(json, "gradients", (double)m->gradients);
    measure_json(json, "moments", (double)m->moments);
    measure_json(json, "activations", (double)m->activations);
    measure_json(json, "activations_used", (double)m->activations_used);
    measure_json(json, "peak_resident", s->peak);
    measure_json(json, "naive", naive);
    measure_json(json, "of_naive", s->peak / naive);
    measure_json(json, "naive_with_gradients", naive_grads);
    measure_json(json, "of_naive_with_gradients", s->peak / naive_grads);
    text_printf(json, "}");
}

// Call while this process is still small and has no threads.
static void bench_memory(Bench *b, const Case *cases, int n) {
    const GptConfig gpt2 = gpt_preset("gpt2")->config;
    // printed by train_gpt2 in llm.c's README (V not yet padded)
    if (naive_activations(&gpt2, 4, 64) != 73323776)
        die("llm.c has 73323776 activations for gpt2 with B 4, T 64, not %zu",
            naive_activations(&gpt2, 4, 64));
    for (int i = 0; i < n; i++) {
        printf("\nmemory of a training step in MiB: %s, B %d, T %d, %s; rates by batch, "
               "systematic\n"
               "%5s %10s %10s %10s %11s %10s %9s %10s %8s %10s %8s\n", cases[i].preset, cases[i].B,
               cases[i].T, dtype_name[b->dtype], "rate", "parameters", "gradients", "moments",
               "activations", "together", "resident",
               "stored all", "of it", "+ d(acts)", "of it");
        for (size_t k = 0; k < sizeof memory_rates / sizeof memory_rates[0]; k++) {
            MemoryStep s;
            memory_fork(&s, b, &cases[i], memory_rates[k]);
            memory_check(&s, &cases[i], memory_rates[k]);
            memory_print(&s, &cases[i], b->dtype, memory_rates[k], &b->memory);
        }
    }
}

#endif
