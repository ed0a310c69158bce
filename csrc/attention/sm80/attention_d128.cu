#include "attention/mma/launch.h"
#include "attention/mma/select.cuh"

namespace torch_sage::mma {

void launch_halves_128(const AttentionParams& params, cudaStream_t stream) {
  select_halves<128>(params, stream);
}

}  // namespace torch_sage::mma
