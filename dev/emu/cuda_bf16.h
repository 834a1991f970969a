// cuda_bf16.h: stands in for CUDA's bf16 type (tests only): the upper half of an fp32, rounded to nearest even. NaN becomes
// 0x7fff as by the hardware's cvt.rn.bf16.f32 (PTX ISA, "cvt": the canonical NaN).
#ifndef EMU_CUDA_BF16_H
#define EMU_CUDA_BF16_H

#include "cuda_runtime.h"

inline unsigned short emu_bf16_round(float value) {
    const uint32_t bits = emu_bits<uint32_t>(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float emu_bf16_value(unsigned short half) { return emu_bits<float>((uint32_t)half << 16); }

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
