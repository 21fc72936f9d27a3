// One tile over one part of its context: scores, softmax, weighted values.
//
// What a row sees may begin and end in the middle of what is read. Slots that it does not see may hold NaN, so they are
// never multiplied by zero: their scores are replaced, and the sums over V leave them out.
#pragma once
#include "attend_tile.h"

namespace EK_TIER {

// What to fetch while something else is worked on, if there is anything: a chunk of K, a window of V.
template <class F>
static fetch_ahead keys_ahead(const part_view* view, int tile, int dim) {
  const int64_t bytes = tile_bytes<F>(dim);
  const int left = view->stop - tile;
  if (view->in_order) return lines_of<F>(view->key_runs + tile, 1, 1, 0, bytes * (left < CHUNK ? left : CHUNK));
  return lines_of<F>(view->key_runs + tile, CHUNK, left, 0, bytes);
}
template <class F>
static fetch_ahead values_ahead(const part_view* view, int tile, int dim) {
  const int64_t bytes = tile_bytes<F>(dim);
  const int window = value_window<F>(dim), left = view->stop - tile;
  if (view->in_order) return lines_of<F>(view->values + tile, 1, 1, 0, bytes * (left < window ? left : window));
  return lines_of<F>(view->values + tile, window, left, 0, bytes);
}

// What to fetch while a chunk of K is worked on: the next one, after the last one V.
template <class F>
static fetch_ahead after_keys(const part_view* view, int chunk, int dim) {
  const int next = chunk + CHUNK;
  return next < view->stop ? keys_ahead<F>(view, next, dim) : values_ahead<F>(view, view->first, dim);
}

// The same where it is worked on only once and so is done with soon: not all of the next chunk, but as much as makes a
// window, beginning with what is left of this very chunk. One for each window of rows.
template <class F>
static void after_key_windows(const part_view* view, int chunk, int windows, int dim, fetch_ahead* aheads) {
  const int begin = chunk > view->first ? chunk : view->first;
  const int64_t bytes = WINDOW / CHUNK;
  for (int i = 0; i + 1 < windows; i++) {
    const int64_t offset = (i + 1) * bytes, left = tile_bytes<F>(dim) - offset;
    aheads[i] = lines_of<F>(view->key_runs + begin, CHUNK, view->stop - begin, offset, left < bytes ? left : bytes);
  }
  fetch_ahead* const last = &aheads[windows - 1];
  *last = after_keys<F>(view, chunk, dim);
  if (last->left > WINDOW / 256) last->left = WINDOW / 256;
}

// Products q.k of all rows with the tiles that a block of them sees.
template <class F>
static void find_scores(const attend_tile* tile, const part_view* view) {
  tile_room* room = tile->room;
  const int64_t depth = tile->dim / F::DEEP;
  const bool in_windows = tile->num_blocks == 1 && !view->in_order;
  const int64_t window = in_windows ? key_window<F>() : depth;
  fetch_ahead aheads[MOST_DIM * 4 * 16 * CHUNK / WINDOW];
  for (int chunk = view->first / CHUNK * CHUNK; chunk < view->stop; chunk += CHUNK) {
    const fetch_ahead ahead = after_keys<F>(view, chunk, tile->dim);
    if (in_windows) after_key_windows<F>(view, chunk, (int)((depth + window - 1) / window), tile->dim, aheads);
    for (int block = 0; block < tile->num_blocks; block++) {
      const int from = first_row(tile, block), rows = first_row(tile, block + 1) - from;
      const int first = room->first[from / tile->group], stop = room->stop[(from + rows - 1) / tile->group];
      const int until = (stop + 15) / 16 < chunk + CHUNK ? (stop + 15) / 16 : chunk + CHUNK;
      if (!in_windows) aheads[0] = share_of(&ahead, block, tile->num_blocks);
      for (int i = first / 16 > chunk ? first / 16 : chunk; i < until; i += BLOCK_VECTORS) {
        const score_job job = {room->queries + from * depth * F::A_BYTES,
                               view->keys + i,
                               (int64_t)tile->a->cache->block_size / 16 * F::B_BYTES,
                               depth,
                               aheads,
                               window,
                               room->scores + from * SCORE_STRIDE + 16 * i};
        score<F>(rows, until - i < BLOCK_VECTORS ? until - i : BLOCK_VECTORS, &job);
      }
    }
  }
}

// Adds to rows `from` .. the values in rows first .. stop - 1 of V (of DEEP slots each) with their probabilities.
template <class F>
static void add_rows(const attend_tile* tile, const char* const* values, int from, int rows, int first, int stop,
                     fetch_ahead* ahead = nullptr) {
  if (first >= stop) return;
  tile_room* room = tile->room;
  const int vectors = tile->dim / 16;
  for (int i = 0; i < vectors; i += BLOCK_VECTORS) {
    const value_job job = {(const char*)(room->scores + from * SCORE_STRIDE),
                           values,
                           i * F::B_BYTES,
                           (int64_t)vectors * F::B_BYTES,
                           first,
                           stop,
                           ahead,
                           room->values + from * OUT_STRIDE + 16 * i};
    add_values<F>(rows, vectors - i < BLOCK_VECTORS ? vectors - i : BLOCK_VECTORS, &job);
  }
}

// Where of a pair of slots only this one is seen: a copy of the pair's row with zeros for the other.
template <class F>
static void add_half_row(const attend_tile* tile, const part_view* view, int from, int rows, int slot) {
  tile_room* room = tile->room;
  const int row = slot / 2, in_tile = row % 8;
  const int64_t stride = (int64_t)tile->dim * 4;
  const char* whole = view->values[row / 8] + in_tile * stride;
  const vi mask = vi_all(slot % 2 ? (int32_t)0xffff0000 : 0xffff);
  char* const half = room->edge + in_tile * stride;
  for (int64_t i = 0; i < stride; i += 64) vi_store(half + i, vi_and(vi_load(whole + i), mask));
  add_rows<F>(tile, room->edges, from, rows, row, row + 1);
}

// Rows of V that a token sees all slots of; of integers, which are never NaN, also those that it sees half of.
template <class F>
static inline int whole_first(const tile_room* room, int token) {
  return (room->first[token] + (F::INTEGER ? 0 : F::DEEP - 1)) / F::DEEP;
}
template <class F>
static inline int whole_stop(const tile_room* room, int token) {
  return (room->stop[token] + (F::INTEGER ? F::DEEP - 1 : 0)) / F::DEEP;
}

struct block_zone {
  int first, stop;  // rows of V that all rows of the block see
};

template <class F>
static block_zone zone_of(const attend_tile* tile, int block) {
  const tile_room* room = tile->room;
  const int token = first_row(tile, block) / tile->group, last = (first_row(tile, block + 1) - 1) / tile->group;
  // Later tokens begin later and end later; one that sees nothing begins at the part's end or ends at its beginning.
  const block_zone zone = {whole_first<F>(room, last), whole_stop<F>(room, token)};
  const block_zone none = {PART, PART};
  return zone.first < zone.stop ? zone : none;
}

// What the tokens of a block see before (after) what all of it sees.
template <class F, bool BEFORE>
static void add_edges(const attend_tile* tile, const part_view* view, int block, block_zone zone) {
  const tile_room* room = tile->room;
  const int stop = first_row(tile, block + 1);
  const bool has_halves = F::DEEP == 2 && !F::INTEGER;
  for (int from = first_row(tile, block); from < stop;) {
    const int token = from / tile->group, end = (token + 1) * tile->group;
    const int rows = (end < stop ? end : stop) - from;
    if (sees(room, token)) {
      const int first = whole_first<F>(room, token), last = whole_stop<F>(room, token);
      if (BEFORE) {
        if (has_halves && room->first[token] % 2) add_half_row<F>(tile, view, from, rows, room->first[token]);
        add_rows<F>(tile, view->values, from, rows, first, zone.first < last ? zone.first : last);
      } else {
        add_rows<F>(tile, view->values, from, rows, zone.stop, last);
        if (has_halves && room->stop[token] % 2) add_half_row<F>(tile, view, from, rows, room->stop[token] - 1);
      }
    }
    from += rows;
  }
}

// Values weighted with the probabilities of the part; `next` is the part to come, if there is one.
template <class F>
static void find_values(const attend_tile* tile, const part_view* view, const part_view* next) {
  tile_room* room = tile->room;
  for (int row = 0; row < tile->rows; row++) memset(room->values + row * OUT_STRIDE, 0, tile->dim * sizeof(float));
  block_zone zones[MOST_BLOCKS];
  for (int block = 0; block < tile->num_blocks; block++) {
    zones[block] = zone_of<F>(tile, block);
    add_edges<F, true>(tile, view, block, zones[block]);
  }
  const int window = value_window<F>(tile->dim), window_rows = 16 * window / F::DEEP;
  for (int i = view->first / window * window; i < view->stop; i += window) {
    const int row = i * 16 / F::DEEP;
    fetch_ahead ahead = fetch_ahead();
    if (i + window < view->stop) {
      ahead = values_ahead<F>(view, i + window, tile->dim);
    } else if (next != nullptr) {
      ahead = keys_ahead<F>(next, next->first, tile->dim);
    }
    for (int block = 0; block < tile->num_blocks; block++) {
      const int from = first_row(tile, block), rows = first_row(tile, block + 1) - from;
      const int first = zones[block].first > row ? zones[block].first : row;
      const int stop = zones[block].stop < row + window_rows ? zones[block].stop : row + window_rows;
      fetch_ahead share = share_of(&ahead, block, tile->num_blocks);
      add_rows<F>(tile, view->values, from, rows, first, stop, ahead.at[0] == nullptr ? nullptr : &share);
    }
  }
  for (int block = 0; block < tile->num_blocks; block++) add_edges<F, false>(tile, view, block, zones[block]);
  if (!F::INTEGER) return;
  for (int row = 0; row < tile->rows; row++) {
    float* const values = room->values + row * OUT_STRIDE;
    const vf scale = vf_all(room->row_scales[row]);
    for (int d = 0; d < tile->dim; d += 16) vf_store(values + d, vf_mul(vf_from_i32(vi_load(values + d)), scale));
  }
}

// The part's result of every row that sees some of it: room->part and room->values.
template <class F>
static void attend_part(const attend_tile* tile, const part_view* view, const part_view* next) {
  tile_room* room = tile->room;
  see(tile, view);
  if (F::INTEGER) {
    for (int i = view->first; i < view->stop; i++) prefetch(view->value_scales[i]);
  }
  find_scores<F>(tile, view);
  if (F::INTEGER) {
    take_scales(view, view->key_scales, room->key_scales);
    take_scales(view, view->value_scales, room->value_scales);
  }
  const score_rule rule = {tile->a->scale, tile->a->softcap, room->key_scales, room->value_scales};
  for (int row = 0; row < tile->rows; row++) {
    const int token = row / tile->group;
    if (!sees(room, token)) continue;
    softmax_row<F>(room->scores + row * SCORE_STRIDE, room->first[token], room->stop[token], &rule,
                   room->query_scales[row], &room->part[row].largest, &room->part[row].sum, &room->row_scales[row]);
  }
  find_values<F>(tile, view, next);
}

}  // namespace EK_TIER
