#include "common/schema_owner.h"

#include <atomic>

bool torch_sage_claim_schemas() noexcept {
  static std::atomic_flag claimed = ATOMIC_FLAG_INIT;
  return !claimed.test_and_set();
}
