// A tile's queries (attend_plan.h), the part of its context that is being worked on, and a thread's room for both.
#pragma once
#include "attend_softmax.h"

namespace EK_TIER {

static const int MOST_BLOCKS = (MOST_ROWS + BLOCK_ROWS - 1) / BLOCK_ROWS;

// A part of a context: where its tiles of 16 slots lie.
struct part_view {
  int64_t slot;                // its first; parts begin at multiples of PART
  int32_t first, stop;         // tiles that some row sees
  const char* keys[TILES];
  const char* values[TILES];
  const char* key_runs[TILES];  // to fetch: K of a block is cut into as many runs of bytes as it has tiles
  const uint16_t* key_scales[TILES];    // of integers: of each tile's slots
  const uint16_t* value_scales[TILES];
  bool in_order;                // tiles lie end to end
};

struct tile_room {
  alignas(64) float scores[MOST_ROWS * SCORE_STRIDE];  // then probabilities
  alignas(64) float values[MOST_ROWS * OUT_STRIDE];    // weighted, of the part
  alignas(64) float out[MOST_ROWS * OUT_STRIDE];       // of the parts so far
  alignas(64) char queries[MOST_ROWS * MOST_DIM * 4];
  alignas(64) float key_scales[PART];
  alignas(64) float value_scales[PART];
  float query_scales[MOST_ROWS];  // of integers, what they are to be multiplied with
  float row_scales[MOST_ROWS];    // the same of sums over values
  alignas(64) char edge[16 * MOST_DIM * 4];  // rows of V with one slot of a pair zeroed
  const char* edges[TILES];
  part_view views[2];
  softmax_state part[MOST_ROWS];
  softmax_state all[MOST_ROWS];
  int32_t first[MOST_ROWS], stop[MOST_ROWS];  // slots of the part that a token sees; none: stop <= first
};
static_assert(sizeof(tile_room) <= EK_SCRATCH, "a thread's scratch");

struct attend_tile {
  const ek_attend* a;
  tile_room* room;
  const int64_t* table;
  int64_t position;  // of the first token
  int64_t row;       // of the batch
  int32_t tokens;
  int32_t group;  // rows of a token
  int32_t rows;
  int32_t num_blocks;  // of rows
  int64_t head;        // first query head
  int64_t key_plane, value_plane, plane_bytes;
  int32_t dim;
};

static inline int first_row(const attend_tile* tile, int block) { return tile->rows * block / tile->num_blocks; }

// Queries as products take them: of each block of rows [depth][rows].
template <class F>
static void take_queries(const attend_tile* tile) {
  char one[MOST_DIM * 4];
  const int depth = tile->dim / F::DEEP;
  for (int block = 0; block < tile->num_blocks; block++) {
    const int from = first_row(tile, block), rows = first_row(tile, block + 1) - from;
    char* to = tile->room->queries + from * depth * F::A_BYTES;
    for (int r = 0; r < rows; r++) {
      const int64_t token = (from + r) / tile->group, head = tile->head + (from + r) % tile->group;
      const float* q = tile->a->q + (tile->row + token) * tile->a->q_stride + head * tile->dim;
      vf factor = vf_all(1);
      if (F::INTEGER) {
        vf top = vf_zero(), poison = vf_zero();
        for (int d = 0; d < tile->dim; d += 16) {
          top = vf_max(top, vf_abs(vf_load(q + d)));
          poison = vf_fma(vf_load(q + d), vf_zero(), poison);
        }
        const word_scale words = scale_to_words(top, poison);
        tile->room->query_scales[from + r] = words.from_words;
        factor = vf_all(words.to_words);
      }
      for (int d = 0; d < tile->dim; d += 16) {
        const vf x = vf_load(q + d);
        F::store(one + d / F::DEEP * F::A_BYTES, F::INTEGER ? vf_mul(x, factor) : x);
      }
      for (int i = 0; i < depth; i++) memcpy(to + (i * rows + r) * F::A_BYTES, one + i * F::A_BYTES, F::A_BYTES);
    }
  }
}

// Looks the part's blocks up, and has the scales of its keys fetched: they lie apart from these.
template <class F>
static void find_part(const attend_tile* tile, int64_t part, part_view* view) {
  const ek_cache* cache = tile->a->cache;
  const int64_t first = first_seen(tile->a, tile->position) - part * PART;
  const int64_t stop = tile->position + tile->tokens - part * PART;
  view->slot = part * PART;
  view->first = (int32_t)(first > 0 ? first / 16 : 0);
  view->stop = (int32_t)((stop < PART ? stop + 15 : PART) / 16);
  view->in_order = true;
  const int64_t slot = view->slot + 16 * view->first, bytes = tile_bytes<F>(tile->dim);
  const int64_t* block = tile->table + slot / cache->block_size;
  for (int i = view->first, in_block = (int)(slot % cache->block_size) / 16; i < view->stop; block++, in_block = 0) {
    const char* keys = plane_at(cache, tile->plane_bytes, tile->key_plane, *block);
    const int64_t planes = (tile->value_plane - tile->key_plane) * num_blocks_at(cache, *block);
    const char* values = keys + planes * tile->plane_bytes;
    const int end = i + cache->block_size / 16 - in_block, until = end < view->stop ? end : view->stop;
    if (i > view->first && keys != view->key_runs[i - 1] + bytes) view->in_order = false;
    if (F::INTEGER) {
      const uint16_t* key_scales = scales_at(cache, tile->plane_bytes, tile->key_plane, *block);
      const uint16_t* value_scales = key_scales + planes * cache->block_size;
      for (int n = 0; n < until - i; n++) {
        view->key_scales[i + n] = key_scales + 16 * (in_block + n);
        view->value_scales[i + n] = value_scales + 16 * (in_block + n);
        prefetch(view->key_scales[i + n]);
      }
    }
    for (; i < until; i++, in_block++) {
      view->keys[i] = keys + in_block * F::B_BYTES;
      view->key_runs[i] = keys + in_block * bytes;
      view->values[i] = values + in_block * bytes;
    }
  }
}

// The float16 scales of the part's keys (values) in float32; those of slots that nobody sees are anything.
static void take_scales(const part_view* view, const uint16_t* const* of_tiles, float* scales) {
  for (int i = view->first; i < view->stop; i++) vf_store(scales + 16 * i, vf_from_f16(of_tiles[i]));
}

// Which slots of the part each token sees.
static void see(const attend_tile* tile, const part_view* view) {
  for (int i = 0; i < tile->tokens; i++) {
    const int64_t first = first_seen(tile->a, tile->position + i) - view->slot;
    const int64_t stop = tile->position + i + 1 - view->slot;
    tile->room->first[i] = (int32_t)(first > 0 ? (first < PART ? first : PART) : 0);
    tile->room->stop[i] = (int32_t)(stop > 0 ? (stop < PART ? stop : PART) : 0);
  }
}

static inline bool sees(const tile_room* room, int token) { return room->stop[token] > room->first[token]; }

}  // namespace EK_TIER
