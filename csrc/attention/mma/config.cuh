// Sizes of one instantiation of the attention kernel, and its plan of shared memory.
#pragma once

#include "attention/mma/params.h"

namespace torch_sage::mma {

constexpr int kRows = 128;  // query rows of a block
constexpr int kKeyColumns = kKeys / 8;
constexpr int kSequenceBytes = 64;
constexpr int kParts = 3;  // 16-bit numbers whose sum is an element of a mean of Q

// kWidth: head_dim, zero-padded.
template <int kWidth_, bool kIsInt4_, Pv kPv_, bool kHasMask_>
struct Config {
  static constexpr int kWidth = kWidth_;
  static constexpr bool kIsInt4 = kIsInt4_;
  static constexpr Pv kPv = kPv_;
  static constexpr bool kHasMask = kHasMask_;
  static constexpr bool kIsE4m3 = is_e4m3(kPv);
  static constexpr bool kHasFp16Accumulator = kPv == Pv::kE4m3Fp16 || kPv == Pv::kFp16Fp16;
  // Whether PV starts from zero at every tile, and a true fp32 sum takes it over.
  static constexpr bool kFlushes = kIsE4m3 || kHasFp16Accumulator;

  // At width 256 the accumulators of 32 rows would not fit a warp's registers.
  static constexpr int kWarpRows = kWidth == 256 ? 16 : 32;
  static constexpr int kRowTiles = kWarpRows / 16;
  static constexpr int kWarps = kRows / kWarpRows;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksPerProcessor = kWidth == 256 ? 1 : 2;

  static constexpr int kCodeBytes = kIsInt4 ? kWidth / 2 : kWidth;  // of a row of Q or K
  static constexpr int kValueRows = kIsE4m3 ? kWidth : kKeys;
  static constexpr int kValueRowBytes = kIsE4m3 ? kKeys : 2 * kWidth;

  static constexpr int kQueryAt = 0;  // before that, scratch for the mean of Q
  static constexpr int kKeyAt = kQueryAt + kRows * kCodeBytes;
  static constexpr int kValueAt = kKeyAt + kKeys * kCodeBytes;
  static constexpr int kShiftAt = kValueAt + kValueRows * kValueRowBytes;  // of the LSE, per row
  static constexpr int kAmaxAt = kShiftAt + 4 * kRows;                     // per warp
  static constexpr int kSequenceAt = kAmaxAt + 4 * 8;
  static constexpr int kPlainBytes = kSequenceAt + kSequenceBytes;

  // Only with a mask: of 8 rows per warp, with a distance that keeps a quad's reads on other banks.
  static constexpr int kBiasStride = kKeys + 4;
  static constexpr int kBiasBytes = 4 * 8 * kBiasStride;
  static constexpr int kMaskBytes = kWarps * kBiasBytes;

  // Only where Q is smoothed, behind all that: its mean, the correction of a tile, and, for tensor
  // cores, parts of the mean and K as it was, unless together that were more than the 99 KB that
  // some GPUs have.
  static constexpr bool kCorrectsByTensorCores = kWidth <= 128 || (kIsInt4 && !kHasMask);
  static constexpr int kMeanAt = 0;
  static constexpr int kCorrectionAt = kMeanAt + 4 * kWidth;
  static constexpr int kPartsAt = kCorrectionAt + 4 * kKeys;
  static constexpr int kRawAt = kPartsAt + (kCorrectsByTensorCores ? kParts * 2 * kWidth : 0);
  static constexpr int kSmoothBytes = kRawAt + (kCorrectsByTensorCores ? kKeys * 2 * kWidth : 0);

  static constexpr int kMostBytes = kPlainBytes + (kHasMask ? kMaskBytes : 0) + kSmoothBytes;
  static_assert(kMostBytes <= 99 * 1024, "or it would not start on 8.6, 8.9 and 12.0");

  static int shared_bytes(const AttentionParams& p) {
    return kPlainBytes + (p.mask_kind == MaskKind::kNone ? 0 : kMaskBytes) +
           (p.key == nullptr ? 0 : kSmoothBytes);
  }
};

}  // namespace torch_sage::mma
