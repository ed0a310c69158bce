// A string argument of an op.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <string_view>

namespace torch_sage {

class Text {
 public:
  explicit Text(std::string_view text) : text_(text) {}
  operator std::string_view() const { return text_; }

 private:
  std::string text_;
};

}  // namespace torch_sage

// Not std::string: torch's conversion of it (ToImpl<std::string>, 2.11 to 2.13 at least) returns a
// copy of a string that it allocated and forgets, 32 bytes or more for each argument of each call.
template <>
struct torch::stable::detail::ToImpl<torch_sage::Text> {
  static torch_sage::Text call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    const torch_sage::Text text{std::string_view(data, length)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
