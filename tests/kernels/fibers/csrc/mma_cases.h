// C = A B of one warp and 16 x 16 x 16 numbers, by each way to load B.
#pragma once
#include "common/mma.h"

struct EkProduct {
  u64 a, b;  // u16 [16, 16]
  u64 c;     // float [2, 16, 16]
};
static_assert(sizeof(EkProduct) == 24, "the mirror in Python has the same");

constexpr int EK_STRIDE = 24;  // numbers: a multiple of 16 bytes, and more than a row

EK_KERN(32) ek_product(EkProduct p) {
  alignas(16) EK_SMEM u16 a[16 * EK_STRIDE];
  alignas(16) EK_SMEM u16 b[16 * EK_STRIDE];
  alignas(16) EK_SMEM u16 bt[16 * EK_STRIDE];
  const int lane = EK_TID;
  for (int i = lane; i < 256; i += 32) {
    const int row = i / 16, col = i % 16;
    a[row * EK_STRIDE + col] = ek_ldg2(p.a + (u64)(i * 2));
    const u16 x = ek_ldg2(p.b + (u64)(i * 2));
    b[row * EK_STRIDE + col] = x;
    bt[col * EK_STRIDE + row] = x;
  }
  EK_SYNC();
  EkA x;
  EkB y, z;
  ek_ldA(x, a, EK_STRIDE, lane);
  ek_ldB(y, b, EK_STRIDE, lane);
  ek_ldBT(z, bt, EK_STRIDE, lane);
  EkC first = {}, second = {};
  ek_mma(first, x, y, lane);
  ek_mma(second, x, z, lane);
  ek_mma(second, x, z, lane);  // twice: what was in C counts
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int place = ek_c_row(lane, i) * 16 + ek_c_col(lane, i);
    ek_stg4(p.c + (u64)(place * 4), ek_asuint(first.r[i]));
    ek_stg4(p.c + (u64)((256 + place) * 4), ek_asuint(second.r[i]));
  }
}
