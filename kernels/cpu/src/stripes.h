// In which order the items of a linear layer are claimed.
#pragma once
#include <stdint.h>

// The item of turn `turn` of 0 .. items - 1: of as many stretches as there are threads, each in turn gives its next item.
// Threads that keep step so go through memory without a jump, each through its own stretch, and what was fetched past an
// item's end was not fetched in vain; one that falls behind leaves its turns to the others.
static inline int64_t ek_striped(int64_t turn, int64_t items, int64_t threads) {
  const int64_t stretch = turn % threads, whole = items / threads, rest = items % threads;
  return stretch * whole + (stretch < rest ? stretch : rest) + turn / threads;
}
