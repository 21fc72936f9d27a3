// What the threads of the sampler's block do together: go through a row's tokens, add up, find where a sum is passed.
//
// All of these are to be called by all threads of the block at once, and answer all of them the same.
#pragma once
#include "fused/sample_order.h"

#ifndef EK_SAMPLE_THREADS
#define EK_SAMPLE_THREADS 1024
#endif
#ifndef EK_CANDIDATES
#define EK_CANDIDATES 2048
#endif
static_assert(EK_SAMPLE_THREADS % 32 == 0 && EK_SAMPLE_THREADS >= 64 && EK_SAMPLE_THREADS <= 1024, "2 to 32 warps");
static_assert((EK_CANDIDATES & (EK_CANDIDATES - 1)) == 0 && EK_CANDIDATES % EK_SAMPLE_THREADS == 0,
              "a power of two, and so many for each thread");

constexpr int EK_SAMPLE_WARPS = EK_SAMPLE_THREADS / 32;
constexpr int EK_BINS = 2048;
static_assert(EK_BINS % EK_SAMPLE_THREADS == 0, "so many for each thread");

struct EkAmount {
  u64 mass;
  u32 count;
};
EK_DEV EkAmount operator+(EkAmount a, EkAmount b) { return {a.mass + b.mass, a.count + b.count}; }
EK_DEV EkAmount operator-(EkAmount a, EkAmount b) { return {a.mass - b.mass, a.count - b.count}; }

// Which of the two is meant.
enum EkMeasure { EK_BY_COUNT, EK_BY_MASS };
EK_DEV u64 ek_measured(EkAmount a, EkMeasure by) { return by == EK_BY_MASS ? a.mass : a.count; }

struct EkBins {
  u32 low[EK_BINS], high[EK_BINS];  // of the mass
  u32 counts[EK_BINS];
};

// What a sum was passed with: the place, the sum before it and with it.
struct EkPassed {
  int place;
  EkAmount before, through;
};

struct EkSampleShared {
  union {
    EkBins bins;
    u64 ranks[EK_CANDIDATES];
  };
  EkAmount totals[EK_SAMPLE_WARPS];
  EkPassed passed;
  u64 best;
  u32 num_ranks;
};

EK_DEV u64 ek_shfl_xor_wide(u64 x, int mask) {
  return (u64)ek_shfl_xor((u32)(x >> 32), mask) << 32 | ek_shfl_xor((u32)x, mask);
}
EK_DEV u64 ek_warp_sum(u64 x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) x += ek_shfl_xor_wide(x, mask);
  return x;
}
EK_DEV u64 ek_warp_min(u64 x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const u64 other = ek_shfl_xor_wide(x, mask);
    x = other < x ? other : x;
  }
  return x;
}
EK_DEV EkAmount ek_shfl_amount(EkAmount x, int from) {
  const u32 high = ek_shfl((u32)(x.mass >> 32), from), low = ek_shfl((u32)x.mass, from);
  return {(u64)high << 32 | low, ek_shfl(x.count, from)};
}
// With those of all lower lanes.
EK_DEV EkAmount ek_warp_scan(EkAmount x) {
  const int lane = EK_TID & 31;
#pragma unroll 1
  for (int step = 1; step < 32; step *= 2) {
    const EkAmount other = ek_shfl_amount(x, lane >= step ? lane - step : lane);
    if (lane >= step) x = x + other;
  }
  return x;
}
// The lowest lane in which it holds; 31 where it holds in none.
EK_DEV int ek_first_lane(bool holds) {
  const u32 lanes = ek_ballot(holds);
  int lane = 0;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    if ((lanes >> lane & ((1u << step) - 1u)) == 0) lane += step;
  }
  return lane;
}

// use(x, id) for the tokens first, first + step, ...; eight are asked for at once. They are used in a loop, through which
// they move along: eight copies of what is done with them, for each of the ways that there are, would be too much code.
template <class Use>
EK_DEV void ek_each_from(const EkView& view, int first, int stop, int step, Use use) {
#pragma unroll 1
  for (int base = first; base < stop; base += 8 * step) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int id = base + i * step;
      x[i] = id < stop ? ek_asfloat(ek_ldg4(view.scores + (u64)id * 4)) : 0.0f;
    }
#pragma unroll 1
    for (int i = 0; i < 8; i++) {
      if (base + i * step < stop) use(x[0], base + i * step);
#pragma unroll
      for (int k = 0; k < 7; k++) x[k] = x[k + 1];
    }
  }
}
template <class Use>
EK_DEV void ek_each(const EkView& view, Use use) {
  ek_each_from(view, EK_TID, view.vocab, EK_SAMPLE_THREADS, use);
}

// What each warp has to tell, to all: with that of all lower warps, a lane for each.
EK_DEV EkAmount ek_scan_of_warps(EkSampleShared& shared, EkAmount told) {
  const int lane = EK_TID & 31;
  EK_SYNC();  // what was in totals has been read
  if (lane == 31) shared.totals[EK_TID / 32] = told;
  EK_SYNC();
  return ek_warp_scan(lane < EK_SAMPLE_WARPS ? shared.totals[lane] : EkAmount{0, 0});
}

// The sum of what lower threads have, and of what all have.
EK_DEV EkAmount ek_sum_before(EkSampleShared& shared, EkAmount own, EkAmount& all) {
  const int warp = EK_TID / 32;
  const EkAmount through = ek_warp_scan(own), warps = ek_scan_of_warps(shared, through);
  const EkAmount lower = ek_shfl_amount(warps, warp > 0 ? warp - 1 : 0);
  all = ek_shfl_amount(warps, 31);
  return (warp > 0 ? through + lower : through) - own;
}

// The first of all threads' places with which the sum is above `target`. A thread has N of them from EK_TID * N on, of
// `amounts`, and `before` as of ek_sum_before. The target must be below the sum of all.
template <int N>
EK_DEV EkPassed ek_pass(EkSampleShared& shared, EkAmount before, const EkAmount (&amounts)[N], EkMeasure by,
                        u64 target) {
  EK_SYNC();  // the last answer has been read
#pragma unroll
  for (int i = 0; i < N; i++) {
    const EkAmount through = before + amounts[i];
    if (ek_measured(before, by) <= target && target < ek_measured(through, by)) {
      shared.passed = {EK_TID * N + i, before, through};
    }
    before = through;
  }
  EK_SYNC();
  return shared.passed;
}

// The token with which the sum of amount(x) over tokens by id is above aim(sum of all); each warp has a part of them,
// and the part that has it is dealt out again. Where nothing is above it, the answer is some token.
template <class Amount, class Aim>
EK_DEV int ek_find_by_id(EkSampleShared& shared, const EkView& view, Amount amount, Aim aim) {
  const int lane = EK_TID & 31, warp = EK_TID / 32;
  int first = 0, stop = view.vocab, part;
  u64 target = 0;
  bool is_aimed = false;
  do {
    part = ((stop - first + EK_SAMPLE_WARPS - 1) / EK_SAMPLE_WARPS + 31) / 32 * 32;
    const int begin = first + warp * part;
    u64 own = 0;
    ek_each_from(view, begin + lane, ek_min(begin + part, stop), 32, [&](float x, int) { own += amount(x); });
    const EkAmount warps = ek_scan_of_warps(shared, {ek_warp_sum(own), 0});
    if (!is_aimed) target = aim(ek_shfl_amount(warps, 31).mass);
    is_aimed = true;
    const int found = ek_first_lane(warps.mass > target);
    if (found > 0) target -= ek_shfl_amount(warps, found - 1).mass;
    first = ek_min(first + found * part, stop - 1);
    stop = ek_min(first + part, stop);
  } while (part > 32);
  const int id = ek_min(first + lane, stop - 1);
  const u64 own = first + lane < stop ? amount(ek_asfloat(ek_ldg4(view.scores + (u64)id * 4))) : 0;
  return ek_min(first + ek_first_lane(ek_warp_scan({own, 0}).mass > target), stop - 1);
}
