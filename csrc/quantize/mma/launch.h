// A launch whose errors are exceptions. Not <<<>>>: an error would have to be read from where
// others leave theirs.
#pragma once

#include <cuda_runtime.h>

#include "cuda/error.h"

namespace torch_sage::mma {

template <typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
                   const char* what, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

}  // namespace torch_sage::mma
