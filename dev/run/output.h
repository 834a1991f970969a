// output.h: the files of OUT beside its checkpoints, config.txt and metrics.jsonl, kept right while others rename, remove or
// replace what the run has open.
#ifndef OUTPUT_H
#define OUTPUT_H

#include "../files/files.h"
#include "run.h"

// ---- OUT: do its names still lead to what this run has open? ----

// PATH.what, or with a number after it if that is taken. From malloc.
static inline char *trainer_unused_name(const char *path, const char *what) {
    char *name = xprintf("%s.%s", path, what);
    for (int i = 2; path_exists(name); i++) {
        free(name);
        name = xprintf("%s.%s%d", path, what, i);
    }
    return name;
}

// OUT was renamed, replaced or removed. What is open is still this run's, wherever it is now: lines that
// wait are written. Returns an error, from malloc.
static inline char *trainer_lost_directory(Trainer *tr) {
    const char *out = tr->options->out;
    char link[64], now[4096] = "";
    free(metrics_file_flush(&tr->metrics));
    snprintf(link, sizeof link, "/proc/self/fd/%d", tr->directory);      // on Linux; elsewhere nothing tells
    const ssize_t n = readlink(link, now, sizeof now - 1);
    now[n > 0 ? n : 0] = 0;
    if (n > 0 && path_leads_to(now, tr->directory, 1) == PATH_SAME)
        return xprintf("%s is not this run's directory any more: that is %s now\n"
                       "  hint: --out %s --resume continues from its last whole checkpoint", out, now, now);
    return xprintf("%s is not this run's directory any more: that was removed or renamed\n"
                   "  hint: where it still exists, --out and --resume continue from its last whole checkpoint", out);
}

// .lock was removed or replaced: the lock is taken again, unless another process has it. Returns NULL, or
// an error, from malloc.
static inline char *trainer_lock_again(Trainer *tr) {
    const char *out = tr->options->out;
    int lock;
    char *taken = lock_take(&lock, out), *error = NULL;
    if (taken) error = xprintf("%s/.lock was removed or replaced, and %s", out, taken);
    else {
        warn("%s/.lock was removed or replaced: the run has taken the lock again", out);
        lock_release(&tr->lock);
        tr->lock = lock;
    }
    free(taken);
    return error;
}

// metrics.jsonl was removed or replaced: it is written again, with all lines, and what had its name is kept
// under another. Returns NULL, or an error, from malloc.
static inline char *trainer_restore_metrics(Trainer *tr, int replaced) {
    const char *path = tr->metrics.path;
    char *aside = replaced ? trainer_unused_name(path, "replaced") : NULL, *error = NULL;
    if (aside) error = file_try_rename(path, aside);
    if (!error) error = metrics_file_restore(&tr->metrics);
    if (!error)
        warn("%s was %s: it is written again%s%s", path, replaced ? "replaced" : "removed",
             aside ? "; what was there is now " : "", aside ? aside : "");
    free(aside);
    return error;
}

// Rank 0 calls this before it writes to OUT. Returns NULL, or, from malloc, why it must not be written to:
// for now or, with *ends, by this run any more, since OUT or its lock may be another run's.
static inline char *trainer_watch(Trainer *tr, int *ends) {
    const char *out = tr->options->out;
    *ends = 1;
    if (path_leads_to(out, tr->directory, 1) != PATH_SAME) return trainer_lost_directory(tr);
    char *path = xprintf("%s/.lock", out), *error = NULL;
    const int locked = tr->lock >= 0 && path_leads_to(path, tr->lock, 0) == PATH_SAME;
    const int log = tr->metrics.fd < 0 ? PATH_SAME : path_leads_to(tr->metrics.path, tr->metrics.fd, 0);
    if (!locked && log == PATH_OTHER)
        error = xprintf("%s is not locked by this run any more, and its metrics.jsonl is another: another run was "
                        "started there\n  hint: its files are left as they are; give one of the two another --out", out);
    else if (!locked && tr->lock >= 0) error = trainer_lock_again(tr);
    free(path);
    *ends = error != NULL;
    return error || log == PATH_SAME ? error : trainer_restore_metrics(tr, log == PATH_OTHER);
}

// ---- OUT: config.txt and metrics.jsonl ----

// A metrics.jsonl that is not what a run leaves is copied before it is mended: the run goes on with the lines that fit.
static inline void trainer_set_aside(const char *path, const FileMap *map, int64_t line, const char *wrong) {
    char *aside = trainer_unused_name(path, "damaged");
    file_replace(aside, map->data, map->size);
    warn("%s, line %lld: %s\n  hint: the run goes on with the lines that fit; all of it is kept as %s", path, (long long)line,
         wrong, aside);
    free(aside);
}

// Opens metrics.jsonl to append after step `done`: of an interrupted run, the lines of later steps give way, since those steps
// will be done again. `again`, if it is of a step, takes the place of the last line.
static inline void trainer_open_metrics(Trainer *tr, int64_t done, const Metrics *again) {
    const char *out = tr->options->out;
    char *path = xprintf("%s/metrics.jsonl", out), *config = xprintf("%s/config.txt", out);
    int ends;
    char *lost = trainer_watch(tr, &ends);
    if (lost) {
        lock_begun();                                    // what has these names is not to be removed
        die("%s", lost);
    }
    file_replace(config, tr->config_text, strlen(tr->config_text));
    lock_begun();
    const int own = done > 0 && !strcmp(tr->options->resume, "latest");   // no checkpoint is ahead of its metrics
    if (path_must_exist_or_not(path)) {
        Text kept = {NULL, 0, 0};
        FileMap map;
        Metrics last;
        size_t at;
        int64_t number;
        const char *error = file_map(&map, path);
        if (error) die("cannot read %s: %s", path, error);
        error = metrics_keep(&kept, (const char *)map.data, map.size, done, &last, &at, &number);
        if (!error && own && isnan(last.step)) error = "it has no line of the checkpoint's step or before";
        if (error) trainer_set_aside(path, &map, number, error);
        if (!isnan(again->step)) kept.n = at, metrics_write(&kept, again);
        file_replace(path, kept.s, kept.n);
        free((char *)(uintptr_t)last.plan);
        file_unmap(&map);
        text_free(&kept);
    } else if (own) warn("%s is gone: it begins again with step %lld", path, (long long)done + 1);
    metrics_file_open(&tr->metrics, path);
    free(path);
    free(config);
}

// A line that cannot be written waits for the next one, unless a failure is to end the run.
static inline void trainer_record(Trainer *tr, const Metrics *r) {
    int ends;
    metrics_write(&tr->metrics.waiting, r);
    char *error = trainer_watch(tr, &ends);
    if (ends) die("%s", error);
    if (!error) error = metrics_file_flush(&tr->metrics);
    if (error && tr->options->on_save_error == ON_ERROR_STOP)
        die("%s\n  hint: --resume continues from the last whole checkpoint", error);
    if (error && !tr->metrics_wait) warn("%s: its lines wait in memory until it can be", error);
    tr->metrics_wait = error != NULL;
    free(error);
}

#endif
