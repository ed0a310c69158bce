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

int64_t tasks_per_head(int64_t rows, int64_t task_rows) {
  return rows / task_rows + (rows % task_rows != 0);
}

// Calls body(b, h, task, first row, rows) for every task of every head of x. A body must not throw:
// torch 2.11 would report that its threads failed, and nothing more.
template <typename Body>
void for_each_task(const Operand& x, int64_t task_rows, const Body& body) {
  const int64_t per_head = tasks_per_head(x.rows, task_rows);
  const int64_t tasks = x.batch * x.heads * per_head;
  // At least 32 Ki elements a thread: below that waking it takes longer than the work.
  const int64_t grain = std::max<int64_t>(1, 32768 / (std::min(task_rows, x.rows + 1) * x.columns));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / per_head;
      const int64_t first = i % per_head * task_rows;
      body(head / x.heads, head % x.heads, i, first, std::min(task_rows, x.rows - first));
    }
  });
}

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
    token_mean(x, static_cast<float*>(mean.mutable_data_ptr()));
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

void token_mean(const FloatOperand& x, float* mean) {
  const int64_t per_head = tasks_per_head(x.rows, kTaskRows);
  const RowKernels& kernels = row_kernels();
  const Scratch<double> sums({x.batch, x.heads, per_head, x.columns});
  for_each_task(x, kTaskRows, [&](int64_t b, int64_t h, int64_t task, int64_t first, int64_t rows) {
    double* partial = sums.get() + task * x.columns;
    std::fill_n(partial, x.columns, 0.0);
    kernels.add_columns(x.block(b, h, first, rows), partial);
  });
  for (int64_t head = 0; head < x.batch * x.heads; ++head) {
    double total[kMaxHeadDim] = {};
    for (int64_t task = 0; task < per_head; ++task) {
      const double* partial = sums.get() + (head * per_head + task) * x.columns;
      for (int64_t c = 0; c < x.columns; ++c) total[c] += partial[c];
    }
    const double rows = static_cast<double>(std::max<int64_t>(x.rows, 1));
    for (int64_t c = 0; c < x.columns; ++c) {
      mean[head * x.columns + c] = static_cast<float>(total[c] / rows);
    }
  }
}

void quantize_rows(const FloatOperand& x, const float* mean, const Groups& groups,
                   const QuantizedRows& out) {
  const RowKernels& kernels = row_kernels();
  const auto quantize = [&](int64_t b, int64_t h, int64_t first, int64_t rows) {
    const int64_t head = b * x.heads + h;
    const int64_t row = head * x.rows + first;
    const int64_t scale =
        head * groups.scales(x.rows) +
        first / groups.block_rows * (groups.block_rows / groups.span_rows) * groups.lane_groups;
    kernels.quantize(x.block(b, h, first, rows),
                     mean == nullptr ? nullptr : mean + head * x.columns, groups,
                     {out.codes + row * out.row_bytes, out.row_bytes,
                      out.group_scales == nullptr ? nullptr : out.group_scales + scale,
                      out.row_scales == nullptr ? nullptr : out.row_scales + row});
  };
  if (x.rows == 0) {  // "tensor" has a scale to write even so
    for (int64_t head = 0; head < x.batch * x.heads; ++head) {
      quantize(head / x.heads, head % x.heads, 0, 0);
    }
    return;
  }
  const int64_t blocks = std::max<int64_t>(1, kTaskRows / groups.block_rows);
  const int64_t task_rows = groups.block_rows < x.rows ? blocks * groups.block_rows : x.rows;
  for_each_task(x, task_rows, [&](int64_t b, int64_t h, int64_t, int64_t first, int64_t rows) {
    quantize(b, h, first, rows);
  });
}

void round_values(const FloatOperand& value, const float* mean, uint16_t* codes, float* scales) {
  const int64_t per_head = tasks_per_head(value.rows, kTaskRows);
  const int64_t columns = value.columns;
  const RowKernels& kernels = row_kernels();
  const Scratch<uint32_t> amax({value.batch, value.heads, per_head, columns});
  const auto round = [&](int64_t b, int64_t h, int64_t task, int64_t first, int64_t rows) {
    const int64_t head = b * value.heads + h;
    uint32_t* task_amax = amax.get() + task * columns;
    std::fill_n(task_amax, columns, 0);
    kernels.round_to_bf16(value.block(b, h, first, rows),
                          mean == nullptr ? nullptr : mean + head * columns,
                          codes + (head * value.rows + first) * columns, task_amax);
  };
  for_each_task(value, kTaskRows, round);
  for (int64_t head = 0; head < value.batch * value.heads; ++head) {
    for (int64_t c = 0; c < columns; ++c) {
      uint32_t bits = 0;
      for (int64_t task = 0; task < per_head; ++task) {
        bits = std::max(bits, amax.get()[(head * per_head + task) * columns + c]);
      }
      const bool poisoned = bits >= kInfinityBits;
      scales[head * columns + c] = poisoned ? std::numeric_limits<float>::quiet_NaN() : 1.0f;
      for (int64_t m = 0; poisoned && m < value.rows; ++m) {
        codes[(head * value.rows + m) * columns + c] = 0;
      }
    }
  }
}

void dot_query_mean(const FloatOperand& key, const float* key_mean, const float* query_mean,
                    int64_t heads_q, double scale, float* bias) {
  const int64_t queries_per_key = heads_q / std::max<int64_t>(key.heads, 1);
  const RowKernels& kernels = row_kernels();
  const auto dot = [&](int64_t b, int64_t h, int64_t, int64_t first, int64_t rows) {
    for (int64_t head = h * queries_per_key; head < (h + 1) * queries_per_key; ++head) {
      const float* mean = query_mean + (b * heads_q + head) * key.columns;
      float* out = bias + (b * heads_q + head) * key.rows + first;
      kernels.dot_rows(key.block(b, h, first, rows), mean, scale, out);
      if (key_mean == nullptr) continue;
      double constant = 0.0;
      for (int64_t c = 0; c < key.columns; ++c) {
        constant += static_cast<double>(mean[c]) * key_mean[(b * key.heads + h) * key.columns + c];
      }
      for (int64_t row = 0; row < rows; ++row) {
        out[row] = static_cast<float>(out[row] - scale * constant);
      }
    }
  };
  for_each_task(key, kTaskRows, dot);
}

void dot_key_mean(const FloatOperand& query, const float* key_mean, int64_t heads_kv, double scale,
                  float* out) {
  const int64_t queries_per_key = query.heads / std::max<int64_t>(heads_kv, 1);
  const RowKernels& kernels = row_kernels();
  const auto dot = [&](int64_t b, int64_t h, int64_t, int64_t first, int64_t rows) {
    const float* mean = key_mean + (b * heads_kv + h / queries_per_key) * query.columns;
    kernels.dot_rows(query.block(b, h, first, rows), mean, scale,
                     out + (b * query.heads + h) * query.rows + first);
  };
  for_each_task(query, kTaskRows, dot);
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
  quantize_rows(q, nullptr, groups,
                {static_cast<int8_t*>(codes.mutable_data_ptr()), q.columns,
                 static_cast<float*>(scales.mutable_data_ptr()), nullptr});
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
  quantize_rows(k, smooth ? fp32(used_mean) : nullptr, groups,
                {static_cast<int8_t*>(codes.mutable_data_ptr()), k.columns,
                 static_cast<float*>(scales.mutable_data_ptr()), nullptr});
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
  round_values(v, smooth ? fp32(used_mean) : nullptr,
               static_cast<uint16_t*>(codes.mutable_data_ptr()),
               static_cast<float*>(scales.mutable_data_ptr()));
  return {codes, scales, used_mean};
}

}  // namespace torch_sage
