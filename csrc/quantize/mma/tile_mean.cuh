// The mean of a tile of query rows, summed in one order whoever takes it: the maximum over a head
// and the codes of a tile are of the same differences, to the bit.
#pragma once

#include <cstdint>

#include "common/params.h"
#include "quantize/cuda/rules.cuh"
#include "quantize/cuda/words.cuh"

namespace torch_sage::mma {

constexpr int kMeanRows = 128;  // query rows that have one mean
constexpr int kMeanParts = 16;  // sums of 8 adjacent rows, which are added up in order
template <int kWidth>
constexpr int kMeanScratch = kMeanParts * kWidth;  // floats

template <int kWidth, int kThreads, bool kIsWide>
__device__ __forceinline__ void sum_parts(const char* rows, Dtype dtype, int64_t stride_n,
                                          int valid_rows, int head_dim, float* scratch) {
  constexpr int kLanes = kWidth / 8, kPartRows = kMeanRows / kMeanParts;
  constexpr int kBytes = kIsWide ? 4 : 2;
  for (int unit = threadIdx.x; unit < kMeanParts * kLanes; unit += kThreads) {
    const int part = unit / kLanes, column = unit % kLanes * 8;
    Eight<kIsWide> x[kPartRows];
#pragma unroll
    for (int i = 0; i < kPartRows; i++) {
      const int row = part * kPartRows + i;
      x[i].load(rows + (row * stride_n + column) * kBytes, row < valid_rows && column < head_dim);
    }
    float sum[8] = {};
#pragma unroll
    for (int i = 0; i < kPartRows; i++)
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const float2 pair = x[i].pair(c, dtype);
        // Explicit, because the attention kernel is compiled with contraction; cannot overflow.
        sum[2 * c] = __fmaf_rn(pair.x, 1.f / kMeanRows, sum[2 * c]);
        sum[2 * c + 1] = __fmaf_rn(pair.y, 1.f / kMeanRows, sum[2 * c + 1]);
      }
    float4* to = reinterpret_cast<float4*>(scratch + part * kWidth + column);
    to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
  }
}

// Called by all kThreads threads of a block. `rows` is the first of the tile's rows, aligned to 16
// bytes, of which `valid_rows` exist; `mean` [kWidth] and `scratch` [kMeanScratch<kWidth>] are
// shared memory, aligned to 16 bytes. At the return every thread may read the mean and write to
// the scratch. A channel whose mean is not finite gets 0: one bad row does not spoil the others,
// and any vector may be subtracted (algorithm.md, E3).
template <int kWidth, int kThreads>
__device__ __forceinline__ void tile_mean(const void* rows, Dtype dtype, int64_t stride_n,
                                          int valid_rows, int head_dim, float* mean,
                                          float* scratch) {
  const char* from = static_cast<const char*>(rows);
  if (dtype == Dtype::kFloat32) {
    sum_parts<kWidth, kThreads, true>(from, dtype, stride_n, valid_rows, head_dim, scratch);
  } else {
    sum_parts<kWidth, kThreads, false>(from, dtype, stride_n, valid_rows, head_dim, scratch);
  }
  __syncthreads();
  const float share = __fdiv_rn(kMeanRows, static_cast<float>(min(valid_rows, kMeanRows)));
  for (int column = threadIdx.x; column < kWidth; column += kThreads) {
    float sum = 0;
#pragma unroll
    for (int part = 0; part < kMeanParts; part++)
      sum = __fadd_rn(sum, scratch[part * kWidth + column]);
    sum = __fmul_rn(sum, share);
    mean[column] = is_finite(sum) ? sum : 0.f;
  }
  __syncthreads();
}

}  // namespace torch_sage::mma
