// The kernels for 64-bit ARM.
#include "tiers.h"

#if defined(__ARM_NEON)
#define EK_TIER neon
#include "tier.h"

const ek_tier* ek_tier_neon() { return &EK_TIER::kernels; }
#else
const ek_tier* ek_tier_neon() { return nullptr; }
#endif
