// How the contexts of a batch are cut into parts for several thread blocks, and what makes their results one.
//
// The host counts the parts of a step (splits.py), from all its contexts together: so that a long one among short ones
// is cut, too, and as many thread blocks have work as the card has room for. The cut is read on the device: the same
// launch, captured in a graph, is right for every mixture, and thread blocks that no part is left for end at once. What
// a context of one part comes to is the result.
//
//   cut   [queries + 2]: blocks of a part, the first part of each query, and of how many parts there are in all
//
// Scores are in units of log 2. The result of a part is its largest score, the sum of 2^(score - largest), and the
// values weighted with that; results of two parts make one by fading both to the larger of their largest scores
// (Milakov and Gimelshein, arXiv:1805.02867).
#pragma once
#include "common/kv.h"

// Stands for the score of nothing. Below all scores, and its difference to itself is a number, unlike infinity's.
constexpr float EK_NO_SCORE = -1e30f;
constexpr float EK_LOG2E = 1.4426950408889634f;

// The same in all lanes, which not every compiler can know.
EK_DEV int ek_uniform(int x) {
#if EK_HIP
  return __builtin_amdgcn_readfirstlane(x);
#else
  return x;
#endif
}

// Whose a thing is: of `owners`, each has those from firsts[own] to firsts[own + 1] - 1; `owners` itself: nobody's. All
// lanes of a warp look, each at its share, so that it takes no longer than one load.
EK_DEV int ek_owner(const int* firsts, int owners, int thing) {
  constexpr int LOOKS = 4;  // at a time
  u32 before = 0;
  for (int first = EK_TID & 31; first - (EK_TID & 31) < owners; first += 32 * LOOKS) {
    int ends[LOOKS];
#pragma unroll
    for (int i = 0; i < LOOKS; i++) ends[i] = firsts[ek_min(first + 32 * i, owners - 1) + 1];
#pragma unroll
    for (int i = 0; i < LOOKS; i++) before += first + 32 * i < owners && ends[i] <= thing ? 1 : 0;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) before += ek_shfl_xor(before, mask);
  return ek_uniform((int)before);
}

struct EkPart {
  int query;   // none if it is not below their number
  int number;  // among the query's `parts`
  int parts;
  int blocks;  // of each of them; the last one has what is left
};

// What a thread block is to do. Without a cut it has a query.
EK_DEV EkPart ek_part(const int* cut, int queries, int at) {
  if (cut == nullptr) return {at, 0, 1, 1};
  const int query = ek_owner(cut + 1, queries, at);
  if (query >= queries) return {queries, 0, 0, 1};
  const int first = cut[1 + query];
  return {query, at - first, cut[2 + query] - first, ek_max(1, cut[0])};
}

struct EkSeen {
  int first_token;  // before it are those out of the window, or seen to elsewhere
  int begin, end;   // blocks of the table
};

// What of a context a part sees. Every block of it is some part's, whatever the cut says: a wrong one is only slow.
EK_DEV EkSeen ek_seen(const EkPart& part, int begin, int context, int window) {
  EkSeen seen;
  seen.first_token = window > 0 ? ek_max(begin, context - window) : begin;
#ifdef EK_PLANT_WINDOW  // a fault for tests to find
  if (seen.first_token > begin) seen.first_token--;
#endif
  const int end = (context + EK_BS - 1) / EK_BS;
  seen.begin = seen.first_token / EK_BS + part.number * part.blocks;
  seen.end = part.number == part.parts - 1 ? end : ek_min(seen.begin + part.blocks, end);
  return seen;
}

// One number of the result: `value` of the values weighted, by the sum of the weights. A sink is a score that takes a
// share and has no value (gpt-oss; Xiao et al., arXiv:2309.17453); EK_NO_SCORE: there is none. Of nothing comes 0.
EK_DEV float ek_share(float value, float largest, float sum, float sink) {
  const float all = sink > EK_NO_SCORE ? sum + ek_exp2(sink - largest) : sum;
  return sum == 0.0f ? 0.0f : value * ek_rcp(all);
}

EK_DEV float ek_sink(const float* sinks, int head) { return sinks != nullptr ? sinks[head] * EK_LOG2E : EK_NO_SCORE; }
