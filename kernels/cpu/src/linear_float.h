// Tiles of y = W x for the formats whose values are numbers of their own: EK_F32, EK_F16, EK_BF16.
//
// A step is a vector of weights a panel, and four bytes of activations a token: a column in float32, two in bf16.
#pragma once
#include "linear_tile.h"

namespace EK_TIER {

struct steps_f32 {
  typedef vf lanes;
  enum { BYTES = 64, COLS = 1 };
  static inline lanes weights(const char* p) { return vf_load((const float*)p); }
  static inline lanes spread(const char* p) { return vf_all(*(const float*)p); }
  static inline vf dot(vf sum, lanes w, lanes x) { return vf_fma(w, x, sum); }
};

struct steps_f16 : steps_f32 {
  enum { BYTES = 32, COLS = 1 };
  static inline lanes weights(const char* p) { return vf_from_f16(p); }
};

struct steps_bf16 {
  typedef vi lanes;
  enum { BYTES = 64, COLS = 2 };
  static inline lanes weights(const char* p) { return vi_load(p); }
  static inline lanes spread(const char* p) { return vi_spread(p); }
  static inline vf dot(vf sum, lanes w, lanes x) { return vf_dot_bf16(sum, w, x); }
};

// sums[token][panel] += `count` steps. w: the first of them of the first panel, of the next one `panel` bytes on; x: of
// the first token, of the next one `stride` bytes on.
template <class S, int M, int N>
static void float_tile(const char* w, int64_t panel, const char* x, int64_t stride, int64_t count, ahead next,
                       float* sums, int64_t sums_stride) {
  vf y[M][N];
  EK_UNROLL for (int t = 0; t < M; t++) {
    EK_UNROLL for (int p = 0; p < N; p++) y[t][p] = vf_load(sums + t * sums_stride + 16 * p);
  }
  for (int64_t i = 0; i < count; i++, w += S::BYTES, x += 4, next.at += next.step) {
    typename S::lanes a[N];
    EK_UNROLL for (int p = 0; p < N; p++) {
      a[p] = S::weights(w + p * panel);
      prefetch(next.at + p * panel);
    }
    EK_UNROLL for (int t = 0; t < M; t++) {
      const typename S::lanes b = S::spread(x + t * stride);
      EK_UNROLL for (int p = 0; p < N; p++) y[t][p] = S::dot(y[t][p], a[p], b);
    }
  }
  EK_UNROLL for (int t = 0; t < M; t++) {
    EK_UNROLL for (int p = 0; p < N; p++) vf_store(sums + t * sums_stride + 16 * p, y[t][p]);
  }
}

}  // namespace EK_TIER
