// test_emu.cu: tests of dev/emu, which runs the GPU engine's kernels on the host, and of
// dev/model/cuda.h on it: correct kernels give what a GPU gives, wrong kernels are detected.

#include "../model/cuda.h"
#include "test.h"
#include "test_emu.h"

// ---- Shared by the tests ----

static void use_seed(int seed) {
    char text[16];
    snprintf(text, sizeof text, "%d", seed);
    setenv("EMU_SEED", text, 1);
}

template <class T> static T *device_new(size_t n) {
    T *p;
    CUDA_CHECK(cudaMalloc(&p, n * sizeof(T)));
    return p;
}
template <class T> static T *device_copy(const T *host, size_t n) {
    T *p = device_new<T>(n);
    CUDA_CHECK(cudaMemcpy(p, host, n * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}
template <class T> static void host_copy(T *host, const T *device, size_t n) {
    CUDA_CHECK(cudaMemcpy(host, device, n * sizeof(T), cudaMemcpyDeviceToHost));
}

// Small integers, so that sums are exact in any order.
static float small(int i) { return (float)(i * 37 % 17 - 8); }

// ---- Grids, shuffles, sums ----

// count[i]++ for thread i of the grid, whatever its shape; and the thread's indices.
static __global__ void count_threads(int *count, uint3 *seen) {
    BOUNDS(1024);
    const dim3 g = gridDim, b = blockDim;
    const unsigned block = (blockIdx.z * g.y + blockIdx.y) * g.x + blockIdx.x;
    const unsigned i = ((block * b.z + threadIdx.z) * b.y + threadIdx.y) * b.x + threadIdx.x;
    count[i]++;
    seen[i] = threadIdx;
}

void test_emu_grid(void) {
    static const unsigned shape[][6] = {{1, 1, 1, 1, 1, 1}, {7, 1, 1, 33, 1, 1}, {3, 2, 4, 5, 3, 2},
                                        {2, 5, 1, 1024, 1, 1}, {1, 1, 3, 1, 1, 64},
                                        {6, 6, 6, 1, 31, 1}};
    for (auto s : shape) {
        const size_t n = (size_t)s[0] * s[1] * s[2] * s[3] * s[4] * s[5];
        int *count = device_new<int>(n), *host = (int *)xcalloc(n, sizeof *host);
        uint3 *seen = device_new<uint3>(n);
        CUDA_CHECK(cudaMemset(count, 0, n * sizeof *count));
        LAUNCH(count_threads, dim3(s[0], s[1], s[2]), dim3(s[3], s[4], s[5]), 0, NULL, count, seen);
        host_copy(host, count, n);
        for (size_t i = 0; i < n; i++)
            EXPECT(host[i] == 1, "thread %zu of %zu ran %d times", i, n, host[i]);
        free(host);
        CUDA_CHECK(cudaFree(count));
        CUDA_CHECK(cudaFree(seen));
    }
}

// out (7,32): what each lane gets.
static __global__ void shuffles(int *out) {
    const int lane = (int)threadIdx.x;
    out[0 * 32 + lane] = __shfl_sync(0xffffffffu, 100 + lane, (lane * 5 + 3) & 31);
    out[1 * 32 + lane] = __shfl_xor_sync(0xffffffffu, 100 + lane, 7);
    out[2 * 32 + lane] = __shfl_down_sync(0xffffffffu, 100 + lane, 3);
    out[3 * 32 + lane] = __shfl_up_sync(0xffffffffu, 100 + lane, 3);
    out[4 * 32 + lane] = __shfl_sync(0xffffffffu, 100 + lane, 2, 8);
    out[5 * 32 + lane] = (int)__ballot_sync(0xffffffffu, lane % 3 == 0);
    if (lane < 8)
        out[6 * 32 + lane] = __shfl_down_sync(0xffu, 100 + lane, 1, 8) + __any_sync(0xffu,
            lane == 5);
    else
        out[6 * 32 + lane] = __all_sync(0xffffff00u, lane >= 8) + 2 * __any_sync(0xffffff00u,
            lane < 8);
}

void test_emu_shuffles(void) {
    int out[7 * 32], *device = device_new<int>(7 * 32);
    unsigned thirds = 0;
    for (int i = 0; i < 32; i += 3) thirds |= 1u << i;
    for (int seed = 1; seed < 6; seed++) {
        use_seed(seed);
        LAUNCH(shuffles, 1, 32, 0, NULL, device);
        host_copy(out, device, 7 * 32);
        for (int i = 0; i < 32; i++) {
            const int want[7] = {100 + ((i * 5 + 3) & 31), 100 + (i ^ 7),
                                 100 + (i < 29 ? i + 3 : i), 100 + (i < 3 ? i : i - 3),
                                 100 + i / 8 * 8 + 2, (int)thirds,
                                 i < 8 ? 101 + (i < 7 ? i + 1 : i) : 1};
            for (int k = 0; k < 7; k++)
                EXPECT(out[k * 32 + i] == want[k], "seed %d, step %d, lane %d: %d, want %d", seed,
                       k, i, out[k * 32 + i], want[k]);
        }
    }
    CUDA_CHECK(cudaFree(device));
}

// out (blocks,4): the sum and the maximum of each block's x (blockDim), twice with the same
// workspace.
static __global__ void sums(float *out, const float *x) {
    BOUNDS(1024);
    SHARED(float, work);
    const float v = x[blockIdx.x * blockDim.x + threadIdx.x];
    const float sum = block_sum(v, work), most = block_max(v, work), again = block_sum(2 * v, work);
    const float warp = warp_sum(v) + 0 * warp_max(v);
    if (threadIdx.x == blockDim.x - 1) {
        out[4 * blockIdx.x] = sum, out[4 * blockIdx.x + 1] = most, out[4 * blockIdx.x + 2] = again;
        out[4 * blockIdx.x + 3] = warp;
    }
}

void test_emu_sums(void) {
    enum { BLOCKS = 5, MOST = 1024 };
    static const int sizes[] = {32, 64, 96, 256, 1024};
    float x[BLOCKS * MOST], out[4 * BLOCKS], *to = device_new<float>(4 * BLOCKS);
    for (int i = 0; i < BLOCKS * MOST; i++) x[i] = small(i) / 16;
    float *from = device_copy(x, BLOCKS * MOST);
    for (int n : sizes)
        for (int seed = 1; seed < 4; seed++) {
            use_seed(seed);
            LAUNCH(sums, BLOCKS, n, 32 * sizeof(float), NULL, to, from);
            host_copy(out, to, 4 * BLOCKS);
            for (int b = 0; b < BLOCKS; b++) {
                double sum = 0, most = -1e30, warp = 0;
                for (int i = 0; i < n; i++) sum += x[b * n + i], most = fmax(most, x[b * n + i]);
                for (int i = n - 32; i < n; i++) warp += x[b * n + i];
                EXPECT(out[4 * b] == sum && out[4 * b + 1] == most && out[4 * b + 2] == 2 * sum &&
                       out[4 * b + 3] == warp,
                       "%d threads: sum %g, most %g, twice %g, of a warp %g; want %g, %g, %g", n,
                       out[4 * b], out[4 * b + 1], out[4 * b + 2], out[4 * b + 3], sum, most, warp);
            }
        }
    CUDA_CHECK(cudaFree(from));
    CUDA_CHECK(cudaFree(to));
}

// ---- Barriers ----

// y = x reversed within the block, through shared memory; without the barrier a thread may read
// before another has written.
template <int barrier> static __global__ void reverse(float *y, const float *x) {
    SHARED(float, s);
    s[threadIdx.x] = x[threadIdx.x];
    if (barrier == 1) __syncthreads();
    if (barrier == 2) __syncwarp();
    y[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}

// s is used twice; the barrier between the uses keeps a thread from overwriting what another has
// yet to read.
template <int barrier> static __global__ void twice(float *y, const float *x) {
    SHARED(float, s);
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    const float first = s[blockDim.x - 1 - threadIdx.x];
    if (barrier) __syncthreads();
    s[threadIdx.x] = first + 1;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x ^ 1];
}

enum { N = 128 };

// How many of some seeds give y[i] = want[i].
template <class K> static int seeds_that_agree(K kernel, const float *x, const float *want,
                                               int threads) {
    float got[N], *to = device_new<float>(N), *from = device_copy(x, N);
    int agree = 0;
    for (int seed = 1; seed <= 8; seed++) {
        use_seed(seed);
        LAUNCH(kernel, 1, threads, N * sizeof(float), NULL, to, from);
        host_copy(got, to, (size_t)threads);
        agree += !memcmp(got, want, (size_t)threads * sizeof *got);
    }
    CUDA_CHECK(cudaFree(to));
    CUDA_CHECK(cudaFree(from));
    return agree;
}

void test_emu_barrier_missing(void) {
    float x[N], reversed[N], both[N], of_warp[32];
    for (int i = 0; i < N; i++) x[i] = (float)i;
    for (int i = 0; i < N; i++) reversed[i] = x[N - 1 - i], both[i] = x[N - 1 - (i ^ 1)] + 1;
    for (int i = 0; i < 32; i++) of_warp[i] = x[31 - i];
    int agree = seeds_that_agree(reverse<1>, x, reversed, N);
    EXPECT(agree == 8, "with the barrier %d of 8 seeds are right", agree);
    agree = seeds_that_agree(reverse<0>, x, reversed, N);
    EXPECT(agree == 0, "without the barrier %d of 8 seeds are right", agree);
    agree = seeds_that_agree(reverse<2>, x, reversed, N);
    EXPECT(agree == 0, "with a barrier of the warp only, %d of 8 seeds are right", agree);
    agree = seeds_that_agree(reverse<2>, x, of_warp, 32);
    EXPECT(agree == 8, "with a barrier of the warp, which is the block, %d of 8 seeds are right",
           agree);
    agree = seeds_that_agree(reverse<0>, x, of_warp, 32);
    EXPECT(agree == 0, "without a barrier of the warp %d of 8 seeds are right", agree);
    agree = seeds_that_agree(twice<1>, x, both, N);
    EXPECT(agree == 8, "with the second barrier %d of 8 seeds are right", agree);
    agree = seeds_that_agree(twice<0>, x, both, N);
    EXPECT(agree < 8, "without the second barrier %d of 8 seeds are right", agree);
}

enum { EXIT_EARLY, SOME_ONLY, OTHER_PLACE, ONE_LOOP_MORE, BARRIER_AND_SHUFFLE };

static __global__ void divergent(int how, int *out) {
    const int t = (int)threadIdx.x;
    if (how == EXIT_EARLY && t == 37) return;
    if (how == SOME_ONLY && t < 32) __syncthreads();
    if (how == OTHER_PLACE) {
        if (t < 32) __syncthreads();
        else __syncthreads();
    }
    if (how == ONE_LOOP_MORE)
        for (int i = 0; i < 3 + (t >= 32); i++) __syncthreads();
    if (how == BARRIER_AND_SHUFFLE && t == 5) __syncthreads();
    else if (how == BARRIER_AND_SHUFFLE) out[t] = __shfl_xor_sync(0xffffffffu, t, 1);
    __syncthreads();
    out[t] = t;
}
static void run_divergent(void *how) {
    LAUNCH(divergent, 2, 64, 0, NULL, *(int *)how, device_new<int>(64));
    fprintf(stderr, "not found out\n");
}

void test_emu_barrier_divergent(void) {
    static const struct { int how; const char *part; } wrong[] = {
        {EXIT_EARLY, "is reached by 63 of the block's 64 threads"}, {SOME_ONLY, "__syncthreads at"},
        {OTHER_PLACE, "while others of the block are in the one at line"},
        {ONE_LOOP_MORE, "__syncthreads at"},
        {BARRIER_AND_SHUFFLE, "__syncthreads at"}};
    for (auto w : wrong) EXPECT_EXIT_EMULATED(1, w.part, run_divergent, &w.how);
    int how = EXIT_EARLY;
    EXPECT_EXIT_EMULATED(1, "kernel divergent, block (", run_divergent, &how);
    EXPECT_EXIT_EMULATED(1, "thread (37,0,0) has exited", run_divergent, &how);
}

enum { LANE_EXITS, LANE_ELSEWHERE, MASK_LACKS_SELF, HALF_WARP, MMA_LANE, SOURCE_OUTSIDE };

static __global__ void lanes_missing(int how, int *out) {
    const int t = (int)threadIdx.x;
    if (how == LANE_EXITS && t == 9) return;
    if (how == LANE_ELSEWHERE && t == 9) __syncwarp();
    if (how == MASK_LACKS_SELF) __shfl_sync(0xfffffdffu, t, 0);
    if (how == MMA_LANE && t != 9) {
        float d[4] = {0, 0, 0, 0};
        const uint32_t a[4] = {0, 0, 0, 0}, b[2] = {0, 0};
        mma_bf16(d, a, b);
    }
    if (how == SOURCE_OUTSIDE && t < 16) out[t] = __shfl_sync(0xffffu, t, 20);
    out[t] = __shfl_xor_sync(0xffffffffu, t, 1);
}
static void run_lanes_missing(void *how) {
    LAUNCH(lanes_missing, 1, *(int *)how == HALF_WARP ? 16 : 32, 0, NULL, *(int *)how,
           device_new<int>(32));
    fprintf(stderr, "not found out\n");
}

void test_emu_lanes_missing(void) {
    static const struct { int how; const char *part; } wrong[] = {
        {LANE_EXITS, "reached by only 31 lanes of its warp"}, {LANE_ELSEWHERE, "__syncwarp"},
        {MASK_LACKS_SELF, "mask fffffdff lacks the calling lane"},
        {HALF_WARP, "but this warp has only 0000ffff"}, {MMA_LANE, "mma_bf16"},
        {SOURCE_OUTSIDE, "reads lane 20, which is not in the mask"}};
    for (auto w : wrong) EXPECT_EXIT_EMULATED(1, w.part, run_lanes_missing, &w.how);
}

// ---- Memory ----

static __global__ void touch_shared(int at) {
    SHARED(float, s);
    s[at] = 1;
}
static void run_touch_shared(void *at) {
    LAUNCH(touch_shared, 1, 1, 100 * sizeof(float), NULL, *(int *)at);
    fprintf(stderr, "not found out\n");
}

static __global__ void read_shared(float *out) {
    SHARED(float, s);
    out[threadIdx.x] = s[threadIdx.x];
}

void test_emu_shared_bounds(void) {
    int inside = 99, after = 100, before = -1;
    EXPECT_EXIT_EMULATED(0, "not found out", run_touch_shared, &inside);
    EXPECT_EXIT_EMULATED(1, EMU_ASAN ? "AddressSanitizer: heap-buffer-overflow"
                         : "kernel touch_shared", run_touch_shared, &after);
    EXPECT_EXIT_EMULATED(1, EMU_ASAN ? "AddressSanitizer: heap-buffer-overflow" : "before the 400 "
                         "bytes of shared memory",
                run_touch_shared, &before);
    float out[64], *device = device_new<float>(64);
    LAUNCH(read_shared, 2, 64, 64 * sizeof(float), NULL, device);
    host_copy(out, device, 64);
    for (int i = 0; i < 64; i++) EXPECT(isnan(out[i]), "shared memory begins as %g", out[i]);
    CUDA_CHECK(cudaFree(device));
}

static __global__ void touch(float *x, int at) { x[at] = 1; }
static void run_touch(void *at) {
    float *x = device_new<float>(100);
    LAUNCH(touch, 1, 1, 0, NULL, x, *(int *)at);
    CUDA_CHECK(cudaDeviceSynchronize());
    fprintf(stderr, "not found out\n");
}
static void run_touch_host(void *) {
    float host[4] = {0};
    LAUNCH(touch, 1, 1, 0, NULL, host, 0);
}
static void run_touch_freed(void *) {
    float *x = device_new<float>(4);
    CUDA_CHECK(cudaFree(x));
    LAUNCH(touch, 1, 1, 0, NULL, x, 0);
}
static void run_touch_nothing(void *) { LAUNCH(touch, 1, 1, 0, NULL, (float *)NULL, 0); }
static __global__ void load_pack(float *x, int at) { pack_store(x, pack_load(x + at)); }
static void run_load_pack(void *at) {
    LAUNCH(load_pack, 1, 1, 0, NULL, device_new<float>(64), *(int *)at);
    fprintf(stderr, "not found out\n");
}

void test_emu_global_bounds(void) {
    int inside = 99, after = 100, before = -1, four = 4, five = 5;
    EXPECT_EXIT_EMULATED(0, "not found out", run_touch, &inside);
    EXPECT_EXIT_EMULATED(1, EMU_ASAN ? "AddressSanitizer: heap-buffer-overflow" : "beyond the 400 "
                         "bytes of memory", run_touch, &after);
    EXPECT_EXIT_EMULATED(1, EMU_ASAN ? "AddressSanitizer: heap-buffer-overflow" : "before the 400 "
                         "bytes of memory", run_touch, &before);
    EXPECT_EXIT_EMULATED(1, "does not point to device memory", run_touch_host, NULL);
    EXPECT_EXIT_EMULATED(1, "does not point to device memory", run_touch_freed, NULL);
    if (!EMU_ASAN)
        EXPECT_EXIT_EMULATED(1, "kernel touch, block (0,0,0), thread (0,0,0): signal 11",
                             run_touch_nothing, NULL);
    EXPECT_EXIT_EMULATED(0, "not found out", run_load_pack, &four);
    EXPECT_EXIT_EMULATED(1, "kernel load_pack, block (0,0,0), thread (0,0,0): pack_load at",
                         run_load_pack, &five);
    float x[100], *device = device_new<float>(100);
    host_copy(x, device, 100);
    for (float v : x) EXPECT(isnan(v), "device memory begins as %g", v);
    CUDA_CHECK(cudaFree(device));
}

enum { TO_HOST, TOO_LONG, FROM_HOST, WRONG_WAY, MEMSET_LONG, FREE_OTHER, FREE_MIDDLE, TOO_MUCH };

static void run_copy(void *how) {
    float host[8], *device = device_new<float>(8);
    const size_t size = sizeof host;
    switch (*(int *)how) {
    case TO_HOST: CUDA_CHECK(cudaMemcpy(host, host, size, cudaMemcpyHostToDevice)); break;
    case TOO_LONG: CUDA_CHECK(cudaMemcpy(device + 1, host, size, cudaMemcpyHostToDevice)); break;
    case FROM_HOST: CUDA_CHECK(cudaMemcpyAsync(device, host, size, cudaMemcpyDeviceToDevice, NULL));
        break;
    case WRONG_WAY: CUDA_CHECK(cudaMemcpyAsync(host, device, size, cudaMemcpyHostToDevice, NULL));
        break;
    case MEMSET_LONG: CUDA_CHECK(cudaMemsetAsync(device, 0, size + 1, NULL)); break;
    case FREE_OTHER: CUDA_CHECK(cudaFree(host)); break;
    case FREE_MIDDLE: CUDA_CHECK(cudaFree(device + 1)); break;
    case TOO_MUCH: CUDA_CHECK(cudaMalloc(&device, (size_t)1 << 50)); break;
    }
    fprintf(stderr, "not found out\n");
}

void test_emu_copies_checked(void) {
    static const struct { int how; const char *part; } wrong[] = {
        {TO_HOST, "which is not device memory"}, {TOO_LONG, "runs out of its allocation"},
        {FROM_HOST, "invalid argument"}, {WRONG_WAY, "invalid argument"},
        {MEMSET_LONG, "invalid argument"}, {FREE_OTHER, "which was not allocated"},
        {FREE_MIDDLE, "which was not allocated"}, {TOO_MUCH, "out of memory\n  hint: "}};
    for (auto w : wrong) EXPECT_EXIT_EMULATED(1, w.part, run_copy, &w.how);
}

static __global__ void nothing(int) { BOUNDS(1024); }
static void run_shape(void *shape) {
    const unsigned *s = (const unsigned *)shape;
    LAUNCH(nothing, dim3(s[0], s[1], s[2]), dim3(s[3], s[4], s[5]), s[6], NULL, 0);
    fprintf(stderr, "not found out\n");
}

void test_emu_launch_limits(void) {
    static unsigned right[][7] = {{1, 1, 1, 1024, 1, 1, 0}, {1, 1, 1, 1, 1, 1, 227 << 10},
                                  {1, 1, 65535, 1, 1, 1, 0}};
    static unsigned wrong[][7] = {{0, 1, 1, 32, 1, 1, 0}, {1, 1, 1, 0, 1, 1, 0},
                                  {1, 1, 1, 1025, 1, 1, 0}, {1, 1, 1, 512, 3, 1, 0},
                                  {1, 65536, 1, 32, 1, 1, 0}, {1, 1, 65536, 32, 1, 1, 0},
                                  {1, 1, 1, 1, 1, 65, 0}, {1, 1, 1, 32, 1, 1, (227 << 10) + 1}};
    for (auto s : right) EXPECT_EXIT_EMULATED(0, "not found out", run_shape, s);
    for (auto s : wrong) EXPECT_EXIT_EMULATED(1, "error: kernel nothing, grid (", run_shape, s);
}

// ---- What a device refuses but the host could do ----

static void run_forked(void *call) {
    int n;
    if (*(int *)call == 0) CUDA_CHECK(cudaGetDeviceCount(&n));
    if (*(int *)call == 1) device_new<float>(1);
    if (*(int *)call == 2) LAUNCH(nothing, 1, 32, 0, NULL, 0);
    if (*(int *)call == 3) CUDA_CHECK(cudaDeviceSynchronize());
    fprintf(stderr, "not found out\n");
}

// A child of a process that has used CUDA cannot use it: its first call is refused, whichever it
// is.
void test_emu_forked(void) {
    CUDA_CHECK(cudaDeviceSynchronize());
    for (int call = 0; call < 4; call++) EXPECT_EXIT(1, "initialization error", run_forked, &call);
}

// A launch with `shared` bytes, having opted in to `opted`, on a device of `capability`.
struct OptIn { const char *capability; int opted; size_t shared; };
static void run_opt_in(void *arg) {
    const OptIn *o = (const OptIn *)arg;
    setenv("EMU_CAPABILITY", o->capability, 1);
    if (o->opted)
        CUDA_CHECK(cudaFuncSetAttribute((const void *)nothing,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, o->opted));
    CUDA_CHECK(emu_launch("nothing", nothing, 1, 1, o->shared, NULL, 0));
    fprintf(stderr, "not found out\n");
}

void test_emu_opt_in(void) {
    static OptIn right[] = {{"90", 0, 48 << 10}, {"90", 64 << 10, 64 << 10},
                            {"80", 163 << 10, 163 << 10},
                            {"89", 99 << 10, 99 << 10}};
    static OptIn refused[] = {{"90", 0, (48 << 10) + 1}, {"90", 64 << 10, (64 << 10) + 1}};
    static OptIn too_much[] = {{"90", (227 << 10) + 1, 0}, {"89", 100 << 10, 0},
                               {"80", 164 << 10, 0}};
    for (auto &o : right) EXPECT_EXIT_EMULATED(0, "not found out", run_opt_in, &o);
    for (auto &o : refused) EXPECT_EXIT_EMULATED(1, "cudaFuncSetAttribute allows", run_opt_in, &o);
    for (auto &o : too_much)
        EXPECT_EXIT_EMULATED(1, "of shared memory, where a block has", run_opt_in, &o);
}

static __global__ void bounded(int threads) {
    if (threads) BOUNDS((unsigned)threads);
}
static void run_bounded(void *arg) {
    const int *bound_and_threads = (const int *)arg;
    LAUNCH(bounded, 1, (unsigned)bound_and_threads[1], 0, NULL, bound_and_threads[0]);
    fprintf(stderr, "not found out\n");
}

// More threads than the launch bounds; without bounds, more than can start whatever registers each
// uses.
void test_emu_bounds(void) {
    int right[][2] = {{0, 256}, {128, 128}, {1024, 1024}}, beyond[] = {128, 129},
        without[] = {0, 257};
    for (auto &r : right) EXPECT_EXIT_EMULATED(0, "not found out", run_bounded, r);
    EXPECT_EXIT_EMULATED(1, "129 threads, where the launch bounds allow 128", run_bounded, beyond);
    EXPECT_EXIT_EMULATED(1, "it needs launch bounds", run_bounded, without);
}

// ---- Asynchronous copies ----

enum {
    COPY_RIGHT, COPY_NO_WAIT, COPY_WAIT_SOME, COPY_NO_BARRIER, COPY_NEVER, COPY_MISALIGNED,
        COPY_TO_GLOBAL, COPY_FROM_SHARED
};

// y (3,4n) = two groups of copies through shared memory: first one, then the other; then zeros in
// place of the first.
static __global__ void copy_async(int how, float *y, const float *x) {
    SHARED(float, s);
    const int t = (int)threadIdx.x, n = (int)blockDim.x, other = n - 1 - t;
    float *mine = s + 4 * t;
    cp_async16(mine, how == COPY_MISALIGNED ? x + 4 * t + 1 : how == COPY_FROM_SHARED ? s : x +
               4 * t, true);
    cp_async_commit();
    cp_async16(how == COPY_TO_GLOBAL ? y : mine + 4 * n, x + 4 * (n + t), true);
    cp_async_commit();
    if (how == COPY_NEVER) return;
    if (how != COPY_NO_WAIT) cp_async_wait<1>();
    if (how != COPY_NO_BARRIER) __syncthreads();
    for (int i = 0; i < 4; i++) y[4 * other + i] = s[4 * other + i];
    if (how != COPY_WAIT_SOME) cp_async_wait<0>();
    __syncthreads();
    for (int i = 0; i < 4; i++) y[4 * (n + other) + i] = s[4 * (n + other) + i];
    cp_async16(mine, NULL, false);
    cp_async_commit();
    cp_async_wait<0>();
    for (int i = 0; i < 4; i++) y[4 * (2 * n + t) + i] = mine[i];
}

// 1 if y is correct.
static int copy_async_right(int how, int seed) {
    float x[2 * N], y[3 * N], *from, *to = device_new<float>(3 * N);
    for (int i = 0; i < 2 * N; i++) x[i] = (float)i;
    from = device_copy(x, 2 * N);
    use_seed(seed);
    LAUNCH(copy_async, 1, N / 4, 2 * N * sizeof(float), NULL, how, to, from);
    host_copy(y, to, 3 * N);
    int right = !memcmp(y, x, sizeof x);
    for (int i = 0; i < N; i++) right = right && y[2 * N + i] == 0;
    CUDA_CHECK(cudaFree(to));
    CUDA_CHECK(cudaFree(from));
    return right;
}

static void run_copy_async(void *how) {
    copy_async_right(*(int *)how, 1);
    fprintf(stderr, "not found out\n");
}

void test_emu_cp_async(void) {
    for (int seed = 1; seed < 6; seed++) {
        EXPECT(copy_async_right(COPY_RIGHT, seed), "seed %d: what was copied is wrong", seed);
        EXPECT(!copy_async_right(COPY_NO_WAIT, seed), "seed %d: right without the first wait",
               seed);
        EXPECT(!copy_async_right(COPY_WAIT_SOME, seed), "seed %d: right without the second wait",
               seed);
        EXPECT(!copy_async_right(COPY_NO_BARRIER, seed), "seed %d: right without the barrier",
               seed);
    }
}

void test_emu_cp_async_wrong(void) {
    static const struct { int how; const char *part; } wrong[] = {
        {COPY_NEVER, "exits with 2 asynchronous copies"},
        {COPY_MISALIGNED, "of device memory, aligned"},
        {COPY_TO_GLOBAL, "is not in the block's 1024 bytes of shared memory"},
        {COPY_FROM_SHARED, "of device memory"}};
    for (auto w : wrong) EXPECT_EXIT_EMULATED(1, w.part, run_copy_async, &w.how);
}

// ---- Tensor cores ----

// d (16,8) += a (16,16) b (16,8) by one warp, with each lane's elements as in the figures of the
// PTX ISA ("Matrix Fragments for mma.m16n8k16 with floating point type"): i counts a lane's
// elements.
static __global__ void mma_by_figures(float *d, const bf16 *a, const bf16 *b) {
    const int group = (int)threadIdx.x >> 2, in_group = (int)threadIdx.x % 4;
    uint32_t ra[4], rb[2];
    float rd[4];
    for (int i = 0; i < 8; i++) {
        const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8,
            column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
        const uint32_t bits = __bfloat16_as_ushort(a[row * 16 + column]);
        ra[i / 2] = i % 2 ? ra[i / 2] | bits << 16 : bits;
    }
    for (int i = 0; i < 4; i++) {
        const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8), column = group;
        const uint32_t bits = __bfloat16_as_ushort(b[row * 8 + column]);
        rb[i / 2] = i % 2 ? rb[i / 2] | bits << 16 : bits;
    }
    for (int i = 0; i < 4; i++) rd[i] = d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
    mma_bf16(rd, ra, rb);
    for (int i = 0; i < 4; i++) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = rd[i];
}

// The same with a (16,16) and b (16,16), whose left half is the first matmul's, through ldmatrix:
// a's four matrices are the registers of a fragment; b is transposed by the load, or given
// transposed. d (16,16).
template <int transposed> static __global__ void mma_by_ldmatrix(float *d, const bf16 *a,
                                                                 const bf16 *b) {
    SHARED(bf16, s);
    const int lane = (int)threadIdx.x;
    for (int i = lane; i < 256; i += 32) {
        s[i] = a[i];
        s[256 + i] = transposed ? b[i % 16 * 16 + i / 16] : b[i];
    }
    __syncwarp();
    uint32_t ra[4], rb[4];
    ldmatrix_x4(ra, s + (lane % 8 + lane / 8 % 2 * 8) * 16 + lane / 16 * 8);
    if (transposed) ldmatrix_x4(rb, s + 256 + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
    else ldmatrix_x4_trans(rb, s + 256 + (lane % 8 + lane / 8 % 2 * 8) * 16 + lane / 16 * 8);
    for (int half = 0; half < 2; half++) {
        float rd[4] = {0, 0, 0, 0};
        mma_bf16(rd, ra, rb + 2 * half);
        for (int i = 0; i < 4; i++)
            d[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = rd[i];
    }
}

void test_emu_mma(void) {
    bf16 a[256], b[256], left[128];
    float d[128], got[128], wide[256];
    for (int i = 0; i < 256; i++)
        a[i] = from_float<bf16>(small(i)), b[i] = from_float<bf16>(small(7 * i + 3));
    for (int i = 0; i < 128; i++) d[i] = small(5 * i), left[i] = b[i / 8 * 16 + i % 8];
    bf16 *da = device_copy(a, 256), *db = device_copy(b, 256), *dleft = device_copy(left, 128);
    float *dd = device_copy(d, 128), *dwide = device_new<float>(256);
    LAUNCH(mma_by_figures, 1, 32, 0, NULL, dd, da, dleft);
    host_copy(got, dd, 128);
    for (int way = 0; way < 2; way++) {
        if (way) LAUNCH(mma_by_ldmatrix<1>, 1, 32, 1024, NULL, dwide, da, db);
        else LAUNCH(mma_by_ldmatrix<0>, 1, 32, 1024, NULL, dwide, da, db);
        host_copy(wide, dwide, 256);
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 16; j++) {
                float want = 0;
                for (int k = 0; k < 16; k++)
                    want += to_float(a[i * 16 + k]) * to_float(b[k * 16 + j]);
                EXPECT(wide[i * 16 + j] == want, "way %d, (%d,%d): %g, want %g", way, i, j,
                       wide[i * 16 + j], want);
                const float more = j < 8 ? got[i * 8 + j] - d[i * 8 + j] : want;
                EXPECT(more == want, "(%d,%d): %g, want %g", i, j, more, want);
            }
    }
    CUDA_CHECK(cudaFree(da));
    CUDA_CHECK(cudaFree(db));
    CUDA_CHECK(cudaFree(dleft));
    CUDA_CHECK(cudaFree(dd));
    CUDA_CHECK(cudaFree(dwide));
}

// out (2,32,4): the registers of plain and transposed loads of four matrices whose elements are 64
// j + 8 row + column.
static __global__ void load_matrices(uint32_t *out, int wrong) {
    SHARED(unsigned short, s);
    const int lane = (int)threadIdx.x;
    for (int i = lane; i < 256; i += 32) s[i] = (unsigned short)i;
    __syncwarp();
    ldmatrix_x4(out + 4 * lane, s + 8 * lane + wrong);
    ldmatrix_x4_trans(out + 4 * (32 + lane), s + 8 * lane);
}
static void run_load_matrices(void *wrong) {
    LAUNCH(load_matrices, 1, 32, 512, NULL, device_new<uint32_t>(256), *(int *)wrong);
}

// Tensor cores truncate where an fp32 sum would round: bits below the 25 of the largest term,
// always toward zero.
void test_emu_mma_sum(void) {
    const float tiny = ldexpf(1, -25), small[] = {tiny, tiny, tiny, tiny},
        half[] = {2 * tiny, 2 * tiny};
    const float minus[] = {-tiny, 0}, three[] = {3 * tiny, 0}, inf[] = {INFINITY, 1};
    EXPECT(emu_mma_sum(0, small, 4) == 4 * tiny, "small numbers alone are %g",
           emu_mma_sum(0, small, 4));
    EXPECT(emu_mma_sum(1, small, 4) == 1, "what is below one is not cut off: %.9g",
           emu_mma_sum(1, small, 4));
    EXPECT(emu_mma_sum(1, half, 2) == 1 + 4 * tiny, "two halves of the last bit are %.9g",
           emu_mma_sum(1, half, 2));
    EXPECT(emu_mma_sum(1, three, 2) == 1, "3/4 of the last bit are %.9g", emu_mma_sum(1, three, 2));
    EXPECT(emu_mma_sum(-1, minus, 2) == -1, "not toward zero: %.9g", emu_mma_sum(-1, minus, 2));
    EXPECT(isinf(emu_mma_sum(1, inf, 2)), "infinity is %g", emu_mma_sum(1, inf, 2));
    for (float x = -3; x < 3; x += 0.01f) {
        const double e = (double)emu_inexact(exp2f(x), 22) / (double)exp2f(x) - 1;
        EXPECT(fabs(e) <= ldexp(1, -22) + ldexp(1, -24), "2^%g is wrong by %g", x, e);
    }
}

// The kernels stay within their tolerances if sums, exponentials and tanh are as inexact as on
// hardware; if each number of rows has its own order of summation; and with the shared memory of
// other devices.
void test_emu_hardware(void) {
    static const char *const run[][2] = {
        {"EMU_ERRORS=1", "cuda_matmuls cuda_softmax_loss cuda_layernorm_backward "
         "cuda_attention_bf16"},
        {"EMU_ROWS=1", "cuda_matmuls cuda_classifier_chunks"},
        {"EMU_CAPABILITY=89", "cuda_layernorm_backward cuda_attention_wide_heads"}};
    for (auto mode : run) {
        ToolRun r = shell_runf("%s %s/test_gpt %s", mode[0], test_build(), mode[1]);
        EXPECT(r.code == 0, "%s: %s", mode[0], r.out.s);
        tool_free(&r);
    }
}

void test_emu_ldmatrix(void) {
    uint32_t out[256], *device = device_new<uint32_t>(256);
    LAUNCH(load_matrices, 1, 32, 512, NULL, device, 0);
    host_copy(out, device, 256);
    for (int lane = 0; lane < 32; lane++)
        for (int j = 0; j < 4; j++) {
            // row, column of the figure
            const uint32_t low = (uint32_t)(64 * j + 8 * (lane / 4) + lane % 4 * 2);
            const uint32_t transposed = (uint32_t)(64 * j + 8 * (lane % 4 * 2) + lane / 4);
            const uint32_t plain = out[4 * lane + j], trans = out[4 * (32 + lane) + j];
            EXPECT(plain == ((low + 1) << 16 | low), "lane %d, matrix %d: %08x", lane, j, plain);
            EXPECT(trans == ((transposed + 8) << 16 | transposed),
                   "lane %d, matrix %d transposed: %08x", lane, j, trans);
        }
    CUDA_CHECK(cudaFree(device));
    int misaligned = 1, outside = 8;
    EXPECT_EXIT_EMULATED(1, "is not a multiple of 16", run_load_matrices, &misaligned);
    EXPECT_EXIT_EMULATED(1, "is not in the block's 512 bytes of shared memory", run_load_matrices,
                         &outside);
}

// ---- bf16 ----

void test_emu_bf16(void) {
    for (uint32_t half = 0; half < 65536; half++) {
        const float value = to_float(__ushort_as_bfloat16((unsigned short)half));
        const unsigned short back = __bfloat16_as_ushort(from_float<bf16>(value));
        EXPECT(isnan(value) ? back == 0x7fff : back == half, "%04x became %04x", half, back);
    }
    // A value between two neighbours rounds to the nearer one, a midpoint to the even one.
    for (uint32_t half = 0; half < 0x7f80; half++)
        for (uint32_t low = 0; low < 65536; low += low == 0x7fff || low == 0x8000 ? 1 : 0x7fff) {
            const uint32_t want = half + (low > 0x8000 || (low == 0x8000 && half % 2));
            const float value = emu_bits<float>(half << 16 | low);
            const uint32_t pair = pack_bf16(value, -value);
            EXPECT(pair == (want | (want | 0x8000) << 16), "%04x%04x became %08x", half, low, pair);
        }
}

// ---- Streams ----

static __global__ void fill(float *y, float x) { y[threadIdx.x] = x; }
static __global__ void add_one(float *y, const float *x) { y[threadIdx.x] = x[threadIdx.x] + 1; }

// y = 7 + 1 by two streams: the second may only start when the first is done, which the event
// ensures. Returns y[0].
static float two_streams(int event, int seed) {
    float *x = device_new<float>(32), *y = device_new<float>(32), got[32];
    cudaStream_t s[2];
    cudaEvent_t filled;
    use_seed(seed);
    for (cudaStream_t &i : s) CUDA_CHECK(cudaStreamCreateWithFlags(&i, cudaStreamNonBlocking));
    CUDA_CHECK(cudaEventCreateWithFlags(&filled, cudaEventDisableTiming));
    LAUNCH(fill, 1, 32, 0, s[0], x, 7.0f);
    CUDA_CHECK(cudaEventRecord(filled, s[0]));
    if (event) CUDA_CHECK(cudaStreamWaitEvent(s[1], filled, 0));
    LAUNCH(add_one, 1, 32, 0, s[1], y, x);
    CUDA_CHECK(cudaStreamSynchronize(s[1]));
    CUDA_CHECK(cudaMemcpyAsync(got, y, sizeof got, cudaMemcpyDeviceToHost, s[1]));
    CUDA_CHECK(cudaEventDestroy(filled));
    for (cudaStream_t i : s) CUDA_CHECK(cudaStreamDestroy(i));
    CUDA_CHECK(cudaFree(x));
    CUDA_CHECK(cudaFree(y));
    return got[0];
}

void test_emu_streams(void) {
    for (int lazy = 0; lazy < 2; lazy++) {
        setenv("EMU_LAZY", lazy ? "1" : "0", 1);
        for (int seed = 1; seed < 4; seed++)
            EXPECT(two_streams(1, seed) == 8, "lazy %d: %g", lazy, two_streams(1, seed));
        cudaEvent_t from, to;
        float ms = -1;
        CUDA_CHECK(cudaEventCreate(&from));
        CUDA_CHECK(cudaEventCreate(&to));
        CUDA_CHECK(cudaEventRecord(from, NULL));
        CUDA_CHECK(cudaEventRecord(to, NULL));
        CUDA_CHECK(cudaEventSynchronize(to));
        CUDA_CHECK(cudaEventElapsedTime(&ms, from, to));
        EXPECT(ms >= 0, "%g ms between two events", ms);
        CUDA_CHECK(cudaEventDestroy(from));
        CUDA_CHECK(cudaEventDestroy(to));
    }
    unsetenv("EMU_LAZY");
}

// The host changes what an asynchronous copy has yet to read, or reads what it has yet to write.
static float pinned_too_early(int write) {
    float *host, got, *x = device_new<float>(1);
    cudaStream_t s;
    CUDA_CHECK(cudaMallocHost(&host, sizeof *host));
    CUDA_CHECK(cudaStreamCreate(&s));
    *host = 1;
    CUDA_CHECK(cudaMemcpyAsync(x, host, sizeof *host, cudaMemcpyHostToDevice, s));
    if (write) *host = 2;
    CUDA_CHECK(cudaStreamSynchronize(s));
    LAUNCH(fill, 1, 1, 0, s, x, *host);
    if (!write) *host = 3;
    CUDA_CHECK(cudaMemcpyAsync(host, x, sizeof *host, cudaMemcpyDeviceToHost, s));
    got = *host;
    CUDA_CHECK(cudaStreamDestroy(s));
    CUDA_CHECK(cudaFree(x));
    CUDA_CHECK(cudaFreeHost(host));
    return got;
}

void test_emu_streams_wrong(void) {
    EXPECT(pinned_too_early(0) == 1, "work is done at once, but a copy gave %g",
           pinned_too_early(0));
    setenv("EMU_LAZY", "1", 1);
    EXPECT(isnan(two_streams(0, 1)), "the second stream did not wait, but got %g",
           two_streams(0, 1));
    EXPECT(pinned_too_early(0) == 3, "a copy to the host was read before it was done, but gave %g",
           pinned_too_early(0));
    unsetenv("EMU_LAZY");
}

// ---- cuBLASLt ----

// A matmul and its parameters. `bf16_in`, `bf16_out`: types of A, B and of C, D.
typedef struct Matmul {
    int m, n, k, transa, transb, bf16_in, bf16_out, tf32;
    float alpha, beta;
    uint32_t epilogue;
    int left = 0;       // set as well: 1 a bias pointer, 2 an auxiliary matrix
} Matmul;

// on the host, column-major
typedef struct { double *a, *b, *c, *y, *bias, *aux; int lda, ldb, ldc; } Operands;

static void *device_numbers(const double *x, size_t n, int is_bf16) {
    float *f = (float *)xcalloc(n, sizeof *f);
    bf16 *h = (bf16 *)xcalloc(n, sizeof *h);
    for (size_t i = 0; i < n; i++) f[i] = (float)x[i], h[i] = from_float<bf16>((float)x[i]);
    void *p = is_bf16 ? (void *)device_copy(h, n) : (void *)device_copy(f, n);
    free(f);
    free(h);
    return p;
}
static void host_numbers(double *x, void *device, size_t n, int is_bf16) {
    float *f = (float *)xcalloc(n, sizeof *f);
    bf16 *h = (bf16 *)xcalloc(n, sizeof *h);
    if (is_bf16) host_copy(h, (const bf16 *)device, n);
    else host_copy(f, (const float *)device, n);
    for (size_t i = 0; i < n; i++) x[i] = is_bf16 ? to_float(h[i]) : f[i];
    free(f);
    free(h);
    CUDA_CHECK(cudaFree(device));
}

static int biased(uint32_t epilogue) {
    return epilogue == CUBLASLT_EPILOGUE_BIAS || epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
}

// Runs p through cuBLASLt with the heuristic's second algorithm; o->y, o->bias and o->aux receive
// its output.
static cublasStatus_t multiply(const Matmul *p, Operands *o) {
    const cudaDataType_t in = p->bf16_in ? CUDA_R_16BF : CUDA_R_32F,
        out = p->bf16_out ? CUDA_R_16BF : CUDA_R_32F;
    const size_t a_size = (size_t)o->lda * (size_t)(p->transa ? p->m : p->k),
        c_size = (size_t)(o->ldc * p->n);
    const size_t b_size = (size_t)o->ldb * (size_t)(p->transb ? p->k : p->n);
    const size_t bias_size = (size_t)p->m;
    void *a = device_numbers(o->a, a_size, p->bf16_in),
        *b = device_numbers(o->b, b_size, p->bf16_in);
    void *c = device_numbers(o->c, c_size, p->bf16_out),
        *y = device_numbers(o->c, c_size, p->bf16_out);
    void *bias = device_numbers(o->bias, bias_size, p->bf16_out),
        *aux = device_numbers(o->aux, c_size, p->bf16_out);
    const int64_t aux_ld = o->ldc;
    const size_t bytes = 1 << 16;
    char *workspace = device_new<char>(bytes);
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t d;
    cublasLtMatrixLayout_t la, lb, lc;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t found[3];
    int count = 0;
    CUBLAS_CHECK(cublasLtCreate(&handle));
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&d, p->tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32
                                          : CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_TRANSA, &p->transa,
                                                sizeof p->transa));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_TRANSB, &p->transb,
                                                sizeof p->transb));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_EPILOGUE, &p->epilogue,
                                                sizeof p->epilogue));
    if (biased(p->epilogue) || p->epilogue == CUBLASLT_EPILOGUE_BGRADA || p->left == 1)
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias,
                                                    sizeof bias));
    if (p->epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS || p->epilogue == CUBLASLT_EPILOGUE_DGELU ||
        p->left == 2) {
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
                                                    &aux, sizeof aux));
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD,
                                                    &aux_ld, sizeof aux_ld));
    }
    const uint64_t m = (uint64_t)p->m, n = (uint64_t)p->n, k = (uint64_t)p->k;
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&la, in, p->transa ? k : m, p->transa ? m : k, o->lda));
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&lb, in, p->transb ? n : k, p->transb ? k : n, o->ldb));
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&lc, out, m, n, o->ldc));
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference,
                                                      CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                      &bytes, sizeof bytes));
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle, d, la, lb, lc, lc, preference, 3,
                                                           found, &count);
    if (status == CUBLAS_STATUS_SUCCESS) {
        EXPECT(count == 2, "%d algorithms", count);
        status = cublasLtMatmul(handle, d, &p->alpha, a, la, b, lb, &p->beta, c, lc, y, lc,
                                &found[1].algo, workspace, bytes, NULL);
    }
    host_numbers(o->y, y, c_size, p->bf16_out);
    host_numbers(o->bias, bias, bias_size, p->bf16_out);
    host_numbers(o->aux, aux, c_size, p->bf16_out);
    for (void *i : {a, b, c, (void *)workspace}) CUDA_CHECK(cudaFree(i));
    CUBLAS_CHECK(cublasLtMatmulPreferenceDestroy(preference));
    for (cublasLtMatrixLayout_t i : {la, lb, lc}) CUBLAS_CHECK(cublasLtMatrixLayoutDestroy(i));
    CUBLAS_CHECK(cublasLtMatmulDescDestroy(d));
    CUBLAS_CHECK(cublasLtDestroy(handle));
    return status;
}

// Elements in [-1, 1), exact in bf16.
static double *numbers(size_t n, int seed) {
    double *x = (double *)xcalloc(n, sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = (double)((int)((i * 2654435761u + (size_t)seed * 40503u) >> 7 & 127) - 64) / 64;
    return x;
}
static Operands operands_new(const Matmul *p) {
    const int lda = (p->transa ? p->k : p->m) + 3, ldb = (p->transb ? p->n : p->k) + 1,
        ldc = (p->m + 7) / 8 * 8;
    const size_t a = (size_t)(lda * (p->transa ? p->m : p->k)),
        b = (size_t)(ldb * (p->transb ? p->k : p->n));
    const size_t c = (size_t)(ldc * p->n), bias = (size_t)(p->m + p->n);
    return {numbers(a, 1), numbers(b, 2), numbers(c, 3), numbers(c, 4), numbers(bias, 5),
            numbers(c, 6), lda, ldb, ldc};
}
static void operands_free(Operands *o) {
    for (double *x : {o->a, o->b, o->c, o->y, o->bias, o->aux}) free(x);
}

static double gelu(double x) {
    return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
// within 1e-8
static double gelu_slope(double x) { return (gelu(x + 1e-4) - gelu(x - 1e-4)) / 2e-4; }

// A matmul with its epilogue against the same in double.
static void expect_product(Matmul p) {
    Operands o = operands_new(&p), before = operands_new(&p);
    const cublasStatus_t status = multiply(&p, &o);
    EXPECT(status == CUBLAS_STATUS_SUCCESS, "%s", cublasLtGetStatusString(status));
    const uint32_t e = p.epilogue;
    // 2^-8 of results, which are up to 5 sqrt(k)
    const double tolerance = p.bf16_out ? 0.02 * sqrt(p.k) : 2e-6 * p.k;
    for (int j = 0; j < p.n; j++)
        for (int i = 0; i < p.m; i++) {
            double x = 0;
            for (int l = 0; l < p.k; l++)
                x += o.a[p.transa ? i * o.lda + l : l * o.lda + i] * o.b[p.transb ? l * o.ldb +
                    j : j * o.ldb + l];
            const int at = j * o.ldc + i;
            x = p.alpha * x + p.beta * before.c[at] + (biased(e) ? before.bias[i] : 0);
            if (e == CUBLASLT_EPILOGUE_GELU_AUX_BIAS) {
                EXPECT_CLOSE(o.aux[at], x, tolerance, "what enters GELU");
                x = gelu(x);
            }
            if (e == CUBLASLT_EPILOGUE_DGELU) x *= gelu_slope(before.aux[at]);
            EXPECT_CLOSE(o.y[at], x, tolerance, "a product");
        }
    for (int i = 0; e == CUBLASLT_EPILOGUE_BGRADA && i < p.m; i++) {
        double sum = 0;
        for (int l = 0; l < p.k; l++) sum += o.a[l * o.lda + i];
        EXPECT_CLOSE(o.bias[i], sum, tolerance, "sums of A");
    }
    operands_free(&o);
    operands_free(&before);
}

void test_emu_matmul(void) {
    static const int shape[][3] = {{1, 1, 1}, {5, 3, 7}, {16, 8, 24}, {33, 17, 1}};
    for (auto s : shape)
        for (int way = 0; way < 4; way++)
            for (int types = 0; types < 4; types++) {
                // these elements are exact in tf32
                const int in = types % 3 > 0, out = types == 1, tf32 = types == 3;
                expect_product({s[0], s[1], s[2], way % 2, way / 2, in, out, tf32, 1, 0,
                                CUBLASLT_EPILOGUE_DEFAULT});
                expect_product({s[0], s[1], s[2], way % 2, way / 2, in, out, tf32, 0.5f, -2,
                                CUBLASLT_EPILOGUE_DEFAULT});
            }
    EXPECT(emu_tf32(1 + ldexpf(1, -11)) == 1 + ldexpf(1, -10) && emu_tf32(1 + ldexpf(1, -12)) == 1,
           "rounding to tf32");
}

void test_emu_matmul_epilogues(void) {
    for (int types = 0; types < 3; types++) {
        const int in = types > 0, out = types == 1;
        expect_product({13, 6, 9, 1, 0, in, out, 0, 1, 0, CUBLASLT_EPILOGUE_BIAS});
        expect_product({13, 6, 9, 0, 0, in, out, 0, 1, 0, CUBLASLT_EPILOGUE_GELU_AUX_BIAS});
        expect_product({13, 6, 9, 1, 0, in, out, 0, 1, 0, CUBLASLT_EPILOGUE_DGELU});
        expect_product({13, 6, 9, 0, 1, in, out, 0, 1, 1, CUBLASLT_EPILOGUE_BGRADA});
    }
}

// The line on standard error is part of the answer, but not of this program's output.
static void run_refused(void *arg) {
    Matmul p = {13, 6, 9, 0, 0, 0, 0, 0, 1, 0, CUBLASLT_EPILOGUE_DEFAULT};
    Operands o = operands_new(&p);
    cublasLtMatmulDesc_t d;
    const int64_t wide = 1;
    switch (*(int *)arg) {
    case 0: p.bf16_out = 1; break;                       // fp32 operands, bf16 result
    case 1: p.bf16_in = p.tf32 = 1; break;
    case 2: p.epilogue = 2; break;                       // ReLU, which is not emulated
    case 3: p.transa = 1, o.lda = 9, p.epilogue = CUBLASLT_EPILOGUE_BGRADA; break;
    case 4: p.epilogue = CUBLASLT_EPILOGUE_GELU_AUX_BIAS, o.ldc = 13; break;
    case 5: o.lda = 12; break;
    case 6:
        CUBLAS_CHECK(cublasLtMatmulDescCreate(&d, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_TRANSA, &wide,
                                                    sizeof wide));
        break;
    case 8: p.left = 1; break;
    case 9: p.left = 2; break;
    case 10: setenv("EMU_EPILOGUES", "1", 1), p.epilogue = CUBLASLT_EPILOGUE_BIAS; break;
    case 11: setenv("EMU_ALGORITHMS_FAIL", "2", 1); break;
    case 7:
        CUBLAS_CHECK(cublasLtMatmulDescCreate(&d, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(d, (cublasLtMatmulDescAttributes_t)15, &wide,
                                                    sizeof wide));
        break;
    }
    CUBLAS_CHECK(multiply(&p, &o));
}

void test_emu_matmul_refuses(void) {
    static const char *const part[] = {
        "multiply(&p, &o): CUBLAS_STATUS_NOT_SUPPORTED",
        "multiply(&p, &o): CUBLAS_STATUS_NOT_SUPPORTED", "epilogue 2\n",
        "BGRADA with A transposed", "an auxiliary matrix of leading dimension 13",
        "of leading dimension 12",
        "an attribute of 4 bytes set by 8", "attribute 15",
        "a bias is set, but epilogue 1 takes none",
        "an auxiliary matrix is set, but epilogue 1 takes none",
        "multiply(&p, &o): CUBLAS_STATUS_NOT_SUPPORTED",
        "multiply(&p, &o): CUBLAS_STATUS_EXECUTION_FAILED"};
    for (int i = 0; i < 12; i++) EXPECT_EXIT_EMULATED(1, part[i], run_refused, &i);
}
