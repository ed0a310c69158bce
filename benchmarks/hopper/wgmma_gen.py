"""Write wgmma_gen.cuh: one wrapper per warpgroup matrix instruction of the study."""

from pathlib import Path

HEADER = """\
#pragma once
#include <cstdint>
// Scores: s32 += s8 (shared) x s8 (shared). P.V: f32 or f16 += e4m3 (registers) x e4m3 (shared).
template <int N> struct QK;
template <int N, bool F16> struct PV;
"""


def registers(count: int, first: int = 0) -> str:
    """Return the operand list of `count` registers."""
    return "{" + ",".join(f"%{first + i}" for i in range(count)) + "}"


def scores(n: int) -> str:
    """Return the wrapper of the INT8 instruction of width `n`."""
    count = n // 2
    operands = ",".join(f'"+r"(s[{i}])' for i in range(count))
    return f"""
template <> struct QK<{n}> {{
  static __device__ __forceinline__ void mma(int (&s)[{count}], uint64_t a, uint64_t b, int add) {{
    asm volatile("{{.reg .pred p; setp.ne.b32 p,%{count + 2},0;"
      "wgmma.mma_async.sync.aligned.m64n{n}k32.s32.s8.s8"
      " {registers(count)},%{count},%{count + 1},p;}}"
      : {operands} : "l"(a), "l"(b), "r"(add));
  }}
}};"""


def values(n: int, f16: bool) -> str:
    """Return the wrapper of the E4M3 instruction of width `n`."""
    count = n // 4 if f16 else n // 2
    kind, letter, c_type = ("f16", "r", "uint32_t") if f16 else ("f32", "f", "float")
    operands = ",".join(f'"+{letter}"(o[{i}])' for i in range(count))
    return f"""
template <> struct PV<{n}, {str(f16).lower()}> {{
  static constexpr int kRegs = {count};
  using T = {c_type};
  static __device__ __forceinline__ void mma(T (&o)[{count}], const uint32_t* a, uint64_t b,
                                             int add) {{
    asm volatile("{{.reg .pred p; setp.ne.b32 p,%{count + 5},0;"
      "wgmma.mma_async.sync.aligned.m64n{n}k32.{kind}.e4m3.e4m3"
      " {registers(count)},{registers(4, count)},%{count + 4},p,1,1;}}"
      : {operands} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  }}
}};"""


def main() -> None:
    """Write the header beside this file."""
    parts = [HEADER, scores(128)]
    parts += [values(n, f16) for n in (72, 136) for f16 in (False, True)]
    Path(__file__).with_name("wgmma_gen.cuh").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
