// token_sequence: in which sequence a block's tokens are held, each beside one that is like it; and
// the block's keys in that sequence.
//
// Grid: one threadgroup of a single simdgroup for a block of one kv head. Lane l has the channels
// 32 * k + l while keys become codes of a byte, and then the tokens l and l + 32.
//
//   1. Means of the channels, and the largest difference from them.
//   2. Codes into threadgroup memory: whole numbers, so that no sum depends on its order.
//   3. From the first token on: lanes sum up how far their tokens are from the last one, and of those
//      that are left the nearest comes next. A distance and its token are one number, of which the
//      simdgroup takes the least. The token's key is copied to its place.
//
// About Size * Size * D * 5 operations, once per block. mlx_delta/method/sequence.py specifies it.

constant constexpr float LEAST_APART = 1e-30f;  // of keys that differ at all
constant constexpr int CODE_ZERO = 128;  // of bytes that have no sign

template <int D>
constexpr int token_pitch() {  // bytes from a token's codes to the next one's: other banks
  return 4 * ((D + 3) / 4 | 1);
}

// A token comes to a place of the sequence.
template <typename T, int D>
inline void put_token(
    const device T* keys,
    int token,
    int place,
    device uchar* sequence,
    device T* ordered,
    uint lane) {
  if (lane == 0) {
    sequence[place] = uchar(token);
  }
  for (int d = int(lane); d < D; d += 32) {
    ordered[place * D + d] = keys[token * D + d];
  }
}

// keys: this block's, [Size][D]. factors: what makes channels comparable, [D]. as_is: whether tokens
// stay as they are. sequence: [Size]. ordered: the keys in it. codes: [Size * token_pitch<D>()].
template <typename T, int D, int Size, int Most>
inline void token_sequence(
    const device T* keys,
    const device float* factors,
    bool as_is,
    device uchar* sequence,
    device T* ordered,
    threadgroup uchar* codes,
    uint lane) {
  constexpr int W = (D + 31) / 32;
  constexpr int Own = (Size + 31) / 32;
  constexpr int Pitch = token_pitch<D>();
  float means[W];
  float largest = 0.0f;
  bool finite = true;
  for (int k = 0; k < W; ++k) {
    const int d = 32 * k + int(lane);
    const ChannelKeys<T, D> own = {keys + (d < D ? d : 0), 0};
    means[k] = channel_mean<T, D, Size>(own);
    for (int t = 0; t < Size && d < D; ++t) {
      const float apart = abs(exact_product(value_at(own, t) - means[k], factors[d]));
      finite = finite && apart < INFINITY;  // NaN is not
      largest = max(largest, apart);
    }
  }
  largest = simd_max(largest);
  if (as_is || simd_any(!finite) || !(largest > LEAST_APART)) {
    for (int t = 0; t < Size; ++t) {
      put_token<T, D>(keys, t, t, sequence, ordered, lane);
    }
    return;
  }
  const float scale = float(Most) / largest;
  for (int k = 0; k < W; ++k) {
    const int d = 32 * k + int(lane);
    const ChannelKeys<T, D> own = {keys + (d < D ? d : 0), 0};
    for (int t = 0; t < Size && d < D; ++t) {
      const float apart = exact_product(value_at(own, t) - means[k], factors[d]);
      codes[t * Pitch + d] = uchar(CODE_ZERO + int(rint(exact_product(apart, scale))));
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  bool gone[Own];
  for (int i = 0; i < Own; ++i) {
    gone[i] = false;
  }
  int last = 0;
  for (int place = 0; place < Size; ++place) {
    put_token<T, D>(keys, last, place, sequence, ordered, lane);
    uint nearest = ~0u;
    for (int i = 0; i < Own; ++i) {
      const int token = 32 * i + int(lane);
      gone[i] = gone[i] || token == last || token >= Size;
      if (!gone[i]) {
        uint distance = 0u;
        for (int d = 0; d < D; ++d) {
          const int apart = int(codes[token * Pitch + d]) - int(codes[last * Pitch + d]);
          distance += uint(apart * apart);
        }
        nearest = min(nearest, distance << 6 | uint(token));
      }
    }
    last = int(simd_min(nearest) & 63u);
  }
}
