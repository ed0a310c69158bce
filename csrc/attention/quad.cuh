// What the four lanes do together that share rows of an accumulator.
#pragma once

#include <cstdint>

namespace torch_sage {

// A lane's number k becomes what number `quad` of lane k was; `quad` is the lane's place.
__device__ __forceinline__ void transpose_quad(uint32_t (&r)[4], int quad) {
#pragma unroll
  for (int step = 1; step < 4; step <<= 1) {
    const bool upper = quad & step;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (!(i & step)) {
        const uint32_t got = __shfl_xor_sync(~0u, upper ? r[i] : r[i | step], step);
        (upper ? r[i] : r[i | step]) = got;
      }
  }
}

}  // namespace torch_sage
