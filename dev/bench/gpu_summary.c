// gpu_summary.c: prints the table at the end of scripts/gpu_check.sh, and collects all measurements
// in one JSON file.
//
//     build/gpu_summary FOLDER FILE.json      the folder of the stages' files, and the output
//
// The folder contains stages.jsonl, a line per stage {"stage", "status", "seconds", "note"};
// tests.jsonl, a line per test; machine.json; the benchmarks' drop.json, step_PRESET.json and
// kernels_PRESET.json, step_PRESET_plain.json without fused epilogues, step_PRESET_fused.json with
// those of bias gradients too; graphs_0.json and graphs_1.json, a step without and with CUDA
// graphs; torch_PRESET.json (lines) and sdpa.json if PyTorch was available. Missing files are
// omitted from the JSON and appear as a dash in the table.
#include "../files/json.h"
#include "../files/files.h"
#include "cuda_cases.h"

// ---- Optional files ----

typedef struct { Text text; Json json; int there; } Part;

// `lines`: the file has one value per line and is read as an array.
static void part_open(Part *p, const char *folder, const char *name, int lines) {
    FileMap map;
    char *path = xprintf("%s/%s", folder, name);
    memset(p, 0, sizeof *p);
    const char *missing = file_map(&map, path);
    if (!missing && map.size) {                          // empty: a stage that was stopped
        if (lines) text_append(&p->text, "[", 1);
        text_append(&p->text, map.data, map.size);
        for (size_t i = 0; lines && i + 2 < p->text.n; i++)        // not after the last line
            if (p->text.s[i] == '\n') p->text.s[i] = ',';
        if (lines) text_append(&p->text, "]", 1);
        file_unmap(&map);
        const char *error = json_parse(&p->json, p->text.s, p->text.n);
        if (error) warn("%s is left out: %s", path, error);
        else p->there = 1;
    }
    free(path);
}

static void part_close(Part *p) {
    if (p->there) json_free(&p->json);
    text_free(&p->text);
}

static void part_write(const Part *p, const char *key, Text *out) {
    if (!p->there) return;
    text_printf(out, ",\n\"%s\": ", key);
    text_append(out, p->text.s, p->text.n);
}

static double number_of(const Part *p, int object, const char *key) {
    double x = NAN;
    if (p->there) json_number(&p->json, json_get(&p->json, object, key), &x);
    return x;
}

// ---- Lookup ----

// The first element of the array under a key of the file's object or, without a key, of the file's
// own array; else JSON_NONE.
static int first_of(const Part *p, const char *key) {
    if (!p->there) return JSON_NONE;
    return json_first(&p->json, key ? json_get(&p->json, 0, key) : 0);
}

// The first element from `node` on whose `key` is the string `value`.
static int find(const Part *p, int node, const char *key, const char *value) {
    while (node >= 0 && !json_equals(&p->json, json_get(&p->json, node, key), value))
        node = json_next(&p->json, node);
    return node;
}

// A preset's step as a fraction of the data sheet's peak or, if unknown, of the measured one;
// *sheet tells which.
static double step_mfu(const Part *p, int *sheet) {
    const int node = find(p, first_of(p, "rows"), "name", "MFU");
    const double of_sheet = number_of(p, node, "of_sheet_peak");
    *sheet = isfinite(of_sheet);
    return *sheet ? of_sheet : number_of(p, node, "of_measured_peak");
}

static double step_speed(const Part *p) {
    return number_of(p, find(p, first_of(p, "rows"), "name", "MFU"), "tokens_per_s");
}

// The smallest of_ideal among rates above 0 for that unit.
static double drop_least(const Part *p, const char *unit) {
    double least = NAN;
    for (int n = first_of(p, "drop_path"); n >= 0; n = json_next(&p->json, n))
        if (number_of(p, n, "rate") > 0 && json_equals(&p->json, json_get(&p->json, n, "unit"),
                                                       unit))
            least = fmin(least, number_of(p, n, "of_ideal"));
    return least;
}

static double torch_ratio(const Part *p) {
    return number_of(p, find(p, find(p, first_of(p, NULL), "name", "PyTorch's best / ours"), "what",
                             "bf16"), "ratio");
}

// The smallest of_best over the shapes.
static double sdpa_least(const Part *p, const char *way) {
    double least = NAN;
    for (int n = find(p, first_of(p, NULL), "way", way); n >= 0;
         n = find(p, json_next(&p->json, n), "way", way))
        least = fmin(least, number_of(p, n, "of_best"));
    return least;
}

// ---- Rows ----

// Prints one row: a fraction as a percentage or, with `times`, as a factor. aim 0: there is none.
static void row(Text *json, const char *what, double measured, double aim, int times) {
    const char *verdict = !(aim > 0) ? "" : isnan(measured) ? "not measured" : measured >=
        aim ? "met" : "missed";
    char value[32] = "-", wanted[32] = "";
    if (isfinite(measured))
        snprintf(value, sizeof value, times ? "%.2fx" : "%.1f%%",
                 times ? measured : 100 * measured);
    if (aim > 0)
        snprintf(wanted, sizeof wanted, times ? "%.2fx" : "%.0f%%", times ? aim : 100 * aim);
    printf("%-58s %9s %7s  %s\n", what, value, wanted, verdict);
    measure_json_open(json);
    measure_json_text(json, "what", what);
    measure_json(json, "measured", measured);
    measure_json(json, "aim", aim > 0 ? aim : NAN);
    measure_json_text(json, "verdict", verdict);
    text_printf(json, "}");
}

static void stages_print(const Part *p) {
    for (int n = first_of(p, NULL); n >= 0; n = json_next(&p->json, n)) {
        const char *const key[] = {"stage", "status", "note"};
        char *text[3];
        for (int i = 0; i < 3; i++)
            text[i] = json_string(&p->json, json_get(&p->json, n, key[i]), NULL);
        printf("%-22s %-14s %5.0f s   %s\n", text[0] ? text[0] : "?", text[1] ? text[1] : "?",
               number_of(p, n, "seconds"), text[2] ? text[2] : "");
        for (int i = 0; i < 3; i++) free(text[i]);
    }
}

// ---- The contents of a folder ----

// Files of which there is one, and files per preset.
#define SUMMARY_FILES(X)                                                                          \
    X(stages, "stages.jsonl", 1) X(tests, "tests.jsonl", 1) X(machine, "machine.json", 0)         \
    X(drop, "drop.json", 0) X(sdpa, "sdpa.json", 0) X(graphs_0, "graphs_0.json", 0)               \
    X(graphs_1, "graphs_1.json", 0)
#define SUMMARY_PRESET_FILES(X)                                                                   \
    X(step, "step_%s.json", 0) X(plain, "step_%s_plain.json", 0) X(fused, "step_%s_fused.json", 0) \
    X(kernels, "kernels_%s.json", 0) X(torch, "torch_%s.json", 1)

typedef struct {
#define X(field, name, lines) Part field;
    SUMMARY_FILES(X)
#undef X
#define X(field, name, lines) Part field[N_CUDA_DEFAULTS];
    SUMMARY_PRESET_FILES(X)
#undef X
} Summary;

static void summary_open(Summary *s, const char *folder) {
    char *path;
#define X(field, name, lines) part_open(&s->field, folder, name, lines);
    SUMMARY_FILES(X)
#undef X
    for (int i = 0; i < N_CUDA_DEFAULTS; i++) {
#define X(field, name, lines)                                                                     \
        path = xprintf(name, cuda_cases[i].preset);                                               \
        part_open(&s->field[i], folder, path, lines);                                             \
        free(path);
        SUMMARY_PRESET_FILES(X)
#undef X
    }
}

// Appends everything to the object in `out`, and frees it.
static void summary_take(Summary *s, Text *out) {
    char *key;
#define X(field, name, lines) part_write(&s->field, #field, out), part_close(&s->field);
    SUMMARY_FILES(X)
#undef X
    for (int i = 0; i < N_CUDA_DEFAULTS; i++) {
#define X(field, name, lines)                                                                     \
        key = xprintf(#field "_%s", cuda_cases[i].preset);                                        \
        part_write(&s->field[i], key, out), part_close(&s->field[i]);                             \
        free(key);
        SUMMARY_PRESET_FILES(X)
#undef X
    }
}

// ---- Tests and kernels ----

static void tests_print(const Part *p) {
    for (int n = first_of(p, NULL); n >= 0; n = json_next(&p->json, n)) {
        char *name = json_string(&p->json, json_get(&p->json, n, "test"), NULL);
        const double status = number_of(p, n, "status"), plain = number_of(p, n, "plain");
        if (status != 0)
            printf("   %s: exit code %.0f, %.0f without fused epilogues\n", name ? name : "?",
                   status, plain);
        free(name);
    }
}

// Each kernel of one preset: its time, its bytes or FLOPs, and the fraction of its bound: the
// largest matmul, or a copy, measured beside it.
static void kernels_print(const Part *p, const char *preset) {
    if (!p->there) return;
    printf("\n%-26s %-24s %9s %10s %-6s %9s\n", preset, "shape", "ms", "work", "", "of bound");
    for (int n = first_of(p, "rows"); n >= 0; n = json_next(&p->json, n)) {
        const double ms = number_of(p, n, "median_ms"), work = ms * number_of(p, n, "median");
        const double part = number_of(p, n, "of_peak");
        const int moves = json_equals(&p->json, json_get(&p->json, n, "unit"), "GB/s");
        char bound[32] = "", *name = json_string(&p->json, json_get(&p->json, n, "name"), NULL);
        char *shape = json_string(&p->json, json_get(&p->json, n, "shape"), NULL);
        if (isfinite(part)) snprintf(bound, sizeof bound, "%.1f%%", 100 * part);
        if (isfinite(ms) && name && shape)
            printf("%-26s %-24s %9.3f %10.1f %-6s %9s\n", name, shape, ms,
                   moves ? work : 1e-3 * work, moves ? "MB" : "GFLOP", bound);
        free(name), free(shape);
    }
}

// ---- The table ----

// A preset's step compared with its target, with PyTorch, and without fused epilogues.
static void step_print(const Summary *s, int i, Text *json) {
    static const double aim[N_CUDA_DEFAULTS] = {0.5, 0, 0, 0.55};
    const char *preset = cuda_cases[i].preset;
    int sheet;
    const double mfu = step_mfu(&s->step[i], &sheet);
    char *what = xprintf("%s, MFU of the %s peak", preset, sheet ? "data sheet's" : "measured");
    row(json, what, mfu, aim[i], 0);
    free(what);
    what = xprintf("%s, step, PyTorch's time / ours", preset);
    if (i == 0 || s->torch[i].there) row(json, what, torch_ratio(&s->torch[i]), 1.2, 1);
    free(what);
    what = xprintf("%s, step, time without fused epilogues / with", preset);
    if (s->plain[i].there)
        row(json, what, step_speed(&s->step[i]) / step_speed(&s->plain[i]), 0, 1);
    free(what);
    what = xprintf("%s, step, time with fused bias gradients / ours", preset);
    if (s->fused[i].there)
        row(json, what, step_speed(&s->step[i]) / step_speed(&s->fused[i]), 0, 1);
    free(what);
}

// Everything that has a target; the targets are for an H100 (README.md).
static void table_print(const Summary *s, Text *json) {
    printf("\n%-58s %9s %7s\n", "", "measured", "aim");
    for (int i = 0; i < N_CUDA_DEFAULTS; i++) step_print(s, i, json);
    row(json, "drop path of whole batches, least of ideal speed-up", drop_least(&s->drop, "batch"),
        0.95, 0);
    row(json, "drop path of rows, least of ideal speed-up", drop_least(&s->drop, "row"), 0.95, 0);
    row(json, "a small model's step with CUDA graphs, times as fast",
        step_speed(&s->graphs_1) / step_speed(&s->graphs_0), 0, 1);
    row(json, "attention forward, least of the best SDPA", sdpa_least(&s->sdpa, "forward"), 0.7, 0);
    row(json, "attention backward, least of the best SDPA", sdpa_least(&s->sdpa, "backward"), 0.7,
        0);
    for (int i = 0; i < N_CUDA_DEFAULTS; i++) {
        const Part *p = &s->kernels[i];
        const int n = find(p, first_of(p, "rows"), "name", "all matmuls of a step");
        char *what = xprintf("%s, all matmuls of a step, of the measured peak",
                             cuda_cases[i].preset);
        if (n >= 0) row(json, what, number_of(p, n, "of_peak"), 0, 0);
        free(what);
        if (p->there)
            printf("measured peak %.0f TFLOP/s, copy %.0f GB/s\n",
                   1e-12 * number_of(p, 0, "measured_peak"),
                   1e-9 * number_of(p, 0, "copy_bandwidth"));
    }
}

int main(int argc, char **argv) {
    if (argc != 3) die("usage: gpu_summary FOLDER FILE.json");
    Summary s;
    Text out = {0}, table = {0};
    summary_open(&s, argv[1]);
    text_printf(&table, "[");
    stages_print(&s.stages);
    tests_print(&s.tests);
    table_print(&s, &table);
    for (int i = 0; i < N_CUDA_DEFAULTS; i++) kernels_print(&s.kernels[i], cuda_cases[i].preset);
    text_printf(&out, "{\"table\": %s\n]", table.s);
    summary_take(&s, &out);
    text_printf(&out, "}\n");
    file_write_whole(argv[2], out.s, out.n);
    text_free(&out);
    text_free(&table);
    return 0;
}
