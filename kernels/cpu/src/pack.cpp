#include "pack.h"

#include <string.h>

#include "pool.h"

#define EK_EXPORT extern "C" __attribute__((visibility("default")))

ek_stored ek_stored_as(int32_t encoding, int32_t group) {
  switch (encoding) {
    case EK_ROWS_F32: return ek_stored{EK_F32, 1, 4};
    case EK_ROWS_F16: return ek_stored{EK_F16, 1, 2};
    case EK_ROWS_BF16: return ek_stored{EK_BF16, 1, 2};
    case EK_ROWS_Q4_0: return ek_stored{EK_Q4, 32, 18};
    case EK_ROWS_Q4_1: return ek_stored{EK_Q8M, 32, 20};
    case EK_ROWS_Q5_0: return ek_stored{EK_Q8, 32, 22};
    case EK_ROWS_Q5_1: return ek_stored{EK_Q8M, 32, 24};
    case EK_ROWS_Q8_0: return ek_stored{EK_Q8, 32, 34};
    case EK_ROWS_Q4_K: return ek_stored{EK_Q4K, 256, 144};
    case EK_ROWS_Q5_K: return ek_stored{EK_Q5K, 256, 176};
    case EK_ROWS_Q6_K: return ek_stored{EK_Q6K, 256, 210};
    case EK_ROWS_IQ4_NL: return ek_stored{EK_Q8, 32, 18};
    case EK_ROWS_IQ4_XS: return ek_stored{EK_Q8F, 256, 136};
    case EK_ROWS_MXFP4: return ek_stored{EK_Q8F, 32, 17};
    case EK_ROWS_AFFINE4:
      if (group == 32 || group == 64 || group == 128) return ek_stored{EK_Q4Z, group, 4 + group / 2};
      break;
  }
  return ek_stored{-1, 1, 0};
}

namespace {

struct packing {
  int32_t encoding;
  int32_t group;
  ek_stored stored;
  const uint8_t* raw;
  int64_t row_bytes;
  int64_t rows;
  const int64_t* dest_rows;
  const ek_matrix* out;
};

// Columns that are packed of all of an item's rows before the next: what they make of a panel stays in the first cache.
const int64_t COLS_AT_ONCE = EK_SUPER;

void pack_item(void* context, int64_t item, void*) {
  const packing* self = (const packing*)context;
  const ek_matrix* out = self->out;
  const ek_unit unit = ek_unit_of(out);
  const int64_t panel_bytes = ek_panel_bytes(out), first = item * EK_PANEL;
  const int64_t stop = first + EK_PANEL < self->rows ? first + EK_PANEL : self->rows;
  for (int64_t col = 0; col < out->cols; col += COLS_AT_ONCE) {
    const int64_t cols = out->cols - col < COLS_AT_ONCE ? out->cols - col : COLS_AT_ONCE;
    for (int64_t row = first; row < stop; row++) {
      const int64_t to = self->dest_rows[row];
      uint8_t* panel = (uint8_t*)const_cast<void*>(out->data) + to / EK_PANEL * panel_bytes;
      ek_pack_blocks(self->encoding, self->group,
                     self->raw + row * self->row_bytes + col / self->stored.block_cols * self->stored.block_bytes,
                     cols / self->stored.block_cols, panel + col / unit.cols * unit.bytes, (int)(to % EK_PANEL));
    }
  }
}

}  // namespace

// Row i of `raw` becomes row dest_rows[i] of `out`, whose memory is there and holds zeros (what is padded stays so).
EK_EXPORT int32_t ek_pack(void* pool, int32_t encoding, int32_t group, const void* raw, int64_t row_bytes, int64_t rows,
                          const int64_t* dest_rows, ek_matrix* out) {
  if (pool == nullptr || out == nullptr) return EK_ERROR_NULL;
  if (rows > 0 && (raw == nullptr || dest_rows == nullptr)) return EK_ERROR_NULL;
  const int32_t error = ek_matrix_check(out);
  if (error) return error;
  const ek_stored stored = ek_stored_as(encoding, group);
  if (stored.format < 0 || stored.format != out->format || (stored.format == EK_Q4Z && group != out->group)) {
    return EK_ERROR_KIND;
  }
  if (rows < 0 || out->cols % stored.block_cols) return EK_ERROR_SHAPE;
  if (row_bytes < (int64_t)out->cols / stored.block_cols * stored.block_bytes) return EK_ERROR_SHAPE;
  for (int64_t i = 0; i < rows; i++) {
    if (dest_rows[i] < 0 || dest_rows[i] >= out->rows) return EK_ERROR_SHAPE;
  }
  packing self = {encoding, group, stored, (const uint8_t*)raw, row_bytes, rows, dest_rows, out};
  return ek_pool_each((ek_pool*)pool, (rows + EK_PANEL - 1) / EK_PANEL, pack_item, &self);
}

namespace {

struct lookup {
  const ek_tier* tier;
  const ek_matrix* matrix;
  const int64_t* rows;
  float* out;
  int64_t stride;
};

void lookup_item(void* context, int64_t item, void*) {
  const lookup* self = (const lookup*)context;
  self->tier->matrix_row(self->matrix, self->rows[item], self->out + item * self->stride);
}

}  // namespace

// out[i] = row rows[i], in float32.
EK_EXPORT int32_t ek_matrix_rows(void* pool, const ek_matrix* matrix, const int64_t* rows, int64_t count, float* out,
                                 int64_t stride) {
  if (pool == nullptr || matrix == nullptr) return EK_ERROR_NULL;
  if (count > 0 && (rows == nullptr || out == nullptr)) return EK_ERROR_NULL;
  const int32_t error = ek_matrix_check(matrix);
  if (error) return error;
  if (count < 0) return EK_ERROR_SHAPE;
  for (int64_t i = 0; i < count; i++) {
    if (rows[i] < 0 || rows[i] >= matrix->rows) return EK_ERROR_SHAPE;
  }
  lookup self = {ek_pool_tier((ek_pool*)pool), matrix, rows, out, stride};
  return ek_pool_each((ek_pool*)pool, count, lookup_item, &self);
}
