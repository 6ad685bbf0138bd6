// codes_combine: puts the splits of codes_decode together, whose file says more.

// partial [splits][D] and sums [splits][2]: this query's; sums have powers of two. out [D]. The
// first `coded` splits are of turned values, pieces of `Piece` channels each, a power of two that
// divides D; 1: they are not turned.
template <typename T, int D, int Piece>
inline void codes_combine(
    const device float* partial,
    const device float* sums,
    device T* out,
    int splits,
    int coded,
    threadgroup float* row,  // [D]
    uint d) {
  const bool exists = int(d) < D;
  float highest = -INFINITY;
  for (int s = 0; s < splits; ++s) {
    highest = max(highest, sums[s * 2]);
  }
  float weights = 0.0f;
  float far = 0.0f;
  float near = 0.0f;
  for (int s = 0; s < splits; ++s) {
    const float rescale = fast::exp2(sums[s * 2] - highest);
    const float output = exists ? partial[s * D + int(d)] * rescale : 0.0f;
    weights += sums[s * 2 + 1] * rescale;
    far += s < coded ? output : 0.0f;
    near += s < coded ? 0.0f : output;
  }
  for (int apart = 1; apart < Piece; apart *= 2) {
    if (exists) {
      row[d] = far;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (exists) {
      const float other = row[int(d) ^ apart];
      far = int(d) & apart ? other - far : far + other;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (exists) {
    out[d] = T((far * rsqrt(float(Piece)) + near) / weights);
  }
}
