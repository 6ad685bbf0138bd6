// codes_encode: keys of finished blocks as codes of several widths, on grids fitted to them.
//
// Grid: one threadgroup per block (y) of one kv head of one row (z), all of them in one launch. A
// threadgroup has 32 * W threads, W = ceil(D / 32); thread i has the i-th channel of the order.
//
//   0. Keys of a model that is not calibrated are turned: a simdgroup has a token, a lane channels
//      32 apart, and what comes of it goes to scratch of the threadgroup's own.
//   1. Each thread finds its channel's range, and the grid over it.
//   2. Simdgroups take tokens: how far each lies from the block's mean, and so how much it counts.
//   3. Each thread fits its grid to its codes, twice, and puts the codes into threadgroup memory.
//   4. Threads put words together, neighbours those of neighbouring tokens.
//
// Reads the keys about eight times (2 * Size * D bytes each), after the first time from cache. Once
// per block. mlx_delta/method/codes.py specifies it.

// A token's keys, turned. factor: one over the root of the number of channels turned together.
template <typename S, int D, int Size>
inline void turn_keys(
    const device S* keys, device S* turned, float factor, uint lane, uint simdgroup) {
  constexpr int W = (D + 31) / 32;
  for (int t = int(simdgroup); t < Size; t += W) {
    float x[W];
    for (int k = 0; k < W; ++k) {
      const int d = 32 * k + int(lane);
      x[k] = d < D ? float(keys[t * D + d]) : 0.0f;
    }
    turn_lanes<D>(x, lane);
    for (int k = 0; k < W; ++k) {
      const int d = 32 * k + int(lane);
      if (d < D) {
        turned[t * D + d] = to_stored<S>(x[k] * factor);
      }
    }
  }
}

// How much each token of a block of keys counts, shares [Size]. Whoever calls it has filled means and
// steps [D], by places of the order, and waited; and waits before reading the shares. Felt: by what
// the model minds, otherwise by steps of the grid. keys: [Size][D]; places: [D]; felt: [2][D], weights
// and salience by the order; tokens: [Size].
template <typename S, int D, int Size, bool Felt>
inline void token_shares(
    const device S* keys,
    const device int* places,
    const device float* felt,
    const threadgroup float* means,
    const threadgroup float* steps,
    threadgroup float* tokens,
    threadgroup float* shares,
    uint lane,
    uint simdgroup) {
  constexpr int W = (D + 31) / 32;
  constexpr float most = 8.0f;  // of the mean one's; and one over it the least
  for (int t = int(simdgroup); t < Size; t += W) {
    float sum = 0.0f;
    float look = 0.0f;
    for (int i = int(lane); i < D; i += 32) {
      const ChannelKeys<S, D> own = {keys + place_channel(places[i]), 0};
      const float apart = value_at(own, t) - means[i];
      if (Felt) {
        sum += exact_product(exact_product(apart, apart), felt[i]);
        look += exact_product(apart, felt[D + i]);
      } else {
        const float in_steps = apart / steps[i];
        sum += steps[i] > 0.0f ? exact_product(in_steps, in_steps) : 0.0f;
      }
    }
    sum = sum_of_lanes(sum);
    look = sum_of_lanes(look);
    if (lane == 0) {
      tokens[t] = sum;
      shares[t] = look;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup != 0) {
    return;
  }
  float sum = 0.0f;
  if (Felt) {
    clip_weights<Size>(tokens, shares, lane);
  } else {
    for (int t = int(lane); t < Size; t += 32) {
      sum += tokens[t];
    }
    const float mean = sum_of_lanes(sum) / float(Size);
    const float unit = mean > 0.0f ? mean : 1.0f;
    for (int t = int(lane); t < Size; t += 32) {
      const float relative = tokens[t] / unit;
      // Comparisons that let NaN pass, unlike `clamp`.
      tokens[t] = relative < 1.0f / most ? 1.0f / most : relative > most ? most : relative;
    }
  }
  sum = 0.0f;
  for (int t = int(lane); t < Size; t += 32) {
    sum += tokens[t];
  }
  sum = sum_of_lanes(sum);
  for (int t = int(lane); t < Size; t += 32) {
    shares[t] = tokens[t] / sum;
  }
}

// keys: this block's, [Size][D]; turned: scratch of that shape. places: of this head, [D]; felt:
// weights and salience by the order, [2][D]. rows: of this head's rows of words, the first place of
// each, 32 for each of its codes. words: [rows][Size]; grid: [2][D]. means and steps: [D]; tokens and shares: [Size]; codes:
// [Size * (D + 4)].
template <typename S, int D, int Size, bool Felt, bool Turned>
inline void codes_encode(
    const device S* keys,
    device S* turned,
    float factor,
    const device int* places,
    const device float* felt,
    const device int* rows,
    int n_rows,
    device uint* words,
    device S* grid,
    threadgroup float* means,
    threadgroup float* steps,
    threadgroup float* tokens,
    threadgroup float* shares,
    threadgroup uchar* codes,
    uint thread_index,
    uint lane,
    uint simdgroup) {
  constexpr int W = (D + 31) / 32;
  constexpr int Row = D + 4;  // of codes, so that a place's tokens are in different banks
  const int i = int(thread_index);
  const bool has_channel = i < D;
  if (Turned) {
    turn_keys<S, D, Size>(keys, turned, factor, lane, simdgroup);
    threadgroup_barrier(mem_flags::mem_device);
  }
  const device S* from = Turned ? turned : keys;
  const int place = has_channel ? places[i] : 0;
  const ChannelKeys<S, D> own = {from + place_channel(place), 0};
  const float most = largest_code(place);
  float low = 0.0f;
  float step = 0.0f;
  if (has_channel) {
    range_grid<S>(range_of<Size>(own), most, low, step);
    means[i] = channel_mean<S, D, Size>(own);
    steps[i] = step;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  token_shares<S, D, Size, Felt>(
      from, places, felt, means, steps, tokens, shares, lane, simdgroup);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (has_channel) {
    for (int fit = 0; fit < 2; ++fit) {
      const FittedLine line = fit_line<Size>(own, shares, low, step, most);
      const float slope = line.products / (line.squares > 0.0f ? line.squares : 1.0f);
      const float fitted = float(to_stored<S>(slope));
      const float best = float(to_stored<S>(line.value - exact_product(fitted, line.code)));
      // Comparisons with NaN are false.
      const bool usable = line.squares > 0.0f && fitted > 0.0f && abs(best) < INFINITY;
      low = usable ? best : low;
      step = usable ? fitted : step;
    }
    grid[i] = S(low);
    grid[D + i] = S(step);
    for (int t = 0; t < Size; ++t) {
      codes[t * Row + i] = uchar(code_of(value_at(own, t), low, step, most));
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int w = i; w < n_rows * Size; w += 32 * W) {
    const int t = w % Size;
    const int row = rows[w / Size];  // whose codes leave no bit between them
    const int first = row >> 5;
    const int count = row & 31;
    uint word = 0;
    int shift = 0;
    for (int field = 0; field < count; ++field) {
      word |= uint(codes[t * Row + first + field]) << shift;
      shift += place_width(places[first + field]);
    }
    words[w] = word;
  }
}
