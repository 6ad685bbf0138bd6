// CUDA's words for the executing pass: what kernels/cuda.h and a kernel's body take from CUDA.
// Threads, barriers and exchanges between lanes are the runtime's, as Metal's are.
#pragma once
#include "../abi.h"

#ifndef __clang__
#error "executing CUDA needs clang: g++ has no 16-bit types that behave as numbers"
#endif

typedef _Float16 __half;  // rounded after every operation: see -ffloat16-excess-precision=none
typedef __bf16 __nv_bfloat16;

#define __device__
#define __host__
#define __global__ static
#define __forceinline__ inline
#define __grid_constant__
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")

// The runtime's own reads and writes are none of the access checker's business.
#if __has_feature(thread_sanitizer)
#define BENCH_UNCHECKED __attribute__((no_sanitize("thread"), noinline))
#else
#define BENCH_UNCHECKED
#endif

struct BenchPlace {
  uint32_t x, y, z;
};
BENCH_UNCHECKED inline BenchPlace bench_place(const uint32_t* of) { return {of[0], of[1], of[2]}; }
#define threadIdx bench_place(mcpu_thread->position_in_threadgroup)
#define blockIdx bench_place(mcpu_thread->threadgroup_in_grid)
#define blockDim bench_place(mcpu_thread->dispatch_threads_per_threadgroup)
#define gridDim bench_place(mcpu_thread->threadgroups_per_grid)

// Which call this is: lanes meet only at the same call.
#define BENCH_SITE int site = __builtin_LINE() << 9 | (__builtin_COLUMN() & 511)

constexpr int kAllMemory = kThreadgroupMemory | kDeviceMemory;
inline void __syncthreads(BENCH_SITE) { mcpu_barrier(kThreadgroup, kAllMemory, site); }
inline void __syncwarp(BENCH_SITE) { mcpu_barrier(kSimdgroup, kAllMemory, site); }

template <class T>
BENCH_UNCHECKED T bench_from(const T& value, int lane, int site) {
  const SimdExchange* x = mcpu_simd(&value, sizeof(T), site);
  if (!(x->mask >> lane & 1)) mcpu_fault(kInactiveLane, site, lane, x->mask);
  T result;
  __builtin_memcpy((void*)&result, x->value[lane], sizeof(T));
  return result;
}
template <class T>
T __shfl_sync(uint32_t, T value, int from, BENCH_SITE) {
  return bench_from(value, from & 31, site);
}
template <class T>
T __shfl_xor_sync(uint32_t, T value, int mask, BENCH_SITE) {
  return bench_from(value, (int(mcpu_thread->lane) ^ mask) & 31, site);
}
template <class T>
T __shfl_up_sync(uint32_t, T value, int by, BENCH_SITE) {
  const int lane = mcpu_thread->lane;
  return bench_from(value, lane >= by ? lane - by : lane, site);
}
BENCH_UNCHECKED inline uint32_t __ballot_sync(uint32_t, bool x, BENCH_SITE) {
  const SimdExchange* all = mcpu_simd(&x, sizeof(x), site);
  uint32_t votes = 0;
  for (int i = 0; i < 32; ++i) {
    votes |= (all->mask >> i & 1) && all->value[i][0] ? 1u << i : 0u;
  }
  return votes;
}
inline bool __any_sync(uint32_t mask, bool x, BENCH_SITE) { return __ballot_sync(mask, x, site); }

inline uint32_t __popc(uint32_t x) { return __builtin_popcount(x); }
// Byte i of the result: of the eight bytes of x and y the one that digit i of `digits` names.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t digits) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= uint32_t(bytes >> 8 * (digits >> 4 * i & 7) & 255) << 8 * i;
  }
  return result;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return uint32_t((uint64_t(high) << 32 | low) >> (shift & 31));
}
#define memcpy __builtin_memcpy
inline float __fmul_rn(float a, float b) { return a * b; }
inline float expf(float x) { return __builtin_expf(x); }
inline float __log2f(float x) { return __builtin_log2f(x); }
inline float log2f(float x) { return __builtin_log2f(x); }
inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float exp2f(float x) { return __builtin_exp2f(x); }
inline float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float sqrtf(float x) { return __builtin_sqrtf(x); }
inline float fabsf(float x) { return __builtin_fabsf(x); }
inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
inline float fminf(float a, float b) { return __builtin_fminf(a, b); }
inline float rintf(float x) { return __builtin_rintf(x); }
inline float roundf(float x) { return __builtin_roundf(x); }
inline float ceilf(float x) { return __builtin_ceilf(x); }
inline float floorf(float x) { return __builtin_floorf(x); }

// A `__shared__` variable becomes a reference to memory that the runtime provides, one for each
// declaration; it is followed in units of the numbers in it.
namespace metal {
template <class T, int N>
struct vec;
template <class T>
struct scalar_size {
  static constexpr int value = __is_arithmetic(T) ? sizeof(T) : 1;
};
template <class T, size_t N>
struct scalar_size<T[N]> : scalar_size<T> {};
template <class T, int N>
struct scalar_size<vec<T, N>> : scalar_size<T> {};
template <class T>
T& threadgroup_variable(const void* key, const char* name, BENCH_SITE) {
  return *(T*)mcpu_threadgroup(key, name, sizeof(T), scalar_size<T>::value, site);
}
}  // namespace metal
