// Attention by warp-wide products, one design for compute capabilities 8.0 to 12: a block has 128
// query rows, quantizes them itself, and goes through the keys in tiles of 64. K of the next tile
// is fetched while V of this one is used, and the other way round.
#pragma once

#include <type_traits>

#include "attention/mma/config.cuh"
#include "attention/mma/correction.cuh"
#include "attention/mma/instructions.cuh"
#include "attention/mma/query.cuh"
#include "attention/mma/sequence.cuh"
#include "attention/mma/softmax.cuh"
#include "attention/store.cuh"
#include "cuda/error.h"
#include "quantize/mma/tile_mean.cuh"

namespace torch_sage::mma {

// How the 16-byte chunks of a tile are shared among a block's threads.
template <int kThreads, int kRowCount, int kRowBytes>
struct Chunks {
  static constexpr int kPerRow = kRowBytes / 16, kStep = kThreads / kPerRow;
  static_assert(kStep % 8 == 0, "or a thread's places would not be at equal distances");

  __device__ __forceinline__ static int first_row() { return threadIdx.x / kPerRow; }
  __device__ __forceinline__ static int chunk() { return threadIdx.x % kPerRow; }
  // Calls `copy` with the place and the number of each row of the calling thread.
  template <typename Copy>
  __device__ __forceinline__ static void for_rows(uint32_t to, Copy copy) {
    const uint32_t first = to + place<kRowBytes>(first_row(), chunk());
#pragma unroll
    for (int row = 0; row < kRowCount; row += kStep)
      if (kRowCount % kStep == 0 || first_row() + row < kRowCount)
        copy(first + row * kRowBytes, first_row() + row);
  }
};

// One warp's rows of a block's work.
template <class C>
class Warp {
 public:
  __device__ __forceinline__ Warp(const AttentionParams& p, uint8_t* shared)
      : p_(p), shared_(shared), lane_(threadIdx.x % 32), warp_(threadIdx.x / 32) {
    Sequence s = is_packed() ? packed_sequence(p) : sequence_of_batch(p);
    const int key_head = s.head / (p.heads_q / p.heads_kv);
    // Where they are packed, all sequences share the rows of a head.
    const int64_t rows_of_head = is_packed() ? key_head : head_of_keys(s);
    const int64_t first_tile = rows_of_head * p.kv.tiles + s.first_tile(is_packed());
    key_codes_ = p.kv.key_codes + first_tile * (kKeys * C::kCodeBytes);
    key_scales_ = p.kv.key_scales + first_tile * 4 + lane_ % 4;
    const auto key_row = [&](const Rows& rows) {
      return s.index * rows.stride_b + key_head * rows.stride_h + s.key_start * rows.stride_n;
    };
    if (p.key != nullptr)
      s.key_rows = static_cast<const char*>(p.key) + key_row(p.key_rows) * (is_wide() ? 4 : 2);
    if constexpr (C::kIsE4m3) {
      values_ = static_cast<const uint8_t*>(p.kv.value_codes) +
                (rows_of_head * C::kWidth * p.kv.tiles + s.first_tile(is_packed())) * kKeys;
    } else {
      values_ = p.value + key_row(p.value_rows);
    }
    // Registers are few, and few of these are needed again.
    if (threadIdx.x == 0) *reinterpret_cast<Sequence*>(shared + C::kSequenceAt) = s;
    tiles_ = s.tiles();
    // Where sequences are packed, rows that see no key have their result already.
    has_work_ = s.first_row >= 0 && s.first_row < s.seqlen_q && (tiles_ > 0 || !is_packed());
    __syncthreads();
  }

  __device__ __forceinline__ void run() {
    if (!has_work_) return;
    softmax_.reset();
#pragma unroll
    for (int i = 0; i < C::kRowTiles; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) ones_[i][e] = 0.f;
#pragma unroll
      for (int j = 0; j < C::kWidth / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) output_[i][j][e] = 0.f;
    }
    if (tiles_ > 0) {
      fetch_keys(0);
      commit_copies();
      fetch_values(0);
      commit_copies();
    }
    quantize_query();
    for (int tile = 0; tile < tiles_; tile++) {
      const float key_scale = key_scales_[tile * 4];
      wait_for_copies<1>();
      __syncthreads();
      int sums[C::kRowTiles][kKeyColumns][4];
      multiply_keys(sums);
      if (p_.key != nullptr) correct_keys(tile);
      __syncthreads();
      if (tile + 1 < tiles_) fetch_keys(tile + 1);
      commit_copies();
      constexpr float kCodesScale = C::kIsInt4 && !kHasInt4Products ? 1.f / 256 : 1.f;
      const float factor = query_scale_ * key_scale * kCodesScale;
      float scores[C::kRowTiles][kKeyColumns][4];
      convert<C>(sums, scores);
      const bool is_masked = C::kHasMask || (tile + 1) * kKeys > sequence().first_hidden_key;
      const bool wants_sum = C::kIsE4m3 || p_.lse != nullptr;
      if (p_.key == nullptr && !is_masked) {
        softmax_.template update<false>(scores, factor, wants_sum);
      } else {
        make_logits<C>(scores, factor,
                       p_.key == nullptr ? nullptr : correction_.of_keys + lane_ % 4 * 2);
        const int row = sequence().first_row + warp_ * C::kWarpRows;
        if constexpr (C::kHasMask) {
          auto* biases = reinterpret_cast<float*>(shared_ + C::kPlainBytes + warp_ * C::kBiasBytes);
          add_mask<C>(p_, mask_of_head(), biases, row, tile * kKeys, scores);
        }
        if (is_masked) hide<C>(sequence(), row + lane_ / 4, tile * kKeys + lane_ % 4 * 2, scores);
        softmax_.template update<true>(scores, factor, wants_sum);
      }
      pack_probabilities(scores);
      wait_for_copies<1>();
      __syncthreads();
      multiply_values();
      __syncthreads();
      if (tile + 1 < tiles_) fetch_values(tile + 1);
      commit_copies();
    }
    write();
  }

 private:
  static constexpr int kSteps = C::kIsE4m3 ? 2 : 4;  // of PV: 32 or 16 keys each

  __device__ __forceinline__ bool is_wide() const { return p_.dtype == Dtype::kFloat32; }
  // No mask goes with packed sequences.
  __device__ __forceinline__ bool is_packed() const {
    return !C::kHasMask && p_.queries.starts != nullptr;
  }
  __device__ __forceinline__ const Sequence& sequence() const {
    return *reinterpret_cast<const Sequence*>(shared_ + C::kSequenceAt);
  }

  __device__ __forceinline__ uint32_t at(int offset) const {
    return shared_address(shared_) + offset;
  }

  // Of what each sequence has one per head of.
  __device__ __forceinline__ int64_t head_of_keys(const Sequence& s) const {
    return static_cast<int64_t>(s.index) * p_.heads_kv + s.head / (p_.heads_q / p_.heads_kv);
  }

  // Of element [b, h, 0, 0], in bytes.
  __device__ __forceinline__ const char* mask_of_head() const {
    const int bytes = p_.mask_kind == MaskKind::kBool      ? 1
                      : p_.mask_kind == MaskKind::kFloat32 ? 4
                                                           : 2;
    return static_cast<const char*>(p_.mask) +
           (sequence().index * p_.mask_stride_b + sequence().head * p_.mask_stride_h) * bytes;
  }

  __device__ __forceinline__ void fetch_keys(int tile) const {
    using Chunks = mma::Chunks<C::kThreads, kKeys, C::kCodeBytes>;
    const uint8_t* from = key_codes_ + static_cast<int64_t>(tile) * (kKeys * C::kCodeBytes) +
                          Chunks::first_row() * C::kCodeBytes + Chunks::chunk() * 16;
    Chunks::for_rows(at(C::kKeyAt), [&](uint32_t to, int) {
      copy_16_async(to, from, true);
      from += Chunks::kStep * C::kCodeBytes;
    });
    if (p_.key != nullptr && corrects_by_tensor_cores())
      fetch_halves(smooth_at() + C::kRawAt, reinterpret_cast<const uint16_t*>(sequence().key_rows),
                   p_.key_rows.stride_n, p_.key_columns, tile);
  }

  __device__ __forceinline__ bool corrects_by_tensor_cores() const {
    return C::kCorrectsByTensorCores && !is_wide();
  }
  __device__ __forceinline__ int smooth_at() const {
    return C::kPlainBytes + (p_.mask_kind == MaskKind::kNone ? 0 : C::kMaskBytes);
  }

  __device__ __forceinline__ void correct_keys(int tile) const {
    const bool is_bf16 = p_.dtype == Dtype::kBFloat16;
    if (corrects_by_tensor_cores()) return correction_.compute(is_bf16);
    const auto directly = [&](auto* rows) {
      correction_.compute_directly(rows + static_cast<int64_t>(tile) * kKeys * p_.key_rows.stride_n,
                                   p_.key_rows.stride_n, p_.key_columns,
                                   sequence().seqlen_k - tile * kKeys);
    };
    if (is_wide()) {
      directly(reinterpret_cast<const float*>(sequence().key_rows));
    } else if (is_bf16) {
      directly(reinterpret_cast<const __nv_bfloat16*>(sequence().key_rows));
    } else {
      directly(reinterpret_cast<const __half*>(sequence().key_rows));
    }
  }

  __device__ __forceinline__ void fetch_values(int tile) const {
    if constexpr (C::kIsE4m3) {
      using Chunks = mma::Chunks<C::kThreads, C::kWidth, kKeys>;
      const int64_t row_bytes = p_.kv.tiles * kKeys;
      const uint8_t* from =
          values_ + tile * kKeys + Chunks::first_row() * row_bytes + Chunks::chunk() * 16;
      Chunks::for_rows(at(C::kValueAt), [&](uint32_t to, int) {
        copy_16_async(to, from, true);
        from += Chunks::kStep * row_bytes;
      });
    } else {
      fetch_halves(C::kValueAt, values_, p_.value_rows.stride_n, p_.value_columns, tile);
    }
  }

  // Rows of 16-bit elements; zeros beyond the last key and the last column.
  __device__ __forceinline__ void fetch_halves(int to, const uint16_t* rows, int64_t stride,
                                               int columns, int tile) const {
    using Chunks = mma::Chunks<C::kThreads, kKeys, 2 * C::kWidth>;
    const int count = sequence().seqlen_k - tile * kKeys;
    const uint16_t* from = rows +
                           (static_cast<int64_t>(tile) * kKeys + Chunks::first_row()) * stride +
                           Chunks::chunk() * 8;
    const bool is_column = Chunks::chunk() * 8 < columns;
    Chunks::for_rows(at(to), [&](uint32_t to, int row) {
      copy_16_async(to, from, row < count && is_column);
      from += Chunks::kStep * stride;
    });
  }

  __device__ __forceinline__ void quantize_query() {
    const Sequence s = sequence();
    const int64_t first = s.index * p_.query_rows.stride_b + s.head * p_.query_rows.stride_h +
                          (s.query_start + s.first_row) * p_.query_rows.stride_n;
    const float* key_mean = p_.kv.key_mean == nullptr
                                ? nullptr
                                : p_.kv.key_mean + head_of_keys(s) * p_.key_mean_columns;
    QueryRows rows{};
    rows.first = static_cast<const char*>(p_.query) + first * (is_wide() ? 4 : 2);
    rows.valid = min(kRows, s.seqlen_q - s.first_row);
    rows.shift = p_.lse == nullptr ? nullptr : key_mean;
    rows.amax = p_.granularity == Granularity::kTensor
                    ? p_.query_amax[static_cast<int64_t>(s.index) * p_.heads_q + s.head]
                    : 0;
    rows.codes = shared_ + C::kQueryAt;
    rows.shifts = reinterpret_cast<float*>(shared_ + C::kShiftAt);
    rows.amax_of_warps = reinterpret_cast<uint32_t*>(shared_ + C::kAmaxAt);
    const float kappa = fabsf(p_.scale) * kLog2E;
    if (p_.key != nullptr) {
      uint8_t* smooth = shared_ + smooth_at();
      float* mean = reinterpret_cast<float*>(smooth + C::kMeanAt);
      // The codes of Q are not there yet.
      tile_mean<C::kWidth, C::kThreads>(rows.first, p_.dtype, p_.query_rows.stride_n, rows.valid,
                                        p_.head_dim, mean,
                                        reinterpret_cast<float*>(shared_ + C::kQueryAt));
      rows.mean = mean;
      correction_.raw = smooth + C::kRawAt;
      correction_.parts = reinterpret_cast<uint16_t*>(smooth + C::kPartsAt);
      correction_.of_keys = reinterpret_cast<float*>(smooth + C::kCorrectionAt);
      correction_.mean = mean;
      correction_.factor = p_.scale * kLog2E;
      correction_.set_mean(p_, key_mean);
    }
    query_scale_ = kappa * (is_wide() ? quantize_query_rows<C, true>(p_, rows)
                                      : quantize_query_rows<C, false>(p_, rows));
  }

  // Integer scores of the tile, seeded.
  __device__ __forceinline__ void multiply_keys(int (&sums)[C::kRowTiles][kKeyColumns][4]) const {
    constexpr int kSeeds[4] = {kSeed, kSeed, kSeed, kSeed};
#pragma unroll
    for (int step = 0; step < C::kCodeBytes / 32; step++) {
      uint32_t a[C::kRowTiles][4];
#pragma unroll
      for (int i = 0; i < C::kRowTiles; i++)
        load_matrices(
            a[i], at(C::kQueryAt) + place<C::kCodeBytes>(warp_ * C::kWarpRows + 16 * i + lane_ % 16,
                                                         2 * step + lane_ / 16));
#pragma unroll
      for (int j = 0; j < kKeyColumns; j += 2) {
        uint32_t b[4];
        load_matrices(b, at(C::kKeyAt) + place<C::kCodeBytes>(8 * j + lane_ / 16 * 8 + lane_ % 8,
                                                              2 * step + lane_ / 8 % 2));
#pragma unroll
        for (int i = 0; i < C::kRowTiles; i++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            if (step == 0) {
              multiply_codes(sums[i][j + half], a[i], b[2 * half], b[2 * half + 1], kSeeds);
            } else {
              auto& d = sums[i][j + half];
              multiply_codes(d, a[i], b[2 * half], b[2 * half + 1], d);
            }
          }
      }
    }
  }

  __device__ __forceinline__ static void multiply_codes(int (&d)[4], const uint32_t (&a)[4],
                                                        uint32_t b0, uint32_t b1,
                                                        const int (&c)[4]) {
    if constexpr (!C::kIsInt4) {
      mma_int8(d, a, b0, b1, c);
    } else if constexpr (kHasInt4Products) {
      mma_int4(d, a, b0, b1, c);
    } else {
      // Nibbles as bytes, 16 times as large: first the lower, then the upper ones.
      const auto widen = [](uint32_t word, int shift) { return word << shift & 0xf0f0f0f0u; };
      const uint32_t low[4] = {widen(a[0], 4), widen(a[1], 4), widen(a[2], 4), widen(a[3], 4)};
      const uint32_t high[4] = {widen(a[0], 0), widen(a[1], 0), widen(a[2], 0), widen(a[3], 0)};
      mma_int8(d, low, widen(b0, 4), widen(b1, 4), c);
      mma_int8(d, high, widen(b0, 0), widen(b1, 0), d);
    }
  }

  // As left operands of PV. Of E4M3, bytes of a register are keys 0 1 8 9 of 16: so V lies, too.
  __device__ __forceinline__ void pack_probabilities(
      const float (&x)[C::kRowTiles][kKeyColumns][4]) {
#pragma unroll
    for (int i = 0; i < C::kRowTiles; i++)
#pragma unroll
      for (int step = 0; step < kSteps; step++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const int h = r % 2 * 2;
          if constexpr (C::kIsE4m3) {
            const int j = 4 * step + r / 2 * 2;
            probabilities_[i][step][r] =
                pack_e4m3(x[i][j][h], x[i][j][h + 1], x[i][j + 1][h], x[i][j + 1][h + 1]);
          } else {
            const int j = 2 * step + r / 2;
            probabilities_[i][step][r] = C::kPv == Pv::kBf16
                                             ? pack_bf16(x[i][j][h], x[i][j][h + 1])
                                             : pack_fp16(x[i][j][h], x[i][j][h + 1]);
          }
        }
  }

  __device__ __forceinline__ void multiply_values() {
    if constexpr (!C::kIsE4m3) sum_rounded();
    if constexpr (!C::kFlushes) rescale();
    if constexpr (C::kIsE4m3) {
#pragma unroll
      for (int j = 0; j < C::kWidth / 8; j++) {
        uint32_t b[4];
        load_matrices(b, at(C::kValueAt) + place<kKeys>(8 * j + lane_ % 8, lane_ / 8));
#pragma unroll
        for (int i = 0; i < C::kRowTiles; i++) {
          if constexpr (C::kHasFp16Accumulator) {
            uint32_t sums[2] = {0, 0};
            mma_e4m3_fp16(sums, probabilities_[i][0], b[0], b[1], sums);
            mma_e4m3_fp16(sums, probabilities_[i][1], b[2], b[3], sums);
            flush(i, j, sums);
          } else {
            float sums[4] = {0.f, 0.f, 0.f, 0.f};
            mma_e4m3(sums, probabilities_[i][0], b[0], b[1], sums);
            mma_e4m3(sums, probabilities_[i][1], b[2], b[3], sums);
            flush(i, j, sums);
          }
        }
        hold_back(j + 1);
      }
    } else {
#pragma unroll
      for (int j = 0; j < C::kWidth / 8; j += 2) {
        uint32_t sums[C::kRowTiles][2][2] = {};
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          uint32_t b[4];
          load_transposed(
              b, at(C::kValueAt) + place<2 * C::kWidth>(16 * step + lane_ % 16, j + lane_ / 16));
#pragma unroll
          for (int i = 0; i < C::kRowTiles; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const auto& a = probabilities_[i][step];
              if constexpr (C::kHasFp16Accumulator) {
                mma_fp16_fp16(sums[i][half], a, b[2 * half], b[2 * half + 1], sums[i][half]);
              } else {
                multiply_halves(output_[i][j + half], a, b[2 * half], b[2 * half + 1]);
              }
            }
        }
        if constexpr (C::kHasFp16Accumulator) {
#pragma unroll
          for (int i = 0; i < C::kRowTiles; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) flush(i, j + half, sums[i][half]);
          hold_back(j + 2);
        }
      }
    }
  }

  // Or ptxas starts the products of all columns before it flushes the first, for which 128 channels
  // leave no registers.
  __device__ __forceinline__ static void hold_back(int columns) {
    if (C::kWidth >= 128 && columns % 8 == 0) __syncwarp();
  }

  __device__ __forceinline__ static void multiply_halves(float (&sums)[4], const uint32_t (&a)[4],
                                                         uint32_t b0, uint32_t b1) {
    if constexpr (C::kPv == Pv::kBf16) {
      mma_bf16(sums, a, b0, b1, sums);
    } else {
      mma_fp16(sums, a, b0, b1, sums);
    }
  }

  // Row sums of the probabilities as they were rounded: a product with ones.
  __device__ __forceinline__ void sum_rounded() {
    constexpr uint32_t kOnes = C::kPv == Pv::kBf16 ? 0x3F803F80u : 0x3C003C00u;
#pragma unroll
    for (int i = 0; i < C::kRowTiles; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) ones_[i][e] *= softmax_.decay[i][e / 2];
#pragma unroll
      for (int step = 0; step < kSteps; step++)
        multiply_halves(ones_[i], probabilities_[i][step], kOnes, kOnes);
    }
  }

  __device__ __forceinline__ void rescale() {
    bool is_same = true;
#pragma unroll
    for (int i = 0; i < C::kRowTiles; i++)
      is_same = is_same && softmax_.decay[i][0] == 1.f && softmax_.decay[i][1] == 1.f;
    if (__all_sync(~0u, is_same)) return;
#pragma unroll
    for (int i = 0; i < C::kRowTiles; i++)
#pragma unroll
      for (int j = 0; j < C::kWidth / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) output_[i][j][e] *= softmax_.decay[i][e / 2];
  }

  __device__ __forceinline__ void flush(int i, int j, const float (&sums)[4]) {
#pragma unroll
    for (int e = 0; e < 4; e++)
      output_[i][j][e] = fmaf(output_[i][j][e], softmax_.decay[i][e / 2], sums[e]);
  }
  __device__ __forceinline__ void flush(int i, int j, const uint32_t (&sums)[2]) {
    const float2 upper = __half22float2(reinterpret_cast<const __half2&>(sums[0]));
    const float2 lower = __half22float2(reinterpret_cast<const __half2&>(sums[1]));
    const float wide[4] = {upper.x, upper.y, lower.x, lower.y};
    flush(i, j, wide);
  }

  // Of row `row` of the block.
  __device__ __forceinline__ Place place_of(int row) const {
    const Sequence s = sequence();
    if (!is_packed()) return Place(p_, s.index, s.head, s.first_row + row, p_.seqlen_q);
    const int64_t at = s.query_start + s.first_row + row;
    char* output =
        static_cast<char*>(p_.output) +
        (s.head * p_.output_rows.stride_h + at * p_.output_rows.stride_n) * (is_wide() ? 4 : 2);
    return Place(static_cast<int64_t>(s.head) * p_.queries.rows + at, output,
                 s.seqlen_q - s.first_row - row);
  }

  __device__ __forceinline__ void write() const {
    const int64_t channels = head_of_keys(sequence()) * C::kWidth;
    const float* scales = p_.kv.value_scales == nullptr ? nullptr : p_.kv.value_scales + channels;
    const float* mean = p_.kv.value_mean == nullptr ? nullptr : p_.kv.value_mean + channels;
    const float* shifts = reinterpret_cast<const float*>(shared_ + C::kShiftAt);
    const int quad = lane_ % 4;
#pragma unroll
    for (int i = 0; i < C::kRowTiles; i++) {
      const int row = warp_ * C::kWarpRows + 16 * i + lane_ / 4;
      const Place place = place_of(row);
      const bool is_vector = stores_vectors(p_);
      const VectorStore vectors(p_, place, quad);
      float inverse[2];
      bool attends[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float sum = softmax_.sum[i][h];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const float divisor = C::kIsE4m3 ? sum : ones_[i][2 * h];
        attends[h] = divisor != 0.f;
        inverse[h] = 1.f / divisor;
        if (p_.lse != nullptr && quad == 0) {
          const float shift = p_.kv.key_mean == nullptr ? 0.f : shifts[row + 8 * h];
          store_lse(p_, place, h,
                    attends[h] ? (softmax_.top[i][h] + log2f(sum)) / kLog2E + shift : -INFINITY);
        }
      }
#pragma unroll
      for (int j = 0; j < C::kWidth / 8; j += 2) {
        if (8 * j >= p_.head_dim_v) break;
        float x[2][2][2];  // [block][row][column]
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
          for (int b = 0; b < 2; b++) {
            const int column = 8 * (j + k) + 2 * quad + b;
            const float scale = scales == nullptr ? 1.f : scales[column];
            const float rest = mean == nullptr ? 0.f : mean[column];
#pragma unroll
            for (int h = 0; h < 2; h++) {
              const float value = fmaf(output_[i][j + k][2 * h + b] * inverse[h], scale, rest);
              // Infinity becomes NaN, or it would be stored as the largest number.
              x[k][h][b] = attends[h] ? fmaf(value, 0.f, value) : 0.f;
            }
          }
        if (is_vector) {
          uint32_t pairs[2][2];
#pragma unroll
          for (int k = 0; k < 2; k++)
#pragma unroll
            for (int h = 0; h < 2; h++)
              pairs[k][h] = pack_halves(p_.dtype, x[k][h][0], x[k][h][1]);
          vectors.store(j, pairs[0], pairs[1]);
        } else {
#pragma unroll
          for (int k = 0; k < 2; k++) store_elements(p_, place, j + k, quad, x[k]);
        }
      }
    }
  }

  const AttentionParams& p_;
  uint8_t* shared_;
  const int lane_, warp_;
  int tiles_;
  bool has_work_;
  const uint8_t* key_codes_;
  const float* key_scales_;  // of the lane's keys in tile 0
  const std::conditional_t<C::kIsE4m3, uint8_t, uint16_t>* values_;
  float query_scale_;
  Correction<C> correction_;
  Softmax<C> softmax_;
  uint32_t probabilities_[C::kRowTiles][kSteps][4];
  float ones_[C::kRowTiles][4];  // unused by E4M3, whose sum is that of the unrounded ones
  float output_[C::kRowTiles][C::kWidth / 8][4];
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerProcessor)
    attention_kernel(const __grid_constant__ AttentionParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  Warp<C>(p, shared).run();
}

inline int64_t tiles_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

template <class C>
void launch_kernel(const AttentionParams& params, cudaStream_t stream) {
  const int bytes = C::shared_bytes(params);
  check_cuda(
      cudaFuncSetAttribute(attention_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
      "cudaFuncSetAttribute");
  const bool is_packed = params.queries.starts != nullptr;
  const int64_t blocks = params.heads_q * (is_packed ? params.queries.units(kRows)
                                                     : tiles_of(params.seqlen_q) * params.batch);
  attention_kernel<C><<<static_cast<unsigned>(blocks), C::kThreads, bytes, stream>>>(params);
  check_cuda(cudaGetLastError(), "launch of attention");
}

}  // namespace torch_sage::mma
