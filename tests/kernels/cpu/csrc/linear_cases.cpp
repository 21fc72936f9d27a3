// Linear layers and looked up rows of every format on random panels; test_simd.py compares what instruction sets that
// round alike make of the same ones.
#define EK_TIER tested
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "linear.h"
#include "matrix_row.h"

enum { MOST_TOKENS = 60, ROWS = 80, MOST_COLS = 1280 };

static uint64_t state = 1;

static uint32_t draw() {  // Knuth's MMIX
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return (uint32_t)(state >> 32);
}

// Bytes that are numbers in all formats: no exponent of float16, bfloat16 or float32 is at its end. EK_Q8M has seven bits.
static void fill(uint8_t* p, int64_t count, int32_t format) {
  for (int64_t i = 0; i < count; i++) p[i] = (uint8_t)(draw() & (format == EK_Q8M ? 0x3F : 0xBF));
}

static void put(const char* name, int format, int64_t a, const float* x, int64_t count) {
  uint64_t sum = 14695981039346656037ull;  // FNV-1a
  const uint8_t* bytes = (const uint8_t*)x;
  for (int64_t i = 0; i < 4 * count; i++) sum = (sum ^ bytes[i]) * 1099511628211ull;
  printf("%s %d %lld %016llx\n", name, format, (long long)a, (unsigned long long)sum);
}

int main() {
  const int64_t stride = MOST_COLS + 64;
  uint8_t* panels = (uint8_t*)aligned_alloc(64, ROWS * MOST_COLS * 8);
  void* scratch = aligned_alloc(64, EK_SCRATCH);
  float* f32 = (float*)calloc(MOST_TOKENS * stride, 4);
  uint16_t* bf16 = (uint16_t*)calloc(MOST_TOKENS * stride, 2);
  int8_t* q8 = (int8_t*)calloc(MOST_TOKENS * stride, 1);
  float* scales = (float*)calloc(MOST_TOKENS * stride, 4);
  int32_t* sums = (int32_t*)calloc(MOST_TOKENS * stride, 4);
  float* out = (float*)calloc(MOST_TOKENS * ROWS, 4);
  for (int64_t i = 0; i < MOST_TOKENS * stride; i++) {
    f32[i] = (float)((int32_t)draw() >> 8) / (1 << 23);
    bf16[i] = (uint16_t)(0x3E00 + draw() % 512 + (draw() & 0x8000));
    q8[i] = (int8_t)(draw() % 255 - 127);
    scales[i] = f32[i] / 127;
  }
  for (int64_t i = 0; i < MOST_TOKENS * stride / 32; i++) {
    for (int j = 0; j < 32; j++) sums[i] += q8[32 * i + j];
  }
  const ek_acts acts = {f32, bf16, q8, scales, sums, stride, stride, stride, stride / 32};
  for (int32_t format = EK_F32; format <= EK_Q8M; format++) {
    const int32_t group = format == EK_Q4Z ? 64 : 0;
    const ek_matrix matrix = {panels, format, ROWS - 3, MOST_COLS, group};
    fill(panels, ROWS / 16 * ek_panel_bytes(&matrix), format);
    for (int64_t row = 0; row < ROWS - 3; row += 7) {
      tested::matrix_row(&matrix, row, out);
      put("row", format, row, out, MOST_COLS);
    }
    const int64_t counts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 14, 17, 48, 60};
    for (int64_t tokens : counts) {
      memset(out, 0, MOST_TOKENS * ROWS * 4);
      const ek_linear linear = {&matrix, 1, EK_STORE, nullptr, &acts, out, ROWS, tokens};
      const int64_t items = tested::linear_items(&linear, 1);
      for (int64_t i = 0; i < items; i++) tested::linear_item(&linear, i, scratch);
      put("linear", format, tokens, out, MOST_TOKENS * ROWS);
    }
  }
  return 0;
}
