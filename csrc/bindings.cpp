#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(torch_sage, CPU, m) {
  m.impl("quantize_query", TORCH_BOX(&torch_sage::quantize_query));
  m.impl("quantize_key", TORCH_BOX(&torch_sage::quantize_key));
  m.impl("quantize_value", TORCH_BOX(&torch_sage::quantize_value));
  m.impl("attention", TORCH_BOX(&torch_sage::attention));
  m.impl("attention_with_lse", TORCH_BOX(&torch_sage::attention_with_lse));
  m.impl("sdpa", TORCH_BOX(&torch_sage::sdpa));
  m.impl("sdpa_with_lse", TORCH_BOX(&torch_sage::sdpa_with_lse));
  m.impl("varlen_sdpa", TORCH_BOX(&torch_sage::varlen_sdpa));
  m.impl("varlen_sdpa_with_lse", TORCH_BOX(&torch_sage::varlen_sdpa_with_lse));
}
