// What Q or K lacks where kernels read it before RMSNorm and rotary embeddings.
#pragma once

#include <cstdint>

#include "common/params.h"

namespace torch_sage {

// Channels that rotate together, of a head of D.
enum class Pairing { kNone, kHalves, kNeighbours };  // (i, i + D / 2), (2 i, 2 i + 1)

struct RotaryTable {
  const float* data;           // [b, n, D]; rows are dense and aligned to 16 bytes
  int64_t stride_b, stride_n;  // elements
};

// With z = x * r * weight: of a pair, first * cos - second * sin and second * cos + first * sin,
// every operation in fp32, rounded to the dtype of x (torch_sage/ops/rotary.py). D is 64 or 128, x
// of 16 bits.
struct Rotary {
  Pairing pairing;  // kNone: x is as attention takes it, and all else unused
  RotaryTable cos, sin;
  const float* rstd;  // r; may be null
  int64_t rstd_stride_b, rstd_stride_h, rstd_stride_n;
  float eps;           // r is rsqrt(mean of x^2 over D + eps); negative: it is not
  const void* weight;  // [h, D] like x, aligned to 16 bytes; may be null
  int64_t weight_stride_h;
};

}  // namespace torch_sage
