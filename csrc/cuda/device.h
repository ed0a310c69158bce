// The current device and stream of torch, without linking its CUDA library.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

#include <string_view>

namespace torch_sage {

// The stream on which work on `device` belongs now. Throws std::runtime_error without torch's CUDA.
cudaStream_t current_stream(int device);

// The GPU of an argument. Throws std::invalid_argument if it is on none.
int device_index(const char* name, const torch::stable::Tensor& tensor);
// The same; also throws unless the GPU has compute capability 9.0.
int hopper_index(const char* name, const torch::stable::Tensor& tensor);

// Whether the library has code of a family, such as "sm89", that `device` runs.
bool has_code(std::string_view family, int device);

// How many multiprocessors `device` has.
int multiprocessors(int device);

}  // namespace torch_sage
