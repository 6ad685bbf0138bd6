// Metal's math, common, integer and relational functions. Each is overloaded exactly on the types
// that Metal overloads it on, so that a call that Metal finds ambiguous (max(1.0f, 0)) is ambiguous
// here. half and bfloat compute in float and round once.
#pragma once
#include "vector.h"

namespace metal {
#define MCPU_UNARY(name, expr) \
  inline float name(float x) { return expr; } \
  inline half name(half h) { float x = h; return (half)(expr); } \
  inline bfloat name(bfloat h) { float x = h; return (bfloat)(expr); } \
  template <class A, class = if_vec<A>> vec_of<A> name(const A& a) { \
    return map(a, [](auto x) { return name(x); }); \
  }
#define MCPU_VECTOR_BINARY(name) \
  template <class A, class B, class = if_compatible<A, B>> auto name(const A& a, const B& b) { \
    return zip<void>(a, b, [](auto x, auto y) { return name(x, y); }); \
  }
#define MCPU_BINARY(name, expr) \
  inline float name(float x, float y) { return expr; } \
  inline half name(half a, half b) { float x = a, y = b; return (half)(expr); } \
  inline bfloat name(bfloat a, bfloat b) { float x = a, y = b; return (bfloat)(expr); } \
  MCPU_VECTOR_BINARY(name)

#define MCPU_FLOAT_FUNCTIONS \
  MCPU_UNARY(exp, __builtin_expf(x)) MCPU_UNARY(exp2, __builtin_exp2f(x)) \
  MCPU_UNARY(exp10, __builtin_powf(10.0f, x)) MCPU_UNARY(log, __builtin_logf(x)) \
  MCPU_UNARY(log2, __builtin_log2f(x)) MCPU_UNARY(log10, __builtin_log10f(x)) \
  MCPU_UNARY(sqrt, __builtin_sqrtf(x)) MCPU_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x)) \
  MCPU_UNARY(sin, __builtin_sinf(x)) MCPU_UNARY(cos, __builtin_cosf(x)) \
  MCPU_UNARY(tan, __builtin_tanf(x)) MCPU_UNARY(sinh, __builtin_sinhf(x)) \
  MCPU_UNARY(cosh, __builtin_coshf(x)) MCPU_UNARY(tanh, __builtin_tanhf(x)) \
  MCPU_UNARY(asin, __builtin_asinf(x)) MCPU_UNARY(acos, __builtin_acosf(x)) \
  MCPU_UNARY(atan, __builtin_atanf(x)) MCPU_UNARY(asinh, __builtin_asinhf(x)) \
  MCPU_UNARY(acosh, __builtin_acoshf(x)) MCPU_UNARY(atanh, __builtin_atanhf(x)) \
  MCPU_UNARY(sinpi, __builtin_sinf(x * M_PI_F)) MCPU_UNARY(cospi, __builtin_cosf(x * M_PI_F)) \
  MCPU_UNARY(floor, __builtin_floorf(x)) MCPU_UNARY(ceil, __builtin_ceilf(x)) \
  MCPU_UNARY(round, __builtin_roundf(x)) MCPU_UNARY(rint, __builtin_rintf(x)) \
  MCPU_UNARY(trunc, __builtin_truncf(x)) MCPU_UNARY(fabs, __builtin_fabsf(x)) \
  MCPU_UNARY(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f)) \
  MCPU_UNARY(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f)) \
  MCPU_UNARY(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? x : 0.0f) \
  MCPU_BINARY(pow, __builtin_powf(x, y)) MCPU_BINARY(powr, __builtin_powf(x, y)) \
  MCPU_BINARY(atan2, __builtin_atan2f(x, y)) MCPU_BINARY(fmod, __builtin_fmodf(x, y)) \
  MCPU_BINARY(copysign, __builtin_copysignf(x, y)) MCPU_BINARY(fdim, __builtin_fdimf(x, y)) \
  MCPU_BINARY(fmin, __builtin_fminf(x, y)) MCPU_BINARY(fmax, __builtin_fmaxf(x, y)) \
  MCPU_BINARY(step, y < x ? 0.0f : 1.0f) MCPU_BINARY(divide, x / y) \
  inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); } \
  inline half fma(half a, half b, half c) { return (half)__builtin_fmaf(a, b, c); } \
  inline float ldexp(float x, int e) { return __builtin_ldexpf(x, e); } \
  inline float frexp(float x, int& e) { return __builtin_frexpf(x, &e); } \
  inline float modf(float x, float& whole) { return __builtin_modff(x, &whole); } \
  inline float sincos(float x, float& c) { c = __builtin_cosf(x); return __builtin_sinf(x); }
MCPU_FLOAT_FUNCTIONS
namespace precise { MCPU_FLOAT_FUNCTIONS }
namespace fast {
MCPU_FLOAT_FUNCTIONS
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline float abs(float a) { return __builtin_fabsf(a); }
inline float clamp(float x, float low, float high) { return min(max(x, low), high); }
}  // namespace fast

inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isnormal(float x) { return __builtin_isnormal(x); }
inline bool signbit(float x) { return __builtin_signbit(x); }

// ---- for every scalar type ----
#define MCPU_ANY(T, largest, smallest, absolute) \
  inline T max(T a, T b) { return largest; } \
  inline T min(T a, T b) { return smallest; } \
  inline T abs(T a) { return absolute; } \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); } \
  inline T max3(T a, T b, T c) { return max(max(a, b), c); } \
  inline T min3(T a, T b, T c) { return min(min(a, b), c); } \
  inline T median3(T a, T b, T c) { return max(min(a, b), min(max(a, b), c)); } \
  inline T select(T a, T b, bool choose_b) { return choose_b ? b : a; }
#define MCPU_ANY_FLOAT(T) \
  MCPU_ANY(T, (T)__builtin_fmaxf(a, b), (T)__builtin_fminf(a, b), (T)__builtin_fabsf(a))
// U is the unsigned type of the same size: bits are counted and moved there.
#define MCPU_INTEGER(T, U) \
  MCPU_ANY(T, a < b ? b : a, b < a ? b : a, a < T(0) ? T(-a) : a) \
  inline T popcount(T x) { return (T)__builtin_popcountll((U)x); } \
  inline T clz(T x) { \
    return (U)x ? T(__builtin_clzll((U)x) - (64 - sizeof(T) * 8)) : sizeof(T) * 8; \
  } \
  inline T ctz(T x) { return (U)x ? (T)__builtin_ctzll((U)x) : sizeof(T) * 8; } \
  inline T reverse_bits(T x) { \
    U result = 0; \
    for (unsigned i = 0; i < sizeof(T) * 8; i++) result = U(result << 1 | ((U)x >> i & 1)); \
    return (T)result; \
  } \
  inline T extract_bits(T x, uint offset, uint bits) { /* sign-extends when T is signed */ \
    if (!bits) return 0; \
    const uint spare = sizeof(T) * 8 - bits; \
    return T(T((U)x << (spare - offset)) >> spare); \
  } \
  inline T insert_bits(T base, T insert, uint offset, uint bits) { \
    if (!bits) return base; \
    const U mask = U(U(~U(0)) >> (sizeof(T) * 8 - bits) << offset); \
    return T(((U)base & ~mask) | (U((U)insert << offset) & mask)); \
  } \
  inline T rotate(T x, T by) { \
    const uint k = (U)by % (sizeof(T) * 8); \
    return k ? T(U((U)x << k) | (U)x >> (sizeof(T) * 8 - k)) : x; \
  } \
  inline T absdiff(T a, T b) { return a > b ? a - b : b - a; }
MCPU_ANY_FLOAT(float) MCPU_ANY_FLOAT(half) MCPU_ANY_FLOAT(bfloat)
MCPU_INTEGER(char, uchar)  // Metal's char and int8_t are one type, C++'s are two
MCPU_INTEGER(int8_t, uchar) MCPU_INTEGER(short, ushort) MCPU_INTEGER(int, uint)
MCPU_INTEGER(long, ulong) MCPU_INTEGER(uchar, uchar) MCPU_INTEGER(ushort, ushort)
MCPU_INTEGER(uint, uint) MCPU_INTEGER(ulong, ulong)
inline uint mulhi(uint a, uint b) { return (uint)((ulong)a * b >> 32); }
inline int mulhi(int a, int b) { return (int)((long)a * b >> 32); }
inline int mul24(int a, int b) { return a * b; }
inline int mad24(int a, int b, int c) { return a * b + c; }
inline float mix(float x, float y, float a) { return x + (y - x) * a; }
inline half mix(half x, half y, half a) { return x + (y - x) * a; }

// ---- for vectors ----
#define MCPU_VECTOR_UNARY(name) \
  template <class A, class = if_vec<A>> vec_of<A> name(const A& a) { \
    return map(a, [](auto x) { return name(x); }); \
  }
MCPU_VECTOR_BINARY(max) MCPU_VECTOR_BINARY(min) MCPU_VECTOR_UNARY(abs) MCPU_VECTOR_UNARY(popcount)
MCPU_VECTOR_UNARY(clz) MCPU_VECTOR_UNARY(ctz) MCPU_VECTOR_UNARY(reverse_bits)
template <class A, class B, class C, class = if_vec<A>>
vec_of<A> clamp(const A& a, const B& low, const C& high) { return min(max(a, low), high); }
template <class A, class B, class C, class = if_vec<A>>
vec_of<A> mix(const A& x, const B& y, const C& a) { return x + (y - x) * a; }
template <class A, class = if_vec<A>> vec_of<A> extract_bits(const A& a, uint offset, uint bits) {
  return map(a, [=](auto x) { return extract_bits(x, offset, bits); });
}
template <class A, class B, class = if_compatible<A, B>> auto dot(const A& a, const B& b) {
  const auto products = a * b;
  auto sum = products.e[0];
  for (int i = 1; i < common_size<A, B>; i++) sum = sum + products.e[i];
  return sum;
}
template <class A, class = if_vec<A>> auto length_squared(const A& a) { return dot(a, a); }
template <class A, class = if_vec<A>> auto length(const A& a) { return sqrt(dot(a, a)); }
template <class A, class = if_vec<A>> auto normalize(const A& a) { return a * rsqrt(dot(a, a)); }
template <int N> bool any(const vec<bool, N>& v) {
  for (bool b : v.e) if (b) return true;
  return false;
}
template <int N> bool all(const vec<bool, N>& v) {
  for (bool b : v.e) if (!b) return false;
  return true;
}
template <class T, int N>
vec<T, N> select(const vec<T, N>& a, const vec<T, N>& b, const vec<bool, N>& choose_b) {
  vec<T, N> result;
  for (int i = 0; i < N; i++) result.e[i] = choose_b.e[i] ? b.e[i] : a.e[i];
  return result;
}
template <class T, int N>
vec<T, N> fma(const vec<T, N>& a, const vec<T, N>& b, const vec<T, N>& c) {
  vec<T, N> result;
  for (int i = 0; i < N; i++) result.e[i] = fma(a.e[i], b.e[i], c.e[i]);
  return result;
}
}  // namespace metal
