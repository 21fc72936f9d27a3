// Keys and values of whole contexts out of the paged cache, one behind the other as activations: what torch's own
// attention takes.
//
// A thread block has one block of the cache, of one kv head. Only tokens of the context are written; a key that was
// rotated (int4) stays so.
//
//   grid   blocks of the longest context, kv_heads, sequences
#pragma once
#include "common/act.h"
#include "common/kv.h"

constexpr int EK_GATHER_THREADS = 128;

struct EkGatherDequant {
  EkKv kv;
  u64 keys, values;        // activations; token t of head h of a sequence is at row first_rows[sequence] + t - begin
  const int* block_table;  // [sequences, table_stride]
  const int* contexts;     // [sequences]: tokens
  const int* begins;       // [sequences]: tokens before this one are left out; null: none are
  const int* first_rows;   // [sequences]
  i64 row_stride;          // bytes from a token to the next
  i64 head_stride;         // bytes from a head to the next
  int table_stride;
};
static_assert(sizeof(EkGatherDequant) == 136, "the mirror in Python has the same");

EK_DEV void ek_gather_piece(u64 row, u64 scales, int slot, int piece, u64 to) {
  const EkKvVec v = ek_kv_load(row, piece);
  const EkKvScale s = ek_kv_scale(scales, slot);
  float x[EK_KV_ELEMS];
#pragma unroll
  for (int i = 0; i < EK_KV_ELEMS / 2; i++) {
    const EkPair pair = ek_kv_pair(v, i);
    x[2 * i] = ek_fma(pair.lo, EK_KV_GAIN * s.scale, s.zero);
    x[2 * i + 1] = ek_fma(pair.hi, EK_KV_GAIN * s.scale, s.zero);
  }
  ek_act_store(to + (u64)(piece * (EK_KV_ELEMS * EK_ACT_BYTES)), x);
}

EK_KERN(EK_GATHER_THREADS) ek_gather_dequant(EkGatherDequant p) {
  const int head = EK_BY, sequence = EK_BZ;
  const int begin = p.begins != nullptr ? p.begins[sequence] : 0, context = p.contexts[sequence];
  const int at = begin / EK_BS + EK_BX;
  if (at * EK_BS >= context) return;
  const u64 block = ek_kv_block(p.kv, p.block_table[(i64)sequence * p.table_stride + at]);
  for (int i = EK_TID; i < EK_BS * EK_KV_VECS; i += EK_GATHER_THREADS) {
    const int slot = i / EK_KV_VECS, piece = i % EK_KV_VECS, token = at * EK_BS + slot;
    if (token < begin || token >= context) continue;
    const i64 row = p.first_rows[sequence] + (token - begin);
    const u64 to = (u64)(row * p.row_stride + head * p.head_stride);
    const u64 key = ek_kv_keys(p.kv, block, head) + (u64)(slot * EK_KV_ROW);
    const u64 value = ek_kv_values(p.kv, block, head) + (u64)(slot * EK_KV_ROW);
    ek_gather_piece(key, ek_kv_key_scales(p.kv, block, head), slot, piece, p.keys + to);
    ek_gather_piece(value, ek_kv_value_scales(p.kv, block, head), slot, piece, p.values + to);
  }
}
