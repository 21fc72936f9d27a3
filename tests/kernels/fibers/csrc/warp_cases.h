// All exchanges of a warp, and loads and stores of each width: out[function][lane], in the order of warp_references.
#pragma once
#include "common/compat.h"

struct EkWarps {
  u64 in;     // u32 [warps * 32]
  u64 lanes;  // u32 [warps * 32]: a lane each chooses
  u64 out;    // u32 [functions, warps * 32]
  i64 count;
};
static_assert(sizeof(EkWarps) == 32, "the mirror in Python has the same");

EK_DEV void ek_put(const EkWarps& p, u64& at, u32 x) {
  ek_stg4(at, x);
  at += (u64)(p.count * 4);
}

EK_KERN(128) ek_warps(EkWarps p) {
  EK_SMEM u32 counter;
  const int me = EK_BX * 128 + EK_TID;
  const u64 own = (u64)(me * 4);
  const u32 x = ek_ldg4(p.in + own);
  const int from = (int)ek_ldg4(p.lanes + own);
  u64 at = p.out + own;
#pragma unroll
  for (int mask = 0; mask < 32; mask++) ek_put(p, at, ek_shfl_xor(x, mask));
  for (int mask = 1; mask < 32; mask <<= 1) ek_put(p, at, ek_asuint(ek_shfl_xor(ek_asfloat(x), mask)));
  ek_put(p, at, ek_shfl(x, from));
  ek_put(p, at, ek_asuint(ek_shfl(ek_asfloat(x), from)));
  ek_put(p, at, ek_ballot(x & 1u));
  ek_put(p, at, (u32)ek_any(x == 12345u));
  if (EK_TID == 0) counter = 0;
  EK_SYNC();
  ek_add_shared(&counter, x & 255u);
  EK_SYNC();
  ek_put(p, at, counter);
  ek_put(p, at, (u32)ek_ldg1(p.in + own + 1));
  ek_put(p, at, (u32)ek_ldg2(p.in + own + 2));
  const u32x2 pair = ek_ldg8(p.in + (own & ~7ull));
  ek_put(p, at, pair.x - pair.y);
  const u32x4 four = ek_ldg16(p.in + (own & ~15ull));
  ek_put(p, at, (four.x - four.y) ^ (four.z - four.w));
  ek_stg1(at, (u8)x), ek_stg1(at + 1, (u8)(x >> 24)), ek_stg2(at + 2, (u16)(x >> 8));
  at += (u64)(p.count * 4);
  if (me % 2 == 0) ek_stg8(at, u32x2{x, ~x});
  at += (u64)(p.count * 4);
  if (me % 4 == 0) ek_stg16(at, u32x4{x, x + 1, x + 2, x + 3});
}
