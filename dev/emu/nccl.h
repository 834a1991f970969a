// nccl.h: a substitute for NCCL (tests only): collectives between processes of one machine through
// shared memory, for ncclFloat32, ncclFloat64 and ncclBfloat16. Sums are taken in rank order; in
// bf16 each addition is rounded, as by a ring of GPUs. Work is submitted to streams, and a process
// waits inside it for the others.
//
// It checks that each rank has its own device, that all ranks are in the same call with the same
// sizes, and that arrays are in device memory. The death of a rank is an asynchronous error
// (ncclRemoteError): collectives in flight end without a result, and so do all later ones.
#ifndef EMU_NCCL_H
#define EMU_NCCL_H

#include "cuda_bf16.h"
#include <atomic>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>

#define EMU_NCCL_RESULTS(X)                                                                       \
    X(ncclSuccess, 0, "no error") X(ncclUnhandledCudaError, 1, "unhandled cuda error")            \
    X(ncclSystemError, 2, "unhandled system error") X(ncclInvalidArgument, 4, "invalid argument") \
    X(ncclInvalidUsage, 5, "invalid usage")                                                       \
    X(ncclRemoteError, 6, "remote process exited or there was a network error")                   \
    X(ncclInProgress, 7, "in progress")

typedef enum { EMU_NCCL_RESULTS(EMU_ENUM) } ncclResult_t;
typedef enum { ncclFloat32 = 7, ncclFloat64 = 8, ncclBfloat16 = 9 } ncclDataType_t;
typedef enum { ncclSum = 0 } ncclRedOp_t;
typedef struct { char internal[128]; } ncclUniqueId;

inline const char *ncclGetErrorString(ncclResult_t result) {
    EMU_NCCL_RESULTS(EMU_TEXT)
    return "unknown result code";
}

// ---- What the processes share ----

enum { EMU_NCCL_RANKS = 16, EMU_NCCL_PIECE = 1 << 16 };            // bytes of a rank's buffer
enum { EMU_ALL_REDUCE = 1, EMU_REDUCE_SCATTER, EMU_ALL_GATHER, EMU_BROADCAST };
struct EmuNcclCall { int what, type, root; size_t count; };
struct EmuNcclShared {
    std::atomic<int> arrived, generation, failed;
    int device[EMU_NCCL_RANKS];                          // index on the machine
    EmuNcclCall call[EMU_NCCL_RANKS];
    char buffer[EMU_NCCL_RANKS][EMU_NCCL_PIECE];
};
struct EmuNccl {
    EmuNcclShared *shared;
    int fd, rank, world;
    ncclResult_t error;
};
typedef EmuNccl *ncclComm_t;

// Each rank locks the byte at its index while it lives: the system releases a lock with the
// process, however that ends.
inline bool emu_nccl_alive(const EmuNccl *c, int rank) {
    struct flock f = {};
    f.l_type = F_WRLCK, f.l_whence = SEEK_SET, f.l_start = rank, f.l_len = 1;
    return rank == c->rank || (fcntl(c->fd, F_GETLK, &f) == 0 && f.l_type != F_UNLCK);
}

// Waits for all ranks. `seconds`: how long for ranks that have not joined yet; 0: all have, and a
// missing one is dead.
inline bool emu_nccl_meet(EmuNccl *c, double seconds) {
    EmuNcclShared *s = c->shared;
    const int generation = s->generation;
    const double until = emu_seconds() + seconds;
    if (s->failed) return false;
    if (s->arrived.fetch_add(1) + 1 == c->world) {
        s->arrived = 0;
        s->generation = generation + 1;
        return true;
    }
    for (int spins = 1; s->generation == generation && !s->failed; spins++) {
        sched_yield();
        if (spins % 256) continue;
        for (int r = 0; r < c->world && !seconds; r++)
            if (!emu_nccl_alive(c, r) && s->generation == generation) s->failed = 1;
        if (seconds && emu_seconds() > until) s->failed = 1;
        usleep(50);
    }
    return s->generation != generation;
}

// ---- Communicators ----

inline ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    int fd = -1, n = 0;
    memset(id, 0, sizeof *id);
    do {
        snprintf(id->internal, sizeof id->internal, "/emu_nccl_%d_%d", (int)getpid(), n++);
        fd = shm_open(id->internal, O_CREAT | O_EXCL | O_RDWR, 0600);
    } while (fd < 0 && errno == EEXIST);                 // left by a killed process with this pid
    if (fd < 0 || ftruncate(fd, sizeof(EmuNcclShared))) return ncclSystemError;       // zero-filled
    close(fd);
    return ncclSuccess;
}

inline ncclResult_t ncclCommInitRank(ncclComm_t *comm, int world, ncclUniqueId id, int rank) {
    *comm = NULL;
    if (world < 1 || world > EMU_NCCL_RANKS || rank < 0 || rank >= world)
        return ncclInvalidArgument;
    id.internal[sizeof id.internal - 1] = 0;
    const int fd = shm_open(id.internal, O_RDWR, 0);
    if (fd < 0) return ncclSystemError;
    void *at = mmap(NULL, sizeof(EmuNcclShared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    struct flock f = {};
    f.l_type = F_WRLCK, f.l_whence = SEEK_SET, f.l_start = rank, f.l_len = 1;
    // EAGAIN: this rank has already joined
    if (at == MAP_FAILED || fcntl(fd, F_SETLK, &f)) return ncclSystemError;
    EmuNccl *c = new EmuNccl{(EmuNcclShared *)at, fd, rank, world, ncclSuccess};
    c->shared->device[rank] = emu_physical_device();
    const bool met = emu_nccl_meet(c, 60);
    if (rank == 0) shm_unlink(id.internal);
    if (!met) return ncclSystemError;
    for (int r = 0; r < world; r++)
        if (r != rank && c->shared->device[r] == c->shared->device[rank]) {
            fprintf(stderr, "emulator: NCCL: Duplicate GPU detected : rank %d and rank %d both on "
                    "CUDA device %d\n", rank, r, c->shared->device[r]);
            return ncclInvalidUsage;
        }
    *comm = c;
    return ncclSuccess;
}

inline ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *error) {
    *error = c->error;
    return ncclSuccess;
}
inline ncclResult_t ncclCommAbort(ncclComm_t c) {
    munmap(c->shared, sizeof *c->shared);
    close(c->fd);                                        // and releases the lock
    delete c;
    return ncclSuccess;
}
inline ncclResult_t ncclCommDestroy(ncclComm_t c) {
    cudaDeviceSynchronize();
    if (c->error == ncclSuccess) emu_nccl_meet(c, 0);    // nobody needs this rank any longer
    return ncclCommAbort(c);
}

// ---- Collectives ----

inline size_t emu_nccl_size(int type) {
    return type == ncclFloat32 ? 4 : type == ncclFloat64 ? 8 : 2;
}

// to (n) = the sum of all ranks' buffers; in bf16 the assignment rounds.
template <class T> inline void emu_nccl_sum(EmuNccl *c, void *to, size_t n) {
    T *sum = (T *)to;
    memcpy(to, c->shared->buffer[0], n * sizeof(T));
    for (int r = 1; r < c->world; r++)
        for (size_t i = 0; i < n; i++)
            sum[i] = sum[i] + ((const T *)(const void *)c->shared->buffer[r])[i];
}

// Each rank in `gives` puts `bytes` into its buffer, piece by piece; `take` reads the buffers.
template <class Take> inline bool emu_nccl_pieces(EmuNccl *c, const char *gives, size_t bytes,
                                                  Take take) {
    for (size_t at = 0; at < bytes; at += EMU_NCCL_PIECE) {
        const size_t n = std::min(bytes - at, (size_t)EMU_NCCL_PIECE);
        if (gives) memcpy(c->shared->buffer[c->rank], gives + at, n);
        if (!emu_nccl_meet(c, 0)) return false;
        take(at, n);
        if (!emu_nccl_meet(c, 0)) return false;
    }
    return true;
}

inline bool emu_nccl_run(EmuNccl *c, EmuNcclCall call, const char *from, char *to) {
    EmuNcclShared *s = c->shared;
    const size_t one = emu_nccl_size(call.type), bytes = call.count * one;
    auto sum = [=](char *at, size_t n) {
        if (call.type == ncclFloat32) emu_nccl_sum<float>(c, at, n / one);
        else if (call.type == ncclFloat64) emu_nccl_sum<double>(c, at, n / one);
        else emu_nccl_sum<__nv_bfloat16>(c, at, n / one);
    };
    s->call[c->rank] = call;
    if (!emu_nccl_meet(c, 0)) return false;
    for (int r = 0; r < c->world; r++) {
        const EmuNcclCall &o = s->call[r];
        if (o.what == call.what && o.type == call.type && o.root == call.root &&
            o.count == call.count)
            continue;
        emu_fail("NCCL: rank %d is in collective %d of %zu numbers of type %d, rank %d in %d of "
                 "%zu of type %d", c->rank, call.what, call.count, call.type, r, o.what, o.count,
                 o.type);
    }
    if (!emu_nccl_meet(c, 0)) return false;
    if (call.what == EMU_ALL_REDUCE)
        return emu_nccl_pieces(c, from, bytes, [=](size_t at, size_t n) { sum(to + at, n); });
    if (call.what == EMU_BROADCAST)
        return emu_nccl_pieces(c, c->rank == call.root ? from : NULL, bytes,
                               [=](size_t at, size_t n) { memcpy(to + at, s->buffer[call.root], n);
                                                          });
    if (call.what == EMU_ALL_GATHER)
        return emu_nccl_pieces(c, from, bytes, [=](size_t at, size_t n) {
            for (int r = 0; r < c->world; r++) memcpy(to + (size_t)r * bytes + at, s->buffer[r], n);
        });
    // reduce and scatter: one rank's share after another
    for (int r = 0; r < c->world; r++)
        if (!emu_nccl_pieces(c, from + (size_t)r * bytes, bytes,
                             [=](size_t at, size_t n) { if (r == c->rank) sum(to + at, n);
                                                        })) return false;
    return true;
}

inline ncclResult_t emu_nccl_give(EmuNccl *c, EmuNcclCall call, const void *from, void *to,
                                  size_t gives, size_t takes, cudaStream_t stream) {
    const size_t one = emu_nccl_size(call.type), count = call.count;
    if (!c || call.root < 0 || call.root >= c->world) return ncclInvalidArgument;
    if (!count) return ncclSuccess;
    if ((gives && !emu_is_device(from, gives * count * one)) ||
        !emu_is_device(to, takes * count * one))
        return ncclInvalidArgument;
    const cudaError_t e = emu_enqueue(stream, [=] {
        if (c->error == ncclSuccess && !emu_nccl_run(c, call, (const char *)from,
                                                     (char *)to)) c->error = ncclRemoteError;
    });
    return e == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}

inline ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t type,
                                  ncclRedOp_t, ncclComm_t c, cudaStream_t stream) {
    return emu_nccl_give(c, {EMU_ALL_REDUCE, type, 0, n}, from, to, 1, 1, stream);
}
inline ncclResult_t ncclReduceScatter(const void *from, void *to, size_t n, ncclDataType_t type,
                                      ncclRedOp_t, ncclComm_t c, cudaStream_t stream) {
    return emu_nccl_give(c, {EMU_REDUCE_SCATTER, type, 0, n}, from, to, (size_t)c->world, 1,
                         stream);
}
inline ncclResult_t ncclAllGather(const void *from, void *to, size_t n, ncclDataType_t type,
                                  ncclComm_t c, cudaStream_t stream) {
    return emu_nccl_give(c, {EMU_ALL_GATHER, type, 0, n}, from, to, 1, (size_t)c->world, stream);
}
inline ncclResult_t ncclBroadcast(const void *from, void *to, size_t n, ncclDataType_t type,
                                  int root, ncclComm_t c, cudaStream_t stream) {
    return emu_nccl_give(c, {EMU_BROADCAST, type, root, n}, from, to, c->rank == root, 1, stream);
}

#endif
