// torture.c: a run is killed, or loses power or its disk, at every single call that changes the
// disk, and is resumed: the result must be the uninterrupted run's, bit for bit. `make torture`;
// `make test` includes a short form.
//
//     build/torture               everything: a few thousand runs, in minutes
//     build/torture --part 0/4    the first quarter of it
//     build/torture --short       a sample, in seconds
//
// The program forks, and the child is the trainer (trainer_main, as a user starts it, with files.h
// counting calls and failing at one: faults.h), on a model of a few hundred elements. Each case has
// its own folder, removed if it passed.

#include "../model/engines.h"
#include "../files/files.h"
#include "../run/trainer.h"

enum { EVERY = 2, ARGS = 64 };                           // steps between checkpoints
#define RUN                                                                                        \
    "--layers 1 --heads 1 --channels 4 --seq-len 4 --vocab-size 8 --batch 2 --total-batch 16 "     \
    "--threads 1 --steps 6 "                                                                       \
            "--save-every 2 --keep 1 --eval-every 3 --eval-tokens 64 --drop-path 0.3 --log-every " \
                "100 --selfcheck 0 "                                                               \
            "--train data/train.bin --val data/train.bin --out run "
#define STOP "--on-save-error stop"

typedef struct {
    char root[300];                    // contains all cases; the shards are in root/data
    const char *reference, *stopping;  // folders of the uninterrupted run, and of that with STOP
    int cases, kills, failed, serial, shorter, part, parts;
    Engine engine;                     // the default one, without measuring its peak
} Torture;

static Torture tt;

static double no_peak(Model *m, double seconds) {
    (void)m;
    (void)seconds;
    return 1e9;
}

static void fail(const char *what, const char *dir, const char *detail) {
    tt.failed++;
    printf("FAILED: %s: %s (%s)\n", what, detail, dir);
}

// Whether case i belongs to the selected part.
static int mine(int64_t i) { return i % tt.parts == tt.part; }

// ---- Folders and runs ----

static void in_folder(const char *dir) {
    if (chdir(dir)) die("cannot enter %s: %s", dir, strerror(errno));
}

// Creates a folder with data -> the shards.
static char *new_case(void) {
    char *dir = xprintf("%s/%d", tt.root, tt.serial++), *link = xprintf("%s/data", dir);
    directory_make(dir);
    if (symlink("../data", link)) die("%s: %s", link, strerror(errno));
    free(link);
    return dir;
}

static void remove_tree(const char *dir) {
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
        char *path = xprintf("%s/%s", dir, e->d_name);
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..") && unlink(path)) remove_tree(path);
        free(path);
    }
    if (d) closedir(d);
    if (rmdir(dir)) warn("cannot remove %s: %s", dir, strerror(errno));
}

// Starts the trainer in dir with RUN and more options, its output going to dir/log. Returns the
// child.
static pid_t start(const char *dir, const char *more, const Faults *f) {
    fflush(NULL);
    const pid_t child = fork();
    if (child < 0) die("fork: %s", strerror(errno));
    if (child) return child;
    static char text[1000], *argv[ARGS + 1];
    int argc = 0;
    in_folder(dir);
    if (!freopen("log", "a", stdout) || dup2(1, 2) < 0) _exit(99);
    snprintf(text, sizeof text, "train_gpt " RUN "%s", more);
    for (char *word = strtok(text, " "); word && argc < ARGS; word = strtok(NULL, " "))
        argv[argc++] = word;
    if (f) faults = *f;
    const int code = trainer_main(argc, argv, &tt.engine);
    if (faults.log) fclose(faults.log);
    exit(code);
}

// Its exit code, or minus the signal that killed it.
static int wait_for(pid_t child) {
    const int status = child_wait(child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static int run(const char *dir, const char *more, const Faults *f) {
    return wait_for(start(dir, more, f));
}

static Faults fault(int mode, int error, int64_t at, int64_t last) {
    Faults f;
    memset(&f, 0, sizeof f);
    f.mode = mode, f.error = error, f.at = at, f.last = last;
    return f;
}

static Text read_text(const char *dir, const char *name) {
    char *path = xprintf("%s/%s", dir, name);
    Text t = {NULL, 0, 0};
    FileMap map;
    text_append(&t, "", 0);
    if (!file_map(&map, path)) text_append(&t, map.data, map.size);
    file_unmap(&map);
    free(path);
    return t;
}

static int log_has(const char *dir, const char *part) {
    Text log = read_text(dir, "log");
    const int has = strstr(log.s, part) != NULL;
    text_free(&log);
    return has;
}

// ---- What must hold ----

// The step of the newest complete checkpoint; 0: none.
static int64_t newest(const char *dir) {
    char *out = xprintf("%s/run", dir);
    CheckpointList list = checkpoint_list(out);
    int64_t step = 0;
    for (int i = 0; i < list.n && !step; i++) {
        char *path = checkpoint_path(out, list.step[i]), *wrong = checkpoint_verify(path);
        if (!wrong) step = list.step[i];
        free(path), free(wrong);
    }
    free(list.step), free(out);
    return step;
}

// Removes `"name": NUMBER, ` from a line: values that depend on time and memory.
static void without(char *line, const char *name) {
    char *at = strstr(line, name), *end = at ? strchr(at, ' ') : NULL;
    end = end ? strchr(end + 1, ' ') : NULL;
    if (end) memmove(at, end + 1, strlen(end + 1) + 1);
}

// metrics.jsonl without them.
static Text timeless(const char *dir) {
    static const char *const changes[] = {"\"ms\":", "\"tok_per_s\":", "\"mfu\":",
                                          "\"peak_bytes\":"};
    Text all = read_text(dir, "run/metrics.jsonl"), t = {NULL, 0, 0};
    for (char *line = strtok(all.s, "\n"); line; line = strtok(NULL, "\n")) {
        for (size_t i = 0; i < sizeof changes / sizeof changes[0]; i++) without(line, changes[i]);
        text_printf(&t, "%s\n", line);
    }
    text_append(&t, "", 0);
    text_free(&all);
    return t;
}

// Compares with the uninterrupted run: the files of the last checkpoint, `latest`, metrics.jsonl.
// Returns NULL, or what differs. With `no_link`, `latest` may be missing because it could not be
// created; if it exists, it must refer to the last checkpoint.
static char *compare(const char *dir, const char *reference, int no_link) {
    enum { FILES = 7 };
    static const char *const files[2][FILES] = {
        {"model.safetensors", "config.json", "optimizer.safetensors", "trainer.json",
         "tokenizer.bin", "tokenizer.json", "tokenizer_config.json"},
        {LORA_MODEL, LORA_CONFIG, "optimizer.safetensors", "trainer.json", LORA_MODEL, LORA_CONFIG,
         "trainer.json"}};
    char *wrong = NULL, *config = xprintf("%s/run/step_00000006/" LORA_CONFIG, reference);
    const int adapter = path_exists(config);
    free(config);
    char *latest = xprintf("%s/run/latest", dir);
    for (int i = no_link && !path_exists(latest) ? FILES : 0; i < 2 * FILES && !wrong; i++) {
        char *name = xprintf("run/%s/%s", i < FILES ? "latest" : "step_00000006",
                             files[adapter][i % FILES]);
        Text a = read_text(dir, name), b = read_text(reference, name);
        if (!b.n || a.n != b.n || memcmp(a.s, b.s, a.n)) wrong = xprintf("%s differs", name);
        text_free(&a), text_free(&b), free(name);
    }
    free(latest);
    Text a = timeless(dir), b = timeless(reference);
    if (!wrong && strcmp(a.s, b.s)) wrong = xprintf("metrics.jsonl differs:\n%s", a.s);
    text_free(&a), text_free(&b);
    return wrong;
}

// Ends a case: removes its folder if it passed.
static void done(const char *what, char *dir, char *wrong) {
    tt.cases++;
    if (wrong) fail(what, dir, wrong);
    else remove_tree(dir);
    free(wrong);
    free(dir);
}

// Resumes an interrupted case until the run is complete. Returns NULL, or what is wrong.
static char *finish_run(const char *dir, const char *more, const char *reference) {
    char *options = xprintf("--resume %s", more);
    const int code = run(dir, options, NULL);
    free(options);
    return code ? xprintf("--resume ended with %d", code) : compare(dir, reference, 0);
}

// ---- The calls of a run ----

enum { MOST_CALLS = 1000 };
typedef struct {
    int n;
    char kind[MOST_CALLS + 1][12];  // "write", ... of call 1, 2, ...
    char link[MOST_CALLS + 1];      // it concerns `latest`, without which a checkpoint is still
                                    // valid
    int saved[MOST_CALLS + 1];      // the step of the last checkpoint completed before it
} Calls;

static void list_calls(const char *dir, const char *more, Calls *c) {
    Faults f = fault(FAULT_NONE, 0, 0, 0);
    char *path = xprintf("%s/calls", dir), line[700], name[600];
    f.log = fopen(path, "w");
    if (!f.log) die("%s: %s", path, strerror(errno));
    const int code = run(dir, more, &f);
    fclose(f.log);
    if (code) die("the reference run ended with %d: see %s/log", code, dir);
    FILE *in = fopen(path, "r");
    int saved = 0, number;
    memset(c, 0, sizeof *c);
    while (in && fgets(line, sizeof line, in)) {
        CHECK(c->n < MOST_CALLS, "more calls than expected");
        if (sscanf(line, "%d %11s %599s", &number, c->kind[c->n + 1], name) != 3)
            die("%s: %s", path, line);
        c->saved[++c->n] = saved;
        c->link[c->n] = !strcmp(name, "run/latest") || !strcmp(name, "run/.latest.tmp");
        if (!strcmp(c->kind[c->n], "rename") && !strcmp(name, "run/latest")) saved += EVERY;
    }
    fclose(in);
    free(path);
}

// ---- Kills ----

// Runs once with more options, ending at call `at`, and checks what is left.
static void kill_at(const Calls *c, int mode, int64_t at, const char *more, const char *reference) {
    char *dir = new_case(), *wrong = NULL, what[100];
    const Faults f = fault(mode, 0, at, at);
    const int code = run(dir, more, &f);
    tt.kills++;
    snprintf(what, sizeof what, "%s at call %lld (%s)",
             mode == FAULT_POWER ? "power cut" : mode == FAULT_HALF ? "kill within" : "kill",
             (long long)at, c->kind[at]);
    char *out = xprintf("%s/run", dir);
    if (code != -SIGKILL) wrong = xprintf("it ended with %d", code);
    checkpoint_recover(out);                             // --resume does this first
    if (!wrong && newest(dir) < c->saved[at])
        wrong = xprintf("the checkpoint of step %d is lost, %lld is the newest", c->saved[at],
                        (long long)newest(dir));
    free(out);
    if (!wrong) wrong = finish_run(dir, more, reference);
    done(what, dir, wrong);
}

static void kill_at_every_call(const Calls *c) {
    static const int modes[] = {FAULT_KILL, FAULT_HALF, FAULT_POWER};
    for (int m = 0; m < 3; m++)
        for (int at = 1 + (tt.shorter ? m : 0); at <= c->n; at += tt.shorter ? 13 : 1)
            if (mine(at) && (modes[m] != FAULT_HALF || !strcmp(c->kind[at], "write")))
                kill_at(c, modes[m], at, "", tt.reference);
}

// The same for adapters of the reference's final model: a checkpoint has other files.
static void kill_adapters(void) {
    static const int modes[] = {FAULT_KILL, FAULT_POWER};
    char *reference = new_case(),
         *more = xprintf("--init-from %s/run/step_00000006 --lora 2 --lora-norms 1 --lr 1e-2",
                         tt.reference);
    Calls c;
    list_calls(reference, more, &c);
    for (int m = 0; m < 2; m++)
        for (int at = 1 + m; at <= c.n; at += tt.shorter ? 17 : 1)
            if (mine(at)) kill_at(&c, modes[m], at, more, reference);
    char *wrong = compare(reference, reference, 0);
    free(more);
    done("adapters", reference, wrong);
}

// A run that is killed repeatedly, at calls and times derived from the case's number.
static void kill_at_random(int number) {
    char *dir = new_case(), *wrong = NULL, what[100];
    uint64_t draw = 0;
    int code = 1;
    for (int i = 0; i < 40 && code && !wrong; i++) {
        const uint32_t *w = rng_words(7, STREAM_TEST, (uint64_t)number, (uint32_t)draw++, 0).v;
        Faults f = fault(w[0] % 2 ? FAULT_KILL : FAULT_POWER, 0, 1 + w[1] % 90, INT64_MAX);
        const pid_t child = start(dir, "--resume", w[2] % 2 ? &f : NULL);
        if (w[2] % 2 == 0) {
            const struct timespec t = {0, 100000 + w[3] % 8000000};
            nanosleep(&t, NULL);
            kill(child, SIGKILL);
        }
        code = wait_for(child);
        tt.kills += code == -SIGKILL;
        if (code != 0 && code != -SIGKILL) wrong = xprintf("it ended with %d", code);
    }
    snprintf(what, sizeof what, "killed at random, case %d", number);
    if (!wrong) wrong = finish_run(dir, "", tt.reference);
    done(what, dir, wrong);
}

// Copies a folder.
static char *copy_case(const char *from) {
    char *dir = xprintf("%s/%d", tt.root, tt.serial++),
        *command = xprintf("cp -a '%s' '%s'", from, dir);
    if (system(command)) die("%s failed", command);
    free(command);
    return dir;
}

static void damage(const char *dir, const char *name, off_t at, unsigned char flip) {
    char *path = xprintf("%s/%s", dir, name);
    unsigned char byte;
    const int fd = open(path, O_RDWR);
    if (fd < 0) die("%s: %s", path, strerror(errno));
    if (flip ? pread(fd, &byte, 1, at) != 1 || (byte ^= flip, pwrite(fd, &byte, 1, at) != 1)
        : ftruncate(fd, at) != 0)
        die("%s: %s", path, strerror(errno));
    close(fd);
    free(path);
}

// Saves a step again over its damaged checkpoint, which could not be set aside: also kills between
// the two renames.
static void kill_at_replacing(void) {
    char *from = new_case(), *in_the_way = xprintf("%s/run/step_00000006.damaged", from),
        *again = NULL, *wrong = NULL;
    if (run(from, "--keep 0", NULL)) wrong = xprintf("the run to be damaged failed");
    damage(from, "run/step_00000006/model.safetensors", 0, 0);
    directory_make(in_the_way);
    Calls c;
    again = copy_case(from);
    list_calls(again, "--resume", &c);
    done("a step saved again", again, compare(again, tt.reference, 0));
    for (int m = 0; m < 2; m++)
        for (int at = 1; at <= c.n; at += tt.shorter ? 11 : 1) {
            if (!mine(at)) continue;
            const Faults f = fault(m ? FAULT_POWER : FAULT_KILL, 0, at, at);
            char *dir = copy_case(from);
            const int code = run(dir, "--resume", &f);
            tt.kills++;
            char *bad = code != -SIGKILL ? xprintf("it ended with %d", code) : finish_run(dir, "",
                tt.reference);
            done("a step saved again and killed", dir, bad);
        }
    free(in_the_way);
    done("a step to be saved again", from, wrong);
}

// ---- A failing disk ----

// The number of lines of a log that begin with `word`.
static int count_lines(const char *dir, const char *word) {
    Text log = read_text(dir, "log");
    int n = 0;
    for (const char *line = log.s; line; line = strchr(line, '\n'), line += line != NULL)
        n += !strncmp(line, word, strlen(word));
    text_free(&log);
    return n;
}

// A failed removal only causes a warning.
static int removes(const Calls *c, int64_t at) {
    return !strcmp(c->kind[at], "unlink") || !strcmp(c->kind[at], "rmdir");
}

// One call fails (last == at), or all from there on. What must hold: no death by a signal; the run
// continues to the same result, or ends with one line that gives the reason, leaving the previous
// checkpoint complete; then --resume reaches that result.
static void refuse_at(const Calls *c, int mode, int error, int64_t at, int forever,
                      const char *more) {
    const Faults f = fault(mode, error, at, forever ? INT64_MAX : at);
    char *dir = new_case(), *wrong = NULL, what[200];
    const int code = run(dir, more, &f), quiet = removes(c, at);
    // the first call from here on that is not a removal
    int64_t rest = at;
    while (rest <= c->n && removes(c, rest)) rest++;
    snprintf(what, sizeof what, "%s%s at call %lld (%s)%s %s",
             mode == FAULT_SHORT ? "short write, " : "", strerror(error), (long long)at,
             c->kind[at], forever ? " and after" : "", more);
    if (code != 0 && code != 1) wrong = xprintf("it ended with %d", code);
    else if (code == 1 && (count_lines(dir, "error: ") != 1 || !log_has(dir, strerror(error)) ||
                           !log_has(dir, "run")))
        wrong = xprintf("not one line that tells what, why and where");
    else if (code == 0 && !log_has(dir, "warning: ")) wrong = xprintf("not a word about it");
    else if (code == 0 && forever && rest <= c->n) wrong = xprintf("it ended well without a disk");
    else if (code == 0 && *more && !quiet && !c->link[at])
        wrong = xprintf("it went on in spite of --on-save-error stop");
    else if (newest(dir) < c->saved[at])
        wrong = xprintf("the checkpoint of step %d is lost", c->saved[at]);
    // trainer.json contains the options
    const char *reference = *more ? tt.stopping : tt.reference;
    if (!wrong && code == 0) wrong = compare(dir, reference, c->link[at]);
    if (!wrong) wrong = finish_run(dir, more, reference);
    done(what, dir, wrong);
}

// A full disk at every call, once and permanently; the other errors alternate.
static void refuse_at_every_call(const Calls *c) {
    static const int others[] = {EIO, EACCES, EROFS, EFBIG};
    for (int at = 1; at <= c->n; at += tt.shorter ? 19 : 1) {
        if (!mine(at)) continue;
        refuse_at(c, FAULT_ERROR, ENOSPC, at, 0, "");
        refuse_at(c, FAULT_ERROR, ENOSPC, at, 1, "");
        refuse_at(c, FAULT_ERROR, others[at % 4], at, 0, "");
        refuse_at(c, FAULT_ERROR, others[(at + 1) % 4], at, 0, STOP);
        if (strcmp(c->kind[at], "write")) continue;
        refuse_at(c, FAULT_SHORT, ENOSPC, at, 0, "");
        refuse_at(c, FAULT_SHORT, ENOSPC, at, 1, "");
    }
}

// ulimit -f: SIGXFSZ must not end the run.
static void file_limit(void) {
    char *dir = new_case(), *wrong = NULL;
    // config.txt fits, the optimizer's state does not
    const struct rlimit small = {3500, 3500};
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        if (setrlimit(RLIMIT_FSIZE, &small)) _exit(98);
        _exit(run(dir, "", NULL) & 255);
    }
    const int code = wait_for(child);
    if (code != 1 || !log_has(dir, strerror(EFBIG))) wrong = xprintf("it ended with %d", code);
    if (!wrong) wrong = finish_run(dir, "", tt.reference);
    done("a limit of file sizes", dir, wrong);
}

// ---- Damage ----

enum { SIX_FILES = 7 };
static const char *const six_files[SIX_FILES] = {
    "run/step_00000006/model.safetensors", "run/step_00000006/config.json",
    "run/step_00000006/optimizer.safetensors",
    "run/step_00000006/trainer.json", "run/step_00000006/tokenizer.bin",
    "run/step_00000006/tokenizer.json",
    "run/step_00000006/tokenizer_config.json"};

// Flips every bit of every file and cuts it at every length: each must be detected and located.
static void every_damage(const char *from) {
    char *dir = copy_case(from), *six = xprintf("%s/run/step_00000006", dir), *wrong = NULL;
    int found = 0;
    for (int i = 0; i < SIX_FILES; i++) {
        Text whole = read_text(dir, six_files[i]);
        const char *name = strrchr(six_files[i], '/') + 1;
        for (size_t at = 0; at < whole.n && !wrong; at += tt.shorter ? 1 + at / 3 : 1)
            for (int bit = -1; bit < 8 && !wrong; bit += tt.shorter ? 4 : 1) {
                damage(dir, six_files[i], (off_t)at, bit < 0 ? 0 : (unsigned char)(1 << bit));
                char *said = checkpoint_verify(six);
                if (!said || !strstr(said, name) || !strstr(said, "byte"))
                    wrong = xprintf("%s, byte %zu, bit %d: %s", name, at, bit,
                                    said ? said : "nothing was found");
                free(said);
                found++;
                if (bit >= 0) damage(dir, six_files[i], (off_t)at, (unsigned char)(1 << bit));
                else {
                    char *path = xprintf("%s/%s", dir, six_files[i]);
                    FILE *f = fopen(path, "wb");
                    if (!f || fwrite(whole.s, 1, whole.n, f) != whole.n || fclose(f))
                        die("%s: %s", path, strerror(errno));
                    free(path);
                }
            }
        text_free(&whole);
    }
    char *sound = checkpoint_verify(six);
    if (!wrong && sound) wrong = xstrdup(sound);
    printf("damages found: %d\n", found);
    free(sound), free(six);
    done("damage", dir, wrong);
}

// --resume skips a damaged checkpoint, reports it, and reaches the same result; the damaged one is
// kept under another name.
static void resume_from_older(const char *from) {
    for (int i = 0; i < 2 * SIX_FILES; i++) {
        char *dir = copy_case(from), *wrong = NULL, *aside = xprintf("%s/run/step_00000006.damaged",
                                                                     dir);
        damage(dir, six_files[i / 2], 10, i % 2 ? 0 : 4);
        wrong = finish_run(dir, "", tt.reference);
        if (!wrong &&
            (!log_has(dir, "damaged") || !log_has(dir, strrchr(six_files[i / 2], '/') + 1)))
            wrong = xprintf("no word about the damage");
        if (!wrong && !path_exists(aside)) wrong = xprintf("the damaged one is gone");
        free(aside);
        done("a damaged checkpoint passed over", dir, wrong);
    }
}

// ---- Signals, and two runs at once ----

// A child pauses in its n-th training pass or n-th evaluation pass, reports it, and waits until a
// signal has set a flag or, with `stay`, forever.
static struct { int step, evaluation, stay, steps, evaluations, tell[2]; Engine engine; } pause_at;

static void pause_now(void) {
    const struct timespec t = {0, 1000000};
    if (write(pause_at.tell[1], "", 1) != 1) _exit(97);
    while (pause_at.stay || !(signals_stop || signals_save)) nanosleep(&t, NULL);
}

static double paused_run(Model *m, const Batch *batch, const Pass *pass) {
    if (pass->weight != 0 ? ++pause_at.steps == pause_at.step : ++pause_at.evaluations ==
        pause_at.evaluation)
        pause_now();
    return pause_at.engine.run(m, batch, pass);
}

// Starts a run that pauses, and returns when it does.
static pid_t start_paused(const char *dir, const char *more, int step, int evaluation, int stay) {
    char byte;
    pause_at.step = step, pause_at.evaluation = evaluation, pause_at.stay = stay;
    if (pipe(pause_at.tell)) die("pipe: %s", strerror(errno));
    tt.engine.run = paused_run;
    const pid_t child = start(dir, more, NULL);
    tt.engine = pause_at.engine;
    close(pause_at.tell[1]);
    if (read(pause_at.tell[0], &byte, 1) != 1)
        printf("the run in %s did not come to its pause\n", dir);
    close(pause_at.tell[0]);
    return child;
}

// The run stops in a step or an evaluation, saves, and exits with 0; --resume reaches the
// uninterrupted run's result, including the interrupted evaluation.
static void stop_by(int number, int step, int evaluation, int64_t saved) {
    char *dir = new_case(), *wrong = NULL, what[100];
    snprintf(what, sizeof what, "%s in step %d, evaluation %d", strsignal(number), step,
             evaluation);
    const pid_t child = start_paused(dir, "", step, evaluation, 0);
    kill(child, number);
    const int code = wait_for(child);
    if (code || !log_has(dir, number == SIGTERM ? "stopped by SIGTERM" : number ==
                         SIGINT ? "by SIGINT" : "by SIGHUP"))
        wrong = xprintf("it ended with %d", code);
    else if (newest(dir) != saved)
        wrong = xprintf("step %lld is saved, not %lld", (long long)newest(dir), (long long)saved);
    if (!wrong) wrong = finish_run(dir, "", tt.reference);
    done(what, dir, wrong);
}

// A second signal ends the run at once, as if it were not caught.
static void stop_at_once(int number) {
    char *dir = new_case(), *wrong = NULL;
    const pid_t child = start_paused(dir, "", 7, 0, 1);
    const struct timespec t = {0, 1000000};
    int status = 0;
    do {                                                 // two may be delivered as one
        kill(child, number);
        nanosleep(&t, NULL);
    } while (waitpid(child, &status, WNOHANG) == 0);
    if (!WIFSIGNALED(status) || WTERMSIG(status) != number)
        wrong = xprintf("its status is %d", status);
    if (!wrong) wrong = finish_run(dir, "", tt.reference);
    done("a second signal", dir, wrong);
}

// SIGUSR1 in step 3, which would not be saved otherwise: it is, and the run continues to its end.
static void save_by_signal(void) {
    char *dir = new_case(), *wrong = NULL;
    const pid_t child = start_paused(dir, "--save-every 0 --keep 0", 6, 0, 0);
    kill(child, SIGUSR1);
    const int code = wait_for(child);
    char *three = xprintf("%s/run/step_00000003", dir), *bad = checkpoint_verify(three);
    if (code || bad) wrong = xprintf("it ended with %d; %s", code, bad ? bad : "step 3 is whole");
    free(three), free(bad);
    if (!wrong) {                                        // its trainer.json has other options
        Text a = timeless(dir), b = timeless(tt.reference);
        if (strcmp(a.s, b.s)) wrong = xprintf("metrics.jsonl differs");
        text_free(&a), text_free(&b);
    }
    done("SIGUSR1", dir, wrong);
}

// The second of two runs refuses to start and names the first; when that is dead, the directory is
// free.
static void two_runs(void) {
    char *dir = new_case(), *wrong = NULL, host[256] = "";
    const pid_t first = start_paused(dir, "", 11, 0, 1);
    const int second = run(dir, "--resume", NULL);
    gethostname(host, sizeof host - 1);
    char *holder = xprintf("in use by process %ld on %s", (long)first, host);
    if (second != 1 || !log_has(dir, holder))
        wrong = xprintf("the second run ended with %d", second);
    kill(first, SIGKILL);
    if (wait_for(first) != -SIGKILL && !wrong) wrong = xprintf("the first run has ended");
    free(holder);
    if (!wrong) wrong = finish_run(dir, "", tt.reference);
    done("two runs", dir, wrong);
}

// ---- A run whose open files are removed or replaced ----

// Runs `command` in the run's folder during step 4, which SIGUSR1 then saves; the run ends with
// `code`. After `undo`, --resume reaches the uninterrupted run's result.
static void lose(const char *command, int code, const char *said, const char *undo) {
    char *dir = new_case(), *wrong = NULL, *line[2];
    const pid_t child = start_paused(dir, "", 7, 0, 0);
    for (int i = 0; i < 2; i++) line[i] = xprintf("cd '%s' && { %s; }", dir, i ? undo : command);
    if (system(line[0])) wrong = xprintf("%s failed", line[0]);
    kill(child, SIGUSR1);
    const int ended = wait_for(child);
    if (!wrong && (ended != code || !log_has(dir, said)))
        wrong = xprintf("it ended with %d", ended);
    if (!wrong && system(line[1])) wrong = xprintf("%s failed", line[1]);
    if (!wrong) wrong = finish_run(dir, "", tt.reference);
    free(line[0]), free(line[1]);
    done(command, dir, wrong);
}

static void lose_everything(void) {
    static const char not_this[] = "run is no longer this run's directory";
    lose("mv run moved", 1, not_this, "! test -e run && mv moved run");
    lose("mv run moved && mkdir run", 1, not_this, "rmdir run && mv moved run");
    lose("mv run moved && cp -R moved run", 1, not_this,
         "! test -e run/step_00000004 && rm -r run && mv moved run");
    lose("cp -R run copy && rm -r run", 1, not_this, "! test -e run && mv copy run");
    lose("rm run/metrics.jsonl", 0, "metrics.jsonl was removed", ":");
    lose("cp run/metrics.jsonl x && mv x run/metrics.jsonl", 0, "metrics.jsonl was replaced", ":");
    lose("rm run/.lock", 0, "has locked it again", ":");
    lose("rm run/.lock && : > run/.lock", 0, "has locked it again", ":");
    lose("rm run/.lock run/metrics.jsonl", 0, "has locked it again", ":");
    lose("rm run/.lock && cp run/metrics.jsonl x && mv x run/metrics.jsonl", 1,
         "another run was started there",
         "! test -e run/step_00000004");
}

// ---- Two ranks, one of which gets a signal ----

static void as_rank(int rank, int world) {
    char number[16], size[16];
    if (!world) {
        unsetenv("RANK"), unsetenv("WORLD_SIZE"), unsetenv("LOCAL_RANK");
        return;
    }
    snprintf(number, sizeof number, "%d", rank), snprintf(size, sizeof size, "%d", world);
    setenv("RANK", number, 1), setenv("LOCAL_RANK", number, 1), setenv("WORLD_SIZE", size, 1);
}

// Runs both; sends `number` to rank 1 in its n-th step or evaluation, 0: never. Returns NULL, or
// what is wrong.
static char *run_pair(const char *dir, const char *resume, int number, int step, int evaluation) {
    char *more = xprintf("--rendezvous dir:meet --job-token torture%s", resume);
    as_rank(0, 2);
    const pid_t zero = start(dir, more, NULL);
    as_rank(1, 2);
    const pid_t one = number ? start_paused(dir, more, step, evaluation, 0) : start(dir, more,
        NULL);
    as_rank(0, 0);
    if (number) kill(one, number);
    const int a = wait_for(zero), b = wait_for(one);
    free(more);
    return a || b ? xprintf("the ranks ended with %d and %d", a, b) : NULL;
}

static void two_ranks(void) {
    char *reference = new_case(), *whole = run_pair(reference, "", 0, 0, 0);
    static const struct { int step, evaluation, saved; } when[] = {{2, 0, 2}, {0, 1, 3}, {5, 0, 5}};
    for (int i = 0; i < 3 && !whole; i++) {
        char *dir = new_case(), *wrong = run_pair(dir, "", SIGTERM, when[i].step,
                                                  when[i].evaluation);
        if (!wrong && newest(dir) != when[i].saved)
            wrong = xprintf("step %lld is saved", (long long)newest(dir));
        if (!wrong && !log_has(dir, "stopped by a signal to another rank"))
            wrong = xprintf("rank 0 does not say so");
        if (!wrong) wrong = run_pair(dir, " --resume", 0, 0, 0);
        if (!wrong) wrong = compare(dir, reference, 0);
        done("a signal to rank 1", dir, wrong);
    }
    done("two ranks", reference, whole);
}

// ---- Shards ----

enum { SHARD_TOKENS = 10, SHARDS = 3 };

static void write_shards(const char *prefix, int shards, int tokens) {
    ShardWriter w;
    shard_writer_open(&w, prefix, 8, tokens);
    for (int i = 0; i < shards * tokens; i++) {
        const int token = (int)(rng_words(3, STREAM_TEST, (uint64_t)i, 0, 0).v[0] % 8);
        shard_writer_append(&w, &token, 1);
    }
    shard_writer_close(&w);
}

// Eight tokens, one letter each, the last being end-of-text.
static void write_tokenizer(const char *path) {
    enum { TOKENS = 8 };
    unsigned char file[LLMC_HEADER_BYTES + 2 * TOKENS];
    const uint32_t words[4] = {TOKENIZER_MAGIC, 2, TOKENS, TOKENS - 1};
    llmc_header(file, words, 4);
    for (int i = 0; i < TOKENS; i++) {
        file[LLMC_HEADER_BYTES + 2 * i] = 1;
        file[LLMC_HEADER_BYTES + 2 * i + 1] = (unsigned char)('a' + i);
    }
    file_write_whole(path, file, sizeof file);
}

// A shard is complete or absent, wherever its writer was killed.
static void kill_shards(void) {
    int64_t at = 1;
    for (int code = -SIGKILL; code == -SIGKILL; at += tt.shorter ? 7 : 1) {
        char *dir = new_case(), *wrong = NULL;
        fflush(NULL);
        const pid_t child = fork();
        if (child == 0) {
            in_folder(dir);
            faults = fault(at % 2 ? FAULT_KILL : FAULT_POWER, 0, at, at);
            write_shards("s", SHARDS, SHARD_TOKENS);
            _exit(0);
        }
        code = wait_for(child);
        tt.kills += code == -SIGKILL;
        for (int i = 0; i < SHARDS; i++) {
            char *path = xprintf("%s/s_%06d.bin", dir, i);
            struct stat st;
            const int there = stat(path, &st) == 0;
            if (there && st.st_size != LLMC_HEADER_BYTES + 2 * SHARD_TOKENS)
                wrong = xprintf("%s has %lld bytes", path, (long long)st.st_size);
            if (!there && code == 0) wrong = xprintf("%s is missing", path);
            free(path);
        }
        done("shards", dir, wrong);
    }
}

// ---- Everything ----

int main(int argc, char **argv) {
    const char *base = getenv("TMPDIR");
    const double from = clock_seconds();
    Calls c;
    // a shell's background jobs, or nohup, ignore them
    signal(SIGINT, SIG_DFL), signal(SIGHUP, SIG_DFL);
    // children end by die() and by signals, and free nothing
    leave_memory();
    tt.parts = 1;
    tt.shorter = argc == 2 && !strcmp(argv[1], "--short");
    if (argc > 1 && !tt.shorter && (argc != 3 || strcmp(argv[1], "--part") ||
                                    sscanf(argv[2], "%d/%d", &tt.part, &tt.parts) != 2 ||
                                    tt.parts < 1))
        die("torture [--short | --part I/N]");
    setvbuf(stdout, NULL, _IOLBF, 0);
    snprintf(tt.root, sizeof tt.root, "%s/droppath_torture_XXXXXX", base ? base : "/tmp");
    if (!mkdtemp(tt.root)) die("cannot make %s: %s", tt.root, strerror(errno));
    tt.engine = *engine_default();
    tt.engine.peak = no_peak;
    pause_at.engine = tt.engine;
    char *data = xprintf("%s/data", tt.root), *prefix = xprintf("%s/train", data),
        *shard = xprintf("%s_000000.bin", prefix);
    char *name = xprintf("%s/train.bin", data), *tokenizer = xprintf("%s/tokenizer.bin", data);
    directory_make(data);
    write_shards(prefix, 1, 400);
    file_rename(shard, name);
    write_tokenizer(tokenizer);
    free(prefix), free(shard), free(name), free(data), free(tokenizer);

    tt.reference = new_case();
    list_calls(tt.reference, "", &c);
    printf("an uninterrupted run changes the disk by %d calls\n", c.n);
    tt.stopping = new_case();
    char *all = new_case();
    if (run(tt.stopping, STOP, NULL)) fail(STOP, tt.stopping, "it failed");
    if (run(all, "--keep 0", NULL)) fail("--keep 0", all, "it failed");
    kill_at_every_call(&c);
    kill_adapters();
    kill_at_replacing();
    for (int i = 0; i < (tt.shorter ? 2 : 40); i++)
        if (mine(i)) kill_at_random(i);
    if (mine(0)) kill_shards();
    printf("kills: %d\n", tt.kills);
    refuse_at_every_call(&c);
    file_limit();
    if (mine(tt.parts - 1)) every_damage(all);
    resume_from_older(all);
    stop_by(SIGTERM, 7, 0, 4);
    stop_by(SIGINT, 1, 0, 1);
    stop_by(SIGHUP, 9, 0, 5);
    // in the evaluation of step 3, and in that of the last step
    stop_by(SIGTERM, 0, 1, 3);
    stop_by(SIGTERM, 12, 0, 6);
    stop_at_once(SIGTERM);
    stop_at_once(SIGINT);
    save_by_signal();
    two_runs();
    lose_everything();
    two_ranks();
    printf("%d cases, %d kills, %d failed; %.0f s\n", tt.cases, tt.kills, tt.failed,
           clock_seconds() - from);
    if (!tt.failed) remove_tree(tt.root);
    return tt.failed > 0;
}
