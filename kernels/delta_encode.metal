// delta_encode: hold the keys of finished blocks, and pack what changed.
//
// Grid: one threadgroup per block of one kv head of one row, all of them in one launch. A
// threadgroup has 32 * W threads, W = ceil(D / 32): thread d has channel d, so that its simdgroup
// is the number of its mask word and its lane the bit in it. Threads d >= D only vote.
//
//   1. Each thread reads its channel's keys, and finds their grid (codes only).
//   2. It walks along the tokens with its run's first value in a register; where a new run starts
//      becomes a mask word by a vote of the simdgroup. No barrier is needed: channels do not depend
//      on each other.
//   3. Simdgroup 0 sums the bits up: where each word's values begin in the payload.
//   4. Each thread puts its runs' values (means, or first keys) in their places: 16-bit values into
//      the payload, codes into threadgroup memory, a byte each.
//   5. The codes are put together into words.
//
// Reads the keys up to three times (2 * Size * D bytes each; after the first time from cache): for
// the grid, for the mask, and those that start a run, or for means all, for the payload. Writes the
// packed block. Once per block, so that it never shows in the time of a token.

// The code of a key, and 0 for a channel that does not vary or has no grid.
template <int Bits>
inline uint delta_code(float key, float low, float step) {
  if (!(step > 0.0f)) {
    return 0u;
  }
  float code = floor((key - low) / step + 0.5f);
  return uint(clamp(code, 0.0f, float((1 << Bits) - 1)));
}

// The mean of the run that starts at token t of a channel: first + sum of (key - first) / count,
// which of one key or of equal ones is exactly that. words: this simdgroup's mask words, W apart.
// The kernel is compiled without fast-math, so the division is rounded as IEEE says.
template <typename S, int D, int Size>
inline float delta_mean(const device S* keys, const threadgroup uint* words, uint lane, int t) {
  constexpr int W = (D + 31) / 32;
  const float first = float(keys[t * D]);
  float total = 0.0f;
  int end = t + 1;
  for (; end < Size && !((words[end * W] >> lane) & 1u); ++end) {
    total += float(keys[end * D]) - first;
  }
  return first + total / float(end - t);
}

// What a first key becomes when it is stored.
template <typename S, int Bits>
inline float delta_stored(float key, float low, float step) {
  if (Bits == 16) {
    return key;
  }
  return packed_value<S, Bits>(delta_code<Bits>(key, low, step), low, step);
}

// Low and step of one channel's keys [Size], D apart; NaN if one of them is not finite.
template <typename S, int Bits, int D, int Size>
inline void delta_grid(const device S* keys, thread S& low, thread S& step) {
  float smallest = INFINITY;
  float greatest = -INFINITY;
  bool usable = true;
  for (int t = 0; t < Size; ++t) {
    float key = float(keys[t * D]);
    usable = usable && abs(key) < INFINITY;
    smallest = min(smallest, key);
    greatest = max(greatest, key);
  }
  float span = greatest - smallest;
  float exact = span / float((1 << Bits) - 1);
  S nearest = S(exact);
  if (float(nearest) < exact) {  // round up, or the largest key would lie above the grid
    nearest = as_type<S>(ushort(as_type<ushort>(nearest) + 1));
  }
  usable = usable && span < INFINITY;
  low = usable ? S(smallest) : S(NAN);
  step = usable ? nearest : S(NAN);
}

// Mean: runs are stored as their means, otherwise as their first keys.
// keys: this block's, [Size][D]. masks, payload, counts (values, zero deltas) and grid: this block's
// places in the outputs. words, starts: [Size * W] each; codes: [Size * D], used for codes only.
template <typename S, int Bits, int D, int Size, bool Mean>
inline void delta_encode(
    const device S* keys,
    float threshold,
    int sinks,  // tokens of this block that are stored as they are, from its first on
    device uint* masks,
    device uint* payload,
    device int* counts,
    device S* grid,
    threadgroup uint* words,
    threadgroup uint* starts,
    threadgroup uchar* codes,
    uint thread_index,
    uint lane,
    uint simdgroup) {
  constexpr int W = (D + 31) / 32;
  const int d = int(thread_index);
  const bool has_channel = d < D;

  S low = S(0);
  S step = S(0);
  if (Bits < 16 && has_channel) {
    delta_grid<S, Bits, D, Size>(keys + d, low, step);
    grid[d] = low;
    grid[D + d] = step;
  }

  float held = 0.0f;
  for (int t = 0; t < Size; ++t) {
    bool changed = has_channel;
    if (has_channel) {
      float key = float(keys[t * D + d]);
      // A first key is compared as it is stored. A mean is not known yet: keys are compared.
      float next = Mean ? key : delta_stored<S, Bits>(key, float(low), float(step));
      if (t > 0) {
        // "not more than" rather than "less than": a NaN compares false and is stored.
        bool keep = t >= sinks && abs(key - held) <= threshold;
        next = keep ? held : next;
        changed = Mean ? !keep : !(next == held);
      }
      held = next;
    }
    uint word = uint(simd_vote::vote_t(simd_ballot(changed)));
    if (lane == 0) {
      words[t * W + int(simdgroup)] = word;
      if (t > 0) {
        masks[(t - 1) * W + int(simdgroup)] = word;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (simdgroup == 0) {
    const int counted_from = max(sinks, 1);  // rows before stand for themselves: no zeros
    uint total = 0;
    uint changes = 0;
    for (int i = 0; i < Size * W; i += 32) {
      int index = i + int(lane);
      uint bits = index < Size * W ? popcount(words[index]) : 0u;
      uint before = simd_prefix_exclusive_sum(bits);
      if (index < Size * W) {
        starts[index] = total + before;
      }
      total += simd_sum(bits);
      changes += simd_sum(index / W >= counted_from ? bits : 0u);
    }
    if (lane == 0) {
      counts[0] = int(total);
      counts[1] = max(Size - counted_from, 0) * D - int(changes);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (has_channel) {
    for (int t = 0; t < Size; ++t) {
      uint word = words[t * W + int(simdgroup)];
      if ((word >> lane) & 1u) {
        uint place = starts[t * W + int(simdgroup)] + popcount(word & lanes_before(lane));
        float value = float(keys[t * D + d]);
        if (Mean && t >= sinks) {
          value = delta_mean<S, D, Size>(keys + d, words + simdgroup, lane, t);
        }
        if (Bits == 16) {
          ((device ushort*)payload)[place] = as_type<ushort>(S(value));
        } else {
          codes[place] = uchar(delta_code<Bits>(value, float(low), float(step)));
        }
      }
    }
  }

  if (Bits < 16) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    constexpr uint per_word = 32 / Bits;
    const uint total = starts[Size * W - 1] + popcount(words[Size * W - 1]);
    for (uint w = thread_index; w * per_word < total; w += 32 * W) {
      uint word = 0;
      for (uint i = 0; i < per_word && w * per_word + i < total; ++i) {
        word |= uint(codes[w * per_word + i]) << (Bits * i);
      }
      payload[w] = word;
    }
  }
}
