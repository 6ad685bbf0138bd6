// Turning keys and values by a Hadamard matrix, in the registers of a simdgroup.

// Channels 32 * k + lane of one vector in x[k]: sums and differences of neighbours, then of those
// two apart, four apart and so on. What comes of it is to be divided by the root of their number.
template <int D>
inline void turn_lanes(thread float (&x)[(D + 31) / 32], uint lane) {
  constexpr int W = (D + 31) / 32;
  constexpr int Piece = D & -D;  // channels that are turned together
  for (int apart = 1; apart < Piece && apart < 32; apart *= 2) {
    for (int k = 0; k < W; ++k) {
      const float other = simd_shuffle_xor(x[k], ushort(apart));
      x[k] = int(lane) & apart ? other - x[k] : x[k] + other;
    }
  }
  for (int apart = 1; 32 * apart < Piece; apart *= 2) {
    for (int k = 0; k < W; ++k) {
      if ((k & apart) == 0 && k + apart < W) {
        const float lower = x[k];
        x[k] = lower + x[k + apart];
        x[k + apart] = lower - x[k + apart];
      }
    }
  }
}
