// The likeliest tokens of a row without sorting its vocabulary.
//
// What is asked is always the same: with which token, from the likeliest on, does a sum pass a target? Of counts, that
// is where top-k ends; of weights, where top-p ends, and what is drawn. It is found by narrowing down: tokens are
// counted and weighed in 2048 bins by their distance to the peak (1/46 of a halving each), and the bin where the target
// is passed is cut up again by the key's first 11 bits, the next 11 and the last 10. What is left are equals, of which
// the one is looked for by id. Nothing of this depends on the order in which tokens come to their bins.
//
// Mostly the first bins up to the target's have few enough tokens for shared memory: then these are sorted there, and
// the narrowing down is spared.
#pragma once
#include "fused/sample_block.h"

constexpr int EK_BINS_EACH = EK_BINS / EK_SAMPLE_THREADS;
constexpr int EK_CANDIDATES_EACH = EK_CANDIDATES / EK_SAMPLE_THREADS;

// A thread's bins, the sum of all lower threads' ones and of all.
struct EkBinSums {
  EkAmount amounts[EK_BINS_EACH];
  EkAmount before, all;
};

// Never smaller for a smaller x.
EK_DEV int ek_bin_of(const EkView& view, float x) {
  const float bin = ek_halvings(view, x) * ((float)EK_BINS / (float)EK_WEIGHT_BITS);
  return (int)ek_min(bin, (float)(EK_BINS - 1));
}

// bin(x) says into which bin a token goes; below 0: into none.
template <class Bin>
EK_DEV EkBinSums ek_sort_into_bins(EkSampleShared& shared, const EkView& view, Bin bin_of) {
  EkBins& bins = shared.bins;
  EK_SYNC();  // what was in this place has been read
  for (int i = EK_TID; i < EK_BINS; i += EK_SAMPLE_THREADS) bins.low[i] = bins.high[i] = bins.counts[i] = 0;
  EK_SYNC();
  ek_each(view, [&](float x, int) {
    const u64 weight = ek_weight(view, x);
    const int bin = ek_is_counted(view, x, weight) ? bin_of(x) : -1;
    if (bin < 0) return;
    ek_add_shared(&bins.counts[bin], 1);
    // Each addition that makes the lower half begin anew carries one over, whoever makes it.
    const u32 low = (u32)weight, before = ek_add_shared(&bins.low[bin], low);
    const u32 high = (u32)(weight >> 32) + (before + low < before ? 1u : 0u);
    if (high) ek_add_shared(&bins.high[bin], high);
  });
  EK_SYNC();
  EkBinSums sums;
  EkAmount own = {0, 0};
#pragma unroll
  for (int i = 0; i < EK_BINS_EACH; i++) {
    const int bin = EK_TID * EK_BINS_EACH + i;
    sums.amounts[i] = {(u64)bins.high[bin] << 32 | bins.low[bin], bins.counts[bin]};
    own = own + sums.amounts[i];
  }
  sums.before = ek_sum_before(shared, own, sums.all);
  return sums;
}

EK_DEV EkBinSums ek_sort_by_distance(EkSampleShared& shared, const EkView& view) {
  return ek_sort_into_bins(shared, view, [&](float x) { return ek_bin_of(view, x); });
}

// The token with which a sum over tokens by rank is above the target, by its id.
EK_DEV EkPassed ek_find_end(EkSampleShared& shared, const EkView& view, EkMeasure by, u64 target) {
  EkAmount before = {0, 0};
  int bin = 0;
  u32 key = 0;  // as many of its bits as are known
#pragma unroll 1
  for (int level = 0; level < 4; level++) {
    const EkBinSums sums = ek_sort_into_bins(shared, view, [&](float x) {
      const int distance = ek_bin_of(view, x);
      if (level == 0) return distance;
      const u32 own = ek_key(x);
      if (distance != bin) return -1;
      if (level == 1) return (int)(own >> 21);
      if (level == 2) return own >> 21 == key ? (int)(own >> 10 & 2047u) : -1;
      return own >> 10 == key ? (int)(own & 1023u) : -1;
    });
    const EkPassed passed = ek_pass(shared, sums.before, sums.amounts, by, target - ek_measured(before, by));
    before = before + passed.before;
    if (level == 0) bin = passed.place;
    else key = key << (level == 3 ? 10 : 11) | (u32)passed.place;
  }
  const u64 weight = ek_weight(view, ek_logit_of(key)), left = target - ek_measured(before, by);
  const u64 equals = by == EK_BY_MASS ? left / weight : left;  // that come before the one
  const int id = ek_find_by_id(
      shared, view, [&](float x) { return (u64)(ek_key(x) == key ? 1 : 0); }, [&](u64) { return equals; });
  before = before + EkAmount{equals * weight, (u32)equals};
  return {id, before, before + EkAmount{weight, 1}};
}

// Puts those tokens into shared.ranks, likeliest first, for which keep(x, rank) holds; how many. At most EK_CANDIDATES.
template <class Keep>
EK_DEV int ek_gather(EkSampleShared& shared, const EkView& view, Keep keep) {
  EK_SYNC();  // what was in this place has been read
  if (EK_TID == 0) shared.num_ranks = 0;
  EK_SYNC();
  ek_each(view, [&](float x, int id) {
    const u64 rank = ek_rank(x, id);
    if (!ek_is_counted(view, x, ek_weight(view, x)) || !keep(x, rank)) return;
    const u32 place = ek_add_shared(&shared.num_ranks, 1);
    if (place < EK_CANDIDATES) shared.ranks[place] = rank;
  });
  EK_SYNC();
  const int count = ek_min((int)shared.num_ranks, EK_CANDIDATES);
  int size = 1;
  while (size < count) size *= 2;
  for (int i = count + EK_TID; i < size; i += EK_SAMPLE_THREADS) shared.ranks[i] = ~0ull;
  EK_SYNC();
  // Batcher's bitonic sort: runs of `run` become runs of twice that many, every second one the other way round.
#pragma unroll 1
  for (int run = 2; run <= size; run *= 2) {
#pragma unroll 1
    for (int apart = run / 2; apart > 0; apart /= 2) {
#pragma unroll 1
      for (int i = EK_TID; i < size; i += EK_SAMPLE_THREADS) {
        const int other = i ^ apart;
        if (other < i) continue;
        const u64 a = shared.ranks[i], b = shared.ranks[other];
        if ((a > b) == ((i & run) == 0)) shared.ranks[i] = b, shared.ranks[other] = a;
      }
#ifndef EK_PLANT_BARRIER  // a fault for tests to find
      EK_SYNC();
#endif
    }
  }
  return count;
}

// Ceiling of share mass / 2^64, less one: a sum above that is at least the share. Mass and share are not 0.
EK_DEV u64 ek_below_share(u64 mass, u64 share) { return ek_part_of(mass, share) - (mass * share == 0 ? 1 : 0); }

// The three ends that are looked for one after the other: of top-k, which is a sum of counts; of top-p, which is a share
// of the mass that top-k left; and of the draw, a share of the mass that both left. end(by, target) answers where a sum
// passes a target, and what it is then; the answer is that of the last one.
template <class End>
EK_DEV EkPassed ek_end_of_draw(const EkSampleRow& s, EkAmount all, u64 share, End end) {
  EkPassed last = {0, {0, 0}, all};
#pragma unroll 1
  for (int which = 0; which < 3; which++) {
    if (which == 0 && (s.top_k == 0 || (u32)s.top_k >= all.count)) continue;
    if (which == 1 && s.top_p == 0) continue;
    const u64 mass = last.through.mass;
    const u64 target = which == 0   ? (u64)(s.top_k - 1)
                       : which == 1 ? ek_below_share(mass, s.top_p)
                                    : ek_part_of(mass, share);
    last = end(which == 0 ? EK_BY_COUNT : EK_BY_MASS, target);
  }
  return last;
}

// Inverts the cumulative distribution over tokens by rank at `share`.
EK_DEV int ek_draw_by_rank(EkSampleShared& shared, const EkView& view, const EkSampleRow& s, u64 share) {
  const EkBinSums sums = ek_sort_by_distance(shared, view);
  const bool has_top_k = s.top_k > 0 && (u32)s.top_k < sums.all.count;
  const u64 most = has_top_k      ? (u64)(s.top_k - 1)
                   : s.top_p != 0 ? ek_below_share(sums.all.mass, s.top_p)
                                  : sums.all.mass - 1;
  const EkPassed bins = ek_pass(shared, sums.before, sums.amounts, has_top_k ? EK_BY_COUNT : EK_BY_MASS, most);
  if (bins.through.count > EK_CANDIDATES) {
    return ek_end_of_draw(s, sums.all, share, [&](EkMeasure by, u64 target) {
             return ek_find_end(shared, view, by, target);
           }).place;
  }
  const int last_bin = bins.place;
  const int count = ek_gather(shared, view, [&](float x, u64) { return ek_bin_of(view, x) <= last_bin; });
  EkAmount amounts[EK_CANDIDATES_EACH], own = {0, 0}, gathered;
#pragma unroll
  for (int i = 0; i < EK_CANDIDATES_EACH; i++) {
    const int place = EK_TID * EK_CANDIDATES_EACH + i;
    amounts[i] = {0, 0};
    if (place < count) amounts[i] = {ek_weight(view, ek_logit_of(ek_key_of(shared.ranks[place]))), 1};
    own = own + amounts[i];
  }
  const EkAmount before = ek_sum_before(shared, own, gathered);
  const EkPassed drawn = ek_end_of_draw(s, sums.all, share, [&](EkMeasure by, u64 target) {
    return ek_pass(shared, before, amounts, by, target);
  });
  return ek_id_of(shared.ranks[drawn.place]);
}
