// PTX instructions that CUDA C++ has no name for.
#pragma once

#include <cstdint>

#include "attention/shared_address.cuh"

namespace torch_sage::sm90 {

// mbarriers, by shared address.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int phase) {
  asm volatile(
      "{.reg .pred p;\n"
      "WAIT: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
      "@p bra DONE;\n"
      "bra WAIT;\n"
      "DONE:}" ::"r"(barrier),
      "r"(phase)
      : "memory");
}
// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;");
}
// Makes this thread's writes to shared memory visible to wgmma and the copy engine.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;");
}
template <int kId, int kThreads>
__device__ __forceinline__ void named_barrier() {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

// Copies `bytes` (a multiple of 16, both sides aligned to 16) and reports them to `barrier`.
__device__ __forceinline__ void copy_to_shared(uint32_t to, const void* from, int bytes,
                                               uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t in_block(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
// Stores to such a place, whose bytes a barrier of that block counts.
__device__ __forceinline__ void store_async(uint32_t to, float x, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(x),
      "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void store_async(uint32_t to, float4 x, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
      : "memory");
}

// All blocks of a cluster. Without kOrders nothing is made visible to the others, for which all
// writes would have to arrive first.
template <bool kOrders>
__device__ __forceinline__ void cluster_arrive() {
  if constexpr (kOrders) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void prefetch_to_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Descriptor of a K-major operand whose rows have 128 or 64 bytes, swizzled over those.
template <int kRowBytes>
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  constexpr uint64_t kStride = 8 * kRowBytes >> 4, kSwizzle = kRowBytes == 128 ? 1 : 2;
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | 1ull << 16 | kStride << 32 |
         kSwizzle << 62;
}

// Where that swizzle puts a 16-byte chunk of a row.
template <int kRowBytes>
__device__ __forceinline__ int swizzled(int chunk, int row) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  return kRowBytes == 128 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
}

// Bytes of a row that a swizzle spans. Rows of an image that are wider are cut into pieces, which
// lie one behind the other: [pieces, kImageRows, kPieceBytes].
template <int kWidth>
constexpr int kPieceBytes = kWidth < 128 ? kWidth : 128;
constexpr int kImageRows = 64;

// Where in a row of images the codes from `column` on, a multiple of 8, of a row lie.
template <int kWidth>
__device__ __forceinline__ int image_place(int row, int column) {
  constexpr int kPiece = kPieceBytes<kWidth>;
  const int in_piece = swizzled<kPiece>(column % kPiece / 16, row) * 16 + column % 16;
  if constexpr (kWidth == kPiece) {
    return row * kWidth + in_piece;
  } else {
    return row / kImageRows * (kImageRows * kWidth) + column / kPiece * (kImageRows * kPiece) +
           row % kImageRows * kPiece + in_piece;
  }
}
// What is added to the descriptor of an image for its columns from 32 `step` on.
template <int kWidth>
__device__ __forceinline__ constexpr uint64_t column_step(int step) {
  constexpr int kPiece = kPieceBytes<kWidth>, kSteps = kPiece / 32;
  return step / kSteps * (kImageRows * kPiece >> 4) + step % kSteps * 2;
}

template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Programmatic dependent launch.
__device__ __forceinline__ void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// A mask of so many bits; none if negative, all if more than 32.
__device__ __forceinline__ uint32_t lowest_bits(int count) {
  uint32_t mask;  // a shift by more than 32 bits is one by 32
  asm("shr.u32 %0, %1, %2;" : "=r"(mask) : "r"(~0u), "r"(max(32 - count, 0)));
  return mask;
}
// Two floats, truncated and saturated to bytes, and above them the lower half of `rest`. With both
// inputs from cvt.rzi this is one F2IP; volatile keeps it behind the waits for wgmma.
__device__ __forceinline__ uint32_t pack_u8(float low, float high, uint32_t rest) {
  uint32_t packed;
  asm volatile(
      "{.reg .s32 a, b;\n"
      "cvt.rzi.s32.f32 a, %1;\n"
      "cvt.rzi.s32.f32 b, %2;\n"
      "cvt.pack.sat.u8.s32.b32 %0, b, a, %3;}"
      : "=r"(packed)
      : "f"(low), "f"(high), "r"(rest));
  return packed;
}
// Two floats as bf16, rounded to nearest even.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
// Four floats as E4M3, rounded to nearest even, saturated; NaN stays NaN.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint32_t packed;
  asm volatile(
      "{.reg .b16 l, h;\n"
      "cvt.rn.satfinite.e4m3x2.f32 l, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 h, %4, %3;\n"
      "mov.b32 %0, {l, h};}"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

}  // namespace torch_sage::sm90
