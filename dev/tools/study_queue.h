// study_queue.h: the runs of a study, worked off by any number of processes on any number of
// machines that see its directory.
//
//     RESULTS/KEY.json    one line: the result of a finished run
//     RESULTS/origin.txt  what keys depend on beside the plan: with it the report needs nothing
//                         else, neither the data nor a machine of the same kind
//     OUT/claims/KEY/     a run that a process does: made by a rename, which one of several wins;
//                         `owner` is touched as a sign of life. A process that finds it stale
//                         renames it, which again one of several wins
//     OUT/runs/KEY/       the run under way; whoever takes it over resumes its last checkpoint
//
// What is to be done follows from the plan and the results alone: processes do not signal each
// other.
#ifndef STUDY_QUEUE_H
#define STUDY_QUEUE_H

#include "study_plan.h"
#include <dirent.h>
#include <utime.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

// ---- Results ----

enum { RESULT_OK, RESULT_DIVERGED };

typedef struct {
    char key[STUDY_KEY], bits[SHA256_HEX];
    int status, points, depths;
    double steps, tokens, flops, val_loss, val_bpb, seconds;
    double *curve;                                       // (points, 2) FLOPs and val_loss
    const MetricsDepth *depth;                           // (depths) val_loss by depth
    char *options, *commit, *machine;
} StudyResult;

typedef struct { StudyResult *result; int n; } StudyResults;

static inline void study_result_free(StudyResult *r) {
    free((void *)(uintptr_t)r->depth), free(r->curve);
    free(r->options), free(r->commit), free(r->machine);
}

static inline void study_results_free(StudyResults *all) {
    for (int i = 0; i < all->n; i++) study_result_free(&all->result[i]);
    free(all->result);
    memset(all, 0, sizeof *all);
}

static inline const StudyResult *study_result(const StudyResults *all, const char *key) {
    for (int i = 0; i < all->n; i++)
        if (!strcmp(all->result[i].key, key)) return &all->result[i];
    return NULL;
}

static inline void study_json_text(const Json *doc, const char *key, char *to, size_t size) {
    char *s = json_string(doc, json_get(doc, 0, key), NULL);
    snprintf(to, size, "%s", s ? s : "");
    free(s);
}

// Reads one line. Returns NULL, or what is wrong; then nothing is to be freed.
static inline const char *study_result_parse(StudyResult *r, const char *line, size_t n) {
    Json doc;
    char status[16], format[32];
    memset(r, 0, sizeof *r);
    if (json_parse(&doc, line, n)) return "it is not a whole line of JSON";
    study_json_text(&doc, "format", format, sizeof format);
    study_json_text(&doc, "status", status, sizeof status);
    study_json_text(&doc, "key", r->key, sizeof r->key);
    study_json_text(&doc, "bits", r->bits, sizeof r->bits);
    r->status = strcmp(status, "ok") ? RESULT_DIVERGED : RESULT_OK;
    const struct {
        const char *name;
        double *to;
    } number[] = {{"steps", &r->steps},       {"tokens", &r->tokens},   {"flops", &r->flops},
                  {"val_loss", &r->val_loss}, {"val_bpb", &r->val_bpb}, {"seconds", &r->seconds}};
    for (size_t i = 0; i < sizeof number / sizeof number[0]; i++) {
        *number[i].to = NAN;
        json_number(&doc, json_get(&doc, 0, number[i].name), number[i].to);
    }
    const int curve = json_get(&doc, 0, "curve");
    r->curve = (double *)xcalloc(2 * (size_t)json_count(&doc, curve) + 1, sizeof(double));
    for (int k = json_type(&doc, curve) == JSON_ARRAY ? json_first(&doc, curve) : -1; k >= 0;
         k = json_next(&doc, k)) {
        const int x = json_first(&doc, k);
        double *to = r->curve + 2 * r->points;
        if (json_count(&doc, k) == 2 && json_number(&doc, x, to) &&
            json_number(&doc, json_next(&doc, x), to + 1))
            r->points++;
    }
    r->depth = metrics_parse_depths(&doc, &r->depths);
    r->options = json_string(&doc, json_get(&doc, 0, "options"), NULL);
    r->commit = json_string(&doc, json_get(&doc, 0, "commit"), NULL);
    r->machine = json_string(&doc, json_get(&doc, 0, "machine"), NULL);
    const char *error = strcmp(format, "droppath.c run 1")
                            ? "its format is not \"droppath.c run 1\""
                        : strlen(r->key) != STUDY_KEY - 1 ? "it has no key"
                        : strcmp(status, "ok") && strcmp(status, "diverged")
                            ? "its status is neither ok nor diverged"
                        : r->status == RESULT_OK && !(isfinite(r->val_loss) && r->flops > 0)
                            ? "it has no loss or no FLOPs"
                            : NULL;
    if (error) study_result_free(r);
    json_free(&doc);
    return error;
}

// Hands every line of a file to `take`, which returns NULL, or what is wrong with it.
static inline void study_each_line(const char *path, void *self,
                                   const char *(*take)(void *self, const char *line, size_t n)) {
    FileMap map;
    const char *wrong = file_map(&map, path), *at = (const char *)map.data;
    if (wrong) die("cannot read %s: %s", path, wrong);
    for (const char *end = map.size ? at + map.size : at; at < end;) {
        const char *feed = (const char *)memchr(at, '\n', (size_t)(end - at)),
                   *stop = feed ? feed : end;
        const char *error = at == stop ? NULL : take(self, at, (size_t)(stop - at));
        if (error) die("%s: %s\n  hint: remove that line, and the run is done again", path, error);
        at = stop + (feed != NULL);
    }
    file_unmap(&map);
}

// The lines of a folder's files *.json and *.jsonl; no folder is an empty one.
static inline void study_each_file(const char *dir, void *self,
                                   const char *(*take)(void *self, const char *line, size_t n)) {
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
        const char *dot = strrchr(e->d_name, '.');
        if (*e->d_name == '.' || !dot || (strcmp(dot, ".json") && strcmp(dot, ".jsonl"))) continue;
        char *path = xprintf("%s/%s", dir, e->d_name);
        if (path_exists(path)) study_each_line(path, self, take);
        free(path);
    }
    if (d) closedir(d);
}

static inline const char *study_results_take(void *self, const char *line, size_t n) {
    StudyResults *all = (StudyResults *)self;
    StudyResult r;
    const char *error = study_result_parse(&r, line, n);
    if (error) return error;
    all->result = (StudyResult *)xrealloc(all->result, (size_t)(all->n + 1), sizeof *all->result);
    all->result[all->n++] = r;
    return NULL;
}

// The results, again from the start.
static inline void study_results_read(StudyResults *all, const char *dir) {
    study_results_free(all);
    study_each_file(dir, all, study_results_take);
}

// ---- What is to be done ----

typedef struct { int done, worse, diverged, place[STUDY_GRIDS], edge; double loss; } StudyTuned;

typedef struct { StudyRun *run; int n; StudyTuned *tuned; } StudyState;          // tuned (arms)

static inline double study_endpoint(const Study *s, const StudyResult *r) {
    return r->status != RESULT_OK            ? INFINITY
           : s->own.endpoint == ENDPOINT_BPB ? r->val_bpb
                                             : r->val_loss;
}

static inline double study_depth_loss(const StudyResult *r, int kind, double share) {
    return metrics_depth_loss(r->depth, r->depths, kind, share);
}

static inline void study_state_add(StudyState *st, const StudyRun *r) {
    for (int i = 0; i < st->n; i++)
        if (!strcmp(st->run[i].key, r->key) && st->run[i].arm == r->arm &&
            st->run[i].kind == r->kind)
            return;
    st->run = (StudyRun *)xrealloc(st->run, (size_t)(st->n + 1), sizeof *st->run);
    st->run[st->n++] = *r;
}

static inline void study_state_free(StudyState *st) {
    free(st->run), free(st->tuned);
    memset(st, 0, sizeof *st);
}

// The next place of the product of an arm's grids; returns 0 after the last.
static inline int study_next_place(const StudyArm *a, int *place) {
    for (int k = a->grids - 1; k >= 0; k--) {
        if (++place[k] < a->grid[k].n) return 1;
        place[k] = 0;
    }
    return 0;
}

// Takes back extensions of an earlier look.
static inline void study_grid_reset(StudyGrid *g) {
    for (int i = 0; i < g->low; i++) free(g->value[i]);
    for (int i = g->n - g->high; i < g->n; i++) free(g->value[i]);
    memmove(g->value, g->value + g->low, (size_t)g->given * sizeof *g->value);
    g->n = g->given, g->low = g->high = 0;
}

// Extends the grid by a value beyond the best one, place; returns 0 where it cannot or may not.
static inline int study_grid_extend(StudyGrid *g, int place, int most) {
    OptionValue ignored;
    const int top = place == g->n - 1, bottom = place == 0;
    if (!study_grid_is_numeric(g) || !(top || bottom)) return 0;
    if ((top && !bottom ? g->high : g->low) >= most && (!(top && bottom) || g->high >= most))
        return 0;
    const int up = top && (!bottom || g->high <= g->low);
    if ((up ? g->high : g->low) >= most) return 0;
    const double x = strtod(g->value[place], NULL);
    const double near = g->n > 1 ? strtod(g->value[up ? place - 1 : place + 1], NULL)
                        : up     ? x / 2
                                 : 2 * x;
    if (x <= 0 || near <= 0) return 0;
    char text[32];
    snprintf(text, sizeof text, g->spec->type == OPTION_INTEGER ? "%.0f" : "%.3g", x * x / near);
    if (!options_read(g->spec, text, &ignored) || !study_grid_add(g, text)) return 0;
    *(up ? &g->high : &g->low) += 1;
    return 1;
}

// The arm's tuning as far as it is known: adds its runs, extends its grids while the best place is
// at an end.
static inline void study_tune(Study *s, StudyState *st, const StudyResults *all, int arm) {
    StudyArm *a = &s->arm[arm];
    StudyTuned *t = &st->tuned[arm];
    for (int k = 0; k < a->grids; k++) study_grid_reset(&a->grid[k]);
    for (int again = 1; again;) {
        int place[STUDY_GRIDS] = {0}, complete = 1;
        again = 0;
        t->loss = INFINITY;
        do {
            double sum = 0;
            for (int k = 0; a->grids && k < s->own.tune_seeds; k++) {
                const StudyRun r =
                    study_run(s, arm, RUN_TUNE, place, s->own.first_tune_seed + k, 1);
                const StudyResult *result = study_result(all, r.key);
                study_state_add(st, &r);
                complete &= result != NULL;
                if (result) sum += study_endpoint(s, result) / (double)s->own.tune_seeds;
            }
            if (!complete || !(sum < t->loss)) continue;
            t->loss = sum;
            memcpy(t->place, place, sizeof place);
        } while (study_next_place(a, place));
        t->done = complete;
        t->diverged = a->grids && complete && !isfinite(t->loss);
        t->edge = 0;
        for (int k = 0; k < a->grids && complete && !t->diverged && !again; k++) {
            again = study_grid_extend(&a->grid[k], t->place[k], (int)s->own.extend);
            if (!again && a->grid[k].n > 1 && study_grid_is_numeric(&a->grid[k]))
                t->edge |= t->place[k] == 0 || t->place[k] == a->grid[k].n - 1;
        }
    }
}

// Orders tuning before final runs, and those by seed, so that a study that is interrupted has every
// arm as often.
static inline int study_run_order(const void *a, const void *b) {
    const StudyRun *x = (const StudyRun *)a, *y = (const StudyRun *)b;
    if ((x->kind == RUN_TUNE) != (y->kind == RUN_TUNE)) return x->kind == RUN_TUNE ? -1 : 1;
    if (x->kind != RUN_TUNE && x->seed != y->seed) return x->seed < y->seed ? -1 : 1;
    if (x->arm != y->arm) return x->arm - y->arm;
    return x->kind != y->kind ? x->kind - y->kind : (x > y) - (x < y);
}

// All runs that can be named so far, in the order in which they are done.
static inline void study_state(Study *s, StudyState *st, const StudyResults *all) {
    study_state_free(st);
    st->tuned = (StudyTuned *)xcalloc((size_t)s->n_arms, sizeof *st->tuned);
    for (int arm = 0; arm < s->n_arms; arm++) study_tune(s, st, all, arm);
    const StudyTuned *base = &st->tuned[s->base];
    const double most = s->own.drop_worse.value / 100;
    for (int arm = 0; arm < s->n_arms; arm++) {
        StudyTuned *t = &st->tuned[arm];
        const int grids = s->arm[arm].grids && s->arm[s->base].grids;
        if (!t->done || t->diverged || (most > 0 && arm != s->base && grids && !base->done))
            continue;
        t->worse = most > 0 && arm != s->base && grids && t->loss > base->loss * (1 + most);
        for (int k = 0; !t->worse && k < s->own.seeds; k++) {
            StudyRun r = study_run(s, arm, RUN_FINAL, t->place, s->own.first_seed + k, 1);
            study_state_add(st, &r);
            for (int c = 0; arm == s->base && c < s->n_curve; c++) {
                r = study_run(s, arm, RUN_CURVE, t->place, s->own.first_seed + k, s->curve[c]);
                study_state_add(st, &r);
            }
        }
    }
    qsort(st->run, (size_t)st->n, sizeof *st->run, study_run_order);
}

// ---- Claims ----

static inline char *study_claim_path(const Study *s, const char *key) {
    return xprintf("%s/claims/%s", s->out, key);
}

// The file system's time now, which is that of the claims whatever the clocks of machines say.
static inline double study_disk_now(const Study *s) {
    char host[64] = "";
    gethostname(host, sizeof host - 1);
    char *path = xprintf("%s/claims/.now.%s.%ld", s->out, host, (long)getpid());
    struct stat st;
    FILE *f = fopen(path, "w");
    double now = (double)time(NULL);
    if (f) {
        fputs("now\n", f);
        fclose(f);
        if (!stat(path, &st)) now = (double)st.st_mtime;
        unlink(path);
    }
    free(path);
    return now;
}

// Who has a claim: "process 12 on host", or "".
static inline void study_owner(const char *claim, char owner[128], double *touched) {
    char *path = xprintf("%s/owner", claim);
    struct stat st;
    FILE *f = fopen(path, "r");
    *owner = 0;
    if (!f || !fgets(owner, 128, f)) *owner = 0;
    if (f) fclose(f);
    *touched = !stat(path, &st) ? (double)st.st_mtime : !stat(claim, &st) ? (double)st.st_mtime : 0;
    free(path);
}

// Whether its owner was a process of this machine that is no more.
static inline int study_owner_is_gone(const char *owner) {
    long process;
    char on[64], host[64] = "";
    gethostname(host, sizeof host - 1);
    return sscanf(owner, "process %ld on %63s", &process, on) == 2 && !strcmp(on, host) &&
           kill((pid_t)process, 0) && errno == ESRCH;
}

// Removes a claim with all that is in it: also what a process that was killed while writing left.
static inline void study_unclaim_at(const char *claim) {
    DIR *d = opendir(claim);
    for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
        char *path = xprintf("%s/%s", claim, e->d_name);
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) unlink(path);
        free(path);
    }
    if (d) closedir(d);
    rmdir(claim);
}

static inline void study_unclaim(const Study *s, const char *key) {
    char *claim = study_claim_path(s, key);
    study_unclaim_at(claim);
    free(claim);
}

// Takes a stale claim away; of several processes that see it, one renames it. Returns whether it is
// gone.
static inline int study_unclaim_stale(const Study *s, const char *claim) {
    char owner[128], again[128];
    double touched, ignored;
    study_owner(claim, owner, &touched);
    if (!study_owner_is_gone(owner) && study_disk_now(s) - touched < (double)s->own.stale) return 0;
    char *away = xprintf("%s.stale.%ld", claim, (long)getpid());
    int gone = rename(claim, away) == 0;
    if (gone) {
        study_owner(away, again, &ignored);
        if (strcmp(owner, again) && rename(away, claim) == 0) gone = 0;      // it was a fresh one
        else study_unclaim_at(away);
    }
    free(away);
    return gone;
}

// Whether the run is ours now. The claim is made under another name and gets its own together with
// its owner: no directory replaces one that is not empty, and nobody sees a claim without an owner,
// wherever this process is killed.
static inline int study_claim(const Study *s, const char *key) {
    char *claim = study_claim_path(s, key), host[64] = "";
    int ours = !path_exists(claim) || study_unclaim_stale(s, claim);
    if (ours) {
        gethostname(host, sizeof host - 1);
        char *made = xprintf("%s/claims/.new.%s.%ld", s->out, host, (long)getpid()),
             *path = xprintf("%s/owner", made),
             *text = xprintf("process %ld on %s\n", (long)getpid(), host);
        study_unclaim_at(made);                          // of an earlier process of this number
        if (mkdir(made, 0777)) die("cannot make %s: %s", made, strerror(errno));
        file_write_whole(path, text, strlen(text));
        ours = rename(made, claim) == 0;
        if (!ours && errno != EEXIST && errno != ENOTEMPTY)
            die("cannot make %s: %s", claim, strerror(errno));
        if (!ours) study_unclaim_at(made);
        free(made), free(path), free(text);
    }
    free(claim);
    return ours;
}

static inline void study_touch(const Study *s, const char *key) {
    char *path = xprintf("%s/claims/%s/owner", s->out, key);
    utime(path, NULL);
    free(path);
}

// ---- One run: build/train_gpt in a process of its own ----

// ended: when its last run did, until its next one could have begun
typedef struct { pid_t pid; StudyRun run; double begun, ended; } StudyJob;

// The trainer, beside this program.
static inline char *study_trainer(const char *program) {
#ifdef CUDA_BUILD
    return program_beside(program, "train_gpt_cuda");
#else
    return program_beside(program, "train_gpt");
#endif
}

// The options of a run as a config file.
static inline Text study_config(const StudyArm *a, const TrainOptions *run) {
    Text text = {NULL, 0, 0};
    TrainOptions o = *run;
    Options view = a->options;
    view.set[1].values = &o;
    options_dump(&view, &text);
    return text;
}

// A word of a command; exec takes texts that could be written to, and writes to none.
static inline char *study_word(const char *word) { return (char *)(uintptr_t)word; }

// Starts `program --config FILE ...`, its output in the file log; ends with this process.
static inline pid_t study_start(char *const *arguments, const char *log) {
    fflush(NULL);
    const pid_t pid = fork();
    if (pid < 0) die("cannot start a process: %s", strerror(errno));
    if (pid) return pid;
#ifdef __linux__
    // it saves, and whoever takes the run over continues from there
    prctl(PR_SET_PDEATHSIG, SIGTERM);
#endif
    // Ctrl-C is for the queue, which hands it on
    setpgid(0, 0);
    const int out = open(log, O_WRONLY | O_CREAT | O_TRUNC, 0666), in = open("/dev/null", O_RDONLY);
    dup2(in, 0), dup2(out, 1), dup2(out, 2);
    execvp(arguments[0], arguments);
    fprintf(stderr, "cannot start %s: %s\n", arguments[0], strerror(errno));
    _exit(127);
}

// Starts a claimed run, or continues it.
static inline pid_t study_run_start(const Study *s, const char *trainer, const StudyRun *r,
                                    const char *runs) {
    char *config = xprintf("%s/claims/%s/config.txt", s->out, r->key),
         *log = xprintf("%s/claims/%s/log.txt", s->out, r->key);
    char *out = xprintf("%s/%s/%s", s->out, runs, r->key);
    Text text = study_config(&s->arm[r->arm], &r->o);
    file_write_whole(config, text.s, text.n);
    char *const arguments[] = {study_word(trainer), study_word("--config"), config,
                               study_word("--out"), out, study_word("--resume"), NULL};
    const pid_t pid = study_start(arguments, log);
    text_free(&text);
    free(config), free(log), free(out);
    return pid;
}

// The processor's name, for the record.
static inline char *study_machine(void) {
    FILE *f = fopen("/proc/cpuinfo", "r");
    char line[256], *name = NULL;
    while (f && !name && fgets(line, sizeof line, f))
        if (!strncmp(line, "model name", 10) && strchr(line, ':'))
            name =
                xprintf("%.*s", (int)strcspn(strchr(line, ':') + 2, "\n"), strchr(line, ':') + 2);
    if (f) fclose(f);
    return name ? name : xstrdup("unknown");
}

// The hash of the weights that a run has ended with.
static inline void study_bits(const char *out, char bits[SHA256_HEX]) {
    char *path = xprintf("%s/latest/model.safetensors", out);
    FileMap map;
    const char *error = file_map(&map, path);
    if (error) die("cannot read %s: %s", path, error);
    sha256_hex(bits, map.data, map.size);
    file_unmap(&map);
    free(path);
}

// The result of a run that has ended, from its metrics.jsonl; empty where it did not come to its
// end.
static inline Text study_result_text(const Study *s, const StudyRun *r, const char *out,
                                     int diverged) {
    char *path = xprintf("%s/metrics.jsonl", out), bits[SHA256_HEX] = "",
         *machine = study_machine();
    MetricsLog log = {NULL, 0};
    Text text = {NULL, 0, 0}, canonical = {NULL, 0, 0}, curve = {NULL, 0, 0};
    double flops = 0, ms = 0;
    if (path_exists(path)) log = metrics_read(path);
    free(path);
    text_append(&curve, "", 0);
    for (int64_t i = 0; i < log.n; i++) {
        const Metrics *m = &log.record[i];
        flops += m->flops, ms += m->ms;
        if (isnan(m->val_loss)) continue;
        text_printf(&curve, "%s[%.6g, %.6g]", curve.n ? ", " : "", flops, m->val_loss);
    }
    const Metrics *last = log.n ? &log.record[log.n - 1] : NULL;
    const int ended = last && last->step == (double)r->o.steps,
              whole = ended && isfinite(last->val_loss);
    if (ended || diverged) {
        if (whole) study_bits(out, bits);
        study_canonical(s, &s->arm[r->arm], &r->o, &canonical);
        text_printf(
            &text,
            "{\"format\": \"droppath.c run 1\", \"key\": \"%s\", \"status\": \"%s\", \"seed\": "
            "%lld, \"steps\": %lld",
            r->key, whole ? "ok" : "diverged", (long long)r->seed, (long long)r->o.steps);
        const struct {
            const char *name;
            double value;
        } number[] = {{"tokens", last ? last->tokens : NAN},
                      {"flops", flops},
                      {"val_loss", whole ? last->val_loss : NAN},
                      {"val_bpb", whole ? last->val_bpb : NAN},
                      {"seconds", ms / 1000}};
        for (size_t i = 0; i < sizeof number / sizeof number[0]; i++) {
            text_printf(&text, ", \"%s\": ", number[i].name);
            json_write_number(&text, number[i].value);
        }
        if (whole) metrics_write_depths(&text, last->depth, last->depths);
        text_printf(&text, ", \"bits\": \"%s\", \"options\": ", bits);
        json_write_string(&text, canonical.s);
        text_printf(&text,
                    ", \"data\": \"%s\", \"engine\": \"%s\", \"version\": \"" PROGRAM_VERSION
                    "\", \"commit\": \"" PROGRAM_COMMIT "\", \"compiler\": ",
                    s->data_sha256, s->engine);
        json_write_string(&text, PROGRAM_COMPILER);
        text_printf(&text, ", \"machine\": ");
        json_write_string(&text, machine);
        text_printf(&text, ", \"curve\": [%s]}\n", curve.s);
    }
    metrics_log_free(&log);
    text_free(&canonical), text_free(&curve), free(machine);
    return text;
}

// Removes a run's directory: an own child process, since checkpoints are directories.
static inline void study_remove(const char *path) {
    const pid_t pid = fork();
    if (pid == 0) {
        execlp("rm", "rm", "-rf", path, (char *)NULL);
        _exit(127);
    }
    if (pid > 0) child_wait(pid);
}

// Whether its directory was in use: a process that lost its queue is still saving there.
static inline int study_log_has(const Study *s, const char *key, const char *words) {
    char *path = xprintf("%s/claims/%s/log.txt", s->out, key), *text = NULL;
    FileMap map;
    if (file_map(&map, path)) map.size = 0;
    else
        text = xprintf("%.*s", (int)map.size, map.size ? (const char *)map.data : ""),
        file_unmap(&map);
    const int has = text && strstr(text, words);
    free(path), free(text);
    return has;
}

// Prints the end of a run's log: why it has failed.
static inline void study_show_log(const Study *s, const char *key) {
    char *path = xprintf("%s/claims/%s/log.txt", s->out, key);
    FileMap map;
    if (!file_map(&map, path)) {
        size_t from = map.size > 2000 ? map.size - 2000 : 0;
        fprintf(stderr, "%.*s", (int)(map.size - from),
                map.size ? (const char *)map.data + from : "");
        file_unmap(&map);
    }
    free(path);
}

// ---- Everything that can be refused, before anything is written ----

// The MiB that a dry run says it needs, of its line "memory:  parameters 1 MiB, gradients ...".
static inline double study_memory(const char *said) {
    const char *line = strstr(said, "memory:  parameters ");
    double p = 0, g = 0, m = 0, a = 0;
    if (line)
        sscanf(line, "memory:  parameters %lf MiB, gradients %lf MiB, moments %lf MiB, "
               "activations %lf", &p, &g, &m, &a);
    return p + g + m + a;
}

// Of this machine, in MiB; infinity where runs are on a GPU, whose engine says it by itself.
static inline double study_machine_memory(void) {
#ifdef CUDA_BUILD
    return INFINITY;
#else
    const double pages = (double)sysconf(_SC_PHYS_PAGES), size = (double)sysconf(_SC_PAGESIZE);
    return pages > 0 && size > 0 ? pages * size / 1048576 : INFINITY;
#endif
}

// Has the trainer look at an arm: --dry-run of it must end well.
static inline void study_try_arm(const Study *s, const char *trainer, const StudyRun *r,
                                 const char *dir) {
    char *config = xprintf("%s/config.txt", dir), *log = xprintf("%s/log.txt", dir),
         *out = xprintf("%s/out", dir);
    Text text = study_config(&s->arm[r->arm], &r->o);
    file_write_whole(config, text.s, text.n);
    char *const arguments[] = {study_word(trainer), study_word("--config"), config,
                               study_word("--out"), out, study_word("--dry-run"), NULL};
    const int status = child_wait(study_start(arguments, log));
    FileMap map;
    const int read = !file_map(&map, log);
    char *said = xprintf("%.*s", read ? (int)map.size : 0,
                         read && map.size ? (const char *)map.data : "");
    char *error = strstr(said, "error: ");
    unlink(config), unlink(log);
    const double needs = study_memory(said), has = study_machine_memory();
    if (status || needs > has) rmdir(dir);
    if (status)
        study_refuse(s, "[arm %s] cannot run: %s", s->arm[r->arm].name,
                     error ? error + 7 : said);
    if (needs > has)
        study_refuse(s, "[arm %s] cannot run: it needs %.0f MiB, this machine has %.0f",
                     s->arm[r->arm].name, needs, has);
    if (read) file_unmap(&map);
    text_free(&text), free(config), free(log), free(out), free(said);
}

// A new directory for what is only tried, from malloc. mkdtemp replaces the Xs.
static inline char *study_temporary(void) {
    const char *base = getenv("TMPDIR");
    char *dir = xprintf("%s/study_XXXXXX", base ? base : "/tmp");
    if (!mkdtemp(dir)) die("cannot make %s: %s", dir, strerror(errno));
    return dir;
}

static inline void study_try_arms(const Study *s, const char *trainer) {
    char *dir = study_temporary();
    const int place[STUDY_GRIDS] = {0};
    for (int arm = 0; arm < s->n_arms; arm++) {
        StudyRun r;
        memset(&r, 0, sizeof r);
        r.arm = arm, r.o = s->arm[arm].train;
        study_place(&s->arm[arm], place, &r.o);
        r.o.seed = s->own.first_seed, r.o.steps = s->arm[arm].train.steps;
        study_try_arm(s, trainer, &r, dir);
    }
    rmdir(dir);
    free(dir);
}

// The data of the results that are there must be those of today.
static inline void study_check_data(const Study *s) {
    char *path = xprintf("%s/data.txt", s->out),
         *now = xprintf("train %s\nval %s\n", s->train_sha256, s->val_sha256);
    FileMap map;
    if (path_exists(path)) {
        const char *error = file_map(&map, path);
        if (error) die("cannot read %s: %s", path, error);
        if (map.size != strlen(now) || memcmp(map.data, now, map.size))
            study_refuse(
                s,
                "the data have changed since this study began: %s has their SHA-256\n  hint: "
                "bring the shards back, "
                "or give the study another out",
                path);
        file_unmap(&map);
    }
    free(path), free(now);
}

static inline void study_write_data(const Study *s) {
    char *path = xprintf("%s/data.txt", s->out),
         *now = xprintf("train %s\nval %s\n", s->train_sha256, s->val_sha256);
    if (!path_exists(path)) file_write_whole(path, now, strlen(now));
    free(path), free(now);
}

// ---- Where results come from ----

// A line of RESULTS/origin.txt, for each data, engine and version that results have.
typedef struct {
    char data[SHA256_HEX], train[SHA256_HEX], val[SHA256_HEX], version[32], engine[128];
    int V;
} StudyOrigin;

#define STUDY_ORIGIN "data %s train %s val %s vocabulary %d version %s engine %s\n"

// The line of that data: of this engine and version if there is one, else the last. 0: none.
static inline int study_origin_find(const Study *s, const char *data, StudyOrigin *found) {
    char *path = xprintf("%s/origin.txt", s->results), line[512];
    FILE *f = fopen(path, "r");
    StudyOrigin o;
    int found_any = 0;
    for (int same = 0; f && !same && fgets(line, sizeof line, f);) {
        if (sscanf(line,
                   "data %64s train %64s val %64s vocabulary %d version %31s engine %127[^\n]",
                   o.data, o.train, o.val, &o.V, o.version, o.engine) != 6)
            die("%s: a line does not say data, train, val, vocabulary, version and engine", path);
        if (strcmp(o.data, data)) continue;
        same = !strcmp(o.engine, s->engine) && !strcmp(o.version, s->version);
        *found = o, found_any = 1;
    }
    if (f) fclose(f);
    free(path);
    return found_any;
}

// Adds the line of this study, unless it is there.
static inline void study_origin_write(const Study *s) {
    char *path = xprintf("%s/origin.txt", s->results);
    StudyOrigin o;
    if (!study_origin_find(s, s->data_sha256, &o) || strcmp(o.engine, s->engine) ||
        strcmp(o.version, s->version)) {
        FileMap map = {NULL, 0};
        Text text = {NULL, 0, 0};
        if (path_exists(path) && !file_map(&map, path)) {
            text_append(&text, (const char *)map.data, map.size);
            file_unmap(&map);
        }
        text_printf(&text, STUDY_ORIGIN, s->data_sha256, s->train_sha256, s->val_sha256,
                    s->arm[s->base].config.V, s->version, s->engine);
        file_replace(path, text.s, text.n);
        text_free(&text);
    }
    free(path);
}

// Everything but equal seconds' times. `look`: nothing will be run, so results of any engine and
// version will do, and the data are not read where the plan and the origin have their hashes.
static inline void study_prepare(Study *s, const char *trainer, int look) {
    StudyOrigin o;
    const int known = look && *s->own.data_sha256 && study_origin_find(s, s->own.data_sha256, &o);
    for (int arm = 0; arm < s->n_arms; arm++) trainer_check_numbers(&s->arm[arm].train);
    if (!known) study_try_arms(s, trainer);
    for (int arm = 0; arm < s->n_arms; arm++) {
        if (known) s->arm[arm].train.vocab_size = o.V;
        study_read_sizes(s, &s->arm[arm], !known);
        study_read_contents(s, arm);
    }
    if (!known) study_read_data(s), study_check_data(s);
    else {
        memcpy(s->train_sha256, o.train, SHA256_HEX), memcpy(s->val_sha256, o.val, SHA256_HEX);
        study_sum_data(s);
    }
    if (!study_origin_find(s, s->data_sha256, &o)) return;
    if (!look && (strcmp(o.engine, s->engine) || strcmp(o.version, s->version)))
        study_refuse(s, "%s has results of \"%s\", version %s, and this program is \"%s\", version "
                     "%s: it would do all of them again\n  hint: a build with that engine (make "
                     "AMX=0, or DROPPATH_ENGINE for one of make FAT=1), or --results DIR for new "
                     "ones", s->results, o.engine, o.version, s->engine, s->version);
    free(s->engine), free(s->version);
    s->engine = xstrdup(o.engine), s->version = xstrdup(o.version);
}

// ---- Equal seconds: each arm is timed in turns ----

// Seconds of a step, the median of a short run of these options.
static inline double study_time_steps(const Study *s, const char *trainer, StudyRun *r) {
    char *dir = xprintf("%s/calibrate", s->out), *metrics = xprintf("%s/metrics.jsonl", dir),
         *claim = xprintf("%s/claims/calibrate", s->out);
    study_remove(dir);
    mkdir(claim, 0777);
    snprintf(r->key, sizeof r->key, "calibrate");
    r->o.steps = s->own.turn_steps, r->o.eval_every = 0, r->o.eval_tokens = 1;
    if (child_wait(study_run_start(s, trainer, r, "."))) {
        study_show_log(s, "calibrate");
        die("a turn of [arm %s] has failed", s->arm[r->arm].name);
    }
    MetricsLog log = metrics_read(metrics);
    double *ms = (double *)xcalloc((size_t)log.n + 1, sizeof *ms);
    for (int64_t i = 0; i < log.n; i++) ms[i] = log.record[i].ms;
    // the first steps touch memory for the first time
    const int64_t warm = log.n / 5;
    qsort(ms + warm, (size_t)(log.n - warm), sizeof *ms, stats_compare);
    const double median = stats_quantile(ms + warm, (int)(log.n - warm), 0.5) / 1000;
    metrics_log_free(&log);
    study_remove(dir);
    study_unclaim_at(claim);
    free(ms), free(dir), free(metrics), free(claim);
    return median;
}

// Times every arm at full depth and, where it drops, at its top rates, in turns; refuses where the
// turns disagree.
static inline void study_calibrate(Study *s, const char *trainer) {
    const int n = (int)s->own.turns, place[STUDY_GRIDS] = {0};
    double *time = (double *)xcalloc((size_t)(2 * s->n_arms * n), sizeof *time);
    for (int turn = 0; turn < n; turn++)
        for (int i = 0; i < 2 * s->n_arms; i++) {
            StudyArm *a = &s->arm[i / 2];
            StudyRun r;
            memset(&r, 0, sizeof r);
            r.arm = i / 2, r.o = a->train;
            study_place(a, place, &r.o);
            const Span none = {0, 0};
            r.o.drop_start = r.o.drop_ramp_up = r.o.drop_ramp_down = r.o.drop_recover = none;
            r.o.drop_recipe = 0, r.o.seed = 1;
            if (i % 2 && a->train.drop_path == 0) continue;
            if (i % 2 == 0) r.o.drop_path = 0;
            else {
                const Budget b = {&r.o, &a->config, a->T};
                a->drop_compute = budget_cost(&b, 1000) / 1000;
            }
            fprintf(stderr, "timing: turn %d of %d, %s%s\n", turn + 1, n, a->name,
                    i % 2 ? ", dropping" : "");
            time[i * n + turn] = study_time_steps(s, trainer, &r);
        }
    double *base = (double *)xcalloc((size_t)n, sizeof *base),
           *t = (double *)xcalloc((size_t)n, sizeof *t);
    memcpy(base, &time[2 * s->base * n], (size_t)n * sizeof *base);
    for (int i = 0; i < 2 * s->n_arms; i++) {            // in the baseline's step of the same turn
        StudyArm *a = &s->arm[i / 2];
        if (i % 2 && a->train.drop_path == 0) {
            a->drop_seconds = a->step_seconds, a->drop_compute = 1;
            continue;
        }
        for (int turn = 0; turn < n; turn++) t[turn] = log(time[i * n + turn] / base[turn]);
        const double error = stats_sd(t, n) / sqrt(n);
        if (error > s->own.turn_error.value / 100)
            study_refuse(
                s,
                "equal = seconds: the turns of [arm %s] disagree by %.1f%% of its time\n  hint: a "
                "quiet machine, or more turns",
                a->name, 100 * error);
        *(i % 2 ? &a->drop_seconds : &a->step_seconds) = exp(stats_mean(t, n));
    }
    free(time), free(base), free(t);
}

// The times, measured once and then read from RESULTS/times.txt, since keys depend on them.
static inline void study_times(Study *s, const char *trainer, int measure) {
    if (s->own.equal != EQUAL_SECONDS) return;
    char *path = xprintf("%s/times.txt", s->results);
    Text text = {NULL, 0, 0};
    if (!path_exists(path) && !measure)
        study_refuse(
            s,
            "equal = seconds: the arms are not timed yet, so their steps are not known\n  hint: "
            "study run times them first");
    if (!path_exists(path)) {
        study_calibrate(s, trainer);
        for (int arm = 0; arm < s->n_arms; arm++)
            text_printf(&text, "%s %.17g %.17g %.17g\n", s->arm[arm].name, s->arm[arm].step_seconds,
                        s->arm[arm].drop_seconds, s->arm[arm].drop_compute);
        file_write_whole(path, text.s, text.n);
        text_free(&text);
    }
    FILE *f = fopen(path, "r");
    char name[65];
    double full, drop, compute;
    while (f && fscanf(f, "%64s %lf %lf %lf", name, &full, &drop, &compute) == 4) {
        StudyArm *a = study_find_arm(s, name);
        if (a) a->step_seconds = full, a->drop_seconds = drop, a->drop_compute = compute;
    }
    if (f) fclose(f);
    for (int arm = 0; arm < s->n_arms; arm++)
        if (!(s->arm[arm].step_seconds > 0))
            study_refuse(s, "%s does not have [arm %s]: remove it, and all are timed again",
                         path, s->arm[arm].name);
    free(path);
}

// ---- The queue ----

// seconds between signs of life; a look for ended runs
enum { STUDY_TOUCH = 5, STUDY_POLL_MS = 20 };

typedef struct {
    Study *s;
    // runs: the folder of OUT where they are done
    const char *trainer, *runs;
    int jobs, busy, done;                                // done: by this process
    double until;                                        // clock_seconds
    StudyJob *job;                                       // (jobs)
    StudyResults all;
    StudyState state;
    double spent, began;
    // seconds: of the runs, of jobs between two runs, of this process's processor time
    double ran, idle, processor;
} StudyQueue;

static inline int study_is_missing(const StudyQueue *q, const StudyRun *r) {
    for (int k = 0; k < q->jobs; k++)
        if (q->job[k].pid && !strcmp(q->job[k].run.key, r->key)) return 0;
    return study_result(&q->all, r->key) == NULL;
}

static inline void study_progress(const StudyQueue *q, const StudyRun *r,
                                  const StudyResult *result) {
    int left = 0, total = q->state.n;
    double flops = 0;
    char time[32] = "?";
    for (int i = 0; i < q->state.n; i++) {
        const StudyResult *have = study_result(&q->all, q->state.run[i].key);
        left += have == NULL;
        flops += have ? 0 : q->state.run[i].flops;
    }
    if (q->spent > 0) metrics_duration(time, flops * (clock_seconds() - q->began) / q->spent);
    char *place = study_place_text(&q->s->arm[r->arm], r->place);
    if (result->status == RESULT_OK)
        fprintf(stderr, "%d/%d %s %s%sseed %lld: val loss %.4f; %s left\n", total - left, total,
                q->s->arm[r->arm].name, place, *place ? " " : "", (long long)r->seed,
                result->val_loss, left ? time : "nothing");
    else
        fprintf(stderr, "%d/%d %s %s%sseed %lld: diverged; %s left\n", total - left, total,
                q->s->arm[r->arm].name, place, *place ? " " : "", (long long)r->seed,
                left ? time : "nothing");
    free(place);
}

// A run has ended: its result is written, or the queue ends with its error. Exit code 3 of the
// trainer says that the run's own numbers are to blame: it has diverged, which is a result.
static inline void study_reap(StudyQueue *q, StudyJob *j, int status) {
    const Study *s = q->s;
    char *out = xprintf("%s/%s/%s", s->out, q->runs, j->run.key),
         *path = xprintf("%s/%s.json", s->results, j->run.key);
    const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    j->pid = 0;
    j->ended = clock_seconds();
    q->ran += j->ended - j->begun;
    q->busy--;
    Text text = {NULL, 0, 0};
    if (code == 0 || code == 3) text = study_result_text(s, &j->run, out, code == 3);
    if (text.n) {
        file_replace(path, text.s, text.n);
        const char *error = study_results_take(&q->all, text.s, text.n - 1);
        CHECK(!error, "%s", error);
        q->done++, q->spent += j->run.flops;
        study_state(q->s, &q->state, &q->all);
        study_progress(q, &j->run, study_result(&q->all, j->run.key));
        if (!s->own.keep_runs) study_remove(out);
    } else if (code && study_log_has(s, j->run.key, " is in use by ")) {
        usleep(500 * 1000);                              // and is tried again
    } else if (!signals_stop && code && clock_seconds() < q->until) {
        study_show_log(s, j->run.key);
        study_unclaim(s, j->run.key);
        study_refuse(s, "the run %s of [arm %s] ended with exit code %d", j->run.key,
                     s->arm[j->run.arm].name, code);
    }
    study_unclaim(s, j->run.key);
    text_free(&text);
    free(out), free(path);
}

// Starts what is missing while there is room; returns how many runs are missing, those of other
// processes included.
static inline int study_fill(StudyQueue *q) {
    int missing = 0;
    for (int i = 0; i < q->state.n; i++) {
        const StudyRun *r = &q->state.run[i];
        if (!study_is_missing(q, r)) continue;
        missing++;
        if (q->busy == q->jobs || signals_stop || clock_seconds() >= q->until ||
            !study_claim(q->s, r->key))
            continue;
        char *path = xprintf("%s/%s.json", q->s->results, r->key);
        const int known = path_exists(path);             // another process has just finished it
        free(path);
        if (known) {
            study_unclaim(q->s, r->key);
            continue;
        }
        StudyJob *j = q->job;
        while (j->pid) j++;
        j->run = *r, j->begun = clock_seconds();
        // its end was seen within STUDY_POLL_MS
        if (j->ended > 0) q->idle += j->begun - j->ended + STUDY_POLL_MS / 1000.0;
        j->pid = study_run_start(q->s, q->trainer, r, q->runs);
        q->busy++;
    }
    for (int k = 0; k < q->jobs; k++) q->job[k].ended = 0;
    return missing;
}

static inline double study_processor(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)u.ru_utime.tv_sec + (double)u.ru_stime.tv_sec +
           1e-6 * ((double)u.ru_utime.tv_usec + (double)u.ru_stime.tv_usec);
}

// What the queue itself has cost, beside its runs.
static inline void study_tell_cost(const StudyQueue *q) {
    if (!q->done || !(q->ran > 0)) return;
    fprintf(stderr, "queue: %d run%s in %.1f s; between runs at most %.1f s (%.1f%%), %.1f s of "
            "processor time (%.1f%%)\n", q->done, q->done == 1 ? "" : "s", q->ran, q->idle,
            100 * q->idle / q->ran, study_processor() - q->processor,
            100 * (study_processor() - q->processor) / q->ran);
}

// Hands on what ends this process.
static inline void study_stop_runs(StudyQueue *q) {
    for (int k = 0; k < q->jobs; k++)
        if (q->job[k].pid) kill(q->job[k].pid, SIGTERM);
}

// Waits until a run of this process has ended, the time is over, or for a second where other
// processes do what is left.
static inline void study_wait(StudyQueue *q) {
    double touched = clock_seconds(), came = touched;
    static int stopping;
    for (;;) {
        int status, ended = 0;
        for (int k = 0; k < q->jobs; k++)
            if (q->job[k].pid && waitpid(q->job[k].pid, &status, WNOHANG) == q->job[k].pid)
                study_reap(q, &q->job[k], status), ended = 1;
        const double now = clock_seconds();
        if (ended || (!q->busy && now - came > 1)) return;
        if ((signals_stop || now >= q->until) && !stopping++) study_stop_runs(q);
        if (signals_stop && !q->busy) return;
        if (now - touched > STUDY_TOUCH) {
            for (int k = 0; k < q->jobs; k++)
                if (q->job[k].pid) study_touch(q->s, q->job[k].run.key);
            touched = now;
        }
        usleep(STUDY_POLL_MS * 1000);
    }
}

// Removes what processes that are gone have left: claims of runs that have ended.
static inline void study_sweep(const StudyQueue *q) {
    char *path = xprintf("%s/claims", q->s->out);
    DIR *d = opendir(path);
    for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
        char *claim = xprintf("%s/%s", path, e->d_name), owner[128];
        double touched;
        const int made = !strncmp(e->d_name, ".new.", 5);
        if (*e->d_name != '.' || made) {
            study_owner(claim, owner, &touched);
            if (study_owner_is_gone(owner) &&
                (made || study_result(&q->all, e->d_name) || strstr(e->d_name, ".stale.")))
                study_unclaim_at(claim);
        }
        free(claim);
    }
    if (d) closedir(d);
    free(path);
}

// Works the study off; returns whether every run has a result.
static inline int study_work(Study *s, const char *trainer, int jobs, double seconds) {
    StudyQueue queue, *q = &queue;
    memset(q, 0, sizeof *q);
    q->s = s, q->trainer = trainer, q->runs = "runs", q->jobs = jobs;
    q->began = clock_seconds();
    q->processor = study_processor();
    q->until = q->began + seconds;
    q->job = (StudyJob *)xcalloc((size_t)jobs, sizeof *q->job);
    const char *const folder[] = {"", "/claims", "/runs"};
    for (int i = 0; i < 3; i++) {
        char *path = xprintf("%s%s", s->out, folder[i]);
        directory_make(path);
        free(path);
    }
    directory_make(s->results);
    study_write_data(s);
    study_origin_write(s);
    signals_begin();
    signals_catch();
    study_times(s, trainer, 1);
    int missing;
    for (;;) {
        study_results_read(&q->all, s->results);
        study_state(s, &q->state, &q->all);
        missing = study_fill(q);                         // without those under way here
        if (!missing && !q->busy) break;
        if (!q->busy && (signals_stop || clock_seconds() >= q->until)) break;
        study_wait(q);
    }
    study_sweep(q);
    study_tell_cost(q);
    for (int arm = 0; arm < s->n_arms && !missing; arm++) missing |= !q->state.tuned[arm].done;
    study_results_free(&q->all);
    study_state_free(&q->state);
    free(q->job);
    return !missing;
}

#endif
