// The ops of torch_sage/ops/schemas.py on GPUs; arguments in the order of the schema. Those named
// mma_ are for compute capabilities from 8.0 on, the others for 9.0 alone.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "common/text.h"

namespace torch_sage::cuda {

using torch::stable::Tensor;

using Prepared = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor sdpa(const Tensor& query, const Tensor& key, const Tensor& value,
            const std::optional<Tensor>& attn_mask, const Text& causal, std::optional<double> scale,
            const Text& qk, const Text& granularity, const Text& pv, const Text& smooth,
            const Text& exponential, const Text& output_order);

std::tuple<Tensor, Tensor> sdpa_with_lse(const Tensor& query, const Tensor& key,
                                         const Tensor& value,
                                         const std::optional<Tensor>& attn_mask, const Text& causal,
                                         std::optional<double> scale, const Text& qk,
                                         const Text& granularity, const Text& pv,
                                         const Text& smooth, const Text& exponential,
                                         const Text& output_order);

// The same of a query and a key that still lack RMSNorm and rotary embeddings.
Tensor rotary_sdpa(const Tensor& query, const Tensor& key, const Tensor& value,
                   const Tensor& query_cos, const Tensor& query_sin,
                   const std::optional<Tensor>& query_rstd,
                   const std::optional<Tensor>& query_weight, std::optional<double> query_eps,
                   const Tensor& key_cos, const Tensor& key_sin,
                   const std::optional<Tensor>& key_rstd, const std::optional<Tensor>& key_weight,
                   std::optional<double> key_eps, const std::optional<Tensor>& attn_mask,
                   const Text& causal, std::optional<double> scale, const Text& pairing,
                   const Text& qk, const Text& granularity, const Text& pv, const Text& smooth,
                   const Text& exponential, const Text& output_order);

Tensor mma_sdpa(const Tensor& query, const Tensor& key, const Tensor& value,
                const std::optional<Tensor>& attn_mask, const Text& causal,
                std::optional<double> scale, const Text& qk, const Text& granularity,
                const Text& pv, const Text& smooth, const Text& exponential,
                const Text& output_order);

std::tuple<Tensor, Tensor> mma_sdpa_with_lse(const Tensor& query, const Tensor& key,
                                             const Tensor& value,
                                             const std::optional<Tensor>& attn_mask,
                                             const Text& causal, std::optional<double> scale,
                                             const Text& qk, const Text& granularity,
                                             const Text& pv, const Text& smooth,
                                             const Text& exponential, const Text& output_order);

Tensor varlen_sdpa(const Tensor& query, const Tensor& key, const Tensor& value,
                   const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                   int64_t max_seqlen_k, const Text& causal, std::optional<double> scale,
                   const Text& qk, const Text& granularity, const Text& pv, const Text& smooth,
                   const Text& exponential);

std::tuple<Tensor, Tensor> varlen_sdpa_with_lse(const Tensor& query, const Tensor& key,
                                                const Tensor& value, const Tensor& cu_seqlens_q,
                                                const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                                                int64_t max_seqlen_k, const Text& causal,
                                                std::optional<double> scale, const Text& qk,
                                                const Text& granularity, const Text& pv,
                                                const Text& smooth, const Text& exponential);

Tensor mma_varlen_sdpa(const Tensor& query, const Tensor& key, const Tensor& value,
                       const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                       int64_t max_seqlen_k, const Text& causal, std::optional<double> scale,
                       const Text& qk, const Text& granularity, const Text& pv, const Text& smooth,
                       const Text& exponential);

std::tuple<Tensor, Tensor> mma_varlen_sdpa_with_lse(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, const Text& causal,
    std::optional<double> scale, const Text& qk, const Text& granularity, const Text& pv,
    const Text& smooth, const Text& exponential);

// What those make of K and V before they attend; for tests.
Prepared mma_prepare_kv(const Tensor& key, const Tensor& value, const Text& qk,
                        const Text& granularity, const Text& pv, const Text& smooth);

Prepared prepare_kv(const Tensor& key, const Tensor& value, const Text& smooth, const Text& pv);

Tensor attention_prepared(const Tensor& query, const Tensor& key_codes, const Tensor& key_scales,
                          const Tensor& key_mean, const Tensor& value_codes,
                          const Tensor& value_scales, const Tensor& value_shift, int64_t seqlen_k,
                          int64_t head_dim_v, const std::optional<Tensor>& attn_mask,
                          const Text& causal, std::optional<double> scale, const Text& exponential,
                          const Text& output_order);

std::tuple<Tensor, Tensor> attention_prepared_with_lse(
    const Tensor& query, const Tensor& key_codes, const Tensor& key_scales, const Tensor& key_mean,
    const Tensor& value_codes, const Tensor& value_scales, const Tensor& value_shift,
    int64_t seqlen_k, int64_t head_dim_v, const std::optional<Tensor>& attn_mask,
    const Text& causal, std::optional<double> scale, const Text& exponential,
    const Text& output_order);

// The same for merging: the LSE is that of the sum by which the output was divided.
std::tuple<Tensor, Tensor> attention_prepared_part(
    const Tensor& query, const Tensor& key_codes, const Tensor& key_scales, const Tensor& key_mean,
    const Tensor& value_codes, const Tensor& value_scales, const Tensor& value_shift,
    int64_t seqlen_k, int64_t head_dim_v, const std::optional<Tensor>& attn_mask,
    const Text& causal, std::optional<double> scale, const Text& exponential,
    const Text& output_order);

}  // namespace torch_sage::cuda
