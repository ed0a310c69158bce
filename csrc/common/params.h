// What the host entries hand to a kernel: plain data, no torch type, no method.
#pragma once

#include <cstdint>

namespace torch_sage {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

// Where the rows of a [b, h, n, columns] tensor lie whose columns are adjacent.
struct Rows {
  int64_t stride_b, stride_h, stride_n;  // elements
};

// Key m is visible to query n iff: always | m <= n | m <= n + seqlen_k - seqlen_q.
enum class Causal { kNone, kTopLeft, kBottomRight };

// The last key that query 0 sees of those that exist; query n sees n more.
constexpr int last_key_offset(Causal causal, int64_t seqlen_q, int64_t seqlen_k) {
  return static_cast<int>(causal == Causal::kNone      ? seqlen_k
                          : causal == Causal::kTopLeft ? 0
                                                       : seqlen_k - seqlen_q);
}

enum class MaskKind { kNone, kBool, kFloat32, kBFloat16, kFloat16 };

// Attention on quantized operands; query_scale * key_scale * code dot product is the raw score.
// All strides are in elements. Scales are expanded to one per token by the host entry, so every
// granularity runs the same kernel. A NaN scale poisons what it multiplies (algorithm.md 2.10).
struct CpuAttentionParams {
  int64_t batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim_v;
  int64_t
      row_bytes;  // bytes per row of query and key codes: head_dim zero-padded to a multiple of 4

  const int8_t* query_codes;  // [b, h_q, n, row_bytes], codes in [-127, 127]
  const float* query_scales;  // [b, h_q, n]
  const int8_t* key_codes;    // [b, h_kv, m, row_bytes], codes in [-127, 127]
  const float* key_scales;    // [b, h_kv, m]
  const uint16_t* value;      // [b, h_kv, m, d_v] bf16 bits, finite (poisoned channels hold 0)
  const float* value_scales;  // [b, h_kv, d_v]: 1, or NaN where the channel is poisoned
  const float* value_mean;    // [b, h_kv, d_v], added to every row that attends to a key
  const float* score_bias;    // [b, h_q, m] added to base-2 scores; may be null: none
  const float* lse_shift;     // [b, h_q, n]: scale * (query . key_mean); may be null: no shift

  MaskKind mask_kind;
  const void* mask;  // broadcast to [b, h_q, n, m] by strides (0 repeats); may be null
  int64_t mask_stride_b, mask_stride_h, mask_stride_n, mask_stride_m;

  Causal causal;
  float scale;  // any sign; multiplies the raw score (natural-log units)

  Dtype output_dtype;
  void* output;  // [b, h_q, n, d_v]; last dim has stride 1
  int64_t output_stride_b, output_stride_h, output_stride_n;
  float* lse;  // [b, h_q, n] natural log; may be null
};

}  // namespace torch_sage
