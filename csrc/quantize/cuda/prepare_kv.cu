// K and V in the layout of Hopper's attention kernel, each read once, in one launch.
//
// A cluster of 4 blocks takes a value group: 1024 tokens of one head. V needs its sums and extremes
// over the group before any code is known, so the blocks exchange those through shared memory; the
// tokens themselves stay in registers. The mean of K is one of 64 sampled tokens: softmax does not
// change whatever vector is subtracted from all keys of a head, if it is the same one.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "attention/sm90/ptx.cuh"
#include "quantize/cuda/prepared.h"
#include "quantize/cuda/rules.cuh"

namespace torch_sage {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 256;
constexpr int kTokens = 256;  // of a block
constexpr int kBlocks = kValueGroup / kTokens;
constexpr int kSamples = 64;

// Eight adjacent elements, as the words they came in.
template <typename Element>
struct Vector8 {
  static constexpr int kWords = 2 * sizeof(Element);
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const Element* from, bool is_inside) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 part =
          is_inside ? __ldg(reinterpret_cast<const uint4*>(from) + i / 4) : make_uint4(0, 0, 0, 0);
      words[i] = part.x;
      words[i + 1] = part.y;
      words[i + 2] = part.z;
      words[i + 3] = part.w;
    }
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

__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// E4M3 code of x, and the value of that code.
__device__ __forceinline__ uint32_t e4m3_pair(float low, float high, float2& values) {
  uint16_t codes;
  uint32_t halves;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  values = __half22float2(*reinterpret_cast<const __half2*>(&halves));
  return codes;
}

// Sums (or other folds) over 16 lanes of 8 numbers each: on return, x[0] holds the total of number
// `owned(lane)` in every lane.
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
// The number that a lane ends with: bit 2 of the lane chose between 0..3 and 4..7, and so on.
__device__ __forceinline__ int owned(int lane) { return lane & 7; }

template <int kWidth>
struct Shared {
  float sample_sums[kThreads / (kWidth / 8)][kWidth];
  float key_mean[kWidth];
  uint32_t key_amax[2][4];
  // Per channel, of this block's tokens, for the other blocks of the cluster to read. Where a
  // channel's tokens are two warps' work, each has its own slot.
  float sum[2][kWidth], smallest[2][kWidth], largest[2][kWidth], error[2][kWidth];
  float mean[kWidth], scale[kWidth], inverse[kWidth];
};

template <int kWidth, typename Element>
__global__ void __launch_bounds__(kThreads, sizeof(Element) == 2 ? 2 : 1)
    __cluster_dims__(kBlocks, 1, 1) prepare_kv_kernel(const __grid_constant__ PrepareParams p) {
  constexpr int kLanes = kWidth / 8;  // threads that share a row of K
  constexpr int kRowsAtOnce = kThreads / kLanes;
  constexpr int kKeyRounds = kTokens / kRowsAtOnce;
  constexpr int kPairs = kLanes / 2;  // pairs of 8 channels of V; a warp has one
  constexpr int kPanels = kTokens / kKeyTile * kPairs / (kThreads / 32);  // of V, per warp
  __shared__ Shared<kWidth> shared;

  if (p.work_counter != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *p.work_counter = 0;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int seqlen = p.kv.seqlen, blocks = static_cast<int>(p.kv.groups()) * kBlocks;
  const int head = blockIdx.x / blocks, block_of_head = blockIdx.x % blocks;
  const int first = block_of_head * kTokens;  // token of the block
  const int64_t tiles = p.kv.tiles();
  const Element* key = static_cast<const Element*>(p.key) + head / p.heads * p.key_stride_b +
                       head % p.heads * p.key_stride_h;
  const Element* value = static_cast<const Element*>(p.value) + head / p.heads * p.value_stride_b +
                         head % p.heads * p.value_stride_h;

  // K: a thread has 8 channels of every kRowsAtOnce-th row.
  const int key_column = thread % kLanes * 8, key_row = thread / kLanes;
  const bool has_key_column = key_column < p.head_dim;
  Vector8<Element> k[kKeyRounds];
#pragma unroll
  for (int i = 0; i < kKeyRounds; i++) {
    const int token = first + i * kRowsAtOnce + key_row;
    k[i].load(key + token * p.key_stride_n + key_column, has_key_column && token < seqlen);
  }
  if (thread < 8) shared.key_amax[thread / 4][thread % 4] = 0;
  float mean[8] = {};
  if (p.smooth_key) {
    const int samples = min(kSamples, seqlen);
    for (int i = key_row; i < samples; i += kRowsAtOnce) {
      Vector8<Element> x;
      x.load(key + (static_cast<int64_t>(i) * seqlen / samples) * p.key_stride_n + key_column,
             has_key_column);
#pragma unroll
      for (int c = 0; c < 8; c++) mean[c] += x[c] * (1.f / kSamples);
    }
#pragma unroll
    for (int c = 0; c < 8; c++) shared.sample_sums[key_row][key_column + c] = mean[c];
    __syncthreads();
    if (thread < kWidth) {
      float sum = 0;
      for (int i = 0; i < kRowsAtOnce; i++) sum += shared.sample_sums[i][thread];
      sum *= static_cast<float>(kSamples) / samples;
      // Any vector will do; one that is not finite would spoil every key.
      shared.key_mean[thread] = fabsf(sum) <= 3.402823466e38f ? sum : 0.f;
    }
  }
  __syncthreads();
  if (p.smooth_key) {
#pragma unroll
    for (int c = 0; c < 8; c++) mean[c] = shared.key_mean[key_column + c];
  }
  if (block_of_head == 0 && thread < p.key_mean_columns)
    p.kv.key_mean[static_cast<int64_t>(head) * p.key_mean_columns + thread] =
        p.smooth_key ? shared.key_mean[thread] : 0.f;

  // Rows of a thread share (row % 8) / 2, the index of their scale within 128 keys.
  const int scale_index = key_row % 8 / 2;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t amax = 0;
#pragma unroll
    for (int i = half * kKeyRounds / 2; i < (half + 1) * kKeyRounds / 2; i++) {
      const bool is_inside = first + i * kRowsAtOnce + key_row < seqlen;
#pragma unroll
      for (int c = 0; c < 8; c++) {
        if (is_inside && has_key_column) amax = max(amax, magnitude(k[i][c] - mean[c]));
      }
    }
    if constexpr (kLanes == 16) amax = max(amax, __shfl_xor_sync(~0u, amax, 16));
#pragma unroll
    for (int step = 8; step >= 1; step >>= 1) amax = max(amax, __shfl_xor_sync(~0u, amax, step));
    if (lane % 16 == 0) atomicMax(&shared.key_amax[half][scale_index], amax);
  }

  __syncthreads();

  if (thread < 8) {
    const int block = first / kKeyBlock128 + thread / 4;
    if (block * 2 < tiles)
      p.kv.key_scales[(head * (tiles / 2) + block) * 4 + thread % 4] =
          scale_and_inverse_127(__uint_as_float(shared.key_amax[thread / 4][thread % 4])).scale;
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float inverse =
        scale_and_inverse_127(__uint_as_float(shared.key_amax[half][scale_index])).inverse;
#pragma unroll
    for (int i = half * kKeyRounds / 2; i < (half + 1) * kKeyRounds / 2; i++) {
      const int row = i * kRowsAtOnce + key_row, token = first + row;
      float x[8];
#pragma unroll
      for (int c = 0; c < 8; c++)
        x[c] = token < seqlen && has_key_column ? __fmul_rn(k[i][c] - mean[c], inverse) : 0.f;
      const uint2 codes = make_uint2(sm90::pack_s8(x[0], x[1], sm90::pack_s8(x[2], x[3], 0)),
                                     sm90::pack_s8(x[4], x[5], sm90::pack_s8(x[6], x[7], 0)));
      const int chunk = key_column / 16, in_tile = row % kKeyTile;
      const int place = kWidth == 128 ? chunk ^ (in_tile & 7) : chunk ^ (in_tile >> 1 & 3);
      if (token / kKeyTile < tiles)
        *reinterpret_cast<uint2*>(
            p.kv.key_codes + ((head * tiles + token / kKeyTile) * kKeyTile + in_tile) * kWidth +
            place * 16 + key_column % 16) = codes;
    }
  }

  // V: a thread has 8 channels of 4 tokens of every 16 (2 q, 2 q + 1 and the two 8 behind), so that
  // the four codes of a channel are adjacent in the image. 16 lanes have the 64 tokens of a panel.
  const int quad = lane % 16;  // chunk quad / 4, q = quad % 4
  const int value_column = (warp % kPairs * 2 + lane / 16) * 8;
  const int first_panel = warp / kPairs * kPanels;
  const bool has_value_column = value_column < p.head_dim_v;
  const auto token_of = [&](int panel, int i) {
    return first + (first_panel + panel) * kKeyTile + quad / 4 * 16 + quad % 4 * 2 + (i & 1) +
           (i & 2) * 4;
  };
  Vector8<Element> v[kPanels][4];
#pragma unroll
  for (int panel = 0; panel < kPanels; panel++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int token = token_of(panel, i);
      v[panel][i].load(value + token * p.value_stride_n + value_column,
                       has_value_column && token < seqlen);
    }
  float sum[8] = {}, smallest[8], largest[8];
#pragma unroll
  for (int c = 0; c < 8; c++) {
    smallest[c] = INFINITY;
    largest[c] = -INFINITY;
  }
#pragma unroll
  for (int panel = 0; panel < kPanels; panel++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (token_of(panel, i) >= seqlen) continue;
#pragma unroll
      for (int c = 0; c < 8; c++) {
        const float x = v[panel][i][c];
        sum[c] += x * (1.f / kValueGroup);  // cannot overflow
        smallest[c] = fminf(smallest[c], x);
        largest[c] = fmaxf(largest[c], x);
      }
    }
  const auto add = [](float a, float b) { return a + b; };
  const int owned_column = value_column + owned(lane), slot = first_panel != 0;
  {
    const float a = fold_16_lanes(sum, lane, add);
    const float b = fold_16_lanes(smallest, lane, [](float x, float y) { return fminf(x, y); });
    const float c = fold_16_lanes(largest, lane, [](float x, float y) { return fmaxf(x, y); });
    shared.sum[slot][owned_column] = a;
    shared.smallest[slot][owned_column] = b;
    shared.largest[slot][owned_column] = c;
  }
  constexpr int kSlots = kTokens / kKeyTile / kPanels;
  cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
  const int group = first / kValueGroup;
  const int count = min(kValueGroup, seqlen - group * kValueGroup);
  const int64_t group_at = (head * p.kv.groups() + group) * kWidth;
  if (thread < kWidth) {
    float total = 0, low = INFINITY, high = -INFINITY;
    for (int rank = 0; rank < kBlocks; rank++) {
      const Shared<kWidth>* other = cluster.map_shared_rank(&shared, rank);
      for (int s = 0; s < kSlots; s++) {
        total += other->sum[s][thread];
        low = fminf(low, other->smallest[s][thread]);
        high = fmaxf(high, other->largest[s][thread]);
      }
    }
    const float center = p.smooth_value ? total * (static_cast<float>(kValueGroup) / count) : 0.f;
    // Subtraction rounds monotonically: the extremes of x - center are those of x.
    float amax = fmaxf(fabsf(low - center), fabsf(high - center));
    if (!(fabsf(total) <= 3.402823466e38f)) amax = NAN;  // NaN hides from extremes, not from sums
    const ScaleAndInverse scale = scale_and_inverse(amax, kValueMax);
    shared.mean[thread] = scale.scale == scale.scale ? center : 0.f;
    shared.scale[thread] = scale.scale;
    shared.inverse[thread] = scale.inverse;
  }
  __syncthreads();

  float error[8] = {};
#pragma unroll
  for (int panel = 0; panel < kPanels; panel++) {
    const int tile = first / kKeyTile + first_panel + panel;
    uint8_t* image = p.kv.value_codes + (head * tiles + tile) * (kKeyTile * kWidth);
#pragma unroll
    for (int c = 0; c < 8; c++) {
      const int column = value_column + c;
      const float center = shared.mean[column], inverse = shared.inverse[column];
      const float scale = shared.scale[column];
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        x[i] = token_of(panel, i) < seqlen && has_value_column ? v[panel][i][c] - center : 0.f;
      // Not finite: the scale says so, the codes are 0.
      const bool is_finite = scale == scale;
      float2 low, high;
      const uint32_t codes = e4m3_pair(is_finite ? __fmul_rn(x[0], inverse) : 0.f,
                                       is_finite ? __fmul_rn(x[1], inverse) : 0.f, low) |
                             e4m3_pair(is_finite ? __fmul_rn(x[2], inverse) : 0.f,
                                       is_finite ? __fmul_rn(x[3], inverse) : 0.f, high)
                                 << 16;
      error[c] += (x[0] - low.x * scale) + (x[1] - low.y * scale) + (x[2] - high.x * scale) +
                  (x[3] - high.y * scale);
      const int place = (quad / 4) ^ (column >> 1 & 3);
      if (tile < tiles)
        *reinterpret_cast<uint32_t*>(image + column * kKeyTile + place * 16 + quad % 4 * 4) = codes;
    }
  }
  shared.error[slot][owned_column] = fold_16_lanes(error, lane, add);
  cluster.sync();
  sm90::let_next_kernel_start();
  if (cluster.block_rank() == 0 && thread < kWidth) {
    float total = 0;
    for (int rank = 0; rank < kBlocks; rank++) {
      const Shared<kWidth>* other = cluster.map_shared_rank(&shared, rank);
      for (int s = 0; s < kSlots; s++) total += other->error[s][thread];
    }
    p.kv.value_scales[group_at + thread] = shared.scale[thread];
    p.kv.value_shift[group_at + thread] = shared.mean[thread] + total / count;
  }
  cluster.sync();  // no block may leave while another reads its shared memory
}

template <int kWidth, typename Element>
void launch(const PrepareParams& p, cudaStream_t stream) {
  const unsigned grid = static_cast<unsigned>(p.kv.groups() * kBlocks * p.batch * p.heads);
  prepare_kv_kernel<kWidth, Element><<<grid, kThreads, 0, stream>>>(p);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("the launch of prepare_kv failed: ") +
                             cudaGetErrorString(error));
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
  if (p.kv.width == 64) {
    launch<64>(p, stream);
  } else {
    launch<128>(p, stream);
  }
}

}  // namespace torch_sage
