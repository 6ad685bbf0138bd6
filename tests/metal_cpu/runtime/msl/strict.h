// The Metal standard library for the strict pass: declarations only, with address spaces as real
// type qualifiers and clang's own vectors. Nothing of this is ever run.
#pragma once
typedef signed char int8_t;  // spelled out: a syntax check may have no system headers
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned uint32_t;
typedef unsigned long uint64_t, size_t;
typedef long ptrdiff_t;
#define MCPU_STRICT
#include "types.h"

#define __METAL__ 1
#define __METAL_VERSION__ 310
#define METAL_FUNC inline
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2))) const
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel
#define double metal_has_no_double_type

namespace metal {
// ---- vectors ----
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
template <class V, class... A> constexpr V make_vec(A...) { return V(); }  // see strict.py
template <class T, int N> using packed_vec = vec<T, N>;
template <class T> using scalar = typename enable_if<true, T>::type;  // not deduced from
#define VECTORS(T) \
  typedef vec<T, 2> T##2; typedef vec<T, 3> T##3; typedef vec<T, 4> T##4; \
  typedef packed_vec<T, 2> packed_##T##2; typedef packed_vec<T, 3> packed_##T##3; \
  typedef packed_vec<T, 4> packed_##T##4;
VECTORS(float) VECTORS(half) VECTORS(bfloat) VECTORS(int) VECTORS(uint) VECTORS(short)
VECTORS(ushort) VECTORS(char) VECTORS(uchar) VECTORS(long) VECTORS(ulong) VECTORS(bool)
template <class T, size_t N> struct array { T e[N]; };

// ---- functions, overloaded on the types that Metal overloads them on ----
#define UNARY(f) \
  float f(float); half f(half); bfloat f(bfloat); template <class T, int N> vec<T, N> f(vec<T, N>);
#define BINARY(f) \
  float f(float, float); half f(half, half); bfloat f(bfloat, bfloat); \
  template <class T, int N> vec<T, N> f(vec<T, N>, vec<T, N>);
#define FLOAT_FUNCTIONS \
  UNARY(exp) UNARY(exp2) UNARY(exp10) UNARY(log) UNARY(log2) UNARY(log10) UNARY(sqrt) UNARY(rsqrt) \
  UNARY(sin) UNARY(cos) UNARY(tan) UNARY(sinh) UNARY(cosh) UNARY(tanh) UNARY(asin) UNARY(acos) \
  UNARY(atan) UNARY(asinh) UNARY(acosh) UNARY(atanh) UNARY(sinpi) UNARY(cospi) UNARY(floor) \
  UNARY(ceil) UNARY(round) UNARY(rint) UNARY(trunc) UNARY(fract) UNARY(fabs) UNARY(saturate) \
  UNARY(sign) BINARY(pow) BINARY(powr) BINARY(atan2) BINARY(fmod) BINARY(copysign) BINARY(fdim) \
  BINARY(fmin) BINARY(fmax) BINARY(step) BINARY(divide) \
  float fma(float, float, float); half fma(half, half, half); \
  template <class T, int N> vec<T, N> fma(vec<T, N>, vec<T, N>, vec<T, N>); \
  float ldexp(float, int); float frexp(float, int&); float modf(float, float&); \
  float sincos(float, float&);
FLOAT_FUNCTIONS
namespace precise { FLOAT_FUNCTIONS }
namespace fast {
FLOAT_FUNCTIONS
float max(float, float);
float min(float, float);
float abs(float);
float clamp(float, float, float);
}
bool isnan(float);
bool isinf(float);
bool isfinite(float);
bool isnormal(float);
bool signbit(float);
#define ANY(T) \
  T max(T, T); T min(T, T); T abs(T); T clamp(T, T, T); T max3(T, T, T); T min3(T, T, T); \
  T median3(T, T, T); T select(T, T, bool);
#define INTEGER(T) \
  ANY(T) T popcount(T); T clz(T); T ctz(T); T reverse_bits(T); T extract_bits(T, uint, uint); \
  T insert_bits(T, T, uint, uint); T rotate(T, T); T absdiff(T, T);
ANY(float) ANY(half) ANY(bfloat) INTEGER(char) INTEGER(int8_t) INTEGER(short) INTEGER(int)
INTEGER(long) INTEGER(uchar) INTEGER(ushort) INTEGER(uint) INTEGER(ulong)
uint mulhi(uint, uint); int mulhi(int, int); int mul24(int, int); int mad24(int, int, int);
float mix(float, float, float); half mix(half, half, half);
template <class T, int N> vec<T, N> max(vec<T, N>, vec<T, N>);
template <class T, int N> vec<T, N> min(vec<T, N>, vec<T, N>);
template <class T, int N> vec<T, N> max(vec<T, N>, scalar<T>);
template <class T, int N> vec<T, N> min(vec<T, N>, scalar<T>);
template <class T, int N> vec<T, N> clamp(vec<T, N>, vec<T, N>, vec<T, N>);
template <class T, int N> vec<T, N> clamp(vec<T, N>, scalar<T>, scalar<T>);
template <class T, int N> vec<T, N> mix(vec<T, N>, vec<T, N>, vec<T, N>);
template <class T, int N> vec<T, N> mix(vec<T, N>, vec<T, N>, scalar<T>);
template <class T, int N> vec<T, N> abs(vec<T, N>);
template <class T, int N> vec<T, N> popcount(vec<T, N>);
template <class T, int N> vec<T, N> clz(vec<T, N>);
template <class T, int N> vec<T, N> ctz(vec<T, N>);
template <class T, int N> vec<T, N> reverse_bits(vec<T, N>);
template <class T, int N> vec<T, N> extract_bits(vec<T, N>, uint, uint);
template <class T, class C, int N> vec<T, N> select(vec<T, N>, vec<T, N>, vec<C, N>);
template <class T, int N> T dot(vec<T, N>, vec<T, N>);
template <class T, int N> T length(vec<T, N>);
template <class T, int N> T length_squared(vec<T, N>);
template <class T, int N> vec<T, N> normalize(vec<T, N>);
template <class T, int N> bool any(vec<T, N>);
template <class T, int N> bool all(vec<T, N>);

// ---- threads ----
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
template <class T> T& threadgroup_variable(const void*, const char*);
#define LANES(f) template <class T> T simd_##f(T); template <class T> T quad_##f(T);
LANES(sum) LANES(product) LANES(max) LANES(min) LANES(and) LANES(or) LANES(xor)
LANES(prefix_inclusive_sum) LANES(prefix_exclusive_sum) LANES(prefix_inclusive_product)
LANES(prefix_exclusive_product) LANES(broadcast_first)
#define SHUFFLE(f) \
  template <class T> T simd_##f(T, ushort); template <class T> T quad_##f(T, ushort);
SHUFFLE(shuffle) SHUFFLE(broadcast) SHUFFLE(shuffle_xor) SHUFFLE(shuffle_up) SHUFFLE(shuffle_down)
SHUFFLE(shuffle_rotate_up) SHUFFLE(shuffle_rotate_down)
template <class T> T simd_shuffle_and_fill_up(T, T, ushort);
template <class T> T simd_shuffle_and_fill_down(T, T, ushort);
struct simd_vote {
  typedef ulong vote_t;
  explicit simd_vote(vote_t);
  explicit operator vote_t() const;
  bool all() const;
  bool any() const;
};
simd_vote simd_ballot(bool);
simd_vote simd_active_threads_mask();
bool simd_any(bool);
bool simd_all(bool);
bool simd_is_first();

// ---- matrices and atomics: overloaded on the address space of the memory ----
template <class T, int Rows = 8, int Columns = 8> struct simdgroup_matrix {
  simdgroup_matrix();
  explicit simdgroup_matrix(T);
  vec<T, 2>& thread_elements();
  const vec<T, 2>& thread_elements() const;
};
typedef simdgroup_matrix<float> simdgroup_float8x8;
typedef simdgroup_matrix<half> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat> simdgroup_bfloat8x8;
template <class T, int Rows = 8, int Columns = 8>
simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T);
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D>&, const simdgroup_matrix<A>&,
                                   const simdgroup_matrix<B>&, const simdgroup_matrix<C>&);
template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D>&, const simdgroup_matrix<A>&,
                        const simdgroup_matrix<B>&);
enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T value; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;
#define ATOMIC(space, f) \
  template <class T, class V> T atomic_##f##_explicit(volatile space atomic<T>*, V, memory_order);
#define IN_SPACE(space) \
  template <class T> void simdgroup_load(simdgroup_matrix<T>&, const space T*, ulong = 8, \
                                         ulong2 = 0, bool = false); \
  template <class T> void simdgroup_store(const simdgroup_matrix<T>&, space T*, ulong = 8, \
                                          ulong2 = 0, bool = false); \
  ATOMIC(space, fetch_add) ATOMIC(space, fetch_sub) ATOMIC(space, fetch_max) \
  ATOMIC(space, fetch_min) ATOMIC(space, fetch_and) ATOMIC(space, fetch_or) \
  ATOMIC(space, fetch_xor) ATOMIC(space, exchange) \
  template <class T, class V> \
  void atomic_store_explicit(volatile space atomic<T>*, V, memory_order); \
  template <class T> T atomic_load_explicit(const volatile space atomic<T>*, memory_order); \
  template <class T, class V> bool atomic_compare_exchange_weak_explicit( \
      volatile space atomic<T>*, T*, V, memory_order, memory_order);
IN_SPACE(device) IN_SPACE(threadgroup)
}  // namespace metal

using namespace metal;
