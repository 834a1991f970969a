// gpt.h: the GPT: its sizes, presets, the table of its parameters, and the cost of its parts.
//
// Symbols used everywhere: B rows of a micro-batch, T tokens of a row, C channels, L layers, NH
// heads, HS = C/NH, V vocabulary. The architecture is GPT-2's (Radford et al. 2019): learned
// positions, LayerNorm before each branch with eps 1e-5, biases, tanh-GELU, an MLP of 4C, the head
// tied to the token embedding.
#ifndef GPT_H
#define GPT_H

#include "../check.h"
#include <math.h>

// {V, T, L, NH, C} without the rest is a model without adapters.
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
typedef struct {
    int V, T, L, NH, C;     // T: the longest row, GPT-2's n_positions
    int lora;               // rank of the adapters (lora.h); 0: none
    unsigned lora_targets;  // bit t: whether a layer's t-th matmul has one
    int lora_norms;         // 1: the LayerNorms are trained with the adapters
} GptConfig;

enum { ATTN, MLP, BRANCHES, NO_BRANCH = BRANCHES };      // branch b of layer l is number 2*l + b

// ---- Presets ----

typedef struct { const char *name; GptConfig config; } GptPreset;

static const GptPreset gpt_presets[] = {
    //                V      T    L  NH     C      parameters
    {"tiny",       {  257,   64,  4,  4,  128}},   // 0.8 M, for bytes: minutes on a CPU
    {"small",      {50257,  256,  6,  6,  384}},   //  30 M
    {"gpt2",       {50257, 1024, 12, 12,  768}},   // 124 M
    {"gpt2-medium",{50257, 1024, 24, 16, 1024}},   // 355 M
    {"gpt2-large", {50257, 1024, 36, 20, 1280}},   // 774 M
    {"gpt2-xl",    {50257, 1024, 48, 25, 1600}},   // 1.6 B
};
enum { N_PRESETS = sizeof gpt_presets / sizeof gpt_presets[0] };

// The preset of that name, or NULL.
static inline const GptPreset *gpt_preset(const char *name) {
    for (int i = 0; i < N_PRESETS; i++)
        if (!strcmp(gpt_presets[i].name, name)) return &gpt_presets[i];
    return NULL;
}

// NULL, or why no such model can be built. The bounds keep every size below 2^63 and every index an
// int.
static inline const char *gpt_config_error(const GptConfig *c) {
    if (c->V < 2 || c->V > (1 << 24)) return "the vocabulary must have 2 to 16777216 tokens";
    if (c->T < 1 || c->T > (1 << 20)) return "the sequence length must be 1 to 1048576";
    if (c->L < 1 || c->L > 1024) return "there must be 1 to 1024 layers";
    if (c->C < 1 || c->C > (1 << 16)) return "there must be 1 to 65536 channels";
    if (c->lora < 0 || c->lora > 1024) return "the rank of adapters must be 0 to 1024";
    if (c->NH < 1 || c->C % c->NH) return "the channels must be a multiple of the heads";
    return NULL;
}

// ---- Parameters ----

// 0, 1, N(0, 0.02), N(0, 0.02/sqrt(2L)): GPT-2's. And uniform in +-1/sqrt(cols): peft's for A
// (Kaiming's with a = sqrt 5).
enum { INIT_ZERO, INIT_ONE, INIT_NORMAL, INIT_RESIDUAL, INIT_ADAPTER };

// Which parameters are trained: with adapters only GROUP_ADAPTER, with lora_norms also GROUP_NORM;
// without adapters there is no GROUP_ADAPTER, and all are trained.
enum { GROUP_BASE, GROUP_NORM, GROUP_ADAPTER };

// Matrices (dims 2) are (in, out), as in Hugging Face's GPT-2, and only they have weight decay;
// vectors have dims 1. Adapters are A (r, in) and B (out, r), as in peft's files.
//    id         checkpoint name               branch   dims rows   cols   INIT_     GROUP_
#define GPT_PARAMS(X)                                                                          \
    X(wte,      "wte.weight",                NO_BRANCH, 2, c->V,    c->C,   NORMAL,   BASE)    \
    X(wpe,      "wpe.weight",                NO_BRANCH, 2, c->T,    c->C,   NORMAL,   BASE)    \
    X(ln1w,     "h.%d.ln_1.weight",               ATTN, 1, 1,       c->C,   ONE,      NORM)    \
    X(ln1b,     "h.%d.ln_1.bias",                 ATTN, 1, 1,       c->C,   ZERO,     NORM)    \
    X(qkvw,     "h.%d.attn.c_attn.weight",        ATTN, 2, c->C,    3*c->C, NORMAL,   BASE)    \
    X(qkvb,     "h.%d.attn.c_attn.bias",          ATTN, 1, 1,       3*c->C, ZERO,     BASE)    \
    X(attprojw, "h.%d.attn.c_proj.weight",        ATTN, 2, c->C,    c->C,   RESIDUAL, BASE)    \
    X(attprojb, "h.%d.attn.c_proj.bias",          ATTN, 1, 1,       c->C,   ZERO,     BASE)    \
    X(ln2w,     "h.%d.ln_2.weight",               MLP,  1, 1,       c->C,   ONE,      NORM)    \
    X(ln2b,     "h.%d.ln_2.bias",                 MLP,  1, 1,       c->C,   ZERO,     NORM)    \
    X(fcw,      "h.%d.mlp.c_fc.weight",           MLP,  2, c->C,    4*c->C, NORMAL,   BASE)    \
    X(fcb,      "h.%d.mlp.c_fc.bias",             MLP,  1, 1,       4*c->C, ZERO,     BASE)    \
    X(fcprojw,  "h.%d.mlp.c_proj.weight",         MLP,  2, 4*c->C,  c->C,   RESIDUAL, BASE)    \
    X(fcprojb,  "h.%d.mlp.c_proj.bias",           MLP,  1, 1,       c->C,   ZERO,     BASE)    \
    X(lnfw,     "ln_f.weight",               NO_BRANCH, 1, 1,       c->C,   ONE,      NORM)    \
    X(lnfb,     "ln_f.bias",                 NO_BRANCH, 1, 1,       c->C,   ZERO,     NORM)    \
    X(qkvA,     "h.%d.attn.c_attn.lora_A.weight", ATTN, 2, c->lora, c->C,   ADAPTER,  ADAPTER) \
    X(qkvB,     "h.%d.attn.c_attn.lora_B.weight", ATTN, 2, 3*c->C,  c->lora,ZERO,     ADAPTER) \
    X(attprojA, "h.%d.attn.c_proj.lora_A.weight", ATTN, 2, c->lora, c->C,   ADAPTER,  ADAPTER) \
    X(attprojB, "h.%d.attn.c_proj.lora_B.weight", ATTN, 2, c->C,    c->lora,ZERO,     ADAPTER) \
    X(fcA,      "h.%d.mlp.c_fc.lora_A.weight",    MLP,  2, c->lora, c->C,   ADAPTER,  ADAPTER) \
    X(fcB,      "h.%d.mlp.c_fc.lora_B.weight",    MLP,  2, 4*c->C,  c->lora,ZERO,     ADAPTER) \
    X(fcprojA,  "h.%d.mlp.c_proj.lora_A.weight",  MLP,  2, c->lora, 4*c->C, ADAPTER,  ADAPTER) \
    X(fcprojB,  "h.%d.mlp.c_proj.lora_B.weight",  MLP,  2, c->C,    c->lora,ZERO,     ADAPTER)

#define X(id, name, branch, dims, rows, cols, init, group) P_##id,
enum { GPT_PARAMS(X) N_PARAMS };
#undef X

// One pointer per parameter: the weights, or the gradients, of one layer.
typedef struct {
#define X(id, name, branch, dims, rows, cols, init, group) real *id;
    GPT_PARAMS(X)
#undef X
} Params;

typedef struct { const char *id, *name; int branch, dims, init, group; } ParamSpec;

static const ParamSpec gpt_param[N_PARAMS] = {
#define X(id, name, branch, dims, rows, cols, init, group) \
    {#id, name, branch, dims, INIT_##init, GROUP_##group},
    GPT_PARAMS(X)
#undef X
};

static inline int gpt_param_rows(const GptConfig *c, int param) {
#define X(id, name, branch, dims, rows, cols, init, group) (rows),
    const int all[N_PARAMS] = {GPT_PARAMS(X)};
#undef X
    return all[param];
}

static inline int gpt_param_cols(const GptConfig *c, int param) {
#define X(id, name, branch, dims, rows, cols, init, group) (cols),
    const int all[N_PARAMS] = {GPT_PARAMS(X)};
#undef X
    return all[param];
}

// Elements of the parameter in one layer (in total, if it belongs to no layer).
static inline size_t gpt_param_size(const GptConfig *c, int param) {
    return (size_t)gpt_param_rows(c, param) * (size_t)gpt_param_cols(c, param);
}

// Its shape in a checkpoint, (rows, cols) or (cols); returns the number of dimensions.
static inline int gpt_param_shape(const GptConfig *c, int param, int64_t shape[2]) {
    const int matrix = gpt_param[param].dims == 2;
    shape[0] = matrix ? gpt_param_rows(c, param) : gpt_param_cols(c, param);
    shape[1] = gpt_param_cols(c, param);
    return matrix ? 2 : 1;
}

// ---- Adapters (LoRA, Hu et al. 2021) for matmuls 0 .. 3 of a layer: qkv, attproj, fc, fcproj ----

enum { LORA_TARGETS = 4 };

// The weight of matmul t; gpt_adapter: its A, which is followed by its B.
static inline int gpt_matmul(int t) {
    static const int weight[LORA_TARGETS] = {P_qkvw, P_attprojw, P_fcw, P_fcprojw};
    return weight[t];
}

// The number of the matmul with that weight, or -1.
static inline int gpt_matmul_of(int param) {
    for (int t = 0; t < LORA_TARGETS; t++)
        if (gpt_matmul(t) == param) return t;
    return -1;
}

static inline int gpt_adapter(int t) { return P_qkvA + 2 * t; }

// The A of the weight `param`, or -1: it has no adapter.
static inline int gpt_adapter_of(const GptConfig *c, int param) {
    const int t = gpt_matmul_of(param);
    return t >= 0 && c->lora && c->lora_targets >> t & 1 ? gpt_adapter(t) : -1;
}

// The number of layers that have it: L, or 1 (then its layer is 0), or 0.
static inline int gpt_param_layers(const GptConfig *c, int param) {
    if (gpt_param[param].group == GROUP_ADAPTER &&
        !(c->lora && c->lora_targets >> (param - P_qkvA) / 2 & 1))
        return 0;
    return gpt_param[param].branch == NO_BRANCH ? 1 : c->L;
}

// The name in a checkpoint, "h.3.ln_1.weight"; from malloc.
static inline char *gpt_param_name(int param, int layer) {
    const char *name = gpt_param[param].name, *mark = strstr(name, "%d");
    if (!mark) return xstrdup(name);
    return xprintf("%.*s%d%s", (int)(mark - name), name, layer, mark + 2);
}

// Whether it belongs to a branch's last projection: a factor of the branch can be folded into
// these.
static inline int gpt_param_ends_branch(int param) {
    return param == P_attprojw || param == P_attprojb || param == P_fcprojw || param == P_fcprojb;
}

// Whether training updates the group's parameters, in layers that are not frozen.
static inline int gpt_group_trains(const GptConfig *c, int group) {
    return !c->lora || group == GROUP_ADAPTER || (group == GROUP_NORM && c->lora_norms);
}

// Whether training updates it if the first `frozen` layers are frozen. Backward stops above them,
// so wpe, which is only below, is frozen too; wte is trained as the head. 0: all layers are
// trained, with adapters only those.
static inline int gpt_param_trains(const GptConfig *c, int param, int layer, int frozen) {
    if (!gpt_group_trains(c, gpt_param[param].group)) return 0;
    return gpt_param[param].branch == NO_BRANCH ? param != P_wpe || !frozen : layer >= frozen;
}

// The index of a branch: 2 * layer + branch, and last that of everything outside branches.
static inline size_t gpt_branch_index(const GptConfig *c, int layer, int branch) {
    return (size_t)(branch == NO_BRANCH ? BRANCHES * c->L : BRANCHES * layer + branch);
}

// n elements of one layer's part of a parameter, starting at element `at`.
typedef struct { int param, layer; size_t at, n; } GptPiece;

// All trained tensors in pieces of at most `most` elements: the optimizer's unit of work. From
// malloc; returns the number.
static inline int gpt_trained_pieces(GptPiece **pieces, const GptConfig *c, int frozen,
                                     size_t most) {
    int count = 0, capacity = 0;
    *pieces = NULL;
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            if (!gpt_param_trains(c, p, l, frozen)) continue;
            for (size_t at = 0, size = gpt_param_size(c, p); at < size; at += most) {
                const GptPiece piece = {p, l, at, size - at < most ? size - at : most};
                if (count == capacity) {
                    capacity = 2 * capacity + 64;
                    *pieces = (GptPiece *)xrealloc(*pieces, (size_t)capacity, sizeof **pieces);
                }
                (*pieces)[count++] = piece;
            }
        }
    return count;
}

static inline size_t gpt_params_trained(const GptConfig *c, int frozen) {
    size_t n = 0;
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(c, p); l++)
            n += gpt_param_trains(c, p, l, frozen) ? gpt_param_size(c, p) : 0;
    return n;
}

static inline size_t gpt_params_count(const GptConfig *c) {
    size_t n = 0;
    for (int p = 0; p < N_PARAMS; p++) n += gpt_param_size(c, p) * (size_t)gpt_param_layers(c, p);
    return n;
}

// ---- Cost ----
// Floating point operations of matmuls only (a multiply-add is 2), in a forward pass over one row
// of T tokens; a training step does 3 times as many (backward: d_input and d_weight) if all
// parameters are trained. Causal attention counts the necessary T(T+1)/2 pairs; a kernel's
// recomputation, LayerNorm, GELU and the optimizer are not counted.

static inline double gpt_branch_flops(const GptConfig *c, int branch, int T) {
    double t = T, C = c->C;
    if (branch == MLP) return 2 * t * (C * 4 * C + 4 * C * C);
    return 2 * t * (C * 3 * C + C * C) + 2 * 2 * C * (t * (t + 1) / 2);
}

static inline double gpt_head_flops(const GptConfig *c, int T) { return 2.0 * T * c->C * c->V; }

static inline double gpt_adapter_flops(const GptConfig *c, int branch, int T) {
    double numbers = 0;
    for (int p = P_qkvA; p < N_PARAMS; p++)
        if (gpt_param[p].branch == branch && gpt_param_layers(c, p))
            numbers += (double)gpt_param_size(c, p);
    return 2 * T * numbers;
}

// The work of a training step for a kept branch of layer l = 0, 1, ...: three times the forward
// pass, for a frozen layer once. A weight with an adapter, or next to one, has no gradient of its
// own, so its matmul counts twice; adapters recompute x A^T in the backward pass.
static inline double gpt_branch_step_flops(const GptConfig *c, int branch, int T, int l,
                                           int frozen) {
    const double C = c->C, products = 2.0 * T * (branch == MLP ? 8 : 4) * C * C,
        forward = gpt_branch_flops(c, branch, T);
    double again = 0;
    if (l < frozen) return forward;
    if (!c->lora) return 3 * forward;
    for (int p = P_qkvA; p < N_PARAMS; p += 2)           // only the A's
        if (gpt_param[p].branch == branch && gpt_param_layers(c, p))
            again += 2.0 * T * (double)gpt_param_size(c, p);
    return 3 * forward - products + 3 * gpt_adapter_flops(c, branch, T) + again;
}

static inline double gpt_head_step_flops(const GptConfig *c, int T) {
    return (c->lora ? 2 : 3) * gpt_head_flops(c, T);
}

static inline double gpt_row_flops(const GptConfig *c, int T) {
    return c->L * (gpt_branch_flops(c, ATTN, T) + gpt_branch_flops(c, MLP, T)) +
        gpt_head_flops(c, T);
}

#endif
