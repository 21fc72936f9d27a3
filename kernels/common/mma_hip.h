// mma.h's product for AMD's cards.
#pragma once

#if EK_ORDER == 10

// One row of C, which is that of lane I of this lane's 16: row_share has the instruction itself take the row of A from
// there. As moves of their own the compiler would make all 64 first, and have no registers left; and volatile, since it
// would keep unpacked what is multiplied more than once.
#if EK_F16
template <int I>
EK_DEV void ek_mma_row(EkC& c, u32 a, u32 b) {
  __asm__ volatile("v_dot2c_f32_f16_dpp %0, %1, %2 row_share:%3 row_mask:0xf bank_mask:0xf"
                   : "+v"(c.r[I])
                   : "v"(a), "v"(b), "n"(I));
}
#else
template <int I>
EK_DEV void ek_mma_row(EkC& c, float a, float b) {
  __asm__ volatile("v_fmac_f32_dpp %0, %1, %2 row_share:%3 row_mask:0xf bank_mask:0xf"
                   : "+v"(c.r[I])
                   : "v"(a), "v"(b), "n"(I));
}
EK_DEV float ek_unpack_low(u32 word) {
  float x;
  __asm__ volatile("v_lshlrev_b32_e32 %0, 16, %1" : "=v"(x) : "v"(word));
  return x;
}
EK_DEV float ek_unpack_high(u32 word) {
  float x;
  __asm__ volatile("v_and_b32_e32 %0, 0xffff0000, %1" : "=v"(x) : "v"(word));
  return x;
}
#endif

// All eight rows: none waits for the one before it.
template <class T>
EK_DEV void ek_mma_rows(EkC& c, T a, T b) {
  ek_mma_row<0>(c, a, b);
  ek_mma_row<1>(c, a, b);
  ek_mma_row<2>(c, a, b);
  ek_mma_row<3>(c, a, b);
  ek_mma_row<4>(c, a, b);
  ek_mma_row<5>(c, a, b);
  ek_mma_row<6>(c, a, b);
  ek_mma_row<7>(c, a, b);
}

EK_DEV void ek_mma(EkC& c, const EkA& a, const EkB& b, int) {
#pragma unroll
  for (int k = 0; k < 8; k++) {
#if EK_F16
    ek_mma_rows(c, a.r[k], b.r[k]);
#else
    ek_mma_rows(c, ek_unpack_low(a.r[k]), ek_unpack_low(b.r[k]));
    ek_mma_rows(c, ek_unpack_high(a.r[k]), ek_unpack_high(b.r[k]));
#endif
  }
}

#else

constexpr int EK_OPERANDS = 2 * EK_OPERAND_WORDS;
typedef float ek_floats __attribute__((ext_vector_type(8)));
#if EK_F16
typedef _Float16 ek_operand __attribute__((ext_vector_type(EK_OPERANDS)));
#else
typedef short ek_operand __attribute__((ext_vector_type(EK_OPERANDS)));
#endif

EK_DEV void ek_mma(EkC& c, const EkA& a, const EkB& b, int) {
  const ek_operand x = __builtin_bit_cast(ek_operand, a), y = __builtin_bit_cast(ek_operand, b);
  const ek_floats z = __builtin_bit_cast(ek_floats, c);
#if EK_ORDER == 11 && EK_F16
  c = __builtin_bit_cast(EkC, __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(x, y, z));
#elif EK_ORDER == 11
  c = __builtin_bit_cast(EkC, __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(x, y, z));
#elif EK_F16
  c = __builtin_bit_cast(EkC, __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(x, y, z));
#else
  c = __builtin_bit_cast(EkC, __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(x, y, z));
#endif
}

#endif
