// What is done row by row: embedding, norms, activations prepared for linear layers, RoPE, soft-cap.
//
// Sums of a row go over 16 lanes in the order of its columns, so a row's result depends on nothing but the row.
#pragma once
#include "ek.h"
#include "matrix_row.h"
#include "simd.h"
#include "tanh.h"

namespace EK_TIER {

static inline int lanes(int64_t left) { return left < 16 ? (int)left : 16; }

// 1 / sqrt(mean of squares + eps)
static float inverse_rms(const float* x, int64_t width, float eps) {
  vf sums[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
  int64_t i = 0;
  for (; i + 64 <= width; i += 64) {
    for (int k = 0; k < 4; k++) {
      const vf a = vf_load(x + i + 16 * k);
      sums[k] = vf_fma(a, a, sums[k]);
    }
  }
  for (; i < width; i += 16) {
    const vf a = vf_load_n(x + i, lanes(width - i));
    sums[0] = vf_fma(a, a, sums[0]);
  }
  const float sum = vf_sum(vf_add(vf_add(sums[0], sums[1]), vf_add(sums[2], sums[3])));
  return 1.0f / sqrtf(sum / (float)width + eps);
}

// y = x factor weight; in place if wanted. No weight: ones.
static void scale_row(const float* x, float factor, const float* weight, float* y, int64_t width) {
  const vf factors = vf_all(factor);
  for (int64_t i = 0; i < width; i += 16) {
    const int n = lanes(width - i);
    vf a = vf_mul(vf_load_n(x + i, n), factors);
    if (weight != nullptr) a = vf_mul(a, vf_load_n(weight + i, n));
    vf_store_n(y + i, a, n);
  }
}

// ---------------------------------------------------------------------------------------------- prepared activations

// A row in int8: in groups of 32 the scale max |x| / 127, x / scale to nearest, and the sum of these. The last group is
// filled up with zeros.
static void to_q8(const float* x, int64_t width, int8_t* q, float* scales, int32_t* sums) {
  vf poison = vf_zero();  // becomes NaN where x has one, or an infinity: maximum and rounding would swallow it
  for (int64_t i = 0; i < width; i += 32) {
    const vf a = vf_load_n(x + i, lanes(width - i));
    const vf b = width - i > 16 ? vf_load_n(x + i + 16, lanes(width - i - 16)) : vf_zero();
    poison = vf_fma(a, vf_zero(), vf_fma(b, vf_zero(), poison));
    const float top = vf_top(vf_max(vf_abs(a), vf_abs(b)));
    const vf inverse = vf_all(top > 1e-30f ? 127.0f / top : 0.0f);
    vf_to_i8(q + i, vf_mul(a, inverse));
    vf_to_i8(q + i + 16, vf_mul(b, inverse));
    *scales++ = top / 127.0f;
    *sums++ = (int32_t)vf_sum(vf_add(vf_from_i8(q + i), vf_from_i8(q + i + 16)));
  }
  const float spoilt = vf_sum(poison);
  if (spoilt != spoilt) scales[-1] = spoilt;
}

// One row into the forms asked for, each filled up with zeros to whole 16 (q8: 32) columns.
static void prepare_row(const float* x, int64_t width, int32_t forms, const ek_acts* acts, int64_t row) {
  if (forms & EK_FORM_F32) {
    float* to = const_cast<float*>(acts->f32) + row * acts->f32_stride;
    for (int64_t i = 0; i < width; i += 16) vf_store(to + i, vf_load_n(x + i, lanes(width - i)));
  }
  if (forms & EK_FORM_BF16) {
    uint16_t* to = const_cast<uint16_t*>(acts->bf16) + row * acts->bf16_stride;
    for (int64_t i = 0; i < width; i += 16) vf_to_bf16(to + i, vf_load_n(x + i, lanes(width - i)));
  }
  if (forms & EK_FORM_Q8) {
    to_q8(x, width, const_cast<int8_t*>(acts->q8) + row * acts->q8_stride,
          const_cast<float*>(acts->q8_scale) + row * acts->group_stride,
          const_cast<int32_t*>(acts->q8_sum) + row * acts->group_stride);
  }
}

// ---------------------------------------------------------------------------------------------- RoPE

// cos and sin of position * frequency, the product in float32 as in edgekv/model/rope.py. In double from there on:
// reduced by multiples of pi / 2 in two parts (fdlibm's, the first of 33 bits), then Taylor's polynomials, below 1e-10
// on +-pi / 4. Positions up to millions keep float32's accuracy.
static void rope_row(float position, const float* frequencies, int64_t count, float scale, float* cosines, float* sines) {
  const double MAGIC = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, whose bits are the lowest
  for (int64_t i = 0; i < count; i++) {
    const double angle = (double)(position * frequencies[i]);
    const double shifted = angle * 0.63661977236758134308 + MAGIC;
    const double turns = shifted - MAGIC;
    int64_t quadrant;
    memcpy(&quadrant, &shifted, 8);
    const double r = (angle - turns * 1.57079632673412561417e+00) - turns * 6.07710050650619224932e-11;
    const double r2 = r * r;
    double s = -1.0 / 39916800;
    s = s * r2 + 1.0 / 362880;
    s = s * r2 - 1.0 / 5040;
    s = s * r2 + 1.0 / 120;
    s = s * r2 - 1.0 / 6;
    s = s * r2 * r + r;
    double c = -1.0 / 3628800;
    c = c * r2 + 1.0 / 40320;
    c = c * r2 - 1.0 / 720;
    c = c * r2 + 1.0 / 24;
    c = c * r2 - 0.5;
    c = c * r2 + 1.0;
    const bool swapped = quadrant & 1;
    const double sine = swapped ? c : s, cosine = swapped ? s : c;
    sines[i] = (float)(quadrant & 2 ? -sine : sine) * scale;
    cosines[i] = (float)((quadrant + 1) & 2 ? -cosine : cosine) * scale;
  }
}

// Pairs (x[i], x[i + half]) turned by the table's angles.
static void turn_head(float* x, int64_t half, const float* cosines, const float* sines) {
  for (int64_t i = 0; i < half; i += 16) {
    const int n = lanes(half - i);
    const vf a = vf_load_n(x + i, n), b = vf_load_n(x + half + i, n);
    const vf cosine = vf_load_n(cosines + i, n), sine = vf_load_n(sines + i, n);
    vf_store_n(x + i, vf_sub(vf_mul(a, cosine), vf_mul(b, sine)), n);
    vf_store_n(x + half + i, vf_fma(a, sine, vf_mul(b, cosine)), n);
  }
}

static void rope_heads(const ek_program* program, const ek_op* op, const ek_step* step, int64_t row) {
  const int64_t dim = program->head_dim, half = program->rope_dim / 2;
  float* x = step->buffers[op->src].data + row * step->buffers[op->src].stride;
  const float* cosines = nullptr;
  if (op->rope >= 0) cosines = step->rope_tables + (op->rope * step->batch->tokens + row) * dim;
  for (int64_t head = 0; head < program->heads + program->kv_heads; head++, x += dim) {
    const float* weight = head < program->heads ? op->weight : op->weight2;
    if (weight != nullptr) scale_row(x, inverse_rms(x, dim, op->eps), weight, x, dim);
    if (cosines != nullptr) turn_head(x, half, cosines, cosines + dim / 2);
  }
}

// ---------------------------------------------------------------------------------------------- one operation

static void norm_row(const ek_op* op, const ek_step* step, int64_t row, float* scratch) {
  const float* x = step->buffers[op->src].data + row * step->buffers[op->src].stride;
  float* y = scratch;
  if (op->dst >= 0) y = step->buffers[op->dst].data + row * step->buffers[op->dst].stride;
  scale_row(x, inverse_rms(x, op->width, op->eps), op->weight, y, op->width);
  prepare_row(y, op->width, op->forms, &step->prepared, row);
}

static void norm_add_row(const ek_op* op, const ek_step* step, int64_t row) {
  const float* x = step->buffers[op->src].data + row * step->buffers[op->src].stride;
  float* y = step->buffers[op->dst].data + row * step->buffers[op->dst].stride;
  const vf factors = vf_all(inverse_rms(x, op->width, op->eps));
  for (int64_t i = 0; i < op->width; i += 16) {
    const int n = lanes(op->width - i);
    vf a = vf_mul(vf_load_n(x + i, n), factors);
    if (op->weight != nullptr) a = vf_mul(a, vf_load_n(op->weight + i, n));
    vf_store_n(y + i, vf_add(vf_load_n(y + i, n), a), n);
  }
}

static void softcap_unit(const ek_op* op, const ek_buffer* target, int64_t unit) {
  const int64_t most = EK_SOFTCAP_PART, parts = (op->width + most - 1) / most;
  const int64_t begin = unit % parts * most, left = op->width - begin;
  float* x = target->data + unit / parts * target->stride + begin;
  const vf caps = vf_all(op->softcap), inverse = vf_all(1.0f / op->softcap);
  for (int64_t i = 0; i < (left < most ? left : most); i += 16) {
    const int n = lanes(left - i);
    vf_store_n(x + i, vf_mul(caps, tanh_of(vf_mul(vf_load_n(x + i, n), inverse))), n);
  }
}

// Units first .. stop - 1 of an operation: rows, but of a soft-cap EK_SOFTCAP_PART columns of a row.
static void rows(const ek_program* program, const ek_op* op, const ek_step* step, int64_t first, int64_t stop,
                 void* scratch) {
  const ek_buffer* source = op->src < 0 ? nullptr : &step->buffers[op->src];
  const ek_buffer* target = op->dst < 0 ? nullptr : &step->buffers[op->dst];
  for (int64_t unit = first; unit < stop; unit++) {
    switch (op->kind) {
      case EK_OP_EMBED: {
        float* y = target->data + unit * target->stride;
        matrix_row(op->parts, step->batch->token_ids[unit], y);
        if (op->scale != 1.0f) scale_row(y, op->scale, nullptr, y, op->width);
        break;
      }
      case EK_OP_ROPE_TABLE: {
        float* table = step->rope_tables + (op->rope * step->batch->tokens + unit) * program->head_dim;
        const float position = (float)step->batch->positions[unit];
        rope_row(position, op->weight, op->width, op->scale, table, table + program->head_dim / 2);
        break;
      }
      case EK_OP_NORM: norm_row(op, step, unit, (float*)scratch); break;
      case EK_OP_NORM_ADD: norm_add_row(op, step, unit); break;
      case EK_OP_PREPARE:
        prepare_row(source->data + unit * source->stride, op->width, op->forms, &step->prepared, unit);
        break;
      case EK_OP_ROPE_APPEND: rope_heads(program, op, step, unit); break;
      case EK_OP_SOFTCAP: softcap_unit(op, target, unit); break;
      case EK_OP_GATHER:
        memcpy(target->data + unit * target->stride, source->data + step->batch->sample_rows[unit] * source->stride,
               op->width * sizeof(float));
        break;
    }
  }
}

}  // namespace EK_TIER
