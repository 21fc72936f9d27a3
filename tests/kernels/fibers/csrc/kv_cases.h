// Rows into a cache of one layer and out again, as kv.h says: a warp has a row.
#pragma once
#include "common/kv.h"

struct EkRows {
  EkKv kv;
  u64 rows;                // float [tokens, kv_heads, EK_D]
  u64 back;                // float [2, tokens, kv_heads, EK_D]: keys, then values, which are the keys negated
  const int* block_table;  // [tokens / EK_BS]
  i64 tokens;
};
static_assert(sizeof(EkRows) == 96, "the mirror in Python has the same");

EK_DEV void ek_write_row(u64 row, u64 scales, int slot, int lane, const float (&x)[EK_KV_ELEMS]) {
  float least = x[0], most = x[0], sum = 0.0f;
#pragma unroll
  for (int e = 0; e < EK_KV_ELEMS; e++) least = ek_min(least, x[e]), most = ek_max(most, x[e]), sum += x[e];
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    least = ek_min(least, ek_shfl_xor(least, mask));
    most = ek_max(most, ek_shfl_xor(most, mask));
    sum += ek_shfl_xor(sum, mask);
  }
  const EkKvScale s = ek_kv_fit(least, most, sum);
  if (lane < EK_KV_VECS) ek_kv_store(row, lane, ek_kv_encode(x, s));
  if (lane == 0) ek_kv_store_scale(scales, slot, s);
}

EK_DEV void ek_read_row(u64 row, u64 scales, int slot, int lane, u64 to) {
  if (lane >= EK_KV_VECS) return;
  const EkKvVec v = ek_kv_load(row, lane);
  const EkKvScale s = ek_kv_scale(scales, slot);
#pragma unroll
  for (int e = 0; e < EK_KV_ELEMS; e++) {
    const float x = ek_fma(ek_kv_raw(v, e) * EK_KV_GAIN, s.scale, s.zero);
    ek_stg4(to + (u64)((lane * EK_KV_ELEMS + e) * 4), ek_asuint(x));
  }
}

// grid: tokens, kv_heads
EK_KERN(32) ek_write_rows(EkRows p) {
  const int token = EK_BX, head = EK_BY, lane = EK_TID, slot = token % EK_BS;
  const u64 from = p.rows + (u64)((token * p.kv.kv_heads + head) * EK_D * 4);
  // Lanes without a part of the row have its first part, which changes neither its least nor its largest number.
  const int vec = lane < EK_KV_VECS ? lane : 0;
  float x[EK_KV_ELEMS], negated[EK_KV_ELEMS];
#pragma unroll
  for (int e = 0; e < EK_KV_ELEMS; e++) {
    x[e] = ek_asfloat(ek_ldg4(from + (u64)((vec * EK_KV_ELEMS + e) * 4)));
    negated[e] = -x[e];
  }
  const u64 block = ek_kv_block(p.kv, p.block_table[token / EK_BS]), row = (u64)(slot * EK_KV_ROW);
  ek_write_row(ek_kv_keys(p.kv, block, head) + row, ek_kv_key_scales(p.kv, block, head), slot, lane, x);
  ek_write_row(ek_kv_values(p.kv, block, head) + row, ek_kv_value_scales(p.kv, block, head), slot, lane, negated);
}

EK_KERN(32) ek_read_rows(EkRows p) {
  const int token = EK_BX, head = EK_BY, lane = EK_TID, slot = token % EK_BS;
  const u64 block = ek_kv_block(p.kv, p.block_table[token / EK_BS]), row = (u64)(slot * EK_KV_ROW);
  const u64 to = p.back + (u64)((token * p.kv.kv_heads + head) * EK_D * 4);
  const u64 values = to + (u64)(p.tokens * p.kv.kv_heads * EK_D * 4);
  ek_read_row(ek_kv_keys(p.kv, block, head) + row, ek_kv_key_scales(p.kv, block, head), slot, lane, to);
  ek_read_row(ek_kv_values(p.kv, block, head) + row, ek_kv_value_scales(p.kv, block, head), slot, lane, values);
}
