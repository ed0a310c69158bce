// What the host hands to Hopper's attention kernel: plain data.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attention/sm90/parts.h"
#include "common/params.h"
#include "quantize/cuda/prepared.h"

namespace torch_sage::sm90 {

struct AttentionParams {
  // Packed sequences are one batch entry, whose rows are seqlen_q.
  int batch, heads_q, heads_kv, seqlen_q, head_dim, head_dim_v;
  Packed queries;  // kv.packed has the keys

  const void* query;  // [b, h_q, n, head_dim], rows aligned to 16 bytes, head_dim a multiple of 8
  Dtype dtype;        // of query and output
  Rows query_rows;
  PreparedQuery prepared_query;  // used in place of `query` if it has codes

  PreparedKv kv;
  int key_mean_columns;  // head_dim before it was padded

  // Key m is visible to query n iff m <= n + last_key_offset and m < kv.seqlen.
  int last_key_offset;
  Causal causal;  // what follows it where sequences are packed
  float scale;    // of the scores, any sign

  MaskKind mask_kind;
  const void* mask;
  int64_t mask_stride_b, mask_stride_h, mask_stride_n, mask_stride_m;
  bool mask_is_dense;  // elements of a row are adjacent, rows aligned to 16 bytes

  void* output;  // [b, h_q, n, head_dim_v], last dimension dense
  Rows output_rows;
  float* lse;  // [b, h_q, n] natural log; may be null
  // If there are any, heads_q, seqlen_q, query_rows and mask are of rows that share their keys.
  Parts parts;

  bool exact_exponential;
  bool is_part;  // lse, if any, is to merge parts: of the sum that the output was divided by
  // Zero when the kernel runs; null: every block takes a fixed share, which packed sequences
  // forbid.
  int* work_counter;
  bool follows_prepare;  // launched right behind prepare_kv, may start before it has ended
};

// Throws std::runtime_error where the launch fails.
void launch_attention(const AttentionParams& params, int multiprocessors, cudaStream_t stream);

}  // namespace torch_sage::sm90
