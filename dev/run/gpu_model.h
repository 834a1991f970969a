// gpu_model.h: predicts the time of a training step on a GPU by arithmetic, for --dry-run --device.
// It needs no GPU and measures nothing. Each kernel takes as long as its multiply-adds or its
// memory traffic, whichever is longer. All assumptions are in the tables below, each with its
// source or marked (est). It models train_gpt.cu in bf16, on GPUs of one machine.
#ifndef GPU_MODEL_H
#define GPU_MODEL_H

#include "../model/drop_path.h"
#include "../model/engine.h"
#include "growth.h"
#include "metrics.h"
#include "weights.h"

// ---- Assumptions: the devices ----

typedef struct {
    const char *name;
    double peak;      // FLOP/s of dense bf16 matmuls with fp32 accumulation, from the data sheet
    double matmul;    // FLOP/s of an 8192 x 8192 x 8192 matmul
    double mma;       // FLOP/s of mma.sync, the instruction used by our attention
    double ints;      // integer instructions/s
    double copy;      // bytes/s, read plus written, of a large copy
    double memory;    // bytes
    double link;      // bytes/s: NCCL's bus bandwidth of an all-reduce on one machine
    double hop;       // s: latency of one step of its ring
} GpuSpec;

// peak, memory: NVIDIA's data sheets (H100 SXM5, A100 SXM4 80 GB, Ada whitepaper).
// ints:    64 a clock and multiprocessor, from the same
// h100:    matmul and copy were measured; mma is 62% of peak, link NVLink 4 without NVLS (est)
// a100:    matmul is 85% of peak, copy 86% of 2.04 TB/s, link NVLink 3 (est)
// rtx4090: matmul is 91% of peak, copy 91% of 1.01 TB/s; without peer access the ring goes through
//          PCIe 4 and the host (est)
static const GpuSpec gpu_specs[] = {
    //           peak     matmul   mma      ints     copy     memory link    hop
    {"h100",    989e12,  798e12,  613e12,  14.8e12, 3.00e12, 80e9,  360e9,  4e-6},
    {"a100",    312e12,  265e12,  312e12,  9.7e12,  1.75e12, 80e9,  230e9,  4e-6},
    {"rtx4090", 165e12,  150e12,  165e12,  20.6e12, 0.92e12, 24e9,  10e9,   20e-6},
};
enum { N_GPU_SPECS = sizeof gpu_specs / sizeof gpu_specs[0] };

// ---- Assumptions: the kernels ----

#define GPU_MATMUL_HALF    220.0    // a matmul whose smaller dimension of N and K is d reaches
                                     // d/(d+220) of `matmul` (est: 620 of 798 TFLOP/s at d = 768)
#define GPU_ATTENTION       0.375    // of `mma`, forward (est, from the instructions of its loop)
#define GPU_ATTENTION_BACK  0.277    // the same, backward, whose 5 matmuls are 2.5 times the FLOPs
#define GPU_STREAM          0.93     // of `copy`: kernels that stream through memory once (est)
#define GPU_NOISE           13.0     // instructions to draw an element's noise: ten rounds of six
                                     // for eight elements, and five for each (est)
#define GPU_SUM_PARTS       6e-6     // s: one reduction of partial column sums, 6 per layer (est)
#define GPU_LAUNCH          1e-6     // s: the gap between two kernels (est)
#define GPU_HOST            0.7e-3   // s per step: two host synchronizations, and the host's own
                                     // work (est)

// Bytes per element of the array that a kernel streams through (train_gpt.cu). The residual stream
// is fp32, the rest bf16.
enum {
    // of (rows,T,C): x read and written, out, ln, xhat; the same backward
    GPU_NORM_BYTES = 14,
    GPU_NORM_AGAIN_BYTES = 4,    // of (rows,T,C)
    GPU_GELU_AGAIN_BYTES = 4,    // of (rows,T,4C)
    GPU_BIAS_BYTES = 2,          // of (rows,T,4C), or (rows,T,5C): output gradients of matmuls
    GPU_INNER_BYTES = 4,         // of (rows,T,C): y and dy
    GPU_LOSS_BYTES = 4,          // of (B,T,Vp): reads logits and overwrites them with gradients
    GPU_EMBEDDING_BYTES = 8,     // of (B,T,C), each way
    GPU_DROPOUT_BYTES = 4,       // of what is dropped, in bf16; twice that of the stream
    // of the scores of whole rows: read by the softmax, which writes probabilities; backward,
    // scores and their gradients; a blur's one way. Of (rows,T,C): heads to matrices and back
    GPU_ROWS_BYTES = 6, GPU_ROWS_BACK_BYTES = 12, GPU_BLUR_BYTES = 8,
    GPU_HEADS_BYTES = 18, GPU_HEADS_BACK_BYTES = 42,
    GPU_ALIGN_BYTES = 4,         // of the scores of the student, and of the teacher
    GPU_SOFT_BYTES = 2,          // of (B,T,Vp): a teacher's logits
    GPU_TWINS_BYTES = 10,        // of (B,T,Vp): both logits, the divergence's gradient, their sum
    GPU_ADAM_BYTES = 30,         // per parameter: weight, gradient, moments; the bf16 copy
    GPU_GRAD_NORM_BYTES = 4,     // per parameter
};

// Launches per branch, forward and backward.
static const int gpu_launches[BRANCHES][2] = {{4, 14}, {3, 12}};

// ---- A step ----

#define GPU_PARTS(X)                                   \
    X(matmuls,       "matmuls, layers")                \
    X(head,          "matmuls, head")                  \
    X(attention,     "attention")                      \
    X(rows,          "rows of scores")                 \
    X(dropout,       "dropout")                        \
    X(norms,         "norms")                          \
    X(biases,        "bias gradients")                 \
    X(recompute,     "recomputed")                     \
    X(loss,          "softmax, loss")                  \
    X(teacher,       "teacher")                        \
    X(embedding,     "embedding")                      \
    X(update,        "update")                         \
    X(launches,      "launches")                       \
    X(communication, "communication")

#define X(id, name) GPU_PART_##id,
enum { GPU_PARTS(X) N_GPU_PARTS };
#undef X

#define X(id, name) name,
static const char *const gpu_part_names[] = {GPU_PARTS(X)};
#undef X

typedef struct { double part[N_GPU_PARTS]; } GpuTime;   // seconds

// The workload: args.B rows of args.T tokens, `micros` times a step, on each of `ranks` GPUs.
typedef struct GpuRun GpuRun;
struct GpuRun {
    GptConfig c;
    EngineArgs args;
    int micros, ranks, by_rows;
    const double *kept;   // (2L) the fraction of the rows that run a branch; NULL: all
    const double *spent;  // (2L) the probability that all micro-batches of a step drop it; NULL: 0
    double exits;         // how many early exits a step has on average
    Noise noise;          // of a training pass
    const unsigned char *compared;       // (L) with args.align: which layers; NULL: all
    const GpuRun *teacher;               // what each micro-batch is shown to first; NULL: nothing
    int distills;         // whether the teacher's logits are needed
};

// For one step of one GPU. overlapped: communication hidden behind the backward pass.
typedef struct { GpuTime time; double seconds, flops, mfu, sent_bytes, overlapped; } GpuStep;

static inline double gpu_total(const GpuTime *t) {
    double sum = 0;
    for (int i = 0; i < N_GPU_PARTS; i++) sum += t->part[i];
    return sum;
}

static inline void gpu_add(GpuTime *sum, const GpuTime *t, double times) {
    for (int i = 0; i < N_GPU_PARTS; i++) sum->part[i] += times * t->part[i];
}

// The residual stream's.
static inline double gpu_elements(const GpuRun *r) {
    return (double)r->args.B * r->args.T * r->c.C;
}

// (M,K) times (K,N), in bf16.
static inline double gpu_matmul(const GpuSpec *g, double M, double N, double K) {
    const double d = fmin(N, K), rate = g->matmul * d / (d + GPU_MATMUL_HALF);
    return fmax(2 * M * N * K / rate, 2 * (M * K + K * N + M * N) / g->copy);
}

static inline double gpu_stream(const GpuSpec *g, double elements, int bytes) {
    return elements * bytes / (GPU_STREAM * g->copy);
}

// The matmuls of a branch on all its rows: forward, dX or dW, which cost the same.
static inline double gpu_branch_matmuls(const GpuSpec *g, const GpuRun *r, int branch) {
    const double BT = (double)r->args.B * r->args.T, C = r->c.C;
    if (branch == MLP) return gpu_matmul(g, BT, 4 * C, C) + gpu_matmul(g, BT, C, 4 * C);
    return gpu_matmul(g, BT, 3 * C, C) + gpu_matmul(g, BT, C, C);
}

// Those of its adapters: forward; backward takes three times as long.
static inline double gpu_adapter_matmuls(const GpuSpec *g, const GpuRun *r, int branch) {
    double t = 0;
    for (int p = P_qkvA; p < N_PARAMS; p++)
        if (gpt_param[p].branch == branch && gpt_param_layers(&r->c, p))
            t += gpu_matmul(g, (double)r->args.B * r->args.T, gpt_param_rows(&r->c, p),
                             gpt_param_cols(&r->c, p));
    return t;
}

// ---- Attention ----

// Causal attention, forward.
static inline double gpu_attention_flops(const GpuRun *r) {
    return (double)r->args.B * 2 * 2 * r->c.C * ((double)r->args.T * (r->args.T + 1) / 2);
}

// Whether whole rows of layer l's scores are held (dev/cuda/attention_rows.h): forward, where
// scores are edited; backward, also where probabilities are compared.
static inline int gpu_edits(const GpuRun *r, int l) {
    return r->noise.scores != SCORES_PLAIN && (!r->noise.layers || r->noise.layers[l]);
}
static inline int gpu_compares(const GpuRun *r, int l) {
    return r->args.align && (!r->compared || r->compared[l]);
}

enum { GPU_ROWS_SCORES = 1 << 24, GPU_ROWS_UNIT = 16, GPU_ROWS_QUERIES = 256 };

static inline double gpu_padded(double n, double unit) { return ceil(n / unit) * unit; }

// The queries of a block of at most so many scores, for T tokens in NH heads.
static inline double gpu_rows_queries(double T, double NH, double most) {
    const double Tp = gpu_padded(T, GPU_ROWS_UNIT), unit = GPU_ROWS_UNIT,
        fit = floor(most / (NH * Tp) / unit) * unit;
    return fmin(fmin(fmax(fit, unit), GPU_ROWS_QUERIES), Tp);
}

// The scores that blocks compute for all rows of the batch.
static inline double gpu_rows_scores(const GpuRun *r) {
    const double T = gpu_padded(r->args.T, GPU_ROWS_UNIT), NH = r->c.NH;
    return r->args.B * NH * T * (T + gpu_rows_queries(T, NH, GPU_ROWS_SCORES)) / 2;
}

// One of their products, which writes or reads so many bytes a score.
static inline double gpu_rows_product(const GpuSpec *g, const GpuRun *r, int bytes) {
    const double W = gpu_padded(r->c.C / r->c.NH, GPU_ROWS_UNIT), S = gpu_rows_scores(r);
    return fmax(2 * S * W / (g->matmul * W / (W + GPU_MATMUL_HALF)), S * bytes / g->copy);
}

static inline double gpu_rows_forward(const GpuSpec *g, const GpuRun *r) {
    const int blurs = r->noise.scores == SCORES_BLUR;
    return gpu_rows_product(g, r, 4) + gpu_rows_product(g, r, 2) +
        gpu_stream(g, gpu_rows_scores(r), GPU_ROWS_BYTES + blurs * GPU_BLUR_BYTES) +
        gpu_stream(g, gpu_elements(r), GPU_HEADS_BYTES);
}

static inline double gpu_rows_backward(const GpuSpec *g, const GpuRun *r, int l) {
    const int blurs = gpu_edits(r, l) && r->noise.scores == SCORES_BLUR;
    double t = 2 * gpu_rows_product(g, r, 4) + 3 * gpu_rows_product(g, r, 2) +
        gpu_stream(g, gpu_rows_scores(r), GPU_ROWS_BACK_BYTES + 2 * blurs * GPU_BLUR_BYTES) +
        gpu_stream(g, gpu_elements(r), GPU_HEADS_BACK_BYTES);
    if (gpu_compares(r, l) && r->teacher)
        t += gpu_rows_product(g, r->teacher, 4) +
            gpu_stream(g, gpu_rows_scores(r) + gpu_rows_scores(r->teacher), GPU_ALIGN_BYTES);
    return t;
}

static inline double gpu_attention_forward(const GpuSpec *g, const GpuRun *r) {
    return gpu_attention_flops(r) / (GPU_ATTENTION * g->mma);
}

static inline double gpu_attention_backward(const GpuSpec *g, const GpuRun *r) {
    return 2.5 * gpu_attention_flops(r) / (GPU_ATTENTION_BACK * g->mma);
}

// ---- Branches; i = 2l + branch ----

// Draws the noise of elements, where `bytes` of each are read and written.
static inline double gpu_noise(const GpuSpec *g, double elements, int bytes) {
    return fmax(gpu_stream(g, elements, bytes), elements * GPU_NOISE / g->ints);
}

// A branch's dropout, forward or backward: attention's as bits, which both make.
static inline double gpu_branch_noise(const GpuSpec *g, const GpuRun *r, int branch) {
    const double BT = (double)r->args.B * r->args.T;
    double t = r->noise.resid ? gpu_noise(g, BT * r->c.C, GPU_DROPOUT_BYTES) : 0;
    if (r->noise.attn && branch == ATTN)
        t += gpu_noise(g, BT * r->c.NH * (r->args.T + 1) / 2, 0);
    for (int p = P_qkvA; p < N_PARAMS && r->noise.lora; p += 2)
        if (gpt_param[p].branch == branch && gpt_param_layers(&r->c, p))
            t += gpu_noise(g, BT * gpt_param_cols(&r->c, p), GPU_DROPOUT_BYTES);
    return t;
}

static inline GpuTime gpu_branch_forward(const GpuSpec *g, const GpuRun *r, int i) {
    const int branch = i % BRANCHES, rows = branch == ATTN && gpu_edits(r, i / BRANCHES);
    const double elements = gpu_elements(r);
    GpuTime t = {{0}};
    t.part[GPU_PART_matmuls] = gpu_branch_matmuls(g, r, branch) +
        gpu_adapter_matmuls(g, r, branch);
    t.part[GPU_PART_norms] = gpu_stream(g, elements, GPU_NORM_BYTES);
    t.part[GPU_PART_dropout] = gpu_branch_noise(g, r, branch);
    if (rows) t.part[GPU_PART_rows] = gpu_rows_forward(g, r);
    else if (branch == ATTN) t.part[GPU_PART_attention] = gpu_attention_forward(g, r);
    return t;
}

// What the backward pass recomputes: LayerNorm and GELU, nothing, or the whole branch except its
// last matmul.
static inline double gpu_branch_recompute(const GpuSpec *g, const GpuRun *r, int i) {
    const int branch = i % BRANCHES;
    const double elements = gpu_elements(r), C = r->c.C,
        BT = (double)r->args.B * r->args.T;
    if (r->args.recompute == RECOMPUTE_NONE) return 0;
    double t = gpu_stream(g, elements, GPU_NORM_AGAIN_BYTES);
    if (branch == MLP) t += gpu_stream(g, 4 * elements, GPU_GELU_AGAIN_BYTES);
    if (r->args.recompute != RECOMPUTE_BRANCH) return t;
    t += gpu_matmul(g, BT, branch == MLP ? 4 * C : 3 * C, C);
    if (branch == MLP) return t;
    return t + (gpu_edits(r, i / BRANCHES) ? gpu_rows_forward(g, r) : gpu_attention_forward(g, r));
}

static inline GpuTime gpu_branch_backward(const GpuSpec *g, const GpuRun *r, int i) {
    const int branch = i % BRANCHES, l = i / BRANCHES;
    const double elements = gpu_elements(r);
    GpuTime t = {{0}};
    t.part[GPU_PART_matmuls] = (r->c.lora ? 1 : 2) * gpu_branch_matmuls(g, r, branch) +
                                3 * gpu_adapter_matmuls(g, r, branch);
    t.part[GPU_PART_norms] = gpu_stream(g, elements, GPU_NORM_BYTES) + 3 * GPU_SUM_PARTS;
    t.part[GPU_PART_dropout] = gpu_branch_noise(g, r, branch);
    t.part[GPU_PART_recompute] = gpu_branch_recompute(g, r, i);
    if (!r->c.lora)
        t.part[GPU_PART_biases] = gpu_stream(g, (branch == MLP ? 5 : 4) * elements, GPU_BIAS_BYTES);
    if (branch == MLP) return t;
    t.part[GPU_PART_attention] = gpu_stream(g, elements, GPU_INNER_BYTES);
    if (gpu_edits(r, l) || gpu_compares(r, l)) t.part[GPU_PART_rows] = gpu_rows_backward(g, r, l);
    else t.part[GPU_PART_attention] += gpu_attention_backward(g, r);
    return t;
}

// What a teacher does with a micro-batch: a forward pass and, if it attributes, a backward pass
// that leaves its weights alone.
static inline double gpu_teacher(const GpuSpec *g, const GpuRun *r) {
    const GpuRun *t = r->teacher;
    if (!t) return 0;
    const double BT = (double)t->args.B * t->args.T, C = t->c.C,
        Vp = gpu_padded(t->c.V, 128), attributes = t->args.bound.rows > 0;
    double seconds = gpu_stream(g, BT * C, GPU_NORM_BYTES + GPU_EMBEDDING_BYTES);
    for (int i = 0; i < BRANCHES * t->c.L; i++) {
        const GpuTime forward = gpu_branch_forward(g, t, i), back = gpu_branch_backward(g, t, i);
        seconds += gpu_total(&forward) + attributes * gpu_total(&back);
    }
    if (r->distills || attributes)
        seconds += gpu_matmul(g, BT, Vp, C) + gpu_stream(g, BT * Vp, GPU_SOFT_BYTES);
    return seconds + 2 * attributes * gpu_matmul(g, BT, C, Vp);
}

// Head, loss, ln_f and embedding of a micro-batch, forward and backward.
static inline GpuTime gpu_ends(const GpuSpec *g, const GpuRun *r) {
    const double BT = (double)r->args.B * r->args.T, C = r->c.C, Vp = gpu_padded(r->c.V, 128);
    GpuTime t = {{0}};
    const double heads = 1 + r->exits, ways = r->args.frozen ? 1 : 2;
    t.part[GPU_PART_head] = heads * (gpu_matmul(g, BT, Vp, C) + gpu_matmul(g, BT, C, Vp) +
                                     (r->c.lora ? 0 : gpu_matmul(g, C, Vp, BT)));
    t.part[GPU_PART_loss] = heads * gpu_stream(g, BT * Vp, GPU_LOSS_BYTES) +
        r->args.twins * gpu_stream(g, BT * Vp, GPU_TWINS_BYTES);
    t.part[GPU_PART_norms] = heads * 2 * gpu_stream(g, BT * C, GPU_NORM_BYTES);
    t.part[GPU_PART_embedding] = ways * gpu_stream(g, BT * C, GPU_EMBEDDING_BYTES);
    if (r->noise.embd)
        t.part[GPU_PART_dropout] = ways * gpu_noise(g, BT * C, 2 * GPU_DROPOUT_BYTES);
    t.part[GPU_PART_teacher] = gpu_teacher(g, r);
    return t;
}

static inline double gpu_branch_params(const GptConfig *c, int branch) {
    double n = 0;
    for (int p = 0; p < N_PARAMS; p++)
        if (gpt_param[p].branch == branch && gpt_param_layers(c, p) && gpt_param_trains(c, p, 0, 0))
            n += (double)gpt_param_size(c, p);
    return n;
}

static inline double gpu_kept(const GpuRun *r, int i) { return r->kept ? r->kept[i] : 1; }
static inline double gpu_spent(const GpuRun *r, int i) { return r->spent ? r->spent[i] : 0; }

// Seconds for `passes` around a ring of GPUs, with 1 / ranks of the bytes per hop: 2 for an
// all-reduce, 1 for a reduce-scatter or an all-gather.
static inline double gpu_ring(const GpuSpec *g, int ranks, double bytes, int passes) {
    return bytes > 0 ? passes * (ranks - 1) * (g->hop + bytes / ranks / g->link) : 0;
}

// The last micro-batch's backward pass, overlapped with the reduction over the ranks. A branch's
// reduction starts when its gradient is ready and the previous reduction is done; parameters
// outside the branches come last, as the embedding's gradient does. With ZeRO the updated weights
// are then gathered.
static inline void gpu_communicate(const GpuSpec *g, const GpuRun *r, GpuStep *s) {
    const int wire = r->args.reduce_fp32 ? 4 : 2, passes = r->args.zero ? 1 : 2;
    double now = 0, done = 0, busy = 0, rest = 0, gathered = 0;
    if (r->ranks < 2) return;
    for (int i = BRANCHES * r->c.L - 1; i >= BRANCHES * r->args.frozen; i--) {
        const double size = (1 - gpu_spent(r, i)) * gpu_branch_params(&r->c, i % BRANCHES);
        const double ring = gpu_ring(g, r->ranks, wire * size, passes);
        const GpuTime back = gpu_branch_backward(g, r, i);
        now += gpu_kept(r, i) * gpu_total(&back);
        done = fmax(now, done) + ring, busy += ring;
        s->sent_bytes += wire * size;
        if (r->args.zero) gathered += gpu_ring(g, r->ranks, 2 * size, 1);
    }
    for (int p = 0; p < N_PARAMS; p++)
        if (gpt_param[p].branch == NO_BRANCH && gpt_param_trains(&r->c, p, 0, r->args.frozen))
            rest += (double)gpt_param_size(&r->c, p);
    const double last = gpu_ring(g, r->ranks, wire * rest, passes);
    if (r->args.zero) gathered += gpu_ring(g, r->ranks, 2 * rest, 1);
    s->sent_bytes += wire * rest;
    s->time.part[GPU_PART_communication] = fmax(now, done) + last - now + gathered;
    s->overlapped = busy + last + gathered - s->time.part[GPU_PART_communication];
}

// The FLOPs of one GPU's step, as counted in metrics.jsonl.
static inline double gpu_step_flops(const GpuRun *r) {
    double flops = (1 + r->exits) * gpt_head_step_flops(&r->c, r->args.T);
    for (int i = 0; i < BRANCHES * r->c.L; i++)
        flops += gpu_kept(r, i) * gpt_branch_step_flops(&r->c, i % BRANCHES, r->args.T,
                                                        i / BRANCHES, r->args.frozen);
    const GpuRun *t = r->teacher;
    if (t) flops += (t->args.bound.rows > 0 ? 3 : 1) * gpt_row_flops(&t->c, r->args.T);
    return flops * r->args.B * r->micros;
}

static inline GpuStep gpu_step(const GpuSpec *g, const GpuRun *r) {
    const double trained = (double)gpt_params_trained(&r->c, r->args.frozen);
    const double updated = r->args.zero ? trained / r->ranks : trained;
    const GpuTime ends = gpu_ends(g, r);
    GpuStep s;
    memset(&s, 0, sizeof s);
    gpu_add(&s.time, &ends, r->micros);
    for (int i = 0; i < BRANCHES * r->c.L; i++) {
        const int b = i % BRANCHES, trains = i / BRANCHES >= r->args.frozen;
        const double times = r->micros * gpu_kept(r, i);
        const double launched = r->by_rows && times > 0 ? r->micros : times;
        const GpuTime forward = gpu_branch_forward(g, r, i), back = gpu_branch_backward(g, r, i);
        gpu_add(&s.time, &forward, times);
        if (trains) gpu_add(&s.time, &back, times);
        s.time.part[GPU_PART_launches] += launched * GPU_LAUNCH *
                                          (gpu_launches[b][0] + trains * gpu_launches[b][1]);
    }
    s.time.part[GPU_PART_launches] += GPU_HOST;
    s.time.part[GPU_PART_update] = gpu_stream(g, updated, GPU_ADAM_BYTES + GPU_GRAD_NORM_BYTES);
    gpu_communicate(g, r, &s);
    s.seconds = gpu_total(&s.time);
    s.flops = gpu_step_flops(r);
    s.mfu = s.flops / s.seconds / g->peak;
    return s;
}

// ---- Memory, as allocated by train_gpt.cu in bf16, ignoring gaps between arrays ----

enum { GPU_LOGITS_BYTES = 512 << 20, GPU_WORKSPACE = 32 << 20, GPU_PARTIAL = 2048 };

// Per token of a kept branch: xhat and rstd, and whatever is not recomputed.
static inline double gpu_saved_bytes(const GpuRun *r, int branch) {
    const double C = r->c.C;
    double bytes = 2 * C + 4;
    if (r->args.recompute != RECOMPUTE_BRANCH) bytes += 8 * C + (branch == ATTN) * 4.0 * r->c.NH;
    if (r->args.recompute == RECOMPUTE_NONE) bytes += branch == ATTN ? 2 * C : 10 * C;
    return bytes;
}

// Tokens in a chunk of logits, and the bytes of one's. Twins share a chunk, half of it each.
static inline double gpu_logits_row(const GpuRun *r) { return 2 * gpu_padded(r->c.V, 128); }
static inline double gpu_logits_rows(const GpuRun *r) {
    const double BT = (double)r->args.B * r->args.T,
        most = fmax(128, floor(GPU_LOGITS_BYTES / gpu_logits_row(r))),
        all = gpu_padded(ceil(BT / ceil(BT / most)), 128),
        pairs = fmin(fmax(128, floor(all / 256) * 128), gpu_padded(BT / 2, 128));
    return r->args.twins ? fmax(all, 2 * pairs) : all;
}

// The workspace of whole rows of scores, in blocks of at most so many.
static inline double gpu_rows_bytes(const GpuRun *r, double scores) {
    const double Tp = gpu_padded(r->args.T, GPU_ROWS_UNIT), NH = r->c.NH, B = r->args.B,
        W = gpu_padded(r->c.C / r->c.NH, GPU_ROWS_UNIT), queries = gpu_rows_queries(Tp, NH, scores),
        most = fmin(fmax(1, floor(scores / (NH * Tp * queries))), B),
        rows = ceil(B / ceil(B / most));
    return rows * NH * queries * Tp * (4 + 4 + 2 + 2) + rows * NH * Tp * W * (4 * 2 + 3 * 4) +
        2 * rows * queries * Tp * 4;
}

// What companions of drop path need besides.
static inline double gpu_companions_bytes(const GpuRun *r) {
    const EngineArgs *a = &r->args;
    const double BT = (double)a->B * a->T, C = r->c.C, NH = r->c.NH;
    double bytes = a->attention_noise ? 4 * NH * BT * ceil(a->T / 32.0) : 0, maps = 0;
    for (int l = 0; a->maps && l < r->c.L; l++) maps += a->maps[l] * BT * (3 * C * 2 + 4 * NH);
    if (a->twins) bytes += gpu_logits_rows(r) * (gpu_logits_row(r) + 2 * C) + 4 * BT;
    if (a->align) bytes += 2 * BT * r->c.L * 4;
    if (a->score_rows || a->align || a->maps) bytes += gpu_rows_bytes(r, GPU_ROWS_SCORES);
    return bytes + maps + 2 * BT * r->c.lora + (a->lora_noise ? BT * 4 * C * 2 : 0);
}

static inline double gpu_activations(const GpuRun *r, MemoryBound b) {
    const double BT = (double)r->args.B * r->args.T, C = r->c.C, heads = 4 * BT * r->c.NH;
    const double size[BRANCHES] = {gpu_saved_bytes(r, ATTN), gpu_saved_bytes(r, MLP)};
    const int rows[BRANCHES] = {b.attn_rows, b.mlp_rows}, larger = size[MLP] > size[ATTN];
    const double first = fmin(b.rows, rows[larger]), second = b.rows - first;
    const double exits = b.exits * BT * (4 * C + 4);
    const double kept = exits + fmax(r->args.T * (first * size[larger] + second * size[!larger]),
                             BT * (size[ATTN] + size[MLP]));
    const double forward = BT * (C * (4 + 4 * 2 + 8) + 16) + GPU_PARTIAL * C * 4 + 16 * C;
    const double backward = BT * (C * (4 + 2 + 2 + 8) + 2 * r->c.lora) + heads;
    const double again = r->args.recompute == RECOMPUTE_BRANCH ? 8 * BT * C + heads : 0;
    return GPU_WORKSPACE + gpu_logits_rows(r) * gpu_logits_row(r) + kept + forward +
        gpu_companions_bytes(r) + (b.rows > 0 ? backward + again : 0);
}

static inline EngineMemory gpu_memory(const GpuRun *r, MemoryBound bound) {
    const size_t all = gpt_params_count(&r->c), trained = gpt_params_trained(&r->c, r->args.frozen);
    const size_t shares = r->args.zero ? (size_t)r->ranks : 1;
    const int rows = r->args.B * (r->c.L - r->args.frozen);
    const MemoryBound full = {rows, rows, BRANCHES * rows, bound.exits};
    const size_t trains = bound.rows > 0,
        gradient = trains * (r->ranks > 1 && !r->args.reduce_fp32 ? 4 + 2 : 4);
    const size_t fp32 = r->c.lora ? trained / shares : all - trained + trained / shares;
    const EngineMemory m = {fp32 * 4 + all * 2, trained * gradient,
                            trains * 2 * trained / shares * 4, (size_t)gpu_activations(r, bound),
                            (size_t)gpu_activations(r, trains ? full : bound), 0};
    return m;
}

// ---- The average over the run's drop plans ----

// kept, spent (2L): as in GpuRun. micros: the micro-batches of a step that have a plan of their
// own. A layer that does not exist yet is dropped.
static inline void gpu_expect(double *kept, double *spent, const DropPath *drop, const Growth *g,
                              int micros) {
    const int64_t every = drop->steps / 1000 + 1;
    const double n = (double)((drop->steps - every / 2 + every - 1) / every), M = micros;
    DropPath now = *drop, *d = &now;
    for (int i = 0; i < BRANCHES * drop->layers; i++) {
        kept[i] = spent[i] = 0;
        for (int64_t t = every / 2; t < d->steps; t += every) {
            d->layers = growth_layers(g, drop->layers, t);
            const int absent = i / BRANCHES >= d->layers;
            const double p = absent ? 1 : drop_path_rate(d, i / BRANCHES + 1, i % BRANCHES, t);
            kept[i] += (1 - p) / n;
            if (d->unit == UNIT_ROW) continue;           // some row always keeps it
            const double systematic = fmax(0, M * p - (M - 1));
            spent[i] += (d->sampling == SAMPLING_SYSTEMATIC ? systematic : pow(p, M)) / n;
        }
    }
}

// ---- --dry-run --device: an engine that only predicts ----

// The value of --device: "h100" or "8xh100".
typedef struct { const GpuSpec *spec; int ranks; } GpuWish;

static inline GpuWish gpu_wish(const char *device) {
    char *end;
    GpuWish w = {NULL, 1};
    const char *name = device;
    const long n = strtol(device, &end, 10);
    if (end != device && *end == 'x' && n >= 1 && n <= 1024) w.ranks = (int)n, name = end + 1;
    for (int i = 0; i < N_GPU_SPECS; i++)
        if (!strcmp(name, gpu_specs[i].name)) w.spec = &gpu_specs[i];
    if (!w.spec) die("--device %s: h100, a100 or rtx4090, or several, as in 8xh100", device);
    return w;
}

// The model of an engine that was opened; run.teacher is of no use, as the student is opened first.
typedef struct { GpuRun run; GpuWish wish; } GpuModel;

// The device of models that are opened from now on.
static inline GpuWish *gpu_wished(void) {
    static GpuWish wish;
    return &wish;
}

static inline Model *gpu_model_open(const GptConfig *c, const EngineArgs *a) {
    GpuModel *m = (GpuModel *)xcalloc(1, sizeof *m);
    if (a->dtype != DTYPE_BF16) die("--device predicts bf16 only\n  hint: --dtype bf16, or none");
    m->wish = *gpu_wished();
    m->run.c = *c, m->run.args = *a, m->run.micros = 1, m->run.ranks = m->wish.ranks;
    m->run.args.zero = a->zero && m->wish.ranks > 1;
    return (Model *)(void *)m;
}

static inline void gpu_model_memory(const Model *model, EngineMemory *bytes) {
    const GpuModel *m = (const GpuModel *)(const void *)model;
    *bytes = gpu_memory(&m->run, m->run.args.bound);
}

static inline double gpu_model_peak(Model *model, double seconds) {
    (void)seconds;
    return ((GpuModel *)(void *)model)->wish.spec->peak;
}

static inline void gpu_model_close(Model *model) { free(model); }

// The engine for a dry run on this device. A dry run calls only memory, peak and close.
static inline const Engine *gpu_model_engine(const char *device) {
    static char name[64];
    static Engine engine;
    *gpu_wished() = gpu_wish(device);
    snprintf(name, sizeof name, "%s, predicted", device);
    engine.name = name, engine.dtype = DTYPE_BF16, engine.can = ~0u;
    engine.open = gpu_model_open, engine.memory = gpu_model_memory;
    engine.peak = gpu_model_peak, engine.close = gpu_model_close;
    return &engine;
}

// A run as a whole, for gpu_model_print.
typedef struct {
    const DropPath *drop;
    const Growth *growth;
    const Model *student, *teacher;      // opened by gpu_model_engine's engine; NULL: no teacher
    int micros, rows;                    // of a step: micro-batches of so many rows
    int passes;                          // that each one takes
    int64_t steps;
    double exits;                        // early exits, on average
    Noise noise;
    const unsigned char *compared;       // this and the next as in GpuRun
    int distills;
} GpuPlan;

static inline void gpu_model_print_step(const GpuSpec *g, const GpuStep *s, double tokens) {
    char rate[32];
    int n = 0;
    metrics_grouped(rate, tokens / s->seconds);
    printf("predict:");
    for (int i = 0; i < N_GPU_PARTS; i++)
        if (s->time.part[i] > 0)
            printf("%s %s %.1f", n++ ? "," : "", gpu_part_names[i], 1e3 * s->time.part[i]);
    printf(" ms\n         step %.1f ms, %s tokens/s, MFU %.1f%% of %.0f TFLOP/s; assumptions: "
           "dev/run/gpu_model.h\n", 1e3 * s->seconds, rate, 100 * s->mfu, 1e-12 * g->peak);
}

// Prints what the run would take there: steps on average, and all of them.
static inline void gpu_model_print(const GpuPlan *p) {
    const GpuModel *m = (const GpuModel *)(const void *)p->student,
        *teacher = (const GpuModel *)(const void *)p->teacher;
    const GpuSpec *g = m->wish.spec;
    const size_t branches = (size_t)(BRANCHES * m->run.c.L);
    double *kept = (double *)xcalloc(branches, sizeof *kept);
    double *spent = (double *)xcalloc(branches, sizeof *spent);
    char time[32];
    GpuRun run = m->run, full;
    run.micros = p->passes * p->micros / run.ranks, run.by_rows = p->drop->unit == UNIT_ROW;
    run.exits = p->exits, run.noise = p->noise, run.compared = p->compared;
    run.teacher = teacher ? &teacher->run : NULL, run.distills = p->distills;
    full = run, run.kept = kept, run.spent = spent;
    gpu_expect(kept, spent, p->drop, p->growth,
               p->drop->sync && !run.by_rows ? p->micros / run.ranks : p->micros);
    const GpuStep s = gpu_step(g, &run), all = gpu_step(g, &full);
    EngineMemory bytes = gpu_memory(&run, run.args.bound), its;
    memset(&its, 0, sizeof its);
    if (teacher) gpu_model_memory(p->teacher, &its);
    const double used = (double)(bytes.parameters + bytes.gradients + bytes.moments) +
        (double)bytes.activations + (double)(its.parameters + its.activations);
    gpu_model_print_step(g, &s, (double)p->micros * p->rows * run.args.T);
    const char *saver = !p->growth->n ? "drop path saves" : p->drop->p_max > 0
        ? "drop path and growth save" : "growth saves";
    if (p->drop->p_max > 0 || p->growth->n)
        printf("         %s %.1f ms, %.1f%% of a step, and %.1f%% of the FLOPs\n", saver,
               1e3 * (all.seconds - s.seconds), 100 * (1 - s.seconds / all.seconds),
               100 * (1 - s.flops / all.flops));
    if (run.ranks > 1)
        printf("         %d GPUs sum %.0f MB each: %.1f ms behind the backward pass, %.1f ms not\n",
               run.ranks, 1e-6 * s.sent_bytes, 1e3 * s.overlapped,
               1e3 * s.time.part[GPU_PART_communication]);
    metrics_duration(time, s.seconds * (double)p->steps);
    printf("         %.1f of %.0f GB are used%s; the run takes %s without evaluations\n",
           1e-9 * used, 1e-9 * g->memory, used > g->memory ? ", too many" : "", time);
    free(kept), free(spent);
}

#endif
