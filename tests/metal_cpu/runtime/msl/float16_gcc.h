// half and bfloat for g++, whose C++ front end has neither before version 13: 16 bits of storage,
// each operation done in float and rounded. As classes they convert less freely than Metal's types
// (a conditional with a half and a float branch is ambiguous); clang's are the real thing.
#pragma once
#include <stdint.h>
#include <type_traits>

namespace mcpu {
constexpr uint16_t to_bfloat(float f) {
  const uint32_t x = __builtin_bit_cast(uint32_t, f);
  if ((x & 0x7fffffff) > 0x7f800000) return x >> 16 | 0x40;  // NaN
  return (x + 0x7fff + (x >> 16 & 1)) >> 16;
}
constexpr uint16_t to_half(float f) {
  const uint32_t x = __builtin_bit_cast(uint32_t, f), sign = x >> 16 & 0x8000, a = x & 0x7fffffff;
  if (a > 0x7f800000) return sign | 0x7e00;   // NaN
  if (a >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (a >= 0x38800000) {                      // normal
    const uint32_t rebased = a - 0x38000000;
    return sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13;
  }
  const uint32_t mantissa = (a & 0x7fffff) | 0x800000, shift = 126 - (a >> 23);
  if (shift > 25) return sign;
  const uint32_t rounded = mantissa >> shift, rest = mantissa & ((1u << shift) - 1);
  const uint32_t tie = 1u << (shift - 1);
  return sign | (rounded + (rest > tie || (rest == tie && (rounded & 1))));
}
constexpr float from_bfloat(uint16_t b) { return __builtin_bit_cast(float, (uint32_t)b << 16); }
constexpr float from_half(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 31) return __builtin_bit_cast(float, sign | 0x7f800000 | mantissa << 13);
  if (exponent) return __builtin_bit_cast(float, sign | (exponent + 112) << 23 | mantissa << 13);
  const float value = mantissa * 0x1p-24f;
  return sign ? -value : value;
}

template <bool is_bfloat>
struct Float16 {
  uint16_t bits;
  Float16() = default;
  static constexpr Float16 round(float f) {
    Float16 result{};
    result.bits = is_bfloat ? to_bfloat(f) : to_half(f);
    return result;
  }
  // Metal converts numbers to half implicitly, but only integers to bfloat.
  template <class T, std::enable_if_t<std::is_integral<T>::value ||
                                      (!is_bfloat && std::is_arithmetic<T>::value)>* = nullptr>
  constexpr Float16(T value) : bits(round((float)value).bits) {}
  template <class T,
            std::enable_if_t<is_bfloat && std::is_floating_point<T>::value, int>* = nullptr>
  explicit constexpr Float16(T value) : bits(round((float)value).bits) {}
  explicit constexpr Float16(Float16<!is_bfloat> other) : bits(round((float)other).bits) {}
  constexpr operator float() const { return is_bfloat ? from_bfloat(bits) : from_half(bits); }
  constexpr Float16 operator-() const {
    Float16 result = *this;
    result.bits ^= 0x8000;
    return result;
  }
};

#define MCPU_FLOAT16_OPERATOR(op)                                                              \
  template <bool B>                                                                            \
  constexpr Float16<B> operator op(Float16<B> a, Float16<B> b) {                               \
    return Float16<B>::round((float)a op(float) b);                                            \
  }                                                                                            \
  template <bool B, class T, class = std::enable_if_t<std::is_integral<T>::value>>             \
  constexpr Float16<B> operator op(Float16<B> a, T b) { return a op Float16<B>(b); }           \
  template <bool B, class T, class = std::enable_if_t<std::is_integral<T>::value>>             \
  constexpr Float16<B> operator op(T a, Float16<B> b) { return Float16<B>(a) op b; }           \
  template <bool B>                                                                            \
  constexpr float operator op(Float16<B> a, float b) { return (float)a op b; }                 \
  template <bool B>                                                                            \
  constexpr float operator op(float a, Float16<B> b) { return a op(float) b; }                 \
  template <bool B, class T>                                                                   \
  Float16<B>& operator op##=(Float16<B>& a, T b) {                                             \
    return a = Float16<B>::round((float)a op(float) b);                                        \
  }
MCPU_FLOAT16_OPERATOR(+)
MCPU_FLOAT16_OPERATOR(-)
MCPU_FLOAT16_OPERATOR(*)
MCPU_FLOAT16_OPERATOR(/)
#undef MCPU_FLOAT16_OPERATOR
}  // namespace mcpu

typedef mcpu::Float16<false> half;
typedef mcpu::Float16<true> bfloat;
