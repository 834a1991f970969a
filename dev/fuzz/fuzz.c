// fuzz.c: every parser for LLVM's libFuzzer. The program's name selects one: build/fuzz/json is a
// link to it. make fuzz builds it and runs them all; build/fuzz/json -help=1 lists libFuzzer's
// options.
#include "parsers.h"

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const FuzzParser *parser;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    const char *name = strrchr(*argv[0], '/');
    parser = fuzz_find(name ? name + 1 : *argv[0]);
    if (*argc < 1 || !parser)
        die("%s is the name of no parser\n  hint: make fuzz makes links that are", *argv[0]);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_run(parser, data, size);
    return 0;
}
