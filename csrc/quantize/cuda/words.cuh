// Rows as the words they come in.
#pragma once

#include <cstdint>

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

}  // namespace torch_sage
