// mma.h's product on the host. Which number of A or B a half word of an operand is, is said here once more, in other
// words than by the loads: if they disagree, products are wrong.
#pragma once

namespace ek_fibers {

// Half word `j` of a lane's A; that of B is at (k, column) instead of (row, k).
static inline int operand_k(int lane, int j) {
  if (EK_ORDER == 80) return (lane & 3) * 2 + (j & 1) + (j >> 2) * 8;
  return EK_ORDER == 12 ? (lane >> 4) * 8 + j : j;
}
static inline int operand_row(int lane, int j) {
  if (EK_ORDER == 80) return (lane >> 2) + (j >> 1 & 1) * 8;
  return EK_ORDER == 10 && lane >= 16 ? (lane - 8) & 15 : lane & 15;
}
static inline int operand_b_k(int lane, int j) {
  if (EK_ORDER == 80) return (lane & 3) * 2 + (j & 1) + (j >> 1 & 1) * 8;
  return operand_k(lane, j);
}
static inline int operand_b_col(int lane, int j) {
  if (EK_ORDER == 80) return (lane >> 2) + (j >> 2) * 8;
  return lane & 15;
}
static inline float operand(u32 bits) { return EK_F16 ? ek_f16((u16)bits) : ek_bf16((u16)bits); }

struct Operands {
  EkA a;
  EkB b;
};

struct Matrices {
  u32 turn;  // of the warp's exchanges
  float a[16][16], b[16][16];

  void gather(const Sent* all) {
    for (int lane = 0; lane < LANES; lane++) {
      const Operands from = sent_by<Operands>(all, lane);
      for (int j = 0; j < 2 * EK_OPERAND_WORDS; j++) {
        const int shift = (j & 1) * 16;
        a[operand_row(lane, j)][operand_k(lane, j)] = operand(from.a.r[j >> 1] >> shift & 0xffffu);
        b[operand_b_k(lane, j)][operand_b_col(lane, j)] = operand(from.b.r[j >> 1] >> shift & 0xffffu);
      }
    }
  }
};

// What this warp multiplies: put together by the first lane that asks for it.
static inline const Matrices& gathered(const Sent* all) {
  static Matrices of_warps[MOST_THREADS / LANES];
  const int warp = block.current / LANES;
  Matrices& m = of_warps[warp];
  if (m.turn != block.warps[warp].turn) m.gather(all);
  m.turn = block.warps[warp].turn;
  return m;
}

}  // namespace ek_fibers

EK_DEV void ek_mma(EkC& c, const EkA& a, const EkB& b, int lane, EK_FROM) {
  const ek_fibers::Operands mine = {a, b};
  if (lane != EK_TID % ek_fibers::LANES) ek_fibers::fail("ek_mma for lane %d, %s:%d", lane, file, line);
  const ek_fibers::Matrices& m =
      ek_fibers::gathered(ek_fibers::exchange({"ek_mma", file, line, 0}, &mine, sizeof mine));
  for (int i = 0; i < 8; i++) {
    const int row = ek_c_row(lane, i), col = ek_c_col(lane, i);
    float sum = 0.0f;
    for (int k = 0; k < 16; k++) sum += m.a[row][k] * m.b[k][col];
    c.r[i] += sum;
  }
}
