// act(gate) * up of a gated MLP (Shazeer, arXiv:2002.05202), where no matrix kernel has done it on its way.
//
//   -DEK_GATE=0   silu(x) = x / (1 + exp(-x))
//   -DEK_GATE=1   gelu in its tanh form: 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
//   grid   rows, width / 2048 rounded up: there may be more than 65,535 rows
//
// The activated gate is rounded to the activations' type before the product, as it is where torch does one after the
// other. `out` may be where gate or up is.
#pragma once
#include "common/act.h"

#ifndef EK_GATE
#define EK_GATE 0
#endif
static_assert(EK_GATE == 0 || EK_GATE == 1, "EK_GATE is 0 silu or 1 gelu");

constexpr int EK_GATED_THREADS = 256;

struct EkGated {
  u64 gate, up, out;                     // activations [rows, width]
  i64 gate_stride, up_stride, out_stride;  // bytes from row to row, multiples of 16
  int width;                             // a multiple of 8
  int unused;
};
static_assert(sizeof(EkGated) == 56, "the mirror in Python has the same");

// exp(-x) may be infinite: then the quotient is 0, as it should be.
EK_DEV float ek_gate(float x) {
  float u = x * 1.4426950408889634f;                                                         // 1 / ln 2
  if constexpr (EK_GATE == 1) u = ek_fma(x * x * x, 0.044715f, x) * 2.3022081985f;  // 2 sqrt(2 / pi) / ln 2
  return x * ek_rcp(1.0f + ek_exp2(-u));
}

EK_KERN(EK_GATED_THREADS) ek_gated(EkGated p) {
  const i64 row = EK_BX;
  const int column = (EK_BY * EK_GATED_THREADS + EK_TID) * 8;
  if (column >= p.width) return;
  const u64 at = (u64)(column * EK_ACT_BYTES);
  float gate[8], up[8];
  ek_act_load<true>(p.gate + (u64)(row * p.gate_stride) + at, gate);
  ek_act_load<true>(p.up + (u64)(row * p.up_stride) + at, up);
#pragma unroll
  for (int e = 0; e < 8; e++) {
    const float x = ek_gate(gate[e]);
    gate[e] = (EK_ACT == 0 ? ek_bf16(ek_tobf16(x)) : EK_ACT == 1 ? ek_f16(ek_tof16(x)) : x) * up[e];
  }
  ek_act_store(p.out + (u64)(row * p.out_stride) + at, gate);
}
