// K and V in the layout of the mma.sync attention kernels.
//
// Two or three launches: what has to be known of all tokens first (statistics.cuh), then codes of K
// and V at once, each of which its own blocks read a second time.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "quantize/cuda/rules.cuh"
#include "quantize/mma/statistics.cuh"

namespace torch_sage::mma {
namespace {

// A thread has 32 elements of the tiles of its block.
template <int kWidth>
constexpr int kThreads = kWidth == 256 ? 512 : 256;
template <int kWidth>
constexpr int kTiles = kWidth == 64 ? 2 : 1;

template <int kWidth>
constexpr int kTokens = kTiles<kWidth> * kKeys;

// Where a block is: tiles of one head.
template <int kWidth>
struct Place {
  Head head;
  int first_token, valid_tokens;  // of the sequence
  int64_t row;                    // of the workspace
  int first_tile, valid_tiles;    // in the row

  __device__ explicit Place(const PrepareParams& p)
      : head(head_of_block(p.kv.packed, p.heads, p.kv.seqlen, kTokens<kWidth>, blockIdx.x)),
        first_token(head.unit * kTokens<kWidth>),
        valid_tokens(min(kTokens<kWidth>, head.seqlen - first_token)),
        row(head.row(p.kv.packed, p.heads)),
        first_tile(head.first(p.kv.packed, p.heads, kKeys) + head.unit * kTiles<kWidth>),
        valid_tiles((valid_tokens + kKeys - 1) / kKeys) {}
  __device__ bool is_there() const { return first_token >= 0 && valid_tokens > 0; }
  // The block that writes what a head has one of.
  __device__ bool is_first() const { return first_token == 0; }
};

// All tokens of a block, by rows: a thread has 8 channels of every kRowsAtOnce-th.
template <int kWidth, bool kIsWide>
struct Rows8 {
  static constexpr int kLanes = kWidth / 8, kRowsAtOnce = kThreads<kWidth> / kLanes;
  static constexpr int kRounds = kTiles<kWidth> * kKeys / kRowsAtOnce;
  Eight<kIsWide> x[kRounds];

  static __device__ __forceinline__ int column() { return threadIdx.x % kLanes * 8; }
  static __device__ __forceinline__ int row(int round) {
    return round * kRowsAtOnce + threadIdx.x / kLanes;
  }
  __device__ __forceinline__ Rows8(const Tokens<kIsWide>& tokens, const Place<kWidth>& place) {
#pragma unroll
    for (int i = 0; i < kRounds; i++)
      tokens.load(x[i], place.first_token + row(i), column(), row(i) < place.valid_tokens);
  }
  // The numbers of a round minus the mean.
  __device__ __forceinline__ void subtract(float (&to)[8], int round, Dtype dtype,
                                           const float (&mean)[8]) const {
#pragma unroll
    for (int c = 0; c < 8; c++) {
      const float2 pair = x[round].pair(c / 2, dtype);
      to[c] = (c % 2 ? pair.y : pair.x) - mean[c];
    }
  }
};

__device__ __forceinline__ void load_8(float (&to)[8], const float* from) {
#pragma unroll
  for (int c = 0; c < 8; c++) to[c] = from[c];
}

__device__ __forceinline__ uint4 pack_bf16(const float (&x)[8]) {
  uint4 packed;
  __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&packed);
#pragma unroll
  for (int i = 0; i < 4; i++) pairs[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
  return packed;
}
__device__ __forceinline__ uint4 pack_fp16(const float (&x)[8]) {
  uint4 packed;
  __half2* pairs = reinterpret_cast<__half2*>(&packed);
#pragma unroll
  for (int i = 0; i < 4; i++) pairs[i] = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
  return packed;
}
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b) {
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}

template <int kWidth, bool kIsWide>
__device__ __forceinline__ void quantize_key(const PrepareParams& p, const Plan& plan) {
  using Rows8 = mma::Rows8<kWidth, kIsWide>;
  constexpr int kTiles = mma::kTiles<kWidth>;
  constexpr int kRoundsPerTile = Rows8::kRounds / kTiles;
  __shared__ float mean_of[kWidth];
  __shared__ uint32_t amax_of[kTiles][4], head_amax;
  __shared__ float inverse_of[kTiles][4];

  const Place<kWidth> place(p);
  if (!place.is_there()) return;
  const Rows8 rows(Tokens<kIsWide>(p, kKey, place.head), place);
  const int thread = threadIdx.x, column = Rows8::column();
  const bool has_one_scale = p.granularity == Granularity::kTensor;

  if (thread < kTiles * 4) amax_of[thread / 4][thread % 4] = 0;
  if (thread == 0) head_amax = 0;
  __syncthreads();
  if (thread < kWidth) {
    Channel channel;
    if (p.kv.key_mean != nullptr || has_one_scale)
      channel = read_channel(p, plan, kKey, place.head, thread, p.kv.key_mean != nullptr);
    mean_of[thread] = channel.mean;
    if (has_one_scale) atomicMax(&head_amax, __float_as_uint(channel.amax));
    if (p.kv.key_mean != nullptr && place.is_first() && thread < p.key_mean_columns)
      p.kv.key_mean[static_cast<int64_t>(place.head.index) * p.key_mean_columns + thread] =
          channel.mean;
  }
  __syncthreads();
  float mean[8], x[8];
  load_8(mean, mean_of + column);

  // Rows of a thread share (row % 8) / 2, the index of their scale, with half a warp or all of it.
  if (!has_one_scale) {
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) {
      float amax = 0;
#pragma unroll
      for (int i = tile * kRoundsPerTile; i < (tile + 1) * kRoundsPerTile; i++) {
        if (Rows8::row(i) >= place.valid_tokens) continue;
        rows.subtract(x, i, p.dtype, mean);
#pragma unroll
        for (int c = 0; c < 8; c++) amax = larger_of(amax, fabsf(x[c]));
      }
      uint32_t bits = __float_as_uint(amax);  // as integers, NaN is the largest
#pragma unroll
      for (int step = Rows8::kLanes == 8 ? 8 : 16; step >= 1; step >>= 1)
        bits = max(bits, __shfl_xor_sync(~0u, bits, step));
      if (thread % 16 == 0) atomicMax(&amax_of[tile][Rows8::row(0) % 8 / 2], bits);
    }
  }
  __syncthreads();
  const int64_t first_tile = place.row * p.kv.tiles + place.first_tile;
  if (thread < kTiles * 4) {
    const int tile = thread / 4;
    uint32_t bits = has_one_scale ? head_amax : amax_of[tile][thread % 4];
    if (p.granularity == Granularity::kWarp || p.granularity == Granularity::kBlock) {
#pragma unroll
      for (int i = 0; i < 4; i++) bits = max(bits, amax_of[tile][i]);
    }
    const float amax = __uint_as_float(bits);
    const ScaleAndInverse scale =
        p.kv.is_int4 ? scale_and_inverse_7(amax) : scale_and_inverse_127(amax);
    inverse_of[tile][thread % 4] = scale.inverse;
    if (tile < place.valid_tiles) p.kv.key_scales[first_tile * 4 + thread] = scale.scale;
  }
  __syncthreads();

  const int row_bytes = p.kv.row_bytes();
  uint8_t* codes = p.kv.key_codes + first_tile * (kKeys * row_bytes);
#pragma unroll
  for (int i = 0; i < Rows8::kRounds; i++) {
    const int row = Rows8::row(i);
    if (row >= place.valid_tiles * kKeys) continue;
    const bool is_token = row < place.valid_tokens;
    rows.subtract(x, i, p.dtype, mean);
    const float inverse = is_token ? inverse_of[i / kRoundsPerTile][row % 8 / 2] : 0.f;
#pragma unroll
    for (int c = 0; c < 8; c++) x[c] *= inverse;
    if (p.kv.is_int4) {
      const uint32_t packed =
          pack_s4(x[0], x[1], pack_s4(x[2], x[3], pack_s4(x[4], x[5], pack_s4(x[6], x[7], 0))));
      *reinterpret_cast<uint32_t*>(codes + row * row_bytes + column / 2) = packed;
    } else {
      *reinterpret_cast<uint2*>(codes + row * row_bytes + column) = make_uint2(
          pack_s8(x[0], x[1], pack_s8(x[2], x[3], 0)), pack_s8(x[4], x[5], pack_s8(x[6], x[7], 0)));
    }
  }
}

// What a channel of V is multiplied by before it is rounded; 0: it is not finite, all its codes
// are 0.
__device__ __forceinline__ ScaleAndInverse value_scale(Pv pv, float amax) {
  if (is_e4m3(pv)) return scale_and_inverse(amax, largest_value(pv));
  const bool is_bf16 = pv == Pv::kBf16;
  const bool is_defined = is_bf16 ? is_finite(amax) : amax < 65520.f;  // from there on fp16 is Inf
  return {is_defined ? 1.f : __int_as_float(0x7fffffff), is_defined ? 1.f : 0.f};
}

// Mean and inverse of all channels of V, to shared memory.
template <int kWidth>
__device__ __forceinline__ void read_channels(const PrepareParams& p, const Plan& plan,
                                              const Place<kWidth>& place, float* mean_of,
                                              float* inverse_of) {
  const int thread = threadIdx.x;
  if (thread < kWidth) {
    const bool is_smooth = p.kv.value_mean != nullptr;
    const Channel channel = read_channel(p, plan, kValue, place.head, thread, is_smooth);
    const ScaleAndInverse scale = value_scale(p.pv, channel.amax);
    mean_of[thread] = channel.mean;
    inverse_of[thread] = scale.inverse;
    if (place.is_first()) {
      const int64_t at = static_cast<int64_t>(place.head.index) * kWidth + thread;
      p.kv.value_scales[at] = scale.scale;
      if (is_smooth) p.kv.value_mean[at] = channel.mean;
    }
  }
  __syncthreads();
}

// V in 16 bits, row by row.
template <int kWidth, bool kIsWide>
__device__ __forceinline__ void round_value(const PrepareParams& p, const Plan& plan) {
  using Rows8 = mma::Rows8<kWidth, kIsWide>;
  __shared__ float mean_of[kWidth], inverse_of[kWidth];
  const Place<kWidth> place(p);
  if (!place.is_there()) return;
  const Rows8 rows(Tokens<kIsWide>(p, kValue, place.head), place);
  const int column = Rows8::column();
  read_channels(p, plan, place, mean_of, inverse_of);
  float mean[8], inverse[8];
  load_8(mean, mean_of + column);
  load_8(inverse, inverse_of + column);
  const bool is_bf16 = p.pv == Pv::kBf16;
  const float limit = is_bf16 ? 0x1.fep127f : 65504.f;  // fp32 beyond it would round to Inf
  uint16_t* codes = static_cast<uint16_t*>(p.kv.value_codes) +
                    (place.row * p.kv.seqlen + place.head.start + place.first_token) * kWidth;
#pragma unroll
  for (int i = 0; i < Rows8::kRounds; i++) {
    const int row = Rows8::row(i);
    if (row >= place.valid_tokens) continue;
    float x[8];
    rows.subtract(x, i, p.dtype, mean);
#pragma unroll
    for (int c = 0; c < 8; c++) x[c] = inverse[c] != 0 ? fminf(fmaxf(x[c], -limit), limit) : 0.f;
    *reinterpret_cast<uint4*>(codes + static_cast<int64_t>(row) * kWidth + column) =
        is_bf16 ? pack_bf16(x) : pack_fp16(x);
  }
}

// V in E4M3, transposed in registers: a thread has 8 channels of 4 tokens of every 16 (2 q, 2 q + 1
// and the two 8 behind), so that the four codes of a channel are adjacent. 16 lanes have the 64
// tokens of a tile.
template <int kWidth, bool kIsWide>
__device__ __forceinline__ void transpose_value(const PrepareParams& p, const Plan& plan) {
  constexpr int kPairs = kWidth / 16;  // pairs of 8 channels: of a warp, with the tokens of a tile
  __shared__ float mean_of[kWidth], inverse_of[kWidth];
  const Place<kWidth> place(p);
  if (!place.is_there()) return;
  const Tokens<kIsWide> tokens(p, kValue, place.head);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 16;
  static_assert(kThreads<kWidth> / 32 == kTiles<kWidth> * kPairs);
  const int tile = warp / kPairs, first_column = warp % kPairs * 16 + lane / 16 * 8;
  const auto row_of = [&](int i) {
    return tile * kKeys + quad / 4 * 16 + quad % 4 * 2 + (i & 1) + (i & 2) * 4;
  };
  Eight<kIsWide> x[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    tokens.load(x[i], place.first_token + row_of(i), first_column, row_of(i) < place.valid_tokens);
  read_channels(p, plan, place, mean_of, inverse_of);
  if (tile >= place.valid_tiles) return;

  const int64_t row_bytes = p.kv.tiles * kKeys;
  uint8_t* codes = static_cast<uint8_t*>(p.kv.value_codes) + place.row * row_bytes * kWidth +
                   (place.first_tile + tile) * kKeys + quad * 4;
#pragma unroll
  for (int c = 0; c < 8; c++) {
    const int column = first_column + c;
    const float mean = mean_of[column], inverse = inverse_of[column];
    float scaled[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 pair = x[i].pair(c / 2, p.dtype);
      const bool is_defined = row_of(i) < place.valid_tokens && inverse != 0;
      scaled[i] = is_defined ? ((c % 2 ? pair.y : pair.x) - mean) * inverse : 0.f;
    }
    *reinterpret_cast<uint32_t*>(codes + column * row_bytes) =
        pack_e4m3(scaled[0], scaled[1]) | pack_e4m3(scaled[2], scaled[3]) << 16;
  }
}

// blockIdx.y is an Operand.
template <int kWidth, bool kIsWide>
__global__ void __launch_bounds__(kThreads<kWidth>, (kIsWide ? 512 : 1024) / kThreads<kWidth>)
    quantize_kernel(const __grid_constant__ PrepareParams p, const __grid_constant__ Plan plan) {
  if (blockIdx.y == kKey) {
    quantize_key<kWidth, kIsWide>(p, plan);
  } else if (is_e4m3(p.pv)) {
    transpose_value<kWidth, kIsWide>(p, plan);
  } else {
    round_value<kWidth, kIsWide>(p, plan);
  }
}

template <int kWidth, bool kIsWide>
void launch(const PrepareParams& p, cudaStream_t stream) {
  const Plan plan = make_plan(p);
  launch_statistics<kWidth, kIsWide>(p, plan, stream);
  const int64_t blocks = blocks_of(p.kv.packed, p.batch, p.heads, p.kv.seqlen, kTokens<kWidth>);
  const unsigned operands = p.kv.value_codes == nullptr ? 1 : 2;
  launch_kernel(quantize_kernel<kWidth, kIsWide>, dim3(static_cast<unsigned>(blocks), operands),
                kThreads<kWidth>, stream, "the launch of quantize", p, plan);
}

template <int kWidth>
void launch(const PrepareParams& p, cudaStream_t stream) {
  if (p.dtype == Dtype::kFloat32) {
    launch<kWidth, true>(p, stream);
  } else {
    launch<kWidth, false>(p, stream);
  }
}

}  // namespace

int64_t partial_floats(const PrepareParams& p) {
  constexpr int kOperands = 2;
  const Plan plan = make_plan(p);
  return kOperands * plan.rows_of_heads * plan.per_row * kStatistics * p.kv.width;
}

void launch_prepare_kv(const PrepareParams& p, cudaStream_t stream) {
  if (p.kv.width == 64) {
    launch<64>(p, stream);
  } else if (p.kv.width == 128) {
    launch<128>(p, stream);
  } else {
    launch<256>(p, stream);
  }
}

}  // namespace torch_sage::mma
