// One block of a launch on the host: a fiber for each thread, run in turn by one thread of the system.
//
// A fiber runs until it comes to an exchange or a barrier; when the last of its warp or block has come, all of them are
// ready, and who goes on is drawn by lot. So whatever is not ordered by a barrier happens in some other order under
// some other seed, and what cannot go on is seen at once: nobody is ready. Shared memory starts each block as NaNs.
// What is between two barriers happens as a whole, so an update that is lost to another thread's is not found.
#pragma once
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#if !defined(__x86_64__) || !defined(__ELF__) || defined(EK_UCONTEXT)
#include <ucontext.h>
#define EK_SWITCH_BY_UCONTEXT 1
#endif
#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_unpoison_memory_region(const volatile void* start, size_t bytes);
#endif

// Where the linker has put the kernel's shared memory.
extern "C" __attribute__((weak, visibility("hidden"))) u8 __start_ek_shared[];
extern "C" __attribute__((weak, visibility("hidden"))) u8 __stop_ek_shared[];

#if !EK_SWITCH_BY_UCONTEXT
// Keeps what a function has to keep on this stack, its address in *save, and goes on with what was kept at `load`.
extern "C" __attribute__((visibility("hidden"))) void ek_swap_stacks(void** save, void* load);
asm(
    ".text\n"
    ".p2align 4\n"
    ".globl ek_swap_stacks\n"
    ".hidden ek_swap_stacks\n"
    ".type ek_swap_stacks, @function\n"
    "ek_swap_stacks:\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  ret\n"
    ".size ek_swap_stacks, . - ek_swap_stacks\n");
#endif

namespace ek_fibers {

constexpr int MOST_THREADS = 1024, LANES = 32;
constexpr size_t STACK_BYTES = 192 << 10, GUARD_BYTES = 64 << 10;  // what lies below a stack may not be touched
constexpr size_t STACK_PITCH = STACK_BYTES + GUARD_BYTES;

struct Place {
  const char* what;
  const char* file;
  int line;
  int key;  // what else must be the same in all lanes
};

static inline bool is_same(const Place& a, const Place& b) {
  return a.line == b.line && a.key == b.key && !strcmp(a.what, b.what) && !strcmp(a.file, b.file);
}

#if EK_SWITCH_BY_UCONTEXT
typedef ucontext_t Context;
#else
typedef void* Context;
#endif

struct Fiber {
  Context context;
  bool returned;
  Place waits;
};

struct Sent {
  alignas(16) u8 bytes[64];
};

struct Warp {
  int arrived;
  u32 turn;              // exchanges that are over
  Place place;           // of the one that is not
  int first;             // who came to it first
  Sent sent[2][LANES];  // by turns: the slowest still reads the last ones
};

struct Block {
  int threads, current, x, y, z;
  int alive, at_barrier, first_at_barrier;
  int ready[MOST_THREADS], num_ready;
  bool is_shuffled;
  u32 random;
  u64 switches;
  u8* stacks;  // STACK_PITCH apart, each behind its guard
  void (*body)(const void*);
  const void* job;
  Context outside;
  Fiber fibers[MOST_THREADS];
  Warp warps[MOST_THREADS / LANES];
  char fault[1024];
};

static Block block;

static u32 draw(u32 below) {
  u32& x = block.random;  // Marsaglia's xorshift
  x ^= x << 13, x ^= x >> 17, x ^= x << 5;
  return x % below;
}

static void swap_contexts(Context& from, Context& to) {
  block.switches++;
#if EK_SWITCH_BY_UCONTEXT
  swapcontext(&from, &to);
#else
  ek_swap_stacks(&from, to);
#endif
}

// Ends the launch; what is left of it on the fibers' stacks is forgotten.
__attribute__((format(printf, 1, 2))) static void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int used = snprintf(block.fault, sizeof block.fault, "block (%d, %d, %d): ", block.x, block.y, block.z);
  vsnprintf(block.fault + used, sizeof block.fault - used, format, arguments);
  va_end(arguments);
  swap_contexts(block.fibers[block.current].context, block.outside);
}

// Says who waits for whom.
static void fail_stuck() {
  char text[900];
  int used = 0, returned = 0;
  bool told[MOST_THREADS] = {};
  for (int i = 0; i < block.threads; i++) returned += block.fibers[i].returned;
  if (returned) used = snprintf(text, sizeof text, "; %d have returned", returned);
  for (int i = 0; i < block.threads && used < 700; i++) {
    if (told[i] || block.fibers[i].returned) continue;
    const Place& place = block.fibers[i].waits;
    int count = 0;
    for (int k = i; k < block.threads; k++) {
      if (block.fibers[k].returned || !is_same(place, block.fibers[k].waits)) continue;
      told[k] = true;
      count++;
    }
    used += snprintf(text + used, sizeof text - used, "; %d wait at %s, %.150s:%d, thread %d first", count, place.what,
                     place.file, place.line, i);
  }
  fail("no thread can go on%s", text);
}

// The threads from `first` on; by order of their numbers, unless shuffled.
static void make_ready(int first, int count) {
  for (int i = count - 1; i >= 0; i--) block.ready[block.num_ready++] = first + i;
}

static void leave() {
  const int from = block.current;
  if (block.num_ready == 0) {
    if (block.alive == 0) swap_contexts(block.fibers[from].context, block.outside);
    else fail_stuck();
  }
  int& last = block.ready[block.num_ready - 1];
  if (block.is_shuffled) {
    int& drawn = block.ready[draw((u32)block.num_ready)];
    const int next = drawn;
    drawn = last, last = next;
  }
  block.current = last;
  block.num_ready--;
  if (block.current != from) swap_contexts(block.fibers[from].context, block.fibers[block.current].context);
}

static void run_fiber() {
  block.body(block.job);
  block.fibers[block.current].returned = true;
  block.alive--;
  for (;;) leave();
}

// All threads of the block.
static inline void barrier(const Place& place) {
  const int me = block.current;
  block.fibers[me].waits = place;
  if (block.at_barrier++ == 0) block.first_at_barrier = me;
  const Place& other = block.fibers[block.first_at_barrier].waits;
  if (!is_same(place, other)) {
    fail("thread %d comes to EK_SYNC at %.300s:%d, thread %d to that at %.300s:%d", me, place.file, place.line,
         block.first_at_barrier, other.file, other.line);
  }
  if (block.at_barrier == block.threads) {
    block.at_barrier = 0;
    make_ready(0, block.threads);
  }
  leave();
}

// All lanes of the warp: what each has sent, valid until the next exchange.
static inline const Sent* exchange(const Place& place, const void* sent, size_t bytes) {
  const int me = block.current, lane = me % LANES;
  Warp& warp = block.warps[me / LANES];
  block.fibers[me].waits = place;
  if (warp.arrived++ == 0) warp.place = place, warp.first = me;
  if (!is_same(place, warp.place)) {
    fail("thread %d comes to %s (%d) at %.300s:%d, thread %d of its warp to %s (%d) at %.300s:%d", me, place.what,
         place.key, place.file, place.line, warp.first, warp.place.what, warp.place.key, warp.place.file,
         warp.place.line);
  }
  Sent* all = warp.sent[warp.turn & 1];
  memcpy(all[lane].bytes, sent, bytes);
  if (warp.arrived == LANES) {
    warp.arrived = 0;
    warp.turn++;
    make_ready(me - lane, LANES);
  }
  leave();
  return all;
}

#if EK_SWITCH_BY_UCONTEXT
static void start_fiber(Fiber& fiber, u8* stack) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = STACK_BYTES;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
}
#else
static void start_fiber(Fiber& fiber, u8* stack) {
  u64* top = (u64*)(stack + STACK_BYTES - 64);
  *--top = 0;  // where run_fiber would return to, which it does not
  *--top = (u64)&run_fiber;
  for (int i = 0; i < 6; i++) *--top = 0;
  fiber.context = top;
}
#endif

// Byte by byte and unchecked: between the variables there is memory that a sanitizer guards.
__attribute__((no_sanitize_address)) static void poison_shared() {
  for (volatile u8* at = __start_ek_shared; at < __stop_ek_shared; at++) *at = 0xff;
}

// For one launch: the system allows a process only so many separate pieces of memory, and there are many libraries.
struct Stacks {
  u8* memory;
  size_t bytes;

  explicit Stacks(int count) : memory(nullptr), bytes(count * STACK_PITCH) {
    void* all = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) return;
    memory = (u8*)all;
    for (int i = 0; i < count; i++) mprotect(memory + i * STACK_PITCH, GUARD_BYTES, PROT_NONE);
  }
  ~Stacks() {
    if (memory) munmap(memory, bytes);
  }
};

static void run_block(int x, int y, int z) {
  block.x = x, block.y = y, block.z = z;
  block.alive = block.threads;
  block.at_barrier = block.num_ready = 0;
  for (int i = 0; i < block.threads; i++) {
    u8* stack = block.stacks + i * STACK_PITCH + GUARD_BYTES;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, STACK_BYTES);
#endif
    block.fibers[i].returned = false;
    start_fiber(block.fibers[i], stack);
    block.warps[i / LANES].arrived = 0;
  }
  poison_shared();
  make_ready(0, block.threads);
  const int first = block.is_shuffled ? (int)draw((u32)block.num_ready) : block.num_ready - 1;
  block.current = block.ready[first];
  block.ready[first] = block.ready[--block.num_ready];
  swap_contexts(block.outside, block.fibers[block.current].context);
}

static u32 common_divisor(u32 a, u32 b) { return b ? common_divisor(b, a % b) : a; }

constexpr u64 FAULT = ~0ull;

// All blocks, one after the other: the number of switches between fibers, or FAULT, and block.fault says why.
static u64 run_grid(void (*body)(const void*), const void* job, int threads, int gx, int gy, int gz, u32 seed) {
  block.fault[0] = 0;
  block.x = block.y = block.z = -1;
  if (threads < LANES || threads > MOST_THREADS || threads % LANES || gx < 1 || gy < 1 || gz < 1) {
    snprintf(block.fault, sizeof block.fault, "%d x %d x %d blocks of %d threads cannot be run", gx, gy, gz, threads);
    return FAULT;
  }
  const Stacks stacks(threads);
  if (!stacks.memory) {
    snprintf(block.fault, sizeof block.fault, "there is no memory for the stacks of %d threads", threads);
    return FAULT;
  }
  block.stacks = stacks.memory;
  block.threads = threads, block.body = body, block.job = job;
  block.is_shuffled = seed != 0;
  block.random = seed * 2654435761u | 1u;
  block.switches = 0;
  const u32 count = (u32)gx * (u32)gy * (u32)gz;
  u32 step = 1, at = 0;
  if (block.is_shuffled) {  // no block may count on another one's being over
    for (step = 1 + draw(count); common_divisor(step, count) != 1;) step = 1 + draw(count);
    at = draw(count);
  }
  for (u32 i = 0; i < count; i++, at = (u32)(((u64)at + step) % count)) {
    run_block((int)(at % (u32)gx), (int)(at / (u32)gx % (u32)gy), (int)(at / (u32)gx / (u32)gy));
    if (block.fault[0]) return FAULT;
  }
  return block.switches;
}

}  // namespace ek_fibers
