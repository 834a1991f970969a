// simt.h: runs CUDA kernels on the host, so that the tests can execute train_gpt.cu without a GPU.
//
// The blocks of a grid run one after the other, in an order shuffled by the variable EMU_SEED. The
// threads of a block ("lanes") run one at a time until they wait: at __syncthreads, or at an
// operation of a whole warp (shuffles, votes, mma). A waiting lane is suspended on its own stack (a
// "fiber"), and another one runs, also in shuffled order. So a missing barrier shows up as
// different bits under different seeds, or as NaN: all memory starts as NaN (0xFF in each byte).
//
// Whatever is undefined on a GPU ends the program with the kernel's name, the block and the thread:
// a barrier that only part of the block reaches, a warp operation with lanes missing, shared memory
// overruns, misaligned vectors.
#ifndef EMU_SIMT_H
#define EMU_SIMT_H

#include <functional>
#include <math.h>
#include <numeric>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined __SANITIZE_ADDRESS__ || __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#define EMU_ASAN 1
#else
#define EMU_ASAN 0
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __align__(n)           __attribute__((aligned(n)))

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
enum { warpSize = 32 };

// EMU_UNBOUND: the block size that can start whatever registers its kernel uses, 65536 / 255 in
// whole warps.
enum { EMU_LANES = 1024, EMU_UNBOUND = 256, EMU_POISON = 0xFF };
const size_t EMU_GUARD_BYTES = EMU_ASAN ? 0 : 1024, EMU_SHARED_PLAIN = 48 << 10,
    EMU_STACK = (EMU_ASAN ? 512 : 128) << 10;

// ---- Fibers: stacks, and switching between them ----

// A suspended stack: `sp` is its position; `fake` is AddressSanitizer's.
struct EmuFiber { void *sp; char *stack; size_t size; void *fake; };

// emu_switch(&from, to): saves what the calling convention requires a function to preserve, and
// continues on another stack.
#if defined __x86_64__ && defined __ELF__                 // System V ABI: rbx, rbp, r12 to r15
#define EMU_FRAME_WORDS 8
asm(".pushsection .text.emu_switch,\"axG\",@progbits,emu_switch,comdat\n"
    ".weak emu_switch\n .hidden emu_switch\n .type emu_switch,@function\n"
    "emu_switch:\n"
    " pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    " movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
    " popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n"
    ".popsection\n");
// the word of the frame that holds the return address
enum { EMU_FRAME_RETURN = 6 };
extern "C" void emu_switch(void **from, void *to);
#else                                                     // elsewhere: ucontext, which is slower;
                                                          // sp is a ucontext_t
#include <ucontext.h>
#define EMU_FRAME_WORDS 0
inline void emu_switch(void **from, void *to) {
    ucontext_t here;
    *from = &here;
    swapcontext(&here, (ucontext_t *)to);
}
#endif

// ---- A running block ----

enum EmuState { EMU_NEW, EMU_RUNS, EMU_BARRIER, EMU_WARP, EMU_DONE };

// 16 bytes, or zeros if from is NULL
struct EmuCopy { void *to; const void *from; unsigned group; };

struct EmuLane {
    uint3 index;
    EmuState state;
    EmuFiber *fiber;          // where it waits; NULL: running, not started or finished
    const char *what, *file;  // what it waits in
    int line;
    unsigned mask;
    void *operand;
    EmuCopy *copy;            // asynchronous copies in flight
    unsigned copies, capacity, group;
};

// Bit masks of lanes that are ready, that wait in a warp operation, that exist; their order of
// execution: odd * i + add.
struct EmuWarp { unsigned ready, waiting, all, i, odd, add; };

// One processor: a block, its lanes and the fibers they run on. Each host thread that runs blocks
// has its own.
struct EmuCore {
    const char *kernel;
    const std::function<void()> *body;
    EmuLane lanes[EMU_LANES], *lane;              // lane: the running one
    EmuWarp warp[EMU_LANES / 32];
    unsigned threads, warps, warps_ready, at, i, odd, add, at_barrier, done;
    uint64_t random;
    EmuFiber home, *fiber, *idle[EMU_LANES + 1];  // the host's own stack; the running one; unused
                                                  // ones
    unsigned idles, fibers;
    unsigned bound;                               // threads that the kernel's launch bounds allow
    int barrier_line;                             // of the __syncthreads at which some lanes wait
    char *shared;
    size_t shared_bytes, shared_capacity;             // of this launch; of the allocation
};

// NULL: no kernel has run on this host thread
inline thread_local EmuCore *emu_core = NULL;
inline thread_local bool emu_in_kernel = false;

// ---- Utilities ----

// Ends the program, reporting kernel, block, thread and the error.
__attribute__((format(printf, 1, 2), noreturn)) inline void emu_fail(const char *format, ...) {
    fflush(stdout);
    fprintf(stderr, "error: ");
    if (emu_in_kernel) {
        fprintf(stderr, "kernel %s, block (%u,%u,%u)", emu_core->kernel, blockIdx.x, blockIdx.y,
                blockIdx.z);
        if (emu_core->lane)
            fprintf(stderr, ", thread (%u,%u,%u)", threadIdx.x, threadIdx.y, threadIdx.z);
        fprintf(stderr, ": ");
    }
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    fflush(stderr);
    _exit(1);                                            // not exit(): this may be any stack
}

// Tables of results, X(name, number, text), expand to the enumeration and the function that gives
// the text.
#define EMU_ENUM(name, number, text) name = number,
#define EMU_TEXT(name, number, text) if (result == name) return text;

inline uint64_t emu_number(const char *variable, uint64_t otherwise) {
    const char *text = getenv(variable);
    return text && *text ? strtoull(text, NULL, 10) : otherwise;
}

// splitmix64 (Steele, Lea and Flood 2014).
inline uint64_t emu_random(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

inline double emu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

template <class T, class F> inline T emu_bits(F from) {
    static_assert(sizeof(T) == sizeof(F), "the same number of bits");
    T to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Allocates exactly this much memory, poisoned; NULL on failure. AddressSanitizer watches its
// surroundings; without it, they are poisoned too, and emu_guards_check ends the program if they
// have changed.
inline char *emu_guarded_new(size_t bytes) {
    void *p;
    if (posix_memalign(&p, 256, bytes + 2 * EMU_GUARD_BYTES)) return NULL;
    return (char *)memset(p, EMU_POISON, bytes + 2 * EMU_GUARD_BYTES) + EMU_GUARD_BYTES;
}
inline void emu_guarded_free(char *p) { free(p - EMU_GUARD_BYTES); }

inline bool emu_untouched(const char *p, size_t bytes) {
    return !bytes || ((unsigned char)*p == EMU_POISON && !memcmp(p, p + 1, bytes - 1));
}
inline void emu_guards_check(const char *p, size_t bytes, const char *what, const char *after) {
    const bool before = !emu_untouched(p - EMU_GUARD_BYTES, EMU_GUARD_BYTES);
    if (before || !emu_untouched(p + bytes, EMU_GUARD_BYTES))
        emu_fail("%s the %zu bytes of %s at %p something was written, as seen after %s",
                 before ? "before" : "beyond", bytes, what, (const void *)p, after);
}

inline void emu_shuffle_warp(EmuCore *c, EmuWarp *w) {
    const uint64_t r = emu_random(&c->random);
    w->odd = (unsigned)r | 1, w->add = (unsigned)(r >> 32);
}

// Switches to another fiber; returns when this one is resumed. AddressSanitizer must know which
// stack is in use.
inline void emu_go(EmuCore *c, EmuFiber *to) {
    EmuFiber *from = c->fiber;
    c->fiber = to;
#if EMU_ASAN
    __sanitizer_start_switch_fiber(&from->fake, to->stack, to->size);
#endif
    emu_switch(&from->sp, to->sp);
#if EMU_ASAN
    __sanitizer_finish_switch_fiber(from->fake, NULL, NULL);
#endif
}

// No lane can continue: reports who waits where, one line per distinct place.
__attribute__((noreturn)) inline void emu_deadlock(EmuCore *c) {
    static const char *const state[] = {"has not begun", "runs", "waits", "waits", "has exited"};
    EmuLane *waits = NULL;                               // in a warp operation, if any is
    unsigned met = 0;
    fprintf(stderr, "in kernel %s no thread can continue:\n", c->kernel);
    for (unsigned i = 0, told = 0; i < c->threads; i++) {
        EmuLane *l = &c->lanes[i], *before = i ? l - 1 : NULL;
        const bool in_warp = l->state == EMU_WARP;
        if (in_warp || (l->state == EMU_BARRIER && !waits)) waits = l;
        if (before && before->state == l->state && before->what == l->what &&
            before->line == l->line)
            continue;
        if (told++ >= 6) continue;
        fprintf(stderr, "  thread (%u,%u,%u) %s", l->index.x, l->index.y, l->index.z,
                state[l->state]);
        if (in_warp || l->state == EMU_BARRIER)
            fprintf(stderr, " in %s at %s:%d", l->what, l->file, l->line);
        if (in_warp) fprintf(stderr, ", mask %08x", l->mask);
        fputc('\n', stderr);
    }
    for (unsigned i = 0; i < c->threads; i++) {
        const EmuLane *l = &c->lanes[i];
        if (waits->state == EMU_WARP && i / 32 != (unsigned)(waits - c->lanes) / 32) continue;
        met += l->state == waits->state && l->line == waits->line && l->mask == waits->mask;
    }
    c->lane = waits;
    threadIdx = waits->index;
    if (waits->state == EMU_BARRIER)
        emu_fail("%s at %s:%d is reached by %u of the block's %u threads", waits->what, waits->file,
                 waits->line, met, c->threads);
    emu_fail("%s at %s:%d, mask %08x, is reached by only %u lanes of its warp", waits->what,
             waits->file, waits->line, waits->mask, met);
}

// The next lane to run, in shuffled order; NULL if the block is complete. Opens the barrier when
// all lanes have reached it.
inline EmuLane *emu_next(EmuCore *c) {
    if (!c->warps_ready) {
        if (c->done == c->threads) return NULL;
        if (c->at_barrier < c->threads) emu_deadlock(c);
        for (unsigned w = 0; w < c->warps; w++) {
            c->warp[w].ready = c->warp[w].all;
            emu_shuffle_warp(c, &c->warp[w]);
        }
        const uint64_t r = emu_random(&c->random);
        c->warps_ready = c->warps == 32 ? ~0u : (1u << c->warps) - 1;
        c->odd = (unsigned)r | 1, c->add = (unsigned)(r >> 32), c->at_barrier = 0;
    }
    while (!(c->warps_ready >> c->at & 1)) c->at = (c->i++ * c->odd + c->add) & 31;
    EmuWarp *w = &c->warp[c->at];
    unsigned lane = (w->i++ * w->odd + w->add) & 31;
    while (!(w->ready >> lane & 1)) lane = (w->i++ * w->odd + w->add) & 31;
    w->ready &= ~(1u << lane);
    if (!w->ready) c->warps_ready &= ~(1u << c->at);
    return &c->lanes[32 * c->at + lane];
}

// Makes n the running lane; returns its fiber, or NULL if it has not started.
inline EmuFiber *emu_become(EmuCore *c, EmuLane *n) {
    EmuFiber *on = n->fiber;
    c->lane = n;
    n->fiber = NULL;
    n->state = EMU_RUNS;
    threadIdx = n->index;
    return on;
}

// Runs the lane c->lane, which has not started, and then others that have not, on the current
// stack. Returns on the host's own stack once the block is complete.
inline void emu_run_lanes(EmuCore *c) {
    for (;;) {
        EmuLane *l = c->lane;
        (*c->body)();
        if (l->copies)
            emu_fail("exits with %u asynchronous copies that it has not waited for", l->copies);
        l->state = EMU_DONE;
        c->done++;
        EmuLane *n = emu_next(c);
        EmuFiber *on = n ? emu_become(c, n) : &c->home;
        if (n && !on) continue;
        if (!n) c->lane = NULL;
        if (c->fiber != &c->home) c->idle[c->idles++] = c->fiber;
        if (c->fiber != on) emu_go(c, on);
        if (!c->lane) return;
    }
}

extern "C" __attribute__((noreturn)) inline void emu_fiber_begin(void) {
    EmuCore *c = emu_core;
#if EMU_ASAN
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(NULL, &bottom, &size);
    // the first caller is on the host's stack
    if (!c->home.stack) c->home.stack = (char *)(uintptr_t)bottom, c->home.size = size;
#endif
    emu_run_lanes(c);
    abort();
}

inline EmuFiber *emu_fiber_new(void) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    EmuFiber *f = (EmuFiber *)calloc(1, sizeof *f);
    void *memory = mmap(NULL, page + EMU_STACK, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!f || memory == MAP_FAILED || mprotect(memory, page, PROT_NONE))
        emu_fail("no memory for the stack of a thread");
    // preceded by a page that cannot be accessed
    f->stack = (char *)memory + page, f->size = EMU_STACK;
#if EMU_FRAME_WORDS
    // or the tops of all stacks would share a few cache lines
    const size_t stagger = emu_core->fibers++ * 320 % 4096;
    void **frame = (void **)(void *)(f->stack + f->size - stagger) - EMU_FRAME_WORDS;
    frame[EMU_FRAME_RETURN] = (void *)(uintptr_t)emu_fiber_begin;
    f->sp = frame;
#else
    ucontext_t *start = (ucontext_t *)calloc(1, sizeof *start);
    getcontext(start);
    start->uc_stack.ss_sp = f->stack, start->uc_stack.ss_size = f->size;
    makecontext(start, emu_fiber_begin, 0);
    f->sp = start;
#endif
    return f;
}

// Suspends the running lane until others have made it ready.
inline void emu_wait(EmuCore *c) {
    EmuLane *l = c->lane, *n = emu_next(c);
    if (n == l) {
        l->state = EMU_RUNS;
        return;
    }
    l->fiber = c->fiber;
    EmuFiber *on = emu_become(c, n);
    emu_go(c, on ? on : c->idles ? c->idle[--c->idles] : emu_fiber_new());
}

inline EmuCore *emu_core_of_kernel(const char *what) {
    if (!emu_in_kernel) emu_fail("%s outside of a kernel", what);
    return emu_core;
}

inline void emu_stand(EmuLane *l, EmuState state, const char *what, unsigned mask, const char *file,
                      int line) {
    l->state = state, l->what = what, l->mask = mask, l->file = file, l->line = line;
}

// ---- Operations of several lanes ----

inline void __syncthreads(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    EmuCore *c = emu_core_of_kernel("__syncthreads");
    emu_stand(c->lane, EMU_BARRIER, "__syncthreads", 0, file, line);
    if (c->at_barrier++ == 0) c->barrier_line = line;
    if (line != c->barrier_line)
        emu_fail("__syncthreads at %s:%d, while others of the block are in the one at line %d",
                 file, line, c->barrier_line);
    emu_wait(c);
}

// An operation of the lanes in `mask`: the last to arrive performs it for all, with each lane's
// operand (NULL if not in the mask), which is on the stack of the waiting lane.
inline void emu_collect(const char *what, unsigned mask, void *operand,
                        void (*step)(void *const operands[32]), const char *file, int line) {
    EmuCore *c = emu_core_of_kernel(what);
    EmuLane *l = c->lane;
    const unsigned warp = (unsigned)(l - c->lanes) / 32, bit = 1u << (l - c->lanes) % 32;
    EmuWarp *w = &c->warp[warp];
    if (!(mask & bit))
        emu_fail("%s at %s:%d: mask %08x lacks the calling lane", what, file, line, mask);
    if (mask & ~w->all)
        emu_fail("%s at %s:%d: mask %08x, but this warp has only %08x", what, file, line, mask,
                 w->all);
    emu_stand(l, EMU_WARP, what, mask, file, line);
    l->operand = operand;
    w->waiting |= bit;
    bool all = (w->waiting & mask) == mask;
    void *operands[32];
    for (unsigned i = 0; all && i < 32; i++) {
        const EmuLane *o = &c->lanes[32 * warp + i];
        operands[i] = mask >> i & 1 ? o->operand : NULL;
        if (mask >> i & 1) all = o->mask == mask && o->line == line && o->what == what;
    }
    if (!all) {
        emu_wait(c);
        return;
    }
    if (step) step(operands);
    w->waiting &= ~mask;
    w->ready |= mask & ~bit;
    if (w->ready) c->warps_ready |= 1u << warp;
    emu_shuffle_warp(c, w);
    l->state = EMU_RUNS;
}

// The launch bounds of the running kernel, stated by its first line: the attribute is invisible at
// run time.
inline void emu_bounds(unsigned threads) {
    EmuCore *c = emu_core_of_kernel("BOUNDS");
    c->bound = threads;
    if (c->threads > threads)
        emu_fail("a block of %u threads, where the launch bounds allow %u", c->threads, threads);
}

#define EMU_FULL 0xffffffffu
#define EMU_FROM const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncwarp(unsigned mask = EMU_FULL, EMU_FROM) { emu_collect("__syncwarp", mask, NULL,
    NULL, file, line); }

// A shuffle: each lane reads the value of lane `source`; a source outside the mask is undefined,
// and an error here.
struct EmuShuffle { uint64_t value, result; unsigned source; };

inline void emu_shuffle_step(void *const operands[32]) {
    for (unsigned i = 0; i < 32; i++) {
        EmuShuffle *to = (EmuShuffle *)operands[i];
        if (!to) continue;
        const EmuShuffle *from = (const EmuShuffle *)operands[to->source];
        if (!from) emu_fail("a shuffle reads lane %u, which is not in the mask", to->source);
        to->result = from->value;
    }
}

inline int emu_lane(void) {
    return (int)(emu_core_of_kernel("a shuffle")->lane - emu_core->lanes) % 32;
}

// The value of lane `source`; the calling lane's own if that is outside its segment of `width`
// lanes.
template <class T> inline T emu_shuffle(const char *what, unsigned mask, T value, int source,
                                        int width, const char *file, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    if (width < 1 || width > 32 || (width & (width - 1)))
        emu_fail("%s: width %d is not a power of two up to 32", what, width);
    const int lane = emu_lane(), segment = lane & ~(width - 1);
    EmuShuffle s =
        {0, 0, (unsigned)(source >= segment && source < segment + width ? source : lane)};
    memcpy(&s.value, &value, sizeof value);
    emu_collect(what, mask, &s, emu_shuffle_step, file, line);
    memcpy(&value, &s.result, sizeof value);
    return value;
}

#define EMU_SHUFFLE(name, by, source)                                                        \
    template <class T> inline T name(unsigned mask, T v, by n, int width = 32, EMU_FROM) {   \
        return emu_shuffle(#name, mask, v, source, width, file, line);                       \
    }
EMU_SHUFFLE(__shfl_sync, int, (emu_lane() & ~(width - 1)) + (n & (width - 1)))
EMU_SHUFFLE(__shfl_xor_sync, int, emu_lane() ^ n)
EMU_SHUFFLE(__shfl_down_sync, unsigned, emu_lane() + (int)n)
EMU_SHUFFLE(__shfl_up_sync, unsigned, emu_lane() - (int)n)

inline void emu_vote_step(void *const operands[32]) {
    uint64_t ballot = 0;
    for (unsigned i = 0; i < 32; i++)
        if (operands[i]) ballot |= ((EmuShuffle *)operands[i])->value << i;
    for (unsigned i = 0; i < 32; i++)
        if (operands[i]) ((EmuShuffle *)operands[i])->result = ballot;
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_FROM) {
    EmuShuffle v = {predicate != 0, 0, 0};
    emu_collect("a vote", mask, &v, emu_vote_step, file, line);
    return (unsigned)v.result;
}
inline int __any_sync(unsigned mask, int p, EMU_FROM) {
    return __ballot_sync(mask, p, file, line) != 0;
}
inline int __all_sync(unsigned mask, int p, EMU_FROM) {
    return __ballot_sync(mask, p, file, line) == mask;
}

// ---- A grid ----

inline void *emu_shared(void) { return emu_core_of_kernel("SHARED")->shared; }

inline void emu_check_alignment(const void *p, const char *what) {
    if ((uintptr_t)p % 16) emu_fail("%s at %p, which is not a multiple of 16", what, p);
}

inline void emu_shared_open(EmuCore *c) {
    if (c->shared && c->shared_capacity != c->shared_bytes) {
        emu_guarded_free(c->shared);
        c->shared = NULL;
    }
    if (!c->shared && !(c->shared = emu_guarded_new(c->shared_bytes)))
        emu_fail("no memory for a block's shared memory");
    c->shared_capacity = c->shared_bytes;
    memset(c->shared, EMU_POISON, c->shared_bytes);
}

// On access to unmapped memory, or stack overflow: names the kernel, then lets the program end as
// it would have.
inline void emu_on_signal(int number) {
    if (emu_in_kernel)
        emu_fail("signal %d: it touches memory that does not exist, or needs more than %zu bytes "
                 "of stack", number, EMU_STACK);
    signal(number, SIG_DFL);
}

inline EmuCore *emu_core_open(void) {
    static char stack[1 << 16];                          // for the handler: the fiber's own may
                                                         // have overflowed
    if (emu_core) return emu_core;
    if (!(emu_core = (EmuCore *)calloc(1, sizeof *emu_core)))
        emu_fail("no memory for the emulator");
    if (EMU_ASAN) return emu_core;                       // its report is more detailed
    stack_t alternate = {};
    alternate.ss_sp = stack, alternate.ss_size = sizeof stack;
    struct sigaction action = {};
    action.sa_handler = emu_on_signal, action.sa_flags = SA_ONSTACK;
    sigaltstack(&alternate, NULL);
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    return emu_core;
}

inline void emu_run_block(EmuCore *c) {
    for (unsigned i = 0; i < c->threads; i++) c->lanes[i].state = EMU_NEW, c->lanes[i].group = 0;
    c->lane = NULL, c->done = 0, c->warps_ready = 0;
    // as if all came from a barrier: emu_next makes them ready
    c->at_barrier = c->threads;
    emu_shared_open(c);
    c->fiber = &c->home;
    emu_become(c, emu_next(c));
    emu_run_lanes(c);
    emu_guards_check(c->shared, c->shared_bytes, "shared memory", "the block");
}

// Runs every thread of the grid to completion.
inline void emu_run_grid(const char *kernel, dim3 grid, dim3 block, size_t shared, uint64_t number,
                         const std::function<void()> &body) {
    EmuCore *c = emu_core_open();
    if (emu_in_kernel) emu_fail("launches a kernel");
    const uint64_t seed = emu_number("EMU_SEED", 1), blocks = (uint64_t)grid.x * grid.y * grid.z;
    uint64_t random = seed * 0x9E3779B97F4A7C15u ^ number;
    const uint64_t add = emu_random(&random) % blocks;
    // add + step * i visits every block once if step is coprime
    uint64_t step = 1 + emu_random(&random) % blocks;
    while (std::gcd(step, blocks) != 1) step++;
    c->kernel = kernel, c->body = &body;
    c->threads = block.x * block.y * block.z, c->warps = (c->threads + 31) / 32;
    c->shared_bytes = shared, c->bound = EMU_UNBOUND;
    for (unsigned i = 0; i < c->threads; i++) {
        EmuLane *l = &c->lanes[i];
        l->index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        l->copies = 0;
    }
    for (unsigned w = 0; w < c->warps; w++) {
        c->warp[w].all = c->threads - 32 * w >= 32 ? EMU_FULL : (1u << c->threads % 32) - 1;
        c->warp[w].waiting = 0;
    }
    emu_in_kernel = true;
    gridDim = grid, blockDim = block;
    for (uint64_t i = 0; i < blocks; i++) {
        const uint64_t at = (add + step % blocks * i) % blocks;
        blockIdx = {(unsigned)(at % grid.x), (unsigned)(at / grid.x % grid.y),
                    (unsigned)(at / grid.x / grid.y)};
        c->random = seed + 0x9E3779B97F4A7C15u * (number * 0x100000001b3u + at);
        emu_run_block(c);
    }
    if (c->threads > c->bound)
        emu_fail("%u threads of up to 255 registers: it needs launch bounds", c->threads);
    emu_in_kernel = false;
}

#endif
