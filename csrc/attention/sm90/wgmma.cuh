// The two matrix products of the attention kernel, by their width N. In both, accumulator
// register pairs hold, for g = lane / 4 and t = lane % 4, rows g and g + 8 of a warp's 16 and
// columns 8 j + 2 t and the next: 32-bit number 4 j + 2 h + b is row g + 8 h, column 8 j + 2 t + b;
// 16-bit numbers stand in the same order, two to a register.
#pragma once

#include <cstdint>

namespace torch_sage::sm90 {

// s (int32, 64 x N) = or += a (int8, shared) b (int8, shared).
template <int N>
struct Scores;

// o (fp16, 64 x N) = or += a (E4M3, registers) b (E4M3, shared).
template <int N>
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
struct Values<72> {
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
struct Values<128> {
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
struct Values<136> {
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

// More columns than one instruction has: rows of b from 128 on are 64 bytes each behind the others.
template <>
struct Values<264> {
  static constexpr int kRegisters = 66;
  __device__ __forceinline__ static void multiply(uint32_t* o, const uint32_t* a, uint64_t b,
                                                  int add) {
    Values<128>::multiply(o, a, b, add);
    Values<136>::multiply(o + Values<128>::kRegisters, a, b + (128 * 64 >> 4), add);
  }
};

}  // namespace torch_sage::sm90
