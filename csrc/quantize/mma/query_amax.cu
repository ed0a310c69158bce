// The largest magnitude of every head of Q, minus the mean of its tile where Q is smoothed.
#include "quantize/cuda/extremes.cuh"
#include "quantize/mma/head.cuh"
#include "quantize/mma/launch.h"
#include "quantize/mma/prepared.h"
#include "quantize/mma/tile_mean.cuh"

namespace torch_sage::mma {
namespace {

template <int kWidth>
constexpr int kThreads = kWidth == 256 ? 256 : 128;

template <int kWidth, bool kIsWide>
__device__ __forceinline__ float tile_amax(const char* rows, const QueryAmaxParams& p,
                                           int valid_rows, const float* mean) {
  constexpr int kLanes = kWidth / 8, kRowsAtOnce = kThreads<kWidth> / kLanes;
  constexpr int kBytes = kIsWide ? 4 : 2;
  const int column = threadIdx.x % kLanes * 8;
  float amax = 0;
  if (column >= p.head_dim) return amax;
#pragma unroll 4
  for (int row = threadIdx.x / kLanes; row < valid_rows; row += kRowsAtOnce) {
    Eight<kIsWide> x;
    x.load(rows + (row * p.rows.stride_n + column) * kBytes, true);
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const float2 pair = x.pair(c, p.dtype);
      amax = larger_of(amax, fabsf(pair.x - mean[column + 2 * c]));
      amax = larger_of(amax, fabsf(pair.y - mean[column + 2 * c + 1]));
    }
  }
  return amax;
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads<kWidth>)
    query_amax_kernel(const __grid_constant__ QueryAmaxParams p) {
  __shared__ float4 mean_words[kWidth / 4], scratch_words[kMeanScratch<kWidth> / 4];
  float* mean = reinterpret_cast<float*>(mean_words);
  const Head head = head_of_block(p.packed, p.heads, p.seqlen, kMeanRows, blockIdx.x);
  const int first = head.unit * kMeanRows;
  const int valid_rows = min(kMeanRows, head.seqlen - first);
  if (first < 0 || valid_rows <= 0) return;
  const bool is_wide = p.dtype == Dtype::kFloat32;
  const char* rows = static_cast<const char*>(p.query) +
                     (head.offset(p.rows, p.heads) + first * p.rows.stride_n) * (is_wide ? 4 : 2);
  if (p.smooth) {
    tile_mean<kWidth, kThreads<kWidth>>(rows, p.dtype, p.rows.stride_n, valid_rows, p.head_dim,
                                        mean, reinterpret_cast<float*>(scratch_words));
  } else {
    for (int column = threadIdx.x; column < kWidth; column += kThreads<kWidth>) mean[column] = 0;
    __syncthreads();
  }
  const float amax = is_wide ? tile_amax<kWidth, true>(rows, p, valid_rows, mean)
                             : tile_amax<kWidth, false>(rows, p, valid_rows, mean);
  const uint32_t bits = __reduce_max_sync(~0u, __float_as_uint(amax));  // NaN is the largest
  if (threadIdx.x % 32 == 0) atomicMax(p.amax + head.index, bits);
}

template <int kWidth>
void launch(const QueryAmaxParams& p, cudaStream_t stream) {
  const int64_t blocks = blocks_of(p.packed, p.batch, p.heads, p.seqlen, kMeanRows);
  launch_kernel(query_amax_kernel<kWidth>, dim3(static_cast<unsigned>(blocks)), kThreads<kWidth>,
                stream, "the launch of query_amax", p);
}

}  // namespace

void launch_query_amax(const QueryAmaxParams& p, cudaStream_t stream) {
  const size_t heads =
      static_cast<size_t>(p.packed.starts != nullptr ? p.packed.count : p.batch) * p.heads;
  check_cuda(cudaMemsetAsync(p.amax, 0, heads * sizeof(uint32_t), stream), "the clearing of amax");
  if (p.head_dim <= 64) {
    launch<64>(p, stream);
  } else if (p.head_dim <= 128) {
    launch<128>(p, stream);
  } else {
    launch<256>(p, stream);
  }
}

}  // namespace torch_sage::mma
