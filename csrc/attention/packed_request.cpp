#include "attention/packed_request.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/check.h"

namespace torch_sage {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// [rows, heads, columns] as the operands of other ops lie.
Tensor as_batch(const char* name, const Tensor& tensor, const Device& device) {
  check(tensor.defined(), name, " must be a tensor, got None");
  check(tensor.dim() == 3, name, " must be 3-D [tokens, heads, head_dim], got ",
        Shape{tensor.sizes()});
  check_rows(name, tensor.size(0));
  check_memory(name, tensor, device);  // or torch would refuse it, without a name
  return torch::stable::unsqueeze(torch::stable::transpose(tensor, 0, 1), 0);
}

Packed packed_rows(const char* name, int64_t longest, const Tensor& starts, int64_t rows) {
  check(longest >= 0, name, " must not be negative, got ", longest);
  return {static_cast<const int32_t*>(starts.const_data_ptr()),
          static_cast<int>(starts.size(0) - 1), static_cast<int>(rows),
          static_cast<int>(std::min(longest, rows))};
}

}  // namespace

PackedOperands read_packed(const Tensor& query, const Tensor& key, const Tensor& value,
                           const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                           int64_t max_seqlen_q, int64_t max_seqlen_k) {
  check(query.defined(), "query must be a tensor, got None");
  const Device device = query.device();
  const auto [q, k, v] =
      read_operands(as_batch("query", query, device), as_batch("key", key, device),
                    as_batch("value", value, device), device);
  check(cu_seqlens_q.defined(), "cu_seqlens_q must be a tensor, got None");
  check(cu_seqlens_q.dim() == 1 && cu_seqlens_q.size(0) > 0,
        "cu_seqlens_q must be 1-D with one element more than there are sequences, got ",
        Shape{cu_seqlens_q.sizes()});
  const int64_t starts = cu_seqlens_q.size(0);
  const int32_t int32 = aoti_torch_dtype_int32();
  PackedOperands operands{q,
                          k,
                          v,
                          read_exact("cu_seqlens_q", cu_seqlens_q, int32, {starts}, device),
                          read_exact("cu_seqlens_k", cu_seqlens_k, int32, {starts}, device),
                          {},
                          {}};
  operands.queries = packed_rows("max_seqlen_q", max_seqlen_q, operands.query_starts, q.rows);
  operands.keys = packed_rows("max_seqlen_k", max_seqlen_k, operands.key_starts, k.rows);
  return operands;
}

Result new_packed_result(const PackedOperands& operands, bool wants_lse) {
  const FloatOperand& q = operands.query;
  const Device device = q.tensor.device();
  Result result{new_tensor({q.rows, q.heads, operands.value.columns}, scalar_type(q.dtype), device),
                std::nullopt};
  if (wants_lse) result.lse = new_tensor({q.heads, q.rows}, ScalarType::Float, device);
  return result;
}

}  // namespace torch_sage
