// Which rows a block of the pre-pass reads: of one head of one sequence, which is a batch entry or
// one of many that are packed.
#pragma once

#include "common/packed.cuh"
#include "common/params.h"

namespace torch_sage::mma {

struct Head {
  int index;  // in [batch or sequences, heads]
  int start;  // rows of the tensor before the sequence
  int seqlen;
  int unit;  // of the block, where it has one of the head's units of so many rows

  __device__ __forceinline__ int64_t offset(const Rows& rows, int heads) const {
    return index / heads * rows.stride_b + index % heads * rows.stride_h + start * rows.stride_n;
  }
  // Workspaces have a row for every head, which packed sequences share,
  __device__ __forceinline__ int64_t row(const Packed& packed, int heads) const {
    return packed.starts != nullptr ? index % heads : index;
  }
  // and of what it has for units of so many rows this is the head's first.
  __device__ __forceinline__ int first(const Packed& packed, int heads, int size) const {
    return packed.starts != nullptr ? first_unit(start, index / heads, size) : 0;
  }
};

// Blocks for all units of `size` rows.
inline int64_t blocks_of(const Packed& packed, int batch, int heads, int seqlen, int size) {
  const int64_t units = (static_cast<int64_t>(seqlen) + size - 1) / size;
  return heads * (packed.starts != nullptr ? packed.units(size) : units * batch);
}

// What block `block` of those has; nothing where its unit is not one of the sequence.
__device__ __forceinline__ Head head_of_block(const Packed& packed, int heads, int seqlen, int size,
                                              int block) {
  if (packed.starts == nullptr) {
    const int units = (seqlen + size - 1) / size;
    return {block / units, 0, seqlen, block % units};
  }
  const int units = static_cast<int>(packed.units(size)), unit = block % units;
  const int sequence = find_sequence(packed, unit, size);
  const Span span = span_of(packed, sequence);
  return {sequence * heads + block / units, span.first, span.length,
          unit - first_unit(span.first, sequence, size)};
}

__device__ __forceinline__ Head head_of_index(const Packed& packed, int heads, int seqlen,
                                              int index) {
  if (packed.starts == nullptr) return {index, 0, seqlen, 0};
  const Span span = span_of(packed, index / heads);
  return {index, span.first, span.length, 0};
}

}  // namespace torch_sage::mma
