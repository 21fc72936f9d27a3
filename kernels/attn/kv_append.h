// A step's queries, keys and values as the projections leave them: queries and keys are normalised (where the model has
// QK-norm), rotated to their positions, and for int4 by a Hadamard matrix too; then queries are written for attention
// to read, and keys and values into the cache, in its format.
//
// A head of a token (a row) is had by EK_KV_LANES lanes, as the cache's vectors are. RoPE is the half-split form: the
// partner of a number is half of the rotated dimensions away, with another lane of the warp, so that rows go through
// shared memory. Everything in between is float32; what is written is rounded once.
//
// Queries may be written where they were read: only the lanes that have a row read it, all of it before they write.
//
// The Hadamard matrix spreads what single channels of keys have too much of, so that 4 bits suffice; products of
// queries and keys that were both rotated by it are the same (QuaRot, arXiv:2404.00456). Its order is the largest power
// of two that divides the head: 32 for 96.
//
//   grid   rows of all tokens / EK_APPEND_ROWS
#pragma once
#include "common/act.h"
#include "attn/row_lanes.h"

constexpr int EK_APPEND_THREADS = 128;
constexpr int EK_APPEND_ROWS = EK_APPEND_THREADS / EK_KV_LANES;
constexpr int EK_HADAMARD = EK_D & -EK_D;

struct EkKvAppend {
  EkKv kv;
  u64 q, k, v;             // activations [tokens, heads, head_dim], with so many bytes from a token to the next:
  i64 q_stride, k_stride, v_stride;
  u64 q_out;               // activations [tokens, q_heads, head_dim], with q_out_stride; may be q itself
  i64 q_out_stride;
  u64 q_norm, k_norm;      // float32 [head_dim], what a normalised row is multiplied with; 0: no norm
  const float* rope;       // [rows, 2, rope_dim / 2] cosines and sines; null: no RoPE
  const int* rope_rows;    // [tokens]: a token's row of these; null: its own number
  const int* positions;    // [tokens]; below 0: the token is none, and nothing is written
  const int* table_rows;   // [tokens]: a token's row of the block table; null: its own number
  const int* block_table;  // [rows, table_stride]
  int tokens, q_heads, table_stride, rope_dim;
  int hadamard;            // 1: queries and keys are rotated by it
  float eps;
};
static_assert(sizeof(EkKvAppend) == 208, "the mirror in Python has the same");

enum EkAppendKind { EK_QUERY, EK_KEY, EK_VALUE };

EK_DEV void ek_append_norm(float (&x)[EK_KV_ELEMS], u64 weight, float eps, int piece) {
  float squares = 0.0f;
#pragma unroll
  for (int e = 0; e < EK_KV_ELEMS; e++) squares = ek_fma(x[e], x[e], squares);
  const float factor = ek_rsqrt(ek_row_sum(squares) / (float)EK_D + eps);
  if (weight == 0 || piece >= EK_KV_VECS) return;
#pragma unroll
  for (int e = 0; e < EK_KV_ELEMS; e += 4) {
    const u32x4 w = ek_ldg16(weight + (u64)((piece * EK_KV_ELEMS + e) * 4));
    x[e] *= factor * ek_asfloat(w.x);
    x[e + 1] *= factor * ek_asfloat(w.y);
    x[e + 2] *= factor * ek_asfloat(w.z);
    x[e + 3] *= factor * ek_asfloat(w.w);
  }
}

// x is piece `piece` of `row`; `angles` has the position's cosines, then its sines.
EK_DEV void ek_append_rotate(float (&x)[EK_KV_ELEMS], const float* row, const float* angles, int rope_dim, int piece) {
  const int half = rope_dim / 2;
#pragma unroll
  for (int e = 0; e < EK_KV_ELEMS; e++) {
    const int d = piece * EK_KV_ELEMS + e;
    if (d >= rope_dim) continue;
    const bool is_low = d < half;
    const int angle = is_low ? d : d - half;
    const float partner = row[is_low ? d + half : d - half];
    x[e] = ek_fma(is_low ? -partner : partner, angles[half + angle], x[e] * angles[angle]);
  }
}

// Butterflies within a lane, then between lanes: numbers i and i ^ step become their sum and their difference.
EK_DEV void ek_append_hadamard(float (&x)[EK_KV_ELEMS], int piece) {
  constexpr int IN_LANE = EK_KV_ELEMS < EK_HADAMARD ? EK_KV_ELEMS : EK_HADAMARD;
#pragma unroll
  for (int step = 1; step < IN_LANE; step <<= 1) {
#pragma unroll
    for (int e = 0; e < EK_KV_ELEMS; e++) {
      if (e & step) continue;
      const float a = x[e], b = x[e + step];
      x[e] = a + b;
      x[e + step] = a - b;
    }
  }
#pragma unroll
  for (int step = 1; step < EK_HADAMARD / EK_KV_ELEMS; step <<= 1) {
#pragma unroll
    for (int e = 0; e < EK_KV_ELEMS; e++) {
      const float other = ek_shfl_xor(x[e], step);
      x[e] = (piece & step) ? other - x[e] : x[e] + other;
    }
  }
  // 1 / sqrt(order): the matrix is then its own inverse.
  constexpr float NORM = EK_HADAMARD == 32    ? 0.17677669529663687f
                         : EK_HADAMARD == 64  ? 0.125f
                         : EK_HADAMARD == 128 ? 0.08838834764831845f
                                              : 0.0625f;
#pragma unroll
  for (int e = 0; e < EK_KV_ELEMS; e++) x[e] *= NORM;
}

// The scale of a row from all of its lanes; a lane without a piece has zeros, which count as one of the row's numbers
// only where they change nothing.
EK_DEV EkKvScale ek_append_fit(const float (&x)[EK_KV_ELEMS], int piece) {
  if constexpr (EK_KV_SCALE == 0) return {1.0f, 0.0f};
  float least = x[0], most = x[0], sum = 0.0f;
#pragma unroll
  for (int e = 0; e < EK_KV_ELEMS; e++) {
    least = ek_min(least, x[e]);
    most = ek_max(most, x[e]);
    sum += x[e];
  }
  const bool has_piece = piece < EK_KV_VECS;
  least = -ek_row_max(has_piece ? -least : -3.402823466e38f);
  most = ek_row_max(has_piece ? most : -3.402823466e38f);
  return ek_kv_fit(least, most, ek_row_sum(sum));
}

EK_KERN(EK_APPEND_THREADS) ek_kv_append(EkKvAppend p) {
  EK_SMEM float rows[EK_APPEND_ROWS][EK_D];
  const int own = EK_TID / EK_KV_LANES, piece = EK_TID % EK_KV_LANES;
  const int heads = p.q_heads + 2 * p.kv.kv_heads, row = EK_BX * EK_APPEND_ROWS + own;
  const bool is_there = row < p.tokens * heads;
  const int token = is_there ? row / heads : 0, place = is_there ? row % heads : 0;
  const int position = p.positions[token];
  // Lanes that have nothing to do go along: all of a warp take part in sums.
  const bool has_piece = is_there && position >= 0 && piece < EK_KV_VECS;

  const EkAppendKind kind = place < p.q_heads                  ? EK_QUERY
                            : place < p.q_heads + p.kv.kv_heads ? EK_KEY
                                                                : EK_VALUE;
  const int head = kind == EK_QUERY ? place : kind == EK_KEY ? place - p.q_heads : place - p.q_heads - p.kv.kv_heads;
  const u64 from = kind == EK_QUERY ? p.q + (u64)(token * p.q_stride)
                   : kind == EK_KEY ? p.k + (u64)(token * p.k_stride)
                                    : p.v + (u64)(token * p.v_stride);
  float x[EK_KV_ELEMS] = {};
  if (has_piece) ek_act_load<true>(from + (u64)((head * EK_D + piece * EK_KV_ELEMS) * EK_ACT_BYTES), x);

  if (p.q_norm != 0 || p.k_norm != 0) {
    ek_append_norm(x, kind == EK_QUERY ? p.q_norm : kind == EK_KEY ? p.k_norm : 0, p.eps, piece);
  }
  if (p.rope != nullptr) {
    if (piece < EK_KV_VECS) {
#pragma unroll
      for (int e = 0; e < EK_KV_ELEMS; e++) rows[own][piece * EK_KV_ELEMS + e] = x[e];
    }
#ifndef EK_PLANT_BARRIER  // a fault for tests to find
    EK_WARP_SYNC();
#endif
    if (has_piece && kind != EK_VALUE) {
      const i64 angles = p.rope_rows != nullptr ? p.rope_rows[token] : token;
      ek_append_rotate(x, rows[own], p.rope + angles * p.rope_dim, p.rope_dim, piece);
    }
  }
  if (p.hadamard) {
    float rotated[EK_KV_ELEMS];
#pragma unroll
    for (int e = 0; e < EK_KV_ELEMS; e++) rotated[e] = x[e];
    ek_append_hadamard(rotated, piece);
#pragma unroll
    for (int e = 0; e < EK_KV_ELEMS; e++) x[e] = kind == EK_VALUE ? x[e] : rotated[e];
  }

  const EkKvScale scale = ek_append_fit(x, piece);
  if (!has_piece) return;
  if (kind == EK_QUERY) {
    const int at = head * EK_D + piece * EK_KV_ELEMS;
    ek_act_store(p.q_out + (u64)(token * p.q_out_stride) + (u64)(at * EK_ACT_BYTES), x);
    return;
  }
  const i64 table_row = p.table_rows != nullptr ? p.table_rows[token] : token;
  const int number = p.block_table[table_row * p.table_stride + position / EK_BS];
  const u64 block = ek_kv_block(p.kv, number);
  const int slot = position % EK_BS;
  const u64 head_rows = kind == EK_KEY ? ek_kv_keys(p.kv, block, head) : ek_kv_values(p.kv, block, head);
  const u64 scales = kind == EK_KEY ? ek_kv_key_scales(p.kv, block, head) : ek_kv_value_scales(p.kv, block, head);
  ek_kv_store(head_rows + (u64)(slot * EK_KV_ROW), piece, ek_kv_encode(x, scale));
  if (piece == 0) ek_kv_store_scale(scales, slot, scale);
}
