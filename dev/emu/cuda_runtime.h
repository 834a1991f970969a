// cuda_runtime.h: stands in for the CUDA runtime where there is no GPU (tests only): device memory is memory of the host,
// kernels run in simt.h. Checked here: that copies stay within an allocation of the right side, that kernels get pointers
// to device memory, launch limits, and that nothing is written around an allocation.
//
//   EMU_SEED=n      another order of the threads of a block, of blocks, and of work in streams
//   EMU_LAZY=1      the work of a stream runs only when the host, or another stream, waits for it
//   EMU_LAZY=2      the same, but cudaStreamNonBlocking streams do their work at once, ahead of the others
//   EMU_DEVICES=n   so many devices (default 1); EMU_MEMORY=n: with so many bytes each (default 16 GiB)
#ifndef EMU_CUDA_RUNTIME_H
#define EMU_CUDA_RUNTIME_H

#include "simt.h"
#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <time.h>
#include <vector>

// ---- Errors: numbers and names as in CUDA's driver_types.h ----

#define EMU_ERRORS(X)                                                                     \
    X(cudaSuccess, 0, "no error")                                                         \
    X(cudaErrorInvalidValue, 1, "invalid argument")                                       \
    X(cudaErrorMemoryAllocation, 2, "out of memory")                                      \
    X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                 \
    X(cudaErrorInvalidDevicePointer, 17, "invalid device pointer")                        \
    X(cudaErrorInvalidMemcpyDirection, 21, "invalid copy direction for memcpy")           \
    X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")                       \
    X(cudaErrorInvalidDevice, 101, "invalid device ordinal")                              \
    X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                     \
    X(cudaErrorNotReady, 600, "device not ready")                                         \
    X(cudaErrorStreamCaptureUnsupported, 900, "operation not permitted when stream is capturing")

#define X(name, number, text) name = number,
typedef enum { EMU_ERRORS(X) } cudaError_t;
#undef X

inline const char *cudaGetErrorString(cudaError_t e) {
#define X(name, number, text) if (e == name) return text;
    EMU_ERRORS(X)
#undef X
    return "unrecognized error code";
}
inline const char *cudaGetErrorName(cudaError_t e) {
#define X(name, number, text) if (e == name) return #name;
    EMU_ERRORS(X)
#undef X
    return "unrecognized error code";
}

inline cudaError_t emu_last_error = cudaSuccess;

// Sets the last error and says on standard error what CUDA would not.
__attribute__((format(printf, 2, 3))) inline cudaError_t emu_error(cudaError_t e, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "emulator: ");
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    return emu_last_error = e;
}

inline cudaError_t cudaPeekAtLastError(void) { return emu_last_error; }
inline cudaError_t cudaGetLastError(void) {
    const cudaError_t e = emu_last_error;
    emu_last_error = cudaSuccess;
    return e;
}

// ---- Types and small functions of device code ----

struct __align__(8)  float2 { float x, y; };
struct               float3 { float x, y, z; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(8)  int2   { int x, y; };
struct __align__(16) int4   { int x, y, z, w; };
struct __align__(8)  uint2  { unsigned x, y; };
struct __align__(16) uint4  { unsigned x, y, z, w; };

template <class T, class F> inline T emu_bits(F from) {
    static_assert(sizeof(T) == sizeof(F), "the same number of bits");
    T to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float    __uint_as_float(unsigned x)   { return emu_bits<float>(x); }
inline int      min(int a, int b)             { return a < b ? a : b; }
inline int      max(int a, int b)             { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b)   { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b)   { return a > b ? a : b; }
inline size_t   min(size_t a, size_t b)       { return a < b ? a : b; }
inline size_t   max(size_t a, size_t b)       { return a > b ? a : b; }

// ---- The device ----

typedef struct {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int warpSize, maxThreadsPerBlock, multiProcessorCount, major, minor, regsPerMultiprocessor, maxThreadsPerMultiProcessor;
    int l2CacheSize, memoryBusWidth, ECCEnabled, pciBusID;
} cudaDeviceProp;

typedef enum {
    cudaDevAttrMaxThreadsPerBlock = 1, cudaDevAttrMaxSharedMemoryPerBlock = 8, cudaDevAttrClockRate = 13,
    cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMemoryClockRate = 36, cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
} cudaDeviceAttr;

inline int emu_device = 0;
enum { EMU_PROCESSORS = 4 };                             // few, so that loops over a grid are run more than once

inline cudaError_t cudaGetDeviceCount(int *count) {
    *count = (int)emu_number("EMU_DEVICES", 1);
    return *count ? cudaSuccess : emu_last_error = cudaErrorNoDevice;
}
inline cudaError_t emu_device_check(int device) {
    int count;
    const cudaError_t e = cudaGetDeviceCount(&count);
    if (e != cudaSuccess) return e;
    return device >= 0 && device < count ? cudaSuccess : emu_last_error = cudaErrorInvalidDevice;
}
inline cudaError_t cudaSetDevice(int device) {
    const cudaError_t e = emu_device_check(device);
    if (e == cudaSuccess) emu_device = device;
    return e;
}
inline cudaError_t cudaGetDevice(int *device) { *device = emu_device; return emu_device_check(emu_device); }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    const cudaError_t e = emu_device_check(device);
    if (e != cudaSuccess) return e;
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "emulated");
    p->totalGlobalMem = emu_number("EMU_MEMORY", (uint64_t)16 << 30);
    p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = EMU_SHARED_LIMIT;
    p->sharedMemPerMultiprocessor = EMU_SHARED_LIMIT + 1024, p->regsPerMultiprocessor = 65536;
    p->warpSize = 32, p->maxThreadsPerBlock = EMU_LANES, p->maxThreadsPerMultiProcessor = 2048;
    p->multiProcessorCount = EMU_PROCESSORS, p->major = 9;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    const cudaError_t e = emu_device_check(device);
    if (e != cudaSuccess) return e;
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = EMU_LANES; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)EMU_SHARED_LIMIT; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = EMU_PROCESSORS; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrClockRate: case cudaDevAttrMemoryClockRate: *value = 1000000; return cudaSuccess;
    }
    return emu_error(cudaErrorInvalidValue, "cudaDeviceGetAttribute(%d)", attribute);
}

// ---- Memory ----

// What was allocated, by address: the device's, or the host's by cudaMallocHost.
struct EmuMemory { size_t bytes; bool device; char *base; };
inline std::map<uintptr_t, EmuMemory> emu_memory;
inline size_t emu_memory_used = 0;
const size_t EMU_MEMORY_GUARD = EMU_ASAN ? 0 : 512, EMU_MEMORY_ALIGNMENT = 256;

// The allocation that p lies in, or at whose end it is; NULL for other memory of the host.
inline const EmuMemory *emu_memory_at(const void *p, uintptr_t *from) {
    auto next = emu_memory.upper_bound((uintptr_t)p);
    if (next == emu_memory.begin()) return NULL;
    --next;
    if (from) *from = next->first;
    return (uintptr_t)p <= next->first + next->second.bytes ? &next->second : NULL;
}
inline bool emu_is_device(const void *p, size_t bytes) {
    uintptr_t from = 0;
    const EmuMemory *m = emu_memory_at(p, &from);
    return m && m->device && (uintptr_t)p - from + bytes <= m->bytes;
}

inline void emu_memory_check(uintptr_t at, const EmuMemory *m) {
    if (!EMU_MEMORY_GUARD || !m->device) return;
    if (!emu_guard_whole(m->base, EMU_MEMORY_GUARD)) emu_fail("something wrote before the %zu bytes at %#zx", m->bytes, at);
    if (!emu_guard_whole((const char *)at + m->bytes, EMU_MEMORY_GUARD))
        emu_fail("something wrote beyond the %zu bytes at %#zx", m->bytes, (size_t)at);
}
inline void emu_memory_check_all(void) {
    for (auto &m : emu_memory) emu_memory_check(m.first, &m.second);
}

inline cudaError_t cudaDeviceSynchronize(void);
inline bool emu_captured(void);                          // whether a stream is

inline cudaError_t emu_allocate(void **p, size_t bytes, bool device) {
    *p = NULL;
    if (device && emu_device_check(emu_device) != cudaSuccess) return emu_last_error;
    if (emu_captured()) return emu_error(cudaErrorStreamCaptureUnsupported, "takes memory while a stream is captured");
    if (!bytes) return cudaSuccess;
    const size_t guard = device ? EMU_MEMORY_GUARD : 0, limit = emu_number("EMU_MEMORY", (uint64_t)16 << 30);
    void *base = NULL;
    if ((device && bytes > limit - std::min(limit, emu_memory_used)) ||
        posix_memalign(&base, EMU_MEMORY_ALIGNMENT, bytes + 2 * guard))
        return emu_last_error = cudaErrorMemoryAllocation;
    char *at = (char *)base + guard;
    memset(base, EMU_GUARD, guard);
    memset(at, EMU_POISON, bytes);
    memset(at + bytes, EMU_GUARD, guard);
    emu_memory[(uintptr_t)at] = {bytes, device, (char *)base};
    if (device) emu_memory_used += bytes;
    *p = at;
    return cudaSuccess;
}

inline cudaError_t emu_release(void *p, bool device) {
    if (!p) return cudaSuccess;
    const cudaError_t e = cudaDeviceSynchronize();        // as cudaFree does
    if (e != cudaSuccess) return e;
    auto m = emu_memory.find((uintptr_t)p);
    if (m == emu_memory.end() || m->second.device != device)
        return emu_error(cudaErrorInvalidValue, "free of %p, which was not allocated", p);
    emu_memory_check(m->first, &m->second);
    if (device) emu_memory_used -= m->second.bytes;
    free(m->second.base);
    emu_memory.erase(m);
    return cudaSuccess;
}

inline cudaError_t cudaMalloc(void **p, size_t bytes) { return emu_allocate(p, bytes, true); }
inline cudaError_t cudaMallocHost(void **p, size_t bytes) { return emu_allocate(p, bytes, false); }
template <class T> inline cudaError_t cudaMalloc(T **p, size_t bytes) { return emu_allocate((void **)(void *)p, bytes, true); }
template <class T> inline cudaError_t cudaMallocHost(T **p, size_t bytes) {
    return emu_allocate((void **)(void *)p, bytes, false);
}
inline cudaError_t cudaFree(void *p) { return emu_release(p, true); }
inline cudaError_t cudaFreeHost(void *p) { return emu_release(p, false); }
inline cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
    *total = emu_number("EMU_MEMORY", (uint64_t)16 << 30), *unused = *total - std::min(*total, emu_memory_used);
    return emu_device_check(emu_device);
}

// ---- Streams and events ----
// Work is done when it is given, or with EMU_LAZY=1 queued until the host or another stream waits for it. In both a stream
// does its own work in order, and stream 0 waits for all streams that are not cudaStreamNonBlocking.

typedef std::vector<std::function<void()>> EmuGraph;     // what a stream got while it was captured
typedef EmuGraph *cudaGraph_t, *cudaGraphExec_t;
struct EmuStream { std::deque<std::function<void()>> work; unsigned flags; EmuGraph *capture; };
typedef EmuStream *cudaStream_t;
struct EmuRecord { bool done; double seconds; EmuStream *stream; };   // one recording of an event
struct EmuEvent { std::shared_ptr<EmuRecord> last; };
typedef EmuEvent *cudaEvent_t;

inline std::vector<EmuStream *> emu_streams;
inline uint64_t emu_launches = 0;

enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };

inline bool emu_is_stream(EmuStream *s) {
    return !s || std::find(emu_streams.begin(), emu_streams.end(), s) != emu_streams.end();
}
inline void emu_step(EmuStream *s) {
    std::function<void()> first = std::move(s->work.front());
    s->work.pop_front();
    first();
}
inline void emu_drain(EmuStream *s) {
    while (!s->work.empty()) emu_step(s);
}

// All streams, or those only that block; one piece of work at a time of a stream at random.
inline void emu_drain_all(bool all) {
    static uint64_t random = emu_number("EMU_SEED", 1);
    for (;;) {
        std::vector<EmuStream *> open;
        for (EmuStream *s : emu_streams)
            if (!s->work.empty() && (all || !(s->flags & cudaStreamNonBlocking))) open.push_back(s);
        if (open.empty()) return;
        emu_step(open[emu_random(&random) % open.size()]);
    }
}

inline cudaError_t emu_enqueue(EmuStream *s, std::function<void()> work) {
    if (!emu_is_stream(s)) return emu_error(cudaErrorInvalidResourceHandle, "a stream that does not exist");
    if (s && s->capture) {
        s->capture->push_back(std::move(work));
        return cudaSuccess;
    }
    if (!s) emu_drain_all(false);
    const uint64_t lazy = emu_number("EMU_LAZY", 0);
    if (s && (lazy == 1 || (lazy == 2 && !(s->flags & cudaStreamNonBlocking)))) s->work.push_back(std::move(work));
    else {
        if (s) emu_drain(s);
        work();
    }
    return cudaSuccess;
}

inline bool emu_captured(void) {
    for (EmuStream *s : emu_streams)
        if (s->capture) return true;
    return false;
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) {
    if (emu_device_check(emu_device) != cudaSuccess) return emu_last_error;
    emu_streams.push_back(*s = new EmuStream{{}, flags, NULL});
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithFlags(s, cudaStreamDefault); }
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int) {
    return cudaStreamCreateWithFlags(s, flags);
}
inline cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    if (!emu_is_stream(s)) return emu_error(cudaErrorInvalidResourceHandle, "a stream that does not exist");
    if (emu_captured()) return emu_error(cudaErrorStreamCaptureUnsupported, "waits while a stream is captured");
    if (s) emu_drain(s);
    else emu_drain_all(false);
    emu_memory_check_all();
    return cudaSuccess;
}
// Time goes on while one asks: a piece of work is done.
inline cudaError_t cudaStreamQuery(cudaStream_t s) {
    if (s && !s->work.empty()) emu_step(s);
    return s && !s->work.empty() ? cudaErrorNotReady : cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t s) {
    if (!s || !emu_is_stream(s)) return emu_error(cudaErrorInvalidResourceHandle, "a stream that does not exist");
    emu_drain(s);
    emu_streams.erase(std::find(emu_streams.begin(), emu_streams.end(), s));
    delete s;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize(void) {
    if (emu_captured()) return emu_error(cudaErrorStreamCaptureUnsupported, "waits while a stream is captured");
    emu_drain_all(true);
    emu_memory_check_all();
    return cudaSuccess;
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { *e = new EmuEvent{}; return cudaSuccess; }
inline cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
inline cudaError_t cudaEventDestroy(cudaEvent_t e) { delete e; return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s = NULL) {
    std::shared_ptr<EmuRecord> r(new EmuRecord{false, 0, s});
    e->last = r;
    return emu_enqueue(s, [r] {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        r->done = true, r->seconds = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    });
}
inline void emu_reach(const std::shared_ptr<EmuRecord> &r) {
    while (r && !r->done) emu_step(r->stream);
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned = 0) {
    const std::shared_ptr<EmuRecord> r = e->last;        // the last recording before this call; none: nothing to wait for
    return emu_enqueue(s, [r] { emu_reach(r); });
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t e) { emu_reach(e->last); return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t e) { return e->last && !e->last->done ? cudaErrorNotReady : cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    if (!from->last || !to->last) return emu_error(cudaErrorInvalidResourceHandle, "an event that was not recorded");
    if (!from->last->done || !to->last->done) return emu_last_error = cudaErrorNotReady;
    *ms = (float)(1e3 * (to->last->seconds - from->last->seconds));
    return cudaSuccess;
}

// ---- Graphs ----

typedef enum {
    cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed
} cudaStreamCaptureMode;

inline cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    if (!s || !emu_is_stream(s) || s->capture) return emu_error(cudaErrorInvalidResourceHandle, "a stream to capture");
    s->capture = new EmuGraph;
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
    if (!s || !emu_is_stream(s) || !s->capture) return emu_error(cudaErrorInvalidResourceHandle, "a stream not captured");
    *graph = s->capture, s->capture = NULL;
    return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    *exec = new EmuGraph(*graph);
    return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
    cudaError_t e = cudaSuccess;
    for (size_t i = 0; i < exec->size() && e == cudaSuccess; i++) e = emu_enqueue(s, (*exec)[i]);
    return e;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { delete graph; return cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { delete exec; return cudaSuccess; }

// ---- Copies ----

typedef enum {
    cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault
} cudaMemcpyKind;

// What is wrong with one end of a copy, or NULL.
inline const char *emu_copy_error(const void *p, size_t bytes, bool device) {
    uintptr_t from = 0;
    const EmuMemory *m = bytes ? emu_memory_at(p, &from) : NULL;
    if (device && (!bytes || emu_is_device(p, bytes))) return NULL;
    if (device) return m && m->device ? "runs out of its allocation" : "is not device memory";
    if (m && (uintptr_t)p == from + m->bytes) m = NULL;  // begins where another's ends
    if (!m) return NULL;
    return m->device ? "is device memory" : (uintptr_t)p - from + bytes > m->bytes ? "runs out of its allocation" : NULL;
}

inline cudaError_t emu_copy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t s, bool wait) {
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind == cudaMemcpyDefault) to_device = emu_is_device(to, bytes), from_device = emu_is_device(from, bytes);
    const char *wrong = emu_copy_error(to, bytes, to_device);
    if (wrong) return emu_error(cudaErrorInvalidValue, "a copy of %zu bytes to %p, which %s", bytes, to, wrong);
    if ((wrong = emu_copy_error(from, bytes, from_device)))
        return emu_error(cudaErrorInvalidValue, "a copy of %zu bytes from %p, which %s", bytes, from, wrong);
    const bool pinned = emu_memory_at(to_device ? from : to, NULL) != NULL;
    if (to_device && !from_device && !pinned) {          // memory of the host that is not pinned is read at once
        std::shared_ptr<std::vector<char>> staged(new std::vector<char>((const char *)from, (const char *)from + bytes));
        const cudaError_t e = emu_enqueue(s, [=] { if (bytes) memcpy(to, staged->data(), bytes); });
        return e != cudaSuccess || !wait ? e : cudaStreamSynchronize(s);
    }
    const cudaError_t e = emu_enqueue(s, [=] { if (bytes) memmove(to, from, bytes); });
    if (e != cudaSuccess || !(wait || (from_device && !to_device && !pinned))) return e;
    return cudaStreamSynchronize(s);                     // and it is written when the call returns
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t s = NULL) {
    return emu_copy(to, from, bytes, kind, s, false);
}
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    return emu_copy(to, from, bytes, kind, NULL, true);
}
inline cudaError_t cudaMemsetAsync(void *to, int byte, size_t bytes, cudaStream_t s = NULL) {
    const char *wrong = emu_copy_error(to, bytes, true);
    if (wrong) return emu_error(cudaErrorInvalidValue, "cudaMemset of %zu bytes at %p, which %s", bytes, to, wrong);
    return emu_enqueue(s, [=] { if (bytes) memset(to, byte, bytes); });
}
inline cudaError_t cudaMemset(void *to, int byte, size_t bytes) { return cudaMemsetAsync(to, byte, bytes, NULL); }

// ---- Launches ----

typedef enum {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9
} cudaFuncAttribute;

inline cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value > (int)EMU_SHARED_LIMIT)
        return emu_error(cudaErrorInvalidValue, "%d bytes of shared memory for a kernel", value);
    return cudaSuccess;
}

// A kernel's argument: a pointer must be into device memory, or NULL.
template <class T> inline void emu_check_argument(const char *, int, const T &) {}
template <class T> inline void emu_check_argument(const char *kernel, int i, T *const &p) {
    const EmuMemory *m = p ? emu_memory_at((const void *)p, NULL) : NULL;
    if (p && !(m && m->device))
        emu_fail("kernel %s: its argument %d, %p, does not point to device memory", kernel, i, (const void *)p);
}

// Whether CUDA would take these sizes (CUDA C++ Programming Guide, "Compute Capabilities", technical specifications).
inline cudaError_t emu_launch_check(const char *kernel, dim3 grid, dim3 block, size_t shared) {
    const uint64_t threads = (uint64_t)block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
        return emu_error(cudaErrorInvalidConfiguration, "kernel %s: a grid of (%u,%u,%u)", kernel, grid.x, grid.y, grid.z);
    if (!threads || threads > EMU_LANES || block.z > 64)
        return emu_error(cudaErrorInvalidConfiguration, "kernel %s: a block of (%u,%u,%u)", kernel, block.x, block.y, block.z);
    if (shared > EMU_SHARED_LIMIT)
        return emu_error(cudaErrorInvalidValue, "kernel %s: %zu bytes of shared memory", kernel, shared);
    return cudaSuccess;
}

template <class... P> inline cudaError_t emu_launch(const char *kernel, void (*f)(P...), dim3 grid, dim3 block, size_t shared,
                                                    cudaStream_t stream, P... args) {
    const cudaError_t e = emu_launch_check(kernel, grid, block, shared);
    if (e != cudaSuccess) return e;
    int i = 0;
    (void)i;
    (emu_check_argument(kernel, ++i, args), ...);
    const uint64_t number = emu_launches++;
    return emu_enqueue(stream, [=] { emu_run_grid(kernel, grid, block, shared, number, [&] { f(args...); }); });
}

#endif
