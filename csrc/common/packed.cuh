// Where a packed sequence lies, as a kernel finds out: the host never knows.
#pragma once

#include "common/packed.h"

namespace torch_sage {

struct Span {
  int first, length;  // rows
};

__device__ __forceinline__ int clamped_start(const Packed& packed, int sequence) {
  return min(max(packed.starts[sequence], 0), packed.rows);
}

// Inside the tensor, whatever `starts` holds.
__device__ __forceinline__ Span span_of(const Packed& packed, int sequence) {
  const int first = clamped_start(packed, sequence);
  const int end = max(clamped_start(packed, sequence + 1), first);
  return {first, min(end - first, packed.longest)};
}

__device__ __forceinline__ int first_unit(int first_row, int sequence, int size) {
  return first_row / size + sequence;
}

// The sequence that unit `unit` belongs to, if any does. Called by whole warps: each step asks for
// 32 sequences at once.
__device__ __forceinline__ int find_sequence(const Packed& packed, int unit, int size) {
  int low = 0;
  for (int count = packed.count; count > 1;) {
    const int step = (count + 31) / 32, offset = static_cast<int>(threadIdx.x % 32) * step;
    const bool is_before = offset < count && first_unit(clamped_start(packed, low + offset),
                                                        low + offset, size) <= unit;
    low += max(__popc(__ballot_sync(~0u, is_before)) - 1, 0) * step;
    count = min(step, packed.count - low);
  }
  return low;
}

}  // namespace torch_sage
