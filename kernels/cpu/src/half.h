// float16 by bit operations, for code that is compiled for no tier.
#pragma once
#include <stdint.h>
#include <string.h>

static inline float ek_half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  uint32_t bits;
  float x;
  if (exponent == 31) {
    bits = sign | 0x7F800000 | mantissa << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {  // mantissa * 2^-24, exact
    x = (float)mantissa * 5.9604644775390625e-8f;
    memcpy(&bits, &x, 4);
    bits |= sign;
  }
  memcpy(&x, &bits, 4);
  return x;
}

static inline uint16_t ek_read16(const void* p) {
  uint16_t x;
  memcpy(&x, p, 2);
  return x;
}
