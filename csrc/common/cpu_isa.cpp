#include "common/cpu_isa.h"

#include <cstdlib>
#include <string>

#include "common/check.h"

namespace torch_sage {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512_vnni", "avx512_bf16"};

CpuIsa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_v4 = has_avx2 && __builtin_cpu_supports("x86-64-v4");
  if (has_v4 && __builtin_cpu_supports("avx512vnni")) {
    return __builtin_cpu_supports("avx512bf16") ? CpuIsa::kAvx512Bf16 : CpuIsa::kAvx512Vnni;
  }
  if (has_avx2) return CpuIsa::kAvx2;
#endif
  return CpuIsa::kPortable;
}

CpuIsa detect_or_lower() {
  const CpuIsa best = detect();
  const char* wanted = std::getenv("TORCH_SAGE_CPU_ISA");
  if (wanted == nullptr) return best;
  std::string valid;
  for (int level = 0; level <= static_cast<int>(best); ++level) {
    if (kNames[level] == std::string(wanted)) return static_cast<CpuIsa>(level);
    valid += std::string(level ? ", " : "") + kNames[level];
  }
  fail("TORCH_SAGE_CPU_ISA must be one of ", valid, " on this CPU, got '", wanted, "'");
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa isa = detect_or_lower();
  return isa;
}

const char* name_of(CpuIsa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace torch_sage
