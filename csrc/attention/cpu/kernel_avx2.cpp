// AVX2 with FMA: no byte dot product that cannot saturate, so codes are widened to 16 bits and
// multiplied by vpmaddwd, two channels a word; P*V in fp32 on bf16 values.

#include <immintrin.h>

#include "attention/cpu/main_loop.h"

namespace torch_sage {
namespace {

struct Avx2 {
  using Float = __m256;
  using Acc = __m256i;
  using Words = __m256i;
  using Sum = __m256;

  static constexpr int kLanes = 8;
  static constexpr int kRows = 6;  // 12 accumulators, 2 vectors across, 1 word: 15 of 16 registers
  static constexpr int kCols = 2;
  static constexpr int kDepth = 2;
  static constexpr int kPair = 1;
  static constexpr int kKeyOffset = 0;

  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static Float splat(float x) { return _mm256_set1_ps(x); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static float max_lanes(Float v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static float sum_lanes(Float v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }

  // 2^x for x <= 0 or NaN; 0 below 2^-126.
  static Float exp2(Float x) {
    const Float least = splat(-126.0f);
    const Float clamped = _mm256_max_ps(least, x);  // a NaN x stays
    const Float whole = _mm256_round_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Float r = sub(clamped, whole);
    // Least maximal relative error on [-1/2, 1/2] with 2^0 exact: 2.9e-6.
    Float p = _mm256_fmadd_ps(splat(0.00958285294f), r, splat(0.0559064262f));
    p = _mm256_fmadd_ps(p, r, splat(0.240240991f));
    p = _mm256_fmadd_ps(p, r, splat(0.693124175f));
    p = _mm256_fmadd_ps(p, r, splat(1.0f));
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    const Float power =
        _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_castps_si256(splat(1.0f))));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, least, _CMP_LT_OQ), mul(p, power));
  }

  static Words load_words(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Words splat_word(const uint32_t* p) { return _mm256_set1_epi32(static_cast<int>(*p)); }

  static Acc start(int32_t sum) { return _mm256_set1_epi32(sum); }
  // Not the intrinsic: GCC 12 spills the 12 accumulators of its loop.
  static Acc dot(Acc acc, Words key, Words query) {
    asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(_mm256_madd_epi16(key, query)));
    return acc;
  }
  static Float to_float(Acc acc) { return _mm256_cvtepi32_ps(acc); }
  static Float accumulate(Float acc, Words value, Words p) {
    return _mm256_fmadd_ps(_mm256_castsi256_ps(value), _mm256_castsi256_ps(p), acc);
  }

  static Sum zero_sum() { return _mm256_setzero_ps(); }

  // p rounded to bf16, ties to even; returns the sum of what was stored.
  static Sum store_rounded(uint32_t* words, Float p, Sum sum) {
    // Any NaN becomes the one whose rounding cannot carry into the sign.
    const __m256i quiet = _mm256_set1_epi32(0x7fc00000);
    const __m256i bits = _mm256_min_epu32(
        _mm256_and_si256(_mm256_castps_si256(p), _mm256_set1_epi32(0x7fffffff)), quiet);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i carried =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i rounded =
        _mm256_and_si256(carried, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), rounded);
    return _mm256_add_ps(sum, _mm256_castsi256_ps(rounded));
  }

  static void encode_query(const int8_t* codes, int64_t bytes, uint32_t* words) {
    for (int64_t i = 0; i < bytes / 2; ++i) {
      words[i] = static_cast<uint16_t>(codes[2 * i]) |
                 uint32_t{static_cast<uint16_t>(codes[2 * i + 1])} << 16;
    }
  }
  static void encode_key(const int8_t* codes, int64_t bytes, uint32_t* words) {
    encode_query(codes, bytes, words);
  }

  // to[c][r] = from[r][c] for 8 rows and c < columns; whole vectors of `from` are readable.
  static void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride,
                        int64_t columns) {
    __m256i row[8], pair[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) row[r] = load_words(from + r * from_stride);
    // 2x2 blocks of words, then of word pairs, then of 128-bit lanes.
#pragma GCC unroll 4
    for (int r = 0; r < 8; r += 2) {
      pair[r] = _mm256_unpacklo_epi32(row[r], row[r + 1]);
      pair[r + 1] = _mm256_unpackhi_epi32(row[r], row[r + 1]);
    }
#pragma GCC unroll 2
    for (int r = 0; r < 8; r += 4) {
      row[r] = _mm256_unpacklo_epi64(pair[r], pair[r + 2]);
      row[r + 1] = _mm256_unpackhi_epi64(pair[r], pair[r + 2]);
      row[r + 2] = _mm256_unpacklo_epi64(pair[r + 1], pair[r + 3]);
      row[r + 3] = _mm256_unpackhi_epi64(pair[r + 1], pair[r + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      pair[c] = _mm256_permute2x128_si256(row[c], row[4 + c], 0x20);
      pair[4 + c] = _mm256_permute2x128_si256(row[c], row[4 + c], 0x31);
    }
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) {
      if (c < columns) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c * to_stride), pair[c]);
      }
    }
  }
};

}  // namespace

const CpuKernel kAvx2Kernel = kernel_of<Avx2>();

}  // namespace torch_sage
