// That items of linear layers find room in their scratch, of any format and size, at any number of tokens, for the
// instruction sets with TESTED_REGISTERS vector registers: how layers are cut depends on nothing else of them.
#define EK_TIER tested
#define EK_SIMD_PLAIN
#include <stdio.h>

#include "simd.h"
#undef EK_VECTOR_REGISTERS
#define EK_VECTOR_REGISTERS TESTED_REGISTERS
#include "linear_cut.h"

using namespace tested;

// What is wrong with how a layer is cut; null if nothing is.
static const char* fault(const ek_linear* linear) {
  const ek_matrix* part = linear->parts;
  const cut c = cut_part(linear, part);
  if (c.item_panels < 1 || c.item_tokens < 1) return "nothing in an item";
  if (c.row_items * c.item_panels < c.panels || c.token_items * c.item_tokens < linear->tokens) return "too few items";
  const bool pairs = is_gated(linear) || tile_tokens(part, c.item_tokens).panels == 2;
  if (pairs && c.item_panels % 2) return "half a pair";
  if (64 * c.item_panels * c.item_tokens > SUMS_BYTES) return "sums";
  if (c.block_cols < part->cols && c.block_cols % EK_SUPER) return "a part of a super-block";
  const int64_t starts = pieces(least(part->cols, c.block_cols), 32) * (part->format == EK_Q6K ? 8 : 4);
  return !is_float(part) && starts * c.item_tokens > STARTS_BYTES ? "starts" : nullptr;
}

int main() {
  const int32_t units[] = {1, 2, 3, 7, 40, 342, 2736, 21888, 200000};
  const int32_t epilogues[] = {EK_STORE, EK_SILU_MUL};
  int faults = 0;
  for (int32_t format = EK_F32; format <= EK_Q8M; format++) {
    for (int32_t group = 0; group <= 128; group += 32) {
      ek_matrix matrix = {units, format, 1 << 20, 1 << 20, group};
      if (ek_matrix_check(&matrix)) continue;
      for (int32_t count : units) {
        matrix.cols = count * (int32_t)ek_unit_of(&matrix).cols;
        for (int64_t tokens = 1; tokens <= 400; tokens++) {
          for (int32_t epilogue : epilogues) {
            const ek_linear linear = {&matrix, 1, epilogue, nullptr, nullptr, nullptr, 0, tokens};
            const char* found = fault(&linear);
            if (found == nullptr || faults++ > 9) continue;
            printf("format %d, group %d, columns %d, tokens %d, epilogue %d: %s\n", format, group, matrix.cols,
                   (int)tokens, epilogue, found);
          }
        }
      }
    }
  }
  return faults > 0;
}
