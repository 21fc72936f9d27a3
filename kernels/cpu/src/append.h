// Keys and values of a step's tokens into the cache, in its format.
//
// An item is a few tokens of one kv head, or of all where there are many tokens. Tokens that share a line of memory are
// written by stores of their own, so items of neighbouring tokens do not overwrite each other.
#pragma once
#include "attend_cache.h"

namespace EK_TIER {

static const int APPEND_TOKENS = 16;  // of an item
static const int MANY_TOKENS = 256;   // from here on an item has all heads

// A head's numbers as int8 of scale max |x| / 127, rounded to float16 first. What is not finite makes the scale NaN or
// infinite, so that no such key or value reads as a number.
static void to_int8(const float* x, int64_t dim, int8_t* q, uint16_t* half_scale) {
  vf top = vf_zero(), poison = vf_zero();
  for (int64_t i = 0; i < dim; i += 16) {
    const vf a = vf_load(x + i);
    top = vf_max(top, vf_abs(a));
    poison = vf_fma(a, vf_zero(), poison);  // 0 unless there is a NaN or an infinity
  }
  uint16_t halves[16];
  float scales[16];
  vf_to_f16(halves, vf_all(vf_top(top) / 127.0f + vf_sum(poison)));
  vf_store(scales, vf_from_f16(halves));
  *half_scale = halves[0];
  const vf scale = vf_all(scales[0] > 0 ? scales[0] : 1.0f);  // too small for float16: zeros
  for (int64_t i = 0; i < dim; i += 16) {
    const vf ratio = vf_div(vf_load(x + i), scale);
    vf_to_i8(q + i, vf_max(vf_all(-127.0f), vf_min(vf_all(127.0f), ratio)));
  }
}

// A key's `count` numbers or pairs of numbers to column `slot` of its plane, which has `block_size`.
template <class T>
static inline void scatter_key(char* plane, const T* one, int64_t count, int64_t block_size, int64_t slot) {
  T* to = (T*)plane + slot;
  for (int64_t i = 0; i < count; i++) to[i * block_size] = one[i];
}
// A value's numbers beside those of the other slot of its pair.
template <class T>
static inline void scatter_value(char* plane, const T* one, int64_t dim, int64_t slot) {
  T* to = (T*)plane + slot / 2 * 2 * dim + slot % 2;
  for (int64_t d = 0; d < dim; d++) to[2 * d] = one[d];
}

// One token's head into slot `slot` of its planes; `one` is room for it in the cache's format.
static void append_key(const ek_cache* cache, char* plane, int64_t slot, const float* k, char* one, uint16_t* scales,
                       int64_t scale) {
  const int64_t dim = cache->head_dim, size = cache->block_size;
  switch (cache->format) {
    case EK_KV_F32: return scatter_key(plane, (const uint32_t*)k, dim, size, slot);
    case EK_KV_F16:
      for (int64_t d = 0; d < dim; d += 16) vf_to_f16(one + 2 * d, vf_load(k + d));
      return scatter_key(plane, (const uint16_t*)one, dim, size, slot);
    case EK_KV_BF16:
      for (int64_t d = 0; d < dim; d += 16) vf_to_bf16(one + 2 * d, vf_load(k + d));
      return scatter_key(plane, (const uint32_t*)one, dim / 2, size, slot);
    case EK_KV_INT8:
      to_int8(k, dim, (int8_t*)one, scales + scale);
      return scatter_key(plane, (const uint16_t*)one, dim / 2, size, slot);
  }
}

static void append_value(const ek_cache* cache, char* plane, int64_t slot, const float* v, char* one, uint16_t* scales,
                         int64_t scale) {
  const int64_t dim = cache->head_dim;
  switch (cache->format) {
    case EK_KV_F32: memcpy(plane + slot * dim * 4, v, dim * 4); return;
    case EK_KV_F16:
      for (int64_t d = 0; d < dim; d += 16) vf_to_f16(plane + (slot * dim + d) * 2, vf_load(v + d));
      return;
    case EK_KV_BF16:
      for (int64_t d = 0; d < dim; d += 16) vf_to_bf16(one + 2 * d, vf_load(v + d));
      return scatter_value(plane, (const uint16_t*)one, dim, slot);
    case EK_KV_INT8:
      to_int8(v, dim, (int8_t*)one, scales + scale);
      return scatter_value(plane, (const int8_t*)one, dim, slot);
  }
}

// The span of a row; rows of spans lie end to end.
static inline int64_t span_of_row(const ek_batch* batch, int64_t row) {
  int64_t low = 0, high = batch->spans;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (batch->first_rows[middle] <= row) low = middle;
    else high = middle;
  }
  return low;
}

// Where a token's first head goes; those of the other heads lie `plane_stride` and `scale_stride` apart.
struct append_place {
  char* keys;
  char* values;
  uint16_t* key_scales;  // EK_KV_INT8, else null
  uint16_t* value_scales;
  int64_t plane_stride;  // bytes
  int64_t scale_stride;
  int64_t slot;
};

static append_place place_of(const ek_attend* a, int64_t span, int64_t row) {
  const ek_cache* cache = a->cache;
  const ek_batch* batch = a->batch;
  const int64_t position = batch->starts[span] + row - batch->first_rows[span];
  const int64_t block = batch->blocks[batch->table_starts[span] + position / cache->block_size];
  const int64_t plane_bytes = element_bytes(cache) * cache->block_size * cache->head_dim;
  const int64_t key_plane = plane_number(cache, a->layer, KEYS, 0);
  const int64_t value_plane = plane_number(cache, a->layer, VALUES, 0);
  append_place place;
  place.slot = position % cache->block_size;
  place.keys = plane_at(cache, plane_bytes, key_plane, block);
  place.values = plane_at(cache, plane_bytes, value_plane, block);
  place.key_scales = place.value_scales = nullptr;
  if (cache->format == EK_KV_INT8) {
    place.key_scales = scales_at(cache, plane_bytes, key_plane, block) + place.slot;
    place.value_scales = scales_at(cache, plane_bytes, value_plane, block) + place.slot;
  }
  place.plane_stride = num_blocks_at(cache, block) * plane_bytes;
  place.scale_stride = num_blocks_at(cache, block) * cache->block_size;
  return place;
}

// The lines that a head's numbers go to are fetched together: one store after the other would wait for its own.
__attribute__((always_inline)) static inline void fetch_places(const ek_cache* cache, const append_place* places,
                                                               int64_t count, int64_t head) {
  const int64_t depth = cache->head_dim / (cache->format == EK_KV_BF16 || cache->format == EK_KV_INT8 ? 2 : 1);
  const int64_t token_bytes = element_bytes(cache) * cache->head_dim, column_bytes = token_bytes / depth;
  const int64_t stride = column_bytes * cache->block_size, step = stride < 64 ? 64 / stride : 1;
  for (int64_t i = 0; i < count; i++) {
    const append_place* place = places + i;
    const char* const values = place->values + head * place->plane_stride + place->slot * token_bytes;
    for (int64_t byte = 0; byte < token_bytes; byte += 64) prefetch(values + byte);
    if (i > 0 && place->keys == place[-1].keys && place->slot % 16) continue;  // the same lines of K
    const char* const keys = place->keys + head * place->plane_stride + place->slot * column_bytes;
    for (int64_t row = 0; row < depth; row += step) prefetch(keys + row * stride);
  }
}

static inline int64_t heads_per_append(const ek_attend* a) {
  return a->batch->tokens < MANY_TOKENS ? 1 : a->cache->kv_heads;
}

static int64_t append_items(const ek_attend* a, int32_t) {
  return (a->batch->tokens + APPEND_TOKENS - 1) / APPEND_TOKENS * (a->cache->kv_heads / heads_per_append(a));
}

static void append_item(const ek_attend* a, int64_t item, void* scratch) {
  const ek_batch* batch = a->batch;
  const int64_t heads = heads_per_append(a), items = a->cache->kv_heads / heads, dim = a->cache->head_dim;
  const int64_t first = item / items * APPEND_TOKENS, left = batch->tokens - first;
  const int64_t count = left < APPEND_TOKENS ? left : APPEND_TOKENS;
  append_place places[APPEND_TOKENS];
  int64_t span = span_of_row(batch, first);
  for (int64_t i = 0; i < count; i++) {
    while (span + 1 < batch->spans && batch->first_rows[span + 1] <= first + i) span++;
    places[i] = place_of(a, span, first + i);
  }
  const int64_t begin = item % items * heads;
  fetch_places(a->cache, places, count, begin);
  for (int64_t head = begin; head < begin + heads; head++) {
    if (head + 1 < begin + heads) fetch_places(a->cache, places, count, head + 1);
    for (int64_t i = 0; i < count; i++) {
      const append_place* place = &places[i];
      const int64_t planes = head * place->plane_stride, scale = head * place->scale_stride;
      const float* const k = a->k + (first + i) * a->k_stride + head * dim;
      const float* const v = a->v + (first + i) * a->v_stride + head * dim;
      append_key(a->cache, place->keys + planes, place->slot, k, (char*)scratch, place->key_scales, scale);
      append_value(a->cache, place->values + planes, place->slot, v, (char*)scratch, place->value_scales, scale);
    }
  }
}

}  // namespace EK_TIER
