// RMSNorm and rotary embeddings of rows in registers. Nothing is contracted: what comes out is what
// tensor operations give, one by one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "quantize/cuda/rotary.h"

namespace torch_sage {

// The factor r of a row as it was handed in; 1 if it was not.
__device__ __forceinline__ float given_factor(const Rotary& r, int batch, int head, int token) {
  const int64_t at = batch * r.rstd_stride_b + head * r.rstd_stride_h + token * r.rstd_stride_n;
  return r.rstd != nullptr ? __ldg(r.rstd + at) : 1.f;
}

// The same for a row whose squares sum to `squares`. Neither branches: the compiler would load
// nothing ahead of that.
template <int kWidth>
__device__ __forceinline__ float row_factor(const Rotary& r, float squares, float given) {
  return r.eps >= 0 ? rsqrtf(__fadd_rn(__fmul_rn(squares, 1.f / kWidth), r.eps)) : given;
}

// Four entries of a table, from channel `column` on.
__device__ __forceinline__ float4 entries(const RotaryTable& table, int batch, int token,
                                          int column) {
  return __ldg(reinterpret_cast<const float4*>(table.data + batch * table.stride_b +
                                               token * table.stride_n + column));
}

// Two numbers of 16 bits, and the word that two make.
template <Dtype kDtype>
__device__ __forceinline__ float2 unpacked(uint32_t word) {
  if constexpr (kDtype == Dtype::kBFloat16)
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
template <Dtype kDtype>
__device__ __forceinline__ uint32_t packed(float2 x) {
  if constexpr (kDtype == Dtype::kBFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x.x, x.y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  const __half2 pair = __floats2half2_rn(x.x, x.y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Weights of four channels; ones if there are none.
template <Dtype kDtype>
__device__ __forceinline__ uint2 weights(const Rotary& r, int head, int column) {
  constexpr uint32_t kOnes = kDtype == Dtype::kBFloat16 ? 0x3f803f80u : 0x3c003c00u;
  const auto* at = static_cast<const uint16_t*>(r.weight) + head * r.weight_stride_h + column;
  return r.weight != nullptr ? __ldg(reinterpret_cast<const uint2*>(at)) : make_uint2(kOnes, kOnes);
}

// z of two channels.
template <Dtype kDtype>
__device__ __forceinline__ float2 normed(uint32_t x, float factor, uint32_t weight) {
  const float2 pair = unpacked<kDtype>(x), scale = unpacked<kDtype>(weight);
  return {__fmul_rn(__fmul_rn(pair.x, factor), scale.x),
          __fmul_rn(__fmul_rn(pair.y, factor), scale.y)};
}

// One rotated channel; `partner` is the other of its pair.
__device__ __forceinline__ float turned(float z, float partner, float cos, float sin,
                                        bool is_second) {
  const float across = __fmul_rn(partner, sin);
  return __fadd_rn(__fmul_rn(z, cos), is_second ? across : -across);
}

// Two adjacent rotated channels; `partner` has those that halves pair them with.
template <Pairing kPairing>
__device__ __forceinline__ float2 turned(float2 z, float2 partner, float2 cos, float2 sin,
                                         bool is_second_half) {
  if constexpr (kPairing == Pairing::kNeighbours)
    return {turned(z.x, z.y, cos.x, sin.x, false), turned(z.y, z.x, cos.y, sin.y, true)};
  return {turned(z.x, partner.x, cos.x, sin.x, is_second_half),
          turned(z.y, partner.y, cos.y, sin.y, is_second_half)};
}

}  // namespace torch_sage
