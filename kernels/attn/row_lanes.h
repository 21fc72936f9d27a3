// Between the lanes that share a row of the cache (kv.h): each of them gets the result.
#pragma once
#include "common/kv.h"

EK_DEV float ek_row_sum(float x) {
#pragma unroll
  for (int mask = EK_KV_LANES / 2; mask > 0; mask >>= 1) x += ek_shfl_xor(x, mask);
  return x;
}

EK_DEV float ek_row_max(float x) {
#pragma unroll
  for (int mask = EK_KV_LANES / 2; mask > 0; mask >>= 1) x = ek_max(x, ek_shfl_xor(x, mask));
  return x;
}
