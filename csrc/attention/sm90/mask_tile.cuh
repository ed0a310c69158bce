// The mask of a step: fetched by a thread before its scores are there, then added to them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/quad.cuh"
#include "attention/sm90/params.h"
#include "attention/sm90/result.cuh"
#include "attention/sm90/work.cuh"
#include "quantize/cuda/rules.cuh"

namespace torch_sage::sm90 {

// Elements of a row that lie side by side are read 16 bytes at a time: 8 of 16 bits, which a quad
// hands round so that each lane gets the two columns of its scores, or 16 bools, of which it keeps
// the bits of the whole row. Of fp32 a lane reads its own pairs, one row behind the other.
template <class C>
class MaskTile {
 public:
  __device__ __forceinline__ void begin(const AttentionParams& p, const Work& work, int row) {
    const int bytes = element_bytes(p.mask_kind);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int inside = min(row + 8 * h, p.seqlen_q - 1);  // rows behind it are never stored
      rows_[h] =
          static_cast<const char*>(p.mask) +
          (work.batch * p.mask_stride_b + work.head * p.mask_stride_h + inside * p.mask_stride_n) *
              bytes;
    }
  }

  __device__ __forceinline__ void fetch(const AttentionParams& p, int first_key, int quad) {
    if (is_dense(p, first_key)) {
      fetch_all<true>(p, first_key, quad);
    } else {
      fetch_all<false>(p, first_key, quad);
    }
  }

  // Scores s become logits, -inf where hidden; `scale` is never NaN.
  __device__ __forceinline__ void add(const AttentionParams& p, int first_key, int quad,
                                      const float (&scale)[2], int (&s)[C::kKeys / 2]) {
    if (p.mask_kind == MaskKind::kBool) {
      add_bools(quad, scale, s);
    } else if (p.mask_kind == MaskKind::kFloat32) {
      add_floats(0, scale, s);
      if (is_dense(p, first_key)) {
        fetch_floats<true>(p, 1, first_key, quad);
      } else {
        fetch_floats<false>(p, 1, first_key, quad);
      }
      add_floats(1, scale, s);
    } else if (p.mask_kind == MaskKind::kBFloat16) {
      add_halves<__nv_bfloat162>(quad, scale, s);
    } else {
      add_halves<__half2>(quad, scale, s);
    }
  }

 private:
  static constexpr int kRowWords = C::kKeys / 8;  // of 16-bit elements; of bools, half of that
  static constexpr float kBiasUnit = kLog2E / kMaskedUnit;

  __device__ __forceinline__ static int element_bytes(MaskKind kind) {
    return kind == MaskKind::kBool ? 1 : kind == MaskKind::kFloat32 ? 4 : 2;
  }

  // Whether the step's keys exist and those of a row lie side by side.
  __device__ __forceinline__ static bool is_dense(const AttentionParams& p, int first_key) {
    return p.mask_is_dense && first_key + C::kKeys <= p.kv.seqlen;
  }

  template <bool kIsDense>
  __device__ __forceinline__ void fetch_all(const AttentionParams& p, int first_key, int quad) {
    if (p.mask_kind == MaskKind::kBool) {
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < kRowWords / 2; i += 4)
          fetch_words<1, kIsDense>(p, h, h * kRowWords / 2 + i,
                                   first_key + C::kKeys / 4 * quad + 4 * i);
    } else if (p.mask_kind == MaskKind::kFloat32) {
      fetch_floats<kIsDense>(p, 0, first_key, quad);
    } else {
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < kRowWords; i += 4)
          fetch_words<2, kIsDense>(p, h, h * kRowWords + i, first_key + 8 * (i + quad));
    }
  }

  // 16 bytes of the row from `column` on.
  template <int kBytes, bool kIsDense>
  __device__ __forceinline__ void fetch_words(const AttentionParams& p, int h, int first_word,
                                              int column) {
    using Element = std::conditional_t<kBytes == 1, uint8_t, uint16_t>;
    const Element* row = reinterpret_cast<const Element*>(rows_[h]);
    if constexpr (kIsDense) {
      const uint4 x = __ldg(reinterpret_cast<const uint4*>(row + column));
      words_[first_word] = x.x;
      words_[first_word + 1] = x.y;
      words_[first_word + 2] = x.z;
      words_[first_word + 3] = x.w;
      return;
    }
    const uint32_t hidden = kBytes == 1 ? 0 : p.mask_kind == MaskKind::kBFloat16 ? 0xff80 : 0xfc00;
    constexpr int kPerWord = 4 / kBytes;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t word = 0;
#pragma unroll
      for (int k = 0; k < kPerWord; k++) {
        const int at = column + i * kPerWord + k;
        const uint32_t element =
            at < p.kv.seqlen ? static_cast<uint32_t>(__ldg(row + at * p.mask_stride_m)) : hidden;
        word |= element << 8 * kBytes * k;
      }
      words_[first_word + i] = word;
    }
  }

  template <bool kIsDense>
  __device__ __forceinline__ void fetch_floats(const AttentionParams& p, int h, int first_key,
                                               int quad) {
    const float* row = reinterpret_cast<const float*>(rows_[h]);
#pragma unroll
    for (int j = 0; j < C::kKeys / 8; j++) {
      const int column = first_key + 8 * j + 2 * quad;
      if constexpr (kIsDense) {
        const uint2 x = __ldg(reinterpret_cast<const uint2*>(row + column));
        words_[2 * j] = x.x;
        words_[2 * j + 1] = x.y;
      } else {
#pragma unroll
        for (int b = 0; b < 2; b++)
          words_[2 * j + b] = __float_as_uint(
              column + b < p.kv.seqlen ? __ldg(row + (column + b) * p.mask_stride_m) : -INFINITY);
      }
    }
  }

  __device__ __forceinline__ static void add_bias(int& s, float scale, float bias) {
    s = __float_as_int(fmaf(__int2float_rn(s), scale, bias * kBiasUnit));
  }

  __device__ __forceinline__ void add_bools(int quad, const float (&scale)[2],
                                            int (&s)[C::kKeys / 2]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      // Bits of the columns that this lane has read, then of all: 32 to a word.
      constexpr int kWords = C::kKeys / 32;
      uint32_t mine = 0, bits[kWords];
#pragma unroll
      for (int i = 0; i < kRowWords / 2; i += 2) {
        const uint32_t low = words_[h * kRowWords / 2 + i],
                       high = words_[h * kRowWords / 2 + i + 1];
        mine |= __dp4a(high, 0x80402010u, __dp4a(low, 0x08040201u, 0u)) << 4 * i;
      }
      if constexpr (kWords == 2) {  // 16 bits to a lane
        const uint32_t other = __shfl_xor_sync(~0u, mine, 1);
        mine = quad & 1 ? other | mine << 16 : mine | other << 16;
      }
#pragma unroll
      for (int i = 0; i < kWords; i++)
        bits[i] = __shfl_sync(~0u, mine, 4 / kWords * i, 4) >> 2 * quad;
#pragma unroll
      for (int j = 0; j < C::kKeys / 8; j++)
#pragma unroll
        for (int b = 0; b < 2; b++) {
          int& number = s[4 * j + 2 * h + b];
          const float logit = __int2float_rn(number) * scale[h];
          number = __float_as_int(bits[j / 4] >> (8 * (j % 4) + b) & 1 ? logit : -INFINITY);
        }
    }
  }

  __device__ __forceinline__ void add_floats(int h, const float (&scale)[2],
                                             int (&s)[C::kKeys / 2]) {
#pragma unroll
    for (int j = 0; j < C::kKeys / 8; j++)
#pragma unroll
      for (int b = 0; b < 2; b++)
        add_bias(s[4 * j + 2 * h + b], scale[h], __uint_as_float(words_[2 * j + b]));
  }

  template <typename Pair>
  __device__ __forceinline__ void add_halves(int quad, const float (&scale)[2],
                                             int (&s)[C::kKeys / 2]) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int i = 0; i < kRowWords; i += 4) {
        const uint32_t* words = words_ + h * kRowWords + i;
        uint32_t pairs[4] = {words[0], words[1], words[2], words[3]};
        transpose_quad(pairs, quad);
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const Pair pair = *reinterpret_cast<const Pair*>(&pairs[k]);
          add_bias(s[4 * (i + k) + 2 * h], scale[h], __low2float(pair));
          add_bias(s[4 * (i + k) + 2 * h + 1], scale[h], __high2float(pair));
        }
      }
  }

  const char* rows_[2];
  uint32_t words_[C::kKeys / 4];
};

}  // namespace torch_sage::sm90
