// Which rows a block attends to, one piece of work after another.
#pragma once

#include "attention/sm90/config.cuh"

namespace torch_sage::sm90 {

// Keys and values of this size stay in L2 while all their query rows are worked on.
constexpr int64_t kSectionBytes = 24 << 20;

struct Schedule {
  int row_blocks, heads, total;
  int section;  // heads at a time whose row blocks are handed out longest first; 0: by heads
};

// As one thread finds it and all others read it from shared memory; divisions are slow.
struct alignas(16) Work {
  int row_block, batch, head;
  int steps;  // of C::kKeys keys, the last one first; 0: there is no more work
};

// Last key visible to a row; below 0 if none is.
__device__ __forceinline__ int last_key(const AttentionParams& p, int row) {
  return min(p.kv.seqlen - 1, row + p.last_key_offset);
}
// Steps needed by rows up to `row`; at least one, in which everything may be hidden.
template <class C>
__device__ __forceinline__ int steps_until(const AttentionParams& p, int row) {
  const int last = last_key(p, row);
  return last < C::kKeys ? 1 : last / C::kKeys + 1;
}

template <class C>
__device__ __forceinline__ Work find_work(const AttentionParams& p, const Schedule& s, int index) {
  if (index >= s.total) return {0, 0, 0, 0};
  int block, head;
  if (s.section > 0) {
    const int per_section = s.section * s.row_blocks, section = index / per_section;
    const int rest = index - section * per_section;
    const int heads = min(s.section, s.heads - section * s.section);
    block = s.row_blocks - 1 - rest / heads;
    head = section * s.section + rest % heads;
  } else {
    head = index / s.row_blocks;
    block = index - head * s.row_blocks;
  }
  const int last_row = min((block + 1) * C::kRows, p.seqlen_q) - 1;
  const int batch = head / p.heads_q;
  return {block, batch, head - batch * p.heads_q, steps_until<C>(p, last_row)};
}

__device__ __forceinline__ int64_t key_head(const AttentionParams& p, const Work& work) {
  return static_cast<int64_t>(work.batch) * p.heads_kv + work.head / (p.heads_q / p.heads_kv);
}

}  // namespace torch_sage::sm90
