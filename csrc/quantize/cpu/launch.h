// The quantizer's loops over rows, compiled once per instruction set; no threads, no allocation.
#pragma once

#include <cstdint>

#include "common/params.h"
#include "quantize/groups.h"

namespace torch_sage {

constexpr int64_t kMaxHeadDim = 256;

// Consecutive rows of one (batch, head).
struct RowBlock {
  const void* data;
  Dtype dtype;
  int64_t rows;
  int64_t columns;     // at most kMaxHeadDim, unit stride
  int64_t row_stride;  // elements
};

struct QuantizedRows {
  int8_t* codes;  // [rows, row_bytes], columns zero-padded
  int64_t row_bytes;
  float* group_scales;  // [groups.scales(rows)]; may be null
  float* row_scales;    // [rows]: the scale of each row's group; may be null
};

struct RowKernels {
  // sums[c] += column c, rows in order, so that a fixed split into blocks fixes every rounding.
  void (*add_columns)(const RowBlock& x, double* sums);

  // R1-R5 and R7 of algorithm.md 2.1. Rows start at a block of `groups`. `mean` may be null.
  void (*quantize)(const RowBlock& x, const float* mean, const Groups& groups,
                   const QuantizedRows& out);

  // codes = bf16(x - mean), saturating at the largest finite bf16. amax_bits[c] becomes the larger
  // of itself and the bit pattern of |x - mean| over column c: at least kInfinityBits if any is
  // not finite. `mean` may be null.
  void (*round_to_bf16)(const RowBlock& x, const float* mean, uint16_t* codes, uint32_t* amax_bits);

  // out[r] = scale * (row r . vector), summed in fp64.
  void (*dot_rows)(const RowBlock& x, const float* vector, double scale, float* out);
};

constexpr uint32_t kInfinityBits = 0x7f800000;

// The kernels of cpu_isa().
const RowKernels& row_kernels();

extern const RowKernels kRowKernelsPortable, kRowKernelsAvx2, kRowKernelsAvx512;

}  // namespace torch_sage
