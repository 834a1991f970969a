// cpu_model.h: what the CPU engine's model consists of: parameters and their gradients and moments,
// what forward saves for backward, workspaces; allocated once, by a table.
#ifndef CPU_MODEL_H
#define CPU_MODEL_H

#include "attention_rows.h"
#include "attention_tiles.h"
#include "engine.h"
#include "generation.h"
#include "layout.h"
#include "scoring.h"

enum { UPDATE_CHUNK = 1 << 14 };
// A piece of one tensor, at its offset among the parameters; branch: index in UpdateArgs.t.
typedef struct { size_t at, n, branch; int decay; } UpdateChunk;
// (n,T,C) (n,T) (n,T,3C) (n,NH,T) (n,T,C)
typedef struct { real *xhat, *rstd, *qkv, *lse, *y; } AttentionSaved;
typedef struct { real *xhat, *rstd, *h; } MlpSaved;                 // (n,T,C) (n,T) (n,T,4C)

struct Model {
    GptConfig config;
    EngineArgs args;
    Layout layout;                    // of every slot
    real *slot[4];                    // parameters (layout.n); gradients, m, v (n - n_frozen)
    UpdateChunk *chunk;
    int n_chunks;
    double *partial;                  // (n_chunks) squared norms
    unsigned char *spent;             // (2L+1) by branch, as UpdateArgs.t: gradients already
                                      // applied by an update, which count as zeros whatever the
                                      // memory contains

    real *saved, *saved_end;          // what forward saves for backward, one branch after the other
    size_t saved_capacity, saved_peak;      // elements allocated; the most that was used
    AttentionSaved *attention;         // (L) into `saved`
    MlpSaved *mlp;                     // (L)
    real **exit;                      // (L) likewise: (B,T,C), the gradient from a loss read after
                                      // a layer

    real *x, *dx;                     // (B,T,C) the residual stream
    real *lnf, *lnf_xhat, *lnf_rstd;  // (B,T,C) (B,T,C) (B,T)
    real *losses, *uniform;           // (B,T) each, from score_token
    real *distilled, *apart;          // (B,T) (B,T) likewise, and from score_pair
    real *pairs;                      // (chunk,V) gradients of twins
    double part[N_PARTS];             // of the last run
    real *ln, *gelu, *out;            // (B,T,C) (B,T,4C) (B,T,C): for one branch at a time
    real *dwide, *dy, *dout;          // (B,T,4C) (B,T,C) (B,T,C)
    real *logits;                     // (chunk,V)
    real *lora_u, *lora_v, *lora_x;   // (B,T,r) (B,T,r) (B,T,4C) of adapters; x with dropout
    PackWorkspace pack;
    AttentionWorkspaces work;
    RowsWorkspaces score_rows;        // of attention that edits scores or compares maps
    real *maps;                       // a layer's (B,T,3C) and (B,NH,T), of those in args.maps
    real *align;                      // (B,blocks of queries,T,QUERIES) as `more` of align_maps
    int last_B, last_T;               // of the last forward

    HeadCache cache;                  // (L,sequences,NH) heads
    PackedWeights packed;             // as read by multiply_few
    real *few;                        // (FEW_ROWS,4C) its a operand
    const int *seq, *at;              // of the current decode; NULL: none
    real *stream;                     // (sequences,T,C) where decode has stopped,
    int *stopped;                     // (sequences,T) and before which layer
};

// One layer's part of a parameter in a slot; NULL if it is frozen and the slot is not the
// parameters.
static inline real *tensor_at(const Model *m, Slot slot, int param, int l) {
    const size_t at = layout_at(&m->layout, &m->config, param, l),
        absent = slot == SLOT_PARAM ? 0 : m->layout.n_frozen;
    return at < absent ? NULL : m->slot[slot] + (at - absent);
}

static inline Params params_at(const Model *m, Slot slot, int l) {
    Params w;
#define X(id, name, branch, dims, rows, cols, init, group) w.id = tensor_at(m, slot, P_##id, l);
    GPT_PARAMS(X)
#undef X
    return w;
}

// Call this before adding to a branch's gradient. If the update has consumed the gradient, sets it
// to zero: all of it, or with `but_matmuls` all except the matmuls' weights. Then returns 0, and
// the matmuls must overwrite theirs, which saves writing and rereading zeros; otherwise returns 1,
// and they must add.
static inline int gradient_add(Model *m, int l, int branch, int but_matmuls) {
    const size_t index = gpt_branch_index(&m->config, l, branch);
    if (!m->spent[index]) return 1;
    m->spent[index] = 0;
    for (int p = 0; p < N_PARAMS; p++)
        if (gpt_param[p].branch == branch && layout_trains(&m->config, p) &&
            !(but_matmuls && gpt_param[p].dims == 2 && p != P_wpe))
            memset(tensor_at(m, SLOT_GRAD, p, l), 0, gpt_param_size(&m->config, p) * sizeof(real));
    return 0;
}

// Divides every trained tensor into pieces of UPDATE_CHUNK elements, the unit of work for norm and
// update.
static inline void params_chunks(Model *m) {
    GptPiece *piece;
    m->n_chunks = gpt_trained_pieces(&piece, &m->config, m->args.frozen, UPDATE_CHUNK);
    m->chunk = (UpdateChunk *)xcalloc((size_t)m->n_chunks, sizeof *m->chunk);
    for (int i = 0; i < m->n_chunks; i++) {
        const int p = piece[i].param, l = piece[i].layer;
        m->chunk[i] = (UpdateChunk){layout_at(&m->layout, &m->config, p, l) + piece[i].at,
                                    piece[i].n,
                                    gpt_branch_index(&m->config, l, gpt_param[p].branch),
                                    gpt_param[p].dims == 2};
    }
    free(piece);
    m->partial = (double *)xcalloc((size_t)m->n_chunks, sizeof *m->partial);
}

// Elements that one row of a kept branch saves.
static inline size_t saved_per_row(const GptConfig *c, int branch, int T) {
    return (size_t)T * (branch == ATTN ? 5 * (size_t)c->C + (size_t)c->NH + 1
                                       : 5 * (size_t)c->C + 1);
}

// The most that plans within the bound save.
static inline size_t saved_bound(const Model *m, const MemoryBound *b) {
    const size_t size[BRANCHES] = {saved_per_row(&m->config, ATTN, m->args.T),
                                   saved_per_row(&m->config, MLP, m->args.T)};
    const size_t exit = (size_t)m->args.B * (size_t)m->args.T * (size_t)m->config.C;
    return memory_bound_most(b, size, m->args.B) +
        (b->rows > 0 ? (size_t)m->args.bound.exits * exit : 0);
}

typedef struct { real **at; size_t n; } Buffer;
enum { N_BUFFERS = 31, N_TRAINING_BUFFERS = 5 };

// All activation arrays except the saved ones; the last ones are for training.
static inline int model_buffers(Model *m, Buffer buffers[N_BUFFERS]) {
    const size_t BT = (size_t)m->args.B * (size_t)m->args.T, C = (size_t)m->config.C,
        V = (size_t)m->config.V;
    // panels have K_BLOCK words only if these are pairs
    const size_t wide = m->pack.bf16 && !PAIRS ? 2 : 1;
    const size_t r = (size_t)m->config.lora, wide4 = 4 * C > r ? 4 * C : r;
    const size_t most = BT > wide4 ? BT > V ? BT : V : wide4 > V ? wide4 : V,
        K = m->pack.tiled ? round_up(at_most(most, 2 * K_BLOCK), 2 * TILE_SIDE) / 2
                          : at_most(most + 1, wide * K_BLOCK);
    const size_t cached = (size_t)m->args.cache;
    size_t maps = 0;
    for (int l = 0; m->args.maps && l < m->config.L; l++) maps += m->args.maps[l];
    const Buffer all[N_BUFFERS] = {
        {&m->x, BT * C}, {&m->lnf, BT * C}, {&m->lnf_xhat, BT * C}, {&m->lnf_rstd, BT},
        {&m->losses, BT}, {&m->uniform, BT}, {&m->distilled, BT}, {&m->apart, BT},
        {&m->pairs, m->args.twins ? (classifier_chunk(BT, V) + 1) * V : 0},
        {&m->ln, BT * C}, {&m->gelu, BT * 4 * C},
        {&m->out, BT * C}, {&m->logits, classifier_chunk(BT, V) * V},
        {&m->pack.a, at_most(most + strip_rows(&m->pack), M_BLOCK) * K},
        {&m->pack.b, at_most(most + TILE_COLS, N_BLOCK) * K},
        {&m->work.at, (size_t)m->work.threads * (sizeof(AttentionWorkspace) / sizeof(real))},
        {&m->score_rows.at, m->args.score_rows || m->args.align ? (size_t)m->work.threads *
         rows_workspace((size_t)m->args.T) : 0},
        {&m->maps, maps * BT * (3 * C + (size_t)m->config.NH)},
        {&m->align, m->args.align ? BT * round_up((size_t)m->args.T, QUERIES) : 0},
        {&m->cache.at, cached * (size_t)m->config.L * (size_t)m->config.NH * head_cache(m->cache.T,
            C / (size_t)m->config.NH)},
        {&m->packed.at, cached ? packed_total(&m->packed, &m->config, &m->pack) : 0},
        {&m->few, cached ? TILED_ROWS * 4 * (C + TILE_COLS) : 0},
        {&m->stream, cached * (size_t)m->args.T * C},
        {&m->lora_u, BT * r}, {&m->lora_x, m->args.lora_noise ? BT * 4 * C : 0},
        {&m->saved, 0},                                   // has its own size
        {&m->lora_v, BT * r},
        {&m->dx, BT * C}, {&m->dy, BT * C}, {&m->dout, BT * C}, {&m->dwide, BT * 4 * C},
    };
    memcpy(buffers, all, sizeof all);
    return m->args.bound.rows > 0 ? N_BUFFERS : N_BUFFERS - N_TRAINING_BUFFERS;
}

static inline Model *model_open(const GptConfig *config, const EngineArgs *args) {
    if (config->C / config->NH > HEAD_MAX)
        die("heads of %d channels: this engine takes at most %d", config->C / config->NH, HEAD_MAX);
#ifdef _OPENMP
    if (args->threads > 0) omp_set_num_threads(args->threads);
#endif
    Model *m = (Model *)xcalloc(1, sizeof *m);
    Buffer buffers[N_BUFFERS];
    size_t size[N_PARAMS];
    m->config = *config;
    m->args = *args;
    m->pack.bf16 = args->dtype == DTYPE_BF16;
    m->pack.tiled = m->pack.bf16 && tiles_allowed();
    if (TILES && m->pack.bf16 && !m->pack.tiled)
        warn("this system does not let programs use AMX: bf16 matmuls are slower, with other bits");
    m->work.threads = m->score_rows.threads = team_most();
    m->score_rows.T = (size_t)args->T;
    for (int p = 0; p < N_PARAMS; p++) size[p] = gpt_param_size(config, p);
    m->layout = layout_of(config, args->frozen, size, 1);
    if (!args->dry) params_chunks(m);
    packed_layout(&m->packed, config, &m->pack);
    m->cache.T = round_up((size_t)args->T, KEYS);
    for (int s = 0; s < (args->dry ? 0 : args->bound.rows > 0 ? 4 : 1); s++)
        m->slot[s] = vectors_new(m->layout.n - (s == SLOT_PARAM ? 0 : m->layout.n_frozen));
    m->spent = (unsigned char *)xcalloc((size_t)BRANCHES * (size_t)config->L + 1, sizeof *m->spent);
    m->attention = (AttentionSaved *)xcalloc((size_t)config->L, sizeof *m->attention);
    m->mlp = (MlpSaved *)xcalloc((size_t)config->L, sizeof *m->mlp);
    m->exit = (real **)xcalloc((size_t)config->L, sizeof *m->exit);
    m->stopped = (int *)xcalloc((size_t)args->cache * (size_t)args->T + 1, sizeof *m->stopped);
    m->saved_capacity = saved_bound(m, &args->bound);
    for (int i = 0, n = args->dry ? 0 : model_buffers(m, buffers); i < n; i++)
        *buffers[i].at = vectors_new(buffers[i].at == &m->saved ? m->saved_capacity : buffers[i].n);
    return m;
}

static inline void model_close(Model *m) {
    Buffer buffers[N_BUFFERS];
    for (int i = 0, n = model_buffers(m, buffers); i < n; i++) free(*buffers[i].at);
    for (int s = 0; s < 4; s++) free(m->slot[s]);
    free(m->chunk);
    free(m->partial);
    free(m->spent);
    free(m->attention);
    free(m->mlp);
    free(m->exit);
    free(m->stopped);
    free(m);
}

static inline void model_memory(const Model *m, EngineMemory *bytes) {
    const size_t train = m->args.bound.rows > 0,
        one = (m->layout.n - m->layout.n_frozen) * sizeof(real);
    const MemoryBound all = memory_bound_full(m->config.L, m->args.frozen, m->args.B, (int)train);
    Model copy = *m;
    Buffer buffers[N_BUFFERS];
    size_t working = 0, packed = 0;
    for (int i = 0, n = model_buffers(&copy, buffers); i < n; i++) {
        if (buffers[i].at == &copy.packed.at) packed = buffers[i].n;
        else working += buffers[i].n;
    }
    bytes->parameters = (m->layout.n + packed) * sizeof(real);
    bytes->gradients = train * one;
    bytes->moments = train * 2 * one;
    bytes->activations = (working + m->saved_capacity) * sizeof(real);
    bytes->activations_full = (working + saved_bound(m, &all)) * sizeof(real);
    bytes->activations_used = (working + m->saved_peak) * sizeof(real);
}

static inline real *save(Model *m, size_t n) {
    real *p = m->saved_end;
    m->saved_end += n;
    const size_t used = (size_t)(m->saved_end - m->saved);
    CHECK(used <= m->saved_capacity, "the plan keeps more branches than the model was opened for");
    if (used > m->saved_peak) m->saved_peak = used;
    return p;
}

#endif
