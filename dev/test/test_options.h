// test_options.h: the parser on good and bad input, the trainer's table row by row, recipes, dump
// and help.
#ifndef TEST_OPTIONS_H
#define TEST_OPTIONS_H

#include "../model/drop_path.h"
#include "../files/files.h"
#include "../run/options.h"
#include "../model/schedule.h"
#include "test.h"

// A tool's own table, chained after the trainer's.
#define TOOL_OPTIONS(HEADING, OPTION)                                                 \
  HEADING("Tool")                                                                     \
    OPTION(temperature, "temperature", NUMBER, "1", "(0,inf)", "flattens the choice") \
    OPTION(greedy, "greedy", FLAG, "0", "0|1", "takes the likeliest")
OPTION_TABLE(TOOL_OPTIONS, ToolOptions, tool_options)

typedef struct { TrainOptions train; ToolOptions tool; Options o; } TestOptions;

static void options_test_open(TestOptions *t) {
    options_init(&t->o, "test CHECKPOINT [options]");
    options_add(&t->o, train_options(), &t->train);
    options_add(&t->o, tool_options(), &t->tool);
}

// Applies a command line, given as words separated by blanks; returns its error. Arguments must not
// outlive the call.
static char *options_test_command(TestOptions *t, const char *command) {
    char *words = xprintf("test %s", command), *argv[32], *rest = NULL;
    int argc = 0;
    for (char *w = strtok_r(words, " ", &rest); w && argc < 32; w = strtok_r(NULL, " ", &rest))
        argv[argc++] = w;
    char *error = options_arguments(&t->o, argc, argv);
    if (!error) options_apply_recipe(&t->o, &t->train);
    free(words);
    return error;
}

static char *options_test_config(TestOptions *t, const char *config) {
    return options_config(&t->o, config, strlen(config), FROM_CONFIG, "run.txt");
}

// The command line must fail with an error that contains `part`.
static void options_test_bad(const char *command, const char *part) {
    TestOptions t;
    options_test_open(&t);
    char *error = options_test_command(&t, command);
    EXPECT_ERROR(error, part);
    free(error);
    options_free(&t.o);
}

// The config must fail with an error that contains `part`.
static void options_test_bad_config(const void *config, size_t size, const char *part) {
    TestOptions t;
    options_test_open(&t);
    // exactly sized, so that a sanitizer detects a read beyond it
    void *exact = xcalloc(size, 1);
    if (size) memcpy(exact, config, size);
    char *error = options_config(&t.o, exact, size, FROM_CONFIG, "run.txt");
    EXPECT_ERROR(error, part);
    free(error);
    free(exact);
    options_free(&t.o);
}

// The command line must be accepted; the caller frees t->o.
static void options_test_good(TestOptions *t, const char *command) {
    options_test_open(t);
    char *error = options_test_command(t, command);
    EXPECT(!error, "'%s': %s", command, error);
    free(error);
}

static void test_options_defaults(void) {
    TestOptions t;
    options_test_good(&t, "");
    EXPECT_TEXT(t.train.out, "runs/gpt");
    EXPECT_TEXT(t.train.resume, "");
    EXPECT(t.train.steps == 1000 && t.train.batch == 8 && t.train.seed == 1337,
           "steps, batch or seed");
    EXPECT(t.train.lr == 6e-4 && t.train.eps == 1e-8 && t.tool.temperature == 1,
           "lr, eps or temperature");
    EXPECT(t.train.warmup.value == 2 && t.train.warmup.percent, "warmup");
    EXPECT(t.train.drop_sync == 1 && t.tool.greedy == 0, "flags");
    EXPECT(options_from(&t.o, &t.train.steps) == FROM_DEFAULT, "nobody gave --steps");
    options_free(&t.o);
}

static void test_options_command_line(void) {
    TestOptions t;
    options_test_good(&t, "--steps 5 --lr=3e-4 --drop_path 0.25 --seq-len=64 --prompt=--x=y --seed "
                      "-0 "
                          "--warmup 100 --drop-ramp-up=12.5% --drop-depth uniform --steps=7 "
                          "--greedy --temperature .5");
    EXPECT(t.train.steps == 7, "the last of two wins, got %d", (int)t.train.steps);
    EXPECT(t.train.lr == 3e-4 && t.train.drop_path == 0.25 && t.train.seq_len == 64 &&
           t.train.seed == 0, "numbers");
    EXPECT_TEXT(t.train.prompt, "--x=y");
    EXPECT(t.train.warmup.value == 100 && !t.train.warmup.percent, "warmup");
    EXPECT(t.train.drop_ramp_up.value == 12.5 && t.train.drop_ramp_up.percent, "drop-ramp-up");
    EXPECT(t.train.drop_depth == DEPTH_UNIFORM && t.tool.greedy == 1 && t.tool.temperature == 0.5,
           "choice, flag, tool");
    EXPECT(options_from(&t.o, &t.train.steps) == FROM_COMMAND, "--steps was given");
    EXPECT(options_from(&t.o, &t.train.batch) == FROM_DEFAULT, "--batch was not given");
    options_free(&t.o);
}

// Options that need no value, and arguments that are not options.
static void test_options_bare(void) {
    TestOptions t;
    options_test_good(&t, "--resume --steps 5");
    EXPECT_TEXT(t.train.resume, "latest");
    options_free(&t.o);
    options_test_good(&t, "--resume runs/x/step_00000010 --drop-sync 0");
    EXPECT_TEXT(t.train.resume, "runs/x/step_00000010");
    EXPECT(t.train.drop_sync == 0, "drop-sync 0");
    options_free(&t.o);
    options_test_good(&t, "--steps 2 --resume");
    EXPECT_TEXT(t.train.resume, "latest");
    options_free(&t.o);

    options_test_open(&t);
    t.o.max_arguments = 2;
    char program[] = "test", flag[] = "--greedy", first[] = "model", second[] = "0x";
    char *argv[] = {program, flag, first, second};
    char *error = options_arguments(&t.o, 4, argv);
    EXPECT(!error && t.tool.greedy == 1 && t.o.n_arguments == 2,
           "a flag must not swallow an argument: %s", error);
    EXPECT(t.o.n_arguments == 2 && t.o.arguments[0] == first && t.o.arguments[1] == second,
           "arguments");
    options_free(&t.o);
}

static void test_options_bad_names(void) {
    options_test_bad("--layrs 3", "unknown option --layrs; the nearest is --layers");
    options_test_bad("--learning-rte 3", "unknown option --learning-rte; the nearest is --");
    options_test_bad("--droppath=0.1", "the nearest is --drop-path");
    options_test_bad("--drop-rampup 5", "the nearest is --drop-ramp-up");
    options_test_bad("--temprature 1", "the nearest is --temperature");
    // never abbreviated
    options_test_bad("--step 5", "unknown option --step; the nearest is --steps");
    options_test_bad("--Steps 5", "unknown option --Steps");
    options_test_bad("--confg x", "the nearest is --config");
    options_test_bad("--", "unknown option --;");
    options_test_bad("--=5", "unknown option --;");
    options_test_bad("extra", "unexpected argument 'extra'");
    options_test_bad("--steps 5 6", "unexpected argument '6'");
    options_test_bad("-s 5", "unexpected argument '-s'");
    EXPECT(options_distance("kitten", "sitting") == 3, "Levenshtein of kitten and sitting");
    EXPECT(options_distance("", "abc") == 3 && options_distance("abc", "") == 3,
           "Levenshtein to the empty word");
    EXPECT(options_distance("drop_ramp-up", "drop-ramp-up") == 0, "_ and - are the same");
}

// Other programs' names: suggested by meaning, never accepted.
static void test_options_synonyms(void) {
    options_test_bad("--learning-rate 3", "unknown option --learning-rate; here it is --lr");
    options_test_bad("--learning_rate=3", "unknown option --learning_rate; here it is --lr");
    options_test_bad("--drop 0.1", "here it is --drop-path");
    options_test_bad("--max-iters 5", "here it is --steps");
    options_test_bad("--n_layer 5", "here it is --layers");
    options_test_bad("--block_size 5", "here it is --seq-len");
    options_test_bad("--gradient_accumulation_steps 4",
                     "here it is --total-batch, in tokens of a whole step");
    options_test_bad("--bf16", "here it is --dtype bf16");
    options_test_bad("--optimizer.init_args.lr 1", "here it is --lr");
    options_test_bad("-l 3e-4", "unexpected argument '-l'\n  hint: llm.c's -l is --lr here");
    options_test_bad("-q0 3e-4", "unexpected argument '-q0'\n  hint: options are --name value");
    options_test_bad("--temp 1", "here it is --temperature");
    options_test_bad_config("n_layer = 3", 11,
                            "run.txt:1: unknown option --n_layer; here it is --layers");
    TestOptions t;
    options_test_good(&t, "--weight_decay 0.5 --epochs 2");
    EXPECT(t.train.weight_decay == 0.5 && t.train.epochs == 2, "these are names here too");
    t.o.max_arguments = 1;
    // -n is not a synonym in programs that take a checkpoint
    char *error = options_test_command(&t, "-n 5");
    EXPECT_ERROR(error, "unexpected argument '-n'\n  hint: llm.c's -n is --save-every here");
    free(error);
    options_free(&t.o);
}

// Whether a program's help has an option of that name.
static int options_test_has(const Text *help, const char *name) {
    char *line = xprintf("\n  --%s ", name), *bare = xprintf("\n  --%s\n", name);
    const int has = strstr(help->s, line) || strstr(help->s, bare);
    free(line), free(bare);
    return has;
}

// Every synonym suggests an option of some program that does not itself have an option of the
// synonym's name.
static void test_options_synonyms_lead_somewhere(void) {
    static const char *const programs[] = {"train_gpt", "compare", "generate", "evaluate", "export",
                                           "layers",    "prune",   "collapse", "exits"};
    enum { PROGRAMS = sizeof programs / sizeof programs[0] };
    Text help[PROGRAMS];
    for (int p = 0; p < PROGRAMS; p++) {
        ToolRun r = tool_run("%s --help", programs[p]);
        EXPECT(r.code == 0, "%s --help: %s", programs[p], r.err.s);
        help[p] = r.out;
        text_free(&r.err);
    }
    for (int i = 0; i < SYNONYMS; i++) {
        char *names = xstrdup(synonyms[i].names), *rest = NULL;
        for (char *name = strtok_r(names, " ", &rest); name; name = strtok_r(NULL, " ", &rest)) {
            int leads = 0, again = 0;
            for (int p = 0; p < PROGRAMS; p++)
                leads |= options_test_has(&help[p], synonyms[i].ours) &&
                    !options_test_has(&help[p], name);
            for (int j = 0; j < i; j++)
                again |= !strcmp(synonyms[j].ours, synonyms[i].ours) &&
                    options_among(synonyms[j].names, name);
            EXPECT(leads, "--%s leads to --%s, which no program has", name, synonyms[i].ours);
            EXPECT(!again, "--%s stands twice for --%s", name, synonyms[i].ours);
        }
        free(names);
    }
    for (int p = 0; p < PROGRAMS; p++) text_free(&help[p]);
}

// -h is --help, and --version prints version, commit, compiler and engine, in every program,
// whatever else is on the command line.
static void test_options_help_and_version(void) {
    static const char *const programs[] = {"train_gpt", "compare", "generate", "evaluate", "export",
                                           "collapse", "exits", "data_bytes"};
    const int git = path_exists(".git") && system("git describe --always >/dev/null 2>&1") == 0;
    for (size_t p = 0; p < sizeof programs / sizeof programs[0]; p++) {
        ToolRun h = tool_run("%s -h", programs[p]), help = tool_run("%s --help", programs[p]);
        EXPECT(h.code == 0 && help.out.n > 0 && !strcmp(h.out.s, help.out.s), "%s -h: %s",
               programs[p], h.err.s);
        ToolRun r = tool_run("%s --version --nonsense", programs[p]);
        char *begin = xprintf("%s (droppath.c) " PROGRAM_VERSION "\ncommit:   ", programs[p]);
        const char *compiler = strstr(r.out.s, "\ncompiler: "),
            *engine = strstr(r.out.s, "\nengine:   ");
        EXPECT(r.code == 0 && !strncmp(r.out.s, begin, strlen(begin)) && compiler && engine,
               "%s --version: %s%s", programs[p], r.out.s, r.err.s);
        EXPECT(!git || !strstr(r.out.s, "commit:   unknown"), "%s does not know its commit",
               programs[p]);
        EXPECT(engine && !strstr(engine, "none") == !strstr("export data_bytes", programs[p]),
               "%s: %s", programs[p], r.out.s);
        free(begin);
        tool_free(&h), tool_free(&help), tool_free(&r);
    }
}

static void test_options_bad_values(void) {
    const char *integers[] = {"", "x", "5x", "5.0", "1.5", "1.5e0", "1e13", "1e", "e3", "1e3x",
                              "1e-1", "0x10", "-", "+", "0", "-1", "1000000000001",
                              "99999999999999999999"};
    for (size_t i = 0; i < sizeof integers / sizeof integers[0]; i++) {
        char *command = xprintf("--steps=%s", integers[i]);
        options_test_bad(command, "is not a whole number in [1,1e12]");
        free(command);
    }
    const char *numbers[] = {"", "x", "0.5x", "1", "1.0", "-0.1", "nan", "inf", "0x0p1", "1e", ".",
                             "0,5", "0.1.2", "1e999"};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        char *command = xprintf("--drop-path=%s", numbers[i]);
        options_test_bad(command, "is not a number in [0,1)");
        free(command);
    }
    const char *spans[] = {"", "x", "%", "-1", "-1%", "101%", "10%%", "10%x", "1.5", "1e16", "nan",
                           "inf%", "5 %"};
    for (size_t i = 0; i < sizeof spans / sizeof spans[0]; i++) {
        OptionSpec spec = {"s", OPTION_SPAN, 0, "", "", ""};
        OptionValue v;
        EXPECT(!options_read(&spec, spans[i], &v), "span '%s' was read", spans[i]);
    }
    options_test_bad("--warmup 101%", "--warmup: '101%' is not a number of steps, or a percentage "
                     "of the run");
    options_test_bad("--drop-depth line",
                     "--drop-depth: 'line' is not one of linear|linear0|uniform|exp");
    options_test_bad("--drop-depth=linear|linear0", "is not one of");
    options_test_bad("--drop-depth=", "'' is not one of");
    options_test_bad("--drop-sync=yes", "--drop-sync: 'yes' is not one of 0|1");
    options_test_bad("--seed 9223372036854775808",
                     "is not a whole number in [0,inf), of at most 9223372036854775807");
    options_test_bad("--seed 1e19", "'1e19' is not a whole number in [0,inf), of at most "
                     "9223372036854775807");
    options_test_bad("--eps 0", "is not a number in (0,inf)");
    options_test_bad("--lr=inf", "is not a number in [0,inf)");
    options_test_bad("--lr --steps 5", "--lr needs a value: a number in [0,inf)");
    options_test_bad("--steps", "--steps needs a value: a whole number in [1,1e12]");
    options_test_bad("--preset", "--preset needs a value: one of tiny|");
    options_test_bad("--train", "--train needs a value: GLOB");
}

// Whole numbers are also accepted in scientific notation, from the command line and from configs,
// if exact.
static void test_options_scientific(void) {
    static const struct { const char *text; int64_t value; } good[] = {
        {"1e3", 1000}, {"2.5e6", 2500000}, {"1E12", 1000000000000}, {"1e+2", 100}, {"12.50e1", 125},
        {"1e0", 1}, {"9223372036854775807", INT64_MAX}, {"-9223372036854775808", INT64_MIN},
        {"9.223372036854775807e18", INT64_MAX}, {"0e99999999999999999999", 0}, {"0.000e-5", 0},
        {"2000e-3", 2}, {"-1e2", -100}, {"+.5e1", 5}};
    static const struct { const char *text; int result; } bad[] = {
        {"1.5e0", WHOLE_WRONG}, {"15e-1", WHOLE_WRONG}, {"1e", WHOLE_WRONG}, {"e1", WHOLE_WRONG},
        {".e1", WHOLE_WRONG}, {"1e1.0", WHOLE_WRONG}, {"1.", WHOLE_WRONG}, {"1e 3", WHOLE_WRONG},
        {" 1", WHOLE_WRONG}, {"-", WHOLE_WRONG}, {"1e19", WHOLE_TOO_LARGE},
        {"9.223372036854775808e18", WHOLE_TOO_LARGE}, {"1e999999999999", WHOLE_TOO_LARGE},
        {"18446744073709551617", WHOLE_TOO_LARGE}, {"-9223372036854775809", WHOLE_TOO_LARGE}};
    int64_t v = 0;
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++)
        EXPECT(whole_read(&v, good[i].text) == WHOLE_OK && v == good[i].value, "%s: %lld",
               good[i].text, (long long)v);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        EXPECT(whole_read(&v, bad[i].text) == bad[i].result, "%s is not refused as it should be",
               bad[i].text);
    TestOptions t;
    options_test_good(&t, "--steps 1e3 --total-batch=2.5e6");
    EXPECT(t.train.steps == 1000 && t.train.total_batch == 2500000, "the command line");
    char *error = options_test_config(&t, "eval-tokens = 1.5e5\n");
    EXPECT(!error && t.train.eval_tokens == 150000, "the config: %s", error ? error : "");
    options_free(&t.o);
}

// Numbers are checked in the type that computes with them.
static void test_options_round(void) {
    static const struct { const char *command, *part; } bad[] = {
        {"--eps 1e-46", "--eps: '1e-46' is computed with in fp32, where it is 0; wanted is a "
         "number in (0,inf)"},
        {"--beta2 0.9999999999", "where it is 1; wanted is a number in [0,1)"},
        {"--beta1=0.99999999", "[0,1)"},
        {"--lr 1e39", "where it is inf; wanted is a number in [0,inf)"},
        {"--weight-decay 1e-60", "that does not become 0"}, {"--drop-path 0.999999999", "[0,1)"},
        {"--lr 1e-46", "that does not become 0"}, {"--temperature 1e-50", "(0,inf)"},
        {"--grad-clip 1e-46", "that does not become 0"}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0] && sizeof(real) == 4; i++)
        options_test_bad(bad[i].command, bad[i].part);
    options_test_bad("--eps 0.1x", "--eps: '0.1x' is not a number in (0,inf)");
    TestOptions t;
    options_test_good(&t, "--eps 1e-40 --beta2 0.9999999 --lr 0 --weight-decay 1e-30 --grad-clip "
                      "3e38 --beta1 0");
    // computed in fp64
    EXPECT(t.train.eps == 1e-40 && t.train.beta2 == 0.9999999, "the number itself is kept");
    options_free(&t.o);
}

// A refused value leaves the previous one.
static void test_options_bad_value_keeps(void) {
    TestOptions t;
    options_test_good(&t, "--steps 5 --prompt a");
    const char *refused[] = {"6x", " 6", "6 ", "0"};
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        char *error = options_set(&t.o, "steps", refused[i], FROM_COMMAND);
        EXPECT_ERROR(error, "--steps");
        EXPECT(t.train.steps == 5, "'%s' changed steps to %d", refused[i], (int)t.train.steps);
        free(error);
    }
    char *error = options_set(&t.o, "prompt", "b", FROM_CONFIG);
    EXPECT(!error, "%s", error);
    EXPECT_TEXT(t.train.prompt, "a");
    options_free(&t.o);
}

static void test_options_config(void) {
    TestOptions t;
    options_test_open(&t);
    char *error = options_test_config(&t,
        "# a comment\n\n  steps = 5   # another\r\nseq_len=64\nlr\t=\t1e-3\nsteps=9\n"
        "out = a b/c  \nprompt = \"# \\\"q\\\" \\\\ \\n\\t \"# done\ntrain = \"\"\nval = say "
        "\"x\"");
    EXPECT(!error, "%s", error);
    EXPECT(t.train.steps == 9 && t.train.seq_len == 64 && t.train.lr == 1e-3,
           "numbers of the config");
    EXPECT_TEXT(t.train.out, "a b/c");
    EXPECT_TEXT(t.train.prompt, "# \"q\" \\ \n\t ");
    EXPECT_TEXT(t.train.train, "");
    EXPECT_TEXT(t.train.val, "say \"x\"");
    EXPECT(options_from(&t.o, &t.train.steps) == FROM_CONFIG, "steps came from the config");
    EXPECT(!options_config(&t.o, NULL, 0, FROM_CONFIG, "empty"), "an empty config is fine");
    // a byte-order mark is not part of it
    error = options_test_config(&t, "\xEF\xBB\xBFsteps = 11\r\n");
    EXPECT(!error && t.train.steps == 11, "%s", error ? error : "the first line is lost");
    options_free(&t.o);
}

static void test_options_config_errors(void) {
    static const struct { const char *config, *part; } bad[] = {
        {"steps = 5\n\nlayrs = 3\n", "run.txt:3: unknown option --layrs; the nearest is --layers"},
        {"steps = x",                "run.txt:1: --steps: 'x' is not a whole number"},
        {"steps = 5 6",              "run.txt:1: --steps: '5 6' is not a whole number"},
        {"steps",                    "run.txt:1: a line must be name = value"},
        {"steps 5",                  "run.txt:1: a line must be name = value"},
        {"= 5",                      "run.txt:1: a line must be name = value"},
        {"#\n--steps 5",             "run.txt:2: a line must be name = value"},
        {"ste#ps = 5",               "run.txt:1: a line must be name = value"},
        {"steps =",                  "run.txt:1: steps: the value is missing"},
        {"steps = # 5",              "run.txt:1: steps: the value is missing"},
        {"prompt = \"abc",           "run.txt:1: prompt: the closing quote is missing"},
        {"prompt = \"",              "run.txt:1: prompt: the closing quote is missing"},
        {"prompt = \"abc\\\"",       "run.txt:1: prompt: the closing quote is missing"},
        {"prompt = \"abc\\",         "run.txt:1: prompt: a backslash in quotes"},
        {"prompt = \"\\x41\"",       "run.txt:1: prompt: a backslash in quotes"},
        {"prompt = \"a\" b",         "run.txt:1: prompt: there is more after the closing quote"},
        {"config = other.txt",       "run.txt:1: --config is for the command line only"},
        {"help = 1",                 "run.txt:1: --help is for the command line only"},
        // a heading is not an option
        {"Data = 1",                 "run.txt:1: unknown option --Data"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        options_test_bad_config(bad[i].config, strlen(bad[i].config), bad[i].part);
    options_test_bad_config("steps = 5\0lr = 1", 16,
                            "run.txt: not a config file: it has zero bytes");
    options_test_bad("--config /nonexistent/run.txt",
                     "cannot read /nonexistent/run.txt: No such file");
    options_test_bad("--config /", "cannot read /: ");
    options_test_bad("--config", "--config needs a value: FILE");
}

// The command line wins wherever --config appears; of two configs the later one wins.
static void test_options_precedence(void) {
    const char *directory = test_directory();
    char *one = xprintf("%s/one.txt", directory), *two = xprintf("%s/two.txt", directory);
    file_write_whole(one, "steps = 1\nbatch = 1\nseed = 1\n", 29);
    file_write_whole(two, "batch = 2\nseed = 2\n", 19);
    char *command = xprintf("--seed 3 --config %s --config=%s", one, two);
    TestOptions t;
    options_test_good(&t, command);
    EXPECT(t.train.steps == 1 && t.train.batch == 2 && t.train.seed == 3,
           "got steps %d, batch %d, seed %d", (int)t.train.steps, (int)t.train.batch,
           (int)t.train.seed);
    options_free(&t.o);
    file_write_whole(two, "batch = 0\n", 10);
    options_test_bad(command, "two.txt:1: --batch: '0' is not a whole number in [1,65536]");
    free(command);
    free(one);
    free(two);
}

// --drop-rates names each layer's largest rate; the largest of them is --drop-path, in config.txt
// too.
static void test_options_rates(void) {
    TestOptions t;
    double rate[8];
    options_test_good(&t, "--drop-rates 0,0.1,0.3,0.2");
    EXPECT(t.train.drop_path == 0.3, "drop-path is %g", t.train.drop_path);
    options_free(&t.o);
    options_test_good(&t, "--drop-rates 0,0.1,0.3,0.2 --drop-path 0.3 --drop-recipe elhoushi2026");
    EXPECT(t.train.drop_path == 0.3 && t.train.drop_scale == SCALE_INVERTED_EACH, "drop-path is %g",
           t.train.drop_path);
    options_free(&t.o);
    EXPECT(rates_read(rate, 8, "0,0.5,1e-3") == 3 && rate[1] == 0.5 && rate[2] == 1e-3,
           "three rates");
    static const char *const bad[] = {"", ",", "0.1,", ",0.1", "0.1 0.2", "1", "0.1,1.5", "-0.1",
                                      "nan", "0.1,x", "0x1", "0,0,0,0,0,0,0,0,0"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        EXPECT(!rates_read(rate, 8, bad[i]), "'%s' was read", bad[i]);
}

static void test_options_recipes(void) {
    TestOptions t;
    options_test_good(&t, "--drop-recipe pld2020 --drop-unit row --drop-path 0.3");
    EXPECT(t.train.drop_unit == UNIT_ROW, "a single option overrides a recipe named before it");
    EXPECT(t.train.drop_branches == BRANCHES_TIED && t.train.drop_ramp_shape == SHAPE_EXP,
           "pld2020 was not applied");
    EXPECT(t.train.drop_ramp_up.value == 4.6 && t.train.drop_ramp_up.percent && t.train.drop_path ==
           0.3, "pld2020");
    options_free(&t.o);

    options_test_good(&t, "--drop-ramp-up 7 --drop-recipe early2023");
    EXPECT(t.train.drop_ramp_up.value == 7 && !t.train.drop_ramp_up.percent,
           "an option given before the recipe");
    EXPECT(t.train.drop_depth == DEPTH_LINEAR0 && t.train.drop_recover.value == 83,
           "early2023 was not applied");
    options_free(&t.o);

    // config: recipe and single option; the command line is empty
    options_test_open(&t);
    char *error = options_test_config(&t, "drop-scale = inverted\ndrop-recipe = layerskip2024\n");
    EXPECT(!error, "%s", error);
    options_apply_recipe(&t.o, &t.train);
    EXPECT(t.train.drop_scale == SCALE_INVERTED && t.train.drop_depth == DEPTH_EXP,
           "recipe and option of one config");
    options_free(&t.o);

    // the command line's recipe overrides a config, but not the command line's options
    options_test_open(&t);
    error = options_test_config(&t, "drop-scale = inverted\ndrop-unit = row\ndrop-recipe = "
                                "pld2020\n");
    EXPECT(!error, "%s", error);
    error = options_test_command(&t, "--drop-recipe huang2016 --drop-depth exp");
    EXPECT(!error, "%s", error);
    EXPECT(t.train.drop_scale == SCALE_SURVIVAL && t.train.drop_unit == UNIT_BATCH,
           "command line's recipe over a config");
    EXPECT(t.train.drop_depth == DEPTH_EXP, "command line's option over its recipe");
    options_free(&t.o);

    static const char *const names[] = {"none", "huang2016", "pld2020", "layerdrop2019",
                                        "layerskip2024", "early2023",
                                        "elhoushi2026", "best2026", "bu2026"};
    // each one's config must parse (apply checks)
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char *command = xprintf("--drop-recipe %s", names[i]);
        options_test_good(&t, command);
        EXPECT(t.train.drop_recipe == (int)i && t.train.drop_path == 0, "%s is number %d", names[i],
               t.train.drop_recipe);
        // as published
        const int each = !strcmp(names[i], "pld2020") || !strcmp(names[i], "elhoushi2026");
        EXPECT((t.train.drop_scale == SCALE_INVERTED_EACH) == each, "%s scales by %d", names[i],
               t.train.drop_scale);
        options_free(&t.o);
        free(command);
    }
}

// A value of the spec's type that is not its default.
static const char *options_test_other(const OptionSpec *s, char word[64]) {
    size_t length = 0;
    const char *last;
    switch (s->type) {
    case OPTION_INTEGER: return options_inside(s->domain, 977) ? "977" : "11";
    case OPTION_NUMBER:  return "0.30000000000000004";
    case OPTION_SPAN:    return "33.3%";
    case OPTION_TEXT:    return " \xc3\xa9 \"quoted\" # \\n\n\t= '";
    case OPTION_FLAG:    return strcmp(s->initial, "0") ? "0" : "1";
    default:
        // the last word that is not the default
        for (int i = 0; (last = options_word(s->domain, i, &length)); i++) {
            char this_word[64];
            snprintf(this_word, sizeof this_word, "%.*s", (int)length, last);
            if (i == 0 || strcmp(this_word, s->initial)) memcpy(word, this_word, sizeof this_word);
        }
        return word;
    }
}

// Reads a dump into a second set of options, whose dump and structs must be the same.
static void options_test_round_trip(TestOptions *t) {
    Text first = {0}, second = {0};
    TestOptions u;
    options_dump(&t->o, &first);
    options_test_open(&u);
    char *error = options_test_config(&u, first.s);
    EXPECT(!error, "%s", error);
    free(error);
    options_apply_recipe(&u.o, &u.train);
    options_dump(&u.o, &second);
    EXPECT_TEXT(second.s, first.s);
    for (int i = 0; i < train_options().n; i++) {
        const OptionSpec *s = &train_options().specs[i];
        const char *a = (const char *)&t->train + s->offset,
            *b = (const char *)&u.train + s->offset;
        if (s->type == OPTION_HEADING) continue;
        if (s->type == OPTION_TEXT)
            EXPECT_TEXT(*(char *const *)(const void *)b, *(char *const *)(const void *)a);
        else if (s->type == OPTION_SPAN) {
            const Span *p = (const Span *)(const void *)a, *q = (const Span *)(const void *)b;
            EXPECT(p->value == q->value && p->percent == q->percent, "--%s", s->name);
        } else {
            size_t size = s->type == OPTION_CHOICE || s->type == OPTION_FLAG ? sizeof(int) : 8;
            EXPECT(!memcmp(a, b, size), "--%s changed on the way through a dump", s->name);
        }
    }
    options_free(&u.o);
    text_free(&first);
    text_free(&second);
}

// For every row of the table: its name finds it, and its default and another value survive a dump.
static void test_options_round_trip(void) {
    TestOptions t;
    char word[64];
    options_test_good(&t, "");
    options_test_round_trip(&t);
    for (int i = 0; i < train_options().n; i++) {
        const OptionSpec *s = &train_options().specs[i];
        OptionRef r = {NULL, NULL};
        if (s->type == OPTION_HEADING) continue;
        EXPECT(!options_find(&t.o, s->name, &r) && r.spec == s, "--%s is not unique", s->name);
        char *error = options_set(&t.o, s->name, options_test_other(s, word), FROM_COMMAND);
        EXPECT(!error, "%s", error);
        free(error);
        if (s->type != OPTION_CHOICE || strchr(s->domain, '|')) {
            Text value = {0};
            options_print(&value, r);
            EXPECT(value.s && strcmp(value.s, s->initial), "--%s still prints its default %s",
                   s->name, s->initial);
            text_free(&value);
        }
    }
    options_test_round_trip(&t);
    const char *numbers[] = {"6e-4", "0.1", "1e-8", "1.4012984643248171e-45",
                             "3.4028234663852886e38",
                             "123456789012345678"};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        char *error = options_set(&t.o, "weight-decay", numbers[i], FROM_COMMAND);
        EXPECT(!error, "%s", error);
        options_test_round_trip(&t);
    }
    options_free(&t.o);
}

static void test_options_span_steps(void) {
    static const struct { Span span; int64_t total, steps; } all[] = {
        {{10, 1}, 1000, 100}, {{10, 1}, 1004, 100}, {{10, 1}, 1005, 101}, {{4.6, 1}, 1000, 46},
        {{100, 1}, 977, 977}, {{0, 1}, 977, 0}, {{250, 0}, 100, 250}, {{0, 0}, 100, 0},
        {{33, 1}, 1000000000000, 330000000000},
    };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        int64_t steps = span_steps(all[i].span, all[i].total);
        EXPECT(steps == all[i].steps, "span %d: got %lld, want %lld", (int)i, (long long)steps,
               (long long)all[i].steps);
    }
}

// The words of choices are in the order of the enums and presets of other files.
static void test_options_words(void) {
    static const struct { const char *option, *word; int value; } all[] = {
        {"lr-schedule", "cosine", SCHEDULE_COSINE}, {"lr-schedule", "linear", SCHEDULE_LINEAR},
        {"lr-schedule", "wsd", SCHEDULE_WSD}, {"lr-schedule", "constant", SCHEDULE_CONSTANT},
        {"drop-depth", "linear", DEPTH_LINEAR}, {"drop-depth", "linear0", DEPTH_LINEAR0},
        {"drop-depth", "uniform", DEPTH_UNIFORM}, {"drop-depth", "exp", DEPTH_EXP},
        {"drop-depth", "alternate", DEPTH_ALTERNATE}, {"drop-protect", "none", PROTECT_NONE},
        {"drop-protect", "first", PROTECT_FIRST}, {"drop-protect", "last", PROTECT_LAST},
        {"drop-protect", "first,last", PROTECT_BOTH},
        {"drop-scale", "inverted-each", SCALE_INVERTED_EACH},
        {"drop-ramp-shape", "linear", SHAPE_LINEAR}, {"drop-ramp-shape", "cosine", SHAPE_COSINE},
        {"drop-ramp-shape", "exp", SHAPE_EXP}, {"drop-ramp-shape", "exp2", SHAPE_EXP2},
        {"drop-unit", "batch", UNIT_BATCH}, {"drop-unit", "row", UNIT_ROW},
        {"drop-branches", "separate", BRANCHES_SEPARATE}, {"drop-branches", "tied", BRANCHES_TIED},
        {"drop-branches", "attn", BRANCHES_ATTN}, {"drop-branches", "mlp", BRANCHES_MLP},
        {"drop-sampling", "systematic", SAMPLING_SYSTEMATIC},
        {"drop-sampling", "bernoulli", SAMPLING_BERNOULLI},
        {"drop-scale", "inverted", SCALE_INVERTED}, {"drop-scale", "none", SCALE_NONE},
        {"drop-scale", "survival", SCALE_SURVIVAL}, {"drop-adam", "dense", ADAM_DENSE},
        {"drop-adam", "skip", ADAM_SKIP},
    };
    TestOptions t;
    OptionRef r = {NULL, NULL};
    OptionValue v;
    options_test_open(&t);
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        EXPECT(!options_find(&t.o, all[i].option, &r) && options_read(r.spec, all[i].word, &v) &&
               v.choice == all[i].value,
               "--%s %s is not number %d", all[i].option, all[i].word, all[i].value);
    }
    EXPECT(!options_find(&t.o, "preset", &r), "--preset");
    for (int i = 0; i < N_PRESETS; i++)
        EXPECT(options_read(r.spec, gpt_presets[i].name, &v) && v.choice == i, "preset %s",
               gpt_presets[i].name);
    size_t length;
    EXPECT(!options_word(r.spec->domain, N_PRESETS, &length),
           "--preset knows more than gpt_presets");
    options_free(&t.o);
}

// Replaces each run of blanks and line feeds by a single blank: undoes wrapping.
static void options_test_unwrap(char *s) {
    char *to = s;
    for (; *s; s++)
        if (!strchr(" \n", *s)) *to++ = *s;
        else if (to[-1] != ' ') *to++ = ' ';
    *to = 0;
}

// --help contains every option of every table with its help and default; no line is too wide.
static void test_options_help(void) {
    TestOptions t;
    Text help = {0};
    options_test_open(&t);
    options_help(&t.o, &help);
    EXPECT(!strncmp(help.s, "Usage: test CHECKPOINT [options]\n", 33),
           "help must start with the usage");
    for (const char *line = help.s; *line; line += strcspn(line, "\n") + 1)
        EXPECT(strcspn(line, "\n") <= OPTIONS_HELP_WIDTH, "too wide: %.120s", line);
    options_test_unwrap(help.s);
    for (int k = 0; k < t.o.n_sets; k++) {
        for (int i = 0; i < t.o.set[k].n; i++) {
            const OptionSpec *s = &t.o.set[k].specs[i];
            char *name = xprintf(s->type == OPTION_HEADING ? " %s " : " --%s ", s->name);
            char *says = xprintf(*s->initial ? "%s (default %s" : "%s", s->help, s->initial);
            const char *at = strstr(help.s, name);
            EXPECT(at && strstr(at, says), "help lacks%sor its text: %s", name, says);
            free(name);
            free(says);
        }
    }
    options_free(&t.o);
    text_free(&help);
}

static void options_test_main(void *command) {
    TestOptions t;
    options_test_open(&t);
    char program[] = "test";
    char *argv[] = {program, (char *)command};
    options_parse(&t.o, 2, argv);
    options_free(&t.o);
}

static void test_options_exit(void) {
    char bad[] = "--layrs=3", help[] = "--help", good[] = "--layers=3";
    EXPECT_EXIT(1, "error: unknown option --layrs; the nearest is --layers\n", options_test_main,
                bad);
    EXPECT_EXIT(0, "", options_test_main, help);
    EXPECT_EXIT(0, "", options_test_main, good);
}

#define OPTIONS_TESTS(X)                                                             \
    X(options_defaults) X(options_command_line) X(options_bare) X(options_bad_names) \
    X(options_bad_values) X(options_round)                                           \
    X(options_scientific) X(options_synonyms) X(options_synonyms_lead_somewhere)     \
    X(options_help_and_version) X(options_bad_value_keeps) X(options_config)         \
    X(options_config_errors) X(options_precedence)                                   \
    X(options_rates) X(options_recipes) X(options_round_trip) X(options_span_steps)  \
    X(options_words) X(options_help) X(options_exit)

#endif
