// Scores of a tile as probabilities: the online softmax of a warp's rows (algorithm.md E5-E9).
#pragma once

#include <cmath>
#include <type_traits>

#include "attention/mask.cuh"
#include "attention/mma/config.cuh"
#include "attention/mma/instructions.cuh"
#include "attention/mma/sequence.cuh"

namespace torch_sage::mma {

// Integer sums start from here: below 2^22 in magnitude, their bits are those of the float 1.5 *
// 2^23 + sum, which a subtraction converts, at twice to eight times the rate of an instruction that
// would. Folding it into the next product would leave an error of that many times the factor.
constexpr int kSeed = 0x4B400000;
constexpr float kSeedValue = 12582912.f;

// Exact scores in place of seeded sums.
template <class C>
__device__ __forceinline__ void convert(const int (&sums)[C::kRowTiles][kKeyColumns][4],
                                        float (&x)[C::kRowTiles][kKeyColumns][4]) {
#pragma unroll
  for (int i = 0; i < C::kRowTiles; i++)
#pragma unroll
    for (int j = 0; j < kKeyColumns; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) x[i][j][e] = __int_as_float(sums[i][j][e]) - kSeedValue;
}

// Base-2 logits in place of scores. `correction` is of the lane's first key, or null.
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
          element = fmaf(element, factor, offset);
        }
    }
}

// Adds a mask to logits, 8 rows of the warp at a time by way of `biases`, its part of shared
// memory: element [row, key] of the head's mask is at `mask`. All numbers are of the warp's first
// row and the tile's first key.
template <class C>
__device__ __forceinline__ void add_mask(const AttentionParams& p, const char* mask, float* biases,
                                         int first_row, int first_key,
                                         float (&x)[C::kRowTiles][kKeyColumns][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < C::kRowTiles; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int above = first_row + 16 * i + 8 * h;
      visit_mask(p, [&](auto* typed) {
        const auto* elements = reinterpret_cast<decltype(typed)>(mask);
        using Element = std::remove_cv_t<std::remove_pointer_t<decltype(typed)>>;
        constexpr int kAtOnce = 4;  // on their way before the first is used: few registers are left
#pragma unroll 1
        for (int first = 0; first < 8; first += kAtOnce / 2) {
          Element own[kAtOnce];
#pragma unroll
          for (int n = 0; n < kAtOnce; n++) {
            const int row = above + first + n / 2, key = first_key + n % 2 * 32 + lane;
            if (row < p.seqlen_q && key < p.kv.seqlen)
              own[n] = elements[row * p.mask_stride_n + key * p.mask_stride_m];
          }
#pragma unroll
          for (int n = 0; n < kAtOnce; n++)
            biases[(first + n / 2) * C::kBiasStride + n % 2 * 32 + lane] = bias_of(own[n]);
        }
      });
      __syncwarp();
      const float* own = biases + lane / 4 * C::kBiasStride + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kKeyColumns; j++)
#pragma unroll
        for (int b = 0; b < 2; b++) {
          float& logit = x[i][j][2 * h + b];
          logit = add_bias(logit, own[8 * j + b]);
        }
      __syncwarp();
    }
}

// Makes logits -inf where no key is visible. Both numbers are of the lane's first element.
template <class C>
__device__ __forceinline__ void hide(const Sequence& sequence, int first_row, int first_key,
                                     float (&x)[C::kRowTiles][kKeyColumns][4]) {
  const Sequence s = sequence;
#pragma unroll
  for (int i = 0; i < C::kRowTiles; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int last = min(s.seqlen_k - 1, first_row + 16 * i + 8 * h + s.last_key_offset);
#pragma unroll
      for (int j = 0; j < kKeyColumns; j++)
#pragma unroll
        for (int b = 0; b < 2; b++)
          if (first_key + 8 * j + b > last) x[i][j][2 * h + b] = -INFINITY;
    }
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

  // Probabilities in place of scores, which times `factor` are base-2 logits, or are logits
  // already.
  template <bool kAreLogits>
  __device__ __forceinline__ void update(float (&x)[C::kRowTiles][kKeyColumns][4], float factor,
                                         bool wants_sum) {
    constexpr float kShift = C::kPv == Pv::kE4m3       ? 8.8073549221f
                             : C::kPv == Pv::kE4m3Fp16 ? 6.8073549221f
                                                       : 0.f;
#pragma unroll
    for (int i = 0; i < C::kRowTiles; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float largest = fmaxf(x[i][0][2 * h], x[i][0][2 * h + 1]);
#pragma unroll
        for (int j = 1; j < kKeyColumns; j++)
          largest = fmaxf(largest, fmaxf(x[i][j][2 * h], x[i][j][2 * h + 1]));
        if constexpr (!kAreLogits) largest *= factor;
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        const float next = fmaxf(top[i][h], largest - kShift);
        const float origin = next == -INFINITY ? 0.f : next;
        decay[i][h] = exp2_approx(top[i][h] - origin);
        top[i][h] = next;
        float total = 0.f;
#pragma unroll
        for (int j = 0; j < kKeyColumns; j++)
#pragma unroll
          for (int b = 0; b < 2; b++) {
            float& element = x[i][j][2 * h + b];
            element = exp2_approx(kAreLogits ? element - origin : fmaf(element, factor, -origin));
          }
        if constexpr (C::kHasFp16Accumulator) {
          // The maximum's own probability is P_r but for the rounding of `next`. Where that could
          // show in P's format, 64 of them could overflow fp16.
          if (fabsf(next) > 0x1p15f) {
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
