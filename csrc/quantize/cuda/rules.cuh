// Rules R3-R5 of algorithm.md 2.1: a scale and its separately rounded inverse.
#pragma once

namespace torch_sage {

constexpr float kAmaxFloor = 0x1p-100f;
constexpr float kInverse127 = 0x1.020408p-7f;  // 1 / 127, rounded to fp32
constexpr float kLog2E = 1.4426950408889634f;

struct ScaleAndInverse {
  float scale;  // NaN where amax is not finite
  float inverse;
};

__device__ __forceinline__ ScaleAndInverse scale_and_inverse(float amax, float code_max,
                                                             float inverse_code_max) {
  const float floored = amax < kAmaxFloor ? kAmaxFloor : amax;  // keeps NaN
  const bool is_finite = amax <= 3.402823466e38f;
  return {is_finite ? __fmul_rn(floored, inverse_code_max) : __int_as_float(0x7fffffff),
          is_finite ? __fdiv_rn(code_max, floored) : 0.f};
}

}  // namespace torch_sage
