#include "attention/mma/launch.h"
#include "attention/mma/select.cuh"

namespace torch_sage::mma {

void launch_halves_256(const AttentionParams& params, cudaStream_t stream) {
  select_halves<256>(params, stream);
}

}  // namespace torch_sage::mma
