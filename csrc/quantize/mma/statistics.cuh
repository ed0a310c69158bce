// What must be known of all tokens of a head before any of them gets a code: sum, smallest and
// largest number of every channel, of K, of V, or of both.
//
// Blocks take chunks of tokens, and every addition has its place in one fixed order.
#pragma once

#include <cstdint>

#include "quantize/cuda/extremes.cuh"
#include "quantize/cuda/words.cuh"
#include "quantize/mma/head.cuh"
#include "quantize/mma/launch.h"
#include "quantize/mma/prepared.h"

namespace torch_sage::mma {

constexpr int kStatisticsThreads = 256;

// K and V of a launch, as blockIdx.y counts those that take part.
enum Operand { kKey, kValue };
enum Statistic { kSum, kLow, kHigh, kStatistics };

inline bool has_statistics(const PrepareParams& p, Operand operand) {
  return operand == kValue ? p.kv.value_codes != nullptr
                           : p.kv.key_mean != nullptr || p.granularity == Granularity::kTensor;
}

// How the tokens of a sequence are divided: into chunks so long that reading them is most of the
// work. They do not depend on the number of heads, nor on other sequences, nor do the bits of a
// mean, then.
constexpr int kLeastRows = 256, kMostChunks = 64;
struct Chunks {
  int rows, count;
  // A sum is of numbers times `shrink`, a power of two, so that it cannot overflow.
  float shrink, mean_of_sum;
};

constexpr Chunks chunks_of(int seqlen) {
  const int shared = seqlen / kMostChunks + (seqlen % kMostChunks != 0);
  const int rows = shared > kLeastRows ? shared : kLeastRows;
  int64_t power = 1;
  while (power < seqlen) power *= 2;
  return {rows, seqlen / rows + (seqlen % rows != 0), 1.f / static_cast<float>(power),
          static_cast<float>(power) / static_cast<float>(seqlen)};
}

constexpr int kDirectChunks = 4;  // so few are read as they are: a launch costs more

// Where what is known of the tokens lies.
struct Plan {
  float* statistics;  // [operand, heads in rows, per_row, kStatistics, width]
  int64_t rows_of_heads;
  int per_row;
  Chunks of_batch;  // of every sequence, where none are packed

  __device__ __forceinline__ Chunks chunks(const PrepareParams& p, const Head& head) const {
    return p.kv.packed.starts != nullptr ? chunks_of(head.seqlen) : of_batch;
  }
  __device__ __forceinline__ float* at(const PrepareParams& p, int operand, const Head& head,
                                       int chunk) const {
    const int64_t row = operand * rows_of_heads + head.row(p.kv.packed, p.heads);
    const int first = head.first(p.kv.packed, p.heads, kLeastRows);
    return statistics + (row * per_row + first + chunk) * kStatistics * p.kv.width;
  }
};

inline Plan make_plan(const PrepareParams& p) {
  const Packed& packed = p.kv.packed;
  const bool is_packed = packed.starts != nullptr;
  const Chunks of_batch = chunks_of(p.kv.seqlen);
  return {p.partials, static_cast<int64_t>(is_packed ? 1 : p.batch) * p.heads,
          is_packed ? static_cast<int>(packed.units(kLeastRows)) : of_batch.count, of_batch};
}

// The tokens of one head.
template <bool kIsWide>
struct Tokens {
  const char* rows;
  int64_t row_bytes;
  int columns;
  Dtype dtype;

  __device__ Tokens(const PrepareParams& p, int operand, const Head& head)
      : columns(operand == kKey ? p.head_dim : p.head_dim_v), dtype(p.dtype) {
    constexpr int kBytes = kIsWide ? 4 : 2;
    const Rows& strides = operand == kKey ? p.key_rows : p.value_rows;
    const void* data = operand == kKey ? p.key : p.value;
    rows = static_cast<const char*>(data) + head.offset(strides, p.heads) * kBytes;
    row_bytes = strides.stride_n * kBytes;
  }

  __device__ __forceinline__ void load(Eight<kIsWide>& x, int row, int column,
                                       bool is_inside) const {
    constexpr int kBytes = kIsWide ? 4 : 2;
    x.load(rows + row * row_bytes + column * kBytes, is_inside && column < columns);
  }
};

__device__ __forceinline__ float fold(int statistic, float a, float b) {
  return statistic == kSum ? a + b : statistic == kLow ? smaller_of(a, b) : larger_of(a, b);
}
__device__ __forceinline__ float nothing_yet(int statistic) {
  return statistic == kSum ? 0.f : statistic == kLow ? INFINITY : -INFINITY;
}

// Adds to a sum and keeps what its rounding lost.
__device__ __forceinline__ void add(float x, float& sum, float& lost) {
  const float next = sum + x, added = next - sum;
  lost += (sum - (next - added)) + (x - added);
  sum = next;
}

template <int kWidth, bool kIsWide>
__global__ void __launch_bounds__(kStatisticsThreads, 2)
    statistics_kernel(const __grid_constant__ PrepareParams p, const __grid_constant__ Plan plan,
                      int first_operand) {
  constexpr int kLanes = kWidth / 8;
  constexpr int kRowsAtOnce = kStatisticsThreads / kLanes;
  constexpr int kLoads = kIsWide ? 4 : 8;
  __shared__ float shared[kRowsAtOnce][kStatistics][kWidth];

  const int operand = first_operand + blockIdx.y;
  // Where a sequence is so long that its chunks are longer, they are the first of its units.
  const Head head = p.kv.packed.starts != nullptr
                        ? head_of_block(p.kv.packed, p.heads, p.kv.seqlen, kLeastRows, blockIdx.x)
                        : Head{static_cast<int>(blockIdx.x) / plan.per_row, 0, p.kv.seqlen,
                               static_cast<int>(blockIdx.x) % plan.per_row};
  const Chunks chunks = plan.chunks(p, head);
  const int chunk = head.unit;
  if (chunk < 0 || chunk >= chunks.count) return;
  const Tokens<kIsWide> tokens(p, operand, head);
  const int column = threadIdx.x % kLanes * 8, lane_row = threadIdx.x / kLanes;
  const int first = chunk * chunks.rows;
  const int end = min(first + chunks.rows, head.seqlen);

  float sum[8] = {}, lost[8] = {}, low[8], high[8];
#pragma unroll
  for (int c = 0; c < 8; c++) {
    low[c] = nothing_yet(kLow);
    high[c] = nothing_yet(kHigh);
  }
  for (int row = first + lane_row; row < end; row += kLoads * kRowsAtOnce) {
    Eight<kIsWide> x[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; i++)
      tokens.load(x[i], row + i * kRowsAtOnce, column, row + i * kRowsAtOnce < end);
    float part[8] = {};
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      if (row + i * kRowsAtOnce >= end) continue;
#pragma unroll
      for (int c = 0; c < 8; c++) {
        const float2 pair = x[i].pair(c / 2, p.dtype);
        const float number = c % 2 ? pair.y : pair.x;
        part[c] = __fmaf_rn(number, chunks.shrink, part[c]);
        low[c] = smaller_of(low[c], number);
        high[c] = larger_of(high[c], number);
      }
    }
#pragma unroll
    for (int c = 0; c < 8; c++) add(part[c], sum[c], lost[c]);
  }
#pragma unroll
  for (int c = 0; c < 8; c++) {
    shared[lane_row][kSum][column + c] = sum[c] + lost[c];
    shared[lane_row][kLow][column + c] = low[c];
    shared[lane_row][kHigh][column + c] = high[c];
  }
  __syncthreads();
  float* to = plan.at(p, operand, head, chunk);
  for (int i = threadIdx.x; i < kStatistics * kWidth; i += kStatisticsThreads) {
    const int statistic = i / kWidth;
    float x = nothing_yet(statistic);
#pragma unroll
    for (int row = 0; row < kRowsAtOnce; row++)
      x = fold(statistic, x, shared[row][statistic][i % kWidth]);
    to[i] = x;
  }
}

// Folds all chunks into the first: a block of quantize_kernel should not have to read so many.
constexpr int kFoldColumns = 32;
static __global__ void __launch_bounds__(kStatisticsThreads)
    fold_chunks_kernel(const __grid_constant__ PrepareParams p, const __grid_constant__ Plan plan,
                       int first_operand) {
  constexpr int kWarps = kStatisticsThreads / kFoldColumns;
  __shared__ float shared[kWarps][kFoldColumns];
  const int width = p.kv.width, parts = kStatistics * width / kFoldColumns;
  const int lane = threadIdx.x % kFoldColumns, warp = threadIdx.x / kFoldColumns;
  const int i = blockIdx.x % parts * kFoldColumns + lane, statistic = i / width;
  const Head head = head_of_index(p.kv.packed, p.heads, p.kv.seqlen, blockIdx.x / parts);
  const int chunks = plan.chunks(p, head).count;
  if (chunks <= kDirectChunks) return;
  float* at = plan.at(p, first_operand + blockIdx.y, head, 0) + i;
  float x = nothing_yet(statistic);
#pragma unroll 8
  for (int chunk = warp; chunk < chunks; chunk += kWarps)
    x = fold(statistic, x, at[static_cast<int64_t>(chunk) * kStatistics * width]);
  shared[warp][lane] = x;
  __syncthreads();
  if (warp > 0) return;
#pragma unroll
  for (int other = 1; other < kWarps; other++) x = fold(statistic, x, shared[other][lane]);
  *at = x;
}

// Of one channel, over all tokens of a head.
struct Channel {
  float mean = 0;  // to be subtracted
  float amax = 0;  // of what is left; NaN or infinite where that is not finite
};

__device__ __forceinline__ Channel read_channel(const PrepareParams& p, const Plan& plan,
                                                int operand, const Head& head, int column,
                                                bool is_smooth) {
  const float* at = plan.at(p, operand, head, 0) + column;
  const Chunks chunks = plan.chunks(p, head);
  const int width = p.kv.width, known = chunks.count <= kDirectChunks ? chunks.count : 1;
  float sum = 0, low = nothing_yet(kLow), high = nothing_yet(kHigh);
#pragma unroll
  for (int chunk = 0; chunk < kDirectChunks; chunk++, at += kStatistics * width) {
    if (chunk >= known) continue;
    sum += at[kSum * width];
    low = smaller_of(low, at[kLow * width]);
    high = larger_of(high, at[kHigh * width]);
  }
  Channel channel;
  if (is_smooth) channel.mean = sum * chunks.mean_of_sum;
  // Subtraction rounds monotonically: the extremes of x - mean are those of x.
  channel.amax = larger_of(fabsf(low - channel.mean), fabsf(high - channel.mean));
  return channel;
}

// Takes the statistics that are needed.
template <int kWidth, bool kIsWide>
void launch_statistics(const PrepareParams& p, const Plan& plan, cudaStream_t stream) {
  const bool of_key = has_statistics(p, kKey), of_value = has_statistics(p, kValue);
  if (!of_key && !of_value) return;
  const int first_operand = of_key ? kKey : kValue;
  const unsigned operands = of_key && of_value ? 2 : 1;
  const auto blocks = static_cast<unsigned>(plan.rows_of_heads * plan.per_row);
  launch_kernel(statistics_kernel<kWidth, kIsWide>, dim3(blocks, operands), kStatisticsThreads,
                stream, "the launch of statistics", p, plan, first_operand);
  const Packed& packed = p.kv.packed;
  const bool is_packed = packed.starts != nullptr;
  const int longest = is_packed ? packed.longest : p.kv.seqlen;
  if (chunks_of(longest).count <= kDirectChunks) return;
  const unsigned heads = static_cast<unsigned>(is_packed ? packed.count : p.batch) * p.heads;
  launch_kernel(fold_chunks_kernel, dim3(heads * (kStatistics * kWidth / kFoldColumns), operands),
                kStatisticsThreads, stream, "the launch of fold_chunks", p, plan, first_operand);
}

}  // namespace torch_sage::mma
