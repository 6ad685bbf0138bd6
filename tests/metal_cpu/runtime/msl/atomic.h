// Atomics. Only one thread runs at a time, so these are plain operations that the checker is told
// of.
#pragma once
#include "simd.h"

namespace metal {
enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;
template <class T>
struct scalar_size<atomic<T>> {
  static constexpr int value = sizeof(T);
};

#define MCPU_ATOMIC(name, loads, expr) \
  template <class T, class V> \
  MCPU_UNCHECKED T atomic_##name##_explicit(volatile atomic<T>* p, V operand, memory_order) { \
    mcpu_atomic(p, sizeof(T), loads, 1, __builtin_return_address(0)); \
    const T old = p->value, v = (T)operand; \
    p->value = (T)(expr); \
    return old; \
  }
MCPU_ATOMIC(fetch_add, 1, old + v)
MCPU_ATOMIC(fetch_sub, 1, old - v) MCPU_ATOMIC(fetch_max, 1, old < v ? v : old)
    MCPU_ATOMIC(fetch_min, 1, v < old ? v : old) MCPU_ATOMIC(fetch_and, 1, old& v)
        MCPU_ATOMIC(fetch_or, 1, old | v) MCPU_ATOMIC(fetch_xor, 1, old ^ v)
            MCPU_ATOMIC(exchange, 1, v) MCPU_ATOMIC(store, 0, v) template <class T>
            MCPU_UNCHECKED T atomic_load_explicit(const volatile atomic<T>* p, memory_order) {
  mcpu_atomic(p, sizeof(T), 1, 0, __builtin_return_address(0));
  return p->value;
}
template <class T, class V>
MCPU_UNCHECKED bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* p, T* expected,
                                                          V desired, memory_order, memory_order) {
  mcpu_atomic(p, sizeof(T), 1, 1, __builtin_return_address(0));
  const bool equal = p->value == *expected;
  if (equal)
    p->value = (T)desired;
  else
    *expected = p->value;
  return equal;
}
}  // namespace metal
