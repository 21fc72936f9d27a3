// What becomes of y = W x: bias, and how it gets into the output.
#pragma once
#include "gemm/numbers.h"

// The numbers are those of the CPU's kernels. Of a gated matrix the first half of the rows is the gate, the second what
// it gates, and the output has half as many columns.
constexpr int EK_STORE = 0, EK_ADD = 1, EK_SILU_MUL = 2, EK_GELU_MUL = 3;

struct EkFinish {
  void* out;          // [tokens][stride], EK_OUT
  const float* bias;  // [rows of the matrix], or null
  i64 stride;         // elements
  int tokens, epilogue;
};
static_assert(sizeof(EkFinish) == 32, "the mirror in Python has the same");

EK_DEV bool ek_is_gated(const EkFinish& f) { return f.epilogue >= EK_SILU_MUL; }
EK_DEV int ek_columns(const EkFinish& f, int rows) { return ek_is_gated(f) ? rows >> 1 : rows; }

// x / (1 + exp(-x))
EK_DEV float ek_silu(float x) { return x * ek_rcp(1.0f + ek_exp2(x * -1.4426950408889634f)); }

// The tanh form: 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
EK_DEV float ek_gelu(float x) {
  const float u = ek_fma(x * x * x, 0.044715f, x);
  return x * ek_rcp(1.0f + ek_exp2(u * -2.3022081985f));  // 2 sqrt(2 / pi) / ln 2
}

// `y` is that of row `column`; of a gated matrix the gate, and `up` is that of row `columns + column`.
EK_DEV void ek_finish(const EkFinish& f, int columns, int token, int column, float y, float up) {
  const i64 at = (i64)token * f.stride + column;
  if (f.bias != nullptr) y += f.bias[column];
  if (ek_is_gated(f)) {
    if (f.bias != nullptr) up += f.bias[columns + column];
    y = (f.epilogue == EK_SILU_MUL ? ek_silu(y) : ek_gelu(y)) * up;
  } else if (f.epilogue == EK_ADD) {
    y += ek_load<EK_OUT>(f.out, at);
  }
  ek_store<EK_OUT>(f.out, at, y);
}
