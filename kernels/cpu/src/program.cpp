#include "program.h"

#include <time.h>

#include "panels.h"
#include "stripes.h"

namespace {

// Rows are dealt out in items of about this many numbers, one to two microseconds; what is less stays with one thread.
const int64_t NUMBERS_PER_ITEM = 8192;
const int64_t ITEMS_PER_THREAD = 8;

const int64_t MOST_TOKENS = 1ll << 31;  // of a step, and in a context
const int32_t MOST_HEAD_DIM = 256;  // what attend_products.h and append.h have room for

// The one run: where it is, and what its present phase works on.
struct walk {
  const ek_tier* tier;
  int32_t threads;
  const ek_program* program;
  const ek_step* step;
  const ek_op* op;   // of the present phase
  int32_t next;      // operation
  int32_t part;      // of the operation's phases, which comes next
  int64_t began_ns;  // the operation
  int64_t units;     // of rows
  int64_t units_per_item;
  int64_t append_items;
  int64_t linear_items;
  ek_linear linear;
  ek_attend attend;
};

int64_t now_ns() {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000ll + now.tv_nsec;
}

int64_t rows_of(const ek_op* op, const ek_batch* batch) { return op->of_samples ? batch->samples : batch->tokens; }

void linear_item(void* context, int64_t item, void* scratch) {
  walk* self = (walk*)context;
  self->tier->linear_item(&self->linear, ek_striped(item, self->linear_items, self->threads), scratch);
}

void append_item(void* context, int64_t item, void* scratch) {
  walk* self = (walk*)context;
  self->tier->append_item(&self->attend, item, scratch);
}

void attend_item(void* context, int64_t item, void* scratch) {
  walk* self = (walk*)context;
  self->tier->attend_item(&self->attend, item, scratch);
}

void rows_item(void* context, int64_t item, void* scratch) {
  walk* self = (walk*)context;
  const int64_t first = item * self->units_per_item, stop = first + self->units_per_item;
  self->tier->rows(self->program, self->op, self->step, first, stop < self->units ? stop : self->units, scratch);
}

void rope_append_item(void* context, int64_t, void* scratch) {
  walk* self = (walk*)context;
  self->tier->rows(self->program, self->op, self->step, 0, self->units, scratch);
  for (int64_t i = 0; i < self->append_items; i++) self->tier->append_item(&self->attend, i, scratch);
}

void set_linear(walk* self) {
  const ek_op* op = self->op;
  ek_linear* linear = &self->linear;
  linear->parts = op->parts;
  linear->num_parts = op->num_parts;
  linear->epilogue = op->epilogue;
  linear->bias = op->bias;
  linear->acts = &self->step->prepared;
  linear->out = self->step->buffers[op->dst].data;
  linear->out_stride = self->step->buffers[op->dst].stride;
  linear->tokens = rows_of(op, self->step->batch);
}

// q, k and v are side by side in src.
void set_attend(walk* self) {
  const ek_op* op = self->op;
  const ek_program* program = self->program;
  const ek_buffer* qkv = &self->step->buffers[op->src];
  ek_attend* attend = &self->attend;
  attend->cache = self->step->cache;
  attend->batch = self->step->batch;
  attend->layer = op->layer;
  attend->heads = program->heads;
  attend->window = op->window;
  attend->scale = op->scale;
  attend->softcap = op->softcap;
  attend->q = qkv->data;
  attend->k = attend->q + (int64_t)program->heads * program->head_dim;
  attend->v = attend->k + (int64_t)program->kv_heads * program->head_dim;
  attend->q_stride = attend->k_stride = attend->v_stride = qkv->stride;
  if (op->kind == EK_OP_ATTEND) {
    attend->out = self->step->buffers[op->dst].data;
    attend->out_stride = self->step->buffers[op->dst].stride;
  }
  attend->shared = self->step->attend_shared;
}

// Deals the operation's rows out; answers the number of items.
int64_t set_rows(walk* self) {
  const ek_op* op = self->op;
  int64_t units = rows_of(op, self->step->batch), width = op->width;
  if (op->kind == EK_OP_SOFTCAP) {
    const int64_t most = EK_SOFTCAP_PART;
    units *= (width + most - 1) / most;
    width = width < most ? width : most;
  }
  int64_t items = units * width / NUMBERS_PER_ITEM;
  if (items > self->threads * ITEMS_PER_THREAD) items = self->threads * ITEMS_PER_THREAD;
  if (items > units) items = units;
  if (items < 1) items = 1;
  self->units = units;
  self->units_per_item = (units + items - 1) / items;
  return units == 0 ? 0 : (units + self->units_per_item - 1) / self->units_per_item;
}

void set_phase(walk* self, ek_phase* phase) {
  phase->context = self;
  switch (self->op->kind) {
    case EK_OP_LINEAR:
      set_linear(self);
      phase->item = linear_item;
      self->linear_items = self->linear.tokens == 0 ? 0 : self->tier->linear_items(&self->linear, self->threads);
      phase->items = self->linear_items;
      return;
    case EK_OP_ATTEND:
      set_attend(self);
      phase->item = attend_item;
      phase->items = self->tier->attend_items(&self->attend, self->threads);
      return;
    case EK_OP_ROPE_APPEND:
      if (self->part == 1) {  // second phase
        self->part = 0;
        phase->item = append_item;
        phase->items = self->append_items;
        return;
      }
      set_attend(self);
      self->append_items = self->tier->append_items(&self->attend, self->threads);
      phase->items = set_rows(self);
      // k is appended once all of it is turned; where one thread turns it, that one appends it, too.
      self->part = phase->items > 1;
      phase->item = self->part ? rows_item : rope_append_item;
      return;
    default:
      phase->item = rows_item;
      phase->items = set_rows(self);
  }
}

int32_t next_phase(void* context, ek_phase* phase) {
  walk* self = (walk*)context;
  if (self->part == 0) {
    if (self->step->op_ns != nullptr) {
      const int64_t now = now_ns();
      if (self->op != nullptr) self->step->op_ns[self->op - self->program->ops] += now - self->began_ns;
      self->began_ns = now;
    }
    if (self->next == self->program->num_ops) return 0;
    self->op = &self->program->ops[self->next++];
  }
  set_phase(self, phase);
  return 1;
}

int32_t check_forms(const ek_acts* acts, int32_t forms) {
  if ((forms & EK_FORM_F32) && acts->f32 == nullptr) return EK_ERROR_NULL;
  if ((forms & EK_FORM_BF16) && acts->bf16 == nullptr) return EK_ERROR_NULL;
  const bool has_q8 = acts->q8 != nullptr && acts->q8_scale != nullptr && acts->q8_sum != nullptr;
  return (forms & EK_FORM_Q8) && !has_q8 ? EK_ERROR_NULL : EK_OK;
}

int32_t form_of(int32_t format) {
  if (format == EK_F32 || format == EK_F16) return EK_FORM_F32;
  return format == EK_BF16 ? EK_FORM_BF16 : EK_FORM_Q8;
}

int32_t check_parts(const ek_matrix* parts, int32_t num_parts, int32_t epilogue, const ek_acts* acts) {
  if (parts == nullptr) return EK_ERROR_NULL;
  if (num_parts < 1) return EK_ERROR_SHAPE;
  if (epilogue < EK_STORE || epilogue > EK_GELU_MUL) return EK_ERROR_KIND;
  for (int32_t i = 0; i < num_parts; i++) {
    const int32_t error = ek_matrix_check(&parts[i]);
    if (error) return error;
    if (parts[i].cols != parts[0].cols) return EK_ERROR_SHAPE;
    if (check_forms(acts, form_of(parts[i].format))) return EK_ERROR_NULL;
  }
  const bool gated = epilogue == EK_SILU_MUL || epilogue == EK_GELU_MUL;
  return gated && (num_parts != 1 || parts[0].rows % (2 * EK_PANEL)) ? EK_ERROR_SHAPE : EK_OK;
}

int32_t check_op(const ek_program* program, const ek_op* op, const ek_step* step) {
  const bool reads = op->kind == EK_OP_NORM || op->kind == EK_OP_NORM_ADD || op->kind == EK_OP_PREPARE ||
                     op->kind == EK_OP_ROPE_APPEND || op->kind == EK_OP_ATTEND || op->kind == EK_OP_GATHER;
  const bool writes = op->kind == EK_OP_EMBED || op->kind == EK_OP_NORM_ADD || op->kind == EK_OP_LINEAR ||
                      op->kind == EK_OP_ATTEND || op->kind == EK_OP_SOFTCAP || op->kind == EK_OP_GATHER;
  if ((reads && op->src < 0) || (writes && op->dst < 0) || op->width < 1) return EK_ERROR_SHAPE;
  if ((reads && step->buffers[op->src].data == nullptr) || (writes && step->buffers[op->dst].data == nullptr)) {
    return EK_ERROR_NULL;
  }
  if (op->kind == EK_OP_NORM && op->dst >= 0 && step->buffers[op->dst].data == nullptr) return EK_ERROR_NULL;
  switch (op->kind) {
    case EK_OP_EMBED: {
      if (op->parts == nullptr) return EK_ERROR_NULL;
      const int32_t error = ek_matrix_check(op->parts);
      if (error) return error;
      for (int64_t i = 0; i < step->batch->tokens; i++) {
        const int64_t token = step->batch->token_ids[i];
        if (token < 0 || token >= op->parts->rows) return EK_ERROR_TOKEN;
      }
      return op->width == op->parts->cols ? EK_OK : EK_ERROR_SHAPE;
    }
    case EK_OP_ROPE_TABLE:
      if (op->weight == nullptr || step->rope_tables == nullptr) return EK_ERROR_NULL;
      return op->rope < 0 || op->width > program->head_dim / 2 ? EK_ERROR_SHAPE : EK_OK;
    case EK_OP_NORM:
      if ((int64_t)op->width * (int64_t)sizeof(float) > EK_SCRATCH) return EK_ERROR_SHAPE;
      return check_forms(&step->prepared, op->forms);
    case EK_OP_PREPARE: return check_forms(&step->prepared, op->forms);
    case EK_OP_LINEAR: return check_parts(op->parts, op->num_parts, op->epilogue, &step->prepared);
    case EK_OP_ROPE_APPEND:
    case EK_OP_ATTEND:
      if (op->kind == EK_OP_ROPE_APPEND && op->rope >= 0 && step->rope_tables == nullptr) return EK_ERROR_NULL;
      if (op->kind == EK_OP_ATTEND && step->attend_shared == nullptr) return EK_ERROR_NULL;
      if (step->cache == nullptr) return EK_ERROR_NULL;
      if (step->cache->kv_heads != program->kv_heads || step->cache->head_dim != program->head_dim) return EK_ERROR_SHAPE;
      return op->layer < 0 || op->layer >= step->cache->num_layers ? EK_ERROR_SHAPE : EK_OK;
    case EK_OP_NORM_ADD:
    case EK_OP_SOFTCAP: return EK_OK;
    case EK_OP_GATHER: return op->of_samples && op->src != op->dst ? EK_OK : EK_ERROR_SHAPE;
    default: return EK_ERROR_KIND;
  }
}

int32_t check_cache(const ek_cache* cache) {
  if (cache->segments == nullptr && cache->num_segments) return EK_ERROR_NULL;
  if (cache->format < EK_KV_F32 || cache->format > EK_KV_INT8) return EK_ERROR_KIND;
  if (cache->block_size < 16 || cache->block_size % 16 || cache->kv_heads < 1) return EK_ERROR_SHAPE;
  if (cache->head_dim < 16 || cache->head_dim % 16 || cache->head_dim > MOST_HEAD_DIM) return EK_ERROR_SHAPE;
  return cache->segment_shift < 0 || cache->segment_shift > 31 ? EK_ERROR_SHAPE : EK_OK;
}

// Every block that is read or written lies in a segment, so that a wrong table is an error and not a crash.
int32_t check_table(const int64_t* blocks, int64_t count, const ek_cache* cache) {
  for (int64_t i = 0; i < count; i++) {
    const int64_t segment = blocks[i] >> cache->segment_shift;
    if (segment < 0 || segment >= cache->num_segments || cache->segments[segment].data == nullptr) return EK_ERROR_BLOCK;
    if ((blocks[i] & ((1ll << cache->segment_shift) - 1)) >= cache->segments[segment].num_blocks) return EK_ERROR_BLOCK;
  }
  return EK_OK;
}

int32_t check_spans(const ek_batch* batch, const ek_cache* cache) {
  const bool has_spans = batch->starts != nullptr && batch->lengths != nullptr && batch->first_rows != nullptr;
  const bool has_tables = batch->blocks != nullptr && batch->table_starts != nullptr;
  if (batch->spans > 0 && !(has_spans && has_tables)) return EK_ERROR_NULL;
  int64_t rows = 0;
  for (int64_t span = 0; span < batch->spans; span++) {
    const int64_t start = batch->starts[span], length = batch->lengths[span];
    if (start < 0 || start > MOST_TOKENS || batch->first_rows[span] != rows) return EK_ERROR_BATCH;
    if (length < 1 || length > batch->tokens - rows) return EK_ERROR_BATCH;
    rows += length;
    const int64_t first = batch->table_starts[span], stop = batch->table_starts[span + 1];
    const int64_t needed = (start + length + cache->block_size - 1) / cache->block_size;
    if (first < 0 || stop < first || stop - first < needed) return EK_ERROR_BLOCK;
    const int32_t error = check_table(batch->blocks + first, needed, cache);
    if (error) return error;
  }
  return rows == batch->tokens ? EK_OK : EK_ERROR_BATCH;
}

int32_t check_batch(const ek_batch* batch) {
  if (batch->tokens < 0 || batch->tokens > MOST_TOKENS || batch->samples < 0 || batch->spans < 0) return EK_ERROR_BATCH;
  if (batch->tokens && (batch->token_ids == nullptr || batch->positions == nullptr)) return EK_ERROR_NULL;
  if (batch->samples && batch->sample_rows == nullptr) return EK_ERROR_NULL;
  for (int64_t i = 0; i < batch->samples; i++) {
    if (batch->sample_rows[i] < 0 || batch->sample_rows[i] >= batch->tokens) return EK_ERROR_BATCH;
  }
  return EK_OK;
}

int32_t check(const ek_program* program, const ek_step* step) {
  if (program == nullptr || step == nullptr || step->batch == nullptr || step->buffers == nullptr) return EK_ERROR_NULL;
  if (program->num_ops < 0 || (program->num_ops && program->ops == nullptr)) return EK_ERROR_NULL;
  if (program->heads < 1 || program->kv_heads < 1 || program->heads % program->kv_heads) return EK_ERROR_SHAPE;
  if (program->head_dim < 2 || program->rope_dim < 0 || program->rope_dim % 2) return EK_ERROR_SHAPE;
  if (program->rope_dim > program->head_dim) return EK_ERROR_SHAPE;
  int32_t error = check_batch(step->batch);
  if (!error && step->cache != nullptr) error = check_cache(step->cache);
  if (!error && step->cache != nullptr) error = check_spans(step->batch, step->cache);
  for (int32_t i = 0; i < program->num_ops && !error; i++) error = check_op(program, &program->ops[i], step);
  return error;
}

}  // namespace

int32_t ek_program_run(ek_pool* pool, const ek_program* program, const ek_step* step) {
  const int32_t error = check(program, step);
  if (error) return error;
  walk self = walk();
  self.tier = ek_pool_tier(pool);
  self.threads = ek_pool_size(pool);
  self.program = program;
  self.step = step;
  return ek_pool_run(pool, next_phase, &self);
}

int32_t ek_linear_check(const ek_linear* linear) {
  if (linear == nullptr || linear->acts == nullptr || linear->out == nullptr) return EK_ERROR_NULL;
  if (linear->tokens < 0) return EK_ERROR_SHAPE;
  return check_parts(linear->parts, linear->num_parts, linear->epilogue, linear->acts);
}

int32_t ek_attend_check(const ek_attend* attend) {
  if (attend == nullptr || attend->cache == nullptr || attend->batch == nullptr) return EK_ERROR_NULL;
  const ek_cache* cache = attend->cache;
  const int32_t error = check_cache(cache);
  if (error) return error;
  const bool odd = attend->heads < 1 || attend->heads % cache->kv_heads || attend->window < 0;
  if (odd || attend->layer < 0 || attend->layer >= cache->num_layers) return EK_ERROR_SHAPE;
  return check_spans(attend->batch, cache);
}
