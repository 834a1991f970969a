// trainer.h: the training loop, written once against engine.h. `main` is one call:
// trainer_main(argc, argv, engine).
//
//   run.h         opens a run from its options: data, model, schedules, where it starts or resumes
//   micro.h       the micro-batches of a step: rows, drop-path plans, passes
//   evaluation.h  the validation loss
//   bad_steps.h   steps that are not finite
//   output.h      config.txt and metrics.jsonl; checkpoint.h: the checkpoints
//   console.h     what a person sees
//
// Several processes (comm.h) run the same loop: rank r of W runs micro-batches r, r + W, ... of
// each step and every W-th batch of an evaluation. Everything that decisions depend on has the same
// bits on all ranks; only rank 0 prints and writes.
#ifndef TRAINER_H
#define TRAINER_H

#include "bad_steps.h"
#include "console.h"
#include "evaluation.h"
#include "micro.h"
#include "output.h"
#include "run.h"
#include "signals.h"

// ---- One optimizer step ----

// Takes the step, or skips it: then only the counts change. r->loss is known; loss: this rank's
// part of it.
static inline void trainer_update(Trainer *tr, Metrics *r, double loss) {
    const TrainOptions *o = tr->options;
    CheckpointState *s = &tr->state;
    const double limit = spikes_limit(&s->norms, o->skip_norm_zscore);
    const int finite = isfinite(r->loss), spike = finite &&
        r->loss > spikes_limit(&s->losses, o->skip_loss_zscore);
    trainer_count_updates(tr);
    UpdateArgs args = {r->lr, o->beta1, o->beta2, o->eps, o->weight_decay, o->grad_clip,
                       tr->adamw_steps, 0,
                       spike || !finite ? -1 : isfinite(limit) ? limit : 0};
    r->grad_norm = tr->engine->update(tr->model, &args);
    const int taken = update_is_taken(&args, r->grad_norm);
    if (o->skip_loss_zscore > 0) r->loss_z = spikes_z(&s->losses, r->loss);
    if (o->skip_norm_zscore > 0) r->norm_z = spikes_z(&s->norms, r->grad_norm);
    if (!finite || !update_is_finite(&args, r->grad_norm)) trainer_count_bad_step(tr, r, loss);
    else {
        s->bad_steps = 0;
        if (!taken) r->skipped = spike ? SKIPPED_LOSS : SKIPPED_NORM, trainer_warn_of_spike(tr, r);
    }
    for (int i = 0; taken && i <= BRANCHES * tr->config.L; i++)
        if (tr->adamw_steps[i]) s->adamw_steps[i] = tr->adamw_steps[i];
    args.discard = 1;
    // deferred: until here, the gradients of a skipped step can be inspected
    if (!taken) tr->engine->update(tr->model, &args);
    spikes_add(&s->losses, r->loss);
    spikes_add(&s->norms, r->grad_norm);
}

// Step t = state.step: this rank's micro-batches of M forward and backward, then one update.
static inline Metrics trainer_step(Trainer *tr) {
    const int64_t t = tr->state.step;
    Metrics r = metrics_new();
    double loss = 0, sum[3 + N_PARTS] = {0}, *parts = sum + 3;
    trainer_plan_step(tr, t);
    tr->bad_micro = -1;
    memset(tr->micro, 0, (size_t)tr->M * sizeof *tr->micro);
    for (int m = tr->rank; m < tr->M; m += tr->world) {
        const Batch batch = trainer_batch(tr, m);
        const Pass pass = trainer_pass(tr, t, m);
        double part[N_PARTS];
        tr->micro[m] = trainer_run_micro(tr, &batch, &pass, part);
        loss += tr->micro[m] / tr->M;
        for (int k = 0; k < N_PARTS; k++) parts[k] += part[k] / tr->M;
        if (!isfinite(loss) && tr->bad_micro < 0) tr->bad_micro = m;
    }
    sum[0] = loss, sum[1] = signals_stop ? 1.0 : 0.0, sum[2] = signals_take_save() ? 1.0 : 0.0;
    comm_sum(tr->comm, sum, 3 + N_PARTS);
    r.loss = sum[0], tr->stop = sum[1] > 0, tr->save_now = sum[2] > 0;
    if (trainer_objective_is_more(tr)) r.nll = parts[PART_NLL];
    if (exits_count(&tr->exits, tr->config.L, t))
        r.exit_loss = parts[PART_EXITS] / (1 - tr->exit_weight[tr->config.L - 1]);
    if (tr->objective.distill != 0) r.distill = parts[PART_DISTILL];
    if (tr->options->align != ALIGN_NONE) r.align_loss = parts[PART_ALIGN];
    if (tr->options->align != ALIGN_NONE && parts[PART_COMPARED] > 0)
        r.align_cos = parts[PART_COSINE] / parts[PART_COMPARED];
    if (tr->objective.consistency != 0) r.consistency = parts[PART_CONSISTENCY];
    if (tr->options->record_micro) {
        // each micro-batch's loss is on one rank, the others have 0
        comm_sum(tr->comm, tr->micro, (size_t)tr->M);
        r.micro = tr->micro, r.micros = tr->M;
    }
    r.lr = schedule_lr(&tr->schedule, t);
    trainer_update(tr, &r, loss);
    trainer_account(tr, &r);
    tr->state.step++;
    tr->state.consumed += (int64_t)tr->M * tr->B;
    tr->state.tokens += (int64_t)tr->M * tr->B * tr->T;
    r.step = (double)tr->state.step;
    r.tokens = (double)tr->state.tokens;
    return r;
}

// ---- The loop ----

// For compare: runs in several processes take turns, so that disturbances of the machine affect
// them alike. A run waits for a byte on `go`, works for about `seconds`, and writes a byte to
// `done`. `until` starts at 0. `peak` is memory shared by the runs, or NULL: the first of them
// stores the measured peak in it, so that mfu means the same in all.
typedef struct { const char *label; int go, done; double seconds, until, *peak; } TrainerTurn;

// Between two steps: ends the turn if its time is up, and waits for the next one.
static inline void trainer_take_turn(TrainerTurn *turn) {
    char byte = 0;
    if (!turn || clock_seconds() < turn->until) return;
    const int first = turn->until == 0;
    // the other end is closed
    if ((!first && write(turn->done, &byte, 1) != 1) || read(turn->go, &byte, 1) != 1) exit(1);
    turn->until = clock_seconds() + turn->seconds;
}

// What rank 0 does after a step: metrics, the console, a sample.
static inline void trainer_report(Trainer *tr, Metrics *r, const TrainerTurn *turn, int first,
                                  double seconds_left) {
    const TrainOptions *o = tr->options;
    const int64_t step = tr->state.step;
    char *map = (char *)xcalloc((size_t)tr->config.L + 1, 1);
    r->peak_bytes = trainer_peak_bytes();
    trainer_record(tr, r);
    trainer_kept_map(tr, map);
    if (trainer_due(o->log_every, step, tr->steps) || first || !isnan(r->val_loss))
        metrics_print(r, turn ? turn->label : "", (double)tr->steps, map, seconds_left);
    if (o->sample_every && trainer_due(o->sample_every, step, tr->steps)) trainer_sample(tr);
    if (ferror(stdout) && !tr->console_lost++)
        warn("standard output cannot be written: the run continues, recorded in %s/metrics.jsonl",
             o->out);
    free(map);
}

// Reports a failed save: a warning if there will be another one. ends: as in trainer_watch.
static inline void trainer_save_failed(const Trainer *tr, const char *error, int last, int ends) {
    const char *kept = tr->whole ? tr->whole : "none yet";
    if (ends) message("error", "step %lld: %s", (long long)tr->state.step, error);
    else if (last)
        message("error", "step %lld is not saved: %s\n  hint: --resume continues from the last "
                "complete checkpoint: %s", (long long)tr->state.step, error, kept);
    else
        warn("step %lld is not saved: %s\n  hint: the run continues to the next save; the last "
             "complete checkpoint: %s", (long long)tr->state.step, error, kept);
}

// Rank 0 writes a checkpoint; if each rank holds a share of the moments, all take part. If it
// cannot be written and the run is ending, all ranks exit with code 1. Weights or moments that are
// not finite, which a huge learning rate can produce from finite gradients, end the run with code
// 3, since no further step can repair them.
static inline void trainer_save(Trainer *tr) {
    const TrainOptions *o = tr->options;
    const int last = o->on_save_error == ON_ERROR_STOP || tr->stop || tr->state.step == tr->steps;
    char *error = NULL, *bad = NULL, *lost;
    int ends = 0;
    if (tr->rank == 0) error = trainer_watch(tr, &ends);
    // metrics are synced before each checkpoint
    if (tr->rank == 0 && !error) error = metrics_file_sync(&tr->metrics);
    if (tr->rank == 0 && !error)
        error = checkpoint_try_save(o->out, tr->engine, tr->model, &tr->config, &tr->state, &bad);
    else if (tr->rank == 0 || o->zero)
        checkpoint_attend(tr->engine, tr->model, &tr->config, tr->drop.frozen, &bad);
    // it may have happened in the meantime
    if (tr->rank == 0 && !ends && (lost = trainer_watch(tr, &ends)) != NULL) {
        free(error);
        error = lost;
    }
    int outcome[3] = {error != NULL, bad != NULL, ends};
    comm_broadcast(tr->comm, outcome, sizeof outcome);
    if (outcome[1])
        trainer_give_up(tr,
                        xprintf("step %lld has made numbers that are not finite, first of %s, so "
                                "it is not saved",
                                    (long long)tr->state.step, bad ? bad : ""));
    if (error) trainer_save_failed(tr, error, last, ends);
    else if (tr->rank == 0) {
        free(tr->whole);
        tr->whole = checkpoint_path(o->out, tr->state.step);
        trainer_prune(tr);
    }
    free(error), free(bad);
    if (!outcome[0] || !(last || outcome[2])) return;
    comm_close(tr->comm);
    exit(1);
}

// The final message of a run that a signal has ended.
static inline void trainer_stopped(const Trainer *tr) {
    if (tr->rank == 0)
        printf("stopped by %s after step %lld of %lld: %s is saved; --resume continues\n",
               signals_name(), (long long)tr->state.step, (long long)tr->steps, tr->whole);
}

// Executes the options, from the current step to the last. config_text is these options as
// config.txt; program is how a user starts it; turn is NULL for a run that has the machine to
// itself, comm for a single process.
static inline void trainer_run(const char *program, const Engine *engine, const TrainOptions *o,
                               const char *config_text, TrainerTurn *turn, Comm *comm) {
    Trainer trainer, *tr = &trainer;
    Metrics again;
    signals_begin();
    if (*o->device && !o->dry_run)
        die("--device only predicts\n  hint: add --dry-run, or omit --device");
    if (*o->device) engine = gpu_model_engine(o->device);
    if (!o->dry_run) trainer_selfcheck(engine, o, comm);
    trainer_open(tr, engine, o, config_text, comm);
    tr->program = program;
    if (o->dry_run) {
        tr->peak_flops = engine->peak(tr->model, 0.2) * (*o->device ? tr->world : 1);
        comm_sum(comm, &tr->peak_flops, 1);
        if (tr->rank == 0) trainer_print_start(tr);
        if (tr->growth.n) trainer_print_phases(tr);
        if (tr->rank == 0) trainer_print_estimate(tr);
        trainer_close(tr);
        return;
    }
    if (!turn) signals_catch();                          // with turns, compare handles them
    const int owed = trainer_catch_up(tr, &again);
    if (tr->state.step >= tr->steps) {
        if (owed && tr->rank == 0) trainer_open_metrics(tr, tr->state.step, &again);
        metrics_free(&again);
        if (tr->rank == 0)
            printf("%s has already completed all %lld steps\n", o->out, (long long)tr->steps);
        trainer_close(tr);
        return;
    }
    if (*o->drop_replay && o->drop_path == 0 && tr->rank == 0)
        warn("--drop-replay without --drop-path: branches drop as recorded, with scale 1");
    if (!tr->has_val && tr->rank == 0) warn("no --val: the run will not be evaluated");
    if (o->sample_every && !tr->has_tokenizer)
        die("--sample-every needs a tokenizer\n  hint: --tokenizer FILE, see data/README.md");
    if (o->sample_every && *o->prompt && tr->tokenizer.decode_only)
        die("--prompt: this tokenizer does not split text as GPT-2's does\n  hint: --sample-every "
            "without --prompt");
    if (turn && turn->peak && *turn->peak > 0) tr->peak_flops = *turn->peak;
    else {
        tr->peak_flops = engine->peak(tr->model, 0.2);
        comm_sum(comm, &tr->peak_flops, 1);
    }
    if (turn && turn->peak) *turn->peak = tr->peak_flops;
    if (tr->rank == 0) {
        trainer_print_start(tr);
        trainer_open_metrics(tr, tr->state.step, &again);
    }
    metrics_free(&again);
    trainer_tune(tr);
    double busy = 0;
    for (int64_t first = tr->state.step; tr->state.step < tr->steps && !tr->stop;) {
        trainer_take_turn(turn);
        if (trainer_growth_due(tr)) trainer_grow(tr), trainer_tune(tr);
        const double start = clock_seconds();
        Metrics r = trainer_step(tr);
        const double seconds = clock_seconds() - start;
        const int64_t step = tr->state.step;
        busy += seconds;
        trainer_eval_scale(tr);
        r.ms = 1000 * seconds;
        r.tok_per_s = (double)tr->M * tr->B * tr->T / seconds;
        r.mfu = r.flops / seconds / tr->peak_flops;
        if (tr->has_val && !tr->stop && trainer_due(o->eval_every, step, tr->steps))
            trainer_evaluate(tr, &r);
        if (tr->rank == 0)
            trainer_report(tr, &r, turn, step == first + 1,
                           busy / (double)(step - first) * (double)(tr->steps - step));
        free((void *)(uintptr_t)r.depth);
        trainer_check_bad_steps(tr);
        if (trainer_due(tr->state.bad_steps ? 0 : o->save_every, step, tr->steps) || tr->stop ||
            tr->save_now || trainer_growth_due(tr))
            trainer_save(tr);
    }
    if (tr->stop) trainer_stopped(tr);
    trainer_close(tr);
}

// The other processes of this run, if a launcher started several. NULL: a single process.
static inline Comm *trainer_ranks(const TrainOptions *o) {
    CommLaunch launch;
    char *error = comm_launch(&launch, o->rendezvous, o->job_token, comm_look, NULL);
    if (error) die("%s", error);
    return launch.world > 1 ? comm_open(&launch, &comm_times) : NULL;
}

// The whole program: parses the options and trains. Returns the exit code.
static inline int trainer_main(int argc, char **argv, const Engine *engine) {
    TrainOptions o;
    Options options;
    Text config = {NULL, 0, 0};
    options_init(&options, "train_gpt --train GLOB [--val GLOB] [options]");
    options.engine = engine->name, options.notes = SIGNALS_HELP;
    options_add(&options, train_options(), &o);
    options_parse(&options, argc, argv);
    options_apply_recipe(&options, &o);
    Comm *comm = trainer_ranks(&o);
    const TrainOptions given = o;
    // config.txt describes the run, however it was started
    o.resume = o.rendezvous = o.job_token = (char *)(uintptr_t)"";
    options_dump(&options, &config);
    o = given;
    trainer_run(argv[0], engine, &o, config.s, NULL, comm);
    comm_close(comm);
    text_free(&config);
    options_free(&options);
    return 0;
}

#endif
