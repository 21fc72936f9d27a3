// x / rms(x) * weight of each row, and the addition of the residual stream before or after it.
//
//   -DEK_ADD=0   out = norm(x)
//   -DEK_ADD=1   sum = x + other;  out = norm(sum)     the two lines between a layer's halves (Llama)
//   -DEK_ADD=2   out = other + norm(x)                 a norm at the end of a half (Gemma 2 and 3)
//   -DEK_ROUND_FIRST=1   the normed row is rounded to the activations' type before it is multiplied by the weight, as
//                        Llama's reference does; 0: only the product is (Gemma, whose 1 + w the host has made w)
//   -DEK_VECTORS=n       a thread has so many times eight columns, 1 to 8
//   grid   rows
//
// A thread keeps its columns in registers: each is read once, and `sum`, or `out`, may be where x or `other` is. Which
// columns are a thread's and in what order their squares are added depends on the width alone, so a row's result is
// the same to the bit whoever is beside it.
#pragma once
#include "common/act.h"

#ifndef EK_ADD
#define EK_ADD 0
#endif
#ifndef EK_ROUND_FIRST
#define EK_ROUND_FIRST 1
#endif
#ifndef EK_VECTORS
#define EK_VECTORS 1
#endif
static_assert(EK_ADD >= 0 && EK_ADD <= 2, "EK_ADD is 0 nothing, 1 before or 2 after");
static_assert(EK_VECTORS >= 1 && EK_VECTORS <= 8, "1 to 8 vectors of eight columns");

constexpr int EK_NORM_THREADS = 256;

struct EkRmsNorm {
  u64 x, other, sum, out;  // activations [rows, width]; other and sum only where EK_ADD asks for them
  u64 weight;              // float32 [width], 16-byte aligned
  i64 x_stride, other_stride, sum_stride, out_stride;  // bytes from row to row, multiples of 16
  int width;               // a multiple of 8
  float eps;
};
static_assert(sizeof(EkRmsNorm) == 80, "the mirror in Python has the same");

// As it is after being stored and read again.
EK_DEV float ek_act_round(float x) {
  if constexpr (EK_ACT == 0) return ek_bf16(ek_tobf16(x));
  else if constexpr (EK_ACT == 1) return ek_f16(ek_tof16(x));
  else return x;
}

EK_DEV void ek_load_weight(u64 address, float (&w)[8]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32x4 four = ek_ldg16(address + (u64)(16 * i));
    w[4 * i] = ek_asfloat(four.x), w[4 * i + 1] = ek_asfloat(four.y);
    w[4 * i + 2] = ek_asfloat(four.z), w[4 * i + 3] = ek_asfloat(four.w);
  }
}

EK_KERN(EK_NORM_THREADS) ek_rmsnorm(EkRmsNorm p) {
  EK_SMEM float parts[EK_NORM_THREADS / 32];
  const i64 row = EK_BX;
  const u64 x = p.x + (u64)(row * p.x_stride), other = p.other + (u64)(row * p.other_stride);

  // All that is read, before anything is waited for or written; past the end the last columns again.
  float v[EK_VECTORS][8], added[EK_VECTORS][8], weight[EK_VECTORS][8];
#pragma unroll
  for (int i = 0; i < EK_VECTORS; i++) {
    const int column = ek_min((i * EK_NORM_THREADS + EK_TID) * 8, p.width - 8);
    const u64 at = (u64)(column * EK_ACT_BYTES);
    ek_act_load<true>(x + at, v[i]);
    if constexpr (EK_ADD != 0) ek_act_load<true>(other + at, added[i]);
    ek_load_weight(p.weight + (u64)(column * 4), weight[i]);
  }
  EK_LOADS_STAY();

  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < EK_VECTORS; i++) {
    float more = squares;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      if constexpr (EK_ADD == 1) v[i][e] = ek_act_round(v[i][e] + added[i][e]);
      more = ek_fma(v[i][e], v[i][e], more);
    }
    squares = (i * EK_NORM_THREADS + EK_TID) * 8 < p.width ? more : squares;
  }

#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) squares += ek_shfl_xor(squares, mask);
  if ((EK_TID & 31) == 0) parts[EK_TID >> 5] = squares;
#ifndef EK_PLANT_BARRIER  // a fault for tests to find
  EK_SYNC();
#endif
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < EK_NORM_THREADS / 32; i++) sum += parts[i];
  const float factor = ek_rsqrt(sum / (float)p.width + p.eps);

#pragma unroll
  for (int i = 0; i < EK_VECTORS; i++) {
    const int column = (i * EK_NORM_THREADS + EK_TID) * 8;
    if (column >= p.width) continue;
    const u64 at = (u64)(column * EK_ACT_BYTES);
    if constexpr (EK_ADD == 1) ek_act_store(p.sum + (u64)(row * p.sum_stride) + at, v[i]);
#pragma unroll
    for (int e = 0; e < 8; e++) {
      float y = v[i][e] * factor;
      if constexpr (EK_ROUND_FIRST) y = ek_act_round(y);
      y *= weight[i][e];
      if constexpr (EK_ADD == 2) y = ek_act_round(y) + added[i][e];
      v[i][e] = y;
    }
    ek_act_store(p.out + (u64)(row * p.out_stride) + at, v[i]);
  }
}
