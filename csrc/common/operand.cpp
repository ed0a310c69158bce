#include "common/operand.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "common/check.h"

namespace torch_sage {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The dtype as torch's C interface numbers it: unlike Tensor::scalar_type() it knows every dtype.
int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype = -1;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// The other way round, for the dtypes that the ops allocate.
int32_t number_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Char:
      return aoti_torch_dtype_int8();
    case ScalarType::Short:
      return aoti_torch_dtype_int16();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    default:
      throw std::logic_error("no op allocates this dtype");
  }
}

template <typename Allocate>
Tensor or_bad_alloc(const Allocate& allocate) {
  try {
    return allocate();
  } catch (const std::runtime_error&) {
    throw std::bad_alloc();
  }
}

struct DtypeName {
  int32_t dtype;
};

std::ostream& operator<<(std::ostream& out, DtypeName dtype) {
  const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_float32(), "float32"},
      {aoti_torch_dtype_bfloat16(), "bfloat16"},
      {aoti_torch_dtype_float16(), "float16"},
      {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint8(), "uint8"},
      {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_complex64(), "complex64"},
      {aoti_torch_dtype_complex128(), "complex128"},
      {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"}};
  for (const auto& [known, name] : names) {
    if (dtype.dtype == known) return out << name;
  }
  return out << "torch's dtype number " << dtype.dtype;
}

struct DeviceName {
  Device device;
};

std::ostream& operator<<(std::ostream& out, const DeviceName& name) {
  if (name.device.is_cpu()) return out << "cpu";
  if (name.device.is_cuda()) return out << "cuda:" << name.device.index();
  return out << "another device";
}

std::optional<Dtype> float_dtype(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return Dtype::kFloat32;
  if (dtype == aoti_torch_dtype_bfloat16()) return Dtype::kBFloat16;
  if (dtype == aoti_torch_dtype_float16()) return Dtype::kFloat16;
  return std::nullopt;
}

Operand read_rows(const char* name, const Tensor& tensor) {
  const int64_t columns = tensor.size(3);
  check(columns >= 1 && columns <= kMaxHeadDim, name, " must have a head_dim between 1 and ",
        kMaxHeadDim, ", got ", columns);
  const Tensor rows = columns == 1 || tensor.stride(3) == 1 ? tensor : make_contiguous(tensor);
  return {rows,
          static_cast<const std::byte*>(rows.const_data_ptr()),
          static_cast<int64_t>(rows.element_size()),
          rows.size(0),
          rows.size(1),
          rows.size(2),
          columns,
          rows.stride(0),
          rows.stride(1),
          rows.stride(2)};
}

// torch.ops passes None for any tensor, also where the schema says Tensor.
void check_defined(const char* name, const Tensor& tensor) {
  check(tensor.defined(), name, " must be a tensor, got None");
}

void check_rank(const char* name, const Tensor& tensor) {
  check_defined(name, tensor);
  check(tensor.dim() == 4, name, " must be 4-D [batch, heads, seqlen, head_dim], got ",
        Shape{tensor.sizes()});
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  const char* separator = "[";
  for (const int64_t size : shape.sizes) {
    out << separator << size;
    separator = ", ";
  }
  return out << (shape.sizes.empty() ? "[]" : "]");
}

Tensor new_strided(std::initializer_list<int64_t> sizes, const int64_t* strides, ScalarType dtype,
                   const Device& device) {
  // Not torch::stable::empty, whose way through the dispatcher takes several times as long.
  const auto allocate = [&] {
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.begin(), strides, number_of(dtype),
        device.is_cpu() ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(),
        device.index(), &handle));
    return Tensor(handle);
  };
  // A GPU's allocator says how much memory is missing.
  return device.is_cpu() ? or_bad_alloc(allocate) : allocate();
}

Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype, const Device& device) {
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes.begin()[d], 1);
  }
  return new_strided(sizes, strides.data(), dtype, device);
}

Tensor make_contiguous(const Tensor& tensor) {
  const auto copy = [&] { return torch::stable::contiguous(tensor); };
  return tensor.is_cpu() ? or_bad_alloc(copy) : copy();
}

void check_memory(const char* name, const Tensor& tensor, const Device& device) {
  check(tensor.device() == device || (device.is_cpu() && tensor.is_cpu()), name, " must be on ",
        DeviceName{device}, " like query, got ", DeviceName{tensor.device()});
  // A storage can be resized under its tensors (Storage.resize_, FSDP frees parameters so).
  int64_t storage_bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &storage_bytes));
  int64_t last = tensor.storage_offset();
  bool overflow = false;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) == 0) return;
    int64_t reach = 0;
    overflow |= __builtin_mul_overflow(tensor.size(d) - 1, tensor.stride(d), &reach);
    overflow |= __builtin_add_overflow(last, reach, &last);
  }
  const int64_t available = storage_bytes / static_cast<int64_t>(tensor.element_size());
  check(!overflow && last < available, name, " must have its elements inside its storage of ",
        storage_bytes, " bytes, got one at index ", last);
}

bool Operand::is_dense() const {
  return (rows <= 1 || stride_n == columns) && (heads <= 1 || stride_h == rows * columns) &&
         (batch <= 1 || stride_b == heads * rows * columns);
}

FloatOperand read_float(const char* name, const Tensor& tensor, const Device& device) {
  check_rank(name, tensor);
  const std::optional<Dtype> dtype = float_dtype(dtype_of(tensor));
  check(dtype.has_value(), name, " must have dtype float32 or bfloat16 or float16, got ",
        DtypeName{dtype_of(tensor)});
  check_memory(name, tensor, device);
  return {read_rows(name, tensor), *dtype};
}

Operand read_codes(const char* name, const Tensor& tensor, ScalarType dtype) {
  check_rank(name, tensor);
  const int32_t wanted =
      dtype == ScalarType::Char ? aoti_torch_dtype_int8() : aoti_torch_dtype_bfloat16();
  check(dtype_of(tensor) == wanted, name, " must have dtype ", DtypeName{wanted}, ", got ",
        DtypeName{dtype_of(tensor)});
  check_memory(name, tensor);
  return read_rows(name, tensor);
}

Tensor read_exact(const char* name, const Tensor& tensor, int32_t dtype,
                  const std::vector<int64_t>& sizes, const Device& device) {
  check_defined(name, tensor);
  const auto got = tensor.sizes();
  check(std::equal(sizes.begin(), sizes.end(), got.begin(), got.end()), name, " must have shape ",
        Shape{sizes}, ", got ", Shape{got});
  check(dtype_of(tensor) == dtype, name, " must have dtype ", DtypeName{dtype}, ", got ",
        DtypeName{dtype_of(tensor)});
  check_memory(name, tensor, device);
  return make_contiguous(tensor);
}

Tensor read_fp32(const char* name, const Tensor& tensor, const std::array<int64_t, 3>& sizes) {
  return read_exact(name, tensor, aoti_torch_dtype_float32(), {sizes.begin(), sizes.end()}, kCpu);
}

Tensor read_table(const std::string& name, const Tensor& tensor, const FloatOperand& x,
                  bool is_fp32, const std::vector<std::vector<int64_t>>& sizes) {
  check_defined(name.c_str(), tensor);
  const int32_t dtype = is_fp32 ? aoti_torch_dtype_float32() : dtype_of(x.tensor);
  check(dtype_of(tensor) == dtype, name, " must have dtype ", DtypeName{dtype}, ", got ",
        DtypeName{dtype_of(tensor)});
  const auto got = tensor.sizes();
  const auto is_allowed = [](const std::vector<int64_t>& allowed, int64_t size) {
    return std::find(allowed.begin(), allowed.end(), size) != allowed.end();
  };
  if (!std::equal(sizes.begin(), sizes.end(), got.begin(), got.end(), is_allowed)) {
    std::ostringstream expected;
    for (const auto& allowed : sizes) {
      for (const int64_t& size : allowed)
        expected << (&size == allowed.data() ? "" : " or ") << size;
      expected << (&allowed == &sizes.back() ? "" : ", ");
    }
    fail(name, " must have shape [", expected.str(), "], got ", Shape{got});
  }
  check_memory(name.c_str(), tensor, x.tensor.device());
  return tensor;
}

Mask read_mask(const Tensor& tensor, int64_t batch, int64_t heads, int64_t seqlen_q,
               int64_t seqlen_k, const Device& device) {
  const int32_t dtype = dtype_of(tensor);
  Mask mask{tensor, MaskKind::kBool, {0, 0, 0, 0}};
  if (dtype != aoti_torch_dtype_bool()) {
    const std::optional<Dtype> number = float_dtype(dtype);
    check(number.has_value(),
          "attn_mask must have dtype bool or float32 or bfloat16 or float16, got ",
          DtypeName{dtype});
    mask.kind = *number == Dtype::kFloat32    ? MaskKind::kFloat32
                : *number == Dtype::kBFloat16 ? MaskKind::kBFloat16
                                              : MaskKind::kFloat16;
  }
  check_memory("attn_mask", tensor, device);
  const std::array<int64_t, 4> scores = {batch, heads, seqlen_q, seqlen_k};
  const int64_t missing = 4 - tensor.dim();
  bool broadcasts = missing >= 0;
  for (int64_t d = 0; broadcasts && d < tensor.dim(); ++d) {
    const int64_t size = tensor.size(d);
    broadcasts = size == 1 || size == scores[missing + d];
    mask.strides[missing + d] = size == 1 ? 0 : tensor.stride(d);
  }
  check(broadcasts, "attn_mask must broadcast to ", Shape{scores}, ", got ", Shape{tensor.sizes()});
  return mask;
}

size_t byte_count(std::initializer_list<int64_t> sizes, int64_t element_bytes) {
  int64_t bytes = element_bytes;
  bool overflow = false;
  for (const int64_t size : sizes) {
    if (size == 0) return 0;
    overflow |= __builtin_mul_overflow(bytes, size, &bytes);
  }
  if (overflow) throw std::bad_alloc();
  return static_cast<size_t>(bytes);
}

}  // namespace torch_sage
