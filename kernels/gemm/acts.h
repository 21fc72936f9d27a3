// Activations become int8: what int8_rows.h says, once for all matrices that they are multiplied with.
#pragma once
#include "common/act.h"

struct EkQuantise {
  u64 x;         // activations [tokens, columns], x_stride bytes from token to token, a multiple of 16
  u32x2* codes;  // as in int8_rows.h, eight at a time
  u32x2* sums;
  i64 x_stride;
  int groups, tokens;
};
static_assert(sizeof(EkQuantise) == 40, "the mirror in Python has the same");

// Grid: (tokens, groups / 32, rounded up). Four lanes share a group: eight columns each.
EK_KERN(128) ek_quantise(EkQuantise p) {
  const int quarter = EK_TID & 3, group = EK_BY * 32 + (EK_TID >> 2), token = EK_BX;
  const bool is_there = group < p.groups;
  const int column = is_there ? group * 32 + quarter * 8 : 0;
  float x[8];
  ek_act_load(p.x + (u64)((i64)token * p.x_stride + column * EK_ACT_BYTES), x);

  float top = 0.0f, poison = 0.0f;  // NaN where x has one, or an infinity: maximum and rounding would swallow it
#pragma unroll
  for (int i = 0; i < 8; i++) {
    top = ek_max(top, ek_max(x[i], -x[i]));
    poison = ek_fma(x[i], 0.0f, poison);
  }
  top = ek_max(top, ek_shfl_xor(top, 1));
#ifndef EK_PLANT_EXCHANGE  // a fault for tests to find
  top = ek_max(top, ek_shfl_xor(top, 2));
#endif
  poison += ek_shfl_xor(poison, 1);
  poison += ek_shfl_xor(poison, 2);

  // Below that, 127 / top might be infinite.
  const bool is_number = top > 1e-30f && poison == 0.0f;
  const float inverse = is_number ? 127.0f / top : 0.0f;
  u32 codes[2] = {0, 0};
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int code = is_number ? (int)ek_rint(x[i] * inverse) : 0;
    sum += code;
    codes[i >> 2] |= ((u32)code & 0xffu) << ((i & 3) * 8);
  }
  const int half = sum + (int)ek_shfl_xor((u32)sum, 1);
  const int other = (int)ek_shfl_xor((u32)half, 2);
  if (!is_there) return;

  const i64 first = (i64)token * (4 * p.groups) + 2 * group;
  p.codes[first + (quarter >> 1) * (2 * p.groups) + (quarter & 1)] = u32x2{codes[0], codes[1]};
  if (quarter == 0) {
    const u32 sums = ((u32)half & 0xffffu) | (u32)other << 16;
    p.sums[(i64)token * p.groups + group] = u32x2{ek_asuint(top / 127.0f + poison), sums};
  }
}
