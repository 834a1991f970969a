// bad_steps.h: a step whose loss or gradient is not finite never reaches the weights. Reports what
// went wrong, how to reproduce it, and when a run gives up.
#ifndef BAD_STEPS_H
#define BAD_STEPS_H

#include "../files/files.h"
#include "micro.h"
#include "output.h"

// What each rank knows of the step. All ranks call it and get the same; (world), from malloc.
// mean loss of its micro-batches; as Trainer's bad_*
typedef struct { double loss, micro, forward; } RankNumbers;

static inline RankNumbers *trainer_ask_ranks(const Trainer *tr, double loss) {
    RankNumbers *all = (RankNumbers *)xcalloc((size_t)tr->world, sizeof *all);
    all[tr->rank].loss = loss * tr->world, all[tr->rank].micro = tr->bad_micro,
        all[tr->rank].forward = tr->bad_forward;
    comm_sum(tr->comm, (double *)all, (size_t)tr->world * (sizeof *all / sizeof(double)));
    return all;
}

// Where a forward pass with `finite` finite branches (numbers_finite_branches) stops being finite.
static inline void trainer_write_place(const Trainer *tr, Text *t, int finite) {
    if (finite < 0) text_printf(t, "the embeddings or the head");
    else if (finite >= BRANCHES * tr->config.L) text_printf(t, "the whole pass, in training only");
    else text_printf(t, "h.%d.%s", finite / BRANCHES, finite % BRANCHES == ATTN ? "attn" : "mlp");
}

// The command that reaches the same step again: from the newest checkpoint, or from the start.
static inline void trainer_write_replay(const Trainer *tr, Text *t) {
    char *config = xprintf("%s/config.txt", tr->options->out);
    char *out = xprintf("%s/replay_%08lld", tr->options->out, (long long)tr->state.step + 1);
    const char *const words[] = {tr->program, "--config", config, "--out", out,
                                 tr->whole ? "--resume" : NULL, tr->whole};
    for (size_t i = 0; i < sizeof words / sizeof words[0] && words[i]; i++) {
        if (i) text_append(t, " ", 1);
        numbers_quote(t, words[i]);
    }
    text_printf(t, " --max-bad-steps %d", tr->state.bad_steps);
    free(config);
    free(out);
}

// The drop rates by branch, the shards, and for each row of each micro-batch the index of its shard
// and its first token.
static inline void trainer_write_data(const Trainer *tr, Text *t) {
    const int64_t step = tr->state.step;
    for (int b = 0; b < BRANCHES; b++) {
        text_printf(t, ",\n  \"drop_rate_%s\": [", b == ATTN ? "attn" : "mlp");
        for (int l = 1; l <= tr->config.L; l++) {
            if (l > 1) text_printf(t, ", ");
            numbers_write(t, drop_path_rate(&tr->drop, l, b, step));
        }
        text_printf(t, "]");
    }
    text_printf(t, ",\n  \"shards\": [");
    for (int i = 0; i < tr->train.n; i++) {
        if (i) text_printf(t, ", ");
        json_write_string(t, tr->train.file[i].path);
    }
    text_printf(t, "],\n  \"rows_of\": \"by micro-batch: [shard, first token] of each row\",\n  "
                "\"rows\": [");
    for (int m = 0; m < tr->M; m++) {
        text_printf(t, m ? ",\n    [" : "\n    [");
        for (int b = 0; b < tr->B; b++) {
            const int64_t sample = trainer_row_sample(tr, m, b);
            int64_t start, window = shards_sample(&tr->train, (uint64_t)tr->options->seed, sample);
            const ShardFile *file = shards_find(&tr->train, window, &start);
            text_printf(t, "%s[%d, %lld]", b ? ", " : "", (int)(file - tr->train.file),
                        (long long)start);
        }
        text_printf(t, "]");
    }
    text_printf(t, "\n  ]");
}

static inline void trainer_write_tensors(Text *t, const TensorPlace *places,
                                         const TensorNumbers *tensors, int n) {
    text_printf(t, ",\n  \"tensors_of\": \"in backward order: norm of the finite elements, number "
                "of non-finite ones\",\n"
                "  \"tensors\": [");
    for (int i = 0; i < n; i++) {
        char *name = gpt_param_name(places[i].param, places[i].layer);
        text_printf(t, "%s\n    {\"name\": \"%s\"", i ? "," : "", name);
        for (int which = 0; which < 2; which++) {
            text_printf(t, ", \"%s_norm\": ", which ? "grad" : "weight");
            numbers_write(t, tensors[i].norm[which]);
            text_printf(t, ", \"%s_not_finite\": %.0f", which ? "grad" : "weight",
                        tensors[i].bad[which]);
        }
        text_printf(t, "}");
        free(name);
    }
    text_printf(t, "\n  ]");
}

// Writes OUT/bad_step_NNNNNNNN.json. A failed write does not end the run.
static inline void trainer_save_report(Trainer *tr, const Text *t) {
    char *path = xprintf("%s/bad_step_%08lld.json", tr->options->out,
                         (long long)tr->state.step + 1);
    int ends;
    char *error = trainer_watch(tr, &ends);
    if (!error) error = file_try_replace(path, t->s, t->n);
    if (error) warn("%s", error);
    free(error);
    free(tr->report);
    tr->report = path;
}

// Prints a summary; the rest is in the report.
static inline void trainer_report_bad_step(Trainer *tr, const Metrics *r, const RankNumbers *ranks,
                                           const TensorPlace *places, const TensorNumbers *tensors,
                                           int n) {
    Text t = {NULL, 0, 0}, said = {NULL, 0, 0}, place = {NULL, 0, 0};
    static const char *const what[2] = {"weight", "gradient"};
    text_printf(&t, "{\n  \"step\": %lld,\n  \"loss\": ", (long long)tr->state.step + 1);
    numbers_write(&t, r->loss);
    text_printf(&t, ",\n  \"grad_norm\": ");
    numbers_write(&t, r->grad_norm);
    text_printf(&t, ",\n  \"lr\": ");
    numbers_write(&t, r->lr);
    text_printf(&t, ",\n  \"bad_steps_in_a_row\": %d,\n  \"seed\": %lld,\n  \"replay\": ",
                tr->state.bad_steps, (long long)tr->options->seed);
    trainer_write_replay(tr, &place);
    json_write_string(&t, place.s);
    text_printf(&t, ",\n  \"ranks\": [");
    for (int i = 0; i < tr->world; i++) {
        text_printf(&t, "%s\n    {\"rank\": %d, \"loss\": ", i ? "," : "", i);
        numbers_write(&t, ranks[i].loss);
        if (ranks[i].micro >= 0) {
            place.n = 0;
            trainer_write_place(tr, &place, (int)ranks[i].forward);
            text_printf(&t, ", \"micro_batch\": %.0f, \"forward_not_finite_from\": \"%s\"",
                        ranks[i].micro, place.s);
            text_printf(&said, "; rank %d, micro-batch %.0f: the forward pass is not finite from "
                        "%s", i, ranks[i].micro, place.s);
        }
        text_printf(&t, "}");
    }
    text_printf(&t, "\n  ],\n");
    for (int which = 1; which >= 0; which--) {
        const int first = numbers_first_bad(tensors, n, which);
        char *name = first < 0 ? NULL : gpt_param_name(places[first].param, places[first].layer);
        text_printf(&t, "  \"first_%s_not_finite\": %s%s%s,\n", what[which], name ? "\"" : "",
                    name ? name : "null", name ? "\"" : "");
        if (name)
            text_printf(&said, "; non-finite %s: %s%s", what[which], name,
                        which ? ", the first in backward order" : "");
        else text_printf(&said, "; all %ss are finite", what[which]);
        free(name);
    }
    text_printf(&t, "  \"plan\": ");
    json_write_string(&t, tr->plan_text.s);
    trainer_write_data(tr, &t);
    trainer_write_tensors(&t, places, tensors, n);
    text_printf(&t, "\n}\n");
    trainer_save_report(tr, &t);
    warn("step %lld:%s\n  details: %s", (long long)tr->state.step + 1, said.s + strlen(";"),
         tr->report);
    text_free(&t), text_free(&said), text_free(&place);
}

// Called after an update that was not taken, while the gradients can still be read. All ranks take
// part, for the first and last step of a series of such steps; loss: this rank's part of the step's
// loss.
static inline void trainer_examine(Trainer *tr, const Metrics *r, double loss) {
    TensorPlace *places;
    const int n = numbers_places(&places, &tr->config);
    tr->bad_forward = BRANCHES * tr->config.L;
    if (tr->bad_micro >= 0) {
        const Batch batch = trainer_batch(tr, tr->bad_micro);
        const Pass pass = trainer_pass(tr, tr->state.step, tr->bad_micro);
        tr->bad_forward = numbers_finite_branches(tr->engine, tr->model, &batch, &pass);
    }
    RankNumbers *ranks = trainer_ask_ranks(tr, loss);
    TensorNumbers *tensors = numbers_of_tensors(tr->engine, tr->model, &tr->config, tr->drop.frozen,
                                                places, n, tr->comm);
    if (tr->rank == 0) trainer_report_bad_step(tr, r, ranks, places, tensors, n);
    free(places), free(ranks), free(tensors);
}

// Whether all elements of a checkpoint's file are finite: its weights or, in optimizer.safetensors,
// its moments.
static inline int trainer_file_finite(const char *dir, const char *name) {
    char *path = xprintf("%s/%s", dir, name);
    FileMap map;
    Safetensors t;
    int finite = !file_map(&map, path);
    free(path);
    if (!finite) return 0;
    finite = !safetensors_parse(&t, map.data, map.size);
    for (int i = 0; finite && i < t.n; i++)
        for (size_t k = 0; finite && t.entry[i].dtype <= SAFETENSORS_BF16 && k < t.entry[i].count;
             k++)
            finite = isfinite(safetensors_real(&t.entry[i], k));
    safetensors_free(&t);
    file_unmap(&map);
    return finite;
}

// The newest checkpoint that is complete and finite: in OUT, else the one that the run started
// from; NULL: none. From malloc.
static inline char *trainer_last_good(const Trainer *tr) {
    CheckpointList list = checkpoint_list(tr->options->out);
    char *good = NULL;
    for (int i = 0; i <= list.n && !good; i++) {
        char *path = i < list.n ? checkpoint_path(tr->options->out, list.step[i])
                     : tr->whole ? xstrdup(tr->whole) : NULL;
        char *wrong = path ? checkpoint_verify(path) : NULL;
        if (path && !wrong &&
            trainer_file_finite(path, checkpoint_file_of(lora_is_adapter(path), 0)) &&
            trainer_file_finite(path, "optimizer.safetensors"))
            good = path;
        else free(path);
        free(wrong);
    }
    free(list.step);
    return good;
}

// Ends the run with code 3. Rank 0 reports `why`; all ranks call it together.
static inline void NORETURN trainer_give_up(Trainer *tr, const char *why) {
    if (tr->rank == 0) {
        char *good = trainer_last_good(tr);
        fflush(stdout);
        fprintf(stderr, "error: %s\n  last good checkpoint: %s\n", why, good ? good : "none");
        if (tr->report) {
            Text replay = {NULL, 0, 0};
            tr->state.step--;                            // the step being reported has already been
                                                         // counted
            trainer_write_replay(tr, &replay);
            fprintf(stderr, "  report: %s\n  replay: %s\n", tr->report, replay.s);
        }
        fprintf(stderr, "  hint: try a lower --lr or a longer --warmup%s\n",
                good ? "; --resume continues from that checkpoint" : "");
    }
    comm_close(tr->comm);
    leave_memory();
    exit(3);
}

static inline void trainer_check_bad_steps(Trainer *tr) {
    if (tr->state.bad_steps < tr->options->max_bad_steps) return;
    char *why = xprintf("%d steps in a row were not finite", tr->state.bad_steps);
    trainer_give_up(tr, why);
}

static inline void trainer_count_bad_step(Trainer *tr, Metrics *r, double loss) {
    const int64_t bad = ++tr->state.bad_steps;
    r->skipped = SKIPPED_BAD;
    if (tr->rank == 0)
        warn("step %lld: loss %g, gradient norm %g: %s, so the weights are unchanged",
             (long long)tr->state.step + 1, numbers_unsigned(r->loss),
             numbers_unsigned(r->grad_norm), isfinite(r->loss) &&
             isfinite(r->grad_norm) ? "its square is not finite in " REAL_NAME : "not finite");
    if (bad == 1 || bad == tr->options->max_bad_steps) trainer_examine(tr, r, loss);
}

static inline void trainer_warn_of_spike(const Trainer *tr, const Metrics *r) {
    const int of_loss = r->skipped == SKIPPED_LOSS;
    if (tr->rank == 0)
        warn("step %lld: %s %g is %.1f standard deviations above the last %d: a spike, so the "
             "weights are unchanged", (long long)tr->state.step + 1,
             of_loss ? "loss" : "gradient norm", of_loss ? r->loss : r->grad_norm,
             of_loss ? r->loss_z : r->norm_z, SPIKES_WINDOW);
}

#endif
