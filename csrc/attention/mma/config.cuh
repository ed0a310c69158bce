// Sizes of one instantiation of the attention kernel, and its plan of shared memory.
#pragma once

#include "attention/mma/params.h"

namespace torch_sage::mma {

constexpr int kRows = 128;  // query rows of a block
constexpr int kKeyColumns = kKeys / 8;

// kWidth: head_dim, zero-padded.
template <int kWidth_, bool kIsInt4_, Pv kPv_>
struct Config {
  static constexpr int kWidth = kWidth_;
  static constexpr bool kIsInt4 = kIsInt4_;
  static constexpr Pv kPv = kPv_;
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
  static constexpr int kPlainBytes = kAmaxAt + 4 * 8;
  // Only where Q is smoothed: K as it was, the mean of Q, its parts, the correction of a tile.
  static constexpr int kRawAt = kPlainBytes;
  static constexpr int kMeanAt = kRawAt + kKeys * 2 * kWidth;
  static constexpr int kPartsAt = kMeanAt + 4 * kWidth;
  static constexpr int kCorrectionAt = kPartsAt + 3 * 2 * kWidth;
  static constexpr int kSmoothBytes = kCorrectionAt + 4 * kKeys;
};

}  // namespace torch_sage::mma
