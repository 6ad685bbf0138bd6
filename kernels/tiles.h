// What the tile kernels share: how matrices lie in the lanes of a simdgroup.
//
// An 8x8 matrix has two elements a lane: lane i has row matrix_row(i), and of it the columns
// matrix_column(i) and the next. Metal's specification leaves this open, and all of MLX's attention
// kernels rely on it.
//
// Scores are computed the other way round, keys by queries: rows of keys then come as they lie in
// memory, and only weights, a D / 8th of all that is read, have to change sides. So a lane has
// scores of two queries, in its two columns, and a query's are in the eight lanes that share one.

#ifndef TILES_UNROLL
#define TILES_UNROLL _Pragma("clang loop unroll(full)")
#endif

// What a hidden score is: finite, so that differences of two of them are no NaN.
constant constexpr float TILES_HIDDEN = -1e30f;

inline ushort matrix_row(ushort lane) { return ((lane >> 1) & 3) | ((lane >> 2) & 4); }
inline ushort matrix_column(ushort lane) { return ((lane << 1) & 2) | ((lane >> 1) & 4); }

// The lane that has an element, as its first one or its second.
inline ushort lane_of(ushort row, ushort column) {
  return ((row & 3) << 1) | ((row & 4) << 2) | ((column & 2) >> 1) | ((column & 4) << 1);
}

// The largest and the sum over the rows of a matrix, for a lane's two columns.
inline float2 over_rows_max(float2 x) {
  x = max(x, simd_shuffle_xor(x, 2));
  x = max(x, simd_shuffle_xor(x, 4));
  return max(x, simd_shuffle_xor(x, 16));
}
inline float2 over_rows_sum(float2 x) {
  x += simd_shuffle_xor(x, 2);
  x += simd_shuffle_xor(x, 4);
  return x + simd_shuffle_xor(x, 16);
}

// A number of each column, for the row of the same number: what a lane needs of the query whose
// output it has, where it has two others' scores.
inline float column_to_row(float2 x, ushort lane) {
  const ushort row = matrix_row(lane);
  const ushort from = lane_of(0, row);
  const float even = simd_shuffle(x.x, from);
  const float odd = simd_shuffle(x.y, from);
  return row & 1 ? odd : even;
}
