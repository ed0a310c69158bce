// What a block works for: 128 query rows of one head of one sequence, which is a batch entry or one
// of many that are packed.
#pragma once

#include "attention/mma/config.cuh"
#include "common/packed.cuh"

namespace torch_sage::mma {

struct Sequence {
  int index;      // in the batch
  int head;       // of the query
  int first_row;  // of the block, in the sequence
  int seqlen_q, seqlen_k, last_key_offset;
  int query_start, key_start;  // rows of the tensors before the sequence
  int first_hidden_key;        // the keys before it every row of the block sees
  const char* key_rows;        // of K itself, where the kernel reads it

  __device__ __forceinline__ void set_first_hidden_key() {
    first_hidden_key = min(seqlen_k, first_row + last_key_offset + 1);
  }
  // The number of keys that some row sees begins with these tiles.
  __device__ __forceinline__ int tiles() const {
    const int last_row = min(first_row + kRows, seqlen_q) - 1;
    const int last_key = min(seqlen_k - 1, last_row + last_key_offset);
    return last_key < 0 ? 0 : last_key / kKeys + 1;
  }
  // Of K's tiles, among those of all sequences of a head.
  __device__ __forceinline__ int first_tile(bool is_packed) const {
    return is_packed ? first_unit(key_start, index, kKeys) : 0;
  }
};

static_assert(sizeof(Sequence) <= kSequenceBytes);

__device__ __forceinline__ Sequence sequence_of_batch(const AttentionParams& p) {
  Sequence s{};
  const int blocks = (p.seqlen_q + kRows - 1) / kRows;
  const int head = blockIdx.x / blocks, block = blockIdx.x % blocks;
  s.index = head / p.heads_q;
  s.head = head % p.heads_q;
  // The longest first.
  s.first_row = (p.last_key_offset < p.kv.seqlen ? blocks - 1 - block : block) * kRows;
  s.seqlen_q = p.seqlen_q;
  s.seqlen_k = p.kv.seqlen;
  s.last_key_offset = p.last_key_offset;
  s.set_first_hidden_key();
  return s;
}

// A block beyond the sequence that it would belong to has a first_row outside it.
__device__ __forceinline__ Sequence packed_sequence(const AttentionParams& p) {
  Sequence s{};
  const int units = static_cast<int>(p.queries.units(kRows));
  // The last first: where attention is causal, those of a sequence are the longest.
  const int unit = units - 1 - static_cast<int>(blockIdx.x) % units;
  s.head = blockIdx.x / units;
  s.index = find_sequence(p.queries, unit, kRows);
  const Span queries = span_of(p.queries, s.index), keys = span_of(p.kv.packed, s.index);
  s.first_row = (unit - first_unit(queries.first, s.index, kRows)) * kRows;
  s.seqlen_q = queries.length;
  s.seqlen_k = keys.length;
  s.last_key_offset = last_key_offset(p.causal, queries.length, keys.length);
  s.query_start = queries.first;
  s.key_start = keys.first;
  s.set_first_hidden_key();
  return s;
}

}  // namespace torch_sage::mma
