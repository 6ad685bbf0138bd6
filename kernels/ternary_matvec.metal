// ternary_matvec: the product of a few activations with ternary weights, for decode.
//
// Grid: one threadgroup of Simdgroups simdgroups per 4 * Simdgroups outputs; a simdgroup has four of
// them. The threadgroup first finds each row's largest magnitude, from which its activations are
// rounded to int8 on the fly; then each lane takes every 32nd word (16 weights) of its simdgroup's
// four rows of weights, with the same activations for all four.
//
// Reads each weight's two bits once, whatever Rows is, and one scale; x from cache, once per
// threadgroup for its maximum and once per simdgroup.

// Sixteen activations, the i-th divided by 4^i: so a code can stay where it is in its word, and
// needs no shift. Exact, a power of two. Returns their sum before that.
template <typename T, bool Quantize>
inline float ternary_load(const device T* x, float scale, thread float* values) {
  float sum = 0.0f;
  for (int i = 0; i < 16; ++i) {
    float value = float(x[i]);
    if (Quantize) {
      value = clamp(rint(value * scale), -128.0f, 127.0f);
    }
    sum += value;
    values[i] = value / float(1u << (2 * i));
  }
  return sum;
}

// The sum over sixteen weights of activation * code; values as from ternary_load.
inline float ternary_dot(const thread float* values, uint word) {
  float sum = 0.0f;
  for (int i = 0; i < 16; ++i) {
    sum += values[i] * float(word & (3u << (2 * i)));
  }
  return sum;
}

// x [Rows, inputs], weight [outputs, inputs / 16], out [Rows, outputs]; largest
// [Rows * Simdgroups]. inputs is a multiple of 16, outputs of 4. With Quantize all sums are of integers below 2^24, thus exact.
template <typename T, int Rows, int Simdgroups, bool Quantize>
inline void ternary_matvec(
    const device T* x,
    const device uint* weight,
    float weight_scale,
    int inputs,
    int outputs,
    device T* out,
    threadgroup float* largest,
    uint threadgroup_index,
    uint lane,
    uint simdgroup) {
  float scales[Rows];
  for (int r = 0; r < Rows; ++r) {
    scales[r] = 1.0f;
  }
  if (Quantize) {
    for (int r = 0; r < Rows; ++r) {
      float most = 0.0f;
      for (int i = int(simdgroup * 32 + lane); i < inputs; i += 32 * Simdgroups) {
        most = max(most, abs(float(x[r * inputs + i])));
      }
      most = simd_max(most);
      if (lane == 0) {
        largest[r * Simdgroups + int(simdgroup)] = most;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int r = 0; r < Rows; ++r) {
      float most = 1e-5f;  // as in the reference: a row of zeros stays one
      for (int i = 0; i < Simdgroups; ++i) {
        most = max(most, largest[r * Simdgroups + i]);
      }
      scales[r] = 127.0f / most;
    }
  }

  const int first = 4 * (int(threadgroup_index) * Simdgroups + int(simdgroup));
  if (first >= outputs) {
    return;
  }
  const int n_words = inputs / 16;  // of a row
  const device uint* rows = weight + long(first) * n_words;
  float dots[Rows][4];
  float sums[Rows];
  for (int r = 0; r < Rows; ++r) {
    sums[r] = 0.0f;
    for (int o = 0; o < 4; ++o) {
      dots[r][o] = 0.0f;
    }
  }
  for (int w = int(lane); w < n_words; w += 32) {
    uint words[4];
    for (int o = 0; o < 4; ++o) {
      words[o] = rows[o * n_words + w];
    }
    for (int r = 0; r < Rows; ++r) {
      float values[16];
      sums[r] += ternary_load<T, Quantize>(x + r * inputs + w * 16, scales[r], values);
      for (int o = 0; o < 4; ++o) {
        dots[r][o] += ternary_dot(values, words[o]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    float sum = simd_sum(sums[r]);
    for (int o = 0; o < 4; ++o) {
      // A code is the weight + 1.
      float dot = simd_sum(dots[r][o]) - sum;
      if (lane == 0) {
        out[r * outputs + first + o] = T(dot * (weight_scale / scales[r]));
      }
    }
  }
}
