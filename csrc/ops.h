// The ops of torch_sage/ops/schemas.py on tensors of the CPU; arguments in the order of the schema.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "common/text.h"

namespace torch_sage {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> quantize_query(const Tensor& query, const Text& qk,
                                          const Text& granularity, int64_t block, int64_t warp);

std::tuple<Tensor, Tensor, Tensor> quantize_key(const Tensor& key,
                                                const std::optional<Tensor>& mean, bool smooth,
                                                const Text& qk, const Text& granularity,
                                                int64_t block);

std::tuple<Tensor, Tensor, Tensor> quantize_value(const Tensor& value,
                                                  const std::optional<Tensor>& mean, bool smooth,
                                                  const Text& pv);

Tensor attention(const Tensor& query, const Tensor& key_codes, const Tensor& key_scales,
                 const Tensor& key_mean, const Tensor& value_codes, const Tensor& value_scales,
                 const Tensor& value_mean, const std::optional<Tensor>& attn_mask,
                 const Text& causal, std::optional<double> scale, const Text& qk,
                 const Text& granularity, int64_t block, const Text& pv, const Text& output_order);

std::tuple<Tensor, Tensor> attention_with_lse(
    const Tensor& query, const Tensor& key_codes, const Tensor& key_scales, const Tensor& key_mean,
    const Tensor& value_codes, const Tensor& value_scales, const Tensor& value_mean,
    const std::optional<Tensor>& attn_mask, const Text& causal, std::optional<double> scale,
    const Text& qk, const Text& granularity, int64_t block, const Text& pv,
    const Text& output_order);

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

}  // namespace torch_sage
