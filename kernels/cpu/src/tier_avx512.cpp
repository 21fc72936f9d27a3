// The kernels for AVX-512 with BF16 and VNNI: Zen 4 and later, Sapphire Rapids and later.
#include "tiers.h"

#if defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define EK_TIER avx512
#include "tier.h"

const ek_tier* ek_tier_avx512() { return &EK_TIER::kernels; }
#else
const ek_tier* ek_tier_avx512() { return nullptr; }
#endif
