// console.h: what a person sees of a run: its setup, an estimate of its cost, the step line,
// samples.
#ifndef CONSOLE_H
#define CONSOLE_H

#include "micro.h"
#include "run.h"
#include "sample.h"

// One character per layer for the step's plans: # if both branches ran on every row, . if neither
// ran on any, a or m if only that branch ran (on all rows), otherwise 1 to 9, the tenths kept.
static inline void trainer_kept_map(const Trainer *tr, char *map) {
    const int rows = tr->B * tr->M;
    for (int l = 0; l < tr->config.L; l++) {
        const int attn = tr->kept[BRANCHES * l + ATTN], mlp = tr->kept[BRANCHES * l + MLP];
        const int tenths = 10 * (attn + mlp) / (2 * rows);
        if (attn + mlp == 2 * rows) map[l] = '#';
        else if (attn + mlp == 0) map[l] = '.';
        else if (attn == rows && !mlp) map[l] = 'a';
        else if (mlp == rows && !attn) map[l] = 'm';
        else map[l] = (char)('0' + (tenths < 1 ? 1 : tenths));
    }
    map[tr->config.L] = 0;
}

// The fraction of the full model's FLOPs that the run is expected to execute.
static inline double trainer_expected_compute(const Trainer *tr) {
    const GptConfig whole = trainer_whole(tr);
    const double exits = exits_run_compute(&tr->exits, &tr->growth, &whole, tr->T);
    if (tr->options->drop_path == 0 && !tr->replay.n && !tr->drop.frozen && !tr->growth.n &&
        !tr->lora.rank)
        return 1 + exits;
    return growth_run_compute(&tr->growth, &tr->drop, &whole, tr->T, tr->steps) + exits;
}

// What early exits cost: with a large vocabulary much, since each one runs the head.
static inline void trainer_print_exits(const Trainer *tr) {
    const GptConfig whole = trainer_whole(tr);
    const int most = exits_most(&tr->exits, tr->depth);
    const double one = gpt_head_step_flops(&whole, tr->T) / (3 * gpt_row_flops(&whole, tr->T));
    if (!(tr->exits.scale > 0)) return;
    printf("exits:   at most %d in a step, each %.1f%% of a step's FLOPs without; %+.1f%% over the "
           "run\n", most, 100 * one,
           100 * exits_run_compute(&tr->exits, &tr->growth, &whole, tr->T));
}

// The share of the branches' FLOPs that step t is expected to drop.
static inline double trainer_step_share(const Trainer *tr, int64_t t) {
    DropPath d = tr->drop;
    GptConfig c = tr->config;
    d.layers = c.L = growth_layers(&tr->growth, tr->depth, t);
    return drop_path_expected_share(&d, &c, tr->T, t);
}

// The same of the run, over all its steps.
static inline double trainer_expected_share(const Trainer *tr) {
    const int64_t every = tr->steps / 100000 + 1;
    double sum = 0, n = 0;
    if (tr->options->drop_path == 0) return 0;
    for (int64_t t = every / 2; t < tr->steps; t += every, n++) sum += trainer_step_share(tr, t);
    return sum / n;
}

// Several strong regularizers should each be weaker, and if each token is seen only once there is
// little to regularize.
static inline void trainer_warn_of_many(const Trainer *tr, int drops_much) {
    const TrainOptions *o = tr->options;
    const double dropout = fmax(o->dropout_embd, fmax(o->dropout_attn, o->dropout_resid));
    const double epochs = (double)tr->steps * tr->M * tr->B / (double)tr->train.windows;
    const struct { const char *name; double value, strong; } all[] = {
        {"--drop-path", o->drop_path, drops_much ? 0 : INFINITY}, {"--dropout", dropout, 0.1},
        {"--label-smoothing", o->label_smoothing, 0.1}, {"--weight-decay", o->weight_decay, 0.3}};
    Text names = {NULL, 0, 0};
    int n = 0;
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        if (all[i].value >= all[i].strong - 1e-9)
            text_printf(&names, "%s%s %g", n++ ? ", " : "", all[i].name, all[i].value);
    if (n >= 3)
        warn("%s: each is strong on its own, and together they may underfit; weaken some", names.s);
    if (dropout > 0 && epochs <= 1)
        warn("dropout, though no token is seen twice: that usually raises the loss (arXiv "
             "2505.24788); compare with --dropout 0");
    text_free(&names);
}

static inline void trainer_print_lora(const Trainer *tr) {
    const LoraConfig *c = &tr->lora;
    char count[32];
    metrics_grouped(count, (double)gpt_params_trained(&tr->config, 0));
    printf("trains:  %s parameters: adapters of rank %d, alpha %g, of ", count, c->rank, c->alpha);
    for (int t = 0, n = 0; t < LORA_TARGETS; t++)
        if (c->targets >> t & 1) printf("%s%s", n++ ? "," : "", lora_names[t]);
    printf("%s; base %s\n", c->norms ? ", and the norms" : "", c->base);
}

static inline void trainer_print_start(const Trainer *tr) {
    const GptConfig whole = trainer_whole(tr), *c = &whole;
    const TrainOptions *o = tr->options;
    char count[32], tokens[32];
    const size_t parameters = gpt_params_count(c);
    const double mib = 1048576;
    static const char *const products[] = {"", ", matrix products of bf16", "",
                                           ", matrix products of tf32"};
    EngineMemory memory;
    double usual;
    metrics_grouped(count, (double)parameters);
    metrics_grouped(tokens, (double)tr->train.tokens);
    tr->engine->memory(tr->model, &memory);
    printf("engine:  %s%s; peak %.0f GFLOP/s, %s\n", tr->engine->name,
           products[trainer_dtype(tr->engine, o)], tr->peak_flops / 1e9,
           *o->device ? "by its data sheet" : "measured");
    printf("model:   %s parameters: %d layers, %d heads, %d channels, %d tokens a row, vocabulary "
           "%d\n", count, c->L, c->NH, c->C, tr->T, c->V);
    printf("data:    %s tokens in %d shard%s; evaluation on %lld tokens\n", tokens, tr->train.n,
           tr->train.n == 1 ? "" : "s", (long long)tr->eval_rows * tr->T);
    printf("step:    %d rows x %d tokens x %d micro-batch%s; %lld steps are %.2f epochs\n", tr->B,
           tr->T, tr->M, tr->M == 1 ? "" : "es", (long long)tr->steps, trainer_epochs(tr));
    if (tr->world > 1)
        printf("ranks:   %d processes, each %d micro-batch%s of a step; memory is per process, "
               "speed is for all\n", tr->world, tr->M / tr->world, tr->M == tr->world ? "" : "es");
    printf("memory:  parameters %.0f MiB, gradients %.0f MiB, moments %.0f MiB, activations %.0f "
           "MiB", (double)memory.parameters / mib, (double)memory.gradients / mib,
           (double)memory.moments / mib, (double)memory.activations / mib);
    if (memory.activations < memory.activations_full)
        printf(" of %.0f MiB without drop path", (double)memory.activations_full / mib);
    printf("\n");
    if (tr->drop.frozen) {
        metrics_grouped(count, (double)gpt_params_trained(c, tr->drop.frozen));
        printf("trains:  %s parameters: the last %d layer%s, ln_f and wte\n", count,
               c->L - tr->drop.frozen, c->L - tr->drop.frozen == 1 ? "" : "s");
    }
    if (tr->growth.n) {
        printf("grows:  ");
        for (int i = 0; i < tr->growth.n; i++)
            printf(" %d layer%s from step %lld%s", tr->growth.phase[i].layers,
                   tr->growth.phase[i].layers == 1 ? "" : "s", (long long)tr->growth.phase[i].from,
                   i + 1 < tr->growth.n ? "," : "");
        printf("; expected to execute %.1f%% of the FLOPs\n", 100 * trainer_expected_compute(tr));
    }
    if (tr->lora.rank) trainer_print_lora(tr);
    trainer_print_exits(tr);
    if (tr->teacher.model) {
        tr->engine->memory(tr->teacher.model, &memory);
        metrics_grouped(count, (double)gpt_params_count(&tr->teacher.config));
        printf("teacher: %s parameters: %d layers, %d heads, %d channels; %.0f MiB more\n", count,
               tr->teacher.config.L, tr->teacher.config.NH, tr->teacher.config.C,
               (double)(memory.parameters + memory.activations) / mib);
    }
    if (o->drop_path > 0 || tr->replay.n) {
        printf("drop:    up to %.3g in layer %d, %.3g in layer 1; expected to execute %.1f%% of "
               "the FLOPs\n", o->drop_path, c->L, o->drop_path * drop_path_depth(&tr->drop, 1),
               100 * trainer_expected_compute(tr));
    }
    const double share = trainer_expected_share(tr);
    const int falls = trainer_step_share(tr, tr->steps - 1) < 0.5 * share;
    const char *size = drop_path_excess(share, falls, parameters, c->L, &usual);
    if (tr->lora.rank && o->drop_path > 0.1 + 1e-9)
        warn("--drop-path %g with --lora: adapters are small, and a milder schedule is usual; "
             "0.05, say", o->drop_path);
    else if (size)
        warn("--drop-path %g drops %.0f%% of the branches' work on average over layers and steps, "
             "which is high: no harm is reported for %.2g%% of a %s model\n  hint: %s; the "
             "evidence is thin (dev/DROP_PATH.md), so compare with a run without it", o->drop_path,
             100 * share, 100 * usual, size,
             falls ? "lower it" : "lower it, or let it fall to 0 (--drop-recipe best2026)");
    trainer_warn_of_many(tr, share > 0.8 * usual);
    printf("output:  %s\n", o->out);
    fflush(stdout);
}

// How long a run takes if its steps reach a given fraction of the measured peak: half, 80% or 20%.
static inline void trainer_print_time(const char *least, const char *most, const char *time,
                                      const Text *savers, int n, const char *saved) {
    printf("time:    %s if steps reach half of that peak, without evaluations; %s %s %s\n", time,
           savers->s, n > 1 ? "save" : "saves", saved);
    printf("         uncertain: %s at 80%% of it, %s at 20%%, more on a busy machine; try a run of "
           "a few steps\n", least, most);
}

// For --dry-run of a run that grows: the memory of each phase.
static inline void trainer_print_phases(Trainer *tr) {
    const double mib = 1048576;
    const Growth *g = &tr->growth;
    EngineMemory memory;
    for (int i = growth_phase(g, tr->state.step); i < g->n; i++) {
        const int layers = g->phase[i].layers;
        trainer_close_model(tr);
        tr->config.L = layers;
        trainer_open_model(tr);
        tr->engine->memory(tr->model, &memory);
        if (tr->rank) continue;
        printf("phase:   %d layer%s from step %lld: parameters %.0f MiB, gradients %.0f MiB, "
               "moments %.0f MiB, activations %.0f MiB\n", layers, layers == 1 ? "" : "s",
               (long long)g->phase[i].from, (double)memory.parameters / mib,
               (double)memory.gradients / mib, (double)memory.moments / mib,
               (double)memory.activations / mib);
    }
}

// For --device: what the run would take there, with dropout at its full rates.
static inline void trainer_print_prediction(const Trainer *tr) {
    const TrainOptions *o = tr->options;
    GpuPlan plan;
    memset(&plan, 0, sizeof plan);
    plan.drop = &tr->drop, plan.growth = &tr->growth;
    plan.student = tr->model, plan.teacher = tr->teacher.model;
    plan.micros = tr->M, plan.rows = tr->B, plan.steps = tr->steps;
    plan.passes = tr->attribution.e ? 3 : 1;
    plan.exits = exits_mean(&tr->exits, &tr->growth, tr->depth);
    plan.noise = trainer_noise(tr, tr->steps, 1, 1);
    plan.compared = tr->align_layers, plan.distills = o->distill > 0;
    gpu_model_print(&plan);
}

// For --dry-run: the cost of the run. Steps of large models reach about half of the peak or more,
// those of tiny models less.
static inline void trainer_print_estimate(const Trainer *tr) {
    const double tokens = (double)tr->steps * tr->M * tr->B * tr->T, mib = 1048576, share = 0.5;
    const GptConfig whole = trainer_whole(tr);
    const double rows = trainer_sides(tr) * tokens / tr->T,
        taught = rows * teacher_row_flops(&tr->teacher, tr->T),
        student = (tr->attribution.e ? 9 : 3) * rows * gpt_row_flops(&whole, tr->T),
        full = student + taught;
    const double flops = student * trainer_expected_compute(tr) + taught;
    char grouped[32], time[32], least[32], most[32], saved[32];
    metrics_grouped(grouped, tokens);
    metrics_duration(time, flops / (share * tr->peak_flops));
    metrics_duration(least, flops / (0.8 * tr->peak_flops));
    metrics_duration(most, flops / (0.2 * tr->peak_flops));
    metrics_duration(saved, (full - flops) / (share * tr->peak_flops));
    const double epochs = trainer_epochs(tr);
    if (epochs >= 100)
        warn("%.0f epochs: the model will memorize the data; more than --epochs 4 is unusual",
             epochs);
    const char *const saver[] = {"drop path", "--train-last", "--lora", "--grow"};
    const int frozen = tr->drop.frozen, grows = tr->growth.n, adapts = tr->lora.rank;
    const int drops = tr->options->drop_path > 0 || tr->replay.n;
    const int used[] = {drops || (!frozen && !grows && !adapts), frozen, adapts, grows};
    Text savers = {NULL, 0, 0};
    int n = 0;
    for (int i = 0; i < 4; i++)
        if (used[i]) text_printf(&savers, "%s%s", n++ ? " and " : "", saver[i]);
    printf("flops:   %.3e on %s tokens; %.3e without %s\n", flops, grouped, full, savers.s);
    if (*tr->options->device) trainer_print_prediction(tr);
    else trainer_print_time(least, most, time, &savers, n, saved);
    text_free(&savers);
    const size_t trained = gpt_params_trained(&whole, tr->drop.frozen);
    const size_t weights = adapts ? trained : gpt_params_count(&whole);
    printf("disk:    %.*f MiB a checkpoint\n", adapts ? 1 : 0,
           (double)sizeof(real) / mib * (double)(weights + 2 * trained));
    printf("dry run: nothing has been trained or written\n");
}

static inline void trainer_sample(Trainer *tr) {
    const TrainOptions *o = tr->options;
    const SampleArgs args = {0.8, 0, 1, (uint64_t)o->seed};
    const Text prompt = {o->prompt, strlen(o->prompt), 0};
    Sampler sampler;
    memset(&sampler, 0, sizeof sampler);
    sampler.engine = tr->engine, sampler.model = tr->model, sampler.layers = tr->config.L,
        sampler.V = tr->config.V;
    sampler.T = tr->T, sampler.batch = 1, sampler.scale = tr->state.eval_scale,
        sampler.tied = tr->state.tied;
    sampler.tokenizer = &tr->tokenizer, sampler.args = args, sampler.optional = 1;
    printf("---- sample after step %lld ----\n", (long long)tr->state.step);
    sample_texts(stdout, &sampler, &prompt, 1, 1, o->sample_tokens);
    printf("----\n");
    fflush(stdout);
}

#endif
