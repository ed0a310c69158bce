// What a smoothed Q leaves out of the scores (algorithm.md E3): the mean of the block's query rows
// times K as it was, one tile at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/mask.cuh"
#include "attention/mma/config.cuh"
#include "attention/mma/instructions.cuh"

namespace torch_sage::mma {

template <class C>
struct Correction {
  // Shared memory.
  const uint8_t* raw;  // a tile of 16-bit K: [keys, 2 * width bytes]
  const float* mean;   // [width]
  uint16_t* parts;     // [kParts, width] of the mean, in the dtype of K
  float* of_keys;      // [keys]: added to base-2 logits

  float constant;  // the mean of Q times the mean of K, which is in K but not in its codes
  float factor;    // of base-2 logits, with the sign of the scale

  // Called by the whole block, with the mean of its query rows.
  __device__ __forceinline__ void set_mean(const AttentionParams& p, const float* key_mean) {
    for (int i = threadIdx.x; C::kCorrectsByTensorCores && i < C::kWidth; i += C::kThreads) {
      float rest = mean[i];
#pragma unroll
      for (int part = 0; part < kParts; part++) {
        uint16_t bits;
        if (p.dtype == Dtype::kBFloat16) {
          const __nv_bfloat16 rounded = __float2bfloat16_rn(rest);
          rest = __fsub_rn(rest, __bfloat162float(rounded));
          bits = __bfloat16_as_ushort(rounded);
        } else {
          const __half rounded = __float2half_rn(rest);
          rest = __fsub_rn(rest, __half2float(rounded));
          bits = __half_as_ushort(rounded);
        }
        parts[part * C::kWidth + i] = bits;
      }
    }
    constant = 0.f;
    if (key_mean != nullptr) {
      for (int i = threadIdx.x % 32; i < p.key_mean_columns; i += 32)
        constant = fmaf(mean[i], key_mean[i], constant);
      constant = sum_of_warp(constant);
    }
  }

  __device__ __forceinline__ static float sum_of_warp(float x) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(~0u, x, other);
    return x;
  }

  // Where tensor cores do not do it: one key after the other, from global memory.
  template <typename Element>
  __device__ __forceinline__ void compute_directly(const Element* rows, int64_t stride, int columns,
                                                   int count) const {
    constexpr int kOwn = kKeys / C::kWarps;
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kOwn;
#pragma unroll 4
    for (int key = first; key < first + kOwn; key++) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < C::kWidth / 64; i++) {
        const int column = 64 * i + 2 * lane;
        if (key >= count || column >= columns) continue;
        const Element* at = rows + key * stride + column;
        sum = fmaf(to_float(at[0]), mean[column], fmaf(to_float(at[1]), mean[column + 1], sum));
      }
      sum = sum_of_warp(sum);
      if (lane == 0) of_keys[key] = factor * (sum - constant);
    }
  }

  // The parts of the mean are rows 0 to 2 of a matrix. Each warp has its share of the keys.
  __device__ __forceinline__ void compute(bool is_bf16) const {
    constexpr int kTiles = kKeyColumns / C::kWarps;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane / 4, quad = lane % 4;
    float sums[kTiles][4] = {};
#pragma unroll
    for (int k = 0; k < C::kWidth / 32; k++) {
      uint32_t a[2][4] = {};
      if (part < kParts) {
        const auto* words = reinterpret_cast<const uint32_t*>(parts + part * C::kWidth) + k * 16;
        a[0][0] = words[quad];
        a[0][2] = words[quad + 4];
        a[1][0] = words[quad + 8];
        a[1][2] = words[quad + 12];
      }
#pragma unroll
      for (int j = 0; j < kTiles; j++) {
        uint32_t b[4];
        load_matrices(
            b, shared_address(raw) +
                   place<2 * C::kWidth>((warp * kTiles + j) * 8 + lane % 8, 4 * k + lane / 8));
        if (is_bf16) {
          mma_bf16(sums[j], a[0], b[0], b[1], sums[j]);
          mma_bf16(sums[j], a[1], b[2], b[3], sums[j]);
        } else {
          mma_fp16(sums[j], a[0], b[0], b[1], sums[j]);
          mma_fp16(sums[j], a[1], b[2], b[3], sums[j]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles; j++)
#pragma unroll
      for (int b = 0; b < 2; b++) {
        const float low = __shfl_sync(~0u, sums[j][b], 8 + quad);
        const float middle = __shfl_sync(~0u, sums[j][b], 4 + quad);
        if (part == 0)
          of_keys[(warp * kTiles + j) * 8 + 2 * quad + b] =
              factor * (sums[j][b] + (middle + low) - constant);
      }
  }
};

}  // namespace torch_sage::mma
