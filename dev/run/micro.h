// micro.h: the micro-batches of a step: their data, their plans, the engine's arguments, and their
// cost. All of it is a function of (seed, step, micro-batch): any rank can compute it for any
// other.
#ifndef MICRO_H
#define MICRO_H

#include "run.h"

// The sample in row b of micro-batch m of the next step, counted from those consumed.
static inline int64_t trainer_row_sample(const Trainer *tr, int m, int b) {
    return tr->state.consumed + (int64_t)m * tr->B + b;
}

// Reads micro-batch m of the step, which must belong to this rank; twins are the same rows again.
static inline void trainer_read_batch(Trainer *tr, int m) {
    const size_t BT = (size_t)tr->B * (size_t)tr->T;
    for (int b = 0; b < tr->B; b++)
        shards_read_sample(&tr->train, (uint64_t)tr->options->seed, trainer_row_sample(tr, m, b),
                           tr->tokens + b * tr->T, tr->targets + b * tr->T);
    if (trainer_sides(tr) == 1) return;
    memcpy(tr->tokens + BT, tr->tokens, BT * sizeof(int));
    memcpy(tr->targets + BT, tr->targets, BT * sizeof(int));
}

// Ranks the rows of micro-batch m of any rank by their difficulty, for --drop-adapt.
static inline void trainer_rank_rows(Trainer *tr, int m) {
    Difficulty *d = &tr->difficulty;
    if (!d->surprisal) return;
    for (int b = 0; b < tr->B; b++) {
        shards_read_sample(&tr->train, (uint64_t)tr->options->seed, trainer_row_sample(tr, m, b),
                           d->tokens, d->tokens + tr->T);
        d->hard[b] = difficulty_of(d, d->tokens + tr->T, tr->T);
    }
    difficulty_order(d, tr->B);
}

// Computes the plan of micro-batch m of any rank: a function of (seed, step, m), with --drop-adapt
// also of its tokens.
static inline void trainer_plan(Trainer *tr, int64_t t, int m) {
    trainer_rank_rows(tr, m);
    if (!tr->replay.n) drop_plan_sample(&tr->plan, &tr->drop, t, m, tr->M, tr->world, tr->B);
    else {
        const char *error = drop_plan_read(&tr->plan, &tr->drop, t, tr->replay.record[t].plan, m,
                                           tr->B);
        // trainer_open_replay has validated them all
        CHECK(!error, "%s", error);
    }
    for (int i = 0; i < BRANCHES * tr->config.L; i++)
        tr->plan.branch[i].scale *= growth_scale(&tr->growth, i / BRANCHES, t);
}

// Whether the training loss is more than -log p of the targets.
static inline int trainer_objective_is_more(const Trainer *tr) {
    return tr->objective.smoothing != 0 || tr->objective.distill != 0 ||
        tr->objective.consistency != 0 || tr->objective.align || tr->exits.scale > 0 ||
        tr->attribution.e;
}

// The engine's arguments for micro-batch m of step t, which must belong to this rank: the input
// (valid until the next is read),
static inline Batch trainer_batch(Trainer *tr, int m) {
    trainer_read_batch(tr, m);
    return batch_of(trainer_sides(tr) * tr->B, tr->T, tr->tokens, tr->targets);
}

// its noise, with dropout and AttentionDrop at these shares of their rates,
static inline Noise trainer_noise(const Trainer *tr, int64_t t, double dropout, double edits) {
    const TrainOptions *o = tr->options;
    Noise z = {(uint64_t)o->seed, t, 0, noise_rate_of(dropout * o->dropout_embd),
               noise_rate_of(dropout * o->dropout_attn), noise_rate_of(dropout * o->dropout_resid),
               o->lora ? noise_rate_of(o->lora_dropout) : 0};
    z.twins = trainer_sides(tr) > 1 ? (uint32_t)tr->B : 0;
    attention_drop_at(&z, o, tr->attention_layers, edits, t);
    return z;
}

// and the pass; the step's last micro-batch also reduces the gradients over the ranks. A teacher
// reads the micro-batch here.
static inline Pass trainer_pass(Trainer *tr, int64_t t, int m) {
    const TrainOptions *o = tr->options;
    trainer_plan(tr, t, m);
    if (trainer_sides(tr) > 1) drop_plan_twins(&tr->twins, &tr->plan);
    Pass pass = pass_of(trainer_sides(tr) > 1 ? &tr->twins : &tr->plan, 1.0 / tr->M);
    const Noise z = tr->noise = trainer_noise(tr, t, ramp_at(&tr->dropout, t),
                                              ramp_at(&tr->attention_warm, t));
    tr->noise.first_row = (uint32_t)m * (uint32_t)tr->B;
    if (z.embd || z.attn || z.resid || z.lora || z.scores) pass.noise = &tr->noise;
    if (tr->exits.scale > 0) {
        exits_weights(tr->exit_weight, &tr->exits, tr->config.L, t);
        tr->objective.exit = tr->exit_weight;
    }
    tr->align.gamma = o->align_gamma * pow(o->align_decay, floor((double)tr->state.consumed /
                                                                 (double)tr->train.windows));
    if (trainer_objective_is_more(tr)) pass.objective = &tr->objective;
    if (tr->teacher.model) {
        const Batch batch = batch_of(trainer_sides(tr) * tr->B, tr->T, tr->tokens, tr->targets);
        teacher_run(&tr->teacher, tr->engine, &batch);
    }
    if (tr->world > 1 && m + tr->world >= tr->M) pass.reduce = tr->reduce;
    return pass;
}

// Runs a micro-batch, whose pass trainer_pass has made: part receives the terms of its loss, which
// is returned.
static inline double trainer_run_micro(Trainer *tr, const Batch *batch, const Pass *pass,
                                       double part[N_PARTS]) {
    Attribution *a = &tr->attribution;
    const size_t BT = a->rows * a->T;
    if (!a->e) {
        const double loss = tr->engine->run(tr->model, batch, pass);
        tr->engine->parts(tr->model, part);
        return loss;
    }
    if (tr->token_scores) {                              // a target of the student's embeddings
        Pass look = *pass;
        look.weight = 0, look.reduce = NULL;
        const Watch watch = {a, a->want, attribution_see, NULL};
        const Batch tokens = batch_of(batch->rows, batch->T, batch->tokens, NULL);
        look.watch = &watch;
        tr->engine->run(tr->model, &tokens, &look);
        scores_target(tr->align_target, tr->token_scores, batch->tokens, a->e, BT, a->C);
    } else memcpy(tr->align_target, tr->teacher.own.a, BT * sizeof(double));
    const double loss = attribution_train(a, tr->engine, tr->model, batch, pass, tr->align_target,
                                          tr->align.gamma);
    memcpy(part, a->part, sizeof a->part);
    part[PART_ALIGN] = a->distance, part[PART_COSINE] = a->cosine,
        part[PART_COMPARED] = a->compared;
    return loss;
}

// Whether branch i (indexed as UpdateArgs.t) belongs to a frozen layer.
static inline int trainer_is_frozen(const Trainer *tr, int i) {
    return i < BRANCHES * tr->drop.frozen;
}

// What the step's plans keep, over all ranks: known before anything runs.
static inline void trainer_plan_step(Trainer *tr, int64_t t) {
    const int branches = BRANCHES * tr->config.L;
    memset(tr->kept, 0, (size_t)branches * sizeof *tr->kept);
    tr->plan_text.n = 0;
    for (int m = 0; m < tr->M; m++) {
        trainer_plan(tr, t, m);
        if (tr->plan_text.n) text_append(&tr->plan_text, " ", 1);
        drop_plan_write(&tr->plan_text, &tr->plan, tr->drop.unit);
        for (int i = 0; i < branches; i++) tr->kept[i] += tr->plan.branch[i].n;
    }
    for (int i = 0; i <= branches; i++)
        tr->reduce[i] = i == branches || (tr->kept[i] > 0 && !trainer_is_frozen(tr, i));
}

// The AdamW step count of every branch for this update: one more than before, or 0 (untouched) for
// branches that are frozen or were dropped in every micro-batch.
static inline void trainer_count_updates(Trainer *tr) {
    const int branches = BRANCHES * tr->config.L;
    for (int i = 0; i <= branches; i++) {
        const int dropped = tr->options->drop_adam == ADAM_SKIP && i < branches && tr->kept[i] == 0;
        const int skipped = dropped || (i < branches && trainer_is_frozen(tr, i));
        tr->adamw_steps[i] = skipped ? 0 : tr->state.adamw_steps[i] + 1;
    }
}

// Records what the step's plans have cost and kept.
static inline void trainer_account(Trainer *tr, Metrics *r) {
    const GptConfig *c = &tr->config, whole = trainer_whole(tr);
    if (tr->growth.n) r->layers = c->L;
    const double rows = (double)tr->B * tr->M, sides = trainer_sides(tr);
    const int heads = 1 + exits_count(&tr->exits, c->L, tr->state.step);
    double flops = heads * rows * gpt_head_step_flops(c, tr->T), kept[BRANCHES] = {0, 0};
    for (int i = 0; i < BRANCHES * c->L; i++) {
        flops += tr->kept[i] * gpt_branch_step_flops(c, i % BRANCHES, tr->T, i / BRANCHES,
                                                     tr->drop.frozen);
        kept[i % BRANCHES] += tr->kept[i];
    }
    const double taught = sides * rows * teacher_row_flops(&tr->teacher, tr->T);
    const double runs = tr->attribution.e && tr->align.gamma != 0 ? 3 : sides;
    r->flops = runs * flops + taught;
    r->flops_fraction = r->flops / (3 * runs * rows * gpt_row_flops(&whole, tr->T) + taught);
    r->kept_attn = kept[ATTN] / (rows * c->L);
    r->kept_mlp = kept[MLP] / (rows * c->L);
    r->drop_p = fmax(drop_path_rate(&tr->drop, c->L, ATTN, tr->state.step),
                     drop_path_rate(&tr->drop, c->L, MLP, tr->state.step));
    r->plan = tr->plan_text.s;
}

#endif
