// layers.c: which layers and branches of a checkpoint matter, by scores of the residual stream, by
// exact losses without them, and by what the training run itself says about dropping them.
//
//     build/layers runs/gpt/latest --val 'data/text/val_*.bin' --json layers.json
//     build/layers runs/gpt/latest --val 'data/text/val_*.bin' --metrics runs/gpt/metrics.jsonl
//
// layers.h says what the scores are, effects.h how dropping is estimated. scripts/plot_layers.py
// draws the JSON.

#include "../check.h"
#include "../files/files.h"
#include "../files/json.h"
#include "../model/engines.h"
#include "../run/options.h"
#include "effects.h"
#include "layers.h"
#include "load.h"

//  OPTION(field, name, type, default, domain, help)
#define LAYERS_OPTIONS(HEADING, OPTION)                                                           \
    HEADING("Data")                                                                               \
    OPTION(val, "val", TEXT, "", "GLOB",                                                          \
           "token shards to compute losses on; quote a pattern: 'data/val_*.bin'")                \
    OPTION(tokens, "tokens", INTEGER, "65536", "[0,1e15]",                                        \
           "tokens of --val to read, from the first on, rounded up to whole rows; 0: all")        \
    LOAD_SEQ_LEN(OPTION)                                                                          \
    OPTION(batch, "batch", INTEGER, "4", "[1,65536]",                                             \
           "rows per batch; their residual stream after every layer stays in memory")             \
    LOAD_THREADS(OPTION)                                                                          \
    HEADING("Scores")                                                                             \
    OPTION(skip_first, "skip-first", INTEGER, "1", "[0,1048576]",                                 \
           "leave the first positions of each row out of cosines, angles and sizes")              \
    OPTION(branches, "branches", FLAG, "1", "0|1",                                                \
           "also compute the loss without each branch: 2L evaluations")                           \
    OPTION(exits, "exits", FLAG, "1", "0|1",                                                      \
           "also compute the loss of only the first 1, 2, ... layers")                            \
    OPTION(greedy, "greedy", SPAN, "50%", "",                                                     \
           "remove this many layers, or this percentage of them, one after the other, each time " \
           "the one that costs least")                                                            \
    HEADING("From the training run")                                                              \
    OPTION(metrics, "metrics", TEXT, "", "FILE",                                                  \
           "estimate the cost of dropping from this metrics.jsonl of a run with drop path; its "  \
           "config.txt is read too")                                                              \
    OPTION(metrics_last, "metrics-last", SPAN, "50%", "",                                         \
           "use this many of the run's last steps, or this percentage")                           \
    HEADING("Output")                                                                             \
    OPTION(json, "json", TEXT, "", "FILE",                                                        \
           "write the results to this file too; scripts/plot_layers.py draws it")

OPTION_TABLE(LAYERS_OPTIONS, LayersOptions, layers_options)

typedef struct {
    const LayersOptions *o;
    Loaded m;
    LayersModel model;
    LayersLosses losses;
    LayersStream stream;
    const LayersLoss *full;
    LayersCost *layer, *branch;                          // (L), (2L)
    double *exit;                                        // (L) loss of layers 0..l
    int removals, *order;                                // greedy
    double *after;
    Effects effects;
    int has_effects;
} Layers;

// ---- Computing ----

static void compute_losses(Layers *x) {
    const int L = x->m.config.L;
    unsigned char *kept = (unsigned char *)xcalloc((size_t)(BRANCHES * L), 1);
    x->layer = (LayersCost *)xcalloc((size_t)L, sizeof *x->layer);
    x->branch = (LayersCost *)xcalloc((size_t)(BRANCHES * L), sizeof *x->branch);
    x->exit = (double *)xcalloc((size_t)L, sizeof *x->exit);
    x->order = (int *)xcalloc((size_t)L, sizeof *x->order);
    x->after = (double *)xcalloc((size_t)L, sizeof *x->after);
    memset(kept, 1, (size_t)(BRANCHES * L));
    x->full = layers_loss(&x->model, &x->losses, kept);
    for (int l = 0; l < L; l++) {
        layers_keep(kept, l, 0);
        x->layer[l] = layers_cost(&x->model, layers_loss(&x->model, &x->losses, kept), x->full);
        layers_keep(kept, l, 1);
    }
    for (int i = 0; i < BRANCHES * L; i++) {
        const LayersCost unknown = {NAN, NAN, NAN};
        x->branch[i] = unknown;
        if (!x->o->branches || x->m.tied) continue;
        kept[i] = 0;
        x->branch[i] = layers_cost(&x->model, layers_loss(&x->model, &x->losses, kept), x->full);
        kept[i] = 1;
    }
    for (int l = L - 1; l >= 0; l--) {
        x->exit[l] = x->o->exits ? layers_loss(&x->model, &x->losses, kept)->mean : NAN;
        layers_keep(kept, l, 0);
    }
    layers_greedy(&x->model, &x->losses, x->removals, x->order, x->after);
    free(kept);
}

// Of everything that compute_losses and layers_stream will evaluate, each loss once.
static double planned_work(const Layers *x) {
    const int L = x->m.config.L;
    const LayersModel *m = &x->model;
    unsigned char *kept = (unsigned char *)xcalloc((size_t)(BRANCHES * L), 1);
    memset(kept, 1, (size_t)(BRANCHES * L));
    double work = layers_work(m, kept) + layers_greedy_work(m, x->removals, 0);
    for (int i = 0; i < BRANCHES * L && x->o->branches && !x->m.tied; i++) {
        kept[i] = 0;
        work += layers_work(m, kept);
        kept[i] = 1;
    }
    for (int l = L - 1; l >= 0; l--) {
        layers_keep(kept, l, 0);
        work += L * (l == L - 1) * layers_work(m, kept);
        if (x->o->exits && l < L - 1 && l > 0) work += layers_work(m, kept);
    }
    free(kept);
    return work;
}

static void compute(Layers *x) {
    const LayersOptions *o = x->o;
    Loaded *m = &x->m;
    Shards shards;
    const int T = o->seq_len ? (int)o->seq_len : m->config.T;
    if (T > m->config.T) die("--seq-len %d: %s has %d positions", T, m->dir, m->config.T);
    if (o->skip_first >= T)
        die("--skip-first %lld: rows have %d tokens, so that none is left",
            (long long)o->skip_first, T);
    const int64_t removals = span_steps(o->greedy, m->config.L);
    x->removals = removals < m->config.L ? (int)removals : m->config.L - 1;
    shards_open(&shards, o->val, T, m->config.V);
    const int64_t rows = shards_rows(&shards, o->tokens);
    const int B = rows < o->batch ? (int)rows : (int)o->batch;
    load_model(m, engine_default(), B, T, (int)o->threads);
    const LayersModel model = {m->engine, m->model, m->config, &m->plan,
                               m->scale,  m->tied,  B,         (int)o->skip_first,
                               &shards,   rows,     NULL};
    x->model = model;
    Progress progress = progress_begin("layers", planned_work(x));
    x->model.progress = &progress;
    x->stream = layers_stream(&x->model, &x->losses);
    compute_losses(x);
    progress_clear(&progress);
    shards_close(&shards);
    x->model.shards = NULL;
}

// ---- What dropping cost in training ----

// The options of the run, from config.txt beside the metrics, else from the checkpoint.
static EffectsRun find_run(const Layers *x) {
    const char *slash = strrchr(x->o->metrics, '/');
    char *path =
             xprintf("%.*sconfig.txt", slash ? (int)(slash + 1 - x->o->metrics) : 0, x->o->metrics),
         *error;
    FileMap map;
    EffectsRun run;
    if (!file_map(&map, path)) {
        error = effects_read_run(&run, (const char *)map.data, map.size, path, x->m.config.L);
        file_unmap(&map);
    } else if (x->m.run) {
        error = effects_read_run(&run, x->m.run, strlen(x->m.run), "trainer.json", x->m.config.L);
    } else {
        die("%s has no config.txt next to it, which says how branches were dropped\n  hint: give "
            "the file in the run's folder",
            x->o->metrics);
    }
    if (error) die("%s", error);
    free(path);
    return run;
}

static void compute_effects(Layers *x) {
    const EffectsRun run = find_run(x);
    MetricsLog log = metrics_read(x->o->metrics);
    EffectsData data;
    int64_t at = 0, micros = 0;
    const char *error = effects_read(&data, &run, &log, span_steps(x->o->metrics_last, log.n), &at);
    if (error)
        die("%s, line %lld: %s\n  hint: --metrics names a run of this model, of %d layers",
            x->o->metrics, (long long)at + 1, error, x->m.config.L);
    if (!data.n)
        die("%s has no step with a plan of drop path among the last %lld\n  hint: a run with "
            "--drop-path writes them",
            x->o->metrics, (long long)span_steps(x->o->metrics_last, log.n));
    for (const char *s = log.n && log.record[log.n - 1].plan ? log.record[log.n - 1].plan : ""; *s;
         s++)
        micros += *s == ' ';
    x->effects = effects_estimate(&data);
    x->effects.recorded = (log.n && log.record[log.n - 1].micros > 0) || !micros;
    x->has_effects = 1;
    effects_data_free(&data);
    metrics_log_free(&log);
}

static void print_effects(const Layers *x) {
    const Effects *e = &x->effects;
    const int each = e->units / x->m.config.L;
    int known = 0, dropped = 0;
    printf("\nDropping in training, minus the mean of all: nats per token, from %lld %s in %lld "
           "steps of %s\n",
           (long long)e->observations, e->recorded ? "micro-batches" : "steps", (long long)e->steps,
           x->o->metrics);
    printf(each == 1 ? "%-6s %9s %9s %7s\n" : "%-6s %9s %9s %7s   %9s %9s %7s\n", "layer",
           each == 1 ? "effect" : "attention", "+-", "rate", "MLP", "+-", "rate");
    for (int l = 0; l < x->m.config.L; l++) {
        printf("%-6d", l);
        for (int i = each * l; i < each * (l + 1); i++) {
            known += isfinite(e->effect[i]), dropped += e->rate[i] > 0;
            if (isfinite(e->effect[i]))
                printf("%s %+9.4f %9.4f %6.1f%%", i % each ? "  " : "", e->effect[i], e->error[i],
                       100 * e->rate[i]);
            else
                printf("%s %9s %9s %6.1f%%", i % each ? "  " : "", e->rate[i] > 0 ? "unknown" : "-",
                       "-", 100 * e->rate[i]);
        }
        printf("\n");
    }
    if (e->level) printf("mean of all: %+.4f +- %.4f\n", e->mean, e->mean_error);
    else if (known)
        printf("mean of all: not identified, as all masks have the same number of drops; the "
               "differences are\n");
    if (!dropped) printf("not identified: no branch was dropped in these steps\n");
    else if (known < dropped)
        printf("not identified: the masks do not tell %d of %d units apart (condition %.1e)\n",
               dropped - known, dropped, e->condition);
    if (known < dropped || !e->level || !e->recorded)
        printf("  hint: next time train with %s%s%s\n", e->recorded ? "" : "--record-micro 1",
               e->recorded || (e->level && known == dropped) ? "" : " and ",
               e->level && known == dropped ? "" : "--drop-sampling bernoulli");
}

// ---- The table ----

static void print_cost(const LayersCost *c) {
    if (isnan(c->cost)) printf(" %8s", "-");
    else printf(" %+8.4f", c->cost);
    if (isnan(c->error)) printf(" %7s", "-");            // of one row there is none
    else printf(" %7.4f", c->error);
}

static void print_number(const char *format, double x) {
    if (isnan(x)) printf(" %7s", "-");
    else printf(format, x);
}

static void print_table(const Layers *x) {
    const int L = x->m.config.L, T = x->m.config.T < x->o->seq_len || !x->o->seq_len
                                         ? x->m.config.T
                                         : (int)x->o->seq_len;
    const LayersStream *s = &x->stream;
    printf("%s on %lld tokens of %s in rows of %d: loss %.6f\n", x->m.dir,
           (long long)x->model.rows * T, x->o->val, T, x->full->mean);
    printf("\n%-5s   %-15s   %-31s   %-50s   %s\n", "", "layer", "|branch|/|x| and its BI",
           "loss without it minus loss with it", "loss of");
    printf("%-5s  %8s %7s  %8s %7s %7s %7s  %9s %7s %8s %7s %8s %7s  %9s\n", "layer", "BI", "angle",
           "attn", "BI", "MLP", "BI", "layer", "+-", "attn", "+-", "MLP", "+-", "0 to this");
    for (int l = 0; l < L; l++) {
        const int a = BRANCHES * l + ATTN, b = BRANCHES * l + MLP;
        printf("%-5d   %7.4f %7.4f  ", l, s->influence[l], s->angle[l * L]);
        print_number(" %7.4f", s->size[a]), print_number(" %7.4f", s->branch_influence[a]);
        print_number(" %7.4f", s->size[b]), print_number(" %7.4f", s->branch_influence[b]);
        printf(" ");
        print_cost(&x->layer[l]), print_cost(&x->branch[a]), print_cost(&x->branch[b]);
        print_number("   %8.4f", x->exit[l]);
        printf("\n");
    }
    if (s->zero)
        printf("left out of cosines and sizes: %lld of %lld positions, where a vector of the "
               "stream is zero\n",
               (long long)s->zero, (long long)(s->zero + s->positions));
    if (x->m.tied)
        printf("branches: unknown, since the factors of survival scaling tie the branches of a "
               "layer together\n");
    if (!x->removals) return;
    printf("\n%-7s  %-15s %8s   %-15s %10s %9s\n", "removed", "a row of layers", "angle",
           "one by one", "loss", "costs");
    for (int n = 1; n <= x->removals; n++) {
        const int from = layers_angular_start(s, L, n);
        char *row = n == 1 ? xprintf("%d", from) : xprintf("%d to %d", from, from + n - 1);
        char *one = xprintf(n == 1 ? "%d" : "and %d", x->order[n - 1]);
        printf("%-7d  %-15s %8.4f   %-15s %10.6f %+9.4f\n", n, row, s->angle[from * L + n - 1], one,
               x->after[n - 1], x->after[n - 1] - x->full->mean);
        free(row), free(one);
    }
}

// ---- JSON ----

static void json_at(Text *t, const char *name, double value) {
    text_printf(t, ", \"%s\": ", name);
    json_write_number(t, value);
}

static void json_cost(Text *t, const LayersCost *c) {
    json_at(t, "loss_without", c->loss), json_at(t, "ablation", c->cost),
        json_at(t, "ablation_error", c->error);
}

static void json_effects(Text *t, const Effects *e, int L) {
    text_printf(t,
                ",\n  \"effects\": {\"observations\": %lld, \"steps\": %lld, \"micro_batches\": %s",
                (long long)e->observations, (long long)e->steps, e->recorded ? "true" : "false");
    json_at(t, "condition", e->condition), json_at(t, "mean", e->mean),
        json_at(t, "mean_error", e->mean_error);
    json_at(t, "noise", e->noise);
    text_printf(t, ", \"units\": [");
    for (int i = 0; i < e->units; i++) {
        static const char *const name[BRANCHES] = {"attn", "mlp"};
        text_printf(t, "%s\n    {\"layer\": %d, \"branch\": \"%s\"", i ? "," : "", i * L / e->units,
                    e->units == L ? "both" : name[i % BRANCHES]);
        json_at(t, "rate", e->rate[i]), json_at(t, "effect", e->effect[i]),
            json_at(t, "error", e->error[i]);
        text_printf(t, "}");
    }
    text_printf(t, "]}");
}

static void write_json(const Layers *x) {
    static const char *const name[BRANCHES] = {"attn", "mlp"};
    const int L = x->m.config.L;
    const LayersStream *s = &x->stream;
    Text t = {NULL, 0, 0};
    text_printf(&t, "{\n  \"checkpoint\": ");
    json_write_string(&t, x->m.dir);
    text_printf(&t, ",\n  \"val\": ");
    json_write_string(&t, x->o->val);
    text_printf(&t,
                ",\n  \"rows\": %lld,\n  \"skip_first\": %lld,\n  \"positions\": %lld,\n  "
                "\"zero_positions\": %lld",
                (long long)x->model.rows, (long long)x->o->skip_first, (long long)s->positions,
                (long long)s->zero);
    text_printf(&t, ",\n  \"loss\": ");
    json_write_number(&t, x->full->mean);
    text_printf(&t, ",\n  \"layers\": [");
    for (int l = 0; l < L; l++) {
        text_printf(&t, "%s\n    {\"layer\": %d", l ? "," : "", l);
        json_at(&t, "block_influence", s->influence[l]);
        json_cost(&t, &x->layer[l]);
        json_at(&t, "exit_loss", x->exit[l]);
        for (int b = 0; b < BRANCHES; b++) {
            text_printf(&t, ",\n     \"%s\": {\"relative_size\": ", name[b]);
            json_write_number(&t, s->size[BRANCHES * l + b]);
            json_at(&t, "block_influence", s->branch_influence[BRANCHES * l + b]);
            json_cost(&t, &x->branch[BRANCHES * l + b]);
            text_printf(&t, "}");
        }
        text_printf(&t, "}");
    }
    text_printf(&t, "],\n  \"angular\": ["); // [l][n-1]: from the input of layer l over n layers
    for (int l = 0; l < L; l++) {
        text_printf(&t, "%s[", l ? ",\n    " : "\n    ");
        for (int n = 1; l + n <= L; n++) {
            if (n > 1) text_printf(&t, ", ");
            json_write_number(&t, s->angle[l * L + n - 1]);
        }
        text_printf(&t, "]");
    }
    text_printf(&t, "],\n  \"greedy\": [");
    for (int k = 0; k < x->removals; k++) {
        text_printf(&t, "%s{\"layer\": %d", k ? ", " : "", x->order[k]);
        json_at(&t, "loss", x->after[k]);
        text_printf(&t, "}");
    }
    text_printf(&t, "]");
    if (x->has_effects) json_effects(&t, &x->effects, L);
    text_printf(&t, "\n}\n");
    file_write_whole(x->o->json, t.s, t.n);
    text_free(&t);
}

int main(int argc, char **argv) {
    LayersOptions o;
    Options options;
    Layers x;
    program_begin(argv);
    memset(&x, 0, sizeof x);
    x.o = &o;
    options_init(&options, "layers CHECKPOINT --val GLOB [options]");
    options.engine = engine_default_name();
    options_add(&options, layers_options(), &o);
    options.max_arguments = 1;
    options_parse(&options, argc, argv);
    if (options.n_arguments < 1)
        die("the checkpoint is missing\n  hint: layers runs/gpt/latest --val GLOB");
    if (!*o.val)
        die("--val is missing\n  hint: --val 'data/val_*.bin'; data/README.md tells how to make "
            "them");
    load_config(&x.m, options.arguments[0]);
    if (*o.metrics) compute_effects(&x); // what is wrong with it shows before the long part
    compute(&x);
    print_table(&x);
    if (x.has_effects) print_effects(&x);
    if (*o.json) write_json(&x);
    layers_losses_free(&x.losses);
    layers_stream_free(&x.stream);
    if (x.has_effects) effects_free(&x.effects);
    free(x.layer), free(x.branch), free(x.exit), free(x.order), free(x.after);
    load_close(&x.m);
    options_free(&options);
    if (fflush(stdout) || ferror(stdout)) die("cannot write the results: %s", strerror(errno));
    return 0;
}
