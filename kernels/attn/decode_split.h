// Decode: queries, each against the keys and values of its own context in the paged cache. In a decoding step they are
// one token of each sequence; where matrix units cannot be used they may be all tokens of a chunk, each of which has a
// context up to itself.
//
// A thread block has one kv head of one query and one part of its context (splits.h), whose blocks its warps take turns
// at. A warp reads EK_ROWS rows at once, each by EK_KV_LANES lanes with 16 bytes a lane (int4: 8), and asks for
// EK_AHEAD times as many, keys and values, before it uses the first. Query heads of the kv head stay in registers, at
// most four in a warp; where there are more, sets of warps read the same rows for different heads, at about one time,
// by way of the first cache, so that all but the first find them there.
//
// A lane multiplies its piece of a row; the butterfly gives the lanes of the row the whole score. From there on they do
// the same, each for its own piece of the values: every group of lanes has a softmax of its own over the rows that it
// has read. In the end these become one through shared memory.
//
// Slots behind the context, in its last block, and before the window, in the first, may hold anything. Their scores are
// replaced and their values made zero by selection: 0 times a NaN would be a NaN.
//
//   -DEK_G=n   query heads of a kv head, 1 to 16
//   grid       kv_heads, parts of all queries, or more than there are
#pragma once
#include "common/act.h"
#include "attn/row_lanes.h"
#include "attn/splits.h"

#ifndef EK_G
#define EK_G 4
#endif
static_assert(EK_G >= 1 && EK_G <= 16, "1 to 16 query heads of a kv head");

constexpr int EK_HEAD_SETS = (EK_G + 3) / 4;
constexpr int EK_HEADS = (EK_G + EK_HEAD_SETS - 1) / EK_HEAD_SETS;                // of a warp
constexpr int EK_SHARES = EK_HEAD_SETS == 1 ? 4 : EK_HEAD_SETS == 2 ? 2 : 1;  // warps that take turns at the blocks
constexpr bool EK_SHARED_READS = EK_HEAD_SETS > 1;
constexpr int EK_DECODE_THREADS = EK_SHARES * EK_HEAD_SETS * 32;
constexpr int EK_ROWS = 32 / EK_KV_LANES;
// 16 numbers a lane take twice the registers that 8 do, for queries and results, and half of the rows ahead; numbers of
// 32 bits take twice the registers on their way.
constexpr int EK_MOST_AHEAD = EK_KV_ELEMS > 8 || EK_KV_WORDS > 4 ? 2 : 4;
constexpr int EK_AHEAD = EK_ROWS * EK_MOST_AHEAD > EK_BS ? EK_BS / EK_ROWS : EK_MOST_AHEAD;
constexpr int EK_GROUPS = EK_SHARES * EK_HEAD_SETS * EK_ROWS;  // of lanes with a row each

struct EkDecodeSplit {
  EkKv kv;
  u64 q;                   // activations [queries, heads, head_dim], q_stride bytes from query to query
  u64 out;                 // activations [queries, heads, head_dim]; written where a context has one part
  const int* block_table;  // [rows, table_stride]
  const int* table_rows;   // [queries]: a query's row of the block table; null: its own number
  const int* contexts;     // [queries]: tokens, the query's own with them; 0 for a query that is none
  const int* begins;       // [queries]: tokens before this one are seen to elsewhere; null: none are
  const float* sinks;      // [heads]; null: there are none
  const int* cut;          // [queries + 2]: see splits.h; null: each query has one part
  const int* slots;        // [queries]: where its parts go, one behind the other; null: as the cut counts them
  float* part_values;      // [slots, heads, head_dim]
  float* part_states;      // [slots, heads, 2]: largest score and sum of weights
  i64 q_stride;
  int queries, table_stride, window;
  int always_parts;        // 0: a context of one part goes to `out`, and not to its slot
  float q_scale;           // log2 e * scale; with a soft cap scale / softcap
  float softcap;           // log2 e * softcap; 0: none
};
static_assert(sizeof(EkDecodeSplit) == 184, "the mirror in Python has the same");

// A warp's heads. Raw numbers of the values are summed up; what they lack to be values is added in the end.
struct EkDecodeHeads {
  float q[EK_HEADS][EK_KV_ELEMS];
  float q_sum[EK_HEADS];  // over the whole head: what a key's zero is multiplied with
  float out[EK_HEADS][EK_KV_ELEMS];
  float zero[EK_HEADS];  // the values' zeros, weighted
  float largest[EK_HEADS];
  float sum[EK_HEADS];
};

// What a warp reads at once.
struct EkDecodeRows {
  EkKvVec keys[EK_AHEAD], values[EK_AHEAD];
  EkKvScale key_scales[EK_AHEAD], value_scales[EK_AHEAD];
  bool seen[EK_AHEAD];
  float scores[EK_AHEAD][EK_HEADS];  // in the end the weights of the raw values
};

EK_DEV void ek_decode_begin(EkDecodeHeads& heads, const EkDecodeSplit& p, u64 queries, int first_head, int piece) {
#pragma unroll
  for (int h = 0; h < EK_HEADS; h++) {
    float q[EK_KV_ELEMS] = {};
    // Lanes without a piece, and heads that only fill up the set, have zeros.
    if (piece < EK_KV_VECS && first_head + h < EK_G) {
      ek_act_load(queries + (u64)((h * EK_D + piece * EK_KV_ELEMS) * EK_ACT_BYTES), q);
    }
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < EK_KV_ELEMS; e++) {
      heads.q[h][e] = q[e] * (p.q_scale * EK_KV_GAIN);
      heads.out[h][e] = 0.0f;
      sum += heads.q[h][e];
    }
    heads.q_sum[h] = EK_KV == 4 ? ek_row_sum(sum) : 0.0f;
    heads.zero[h] = heads.sum[h] = 0.0f;
    heads.largest[h] = EK_NO_SCORE;
  }
}

EK_DEV void ek_decode_read(EkDecodeRows& rows, const EkDecodeSplit& p, u64 block, int kv_head, int row, int piece) {
  const u64 keys = ek_kv_keys(p.kv, block, kv_head), values = ek_kv_values(p.kv, block, kv_head);
#pragma unroll
  for (int a = 0; a < EK_AHEAD; a++) {
    rows.keys[a] = ek_kv_load<EK_SHARED_READS>(keys + (u64)((row + a * EK_ROWS) * EK_KV_ROW), piece);
  }
#pragma unroll
  for (int a = 0; a < EK_AHEAD; a++) {
    rows.key_scales[a] = ek_kv_scale(ek_kv_key_scales(p.kv, block, kv_head), row + a * EK_ROWS);
  }
#pragma unroll
  for (int a = 0; a < EK_AHEAD; a++) {
    rows.values[a] = ek_kv_load<EK_SHARED_READS>(values + (u64)((row + a * EK_ROWS) * EK_KV_ROW), piece);
  }
#pragma unroll
  for (int a = 0; a < EK_AHEAD; a++) {
    rows.value_scales[a] = ek_kv_scale(ek_kv_value_scales(p.kv, block, kv_head), row + a * EK_ROWS);
  }
}

// Nothing is left of the values that are not seen. Those of formats with scales are numbers, whatever their bits.
EK_DEV void ek_decode_hide(EkDecodeRows& rows) {
#ifndef EK_PLANT_STALE_V  // a fault for tests to find
#pragma unroll
  for (int a = 0; a < EK_AHEAD; a++) {
    if constexpr (EK_KV_SCALE == 0) {
#pragma unroll
      for (int i = 0; i < EK_KV_WORDS; i++) rows.values[a].w[i] = rows.seen[a] ? rows.values[a].w[i] : 0;
    } else {
      rows.value_scales[a].scale = rows.seen[a] ? rows.value_scales[a].scale : 0.0f;
      rows.value_scales[a].zero = rows.seen[a] ? rows.value_scales[a].zero : 0.0f;
    }
  }
#endif
}

EK_DEV void ek_decode_score(EkDecodeRows& rows, const EkDecodeHeads& heads, float softcap) {
#pragma unroll
  for (int a = 0; a < EK_AHEAD; a++) {
    float dots[EK_HEADS] = {};
#pragma unroll
    for (int i = 0; i < EK_KV_ELEMS / 2; i++) {
      const EkPair key = ek_kv_pair(rows.keys[a], i);
#pragma unroll
      for (int h = 0; h < EK_HEADS; h++) {
        dots[h] = ek_fma(heads.q[h][2 * i], key.lo, dots[h]);
        dots[h] = ek_fma(heads.q[h][2 * i + 1], key.hi, dots[h]);
      }
    }
#pragma unroll
    for (int h = 0; h < EK_HEADS; h++) {
      float score = ek_row_sum(dots[h]);
      if constexpr (EK_KV_SCALE > 0) score *= rows.key_scales[a].scale;
      if constexpr (EK_KV == 4) score = ek_fma(rows.key_scales[a].zero, heads.q_sum[h], score);
      rows.scores[a][h] = score;
    }
  }
  if (softcap > 0.0f) {
#pragma unroll
    for (int a = 0; a < EK_AHEAD; a++) {
#pragma unroll
      for (int h = 0; h < EK_HEADS; h++) rows.scores[a][h] = softcap * ek_tanh(rows.scores[a][h]);
    }
  }
#pragma unroll
  for (int a = 0; a < EK_AHEAD; a++) {
#pragma unroll
    for (int h = 0; h < EK_HEADS; h++) rows.scores[a][h] = rows.seen[a] ? rows.scores[a][h] : EK_NO_SCORE;
  }
}

// Scores become weights, and the results so far fade to the new largest score. After the first few blocks a new one is
// rare.
EK_DEV void ek_decode_weigh(EkDecodeRows& rows, EkDecodeHeads& heads) {
  float largest[EK_HEADS];
  bool is_new = false;
#pragma unroll
  for (int h = 0; h < EK_HEADS; h++) {
    largest[h] = heads.largest[h];
#pragma unroll
    for (int a = 0; a < EK_AHEAD; a++) largest[h] = ek_max(largest[h], rows.scores[a][h]);
    is_new |= largest[h] > heads.largest[h];
  }
  if (ek_any(is_new)) {
#pragma unroll
    for (int h = 0; h < EK_HEADS; h++) {
      const float fade = ek_exp2(heads.largest[h] - largest[h]);
      heads.largest[h] = largest[h];
      heads.sum[h] *= fade;
      if constexpr (EK_KV == 4) heads.zero[h] *= fade;
#pragma unroll
      for (int e = 0; e < EK_KV_ELEMS; e++) heads.out[h][e] *= fade;
    }
  }
#pragma unroll
  for (int h = 0; h < EK_HEADS; h++) {
#pragma unroll
    for (int a = 0; a < EK_AHEAD; a++) {
      const float weight = rows.seen[a] ? ek_exp2(rows.scores[a][h] - heads.largest[h]) : 0.0f;
      heads.sum[h] += weight;
      if constexpr (EK_KV == 4) heads.zero[h] = ek_fma(weight, rows.value_scales[a].zero, heads.zero[h]);
      rows.scores[a][h] = EK_KV_SCALE > 0 ? weight * rows.value_scales[a].scale : weight;
    }
  }
}

EK_DEV void ek_decode_add(EkDecodeHeads& heads, const EkDecodeRows& rows) {
#pragma unroll
  for (int a = 0; a < EK_AHEAD; a++) {
#pragma unroll
    for (int i = 0; i < EK_KV_ELEMS / 2; i++) {
      const EkPair value = ek_kv_pair(rows.values[a], i);
#pragma unroll
      for (int h = 0; h < EK_HEADS; h++) {
        heads.out[h][2 * i] = ek_fma(rows.scores[a][h], value.lo, heads.out[h][2 * i]);
        heads.out[h][2 * i + 1] = ek_fma(rows.scores[a][h], value.hi, heads.out[h][2 * i + 1]);
      }
    }
  }
}

// One block of the context, whose first token is `token`; tokens first .. context - 1 are seen.
EK_DEV void ek_decode_block(EkDecodeHeads& heads, const EkDecodeSplit& p, u64 block, int kv_head, int token, int first,
                            int context) {
  const int lane = EK_TID & 31, group = lane / EK_KV_LANES, own = lane % EK_KV_LANES;
  const int piece = own < EK_KV_VECS ? own : 0;  // a lane without one multiplies another's with zeros
  for (int row = 0; row < EK_BS; row += EK_ROWS * EK_AHEAD) {
    if (token + row >= context || token + row + EK_ROWS * EK_AHEAD <= first) continue;
    EkDecodeRows rows;
    ek_decode_read(rows, p, block, kv_head, row + group, piece);
#pragma unroll
    for (int a = 0; a < EK_AHEAD; a++) {
      const int at = token + row + group + a * EK_ROWS;
      rows.seen[a] = at >= first && at < context;
    }
    ek_decode_hide(rows);
    ek_decode_score(rows, heads, p.softcap);
    ek_decode_weigh(rows, heads);
    ek_decode_add(heads, rows);
  }
}

// One number of a head's result, to `out` at its query or to its part's slot.
EK_DEV void ek_decode_write(const EkDecodeSplit& p, bool is_whole, int at, int head, int d, float value, float largest,
                            float sum) {
  const i64 row = (i64)at * (p.kv.kv_heads * EK_G) + head;
  if (is_whole) {
    ek_act_store_one(p.out + (u64)((row * EK_D + d) * EK_ACT_BYTES),
                     ek_share(value, largest, sum, ek_sink(p.sinks, head)));
    return;
  }
  p.part_values[row * EK_D + d] = value;
  if (d == 0) {
    p.part_states[2 * row] = largest;
    p.part_states[2 * row + 1] = sum;
  }
}

EK_KERN(EK_DECODE_THREADS) ek_decode_split(EkDecodeSplit p) {
  EK_SMEM float results[EK_GROUPS][EK_D];
  EK_SMEM float largests[EK_GROUPS][EK_HEADS], sums[EK_GROUPS][EK_HEADS];
  const int kv_head = EK_BX, warp = EK_TID / 32;
  const int set = warp % EK_HEAD_SETS, share = warp / EK_HEAD_SETS;
  const EkPart part = ek_part(p.cut, p.queries, EK_BY);
  const int query = part.query;
  if (query >= p.queries) return;
  // What is not there is read from elsewhere, so that no load waits for another.
  const int context = p.contexts[query];
  const int begin = (p.begins != nullptr ? p.begins : p.contexts)[query];
  const int table_row = (p.table_rows != nullptr ? p.table_rows : p.contexts)[query];
  const int first_slot = (p.slots != nullptr ? p.slots : p.contexts)[query];
  const EkSeen seen = ek_seen(part, p.begins != nullptr ? begin : 0, context, p.window);
  const bool is_whole = part.parts == 1 && !p.always_parts;
  const int slot = p.slots != nullptr ? first_slot + part.number : EK_BY;

  EkDecodeHeads heads;
  const int lane = EK_TID & 31, group = lane / EK_KV_LANES, piece = lane % EK_KV_LANES;
  const int first_head = kv_head * EK_G + set * EK_HEADS;
  const u64 queries = p.q + (u64)(query * p.q_stride) + (u64)(first_head * (EK_D * EK_ACT_BYTES));
  ek_decode_begin(heads, p, queries, set * EK_HEADS, piece);

  // A block's number, its segment's address and its rows are three loads that wait for each other: the first two are
  // made two blocks and one block ahead.
  const int* table = p.block_table + (i64)(p.table_rows != nullptr ? table_row : query) * p.table_stride;
  const int end = seen.end;
  int at = seen.begin + share;
  u64 next_block = 0;
  int next_number = 0;
  if (at < end) {
    next_block = ek_kv_block(p.kv, table[at]);
    next_number = table[ek_min(at + EK_SHARES, end - 1)];
  }
  for (; at < end; at += EK_SHARES) {
    const u64 block = next_block;
    next_block = ek_kv_block(p.kv, next_number);
    next_number = table[ek_min(at + 2 * EK_SHARES, end - 1)];
    ek_decode_block(heads, p, block, kv_head, at * EK_BS, seen.first_token, context);
  }

  // All groups' results become one, head after head.
  const int own = warp * EK_ROWS + group;
#pragma unroll
  for (int h = 0; h < EK_HEADS; h++) {
    if (piece == 0) largests[own][h] = heads.largest[h], sums[own][h] = heads.sum[h];
  }
#pragma unroll
  for (int h = 0; h < EK_HEADS; h++) {
    EK_SYNC();  // the last head's results have been read
    if (piece < EK_KV_VECS) {
#pragma unroll
      for (int e = 0; e < EK_KV_ELEMS; e++) {
        results[own][piece * EK_KV_ELEMS + e] = ek_fma(heads.out[h][e], EK_KV_GAIN, heads.zero[h]);
      }
    }
#ifndef EK_PLANT_BARRIER  // a fault for tests to find
    EK_SYNC();
#endif
    for (int i = EK_TID; i < EK_HEAD_SETS * EK_D; i += EK_DECODE_THREADS) {
      const int of_set = i / EK_D, d = i % EK_D, head = of_set * EK_HEADS + h;
      if (head >= EK_G) continue;
      float largest = EK_NO_SCORE, sum = 0.0f, value = 0.0f;
#pragma unroll
      for (int j = 0; j < EK_SHARES * EK_ROWS; j++) {
        largest = ek_max(largest, largests[(j / EK_ROWS * EK_HEAD_SETS + of_set) * EK_ROWS + j % EK_ROWS][h]);
      }
#pragma unroll
      for (int j = 0; j < EK_SHARES * EK_ROWS; j++) {
        const int from = (j / EK_ROWS * EK_HEAD_SETS + of_set) * EK_ROWS + j % EK_ROWS;
        const float fade = ek_exp2(largests[from][h] - largest);
        sum = ek_fma(fade, sums[from][h], sum);
        value = ek_fma(fade, results[from][d], value);
      }
      ek_decode_write(p, is_whole, is_whole ? query : slot, kv_head * EK_G + head, d, value, largest, sum);
    }
  }
}
