// test_fuzz.h: the parsers of untrusted bytes on the corpora of dev/fuzz and thousands of
// mutations, and the safeguards around the files.
#ifndef TEST_FUZZ_H
#define TEST_FUZZ_H

#include "../run/checkpoint.h"
#include "../files/files.h"
#include "../run/options.h"
#include "test.h"
#include "test_checkpoint.h"

#define FUZZ_TESTS(X) \
    X(fuzz_replay) X(fuzz_pipe) X(fuzz_messages) X(fuzz_config_size) X(fuzz_sizes_on_trust)

static void test_fuzz_replay(void) {
    ToolRun r = tool_run("fuzz_replay");
    int lines = 0;
    for (const char *at = r.out.s; (at = strstr(at, " mutations, ")) != NULL; at++) {
        lines++;
        EXPECT(strncmp(at + 12, "0 accepted", 10), "no mutation gets through a parser: %s",
               r.out.s);
    }
    EXPECT(r.code == 0 && lines >= 18, "exit code %d: %s%s", r.code, r.out.s, r.err.s);
    tool_free(&r);
}

static inline void fuzz_read_pipe(void *path) {
    FileMap map;
    alarm(60);                                           // fail rather than hang
    const char *error = file_map(&map, (const char *)path);
    die("%s", error ? error : "it is mapped");
}

// A named pipe without a writer does not block a program that is told to read it.
static void test_fuzz_pipe(void) {
    char *path = xprintf("%s/pipe", test_directory());
    if (mkfifo(path, 0600)) die("cannot make %s: %s", path, strerror(errno));
    EXPECT_EXIT(1, "not a regular file", fuzz_read_pipe, path);
    free(path);
}

static inline void fuzz_die(void *text) { die("unknown option --%s", (const char *)text); }

// Text quoted in a message cannot steer the terminal.
static void test_fuzz_messages(void) {
    EXPECT_EXIT(1, "--a?[31m? ?? \xC3\xA9\tz", fuzz_die,
                (void *)(uintptr_t)"a\x1B[31m\x7F \xC2\x9B \xC3\xA9\tz");
    char *text = (char *)xcalloc(100001, 1);
    memset(text, 'x', 100000);
    EXPECT_EXIT(1, "error: unknown option --xxx", fuzz_die, text);
    free(text);
}

// Lengths within a config file are ints.
static void test_fuzz_config_size(void) {
    TrainOptions t;
    Options o;
    char *mem = (char *)xcalloc(OPTIONS_MAX_CONFIG + 1, 1);
    memset(mem, 'x', OPTIONS_MAX_CONFIG + 1);
    for (size_t over = 0; over < 2; over++) {
        options_init(&o, "");
        options_add(&o, train_options(), &t);
        char *error = options_config(&o, mem, OPTIONS_MAX_CONFIG + over, FROM_CONFIG, "file");
        EXPECT_ERROR(error, over ? "file: not a config file: it is larger" : "file:1: a line must "
                     "be name = value");
        free(error);
        options_free(&o);
    }
    memcpy(mem + OPTIONS_MAX_CONFIG - 4, " = 1", 4);
    options_init(&o, "");
    options_add(&o, train_options(), &t);
    char *error = options_config(&o, mem, OPTIONS_MAX_CONFIG, FROM_CONFIG, "file");
    EXPECT_ERROR(error, "unknown option --xxx");
    EXPECT(error && strlen(error) < 300, "a name of a million characters is quoted whole");
    free(error), free(mem);
    options_free(&o);
}

static inline void fuzz_read_config(void *dir) {
    GptConfig c;
    double *scale;
    int tied;
    checkpoint_read_config((const char *)dir, &c, &scale, &tied);
}

// A config.json that claims more than the weights beside it have is refused before memory is
// allocated for it.
static void test_fuzz_sizes_on_trust(void) {
    static const struct { const char *config, *part; } claims[] = {
        {"{\"vocab_size\": 16777216, \"n_positions\": 1048576, \"n_layer\": 1024, \"n_head\": 1, "
         "\"n_embd\": 65536}", "shape"},
        {"{\"vocab_size\": 7, \"n_positions\": 5, \"n_layer\": 1024, \"n_head\": 2, \"n_embd\": 4}",
         "h.2."}};
    const char *dir = test_directory();
    Model *m = checkpoint_test_model(4);
    for (size_t i = 0; i < sizeof claims / sizeof *claims; i++) {
        checkpoint_test_published(dir, claims[i].config, m);
        EXPECT_EXIT(1, claims[i].part, fuzz_read_config, (void *)(uintptr_t)dir);
    }
    engine_cpu()->close(m);
}

#endif
