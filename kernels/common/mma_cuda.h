// mma.h for NVIDIA's tensor cores. The loads take four 8 x 8 matrices at once; each lane says where one row begins.
#pragma once

EK_DEV u32 ek_shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

EK_DEV void ek_load_matrices(u32 (&r)[4], const u16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(ek_shared_address(row)));
}
EK_DEV void ek_load_transposed(u32 (&r)[4], const u16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(ek_shared_address(row)));
}

// Rows 0-7 and 8-15 of the first half of k, then those of the second.
EK_DEV void ek_ldA(EkA& a, const u16* from, int stride, int lane) {
  ek_load_matrices(a.r, from + (lane & 15) * stride + (lane >> 4) * 8);
}
// Columns 0-7: both halves of k; then columns 8-15.
EK_DEV void ek_ldBT(EkB& b, const u16* from, int stride, int lane) {
  ek_load_matrices(b.r, from + ((lane & 7) + (lane >> 4) * 8) * stride + (lane >> 3 & 1) * 8);
}
EK_DEV void ek_ldB(EkB& b, const u16* from, int stride, int lane) {
  ek_load_transposed(b.r, from + (lane & 15) * stride + (lane >> 4) * 8);
}

#if __CUDA_ARCH__ >= 800
// Eight columns of C.
EK_DEV void ek_mma_columns(float* c, const EkA& a, u32 b0, u32 b1) {
#if EK_F16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b0), "r"(b1));
}
#else
static_assert(EK_F16, "the tensor cores of sm_75 have no bfloat16");
EK_DEV void ek_mma_half(float* c, u32 a0, u32 a1, u32 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}
EK_DEV void ek_mma_columns(float* c, const EkA& a, u32 b0, u32 b1) {
  ek_mma_half(c, a.r[0], a.r[1], b0);
  ek_mma_half(c, a.r[2], a.r[3], b1);
}
#endif

EK_DEV void ek_mma(EkC& c, const EkA& a, const EkB& b, int) {
  ek_mma_columns(c.r, a, b.r[0], b.r[1]);
  ek_mma_columns(c.r + 4, a, b.r[2], b.r[3]);
}
