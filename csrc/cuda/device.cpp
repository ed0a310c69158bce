#include "cuda/device.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "build_cuda.h"  // setup.py writes it
#include "common/check.h"
#include "cuda/error.h"

namespace torch_sage {
namespace {

using GetStream = AOTITorchError (*)(int32_t device, void** stream);

// A tensor on a GPU exists only where torch has loaded its CUDA library. Linking that would keep
// this library from loading in a torch without it.
GetStream find_get_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  void* symbol =
      library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  if (symbol == nullptr)
    throw std::runtime_error("libtorch_cuda.so must be loaded for tensors on cuda, got none");
  return reinterpret_cast<GetStream>(symbol);
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would be blamed
  check_cuda(error, "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

cudaStream_t current_stream(int device) {
  static const GetStream get_stream = find_get_stream();
  void* stream = nullptr;
  if (get_stream(device, &stream) != 0)
    throw std::runtime_error("torch has no current stream for cuda:" + std::to_string(device));
  return static_cast<cudaStream_t>(stream);
}

int device_index(const char* name, const torch::stable::Tensor& tensor) {
  check(tensor.is_cuda(), name, " must be on cuda like the other tensors, got another device");
  return tensor.get_device_index();
}

int hopper_index(const char* name, const torch::stable::Tensor& tensor) {
  const int device = device_index(name, tensor);
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  check(major == 9 && minor == 0, name, " must be on a GPU of compute capability 9.0, got ", major,
        ".", minor);
  return device;
}

bool has_code(std::string_view family, int device) {
  const std::string name = std::string(family) + ":";
  const std::string gpu = std::to_string(attribute(cudaDevAttrComputeCapabilityMajor, device)) +
                          "." +
                          std::to_string(attribute(cudaDevAttrComputeCapabilityMinor, device));
  // "sm80:8.0,8.6;sm89:8.9"
  std::istringstream families(TORCH_SAGE_CUDA_GPUS);
  for (std::string entry; std::getline(families, entry, ';');) {
    if (entry.rfind(name, 0) != 0) continue;
    std::istringstream gpus(entry.substr(name.size()));
    for (std::string has; std::getline(gpus, has, ',');)
      if (has == gpu) return true;
  }
  return false;
}

int multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

}  // namespace torch_sage
