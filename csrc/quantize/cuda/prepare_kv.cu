// K and V in the layout of Hopper's attention kernel, each read once, in one launch.
//
// A cluster of blocks takes one value group after another: 1024 tokens of one head. V needs its
// mean and its extremes over the group before any code is known, so the blocks exchange those
// through shared memory; the tokens themselves stay in registers, and meanwhile those of the next
// group come to shared memory. The mean of K is that of 32 sampled tokens: softmax does not change
// whatever vector is subtracted from all keys of a head.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

#include "attention/copy_async.cuh"
#include "attention/sm90/ptx.cuh"
#include "attention/store.cuh"
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

constexpr int kThreads = 512;  // of a block, of which a multiprocessor has one
constexpr int kSamples = 32;

// Eight adjacent elements, as the words they came in.
template <typename Element>
struct Vector8 {
  static constexpr int kWords = 2 * sizeof(Element);
  static constexpr int kParts = kWords / 4;  // of 16 bytes
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const Element* from, bool is_inside) {
    load_words(words, from, is_inside);
  }
  // The same by way of slots in shared memory, a place for each thread in each. `from` must be a
  // valid address all the same.
  __device__ __forceinline__ static void fetch(uint4 (*slots)[kThreads], const void* from,
                                               bool is_inside) {
#pragma unroll
    for (int i = 0; i < kParts; i++)
      copy_16_async(shared_address(&slots[i][threadIdx.x]), static_cast<const uint4*>(from) + i,
                    is_inside);
  }
  __device__ __forceinline__ void take(const uint4 (*slots)[kThreads]) {
#pragma unroll
    for (int i = 0; i < kParts; i++) {
      const uint4 part = slots[i][threadIdx.x];
      words[4 * i] = part.x;
      words[4 * i + 1] = part.y;
      words[4 * i + 2] = part.z;
      words[4 * i + 3] = part.w;
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

// Extremes of each of the eight elements over some vectors; NaN if there was one.
template <typename Element>
struct Range8 {
  Vector8<Element> low, high;

  // Of none.
  __device__ __forceinline__ Range8() {
    constexpr uint32_t kInfinity = sizeof(Element) == 4                     ? 0x7f800000
                                   : std::is_same_v<Element, __nv_bfloat16> ? 0x7f807f80
                                                                            : 0x7c007c00;
    constexpr uint32_t kSigns = sizeof(Element) == 4 ? 0x80000000 : 0x80008000;
#pragma unroll
    for (int i = 0; i < Vector8<Element>::kWords; i++) {
      low.words[i] = kInfinity;
      high.words[i] = kInfinity | kSigns;
    }
  }
  __device__ __forceinline__ void include(const Vector8<Element>& x) {
#pragma unroll
    for (int i = 0; i < Vector8<Element>::kWords; i++) {
      if constexpr (sizeof(Element) == 4) {
        low.words[i] = __float_as_uint(smaller_of(low[i], x[i]));
        high.words[i] = __float_as_uint(larger_of(high[i], x[i]));
      } else if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
        asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(low.words[i]) : "r"(x.words[i]));
        asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(high.words[i]) : "r"(x.words[i]));
      } else {
        asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(low.words[i]) : "r"(x.words[i]));
        asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(high.words[i]) : "r"(x.words[i]));
      }
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
  constexpr int kLanes = kWidth / 8, kRowsAtOnce = kThreads / kLanes;
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

// Sizes of a block's share of a group: so many tokens that a thread has the same number of elements
// at any width.
template <int kWidth, typename Element>
struct Share {
  static constexpr int kTokens = kThreads * 64 / kWidth;
  static constexpr int kBlocks = kValueGroup / kTokens;  // that share a group
  static constexpr int kScaleBlocks = kTokens / kKeyBlock128;

  // K: kLanes threads have a row, and a thread 8 channels of every kRowsAtOnce-th row.
  static constexpr int kLanes = kWidth / 8, kRowsAtOnce = kThreads / kLanes;
  static constexpr int kRounds = kTokens / kRowsAtOnce;
  static constexpr int kSampleRounds = (kSamples + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr int kRowsSampled = kSamples / kSampleRounds;  // at once

  // V: a warp has a pair of 8 channels of kPanels times 64 tokens.
  static constexpr int kPairs = kLanes / 2;
  static constexpr int kShares = kThreads / 32 / kPairs;  // warps that share a pair's tokens
  static constexpr int kAllShares = kBlocks * kShares;    // in a group
  static constexpr int kPanels = kTokens / kKeyTile / kShares;

  // A thread has no registers for fp32 K and V together, nor shared memory for those to come.
  static constexpr bool kLoadsValuesLate = sizeof(Element) == 4;
  static constexpr int kParts = Vector8<Element>::kParts;
  static constexpr int kSampleSlot = kRounds * kParts;
  static constexpr int kValueSlot = kSampleSlot + kSampleRounds * kParts;
  static constexpr int kSlots = kValueSlot + (kLoadsValuesLate ? 0 : kPanels * 4 * kParts);
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

  // Of the block's own tokens: elements of key and value and bytes of the images before them, tiles
  // of 64 from them to the sequence's end, and which there are.
  int64_t key_at, value_at, image_at;
  int first, valid, tiles;
  bool is_whole;  // all of them, and no channel is padding

  __device__ __forceinline__ bool is_active() const { return rank < blocks; }
};

template <class S, int kWidth>
struct Shared {
  Group groups[4];  // by number modulo 4: the last one, this one, and two to come
  // What comes of the next group: of K, the samples of K, and V.
  uint4 slots[S::kSlots][kThreads];
  float samples[S::kRowsSampled][kWidth];  // of K: partial sums
  float key_mean[kWidth];
  uint32_t key_amax[S::kScaleBlocks][4];
  // What every block of the group has stored here: nobody reads another's memory.
  float4 extremes[S::kAllShares][kWidth];  // of V: sum, lowest, highest
  float codes[S::kAllShares][kWidth];      // their sum; the same, in the group's first block alone
  float average[kWidth], center[kWidth];
  float scale[kWidth], inverse[kWidth];
  uint64_t has_extremes, has_codes;  // barriers
};

// Of a batch.
template <int kBlocks>
__device__ __forceinline__ Group group_of_batch(const PrepareParams& p, int index, int rank) {
  // Of all heads the same tokens first, which share the tables and may lie side by side.
  const int heads = p.batch * p.heads, head = index % heads;
  Group group{};
  group.batch = head / p.heads;
  group.head = head % p.heads;
  group.mean = head;
  group.seqlen = p.kv.seqlen;
  group.number = index / heads;
  group.count = min(kValueGroup, group.seqlen - group.number * kValueGroup);
  group.first_tile = head * p.kv.tiles;
  group.first_group = head * p.kv.groups;
  group.blocks = kBlocks;
  group.rank = rank;
  return group;
}

// Of packed sequences: clusters have `size` blocks, a power of two. Where a group needs half of
// them or fewer, the cluster works for the next heads, too, whose turn is then nobody's.
template <int kTokens>
__device__ __forceinline__ Group group_of_packed(const PrepareParams& p, int index, int rank,
                                                 int size) {
  Group group{};
  const int unit = index / p.heads;
  const int sequence = find_sequence(p.kv.packed, unit, kValueGroup);
  const Span keys = span_of(p.kv.packed, sequence);
  const int first_group = first_unit(keys.first, sequence, kValueGroup);
  group.seqlen = keys.length;
  group.number = unit - first_group;
  group.count = min(kValueGroup, keys.length - group.number * kValueGroup);
  if (group.number < 0 || group.count <= 0) return group;
  group.blocks = (group.count + kTokens - 1) / kTokens;
  const int share = 1 << (32 - __clz(group.blocks - 1));  // of a cluster's blocks
  const int first_head = index % p.heads;
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

// One block's work on the groups that its cluster takes one after another.
//
// A block tells the others the extremes of its V, quantizes K, and only then waits for theirs. What
// its group's codes of V lack is summed up when the next group's V is in registers.
template <int kWidth, typename Element, Pairing kPairing>
class Preparer {
 public:
  using S = Share<kWidth, Element>;
  using Memory = Shared<S, kWidth>;

  __device__ __forceinline__ Preparer(const PrepareParams& params, Memory& shared)
      : p_(params), shared_(shared), thread_(threadIdx.x) {}

  // Groups `index`, `index + stride` and so on, below `count`; `group_at` finds one for a warp.
  template <typename GroupAt>
  __device__ __forceinline__ void run(int index, int stride, int count, GroupAt group_at) {
    const auto find_group = [&](int i) {
      if (thread_ >= 32) return;
      const int at = index + i * stride;
      Group group = at < count ? group_at(at) : Group{};
      locate(group);
      if (lane() == 0) shared_.groups[i % 4] = group;
    };
    if (thread_ == 0) {
      sm90::barrier_init(shared_address(&shared_.has_extremes), 1);
      sm90::barrier_init(shared_address(&shared_.has_codes), 1);
      sm90::fence_barriers();
    }
    // Another block's shared memory may be written to once that block runs.
    sm90::cluster_arrive<true>();
    find_group(0);
    __syncthreads();
    fetch_values(shared_.groups[0]);
    commit_copies();
    fetch_keys(shared_.groups[0]);
    commit_copies();
    find_group(1);
    __syncthreads();
    int i = 0;
    for (; index + i * stride < count; i++) {
      const Group &group = shared_.groups[i % 4], &next = shared_.groups[(i + 1) % 4];
      forget();
      find_group(i + 2);
      if constexpr (S::kLoadsValuesLate) {
        wait_for_copies<0>();
        prepare_keys(group, next);
        load_values(group);
        fetch_keys(next);
      } else {
        wait_for_copies<1>();  // for V; K was asked for behind it
        take_values();
        fetch_values(next);
      }
      commit_copies();
      const float4 own = extremes(group);
      sm90::cluster_wait();  // for those who have yet to read what they were told last
      if (i > 0) finish(shared_.groups[(i - 1) % 4]);
      tell(group, own);
      if constexpr (!S::kLoadsValuesLate) {
        wait_for_copies<1>();
        prepare_keys(group, next);
        commit_copies();
      }
      if (group.is_active()) {
        write_values(group);
      } else {
        __syncthreads();  // others see which group the first warp found; elsewhere they have met
      }
      sm90::cluster_arrive<false>();
    }
    sm90::cluster_wait();
    finish(shared_.groups[(i - 1) % 4]);
  }

 private:
  // What follows from the thread's number: found again in every part of the work, or the compiler
  // would keep it all, for which there are not the registers.
  __device__ __forceinline__ void forget() { asm volatile("" : "+r"(thread_)); }
  __device__ __forceinline__ int lane() const { return thread_ % 32; }
  __device__ __forceinline__ int key_column() const { return thread_ % S::kLanes * 8; }
  __device__ __forceinline__ int key_row() const { return thread_ / S::kLanes; }
  __device__ __forceinline__ int quad() const { return lane() % 16; }
  __device__ __forceinline__ int value_column() const {
    return (thread_ / 32 % S::kPairs * 2 + lane() / 16) * 8;
  }
  __device__ __forceinline__ int first_panel() const {
    return thread_ / 32 / S::kPairs * S::kPanels;
  }

  __device__ __forceinline__ void locate(Group& group) const {
    group.first = group.number * kValueGroup + group.rank * S::kTokens;
    group.valid = min(S::kTokens, group.seqlen - group.first);
    group.is_whole = group.valid == S::kTokens && p_.head_dim == kWidth && p_.head_dim_v == kWidth;
    group.tiles = ((group.seqlen + kKeyBlock128 - 1) / kKeyBlock128 * 2) - group.first / kKeyTile;
    const int64_t row = group.first_row + group.first;
    group.key_at =
        group.batch * p_.key_stride_b + group.head * p_.key_stride_h + row * p_.key_stride_n;
    group.value_at =
        group.batch * p_.value_stride_b + group.head * p_.value_stride_h + row * p_.value_stride_n;
    group.image_at = (group.first_tile + group.first / kKeyTile) * (kKeyTile * kWidth);
  }
  // Calls `visit` for the rows of a group, of which there are all in the common case.
  template <bool kIsWhole>
  struct Rows {
    int valid, tiles;
    __device__ __forceinline__ bool has(int row) const { return kIsWhole || row < valid; }
    __device__ __forceinline__ bool has_tile(int tile) const { return kIsWhole || tile < tiles; }
    // A row of channels from `column` on, of `columns` that there are, at a valid address.
    __device__ __forceinline__ bool has(int row, int column, int columns) const {
      return kIsWhole || (row < valid && column < columns);
    }
  };
  template <typename Visit>
  __device__ __forceinline__ static auto with_rows(const Group& group, Visit visit) {
    return group.is_whole ? visit(Rows<true>{}) : visit(Rows<false>{group.valid, group.tiles});
  }

  // K.

  // Token of the sequence that is a sample of it, if it has so many.
  __device__ __forceinline__ int sampled_token(const Group& group, int sample) const {
    return group.seqlen < kSamples ? sample
                                   : static_cast<int64_t>(sample) * group.seqlen / kSamples;
  }
  __device__ __forceinline__ void fetch_keys(const Group& group) {
    if (!group.is_active()) return;
    const Element* keys = static_cast<const Element*>(p_.key) + group.key_at;
    with_rows(group, [&](auto rows) {
      const Element* from = keys + key_row() * p_.key_stride_n + key_column();
#pragma unroll
      for (int i = 0; i < S::kRounds; i++) {
        const bool is_inside = rows.has(i * S::kRowsAtOnce + key_row(), key_column(), p_.head_dim);
        Vector8<Element>::fetch(shared_.slots + i * S::kParts, is_inside ? from : p_.key,
                                is_inside);
        from += S::kRowsAtOnce * p_.key_stride_n;
      }
    });
    if (!p_.smooth_key || key_row() >= S::kRowsSampled) return;
#pragma unroll
    for (int i = 0; i < S::kSampleRounds; i++) {
      const int sample = i * S::kRowsSampled + key_row();
      const bool is_inside = sample < group.seqlen && key_column() < p_.head_dim;
      const int64_t row = sampled_token(group, sample) - group.first;
      Vector8<Element>::fetch(shared_.slots + S::kSampleSlot + i * S::kParts,
                              is_inside ? keys + row * p_.key_stride_n + key_column() : p_.key,
                              is_inside);
    }
  }

  __device__ __forceinline__ void rotate_key(Vector8<Element>& x, const Group& group, int token) {
    if constexpr (kPairing != Pairing::kNone) {
      const int inside = min(token, group.seqlen - 1);
      const Angles angles = angles_of(p_.key_rotary, group.batch, inside, key_column());
      rotate<kPairing, kWidth>(x, p_.key_rotary, angles, group.batch, group.head, inside,
                               key_column());
    }
  }

  // Codes and scales of the keys that have come; those of the next group are asked for.
  __device__ __forceinline__ void prepare_keys(const Group& group, const Group& next) {
    // For fp32 there are not the registers: it is read from shared memory whenever it is needed.
    constexpr bool kHolds = sizeof(Element) == 2;
    Vector8<Element> k[kHolds ? S::kRounds : 1], samples[S::kSampleRounds];
    const auto key = [&](int i) -> const Vector8<Element>& {
      if constexpr (!kHolds) k[0].take(shared_.slots + i * S::kParts);
      return k[kHolds ? i : 0];
    };
    if constexpr (kHolds) {
#pragma unroll
      for (int i = 0; i < S::kRounds; i++) k[i].take(shared_.slots + i * S::kParts);
    }
#pragma unroll
    for (int i = 0; i < S::kSampleRounds; i++)
      samples[i].take(shared_.slots + S::kSampleSlot + i * S::kParts);
    forget();
    if constexpr (kHolds) fetch_keys(next);
    forget();
    if (!group.is_active()) return;
    if constexpr (kHolds) {
#pragma unroll
      for (int i = 0; i < S::kRounds; i++)
        rotate_key(k[i], group, group.first + i * S::kRowsAtOnce + key_row());
    }

    if (thread_ < S::kScaleBlocks * 4) shared_.key_amax[thread_ / 4][thread_ % 4] = 0;
    find_key_mean(group, samples);
    if (group.first == 0 && thread_ < p_.key_mean_columns)
      p_.kv.key_mean[group.mean * p_.key_mean_columns + thread_] = shared_.key_mean[thread_];
    float mean[8];
#pragma unroll
    for (int c = 0; c < 8; c++) mean[c] = shared_.key_mean[key_column() + c];

    // Amax. Rows of a thread share (row % 8) / 2, the index of their scale.
    constexpr int kRoundsPerScale = S::kRounds / S::kScaleBlocks;
    const int scale_index = key_row() % 8 / 2;
    with_rows(group, [&](auto rows) {
#pragma unroll
      for (int part = 0; part < S::kScaleBlocks; part++) {
        Range8<Element> range;
#pragma unroll
        for (int i = part * kRoundsPerScale; i < (part + 1) * kRoundsPerScale; i++)
          if (rows.has(i * S::kRowsAtOnce + key_row())) range.include(key(i));
        // Subtraction rounds monotonically: the extremes of x - mean are those of x.
        float amax = 0;
        if (rows.has(part * kKeyBlock128 + key_row())) {
#pragma unroll
          for (int c = 0; c < 8; c++)
            amax = larger_of(
                amax, larger_of(fabsf(range.low[c] - mean[c]), fabsf(range.high[c] - mean[c])));
        }
        uint32_t bits = __float_as_uint(amax);  // as integers, NaN is the largest
        if constexpr (S::kLanes >= 16) bits = max(bits, __shfl_xor_sync(~0u, bits, 16));
#pragma unroll
        for (int step = 8; step >= 1; step >>= 1)
          bits = max(bits, __shfl_xor_sync(~0u, bits, step));
        if (lane() % 16 == 0) atomicMax(&shared_.key_amax[part][scale_index], bits);
      }
    });
    __syncthreads();

    // Codes. Blocks of a cluster may lie behind the end.
    if (thread_ < S::kScaleBlocks * 4 && thread_ / 4 < group.tiles / 2)
      p_.kv.key_scales[(group.first_tile / 2 + group.first / kKeyBlock128) * 4 + thread_] =
          key_scale(thread_ / 4, thread_ % 4).scale;
    int8_t* image = p_.kv.key_codes + group.image_at;
    with_rows(group, [&](auto rows) {
      float inverse = 0;
#pragma unroll
      for (int i = 0; i < S::kRounds; i++) {
        if (i % kRoundsPerScale == 0) inverse = key_scale(i / kRoundsPerScale, scale_index).inverse;
        const int row = i * S::kRowsAtOnce + key_row();
        const Vector8<Element>& x = key(i);
        float scaled[8];
#pragma unroll
        for (int c = 0; c < 8; c++) scaled[c] = __fmul_rn(x[c] - mean[c], inverse);
        const uint2 codes = rows.has(row) ? codes_of(scaled) : make_uint2(0, 0);
        if (rows.has_tile(row / kKeyTile))
          *reinterpret_cast<uint2*>(image + sm90::image_place<kWidth>(row, key_column())) = codes;
      }
    });
  }

  __device__ __forceinline__ ScaleAndInverse key_scale(int block, int index) const {
    return scale_and_inverse_127(__uint_as_float(shared_.key_amax[block][index]));
  }

  // Leaves the mean in shared memory.
  __device__ __forceinline__ void find_key_mean(const Group& group,
                                                Vector8<Element> (&samples)[S::kSampleRounds]) {
    const int count = min(kSamples, group.seqlen);
    float mean[8] = {};
    if (p_.smooth_key) {
#pragma unroll
      for (int i = 0; i < S::kSampleRounds; i++) {
        const int sample = i * S::kRowsSampled + key_row();
        rotate_key(samples[i], group, sampled_token(group, sample));
#pragma unroll
        for (int c = 0; c < 8; c++) {
          const float x = samples[i][c] * (1.f / kSamples);
          mean[c] += sample < count ? x : 0.f;
        }
      }
    }
    if (key_row() < S::kRowsSampled) {
#pragma unroll
      for (int c = 0; c < 8; c++) shared_.samples[key_row()][key_column() + c] = mean[c];
    }
    __syncthreads();
    if (thread_ < kWidth) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < S::kRowsSampled; i++) sum += shared_.samples[i][thread_];
      sum *= static_cast<float>(kSamples) / count;
      // Any vector will do; one that is not finite would spoil every key.
      shared_.key_mean[thread_] = is_finite(sum) ? sum : 0.f;
    }
    __syncthreads();
  }

  // V. A thread has 8 channels of 4 tokens of every 16 (2 q, 2 q + 1 and the two 8 behind), so that
  // the four codes of a channel are adjacent in the image. 16 lanes have the 64 tokens of a panel.

  // A row of the thread, less its first one.
  __device__ __forceinline__ static constexpr int value_step(int panel, int i) {
    return panel * kKeyTile + (i & 1) + (i & 2) * 4;
  }
  __device__ __forceinline__ int first_value_row() const {
    return first_panel() * kKeyTile + quad() / 4 * 16 + quad() % 4 * 2;
  }
  // Calls `visit(panel, i, address, is_inside)` for all rows of this thread; where nothing is to be
  // read, the address is valid all the same.
  template <typename Visit>
  __device__ __forceinline__ void visit_values(const Group& group, Visit visit) {
    with_rows(group, [&](auto rows) {
      const Element* from = static_cast<const Element*>(p_.value) + group.value_at +
                            first_value_row() * p_.value_stride_n + value_column();
#pragma unroll
      for (int panel = 0; panel < S::kPanels; panel++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int step = value_step(panel, i);
          const bool is_inside = rows.has(first_value_row() + step, value_column(), p_.head_dim_v);
          visit(panel, i,
                is_inside ? from + step * p_.value_stride_n : static_cast<const Element*>(p_.value),
                is_inside);
        }
    });
  }
  __device__ __forceinline__ void load_values(const Group& group) {
    if (!group.is_active()) return;
    visit_values(group, [&](int panel, int i, const Element* from, bool is_inside) {
      v_[panel][i].load(from, is_inside);
    });
  }
  using Slot = uint4[kThreads];
  __device__ __forceinline__ Slot* value_slots(int panel, int i) {
    return shared_.slots + S::kValueSlot + (panel * 4 + i) * S::kParts;
  }
  __device__ __forceinline__ void fetch_values(const Group& group) {
    if (S::kLoadsValuesLate || !group.is_active()) return;
    visit_values(group, [&](int panel, int i, const Element* from, bool is_inside) {
      Vector8<Element>::fetch(value_slots(panel, i), from, is_inside);
    });
  }
  __device__ __forceinline__ void take_values() {
#pragma unroll
    for (int panel = 0; panel < S::kPanels; panel++)
#pragma unroll
      for (int i = 0; i < 4; i++) v_[panel][i].take(value_slots(panel, i));
  }

  // Sum and extremes of this warp's tokens in the channel value_column() + lane() % 8, where NaN
  // passes through all of them.
  __device__ __forceinline__ float4 extremes(const Group& group) const {
    if (!group.is_active()) return {};
    float sum[8] = {}, low[8], high[8];
    Range8<Element> range;
    with_rows(group, [&](auto rows) {
#pragma unroll
      for (int panel = 0; panel < S::kPanels; panel++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (!rows.has(first_value_row() + value_step(panel, i))) continue;
          range.include(v_[panel][i]);
#pragma unroll
          for (int c = 0; c < 8; c++)
            sum[c] = fmaf(v_[panel][i][c], 1.f / kValueGroup, sum[c]);  // cannot overflow
        }
    });
#pragma unroll
    for (int c = 0; c < 8; c++) {
      low[c] = range.low[c];
      high[c] = range.high[c];
    }
    return {fold_16_lanes(sum, lane(), [](float a, float b) { return a + b; }),
            fold_16_lanes(low, lane(), smaller_of), fold_16_lanes(high, lane(), larger_of), 0.f};
  }
  __device__ __forceinline__ int share(const Group& group) const {
    return group.rank * S::kShares + thread_ / 32 / S::kPairs;
  }
  __device__ __forceinline__ int owned_column() const { return value_column() + lane() % 8; }

  __device__ __forceinline__ void tell(const Group& group, const float4& own) {
    if (!group.is_active()) return;
    const uint32_t barrier = shared_address(&shared_.has_extremes);
    const uint32_t place = shared_address(&shared_.extremes[share(group)][owned_column()]);
    if (thread_ == 0) {
      const int shares = group.blocks * S::kShares;
      sm90::barrier_expect(barrier, shares * sizeof(shared_.extremes[0]));
      if (group.rank == 0)
        sm90::barrier_expect(shared_address(&shared_.has_codes), shares * sizeof(shared_.codes[0]));
    }
    // Lanes 0..7 and 8..15 have the same; each tells half of the blocks.
    for (int i = lane() % 16 / 8; i < group.blocks; i += 2)
      sm90::store_async(sm90::in_block(place, group.first_rank + i), own,
                        sm90::in_block(barrier, group.first_rank + i));
  }

  // Scales and codes of V, whose sums the first block is told.
  __device__ __forceinline__ void write_values(const Group& group) {
    forget();
    sm90::barrier_wait(shared_address(&shared_.has_extremes), extremes_phase_);
    extremes_phase_ ^= 1;
    if (thread_ < kWidth) find_scale(group);
    __syncthreads();
    float code_sums[8] = {};  // where the scale is NaN the codes do not matter
    if (is_bf16()) {
      write_bf16(group);
    } else {
      write_e4m3(group, code_sums);
    }
    const float folded = fold_16_lanes(code_sums, lane(), [](float a, float b) { return a + b; });
    if (lane() % 16 < 8)
      sm90::store_async(sm90::in_block(shared_address(&shared_.codes[share(group)][owned_column()]),
                                       group.first_rank),
                        folded,
                        sm90::in_block(shared_address(&shared_.has_codes), group.first_rank));
  }
  __device__ __forceinline__ bool is_bf16() const {
    return p_.kv.value_format == ValueFormat::kBf16;
  }
  // Of a thread in an image: its part of 4 keys, one word of E4M3 and two of bf16.
  template <ValueFormat kFormat>
  __device__ __forceinline__ uint8_t* value_image(const Group& group) const {
    return p_.kv.value_codes +
           (group.image_at + first_panel() * (kKeyTile * kWidth)) * code_bytes(kFormat) +
           quad() % 4 * 4;
  }
  __device__ __forceinline__ void write_e4m3(const Group& group, float (&code_sums)[8]) {
    uint8_t* image = value_image<ValueFormat::kE4m3>(group);
    with_rows(group, [&](auto rows) {
#pragma unroll
      for (int c = 0; c < 8; c++) {
        const int column = value_column() + c;
        const float center = shared_.center[column], inverse = shared_.inverse[column];
        const int place = column * kKeyTile + sm90::swizzled<kKeyTile>(quad() / 4, column) * 16;
        __half2 code_sum = __float2half2_rn(0.f);  // exact: 4 kPanels multiples of 2^-9 up to .25
#pragma unroll
        for (int panel = 0; panel < S::kPanels; panel++) {
          float x[4];
#pragma unroll
          for (int i = 0; i < 4; i++)
            x[i] =
                rows.has(first_value_row() + value_step(panel, i)) ? v_[panel][i][c] - center : 0.f;
          __half2 low, high;
          const uint32_t codes =
              e4m3_pair(__fmul_rn(x[0], inverse), __fmul_rn(x[1], inverse), low) |
              e4m3_pair(__fmul_rn(x[2], inverse), __fmul_rn(x[3], inverse), high) << 16;
          code_sum = __hadd2(code_sum, __hadd2(low, high));
          if (rows.has_tile(first_panel() + panel))
            *reinterpret_cast<uint32_t*>(image + panel * (kKeyTile * kWidth) + place) = codes;
        }
        const float2 codes = __half22float2(code_sum);
        code_sums[c] = codes.x + codes.y;
      }
    });
  }
  // The keys of a thread stand in both halves of 16, in order. Rows and channels that there are not
  // have come as zeros: to ask for them again takes registers that fp32 does not leave.
  __device__ __forceinline__ void write_bf16(const Group& group) const {
    constexpr int kTileBytes = 2 * kKeyTile;
    uint8_t* image = value_image<ValueFormat::kBf16>(group);
#pragma unroll
    for (int c = 0; c < 8; c++) {
      const int column = value_column() + c;
      const uint32_t kept = shared_.scale[column] == 1.f ? ~0u : 0;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int chunk = quad() / 4 * 2 + half;
        const int place = column * kTileBytes + sm90::swizzled<kTileBytes>(chunk, column) * 16;
#pragma unroll
        for (int panel = 0; panel < S::kPanels; panel++) {
          const Vector8<Element>* rows = v_[panel] + 2 * half;
          if (first_panel() + panel < group.tiles)
            *reinterpret_cast<uint32_t*>(image + panel * (kTileBytes * kWidth) + place) =
                pack_halves(Dtype::kBFloat16, rows[0][c], rows[1][c]) & kept;
        }
      }
    }
  }
  // Of the thread's channel.
  __device__ __forceinline__ void find_scale(const Group& group) {
    float sum = 0, low = INFINITY, high = -INFINITY;
    const int shares = group.blocks * S::kShares;
#pragma unroll
    for (int i = 0; i < shares; i++) {
      const float4 told = shared_.extremes[i][thread_];
      sum += told.x;
      low = smaller_of(low, told.y);
      high = larger_of(high, told.z);
    }
    const float average = sum * (static_cast<float>(kValueGroup) / group.count);
    const float center = p_.smooth_value ? average : 0.f;
    // Subtraction rounds monotonically: the extremes of x - center are those of x.
    ScaleAndInverse scale =
        scale_and_inverse(larger_of(fabsf(low - center), fabsf(high - center)), kValueMax);
    if (is_bf16()) scale.scale = scale.scale == scale.scale ? 1.f : NAN;
    shared_.average[thread_] = average;
    shared_.center[thread_] = center;
    shared_.scale[thread_] = scale.scale;
    shared_.inverse[thread_] = scale.inverse;
    if (group.rank == 0) p_.kv.value_scales[group_at(group) + thread_] = scale.scale;
  }
  // What is only known when all blocks have written their codes.
  __device__ __forceinline__ void finish(const Group& group) {
    if (!group.is_active() || group.rank != 0) return;
    sm90::barrier_wait(shared_address(&shared_.has_codes), codes_phase_);
    codes_phase_ ^= 1;
    if (thread_ < kWidth) find_shift(group);
  }
  // Of the thread's channel.
  __device__ __forceinline__ void find_shift(const Group& group) {
    float total = 0;
    for (int i = 0; i < group.blocks * S::kShares; i++) total += shared_.codes[i][thread_];
    p_.kv.value_shift[group_at(group) + thread_] =
        is_bf16() ? 0.f
                  : fmaf(-shared_.scale[thread_] / group.count, total, shared_.average[thread_]);
  }
  __device__ __forceinline__ static int64_t group_at(const Group& group) {
    return (group.first_group + group.number) * kWidth;
  }

  const PrepareParams& p_;
  Memory& shared_;
  int thread_;
  int extremes_phase_ = 0, codes_phase_ = 0;
  Vector8<Element> v_[S::kPanels][4];
};

// The first `key_blocks` blocks prepare `groups` groups; those behind have other work.
template <int kWidth, typename Element, Pairing kPairing, bool kIsPacked>
__global__ void __launch_bounds__(kThreads, 1)
    prepare_kv_kernel(const __grid_constant__ PrepareParams p, int key_blocks, int groups) {
  using Worker = Preparer<kWidth, Element, kPairing>;
  extern __shared__ __align__(16) uint8_t memory[];
  sm90::let_next_kernel_start();
  if (p.work_counter != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *p.work_counter = 0;
  if (blockIdx.x >= key_blocks) {  // whole clusters
    const int rest = blockIdx.x - key_blocks;
    if constexpr (kPairing != Pairing::kNone) prepare_query<kPairing, kWidth, Element>(p, rest);
    if constexpr (kIsPacked) fill_unattended<kThreads, Element>(p.packed_output, p.kv.packed, rest);
    return;
  }
  const cg::cluster_group cluster = cg::this_cluster();
  const int size = cluster.num_blocks(), rank = cluster.block_rank();
  Worker(p, *reinterpret_cast<typename Worker::Memory*>(memory))
      .run(blockIdx.x / size, key_blocks / size, groups, [&](int index) {
        if constexpr (kIsPacked) {
          return group_of_packed<Worker::S::kTokens>(p, index, rank, size);
        } else {
          return group_of_batch<Worker::S::kBlocks>(p, index, rank);
        }
      });
}

// Clusters of blocks that can run at once on the current device.
int resident_clusters(const void* kernel, const cudaLaunchConfig_t& config, unsigned size) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, unsigned>, int> known;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  int& clusters = known[{kernel, device, size}];
  if (clusters == 0)
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config),
               "cudaOccupancyMaxActiveClusters");
  return clusters;
}

template <int kWidth, typename Element, Pairing kPairing, bool kIsPacked = false>
void launch(const PrepareParams& p, cudaStream_t stream) {
  using S = Share<kWidth, Element>;
  unsigned size = S::kBlocks;
  if constexpr (kIsPacked) {
    const unsigned longest = p.kv.packed.longest;
    // Two at least: to memcheck a block that is alone in its cluster cannot write to itself.
    size = std::clamp(std::bit_ceil((longest + S::kTokens - 1) / S::kTokens), 2u, size);
  }
  static_assert(sizeof(Shared<S, kWidth>) <= 227 << 10);
  const auto kernel = prepare_kv_kernel<kWidth, Element, kPairing, kIsPacked>;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {size, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(size);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = sizeof(Shared<S, kWidth>);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  sizeof(Shared<S, kWidth>)),
             "cudaFuncSetAttribute");
  const int64_t groups = p.kv.groups * p.batch * p.heads;
  const int64_t clusters = std::min<int64_t>(
      groups, resident_clusters(reinterpret_cast<const void*>(kernel), config, size));
  const auto whole_clusters = [&](int64_t blocks) { return (blocks + size - 1) / size * size; };
  const int64_t key_blocks = clusters * size;
  int64_t grid = key_blocks;
  if constexpr (kPairing != Pairing::kNone) grid += whole_clusters(query_blocks(p));
  if constexpr (kIsPacked)
    grid += whole_clusters((p.packed_output.queries.rows + kThreads - 1) / kThreads);
  config.gridDim = dim3(static_cast<unsigned>(grid));
  // Not <<<>>>: an error would have to be read from where others leave theirs.
  check_cuda(cudaLaunchKernelEx(&config, kernel, p, static_cast<int>(key_blocks),
                                static_cast<int>(groups)),
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
