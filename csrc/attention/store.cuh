// Writing results, in the dtype of the query.
#pragma once

#include <cstdint>

#include "attention/quad.cuh"
#include "common/params.h"

namespace torch_sage {

// Where a thread's two rows, `row` and `row` + 8 of a head, go.
struct Place {
  int64_t row_of_lse;
  char* output;
  int rows;  // from `row` to the end

  __device__ __forceinline__ Place(int64_t row_of_lse, char* output, int rows)
      : row_of_lse(row_of_lse), output(output), rows(rows) {}
  // `end`: of the rows that the two may be.
  template <typename Params>
  __device__ __forceinline__ Place(const Params& p, int batch, int head, int row, int end)
      : row_of_lse((static_cast<int64_t>(batch) * p.heads_q + head) * p.seqlen_q + row),
        output(static_cast<char*>(p.output) +
               (batch * p.output_rows.stride_b + head * p.output_rows.stride_h +
                row * p.output_rows.stride_n) *
                   (p.dtype == Dtype::kFloat32 ? 4 : 2)),
        rows(end - row) {}
};

template <typename Params>
__device__ __forceinline__ void store_lse(const Params& p, const Place& place, int h, float lse) {
  if (8 * h < place.rows) p.lse[place.row_of_lse + 8 * h] = lse;
}

// Two halves; what is finite stays finite, NaN stays NaN.
__device__ __forceinline__ uint32_t pack_halves(Dtype dtype, float low, float high) {
  uint32_t packed;
  if (dtype == Dtype::kBFloat16) {
    asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// Writes x[h][k][b]: row 8 h below, column 8 (block + k) + 2 quad + b of the thread's quad.
template <typename Params>
__device__ __forceinline__ void store_columns(const Params& p, const Place& place, int block,
                                              int quad, const float (&x)[2][4][2]) {
  if (p.dtype == Dtype::kFloat32) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float* to = reinterpret_cast<float*>(place.output) + 8 * h * p.output_rows.stride_n;
#pragma unroll
      for (int k = 0; k < 4; k++)
#pragma unroll
        for (int b = 0; b < 2; b++) {
          const int column = 8 * (block + k) + 2 * quad + b;
          if (8 * h < place.rows && column < p.head_dim_v) to[column] = x[h][k][b];
        }
    }
    return;
  }
  // Handed round in the quad, this gives each lane the 8 adjacent columns of block + quad.
  const int first = 8 * (block + quad);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    uint32_t r[4];
#pragma unroll
    for (int k = 0; k < 4; k++) r[k] = pack_halves(p.dtype, x[h][k][0], x[h][k][1]);
    transpose_quad(r, quad);
    uint16_t* to =
        reinterpret_cast<uint16_t*>(place.output) + 8 * h * p.output_rows.stride_n + first;
    // Rows of the op's own output are aligned to 16 bytes wherever their length is.
    if (p.head_dim_v % 8 == 0) {
      if (8 * h < place.rows && first < p.head_dim_v)
        *reinterpret_cast<uint4*>(to) = make_uint4(r[0], r[1], r[2], r[3]);
    } else if (8 * h < place.rows) {
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (first + i < p.head_dim_v) to[i] = static_cast<uint16_t>(r[i / 2] >> 16 * (i & 1));
    }
  }
}

}  // namespace torch_sage
