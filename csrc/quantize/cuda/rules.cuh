// Rules R3-R5 of algorithm.md 2.1: a scale and its separately rounded inverse.
#pragma once

namespace torch_sage {

constexpr float kAmaxFloor = 0x1p-100f;
constexpr float kLargestFloat = 3.402823466e38f;
constexpr float kInverse127 = 0x1.020408p-7f;  // 1 / 127, rounded to fp32
constexpr float kLog2E = 1.4426950408889634f;

struct ScaleAndInverse {
  float scale;  // NaN where amax is not finite
  float inverse;
};

// 127 / x, correctly rounded, for 2^-100 <= x: as the compiler divides where nothing is subnormal.
// What it does otherwise is a call, for which the attention kernel has no registers.
__device__ __forceinline__ float divide_127(float x) {
  const float shrink = x > 0x1p100f ? 0x1p-64f : 1.f;  // 1 / x would be subnormal
  const float numerator = 127.f * shrink, denominator = x * shrink;
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
  return scale_and_inverse(amax, kInverse127, divide_127);
}

// For codes up to a power of two.
__device__ __forceinline__ ScaleAndInverse scale_and_inverse(float amax, float code_max) {
  return scale_and_inverse(amax, 1.f / code_max,
                           [=](float floored) { return __fdiv_rn(code_max, floored); });
}

}  // namespace torch_sage
