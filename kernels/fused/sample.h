// Second half of the sampler: each row's token, and the log-probabilities that it asks for.
//
// As edgekv's sampler for the CPU has it: temperature; min-p keeps what weighs at least so much of the peak; top-k
// keeps the k likeliest, ties by lower id; top-p the shortest beginning of what is left that has at least so much of
// its mass.
// Then the cumulative distribution is inverted at the row's random number: over the tokens by rank where top-k or top-p
// ranks them, else over the tokens by id. Log-probabilities are those of the logits as they were, at temperature 1.
//
// A row whose best logit is no number (NaN, an infinity, or nothing but impossible tokens) gets token 0 and a fault.
//
// What the next step needs is brought on here, where the host need not have seen the token: the row's counter, and the
// count of the token in the table that penalties are made of.
//
//   -DEK_SAMPLE_THREADS=n   threads of a row's block; the tokens are the same for any number
//   -DEK_CANDIDATES=n       how many tokens can be sorted in shared memory; likewise
//   grid   rows
#pragma once
#include "fused/sample_rank.h"

EK_DEV u64 ek_best_of_row(EkSampleShared& shared, const u64* bests, int chunks) {
  u64 best = ~0ull;
  for (int i = EK_TID; i < chunks; i += EK_SAMPLE_THREADS) best = bests[i] < best ? bests[i] : best;
  best = ek_warp_min(best);
  const int lane = EK_TID & 31;
  EK_SYNC();  // what was in totals has been read
  if (lane == 0) shared.totals[EK_TID / 32].mass = best;
  EK_SYNC();
  return ek_warp_min(lane < EK_SAMPLE_WARPS ? shared.totals[lane].mass : ~0ull);
}

// ln of the token's share in the mass.
EK_DEV float ek_logprob(const EkView& view, float x, u64 mass) {
  const float peaks = (float)mass * (1.0f / (float)(1ull << EK_WEIGHT_BITS));
  return (x - view.peak) - ek_log2(peaks) * 0.6931471805599453f;
}

// The token's log-probability, and the likeliest tokens with theirs.
EK_DEV void ek_report(EkSampleShared& shared, const EkSample& p, const EkSampleRow& s, int row, int token) {
  EkView view = {p.logits + (u64)(row * p.logits_stride) * 4, p.vocab, 0.0f, EK_LOG2_E, 0.0f, true};
  view.peak = ek_logit_of(ek_key_of(ek_best_of_row(shared, p.raw_bests + (i64)row * p.chunks, p.chunks)));
  const EkBinSums sums = ek_sort_by_distance(shared, view);
  if (EK_TID == 0) {
    const float x = ek_asfloat(ek_ldg4(view.scores + (u64)token * 4));
    p.logprobs[row] = ek_logprob(view, x, sums.all.mass);
  }
  const int count = ek_min(ek_min(s.num_top, p.max_top), (int)sums.all.count);
  if (count > 0) {
    const u64 target = (u64)(count - 1);
    const EkPassed bins = ek_pass(shared, sums.before, sums.amounts, EK_BY_COUNT, target);
    const int last_bin = bins.place;
    if (bins.through.count <= EK_CANDIDATES) {
      ek_gather(shared, view, [&](float x, u64) { return ek_bin_of(view, x) <= last_bin; });
    } else {
      const int id = ek_find_end(shared, view, EK_BY_COUNT, target).place;
      const u64 last = ek_rank(ek_asfloat(ek_ldg4(view.scores + (u64)id * 4)), id);
      ek_gather(shared, view, [&](float, u64 rank) { return rank <= last; });
    }
  }
  const i64 first = (i64)row * p.max_top;
  for (int i = EK_TID; i < p.max_top; i += EK_SAMPLE_THREADS) {
    const bool is_one = i < count;
    const u64 rank = is_one ? shared.ranks[i] : 0;
    p.top_ids[first + i] = is_one ? ek_id_of(rank) : -1;
    p.top_logprobs[first + i] = is_one ? ek_logprob(view, ek_logit_of(ek_key_of(rank)), sums.all.mass) : 0.0f;
  }
}

EK_KERN(EK_SAMPLE_THREADS) ek_sample(EkSample p) {
  EK_SMEM EkSampleShared shared;
  const int row = EK_BX;
  const EkSampleRow& s = p.rows[row];
  const u64 counter = s.counter;  // of all threads before the first barrier: in the end one of them adds to it
  const bool is_edited = ek_is_edited(s);
  const u64 best = ek_best_of_row(shared, p.bests + (i64)row * p.chunks, p.chunks);
  const u32 key = ek_key_of(best);
  if (key < EK_FIRST_KEY || key >= EK_NO_KEY) {
    if (EK_TID == 0) p.tokens[row] = 0, p.faults[row] = 1, p.rows[row].counter = counter + 1;
    return;
  }

  int token = ek_id_of(best);
  if (s.scale > 0.0f) {
    const u64 logits = p.logits + (u64)(row * p.logits_stride) * 4;
    const u64 scores = is_edited ? p.scores + (u64)(row * p.scores_stride) * 4 : logits;
    const EkView view = {scores, p.vocab, ek_logit_of(key), s.scale, s.min_p, false};
    const u64 share = ek_uniform(s.seed, counter);
    if (s.top_k > 0 || s.top_p != 0) {
      token = ek_draw_by_rank(shared, view, s, share);
    } else {
      token = ek_find_by_id(
          shared, view, [&](float x) { return ek_weight(view, x); }, [&](u64 all) { return ek_part_of(all, share); });
    }
  }
  if (s.flags & EK_ROW_LOGPROBS) ek_report(shared, p, s, row, token);
  if (EK_TID == 0) {
    p.tokens[row] = token, p.faults[row] = 0, p.rows[row].counter = counter + 1;
    if (s.flags & EK_ROW_COUNTED) {
      u16* count = p.counts + s.counts_row * p.counts_stride + token;
      if ((*count & 0x7fffu) < 0x7fffu) *count = (u16)(*count + 1);
    }
  }
}
