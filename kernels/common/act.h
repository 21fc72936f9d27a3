// Activations as the model keeps them, by EK_ACT:  0 bfloat16   1 float16   2 float32
#pragma once
#include "common/compat.h"

#ifndef EK_ACT
#define EK_ACT 0
#endif
static_assert(EK_ACT >= 0 && EK_ACT <= 2, "EK_ACT is 0 bf16, 1 f16 or 2 f32");

constexpr int EK_ACT_BYTES = EK_ACT == 2 ? 4 : 2;

EK_DEV u32 ek_act_pack(float low, float high) {
  if constexpr (EK_ACT == 0) return ek_pack_bf16(low, high);
  else return ek_pack_f16(low, high);
}

// N numbers from an address that is a multiple of 16. WRITTEN: the same launch may write there, after they were read.
template <bool WRITTEN = false, int N>
EK_DEV void ek_act_load(u64 address, float (&x)[N]) {
  static_assert(N % 8 == 0, "whole vectors of any type");
  constexpr int PER_VECTOR = 16 / EK_ACT_BYTES;
#pragma unroll
  for (int i = 0; i < N / PER_VECTOR; i++) {
    const u32x4 v = WRITTEN ? ek_ld16(address + (u64)(16 * i)) : ek_ldg16(address + (u64)(16 * i));
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if constexpr (EK_ACT == 2) {
        x[4 * i + j] = ek_asfloat(words[j]);
      } else {
        x[8 * i + 2 * j] = EK_ACT == 0 ? ek_bf16lo(words[j]) : ek_f16lo(words[j]);
        x[8 * i + 2 * j + 1] = EK_ACT == 0 ? ek_bf16hi(words[j]) : ek_f16hi(words[j]);
      }
    }
  }
}

// N numbers to an address that is a multiple of 16.
template <int N>
EK_DEV void ek_act_store(u64 address, const float (&x)[N]) {
  static_assert(N % 8 == 0, "whole vectors of any type");
  constexpr int PER_VECTOR = 16 / EK_ACT_BYTES;
#pragma unroll
  for (int i = 0; i < N / PER_VECTOR; i++) {
    u32 words[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if constexpr (EK_ACT == 2) words[j] = ek_asuint(x[4 * i + j]);
      else words[j] = ek_act_pack(x[8 * i + 2 * j], x[8 * i + 2 * j + 1]);
    }
    ek_stg16(address + (u64)(16 * i), u32x4{words[0], words[1], words[2], words[3]});
  }
}

EK_DEV void ek_act_store_one(u64 address, float x) {
  if constexpr (EK_ACT == 2) ek_stg4(address, ek_asuint(x));
  else ek_stg2(address, EK_ACT == 0 ? ek_tobf16(x) : ek_tof16(x));
}
