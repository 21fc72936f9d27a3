// mma.h's loads for AMD's cards, and on the host for NVIDIA's order as well.
#pragma once

template <int WORDS>
EK_DEV void ek_load_words(u32* r, const u16* from) {
  static_assert(WORDS % 4 == 0, "16 bytes at a time");
#pragma unroll
  for (int i = 0; i < WORDS; i += 4) {
    const u32x4 t = *(const u32x4*)(from + 2 * i);
    r[i] = t.x, r[i + 1] = t.y, r[i + 2] = t.z, r[i + 3] = t.w;
  }
}

// Where a lane's numbers of k begin: all of them, or a half.
EK_DEV int ek_first_k(int lane) { return EK_ORDER == 12 ? (lane >> 4) * 8 : 0; }

#if EK_ORDER == 80

// A lane has two neighbours in k of a row (column) and of the one 8 further, twice: 8 apart in k.
EK_DEV void ek_ldA(EkA& a, const u16* from, int stride, int lane) {
  const u16* at = from + (lane >> 2) * stride + (lane & 3) * 2;
  a.r[0] = *(const u32*)at;
  a.r[1] = *(const u32*)(at + 8 * stride);
  a.r[2] = *(const u32*)(at + 8);
  a.r[3] = *(const u32*)(at + 8 * stride + 8);
}
EK_DEV void ek_ldBT(EkB& b, const u16* from, int stride, int lane) {
  const u16* at = from + (lane >> 2) * stride + (lane & 3) * 2;
  b.r[0] = *(const u32*)at;
  b.r[1] = *(const u32*)(at + 8);
  b.r[2] = *(const u32*)(at + 8 * stride);
  b.r[3] = *(const u32*)(at + 8 * stride + 8);
}
EK_DEV void ek_ldB(EkB& b, const u16* from, int stride, int lane) {
  for (int i = 0; i < 4; i++) {
    const u16* at = from + ((lane & 3) * 2 + (i & 1) * 8) * stride + (lane >> 2) + (i >> 1) * 8;
    b.r[i] = (u32)at[0] | (u32)at[stride] << 16;
  }
}

#else

// With order 10 the upper 16 lanes have the other eight rows first, so that a lane's eight rows of C are those of the
// first eight lanes of its 16.
EK_DEV void ek_ldA(EkA& a, const u16* from, int stride, int lane) {
  const int row = EK_ORDER == 10 ? (lane & 15) ^ (lane >> 4) * 8 : lane & 15;
  ek_load_words<EK_OPERAND_WORDS>(a.r, from + row * stride + ek_first_k(lane));
}
EK_DEV void ek_ldBT(EkB& b, const u16* from, int stride, int lane) {
  ek_load_words<EK_OPERAND_WORDS>(b.r, from + (lane & 15) * stride + ek_first_k(lane));
}
EK_DEV void ek_ldB(EkB& b, const u16* from, int stride, int lane) {
  const u16* at = from + ek_first_k(lane) * stride + (lane & 15);
#pragma unroll
  for (int i = 0; i < EK_OPERAND_WORDS; i++) b.r[i] = (u32)at[2 * i * stride] | (u32)at[(2 * i + 1) * stride] << 16;
}

#endif
