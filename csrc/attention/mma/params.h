// What the host hands to the mma.sync attention kernels: plain data.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/params.h"
#include "quantize/mma/prepared.h"

namespace torch_sage::mma {

struct AttentionParams {
  // Where sequences are packed, batch and seqlen_q are not used, and every stride_b is 0.
  int batch, heads_q, heads_kv, seqlen_q, head_dim, head_dim_v;
  Packed queries;  // kv.packed has the keys

  const void* query;  // [b, h_q, n, head_dim], rows aligned to 16 bytes, head_dim a multiple of 8
  Dtype dtype;        // of query and output
  Rows query_rows;
  Granularity granularity;
  const uint32_t* query_amax;  // [b or sequences, h_q], for granularity kTensor

  PreparedKv kv;
  int key_mean_columns;  // head_dim before it was padded
  Pv pv;

  // V in 16 bits, where that is the format; rows aligned to 16 bytes, columns beyond these are
  // zero.
  const uint16_t* value;
  Rows value_rows;
  int value_columns;
  // K itself, alike, in the dtype of the query, where Q is smoothed; null elsewhere.
  const void* key;
  Rows key_rows;
  int key_columns;

  // Key m is visible to query n iff m <= n + last_key_offset and m < kv.seqlen.
  int last_key_offset;
  Causal causal;  // what follows it where sequences are packed
  float scale;    // of the scores, any sign

  MaskKind mask_kind;
  const void* mask;
  int64_t mask_stride_b, mask_stride_h, mask_stride_n, mask_stride_m;

  void* output;  // [b, h_q, n, head_dim_v], last dimension dense
  Rows output_rows;
  float* lse;  // [b, h_q, n] or, packed, [h_q, rows], natural log; may be null
};

// Throws std::runtime_error where the launch fails.
void launch_attention(const AttentionParams& params, cudaStream_t stream);

}  // namespace torch_sage::mma
