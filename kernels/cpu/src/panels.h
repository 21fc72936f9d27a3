// The layouts of ek.h in numbers: where things lie in a unit, the columns after which a panel's layout repeats.
#pragma once
#include "ek.h"

// Bytes from the beginning of a unit.
enum {
  EK_Q8_D = 512,       // and of Q8F, Q8M
  EK_Q8M_M = 544,
  EK_Q4_D = 256,
  EK_K_D = 0,          // Q4K, Q5K
  EK_K_DMIN = 32,
  EK_K_SC = 64,
  EK_K_M = 192,
  EK_K_Q = 320,
  EK_Q5K_H = EK_K_Q + 8 * 256,
  EK_Q6K_SC = 32,
  EK_Q6K_Q = 288,      // of a group 256 bytes of low halves, then 128 of the bits above them
  EK_Q6K_GROUP = 384,
};

typedef struct ek_unit {
  int64_t cols;
  int64_t bytes;  // in a panel
} ek_unit;

static inline ek_unit ek_unit_of(const ek_matrix* matrix) {
  switch (matrix->format) {
    case EK_F32: return ek_unit{1, 64};
    case EK_F16: return ek_unit{1, 32};
    case EK_BF16: return ek_unit{2, 64};
    case EK_Q8: return ek_unit{EK_GROUP, EK_Q8_D + 32};
    case EK_Q8F: return ek_unit{EK_GROUP, EK_Q8_D + 64};
    case EK_Q8M: return ek_unit{EK_GROUP, EK_Q8M_M + 32};
    case EK_Q4: return ek_unit{EK_GROUP, EK_Q4_D + 32};
    case EK_Q4Z: return ek_unit{matrix->group, 8ll * matrix->group + 48};
    case EK_Q4K: return ek_unit{EK_SUPER, EK_Q5K_H};
    case EK_Q5K: return ek_unit{EK_SUPER, EK_Q5K_H + 8 * 64};
    default: return ek_unit{EK_SUPER, EK_Q6K_Q + 8 * EK_Q6K_GROUP};
  }
}

// EK_OK, or what is wrong with a matrix. Asked before its panels are: a group of none would be divided by.
static inline int32_t ek_matrix_check(const ek_matrix* matrix) {
  if (matrix->data == nullptr) return EK_ERROR_NULL;
  if (matrix->format < EK_F32 || matrix->format > EK_Q8M) return EK_ERROR_KIND;
  const int32_t group = matrix->group;
  const bool fits = matrix->format == EK_Q4Z ? group == 32 || group == 64 || group == 128 : group == 0;
  if (!fits || matrix->rows < 1 || matrix->cols < 1) return EK_ERROR_SHAPE;
  return matrix->format != EK_BF16 && matrix->cols % ek_unit_of(matrix).cols ? EK_ERROR_SHAPE : EK_OK;
}

static inline int64_t ek_panel_bytes(const ek_matrix* matrix) {
  const ek_unit unit = ek_unit_of(matrix);
  return (matrix->cols + unit.cols - 1) / unit.cols * unit.bytes;
}
