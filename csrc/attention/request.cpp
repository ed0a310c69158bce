#include "attention/request.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "common/check.h"

namespace torch_sage {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return ScalarType::Float;
    case Dtype::kBFloat16:
      return ScalarType::BFloat16;
    case Dtype::kFloat16:
      return ScalarType::Half;
  }
  __builtin_unreachable();
}

void check_heads(int64_t heads_q, int64_t heads_kv, const char* key) {
  if (heads_q == 0) return;
  check(heads_kv > 0, key, " must have at least one head for ", heads_q, " query heads, got 0");
  check(heads_q % heads_kv == 0, key, " must have a number of heads that divides query's ", heads_q,
        ", got ", heads_kv);
}

void check_same(const char* name, const char* what, const char* other, int64_t expected,
                int64_t got) {
  check(got == expected, name, " must have the ", what, " of ", other, ", ", expected, ", got ",
        got);
}

Request read_request(const std::optional<Tensor>& attn_mask, const Text& causal,
                     std::optional<double> scale, const Text& output_order, bool wants_lse) {
  const Request request{attn_mask, parse("causal", causal, kCausal), scale,
                        parse("output_order", output_order, kOutputOrders), wants_lse};
  check(!attn_mask.has_value() || request.causal == Causal::kNone,
        "attn_mask must be None when causal is '", std::string_view(causal), "', got a tensor");
  check(!scale.has_value() || std::isfinite(static_cast<float>(*scale)),
        "scale must be finite in float32, got ", scale.value_or(0.0));
  return request;
}

Request read_request(const Text& causal, std::optional<double> scale, bool wants_lse) {
  static const std::optional<Tensor> kNoMask;
  return read_request(kNoMask, causal, scale, Text("bhsd"), wants_lse);
}

void check_rows(const char* name, int64_t rows) {
  constexpr int64_t kMostRows = 1 << 30;  // row numbers and their differences have 32 bits
  check(rows <= kMostRows, name, " must have at most ", kMostRows, " tokens, got ", rows);
}

double softmax_scale(const FloatOperand& q, const Request& request) {
  return request.scale.value_or(1.0 / std::sqrt(static_cast<double>(q.columns)));
}

Operands read_operands(const Tensor& query, const Tensor& key, const Tensor& value,
                       const Device& device) {
  const FloatOperand q = read_float("query", query, device);
  const FloatOperand k = read_float("key", key, device);
  const FloatOperand v = read_float("value", value, device);
  check(k.dtype == q.dtype, "key must have the dtype of query, got another");
  check(v.dtype == q.dtype, "value must have the dtype of query, got another");
  check_same("key", "batch size", "query", q.batch, k.batch);
  check_same("value", "batch size", "query", q.batch, v.batch);
  check_same("value", "number of heads", "key", k.heads, v.heads);
  check_same("value", "number of tokens", "key", k.rows, v.rows);
  check_same("key", "head_dim", "query", q.columns, k.columns);
  check_heads(q.heads, k.heads, "key");
  return {q, k, v};
}

namespace {

Tensor new_output(const FloatOperand& query, int64_t head_dim_v, OutputOrder order) {
  const auto& q = query;
  const ScalarType dtype = scalar_type(q.dtype);
  const Device device = q.tensor.device();
  if (order == OutputOrder::kBhsd)
    return new_tensor({q.batch, q.heads, q.rows, head_dim_v}, dtype, device);
  const int64_t rows = std::max<int64_t>(q.rows, 1), heads = std::max<int64_t>(q.heads, 1);
  const std::array<int64_t, 4> strides = {rows * heads * head_dim_v, head_dim_v, heads * head_dim_v,
                                          1};
  return new_strided({q.batch, q.heads, q.rows, head_dim_v}, strides.data(), dtype, device);
}

}  // namespace

Result new_result(const FloatOperand& query, int64_t head_dim_v, const Request& request) {
  Result result{new_output(query, head_dim_v, request.output_order), std::nullopt};
  if (request.wants_lse) {
    result.lse = new_tensor({query.batch, query.heads, query.rows}, ScalarType::Float,
                            query.tensor.device());
  }
  return result;
}

void fill_unattended(const Result& result) {
  Tensor output = result.output;
  torch::stable::zero_(output);
  if (!result.lse) return;
  Tensor lse = *result.lse;
  torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
}

}  // namespace torch_sage
