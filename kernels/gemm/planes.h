// Quantised matrices as the card keeps them, and a lane's share of a row: a group of 32 columns.
//
// Codes q, high bits h and scales s lie in planes of their own, drawn in planes.py; a plane's rows are 16-byte aligned.
// Whatever the format, once a group is unpacked
//   w = step * (code - offset) - minus      code: an unsigned byte; in q6_K columns 0-15 and 16-31 have a step each
// and each is exact in float32 but the subtraction of minima, so that the order of it does not matter.
//
// By EK_FMT: 0 q8_0   1 q4_0   2 affine4 (EK_GROUP: 32, 64 or 128 columns share a scale)   3 q4_K   4 q5_K   5 q6_K
//            6 q4_1   7 q5_0   8 q5_1
#pragma once
#include "common/compat.h"

#ifndef EK_FMT
#define EK_FMT 1
#endif
#ifndef EK_GROUP
#define EK_GROUP 32
#endif

constexpr int EK_Q8_0 = 0, EK_Q4_0 = 1, EK_AFFINE4 = 2, EK_Q4_K = 3, EK_Q5_K = 4, EK_Q6_K = 5;
constexpr int EK_Q4_1 = 6, EK_Q5_0 = 7, EK_Q5_1 = 8;
static_assert(EK_FMT >= EK_Q8_0 && EK_FMT <= EK_Q5_1, "EK_FMT is one of the nine above");
static_assert(EK_GROUP == 32 || EK_GROUP == 64 || EK_GROUP == 128, "affine4 groups have 32, 64 or 128 columns");

constexpr bool EK_HAS_SUPER_SCALES = EK_FMT == EK_Q4_K || EK_FMT == EK_Q5_K;
constexpr bool EK_HAS_PAIRS = EK_FMT == EK_Q4_1 || EK_FMT == EK_Q5_1;
constexpr bool EK_HAS_MINIMA = EK_HAS_SUPER_SCALES || EK_HAS_PAIRS;
constexpr bool EK_HAS_FIFTHS = EK_FMT == EK_Q5_0 || EK_FMT == EK_Q5_1 || EK_FMT == EK_Q5_K;
constexpr bool EK_HAS_HALVES = EK_FMT == EK_Q6_K;
constexpr int EK_ENTRY = 20;  // bytes of a super-block's scales
constexpr int EK_ENTRY_SHIFT = EK_GROUP == 32 ? 0 : EK_GROUP == 64 ? 1 : 2;

struct EkPlanes {
  u64 q, h, s;                       // addresses; h is 0 where there is none
  i64 q_stride, h_stride, s_stride;  // bytes from a row to the next
  int rows, groups;                  // columns / 32
};
static_assert(sizeof(EkPlanes) == 56, "the mirror in Python has the same");

// Where a row's planes begin.
struct EkRow {
  u64 q, h, s;
};
EK_DEV EkRow ek_row(const EkPlanes& w, int row) {
  const u64 i = (u64)row;
  return {w.q + i * (u64)w.q_stride, w.h + i * (u64)w.h_stride, w.s + i * (u64)w.s_stride};
}

// A group as it was loaded: few registers, so that the next one can be under way while this one is worked on.
struct EkPacked {
  u32 q[8];  // four in all formats but q8_0
  u32 h[2];
  u32 s[2];
  int shift;  // of what is the group's in the word of super-block scales
};

// STAYS: it is not moved past a barrier of the block. ptxas would, as nobody can have written there; a load of what
// others may write it leaves.
template <bool STAYS>
EK_DEV u16 ek_plane2(u64 address) {
  return STAYS ? ek_ld2(address) : ek_ldg2(address);
}
template <bool STAYS>
EK_DEV u32 ek_plane4(u64 address) {
  return STAYS ? ek_ld4(address) : ek_ldg4(address);
}
template <bool STAYS>
EK_DEV u32x2 ek_plane8(u64 address) {
  return STAYS ? ek_ld8(address) : ek_ldg8(address);
}
template <bool STAYS>
EK_DEV u32x4 ek_plane16(u64 address) {
  return STAYS ? ek_ld16(address) : ek_ldg16(address);
}

// A group's two bytes of a super-block's scales come with its neighbour's: clang widens what it has loaded as 16 bits
// where the loop begins that uses it, and waits for it there.
template <bool STAYS = false>
EK_DEV EkPacked ek_fetch(const EkPlanes& w, const EkRow& row, int group) {
  EkPacked p;
  const u64 g = (u64)group;
  const u32x4 low = ek_plane16<STAYS>(row.q + g * 16);
  p.q[0] = low.x, p.q[1] = low.y, p.q[2] = low.z, p.q[3] = low.w;
  p.h[0] = p.h[1] = p.s[1] = 0;
  p.shift = 0;
  if constexpr (EK_FMT == EK_Q8_0) {
    const u32x4 high = ek_plane16<STAYS>(row.q + ((u64)w.groups + g) * 16);
    p.q[4] = high.x, p.q[5] = high.y, p.q[6] = high.z, p.q[7] = high.w;
  }
  if constexpr (EK_HAS_FIFTHS) p.h[0] = ek_plane4<STAYS>(row.h + g * 4);
  if constexpr (EK_FMT == EK_Q6_K) {
    const u32x2 high = ek_plane8<STAYS>(row.h + g * 8);
    p.h[0] = high.x, p.h[1] = high.y;
  }
  if constexpr (EK_FMT == EK_Q8_0 || EK_FMT == EK_Q4_0 || EK_FMT == EK_Q5_0) {
    p.s[0] = ek_plane2<STAYS>(row.s + g * 2);
  } else if constexpr (EK_HAS_PAIRS) {
    p.s[0] = ek_plane4<STAYS>(row.s + g * 4);
  } else if constexpr (EK_FMT == EK_AFFINE4) {
    p.s[0] = ek_plane4<STAYS>(row.s + (g >> EK_ENTRY_SHIFT) * 4);
  } else if constexpr (EK_HAS_SUPER_SCALES) {
    const u64 entry = row.s + (g >> 3) * EK_ENTRY;
    p.s[0] = ek_plane4<STAYS>(entry);
    p.s[1] = ek_plane4<STAYS>(entry + 4 + (g & 6) * 2);
    p.shift = (group & 1) << 4;
  } else {
    const u64 entry = row.s + (g >> 3) * EK_ENTRY;
    p.s[0] = ek_plane4<STAYS>(entry + (g & 6) * 2);
    p.shift = (group & 1) << 4;
    p.s[1] = ek_plane2<STAYS>(entry + 16);
  }
  return p;
}

// Columns 4 i .. 4 i + 3 as bytes. Those of q8_0 are signed, as they are stored; the others are at most 63, which is
// the same signed and unsigned. Compilers know i.
EK_DEV u32 ek_codes(const EkPacked& p, int i) {
  if constexpr (EK_FMT == EK_Q8_0) {
    return p.q[i];
  } else {
    const u32 low = (i < 4 ? p.q[i & 3] : p.q[i & 3] >> 4) & 0x0f0f0f0fu;
    if constexpr (EK_HAS_FIFTHS) {
      return low | ((i < 4 ? p.h[0] << (4 - i) : p.h[0] >> (i - 4)) & 0x10101010u);
    } else if constexpr (EK_FMT == EK_Q6_K) {
      const u32 high = p.h[i >> 2];
      return low | (((i & 3) < 3 ? high << (4 - 2 * (i & 3)) : high >> 2) & 0x30303030u);
    } else {
      return low;
    }
  }
}

struct EkScale {
  float step[2];  // of columns 0-15 and 16-31; the same but in q6_K
  float minus;    // 0 but where there are minima
  int offset;     // of ek_codes: 0 in q8_0, whose codes are signed
};

EK_DEV EkScale ek_scale(const EkPacked& p) {
  EkScale s;
  s.minus = 0.0f;
  if constexpr (EK_FMT == EK_Q8_0 || EK_FMT == EK_Q4_0 || EK_FMT == EK_Q5_0) {
    s.step[0] = s.step[1] = ek_f16((u16)p.s[0]);
    s.offset = EK_FMT == EK_Q4_0 ? 8 : EK_FMT == EK_Q5_0 ? 16 : 0;
  } else if constexpr (EK_HAS_PAIRS) {
    s.step[0] = s.step[1] = ek_f16lo(p.s[0]);
    s.minus = -ek_f16hi(p.s[0]);
    s.offset = 0;
  } else if constexpr (EK_FMT == EK_AFFINE4) {
    s.step[0] = s.step[1] = ek_f16lo(p.s[0]);
    s.offset = (int)(p.s[0] >> 16 & 0xffu);
  } else if constexpr (EK_HAS_SUPER_SCALES) {
    const u32 own = p.s[1] >> p.shift;
    s.step[0] = s.step[1] = ek_f16lo(p.s[0]) * (float)(own & 0xffu);
    s.minus = ek_f16hi(p.s[0]) * (float)(own >> 8 & 0xffu);
    s.offset = 0;
  } else {
    const float d = ek_f16((u16)p.s[1]);
    const u32 own = p.s[0] >> p.shift;
    s.step[0] = d * (float)((int)(own << 24) >> 24);
    s.step[1] = d * (float)((int)(own << 16) >> 24);
    s.offset = 32;
  }
  return s;
}

// The weight of byte b of ek_codes(p, i). 2^23 + n has n in its lowest bits, so that no conversion is needed: of n =
// code - offset in any case, be it 0, whose sign then is the step's, as that of the product it stands for.
EK_DEV float ek_weight(u32 codes, int b, const EkScale& s, int i) {
  constexpr u32 flip = EK_FMT == EK_Q8_0 ? 0x80808080u : 0u;  // signed to unsigned: 128 more
  constexpr float first = EK_FMT == EK_Q8_0 ? 8388608.0f + 128.0f : 8388608.0f;
  const float n = ek_asfloat(ek_perm(codes ^ flip, 0x4b000000u, 0x7540u | (u32)b)) - (first + (float)s.offset);
  const float step = s.step[EK_HAS_HALVES ? i >> 2 : 0];
  return EK_HAS_MINIMA ? n * step - s.minus : n * step;
}
