#include "attention/mma/launch.h"
#include "attention/mma/select.cuh"

namespace torch_sage::mma {

void launch_e4m3_64(const AttentionParams& params, cudaStream_t stream) {
  select_e4m3<64>(params, stream);
}

}  // namespace torch_sage::mma
