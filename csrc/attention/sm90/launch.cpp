#include "attention/sm90/launch.h"

namespace torch_sage::sm90 {

void launch_attention(const AttentionParams& params, int multiprocessors, cudaStream_t stream) {
  // By width: 64, 128, 256.
  constexpr decltype(&launch_mixed_64)
      kMixed[] = {launch_mixed_64, launch_mixed_128, launch_mixed_256},
      kPart[] = {launch_part_64, launch_part_128, launch_part_256},
      kExact[] = {launch_exact_64, launch_exact_128, launch_exact_256},
      kMasked[] = {launch_masked_64, launch_masked_128, launch_masked_256},
      kSplit[] = {launch_split_64, launch_split_128, launch_split_256},
      kSplitMasked[] = {launch_split_masked_64, launch_split_masked_128, launch_split_masked_256};
  const bool is_split = params.parts.count > 0, has_mask = params.mask_kind != MaskKind::kNone;
  const auto& launches = is_split   ? has_mask ? kSplitMasked : kSplit
                         : has_mask ? kMasked
                         : params.lse != nullptr && params.is_part && !params.exact_exponential
                             ? kPart
                         : params.lse != nullptr || params.exact_exponential ? kExact
                                                                             : kMixed;
  launches[params.kv.width / 128](params, multiprocessors, stream);
  if (is_split) merge_parts(params, stream);
}

}  // namespace torch_sage::sm90
