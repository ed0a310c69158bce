// Rows as the words they come in.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/params.h"

namespace torch_sage {

// Loads from an address aligned to 16 bytes; zeros where nothing is to be read.
template <int kWords>
__device__ __forceinline__ void load_words(uint32_t (&words)[kWords], const void* from,
                                           bool is_inside) {
#pragma unroll
  for (int i = 0; i < kWords; i += 4) {
    const uint4 part =
        is_inside ? __ldg(static_cast<const uint4*>(from) + i / 4) : make_uint4(0, 0, 0, 0);
    words[i] = part.x;
    words[i + 1] = part.y;
    words[i + 2] = part.z;
    words[i + 3] = part.w;
  }
}

// Eight adjacent elements of a row: 16 bytes, or 32 of fp32.
template <bool kIsWide>
struct Eight {
  uint32_t words[kIsWide ? 8 : 4];

  __device__ __forceinline__ void load(const char* at, bool is_inside) {
    load_words(words, at, is_inside);
  }

  // Magnitudes compare as integers, so that NaN is the largest; those of 16 bits in the upper half.
  __device__ __forceinline__ uint32_t largest(uint32_t so_far) const {
#pragma unroll
    for (const uint32_t word : words) {
      if constexpr (kIsWide) {
        so_far = max(so_far, word & 0x7fffffffu);
      } else {
        so_far = max(so_far, word << 16 & 0x7fff0000u);
        so_far = max(so_far, word & 0x7fff0000u);
      }
    }
    return so_far;
  }

  __device__ __forceinline__ float2 pair(int i, Dtype dtype) const {
    if constexpr (kIsWide) {
      return {__uint_as_float(words[2 * i]), __uint_as_float(words[2 * i + 1])};
    } else if (dtype == Dtype::kBFloat16) {
      return {__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xffff0000u)};
    } else {
      return __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
    }
  }
};

}  // namespace torch_sage
