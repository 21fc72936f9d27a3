// What the sampler's kernels agree on: a row's settings, the order of its tokens, and their weights.
//
// Likeliest first, of equals the lower id: a token's rank is one number of 64 bits, the smaller the likelier.
//
// Weights are whole numbers. exp((x - peak) / T) is computed in float32 from the token and the row's peak alone, and
// then cut off to a multiple of 2^-44. Sums of whole numbers are the same in whatever order they are made, by however
// many threads, in whatever turns of an atomic addition: so a row's token is a function of its logits and its settings.
// The peak weighs 2^44, so the weights of 2^19 tokens are at most 2^63; what is below 2^-44 of the peak weighs nothing,
// all of it together less than float32's rounding of the peak.
#pragma once
#include "common/compat.h"

constexpr float EK_LARGEST = 3.4028234663852886e38f;  // beyond is infinity
constexpr float EK_LOG2_E = 1.4426950408889634f;

enum : int {
  EK_ROW_EDITED = 1,    // its logits are edited at every step
  EK_ROW_COUNTED = 2,   // it has a row in the table of counts
  EK_ROW_LOGPROBS = 4,  // and wants them
};

struct EkSampleRow {
  u64 seed, counter;  // of its random number: how many tokens it has had; the sampler adds one at every step
  u64 top_p;          // of 2^64; 0: no limit
  int top_k;          // 0: no limit
  float scale;        // log2 e / temperature; 0: the likeliest token is taken
  float min_p;
  float repetition, frequency, presence;  // penalties; 1, 0 and 0 change nothing
  int counts_row;     // of the table
  int num_edits;      // numbers that are added to single tokens
  int num_banned;     // tokens that come after these in edit_ids, and may not be drawn
  int least_tokens;   // before it has had so many
  int flags;
  int num_top;        // how many of the likeliest tokens to report
};
static_assert(sizeof(EkSampleRow) == 72, "the mirror in Python has the same");

struct EkSample {
  u64 logits, scores;         // float32 [rows, vocab]; scores: where edited rows are written
  EkSampleRow* rows;          // [rows]
  const int* edit_ids;        // [rows, edits_stride]: first what is added to, each id once, then what is banned
  const float* edit_values;   // [rows, edits_stride]
  u16* counts;                // [.., vocab]: 15 bits for how often in the output, the highest for being in the prompt
  u64* bests;                 // [rows, chunks]: the best rank of each chunk, edited
  u64* raw_bests;             // [rows, chunks]: and as the logits were
  int* tokens;                // [rows]
  int* faults;                // [rows]: 1 where no token can be chosen
  float* logprobs;            // [rows]
  int* top_ids;               // [rows, max_top]; -1 behind the last
  float* top_logprobs;        // [rows, max_top]
  i64 logits_stride, scores_stride, counts_stride;  // numbers from row to row
  int vocab, chunks, max_top, edits_stride;
};
static_assert(sizeof(EkSample) == 144, "the mirror in Python has the same");

// Tokens that one thread block of sample_edit sees to.
constexpr int EK_CHUNK = 2048;

// How many of a row's tokens are banned at this step.
EK_DEV int ek_banned(const EkSampleRow& s) { return s.counter < (u64)s.least_tokens ? s.num_banned : 0; }

// Whether its scores are those that sample_edit wrote, and not the logits.
EK_DEV bool ek_is_edited(const EkSampleRow& s) { return s.flags & EK_ROW_EDITED || ek_banned(s) > 0; }

// ---- order

// Whole numbers in the order of the logits turned round: the largest is first. Zero has one key.
EK_DEV u32 ek_key(float x) {
  const u32 bits = ek_asuint(x + 0.0f);
  return bits >> 31 ? bits : bits ^ 0x7fffffffu;
}
EK_DEV float ek_logit_of(u32 key) { return ek_asfloat(key >> 31 ? key : key ^ 0x7fffffffu); }

constexpr u32 EK_FIRST_KEY = 0x7fffffffu ^ 0x7f7fffffu;  // of the largest number; below are infinity and, here, NaN
constexpr u32 EK_NO_KEY = 0xff800000u;                    // of -infinity, an impossible token

EK_DEV u64 ek_rank(float x, int id) { return (u64)(x <= EK_LARGEST ? ek_key(x) : 0u) << 32 | (u32)id; }
EK_DEV u32 ek_key_of(u64 rank) { return (u32)(rank >> 32); }
EK_DEV int ek_id_of(u64 rank) { return (int)(u32)rank; }

// ---- weights

constexpr int EK_WEIGHT_BITS = 44;

// How a row's tokens are looked at.
struct EkView {
  u64 scores;   // address of the row
  int vocab;
  float peak;
  float scale;  // of the difference to the peak, to units of log 2
  float min_p;  // tokens below so much of the peak's weight have none
  bool all;     // also tokens that weigh nothing are counted, but for impossible ones
};

// Halvings from the peak to x: not below 0.
EK_DEV float ek_halvings(const EkView& view, float x) { return (view.peak - x) * view.scale; }

EK_DEV u64 ek_weight(const EkView& view, float x) {
  const float halvings = ek_halvings(view, x);
  if (!(halvings < (float)EK_WEIGHT_BITS)) return 0;
  const float weight = halvings > 0.0f ? ek_exp2(-halvings) : 1.0f;
  if (weight < view.min_p) return 0;
  const u32 bits = ek_asuint(weight);
  const int shift = (int)(bits >> 23) - (127 + 23 - EK_WEIGHT_BITS);
  const u64 digits = (bits & 0x7fffffu) | 0x800000u;
  return shift >= 0 ? digits << shift : digits >> ek_min(-shift, 63);
}

EK_DEV bool ek_is_counted(const EkView& view, float x, u64 weight) {
  return view.all ? x >= -EK_LARGEST : weight > 0;
}

// ---- random numbers

EK_DEV u64 ek_mix(u64 x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

// The number of a stream as a share of 2^64; a multiple of 2^11. As edgekv/core/rng.py has it.
EK_DEV u64 ek_uniform(u64 seed, u64 counter) {
  const u64 golden = 0x9e3779b97f4a7c15ull;
  return ek_mix(ek_mix(seed + golden) + (counter + 1) * golden) >> 11 << 11;
}

// a b / 2^64, rounded down.
EK_DEV u64 ek_part_of(u64 a, u64 b) {
  const u64 a0 = a & 0xffffffffu, a1 = a >> 32, b0 = b & 0xffffffffu, b1 = b >> 32;
  const u64 middle = a1 * b0 + (a0 * b0 >> 32);
  return a1 * b1 + (middle >> 32) + ((a0 * b1 + (middle & 0xffffffffu)) >> 32);
}
