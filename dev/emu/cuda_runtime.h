// cuda_runtime.h: a substitute for the CUDA runtime without a GPU (tests only): device memory is
// host memory, kernels run in simt.h. It checks that copies stay within an allocation on the right
// side, that kernels get pointers to device memory, launch limits, and that nothing is written
// around an allocation.
//
//   EMU_SEED=n      shuffles the order of a block's threads, of blocks, and of work in streams
//   EMU_LAZY=1      a stream's work runs only when the host, or another stream, waits for it
//   EMU_LAZY=2      the same, but cudaStreamNonBlocking streams run their work at once, ahead of
//                   others
//   EMU_DEVICES=n   the machine's GPUs, 8 by default; CUDA_VISIBLE_DEVICES selects some of them
//   EMU_CAPABILITY=80|86|89|90|100|120   their compute capability, 90 by default
//   EMU_FORK=1      lets a forked child use CUDA after its parent did, which no driver allows: for
//                   tests of the emulator
#ifndef EMU_CUDA_RUNTIME_H
#define EMU_CUDA_RUNTIME_H

#include "simt.h"
#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <time.h>
#include <vector>

// ---- Errors: values and names as in CUDA's driver_types.h ----

#define EMU_ERRORS(X)                                                                     \
    X(cudaSuccess, 0, "no error")                                                         \
    X(cudaErrorInvalidValue, 1, "invalid argument")                                       \
    X(cudaErrorMemoryAllocation, 2, "out of memory")                                      \
    X(cudaErrorInitializationError, 3, "initialization error")                            \
    X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                 \
    X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")                       \
    X(cudaErrorInvalidDevice, 101, "invalid device ordinal")                              \
    X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                     \
    X(cudaErrorNotReady, 600, "device not ready")                                         \
    X(cudaErrorStreamCaptureUnsupported, 900, "operation not permitted when stream is capturing")

typedef enum { EMU_ERRORS(EMU_ENUM) } cudaError_t;

inline const char *cudaGetErrorString(cudaError_t result) {
    EMU_ERRORS(EMU_TEXT)
    return "unrecognized error code";
}

inline cudaError_t emu_last_error = cudaSuccess;

// Sets the last error and explains on standard error what CUDA would reject.
#define emu_error(e, ...) \
    (fprintf(stderr, "emulator: " __VA_ARGS__), fputc('\n', stderr), emu_last_error = (e))

inline cudaError_t cudaGetLastError(void) {
    const cudaError_t e = emu_last_error;
    emu_last_error = cudaSuccess;
    return e;
}

// ---- The device ----

// Shared memory that a block may opt in to: CUDA C++ Programming Guide, "Technical Specifications
// per Compute Capability".
struct EmuCapability { int number; size_t shared; };
inline EmuCapability emu_capability(void) {
    static const EmuCapability known[] = {{80, 163 << 10}, {86, 99 << 10},   {89, 99 << 10},
                                          {90, 227 << 10}, {100, 227 << 10}, {120, 99 << 10}};
    const uint64_t asked = emu_number("EMU_CAPABILITY", 90);
    for (const EmuCapability &c : known)
        if ((uint64_t)c.number == asked) return c;
    emu_fail("EMU_CAPABILITY=%d is not one of 80, 86, 89, 90, 100 and 120", (int)asked);
}

// The process that owns the device. A driver does not survive a fork: every call fails in the
// child.
inline pid_t emu_process = 0;
inline cudaError_t emu_forked(void) {
    if (!emu_process || emu_number("EMU_FORK", 0)) emu_process = getpid();
    if (emu_process == getpid()) return cudaSuccess;
    return emu_error(cudaErrorInitializationError,
                     "CUDA in a forked child, after process %d used it", (int)emu_process);
}

typedef struct { char name[256]; int major, minor; } cudaDeviceProp;

// the current one, among those visible to the process
inline int emu_device = 0;

inline cudaError_t cudaGetDeviceCount(int *count) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    *count = visible ? *visible != 0 : (int)emu_number("EMU_DEVICES", 8);
    for (; visible && *visible; visible++) *count += *visible == ',';
    return emu_forked();
}
inline cudaError_t cudaSetDevice(int device) {
    int count;
    if (cudaGetDeviceCount(&count) != cudaSuccess) return emu_last_error;
    if (device < 0 || device >= count)
        return emu_error(cudaErrorInvalidDevice, "there is no device %d", device);
    emu_device = device;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int *device) {
    *device = emu_device;
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    const int capability = emu_capability().number;
    *p = {"emulated", capability / 10, capability % 10};
    return emu_forked();
}

// The current device's index on the machine.
inline int emu_physical_device(void) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    for (int i = 0; visible && i < emu_device; i++) visible = strchr(visible, ',') + 1;
    return visible ? atoi(visible) : emu_device;
}

// ---- Memory ----

// Allocations by address: the device's, or the host's from cudaMallocHost.
struct EmuMemory { size_t bytes; bool device; };
inline std::map<uintptr_t, EmuMemory> emu_memory;
inline size_t emu_memory_used = 0;
const size_t EMU_MEMORY = (size_t)16 << 30;              // the device's capacity

// The allocation that contains p or ends at p; NULL for other host memory.
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

// Sealed bytes within an allocation, which must not be accessed. An arena seals the gaps between
// its arrays.
inline std::map<uintptr_t, size_t> emu_seals;

inline void emu_seal_check(uintptr_t at, size_t bytes, const char *after) {
    if (!emu_untouched((const char *)at, bytes))
        emu_fail("between two arrays, in the %zu bytes at %#zx, something was written, as seen "
                 "after %s", bytes, (size_t)at, after);
}
inline void emu_memory_check(const char *after) {
    for (const auto &m : emu_memory)
        emu_guards_check((const char *)m.first, m.second.bytes, "memory", after);
    for (const auto &seal : emu_seals) emu_seal_check(seal.first, seal.second, after);
}

struct EmuStream;
inline cudaError_t cudaDeviceSynchronize(void);
inline bool emu_captured(void);                          // whether a stream is being captured

inline cudaError_t emu_allocate(void **p, size_t bytes, bool device) {
    *p = NULL;
    if (emu_forked() != cudaSuccess) return emu_last_error;
    if (emu_captured())
        return emu_error(cudaErrorStreamCaptureUnsupported,
                         "takes memory while a stream is captured");
    if (!bytes) return cudaSuccess;
    if (device && bytes > EMU_MEMORY - emu_memory_used)
        return emu_last_error = cudaErrorMemoryAllocation;
    if (!(*p = emu_guarded_new(bytes))) return emu_last_error = cudaErrorMemoryAllocation;
    emu_memory[(uintptr_t)*p] = {bytes, device};
    if (device) emu_memory_used += bytes;
    return cudaSuccess;
}

inline void emu_unseal(void *p, size_t bytes, EmuStream *s);

inline cudaError_t emu_release(void *p, bool device) {
    if (!p) return cudaSuccess;
    const cudaError_t e = cudaDeviceSynchronize();       // as cudaFree does; it checks the guards
    if (e != cudaSuccess) return e;
    auto m = emu_memory.find((uintptr_t)p);
    if (m == emu_memory.end() || m->second.device != device)
        return emu_error(cudaErrorInvalidValue, "free of %p, which was not allocated", p);
    emu_unseal(p, m->second.bytes, NULL);
    if (device) emu_memory_used -= m->second.bytes;
    emu_guarded_free((char *)p);
    emu_memory.erase(m);
    return cudaSuccess;
}

template <class T> inline cudaError_t cudaMalloc(T **p, size_t bytes) {
    return emu_allocate((void **)(void *)p, bytes, true);
}
template <class T> inline cudaError_t cudaMallocHost(T **p, size_t bytes) {
    return emu_allocate((void **)(void *)p, bytes, false);
}
inline cudaError_t cudaFree(void *p) { return emu_release(p, true); }
inline cudaError_t cudaFreeHost(void *p) { return emu_release(p, false); }
inline cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
    *total = EMU_MEMORY, *unused = EMU_MEMORY - emu_memory_used;
    return cudaSuccess;
}

// ---- Streams and events ----
//
// Work runs when it is submitted or, with EMU_LAZY=1, is queued until the host or another stream
// waits for it. Either way a stream runs its own work in order, and stream 0 waits for all streams
// that are not cudaStreamNonBlocking.

// what a stream received while it was captured
typedef std::vector<std::function<void()>> EmuGraph;
typedef EmuGraph *cudaGraph_t, *cudaGraphExec_t;
struct EmuStream { std::deque<std::function<void()>> work; unsigned flags; EmuGraph *capture; };
typedef EmuStream *cudaStream_t;
struct EmuRecord { bool done; double seconds; EmuStream *stream; };   // one recording of an event
struct EmuEvent { std::shared_ptr<EmuRecord> last; };
typedef EmuEvent *cudaEvent_t;

inline std::vector<EmuStream *> emu_streams;
inline uint64_t emu_launches = 0;

// What events record: seconds, or with EMU_COST_PLAIN the given costs of what ran (cublasLt.h).
inline double emu_cost = 0;
inline double emu_clock(void) { return getenv("EMU_COST_PLAIN") ? emu_cost : emu_seconds(); }

enum { cudaStreamDefault, cudaStreamNonBlocking };
enum { cudaEventDisableTiming = 2 };

inline cudaError_t emu_stream_check(EmuStream *s) {
    if (emu_forked() != cudaSuccess) return emu_last_error;
    if (!s || std::find(emu_streams.begin(), emu_streams.end(), s) != emu_streams.end())
        return cudaSuccess;
    return emu_error(cudaErrorInvalidResourceHandle, "a stream that does not exist");
}
inline void emu_step(EmuStream *s) {
    std::function<void()> first = std::move(s->work.front());
    s->work.pop_front();
    first();
}
inline void emu_drain(EmuStream *s) {
    while (!s->work.empty()) emu_step(s);
}

// Runs all streams, or only the blocking ones; one piece of work at a time, from a random stream.
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
    if (emu_stream_check(s) != cudaSuccess) return emu_last_error;
    if (s && s->capture) {
        s->capture->push_back(std::move(work));
        return cudaSuccess;
    }
    if (!s) emu_drain_all(false);
    const uint64_t lazy = emu_number("EMU_LAZY", 0);
    if (s && (lazy == 1 || (lazy == 2 && !(s->flags & cudaStreamNonBlocking))))
        s->work.push_back(std::move(work));
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
    emu_streams.push_back(*s = new EmuStream{{}, flags, NULL});
    return emu_forked();
}
inline cudaError_t cudaStreamCreate(cudaStream_t *s) {
    return cudaStreamCreateWithFlags(s, cudaStreamDefault);
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    if (emu_stream_check(s) != cudaSuccess) return emu_last_error;
    if (emu_captured())
        return emu_error(cudaErrorStreamCaptureUnsupported, "waits while a stream is captured");
    if (s) emu_drain(s);
    else emu_drain_all(false);
    emu_memory_check("other work");
    return cudaSuccess;
}
// Polling makes progress: it runs one piece of work.
inline cudaError_t cudaStreamQuery(cudaStream_t s) {
    if (s && !s->work.empty()) emu_step(s);
    return s && !s->work.empty() ? cudaErrorNotReady : cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t s) {
    if (emu_stream_check(s) != cudaSuccess) return emu_last_error;
    emu_drain(s);
    emu_streams.erase(std::find(emu_streams.begin(), emu_streams.end(), s));
    delete s;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize(void) {
    if (emu_forked() != cudaSuccess) return emu_last_error;
    if (emu_captured())
        return emu_error(cudaErrorStreamCaptureUnsupported, "waits while a stream is captured");
    emu_drain_all(true);
    emu_memory_check("other work");
    return cudaSuccess;
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    *e = new EmuEvent{};
    return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
inline cudaError_t cudaEventDestroy(cudaEvent_t e) { delete e; return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s = NULL) {
    std::shared_ptr<EmuRecord> r(new EmuRecord{false, 0, s});
    e->last = r;
    return emu_enqueue(s, [r] { r->done = true, r->seconds = emu_clock(); });
}
inline void emu_reach(const std::shared_ptr<EmuRecord> &r) {
    while (r && !r->done) emu_step(r->stream);
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned = 0) {
    // the last recording before this call; CUDA would not wait for none
    const std::shared_ptr<EmuRecord> r = e->last;
    if (!r)
        return emu_error(cudaErrorInvalidResourceHandle,
                         "waits for an event that was not recorded");
    return emu_enqueue(s, [r] { emu_reach(r); });
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t e) { emu_reach(e->last); return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    if (!from->last || !to->last)
        return emu_error(cudaErrorInvalidResourceHandle, "an event that was not recorded");
    if (!from->last->done || !to->last->done) return emu_last_error = cudaErrorNotReady;
    *ms = (float)(1e3 * (to->last->seconds - from->last->seconds));
    return cudaSuccess;
}

// Ordered by the stream's work, so that memory can be divided anew while work on its old arrays is
// queued.
inline void emu_seal(void *p, size_t bytes, cudaStream_t s) {
    emu_enqueue(s, [=] {
#if EMU_ASAN
        __asan_poison_memory_region(p, bytes);
#else
        memset(p, EMU_POISON, bytes);
        emu_seals[(uintptr_t)p] = bytes;
#endif
    });
}

// Removes the seals within these bytes.
inline void emu_unseal(void *p, size_t bytes, cudaStream_t s) {
    emu_enqueue(s, [=] {
#if EMU_ASAN
        __asan_unpoison_memory_region(p, bytes);
#endif
        const auto from = emu_seals.lower_bound((uintptr_t)p),
        end = emu_seals.lower_bound((uintptr_t)p + bytes);
        for (auto seal = from; seal != end; ++seal) emu_seal_check(seal->first, seal->second,
                                                                   "other work");
        emu_seals.erase(from, end);
    });
}

// ---- Graphs ----

typedef enum { cudaStreamCaptureModeThreadLocal = 1 } cudaStreamCaptureMode;

inline cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    if (!s || emu_stream_check(s) != cudaSuccess || s->capture)
        return emu_error(cudaErrorInvalidResourceHandle, "a stream to capture");
    s->capture = new EmuGraph;
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
    if (!s || emu_stream_check(s) != cudaSuccess || !s->capture)
        return emu_error(cudaErrorInvalidResourceHandle, "a stream not captured");
    *graph = s->capture, s->capture = NULL;
    return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph,
                                                 unsigned long long) {
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

typedef enum { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost,
               cudaMemcpyDeviceToDevice } cudaMemcpyKind;

// What is wrong with one end of a copy, or NULL.
inline const char *emu_copy_error(const void *p, size_t bytes, bool device) {
    uintptr_t from = 0;
    const EmuMemory *m = bytes ? emu_memory_at(p, &from) : NULL;
    if (device && (!bytes || emu_is_device(p, bytes))) return NULL;
    if (device) return m && m->device ? "runs out of its allocation" : "is not device memory";
    if (m && (uintptr_t)p == from + m->bytes) m = NULL;  // begins where another ends
    if (!m) return NULL;
    return m->device ? "is device memory" : (uintptr_t)p - from + bytes > m->bytes ? "runs out of "
        "its allocation" : NULL;
}

inline cudaError_t emu_copy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t s, bool wait) {
    const bool to_device = kind != cudaMemcpyDeviceToHost, from_device = kind !=
        cudaMemcpyHostToDevice;
    const char *wrong_to = emu_copy_error(to, bytes, to_device),
        *wrong_from = emu_copy_error(from, bytes, from_device);
    if (wrong_to || wrong_from)
        return emu_error(cudaErrorInvalidValue, "a copy of %zu bytes %s %p, which %s", bytes,
                         wrong_to ? "to" : "from", wrong_to ? to : from,
                         wrong_to ? wrong_to : wrong_from);
    const bool pinned = emu_memory_at(to_device ? from : to, NULL) != NULL;
    std::shared_ptr<std::vector<char>> staged;           // pageable host memory is read at once,
                                                         // ...
    if (!from_device && !pinned)
        staged.reset(new std::vector<char>((const char *)from, (const char *)from + bytes));
    const cudaError_t e =
        emu_enqueue(s, [=] { if (bytes) memmove(to, staged ? staged->data() : from, bytes); });
    if (e != cudaSuccess || !(wait || (!to_device && !pinned))) return e;
    return cudaStreamSynchronize(s);                     // ... and is written when the call returns
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t s = NULL) {
    return emu_copy(to, from, bytes, kind, s, false);
}
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    return emu_copy(to, from, bytes, kind, NULL, true);
}
inline cudaError_t cudaMemsetAsync(void *to, int byte, size_t bytes, cudaStream_t s = NULL) {
    const char *wrong = emu_copy_error(to, bytes, true);
    if (wrong)
        return emu_error(cudaErrorInvalidValue, "cudaMemset of %zu bytes at %p, which %s", bytes,
                         to, wrong);
    return emu_enqueue(s, [=] { if (bytes) memset(to, byte, bytes); });
}
inline cudaError_t cudaMemset(void *to, int byte, size_t bytes) {
    return cudaMemsetAsync(to, byte, bytes, NULL);
}

// ---- Launches ----

// Checks a kernel argument: a pointer must point into device memory, or be NULL.
template <class T> inline void emu_check_argument(const char *, int, const T &) {}
template <class T> inline void emu_check_argument(const char *kernel, int i, T *const &p) {
    const EmuMemory *m = p ? emu_memory_at((const void *)p, NULL) : NULL;
    if (p && !(m && m->device))
        emu_fail("kernel %s: its argument %d, %p, does not point to device memory", kernel, i,
                 (const void *)p);
}

typedef enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 } cudaFuncAttribute;
inline std::map<const void *, size_t> emu_opted_in;      // kernels that opted in to more than
                                                         // EMU_SHARED_PLAIN, and to how much

inline cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute, int bytes) {
    if (bytes < 0 || (size_t)bytes > emu_capability().shared)
        return emu_error(cudaErrorInvalidValue, "%d bytes of shared memory, where a block has %zu",
                         bytes, emu_capability().shared);
    emu_opted_in[kernel] = (size_t)bytes;
    return emu_forked();
}

// Whether CUDA would accept these sizes (CUDA C++ Programming Guide, "Compute Capabilities",
// technical specifications).
inline cudaError_t emu_launch_check(const char *kernel, const void *f, dim3 grid, dim3 block,
                                    size_t shared) {
    const uint64_t threads = (uint64_t)block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
        return emu_error(cudaErrorInvalidConfiguration, "kernel %s: a grid of (%u,%u,%u)", kernel,
                         grid.x, grid.y, grid.z);
    if (!threads || threads > EMU_LANES || block.z > 64)
        return emu_error(cudaErrorInvalidConfiguration, "kernel %s: a block of (%u,%u,%u)", kernel,
                         block.x, block.y, block.z);
    const auto opted = emu_opted_in.find(f);
    const size_t most = opted == emu_opted_in.end() ? EMU_SHARED_PLAIN : std::max(EMU_SHARED_PLAIN,
        opted->second);
    if (shared > most)
        return emu_error(cudaErrorInvalidValue, "kernel %s: %zu bytes of shared memory, and "
                         "cudaFuncSetAttribute allows %zu", kernel, shared, most);
    return cudaSuccess;
}

template <class... P> inline cudaError_t emu_launch(const char *kernel, void (*f)(P...), dim3 grid,
                                                    dim3 block, size_t shared, cudaStream_t stream,
                                                    P... args) {
    const cudaError_t e = emu_launch_check(kernel, (const void *)f, grid, block, shared);
    if (e != cudaSuccess) return e;
    int i = 0;
    (void)i;
    (emu_check_argument(kernel, ++i, args), ...);
    const uint64_t number = emu_launches++;
    return emu_enqueue(stream, [=] {
        emu_run_grid(kernel, grid, block, shared, number, [&] { f(args...); });
        emu_memory_check(kernel);
        emu_cost += 1e-6 * (double)emu_number("EMU_COST_KERNEL", 0);
    });
}

#endif
