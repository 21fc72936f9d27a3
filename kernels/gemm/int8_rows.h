// Activations in int8, for the integer dot products of gemv.h.
//
// In groups of 32 columns x = scale * code, scale = max |x| / 127, codes to nearest (ties to even), as in the CPU's
// kernels. Beside the scale go the sums of the codes of columns 0-15 and 16-31, which pay for the weights' offsets.
//
//   codes  [tokens][2][groups][16] int8: columns 0-15 of all groups, then columns 16-31, so that lanes with a group
//          each load 16 bytes side by side
//   sums   [tokens][groups] { f32 scale; i16 sum, sum }
//
// A group with a NaN or an infinity in it has a scale of NaN.
#pragma once
#include "common/compat.h"

// Read through pointers, so that it stays in the L1 cache: many warps read the same.
struct EkInt8 {
  const u32x4* codes;
  const u32x2* sums;
};

// A token's group as it was loaded: whatever is computed of it at once would wait for it at once.
struct EkInt8Group {
  u32 q[8];
  u32 scale, sums;
};
EK_DEV float ek_int8_scale(const EkInt8Group& x) { return ek_asfloat(x.scale); }
EK_DEV int ek_int8_sum(const EkInt8Group& x, int half) { return (int)(half == 0 ? x.sums << 16 : x.sums) >> 16; }

// By 32-bit offsets, which reach that far: a pointer for each token would take two registers for each of its planes.
EK_DEV EkInt8Group ek_int8_group(const EkInt8& x, int token, int groups, int group) {
  EkInt8Group a;
  const u32 at = (u32)(token * (2 * groups) + group), beyond = at + (u32)groups, sums = (u32)(token * groups + group);
  const u32x4 low = *(const u32x4*)((const u8*)x.codes + at * 16u);
  const u32x4 high = *(const u32x4*)((const u8*)x.codes + beyond * 16u);
  const u32x2 rest = *(const u32x2*)((const u8*)x.sums + sums * 8u);
  a.q[0] = low.x, a.q[1] = low.y, a.q[2] = low.z, a.q[3] = low.w;
  a.q[4] = high.x, a.q[5] = high.y, a.q[6] = high.z, a.q[7] = high.w;
  a.scale = rest.x, a.sums = rest.y;
  return a;
}
