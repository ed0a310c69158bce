// What both AVX-512 kernels share: vectors of 16, the INT8 dot product of VNNI, 2^x, transposition.
//
// vpdpbusd multiplies unsigned by signed bytes, so keys are stored as k + 128 and a dot product
// starts from -128 * (sum of the query's codes): still exact.
#pragma once

// GCC 12 takes the "undefined" operand inside its own intrinsics for a mistake (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>

namespace torch_sage {
namespace {

struct Avx512 {
  using Float = __m512;
  using Acc = __m512i;
  using Words = __m512i;

  static constexpr int kLanes = 16;
  static constexpr int kRows = 6;  // 24 accumulators, 4 vectors across, 1 word: 29 of 32 registers
  static constexpr int kCols = 4;
  static constexpr int kDepth = 4;
  static constexpr int kKeyOffset = 128;

  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static Float splat(float x) { return _mm512_set1_ps(x); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static float max_lanes(Float v) { return _mm512_reduce_max_ps(v); }
  static float sum_lanes(Float v) { return _mm512_reduce_add_ps(v); }

  // 2^x for x <= 0 or NaN: 2^(x - floor(x)) by a polynomial, 2^floor(x) by vscalefps.
  static Float exp2(Float x) {
    constexpr int kMinusFloor = 0x09;  // no fraction bits, round down, no exceptions
    const Float r = _mm512_reduce_ps(x, kMinusFloor);
    // Least maximal relative error on [0, 1] with 2^0 exact: 2.9e-6.
    Float p = _mm512_fmadd_ps(splat(0.0134266866f), r, splat(0.0522424690f));
    p = _mm512_fmadd_ps(p, r, splat(0.241280213f));
    p = _mm512_fmadd_ps(p, r, splat(0.693044841f));
    p = _mm512_fmadd_ps(p, r, splat(1.0f));
    return _mm512_scalef_ps(p, x);
  }

  static Words load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static Words splat_word(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }

  static Acc start(int32_t sum) { return _mm512_set1_epi32(sum); }
  // Not the intrinsic: GCC 12 spills the 24 accumulators of its loop, at 2.3 times the time.
  static Acc dot(Acc acc, Words key, Words query) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(key), "v"(query));
    return acc;
  }
  static Float to_float(Acc acc) { return _mm512_cvtepi32_ps(acc); }

  static void encode_query(const int8_t* codes, int64_t bytes, uint32_t* words) {
    std::memcpy(words, codes, bytes);
  }
  // Rows of keys end at a whole vector: what lies behind the codes may be written.
  static void encode_key(const int8_t* codes, int64_t bytes, uint32_t* words) {
    for (int64_t i = 0; i < bytes; i += 64) {
      const __mmask64 valid = bytes - i < 64 ? (uint64_t{1} << (bytes - i)) - 1 : ~uint64_t{0};
      const __m512i vector = _mm512_maskz_loadu_epi8(valid, codes + i);
      _mm512_storeu_si512(
          words + i / kDepth,
          _mm512_xor_si512(vector, _mm512_set1_epi8(static_cast<char>(kKeyOffset))));
    }
  }

  // to[c][r] = from[r][c] for 16 rows and c < columns; whole vectors of `from` are readable.
  static void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride,
                        int64_t columns) {
    __m512i row[16], pair[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) row[r] = load_words(from + r * from_stride);
    // 2x2 blocks of words, then of word pairs, then of 128-bit lanes, twice.
#pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
      pair[r] = _mm512_unpacklo_epi32(row[r], row[r + 1]);
      pair[r + 1] = _mm512_unpackhi_epi32(row[r], row[r + 1]);
    }
    // row[4 i + c]: columns c, c + 4, c + 8, c + 12 (one per lane) of rows 4 i .. 4 i + 3.
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) {
      row[r] = _mm512_unpacklo_epi64(pair[r], pair[r + 2]);
      row[r + 1] = _mm512_unpackhi_epi64(pair[r], pair[r + 2]);
      row[r + 2] = _mm512_unpacklo_epi64(pair[r + 1], pair[r + 3]);
      row[r + 3] = _mm512_unpackhi_epi64(pair[r + 1], pair[r + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512i low01 = _mm512_shuffle_i32x4(row[c], row[4 + c], 0x44);
      const __m512i high01 = _mm512_shuffle_i32x4(row[c], row[4 + c], 0xee);
      const __m512i low23 = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0x44);
      const __m512i high23 = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0xee);
      pair[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
      pair[4 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
      pair[8 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
      pair[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) {
      if (c < columns) _mm512_storeu_si512(to + c * to_stride, pair[c]);
    }
  }
};

}  // namespace
}  // namespace torch_sage
