// The CPU attention kernel: one entry for every instruction set.
#pragma once

#include "common/params.h"

namespace torch_sage {

// Fills params.output and params.lse on torch's threads, by the kernel that cpu_isa() names.
// The result does not depend on the number of threads. Needs O(threads) scratch, no N x M buffer.
void run_cpu_attention(const CpuAttentionParams& params);

}  // namespace torch_sage
