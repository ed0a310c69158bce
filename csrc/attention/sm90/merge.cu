// Makes the output of a row of the results that it has for parts of the keys: a block each.
#include "attention/sm90/launch.h"
#include "attention/sm90/ptx.cuh"
#include "attention/sm90/result.cuh"
#include "cuda/error.h"

namespace torch_sage::sm90 {
namespace {

constexpr int kMergeThreads = 256;

// What numbers relative to maximum `top` count for beside those relative to `largest`.
__device__ __forceinline__ float weight(float top, float largest, float unit) {
  return top == -INFINITY ? 0.f : exp2f((top - largest) * unit);
}

__device__ __forceinline__ void add(float4& sum, float by, float4 x) {
  sum = {fmaf(x.x, by, sum.x), fmaf(x.y, by, sum.y), fmaf(x.z, by, sum.z), fmaf(x.w, by, sum.w)};
}

// Four channels of a row, from `column` on.
__device__ __forceinline__ void store(const AttentionParams& p, int64_t first, int column,
                                      float4 x) {
  const float numbers[4] = {x.x, x.y, x.z, x.w};
  const uint32_t pairs[2] = {pack_halves(p.dtype, x.x, x.y), pack_halves(p.dtype, x.z, x.w)};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (column + i >= p.head_dim_v) return;
    if (p.dtype == Dtype::kFloat32) {
      static_cast<float*>(p.output)[first + column + i] = numbers[i];
    } else {
      static_cast<uint16_t*>(p.output)[first + column + i] =
          static_cast<uint16_t>(pairs[i / 2] >> 16 * (i & 1));
    }
  }
}

template <int kWidth>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ AttentionParams p) {
  constexpr int kLanes = kWidth / 4;              // threads that share a part
  constexpr int kTurns = kMergeThreads / kLanes;  // parts at a time
  __shared__ float4 sums[kTurns][kLanes];
  const int rows = p.seqlen_q, row = blockIdx.x % rows, head = blockIdx.x / rows;
  const int64_t first = static_cast<int64_t>(head) * p.parts.count * rows + row;
  const float4* of_parts = p.parts.sums + first;
  const int warp_lane = threadIdx.x % 32, lane = threadIdx.x % kLanes;
  const float unit = p.mask_kind == MaskKind::kNone ? 1.f : kMaskedUnit;
  wait_for_previous_kernel();

  // Every warp finds the row's sums.
  float largest = -INFINITY, divisor = 0, exact = 0;
  for (int i = warp_lane; i < p.parts.count; i += 32)
    largest = fmaxf(largest, of_parts[static_cast<int64_t>(i) * rows].x);
#pragma unroll
  for (int step = 1; step < 32; step *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  for (int i = warp_lane; i < p.parts.count; i += 32) {
    const float4 part = of_parts[static_cast<int64_t>(i) * rows];
    const float by = weight(part.x, largest, unit);
    divisor = fmaf(by, part.y, divisor);
    exact = fmaf(by, part.z, exact);
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    divisor += __shfl_xor_sync(~0u, divisor, step);
    exact += __shfl_xor_sync(~0u, exact, step);
  }
  const bool attends = largest != -INFINITY || divisor != 0.f;  // which may be NaN

  float4 sum = make_float4(0, 0, 0, 0);
  for (int i = threadIdx.x / kLanes; i < p.parts.count; i += kTurns) {
    const int64_t part = first + static_cast<int64_t>(i) * rows;
    add(sum, weight(p.parts.sums[part].x, largest, unit),
        reinterpret_cast<const float4*>(p.parts.outputs + part * kWidth)[lane]);
  }
  sums[threadIdx.x / kLanes][lane] = sum;
  __syncthreads();
  if (threadIdx.x >= kLanes) return;
  for (int turn = 1; turn < kTurns; turn++) add(sum, 1.f, sums[turn][lane]);
  const float4 result =
      attends ? make_float4(sum.x / divisor, sum.y / divisor, sum.z / divisor, sum.w / divisor)
              : make_float4(0, 0, 0, 0);
  const int tokens = p.parts.tokens, heads = rows / tokens;  // of query, that share keys
  const int64_t place = head / p.heads_q * p.output_rows.stride_b +
                        (head % p.heads_q * heads + row / tokens) * p.output_rows.stride_h +
                        row % tokens * p.output_rows.stride_n;
  store(p, place, 4 * lane, result);
  if (p.lse != nullptr && threadIdx.x == 0)
    p.lse[blockIdx.x] = attends ? natural_lse(largest * unit, exact, of_parts[0].w) : -INFINITY;
}

}  // namespace

void merge_parts(const AttentionParams& params, cudaStream_t stream) {
  constexpr decltype(&merge_kernel<64>) kKernels[] = {merge_kernel<64>, merge_kernel<128>,
                                                      merge_kernel<256>};
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(params.batch * params.heads_q * params.seqlen_q);
  config.blockDim = dim3(kMergeThreads);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kKernels[params.kv.width / 128], params),
             "the merging kernel's launch");
}

}  // namespace torch_sage::sm90
