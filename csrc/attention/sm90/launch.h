// One launch for each instantiation of the kernel, each compiled in a file of its own.
#pragma once

#include "attention/sm90/params.h"

namespace torch_sage::sm90 {

void launch_mixed_64(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_mixed_128(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_mixed_256(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_part_64(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_part_128(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_part_256(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_exact_64(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_exact_128(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_exact_256(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_masked_64(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_masked_128(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_masked_256(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_split_64(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_split_128(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_split_256(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_split_masked_64(const AttentionParams& params, int multiprocessors,
                            cudaStream_t stream);
void launch_split_masked_128(const AttentionParams& params, int multiprocessors,
                             cudaStream_t stream);
void launch_split_masked_256(const AttentionParams& params, int multiprocessors,
                             cudaStream_t stream);

// Behind a launch of split keys.
void merge_parts(const AttentionParams& params, cudaStream_t stream);

}  // namespace torch_sage::sm90
