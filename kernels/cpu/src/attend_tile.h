// One tile (attend_plan.h) over one part of its context: scores, softmax, weighted values.
//
// What a row sees may begin and end in the middle of what is read. Slots that it does not see may hold NaN, so they are
// never multiplied by zero: their scores are replaced, and the sums over V leave them out.
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

// Looks the part's blocks up.
template <class F>
static void find_part(const attend_tile* tile, int64_t part, part_view* view) {
  const ek_cache* cache = tile->a->cache;
  const int64_t first = first_seen(tile->a, tile->position) - part * PART;
  const int64_t stop = tile->position + tile->tokens - part * PART;
  view->slot = part * PART;
  view->first = (int32_t)(first > 0 ? first / 16 : 0);
  view->stop = (int32_t)((stop < PART ? stop + 15 : PART) / 16);
  const int64_t slot = view->slot + 16 * view->first, tile_bytes = (int64_t)tile->dim / F::DEEP * F::B_BYTES;
  int64_t block = slot / cache->block_size, in_block = slot % cache->block_size;
  view->in_order = true;
  for (int i = view->first; i < view->stop; i++) {
    const char* keys = plane_at(cache, tile->plane_bytes, tile->key_plane, tile->table[block]);
    const char* values = plane_at(cache, tile->plane_bytes, tile->value_plane, tile->table[block]);
    view->keys[i] = keys + in_block / 16 * F::B_BYTES;
    view->key_runs[i] = keys + in_block / 16 * tile_bytes;
    view->values[i] = values + in_block / 16 * tile_bytes;
    if (i > view->first && keys + in_block / 16 * tile_bytes != view->key_runs[i - 1] + tile_bytes) view->in_order = false;
    in_block += 16;
    if (in_block == cache->block_size) in_block = 0, block++;
  }
}

// The float16 scales of the part's keys (values) in float32; those of slots that nobody sees are anything.
static void take_scales(const attend_tile* tile, const part_view* view, int64_t plane, float* scales) {
  const ek_cache* cache = tile->a->cache;
  for (int i = view->first; i < view->stop; i++) {
    const int64_t slot = view->slot + 16 * i;
    const int64_t block = tile->table[slot / cache->block_size];
    vf_store(scales + 16 * i, vf_from_f16(scales_at(cache, tile->plane_bytes, plane, block) + slot % cache->block_size));
  }
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

// How far ahead is fetched. Less does not cover the time that memory takes to answer; what is much more is dropped by the
// processor, which keeps only so many requests.
static const int64_t WINDOW = 8192;  // bytes

// Rows of K of CHUNK tiles, and tiles of V, that make about a window.
template <class F>
static inline int64_t key_window() { return WINDOW / CHUNK / F::B_BYTES; }
template <class F>
static inline int value_window(int dim) {
  const int64_t tile_bytes = (int64_t)dim / F::DEEP * F::B_BYTES;
  return tile_bytes * 4 <= WINDOW ? 4 : tile_bytes * 2 <= WINDOW ? 2 : 1;
}

// Lines end to end, or of several runs in turn: memory answers to several pages at once sooner than to one after the
// other. `runs` are of at least `count` (1, 2 or 4).
static fetch_ahead lines_of(const char* const* runs, int count, int left, int64_t offset) {
  fetch_ahead ahead;
  ahead.step = 256 / count;
  for (int n = 0; n < 4; n++) ahead.at[n] = runs[n % count < left ? n % count : 0] + offset + n / count * 64;
  return ahead;
}

// The first window of V, or of K, of a part.
template <class F>
static fetch_ahead first_values(const part_view* view, int dim) {
  return lines_of(view->values + view->first, view->in_order ? 1 : value_window<F>(dim), view->stop - view->first, 0);
}
static fetch_ahead first_keys(const part_view* view) {
  return lines_of(view->key_runs + view->first, view->in_order ? 1 : CHUNK, view->stop - view->first, 0);
}

// Products q.k of all rows with the tiles that a block of them sees.
template <class F>
static void find_scores(const attend_tile* tile, const part_view* view) {
  tile_room* room = tile->room;
  const int64_t depth = tile->dim / F::DEEP, window = key_window<F>();
  const int windows = (int)((depth + window - 1) / window);
  fetch_ahead aheads[MOST_DIM * 4 * 16 * CHUNK / WINDOW];
  for (int chunk = view->first / CHUNK * CHUNK; chunk < view->stop; chunk += CHUNK) {
    const int begin = chunk > view->first ? chunk : view->first, next = chunk + CHUNK;
    for (int i = 0; i < windows; i++) {
      const bool is_last = i + 1 == windows, more = next < view->stop;
      if (view->in_order && more) {
        aheads[i] = lines_of(view->key_runs + next, 1, 1, i * WINDOW);
      } else if (!is_last) {
        aheads[i] = view->in_order ? fetch_ahead()
                                   : lines_of(view->key_runs + begin, CHUNK, view->stop - begin, (i + 1) * WINDOW / CHUNK);
      } else {
        aheads[i] = more ? lines_of(view->key_runs + next, CHUNK, view->stop - next, 0) : first_values<F>(view, tile->dim);
      }
    }
    bool fetches = true;
    for (int block = 0; block < tile->num_blocks; block++) {
      const int from = first_row(tile, block), rows = first_row(tile, block + 1) - from;
      const int first = room->first[from / tile->group], stop = room->stop[(from + rows - 1) / tile->group];
      int i = first / 16 > chunk ? first / 16 : chunk;
      const int until = (stop + 15) / 16 < chunk + CHUNK ? (stop + 15) / 16 : chunk + CHUNK;
      const bool is_first = fetches && i < until;
      if (is_first) fetches = false;
      for (int64_t vector = 0; i < until; i += BLOCK_VECTORS, vector += window * BLOCK_VECTORS) {
        const score_job job = {room->queries + from * depth * F::A_BYTES,
                               view->keys + i,
                               (int64_t)tile->a->cache->block_size / 16 * F::B_BYTES,
                               depth,
                               is_first ? aheads : nullptr,
                               window,
                               vector,
                               room->scores + from * SCORE_STRIDE + 16 * i};
        score<F>(rows, until - i < BLOCK_VECTORS ? until - i : BLOCK_VECTORS, &job);
      }
    }
  }
}

// Adds to rows `from` .. the values in rows first .. stop - 1 of V (of DEEP slots each) with their probabilities.
template <class F>
static void add_rows(const attend_tile* tile, const char* const* values, int from, int rows, int first, int stop,
                     const fetch_ahead* ahead = nullptr) {
  if (first >= stop) return;
  tile_room* room = tile->room;
  const int vectors = tile->dim / 16;
  int64_t vector = 0;
  for (int i = 0; i < vectors; i += BLOCK_VECTORS, vector += (stop - first) * BLOCK_VECTORS) {
    const value_job job = {(const char*)(room->scores + from * SCORE_STRIDE),
                           values,
                           i * F::B_BYTES,
                           (int64_t)vectors * F::B_BYTES,
                           first,
                           stop,
                           ahead,
                           vector,
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
  for (int64_t i = 0; i < stride; i += 64) vi_store(room->edge + in_tile * stride + i, vi_and(vi_load(whole + i), mask));
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
  // Later tokens begin later and end later.
  const block_zone zone = {whole_first<F>(room, last), whole_stop<F>(room, token)};
  const block_zone none = {PART, PART};
  return zone.first < zone.stop && sees(room, token) && sees(room, last) ? zone : none;
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
    const int after = i + window, row = i * 16 / F::DEEP;
    fetch_ahead ahead = fetch_ahead();
    if (after < view->stop) {
      ahead = lines_of(view->values + after, view->in_order ? 1 : window, view->stop - after, 0);
    } else if (next != nullptr) {
      ahead = first_keys(next);
    }
    bool fetches = true;
    for (int block = 0; block < tile->num_blocks; block++) {
      const int from = first_row(tile, block), rows = first_row(tile, block + 1) - from;
      const int first = zones[block].first > row ? zones[block].first : row;
      const int stop = zones[block].stop < row + window_rows ? zones[block].stop : row + window_rows;
      add_rows<F>(tile, view->values, from, rows, first, stop, fetches ? &ahead : nullptr);
      if (first < stop) fetches = false;
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
    take_scales(tile, view, tile->key_plane, room->key_scales);
    take_scales(tile, view, tile->value_plane, room->value_scales);
  }
  find_scores<F>(tile, view);
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
