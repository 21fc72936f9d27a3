// All kernels, compiled for the instruction set of the file that includes this; EK_TIER is its name and namespace, so
// that no function of one tier can stand in for another's at link time.
#include "append.h"
#include "attend.h"
#include "ek.h"
#include "linear.h"
#include "matrix_row.h"
#include "rows.h"
#include "simd.h"

namespace EK_TIER {

// Four streams of 64 bytes, so that the hardware's prefetchers have as much under way as they can.
static uint64_t read(const void* p, int64_t bytes) {
  const char* from = (const char*)p;
  const int64_t quarter = bytes / 256 * 64;
  vi sums[4] = {vi_zero(), vi_zero(), vi_zero(), vi_zero()};
  for (int64_t i = 0; i < quarter; i += 64) {
    for (int k = 0; k < 4; k++) sums[k] = vi_or(sums[k], vi_load(from + k * quarter + i));
  }
  for (int64_t i = 4 * quarter; i < bytes; i += 64) sums[0] = vi_or(sums[0], vi_load(from + i));
  uint64_t all[8];
  vi_store(all, vi_or(vi_or(sums[0], sums[1]), vi_or(sums[2], sums[3])));
  return all[0] | all[1] | all[2] | all[3] | all[4] | all[5] | all[6] | all[7];
}

#define EK_TEXT_OF(name) #name
#define EK_TEXT(name) EK_TEXT_OF(name)

static const ek_tier kernels = {EK_TEXT(EK_TIER), linear_items, linear_item, append_items, append_item, attend_items,
                                attend_item,      rows,         matrix_row,  read};

}  // namespace EK_TIER
