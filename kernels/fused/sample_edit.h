// First half of the sampler: each row's logits edited, and the best token of each piece of them.
//
// Edits in the order of the CPU's sampler: what is added to single tokens, then -infinity for tokens that may not come
// yet, then the repetition penalty, once for each token of prompt and output, then frequency and presence penalties by
// the counts of the output. The counts are in a table on the device, to which the sampler itself adds each token that it
// draws. Rows without edits are only looked at: what is drawn from are then the logits themselves.
//
//   grid   vocab / EK_CHUNK rounded up, rows
#pragma once
#include "fused/sample_order.h"

constexpr int EK_EDIT_THREADS = 256;

constexpr u32 EK_IN_PROMPT = 0x8000u, EK_IN_OUTPUT = 0x7fffu;

EK_DEV float ek_penalise(float x, u32 counts, const EkSampleRow& s) {
  const u32 output = counts & EK_IN_OUTPUT;
  if (counts) x = x > 0.0f ? x / s.repetition : x * s.repetition;
  if (output) x -= s.frequency * (float)output + s.presence;
  return x;
}

EK_DEV u64 ek_better(u64 a, u64 b) { return a < b ? a : b; }

// The best of the block's; to be called by all of its threads.
EK_DEV u64 ek_best(u64 (&bests)[EK_EDIT_THREADS / 32], u64 best) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const u32 high = ek_shfl_xor((u32)(best >> 32), mask), low = ek_shfl_xor((u32)best, mask);
    best = ek_better(best, (u64)high << 32 | low);
  }
  if ((EK_TID & 31) == 0) bests[EK_TID / 32] = best;
  EK_SYNC();
#pragma unroll
  for (int i = 0; i < EK_EDIT_THREADS / 32; i++) best = ek_better(best, bests[i]);
  return best;
}

EK_KERN(EK_EDIT_THREADS) ek_sample_edit(EkSample p) {
  EK_SMEM float added[EK_CHUNK];
  EK_SMEM u64 bests[2][EK_EDIT_THREADS / 32];
  const int first = EK_BX * EK_CHUNK;
  const i64 row = EK_BY;
  const EkSampleRow s = p.rows[row];
  const bool is_edited = ek_is_edited(s), is_counted = s.flags & EK_ROW_COUNTED;
  const int num_banned = ek_banned(s);
  const bool is_added = s.num_edits + num_banned > 0;

  if (is_added) {
    const int* ids = p.edit_ids + row * p.edits_stride;
    const float* values = p.edit_values + row * p.edits_stride;
    for (int i = EK_TID; i < EK_CHUNK; i += EK_EDIT_THREADS) added[i] = 0.0f;
    EK_SYNC();
    for (int i = EK_TID; i < s.num_edits; i += EK_EDIT_THREADS) {
      const int place = ids[i] - first;
      if (place >= 0 && place < EK_CHUNK) added[place] = values[i];
    }
    if (num_banned > 0) {
      EK_SYNC();  // one of them may be among the others
      for (int i = EK_TID; i < num_banned; i += EK_EDIT_THREADS) {
        const int place = ids[s.num_edits + i] - first;
        if (place >= 0 && place < EK_CHUNK) added[place] = ek_logit_of(EK_NO_KEY);
      }
    }
#ifndef EK_PLANT_BARRIER  // a fault for tests to find
    EK_SYNC();
#endif
  }

  const u64 logits = p.logits + (u64)(row * p.logits_stride) * 4, scores = p.scores + (u64)(row * p.scores_stride) * 4;
  const u16* counts = p.counts + s.counts_row * p.counts_stride;
  constexpr int EACH = EK_CHUNK / EK_EDIT_THREADS;
  float x[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int id = first + i * EK_EDIT_THREADS + EK_TID;
    x[i] = id < p.vocab ? ek_asfloat(ek_ldg4(logits + (u64)id * 4)) : 0.0f;
  }
  u64 best = ~0ull, raw_best = ~0ull;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int place = i * EK_EDIT_THREADS + EK_TID, id = first + place;
    if (id >= p.vocab) continue;
    raw_best = ek_better(raw_best, ek_rank(x[i], id));
    if (is_edited) {
      if (is_added) x[i] += added[place];
      if (is_counted) x[i] = ek_penalise(x[i], counts[id], s);
      ek_stg4(scores + (u64)id * 4, ek_asuint(x[i]));
    }
    best = ek_better(best, ek_rank(x[i], id));
  }
  best = ek_best(bests[0], best);
  raw_best = ek_best(bests[1], raw_best);
  if (EK_TID == 0) {
    p.bests[row * p.chunks + EK_BX] = best;
    p.raw_bests[row * p.chunks + EK_BX] = raw_best;
  }
}
