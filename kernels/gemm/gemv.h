// y = W x for one to eight tokens, straight from quantised planes: what decoding is made of.
//
// Bound by the bytes of W, so a weight has to cost next to nothing: four at a time are multiplied with int8 activations
// (int8_rows.h) by one integer dot product, which every card since sm_75 and gfx1030 has. In float16 pairs it would be
// twice the instructions, and four times as many to get the codes there.
//
//   x = r b, w = step (q - offset) - minus:   w.x = r (step (q.b - offset sum(b)) - minus sum(b))
//
// A lane takes groups of 32 columns of EK_R rows, for all EK_M tokens. While it works on a group, the next one is on
// its way: two take turns, each in registers of its own, since to hand them on would be to wait for them. AMD's cards
// finish loads in the order in which they were asked for, so that to wait for one is to wait for all before it.
// Activations are therefore asked for just before the weights of the next group or, of few tokens, with them.
//
//   EK_FMT, EK_GROUP  planes.h        EK_M, EK_R, EK_SPLIT  team.h        EK_OUT  numbers.h
#pragma once
#include "gemm/int8_rows.h"
#include "gemm/planes.h"
#include "gemm/team.h"

struct EkGemv {
  EkPlanes w;
  EkInt8 x;
  EkFinish out;
};
static_assert(sizeof(EkGemv) == 104, "the mirror in Python has the same");

// Integer sums start at the bits of 1.5 * 2^23: as floats they are as much larger as the sum is, up to 2^22 either way,
// and need no conversion, which is slow. 32 columns of 255 * 127 are a quarter of that.
constexpr int EK_DOT_START = 0x4b400000;
EK_DEV float ek_dot_value(int dot) { return ek_asfloat((u32)dot) - 12582912.0f; }

// A group's w.x, but for the scale of x.
EK_DEV float ek_group_dot(const u32 (&codes)[8], const EkScale& s, const EkInt8Group& x) {
  if constexpr (EK_HAS_HALVES) {
    int low = EK_DOT_START - s.offset * ek_int8_sum(x, 0), high = EK_DOT_START - s.offset * ek_int8_sum(x, 1);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      low = ek_dot4(low, codes[i], x.q[i]);
      high = ek_dot4(high, codes[i + 4], x.q[i + 4]);
    }
    return ek_fma(s.step[1], ek_dot_value(high), s.step[0] * ek_dot_value(low));
  } else {
    const int sum = ek_int8_sum(x, 0) + ek_int8_sum(x, 1);
    int dot = EK_DOT_START - s.offset * sum;
#pragma unroll
    for (int i = 0; i < 8; i++) dot = ek_dot4(dot, codes[i], x.q[i]);
    const float y = s.step[0] * ek_dot_value(dot);
    return EK_HAS_MINIMA ? ek_fma(-s.minus, (float)sum, y) : y;
  }
}

// A group of q6_K has two steps, one of q8_0 twice the codes, and with four rows of it there are no registers for a
// third block.
constexpr bool EK_GROUPS_ARE_LARGE = EK_HAS_HALVES || EK_FMT == EK_Q8_0;
constexpr int EK_GEMV_BLOCKS = EK_GROUPS_ARE_LARGE && EK_R == 4 && EK_M >= 4 ? 2 : EK_TEAM_BLOCKS;

constexpr bool EK_X_EARLY = EK_M <= 2;  // there are registers for two groups' activations

// A lane's columns as they were loaded.
struct EkPiece {
  EkPacked w[EK_R];
  EkInt8Group x[EK_M];
};

// Past the end it is the last group again: a condition here would be a place to wait at.
EK_DEV void ek_load_activations(const EkGemv& p, int group, EkPiece& piece) {
  const int at = ek_min(group, p.w.groups - 1);
#pragma unroll
  for (int t = 0; t < EK_M; t++) piece.x[t] = ek_int8_group(p.x, ek_min(t, p.out.tokens - 1), p.w.groups, at);
}
EK_DEV void ek_load_weights(const EkGemv& p, const EkRow (&row)[EK_R], int group, EkPiece& piece) {
  const int at = ek_min(group, p.w.groups - 1);
#pragma unroll
  for (int r = 0; r < EK_R; r++) piece.w[r] = ek_fetch(p.w, row[r], at);
}

// Asks for the group after `group`, which is `now`.
EK_DEV void ek_load_next(const EkGemv& p, const EkRow (&row)[EK_R], int group, EkPiece& now, EkPiece& next) {
  constexpr int STEP = 32 * EK_SPLIT;
  if constexpr (EK_X_EARLY) ek_load_activations(p, group + STEP, next);
  else ek_load_activations(p, group, now);
  EK_LOADS_STAY();
  ek_load_weights(p, row, group + STEP, next);
  EK_LOADS_STAY();
}

// Adds up a piece, if it is one.
EK_DEV void ek_use_piece(const EkPiece& piece, bool is_piece, float (&y)[EK_SUMS]) {
  u32 codes[EK_R][8];
  EkScale scale[EK_R];
#pragma unroll
  for (int r = 0; r < EK_R; r++) {
    scale[r] = ek_scale(piece.w[r]);
#pragma unroll
    for (int i = 0; i < 8; i++) codes[r][i] = ek_codes(piece.w[r], i);
  }
#pragma unroll
  for (int t = 0; t < EK_M; t++) {
#pragma unroll
    for (int r = 0; r < EK_R; r++) {
      float& sum = y[r * EK_M + t];
      const float more = ek_fma(ek_group_dot(codes[r], scale[r], piece.x[t]), ek_int8_scale(piece.x[t]), sum);
      sum = is_piece ? more : sum;
      ek_settle(sum);
    }
  }
}

// Grid: team.h.
EK_KERN_BLOCKS(128, EK_GEMV_BLOCKS) ek_gemv(EkGemv p) {
  EK_SMEM float totals[EK_WARPS][EK_SUMS];
  const EkTeam team = ek_team(p.out, p.w.rows);
  EkRow row[EK_R];
#pragma unroll
  for (int r = 0; r < EK_R; r++) row[r] = ek_row(p.w, ek_team_row(team, r));

  float y[EK_SUMS];
#pragma unroll
  for (int i = 0; i < EK_SUMS; i++) y[i] = 0.0f;

  constexpr int STEP = 32 * EK_SPLIT;
  int group = team.part * 32 + (EK_TID & 31);
  EkPiece one, other;
  if constexpr (EK_X_EARLY) ek_load_activations(p, group, one);
  ek_load_weights(p, row, group, one);
  while (group < p.w.groups) {
    ek_load_next(p, row, group, one, other);
    ek_use_piece(one, true, y);
    group += STEP;
    EK_LOADS_STAY();
    ek_load_next(p, row, group, other, one);
    ek_use_piece(other, group < p.w.groups, y);
    group += STEP;
  }
  ek_team_finish(totals, y, team, p.out);
}
