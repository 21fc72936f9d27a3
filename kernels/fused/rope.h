// RoPE over the heads of q and k (Su et al., arXiv:2104.09864, half-split form), in place, where kv_append does not do
// it.
//
// Numbers i and i + rope_dim / 2 of a head are a pair, turned by the angle that a table from the host has for the
// token: [rows][cosines, then sines] float32, rope_dim / 2 of each. Numbers from rope_dim on stay as they are.
//
//   grid   tokens
#pragma once
#include "common/act.h"

constexpr int EK_ROPE_THREADS = 128;

struct EkRope {
  u64 q, k;               // activations [tokens][heads][head_dim]
  const float* table;     // [rows, rope_dim]
  const int* rows;        // [tokens]: a token's row of the table; null: its own number
  i64 q_stride, k_stride;  // bytes from token to token, multiples of 16
  i64 table_stride;       // numbers from row to row
  int q_heads, k_heads;
  int head_dim, rope_dim;  // multiples of 16
};
static_assert(sizeof(EkRope) == 72, "the mirror in Python has the same");

EK_KERN(EK_ROPE_THREADS) ek_rope(EkRope p) {
  const int token = EK_BX, half = p.rope_dim / 2, vectors = half / 8;
  const i64 row = p.rows != nullptr ? p.rows[token] : token;
  const float* cosines = p.table + row * p.table_stride;
  const float* sines = cosines + half;
  for (int i = EK_TID; i < (p.q_heads + p.k_heads) * vectors; i += EK_ROPE_THREADS) {
    const int head = i / vectors, first = i % vectors * 8;
    const bool of_q = head < p.q_heads;
    const u64 heads = of_q ? p.q + (u64)(token * p.q_stride) : p.k + (u64)(token * p.k_stride);
    const u64 at = heads + (u64)(((of_q ? head : head - p.q_heads) * p.head_dim + first) * EK_ACT_BYTES);
    const u64 beyond = at + (u64)(half * EK_ACT_BYTES);
    float a[8], b[8];
    ek_act_load<true>(at, a);
    ek_act_load<true>(beyond, b);
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const float x = a[e], y = b[e], cosine = cosines[first + e], sine = sines[first + e];
      a[e] = ek_fma(-y, sine, x * cosine);
      b[e] = ek_fma(x, sine, y * cosine);
    }
    ek_act_store(at, a);
    ek_act_store(beyond, b);
  }
}
