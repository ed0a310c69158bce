// Which instruction sets kernels may use: detected once, lowered by TORCH_SAGE_CPU_ISA.
#pragma once

namespace torch_sage {

// Every level includes the ones before it.
enum class CpuIsa { kPortable, kAvx2, kAvx512Vnni, kAvx512Bf16 };

// The best level of this CPU, or the lower one that the environment variable names ("portable",
// "avx2", "avx512_vnni", "avx512_bf16"): so one machine tests every kernel. Throws
// std::invalid_argument where the variable names none, or one that this CPU does not have.
CpuIsa cpu_isa();

const char* name_of(CpuIsa isa);

}  // namespace torch_sage
