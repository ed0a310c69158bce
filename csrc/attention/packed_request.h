// Arguments that attention over packed sequences has on every device, read and checked.
#pragma once

#include "attention/request.h"
#include "common/packed.h"

namespace torch_sage {

struct PackedOperands {
  FloatOperand query, key, value;                  // [1, h, rows, columns]
  torch::stable::Tensor query_starts, key_starts;  // contiguous int32
  Packed queries, keys;

  bool is_empty() const { return queries.count == 0 || query.heads == 0 || query.rows == 0; }
};

PackedOperands read_packed(const torch::stable::Tensor& query, const torch::stable::Tensor& key,
                           const torch::stable::Tensor& value,
                           const torch::stable::Tensor& cu_seqlens_q,
                           const torch::stable::Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                           int64_t max_seqlen_k);

// The uninitialised output [rows, h_q, head_dim_v] in the dtype of query, and, if wanted, the LSE
// [h_q, rows].
Result new_packed_result(const PackedOperands& operands, bool wants_lse);

}  // namespace torch_sage
