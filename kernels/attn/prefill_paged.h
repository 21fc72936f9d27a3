// Prefill: a chunk of new tokens of each sequence against the paged cache, which holds what came before and the chunk.
//
// A row is one query head of one token; the heads of a kv head are neighbours, so that all of them share what is read.
// A thread block has 64 rows, 16 a warp, and goes through the keys and values that any of them sees, EK_TILE tokens at
// a time: read into registers while the last tile is multiplied, then converted to operands in shared memory. Softmax
// is made on the way (Milakov and Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691), scores in units of log 2.
//
//   keys of tile t -> shared | values of t asked for | barrier | scores | values -> shared, keys of t + 1 asked for |
//   softmax | barrier | weights times values | and again
//
// One barrier is enough between two tiles: keys are overwritten when all warps have their scores, which the second
// barrier says, and values when all have multiplied them, which the next tile's first one says. Heads of more than 128
// numbers leave no room for both: then keys and values take turns in one place, with two barriers more.
//
//   -DEK_F16=n   operands are bfloat16 (0) or float16 (1), whatever the cache and the activations are
//   grid         row tiles of all chunks, or more than there are; kv_heads
#pragma once
#include "common/act.h"
#include "attn/prefill_tile.h"
#include "attn/splits.h"

static_assert(EK_ACT < 2 && EK_KV != 5, "queries, results and the cache are not float32");

struct EkPrefillPaged {
  EkKv kv;
  u64 q, out;              // activations [tokens, heads, head_dim]
  const int* first_rows;   // [sequences]: the token of q that is the chunk's first
  const int* lengths;      // [sequences]: the chunk's tokens; 0 for a sequence that has none
  const int* tiles;        // [sequences + 1]: a chunk's first tile of rows, and how many there are in all
  const int* contexts;     // [sequences]: tokens, the chunk's with them
  const int* block_table;  // [sequences, table_stride]
  const float* sinks;      // [heads]; null: there are none
  i64 q_stride, out_stride;  // bytes from token to token, multiples of 16
  int table_stride;
  int group;      // query heads of a kv head
  int window;     // a query sees itself and the window - 1 tokens before it; 0: all
  float q_scale;  // log2 e * scale; with a soft cap scale / softcap
  float softcap;  // log2 e * softcap; 0: none
  int sequences;
};
static_assert(sizeof(EkPrefillPaged) == 168, "the mirror in Python has the same");

// What a thread block attends to: rows of one sequence's chunk, and the tokens that any of them sees.
struct EkSpan {
  int first_row, rows;     // of the chunk: row r is token r / group, head r % group
  int before;              // tokens before the chunk
  int begin, end;          // tokens that are seen
  int first_seen_by_last;  // from here to last_seen_by_first, tokens are seen by all rows
  int last_seen_by_first;
};

EK_DEV int ek_first_seen(int position, int window) {
#ifdef EK_PLANT_WINDOW  // a fault for tests to find
  if (window > 0) window++;
#endif
  return window > 0 ? ek_max(0, position - window + 1) : 0;
}

EK_DEV EkSpan ek_span(const EkPrefillPaged& p, int tile, int length, int context) {
  EkSpan s;
  s.first_row = tile * EK_ROWS;
  s.rows = length * p.group;
  s.before = context - length;
  const int first = s.before + s.first_row / p.group;
  const int last = s.before + (ek_min(s.first_row + EK_ROWS, s.rows) - 1) / p.group;
  s.begin = ek_first_seen(first, p.window);
  s.end = last + 1;
  s.first_seen_by_last = ek_first_seen(last, p.window);
  s.last_seen_by_first = first;
  return s;
}

EK_DEV u64 ek_query_at(const EkPrefillPaged& p, u64 base, i64 stride, int first_token, int row) {
  const int token = first_token + row / p.group, head = EK_BY * p.group + row % p.group;
  return base + (u64)(token * stride) + (u64)(head * (EK_D * EK_ACT_BYTES));
}

// All 64 rows of queries as operands into shared memory; those that are none are zeros. As many vectors are under way
// at once as there are registers for: rows that are none read another one.
constexpr int EK_QUERY_VECS = EK_ROWS * (EK_D / 8) / EK_PREFILL_THREADS;  // of a thread
constexpr int EK_QUERY_LOADS = EK_QUERY_VECS > 8 ? EK_QUERY_VECS / 2 : EK_QUERY_VECS;

EK_DEV u32 ek_query_operands(u32 word) {
  if constexpr (EK_ACT == EK_F16) return word;
  return EK_ACT == 0 ? ek_operands(ek_bf16lo(word), ek_bf16hi(word)) : ek_operands(ek_f16lo(word), ek_f16hi(word));
}

EK_DEV void ek_stage_queries(const EkPrefillPaged& p, const EkSpan& s, int first_token, u16* to) {
  for (int first = 0; first < EK_QUERY_VECS; first += EK_QUERY_LOADS) {
    u32x4 vecs[EK_QUERY_LOADS];
#pragma unroll
    for (int i = 0; i < EK_QUERY_LOADS; i++) {
      const int vec = (first + i) * EK_PREFILL_THREADS + EK_TID;
      const int row = ek_min(s.first_row + vec / (EK_D / 8), s.rows - 1);
      vecs[i] = ek_ldg16(ek_query_at(p, p.q, p.q_stride, first_token, row) + (u64)(vec % (EK_D / 8) * 16));
    }
#pragma unroll
    for (int i = 0; i < EK_QUERY_LOADS; i++) {
      const int vec = (first + i) * EK_PREFILL_THREADS + EK_TID, row = vec / (EK_D / 8);
      const u32 is_one = s.first_row + row < s.rows ? ~0u : 0;
      const u32x4 v = {ek_query_operands(vecs[i].x) & is_one, ek_query_operands(vecs[i].y) & is_one,
                       ek_query_operands(vecs[i].z) & is_one, ek_query_operands(vecs[i].w) & is_one};
      *(u32x4*)(to + row * EK_LINE + vec % (EK_D / 8) * 8) = v;
    }
  }
}

// ---- a warp's 16 rows

struct EkPrefillRows {
  EkQueries q[EK_STAY ? 1 : EK_PARTS];
  EkC out[EK_PARTS];
  int positions[EK_OWN];    // of the lane's queries
  float largest[EK_OWN];    // score so far
  float sums[EK_OWN];       // of the weights that this lane has seen
};

EK_DEV void ek_prefill_scores(EkC (&scores)[EK_CHUNKS], const EkPrefillRows& rows, const u16* queries,
                              const u16* keys) {
  const int lane = EK_TID & 31;
#pragma unroll
  for (int c = 0; c < EK_CHUNKS; c++) scores[c] = EkC{};
#pragma unroll
  for (int i = 0; i < EK_PARTS; i++) {
    EkQueries q;
    if constexpr (EK_STAY) ek_ld_queries(q, queries + i * 16, EK_LINE, lane);
    else q = rows.q[i];
#pragma unroll
    for (int c = 0; c < EK_CHUNKS; c++) {
      EkKeys k;
      ek_ld_keys(k, keys + c * 16 * EK_LINE + i * 16, EK_LINE, lane);
      ek_score(scores[c], q, k, lane);
    }
    ek_in_turn();
  }
#pragma unroll
  for (int c = 0; c < EK_CHUNKS; c++) ek_settle(scores[c]);
}

// Scores become weights, and the results so far fade to the new largest score.
EK_DEV void ek_prefill_weigh(EkC (&scores)[EK_CHUNKS], EkPrefillRows& rows, const EkPrefillPaged& p, const EkSpan& s,
                             int at) {
  const int lane = EK_TID & 31;
  const bool all_seen = at >= s.first_seen_by_last && at + EK_TILE - 1 <= s.last_seen_by_first;
#pragma unroll
  for (int c = 0; c < EK_CHUNKS; c++) {
#pragma unroll
    for (int i = 0; i < 8; i++) scores[c].r[i] *= p.q_scale;
  }
  if (p.softcap > 0.0f) {
#pragma unroll
    for (int c = 0; c < EK_CHUNKS; c++) {
#pragma unroll
      for (int i = 0; i < 8; i++) scores[c].r[i] = p.softcap * ek_tanh(scores[c].r[i]);
    }
  }
  if (!all_seen) {
#pragma unroll
    for (int c = 0; c < EK_CHUNKS; c++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int token = at + c * 16 + ek_key_of(lane, i), position = rows.positions[ek_own_of(i)];
        const bool is_seen = token <= position && token >= ek_first_seen(position, p.window);
        scores[c].r[i] = is_seen ? scores[c].r[i] : EK_NO_SCORE;
      }
    }
  }

  float fades[EK_OWN], bases[EK_OWN];
#pragma unroll
  for (int own = 0; own < EK_OWN; own++) {
    float largest = rows.largest[own];
#pragma unroll
    for (int c = 0; c < EK_CHUNKS; c++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (ek_own_of(i) == own) largest = ek_max(largest, scores[c].r[i]);
      }
    }
    largest = ek_query_max(largest);
    fades[own] = ek_exp2(rows.largest[own] - largest);
    bases[own] = largest > EK_NO_SCORE ? largest : 0.0f;  // where nothing was seen yet, nothing is to weigh anything
    rows.largest[own] = largest;
    rows.sums[own] *= fades[own];
  }
#pragma unroll
  for (int c = 0; c < EK_CHUNKS; c++) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      scores[c].r[i] = ek_exp2(scores[c].r[i] - bases[ek_own_of(i)]);
      rows.sums[ek_own_of(i)] += scores[c].r[i];
    }
  }
#pragma unroll
  for (int i = 0; i < EK_PARTS; i++) {
#pragma unroll
    for (int j = 0; j < 8; j++) rows.out[i].r[j] *= fades[ek_own_of(j)];
  }
}

EK_DEV void ek_prefill_add(EkPrefillRows& rows, const EkC (&weights)[EK_CHUNKS], const u16* values) {
  const int lane = EK_TID & 31;
  EkWeights w[EK_CHUNKS];
#pragma unroll
  for (int c = 0; c < EK_CHUNKS; c++) ek_weights(w[c], weights[c], lane);
#pragma unroll
  for (int i = 0; i < EK_PARTS; i++) {
#pragma unroll
    for (int c = 0; c < EK_CHUNKS; c++) {
      const u16* from = EK_TURNED ? values + i * 16 * EK_VALUE_LINE + c * 16 : values + c * 16 * EK_VALUE_LINE + i * 16;
      ek_add_values(rows.out[i], w[c], from, EK_VALUE_LINE, lane);
    }
    ek_in_turn();
  }
}

// The warp's results, by way of shared memory that is the warp's alone, so that whole vectors are written.
EK_DEV void ek_prefill_write(const EkPrefillRows& rows, const EkPrefillPaged& p, const EkSpan& s, int first_token,
                             u16* room) {
  const int lane = EK_TID & 31, first_row = s.first_row + EK_TID / 32 * 16;
  float shares[EK_OWN];
#pragma unroll
  for (int own = 0; own < EK_OWN; own++) {
    const int head = EK_BY * p.group + (first_row + ek_query_of(lane, own)) % p.group;
    shares[own] = ek_share(1.0f, rows.largest[own], ek_query_sum(rows.sums[own]), ek_sink(p.sinks, head));
  }
#pragma unroll
  for (int i = 0; i < EK_PARTS; i++) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float x = rows.out[i].r[j] * shares[ek_own_of(j)];
      room[ek_query_of(lane, ek_own_of(j)) * EK_LINE + i * 16 + ek_key_of(lane, j)] =
          EK_ACT == 0 ? ek_tobf16(x) : ek_tof16(x);
    }
  }
  EK_WARP_SYNC();
  for (int i = lane; i < 16 * (EK_D / 8); i += 32) {
    const int row = i / (EK_D / 8), first = i % (EK_D / 8) * 8;
    if (first_row + row >= s.rows) continue;
    ek_stg16(ek_query_at(p, p.out, p.out_stride, first_token, first_row + row) + (u64)(first * EK_ACT_BYTES),
             *(const u32x4*)(room + row * EK_LINE + first));
  }
}

EK_KERN(EK_PREFILL_THREADS) ek_prefill_paged(EkPrefillPaged p) {
  alignas(16) EK_SMEM u16 memory[EK_ROOM];
  const int kv_head = EK_BY, lane = EK_TID & 31, warp = EK_TID / 32;
  const int sequence = ek_owner(p.tiles, p.sequences, EK_BX);
  if (sequence >= p.sequences) return;
  // The last rows see the most tokens: they begin first.
  const EkSpan s = ek_span(p, p.tiles[sequence + 1] - 1 - EK_BX, p.lengths[sequence], p.contexts[sequence]);
  const int first_token = p.first_rows[sequence];
  const int* table = p.block_table + (i64)sequence * p.table_stride;
  u16 *const own_queries = memory + warp * 16 * EK_LINE, *const keys = memory + EK_KEYS_AT,
             *const values = memory + EK_VALUES_AT;

  constexpr int STEP = EK_TILE < EK_BS ? EK_TILE : EK_BS;  // tiles and blocks begin together
  const int start = s.begin / STEP * STEP;
  const int first_number = ek_tile_number(table, start, s.end);
  int next_number = ek_tile_number(table, start + EK_TILE, s.end);
  ek_stage_queries(p, s, first_token, memory);
  u64 blocks = ek_kv_block(p.kv, first_number);
  EK_SYNC();
  EkPrefillRows rows;
#pragma unroll
  for (int i = 0; i < EK_PARTS; i++) {
    if constexpr (!EK_STAY) ek_ld_queries(rows.q[i], own_queries + i * 16, EK_LINE, lane);
    rows.out[i] = EkC{};
  }
#pragma unroll
  for (int own = 0; own < EK_OWN; own++) {
    const int row = s.first_row + warp * 16 + ek_query_of(lane, own);
    rows.positions[own] = row < s.rows ? s.before + row / p.group : -1;
    rows.largest[own] = EK_NO_SCORE;
    rows.sums[own] = 0.0f;
  }
  EkTilePart key_part, value_part;
  ek_tile_read<false>(key_part, p.kv, kv_head, blocks, start, s.begin, s.end);
  EK_SYNC();  // keys come where queries were
  for (int at = start; at < s.end; at += EK_TILE) {
    const u64 next_blocks = ek_kv_block(p.kv, next_number);
    next_number = ek_tile_number(table, at + 2 * EK_TILE, s.end);
    ek_tile_put_rows(key_part, keys);
    ek_tile_read<true>(value_part, p.kv, kv_head, blocks, at, s.begin, s.end);
    EK_SYNC();
    EkC scores[EK_CHUNKS];
    ek_prefill_scores(scores, rows, own_queries, keys);
    if constexpr (EK_WIDE) EK_SYNC();  // values come where keys were
    if constexpr (EK_TURNED) ek_tile_put_columns(value_part, values);
    else ek_tile_put_rows(value_part, values);
    ek_tile_read<false>(key_part, p.kv, kv_head, next_blocks, at + EK_TILE, s.begin, s.end);
    ek_prefill_weigh(scores, rows, p, s, at);
#ifndef EK_PLANT_BARRIER  // a fault for tests to find
    EK_SYNC();
#endif
    ek_prefill_add(rows, scores, values);
    if constexpr (EK_WIDE) EK_SYNC();  // keys come where values were
    blocks = next_blocks;
  }
  EK_SYNC();  // results come where keys and values were
  ek_prefill_write(rows, p, s, first_token, own_queries);
}
