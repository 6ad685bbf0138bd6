// Metal's vectors: vec<T, 2..4>, the float4 family, packed vectors, swizzles and operators.
#pragma once
#include "../abi.h"
#include "types.h"

namespace metal {
template <class T, int N> struct vec;

// v.zx and the like: a view of the vector's own elements (all swizzles share a union with them).
template <class T, int N, int... I>
struct swizzle {
  T e[N];
  static constexpr int size = sizeof...(I);
  static constexpr int index[] = {I...};
  constexpr operator vec<T, size>() const {
    vec<T, size> result;
    for (int i = 0; i < size; i++) result.e[i] = e[index[i]];
    return result;
  }
  constexpr T operator[](int i) const { return e[index[i]]; }
  swizzle& operator=(const vec<T, size>& other) {
    for (int i = 0; i < size; i++) e[index[i]] = other.e[i];
    return *this;
  }
  swizzle& operator=(const swizzle& other) { return *this = (vec<T, size>)other; }
#define MCPU_ASSIGN(op) \
  template <class B> swizzle& operator op##=(const B& b) { \
    return *this = (vec<T, size>)*this op b; \
  }
  MCPU_ASSIGN(+) MCPU_ASSIGN(-) MCPU_ASSIGN(*) MCPU_ASSIGN(/)
#undef MCPU_ASSIGN
};

// Is it a vector, of how many elements and of which type? Scalars have none.
template <class T> struct shape {
  static constexpr int size = 0;
  using type = T;
};
template <class T, int N> struct shape<vec<T, N>> {
  static constexpr int size = N;
  using type = T;
};
template <class T, int N, int... I>
struct shape<swizzle<T, N, I...>> : shape<vec<T, sizeof...(I)>> {};
template <class A> using vec_of = vec<typename shape<A>::type, shape<A>::size>;
template <class A> using if_vec = enable_if_t<(shape<A>::size > 0)>;

#define MCPU_S2(N, a, b, i, j) swizzle<T, N, i, j> a##b;
#define MCPU_S3(N, a, b, c, i, j, k) swizzle<T, N, i, j, k> a##b##c;
#define MCPU_SWIZZLES2(N) \
  MCPU_S2(N, x, x, 0, 0) MCPU_S2(N, x, y, 0, 1) MCPU_S2(N, y, x, 1, 0) MCPU_S2(N, y, y, 1, 1) \
  MCPU_S2(N, r, g, 0, 1)
#define MCPU_SWIZZLES3(N) \
  MCPU_SWIZZLES2(N) \
  MCPU_S2(N, x, z, 0, 2) MCPU_S2(N, z, x, 2, 0) MCPU_S2(N, y, z, 1, 2) MCPU_S2(N, z, y, 2, 1) \
  MCPU_S2(N, z, z, 2, 2) MCPU_S3(N, x, y, z, 0, 1, 2) MCPU_S3(N, z, y, x, 2, 1, 0) \
  MCPU_S3(N, y, z, x, 1, 2, 0) MCPU_S3(N, z, x, y, 2, 0, 1) MCPU_S3(N, x, x, x, 0, 0, 0) \
  MCPU_S3(N, r, g, b, 0, 1, 2)
#define MCPU_SWIZZLES4(N) \
  MCPU_SWIZZLES3(N) \
  MCPU_S2(N, x, w, 0, 3) MCPU_S2(N, w, x, 3, 0) MCPU_S2(N, y, w, 1, 3) MCPU_S2(N, w, y, 3, 1) \
  MCPU_S2(N, z, w, 2, 3) MCPU_S2(N, w, z, 3, 2) MCPU_S2(N, w, w, 3, 3) \
  MCPU_S3(N, y, z, w, 1, 2, 3) swizzle<T, N, 0, 1, 2, 3> xyzw; swizzle<T, N, 3, 2, 1, 0> wzyx; \
  swizzle<T, N, 2, 3, 0, 1> zwxy; swizzle<T, N, 1, 0, 3, 2> yxwz; swizzle<T, N, 0, 2, 1, 3> xzyw; \
  swizzle<T, N, 0, 0, 0, 0> xxxx;

#define MCPU_VECTOR_MEMBERS(N) \
  constexpr vec() : e{} {} \
  template <class S, class = enable_if_t<shape<S>::size == 0 && __is_constructible(T, S)>> \
  constexpr vec(S s) : e{} { for (int i = 0; i < N; i++) e[i] = (T)s; } \
  constexpr vec(const vec& other) : e{} { for (int i = 0; i < N; i++) e[i] = other.e[i]; } \
  template <class U> explicit constexpr vec(const vec<U, N>& other) : e{} { \
    for (int i = 0; i < N; i++) e[i] = (T)other.e[i]; \
  } \
  template <class A, class B, class... More> constexpr vec(A a, B b, More... more) : e{} { \
    static_assert(width<A> + width<B> + (0 + ... + width<More>) == N, "wrong number of elements"); \
    int at = 0; put(at, a); put(at, b); (put(at, more), ...); \
  } \
  vec& operator=(const vec& other) { \
    for (int i = 0; i < N; i++) e[i] = other.e[i]; \
    return *this; \
  } \
  T& operator[](int i) { check(i); return e[i]; } \
  const T& operator[](int i) const { check(i); return e[i]; } \
 private: \
  template <class A> static constexpr int width = shape<A>::size ? shape<A>::size : 1; \
  static void check(int i) { if ((unsigned)i >= N) mcpu_fault(kVectorIndex, 0, i, N); } \
  template <class A> constexpr void put(int& at, const A& a) { \
    if constexpr (shape<A>::size > 0) { \
      vec_of<A> v = a; \
      for (int i = 0; i < shape<A>::size; i++) e[at++] = (T)v.e[i]; \
    } else e[at++] = (T)a; \
  }

template <class T> struct alignas(2 * sizeof(T)) vec<T, 2> {
  union { T e[2]; struct { T x, y; }; struct { T r, g; }; MCPU_SWIZZLES2(2) };
  MCPU_VECTOR_MEMBERS(2)
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 3> {
  union { T e[3]; struct { T x, y, z; }; struct { T r, g, b; }; MCPU_SWIZZLES3(3) };
  MCPU_VECTOR_MEMBERS(3)
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 4> {
  union { T e[4]; struct { T x, y, z, w; }; struct { T r, g, b, a; }; MCPU_SWIZZLES4(4) };
  MCPU_VECTOR_MEMBERS(4)
};

template <class T, int N> struct packed_vec {  // aligned as its element
  T e[N];
  packed_vec() = default;
  packed_vec(const vec<T, N>& v) { for (int i = 0; i < N; i++) e[i] = v.e[i]; }
  operator vec<T, N>() const {
    vec<T, N> result;
    for (int i = 0; i < N; i++) result.e[i] = e[i];
    return result;
  }
  T& operator[](int i) { return e[i]; }
  const T& operator[](int i) const { return e[i]; }
};

// ---- operators: vector op vector of the same type, or vector op scalar ----
template <class A, class B>
constexpr int common_size = shape<A>::size > 0 ? shape<A>::size : shape<B>::size;
template <class A, class B>
using common_type = typename shape<conditional_t<(shape<A>::size > 0), A, B>>::type;
template <class A, class B>
constexpr bool compatible =
    (shape<A>::size > 0 || shape<B>::size > 0) &&
    (shape<A>::size == 0 || shape<B>::size == 0 ||
     (shape<A>::size == shape<B>::size &&
      is_same_v<typename shape<A>::type, typename shape<B>::type>));
template <class A, class B> using if_compatible = enable_if_t<compatible<A, B>>;

template <class T, int N, class A> constexpr vec<T, N> widen(const A& a) {
  if constexpr (shape<A>::size > 0) return (vec<T, N>)(vec_of<A>)a;
  else return vec<T, N>((T)a);
}
// The vector of f(x, y) for each pair of elements, of type R (void: the operands' own).
template <class R, class A, class B, class F> constexpr auto zip(const A& a, const B& b, F f) {
  using T = common_type<A, B>;
  constexpr int N = common_size<A, B>;
  const vec<T, N> x = widen<T, N>(a), y = widen<T, N>(b);
  vec<conditional_t<is_same_v<R, void>, T, R>, N> result;
  for (int i = 0; i < N; i++) result.e[i] = f(x.e[i], y.e[i]);
  return result;
}
template <class A, class F> constexpr vec_of<A> map(const A& a, F f) {
  vec_of<A> result = a;
  for (auto& e : result.e) e = f(e);
  return result;
}
#define MCPU_OPERATOR(op, R) \
  template <class A, class B, class = if_compatible<A, B>> \
  constexpr auto operator op(const A& a, const B& b) { \
    using T = common_type<A, B>; \
    return zip<R>(a, b, [](T x, T y) { return conditional_t<is_same_v<R, void>, T, R>(x op y); }); \
  }
#define MCPU_OPERATOR_ASSIGN(op) \
  MCPU_OPERATOR(op, void) \
  template <class T, int N, class B> \
  constexpr vec<T, N>& operator op##=(vec<T, N>& a, const B& b) { return a = a op b; }
MCPU_OPERATOR_ASSIGN(+) MCPU_OPERATOR_ASSIGN(-) MCPU_OPERATOR_ASSIGN(*) MCPU_OPERATOR_ASSIGN(/)
MCPU_OPERATOR_ASSIGN(%) MCPU_OPERATOR_ASSIGN(&) MCPU_OPERATOR_ASSIGN(|) MCPU_OPERATOR_ASSIGN(^)
MCPU_OPERATOR_ASSIGN(<<) MCPU_OPERATOR_ASSIGN(>>)
MCPU_OPERATOR(<, bool) MCPU_OPERATOR(>, bool) MCPU_OPERATOR(<=, bool) MCPU_OPERATOR(>=, bool)
MCPU_OPERATOR(==, bool) MCPU_OPERATOR(!=, bool) MCPU_OPERATOR(&&, bool) MCPU_OPERATOR(||, bool)
#undef MCPU_OPERATOR
#undef MCPU_OPERATOR_ASSIGN
template <class A, class = if_vec<A>> constexpr auto operator-(const A& a) {
  return map(a, [](auto x) { return decltype(x)(-x); });
}
template <class A, class = if_vec<A>> constexpr auto operator~(const A& a) {
  return map(a, [](auto x) { return decltype(x)(~x); });
}
template <class A, class = if_vec<A>> constexpr auto operator!(const A& a) {
  return a == vec_of<A>(0);
}

#define MCPU_VECTOR_NAMES(T) \
  typedef vec<T, 2> T##2; typedef vec<T, 3> T##3; typedef vec<T, 4> T##4; \
  typedef packed_vec<T, 2> packed_##T##2; typedef packed_vec<T, 3> packed_##T##3; \
  typedef packed_vec<T, 4> packed_##T##4;
MCPU_VECTOR_NAMES(bool) MCPU_VECTOR_NAMES(char) MCPU_VECTOR_NAMES(uchar) MCPU_VECTOR_NAMES(short)
MCPU_VECTOR_NAMES(ushort) MCPU_VECTOR_NAMES(int) MCPU_VECTOR_NAMES(uint) MCPU_VECTOR_NAMES(long)
MCPU_VECTOR_NAMES(ulong) MCPU_VECTOR_NAMES(half) MCPU_VECTOR_NAMES(bfloat) MCPU_VECTOR_NAMES(float)
#undef MCPU_VECTOR_NAMES

template <class T, size_t N> struct array {
  T e[N];
  constexpr T& operator[](size_t i) { return e[i]; }
  constexpr const T& operator[](size_t i) const { return e[i]; }
  static constexpr size_t size() { return N; }
};
}  // namespace metal
