// The parts of a context that were attended to apart become one result (splits.h).
//
// A query's slots, one behind the other, hold the parts of one or several launches: those of a context cut up, and,
// where sequences share a prefix that is attended to once for all of them, those of the prefix. Where there is one part
// decode_split has written the result itself, and nothing is to be done.
//
// Teams of lanes take turns at the slots, four numbers of the head a lane; then the teams' results become one.
//
//   grid   heads, queries
#pragma once
#include "common/act.h"
#include "attn/splits.h"

constexpr int EK_MERGE_THREADS = 128;
constexpr int EK_MERGE_LANES = EK_D <= 32 ? 8 : EK_D <= 64 ? 16 : EK_D <= 128 ? 32 : 64;  // of a team
constexpr int EK_MERGE_TEAMS = EK_MERGE_THREADS / EK_MERGE_LANES;

struct EkLseMerge {
  u64 part_values;           // float32 [slots, heads, head_dim], at a multiple of 16
  const float* part_states;  // [slots, heads, 2]: largest score and sum of weights
  u64 out;                   // activations [queries, heads, head_dim]
  const int* slots;          // [queries + 1]: a query's are those from slots[query] to slots[query + 1] - 1
  const float* sinks;
  int heads;
  int always_parts;  // 1: one part is merged, too
};
static_assert(sizeof(EkLseMerge) == 48, "the mirror in Python has the same");

EK_KERN(EK_MERGE_THREADS) ek_lse_merge(EkLseMerge p) {
  EK_SMEM float values[EK_MERGE_TEAMS][EK_D];
  EK_SMEM float largests[EK_MERGE_TEAMS], sums[EK_MERGE_TEAMS];
  const int head = EK_BX, query = EK_BY;
  const int begin = p.slots[query], end = p.slots[query + 1];
  if (end - begin < 2 && !p.always_parts) return;

  const int team = EK_TID / EK_MERGE_LANES, lane = EK_TID % EK_MERGE_LANES;
  const bool has_piece = lane < EK_D / 4;
  float largest = EK_NO_SCORE, sum = 0.0f, own[4] = {};
  for (int slot = begin + team; slot < end; slot += EK_MERGE_TEAMS) {
    const i64 part = (i64)slot * p.heads + head;
    const float score = p.part_states[2 * part], weight = p.part_states[2 * part + 1];
    if (weight == 0.0f) continue;  // nothing was seen
    const float most = ek_max(largest, score), fade = ek_exp2(largest - most), scale = ek_exp2(score - most);
    largest = most;
    sum = ek_fma(sum, fade, weight * scale);
    if (has_piece) {
      const u32x4 v = ek_ldg16(p.part_values + (u64)((part * EK_D + 4 * lane) * 4));
      own[0] = ek_fma(own[0], fade, ek_asfloat(v.x) * scale);
      own[1] = ek_fma(own[1], fade, ek_asfloat(v.y) * scale);
      own[2] = ek_fma(own[2], fade, ek_asfloat(v.z) * scale);
      own[3] = ek_fma(own[3], fade, ek_asfloat(v.w) * scale);
    }
  }
  if (lane == 0) largests[team] = largest, sums[team] = sum;
  if (has_piece) {
#pragma unroll
    for (int i = 0; i < 4; i++) values[team][4 * lane + i] = own[i];
  }
#ifndef EK_PLANT_BARRIER  // a fault for tests to find
  EK_SYNC();
#endif

  for (int d = EK_TID; d < EK_D; d += EK_MERGE_THREADS) {
    float most = EK_NO_SCORE, all = 0.0f, value = 0.0f;
#pragma unroll
    for (int t = 0; t < EK_MERGE_TEAMS; t++) most = ek_max(most, largests[t]);
#pragma unroll
    for (int t = 0; t < EK_MERGE_TEAMS; t++) {
      const float fade = ek_exp2(largests[t] - most);
      all = ek_fma(fade, sums[t], all);
      value = ek_fma(fade, values[t][d], value);
    }
    ek_act_store_one(p.out + (u64)((((i64)query * p.heads + head) * EK_D + d) * EK_ACT_BYTES),
                     ek_share(value, most, all, ek_sink(p.sinks, head)));
  }
}
