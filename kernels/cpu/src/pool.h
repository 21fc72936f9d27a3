// Threads that do numbered items together, phase after phase, in one run.
//
// A phase is over when all of its items are done, not when all threads have arrived: a thread that the system has taken
// off its core holds up nobody unless it was in the middle of an item. Whoever finishes the last item of a phase asks
// for the next one; a phase of one item it does itself, on the spot, so that a run of small operations costs nobody a
// hand-over. Between runs threads spin for a moment, then sleep.
//
// In a forked child only the caller is left: runs work there, on one thread.
#pragma once
#include "ek.h"

typedef struct ek_pool ek_pool;

// Items 0 .. items - 1 of a phase, to be done each once, by any thread in any order.
typedef struct ek_phase {
  void (*item)(void* context, int64_t item, void* scratch);
  void* context;
  int64_t items;
} ek_phase;

// The most items of one phase.
static const int64_t EK_MOST_ITEMS = 1 << 30;

// Says the next phase (0 items: none to do here) and answers 1, or answers 0: the run is over. Called by one thread at a
// time, after all that the phases before have written is visible to it.
typedef int32_t (*ek_next_phase)(void* context, ek_phase* phase);

// Runs phases until there are none, on all threads and the caller. EK_OK, or EK_ERROR_BUSY.
int32_t ek_pool_run(ek_pool*, ek_next_phase, void* context);
// One phase.
int32_t ek_pool_each(ek_pool*, int64_t items, void (*item)(void* context, int64_t item, void* scratch), void* context);

const ek_tier* ek_pool_tier(const ek_pool*);
int32_t ek_pool_size(const ek_pool*);  // threads, the caller included; fewer than asked for where the system gives no more

// `cpus`: where each thread is pinned, or null; the first is the caller's, which is left alone.
ek_pool* ek_pool_make(const ek_tier*, int32_t threads, const int32_t* cpus);
void ek_pool_end(ek_pool*);
