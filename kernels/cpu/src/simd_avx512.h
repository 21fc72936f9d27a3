// simd.h on AVX-512 (F, BW, DQ, VL) with BF16 and VNNI: Zen 4 and later, Sapphire Rapids and later.
#pragma once
#include <immintrin.h>

#define EK_VECTOR_REGISTERS 32
#define EK_BF16_DOT 1  // vf_dot_bf16 is one instruction

typedef __m512 vf;
typedef __m512i vi;

static inline vf vf_zero() { return _mm512_setzero_ps(); }
static inline vf vf_all(float x) { return _mm512_set1_ps(x); }
static inline vf vf_load(const float* p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float* p, vf a) { _mm512_storeu_ps(p, a); }
// The first n (0 .. 16) lanes; the others read as 0 and are not written.
static inline vf vf_load_n(const float* p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
static inline void vf_store_n(float* p, vf a, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vf_abs(vf a) { return _mm512_abs_ps(a); }
// a b + c, rounded once.
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }
static inline float vf_top(vf a) { return _mm512_reduce_max_ps(a); }
// Lanes from n on replaced by `other`.
static inline vf vf_keep_n(vf a, int n, vf other) { return _mm512_mask_blend_ps((__mmask16)((1u << n) - 1), other, a); }
// Lanes before n replaced by `other`.
static inline vf vf_drop_n(vf a, int n, vf other) { return _mm512_mask_blend_ps((__mmask16)((1u << n) - 1), a, other); }

// exp, relative error below 2e-7 (denormal results: below 1e-44 absolute); at most 88; exactly 1 at 0. Cephes'
// reduction and polynomial of degree 6.
static inline vf vf_exp(vf x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // -inf would become NaN; x comes last, so that its NaN stays
  vf n = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
  n = _mm512_roundscale_ps(n, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  vf r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  vf p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(r, r), p, r), _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

static inline vf vf_from_i32(vi a) { return _mm512_cvtepi32_ps(a); }
static inline vf vf_from_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline vf vf_from_bf16(const void* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline vf vf_from_u8(const void* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
static inline vf vf_from_i8(const void* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
// 16 values to 32 bytes, to nearest even; a NaN stays a NaN.
static inline void vf_to_bf16(void* p, vf a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a)); }
static inline void vf_to_f16(void* p, vf a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// 16 values to nearest even and to 16 bytes, clamped to int8.
static inline void vf_to_i8(void* p, vf a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a)));
}

static inline vi vi_zero() { return _mm512_setzero_si512(); }
static inline vi vi_all(int32_t x) { return _mm512_set1_epi32(x); }
static inline vi vi_all_bytes(uint8_t x) { return _mm512_set1_epi8((char)x); }
static inline vi vi_load(const void* p) { return _mm512_loadu_si512(p); }
static inline void vi_store(void* p, vi a) { _mm512_storeu_si512(p, a); }
static inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
static inline vi vi_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
static inline vi vi_from_u8(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline vi vi_from_i8(const void* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
static inline vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
// Every 16-bit half shifted right (left), zeros in: mask off what crosses from the neighbouring byte.
#define vi_shr16(a, n) _mm512_srli_epi16(a, n)
#define vi_shl16(a, n) _mm512_slli_epi16(a, n)

// acc[lane] += sum of the lane's four (unsigned w) * (signed x). x: four int8 in one int32, the same for every lane.
static inline vi vi_dot(vi acc, vi w, vi x) { return _mm512_dpbusd_epi32(acc, w, x); }
// The same where no byte of w is above 127: cheaper on machines without such an instruction.
static inline vi vi_dot7(vi acc, vi w, vi x) { return vi_dot(acc, w, x); }
// acc[lane] += the lane's pair of bf16 in w times the pair in x (denormals count as 0).
static inline vf vf_dot_bf16(vf acc, vi w, vi x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
// Sums of each 16 of 64 int8.
static inline void i8_sums(const int8_t* p, int32_t* sums) {
  const __m512i bytes = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8((char)0x80));  // plus 128 each
  __m512i eights = _mm512_sad_epu8(bytes, _mm512_setzero_si512());
  eights = _mm512_add_epi64(eights, _mm512_bsrli_epi128(eights, 8));
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m128i four = _mm512_castsi512_si128(_mm512_permutexvar_epi32(first, eights));
  _mm_storeu_si128((__m128i*)sums, _mm_sub_epi32(four, _mm_set1_epi32(16 * 128)));
}
// Four int8 or two bf16 at p, in every lane.
static inline vi vi_spread(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
// 32 int8 to 32 words (int16), two in a lane.
static inline vi vi_words_from_i8(const void* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
// acc[lane] += the lane's pair of words in w times the pair in x.
static inline vi vi_dot_words(vi acc, vi w, vi x) { return _mm512_dpwssd_epi32(acc, w, x); }
// 16 values to nearest even and to 16 words.
static inline void vf_to_i16(void* p, vf a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a)));
}
// Always inlined: gcc drops calls of functions that do nothing but prefetch.
__attribute__((always_inline)) static inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
