// A tile of prefill's keys or values: out of the paged cache into registers, and as operands into shared memory.
//
// Numbers become operands on this way, bfloat16 or float16, whatever the cache's format is. Slots before the first
// token that is seen, and behind the last, may hold anything and are not read: they count as zeros, since 0 times a NaN
// would be a NaN.
#pragma once
#include "attn/prefill_order.h"

constexpr int EK_PREFILL_THREADS = 128;
constexpr int EK_ROWS = 16 * (EK_PREFILL_THREADS / 32);
constexpr bool EK_WIDE = EK_D > 128;                              // keys and values take turns in one place
constexpr bool EK_STAY = EK_D > 128 || (EK_TURNED && EK_D > 64);  // queries stay in shared memory, or go to registers
constexpr int EK_TILE = EK_WIDE ? 16 : 32;                        // tokens
constexpr int EK_PARTS = EK_D / 16;  // of a head, as operands have it
constexpr int EK_CHUNKS = EK_TILE / 16;

// Shared memory, in numbers. 16 bytes beside each row let neighbouring rows begin in other banks.
constexpr int EK_LINE = EK_D + 8;                                 // of queries and keys
constexpr int EK_VALUE_LINE = EK_TURNED ? EK_TILE + 8 : EK_LINE;  // of values
constexpr int EK_QUERY_ROOM = EK_ROWS * EK_LINE;
constexpr int EK_KEY_ROOM = EK_TILE * EK_LINE;
constexpr int EK_VALUE_ROOM = EK_TURNED ? EK_D * EK_VALUE_LINE : EK_KEY_ROOM;
constexpr int EK_KEYS_AT = EK_STAY ? EK_QUERY_ROOM : 0;  // else queries are in registers before the first keys come
constexpr int EK_VALUES_AT = EK_WIDE ? EK_KEYS_AT : EK_KEYS_AT + EK_KEY_ROOM;
constexpr int EK_TILE_ROOM = EK_VALUES_AT + EK_VALUE_ROOM > EK_KEYS_AT + EK_KEY_ROOM ? EK_VALUES_AT + EK_VALUE_ROOM
                                                                                    : EK_KEYS_AT + EK_KEY_ROOM;
constexpr int EK_ROOM = EK_TILE_ROOM > EK_QUERY_ROOM ? EK_TILE_ROOM : EK_QUERY_ROOM;
static_assert(EK_ROOM * 2 <= 48 << 10, "more shared memory than every card has");

// A tile's keys, or its values, are read by all threads, so many vectors each.
constexpr int EK_TILE_VECS = EK_TILE * EK_KV_VECS;
constexpr int EK_READS = 2 * ((EK_TILE_VECS / 2 + EK_PREFILL_THREADS - 1) / EK_PREFILL_THREADS);

// A tile's blocks, a lane each: a block's number, its segment's address and its rows are loads that wait for each
// other, and the first two are made two tiles and a tile ahead. Behind the last block that is seen it is read again.
constexpr int EK_TILE_BLOCKS = EK_TILE > EK_BS ? EK_TILE / EK_BS : 1;

EK_DEV int ek_tile_number(const int* table, int at, int end) {
  const int token = at + (EK_TID & 31) % EK_TILE_BLOCKS * EK_BS;
  return table[ek_min(token, end - 1) / EK_BS];
}

struct EkTilePart {
  EkKvVec vecs[EK_READS];
  EkKvScale scales[EK_READS];
};
struct EkTilePlace {
  int row, piece;
  bool is_one;  // of the tile: the last turn may be for fewer threads
};

// Which vector a thread has at its turn. Two turns have one piece of two neighbouring rows where rows become columns:
// their numbers go into one word.
template <bool PAIRS>
EK_DEV EkTilePlace ek_tile_place(int turn) {
  EkTilePlace place;
  if constexpr (PAIRS) {
    const int pair = (turn >> 1) * EK_PREFILL_THREADS + EK_TID;
    place = {pair % (EK_TILE / 2) * 2 + (turn & 1), pair / (EK_TILE / 2), pair < EK_TILE_VECS / 2};
  } else {
    const int vec = turn * EK_PREFILL_THREADS + EK_TID;
    place = {vec / EK_KV_VECS, vec % EK_KV_VECS, vec < EK_TILE_VECS};
  }
  return place;
}

// Of a kv head's tokens from `at` on, those from `begin` to end - 1.
template <bool VALUES>
EK_DEV void ek_tile_read(EkTilePart& part, const EkKv& kv, int kv_head, u64 blocks, int at, int begin, int end) {
#pragma unroll
  for (int turn = 0; turn < EK_READS; turn++) {
    const EkTilePlace place = ek_tile_place<VALUES && EK_TURNED>(turn);
    const int token = at + place.row, from = place.row / EK_BS % EK_TILE_BLOCKS;
    const u64 block = (u64)ek_shfl((u32)(blocks >> 32), from) << 32 | ek_shfl((u32)blocks, from);
    part.vecs[turn] = ek_kv_none();
    part.scales[turn] = {0.0f, 0.0f};
#ifdef EK_PLANT_STALE_V  // a fault for tests to find
    const bool is_seen = VALUES || (token >= begin && token < end);
#else
    const bool is_seen = token >= begin && token < end;
#endif
    if (!place.is_one || !is_seen) continue;
    const int slot = token % EK_BS;
    const u64 rows = VALUES ? ek_kv_values(kv, block, kv_head) : ek_kv_keys(kv, block, kv_head);
    const u64 scales = VALUES ? ek_kv_value_scales(kv, block, kv_head) : ek_kv_key_scales(kv, block, kv_head);
    part.vecs[turn] = ek_kv_load(rows + (u64)(slot * EK_KV_ROW), place.piece);
    part.scales[turn] = ek_kv_scale(scales, slot);
  }
}

// A vector's numbers as operands, two in a word.
constexpr int EK_VEC_WORDS = EK_KV_ELEMS / 2;
EK_DEV void ek_to_operands(u32 (&words)[EK_VEC_WORDS], const EkKvVec& v, EkKvScale s) {
#pragma unroll
  for (int i = 0; i < EK_VEC_WORDS; i++) {
    if constexpr (EK_KV == EK_F16 && EK_KV < 2) {
      words[i] = v.w[i];
    } else {
      const EkPair pair = ek_kv_pair(v, i);
      if constexpr (EK_KV_SCALE > 0) {
        words[i] = ek_operands(ek_fma(pair.lo, s.scale, s.zero), ek_fma(pair.hi, s.scale, s.zero));
      } else {
        words[i] = ek_operands(pair.lo * EK_KV_GAIN, pair.hi * EK_KV_GAIN);
      }
    }
  }
}

// As rows: keys, and values on NVIDIA.
EK_DEV void ek_tile_put_rows(const EkTilePart& part, u16* to) {
#pragma unroll
  for (int turn = 0; turn < EK_READS; turn++) {
    const EkTilePlace place = ek_tile_place<false>(turn);
    if (!place.is_one) continue;
    u32 words[EK_VEC_WORDS];
    ek_to_operands(words, part.vecs[turn], part.scales[turn]);
    u32x4* vecs = (u32x4*)(to + place.row * EK_LINE + place.piece * EK_KV_ELEMS);
#pragma unroll
    for (int i = 0; i < EK_VEC_WORDS; i += 4) vecs[i / 4] = u32x4{words[i], words[i + 1], words[i + 2], words[i + 3]};
  }
}

// As columns: a word has the same number of two neighbouring tokens.
EK_DEV void ek_tile_put_columns(const EkTilePart& part, u16* to) {
#pragma unroll
  for (int turn = 0; turn < EK_READS; turn += 2) {
    const EkTilePlace place = ek_tile_place<true>(turn);
    if (!place.is_one) continue;
    u32 even[EK_VEC_WORDS], odd[EK_VEC_WORDS];
    ek_to_operands(even, part.vecs[turn], part.scales[turn]);
    ek_to_operands(odd, part.vecs[turn + 1], part.scales[turn + 1]);
    u16* column = to + place.piece * EK_KV_ELEMS * EK_VALUE_LINE + place.row;
#pragma unroll
    for (int i = 0; i < EK_VEC_WORDS; i++) {
      *(u32*)(column + (2 * i) * EK_VALUE_LINE) = ek_perm(even[i], odd[i], 0x5410);
      *(u32*)(column + (2 * i + 1) * EK_VALUE_LINE) = ek_perm(even[i], odd[i], 0x7632);
    }
  }
}
