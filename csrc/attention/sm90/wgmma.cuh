// The two matrix products of the attention kernel, by their width N. In both, accumulator
// register pairs hold, for g = lane / 4 and t = lane % 4, rows g and g + 8 of a warp's 16 and
// columns 8 j + 2 t and the next: 32-bit number 4 j + 2 h + b is row g + 8 h, column 8 j + 2 t + b;
// 16-bit numbers stand in the same order, two to a register.
#pragma once

#include <cstdint>

#include "quantize/cuda/prepared.h"

namespace torch_sage::sm90 {

// s (int32, 64 x N) = or += a (int8, shared) b (int8, shared).
template <int N>
struct Scores;

// o (64 x N) = or += a (registers) b (shared): fp16 of E4M3, 32 keys; fp32 of bf16, 16 keys.
template <int N, ValueFormat kFormat>
struct Values;

template <>
struct Scores<64> {
  static constexpr int kRegisters = 32;
  __device__ __forceinline__ static void multiply(int (&s)[32], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, %32, %33, p;}"
        : "+r"(s[0]), "+r"(s[1]), "+r"(s[2]), "+r"(s[3]), "+r"(s[4]), "+r"(s[5]), "+r"(s[6]),
          "+r"(s[7]), "+r"(s[8]), "+r"(s[9]), "+r"(s[10]), "+r"(s[11]), "+r"(s[12]), "+r"(s[13]),
          "+r"(s[14]), "+r"(s[15]), "+r"(s[16]), "+r"(s[17]), "+r"(s[18]), "+r"(s[19]), "+r"(s[20]),
          "+r"(s[21]), "+r"(s[22]), "+r"(s[23]), "+r"(s[24]), "+r"(s[25]), "+r"(s[26]), "+r"(s[27]),
          "+r"(s[28]), "+r"(s[29]), "+r"(s[30]), "+r"(s[31])
        : "l"(a), "l"(b), "r"(add));
  }
};

template <>
struct Scores<128> {
  static constexpr int kRegisters = 64;
  __device__ __forceinline__ static void multiply(int (&s)[64], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, %64, %65, p;}"
        : "+r"(s[0]), "+r"(s[1]), "+r"(s[2]), "+r"(s[3]), "+r"(s[4]), "+r"(s[5]), "+r"(s[6]),
          "+r"(s[7]), "+r"(s[8]), "+r"(s[9]), "+r"(s[10]), "+r"(s[11]), "+r"(s[12]), "+r"(s[13]),
          "+r"(s[14]), "+r"(s[15]), "+r"(s[16]), "+r"(s[17]), "+r"(s[18]), "+r"(s[19]), "+r"(s[20]),
          "+r"(s[21]), "+r"(s[22]), "+r"(s[23]), "+r"(s[24]), "+r"(s[25]), "+r"(s[26]), "+r"(s[27]),
          "+r"(s[28]), "+r"(s[29]), "+r"(s[30]), "+r"(s[31]), "+r"(s[32]), "+r"(s[33]), "+r"(s[34]),
          "+r"(s[35]), "+r"(s[36]), "+r"(s[37]), "+r"(s[38]), "+r"(s[39]), "+r"(s[40]), "+r"(s[41]),
          "+r"(s[42]), "+r"(s[43]), "+r"(s[44]), "+r"(s[45]), "+r"(s[46]), "+r"(s[47]), "+r"(s[48]),
          "+r"(s[49]), "+r"(s[50]), "+r"(s[51]), "+r"(s[52]), "+r"(s[53]), "+r"(s[54]), "+r"(s[55]),
          "+r"(s[56]), "+r"(s[57]), "+r"(s[58]), "+r"(s[59]), "+r"(s[60]), "+r"(s[61]), "+r"(s[62]),
          "+r"(s[63])
        : "l"(a), "l"(b), "r"(add));
  }
};

template <>
struct Values<72, ValueFormat::kE4m3> {
  using Register = uint32_t;
  static constexpr int kRegisters = 18;
  __device__ __forceinline__ static void multiply(uint32_t* o, const uint32_t* a, uint64_t b,
                                                  int add) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %23, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n72k32.f16.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17"
        "}, {%18, %19, %20, %21}, %22, p, 1, 1;}"
        : "+r"(o[0]), "+r"(o[1]), "+r"(o[2]), "+r"(o[3]), "+r"(o[4]), "+r"(o[5]), "+r"(o[6]),
          "+r"(o[7]), "+r"(o[8]), "+r"(o[9]), "+r"(o[10]), "+r"(o[11]), "+r"(o[12]), "+r"(o[13]),
          "+r"(o[14]), "+r"(o[15]), "+r"(o[16]), "+r"(o[17])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  }
};

template <>
struct Values<128, ValueFormat::kE4m3> {
  using Register = uint32_t;
  static constexpr int kRegisters = 32;
  __device__ __forceinline__ static void multiply(uint32_t* o, const uint32_t* a, uint64_t b,
                                                  int add) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f16.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, p, 1, 1;}"
        : "+r"(o[0]), "+r"(o[1]), "+r"(o[2]), "+r"(o[3]), "+r"(o[4]), "+r"(o[5]), "+r"(o[6]),
          "+r"(o[7]), "+r"(o[8]), "+r"(o[9]), "+r"(o[10]), "+r"(o[11]), "+r"(o[12]), "+r"(o[13]),
          "+r"(o[14]), "+r"(o[15]), "+r"(o[16]), "+r"(o[17]), "+r"(o[18]), "+r"(o[19]), "+r"(o[20]),
          "+r"(o[21]), "+r"(o[22]), "+r"(o[23]), "+r"(o[24]), "+r"(o[25]), "+r"(o[26]), "+r"(o[27]),
          "+r"(o[28]), "+r"(o[29]), "+r"(o[30]), "+r"(o[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  }
};

template <>
struct Values<136, ValueFormat::kE4m3> {
  using Register = uint32_t;
  static constexpr int kRegisters = 34;
  __device__ __forceinline__ static void multiply(uint32_t* o, const uint32_t* a, uint64_t b,
                                                  int add) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %39, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n136k32.f16.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33"
        "}, {%34, %35, %36, %37}, %38, p, 1, 1;}"
        : "+r"(o[0]), "+r"(o[1]), "+r"(o[2]), "+r"(o[3]), "+r"(o[4]), "+r"(o[5]), "+r"(o[6]),
          "+r"(o[7]), "+r"(o[8]), "+r"(o[9]), "+r"(o[10]), "+r"(o[11]), "+r"(o[12]), "+r"(o[13]),
          "+r"(o[14]), "+r"(o[15]), "+r"(o[16]), "+r"(o[17]), "+r"(o[18]), "+r"(o[19]), "+r"(o[20]),
          "+r"(o[21]), "+r"(o[22]), "+r"(o[23]), "+r"(o[24]), "+r"(o[25]), "+r"(o[26]), "+r"(o[27]),
          "+r"(o[28]), "+r"(o[29]), "+r"(o[30]), "+r"(o[31]), "+r"(o[32]), "+r"(o[33])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  }
};

template <>
struct Values<72, ValueFormat::kBf16> {
  using Register = float;
  static constexpr int kRegisters = 36;
  __device__ __forceinline__ static void multiply(float* o, const uint32_t* a, uint64_t b,
                                                  int add) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %41, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35"
        "}, {%36, %37, %38, %39}, %40, p, 1, 1, 0;}"
        : "+f"(o[0]), "+f"(o[1]), "+f"(o[2]), "+f"(o[3]), "+f"(o[4]), "+f"(o[5]), "+f"(o[6]),
          "+f"(o[7]), "+f"(o[8]), "+f"(o[9]), "+f"(o[10]), "+f"(o[11]), "+f"(o[12]), "+f"(o[13]),
          "+f"(o[14]), "+f"(o[15]), "+f"(o[16]), "+f"(o[17]), "+f"(o[18]), "+f"(o[19]), "+f"(o[20]),
          "+f"(o[21]), "+f"(o[22]), "+f"(o[23]), "+f"(o[24]), "+f"(o[25]), "+f"(o[26]), "+f"(o[27]),
          "+f"(o[28]), "+f"(o[29]), "+f"(o[30]), "+f"(o[31]), "+f"(o[32]), "+f"(o[33]), "+f"(o[34]),
          "+f"(o[35])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  }
};

template <>
struct Values<136, ValueFormat::kBf16> {
  using Register = float;
  static constexpr int kRegisters = 68;
  __device__ __forceinline__ static void multiply(float* o, const uint32_t* a, uint64_t b,
                                                  int add) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %73, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n136k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67"
        "}, {%68, %69, %70, %71}, %72, p, 1, 1, 0;}"
        : "+f"(o[0]), "+f"(o[1]), "+f"(o[2]), "+f"(o[3]), "+f"(o[4]), "+f"(o[5]), "+f"(o[6]),
          "+f"(o[7]), "+f"(o[8]), "+f"(o[9]), "+f"(o[10]), "+f"(o[11]), "+f"(o[12]), "+f"(o[13]),
          "+f"(o[14]), "+f"(o[15]), "+f"(o[16]), "+f"(o[17]), "+f"(o[18]), "+f"(o[19]), "+f"(o[20]),
          "+f"(o[21]), "+f"(o[22]), "+f"(o[23]), "+f"(o[24]), "+f"(o[25]), "+f"(o[26]), "+f"(o[27]),
          "+f"(o[28]), "+f"(o[29]), "+f"(o[30]), "+f"(o[31]), "+f"(o[32]), "+f"(o[33]), "+f"(o[34]),
          "+f"(o[35]), "+f"(o[36]), "+f"(o[37]), "+f"(o[38]), "+f"(o[39]), "+f"(o[40]), "+f"(o[41]),
          "+f"(o[42]), "+f"(o[43]), "+f"(o[44]), "+f"(o[45]), "+f"(o[46]), "+f"(o[47]), "+f"(o[48]),
          "+f"(o[49]), "+f"(o[50]), "+f"(o[51]), "+f"(o[52]), "+f"(o[53]), "+f"(o[54]), "+f"(o[55]),
          "+f"(o[56]), "+f"(o[57]), "+f"(o[58]), "+f"(o[59]), "+f"(o[60]), "+f"(o[61]), "+f"(o[62]),
          "+f"(o[63]), "+f"(o[64]), "+f"(o[65]), "+f"(o[66]), "+f"(o[67])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  }
};

// More columns than one instruction has: rows of b from 128 on lie behind the others.
template <>
struct Values<264, ValueFormat::kE4m3> {
  using First = Values<128, ValueFormat::kE4m3>;
  using Second = Values<136, ValueFormat::kE4m3>;
  using Register = First::Register;
  static constexpr int kRegisters = First::kRegisters + Second::kRegisters;
  __device__ __forceinline__ static void multiply(Register* o, const uint32_t* a, uint64_t b,
                                                  int add) {
    First::multiply(o, a, b, add);
    Second::multiply(o + First::kRegisters, a, b + (128 * kKeyTile >> 4), add);
  }
};

}  // namespace torch_sage::sm90
