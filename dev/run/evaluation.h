// evaluation.h: the mean loss on shards, for a run in progress or a tool.
#ifndef EVALUATION_H
#define EVALUATION_H

#include "../files/files.h"
#include "run.h"
#include "signals.h"

typedef struct { double loss, bits_per_byte; int64_t tokens, bytes; int stopped; } Evaluation;

// Mean loss over the first `rows` windows of the shards. Every token has the same weight, whatever
// the batch size. Every row runs, with each branch multiplied by its factor (2L; 0 omits the
// branch); plan has capacity for B rows. bits_per_byte is NaN without a tokenizer (t NULL). The
// ranks of comm (NULL: a single process) share the batches; losses are summed in row order, so
// neither the batch size nor the number of ranks changes the sum. A signal to any rank stops the
// evaluation after the current batch: `stopped` is set, and the loss is NaN unless that batch was
// the last.
static inline Evaluation evaluate_shards(const Engine *e, Model *m, const Shards *shards,
                                         int64_t rows, const Tokenizer *t, int B, DropPlan *plan,
                                         const double *scale, int tied, const Comm *comm) {
    const int T = shards->T;
    const size_t BT = (size_t)B * (size_t)T;
    int *tokens = (int *)xcalloc(BT, sizeof *tokens),
        *targets = (int *)xcalloc(BT, sizeof *targets);
    real *losses = (real *)xcalloc(BT, sizeof *losses);
    double *loss = (double *)xcalloc((size_t)rows, sizeof *loss), bytes = 0;
    const int64_t stride = (int64_t)B * (comm ? comm->world : 1);
    Evaluation sum = {0, NAN, rows * T, 0, 0};
    for (int64_t first = 0, row = (int64_t)B * (comm ? comm->rank : 0); first < rows;
         first += stride, row += stride) {
        double asked = signals_stop ? 1 : 0;
        comm_sum(comm, &asked, 1);
        if (asked > 0) {
            sum.stopped = 1;
            sum.loss = NAN;
            break;
        }
        const int n = rows - row < B ? (int)(rows - row) : B;
        if (n <= 0) continue;                            // only other ranks have a batch left
        for (int b = 0; b < n; b++)
            shards_read_window(shards, row + b, tokens + b * T, targets + b * T);
        drop_plan_keep_all(plan, scale, tied, n);
        engine_forward(e, m, T, tokens, targets, plan);
        e->losses(m, losses);
        for (int i = 0; i < n * T; i++) {
            loss[row + i / T] += (double)losses[i];
            if (t) bytes += targets[i] < t->V ? tokenizer_text_length(t, targets[i]) : 0;
        }
    }
    // each row's loss is on one rank, the others have 0
    comm_sum(comm, loss, (size_t)rows);
    double last[2] = {bytes, signals_stop ? 1.0 : 0.0};
    comm_sum(comm, last, 2);
    for (int64_t row = 0; row < rows; row++) sum.loss += loss[row];
    sum.bytes = (int64_t)last[0];
    sum.stopped |= last[1] > 0;
    if (t && sum.bytes) sum.bits_per_byte = sum.loss / 0.69314718055994530942 / (double)sum.bytes;
    sum.loss /= sum.tokens ? (double)sum.tokens : 1;
    free(tokens);
    free(targets);
    free(losses);
    free(loss);
    return sum;
}

// The validation loss at the shares of the layers that --eval-depths names, from malloc; NULL if a
// signal has stopped it. Layers are left out by the plan: their factor is 0. The same layers are
// evaluated once.
static inline MetricsDepth *trainer_evaluate_depths(Trainer *tr) {
    const DepthShares *d = &tr->eval_depths;
    const int n = d->n * KEEP_KINDS, branches = BRANCHES * tr->config.L;
    MetricsDepth *depth = (MetricsDepth *)xcalloc((size_t)d->n, sizeof *depth);
    unsigned char *kept = (unsigned char *)xcalloc((size_t)(n * branches), 1);
    double *scale = (double *)xcalloc((size_t)branches, sizeof *scale);
    for (int i = 0; i < n && !tr->stop; i++) {
        unsigned char *k = kept + i * branches;
        double *loss = &depth[i / KEEP_KINDS].loss[i % KEEP_KINDS];
        depth[i / KEEP_KINDS].share = d->share[i / KEEP_KINDS];
        layer_list_share(k, tr->config.L, i % KEEP_KINDS, d->share[i / KEEP_KINDS]);
        int same = 0;
        while (memcmp(kept + same * branches, k, (size_t)branches)) same++;
        if (same < i) {
            *loss = depth[same / KEEP_KINDS].loss[same % KEEP_KINDS];
            continue;
        }
        for (int b = 0; b < branches; b++) scale[b] = k[b] ? tr->state.eval_scale[b] : 0;
        const Evaluation v = evaluate_shards(tr->engine, tr->model, &tr->val, tr->eval_rows, NULL,
                                             tr->B, &tr->plan, scale, tr->state.tied, tr->comm);
        *loss = v.loss;
        tr->stop |= v.stopped;
    }
    free(kept), free(scale);
    if (!tr->stop) return depth;
    free(depth);
    return NULL;
}

// Completes the record of the step that was just done. Its depths are from malloc.
// The mean entropy of attention's probabilities over layers, heads and queries of the first rows of
// --val: the same ones on every rank and for every --batch.
static inline double trainer_entropy(Trainer *tr) {
    enum { ROWS = 8 };
    const int L = tr->config.L, rows = tr->eval_rows < ROWS ? (int)tr->eval_rows : ROWS;
    double *entropy = (double *)xcalloc((size_t)L, sizeof *entropy), sum = 0;
    for (int row = 0; row < rows; row++) {
        shards_read_window(&tr->val, row, tr->tokens, tr->targets);
        drop_plan_keep_all(&tr->plan, tr->state.eval_scale, tr->state.tied, 1);
        const Batch batch = batch_of(1, tr->T, tr->tokens, NULL);
        Pass pass = pass_of(&tr->plan, 0);
        pass.entropy = entropy;
        tr->engine->run(tr->model, &batch, &pass);
        for (int l = 0; l < L; l++) sum += entropy[l] / ((double)L * rows);
    }
    free(entropy);
    return sum;
}

static inline void trainer_evaluate(Trainer *tr, Metrics *r) {
    const Tokenizer *t = tr->has_tokenizer ? &tr->tokenizer : NULL;
    Evaluation v = evaluate_shards(tr->engine, tr->model, &tr->val, tr->eval_rows, t, tr->B,
                                   &tr->plan, tr->state.eval_scale, tr->state.tied, tr->comm);
    // an interrupted evaluation is not recorded: trainer_catch_up
    tr->stop |= v.stopped;
    if (tr->eval_depths.n) {
        r->depth = tr->stop ? NULL : trainer_evaluate_depths(tr);
        r->depths = r->depth ? tr->eval_depths.n : 0;
        if (!r->depth) return;
    }
    if (!v.stopped && !isfinite(v.loss) && tr->rank == 0)
        warn("step %lld: the validation loss is not finite, though the step's loss and gradient "
             "were", (long long)tr->state.step);
    if (tr->options->record_entropy && !tr->stop) r->attn_entropy = trainer_entropy(tr);
    r->val_loss = v.loss;
    r->val_ppl = exp(v.loss);
    r->val_bpb = t ? v.bits_per_byte : manifest_bits_per_byte(&tr->manifest[MANIFEST_VAL],
                                                              MANIFEST_VAL, v.loss);
}

// A signal may have ended the run before its last step was evaluated: that is done now, so that
// metrics.jsonl has no gap. Returns whether it was necessary; then *last is the complete record of
// that step, for metrics_free.
static inline int trainer_catch_up(Trainer *tr, Metrics *last) {
    const int64_t step = tr->state.step;
    int owed = 0;
    *last = metrics_new();
    if (tr->rank == 0 && tr->has_val && step > 0 && trainer_due(tr->options->eval_every, step,
                                                                tr->steps)) {
        char *path = xprintf("%s/metrics.jsonl", tr->options->out);
        FileMap map;
        Text kept = {NULL, 0, 0};
        size_t at;
        int64_t number;
        if (!file_map(&map, path)) {
            metrics_keep(&kept, (const char *)map.data, map.size, step, last, &at, &number);
            owed = last->step == (double)step && isnan(last->val_loss);
            file_unmap(&map);
        }
        text_free(&kept);
        free(path);
    }
    comm_broadcast(tr->comm, &owed, sizeof owed);
    if (owed) trainer_evaluate(tr, last);
    if (owed && !isnan(last->val_loss)) return 1;
    metrics_free(last);
    *last = metrics_new();
    return 0;
}

#endif
