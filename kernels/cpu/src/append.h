// Keys and values of a step's tokens into the cache, in its format.
//
// An item is one kv head of a few tokens. Slots of one line are written by their own stores, so items of neighbouring
// tokens do not overwrite each other, whichever threads do them.
#pragma once
#include "attend_cache.h"

namespace EK_TIER {

enum { APPEND_TOKENS = 16, APPEND_MOST_DIM = 256 };

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

// The lines that a key's numbers go to are fetched together, before one store after the other would wait for its own.
static inline void fetch_key(const char* plane, int64_t rows, int64_t row_bytes) {
  const int64_t step = row_bytes < 64 ? 64 : row_bytes;
  for (int64_t i = 0; i < rows * row_bytes; i += step) prefetch(plane + i);
}

// One token's head into slot `slot` of its planes; `one` is room for it in the cache's format.
static void append_key(const ek_cache* cache, char* plane, int64_t slot, const float* k, char* one, uint16_t* scale) {
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
      to_int8(k, dim, (int8_t*)one, scale);
      return scatter_key(plane, (const uint16_t*)one, dim / 2, size, slot);
  }
}

static void append_value(const ek_cache* cache, char* plane, int64_t slot, const float* v, char* one, uint16_t* scale) {
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
      to_int8(v, dim, (int8_t*)one, scale);
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

static int64_t append_items(const ek_attend* a, int32_t) {
  return (a->batch->tokens + APPEND_TOKENS - 1) / APPEND_TOKENS * a->cache->kv_heads;
}

static void append_item(const ek_attend* a, int64_t item, void* scratch) {
  const ek_cache* cache = a->cache;
  const ek_batch* batch = a->batch;
  const int64_t head = item % cache->kv_heads, dim = cache->head_dim, size = cache->block_size;
  const int64_t first = item / cache->kv_heads * APPEND_TOKENS;
  const int64_t stop = first + APPEND_TOKENS < batch->tokens ? first + APPEND_TOKENS : batch->tokens;
  const int64_t plane_bytes = element_bytes(cache) * size * dim;
  const int64_t key_plane = plane_number(cache, a->layer, KEYS, head);
  const int64_t value_plane = plane_number(cache, a->layer, VALUES, head);
  const bool scaled = cache->format == EK_KV_INT8;
  int64_t span = span_of_row(batch, first);
  for (int64_t row = first; row < stop; row++) {
    while (span + 1 < batch->spans && batch->first_rows[span + 1] <= row) span++;
    const int64_t position = batch->starts[span] + row - batch->first_rows[span], slot = position % size;
    const int64_t block = batch->blocks[batch->table_starts[span] + position / size];
    char* keys = plane_at(cache, plane_bytes, key_plane, block);
    char* values = plane_at(cache, plane_bytes, value_plane, block);
    uint16_t* key_scale = scaled ? scales_at(cache, plane_bytes, key_plane, block) + slot : nullptr;
    uint16_t* value_scale = scaled ? scales_at(cache, plane_bytes, value_plane, block) + slot : nullptr;
    if (row == first || slot == 0) fetch_key(keys, dim, plane_bytes / dim);
    append_key(cache, keys, slot, a->k + row * a->k_stride + head * dim, (char*)scratch, key_scale);
    append_value(cache, values, slot, a->v + row * a->v_stride + head * dim, (char*)scratch, value_scale);
  }
}

}  // namespace EK_TIER
