// bench_cuda.c: whole training steps and drop path on the GPU; kernels are in kernels.cu.
//
//     build/bench_cuda                                  both tables; writes build/bench_cuda.json
//     build/bench_cuda --only step --preset gpt2-xl     one table, one preset
//
// The tables are those of bench.c, by the same code (steps.h), on the engine that is linked: this
// file knows nothing of the GPU beyond its data sheet. README.md in this directory explains the
// rows.
#include "cuda_cases.h"
#include "../files/files.h"
#include "steps.h"
#include "../run/options.h"

// ---- Options ----

//  OPTION(field, name, type, default, domain, help)
#define BENCH_OPTIONS(HEADING, OPTION)                                                             \
  HEADING("Bench")                                                                                 \
    OPTION(only, "only", CHOICE, "all", "all|step|drop|lora|turns",                                \
           "one table; turns: for each number n on a line of standard input do n steps, print "    \
               "their mean in ms")                                                                 \
    OPTION(recompute, "recompute", CHOICE, "none", "gelu|none|branch", "what backward recomputes") \
    OPTION(graphs, "graphs", FLAG, "0", "0|1", "launch each branch as a CUDA graph")               \
    CUDA_BENCH_OPTIONS(OPTION, "build/bench_cuda.json")

OPTION_TABLE(BENCH_OPTIONS, BenchOptions, bench_options)
enum { ONLY_ALL, ONLY_STEP, ONLY_DROP, ONLY_LORA, ONLY_TURNS };
enum { STEP_ROUNDS = 8, DROP_ROUNDS = 3 };

// ---- The program ----

static void bench_write(const Bench *b, const char *path) {
    Text out = {0};
    text_printf(&out, "{");
    measure_json_text(&out, "engine", b->engine->name);
    measure_json_text(&out, "dtype", dtype_name[b->dtype]);
    measure_json(&out, "sheet_peak", b->sheet_peak > 0 ? b->sheet_peak : NAN);
    text_printf(&out, ", \"rows\": %s\n], \"drop_path\": %s\n]}\n", b->rows.s, b->drop.s);
    file_write_whole(path, out.s, out.n);
    printf("\nalso in %s\n", path);
    text_free(&out);
}

static void bench_open(Bench *b, int dtype, int recompute, int graphs) {
    memset(b, 0, sizeof *b);
    b->engine = engine_cuda();
    b->recompute = recompute, b->graphs = graphs;
    if (dtype == DTYPE_AUTO) dtype = b->engine->dtype;
    b->dtype = b->dtypes[0] = dtype, b->n_dtypes = 1, b->samplings = 1;
    b->sheet_peak = sheet_peak(b->engine->name, dtype);
    // For another batch size, cuBLASLt sums with another algorithm: in fp32 the last bits of a loss
    // change; bf16 (2^-9) and tf32 (2^-11) also round differently along the way, little of which
    // survives in a mean over tokens.
    for (int d = 0; d < N_DTYPES; d++) b->loss_error[d] = d == DTYPE_FP32 ? 1e-5 : 2e-4;
    text_printf(&b->rows, "[");
    text_printf(&b->drop, "[");
}

int main(int argc, char **argv) {
    BenchOptions o;
    Options options;
    Bench b;
    Case only;
    options_init(&options, "bench_cuda [options]");
    options_add(&options, bench_options(), &o);
    options_parse(&options, argc, argv);
    const int one = case_of(&only, (int)o.preset, o.batch, o.seq_len, cuda_cases, N_CUDA_CASES),
        rounds = (int)o.rounds;
    // fail now rather than after minutes
    if (o.only != ONLY_TURNS) fclose(file_open(o.json, "ab"));
    setvbuf(stdout, NULL, _IOLBF, 0);
    bench_open(&b, (int)o.dtype, (int)o.recompute, o.graphs);
    if (o.only == ONLY_TURNS) {
        bench_turns(&b, &only);
    } else {
        printf("%s\n", b.engine->name);
        if (o.only == ONLY_ALL || o.only == ONLY_STEP)
            bench_step(&b, one ? &only : cuda_cases, one ? 1 : N_CUDA_DEFAULTS,
                       rounds ? rounds : STEP_ROUNDS);
        if (o.only == ONLY_ALL || o.only == ONLY_DROP)
            bench_drop(&b, one ? &only : cuda_cases, 1, rounds ? rounds : DROP_ROUNDS);
        if (o.only == ONLY_ALL || o.only == ONLY_LORA)
            bench_lora(&b, one ? &only : cuda_cases, 1, rounds ? rounds : DROP_ROUNDS);
        bench_write(&b, o.json);
    }
    text_free(&b.rows);
    text_free(&b.drop);
    options_free(&options);
    return 0;
}
