#include "common/cpu_isa.h"
#include "quantize/cpu/launch.h"

namespace torch_sage {

const RowKernels& row_kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512Vnni:
      return kRowKernelsAvx512;
    case CpuIsa::kAvx2:
      return kRowKernelsAvx2;
    case CpuIsa::kPortable:
      break;
  }
#endif
  return kRowKernelsPortable;
}

}  // namespace torch_sage
