// bench.c: the speed of the CPU engine, as a fraction of what the machine can do at that moment.
//
//     make bench                                  everything, in about ten minutes; writes
//                                                 build/bench.json
//     build/bench --only step --preset gpt2       one table, one preset
//
// README.md in this directory explains the rows, measure.h how they are measured. Every row is
// first checked against a plain computation in double precision; a wrong result ends the program
// with exit code 1.
#include "kernels.h"
#include "../files/files.h"
#include "layers.h"
#include "steps.h"
#include "memory.h"
#include "../run/options.h"

// ---- Options ----

//  OPTION(field, name, type, default, domain, help)
#define BENCH_OPTIONS(HEADING, OPTION)                                                          \
  HEADING("Bench")                                                                              \
    OPTION(only, "only", CHOICE, "all", "all|peak|matmul|layers|step|drop|lora|memory|turns",   \
           "one table; turns: for each number n on a line of standard input do n steps, print " \
               "their mean in ms")                                                              \
    OPTION(dtype, "dtype", CHOICE, "fp32", "fp32|bf16",                                         \
           "operands of products in drop, memory and turns; matmul and step have both")         \
    OPTION(threads, "threads", INTEGER, "0", "[0,4096]",                                        \
           "CPU threads; 0: as many as the machine offers")                                     \
    BENCH_OPTIONS_FOR(OPTION, "build/bench.json")

OPTION_TABLE(BENCH_OPTIONS, BenchOptions, bench_options)
enum { ONLY_ALL, ONLY_MEMORY = 7, ONLY_TURNS };

// ---- Defaults: what is measured unless the options say otherwise ----

static const Case kernel_cases[] = {{"gpt2", 1, 1024}, {"small", 4, 256}};
// equal presets
static const Case step_cases[] = {{"gpt2", 4, 256}, {"gpt2", 4, 64}, {"small", 4, 256},
                                  {"tiny", 12, 64}};
// must be adjacent
static const Case drop_cases[] = {{"small", 2, 128}};
static const Case lora_cases[] = {{"gpt2", 2, 256}};
static const Case memory_cases[] = {{"gpt2", 4, 1024}, {"small", 8, 256}};
#define CASES(all) all, sizeof all / sizeof all[0]

static const struct {                                    // in the order of --only
    void (*run)(Bench *, const Case *cases, int n, int rounds);
    const Case *cases;
    int n, rounds;
} tables[] = {
    {bench_peak,   CASES(kernel_cases), 20},
    {bench_matmul, CASES(kernel_cases), 10},
    {bench_layers, CASES(kernel_cases), 10},
    {bench_step,   CASES(step_cases),   4},
    {bench_drop,   CASES(drop_cases),   12},
    {bench_lora,   CASES(lora_cases),   3},
};
enum { N_TABLES = sizeof tables / sizeof tables[0] };

static int bench_case(Case *only, const BenchOptions *o, const Case *defaults, int n) {
    return case_of(only, (int)o->preset, o->batch, o->seq_len, defaults, n);
}

// ---- The program ----

// The processor's name if the system reports it (Linux), from malloc.
static char *processor(void) {
    char line[256], *name = NULL;
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && !name && fgets(line, sizeof line, f))
        if (!strncmp(line, "model name", 10) && strchr(line, ':'))
            name = xprintf("%s", strchr(line, ':') + 2);
    if (f) fclose(f);
    if (name) name[strcspn(name, "\n")] = 0;
    return name ? name : xstrdup("unknown");
}

static void bench_write(const Bench *b, const char *path, const char *cpu) {
    Text out = {0};
    text_printf(&out, "{");
    measure_json_text(&out, "engine", b->engine->name);
    measure_json_text(&out, "processor", cpu);
    measure_json_text(&out, "compiler", __VERSION__);
    measure_json(&out, "threads", thread_count());
    measure_json(&out, "vector_bytes", VECTOR_BYTES);
    measure_json(&out, "bf16_pairs", PAIRS);
    text_printf(&out, ", \"rows\": %s\n], \"drop_path\": %s\n], \"memory\": %s\n]}\n", b->rows.s,
                b->drop.s, b->memory.s);
    file_write_whole(path, out.s, out.n);
    printf("\nalso in %s\n", path);
    text_free(&out);
}

// Prints all tables, or the one selected by --only. Memory comes first: this process must still be
// small and have no threads.
static void bench_tables(Bench *b, const BenchOptions *o) {
    Case only;
    if (o->only == ONLY_ALL || o->only == ONLY_MEMORY) {
        const int one = bench_case(&only, o, CASES(memory_cases));
        bench_memory(b, one ? &only : memory_cases,
                     one ? 1 : (int)(sizeof memory_cases / sizeof memory_cases[0]));
    }
    if (o->only == ONLY_MEMORY) return;
    peak_rows(&b->peaks);
    for (int i = 0; i < b->peaks.n; i++) measure_prepare(&b->peaks.row[i], MEASURE_PEAK_SLICE);
    matmul_peaks(b);
    for (int i = 0; i < N_TABLES; i++) {
        if (o->only != ONLY_ALL && o->only != i + 1) continue;
        const int one = bench_case(&only, o, tables[i].cases, tables[i].n);
        const int rounds = o->rounds ? (int)o->rounds : tables[i].rounds;
        tables[i].run(b, one ? &only : tables[i].cases, one ? 1 : tables[i].n, rounds);
    }
}

int main(int argc, char **argv) {
    BenchOptions o;
    Options options;
    Bench b;
    Case only;
    program_begin(argv);
    options_init(&options, "bench [options]");
    options_add(&options, bench_options(), &o);
    options_parse(&options, argc, argv);
    set_threads((int)o.threads);
    memset(&b, 0, sizeof b);
    b.engine = &cpu_engine, b.forget = memory_forget, b.dtype = o.dtype;
    b.dtypes[0] = DTYPE_FP32, b.dtypes[1] = DTYPE_BF16, b.n_dtypes = 2, b.samplings = 2;
    if (o.only == ONLY_TURNS) {
        bench_case(&only, &o, CASES(step_cases));
        bench_turns(&b, &only);
        options_free(&options);
        return 0;
    }
    fclose(file_open(o.json, "ab"));                     // fail now rather than after minutes
    setvbuf(stdout, NULL, _IOLBF, 0);
    char *cpu = processor();
    printf("%s, %d threads, vectors of %d bytes; %s\n", cpu, thread_count(), VECTOR_BYTES,
           b.engine->name);
    Text *const arrays[] = {&b.rows, &b.drop, &b.memory};
    for (int i = 0; i < 3; i++) text_printf(arrays[i], "[");
    bench_tables(&b, &o);
    bench_write(&b, o.json, cpu);
    for (int i = 0; i < 3; i++) text_free(arrays[i]);
    free(cpu);
    options_free(&options);
    return 0;
}
