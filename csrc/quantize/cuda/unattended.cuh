// The result of rows of packed sequences that attention does not come to: those that no sequence
// has, and those of sequences without keys.
#pragma once

#include "common/packed.cuh"
#include "quantize/cuda/prepared.h"

namespace torch_sage {

__device__ __forceinline__ bool is_attended(const Packed& queries, const Packed& keys, int row) {
  // Sequences that start at this row or before; the last of them may have it.
  int low = 0, high = queries.count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (clamped_start(queries, middle) <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == 0) return false;
  const Span rows = span_of(queries, low - 1);
  return row < rows.first + rows.length && span_of(keys, low - 1).length > 0;
}

// A block of kThreads looks at as many rows.
template <int kThreads, typename Element>
__device__ __forceinline__ void fill_unattended(const PackedOutput& p, const Packed& keys,
                                                int block) {
  const int row = block * kThreads + static_cast<int>(threadIdx.x);
  const bool is_left = row < p.queries.rows && !is_attended(p.queries, keys, row);
  if (is_left && p.lse != nullptr)
    for (int head = 0; head < p.heads; head++)
      p.lse[static_cast<int64_t>(head) * p.queries.rows + row] = -INFINITY;
  const int lane = threadIdx.x % 32;
  for (uint32_t left = __ballot_sync(~0u, is_left); left != 0; left &= left - 1) {
    Element* to = static_cast<Element*>(p.output) +
                  static_cast<int64_t>(row - lane + __ffs(left) - 1) * p.row_elements;
    for (int i = lane; i < p.row_elements; i += 32) to[i] = Element(0.f);
  }
}

}  // namespace torch_sage
