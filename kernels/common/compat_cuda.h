// compat.h for NVIDIA's cards, sm_75 and later, as NVRTC compiles it.
//
// Loads are volatile assembly, which keeps their order, but in PTX only: where they go among the instructions ptxas
// decides. It leaves them in their basic block, and has six counters to wait at, of which all loads that are used in a
// later block share one. So a kernel that wants loads under way while it computes asks for them in the block that uses
// them, without a condition, and into registers that nothing else is in.
#pragma once

#define EK_DEV __device__ __forceinline__
// That one block will do has to be said: else ptxas spills a few registers where that makes room for one more.
#define EK_KERN(threads) EK_KERN_BLOCKS(threads, 1)
#define EK_KERN_BLOCKS(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define EK_SMEM __shared__
#define EK_TID ((int)threadIdx.x)
#define EK_BX ((int)blockIdx.x)
#define EK_BY ((int)blockIdx.y)
#define EK_BZ ((int)blockIdx.z)
#define EK_SYNC() __syncthreads()
#define EK_WARP_SYNC() __syncwarp()
#define EK_LOADS_STAY() asm volatile("" ::: "memory")
EK_DEV void ek_settle(float& x) { asm volatile("" : "+f"(x)::"memory"); }

EK_DEV float ek_asfloat(u32 x) { return __uint_as_float(x); }
EK_DEV u32 ek_asuint(float x) { return __float_as_uint(x); }

// ---- global memory

EK_DEV u8 ek_ldg1(u64 address) {
  u32 x;
  asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(x) : "l"(address));
  return (u8)x;
}
EK_DEV u16 ek_ldg2(u64 address) {
  u16 x;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(address));
  return x;
}
EK_DEV u32 ek_ldg4(u64 address) {
  u32 x;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(x) : "l"(address));
  return x;
}
// What comes in wide loads is mostly used once: it need not push anything out of the L1 cache.
EK_DEV u32x2 ek_ldg8(u64 address) {
  u32x2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
  return v;
}
EK_DEV u32x4 ek_ldg16(u64 address) {
  u32x4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}
EK_DEV u32x2 ek_ldg8_kept(u64 address) {
  u32x2 v;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
  return v;
}
EK_DEV u32x4 ek_ldg16_kept(u64 address) {
  u32x4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}
EK_DEV u16 ek_ld2(u64 address) {
  u16 x;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(x) : "l"(address) : "memory");
  return x;
}
EK_DEV u32 ek_ld4(u64 address) {
  u32 x;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(address) : "memory");
  return x;
}
EK_DEV u32x2 ek_ld8(u64 address) {
  u32x2 v;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address) : "memory");
  return v;
}
EK_DEV u32x4 ek_ld16(u64 address) {
  u32x4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

EK_DEV void ek_stg1(u64 address, u8 x) {
  asm volatile("st.global.u8 [%0], %1;" ::"l"(address), "r"((u32)x) : "memory");
}
EK_DEV void ek_stg2(u64 address, u16 x) { asm volatile("st.global.u16 [%0], %1;" ::"l"(address), "h"(x) : "memory"); }
EK_DEV void ek_stg4(u64 address, u32 x) { asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(x) : "memory"); }
EK_DEV void ek_stg8(u64 address, u32x2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(v.x), "r"(v.y) : "memory");
}
EK_DEV void ek_stg16(u64 address, u32x4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// ---- between the lanes of a warp

EK_DEV float ek_shfl_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
EK_DEV u32 ek_shfl_xor(u32 x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
EK_DEV float ek_shfl(float x, int from) { return __shfl_sync(0xffffffffu, x, from); }
EK_DEV u32 ek_shfl(u32 x, int from) { return __shfl_sync(0xffffffffu, x, from); }
EK_DEV bool ek_any(bool holds) { return __any_sync(0xffffffffu, holds) != 0; }
EK_DEV u32 ek_ballot(bool holds) { return __ballot_sync(0xffffffffu, holds); }
EK_DEV u32 ek_add_shared(u32* to, u32 x) { return atomicAdd(to, x); }

// ---- arithmetic

EK_DEV float ek_fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
EK_DEV float ek_max(float a, float b) { return fmaxf(a, b); }
EK_DEV float ek_min(float a, float b) { return fminf(a, b); }
EK_DEV float ek_rint(float x) {
  float y;
  asm("cvt.rni.f32.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
EK_DEV float ek_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
EK_DEV float ek_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
EK_DEV float ek_rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
EK_DEV float ek_rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
EK_DEV float ek_f16(u16 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
EK_DEV u16 ek_tof16(float x) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// ---- bytes in words

EK_DEV u32 ek_perm(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
EK_DEV i32 ek_dot4(i32 acc, u32 a, u32 b) { return __dp4a((int)a, (int)b, acc); }
EK_DEV u32 ek_dot4_uu(u32 acc, u32 a, u32 b) { return __dp4a(a, b, acc); }
EK_DEV i32 ek_dot4_us(i32 acc, u32 a, u32 b) {
  i32 sum;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(acc));
  return sum;
}
