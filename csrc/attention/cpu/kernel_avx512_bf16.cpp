// AVX-512 with VNNI and BF16 (Zen 4, Sapphire Rapids): P*V by vdpbf16ps, two keys a word.

#include "attention/cpu/avx512.h"
#include "attention/cpu/main_loop.h"

namespace torch_sage {
namespace {

struct Avx512Bf16 : Avx512 {
  using Sum = __m256;

  static constexpr int kPair = 2;

  static Float accumulate(Float acc, Words value, Words p) {
    return _mm512_dpbf16_ps(acc, (__m512bh)value, (__m512bh)p);
  }

  static Sum zero_sum() { return _mm256_setzero_ps(); }
  using Avx512::sum_lanes;
  static float sum_lanes(Sum v) { return sum_lanes(_mm512_zextps256_ps512(v)); }

  // p rounded to bf16; returns the sum of what was stored, as a dot product with ones.
  static Sum store_rounded(uint32_t* words, Float p, Sum sum) {
    const __m256bh rounded = _mm512_cvtneps_pbh(p);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), (__m256i)rounded);
    constexpr int kTwoOnes = 0x3f803f80;
    return _mm256_dpbf16_ps(sum, rounded, (__m256bh)_mm256_set1_epi32(kTwoOnes));
  }
};

}  // namespace

const CpuKernel kAvx512Bf16Kernel = kernel_of<Avx512Bf16>();

}  // namespace torch_sage
