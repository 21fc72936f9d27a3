// Attention of a step's tokens over their contexts in the paged cache, causal, for any mix of spans: a decoding
// sequence is a span of one token, a chunk of a prompt one of many.
//
// A token's result is the same to the last bit whatever else is in the batch and in its span, and whatever the items:
// parts begin at multiples of PART slots, sums run in the order of slots, and parts are put together in their order.
#pragma once
#include "attend_part.h"

namespace EK_TIER {

static attend_tile tile_of(const ek_attend* a, const attend_job* job, tile_room* room) {
  const ek_cache* cache = a->cache;
  attend_tile tile;
  tile.a = a;
  tile.room = room;
  tile.table = a->batch->blocks + a->batch->table_starts[job->span];
  tile.position = a->batch->starts[job->span] + job->token;
  tile.row = a->batch->first_rows[job->span] + job->token;
  tile.tokens = job->tokens;
  tile.dim = cache->head_dim;
  tile.plane_bytes = element_bytes(cache) * cache->block_size * cache->head_dim;
  return tile;
}

// `head`: kv head times the tiles that its group is dealt out to.
static void set_head(attend_tile* tile, const attend_heads* heads, int64_t head) {
  const ek_attend* a = tile->a;
  const int64_t pieces = heads->tiles / a->cache->kv_heads, kv_head = head / pieces, piece = head % pieces;
  const int64_t group = a->heads / a->cache->kv_heads, left = group - piece * heads->per_tile;
  tile->group = (int32_t)(left < heads->per_tile ? left : heads->per_tile);
  tile->rows = tile->tokens * tile->group;
  tile->num_blocks = (tile->rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  tile->head = kv_head * group + piece * heads->per_tile;
  tile->key_plane = plane_number(a->cache, a->layer, KEYS, kv_head);
  tile->value_plane = plane_number(a->cache, a->layer, VALUES, kv_head);
}

static void begin_rows(const attend_tile* tile) {
  for (int row = 0; row < tile->rows; row++) {
    tile->room->all[row].largest = LOWEST;
    tile->room->all[row].sum = 0;
    memset(tile->room->out + row * OUT_STRIDE, 0, tile->dim * sizeof(float));
  }
}

// room->first and room->stop say what was seen of the part.
static void add_to_rows(const attend_tile* tile, const softmax_state* part, const float* values, int64_t stride) {
  for (int row = 0; row < tile->rows; row++) {
    if (!sees(tile->room, row / tile->group)) continue;
    add_part(&tile->room->all[row], tile->room->out + row * OUT_STRIDE, &part[row], values + row * stride, tile->dim);
  }
}

static void write_rows(const attend_tile* tile) {
  for (int row = 0; row < tile->rows; row++) {
    const float* from = tile->room->out + row * OUT_STRIDE;
    const vf sum = vf_all(tile->room->all[row].sum);
    const int64_t head = tile->head + row % tile->group;
    float* out = tile->a->out + (tile->row + row / tile->group) * tile->a->out_stride + head * tile->dim;
    for (int d = 0; d < tile->dim; d += 16) vf_store(out + d, vf_div(vf_load(from + d), sum));
  }
}

// All parts of some heads, one after the other.
template <class F>
static void attend_heads_of(attend_tile* tile, const attend_job* job, const attend_heads* heads, int64_t head,
                            int64_t stop_head) {
  tile_room* room = tile->room;
  part_view *view = &room->views[0], *next = &room->views[1];
  set_head(tile, heads, head);
  find_part<F>(tile, job->first_part, view);
  for (; head < stop_head; head++) {
    set_head(tile, heads, head);
    take_queries<F>(tile);
    begin_rows(tile);
    for (int64_t part = 0; part < job->parts; part++) {
      const bool more_parts = part + 1 < job->parts, more_heads = head + 1 < stop_head;
      if (more_parts) {
        find_part<F>(tile, job->first_part + part + 1, next);
      } else if (more_heads) {
        attend_tile other = *tile;
        set_head(&other, heads, head + 1);
        find_part<F>(&other, job->first_part, next);
      }
      attend_part<F>(tile, view, more_parts || more_heads ? next : nullptr);
      add_to_rows(tile, room->part, room->values, OUT_STRIDE);
      part_view* const done = view;
      view = next;
      next = done;
    }
    write_rows(tile);
  }
}

// One part of one head; the last of its parts to be done puts them together.
template <class F>
static void attend_split(attend_tile* tile, const attend_job* job, const attend_heads* heads, int64_t item) {
  attend_plan* plan = (attend_plan*)tile->a->shared;
  tile_room* room = tile->room;
  const int64_t head = item / job->parts, part = item % job->parts;
  const int64_t rows = job->tokens * heads->per_tile, each = partial_floats(tile->a, rows);
  float* const partials = floats_of(plan) + job->first_float + head * job->parts * each;
  const int64_t states = each - rows * tile->dim;
  set_head(tile, heads, head);
  take_queries<F>(tile);
  find_part<F>(tile, job->first_part + part, &room->views[0]);
  attend_part<F>(tile, &room->views[0], nullptr);
  float* to = partials + part * each;
  memcpy(to, room->part, tile->rows * sizeof(softmax_state));
  for (int row = 0; row < tile->rows; row++) {
    memcpy(to + states + row * tile->dim, room->values + row * OUT_STRIDE, tile->dim * sizeof(float));
  }
  uint32_t* counter = counters_of(plan) + job->first_counter + head;
  if (__atomic_add_fetch(counter, 1, __ATOMIC_ACQ_REL) != (uint32_t)job->parts) return;
  begin_rows(tile);
  for (int64_t i = 0; i < job->parts; i++) {
    const float* from = partials + i * each;
    part_view seen;
    seen.slot = (job->first_part + i) * PART;
    see(tile, &seen);
    add_to_rows(tile, (const softmax_state*)from, from + states, tile->dim);
  }
  write_rows(tile);
}

template <class F>
static void attend_item_of(const ek_attend* a, int64_t item, void* scratch) {
  tile_room* room = (tile_room*)scratch;
  for (int i = 0; i < TILES; i++) room->edges[i] = room->edge;
  const attend_job* job = job_of_item((attend_plan*)a->shared, item);
  const attend_heads heads = heads_of(a);
  attend_tile tile = tile_of(a, job, room);
  item -= job->first_item;
  if (job->is_split) {
    attend_split<F>(&tile, job, &heads, item);
  } else {
    const int64_t head = item * job->heads_per_item, stop = head + job->heads_per_item;
    attend_heads_of<F>(&tile, job, &heads, head, stop < heads.tiles ? stop : heads.tiles);
  }
}

// By one thread, before the items: writes the plan to a->shared.
static int64_t attend_items(const ek_attend* a, int32_t threads) { return make_plan(a, threads); }

static void attend_item(const ek_attend* a, int64_t item, void* scratch) {
  switch (a->cache->format) {
    case EK_KV_F32: return attend_item_of<kv_f32>(a, item, scratch);
    case EK_KV_F16: return attend_item_of<kv_f16>(a, item, scratch);
    case EK_KV_BF16: return attend_item_of<kv_bf16>(a, item, scratch);
    case EK_KV_INT8: return attend_item_of<kv_int8>(a, item, scratch);
  }
}

}  // namespace EK_TIER
