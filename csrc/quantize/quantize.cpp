#include "quantize/quantize.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "common/check.h"
#include "ops.h"

namespace torch_sage {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows that one task takes: 64 KiB of fp32 at D = 64, enough to hide the cost of starting it and
// few enough that a head of 1024 rows keeps several threads busy.
constexpr int64_t kTaskRows = 256;

int64_t tasks_per_head(int64_t rows) { return rows / kTaskRows + (rows % kTaskRows != 0); }

void check_groups(int64_t block, int64_t warp) {
  check(block > 0 && block % 8 == 0, "block must be a positive multiple of 8, got ", block);
  check(warp > 0 && warp % 8 == 0 && block % warp == 0,
        "warp must be a multiple of 8 that divides block ", block, ", got ", warp);
}

// The mean to subtract and return: given, computed, or zeros where nothing is smoothed.
Tensor mean_of(const FloatOperand& x, const std::optional<Tensor>& given, bool smooth) {
  Tensor mean = new_tensor({x.batch, x.heads, x.columns}, ScalarType::Float);
  if (given.has_value()) {
    check(smooth, "mean must be None when smooth is False, got a tensor");
    torch::stable::copy_(mean, read_fp32("mean", *given, {x.batch, x.heads, x.columns}));
  } else if (smooth) {
    Tasks tasks;
    TokenMean own(x);
    own.add_to(tasks);
    tasks.run();
    own.finish(static_cast<float*>(mean.mutable_data_ptr()));
  } else {
    torch::stable::zero_(mean);
  }
  return mean;
}

const float* fp32(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

}  // namespace

Groups query_groups(Granularity granularity, int64_t rows, int64_t block, int64_t warp) {
  check_groups(block, warp);
  switch (granularity) {
    case Granularity::kToken:
      return per_row();
    case Granularity::kThread:
      return query_per_thread(block, warp);
    case Granularity::kWarp:
      return per_span(block, warp);
    case Granularity::kBlock:
      return per_span(block, block);
    case Granularity::kTensor:
      return per_tensor(rows);
  }
  __builtin_unreachable();
}

Groups key_groups(Granularity granularity, int64_t rows, int64_t block) {
  check_groups(block, block);
  switch (granularity) {
    case Granularity::kToken:
      return per_row();
    case Granularity::kThread:
      return key_per_thread(block);
    case Granularity::kWarp:
    case Granularity::kBlock:
      return per_span(block, block);
    case Granularity::kTensor:
      return per_tensor(rows);
  }
  __builtin_unreachable();
}

TokenMean::TokenMean(const FloatOperand& x)
    : x_(x), sums_({x.batch, x.heads, tasks_per_head(x.rows), x.columns}) {}

void TokenMean::add_to(Tasks& tasks) {
  tasks.add(x_, kTaskRows, [this](const Tasks::Rows& task) {
    double* partial = sums_.get() + task.index * x_.columns;
    std::fill_n(partial, x_.columns, 0.0);
    row_kernels().add_columns(x_.block(task.batch, task.head, task.first, task.count), partial);
  });
}

void TokenMean::finish(float* mean) const {
  const int64_t per_head = tasks_per_head(x_.rows);
  const double rows = static_cast<double>(std::max<int64_t>(x_.rows, 1));
  for (int64_t head = 0; head < x_.batch * x_.heads; ++head) {
    double total[kMaxHeadDim] = {};
    for (int64_t task = 0; task < per_head; ++task) {
      const double* partial = sums_.get() + (head * per_head + task) * x_.columns;
      for (int64_t c = 0; c < x_.columns; ++c) total[c] += partial[c];
    }
    for (int64_t c = 0; c < x_.columns; ++c) {
      mean[head * x_.columns + c] = static_cast<float>(total[c] / rows);
    }
  }
}

void quantize_rows(Tasks& tasks, const FloatOperand& x, const float* mean, const Groups& groups,
                   const QuantizedRows& out) {
  const auto quantize = [&x, mean, groups, out](const Tasks::Rows& task) {
    const int64_t head = task.batch * x.heads + task.head;
    const int64_t row = head * x.rows + task.first;
    const int64_t scale = head * groups.scales(x.rows) +
                          task.first / groups.block_rows * (groups.block_rows / groups.span_rows) *
                              groups.lane_groups;
    row_kernels().quantize(x.block(task.batch, task.head, task.first, task.count),
                           mean == nullptr ? nullptr : mean + head * x.columns, groups,
                           {out.codes + row * out.row_bytes, out.row_bytes,
                            out.group_scales == nullptr ? nullptr : out.group_scales + scale,
                            out.row_scales == nullptr ? nullptr : out.row_scales + row});
  };
  if (x.rows == 0) {  // "tensor" has a scale to write even so
    for (int64_t head = 0; head < x.batch * x.heads; ++head) {
      quantize({head / x.heads, head % x.heads, 0, 0, 0});
    }
    return;
  }
  const int64_t blocks = std::max<int64_t>(1, kTaskRows / groups.block_rows);
  const int64_t task_rows = groups.block_rows < x.rows ? blocks * groups.block_rows : x.rows;
  tasks.add(x, task_rows, quantize);
}

RoundedValues::RoundedValues(const FloatOperand& value, uint16_t* codes)
    : value_(value),
      codes_(codes),
      amax_({value.batch, value.heads, tasks_per_head(value.rows), value.columns}) {}

void RoundedValues::add_to(Tasks& tasks, const float* mean) {
  tasks.add(value_, kTaskRows, [this, mean](const Tasks::Rows& task) {
    const int64_t columns = value_.columns;
    const int64_t head = task.batch * value_.heads + task.head;
    uint32_t* amax = amax_.get() + task.index * columns;
    std::fill_n(amax, columns, 0);
    row_kernels().round_to_bf16(value_.block(task.batch, task.head, task.first, task.count),
                                mean == nullptr ? nullptr : mean + head * columns,
                                codes_ + (head * value_.rows + task.first) * columns, amax);
  });
}

void RoundedValues::finish(float* scales) const {
  const int64_t per_head = tasks_per_head(value_.rows);
  const int64_t columns = value_.columns;
  for (int64_t head = 0; head < value_.batch * value_.heads; ++head) {
    for (int64_t c = 0; c < columns; ++c) {
      uint32_t bits = 0;
      for (int64_t task = 0; task < per_head; ++task) {
        bits = std::max(bits, amax_.get()[(head * per_head + task) * columns + c]);
      }
      const bool poisoned = bits >= kInfinityBits;
      scales[head * columns + c] = poisoned ? std::numeric_limits<float>::quiet_NaN() : 1.0f;
      for (int64_t m = 0; poisoned && m < value_.rows; ++m) {
        codes_[(head * value_.rows + m) * columns + c] = 0;
      }
    }
  }
}

void dot_query_mean(Tasks& tasks, const FloatOperand& key, const float* key_mean,
                    const float* query_mean, int64_t heads_q, double scale, float* bias) {
  const int64_t queries_per_key = heads_q / std::max<int64_t>(key.heads, 1);
  tasks.add(key, kTaskRows, [=, &key](const Tasks::Rows& task) {
    const RowBlock rows = key.block(task.batch, task.head, task.first, task.count);
    for (int64_t i = 0; i < queries_per_key; ++i) {
      const int64_t head = task.batch * heads_q + task.head * queries_per_key + i;
      const float* mean = query_mean + head * key.columns;
      float* out = bias + head * key.rows + task.first;
      row_kernels().dot_rows(rows, mean, scale, out);
      if (key_mean == nullptr) continue;
      const float* center = key_mean + (task.batch * key.heads + task.head) * key.columns;
      double constant = 0.0;
      for (int64_t c = 0; c < key.columns; ++c) {
        constant += static_cast<double>(mean[c]) * center[c];
      }
      for (int64_t row = 0; row < task.count; ++row) {
        out[row] = static_cast<float>(out[row] - scale * constant);
      }
    }
  });
}

void dot_key_mean(Tasks& tasks, const FloatOperand& query, const float* key_mean, int64_t heads_kv,
                  double scale, float* out) {
  const int64_t queries_per_key = query.heads / std::max<int64_t>(heads_kv, 1);
  tasks.add(query, kTaskRows, [=, &query](const Tasks::Rows& task) {
    const int64_t head_kv = task.batch * heads_kv + task.head / queries_per_key;
    row_kernels().dot_rows(query.block(task.batch, task.head, task.first, task.count),
                           key_mean + head_kv * query.columns, scale,
                           out + (task.batch * query.heads + task.head) * query.rows + task.first);
  });
}

void expand_scales(const float* group_scales, const Groups& groups, int64_t heads, int64_t rows,
                   float* row_scales) {
  for (int64_t head = 0; head < heads; ++head) {
    const float* scales = group_scales + head * groups.scales(rows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t span = r / groups.span_rows;
      row_scales[head * rows + r] =
          scales[span * groups.lane_groups + groups.lane_group(r % groups.span_rows)];
    }
  }
}

std::tuple<Tensor, Tensor> quantize_query(const Tensor& query, const Text& qk,
                                          const Text& granularity, int64_t block, int64_t warp) {
  parse("qk", qk, kQkFormats);
  const FloatOperand q = read_float("query", query);
  const Groups groups =
      query_groups(parse("granularity", granularity, kGranularities), q.rows, block, warp);
  Tensor codes = new_tensor({q.batch, q.heads, q.rows, q.columns}, ScalarType::Char);
  Tensor scales = new_tensor({q.batch, q.heads, groups.scales(q.rows)}, ScalarType::Float);
  Tasks tasks;
  quantize_rows(tasks, q, nullptr, groups,
                {static_cast<int8_t*>(codes.mutable_data_ptr()), q.columns,
                 static_cast<float*>(scales.mutable_data_ptr()), nullptr});
  tasks.run();
  return {codes, scales};
}

std::tuple<Tensor, Tensor, Tensor> quantize_key(const Tensor& key,
                                                const std::optional<Tensor>& mean, bool smooth,
                                                const Text& qk, const Text& granularity,
                                                int64_t block) {
  parse("qk", qk, kQkFormats);
  const FloatOperand k = read_float("key", key);
  const Groups groups =
      key_groups(parse("granularity", granularity, kGranularities), k.rows, block);
  const Tensor used_mean = mean_of(k, mean, smooth);
  Tensor codes = new_tensor({k.batch, k.heads, k.rows, k.columns}, ScalarType::Char);
  Tensor scales = new_tensor({k.batch, k.heads, groups.scales(k.rows)}, ScalarType::Float);
  Tasks tasks;
  quantize_rows(tasks, k, smooth ? fp32(used_mean) : nullptr, groups,
                {static_cast<int8_t*>(codes.mutable_data_ptr()), k.columns,
                 static_cast<float*>(scales.mutable_data_ptr()), nullptr});
  tasks.run();
  return {codes, scales, used_mean};
}

std::tuple<Tensor, Tensor, Tensor> quantize_value(const Tensor& value,
                                                  const std::optional<Tensor>& mean, bool smooth,
                                                  const Text& pv) {
  parse("pv", pv, kPvFormats);
  const FloatOperand v = read_float("value", value);
  const Tensor used_mean = mean_of(v, mean, smooth);
  Tensor codes = new_tensor({v.batch, v.heads, v.rows, v.columns}, ScalarType::BFloat16);
  Tensor scales = new_tensor({v.batch, v.heads, v.columns}, ScalarType::Float);
  Tasks tasks;
  RoundedValues rounded(v, static_cast<uint16_t*>(codes.mutable_data_ptr()));
  rounded.add_to(tasks, smooth ? fp32(used_mean) : nullptr);
  tasks.run();
  rounded.finish(static_cast<float*>(scales.mutable_data_ptr()));
  return {codes, scales, used_mean};
}

}  // namespace torch_sage
