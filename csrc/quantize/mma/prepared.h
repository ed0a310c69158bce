// K and V as the mma.sync attention kernels read them, and the kernels that make them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/packed.h"
#include "common/params.h"

namespace torch_sage::mma {

constexpr int kKeys = 64;  // of a tile: they share 4 scales, index (key % 8) / 2

// What P and V are multiplied in. The 16-bit formats take V as it is where that has their type.
enum class Pv {
  kBf16,      // fp32 accumulator
  kFp16,      // fp32 accumulator
  kFp16Fp16,  // fp16 accumulator, flushed to fp32 after every tile
  kE4m3,      // fp32 accumulator, flushed after every tile
  kE4m3Fp16,  // fp16 accumulator, flushed after every tile
};

constexpr bool is_e4m3(Pv pv) { return pv == Pv::kE4m3 || pv == Pv::kE4m3Fp16; }

// P_r and V_r of algorithm.md 2.5: 64 products of both fit what accumulates them.
constexpr float largest_probability(Pv pv) {
  return pv == Pv::kE4m3 ? 448.f : pv == Pv::kE4m3Fp16 ? 112.f : 1.f;
}
constexpr float largest_value(Pv pv) { return pv == Pv::kE4m3 ? 448.f : 9.f; }

// Rows that share a scale (algorithm.md 2.2). A warp has 32 query rows, 16 where width is 256.
enum class Granularity { kThread, kWarp, kBlock, kTensor };

// All of one contiguous [b, h_kv, ...] each; `width` is head_dim zero-padded to 64, 128 or 256.
// Where sequences are packed, a head has tiles of all of them, numbered as units of kKeys rows, and
// means and scales of V are [sequences, h_kv, ...].
struct PreparedKv {
  int seqlen;  // packed: rows of all sequences
  Packed packed;
  int64_t tiles;  // of a head
  int width;
  bool is_int4;
  // [64 * tiles, row_bytes]: INT4 codes two to a byte, the lower channel in the lower nibble. Zero
  // beyond head_dim and beyond seqlen.
  uint8_t* key_codes;
  float* key_scales;  // [tiles, 4], equal ones for the coarser granularities
  float* key_mean;    // [head_dim]; null: K is not smoothed
  // E4M3: [width, 64 * tiles], the 16 keys of a chunk in the order in which a thread holds its
  // scores: 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15. Zero beyond head_dim_v and beyond seqlen.
  // 16 bits: [seqlen, width], zero beyond head_dim_v; null: the attention kernel reads V itself.
  void* value_codes;
  float* value_scales;  // [width]; null where value_codes are; NaN: the channel is not finite
  float* value_mean;    // [width]; null: V is not smoothed

  __host__ __device__ int row_bytes() const { return is_int4 ? width / 2 : width; }
};

struct PrepareParams {
  int batch, heads, head_dim, head_dim_v;  // the latter two multiples of 8; packed: batch is not
                                           // used, and every stride_b is 0
  int key_mean_columns;                    // head_dim before it was padded
  const void* key;                         // rows aligned to 16 bytes
  const void* value;
  Dtype dtype;
  Rows key_rows, value_rows;
  Granularity granularity;
  Pv pv;
  PreparedKv kv;
  float* partials;  // partial_floats() of scratch
};

// Floats of scratch that launch_prepare_kv needs.
int64_t partial_floats(const PrepareParams& params);

// Throws std::runtime_error where a launch fails. seqlen, batch and heads are positive.
void launch_prepare_kv(const PrepareParams& params, cudaStream_t stream);

struct QueryAmaxParams {
  int batch, heads, seqlen, head_dim;  // head_dim a multiple of 8
  Packed packed;                       // batch and seqlen are not used then
  const void* query;                   // rows aligned to 16 bytes
  Dtype dtype;
  Rows rows;
  bool smooth;     // subtract the mean of every 128 rows before
  uint32_t* amax;  // [b or sequences, h]: bits of the largest magnitude, NaN above all (rule R2)
};

// What granularity "tensor" needs before the attention kernel quantizes Q.
void launch_query_amax(const QueryAmaxParams& params, cudaStream_t stream);

}  // namespace torch_sage::mma
