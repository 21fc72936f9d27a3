// Included before pool.cpp: whoever touches something that threads share may lose its core for a while first, or after.
// What happens once in a million runs then happens in every one.
#include <sched.h>
#include <stdint.h>
#include <unistd.h>

#include <atomic>
#include <new>

namespace std {

inline void shake() {
  static thread_local uint32_t state = (uint32_t)(uintptr_t)&state;
  state = state * 1664525 + 1013904223;
  const uint32_t drawn = state >> 16 & 127;
  if (drawn == 0) usleep(state >> 8 & 255);
  if (drawn == 1) usleep(1500);  // so long that others fall asleep
  if (drawn < 20) sched_yield();
}

template <class T>
struct shaky_atomic {
  std::atomic<T> value;

  T load(memory_order order = memory_order_seq_cst) const {
    shake();
    const T seen = value.load(order);
    shake();
    return seen;
  }
  void store(T now, memory_order order = memory_order_seq_cst) {
    shake();
    value.store(now, order);
    shake();
  }
#define SHAKY(name)                                                \
  T name(T other, memory_order order = memory_order_seq_cst) {     \
    shake();                                                       \
    const T before = value.name(other, order);                     \
    shake();                                                       \
    return before;                                                 \
  }
  SHAKY(fetch_add)
  SHAKY(fetch_sub)
  SHAKY(fetch_or)
  SHAKY(exchange)
#undef SHAKY
};

}  // namespace std

#define atomic shaky_atomic
