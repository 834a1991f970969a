// test_nccl.cu: tests of dev/emu/nccl.h, through which the GPU engine's ranks communicate in the
// tests: its collectives against plain loops, in place and not, at sizes around that of a piece,
// and what a rank sees when another dies.

#include "../model/cuda.h"
#include <nccl.h>
#include "test.h"
#include "test_nccl.h"

// Runs f in n processes, each on its own device; returns how many exited with code 0.
static int run_ranks(int n, int (*f)(ncclComm_t, int rank, int world)) {
    ncclUniqueId id;
    pid_t child[EMU_NCCL_RANKS];
    int good = 0;
    NCCL_CHECK(ncclGetUniqueId(&id));
    fflush(NULL);
    for (int r = 0; r < n; r++) {
        if ((child[r] = fork())) continue;
        ncclComm_t comm;
        leave_memory();
        setenv("EMU_FORK", "1", 1);
        alarm(60);
        if (!freopen("/dev/null", "w", stderr)) _exit(99);
        CUDA_CHECK(cudaSetDevice(r));
        NCCL_CHECK(ncclCommInitRank(&comm, n, id, r));
        const int wrong = f(comm, r, n);
        if (!wrong) NCCL_CHECK(ncclCommDestroy(comm));
        _exit(wrong);
    }
    for (int r = 0; r < n; r++) {
        int status = 1;
        waitpid(child[r], &status, 0);
        good += status == 0;
    }
    return good;
}

template <class N> static ncclDataType_t type_of(void) {
    return sizeof(N) == 2 ? ncclBfloat16 : sizeof(N) == 4 ? ncclFloat32 : ncclFloat64;
}

// An element of rank r; sums of them round in bf16.
static float number(int r, size_t i) { return (float)((i * 7 + (size_t)r * 31) % 101) / 16 - 2; }

template <class N> static float sum_of(int world, size_t i) {
    N sum = (N)number(0, i);
    for (int r = 1; r < world; r++) sum = (N)((float)sum + number(r, i));
    return (float)sum;
}

template <class N> static int collectives(ncclComm_t c, int rank, int world, size_t n) {
    const ncclDataType_t type = type_of<N>();
    const size_t W = (size_t)world, all = n * W;
    cudaStream_t s;
    N *x, *y, *host = (N *)xcalloc(2 * all, sizeof(N));
    int wrong = 0;
    CUDA_CHECK(cudaStreamCreate(&s));
    CUDA_CHECK(cudaMalloc(&x, all * sizeof(N)));
    CUDA_CHECK(cudaMalloc(&y, all * sizeof(N)));
    for (int k = 0; k < 5; k++) {
        for (size_t i = 0; i < all; i++) host[i] = (N)number(rank, i);
        CUDA_CHECK(cudaMemcpy(x, host, all * sizeof(N), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaMemset(y, 0, all * sizeof(N)));
        N *mine = x + (size_t)rank * n;
        if (k == 0) NCCL_CHECK(ncclAllReduce(x, y, all, type, ncclSum, c, s));
        if (k == 1) NCCL_CHECK(ncclAllReduce(x, x, all, type, ncclSum, c, s));
        if (k == 2) NCCL_CHECK(ncclReduceScatter(x, mine, n, type, ncclSum, c, s));
        if (k == 3) NCCL_CHECK(ncclAllGather(mine, x, n, type, c, s));
        if (k == 4) NCCL_CHECK(ncclBroadcast(x, y, all, type, world - 1, c, s));
        CUDA_CHECK(cudaStreamSynchronize(s));
        CUDA_CHECK(cudaMemcpy(host, x, all * sizeof(N), cudaMemcpyDeviceToHost));
        CUDA_CHECK(cudaMemcpy(host + all, y, all * sizeof(N), cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < all; i++) {
            const int owner = (int)(i / n), own = owner == rank;
            const float own_x = number(rank, i), sum = sum_of<N>(world, i);
            const float want_x[5] = {own_x, sum, own ? sum : own_x, number(owner, i), own_x};
            const float want_y[5] = {sum, 0, 0, 0, number(world - 1, i)};
            wrong += (float)host[i] != (float)(N)want_x[k] || (float)host[all + i] !=
                (float)(N)want_y[k];
        }
    }
    free(host);
    CUDA_CHECK(cudaFree(x));
    CUDA_CHECK(cudaFree(y));
    CUDA_CHECK(cudaStreamDestroy(s));
    return wrong != 0;
}

static int all_collectives(ncclComm_t c, int rank, int world) {
    static const size_t sizes[] = {1, 3, 1000, EMU_NCCL_PIECE / 4, EMU_NCCL_PIECE / 4 + 1};
    int wrong = 0;
    for (size_t n : sizes)
        wrong |= collectives<float>(c, rank, world, n) | collectives<bf16>(c, rank, world, n) |
                 collectives<double>(c, rank, world, n);
    return wrong;
}

void test_nccl_collectives(void) {
    for (int world = 1; world <= 4; world += world) {
        const int good = run_ranks(world, all_collectives);
        EXPECT(good == world, "%d of %d ranks got what they should", good, world);
    }
}

// Rank 1 exits between two sums: the others get an error, not a hang, and later calls return at
// once.
static int one_dies(ncclComm_t c, int rank, int) {
    float *x;
    ncclResult_t error;
    CUDA_CHECK(cudaMalloc(&x, 100 * sizeof *x));
    CUDA_CHECK(cudaMemset(x, 0, 100 * sizeof *x));
    NCCL_CHECK(ncclAllReduce(x, x, 100, ncclFloat32, ncclSum, c, NULL));
    NCCL_CHECK(ncclCommGetAsyncError(c, &error));
    if (error != ncclSuccess || rank == 1) _exit(error != ncclSuccess);
    for (int i = 0; i < 3; i++) NCCL_CHECK(ncclAllReduce(x, x, 100, ncclFloat32, ncclSum, c, NULL));
    NCCL_CHECK(ncclCommGetAsyncError(c, &error));
    NCCL_CHECK(ncclCommAbort(c));
    _exit(error != ncclRemoteError);
}

void test_nccl_dead_rank(void) {
    const int good = run_ranks(3, one_dies);
    EXPECT(good == 3, "%d of 3 ranks ended as they should", good);
}

static int one_differs(ncclComm_t c, int rank, int) {
    float *x;
    CUDA_CHECK(cudaMalloc(&x, 100 * sizeof *x));
    CUDA_CHECK(cudaMemset(x, 0, 100 * sizeof *x));
    NCCL_CHECK(ncclAllReduce(x, x, rank == 1 ? 99 : 100, ncclFloat32, ncclSum, c, NULL));
    _exit(0);
}

void test_nccl_ranks_disagree(void) {
    const int good = run_ranks(2, one_differs);
    EXPECT(good == 0, "%d of 2 ranks did not notice that they add up arrays of other sizes", good);
}

static int nothing(ncclComm_t, int, int) { return 0; }

// Two ranks on one device are refused, however they came to share it.
void test_nccl_same_device(void) {
    setenv("CUDA_VISIBLE_DEVICES", "3,1", 1);
    int good = run_ranks(2, nothing);
    EXPECT(good == 2, "of 2 ranks on two devices %d begin", good);
    setenv("CUDA_VISIBLE_DEVICES", "3,3", 1);
    good = run_ranks(2, nothing);
    EXPECT(good == 0, "of 2 ranks on one device %d begin", good);
    unsetenv("CUDA_VISIBLE_DEVICES");
}
