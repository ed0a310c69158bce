// Quantization of whole tensors on torch's threads: what the quantizer ops and sdpa share.
#pragma once

#include <cstdint>

#include "common/operand.h"
#include "common/types.h"
#include "quantize/groups.h"
#include "quantize/tasks.h"

namespace torch_sage {

// Tiles that the ops assume where an argument does not say; recipes.py has no other for the CPU.
constexpr int64_t kQueryBlock = 128;
constexpr int64_t kQueryWarp = 32;
constexpr int64_t kKeyBlock = 64;

// Rows of codes are this long, so that dot products need no tail of single bytes.
constexpr int64_t row_bytes(int64_t columns) { return (columns + 3) / 4 * 4; }

Groups query_groups(Granularity granularity, int64_t rows, int64_t block, int64_t warp);
Groups key_groups(Granularity granularity, int64_t rows, int64_t block);

// Each of these adds its tasks to `tasks`; results are there after tasks.run(), and finish() where
// there is one.

// mean[b, h, c] over the rows (E1), 0 without rows. The same bits for any number of threads.
class TokenMean {
 public:
  explicit TokenMean(const FloatOperand& x);
  void add_to(Tasks& tasks);
  void finish(float* mean) const;

 private:
  const FloatOperand& x_;
  Scratch<double> sums_;  // [b, h, task, c]
};

// bias[b, h_q, m] = scale * (key row m - key_mean) . query_mean of the query head (E3); key_mean
// may be null. Without its constant part, fp32 is enough.
void dot_query_mean(Tasks& tasks, const FloatOperand& key, const float* key_mean,
                    const float* query_mean, int64_t heads_q, double scale, float* bias);

// Codes and scales of every row; mean [b, h, c] may be null, and so may each kind of scales:
// group_scales [b, h, groups.scales(rows)], row_scales [b, h, rows].
void quantize_rows(Tasks& tasks, const FloatOperand& x, const float* mean, const Groups& groups,
                   const QuantizedRows& out);

// Codes [b, h, m, c] bf16 and scales [b, h, c]: 1, or NaN with codes 0 where a channel is not
// finite.
class RoundedValues {
 public:
  RoundedValues(const FloatOperand& value, uint16_t* codes);
  void add_to(Tasks& tasks, const float* mean);  // mean [b, h, c] may be null
  void finish(float* scales) const;

 private:
  const FloatOperand& value_;
  uint16_t* codes_;
  Scratch<uint32_t> amax_;  // [b, h, task, c]
};

// lse_shift[b, h_q, n] = scale * (query . key_mean of its key head), in fp64 (E12).
void dot_key_mean(Tasks& tasks, const FloatOperand& query, const float* key_mean, int64_t heads_kv,
                  double scale, float* out);

// row_scales[b, h, n] from group_scales.
void expand_scales(const float* group_scales, const Groups& groups, int64_t heads, int64_t rows,
                   float* row_scales);

}  // namespace torch_sage
