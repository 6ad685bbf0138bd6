// tile_pack: blocks of keys packed into a few rows each, for tile_score.
//
// Grid: one threadgroup per block of keys (x = threads, one a channel, y = blocks, z = rows * kv
// heads). The block is cut where a key differs most from the one before it, and its pieces become
// their means: `Pieces` rows, with log2 of their counts and half their spread.
//
// Reads the block's keys three times, after the first from cache; writes Pieces / Size of it.
// mlx_delta/method/tiles.py specifies it.

// Which of a block's keys begin a piece, as bits of `begins` [ceil(Size / 32)]: the first, and the
// Pieces - 1 that differ most from the one before them. change: [Size].
template <typename T, int D, int Size, int Pieces, int Simdgroups>
inline void cut_pieces(
    const device T* keys,
    threadgroup float* change,
    threadgroup uint* begins,
    uint lane,
    uint simdgroup) {
  for (int t = 1 + int(simdgroup); t < Size; t += Simdgroups) {
    float sum = 0.0f;
    for (int d = int(lane); d < D; d += 32) {
      float step = float(keys[t * D + d]) - float(keys[(t - 1) * D + d]);
      sum += step * step;
    }
    sum = simd_sum(sum);
    if (lane == 0) {
      // As if endless: comparisons with NaN are false, and there would be too many pieces.
      change[t] = isnan(sum) ? INFINITY : sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int word = int(simdgroup); word < (Size + 31) / 32; word += Simdgroups) {
    const int t = 32 * word + int(lane);
    bool begin = t == 0;
    if (t > 0 && t < Size) {
      int before = 0;  // keys that come first
      for (int other = 1; other < Size; ++other) {
        before += change[other] > change[t] || (change[other] == change[t] && other < t) ? 1 : 0;
      }
      begin = before < Pieces - 1;
    }
    const uint bits = uint(simd_vote::vote_t(simd_ballot(begin)));
    if (lane == 0) {
      begins[word] = bits;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// keys: this block's, [Size][D]. packed: [Pieces][D]; bias and spread: [Pieces]. Thread d has channel
// d. squares: [Pieces * (Simdgroups + 1)], of each piece and simdgroup, and the pieces' counts.
template <typename T, typename S, int D, int Size, int Pieces>
inline void tile_pack(
    const device T* keys,
    device S* packed,
    device float* bias,
    device float* spread,
    threadgroup float* change,
    threadgroup uint* begins,
    threadgroup float* squares,
    uint thread_index,
    uint lane,
    uint simdgroup) {
  constexpr int Simdgroups = (D + 31) / 32;
  const int d = int(thread_index);
  cut_pieces<T, D, Size, Pieces, Simdgroups>(keys, change, begins, lane, simdgroup);
  int start = 0;
  for (int piece = 0; piece < Pieces; ++piece) {
    int end = start + 1;
    while (end < Size && !((begins[end / 32] >> (end % 32)) & 1u)) {
      ++end;
    }
    float square = 0.0f;
    if (d < D) {
      float sum = 0.0f;
      for (int t = start; t < end; ++t) {
        sum += float(keys[t * D + d]);
      }
      const float mean = sum / float(end - start);
      for (int t = start; t < end; ++t) {
        const float step = float(keys[t * D + d]) - mean;
        square += step * step;
      }
      packed[piece * D + d] = S(mean);
    }
    square = simd_sum(square);
    if (lane == 0) {
      squares[piece * (Simdgroups + 1) + int(simdgroup)] = square;
    }
    if (thread_index == 0) {
      squares[piece * (Simdgroups + 1) + Simdgroups] = float(end - start);
    }
    start = end;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int piece = int(thread_index); piece < Pieces; piece += 32 * Simdgroups) {
    const threadgroup float* own = squares + piece * (Simdgroups + 1);
    float square = 0.0f;
    for (int s = 0; s < Simdgroups; ++s) {
      square += own[s];
    }
    bias[piece] = log2(own[Simdgroups]);
    // Half of it, for scores that are powers of two and queries with log2(e) in their factor.
    spread[piece] = square / (own[Simdgroups] * float(D)) * (0.5f / M_LOG2E_F);
  }
}
