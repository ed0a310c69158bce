// Sizes of one instantiation of the attention kernel, and its plan of shared memory.
#pragma once

#include "attention/sm90/params.h"

namespace torch_sage::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kQueryWarps = 3;  // of the producer warpgroup; its first warp fetches K and V
constexpr int kQueryThreads = 32 * kQueryWarps;
// P is 2^kOffset at the reference maximum, which a row may exceed by kLag (base 2) before it moves.
// So a value group sums to at most 1024 * 2^7.75 * .25 = 55104, within fp16.
// fp32 sums of bf16 have no such limit; a row that moves seldom costs less.
template <ValueFormat kValues>
constexpr float kOffset = kValues == ValueFormat::kE4m3 ? 6.f : 0.f;
template <ValueFormat kValues>
constexpr float kLag = kValues == ValueFormat::kE4m3 ? 1.75f : 8.f;
// E4M3 code of 1, and so little more that the largest score of a row, less itself as it is rounded,
// is not truncated to the code below its own.
constexpr float kCodeOfOne = 56.f + 0x1p-8f;
// Of the rows behind V that sum P: E4M3 .25, bf16 1.
template <ValueFormat kValues>
constexpr float kOneInCode = kValues == ValueFormat::kE4m3 ? .25f : 1.f;
template <ValueFormat kValues>
constexpr uint32_t kOneCodes = kValues == ValueFormat::kE4m3 ? 0x28282828u : 0x3f803f80u;
constexpr int kWorkBytes = 64;  // of a piece of work, in shared memory

enum class Mode {
  kMixed,   // no mask, no LSE; of E4M3, part of the exponentials by the linear mantissa
  kPart,    // the same, and the log of the sum that the output was divided by
  kExact,   // no mask; hardware exponentials, LSE if asked for
  kMasked,  // the same with any mask
  // For few rows and a part of the keys (parts.h), which has an LSE: as kExact and as kMasked.
  kSplit,
  kSplitMasked,
};

// kWidth: head_dim, zero-padded.
template <int kWidth_, Mode kMode, ValueFormat kValues_ = ValueFormat::kE4m3>
struct Config {
  static constexpr int kWidth = kWidth_;
  // E4M3 values are summed in fp16 over a group, and groups in fp32; bf16 ones in fp32 at once.
  static constexpr ValueFormat kValues = kValues_;
  static constexpr bool kHasGroupSums = kValues == ValueFormat::kE4m3;
  static constexpr bool kIsSplit = kMode == Mode::kSplit || kMode == Mode::kSplitMasked;
  static constexpr bool kHasMask = kMode == Mode::kMasked || kMode == Mode::kSplitMasked;
  static constexpr bool kIsWide = kWidth > 128;
  static constexpr bool kHasLse = kMode != Mode::kMixed;
  // Whether the LSE has a sum of its own, of probabilities that are exact.
  static constexpr bool kSumsExactly = kMode != Mode::kMixed && kMode != Mode::kPart;
  // Of four 16-key columns of a step, so many take the hardware's exponential; the others, the
  // linear mantissa.
  static constexpr int kExactColumns = kSumsExactly || !kHasGroupSums ? 4 : 1;

  // Warpgroups of 64 query rows. A mask, half of the sums of 256 channels, and sums in fp32, take
  // registers that three of them do not have. Few rows wait for memory: one, and more steps in
  // flight.
  static constexpr int kConsumers = kIsSplit ? 1 : kHasMask || kIsWide || !kHasGroupSums ? 2 : 3;
  static constexpr int kStages = kIsSplit ? 4 : 2;  // steps of K and V in flight
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
  // In all, no more registers than a multiprocessor has; half of them for a single consumer, two of
  // whose blocks may share one.
  static constexpr int kConsumerRegisters = kConsumers == 3       ? 152
                                            : kConsumers == 2     ? kHasGroupSums ? 232 : 224
                                            : kHasMask || kIsWide ? 216
                                                                  : 168;
  static constexpr int kProducerRegisters = kConsumers == 3   ? 56
                                            : kConsumers == 2 ? kHasGroupSums ? 40 : 56
                                                              : 256 - kConsumerRegisters;

  static constexpr int kKeys = kIsWide || (kHasMask && !kHasGroupSums) ? 64 : 128;  // of a step
  static constexpr int kStepsPerGroup = kValueGroup / kKeys;
  static constexpr int kOutputColumns = kWidth + 8;  // 8 rows of ones behind V
  static constexpr int kKeyBytes = kKeys * kWidth;
  static constexpr int kTileBytes = kKeyTile * code_bytes(kValues);  // of V, per channel
  static constexpr int kPanelBytes = kOutputColumns * kTileBytes;
  static constexpr int kValueBytes = kKeys / kKeyTile * kPanelBytes;
  // fp32 sums of finished groups of V: columns in shared memory, and those in registers.
  static constexpr int kBufferColumns = kIsWide ? 128 : kWidth;
  static constexpr int kSumRegisters = kHasGroupSums ? (kWidth - kBufferColumns) / 2 : 0;
  // Per thread, sums of P behind.
  static constexpr int kBufferFloats = kHasGroupSums ? (kBufferColumns + 8) / 2 : 0;
  // Groups of V whose scales and shifts may be in use: of every step in flight, and two more.
  static constexpr int kScaleSlots = 2 * kStages;

  static constexpr int kQueryAt = 0;
  static constexpr int kKeyAt = kQueryAt + 2 * kRows * kWidth;
  static constexpr int kValueAt = kKeyAt + kStages * kKeyBytes;
  static constexpr int kQueryScaleAt = kValueAt + kStages * kValueBytes;
  static constexpr int kQueryShiftAt = kQueryScaleAt + 2 * kRows * 4;
  static constexpr int kValueScaleAt = kQueryShiftAt + (kHasLse ? 2 * kRows * 4 : 0);
  static constexpr int kWorkAt = kValueScaleAt + kScaleSlots * 2 * kWidth * 4;
  // Of the work in both slots, and of the next that waits for one.
  static constexpr int kBarrierAt = kWorkAt + 3 * kWorkBytes;
  static constexpr int kBufferAt = (kBarrierAt + 8 * (4 * kStages + 6) + 127) / 128 * 128;
  static constexpr int kBufferBytes = kWarpgroup * kBufferFloats * 4;
  static constexpr int kSharedBytes = kBufferAt + kConsumers * kBufferBytes;
  static_assert(kSharedBytes <= 227 << 10);
  static constexpr int kBlocks = kIsSplit && 2 * kSharedBytes <= 226 << 10 ? 2 : 1;  // that fit
};

// Barriers of a block, by shared address.
template <class C>
struct Barriers {
  static constexpr int kStages = C::kStages;
  uint32_t base;
  __device__ uint32_t key_full(int stage) const { return base + 8 * stage; }
  __device__ uint32_t key_empty(int stage) const { return base + 8 * (kStages + stage); }
  __device__ uint32_t value_full(int stage) const { return base + 8 * (2 * kStages + stage); }
  __device__ uint32_t value_empty(int stage) const { return base + 8 * (3 * kStages + stage); }
  __device__ uint32_t query_full(int slot) const { return base + 8 * (4 * kStages + slot); }
  __device__ uint32_t query_empty(int slot) const { return base + 8 * (4 * kStages + 2 + slot); }
  __device__ uint32_t work_ready(int slot) const { return base + 8 * (4 * kStages + 4 + slot); }
};

}  // namespace torch_sage::sm90
