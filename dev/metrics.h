// metrics.h: one record per optimizer step: a line of OUT/metrics.jsonl for programs, a line on the console for people.
#ifndef METRICS_H
#define METRICS_H

#include "check.h"
#include "json.h"
#include <math.h>

// Stable names. A number that a step does not have (NaN) is left out of its line.
#define METRICS(X)                                                                            \
    X(step)             /* optimizer steps done, this one included: 1, 2, ... */              \
    X(tokens)           /* tokens trained on so far */                                        \
    X(loss)             /* mean training loss of the step, nats per token */                  \
    X(lr)                                                                                     \
    X(grad_norm)        /* before clipping */                                                 \
    X(loss_z)           /* z-scores, see numbers.h; with --skip-loss-zscore, */               \
    X(norm_z)           /* --skip-norm-zscore */                                              \
    X(skipped)          /* why the weights stayed: SKIPPED_*; left out where they did not */  \
    X(val_loss)         /* nats per token, after the step; only where evaluated */            \
    X(val_ppl)          /* exp(val_loss) */                                                   \
    X(val_bpb)          /* bits per byte of text; only with a tokenizer */                    \
    X(drop_p)           /* drop rate of the last layer */                                     \
    X(kept_attn)        /* fraction of (row, layer) pairs whose attention branch ran */       \
    X(kept_mlp)                                                                               \
    X(flops)            /* of the step's matrix products, forward and backward, executed */   \
    X(flops_fraction)   /* of what the step costs without drop path */                        \
    X(ms)               /* of the step, without evaluation and saving */                      \
    X(tok_per_s)                                                                              \
    X(mfu)              /* flops per second as a fraction of the machine's measured peak */   \
    X(peak_bytes)       /* largest resident memory of the process so far */

// Of a step that changed nothing: its loss or gradient was not finite, or its loss or its gradient norm was a spike.
enum { SKIPPED_BAD = 1, SKIPPED_LOSS, SKIPPED_NORM };

typedef struct {
#define X(name) double name;
    METRICS(X)
#undef X
    const char *plan;   // the step's plans, as drop_plan_write wrote them; NULL: none
} Metrics;

// A record whose every number is NaN: nothing known yet.
static inline Metrics metrics_new(void) {
    Metrics r;
#define X(name) r.name = NAN;
    METRICS(X)
#undef X
    r.plan = NULL;
    return r;
}

// Appends the record as one line of JSON.
static inline void metrics_write(Text *line, const Metrics *r) {
    const char *comma = "{";
#define X(name)                                   \
    if (!isnan(r->name)) {                        \
        text_printf(line, "%s\"" #name "\": ", comma); \
        json_write_number(line, r->name);         \
        comma = ", ";                             \
    }
    METRICS(X)
#undef X
    if (r->plan) {
        text_printf(line, "%s\"plan\": ", comma);
        json_write_string(line, r->plan);
    }
    text_printf(line, "}\n");
}

// Reads one line (n bytes) back. Returns NULL or what is wrong. `plan` points into malloc'ed memory: the caller's to free.
static inline const char *metrics_parse(Metrics *r, const char *line, size_t n) {
    Json doc;
    *r = metrics_new();
    const char *error = json_parse(&doc, line, n) ? "it is not a whole line of JSON" : NULL;
    if (!error && json_type(&doc, 0) != JSON_OBJECT) error = "it is not an object";
    if (!error) {
#define X(name) json_number(&doc, json_get(&doc, 0, #name), &r->name);
        METRICS(X)
#undef X
        int plan = json_get(&doc, 0, "plan");
        if (json_type(&doc, plan) == JSON_STRING) r->plan = json_string(&doc, plan, NULL);
        if (!(r->step >= 1)) error = "it has no step";
    }
    json_free(&doc);
    return error;
}

typedef struct { Metrics *record; int64_t n; } MetricsLog;

static inline void metrics_log_free(MetricsLog *log) {
    for (int64_t i = 0; i < log->n; i++) free((char *)(uintptr_t)log->record[i].plan);
    free(log->record);
    log->record = NULL;
    log->n = 0;
}

// Reads a whole metrics.jsonl. A torn last line, without its newline, is passed over: a run was killed while writing.
// Dies when the file cannot be read or another line is damaged.
static inline MetricsLog metrics_read(const char *path) {
    MetricsLog log = {NULL, 0};
    FileMap map;
    const char *error = file_map(&map, path);
    if (error) die("cannot read %s: %s", path, error);
    const char *at = (const char *)map.data, *end = at + map.size;
    for (int64_t room = 0, number = 1; at < end; number++) {
        const char *newline = (const char *)memchr(at, '\n', (size_t)(end - at));
        if (!newline) break;
        if (log.n == room) log.record = (Metrics *)xrealloc(log.record, (size_t)(room = 2 * room + 64), sizeof *log.record);
        error = metrics_parse(&log.record[log.n++], at, (size_t)(newline - at));
        if (error) die("%s, line %lld: %s", path, (long long)number, error);
        at = newline + 1;
    }
    file_unmap(&map);
    return log;
}

// "1m06s", "3h20m", "2d04h"
static inline void metrics_duration(char text[32], double seconds) {
    long long s = seconds < 0 || isnan(seconds) ? 0 : seconds > 1e15 ? (long long)1e15 : (long long)(seconds + 0.5);
    if (s < 60) snprintf(text, 32, "%llds", s);
    else if (s < 3600) snprintf(text, 32, "%lldm%02llds", s / 60, s % 60);
    else if (s < 86400) snprintf(text, 32, "%lldh%02lldm", s / 3600, s / 60 % 60);
    else snprintf(text, 32, "%lldd%02lldh", s / 86400, s / 3600 % 24);
}

// "1,234,567"
static inline void metrics_grouped(char text[32], double x) {
    char digits[32];
    int n = snprintf(digits, sizeof digits, "%.0f", x < 1e15 ? x : 1e15), k = 0;
    for (int i = 0; i < n; i++) {
        if (i && (n - i) % 3 == 0) text[k++] = ',';
        text[k++] = digits[i];
    }
    text[k] = 0;
}

// The console's line of a step, after `label`; `kept` has one character per layer (see trainer.h).
static inline void metrics_print(const Metrics *r, const char *label, double steps, const char *kept, double seconds_left) {
    char left[32], rate[32];
    metrics_duration(left, seconds_left);
    metrics_grouped(rate, r->tok_per_s);
    printf("%sstep %*.0f/%.0f | loss %7.4f | lr %.2e | norm %6.3f | drop %.3f [%s] | flops %3.0f%% | %.1f ms | %s tok/s | "
           "mfu %2.0f%% | %s left\n", label, snprintf(NULL, 0, "%.0f", steps), r->step, steps, r->loss, r->lr, r->grad_norm,
           r->drop_p, kept, 100 * r->flops_fraction, r->ms, rate, 100 * r->mfu, left);
    if (!isnan(r->val_loss)) {
        printf("%sstep %.0f/%.0f | val loss %.4f | perplexity %.3f", label, r->step, steps, r->val_loss, r->val_ppl);
        if (!isnan(r->val_bpb)) printf(" | %.4f bits per byte", r->val_bpb);
        printf("\n");
    }
    fflush(stdout);
}

#endif
