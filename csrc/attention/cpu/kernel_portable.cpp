// Any CPU: vectors of four floats in the GNU vector extension, which is SSE2 on x86-64 and NEON on
// AArch64. Both products are plain fp32; the dot product of codes stays exact, as its partial sums
// are below 2^24 up to head_dim 1040 (algorithm.md E5).

#include "attention/cpu/main_loop.h"

namespace torch_sage {
namespace {

struct Portable {
  using Float = float __attribute__((vector_size(16)));
  using Int = int32_t __attribute__((vector_size(16)));
  using Acc = Float;
  using Words = Float;
  using Sum = Float;

  static constexpr int kLanes = 4;
  static constexpr int kRows = 4;
  static constexpr int kCols = 2;
  static constexpr int kDepth = 1;
  static constexpr int kPair = 1;
  static constexpr int kKeyOffset = 0;

  static Float load(const float* p) {
    Float v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Float v) { std::memcpy(p, &v, sizeof v); }
  static Float splat(float x) { return Float{x, x, x, x}; }
  static Float add(Float a, Float b) { return a + b; }
  static Float sub(Float a, Float b) { return a - b; }
  static Float mul(Float a, Float b) { return a * b; }
  static Float max(Float a, Float b) { return a > b ? a : b; }
  static float max_lanes(Float v) {
    const float a = v[0] > v[1] ? v[0] : v[1];
    const float b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  }

  // 2^x for x <= 0 or NaN; 0 below 2^-126.
  static Float exp2(Float x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the sum's last bits are x as an integer
    const Float clamped = x < -126.0f ? Float{} - 126.0f : x;
    const Float shifted = clamped + kRound;
    const Float r = clamped - (shifted - kRound);
    // Least maximal relative error on [-1/2, 1/2] with 2^0 exact: 2.9e-6.
    Float p = 0.00958285294f * r + 0.0559064262f;
    p = p * r + 0.240240991f;
    p = p * r + 0.693124175f;
    p = p * r + 1.0f;
    const Int exponent = ((Int)shifted << 23) + (127 << 23);
    return x < -126.0f ? Float{} : p * (Float)exponent;
  }

  static Words load_words(const uint32_t* p) {
    Words v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static Words splat_word(const uint32_t* p) { return splat(float_of(*p)); }

  static Acc start(int32_t) { return Acc{}; }
  static Acc dot(Acc acc, Words key, Words query) { return acc + key * query; }
  static Float to_float(Acc acc) { return acc; }
  static Float accumulate(Float acc, Words value, Words p) { return acc + value * p; }

  static Sum zero_sum() { return Sum{}; }
  static float sum_lanes(Sum v) { return (v[0] + v[1]) + (v[2] + v[3]); }

  // p rounded to bf16, ties to even; returns the sum of what was stored.
  static Sum store_rounded(uint32_t* words, Float p, Sum sum) {
    const Int bits = (Int)p;
    const Int rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff;
    const Float kept = p == p ? (Float)rounded : p;
    std::memcpy(words, &kept, sizeof kept);
    return sum + kept;
  }

  static void encode_query(const int8_t* codes, int64_t bytes, uint32_t* words) {
    for (int64_t d = 0; d < bytes; ++d) words[d] = bits_of(codes[d]);
  }
  static void encode_key(const int8_t* codes, int64_t bytes, uint32_t* words) {
    encode_query(codes, bytes, words);
  }

  // Rows of kLanes keys to columns: to[c][r] = from[r][c] for c < columns.
  static void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride,
                        int64_t columns) {
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = 0; r < kLanes; ++r) to[c * to_stride + r] = from[r * from_stride + c];
    }
  }
};

}  // namespace

const CpuKernel kPortableKernel = kernel_of<Portable>();

}  // namespace torch_sage
