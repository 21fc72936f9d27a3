// How one step's attention is cut into items.
//
// A context is attended to in parts of PART slots, whose results are put together in their order. A tile is one or more
// tokens of a span with the query heads of one kv head: rows that share what they read. An item is all parts of a tile
// for one or more kv heads; or, where that would be too much for one thread, one part of it, and then whoever finishes
// a tile's last part puts them together. Results do not depend on how it is cut.
//
// The plan lies in `shared`: ek_attend_shared_bytes are enough for any window, and all layers of a step can use the
// same.
#pragma once
#include <string.h>

#include "ek.h"

namespace EK_TIER {

static const int PART = 512;      // slots; more and sums of EK_KV_INT8 could overflow
static const int MOST_ROWS = 64;  // of a tile
static const int LEAST_ROWS = 16;

// Partial results of a step take at most what those of one token for each span would, of MOST_PARTS parts in all, and
// this many floats beside them. A span whose results find no room there is not split.
static const int64_t MOST_PARTS = 2048;  // a million tokens
static const int64_t MORE_FLOATS = 1 << 20;

struct attend_job {  // a tile, for all kv heads
  int64_t span;
  int64_t token;  // its first, counted in the span
  int32_t tokens;
  int32_t parts;
  int64_t first_part;
  int64_t cost;           // of one head
  int64_t first_item;
  int32_t heads_per_item;
  int32_t is_split;       // an item is one part of one head
  int64_t first_counter;  // split: [heads] parts that are done
  int64_t first_float;    // split: [heads][parts][partial_floats]
};

struct attend_plan {
  int64_t num_jobs;
  int64_t counters_at;  // bytes from the plan's beginning
  int64_t floats_at;
};

// Query heads in rows of a tile. A group of more than MOST_ROWS heads is dealt out to several tiles.
struct attend_heads {
  int64_t per_tile;
  int64_t tiles;  // "heads" of a job: kv heads times tiles that each needs for a token
};

static inline attend_heads heads_of(const ek_attend* a) {
  const int64_t group = a->heads / a->cache->kv_heads, pieces = (group + MOST_ROWS - 1) / MOST_ROWS;
  const attend_heads heads = {(group + pieces - 1) / pieces, a->cache->kv_heads * pieces};
  return heads;
}

static inline int64_t first_seen(const ek_attend* a, int64_t position) {
  return a->window > 0 && position >= a->window ? position + 1 - a->window : 0;
}

static inline int64_t tokens_per_tile(const attend_heads* heads, int64_t rows) {
  return rows > heads->per_tile ? rows / heads->per_tile : 1;
}

// Whether a span is one tile, and may be split into parts.
static inline bool is_short(const attend_heads* heads, int64_t length) { return length * heads->per_tile <= MOST_ROWS; }

static inline int64_t tiles_of(const attend_heads* heads, int64_t length, int64_t rows) {
  const int64_t tokens = tokens_per_tile(heads, rows);
  return is_short(heads, length) ? 1 : (length + tokens - 1) / tokens;
}

// What a part leaves behind for one head: the rows' maxima, their sums, their weighted values.
static inline int64_t partial_floats(const ek_attend* a, int64_t rows) {
  return (2 * rows + 15) / 16 * 16 + rows * a->cache->head_dim;
}

static inline attend_job* jobs_of(attend_plan* plan) { return (attend_job*)(plan + 1); }
static inline uint32_t* counters_of(attend_plan* plan) { return (uint32_t*)((char*)plan + plan->counters_at); }
static inline float* floats_of(attend_plan* plan) { return (float*)((char*)plan + plan->floats_at); }

static inline int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static inline int64_t parts_before(int64_t end) { return (end + PART - 1) / PART; }

// Floats that there is room for.
static inline int64_t room_floats(const ek_attend* a, const attend_heads* heads) {
  int64_t parts = 0;
  for (int64_t span = 0; span < a->batch->spans; span++) {
    const int64_t length = a->batch->lengths[span];
    if (is_short(heads, length)) parts += parts_before(a->batch->starts[span] + length);
  }
  return (parts < MOST_PARTS ? parts : MOST_PARTS) * heads->tiles * partial_floats(a, heads->per_tile) + MORE_FLOATS;
}

// The most that any plan of the batch takes: as though there were no window and all was cut as finely as can be.
static inline int64_t plan_bytes(const ek_attend* a) {
  const attend_heads heads = heads_of(a);
  const int64_t room = room_floats(a, &heads);
  int64_t jobs = 0, counters = 0, floats = 0;
  for (int64_t span = 0; span < a->batch->spans; span++) {
    const int64_t length = a->batch->lengths[span], end = a->batch->starts[span] + length;
    jobs += tiles_of(&heads, length, LEAST_ROWS);
    if (!is_short(&heads, length)) continue;
    counters += heads.tiles;
    floats += heads.tiles * parts_before(end) * partial_floats(a, length * heads.per_tile);
  }
  if (floats > room) floats = room;
  return whole_lines(sizeof(attend_plan) + jobs * sizeof(attend_job)) + whole_lines(counters * 4) + floats * 4;
}

// The span's tiles of `tokens` each, the last first: it has the longest context.
static inline attend_job* cut_span(const ek_attend* a, const attend_heads* heads, int64_t span, int64_t tokens,
                                   attend_job* job) {
  const int64_t length = a->batch->lengths[span], start = a->batch->starts[span];
  for (int64_t token = (length - 1) / tokens * tokens; token >= 0; token -= tokens, job++) {
    memset(job, 0, sizeof *job);
    job->span = span;
    job->token = token;
    job->tokens = (int32_t)(length - token < tokens ? length - token : tokens);
    const int64_t first = first_seen(a, start + token), stop = start + token + job->tokens;
    job->first_part = first / PART;
    job->parts = (int32_t)((stop + PART - 1) / PART - job->first_part);
    // In slots read or rows' worth of arithmetic; few rows cost about as much as eight.
    job->cost = (stop - first) * (8 + job->tokens * heads->per_tile);
  }
  return job;
}

// The dearest items first, so that all threads finish together (Shell's sort, gaps of Knuth).
static inline void sort_jobs(attend_job* jobs, int64_t count) {
  int64_t gap = 1;
  while (gap < count / 3) gap = 3 * gap + 1;
  for (; gap > 0; gap /= 3) {
    for (int64_t i = gap; i < count; i++) {
      const attend_job job = jobs[i];
      int64_t at = i;
      for (; at >= gap && jobs[at - gap].cost < job.cost; at -= gap) jobs[at] = jobs[at - gap];
      jobs[at] = job;
    }
  }
}

// Writes the plan; answers the number of items.
static inline int64_t make_plan(const ek_attend* a, int32_t threads) {
  attend_plan* plan = (attend_plan*)a->shared;
  attend_job* jobs = jobs_of(plan);
  const attend_heads heads = heads_of(a);
  // Tiles of a long span: large ones read the cache less often, but every thread wants several.
  int64_t rows = MOST_ROWS, tiles = 0;
  for (int64_t span = 0; span < a->batch->spans; span++) tiles += tiles_of(&heads, a->batch->lengths[span], rows);
  while (rows > LEAST_ROWS && tiles * heads.tiles < 8 * (int64_t)threads) rows /= 2, tiles *= 2;

  attend_job* end = jobs;
  for (int64_t span = 0; span < a->batch->spans; span++) {
    const int64_t length = a->batch->lengths[span];
    end = cut_span(a, &heads, span, is_short(&heads, length) ? length : tokens_per_tile(&heads, rows), end);
  }
  plan->num_jobs = end - jobs;
  int64_t total = 0;
  for (attend_job* job = jobs; job < end; job++) total += job->cost * heads.tiles;

  // Items neither so large that the last one keeps all but one thread waiting, nor so small that there are more than it
  // takes to keep all busy.
  const int64_t most = total / (16 * (int64_t)threads) + 1, least = total / (64 * (int64_t)threads) + 1;
  const int64_t room = room_floats(a, &heads);
  int64_t counters = 0, floats = 0;
  for (attend_job* job = jobs; job < end; job++) {
    const int64_t fitting = job->cost < least ? least / job->cost : 1;
    job->heads_per_item = (int32_t)(fitting < heads.tiles ? fitting : heads.tiles);
    const int64_t partials = heads.tiles * job->parts * partial_floats(a, job->tokens * heads.per_tile);
    job->is_split = threads > 1 && job->parts > 1 && job->cost > most &&
                    is_short(&heads, a->batch->lengths[job->span]) && floats + partials <= room;
    if (!job->is_split) continue;
    job->cost /= job->parts;
    job->first_counter = counters;
    job->first_float = floats;
    counters += heads.tiles;
    floats += partials;
  }
  plan->counters_at = whole_lines((char*)end - (char*)plan);
  plan->floats_at = plan->counters_at + whole_lines(counters * 4);
  memset(counters_of(plan), 0, counters * 4);

  sort_jobs(jobs, plan->num_jobs);
  int64_t items = 0;
  for (attend_job* job = jobs; job < end; job++) {
    job->first_item = items;
    items += job->is_split ? heads.tiles * job->parts : (heads.tiles + job->heads_per_item - 1) / job->heads_per_item;
  }
  return items;
}

static inline const attend_job* job_of_item(attend_plan* plan, int64_t item) {
  const attend_job* jobs = jobs_of(plan);
  int64_t low = 0, high = plan->num_jobs;  // the job is in low .. high - 1
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (jobs[middle].first_item <= item) low = middle;
    else high = middle;
  }
  return &jobs[low];
}

}  // namespace EK_TIER
