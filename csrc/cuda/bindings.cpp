#include <torch/csrc/stable/library.h>

#include "cuda/ops.h"

namespace torch_sage::cuda {
namespace {

// Place of `pv` among the arguments of sdpa and sdpa_with_lse.
constexpr int kPvArgument = 8;

bool is_for_hopper(StableIValue pv) {
  const auto text = torch::stable::detail::to<StringHandle>(pv);
  size_t length = 0;
  const char* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(text, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(text, &data));
  return std::string_view(data, length) == "e4m3_fp16";
}

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

// Other recipes are those of the Triton kernels, which are Python's.
void route(Boxed ours, const char* others, StableIValue* stack, uint64_t arguments,
           uint64_t results) {
  if (is_for_hopper(stack[kPvArgument])) return ours(stack, arguments, results);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(others, "", stack, TORCH_ABI_VERSION));
}

void route_sdpa(StableIValue* stack, uint64_t arguments, uint64_t results) {
  route(TORCH_BOX(&sdpa), "torch_sage::triton_sdpa", stack, arguments, results);
}
void route_sdpa_with_lse(StableIValue* stack, uint64_t arguments, uint64_t results) {
  route(TORCH_BOX(&sdpa_with_lse), "torch_sage::triton_sdpa_with_lse", stack, arguments, results);
}

STABLE_TORCH_LIBRARY_IMPL(torch_sage, CUDA, m) {
  m.impl("sdpa", &route_sdpa);
  m.impl("sdpa_with_lse", &route_sdpa_with_lse);
  m.impl("prepare_kv", TORCH_BOX(&prepare_kv));
  m.impl("attention_prepared", TORCH_BOX(&attention_prepared));
  m.impl("attention_prepared_with_lse", TORCH_BOX(&attention_prepared_with_lse));
}

}  // namespace
}  // namespace torch_sage::cuda
