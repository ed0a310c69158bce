// Masks, read where they lie.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/params.h"
#include "quantize/cuda/rules.cuh"

namespace torch_sage {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// What the mask's element adds to a base-2 logit; -inf where it hides the key.
__device__ __forceinline__ float bias_of(bool is_visible) { return is_visible ? 0.f : -INFINITY; }
template <typename Element>
__device__ __forceinline__ float bias_of(Element element) {
  const float bias = to_float(element), scaled = bias * kLog2E;
  if (bias == -INFINITY) return bias;
  const bool overflows = fabsf(scaled) == INFINITY && bias != INFINITY;
  return overflows ? copysignf(kLargestFloat, bias) : scaled;
}
// A key is hidden even where its scale is NaN.
__device__ __forceinline__ float add_bias(float logit, float bias) {
  return bias == -INFINITY ? bias : logit + bias;
}

// Calls `visit` with the mask's data in its type.
template <typename Params, typename Visit>
__device__ __forceinline__ void visit_mask(const Params& p, Visit visit) {
  if (p.mask_kind == MaskKind::kBool) {
    visit(static_cast<const bool*>(p.mask));
  } else if (p.mask_kind == MaskKind::kFloat32) {
    visit(static_cast<const float*>(p.mask));
  } else if (p.mask_kind == MaskKind::kBFloat16) {
    visit(static_cast<const __nv_bfloat16*>(p.mask));
  } else if (p.mask_kind == MaskKind::kFloat16) {
    visit(static_cast<const __half*>(p.mask));
  }
}

}  // namespace torch_sage
