// What all GPU kernels are written in: the part of C++ that NVRTC, HIPRTC, clang and, on the host, any compiler take.
//
// No header of a toolkit is included: at run time there is none. Sources name each other from kernels/ ("common/kv.h"),
// which is what the compilers get as their include folder.
//
// A kernel:   EK_KERN(128) ek_name(EkName p) { ... }   One struct by value, a fixed number of threads, 32 lanes a warp.
// Its rules, which the host's fibers (fibers.h) check:
//   - all 32 lanes of a warp take part in an exchange (ek_shfl..., ek_any, ek_ballot, EK_WARP_SYNC, ek_mma), at one
//     place in the source, and with the same mask;
//   - all threads of a block come to EK_SYNC at the same place, and none returns before the last one of them;
//   - shared memory is declared with EK_SMEM in the kernel itself and has no value to begin with;
//   - what another thread wrote is read behind EK_SYNC, within a warp behind EK_WARP_SYNC.
//
// EK_KERN_BLOCKS(threads, blocks) is for a kernel that would rather have so many blocks on a multiprocessor at once
// than all the registers that NVIDIA's compiler finds a use for; elsewhere it is EK_KERN.
//
// EK_LOADS_STAY() and ek_settle are about when, not what: see compat_hip.h.
//
// Each of the three bodies defines
//   EK_DEV EK_KERN(threads) EK_KERN_BLOCKS(threads, blocks) EK_SMEM EK_TID EK_BX EK_BY EK_BZ EK_SYNC() EK_WARP_SYNC()
//   EK_LOADS_STAY()                    compilers move nothing that loads from one side of it to the other
//   ek_settle(float&)                  what it is made of is computed before anything that is loaded further down
//   ek_ldg1/2/4/8/16(address)          global memory that nobody writes during the launch; aligned to its size
//   ek_ldg8_kept ek_ldg16_kept         the same, for what other warps of the thread block read at about the same time
//   ek_ld2/4/8/16(address)             global memory that the thread may write when it has read it; aligned to its size
//   ek_stg1/2/4/8/16(address, value)   global memory; aligned to its size
//   ek_shfl_xor(float|u32, mask)       the value of lane ^ mask, mask < 32
//   ek_shfl(float|u32, from)           the value of lane `from`, which each lane chooses for itself
//   ek_any(bool) ek_ballot(bool)       whether it holds in any lane; the lanes it holds in, as bits
//   ek_add_shared(u32*, u32)           atomically, in shared memory; the value before
//   ek_asfloat ek_asuint               the same bits
//   ek_fma ek_max ek_min               exact; of a number and a NaN, ek_max and ek_min take the number
//   ek_rint                            to the nearest whole number, ties to even
//   ek_exp2 ek_log2 ek_rcp ek_rsqrt    to within about 2 units in the last place; subnormal numbers may count as 0
//   ek_f16 ek_tof16                    float16 bits to float; float to the nearest, ties to even; a NaN stays one
//   ek_perm(a, b, selector)            four bytes, each chosen by a nibble: 0-3 of a, 4-7 of b
//   ek_dot4 ek_dot4_us ek_dot4_uu      acc + four products of bytes: signed, unsigned by signed, unsigned
// and what follows them here is the same everywhere.
#pragma once
#if defined(__CUDACC_RTC__) || defined(__CUDACC__)
#define EK_CUDA 1
#elif defined(__HIP__) || defined(__HIPCC_RTC__) || defined(__AMDGCN__)
#define EK_HIP 1
#else
#define EK_HOST 1
#endif

typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(8) u32x2 {
  u32 x, y;
};
struct alignas(16) u32x4 {
  u32 x, y, z, w;
};

#if EK_CUDA
#include "common/compat_cuda.h"
#elif EK_HIP
#include "common/compat_hip.h"
#else
#include "common/fibers.h"
#endif

EK_DEV int ek_max(int a, int b) { return a > b ? a : b; }
EK_DEV int ek_min(int a, int b) { return a < b ? a : b; }

// ---- bfloat16: two in a word, the first in its lower half

EK_DEV float ek_bf16(u16 bits) { return ek_asfloat((u32)bits << 16); }
EK_DEV float ek_bf16lo(u32 word) { return ek_asfloat(word << 16); }
EK_DEV float ek_bf16hi(u32 word) { return ek_asfloat(word & 0xffff0000u); }

// To nearest, ties to even; any NaN becomes 0x7fff, as NVIDIA's cards have it.
#if EK_CUDA && __CUDA_ARCH__ >= 800
EK_DEV u16 ek_tobf16(float x) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
EK_DEV u32 ek_pack_bf16(float low, float high) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#else
// In the upper half; both ways are gone so that a lane's NaN is a choice and no branch.
EK_DEV u32 ek_rounded_bf16(float x) {
  const u32 bits = ek_asuint(x), rounded = bits + (bits >> 16 & 1u) + 0x7fffu;
  return x != x ? 0x7fff0000u : rounded;
}
EK_DEV u16 ek_tobf16(float x) { return (u16)(ek_rounded_bf16(x) >> 16); }
EK_DEV u32 ek_pack_bf16(float low, float high) {
  return ek_perm(ek_rounded_bf16(low), ek_rounded_bf16(high), 0x7632);
}
#endif

// ---- float16 likewise; which NaN it becomes is the card's

EK_DEV float ek_f16lo(u32 word) { return ek_f16((u16)(word & 0xffffu)); }
EK_DEV float ek_f16hi(u32 word) { return ek_f16((u16)(word >> 16)); }
#if EK_CUDA && __CUDA_ARCH__ >= 800
EK_DEV u32 ek_pack_f16(float low, float high) {
  u32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#elif EK_HIP
EK_DEV u32 ek_pack_f16(float low, float high) {
  typedef _Float16 halves __attribute__((ext_vector_type(2)));
  return __builtin_bit_cast(u32, halves{(_Float16)low, (_Float16)high});
}
#else
EK_DEV u32 ek_pack_f16(float low, float high) { return (u32)ek_tof16(low) | (u32)ek_tof16(high) << 16; }
#endif

// ---- float8 e4m3fn: sign, 4 bits of exponent with a bias of 7, 3 bits of fraction; 0x7f is NaN, there is no infinity
//
// By bit operations everywhere: only the newest cards can convert it. As a float16 its exponent is 8 too small, and
// float16 has all its subnormals.

EK_DEV float ek_e4m3(u32 byte) {
  const float x = ek_f16((u16)((byte & 0x80u) << 8 | (byte & 0x7fu) << 7)) * 256.0f;
  return (byte & 0x7fu) == 0x7fu ? ek_asfloat(0x7fc00000u) : x;
}

// To nearest, ties to even. What is larger than 448 becomes 448; an infinity or a NaN becomes NaN.
EK_DEV u32 ek_toe4m3(float x) {
  const u32 bits = ek_asuint(x), sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
  const u32 rounded = size + (size >> 20 & 1u) + 0x7ffffu;  // 3 of the 23 bits of the fraction are kept
  u32 code = (rounded >> 20) - (120u << 3);                 // exponents: 127 becomes 7
  // Below 2^-6 the step is 2^-9, which is that of floats from 2^14 on: adding 2^14 rounds to it.
  code = size < 0x3c800000u ? ek_asuint(ek_asfloat(size) + 16384.0f) & 0xfu : code;
  code = size >= 0x43e00000u ? 0x7eu : code;  // 448
  code = size >= 0x7f800000u ? 0x7fu : code;
  return sign | code;
}

// ---- tanh, for soft caps and gelu: 1 - 2 / (e^2x + 1)

EK_DEV float ek_tanh(float x) {
  const float most = 30.0f;  // far beyond where it is 1, and e^60 is still a number
  const float power = ek_exp2(ek_max(-most, ek_min(most, x)) * 2.885390081777927f);
  const float y = 1.0f - 2.0f * ek_rcp(power + 1.0f);
  return x != x ? x : y;
}
