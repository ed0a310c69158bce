#include "attention/mma/launch.h"

namespace torch_sage::mma {

void launch_attention(const AttentionParams& params, cudaStream_t stream) {
  const int width = params.kv.width;
  const auto launch = is_e4m3(params.pv) ? (width == 64    ? launch_e4m3_64
                                            : width == 128 ? launch_e4m3_128
                                                           : launch_e4m3_256)
                                         : (width == 64    ? launch_halves_64
                                            : width == 128 ? launch_halves_128
                                                           : launch_halves_256);
  launch(params, stream);
}

}  // namespace torch_sage::mma
