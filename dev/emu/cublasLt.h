// cublasLt.h: a substitute for cuBLASLt without a GPU (tests only): the calls that the engine
// makes, as plain loops with fp32 sums in the order of k. Enumerators have the library's values.
// Whatever is missing here, or not supported by the library, returns an error and explains it on
// standard error.
//
// Supported, following the table for cublasLtMatmul() in the cuBLAS manual: A and B bf16, C and D
// bf16 or fp32, compute type 32F; or all fp32, compute type 32F or 32F_FAST_TF32 (operands rounded
// to tf32). Scale type fp32; column-major matrices.
//
//   EMU_EPILOGUES=n         which epilogues have kernels: 0 none, 1 those of bf16 operands, 2 all
//                           (the default)
//   EMU_ROWS=1              the order of a sum depends on the columns of D, as if each size had its
//                           own algorithm
//   EMU_ERRORS=1            bf16 and tf32 sums as tensor cores compute them, tanh in epilogues as
//                           tanh.approx (cuda_bf16.h)
//   EMU_ALGORITHMS_FAIL=n   bit mask: which of the heuristic's algorithms 0 and 1 cublasLtMatmul
//                           rejects
//   EMU_COST_PLAIN=n        matmuls and kernels take a given time on a clock of their own, which is
//                           what events then record: n microseconds for a matmul without an
//                           epilogue, EMU_COST_FUSED for one with, EMU_COST_FIRST more for
//                           algorithm 0, EMU_COST_SECOND more for algorithm 1, EMU_COST_KERNEL for
//                           each launch of a kernel
#ifndef EMU_CUBLASLT_H
#define EMU_CUBLASLT_H

#include "cuda_bf16.h"

#define EMU_CUBLAS_STATUS(X)                                                      \
    X(CUBLAS_STATUS_SUCCESS, 0, "CUBLAS_STATUS_SUCCESS")                          \
    X(CUBLAS_STATUS_NOT_INITIALIZED, 1, "CUBLAS_STATUS_NOT_INITIALIZED")          \
    X(CUBLAS_STATUS_INVALID_VALUE, 7, "CUBLAS_STATUS_INVALID_VALUE")              \
    X(CUBLAS_STATUS_EXECUTION_FAILED, 13, "CUBLAS_STATUS_EXECUTION_FAILED")       \
    X(CUBLAS_STATUS_NOT_SUPPORTED, 15, "CUBLAS_STATUS_NOT_SUPPORTED")

typedef enum { EMU_CUBLAS_STATUS(EMU_ENUM) } cublasStatus_t;

inline const char *cublasLtGetStatusString(cublasStatus_t result) {
    EMU_CUBLAS_STATUS(EMU_TEXT)
    return "unknown";
}

typedef enum { CUDA_R_32F = 0, CUDA_R_16BF = 14 } cudaDataType_t;
typedef cudaDataType_t cudaDataType;
typedef enum { CUBLAS_OP_N, CUBLAS_OP_T } cublasOperation_t;
typedef enum { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_FAST_TF32 = 77 } cublasComputeType_t;
typedef enum {
    CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4, CUBLASLT_EPILOGUE_GELU_AUX_BIAS =
        164,
    CUBLASLT_EPILOGUE_DGELU = 192, CUBLASLT_EPILOGUE_BGRADA = 256
} cublasLtEpilogue_t;
typedef enum {
    CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4,
        CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 12, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE = 26
} cublasLtMatmulDescAttributes_t;
typedef enum { CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1 } cublasLtMatmulPreferenceAttributes_t;
typedef enum {
    CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT = 5, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET = 6
} cublasLtMatrixLayoutAttribute_t;

typedef struct EmuLt *cublasLtHandle_t;
typedef struct EmuDesc {
    int32_t compute, scale, transa, transb, bias_type;   // bias_type: -1 if not set: D's
    uint32_t epilogue;
    void *bias, *aux;
    int64_t aux_ld;                                      // 0 if not set
} *cublasLtMatmulDesc_t;
typedef struct EmuLayout {
    uint32_t type;
    uint64_t rows, cols;
    int64_t ld, stride;                                  // stride: from one matrix to the next
    int32_t count;                                       // of matrices
} *cublasLtMatrixLayout_t;
typedef struct EmuPreference { uint64_t workspace; } *cublasLtMatmulPreference_t;
typedef struct { uint64_t data[8]; } cublasLtMatmulAlgo_t;
typedef struct {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
} cublasLtMatmulHeuristicResult_t;

#define emu_lt_error(e, ...) \
    (fprintf(stderr, "emulator: cuBLASLt: " __VA_ARGS__), fputc('\n', stderr), (e))

// ---- Handles, descriptors, attributes ----

struct EmuLt {};

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) {
    *h = new EmuLt;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) {
    delete h;
    return CUBLAS_STATUS_SUCCESS;
}

inline size_t cublasLtGetVersion(void) { return emu_number("EMU_LT_VERSION", 130100); }

// Calls of cublasLtMatmul so far.
inline uint64_t emu_lt_calls = 0;

inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t compute,
                                               cudaDataType_t scale) {
    *d = new EmuDesc{compute, scale, CUBLAS_OP_N, CUBLAS_OP_N, -1, CUBLASLT_EPILOGUE_DEFAULT, NULL,
                     NULL, 0};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
    delete d;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType_t type,
                                                 uint64_t rows, uint64_t cols, int64_t ld) {
    *l = new EmuLayout{(uint32_t)type, rows, cols, ld, 0, 1};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
    delete l;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) {
    *p = new EmuPreference{0};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    delete p;
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t emu_lt_set(void *field, size_t size, const void *value, size_t bytes) {
    if (!value || bytes != size)
        return emu_lt_error(CUBLAS_STATUS_INVALID_VALUE, "an attribute of %zu bytes set by %zu",
                            size, bytes);
    memcpy(field, value, size);
    return CUBLAS_STATUS_SUCCESS;
}

#define EMU_SET(name, field) case name: return emu_lt_set(&(field), sizeof(field), value, bytes)
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d,
                                                     cublasLtMatmulDescAttributes_t attribute,
                                                     const void *value, size_t bytes) {
    switch (attribute) {
    EMU_SET(CUBLASLT_MATMUL_DESC_TRANSA, d->transa);
    EMU_SET(CUBLASLT_MATMUL_DESC_TRANSB, d->transb);
    EMU_SET(CUBLASLT_MATMUL_DESC_EPILOGUE, d->epilogue);
    EMU_SET(CUBLASLT_MATMUL_DESC_BIAS_POINTER, d->bias);
    EMU_SET(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, d->aux);
    EMU_SET(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, d->aux_ld);
    EMU_SET(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, d->bias_type);
    }
    return emu_lt_error(CUBLAS_STATUS_INVALID_VALUE, "attribute %d of a matmul", attribute);
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
        cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t attribute,
        const void *value, size_t bytes) {
    switch (attribute) {
    EMU_SET(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, p->workspace);
    }
    return emu_lt_error(CUBLAS_STATUS_INVALID_VALUE, "attribute %d of a preference", attribute);
}
inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l,
                                                       cublasLtMatrixLayoutAttribute_t attribute,
                                                       const void *value, size_t bytes) {
    switch (attribute) {
    EMU_SET(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, l->count);
    EMU_SET(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, l->stride);
    }
    return emu_lt_error(CUBLAS_STATUS_INVALID_VALUE, "attribute %d of a layout", attribute);
}
#undef EMU_SET

// ---- What is supported ----

inline size_t emu_lt_size(uint32_t type) { return type == CUDA_R_32F ? 4 : 2; }
inline bool emu_lt_bias(uint32_t e) {
    return e == CUBLASLT_EPILOGUE_BIAS || e == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
}
inline bool emu_lt_aux(uint32_t e) {
    return e == CUBLASLT_EPILOGUE_GELU_AUX_BIAS || e == CUBLASLT_EPILOGUE_DGELU;
}

// Checks what cublasLtMatmulAlgoGetHeuristic() can see: types, layouts, operations, the epilogue.
inline cublasStatus_t emu_lt_check(const EmuDesc *d, const EmuLayout *a, const EmuLayout *b,
                                   const EmuLayout *c, const EmuLayout *y) {
    const cublasStatus_t invalid = CUBLAS_STATUS_INVALID_VALUE,
        unsupported = CUBLAS_STATUS_NOT_SUPPORTED;
    if (!d || !a || !b || !c || !y) return emu_lt_error(invalid, "a descriptor is NULL");
    for (const EmuLayout *l : {a, b, c, y}) {
        if (l->type != CUDA_R_32F && l->type != CUDA_R_16BF)
            return emu_lt_error(unsupported, "matrices of type %u", l->type);
        if (!l->rows || !l->cols || l->ld < (int64_t)l->rows)
            return emu_lt_error(invalid, "a matrix (%ld,%ld) of leading dimension %ld",
                                (long)l->rows, (long)l->cols, (long)l->ld);
        if (l->count != y->count || l->count < 1)
            return emu_lt_error(invalid, "%d matrices beside %d of D", l->count, y->count);
        // matrices may follow each other or be the same one, which D's may not
        if (l->count > 1 && l->stride < (l == y ? (int64_t)(l->cols - 1) * l->ld + (int64_t)l->rows
                                                : 0))
            return emu_lt_error(invalid, "%d matrices %ld apart", l->count, (long)l->stride);
    }
    if (y->count > 1 && d->epilogue != CUBLASLT_EPILOGUE_DEFAULT)
        return emu_lt_error(unsupported, "epilogue %u of %d matrices", d->epilogue, y->count);
    const uint64_t m = d->transa ? a->cols : a->rows, k = d->transa ? a->rows : a->cols;
    const uint64_t n = d->transb ? b->rows : b->cols, k_of_b = d->transb ? b->cols : b->rows;
    if (k != k_of_b || m != y->rows || n != y->cols || c->rows != y->rows || c->cols != y->cols)
        return emu_lt_error(invalid, "(%ld,%ld) times (%ld,%ld) to (%ld,%ld), C (%ld,%ld)", (long)m,
                            (long)k, (long)k_of_b, (long)n, (long)y->rows, (long)y->cols,
                            (long)c->rows, (long)c->cols);
    const bool fp32 = a->type == CUDA_R_32F;
    const bool tf32 = d->compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    if (d->scale != CUDA_R_32F || (d->compute != CUBLAS_COMPUTE_32F && !(tf32 && fp32)) ||
        a->type != b->type ||
        c->type != y->type || (fp32 && y->type != CUDA_R_32F))
        return emu_lt_error(unsupported, "types A %u B %u C %u D %u, scale %d, compute %d", a->type,
                            b->type, c->type, y->type, d->scale, d->compute);
    const uint32_t e = d->epilogue;
    const bool sums = e == CUBLASLT_EPILOGUE_BGRADA;
    if (e != CUBLASLT_EPILOGUE_DEFAULT && !emu_lt_bias(e) && !emu_lt_aux(e) && !sums)
        return emu_lt_error(unsupported, "epilogue %u", e);
    const uint64_t epilogues = emu_number("EMU_EPILOGUES", 2);
    if (e != CUBLASLT_EPILOGUE_DEFAULT && (epilogues == 0 || (epilogues == 1 && fp32)))
        return unsupported;
    // libcublasLt 13.1 has a message for each: "The Bias pointer
    // (CUBLASLT_MATMUL_DESC_BIAS_POINTER) is NOT allowed for {}."
    if ((d->bias || d->bias_type != -1) && !emu_lt_bias(e) && !sums)
        return emu_lt_error(invalid, "a bias is set, but epilogue %u takes none", e);
    if ((d->aux || d->aux_ld) && !emu_lt_aux(e))
        return emu_lt_error(invalid, "an auxiliary matrix is set, but epilogue %u takes none", e);
    // Examples of NVIDIA's nvmath-python: "cuBLAS requires transposed B for BGRADB"; so A is not
    // transposed for BGRADA.
    if (sums && d->transa) return emu_lt_error(unsupported, "BGRADA with A transposed");
    if ((emu_lt_bias(e) || sums) && d->bias_type != -1 && d->bias_type != (int32_t)y->type)
        return emu_lt_error(unsupported, "a bias of type %d for D of type %u", d->bias_type,
                            y->type);
    if (emu_lt_aux(e) && (d->aux_ld % 8 || d->aux_ld < (int64_t)y->rows))
        return emu_lt_error(invalid, "an auxiliary matrix of leading dimension %ld for %ld rows",
                            (long)d->aux_ld, (long)y->rows);
    return CUBLAS_STATUS_SUCCESS;
}

// marks the algorithms returned by the heuristic
enum { EMU_LT_ALGORITHM = 0x4c74 };

// Returns two algorithms, which compute the same.
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t h, cublasLtMatmulDesc_t d,
                                                     cublasLtMatrixLayout_t a,
                                                     cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t c,
                                                     cublasLtMatrixLayout_t y,
                                                     cublasLtMatmulPreference_t p, int asked,
                                                     cublasLtMatmulHeuristicResult_t *result,
                                                     int *found) {
    if (found) *found = 0;
    if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (!p || !result || !found || asked < 1)
        return emu_lt_error(CUBLAS_STATUS_INVALID_VALUE, "the array of algorithms is empty");
    const cublasStatus_t s = emu_lt_check(d, a, b, c, y);
    if (s != CUBLAS_STATUS_SUCCESS) return s;
    for (*found = 0; *found < asked && *found < 2; ++*found) {
        cublasLtMatmulHeuristicResult_t *r = &result[*found];
        memset(r, 0, sizeof *r);
        r->algo.data[0] = EMU_LT_ALGORITHM, r->algo.data[1] = (uint64_t)*found;
        r->workspaceSize = *found ? std::min<size_t>(p->workspace, 4096) : 0, r->wavesCount = 1;
    }
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t h, cublasLtMatmulDesc_t d,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t y,
                                              const cublasLtMatmulAlgo_t *algo,
                                              cublasLtMatmulHeuristicResult_t *result) {
    if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
    const cublasStatus_t s = emu_lt_check(d, a, b, c, y);
    if (s != CUBLAS_STATUS_SUCCESS) return s;
    if (!algo || !result || algo->data[0] != EMU_LT_ALGORITHM || algo->data[1] > 1)
        return CUBLAS_STATUS_INVALID_VALUE;
    memset(result, 0, sizeof *result);
    result->algo = *algo, result->workspaceSize = algo->data[1] ? 4096 : 0;
    return CUBLAS_STATUS_SUCCESS;
}

// ---- The matmul ----

inline float emu_lt_load(const void *at, uint32_t type, size_t i) {
    return type == CUDA_R_32F ? ((const float *)at)[i]
        : emu_bf16_value(((const __nv_bfloat16 *)at)[i].bits);
}
inline void emu_lt_store(void *at, uint32_t type, size_t i, float x) {
    if (type == CUDA_R_32F) ((float *)at)[i] = x;
    else ((__nv_bfloat16 *)at)[i].bits = emu_bf16_round(x);
}

// Rounds to tf32: 10 fraction bits, to nearest, ties away from zero (PTX ISA, cvt.rna.tf32.f32).
inline float emu_tf32(float x) {
    if (!isfinite(x)) return x;
    return emu_bits<float>((emu_bits<uint32_t>(x) + 0x1000) & ~0x1fffu);
}

// op(matrix) as fp32 (rows, k): rows of k elements, or with by_k (k, rows).
inline std::vector<float> emu_lt_operand(const void *at, const EmuLayout &l, bool transpose,
                                         bool tf32) {
    const size_t rows = l.rows, cols = l.cols, ld = (size_t)l.ld;
    std::vector<float> x(rows * cols);
    for (size_t j = 0; j < cols; j++)
        for (size_t i = 0; i < rows; i++) {
            const float v = emu_lt_load(at, l.type, j * ld + i);
            x[transpose ? i * cols + j : j * rows + i] = tf32 ? emu_tf32(v) : v;
        }
    return x;
}

inline float emu_gelu(float x) {
    return 0.5f * x * (1 + emu_tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}
inline float emu_gelu_slope(float x) {
    const float t = emu_tanh(0.7978845608028654f * (x + 0.044715f * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * 0.7978845608028654f *
        (1 + 3 * 0.044715f * x * x);
}

// sum (m) += columns `from` .. `end` - 1 of op(A) (k,m) times the corresponding elements of x,
// which are `step` apart. `group`: how many products a tensor core adds at once; 1: one by one.
inline void emu_lt_sum(std::vector<float> &sum, const float *a, const float *x, size_t step,
                       size_t from, size_t end, size_t group) {
    const size_t m = sum.size();
    float product[EMU_MMA_GROUP];
    for (size_t l = from; l < end; l += group) {
        const size_t n = std::min(group, end - l);
        for (size_t i = 0; group == 1 && i < m; i++) sum[i] += a[l * m + i] * x[l * step];
        for (size_t i = 0; group > 1 && i < m; i++) {
            for (size_t g = 0; g < n; g++) product[g] = a[(l + g) * m + i] * x[(l + g) * step];
            sum[i] = emu_mma_sum(sum[i], product, (int)n);
        }
    }
}

struct EmuProduct { EmuDesc d; EmuLayout la, lb, lc, ly; float alpha, beta; const void *a, *b, *c;
                    void *y; };

inline void emu_lt_run_one(const EmuProduct &p) {
    const EmuDesc &d = p.d;
    const bool tf32 = d.compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    const size_t m = p.ly.rows, n = p.ly.cols, k = d.transa ? p.la.rows : p.la.cols;
    // (k,m): columns of op(A)
    const std::vector<float> a = emu_lt_operand(p.a, p.la, d.transa, tf32);
    // (k,n): rows of op(B)
    const std::vector<float> b = emu_lt_operand(p.b, p.lb, !d.transb, tf32);
    const size_t parts = emu_number("EMU_ROWS", 0) ? 1 + n % 3 : 1, part = (k + parts - 1) / parts;
    const size_t group = !emu_errors() ? 1 : tf32 ? EMU_TF32_GROUP : p.la.type ==
        CUDA_R_16BF ? EMU_MMA_GROUP : 1;
    std::vector<float> sum(m), more(m);
    const uint32_t e = d.epilogue, type = p.ly.type;
    for (size_t j = 0; j < n; j++) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        emu_lt_sum(sum, a.data(), &b[j], n, 0, std::min(part, k), group);
        for (size_t from = part; from < k; from += part) {
            std::fill(more.begin(), more.end(), 0.0f);
            emu_lt_sum(more, a.data(), &b[j], n, from, std::min(from + part, k), group);
            for (size_t i = 0; i < m; i++) sum[i] += more[i];
        }
        for (size_t i = 0; i < m; i++) {
            float x = p.alpha * sum[i];
            if (p.beta != 0) x += p.beta * emu_lt_load(p.c, type, j * (size_t)p.lc.ld + i);
            if (emu_lt_bias(e)) x += emu_lt_load(d.bias, type, i);
            if (e == CUBLASLT_EPILOGUE_GELU_AUX_BIAS) {
                emu_lt_store(d.aux, type, j * (size_t)d.aux_ld + i, x);
                x = emu_gelu(x);
            }
            if (e == CUBLASLT_EPILOGUE_DGELU)
                x *= emu_gelu_slope(emu_lt_load(d.aux, type, j * (size_t)d.aux_ld + i));
            emu_lt_store(p.y, type, j * (size_t)p.ly.ld + i, x);
        }
    }
    for (size_t i = 0; e == CUBLASLT_EPILOGUE_BGRADA && i < m; i++) {
        float total = 0;
        for (size_t l = 0; l < k; l++) total += a[l * m + i];
        emu_lt_store(d.bias, type, i, total);
    }
}

// All matrices of a product, which differ in their places only.
inline void emu_lt_run(const EmuProduct &p) {
    EmuProduct one = p;
    for (int32_t i = 0; i < p.ly.count; i++) {
        const size_t n = (size_t)i;
        one.a = (const char *)p.a + n * (size_t)p.la.stride * emu_lt_size(p.la.type);
        one.b = (const char *)p.b + n * (size_t)p.lb.stride * emu_lt_size(p.lb.type);
        one.c = (const char *)p.c + n * (size_t)p.lc.stride * emu_lt_size(p.lc.type);
        one.y = (char *)p.y + n * (size_t)p.ly.stride * emu_lt_size(p.ly.type);
        emu_lt_run_one(one);
    }
}

// Algorithms are chosen for matrices aligned to 256 bytes, the default preference.
inline bool emu_lt_is_device(const char *what, const void *at, uint64_t cols, int64_t ld,
                             uint64_t rows, uint32_t type, uint64_t more) {
    const size_t bytes = ((cols - 1) * (size_t)ld + rows + more) * emu_lt_size(type);
    if (at && (uintptr_t)at % 256 == 0 && emu_is_device(at, bytes)) return true;
    emu_lt_error(CUBLAS_STATUS_INVALID_VALUE, "%s at %p is not %zu bytes of device memory, aligned",
                 what, at, bytes);
    return false;
}

// Each of a layout's matrices begins at a multiple of 256 bytes.
inline bool emu_lt_is_matrix(const char *what, const void *at, const EmuLayout *l) {
    const uint64_t more = (uint64_t)(l->count - 1) * (uint64_t)l->stride;
    if (l->count > 1 && (uint64_t)l->stride * emu_lt_size(l->type) % 256) {
        emu_lt_error(CUBLAS_STATUS_INVALID_VALUE, "%s's matrices are %ld elements apart", what,
                     (long)l->stride);
        return false;
    }
    return emu_lt_is_device(what, at, l->cols, l->ld, l->rows, l->type, more);
}

inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t h, cublasLtMatmulDesc_t d, const void *alpha,
                                     const void *a, cublasLtMatrixLayout_t la, const void *b,
                                     cublasLtMatrixLayout_t lb, const void *beta, const void *c,
                                     cublasLtMatrixLayout_t lc, void *y, cublasLtMatrixLayout_t ly,
                                     const cublasLtMatmulAlgo_t *algo, void *workspace,
                                     size_t workspace_bytes, cudaStream_t stream) {
    if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
    const cublasStatus_t s = emu_lt_check(d, la, lb, lc, ly), invalid = CUBLAS_STATUS_INVALID_VALUE;
    if (s != CUBLAS_STATUS_SUCCESS) return s;
    if (algo && algo->data[0] != EMU_LT_ALGORITHM)
        return emu_lt_error(invalid, "an algorithm that the heuristic did not give");
    if (algo && algo->data[1] &&
        (!workspace || !workspace_bytes || !emu_is_device(workspace, workspace_bytes)))
        return emu_lt_error(invalid, "this algorithm needs a workspace");
    if (algo && (emu_number("EMU_ALGORITHMS_FAIL", 0) >> algo->data[1] & 1))
        return CUBLAS_STATUS_EXECUTION_FAILED;
    const float beta_value = *(const float *)beta;
    const uint32_t e = d->epilogue;
    bool ok = emu_lt_is_matrix("A", a, la) && emu_lt_is_matrix("B", b, lb) &&
              emu_lt_is_matrix("D", y, ly);
    if (beta_value != 0) ok = ok && emu_lt_is_matrix("C", c, lc);
    if (c == y && lc->ld != ly->ld)
        return emu_lt_error(invalid, "C is D with another leading dimension");
    if (emu_lt_bias(e) || e == CUBLASLT_EPILOGUE_BGRADA)
        ok = ok && emu_lt_is_device("the bias", d->bias, 1, 0, ly->rows, ly->type, 0);
    if (emu_lt_aux(e))
        ok = ok && emu_lt_is_device("the auxiliary matrix", d->aux, ly->cols, d->aux_ld, ly->rows,
                                    ly->type, 0);
    if (!ok) return invalid;
    const EmuProduct p = {*d, *la, *lb, *lc, *ly, *(const float *)alpha, beta_value, a, b, c, y};
    const uint64_t cost = emu_number(e == CUBLASLT_EPILOGUE_DEFAULT ? "EMU_COST_PLAIN"
                                     : "EMU_COST_FUSED", 0) +
        emu_number(algo && algo->data[1] ? "EMU_COST_SECOND" : "EMU_COST_FIRST", 0);
    emu_lt_calls++;
    return emu_enqueue(stream, [p, cost] { emu_lt_run(p), emu_cost += 1e-6 * (double)cost; }) ==
        cudaSuccess ? CUBLAS_STATUS_SUCCESS
        : CUBLAS_STATUS_EXECUTION_FAILED;
}

#endif
