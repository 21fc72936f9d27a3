// Weights out of quantised planes as plain numbers: for the matrix products of many tokens, which are torch's, and rows
// of an embedding by their ids.
//
// A lane unpacks a group of 32 columns; shared memory turns the block's groups round, so that lanes store side by side.
// What comes out is what the encoding means (kernels/quant/dequantise.py), rounded once.
#pragma once
#include "gemm/numbers.h"
#include "gemm/planes.h"

struct EkDequant {
  EkPlanes w;
  void* out;       // [count][stride], EK_OUT, 16-byte aligned rows
  const int* ids;  // [count] rows that are wanted; null: the first `count`
  i64 stride;      // elements
  int count;
  float scale;     // of the weights; 1 changes nothing
};
static_assert(sizeof(EkDequant) == 88, "the mirror in Python has the same");

// Grid: (count * groups / 128, rounded up).
EK_KERN(128) ek_dequant(EkDequant p) {
  constexpr int PIECES = EK_OUT == 2 ? 8 : 4;  // of 16 bytes, of a group
  constexpr int PER_PIECE = 32 / PIECES;
  EK_SMEM u32x4 turned[128 * (PIECES + 1)];

  const i64 all = (i64)p.count * p.w.groups, first = (i64)EK_BX * 128;
  const i64 mine = first + EK_TID < all ? first + EK_TID : all - 1;
  const int at = (int)(mine / p.w.groups);
  const int wanted = p.ids != nullptr ? p.ids[at] : at;
  const EkRow row = ek_row(p.w, ek_min(ek_max(wanted, 0), p.w.rows - 1));
  const EkPacked packed = ek_fetch(p.w, row, (int)(mine % p.w.groups));
  const EkScale scale = ek_scale(packed);
#pragma unroll
  for (int k = 0; k < PIECES; k++) {
    u32 word[4];
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const int from = (k * 4 + n) * PER_PIECE / 4;  // column of the group
      const u32 codes = ek_codes(packed, from >> 2);
      const float x = p.scale * ek_weight(codes, from & 3, scale, from >> 2);
      if constexpr (EK_OUT == 2) word[n] = ek_asuint(x);
      else word[n] = ek_pack<EK_OUT == 1>(x, p.scale * ek_weight(codes, (from & 3) + 1, scale, from >> 2));
    }
    turned[EK_TID * (PIECES + 1) + k] = u32x4{word[0], word[1], word[2], word[3]};
  }
#ifndef EK_PLANT_BARRIER  // a fault for tests to find
  EK_SYNC();
#endif
#pragma unroll
  for (int k = 0; k < PIECES; k++) {
    const int piece = k * 128 + EK_TID, from = piece / PIECES;
    const i64 group = first + from;
    if (group >= all) continue;
    const i64 to = group / p.w.groups * p.stride + group % p.w.groups * 32 + piece % PIECES * PER_PIECE;
    u32x4* out = EK_OUT == 2 ? (u32x4*)((float*)p.out + to) : (u32x4*)((u16*)p.out + to);
    *out = turned[from * (PIECES + 1) + piece % PIECES];
  }
}
