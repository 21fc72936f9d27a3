// simd.h on AArch64: four registers of four lanes. The byte dot product is one instruction with i8mm (Armv8.6), two
// with dotprod (Armv8.2), and multiplied out without either.
#pragma once
#include <arm_neon.h>

#define EK_VECTOR_REGISTERS 8
#define EK_BF16_DOT 0

typedef struct vf {
  float32x4_t v[4];
} vf;
typedef struct vi {
  int32x4_t v[4];
} vi;

#define EK_QUARTERS(i) for (int i = 0; i < 4; i++)

static inline vf vf_all(float x) {
  vf r;
  EK_QUARTERS(i) r.v[i] = vdupq_n_f32(x);
  return r;
}
static inline vf vf_zero() { return vf_all(0); }
static inline vf vf_load(const float* p) {
  vf r;
  EK_QUARTERS(i) r.v[i] = vld1q_f32(p + 4 * i);
  return r;
}
static inline void vf_store(float* p, vf a) { EK_QUARTERS(i) vst1q_f32(p + 4 * i, a.v[i]); }
static inline vf vf_load_n(const float* p, int n) {
  float x[16] = {0};
  memcpy(x, p, sizeof(float) * (unsigned)n);
  return vf_load(x);
}
static inline void vf_store_n(float* p, vf a, int n) {
  float x[16];
  vf_store(x, a);
  memcpy(p, x, sizeof(float) * (unsigned)n);
}

#define EK_EACH(name, expression)             \
  static inline vf name(vf a, vf b) {         \
    EK_QUARTERS(i) {                          \
      float32x4_t x = a.v[i], y = b.v[i];     \
      a.v[i] = (expression);                  \
    }                                         \
    return a;                                 \
  }
EK_EACH(vf_add, vaddq_f32(x, y))
EK_EACH(vf_sub, vsubq_f32(x, y))
EK_EACH(vf_mul, vmulq_f32(x, y))
EK_EACH(vf_div, vdivq_f32(x, y))
EK_EACH(vf_max, vbslq_f32(vcgtq_f32(x, y), x, y))  // b where either is NaN, as x86 has it
EK_EACH(vf_min, vbslq_f32(vcltq_f32(x, y), x, y))
#undef EK_EACH
static inline vf vf_abs(vf a) {
  EK_QUARTERS(i) a.v[i] = vabsq_f32(a.v[i]);
  return a;
}
static inline vf vf_fma(vf a, vf b, vf c) {
  EK_QUARTERS(i) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
  return c;
}
static inline float vf_sum(vf a) {
  return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3])));
}
static inline float vf_top(vf a) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[2]), vmaxq_f32(a.v[1], a.v[3])));
}
static inline vf vf_keep_n(vf a, int n, vf other) {
  static const int32_t lanes[4] = {0, 1, 2, 3};
  int32x4_t lane = vld1q_s32(lanes);
  EK_QUARTERS(i) a.v[i] = vbslq_f32(vcltq_s32(lane, vdupq_n_s32(n - 4 * i)), a.v[i], other.v[i]);
  return a;
}
static inline vf vf_drop_n(vf a, int n, vf other) { return vf_keep_n(other, n, a); }

// See simd_avx512.h.
static inline float32x4_t ek_exp(float32x4_t x) {
  float32x4_t low = vdupq_n_f32(-104.0f), high = vdupq_n_f32(89.0f);
  x = vminq_f32(vmaxq_f32(x, low), high);  // a NaN stays one
  float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 1.44269504088896341f));
  float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(0.693359375f));
  r = vfmsq_f32(r, n, vdupq_n_f32(-2.12194440e-4f));
  float32x4_t p = vdupq_n_f32(1.9875691500e-4f);
  p = vfmaq_f32(vdupq_n_f32(1.3981999507e-3f), p, r);
  p = vfmaq_f32(vdupq_n_f32(8.3334519073e-3f), p, r);
  p = vfmaq_f32(vdupq_n_f32(4.1665795894e-2f), p, r);
  p = vfmaq_f32(vdupq_n_f32(1.6666665459e-1f), p, r);
  p = vfmaq_f32(vdupq_n_f32(5.0000001201e-1f), p, r);
  p = vaddq_f32(vfmaq_f32(r, vmulq_f32(r, r), p), vdupq_n_f32(1.0f));
  int32x4_t whole = vcvtnq_s32_f32(n), half = vshrq_n_s32(whole, 1);
  int32x4_t bias = vdupq_n_s32(127);  // twice half the power: the result may be a denormal
  int32x4_t one = vshlq_n_s32(vaddq_s32(half, bias), 23);
  int32x4_t two = vshlq_n_s32(vaddq_s32(vsubq_s32(whole, half), bias), 23);
  return vmulq_f32(vmulq_f32(p, vreinterpretq_f32_s32(one)), vreinterpretq_f32_s32(two));
}
static inline vf vf_exp(vf x) {
  EK_QUARTERS(i) x.v[i] = ek_exp(x.v[i]);
  return x;
}

static inline vf vf_from_i32(vi a) {
  vf r;
  EK_QUARTERS(i) r.v[i] = vcvtq_f32_s32(a.v[i]);
  return r;
}
static inline vf vf_from_f16(const void* p) {
  vf r;
  EK_QUARTERS(i) r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p + 4 * i)));
  return r;
}
static inline vf vf_from_bf16(const void* p) {
  vf r;
  EK_QUARTERS(i) r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t*)p + 4 * i), 16));
  return r;
}
static inline vi vi_from_u8(const void* p) {
  uint8x16_t x = vld1q_u8((const uint8_t*)p);
  uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_u8(vget_high_u8(x));
  vi r;
  r.v[0] = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low)));
  r.v[1] = vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low)));
  r.v[2] = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high)));
  r.v[3] = vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)));
  return r;
}
static inline vi vi_from_i8(const void* p) {
  int8x16_t x = vld1q_s8((const int8_t*)p);
  int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_s8(vget_high_s8(x));
  vi r;
  r.v[0] = vmovl_s16(vget_low_s16(low));
  r.v[1] = vmovl_s16(vget_high_s16(low));
  r.v[2] = vmovl_s16(vget_low_s16(high));
  r.v[3] = vmovl_s16(vget_high_s16(high));
  return r;
}
static inline vf vf_from_u8(const void* p) { return vf_from_i32(vi_from_u8(p)); }
static inline vf vf_from_i8(const void* p) { return vf_from_i32(vi_from_i8(p)); }
static inline void vf_to_bf16(void* p, vf a) {
  EK_QUARTERS(i) {
    uint32x4_t bits = vreinterpretq_u32_f32(a.v[i]), high = vshrq_n_u32(bits, 16);
    uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
    uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    uint32x4_t number = vceqq_f32(a.v[i], a.v[i]);
    vst1_u16((uint16_t*)p + 4 * i, vmovn_u32(vbslq_u32(number, rounded, vorrq_u32(high, vdupq_n_u32(0x40)))));
  }
}
static inline void vf_to_f16(void* p, vf a) {
  EK_QUARTERS(i) vst1_u16((uint16_t*)p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
static inline void vf_to_i8(void* p, vf a) {
  EK_QUARTERS(i) {
    int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(a.v[i]));
    int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    vst1_lane_s32((int32_t*)p + i, vreinterpret_s32_s8(bytes), 0);
  }
}

static inline vi vi_all(int32_t x) {
  vi r;
  EK_QUARTERS(i) r.v[i] = vdupq_n_s32(x);
  return r;
}
static inline vi vi_zero() { return vi_all(0); }
static inline vi vi_all_bytes(uint8_t x) { return vi_all((int32_t)(x * 0x01010101u)); }
static inline vi vi_load(const void* p) {
  vi r;
  EK_QUARTERS(i) r.v[i] = vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)p + 16 * i));
  return r;
}
static inline void vi_store(void* p, vi a) {
  EK_QUARTERS(i) vst1q_u8((uint8_t*)p + 16 * i, vreinterpretq_u8_s32(a.v[i]));
}
#define EK_EACH(name, operation)                               \
  static inline vi name(vi a, vi b) {                          \
    EK_QUARTERS(i) a.v[i] = operation(a.v[i], b.v[i]);         \
    return a;                                                  \
  }
EK_EACH(vi_add, vaddq_s32)
EK_EACH(vi_sub, vsubq_s32)
EK_EACH(vi_mul, vmulq_s32)
EK_EACH(vi_and, vandq_s32)
EK_EACH(vi_or, vorrq_s32)
#undef EK_EACH
static inline vi vi_shl16(vi a, int n) {
  EK_QUARTERS(i) a.v[i] = vreinterpretq_s32_u16(vshlq_u16(vreinterpretq_u16_s32(a.v[i]), vdupq_n_s16((int16_t)n)));
  return a;
}
static inline vi vi_shr16(vi a, int n) { return vi_shl16(a, -n); }

// Bytes of w at most 127 are the same number with a sign.
static inline int32x4_t ek_dot7(int32x4_t acc, int32x4_t w, int32x4_t x) {
  int8x16_t a = vreinterpretq_s8_s32(w), b = vreinterpretq_s8_s32(x);
#ifdef __ARM_FEATURE_DOTPROD
  return vdotq_s32(acc, a, b);
#else  // two products are at most 127 * 127 + 127 * 128: they fit into a word
  int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_s8(vget_high_s8(a), vget_high_s8(b));
  return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}
static inline int32x4_t ek_dot(int32x4_t acc, int32x4_t w, int32x4_t x) {
#ifdef __ARM_FEATURE_MATMUL_INT8
  return vusdotq_s32(acc, vreinterpretq_u8_s32(w), vreinterpretq_s8_s32(x));
#else  // w = (w & 127) + 128 (w >> 7)
  int32x4_t top = vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(w), 7));
  acc = ek_dot7(acc, vandq_s32(w, vdupq_n_s32(0x7f7f7f7f)), x);
  return vaddq_s32(acc, vshlq_n_s32(ek_dot7(vdupq_n_s32(0), top, x), 7));
#endif
}
static inline vi vi_dot(vi acc, vi w, vi x) {
  EK_QUARTERS(i) acc.v[i] = ek_dot(acc.v[i], w.v[i], x.v[i]);
  return acc;
}
static inline vi vi_dot7(vi acc, vi w, vi x) {
  EK_QUARTERS(i) acc.v[i] = ek_dot7(acc.v[i], w.v[i], x.v[i]);
  return acc;
}
static inline vf vf_dot_bf16(vf acc, vi w, vi x) {
  EK_QUARTERS(i) {
    uint32x4_t a = vreinterpretq_u32_s32(w.v[i]), b = vreinterpretq_u32_s32(x.v[i]), high = vdupq_n_u32(0xffff0000);
    const float32x4_t a0 = vreinterpretq_f32_u32(vshlq_n_u32(a, 16)), b0 = vreinterpretq_f32_u32(vshlq_n_u32(b, 16));
    const float32x4_t a1 = vreinterpretq_f32_u32(vandq_u32(a, high)), b1 = vreinterpretq_f32_u32(vandq_u32(b, high));
    acc.v[i] = vfmaq_f32(vfmaq_f32(acc.v[i], a0, b0), a1, b1);
  }
  return acc;
}
static inline void i8_sums(const int8_t* p, int32_t* sums) {
  EK_QUARTERS(i) sums[i] = vaddlvq_s8(vld1q_s8(p + 16 * i));
}
static inline vi vi_spread(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return vi_all(x);
}
static inline vi vi_words_from_i8(const void* p) {
  const int8_t* at = (const int8_t*)p;
  vi r;
  EK_QUARTERS(i) r.v[i] = vreinterpretq_s32_s16(vmovl_s8(vld1_s8(at + 8 * i)));
  return r;
}
static inline vi vi_dot_words(vi acc, vi w, vi x) {
  EK_QUARTERS(i) {
    const int16x8_t a = vreinterpretq_s16_s32(w.v[i]), b = vreinterpretq_s16_s32(x.v[i]);
    acc.v[i] = vaddq_s32(acc.v[i], vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)));
  }
  return acc;
}
static inline void vf_to_i16(void* p, vf a) {
  EK_QUARTERS(i) vst1_s16((int16_t*)p + 4 * i, vqmovn_s32(vcvtnq_s32_f32(a.v[i])));
}
// Always inlined: gcc drops calls of functions that do nothing but prefetch.
__attribute__((always_inline)) static inline void prefetch(const void* p) { __builtin_prefetch(p); }
#undef EK_QUARTERS
