// How a linear layer is cut into items, and an item into what its tiles go through.
#pragma once
#include "linear_tile.h"

namespace EK_TIER {

#ifndef CH_F
#define CH_F 128
#endif
#ifndef CH_I
#define CH_I 1024
#endif
#ifndef ITEM_B
#define ITEM_B (128<<10)
#endif
#ifndef KB_F
#define KB_F 1024
#endif
#ifndef KB_I
#define KB_I 2048
#endif
#ifndef PPI
#define PPI 8
#endif
enum {
  SUMS_BYTES = 512 << 10,     // of an item's scratch, for its sums
  STARTS_BYTES = 1024 << 10,  // for what pays for offsets
  FEW_TOKENS = 48,
  MANY_TOKENS = 252,
};

// An item is some panels of one part times some tokens. Its columns are done block by block, in a block its panels one
// after the other, of each the block's columns chunk by chunk, each for all tokens.
struct cut {
  int64_t panels;  // of the part
  int64_t item_panels;
  int64_t item_tokens;
  int64_t row_items;
  int64_t token_items;
  int64_t block_cols;
  int64_t chunk_cols;
};

static inline bool is_float(const ek_matrix* part) { return part->format <= EK_BF16; }

// The tiles that do `tokens` of an item.
struct tiling {
  int64_t panels;  // of a tile
  int64_t rounds;  // a panel or pair of panels is gone through so often, each time for as many tokens, or one more
};

static tiling tile_tokens(const ek_matrix* part, int64_t tokens) {
  int64_t narrow = BITS_NARROW, wide = INT_WIDE;
  if (is_float(part)) {
    narrow = FLOAT_NARROW;
    wide = FLOAT_WIDE;
  } else if (part->format == EK_Q8 || part->format == EK_Q8F || part->format == EK_Q8M) {
    narrow = BYTES_NARROW;
  }
  if (tokens <= narrow) return tiling{1, 1};
  return tiling{1 + WIDE_TILES, pieces(tokens, wide)};
}

static cut cut_part(const ek_matrix* part, int64_t tokens) {
  cut c;
  c.panels = pieces(part->rows, EK_PANEL);
  if (tokens <= FEW_TOKENS) {
    c.item_tokens = tokens;
    if (!is_float(part)) c.item_tokens = least(tokens, most(1, STARTS_BYTES / (8 * pieces(part->cols, EK_GROUP))));
    c.item_panels = ITEM_B / ek_panel_bytes(part);
    c.block_cols = part->cols;
    const tiling tiles = tile_tokens(part, c.item_tokens);
    c.chunk_cols = tiles.panels * tiles.rounds == 1 ? part->cols : is_float(part) ? CH_F : CH_I;
  } else {
    c.item_tokens = pieces(tokens, pieces(tokens, MANY_TOKENS));
    c.item_panels = PPI;
    c.block_cols = c.chunk_cols = is_float(part) ? KB_F : KB_I;
  }
  const int64_t most_panels = SUMS_BYTES / (4 * EK_PANEL * c.item_tokens);
  c.item_panels = pieces(most(1, least(c.item_panels, most_panels)), 2) * 2;
  c.row_items = pieces(c.panels, c.item_panels);
  c.token_items = pieces(tokens, c.item_tokens);
  return c;
}

}  // namespace EK_TIER
