// delta_hold: the keys of finished blocks, held by a threshold, where keys stay in full.
//
// Grid: one threadgroup per block of one kv head of one row, all of them in one launch. A
// threadgroup has 32 * ceil(D / 32) threads: thread d has channel d; threads d >= D only add zeros
// up.
//
//   1. Each thread walks along the tokens with its run's first value in a register, and keeps where
//      runs start in the bits of two words. No barrier is needed: channels do not depend on each
//      other.
//   2. For means it walks along them again, run by run.
//   3. Simdgroups, and then thread 0, add up how many elements start no run.
//
// Reads the keys twice (2 * Size * D bytes each, for means three times; after the first time from
// cache), writes as many bytes. Once per block, so that it never shows in the time of a token.

// Where runs start, of up to 64 tokens.
struct HoldStarts {
  uint low;
  uint high;
};

inline bool starts_at(HoldStarts starts, int t) {
  return ((t < 32 ? starts.low >> t : starts.high >> (t - 32)) & 1u) != 0u;
}

// Mean: runs are held as their means, otherwise as their first keys.
// keys, held: this block's, [Size][D]. zeros: this block's. zeros_of: [ceil(D / 32)].
template <typename S, int D, int Size, bool Mean>
inline void delta_hold(
    const device S* keys,
    float threshold,
    int sinks,  // tokens of this block that stand for themselves, from its first on
    device S* held,
    device int* zeros,
    threadgroup int* zeros_of,
    uint thread_index,
    uint lane,
    uint simdgroup) {
  const int d = int(thread_index);
  const int counted_from = max(sinks, 1);  // rows before stand for themselves: no zeros
  HoldStarts starts = {0u, 0u};
  int unchanged = 0;
  if (d < D) {
    float value = 0.0f;
    for (int t = 0; t < Size; ++t) {
      const float key = float(keys[t * D + d]);
      // "not more than" rather than "less than": a NaN compares false and starts a run.
      const bool keep = t > 0 && t >= sinks && abs(key - value) <= threshold;
      const float next = keep ? value : key;
      const bool same = Mean ? keep : next == value;
      unchanged += t >= counted_from && same ? 1 : 0;
      starts.low |= !keep && t < 32 ? 1u << t : 0u;
      starts.high |= !keep && t >= 32 ? 1u << (t - 32) : 0u;
      value = next;
      if (!Mean) {
        held[t * D + d] = S(value);
      }
    }
  }
  if (Mean && d < D) {
    // first + sum of (key - first) / count, which of one key or of equal ones is exactly that. The
    // kernel is compiled without fast-math, so the division is rounded as IEEE says.
    for (int t = 0; t < Size;) {
      const float first = float(keys[t * D + d]);
      float total = 0.0f;
      int end = t + 1;
      for (; end < Size && !starts_at(starts, end); ++end) {
        total += float(keys[end * D + d]) - first;
      }
      // A run that starts at a sink keeps its first key.
      const S mean = S(t < sinks ? first : first + total / float(end - t));
      for (; t < end; ++t) {
        held[t * D + d] = mean;
      }
    }
  }
  const int sum = simd_sum(unchanged);
  if (lane == 0) {
    zeros_of[simdgroup] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index == 0) {
    int total = 0;
    for (int i = 0; i < (D + 31) / 32; ++i) {
      total += zeros_of[i];
    }
    zeros[0] = total;
  }
}
