// codes_decode: scores of a simdgroup's queries with 64 tokens, coded or exact. Lanes own tokens.

constant constexpr int CODED_TOKENS = 64;  // to a block, and to a step of the other kinds
constant constexpr int CODED_KINDS = 6;  // of rows of words
constant constexpr int CODED_COUNTS = 8;  // numbers of a kv head: rows of each kind, the first row

constexpr int row_kind(int c) {
  return c < 5 ? c + 2 : 8;
}

// Room for the queries of a simdgroup in the order of the words: rows come in pairs, so that a kind
// may end with an empty one.
template <int Kinds, int D>
constexpr int coded_slots() {
  return D + (Kinds & 4 ? 4 : 0) + (Kinds & 8 ? 6 : 0) + (Kinds & 16 ? 8 : 0) +
      (Kinds & 32 ? 10 : 0) + (Kinds & 64 ? 12 : 0) + (Kinds & 256 ? 16 : 0);
}

// What `n` places of so many queries take, in float4.
template <int Queries>
constexpr int coded_room(int n) {
  return Queries >= 3 ? n : (n * Queries + 3) / 4;
}

// Numbers of up to four queries at one place in threadgroup memory, three and four side by side.
template <int Queries>
inline void fetch(const threadgroup float4* rows, int index, thread float* x) {
  if (Queries >= 3) {
    const float4 four = rows[index];
    x[0] = four.x;
    x[1] = four.y;
    x[2] = four.z;
    if (Queries == 4) {
      x[Queries - 1] = four.w;
    }
  } else {
    const threadgroup float* from = (const threadgroup float*)rows + index * Queries;
    UNROLL_ALL
    for (int j = 0; j < Queries; ++j) {
      x[j] = from[j];
    }
  }
}

template <int Queries>
inline void put(threadgroup float4* rows, int index, const thread float* x) {
  if (Queries >= 3) {
    rows[index] = float4(x[0], x[1], x[2], Queries == 4 ? x[Queries - 1] : 0.0f);
  } else {
    threadgroup float* to = (threadgroup float*)rows + index * Queries;
    UNROLL_ALL
    for (int j = 0; j < Queries; ++j) {
      to[j] = x[j];
    }
  }
}

// Where this lane's channels of the order, lane, lane + 32, ..., go among the queries, and what
// their factor is, one over the unit of their field. Returns how much room all take.
template <int Kinds, int Chunks, bool Bytes>
inline int place_channels(
    const device int* counts, int lane, thread int (&slot)[Chunks], thread float (&unit)[Chunks]) {
  int slots = 0;
  int channels = 0;
  UNROLL_ALL
  for (int c = 0; c < CODED_KINDS; ++c) {
    const int kind = row_kind(c);
    if (!(Kinds >> kind & 1)) {
      continue;
    }
    const int word_rows = counts[c];
    const int count = word_rows * 2 * kind;
    UNROLL_ALL
    for (int i = 0; i < Chunks; ++i) {
      const int index = 32 * i + lane - channels;
      if (index >= 0 && index < count) {
        const int p = index % kind;
        const int exponent = kind == 2 ? field_unit<2, Bytes>(p)
            : kind == 3                ? field_unit<3, Bytes>(p)
            : kind == 4                ? field_unit<4, Bytes>(p)
            : kind == 5                ? field_unit<5, Bytes>(p)
            : kind == 6                ? field_unit<6, Bytes>(p)
                                       : field_unit<8, Bytes>(p);
        slot[i] = slots + index;
        unit[i] = power_of_two(-exponent);
      }
    }
    channels += count;
    slots += (word_rows + 1) / 2 * 4 * kind;
  }
  return slots;
}

// Adds to the scores of four tokens what rows of one kind give, of which there are some. words: of
// the first one, this lane's tokens. slot: where they begin among the scaled queries.
template <int Kind, int Queries, bool Bytes>
inline void row_scores(
    const device uint* words,
    int rows,
    int part,
    const threadgroup float4* scaled,
    int slot,
    thread float (&score)[4][Queries]) {
  const int last = (rows - 1) * CODED_TOKENS;
  int at = min(part * CODED_TOKENS, last);
  Run<uint, 4> next = *(const device Run<uint, 4>*)(words + at);
  const int end = slot + (rows + 1) / 2 * (4 * Kind);
  slot += part * 2 * Kind;
  UNROLL_NONE
  for (; slot < end; slot += 4 * Kind) {
    const Run<uint, 4> own = next;
    at = min(at + 2 * CODED_TOKENS, last);
    next = *(const device Run<uint, 4>*)(words + at);
    UNROLL_ALL
    for (int p = 0; p < Kind; ++p) {
      float first[Queries];
      float second[Queries];
      fetch<Queries>(scaled, slot + p, first);
      fetch<Queries>(scaled, slot + p + Kind, second);
      UNROLL_ALL
      for (int t = 0; t < 4; ++t) {
        const float2 field = field_pair<Kind, Bytes>(own.e[t], p);
        UNROLL_ALL
        for (int j = 0; j < Queries; ++j) {
          score[t][j] += first[j] * field.x;
          score[t][j] += second[j] * field.y;
        }
      }
    }
  }
}

// The same for a kind of which there may be none, whose rows begin at `row`; row and slot then go
// on to the next one.
template <int Kind, int Kinds, int Queries, bool Bytes>
inline void add_kind(
    int rows,
    const device uint* words,
    int part,
    const threadgroup float4* scaled,
    thread int& row,
    thread int& slot,
    thread float (&score)[4][Queries]) {
  if (Kinds >> Kind & 1) {
    if (rows > 0) {
      row_scores<Kind, Queries, Bytes>(words + row * CODED_TOKENS, rows, part, scaled, slot, score);
      row += rows;
      slot += (rows + 1) / 2 * 4 * Kind;
    }
  }
}

// Scores of this lane's two tokens of a coded block, whose words and grid these are. plain: the
// queries in the order, from which those in `scaled` come, times steps.
template <typename S, int Kinds, int D, int Queries, bool Bytes>
inline void coded_scores(
    const device int* counts,
    const device uint* words,
    const device S* grid,
    const threadgroup float4* plain,
    const thread int (&slot)[(D + 31) / 32],
    const thread float (&unit)[(D + 31) / 32],
    threadgroup float4* scaled,
    int lane,
    thread float (&score)[2][Queries]) {
  const int part = lane / 16;
  float low[Queries];
  UNROLL_ALL
  for (int j = 0; j < Queries; ++j) {
    low[j] = 0.0f;
  }
  UNROLL_ALL
  for (int i = 0; i < (D + 31) / 32; ++i) {
    const int d = 32 * i + lane;
    if (d < D) {
      const float step = float(grid[D + d]) * unit[i];
      const float base = float(grid[d]) - CODE_ZERO * step;
      float query[Queries];
      float product[Queries];
      fetch<Queries>(plain, d, query);
      UNROLL_ALL
      for (int j = 0; j < Queries; ++j) {
        product[j] = query[j] * step;
        low[j] += query[j] * base;
      }
      put<Queries>(scaled, slot[i], product);
    }
  }
  float four[4][Queries];
  UNROLL_ALL
  for (int j = 0; j < Queries; ++j) {
    low[j] = simd_sum(low[j]);
    UNROLL_ALL
    for (int t = 0; t < 4; ++t) {
      four[t][j] = part == 0 ? low[j] : 0.0f;
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  words += 4 * (lane % 16);
  int row = 0;
  int place = 0;
  add_kind<2, Kinds, Queries, Bytes>(counts[0], words, part, scaled, row, place, four);
  add_kind<3, Kinds, Queries, Bytes>(counts[1], words, part, scaled, row, place, four);
  add_kind<4, Kinds, Queries, Bytes>(counts[2], words, part, scaled, row, place, four);
  add_kind<5, Kinds, Queries, Bytes>(counts[3], words, part, scaled, row, place, four);
  add_kind<6, Kinds, Queries, Bytes>(counts[4], words, part, scaled, row, place, four);
  add_kind<8, Kinds, Queries, Bytes>(counts[5], words, part, scaled, row, place, four);
  // The other half of the rows is with the lane 16 further on: each keeps two of four tokens.
  UNROLL_ALL
  for (int i = 0; i < 2; ++i) {
    UNROLL_ALL
    for (int j = 0; j < Queries; ++j) {
      const float mine = part ? four[2 + i][j] : four[i][j];
      const float other = part ? four[i][j] : four[2 + i][j];
      score[i][j] = mine + simd_shuffle_xor(other, 16);
    }
  }
}

// Keys of codes of a kv head.
template <typename S, int Kinds, int D, int Queries, bool Bytes>
struct CodedFar {
  enum { Ahead = 1 };  // blocks at once
  const device int* counts;  // [CODED_COUNTS], this head's
  const device uint* words;
  const device S* grid;
  int word_rows;  // to a block, of all kv heads
  // This lane's channels: where each goes, in the order of the words, whose rows are filled up to
  // pairs with zeros; and the factor on the query, one over the unit of the channel's field.
  int slot[(D + 31) / 32];
  float unit[(D + 31) / 32];
};

template <typename S, int Kinds, int D, int Queries, bool Bytes>
inline void begin_far(
    thread CodedFar<S, Kinds, D, Queries, Bytes>& far, threadgroup float4* scaled, int lane) {
  UNROLL_ALL
  for (int i = 0; i < (D + 31) / 32; ++i) {
    far.slot[i] = 32 * i + lane;
    far.unit[i] = 1.0f;
  }
  const int slots = place_channels<Kinds, (D + 31) / 32, Bytes>(
      far.counts, lane, far.slot, far.unit);
  const float none[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int i = lane; i < slots; i += 32) {
    put<Queries>(scaled, i, none);
  }
}

template <typename S, int Kinds, int D, int Queries, bool Bytes>
inline void begin_blocks(
    thread CodedFar<S, Kinds, D, Queries, Bytes>&, int, int, const threadgroup float4*, int) {}

template <typename S, int Kinds, int D, int Queries, bool Bytes>
inline void far_scores(
    thread CodedFar<S, Kinds, D, Queries, Bytes>& far,
    int block,
    int,
    int,
    const threadgroup float4* plain,
    threadgroup float4* scaled,
    int lane,
    thread float (&score)[2][Queries]) {
  const device uint* words = far.words + long(block) * far.word_rows * CODED_TOKENS;
  const device S* grid = far.grid + long(block) * 2 * D;
  coded_scores<S, Kinds, D, Queries, Bytes>(
      far.counts, words, grid, plain, far.slot, far.unit, scaled, lane, score);
}

// Scores of two tokens with exact keys, rows of D; tokens behind `last` get that one's.
template <typename S, int D, int Queries>
inline void exact_scores(
    const device S* keys,
    int first,
    int last,
    const threadgroup float4* plain,
    thread float (&score)[2][Queries]) {
  const device Run<S, 8>* a = (const device Run<S, 8>*)(keys + long(min(first, last)) * D);
  const device Run<S, 8>* b = (const device Run<S, 8>*)(keys + long(min(first + 1, last)) * D);
  for (int j = 0; j < Queries; ++j) {
    score[0][j] = 0.0f;
    score[1][j] = 0.0f;
  }
  UNROLL_NONE
  for (int c = 0; c < D / 8; ++c) {
    const Run<S, 8> x = a[c];
    const Run<S, 8> y = b[c];
    UNROLL_ALL
    for (int k = 0; k < 8; ++k) {
      float query[Queries];
      fetch<Queries>(plain, c * 8 + k, query);
      UNROLL_ALL
      for (int j = 0; j < Queries; ++j) {
        score[0][j] += query[j] * float(x.e[k]);
        score[1][j] += query[j] * float(y.e[k]);
      }
    }
  }
}
