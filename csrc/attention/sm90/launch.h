// One launch for each instantiation of the kernel, each compiled in a file of its own.
#pragma once

#include "attention/sm90/params.h"

namespace torch_sage::sm90 {

void launch_fast_64(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_fast_128(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_general_64(const AttentionParams& params, int multiprocessors, cudaStream_t stream);
void launch_general_128(const AttentionParams& params, int multiprocessors, cudaStream_t stream);

}  // namespace torch_sage::sm90
