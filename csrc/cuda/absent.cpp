// Stands in for the kernels that TORCH_CUDA_ARCH_LIST, or nvcc before 12.8, left out of the
// library. The ops that need them refuse such a GPU, or such a build, before.
#include <stdexcept>
#include <string>

#include "attention/mma/launch.h"
#include "attention/sm90/params.h"
#include "build_cuda.h"  // setup.py writes it
#include "quantize/cuda/prepared.h"

namespace torch_sage {
namespace {

[[maybe_unused, noreturn]] void refuse(const char* family) {
  throw std::runtime_error(std::string("the native library must be built with kernels for ") +
                           family + ", got one without");
}

}  // namespace

#if !TORCH_SAGE_HAS_SM89
namespace mma {

void launch_e4m3_64(const AttentionParams&, cudaStream_t) { refuse("sm89"); }
void launch_e4m3_128(const AttentionParams&, cudaStream_t) { refuse("sm89"); }
void launch_e4m3_256(const AttentionParams&, cudaStream_t) { refuse("sm89"); }

}  // namespace mma
#endif

#if !TORCH_SAGE_HAS_SM90
void launch_prepare_kv(const PrepareParams&, cudaStream_t) { refuse("sm90"); }

namespace sm90 {

void launch_attention(const AttentionParams&, int, cudaStream_t) { refuse("sm90"); }

}  // namespace sm90
#endif

}  // namespace torch_sage
