// Sixteen lanes, whatever the machine: one 512-bit register, two of 256 or four of 128. Kernels are written once
// against this; a tier is a translation unit that includes them with its instruction set switched on.
//
//   vf  16 float32      vi  16 int32 or 64 bytes
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(EK_SIMD_PLAIN)
#include "simd_plain.h"
#elif defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(__ARM_NEON)
#include "simd_neon.h"
#else
#include "simd_plain.h"
#endif
