// Tensor arguments of the ops, checked before anything reads their memory.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <ostream>
#include <string>
#include <vector>

#include "common/params.h"
#include "quantize/cpu/launch.h"

namespace torch_sage {

// Sizes as an error shows them: [1, 8, 1024, 64].
struct Shape {
  torch::headeronly::IntHeaderOnlyArrayRef sizes;
};
std::ostream& operator<<(std::ostream& out, const Shape& shape);

using torch::stable::Device;
inline const Device kCpu{torch::headeronly::DeviceType::CPU};

// An uninitialised tensor of up to 4 dimensions, and a contiguous one with the elements of another.
// Both throw bad_alloc where torch cannot allocate on the CPU: its C interface of 2.11 says only
// that a call failed.
torch::stable::Tensor new_tensor(std::initializer_list<int64_t> sizes,
                                 torch::headeronly::ScalarType dtype, const Device& device = kCpu);
torch::stable::Tensor new_strided(std::initializer_list<int64_t> sizes, const int64_t* strides,
                                  torch::headeronly::ScalarType dtype, const Device& device);
torch::stable::Tensor make_contiguous(const torch::stable::Tensor& tensor);

// What every tensor argument must be: on the device, with all its elements inside its storage.
void check_memory(const char* name, const torch::stable::Tensor& tensor,
                  const Device& device = kCpu);

// A [batch, heads, rows, columns] argument whose columns are adjacent in memory.
struct Operand {
  torch::stable::Tensor tensor;  // keeps `data` alive
  const std::byte* data;
  int64_t element_bytes;
  int64_t batch, heads, rows, columns;
  int64_t stride_b, stride_h, stride_n;  // elements

  const std::byte* row(int64_t b, int64_t h, int64_t n) const {
    return data + (b * stride_b + h * stride_h + n * stride_n) * element_bytes;
  }
  bool is_dense() const;
};

struct FloatOperand : Operand {
  Dtype dtype;

  RowBlock block(int64_t b, int64_t h, int64_t first, int64_t count) const {
    return {row(b, h, first), dtype, count, columns, stride_n};
  }
};

// A fp32, bf16 or fp16 argument with 1..kMaxHeadDim columns.
FloatOperand read_float(const char* name, const torch::stable::Tensor& tensor,
                        const Device& device = kCpu);
// The same of one exact dtype of torch (such as torch::headeronly::ScalarType::Char).
Operand read_codes(const char* name, const torch::stable::Tensor& tensor,
                   torch::headeronly::ScalarType dtype);
// A contiguous copy, if need be, of an argument of exactly this dtype and these sizes.
torch::stable::Tensor read_exact(const char* name, const torch::stable::Tensor& tensor,
                                 int32_t dtype, const std::vector<int64_t>& sizes,
                                 const Device& device);
torch::stable::Tensor read_fp32(const char* name, const torch::stable::Tensor& tensor,
                                const std::array<int64_t, 3>& sizes);

// Numbers that go with a FloatOperand, in fp32 or its dtype; each size is one of those listed.
torch::stable::Tensor read_table(const std::string& name, const torch::stable::Tensor& tensor,
                                 const FloatOperand& x, bool is_fp32,
                                 const std::vector<std::vector<int64_t>>& sizes);

struct Mask {
  torch::stable::Tensor tensor;
  MaskKind kind;
  int64_t strides[4];  // [b, h, n, m], 0 where it is broadcast
};
Mask read_mask(const torch::stable::Tensor& tensor, int64_t batch, int64_t heads, int64_t seqlen_q,
               int64_t seqlen_k, const Device& device = kCpu);

// Product of sizes and element_bytes; bad_alloc where it does not fit 63 bits, let alone memory.
size_t byte_count(std::initializer_list<int64_t> sizes, int64_t element_bytes);

// Uninitialised working memory, aligned for vector loads.
template <typename T>
class Scratch {
 public:
  explicit Scratch(std::initializer_list<int64_t> sizes)
      : count_(byte_count(sizes, sizeof(T)) / sizeof(T)),
        data_(static_cast<T*>(::operator new(count_ * sizeof(T), kAlignment))) {}
  T* get() const { return data_.get(); }
  T* begin() const { return data_.get(); }
  T* end() const { return data_.get() + count_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  size_t count_;
  std::unique_ptr<T, Free> data_;
};

}  // namespace torch_sage
