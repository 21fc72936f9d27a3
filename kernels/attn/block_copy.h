// Blocks of the cache, or their first tokens, from one place to another: between segments, to a sequence of its own
// where a block is shared no longer, to a buffer that is parked or written to disk, and back.
//
// A place is a table of segments with their strides, which are all that the two orders of a segment differ in: either
// can be copied to the other, and to a table whose one segment is a buffer. Which blocks are copied is read on the
// device, so that a launch captured in a graph has room for as many. No block may be both a source and a target of one
// launch. Slots that are not copied stay as they are.
//
//   grid   room for copies, layers, chunks
#pragma once
#include "common/compat.h"

constexpr int EK_COPY_THREADS = 256;
constexpr int EK_COPY_LOADS = 4;  // of 16 bytes, that a thread has under way

struct EkCopyPlace {
  const u64* seg;    // addresses of the segments
  i64 slot_stride;   // bytes from a block to the next in its segment
  i64 layer_stride;  // bytes from a layer of a block to the next
  i64 seg_shift;
};

struct EkBlockCopy {
  EkCopyPlace source, target;
  const int* copies;      // [room, 3]: a source block, a target block, tokens; a source below 0: there is none
  int plane_bytes;        // from keys to values, and from these to the keys' scales
  int scale_plane_bytes;  // from the keys' scales to the values'
  int head_bytes, scale_head_bytes;    // from a head's first token to the next head's
  int token_bytes, scale_token_bytes;  // of a token in a head; multiples of 16, and of 2
  int kv_heads, chunks;
};
static_assert(sizeof(EkBlockCopy) == 104, "the mirror in Python has the same");

EK_DEV u64 ek_copy_layer(const EkCopyPlace& place, int block, int layer) {
  const u64 slot = (u64)(u32)(block & ((1 << place.seg_shift) - 1));
  return place.seg[block >> place.seg_shift] + slot * (u64)place.slot_stride + (u64)layer * (u64)place.layer_stride;
}

// Where unit i of a layer's rows is (or of its scales), counted over keys and values, heads, and `units` of a head.
EK_DEV int ek_copy_unit(int i, int units, int heads, int unit_bytes, int head_bytes, int plane_bytes) {
  const int head = i / units;
  return head / heads * plane_bytes + head % heads * head_bytes + i % units * unit_bytes;
}

EK_KERN(EK_COPY_THREADS) ek_block_copy(EkBlockCopy p) {
  const int from = p.copies[3 * EK_BX], to = p.copies[3 * EK_BX + 1], tokens = p.copies[3 * EK_BX + 2];
  if (from < 0 || tokens <= 0) return;
  const u64 source = ek_copy_layer(p.source, from, EK_BY), target = ek_copy_layer(p.target, to, EK_BY);

  const int vecs = tokens * p.token_bytes / 16, all_vecs = 2 * p.kv_heads * vecs;
  const int step = p.chunks * EK_COPY_THREADS, own = EK_BZ * EK_COPY_THREADS + EK_TID;
  for (int first = own; first < all_vecs; first += EK_COPY_LOADS * step) {
    u32x4 v[EK_COPY_LOADS] = {};
    int at[EK_COPY_LOADS];
#pragma unroll
    for (int i = 0; i < EK_COPY_LOADS; i++) {
      at[i] = ek_copy_unit(first + i * step, vecs, p.kv_heads, 16, p.head_bytes, p.plane_bytes);
      if (first + i * step < all_vecs) v[i] = ek_ldg16(source + (u64)at[i]);
    }
#pragma unroll
    for (int i = 0; i < EK_COPY_LOADS; i++) {
      if (first + i * step < all_vecs) ek_stg16(target + (u64)at[i], v[i]);
    }
  }

  if (p.scale_token_bytes == 0) return;
  const int halves = tokens * p.scale_token_bytes / 2, scales = 2 * p.plane_bytes;
  for (int i = own; i < 2 * p.kv_heads * halves; i += step) {
    const int at = scales + ek_copy_unit(i, halves, p.kv_heads, 2, p.scale_head_bytes, p.scale_plane_bytes);
    ek_stg2(target + (u64)at, ek_ldg2(source + (u64)at));
  }
}
