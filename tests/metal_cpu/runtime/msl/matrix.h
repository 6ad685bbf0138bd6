// simdgroup_matrix: 8x8, two elements a lane, in the layout that Apple's GPUs use and MLX relies
// on.
#pragma once
#include "simd.h"

namespace metal {
struct matrix_place {  // the row and the first of the two columns that a lane holds
  int row, column;
  explicit matrix_place(int lane)
      : row((lane / 4 & 4) + lane / 2 % 4), column((lane / 4 & 2) * 2 + lane % 2 * 2) {}
};

template <class T, int Rows = 8, int Columns = 8>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "Metal has 8x8 only");
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    const matrix_place at(mcpu_thread->lane);
    for (int i = 0; i < 2; i++) elements.e[i] = at.row == at.column + i ? diagonal : (T)0;
  }
  vec<T, 2>& thread_elements() { return elements; }
  const vec<T, 2>& thread_elements() const { return elements; }
  vec<T, 2> elements;
};
typedef simdgroup_matrix<float> simdgroup_float8x8;
typedef simdgroup_matrix<half> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat> simdgroup_bfloat8x8;

template <class T, int Rows = 8, int Columns = 8>
simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Rows, Columns> result;
  result.elements = vec<T, 2>(value);
  return result;
}
template <class P>
P* matrix_element(P* p, int i, ulong stride, vec<ulong, 2> origin, bool transpose) {
  const matrix_place at(mcpu_thread->lane);
  const ulong row = transpose ? at.column + i : at.row, column = transpose ? at.row : at.column + i;
  return p + (origin.y + row) * stride + origin.x + column;
}
template <class T, class P>
void simdgroup_load(simdgroup_matrix<T>& m, const P* p, ulong stride = 8,
                    vec<ulong, 2> origin = vec<ulong, 2>(0), bool transpose = false) {
  for (int i = 0; i < 2; i++) m.elements.e[i] = *matrix_element(p, i, stride, origin, transpose);
}
template <class T, class P>
void simdgroup_store(const simdgroup_matrix<T>& m, P* p, ulong stride = 8,
                     vec<ulong, 2> origin = vec<ulong, 2>(0), bool transpose = false) {
  for (int i = 0; i < 2; i++) *matrix_element(p, i, stride, origin, transpose) = m.elements.e[i];
}

// d = a b + c, in float, rounded once to d's type.
template <class D, class A, class B, class C>
MCPU_UNCHECKED void simdgroup_multiply_accumulate(simdgroup_matrix<D>& d,
                                                  const simdgroup_matrix<A>& a,
                                                  const simdgroup_matrix<B>& b,
                                                  const simdgroup_matrix<C>& c, MCPU_SITE) {
  struct Factors {
    A a[2];
    B b[2];
  };
  struct Product {
    float a[8][8], b[8][8];
  };
  const Factors mine = {{a.elements.e[0], a.elements.e[1]}, {b.elements.e[0], b.elements.e[1]}};
  SimdExchange* x = exchange(mine, site);
  static_assert(sizeof(Product) <= sizeof(x->result), "");
  if (x->mask != 0xffffffffu) mcpu_fault(kMatrixLanes, site, x->mask, 0);
  Product& whole = *(Product*)x->result;
  if (!x->has_result) {
    for (int lane = 0; lane < 32; lane++) {
      const Factors other = lane_value<Factors>(x, lane);
      const matrix_place at(lane);
      for (int i = 0; i < 2; i++) {
        whole.a[at.row][at.column + i] = (float)other.a[i];
        whole.b[at.row][at.column + i] = (float)other.b[i];
      }
    }
    x->has_result = true;
  }
  const matrix_place at(mcpu_thread->lane);
  for (int i = 0; i < 2; i++) {
    float sum = (float)c.elements.e[i];
    for (int k = 0; k < 8; k++) sum += whole.a[at.row][k] * whole.b[k][at.column + i];
    d.elements.e[i] = (D)sum;
  }
}
template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D>& d, const simdgroup_matrix<A>& a,
                        const simdgroup_matrix<B>& b, MCPU_SITE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D>((D)0), site);
}
}  // namespace metal
