// y = W x for 9 to 32 tokens from quantised planes: weights are unpacked into shared memory and multiplied there by the
// matrix cores (common/mma.h), so that W is read once and nothing of it is written.
//
// A block has 64 rows of W and all tokens. It goes through the columns in steps of 128: each lane unpacks two groups of
// the 16 rows that its warp multiplies, to the same 16-bit numbers that dequant.h makes of them. A step's weights are
// under way while those before are unpacked and multiplied, its activations while they are multiplied. Where rows alone
// would not fill the card, several blocks (z) share the columns: their sums go to `parts`, and ek_gemm_merge adds them
// up.
//
//   EK_FMT, EK_GROUP  planes.h        EK_OUT  numbers.h
//   EK_F16            mma.h: 0 bfloat16, 1 float16, of x and of what weights become
//   EK_T              16 or 32: tokens that are computed; of those past `tokens` nothing is stored
#pragma once
#include "common/mma.h"
#include "gemm/epilogue.h"
#include "gemm/planes.h"

#ifndef EK_T
#define EK_T 16
#endif
static_assert(EK_T == 16 || EK_T == 32, "EK_T is 16 or 32");

struct EkGemm {
  EkPlanes w;
  const u16* x;   // [tokens][x_stride], 16-byte aligned rows
  float* parts;   // [splits][tokens][rows], where splits > 1
  i64 x_stride;   // elements
  EkFinish out;
  int steps;      // of 128 columns, of a block
  int splits;
};
static_assert(sizeof(EkGemm) == 120, "the mirror in Python has the same");

constexpr int EK_TILE_ROWS = 64, EK_STEP = 128, EK_STEP_GROUPS = EK_STEP / 32;
constexpr int EK_TILE_LD = EK_STEP + 8;        // rows begin 4 banks apart: fragments are read without conflicts
static_assert(EK_TILE_ROWS == 64, "16 rows for each of four warps");
constexpr int EK_SUMS_LD = EK_TILE_ROWS + 1;

// The block's shared memory: operands, and after the last step the sums.
union EkTile {
  struct {
    alignas(16) u16 w[EK_TILE_ROWS * EK_TILE_LD];
    alignas(16) u16 x[EK_T * EK_TILE_LD];
  } in;
  float sums[EK_T * EK_SUMS_LD];
};

// A lane's part of a step, as it was loaded.
struct EkWeightStep {
  EkPacked groups[2];
};
struct EkTokenStep {
  u32x4 vectors[EK_T / 8];
};

// Rows of a gated matrix are taken in pairs: 32 of the gate, and the 32 that they gate.
EK_DEV int ek_tile_column(bool is_gated, int local) {
  return is_gated ? EK_BX * (EK_TILE_ROWS / 2) + (local & (EK_TILE_ROWS / 2 - 1)) : EK_BX * EK_TILE_ROWS + local;
}
EK_DEV int ek_tile_row(bool is_gated, int columns, int local, int column) {
  return is_gated && local >= EK_TILE_ROWS / 2 ? columns + column : column;
}

// What lies past the last group is that one again, or some token of it: a condition here would be a place to wait at.
EK_DEV int ek_step_group(int step, int i) { return step * EK_STEP_GROUPS + 2 * i + (EK_TID & 1); }
EK_DEV int ek_step_column(int step) { return step * EK_STEP + (EK_TID & 15) * 8; }

EK_DEV void ek_load_weights(const EkGemm& p, const EkRow& row, int step, EkWeightStep& w) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    w.groups[i] = ek_fetch<true>(p.w, row, ek_min(ek_step_group(step, i), p.w.groups - 1));
  }
}
EK_DEV void ek_load_tokens(const EkGemm& p, int step, EkTokenStep& x) {
  const int column = ek_min(ek_step_column(step), p.w.groups * 32 - 8);
#pragma unroll
  for (int i = 0; i < EK_T / 8; i++) {
    const int token = ek_min((EK_TID >> 4) + 8 * i, p.out.tokens - 1);
    x.vectors[i] = *(const u32x4*)(p.x + (i64)token * p.x_stride + column);
  }
}

// In the tile it is zero: of both operands, as no product of NaN and zero may get in.
EK_DEV void ek_store_step(const EkGemm& p, int step, const EkWeightStep& w, const EkTokenStep& x, EkTile& tile) {
  u16* to = &tile.in.w[(EK_TID >> 1) * EK_TILE_LD + (EK_TID & 1) * 32];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    EkScale scale = ek_scale(w.groups[i]);
    if (ek_step_group(step, i) >= p.w.groups) scale.step[0] = scale.step[1] = scale.minus = 0.0f;
#pragma unroll
    for (int k = 0; k < 4; k++) {  // eight columns each
      u32 pair[4];
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const int word = 2 * k + (n >> 1), first = (n & 1) * 2;
        const u32 codes = ek_codes(w.groups[i], word);
        pair[n] = ek_pack<EK_F16>(ek_weight(codes, first, scale, word), ek_weight(codes, first + 1, scale, word));
      }
      *(u32x4*)(to + 64 * i + 8 * k) = u32x4{pair[0], pair[1], pair[2], pair[3]};
    }
  }
  const u32 kept = ek_step_column(step) < p.w.groups * 32 ? ~0u : 0u;
#pragma unroll
  for (int i = 0; i < EK_T / 8; i++) {
    const u32x4 v = x.vectors[i];
    *(u32x4*)&tile.in.x[((EK_TID >> 4) + 8 * i) * EK_TILE_LD + (EK_TID & 15) * 8] =
        u32x4{v.x & kept, v.y & kept, v.z & kept, v.w & kept};
  }
}

EK_DEV void ek_multiply_step(const EkTile& tile, EkC (&sums)[EK_T / 16]) {
  const int lane = EK_TID & 31, warp = EK_TID >> 5;
#pragma unroll
  for (int k = 0; k < EK_STEP / 16; k++) {
    EkB w;
    ek_ldBT(w, &tile.in.w[16 * warp * EK_TILE_LD + 16 * k], EK_TILE_LD, lane);
#pragma unroll
    for (int m = 0; m < EK_T / 16; m++) {
      EkA x;
      ek_ldA(x, &tile.in.x[16 * m * EK_TILE_LD + 16 * k], EK_TILE_LD, lane);
      ek_mma(sums[m], x, w, lane);
    }
  }
}

// A step, whose weights are `now`; asks for those of the next one, and for its activations.
EK_DEV void ek_do_step(const EkGemm& p, const EkRow& row, int step, int last, const EkWeightStep& now,
                       EkWeightStep& next, EkTokenStep& x, EkTile& tile, EkC (&sums)[EK_T / 16]) {
  const int following = ek_min(step + 1, last);
  ek_load_weights(p, row, following, next);
  EK_LOADS_STAY();
  EK_SYNC();
  ek_store_step(p, step, now, x, tile);
#ifndef EK_PLANT_BARRIER  // a fault for tests to find
  EK_SYNC();
#endif
  ek_load_tokens(p, following, x);
  EK_LOADS_STAY();
  ek_multiply_step(tile, sums);
}

// Grid: (rows / 64, rounded up; of a gated matrix half of the rows by 32, 1, splits).
EK_KERN_BLOCKS(128, 3) ek_gemm(EkGemm p) {
  EK_SMEM EkTile tile;
  const int lane = EK_TID & 31, warp = EK_TID >> 5;
  const bool is_gated = ek_is_gated(p.out);
  const int columns = ek_columns(p.out, p.w.rows);

  const int local = EK_TID >> 1;  // the row that this lane unpacks is one of its own warp's 16
  const int mine = ek_min(ek_tile_column(is_gated, local), columns - 1);
  const EkRow row = ek_row(p.w, ek_tile_row(is_gated, columns, local, mine));

  const int total = (p.w.groups + EK_STEP_GROUPS - 1) / EK_STEP_GROUPS;
  const int begin = EK_BZ * p.steps, end = ek_min(begin + p.steps, total);

  EkC sums[EK_T / 16];
#pragma unroll
  for (int m = 0; m < EK_T / 16; m++) {
#pragma unroll
    for (int i = 0; i < 8; i++) sums[m].r[i] = 0.0f;
  }
  EkWeightStep one, other;
  EkTokenStep x;
  ek_load_weights(p, row, begin, one);
  ek_load_tokens(p, begin, x);
  int step = begin;
  for (; step + 1 < end; step += 2) {
    ek_do_step(p, row, step, end - 1, one, other, x, tile, sums);
    ek_do_step(p, row, step + 1, end - 1, other, one, x, tile, sums);
  }
  if (step < end) ek_do_step(p, row, step, end - 1, one, other, x, tile, sums);

  EK_SYNC();
#pragma unroll
  for (int m = 0; m < EK_T / 16; m++) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      tile.sums[(16 * m + ek_c_row(lane, i)) * EK_SUMS_LD + 16 * warp + ek_c_col(lane, i)] = sums[m].r[i];
    }
  }
  EK_SYNC();

  if (p.splits > 1) {
    for (int i = EK_TID; i < EK_T * EK_TILE_ROWS; i += 128) {
      const int token = i / EK_TILE_ROWS, at = i % EK_TILE_ROWS, column = ek_tile_column(is_gated, at);
      if (token >= p.out.tokens || column >= columns) continue;
      const int to = ek_tile_row(is_gated, columns, at, column);
      p.parts[((i64)EK_BZ * p.out.tokens + token) * p.w.rows + to] = tile.sums[token * EK_SUMS_LD + at];
    }
    return;
  }
  const int shift = is_gated ? 5 : 6, width = 1 << shift;  // EK_TILE_ROWS columns, or half as many
  for (int i = EK_TID; i < EK_T * width; i += 128) {
    const int token = i >> shift, at = i & (width - 1), column = ek_tile_column(is_gated, at);
    if (token >= p.out.tokens || column >= columns) continue;
    const float* y = &tile.sums[token * EK_SUMS_LD + at];
    ek_finish(p.out, columns, token, column, y[0], is_gated ? y[EK_TILE_ROWS / 2] : 0.0f);
  }
}

// Grid: (columns of the output / 128, rounded up, tokens).
EK_KERN(128) ek_gemm_merge(EkGemm p) {
  const int columns = ek_columns(p.out, p.w.rows), column = EK_BX * 128 + EK_TID, token = EK_BY;
  if (column >= columns) return;
#ifndef EK_PLANT_PART  // a fault for tests to find
  const int splits = p.splits;
#else
  const int splits = p.splits - 1;
#endif
  float y = 0.0f, up = 0.0f;
  for (int k = 0; k < splits; k++) {
    const float* part = p.parts + ((i64)k * p.out.tokens + token) * p.w.rows + column;
    y += part[0];
    if (ek_is_gated(p.out)) up += part[columns];
  }
  ek_finish(p.out, columns, token, column, y, up);
}
