// Warp-wide instructions that exist from compute capability 8.0 on, and where rows lie in shared
// memory for them.
#pragma once

#include <cstdint>

#include "attention/copy_async.cuh"
#include "attention/mma/params.h"
#include "attention/shared_address.cuh"

namespace torch_sage::mma {

// Tensor cores have 4-bit products on Ampere and Ada alone; elsewhere codes are widened to 8 bits.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasInt4Products = true;
#else
constexpr bool kHasInt4Products = false;
#endif

// Byte at which 16-byte `chunk` of `row` lies: 8 rows of one chunk touch all banks once.
template <int kRowBytes>
__device__ __forceinline__ int place(int row, int chunk) {
  static_assert(kRowBytes >= 32 && (kRowBytes & (kRowBytes - 1)) == 0);
  constexpr int kRowsPerLine = kRowBytes < 128 ? 128 / kRowBytes : 1;
  constexpr int kMask = 8 / kRowsPerLine - 1;
  return row * kRowBytes + ((chunk ^ (row / kRowsPerLine & kMask)) << 4);
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

#define TORCH_SAGE_MMA(name, type, shape)                                                        \
  __device__ __forceinline__ void name(type(&d)[4], const uint32_t (&a)[4], uint32_t b0,         \
                                       uint32_t b1, const type(&c)[4]) {                         \
    asm("mma.sync.aligned." shape                                                                \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "                                        \
        "{%10, %11, %12, %13};"                                                                  \
        : TORCH_SAGE_OUT_##type(d[0]), TORCH_SAGE_OUT_##type(d[1]), TORCH_SAGE_OUT_##type(d[2]), \
          TORCH_SAGE_OUT_##type(d[3])                                                            \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1),                          \
          TORCH_SAGE_IN_##type(c[0]), TORCH_SAGE_IN_##type(c[1]), TORCH_SAGE_IN_##type(c[2]),    \
          TORCH_SAGE_IN_##type(c[3]));                                                           \
  }
#define TORCH_SAGE_OUT_int "=r"
#define TORCH_SAGE_OUT_float "=f"
#define TORCH_SAGE_IN_int "r"
#define TORCH_SAGE_IN_float "f"
TORCH_SAGE_MMA(mma_int8, int, "m16n8k32.row.col.s32.s8.s8.s32")
TORCH_SAGE_MMA(mma_int4, int, "m16n8k64.row.col.s32.s4.s4.s32")
TORCH_SAGE_MMA(mma_fp16, float, "m16n8k16.row.col.f32.f16.f16.f32")
TORCH_SAGE_MMA(mma_bf16, float, "m16n8k16.row.col.f32.bf16.bf16.f32")
TORCH_SAGE_MMA(mma_e4m3, float, "m16n8k32.row.col.f32.e4m3.e4m3.f32")
#undef TORCH_SAGE_MMA

// The same with two fp16 sums to a register.
__device__ __forceinline__ void mma_fp16_fp16(uint32_t (&d)[2], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1, const uint32_t (&c)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, "
      "{%8, %9};"
      : "=r"(d[0]), "=r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]));
}
__device__ __forceinline__ void mma_e4m3_fp16(uint32_t (&d)[2], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1, const uint32_t (&c)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, "
      "{%8, %9};"
      : "=r"(d[0]), "=r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]));
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
// Rounded to nearest even, saturated; NaN stays NaN.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint32_t packed;
  asm("{.reg .b16 l, h;\n"
      "cvt.rn.satfinite.e4m3x2.f32 l, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 h, %4, %3;\n"
      "mov.b32 %0, {l, h};}"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

}  // namespace torch_sage::mma
