// output.h: the files of OUT other than its checkpoints: config.txt and metrics.jsonl. Keeps them
// correct while others rename, remove or replace files that the run has open.
#ifndef OUTPUT_H
#define OUTPUT_H

#include "../files/files.h"
#include "run.h"

// ---- OUT: do its paths still refer to the files that this run has open? ----

// PATH.what, followed by a number if that is taken. From malloc.
static inline char *trainer_unused_name(const char *path, const char *what) {
    char *name = xprintf("%s.%s", path, what);
    for (int i = 2; path_exists(name); i++) {
        free(name);
        name = xprintf("%s.%s%d", path, what, i);
    }
    return name;
}

// OUT was renamed, replaced or removed. The open files still belong to this run, wherever they are:
// pending lines are written. Returns an error, from malloc.
static inline char *trainer_lost_directory(Trainer *tr) {
    const char *out = tr->options->out;
    char link[64], now[4096] = "";
    free(metrics_file_flush(&tr->metrics));
    snprintf(link, sizeof link, "/proc/self/fd/%d", tr->directory);      // Linux only
    const ssize_t n = readlink(link, now, sizeof now - 1);
    now[n > 0 ? n : 0] = 0;
    if (n > 0 && path_leads_to(now, tr->directory, 1) == PATH_SAME)
        return xprintf("%s is no longer this run's directory, which is now %s\n"
                       "  hint: --out %s --resume continues from its last complete checkpoint", out,
                       now, now);
    return xprintf("%s is no longer this run's directory, which was removed or renamed\n"
                   "  hint: if it still exists, --out and --resume continue from its last complete "
                   "checkpoint", out);
}

// .lock was removed or replaced: takes the lock again, unless another process holds it. Returns
// NULL, or an error from malloc.
static inline char *trainer_lock_again(Trainer *tr) {
    const char *out = tr->options->out;
    int lock;
    char *taken = lock_take(&lock, out), *error = NULL;
    if (taken) error = xprintf("%s/.lock was removed or replaced, and %s", out, taken);
    else {
        warn("%s/.lock was removed or replaced: the run has locked it again", out);
        lock_release(&tr->lock);
        tr->lock = lock;
    }
    free(taken);
    return error;
}

// metrics.jsonl was removed or replaced: writes it again with all its lines, and moves aside what
// has its name. Returns NULL, or an error from malloc.
static inline char *trainer_restore_metrics(Trainer *tr, int replaced) {
    const char *path = tr->metrics.path;
    char *aside = replaced ? trainer_unused_name(path, "replaced") : NULL, *error = NULL;
    if (aside) error = file_try_rename(path, aside);
    if (!error) error = metrics_file_restore(&tr->metrics);
    if (!error)
        warn("%s was %s and has been restored%s%s", path, replaced ? "replaced" : "removed",
             aside ? "; the replacement is now " : "", aside ? aside : "");
    free(aside);
    return error;
}

// Rank 0 calls this before it writes to OUT. Returns NULL or, from malloc, why it must not write
// now or, with *ends, ever again, because OUT or its lock may belong to another run.
static inline char *trainer_watch(Trainer *tr, int *ends) {
    const char *out = tr->options->out;
    *ends = 1;
    if (path_leads_to(out, tr->directory, 1) != PATH_SAME) return trainer_lost_directory(tr);
    char *path = xprintf("%s/.lock", out), *error = NULL;
    const int locked = tr->lock >= 0 && path_leads_to(path, tr->lock, 0) == PATH_SAME;
    const int log = tr->metrics.fd < 0 ? PATH_SAME : path_leads_to(tr->metrics.path, tr->metrics.fd,
                                                                   0);
    if (!locked && log == PATH_OTHER)
        error = xprintf("%s is no longer locked by this run, and its metrics.jsonl was replaced: "
                        "another run was started there\n  hint: its files are left alone; choose "
                        "another --out for one of the two", out);
    else if (!locked && tr->lock >= 0) error = trainer_lock_again(tr);
    free(path);
    *ends = error != NULL;
    return error || log == PATH_SAME ? error : trainer_restore_metrics(tr, log == PATH_OTHER);
}

// ---- OUT: config.txt and metrics.jsonl ----

// A metrics.jsonl that no run would write is copied before it is repaired: the run continues with
// the valid lines.
static inline void trainer_set_aside(const char *path, const FileMap *map, int64_t line,
                                     const char *wrong) {
    char *aside = trainer_unused_name(path, "damaged");
    file_replace(aside, map->data, map->size);
    warn("%s, line %lld: %s\n  hint: the run continues with the valid lines; the original is saved "
         "as %s", path, (long long)line, wrong, aside);
    free(aside);
}

// Opens metrics.jsonl to append after step `done`: lines of later steps of an interrupted run are
// dropped, since those steps will be repeated. `again`, if it has a step, replaces the last line.
static inline void trainer_open_metrics(Trainer *tr, int64_t done, const Metrics *again) {
    const char *out = tr->options->out;
    char *path = xprintf("%s/metrics.jsonl", out), *config = xprintf("%s/config.txt", out);
    int ends;
    char *lost = trainer_watch(tr, &ends);
    if (lost) {
        // files with these names must not be removed
        lock_begun();
        die("%s", lost);
    }
    file_replace(config, tr->config_text, strlen(tr->config_text));
    lock_begun();
    // metrics are synced before each checkpoint
    const int own = done > 0 && !strcmp(tr->options->resume, "latest");
    if (path_must_exist_or_not(path)) {
        Text kept = {NULL, 0, 0};
        FileMap map;
        Metrics last;
        size_t at;
        int64_t number;
        const char *error = file_map(&map, path);
        if (error) die("cannot read %s: %s", path, error);
        error = metrics_keep(&kept, (const char *)map.data, map.size, done, &last, &at, &number);
        if (!error && own && isnan(last.step))
            error = "it has no line for the checkpoint's step or an earlier one";
        if (error) trainer_set_aside(path, &map, number, error);
        if (!isnan(again->step)) kept.n = at, metrics_write(&kept, again);
        file_replace(path, kept.s, kept.n);
        metrics_free(&last);
        file_unmap(&map);
        text_free(&kept);
    } else if (own) warn("%s is missing: it now starts at step %lld", path, (long long)done + 1);
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
        die("%s\n  hint: --resume continues from the last complete checkpoint", error);
    if (error && !tr->metrics_wait)
        warn("%s: its lines stay in memory until they can be written", error);
    tr->metrics_wait = error != NULL;
    free(error);
}

#endif
