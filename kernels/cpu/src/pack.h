// From rows as files store them (kernels/quant/encodings.py) to panels.
#pragma once
#include "panels.h"

// Encoding.number.
enum ek_encoding {
  EK_ROWS_F32,
  EK_ROWS_F16,
  EK_ROWS_BF16,
  EK_ROWS_Q4_0,
  EK_ROWS_Q4_1,
  EK_ROWS_Q5_0,
  EK_ROWS_Q5_1,
  EK_ROWS_Q8_0,
  EK_ROWS_Q4_K,
  EK_ROWS_Q5_K,
  EK_ROWS_Q6_K,
  EK_ROWS_IQ4_NL,
  EK_ROWS_IQ4_XS,
  EK_ROWS_MXFP4,
  EK_ROWS_AFFINE4,
};

typedef struct ek_stored {
  int32_t format;       // ek_format that rows of the encoding are packed into
  int32_t block_cols;
  int32_t block_bytes;
} ek_stored;

// Of an encoding; `group` is affine4's, else 0. format is -1 where there is no such encoding.
ek_stored ek_stored_as(int32_t encoding, int32_t group);

// `blocks` blocks of a row to the panel, at the unit where they belong, as its row `lane`.
void ek_pack_blocks(int32_t encoding, int32_t group, const uint8_t* from, int64_t blocks, uint8_t* to, int lane);
