#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>
#include <string_view>

#include "build_cuda.h"  // setup.py writes it
#include "common/check.h"
#include "cuda/device.h"
#include "cuda/ops.h"

namespace torch_sage::cuda {
namespace {

// Among the arguments: a tensor on the device, and where the recipe begins (qk, granularity, pv),
// of the ops over batches and over packed sequences.
constexpr int kQuery = 0, kRecipe = 6, kPackedRecipe = 9;

std::string text_at(StableIValue* stack, int place) {
  const auto text = torch::stable::detail::to<StringHandle>(stack[place]);
  size_t length = 0;
  const char* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(text, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(text, &data));
  return {data, length};
}

int device_at(StableIValue* stack, int place) {
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(
      torch::stable::detail::to<AtenTensorHandle>(stack[place]), &device));
  return device;
}

// No exception crosses torch's C interface, nor does its text before torch 2.13: Python catches its
// own and returns the text, empty if all went well, behind the results. It is bytes in a tensor,
// for the interface mistakes a result for another if not all have one type (2.11 to 2.13 at least).
void call_triton(const char* name, StableIValue* stack, uint64_t results) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
  const auto take = [&](uint64_t place) {
    return torch::stable::detail::to<torch::stable::Tensor>(stack[place]);
  };
  const torch::stable::Tensor bytes = take(results);
  if (bytes.numel() == 0) return;
  for (uint64_t place = 0; place < results; ++place) take(place);  // and let go
  const std::string_view text(static_cast<const char*>(bytes.const_data_ptr()), bytes.numel());
  constexpr std::string_view kOfValue = "ValueError: ";
  if (text.starts_with(kOfValue)) fail(text.substr(kOfValue.size()));
  throw std::runtime_error(std::string(text));
}

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

// The granularities are disjoint; what Triton has besides, it does where there is no other code.
void route(Boxed hopper, Boxed mma, const char* triton, int recipe, StableIValue* stack,
           uint64_t arguments, uint64_t results) {
  const std::string granularity = text_at(stack, recipe + 1), pv = text_at(stack, recipe + 2);
  if (granularity == "token_thread") return hopper(stack, arguments, results);
  const bool is_e4m3 = pv == "e4m3" || pv == "e4m3_fp16";
  const bool is_tritons = granularity == "token" || granularity == "token_block";
  if (is_e4m3 || (!is_tritons && has_code("sm80", device_at(stack, kQuery))))
    return mma(stack, arguments, results);
  call_triton(triton, stack, results);
}

void route_sdpa(StableIValue* stack, uint64_t arguments, uint64_t results) {
  route(TORCH_BOX(&sdpa), TORCH_BOX(&mma_sdpa), "torch_sage::triton_sdpa", kRecipe, stack,
        arguments, results);
}
void route_sdpa_with_lse(StableIValue* stack, uint64_t arguments, uint64_t results) {
  route(TORCH_BOX(&sdpa_with_lse), TORCH_BOX(&mma_sdpa_with_lse),
        "torch_sage::triton_sdpa_with_lse", kRecipe, stack, arguments, results);
}
void route_varlen_sdpa(StableIValue* stack, uint64_t arguments, uint64_t results) {
  route(TORCH_BOX(&varlen_sdpa), TORCH_BOX(&mma_varlen_sdpa), "torch_sage::triton_varlen_sdpa",
        kPackedRecipe, stack, arguments, results);
}
void route_varlen_sdpa_with_lse(StableIValue* stack, uint64_t arguments, uint64_t results) {
  route(TORCH_BOX(&varlen_sdpa_with_lse), TORCH_BOX(&mma_varlen_sdpa_with_lse),
        "torch_sage::triton_varlen_sdpa_with_lse", kPackedRecipe, stack, arguments, results);
}

STABLE_TORCH_LIBRARY_IMPL(torch_sage, CUDA, m) {
  m.impl("sdpa", &route_sdpa);
  m.impl("sdpa_with_lse", &route_sdpa_with_lse);
  m.impl("rotary_sdpa", TORCH_BOX(&rotary_sdpa));
  m.impl("mma_prepare_kv", TORCH_BOX(&mma_prepare_kv));
  m.impl("varlen_sdpa", &route_varlen_sdpa);
  m.impl("varlen_sdpa_with_lse", &route_varlen_sdpa_with_lse);
  m.impl("prepare_kv", TORCH_BOX(&prepare_kv));
  m.impl("attention_prepared", TORCH_BOX(&attention_prepared));
  m.impl("attention_prepared_with_lse", TORCH_BOX(&attention_prepared_with_lse));
  m.impl("attention_prepared_part", TORCH_BOX(&attention_prepared_part));
}

}  // namespace
}  // namespace torch_sage::cuda
