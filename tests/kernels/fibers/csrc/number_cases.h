// What compat.h makes of numbers: out[function][i] of in[0][i], in[1][i] and in[2][i], in the order of references.
#pragma once
#include "common/compat.h"

struct EkNumbers {
  u64 in;   // u32 [3, count]
  u64 out;  // u32 [functions, count]
  i64 count;
};
static_assert(sizeof(EkNumbers) == 24, "the mirror in Python has the same");

EK_DEV void ek_put(const EkNumbers& p, u64& at, u32 x) {
  ek_stg4(at, x);
  at += (u64)(p.count * 4);
}
EK_DEV void ek_put(const EkNumbers& p, u64& at, float x) { ek_put(p, at, ek_asuint(x)); }

EK_KERN(128) ek_numbers(EkNumbers p) {
  const i64 i = EK_BX * 128 + EK_TID;
  if (i >= p.count) return;
  const u32 a = ek_ldg4(p.in + (u64)(i * 4)), b = ek_ldg4(p.in + (u64)((i + p.count) * 4));
  const u32 c = ek_ldg4(p.in + (u64)((i + 2 * p.count) * 4));
  const float x = ek_asfloat(a), y = ek_asfloat(b), z = ek_asfloat(c);
  u64 at = p.out + (u64)(i * 4);

  ek_put(p, at, ek_bf16((u16)a));
  ek_put(p, at, ek_bf16lo(a));
  ek_put(p, at, ek_bf16hi(a));
  ek_put(p, at, (u32)ek_tobf16(x));
  ek_put(p, at, ek_pack_bf16(x, y));
  ek_put(p, at, ek_f16((u16)a));
  ek_put(p, at, ek_f16lo(a));
  ek_put(p, at, ek_f16hi(a));
  ek_put(p, at, (u32)ek_tof16(x));
  ek_put(p, at, ek_pack_f16(x, y));
  ek_put(p, at, ek_e4m3(a & 0xffu));
  ek_put(p, at, ek_toe4m3(x));
  ek_put(p, at, ek_perm(a, b, c & 0x7777u));
  ek_put(p, at, (u32)ek_dot4((i32)c, a, b));
  ek_put(p, at, (u32)ek_dot4_us((i32)c, a, b));
  ek_put(p, at, ek_dot4_uu(c, a, b));
  ek_put(p, at, ek_fma(x, y, z));
  ek_put(p, at, ek_max(x, y));
  ek_put(p, at, ek_min(x, y));
  ek_put(p, at, (u32)ek_max((int)a, (int)b));
  ek_put(p, at, (u32)ek_min((int)a, (int)b));
  ek_put(p, at, ek_rint(x));
  ek_put(p, at, ek_exp2(x));
  ek_put(p, at, ek_log2(x));
  ek_put(p, at, ek_rcp(x));
  ek_put(p, at, ek_rsqrt(x));
  ek_put(p, at, ek_tanh(x));
}
