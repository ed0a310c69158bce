#include "cuda/ops.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <utility>

#include "attention/packed_request.h"
#include "attention/request.h"
#include "attention/sm90/params.h"
#include "common/check.h"
#include "cuda/device.h"
#include "cuda/host.h"
#include "cuda/rotary.h"
#include "quantize/cuda/prepared.h"

namespace torch_sage::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMaxWidth = 256;
constexpr Names<bool, 2> kExact = {{{"exact", true}, {"mixed", false}}};

// Channels of the codes of K and V: one instantiation of the kernels each.
int64_t width_of(int64_t head_dim, int64_t head_dim_v) {
  const int64_t larger = std::max(head_dim, head_dim_v);
  check(larger <= kMaxWidth, "query and value must have a head_dim of at most ", kMaxWidth,
        " in this recipe, got ", larger);
  return larger <= 64 ? 64 : larger <= 128 ? 128 : kMaxWidth;
}

// K and V in the kernels' layout, pointing into tensors that somebody keeps.
struct KeysAndValues {
  int64_t heads, head_dim, head_dim_v;
  PreparedKv view;

  KeysAndValues(int64_t heads, int64_t seqlen, int64_t head_dim, int64_t head_dim_v,
                const Packed& packed = {})
      : heads(heads), head_dim(head_dim), head_dim_v(head_dim_v), view{} {
    view.seqlen = static_cast<int>(seqlen);
    view.width = static_cast<int>(width_of(head_dim, head_dim_v));
    view.packed = packed;
    const auto units = [&](int size) {
      return packed.starts != nullptr ? packed.units(size) : (seqlen + size - 1) / size;
    };
    view.tiles = units(kKeyBlock128) * (kKeyBlock128 / kKeyTile);
    view.groups = units(kValueGroup);
  }

  // Sizes of the six tensors behind [batch, heads].
  std::array<int64_t, 2> codes() const { return {view.tiles, kKeyTile * view.width}; }
  std::array<int64_t, 2> key_scales() const { return {view.tiles / 2, 4}; }
  std::array<int64_t, 2> value_scales() const { return {view.groups, view.width}; }
};

// What a query and key lack of RMSNorm and rotary embeddings, if anything: prepare then makes codes
// of the query, too.
struct Unrotated {
  Rotary key;
  QueryParams query;
};

struct HopperRecipe {
  Smooth smooth;
  bool is_exact;
};

Smooth read_smooth(const Text& text) {
  const Smooth smooth = parse("smooth", text, kSmoothing, "cuda");
  check(!smooth.query, "smooth must be one of ['', 'k', 'v', 'kv'] in this recipe, got one with q");
  return smooth;
}

HopperRecipe read_recipe(const Text& qk, const Text& granularity, const Text& smooth,
                         const Text& exponential) {
  check(std::string_view(qk) == "int8", "qk must be one of ['int8'] in this recipe, got '",
        std::string_view(qk), "'");
  check(std::string_view(granularity) == "token_thread",
        "granularity must be one of ['token_thread'] in this recipe, got '",
        std::string_view(granularity), "'");
  return {read_smooth(smooth), parse("exponential", exponential, kExact, "cuda")};
}

int64_t count(const std::array<int64_t, 2>& sizes) { return sizes[0] * sizes[1]; }

void prepare(const FloatOperand& key, const FloatOperand& value, Smooth smooth,
             const KeysAndValues& kv, const Unrotated& unrotated, const PackedOutput& output,
             int* work_counter, cudaStream_t stream) {
  if (key.batch == 0 || key.heads == 0 || key.rows == 0) return;
  const FloatOperand k = vectorized(key), v = vectorized(value);
  PrepareParams params{};
  params.batch = static_cast<int>(k.batch);
  params.heads = static_cast<int>(k.heads);
  params.head_dim = static_cast<int>(k.columns);
  params.head_dim_v = static_cast<int>(v.columns);
  params.key_mean_columns = static_cast<int>(key.columns);
  params.key = k.data;
  params.value = v.data;
  params.dtype = k.dtype;
  params.key_stride_b = k.stride_b;
  params.key_stride_h = k.stride_h;
  params.key_stride_n = k.stride_n;
  params.value_stride_b = v.stride_b;
  params.value_stride_h = v.stride_h;
  params.value_stride_n = v.stride_n;
  params.key_rotary = unrotated.key;
  params.query = unrotated.query;
  params.smooth_key = smooth.key;
  params.smooth_value = smooth.value;
  params.kv = kv.view;
  params.packed_output = output;
  params.work_counter = work_counter;
  launch_prepare_kv(params, stream);
}

// Whether a thread may read the elements of a row 16 bytes at a time. torch_sage/ops/dispatch.py
// (_is_ragged) guesses this from the hints of sizes, before there is an address, to judge speed.
bool is_dense(const Mask& mask) {
  const int64_t bytes = mask.kind == MaskKind::kBool ? 1 : mask.kind == MaskKind::kFloat32 ? 4 : 2;
  const auto is_aligned = [=](int64_t elements) { return elements * bytes % 16 == 0; };
  return mask.strides[3] == 1 && std::all_of(mask.strides, mask.strides + 3, is_aligned) &&
         reinterpret_cast<uintptr_t>(mask.tensor.const_data_ptr()) % 16 == 0;
}

// What the attention kernel is told beyond operands and semantics.
struct Launch {
  bool is_exact, is_part;
  int* work_counter;
  bool follows_prepare;
  int device;
  cudaStream_t stream;
};

// Where results go: the rows of the output lie at `rows`.
struct Target {
  Result result;
  Rows rows;

  // Of the ops over batches.
  explicit Target(const Result& result)
      : result(result),
        rows{result.output.stride(0), result.output.stride(1), result.output.stride(2)} {}
  // Of packed sequences, which are one batch entry.
  static Target packed(const Result& result) {
    Target target(result);
    target.rows = {0, result.output.stride(1), result.output.stride(0)};
    return target;
  }
};

// Lets query heads that share keys, and see the same of them, be rows of one head, one behind the
// other: their keys are read once. Returns the tensor that they are in now.
Tensor pack_heads(const FloatOperand& q, sm90::AttentionParams& p) {
  const int group = p.heads_q / p.heads_kv, rows = p.seqlen_q;
  const auto are_rows = [=](int64_t stride_h, int64_t stride_n) {
    return rows == 1 || stride_h == rows * stride_n;
  };
  const bool see_the_same = p.causal == Causal::kNone || rows == 1;
  if (group == 1 || !see_the_same || !are_rows(p.mask_stride_h, p.mask_stride_n)) return q.tensor;
  Tensor tensor = q.tensor;
  if (!are_rows(q.stride_h, q.stride_n)) {
    tensor = make_contiguous(tensor);
    p.query = tensor.const_data_ptr();
    p.query_rows = {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  }
  const auto pack = [=](int64_t& stride_h, int64_t& stride_n) {
    if (rows == 1) stride_n = stride_h;
    stride_h *= group;
  };
  pack(p.query_rows.stride_h, p.query_rows.stride_n);
  pack(p.mask_stride_h, p.mask_stride_n);
  p.heads_q = p.heads_kv;
  p.seqlen_q = rows * group;
  return tensor;
}

// Keys that the last row may see, which sees the most.
int64_t visible_keys(const sm90::AttentionParams& p) {
  return std::min<int64_t>(p.kv.seqlen, int64_t{p.seqlen_q} + p.last_key_offset);
}

// Splits the keys. Returns the memory of the parts' results.
Tensor split_keys(sm90::AttentionParams& p, const Device& device) {
  p.parts = sm90::split(visible_keys(p), p.seqlen_q);
  const int64_t rows = int64_t{p.batch} * p.heads_q * p.parts.count * p.seqlen_q;
  Tensor results = new_tensor({rows * (p.kv.width + 4)}, ScalarType::Float, device);
  p.parts.outputs = static_cast<float*>(results.mutable_data_ptr());
  p.parts.sums = reinterpret_cast<float4*>(p.parts.outputs + rows * p.kv.width);
  return results;
}

// Fills the target.
void attend(const FloatOperand& query, const PreparedQuery& prepared_query, const Packed& queries,
            const KeysAndValues& kv, const Request& request, const Target& target,
            const Launch& launch) {
  const FloatOperand q = vectorized(query);
  sm90::AttentionParams params{};
  params.batch = static_cast<int>(q.batch);
  params.heads_q = static_cast<int>(q.heads);
  params.heads_kv = static_cast<int>(kv.heads);
  params.seqlen_q = static_cast<int>(q.rows);
  params.head_dim = static_cast<int>(q.columns);
  params.head_dim_v = static_cast<int>(kv.head_dim_v);
  params.queries = queries;
  params.key_mean_columns = static_cast<int>(kv.head_dim);
  params.query = q.data;
  params.dtype = q.dtype;
  params.query_rows = {q.stride_b, q.stride_h, q.stride_n};
  params.prepared_query = prepared_query;
  params.kv = kv.view;
  params.causal = request.causal;
  params.last_key_offset = last_key_offset(request.causal, q.rows, kv.view.seqlen);
  params.scale = static_cast<float>(softmax_scale(query, request));
  std::optional<Mask> mask;
  if (request.attn_mask.has_value()) {
    mask = read_mask(*request.attn_mask, q.batch, q.heads, q.rows, kv.view.seqlen,
                     query.tensor.device());
    set_mask(params, *mask);
    params.mask_is_dense = is_dense(*mask);
  }
  const auto& [output, lse] = target.result;
  params.output = output.mutable_data_ptr();
  params.output_rows = target.rows;
  params.lse = lse ? static_cast<float*>(lse->mutable_data_ptr()) : nullptr;
  params.exact_exponential = launch.is_exact;
  params.is_part = launch.is_part;
  params.work_counter = launch.work_counter;
  params.follows_prepare = launch.follows_prepare;
  std::optional<Tensor> packed, parts, counter;
  // Where K and V have just been prepared, that took most of the time, and a packed sequence has
  // the bits of a call with it alone.
  if (!launch.follows_prepare) {
    if (q.rows <= sm90::kFewRows && visible_keys(params) > kValueGroup) {
      const int tokens = params.seqlen_q;
      packed = pack_heads(q, params);
      parts = split_keys(params, query.tensor.device());
      params.parts.tokens = tokens;
    } else if (request.causal != Causal::kNone || request.wants_lse) {
      // Work is handed out one by one where it differs, and in rings, whose copies keep some
      // multiprocessors busy; zero is zero in any dtype.
      counter = torch::stable::new_zeros(query.tensor, {4});
      params.work_counter = static_cast<int*>(counter->mutable_data_ptr());
    }
  }
  sm90::launch_attention(params, multiprocessors(launch.device), launch.stream);
}

// The whole op: fills the target.
void run(const Operands& operands, const Packed& queries, const Packed& keys, Unrotated unrotated,
         const Request& request, const HopperRecipe& recipe, const Target& target) {
  const auto& [q, k, v] = operands;
  const int device = q.tensor.device().index();
  const cudaStream_t stream = current_stream(device);
  KeysAndValues kv(k.heads, k.rows, k.columns, v.columns, keys);
  const bool is_packed = keys.starts != nullptr;
  // One allocation for all that only the two kernels share.
  const int64_t per_batch = k.batch * k.heads;
  const int64_t means = is_packed ? keys.count * k.heads : per_batch;
  const auto aligned = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  const int64_t codes = aligned(per_batch * count(kv.codes()));
  const int64_t key_scales = aligned(per_batch * count(kv.key_scales()) * 4);
  const int64_t key_mean = aligned(means * k.columns * 4);
  const int64_t value_scales = aligned(per_batch * count(kv.value_scales()) * 4);
  PreparedQuery prepared{};
  const bool rotates = unrotated.key.pairing != Pairing::kNone;
  if (rotates) prepared.rows = (q.rows + kQueryBlock - 1) / kQueryBlock * kQueryBlock;
  const int64_t query_codes = aligned(q.batch * q.heads * prepared.rows * kv.view.width);
  const int64_t query_scales = aligned(q.batch * q.heads * prepared.rows * 4);
  const Tensor workspace = new_tensor(
      {2 * codes + key_scales + key_mean + 2 * value_scales + query_codes + query_scales + 256},
      ScalarType::Byte, q.tensor.device());
  auto* at = static_cast<std::byte*>(workspace.mutable_data_ptr());
  const auto take = [&](int64_t bytes) { return std::exchange(at, at + bytes); };
  kv.view.key_codes = reinterpret_cast<int8_t*>(take(codes));
  kv.view.value_codes = reinterpret_cast<uint8_t*>(take(codes));
  kv.view.key_scales = reinterpret_cast<float*>(take(key_scales));
  kv.view.key_mean = reinterpret_cast<float*>(take(key_mean));
  kv.view.value_scales = reinterpret_cast<float*>(take(value_scales));
  kv.view.value_shift = reinterpret_cast<float*>(take(value_scales));
  // Zeroed by the pre-pass, counted up by the attention kernel.
  int* work_counter =
      request.causal == Causal::kNone && !is_packed ? nullptr : reinterpret_cast<int*>(take(256));
  const FloatOperand readable = rotates ? vectorized(q) : q;  // may be a copy: kept to the end
  if (rotates) {
    prepared.codes = reinterpret_cast<int8_t*>(take(query_codes));
    prepared.scales = reinterpret_cast<float*>(take(query_scales));
    unrotated.query = {static_cast<int>(q.heads),
                       static_cast<int>(q.rows),
                       readable.data,
                       {readable.stride_b, readable.stride_h, readable.stride_n},
                       unrotated.query.rotary,
                       static_cast<float>(softmax_scale(q, request)),
                       prepared};
  }
  const auto& [output, lse] = target.result;
  const PackedOutput packed_output{queries, static_cast<int>(q.heads),
                                   static_cast<int>(q.heads * v.columns), output.mutable_data_ptr(),
                                   lse ? static_cast<float*>(lse->mutable_data_ptr()) : nullptr};
  prepare(k, v, recipe.smooth, kv, unrotated, packed_output, work_counter, stream);
  attend(q, prepared, queries, kv, request, target,
         {recipe.is_exact, false, work_counter, true, device, stream});
}

Result attend_whole(const Operands& operands, const Unrotated& unrotated, const Request& request,
                    const HopperRecipe& recipe) {
  const auto& [q, k, v] = operands;
  check_rows("key", k.rows);
  const auto [result, is_done] = new_result(q, k.rows, v.columns, request);
  if (!is_done) run(operands, {}, {}, unrotated, request, recipe, Target(result));
  return result;
}

Result attend_packed(const Tensor& query, const Tensor& key, const Tensor& value,
                     const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                     int64_t max_seqlen_k, const Request& request, const HopperRecipe& recipe) {
  const DeviceGuard guard(hopper_index("query", query));
  const PackedOperands packed =
      read_packed(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k);
  const Result result = new_packed_result(packed, request.wants_lse);
  if (packed.is_empty() || packed.keys.longest == 0) {
    fill_unattended(result);
  } else {
    run({packed.query, packed.key, packed.value}, packed.queries, packed.keys, {}, request, recipe,
        Target::packed(result));
  }
  return result;
}

// The addresses of prepared tensors, whose shapes are right.
void point_to(const Prepared& tensors, PreparedKv& view) {
  const auto& [key_codes, key_scales, key_mean, value_codes, value_scales, value_shift] = tensors;
  view.key_codes = static_cast<int8_t*>(key_codes.mutable_data_ptr());
  view.key_scales = static_cast<float*>(key_scales.mutable_data_ptr());
  view.key_mean = static_cast<float*>(key_mean.mutable_data_ptr());
  view.value_codes = static_cast<uint8_t*>(value_codes.mutable_data_ptr());
  view.value_scales = static_cast<float*>(value_scales.mutable_data_ptr());
  view.value_shift = static_cast<float*>(value_shift.mutable_data_ptr());
}

Result attend_prepared(const Tensor& query, const Prepared& tensors, int64_t seqlen_k,
                       int64_t head_dim_v, const Request& request, const Text& exponential,
                       bool is_part) {
  const bool exact = parse("exponential", exponential, kExact, "cuda");
  const int index = hopper_index("query", query);
  const DeviceGuard guard(index);
  const cudaStream_t stream = current_stream(index);
  const Device device = query.device();
  const FloatOperand q = read_float("query", query, device);
  check(seqlen_k >= 0, "seqlen_k must not be negative, got ", seqlen_k);
  check_rows("key_codes", seqlen_k);
  check(head_dim_v >= 1, "head_dim_v must be at least 1, got ", head_dim_v);
  const auto& [key_codes, key_scales, key_mean, value_codes, value_scales, value_shift] = tensors;
  check(key_codes.defined() && key_codes.dim() == 4,
        "key_codes must be 4-D [batch, heads, tiles, bytes], got another rank");
  const int64_t heads = key_codes.size(1);
  check_heads(q.heads, heads, "key_codes");
  KeysAndValues kv(heads, seqlen_k, q.columns, head_dim_v);
  const auto read = [&](const char* name, const Tensor& tensor, int32_t dtype,
                        const std::array<int64_t, 2>& sizes) {
    return read_exact(name, tensor, dtype, {q.batch, heads, sizes[0], sizes[1]}, device);
  };
  const int32_t fp32 = aoti_torch_dtype_float32();
  const Prepared checked{
      read("key_codes", key_codes, aoti_torch_dtype_int8(), kv.codes()),
      read("key_scales", key_scales, fp32, kv.key_scales()),
      read_exact("key_mean", key_mean, fp32, {q.batch, heads, q.columns}, device),
      read("value_codes", value_codes, aoti_torch_dtype_uint8(), kv.codes()),
      read("value_scales", value_scales, fp32, kv.value_scales()),
      read("value_shift", value_shift, fp32, kv.value_scales())};
  point_to(checked, kv.view);
  const auto [result, is_done] = new_result(q, seqlen_k, head_dim_v, request);
  if (!is_done)
    attend(q, {}, {}, kv, request, Target(result), {exact, is_part, nullptr, false, index, stream});
  return result;
}

}  // namespace

Tensor sdpa(const Tensor& query, const Tensor& key, const Tensor& value,
            const std::optional<Tensor>& attn_mask, const Text& causal, std::optional<double> scale,
            const Text& qk, const Text& granularity, const Text&, const Text& smooth,
            const Text& exponential, const Text& output_order) {
  const DeviceGuard guard(hopper_index("query", query));
  return attend_whole(read_operands(query, key, value, query.device()), {},
                      read_request(attn_mask, causal, scale, output_order, false),
                      read_recipe(qk, granularity, smooth, exponential))
      .output;
}

std::tuple<Tensor, Tensor> sdpa_with_lse(const Tensor& query, const Tensor& key,
                                         const Tensor& value,
                                         const std::optional<Tensor>& attn_mask, const Text& causal,
                                         std::optional<double> scale, const Text& qk,
                                         const Text& granularity, const Text&, const Text& smooth,
                                         const Text& exponential, const Text& output_order) {
  const DeviceGuard guard(hopper_index("query", query));
  const Result result = attend_whole(read_operands(query, key, value, query.device()), {},
                                     read_request(attn_mask, causal, scale, output_order, true),
                                     read_recipe(qk, granularity, smooth, exponential));
  return {result.output, *result.lse};
}

Tensor rotary_sdpa(const Tensor& query, const Tensor& key, const Tensor& value,
                   const Tensor& query_cos, const Tensor& query_sin,
                   const std::optional<Tensor>& query_rstd,
                   const std::optional<Tensor>& query_weight, std::optional<double> query_eps,
                   const Tensor& key_cos, const Tensor& key_sin,
                   const std::optional<Tensor>& key_rstd, const std::optional<Tensor>& key_weight,
                   std::optional<double> key_eps, const std::optional<Tensor>& attn_mask,
                   const Text& causal, std::optional<double> scale, const Text& pairing,
                   const Text& qk, const Text& granularity, const Text&, const Text& smooth,
                   const Text& exponential, const Text& output_order) {
  const DeviceGuard guard(hopper_index("query", query));
  const Operands operands = read_operands(query, key, value, query.device());
  const Rotation of_query = read_rotation("query", operands.query, query_cos, query_sin, query_rstd,
                                          query_weight, query_eps, pairing);
  const Rotation of_key =
      read_rotation("key", operands.key, key_cos, key_sin, key_rstd, key_weight, key_eps, pairing);
  check(operands.value.columns <= operands.key.columns,
        "value must have a head_dim of at most that of key, ", operands.key.columns, ", got ",
        operands.value.columns);
  Unrotated unrotated{of_key.view, {}};
  unrotated.query.rotary = of_query.view;
  return attend_whole(operands, unrotated,
                      read_request(attn_mask, causal, scale, output_order, false),
                      read_recipe(qk, granularity, smooth, exponential))
      .output;
}

Tensor varlen_sdpa(const Tensor& query, const Tensor& key, const Tensor& value,
                   const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                   int64_t max_seqlen_k, const Text& causal, std::optional<double> scale,
                   const Text& qk, const Text& granularity, const Text&, const Text& smooth,
                   const Text& exponential) {
  return attend_packed(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                       read_request(causal, scale, false),
                       read_recipe(qk, granularity, smooth, exponential))
      .output;
}

std::tuple<Tensor, Tensor> varlen_sdpa_with_lse(const Tensor& query, const Tensor& key,
                                                const Tensor& value, const Tensor& cu_seqlens_q,
                                                const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                                                int64_t max_seqlen_k, const Text& causal,
                                                std::optional<double> scale, const Text& qk,
                                                const Text& granularity, const Text&,
                                                const Text& smooth, const Text& exponential) {
  const Result result = attend_packed(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                                      max_seqlen_k, read_request(causal, scale, true),
                                      read_recipe(qk, granularity, smooth, exponential));
  return {result.output, *result.lse};
}

Prepared prepare_kv(const Tensor& key, const Tensor& value, const Text& smooth) {
  const Smooth smoothing = read_smooth(smooth);
  const int device = hopper_index("key", key);
  const DeviceGuard guard(device);
  // Key stands in for a query: what key and value must have in common is checked.
  const auto [q, k, v] = read_operands(key, key, value, key.device());
  check_rows("key", k.rows);
  KeysAndValues kv(k.heads, k.rows, k.columns, v.columns);
  const auto make = [&](const std::array<int64_t, 2>& sizes, ScalarType dtype) {
    return new_tensor({k.batch, k.heads, sizes[0], sizes[1]}, dtype, key.device());
  };
  const Prepared tensors{make(kv.codes(), ScalarType::Char),
                         make(kv.key_scales(), ScalarType::Float),
                         new_tensor({k.batch, k.heads, k.columns}, ScalarType::Float, key.device()),
                         make(kv.codes(), ScalarType::Byte),
                         make(kv.value_scales(), ScalarType::Float),
                         make(kv.value_scales(), ScalarType::Float)};
  point_to(tensors, kv.view);
  if (k.rows == 0) {
    Tensor mean = std::get<2>(tensors);
    torch::stable::zero_(mean);
  }
  prepare(k, v, smoothing, kv, {}, {}, nullptr, current_stream(device));
  return tensors;
}

Tensor attention_prepared(const Tensor& query, const Tensor& key_codes, const Tensor& key_scales,
                          const Tensor& key_mean, const Tensor& value_codes,
                          const Tensor& value_scales, const Tensor& value_shift, int64_t seqlen_k,
                          int64_t head_dim_v, const std::optional<Tensor>& attn_mask,
                          const Text& causal, std::optional<double> scale, const Text& exponential,
                          const Text& output_order) {
  return attend_prepared(
             query, {key_codes, key_scales, key_mean, value_codes, value_scales, value_shift},
             seqlen_k, head_dim_v, read_request(attn_mask, causal, scale, output_order, false),
             exponential, false)
      .output;
}

std::tuple<Tensor, Tensor> attention_prepared_with_lse(
    const Tensor& query, const Tensor& key_codes, const Tensor& key_scales, const Tensor& key_mean,
    const Tensor& value_codes, const Tensor& value_scales, const Tensor& value_shift,
    int64_t seqlen_k, int64_t head_dim_v, const std::optional<Tensor>& attn_mask,
    const Text& causal, std::optional<double> scale, const Text& exponential,
    const Text& output_order) {
  const Result result = attend_prepared(
      query, {key_codes, key_scales, key_mean, value_codes, value_scales, value_shift}, seqlen_k,
      head_dim_v, read_request(attn_mask, causal, scale, output_order, true), exponential, false);
  return {result.output, *result.lse};
}

std::tuple<Tensor, Tensor> attention_prepared_part(
    const Tensor& query, const Tensor& key_codes, const Tensor& key_scales, const Tensor& key_mean,
    const Tensor& value_codes, const Tensor& value_scales, const Tensor& value_shift,
    int64_t seqlen_k, int64_t head_dim_v, const std::optional<Tensor>& attn_mask,
    const Text& causal, std::optional<double> scale, const Text& exponential,
    const Text& output_order) {
  const Result result = attend_prepared(
      query, {key_codes, key_scales, key_mean, value_codes, value_scales, value_shift}, seqlen_k,
      head_dim_v, read_request(attn_mask, causal, scale, output_order, true), exponential, true);
  return {result.output, *result.lse};
}

}  // namespace torch_sage::cuda
