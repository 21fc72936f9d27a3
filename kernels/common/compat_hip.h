// compat.h for AMD's cards, gfx10.3 and later in waves of 32, as HIPRTC or clang compiles it.
//
// Addresses become pointers to global memory, so that no FLAT instruction is made, which would wait for LDS as well.
#pragma once

#if !defined(__HIPCC_RTC__) && !defined(__HIP_INCLUDE_HIP_HIP_RUNTIME_H)
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#define __host__ __attribute__((host))
#endif

#define EK_DEV __device__ inline __attribute__((always_inline))
#define EK_KERN(threads) extern "C" __global__ void __attribute__((amdgpu_flat_work_group_size(threads, threads)))
#define EK_KERN_BLOCKS(threads, blocks) EK_KERN(threads)
#define EK_SMEM __shared__
#define EK_TID ((int)__builtin_amdgcn_workitem_id_x())
#define EK_BX ((int)__builtin_amdgcn_workgroup_id_x())
#define EK_BY ((int)__builtin_amdgcn_workgroup_id_y())
#define EK_BZ ((int)__builtin_amdgcn_workgroup_id_z())

// Only LDS is put in order. A fence for all memory would throw away the L0 cache as well (buffer_gl0_inv).
#if __clang_major__ >= 19
#define EK_FENCE(order, scope) __builtin_amdgcn_fence(order, scope, "local")
#else
#define EK_FENCE(order, scope) __builtin_amdgcn_fence(order, scope)
#endif
EK_DEV void EK_SYNC() {
  EK_FENCE(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  EK_FENCE(__ATOMIC_ACQUIRE, "workgroup");
}
// Lanes run together and LDS keeps its order: it is the compiler that must not move accesses.
EK_DEV void EK_WARP_SYNC() {
  EK_FENCE(__ATOMIC_RELEASE, "wavefront");
  __builtin_amdgcn_wave_barrier();
  EK_FENCE(__ATOMIC_ACQUIRE, "wavefront");
}
// A wave's loads are counted, and end in the order in which they began: to wait for one is to wait for all before it.
// So that order matters, and clang, which would have few registers in use, puts loads where they are needed. Nothing at
// all passes EK_LOADS_STAY; what is computed in front of it may still be moved behind it before that is in force, which
// ek_settle prevents.
#if __has_builtin(__builtin_amdgcn_sched_barrier)
#define EK_LOADS_STAY() (__builtin_amdgcn_sched_barrier(0))
#else
#define EK_LOADS_STAY() ((void)0)
#endif
EK_DEV void ek_settle(float& x) { __asm__ volatile("" : "+v"(x)::"memory"); }

EK_DEV float ek_asfloat(u32 x) { return __builtin_bit_cast(float, x); }
EK_DEV u32 ek_asuint(float x) { return __builtin_bit_cast(u32, x); }

// ---- global memory

#define EK_GLOBAL __attribute__((address_space(1)))
typedef u32 ek_vec2 __attribute__((ext_vector_type(2)));
typedef u32 ek_vec4 __attribute__((ext_vector_type(4)));

EK_DEV u8 ek_ldg1(u64 address) { return *(const EK_GLOBAL u8*)address; }
EK_DEV u16 ek_ldg2(u64 address) { return *(const EK_GLOBAL u16*)address; }
EK_DEV u32 ek_ldg4(u64 address) { return *(const EK_GLOBAL u32*)address; }
EK_DEV u32x2 ek_ldg8(u64 address) {
  const ek_vec2 v = *(const EK_GLOBAL ek_vec2*)address;
  return u32x2{v.x, v.y};
}
EK_DEV u32x4 ek_ldg16(u64 address) {
  const ek_vec4 v = *(const EK_GLOBAL ek_vec4*)address;
  return u32x4{v.x, v.y, v.z, v.w};
}
EK_DEV u32x2 ek_ldg8_kept(u64 address) { return ek_ldg8(address); }
EK_DEV u32x4 ek_ldg16_kept(u64 address) { return ek_ldg16(address); }
EK_DEV u16 ek_ld2(u64 address) { return ek_ldg2(address); }
EK_DEV u32 ek_ld4(u64 address) { return ek_ldg4(address); }
EK_DEV u32x2 ek_ld8(u64 address) { return ek_ldg8(address); }
EK_DEV u32x4 ek_ld16(u64 address) { return ek_ldg16(address); }

EK_DEV void ek_stg1(u64 address, u8 x) { *(EK_GLOBAL u8*)address = x; }
EK_DEV void ek_stg2(u64 address, u16 x) { *(EK_GLOBAL u16*)address = x; }
EK_DEV void ek_stg4(u64 address, u32 x) { *(EK_GLOBAL u32*)address = x; }
EK_DEV void ek_stg8(u64 address, u32x2 v) { *(EK_GLOBAL ek_vec2*)address = ek_vec2{v.x, v.y}; }
EK_DEV void ek_stg16(u64 address, u32x4 v) { *(EK_GLOBAL ek_vec4*)address = ek_vec4{v.x, v.y, v.z, v.w}; }

// ---- between the lanes of a wave

// Within 16 lanes by DPP's row_xmask, which is part of a vector instruction; across them by permlanex16, which reads
// from the other 16 the lane that a nibble of its selectors says.
template <int MASK>
EK_DEV u32 ek_xor_lanes(u32 x) {
  static_assert(MASK > 0 && MASK < 32, "a wave has 32 lanes");
  if constexpr (MASK < 16) {
    return (u32)__builtin_amdgcn_mov_dpp((int)x, 0x160 | MASK, 0xf, 0xf, true);
  } else {
    constexpr u32 flip = 0x11111111u * (u32)(MASK & 15);
    return __builtin_amdgcn_permlanex16(x, x, 0x76543210u ^ flip, 0xfedcba98u ^ flip, false, false);
  }
}
// The value of any lane, by way of LDS's switch.
EK_DEV u32 ek_shfl(u32 x, int from) { return (u32)__builtin_amdgcn_ds_bpermute(from << 2, (int)x); }
EK_DEV float ek_shfl(float x, int from) { return ek_asfloat(ek_shfl(ek_asuint(x), from)); }

// The mask is a constant once loops are unrolled, and all but one case of the switch go.
EK_DEV u32 ek_shfl_xor(u32 x, int mask) {
  switch (mask) {
    case 1: return ek_xor_lanes<1>(x);
    case 2: return ek_xor_lanes<2>(x);
    case 4: return ek_xor_lanes<4>(x);
    case 8: return ek_xor_lanes<8>(x);
    case 16: return ek_xor_lanes<16>(x);
    default: return ek_shfl(x, (int)__builtin_amdgcn_mbcnt_lo(~0u, 0u) ^ mask);
  }
}
EK_DEV float ek_shfl_xor(float x, int mask) { return ek_asfloat(ek_shfl_xor(ek_asuint(x), mask)); }
EK_DEV u32 ek_ballot(bool holds) { return __builtin_amdgcn_ballot_w32(holds); }
EK_DEV bool ek_any(bool holds) { return ek_ballot(holds) != 0; }

EK_DEV u32 ek_add_shared(u32* to, u32 x) {
  typedef __attribute__((address_space(3))) u32 local;
  return __hip_atomic_fetch_add((local*)to, x, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
}

// ---- arithmetic

EK_DEV float ek_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EK_DEV float ek_max(float a, float b) { return __builtin_fmaxf(a, b); }
EK_DEV float ek_min(float a, float b) { return __builtin_fminf(a, b); }
EK_DEV float ek_rint(float x) { return __builtin_rintf(x); }
EK_DEV float ek_rcp(float x) { return __builtin_amdgcn_rcpf(x); }
EK_DEV float ek_rsqrt(float x) { return __builtin_amdgcn_rsqf(x); }
#if __has_builtin(__builtin_amdgcn_exp2f)
EK_DEV float ek_exp2(float x) { return __builtin_amdgcn_exp2f(x); }
EK_DEV float ek_log2(float x) { return __builtin_amdgcn_logf(x); }
#else  // before clang 17
EK_DEV float ek_exp2(float x) {
  float y;
  __asm__("v_exp_f32 %0, %1" : "=v"(y) : "v"(x));
  return y;
}
EK_DEV float ek_log2(float x) {
  float y;
  __asm__("v_log_f32 %0, %1" : "=v"(y) : "v"(x));
  return y;
}
#endif
EK_DEV float ek_f16(u16 bits) { return (float)__builtin_bit_cast(_Float16, bits); }
EK_DEV u16 ek_tof16(float x) { return __builtin_bit_cast(u16, (_Float16)x); }

// ---- bytes in words

// v_perm_b32 is told by bytes what the selector says in nibbles, and takes its operands the other way round.
EK_DEV u32 ek_perm(u32 a, u32 b, u32 selector) {
  const u32 bytes =
      (selector & 7u) | (selector & 0x70u) << 4 | (selector & 0x700u) << 8 | (selector & 0x7000u) << 12;
  return __builtin_amdgcn_perm(b, a, bytes);
}
#if defined(__GFX10__)
EK_DEV i32 ek_dot4(i32 acc, u32 a, u32 b) { return __builtin_amdgcn_sdot4((int)a, (int)b, acc, false); }
// Of both kinds there is none: unsigned bytes less 128 are signed.
EK_DEV i32 ek_dot4_us(i32 acc, u32 a, u32 b) {
  return ek_dot4(acc + (ek_dot4(0, 0x01010101u, b) << 7), a ^ 0x80808080u, b);
}
#else
EK_DEV i32 ek_dot4(i32 acc, u32 a, u32 b) {
  return __builtin_amdgcn_sudot4(true, (int)a, true, (int)b, acc, false);
}
EK_DEV i32 ek_dot4_us(i32 acc, u32 a, u32 b) {
  return __builtin_amdgcn_sudot4(false, (int)a, true, (int)b, acc, false);
}
#endif
EK_DEV u32 ek_dot4_uu(u32 acc, u32 a, u32 b) { return __builtin_amdgcn_udot4(a, b, acc, false); }
