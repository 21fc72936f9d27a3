// Fetching keys and values from memory while those before them are worked on.
//
// Measured on Zen 5 over blocks in random order. A processor keeps only so many requests and drops further ones: what is
// fetched much too early is not fetched at all, and what is fetched too late is waited for. Memory answers to several
// pages at once sooner than to one after the other, and best to lines that lie end to end.
#pragma once
#include "attend_cache.h"

#ifndef EK_UNROLL
#if defined(__clang__)
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
  const int64_t tile_bytes = (int64_t)dim / F::DEEP * F::B_BYTES;
  return tile_bytes * 4 <= WINDOW ? 4 : tile_bytes * 2 <= WINDOW ? 2 : 1;
}

// What to fetch while something is worked on: line i is at[i % 4] + i / 4 * step.
struct fetch_ahead {
  const char* at[4];  // at[0] null: nothing
  int64_t step;
};

// Lines end to end (`count` 1), or of 2 or 4 of `runs` in turn; where there are only `left` runs, of the first again.
static fetch_ahead lines_of(const char* const* runs, int count, int left, int64_t offset) {
  fetch_ahead ahead;
  ahead.step = 256 / count;
  for (int n = 0; n < 4; n++) ahead.at[n] = runs[n % count < left ? n % count : 0] + offset + n / count * 64;
  return ahead;
}

// Fetches as vectors of b are worked on, N at a time, `done` of them before. Always inlined: gcc drops calls of
// functions that do nothing but prefetch.
template <class F, int N>
struct fetcher {
  static const uint64_t LINE = 64 / F::B_BYTES;  // vectors of a line
  fetch_ahead ahead;
  uint64_t vector;
  int64_t offset;

  __attribute__((always_inline)) inline fetcher(const fetch_ahead* given, int64_t done)
      : ahead(given != nullptr ? *given : fetch_ahead()), vector(done), offset(done / 4 / LINE * ahead.step) {}

  __attribute__((always_inline)) inline void next() {
    if (N == 4) {
      if (LINE == 1 || vector % (4 * LINE) == 0) {
        EK_UNROLL
        for (int n = 0; n < 4; n++) prefetch(ahead.at[n] + offset);
        offset += ahead.step;
      }
    } else {
      EK_UNROLL
      for (int n = 0; n < N; n++) {
        const uint64_t line = (vector + n) / LINE;
        if ((vector + n) % LINE == 0) prefetch(ahead.at[line % 4] + line / 4 * ahead.step);
      }
    }
    vector += N;
  }
};

}  // namespace EK_TIER
