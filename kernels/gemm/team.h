// Which rows of a matrix a warp has, and how the sums of a block's warps become outputs: what gemv.h and wide_gemv.h
// have in common.
//
// A block has four warps. EK_SPLIT of them share the columns of the same rows where rows alone would not fill the card;
// their sums are added up through shared memory, in the same order each time.
//
//   EK_M              1, 2, 4 or 8: tokens that are computed; of those past `tokens` nothing is stored
//   EK_R              1, 2 or 4: rows of a warp; of a gated matrix half of them gate the others, so 2 at least
//   EK_SPLIT          1, 2 or 4
//
// In which order numbers are added up depends on EK_SPLIT alone, so a token comes out the same whoever is beside it.
#pragma once
#include "gemm/epilogue.h"

#ifndef EK_M
#define EK_M 1
#endif
#ifndef EK_R
#define EK_R 2
#endif
#ifndef EK_SPLIT
#define EK_SPLIT 1
#endif
static_assert(EK_M == 1 || EK_M == 2 || EK_M == 4 || EK_M == 8, "EK_M is 1, 2, 4 or 8");
static_assert(EK_R == 1 || EK_R == 2 || EK_R == 4, "EK_R is 1, 2 or 4");
static_assert(EK_SPLIT == 1 || EK_SPLIT == 2 || EK_SPLIT == 4, "EK_SPLIT is 1, 2 or 4");

constexpr int EK_WARPS = 4, EK_TEAMS = EK_WARPS / EK_SPLIT;
constexpr int EK_SUMS = EK_R * EK_M;  // of a lane: row after row, the tokens of each side by side
constexpr int EK_TEAM_BLOCKS = EK_M >= 4 ? 3 : 1;  // on a multiprocessor: else many tokens' numbers take all registers
static_assert(EK_SUMS <= 32 && EK_TEAMS * EK_SUMS <= 32 * EK_WARPS, "a lane for each sum");

struct EkTeam {
  bool is_gated;
  int columns;  // of the output
  int each;     // columns of a warp
  int first;    // of them, this warp's; may lie past the end
  int part;     // of the rows' columns, this warp's
};

// Grid: (columns of the output / (EK_TEAMS * EK_R, of a gated matrix half of that), rounded up).
EK_DEV EkTeam ek_team(const EkFinish& out, int rows) {
  const int warp = EK_TID >> 5;
  EkTeam t;
  t.is_gated = ek_is_gated(out);
  t.columns = ek_columns(out, rows);
  t.each = t.is_gated ? EK_R / 2 : EK_R;
  t.first = (EK_BX * EK_TEAMS + warp / EK_SPLIT) * t.each;
  t.part = warp % EK_SPLIT;
  return t;
}

// The matrix's row that is number r of this warp: past the end the last one again, of which nothing is stored.
EK_DEV int ek_team_row(const EkTeam& t, int r) {
  const bool is_up = t.is_gated && r >= EK_R / 2;
  const int column = ek_min(t.first + (is_up ? r - EK_R / 2 : r), t.columns - 1);
  return is_up ? t.columns + column : column;
}

// Totals over the warp of N values a lane, N a power of two up to 32: value i ends as v[0] of lane 32 / N * i. Each
// step halves the values, as a lane hands on those that its partner keeps: 31 exchanges for 32 values, not 160.
template <int N, int MASK = 16>
EK_DEV void ek_sum_lanes(float (&v)[N], int lane) {
  constexpr int LEFT = N * MASK / 32;  // values that are kept; 0: there was but one left
  if constexpr (LEFT > 0) {
    const bool is_upper = (lane & MASK) != 0;
#pragma unroll
    for (int i = 0; i < LEFT; i++) {
      const float kept = is_upper ? v[i + LEFT] : v[i], sent = is_upper ? v[i] : v[i + LEFT];
      v[i] = kept + ek_shfl_xor(sent, MASK);
    }
  } else {
    v[0] += ek_shfl_xor(v[0], MASK);
  }
  if constexpr (MASK > 1) ek_sum_lanes<N, MASK / 2>(v, lane);
}

// All threads of the block, with the sums of each lane.
EK_DEV void ek_team_finish(float (&totals)[EK_WARPS][EK_SUMS], float (&y)[EK_SUMS], const EkTeam& team,
                           const EkFinish& out) {
  constexpr int SHARE = 32 / EK_SUMS;  // lanes for each sum
  const int lane = EK_TID & 31;
  ek_sum_lanes(y, lane);
  if (lane % SHARE == 0) totals[EK_TID >> 5][lane / SHARE] = y[0];
#ifndef EK_PLANT_BARRIER  // a fault for tests to find
  EK_SYNC();
#endif

  const int of = EK_TID / EK_SUMS, r = EK_TID % EK_SUMS / EK_M, t = EK_TID % EK_M;
  const int column = (EK_BX * EK_TEAMS + of) * team.each + r;
  if (of >= EK_TEAMS || r >= team.each || column >= team.columns || t >= out.tokens) return;
  float total = 0.0f, up = 0.0f;
#pragma unroll
  for (int k = 0; k < EK_SPLIT; k++) {
    total += totals[of * EK_SPLIT + k][r * EK_M + t];
    if (team.is_gated) up += totals[of * EK_SPLIT + k][(r + EK_R / 2) * EK_M + t];
  }
  ek_finish(out, team.columns, t, column, total, up);
}
