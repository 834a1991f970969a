// Tests of checkpoints: whole or absent, every damage found, weights in the forms in which others publish them.
#ifndef TEST_CHECKPOINT_H
#define TEST_CHECKPOINT_H

#include "../checkpoint.h"
#include "test.h"
#include <sys/resource.h>

static const GptConfig checkpoint_test_config = {7, 5, 2, 2, 4};

static inline Model *checkpoint_test_model(uint64_t seed) {
    const EngineArgs args = {.B = 1, .T = 5, .threads = 1, .dtype = DTYPE_FP32, .bound = {2, 2, 4}};
    Model *m = engine_cpu()->open(&checkpoint_test_config, &args);
    engine_init_weights(engine_cpu(), m, &checkpoint_test_config, seed);
    return m;
}

// Saves a model whose weights the step names, with moments that are not zero.
static inline void checkpoint_test_save(const char *out, int64_t step) {
    const GptConfig *c = &checkpoint_test_config;
    int64_t counts[5] = {step, step - 1, step, 0, step};
    double scale[4] = {1, 1, 0.75, 0.5};
    CheckpointState s = {.step = step, .tokens = 64 * step, .adamw_steps = counts, .eval_scale = scale, .eot = 6,
                         .options = "steps = 9\n"};
    Model *m = checkpoint_test_model((uint64_t)step);
    real moment[28];
    for (int i = 0; i < 28; i++) moment[i] = (real)(i + 1) / 16;
    engine_cpu()->write(m, SLOT_M, P_wte, 0, moment);
    engine_cpu()->write(m, SLOT_V, P_wte, 0, moment);
    checkpoint_save(out, engine_cpu(), m, c, &s);
    engine_cpu()->close(m);
}

// Whether the two models have the same bits in this slot.
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

static void test_checkpoint_round_trip(void) {
    const char *out = test_directory();
    checkpoint_test_save(out, 8);
    char *dir = xprintf("%s/latest", out);
    GptConfig c;
    double *scale;
    int tied;
    checkpoint_read_config(dir, &c, &scale, &tied);
    EXPECT(!memcmp(&c, &checkpoint_test_config, sizeof c), "config.json has other sizes");
    EXPECT(scale[2] == 0.75 && scale[3] == 0.5 && !tied, "config.json has other factors");
    int64_t counts[5];
    CheckpointState s = {.adamw_steps = counts, .eval_scale = scale};
    Model *saved = checkpoint_test_model(8), *loaded = checkpoint_test_model(1);
    checkpoint_load(dir, engine_cpu(), loaded, &c, &s);
    EXPECT(s.step == 8 && s.tokens == 512, "step %lld, %lld tokens", (long long)s.step, (long long)s.tokens);
    EXPECT(counts[0] == 8 && counts[1] == 7 && counts[3] == 0, "AdamW's steps differ");
    EXPECT_TEXT(s.options, "steps = 9\n");
    EXPECT(checkpoint_test_same(saved, loaded, SLOT_PARAM), "weights differ");
    real moment[28];
    for (Slot slot = SLOT_M; slot <= SLOT_V; slot = (Slot)(slot + 1)) {
        engine_cpu()->read(loaded, slot, P_wte, 0, moment);
        EXPECT(moment[0] == (real)0.0625 && moment[27] == (real)1.75, "moment %g", (double)moment[27]);
    }
    engine_cpu()->close(saved);
    engine_cpu()->close(loaded);
    free((char *)(uintptr_t)s.options);
    free(scale);
    free(dir);
}

// Changes one byte of a file, or cuts it short at `at`; returns 0 past its end. The old bytes come back in *old.
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
    for (int i = 0; i <= CHECKPOINT_FILES; i++) {
        const char *name = i < CHECKPOINT_FILES ? checkpoint_file[i] : "trainer.json";
        char *path = xprintf("%s/%s", dir, name);
        for (int cut = 0; cut < 2; cut++)
            for (size_t at = 0; checkpoint_test_damage(path, at, cut, &old); at += 1 + at / 7) {
                char *wrong = checkpoint_verify(dir);
                EXPECT(wrong && strstr(wrong, name) && strstr(wrong, "byte"), "byte %zu of %s was damaged unnoticed", at, name);
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

static void checkpoint_test_latest(void *out) { free(checkpoint_latest((const char *)out)); }

static void test_checkpoint_latest_is_the_newest_whole_one(void) {
    const char *out = test_directory();
    EXPECT(checkpoint_latest(out) == NULL, "there is none yet");
    for (int64_t step = 1; step <= 3; step++) checkpoint_test_save(out, step);
    char *stray = xprintf("%s/.step_00000009.tmp", out), *other = xprintf("%s/step_final", out);
    char *damaged = xprintf("%s/step_00000003/model.safetensors", out), *want = xprintf("%s/step_00000002", out);
    directory_make(stray);                               // what a killed run leaves behind
    directory_make(other);                               // what is not ours
    EXPECT(truncate(damaged, 100) == 0, "%s", damaged);
    char *found = checkpoint_latest(out);
    EXPECT_TEXT(found, want);
    for (int step = 1; step <= 2; step++) {
        char *path = xprintf("%s/step_%08d/trainer.json", out, step);
        EXPECT(truncate(path, 10) == 0, "%s", path);
        free(path);
    }
    EXPECT_EXIT(1, "all 3 checkpoints", checkpoint_test_latest, (void *)(uintptr_t)out);
    free(found), free(stray), free(other), free(damaged), free(want);
}

// A directory that somebody has renamed: its step is not what its name says, so a run would go on elsewhere than it says.
static void test_checkpoint_of_another_step(void) {
    const char *out = test_directory();
    char *three = xprintf("%s/step_00000003", out), *four = xprintf("%s/step_00000004", out), *mine = xprintf("%s/mine", out);
    for (int64_t step = 2; step <= 3; step++) checkpoint_test_save(out, step);
    file_rename(three, four);
    char *found = checkpoint_latest(out), *wrong = checkpoint_verify(four), *name = strrchr(found, '/') + 1;
    EXPECT_TEXT(name, "step_00000002");
    EXPECT_ERROR(wrong, "step_00000004/trainer.json: it is of step 3");
    free(found), free(wrong);
    file_rename(four, mine);                             // a name that tells no step is anybody's own
    wrong = checkpoint_verify(mine);
    EXPECT(!wrong, "%s", wrong);
    free(wrong), free(three), free(four), free(mine);
}

static void checkpoint_test_no_files(void *out) {
    const struct rlimit none = {0, 0};
    if (setrlimit(RLIMIT_NOFILE, &none)) die("setrlimit: %s", strerror(errno));
    checkpoint_test_latest(out);
}

// What cannot be opened now is not passed over as damaged, nor is a directory that cannot be listed one without checkpoints;
// what the disk cannot read is damaged, and does not end the program.
static void test_checkpoint_unreadable(void) {
    const char *out = test_directory();
    for (int64_t step = 1; step <= 2; step++) checkpoint_test_save(out, step);
    EXPECT_EXIT(1, strerror(EMFILE), checkpoint_test_no_files, (void *)(uintptr_t)out);
    char *dir = xprintf("%s/step_00000002", out), *path = xprintf("%s/optimizer.safetensors", dir);
    EXPECT(!unlink(path) && !symlink("optimizer.safetensors", path), "%s", path);
    EXPECT_EXIT(1, strerror(ELOOP), checkpoint_test_latest, (void *)(uintptr_t)out);
    const char *const unreadable = "/proc/self/mem";     // its first byte is nowhere
    if (path_exists(unreadable)) {
        EXPECT(!unlink(path) && !symlink(unreadable, path), "%s", path);
        char *wrong = checkpoint_verify(dir), *found = checkpoint_latest(out);
        EXPECT_ERROR(wrong, strerror(EIO));
        EXPECT_ERROR(found, "step_00000001");
        free(wrong), free(found);
    }
    free(dir), free(path);
}

// A trainer.json with one text in it replaced by another, and its own sum made right.
static inline char *checkpoint_test_trainer(const Text *whole, const char *from, const char *to) {
    const char *at = strstr(whole->s, from), *self = strstr(whole->s, CHECKPOINT_SELF);
    char hex[SHA256_HEX];
    CHECK(at && self && at < self, "trainer.json has no %s", from);
    char *body = xprintf("%.*s%s%.*s", (int)(at - whole->s), whole->s, to, (int)(self - at - (long)strlen(from)),
                         at + strlen(from));
    sha256_hex(hex, body, strlen(body));
    char *all = xprintf("%s" CHECKPOINT_SELF "%s\"\n}\n", body, hex);
    free(body);
    return all;
}

// Each number and name of trainer.json is looked at, whatever its sum says: a file whose sum is right may have been made by
// another version, or by anybody.
static void test_checkpoint_trainer_json(void) {
    static const struct { const char *from, *to, *part; } cases[] = {
        {"checkpoint 1", "checkpoint 2", "\"format\""}, {"\"format\"", "\"tokens\"", "there twice"},
        {"\"step\": 5", "\"step\": -1", "\"step\""}, {"\"step\": 5", "\"step\": 1e3", "\"step\""},
        {"\"step\": 5", "\"step\": 1152921504606846977", "\"step\""}, {"\"step\": 5", "\"steps\": 5", "\"step\""},
        {"\"tokens\": 320", "\"tokens\": -320", "\"tokens\""},
        {"\"tokens\": 320", "\"tokens\": 99999999999999999999", "\"tokens\""},
        {"\"bad_steps\": 0", "\"bad_steps\": 1000000001", "\"bad_steps\""},
        {"\"bad_steps\": 0", "\"bad_steps\": \"0\"", "\"bad_steps\""},
        {"\"losses\": [", "\"losses\": [1e999", "no finite number"}, {"\"losses\": [", "\"losses\": [null", "no finite"},
        {"\"grad_norms\": []", "\"grad_norms\": {}", "lists of at most 128"},
        {"\"options\": \"steps", "\"options\": 7, \"x\": \"steps", "\"options\""},
        {"\"options\": \"steps", "\"options\": \"\\u0000", "\"options\""},
        {"\"files\": {", "\"files\": {\"config.json\": \"\", ", "twice"},
        {"\"sizes\": {", "\"sizes\": {\"config.json\": 1, ", "twice"},
        {"\"marks\": {", "\"marks\": {\"config.json\": \"\", ", "twice"},
        {"\"files\": {", "\"files\": [], \"f\": {", "\"files\""},
        {"\"config.json\": \"", "\"config.json\": \"0", "\"files\""},
        {"\"config.json\": \"", "\"config.js\": \"", "\"files\""},
        {"\"sizes\": {\"model.safetensors\": ", "\"sizes\": {\"model.safetensors\": -", "\"sizes\""},
        {"\"sizes\": {\"model.safetensors\": ", "\"sizes\": {\"model.safetensors\": 9999999999999999", "\"sizes\""},
        {"\"sizes\": {\"model", "\"sizes\": {\"m\": 3, \"modell", "\"sizes\""},
        {"\"sizes\": {", "\"sizes\": 3, \"s\": {", "\"sizes\""},
        {"\"marks\": {\"model.safetensors\": \"", "\"marks\": {\"model.safetensors\": \"0123abcd", "\"marks\""},
        {"\"marks\": {\"model.safetensors\": \"\"", "\"marks\": {\"model.safetensors\": 0", "\"marks\""},
        {"\"tokens\"", "\"more\": [1, {}], \"tokens\"", NULL}, {"\"marks\"", "\"older\"", NULL},
        {"\"bad_steps\"", "\"older\"", NULL}};
    const char *out = test_directory();
    checkpoint_test_save(out, 5);
    char *dir = xprintf("%s/step_00000005", out), *path = xprintf("%s/trainer.json", dir);
    Text whole = test_read_file(path);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *changed = checkpoint_test_trainer(&whole, cases[i].from, cases[i].to);
        file_write_whole(path, changed, strlen(changed));
        char *wrong = checkpoint_verify(dir);            // so --resume passes over it, and does not end in it
        if (cases[i].part) EXPECT(wrong && strstr(wrong, cases[i].part), "%s: %s", cases[i].to, wrong ? wrong : "accepted");
        else EXPECT(!wrong, "%s", wrong);
        free(changed), free(wrong);
    }
    text_free(&whole);
    free(dir), free(path);
}

static void test_checkpoint_prunes_and_replaces(void) {
    const char *out = test_directory();
    char *stray = xprintf("%s/.latest.tmp", out);        // what a kill between making the link and renaming it leaves
    EXPECT(symlink("step_00000000", stray) == 0, "%s", stray);
    for (int64_t step = 1; step <= 5; step++) checkpoint_test_save(out, step);
    EXPECT(!path_exists(stray), "%s stays", stray);
    free(stray);
    checkpoint_test_save(out, 5);                        // the same step once more
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

// ---- Weights as others write them ----

static inline uint16_t checkpoint_test_bf16(real x) {
    float f = (float)x;
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return (uint16_t)(bits >> 16);
}

// A GPT-2 directory without the prefix "transformer.", in bf16, with tensors that no GPT-2 needs.
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
    for (int p = 0; p < N_PARAMS; p++)                   // to numbers that bf16 can hold
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            real host[64];
            engine_cpu()->read(m, SLOT_PARAM, p, l, host);
            for (size_t i = 0; i < gpt_param_size(c, p); i++)
                host[i] = (real)safetensors_bfloat(checkpoint_test_bf16(host[i]));
            engine_cpu()->write(m, SLOT_PARAM, p, l, host);
        }
    checkpoint_test_published(dir, "{\"model_type\": \"gpt2\", \"vocab_size\": 7, \"n_positions\": 5, \"n_layer\": 2, "
                              "\"n_head\": 2, \"n_embd\": 4, \"attn_pdrop\": 0.1, \"n_ctx\": 5}", m);
    GptConfig read;
    double *scale;
    int tied;
    checkpoint_read_config(dir, &read, &scale, &tied);
    EXPECT(!memcmp(&read, c, sizeof read) && scale[0] == 1 && scale[3] == 1 && !tied, "the configuration differs");
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

static void test_checkpoint_refuses_other_models(void) {
    static const struct { const char *config, *part; } wrong[] = {
        {"", "config.json"}, {"[]", "vocab_size"}, {"{\"vocab_size\": 7}", "n_positions"},
#define SIZES "\"n_positions\": 5, \"n_layer\": 2, \"n_head\": 2, \"n_embd\": 4"
        {"{\"vocab_size\": 0, " SIZES "}", "vocab_size"}, {"{\"vocab_size\": 1e3, " SIZES "}", "vocab_size"},
        {"{\"vocab_size\": 99999999, " SIZES "}", "vocab_size"}, {"{\"vocab_size\": 8, " SIZES "}", "shape"},
        {"{\"vocab_size\": 7, \"activation_function\": \"relu\", " SIZES "}", "activation_function"},
        {"{\"vocab_size\": 7, \"model_type\": \"llama\", " SIZES "}", "model_type"},
        {"{\"vocab_size\": 7, \"layer_norm_epsilon\": 1e-6, " SIZES "}", "layer_norm_epsilon"},
        {"{\"vocab_size\": 7, \"scale_attn_weights\": false, " SIZES "}", "scale_attn_weights"},
        {"{\"vocab_size\": 7, \"tie_word_embeddings\": false, " SIZES "}", "tie_word_embeddings"},
        {"{\"vocab_size\": 7, \"drop_path_eval_scale\": [1], " SIZES "}", "drop_path_eval_scale"},
        {"{\"vocab_size\": 7, \"drop_path_eval_scale\": [1, -0.5, 1, 1], " SIZES "}", "from 0 to 1"},
        {"{\"vocab_size\": 7, \"drop_path_eval_scale\": [1, 1, 1, 0.5], \"drop_path_tied\": true, " SIZES "}", "equal"},
#undef SIZES
        {"{\"vocab_size\": 7, \"n_positions\": 5, \"n_layer\": 3, \"n_head\": 2, \"n_embd\": 4}", "h.2."},
        {"{\"vocab_size\": 7, \"n_positions\": 5, \"n_layer\": 2, \"n_head\": 3, \"n_embd\": 4}", "multiple"}};
    const char *dir = test_directory();
    Model *m = checkpoint_test_model(4);
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        checkpoint_test_published(dir, wrong[i].config, m);
        EXPECT_EXIT(1, wrong[i].part, checkpoint_test_read_config, (void *)(uintptr_t)dir);
    }
    engine_cpu()->close(m);
}

#define CHECKPOINT_TESTS(X)                                                                          \
    X(checkpoint_round_trip) X(checkpoint_finds_every_damage) X(checkpoint_latest_is_the_newest_whole_one) \
    X(checkpoint_prunes_and_replaces) X(checkpoint_reads_published_weights) X(checkpoint_refuses_other_models) \
    X(checkpoint_of_another_step) X(checkpoint_unreadable) X(checkpoint_trainer_json)

#endif
