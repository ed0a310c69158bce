#include "attention/sm90/kernel.cuh"
#include "attention/sm90/launch.h"

namespace torch_sage::sm90 {

void launch_split_masked_128(const AttentionParams& params, int multiprocessors,
                             cudaStream_t stream) {
  launch_kernel<Config<128, Mode::kSplitMasked>>(params, multiprocessors, stream);
}

}  // namespace torch_sage::sm90
