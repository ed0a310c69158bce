// What the Python package registers at import, for a process that does not import it: the schemas,
// and kernels for the ops that stand for torch's own. The kernels of all others are in
// libtorch_sage.so, which this library loads.

#include <torch/csrc/stable/library.h>

#include "common/check.h"
#include "common/schema_owner.h"
#include "definitions.h"  // written by setup.py from the Python definitions

namespace {

const bool kIsOwner = torch_sage_claim_schemas();

// An exact op has the arguments and the result of torch's own, so the stack is handed on as it is.
void call_torch(const char* name, const char* overload, StableIValue* stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
}

void exact_sdpa(StableIValue* stack, uint64_t, uint64_t) {
  call_torch("aten::scaled_dot_product_attention", "", stack);
}

void exact_softmax(StableIValue* stack, uint64_t, uint64_t) {
  call_torch("aten::softmax", "int", stack);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torch_sage, m) {
  if (!kIsOwner) return;
  for (const char* definition : torch_sage::kDefinitions) m.def(definition);
}

STABLE_TORCH_LIBRARY_IMPL(torch_sage, CompositeExplicitAutograd, m) {
  if (!kIsOwner) return;
  m.impl("exact_sdpa", &exact_sdpa);
  m.impl("exact_softmax", &exact_softmax);
}
