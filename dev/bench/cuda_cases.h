// cuda_cases.h: the GPU benchmarks' default cases, and the peaks of GPUs by their product names.
#ifndef CUDA_CASES_H
#define CUDA_CASES_H

#include "common.h"

// One micro-batch per step, as large as fits in 80 GB with ease: the larger the model, the larger
// AdamW's share.
static const Case cuda_cases[] = {
    {"gpt2", 32, 1024}, {"gpt2-medium", 32, 1024}, {"gpt2-large", 16, 1024}, {"gpt2-xl", 16, 1024},
    {"small", 64, 256}, {"tiny", 64, 64},
};
// Option rows of the GPU benchmarks.
#define CUDA_BENCH_OPTIONS(OPTION, json_file)                     \
    OPTION(dtype, "dtype", CHOICE, "bf16", "fp32|bf16|auto|tf32", \
           "operands of products; auto: the engine's own")        \
    BENCH_OPTIONS_FOR(OPTION, json_file)

enum { N_CUDA_CASES = sizeof cuda_cases / sizeof cuda_cases[0], N_CUDA_DEFAULTS = 4 };

// Dense bf16 matmuls with fp32 accumulation, without structured sparsity, in TFLOP/s, from NVIDIA's
// data sheets (A100, H100, H100 NVL, H200, L40S; GeForce RTX 4090: Ada whitepaper). The first name
// contained in the device's name applies; plain "H100" is the SXM5 module.
static const struct { const char *name; double peak; } cuda_sheet[] = {
    {"A100", 312}, {"H100 PCIe", 756}, {"H100 NVL", 835}, {"H100", 989}, {"H200 NVL", 835},
    {"H200", 989}, {"L40S", 362}, {"RTX 4090", 165},
};

// FLOP/s by the data sheet; 0 for a device that is not in the table, and for other dtypes.
static inline double sheet_peak(const char *device, int dtype) {
    for (size_t i = 0; dtype == DTYPE_BF16 && i < sizeof cuda_sheet / sizeof cuda_sheet[0]; i++)
        if (strstr(device, cuda_sheet[i].name)) return 1e12 * cuda_sheet[i].peak;
    return 0;
}

#endif
