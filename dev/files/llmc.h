// llmc.h: llm.c's single-file GPT-2 checkpoints (write_model in its train_gpt2.py):
//
//     byte 0       256 words of 32 bits, little-endian: magic 20240326, version (3: fp32, 5: bf16),
//                  T, V, L, NH, C, Vp, zeros
//     byte 1024    the parameters in the order of GPT_PARAMS, each for all its layers; the
//                  branches' matrices are (out, in), the transpose of ours; wte has Vp rows: V,
//                  padded with zeros to a multiple of 128
#ifndef LLMC_H
#define LLMC_H

#include "../model/gpt.h"
#include "files.h"
#include "safetensors.h"
#include "shards.h"                                      // llm.c's header

enum { LLMC_MODEL_MAGIC = 20240326, LLMC_FP32 = 3, LLMC_BF16 = 5, LLMC_VOCAB_MULTIPLE = 128 };

typedef struct {
    GptConfig config;
    int Vp, dtype;              // rows of wte in the file; SAFETENSORS_F32 or SAFETENSORS_BF16
    const unsigned char *data;  // the parameters, within the parsed memory
    char error[160];
} LlmcModel;

// The sizes, with as many rows of wte as the file has.
static inline GptConfig llmc_padded(const GptConfig *c, int Vp) {
    GptConfig padded = *c;
    padded.V = Vp;
    return padded;
}

static inline int llmc_vocab(int V) {
    return (V + LLMC_VOCAB_MULTIPLE - 1) / LLMC_VOCAB_MULTIPLE * LLMC_VOCAB_MULTIPLE;
}

static inline int llmc_transposed(int param) {
    return gpt_param[param].dims == 2 && gpt_param[param].branch != NO_BRANCH;
}

// ---- Reading ----

static inline const char *PRINTF_LIKE(2, 3) llmc_fail(LlmcModel *m, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(m->error, sizeof m->error, format, args);
    va_end(args);
    return m->error;
}

// Parses a model of `size` bytes at mem, which must outlive *m. Returns NULL, or what is wrong (the
// message may be stored in *m).
static inline const char *llmc_model_parse(LlmcModel *m, const void *mem, size_t size) {
    const unsigned char *p = (const unsigned char *)mem;
    memset(m, 0, sizeof *m);
    if (lfs_pointer_error(mem, size)) return lfs_pointer_error(mem, size);
    if (size < 4 || llmc_word(p, 0) != LLMC_MODEL_MAGIC)
        return "not an llm.c model (wrong magic number)";
    if (size < LLMC_HEADER_BYTES) return "cut short: an llm.c model has a header of 1024 bytes";
    const uint32_t version = llmc_word(p, 1);
    if (version != LLMC_FP32 && version != LLMC_BF16)
        return llmc_fail(m, "an llm.c model of version %u: only 3 (fp32) and 5 (bf16) can be read",
                         version);
    int *to[6] = {&m->config.T, &m->config.V, &m->config.L, &m->config.NH, &m->config.C, &m->Vp};
    for (int i = 0; i < 6; i++) {
        const uint32_t word = llmc_word(p, (size_t)i + 2);
        if (word > 1 << 25)
            return llmc_fail(m, "damaged: word %d of its header, a size, is %u", i + 2, word);
        *to[i] = (int)word;
    }
    const char *error = gpt_config_error(&m->config);
    if (error) return error;
    if (m->Vp < m->config.V)
        return llmc_fail(m, "damaged: %d tokens, but %d rows with padding", m->config.V, m->Vp);
    m->dtype = version == LLMC_FP32 ? SAFETENSORS_F32 : SAFETENSORS_BF16;
    const GptConfig padded = llmc_padded(&m->config, m->Vp);
    const uint64_t want = LLMC_HEADER_BYTES + (uint64_t)gpt_params_count(&padded) *
        safetensors_dtype[m->dtype].size;
    if (size != want)
        return llmc_fail(m, "%s: it has %zu bytes, a model of its sizes %llu",
                         size < want ? "cut short" : "damaged", size, (unsigned long long)want);
    m->data = p + LLMC_HEADER_BYTES;
    return NULL;
}

// out (cols,rows) = in (rows,cols) transposed, in tiles that fit in a cache.
static inline void llmc_transpose(real *out, const real *in, size_t rows, size_t cols) {
    enum { BLOCK = 32 };
    for (size_t r0 = 0; r0 < rows; r0 += BLOCK)
        for (size_t c0 = 0; c0 < cols; c0 += BLOCK)
            for (size_t r = r0; r < rows && r < r0 + BLOCK; r++)
                for (size_t c = c0; c < cols && c < c0 + BLOCK; c++)
                    out[c * rows + r] = in[r * cols + c];
}

// Reads one layer of a parameter: gpt_param_size() elements in our layout.
static inline void llmc_model_read(const LlmcModel *m, int param, int layer, real *host) {
    const GptConfig padded = llmc_padded(&m->config, m->Vp);
    SafetensorsEntry e;
    memset(&e, 0, sizeof e);
    size_t at = (size_t)layer * gpt_param_size(&padded, param);
    for (int p = 0; p < param; p++)
        at += gpt_param_size(&padded, p) * (size_t)gpt_param_layers(&padded, p);
    e.dtype = m->dtype;
    // of wte without the padding rows, which come last
    e.count = gpt_param_size(&m->config, param);
    e.bytes = e.count * safetensors_dtype[m->dtype].size;
    e.data = m->data + at * safetensors_dtype[m->dtype].size;
    real *to = llmc_transposed(param) ? (real *)xcalloc(e.count, sizeof *to) : host;
    const char *error = safetensors_to_real(&e, to);
    CHECK(!error, "%s", error);
    if (to == host) return;
    llmc_transpose(host, to, (size_t)gpt_param_cols(&m->config, param),
                   (size_t)gpt_param_rows(&m->config, param));
    free(to);
}

// ---- Writing ----

static inline void llmc_model_header(unsigned char header[LLMC_HEADER_BYTES], const GptConfig *c,
                                     int dtype) {
    const uint32_t words[8] = {LLMC_MODEL_MAGIC,
                               (uint32_t)(dtype == SAFETENSORS_F32 ? LLMC_FP32 : LLMC_BF16),
                               (uint32_t)c->T,
                               (uint32_t)c->V, (uint32_t)c->L, (uint32_t)c->NH, (uint32_t)c->C,
                               (uint32_t)llmc_vocab(c->V)};
    llmc_header(header, words, 8);
}

#endif
