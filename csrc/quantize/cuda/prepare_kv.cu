// K and V in the layout of Hopper's attention kernel, each read once, in one launch.
//
// A cluster of blocks takes a value group: 1024 tokens of one head. V needs its mean and its
// extremes over the group before any code is known, so the blocks exchange those through shared
// memory; the tokens themselves stay in registers. The mean of K is that of 32 sampled tokens:
// softmax does not change whatever vector is subtracted from all keys of a head.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <type_traits>
#include <utility>

#include "attention/sm90/ptx.cuh"
#include "common/packed.cuh"
#include "cuda/error.h"
#include "quantize/cuda/extremes.cuh"
#include "quantize/cuda/prepared.h"
#include "quantize/cuda/rotary.cuh"
#include "quantize/cuda/rules.cuh"
#include "quantize/cuda/unattended.cuh"
#include "quantize/cuda/words.cuh"

namespace torch_sage {
namespace {

namespace cg = cooperative_groups;

template <int kWidth>
constexpr int kThreads = kWidth > 128 ? 512 : 256;
constexpr int kSamples = 32;

// Eight adjacent elements, as the words they came in.
template <typename Element>
struct Vector8 {
  static constexpr int kWords = 2 * sizeof(Element);
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const Element* from, bool is_inside) {
    load_words(words, from, is_inside);
  }
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(Element) == 4) {
      return __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
      return __uint_as_float(i & 1 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    } else {
      const __half2 pair = *reinterpret_cast<const __half2*>(&words[i / 2]);
      return i & 1 ? __high2float(pair) : __low2float(pair);
    }
  }
};

__device__ __forceinline__ uint2 codes_of(const float (&x)[8]) {
  return make_uint2(pack_s8(x[0], x[1], pack_s8(x[2], x[3], 0)),
                    pack_s8(x[4], x[5], pack_s8(x[6], x[7], 0)));
}

// Entries of the tables for 8 adjacent channels of a row.
struct Angles {
  float4 cos[2], sin[2];
};
__device__ __forceinline__ Angles angles_of(const Rotary& r, int batch, int token, int column) {
  return {{entries(r.cos, batch, token, column), entries(r.cos, batch, token, column + 4)},
          {entries(r.sin, batch, token, column), entries(r.sin, batch, token, column + 4)}};
}

// What comes of 8 adjacent channels of a row that is normed and rotated, the others of which are in
// adjacent lanes.
template <Pairing kPairing, int kWidth, typename Element>
__device__ __forceinline__ void rotate(Vector8<Element>& x, const Rotary& r, const Angles& angles,
                                       int batch, int head, int token, int column) {
  constexpr int kLanes = kWidth / 8;
  constexpr Dtype kDtype =
      std::is_same_v<Element, __nv_bfloat16> ? Dtype::kBFloat16 : Dtype::kFloat16;
  uint2 weight[2];
#pragma unroll
  for (int i = 0; i < 2; i++) weight[i] = weights<kDtype>(r, head, column + 4 * i);
  const float given = given_factor(r, batch, head, token);
  float squares = 0;
#pragma unroll
  for (int c = 0; c < 8; c++) squares = fmaf(x[c], x[c], squares);
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) squares += __shfl_xor_sync(~0u, squares, step);
  const float factor = row_factor<kWidth>(r, squares, given);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float4 c = angles.cos[i / 2], s = angles.sin[i / 2];
    const uint2 w = weight[i / 2];
    const float2 z = normed<kDtype>(x.words[i], factor, i % 2 ? w.y : w.x);
    float2 partner = z;
    if constexpr (kPairing == Pairing::kHalves)
      partner =
          make_float2(__shfl_xor_sync(~0u, z.x, kLanes / 2), __shfl_xor_sync(~0u, z.y, kLanes / 2));
    x.words[i] = packed<kDtype>(turned<kPairing>(
        z, partner, i % 2 ? make_float2(c.z, c.w) : make_float2(c.x, c.y),
        i % 2 ? make_float2(s.z, s.w) : make_float2(s.x, s.y), column >= kWidth / 2));
  }
}

// Heads whose rows a block of prepare_query has, to read the tables for them once, and those rows.
constexpr int kQueryHeads = 4, kQueryRows = 64;
static_assert(kQueryBlock % kQueryRows == 0);

__host__ __device__ int query_blocks(const PrepareParams& p) {
  return p.batch * ((p.query.heads + kQueryHeads - 1) / kQueryHeads) *
         static_cast<int>(p.query.prepared.rows / kQueryRows);
}

// Codes and scales of some rows of a query, which are normed and rotated first.
template <Pairing kPairing, int kWidth, typename Element>
__device__ __forceinline__ void prepare_query(const PrepareParams& p, int index) {
  constexpr int kLanes = kWidth / 8, kRowsAtOnce = kThreads<kWidth> / kLanes;
  const QueryParams& q = p.query;
  if (index >= query_blocks(p)) return;
  // Blocks that run together share rows, and so the tables in the cache.
  const int groups = (q.heads + kQueryHeads - 1) / kQueryHeads;
  const int first_head = index % groups * kQueryHeads, batch = index / groups % p.batch;
  const int first = index / groups / p.batch * kQueryRows;
  const int column = threadIdx.x % kLanes * 8;
  const Element* rows = static_cast<const Element*>(q.query) + batch * q.rows.stride_b + column;
#pragma unroll 1
  for (int i = 0; i < kQueryRows / kRowsAtOnce; i++) {
    const int row = first + i * kRowsAtOnce + threadIdx.x / kLanes;
    const int token = min(row, q.seqlen - 1);
    Vector8<Element> x[kQueryHeads];
#pragma unroll
    for (int h = 0; h < kQueryHeads; h++) {
      const int head = min(first_head + h, q.heads - 1);
      x[h].load(rows + head * q.rows.stride_h + token * q.rows.stride_n, true);
    }
    const Angles angles = angles_of(q.rotary, batch, token, column);
#pragma unroll
    for (int h = 0; h < kQueryHeads; h++) {
      const int head = first_head + h;
      if (head >= q.heads) break;
      rotate<kPairing, kWidth>(x[h], q.rotary, angles, batch, head, token, column);
      uint32_t largest = 0;  // as integers, NaN is the largest
#pragma unroll
      for (int c = 0; c < 8; c++) largest = max(largest, __float_as_uint(fabsf(x[h][c])));
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2)
        largest = max(largest, __shfl_xor_sync(~0u, largest, step));
      const bool is_inside = row < q.seqlen;
      const ScaleAndInverse scale =
          scale_and_inverse_127(is_inside ? __uint_as_float(largest) : 0.f);
      const float inverse = !is_inside ? 0.f : q.scale < 0 ? -scale.inverse : scale.inverse;
      float scaled[8];
#pragma unroll
      for (int c = 0; c < 8; c++) scaled[c] = __fmul_rn(x[h][c], inverse);
      const int64_t at = (static_cast<int64_t>(batch) * q.heads + head) * q.prepared.rows + row;
      if (column == 0) q.prepared.scales[at] = __fmul_rn(scale.scale, fabsf(q.scale) * kLog2E);
      *reinterpret_cast<uint2*>(q.prepared.codes + (at - row) * kWidth +
                                sm90::image_place<kWidth>(row, column)) = codes_of(scaled);
    }
  }
}

// E4M3 codes of two numbers, and the values of those codes.
__device__ __forceinline__ uint32_t e4m3_pair(float low, float high, __half2& values) {
  uint16_t codes;
  uint32_t halves;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  values = *reinterpret_cast<const __half2*>(&halves);
  return codes;
}

// Two numbers as bf16, rounded to nearest even; what is finite stays finite.
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Folds 8 numbers of each of 16 lanes over the lanes; a lane gets number `lane % 8`.
template <typename Fold>
__device__ __forceinline__ float fold_16_lanes(float (&x)[8], int lane, Fold fold) {
#pragma unroll
  for (int width = 4; width >= 1; width >>= 1) {
    const bool upper = lane & width;
#pragma unroll
    for (int i = 0; i < width; i++) {
      const float give = upper ? x[i] : x[i + width], keep = upper ? x[i + width] : x[i];
      x[i] = fold(keep, __shfl_xor_sync(~0u, give, width));
    }
  }
  return fold(x[0], __shfl_xor_sync(~0u, x[0], 8));
}

// Tokens of a block: so many that a thread has the same number of elements at any width.
template <int kWidth>
constexpr int kTokens = kThreads<kWidth> * 64 / kWidth;
template <int kWidth>
constexpr int kBlocks = kValueGroup / kTokens<kWidth>;

// Warps that share the tokens of a block in a channel of V, and those of a group.
template <int kWidth>
constexpr int kShares = kThreads<kWidth> / 32 / (kWidth / 16);
template <int kWidth>
constexpr int kAllShares = kBlocks<kWidth> * kShares<kWidth>;

template <int kWidth>
struct Shared {
  union {
    float samples[kThreads<kWidth> / (kWidth / 8)][kWidth];  // of K: partial sums
    float error[kAllShares<kWidth>][kWidth];                 // of V, later
  };
  float key_mean[kWidth];
  uint32_t key_amax[kTokens<kWidth> / kKeyBlock128][4];
  // What every block of the cluster has written, here: nobody reads another's memory, so that a
  // block may leave as soon as it has written.
  float sum[kAllShares<kWidth>][kWidth], low[kAllShares<kWidth>][kWidth];
  float high[kAllShares<kWidth>][kWidth];
  float center[kWidth];
  float scale[kWidth], inverse[kWidth];
};

// 1024 keys of a head in their sequence, which is a batch entry or one of those that are packed,
// and which blocks of a cluster have them.
struct Group {
  int batch, head;
  int64_t mean;  // row of key_mean
  int seqlen, number;
  int count;                        // keys of the group
  int first_row;                    // of the tensors: where the sequence starts
  int64_t first_tile, first_group;  // of the sequence
  int first_rank, blocks;
  int rank;  // of this block among those; blocks, if it is none of them
};

// Of a batch: a cluster has a group.
template <int kBlocks>
__device__ __forceinline__ Group group_of_batch(const PrepareParams& p, int cluster, int rank) {
  // Of all heads the same tokens first, which share the tables and may lie side by side.
  const int heads = p.batch * p.heads, head = cluster % heads;
  Group group{};
  group.batch = head / p.heads;
  group.head = head % p.heads;
  group.mean = head;
  group.seqlen = p.kv.seqlen;
  group.number = cluster / heads;
  group.count = min(kValueGroup, group.seqlen - group.number * kValueGroup);
  group.first_tile = head * p.kv.tiles;
  group.first_group = head * p.kv.groups;
  group.blocks = kBlocks;
  group.rank = rank;
  return group;
}

// Of packed sequences: clusters have `size` blocks, a power of two. Where a group needs half of
// them or fewer, the cluster of a head works for the next heads, too, whose clusters then do
// nothing.
template <int kTokens>
__device__ __forceinline__ Group group_of_packed(const PrepareParams& p, int cluster, int rank,
                                                 int size) {
  Group group{};
  const int unit = cluster / p.heads;
  const int sequence = find_sequence(p.kv.packed, unit, kValueGroup);
  const Span keys = span_of(p.kv.packed, sequence);
  const int first_group = first_unit(keys.first, sequence, kValueGroup);
  group.seqlen = keys.length;
  group.number = unit - first_group;
  group.count = min(kValueGroup, keys.length - group.number * kValueGroup);
  if (group.number < 0 || group.count <= 0) return group;
  group.blocks = (group.count + kTokens - 1) / kTokens;
  const int share = 1 << (32 - __clz(group.blocks - 1));  // of a cluster's blocks
  const int first_head = cluster % p.heads;
  group.head = first_head + rank / share;
  const bool has_head = first_head % (size / share) == 0 && group.head < p.heads;
  group.first_rank = rank / share * share;
  group.rank = has_head ? rank % share : group.blocks;
  group.mean = static_cast<int64_t>(sequence) * p.heads + group.head;
  group.first_row = keys.first;
  group.first_tile = group.head * p.kv.tiles + 2 * first_unit(keys.first, sequence, kKeyBlock128);
  group.first_group = group.head * p.kv.groups + first_group;
  return group;
}

template <int kWidth, typename Element, Pairing kPairing, bool kIsPacked>
__global__ void __launch_bounds__(kThreads<kWidth>, sizeof(Element) == 2 && kWidth <= 128 ? 2 : 1)
    prepare_kv_kernel(const __grid_constant__ PrepareParams p) {
  constexpr int kTokens = torch_sage::kTokens<kWidth>, kBlocks = torch_sage::kBlocks<kWidth>;
  constexpr int kThreads = torch_sage::kThreads<kWidth>, kShares = torch_sage::kShares<kWidth>;
  constexpr int kLanes = kWidth / 8;  // threads that share a row of K
  constexpr int kRowsAtOnce = kThreads / kLanes;
  constexpr int kRounds = kTokens / kRowsAtOnce;
  constexpr int kRoundsPerScale = kKeyBlock128 / kRowsAtOnce;
  constexpr int kPairs = kLanes / 2;  // pairs of 8 channels of V, each of some warps
  constexpr int kPanels = kTokens / kKeyTile * kPairs / (kThreads / 32);  // of V, per warp
  __shared__ Shared<kWidth> shared;

  sm90::let_next_kernel_start();
  if (p.work_counter != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *p.work_counter = 0;
  if constexpr (kPairing != Pairing::kNone) {
    const int of_keys = static_cast<int>(p.kv.groups) * kBlocks * p.batch * p.heads;
    if (blockIdx.x >= of_keys) {  // whole clusters
      prepare_query<kPairing, kWidth, Element>(p, blockIdx.x - of_keys);
      return;
    }
  }
  cg::cluster_group cluster = cg::this_cluster();
  Group group;
  if constexpr (kIsPacked) {
    const int size = cluster.num_blocks();
    const int of_keys = static_cast<int>(p.kv.groups) * size * p.heads;
    if (blockIdx.x >= of_keys) {  // whole clusters
      fill_unattended<kThreads, Element>(p.packed_output, p.kv.packed, blockIdx.x - of_keys);
      return;
    }
    group = group_of_packed<kTokens>(p, blockIdx.x / size, cluster.block_rank(), size);
    if (group.rank >= group.blocks) return;
  } else {
    group = group_of_batch<kBlocks>(p, blockIdx.x / kBlocks, cluster.block_rank());
  }
  const int seqlen = group.seqlen, rank = group.rank;
  // Another block's shared memory may be written to once that block runs.
  auto started = cluster.barrier_arrive();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int first = group.number * kValueGroup + rank * kTokens;  // token of the block
  const int valid = min(kTokens, seqlen - first);
  const int tiles = (seqlen + kKeyBlock128 - 1) / kKeyBlock128 * 2;  // of the sequence
  const Element* key = static_cast<const Element*>(p.key) + group.batch * p.key_stride_b +
                       group.head * p.key_stride_h + group.first_row * p.key_stride_n;
  const Element* value = static_cast<const Element*>(p.value) + group.batch * p.value_stride_b +
                         group.head * p.value_stride_h + group.first_row * p.value_stride_n;

  // K: a thread has 8 channels of every kRowsAtOnce-th row.
  const int key_column = thread % kLanes * 8, key_row = thread / kLanes;
  Vector8<Element> k[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; i++) {
    const int row = i * kRowsAtOnce + key_row;
    k[i].load(key + (first + row) * p.key_stride_n + key_column,
              key_column < p.head_dim && row < valid);
  }
  const auto rotate_key = [&](Vector8<Element>& x, int token) {
    if constexpr (kPairing != Pairing::kNone) {
      const int inside = min(token, seqlen - 1);
      const Angles angles = angles_of(p.key_rotary, group.batch, inside, key_column);
      rotate<kPairing, kWidth>(x, p.key_rotary, angles, group.batch, group.head, inside,
                               key_column);
    }
  };
  // V: a thread has 8 channels of 4 tokens of every 16 (2 q, 2 q + 1 and the two 8 behind), so that
  // the four codes of a channel are adjacent in the image. 16 lanes have the 64 tokens of a panel.
  const int quad = lane % 16;  // chunk quad / 4, q = quad % 4
  const int value_column = (warp % kPairs * 2 + lane / 16) * 8;
  const int first_panel = warp / kPairs * kPanels;
  const auto value_row = [&](int panel, int i) {
    return (first_panel + panel) * kKeyTile + quad / 4 * 16 + quad % 4 * 2 + (i & 1) + (i & 2) * 4;
  };
  Vector8<Element> v[kPanels][4];
  const auto load_values = [&] {
#pragma unroll
    for (int panel = 0; panel < kPanels; panel++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = value_row(panel, i);
        v[panel][i].load(value + (first + row) * p.value_stride_n + value_column,
                         value_column < p.head_dim_v && row < valid);
      }
  };
  // A thread of 512 has no registers for fp32 K and V together.
  constexpr bool kLoadsLate = kThreads == 512 && sizeof(Element) == 4;
  if constexpr (!kLoadsLate) load_values();

#pragma unroll
  for (int i = 0; i < kRounds; i++) rotate_key(k[i], first + i * kRowsAtOnce + key_row);

  // The mean of K.
  if (thread < kTokens / kKeyBlock128 * 4) shared.key_amax[thread / 4][thread % 4] = 0;
  const int samples = min(kSamples, seqlen);
  float mean[8] = {};
  if (p.smooth_key) {
#pragma unroll
    for (int i = 0; i < kSamples / kRowsAtOnce; i++) {
      const int sample = i * kRowsAtOnce + key_row;
      const int64_t token = static_cast<int64_t>(sample) * seqlen / samples;
      Vector8<Element> x;
      x.load(key + token * p.key_stride_n + key_column,
             key_column < p.head_dim && sample < samples);
      rotate_key(x, static_cast<int>(token));
#pragma unroll
      for (int c = 0; c < 8; c++) mean[c] += x[c] * (1.f / kSamples);
    }
  }
#pragma unroll
  for (int c = 0; c < 8; c++) shared.samples[key_row][key_column + c] = mean[c];
  __syncthreads();
  if (thread < kWidth) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; i++) sum += shared.samples[i][thread];
    sum *= static_cast<float>(kSamples) / samples;
    // Any vector will do; one that is not finite would spoil every key.
    shared.key_mean[thread] = is_finite(sum) ? sum : 0.f;
  }
  __syncthreads();
  if (first == 0 && thread < p.key_mean_columns)
    p.kv.key_mean[group.mean * p.key_mean_columns + thread] = shared.key_mean[thread];

  // Amax of K. Rows of a thread share (row % 8) / 2, the index of their scale.
  const int scale_index = key_row % 8 / 2;
#pragma unroll
  for (int c = 0; c < 8; c++) mean[c] = shared.key_mean[key_column + c];
#pragma unroll
  for (int part = 0; part < kTokens / kKeyBlock128; part++) {
    float amax = 0;
#pragma unroll
    for (int i = part * kRoundsPerScale; i < (part + 1) * kRoundsPerScale; i++) {
      if (i * kRowsAtOnce + key_row >= valid) continue;
#pragma unroll
      for (int c = 0; c < 8; c++) amax = larger_of(amax, fabsf(k[i][c] - mean[c]));
    }
    uint32_t bits = __float_as_uint(amax);  // as integers, NaN is the largest
    if constexpr (kLanes >= 16) bits = max(bits, __shfl_xor_sync(~0u, bits, 16));
#pragma unroll
    for (int step = 8; step >= 1; step >>= 1) bits = max(bits, __shfl_xor_sync(~0u, bits, step));
    if (lane % 16 == 0) atomicMax(&shared.key_amax[part][scale_index], bits);
  }

  __syncthreads();

  // Codes of K.
  // Blocks of a cluster may lie behind the end.
  if (thread < kTokens / kKeyBlock128 * 4 && first / kKeyBlock128 + thread / 4 < tiles / 2)
    p.kv.key_scales[(group.first_tile / 2 + first / kKeyBlock128) * 4 + thread] =
        scale_and_inverse_127(__uint_as_float(shared.key_amax[thread / 4][thread % 4])).scale;
  int8_t* key_image = p.kv.key_codes + (group.first_tile + first / kKeyTile) * (kKeyTile * kWidth);
  float inverse_of_key = 0;
#pragma unroll
  for (int i = 0; i < kRounds; i++) {
    if (i % kRoundsPerScale == 0)
      inverse_of_key =
          scale_and_inverse_127(__uint_as_float(shared.key_amax[i / kRoundsPerScale][scale_index]))
              .inverse;
    const int row = i * kRowsAtOnce + key_row;
    float x[8];
#pragma unroll
    for (int c = 0; c < 8; c++) x[c] = __fmul_rn(k[i][c] - mean[c], inverse_of_key);
    uint2 codes = codes_of(x);
    if (row >= valid) codes = make_uint2(0, 0);
    if (first / kKeyTile + row / kKeyTile < tiles)
      *reinterpret_cast<uint2*>(key_image + sm90::image_place<kWidth>(row, key_column)) = codes;
  }
  if constexpr (kLoadsLate) load_values();

  // Sum and extremes of V, where NaN passes through all of them.
  const int owned_column = value_column + lane % 8;
  const int share = rank * kShares + warp / kPairs;
  {
    float sum[8] = {}, low[8], high[8];
#pragma unroll
    for (int c = 0; c < 8; c++) {
      low[c] = INFINITY;
      high[c] = -INFINITY;
    }
#pragma unroll
    for (int panel = 0; panel < kPanels; panel++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (value_row(panel, i) >= valid) continue;
#pragma unroll
        for (int c = 0; c < 8; c++) {
          const float x = v[panel][i][c];
          sum[c] = fmaf(x, 1.f / kValueGroup, sum[c]);  // cannot overflow
          low[c] = smaller_of(low[c], x);
          high[c] = larger_of(high[c], x);
        }
      }
    const float folded_sum = fold_16_lanes(sum, lane, [](float a, float b) { return a + b; });
    const float folded_low = fold_16_lanes(low, lane, smaller_of);
    const float folded_high = fold_16_lanes(high, lane, larger_of);
    cluster.barrier_wait(std::move(started));
    // Lanes 0..7 and 8..15 have the same; each tells half of the cluster.
    for (int to = lane % 16 / 8; to < group.blocks; to += 2) {
      Shared<kWidth>* other = cluster.map_shared_rank(&shared, group.first_rank + to);
      other->sum[share][owned_column] = folded_sum;
      other->low[share][owned_column] = folded_low;
      other->high[share][owned_column] = folded_high;
    }
  }
  cluster.sync();

  const int64_t group_at = (group.first_group + group.number) * kWidth;
  const bool is_bf16 = p.kv.value_format == ValueFormat::kBf16;
  const int shares = group.blocks * kShares;
  if (thread < kWidth) {
    float sum = 0, low = INFINITY, high = -INFINITY;
#pragma unroll
    for (int i = 0; i < shares; i++) {
      sum += shared.sum[i][thread];
      low = smaller_of(low, shared.low[i][thread]);
      high = larger_of(high, shared.high[i][thread]);
    }
    const float center =
        p.smooth_value ? sum * (static_cast<float>(kValueGroup) / group.count) : 0.f;
    // Subtraction rounds monotonically: the extremes of x - center are those of x.
    ScaleAndInverse scale =
        scale_and_inverse(larger_of(fabsf(low - center), fabsf(high - center)), kValueMax);
    if (is_bf16) {
      scale.scale = scale.scale == scale.scale ? 1.f : NAN;
      if (rank == 0) p.kv.value_shift[group_at + thread] = 0.f;
    }
    shared.center[thread] = center;
    shared.scale[thread] = scale.scale;
    shared.inverse[thread] = scale.inverse;
    if (rank == 0) p.kv.value_scales[group_at + thread] = scale.scale;
  }

  __syncthreads();

  if (is_bf16) {
    // Two words of a channel: the keys of a thread in the halves of 16.
#pragma unroll
    for (int panel = 0; panel < kPanels; panel++) {
      const int tile = first / kKeyTile + first_panel + panel;
      if (tile >= tiles) break;
      uint8_t* image = p.kv.value_codes + (group.first_tile + tile) * (2 * kKeyTile * kWidth);
#pragma unroll
      for (int c = 0; c < 8; c++) {
        const int column = value_column + c;
        const bool is_finite = shared.scale[column] == 1.f;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int i = 2 * half, chunk = quad / 4 * 2 + half;
          const uint32_t codes =
              is_finite ? bf16_pair(value_row(panel, i) < valid ? v[panel][i][c] : 0.f,
                                    value_row(panel, i + 1) < valid ? v[panel][i + 1][c] : 0.f)
                        : 0;
          *reinterpret_cast<uint32_t*>(image + column * (2 * kKeyTile) +
                                       sm90::swizzled<2 * kKeyTile>(chunk, column) * 16 +
                                       quad % 4 * 4) = codes;
        }
      }
    }
    return;
  }

  // Codes of V, and how much they are too small on average. Where the scale is NaN the codes do not
  // matter.
  float error[8];
#pragma unroll
  for (int c = 0; c < 8; c++) {
    const int column = value_column + c;
    const float center = shared.center[column], inverse = shared.inverse[column];
    float sum = 0;
    __half2 code_sum = __float2half2_rn(0.f);  // exact: 4 kPanels multiples of 2^-9 up to .25
#pragma unroll
    for (int panel = 0; panel < kPanels; panel++) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        x[i] = value_row(panel, i) < valid ? v[panel][i][c] - center : 0.f;
        sum += x[i];
      }
      __half2 low, high;
      const uint32_t codes = e4m3_pair(__fmul_rn(x[0], inverse), __fmul_rn(x[1], inverse), low) |
                             e4m3_pair(__fmul_rn(x[2], inverse), __fmul_rn(x[3], inverse), high)
                                 << 16;
      code_sum = __hadd2(code_sum, __hadd2(low, high));
      const int tile = first / kKeyTile + first_panel + panel;
      const int place = sm90::swizzled<kKeyTile>(quad / 4, column);
      if (tile < tiles)
        *reinterpret_cast<uint32_t*>(p.kv.value_codes +
                                     (group.first_tile + tile) * (kKeyTile * kWidth) +
                                     column * kKeyTile + place * 16 + quad % 4 * 4) = codes;
    }
    const float2 codes = __half22float2(code_sum);
    error[c] = fmaf(-shared.scale[column], codes.x + codes.y, sum);
  }
  const float folded = fold_16_lanes(error, lane, [](float a, float b) { return a + b; });
  if (lane % 16 < 8)
    cluster.map_shared_rank(&shared, group.first_rank)->error[share][owned_column] = folded;
  auto written = cluster.barrier_arrive();
  if (rank != 0) return;
  cluster.barrier_wait(std::move(written));
  if (thread < kWidth) {
    float total = 0;
    for (int i = 0; i < shares; i++) total += shared.error[i][thread];
    const float mean_error = is_finite(total) ? total / group.count : 0.f;
    p.kv.value_shift[group_at + thread] = shared.center[thread] + mean_error;
  }
}

template <int kWidth, typename Element, Pairing kPairing, bool kIsPacked = false>
void launch(const PrepareParams& p, cudaStream_t stream) {
  unsigned cluster = kBlocks<kWidth>;
  if constexpr (kIsPacked) {
    const unsigned longest = p.kv.packed.longest;
    cluster = std::min(cluster, std::bit_ceil((longest + kTokens<kWidth> - 1) / kTokens<kWidth>));
  }
  const auto whole_clusters = [&](int64_t blocks) {
    return (blocks + cluster - 1) / cluster * cluster;
  };
  int64_t grid = p.kv.groups * cluster * p.batch * p.heads;
  if constexpr (kPairing != Pairing::kNone) grid += whole_clusters(query_blocks(p));
  if constexpr (kIsPacked)
    grid +=
        whole_clusters((p.packed_output.queries.rows + kThreads<kWidth> - 1) / kThreads<kWidth>);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(kThreads<kWidth>);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  // Not <<<>>>: an error would have to be read from where others leave theirs.
  check_cuda(
      cudaLaunchKernelEx(&config, prepare_kv_kernel<kWidth, Element, kPairing, kIsPacked>, p),
      "the launch of prepare_kv");
}

template <int kWidth, typename Element>
void launch(const PrepareParams& p, cudaStream_t stream) {
  if (p.kv.packed.starts != nullptr)  // which nobody rotates
    return launch<kWidth, Element, Pairing::kNone, true>(p, stream);
  if constexpr (sizeof(Element) == 4 || kWidth > 128) {  // nor these
    return launch<kWidth, Element, Pairing::kNone>(p, stream);
  } else {
    switch (p.key_rotary.pairing) {
      case Pairing::kNone:
        return launch<kWidth, Element, Pairing::kNone>(p, stream);
      case Pairing::kHalves:
        return launch<kWidth, Element, Pairing::kHalves>(p, stream);
      case Pairing::kNeighbours:
        return launch<kWidth, Element, Pairing::kNeighbours>(p, stream);
    }
  }
}

template <int kWidth>
void launch(const PrepareParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return launch<kWidth, float>(p, stream);
    case Dtype::kBFloat16:
      return launch<kWidth, __nv_bfloat16>(p, stream);
    case Dtype::kFloat16:
      return launch<kWidth, __half>(p, stream);
  }
}

}  // namespace

void launch_prepare_kv(const PrepareParams& p, cudaStream_t stream) {
  switch (p.kv.width) {
    case 64:
      return launch<64>(p, stream);
    case 128:
      return launch<128>(p, stream);
    default:
      return launch<256>(p, stream);
  }
}

}  // namespace torch_sage
