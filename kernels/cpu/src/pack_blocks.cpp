// Layouts of the stored blocks: ggml/src/ggml-common.h of github.com/ggml-org/llama.cpp, and their meaning that of
// dequantize_row_* in ggml-quants.c; kernels/quant/dequantise.py has both in a few lines each.
#include <string.h>

#include "pack.h"

namespace {

// kvalues_iq4nl, of iq4_nl and iq4_xs, and twice the values of E2M1 (OCP microscaling formats 1.0), both plus 128.
const uint8_t IQ4[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
const uint8_t E2M1[16] = {128, 129, 130, 131, 132, 134, 136, 140, 128, 127, 126, 125, 124, 122, 120, 116};

// A row's bytes to `count` vectors, of each four.
void spread(const uint8_t* bytes, int count, int lane, uint8_t* vectors) {
  for (int i = 0; i < count; i++) memcpy(vectors + 64 * i + 4 * lane, bytes + 4 * i, 4);
}

void put_f16(const uint8_t* from, int lane, uint8_t* to) { memcpy(to + 2 * lane, from, 2); }

// 16 bytes with column j low and column j + 16 high, to a byte a column.
void nibbles(const uint8_t* from, uint8_t* to) {
  for (int j = 0; j < 16; j++) {
    to[j] = from[j] & 15;
    to[j + 16] = from[j] >> 4;
  }
}

// Four bytes at a time, where all that is done to them stays within each.
uint32_t word(const uint8_t* from, int i) {
  uint32_t four;
  memcpy(&four, from + 4 * i, 4);
  return four;
}

void put_word(uint32_t four, int i, uint8_t* to) { memcpy(to + 4 * i, &four, 4); }

// 32 columns' low halves to the bytes of four vectors: column j low, column j + 16 high.
void pair_nibbles(const uint8_t* values, uint8_t* to) {
  for (int j = 0; j < 16; j++) to[j] = (uint8_t)((values[j] & 15) | (values[j + 16] & 15) << 4);
}

// q4_0, q8_0, q5_0, iq4_nl, q4_1, q5_1, mxfp4: blocks of 32 columns.
void pack_small(int32_t encoding, const uint8_t* from, uint8_t* to, int lane) {
  uint8_t q[32];
  switch (encoding) {
    case EK_ROWS_Q4_0:
      put_f16(from, lane, to + EK_Q4_D);
      return spread(from + 2, 4, lane, to);
    case EK_ROWS_Q8_0:
      for (int j = 0; j < 32; j++) q[j] = from[2 + j] ^ 0x80;
      break;
    case EK_ROWS_IQ4_NL:
      nibbles(from + 2, q);
      for (int j = 0; j < 32; j++) q[j] = IQ4[q[j]];
      break;
    case EK_ROWS_Q5_0:  // d; bits 4 of all columns; the rest. Less 16, so plus 112
    case EK_ROWS_Q5_1:  // d; minimum; the same
    {
      const uint8_t* high = from + (encoding == EK_ROWS_Q5_0 ? 2 : 4);
      const int offset = encoding == EK_ROWS_Q5_0 ? 112 : 0;
      nibbles(high + 4, q);
      for (int i = 0; i < 8; i++) {  // bits 0 .. 3 to bits 0, 8, 16, 24
        const uint32_t fifths = (high[i / 2] >> i % 2 * 4 & 15) * 0x00204081u & 0x01010101u;
        put_word((word(q, i) | fifths << 4) + (uint32_t)offset * 0x01010101u, i, q);
      }
      break;
    }
    case EK_ROWS_Q4_1: nibbles(from + 4, q); break;
    default: {  // mxfp4: 2^(e - 128), as the table holds doubled values; the two smallest are denormal
      const uint32_t e = from[0];
      const uint32_t bits = e < 2 ? 0x00200000u << e : (e - 1) << 23;
      memcpy(to + EK_Q8_D + 4 * lane, &bits, 4);
      nibbles(from + 1, q);
      for (int j = 0; j < 32; j++) q[j] = E2M1[q[j]];
      return spread(q, 8, lane, to);
    }
  }
  put_f16(from, lane, to + EK_Q8_D);
  if (encoding == EK_ROWS_Q4_1 || encoding == EK_ROWS_Q5_1) put_f16(from + 2, lane, to + EK_Q8M_M);
  spread(q, 8, lane, to);
}

// f16 d; u16: two high bits of each of 8 scales; 4 bytes: their low halves; 8 * 16 bytes as in q4_0. To 8 units.
void pack_iq4_xs(const uint8_t* from, uint8_t* to, int lane) {
  const int high = from[2] | from[3] << 8;
  // float16 to float32 by its definition; scales are finite in any file that was not damaged
  const int bits = from[0] | from[1] << 8, exponent = bits >> 10 & 31, fraction = bits & 1023;
  uint32_t whole;
  float d = (float)fraction * 0x1p-24f;
  if (exponent > 0) {
    whole = (uint32_t)(exponent == 31 ? 255 : exponent + 112) << 23 | (uint32_t)fraction << 13;
    memcpy(&d, &whole, 4);
  }
  if (bits & 0x8000) d = -d;
  for (int g = 0; g < 8; g++, to += EK_Q8_D + 64) {
    const int scale = (from[4 + g / 2] >> g % 2 * 4 & 15) | (high >> 2 * g & 3) << 4;
    const float step = d * (float)(scale - 32);
    memcpy(to + EK_Q8_D + 4 * lane, &step, 4);
    uint8_t q[32];
    nibbles(from + 8 + 16 * g, q);
    for (int j = 0; j < 32; j++) q[j] = IQ4[q[j]];
    spread(q, 8, lane, to);
  }
}

// f16 d, dmin; 12 bytes of scales and minima of six bits; q5_K: 32 bytes, bit g of byte j being bit 4 of column j of
// group g; 4 * 32 bytes, low halves one group, high halves the next.
void pack_minima(int32_t encoding, const uint8_t* from, uint8_t* to, int lane) {
  put_f16(from, lane, to + EK_K_D);
  put_f16(from + 2, lane, to + EK_K_DMIN);
  const uint8_t *packed = from + 4, *high = from + 16, *low = encoding == EK_ROWS_Q5_K ? high + 32 : high;
  for (int g = 0; g < 8; g++) {
    uint8_t scale, minimum;  // get_scale_min_k4
    if (g < 4) {
      scale = packed[g] & 63;
      minimum = packed[g + 4] & 63;
    } else {
      scale = (uint8_t)((packed[g + 4] & 15) | packed[g - 4] >> 6 << 4);
      minimum = (uint8_t)(packed[g + 4] >> 4 | packed[g] >> 6 << 4);
    }
    to[EK_K_SC + 16 * g + lane] = scale;
    to[EK_K_M + 16 * g + lane] = minimum;
    uint8_t values[32], q[16];
    for (int j = 0; j < 32; j++) values[j] = (uint8_t)(low[32 * (g / 2) + j] >> (g % 2 * 4));
    pair_nibbles(values, q);
    spread(q, 4, lane, to + EK_K_Q + 256 * g);
    if (encoding != EK_ROWS_Q5_K) continue;
    uint32_t fifths = 0;
    for (int i = 0; i < 8; i++) fifths |= (word(high, i) >> g & 0x01010101u) << i;
    put_word(fifths, lane, to + EK_Q5K_H + 64 * g);
  }
}

// Twice 64 bytes: low halves 64 columns, high halves the next 64; twice 32 bytes: two bits each of 4 * 32 columns; 16
// scales; f16 d.
void pack_q6_k(const uint8_t* from, uint8_t* to, int lane) {
  const uint8_t* scales = from + 192;
  put_f16(from + 208, lane, to);
  for (int i = 0; i < 16; i++) to[EK_Q6K_SC + 16 * i + lane] = scales[i];
  for (int g = 0; g < 8; g++) {
    const uint8_t* low = from + 64 * (g / 4) + 32 * (g % 2);
    const uint8_t* high = from + 128 + 32 * (g / 4);
    uint8_t* group = to + EK_Q6K_Q + EK_Q6K_GROUP * g;
    uint8_t values[32], q[16];
    for (int j = 0; j < 32; j++) values[j] = (uint8_t)(low[j] >> (g % 4 / 2 * 4));
    pair_nibbles(values, q);
    spread(q, 4, lane, group);
    for (int half = 0; half < 2; half++) {
      uint32_t tops = 0;
      for (int i = 0; i < 4; i++) tops |= (word(high, 4 * half + i) >> (g % 4 * 2) & 0x03030303u) << 2 * i;
      put_word(tops, lane, group + 256 + 64 * half);
    }
  }
}

// f16 d; u8 z; u8 0; then 16 bytes for each 32 columns, which are those of EK_Q4.
void pack_affine4(int32_t group, const uint8_t* from, uint8_t* to, int lane) {
  uint8_t* trailer = to + 8 * group;
  put_f16(from, lane, trailer);
  trailer[32 + lane] = from[2];
  spread(from + 4, group / 8, lane, to);
}

void pack_floats(int32_t encoding, const uint8_t* from, int64_t cols, uint8_t* to, int lane) {
  switch (encoding) {
    case EK_ROWS_F32:
      for (int64_t j = 0; j < cols; j++) memcpy(to + 64 * j + 4 * lane, from + 4 * j, 4);
      return;
    case EK_ROWS_F16:
      for (int64_t j = 0; j < cols; j++) memcpy(to + 32 * j + 2 * lane, from + 2 * j, 2);
      return;
    default:
      for (int64_t j = 0; j < cols / 2; j++) memcpy(to + 64 * j + 4 * lane, from + 4 * j, 4);
      if (cols % 2) memcpy(to + 32 * (cols - 1) + 4 * lane, from + 2 * (cols - 1), 2);
  }
}

}  // namespace

void ek_pack_blocks(int32_t encoding, int32_t group, const uint8_t* from, int64_t blocks, uint8_t* to, int lane) {
  const ek_stored stored = ek_stored_as(encoding, group);
  if (stored.block_cols == 1) return pack_floats(encoding, from, blocks, to, lane);
  const ek_matrix shape = {nullptr, stored.format, 1, stored.block_cols, group};
  const int64_t bytes = ek_panel_bytes(&shape);  // of a panel, for the columns of a block
  for (int64_t i = 0; i < blocks; i++, from += stored.block_bytes, to += bytes) {
    switch (encoding) {
      case EK_ROWS_Q4_K:
      case EK_ROWS_Q5_K: pack_minima(encoding, from, to, lane); break;
      case EK_ROWS_Q6_K: pack_q6_k(from, to, lane); break;
      case EK_ROWS_IQ4_XS: pack_iq4_xs(from, to, lane); break;
      case EK_ROWS_AFFINE4: pack_affine4(group, from, to, lane); break;
      default: pack_small(encoding, from, to, lane);
    }
  }
}
