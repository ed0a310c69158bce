// What the hosts of all CUDA kernels do before and after a launch.
#pragma once

#include "attention/request.h"

namespace torch_sage::cuda {

using torch::stable::Tensor;

// The same rows where vector loads of 8 elements can read them; a zero-padded copy where not.
FloatOperand vectorized(const FloatOperand& x);

// Output and, if wanted, LSE, for rows that `seqlen_k` keys are for; `is_done` where no kernel has
// to fill them.
struct NewResult {
  Result result;
  bool is_done;
};
NewResult new_result(const FloatOperand& query, int64_t seqlen_k, int64_t head_dim_v,
                     const Request& request);

}  // namespace torch_sage::cuda
