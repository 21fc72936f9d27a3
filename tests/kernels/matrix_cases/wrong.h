// Kernels that are wrong in one way each, which the compile matrix has to find.
#pragma once
#include "common/compat.h"

struct EkWrong {
  u64 in, out;
  const u32* typed;
  i64 count;
};

// More numbers at once than there are registers for so many threads.
EK_KERN(1024) ek_spills(EkWrong p) {
  float x[256];
#pragma unroll
  for (int i = 0; i < 256; i++) x[i] = ek_asfloat(ek_ldg4(p.in + (u64)((EK_TID + i * 1024) * 4)));
  float sum = 0.0f;
  for (int round = 0; round < p.count; round++) {
#pragma unroll
    for (int i = 0; i < 256; i++) {
      x[i] = ek_fma(x[i], x[(i + 1) % 256], sum);
      sum += x[(i * 7) % 256];
    }
  }
#pragma unroll
  for (int i = 0; i < 256; i++) ek_stg4(p.out + (u64)((EK_TID + i * 1024) * 4), ek_asuint(x[i] + sum));
}

// An array whose indices are computed has to be in memory.
EK_KERN(64) ek_array(EkWrong p) {
  u32 x[64];
  for (int i = 0; i < 64; i++) x[i] = ek_ldg4(p.in + (u64)(i * 4));
  for (int round = 0; round < p.count; round++) {
    const u32 at = ek_ldg4(p.in + (u64)(round * 4));
    x[at % 64] += x[(at >> 8) % 64] * (u32)EK_TID;
  }
  u32 sum = 0;
  for (int i = 0; i < 64; i++) sum = sum * 3 + x[i];
  ek_stg4(p.out + (u64)(EK_TID * 4), sum);
}

// A pointer made of a number may point anywhere.
EK_KERN(64) ek_flat(EkWrong p) { ((u32*)p.out)[EK_TID] = ((const u32*)p.in)[EK_TID]; }

// A fence for more than shared memory.
EK_KERN(64) ek_invalidates(EkWrong p) {
  EK_SMEM u32 numbers[64];
  numbers[EK_TID] = ek_ldg4(p.in + (u64)(EK_TID * 4));
#if EK_HIP
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent");
#endif
  ek_stg4(p.out + (u64)(EK_TID * 4), numbers[63 - EK_TID]);
}

// And one with nothing wrong: shared memory and pointers as they should be.
EK_KERN(64) ek_right(EkWrong p) {
  EK_SMEM u32 numbers[64];
  numbers[EK_TID] = p.typed[EK_TID];
  EK_SYNC();
  ek_stg4(p.out + (u64)(EK_TID * 4), numbers[63 - EK_TID]);
}
