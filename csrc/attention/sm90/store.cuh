// Writing results, in the dtype of the query.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/sm90/params.h"

namespace torch_sage::sm90 {

// A thread's two rows are `row` and `row` + 8.
struct Place {
  int batch, head, row;
};

__device__ __forceinline__ void store_lse(const AttentionParams& p, const Place& place, int h,
                                          float lse) {
  const int row = place.row + 8 * h;
  if (row < p.seqlen_q)
    p.lse[(static_cast<int64_t>(place.batch) * p.heads_q + place.head) * p.seqlen_q + row] = lse;
}

// What is finite stays finite; NaN stays NaN.
__device__ __forceinline__ float saturate(float x, float largest) {
  x = x > largest ? largest : x;
  return x < -largest ? -largest : x;
}

__device__ __forceinline__ uint32_t pack_halves(Dtype dtype, float low, float high) {
  if (dtype == Dtype::kBFloat16) {
    const __nv_bfloat162 pair =
        __floats2bfloat162_rn(saturate(low, 0x1.fep127f), saturate(high, 0x1.fep127f));
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  const __half2 pair = __floats2half2_rn(saturate(low, 65504.f), saturate(high, 65504.f));
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Writes x[h][k][b]: row 8 h below, column 8 (block + k) + 2 quad + b of the thread's quad.
__device__ __forceinline__ void store_columns(const AttentionParams& p, const Place& place,
                                              int block, int quad, const float (&x)[2][4][2]) {
  const int64_t head = place.batch * p.output_rows.stride_b + place.head * p.output_rows.stride_h;
  if (p.dtype == Dtype::kFloat32) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = place.row + 8 * h;
      float* to = static_cast<float*>(p.output) + head + row * p.output_rows.stride_n;
#pragma unroll
      for (int k = 0; k < 4; k++)
#pragma unroll
        for (int b = 0; b < 2; b++) {
          const int column = 8 * (block + k) + 2 * quad + b;
          if (row < p.seqlen_q && column < p.head_dim_v) to[column] = x[h][k][b];
        }
    }
    return;
  }
  // A 4x4 transpose in the quad gives each lane the 8 adjacent columns of block + quad.
  const int first = 8 * (block + quad);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    uint32_t r[4];
#pragma unroll
    for (int k = 0; k < 4; k++) r[k] = pack_halves(p.dtype, x[h][k][0], x[h][k][1]);
#pragma unroll
    for (int step = 1; step < 4; step <<= 1) {
      const bool upper = quad & step;
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (!(i & step)) {
          const uint32_t got = __shfl_xor_sync(~0u, upper ? r[i] : r[i | step], step);
          (upper ? r[i] : r[i | step]) = got;
        }
    }
    const int row = place.row + 8 * h;
    uint16_t* to = static_cast<uint16_t*>(p.output) + head + row * p.output_rows.stride_n + first;
    if (row >= p.seqlen_q) continue;
    // Rows of the op's own output: aligned to 16 bytes wherever a row's length is.
    if (first + 8 <= p.head_dim_v && p.head_dim_v % 8 == 0) {
      *reinterpret_cast<uint4*>(to) = make_uint4(r[0], r[1], r[2], r[3]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (first + i < p.head_dim_v) to[i] = static_cast<uint16_t>(r[i / 2] >> 16 * (i & 1));
    }
  }
}

}  // namespace torch_sage::sm90
