#pragma once  // stands in for MLX's, whose methods are overloaded on address spaces
template <class T>
struct complex_t {
  using value_type = T;
  T real, imag;
  constexpr complex_t() : real(0), imag(0) {}
  constexpr complex_t(T real) : real(real), imag(0) {}
  constexpr complex_t(T real, T imag) : real(real), imag(imag) {}
};
typedef complex_t<float> complex64_t;
