// Grids of 16-bit numbers for a block's channels, and codes on them: what the encoders share.
//
// What they make must not hang on the machine, so every sum has its order (mlx_delta/method/sums.py)
// and every product is rounded before it is added to anything (rounding.h). The kernels are compiled
// without fast-math, so that divisions are rounded as IEEE says.

// The largest finite value of the storage type.
inline float largest_stored(half) { return 65504.0f; }
inline float largest_stored(bfloat16_t) { return 3.3895313892515355e38f; }

// Rounded to the storage type; beyond its range, its largest value. NaN passes.
template <typename S>
inline S to_stored(float value) {
  const float most = largest_stored(S(0));
  return S(value > most ? most : value < -most ? -most : value);
}

// The code of a value, 0 for a channel that does not vary or has no grid. most: the largest code.
inline float code_of(float value, float low, float step, float most) {
  return step > 0.0f ? clamp(floor((value - low) / step + 0.5f), 0.0f, most) : 0.0f;
}

// What a channel's values of a block range over.
struct ChannelRange {
  float least;
  float most;
  bool finite;
};

// values: anything for which there is a `value_at`, a function of it and of a token.
template <int Size, typename Values>
inline ChannelRange range_of(Values values) {
  ChannelRange range = {INFINITY, -INFINITY, true};
  for (int t = 0; t < Size; ++t) {
    const float value = value_at(values, t);
    range.finite = range.finite && abs(value) < INFINITY;
    range.least = min(range.least, value);
    range.most = max(range.most, value);
  }
  return range;
}

// The grid over the range; NaN if there is none. codes: the largest code.
template <typename S>
inline void range_grid(ChannelRange range, float codes, thread float& low, thread float& step) {
  const float span = range.most - range.least;
  const float exact = span / codes;
  S nearest = S(exact);
  if (float(nearest) < exact) {  // round up, or the largest value would lie above the grid
    nearest = as_type<S>(ushort(as_type<ushort>(nearest) + 1));
  }
  const bool usable = range.finite && span < INFINITY;
  const float none = as_type<float>(0x7fc00000u);  // NaN
  low = usable ? float(to_stored<S>(range.least)) : none;
  step = usable ? float(nearest) : none;
}

// The sum over the lanes of a simdgroup, by halves; every lane has it.
inline float sum_of_lanes(float x) {
  for (ushort apart = 16; apart > 0; apart /= 2) {
    x += simd_shuffle_xor(x, apart);
  }
  return x;
}

// A place of a head's order, as the launchers pack it: its channel, and its code's bits.
inline int place_channel(int place) { return place & 0xff; }
inline int place_width(int place) { return place >> 8; }
inline float largest_code(int place) { return float((1 << place_width(place)) - 1); }

// One channel of a block's keys [Size][D]; tokens before `from` are as it.
template <typename S, int D>
struct ChannelKeys {
  const device S* keys;
  int from;
};
template <typename S, int D>
inline float value_at(ChannelKeys<S, D> own, int t) {
  return float(own.keys[max(t, own.from) * D]);
}

// The mean of a channel's keys.
template <typename S, int D, int Size>
inline float channel_mean(ChannelKeys<S, D> own) {
  float sum = 0.0f;
  for (int t = 0; t < Size; ++t) {
    sum += value_at(own, t);
  }
  return sum / float(Size);
}

// How much each token of a block of keys counts, shares [Size], by how far it lies from the others.
// Whoever calls it has filled means and steps [D], by places of the order, and waited; and waits
// before reading the shares. Felt: a channel counts by `felt` [D], otherwise in steps of its grid.
// keys: [Size][D], all but the first ones before `from`; places: [D]; squares: [Size].
template <typename S, int D, int Size, bool Felt>
inline void token_shares(
    const device S* keys,
    int from,
    const device int* places,
    const device float* felt,
    const threadgroup float* means,
    const threadgroup float* steps,
    threadgroup float* squares,
    threadgroup float* shares,
    uint lane,
    uint simdgroup) {
  constexpr int W = (D + 31) / 32;
  constexpr float most = 8.0f;  // of the mean one's; and one over it the least
  for (int t = int(simdgroup); t < Size; t += W) {
    float sum = 0.0f;
    for (int i = int(lane); i < D; i += 32) {
      const float step = steps[i];
      const ChannelKeys<S, D> own = {keys + place_channel(places[i]), from};
      float apart = value_at(own, t) - means[i];
      apart = Felt ? apart : apart / step;
      const float square = exact_product(apart, apart);
      sum += step > 0.0f ? (Felt ? exact_product(felt[i], square) : square) : 0.0f;
    }
    sum = sum_of_lanes(sum);
    if (lane == 0) {
      squares[t] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0) {
    float sum = 0.0f;
    for (int t = int(lane); t < Size; t += 32) {
      sum += squares[t];
    }
    const float mean = sum_of_lanes(sum) / float(Size);
    const float unit = mean > 0.0f ? mean : 1.0f;
    sum = 0.0f;
    for (int t = int(lane); t < Size; t += 32) {
      const float relative = squares[t] / unit;
      // Comparisons that let NaN pass, unlike `clamp`.
      const float weight =
          relative < 1.0f / most ? 1.0f / most : relative > most ? most : relative;
      shares[t] = weight;
      sum += weight;
    }
    sum = sum_of_lanes(sum);
    for (int t = int(lane); t < Size; t += 32) {
      shares[t] /= sum;
    }
  }
}

// The line through a channel's values over their codes, tokens by their shares.
struct FittedLine {
  float code;  // the means
  float value;
  float squares;  // of codes, and of codes and values, apart from these
  float products;
};

// most: the largest code.
template <int Size, typename Values>
inline FittedLine fit_line(
    Values values, const threadgroup float* shares, float low, float step, float most) {
  FittedLine line = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int t = 0; t < Size; ++t) {
    const float own = value_at(values, t);
    line.code += exact_product(shares[t], code_of(own, low, step, most));
    line.value += exact_product(shares[t], own);
  }
  for (int t = 0; t < Size; ++t) {
    const float own = value_at(values, t);
    const float code = code_of(own, low, step, most) - line.code;
    const float weighed = exact_product(shares[t], code);
    line.squares += exact_product(weighed, code);
    line.products += exact_product(weighed, own - line.value);
  }
  return line;
}
