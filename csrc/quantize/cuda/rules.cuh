// Rules R3-R5 of algorithm.md 2.1: a scale, its separately rounded inverse, and integer codes.
#pragma once

#include <cstdint>

namespace torch_sage {

constexpr float kAmaxFloor = 0x1p-100f;
constexpr float kLargestFloat = 3.402823466e38f;
constexpr float kInverse127 = 0x1.020408p-7f;  // 1 / 127, rounded to fp32
constexpr float kInverse7 = 0x1.24924ap-3f;    // 1 / 7, the same
constexpr float kLog2E = 1.4426950408889634f;

struct ScaleAndInverse {
  float scale;  // NaN where amax is not finite
  float inverse;
};

// code_max / x, correctly rounded, for 2^-100 <= x and a code_max of 7 or 127: as the compiler
// divides where nothing is subnormal. What it does otherwise is a call, for which the attention
// kernel has no registers.
__device__ __forceinline__ float divide(float code_max, float x) {
  const float shrink = x > 0x1p100f ? 0x1p-64f : 1.f;  // 1 / x would be subnormal
  const float numerator = code_max * shrink, denominator = x * shrink;
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(denominator));
  reciprocal = __fmaf_rn(__fmaf_rn(-denominator, reciprocal, 1.f), reciprocal, reciprocal);
  float quotient = __fmul_rn(numerator, reciprocal);
  quotient = __fmaf_rn(__fmaf_rn(-denominator, quotient, numerator), reciprocal, quotient);
  return __fmaf_rn(__fmaf_rn(-denominator, quotient, numerator), reciprocal, quotient);
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= kLargestFloat; }

// `divide` takes amax, floored, to the inverse.
template <typename Divide>
__device__ __forceinline__ ScaleAndInverse scale_and_inverse(float amax, float inverse_code_max,
                                                             Divide divide) {
  const float floored = amax < kAmaxFloor ? kAmaxFloor : amax;  // keeps NaN
  const bool is_defined = amax <= kLargestFloat;                // never negative
  return {is_defined ? __fmul_rn(floored, inverse_code_max) : __int_as_float(0x7fffffff),
          is_defined ? divide(floored) : 0.f};
}

// For codes up to 127.
__device__ __forceinline__ ScaleAndInverse scale_and_inverse_127(float amax) {
  return scale_and_inverse(amax, kInverse127, [](float floored) { return divide(127.f, floored); });
}

// For codes up to 7.
__device__ __forceinline__ ScaleAndInverse scale_and_inverse_7(float amax) {
  return scale_and_inverse(amax, kInverse7, [](float floored) { return divide(7.f, floored); });
}

// For any codes, where there are registers for the compiler's division.
__device__ __forceinline__ ScaleAndInverse scale_and_inverse(float amax, float code_max) {
  return scale_and_inverse(amax, 1.f / code_max,
                           [=](float floored) { return __fdiv_rn(code_max, floored); });
}

// Rule R5: signed bytes of two numbers, to nearest even, below those of `rest`; NaN, which only a
// NaN scale leaves, becomes 0.
__device__ __forceinline__ uint32_t pack_s8(float low, float high, uint32_t rest) {
  uint32_t packed;
  asm volatile(
      "{.reg .s32 a, b;\n"
      "cvt.rni.s32.f32 a, %1;\n"
      "cvt.rni.s32.f32 b, %2;\n"
      "cvt.pack.sat.s8.s32.b32 %0, b, a, %3;}"
      : "=r"(packed)
      : "f"(low), "f"(high), "r"(rest));
  return packed;
}

// The same with 4 bits of each.
__device__ __forceinline__ uint32_t pack_s4(float low, float high, uint32_t rest) {
  uint32_t packed;
  asm("{.reg .s32 a, b;\n"
      "cvt.rni.s32.f32 a, %1;\n"
      "cvt.rni.s32.f32 b, %2;\n"
      "cvt.pack.sat.s4.s32.b32 %0, b, a, %3;}"
      : "=r"(packed)
      : "f"(low), "f"(high), "r"(rest));
  return packed;
}

}  // namespace torch_sage
