// delta_unpack: packed blocks back to held keys, for prefill.
//
// Grid: one threadgroup per block of one kv head of one row. A threadgroup has 32 * W threads,
// W = ceil(D / 32): thread d has channel d, its simdgroup is the number of its mask word and its lane
// the bit in it. The mask is brought to threadgroup memory, then each thread walks along the tokens
// with the held value in a register, and reads the next value of its channel where the bit is set.
//
// Reads the mask once and the payload's words as often as values share one (from cache), writes
// 2 * Size * D bytes.

// masks [Size - 1][W], payload (this block's run of words), grid [2][D] and held [Size][D]: this
// block's. words: [(Size - 1) * W].
template <typename S, int Bits, int D, int Size>
inline void delta_unpack(
    const device uint* masks,
    const device uint* payload,
    const device S* grid,
    device S* held,
    threadgroup uint* words,
    uint thread_index,
    uint lane,
    uint simdgroup) {
  constexpr int W = (D + 31) / 32;
  constexpr uint per_word = 32 / Bits;
  for (int i = int(thread_index); i < (Size - 1) * W; i += 32 * W) {
    words[i] = masks[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int d = int(thread_index);
  if (d >= D) {
    return;
  }
  const float low = Bits < 16 ? float(grid[d]) : 0.0f;
  const float step = Bits < 16 ? float(grid[D + d]) : 0.0f;
  float value = packed_value<S, Bits>(packed_field<Bits>(payload[d / per_word], d), low, step);
  held[d] = S(value);
  uint before = D;  // values of all tokens so far
  for (int t = 1; t < Size; ++t) {
    uint place = before;
    for (int w = 0; w < W; ++w) {
      uint word = words[(t - 1) * W + w];
      uint bits = popcount(word);
      place += w < int(simdgroup) ? bits : 0u;
      before += bits;
    }
    uint word = words[(t - 1) * W + int(simdgroup)];
    if ((word >> lane) & 1u) {
      place += popcount(word & lanes_before(lane));
      uint field = packed_field<Bits>(payload[place / per_word], place);
      value = packed_value<S, Bits>(field, low, step);
    }
    held[t * D + d] = S(value);
  }
}
