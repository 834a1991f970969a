// test_gpt.c: every test of dev/test/ in one program. Run it from the repository root.
//
//     build/test_gpt              all tests; exit code 1 if any failed
//     build/test_gpt --list       their names; NAME@cpu, NAME@gpu: one test, on one of two engines
//     build/test_gpt NAME ...     these only
//     BUILD=folder                where the programs for whole runs are, if not in build
//     TEST_LIMIT=seconds          time limit of a test, 1200; 0: none, and tests get no processes
//                                 of their own, for debuggers
//
// An engine test is written once, against engine.h, and runs on every engine this program is linked
// with.

#include "dev/check.h"
#include "dev/run/program.h"
#include "dev/model/engines.h"
#include "dev/test/supervise.h"
#include "dev/test/test.h"
#include "dev/test/test_attention.h"
#include "dev/test/test_checkpoint.h"
#include "dev/test/test_choices.h"
#include "dev/test/test_collapse.h"
#include "dev/test/test_comm.h"
#include "dev/test/test_compare.h"
#include "dev/test/test_study.h"
#include "dev/test/test_cuda.h"
#include "dev/test/test_dense.h"
#include "dev/test/test_drop_path.h"
#include "dev/test/test_emu.h"
#include "dev/test/test_engine.h"
#include "dev/test/test_exits.h"
#include "dev/test/test_fat.h"
#include "dev/test/test_fuzz.h"
#include "dev/test/test_gpu_model.h"
#include "dev/test/test_growth.h"
#include "dev/test/test_interop.h"
#include "dev/test/test_json.h"
#include "dev/test/test_kernels.h"
#include "dev/test/test_layers.h"
#include "dev/test/test_long.h"
#include "dev/test/test_lora.h"
#include "dev/test/test_manifest.h"
#include "dev/test/test_nccl.h"
#include "dev/test/test_noise.h"
#include "dev/test/test_numbers.h"
#include "dev/test/test_options.h"
#include "dev/test/test_order.h"
#ifdef WITH_CUDA_ENGINE
#include "dev/test/test_parity.h"
#include "dev/test/test_parity_attention.h"
#endif
#include "dev/test/test_prune_replace.h"
#include "dev/test/test_replace.h"
#include "dev/test/test_rng.h"
#include "dev/test/test_safetensors.h"
#include "dev/test/test_sample.h"
#include "dev/test/test_schedule.h"
#include "dev/test/test_shards.h"
#include "dev/test/test_speculate.h"
#include "dev/test/test_adaptive.h"
#include "dev/test/test_stats.h"
#include "dev/test/test_strangers.h"
#include "dev/test/test_supervise.h"
#include "dev/test/test_teacher.h"
#include "dev/test/test_tokenizer.h"
#include "dev/test/test_tools.h"
#include "dev/test/test_torture.h"
#include "dev/test/test_trainer.h"
#include "dev/test/test_watch.h"
#include "dev/test/test_analysis.h"                      // uses several of the others

#ifdef WITH_CUDA_ENGINE
static const Engine *(*const engines[])(void) = {engine_cpu, engine_cuda};
#else
static const Engine *(*const engines[])(void) = {engine_cpu};
#endif
enum { N_ENGINES = sizeof engines / sizeof engines[0] };
static const char *const tags[] = {"cpu", "gpu"};

typedef struct { const char *name; void (*run)(void); int engines; } Test;

// Tests of ranks come first: they fork processes that start threads, which QEMU's user mode cannot
// do once this process has threads.
static const Test tests[] = {
#define X(name) {#name, test_##name, 1},
    COMM_TESTS(X)
    STRANGERS_TESTS(X)
    SUPERVISE_TESTS(X)
    NUMBERS_TESTS(X)
    WATCH_TESTS(X)
    ORDER_TESTS(X)
    RNG_TESTS(X)
    JSON_TESTS(X)
    SAFETENSORS_TESTS(X)
    SHARDS_TESTS(X)
    TOKENIZER_TESTS(X)
    OPTIONS_TESTS(X)
    SCHEDULE_TESTS(X)
    NOISE_TESTS(X)
    STATS_TESTS(X)
    DROP_PATH_TESTS(X)
    FAT_TESTS(X)
    EMU_TESTS(X)
#undef X
#define X(name) {#name, test_##name, N_ENGINES},
    ENGINE_TESTS(X)
    NOISE_ENGINE_TESTS(X)
    LORA_ENGINE_TESTS(X)
    GROWTH_ENGINE_TESTS(X)
    NUMBERS_ENGINE_TESTS(X)
    SCORE_TESTS(X)
    TEACHER_ENGINE_TESTS(X)
    ATTENTION_ENGINE_TESTS(X)
    LAYERS_ENGINE_TESTS(X)
    REPLACE_ENGINE_TESTS(X)
    EXITS_ENGINE_TESTS(X)
    SPECULATE_ENGINE_TESTS(X)
    ADAPTIVE_ENGINE_TESTS(X)
#undef X
#define X(name) {#name, test_##name, 1},
#ifdef WITH_CUDA_ENGINE
    CUDA_TESTS(X)
    PARITY_TESTS(X)
    PARITY_ATTENTION_TESTS(X)
#ifdef CUDA_EMULATED                                     // several ranks without a GPU each
    NCCL_TESTS(X)
    GPU_RANKS_TESTS(X)
    GPU_LORA_TESTS(X)
    GPU_ANALYSIS_TESTS(X)
#endif
#endif
    KERNELS_TESTS(X)
    CHECKPOINT_TESTS(X)
    SAMPLE_TESTS(X)
    TRAINER_TESTS(X)
    TOOLS_TESTS(X)
    INTEROP_TESTS(X)
    COMPARE_TESTS(X)
    STUDY_TESTS(X)
    MANIFEST_TESTS(X)
    FUZZ_TESTS(X)
    LONG_TESTS(X)
    TORTURE_TESTS(X)
    CHOICES_TESTS(X)
    GPU_MODEL_TESTS(X)
    GROWTH_TESTS(X)
    LORA_TESTS(X)
    TEACHER_TESTS(X)
    ATTENTION_TESTS(X)
    LAYERS_TESTS(X)
    DENSE_TESTS(X)
    REPLACE_TESTS(X)
    COLLAPSE_TESTS(X)
    ANALYSIS_TESTS(X)
    PRUNE_REPLACE_TESTS(X)
    EXITS_TESTS(X)
    SPECULATE_TESTS(X)
    ADAPTIVE_TESTS(X)
#undef X
};
enum { N_TESTS = sizeof tests / sizeof tests[0] };

// A test on the engines from `first` to before `end`, under the name that selects them.
typedef struct { const Test *test; const char *name; int first, end; } Chosen;
static Chosen chosen[N_TESTS * N_ENGINES];

// What --list prints and what runs without names: each test on each of its engines. A test that
// several engines run is NAME@cpu, NAME@gpu. Returns how many there are.
static int all_tests(Chosen *to) {
    int n = 0;
    for (int i = 0; i < N_TESTS; i++)
        for (int e = 0; e < tests[i].engines; e++)
            to[n++] = (Chosen){&tests[i],
                tests[i].engines == 1 ? tests[i].name : xprintf("%s@%s", tests[i].name, tags[e]),
                e, e + 1};
    return n;
}

// NAME is a test on all of its engines, NAME@cpu and NAME@gpu on one.
static Chosen find_test(const char *name) {
    const char *at = strchr(name, '@');
    const size_t n = at ? (size_t)(at - name) : strlen(name);
    for (int i = 0; i < N_TESTS; i++) {
        if (strncmp(tests[i].name, name, n) || tests[i].name[n]) continue;
        if (!at) return (Chosen){&tests[i], name, 0, tests[i].engines};
        for (int e = 0; e < tests[i].engines; e++)
            if (!strcmp(at + 1, tags[e])) return (Chosen){&tests[i], name, e, e + 1};
    }
    die("there is no test %s\n  hint: --list prints the names", name);
}

// Runs a test; returns 1 if it passed.
static int chosen_run(int i) {
    const double from = clock_seconds();
    test_failures = 0;
    for (int e = chosen[i].first; e < chosen[i].end; e++) {
        test_engine = engines[e]();
        chosen[i].test->run();
    }
    const double ms = 1e3 * (clock_seconds() - from);
    if (test_failures) printf("FAIL %s\n", chosen[i].name);
    else printf("ok   %s (%.0f ms)\n", chosen[i].name, ms);
    fflush(stdout);
    return !test_failures;
}

static const char *chosen_name(int i) { return chosen[i].name; }
static void print_engines(void) {
    for (int e = 0; e < N_ENGINES; e++) printf("engine: %s\n", engines[e]()->name);
}

int main(int argc, char **argv) {
    program_begin(argv);
    if (argc == 2 && !strcmp(argv[1], "--list")) {
        for (int i = 0, n = all_tests(chosen); i < n; i++) puts(chosen[i].name);
        return 0;
    }
    const char *limit = getenv("TEST_LIMIT");
    const double limit_s = limit ? strtod(limit, NULL) : 1200;
    TestList list = {0, chosen_name, chosen_run, print_engines};
    if (argc - 1 > N_TESTS * N_ENGINES) die("more names than there are tests");
    // reports a wrong name before anything runs
    for (int i = 1; i < argc; i++) chosen[list.count++] = find_test(argv[i]);
    if (argc == 1) list.count = all_tests(chosen);
    int passed = 0, exit_code = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);                    // a crash loses no output line
    if (limit_s > 0) passed = supervise(&list, limit_s, &exit_code);
    else {
        print_engines();
        for (int i = 0; i < list.count; i++) passed += list.run(i);
        test_directories_remove();
    }
    printf("%d passed, %d failed\n", passed, list.count - passed);
    return passed < list.count ? 1 : exit_code;
}
