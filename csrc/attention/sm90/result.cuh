// What becomes of a row's sums: its LSE, or a part's results.
#pragma once

#include "attention/sm90/config.cuh"
#include "attention/sm90/work.cuh"
#include "attention/store.cuh"
#include "quantize/cuda/rules.cuh"

namespace torch_sage::sm90 {

// Logits with a mask are in units of 2 log2(e), in which no finite bias overflows: a row whose
// biases all are the least number is one of equal logits, not hidden.
constexpr float kMaskedUnit = 2.f;

// Of a row whose P is relative to `top`, a base-2 logit, and adds up to `sum`. Where `top` is out
// of range it is what the biases of a row would be that has only the least.
__device__ __forceinline__ float natural_lse(float top, float sum, float shift) {
  const float largest = fmaxf(top, -kLargestFloat);
  return (largest - kOffset + __log2f(sum)) * 0.6931471805599453f + shift;
}

// Where the results of two rows for a part of the keys go.
template <int kWidth>
__device__ __forceinline__ Place part_place(const AttentionParams& p, const Work& work, int row) {
  const int64_t head = static_cast<int64_t>(work.batch) * p.heads_q + work.head;
  const int64_t place = (head * p.parts.count + work.part) * p.seqlen_q + row;
  return {place, reinterpret_cast<char*>(p.parts.outputs + place * kWidth), p.seqlen_q - row};
}

__device__ __forceinline__ void store_part_sums(const AttentionParams& p, const Place& place, int h,
                                                float4 sums) {
  if (8 * h < place.rows) p.parts.sums[place.row_of_lse + 8 * h] = sums;
}

// Writes x[h][b]: row 8 h below, column 8 block + 2 quad + b of the thread's quad.
template <int kWidth>
__device__ __forceinline__ void store_part_columns(const Place& place, int block, int quad,
                                                   const float (&x)[2][2]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float* to = reinterpret_cast<float*>(place.output) + 8 * h * kWidth + 8 * block + 2 * quad;
    if (8 * h < place.rows) *reinterpret_cast<float2*>(to) = make_float2(x[h][0], x[h][1]);
  }
}

}  // namespace torch_sage::sm90
