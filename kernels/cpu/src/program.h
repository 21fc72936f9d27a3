// Going through a model's operations, each a phase or two of the pool.
#pragma once
#include "pool.h"

// All operations, in order. EK_OK, or why nothing was done.
int32_t ek_program_run(ek_pool*, const ek_program*, const ek_step*);
int32_t ek_linear_check(const ek_linear*);
int32_t ek_attend_check(const ek_attend*);
