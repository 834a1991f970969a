// tests.c: the tests that mutate.py runs first on a mutant, until one fails. -DGROUP=1: drop path's
// arithmetic, 2: checkpoints, 3 and 5: the engine, 4: ramps. Runs the tests named as arguments, in
// that order, or all of the group.

#include "../check.h"
#include "../model/engines.h"
#include "../test/test.h"
#if GROUP == 1 || GROUP == 4
#include "../test/test_drop_path.h"
#define TESTS(X) DROP_PATH_TESTS(X)
#elif GROUP == 2
#include "../test/test_checkpoint.h"
#define TESTS(X) CHECKPOINT_TESTS(X)
#else
#include "../test/test_engine.h"
#define TESTS(X) ENGINE_TESTS(X)
#endif

int main(int argc, char **argv) {
    static const struct { const char *name; void (*run)(void); } tests[] = {
#define X(name) {#name, test_##name},
        TESTS(X)
#undef X
    };
#if GROUP == 3 || GROUP == 5
    test_engine = engine_cpu();
#endif
    const int n = (int)(sizeof tests / sizeof tests[0]);
    for (int a = argc == 1 ? 0 : 1; a < argc; a++)
        for (int i = 0; i < n; i++) {
            if (a && strcmp(argv[a], tests[i].name)) continue;
            tests[i].run();
            if (!test_failures) continue;
            printf("FAIL %s\n", tests[i].name);          // one is enough to catch a mutant
            test_directories_remove();
            return 1;
        }
    test_directories_remove();
    return 0;
}
