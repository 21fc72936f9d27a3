// Fetching keys and values from memory while those before them are worked on.
//
// Measured on Zen 5 over blocks in random order. A processor keeps only so many requests and drops further ones: what
// is fetched much too early is not fetched at all, and what is fetched too late is waited for. Memory answers to several
// pages at once sooner than to one after the other, and best to lines that lie end to end.
#pragma once
#include "attend_cache.h"

#ifndef EK_UNROLL
#if EK_VECTOR_REGISTERS < 8
#define EK_UNROLL
#elif defined(__clang__)
#define EK_UNROLL _Pragma("unroll")
#else
#define EK_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

namespace EK_TIER {

// Tiles of 16 slots of which the scores are found together.
static const int CHUNK = 4;

// How far ahead is fetched, in bytes.
static const int64_t WINDOW = 8192;

// Rows of K of CHUNK tiles, and tiles of V, that make about a window.
template <class F>
static inline int64_t key_window() { return WINDOW / CHUNK / F::B_BYTES; }
template <class F>
static inline int value_window(int dim) {
  const int64_t bytes = tile_bytes<F>(dim);
  return bytes * 4 <= WINDOW ? 4 : bytes * 2 <= WINDOW ? 2 : 1;
}

// What to fetch while vectors of K or V are worked on, a line for each of them: four lines, then those `step` bytes
// further on.
struct fetch_ahead {
  const char* at[4];
  int64_t step;
  uint32_t turn;   // whose line is the next
  uint32_t wait;   // steps to the next lines
  uint32_t every;  // steps from then on
  uint32_t left;   // times four lines that there are
};

// `bytes` from each of `count` (1, 2 or 4) runs, a line of each in turn; where there are only `left` runs, of the first
// again. Formats whose vectors are part of a line want one line for several of them.
template <class F>
static fetch_ahead lines_of(const char* const* runs, int count, int left, int64_t offset, int64_t bytes) {
  fetch_ahead ahead;
  for (int n = 0; n < 4; n++) ahead.at[n] = runs[n % count < left ? n % count : 0] + offset + n / count * 64;
  ahead.step = 256 / count;
  ahead.turn = 0;
  ahead.every = 64 / F::B_BYTES;
  ahead.left = (uint32_t)(bytes > 0 ? (bytes * count + 255) / 256 : 0);
  ahead.wait = ahead.left > 0 ? 1 : UINT32_MAX;
  return ahead;
}

// Share `i` of `shares`, each to be fetched during a pass over the same vectors, evenly spread.
static inline fetch_ahead share_of(const fetch_ahead* ahead, int i, int shares) {
  const uint32_t each = (ahead->left + shares - 1) / shares, first = i * each;
  fetch_ahead share = *ahead;
  if (first >= ahead->left) {
    share.left = 0;
    share.wait = UINT32_MAX;
    return share;
  }
  for (int n = 0; n < 4; n++) share.at[n] += first * ahead->step;
  share.left = each < ahead->left - first ? each : ahead->left - first;
  share.every = ahead->every * (ahead->left / each);
  return share;
}

// To be called once for every step, of N vectors. Always inlined: gcc drops calls of functions that do nothing but
// prefetch.
template <int N>
__attribute__((always_inline)) static inline void fetch(fetch_ahead* ahead) {
  if (--ahead->wait) return;
  ahead->wait = ahead->every;
  if (N == 4) {
    EK_UNROLL
    for (int n = 0; n < 4; n++) {
      prefetch(ahead->at[n]);
      ahead->at[n] += ahead->step;
    }
    ahead->left--;
  } else {
    EK_UNROLL
    for (int n = 0; n < N; n++) {
      prefetch(ahead->at[ahead->turn]);
      ahead->at[ahead->turn] += ahead->step;
      ahead->turn = (ahead->turn + 1) % 4;
      if (ahead->turn == 0 && ahead->left > 0) ahead->left--;
    }
  }
  if (ahead->left == 0) ahead->wait = UINT32_MAX;
}

}  // namespace EK_TIER
