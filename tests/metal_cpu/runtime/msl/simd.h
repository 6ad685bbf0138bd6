// Barriers, simdgroup and quadgroup functions, and threadgroup variables.
#pragma once
#include "math.h"

// The runtime's own reads and writes are none of the access checker's business.
#if defined(__SANITIZE_THREAD__)
#define MCPU_UNCHECKED __attribute__((no_sanitize("thread"), noinline))
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define MCPU_UNCHECKED __attribute__((no_sanitize("thread"), noinline))
#endif
#endif
#ifndef MCPU_UNCHECKED
#define MCPU_UNCHECKED
#endif

// Which call this is: as a default argument, the line and the column of the caller. Lanes meet only
// at the same call. (g++ knows no columns, so there two calls on one line are the same.)
#if __has_builtin(__builtin_COLUMN)
constexpr int mcpu_here(int line = __builtin_LINE(), int column = __builtin_COLUMN()) {
  return line << 9 | (column & 511);
}
#else
constexpr int mcpu_here(int line = __builtin_LINE()) { return line << 9; }
#endif
#define MCPU_SITE int site = mcpu_here()

namespace metal {
enum class mem_flags {
  mem_none = 0, mem_device = kDeviceMemory, mem_threadgroup = kThreadgroupMemory, mem_texture = 4,
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }
inline void threadgroup_barrier(mem_flags flags, MCPU_SITE) {
  mcpu_barrier(kThreadgroup, (int)flags, site);
}
inline void simdgroup_barrier(mem_flags flags, MCPU_SITE) {
  mcpu_barrier(kSimdgroup, (int)flags, site);
}

// A `threadgroup T name[...]` declaration becomes a reference to memory that the runtime provides,
// one per declaration (rewrite.py). Shadowed at the granularity of the type's scalar.
template <class T> struct scalar_size {
  static constexpr int value = is_arithmetic_v<T> ? sizeof(T) : 1;
};
template <class T, size_t N> struct scalar_size<T[N]> : scalar_size<T> {};
template <class T, int N> struct scalar_size<vec<T, N>> : scalar_size<T> {};
template <class T> T& threadgroup_variable(const void* key, const char* name, MCPU_SITE) {
  return *(T*)mcpu_threadgroup(key, name, sizeof(T), scalar_size<T>::value, site);
}

// ---- what lanes exchange ----
template <class T> MCPU_UNCHECKED SimdExchange* exchange(const T& value, int site) {
  static_assert(sizeof(T) <= 32, "too large a type for a simd function");
  return mcpu_simd(&value, sizeof(T), site);
}
template <class T> MCPU_UNCHECKED T lane_value(const SimdExchange* x, int lane) {
  T result;
  __builtin_memcpy((void*)&result, x->value[lane], sizeof(T));
  return result;
}
template <class T> MCPU_UNCHECKED T active_lane_value(const SimdExchange* x, int lane, int site) {
  if (lane >= 0 && lane < 32 && (x->mask >> lane & 1)) return lane_value<T>(x, lane);
  mcpu_fault(kInactiveLane, site, lane, x->mask);
  T result;
  __builtin_memset((void*)&result, 0xff, sizeof(T));
  return result;
}
// Adds up in a butterfly (1, 2, 4, 8, 16 apart), leaving out lanes that do not take part.
template <class T, class F>
MCPU_UNCHECKED T reduce(const SimdExchange* x, F f, int first = 0, int lanes = 32) {
  T value[32];
  bool active[32];
  for (int i = 0; i < lanes; i++) {
    active[i] = x->mask >> (first + i) & 1;
    if (active[i]) value[i] = lane_value<T>(x, first + i);
  }
  for (int apart = 1; apart < lanes; apart *= 2)
    for (int i = 0; i + apart < lanes; i += 2 * apart) {
      if (!active[i + apart]) continue;
      value[i] = active[i] ? f(value[i], value[i + apart]) : value[i + apart];
      active[i] = true;
    }
  return value[0];
}
template <class T, class F> MCPU_UNCHECKED T reduce_once(SimdExchange* x, F f) {
  if (!x->has_result) {
    const T result = reduce<T>(x, f);
    __builtin_memcpy(x->result, &result, sizeof(T));
    x->has_result = true;
  }
  T result;
  __builtin_memcpy((void*)&result, x->result, sizeof(T));
  return result;
}

#define MCPU_REDUCTION(name, expr) \
  template <class T> MCPU_UNCHECKED T simd_##name(T value, MCPU_SITE) { \
    return reduce_once<T>(exchange(value, site), [](T a, T b) { return (T)(expr); }); \
  } \
  template <class T> MCPU_UNCHECKED T quad_##name(T value, MCPU_SITE) { \
    const SimdExchange* x = exchange(value, site); \
    return reduce<T>(x, [](T a, T b) { return (T)(expr); }, mcpu_thread->lane & ~3u, 4); \
  }
MCPU_REDUCTION(sum, a + b) MCPU_REDUCTION(product, a * b) MCPU_REDUCTION(max, max(a, b))
MCPU_REDUCTION(min, min(a, b)) MCPU_REDUCTION(and, a & b) MCPU_REDUCTION(or, a | b)
MCPU_REDUCTION(xor, a ^ b)

template <class T, class F> MCPU_UNCHECKED T scan(T value, T start, int past_end, F f, int site) {
  const SimdExchange* x = exchange(value, site);
  T result = start;
  for (int i = 0; i < (int)mcpu_thread->lane + past_end; i++)
    if (x->mask >> i & 1) result = f(result, lane_value<T>(x, i));
  return result;
}
#define MCPU_SCAN(name, start, expr) \
  template <class T> T simd_prefix_inclusive_##name(T value, MCPU_SITE) { \
    return scan(value, (T)start, 1, [](T a, T b) { return (T)(expr); }, site); \
  } \
  template <class T> T simd_prefix_exclusive_##name(T value, MCPU_SITE) { \
    return scan(value, (T)start, 0, [](T a, T b) { return (T)(expr); }, site); \
  }
MCPU_SCAN(sum, 0, a + b) MCPU_SCAN(product, 1, a * b)

#define MCPU_SHUFFLE(name, source) \
  template <class T> MCPU_UNCHECKED T simd_##name(T value, ushort k, MCPU_SITE) { \
    const SimdExchange* x = exchange(value, site); \
    const int lane = mcpu_thread->lane; (void)lane; \
    return active_lane_value<T>(x, source, site); \
  }
#define MCPU_QUAD_SHUFFLE(name, source) \
  template <class T> MCPU_UNCHECKED T quad_##name(T value, ushort k, MCPU_SITE) { \
    const SimdExchange* x = exchange(value, site); \
    const int lane = mcpu_thread->lane & 3; (void)lane; \
    return active_lane_value<T>(x, (mcpu_thread->lane & ~3u) | ((source) & 3), site); \
  }
#define MCPU_BOTH_SHUFFLES(name, source) MCPU_SHUFFLE(name, source) MCPU_QUAD_SHUFFLE(name, source)
MCPU_BOTH_SHUFFLES(shuffle, k) MCPU_BOTH_SHUFFLES(broadcast, k)
MCPU_BOTH_SHUFFLES(shuffle_xor, lane ^ k)
// Metal leaves lanes without a source undefined; MLX's kernels expect them to keep their value.
MCPU_SHUFFLE(shuffle_up, lane >= k ? lane - k : lane)
MCPU_SHUFFLE(shuffle_down, lane + k < 32 ? lane + k : lane)
MCPU_SHUFFLE(shuffle_rotate_up, (lane - k) & 31) MCPU_SHUFFLE(shuffle_rotate_down, (lane + k) & 31)
template <class T> MCPU_UNCHECKED T simd_broadcast_first(T value, MCPU_SITE) {
  const SimdExchange* x = exchange(value, site);
  return lane_value<T>(x, __builtin_ctz(x->mask));
}
template <class T> struct value_and_filling { T value, filling; };
template <class T>
MCPU_UNCHECKED T simd_shuffle_and_fill_up(T value, T filling, ushort delta, MCPU_SITE) {
  const SimdExchange* x = exchange(value_and_filling<T>{value, filling}, site);
  const int source = (int)mcpu_thread->lane - delta;
  const auto pair = active_lane_value<value_and_filling<T>>(x, source & 31, site);
  return source >= 0 ? pair.value : pair.filling;
}
template <class T>
MCPU_UNCHECKED T simd_shuffle_and_fill_down(T value, T filling, ushort delta, MCPU_SITE) {
  const SimdExchange* x = exchange(value_and_filling<T>{value, filling}, site);
  const int source = (int)mcpu_thread->lane + delta;
  const auto pair = active_lane_value<value_and_filling<T>>(x, source & 31, site);
  return source < 32 ? pair.value : pair.filling;
}

// ---- votes ----
class simd_vote {
 public:
  typedef ulong vote_t;
  explicit constexpr simd_vote(vote_t v = 0) : vote(v) {}
  explicit constexpr operator vote_t() const { return vote; }
  bool all() const { return (uint)vote == 0xffffffffu; }
  bool any() const { return vote != 0; }
 private:
  vote_t vote;
};
MCPU_UNCHECKED inline simd_vote simd_ballot(bool predicate, MCPU_SITE) {
  const SimdExchange* x = exchange(predicate, site);
  ulong vote = 0;
  for (int i = 0; i < 32; i++)
    if ((x->mask >> i & 1) && x->value[i][0]) vote |= 1ul << i;
  return simd_vote(vote);
}
MCPU_UNCHECKED inline bool simd_any(bool p, MCPU_SITE) { return simd_ballot(p, site).any(); }
MCPU_UNCHECKED inline bool simd_all(bool p, MCPU_SITE) { return !simd_ballot(!p, site).any(); }
MCPU_UNCHECKED inline simd_vote simd_active_threads_mask(MCPU_SITE) {
  return simd_ballot(true, site);
}
MCPU_UNCHECKED inline bool simd_is_first(MCPU_SITE) {
  return (int)mcpu_thread->lane == __builtin_ctz(exchange(true, site)->mask);
}
}  // namespace metal
