// Tests of checkpoints: complete or absent, all damage detected, and weights in the forms in which
// others publish them.
#ifndef TEST_CHECKPOINT_H
#define TEST_CHECKPOINT_H

#include "../run/checkpoint.h"
#include "../files/files.h"
#include "../model/engines.h"
#include "test.h"
#include <sys/resource.h>

static const GptConfig checkpoint_test_config = {7, 5, 2, 2, 4};

static inline Model *checkpoint_test_model(uint64_t seed) {
    const EngineArgs args = {.B = 1, .T = 5, .threads = 1, .dtype = DTYPE_FP32, .bound = {2, 2, 4}};
    Model *m = engine_open(engine_cpu(), &checkpoint_test_config, &args);
    engine_init_weights(engine_cpu(), m, &checkpoint_test_config, seed);
    return m;
}

// Saves a model whose weights depend on the step, with nonzero moments.
static inline void checkpoint_test_save(const char *out, int64_t step) {
    const GptConfig *c = &checkpoint_test_config;
    int64_t counts[5] = {step, step - 1, step, 0, step};
    double scale[4] = {1, 1, 0.75, 0.5};
    CheckpointState s = {.step = step, .tokens = 64 * step, .consumed = 16 * step, .seq_len = 4,
                         .adamw_steps = counts,
                         .eval_scale = scale, .eot = 6, .options = "steps = 9\n"};
    Text file = {(char *)(uintptr_t)"{}\n\n", 4, 4};
    const TokenizerFiles tokenizer = {{file, {NULL, 0, 0}, file, file}};
    s.tokenizer = &tokenizer;
    Model *m = checkpoint_test_model((uint64_t)step);
    real moment[28];
    for (int i = 0; i < 28; i++) moment[i] = (real)(i + 1) / 16;
    engine_cpu()->write(m, SLOT_M, P_wte, 0, moment);
    engine_cpu()->write(m, SLOT_V, P_wte, 0, moment);
    checkpoint_save(out, engine_cpu(), m, c, &s);
    engine_cpu()->close(m);
}

// Whether two models have the same bits in this slot.
static inline int checkpoint_test_same(Model *a, Model *b, Slot slot) {
    const GptConfig *c = &checkpoint_test_config;
    int same = 1;
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            real x[64], y[64];
            CHECK(gpt_param_size(c, p) <= 64, "the test's model has grown");
            engine_cpu()->read(a, slot, p, l, x);
            engine_cpu()->read(b, slot, p, l, y);
            same &= !memcmp(x, y, gpt_param_size(c, p) * sizeof(real));
        }
    return same;
}

static int64_t checkpoint_test_counts;                   // as passed to the engine

static void checkpoint_test_resumed(Model *m, const int64_t *t) {
    (void)m;
    checkpoint_test_counts = t[1];
}

static void test_checkpoint_round_trip(void) {
    Engine e = *engine_cpu();
    e.resumed = checkpoint_test_resumed;
    const char *out = test_directory();
    checkpoint_test_save(out, 8);
    char *dir = xprintf("%s/latest", out);
    GptConfig c;
    double *scale;
    int tied;
    checkpoint_read_config(dir, &c, &scale, &tied);
    EXPECT(!memcmp(&c, &checkpoint_test_config, sizeof c), "config.json has other sizes");
    EXPECT(scale[2] == 0.75 && scale[3] == 0.5 && !tied, "config.json has other factors");
    char *json = xprintf("%s/config.json", dir);
    Text config = test_read_file(json);
    EXPECT(strstr(config.s, sizeof(real) == 8 ? "\"float64\"" : "\"float32\""), "%s", config.s);
    text_free(&config);
    free(json);
    int64_t counts[5];
    CheckpointState s = {.adamw_steps = counts, .eval_scale = scale};
    Model *saved = checkpoint_test_model(8), *loaded = checkpoint_test_model(1);
    checkpoint_load(dir, &e, loaded, &c, &s);
    EXPECT(checkpoint_test_counts == 7, "the engine is not told what it goes on from");
    EXPECT(s.step == 8 && s.tokens == 512, "step %lld, %lld tokens", (long long)s.step,
           (long long)s.tokens);
    EXPECT(s.consumed == 128 && s.seq_len == 4, "%lld samples of %d tokens", (long long)s.consumed,
           s.seq_len);
    EXPECT(counts[0] == 8 && counts[1] == 7 && counts[3] == 0, "AdamW's steps differ");
    EXPECT_TEXT(s.options, "steps = 9\n");
    EXPECT(checkpoint_test_same(saved, loaded, SLOT_PARAM), "weights differ");
    real moment[28];
    for (Slot slot = SLOT_M; slot <= SLOT_V; slot = (Slot)(slot + 1)) {
        engine_cpu()->read(loaded, slot, P_wte, 0, moment);
        EXPECT(moment[0] == (real)0.0625 && moment[27] == (real)1.75, "moment %g",
               (double)moment[27]);
    }
    engine_cpu()->close(saved);
    engine_cpu()->close(loaded);
    free((char *)(uintptr_t)s.options);
    free(scale);
    free(dir);
}

// Changes one byte of a file, or cuts it at `at`; returns 0 past its end. *old receives the
// original bytes.
static inline int checkpoint_test_damage(const char *path, size_t at, int cut, Text *old) {
    FileMap map;
    if (file_map(&map, path) || at >= map.size) return 0;
    old->n = 0;
    text_append(old, map.data, map.size);
    file_unmap(&map);
    FILE *f = file_open(path, "wb");
    file_write(f, path, old->s, at);
    const char wrong = (char)(old->s[at] ^ 1);
    if (!cut) file_write(f, path, &wrong, 1), file_write(f, path, old->s + at + 1, old->n - at - 1);
    fclose(f);
    return 1;
}

static void test_checkpoint_finds_every_damage(void) {
    const char *out = test_directory();
    checkpoint_test_save(out, 1);
    char *dir = xprintf("%s/step_00000001", out);
    Text old = {NULL, 0, 0};
    char *sound = checkpoint_verify(dir);
    EXPECT(!sound, "%s", sound);
    for (int i = 0; i <= CHECKPOINT_ALL; i++) {
        const char *name = checkpoint_file[i];
        char *path = xprintf("%s/%s", dir, name);
        if (!path_exists(path)) {                        // only one of the tokenizer files exists
            EXPECT(!strcmp(name, "vocab.json"), "%s is missing", path);
            free(path);
            continue;
        }
        for (int cut = 0; cut < 2; cut++)
            for (size_t at = 0; checkpoint_test_damage(path, at, cut, &old); at += 1 + at / 7) {
                char *wrong = checkpoint_verify(dir);
                EXPECT(wrong && strstr(wrong, name) && strstr(wrong, "byte"),
                       "byte %zu of %s was damaged unnoticed", at, name);
                free(wrong);
                file_write_whole(path, old.s, old.n);
            }
        EXPECT(unlink(path) == 0, "%s", path);
        char *wrong = checkpoint_verify(dir);
        EXPECT(wrong && strstr(wrong, name), "%s was removed unnoticed", name);
        free(wrong);
        file_write_whole(path, old.s, old.n);
        free(path);
    }
    sound = checkpoint_verify(dir);
    EXPECT(!sound, "%s", sound);
    text_free(&old);
    free(dir);
}

// What f(arg) prints on standard error.
static Text checkpoint_test_told(void (*f)(void *), const void *arg) {
    char *log = xprintf("%s/log", test_directory());
    fflush(stderr);
    const int err = dup(2), to = open(log, O_CREAT | O_WRONLY | O_TRUNC, 0666);
    dup2(to, 2);
    f((void *)(uintptr_t)arg);
    fflush(stderr);
    dup2(err, 2), close(err), close(to);
    Text told = test_read_file(log);
    free(log);
    return told;
}

static void checkpoint_test_latest(void *out) { free(checkpoint_latest((const char *)out)); }

static void test_checkpoint_latest_is_the_newest_whole_one(void) {
    const char *out = test_directory();
    EXPECT(checkpoint_latest(out) == NULL, "there is none yet");
    for (int64_t step = 1; step <= 3; step++) checkpoint_test_save(out, step);
    char *stray = xprintf("%s/.step_00000009.tmp", out), *other = xprintf("%s/step_final", out);
    char *damaged = xprintf("%s/step_00000003/model.safetensors", out),
        *want = xprintf("%s/step_00000002", out);
    directory_make(stray);                               // left by a killed run
    directory_make(other);                               // not ours
    char *found = checkpoint_latest(out);
    EXPECT(strstr(damaged, found) == damaged && strlen(found) == strlen(want), "%s", found);
    free(found);
    EXPECT(truncate(damaged, 100) == 0, "%s", damaged);
    found = checkpoint_latest(out);
    EXPECT_TEXT(found, want);
    Text told = checkpoint_test_told(checkpoint_test_latest, out);
    EXPECT(strstr(told.s, damaged), "the damaged one is not named: %s", told.s);
    text_free(&told);
    for (int step = 1; step <= 2; step++) {
        char *path = xprintf("%s/step_%08d/trainer.json", out, step);
        EXPECT(truncate(path, 10) == 0, "%s", path);
        free(path);
    }
    EXPECT_EXIT(1, "all 3 checkpoints", checkpoint_test_latest, (void *)(uintptr_t)out);
    free(found), free(stray), free(other), free(damaged), free(want);
}

// A renamed directory: its step differs from its name, so a run would continue from a different
// step than it reports.
static void test_checkpoint_of_another_step(void) {
    const char *out = test_directory();
    char *three = xprintf("%s/step_00000003", out), *four = xprintf("%s/step_00000004", out),
        *mine = xprintf("%s/mine", out);
    for (int64_t step = 2; step <= 3; step++) checkpoint_test_save(out, step);
    file_rename(three, four);
    char *found = checkpoint_latest(out), *wrong = checkpoint_verify(four),
        *name = strrchr(found, '/') + 1;
    EXPECT_TEXT(name, "step_00000002");
    EXPECT_ERROR(wrong, "step_00000004/trainer.json: it is of step 3");
    free(found), free(wrong);
    file_rename(four, mine);                             // a name without a step is anybody's own
    wrong = checkpoint_verify(mine);
    EXPECT(!wrong, "%s", wrong);
    free(wrong), free(three), free(four), free(mine);
}

static void checkpoint_test_verify(void *dir) { free(checkpoint_verify((const char *)dir)); }

static void checkpoint_test_no_files(void *out) {
    const struct rlimit none = {0, 0};
    if (setrlimit(RLIMIT_NOFILE, &none)) die("setrlimit: %s", strerror(errno));
    checkpoint_test_latest(out);
}

// The next free descriptor.
static int checkpoint_test_descriptor(void) {
    const int fd = dup(0);
    close(fd);
    return fd;
}

// What cannot be opened now is not skipped as damaged, nor does a directory that cannot be listed
// count as one without checkpoints; unreadable contents count as damaged, and do not end the
// program.
static void test_checkpoint_unreadable(void) {
    const char *out = test_directory();
    for (int64_t step = 1; step <= 2; step++) checkpoint_test_save(out, step);
    EXPECT_EXIT(1, strerror(EMFILE), checkpoint_test_no_files, (void *)(uintptr_t)out);
    static const char *const file[4] = {"trainer.json", "config.json", "model.safetensors",
                                        "optimizer.safetensors"};
    char *dir = xprintf("%s/step_00000002", out), *path = NULL, *away = xprintf("%s/away", out);
    for (int i = 0; i < 4; i++) {
        free(path);
        path = xprintf("%s/%s", dir, file[i]);
        file_rename(path, away);
        EXPECT(!symlink(file[i], path), "%s", path);
        EXPECT_EXIT(1, strerror(ELOOP), checkpoint_test_latest, (void *)(uintptr_t)out);
        // It could be opened when it was examined, but not when it is read.
        EXPECT_EXIT(1, strerror(ELOOP), checkpoint_test_verify, dir);
        EXPECT(!unlink(path) && !mkfifo(path, 0600), "%s", path);
        const int descriptor = checkpoint_test_descriptor();
        char *found = checkpoint_latest(out);            // must not wait for a writer
        EXPECT_ERROR(found, "step_00000001");
        EXPECT(checkpoint_test_descriptor() == descriptor, "files stay open");
        free(found);
        EXPECT(!unlink(path) && !symlink("/dev/zero", path), "%s", path);
        found = checkpoint_latest(out);                  // must not read an endless file
        EXPECT_ERROR(found, "step_00000001");
        free(found);
        if (i < 3) file_rename(away, path);
    }
    const char *const unreadable = "/proc/self/mem";     // its first byte is unmapped
    if (path_exists(unreadable)) {
        EXPECT(!unlink(path) && !symlink(unreadable, path), "%s", path);
        // Not known to be damaged, so no reason to use an older one.
        EXPECT_EXIT(1, strerror(EIO), checkpoint_test_latest, (void *)(uintptr_t)out);
    }
    free(dir), free(path), free(away);
}

// A trainer.json with one text replaced by another, and its checksum corrected.
static inline char *checkpoint_test_trainer(const Text *whole, const char *from, const char *to) {
    const char *at = strstr(whole->s, from), *self = strstr(whole->s, CHECKPOINT_SELF);
    char hex[SHA256_HEX];
    CHECK(at && self && at < self, "trainer.json has no %s", from);
    char *body = xprintf("%.*s%s%.*s", (int)(at - whole->s), whole->s, to,
                         (int)(self - at - (long)strlen(from)), at + strlen(from));
    sha256_hex(hex, body, strlen(body));
    char *all = xprintf("%s" CHECKPOINT_SELF "%s\"\n}\n", body, hex);
    free(body);
    return all;
}

// Each value and name in trainer.json is validated, whatever its checksum: a file with a correct
// one may come from another version, or from anybody.
static void test_checkpoint_trainer_refuses(void) {
    static const struct { const char *from, *to, *part; } cases[] = {
        {"checkpoint 1", "checkpoint 2", "\"format\""}, {"\"format\"", "\"tokens\"", "there twice"},
        {"\"step\": 5", "\"step\": -1", "\"step\""}, {"\"step\": 5", "\"step\": 1e3", "\"step\""},
        {"\"step\": 5", "\"step\": 1152921504606846977", "\"step\""},
        {"\"step\": 5", "\"steps\": 5", "\"step\""},
        {"\"tokens\": 320", "\"tokens\": -320", "\"tokens\""},
        {"\"tokens\": 320", "\"tokens\": 1152921504606846977", "\"tokens\""},
        {"\"tokens\": 320", "\"tokens\": 99999999999999999999", "\"tokens\""},
        {"\"consumed\": 80", "\"consumed\": -1", "\"consumed\""},
        {"\"consumed\": 80", "\"consumed\": 288230376151711745", "\"consumed\""},
        {"\"consumed\": 80", "\"consumed\": null", "\"consumed\""},
        {"\"seq_len\": 4", "\"seq_len\": 16777217", "\"seq_len\""},
        {"\"seq_len\"", "\"length\"", "\"seq_len\""},
        {"\"consumed\": 80", "\"consumed\": 288230376151711744", NULL},
        {"\"consumed\"", "\"older\"", NULL}, {"\"tokens\": 320", "\"token\": 320", "\"tokens\""},
        {"\"bad_steps\": 0", "\"bad_steps\": -1", "\"bad_steps\""},
        {"\"bad_steps\": 0", "\"bad_steps\": 1000000001", "\"bad_steps\""},
        {"\"bad_steps\": 0", "\"bad_steps\": \"0\"", "\"bad_steps\""},
        {"\"losses\": [", "\"losses\": 5, \"l\": [", "lists of at most 128"},
        {"\"losses\": [", "\"losses\": [\"a\"", "no finite number"},
        {"\"losses\": [", "\"losses\": [1e999", "no finite number"},
        {"\"losses\": [", "\"losses\": [null", "no finite"},
        {"\"grad_norms\": []", "\"grad_norms\": {}", "lists of at most 128"},
        {"\"options\": \"steps", "\"options\": 7, \"x\": \"steps", "\"options\""},
        {"\"options\": \"steps", "\"options\": \"\\u0000", "\"options\""},
        {"\"files\": {", "\"files\": {\"config.json\": \"\", ", "twice"},
        {"\"tokenizer.bin\": \"", "\"tokenizer.bin\": \"0", "\"files\""},
        {"\"tokenizer.bin\": 4", "\"tokenizer\": 4", "\"sizes\""},
        {"\"tokenizer.bin\": 4", "\"tokenizer.bin\": 5", "5 were"},
        {"\"tokenizer.bin\": \"", "\"guest\": \"", NULL},
        {"\"sizes\": {", "\"sizes\": {\"config.json\": 1, ", "twice"},
        {"\"marks\": {", "\"marks\": {\"config.json\": \"\", ", "twice"},
        {"\"files\": {", "\"files\": [], \"f\": {", "\"files\""},
        {"\"config.json\": \"", "\"config.json\": \"0", "\"files\""},
        {"\"config.json\": \"", "\"config.js\": \"", "\"files\""},
        {"\"sizes\": {\"model.safetensors\": ", "\"sizes\": {\"model.safetensors\": -",
         "\"sizes\""},
        {"\"sizes\": {\"model.safetensors\": ",
         "\"sizes\": {\"model.safetensors\": 9999999999999999", "\"sizes\""},
        {"\"sizes\": {\"model", "\"sizes\": {\"m\": 3, \"modell", "\"sizes\""},
        {"\"sizes\": {", "\"sizes\": 3, \"s\": {", "\"sizes\""},
        {"\"marks\": {\"model.safetensors\": \"", "\"marks\": {\"model.safetensors\": \"0123abcd",
         "\"marks\""},
        {"\"marks\": {\"model.safetensors\": \"\"", "\"marks\": {\"model.safetensors\": 0",
         "\"marks\""},
        {"\"tokens\"", "\"more\": [1, {}], \"tokens\"", NULL}, {"\"marks\"", "\"older\"", NULL},
        {"\"bad_steps\"", "\"older\"", NULL}};
    const char *out = test_directory();
    checkpoint_test_save(out, 5);
    char *dir = xprintf("%s/step_00000005", out), *path = xprintf("%s/trainer.json", dir);
    Text whole = test_read_file(path);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *changed = checkpoint_test_trainer(&whole, cases[i].from, cases[i].to);
        file_write_whole(path, changed, strlen(changed));
        char *wrong = checkpoint_verify(dir);            // so --resume skips it instead of failing
        if (cases[i].part)
            EXPECT(wrong && strstr(wrong, cases[i].part), "%s: %s", cases[i].to,
                   wrong ? wrong : "accepted");
        else EXPECT(!wrong, "%s", wrong);
        free(changed), free(wrong);
    }
    text_free(&whole);
    free(dir), free(path);
}

// The smallest and largest values allowed in trainer.json; and reading a state over another one
// leaves nothing of it.
static void test_checkpoint_state(void) {
    const int64_t most = (int64_t)1 << 60;
    const struct { const char *from, *to; int64_t step, tokens; int bad_steps, losses, norms;
                   } cases[] = {
        {"\"step\": 5", "\"step\": 0", 0, 320, 0, 0, 0},
        {"\"step\": 5", "\"step\": 1152921504606846976", most, 320, 0, 0, 0},
        {"\"tokens\": 320", "\"tokens\": 0", 5, 0, 0, 0, 0},
        {"\"tokens\": 320", "\"tokens\": 1152921504606846976", 5, most, 0, 0, 0},
        {"\"bad_steps\": 0", "\"bad_steps\": 1000000000", 5, 320, 1000000000, 0, 0},
        {"\"bad_steps\"", "\"older\"", 5, 320, 0, 0, 0},
        {"\"grad_norms\": [", "\"grad_norms\": [-1, 2.5", 5, 320, 0, 0, 2}};
    const char *out = test_directory();
    checkpoint_test_save(out, 5);
    char *path = xprintf("%s/step_00000005/trainer.json", out);
    Text whole = test_read_file(path);
    CheckpointState s;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        memset(&s, 0, sizeof s);
        s.step = s.tokens = s.bad_steps = s.losses.n = s.norms.n = 7;
        char *changed = checkpoint_test_trainer(&whole, cases[i].from, cases[i].to);
        const char *error = checkpoint_parse_state(&s, changed, strlen(changed));
        EXPECT(!error && s.options, "%s: %s", cases[i].to, error);
        EXPECT(s.step == cases[i].step && s.tokens == cases[i].tokens &&
               s.bad_steps == cases[i].bad_steps, "%s", cases[i].to);
        EXPECT(s.losses.n == cases[i].losses && s.norms.n == cases[i].norms, "%s", cases[i].to);
        free(changed), free((char *)(uintptr_t)s.options);
    }
    EXPECT(s.norms.value[0] == -1 && s.norms.value[1] == 2.5, "other numbers");
    static const char *const missing[2] = {"\"step\"", "\"tokens\""};
    for (int i = 0; i < 2; i++) {
        char *changed = checkpoint_test_trainer(&whole, missing[i], "\"x\"");
        s.step = s.tokens = 7;
        EXPECT_ERROR(checkpoint_parse_state(&s, changed, strlen(changed)), missing[i]);
        free(changed);
    }
    for (int n = 128; n <= 129; n++) {
        Text t = {NULL, 0, 0};
        text_printf(&t, "\"losses\": [0");
        for (int i = 1; i < n; i++) text_printf(&t, ", %d", i);
        char *changed = checkpoint_test_trainer(&whole, "\"losses\": [", t.s);
        s.options = NULL;
        const char *error = checkpoint_parse_state(&s, changed, strlen(changed));
        EXPECT(n == 128 ? !error && s.losses.n == 128 : error && strstr(error, "128"),
               "%d losses: %s", n, error);
        EXPECT(!error == !!s.options, "options after an error");
        free(changed), free((char *)(uintptr_t)s.options), text_free(&t);
    }
    // digits of the marks of a file of two MiB plus one byte
    for (int n = 15; n <= 17; n++) {
        char *sizes = checkpoint_test_trainer(&whole, "\"sizes\": {",
                                              "\"sizes\": {\"model.safetensors\": 2097153, "
                                              "\"config.json\": 1, \"optimizer.safetensors\": 1, "
                                              "\"tokenizer.bin\": 1, \"tokenizer.json\": 1, "
                                              "\"tokenizer_config.json\": 1}, \"x\": {");
        char *marks = xprintf("\"marks\": {\"model.safetensors\": \"%.*s\", \"config.json\": \"\", "
                              "\"optimizer.safetensors\": \"\", \"tokenizer.bin\": \"\", "
                              "\"tokenizer.json\": \"\", \"tokenizer_config.json\": \"\"}, \"y\": "
                              "{", n, "0123456789abcdef0");
        const Text t = {sizes, strlen(sizes), 0};
        char *changed = checkpoint_test_trainer(&t, "\"marks\": {", marks);
        s.options = NULL;
        const char *error = checkpoint_parse_state(&s, changed, strlen(changed));
        EXPECT(n == 16 ? !error : error && strstr(error, "marks"), "%d digits: %s", n, error);
        free(sizes), free(marks), free(changed), free((char *)(uintptr_t)s.options);
    }
    text_free(&whole);
    free(path);
}

static void checkpoint_test_names(const char *out, const char *want) {
    char *command = xprintf("cd %s && LC_ALL=C ls -A | tr '\\n' ' '", out);
    ToolRun r = shell_run(command);
    EXPECT_TEXT(r.out.s, want);
    tool_free(&r);
    free(command);
}

// Makes OUT/name a checkpoint directory with one of its files.
static void checkpoint_test_leave(const char *out, const char *name) {
    char *dir = xprintf("%s/%s", out, name), *file = xprintf("%s/config.json", dir);
    directory_make(dir);
    file_write_whole(file, name, strlen(name));
    free(dir), free(file);
}

static void test_checkpoint_prunes_and_replaces(void) {
    const char *out = test_directory();
    // left by a kill between creating the link and renaming it
    char *stray = xprintf("%s/.latest.tmp", out);
    EXPECT(symlink("step_00000000", stray) == 0, "%s", stray);
    for (int64_t step = 1; step <= 5; step++) checkpoint_test_save(out, step);
    EXPECT(!path_exists(stray), "%s stays", stray);
    free(stray);
    checkpoint_test_leave(out, ".step_00000005.old");    // left by a kill between two renames
    checkpoint_test_save(out, 5);                        // the same step again
    checkpoint_test_names(out, "latest step_00000001 step_00000002 step_00000003 step_00000004 "
                          "step_00000005 ");
    checkpoint_prune(out, 0, 5);
    CheckpointList list = checkpoint_list(out);
    EXPECT(list.n == 5 && list.step[0] == 5 && list.step[4] == 1, "%d checkpoints", list.n);
    free(list.step);
    char *guest = xprintf("%s/step_00000001/notes.txt", out);
    fclose(file_open(guest, "wb"));
    checkpoint_prune(out, 2, 5);
    list = checkpoint_list(out);
    EXPECT(list.n == 3 && list.step[1] == 4 && list.step[2] == 1, "%d checkpoints", list.n);
    EXPECT(path_exists(guest), "a file that is not ours was removed");
    free(list.step);
    free(guest);
}

// ---- Weights as written by others ----

static inline uint16_t checkpoint_test_bf16(real x) {
    float f = (float)x;
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return (uint16_t)(bits >> 16);
}

// A GPT-2 directory without the prefix "transformer.", in bf16, with tensors that GPT-2 does not
// use.
static inline void checkpoint_test_published(const char *dir, const char *config, Model *m) {
    const GptConfig *c = &checkpoint_test_config;
    char *path = xprintf("%s/model.safetensors", dir), *json = xprintf("%s/config.json", dir);
    const int64_t mask[4] = {1, 1, 5, 5};
    static const uint16_t zeros[25];
    SafetensorsWriter w;
    FILE *f = file_open(path, "wb");
    safetensors_writer_init(&w);
    safetensors_declare(&w, "h.0.attn.bias", "BF16", 4, mask);
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            int64_t shape[2];
            int dims = gpt_param_shape(c, p, shape);
            char *name = gpt_param_name(p, l);
            safetensors_declare(&w, name, "BF16", dims, shape);
            free(name);
        }
    safetensors_begin(&w, f, path);
    safetensors_append(&w, zeros, sizeof zeros);
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            real host[64];
            engine_cpu()->read(m, SLOT_PARAM, p, l, host);
            for (size_t i = 0; i < gpt_param_size(c, p); i++) {
                uint16_t half = checkpoint_test_bf16(host[i]);
                safetensors_append(&w, &half, sizeof half);
            }
        }
    safetensors_end(&w);
    fclose(f);
    file_write_whole(json, config, strlen(config));
    free(path);
    free(json);
}

static void test_checkpoint_reads_published_weights(void) {
    const GptConfig *c = &checkpoint_test_config;
    const char *dir = test_directory();
    Model *m = checkpoint_test_model(4), *loaded = checkpoint_test_model(5);
    for (int p = 0; p < N_PARAMS; p++)                   // rounded to bf16
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            real host[64];
            engine_cpu()->read(m, SLOT_PARAM, p, l, host);
            for (size_t i = 0; i < gpt_param_size(c, p); i++)
                host[i] = (real)safetensors_bfloat(checkpoint_test_bf16(host[i]));
            engine_cpu()->write(m, SLOT_PARAM, p, l, host);
        }
    checkpoint_test_published(dir, "{\"model_type\": \"gpt2\", \"vocab_size\": 7, \"n_positions\": "
                              "5, \"n_layer\": 2, \"n_head\": 2, \"n_embd\": 4, \"attn_pdrop\": "
                              "0.1, \"n_ctx\": 5}", m);
    GptConfig read;
    double *scale;
    int tied;
    checkpoint_read_config(dir, &read, &scale, &tied);
    EXPECT(!memcmp(&read, c, sizeof read) && scale[0] == 1 && scale[3] == 1 && !tied,
           "the configuration differs");
    checkpoint_load_weights(dir, engine_cpu(), loaded, &read);
    EXPECT(checkpoint_test_same(m, loaded, SLOT_PARAM), "the weights differ");
    free(scale);
    engine_cpu()->close(m);
    engine_cpu()->close(loaded);
}

static void checkpoint_test_read_config(void *dir) {
    GptConfig c;
    double *scale;
    int tied;
    checkpoint_read_config((const char *)dir, &c, &scale, &tied);
    Model *m = checkpoint_test_model(1);
    checkpoint_load_weights((const char *)dir, engine_cpu(), m, &c);
}

static void checkpoint_test_load(void *out) {
    char *dir = xprintf("%s/latest", (char *)out);
    int64_t counts[5];
    CheckpointState s = {.adamw_steps = counts};
    checkpoint_load(dir, engine_cpu(), checkpoint_test_model(1), &checkpoint_test_config, &s);
}

// Nothing can have been updated more often than there were steps.
static void test_checkpoint_refuses_counts(void) {
    const char *out = test_directory();
    double scale[4] = {1, 1, 1, 1};
    Model *m = checkpoint_test_model(1);
    for (int i = 0; i < 5; i++)
        for (int64_t count = -1; count <= 4; count += 5) {
            int64_t counts[5] = {0};
            CheckpointState s = {.step = 3, .adamw_steps = counts, .eval_scale = scale,
                                 .options = ""};
            counts[i] = count;
            checkpoint_save(out, engine_cpu(), m, &checkpoint_test_config, &s);
            EXPECT_EXIT(1, count < 0 ? "adamw_steps has -1" : "adamw_steps has 4",
                        checkpoint_test_load, (void *)(uintptr_t)out);
        }
    engine_cpu()->close(m);
}

// Makes one element of a moment in OUT/latest infinite, and corrects its checksums.
static void checkpoint_test_bend(const char *out, CheckpointState *s, const char *tensor) {
    CheckpointSums sums;
    Text trainer = {NULL, 0, 0};
    memset(&sums, 0, sizeof sums);
    char *path = xprintf("%s/latest/trainer.json", out);
    const real infinite = (real)INFINITY;
    for (int i = 0; i < CHECKPOINT_FILES; i++) {
        char *name = xprintf("%s/latest/%s", out, checkpoint_file[i]);
        Text file = test_read_file(name);
        Safetensors t;
        if (i == 2 && !safetensors_parse(&t, file.s, file.n)) {
            memcpy(file.s + (safetensors_find(&t, tensor)->data - (const unsigned char *)file.s),
                   &infinite, sizeof infinite);
            file_write_whole(name, file.s, file.n);
            safetensors_free(&t);
        }
        file_sum(&sums.file[i], file.s, file.n);
        text_free(&file);
        free(name);
    }
    checkpoint_trainer_json(&trainer, s, &sums);
    file_write_whole(path, trainer.s, trainer.n);
    for (int i = 0; i < CHECKPOINT_FILES; i++) text_free(&sums.file[i].marks);
    text_free(&trainer);
    free(path);
}

// A non-finite moment is neither saved nor loaded, since its weight would never change again. It is
// named.
static void test_checkpoint_judges_moments(void) {
    static const char *const prefix[2] = {"m.", "v."};
    double scale[4] = {1, 1, 1, 1};
    int64_t counts[5] = {0};
    CheckpointState s = {.step = 3, .adamw_steps = counts, .eval_scale = scale, .options = ""};
    for (int k = 0; k < 2; k++) {
        const char *out = test_directory();
        char *bad = NULL, *part = xprintf("%swte.weight has a number", prefix[k]);
        char *tensor = xprintf("%swte.weight", prefix[k]);
        Model *m = checkpoint_test_model(1);
        checkpoint_save(out, engine_cpu(), m, &checkpoint_test_config, &s);
        checkpoint_test_bend(out, &s, tensor);
        EXPECT_EXIT(1, part, checkpoint_test_load, (void *)(uintptr_t)out);
        real moment[28] = {0};
        moment[27] = (real)INFINITY;
        engine_cpu()->write(m, k ? SLOT_V : SLOT_M, P_wte, 0, moment);
        checkpoint_attend(engine_cpu(), m, &checkpoint_test_config, 0, &bad);
        EXPECT_TEXT(bad, tensor);
        free(bad), bad = NULL;
        s.step = 4;
        char *error = checkpoint_try_save(out, engine_cpu(), m, &checkpoint_test_config, &s, &bad);
        EXPECT_ERROR(error, "is not finite");
        EXPECT_TEXT(bad, tensor);
        s.step = 3;
        free(error), free(bad), free(part), free(tensor);
        char *later = xprintf("%s/step_00000004", out);
        EXPECT(!path_exists(later), "%s was saved", later);
        free(later);
        engine_cpu()->close(m);
    }
}

static void test_checkpoint_refuses_other_models(void) {
    static const struct { const char *config, *part; } wrong[] = {
        {"", "config.json"}, {"[]", "vocab_size"}, {"{\"vocab_size\": 7}", "n_positions"},
#define SIZES "\"n_positions\": 5, \"n_layer\": 2, \"n_head\": 2, \"n_embd\": 4"
        {"{\"vocab_size\": 0, " SIZES "}", "vocab_size"},
        {"{\"vocab_size\": 1e3, " SIZES "}", "vocab_size"},
        {"{\"vocab_size\": 99999999, " SIZES "}", "vocab_size"},
        {"{\"vocab_size\": 8, " SIZES "}", "shape"},
        {"{\"vocab_size\": 7, \"activation_function\": \"relu\", " SIZES "}",
         "activation_function"},
        {"{\"vocab_size\": 7, \"model_type\": \"llama\", " SIZES "}", "model_type"},
        {"{\"vocab_size\": 7, \"layer_norm_epsilon\": 1e-6, " SIZES "}", "layer_norm_epsilon"},
        {"{\"vocab_size\": 7, \"scale_attn_weights\": false, " SIZES "}", "scale_attn_weights"},
        {"{\"vocab_size\": 7, \"tie_word_embeddings\": false, " SIZES "}", "tie_word_embeddings"},
        {"{\"vocab_size\": 7, \"drop_path_eval_scale\": [1], " SIZES "}", "drop_path_eval_scale"},
        {"{\"vocab_size\": 7, \"drop_path_eval_scale\": [1, -0.5, 1, 1], " SIZES "}",
         "from 0 to 1"},
        {"{\"vocab_size\": 7, \"drop_path_eval_scale\": [1, 1, 1, 0.5], \"drop_path_tied\": "
         "true, " SIZES "}", "equal"},
#undef SIZES
        {"{\"vocab_size\": 7, \"n_positions\": 5, \"n_layer\": 3, \"n_head\": 2, \"n_embd\": 4}",
         "h.2."},
        {"{\"vocab_size\": 7, \"n_positions\": 5, \"n_layer\": 2, \"n_head\": 3, \"n_embd\": 4}",
         "multiple"}};
    const char *dir = test_directory();
    Model *m = checkpoint_test_model(4);
    EXPECT_EXIT(1, "cannot read", checkpoint_test_read_config, (void *)(uintptr_t)dir);
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        checkpoint_test_published(dir, wrong[i].config, m);
        EXPECT_EXIT(1, wrong[i].part, checkpoint_test_read_config, (void *)(uintptr_t)dir);
    }
    engine_cpu()->close(m);
}

// Another architecture is reported before anything else that is wrong with its config.json, even if
// only the class reveals it.
static void test_checkpoint_names_architectures(void) {
    static const struct { const char *config, *part; } other[] = {
        {"{\"model_type\": \"llama\", \"hidden_size\": 8, \"rms_norm_eps\": 1e-6}",
         "\"model_type\" is llama, not gpt2"},
        {"{\"model_type\": \"mistral\", \"vocab_size\": 0}", "\"model_type\" is mistral, not gpt2"},
        {"{\"model_type\": \"qwen2\", \"tie_word_embeddings\": false}",
         "\"model_type\" is qwen2, not gpt2"},
        {"{\"architectures\": [\"GPTNeoXForCausalLM\"], \"hidden_size\": 8}",
         "GPTNeoXForCausalLM, not GPT2LMHeadModel"},
        {"{\"architectures\": [\"GPTNeoXForCausalLM\"], \"model_type\": \"gpt_neox\"}",
         "is gpt_neox, not gpt2"},
        {"{\"architectures\": [\"GPT2LMHeadModel\"]}", "\"vocab_size\" is missing"},
        {"{\"model_type\": 2}", "is no text"}};
    GptConfig c;
    double *scale;
    int tied;
    for (size_t i = 0; i < sizeof other / sizeof other[0]; i++) {
        char *error = checkpoint_parse_config(&c, &scale, &tied, other[i].config,
                                              strlen(other[i].config));
        EXPECT_ERROR(error, other[i].part);
        free(error);
    }
}

// ---- What a crash leaves, and what --resume repairs ----

static void test_checkpoint_recovers(void) {
    const char *out = test_directory();
    static const char *const left[] = {".step_00000001.tmp", ".step_00000001.old", "step_00000001",
                                       ".step_00000002.old",
                                       ".step_00000003.tmp", ".step_00000004.new",
                                       "xstep_00000005.tmp", ".step-00000006.tmp"};
    for (size_t i = 0; i < sizeof left / sizeof left[0]; i++) checkpoint_test_leave(out, left[i]);
    char *link = xprintf("%s/.latest.tmp", out), *back = xprintf("%s/step_00000002/config.json",
                                                                 out);
    EXPECT(symlink("step_00000009", link) == 0, "%s", link);
    checkpoint_recover(out);
    checkpoint_test_names(out, ".step-00000006.tmp .step_00000004.new step_00000001 step_00000002 "
                          "xstep_00000005.tmp ");
    Text t = test_read_file(back);
    EXPECT_TEXT(t.s, ".step_00000002.old");
    text_free(&t);
    free(back);
    back = xprintf("%s/none", out);
    checkpoint_recover(back);
    EXPECT(!path_exists(back), "%s was made", back);
    free(back), free(link);
}

// The newest first; only valid checkpoint names.
static void test_checkpoint_list(void) {
    const char *out = test_directory();
    static const char *const name[] = {"step_00000003", "step_00000010", "step_123456789012",
                                       "step_0000007", "step_00000008x",
                                       "step_-00000009", "Step_00000011", "step_00000000",
                                       "step_+0000009", "step_ 0000009", "step_000000009",
                                       "step_99999999999999999999",
                                       "step-00000004"};
    for (size_t i = 0; i < sizeof name / sizeof name[0]; i++) checkpoint_test_leave(out, name[i]);
    CheckpointList list = checkpoint_list(out);
    EXPECT(list.n == 4 && list.step[0] == 123456789012 && list.step[1] == 10 && list.step[2] == 3 &&
           list.step[3] == 0,
           "%d checkpoints", list.n);
    free(list.step);
    // the first is newer than the last one written
    checkpoint_prune(out, 1, 10);
    checkpoint_prune(out, -1, 10);
    checkpoint_test_names(out, "Step_00000011 step-00000004 step_ 0000009 step_+0000009 "
                          "step_-00000009 step_000000009 step_00000008x step_00000010 step_0000007 "
                          "step_123456789012 step_99999999999999999999 ");
    CheckpointList none = checkpoint_list("/nowhere");
    EXPECT(none.n == 0 && !none.step, "%d checkpoints nowhere", none.n);
}

// Checkpoints newer than the one being resumed are set aside, unless that name is taken; `latest`
// is repaired.
static void checkpoint_test_settle(void *out) {
    checkpoint_settle((const char *)out, "step_10000012");
}

static void test_checkpoint_settles(void) {
    const char *out = test_directory();
    char *latest = xprintf("%s/latest", out), target[64] = "";
    static const char *const left[] = {"step_10000011", "step_10000012", "step_10000013",
                                       "step_10000013.damaged",
                                       "step_10000014"};
    for (size_t i = 0; i < sizeof left / sizeof left[0]; i++) checkpoint_test_leave(out, left[i]);
    // without the link, with it, and with another
    for (int i = 0; i < 3; i++) {
        Text t = checkpoint_test_told(checkpoint_test_settle, out);
        const char *first = strchr(t.s, '\n'), *second = first ? strchr(first + 1, '\n') : NULL;
        EXPECT(i ? first == t.s + t.n - 1 : second == t.s + t.n - 1, "turn %d: %s", i, t.s);
        EXPECT(!!strstr(t.s, "14 is now ") == !i && strstr(t.s, "13 stays: "), "turn %d: %s", i,
               t.s);
        text_free(&t);
        checkpoint_test_names(out, "latest step_10000011 step_10000012 step_10000013 "
                              "step_10000013.damaged step_10000014.damaged ");
        memset(target, 0, sizeof target);
        EXPECT(readlink(latest, target, sizeof target - 1) == 13, "%s is no link", latest);
        EXPECT_TEXT(target, "step_10000012");
        if (i == 1) EXPECT(!unlink(latest) && !symlink("step_10000011", latest), "%s", latest);
    }
    free(latest);
}

static void checkpoint_test_save_again(void *out) { checkpoint_test_save((const char *)out, 1); }

// A failed save leaves what was there, and none of its own files: the space they take may be what
// is missing.
static void test_checkpoint_save_fails(void) {
    const char *out = test_directory();
    checkpoint_test_save(out, 1);
    char *dir = xprintf("%s/step_00000001", out);
    // has a foreign file, so that the old checkpoint cannot take this name
    checkpoint_test_leave(out, ".step_00000001.old");
    checkpoint_test_leave(out, ".step_00000001.old/guest");
    EXPECT_EXIT(1, "cannot rename", checkpoint_test_save_again, (void *)(uintptr_t)out);
    checkpoint_test_names(out, ".step_00000001.old latest step_00000001 ");
    char *wrong = checkpoint_verify(dir);
    EXPECT(!wrong, "%s", wrong);
    free(wrong), free(dir);
}

// ---- With EngineArgs.zero every rank reads what rank 0 saves, in the same order ----

static char checkpoint_test_reads[2][4096];              // "slot.parameter.layer " of each read, by
                                                         // rank 0 and by another rank
static int checkpoint_test_rank;

static void checkpoint_test_read(Model *m, Slot slot, int param, int layer, real *host) {
    char *text = checkpoint_test_reads[checkpoint_test_rank];
    snprintf(text + strlen(text), sizeof checkpoint_test_reads[0] - strlen(text), "%d.%d.%d ",
             (int)slot, param, layer);
    engine_cpu()->read(m, slot, param, layer, host);
}

static void test_checkpoint_attends(void) {
    const GptConfig *c = &checkpoint_test_config;
    Engine e = *engine_cpu();
    int64_t counts[5] = {0};
    double scale[4] = {1, 1, 1, 1};
    CheckpointState s = {.adamw_steps = counts, .eval_scale = scale, .options = ""};
    char *bad = NULL;
    Model *m = checkpoint_test_model(1);
    e.read = checkpoint_test_read;
    memset(checkpoint_test_reads, 0, sizeof checkpoint_test_reads);
    for (checkpoint_test_rank = 0; checkpoint_test_rank < 2; checkpoint_test_rank++) {
        if (checkpoint_test_rank == 0) checkpoint_save(test_directory(), &e, m, c, &s);
        else checkpoint_attend(&e, m, c, 0, &bad);
    }
    EXPECT(strlen(checkpoint_test_reads[0]) > 300, "%s", checkpoint_test_reads[0]);
    EXPECT_TEXT(checkpoint_test_reads[1], checkpoint_test_reads[0]);
    EXPECT(!bad, "%s is finite", bad);
    engine_cpu()->close(m);
}

// ---- config.json and trainer.json ----

static void test_checkpoint_config(void) {
    const GptConfig *c = &checkpoint_test_config;
    double scale[4] = {1, 1, 1, 1};
    static const struct { double scale; int eot, tied; const char *sha, *end; } row[] = {
        {1, -1, 0, NULL, "\"bos_token_id\": null,\n  \"eos_token_id\": null,\n  \"torch_dtype\": "
         "\"half\"\n}\n"},
        {1, 0, 1, "", "\"bos_token_id\": 0,\n  \"eos_token_id\": 0,\n  \"torch_dtype\": "
         "\"half\"\n}\n"},
        {1, 50256, 0, "ab", "_id\": 50256,\n  \"torch_dtype\": \"half\",\n  \"tokenizer_sha256\": "
         "\"ab\"\n}\n"},
        {0.5, -1, 0, NULL, "\"half\",\n  \"drop_path_eval_scale\": [1, 1, 1, 0.5],\n  "
         "\"drop_path_tied\": false\n}\n"},
        {0.25, -1, 0, NULL, "\"half\",\n  \"drop_path_eval_scale\": [0.5, 1, 1, 1],\n  "
         "\"drop_path_tied\": false\n}\n"},
        {0.5, -1, 1, NULL, "\"half\",\n  \"drop_path_eval_scale\": [1, 1, 0.5, 0.5],\n  "
         "\"drop_path_tied\": true\n}\n"}};
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        Text t = {NULL, 0, 0};
        CheckpointState s = {.eval_scale = scale, .tied = row[i].tied, .eot = row[i].eot,
                             .tokenizer_sha256 = row[i].sha};
        scale[3] = row[i].scale, scale[2] = row[i].tied ? row[i].scale : 1, scale[0] = 1;
        if (row[i].scale == 0.25) scale[0] = 0.5, scale[3] = 1;          // only the first
        checkpoint_config_json(&t, c, &s, "half");
        const size_t n = strlen(row[i].end);
        EXPECT(t.n > n && !strcmp(t.s + t.n - n, row[i].end), "row %zu: %s", i, t.s);
        GptConfig back;
        double *read = NULL;
        int tied = -1;
        char *error = checkpoint_parse_config(&back, &read, &tied, t.s, t.n);
        EXPECT(!error && !memcmp(&back, c, sizeof back) && !memcmp(read, scale, sizeof scale),
               "row %zu: %s", i, error ? error : "other numbers");
        EXPECT(tied == (row[i].tied && row[i].scale < 1), "row %zu: tied %d", i, tied);
        free(error), free(read);
        text_free(&t);
    }
}

// What config.json may and may not contain beside the sizes of a supported model.
static void test_checkpoint_config_words(void) {
    static const char *const good[] = {
        "\"activation_function\": \"gelu_new\"", "\"activation_function\": \"gelu_pytorch_tanh\"",
        "\"n_inner\": 16",
        "\"n_inner\": null", "\"layer_norm_epsilon\": 1e-5",
        "\"scale_attn_by_inverse_layer_idx\": false",
        "\"scale_attn_weights\": true", "\"drop_path_eval_scale\": [0, 1, 0.5, 0.5]",
        "\"drop_path_tied\": true",
        "\"drop_path_eval_scale\": [0.5, 0.5, 1, 1], \"drop_path_tied\": true"};
    static const struct { const char *words, *error; } bad[] = {
        {"\"n_inner\": 15", "n_inner"}, {"\"n_inner\": 0", "n_inner"},
        {"\"layer_norm_epsilon\": 1e-4", "layer_norm_epsilon"},
        {"\"scale_attn_by_inverse_layer_idx\": true", "scale_attn_by_inverse_layer_idx"},
        {"\"model_type\": true", "model_type"},
        {"\"activation_function\": true", "activation_function"},
        {"\"drop_path_eval_scale\": [1, 1, 1]", "4 numbers"},
        {"\"drop_path_eval_scale\": [1, 1, 1, 1, 1]", "4 numbers"},
        {"\"drop_path_eval_scale\": [1, 1, 1, 1.5]", "from 0 to 1"},
        {"\"drop_path_eval_scale\": [1, \"a\", 1, 1]", "from 0 to 1"},
        {"\"drop_path_eval_scale\": [0.5, 1, 1, 1], \"drop_path_tied\": true", "equal"}};
    for (size_t i = 0; i < sizeof good / sizeof *good + sizeof bad / sizeof *bad; i++) {
        const size_t k = i - sizeof good / sizeof *good;
        const char *words = i < sizeof good / sizeof *good ? good[i] : bad[k].words;
        char *text = xprintf("{\"vocab_size\": 7, \"n_positions\": 5, \"n_layer\": 2, \"n_head\": "
                             "2, \"n_embd\": 4, %s}", words);
        GptConfig c;
        double *scale = NULL;
        int tied = -1;
        char *error = checkpoint_parse_config(&c, &scale, &tied, text, strlen(text));
        if (words != good[i < sizeof good / sizeof *good ? i : 0])
            EXPECT_ERROR(error, bad[k].error);
        else
            EXPECT(!error && scale && tied == !!strstr(words, "tied"), "%s: %s", words,
                   error ? error : "tied differs");
        EXPECT(!error || !scale, "%s: factors after an error", words);
        free(error), free(scale), free(text);
    }
}

// The limits of vocabulary and length, which are stricter than those of gpt.h.
static void test_checkpoint_config_sizes(void) {
    static const struct { int64_t V, T, L; const char *error; } row[] = {
        {2, 1, 1, NULL}, {16777216, 1048576, 1, NULL},
        {16777217, 1, 1, "\"vocab_size\" is 16777217"}, {1, 0, 1, "\"n_positions\" is 0"},
        {1, 1, -1, "\"n_layer\" is -1"}, {4294967297, 1, 1, "\"vocab_size\""}};
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        char *text = xprintf("{\"vocab_size\": %lld, \"n_positions\": %lld, \"n_layer\": %lld, "
                             "\"n_head\": 1, \"n_embd\": 2}", (long long)row[i].V,
                             (long long)row[i].T, (long long)row[i].L);
        GptConfig c;
        double *scale = NULL;
        int tied = 1;
        char *error = checkpoint_parse_config(&c, &scale, &tied, text, strlen(text));
        if (row[i].error) EXPECT_ERROR(error, row[i].error);
        else
            EXPECT(!error && c.V == row[i].V && c.T == row[i].T && c.L == row[i].L &&
                   scale[1] == 1 && !tied, "%s: %s", text,
                    error ? error : "it reads as something else");
        free(error), free(scale), free(text);
    }
}

// A file of several MiB: what is reported about a changed byte, another length, and by a
// trainer.json without sizes and marks.
static void test_checkpoint_tells_where(void) {
    enum { SIZE = 2 * FILE_SUM_BLOCK + 1 };
    const char *dir = test_directory();
    char *path = xprintf("%s/%s", dir, checkpoint_file[2]), *bytes = (char *)xcalloc(SIZE, 1);
    FileSum sum;
    const int descriptor = checkpoint_test_descriptor();
    file_sum(&sum, bytes, SIZE);
    static const struct { int marks; size_t at, size; const char *wrong; } row[] = {
        {1, SIZE, SIZE, NULL}, {0, SIZE, SIZE, NULL}, {1, 0, SIZE, "in bytes 0 to 1048576"},
        {1, FILE_SUM_BLOCK, SIZE, "in bytes 1048576 to 2097152"},
        {1, SIZE - 1, SIZE, "in bytes 2097152 to 2097153"},
        {0, FILE_SUM_BLOCK, SIZE, "in bytes 0 to 2097153"},
        {1, SIZE, SIZE - 1, "it has 2097152 bytes, but 2097153 were written"},
        {0, SIZE, SIZE - 1, "do not match the SHA-256"}};
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        Text t = {NULL, 0, 0};
        Json doc;
        text_printf(&t, "{\"files\": {\"%s\": \"%s\"}", checkpoint_file[2], sum.hex);
        if (row[i].marks)
            text_printf(&t, ", \"sizes\": {\"%s\": %d}, \"marks\": {\"%s\": \"%s\"}",
                        checkpoint_file[2], (int)SIZE, checkpoint_file[2], sum.marks.s);
        text_append(&t, "}", 1);
        EXPECT(!json_parse(&doc, t.s, t.n), "%s", t.s);
        if (row[i].at < SIZE) bytes[row[i].at] ^= 8;
        FILE *f = file_open(path, "wb");
        file_write(f, path, bytes, row[i].size);
        fclose(f);
        if (row[i].at < SIZE) bytes[row[i].at] ^= 8;
        char *wrong = checkpoint_verify_file(&doc, dir, 2);
        if (row[i].wrong) EXPECT_ERROR(wrong, row[i].wrong);
        else EXPECT(!wrong, "row %zu: %s", i, wrong);
        free(wrong);
        json_free(&doc);
        text_free(&t);
    }
    EXPECT(checkpoint_test_descriptor() == descriptor, "files stay open");
    text_free(&sum.marks);
    free(bytes), free(path);
}

// trainer.json, to the letter except its own checksum: checkpoints of older programs must remain
// readable.
static void test_checkpoint_trainer_json(void) {
    CheckpointState s = {.step = 3, .tokens = 40, .consumed = 10, .seq_len = 4, .bad_steps = 2,
                         .options = "a"};
    CheckpointSums sums;
    Text t = {NULL, 0, 0};
    memset(&sums, 0, sizeof sums);
    spikes_add(&s.losses, 1), spikes_add(&s.losses, 2.5), spikes_add(&s.losses, 3),
        spikes_add(&s.norms, 4);
    for (int i = 0; i < CHECKPOINT_FILES; i++) {
        snprintf(sums.file[i].hex, sizeof sums.file[i].hex, "hex%d", i);
        sums.file[i].size = (uint64_t)i + 10;
        if (i) text_printf(&sums.file[i].marks, "mark%d", i);
    }
    checkpoint_trainer_json(&t, &s, &sums);
    char *own = strstr(t.s, CHECKPOINT_SELF);
    EXPECT(own && t.n == (size_t)(own - t.s) + strlen(CHECKPOINT_SELF) + 64 + 4, "%s", t.s);
    if (own) *own = 0;
    EXPECT_TEXT(t.s, "{\n  \"format\": \"droppath.c checkpoint 1\",\n  \"step\": 3,\n  \"tokens\": "
                "40,\n"
                "  \"consumed\": 10,\n  \"seq_len\": 4,\n  \"options\": \"a\",\n  \"bad_steps\": "
                "2,\n  \"losses\": [1, 2.5, 3],\n  \"grad_norms\": [4],\n  \"files\": {\n"
                "    \"model.safetensors\": \"hex0\",\n    \"config.json\": \"hex1\",\n"
                "    \"optimizer.safetensors\": \"hex2\"\n"
                "  },\n  \"sizes\": {\"model.safetensors\": 10, \"config.json\": 11, "
                "\"optimizer.safetensors\": 12},\n"
                "  \"marks\": {\"model.safetensors\": \"\", \"config.json\": \"mark1\", "
                "\"optimizer.safetensors\": \"mark2\"},\n");
    for (int i = 0; i < CHECKPOINT_FILES; i++) text_free(&sums.file[i].marks);
    text_free(&t);
}

static void checkpoint_test_remove(void *dir) { checkpoint_remove((const char *)dir); }

// Only what remains is reported.
static void test_checkpoint_remove(void) {
    const char *out = test_directory();
    char *dir = xprintf("%s/step", out), *guest = xprintf("%s/step/guest", out);
    // a checkpoint, nothing, one with a foreign file
    for (int i = 0; i < 3; i++) {
        if (i != 1) checkpoint_test_leave(out, "step");
        if (i == 2) checkpoint_test_leave(out, "step/guest");
        Text t = checkpoint_test_told(checkpoint_test_remove, dir);
        EXPECT(i == 2 ? strstr(t.s, "cannot remove") && strchr(t.s, '\n') == t.s + t.n - 1 : !t.n,
               "case %d: %s", i, t.s);
        EXPECT(path_exists(dir) == (i == 2) && path_exists(guest) == (i == 2),
               "case %d: what is left", i);
        text_free(&t);
    }
    free(dir), free(guest);
}

#define CHECKPOINT_TESTS(X)                                                               \
    X(checkpoint_round_trip) X(checkpoint_finds_every_damage)                             \
    X(checkpoint_latest_is_the_newest_whole_one)                                          \
    X(checkpoint_prunes_and_replaces) X(checkpoint_reads_published_weights)               \
    X(checkpoint_refuses_other_models)                                                    \
    X(checkpoint_names_architectures)                                                     \
    X(checkpoint_of_another_step) X(checkpoint_unreadable) X(checkpoint_trainer_refuses)  \
    X(checkpoint_recovers) X(checkpoint_list) X(checkpoint_settles) X(checkpoint_attends) \
    X(checkpoint_config)                                                                  \
    X(checkpoint_state) X(checkpoint_config_words) X(checkpoint_config_sizes)             \
    X(checkpoint_tells_where)                                                             \
    X(checkpoint_trainer_json) X(checkpoint_remove) X(checkpoint_refuses_counts)          \
    X(checkpoint_judges_moments) X(checkpoint_save_fails)

#endif
