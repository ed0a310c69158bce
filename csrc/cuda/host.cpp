#include "cuda/host.h"

#include <torch/csrc/stable/ops.h>

namespace torch_sage::cuda {

FloatOperand vectorized(const FloatOperand& x) {
  const int64_t per_load = 16 / x.element_bytes;
  const auto fits = [&](int64_t stride, int64_t size) {
    return size <= 1 || stride % per_load == 0;
  };
  if (x.columns % 8 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
      fits(x.stride_b, x.batch) && fits(x.stride_h, x.heads) && fits(x.stride_n, x.rows))
    return x;
  const int64_t columns = (x.columns + 7) / 8 * 8;
  Tensor padded = torch::stable::new_zeros(x.tensor, {x.batch, x.heads, x.rows, columns});
  Tensor filled = torch::stable::narrow(padded, 3, 0, x.columns);
  torch::stable::copy_(filled, x.tensor);
  FloatOperand copy = x;
  copy.tensor = padded;
  copy.data = static_cast<const std::byte*>(padded.const_data_ptr());
  copy.columns = columns;
  copy.stride_b = padded.stride(0);
  copy.stride_h = padded.stride(1);
  copy.stride_n = padded.stride(2);
  return copy;
}

NewResult new_result(const FloatOperand& query, int64_t seqlen_k, int64_t head_dim_v,
                     const Request& request) {
  check_rows("query", query.rows);
  Result result = torch_sage::new_result(query, head_dim_v, request);
  if (query.batch == 0 || query.heads == 0 || query.rows == 0) return {result, true};
  if (seqlen_k > 0) return {result, false};
  fill_unattended(result);
  return {result, true};
}

}  // namespace torch_sage::cuda
