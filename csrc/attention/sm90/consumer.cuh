// One warpgroup's share of the work: 64 query rows against all their keys, C::kKeys at a step.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/sm90/config.cuh"
#include "attention/sm90/mask_tile.cuh"
#include "attention/sm90/ptx.cuh"
#include "attention/sm90/result.cuh"
#include "attention/sm90/wgmma.cuh"
#include "attention/sm90/work.cuh"
#include "attention/store.cuh"

namespace torch_sage::sm90 {

// Scores of a step that are hidden count as this in the integer maximum.
constexpr int kHiddenScore = -(1 << 30);

template <class C>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const AttentionParams& params, uint8_t* shared,
                                      Barriers<C> barriers, const Work* works)
      : p_(params),
        shared_(shared),
        base_(shared_address(shared)),
        barriers_(barriers),
        works_(works),
        // Uniform for the compiler, too, so that descriptors are.
        warpgroup_(__shfl_sync(~0u, threadIdx.x / kWarpgroup, 0)),
        lane_(threadIdx.x % 32),
        row_in_block_(threadIdx.x / 32 * 16 + lane_ / 4),
        quad_(lane_ % 4),
        buffer_(reinterpret_cast<float*>(shared + C::kBufferAt + warpgroup_ * C::kBufferBytes) +
                threadIdx.x % kWarpgroup * 4) {}

  __device__ __forceinline__ void run() {
    bool is_live = begin();
    if (!is_live) return;  // of packed sequences there may be fewer pieces than blocks
    skip_keys(true);
    multiply_keys<true>(skip_, true);
    skip_values(true);
#pragma unroll 1
    while (is_live) {
      buffer_is_used_ = false;
      accumulates_ = 0;
      buffer_max_[0] = buffer_max_[1] = -INFINITY;
      max_[0] = max_[1] = -INFINITY;
      poison_ = 0;
      attend();
      multiply_values(length() - 1);
      finish_work(is_live);
    }
  }

 private:
  // All steps of a piece of work, but for the product of the last P with V. Keys may be hidden in
  // the first steps only, which have a loop of their own, where there is no mask to hide them; so
  // has what comes between two promotions: the instructions of the common case lie close together.
  __device__ __forceinline__ void attend() {
    float factor[2], old_max[2];
    fetch_mask(skip_);
    wgmma_wait<0>();
    const int length = this->length(), whole_from = C::kHasMask ? skip_ : min(length, whole_from_);
    if (skip_ < whole_from) {
      exponentiate<true>(skip_, factor);
    } else {
      exponentiate<false>(skip_, factor);
    }
    release_keys(skip_);
    if (skip_ < whole_from) {
      pack<true>(skip_);
    } else {
      pack<false>(skip_);
    }
    int n = skip_ + 1;
#pragma unroll 1
    for (; n < whole_from; n++) {
      const bool moved = take_step<true>(n, factor, old_max);
      if (ends_group(n)) {
        end_group<false>(n, old_max, moved, factor);
      } else if (moved) {
        rescale(factor);
      }
      pack<true>(n);
    }
#pragma unroll 1
    while (n < length) {
      bool moved;
#pragma unroll 1
      while (true) {
        moved = take_step<false>(n, factor, old_max);
        if (ends_group(n)) break;
        if (moved) rescale(factor);
        pack<false>(n);
        if (++n == length) return;
      }
      end_group<true>(n, old_max, moved, factor);
      pack<false>(n);
      n++;
    }
  }

  // Lets the keys of step n be overwritten.
  __device__ __forceinline__ void release_keys(int n) const {
    if (lane_ == 0) barrier_arrive(barriers_.key_empty((count_ + n) % kStages));
  }

  // Scores and P of step n; P V of the one before is added.
  template <bool kHasHidden>
  __device__ __forceinline__ bool take_step(int n, float (&factor)[2], float (&old_max)[2]) {
    multiply_keys<false>(n, true);
    multiply_values(n - 1);
    wgmma_wait<1>();
    old_max[0] = max_[0];
    old_max[1] = max_[1];
    const bool moved = exponentiate<kHasHidden>(n, factor);
    release_keys(n);
    wgmma_wait<0>();
    if (lane_ == 0) barrier_arrive(barriers_.value_empty((count_ + n - 1) % kStages));
    hold_output();
    return moved;
  }

  __device__ __forceinline__ void fetch_mask(int n) {
    if constexpr (C::kHasMask) mask_.fetch(p_, first_key(n), quad_);
  }

  // Factor that takes numbers relative to maximum `from` to maximum `to`; both may be -inf.
  __device__ __forceinline__ static float decay(float from, float to) {
    return from == to ? 1.f : exp2_approx((from - to) * kUnit);
  }

  // Steps of this piece of work, which are the last of those up to steps_.
  __device__ __forceinline__ int length() const {
    return C::kIsSplit ? steps_ - first_step_ : steps_;
  }
  __device__ __forceinline__ int first_key(int n) const { return (steps_ - 1 - n) * C::kKeys; }
  // Whether the step before n was the last of its value group.
  __device__ __forceinline__ bool ends_group(int n) const {
    return (steps_ - n) % C::kStepsPerGroup == 0;
  }

  // Takes the next piece of work; false if there is none.
  __device__ __forceinline__ bool begin() {
    slot_ = work_count_ & 1;
    barrier_wait(barriers_.query_full(slot_), (work_count_ >> 1) & 1);
    // Uniform for the compiler, too: wgmma in a branch that might diverge would be serialized.
    const Work work = works_[slot_];
    if (!__any_sync(~0u, work.steps > 0)) return false;
    steps_ = __shfl_sync(~0u, work.steps, 0);
    if constexpr (C::kIsSplit) first_step_ = __shfl_sync(~0u, first_step<C>(p_, work.part), 0);
    last_ = work.keys - 1;
    diagonal_ = work.first_row + row_in_block_ + work.last_key_offset;
    first_scale_ = work.first_scale + quad_;
    const int place = slot_ * C::kRows + row_in_block_;
    const float* scales = reinterpret_cast<const float*>(shared_ + C::kQueryScaleAt) + place;
    query_scale_[0] = scales[0] * (1.f / kUnit);
    query_scale_[1] = scales[8] * (1.f / kUnit);
    if constexpr (C::kHasMask) mask_.begin(p_, work, work.first_row + row_in_block_);
    if constexpr (C::kHasLse) {
      const float* shifts = reinterpret_cast<const float*>(shared_ + C::kQueryShiftAt) + place;
      lse_shift_[0] = shifts[0];
      lse_shift_[1] = shifts[8];
      sum_[0] = sum_[1] = 0.f;
    }
    query_ = descriptor<kPieceBytes<C::kWidth>>(base_ + C::kQueryAt +
                                                (slot_ * C::kRows + warpgroup_ * 64) * C::kWidth);
    // Rows of this warpgroup may end a step before those of the last one.
    const int last_row = work.first_row + warpgroup_ * 64 + 63;
    skip_ = max(steps_ - steps_until<C>(work, last_row), 0);
    skip_ = __shfl_sync(~0u, skip_, 0);
    // Steps up to `whole` have only keys that all rows see.
    const int whole = (last_key(work, last_row - 63) + 1) / C::kKeys;
    whole_from_ = __shfl_sync(~0u, steps_ - max(whole, 0), 0);
    work_count_++;
    return true;
  }

  // Lets one step pass; skip_ is never more, since two warpgroups' rows are at most C::kKeys apart.
  __device__ __forceinline__ void skip_keys(bool is_live) const {
    if (is_live && skip_ > 0 && lane_ == 0) {
      const unsigned stage = count_ % kStages;
      barrier_wait(barriers_.key_full(stage), (count_ / kStages) & 1);
      barrier_arrive(barriers_.key_empty(stage));
    }
    __syncwarp();
  }
  __device__ __forceinline__ void skip_values(bool is_live) {
    if (is_live && skip_ > 0) {
      if (lane_ == 0) {
        const unsigned stage = count_ % kStages;
        barrier_wait(barriers_.value_full(stage), (count_ / kStages) & 1);
        barrier_arrive(barriers_.value_empty(stage));
      }
      // The step may have been its group's only one.
      if ((steps_ - 1) % C::kStepsPerGroup == 0) group_count_++;
    }
    __syncwarp();
  }

  // Of this thread's keys of step n.
  __device__ __forceinline__ float key_scale(int n) const {
    return p_.kv.key_scales[first_scale_ + first_key(n) / kKeyBlock128 * 4];
  }

  // Who has waited for any keys may read all that prepare_kv wrote, since the producer waited for
  // that. So the scale of a step may be on its way a step ahead, which it has to be where there are
  // less than three warpgroups to wait for each other.
  template <bool kIsFirst>
  __device__ __forceinline__ void multiply_keys(int n, bool waits) {
    constexpr bool kIsAhead = C::kConsumers < 3;
    const unsigned count = count_ + n, stage = count % kStages;
    if (waits) {
      barrier_wait(barriers_.key_full(stage), (count / kStages) & 1);
      key_scale_ = kIsFirst || !kIsAhead ? key_scale(n) : next_key_scale_;
      if constexpr (kIsAhead) next_key_scale_ = key_scale(min(n + 1, steps_ - 1));
    }
    const uint64_t keys =
        descriptor<kPieceBytes<C::kWidth>>(base_ + C::kKeyAt + stage * C::kKeyBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::kWidth / 32; i++)
      Scores<C::kKeys>::multiply(s_, query_ + column_step<C::kWidth>(i),
                                 keys + column_step<C::kWidth>(i), i > 0);
    wgmma_commit();
  }

  __device__ __forceinline__ void multiply_values(int n) {
    const unsigned count = count_ + n, stage = count % kStages;
    barrier_wait(barriers_.value_full(stage), (count / kStages) & 1);
    wgmma_fence();
    constexpr int kSteps = C::kTileBytes / 32;  // of an image
#pragma unroll
    for (int i = 0; i < C::kKeys / kKeyTile * kSteps; i++) {
      const uint64_t values = descriptor<C::kTileBytes>(
          base_ + C::kValueAt + stage * C::kValueBytes + i / kSteps * C::kPanelBytes);
      ValueProduct::multiply(o_, p_codes_ + 4 * i, values + 2 * (i % kSteps),
                             accumulates_ | (i > 0));
    }
    wgmma_commit();
    accumulates_ = 1;
  }

  // Turns the scores of step n into P: floats, or floats that truncate to E4M3 codes where the
  // column takes the linear mantissa. Returns whether the warp's reference maxima moved, and then
  // the factors of what was summed before.
  template <bool kHasHidden>
  __device__ __forceinline__ bool exponentiate(int n, float (&factor)[2]) {
    float scale[2] = {query_scale_[0] * key_scale_, query_scale_[1] * key_scale_};
    float top[2];
    if constexpr (C::kHasMask) {
      add_mask(first_key(n), scale, top);
      if (n + 1 < length()) fetch_mask(n + 1);
    } else {
      find_top<kHasHidden>(first_key(n), scale, top);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
    }
    const bool moved =
        __any_sync(~0u, top[0] > max_[0] + kLogLag / kUnit || top[1] > max_[1] + kLogLag / kUnit);
    if (moved) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float larger = fmaxf(max_[h], top[h]);
        factor[h] = decay(max_[h], larger);
        max_[h] = larger;
        if constexpr (C::kSumsExactly) sum_[h] *= factor[h];
      }
    }
    if constexpr (C::kHasMask) {
      exponentiate_logits();
    } else {
      exponentiate_scores<kHasHidden>(first_key(n), scale);
    }
    if constexpr (C::kSumsExactly) {
#pragma unroll
      for (int i = 0; i < kScores; i++) sum_[i >> 1 & 1] += __int_as_float(s_[i]);
    }
    // Or ptxas moves the transform behind the next matrix instruction, which it then serializes.
#pragma unroll
    for (int i = 0; i < kScores; i++) asm volatile("" : "+r"(s_[i]));
    return moved;
  }

  // Of this thread's row, or of the other one, 8 below.
  __device__ __forceinline__ int last_key_of(int h) const { return min(last_, diagonal_ + 8 * h); }
  // As a column of a step, counted from the first that this thread has.
  __device__ __forceinline__ int last_column(int h, int first_key) const {
    return last_key_of(h) - first_key - 2 * quad_;
  }

  // The maxima of this thread's scores, from the integers: all have one K scale.
  template <bool kHasHidden>
  __device__ __forceinline__ void find_top(int first_key, const float (&scale)[2],
                                           float (&top)[2]) {
    if constexpr (kHasHidden) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int last = last_column(h, first_key);
        int even = kHiddenScore, odd = kHiddenScore;
#pragma unroll
        for (int j = 0; j < C::kKeys / 8; j++) {
          if (8 * j <= last) even = max(even, s_[4 * j + 2 * h]);
          if (8 * j + 1 <= last) odd = max(odd, s_[4 * j + 2 * h + 1]);
        }
        const int largest = max(even, odd);
        const bool sees = largest != kHiddenScore;
        top[h] = sees ? static_cast<float>(largest) * scale[h] : -INFINITY;
        if (sees && key_scale_ != key_scale_) poison_ |= 1 << h;
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        int even = s_[2 * h], odd = s_[4 + 2 * h];
#pragma unroll
        for (int j = 0; j < C::kKeys / 8; j += 2) {
          even = __vimax3_s32(even, s_[4 * j + 2 * h], s_[4 * j + 2 * h + 1]);
          odd = __vimax3_s32(odd, s_[4 * j + 4 + 2 * h], s_[4 * j + 5 + 2 * h]);
        }
        top[h] = static_cast<float>(max(even, odd)) * scale[h];
      }
      if (key_scale_ != key_scale_) poison_ = 3;
    }
  }

  template <bool kHasHidden>
  __device__ __forceinline__ void exponentiate_scores(int first_key, const float (&scale)[2]) {
    float slope[2], exact[2], linear[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      exact[h] = kLogTop - (max_[h] == -INFINITY ? 0.f : max_[h]);
      linear[h] = 8.f * exact[h] + kCodeOfOne;  // E4M3 has 8 codes to a power of two
      slope[h] = 8.f * scale[h];
    }
#pragma unroll
    for (int j = 0; j < C::kKeys / 8; j++)
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int b = 0; b < 2; b++) {
          const int i = 4 * j + 2 * h + b;
          const float score = __int2float_rn(s_[i]);
          s_[i] = __float_as_int(is_exact(j) ? exp2_approx(fmaf(score, scale[h], exact[h]))
                                             : fmaf(score, slope[h], linear[h]));
        }
    // Others are hidden once they are codes (pack), which takes fewer instructions.
    if constexpr (kHasHidden && !kHidesCodes) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int last = last_column(h, first_key);
#pragma unroll
        for (int j = 0; j < C::kKeys / 8; j++)
#pragma unroll
          for (int b = 0; b < 2; b++)
            if (8 * j + b > last) s_[4 * j + 2 * h + b] = 0;
      }
    }
  }

  // Scores become logits with the mask in them, -inf where hidden; `top` their maxima. A scale that
  // is NaN must not reach a hidden key, so it is remembered of those that see one.
  __device__ __forceinline__ void add_mask(int first_key, float (&scale)[2], float (&top)[2]) {
    bool is_poison[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      is_poison[h] = scale[h] != scale[h];
      if (is_poison[h]) scale[h] = 0.f;
    }
    mask_.add(p_, first_key, quad_, scale, s_);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      top[h] = -INFINITY;
#pragma unroll
      for (int j = 0; j < C::kKeys / 8; j++)
#pragma unroll
        for (int b = 0; b < 2; b++) top[h] = fmaxf(top[h], __int_as_float(s_[4 * j + 2 * h + b]));
      if (is_poison[h] && top[h] != -INFINITY) poison_ |= 1 << h;
    }
  }

  __device__ __forceinline__ void exponentiate_logits() {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float origin = max_[h] == -INFINITY ? 0.f : max_[h];
#pragma unroll
      for (int j = 0; j < C::kKeys / 8; j++)
#pragma unroll
        for (int b = 0; b < 2; b++) {
          const int i = 4 * j + 2 * h + b;
          // The origin apart: beside a large one the offset would be lost.
          s_[i] = __float_as_int(exp2_approx(fmaf(__int_as_float(s_[i]) - origin, kUnit, kLogTop)));
        }
    }
  }

  // 16 keys of a warp's row are two 8-column blocks.
  __device__ __forceinline__ static constexpr bool is_exact(int block) {
    return (block >> 1 & 3) < C::kExactColumns;
  }

  // P of step n as codes.
  template <bool kHasHidden>
  __device__ __forceinline__ void pack(int n) {
    if constexpr (C::kValues == ValueFormat::kBf16) {
#pragma unroll
      for (int i = 0; i < kScores / 2; i++)
        p_codes_[i] = pack_bf16(__int_as_float(s_[2 * i]), __int_as_float(s_[2 * i + 1]));
    } else {
      pack_eight_bits<kHasHidden>(n);
    }
  }
  template <bool kHasHidden>
  __device__ __forceinline__ void pack_eight_bits(int n) {
    // Codes of 16 columns stand in a register: bits that the visible ones take, counted on.
    [[maybe_unused]] int visible_bits[2];
    if constexpr (kHasHidden && kHidesCodes) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int count = last_column(h, first_key(n)) + 1;
        visible_bits[h] = (count >> 4) * 32 + (count & 8) * 2 + min(count & 7, 2) * 8;
      }
    }
#pragma unroll
    for (int q = 0; q < C::kKeys / 16; q++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float a = __int_as_float(s_[8 * q + 2 * h]),
                    b = __int_as_float(s_[8 * q + 2 * h + 1]);
        const float c = __int_as_float(s_[8 * q + 4 + 2 * h]),
                    d = __int_as_float(s_[8 * q + 5 + 2 * h]);
        p_codes_[2 * q + h] =
            is_exact(2 * q) ? pack_e4m3(a, b, c, d) : pack_u8(a, b, pack_u8(c, d, 0));
        if constexpr (kHasHidden && kHidesCodes)
          p_codes_[2 * q + h] &= lowest_bits(visible_bits[h] - 32 * q);
      }
  }

  // After a wait: what follows may read the accumulators.
  __device__ __forceinline__ void hold_output() {
#pragma unroll
    for (int i = 0; i < ValueProduct::kRegisters; i++) {
      if constexpr (C::kHasGroupSums) {
        asm volatile("" : "+r"(o_[i]));
      } else {
        asm volatile("" : "+f"(o_[i]));
      }
    }
  }

  __device__ __forceinline__ float output(int i) const {
    if constexpr (C::kHasGroupSums) {
      const __half2 pair = *reinterpret_cast<const __half2*>(&o_[i >> 1]);
      return i & 1 ? __high2float(pair) : __low2float(pair);
    } else {
      return o_[i];
    }
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
    if constexpr (C::kHasGroupSums) {
      const __half2 by[2] = {__float2half2_rn(factor[0]), __float2half2_rn(factor[1])};
#pragma unroll
      for (int i = 0; i < ValueProduct::kRegisters; i++) {
        const __half2 scaled = __hmul2(*reinterpret_cast<__half2*>(&o_[i]), by[i & 1]);
        o_[i] = *reinterpret_cast<const uint32_t*>(&scaled);
      }
    } else {
#pragma unroll
      for (int i = 0; i < ValueProduct::kRegisters; i++) o_[i] *= factor[i >> 1 & 1];
    }
  }

  // What follows the last step of a group of V, the one before `n`; its P was relative to maxima
  // `reference`.
  template <bool kMayBePlain>
  __device__ __forceinline__ void end_group(int n, const float (&reference)[2], bool moved,
                                            const float (&factor)[2]) {
    const int group = (steps_ - n) / C::kStepsPerGroup;
    bool sees[2];
#pragma unroll
    for (int h = 0; h < 2; h++)
      sees[h] = reference[h] != -INFINITY && group * kValueGroup <= last_key_of(h);
    if constexpr (C::kHasGroupSums) {
      promote<kMayBePlain>(reference, sees);
    } else {
      poison_channels(sees);
      if (moved) rescale(factor);
    }
    group_count_++;
  }

  // A channel of a group that is not finite has codes of 0 and a scale that is NaN.
  __device__ __forceinline__ void poison_channels(const bool (&sees)[2]) {
    const float* scales = group_scales();
    float any = 0;
#pragma unroll
    for (int j = 0; j < C::kWidth / 8; j++) {
      const float2 scale = *reinterpret_cast<const float2*>(scales + 8 * j);
      any += scale.x + scale.y;
    }
    if (any == any) return;
#pragma unroll
    for (int j = 0; j < C::kWidth / 8; j++) {
      const float2 scale = *reinterpret_cast<const float2*>(scales + 8 * j);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        if (sees[h]) o_[4 * j + 2 * h] *= scale.x;
        if (sees[h]) o_[4 * j + 2 * h + 1] *= scale.y;
      }
    }
  }

  // Scales and, behind them, shifts of the channels 2 * quad and the next, for the current group.
  __device__ __forceinline__ const float* group_scales() const {
    return reinterpret_cast<const float*>(shared_ + C::kValueScaleAt) +
           group_count_ % C::kScaleSlots * 2 * C::kWidth + 2 * quad_;
  }

  // Adds the sums of a finished group of V to the fp32 buffer, relative to maxima `reference`.
  template <bool kMayBePlain>
  __device__ __forceinline__ void promote(const float (&reference)[2], const bool (&sees)[2]) {
    float old[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      old[h] = decay(buffer_max_[h], reference[h]);
      buffer_max_[h] = reference[h];
    }
    const bool is_plain = sees[0] && sees[1] && old[0] == 1.f && old[1] == 1.f;
    if (kMayBePlain && buffer_is_used_ && __all_sync(~0u, is_plain)) {
      add_group<true>(old, sees);
    } else {
      add_group<false>(old, sees);
    }
    buffer_is_used_ = true;
    accumulates_ = 0;
  }

  // kIsPlain: the maxima have not moved since the last group, and all rows see this one. A row that
  // does not must not be touched by the group's NaN.
  template <bool kIsPlain>
  __device__ __forceinline__ void add_group(const float (&old)[2], const bool (&sees)[2]) {
    const float* scales = group_scales();
    const float sum[2] = {group_sum(0), group_sum(1)};
#pragma unroll
    for (int j = 0; j < C::kWidth / 8; j++) {
      const float2 scale = *reinterpret_cast<const float2*>(scales + 8 * j);
      const float2 shift = *reinterpret_cast<const float2*>(scales + C::kWidth + 8 * j);
      float4 x = make_float4(0, 0, 0, 0);
      if (kIsPlain || buffer_is_used_) x = sums(j);
      if constexpr (kIsPlain) {
        x = {dequantize(4 * j, scale.x, fmaf(shift.x, sum[0], x.x)),
             dequantize(4 * j + 1, scale.y, fmaf(shift.y, sum[0], x.y)),
             dequantize(4 * j + 2, scale.x, fmaf(shift.x, sum[1], x.z)),
             dequantize(4 * j + 3, scale.y, fmaf(shift.y, sum[1], x.w))};
      } else {
        x.x = fmaf(x.x, old[0], sees[0] ? dequantize(4 * j, scale.x, shift.x * sum[0]) : 0.f);
        x.y = fmaf(x.y, old[0], sees[0] ? dequantize(4 * j + 1, scale.y, shift.y * sum[0]) : 0.f);
        x.z = fmaf(x.z, old[1], sees[1] ? dequantize(4 * j + 2, scale.x, shift.x * sum[1]) : 0.f);
        x.w = fmaf(x.w, old[1], sees[1] ? dequantize(4 * j + 3, scale.y, shift.y * sum[1]) : 0.f);
      }
      set_sums(j, x);
    }
    const float2 total = buffer_is_used_ ? *total_place() : make_float2(0, 0);
    *total_place() = make_float2(fmaf(total.x, old[0], sum[0]), fmaf(total.y, old[1], sum[1]));
  }

  // Of finished groups: sums of channels 8 j + 2 quad and the next for both rows.
  __device__ __forceinline__ float4 sums(int j) const {
    constexpr int kBuffered = C::kBufferColumns / 8;
    if (j < kBuffered) return *reinterpret_cast<const float4*>(buffer_ + j * 4 * kWarpgroup);
    const float* at = sums_ + 4 * (j - kBuffered);
    return make_float4(at[0], at[1], at[2], at[3]);
  }
  __device__ __forceinline__ void set_sums(int j, float4 x) {
    constexpr int kBuffered = C::kBufferColumns / 8;
    if (j < kBuffered) {
      *reinterpret_cast<float4*>(buffer_ + j * 4 * kWarpgroup) = x;
    } else {
      float* at = sums_ + 4 * (j - kBuffered);
      at[0] = x.x;
      at[1] = x.y;
      at[2] = x.z;
      at[3] = x.w;
    }
  }
  // And of P.
  __device__ __forceinline__ float2* total_place() const {
    return reinterpret_cast<float2*>(buffer_ + C::kBufferColumns / 8 * 4 * kWarpgroup);
  }

  // Sum of P over the group.
  __device__ __forceinline__ float group_sum(int h) const {
    return output(C::kWidth / 2 + 2 * h) * (1.f / kOneInCode<C::kValues>);
  }
  // Number i of the group's P V, without the shift, plus `rest`.
  __device__ __forceinline__ float dequantize(int i, float scale, float rest) const {
    return fmaf(output(i), scale, rest);
  }

  // Asks for the first scores of the next piece of work, and writes out this one meanwhile.
  __device__ __forceinline__ void finish_work(bool& is_live) {
    const unsigned last_stage = (count_ + length() - 1) % kStages;
    const Place place = place_of(works_[slot_]);
    barrier_arrive(barriers_.query_empty(slot_));  // every thread that has read scales and work
    const float top[2] = {max_[0], max_[1]};
    float poison[2], sum[2], shift[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      // 0, or NaN.
      poison[h] = poison_ >> h & 1 ? NAN : C::kSumsExactly ? 0.f : query_scale_[h] * 0.f;
      if constexpr (C::kHasLse) {
        sum[h] = sum_[h];
        shift[h] = lse_shift_[h];
      }
    }
    count_ += length();
    is_live = begin();
    skip_keys(is_live);
    // Without a next piece of work this multiplies stale shared memory; nobody reads the result.
    multiply_keys<true>(skip_, is_live);
    wgmma_wait<1>();
    if (lane_ == 0) barrier_arrive(barriers_.value_empty(last_stage));
    const float* scales = group_scales();
    group_count_++;
    skip_values(is_live);
    hold_output();
    write(place, scales, top, poison, sum, shift);
  }

  __device__ __forceinline__ Place place_of(const Work& work) const {
    const int row = work.first_row + row_in_block_;
    if constexpr (C::kIsSplit) return part_place<C::kWidth>(p_, work, row);
    return Place(p_, work.batch, work.head, work.query_start + row, work.query_start + work.rows);
  }

  __device__ __forceinline__ void write(const Place& place, const float* scales,
                                        const float (&top)[2], float (&poison)[2],
                                        float (&lse_sum)[2], const float (&lse_shift)[2]) {
    float old[2], inverse[2], sum[2];
    bool attends[2];
    float2 total = make_float2(0, 0);
    if constexpr (C::kHasGroupSums) {
      if (buffer_is_used_) total = *total_place();
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      old[h] = decay(buffer_max_[h], top[h]);
      poison[h] += __shfl_xor_sync(~0u, poison[h], 1);
      poison[h] += __shfl_xor_sync(~0u, poison[h], 2);
      if constexpr (C::kSumsExactly) {
        lse_sum[h] += __shfl_xor_sync(~0u, lse_sum[h], 1);
        lse_sum[h] += __shfl_xor_sync(~0u, lse_sum[h], 2);
        poison[h] += lse_sum[h] * 0.f;
        lse_sum[h] += poison[h];
      }
      attends[h] = top[h] != -INFINITY || poison[h] != 0.f;
      sum[h] = group_sum(h);
      const float divisor = fmaf(h ? total.y : total.x, old[h], sum[h]);
      inverse[h] = __fdividef(1.f, divisor) + poison[h];
      if constexpr (C::kHasLse && !C::kSumsExactly) lse_sum[h] = divisor + poison[h];
      if constexpr (C::kIsSplit) {  // merge_parts divides
        inverse[h] = 1.f;
        const float4 sums = {top[h], divisor + poison[h], lse_sum[h], lse_shift[h]};
        if (quad_ == 0) store_part_sums(p_, place, h, sums);
      }
    }
    const bool all_attend = __all_sync(~0u, attends[0] && attends[1]);
    if constexpr (C::kHasLse && !C::kIsSplit) {
      if (p_.lse != nullptr && quad_ == 0) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float lse = natural_lse<C::kValues>(top[h] * kUnit, lse_sum[h], lse_shift[h]);
          store_lse(p_, place, h, attends[h] ? lse : -INFINITY);
        }
      }
    }
    const Results results{scales, {sum[0], sum[1]}, {old[0], old[1]}, {inverse[0], inverse[1]}};
    if (!C::kIsSplit && stores_vectors(p_) && all_attend) {
      const VectorStore target(p_, place, quad_);
      uint32_t low[2];
      make_results(results, [&](int j, const float (&x)[2][2]) {
        uint32_t pairs[2];
#pragma unroll
        for (int h = 0; h < 2; h++) pairs[h] = pack_halves(p_.dtype, x[h][0], x[h][1]);
        if (j % 2 == 1) target.store(j - 1, low, pairs);
        low[0] = pairs[0];
        low[1] = pairs[1];
      });
    } else {
      make_results(results, [&](int j, float (&x)[2][2]) {
#pragma unroll
        for (int i = 0; i < 4; i++) x[i / 2][i % 2] = attends[i / 2] ? x[i / 2][i % 2] : 0.f;
        if constexpr (C::kIsSplit) {
          store_part_columns<C::kWidth>(place, j, quad_, x);
        } else {
          store_elements(p_, place, j, quad_, x);
        }
      });
    }
  }

  // What makes results of sums: of the last group its scales and sums of P, of those before it the
  // factors of their sums, and the inverse of the sum of P over all.
  struct Results {
    const float* scales;
    float sum[2], old[2], inverse[2];
  };
  struct Columns {
    float2 scale, shift;
    float4 before;  // sums of finished groups
  };
  __device__ __forceinline__ Columns load_columns(int j, const float* scales) const {
    const float2 scale = *reinterpret_cast<const float2*>(scales + 8 * j);
    if constexpr (!C::kHasGroupSums) return {scale, {}, {}};
    return {scale, *reinterpret_cast<const float2*>(scales + C::kWidth + 8 * j),
            buffer_is_used_ ? sums(j) : make_float4(0, 0, 0, 0)};
  }

  // Hands x[h][b] of every block of 8 columns to `store`, what the next one needs on its way.
  template <typename Store>
  __device__ __forceinline__ void make_results(const Results& r, Store store) const {
    Columns next = load_columns(0, r.scales);
#pragma unroll
    for (int j = 0; j < C::kWidth / 8; j++) {
      const auto [scale, shift, before] = next;
      if (j + 1 < C::kWidth / 8) next = load_columns(j + 1, r.scales);
      float4 y{};
      if constexpr (C::kHasGroupSums)
        y = {fmaf(before.x, r.old[0], shift.x * r.sum[0]),
             fmaf(before.y, r.old[0], shift.y * r.sum[0]),
             fmaf(before.z, r.old[1], shift.x * r.sum[1]),
             fmaf(before.w, r.old[1], shift.y * r.sum[1])};
      float x[2][2] = {{dequantize(4 * j, scale.x, y.x) * r.inverse[0],
                        dequantize(4 * j + 1, scale.y, y.y) * r.inverse[0]},
                       {dequantize(4 * j + 2, scale.x, y.z) * r.inverse[1],
                        dequantize(4 * j + 3, scale.y, y.w) * r.inverse[1]}};
      store(j, x);
      // Keeps the blocks apart: all at once need more registers than there are.
      asm volatile("" ::: "memory");
    }
  }

  using ValueProduct = Values<C::kOutputColumns, C::kValues>;
  static constexpr int kStages = C::kStages;
  static constexpr int kScores = Scores<C::kKeys>::kRegisters;
  // Whether hidden keys are hidden once their P is a code, which takes fewer instructions; the
  // exact sum must not have them before.
  static constexpr bool kHidesCodes = C::kHasGroupSums && !C::kSumsExactly;
  static constexpr float kLogTop = kOffset<C::kValues>, kLogLag = kLag<C::kValues>;
  // Of maxima, in base-2 logits.
  static constexpr float kUnit = C::kHasMask ? kMaskedUnit : 1.f;

  const AttentionParams& p_;
  uint8_t* const shared_;
  const uint32_t base_;
  const Barriers<C> barriers_;
  const Work* const works_;
  const int warpgroup_, lane_, row_in_block_, quad_;
  float* const buffer_;  // of finished groups: sums of P V, then of P, relative to buffer_max_

  unsigned count_ = 0;        // steps of K and V before this piece of work
  unsigned group_count_ = 0;  // groups of V whose scales were taken
  unsigned work_count_ = 0;
  int slot_, steps_, first_step_, skip_, whole_from_;
  int first_scale_;      // of the keys, of this thread's four
  int last_, diagonal_;  // the last key there is, and that a causal mask leaves this thread's row
  uint64_t query_;
  float key_scale_, next_key_scale_, query_scale_[2], lse_shift_[2], sum_[2];
  float max_[2], buffer_max_[2];
  int poison_;  // bit h: the row has seen a key whose scale is NaN
  bool buffer_is_used_;
  int accumulates_;
  int s_[kScores];
  uint32_t p_codes_[C::kKeys / 8 * code_bytes(C::kValues)];
  typename ValueProduct::Register o_[ValueProduct::kRegisters];
  float sums_[C::kSumRegisters > 0 ? C::kSumRegisters : 1];  // what buffer_ has no room for
  MaskTile<C> mask_;
};

}  // namespace torch_sage::sm90
