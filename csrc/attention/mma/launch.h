// One launch for each width and kind of PV, each compiled in a file of its own.
#pragma once

#include "attention/mma/params.h"

namespace torch_sage::mma {

// csrc/attention/sm80: P and V of 16 bits.
void launch_halves_64(const AttentionParams& params, cudaStream_t stream);
void launch_halves_128(const AttentionParams& params, cudaStream_t stream);
void launch_halves_256(const AttentionParams& params, cudaStream_t stream);
// csrc/attention/sm89: P and V in E4M3.
void launch_e4m3_64(const AttentionParams& params, cudaStream_t stream);
void launch_e4m3_128(const AttentionParams& params, cudaStream_t stream);
void launch_e4m3_256(const AttentionParams& params, cudaStream_t stream);

}  // namespace torch_sage::mma
