// common.h: shared by all tables, on either engine: which model runs on how many tokens, and how a
// loss is checked.
#ifndef COMMON_H
#define COMMON_H

#include "../model/engines.h"
#include "measure.h"

typedef struct { const char *preset; int B, T; } Case;   // a model, and B rows of T tokens

// Option rows common to all benchmarks (dev/run/options.h); whatever is not given comes from the
// table's own case.
#define BENCH_OPTIONS_FOR(OPTION, json_file)                                                   \
    OPTION(preset, "preset", CHOICE, "default",                                                \
           "default|tiny|small|gpt2|gpt2-medium|gpt2-large|gpt2-xl",                           \
           "default: those of each table")                                                     \
    OPTION(batch, "batch", INTEGER, "0", "[0,65536]", "rows of a micro-batch; 0: the table's") \
    OPTION(seq_len, "seq-len", INTEGER, "0", "[0,1048576]", "tokens of a row; 0: the table's") \
    OPTION(rounds, "rounds", INTEGER, "0", "[0,1e6]", "slices of each row; 0: the table's")    \
    OPTION(json, "json", TEXT, json_file, "FILE", "where the results go, too")

enum { N_DTYPES = DTYPE_TF32 + 1 };
// by DTYPE_*
static const char *const dtype_name[N_DTYPES] = {REAL_NAME, "bf16", "auto", "tf32"};

typedef struct {
    const Engine *engine;                // for whole steps
    MeasureTable peaks;                  // PEAK_*, prepared as slices beside others
    MeasureRow *matmul_peak[N_DTYPES];  // the bound of matmuls; NULL: what engine->peak measures
    double sheet_peak;                   // FLOP/s of dense matmuls by the data sheet; 0: unknown
    double loss_error[N_DTYPES];         // between a loss and the mean over its rows run alone; 0:
                                         // REAL's rounding
    // resets engine->memory, so that it reports what later plans use; or NULL
    void (*forget)(Model *);
    int dtypes[2], n_dtypes;             // for the table of steps
    int samplings;                       // for the drop-path table: 1, systematic; 2, also
                                         // bernoulli
    Text rows, drop, memory;             // JSON arrays
    int dtype, recompute, graphs;        // dtype of tables that use only one; EngineArgs for all
} Bench;

// The default case (of n) with that preset or, if there is none, the preset with few tokens.
static inline Case case_default(const GptPreset *preset, const Case *defaults, int n) {
    const Case few = {preset->name, 4, preset->config.T < 256 ? preset->config.T : 256};
    for (int i = 0; i < n; i++)
        if (!strcmp(defaults[i].preset, preset->name)) return defaults[i];
    return few;
}

// Whether the options --preset (its number; 0: not given), --batch and --seq-len (0: not given)
// specify a case. If so, it is stored in *only, completed from the defaults (n).
static inline int case_of(Case *only, int preset, int64_t batch, int64_t seq_len,
                          const Case *defaults, int n) {
    const GptPreset *p = preset ? &gpt_presets[preset - 1] : gpt_preset(defaults[0].preset);
    *only = case_default(p, defaults, n);
    if (batch) only->B = (int)batch;
    if (seq_len) only->T = (int)seq_len;
    if (only->T > p->config.T)
        die("--seq-len %d: %s has rows of at most %d", only->T, only->preset, p->config.T);
    return preset || batch || seq_len;
}

static inline void fill_tokens(int *x, size_t n, int V, int id) {
    for (size_t i = 0; i < n; i++)
        x[i] = (int)(rng_words(0, STREAM_TEST, i, (uint32_t)id, 1).v[0] % (uint32_t)V);
}

// The k-th index of n to compare: the ends first, then random ones. Each axis uses its own salt.
static inline size_t pick(size_t n, int k, uint32_t salt) {
    return k == 0 ? n - 1 : k == 1 ? 0 : rng_words(0, STREAM_TEST, (uint64_t)k, salt, 2).v[0] % n;
}

// What rounding explains in a sum of n terms, relative to its magnitude.
static inline double rounding(double n) { return 8 * REAL_EPSILON * sqrt(n); }

#endif
