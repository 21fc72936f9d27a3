// The two products of attention, blocked in registers: R rows (query heads of one kv head, of one token or several) by
// N vectors of 16 lanes.
//
// Every sum runs over its terms in the cache's order, one accumulator from the first to the last, so that it does not
// depend on how rows and lanes were blocked.
#pragma once
#include "attend_fetch.h"
#include "attend_plan.h"

namespace EK_TIER {

static const int MOST_DIM = 256;  // of a head
static const int TILES = PART / 16;
// Sums and whatever is loaded beside them must fit the registers.
static const int BLOCK_ROWS = EK_VECTOR_REGISTERS >= 32 ? 6 : 4;
static const int BLOCK_VECTORS = EK_VECTOR_REGISTERS >= 32 ? 4 : 1;
// Floats from row to row. Not a power of two: rows that are read together would share the cache's sets.
static const int SCORE_STRIDE = PART + 16;
static const int OUT_STRIDE = MOST_DIM + 16;

struct score_job {
  const char* a;         // queries of the block of rows, [depth][R]
  const char* const* b;  // K of N tiles of 16 slots
  int64_t b_stride;      // bytes from one row of b to the next
  int64_t depth;         // rows of b
  fetch_ahead* ahead;    // one for each `window` rows, or null
  int64_t window;
  float* out;            // [R][SCORE_STRIDE], F::sum_type
};

template <class F, int R, int N>
static void score_block(const score_job* job) {
  typename F::sum_type sums[R][N];
  const char* b[N];
  EK_UNROLL
  for (int n = 0; n < N; n++) {
    b[n] = job->b[n];
    EK_UNROLL
    for (int r = 0; r < R; r++) sums[r][n] = F::zero();
  }
  const char* a = job->a;
  const int64_t stride = job->b_stride, depth = job->depth, window = job->window;
  for (int64_t i = 0, number = 0; i < depth; number++) {
    const int64_t until = i + window < depth ? i + window : depth;
    const bool fetches = job->ahead != nullptr;
    fetch_ahead ahead = fetches ? job->ahead[number] : fetch_ahead();
    for (; i < until; i++, a += R * F::A_BYTES) {
      typename F::b_type loaded[N];
      EK_UNROLL
      for (int n = 0; n < N; n++) loaded[n] = F::load(b[n] + i * stride);
      if (fetches) fetch<N>(&ahead);
      EK_UNROLL
      for (int r = 0; r < R; r++) {
        const typename F::a_type x = F::spread(a + r * F::A_BYTES);
        EK_UNROLL
        for (int n = 0; n < N; n++) sums[r][n] = F::dot(sums[r][n], loaded[n], x);
      }
    }
    if (fetches) job->ahead[number] = ahead;
  }
  EK_UNROLL
  for (int r = 0; r < R; r++) {
    EK_UNROLL
    for (int n = 0; n < N; n++) F::store_sum(job->out + r * SCORE_STRIDE + 16 * n, sums[r][n]);
  }
}

struct value_job {
  const char* a;             // probabilities of the block of rows, [R][SCORE_STRIDE floats], from the part's first slot
  const char* const* b;      // V of the part's tiles of 16 slots
  int64_t b_offset;          // bytes to the first of the N vectors
  int64_t b_stride;
  int64_t first, stop;       // rows of b
  fetch_ahead* ahead;        // or null
  float* out;                // [R][OUT_STRIDE], F::sum_type, added to
};

template <class F, int R, int N>
static void value_block(const value_job* job) {
  const int64_t tile_rows = 16 / F::DEEP;
  typename F::sum_type sums[R][N];
  EK_UNROLL
  for (int r = 0; r < R; r++) {
    EK_UNROLL
    for (int n = 0; n < N; n++) sums[r][n] = F::load_sum(job->out + r * OUT_STRIDE + 16 * n);
  }
  const int64_t stride = job->b_stride, stop = job->stop;
  const bool fetches = job->ahead != nullptr;
  fetch_ahead ahead = fetches ? *job->ahead : fetch_ahead();
  for (int64_t i = job->first; i < stop;) {
    const int64_t tile = i / tile_rows, until = (tile + 1) * tile_rows < stop ? (tile + 1) * tile_rows : stop;
    const char* b = job->b[tile] + i % tile_rows * stride + job->b_offset;
    for (; i < until; i++, b += stride) {
      typename F::b_type loaded[N];
      EK_UNROLL
      for (int n = 0; n < N; n++) loaded[n] = F::load(b + n * F::B_BYTES);
      if (fetches) fetch<N>(&ahead);
      EK_UNROLL
      for (int r = 0; r < R; r++) {
        const typename F::a_type x = F::spread(job->a + r * SCORE_STRIDE * 4 + i * F::A_BYTES);
        EK_UNROLL
        for (int n = 0; n < N; n++) sums[r][n] = F::dot(sums[r][n], loaded[n], x);
      }
    }
  }
  if (fetches) *job->ahead = ahead;
  EK_UNROLL
  for (int r = 0; r < R; r++) {
    EK_UNROLL
    for (int n = 0; n < N; n++) F::store_sum(job->out + r * OUT_STRIDE + 16 * n, sums[r][n]);
  }
}

// By number of rows, then of vectors.
template <class F>
static inline void score(int rows, int vectors, const score_job* job) {
  typedef void (*block)(const score_job*);
#if EK_VECTOR_REGISTERS >= 32
#define EK_ROW(R) {score_block<F, R, 1>, score_block<F, R, 2>, score_block<F, R, 3>, score_block<F, R, 4>}
  static const block blocks[BLOCK_ROWS][BLOCK_VECTORS] = {EK_ROW(1), EK_ROW(2), EK_ROW(3),
                                                          EK_ROW(4), EK_ROW(5), EK_ROW(6)};
#else
#define EK_ROW(R) {score_block<F, R, 1>}
  static const block blocks[BLOCK_ROWS][BLOCK_VECTORS] = {EK_ROW(1), EK_ROW(2), EK_ROW(3), EK_ROW(4)};
#endif
#undef EK_ROW
  blocks[rows - 1][vectors - 1](job);
}

template <class F>
static inline void add_values(int rows, int vectors, const value_job* job) {
  typedef void (*block)(const value_job*);
#if EK_VECTOR_REGISTERS >= 32
#define EK_ROW(R) {value_block<F, R, 1>, value_block<F, R, 2>, value_block<F, R, 3>, value_block<F, R, 4>}
  static const block blocks[BLOCK_ROWS][BLOCK_VECTORS] = {EK_ROW(1), EK_ROW(2), EK_ROW(3),
                                                          EK_ROW(4), EK_ROW(5), EK_ROW(6)};
#else
#define EK_ROW(R) {value_block<F, R, 1>}
  static const block blocks[BLOCK_ROWS][BLOCK_VECTORS] = {EK_ROW(1), EK_ROW(2), EK_ROW(3), EK_ROW(4)};
#endif
#undef EK_ROW
  blocks[rows - 1][vectors - 1](job);
}

}  // namespace EK_TIER
