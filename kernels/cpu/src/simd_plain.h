// simd.h in plain C: any machine, and the sanitizers. Loops over sixteen lanes that a compiler turns into what it has.
#pragma once

#define EK_VECTOR_REGISTERS 1
#define EK_BF16_DOT 0

typedef struct vf {
  float v[16];
} vf;
typedef struct vi {
  int32_t v[16];
} vi;

#define EK_LANES(i) for (int i = 0; i < 16; i++)

static inline vf vf_all(float x) {
  vf r;
  EK_LANES(i) r.v[i] = x;
  return r;
}
static inline vf vf_zero() { return vf_all(0); }
static inline vf vf_load(const float* p) {
  vf r;
  memcpy(&r, p, sizeof r);
  return r;
}
static inline void vf_store(float* p, vf a) { memcpy(p, &a, sizeof a); }
static inline vf vf_load_n(const float* p, int n) {
  vf r;
  EK_LANES(i) r.v[i] = i < n ? p[i] : 0;
  return r;
}
static inline void vf_store_n(float* p, vf a, int n) {
  for (int i = 0; i < n; i++) p[i] = a.v[i];
}

#define EK_EACH(name, expression)      \
  static inline vf name(vf a, vf b) {  \
    EK_LANES(i) a.v[i] = (expression); \
    return a;                          \
  }
EK_EACH(vf_add, a.v[i] + b.v[i])
EK_EACH(vf_sub, a.v[i] - b.v[i])
EK_EACH(vf_mul, a.v[i] * b.v[i])
EK_EACH(vf_div, a.v[i] / b.v[i])
EK_EACH(vf_max, a.v[i] > b.v[i] ? a.v[i] : b.v[i])  // b where either is NaN, as x86 has it
EK_EACH(vf_min, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
#undef EK_EACH
static inline vf vf_abs(vf a) {
  EK_LANES(i) a.v[i] = fabsf(a.v[i]);
  return a;
}
// Rounded once only where the machine does that quickly.
static inline float ek_fma(float a, float b, float c) {
#ifdef FP_FAST_FMAF
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
static inline vf vf_fma(vf a, vf b, vf c) {
  EK_LANES(i) c.v[i] = ek_fma(a.v[i], b.v[i], c.v[i]);
  return c;
}
static inline float vf_sum(vf a) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; i++) a.v[i] += a.v[i + half];
  return a.v[0];
}
static inline float vf_top(vf a) {
  for (int i = 1; i < 16; i++) a.v[0] = a.v[0] > a.v[i] ? a.v[0] : a.v[i];
  return a.v[0];
}
static inline vf vf_keep_n(vf a, int n, vf other) {
  EK_LANES(i) a.v[i] = i < n ? a.v[i] : other.v[i];
  return a;
}
static inline vf vf_drop_n(vf a, int n, vf other) { return vf_keep_n(other, n, a); }

static inline float ek_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static inline uint32_t ek_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// See simd_avx512.h.
static inline vf vf_exp(vf x) {
  EK_LANES(i) {
    if (x.v[i] != x.v[i]) continue;  // a NaN stays one
    float a = x.v[i] > -104.0f ? x.v[i] : -104.0f;
    a = a < 89.0f ? a : 89.0f;  // beyond what is promised; keeps n in a power's range
    float n = rintf(a * 1.44269504088896341f);
    float r = ek_fma(-n, 0.693359375f, a);
    r = ek_fma(-n, -2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = ek_fma(p, r, 1.3981999507e-3f);
    p = ek_fma(p, r, 8.3334519073e-3f);
    p = ek_fma(p, r, 4.1665795894e-2f);
    p = ek_fma(p, r, 1.6666665459e-1f);
    p = ek_fma(p, r, 5.0000001201e-1f);
    p = ek_fma(r * r, p, r) + 1.0f;
    int whole = (int)n, half = whole / 2;  // twice half the power: the result may be a denormal
    x.v[i] = p * ek_from_bits((uint32_t)(half + 127) << 23) * ek_from_bits((uint32_t)(whole - half + 127) << 23);
  }
  return x;
}

static inline float ek_from_f16(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return ek_from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x400) return ek_from_bits(sign | ek_to_bits((float)rest * 0x1p-24f));  // a denormal: rest / 2^24
  return ek_from_bits(sign | ((rest << 13) + (112u << 23)));
}
// To nearest even; a NaN stays a NaN.
static inline uint16_t ek_to_f16(float x) {
  uint32_t bits = ek_to_bits(x), sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and up round to infinity
  if (bits < 0x38800000)  // below 2^-14 the result is a denormal: the addition rounds it to a multiple of 2^-24
    return (uint16_t)(sign | (ek_to_bits(ek_from_bits(bits) + 0.5f) - 0x3f000000));
  return (uint16_t)(sign | (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13);
}
static inline uint16_t ek_to_bf16(float x) {
  uint32_t bits = ek_to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline vf vf_from_i32(vi a) {
  vf r;
  EK_LANES(i) r.v[i] = (float)a.v[i];
  return r;
}
#define EK_FROM(name, type, expression) \
  static inline vf name(const void* p) { \
    type x[16];                          \
    memcpy(x, p, sizeof x);              \
    vf r;                                \
    EK_LANES(i) r.v[i] = (expression);   \
    return r;                            \
  }
EK_FROM(vf_from_f16, uint16_t, ek_from_f16(x[i]))
EK_FROM(vf_from_bf16, uint16_t, ek_from_bits((uint32_t)x[i] << 16))
EK_FROM(vf_from_u8, uint8_t, (float)x[i])
EK_FROM(vf_from_i8, int8_t, (float)x[i])
#undef EK_FROM
static inline void vf_to_bf16(void* p, vf a) {
  uint16_t x[16];
  EK_LANES(i) x[i] = ek_to_bf16(a.v[i]);
  memcpy(p, x, sizeof x);
}
static inline void vf_to_f16(void* p, vf a) {
  uint16_t x[16];
  EK_LANES(i) x[i] = ek_to_f16(a.v[i]);
  memcpy(p, x, sizeof x);
}
static inline void vf_to_i8(void* p, vf a) {
  int8_t x[16];
  EK_LANES(i) {
    float r = rintf(a.v[i]);
    x[i] = (int8_t)(r >= 127 ? 127 : r > -128 ? r : -128);  // a NaN: -128
  }
  memcpy(p, x, sizeof x);
}

static inline vi vi_all(int32_t x) {
  vi r;
  EK_LANES(i) r.v[i] = x;
  return r;
}
static inline vi vi_zero() { return vi_all(0); }
static inline vi vi_all_bytes(uint8_t x) { return vi_all((int32_t)(x * 0x01010101u)); }
static inline vi vi_load(const void* p) {
  vi r;
  memcpy(&r, p, sizeof r);
  return r;
}
static inline void vi_store(void* p, vi a) { memcpy(p, &a, sizeof a); }

#define EK_EACH(name, expression)               \
  static inline vi name(vi a, vi b) {           \
    EK_LANES(i) a.v[i] = (int32_t)(expression); \
    return a;                                   \
  }
EK_EACH(vi_add, (uint32_t)a.v[i] + (uint32_t)b.v[i])
EK_EACH(vi_sub, (uint32_t)a.v[i] - (uint32_t)b.v[i])
EK_EACH(vi_mul, (uint32_t)a.v[i] * (uint32_t)b.v[i])
EK_EACH(vi_and, a.v[i] & b.v[i])
EK_EACH(vi_or, a.v[i] | b.v[i])
#undef EK_EACH
static inline vi vi_from_u8(const void* p) {
  uint8_t x[16];
  memcpy(x, p, sizeof x);
  vi r;
  EK_LANES(i) r.v[i] = x[i];
  return r;
}
static inline vi vi_from_i8(const void* p) {
  int8_t x[16];
  memcpy(x, p, sizeof x);
  vi r;
  EK_LANES(i) r.v[i] = x[i];
  return r;
}
static inline vi vi_shr16(vi a, int n) {
  uint16_t x[32];
  memcpy(x, &a, sizeof x);
  for (int i = 0; i < 32; i++) x[i] = (uint16_t)(x[i] >> n);
  return vi_load(x);
}
static inline vi vi_shl16(vi a, int n) {
  uint16_t x[32];
  memcpy(x, &a, sizeof x);
  for (int i = 0; i < 32; i++) x[i] = (uint16_t)(x[i] << n);
  return vi_load(x);
}

static inline vi vi_dot(vi acc, vi w, vi x) {
  uint8_t a[64];
  int8_t b[64];
  memcpy(a, &w, sizeof a);
  memcpy(b, &x, sizeof b);
  EK_LANES(i)
    acc.v[i] += a[4 * i] * b[4 * i] + a[4 * i + 1] * b[4 * i + 1] + a[4 * i + 2] * b[4 * i + 2] +
                a[4 * i + 3] * b[4 * i + 3];
  return acc;
}
static inline vi vi_dot7(vi acc, vi w, vi x) { return vi_dot(acc, w, x); }
static inline vf vf_dot_bf16(vf acc, vi w, vi x) {
  EK_LANES(i) {
    uint32_t a = (uint32_t)w.v[i], b = (uint32_t)x.v[i];
    acc.v[i] = ek_fma(ek_from_bits(a << 16), ek_from_bits(b << 16), acc.v[i]);
    acc.v[i] = ek_fma(ek_from_bits(a & 0xffff0000), ek_from_bits(b & 0xffff0000), acc.v[i]);
  }
  return acc;
}
static inline void i8_sums(const int8_t* p, int32_t* sums) {
  for (int i = 0; i < 64; i++) sums[i / 16] = (i % 16 ? sums[i / 16] : 0) + p[i];
}
static inline vi vi_spread(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return vi_all(x);
}
static inline vi vi_words_from_i8(const void* p) {
  int8_t x[32];
  int16_t words[32];
  memcpy(x, p, sizeof x);
  for (int i = 0; i < 32; i++) words[i] = x[i];
  return vi_load(words);
}
static inline vi vi_dot_words(vi acc, vi w, vi x) {
  int16_t a[32], b[32];
  memcpy(a, &w, sizeof a);
  memcpy(b, &x, sizeof b);
  EK_LANES(i) acc.v[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return acc;
}
static inline void vf_to_i16(void* p, vf a) {
  int16_t x[16];
  EK_LANES(i) {
    float r = rintf(a.v[i]);
    x[i] = (int16_t)(r >= 32767 ? 32767 : r > -32768 ? r : -32768);  // a NaN: -32768
  }
  memcpy(p, x, sizeof x);
}
static inline void prefetch(const void* p) { (void)p; }
#undef EK_LANES
