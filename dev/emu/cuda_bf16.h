// cuda_bf16.h: a substitute for CUDA's bf16 type (tests only): the upper half of an fp32, rounded
// to nearest even. NaN becomes 0x7fff, as with the hardware's cvt.rn.bf16.f32 (PTX ISA, "cvt": the
// canonical NaN).
#ifndef EMU_CUDA_BF16_H
#define EMU_CUDA_BF16_H

#include "cuda_runtime.h"

inline unsigned short emu_bf16_round(float value) {
    const uint32_t bits = emu_bits<uint32_t>(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float emu_bf16_value(unsigned short half) { return emu_bits<float>((uint32_t)half << 16); }

// ---- EMU_ERRORS=1: errors as large as the hardware's, where the host is more accurate ----

inline bool emu_errors(void) {
    static const bool on = emu_number("EMU_ERRORS", 0) != 0;
    return on;
}

// x times 1 + e, with |e| <= 2^-bits a function of x.
inline float emu_inexact(float x, int bits) {
    uint64_t state = emu_bits<uint32_t>(x);
    return x + x * ldexpf((float)((double)emu_random(&state) / 9223372036854775808.0 - 1), -bits);
}

// ex2.approx.ftz, rcp.approx.ftz and tanh.approx have relative errors of at most 2^-22, 2^-23 and
// 2^-11 (PTX ISA, "ex2", "rcp" and "tanh").
inline float emu_exp2(float x) {
    const float y = exp2f(x);
    return !emu_errors() ? y : y < ldexpf(1, -126) ? 0 : emu_inexact(y, 22);
}
inline float emu_reciprocal(float x) {
    const float y = 1 / x;
    return !emu_errors() ? y : fabsf(y) < ldexpf(1, -126) ? 0 : emu_inexact(y, 23);
}
inline float emu_tanh(float x) { return emu_errors() ? emu_inexact(tanhf(x), 11) : tanhf(x); }

// sum + x (n) as added by tensor cores of compute capability 8.0: all terms are shifted to the
// largest exponent and truncated to 24 bits and one more, as is the total to fp32 (Fasi, Higham,
// Mikaitis and Pranesh 2021, "Numerical behavior of NVIDIA tensor cores": groups of 8 products of
// 16-bit numbers, of 4 in tf32).
enum { EMU_MMA_GROUP = 8, EMU_TF32_GROUP = 4 };

inline float emu_mma_sum(float sum, const float *x, int n) {
    float largest = fabsf(sum);
    double total = 0;
    int exponent;
    for (int i = 0; i < n; i++) {
        if (!isfinite(x[i])) return sum + x[i];
        largest = fmaxf(largest, fabsf(x[i]));
    }
    if (largest == 0 || !isfinite(largest)) return sum;
    frexpf(largest, &exponent);
    const double unit = ldexp(1, exponent - 25);
    for (int i = -1; i < n; i++) total += trunc((double)(i < 0 ? sum : x[i]) / unit) * unit;
    const float nearest = (float)total;
    return fabs((double)nearest) > fabs(total) ? nextafterf(nearest, 0) : nearest;
}

struct __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float value) : bits(emu_bf16_round(value)) {}
    operator float() const { return emu_bf16_value(bits); }
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return (float)x; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    __nv_bfloat16 x;
    x.bits = bits;
    return x;
}

#endif
