// Every function of simd.h on random numbers; test_simd.py compares what each instruction set makes of the same ones.
#include "simd.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static uint64_t state;

static uint32_t draw() {  // Knuth's MMIX
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return (uint32_t)(state >> 32);
}

static float draw_float(float most) { return ((float)(int32_t)draw() / 2147483648.0f) * most; }

static void put(const char* name, const void* bytes, int count) {
  printf("%s", name);
  for (int i = 0; i < count; i++) printf("%s%02x", i % 4 ? "" : " ", ((const uint8_t*)bytes)[i]);
  printf("\n");
}

static void put(const char* name, vf a) {
  float x[16];
  vf_store(x, a);
  put(name, x, 64);
}

static void put(const char* name, vi a) {
  uint8_t x[64];
  vi_store(x, a);
  put(name, x, 64);
}

static void put(const char* name, float a) { put(name, &a, 4); }

static void float_cases(const float* x, const float* y, const float* z, int n) {
  const vf a = vf_load(x), b = vf_load(y), c = vf_load(z);
  put("zero", vf_zero());
  put("all", vf_all(x[3]));
  put("load_n", vf_load_n(x, n));
  float some[16] = {0};
  vf_store_n(some, a, n);
  put("store_n", some, 64);
  put("add", vf_add(a, b));
  put("sub", vf_sub(a, b));
  put("mul", vf_mul(a, b));
  put("div", vf_div(a, b));
  put("max", vf_max(a, b));
  put("min", vf_min(a, b));
  put("abs", vf_abs(a));
  put("fma", vf_fma(a, b, c));
  put("keep_n", vf_keep_n(a, n, b));
  put("drop_n", vf_drop_n(a, n, b));
  put("top", vf_top(a));
  put("exp", vf_exp(a));
  put("exp_of_0", vf_exp(vf_zero()));
  float whole[16];  // no rounding: the order of the sum is free
  for (int i = 0; i < 16; i++) whole[i] = (float)(int)(x[i] * 10);
  put("sum", vf_sum(vf_load(whole)));
  uint8_t bytes[32] = {0};
  vf_to_bf16(bytes, a);
  put("to_bf16", bytes, 32);
  vf_to_f16(bytes, a);
  put("to_f16", bytes, 32);
  memset(bytes, 0, 32);
  vf_to_i8(bytes, vf_mul(a, vf_all(2)));
  put("to_i8", bytes, 16);
  vf_to_i8(bytes, vf_load(whole));
  put("whole_to_i8", bytes, 16);
}

static void byte_cases(const uint8_t* p, const uint8_t* q) {
  const vi a = vi_load(p), b = vi_load(q), seven = vi_and(a, vi_all_bytes(127));
  put("from_i32", vf_from_i32(a));
  put("from_u8", vf_from_u8(p));
  put("from_i8", vf_from_i8(p));
  put("vi_from_u8", vi_from_u8(p));
  put("vi_from_i8", vi_from_i8(p));
  put("vi_zero", vi_zero());
  put("vi_all", vi_all(-5));
  put("vi_add", vi_add(a, b));
  put("vi_sub", vi_sub(a, b));
  put("vi_mul", vi_mul(a, b));
  put("vi_and", vi_and(a, b));
  put("vi_or", vi_or(a, b));
  put("shr0", vi_shr16(a, 0));
  put("shr3", vi_shr16(a, 3));
  put("shl0", vi_shl16(a, 0));
  put("shl4", vi_shl16(a, 4));
  put("dot", vi_dot(vi_all(7), a, b));
  put("dot7", vi_dot7(vi_all(-7), seven, b));
  put("dot_extremes", vi_dot(vi_dot(vi_zero(), vi_all_bytes(255), vi_all_bytes(0x80)), vi_all_bytes(255), b));
  put("spread", vi_spread(p + 8));
  int32_t sums[4];
  i8_sums((const int8_t*)p, sums);
  put("i8_sums", sums, 16);
  prefetch(p);
}

// Halves without infinities and NaN.
static void half_cases(const uint8_t* p) {
  uint16_t halves[16];
  memcpy(halves, p, 32);
  for (int i = 0; i < 16; i++) halves[i] &= 0xBFFF;
  put("from_f16", vf_from_f16(halves));
  put("from_bf16", vf_from_bf16(halves));
}

static void pair_cases(const float* x, const float* y) {
  uint16_t w[32], b[32];
  vf_to_bf16(w, vf_load(x));
  vf_to_bf16(w + 16, vf_load(y));
  vf_to_bf16(b, vf_load(y));
  vf_to_bf16(b + 16, vf_load(x));
  float sums[16];
  vf_store(sums, vf_dot_bf16(vf_load(x), vi_load(w), vi_load(b)));
  // How an instruction rounds the two products is its own affair.
  for (int i = 0; i < 16; i++) sums[i] = (float)(int)(sums[i] * 64);
  put("dot_bf16", sums, 64);
}

int main(int count, char** values) {
  state = count > 1 ? strtoull(values[1], nullptr, 10) : 0;
  for (int round = 0; round < 50; round++) {
    float x[16], y[16], z[16];
    uint8_t p[64], q[64];
    for (int i = 0; i < 16; i++) {
      x[i] = draw_float(87);
      y[i] = draw_float(3);
      z[i] = draw_float(1000);
    }
    for (int i = 0; i < 64; i++) {
      p[i] = (uint8_t)draw();
      q[i] = (uint8_t)draw();
    }
    float_cases(x, y, z, round % 17);
    byte_cases(p, q);
    half_cases(p);
    for (int i = 0; i < 16; i++) x[i] = (float)((int)x[i] % 16), y[i] = (float)(int)y[i];
    pair_cases(x, y);
  }
  // What rounds up to infinity, stays a denormal or becomes 0 in float16; in bfloat16 no denormals: some flush them.
  const float special[16] = {INFINITY, -INFINITY, 65519.0f, 65520.0f, 1e30f,   6e-8f,   2.9e-8f, -3e-8f,
                             6.1e-5f,  -0.0f,     3e38f,    0.5f,     1.0019f, -127.5f, 2e-38f,  -65504.0f};
  uint8_t halves[32];
  vf_to_f16(halves, vf_load(special));
  put("special_to_f16", halves, 32);
  put("special_from_f16", vf_from_f16(halves));
  vf_to_bf16(halves, vf_load(special));
  put("special_to_bf16", halves, 32);
  float bits[16];
  vf_to_bf16(halves, vf_all(NAN));
  vf_store(bits, vf_from_bf16(halves));
  put("nan_to_bf16", bits[0] != bits[0] ? "nan" : "not", 3);
  vf_store(bits, vf_max(vf_all(NAN), vf_all(2)));  // x86 answers the second where either is NaN
  put("nan_max", bits, 64);
  vf_store(bits, vf_min(vf_all(NAN), vf_all(2)));
  put("nan_min", bits, 64);
  return 0;
}
