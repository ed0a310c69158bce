// Arguments that say how a query or key is normed and rotated, read and checked.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/operand.h"
#include "common/text.h"
#include "quantize/cuda/rotary.h"

namespace torch_sage::cuda {

struct Rotation {
  Rotary view;
  std::vector<torch::stable::Tensor> tensors;  // keep what it points to alive
};

// `name` is that of x.
Rotation read_rotation(const std::string& name, const FloatOperand& x,
                       const torch::stable::Tensor& cos, const torch::stable::Tensor& sin,
                       const std::optional<torch::stable::Tensor>& rstd,
                       const std::optional<torch::stable::Tensor>& weight,
                       std::optional<double> eps, const Text& pairing);

}  // namespace torch_sage::cuda
