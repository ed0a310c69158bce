// Copies to shared memory that pass by the registers.
#pragma once

#include <cstdint>

namespace torch_sage {

// Zeros where nothing is to be read; `from` must be a valid address all the same.
__device__ __forceinline__ void copy_16_async(uint32_t to, const void* from, bool is_inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(is_inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace torch_sage
