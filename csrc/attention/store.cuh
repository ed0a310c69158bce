// Writing results, in the dtype of the query.
#pragma once

#include <cstdint>

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

// Writes x[h][b]: row 8 h below, column 8 block + 2 quad + b of the thread's quad.
template <typename Params>
__device__ __forceinline__ void store_elements(const Params& p, const Place& place, int block,
                                               int quad, const float (&x)[2][2]) {
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int b = 0; b < 2; b++) {
      const int64_t row = 8 * h * p.output_rows.stride_n;
      const int column = 8 * block + 2 * quad + b;
      if (8 * h >= place.rows || column >= p.head_dim_v) continue;
      if (p.dtype == Dtype::kFloat32) {
        reinterpret_cast<float*>(place.output)[row + column] = x[h][b];
      } else {
        reinterpret_cast<uint16_t*>(place.output)[row + column] =
            static_cast<uint16_t>(pack_halves(p.dtype, x[h][b], 0.f));
      }
    }
}

// Whether results are written four at a time: rows of the op's own output are aligned to 8 bytes
// wherever their length is.
template <typename Params>
__device__ __forceinline__ bool stores_vectors(const Params& p) {
  return p.dtype != Dtype::kFloat32 && p.head_dim_v % 4 == 0;
}

// Writes what store_elements does of two blocks of columns, as pairs of 16-bit numbers. Two lanes
// swap a half each and then have 4 adjacent columns: a quad fills sectors of 32 bytes.
class VectorStore {
 public:
  template <typename Params>
  __device__ __forceinline__ VectorStore(const Params& p, const Place& place, int quad)
      : is_odd_(quad & 1), columns_(p.head_dim_v - first_column(quad)), rows_(place.rows) {
#pragma unroll
    for (int h = 0; h < 2; h++)
      at_[h] = place.output + (8 * h * p.output_rows.stride_n + first_column(quad)) * 2;
  }

  // low, high: pairs of an even block and of the next, in both rows.
  __device__ __forceinline__ void store(int block, const uint32_t (&low)[2],
                                        const uint32_t (&high)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t got = __shfl_xor_sync(~0u, is_odd_ ? low[h] : high[h], 1);
      const uint2 four = is_odd_ ? make_uint2(got, high[h]) : make_uint2(low[h], got);
      if (8 * h < rows_ && 8 * block < columns_)
        *reinterpret_cast<uint2*>(at_[h] + 16 * block) = four;
    }
  }

 private:
  __device__ __forceinline__ static int first_column(int quad) {
    return 8 * (quad & 1) + 4 * (quad >> 1);
  }

  const bool is_odd_;
  const int columns_;  // from the thread's first
  const int rows_;     // from its first
  char* at_[2];
};

}  // namespace torch_sage
