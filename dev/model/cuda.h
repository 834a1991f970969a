// cuda.h: the part of the GPU engine that deals with the device and knows nothing of GPT: checked
// launches and calls, reductions over a warp or a block, 16-byte vectors, and the instructions of
// tensor cores and asynchronous copies.
//
// Compiled by nvcc, this is CUDA for compute capability 8.0 and newer. Compiled by a C++ compiler
// with -DCUDA_EMULATED and -Idev/emu, kernels run on the host (dev/emu/simt.h).
#ifndef CUDA_H
#define CUDA_H

#include "../check.h"
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#ifdef CUDA_EMULATED
#include <tensor.h>
#endif

typedef __nv_bfloat16 bf16;

// ---- Checked calls: CUDA_CHECK(cudaMalloc(...)) dies with the call and the reason ----

static inline const char *cuda_hint(cudaError_t e) {
    switch (e) {
    case cudaErrorNoDevice:
        return "\n  hint: no GPU is visible: nvidia-smi should list it, and CUDA_VISIBLE_DEVICES "
            "must not hide it";
    case cudaErrorMemoryAllocation: return "\n  hint: a smaller --batch needs less memory";
#ifndef CUDA_EMULATED
    case cudaErrorInsufficientDriver:
        return "\n  hint: the driver is older than this program's CUDA: update the driver";
    case cudaErrorNoKernelImageForDevice:
        return "\n  hint: built for a different GPU: make CUDA=1 GPU_ARCH=native";
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorLaunchFailure:
        return "\n  hint: an earlier kernel failed; CUDA_LAUNCH_BLOCKING=1 names it, "
            "compute-sanitizer locates the error";
#endif
    default: return "";
    }
}

static inline void cuda_check(cudaError_t e, const char *call, const char *file, int line) {
    if (e != cudaSuccess)
        die("%s:%d: %s: %s%s", file, line, call, cudaGetErrorString(e), cuda_hint(e));
}
#define CUDA_CHECK(call) cuda_check(call, #call, __FILE__, __LINE__)

static inline void cublas_check(cublasStatus_t e, const char *call, const char *file, int line) {
    if (e != CUBLAS_STATUS_SUCCESS)
        die("%s:%d: %s: %s", file, line, call, cublasLtGetStatusString(e));
}
#define CUBLAS_CHECK(call) cublas_check(call, #call, __FILE__, __LINE__)

#define NCCL_CHECK(call)                                                             \
    do {                                                                             \
        const ncclResult_t r_ = (call);                                              \
        if (r_ != ncclSuccess)                                                       \
            die("%s:%d: %s: %s", __FILE__, __LINE__, #call, ncclGetErrorString(r_)); \
    } while (0)

// ---- Time on the device ----

typedef struct { cudaStream_t stream; cudaEvent_t from, to; } Timer;

static inline Timer timer_new(cudaStream_t stream) {
    Timer t = {stream, NULL, NULL};
    CUDA_CHECK(cudaEventCreate(&t.from));
    CUDA_CHECK(cudaEventCreate(&t.to));
    return t;
}

static inline void timer_free(const Timer *t) {
    CUDA_CHECK(cudaEventDestroy(t->from));
    CUDA_CHECK(cudaEventDestroy(t->to));
}

static inline void timer_start(const Timer *t) { CUDA_CHECK(cudaEventRecord(t->from, t->stream)); }

// Waits for all that was launched since; returns its milliseconds.
static inline double timer_stop(const Timer *t) {
    float ms = 0;
    CUDA_CHECK(cudaEventRecord(t->to, t->stream));
    CUDA_CHECK(cudaEventSynchronize(t->to));
    CUDA_CHECK(cudaEventElapsedTime(&ms, t->from, t->to));
    return (double)ms;
}

// ---- Launches ----
//
// LAUNCH(kernel, grid, block, bytes of shared memory, stream, arguments ...). A kernel with commas
// in its name needs parentheses: (kernel<a, b>). Dies with the kernel's name if CUDA refuses.

// arguments are converted, not used for deduction
template <class T> struct LaunchArgument { typedef T type; };

template <class... P>
static inline void launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block,
                          size_t shared, cudaStream_t stream,
                          typename LaunchArgument<P>::type... args) {
    cudaError_t e = cudaSuccess;
    if (shared > 48 << 10)                               // more must be requested explicitly
        e = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 (int)shared);
#ifdef CUDA_EMULATED
    if (e == cudaSuccess) e = emu_launch(name, kernel, grid, block, shared, stream, args...);
#else
    void *pointers[sizeof...(P) + 1] = {(void *)&args..., NULL};
    if (e == cudaSuccess)
        e = cudaLaunchKernel((const void *)kernel, grid, block, pointers, shared, stream);
#endif
    if (e != cudaSuccess)
        die("kernel %s, grid (%u,%u,%u), block (%u,%u,%u), %zu bytes of shared memory: %s%s", name,
            grid.x, grid.y, grid.z, block.x, block.y, block.z, shared, cudaGetErrorString(e),
            cuda_hint(e));
}
#define LAUNCH(kernel, grid, block, shared, ...) \
    launch(#kernel, kernel, grid, block, shared, __VA_ARGS__)

// SHARED(type, name): inside a kernel, `type *name` is the block's shared memory, of the size given
// at the launch.
#ifdef CUDA_EMULATED
#define SHARED(type, name) type *const name = (type *)emu_shared()
#else
extern __shared__ __align__(16) unsigned char cuda_shared_bytes[];
#define SHARED(type, name) type *const name = (type *)(void *)cuda_shared_bytes
#endif

// BOUNDS(threads): the first line of a kernel with __launch_bounds__(threads, ...), which the
// emulator cannot see.
#ifdef CUDA_EMULATED
#define BOUNDS(threads) emu_bounds(threads)
#else
#define BOUNDS(threads)
#endif

// UNROLL before a loop unrolls it completely, so that arrays indexed by it can be registers.
#ifdef CUDA_EMULATED
#define UNROLL
#else
#define UNROLL _Pragma("unroll")
#endif

// threadIdx.x and blockIdx.x, reread: values derived from them after a loop need not occupy
// registers during it.
#ifdef CUDA_EMULATED
static inline __device__ int thread_reread(void) { return (int)threadIdx.x; }
static inline __device__ int block_reread(void) { return (int)blockIdx.x; }
#else
static inline __device__ int thread_reread(void) {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}
static inline __device__ int block_reread(void) {
    int x;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
    return x;
}
#endif

// ---- Arenas: one allocation divided into arrays, each aligned to ALIGN bytes ----
//
// Under the emulator, each array is followed by a gap; the memory between arrays must not be
// accessed (arena_seal) until the arena is divided anew (arena_unseal). Both are ordered by the
// stream.

enum { ALIGN = 256 };
#ifdef CUDA_EMULATED
enum { ARENA_GAP = ALIGN };
static inline void arena_seal(void *from, size_t bytes, cudaStream_t stream) {
    emu_seal(from, bytes, stream);
}
static inline void arena_unseal(void *from, size_t bytes, cudaStream_t stream) {
    emu_unseal(from, bytes, stream);
}
#else
enum { ARENA_GAP = 0 };
static inline void arena_seal(void *, size_t, cudaStream_t) {}
static inline void arena_unseal(void *, size_t, cudaStream_t) {}
#endif

// The space taken by an array of that many bytes.
static inline size_t arena_bytes(size_t bytes) {
    return (bytes + ALIGN - 1) / ALIGN * ALIGN + ARENA_GAP;
}

// Takes an array at *at and advances it.
static inline void *arena_cut(char **at, size_t bytes, cudaStream_t stream) {
    char *const array = *at;
    *at += arena_bytes(bytes);
    arena_seal(array + bytes, arena_bytes(bytes) - bytes, stream);
    return array;
}

// ---- Elements: float and bf16 under one name ----

static inline __host__ __device__ float to_float(float x) { return x; }
static inline __host__ __device__ float to_float(bf16 x) { return __bfloat162float(x); }
template <class N> static inline __host__ __device__ N from_float(float x);
template <> inline __host__ __device__ float from_float<float>(float x) { return x; }
// to nearest, ties to even
template <> inline __host__ __device__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}

// 2^x by a single instruction, within 2^-22; denormal results become 0 (PTX ISA, ex2.approx).
static inline __device__ float exp2_fast(float x) {
#ifdef CUDA_EMULATED
    return emu_exp2(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 1 / x by a single instruction, within 2^-23 (PTX ISA, rcp.approx); 0 of infinity.
static inline __device__ float reciprocal_fast(float x) {
#ifdef CUDA_EMULATED
    return emu_reciprocal(x);
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 16 bytes of elements, moved by one instruction; the address must be a multiple of 16.
template <class N> struct __align__(16) Pack { N x[16 / sizeof(N)]; };

template <class N> static inline __device__ Pack<N> pack_load(const N *from) {
    Pack<N> p;
#ifdef CUDA_EMULATED
    emu_check_alignment(from, "pack_load");
    memcpy(&p, from, sizeof p);
#else
    *(int4 *)(void *)&p = *(const int4 *)(const void *)from;
#endif
    return p;
}

// To global memory.
template <class N> static inline __device__ void pack_store(N *to, Pack<N> p) {
#ifdef CUDA_EMULATED
    emu_check_alignment(to, "pack_store");
    memcpy(to, &p, sizeof p);
#else                                                    // for some types, nvcc emits four 4-byte
                                                         // stores in C++
    const int4 v = *(const int4 *)(const void *)&p;
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w) : "memory");
#endif
}

// ---- Reductions over a warp or a block: all threads get the same bits, every time ----

static inline __device__ float warp_sum(float x) {
    for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
    return x;
}

static inline __device__ float warp_max(float x) {
    for (int apart = 16; apart > 0; apart /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, apart));
    return x;
}

// For blocks (n,1,1), n a multiple of 32; shared32 (32) may be reused when the call returns. The
// warps' results pass through shared memory, and every warp combines them in the same way.
static inline __device__ float block_sum(float x, float *shared32) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0) shared32[warp] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? shared32[lane] : 0);
    __syncthreads();
    return x;
}

static inline __device__ float block_max(float x, float *shared32) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_max(x);
    if (lane == 0) shared32[warp] = x;
    __syncthreads();
    x = warp_max(lane < warps ? shared32[lane] : shared32[0]);
    __syncthreads();
    return x;
}

// ---- Tensor cores and asynchronous copies, named after their PTX instructions (PTX ISA) ----
//
// mma_bf16            d (16,8) += a (16,16) b (16,8), a row-major, b column-major, each lane
// holding
//                     its part (mma.m16n8k16)
// ldmatrix_x4         four (8,8) matrices of 16-bit elements; lane l gives the address of row l % 8
//                     of matrix l / 8
// ldmatrix_x4_trans   the same, each transposed
// cp_async16          copies 16 bytes of device memory to shared memory, or zeros if not valid
// (then
//                     nothing is read)
// cp_async_commit     groups the copies since the last commit
// cp_async_wait<n>    waits until at most the last n groups of this thread are in flight; other
//                     threads see the data after __syncthreads
// pack_bf16           two elements in one register

#ifndef CUDA_EMULATED
static inline __device__ void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

static inline __device__ void ldmatrix_x4(uint32_t r[4], const void *shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(shared_row)) : "memory");
}

static inline __device__ void ldmatrix_x4_trans(uint32_t r[4], const void *shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(shared_row)) : "memory");
}

static inline __device__ void cp_async16(void *shared, const void *global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((uint32_t)__cvta_generic_to_shared(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
                 : "memory");
}

static inline __device__ void cp_async_commit(void) {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int N> static inline __device__ void cp_async_wait(void) {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

static inline __device__ uint32_t pack_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
#endif

#endif
