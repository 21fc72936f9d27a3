// The CPU kernels' types: what Python fills in and hands over (kernels/cpu/abi.py mirrors it), and what the parts of the
// library ask of each other. Plain C types only; every pointer outlives the call.
#pragma once
#include <stdint.h>

enum { EK_ABI_VERSION = 1 };

// What the exported functions answer: 0, or why they did nothing.
enum ek_error {
  EK_OK,
  EK_ERROR_NULL,     // a pointer that is needed is null
  EK_ERROR_KIND,     // an operation, format or epilogue that there is not
  EK_ERROR_SHAPE,    // sizes that are negative or contradict each other
  EK_ERROR_TOKEN,    // a token id that the embedding has no row for
  EK_ERROR_BATCH,    // spans, positions or rows that contradict each other
  EK_ERROR_BLOCK,    // a block table that does not cover its span, or a block of no segment
  EK_ERROR_BUSY,     // the pool is in another run
};

// ---------------------------------------------------------------------------------------------- weights
//
// A matrix [rows, cols] (y = W x) is kept in panels of 16 rows, so that the 16 lanes of a vector are 16 outputs and no
// sum over lanes is ever needed. Rows are padded with zeros to whole panels. Inside of a panel, columns go on:
//
//   EK_F32, EK_F16   [cols][16]
//   EK_BF16          [cols / 2][16][2]            pairs of columns, as a bf16 dot product takes them (odd cols: padded)
//   the others: for each 32 columns 512 values, "vector i" being columns 4i .. 4i + 3 of all 16 rows: [16][4] bytes
//   EK_Q8            [cols / 32] { u8 q[8][16][4]; f16 d[16] }                        w = d (q - 128)
//   EK_Q8F           [cols / 32] { u8 q[8][16][4]; f32 d[16] }                        w = d (q - 128)
//   EK_Q4            [cols / 32] { u8 q[4][16][4]; f16 d[16] }                        w = d (q - 8)
//                    byte of q[i]: low nibble vector i, high nibble vector i + 4
//   EK_Q4Z           [cols / group] { [group / 32] u8 q[4][16][4]; f16 d[16]; u8 z[16] }   w = d (q - z), group 32/64/128
//   EK_Q4K           [cols / 256] { f16 d[16]; f16 dmin[16]; u8 sc[8][16]; u8 m[8][16]; u8 q[8][4][16][4] }
//                                                                                     w = d sc q - dmin m
//   EK_Q5K           EK_Q4K, then u8 h[8][16][4]: bit i of a byte is bit 4 of vector i's value in that place
//   EK_Q6K           [cols / 256] { f16 d[16]; i8 sc[16][16] (by 16 columns, then row);
//                                   [8] { u8 q[4][16][4]; u8 h[2][16][4] } }          w = d sc (q - 32)
//                    h: bits 2 (i % 4), + 1 of h[i / 4] are bits 4 and 5 of vector i's value
//   EK_Q8M           [cols / 32] { u8 q[8][16][4]; f16 d[16]; f16 m[16] }             w = d q + m, q at most 127
enum ek_format { EK_F32, EK_F16, EK_BF16, EK_Q8, EK_Q8F, EK_Q4, EK_Q4Z, EK_Q4K, EK_Q5K, EK_Q6K, EK_Q8M };

enum { EK_PANEL = 16, EK_GROUP = 32, EK_SUPER = 256 };

typedef struct ek_matrix {
  const void* data;  // panels, 64-byte aligned
  int32_t format;
  int32_t rows;
  int32_t cols;
  int32_t group;  // EK_Q4Z: columns that share a scale; else 0
} ek_matrix;

// ---------------------------------------------------------------------------------------------- activations
//
// What a matrix is multiplied with, in the form that its format wants: EK_F32 and EK_F16 take f32, EK_BF16 takes bf16
// (rounded to nearest even), the others int8 in groups of 32 with one scale each: x = scale q, q in -127 .. 127,
// scale = max |x| / 127, and the sum of the group's q. Rows of T tokens; strides in elements.
enum ek_form { EK_FORM_F32 = 1, EK_FORM_BF16 = 2, EK_FORM_Q8 = 4 };

typedef struct ek_acts {
  const float* f32;
  const uint16_t* bf16;
  const int8_t* q8;
  const float* q8_scale;
  const int32_t* q8_sum;
  int64_t f32_stride;    // elements between rows of f32; the others alike
  int64_t bf16_stride;
  int64_t q8_stride;
  int64_t group_stride;  // of q8_scale and q8_sum
} ek_acts;

// ---------------------------------------------------------------------------------------------- one linear layer

enum ek_epilogue {
  EK_STORE,     // out = y
  EK_ADD,       // out += y
  EK_SILU_MUL,  // panels alternate gate, up: out = silu(gate) up, half as many columns
  EK_GELU_MUL,  // the same with gelu (tanh form)
};

typedef struct ek_linear {
  const ek_matrix* parts;  // one under the other; each begins on a column of its own in `out`, unpadded
  int32_t num_parts;
  int32_t epilogue;        // of the gated ones there is one part whose rows are a multiple of 32
  const float* bias;       // [rows of all parts] in their order, or null
  const ek_acts* acts;
  float* out;              // [tokens][out_stride]
  int64_t out_stride;
  int64_t tokens;
} ek_linear;

// ---------------------------------------------------------------------------------------------- the KV cache
//
// A segment is [layers][2][kv_heads][blocks][plane] (K is 0, V is 1), `plane` being one block of one head:
//   EK_KV_F32, EK_KV_F16   K [head_dim][block_size], V [block_size][head_dim]
//   EK_KV_BF16             K [head_dim / 2][block_size][2], V [block_size / 2][head_dim][2]
//   EK_KV_INT8             as EK_KV_BF16, in bytes, symmetric; after all planes of the segment the scales, f16
//                          [layers][2][kv_heads][blocks][block_size]: max |x| / 127 of a token and head
// Block size is a multiple of 16, head_dim of 16. K is kept after RoPE. A slot is written before it is read; slots past
// a sequence's end hold anything, NaN too, and never reach a result.
enum ek_kv_format { EK_KV_F32, EK_KV_F16, EK_KV_BF16, EK_KV_INT8 };

typedef struct ek_segment {
  void* data;
  int64_t num_blocks;
} ek_segment;

typedef struct ek_cache {
  const ek_segment* segments;  // by index; data is null where there is none
  int32_t num_segments;
  int32_t segment_shift;       // block id = segment << shift | block of the segment
  int32_t format;
  int32_t num_layers;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t block_size;
} ek_cache;

// ---------------------------------------------------------------------------------------------- one step
//
// Spans of consecutive tokens, one a sequence, whose rows lie end to end (kernels/attn/ragged.py has the same).
typedef struct ek_batch {
  int64_t tokens, spans, samples;
  const int64_t* token_ids;     // [tokens]
  const int64_t* positions;     // [tokens]
  const int64_t* sample_rows;   // [samples]
  const int64_t* starts;        // [spans] position of the first token
  const int64_t* lengths;       // [spans]
  const int64_t* first_rows;    // [spans]
  const int64_t* blocks;        // block tables end to end
  const int64_t* table_starts;  // [spans + 1]
} ek_batch;

typedef struct ek_attend {
  const ek_cache* cache;
  const ek_batch* batch;
  int32_t layer;
  int32_t heads;         // query heads; a multiple of the cache's kv_heads
  int32_t window;        // 0: none; W: a token sees itself and the W - 1 before it
  float scale;           // of q.k
  float softcap;         // 0: none; c: s becomes c tanh(s / c)
  const float* q;        // [tokens][q_stride], after RoPE
  int64_t q_stride;
  const float* k;        // [tokens][k_stride], after RoPE: what append writes
  int64_t k_stride;
  const float* v;
  int64_t v_stride;
  float* out;            // [tokens][out_stride]
  int64_t out_stride;
  void* shared;          // scratch of all threads, ek_attend_shared_bytes
} ek_attend;

// ---------------------------------------------------------------------------------------------- a model's program
//
// A model is a list of operations over numbered float32 buffers [rows][width]; all threads run through it together.
enum ek_op_kind {
  EK_OP_EMBED,        // dst = scale * row `token id` of parts[0]
  EK_OP_ROPE_TABLE,   // table `rope`: cos and sin of position * weight[i], times scale; width = head_dim / 2
  EK_OP_NORM,         // RMSNorm of src (eps, weight): to dst if >= 0, and to the prepared activations in `forms`
  EK_OP_NORM_ADD,     // dst += RMSNorm(src)
  EK_OP_PREPARE,      // src to the prepared activations in `forms`
  EK_OP_LINEAR,       // prepared activations through parts, bias, epilogue, to dst
  EK_OP_ROPE_APPEND,  // src is q, k, v side by side: norms of q (weight) and k (weight2) heads if any, RoPE by table
                      // `rope` in place, then k and v into the cache
  EK_OP_ATTEND,       // src's q (see above) to dst [heads * head_dim]
  EK_OP_SOFTCAP,      // dst = softcap * tanh(dst / softcap)
  EK_OP_GATHER,       // row i of dst = row sample_rows[i] of src: from here on only what is sampled is computed
};

typedef struct ek_op {
  int32_t kind;
  int32_t src;
  int32_t dst;
  int32_t width;       // columns of src (EMBED: of dst)
  int32_t forms;       // ek_form bits
  int32_t of_samples;  // 1: the operation has one row for each sampling token, not for each token
  int32_t layer;
  int32_t window;
  int32_t rope;
  int32_t num_parts;
  int32_t epilogue;
  float eps;
  float scale;
  float softcap;
  const ek_matrix* parts;
  const float* weight;
  const float* weight2;
  const float* bias;
} ek_op;

typedef struct ek_buffer {
  float* data;
  int64_t stride;  // elements between rows
} ek_buffer;

typedef struct ek_program {
  const ek_op* ops;
  int32_t num_ops;
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t rope_dim;  // leading dimensions of a head that RoPE turns (half-split pairs); head_dim in most models
} ek_program;

typedef struct ek_step {
  const ek_batch* batch;
  const ek_cache* cache;
  const ek_buffer* buffers;
  ek_acts prepared;      // the one set of prepared activations, written by NORM and PREPARE, read by LINEAR
  float* rope_tables;    // [tables][tokens][head_dim] : cos of head_dim / 2, then sin
  void* attend_shared;
  int64_t* op_ns;        // [num_ops] nanoseconds of each operation are added here; null: not measured
} ek_step;

// ---------------------------------------------------------------------------------------------- one tier
//
// The kernels as compiled for one instruction set. Work comes in items that any thread may do in any order; results do
// not depend on which. `scratch` is EK_SCRATCH bytes of the thread's own, 64-byte aligned.
enum { EK_SCRATCH = 2 << 20, EK_SOFTCAP_PART = 4096 };

typedef struct ek_tier {
  const char* name;
  int64_t (*linear_items)(const ek_linear*, int32_t threads);
  void (*linear_item)(const ek_linear*, int64_t item, void* scratch);
  int64_t (*append_items)(const ek_attend*, int32_t threads);
  void (*append_item)(const ek_attend*, int64_t item, void* scratch);
  int64_t (*attend_items)(const ek_attend*, int32_t threads);
  void (*attend_item)(const ek_attend*, int64_t item, void* scratch);
  // Rows: see rows.h. One call does rows first .. stop - 1 of the operation; of EK_OP_SOFTCAP parts of rows.
  void (*rows)(const ek_program*, const ek_op*, const ek_step*, int64_t first, int64_t stop, void* scratch);
  // Row `row` of a matrix in float32, the exact values; bit for bit what its source format means.
  void (*matrix_row)(const ek_matrix*, int64_t row, float* out);
  // Reads `bytes` (a multiple of 64) at p, 64-byte aligned; answers something that depends on all of them.
  uint64_t (*read)(const void* p, int64_t bytes);
} ek_tier;
