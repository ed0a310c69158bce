// DINOv2 without Python: loads the package and the photograph that package.py wrote, and prints the
// features of the photograph, one a line. The device is that of the package.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <stdexcept>
#include <string>

namespace {

at::Tensor read_photograph(const std::string& path) {
  const auto count = static_cast<int64_t>(std::filesystem::file_size(path) / sizeof(float));
  const auto side = static_cast<int64_t>(std::sqrt(count / 3));
  return at::from_file(path, /*shared=*/false, count, at::kFloat).view({1, 3, side, side});
}

void run(const std::string& library, const std::string& package, const std::string& photograph,
         const at::Device& device) {
  // Defines torch_sage::sdpa, which the package calls; it must be there when the package is loaded.
  if (dlopen(library.c_str(), RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());

  const c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(package);
  const at::Tensor pixels = read_photograph(photograph).to(device);
  // The class token of [1, 1 + patches, 384].
  const at::Tensor features = model.run({pixels}).at(0).select(1, 0).cpu().contiguous();
  for (int64_t i = 0; i < features.numel(); ++i) {
    std::printf("%.9g\n", features.const_data_ptr<float>()[i]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4 && argc != 5) {
    std::fprintf(stderr,
                 "usage: %s libtorch_sage_standalone.so dinov2.pt2 photograph.f32 [device]\n",
                 argv[0]);
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3], at::Device(argc == 5 ? argv[4] : "cpu"));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
