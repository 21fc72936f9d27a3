// C += A B of 16 x 16 x 16 numbers by one warp: A and B of bfloat16 (EK_F16 0) or float16 (EK_F16 1), C of float.
//
// Each card spreads a matrix over the lanes in an order of its own, EK_ORDER; a kernel sees it only in which numbers of
// C a lane has: c.r[i] is that of row ek_c_row(lane, i) and column ek_c_col(lane, i).
//
//   80   NVIDIA: mma.sync of m16n8k16, twice; sm_75: of m16n8k8, four times, and float16 only
//   10   gfx10.3, without matrix units: dot products of two; a lane has a column of B, and rows of A from its 16 lanes
//   11   gfx11: wmma; the upper 16 lanes repeat the A and B of the lower
//   12   gfx12: wmma; the upper 16 lanes have the other half of k
//
// On the host any of them can be chosen.
#pragma once
#include "common/compat.h"

#ifndef EK_F16
#define EK_F16 0
#endif

#if EK_CUDA
#define EK_ORDER 80
#elif defined(__GFX10__)
#define EK_ORDER 10
#elif defined(__GFX11__)
#define EK_ORDER 11
#elif defined(__GFX12__)
#define EK_ORDER 12
#elif EK_HIP
#error "matrix fragments of this card are not known"
#elif !defined(EK_ORDER)
#define EK_ORDER 80
#endif

constexpr int EK_OPERAND_WORDS = EK_ORDER == 10 || EK_ORDER == 11 ? 8 : 4;

struct EkA {
  u32 r[EK_OPERAND_WORDS];
};
struct EkB {
  u32 r[EK_OPERAND_WORDS];
};
struct EkC {
  float r[8];
};

EK_DEV int ek_c_row(int lane, int i) {
  if constexpr (EK_ORDER == 80) return (lane >> 2) + (i >> 1 & 1) * 8;
  else if constexpr (EK_ORDER == 11) return 2 * i + (lane >> 4);
  else return i + 8 * (lane >> 4);
}
EK_DEV int ek_c_col(int lane, int i) {
  if constexpr (EK_ORDER == 80) return (i >> 2) * 8 + (lane & 3) * 2 + (i & 1);
  else return lane & 15;
}

// Loads read shared memory; `from` and `stride` (in numbers) are multiples of 16 bytes. ek_ldB is slow but on NVIDIA.
//   void ek_ldA(EkA& a, const u16* from, int stride, int lane)    A[row][k] = from[row * stride + k]
//   void ek_ldBT(EkB& b, const u16* from, int stride, int lane)   B[k][col] = from[col * stride + k]
//   void ek_ldB(EkB& b, const u16* from, int stride, int lane)    B[k][col] = from[k * stride + col]
// and the product is
//   void ek_mma(EkC& c, const EkA& a, const EkB& b, int lane)
#if EK_CUDA
#include "common/mma_cuda.h"
#else
#include "common/mma_loads.h"
#if EK_HIP
#include "common/mma_hip.h"
#else
#include "common/mma_host.h"
#endif
#endif
