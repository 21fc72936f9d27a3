// Kernels that keep the rules of compat.h, and break one of them where EK_PLANT says so.
#pragma once
#include "common/compat.h"

#ifndef EK_PLANT
#define EK_PLANT 0
#endif

struct EkCase {
  u64 in;   // u32 [blocks, 128]
  u64 out;  // u32 [blocks, 128]
  int steps, blocks;
};
static_assert(sizeof(EkCase) == 24, "the mirror in Python has the same");

EK_DEV u64 ek_case_place(int i) { return (u64)((EK_BX * 128 + i) * 4); }

// Each block's numbers in reverse order, by way of shared memory.
EK_KERN(128) ek_reverse(EkCase p) {
  EK_SMEM u32 numbers[128];
  const int me = EK_TID;
  numbers[me] = ek_ldg4(p.in + ek_case_place(me));
  if (EK_PLANT != 1) EK_SYNC();  // 1: read before it is written
  ek_stg4(p.out + ek_case_place(me), numbers[127 - me]);
}

// `steps` times, each number and its left neighbour are added up.
EK_KERN(128) ek_neighbours(EkCase p) {
  EK_SMEM u32 numbers[128];
  const int me = EK_TID;
  u32 mine = ek_ldg4(p.in + ek_case_place(me));
  for (int i = 0; i < p.steps; i++) {
    numbers[me] = mine;
    EK_SYNC();
    mine += numbers[(me + 127) % 128];
    if (EK_PLANT != 1) EK_SYNC();  // 1: written for the next step while others still read
  }
  ek_stg4(p.out + ek_case_place(me), mine);
}

// The sum of a warp's numbers, by way of its own part of shared memory.
EK_KERN(128) ek_warp_sum(EkCase p) {
  EK_SMEM u32 numbers[128];
  const int me = EK_TID;
  numbers[me] = ek_ldg4(p.in + ek_case_place(me));
  if (EK_PLANT != 1) EK_WARP_SYNC();
  u32 sum = 0;
  for (int i = 0; i < 32; i++) sum += numbers[me / 32 * 32 + i];
  ek_stg4(p.out + ek_case_place(me), sum);
}

// Every thread may write, and all must write the same.
EK_KERN(128) ek_one_of_all(EkCase p) {
  EK_SMEM u32 number;
  const int me = EK_TID;
  number = ek_ldg4(p.in + ek_case_place(EK_PLANT == 1 ? me : 0));  // 1: the last one decides
  EK_SYNC();
  ek_stg4(p.out + ek_case_place(me), number);
}

// A block must not wait for another one's result.
EK_KERN(128) ek_chain(EkCase p) {
  const int me = EK_TID, from = EK_PLANT == 1 ? ek_max(0, EK_BX - 1) : EK_BX;
  const u64 before = (EK_PLANT == 1 ? p.out : p.in) + (u64)((from * 128 + me) * 4);
  ek_stg4(p.out + ek_case_place(me), ek_ldg4(before) + 1);
}

// Sums over warps by exchanges, and over the block by a barrier.
EK_KERN(128) ek_block_sum(EkCase p) {
  EK_SMEM u32 sums[4];
  const int me = EK_TID, lane = me & 31;
  u32 sum = ek_ldg4(p.in + ek_case_place(me));
  if (EK_PLANT == 1 && lane == 7) return;  // 1: a lane is missing
  if (EK_PLANT == 2 && lane < 16) {        // 2: the halves of a warp at different places
    sum += ek_shfl_xor(sum, 16);
  } else {
    sum += ek_shfl_xor(sum, EK_PLANT == 3 && lane < 16 ? 8 : 16);  // 3: with different masks
  }
  for (int mask = 8; mask > 0; mask >>= 1) {
    if (EK_PLANT == 4 && lane == 31 && mask == 1) break;  // 4: a lane goes on to the barrier
    sum += ek_shfl_xor(sum, mask);
  }
  if (lane == 0) sums[me / 32] = sum;
  if (EK_PLANT == 5 && me >= 96) {  // 5: a warp at another barrier
    EK_SYNC();
  } else if (EK_PLANT != 6 || me < 96) {  // 6: a warp at none
    EK_SYNC();
  }
  ek_stg4(p.out + ek_case_place(me), sums[0] + sums[1] + sums[2] + sums[3]);
}

// What shared memory has in it when nobody has written to it.
EK_KERN(128) ek_untouched(EkCase p) {
  EK_SMEM u32 numbers[128];
  const int me = EK_TID;
  ek_stg4(p.out + ek_case_place(me), numbers[me]);
  EK_SYNC();
  numbers[me] = 1;
}

// Four threads' numbers at once, from and to wherever the host says.
EK_KERN(32) ek_wide(EkCase p) {
  if (EK_TID < p.steps) ek_stg16(p.out + (u64)(EK_TID * 16), ek_ldg16(p.in + (u64)(EK_TID * 16)));
}

// An index past the end of shared memory, told by the host.
EK_KERN(32) ek_shared_index(EkCase p) {
  EK_SMEM u32 numbers[32];
  EK_SMEM u32 behind[32];
  const int me = EK_TID;
  numbers[me] = behind[me] = 1;
  EK_WARP_SYNC();
  const u32* at = numbers;
  ek_stg4(p.out + (u64)(me * 4), at[p.steps + me] + behind[me]);
}
