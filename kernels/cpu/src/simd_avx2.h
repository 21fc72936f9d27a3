// simd.h on AVX2 with FMA and F16C: two registers of eight lanes. With AVX-VNNI (Alder Lake, Zen 5) the byte dot
// product is one instruction here too.
#pragma once
#include <immintrin.h>

#define EK_VECTOR_REGISTERS 8
#define EK_BF16_DOT 0

typedef struct vf {
  __m256 lo, hi;
} vf;
typedef struct vi {
  __m256i lo, hi;
} vi;

static inline vf ek_vf(__m256 lo, __m256 hi) {
  vf r = {lo, hi};
  return r;
}
static inline vi ek_vi(__m256i lo, __m256i hi) {
  vi r = {lo, hi};
  return r;
}
// All ones in the first n lanes of lanes first .. first + 7.
static inline __m256i ek_first(int n, int first) {
  __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
}

static inline vf vf_all(float x) { return ek_vf(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
static inline vf vf_zero() { return ek_vf(_mm256_setzero_ps(), _mm256_setzero_ps()); }
static inline vf vf_load(const float* p) { return ek_vf(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
static inline void vf_store(float* p, vf a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
static inline vf vf_load_n(const float* p, int n) {
  return ek_vf(_mm256_maskload_ps(p, ek_first(n, 0)), _mm256_maskload_ps(p + 8, ek_first(n, 8)));
}
static inline void vf_store_n(float* p, vf a, int n) {
  _mm256_maskstore_ps(p, ek_first(n, 0), a.lo);
  _mm256_maskstore_ps(p + 8, ek_first(n, 8), a.hi);
}
static inline vf vf_add(vf a, vf b) { return ek_vf(_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)); }
static inline vf vf_sub(vf a, vf b) { return ek_vf(_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)); }
static inline vf vf_mul(vf a, vf b) { return ek_vf(_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)); }
static inline vf vf_div(vf a, vf b) { return ek_vf(_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)); }
static inline vf vf_max(vf a, vf b) { return ek_vf(_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)); }
static inline vf vf_min(vf a, vf b) { return ek_vf(_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)); }
static inline vf vf_abs(vf a) {
  __m256 sign = _mm256_set1_ps(-0.0f);
  return ek_vf(_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi));
}
static inline vf vf_fma(vf a, vf b, vf c) {
  return ek_vf(_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi));
}
static inline float vf_sum(vf a) {
  __m256 s = _mm256_add_ps(a.lo, a.hi);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
static inline float vf_top(vf a) {
  __m256 s = _mm256_max_ps(a.lo, a.hi);
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
static inline vf vf_keep_n(vf a, int n, vf other) {
  return ek_vf(_mm256_blendv_ps(other.lo, a.lo, _mm256_castsi256_ps(ek_first(n, 0))),
               _mm256_blendv_ps(other.hi, a.hi, _mm256_castsi256_ps(ek_first(n, 8))));
}
static inline vf vf_drop_n(vf a, int n, vf other) { return vf_keep_n(other, n, a); }

// See simd_avx512.h.
static inline __m256 ek_exp(__m256 x) {
  x = _mm256_min_ps(_mm256_set1_ps(89.0f), _mm256_max_ps(_mm256_set1_ps(-104.0f), x));
  __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                             _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_add_ps(_mm256_fmadd_ps(_mm256_mul_ps(r, r), p, r), _mm256_set1_ps(1.0f));
  __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  __m256i bias = _mm256_set1_epi32(127);  // twice half the power: the result may be a denormal
  __m256i one = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  __m256i two = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(one)), _mm256_castsi256_ps(two));
}
static inline vf vf_exp(vf x) { return ek_vf(ek_exp(x.lo), ek_exp(x.hi)); }

static inline vf vf_from_i32(vi a) { return ek_vf(_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)); }
static inline vf vf_from_f16(const void* p) {
  const __m128i* at = (const __m128i*)p;
  return ek_vf(_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1)));
}
static inline vf vf_from_bf16(const void* p) {
  const __m128i* at = (const __m128i*)p;
  return ek_vf(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), 16)),
               _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at + 1)), 16)));
}
static inline vi vi_from_u8(const void* p) {
  __m128i x = _mm_loadu_si128((const __m128i*)p);
  return ek_vi(_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)));
}
static inline vi vi_from_i8(const void* p) {
  __m128i x = _mm_loadu_si128((const __m128i*)p);
  return ek_vi(_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)));
}
static inline vf vf_from_u8(const void* p) { return vf_from_i32(vi_from_u8(p)); }
static inline vf vf_from_i8(const void* p) { return vf_from_i32(vi_from_i8(p)); }

// 8 values to the bits of bf16, to nearest even, one in each 32-bit lane; a NaN becomes a quiet one.
static inline __m256i ek_round_bf16(__m256 a) {
  __m256i bits = _mm256_castps_si256(a);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i nan = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, nan, is_nan);
}
static inline void vf_to_bf16(void* p, vf a) {
  __m256i both = _mm256_packus_epi32(ek_round_bf16(a.lo), ek_round_bf16(a.hi));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(both, 0xd8));
}
static inline void vf_to_f16(void* p, vf a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128((__m128i*)p + 1, _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void vf_to_i8(void* p, vf a) {
  __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
  words = _mm256_permute4x64_epi64(words, 0xd8);
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128((__m128i*)p, bytes);
}

static inline vi vi_zero() { return ek_vi(_mm256_setzero_si256(), _mm256_setzero_si256()); }
static inline vi vi_all(int32_t x) { return ek_vi(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
static inline vi vi_all_bytes(uint8_t x) { return ek_vi(_mm256_set1_epi8((char)x), _mm256_set1_epi8((char)x)); }
static inline vi vi_load(const void* p) {
  return ek_vi(_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1));
}
static inline void vi_store(void* p, vi a) {
  _mm256_storeu_si256((__m256i*)p, a.lo);
  _mm256_storeu_si256((__m256i*)p + 1, a.hi);
}
static inline vi vi_add(vi a, vi b) { return ek_vi(_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)); }
static inline vi vi_sub(vi a, vi b) { return ek_vi(_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)); }
static inline vi vi_mul(vi a, vi b) { return ek_vi(_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)); }
static inline vi vi_and(vi a, vi b) { return ek_vi(_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)); }
static inline vi vi_or(vi a, vi b) { return ek_vi(_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)); }
static inline vi vi_shr16(vi a, int n) { return ek_vi(_mm256_srli_epi16(a.lo, n), _mm256_srli_epi16(a.hi, n)); }
static inline vi vi_shl16(vi a, int n) { return ek_vi(_mm256_slli_epi16(a.lo, n), _mm256_slli_epi16(a.hi, n)); }

#ifdef __AVXVNNI__
static inline vi vi_dot(vi acc, vi w, vi x) {
  return ek_vi(_mm256_dpbusd_avx_epi32(acc.lo, w.lo, x.lo), _mm256_dpbusd_avx_epi32(acc.hi, w.hi, x.hi));
}
static inline vi vi_dot7(vi acc, vi w, vi x) { return vi_dot(acc, w, x); }
#else
// vpmaddubsw saturates sums of two products at 32767 (255 * 127 * 2 is twice that), so bytes become words first.
static inline __m256i ek_dot(__m256i acc, __m256i w, __m256i x) {
  __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)),
                                   _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
static inline vi vi_dot(vi acc, vi w, vi x) { return ek_vi(ek_dot(acc.lo, w.lo, x.lo), ek_dot(acc.hi, w.hi, x.hi)); }
static inline __m256i ek_dot7(__m256i acc, __m256i w, __m256i x) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
static inline vi vi_dot7(vi acc, vi w, vi x) { return ek_vi(ek_dot7(acc.lo, w.lo, x.lo), ek_dot7(acc.hi, w.hi, x.hi)); }
#endif

static inline __m256 ek_dot_bf16(__m256 acc, __m256i w, __m256i x) {
  __m256i high = _mm256_set1_epi32((int)0xffff0000);
  const __m256 w0 = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), x0 = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  const __m256 w1 = _mm256_castsi256_ps(_mm256_and_si256(w, high)), x1 = _mm256_castsi256_ps(_mm256_and_si256(x, high));
  return _mm256_fmadd_ps(w1, x1, _mm256_fmadd_ps(w0, x0, acc));
}
static inline vf vf_dot_bf16(vf acc, vi w, vi x) {
  return ek_vf(ek_dot_bf16(acc.lo, w.lo, x.lo), ek_dot_bf16(acc.hi, w.hi, x.hi));
}
static inline void i8_sums(const int8_t* p, int32_t* sums) {
  for (int i = 0; i < 2; i++) {
    __m256i bytes = _mm256_loadu_si256((const __m256i*)p + i);
    bytes = _mm256_xor_si256(bytes, _mm256_set1_epi8((char)0x80));  // plus 128 each
    __m256i eights = _mm256_sad_epu8(bytes, _mm256_setzero_si256());
    eights = _mm256_add_epi64(eights, _mm256_bsrli_epi128(eights, 8));
    sums[2 * i] = _mm256_extract_epi32(eights, 0) - 16 * 128;
    sums[2 * i + 1] = _mm256_extract_epi32(eights, 4) - 16 * 128;
  }
}
static inline vi vi_spread(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return vi_all(x);
}
static inline vi vi_words_from_i8(const void* p) {
  const __m128i* at = (const __m128i*)p;
  return ek_vi(_mm256_cvtepi8_epi16(_mm_loadu_si128(at)), _mm256_cvtepi8_epi16(_mm_loadu_si128(at + 1)));
}
static inline vi vi_dot_words(vi acc, vi w, vi x) {
  return ek_vi(_mm256_add_epi32(acc.lo, _mm256_madd_epi16(w.lo, x.lo)),
               _mm256_add_epi32(acc.hi, _mm256_madd_epi16(w.hi, x.hi)));
}
static inline void vf_to_i16(void* p, vf a) {
  __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(words, 0xd8));
}
// Always inlined: gcc drops calls of functions that do nothing but prefetch.
__attribute__((always_inline)) static inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
