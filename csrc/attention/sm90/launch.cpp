#include "attention/sm90/launch.h"

namespace torch_sage::sm90 {

void launch_attention(const AttentionParams& params, int multiprocessors, cudaStream_t stream) {
  const bool is_narrow = params.kv.width == 64;
  const auto launch = params.mask_kind != MaskKind::kNone
                          ? (is_narrow ? launch_masked_64 : launch_masked_128)
                      : params.lse != nullptr && params.is_part && !params.exact_exponential
                          ? (is_narrow ? launch_part_64 : launch_part_128)
                      : params.lse != nullptr || params.exact_exponential
                          ? (is_narrow ? launch_exact_64 : launch_exact_128)
                          : (is_narrow ? launch_mixed_64 : launch_mixed_128);
  launch(params, multiprocessors, stream);
}

}  // namespace torch_sage::sm90
