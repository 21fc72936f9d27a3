// Which way round attention's two products of matrices are made, so that the weights go from the first to the second in
// registers, whatever the card's order of fragments (common/mma.h).
//
//   NVIDIA         S = Q K^T    O = P V         queries are rows: what a lane has of S, packed, is its operand A of P
//   the others   S^T = K Q^T  O^T = V^T P^T     queries are columns: a lane has one query, and its operand B of P^T is
//                                               what it has of S^T, packed; but for gfx12 the halves of the warp first
//                                               tell each other theirs
//
// In shared memory, queries and keys are [row][number of the head]. So are values on NVIDIA, whose loads can transpose;
// for the others they are [number of the head][token].
#pragma once
#include "common/kv.h"
#include "common/mma.h"

constexpr bool EK_TURNED = EK_ORDER != 80;
constexpr int EK_OWN = EK_TURNED ? 1 : 2;  // queries of a lane

// Nothing is moved across by the compiler. AMD's would load all operands of a product before it begins, and have no
// registers left for them.
EK_DEV void ek_in_turn() {
#if EK_HIP
  __builtin_amdgcn_sched_barrier(0);
#endif
}

// Here it is computed, and not where it is used: products that are put off keep their operands in registers.
EK_DEV void ek_settle(EkC& c) {
#if EK_HIP
#pragma unroll
  for (int i = 0; i < 8; i++) __asm__ volatile("" : "+v"(c.r[i]));
#endif
}

EK_DEV u32 ek_operands(float low, float high) { return EK_F16 ? ek_pack_f16(low, high) : ek_pack_bf16(low, high); }

// Of number i of a lane's eight: which of the lane's queries it is of, and which of 16 keys, or of 16 of the head.
EK_DEV constexpr int ek_own_of(int i) { return EK_TURNED ? 0 : i >> 1 & 1; }
EK_DEV int ek_key_of(int lane, int i) { return EK_TURNED ? ek_c_row(lane, i) : ek_c_col(lane, i); }
// Which of the warp's 16 a lane's query is.
EK_DEV int ek_query_of(int lane, int own) { return EK_TURNED ? ek_c_col(lane, 0) : ek_c_row(lane, 2 * own); }

// Over the lanes that share a query.
EK_DEV float ek_query_max(float x) {
  if constexpr (EK_TURNED) return ek_max(x, ek_shfl_xor(x, 16));
  x = ek_max(x, ek_shfl_xor(x, 1));
  return ek_max(x, ek_shfl_xor(x, 2));
}
EK_DEV float ek_query_sum(float x) {
  if constexpr (EK_TURNED) return x + ek_shfl_xor(x, 16);
  x += ek_shfl_xor(x, 1);
  return x + ek_shfl_xor(x, 2);
}

#if EK_ORDER == 80

typedef EkA EkQueries;
typedef EkB EkKeys;
typedef EkA EkWeights;

EK_DEV void ek_ld_queries(EkQueries& q, const u16* from, int stride, int lane) { ek_ldA(q, from, stride, lane); }
EK_DEV void ek_ld_keys(EkKeys& k, const u16* from, int stride, int lane) { ek_ldBT(k, from, stride, lane); }
EK_DEV void ek_score(EkC& s, const EkQueries& q, const EkKeys& k, int lane) { ek_mma(s, q, k, lane); }

EK_DEV void ek_weights(EkWeights& w, const EkC& p, int) {
#pragma unroll
  for (int i = 0; i < 4; i++) w.r[i] = ek_operands(p.r[2 * i], p.r[2 * i + 1]);
}

// Adds 16 numbers of the head for the warp's 16 queries; `values` is those of 16 tokens.
EK_DEV void ek_add_values(EkC& o, const EkWeights& w, const u16* values, int stride, int lane) {
  EkB v;
  ek_ldB(v, values, stride, lane);
  ek_mma(o, w, v, lane);
}

#else

typedef EkB EkQueries;
typedef EkA EkKeys;
typedef EkB EkWeights;

EK_DEV void ek_ld_queries(EkQueries& q, const u16* from, int stride, int lane) { ek_ldBT(q, from, stride, lane); }
EK_DEV void ek_ld_keys(EkKeys& k, const u16* from, int stride, int lane) { ek_ldA(k, from, stride, lane); }
EK_DEV void ek_score(EkC& s, const EkQueries& q, const EkKeys& k, int lane) { ek_mma(s, k, q, lane); }

EK_DEV void ek_weights(EkWeights& w, const EkC& p, int lane) {
  const bool is_upper = lane >= 16;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 own = ek_operands(p.r[2 * i], p.r[2 * i + 1]);
    if constexpr (EK_ORDER == 12) {
      w.r[i] = own;
    } else {
      const u32 other = ek_shfl_xor(own, 16);
      const u32 lower = is_upper ? other : own, upper = is_upper ? own : other;
      if constexpr (EK_ORDER == 10) {  // the lower half has keys 0-7
        w.r[i] = lower, w.r[i + 4] = upper;
      } else {  // the lower half has the even keys
        w.r[2 * i] = ek_perm(lower, upper, 0x5410), w.r[2 * i + 1] = ek_perm(lower, upper, 0x7632);
      }
    }
  }
}

EK_DEV void ek_add_values(EkC& o, const EkWeights& w, const u16* values, int stride, int lane) {
  EkA v;
  ek_ldA(v, values, stride, lane);
  ek_mma(o, v, w, lane);
}

#endif
