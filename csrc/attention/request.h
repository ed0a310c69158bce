// Arguments that attention has on every device, read and checked.
#pragma once

#include <optional>

#include "common/operand.h"
#include "common/text.h"
#include "common/types.h"

namespace torch_sage {

// What the caller wants beyond the product of query, keys and values.
struct Request {
  const std::optional<torch::stable::Tensor>& attn_mask;
  Causal causal;
  std::optional<double> scale;
  OutputOrder output_order;
  bool wants_lse;
};

struct Result {
  torch::stable::Tensor output;
  std::optional<torch::stable::Tensor> lse;
};

struct Operands {
  FloatOperand query, key, value;
};

Request read_request(const std::optional<torch::stable::Tensor>& attn_mask, const Text& causal,
                     std::optional<double> scale, const Text& output_order, bool wants_lse);

Request read_request(const Text& causal, std::optional<double> scale, bool wants_lse);  // no mask

Operands read_operands(const torch::stable::Tensor& query, const torch::stable::Tensor& key,
                       const torch::stable::Tensor& value, const Device& device);

// Throws std::invalid_argument if `rows` of argument `name` are more than 32 bits can number.
void check_rows(const char* name, int64_t rows);
void check_heads(int64_t heads_q, int64_t heads_kv, const char* key);
void check_same(const char* name, const char* what, const char* other, int64_t expected,
                int64_t got);

// Gives a kernel's parameters the mask, which must outlive their use.
template <typename Params>
void set_mask(Params& params, const Mask& mask) {
  params.mask_kind = mask.kind;
  params.mask = mask.tensor.const_data_ptr();
  params.mask_stride_b = mask.strides[0];
  params.mask_stride_h = mask.strides[1];
  params.mask_stride_n = mask.strides[2];
  params.mask_stride_m = mask.strides[3];
}

torch::headeronly::ScalarType scalar_type(Dtype dtype);

double softmax_scale(const FloatOperand& query, const Request& request);

// The uninitialised output [b, h_q, n, head_dim_v], in the dtype of `query` and the order asked
// for, and, if wanted, LSE [b, h_q, n].
Result new_result(const FloatOperand& query, int64_t head_dim_v, const Request& request);

// What rows have that see no key: 0, and an LSE of -inf.
void fill_unattended(const Result& result);

}  // namespace torch_sage
