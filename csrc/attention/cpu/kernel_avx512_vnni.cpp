// AVX-512 with VNNI but without BF16 (Cascade Lake, Ice Lake): P*V in fp32 on bf16 values.

#include "attention/cpu/avx512.h"
#include "attention/cpu/main_loop.h"

namespace torch_sage {
namespace {

struct Avx512Vnni : Avx512 {
  using Sum = __m512;

  static constexpr int kPair = 1;

  static Float accumulate(Float acc, Words value, Words p) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(value), _mm512_castsi512_ps(p), acc);
  }

  static Sum zero_sum() { return _mm512_setzero_ps(); }

  // p rounded to bf16, ties to even; returns the sum of what was stored.
  static Sum store_rounded(uint32_t* words, Float p, Sum sum) {
    // Any NaN becomes the one whose rounding cannot carry into the sign.
    const __m512i quiet = _mm512_set1_epi32(0x7fc00000);
    const __m512i bits = _mm512_min_epu32(
        _mm512_and_si512(_mm512_castps_si512(p), _mm512_set1_epi32(0x7fffffff)), quiet);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i carried =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i rounded =
        _mm512_and_si512(carried, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    _mm512_storeu_si512(words, rounded);
    return _mm512_add_ps(sum, _mm512_castsi512_ps(rounded));
  }
};

}  // namespace

const CpuKernel kAvx512VnniKernel = kernel_of<Avx512Vnni>();

}  // namespace torch_sage
