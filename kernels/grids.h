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

// Makes weights of how far the tokens of a block stand out of it, tokens [Size], and of how much
// they lie where queries look, looked_at [Size]. For one simdgroup, of which each lane has filled, or
// seen filled, all numbers of both; whoever reads other lanes' weights waits before.
template <int Size>
inline void clip_weights(
    threadgroup float* tokens, const threadgroup float* looked_at, uint lane) {
  float highest = -INFINITY;
  for (int t = int(lane); t < Size; t += 32) {
    highest = max(highest, looked_at[t]);
  }
  highest = simd_max(highest);
  float sum = 0.0f;
  for (int t = int(lane); t < Size; t += 32) {
    tokens[t] = exact_product(tokens[t], exp(looked_at[t] - highest));  // only ratios matter
    sum += tokens[t];
  }
  const float mean = sum_of_lanes(sum) / float(Size);
  bool usable = true;
  for (int t = int(lane); t < Size; t += 32) {
    usable = usable && abs(tokens[t] / mean) < INFINITY;
  }
  usable = !simd_any(!usable);
  for (int t = int(lane); t < Size; t += 32) {
    tokens[t] = usable ? clamp(tokens[t] / mean, 1.0f / 8.0f, 8.0f) : 1.0f;
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
