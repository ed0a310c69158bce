// Row loops that each instruction-set file instantiates; written so that compilers vectorise them.
// Everything is in an anonymous namespace: an inline function with external linkage, compiled for
// AVX-512 here, could be the copy that the linker keeps for the whole library.
#pragma once

#include <cstdint>
#include <cstring>

#include "quantize/cpu/launch.h"

namespace torch_sage {
namespace {

constexpr float kCodeMax = 127.0f;
constexpr float kScalePerAmax = 0x1.020408p-7f;  // fp32(1/127)
constexpr float kAmaxFloor = 0x1p-100f;          // R3: scale and reciprocal stay normal numbers
constexpr uint32_t kQuietNan = 0x7fc00000;
constexpr uint32_t kMagnitude = 0x7fffffff;
constexpr uint32_t kBf16MaxBits = 0x7f7f0000;  // the largest finite bf16, as fp32

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct Float32 {
  using Storage = float;
  static float load(float x) { return x; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static float load(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }
};

struct Float16 {
  using Storage = uint16_t;
  // Integer selects instead of F16C: vectorises on every target. Subnormals are found as the
  // difference of two normal numbers, so flush-to-zero modes cannot lose them.
  static float load(uint16_t x) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
    const uint32_t magnitude = x & 0x7fff;
    const float subnormal = from_bits(magnitude + 0x3f000000) - 0.5f;
    const uint32_t rebias = magnitude < 0x7c00 ? 112u << 23 : 224u << 23;
    const uint32_t normal = (magnitude << 13) + rebias;
    return from_bits(sign | (magnitude < 0x400 ? to_bits(subnormal) : normal));
  }
};

template <typename F>
void with_format(Dtype dtype, F body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(Float32{});
    case Dtype::kBFloat16:
      return body(BFloat16{});
    case Dtype::kFloat16:
      return body(Float16{});
  }
}

template <typename Format>
const typename Format::Storage* row(const RowBlock& x, int64_t r) {
  return static_cast<const typename Format::Storage*>(x.data) + r * x.row_stride;
}

// R1 and R2: the row in fp32, and the largest bit pattern of its magnitudes (NaN > Inf > finite).
template <typename Format>
uint32_t load_row(const RowBlock& x, int64_t r, const float* mean, float* values) {
  const auto* source = row<Format>(x, r);
  int32_t amax = 0;  // signed: SSE and AVX2 compare signed integers, and the sign bit is clear
  for (int64_t c = 0; c < x.columns; ++c) {
    float value = Format::load(source[c]);
    if (mean != nullptr) value -= mean[c];
    values[c] = value;
    const int32_t bits = static_cast<int32_t>(to_bits(value) & kMagnitude);
    amax = bits > amax ? bits : amax;
  }
  return static_cast<uint32_t>(amax);
}

// R2-R4: the scale of a group, and the reciprocal that turns its values into codes.
struct GroupScale {
  float scale;
  float inverse;  // 0 in a poisoned group

  static GroupScale of(uint32_t amax_bits) {
    if (amax_bits >= kInfinityBits) return {from_bits(kQuietNan), 0.0f};
    const float amax = from_bits(amax_bits);
    const float floored = amax > kAmaxFloor ? amax : kAmaxFloor;
    return {floored * kScalePerAmax, kCodeMax / floored};
  }
};

// R5 and R7. |value * inverse| is at most 127 * (1 + 2^-23), so rounding never passes 127 and the
// clamp of R5 has nothing to do.
inline void encode_row(const float* values, int64_t columns, GroupScale group, int8_t* codes,
                       int64_t row_bytes) {
  if (group.inverse == 0.0f) {
    std::memset(codes, 0, row_bytes);
    return;
  }
  // Adding 1.5 * 2^23 leaves the integer, rounded to nearest even, in the low mantissa bits.
  constexpr float kRound = 0x1.8p23f;
  for (int64_t c = 0; c < columns; ++c) {
    codes[c] = static_cast<int8_t>(to_bits(values[c] * group.inverse + kRound));
  }
  for (int64_t c = columns; c < row_bytes; ++c) codes[c] = 0;
}

template <typename Format>
void quantize_rows(const RowBlock& x, const float* mean, const QuantizedRows& out) {
  alignas(64) float values[kMaxHeadDim];
  for (int64_t r = 0; r < x.rows; ++r) {
    const GroupScale group = GroupScale::of(load_row<Format>(x, r, mean, values));
    encode_row(values, x.columns, group, out.codes + r * out.row_bytes, out.row_bytes);
    if (out.group_scales != nullptr) out.group_scales[r] = group.scale;
    if (out.row_scales != nullptr) out.row_scales[r] = group.scale;
  }
}

// Two passes over the rows of a span, which may be fewer than groups.span_rows, even none.
template <typename Format>
void quantize_span(const RowBlock& x, const float* mean, const Groups& groups, int8_t* codes,
                   int64_t row_bytes, float* group_scales, float* row_scales) {
  alignas(64) float values[kMaxHeadDim];
  uint32_t amax[kMaxLaneGroups] = {};
  GroupScale scales[kMaxLaneGroups];
  for (int64_t r = 0; r < x.rows; ++r) {
    uint32_t& group = amax[groups.lane_group(r)];
    const uint32_t bits = load_row<Format>(x, r, mean, values);
    group = bits > group ? bits : group;
  }
  for (int64_t g = 0; g < groups.lane_groups; ++g) {
    scales[g] = GroupScale::of(amax[g]);
    if (group_scales != nullptr) group_scales[g] = scales[g].scale;
  }
  for (int64_t r = 0; r < x.rows; ++r) {
    load_row<Format>(x, r, mean, values);
    const GroupScale group = scales[groups.lane_group(r)];
    encode_row(values, x.columns, group, codes + r * row_bytes, row_bytes);
    if (row_scales != nullptr) row_scales[r] = group.scale;
  }
}

template <typename T>
T* offset(T* pointer, int64_t elements) {
  return pointer == nullptr ? nullptr : pointer + elements;
}

void quantize(const RowBlock& x, const float* mean, const Groups& groups,
              const QuantizedRows& out) {
  with_format(x.dtype, [&](auto format) {
    using Format = decltype(format);
    if (groups.is_per_row()) return quantize_rows<Format>(x, mean, out);
    const int64_t spans = groups.spans(x.rows);
    for (int64_t s = 0; s < spans; ++s) {
      const int64_t first = s * groups.span_rows < x.rows ? s * groups.span_rows : x.rows;
      const int64_t left = x.rows - first;
      const int64_t rows = left < groups.span_rows ? left : groups.span_rows;
      const RowBlock span{row<Format>(x, first), x.dtype, rows, x.columns, x.row_stride};
      quantize_span<Format>(span, mean, groups, out.codes + first * out.row_bytes, out.row_bytes,
                            offset(out.group_scales, s * groups.lane_groups),
                            offset(out.row_scales, first));
    }
  });
}

void add_columns(const RowBlock& x, double* sums) {
  with_format(x.dtype, [&](auto format) {
    using Format = decltype(format);
    for (int64_t r = 0; r < x.rows; ++r) {
      const auto* source = row<Format>(x, r);
      for (int64_t c = 0; c < x.columns; ++c) sums[c] += Format::load(source[c]);
    }
  });
}

void round_to_bf16(const RowBlock& x, const float* mean, uint16_t* codes, uint32_t* amax_bits) {
  alignas(64) float values[kMaxHeadDim];
  with_format(x.dtype, [&](auto format) {
    using Format = decltype(format);
    for (int64_t r = 0; r < x.rows; ++r) {
      load_row<Format>(x, r, mean, values);
      for (int64_t c = 0; c < x.columns; ++c) {
        const uint32_t bits = to_bits(values[c]);
        const uint32_t magnitude = bits & kMagnitude;
        amax_bits[c] = magnitude > amax_bits[c] ? magnitude : amax_bits[c];
        const uint32_t rounded = magnitude + 0x7fff + (magnitude >> 16 & 1);
        const uint32_t finite = rounded < kInfinityBits ? rounded : kBf16MaxBits;
        codes[r * x.columns + c] = static_cast<uint16_t>(((bits & ~kMagnitude) | finite) >> 16);
      }
    }
  });
}

void dot_rows(const RowBlock& x, const float* vector, double scale, float* out) {
  // One sum would wait for the adder at every column. Independent ones fill vectors, and their
  // order is the same on every instruction set.
  constexpr int64_t kSums = 16;
  with_format(x.dtype, [&](auto format) {
    using Format = decltype(format);
    for (int64_t r = 0; r < x.rows; ++r) {
      const auto* source = row<Format>(x, r);
      double sums[kSums] = {};
      int64_t c = 0;
      for (; c + kSums <= x.columns; c += kSums) {
        for (int64_t i = 0; i < kSums; ++i) {
          sums[i] += static_cast<double>(Format::load(source[c + i])) * vector[c + i];
        }
      }
      for (int64_t i = 0; c < x.columns; ++c, ++i) {
        sums[i] += static_cast<double>(Format::load(source[c])) * vector[c];
      }
      for (int64_t half = kSums / 2; half > 0; half /= 2) {
        for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
      }
      out[r] = static_cast<float>(scale * sums[0]);
    }
  });
}

constexpr RowKernels kKernels = {add_columns, quantize, round_to_bf16, dot_rows};

}  // namespace
}  // namespace torch_sage
