// codes_decode: scores of a simdgroup's queries with 64 tokens, coded or exact. Lanes own tokens.

constant constexpr int CODED_TOKENS = 64;  // to a block, and to a step of the other kinds

// Room for the queries of a simdgroup in the order of the words: rows are filled up, and come in pairs.
template <int KeyWidths, int D>
constexpr int coded_slots() {
  return D + (KeyWidths & 256 ? 7 : 0) + (KeyWidths & 64 ? 9 : 0) + (KeyWidths & 16 ? 15 : 0) +
      (KeyWidths & 8 ? 19 : 0) + (KeyWidths & 4 ? 31 : 0);
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

// Adds to the scores of four tokens what the channels of one class give. words: of the class's first
// row, this lane's tokens. slot: where the class begins among the scaled queries.
template <int Width, int Queries, bool Bytes>
inline void class_scores(
    const device uint* words,
    int rows,
    int part,
    const threadgroup float4* scaled,
    int slot,
    thread float (&score)[4][Queries]) {
  constexpr int per_word = codes_per_word<Width>();
  constexpr int pairs = code_pairs<Width>();
  const int last = (rows - 1) * CODED_TOKENS;
  int at = min(part * CODED_TOKENS, last);
  Run<uint, 4> next = *(const device Run<uint, 4>*)(words + at);
  const int end = slot + (rows + 1) / 2 * (2 * per_word);
  slot += part * per_word;
  UNROLL_NONE
  for (; slot < end; slot += 2 * per_word) {
    const Run<uint, 4> own = next;
    at = min(at + 2 * CODED_TOKENS, last);
    next = *(const device Run<uint, 4>*)(words + at);
    UNROLL_ALL
    for (int p = 0; p < pairs; ++p) {
      float first[Queries];
      float second[Queries];
      fetch<Queries>(scaled, slot + p, first);
      if (has_high<Width>(p)) {
        fetch<Queries>(scaled, slot + p + pairs, second);
      }
      UNROLL_ALL
      for (int t = 0; t < 4; ++t) {
        const float2 field = code_pair<Width, Bytes>(own.e[t], p);
        UNROLL_ALL
        for (int j = 0; j < Queries; ++j) {
          score[t][j] += first[j] * field.x;
          if (has_high<Width>(p)) {
            score[t][j] += second[j] * field.y;
          }
        }
      }
    }
  }
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
