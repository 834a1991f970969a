// exits.c: calibrates adaptive depth for a checkpoint: what each exit would do, and the lowest
// threshold whose risk of changing the most likely token is certified. generate and evaluate take
// the file that it writes.
//
//     build/exits runs/ls/latest --val 'data/text/train_*.bin' --risk 0.05 --out exits.json
//     build/generate runs/ls/latest --prompt "The " --adaptive exits.json
//
// Calibrate on text that the policy will not be judged by.

#include "../check.h"
#include "../model/engines.h"
#include "../run/options.h"
#include "exits.h"
#include "load.h"

//  OPTION(field, name, type, default, domain, help)
#define EXITS_OPTIONS(HEADING, OPTION)                                                             \
  HEADING("Data")                                                                                  \
    OPTION(val, "val", TEXT, "", "GLOB",                                                           \
           "token shards to calibrate on; quote a pattern: 'data/val_*.bin'")                      \
    OPTION(rows, "rows", INTEGER, "256", "[8,1e6]",                                                \
           "rows that thresholds are tested on; fewer than 80 certify no risk of 0.05")            \
    OPTION(observe, "observe", INTEGER, "32", "[1,1e6]",                                           \
           "other rows, from which the thresholds to test, and a learned confidence, come")        \
    OPTION(seq_len, "seq-len", INTEGER, "0", "[0,1048576]",                                        \
           "tokens per row; 0: as many as the model has positions")                                \
    OPTION(batch, "batch", INTEGER, "32", "[1,4096]", "rows that run together")                    \
    OPTION(threads, "threads", INTEGER, "0", "[0,4096]",                                           \
           "CPU threads; 0: all that the machine offers")                                          \
  HEADING("Policy")                                                                                \
    OPTION(confidence, "confidence", CHOICE, "saturation", "saturation|softmax|learned",           \
           "the cosine of the streams before and after a layer; the difference of the two "        \
               "largest probabilities, a head for each exit; a trained regression on the stream")  \
    OPTION(layers, "layers", TEXT, "all", "LIST",                                                  \
           "after how many layers a token may leave, as 4,6,8; all: from 2 to one less than all")  \
    OPTION(tau, "tau", NUMBER, "4", "[0,1e6]",                                                     \
           "how fast the threshold falls along a text, by a tenth at most")                        \
  HEADING("Guarantee")                                                                             \
    OPTION(risk, "risk", NUMBER, "0.05", "(0,1)",                                                  \
           "the share of tokens whose most likely successor may be another than at full depth")    \
    OPTION(risk_error, "risk-error", NUMBER, "0.05", "(0,1)",                                      \
           "the probability that the guarantee does not hold")                                     \
    OPTION(steps, "steps", INTEGER, "24", "[2,1000]",                                              \
           "thresholds to test at most; each is a pass over the rows")                             \
  HEADING("Output")                                                                                \
    OPTION(out, "out", TEXT, "exits.json", "FILE", "the policy, for --adaptive")                   \
    OPTION(json, "json", TEXT, "", "FILE", "write the tables to this file too")

OPTION_TABLE(EXITS_OPTIONS, ExitsOptions, exits_options)

// The exits that --layers lists.
static void exits_listed(Adaptive *a, const char *list, int L) {
    const int least = a->confidence == CONFIDENCE_SATURATION ? 2 : 1;
    a->of = L, a->layer = xcalloc((size_t)L, sizeof *a->layer);
    if (L <= 2)
        die("the model has %d layer%s: there is nothing to leave out", L, L == 1 ? "" : "s");
    if (!strcmp(list, "all")) {
        for (int l = 2; l < L; l++) a->layer[a->n++] = l;
        return;
    }
    for (const char *s = list;; s++) {
        char *end;
        const long l = strtol(s, &end, 10);
        if (*s < '0' || *s > '9' || (*end && *end != ','))
            die("--layers %s: numbers of layers separated by commas, such as 4,6,8, or all", list);
        if (l < least || l >= L)
            die("--layers %s: a token can leave after %d to %d of the %d layers%s", list, least,
                L - 1, L, l == 1 ? "\n  hint: --confidence softmax takes 1, too" : "");
        if (a->n && l <= a->layer[a->n - 1]) die("--layers %s: they must rise", list);
        a->layer[a->n++] = (int)l;
        if (!*end) return;
        s = end;
    }
}

static void print_seen(const ExitsSeen *s, const Adaptive *a, const ExitsScore *full) {
    printf("%-7s %9s %10s %12s %12s\n", "layers", "loss", "agreement", "confidence", "when right");
    for (int e = 0; e < s->n; e++) {
        double mean = 0, right = 0, n = 0;
        for (int i = 0; i < s->samples; i++) {
            const size_t k = (size_t)i * (size_t)s->n + (size_t)e;
            mean += s->confidence[k] / s->samples;
            if (s->right[k]) right += s->confidence[k], n++;
        }
        printf("%-7d %9.4f %9.1f%% %12.4f %12.4f\n", a->layer[e], s->loss[e], 100 * s->agree[e],
               mean, n > 0 ? right / n : NAN);
    }
    printf("%-7d %9.4f\n\n", a->of, full->loss);
}

static void json_line(Text *t, double lambda, const ExitsScore *s, double p) {
    text_printf(t, "%s\n  {\"lambda\": ", t->n > 1 ? "," : "");
    json_write_number(t, lambda);
    const struct { const char *name; double value; } all[] = {
        {"layers", s->layers}, {"flops_fraction", s->flops}, {"disagree", s->apart},
        {"loss", s->loss}, {"seconds", s->seconds}, {"p", p}};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        text_printf(t, ", \"%s\": ", all[i].name);
        json_write_number(t, all[i].value);
    }
    text_printf(t, "}");
}

// Tests the thresholds in turn; returns how many are certified. *a keeps the last one of them.
static int calibrate(AdaptiveRun *run, Adaptive *a, ExitsRows *rows, const ExitsSeen *seen,
                     const ExitsOptions *o, const ExitsScore *full, Text *json) {
    double *lambda = xcalloc((size_t)o->steps, sizeof *lambda), certified = 2;
    const int n = exits_grid(lambda, (int)o->steps, seen, a->tau);
    int passed = 0;
    Progress progress = progress_begin("exits", (double)n * rows->n * rows->T);
    printf("%-8s %8s %8s %10s %9s %9s %9s %10s\n", "lambda", "layers", "FLOPs", "agreement", "loss",
           "seconds", "p-value", "certified");
    json_line(json, 2, full, 0);
    for (int k = 0; k < n; k++) {
        a->lambda = lambda[k];
        ExitsScore s = exits_score(run, rows, (int)o->batch, 0, &progress);
        const double p = exits_p_value(s.apart, rows->n, o->risk);
        const int good = p <= o->risk_error;
        progress_clear(&progress);
        printf("%-8.4f %8.2f %7.1f%% %9.2f%% %9.4f %8.2fx %9.2g %10s\n", a->lambda, s.layers,
               100 * s.flops, 100 * (1 - s.apart), s.loss, s.seconds / full->seconds, p,
               good ? "yes" : "no");
        fflush(stdout);
        json_line(json, a->lambda, &s, p);
        free(s.disagree);
        if (!good) break;
        certified = a->lambda, passed++;
    }
    a->lambda = certified;
    free(lambda);
    return passed;
}

static void calibrate_model(Loaded *m, const ExitsOptions *o) {
    Adaptive a = {.confidence = (int)o->confidence, .lambda = 2, .tau = o->tau, .risk = o->risk,
                  .error = o->risk_error};
    const int T = o->seq_len ? (int)o->seq_len : m->config.T, rows = (int)o->rows;
    const int batch = (int)o->batch;
    Shards shards;
    Text json = {NULL, 0, 0}, file = {NULL, 0, 0};
    if (T > m->config.T) die("--seq-len %d: %s has %d positions", T, m->dir, m->config.T);
    exits_listed(&a, o->layers, m->config.L);
    shards_open(&shards, o->val, T, m->config.V);
    if (shards.windows < rows + o->observe)
        die("%s has %lld rows of %d tokens, and --rows and --observe want %lld\n"
            "  hint: fewer of them, or a smaller --seq-len", o->val, (long long)shards.windows, T,
            (long long)(rows + o->observe));
    const EngineArgs args = {.B = (batch + T - 1) / T, .T = T, .threads = (int)o->threads,
                             .dtype = DTYPE_FP32, .cache = batch};
    load_model_as(m, engine_default(), &args);
    AdaptiveRun run = {.engine = m->engine, .model = m->model, .policy = &a, .config = &m->config,
                       .scale = m->scale, .tied = m->tied, .T = T,
                       .plan = drop_plan_new(m->config.L, batch)};
    ExitsRows other = exits_rows(&shards, (int)o->observe, rows, 1),
        tested = exits_rows(&shards, rows, (int)o->observe, 0);
    Progress progress = progress_begin("exits", (double)(rows + o->observe) * T);
    ExitsSeen seen = exits_observe(&run, &other, batch, &progress);
    if (a.confidence == CONFIDENCE_LEARNED) exits_learn(&a, &seen);
    ExitsScore full = exits_score(&run, &tested, batch, 1, &progress);
    progress_clear(&progress);
    if (!isfinite(full.loss)) die("%s: its loss is not finite", m->dir);
    printf("%s, %s, on %d rows of %d tokens of %s\n\n", m->dir, confidence_names[a.confidence],
           rows, T, o->val);
    print_seen(&seen, &a, &full);
    text_printf(&json, "[");
    const int passed = calibrate(&run, &a, &tested, &seen, o, &full, &json);
    text_printf(&json, "\n]\n");
    if (*o->json) file_write_whole(o->json, json.s, json.n);
    if (!passed)
        die("no threshold is certified to a risk of %g with error %g\n  hint: more --rows, or a "
            "larger --risk; %s is not written", o->risk, o->risk_error, o->out);
    adaptive_write(&file, &a);
    file_write_whole(o->out, file.s, file.n);
    printf("\nlambda %.4f changes at most %g%% of the most likely tokens, with probability %g: "
           "%s\n", a.lambda, 100 * o->risk, 1 - o->risk_error, o->out);
    exits_rows_free(&other), exits_rows_free(&tested), exits_seen_free(&seen);
    free(full.disagree), adaptive_free(&a), text_free(&json), text_free(&file);
    drop_plan_free(&run.plan), shards_close(&shards);
}

int main(int argc, char **argv) {
    ExitsOptions o;
    Options options;
    Loaded m;
    program_begin(argv);
    options_init(&options, "exits CHECKPOINT --val GLOB [options]");
    options.engine = engine_default_name();
    options_add(&options, exits_options(), &o);
    options.max_arguments = 1;
    options_parse(&options, argc, argv);
    if (options.n_arguments < 1)
        die("the checkpoint is missing\n  hint: exits runs/gpt/latest --val GLOB");
    if (!*o.val)
        die("--val is missing\n  hint: --val 'data/val_*.bin'; data/README.md tells how to make "
            "them");
    load_config(&m, options.arguments[0]);
    calibrate_model(&m, &o);
    load_close(&m);
    options_free(&options);
    if (fflush(stdout) || ferror(stdout)) die("cannot write the results: %s", strerror(errno));
    return 0;
}
