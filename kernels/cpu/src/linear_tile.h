// What the tiles of a linear layer have in common.
//
// Lanes are outputs: a tile adds up M tokens by N panels of 16 rows in registers, going through the columns in order.
// Where it stops and another goes on, the sums rest in memory, as they were. So an output is the same to the bit
// whatever the tile's size, the chunk of columns or the number of tokens.
#pragma once
#include "panels.h"
#include "simd.h"

// Loops over the parts of a tile, which is in registers only if nothing is left of them. Where a vector is a loop
// itself, that would be a great deal of code for nothing.
#if EK_VECTOR_REGISTERS < 8
#define EK_UNROLL
#elif defined(__clang__)
#define EK_UNROLL _Pragma("unroll")
#else
#define EK_UNROLL _Pragma("GCC unroll 16")
#endif

namespace EK_TIER {

// Tokens of the largest tiles. Those that are one panel wide read weights as one stream, which memory is fastest with;
// wider ones load an activation once for two panels, which counts where arithmetic takes longer than memory. Quantised
// tiles have two sums a token and panel: with 32 registers 2 * 6 * 2 beside what else is needed (a few sums more in
// memory do not slow them down), else, with 16 of 8 lanes or 32 of 4, half as many as the others.
#if EK_VECTOR_REGISTERS >= 32
enum { WIDE_TILES = 1, FLOAT_WIDE = 14, FLOAT_NARROW = 6, INT_WIDE = 8, BYTES_NARROW = 6, BITS_NARROW = 3 };
#elif EK_VECTOR_REGISTERS < 8
enum { WIDE_TILES = 0, FLOAT_WIDE = 4, FLOAT_NARROW = 4, INT_WIDE = 4, BYTES_NARROW = 4, BITS_NARROW = 4 };
#else
enum { WIDE_TILES = 0, FLOAT_WIDE = 6, FLOAT_NARROW = 6, INT_WIDE = 4, BYTES_NARROW = 4, BITS_NARROW = 4 };
#endif

// What comes after a tile's weights in memory, fetched while it computes: `step` bytes further with each step of the
// tile (a fraction of a line if several tiles share the work), of each of its panels.
struct ahead {
  const char* at;
  int64_t step;
};

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t pieces(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }

}  // namespace EK_TIER
