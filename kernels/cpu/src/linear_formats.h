// What the quantised panels of ek.h hold, one struct a format: tiles read them as they are, and unpack in registers.
//
//   KIND           how an offset is paid for (linear_int.h)
//   NARROW         the most tokens whose tiles are one panel wide
//   LINES          cache lines to fetch ahead in a quarter of a group: 8 vectors and what goes with them
//   groups, unit   groups of 32 columns in a unit; its bytes
//   vector(u,g,i)  columns 4 i .. 4 i + 3 of group g of the unit at u, as unsigned bytes; compilers know i
//   scale(u,g,h)   float32 of the group, or of half h of it
//   minus(u,g)     minus the minimum
#pragma once
#include "linear_tile.h"

namespace EK_TIER {

enum panel_kind {
  KIND_128,      // w = s (q - 128), q up to 255
  KIND_8,        // w = s (q - 8); in this and the others q is at most 127
  KIND_32_HALF,  // w = s (q - 32), s for 16 columns each
  KIND_MINIMA,   // w = s q + minus
};

// 256 half-bytes: vector i low and vector i + 4 high in byte i.
static inline vi nibbles(const uint8_t* q, int i) {
  const vi both = vi_load(q + 64 * (i % 4));
  return vi_and(i < 4 ? both : vi_shr16(both, 4), vi_all_bytes(15));
}

struct panels_q8 {
  static constexpr panel_kind KIND = KIND_128;
  static constexpr int NARROW = BYTES_NARROW, LINES = 3;
  int64_t groups = 1, unit = EK_Q8_D + 32;
  explicit panels_q8(const ek_matrix*) {}
  inline vi vector(const uint8_t* u, int64_t, int i) const { return vi_load(u + 64 * i); }
  inline vf scale(const uint8_t* u, int64_t, int) const { return vf_from_f16(u + EK_Q8_D); }
  inline vf minus(const uint8_t*, int64_t) const { return vf_zero(); }
};

struct panels_q8f : panels_q8 {
  explicit panels_q8f(const ek_matrix* m) : panels_q8(m) { unit = EK_Q8_D + 64; }
  inline vf scale(const uint8_t* u, int64_t, int) const { return vf_load((const float*)(u + EK_Q8_D)); }
};

struct panels_q8m : panels_q8 {
  static constexpr panel_kind KIND = KIND_MINIMA;
  explicit panels_q8m(const ek_matrix* m) : panels_q8(m) { unit = EK_Q8M_M + 32; }
  inline vf minus(const uint8_t* u, int64_t) const { return vf_from_f16(u + EK_Q8M_M); }
};

struct panels_q4 {
  static constexpr panel_kind KIND = KIND_8;
  static constexpr int NARROW = BITS_NARROW, LINES = 2;
  int64_t groups = 1, unit = EK_Q4_D + 32;
  explicit panels_q4(const ek_matrix*) {}
  inline vi vector(const uint8_t* u, int64_t, int i) const { return nibbles(u, i); }
  inline vf scale(const uint8_t* u, int64_t, int) const { return vf_from_f16(u + EK_Q4_D); }
  inline vf minus(const uint8_t*, int64_t) const { return vf_zero(); }
};

struct panels_q4z {
  static constexpr panel_kind KIND = KIND_MINIMA;
  static constexpr int NARROW = BITS_NARROW, LINES = 2;
  int64_t groups, d, unit;
  explicit panels_q4z(const ek_matrix* m) : groups(m->group / EK_GROUP), d(8ll * m->group), unit(d + 48) {}
  inline vi vector(const uint8_t* u, int64_t g, int i) const { return nibbles(u + 256 * g, i); }
  inline vf scale(const uint8_t* u, int64_t, int) const { return vf_from_f16(u + d); }
  inline vf minus(const uint8_t* u, int64_t) const {
    return vf_mul(vf_from_f16(u + d), vf_sub(vf_zero(), vf_from_u8(u + d + 32)));  // exact: 11 bits by 8
  }
};

struct panels_q4k {
  static constexpr panel_kind KIND = KIND_MINIMA;
  static constexpr int NARROW = BITS_NARROW, LINES = 2;
  int64_t groups = 8, unit = EK_Q5K_H;
  explicit panels_q4k(const ek_matrix*) {}
  inline vi vector(const uint8_t* u, int64_t g, int i) const { return nibbles(u + EK_K_Q + 256 * g, i); }
  inline vf scale(const uint8_t* u, int64_t g, int) const {
    return vf_mul(vf_from_f16(u + EK_K_D), vf_from_u8(u + EK_K_SC + 16 * g));
  }
  inline vf minus(const uint8_t* u, int64_t g) const {
    return vf_mul(vf_from_f16(u + EK_K_DMIN), vf_sub(vf_zero(), vf_from_u8(u + EK_K_M + 16 * g)));
  }
};

struct panels_q5k : panels_q4k {
  explicit panels_q5k(const ek_matrix* m) : panels_q4k(m) { unit = EK_Q5K_H + 8 * 64; }
  inline vi vector(const uint8_t* u, int64_t g, int i) const {
    const vi h = vi_load(u + EK_Q5K_H + 64 * g);
    const vi fifth = i < 4 ? vi_shl16(h, i < 4 ? 4 - i : 0) : vi_shr16(h, i < 4 ? 0 : i - 4);
    return vi_or(nibbles(u + EK_K_Q + 256 * g, i), vi_and(fifth, vi_all_bytes(16)));
  }
};

struct panels_q6k {
  static constexpr panel_kind KIND = KIND_32_HALF;
  static constexpr int NARROW = BITS_NARROW, LINES = 1;
  int64_t groups = 8, unit = EK_Q6K_Q + 8 * EK_Q6K_GROUP;
  explicit panels_q6k(const ek_matrix*) {}
  inline vi vector(const uint8_t* u, int64_t g, int i) const {
    const uint8_t* q = u + EK_Q6K_Q + EK_Q6K_GROUP * g;
    const vi h = vi_load(q + 256 + 64 * (i / 4));
    const vi top = i % 4 < 3 ? vi_shl16(h, i % 4 < 3 ? 4 - 2 * (i % 4) : 0) : vi_shr16(h, 2);
    return vi_or(nibbles(q, i), vi_and(top, vi_all_bytes(0x30)));
  }
  inline vf scale(const uint8_t* u, int64_t g, int half) const {
    return vf_mul(vf_from_f16(u), vf_from_i8(u + EK_Q6K_SC + 32 * g + 16 * half));
  }
  inline vf minus(const uint8_t*, int64_t) const { return vf_zero(); }
};

}  // namespace EK_TIER
