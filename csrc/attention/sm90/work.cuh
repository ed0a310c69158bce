// Which rows a block attends to, one piece of work after another.
#pragma once

#include "attention/sm90/config.cuh"
#include "attention/sm90/ptx.cuh"
#include "common/packed.cuh"

namespace torch_sage::sm90 {

// Keys and values of this size stay in L2 while all their query rows are worked on.
constexpr int64_t kSectionBytes = 24 << 20;

struct Schedule {
  // Of packed sequences the row blocks are units of all of them (common/packed.h).
  int row_blocks, heads, total;
  int section;  // heads at a time whose row blocks are handed out longest first; 0: by heads
};

// As one warp finds it and all threads read it from shared memory; divisions are slow. The sequence
// is a batch entry, or one of those that are packed, all of which are batch entry 0.
struct alignas(16) Work {
  // What the next piece begins with, in one load.
  int steps;  // up to its last, of C::kKeys keys each; 0: there is no more work
  int first_row, keys, last_key_offset;  // in the sequence
  // What it ends with, in another.
  int batch, head;
  int query_start;  // rows of the tensors before the sequence
  int rows;         // of the sequence
  int sequence;
  int first_block, first_group;  // of its keys, among those of a head
  int part;                      // of the keys, where they are split
  int first_scale;               // of its keys, among all
};
static_assert(sizeof(Work) == kWorkBytes);

// Last key visible to a row; below 0 if none is.
__device__ __forceinline__ int last_key(const Work& work, int row) {
  return min(work.keys - 1, row + work.last_key_offset);
}
// Steps needed by rows up to `row`; at least one, in which everything may be hidden.
template <class C>
__device__ __forceinline__ int steps_until(const Work& work, int row) {
  const int last = last_key(work, row);
  return last < C::kKeys ? 1 : last / C::kKeys + 1;
}

// Of the steps of a piece of work, the one that is taken last.
template <class C>
__device__ __forceinline__ int first_step(const AttentionParams& p, int part) {
  return C::kIsSplit ? part * p.parts.key_blocks * (kKeyBlock128 / C::kKeys) : 0;
}

// A unit beyond the sequence that it would belong to has a first_row outside it.
__device__ __forceinline__ void find_packed(const AttentionParams& p, int unit, int rows,
                                            Work& work) {
  work.sequence = find_sequence(p.queries, unit, rows);
  const Span queries = span_of(p.queries, work.sequence);
  const Span keys = span_of(p.kv.packed, work.sequence);
  work.first_row = (unit - first_unit(queries.first, work.sequence, rows)) * rows;
  work.rows = queries.length;
  work.keys = keys.length;
  work.last_key_offset = last_key_offset(p.causal, queries.length, keys.length);
  work.query_start = queries.first;
  work.first_block = first_unit(keys.first, work.sequence, kKeyBlock128);
  work.first_group = first_unit(keys.first, work.sequence, kValueGroup);
}

__device__ __forceinline__ int64_t key_head(const AttentionParams& p, int sequence, int head) {
  return static_cast<int64_t>(sequence) * p.heads_kv + head / (p.heads_q / p.heads_kv);
}

// Without steps if there is none, or nothing to do. Called by whole warps.
template <class C>
__device__ __forceinline__ Work find_work(const AttentionParams& p, const Schedule& s, int index) {
  Work work{};
  if (index >= s.total) return work;
  int block, head;
  if constexpr (C::kIsSplit) {  // row blocks of the same keys side by side
    const int part = index / s.row_blocks;
    block = index - part * s.row_blocks;
    head = part / p.parts.count;
    work.part = part - head * p.parts.count;
  } else if (s.section > 0) {
    const int per_section = s.section * s.row_blocks, section = index / per_section;
    const int rest = index - section * per_section;
    const int heads = min(s.section, s.heads - section * s.section);
    block = s.row_blocks - 1 - rest / heads;
    head = section * s.section + rest % heads;
  } else {
    head = index / s.row_blocks;
    block = index - head * s.row_blocks;
  }
  work.batch = head / p.heads_q;
  work.head = head - work.batch * p.heads_q;
  if (p.queries.starts == nullptr) {
    work.sequence = work.batch;
    work.first_row = block * C::kRows;
    work.rows = p.seqlen_q;
    work.keys = p.kv.seqlen;
    work.last_key_offset = p.last_key_offset;
  } else {
    find_packed(p, block, C::kRows, work);
    // Rows without keys have their result already.
    if (work.first_row < 0 || work.first_row >= work.rows || work.keys == 0) return work;
  }
  work.first_scale = static_cast<int>(
      (key_head(p, work.batch, work.head) * p.kv.tiles / 2 + work.first_block) * 4);
  work.steps = steps_until<C>(work, min(work.first_row + C::kRows, work.rows) - 1);
  if constexpr (C::kIsSplit) work.steps = min(work.steps, first_step<C>(p, work.part + 1));
  return work;
}

// The next piece of work for a block that has had `count`. Called by one warp.
template <class C>
__device__ __forceinline__ Work next_work(const AttentionParams& p, const Schedule& s, int count) {
  int index = blockIdx.x + count * gridDim.x;
  for (bool is_first = count == 0;; is_first = false) {
    if (!is_first && p.work_counter != nullptr) {
      // Which prepare_kv has zeroed.
      if (count == 0 && p.follows_prepare) wait_for_previous_kernel();
      if (threadIdx.x % 32 == 0) index = gridDim.x + atomicAdd(p.work_counter, 1);
      index = __shfl_sync(~0u, index, 0);
    }
    const Work work = find_work<C>(p, s, index);
    if (work.steps > 0 || index >= s.total) return work;
  }
}

}  // namespace torch_sage::sm90
