// metrics.h: one record per optimizer step: a line of OUT/metrics.jsonl for programs, and a console
// line for people.
#ifndef METRICS_H
#define METRICS_H

#include "../check.h"
#include "../files/files.h"
#include "../files/json.h"
#include "../model/layer_list.h"
#include <math.h>
#include <sys/ioctl.h>

// Names are stable. A value that a step does not have (NaN) is omitted from its line.
#define METRICS(X)                                                                            \
    X(step)             /* optimizer steps done, this one included: 1, 2, ... */              \
    X(tokens)           /* tokens trained on so far */                                        \
    X(loss)             /* mean training loss of the step, nats per token */                  \
    X(nll)              /* -log p of the targets alone, where the loss is more than that */   \
    X(exit_loss)        /* weighted mean of the losses read at the step's exits, below the top */ \
    X(consistency)      /* divergence of the two passes of --consistency */                   \
    X(distill)          /* temperature^2 KL(teacher || student) of --distill */               \
    X(align_loss)       /* mean distance of --align, by the branches' scale */                \
    X(align_cos)        /* mean cosine of both models' attention, of what was compared */     \
    X(lr)                                                                                     \
    X(grad_norm)        /* before clipping */                                                 \
    X(loss_z)           /* z-scores, see numbers.h; with --skip-loss-zscore, */               \
    X(norm_z)           /* --skip-norm-zscore */                                              \
    X(skipped)          /* why the weights stayed: SKIPPED_*; left out where they did not */  \
    X(val_loss)         /* nats per token, after the step; only where evaluated */            \
    X(val_ppl)          /* exp(val_loss) */                                                   \
    X(val_bpb)          /* bits per byte of text; only with a tokenizer */                    \
    X(attn_entropy)     /* of attention's probabilities, nats; with --record-entropy */       \
    X(drop_p)           /* drop rate of the last layer */                                     \
    X(kept_attn)        /* fraction of (row, layer) pairs whose attention branch ran */       \
    X(kept_mlp)                                                                               \
    X(layers)           /* of a run with --grow: how many there are */                        \
    X(flops)            /* of the step's matrix products, forward and backward, executed */   \
    X(flops_fraction)   /* of what a step costs without drop path and --grow */                \
    X(ms)               /* of the step, without evaluation and saving */                      \
    X(tok_per_s)                                                                              \
    X(mfu)              /* flops per second as a fraction of the machine's measured peak */   \
    X(peak_bytes)       /* largest resident memory of the process so far */

// For a step that changed nothing: its loss or gradient was not finite, or its loss or gradient
// norm was a spike.
enum { SKIPPED_BAD = 1, SKIPPED_LOSS, SKIPPED_NORM };

// The validation loss with a share of the layers (--eval-depths), for both ways to choose them:
// "val_prefix_0.5" and "val_even_0.5" in the file.
typedef struct { double share, loss[KEEP_KINDS]; } MetricsDepth;

typedef struct {
#define X(name) double name;
    METRICS(X)
#undef X
    const char *plan;   // the step's plans, as written by drop_plan_write; NULL: none
    const double *micro;                                 // (micros) each micro-batch's loss; NULL:
                                                         // not recorded
    const MetricsDepth *depth;                           // (depths) ascending; NULL: not evaluated
    int micros, depths;
} Metrics;

// A record in which every number is NaN: nothing known yet.
static inline Metrics metrics_new(void) {
    Metrics r;
#define X(name) r.name = NAN;
    METRICS(X)
#undef X
    r.plan = NULL, r.micro = NULL, r.depth = NULL, r.micros = r.depths = 0;
    return r;
}

// Frees what metrics_parse has allocated.
static inline void metrics_free(const Metrics *r) {
    free((void *)(uintptr_t)r->plan);
    free((void *)(uintptr_t)r->micro);
    free((void *)(uintptr_t)r->depth);
}

// Appends the losses by depth as members of an object, each after a comma.
static inline void metrics_write_depths(Text *out, const MetricsDepth *depth, int n) {
    for (int i = 0; i < n * KEEP_KINDS; i++) {
        const MetricsDepth *d = &depth[i / KEEP_KINDS];
        if (!isfinite(d->loss[i % KEEP_KINDS])) continue;
        text_printf(out, ", \"val_%s_%g\": ", keep_kind_name[i % KEEP_KINDS], d->share);
        json_write_number(out, d->loss[i % KEEP_KINDS]);
    }
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
    metrics_write_depths(line, r->depth, r->depths);     // a record has a step, so not the first
    if (r->plan) {
        text_printf(line, "%s\"plan\": ", comma);
        json_write_string(line, r->plan);
    }
    for (int i = 0; i < r->micros; i++) {
        text_printf(line, i ? ", " : "%s\"micro\": [", comma);
        if (isfinite(r->micro[i])) json_write_number(line, r->micro[i]);
        else text_printf(line, "null");
    }
    text_printf(line, r->micros ? "]}\n" : "}\n");
}

// The values of "micro", from malloc; NaN for those that are not numbers.
static inline const double *metrics_parse_micro(const Json *doc, int *n) {
    const int array = json_get(doc, 0, "micro");
    *n = json_type(doc, array) == JSON_ARRAY ? json_count(doc, array) : 0;
    if (!*n) return NULL;
    double *micro = (double *)xcalloc((size_t)*n, sizeof *micro);
    for (int i = 0, k = json_first(doc, array); k >= 0; i++, k = json_next(doc, k)) {
        micro[i] = NAN;
        json_number(doc, k, &micro[i]);
    }
    return micro;
}

// The losses by depth among the members of an object, from malloc; NaN for those that are missing.
static inline const MetricsDepth *metrics_parse_depths(const Json *doc, int *n) {
    MetricsDepth *depth = NULL;
    *n = 0;
    for (int k = json_first(doc, 0); k >= 0; k = json_next(doc, k)) {
        const int size = doc->node[k].end - doc->node[k].begin;
        const char *key = doc->text + doc->node[k].begin;
        for (int kind = 0; kind < KEEP_KINDS; kind++) {
            char *name = xprintf("val_%s_", keep_kind_name[kind]), *text = NULL;
            const int skip = (int)strlen(name);
            double share, loss;
            if (size > skip && size < 64 && !strncmp(key, name, (size_t)skip))
                text = xprintf("%.*s", size - skip, key + skip);
            const char *end = text ? depth_share_read(&share, text) : NULL;
            if (end && !*end && json_number(doc, k + 1, &loss)) {
                int at = 0;
                while (at < *n && depth[at].share < share) at++;
                if ((at == *n || depth[at].share != share) && *n < DEPTH_SHARES) {
                    const MetricsDepth none = {share, {NAN, NAN}};
                    depth = (MetricsDepth *)xrealloc(depth, (size_t)*n + 1, sizeof *depth);
                    memmove(depth + at + 1, depth + at, (size_t)(*n - at) * sizeof *depth);
                    depth[at] = none, ++*n;
                }
                if (at < *n && depth[at].share == share) depth[at].loss[kind] = loss;
            }
            free(name), free(text);
        }
    }
    return depth;
}

// The loss with that share of the layers; NaN where there is none.
static inline double metrics_depth_loss(const MetricsDepth *depth, int n, int kind, double share) {
    for (int i = 0; i < n; i++)
        if (depth[i].share == share) return depth[i].loss[kind];
    return NAN;
}

// Parses one line (n bytes). Returns NULL, or what is wrong. `plan`, `micro` and `depth` are from
// malloc and belong to the caller: metrics_free.
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
        r->micro = metrics_parse_micro(&doc, &r->micros);
        r->depth = metrics_parse_depths(&doc, &r->depths);
        if (!(r->step >= 1)) error = "it has no step";
    }
    json_free(&doc);
    return error;
}

typedef struct { Metrics *record; int64_t n; } MetricsLog;

static inline void metrics_log_free(MetricsLog *log) {
    for (int64_t i = 0; i < log->n; i++) metrics_free(&log->record[i]);
    free(log->record);
    log->record = NULL;
    log->n = 0;
}

// Parses a metrics.jsonl of `size` bytes at mem. An incomplete last line is ignored: a run was
// killed while writing it. Returns NULL, or what is wrong with line log->n; in either case the
// caller frees the log.
static inline const char *metrics_log_parse(MetricsLog *log, const void *mem, size_t size) {
    const char *at = (const char *)mem, *end = size ? at + size : at;
    int64_t capacity = 0;
    log->record = NULL;
    log->n = 0;
    while (at < end) {
        const char *newline = (const char *)memchr(at, '\n', (size_t)(end - at));
        if (!newline) break;
        if (log->n == capacity)
            log->record = (Metrics *)xrealloc(log->record, (size_t)(capacity = 2 * capacity + 64),
                                              sizeof *log->record);
        const char *error = metrics_parse(&log->record[log->n++], at, (size_t)(newline - at));
        if (error) return error;
        at = newline + 1;
    }
    return NULL;
}

// Reads a whole file, or dies.
static inline MetricsLog metrics_read(const char *path) {
    MetricsLog log;
    FileMap map;
    const char *error = file_map(&map, path);
    if (error) die("cannot read %s: %s", path, error);
    if ((error = metrics_log_parse(&log, map.data, map.size)))
        die("%s, line %lld: %s", path, (long long)log.n, error);
    file_unmap(&map);
    return log;
}

// ---- The file of a run in progress: lines are appended; unwritable ones wait and go first ----

typedef struct {
    int fd;                                              // -1: not open
    char *path;
    Text waiting;
} MetricsFile;

static inline void metrics_file_open(MetricsFile *f, const char *path) {
    f->path = xstrdup(path);
    f->fd = disk_open(path, O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC);
    if (f->fd < 0) die("cannot open %s: %s", path, strerror(errno));
}

// Writes what is pending. A short write is continued where it ended, so no line is lost, torn or
// duplicated. Returns NULL or, from malloc, why something is left.
static inline char *metrics_file_flush(MetricsFile *f) {
    while (f->waiting.n) {
        const ssize_t n = disk_write(f->fd, f->path, f->waiting.s, f->waiting.n);
        if (n < 0) return xprintf("cannot write %s: %s", f->path, strerror(errno));
        f->waiting.n -= (size_t)n;
        memmove(f->waiting.s, f->waiting.s + n, f->waiting.n);
    }
    return NULL;
}

// The same, and syncs the file to disk.
static inline char *metrics_file_sync(MetricsFile *f) {
    char *error = metrics_file_flush(f);
    if (!error && disk_sync(f->fd, f->path) && errno != EINVAL)
        error = xprintf("cannot write %s: %s", f->path, strerror(errno));
    return error;
}

// Recreates the file under its name, which no longer refers to the open file; that one still has
// all lines. Returns NULL or, from malloc, why it could not; then nothing has changed.
static inline char *metrics_file_restore(MetricsFile *f) {
    char block[1 << 14], *error = NULL;
    Text all = {NULL, 0, 0};
    ssize_t n;
    while ((n = pread(f->fd, block, sizeof block, (off_t)all.n)) > 0)
        text_append(&all, block, (size_t)n);
    if (n < 0) error = xprintf("cannot read what %s was: %s", f->path, strerror(errno));
    if (!error) error = file_try_replace(f->path, all.s, all.n);
    text_free(&all);
    if (error) return error;
    const int fd = disk_open(f->path, O_RDWR | O_APPEND | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0) return xprintf("cannot open %s: %s", f->path, strerror(errno));
    close(f->fd);
    f->fd = fd;
    return NULL;
}

static inline void metrics_file_close(MetricsFile *f) {
    if (f->fd >= 0) close(f->fd);
    text_free(&f->waiting);
    free(f->path);
    f->path = NULL;
    f->fd = -1;
}

// Appends to kept the lines of a metrics.jsonl (size) up to that of step `done`, from which an
// interrupted run resumes; later lines are not examined. *last is the record of that step, owned by
// the caller, and *at the offset of its line in kept; empty if there is none. Returns
// NULL, or the first problem, in line *number: steps must be consecutive, starting anywhere. Lines
// that do not fit are dropped.
static inline const char *metrics_keep(Text *kept, const char *text, size_t size, int64_t done,
                                       Metrics *last, size_t *at, int64_t *number) {
    const char *wrong = NULL, *end = size ? text + size : text;
    double before = 0;                                   // the step of the last line kept
    *last = metrics_new();
    *at = kept->n;
    for (*number = 1; before < (double)done; text++) {
        const char *newline = text < end ? (const char *)memchr(text, '\n', (size_t)(end - text))
            : NULL;
        if (!newline) break;                             // an incomplete line does not count
        Metrics r;
        const char *error = metrics_parse(&r, text, (size_t)(newline - text));
        if (!error && before == 0 && r.step > (double)done) {
            metrics_free(&r);
            return wrong;                                // it begins with later steps
        }
        const int fits = !error && r.step > before && r.step <= (double)done;
        if (!error && before > 0 && r.step != before + 1)
            error = "its step does not follow that of the previous line";
        if (fits) {
            *at = kept->n;
            text_append(kept, text, (size_t)(newline - text) + 1);
            before = r.step;
        }
        if (fits && r.step == (double)done) *last = r;
        else metrics_free(&r);
        if (!wrong) wrong = error;
        if (!wrong) ++*number;
        text = newline;
    }
    if (!wrong && before > 0 && before < (double)done)
        wrong = "it ends before the step of the checkpoint";
    return wrong;
}

// "1m06s", "3h20m", "2d04h"
static inline void metrics_duration(char text[32], double seconds) {
    long long s = seconds < 0 || isnan(seconds) ? 0 : seconds > 1e15 ? (long long)1e15
        : (long long)(seconds + 0.5);
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

// ---- The console ----

// The columns of a line, each preceded by its separator: " | ", or " " if it belongs to the
// previous column. On a narrow terminal the columns of the highest rank are dropped first; those of
// rank 0 are always printed.
enum { METRICS_COLUMNS = 12 };
typedef struct { int n, rank[METRICS_COLUMNS]; char *text[METRICS_COLUMNS]; } MetricsLine;

static inline void PRINTF_LIKE(3, 4) metrics_column(MetricsLine *line, int rank, const char *format,
                                                    ...) {
    int length;
    va_list args;
    va_start(args, format);
    CHECK(line->n < METRICS_COLUMNS, "more than %d columns", METRICS_COLUMNS);
    line->text[line->n] = xprintf_v(&length, format, args);
    line->rank[line->n++] = rank;
    va_end(args);
}

// Appends the columns that fit in `width` characters, chosen by rank, in their order; frees them.
// Width 0: all.
static inline void metrics_fit(Text *out, MetricsLine *line, int width) {
    int taken[METRICS_COLUMNS] = {0}, used = 0;
    for (int rank = 0; rank < METRICS_COLUMNS; rank++)
        for (int i = 0; i < line->n; i++) {
            const int length = (int)strlen(line->text[i]);
            const int adds = rank && line->text[i][1] != '|';
            if (line->rank[i] != rank || (adds && !taken[i - 1])) continue;
            if (width && rank && used + length > width) continue;
            taken[i] = 1, used += length;
        }
    for (int i = 0; i < line->n; i++) {
        if (taken[i]) text_append(out, line->text[i], strlen(line->text[i]));
        free(line->text[i]);
    }
    text_append(out, "\n", 1);
}

// The width of the terminal on standard output; 0: not a terminal, or unknown.
static inline int metrics_width(void) {
    struct winsize size;
    const char *columns = getenv("COLUMNS");
    if (!isatty(STDOUT_FILENO)) return 0;
    const long given = columns ? strtol(columns, NULL, 10) : 0;
    if (given > 0 && given < 10000) return (int)given;
    return ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) ? 0 : size.ws_col;
}

// Appends the console line of a step, after `label`, and a second line if it was evaluated; `kept`
// has one character per layer (see console.h).
static inline void metrics_lines(Text *out, const Metrics *r, const char *label, double steps,
                                 const char *kept, double seconds_left, int width) {
    MetricsLine step = {0, {0}, {NULL}}, val = {0, {0}, {NULL}};
    char left[32], rate[32];
    metrics_duration(left, seconds_left);
    metrics_grouped(rate, r->tok_per_s);
    metrics_column(&step, 0, "%sstep %*.0f/%.0f", label, snprintf(NULL, 0, "%.0f", steps), r->step,
                   steps);
    metrics_column(&step, 0, " | loss %7.4f", r->loss);
    metrics_column(&step, 9, " | lr %.2e", r->lr);
    metrics_column(&step, 4, " | norm %6.3f", r->grad_norm);
    metrics_column(&step, 3, " | drop %.3f", r->drop_p);
    metrics_column(&step, 5, " [%s]", kept);
    metrics_column(&step, 7, " | flops %3.0f%%", 100 * r->flops_fraction);
    metrics_column(&step, 8, " | %.1f ms", r->ms);
    metrics_column(&step, 2, " | %s tok/s", rate);
    metrics_column(&step, 6, " | mfu %2.0f%%", 100 * r->mfu);
    metrics_column(&step, 1, " | %s left", left);
    metrics_fit(out, &step, width);
    if (isnan(r->val_loss)) return;
    metrics_column(&val, 0, "%sstep %.0f/%.0f | val loss %.4f", label, r->step, steps, r->val_loss);
    metrics_column(&val, 1, " | perplexity %.3f", r->val_ppl);
    if (!isnan(r->val_bpb)) metrics_column(&val, 2, " | %.4f bits per byte", r->val_bpb);
    for (int kind = 0; r->depths && kind < KEEP_KINDS; kind++) {
        Text depths = {NULL, 0, 0};
        for (int i = 0; i < r->depths; i++)
            text_printf(&depths, "%s %g%% %.4f", i ? "," : "", 100 * r->depth[i].share,
                        r->depth[i].loss[kind]);
        metrics_column(&val, 3 + kind, " | %s%s", keep_kind_name[kind], depths.s);
        text_free(&depths);
    }
    metrics_fit(out, &val, width);
}

// Prints them, fitted to the terminal's width.
static inline void metrics_print(const Metrics *r, const char *label, double steps,
                                 const char *kept, double seconds_left) {
    Text lines = {NULL, 0, 0};
    metrics_lines(&lines, r, label, steps, kept, seconds_left, metrics_width());
    fputs(lines.s, stdout);
    fflush(stdout);
    text_free(&lines);
}

#endif
