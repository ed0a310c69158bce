// Quantization of the query rows of a block, in the prologue of the attention kernel.
#pragma once

#include "attention/mma/config.cuh"
#include "attention/mma/instructions.cuh"
#include "quantize/cuda/rules.cuh"
#include "quantize/cuda/words.cuh"

namespace torch_sage::mma {

// What the query rows of one block are quantized from and to.
struct QueryRows {
  const char* first;   // element 0 of the block's first row
  int valid;           // rows of the block that exist
  const float* mean;   // shared, [width], subtracted; null: none
  const float* shift;  // [head_dim] the mean of K; null: the LSE is not wanted or not shifted
  uint32_t amax;       // of the whole head, for granularity kTensor
  // Shared memory.
  uint8_t* codes;
  float* shifts;  // [rows] of the LSE
  uint32_t* amax_of_warps;
};

template <bool kIsInt4>
__device__ __forceinline__ ScaleAndInverse scale_of_codes(uint32_t amax) {
  return kIsInt4 ? scale_and_inverse_7(__uint_as_float(amax))
                 : scale_and_inverse_127(__uint_as_float(amax));
}

// Eight codes as they are stored: bytes, or nibbles in the first word.
template <bool kIsInt4>
__device__ __forceinline__ uint2 pack_codes(const float (&x)[8], float inverse) {
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    // An undefined scale has the inverse 0, and what is not finite becomes NaN, so 0.
    const uint32_t code = static_cast<uint32_t>(__float2int_rn(__fmul_rn(x[i], inverse)));
    if constexpr (kIsInt4) {
      words[0] |= (code & 0xfu) << 4 * i;
    } else {
      words[i / 4] |= (code & 0xffu) << 8 * (i % 4);
    }
  }
  return make_uint2(words[0], words[1]);
}

// Quantizes the calling warp's rows, in two passes over them; returns the scale of those rows that
// the lane has scores of (NaN where it is undefined). All threads of the block call it.
template <class C, bool kIsWide>
__device__ __forceinline__ float quantize_query_rows(const AttentionParams& p,
                                                     const QueryRows& rows) {
  constexpr int kLanes = C::kWidth / 8;     // of a row
  constexpr int kRowsAtOnce = 32 / kLanes;  // by one warp
  constexpr int kSlots = 8 / kRowsAtOnce;   // residues of a lane's rows modulo 8
  constexpr int kElementBytes = kIsWide ? 4 : 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = lane % kLanes * 8, first_row = warp * C::kWarpRows + lane / kLanes;
  const char* at = rows.first + (first_row * p.query_rows.stride_n + column) * kElementBytes;
  const int64_t step = kRowsAtOnce * p.query_rows.stride_n * kElementBytes;
  const float sign = p.scale < 0.f ? -1.f : 1.f;
  // `visit` gets eight elements as they are.
  const auto for_rows = [&](auto visit) {
#pragma unroll 1
    for (int block = 0; block < C::kWarpRows / 8; block++) {
      Eight<kIsWide> x[kSlots];
#pragma unroll
      for (int slot = 0; slot < kSlots; slot++) {
        const int row = (block * kSlots + slot) * kRowsAtOnce;
        x[slot].load(at + (block * kSlots + slot) * step,
                     first_row + row < rows.valid && column < p.head_dim);
      }
#pragma unroll
      for (int slot = 0; slot < kSlots; slot++) {
        float values[8];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float2 pair = x[slot].pair(i, p.dtype);
          values[2 * i] = pair.x;
          values[2 * i + 1] = pair.y;
        }
        visit(slot, first_row + (block * kSlots + slot) * kRowsAtOnce, values);
      }
    }
  };
  const auto center = [&](int row, float (&x)[8]) {
    if (rows.mean == nullptr || row >= rows.valid) return;
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = __fsub_rn(x[i], rows.mean[column + i]);
  };

  uint32_t amax[kSlots] = {};
  for_rows([&](int slot, int row, float (&x)[8]) {
    if (rows.shift != nullptr) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (column + i < p.key_mean_columns) sum = fmaf(x[i], rows.shift[column + i], sum);
#pragma unroll
      for (int other = kLanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
      rows.shifts[row] = sum * p.scale;
    }
    center(row, x);
    // As integers, so that NaN is the largest magnitude.
#pragma unroll
    for (int i = 0; i < 8; i++) amax[slot] = max(amax[slot], __float_as_uint(x[i]) & 0x7fffffffu);
  });
#pragma unroll
  for (int slot = 0; slot < kSlots; slot++)
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2)
      amax[slot] = max(amax[slot], __shfl_xor_sync(~0u, amax[slot], other));
  uint32_t own = 0;  // of the rows whose scores the lane gets
  if (p.granularity == Granularity::kThread) {
    const int row = lane / 4;
#pragma unroll
    for (int slot = 0; slot < kSlots; slot++) {
      const uint32_t got = __shfl_sync(~0u, amax[slot], row % kRowsAtOnce * kLanes);
      if (slot == row / kRowsAtOnce) own = got;
    }
  } else {
#pragma unroll
    for (int slot = 0; slot < kSlots; slot++) own = max(own, amax[slot]);
#pragma unroll
    for (int other = 16; other >= kLanes; other /= 2)
      own = max(own, __shfl_xor_sync(~0u, own, other));
    if (p.granularity == Granularity::kBlock) {
      if (lane == 0) rows.amax_of_warps[warp] = own;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < C::kWarps; i++) own = max(own, rows.amax_of_warps[i]);
    } else if (p.granularity == Granularity::kTensor) {
      own = rows.amax;
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; slot++) amax[slot] = own;
  }
  float inverse[kSlots];
#pragma unroll
  for (int slot = 0; slot < kSlots; slot++)
    inverse[slot] = sign * scale_of_codes<C::kIsInt4>(amax[slot]).inverse;
  for_rows([&](int slot, int row, float (&x)[8]) {
    center(row, x);
    const uint2 codes = pack_codes<C::kIsInt4>(x, inverse[slot]);
    if constexpr (C::kIsInt4) {
      const int word = lane % kLanes;
      *reinterpret_cast<uint32_t*>(rows.codes + place<C::kCodeBytes>(row, word / 4) +
                                   word % 4 * 4) = codes.x;
    } else {
      const int pair = lane % kLanes;
      *reinterpret_cast<uint2*>(rows.codes + place<C::kCodeBytes>(row, pair / 2) + pair % 2 * 8) =
          codes;
    }
  });
  return scale_of_codes<C::kIsInt4>(own).scale;
}

}  // namespace torch_sage::mma
