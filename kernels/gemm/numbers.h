// Arrays of numbers by their KIND: 0 bfloat16, 1 float16, 2 float32. What kernels of this folder write is of EK_OUT;
// what comes in, of EK_ACT (common/act.h): the two differ where logits are computed.
#pragma once
#include "common/compat.h"

#ifndef EK_OUT
#define EK_OUT 0
#endif
static_assert(EK_OUT >= 0 && EK_OUT <= 2, "EK_OUT is 0 bf16, 1 f16 or 2 f32");

template <int KIND>
EK_DEV float ek_load(const void* from, i64 at) {
  if constexpr (KIND == 2) return ((const float*)from)[at];
  else if constexpr (KIND == 1) return ek_f16(((const u16*)from)[at]);
  else return ek_bf16(((const u16*)from)[at]);
}

template <int KIND>
EK_DEV void ek_store(void* to, i64 at, float x) {
  if constexpr (KIND == 2) ((float*)to)[at] = x;
  else if constexpr (KIND == 1) ((u16*)to)[at] = ek_tof16(x);
  else ((u16*)to)[at] = ek_tobf16(x);
}

// Two in a word, of the 16-bit kinds.
template <int KIND>
EK_DEV u32 ek_pack(float low, float high) {
  static_assert(KIND == 0 || KIND == 1, "a word has no two of them");
  if constexpr (KIND == 1) return ek_pack_f16(low, high);
  else return ek_pack_bf16(low, high);
}

// All of a vector.
template <int KIND>
EK_DEV void ek_unpack(const u32x4& v, float (&x)[KIND == 2 ? 4 : 8]) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (KIND == 2) {
      x[i] = ek_asfloat(words[i]);
    } else {
      x[2 * i] = KIND == 1 ? ek_f16lo(words[i]) : ek_bf16lo(words[i]);
      x[2 * i + 1] = KIND == 1 ? ek_f16hi(words[i]) : ek_bf16hi(words[i]);
    }
  }
}

// Four or eight as they were loaded: whatever is computed of them at once would wait for them at once.
template <int KIND, int N>
struct EkWords {
  static_assert(N == 4 || N == 8, "half a vector, one or two");
  u32 words[KIND == 2 ? N : N / 2];
};

// From an address that is a multiple of their size, or of 16.
template <int KIND, int N>
EK_DEV void ek_load_words(const u8* from, EkWords<KIND, N>& x) {
  constexpr int WORDS = KIND == 2 ? N : N / 2;
  if constexpr (WORDS == 2) {
    const u32x2 v = *(const u32x2*)from;
    x.words[0] = v.x, x.words[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
      const u32x4 v = ((const u32x4*)from)[i / 4];
      x.words[i] = v.x, x.words[i + 1] = v.y, x.words[i + 2] = v.z, x.words[i + 3] = v.w;
    }
  }
}

template <int KIND, int N>
EK_DEV void ek_unpack_words(const EkWords<KIND, N>& from, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    const u32 word = from.words[KIND == 2 ? i : i / 2];
    if constexpr (KIND == 2) x[i] = ek_asfloat(word);
    else if constexpr (KIND == 1) x[i] = i % 2 == 0 ? ek_f16lo(word) : ek_f16hi(word);
    else x[i] = i % 2 == 0 ? ek_bf16lo(word) : ek_bf16hi(word);
  }
}
