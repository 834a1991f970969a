// vector.h: the target's widest vectors, through the compiler's vector extension, and the
// operations of the CPU engine that a plain loop cannot express: transposition, and dot products in
// bf16.
//
// Everything else is written once for any width: a new instruction set is a row of the first table,
// plus, if the processor multiplies in bf16, a version of the three functions at the end.
#ifndef VECTOR_H
#define VECTOR_H

#include "../check.h"
#include <math.h>
#include <sys/mman.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

// INSTRUCTIONS names the instruction set; the shape of a matmul tile gives it as many accumulators
// as leave registers for the operands.
#if defined(__AVX512F__)
#ifdef __AVX512BF16__
#define INSTRUCTIONS "AVX-512 + BF16"
#else
#define INSTRUCTIONS "AVX-512"
#endif
#define VECTOR_BYTES 64
enum { TILE_ROWS = 12, TILE_VECTORS = 2 };               // 24 accumulators of 32 registers
#elif defined(__AVX__)
#ifdef __AVX2__
#define INSTRUCTIONS "AVX2"
#else
#define INSTRUCTIONS "AVX"
#endif
#define VECTOR_BYTES 32
enum { TILE_ROWS = 6, TILE_VECTORS = 2 };                // 12 of 16
#elif defined(__aarch64__)
#define INSTRUCTIONS "NEON"
#define VECTOR_BYTES 16
enum { TILE_ROWS = 8, TILE_VECTORS = 3 };                // 24 of 32
#else
#ifdef __SSE2__
#define INSTRUCTIONS "SSE2"
#else
#define INSTRUCTIONS "plain C"
#endif
#define VECTOR_BYTES 16
enum { TILE_ROWS = 4, TILE_VECTORS = 2 };                // 8 of 16
#endif

enum { LANES = VECTOR_BYTES / sizeof(real), TILE_COLS = TILE_VECTORS * LANES };
typedef real Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

#define ALWAYS_INLINE __attribute__((always_inline))

static inline ALWAYS_INLINE Vector vector_load(const real *x) { return *(const Vector *)x; }
static inline ALWAYS_INLINE void vector_store(real *x, Vector v) { *(Vector *)x = v; }
static inline ALWAYS_INLINE Vector vector_of(real x) { return (Vector){0} + x; }

// x as it was rounded: a product is not contracted into a fused multiply-add with what comes next.
static inline ALWAYS_INLINE Vector vector_rounded(Vector x) {
    __asm__("" : "+m"(x));
    return x;
}

// The same for n < LANES elements; the other lanes are zero.
static inline ALWAYS_INLINE Vector vector_load_some(const real *x, size_t n) {
#ifdef __AVX512F__
    const unsigned lanes = (1u << n) - 1;
    if (sizeof(real) == sizeof(double)) return (Vector)_mm512_maskz_loadu_pd((__mmask8)lanes, x);
    return (Vector)_mm512_maskz_loadu_ps((__mmask16)lanes, x);
#else
    real all[LANES] = {0};
    memcpy(all, x, n * sizeof(real));
    return vector_load(all);
#endif
}

static inline void vector_store_some(real *x, Vector v, size_t n) {
    memcpy(x, &v, n * sizeof(real));
}

// The sum of the first n lanes, in order.
static inline real vector_sum_some(Vector v, size_t n) {
    real all[LANES], sum = 0;
    memcpy(all, &v, sizeof all);
    for (size_t j = 0; j < n; j++) sum += all[j];
    return sum;
}

static inline real vector_sum(Vector v) { return vector_sum_some(v, LANES); }

// ---- Exponential ----

#ifdef REAL_DOUBLE
// from a comparison: all bits or none
typedef int64_t Mask __attribute__((vector_size(VECTOR_BYTES)));
static inline real log_real(real x) { return log(x); }
static inline real sqrt_real(real x) { return sqrt(x); }
#else
typedef int32_t Mask __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
static inline real log_real(real x) { return logf(x); }
static inline real sqrt_real(real x) { return sqrtf(x); }
#endif

static inline ALWAYS_INLINE Mask lane_numbers(void) {     // 0, 1, ..., LANES - 1
    Mask lane = {0};
    for (int l = 0; l < LANES; l++) lane[l] = l;
    return lane;
}

static inline ALWAYS_INLINE Vector select_lanes(Mask first, Vector a, Vector b) {
    return (Vector)(((Mask)a & first) | ((Mask)b & ~first));
}

// e^x for each x <= 88: within 1.25 ulp from -87 up; 0 below; NaN for NaN; 1 for -0, denormals and
// other tiny numbers. x = n ln2 + r with |r| <= ln2/2; e^r by its Taylor polynomial of degree 7
// (the remainder is below 2^-27).
static inline ALWAYS_INLINE Vector exp_lanes(Vector x) {
#ifdef REAL_DOUBLE
    for (int l = 0; l < LANES; l++) x[l] = exp(x[l]);
    return x;
#else
    // adding 1.5 * 2^23 rounds to an integer
    const Vector t = x * 1.44269504f + 12582912.0f, n = t - 12582912.0f;
    const Vector r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Vector p = r * 1.98412698e-4f + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    p *= (Vector)(((Bits)t - 0x4B400000u + 127u) << 23);  // times 2^n; NaN stays NaN
    return (Vector)((Mask)p & ~(x < -87.0f));
#endif
}

// ln x for each positive normal x: within 3 ulp. x = 2^n m with m from sqrt(1/2) to sqrt(2), and
// ln m = 2 atanh(s), s = (m - 1) / (m + 1), by its Taylor series (the remainder is below 2^-33).
static inline ALWAYS_INLINE Vector log_lanes(Vector x) {
#ifdef REAL_DOUBLE
    for (int l = 0; l < LANES; l++) x[l] = log(x[l]);
    return x;
#else
    const Bits from = (Bits)x - 0x3F3504F3u;             // the bits of sqrt(1/2)
    const Vector n = __builtin_convertvector((Mask)from >> 23, Vector);
    const Vector m = (Vector)((from & 0x7FFFFFu) + 0x3F3504F3u);
    const Vector s = (m - 1.0f) / (m + 1.0f), z = s * s;
    Vector p = z * (1.0f / 11) + 1.0f / 9;
    p = p * z + 1.0f / 7;
    p = p * z + 1.0f / 5;
    p = p * z + 1.0f / 3;
    return n * 0.693145752f + (n * 1.42860677e-6f + (s + s) * (p * z + 1.0f));
#endif
}

// The maximum of x (n), over independent lanes, since compilers do not vectorize a plain maximum.
// NaNs are ignored; of no elements it is -infinity.
static inline real max_of(const real *x, size_t n) {
    enum { AT_ONCE = 4 };
    Vector top[AT_ONCE];
    real all[LANES], largest = -(real)INFINITY;
    for (size_t j = 0; j < AT_ONCE; j++) top[j] = vector_of(largest);
    size_t i = 0;
    for (; i + AT_ONCE * LANES <= n; i += AT_ONCE * LANES)
        for (size_t j = 0; j < AT_ONCE; j++) {
            const Vector v = vector_load(x + i + j * LANES);
            top[j] = select_lanes(v > top[j], v, top[j]);
        }
    for (; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    for (size_t j = 0; j < AT_ONCE; j++) {
        memcpy(all, &top[j], sizeof all);
        for (size_t l = 0; l < LANES; l++) largest = all[l] > largest ? all[l] : largest;
    }
    return largest;
}

// ---- Transposing LANES x LANES elements ----

#ifndef __has_builtin
#define __has_builtin(x) 0
#endif
#if !__has_builtin(__builtin_shufflevector)
#define VECTOR_NO_SHUFFLE 1                              // gcc before 12
#elif defined(REAL_DOUBLE) && VECTOR_BYTES == 16
#define VECTOR_LOW  0, 2
#define VECTOR_HIGH 1, 3
#elif defined(REAL_DOUBLE) ? VECTOR_BYTES == 32 : VECTOR_BYTES == 16
#define VECTOR_LOW  0, 4, 1, 5
#define VECTOR_HIGH 2, 6, 3, 7
#elif defined(REAL_DOUBLE) ? VECTOR_BYTES == 64 : VECTOR_BYTES == 32
#define VECTOR_LOW  0, 8, 1, 9, 2, 10, 3, 11
#define VECTOR_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define VECTOR_LOW  0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define VECTOR_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#endif

// Row i of v becomes column i. Each of log2(LANES) passes shuffles every row with the row half of
// the remaining distance away; at the end, the bits of an element's row and column have swapped
// places.
static inline ALWAYS_INLINE void vector_transpose(Vector v[LANES]) {
#ifdef VECTOR_NO_SHUFFLE
    real x[LANES][LANES], y[LANES][LANES];
    memcpy(x, v, sizeof x);
    for (size_t i = 0; i < LANES; i++)
        for (size_t j = 0; j < LANES; j++) y[j][i] = x[i][j];
    memcpy(v, y, sizeof y);
#else
    enum { HALF = LANES / 2 };
#pragma GCC unroll 4
    for (size_t round = LANES; round > 1; round /= 2) {
        Vector w[LANES];
#pragma GCC unroll 8
        for (size_t i = 0; i < HALF; i++) {
            w[2 * i] = __builtin_shufflevector(v[i], v[i + HALF], VECTOR_LOW);
            w[2 * i + 1] = __builtin_shufflevector(v[i], v[i + HALF], VECTOR_HIGH);
        }
#pragma GCC unroll 16
        for (size_t i = 0; i < LANES; i++) v[i] = w[i];
    }
#endif
}

// ---- bf16: the upper half of an fp32, so 8 bits of precision and fp32's exponents ----

// x rounded to the nearest bf16, ties to even, like the processor's own instructions: values below
// the smallest normal number become zero, a NaN stays one.
static inline real bf16_round(real x) {
    union { float f; uint32_t bits; } y = {(float)x};
    const uint32_t size = y.bits & 0x7FFFFFFFu;
    if (size > 0x7F800000u) return x;
    if (size < 0x00800000u) y.bits &= 0x80000000u;
    else y.bits = (y.bits + 0x7FFFu + (y.bits >> 16 & 1)) & 0xFFFF0000u;
    return (real)y.f;
}

// A word holds one element of a packed operand or, if the processor has bf16 dot products (PAIRS),
// two consecutive terms of a sum, the first in the lower half.
#if defined(__AVX512BF16__) && !defined(REAL_DOUBLE) && !defined(NO_PAIRS)
enum { PAIRS = 1 };

// sum + the products of both pairs: the upper pair is added first, each with one rounding, as by
// two multiply-adds (except that a sum below the smallest normal number becomes zero).
static inline ALWAYS_INLINE Vector pairs_dot(Vector sum, real a, Vector b) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
}

// x (2 LANES), in order.
static inline ALWAYS_INLINE Vector pairs_of_line(const real *x) {
    return (Vector)_mm512_cvtne2ps_pbh((__m512)vector_load(x + LANES), (__m512)vector_load(x));
}

// (first[j], second[j]) for all j.
static inline ALWAYS_INLINE Vector pairs_of_lines(Vector first, Vector second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
    return (Vector)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#else
enum { PAIRS = 0 };
static inline Vector pairs_dot(Vector sum, real a, Vector b) { return (void)a, (void)b, sum; }
static inline Vector pairs_of_line(const real *x) { return vector_load(x); }
static inline Vector pairs_of_lines(Vector first, Vector second) { return (void)second, first; }
#endif

// ---- Memory ----

// n zeros, aligned for vectors. Each thread touches its share first, so that the memory is near all
// of those that will use it. Free with free().
static inline real *NEVER_NULL vectors_new(size_t n) {
    // a huge page: packing reads rows far apart
    enum { PIECE = 1 << 18, PAGE = 2 << 20 };
    const size_t bytes = (n ? n : 1) * sizeof(real);
    void *p = NULL;
    if (posix_memalign(&p, bytes < (size_t)PAGE ? (size_t)64 : (size_t)PAGE, bytes))
        die("out of memory: %zu bytes for the model\n  hint: a smaller --batch or model; --dry-run "
            "tells the sizes", bytes);
#ifdef MADV_HUGEPAGE
    if (bytes >= (size_t)PAGE) madvise(p, bytes, MADV_HUGEPAGE); // only a request
#endif
    real *x = (real *)p;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i += PIECE)
        memset(x + i, 0, (n - i < (size_t)PIECE ? n - i : (size_t)PIECE) * sizeof(real));
    return x;
}

#endif
