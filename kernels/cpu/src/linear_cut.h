// How a linear layer is cut into items that threads claim, and an item into what its tiles go through.
//
// The numbers were found on Zen 5 (48 KiB of first cache a core, 1 MiB of second), where half or twice of each makes a
// few percent at most.
#pragma once
#include "linear_tile.h"

namespace EK_TIER {

enum {
  // An item's scratch: its sums, and what pays for offsets (int_tokens.start).
  SUMS_BYTES = 512 << 10,
  STARTS_BYTES = 1024 << 10,
  SUMS_PANEL = 4 * EK_PANEL,  // bytes of a token
  STARTS_GROUP = 8,           // at most: EK_Q6K has two

  // Up to so many tokens, what takes time is mostly to read weights: an item is about as many of them as are read in
  // the time in which a hundred items are claimed, and tiles go through chunks of 4 to 9 KiB a panel, so that memory
  // has no pauses.
  LINEAR_FEW = 48,
  ITEM_BYTES = 128 << 10,
  FLOAT_CHUNK_COLS = 128,
  INT_CHUNK_COLS = 1024,

  // With more, it is arithmetic: half a megabyte of activations, of so many tokens and a block of columns, stays in the
  // second cache while an item's panels are multiplied with it.
  LINEAR_MANY = 126,
  LINEAR_PANELS = 8,
  LINEAR_BLOCK = 2048,
};

// Of so many tokens there is room for the sums of two panels, and for what pays for the offsets of a block.
static_assert(LINEAR_FEW <= LINEAR_MANY && LINEAR_MANY * 2 * SUMS_PANEL <= SUMS_BYTES, "sums");
static_assert(LINEAR_MANY * (LINEAR_BLOCK / EK_GROUP) * STARTS_GROUP <= STARTS_BYTES, "starts");
static_assert(SUMS_BYTES + STARTS_BYTES <= EK_SCRATCH, "scratch");

// An item is some panels of one part times some tokens. Its columns are done block by block, in a block its panels one
// or two at a time, of these the block's columns chunk by chunk, each for all tokens.
struct cut {
  int64_t panels;  // of the part
  int64_t item_panels;
  int64_t item_tokens;
  int64_t row_items;
  int64_t token_items;
  int64_t block_cols;
  int64_t chunk_cols;
};

// The tiles that do `tokens` of an item.
struct tiling {
  int64_t panels;  // of a tile
  int64_t rounds;  // a chunk is gone through so often, each time for as many tokens, or one more
};

static inline bool is_float(const ek_matrix* part) { return part->format <= EK_BF16; }

static inline bool is_gated(const ek_linear* linear) {
  return linear->epilogue == EK_SILU_MUL || linear->epilogue == EK_GELU_MUL;
}

static tiling tile_tokens(const ek_matrix* part, int64_t tokens) {
  int64_t narrow = BITS_NARROW, wide = INT_WIDE;
  if (is_float(part)) {
    narrow = FLOAT_NARROW;
    wide = FLOAT_WIDE;
  } else if (part->format == EK_Q8 || part->format == EK_Q8F || part->format == EK_Q8M) {
    narrow = BYTES_NARROW;
  }
  if (tokens <= narrow) return tiling{1, 1};
  // The largest quantised tiles have sums in memory: worth it only where they save going through the weights again.
  if (WIDE_TILES && !is_float(part) && tokens > 2 * wide) wide--;
  return tiling{1 + WIDE_TILES, pieces(tokens, wide)};
}

static cut cut_part(const ek_linear* linear, const ek_matrix* part) {
  cut c;
  const int64_t tokens = linear->tokens;
  c.panels = pieces(part->rows, EK_PANEL);
  if (tokens <= LINEAR_FEW) {
    c.block_cols = least(part->cols, STARTS_BYTES / STARTS_GROUP * EK_GROUP);
    c.item_tokens = least(tokens, STARTS_BYTES / (STARTS_GROUP * pieces(c.block_cols, EK_GROUP)));
    c.item_panels = most(1, ITEM_BYTES / ek_panel_bytes(part));
    c.chunk_cols = is_float(part) ? FLOAT_CHUNK_COLS : INT_CHUNK_COLS;
  } else {
    c.item_tokens = pieces(tokens, pieces(tokens, LINEAR_MANY));
    c.item_panels = LINEAR_PANELS;
    c.block_cols = c.chunk_cols = LINEAR_BLOCK;
  }
  const tiling tiles = tile_tokens(part, c.item_tokens);
  if (tiles.panels == 1 && tiles.rounds == 1) c.chunk_cols = c.block_cols;
  // In pairs where tiles or gates want two: rounded before they are cut to what has room, and that to whole pairs.
  const int64_t step = tiles.panels == 2 || is_gated(linear) ? 2 : 1;
  c.item_panels = step * least(pieces(c.item_panels, step), SUMS_BYTES / (SUMS_PANEL * c.item_tokens) / step);
  c.row_items = pieces(c.panels, c.item_panels);
  c.token_items = pieces(tokens, c.item_tokens);
  return c;
}

}  // namespace EK_TIER
