// values_encode: values of finished blocks, turned, as codes with a byte for each group's scale.
//
// Grid: y = tokens over simdgroups of a threadgroup, z = rows * kv heads, all of them in one launch.
// A simdgroup has a token's value of one head and works by itself; lane l has channels 32 * k + l.
//
//   1. The value is turned in registers: half of the stages are exchanges, half need none.
//   2. Of each group, lanes find the largest number, and try four scales: what each lane errs by,
//      squared and along the numbers, is summed over the lanes by halves, as the format wants it.
//   3. Codes of the best scale go into threadgroup memory, from where lanes put words together.
//
// Reads a value once, 2 * D bytes. About 70 operations a number. Once per token;
// mlx_delta/method/values.py specifies it.

constant constexpr int VALUE_SCALES = 4;      // that are tried
constant constexpr float VALUE_ALONG = 64.0f;  // times that an error along the numbers counts
constant constexpr uchar VALUE_NO_SCALE = 255;  // of a value with something that is not finite

// The code of a number, without what is added to have none below 0. half_way: half of the codes.
inline float value_steps(float x, float scale, float half_way) {
  return scale > 0.0f ? clamp(floor(x / scale), -half_way, half_way - 1.0f) : 0.0f;
}

// value: [D]. words: this head's of this token, [D * width / 32]; scales: likewise, [D / Group].
// codes: of this simdgroup's own, [D].
template <typename S, int D, int Group>
inline void values_encode(
    const device S* value,
    float factor,
    int width,
    device uint* words,
    device uchar* scales,
    threadgroup uchar* codes,
    uint lane) {
  constexpr int W = D / 32;
  constexpr int Own = Group / 32;  // numbers of a group that a lane has
  float x[W];
  bool finite = true;
  for (int k = 0; k < W; ++k) {
    x[k] = float(value[32 * k + int(lane)]);
  }
  turn_lanes<D>(x, lane);
  for (int k = 0; k < W; ++k) {
    x[k] = exact_product(x[k], factor);
    finite = finite && abs(x[k]) < INFINITY;
  }
  finite = !simd_any(!finite);
  const float half_way = float(1 << (width - 1));
  for (int g = 0; g < W / Own; ++g) {
    float own[Own];
    float largest = 0.0f;
    for (int i = 0; i < Own; ++i) {
      own[i] = finite ? float(to_stored<S>(x[g * Own + i])) : 0.0f;
      largest = max(largest, abs(own[i]));
    }
    uchar scale = uchar(min(uint(short_step(simd_max(largest) / half_way)), 0xf6u) + 1u);
    uchar best = scale;
    float least = INFINITY;
    float power = 0.0f;
    for (int i = 0; i < Own; ++i) {
      power += exact_product(own[i], own[i]);
    }
    power = sum_of_lanes(power);
    power = power > 0.0f ? power : INFINITY;
    for (int lower = 0; lower < VALUE_SCALES; ++lower) {
      const float unit = whole_step(scale);
      float squares = 0.0f;
      float along = 0.0f;
      for (int i = 0; i < Own; ++i) {
        const float code = value_steps(own[i], unit, half_way) + 0.5f;
        const float error = own[i] - exact_product(unit, code);
        squares += exact_product(error, error);
        along += exact_product(error, own[i]);
      }
      along = sum_of_lanes(along);
      const float cost =
          sum_of_lanes(squares) + exact_product(exact_product(VALUE_ALONG, along), along / power);
      const bool better = cost < least;  // a NaN, of numbers beyond all scales, is not
      best = better ? scale : best;
      least = better ? cost : least;
      scale = scale > 0 ? uchar(scale - 1) : scale;
    }
    const float unit = whole_step(best);
    for (int i = 0; i < Own; ++i) {
      codes[(g * Own + i) * 32 + int(lane)] =
          uchar(value_steps(own[i], unit, half_way) + half_way);
    }
    if (lane == 0) {
      scales[g] = finite ? best : VALUE_NO_SCALE;
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int w = int(lane); w < W * width; w += 32) {
    int code = 32 * w / width;  // which may begin in the word before
    uint word = 0;
    for (int at = code * width - 32 * w; at < 32; at += width) {
      const uint bits = uint(codes[code]);
      word |= at < 0 ? bits >> -at : bits << at;
      code += 1;
    }
    words[w] = word;
  }
}
