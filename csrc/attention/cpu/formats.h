// 16-bit floats and mask elements as plain loops that every compiler vectorises.
//
// In an anonymous namespace, like all code below a kernel_*.cpp: each of those files is compiled
// for its own instruction set, and a function with external linkage would exist once in the binary,
// from whichever file the linker saw first; AVX-512 code could then run on a machine without it.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "common/params.h"

namespace torch_sage {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float bf16_to_float(uint16_t h) { return float_of(uint32_t{h} << 16); }

// Rounding for the output. What is finite stays finite: the result is a convex combination of V,
// and only the rounding of V can have carried it past the largest number (fp16 65504 is 65536 in
// bf16).
inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t largest = (bits >> 31 << 15) | 0x7f7f;
  const uint32_t finite = magnitude > 0x7f7f0000 && magnitude < 0x7f800000 ? largest : rounded;
  return static_cast<uint16_t>(magnitude > 0x7f800000 ? 0x7fc0 : finite);
}

inline float fp16_to_float(uint16_t h) {
  const uint32_t magnitude = (h & 0x7fffu) << 13;
  // Normal numbers: re-bias the exponent by 127 - 15; infinities and NaN: to the largest exponent.
  const uint32_t normal = magnitude + ((magnitude >= 0x0f800000 ? 224u : 112u) << 23);
  // Subnormal ones: the fraction at exponent 2^-14, less the implicit one that it does not have.
  const float subnormal = float_of(magnitude + (113u << 23)) - float_of(113u << 23);
  const uint32_t bits = magnitude < 0x00800000 ? bits_of(subnormal) : normal;
  return float_of(bits | ((h & 0x8000u) << 16));
}

inline uint16_t float_to_fp16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 lets the adder round at 2^-24, the last place of fp16 subnormals.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00u : 0x7c00u;
  const uint32_t large = magnitude < 0x7f800000 ? 0x7bffu : special;
  const uint32_t half =
      magnitude > 0x477fe000 ? large : (magnitude < 0x38800000 ? subnormal : normal);
  return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// A mask element in base-2 logit units; -infinity hides the key. A finite element stays finite:
// finfo(dtype).min in a whole row means a uniform row (algorithm.md 2.10.2), not a hidden one.
inline float to_bias(float mask) {
  const float scaled = mask * kLog2E;
  const float finite = scaled < -kLargest ? -kLargest : (scaled > kLargest ? kLargest : scaled);
  return mask == -kInfinity || mask == kInfinity ? mask : finite;
}

struct BoolMask {
  using Element = uint8_t;
  static float bias(uint8_t keep) { return keep ? 0.0f : -kInfinity; }
};
struct Float32Mask {
  using Element = float;
  static float bias(float x) { return to_bias(x); }
};
struct BFloat16Mask {
  using Element = uint16_t;
  static float bias(uint16_t x) { return to_bias(bf16_to_float(x)); }
};
struct Float16Mask {
  using Element = uint16_t;
  static float bias(uint16_t x) { return to_bias(fp16_to_float(x)); }
};

template <class Mask>
void load_bias(const void* mask, int64_t offset, int64_t stride, int64_t count, float* bias) {
  const auto* element = static_cast<const typename Mask::Element*>(mask) + offset;
  if (stride == 1) {
    for (int64_t m = 0; m < count; ++m) bias[m] = Mask::bias(element[m]);
  } else {
    for (int64_t m = 0; m < count; ++m) bias[m] = Mask::bias(element[m * stride]);
  }
}

// Biases of `count` keys from `first_key` on, for query row `row`.
inline void load_bias(const CpuAttentionParams& p, int64_t batch, int64_t head, int64_t row,
                      int64_t first_key, int64_t count, float* bias) {
  const int64_t offset = batch * p.mask_stride_b + head * p.mask_stride_h + row * p.mask_stride_n +
                         first_key * p.mask_stride_m;
  switch (p.mask_kind) {
    case MaskKind::kNone:
      return;
    case MaskKind::kBool:
      return load_bias<BoolMask>(p.mask, offset, p.mask_stride_m, count, bias);
    case MaskKind::kFloat32:
      return load_bias<Float32Mask>(p.mask, offset, p.mask_stride_m, count, bias);
    case MaskKind::kBFloat16:
      return load_bias<BFloat16Mask>(p.mask, offset, p.mask_stride_m, count, bias);
    case MaskKind::kFloat16:
      return load_bias<Float16Mask>(p.mask, offset, p.mask_stride_m, count, bias);
  }
}

// Rounds one row to the output's type; `offset` in elements.
inline void store_row(const CpuAttentionParams& p, int64_t offset, const float* row) {
  switch (p.output_dtype) {
    case Dtype::kFloat32:
      std::memcpy(static_cast<float*>(p.output) + offset, row, p.head_dim_v * sizeof(float));
      return;
    case Dtype::kBFloat16:
      for (int64_t d = 0; d < p.head_dim_v; ++d) {
        (static_cast<uint16_t*>(p.output) + offset)[d] = float_to_bf16(row[d]);
      }
      return;
    case Dtype::kFloat16:
      for (int64_t d = 0; d < p.head_dim_v; ++d) {
        (static_cast<uint16_t*>(p.output) + offset)[d] = float_to_fp16(row[d]);
      }
      return;
  }
}

}  // namespace
}  // namespace torch_sage
