// The whole op by the mma.sync kernels: for GPUs from compute capability 8.0 on.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

#include "attention/mma/params.h"
#include "attention/packed_request.h"
#include "attention/request.h"
#include "common/check.h"
#include "cuda/device.h"
#include "cuda/host.h"
#include "cuda/ops.h"

namespace torch_sage::cuda {
namespace {

using mma::Granularity;
using mma::Pv;
using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMaxWidth = 256;

constexpr Names<bool, 2> kInt4 = {{{"int8", false}, {"int4", true}}};
constexpr Names<Granularity, 4> kGroups = {{{"thread", Granularity::kThread},
                                            {"warp", Granularity::kWarp},
                                            {"block", Granularity::kBlock},
                                            {"tensor", Granularity::kTensor}}};
constexpr Names<Pv, 5> kPv = {{{"bf16", Pv::kBf16},
                               {"fp16", Pv::kFp16},
                               {"fp16_fp16", Pv::kFp16Fp16},
                               {"e4m3", Pv::kE4m3},
                               {"e4m3_fp16", Pv::kE4m3Fp16}}};
constexpr Names<bool, 1> kExact = {{{"exact", true}}};

struct MmaRecipe {
  bool is_int4;
  Granularity granularity;
  Pv pv;
  Smooth smooth;
};

MmaRecipe read_recipe(const Text& qk, const Text& granularity, const Text& pv, const Text& smooth) {
  return {parse("qk", qk, kInt4, "cuda"), parse("granularity", granularity, kGroups, "cuda"),
          parse("pv", pv, kPv, "cuda"), parse("smooth", smooth, kSmoothing, "cuda")};
}

int64_t width_of(int64_t head_dim, int64_t head_dim_v) {
  const int64_t larger = std::max(head_dim, head_dim_v);
  check(larger <= kMaxWidth, "query and value must have a head_dim of at most ", kMaxWidth,
        " in this recipe, got ", larger);
  return larger <= 64 ? 64 : larger <= 128 ? 128 : 256;
}

// Of one batch entry, which may be packed sequences, the stride is 0: their number is no batch's.
Rows rows_of(const FloatOperand& x) {
  return {x.batch > 1 ? x.stride_b : 0, x.stride_h, x.stride_n};
}

// K and V, what the pre-pass is asked to make of them, and the memory that it needs.
struct KeysAndValues {
  MmaRecipe recipe;
  int64_t seqlen, head_dim, head_dim_v;
  FloatOperand key, value;  // as vector loads read them
  mma::PrepareParams params{};

  KeysAndValues(const MmaRecipe& recipe, const FloatOperand& k, const FloatOperand& v,
                const Packed& packed = {})
      : recipe(recipe),
        seqlen(k.rows),
        head_dim(k.columns),
        head_dim_v(v.columns),
        key(vectorized(k)),
        value(vectorized(v)) {
    check_rows("key", seqlen);
    params.batch = static_cast<int>(key.batch);
    params.heads = static_cast<int>(key.heads);
    params.head_dim = static_cast<int>(key.columns);
    params.head_dim_v = static_cast<int>(value.columns);
    params.key_mean_columns = static_cast<int>(head_dim);
    params.key = key.data;
    params.value = value.data;
    params.dtype = key.dtype;
    params.key_rows = rows_of(key);
    params.value_rows = rows_of(value);
    params.granularity = recipe.granularity;
    params.pv = recipe.pv;
    params.kv.seqlen = static_cast<int>(seqlen);
    params.kv.packed = packed;
    params.kv.tiles = packed.starts != nullptr ? packed.units(mma::kKeys)
                                               : (seqlen + mma::kKeys - 1) / mma::kKeys;
    params.kv.width = static_cast<int>(width_of(head_dim, head_dim_v));
    params.kv.is_int4 = recipe.is_int4;
  }

  int64_t heads() const { return key.batch * key.heads; }
  // Of packed sequences each has statistics of its own.
  int64_t sequences() const {
    return params.kv.packed.starts != nullptr ? params.kv.packed.count : key.batch;
  }
  int64_t padded() const { return params.kv.tiles * mma::kKeys; }
  int64_t key_bytes() const { return heads() * padded() * params.kv.row_bytes(); }
  int64_t value_bytes() const {
    return heads() * params.kv.width * (is_e4m3(recipe.pv) ? padded() : 2 * seqlen);
  }
  int64_t channels() const { return sequences() * key.heads * params.kv.width; }

  // Whether attention reads V where it lies.
  bool takes_value_as_it_is() const {
    return !is_e4m3(recipe.pv) && !recipe.smooth.value &&
           key.dtype == (recipe.pv == Pv::kBf16 ? Dtype::kBFloat16 : Dtype::kFloat16);
  }
};

// Takes pieces of one allocation, aligned as cudaMalloc aligns.
class Arena {
 public:
  explicit Arena(uintptr_t memory) : at_(memory) {}
  template <typename T>
  T* take(bool is_needed, int64_t bytes) {
    if (!is_needed) return nullptr;
    return reinterpret_cast<T*>(std::exchange(at_, at_ + (bytes + 255) / 256 * 256));
  }
  uintptr_t at() const { return at_; }

 private:
  uintptr_t at_;
};

// All that only the kernels of one call share; returns the address of the query's amax.
uint32_t* place(KeysAndValues& kv, int64_t heads_q, Arena& arena) {
  auto& view = kv.params.kv;
  const bool has_value = !kv.takes_value_as_it_is();
  view.key_codes = arena.take<uint8_t>(true, kv.key_bytes());
  view.key_scales = arena.take<float>(true, kv.heads() * view.tiles * 4 * 4);
  view.key_mean =
      arena.take<float>(kv.recipe.smooth.key, kv.sequences() * kv.key.heads * kv.head_dim * 4);
  view.value_codes = arena.take<uint8_t>(has_value, kv.value_bytes());
  view.value_scales = arena.take<float>(has_value, kv.channels() * 4);
  view.value_mean = arena.take<float>(kv.recipe.smooth.value, kv.channels() * 4);
  kv.params.partials = arena.take<float>(true, mma::partial_floats(kv.params) * 4);
  return arena.take<uint32_t>(kv.recipe.granularity == Granularity::kTensor,
                              kv.sequences() * heads_q * 4);
}

void set_value(mma::AttentionParams& params, const KeysAndValues& kv) {
  if (is_e4m3(params.pv)) return;
  if (kv.takes_value_as_it_is()) {
    params.value = reinterpret_cast<const uint16_t*>(kv.value.data);
    params.value_rows = rows_of(kv.value);
    params.value_columns = static_cast<int>(kv.value.columns);
  } else {
    const int64_t width = params.kv.width, per_head = kv.seqlen * width;
    params.value = static_cast<const uint16_t*>(params.kv.value_codes);
    params.value_rows = {kv.key.batch > 1 ? kv.key.heads * per_head : 0, per_head, width};
    params.value_columns = params.kv.width;
  }
}

// Fills `result`, whose output has its rows at `output_rows`.
void attend(const FloatOperand& query, KeysAndValues& kv, const Request& request,
            const Packed& queries, const Result& result, const Rows& output_rows,
            cudaStream_t stream) {
  const FloatOperand q = vectorized(query);
  // Sizes depend on what is there, so the first time at addresses that nobody reads.
  constexpr uintptr_t kNowhere = 256;
  Arena sizes(kNowhere);
  place(kv, q.heads, sizes);
  const auto bytes = static_cast<int64_t>(sizes.at() - kNowhere);
  const Tensor workspace = new_tensor({bytes}, ScalarType::Byte, query.tensor.device());
  Arena arena(reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr()));
  uint32_t* query_amax = place(kv, q.heads, arena);
  mma::launch_prepare_kv(kv.params, stream);
  if (query_amax != nullptr) {
    const mma::QueryAmaxParams amax{static_cast<int>(q.batch),
                                    static_cast<int>(q.heads),
                                    static_cast<int>(q.rows),
                                    static_cast<int>(q.columns),
                                    queries,
                                    q.data,
                                    q.dtype,
                                    rows_of(q),
                                    kv.recipe.smooth.query,
                                    query_amax};
    mma::launch_query_amax(amax, stream);
  }
  mma::AttentionParams params{};
  params.batch = static_cast<int>(q.batch);
  params.heads_q = static_cast<int>(q.heads);
  params.heads_kv = static_cast<int>(kv.key.heads);
  params.seqlen_q = static_cast<int>(q.rows);
  params.head_dim = static_cast<int>(q.columns);
  params.head_dim_v = static_cast<int>(kv.head_dim_v);
  params.queries = queries;
  params.query = q.data;
  params.dtype = q.dtype;
  params.query_rows = rows_of(q);
  params.granularity = kv.recipe.granularity;
  params.query_amax = query_amax;
  params.kv = kv.params.kv;
  params.key_mean_columns = static_cast<int>(kv.head_dim);
  params.pv = kv.recipe.pv;
  set_value(params, kv);
  if (kv.recipe.smooth.query) {
    params.key = kv.key.data;
    params.key_rows = rows_of(kv.key);
    params.key_columns = static_cast<int>(kv.key.columns);
  }
  params.last_key_offset = last_key_offset(request.causal, q.rows, kv.seqlen);
  params.causal = request.causal;
  params.scale = static_cast<float>(softmax_scale(query, request));
  std::optional<Mask> mask;
  if (request.attn_mask.has_value()) {
    mask =
        read_mask(*request.attn_mask, q.batch, q.heads, q.rows, kv.seqlen, query.tensor.device());
    set_mask(params, *mask);
  }
  params.output = result.output.mutable_data_ptr();
  params.output_rows = output_rows;
  params.lse = result.lse ? static_cast<float*>(result.lse->mutable_data_ptr()) : nullptr;
  mma::launch_attention(params, stream);
}

void check_has_code(const char* name, Pv pv, int device) {
  const char* family = is_e4m3(pv) ? "sm89" : "sm80";
  check(has_code(family, device), name, " must be on a GPU for which the library has kernels of ",
        family, " for this pv, got another GPU");
}

Result attend_whole(const Tensor& query, const Tensor& key, const Tensor& value,
                    const Request& request, const MmaRecipe& recipe, const Text& exponential) {
  parse("exponential", exponential, kExact, "cuda");
  const int device = device_index("query", query);
  check_has_code("query", recipe.pv, device);
  const DeviceGuard guard(device);
  const auto [q, k, v] = read_operands(query, key, value, query.device());
  KeysAndValues kv(recipe, k, v);
  const auto [result, is_done] = new_result(q, kv.seqlen, kv.head_dim_v, request);
  const Tensor& output = result.output;
  if (!is_done)
    attend(q, kv, request, {}, result, {output.stride(0), output.stride(1), output.stride(2)},
           current_stream(device));
  return result;
}

Result attend_packed(const Tensor& query, const Tensor& key, const Tensor& value,
                     const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                     int64_t max_seqlen_k, const Request& request, const MmaRecipe& recipe,
                     const Text& exponential) {
  parse("exponential", exponential, kExact, "cuda");
  const int device = device_index("query", query);
  check_has_code("query", recipe.pv, device);
  const DeviceGuard guard(device);
  const PackedOperands operands =
      read_packed(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  KeysAndValues kv(recipe, operands.key, operands.value, operands.keys);
  const Result result = new_packed_result(operands, request.wants_lse);
  fill_unattended(result);
  if (!operands.is_empty() && kv.seqlen > 0)
    attend(operands.query, kv, request, operands.queries, result,
           {0, result.output.stride(1), result.output.stride(0)}, current_stream(device));
  return result;
}

}  // namespace

Tensor mma_sdpa(const Tensor& query, const Tensor& key, const Tensor& value,
                const std::optional<Tensor>& attn_mask, const Text& causal,
                std::optional<double> scale, const Text& qk, const Text& granularity,
                const Text& pv, const Text& smooth, const Text& exponential,
                const Text& output_order) {
  return attend_whole(query, key, value,
                      read_request(attn_mask, causal, scale, output_order, false),
                      read_recipe(qk, granularity, pv, smooth), exponential)
      .output;
}

std::tuple<Tensor, Tensor> mma_sdpa_with_lse(const Tensor& query, const Tensor& key,
                                             const Tensor& value,
                                             const std::optional<Tensor>& attn_mask,
                                             const Text& causal, std::optional<double> scale,
                                             const Text& qk, const Text& granularity,
                                             const Text& pv, const Text& smooth,
                                             const Text& exponential, const Text& output_order) {
  const Result result =
      attend_whole(query, key, value, read_request(attn_mask, causal, scale, output_order, true),
                   read_recipe(qk, granularity, pv, smooth), exponential);
  return {result.output, *result.lse};
}

Tensor mma_varlen_sdpa(const Tensor& query, const Tensor& key, const Tensor& value,
                       const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                       int64_t max_seqlen_k, const Text& causal, std::optional<double> scale,
                       const Text& qk, const Text& granularity, const Text& pv, const Text& smooth,
                       const Text& exponential) {
  return attend_packed(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                       read_request(causal, scale, false), read_recipe(qk, granularity, pv, smooth),
                       exponential)
      .output;
}

std::tuple<Tensor, Tensor> mma_varlen_sdpa_with_lse(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, const Text& causal,
    std::optional<double> scale, const Text& qk, const Text& granularity, const Text& pv,
    const Text& smooth, const Text& exponential) {
  const Result result = attend_packed(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                                      max_seqlen_k, read_request(causal, scale, true),
                                      read_recipe(qk, granularity, pv, smooth), exponential);
  return {result.output, *result.lse};
}

Prepared mma_prepare_kv(const Tensor& key, const Tensor& value, const Text& qk,
                        const Text& granularity, const Text& pv, const Text& smooth) {
  const int device = device_index("key", key);
  const DeviceGuard guard(device);
  // Key stands in for a query: what key and value must have in common is checked.
  const auto [q, k, v] = read_operands(key, key, value, key.device());
  KeysAndValues kv(read_recipe(qk, granularity, pv, smooth), k, v);
  check_has_code("key", kv.recipe.pv, device);
  auto& view = kv.params.kv;
  const int64_t width = view.width;
  const auto make = [&](std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return new_tensor(sizes, dtype, key.device());
  };
  const Prepared tensors{make({k.batch, k.heads, kv.padded(), view.row_bytes()}, ScalarType::Byte),
                         make({k.batch, k.heads, view.tiles, 4}, ScalarType::Float),
                         make({k.batch, k.heads, k.columns}, ScalarType::Float),
                         is_e4m3(kv.recipe.pv)
                             ? make({k.batch, k.heads, width, kv.padded()}, ScalarType::Byte)
                             : make({k.batch, k.heads, k.rows, width}, ScalarType::Short),
                         make({k.batch, k.heads, width}, ScalarType::Float),
                         make({k.batch, k.heads, width}, ScalarType::Float)};
  const auto& [key_codes, key_scales, key_mean, value_codes, value_scales, value_mean] = tensors;
  view.key_codes = static_cast<uint8_t*>(key_codes.mutable_data_ptr());
  view.key_scales = static_cast<float*>(key_scales.mutable_data_ptr());
  view.value_codes = value_codes.mutable_data_ptr();
  view.value_scales = static_cast<float*>(value_scales.mutable_data_ptr());
  const auto mean_of = [](bool is_smoothed, const Tensor& mean) -> float* {
    if (is_smoothed) return static_cast<float*>(mean.mutable_data_ptr());
    Tensor zeroed = mean;
    torch::stable::zero_(zeroed);
    return nullptr;
  };
  view.key_mean = mean_of(kv.recipe.smooth.key, key_mean);
  view.value_mean = mean_of(kv.recipe.smooth.value, value_mean);
  if (kv.heads() == 0 || kv.seqlen == 0) return tensors;
  const Tensor partials =
      make({std::max<int64_t>(mma::partial_floats(kv.params), 1)}, ScalarType::Float);
  kv.params.partials = static_cast<float*>(partials.mutable_data_ptr());
  mma::launch_prepare_kv(kv.params, current_stream(device));
  return tensors;
}

}  // namespace torch_sage::cuda
