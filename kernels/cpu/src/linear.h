// Linear layers: y = W x for any number of tokens, and what comes after it (ek.h: ek_linear).
//
// Weights are what takes time as long as tokens are few: each byte is read from memory once, in long streams, while
// tiles compute with what came before. With many tokens it is arithmetic, and what a tile reads must come from near:
// activations of a block of columns from the second cache, weights of a chunk (two panels) from the first or second.
//
// Rows of prepared activations are best an odd number of cache lines apart (kernels/cpu/formats.py: activation_stride),
// and hold zeros up to whole pairs of columns (bf16).
#pragma once
#include "linear_finish.h"
#include "linear_float.h"
#include "linear_int.h"

namespace EK_TIER {

// How far ahead of a tile that goes through all columns of one panel memory is read.
enum { STREAM_AHEAD = 8 << 10 };

// Columns of one or two panels, for all tokens of an item.
struct chunk {
  int64_t panel;  // of the item
  int64_t col;
  int64_t cols;
  int64_t block;  // its block's first column
};

static inline const char* panel_at(const work* k, int64_t panel) {
  return (const char*)k->part->data + (k->first_panel + panel) * k->panel_bytes;
}

// Bytes from a chunk's first panel to its second. Where there is none, tiles of two do the last panel twice.
static inline int64_t next_panel(const work* k, const chunk* c) {
  return c->panel + 1 < k->num_panels ? k->panel_bytes : 0;
}

// What tile `round` of those that go through the chunk's `bytes` at w has to fetch ahead; `step` bytes are a step.
static inline ahead ahead_of(const work* k, const chunk* c, const char* w, int64_t bytes, int64_t step, int64_t round) {
  const tiling tiles = k->tiles;
  if (tiles.panels * tiles.rounds == 1) return ahead{w + STREAM_AHEAD, step};
  const char* next = w + bytes;
  if (c->col + c->cols >= k->part->cols) next = panel_at(k, c->panel + tiles.panels);
  return ahead{next + bytes * round / tiles.rounds, step / tiles.rounds};
}

// The tokens of round `round`.
struct span {
  int64_t first;  // of the item
  int64_t count;
};

static inline span tokens_of(const work* k, int64_t round) {
  const int64_t first = k->num_tokens * round / k->tiles.rounds;
  return span{first, k->num_tokens * (round + 1) / k->tiles.rounds - first};
}

typedef void (*float_tile_of)(const char*, int64_t, const char*, int64_t, int64_t, ahead, float*, int64_t);

#define EK_TILES(tile, S, first, N) \
  tile<S, first, N>, tile<S, first + 1, N>, tile<S, first + 2, N>, tile<S, first + 3, N>

template <class S>
static float_tile_of float_tile_for(int64_t tokens, int64_t panels) {
  enum { LAST = FLOAT_NARROW };
  static const float_tile_of narrow[] = {EK_TILES(float_tile, S, 1, 1), float_tile<S, LAST < 5 ? 1 : 5, 1>,
                                         float_tile<S, LAST < 6 ? 1 : 6, 1>};
#if EK_VECTOR_REGISTERS >= 32
  static const float_tile_of wide[] = {EK_TILES(float_tile, S, 7, 2), EK_TILES(float_tile, S, 11, 2)};
  if (panels == 2) return wide[tokens - 7];
#else
  (void)panels;
#endif
  return narrow[tokens - 1];
}

template <class S>
static void multiply_floats(const work* k, const chunk* c, const char* acts, int64_t stride) {
  const int64_t first = c->col / S::COLS, count = pieces(c->cols, S::COLS);
  const char* w = panel_at(k, c->panel) + first * S::BYTES;
  for (int64_t round = 0; round < k->tiles.rounds; round++) {
    const span tokens = tokens_of(k, round);
    const char* x = acts + (k->first_token + tokens.first) * stride + 4 * first;
    float_tile_for<S>(tokens.count, k->tiles.panels)(
        w, next_panel(k, c), x, stride, count, ahead_of(k, c, w, count * S::BYTES, S::BYTES, round),
        k->sums + tokens.first * k->sums_stride + EK_PANEL * c->panel, k->sums_stride);
  }
}

typedef void (*int_tile_of)(const ek_matrix*, const uint8_t*, int64_t, const int_tokens*, int64_t, ahead, float*,
                            int64_t);

template <class S>
static int_tile_of int_tile_for(int64_t tokens, int64_t panels) {
#if EK_VECTOR_REGISTERS >= 32
  static const int_tile_of wide[] = {EK_TILES(int_tile, S, 4, 2), int_tile<S, 8, 2>};
  if (panels == 2) return wide[tokens - 4];
#else
  (void)panels;
#endif
  enum { LAST = S::NARROW };
  static const int_tile_of narrow[] = {EK_TILES(int_tile, S, 1, 1), int_tile<S, LAST < 5 ? 1 : 5, 1>,
                                       int_tile<S, LAST < 6 ? 1 : 6, 1>};
  return narrow[tokens - 1];
}

#undef EK_TILES

// Places in k->starts for a token.
static inline int64_t starts_stride(const ek_matrix* part, int64_t cols) {
  return pieces(cols, EK_GROUP) * (part->format == EK_Q6K ? 2 : 1);
}

template <class S>
static void multiply_ints(const work* k, const chunk* c, int64_t stride) {
  const S from(k->part);
  const ek_acts* acts = k->linear->acts;
  const int64_t halves = S::KIND == KIND_32_HALF ? 2 : 1;
  const int64_t group = c->col / EK_GROUP, units = c->cols / EK_GROUP / from.groups;
  const char* w = panel_at(k, c->panel) + group / from.groups * from.unit;
  for (int64_t round = 0; round < k->tiles.rounds; round++) {
    const span tokens = tokens_of(k, round);
    const int64_t row = k->first_token + tokens.first;
    const int_tokens x = {acts->q8 + row * acts->q8_stride + c->col,
                          acts->q8_stride,
                          acts->q8_scale + row * acts->group_stride + group,
                          acts->group_stride,
                          k->starts + tokens.first * stride + (group - c->block / EK_GROUP) * halves,
                          stride};
    const ahead next = ahead_of(k, c, w, units * from.unit, from.unit / (4 * halves * from.groups), round);
    int_tile_for<S>(tokens.count, k->tiles.panels)(
        k->part, (const uint8_t*)w, next_panel(k, c), &x, units, next,
        k->sums + tokens.first * k->sums_stride + EK_PANEL * c->panel, k->sums_stride);
  }
}

// Fills k->starts for the block's columns (int_tokens.start).
static void prepare_starts(const work* k, int64_t block, int64_t cols, int64_t stride) {
  const ek_acts* acts = k->linear->acts;
  const int64_t groups = cols / EK_GROUP;
  for (int64_t t = 0; t < k->num_tokens; t++) {
    const int64_t row = k->first_token + t;
    const int32_t* sums = acts->q8_sum + row * acts->group_stride + block / EK_GROUP;
    int32_t* starts = k->starts + t * stride;
    switch (k->part->format) {
      case EK_Q8:
      case EK_Q8F:
        for (int64_t g = 0; g < groups; g++) starts[g] = -128 * sums[g];
        break;
      case EK_Q4:
        for (int64_t g = 0; g < groups; g++) starts[g] = -8 * sums[g];
        break;
      case EK_Q6K:  // half groups, of whole super-blocks
        for (int64_t g = 0; g < groups; g += 2) {
          i8_sums(acts->q8 + row * acts->q8_stride + block + EK_GROUP * g, starts + 2 * g);
        }
        for (int64_t g = 0; g < 2 * groups; g++) starts[g] *= -32;
        break;
      default:
        for (int64_t g = 0; g < groups; g++) ((float*)starts)[g] = (float)sums[g];
    }
  }
}

static void multiply_chunk(const work* k, const chunk* c, int64_t stride) {
  const ek_acts* acts = k->linear->acts;
  const char* f32 = (const char*)acts->f32;
  switch (k->part->format) {
    case EK_F32: return multiply_floats<steps_f32>(k, c, f32, 4 * acts->f32_stride);
    case EK_F16: return multiply_floats<steps_f16>(k, c, f32, 4 * acts->f32_stride);
    case EK_BF16: return multiply_floats<steps_bf16>(k, c, (const char*)acts->bf16, 2 * acts->bf16_stride);
    case EK_Q8: return multiply_ints<panels_q8>(k, c, stride);
    case EK_Q8F: return multiply_ints<panels_q8f>(k, c, stride);
    case EK_Q8M: return multiply_ints<panels_q8m>(k, c, stride);
    case EK_Q4: return multiply_ints<panels_q4>(k, c, stride);
    case EK_Q4Z: return multiply_ints<panels_q4z>(k, c, stride);
    case EK_Q4K: return multiply_ints<panels_q4k>(k, c, stride);
    case EK_Q5K: return multiply_ints<panels_q5k>(k, c, stride);
    default: return multiply_ints<panels_q6k>(k, c, stride);
  }
}

static void multiply(const work* k, const cut* c) {
  const int64_t all = k->part->cols;
  for (int64_t block = 0; block < all; block += c->block_cols) {
    const int64_t end = least(all, block + c->block_cols);
    const int64_t stride = starts_stride(k->part, end - block);
    if (!is_float(k->part)) prepare_starts(k, block, end - block, stride);
    for (int64_t panel = 0; panel < k->num_panels; panel += k->tiles.panels) {
      for (int64_t col = block; col < end; col += c->chunk_cols) {
        const chunk part = {panel, col, least(end - col, c->chunk_cols), block};
        multiply_chunk(k, &part, stride);
      }
    }
  }
}

static int64_t linear_items(const ek_linear* linear, int32_t threads) {
  (void)threads;  // items are small enough for any number of them
  int64_t items = 0;
  for (int32_t i = 0; i < linear->num_parts; i++) {
    const cut c = cut_part(linear, &linear->parts[i]);
    items += c.row_items * c.token_items;
  }
  return items;
}

static void linear_item(const ek_linear* linear, int64_t item, void* scratch) {
  const ek_matrix* part = linear->parts;
  int64_t first_row = 0;
  cut c = cut_part(linear, part);
  for (; item >= c.row_items * c.token_items; c = cut_part(linear, ++part)) {
    item -= c.row_items * c.token_items;
    first_row += part->rows;
  }
  work k;
  k.linear = linear;
  k.part = part;
  k.panel_bytes = ek_panel_bytes(part);
  k.first_panel = item / c.token_items * c.item_panels;
  k.num_panels = least(c.item_panels, c.panels - k.first_panel);
  k.first_token = item % c.token_items * c.item_tokens;
  k.num_tokens = least(c.item_tokens, linear->tokens - k.first_token);
  k.tiles = tile_tokens(part, k.num_tokens);
  k.sums = (float*)scratch;
  k.sums_stride = EK_PANEL * c.item_panels;
  k.starts = (int32_t*)((char*)scratch + SUMS_BYTES);
  memset(k.sums, 0, sizeof(float) * (size_t)(k.sums_stride * k.num_tokens));
  multiply(&k, &c);
  finish(&k, first_row);
}

}  // namespace EK_TIER
