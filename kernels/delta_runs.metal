// delta_runs: cut each channel of a block into runs by what their errors cost, and average them.
//
// Grid: one threadgroup of a single simdgroup for 32 channels of one block of one kv head; lane l
// has channel 32 * word + l. Lanes without a channel work on the last one; nobody reads their bits.
//
//   Tokens' weights: of all of the head's channels, those that stand out and are looked at count
//   more. Each threadgroup of a block finds them for itself, an eighth of its work at D = 128.
//   Optimal: dynamic programming. before[t] is the least cost of the first t tokens, less the
//   squares that are in every cut's cost; begins[t] where the last run of that cut begins. Lanes
//   do not depend on each other: each has a column of its own in threadgroup memory, and only the
//   tokens' weights are shared.
//   Greedy: one pass with the run's weighted mean in registers.
//
// Which runs start at a token becomes a word by a vote of the simdgroup. About 350 operations an
// element for blocks of 64, once per block. mlx_delta/method/runs.py specifies it.

constant constexpr float STRETCH = 0.5f;  // see the specification
constant constexpr float MOST_STRETCH = 1.5f;

// How much each token of a block counts, tokens [Size]; keys: from the first channel on. weights and
// salience: [D]. looked_at: [Size].
template <typename T, int D, int Size>
inline void token_weights(
    const device T* keys,
    int from,
    const device float* weights,
    const device float* salience,
    threadgroup float* tokens,
    threadgroup float* looked_at,
    uint lane) {
  constexpr int W = (D + 31) / 32;
  float means[W];
  for (int k = 0; k < W; ++k) {
    const int d = 32 * k + int(lane);
    const ChannelKeys<T, D> own = {keys + (d < D ? d : 0), from};
    means[k] = channel_mean<T, D, Size>(own);
  }
  for (int t = 0; t < Size; ++t) {
    float share = 0.0f;
    float look = 0.0f;
    for (int k = 0; k < W; ++k) {
      const int d = 32 * k + int(lane);
      if (d < D) {
        const ChannelKeys<T, D> own = {keys + d, from};
        const float apart = value_at(own, t) - means[k];
        share += exact_product(exact_product(apart, apart), weights[d]);
        look += exact_product(apart, salience[d]);
      }
    }
    share = sum_of_lanes(share);
    look = sum_of_lanes(look);
    if (lane == 0) {
      tokens[t] = share;
      looked_at[t] = look;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  clip_weights<Size>(tokens, looked_at, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Bit t: a run of this channel starts at token t.
template <typename T, int D, int Size>
inline ulong optimal_cuts(
    ChannelKeys<T, D> keys,
    const threadgroup float* tokens,
    float cost,
    const threadgroup float* total,
    threadgroup float* sums,
    threadgroup float* before,
    threadgroup uchar* begins,
    uint lane) {
  bool finite = true;
  float mean = 0.0f;
  for (int t = 0; t < Size; ++t) {
    const float key = value_at(keys, t);
    finite = finite && abs(key) < INFINITY;
    mean += key;
  }
  if (!finite) {
    return ~0ul;
  }
  mean /= float(Size);
  float sum = 0.0f;
  sums[lane] = 0.0f;
  before[lane] = 0.0f;
  for (int t = 0; t < Size; ++t) {
    sum += exact_product(tokens[t], value_at(keys, t) - mean);
    sums[(t + 1) * 32 + lane] = sum;
  }
  for (int t = 1; t <= Size; ++t) {
    float least = INFINITY;
    int begin = 0;
    for (int s = 0; s < t; ++s) {
      const float moment = sums[t * 32 + lane] - sums[s * 32 + lane];
      const float inverse = 1.0f / (total[t] - total[s]);
      const float gain = exact_product(exact_product(moment, moment), inverse);
      const float candidate = before[s * 32 + lane] - gain;
      if (candidate < least) {
        least = candidate;
        begin = s;
      }
    }
    before[t * 32 + lane] = least + cost;
    begins[t * 32 + lane] = uchar(begin);
  }
  ulong cuts = 1ul;
  for (int t = int(begins[Size * 32 + lane]); t > 0; t = int(begins[t * 32 + lane])) {
    cuts |= 1ul << t;
  }
  return cuts;
}

template <typename T, int D, int Size>
inline ulong greedy_cuts(
    ChannelKeys<T, D> keys, const threadgroup float* tokens, float cost) {
  const float base = sqrt(cost);
  float first = value_at(keys, 0);
  float sum = 0.0f;
  float weight = tokens[0];
  ulong cuts = 1ul;
  for (int t = 1; t < Size; ++t) {
    const float key = value_at(keys, t);
    const float threshold = base / sqrt(sqrt(tokens[t]));
    // "not more than" rather than "less than": a NaN compares false and starts a run.
    bool keep = abs(key - (first + sum / weight)) <= threshold;
    sum = keep ? sum + exact_product(tokens[t], key - first) : 0.0f;
    weight = (keep ? weight : 0.0f) + tokens[t];
    first = keep ? first : key;
    cuts |= keep ? 0ul : 1ul << t;
  }
  return cuts;
}

// The weighted mean of the run that starts at token t; of one key, or of equal ones, exactly that.
template <typename T, int D, int Size>
inline float run_mean(
    ChannelKeys<T, D> keys, const threadgroup float* tokens, ulong cuts, int t) {
  const float first = value_at(keys, t);
  float sum = 0.0f;
  float weight = tokens[t];
  for (++t; t < Size && !((cuts >> t) & 1ul); ++t) {
    sum += exact_product(tokens[t], value_at(keys, t) - first);
    weight += tokens[t];
  }
  return first + sum / weight;
}

// keys: this block's, [Size][D], from the first channel on; tokens before `from` are as it. weights,
// salience, and the cost of a run of each channel: [D]; sinks: tokens of this block that stand alone,
// from its first on. starts: [Size][W]; means: [Size][D]; counts: how much each token does, [Size].
// tokens and looked_at: [Size]; total: [Size + 1]; sums, before and begins: [(Size + 1) * 32].
template <typename T, int D, int Size, bool Optimal>
inline void delta_runs(
    const device T* keys,
    int from,
    int sinks,
    const device float* weights,
    const device float* salience,
    const device float* costs,
    device uint* starts,
    device float* means,
    device float* counts,
    threadgroup float* tokens,
    threadgroup float* looked_at,
    threadgroup float* total,
    threadgroup float* sums,
    threadgroup float* before,
    threadgroup uchar* begins,
    uint word,
    uint lane) {
  constexpr int W = (D + 31) / 32;
  const bool has_channel = int(word * 32 + lane) < D;
  const int d = has_channel ? int(word * 32 + lane) : D - 1;
  const ChannelKeys<T, D> own = {keys + d, from};
  token_weights<T, D, Size>(keys, from, weights, salience, tokens, looked_at, lane);
  for (int t = int(lane); word == 0 && t < Size; t += 32) {
    counts[t] = tokens[t];
  }
  ulong cuts;
  if (Optimal) {
    if (lane == 0) {
      float sum = 0.0f;
      total[0] = 0.0f;
      for (int t = 0; t < Size; ++t) {
        sum += tokens[t];
        total[t + 1] = sum;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    cuts = optimal_cuts<T, D, Size>(own, tokens, costs[d], total, sums, before, begins, lane);
  } else {
    cuts = greedy_cuts<T, D, Size>(own, tokens, costs[d]);
  }
  if (sinks > 0) {
    cuts |= sinks >= 63 ? ~0ul : (1ul << (sinks + 1)) - 1ul;
  }
  for (int t = 0; t < Size; ++t) {
    bool start = (cuts >> t) & 1ul;
    uint bits = uint(simd_vote::vote_t(simd_ballot(start)));
    if (lane == 0) {
      starts[t * W + int(word)] = bits;
    }
  }
  if (!has_channel) {
    return;
  }
  float all = 0.0f;
  float center = 0.0f;
  for (int t = 0; t < Size; ++t) {
    all += tokens[t];
    center += exact_product(tokens[t], value_at(own, t));
  }
  center /= all;
  float of_keys = 0.0f;  // variances, and that of what they are held as
  float of_means = 0.0f;
  for (int t = 0; t < Size;) {
    const float mean = run_mean<T, D, Size>(own, tokens, cuts, t);
    const float apart = mean - center;
    const float square = exact_product(apart, apart);
    do {
      const float other = value_at(own, t) - center;
      of_keys += exact_product(tokens[t], exact_product(other, other));
      of_means += exact_product(tokens[t], square);
      ++t;
    } while (t < Size && !((cuts >> t) & 1ul));
  }
  const float ratio = of_keys / of_means;
  const float factor = min(1.0f + exact_product(STRETCH, ratio - 1.0f), MOST_STRETCH);
  const bool stretched = ratio > 1.0f && factor > 1.0f;  // NaN is not
  for (int t = 0; t < Size;) {
    float mean = run_mean<T, D, Size>(own, tokens, cuts, t);
    const bool alone = t + 1 == Size || ((cuts >> (t + 1)) & 1ul);
    if (stretched && !alone) {
      mean = center + exact_product(mean - center, factor);
    }
    do {
      means[t * D + d] = mean;
      ++t;
    } while (t < Size && !((cuts >> t) & 1ul));
  }
}
