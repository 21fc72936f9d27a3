// The kernels for any processor, as far as the compiler vectorises them.
#include "tiers.h"

#define EK_TIER plain
#include "tier.h"

const ek_tier* ek_tier_plain() { return &EK_TIER::kernels; }
