// Tests of a fat build (make FAT=1): which engine runs. Other builds have a single engine, and
// nothing to test here. That every engine computes correctly is shown by all other tests, run once
// for each: DROPPATH_ENGINE=avx2 make test FAT=1.
#ifndef TEST_FAT_H
#define TEST_FAT_H

#include "../model/engines.h"
#include "test.h"

#ifdef CPU_ENGINES
#define FAT_TESTS(X) X(fat_engines) X(fat_refuses)
#define HAS(instructions) __builtin_cpu_supports(#instructions)
#define HAS_AMX engines_have_amx()

// Prints on standard error which engine DROPPATH_ENGINE=wanted (NULL: unset) selects.
static void fat_test_say(void *wanted) {
    if (wanted) setenv("DROPPATH_ENGINE", (const char *)wanted, 1);
    else unsetenv("DROPPATH_ENGINE");
    fprintf(stderr, "[%s]", engine_cpu()->name);
}

// Each row of the table gives an engine compiled for its name's instructions, or is refused if the
// processor cannot run it; the first that can run is the default.
static void test_fat_engines(void) {
    static const struct { const char *name, *says; } known[] = {
        {"amx", ", AVX-512 + AMX]"}, {"avx512bf16", ", AVX-512 + BF16]"},
        {"avx512", ", AVX-512]"}, {"avx2", ", AVX2]"}, {"sse2", ", SSE2]"}};
    enum { ENGINES = sizeof known / sizeof known[0] };
    const struct { char *name; int runs; } row[] = {
#define X(name, runs) {#name, runs},
        CPU_ENGINES(X)
#undef X
    };
    int best = -1;
    for (int i = 0; i < ENGINES; i++) {
        EXPECT_TEXT(row[i].name, known[i].name);
        EXPECT_EXIT(row[i].runs ? 0 : 1,
                    row[i].runs ? known[i].says : "this processor does not support its instructions",
                    fat_test_say, row[i].name);
        if (row[i].runs && best < 0) best = i;
    }
    EXPECT(sizeof row / sizeof row[0] == ENGINES && row[ENGINES - 1].runs,
           "five engines, and every x86-64 runs the last");
    if (best < 0) return;
    EXPECT_EXIT(0, known[best].says, fat_test_say, NULL);
    EXPECT_EXIT(0, known[best].says, fat_test_say, "");
}

static void test_fat_refuses(void) {
    EXPECT_EXIT(1, "DROPPATH_ENGINE=avx: the engines of this build are amx avx512bf16 avx512 avx2 "
                "sse2", fat_test_say, "avx");
    EXPECT_EXIT(1, "DROPPATH_ENGINE=AVX2: ", fat_test_say, "AVX2");
}
#else
#define FAT_TESTS(X)
#endif

#endif
