// What the pool promises, case by case: `pool_cases <case> <threads> <rounds>` ends with 0 or says what was wrong.
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <vector>

#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define CHECK(what)                                                     \
  do {                                                                  \
    if (!(what)) {                                                      \
      fprintf(stderr, "line %d: %s is not so\n", __LINE__, #what);      \
      exit(1);                                                          \
    }                                                                   \
  } while (0)

static ek_tier tier;
static int rounds;
static uint32_t state = 12345;
static uint32_t draw(uint32_t below) { return (state = state * 1664525 + 1013904223) / 65536 % below; }

// Phases whose items add to plain numbers, so that a race detector sees every hand-over, and that count who did them.
struct phases {
  std::vector<int64_t> sizes;
  size_t next = 0;
  int64_t size = 0;
  std::vector<int> seen;     // of this phase's items
  std::vector<int> before;   // the last phase's
  int64_t finished = 0;
  int64_t spin = 0;
};

static void do_item(void* context, int64_t item, void* scratch) {
  phases* self = (phases*)context;
  CHECK(item >= 0 && item < self->size);
  self->seen[item]++;
  for (int count : self->before) CHECK(count == 1);  // all of the last phase is done, and visible
  memset(scratch, (int)item, 64);
  for (volatile int64_t i = 0; i < self->spin; i++) {
  }
}

static void check_phase(phases* self) {
  for (int count : self->seen) CHECK(count == 1);
  self->finished += self->size;
}

static int32_t next_phase(void* context, ek_phase* phase) {
  phases* self = (phases*)context;
  check_phase(self);
  if (self->next == self->sizes.size()) return 0;
  self->before.swap(self->seen);
  self->size = self->sizes[self->next++];
  self->seen.assign(self->size, 0);
  *phase = {do_item, self, self->size};
  return 1;
}

static void run(ek_pool* pool, phases* work) {
  int64_t all = 0;
  for (int64_t size : work->sizes) all += size;
  CHECK(ek_pool_run(pool, next_phase, work) == EK_OK);
  check_phase(work);
  CHECK(work->finished - work->size == all);
}

static void every_item_once(ek_pool* pool) {
  for (int i = 0; i < 100 * rounds; i++) {
    phases work;
    work.spin = draw(3) ? 0 : draw(300);
    for (uint32_t n = draw(6); n > 0; n--) work.sizes.push_back(draw(3) ? draw(20) : draw(3));
    run(pool, &work);
  }
}

static void sleepers_wake(ek_pool* pool) {
  for (int i = 0; i < 2 * rounds; i++) {
    usleep(i % 3 == 0 ? 10 : 3000);  // workers sleep after a millisecond
    phases work;
    work.sizes = {1, 8, 1, 5};
    work.spin = 20000;
    run(pool, &work);
  }
}

// A thread that waits for longer than it stays awake, in the middle of a run.
static void sleep_item(void*, int64_t item, void*) {
  if (item == 0) usleep(5000);
}

static void a_long_item_holds_nobody_forever(ek_pool* pool) {
  for (int i = 0; i < rounds; i++) CHECK(ek_pool_each(pool, 4, sleep_item, nullptr) == EK_OK);
}

static void idle_pools_end(ek_pool*) {
  for (int i = 0; i < 10 * rounds; i++) {
    ek_pool* pool = ek_pool_make(&tier, 1 + i % 4, nullptr);
    CHECK(pool != nullptr);
    if (i % 3 == 1) {
      phases work;
      work.sizes = {3, 1, 7};
      run(pool, &work);
    }
    if (i % 20 == 2) usleep(2000);
    ek_pool_end(pool);
  }
}

static void nested_item(void* context, int64_t, void*) {
  CHECK(ek_pool_each((ek_pool*)context, 3, sleep_item, nullptr) == EK_ERROR_BUSY);
}

static void a_busy_pool_says_so(ek_pool* pool) {
  CHECK(ek_pool_each(pool, 2, nested_item, pool) == EK_OK);
  CHECK(ek_pool_each(pool, -1, nested_item, pool) == EK_ERROR_SHAPE);
  CHECK(ek_pool_each(pool, 0, nested_item, pool) == EK_OK);
}

struct who {
  std::atomic<uint64_t> threads;  // bits
  std::atomic<int64_t> items;
};

static thread_local int my_number = -1;
static std::atomic<int> numbers;

static void note_thread(void* context, int64_t, void*) {
  who* self = (who*)context;
  if (my_number < 0) my_number = numbers.fetch_add(1);
  self->threads.fetch_or(1ull << my_number);
  self->items.fetch_add(1);
  usleep(300);
}

// Also those that slept.
static void every_thread_takes_part(ek_pool* pool) {
  for (int asleep = 0; asleep < 2; asleep++) {
    if (asleep) usleep(10000);
    who work = {};
    // On a busy machine a thread may get no time in a single run.
    for (int run = 0; run < 50 && __builtin_popcountll(work.threads.load()) < ek_pool_size(pool); run++) {
      CHECK(ek_pool_each(pool, 40 * ek_pool_size(pool), note_thread, &work) == EK_OK);
    }
    CHECK(__builtin_popcountll(work.threads.load()) == ek_pool_size(pool));
  }
}

// In a forked child, also one forked while its parent's pool was at work, the caller does everything.
struct forked {
  pid_t child = -1;
};

static void* fork_meanwhile(void* argument) {
  usleep(2000);
  forked* self = (forked*)argument;
  self->child = fork();
  return nullptr;
}

static void a_forked_child_runs_alone(ek_pool* pool) {
  for (int meanwhile = 0; meanwhile < 2; meanwhile++) {
    forked self;
    if (meanwhile) {
      // The child has the forking thread alone, which ends, and with it the child: what it can do is in the handler.
      static ek_pool* inherited;
      inherited = pool;
      static bool registered = false;
      if (!registered) {
        registered = true;
        pthread_atfork(nullptr, nullptr, [] {
          phases work;
          work.sizes = {5, 1, 9};
          run(inherited, &work);
          ek_pool_end(inherited);
          _exit(0);
        });
      }
      pthread_t thread;
      CHECK(pthread_create(&thread, nullptr, fork_meanwhile, &self) == 0);
      CHECK(ek_pool_each(pool, 4, sleep_item, nullptr) == EK_OK);
      CHECK(pthread_join(thread, nullptr) == 0);
    } else {
      self.child = fork();
      if (self.child == 0) {
        phases work;
        work.sizes = {4, 2, 1, 17};
        run(pool, &work);
        CHECK(ek_pool_size(pool) == 1);
        ek_pool_end(pool);
        _exit(0);
      }
    }
    CHECK(self.child > 0);
    int status = -1;
    CHECK(waitpid(self.child, &status, 0) == self.child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    phases work;
    work.sizes = {3, 9};
    run(pool, &work);
  }
}

static void multiply_small(void* context, int64_t, void*) {
  volatile float small = 1e-30f;
  if (small * small * 1e10f != 0.0f || 1e-30f * small != 0.0f) ((std::atomic<int>*)context)->fetch_add(1);
  usleep(200);
}

static void denormals_are_zero_in_runs_alone(ek_pool* pool) {
  std::atomic<int> kept(0);
  volatile float small = 1e-30f, tiny = 1e-10f;
  CHECK(ek_pool_each(pool, 50, multiply_small, &kept) == EK_OK);
  CHECK(kept.load() == 0);
  CHECK(small * tiny > 0.0f);
#if defined(__x86_64__)
  const unsigned mode = _mm_getcsr() ^ 0x6000;  // another rounding: what the caller set is what it finds
  _mm_setcsr(mode);
  CHECK(ek_pool_each(pool, 2, multiply_small, &kept) == EK_OK);
  CHECK((_mm_getcsr() & ~0x3Fu) == (mode & ~0x3Fu));
  _mm_setcsr(mode ^ 0x6000);
#endif
}

static void workers_have_names(ek_pool* pool) {
  who work = {};
  CHECK(ek_pool_each(pool, 40, note_thread, &work) == EK_OK);
  char command[128];
  snprintf(command, sizeof command, "test $(cat /proc/%d/task/*/comm | grep -c ^ek-cpu-) = %d", getpid(),
           ek_pool_size(pool) - 1);
  CHECK(system(command) == 0);
}

struct places {
  pthread_t caller;
  int32_t cpu;
  std::atomic<int> astray;
};

static void look_where(void* context, int64_t, void*) {
  places* self = (places*)context;
  usleep(200);
  if (pthread_equal(pthread_self(), self->caller)) return;
  cpu_set_t mine;
  CPU_ZERO(&mine);
  CHECK(sched_getaffinity(0, sizeof mine, &mine) == 0);
  if (CPU_COUNT(&mine) != 1 || !CPU_ISSET(self->cpu, &mine)) self->astray.fetch_add(1);
}

static void workers_stay_where_they_are_put(ek_pool*) {
  cpu_set_t usable, after;
  CPU_ZERO(&usable);
  CHECK(sched_getaffinity(0, sizeof usable, &usable) == 0);
  places work = {pthread_self(), 0, {0}};
  for (int32_t cpu = 0; cpu < CPU_SETSIZE; cpu++) work.cpu = CPU_ISSET(cpu, &usable) ? cpu : work.cpu;
  const int32_t cpus[2] = {work.cpu, work.cpu};
  ek_pool* pool = ek_pool_make(&tier, 2, cpus);
  CHECK(ek_pool_each(pool, 40, look_where, &work) == EK_OK);
  CHECK(work.astray.load() == 0);
  CPU_ZERO(&after);
  CHECK(sched_getaffinity(0, sizeof after, &after) == 0 && CPU_EQUAL(&usable, &after));  // the caller's is its own
  ek_pool_end(pool);
}

// Not a case: what a hand-over costs, and a run's beginning. Prints nanoseconds.
static int64_t now() {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

const int64_t ITEM_NS = 500;

static void spend(void*, int64_t, void*) {
  const int64_t until = now() + ITEM_NS;
  while (now() < until) {
  }
}

static int32_t many(void* context, ek_phase* phase) {
  int64_t* left = (int64_t*)context;
  if (--*left < 0) return 0;
  *phase = {spend, nullptr, 2};
  return 1;
}

static int64_t best_of(ek_pool* pool, int runs, int64_t phases, int gap_us) {
  int64_t best = INT64_MAX;
  for (int i = 0; i < runs; i++) {
    if (gap_us > 0) usleep(gap_us);
    int64_t left = phases, began = now();
    ek_pool_run(pool, many, &left);
    const int64_t took = now() - began;
    best = took < best ? took : best;
  }
  return best;
}

static void timings(ek_pool* pool) {
  const int64_t alone = ek_pool_size(pool) == 1 ? 2 : 1;  // items of a phase that one thread does
  printf("{\"barrier_ns\": %ld, ", (long)(best_of(pool, 300, 1000, 0) / 1000 - alone * ITEM_NS));
  printf("\"empty_run_ns\": %ld, ", (long)best_of(pool, 300, 0, 0));
  printf("\"empty_run_after_3ms_ns\": %ld}\n", (long)best_of(pool, 100, 0, 3000));
}

struct named {
  const char* name;
  void (*go)(ek_pool*);
};

static const named CASES[] = {
    {"every_item_once", every_item_once},
    {"sleepers_wake", sleepers_wake},
    {"a_long_item_holds_nobody_forever", a_long_item_holds_nobody_forever},
    {"idle_pools_end", idle_pools_end},
    {"a_busy_pool_says_so", a_busy_pool_says_so},
    {"every_thread_takes_part", every_thread_takes_part},
    {"a_forked_child_runs_alone", a_forked_child_runs_alone},
    {"denormals_are_zero_in_runs_alone", denormals_are_zero_in_runs_alone},
    {"workers_have_names", workers_have_names},
    {"workers_stay_where_they_are_put", workers_stay_where_they_are_put},
    {"timings", timings},
};

int main(int count, char** arguments) {
  if (count != 4) return 2;
  rounds = atoi(arguments[3]);
  for (const named& each : CASES) {
    if (strcmp(each.name, arguments[1]) != 0) continue;
    ek_pool* pool = ek_pool_make(&tier, atoi(arguments[2]), nullptr);
    if (pool == nullptr || ek_pool_size(pool) != atoi(arguments[2])) return 3;
    each.go(pool);
    ek_pool_end(pool);
    return 0;
  }
  return 2;
}
