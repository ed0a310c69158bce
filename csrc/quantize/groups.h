// Which rows of Q or K share one scale: the table of algorithm.md 2.2 in one closed form.
#pragma once

#include <cstdint>

namespace torch_sage {

// Rows come in blocks, blocks in spans (of a warp, or the whole block). Inside a span, row r
// belongs to lane group (r mod 8) / rows_per_lane, as the m16n8 accumulator fragment deals its rows
// (Q) and columns (K) to lanes; one lane group unless the granularity is "thread". Scales lie span
// by span, and a last, partial block has all of them.
struct Groups {
  int64_t block_rows;
  int64_t span_rows;  // divides block_rows
  int64_t lane_groups;
  int64_t rows_per_lane;
  int64_t least_blocks;  // 1 for "tensor", which has its scale even where there is no row

  int64_t blocks(int64_t rows) const {
    const int64_t count = rows / block_rows + (rows % block_rows != 0);
    return count > least_blocks ? count : least_blocks;
  }
  int64_t spans(int64_t rows) const { return blocks(rows) * (block_rows / span_rows); }
  int64_t scales(int64_t rows) const { return spans(rows) * lane_groups; }
  // `row` counts from the first row of its span.
  int64_t lane_group(int64_t row) const { return row % 8 / rows_per_lane; }
  bool is_per_row() const { return block_rows == 1; }
};

constexpr int64_t kMaxLaneGroups = 8;

constexpr Groups per_row() { return {1, 1, 1, 8, 0}; }
constexpr Groups per_span(int64_t block, int64_t span) { return {block, span, 1, 8, 0}; }
constexpr Groups query_per_thread(int64_t block, int64_t warp) { return {block, warp, 8, 1, 0}; }
constexpr Groups key_per_thread(int64_t block) { return {block, block, 4, 2, 0}; }
constexpr Groups per_tensor(int64_t rows) {
  const int64_t block = rows > 1 ? rows : 2;  // a block of one would be per row: no row, no scale
  return {block, block, 1, 8, 1};
}

}  // namespace torch_sage
