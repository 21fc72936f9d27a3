// From scores to probabilities within one part of a context, and parts put together.
//
// A part's result is its largest score, the sum of exp(score - largest) and the values weighted with that; two such
// results make one by scaling both to the larger of their maxima (Milakov and Gimelshein, arXiv:1805.02867).
#pragma once
#include "attend_products.h"
#include "tanh.h"

namespace EK_TIER {

// Stands for "no score yet"; below every score that is finite.
static const float LOWEST = -3.402823466e38f;

struct score_rule {
  float scale;
  float softcap;              // 0: none
  const float* key_scales;    // [PART], where sums are integers
  const float* value_scales;  // as key_scales
};

// Lanes outside of slots first .. stop - 1 replaced; tile is of 16 slots.
static inline vf visible(vf x, int tile, int first, int stop, vf other) {
  if (stop - 16 * tile < 16) x = vf_keep_n(x, stop - 16 * tile, other);
  if (first > 16 * tile) x = vf_drop_n(x, first - 16 * tile, other);
  return x;
}

// What numbers are multiplied with to be words of at most MOST_WORD, and what that is undone with: NaN if one of them
// is not finite, as `poison`, their sum times zero, says. Rounding would swallow it.
struct word_scale {
  float to_words, from_words;
};
static inline word_scale scale_to_words(vf top, vf poison) {
  const float most = vf_top(top), spoilt = vf_sum(poison);
  const word_scale scale = {most > 1e-30f ? MOST_WORD / most : 0, most / MOST_WORD + spoilt};
  return scale;
}

// Row of products q.k (integers: to be multiplied with `query_scale`), of which slots first .. stop - 1 (at least one)
// are visible, into exp(score - largest), as F multiplies them. The other slots of the tiles that hold these become 0,
// by selection: what was there may be NaN. Answers the largest score, the sum, and what sums over values are to be
// multiplied with.
template <class F>
static void softmax_row(float* row, int first, int stop, const score_rule* rule, float query_scale, float* largest,
                        float* sum, float* value_scale) {
  const int tile = first / 16, stop_tile = (stop + 15) / 16;
  const float scale = F::INTEGER ? rule->scale * query_scale : rule->scale;
  const vf scales = vf_all(rule->softcap > 0 ? scale / rule->softcap : scale);
  vf top = vf_all(LOWEST);
  for (int i = tile; i < stop_tile; i++) {
    vf x;
    if (F::INTEGER) {
      x = vf_mul(vf_from_i32(vi_load(row + 16 * i)), vf_load(rule->key_scales + 16 * i));
    } else {
      x = vf_load(row + 16 * i);
    }
    x = vf_mul(x, scales);
    if (rule->softcap > 0) x = vf_mul(vf_all(rule->softcap), tanh_of(x));
    x = visible(x, i, first, stop, vf_all(LOWEST));
    vf_store(row + 16 * i, x);
    top = vf_max(top, x);
  }
  *largest = vf_top(top);
  const vf tops = vf_all(*largest);
  vf sums = vf_zero(), most = vf_zero(), poison = vf_zero();
  for (int i = tile; i < stop_tile; i++) {
    const vf p = visible(vf_exp(vf_sub(vf_load(row + 16 * i), tops)), i, first, stop, vf_zero());
    sums = vf_add(sums, p);
    if (F::INTEGER) {
      const vf weighted = visible(vf_mul(p, vf_load(rule->value_scales + 16 * i)), i, first, stop, vf_zero());
      most = vf_max(most, weighted);
      poison = vf_fma(weighted, vf_zero(), poison);
      vf_store(row + 16 * i, weighted);
    } else {
      F::store((char*)row + 16 * i * F::A_BYTES / F::DEEP, p);  // in place: it takes no more room than the scores did
    }
  }
  *sum = vf_sum(sums);
  *value_scale = 1;
  if (F::INTEGER) {
    const word_scale words = scale_to_words(most, poison);
    *value_scale = words.from_words;
    const vf to_words = vf_all(words.to_words);
    for (int i = tile; i < stop_tile; i++) {
      F::store((char*)row + 16 * i * F::A_BYTES / F::DEEP, vf_mul(vf_load(row + 16 * i), to_words));
    }
  }
}

// The softmax of a row so far; `out` holds the weighted sum of values.
struct softmax_state {
  float largest;
  float sum;
};

// Puts a part's result to that of the parts before it.
static inline void add_part(softmax_state* all, float* out, const softmax_state* part, const float* values, int dim) {
  const float top = part->largest > all->largest ? part->largest : all->largest;
  const vf old_weight = vf_exp(vf_all(all->largest - top)), weight = vf_exp(vf_all(part->largest - top));
  vf_store_n(&all->sum, vf_fma(vf_all(all->sum), old_weight, vf_mul(vf_all(part->sum), weight)), 1);
  all->largest = top;
  for (int i = 0; i < dim; i += 16) {
    vf_store(out + i, vf_fma(vf_load(out + i), old_weight, vf_mul(vf_load(values + i), weight)));
  }
}

}  // namespace EK_TIER
