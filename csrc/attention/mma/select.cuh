// The instantiations of the kernel at one width.
#pragma once

#include "attention/mma/kernel.cuh"

namespace torch_sage::mma {

template <int kWidth, Pv kPv>
void select_codes(const AttentionParams& params, cudaStream_t stream) {
  const bool has_mask = params.mask_kind != MaskKind::kNone;
  if (params.kv.is_int4) {
    has_mask ? launch_kernel<Config<kWidth, true, kPv, true>>(params, stream)
             : launch_kernel<Config<kWidth, true, kPv, false>>(params, stream);
  } else {
    has_mask ? launch_kernel<Config<kWidth, false, kPv, true>>(params, stream)
             : launch_kernel<Config<kWidth, false, kPv, false>>(params, stream);
  }
}

template <int kWidth>
void select_halves(const AttentionParams& params, cudaStream_t stream) {
  if (params.pv == Pv::kBf16) {
    select_codes<kWidth, Pv::kBf16>(params, stream);
  } else if (params.pv == Pv::kFp16) {
    select_codes<kWidth, Pv::kFp16>(params, stream);
  } else {
    select_codes<kWidth, Pv::kFp16Fp16>(params, stream);
  }
}

template <int kWidth>
void select_e4m3(const AttentionParams& params, cudaStream_t stream) {
  if (params.pv == Pv::kE4m3) {
    select_codes<kWidth, Pv::kE4m3>(params, stream);
  } else {
    select_codes<kWidth, Pv::kE4m3Fp16>(params, stream);
  }
}

}  // namespace torch_sage::mma
