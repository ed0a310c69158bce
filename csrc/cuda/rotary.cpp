#include "cuda/rotary.h"

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "common/check.h"
#include "common/types.h"

namespace torch_sage::cuda {
namespace {

using torch::stable::Tensor;

constexpr Names<Pairing, 2> kPairings = {
    {{"halves", Pairing::kHalves}, {"neighbours", Pairing::kNeighbours}}};

// The same numbers with dense rows that begin at multiples of 16 bytes.
Tensor with_aligned_rows(const Tensor& table) {
  const int64_t columns = table.dim() - 1;
  const int64_t per_load = 16 / static_cast<int64_t>(table.element_size());
  bool is_aligned =
      reinterpret_cast<uintptr_t>(table.const_data_ptr()) % 16 == 0 && table.stride(columns) == 1;
  for (int64_t d = 0; d < columns; ++d)
    is_aligned &= table.size(d) <= 1 || table.stride(d) % per_load == 0;
  if (is_aligned) return table;
  Tensor copy = torch::stable::new_empty(table, table.sizes());
  torch::stable::copy_(copy, table);
  return copy;
}

// 0 where the dimension is broadcast.
int64_t stride_of(const Tensor& table, int64_t dim) {
  return table.size(dim) == 1 ? 0 : table.stride(dim);
}

}  // namespace

Rotation read_rotation(const std::string& name, const FloatOperand& x, const Tensor& cos,
                       const Tensor& sin, const std::optional<Tensor>& rstd,
                       const std::optional<Tensor>& weight, std::optional<double> eps,
                       const Text& pairing) {
  check(x.dtype != Dtype::kFloat32, name, " must have dtype bfloat16 or float16, got float32");
  check(x.columns == 64 || x.columns == 128, name, " must have a head_dim of 64 or 128, got ",
        x.columns);
  const std::vector<int64_t> batch{x.batch, 1}, heads{x.heads, 1}, tokens{x.rows};
  Rotation result{};
  const auto keep = [&](Tensor table) -> const Tensor& {
    return result.tensors.emplace_back(std::move(table));
  };
  const auto angles = [&](const char* which, const Tensor& given) -> RotaryTable {
    const Tensor& table = keep(
        with_aligned_rows(read_table(name + which, given, x, true, {batch, tokens, {x.columns}})));
    return {static_cast<const float*>(table.const_data_ptr()), stride_of(table, 0),
            stride_of(table, 1)};
  };
  result.view.pairing = parse("pairing", pairing, kPairings, "cuda");
  result.view.cos = angles("_cos", cos);
  result.view.sin = angles("_sin", sin);
  if (rstd.has_value()) {
    check(!eps.has_value(), name, "_eps must be None beside ", name, "_rstd, got ",
          eps.value_or(0));
    const Tensor& table = keep(read_table(name + "_rstd", *rstd, x, true, {batch, heads, tokens}));
    result.view.rstd = static_cast<const float*>(table.const_data_ptr());
    result.view.rstd_stride_b = stride_of(table, 0);
    result.view.rstd_stride_h = stride_of(table, 1);
    result.view.rstd_stride_n = stride_of(table, 2);
  }
  check(!eps.has_value() || (*eps >= 0 && *eps <= std::numeric_limits<float>::max()), name,
        "_eps must be finite in float32 and not negative, got ", eps.value_or(0));
  result.view.eps = static_cast<float>(eps.value_or(-1));
  if (weight.has_value()) {
    const Tensor& table = keep(
        with_aligned_rows(read_table(name + "_weight", *weight, x, false, {heads, {x.columns}})));
    result.view.weight = table.const_data_ptr();
    result.view.weight_stride_h = stride_of(table, 0);
  }
  return result;
}

}  // namespace torch_sage::cuda
