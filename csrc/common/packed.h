// Sequences of different lengths, one after the other in the rows of one tensor.
#pragma once

#include <cstdint>

namespace torch_sage {

struct Packed {
  const int32_t* starts;  // [count + 1] on the device; null: the tensor has a batch dimension
  int count;              // of sequences; number i has the rows from starts[i] to starts[i + 1]
  int rows;               // of the tensor: what `starts` says beyond them does not count
  int longest;            // rows of a sequence that count

  // Units of `size` rows are numbered so that sequence i has those from starts[i] / size + i on, of
  // which it needs all or all but one: nobody has to add up lengths. This is how many there are.
  constexpr int64_t units(int size) const { return rows / size + count; }
};

}  // namespace torch_sage
