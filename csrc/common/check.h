// Errors for bad arguments: "<name> must <expected>, got <actual>", raised in Python as ValueError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace torch_sage {

// std::invalid_argument, not torch's STD_TORCH_CHECK: Python sees ValueError, as from the fakes,
// and the text names no C++ file.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) [[unlikely]] {
    fail(parts...);
  }
}

}  // namespace torch_sage
