// What was compiled and what runs here, for torch_sage/_extension.py, which reads it by ctypes.

#include <exception>
#include <string>

#include "build_cuda.h"  // setup.py writes it
#include "common/cpu_isa.h"

#if defined(__x86_64__)
#define TORCH_SAGE_COMPILED_ISAS "portable,avx2,avx512_vnni,avx512_bf16"
#else
#define TORCH_SAGE_COMPILED_ISAS "portable"
#endif

// "key=value" pairs, one a line. Never throws: the caller is C.
extern "C" __attribute__((visibility("default"))) const char* torch_sage_build_info() noexcept {
  static const std::string info = [] {
    std::string isa;
    try {
      isa = torch_sage::name_of(torch_sage::cpu_isa());
    } catch (const std::exception& error) {
      isa = error.what();
    }
    return "cpu_isa=" + isa +
           "\ncompiled_cpu_isas=" TORCH_SAGE_COMPILED_ISAS "\ncuda=" TORCH_SAGE_CUDA
           "\ncuda_gpus=" TORCH_SAGE_CUDA_GPUS "\ncuda_version=" TORCH_SAGE_CUDA_VERSION
           "\ncompiler=" __VERSION__ "\n";
  }();
  return info.c_str();
}
