// Scores of a tile as probabilities: the online softmax of a warp's rows (algorithm.md E5-E9).
#pragma once

#include <cmath>

#include "attention/mask.cuh"
#include "attention/mma/config.cuh"
#include "attention/mma/instructions.cuh"

namespace torch_sage::mma {

// Integer sums start from here: below 2^22 in magnitude, their bits are those of the float 1.5 *
// 2^23 + sum, and no conversion is needed.
constexpr int kSeed = 0x4B400000;
constexpr float kSeedValue = 12582912.f;

// Base-2 logits in place of seeded sums. `correction` is of the lane's first key, or null.
template <class C>
__device__ __forceinline__ void make_logits(float (&x)[C::kRowTiles][kKeyColumns][4], float factor,
                                            const float* correction) {
#pragma unroll
  for (int j = 0; j < kKeyColumns; j++)
#pragma unroll
    for (int b = 0; b < 2; b++) {
      const float offset = correction == nullptr ? 0.f : correction[8 * j + b];
#pragma unroll
      for (int i = 0; i < C::kRowTiles; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float& element = x[i][j][2 * h + b];
          element = fmaf(element - kSeedValue, factor, offset);
        }
    }
}

// Adds the mask of a head to logits; -inf where a key is not visible. Both numbers are of the
// lane's first element.
template <class C>
__device__ __forceinline__ void hide(const AttentionParams& p, const char* mask_of_head,
                                     int first_row, int first_key,
                                     float (&x)[C::kRowTiles][kKeyColumns][4]) {
  const auto for_elements = [&](auto visit) {
#pragma unroll
    for (int i = 0; i < C::kRowTiles; i++)
#pragma unroll
      for (int j = 0; j < kKeyColumns; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          visit(x[i][j][e], first_row + 16 * i + 8 * (e / 2), first_key + 8 * j + e % 2);
  };
  visit_mask(p, [&](auto* typed) {
    const auto* mask = reinterpret_cast<decltype(typed)>(mask_of_head);
    for_elements([&](float& logit, int row, int key) {
      if (row < p.seqlen_q && key < p.kv.seqlen)
        logit = with_mask(logit, mask[row * p.mask_stride_n + key * p.mask_stride_m]);
    });
  });
  for_elements([&](float& logit, int row, int key) {
    if (key > min(p.kv.seqlen - 1, row + p.last_key_offset)) logit = -INFINITY;
  });
}

// Rows 16 i + 8 h of the lane's first one.
template <class C>
struct Softmax {
  float top[C::kRowTiles][2];    // m: base-2 maximum so far, less log2(P_r)
  float sum[C::kRowTiles][2];    // of the probabilities of the lane's keys
  float decay[C::kRowTiles][2];  // of all that was summed up to the last tile

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int i = 0; i < C::kRowTiles; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        top[i][h] = -INFINITY;
        sum[i][h] = 0.f;
      }
  }

  // Probabilities in place of scores, which are seeded sums to be multiplied by `factor`, or
  // (kAreLogits) logits already.
  template <bool kAreLogits>
  __device__ __forceinline__ void update(float (&x)[C::kRowTiles][kKeyColumns][4], float factor,
                                         bool wants_sum) {
    constexpr float kShift = C::kPv == Pv::kE4m3       ? 8.8073549221f
                             : C::kPv == Pv::kE4m3Fp16 ? 6.8073549221f
                                                       : 0.f;
    constexpr float kOrigin = kAreLogits ? 0.f : kSeedValue;
    const float scale = kAreLogits ? 1.f : factor;
#pragma unroll
    for (int i = 0; i < C::kRowTiles; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float largest = fmaxf(x[i][0][2 * h], x[i][0][2 * h + 1]);
#pragma unroll
        for (int j = 1; j < kKeyColumns; j++)
          largest = fmaxf(largest, fmaxf(x[i][j][2 * h], x[i][j][2 * h + 1]));
        largest = (largest - kOrigin) * scale;
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        const float next = fmaxf(top[i][h], largest - kShift);
        const float origin = next == -INFINITY ? 0.f : next;
        decay[i][h] = exp2_approx(top[i][h] - origin);
        top[i][h] = next;
        const float offset = kAreLogits ? -origin : fmaf(-kSeedValue, scale, -origin);
        float total = 0.f;
#pragma unroll
        for (int j = 0; j < kKeyColumns; j++)
#pragma unroll
          for (int b = 0; b < 2; b++) {
            float& element = x[i][j][2 * h + b];
            element = exp2_approx(kAreLogits ? element + offset : fmaf(element, scale, offset));
          }
        if constexpr (C::kPv == Pv::kE4m3Fp16) {
          // The maximum's own probability is P_r but for the rounding of `offset`. Where that
          // could show in E4M3, 64 of them could overflow fp16.
          if (fabsf(offset) > 0x1p19f) {
#pragma unroll
            for (int j = 0; j < kKeyColumns; j++)
#pragma unroll
              for (int b = 0; b < 2; b++) {
                float& element = x[i][j][2 * h + b];
                element = element > largest_probability(C::kPv) ? largest_probability(C::kPv)
                                                                : element;  // keeps NaN
              }
          }
        }
        if (wants_sum) {
#pragma unroll
          for (int j = 0; j < kKeyColumns; j++) total += x[i][j][2 * h] + x[i][j][2 * h + 1];
          sum[i][h] = fmaf(sum[i][h], decay[i][h], total);
        }
      }
  }
};

}  // namespace torch_sage::mma
