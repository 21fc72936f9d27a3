// Where keys and values lie (ek.h has the layout), and how a format's numbers take part in a sum of products.
//
// Both products of attention are  out[r][lane] += sum over i of a[r][i] b[i][lane]  with small r and 16 lanes: scores
// are queries times K (lanes are slots, i counts dimensions), results are probabilities times V (lanes are dimensions,
// i counts slots). A row of b in the cache holds DEEP steps of i side by side for each lane.
#pragma once
#include "ek.h"
#include "simd.h"

namespace EK_TIER {

// All in float32; a float16 cache becomes that as it is loaded.
struct kv_f32 {
  enum { DEEP = 1, A_BYTES = 4, B_BYTES = 64, INTEGER = 0 };
  typedef vf a_type;
  typedef vf b_type;
  typedef vf sum_type;
  static inline vf spread(const char* p) { return vf_all(*(const float*)p); }
  static inline vf load(const char* p) { return vf_load((const float*)p); }
  static inline vf dot(vf sum, vf b, vf a) { return vf_fma(b, a, sum); }
  static inline vf zero() { return vf_zero(); }
  static inline vf load_sum(const float* p) { return vf_load(p); }
  static inline void store_sum(float* p, vf sum) { vf_store(p, sum); }
  // 16 of a, as this format multiplies them.
  static inline void store(char* p, vf a) { vf_store((float*)p, a); }
};
struct kv_f16 : kv_f32 {
  enum { B_BYTES = 32 };
  static inline vf load(const char* p) { return vf_from_f16(p); }
};

// bf16 in pairs: queries and probabilities are rounded to bf16, sums are float32.
struct kv_bf16 : kv_f32 {
  enum { DEEP = 2 };
  typedef vi a_type;
  typedef vi b_type;
  static inline vi spread(const char* p) { return vi_spread(p); }
  static inline vi load(const char* p) { return vi_load(p); }
  static inline vf dot(vf sum, vi b, vi a) { return vf_dot_bf16(sum, b, a); }
  static inline void store(char* p, vf a) { vf_to_bf16(p, a); }
};

// int8 in pairs, as words of 16 bits; a in words too, scaled so that a row's largest is 32767: an error 256 times
// smaller than the cache's own. Sums are integers and exact: 256 dimensions, or PART slots, of 127 * 32767 stay below
// 2^31.
struct kv_int8 {
  enum { DEEP = 2, A_BYTES = 4, B_BYTES = 32, INTEGER = 1 };
  typedef vi a_type;
  typedef vi b_type;
  typedef vi sum_type;
  static inline vi spread(const char* p) { return vi_spread(p); }
  static inline vi load(const char* p) { return vi_words_from_i8(p); }
  static inline vi dot(vi sum, vi b, vi a) { return vi_dot_words(sum, b, a); }
  static inline vi zero() { return vi_zero(); }
  static inline vi load_sum(const float* p) { return vi_load(p); }
  static inline void store_sum(float* p, vi sum) { vi_store(p, sum); }
  static inline void store(char* p, vf a) { vf_to_i16(p, a); }
};
static const float MOST_WORD = 32767.0f;

// Bytes of 16 slots' keys or values.
template <class F>
static inline int64_t tile_bytes(int dim) { return (int64_t)dim / F::DEEP * F::B_BYTES; }

static inline int64_t element_bytes(const ek_cache* cache) {
  return cache->format == EK_KV_F32 ? 4 : cache->format == EK_KV_INT8 ? 1 : 2;
}

enum { KEYS, VALUES };

// Number of the planes of all layers before those of this layer, side and head, were every segment of one block.
static inline int64_t plane_number(const ek_cache* cache, int64_t layer, int64_t side, int64_t head) {
  return (layer * 2 + side) * cache->kv_heads + head;
}

static inline int64_t block_of_segment(const ek_cache* cache, int64_t block) {
  return block & (((int64_t)1 << cache->segment_shift) - 1);
}

static inline int64_t num_blocks_at(const ek_cache* cache, int64_t block) {
  return cache->segments[block >> cache->segment_shift].num_blocks;
}

static inline char* plane_at(const ek_cache* cache, int64_t plane_bytes, int64_t plane, int64_t block) {
  const ek_segment* segment = &cache->segments[block >> cache->segment_shift];
  return (char*)segment->data + (plane * segment->num_blocks + block_of_segment(cache, block)) * plane_bytes;
}

// The float16 scales of a block's slots (EK_KV_INT8).
static inline uint16_t* scales_at(const ek_cache* cache, int64_t plane_bytes, int64_t plane, int64_t block) {
  const ek_segment* segment = &cache->segments[block >> cache->segment_shift];
  const int64_t planes = (int64_t)cache->num_layers * 2 * cache->kv_heads * segment->num_blocks;
  uint16_t* scales = (uint16_t*)((char*)segment->data + planes * plane_bytes);
  return scales + (plane * segment->num_blocks + block_of_segment(cache, block)) * cache->block_size;
}

}  // namespace EK_TIER
