// What comes after y = W x: bias, and how y gets into the output.
#pragma once
#include "linear_cut.h"

namespace EK_TIER {

// What an item works on: panels first_panel .. + num_panels - 1 of a part, and tokens alike.
struct work {
  const ek_linear* linear;
  const ek_matrix* part;
  int64_t panel_bytes;
  int64_t first_panel;
  int64_t num_panels;
  int64_t first_token;
  int64_t num_tokens;
  tiling tiles;
  float* sums;  // [num_tokens][sums_stride]
  int64_t sums_stride;
  int32_t* starts;  // int_tokens.start of a block
};

// The logistic function times x; exp(88) is still a float.
static inline vf silu(vf x) {
  const vf e = vf_exp(vf_min(vf_sub(vf_zero(), x), vf_all(88.0f)));
  return vf_div(x, vf_add(vf_all(1.0f), e));
}

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3)
static inline vf gelu(vf x) {
  const vf cube = vf_mul(vf_mul(x, x), x);
  const vf exponent = vf_mul(vf_fma(cube, vf_all(0.044715f), x), vf_all(-1.5957691216057308f));
  return vf_div(x, vf_add(vf_all(1.0f), vf_exp(vf_min(exponent, vf_all(88.0f)))));
}

// One token. Panels alternate gate, up.
static void finish_gated(const work* k, const float* y, const float* bias, float* out) {
  const bool is_silu = k->linear->epilogue == EK_SILU_MUL;
  for (int64_t p = 0; p < k->num_panels; p += 2, y += 32, out += 16) {
    vf gate = vf_load(y), up = vf_load(y + 16);
    if (bias != nullptr) {
      gate = vf_add(gate, vf_load(bias + 16 * p));
      up = vf_add(up, vf_load(bias + 16 * p + 16));
    }
    vf_store(out, vf_mul(is_silu ? silu(gate) : gelu(gate), up));
  }
}

static void finish_plain(const work* k, const float* y, const float* bias, float* out) {
  for (int64_t p = 0; p < k->num_panels; p++, y += 16, out += 16) {
    const int n = (int)least(EK_PANEL, k->part->rows - EK_PANEL * (k->first_panel + p));
    vf a = vf_load(y);
    if (bias != nullptr) a = vf_add(a, vf_load_n(bias + 16 * p, n));
    if (k->linear->epilogue == EK_ADD) a = vf_add(vf_load_n(out, n), a);
    vf_store_n(out, a, n);
  }
}

// `first_row`: rows of the parts before.
static void finish(const work* k, int64_t first_row) {
  const ek_linear* linear = k->linear;
  const int64_t row = first_row + EK_PANEL * k->first_panel;
  const float* bias = linear->bias == nullptr ? nullptr : linear->bias + row;
  for (int64_t t = 0; t < k->num_tokens; t++) {
    const float* y = k->sums + t * k->sums_stride;
    float* out = linear->out + (k->first_token + t) * linear->out_stride;
    if (is_gated(linear)) {
      finish_gated(k, y, bias, out + row / 2);
    } else {
      finish_plain(k, y, bias, out + row);
    }
  }
}

}  // namespace EK_TIER
