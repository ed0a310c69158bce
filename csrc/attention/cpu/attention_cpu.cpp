// Cuts the attention into blocks of query rows and lets torch's threads take them one by one.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "attention/cpu/kernel.h"
#include "attention/cpu/launch.h"
#include "common/cpu_isa.h"

namespace torch_sage {
namespace {

constexpr std::align_val_t kCacheLine{64};

struct FreeScratch {
  void operator()(std::byte* scratch) const { ::operator delete(scratch, kCacheLine); }
};

const CpuKernel& select_kernel() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case CpuIsa::kAvx512Bf16:
      return kAvx512Bf16Kernel;
    case CpuIsa::kAvx512Vnni:
      return kAvx512VnniKernel;
    case CpuIsa::kAvx2:
      return kAvx2Kernel;
    case CpuIsa::kPortable:
      break;
  }
#endif
  return kPortableKernel;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of one block: as many as possible, but so that every thread gets several blocks (then the
// last ones to finish do not keep the other threads waiting long) of like size.
int64_t choose_block_rows(const CpuAttentionParams& p, int64_t threads) {
  constexpr int64_t kBlocksPerThread = 4;
  constexpr int64_t kLeastRows = 12;  // whole register blocks of every kernel
  const int64_t heads = p.batch * p.heads_q;
  const int64_t wanted =
      std::max(ceil_div(p.seqlen_q, kMaxBlockRows), ceil_div(kBlocksPerThread * threads, heads));
  return ceil_div(ceil_div(p.seqlen_q, wanted), kLeastRows) * kLeastRows;
}

}  // namespace

void run_cpu_attention(const CpuAttentionParams& params) {
  const CpuKernel& kernel = select_kernel();
  if (params.batch * params.heads_q * params.seqlen_q == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t block_rows = choose_block_rows(params, threads);
  const int64_t blocks_per_head = ceil_div(params.seqlen_q, block_rows);
  const int64_t blocks = params.batch * params.heads_q * blocks_per_head;

  const auto attend = [&](int64_t index, std::byte* scratch) {
    const int64_t head = index / blocks_per_head;
    // From the last rows to the first: under a causal mask they see the most keys, and starting
    // with the long blocks lets the threads finish together.
    const int64_t first_row = (blocks_per_head - 1 - index % blocks_per_head) * block_rows;
    const QueryBlock block{head / params.heads_q, head % params.heads_q, first_row,
                           std::min(block_rows, params.seqlen_q - first_row)};
    kernel.attend(params, block, scratch);
  };
  // Blocks are handed out, not divided beforehand: they cost unequally under masks, and cores are
  // unequally busy. Each block is computed the same way whoever takes it.
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    std::unique_ptr<std::byte, FreeScratch> scratch(static_cast<std::byte*>(
        ::operator new(static_cast<size_t>(kernel.scratch_bytes(params)), kCacheLine)));
    for (int64_t index; (index = next.fetch_add(1)) < blocks;) attend(index, scratch.get());
  };
  torch::stable::parallel_for(0, std::min(threads, blocks), 1, work);
}

}  // namespace torch_sage
