// compat.h for the host, where a block's threads are fibers (fiber_block.h): for tests without a card.
//
// A test compiles a kernel's header with   EK_FIBER_ENTRY(ek_name, EkName, 128)   behind it to a library of
//   ek_run(&args, gx, gy, gz, seed)   runs it; the number of switches between fibers, or all bits set: a fault
//   ek_fault()                        what the fault was
//   ek_args_bytes()                   the size of the struct, for comparing with its mirror
// A seed of 0 runs threads and blocks by number, any other one in an order of its own.
#pragma once
#include "common/fiber_block.h"

#include <math.h>

#define EK_DEV static inline __attribute__((unused))
#define EK_KERN(threads) extern "C" void
#define EK_KERN_BLOCKS(threads, blocks) EK_KERN(threads)
#define EK_SMEM static __attribute__((section("ek_shared")))
#define EK_TID (ek_fibers::block.current)
#define EK_BX (ek_fibers::block.x)
#define EK_BY (ek_fibers::block.y)
#define EK_BZ (ek_fibers::block.z)
#define EK_SYNC() ek_fibers::barrier({"EK_SYNC", __FILE__, __LINE__, 0})
#define EK_WARP_SYNC() ((void)ek_fibers::exchange({"EK_WARP_SYNC", __FILE__, __LINE__, 0}, "", 0))
#define EK_LOADS_STAY() ((void)0)
EK_DEV void ek_settle(float&) {}

namespace ek_fibers {

template <class Args>
struct Job {
  void (*kernel)(Args);
  const Args* args;
  static void run(const void* job) { ((const Job*)job)->kernel(*((const Job*)job)->args); }
};

template <class Args>
static u64 run(void (*kernel)(Args), const void* args, int threads, int gx, int gy, int gz, u32 seed) {
  const Job<Args> job = {kernel, (const Args*)args};
  return run_grid(&Job<Args>::run, &job, threads, gx, gy, gz, seed);
}

template <class Args>
static Args args_of(void (*kernel)(Args));  // never called: decltype names the struct that a kernel takes

// Below lie programs and what 0 plus some offset is: the address of a segment that there is not.
constexpr u64 LOWEST_ADDRESS = 1 << 22;

static inline void* checked(u64 address, u64 bytes, const char* what) {
  if (address % bytes) fail("%s of %#llx, which is no multiple of %llu", what, address, bytes);
  if (address < LOWEST_ADDRESS) fail("%s of %#llx, where there is no memory", what, address);
  return (void*)address;
}

template <class T>
static inline T read(u64 address, const char* what) {
  T value;
  memcpy(&value, checked(address, sizeof value, what), sizeof value);
  return value;
}

template <class T>
static inline void write(u64 address, T value, const char* what) {
  memcpy(checked(address, sizeof value, what), &value, sizeof value);
}

template <class T>
static inline T sent_by(const Sent* all, int lane) {
  T value;
  memcpy(&value, all[lane & (LANES - 1)].bytes, sizeof value);
  return value;
}

}  // namespace ek_fibers

#define EK_FIBER_ENTRY(kernel, Args, threads)                                                   \
  extern "C" u64 ek_run(const void* args, int gx, int gy, int gz, u32 seed) {                   \
    return ek_fibers::run<Args>(&kernel, args, threads, gx, gy, gz, seed);                      \
  }                                                                                             \
  extern "C" const char* ek_fault() { return ek_fibers::block.fault; }                          \
  extern "C" u64 ek_args_bytes() { return sizeof(Args); }

EK_DEV float ek_asfloat(u32 x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
EK_DEV u32 ek_asuint(float x) {
  u32 y;
  memcpy(&y, &x, 4);
  return y;
}

// ---- global memory

EK_DEV u8 ek_ldg1(u64 address) { return ek_fibers::read<u8>(address, "ek_ldg1"); }
EK_DEV u16 ek_ldg2(u64 address) { return ek_fibers::read<u16>(address, "ek_ldg2"); }
EK_DEV u32 ek_ldg4(u64 address) { return ek_fibers::read<u32>(address, "ek_ldg4"); }
EK_DEV u32x2 ek_ldg8(u64 address) { return ek_fibers::read<u32x2>(address, "ek_ldg8"); }
EK_DEV u32x4 ek_ldg16(u64 address) { return ek_fibers::read<u32x4>(address, "ek_ldg16"); }
EK_DEV u32x2 ek_ldg8_kept(u64 address) { return ek_fibers::read<u32x2>(address, "ek_ldg8_kept"); }
EK_DEV u32x4 ek_ldg16_kept(u64 address) { return ek_fibers::read<u32x4>(address, "ek_ldg16_kept"); }
EK_DEV u16 ek_ld2(u64 address) { return ek_fibers::read<u16>(address, "ek_ld2"); }
EK_DEV u32 ek_ld4(u64 address) { return ek_fibers::read<u32>(address, "ek_ld4"); }
EK_DEV u32x2 ek_ld8(u64 address) { return ek_fibers::read<u32x2>(address, "ek_ld8"); }
EK_DEV u32x4 ek_ld16(u64 address) { return ek_fibers::read<u32x4>(address, "ek_ld16"); }
EK_DEV void ek_stg1(u64 address, u8 x) { ek_fibers::write(address, x, "ek_stg1"); }
EK_DEV void ek_stg2(u64 address, u16 x) { ek_fibers::write(address, x, "ek_stg2"); }
EK_DEV void ek_stg4(u64 address, u32 x) { ek_fibers::write(address, x, "ek_stg4"); }
EK_DEV void ek_stg8(u64 address, u32x2 x) { ek_fibers::write(address, x, "ek_stg8"); }
EK_DEV void ek_stg16(u64 address, u32x4 x) { ek_fibers::write(address, x, "ek_stg16"); }

// ---- between the lanes of a warp; where they are called from is told by the defaults

#define EK_FROM const char *file = __builtin_FILE(), int line = __builtin_LINE()

EK_DEV u32 ek_shfl(u32 x, int from, EK_FROM) {
  return ek_fibers::sent_by<u32>(ek_fibers::exchange({"ek_shfl", file, line, 0}, &x, 4), from);
}
EK_DEV float ek_shfl(float x, int from, EK_FROM) { return ek_asfloat(ek_shfl(ek_asuint(x), from, file, line)); }
EK_DEV u32 ek_shfl_xor(u32 x, int mask, EK_FROM) {
  const int lane = EK_TID % ek_fibers::LANES;
  if (mask < 0 || mask >= ek_fibers::LANES) ek_fibers::fail("ek_shfl_xor with a mask of %d, %s:%d", mask, file, line);
  return ek_fibers::sent_by<u32>(ek_fibers::exchange({"ek_shfl_xor", file, line, mask}, &x, 4), lane ^ mask);
}
EK_DEV float ek_shfl_xor(float x, int mask, EK_FROM) {
  return ek_asfloat(ek_shfl_xor(ek_asuint(x), mask, file, line));
}
EK_DEV u32 ek_ballot(bool holds, EK_FROM) {
  const u8 bit = holds;
  const ek_fibers::Sent* all = ek_fibers::exchange({"ek_ballot", file, line, 0}, &bit, 1);
  u32 lanes = 0;
  for (int i = 0; i < ek_fibers::LANES; i++) lanes |= (u32)all[i].bytes[0] << i;
  return lanes;
}
EK_DEV bool ek_any(bool holds, EK_FROM) { return ek_ballot(holds, file, line) != 0; }
EK_DEV u32 ek_add_shared(u32* to, u32 x) {
  const u32 before = *to;
  *to = before + x;
  return before;
}

// ---- arithmetic

EK_DEV float ek_fma(float a, float b, float c) { return fmaf(a, b, c); }
EK_DEV float ek_max(float a, float b) { return a > b || b != b ? a : b; }
EK_DEV float ek_min(float a, float b) { return a < b || b != b ? a : b; }
EK_DEV float ek_rint(float x) { return nearbyintf(x); }
EK_DEV float ek_exp2(float x) { return exp2f(x); }
EK_DEV float ek_log2(float x) { return log2f(x); }
EK_DEV float ek_rcp(float x) { return 1.0f / x; }
EK_DEV float ek_rsqrt(float x) { return 1.0f / sqrtf(x); }

EK_DEV float ek_f16(u16 bits) {
  const u32 sign = (u32)(bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, fraction = bits & 1023u;
  if (exponent == 31) return ek_asfloat(sign | 0x7f800000u | fraction << 13);
  if (exponent) return ek_asfloat(sign | (exponent + 112) << 23 | fraction << 13);
  return ek_asfloat(sign | ek_asuint((float)fraction * 5.9604644775390625e-8f));  // 2^-24
}
// To nearest, ties to even: below 2^-14 the step is 2^-24, which is that of floats from 0.5 on.
EK_DEV u16 ek_tof16(float x) {
  const u32 bits = ek_asuint(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7fff;  // NVIDIA's
  if (size >= 0x477ff000u) return (u16)(sign | 0x7c00u);  // 65520
  if (size < 0x38800000u) return (u16)(sign | (ek_asuint(ek_asfloat(size) + 0.5f) - 0x3f000000u));
  return (u16)(sign | (((size + 0xfffu + (size >> 13 & 1u)) >> 13) - (112u << 10)));
}

// ---- bytes in words

EK_DEV u32 ek_perm(u32 a, u32 b, u32 selector) {
  const u64 both = (u64)b << 32 | a;
  u32 word = 0;
  for (int i = 0; i < 4; i++) word |= (u32)(both >> (selector >> (4 * i) & 7u) * 8 & 0xffu) << (8 * i);
  return word;
}
EK_DEV i32 ek_dot4(i32 acc, u32 a, u32 b) {
  u32 sum = (u32)acc;
  for (int i = 0; i < 32; i += 8) sum += (u32)((i32)(i8)(a >> i & 0xffu) * (i32)(i8)(b >> i & 0xffu));
  return (i32)sum;
}
EK_DEV i32 ek_dot4_us(i32 acc, u32 a, u32 b) {
  u32 sum = (u32)acc;
  for (int i = 0; i < 32; i += 8) sum += (u32)((i32)(a >> i & 0xffu) * (i32)(i8)(b >> i & 0xffu));
  return (i32)sum;
}
EK_DEV u32 ek_dot4_uu(u32 acc, u32 a, u32 b) {
  u32 sum = acc;
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 0xffu) * (b >> i & 0xffu);
  return sum;
}
