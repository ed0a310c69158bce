// The warpgroup that feeds the others: one thread fetches K and V, three warps quantize Q.
#pragma once

#include "attention/sm90/config.cuh"
#include "attention/sm90/ptx.cuh"
#include "attention/sm90/work.cuh"
#include "quantize/cuda/rules.cuh"
#include "quantize/cuda/words.cuh"

namespace torch_sage::sm90 {

// K and V of every piece of work, last keys first, through C::kStages buffers.
template <class C>
__device__ __forceinline__ void fetch_keys_and_values(const AttentionParams& p, uint32_t base,
                                                      Barriers<C> barriers, const Work* works) {
  constexpr int kScaleBytes = C::kWidth * 4, kStages = C::kStages;
  if (p.follows_prepare) wait_for_previous_kernel();
  int count = 0, group_count = 0;
  for (int i = 0;; i++) {
    barrier_wait(barriers.work_ready(i & 1), (i >> 1) & 1);
    const Work work = works[i & 1];
    if (work.steps == 0) return;
    const int64_t head = key_head(p, work.batch, work.head);
    const int64_t tile = head * p.kv.tiles + 2 * work.first_block;
    const int64_t first_group = head * p.kv.groups + work.first_group;
    const int8_t* keys = p.kv.key_codes + tile * (kKeyTile * C::kWidth);
    const uint8_t* values = p.kv.value_codes + tile * (C::kTileBytes * C::kWidth);
    const float* value_scales = p.kv.value_scales + first_group * C::kWidth;
    const float* value_shift = p.kv.value_shift + first_group * C::kWidth;
    const int first = first_step<C>(p, work.part);
    for (int step = work.steps - 1; step >= first; step--, count++) {
      const int stage = count % kStages, phase = (count / kStages) & 1;
      barrier_wait(barriers.key_empty(stage), phase ^ 1);
      barrier_expect(barriers.key_full(stage), C::kKeyBytes);
      copy_to_shared(base + C::kKeyAt + stage * C::kKeyBytes,
                     keys + static_cast<int64_t>(step) * C::kKeyBytes, C::kKeyBytes,
                     barriers.key_full(stage));
      const bool starts_group =
          step == work.steps - 1 || step % C::kStepsPerGroup == C::kStepsPerGroup - 1;
      barrier_wait(barriers.value_empty(stage), phase ^ 1);
      barrier_expect(barriers.value_full(stage), C::kKeys / kKeyTile * C::kTileBytes * C::kWidth +
                                                     (starts_group ? 2 * kScaleBytes : 0));
      if (starts_group) {
        const int64_t group = step / C::kStepsPerGroup;
        const uint32_t slot =
            base + C::kValueScaleAt + group_count % C::kScaleSlots * 2 * kScaleBytes;
        copy_to_shared(slot, value_scales + group * C::kWidth, kScaleBytes,
                       barriers.value_full(stage));
        copy_to_shared(slot + kScaleBytes, value_shift + group * C::kWidth, kScaleBytes,
                       barriers.value_full(stage));
        group_count++;
      }
#pragma unroll
      for (int panel = 0; panel < C::kKeys / kKeyTile; panel++) {
        constexpr int kBytes = C::kTileBytes * C::kWidth;
        copy_to_shared(
            base + C::kValueAt + stage * C::kValueBytes + panel * C::kPanelBytes,
            values + (static_cast<int64_t>(step) * (C::kKeys / kKeyTile) + panel) * kBytes, kBytes,
            barriers.value_full(stage));
      }
    }
  }
}

// Adds the product of eight elements of a row with the mean of K, which the scores lack.
template <Dtype kDtype>
__device__ __forceinline__ float add_key_mean(const AttentionParams& p, const float* mean,
                                              const Eight<kDtype == Dtype::kFloat32>& x,
                                              int first_column, float sum) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = x.pair(i, kDtype);
    const int column = first_column + 2 * i;
    if (column < p.key_mean_columns) sum = fmaf(pair.x, mean[column], sum);
    if (column + 1 < p.key_mean_columns) sum = fmaf(pair.y, mean[column + 1], sum);
  }
  return sum;
}

// Largest magnitudes as integers, in which NaN is the largest: of 16 bits, one in either half.
template <Dtype kDtype>
__device__ __forceinline__ uint32_t larger_magnitudes(uint32_t a, uint32_t b) {
  return kDtype == Dtype::kFloat32 ? max(a, b) : __vmaxu2(a, b);
}
template <Dtype kDtype>
__device__ __forceinline__ uint32_t largest_magnitudes(const Eight<kDtype == Dtype::kFloat32>& x,
                                                       uint32_t so_far) {
  constexpr uint32_t kMagnitude = kDtype == Dtype::kFloat32 ? 0x7fffffffu : 0x7fff7fffu;
#pragma unroll
  for (const uint32_t word : x.words) so_far = larger_magnitudes<kDtype>(so_far, word & kMagnitude);
  return so_far;
}
template <Dtype kDtype>
__device__ __forceinline__ float magnitude(uint32_t largest) {
  if constexpr (kDtype == Dtype::kFloat32) return __uint_as_float(largest);
  const uint32_t larger = max(largest << 16, largest & 0xffff0000u);
  return kDtype == Dtype::kBFloat16 ? __uint_as_float(larger)
                                    : __half2float(__ushort_as_half(larger >> 16));
}

// The element of the query with which the rows of a piece of work begin.
__device__ __forceinline__ int64_t first_of_query(const AttentionParams& p, const Work& work) {
  return work.batch * p.query_rows.stride_b + work.head * p.query_rows.stride_h +
         (work.query_start + work.first_row) * p.query_rows.stride_n;
}

// Quantizes the query rows of one piece of work per row: codes to shared memory as wgmma's swizzle
// wants them, scales times |softmax scale| * log2(e); a negative softmax scale is in the codes.
template <class C, Dtype kDtype>
__device__ __forceinline__ void quantize_query_rows(const AttentionParams& p, const Work& work,
                                                    uint8_t* codes, float* scales, float* shifts,
                                                    int thread) {
  constexpr bool kIsWide = kDtype == Dtype::kFloat32;
  constexpr int kBytes = kIsWide ? 4 : 2;
  constexpr int kChunks = C::kIsWide ? 1 : 2;      // of 8 columns, per thread
  constexpr int kLanes = C::kWidth / 8 / kChunks;  // threads of a row
  static_assert(C::kRows % (32 / kLanes) == 0);
  constexpr int kStride = kQueryThreads / kLanes;
  const int part = thread % kLanes;
  const char* rows =
      static_cast<const char*>(p.query) + (first_of_query(p, work) + part * 8) * kBytes;
  const int64_t row_bytes = p.query_rows.stride_n * kBytes;
  const float* mean = p.kv.key_mean + key_head(p, work.sequence, work.head) * p.key_mean_columns;
  const int valid_rows = min(C::kRows, work.rows - work.first_row);
  const auto load = [&](Eight<kIsWide>& x, int row, int chunk) {
    x.load(rows + row * row_bytes + chunk * kLanes * 8 * kBytes,
           row < valid_rows && (chunk * kLanes + part) * 8 < p.head_dim);
  };
  // 16-bit rows are fetched one ahead; of fp32, for which there are not the registers, a row is
  // read each time that it is needed.
  Eight<kIsWide> x[kIsWide ? 1 : kChunks], next[kIsWide ? 1 : kChunks];
  const auto fetch_next = [&](int row) {
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
      if constexpr (!kIsWide) load(next[c], row, c);
    }
  };
  const auto chunk_of = [&](int row, int c) -> const Eight<kIsWide>& {
    if constexpr (kIsWide) {
      load(x[0], row, c);
      return x[0];
    } else {
      return x[c];
    }
  };
  // Of few rows none but those are quantized; warps leave the loop as one.
  constexpr int kRowsOfWarp = 32 / kLanes;
  const int end =
      C::kIsSplit ? (valid_rows + kRowsOfWarp - 1) / kRowsOfWarp * kRowsOfWarp : C::kRows;
  fetch_next(thread / kLanes);
#pragma unroll 1
  for (int row = thread / kLanes; row < end; row += kStride) {
    if constexpr (!kIsWide) {
#pragma unroll
      for (int c = 0; c < kChunks; c++) x[c] = next[c];
      fetch_next(row + kStride);
    }
    uint32_t largest = 0;
#pragma unroll
    for (int c = 0; c < kChunks; c++)
      largest = largest_magnitudes<kDtype>(chunk_of(row, c), largest);
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2)
      largest = larger_magnitudes<kDtype>(largest, __shfl_xor_sync(~0u, largest, step));
    const ScaleAndInverse scale = scale_and_inverse_127(magnitude<kDtype>(largest));
    const float factor = p.scale < 0 ? -scale.inverse : scale.inverse;
    if (part == 0) scales[row] = __fmul_rn(scale.scale, fabsf(p.scale) * kLog2E);
    float dot = 0;
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
      const Eight<kIsWide>& eight = chunk_of(row, c);
      if constexpr (C::kHasLse) {
        if (p.lse != nullptr)
          dot = add_key_mean<kDtype>(p, mean, eight, (c * kLanes + part) * 8, dot);
      }
      uint32_t packed[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float2 low = eight.pair(2 * i, kDtype), high = eight.pair(2 * i + 1, kDtype);
        packed[i] = pack_s8(__fmul_rn(low.x, factor), __fmul_rn(low.y, factor),
                            pack_s8(__fmul_rn(high.x, factor), __fmul_rn(high.y, factor), 0));
      }
      *reinterpret_cast<uint2*>(codes + image_place<C::kWidth>(row, (c * kLanes + part) * 8)) =
          make_uint2(packed[0], packed[1]);
    }
    if constexpr (C::kHasLse) {
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) dot += __shfl_xor_sync(~0u, dot, step);
      if (part == 0) shifts[row] = dot * p.scale;
    }
  }
  if constexpr (C::kIsSplit) {
    constexpr int kEights = C::kWidth / 8;
    for (int i = end * kEights + thread; i < C::kRows * kEights; i += kQueryThreads) {
      const int row = i / kEights, column = i % kEights * 8;
      *reinterpret_cast<uint2*>(codes + image_place<C::kWidth>(row, column)) = make_uint2(0, 0);
      if (column == 0) scales[row] = shifts[row] = 0.f;
    }
  }
}

// Copies codes and scales of one piece of work that prepare_kv made, padded to whole blocks of
// kQueryBlock rows; they arrive at the barrier.
template <class C>
__device__ __forceinline__ void fetch_queries(const AttentionParams& p, const Work& work,
                                              uint32_t codes, uint32_t scales, uint32_t barrier) {
  const int rows = min(C::kRows, static_cast<int>(p.prepared_query.rows) - work.first_row);
  const int64_t head = static_cast<int64_t>(work.batch) * p.heads_q + work.head;
  const int64_t row = head * p.prepared_query.rows + work.first_row;
  barrier_expect(barrier, rows * (C::kWidth + 4));
  copy_to_shared(codes, p.prepared_query.codes + row * C::kWidth, rows * C::kWidth, barrier);
  copy_to_shared(scales, p.prepared_query.scales + row, rows * 4, barrier);
}

// Asks for the query rows of a piece of work to be brought to L2. Called by one warp.
template <class C>
__device__ __forceinline__ void prefetch_query_rows(const AttentionParams& p, const Work& work) {
  constexpr int kLineBytes = 128;
  const int element = p.dtype == Dtype::kFloat32 ? 4 : 2;
  const char* rows = static_cast<const char*>(p.query) + first_of_query(p, work) * element;
  const int64_t row_bytes = p.query_rows.stride_n * element;
  const int valid_rows = min(C::kRows, work.rows - work.first_row);
  for (int row = threadIdx.x % 32; row < valid_rows; row += 32)
    for (int at = 0; at < p.head_dim * element; at += kLineBytes)
      prefetch_to_l2(rows + row * row_bytes + at);
}

template <class C>
__device__ __forceinline__ void quantize_queries(const AttentionParams& p, const Schedule& s,
                                                 uint8_t* shared, Barriers<C> barriers, Work* works,
                                                 int thread) {
  for (int i = 0;; i++) {
    const int slot = i & 1;
    // Found, and its rows asked for, while the slot is still in use.
    if (thread < 32) {
      const Work found = next_work<C>(p, s, i);
      if (found.steps > 0 && p.prepared_query.codes == nullptr) prefetch_query_rows<C>(p, found);
      if (thread == 0) works[2] = found;
    }
    barrier_wait(barriers.query_empty(slot), ((i >> 1) & 1) ^ 1);
    if (thread == 0) {
      works[slot] = works[2];
      barrier_arrive(barriers.work_ready(slot));
    }
    named_barrier<7, kQueryThreads>();
    const Work work = works[slot];
    if (work.steps == 0) {
      barrier_arrive(barriers.query_full(slot));
      return;
    }
    if (p.prepared_query.codes != nullptr) {
      if (i == 0) wait_for_previous_kernel();
      if (thread == 0) {
        fetch_queries<C>(p, work,
                         shared_address(shared + C::kQueryAt + slot * C::kRows * C::kWidth),
                         shared_address(shared + C::kQueryScaleAt + slot * C::kRows * 4),
                         barriers.query_full(slot));
      } else {
        barrier_arrive(barriers.query_full(slot));
      }
      continue;
    }
    if constexpr (C::kHasLse) {  // reads the mean of K
      if (i == 0 && p.follows_prepare) wait_for_previous_kernel();
    }
    uint8_t* codes = shared + C::kQueryAt + slot * C::kRows * C::kWidth;
    float* scales = reinterpret_cast<float*>(shared + C::kQueryScaleAt) + slot * C::kRows;
    float* shifts = reinterpret_cast<float*>(shared + C::kQueryShiftAt) + slot * C::kRows;
    switch (p.dtype) {
      case Dtype::kFloat32:
        quantize_query_rows<C, Dtype::kFloat32>(p, work, codes, scales, shifts, thread);
        break;
      case Dtype::kBFloat16:
        quantize_query_rows<C, Dtype::kBFloat16>(p, work, codes, scales, shifts, thread);
        break;
      case Dtype::kFloat16:
        quantize_query_rows<C, Dtype::kFloat16>(p, work, codes, scales, shifts, thread);
        break;
    }
    // The next piece of work is counted by what prepare_kv has zeroed.
    if (i == 0 && p.follows_prepare) wait_for_previous_kernel();
    fence_async_proxy();
    barrier_arrive(barriers.query_full(slot));
  }
}

}  // namespace torch_sage::sm90
