// deltas_decode: scores of a simdgroup's queries with blocks of held keys, stored by lanes. A lane of
// the GPU owns eight channels, and walks with them from token to token; 32 / (D / 8) blocks at once.
//
// mlx_delta/method/deltas.py specifies a block's words: which lanes are held, masks, and one
// stream of codes. A lane's masks and codes of 16 tokens lie beside those of its neighbours; where, it knows
// from theirs by a sum over lanes, once in 16 tokens. Then a token is: take the next bits of the
// stream, and for each channel whose run ends, its code.
//
// Tokens lie there in a sequence of the block's own; their scores go where the tokens belong.
//
// What a token adds up to in each lane goes to threadgroup memory, eight tokens at a time, and is
// summed up there with a token to a lane, so that no lane waits for 15 others at every token.

constant constexpr int DELTA_CHUNK = 16;  // tokens whose masks and codes lie side by side
constant constexpr int DELTA_STRIP = 8;  // tokens that are summed up at once
constant constexpr int DELTA_APART = 33;  // sums of a token from those of the next: other banks
// A code as a half: 1024 + code, as long as it has no more than ten bits.
constant constexpr uint DELTA_FIELD = 0x6400u;
constant constexpr float DELTA_ZERO = 1024.0f;

template <int D>
constexpr int delta_ahead() {  // blocks at once
  return D <= 64 ? 4 : 32 / (D / 8);
}

// Lanes that sum up a token's parts together.
template <int D>
constexpr int delta_sharers() {
  return delta_ahead<D>() == 1 && D % 32 == 0 ? 4 : delta_ahead<D>() <= 2 && D % 16 == 0 ? 2 : 1;
}

// Room for the sums of a strip, and for scores.
constexpr int delta_sums() { return DELTA_STRIP * DELTA_APART; }
template <int D>
constexpr int delta_scores_room() {
  return delta_ahead<D>() * CODED_TOKENS;
}

// Room for sums, and later weights: of values in groups of Group numbers.
template <int D, int Group>
constexpr int delta_shared() {
  return delta_sums() > D / Group * CODED_TOKENS ? delta_sums() : D / Group * CODED_TOKENS;
}

#ifndef FUNNEL_RIGHT
// The 32 bits from bit `shift` of a pair of words on; shift < 32.
inline uint funnel_right(uint low, uint high, uint shift) {
  return (low >> shift) | ((high << 1) << (31u - shift));
}
#endif

// Held keys of a kv head.
template <typename S, int D, int Queries, bool Wide>
struct DeltaFar {
  enum { Ahead = delta_ahead<D>() };
  const device uint* payload;  // its row's words
  const device int* offsets;
  const device S* low;
  const device uchar* steps;
  const device uchar* sequence;
  threadgroup float4* sums;  // [delta_sums()]
  threadgroup float4* scores;  // [delta_scores_room<D>()]
  uint width;  // of this lane's codes
};

template <typename S, int D, int Queries, bool Wide>
inline void begin_far(thread DeltaFar<S, D, Queries, Wide>&, threadgroup float4*, int) {}

// What the lanes before this one that have the same block add up to, and all of them.
template <int D>
inline uint2 before_in_block(uint x, int lane) {
  constexpr int Own = D / 8;
  const int sub = min(lane / Own, delta_ahead<D>() - 1);
  const uint before = simd_prefix_exclusive_sum(x);
  const uint first = simd_shuffle(before, ushort(sub * Own));
  const uint last = simd_shuffle(before + x, ushort(sub * Own + Own - 1));
  // Lanes that are too many do what some other lane does.
  const uint own = simd_shuffle(before, ushort(sub * Own + lane % Own));
  return uint2(own - first, last - first);
}

// Takes the codes of the channels that a mask's bits name, Count of them from channel First on.
template <int First, int Count>
inline void take_codes(thread float (&held)[8], uint bits, uint window, uint width, uint most) {
  UNROLL_ALL
  for (int k = First; k < First + Count; ++k) {
    if (bits & (1u << k)) {
      held[k] = float(as_type<half>(ushort((window & most) | DELTA_FIELD)));
      window >>= width;
    }
  }
}

// The scores of `count` blocks from `block` on, to threadgroup memory. plain: the queries in the
// order.
template <typename S, int D, int Queries, bool Wide>
inline void delta_scores(
    thread DeltaFar<S, D, Queries, Wide>& far,
    int block,
    int count,
    const threadgroup float4* plain,
    int lane) {
  constexpr int Own = D / 8;
  constexpr int Ahead = delta_ahead<D>();
  constexpr int Sharers = delta_sharers<D>();
  constexpr uint heads = (Own + 31) / 32;  // words that say which lanes are held
  const int own = lane % Own;
  const device uchar* sequence = far.sequence + long(block) * CODED_TOKENS;
  block += min(min(lane / Own, Ahead - 1), count - 1);
  const device uint* payload = far.payload;
  const uint begin = uint(far.offsets[block]);
  const bool is_held = payload[begin + own / 32] >> (own % 32) & 1u;

  // The grid goes into the queries.
  float query[8][Queries];
  float low[Queries];
  UNROLL_ALL
  for (int j = 0; j < Queries; ++j) {
    low[j] = 0.0f;
  }
  const Run<S, 8> lows = *(const device Run<S, 8>*)(far.low + long(block) * D + own * 8);
  const Run<uchar, 8> steps = *(const device Run<uchar, 8>*)(far.steps + long(block) * D + own * 8);
  UNROLL_ALL
  for (int k = 0; k < 8; ++k) {
    const float step = whole_step(steps.e[k]);
    const float base = float(lows.e[k]) - DELTA_ZERO * step;
    fetch<Queries>(plain, own * 8 + k, query[k]);
    UNROLL_ALL
    for (int j = 0; j < Queries; ++j) {
      low[j] += query[k][j] * base;
      query[k][j] *= step;
    }
  }

  const uint2 masks_at = before_in_block<D>(is_held ? DELTA_CHUNK / 4 : 0u, lane);
  uint masks = begin + heads + masks_at.x;
  const uint codes = begin + heads + CODED_TOKENS / DELTA_CHUNK * masks_at.y;
  const uint most = (1u << far.width) - 1u;
  uint stream = 0u;  // bits of the codes of all chunks so far
  float held[8];
  UNROLL_ALL
  for (int k = 0; k < 8; ++k) {
    held[k] = DELTA_ZERO;
  }
  UNROLL_NONE
  for (int chunk = 0; chunk < CODED_TOKENS; chunk += DELTA_CHUNK) {
    uint mask[4];
    uint runs = 0u;
    UNROLL_ALL
    for (uint g = 0; g < 4u; ++g) {
      mask[g] = is_held ? payload[masks + g] : 0xffffffffu;
      runs += popcount(mask[g]);
    }
    masks += masks_at.y;
    const uint2 bits_at = before_in_block<D>(runs * far.width, lane);
    uint at = stream + bits_at.x;
    stream += bits_at.y;
    UNROLL_NONE
    for (int strip = 0; strip < DELTA_CHUNK; strip += DELTA_STRIP) {
      UNROLL_NONE
      for (int first = 0; first < DELTA_STRIP; first += 4) {
        const uint four = mask[0];
        mask[0] = mask[1];
        mask[1] = mask[2];
        mask[2] = mask[3];
        UNROLL_ALL
        for (int t = 0; t < 4; ++t) {
          const uint bits = (four >> (8 * t)) & 0xffu;
          const device uint* from = payload + (codes + (at >> 5));
          const uint window = funnel_right(from[0], from[1], at & 31u);
          if (Wide) {
            // Four codes have at most 28 bits, eight may have more than a word.
            const uint after = funnel_right(from[1], from[2], at & 31u);
            const uint taken = popcount(bits & 15u) * far.width;
            take_codes<0, 4>(held, bits, window, far.width, most);
            take_codes<4, 4>(held, bits, funnel_right(window, after, taken), far.width, most);
          } else {
            take_codes<0, 8>(held, bits, window, far.width, most);
          }
          at += popcount(bits) * far.width;
          float sum[Queries];
          UNROLL_ALL
          for (int j = 0; j < Queries; ++j) {
            sum[j] = low[j];
            UNROLL_ALL
            for (int k = 7; k >= 0; --k) {
              sum[j] += query[k][j] * held[k];
            }
          }
          put<Queries>(far.sums, (first + t) * DELTA_APART + lane, sum);
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
      const int place = chunk + strip + lane % DELTA_STRIP;
      const int sub = lane / DELTA_STRIP % Ahead;
      const int share = min(lane / (DELTA_STRIP * Ahead), Sharers - 1) * (Own / Sharers);
      float total[Queries];
      UNROLL_ALL
      for (int j = 0; j < Queries; ++j) {
        total[j] = 0.0f;
      }
      UNROLL_ALL
      for (int i = 0; i < Own / Sharers; ++i) {
        float part[Queries];
        fetch<Queries>(far.sums, lane % DELTA_STRIP * DELTA_APART + sub * Own + share + i, part);
        UNROLL_ALL
        for (int j = 0; j < Queries; ++j) {
          total[j] += part[j];
        }
      }
      UNROLL_ALL
      for (int other = DELTA_STRIP * Ahead; other < DELTA_STRIP * Ahead * Sharers; other *= 2) {
        UNROLL_ALL
        for (int j = 0; j < Queries; ++j) {
          total[j] += simd_shuffle_xor(total[j], ushort(other));
        }
      }
      if (lane < DELTA_STRIP * Ahead) {
        const int token = sequence[min(sub, count - 1) * CODED_TOKENS + place];
        put<Queries>(far.scores, sub * CODED_TOKENS + token, total);
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
}

template <typename S, int D, int Queries, bool Wide>
inline void begin_blocks(
    thread DeltaFar<S, D, Queries, Wide>& far,
    int block,
    int count,
    const threadgroup float4* plain,
    int lane) {
  delta_scores(far, block, count, plain, lane);
}

// Scores of this lane's two tokens, first and first + 1, of the block that is `number` behind the
// one that blocks were begun with.
template <typename S, int D, int Queries, bool Wide>
inline void far_scores(
    thread DeltaFar<S, D, Queries, Wide>& far,
    int,
    int number,
    int first,
    const threadgroup float4*,
    threadgroup float4*,
    int,
    thread float (&score)[2][Queries]) {
  UNROLL_ALL
  for (int i = 0; i < 2; ++i) {
    fetch<Queries>(far.scores, number * CODED_TOKENS + first + i, score[i]);
  }
}
