// The attention kernel: persistent blocks of one producer and one to three consumer warpgroups.
//
// INT8 Q K^T with both operands in shared memory; P stays in the registers in which the scores
// arrive. E4M3 P V accumulates in fp16, in which 1024 keys fit, and then moves to an fp32 buffer in
// shared memory; bf16 P V accumulates in fp32. Behind V stand rows of ones, so the same instruction
// sums P.
#pragma once

#include "attention/sm90/consumer.cuh"
#include "attention/sm90/producer.cuh"
#include "cuda/error.h"

namespace torch_sage::sm90 {

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kConsumers == 1 ? 2 : 1)
    attention_kernel(const __grid_constant__ AttentionParams p,
                     const __grid_constant__ Schedule s) {
  constexpr int kStages = C::kStages;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  if (base % 1024 != 0) __trap();  // the swizzles count on it
  const Barriers<C> barriers{base + C::kBarrierAt};
  Work* work = reinterpret_cast<Work*>(shared + C::kWorkAt);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) {
      barrier_init(barriers.key_full(stage), 1);
      barrier_init(barriers.key_empty(stage), C::kConsumers * 4);
      barrier_init(barriers.value_full(stage), 1);
      barrier_init(barriers.value_empty(stage), C::kConsumers * 4);
    }
    for (int slot = 0; slot < 2; slot++) {
      barrier_init(barriers.query_full(slot), kQueryThreads);
      barrier_init(barriers.query_empty(slot), C::kConsumers * kWarpgroup);
      barrier_init(barriers.work_ready(slot), 1);
    }
    fence_barriers();
  }
  // The rows of ones behind every panel of V; copies never touch them.
  constexpr int kPanels = kStages * C::kKeys / kKeyTile, kOnesWords = 8 * C::kTileBytes / 4;
  for (int i = threadIdx.x; i < kPanels * kOnesWords; i += C::kThreads)
    reinterpret_cast<uint32_t*>(shared + C::kValueAt + i / kOnesWords * C::kPanelBytes +
                                C::kWidth * C::kTileBytes)[i % kOnesWords] = kOneCodes<C::kValues>;
  fence_async_proxy();
  __syncthreads();
  if constexpr (C::kIsSplit) let_next_kernel_start();  // which waits for this one's results
  if (threadIdx.x >= C::kConsumers * kWarpgroup) {
    give_registers<C::kProducerRegisters>();
    const int thread = threadIdx.x - C::kConsumers * kWarpgroup;
    if (thread == 0) {
      fetch_keys_and_values<C>(p, base, barriers, work);
    } else if (thread >= 32) {
      quantize_queries<C>(p, s, shared, barriers, work, thread - 32);
    }
  } else {
    take_registers<C::kConsumerRegisters>();
    Consumer<C>(p, shared, barriers, work).run();
  }
}

template <class C>
void launch_kernel(const AttentionParams& params, int multiprocessors, cudaStream_t stream) {
  Schedule schedule;
  schedule.row_blocks = params.queries.starts != nullptr
                            ? static_cast<int>(params.queries.units(C::kRows))
                            : (params.seqlen_q + C::kRows - 1) / C::kRows;
  schedule.heads = params.batch * params.heads_q;
  schedule.total = schedule.row_blocks * schedule.heads * (C::kIsSplit ? params.parts.count : 1);
  schedule.section = 0;
  if (!C::kIsSplit && params.causal != Causal::kNone) {
    const int64_t head_bytes = params.kv.tiles * (kKeyTile + C::kTileBytes) * C::kWidth;
    const int64_t kv_heads = kSectionBytes / head_bytes;
    schedule.section =
        static_cast<int>(kv_heads < 1 ? 1 : kv_heads) * (params.heads_q / params.heads_kv);
  }
  const auto kernel = attention_kernel<C>;
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes),
      "cudaFuncSetAttribute");
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = params.follows_prepare;
  cudaLaunchConfig_t config{};
  const int resident = multiprocessors * C::kBlocks;
  config.gridDim = dim3(schedule.total < resident ? schedule.total : resident);
  config.blockDim = dim3(C::kThreads);
  config.dynamicSmemBytes = C::kSharedBytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, params, schedule),
             "the attention kernel's launch");
}

}  // namespace torch_sage::sm90
