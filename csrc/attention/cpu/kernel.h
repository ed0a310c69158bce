// What one instruction set offers to the scheduler: a block of query rows at a time.
#pragma once

#include <cstdint>

#include "common/params.h"

namespace torch_sage {

// Most query rows of one call. Every call packs the keys and values that its rows see, so few rows
// pay much packing per score: at 192 rows it is a thirtieth of the time (docs/kernels/cpu.md).
// A multiple of every kernel's register rows (6, 4).
constexpr int64_t kMaxBlockRows = 192;

struct QueryBlock {
  int64_t batch, head, first_row, rows;  // rows <= kMaxBlockRows
};

struct CpuKernel {
  int64_t (*scratch_bytes)(const CpuAttentionParams&);
  // Writes output and lse of the block. scratch is 64-byte aligned, private, and not initialised.
  void (*attend)(const CpuAttentionParams&, const QueryBlock&, void* scratch);
};

extern const CpuKernel kPortableKernel;
extern const CpuKernel kAvx2Kernel;
extern const CpuKernel kAvx512VnniKernel;
extern const CpuKernel kAvx512Bf16Kernel;

}  // namespace torch_sage
