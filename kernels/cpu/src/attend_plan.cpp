// How much memory the threads share while they attend.
#define EK_TIER any_tier
#include "attend_plan.h"

// Bytes of ek_attend.shared for this batch, with any window and on any number of threads; of `attend` only the cache's
// shape, the heads and the batch's spans are read. The memory need not be cleared.
extern "C" __attribute__((visibility("default"))) int64_t ek_attend_shared_bytes(const ek_attend* attend, int32_t) {
  return EK_TIER::plan_bytes(attend);
}
