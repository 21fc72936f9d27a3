// The KV cache of the card: where a block is, and how one head's keys or values of a token, a row, are read and
// written.
//
// A segment is one allocation of 2^seg_shift blocks; a block's number is its segment << seg_shift | its slot. In a slot
//   [layer][keys: kv_heads x block x row][values: the same][key scales: kv_heads x block][value scales: the same]
// with planes at multiples of 128 bytes. Strides come from the host: with others, the same kernel reads other orders.
//
// By EK_KV, EK_D (head_dim, a multiple of 32) and EK_BS (tokens in a block):
//   0  bfloat16
//   1  float16
//   2  float8 e4m3
//   3  int8, and a float16 scale with each row:  x = scale * code,  codes -127 to 127
//   4  int4, and two float16 with each row:  x = scale * code + zero,  codes 0 to 15, an even element in the low nibble
//   5  float32
// A row is read in vectors, a lane each; what a vector holds are raw numbers, x = scale * (EK_KV_GAIN * raw) + zero.
#pragma once
#include "common/compat.h"

#ifndef EK_KV
#define EK_KV 0
#endif
#ifndef EK_D
#define EK_D 128
#endif
#ifndef EK_BS
#define EK_BS 16
#endif

static_assert(EK_KV >= 0 && EK_KV <= 5, "EK_KV is 0 bf16, 1 f16, 2 e4m3, 3 int8, 4 int4 or 5 f32");
static_assert(EK_D % 32 == 0 && EK_D <= 256, "head_dim is a multiple of 32 up to 256");

constexpr int EK_KV_BITS = EK_KV == 5 ? 32 : EK_KV <= 1 ? 16 : EK_KV <= 3 ? 8 : 4;
constexpr int EK_KV_ROW = EK_D * EK_KV_BITS / 8;                   // bytes
constexpr int EK_KV_SCALE = EK_KV == 3 ? 2 : EK_KV == 4 ? 4 : 0;   // bytes that go with a row
constexpr int EK_KV_WORDS = EK_KV == 4 ? 2 : EK_KV == 5 ? 8 : 4;   // of 32 bits, in a vector
constexpr int EK_KV_ELEMS = EK_KV_WORDS * 32 / EK_KV_BITS;         // numbers in a vector: 8, or 16
constexpr int EK_KV_VECS = EK_D / EK_KV_ELEMS;                     // vectors in a row, at most a warp's lanes
constexpr float EK_KV_GAIN = EK_KV == 2 ? 256.0f : 1.0f;

// Lanes that share a row in a warp: the next power of two. Those from EK_KV_VECS on have nothing of it (head_dim 96).
constexpr int EK_KV_LANES = EK_KV_VECS <= 2    ? 2
                            : EK_KV_VECS <= 4  ? 4
                            : EK_KV_VECS <= 8  ? 8
                            : EK_KV_VECS <= 16 ? 16
                                               : 32;

// One layer's cache; a part of the kernels' arguments.
struct EkKv {
  const u64* seg;         // addresses of the segments; 0: there is none
  i64 slot_stride;        // bytes from a block to the next in its segment
  i64 k_off, v_off;       // bytes from the start of a block to this layer's keys and values
  i64 ks_off, vs_off;     // and to their scales
  i64 head_stride;        // bytes from a head's rows to the next one's
  int seg_shift, kv_heads;
};
static_assert(sizeof(EkKv) == 64, "the mirror in Python has the same");

EK_DEV u64 ek_kv_block(const EkKv& kv, int block) {
  const u64 slot = (u64)(u32)(block & ((1 << kv.seg_shift) - 1));
  return kv.seg[block >> kv.seg_shift] + slot * (u64)kv.slot_stride;
}

// Rows of a head, and of what goes with them, from the address of their block.
EK_DEV u64 ek_kv_keys(const EkKv& kv, u64 block, int head) {
  return block + (u64)kv.k_off + (u64)head * (u64)kv.head_stride;
}
EK_DEV u64 ek_kv_values(const EkKv& kv, u64 block, int head) {
  return block + (u64)kv.v_off + (u64)head * (u64)kv.head_stride;
}
EK_DEV u64 ek_kv_key_scales(const EkKv& kv, u64 block, int head) {
  return block + (u64)kv.ks_off + (u64)(head * (EK_BS * EK_KV_SCALE));
}
EK_DEV u64 ek_kv_value_scales(const EkKv& kv, u64 block, int head) {
  return block + (u64)kv.vs_off + (u64)(head * (EK_BS * EK_KV_SCALE));
}

// A vector of a row. `address` is that of the row's first byte, or of a scale.
struct EkKvVec {
  u32 w[EK_KV_WORDS];
};
struct EkKvScale {
  float scale, zero;
};
struct EkPair {
  float lo, hi;
};

// SHARED: other warps of the thread block read it at about the same time, so that the first cache is to keep it.
template <bool SHARED = false>
EK_DEV EkKvVec ek_kv_load(u64 address, int vec) {
  EkKvVec v;
  if constexpr (EK_KV_WORDS == 2) {
    const u64 at = address + (u64)(vec * 8);
    const u32x2 t = SHARED ? ek_ldg8_kept(at) : ek_ldg8(at);
    v.w[0] = t.x, v.w[1] = t.y;
  } else {
#pragma unroll
    for (int i = 0; i < EK_KV_WORDS; i += 4) {
      const u64 at = address + (u64)((vec * EK_KV_WORDS + i) * 4);
      const u32x4 t = SHARED ? ek_ldg16_kept(at) : ek_ldg16(at);
      v.w[i] = t.x, v.w[i + 1] = t.y, v.w[i + 2] = t.z, v.w[i + 3] = t.w;
    }
  }
  return v;
}

EK_DEV void ek_kv_store(u64 address, int vec, const EkKvVec& v) {
  if constexpr (EK_KV_WORDS == 2) {
    ek_stg8(address + (u64)(vec * 8), u32x2{v.w[0], v.w[1]});
  } else {
#pragma unroll
    for (int i = 0; i < EK_KV_WORDS; i += 4) {
      ek_stg16(address + (u64)((vec * EK_KV_WORDS + i) * 4), u32x4{v.w[i], v.w[i + 1], v.w[i + 2], v.w[i + 3]});
    }
  }
}

// A vector of zeros: what a masked row is read as, whose bits may be a NaN's.
EK_DEV EkKvVec ek_kv_none() {
  EkKvVec v;
#pragma unroll
  for (int i = 0; i < EK_KV_WORDS; i++) v.w[i] = 0;
  return v;
}

// Raw numbers 2i and 2i + 1. In e4m3 the two codes of NaN are read as 480: telling them apart would cost a third more.
EK_DEV EkPair ek_kv_pair(const EkKvVec& v, int i) {
  if constexpr (EK_KV == 0) return {ek_bf16lo(v.w[i]), ek_bf16hi(v.w[i])};
  else if constexpr (EK_KV == 1) return {ek_f16lo(v.w[i]), ek_f16hi(v.w[i])};
  else if constexpr (EK_KV == 5) return {ek_asfloat(v.w[2 * i]), ek_asfloat(v.w[2 * i + 1])};
  else if constexpr (EK_KV == 2) {
    const u32 bytes = ek_perm(v.w[i >> 1], 0, (i & 1) ? 0x3424 : 0x1404);  // each at the top of 16 bits
    const u32 halves = (bytes & 0x80008000u) | (bytes >> 1 & 0x3f803f80u);
    return {ek_f16lo(halves), ek_f16hi(halves)};
  } else if constexpr (EK_KV == 3) {
    const u32 bytes = v.w[i >> 1] >> ((i & 1) * 16);
    return {(float)(i8)(bytes & 0xffu), (float)(i8)(bytes >> 8 & 0xffu)};
  } else {
    // 2^23 + n has n in its lowest bits: no conversion is needed.
    const u32 byte = v.w[i >> 2] >> ((i & 3) * 8);
    const float low = ek_asfloat(0x4b000000u | (byte & 15u)), high = ek_asfloat(0x4b000000u | (byte >> 4 & 15u));
    return {low - 8388608.0f, high - 8388608.0f};
  }
}

EK_DEV float ek_kv_raw(const EkKvVec& v, int e) {
  const EkPair pair = ek_kv_pair(v, e >> 1);
  return (e & 1) ? pair.hi : pair.lo;
}

// That of the row in `slot`; `address` is that of the head's first. Formats without scales have 1 and 0, for nothing.
EK_DEV EkKvScale ek_kv_scale(u64 address, int slot) {
  if constexpr (EK_KV == 3) return {ek_f16(ek_ldg2(address + (u64)(slot * 2))), 0.0f};
  else if constexpr (EK_KV == 4) {
    const u32 both = ek_ldg4(address + (u64)(slot * 4));
    return {ek_f16lo(both), ek_f16hi(both)};
  } else return {1.0f, 0.0f};
}

EK_DEV void ek_kv_store_scale(u64 address, int slot, EkKvScale s) {
  if constexpr (EK_KV == 3) ek_stg2(address + (u64)(slot * 2), ek_tof16(s.scale));
  else if constexpr (EK_KV == 4) ek_stg4(address + (u64)(slot * 4), ek_pack_f16(s.scale, s.zero));
}

// The scale of a row whose least and largest numbers are these (over all lanes), rounded to float16 as it is stored.
// `sum` is that of all numbers: with a NaN or an infinity among them the scale is NaN, and none of them reads as one.
EK_DEV EkKvScale ek_kv_fit(float least, float most, float sum) {
  const float poison = sum * 0.0f;
  if constexpr (EK_KV == 3) {
    return {ek_f16(ek_tof16(ek_max(-least, most) / 127.0f + poison)), 0.0f};
  } else if constexpr (EK_KV == 4) {
    const float zero = ek_f16(ek_tof16(least));
    return {ek_f16(ek_tof16(ek_max(most - zero, 0.0f) / 15.0f + poison)), zero};
  } else return {1.0f, 0.0f};
}

// A lane's numbers as they are stored.
EK_DEV EkKvVec ek_kv_encode(const float (&x)[EK_KV_ELEMS], EkKvScale s) {
  EkKvVec v = ek_kv_none();
  const float scale = s.scale > 0.0f ? s.scale : 1.0f;  // NaN, or too small for float16: codes of nothing
#pragma unroll
  for (int e = 0; e < EK_KV_ELEMS; e++) {
    const int place = e * EK_KV_BITS, word = place >> 5, shift = place & 31;
    u32 code;
    if constexpr (EK_KV == 0) code = ek_tobf16(x[e]);
    else if constexpr (EK_KV == 1) code = ek_tof16(x[e]);
    else if constexpr (EK_KV == 2) code = ek_toe4m3(x[e]);
    else if constexpr (EK_KV == 5) code = ek_asuint(x[e]);
    else if constexpr (EK_KV == 3) code = (u32)(int)ek_rint(ek_max(-127.0f, ek_min(127.0f, x[e] / scale))) & 0xffu;
    else code = (u32)(int)ek_rint(ek_max(0.0f, ek_min(15.0f, (x[e] - s.zero) / scale)));
    v.w[word] |= code << shift;
  }
  return v;
}
