// How keys are split for few query rows, which alone would not keep a GPU busy.
#pragma once

#include <algorithm>

#include "quantize/cuda/prepared.h"

namespace torch_sage::sm90 {

constexpr int kFewRows = 64;  // of a head: those of one warpgroup
// A part has at least so many blocks of 128 keys, beside which its beginning and end take little
// time, and one for so many rows, whose results in fp32 take little memory beside the keys, unless
// a head had fewer parts than kFewParts. It has more where there were more than kMostParts.
constexpr int kLeastKeyBlocks = 4, kRowsPerKeyBlock = 4, kFewParts = 8, kMostParts = 128;

// The results of all parts, of which merge_parts makes the output. How many there are depends on
// keys and rows, not on heads, so that a head has the bits of a call with it alone.
struct Parts {
  int count;       // of the keys of a head; 0: they are not split
  int key_blocks;  // of 128 keys, of each but the last
  int tokens;      // Rows are those of query heads that share keys, each so many, one by one.
  float* outputs;  // [b, h, count, rows, width], not divided by the sums of P
  // The same without width: the reference maximum, the sum of P as V was multiplied by it, that of
  // exact P, and what the LSE has besides.
  float4* sums;
};

// The parts of so many keys of a head, without addresses.
constexpr Parts split(int64_t keys, int64_t rows) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t blocks = divide_up(keys, kKeyBlock128);
  const int64_t for_rows =
      std::min(divide_up(rows, kRowsPerKeyBlock), divide_up(blocks, kFewParts));
  const int64_t size =
      std::max({int64_t{kLeastKeyBlocks}, for_rows, divide_up(blocks, kMostParts)});
  Parts parts{};
  parts.count = static_cast<int>(divide_up(blocks, size));
  parts.key_blocks = static_cast<int>(size);
  return parts;
}

}  // namespace torch_sage::sm90
