// Rule R2 of algorithm.md 2.1: extremes that do not hide what is not finite.
#pragma once

namespace torch_sage {

// Extremes that are NaN if one of the two is; of magnitudes by |.| at the call, which costs
// nothing.
__device__ __forceinline__ float larger_of(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
__device__ __forceinline__ float smaller_of(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

}  // namespace torch_sage
