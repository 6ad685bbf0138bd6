// deltas_encode: blocks that were cut into runs, stored with masks by channel and codes in streams.
//
// Grid: one threadgroup per block of one kv head of one row, all of them in one launch, after that
// of delta_runs. A threadgroup has 32 * W threads, W = ceil(D / 32); thread i has the i-th channel
// of the order, and eight of them a lane of the format.
//
//   1. Each thread gathers where its channel's runs begin, and lanes that would be no smaller with
//      masks get all their codes. Which codes there are becomes words by votes.
//   2. Grids as in codes_encode, fitted to what is held, with steps of eight bits.
//   3. Simdgroup 0 sums up where the codes of each 16 tokens and lane begin: in number, and in bits.
//   4. Each thread puts its codes into threadgroup memory, side by side as they are stored.
//   5. Threads put words together, each by itself: it looks up which lane's codes its first bit is in.
//
// Reads keys and means about ten times (6 * Size * D bytes each), after the first time from cache.
// Once per block. mlx_delta/method/deltas.py specifies it.

constant constexpr int LANE = 8;    // channels
constant constexpr int CHUNK = 16;  // tokens whose masks, and whose codes, lie side by side

// What a channel is held as: its runs' means, or its keys.
template <typename S, int D>
struct HeldChannel {
  ChannelKeys<S, D> keys;
  const device float* means;
  bool held;
};
template <typename S, int D>
inline float value_at(HeldChannel<S, D> own, int t) {
  return own.held ? own.means[t * D] : value_at(own.keys, t);
}

// Which of a lane's codes of a token there are, a bit for each channel. marks: [Size][W].
template <int W>
inline uint lane_mask(const threadgroup uint* marks, int t, int lane) {
  return (marks[t * W + lane / 4] >> (LANE * (lane % 4))) & 0xffu;
}

// The `w`-th word of the codes, which are bytes one after another; 0 behind them. Streams are numbered from chunk
// to chunk and lane to lane; places: of this head.
template <int Lanes, int Streams>
inline uint stream_word(
    int w,
    const threadgroup uchar* codes,
    const threadgroup int* first_codes,
    const threadgroup int* first_bits,
    const device int* places) {
  const int begin = 32 * w;
  int stream = 0;  // the last one that begins no later
  for (int end = Streams; end - stream > 1;) {
    const int middle = (stream + end) / 2;
    if (first_bits[middle] <= begin) {
      stream = middle;
    } else {
      end = middle;
    }
  }
  int width = place_width(places[stream % Lanes * LANE]);
  const int before = (begin - first_bits[stream]) / width;
  int index = first_codes[stream] + before;
  int bit = first_bits[stream] + before * width;
  uint word = 0u;
  while (bit < begin + 32 && bit < first_bits[Streams]) {
    while (first_bits[stream + 1] <= bit) {
      ++stream;
      width = place_width(places[stream % Lanes * LANE]);
    }
    const uint code = codes[index];
    word |= bit < begin ? code >> (begin - bit) : code << (bit - begin);
    bit += width;
    ++index;
  }
  return word;
}

// keys: this block's, [Size][D], all but those before `from`, which are as that one. starts:
// [Size][W], means: [Size][D], and tokens, how much each counts: [Size], of delta_runs. places: of
// this head, [D]. words: [Room]; counts and zeros: this block's numbers; lows and steps: [D]. shares:
// [Size]; marks: [Size * W]; first_codes and first_bits: [Size / 16 * D / 8, rounded up, + 1];
// held_lanes: [D / 8]; runs: [W]; codes: [Size * D].
template <typename S, int D, int Size, int Room>
inline void deltas_encode(
    const device S* keys,
    int from,
    const device uint* starts,
    const device float* means,
    const device float* tokens,
    const device int* places,
    device uint* words,
    device int* counts,
    device int* zeros,
    device S* lows,
    device uchar* steps,
    threadgroup float* shares,
    threadgroup uint* marks,
    threadgroup int* first_codes,
    threadgroup int* first_bits,
    threadgroup uchar* held_lanes,
    threadgroup int* runs,
    threadgroup uchar* codes,
    uint thread_index,
    uint lane,
    uint simdgroup) {
  constexpr int W = (D + 31) / 32;
  constexpr int Lanes = D / LANE;
  constexpr int Streams = (Size + CHUNK - 1) / CHUNK * Lanes;
  const int i = int(thread_index);
  const bool has_channel = i < D;
  const int place = has_channel ? places[i] : 0;
  const int channel = place_channel(place);

  // 1.
  ulong begins = 0ul;
  int count = 0;
  if (has_channel) {
    for (int t = 0; t < Size; ++t) {
      const uint begin = (starts[t * W + channel / 32] >> (channel % 32)) & 1u;
      begins |= ulong(begin) << t;
      count += int(begin);
    }
  }
  int of_lane = count;
  for (ushort apart = 1; apart < LANE; apart *= 2) {
    of_lane += simd_shuffle_xor(of_lane, apart);
  }
  const int width = place_width(place);
  const bool held = LANE * Size + of_lane * width < LANE * Size * width;
  begins = held ? begins : ~0ul;
  count = held ? count : Size;
  count = simd_sum(has_channel ? count : 0);
  if (lane == 0) {
    runs[simdgroup] = count;
  }
  if (has_channel && i % LANE == 0) {
    held_lanes[i / LANE] = held ? 1 : 0;
  }
  for (int t = 0; t < Size; ++t) {
    const uint bits = uint(simd_vote::vote_t(simd_ballot(has_channel && ((begins >> t) & 1ul))));
    if (lane == 0) {
      marks[t * W + int(simdgroup)] = bits;
    }
  }

  // 2.
  const float most = largest_code(place);
  const ChannelKeys<S, D> own_keys = {keys + channel, from};
  const HeldChannel<S, D> own = {own_keys, means + channel, held};
  float low = 0.0f;
  uchar step = 0;
  if (has_channel) {
    float exact;
    range_grid<S>(range_of<Size>(own), most, low, exact);
    step = short_step(exact);
  }
  if (simdgroup == 0) {
    float sum = 0.0f;
    for (int t = int(lane); t < Size; t += 32) {
      sum += tokens[t];
    }
    sum = sum_of_lanes(sum);
    for (int t = int(lane); t < Size; t += 32) {
      shares[t] = tokens[t] / sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 3.
  uint head = 0u;
  if (simdgroup == 0) {
    int code = 0;
    int bit = 0;
    for (int first = 0; first < Streams; first += 32) {
      const int stream = first + int(lane);
      int number = 0;
      int bits = 0;
      if (stream < Streams) {
        const int begin = stream / Lanes * CHUNK;
        for (int t = begin; t < min(begin + CHUNK, Size); ++t) {
          number += int(popcount(lane_mask<W>(marks, t, stream % Lanes)));
        }
        bits = number * place_width(places[stream % Lanes * LANE]);
      }
      const int codes_before = simd_prefix_exclusive_sum(number);
      const int bits_before = simd_prefix_exclusive_sum(bits);
      if (stream < Streams) {
        first_codes[stream] = code + codes_before;
        first_bits[stream] = bit + bits_before;
      }
      code += simd_sum(number);
      bit += simd_sum(bits);
    }
    if (lane == 0) {
      first_bits[Streams] = bit;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int other = 0; other < Lanes; ++other) {
    head |= uint(held_lanes[other]) << other;
  }
  const int n_held = int(popcount(head));
  const int codes_at = 1 + n_held * (Size / 4);
  if (i == 0) {
    int total = 0;
    for (int other = 0; other < W; ++other) {
      total += runs[other];
    }
    words[0] = head;
    counts[0] = codes_at + (first_bits[Streams] + 31) / 32;
    zeros[0] = Size * D - total;
  }

  // 4.
  if (has_channel) {
    for (int fit = 0; fit < 4; ++fit) {
      const FittedLine line = fit_line<Size>(own, shares, low, whole_step(step), most);
      const float slope = line.products / (line.squares > 0.0f ? line.squares : 1.0f);
      const uchar fitted = short_step(slope);
      const float below = exact_product(whole_step(fitted), line.code);
      const float best = float(to_stored<S>(line.value - below));
      // Comparisons with NaN are false.
      const bool usable = line.squares > 0.0f && fitted > 0 && abs(best) < INFINITY;
      low = usable ? best : low;
      step = usable ? fitted : step;
    }
    lows[i] = S(low);
    steps[i] = step;
    int next = 0;
    for (int t = 0; t < Size; ++t) {
      if (t % CHUNK == 0) {
        next = first_codes[t / CHUNK * Lanes + i / LANE];
      }
      const uint mask = lane_mask<W>(marks, t, i / LANE);
      if ((begins >> t) & 1ul) {
        const int before = int(popcount(mask & ((1u << (i % LANE)) - 1u)));
        codes[next + before] = uchar(code_of(value_at(own, t), low, whole_step(step), most));
      }
      next += int(popcount(mask));
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // 5. Masks of four tokens, and codes; then zeros.
  for (int m = i; m < Lanes * (Size / 4); m += 32 * W) {
    const int of = m % Lanes;
    const int quad = m / Lanes;
    if ((head >> of) & 1u) {
      uint word = 0u;
      for (int t = 0; t < 4; ++t) {
        word |= lane_mask<W>(marks, 4 * quad + t, of) << (8 * t);
      }
      const int chunk = 4 * quad / CHUNK;
      const int span = min(CHUNK, Size - CHUNK * chunk) / 4;
      const int rank = int(popcount(head & ((1u << of) - 1u)));
      words[1 + (n_held * chunk) * (CHUNK / 4) + rank * span + quad % (CHUNK / 4)] = word;
    }
  }
  for (int w = i; codes_at + w < Room; w += 32 * W) {
    words[codes_at + w] =
        stream_word<Lanes, Streams>(w, codes, first_codes, first_bits, places);
  }
}
