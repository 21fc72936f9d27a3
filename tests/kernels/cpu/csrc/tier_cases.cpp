// What dispatch.cpp makes of registers that the system saves (XCR0, each argument in turn): whether avx2 and avx512 are
// usable. The processor is the one at hand.
#include <cpuid.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pool.h"
#include "program.h"

static uint32_t told;

#define __asm__(...) (low = told, high = 0)
#include "dispatch.cpp"

int main(int count, char** arguments) {
  for (int i = 1; i < count; i++) {
    told = (uint32_t)strtoul(arguments[i], nullptr, 0);
    printf("%d %d\n", has_avx2(), has_avx512());
  }
  return 0;
}
