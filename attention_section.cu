// ---- Attention: qkv (n,T,3C) -> y (n,T,C), causal; keeps lse (n,NH,T), the log-sum-exp, for the backward pass ----
// Softmax in blocks that stay on the chip, after Dao 2023 (FlashAttention-2). Forward and dQ: a block of threads owns lines
// of queries and walks over the keys before them. dK and dV: it owns keys and walks over the queries after them. So every
// result has one owner, and nothing is added from two sides; S and P = exp(S - lse) are made anew in both backward kernels,
// 7 products where 5 would do with atomics.
//
// In bf16 on tensor cores: a warp owns 16 M lines. Tiles of 8 N lines of the other side come to shared memory one tile
// ahead of their use, and serve all warps. Scores leave mma in the layout in which the next product takes them as its first
// operand (PTX ISA, figures of mma.m16n8k16), so they never leave the warp's registers.
// Heads are filled up with zeros to W = 64 or 128 numbers. Wider heads, heads of no multiple of 8 (a piece of 16 bytes) and
// fp32 run on the plain kernels further down.
//
// Causality also keeps lines past T, which are read as zeros, from those before T: as keys they are too late, and as
// queries nobody stores them.

#ifdef CUDA_EMULATED
#define UNROLL
static inline __device__ float exp2_fast(float x) { return exp2f(x); }
#else
#define UNROLL _Pragma("unroll")
// 2^x by the one instruction, within 2^-22; what would be denormal is 0 (PTX ISA, ex2.approx).
static inline __device__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

enum { ATTENTION_WARPS = 4, ATTENTION_THREADS = 32 * ATTENTION_WARPS, ATTENTION_WIDEST = 256 };

// Says at start what attention_forward could not do later.
static void attention_check(size_t C, size_t NH) {
    if (C / NH > ATTENTION_WIDEST)
        die("heads of %zu channels: the GPU takes at most %d\n  hint: more heads (--heads)", C / NH, ATTENTION_WIDEST);
}

// The block's head, h of NH of one row, and which of the head's own blocks it is. The blocks of a head run about together,
// so that K and V come from L2.
typedef struct { int row, h, block; } AttentionPlace;

static __device__ AttentionPlace attention_place(int blocks, int NH) {
    const int head = (int)blockIdx.x / blocks;
    return AttentionPlace{head / NH, head % NH, (int)blockIdx.x % blocks};
}

// Where the head's numbers begin in a matrix (n,T,numbers) and in (n,NH,T).
static __device__ size_t head_start(AttentionPlace p, size_t numbers, int T, int HS) { return p.row * T * numbers + p.h * HS; }
static __device__ size_t head_tokens(AttentionPlace p, int NH, int T) { return ((size_t)p.row * NH + p.h) * T; }

// Lines of a head, HS numbers each, ld numbers apart; reads past T or HS give 0.
template <class N> struct HeadLines { N *at; int ld, T, HS; };

template <class N> static __device__ N *head_line(HeadLines<N> x, int i) { return x.at + (ptrdiff_t)i * x.ld; }

// Part 0, 1 or 2 (q, k or v) of a head of qkv or dqkv, and a head of y or dy.
template <class N> static __device__ HeadLines<N> head_of_qkv(N *qkv, AttentionPlace p, int part, int T, int C, int HS) {
    return HeadLines<N>{qkv + head_start(p, 3 * (size_t)C, T, HS) + part * C, 3 * C, T, HS};
}

template <class N> static __device__ HeadLines<N> head_of_y(N *y, AttentionPlace p, int T, int C, int HS) {
    return HeadLines<N>{y + head_start(p, C, T, HS), C, T, HS};
}

// ---- Attention in bf16: tiles in shared memory ----

// A tile's lines have W numbers in pieces of 16 bytes. Piece p of line i lies at place p ^ (i & 7): eight lines at one piece,
// which ldmatrix reads together, are in different banks, all 32 of them.
template <int W> static __device__ bf16 *tile_piece(bf16 *tile, int line, int piece) {
    return tile + line * W + ((piece ^ (line & 7)) << 3);
}

// What one thread copies of a head's tiles, one after the other: one piece of every STEP-th line. `left`: lines from its first
// one to T; none of a piece past HS.
template <int W> struct TileSource {
    enum { PIECES = W / 8, STEP = ATTENTION_THREADS / PIECES };
    const bf16 *from;
    int step, left;
};

template <int W> static __device__ TileSource<W> tile_source(HeadLines<const bf16> x, int first) {
    const int line = first + (int)threadIdx.x / TileSource<W>::PIECES, piece = (int)threadIdx.x % TileSource<W>::PIECES;
    return TileSource<W>{head_line(x, line) + piece * 8, TileSource<W>::STEP * x.ld, piece * 8 < x.HS ? x.T - line : 0};
}

// Copies the next LINES lines in the background; of what lies `further` numbers on in each line (v after k).
template <int LINES, int W> static __device__ void tile_load(bf16 *tile, const TileSource<W> *x, int further) {
    constexpr int PIECES = TileSource<W>::PIECES, STEP = TileSource<W>::STEP, TIMES = LINES / STEP;
    static_assert(LINES % STEP == 0 && STEP % 8 == 0, "a thread's pieces have the same place in each line");
    bf16 *to = tile_piece<W>(tile, (int)threadIdx.x / PIECES, (int)threadIdx.x % PIECES);
    UNROLL for (int r = 0; r < TIMES; r++)
        cp_async16(to + r * STEP * W, x->from + further + (ptrdiff_t)r * x->step, r * STEP < x->left);
}

template <int LINES, int W> static __device__ void tile_advance(TileSource<W> *x) {
    x->from += (ptrdiff_t)(LINES / TileSource<W>::STEP) * x->step, x->left -= LINES;
}

// The lines that a block owns: one tile.
template <int LINES, int W> static __device__ void tile_load_own(bf16 *tile, HeadLines<const bf16> x, int first) {
    const TileSource<W> source = tile_source<W>(x, first);
    tile_load<LINES>(tile, &source, 0);
}

// Where this lane's line of a 16 by 16 corner of a tile is, for ldmatrix_x4: as the first operand of mma, or transposed as
// two second operands, ... `line` is a multiple of 8 and `piece` is even, both constants: the sum is in an order in which
// all but a few terms are constants or the same for every tile.
template <int W> static __device__ bf16 *tile_lane(bf16 *tile, int line, int piece) {
    const int lane = (int)threadIdx.x % 32;
    return (bf16 *)((char *)tile + (lane % 16 * 2 * W + ((lane / 16 ^ lane % 8 ^ piece) << 4)) + line * 2 * W);
}

// ... and as two second operands that are not transposed.
template <int W> static __device__ bf16 *tile_lane_second(bf16 *tile, int line, int piece) {
    const int lane = (int)threadIdx.x % 32;
    return (bf16 *)((char *)tile + ((lane / 16 * 8 + lane % 8) * 2 * W + ((lane / 8 % 2 ^ lane % 8 ^ piece) << 4)) +
                    line * 2 * W);
}

// Step k of the 16 M lines that a warp owns, as first operands; all steps where they are KEPT in registers. `line`: of the
// two tiles of such lines the second is LINES lines after the first, a constant in the address and not a pointer more.
template <int W, int M> static __device__ void own_read(uint32_t a[M][4], bf16 *tile, int line, int k) {
    UNROLL for (int m = 0; m < M; m++) ldmatrix_x4(a[m], tile_lane<W>(tile, line + 16 * m, 2 * k));
}

template <int W, int M, bool KEPT> struct OwnLines { uint32_t a[KEPT ? W / 16 : 1][M][4]; };

template <int W, int M, bool KEPT> static __device__ void own_keep(OwnLines<W, M, KEPT> *own, bf16 *tile, int line) {
    if (KEPT) {
        UNROLL for (int k = 0; k < W / 16; k++) own_read<W, M>(own->a[k], tile, line, k);
    }
}

// s (16M,8N) += own (16M,W) tile (8N,W)^T
template <int W, int M, int N, bool KEPT>
static __device__ void tile_scores(float s[M][N][4], OwnLines<W, M, KEPT> *own, bf16 *own_tile, int line, bf16 *tile) {
    UNROLL for (int k = 0; k < W / 16; k++) {
        if (!KEPT) own_read<W, M>(own->a[0], own_tile, line, k);
        UNROLL for (int n = 0; n < N; n += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, tile_lane_second<W>(tile, 8 * n, 2 * k));
            UNROLL for (int m = 0; m < M; m++) {
                mma_bf16(s[m][n], own->a[KEPT ? k : 0][m], b);
                mma_bf16(s[m][n + 1], own->a[KEPT ? k : 0][m], b + 2);
            }
        }
    }
}

// out (16M,W) += p (16M,8N) tile (8N,W); p is rounded to bf16.
template <int W, int M, int N>
static __device__ void tile_product(float out[M][W / 8][4], const float p[M][N][4], bf16 *tile) {
    UNROLL for (int n = 0; n < N; n += 2) {
        uint32_t a[M][4];
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int e = 0; e < 4; e++)
                a[m][e] = pack_bf16(p[m][n + e / 2][e % 2 * 2], p[m][n + e / 2][e % 2 * 2 + 1]);
        UNROLL for (int d = 0; d < W / 8; d += 2) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, tile_lane<W>(tile, 8 * n, d));
            UNROLL for (int m = 0; m < M; m++) {
                mma_bf16(out[m][d], a[m], b);
                mma_bf16(out[m][d + 1], a[m], b + 2);
            }
        }
    }
}

// x's 16 M lines from `first` on = out (16M,W), by way of the warp's own tile, so that whole pieces are written. What the
// tile held has been read: a barrier came since.
template <int W, int M>
static __device__ void own_store(HeadLines<bf16> x, int first, const float out[M][W / 8][4], bf16 *tile) {
    const int lane = (int)threadIdx.x % 32;
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int d = 0; d < W / 8; d++)
            UNROLL for (int half = 0; half < 2; half++) {
                bf16 *to = tile_piece<W>(tile, 16 * m + 8 * half + lane / 4, d) + lane % 4 * 2;
                to[0] = from_float<bf16>(out[m][d][2 * half]);
                to[1] = from_float<bf16>(out[m][d][2 * half + 1]);
            }
    __syncwarp();
    for (int at = lane; at < 16 * M * (W / 8); at += 32) {
        const int line = at / (W / 8), piece = at % (W / 8), i = first + line;
        if (i < x.T && piece * 8 < x.HS) pack_store(head_line(x, i) + piece * 8, pack_load(tile_piece<W>(tile, line, piece)));
    }
}

// ---- Attention in bf16: scores in registers ----
// Lane l of a warp has of each 16 by 8 scores s[m][n] lines l / 4 and l / 4 + 8, of each columns l % 4 * 2 and one more.

// Scores of which the key is later than the query become -inf. Lines are queries and columns keys, or the other way
// round; line0 and column0 are those of s[0][0][0] in lane 0.
template <bool LINES_ARE_KEYS, int M, int N> static __device__ void causal(float s[M][N][4], int line0, int column0) {
    const int lane = (int)threadIdx.x % 32, ahead = line0 + lane / 4 - column0 - lane % 4 * 2;
    if (LINES_ARE_KEYS ? column0 >= line0 + 16 * M - 1 : line0 >= column0 + 8 * N - 1) return;
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int n = 0; n < N; n++)
            UNROLL for (int e = 0; e < 4; e++) {
                const int line_ahead = ahead + 16 * m + e / 2 * 8 - 8 * n - e % 2;
                if (LINES_ARE_KEYS ? line_ahead > 0 : line_ahead < 0) s[m][n][e] = -INFINITY;
            }
}

// The four lanes of a line.
static __device__ float line_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}

static __device__ float line_sum(float x) {
    x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}

// One tile of scores into the running softmax: s becomes 2^(scale2 (s - top)); `sum`, of this lane's columns, and what was
// summed up of y are brought to the new top. A query's first tile has a key that it sees, so top is finite after it.
template <int W, int M, int N>
static __device__ void softmax_tile(float s[M][N][4], float out[M][W / 8][4], float top[M][2], float sum[M][2], float scale2) {
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int half = 0; half < 2; half++) {
            float high = top[m][half], total = 0;
            UNROLL for (int n = 0; n < N; n++) high = fmaxf(high, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
            high = line_max(high);
            const float shrink = exp2_fast((top[m][half] - high) * scale2), high2 = high * scale2;
            UNROLL for (int n = 0; n < N; n++)
                UNROLL for (int e = 2 * half; e < 2 * half + 2; e++)
                    total += s[m][n][e] = exp2_fast(s[m][n][e] * scale2 - high2);
            UNROLL for (int d = 0; d < W / 8; d++) out[m][d][2 * half] *= shrink, out[m][d][2 * half + 1] *= shrink;
            sum[m][half] = sum[m][half] * shrink + total;
            top[m][half] = high;
        }
}

// ---- Attention in bf16: the three kernels ----
// scale = 1/sqrt(HS), scale2 = scale log2(e): exponentials are powers of 2.

static __device__ int blocks_of(int T, int lines) { return (T + lines - 1) / lines; }

template <int W, int M, int N, bool KEPT>
static __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
attention_forward_kernel(bf16 *y, float *lse, const bf16 *qkv, int T, int C, int NH, float scale) {
    constexpr int LINES = 16 * M * ATTENTION_WARPS, KEYS = 8 * N;
    SHARED(bf16, shared);                                // q (LINES,W); k and v (2,KEYS,W): this tile and the next
    bf16 *const k_tiles = shared + LINES * W, *const v_tiles = k_tiles + 2 * KEYS * W;
    const int blocks = blocks_of(T, LINES), HS = C / NH, own = 16 * M * ((int)threadIdx.x / 32), lane = (int)threadIdx.x % 32;
    const AttentionPlace p = attention_place(blocks, NH);
    const int i0 = (blocks - 1 - p.block) * LINES, i_own = i0 + own;           // the longest walks of a head start first
    TileSource<W> keys = tile_source<W>(head_of_qkv(qkv, p, 1, T, C, HS), 0);
    const float scale2 = scale * 1.44269504f;
    bf16 *const q_tile = shared + own * W;
    OwnLines<W, M, KEPT> q;
    float out[M][W / 8][4] = {}, top[M][2], sum[M][2] = {};
    UNROLL for (int m = 0; m < M; m++) top[m][0] = top[m][1] = -INFINITY;

    tile_load_own<LINES, W>(shared, head_of_qkv(qkv, p, 0, T, C, HS), i0);
    tile_load<KEYS>(k_tiles, &keys, 0);
    tile_load<KEYS>(v_tiles, &keys, C);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    own_keep<W, M, KEPT>(&q, q_tile, 0);
    const int end = i0 + LINES < T ? i0 + LINES : T;
    for (int j0 = 0, at = 0; j0 < end; j0 += KEYS, at ^= 1) {
        if (j0 + KEYS < end) {
            tile_advance<KEYS>(&keys);
            tile_load<KEYS>(k_tiles + (at ^ 1) * KEYS * W, &keys, 0);
            tile_load<KEYS>(v_tiles + (at ^ 1) * KEYS * W, &keys, C);
            cp_async_commit();
        }
        if (j0 < i_own + 16 * M) {                       // not too late for all queries of this warp
            float s[M][N][4] = {};
            tile_scores<W, M, N, KEPT>(s, &q, q_tile, 0, k_tiles + at * KEYS * W);
            causal<false, M, N>(s, i_own, j0);
            softmax_tile<W, M, N>(s, out, top, sum, scale2);
            tile_product<W, M, N>(out, s, v_tiles + at * KEYS * W);
        }
        cp_async_wait<0>();
        __syncthreads();                                 // the next tile is here, and nobody reads this one any more
    }

    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int half = 0; half < 2; half++) {
            const int i = i_own + 16 * m + 8 * half + lane / 4;
            const float all = line_sum(sum[m][half]), share = 1 / all;
            UNROLL for (int d = 0; d < W / 8; d++) out[m][d][2 * half] *= share, out[m][d][2 * half + 1] *= share;
            if (lane % 4 == 0 && i < T) lse[head_tokens(p, NH, T) + i] = top[m][half] * scale + logf(all);
        }
    own_store<W, M>(head_of_y(y, p, T, C, HS), i_own, out, q_tile);
}

// dQ = scale ds K, ds = P (dP - inner), dP = dy V^T (Dao et al. 2022, algorithm 4).
template <int W, int M, int N, bool KEPT>
static __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
attention_backward_queries_kernel(bf16 *dqkv, const bf16 *dy, const bf16 *qkv, const float *lse, const float *inner, int T,
                                  int C, int NH, float scale) {
    constexpr int LINES = 16 * M * ATTENTION_WARPS, KEYS = 8 * N;
    SHARED(bf16, shared);                                // q and dy (LINES,W); k and v (2,KEYS,W)
    bf16 *const k_tiles = shared + 2 * LINES * W, *const v_tiles = k_tiles + 2 * KEYS * W;
    const int blocks = blocks_of(T, LINES), HS = C / NH, own = 16 * M * ((int)threadIdx.x / 32), lane = (int)threadIdx.x % 32;
    const AttentionPlace p = attention_place(blocks, NH);
    const int i0 = (blocks - 1 - p.block) * LINES, i_own = i0 + own;
    TileSource<W> keys = tile_source<W>(head_of_qkv(qkv, p, 1, T, C, HS), 0);
    const float scale2 = scale * 1.44269504f;
    bf16 *const q_tile = shared + own * W;               // the warp's lines; those of dy are LINES further
    OwnLines<W, M, KEPT> q, g;                           // g: dy
    float dq[M][W / 8][4] = {}, lse2[M][2], minus_inner[M][2];

    tile_load_own<LINES, W>(shared, head_of_qkv(qkv, p, 0, T, C, HS), i0);
    tile_load_own<LINES, W>(shared + LINES * W, head_of_y(dy, p, T, C, HS), i0);
    tile_load<KEYS>(k_tiles, &keys, 0);
    tile_load<KEYS>(v_tiles, &keys, C);
    cp_async_commit();
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int half = 0; half < 2; half++) {
            const int i = i_own + 16 * m + 8 * half + lane / 4;
            const size_t at = head_tokens(p, NH, T) + i;
            lse2[m][half] = i < T ? lse[at] * 1.44269504f : 0;
            minus_inner[m][half] = i < T ? -inner[at] : 0;
        }
    cp_async_wait<0>();
    __syncthreads();
    own_keep<W, M, KEPT>(&q, q_tile, 0);
    own_keep<W, M, KEPT>(&g, q_tile, LINES);
    const int end = i0 + LINES < T ? i0 + LINES : T;
    for (int j0 = 0, at = 0; j0 < end; j0 += KEYS, at ^= 1) {
        if (j0 + KEYS < end) {
            tile_advance<KEYS>(&keys);
            tile_load<KEYS>(k_tiles + (at ^ 1) * KEYS * W, &keys, 0);
            tile_load<KEYS>(v_tiles + (at ^ 1) * KEYS * W, &keys, C);
            cp_async_commit();
        }
        if (j0 < i_own + 16 * M) {
            float s[M][N][4] = {}, ds[M][N][4];
            tile_scores<W, M, N, KEPT>(s, &q, q_tile, 0, k_tiles + at * KEYS * W);
            causal<false, M, N>(s, i_own, j0);
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int n = 0; n < N; n++)
                    UNROLL for (int e = 0; e < 4; e++) ds[m][n][e] = minus_inner[m][e / 2];   // where dP begins
            tile_scores<W, M, N, KEPT>(ds, &g, q_tile, LINES, v_tiles + at * KEYS * W);
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int n = 0; n < N; n++)
                    UNROLL for (int e = 0; e < 4; e++) ds[m][n][e] *= exp2_fast(s[m][n][e] * scale2 - lse2[m][e / 2]);
            tile_product<W, M, N>(dq, ds, k_tiles + at * KEYS * W);
        }
        cp_async_wait<0>();
        __syncthreads();                                 // as in the forward kernel
    }

    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int d = 0; d < W / 8; d++)
            UNROLL for (int e = 0; e < 4; e++) dq[m][d][e] *= scale;
    own_store<W, M>(head_of_qkv(dqkv, p, 0, T, C, HS), i_own, dq, q_tile);
}

// lse log2(e) and -inner of the next QUERIES queries, each of them by one of the first 2 QUERIES threads. Past T 0 will do, for
// dy is 0 there: P dy and ds are.
template <int QUERIES> struct QueryNumbers { const float *from; float factor; int left; };

template <int QUERIES>
static __device__ QueryNumbers<QUERIES> query_numbers(const float *lse, const float *inner, size_t start, int i0, int T) {
    const int x = (int)threadIdx.x, i = i0 + x % QUERIES;
    const bool first = x < QUERIES;
    return QueryNumbers<QUERIES>{(first ? lse : inner) + start + i, first ? 1.44269504f : -1, x < 2 * QUERIES ? T - i : 0};
}

template <int QUERIES> static __device__ float query_read(QueryNumbers<QUERIES> *x) {
    const float number = x->left > 0 ? *x->from * x->factor : 0;
    x->from += QUERIES, x->left -= QUERIES;
    return number;
}

template <int QUERIES> static __device__ void query_write(float *numbers, float number) {
    if ((int)threadIdx.x < 2 * QUERIES) numbers[threadIdx.x] = number;
}

// dV = P^T dy, dK = scale ds^T Q. Lines are keys here, so that P^T and ds^T are what the warp has.
template <int W, int M, int N, bool KEPT>
static __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
attention_backward_keys_kernel(bf16 *dqkv, const bf16 *dy, const bf16 *qkv, const float *lse, const float *inner, int T,
                               int C, int NH, float scale) {
    constexpr int LINES = 16 * M * ATTENTION_WARPS, QUERIES = 8 * N;
    static_assert(2 * QUERIES <= ATTENTION_THREADS, "query_numbers: a thread for each");
    SHARED(bf16, shared);                                // k and v (LINES,W); q and dy (2,QUERIES,W); numbers (2,2,QUERIES)
    bf16 *const q_tiles = shared + 2 * LINES * W, *const dy_tiles = q_tiles + 2 * QUERIES * W;
    float *const numbers = (float *)(void *)(dy_tiles + 2 * QUERIES * W);
    const int blocks = blocks_of(T, LINES), HS = C / NH, own = 16 * M * ((int)threadIdx.x / 32), lane = (int)threadIdx.x % 32;
    const AttentionPlace p = attention_place(blocks, NH);
    const int j0 = p.block * LINES, j_own = j0 + own;
    int i0 = j0 / QUERIES * QUERIES;                     // the first tile with a query that sees a key of the block
    TileSource<W> q = tile_source<W>(head_of_qkv(qkv, p, 0, T, C, HS), i0);
    TileSource<W> g = tile_source<W>(head_of_y(dy, p, T, C, HS), i0);
    const float scale2 = scale * 1.44269504f;
    QueryNumbers<QUERIES> source = query_numbers<QUERIES>(lse, inner, head_tokens(p, NH, T), i0, T);
    bf16 *const k_tile = shared + own * W;               // the warp's lines; those of v are LINES further
    OwnLines<W, M, KEPT> k, v;
    float dk[M][W / 8][4] = {}, dv[M][W / 8][4] = {};

    tile_load_own<LINES, W>(shared, head_of_qkv(qkv, p, 1, T, C, HS), j0);
    tile_load_own<LINES, W>(shared + LINES * W, head_of_qkv(qkv, p, 2, T, C, HS), j0);
    tile_load<QUERIES>(q_tiles, &q, 0);
    tile_load<QUERIES>(dy_tiles, &g, 0);
    cp_async_commit();
    query_write<QUERIES>(numbers, query_read(&source));
    cp_async_wait<0>();
    __syncthreads();
    own_keep<W, M, KEPT>(&k, k_tile, 0);
    own_keep<W, M, KEPT>(&v, k_tile, LINES);
    for (int at = 0; i0 < T; i0 += QUERIES, at ^= 1) {
        float next = 0;
        if (i0 + QUERIES < T) {
            tile_advance<QUERIES>(&q), tile_advance<QUERIES>(&g);
            tile_load<QUERIES>(q_tiles + (at ^ 1) * QUERIES * W, &q, 0);
            tile_load<QUERIES>(dy_tiles + (at ^ 1) * QUERIES * W, &g, 0);
            cp_async_commit();
            next = query_read(&source);
        }
        if (i0 + QUERIES > j_own) {                      // not too early for all keys of this warp
            float s[M][N][4] = {}, ds[M][N][4];
            tile_scores<W, M, N, KEPT>(s, &k, k_tile, 0, q_tiles + at * QUERIES * W);
            causal<true, M, N>(s, j_own, i0);
            const float *lse2 = numbers + at * 2 * QUERIES + lane % 4 * 2, *minus_inner = lse2 + QUERIES;
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int n = 0; n < N; n++)
                    UNROLL for (int e = 0; e < 4; e++) s[m][n][e] = exp2_fast(s[m][n][e] * scale2 - lse2[8 * n + e % 2]);
            tile_product<W, M, N>(dv, s, dy_tiles + at * QUERIES * W);
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int n = 0; n < N; n++)
                    UNROLL for (int e = 0; e < 4; e++) ds[m][n][e] = minus_inner[8 * n + e % 2];  // where dP begins
            tile_scores<W, M, N, KEPT>(ds, &v, k_tile, LINES, dy_tiles + at * QUERIES * W);
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int n = 0; n < N; n++)
                    UNROLL for (int e = 0; e < 4; e++) ds[m][n][e] *= s[m][n][e];
            tile_product<W, M, N>(dk, ds, q_tiles + at * QUERIES * W);
        }
        query_write<QUERIES>(numbers + (at ^ 1) * 2 * QUERIES, next);
        cp_async_wait<0>();
        __syncthreads();
    }

    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int d = 0; d < W / 8; d++)
            UNROLL for (int e = 0; e < 4; e++) dk[m][d][e] *= scale;
    own_store<W, M>(head_of_qkv(dqkv, p, 1, T, C, HS), j_own, dk, k_tile);
    own_store<W, M>(head_of_qkv(dqkv, p, 2, T, C, HS), j_own, dv, k_tile + LINES * W);
}

// inner (n,NH,T) = <dy, y> of each head of each token, by `lanes` threads, a power of 2; each takes SIZE numbers at once.
template <class N, int SIZE>
static __global__ void attention_inner_kernel(float *inner, const N *dy, const N *y, size_t heads, int T, int C, int NH,
                                              int lanes) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / lanes, HS = C / NH;     // head at % NH of a token
    const bool valid = at < heads;
    float sum = 0;
    for (size_t d = threadIdx.x % lanes * SIZE; valid && d < HS; d += lanes * SIZE) {
        if (SIZE > 1) {
            const Pack<N> a = pack_load(dy + at * HS + d), b = pack_load(y + at * HS + d);
            UNROLL for (int e = 0; e < SIZE; e++) sum += to_float(a.x[e]) * to_float(b.x[e]);
        } else sum += to_float(dy[at * HS + d]) * to_float(y[at * HS + d]);
    }
    for (int other = lanes / 2; other; other /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, other);
    const size_t token = at / NH;
    if (valid && threadIdx.x % lanes == 0) inner[(token / T * NH + at % NH) * T + token % T] = sum;
}

// ---- Attention by plain sums in fp32: any storage, heads of up to 256 ----
// The same walks with 256 threads, 16 by 16, on tiles of 4096 / W lines: thread (y, x) has lines y + 16 r and columns
// x + 16 c of the scores, and of the results columns 4 x + 64 c and three more. A line is in the hands of half a warp.

enum { PLAIN_THREADS = 256, PLAIN_TILE = 4096, PLAIN_PAD = 4 };        // padded lines: pieces of 8 lines in all banks

template <int W> struct Plain {
    enum { LINES = PLAIN_TILE / W, R = LINES / 16, LD = W + PLAIN_PAD, P_LD = LINES + PLAIN_PAD,
           TILE = LINES * LD, P_TILE = LINES * P_LD };
};

template <class N, int W> static __device__ void plain_load(float *tile, HeadLines<const N> x, int first) {
    for (int at = (int)threadIdx.x; at < PLAIN_TILE; at += PLAIN_THREADS) {
        const int line = at / W, d = at % W;
        const bool valid = first + line < x.T && d < x.HS;
        tile[line * Plain<W>::LD + d] = valid ? to_float(head_line(x, first + line)[d]) : 0;
    }
}

// s = a b^T, over the HS numbers of the lines.
template <int W, int R> static __device__ void plain_scores(float s[R][R], const float *a, const float *b, int HS) {
    constexpr int LD = Plain<W>::LD;
    a += (int)threadIdx.x / 16 * LD, b += (int)threadIdx.x % 16 * LD;
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < R; c++) s[r][c] = 0;
    for (int d = 0; d < HS; d += 4) {
        Pack<float> from_a[R], from_b[R];
        UNROLL for (int r = 0; r < R; r++) from_a[r] = pack_load(a + 16 * r * LD + d);
        UNROLL for (int c = 0; c < R; c++) from_b[c] = pack_load(b + 16 * c * LD + d);
        UNROLL for (int e = 0; e < 4; e++)
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int c = 0; c < R; c++) s[r][c] += from_a[r].x[e] * from_b[c].x[e];
    }
}

// The scores to where the other threads of their line read them.
template <int W, int R> static __device__ void plain_share(float *p, const float s[R][R]) {
    __syncwarp();
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < R; c++)
            p[((int)threadIdx.x / 16 + 16 * r) * Plain<W>::P_LD + (int)threadIdx.x % 16 + 16 * c] = s[r][c];
    __syncwarp();
}

// out (LINES,W) += p (LINES,LINES) tile (LINES,W)
template <int W, int R>
static __device__ void plain_product(float out[R][W / 64][4], const float *p, const float *tile) {
    constexpr int LD = Plain<W>::LD, P_LD = Plain<W>::P_LD;
    p += (int)threadIdx.x / 16 * P_LD, tile += (int)threadIdx.x % 16 * 4;
    for (int j = 0; j < Plain<W>::LINES; j += 4) {
        Pack<float> shares[R];
        UNROLL for (int r = 0; r < R; r++) shares[r] = pack_load(p + 16 * r * P_LD + j);
        UNROLL for (int e = 0; e < 4; e++)
            UNROLL for (int c = 0; c < W / 64; c++) {
                const Pack<float> line = pack_load(tile + (j + e) * LD + 64 * c);
                UNROLL for (int r = 0; r < R; r++)
                    UNROLL for (int l = 0; l < 4; l++) out[r][c][l] += shares[r].x[e] * line.x[l];
            }
    }
}

template <class N, int W, int R>
static __device__ void plain_store(HeadLines<N> x, int first, const float out[R][W / 64][4], const float factor[R]) {
    UNROLL for (int r = 0; r < R; r++) {
        const int i = first + (int)threadIdx.x / 16 + 16 * r;
        UNROLL for (int c = 0; c < W / 64; c++)
            UNROLL for (int l = 0; l < 4; l++) {
                const int d = (int)threadIdx.x % 16 * 4 + 64 * c + l;
                if (i < x.T && d < x.HS) head_line(x, i)[d] = from_float<N>(out[r][c][l] * factor[r]);
            }
    }
}

// softmax_tile on plain scores; a line is 16 threads.
template <int W, int R>
static __device__ void plain_softmax(float s[R][R], float out[R][W / 64][4], float top[R], float sum[R]) {
    UNROLL for (int r = 0; r < R; r++) {
        float high = top[r], total = 0;
        UNROLL for (int c = 0; c < R; c++) high = fmaxf(high, s[r][c]);
        UNROLL for (int other = 8; other; other /= 2) high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFF, high, other));
        const float shrink = expf(top[r] - high);
        UNROLL for (int c = 0; c < R; c++) total += s[r][c] = expf(s[r][c] - high);
        UNROLL for (int c = 0; c < W / 64; c++)
            UNROLL for (int l = 0; l < 4; l++) out[r][c][l] *= shrink;
        sum[r] = sum[r] * shrink + total;
        top[r] = high;
    }
}

template <class N, int W>
static __global__ void __launch_bounds__(PLAIN_THREADS, 1)
attention_forward_plain(N *y, float *lse, const N *qkv, int T, int C, int NH, float scale) {
    constexpr int LINES = Plain<W>::LINES, R = Plain<W>::R;
    SHARED(float, q);
    float *const k = q + Plain<W>::TILE, *const v = k + Plain<W>::TILE, *const shares = v + Plain<W>::TILE;
    const int blocks = blocks_of(T, LINES), HS = C / NH, line = (int)threadIdx.x / 16, column = (int)threadIdx.x % 16;
    const AttentionPlace p = attention_place(blocks, NH);
    const int i0 = (blocks - 1 - p.block) * LINES;
    float out[R][W / 64][4] = {}, top[R], sum[R] = {}, share[R];
    UNROLL for (int r = 0; r < R; r++) top[r] = -INFINITY;
    plain_load<N, W>(q, head_of_qkv(qkv, p, 0, T, C, HS), i0);
    for (int j0 = 0; j0 <= i0; j0 += LINES) {
        __syncthreads();                                 // all are done with the tiles before
        plain_load<N, W>(k, head_of_qkv(qkv, p, 1, T, C, HS), j0);
        plain_load<N, W>(v, head_of_qkv(qkv, p, 2, T, C, HS), j0);
        __syncthreads();
        float s[R][R];
        plain_scores<W, R>(s, q, k, HS);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < R; c++)
                s[r][c] = j0 + column + 16 * c <= i0 + line + 16 * r ? s[r][c] * scale : -INFINITY;
        plain_softmax<W, R>(s, out, top, sum);
        plain_share<W, R>(shares, s);
        plain_product<W, R>(out, shares, v);
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int other = 8; other; other /= 2) sum[r] += __shfl_xor_sync(0xFFFFFFFF, sum[r], other);
        share[r] = 1 / sum[r];
        const int i = i0 + line + 16 * r;
        if (column == 0 && i < T) lse[head_tokens(p, NH, T) + i] = top[r] + logf(sum[r]);
    }
    plain_store<N, W, R>(head_of_y(y, p, T, C, HS), i0, out, share);
}

template <class N, int W>
static __global__ void __launch_bounds__(PLAIN_THREADS, 1)
attention_backward_queries_plain(N *dqkv, const N *dy, const N *qkv, const float *lse, const float *inner, int T, int C, int NH,
                                 float scale) {
    constexpr int LINES = Plain<W>::LINES, R = Plain<W>::R;
    SHARED(float, q);
    float *const g = q + Plain<W>::TILE, *const k = g + Plain<W>::TILE, *const v = k + Plain<W>::TILE;
    float *const shares = v + Plain<W>::TILE;
    const int blocks = blocks_of(T, LINES), HS = C / NH, line = (int)threadIdx.x / 16, column = (int)threadIdx.x % 16;
    const AttentionPlace p = attention_place(blocks, NH);
    const int i0 = (blocks - 1 - p.block) * LINES;
    float dq[R][W / 64][4] = {}, lse_of[R], inner_of[R], factor[R];
    UNROLL for (int r = 0; r < R; r++) {
        const int i = i0 + line + 16 * r;
        const size_t at = head_tokens(p, NH, T) + i;
        lse_of[r] = i < T ? lse[at] : 0, inner_of[r] = i < T ? inner[at] : 0, factor[r] = scale;
    }
    plain_load<N, W>(q, head_of_qkv(qkv, p, 0, T, C, HS), i0);
    plain_load<N, W>(g, head_of_y(dy, p, T, C, HS), i0);
    for (int j0 = 0; j0 <= i0; j0 += LINES) {
        __syncthreads();
        plain_load<N, W>(k, head_of_qkv(qkv, p, 1, T, C, HS), j0);
        plain_load<N, W>(v, head_of_qkv(qkv, p, 2, T, C, HS), j0);
        __syncthreads();
        float s[R][R], ds[R][R];
        plain_scores<W, R>(s, q, k, HS);
        plain_scores<W, R>(ds, g, v, HS);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < R; c++) {
                const bool seen = j0 + column + 16 * c <= i0 + line + 16 * r;
                ds[r][c] = seen ? expf(s[r][c] * scale - lse_of[r]) * (ds[r][c] - inner_of[r]) : 0;
            }
        plain_share<W, R>(shares, ds);
        plain_product<W, R>(dq, shares, k);
    }
    plain_store<N, W, R>(head_of_qkv(dqkv, p, 0, T, C, HS), i0, dq, factor);
}

template <class N, int W>
static __global__ void __launch_bounds__(PLAIN_THREADS, 1)
attention_backward_keys_plain(N *dqkv, const N *dy, const N *qkv, const float *lse, const float *inner, int T, int C, int NH,
                              float scale) {
    constexpr int LINES = Plain<W>::LINES, R = Plain<W>::R;
    SHARED(float, k);
    float *const v = k + Plain<W>::TILE, *const q = v + Plain<W>::TILE, *const g = q + Plain<W>::TILE;
    float *const shares = g + Plain<W>::TILE;
    const int blocks = blocks_of(T, LINES), HS = C / NH, line = (int)threadIdx.x / 16, column = (int)threadIdx.x % 16;
    const AttentionPlace p = attention_place(blocks, NH);
    const int j0 = p.block * LINES;
    float dk[R][W / 64][4] = {}, dv[R][W / 64][4] = {}, factor[R], one[R];
    UNROLL for (int r = 0; r < R; r++) factor[r] = scale, one[r] = 1;
    lse += head_tokens(p, NH, T), inner += head_tokens(p, NH, T);
    plain_load<N, W>(k, head_of_qkv(qkv, p, 1, T, C, HS), j0);
    plain_load<N, W>(v, head_of_qkv(qkv, p, 2, T, C, HS), j0);
    for (int i0 = j0; i0 < T; i0 += LINES) {
        __syncthreads();
        plain_load<N, W>(q, head_of_qkv(qkv, p, 0, T, C, HS), i0);
        plain_load<N, W>(g, head_of_y(dy, p, T, C, HS), i0);
        __syncthreads();
        float s[R][R], ds[R][R];
        plain_scores<W, R>(s, k, q, HS);
        plain_scores<W, R>(ds, v, g, HS);
        UNROLL for (int c = 0; c < R; c++) {
            const int i = i0 + column + 16 * c;
            const float lse_of = i < T ? lse[i] : 0, inner_of = i < T ? inner[i] : 0;
            UNROLL for (int r = 0; r < R; r++) {
                const bool seen = i < T && j0 + line + 16 * r <= i;
                s[r][c] = seen ? expf(s[r][c] * scale - lse_of) : 0;
                ds[r][c] = s[r][c] * (ds[r][c] - inner_of);
            }
        }
        plain_share<W, R>(shares, s);
        plain_product<W, R>(dv, shares, g);
        plain_share<W, R>(shares, ds);
        plain_product<W, R>(dk, shares, q);
    }
    plain_store<N, W, R>(head_of_qkv(dqkv, p, 1, T, C, HS), j0, dk, factor);
    plain_store<N, W, R>(head_of_qkv(dqkv, p, 2, T, C, HS), j0, dv, one);
}

// ---- Attention: which kernel for which heads ----

// The shapes of one pass: kernels are launched for n NH heads, blocks of `lines` lines each.
typedef struct { size_t n, T, C, NH; cudaStream_t stream; } AttentionShape;

static unsigned attention_grid(const AttentionShape *a, size_t lines) {
    const size_t blocks = a->n * a->NH * ((a->T + lines - 1) / lines);
    CHECK(blocks <= INT_MAX, "%zu rows of %zu tokens and %zu heads in one launch", a->n, a->T, a->NH);
    return (unsigned)blocks;
}

static float attention_scale(const AttentionShape *a) { return (float)(1 / sqrt((double)(a->C / a->NH))); }

template <int W, int M, int N, bool KEPT>
static void attention_forward_mma(void *y, float *lse, const void *qkv, const AttentionShape *a) {
    constexpr size_t lines = 16 * M * ATTENTION_WARPS, shared = (lines + 4 * 8 * N) * W * sizeof(bf16);
    LAUNCH((attention_forward_kernel<W, M, N, KEPT>), attention_grid(a, lines), ATTENTION_THREADS, shared, a->stream, (bf16 *)y,
           lse, (const bf16 *)qkv, (int)a->T, (int)a->C, (int)a->NH, attention_scale(a));
}

template <int W, int M, int N, bool KEPT>
static void attention_backward_queries_mma(void *dqkv, const void *dy, const void *qkv, const float *lse, const float *inner,
                                           const AttentionShape *a) {
    constexpr size_t lines = 16 * M * ATTENTION_WARPS, shared = (2 * lines + 4 * 8 * N) * W * sizeof(bf16);
    LAUNCH((attention_backward_queries_kernel<W, M, N, KEPT>), attention_grid(a, lines), ATTENTION_THREADS, shared, a->stream,
           (bf16 *)dqkv, (const bf16 *)dy, (const bf16 *)qkv, lse, inner, (int)a->T, (int)a->C, (int)a->NH,
           attention_scale(a));
}

template <int W, int M, int N, bool KEPT>
static void attention_backward_keys_mma(void *dqkv, const void *dy, const void *qkv, const float *lse, const float *inner,
                                        const AttentionShape *a) {
    constexpr size_t lines = 16 * M * ATTENTION_WARPS;
    constexpr size_t shared = (2 * lines + 4 * 8 * N) * W * sizeof(bf16) + 4 * 8 * N * sizeof(float);
    LAUNCH((attention_backward_keys_kernel<W, M, N, KEPT>), attention_grid(a, lines), ATTENTION_THREADS, shared, a->stream,
           (bf16 *)dqkv, (const bf16 *)dy, (const bf16 *)qkv, lse, inner, (int)a->T, (int)a->C, (int)a->NH,
           attention_scale(a));
}

template <class N, int W>
static void attention_forward_plain_launch(void *y, float *lse, const void *qkv, const AttentionShape *a) {
    const size_t shared = (3 * Plain<W>::TILE + Plain<W>::P_TILE) * sizeof(float);
    LAUNCH((attention_forward_plain<N, W>), attention_grid(a, Plain<W>::LINES), PLAIN_THREADS, shared, a->stream, (N *)y, lse,
           (const N *)qkv, (int)a->T, (int)a->C, (int)a->NH, attention_scale(a));
}

template <class N, int W>
static void attention_backward_plain_launch(void *dqkv, const void *dy, const void *qkv, const float *lse, const float *inner,
                                            const AttentionShape *a) {
    const size_t shared = (4 * Plain<W>::TILE + Plain<W>::P_TILE) * sizeof(float);
    const unsigned grid = attention_grid(a, Plain<W>::LINES);
    LAUNCH((attention_backward_keys_plain<N, W>), grid, PLAIN_THREADS, shared, a->stream, (N *)dqkv, (const N *)dy,
           (const N *)qkv, lse, inner, (int)a->T, (int)a->C, (int)a->NH, attention_scale(a));
    LAUNCH((attention_backward_queries_plain<N, W>), grid, PLAIN_THREADS, shared, a->stream, (N *)dqkv, (const N *)dy,
           (const N *)qkv, lse, inner, (int)a->T, (int)a->C, (int)a->NH, attention_scale(a));
}

template <class N>
static void attention_forward_plainly(void *y, float *lse, const void *qkv, const AttentionShape *a) {
    const size_t HS = a->C / a->NH;
    if (HS <= 64) attention_forward_plain_launch<N, 64>(y, lse, qkv, a);
    else if (HS <= 128) attention_forward_plain_launch<N, 128>(y, lse, qkv, a);
    else attention_forward_plain_launch<N, 256>(y, lse, qkv, a);
}

template <class N>
static void attention_backward_plainly(void *dqkv, const void *dy, const void *qkv, const float *lse, const float *inner,
                                       const AttentionShape *a) {
    const size_t HS = a->C / a->NH;
    if (HS <= 64) attention_backward_plain_launch<N, 64>(dqkv, dy, qkv, lse, inner, a);
    else if (HS <= 128) attention_backward_plain_launch<N, 128>(dqkv, dy, qkv, lse, inner, a);
    else attention_backward_plain_launch<N, 256>(dqkv, dy, qkv, lse, inner, a);
}

template <class N>
static void attention_inner(float *inner, const void *dy, const void *y, const AttentionShape *a) {
    constexpr int SIZE = 16 / sizeof(N);
    const size_t heads = a->n * a->T * a->NH, HS = a->C / a->NH, whole = HS % SIZE == 0;
    size_t lanes = 1;
    while (lanes < 32 && lanes * (whole ? SIZE : 1) < HS) lanes *= 2;
    const size_t blocks = (heads * lanes + 255) / 256;
    CHECK(blocks <= INT_MAX, "%zu heads in one launch", heads);
    if (whole)
        LAUNCH((attention_inner_kernel<N, SIZE>), (unsigned)blocks, 256, 0, a->stream, inner, (const N *)dy, (const N *)y,
               heads, (int)a->T, (int)a->C, (int)a->NH, (int)lanes);
    else
        LAUNCH((attention_inner_kernel<N, 1>), (unsigned)blocks, 256, 0, a->stream, inner, (const N *)dy, (const N *)y,
               heads, (int)a->T, (int)a->C, (int)a->NH, (int)lanes);
}

// All pointers are 16-byte aligned; with in_bf16 qkv, y, dy and dqkv are bf16, else fp32.
static void attention_forward(void *y, float *lse, const void *qkv, size_t n, size_t T, size_t C, size_t NH, int in_bf16,
                              cudaStream_t stream) {
    const AttentionShape a = {n, T, C, NH, stream};
    const size_t HS = C / NH;
    CHECK(HS <= ATTENTION_WIDEST, "heads of %zu channels", HS);
    if (n == 0) return;
    if (in_bf16 && HS % 8 == 0 && HS <= 64) attention_forward_mma<64, 2, 8, true>(y, lse, qkv, &a);
    else if (in_bf16 && HS % 8 == 0 && HS <= 128) attention_forward_mma<128, 1, 8, true>(y, lse, qkv, &a);
    else if (in_bf16) attention_forward_plainly<bf16>(y, lse, qkv, &a);
    else attention_forward_plainly<float>(y, lse, qkv, &a);
}

// dqkv (n,T,3C) from dy (n,T,C); y and lse are attention_forward's. inner (n,NH,T) is room for <dy, y>.
static void attention_backward(void *dqkv, float *inner, const void *dy, const void *qkv, const void *y, const float *lse,
                               size_t n, size_t T, size_t C, size_t NH, int in_bf16, cudaStream_t stream) {
    const AttentionShape a = {n, T, C, NH, stream};
    const size_t HS = C / NH;
    CHECK(HS <= ATTENTION_WIDEST, "heads of %zu channels", HS);
    if (n == 0) return;
    if (in_bf16) attention_inner<bf16>(inner, dy, y, &a);
    else attention_inner<float>(inner, dy, y, &a);
    if (in_bf16 && HS % 8 == 0 && HS <= 64) {
        attention_backward_keys_mma<64, 1, 8, true>(dqkv, dy, qkv, lse, inner, &a);
        attention_backward_queries_mma<64, 2, 4, true>(dqkv, dy, qkv, lse, inner, &a);
    } else if (in_bf16 && HS % 8 == 0 && HS <= 128) {
        attention_backward_keys_mma<128, 1, 2, false>(dqkv, dy, qkv, lse, inner, &a);
        attention_backward_queries_mma<128, 1, 4, true>(dqkv, dy, qkv, lse, inner, &a);
    } else if (in_bf16) attention_backward_plainly<bf16>(dqkv, dy, qkv, lse, inner, &a);
    else attention_backward_plainly<float>(dqkv, dy, qkv, lse, inner, &a);
}
