// engines.c: the CPU engines of a fat build (make FAT=1), and which of them runs. Other builds have
// a single engine, selected by train_gpt.c, and do not compile this file.
//
// The table is FAT_ENGINES in dev.mk: names, best first, each with the instructions that
// train_gpt.c is compiled for. It is passed as CPU_ENGINES, rows of X(name, HAS(instructions) &&
// ...), so the processor is tested for exactly what the compiler was allowed to use.
//
//     DROPPATH_ENGINE=avx2        selects an engine, for tests and comparisons

#include "../check.h"
#include "engines.h"
#include "tiles.h"
#include <cpuid.h>

#ifndef CPU_ENGINES
#error "compiled by make FAT=1, which passes the table of engines"
#endif
#define HAS(instructions) __builtin_cpu_supports(#instructions)
#define HAS_AMX engines_have_amx()

int engines_have_amx(void) {
    enum { BF16 = 1 << 22, TILE = 1 << 24 };
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & BF16) && (d & TILE) && tiles_request();
}

#define X(name, runs) extern const Engine cpu_engine_##name;
CPU_ENGINES(X)
#undef X

const Engine *engine_cpu(void) {
    const struct { const char *name; const Engine *engine; int runs; } choice[] = {
#define X(name, runs) {#name, &cpu_engine_##name, runs},
        CPU_ENGINES(X)
#undef X
    };
#define X(name, runs) " " #name
    static const char names[] = CPU_ENGINES(X);
#undef X
    const char *wanted = getenv("DROPPATH_ENGINE");
    for (size_t i = 0; i < sizeof choice / sizeof choice[0]; i++) {
        if (wanted && *wanted ? strcmp(wanted, choice[i].name) : !choice[i].runs) continue;
        if (!choice[i].runs)
            die("DROPPATH_ENGINE=%s: this processor does not support its instructions", wanted);
        return choice[i].engine;
    }
    die("DROPPATH_ENGINE=%s: the engines of this build are%s", wanted, names);
}
