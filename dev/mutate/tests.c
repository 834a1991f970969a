// tests.c: the tests that mutate.py runs first on a mutant, one group to a program so that little is compiled again:
// -DGROUP=1 drop path's arithmetic, 2 checkpoints, 3 the engine. Without arguments all of a group, else those named.

#include "../check.h"
#include "../engine.h"
#include "../test/test.h"
#if GROUP == 1
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
#if GROUP == 3
    test_engine = engine_cpu();
#endif
    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++) {
        int wanted = argc == 1;
        for (int a = 1; a < argc; a++) wanted |= !strcmp(argv[a], tests[i].name);
        if (!wanted) continue;
        tests[i].run();
        if (!test_failures) continue;
        printf("FAIL %s\n", tests[i].name);              // one is enough to catch a mutant
        test_directories_remove();
        return 1;
    }
    test_directories_remove();
    return 0;
}
