// Metal's words in CUDA C++: what the kernels of this folder need to compile for NVIDIA's GPUs.
//
// A warp is a simdgroup. mlx_delta/ops/cuda_text.py drops the address spaces, which the compiler
// infers, writes `__shared__` for `threadgroup` as a storage class and METAL_INLINE for `inline`, and
// puts the functions into namespace `metal`, so that they find these names before CUDA's own; the
// kernel's body, which MLX puts into a namespace of its own, begins with METAL_NAMES. Vectors are of
// our own, since Metal's can be indexed.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifndef __CUDACC_RTC__  // which MLX compiles with at run time: it has no such file, and needs none
#include <stdint.h>
#endif

#define METAL_INLINE __device__ __forceinline__
#define UNROLL_ALL _Pragma("unroll")
#define UNROLL_NONE _Pragma("unroll 1")
#define TILES_UNROLL _Pragma("unroll")
// A run of 4, 8 or 16 bytes lies at a multiple of them wherever the kernels read one.
#define WIDE_LOAD alignas((sizeof(Element) * N & (sizeof(Element) * N - 1)) == 0 \
                              ? (sizeof(Element) * N < 16 ? sizeof(Element) * N : 16) \
                              : sizeof(Element))
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7fffffff)
#endif

namespace metal {

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __half half;
typedef __half float16_t;
typedef __nv_bfloat16 bfloat;
typedef __nv_bfloat16 bfloat16_t;

template <typename T, int N>
struct vec;
template <typename T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  METAL_INLINE vec() {}
  METAL_INLINE explicit vec(T a) : x(a), y(a) {}
  METAL_INLINE vec(T a, T b) : x(a), y(b) {}
  METAL_INLINE T& operator[](int i) { return i ? y : x; }
  METAL_INLINE const T& operator[](int i) const { return i ? y : x; }
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  METAL_INLINE vec() {}
  METAL_INLINE explicit vec(T a) : x(a), y(a), z(a), w(a) {}
  METAL_INLINE vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  METAL_INLINE T& operator[](int i) { return i < 2 ? (i ? y : x) : (i == 2 ? z : w); }
  METAL_INLINE const T& operator[](int i) const { return i < 2 ? (i ? y : x) : (i == 2 ? z : w); }
};

typedef vec<float, 2> float2;
typedef vec<float, 4> float4;
typedef vec<half, 2> half2;
typedef vec<int, 2> int2;
typedef vec<uint, 2> uint2;

// The thread attributes that have three parts.
struct uint3 {
  uint x, y, z;
};

#define METAL_VECTOR_OPERATOR(op)                                                      \
  template <typename T>                                                                \
  METAL_INLINE vec<T, 2> operator op(vec<T, 2> a, vec<T, 2> b) {                       \
    return {a.x op b.x, a.y op b.y};                                                   \
  }                                                                                    \
  template <typename T>                                                                \
  METAL_INLINE vec<T, 2> operator op(vec<T, 2> a, T b) {                               \
    return {a.x op b, a.y op b};                                                       \
  }                                                                                    \
  template <typename T>                                                                \
  METAL_INLINE vec<T, 2> operator op(T a, vec<T, 2> b) {                               \
    return {a op b.x, a op b.y};                                                       \
  }                                                                                    \
  template <typename T>                                                                \
  METAL_INLINE vec<T, 2>& operator op##=(vec<T, 2>& a, vec<T, 2> b) {                  \
    return a = a op b;                                                                 \
  }                                                                                    \
  template <typename T>                                                                \
  METAL_INLINE vec<T, 2>& operator op##=(vec<T, 2>& a, T b) {                          \
    return a = a op b;                                                                 \
  }
METAL_VECTOR_OPERATOR(+)
METAL_VECTOR_OPERATOR(-)
METAL_VECTOR_OPERATOR(*)
#undef METAL_VECTOR_OPERATOR

constexpr uint all_lanes = 0xffffffffu;

METAL_INLINE uint lane() { return threadIdx.x % 32; }  // threadgroups are a row of threads

template <typename To, typename From>
METAL_INLINE To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Mixed arguments are common: `min(int, const int)`. Metal takes the common type too.
METAL_INLINE float max(float a, float b) { return fmaxf(a, b); }
METAL_INLINE float min(float a, float b) { return fminf(a, b); }
METAL_INLINE int max(int a, int b) { return a > b ? a : b; }
METAL_INLINE int min(int a, int b) { return a < b ? a : b; }
METAL_INLINE uint max(uint a, uint b) { return a > b ? a : b; }
METAL_INLINE uint min(uint a, uint b) { return a < b ? a : b; }
METAL_INLINE float2 max(float2 a, float2 b) {
  return {fmaxf(a.x, b.x), fmaxf(a.y, b.y)};
}
template <typename T>
METAL_INLINE T clamp(T x, T least, T most) {
  return x < least ? least : x > most ? most : x;
}
METAL_INLINE float abs(float x) { return fabsf(x); }
METAL_INLINE float rsqrt(float x) { return rsqrtf(x); }
METAL_INLINE float sqrt(float x) { return sqrtf(x); }
METAL_INLINE float rint(float x) { return rintf(x); }
METAL_INLINE float round(float x) { return roundf(x); }
METAL_INLINE float ceil(float x) { return ceilf(x); }
METAL_INLINE float floor(float x) { return floorf(x); }
METAL_INLINE bool isnan(float x) { return x != x; }
METAL_INLINE uint popcount(uint x) { return __popc(x); }
METAL_INLINE float log2(float x) { return log2f(x); }
METAL_INLINE float fma(float a, float b, float c) { return fmaf(a, b, c); }
METAL_INLINE float exp(float x) { return expf(x); }
#define EXACT_PRODUCT
METAL_INLINE float exact_product(float a, float b) { return __fmul_rn(a, b); }  // never fused

namespace fast {
METAL_INLINE float exp2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else  // the bench of the tests
  return exp2f(x);
#endif
}
METAL_INLINE float log2(float x) { return __log2f(x); }
}  // namespace fast

// --- simdgroups ---

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
METAL_INLINE mem_flags operator|(mem_flags a, mem_flags) { return a; }
METAL_INLINE void threadgroup_barrier(mem_flags) { __syncthreads(); }
METAL_INLINE void simdgroup_barrier(mem_flags) { __syncwarp(); }

template <typename T>
METAL_INLINE T simd_shuffle(T x, ushort from) {
  return __shfl_sync(all_lanes, x, from);
}
template <typename T>
METAL_INLINE T simd_shuffle_xor(T x, ushort mask) {
  return __shfl_xor_sync(all_lanes, x, mask);
}
template <typename T>
METAL_INLINE vec<T, 2> simd_shuffle(vec<T, 2> x, ushort from) {
  return {simd_shuffle(x.x, from), simd_shuffle(x.y, from)};
}
template <typename T>
METAL_INLINE vec<T, 2> simd_shuffle_xor(vec<T, 2> x, ushort mask) {
  return {simd_shuffle_xor(x.x, mask), simd_shuffle_xor(x.y, mask)};
}
#define METAL_OVER_LANES(name, T, expression)          \
  METAL_INLINE T simd_##name(T x) {                    \
    UNROLL_ALL for (int i = 16; i > 0; i /= 2) {       \
      const T y = __shfl_xor_sync(all_lanes, x, i);    \
      x = expression;                                  \
    }                                                  \
    return x;                                          \
  }
METAL_OVER_LANES(sum, float, x + y)
METAL_OVER_LANES(max, float, fmaxf(x, y))
METAL_OVER_LANES(sum, int, x + y)
METAL_OVER_LANES(sum, uint, x + y)
METAL_OVER_LANES(max, int, max(x, y))
METAL_OVER_LANES(max, uint, max(x, y))
METAL_OVER_LANES(min, uint, min(x, y))
#undef METAL_OVER_LANES
METAL_INLINE bool simd_any(bool x) { return __any_sync(all_lanes, x); }
template <typename T>
METAL_INLINE T simd_prefix_exclusive_sum(T x) {
  T sum = x;
  UNROLL_ALL for (uint i = 1; i < 32; i *= 2) {
    const T before = __shfl_up_sync(all_lanes, sum, i);
    sum += lane() >= i ? before : T(0);
  }
  return sum - x;
}

struct simd_vote {
  typedef unsigned long long vote_t;
  vote_t bits;
  METAL_INLINE explicit operator vote_t() const { return bits; }
};
METAL_INLINE simd_vote simd_ballot(bool x) { return {__ballot_sync(all_lanes, x)}; }


// An 8x8 matrix as tiles.h has it: two elements a lane. Products go through exchanges between lanes and
// are slow: this is for checking that sources compile, and what they compute.
template <typename T, int Rows, int Columns>
struct simdgroup_matrix {
  vec<T, 2> elements;
  METAL_INLINE vec<T, 2>& thread_elements() { return elements; }
};
METAL_INLINE int matrix_place(int row, int column) {
  return ((row & 3) << 1) | ((row & 4) << 2) | ((column & 2) >> 1) | ((column & 4) << 1);
}
METAL_INLINE int own_row() { return ((lane() >> 1) & 3) | ((lane() >> 2) & 4); }
METAL_INLINE int own_column() { return ((lane() << 1) & 2) | ((lane() >> 1) & 4); }
template <typename T, int Rows, int Columns>
METAL_INLINE simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
  return {vec<T, 2>(value, value)};
}
template <typename T>
METAL_INLINE void simdgroup_load(simdgroup_matrix<T, 8, 8>& to, const T* from, int row) {
  const T* own = from + own_row() * row + own_column();
  to.elements = vec<T, 2>(own[0], own[1]);
}
template <typename A, typename B>
METAL_INLINE void simdgroup_multiply_accumulate(
    simdgroup_matrix<float, 8, 8>& to,
    simdgroup_matrix<A, 8, 8> a,
    simdgroup_matrix<B, 8, 8> b,
    simdgroup_matrix<float, 8, 8> add) {
  float2 sum = add.elements;
  UNROLL_ALL for (int k = 0; k < 8; ++k) {
    const int left = matrix_place(own_row(), k);
    const int right = matrix_place(k, own_column());
    const float even = simd_shuffle(float(a.elements.x), left);
    const float odd = simd_shuffle(float(a.elements.y), left);
    const float factor = k & 1 ? odd : even;
    sum.x += factor * simd_shuffle(float(b.elements.x), right);
    sum.y += factor * simd_shuffle(float(b.elements.y), right);
  }
  to.elements = sum;
}

#define SELECT_BYTES
METAL_INLINE uint select_bytes(uint x, uint y, uint digits) { return __byte_perm(x, y, digits); }
#define FUNNEL_RIGHT
METAL_INLINE uint funnel_right(uint low, uint high, uint shift) {
  return __funnelshift_r(low, high, shift);
}

}  // namespace metal

// Names that CUDA or C++ has too: what a kernel's body means is Metal's.
#define METAL_NAMES                                                                          \
  using metal::uchar; using metal::ushort; using metal::uint; using metal::ulong;            \
  using metal::half; using metal::bfloat; using metal::vec; using metal::float2; using metal::float4;           \
  using metal::half2; using metal::int2; using metal::uint2; using metal::uint3;             \
  using metal::max; using metal::min; using metal::abs; using metal::rsqrt;                  \
  using metal::sqrt; using metal::rint; using metal::round; using metal::ceil;               \
  using metal::floor; using metal::exp; using metal::log2; using metal::fma;
