#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/cpu/launch.h"
#include "attention/packed_request.h"
#include "attention/request.h"
#include "common/operand.h"
#include "common/types.h"
#include "ops.h"
#include "quantize/quantize.h"

namespace torch_sage {
namespace {

constexpr double kLog2E = 1.4426950408889634;

using torch::headeronly::ScalarType;

const float* fp32(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

struct Query {
  const int8_t* codes;      // [b, h, n, row_bytes]
  const float* row_scales;  // [b, h, n]
  const float* score_bias;  // [b, h, m] what smoothing took from the base-2 scores; null: nothing
};

struct Keys {
  const int8_t* codes;      // [b, h, m, row_bytes]
  const float* row_scales;  // [b, h, m]
  const float* mean;        // [b, h, d]; null where none was subtracted
  int64_t heads, rows;
};

struct Values {
  const uint16_t* codes;  // [b, h, m, d_v]
  const float* scales;    // [b, h, d_v]
  const float* mean;      // [b, h, d_v]
  int64_t columns;
};

// Rows of `bytes`, zero behind the columns.
void copy_padded(const Operand& codes, int64_t bytes, int8_t* out) {
  for (int64_t b = 0; b < codes.batch; ++b) {
    for (int64_t h = 0; h < codes.heads; ++h) {
      for (int64_t m = 0; m < codes.rows; ++m, out += bytes) {
        std::memcpy(out, codes.row(b, h, m), codes.columns);
        std::memset(out + codes.columns, 0, bytes - codes.columns);
      }
    }
  }
}

// The rows of an operand that one sequence has.
struct RowRange {
  int64_t first, rows;
};
FloatOperand rows_of(const FloatOperand& x, const RowRange& range) {
  FloatOperand part = x;
  part.data = x.row(0, 0, range.first);
  part.rows = range.rows;
  return part;
}

Groups query_groups(const FloatOperand& q, Granularity granularity) {
  return query_groups(granularity, q.rows, kQueryBlock, kQueryWarp);
}

// Where the results of one call, or of one of its sequences, go.
struct Destination {
  void* output;  // [b, h, n, d_v]
  Rows rows;
  float* lse;  // [b, h, n]; null: not wanted

  explicit Destination(const Result& result)
      : output(result.output.mutable_data_ptr()),
        rows{result.output.stride(0), result.output.stride(1), result.output.stride(2)},
        lse(result.lse ? static_cast<float*>(result.lse->mutable_data_ptr()) : nullptr) {}
  Destination(void* output, const Rows& rows, float* lse) : output(output), rows(rows), lse(lse) {}
};

void attend(const FloatOperand& q, const Query& query, const Keys& keys, const Values& values,
            const Request& request, const Destination& to) {
  CpuAttentionParams params{};
  params.batch = q.batch;
  params.heads_q = q.heads;
  params.heads_kv = keys.heads;
  params.seqlen_q = q.rows;
  params.seqlen_k = keys.rows;
  params.head_dim_v = values.columns;
  params.row_bytes = row_bytes(q.columns);
  params.query_codes = query.codes;
  params.query_scales = query.row_scales;
  params.key_codes = keys.codes;
  params.key_scales = keys.row_scales;
  params.value = values.codes;
  params.value_scales = values.scales;
  params.value_mean = values.mean;
  params.score_bias = query.score_bias;
  params.causal = request.causal;
  const double scale = softmax_scale(q, request);
  params.scale = static_cast<float>(scale);

  std::optional<Mask> mask;
  if (request.attn_mask.has_value()) {
    mask = read_mask(*request.attn_mask, q.batch, q.heads, q.rows, keys.rows);
    set_mask(params, *mask);
  }

  params.output_dtype = q.dtype;
  params.output = to.output;
  params.output_stride_b = to.rows.stride_b;
  params.output_stride_h = to.rows.stride_h;
  params.output_stride_n = to.rows.stride_n;
  params.lse = to.lse;

  std::optional<Scratch<float>> lse_shift;
  if (to.lse != nullptr && keys.mean != nullptr) {
    lse_shift.emplace(std::initializer_list<int64_t>{q.batch, q.heads, q.rows});
    Tasks tasks;
    dot_key_mean(tasks, q, keys.mean, keys.heads, scale, lse_shift->get());
    tasks.run();
    params.lse_shift = lse_shift->get();
  }
  run_cpu_attention(params);
}

void attend_whole(const Operands& operands, const Request& request, Granularity granularity,
                  Smooth smooth, const Destination& to) {
  const auto& [q, k, v] = operands;

  // Three parallel regions in all, as each costs most on a busy machine: means, codes, attention.
  const Scratch<float> query_mean({q.batch, q.heads, q.columns});
  const Scratch<float> key_mean({k.batch, k.heads, k.columns});
  const Scratch<float> value_mean({v.batch, v.heads, v.columns});
  TokenMean mean_of_query(q), mean_of_key(k), mean_of_value(v);
  Tasks means;
  if (smooth.query) mean_of_query.add_to(means);
  if (smooth.key) mean_of_key.add_to(means);
  if (smooth.value) mean_of_value.add_to(means);
  means.run();
  if (smooth.query) {
    mean_of_query.finish(query_mean.get());
    // Any vector may be subtracted from the queries of a head. Where a row is not finite, the
    // others must not suffer from it: such a channel keeps its values.
    for (float& mean : query_mean) {
      if (!std::isfinite(mean)) mean = 0.0f;
    }
  }
  if (smooth.key) mean_of_key.finish(key_mean.get());
  if (smooth.value) {
    mean_of_value.finish(value_mean.get());
  } else {
    std::fill(value_mean.begin(), value_mean.end(), 0.0f);
  }

  const int64_t bytes = row_bytes(k.columns);
  const Scratch<int8_t> query_codes({q.batch, q.heads, q.rows, bytes});
  const Scratch<float> query_scales({q.batch, q.heads, q.rows});
  const Scratch<float> score_bias({q.batch, q.heads, k.rows});
  const Scratch<int8_t> key_codes({k.batch, k.heads, k.rows, bytes});
  const Scratch<float> key_scales({k.batch, k.heads, k.rows});
  const Scratch<uint16_t> value_codes({v.batch, v.heads, v.rows, v.columns});
  const Scratch<float> value_scales({v.batch, v.heads, v.columns});
  const Query query_operand{query_codes.get(), query_scales.get(),
                            smooth.query ? score_bias.get() : nullptr};
  const Keys keys{key_codes.get(), key_scales.get(), smooth.key ? key_mean.get() : nullptr, k.heads,
                  k.rows};
  Tasks quantize;
  quantize_rows(quantize, k, keys.mean, key_groups(granularity, k.rows, kKeyBlock),
                {key_codes.get(), bytes, nullptr, key_scales.get()});
  if (smooth.query) {
    dot_query_mean(quantize, k, keys.mean, query_mean.get(), q.heads,
                   softmax_scale(q, request) * kLog2E, score_bias.get());
  }
  quantize_rows(quantize, q, smooth.query ? query_mean.get() : nullptr,
                query_groups(q, granularity),
                {query_codes.get(), bytes, nullptr, query_scales.get()});
  RoundedValues rounded(v, value_codes.get());
  rounded.add_to(quantize, smooth.value ? value_mean.get() : nullptr);
  quantize.run();
  rounded.finish(value_scales.get());
  const Values values{value_codes.get(), value_scales.get(), value_mean.get(), v.columns};
  attend(q, query_operand, keys, values, request, to);
}

Result attend_batch(const Tensor& query, const Tensor& key, const Tensor& value,
                    const Request& request, Granularity granularity, Smooth smooth) {
  const Operands operands = read_operands(query, key, value, kCpu);
  const Result result = new_result(operands.query, operands.value.columns, request);
  attend_whole(operands, request, granularity, smooth, Destination(result));
  return result;
}

// Sequence `index`, of which the arguments of the same call say how long it may be.
RowRange sequence(const char* side, const Packed& packed, int index) {
  const int64_t first = packed.starts[index], end = packed.starts[index + 1];
  check(first >= 0 && first <= end && end <= packed.rows, "cu_seqlens_", side,
        " must not decrease, and be between 0 and the number of tokens, ", packed.rows, ", got ",
        first, " and then ", end);
  check(end - first <= packed.longest, "max_seqlen_", side, " must be at least ", end - first,
        ", the length of a sequence, got ", packed.longest);
  return {first, end - first};
}

// The sequences one by one: each may be of another length, and has means and scales of its own.
Result attend_packed(const PackedOperands& operands, const Request& request,
                     Granularity granularity, Smooth smooth) {
  const FloatOperand& q = operands.query;
  const Result result = new_packed_result(operands, request.wants_lse);
  fill_unattended(result);
  const int64_t columns = operands.value.columns, row_bytes = q.heads * columns * q.element_bytes;
  auto* output = static_cast<std::byte*>(result.output.mutable_data_ptr());
  for (int i = 0; i < operands.queries.count; ++i) {
    const RowRange queries = sequence("q", operands.queries, i);
    const RowRange keys = sequence("k", operands.keys, i);
    if (operands.is_empty() || queries.rows == 0) continue;
    const Operands own{rows_of(q, queries), rows_of(operands.key, keys),
                       rows_of(operands.value, keys)};
    std::optional<Scratch<float>> lse;
    if (request.wants_lse) lse.emplace(std::initializer_list<int64_t>{q.heads, queries.rows});
    attend_whole(own, request, granularity, smooth,
                 {output + queries.first * row_bytes,
                  {0, columns, q.heads * columns},
                  lse ? lse->get() : nullptr});
    if (!lse) continue;
    auto* to = static_cast<float*>(result.lse->mutable_data_ptr()) + queries.first;
    for (int64_t h = 0; h < q.heads; ++h)
      std::copy_n(lse->get() + h * queries.rows, queries.rows, to + h * q.rows);
  }
  return result;
}

Result attend_quantized(const Tensor& query, const Tensor& key_codes, const Tensor& key_scales,
                        const Tensor& key_mean, const Tensor& value_codes,
                        const Tensor& value_scales, const Tensor& value_mean,
                        const Request& request, Granularity granularity, int64_t block) {
  const FloatOperand q = read_float("query", query);
  const Operand k = read_codes("key_codes", key_codes, ScalarType::Char);
  const Operand v = read_codes("value_codes", value_codes, ScalarType::BFloat16);
  check_same("key_codes", "batch size", "query", q.batch, k.batch);
  check_same("value_codes", "batch size", "query", q.batch, v.batch);
  check_same("value_codes", "number of heads", "key_codes", k.heads, v.heads);
  check_same("value_codes", "number of tokens", "key_codes", k.rows, v.rows);
  check_same("key_codes", "head_dim", "query", q.columns, k.columns);
  check_heads(q.heads, k.heads, "key_codes");
  const Groups groups = key_groups(granularity, k.rows, block);
  const Tensor scales =
      read_fp32("key_scales", key_scales, {k.batch, k.heads, groups.scales(k.rows)});
  const Tensor mean = read_fp32("key_mean", key_mean, {k.batch, k.heads, k.columns});
  const Tensor v_scales = read_fp32("value_scales", value_scales, {v.batch, v.heads, v.columns});
  const Tensor v_mean = read_fp32("value_mean", value_mean, {v.batch, v.heads, v.columns});

  // Codes are dense as the quantizers return them; other strides or a padded row cost a copy.
  const int64_t bytes = row_bytes(k.columns);
  std::optional<Scratch<int8_t>> padded;
  if (!k.is_dense() || bytes != k.columns) {
    padded.emplace(std::initializer_list<int64_t>{k.batch, k.heads, k.rows, bytes});
    copy_padded(k, bytes, padded->get());
  }
  const Tensor dense_value = v.is_dense() ? v.tensor : make_contiguous(v.tensor);
  std::optional<Scratch<float>> row_scales;
  if (!groups.is_per_row()) {
    row_scales.emplace(std::initializer_list<int64_t>{k.batch, k.heads, k.rows});
    expand_scales(fp32(scales), groups, k.batch * k.heads, k.rows, row_scales->get());
  }
  const Keys keys{padded ? padded->get() : reinterpret_cast<const int8_t*>(k.data),
                  row_scales ? row_scales->get() : fp32(scales), fp32(mean), k.heads, k.rows};
  const Values values{static_cast<const uint16_t*>(dense_value.const_data_ptr()), fp32(v_scales),
                      fp32(v_mean), v.columns};
  const Scratch<int8_t> query_codes({q.batch, q.heads, q.rows, bytes});
  const Scratch<float> query_scales({q.batch, q.heads, q.rows});
  Tasks tasks;
  quantize_rows(tasks, q, nullptr, query_groups(q, granularity),
                {query_codes.get(), bytes, nullptr, query_scales.get()});
  tasks.run();
  const Result result = new_result(q, v.columns, request);
  attend(q, {query_codes.get(), query_scales.get(), nullptr}, keys, values, request,
         Destination(result));
  return result;
}

}  // namespace

Tensor attention(const Tensor& query, const Tensor& key_codes, const Tensor& key_scales,
                 const Tensor& key_mean, const Tensor& value_codes, const Tensor& value_scales,
                 const Tensor& value_mean, const std::optional<Tensor>& attn_mask,
                 const Text& causal, std::optional<double> scale, const Text& qk,
                 const Text& granularity, int64_t block, const Text& pv, const Text& output_order) {
  parse("qk", qk, kQkFormats);
  parse("pv", pv, kPvFormats);
  return attend_quantized(query, key_codes, key_scales, key_mean, value_codes, value_scales,
                          value_mean, read_request(attn_mask, causal, scale, output_order, false),
                          parse("granularity", granularity, kGranularities), block)
      .output;
}

std::tuple<Tensor, Tensor> attention_with_lse(
    const Tensor& query, const Tensor& key_codes, const Tensor& key_scales, const Tensor& key_mean,
    const Tensor& value_codes, const Tensor& value_scales, const Tensor& value_mean,
    const std::optional<Tensor>& attn_mask, const Text& causal, std::optional<double> scale,
    const Text& qk, const Text& granularity, int64_t block, const Text& pv,
    const Text& output_order) {
  parse("qk", qk, kQkFormats);
  parse("pv", pv, kPvFormats);
  const Result result =
      attend_quantized(query, key_codes, key_scales, key_mean, value_codes, value_scales,
                       value_mean, read_request(attn_mask, causal, scale, output_order, true),
                       parse("granularity", granularity, kGranularities), block);
  return {result.output, *result.lse};
}

Tensor sdpa(const Tensor& query, const Tensor& key, const Tensor& value,
            const std::optional<Tensor>& attn_mask, const Text& causal, std::optional<double> scale,
            const Text& qk, const Text& granularity, const Text& pv, const Text& smooth,
            const Text& exponential, const Text& output_order) {
  parse("qk", qk, kQkFormats);
  parse("pv", pv, kPvFormats);
  parse("exponential", exponential, kExponentials);
  return attend_batch(
             query, key, value, read_request(attn_mask, causal, scale, output_order, false),
             parse("granularity", granularity, kGranularities), parse("smooth", smooth, kSmoothing))
      .output;
}

std::tuple<Tensor, Tensor> sdpa_with_lse(const Tensor& query, const Tensor& key,
                                         const Tensor& value,
                                         const std::optional<Tensor>& attn_mask, const Text& causal,
                                         std::optional<double> scale, const Text& qk,
                                         const Text& granularity, const Text& pv,
                                         const Text& smooth, const Text& exponential,
                                         const Text& output_order) {
  parse("qk", qk, kQkFormats);
  parse("pv", pv, kPvFormats);
  parse("exponential", exponential, kExponentials);
  const Result result = attend_batch(
      query, key, value, read_request(attn_mask, causal, scale, output_order, true),
      parse("granularity", granularity, kGranularities), parse("smooth", smooth, kSmoothing));
  return {result.output, *result.lse};
}

Tensor varlen_sdpa(const Tensor& query, const Tensor& key, const Tensor& value,
                   const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                   int64_t max_seqlen_k, const Text& causal, std::optional<double> scale,
                   const Text& qk, const Text& granularity, const Text& pv, const Text& smooth,
                   const Text& exponential) {
  parse("qk", qk, kQkFormats);
  parse("pv", pv, kPvFormats);
  parse("exponential", exponential, kExponentials);
  return attend_packed(
             read_packed(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
             read_request(causal, scale, false), parse("granularity", granularity, kGranularities),
             parse("smooth", smooth, kSmoothing))
      .output;
}

std::tuple<Tensor, Tensor> varlen_sdpa_with_lse(const Tensor& query, const Tensor& key,
                                                const Tensor& value, const Tensor& cu_seqlens_q,
                                                const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                                                int64_t max_seqlen_k, const Text& causal,
                                                std::optional<double> scale, const Text& qk,
                                                const Text& granularity, const Text& pv,
                                                const Text& smooth, const Text& exponential) {
  parse("qk", qk, kQkFormats);
  parse("pv", pv, kPvFormats);
  parse("exponential", exponential, kExponentials);
  const Result result = attend_packed(
      read_packed(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
      read_request(causal, scale, true), parse("granularity", granularity, kGranularities),
      parse("smooth", smooth, kSmoothing));
  return {result.output, *result.lse};
}

}  // namespace torch_sage
