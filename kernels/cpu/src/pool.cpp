#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <new>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// How long a thread that waits keeps its core to itself, and how long until it sleeps. In between it yields after each
// look, which costs those who share the core nothing measurable, while a thread that only spins takes half of it: often
// that of the thread it waits for, since a thread is woken on the core of whoever woke it. To wake a sleeping thread
// takes 8 microseconds of the caller's time, and some 20 until it works; a millisecond outlasts the gap between steps.
const int64_t SPIN_NS = 4 * 1000;
const int64_t AWAKE_NS = 1000 * 1000;
const int SPINS_PER_LOOK = 32;  // at the clock

// What a share counts down from, so that threads that ask in vain never borrow from the phase's number above it.
const int64_t NONE_LEFT = 1 << 20;
// Phases have even numbers; this bit beside one says that the run ended with it.
const uint32_t OVER = 1;

int64_t now_ns() {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000ll + now.tv_nsec;
}

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("isb");
#endif
}

// Results below 1e-38 become 0 and such inputs count as 0, on every thread alike: a softmax's tail would otherwise cost
// hundreds of cycles a number. Answers what was set before.
uint64_t flush_denormals() {
#if defined(__x86_64__)
  const uint32_t before = _mm_getcsr();
  _mm_setcsr(0x1F80 | 0x8000 | 0x40);  // all exceptions masked, to nearest; flush to zero, denormals are zero
  return before;
#elif defined(__aarch64__)
  uint64_t before;
  __asm__ __volatile__("mrs %0, fpcr" : "=r"(before));
  const uint64_t flushing = 1ull << 24;
  __asm__ __volatile__("msr fpcr, %0" : : "r"(flushing));
  return before;
#else
  return 0;
#endif
}

void restore_denormals(uint64_t before) {
#if defined(__x86_64__)
  _mm_setcsr((uint32_t)before);
#elif defined(__aarch64__)
  __asm__ __volatile__("msr fpcr, %0" : : "r"(before));
#else
  (void)before;
#endif
}

// A thread's own memory; touched first by its thread, so that it lies near its core.
void* map_scratch() {
  const size_t room = 2 * (size_t)EK_SCRATCH;  // so that a whole huge page fits
  char* all = (char*)mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  char* scratch = (char*)(((uintptr_t)all + EK_SCRATCH - 1) / EK_SCRATCH * EK_SCRATCH);
  if (scratch > all) munmap(all, scratch - all);
  if (scratch + EK_SCRATCH < all + room) munmap(scratch + EK_SCRATCH, all + room - (scratch + EK_SCRATCH));
#if defined(MADV_HUGEPAGE)
  madvise(scratch, EK_SCRATCH, MADV_HUGEPAGE);
#endif
  return scratch;
}

// A thread and its share of a phase's items. Others take from it when they are done with their own.
struct alignas(64) worker {
  std::atomic<uint64_t> share;  // number of the phase << 32 | NONE_LEFT + items that nobody has claimed
  ek_pool* pool;
  void* scratch;
  pthread_t thread;
  int32_t number;
  int32_t cpu;  // -1: anywhere
};

}  // namespace

struct ek_pool {
  // What waiting threads look at and sleep on: the number of the phase, and OVER between runs.
  alignas(64) std::atomic<uint32_t> opened;
  std::atomic<uint32_t> sleepers;
  // Written by the thread that opens a phase, read by threads with an item of it: the phase cannot end meanwhile.
  ek_phase work;
  // Items of the phase that are done and reported.
  alignas(64) std::atomic<int64_t> finished;
  ek_next_phase next;
  void* context;
  // Hardly ever written.
  alignas(64) const ek_tier* tier;
  worker* workers;  // [asked]; number 0 is the caller
  int32_t asked;
  int32_t size;     // of these, there are
  pid_t process;
  std::atomic<uint32_t> busy;
  std::atomic<uint32_t> stopping;
#if !defined(__linux__)
  pthread_mutex_t mutex;
  pthread_cond_t condition;
#endif
};

namespace {

// What a thread waits for: a phase after `phase`, or, if it is the caller, the end of the run.
struct wait {
  uint32_t phase;
  bool caller;
};

bool met(const wait& what, uint32_t opened) {
  return (int32_t)((opened & ~OVER) - what.phase) > 0 || (what.caller && (opened & OVER));
}

void sleep_until(ek_pool* pool, const wait& what) {
  pool->sleepers.fetch_add(1);
#if defined(__linux__)
  const uint32_t opened = pool->opened.load();
  if (!met(what, opened)) syscall(SYS_futex, &pool->opened, FUTEX_WAIT_PRIVATE, opened, nullptr, nullptr, 0);
#else
  pthread_mutex_lock(&pool->mutex);
  while (!met(what, pool->opened.load())) pthread_cond_wait(&pool->condition, &pool->mutex);
  pthread_mutex_unlock(&pool->mutex);
#endif
  pool->sleepers.fetch_sub(1);
}

void wake_sleepers(ek_pool* pool) {
  // Who counts itself in after this look sees `opened` as it is now.
  if (pool->sleepers.load() == 0) return;
#if defined(__linux__)
  syscall(SYS_futex, &pool->opened, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#else
  pthread_mutex_lock(&pool->mutex);
  pthread_cond_broadcast(&pool->condition);
  pthread_mutex_unlock(&pool->mutex);
#endif
}

void wait_until(ek_pool* pool, const wait& what) {
  int64_t began = 0;
  for (;;) {
    for (int i = 0; i < SPINS_PER_LOOK; i++) {
      if (met(what, pool->opened.load(std::memory_order_acquire))) return;
      pause();
    }
    const int64_t now = now_ns();
    if (began == 0) began = now;
    if (now - began > AWAKE_NS) break;
    if (now - began > SPIN_NS) sched_yield();
  }
  while (!met(what, pool->opened.load(std::memory_order_acquire))) sleep_until(pool, what);
}

// Shares come last: the phase cannot end, and another thread open the next one, before all of it is published.
void publish(ek_pool* pool, int64_t items) {
  const uint32_t phase = (pool->opened.load(std::memory_order_relaxed) & ~OVER) + 2;
  pool->opened.store(phase);
  int64_t first = 0;
  for (int64_t i = 1; i <= pool->size; i++) {
    const int64_t stop = items * i / pool->size;
    const uint64_t left = (uint64_t)(NONE_LEFT + stop - first);
    pool->workers[i - 1].share.store((uint64_t)phase << 32 | left, std::memory_order_release);
    first = stop;
  }
  wake_sleepers(pool);
}

// By one thread, when there is nothing left of the last phase: does what it can alone, and opens the next for all.
void open_next(ek_pool* pool, void* scratch) {
  pool->finished.store(0, std::memory_order_relaxed);
  ek_phase phase;
  for (;;) {
    if (!pool->next(pool->context, &phase)) {
      pool->opened.fetch_or(OVER);  // from here on the caller may be in its next run
      wake_sleepers(pool);
      return;
    }
    if (phase.items > 1 && pool->size > 1) break;
    for (int64_t i = 0; i < phase.items; i++) phase.item(phase.context, i, scratch);
  }
  pool->work = phase;
  publish(pool, phase.items);
}

int64_t left_of(uint64_t share) { return (int64_t)(uint32_t)share - NONE_LEFT; }

// Does items of the thread's own share, then of the others', as long as there are any; answers the number of a phase
// that has none left. Until it reports what it did, the phase cannot end, and so all these items are of one phase.
uint32_t do_items(ek_pool* pool, const worker* self) {
  for (;;) {
    ek_phase work = {nullptr, nullptr, 0};
    int64_t count = 0;
    uint32_t oldest = 0;
    for (int32_t i = 0; i < pool->size; i++) {
      const int32_t from = self->number + i < pool->size ? self->number + i : self->number + i - pool->size;
      std::atomic<uint64_t>* share = &pool->workers[from].share;
      uint64_t seen = share->load(std::memory_order_acquire);
      while (left_of(seen) > 0) {
        seen = share->fetch_sub(1, std::memory_order_acquire);
        if (left_of(seen) <= 0) break;
        if (count++ == 0) work = pool->work;
        work.item(work.context, work.items * (from + 1) / pool->size - left_of(seen), self->scratch);
        seen = share->load(std::memory_order_acquire);
      }
      const uint32_t phase = (uint32_t)(seen >> 32);
      // While a phase is being opened, some shares are still of the last: whoever sees one looks again.
      if (i == 0 || (int32_t)(phase - oldest) < 0) oldest = phase;
    }
    if (count == 0) return oldest;
    if (pool->finished.fetch_add(count, std::memory_order_acq_rel) + count == work.items) open_next(pool, self->scratch);
  }
}

void* worker_main(void* argument) {
  worker* self = (worker*)argument;
  ek_pool* pool = self->pool;
#if defined(__linux__)
  char name[16];
  snprintf(name, sizeof name, "ek-cpu-%d", self->number);
  pthread_setname_np(pthread_self(), name);
  if (self->cpu >= 0) {
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(self->cpu, &cpus);
    sched_setaffinity(0, sizeof cpus, &cpus);
  }
#endif
  flush_denormals();
  wait_until(pool, wait{0, false});  // the pool is not whole yet
  for (;;) {
    const uint32_t phase = do_items(pool, self);
    if (pool->stopping.load(std::memory_order_acquire)) return nullptr;
    wait_until(pool, wait{phase, false});
  }
}

bool start(worker* self) {
  if (self->scratch == nullptr) return false;
  if (self->number == 0) return true;  // the caller
  sigset_t all, before;  // signals are the business of the process's own threads
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int failed = pthread_create(&self->thread, nullptr, worker_main, self);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return failed == 0;
}

// A fork took the other threads away, perhaps in the middle of a run.
void begin_anew_after_fork(ek_pool* pool) {
  pool->process = getpid();
  pool->size = 1;
  pool->sleepers.store(0);
  pool->busy.store(0);
}

bool over(const ek_pool* pool) { return pool->opened.load(std::memory_order_acquire) & OVER; }

}  // namespace

int32_t ek_pool_run(ek_pool* pool, ek_next_phase next, void* context) {
  if (pool->process != getpid()) begin_anew_after_fork(pool);
  if (pool->busy.exchange(1, std::memory_order_acquire)) return EK_ERROR_BUSY;
  const uint64_t mode = flush_denormals();
  void* scratch = pool->workers[0].scratch;
  pool->next = next;
  pool->context = context;
  publish(pool, 0);  // the run has begun: who sleeps wakes up while the caller does the first items
  open_next(pool, scratch);
  while (!over(pool)) {
    const uint32_t phase = do_items(pool, &pool->workers[0]);
    wait_until(pool, wait{phase, true});
  }
  restore_denormals(mode);
  pool->busy.store(0, std::memory_order_release);
  return EK_OK;
}

namespace {

struct one_phase {
  ek_phase phase;
  bool done;
};

int32_t the_one(void* context, ek_phase* phase) {
  one_phase* one = (one_phase*)context;
  if (one->done) return 0;
  one->done = true;
  *phase = one->phase;
  return 1;
}

}  // namespace

int32_t ek_pool_each(ek_pool* pool, int64_t items, void (*item)(void*, int64_t, void*), void* context) {
  if (items < 0 || items > EK_MOST_ITEMS) return EK_ERROR_SHAPE;
  one_phase one = {{item, context, items}, false};
  return ek_pool_run(pool, the_one, &one);
}

const ek_tier* ek_pool_tier(const ek_pool* pool) { return pool->tier; }

int32_t ek_pool_size(const ek_pool* pool) { return pool->size; }

ek_pool* ek_pool_make(const ek_tier* tier, int32_t threads, const int32_t* cpus) {
  if (tier == nullptr || threads < 1 || threads > 1024) return nullptr;
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, sizeof(ek_pool)) != 0) return nullptr;
  ek_pool* pool = new (memory) ek_pool();
  pool->tier = tier;
  pool->process = getpid();
  pool->opened.store(OVER);
#if !defined(__linux__)
  pthread_mutex_init(&pool->mutex, nullptr);
  pthread_cond_init(&pool->condition, nullptr);
#endif
  if (posix_memalign(&memory, 64, threads * sizeof(worker)) == 0) {
    pool->workers = (worker*)memory;
    pool->asked = threads;
  }
  for (int32_t i = 0; i < pool->asked; i++) {
    worker* self = new (&pool->workers[i]) worker();
    self->share.store(NONE_LEFT);
    self->pool = pool;
    self->scratch = map_scratch();
    self->number = i;
    self->cpu = cpus == nullptr ? -1 : cpus[i];
  }
  while (pool->size < pool->asked && start(&pool->workers[pool->size])) pool->size++;
  if (pool->size > 0) return pool;
  ek_pool_end(pool);
  return nullptr;
}

void ek_pool_end(ek_pool* pool) {
  if (pool == nullptr) return;
  if (pool->process == getpid()) {  // in a forked child there is nobody to wait for
    pool->stopping.store(1);
    publish(pool, 0);
    for (int32_t i = 1; i < pool->size; i++) pthread_join(pool->workers[i].thread, nullptr);
  }
  for (int32_t i = 0; i < pool->asked; i++) {
    if (pool->workers[i].scratch != nullptr) munmap(pool->workers[i].scratch, EK_SCRATCH);
  }
  free(pool->workers);
  free(pool);
}
