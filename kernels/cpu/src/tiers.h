// The tiers of this build; null where the compiler was not asked for, or does not know, the instruction set.
#pragma once
#include "ek.h"

const ek_tier* ek_tier_avx512();
const ek_tier* ek_tier_avx2();
const ek_tier* ek_tier_neon();
const ek_tier* ek_tier_plain();
