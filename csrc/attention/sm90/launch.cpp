#include "attention/sm90/launch.h"

namespace torch_sage::sm90 {

void launch_attention(const AttentionParams& params, int multiprocessors, cudaStream_t stream) {
  const bool is_general =
      params.mask_kind != MaskKind::kNone || params.lse != nullptr || params.exact_exponential;
  if (params.kv.width == 64) {
    (is_general ? launch_general_64 : launch_fast_64)(params, multiprocessors, stream);
  } else {
    (is_general ? launch_general_128 : launch_fast_128)(params, multiprocessors, stream);
  }
}

}  // namespace torch_sage::sm90
