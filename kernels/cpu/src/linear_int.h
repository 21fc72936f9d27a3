// Tiles of y = W x for quantised formats.
//
// A group is 32 columns. Of a token it has int8 b and a scale r, and what pays for the weights' offset:
//
//   x = r b, w = s (q - offset):   w.x = s r (q.b - offset sum(b))   the integer sum starts at -offset sum(b)
//   x = r b, w = s q + minus:      w.x = r (s q.b + minus sum(b))
//
// Integers stay small: 32 columns of at most 255 * 127.
#pragma once
#include "linear_formats.h"

namespace EK_TIER {

// Of the first token's first group; strides in elements.
struct int_tokens {
  const int8_t* q;
  int64_t q_stride;
  const float* scale;
  int64_t scale_stride;
  const int32_t* start;  // -offset sum(b), of KIND_32_HALF two a group; of KIND_MINIMA the bits of float32 sum(b)
  int64_t start_stride;
};

// sums[token][panel] += `units` units. w: the first of them of the first panel, of the next one `panel` bytes on.
template <class S, int M, int N>
static void int_tile(const ek_matrix* matrix, const uint8_t* w, int64_t panel, const int_tokens* tokens, int64_t units,
                     ahead next, float* sums, int64_t sums_stride) {
  constexpr panel_kind KIND = S::KIND;
  constexpr int HALVES = KIND == KIND_32_HALF ? 2 : 1;
  const S from(matrix);
  const int_tokens x = *tokens;
  vf y[M][N];
  EK_UNROLL for (int t = 0; t < M; t++) {
    EK_UNROLL for (int p = 0; p < N; p++) y[t][p] = vf_load(sums + t * sums_stride + 16 * p);
  }
  int64_t at = 0;  // group
  for (; units > 0; units--, w += from.unit) {
    for (int64_t g = 0; g < from.groups; g++, at++) {
      EK_UNROLL for (int half = 0; half < HALVES; half++) {
        vi dots[M][N];
        EK_UNROLL for (int t = 0; t < M; t++) {
          const int32_t* start = x.start + t * x.start_stride + HALVES * at + half;
          EK_UNROLL for (int p = 0; p < N; p++) dots[t][p] = KIND == KIND_MINIMA ? vi_zero() : vi_spread(start);
        }
        EK_UNROLL for (int quarter = 0; quarter < 4; quarter++, next.at += next.step) {
          EK_UNROLL for (int p = 0; p < N; p++) {
            EK_UNROLL for (int line = 0; line < S::LINES; line++) prefetch(next.at + p * panel + 64 * line);
          }
          // Of 8 vectors two at a time that may come out of one load; of half a group, one.
          EK_UNROLL for (int i = quarter + 4 * half; i < 4 * (half + 3 - HALVES); i += 4) {
            vi a[N];
            EK_UNROLL for (int p = 0; p < N; p++) a[p] = from.vector(w + p * panel, g, i);
            EK_UNROLL for (int t = 0; t < M; t++) {
              const vi b = vi_spread(x.q + t * x.q_stride + 32 * at + 4 * i);
              EK_UNROLL for (int p = 0; p < N; p++) {
                dots[t][p] = KIND == KIND_128 ? vi_dot(dots[t][p], a[p], b) : vi_dot7(dots[t][p], a[p], b);
              }
            }
          }
        }
        vf s[N], minus[N];
        EK_UNROLL for (int p = 0; p < N; p++) {
          s[p] = from.scale(w + p * panel, g, half);
          if (KIND == KIND_MINIMA) minus[p] = from.minus(w + p * panel, g);
        }
        EK_UNROLL for (int t = 0; t < M; t++) {
          const vf r = vf_all(x.scale[t * x.scale_stride + at]);
          EK_UNROLL for (int p = 0; p < N; p++) {
            vf v = vf_mul(vf_from_i32(dots[t][p]), s[p]);
            if (KIND == KIND_MINIMA) v = vf_fma(minus[p], vf_all(((const float*)x.start)[t * x.start_stride + at]), v);
            y[t][p] = vf_fma(v, r, y[t][p]);
          }
        }
      }
    }
  }
  EK_UNROLL for (int t = 0; t < M; t++) {
    EK_UNROLL for (int p = 0; p < N; p++) vf_store(sums + t * sums_stride + 16 * p, y[t][p]);
  }
}

}  // namespace EK_TIER
