// delta_runs: cut each channel of a block into runs by what their errors cost, and average them.
//
// Grid: one threadgroup of a single simdgroup for 32 channels of one block of one kv head; lane l
// has channel 32 * word + l. Lanes without a channel work on the last one; nobody reads their bits.
//
//   Optimal: dynamic programming. before[t] is the least cost of the first t tokens, less the
//   squares that are in every cut's cost; begins[t] where the last run of that cut begins. Lanes
//   do not depend on each other: each has a column of its own in threadgroup memory, and only the
//   tokens' weights are shared.
//   Greedy: one pass with the run's weighted mean in registers.
//
// Which runs start at a token becomes a word by a vote of the simdgroup. About 260 operations an
// element for blocks of 64, once per block. mlx_delta/method/runs.py specifies it.

// Bit t: a run of this channel starts at token t.
template <int D, int Size>
inline ulong optimal_cuts(
    const device float* keys,
    const device float* tokens,
    float cost,
    const threadgroup float* total,
    threadgroup float* sums,
    threadgroup float* before,
    threadgroup uchar* begins,
    uint lane) {
  bool finite = true;
  float mean = 0.0f;
  for (int t = 0; t < Size; ++t) {
    float key = keys[t * D];
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
    sum += exact_product(tokens[t], keys[t * D] - mean);
    sums[(t + 1) * 32 + lane] = sum;
  }
  for (int t = 1; t <= Size; ++t) {
    float least = INFINITY;
    int begin = 0;
    for (int s = 0; s < t; ++s) {
      float moment = sums[t * 32 + lane] - sums[s * 32 + lane];
      float gain = exact_product(moment, moment) / (total[t] - total[s]);
      float candidate = before[s * 32 + lane] - gain;
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

template <int D, int Size>
inline ulong greedy_cuts(const device float* keys, const device float* tokens, float cost) {
  const float base = sqrt(cost);
  float first = keys[0];
  float sum = 0.0f;
  float weight = tokens[0];
  ulong cuts = 1ul;
  for (int t = 1; t < Size; ++t) {
    float key = keys[t * D];
    float threshold = base / sqrt(sqrt(tokens[t]));
    // "not more than" rather than "less than": a NaN compares false and starts a run.
    bool keep = abs(key - (first + sum / weight)) <= threshold;
    sum = keep ? sum + exact_product(tokens[t], key - first) : 0.0f;
    weight = (keep ? weight : 0.0f) + tokens[t];
    first = keep ? first : key;
    cuts |= keep ? 0ul : 1ul << t;
  }
  return cuts;
}

// keys: this block's, [Size][D], from the first channel on. tokens: [Size]; cost of a run of each
// channel: [D]; sinks: tokens of this block that stand alone, from its first on. starts: [Size][W];
// means: [Size][D]. total: [Size + 1]; sums, before and begins: [(Size + 1) * 32].
template <int D, int Size, bool Optimal>
inline void delta_runs(
    const device float* keys,
    const device float* tokens,
    const device float* costs,
    int sinks,
    device uint* starts,
    device float* means,
    threadgroup float* total,
    threadgroup float* sums,
    threadgroup float* before,
    threadgroup uchar* begins,
    uint word,
    uint lane) {
  constexpr int W = (D + 31) / 32;
  const bool has_channel = int(word * 32 + lane) < D;
  const int d = has_channel ? int(word * 32 + lane) : D - 1;
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
    cuts = optimal_cuts<D, Size>(keys + d, tokens, costs[d], total, sums, before, begins, lane);
  } else {
    cuts = greedy_cuts<D, Size>(keys + d, tokens, costs[d]);
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
  for (int t = 0; t < Size;) {
    const float first = keys[t * D + d];
    float sum = 0.0f;
    float weight = tokens[t];
    int end = t + 1;
    for (; end < Size && !((cuts >> end) & 1ul); ++end) {
      sum += exact_product(tokens[end], keys[end * D + d] - first);
      weight += tokens[end];
    }
    // Of one key, or of equal ones, the mean is exactly that.
    const float mean = first + sum / weight;
    for (; t < end; ++t) {
      means[t * D + d] = mean;
    }
  }
}
