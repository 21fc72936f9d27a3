// The functions that the library exports, and the choice of a tier by what the processor has.
#include <string.h>

#include "pool.h"
#include "program.h"
#include "stripes.h"
#include "tiers.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#define EK_EXPORT extern "C" __attribute__((visibility("default")))

#ifndef EK_SOURCE_HASH
#define EK_SOURCE_HASH ""
#endif

namespace {

#if defined(__x86_64__)
// Registers that the system saves for us (XCR0): it would lose the others at the next change of threads.
uint64_t saved_by_system() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

// Bits by Intel's manual (volume 2, CPUID) and AMD's (volume 3, appendix E).
bool has_avx2() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
  const uint32_t fma = 1u << 12, osxsave = 1u << 27, f16c = 1u << 29;
  if ((c & (fma | osxsave | f16c)) != (fma | osxsave | f16c)) return false;
  if ((saved_by_system() & 0x6) != 0x6) return false;  // xmm, ymm
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & (1u << 5));
}

bool has_avx512() {
  uint32_t a, b, c, d;
  if (!has_avx2() || (saved_by_system() & 0xE6) != 0xE6) return false;  // and opmask, zmm
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const uint32_t f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31, vnni = 1u << 11;
  if ((b & (f | dq | bw | vl)) != (f | dq | bw | vl) || !(c & vnni)) return false;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));  // bf16
}

bool has_neon() { return false; }
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#if defined(__aarch64__) && defined(__linux__)
bool has_neon() {
  const unsigned long wanted = 1ul << 9 | 1ul << 10 | 1ul << 20;  // HWCAP_FPHP, HWCAP_ASIMDHP, HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & wanted) == wanted;
}
#else
bool has_neon() { return true; }  // where it is compiled in, it is for the machine at hand: all of Apple's have it
#endif
#endif

const int TIERS = 4;

// Best first; null where the processor or the build lacks it.
void usable_tiers(const ek_tier* tiers[TIERS]) {
  tiers[0] = has_avx512() ? ek_tier_avx512() : nullptr;
  tiers[1] = has_avx2() ? ek_tier_avx2() : nullptr;
  tiers[2] = has_neon() ? ek_tier_neon() : nullptr;
  tiers[3] = ek_tier_plain();
}

}  // namespace

EK_EXPORT int32_t ek_abi_version() { return EK_ABI_VERSION; }

EK_EXPORT const char* ek_source_hash() { return EK_SOURCE_HASH; }

// Names of the tiers that work here, best first, a line each. Answers the bytes that takes, with the 0 at the end.
EK_EXPORT int32_t ek_tiers(char* names, int32_t size) {
  const ek_tier* tiers[TIERS];
  usable_tiers(tiers);
  int32_t used = 0;
  for (const ek_tier* tier : tiers) {
    if (tier == nullptr) continue;
    const char* texts[2] = {used == 0 ? "" : "\n", tier->name};
    for (const char* text : texts) {
      for (; *text; text++, used++) {
        if (used < size - 1) names[used] = *text;
      }
    }
  }
  if (size > 0) names[used < size ? used : size - 1] = 0;
  return used + 1;
}

EK_EXPORT void* ek_pool_new(const char* name, int32_t threads, const int32_t* cpus) {
  const ek_tier* tiers[TIERS];
  usable_tiers(tiers);
  for (const ek_tier* tier : tiers) {
    if (tier != nullptr && (name == nullptr || strcmp(name, tier->name) == 0)) return ek_pool_make(tier, threads, cpus);
  }
  return nullptr;
}

EK_EXPORT void ek_pool_free(void* pool) { ek_pool_end((ek_pool*)pool); }

EK_EXPORT const char* ek_pool_tier_name(void* pool) { return ek_pool_tier((ek_pool*)pool)->name; }

EK_EXPORT int32_t ek_pool_threads(void* pool) { return ek_pool_size((ek_pool*)pool); }

EK_EXPORT int32_t ek_run(void* pool, const ek_program* program, const ek_step* step) {
  return pool == nullptr ? (int32_t)EK_ERROR_NULL : ek_program_run((ek_pool*)pool, program, step);
}

// One operation of the program, or one like it.
EK_EXPORT int32_t ek_rows_run(void* pool, const ek_program* program, const ek_op* op, const ek_step* step) {
  if (pool == nullptr || program == nullptr || op == nullptr) return EK_ERROR_NULL;
  ek_program one = *program;
  one.ops = op;
  one.num_ops = 1;
  return ek_program_run((ek_pool*)pool, &one, step);
}

namespace {

struct job {
  const ek_tier* tier;
  const ek_linear* linear;
  const ek_attend* attend;
  int64_t items;  // of the linear layer
  int32_t threads;
};

}  // namespace

EK_EXPORT int32_t ek_linear_run(void* pool, const ek_linear* linear) {
  if (pool == nullptr) return EK_ERROR_NULL;
  const int32_t error = ek_linear_check(linear);
  if (error || linear->tokens == 0) return error;
  job self = {ek_pool_tier((ek_pool*)pool), linear, nullptr, 0, 0};
  self.threads = ek_pool_size((ek_pool*)pool);
  self.items = self.tier->linear_items(linear, self.threads);
  const auto item = [](void* context, int64_t i, void* scratch) {
    const job* self = (const job*)context;
    self->tier->linear_item(self->linear, ek_striped(i, self->items, self->threads), scratch);
  };
  return ek_pool_each((ek_pool*)pool, self.items, item, &self);
}

// The batch's k and v into the cache, its q over the cache, or one after the other. What only the other one
// needs may be null.
EK_EXPORT int32_t ek_attend_run(void* pool, const ek_attend* attend, int32_t append, int32_t attends) {
  if (pool == nullptr) return EK_ERROR_NULL;
  const int32_t error = ek_attend_check(attend);
  if (error) return error;
  if (append && (attend->k == nullptr || attend->v == nullptr)) return EK_ERROR_NULL;
  if (attends && (attend->q == nullptr || attend->out == nullptr || attend->shared == nullptr)) return EK_ERROR_NULL;
  job self = {ek_pool_tier((ek_pool*)pool), nullptr, attend, 0, 0};
  const int32_t threads = ek_pool_size((ek_pool*)pool);
  int32_t answer = EK_OK;
  if (append) {
    const auto item = [](void* context, int64_t i, void* scratch) {
      ((job*)context)->tier->append_item(((job*)context)->attend, i, scratch);
    };
    answer = ek_pool_each((ek_pool*)pool, self.tier->append_items(attend, threads), item, &self);
  }
  if (attends && answer == EK_OK) {
    const auto item = [](void* context, int64_t i, void* scratch) {
      ((job*)context)->tier->attend_item(((job*)context)->attend, i, scratch);
    };
    answer = ek_pool_each((ek_pool*)pool, self.tier->attend_items(attend, threads), item, &self);
  }
  return answer;
}

namespace {

const int64_t READ_PART = 1 << 20;

struct reading {
  const ek_tier* tier;
  const char* from;
  int64_t bytes;
  uint64_t seen;
};

void read_item(void* context, int64_t item, void*) {
  reading* self = (reading*)context;
  const int64_t first = item * READ_PART, left = self->bytes - first;
  const uint64_t seen = self->tier->read(self->from + first, left < READ_PART ? left : READ_PART);
  if (seen == 0x0123456789ABCDEF) __atomic_store_n(&self->seen, seen, __ATOMIC_RELAXED);  // so that it is not left out
}

}  // namespace

// Reads all of it once, on all threads: what a kernel that reads as much is compared with. Answers a number that means
// nothing.
EK_EXPORT double ek_read(void* pool, const void* p, int64_t bytes) {
  if (pool == nullptr || p == nullptr || bytes < 64 || (uintptr_t)p % 64) return -1;
  reading self = {ek_pool_tier((ek_pool*)pool), (const char*)p, bytes / 64 * 64, 0};
  const int32_t error = ek_pool_each((ek_pool*)pool, (self.bytes + READ_PART - 1) / READ_PART, read_item, &self);
  return error ? -1 : (double)self.seen;
}
