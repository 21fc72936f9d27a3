// One row of a matrix in float32: the exact values, by the operations and in the order in which gguf-py's quants.py and
// ggml's dequantize_row_* have them, so that the bits are theirs too. (Where a run flushes denormals, they are 0 here.)
#pragma once
#include "panels.h"
#include "simd.h"

namespace EK_TIER {

// A lane of 16 numbers.
static inline float f16_lane(const uint8_t* p, int lane) {
  float all[16];
  vf_store(all, vf_from_f16(p));
  return all[lane];
}

// A row's bytes of `count` vectors, end to end: of each vector four.
static inline void bytes_of_row(const uint8_t* vectors, int lane, int count, uint8_t* to) {
  for (int i = 0; i < count; i++) memcpy(to + 4 * i, vectors + 64 * i + 4 * lane, 4);
}

// 32 half-bytes in the order of their columns.
static inline void nibbles_of_row(const uint8_t* vectors, int lane, uint8_t* to) {
  uint8_t both[16];
  bytes_of_row(vectors, lane, 4, both);
  for (int j = 0; j < 16; j++) {
    to[j] = both[j] & 15;
    to[j + 16] = both[j] >> 4;
  }
}

static void row_of_floats(const ek_matrix* m, const uint8_t* panel, int lane, float* out) {
  for (int64_t col = 0; col < m->cols; col += 16) {
    const int n = m->cols - col < 16 ? (int)(m->cols - col) : 16;
    if (m->format == EK_F32) {
      for (int j = 0; j < n; j++) memcpy(out + col + j, panel + 64 * (col + j) + 4 * lane, 4);
      continue;
    }
    uint16_t bits[16] = {0};
    for (int j = 0; j < n; j++) {
      const int64_t at = col + j;
      const int64_t pair = 64 * (at / 2) + 4 * lane + at % 2 * 2;
      memcpy(bits + j, panel + (m->format == EK_F16 ? 32 * at + 2 * lane : pair), 2);
    }
    vf_store_n(out + col, m->format == EK_F16 ? vf_from_f16(bits) : vf_from_bf16(bits), n);
  }
}

// Units of 32 columns with one scale.
static void row_of_groups(const ek_matrix* m, const uint8_t* unit, int lane, float* out) {
  const int64_t bytes = ek_unit_of(m).bytes;
  for (int64_t col = 0; col < m->cols; col += EK_GROUP, unit += bytes, out += EK_GROUP) {
    uint8_t q[32];
    if (m->format == EK_Q4) {
      nibbles_of_row(unit, lane, q);
    } else {
      bytes_of_row(unit, lane, 8, q);
    }
    if (m->format == EK_Q8M) {
      const float d = f16_lane(unit + EK_Q8_D, lane), minimum = f16_lane(unit + EK_Q8M_M, lane);
      for (int j = 0; j < 32; j++) out[j] = d * (float)q[j] + minimum;
      continue;
    }
    float d;
    if (m->format == EK_Q8F) {
      memcpy(&d, unit + EK_Q8_D + 4 * lane, 4);
    } else {
      d = f16_lane(unit + (m->format == EK_Q4 ? EK_Q4_D : EK_Q8_D), lane);
    }
    const int offset = m->format == EK_Q4 ? 8 : 128;
    for (int j = 0; j < 32; j++) out[j] = d * (float)(q[j] - offset);
  }
}

static void row_of_q4z(const ek_matrix* m, const uint8_t* unit, int lane, float* out) {
  for (int64_t col = 0; col < m->cols; col += m->group, unit += 8 * m->group + 48) {
    const uint8_t* trailer = unit + 8 * m->group;
    const float d = f16_lane(trailer, lane);
    const int z = trailer[32 + lane];
    for (int64_t g = 0; g < m->group; g += EK_GROUP, out += EK_GROUP) {
      uint8_t q[32];
      nibbles_of_row(unit + 8 * g, lane, q);
      for (int j = 0; j < 32; j++) out[j] = d * (float)(q[j] - z);
    }
  }
}

// Q4K and Q5K.
static void row_of_minima(const ek_matrix* m, const uint8_t* unit, int lane, float* out) {
  const int64_t bytes = ek_unit_of(m).bytes;
  for (int64_t col = 0; col < m->cols; col += EK_SUPER, unit += bytes) {
    const float d = f16_lane(unit + EK_K_D, lane), dmin = f16_lane(unit + EK_K_DMIN, lane);
    for (int g = 0; g < 8; g++, out += EK_GROUP) {
      uint8_t q[32];
      nibbles_of_row(unit + EK_K_Q + 256 * g, lane, q);
      if (m->format == EK_Q5K) {
        const uint8_t* h = unit + EK_Q5K_H + 64 * g + 4 * lane;
        for (int j = 0; j < 32; j++) q[j] = (uint8_t)(q[j] | (h[j % 4] >> (j / 4) & 1) << 4);
      }
      const float scale = d * (float)unit[EK_K_SC + 16 * g + lane];
      const float minimum = dmin * (float)unit[EK_K_M + 16 * g + lane];
      for (int j = 0; j < 32; j++) out[j] = scale * (float)q[j] - minimum;
    }
  }
}

static void row_of_q6k(const ek_matrix* m, const uint8_t* unit, int lane, float* out) {
  const int64_t bytes = ek_unit_of(m).bytes;
  for (int64_t col = 0; col < m->cols; col += EK_SUPER, unit += bytes) {
    const float d = f16_lane(unit, lane);
    for (int g = 0; g < 8; g++, out += EK_GROUP) {
      const uint8_t* group = unit + EK_Q6K_Q + EK_Q6K_GROUP * g;
      uint8_t q[32], h[8];
      nibbles_of_row(group, lane, q);
      bytes_of_row(group + 256, lane, 2, h);
      for (int j = 0; j < 32; j++) q[j] = (uint8_t)(q[j] | (h[j / 16 * 4 + j % 4] >> (j % 16 / 4 * 2) & 3) << 4);
      for (int half = 0; half < 2; half++) {
        const float scale = d * (float)(int8_t)unit[EK_Q6K_SC + 32 * g + 16 * half + lane];
        for (int j = 16 * half; j < 16 * half + 16; j++) out[j] = scale * (float)(q[j] - 32);
      }
    }
  }
}

static void matrix_row(const ek_matrix* matrix, int64_t row, float* out) {
  const uint8_t* panel = (const uint8_t*)matrix->data + row / EK_PANEL * ek_panel_bytes(matrix);
  const int lane = (int)(row % EK_PANEL);
  switch (matrix->format) {
    case EK_F32:
    case EK_F16:
    case EK_BF16: return row_of_floats(matrix, panel, lane, out);
    case EK_Q4Z: return row_of_q4z(matrix, panel, lane, out);
    case EK_Q4K:
    case EK_Q5K: return row_of_minima(matrix, panel, lane, out);
    case EK_Q6K: return row_of_q6k(matrix, panel, lane, out);
    default: return row_of_groups(matrix, panel, lane, out);
  }
}

}  // namespace EK_TIER
