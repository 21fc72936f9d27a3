// The kernels for AVX2 with FMA and F16C: Haswell and later, Zen and later.
#include "tiers.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define EK_TIER avx2
#include "tier.h"

const ek_tier* ek_tier_avx2() { return &EK_TIER::kernels; }
#else
const ek_tier* ek_tier_avx2() { return nullptr; }
#endif
