// y = W x for one to eight tokens, of a matrix of plain numbers: what decoding is made of where nothing is quantised,
// and logits where the head is not.
//
// Bound by the bytes of W: a lane takes vectors of 16 bytes of EK_R rows, for all EK_M tokens, and the next ones are on
// their way while it works on these, as in gemv.h. Products are added up in float32, and are float32 themselves.
//
//   EK_W      weights: 0 bfloat16, 1 float16, 2 float32        EK_ACT  common/act.h: activations
//   EK_OUT    numbers.h                                        EK_M, EK_R, EK_SPLIT  team.h
#pragma once
#include "common/act.h"
#include "gemm/team.h"

#ifndef EK_W
#define EK_W 0
#endif
static_assert(EK_W >= 0 && EK_W <= 2, "EK_W is 0 bf16, 1 f16 or 2 f32");

constexpr int EK_VECTOR = EK_W == 2 ? 4 : 8;  // columns of a lane's 16 bytes

struct EkWideGemv {
  u64 w;                   // [rows][w_stride]
  const u8* x;             // [tokens][x_stride]; a pointer, so that it stays in the L1 cache: many warps read it
  i64 w_stride, x_stride;  // bytes, multiples of 16
  EkFinish out;
  int rows, vectors;       // columns / EK_VECTOR
};
static_assert(sizeof(EkWideGemv) == 72, "the mirror in Python has the same");

constexpr int EK_X_BYTES = EK_M * EK_VECTOR * EK_ACT_BYTES;  // a lane's activations, which are registers
constexpr bool EK_X_EARLY = EK_X_BYTES <= 32;                // there is room for those of two vectors
constexpr int EK_WIDE_BLOCKS = EK_X_BYTES > 128 ? 2 : EK_TEAM_BLOCKS;

// A lane's columns as they were loaded.
struct EkPiece {
  u32x4 w[EK_R];
  EkWords<EK_ACT, EK_VECTOR> x[EK_M];
};

// Past the end it is the last vector again: a condition here would be a place to wait at.
EK_DEV void ek_load_activations(const EkWideGemv& p, int vector, EkPiece& piece) {
  const i64 at = (i64)ek_min(vector, p.vectors - 1) * (EK_VECTOR * EK_ACT_BYTES);
#pragma unroll
  for (int t = 0; t < EK_M; t++) ek_load_words(p.x + (i64)ek_min(t, p.out.tokens - 1) * p.x_stride + at, piece.x[t]);
}
EK_DEV void ek_load_weights(const EkWideGemv& p, const u64 (&row)[EK_R], int vector, EkPiece& piece) {
  const u64 at = (u64)ek_min(vector, p.vectors - 1) * 16;
#pragma unroll
  for (int r = 0; r < EK_R; r++) piece.w[r] = ek_ldg16(row[r] + at);
}

// Asks for the vectors after `vector`, which is `now`.
EK_DEV void ek_load_next(const EkWideGemv& p, const u64 (&row)[EK_R], int vector, EkPiece& now, EkPiece& next) {
  constexpr int STEP = 32 * EK_SPLIT;
  if constexpr (EK_X_EARLY) ek_load_activations(p, vector + STEP, next);
  else ek_load_activations(p, vector, now);
  EK_LOADS_STAY();
  ek_load_weights(p, row, vector + STEP, next);
  EK_LOADS_STAY();
}

// Adds up a piece, if it is one.
EK_DEV void ek_use_piece(const EkPiece& piece, bool is_piece, float (&y)[EK_SUMS]) {
  float w[EK_R][EK_VECTOR];
#pragma unroll
  for (int r = 0; r < EK_R; r++) ek_unpack<EK_W>(piece.w[r], w[r]);
#pragma unroll
  for (int t = 0; t < EK_M; t++) {
    float x[EK_VECTOR];
    ek_unpack_words(piece.x[t], x);
#pragma unroll
    for (int r = 0; r < EK_R; r++) {
      float more = y[r * EK_M + t];
#pragma unroll
      for (int e = 0; e < EK_VECTOR; e++) more = ek_fma(w[r][e], x[e], more);
      y[r * EK_M + t] = is_piece ? more : y[r * EK_M + t];
      ek_settle(y[r * EK_M + t]);
    }
  }
}

// Grid: team.h.
EK_KERN_BLOCKS(128, EK_WIDE_BLOCKS) ek_wide_gemv(EkWideGemv p) {
  EK_SMEM float totals[EK_WARPS][EK_SUMS];
  const EkTeam team = ek_team(p.out, p.rows);
  u64 row[EK_R];
#pragma unroll
  for (int r = 0; r < EK_R; r++) row[r] = p.w + (u64)((i64)ek_team_row(team, r) * p.w_stride);

  float y[EK_SUMS];
#pragma unroll
  for (int i = 0; i < EK_SUMS; i++) y[i] = 0.0f;

  constexpr int STEP = 32 * EK_SPLIT;
  int vector = team.part * 32 + (EK_TID & 31);
  EkPiece one, other;
  if constexpr (EK_X_EARLY) ek_load_activations(p, vector, one);
  ek_load_weights(p, row, vector, one);
  while (vector < p.vectors) {
    ek_load_next(p, row, vector, one, other);
    ek_use_piece(one, true, y);
    vector += STEP;
    EK_LOADS_STAY();
    ek_load_next(p, row, vector, other, one);
    ek_use_piece(other, vector < p.vectors, y);
    vector += STEP;
  }
  ek_team_finish(totals, y, team, p.out);
}
