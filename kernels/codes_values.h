// codes_decode: softmax over 64 tokens, and their values added up. Lanes own eight channels.

constant constexpr float CODED_SLACK = 16.0f;
constant constexpr float CODED_LOWEST = -1e30f;  // differences of it are no NaN
constant constexpr int CODED_AHEAD = 8;  // tokens whose values are loaded at once

template <int D>
constexpr int coded_own() {
  return D / 8;  // lanes that share a token's value
}
template <int D>
constexpr int coded_step() {  // tokens whose values are read at once
  return D <= 16 ? 16 : D <= 32 ? 8 : D <= 64 ? 4 : D <= 128 ? 2 : 1;
}

template <int Queries, int Groups>
struct CodedState {
  float output[Queries][8];  // of this lane's channels; of values of codes in fields
  float highest[Queries];
  float sum[Queries];
  float scaled[Groups][Queries];  // weights * scales of this lane's tokens
};

template <int Queries, int Groups>
inline void clear(thread CodedState<Queries, Groups>& state) {
  UNROLL_ALL
  for (int j = 0; j < Queries; ++j) {
    state.highest[j] = CODED_LOWEST;
    state.sum[j] = 0.0f;
    UNROLL_ALL
    for (int k = 0; k < 8; ++k) {
      state.output[j][k] = 0.0f;
    }
    UNROLL_ALL
    for (int g = 0; g < Groups; ++g) {
      state.scaled[g][j] = 0.0f;
    }
  }
}

template <int Queries, int Groups>
inline void raise(
    thread CodedState<Queries, Groups>& state, const thread float (&score)[2][Queries]) {
  UNROLL_ALL
  for (int j = 0; j < Queries; ++j) {
    const float top = simd_max(max(state.highest[j], max(score[0][j], score[1][j])));
    const float shrink = fast::exp2(state.highest[j] - top);
    state.highest[j] = top;
    state.sum[j] *= shrink;
    UNROLL_ALL
    for (int g = 0; g < Groups; ++g) {
      state.scaled[g][j] *= shrink;
    }
    UNROLL_ALL
    for (int k = 0; k < 8; ++k) {
      state.output[j][k] *= shrink;
    }
  }
}

// Leaves the weights of two tokens a lane, first and first + 1, in threadgroup memory, [64]; of
// values of codes times their scales, [Groups][64]. scales: of the first of these two tokens, a
// token's `apart` from the next one's.
template <int Queries, int Groups, bool Coded>
inline void weigh(
    thread CodedState<Queries, Groups>& state,
    const thread float (&score)[2][Queries],
    int first,
    bool coded,
    const device uchar* scales,
    int apart,
    threadgroup float4* weights) {
  Run<uchar, Groups> scale[2];
  if (Coded && coded) {
    UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      scale[i] = *(const device Run<uchar, Groups>*)(scales + i * apart);
    }
  }
  bool above = false;
  UNROLL_ALL
  for (int j = 0; j < Queries; ++j) {
    above = above || max(score[0][j], score[1][j]) > state.highest[j] + CODED_SLACK;
  }
  if (simd_any(above)) {
    raise(state, score);
  }
  UNROLL_ALL
  for (int i = 0; i < 2; ++i) {
    float weight[Queries];
    UNROLL_ALL
    for (int j = 0; j < Queries; ++j) {
      weight[j] = fast::exp2(score[i][j] - state.highest[j]);
      state.sum[j] += weight[j];
    }
    if (!(Coded && coded)) {
      put<Queries>(weights, first + i, weight);
      continue;
    }
    UNROLL_ALL
    for (int g = 0; g < Groups; ++g) {
      const float own = whole_step(scale[i].e[g]);
      float product[Queries];
      UNROLL_ALL
      for (int j = 0; j < Queries; ++j) {
        product[j] = weight[j] * own;
        state.scaled[g][j] += product[j];
      }
      put<Queries>(weights, g * CODED_TOKENS + first + i, product);
    }
  }
}

// Adds up the values of a block's tokens, codes of one width. row: the words of the first token
// that this lane looks at; apart: from one token's words to the next one's. weights: this lane's
// group's.
template <int Width, int Queries, int Groups, int Step, bool Bytes>
inline void add_coded(
    thread CodedState<Queries, Groups>& state,
    const device uint* row,
    int apart,
    const threadgroup float4* weights,
    int own,
    int sub) {
  constexpr int pieces = value_pieces<Width>();
  constexpr int codes = 8 / pieces;
  constexpr int rounds = CODED_TOKENS / Step;
  constexpr int ahead = rounds < CODED_AHEAD ? rounds : CODED_AHEAD;
  const int stride = Step * apart;
  UNROLL_NONE
  for (int i = 0; i < rounds; i += ahead) {
    Pieces now[ahead];
    UNROLL_ALL
    for (int u = 0; u < ahead; ++u) {
      now[u] = load_codes<Width>(row + u * stride, own);
    }
    row += ahead * stride;
    UNROLL_ALL
    for (int u = 0; u < ahead; ++u) {
      float weight[Queries];
      fetch<Queries>(weights, (i + u) * Step + sub, weight);
      const Pieces aligned = align_codes<Width>(now[u], own);
      UNROLL_ALL
      for (int piece = 0; piece < pieces; ++piece) {
        UNROLL_ALL
        for (int p = 0; p < code_pairs<Width>() && p < codes; ++p) {
          const int second = second_of_pair<Width>(p);
          const float2 field = code_pair<Width, Bytes>(aligned.word[piece], p);
          if (Width == 2 && p >= 4) {
            continue;
          }
          UNROLL_ALL
          for (int j = 0; j < Queries; ++j) {
            state.output[j][piece * codes + p] += weight[j] * field.x;
            if (second < codes) {
              state.output[j][piece * codes + (second < codes ? second : 0)] +=
                  weight[j] * field.y;
            }
          }
        }
      }
    }
  }
}

// The same if values of this kv head have this width.
template <int Width, int ValueWidths, int Queries, int Groups, int Step, bool Bytes>
inline void add_if_coded(
    int width,
    thread CodedState<Queries, Groups>& state,
    const device uint* row,
    int apart,
    const threadgroup float4* weights,
    int own,
    int sub) {
  if (ValueWidths >> Width & 1) {
    if (width == Width) {
      add_coded<Width, Queries, Groups, Step, Bytes>(state, row, apart, weights, own, sub);
    }
  }
}

// The same with values of 16 bits, rows of D; there are `tokens` of them. values: this lane's eight
// channels of the first one.
template <typename V, int D, int Queries, int Groups>
inline void add_exact(
    thread CodedState<Queries, Groups>& state,
    const device V* values,
    int tokens,
    const threadgroup float4* weights,
    int sub) {
  UNROLL_NONE
  for (int t = sub; t < tokens; t += coded_step<D>()) {
    const Run<V, 8> value = *(const device Run<V, 8>*)(values + long(t) * D);
    float weight[Queries];
    fetch<Queries>(weights, t, weight);
    UNROLL_ALL
    for (int j = 0; j < Queries; ++j) {
      UNROLL_ALL
      for (int k = 0; k < 8; ++k) {
        state.output[j][k] += weight[j] * float(value.e[k]);
      }
    }
  }
}

// Sums everything up over the lanes; outputs over those with the same channels, and left in the
// first of them. fields: of this lane's group, what weights times scales add up to.
template <int D, int Queries, int Groups>
inline void gather(
    thread CodedState<Queries, Groups>& state,
    int group,
    int lane,
    thread float (&fields)[Queries]) {
  UNROLL_ALL
  for (int j = 0; j < Queries; ++j) {
    state.sum[j] = simd_sum(state.sum[j]);
    fields[j] = 0.0f;
    UNROLL_ALL
    for (int g = 0; g < Groups; ++g) {
      const float group_scaled = simd_sum(state.scaled[g][j]);
      fields[j] = group == g ? group_scaled : fields[j];
    }
    UNROLL_ALL
    for (int k = 0; k < 8; ++k) {
      UNROLL_ALL
      for (int half_way = coded_step<D>() / 2; half_way > 0; half_way /= 2) {
        const ushort other = ushort((lane + half_way * coded_own<D>()) & 31);
        state.output[j][k] += simd_shuffle(state.output[j][k], other);
      }
    }
  }
}

// What this lane's channels of a value are, from what was added up in fields: their unit, and their
// zero, which lies in the middle of the codes.
template <int Width, int ValueWidths, int Queries, int Groups, bool Bytes>
inline void from_fields(
    int width, thread CodedState<Queries, Groups>& state, const thread float (&fields)[Queries]) {
  if (ValueWidths >> Width & 1) {
    if (width == Width) {
      UNROLL_ALL
      for (int j = 0; j < Queries; ++j) {
        UNROLL_ALL
        for (int k = 0; k < 8; ++k) {
          const int unit = value_unit<Width, Bytes>(k);
          const float zero = CODE_ZERO + 0.5f * float((1 << Width) - 1) * power_of_two(unit);
          state.output[j][k] = (state.output[j][k] - zero * fields[j]) * power_of_two(-unit);
        }
      }
    }
  }
}
