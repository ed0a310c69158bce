// Errors for bad arguments: "<name> must <expected>, got <actual>", raised in Python as ValueError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace torch_sage {

// std::invalid_argument, not torch's STD_TORCH_CHECK: Python sees ValueError, as from the fakes,
// and the text names no C++ file.
template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) [[likely]] {
    return;
  }
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace torch_sage
