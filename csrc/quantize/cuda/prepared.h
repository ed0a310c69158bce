// K and V as Hopper's attention kernel reads them, and the kernel that makes them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/packed.h"
#include "common/params.h"
#include "quantize/cuda/rotary.h"

namespace torch_sage {

constexpr int kKeyTile = 64;       // keys of one image
constexpr int kKeyBlock128 = 128;  // keys that share 4 scales: index (key % 8) / 2
constexpr int kValueGroup = 1024;  // keys over which V has one scale and one shift per channel
constexpr float kValueMax = .25f;  // magnitude that the largest V of such a group gets

// All of one contiguous [b, h_kv, ...] each; `width` is head_dim zero-padded to 64, 128 or 256.
// Packed sequences are one batch entry, in which each begins with a block of 128 keys and a group
// of 1024 of its own.
struct PreparedKv {
  int seqlen;
  int width;
  Packed packed;   // the keys of sequences, if they are packed
  int64_t tiles;   // of 64 keys, an even number
  int64_t groups;  // of 1024 keys
  // Images [64 keys, width] of int8, 16-byte chunks of a row permuted as wgmma's swizzle wants; of
  // 256 channels, two of 128, one behind the other.
  int8_t* key_codes;
  float* key_scales;  // [blocks of 128 keys, 4]
  float* key_mean;    // [head_dim], per sequence
  // Images [width, 64 keys] of E4M3; the 16 keys of a chunk stand in the order in which a thread
  // holds its scores: 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15.
  uint8_t* value_codes;
  float* value_scales;  // [groups of 1024 keys, width]; NaN: something in there is not finite
  // The same; what V has more than codes times scales on average: the mean that was subtracted, and
  // the mean error of the codes.
  float* value_shift;
};

constexpr int kQueryBlock = 192;  // rows: the most of a piece of the attention kernel's work

// A query as the attention kernel quantizes it otherwise, rows padded to whole blocks with zeros.
struct PreparedQuery {
  int64_t rows;   // of a head, with those that fill up the last block
  int8_t* codes;  // [b, h_q, rows, width], 16-byte chunks permuted like those of keys; may be null
  float* scales;  // [b, h_q, rows], times |softmax scale| * log2(e), whose sign is in the codes
};

// What prepare_kv makes of a query and key that lack RMSNorm and rotary embeddings.
struct QueryParams {
  int heads, seqlen;
  const void* query;  // of the dtype and head_dim of key, rows aligned to 16 bytes
  Rows rows;
  Rotary rotary;
  float scale;  // of the scores, any sign
  PreparedQuery prepared;
};

// The output of packed sequences, some of whose rows prepare_kv fills: attention comes to no
// others.
struct PackedOutput {
  Packed queries;
  int heads, row_elements;
  void* output;  // [rows, row_elements], of the dtype of key
  float* lse;    // [heads, rows]; may be null
};

struct PrepareParams {
  int batch, heads, head_dim, head_dim_v;  // the latter two multiples of 8
  int key_mean_columns;                    // head_dim before it was padded
  const void* key;                         // rows aligned to 16 bytes
  const void* value;
  Dtype dtype;
  int64_t key_stride_b, key_stride_h, key_stride_n;
  int64_t value_stride_b, value_stride_h, value_stride_n;
  Rotary key_rotary;  // what the key lacks; then the query, too, is prepared
  QueryParams query;
  bool smooth_key, smooth_value;
  PreparedKv kv;
  PackedOutput packed_output;  // if kv is of packed sequences
  int* work_counter;           // set to zero for the attention kernel; may be null
};

void launch_prepare_kv(const PrepareParams& params, cudaStream_t stream);

}  // namespace torch_sage
