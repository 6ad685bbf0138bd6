// Metal's scalar types, type traits and numeric limits.
#pragma once
#ifndef MCPU_STRICT
#include <stddef.h>
#include <stdint.h>
#endif

#ifdef __clang__
typedef _Float16 half;  // rounded after every operation: see -ffloat16-excess-precision=none
typedef __bf16 bfloat;
#else
#include "float16_gcc.h"
#endif
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

namespace metal {
using ::bfloat;
using ::half;

template <class T, T v>
struct integral_constant {
  static constexpr T value = v;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return v; }
};
template <bool v>
using bool_constant = integral_constant<bool, v>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <bool c, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool c, class A, class B> struct conditional { using type = A; };
template <class A, class B> struct conditional<false, A, B> { using type = B; };
template <class T> struct remove_cv { using type = T; };
template <class T> struct remove_cv<const T> : remove_cv<T> {};
template <class T> struct remove_cv<volatile T> : remove_cv<T> {};
template <class T> struct remove_reference { using type = T; };
template <class T> struct remove_reference<T&> { using type = T; };
template <class T> struct remove_reference<T&&> { using type = T; };
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template <bool c, class T = void> using enable_if_t = typename enable_if<c, T>::type;
template <bool c, class A, class B> using conditional_t = typename conditional<c, A, B>::type;
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> using remove_reference_t = typename remove_reference<T>::type;

template <class T> struct is_integral : false_type {};
template <class T> struct is_unsigned : false_type {};
#define MCPU_INTEGRAL(T, is_u)                     \
  template <> struct is_integral<T> : true_type {}; \
  template <> struct is_unsigned<T> : bool_constant<is_u> {};
MCPU_INTEGRAL(bool, true) MCPU_INTEGRAL(char, false) MCPU_INTEGRAL(int8_t, false)
MCPU_INTEGRAL(short, false) MCPU_INTEGRAL(int, false) MCPU_INTEGRAL(long, false)
MCPU_INTEGRAL(uchar, true) MCPU_INTEGRAL(ushort, true) MCPU_INTEGRAL(uint, true)
MCPU_INTEGRAL(ulong, true)
#undef MCPU_INTEGRAL
template <class T>
struct is_floating_point
    : bool_constant<is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>> {};
template <class T>
struct is_arithmetic : bool_constant<is_integral<T>::value || is_floating_point<T>::value> {};
template <class T> struct is_signed : bool_constant<!is_unsigned<T>::value> {};
template <class A, class B>
struct is_convertible {
  template <class T> static true_type accepts(T);
  template <class> static false_type test(...);
  template <class F> static decltype(accepts<B>(((F(*)())0)())) test(int);
  static constexpr bool value = decltype(test<A>(0))::value;
};
template <class T> constexpr bool is_integral_v = is_integral<T>::value;
template <class T> constexpr bool is_unsigned_v = is_unsigned<T>::value;
template <class T> constexpr bool is_signed_v = is_signed<T>::value;
template <class T> constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T> constexpr bool is_arithmetic_v = is_arithmetic<T>::value;
template <class A, class B> constexpr bool is_convertible_v = is_convertible<A, B>::value;
template <class A, class B> constexpr bool is_constructible_v = __is_constructible(A, B);

template <class T>
struct numeric_limits {
  static constexpr bool is_signed = T(-1) < T(0);
  static constexpr T max() {
    return is_signed ? T(((ulong)1 << (sizeof(T) * 8 - 1)) - 1) : T(~T(0));
  }
  static constexpr T min() { return is_signed ? T((ulong)1 << (sizeof(T) * 8 - 1)) : T(0); }
  static constexpr T lowest() { return min(); }
};
#define MCPU_LIMITS(T, largest, smallest, eps)                           \
  template <>                                                            \
  struct numeric_limits<T> {                                             \
    static constexpr T max() { return (T)largest; }                      \
    static constexpr T lowest() { return (T)-largest; }                  \
    static constexpr T min() { return (T)smallest; }                     \
    static constexpr T epsilon() { return (T)eps; }                      \
    static constexpr T infinity() { return (T)__builtin_inff(); }        \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); }     \
  };
MCPU_LIMITS(float, 3.40282347e+38f, 1.17549435e-38f, 1.19209290e-07f)
MCPU_LIMITS(half, 65504.0f, 6.103515625e-05f, 0.0009765625f)
MCPU_LIMITS(bfloat, 3.38953139e+38f, 1.17549435e-38f, 0.0078125f)
#undef MCPU_LIMITS
}  // namespace metal

template <class T, class U>
inline T as_type(U value) {
  static_assert(sizeof(T) == sizeof(U), "as_type needs types of the same size");
  T result;
  __builtin_memcpy((void*)&result, &value, sizeof(result));
  return result;
}

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define FLT_MAX 3.40282347e+38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.19209290e-07f
#define HALF_MAX ((half)65504.0f)
#define M_PI_F 3.14159265358979323846f
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.707106781186547524401f
