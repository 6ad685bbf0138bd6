// codes_decode: attention of a few queries straight from coded keys and turned values. Far keys may
// be of another form, which brings scores of its own: held ones are deltas_scores.h's, and the
// kernel with them is called deltas_decode.
//
// Grid: x = simdgroups of a threadgroup, y = rows * kv heads * parts of their queries, z = splits.
// A simdgroup has up to four queries that share a kv head and works by itself: simdgroups of one
// threadgroup read the same memory at about the same time, no more. Each split has tokens of one
// kind, 64 at once:
//
//   far    blocks of codes, divided among the first splits
//   sinks  exact keys and values of the first tokens (one split)
//   near   exact keys and values of 16 bits, block by block (the last splits)
//
// Lanes own tokens while scores are computed, so that nothing is summed up over lanes but once a
// block: lane l has tokens 4 * (l % 16) to + 3 and every other row of words, a load of 16 bytes for
// 128 multiply-adds and more. The grid goes into the query, q.(low + code * step) = q.low +
// (q * step).code: once a block each lane does it for D / 32 channels and leaves the result in
// threadgroup memory, in the order of the words, from where it reaches all lanes at once.
//
// Softmax: two tokens a lane, in powers of two. What was added up is rescaled only when a score is
// more than 16 above the highest so far, so after the first blocks hardly ever; sums stay in their
// lanes until the end. Then lanes own eight channels of every 32 / (D / 8)-th token: the weights
// come from threadgroup memory, multiplied by the scales of the values already, bytes of which the
// lanes that have the tokens make numbers.
//
// Loads of an iteration come before its arithmetic. Writes Dv + 2 floats per query and split.
//
// Second launch, codes_combine: one threadgroup per query, thread d adds up element d of the
// splits' outputs. Values of codes are turned, so that what came of them is turned back here, and
// added to what came of near ones.

constant constexpr int CODED_ROW_NUMBERS = 8;

// Sizes that are the same for all rows.
struct CodedSizes {
  int kv_heads;
  int groups;  // query heads to a kv head
  int queries;  // a row, of one head
  int room;  // capacity in near keys
  int value_room;  // and in near values
  int tokens;  // and in values of codes
  int value_words;  // a token's, of all kv heads
  int sinks;
  int window_blocks;
  int far_splits;
  int splits;
  int mask_rows;  // rows of the boolean mask, 1 or one per row
  int mask_columns;
};

// Where tokens are from.
enum CodedKind { CODED_FAR, CODED_SINKS, CODED_NEAR };

// Gives two tokens of a step, from `place` on, the score -inf for each query that does not see them
// as what they are here.
template <int Queries, bool HasSinks, bool HasMask>
inline void hide(
    thread float (&score)[2][Queries],
    int kind,
    int place,
    int start,
    int row,
    int first_query,
    int all_queries,
    const device bool* mask,
    CodedSizes sizes) {
  UNROLL_ALL
  for (int j = 0; j < Queries; ++j) {
    const int step = min(first_query + j, all_queries - 1) % sizes.queries;
    const int position = max(start + step, 0);
    const int far = max(position / CODED_TOKENS - sizes.window_blocks, 0);
    UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      const int block = (place + i) / CODED_TOKENS;
      const bool is_sink = HasSinks && place + i < sizes.sinks;
      bool seen = kind == CODED_NEAR ? place + i <= position && block >= far
                                     : is_sink == (kind == CODED_SINKS) && block < far;
      if (HasMask && seen) {
        const int mask_row = (row % sizes.mask_rows) * sizes.queries + step;
        seen = mask[long(mask_row) * sizes.mask_columns + place + i];
      }
      score[i][j] = seen ? score[i][j] : -INFINITY;
    }
  }
}

template <
    typename T,  // queries
    typename S,  // stored keys and grids
    typename V,  // values of 16 bits
    typename Far,  // keys of far blocks: CodedFar, or DeltaFar
    int ValueWidths,  // which widths values have, a bit each: 1 << width; 0: all have 16 bits
    int Group,  // values that share a scale; D without codes
    int D,
    int Queries,  // of a simdgroup, 1 to 4
    bool Bytes,  // how codes of 4 bits become floats, see codes.h
    bool HasSinks,
    bool HasMask>
inline void codes_decode(
    const device T* queries,
    const device T* far_queries,  // turned as the coded keys are, or the same
    const device int* rows,
    const device int* order,
    thread Far& far_keys,  // this kv head's
    const device S* sinks,
    const device S* near,
    const device V* near_values,
    const device V* sink_values,  // exact ones, where values are codes
    const device uint* value_words,
    const device uchar* scales,
    const device int* heads,  // [kv heads][2]: bits of a value, its first word
    const device bool* mask,
    float scale,
    CodedSizes sizes,
    device float* partial,
    device float* sums,
    threadgroup float4* scaled,  // [coded_slots<Kinds, D>()] queries, times steps of the grid
    threadgroup float4* plain,  // [D] and as they are, in the order
    threadgroup float4* weights,  // [D / Group * CODED_TOKENS]
    int lane,
    int simdgroup,  // of all that share the kv head
    int split,
    int head) {
  constexpr int Chunks = (D + 31) / 32;
  constexpr int Ahead = Far::Ahead;
  constexpr int Groups = D / Group;
  constexpr int Own = coded_own<D>();
  constexpr int Step = coded_step<D>();
  constexpr bool Coded = ValueWidths != 0;
  const int row = head / sizes.kv_heads;
  const int kv_head = head % sizes.kv_heads;
  const int all_queries = sizes.groups * sizes.queries;
  const int first_query = simdgroup * Queries;
  const int start = rows[row * CODED_ROW_NUMBERS];
  const int stored_blocks = rows[row * CODED_ROW_NUMBERS + 1];
  const int near_first = rows[row * CODED_ROW_NUMBERS + 2];
  const int value_first = rows[row * CODED_ROW_NUMBERS + 3];
  const int window = sizes.window_blocks;

  // A position before the text is padding: it sees key 0, for want of any.
  const int first_position = max(start, 0);
  const int last_position = max(start + sizes.queries - 1, 0);
  const int least_far = max(first_position / CODED_TOKENS - window, 0);
  const int far_blocks = min(stored_blocks, max(last_position / CODED_TOKENS - window, 0));

  // This split's tokens: of which kind, and which steps of CODED_TOKENS.
  const int near_split = sizes.far_splits + (HasSinks ? 1 : 0);
  int kind = CODED_NEAR;
  int begin = least_far;
  int end = last_position / CODED_TOKENS + 1;
  int shares = sizes.splits - near_split;
  int share = split - near_split;
  if (split < sizes.far_splits) {
    kind = CODED_FAR;
    begin = 0;
    end = far_blocks;
    shares = sizes.far_splits;
    share = split;
  } else if (HasSinks && split < near_split) {
    kind = CODED_SINKS;
    begin = 0;
    end = min((sizes.sinks + CODED_TOKENS - 1) / CODED_TOKENS, far_blocks);
    shares = 1;
    share = 0;
  }
  const int each = (end - begin + shares - 1) / shares;
  begin += share * each;
  end = min(begin + each, end);
  const bool is_far = kind == CODED_FAR;
  const bool coded_values = Coded && is_far;

  // The queries: for far keys in their order, else as they come.
  if (is_far) {
    begin_far(far_keys, scaled, lane);
  }
  UNROLL_ALL
  for (int i = 0; i < Chunks; ++i) {
    const int d = 32 * i + lane;
    if (d < D) {
      const int channel = is_far ? order[kv_head * D + d] : d;
      float own[Queries];
      UNROLL_ALL
      for (int j = 0; j < Queries; ++j) {
        const int q = min(first_query + j, all_queries - 1);
        const device T* from = (is_far ? far_queries : queries) + long(head * all_queries + q) * D;
        own[j] = scale * M_LOG2E_F * float(from[channel]);
      }
      put<Queries>(is_far ? plain : scaled, d, own);
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);

  const device S* exact_keys = kind == CODED_SINKS
      ? sinks + long(head) * sizes.sinks * D
      : near + (long(head) * sizes.room - near_first) * D;
  const device V* far_values = near_values + long(head) * sizes.value_room * D;  // if not coded
  near_values = far_values - long(value_first) * D;
  sink_values += long(head) * sizes.sinks * D;
  const int own = lane % Own;
  const int sub = min(lane / Own, Step - 1);
  const int first = 4 * (lane % 16) + 2 * (lane / 16);  // of this lane's two tokens of a step
  const int width = Coded ? heads[2 * kv_head] : 16;
  if (Coded) {
    const long token = long(row) * sizes.tokens;
    value_words += token * sizes.value_words + heads[2 * kv_head + 1];
    scales += ((token + first) * sizes.kv_heads + kv_head) * Groups;
  }
  const int apart = sizes.kv_heads * Groups;  // of scales

  CodedState<Queries, Groups> state;
  clear(state);
  UNROLL_NONE
  for (int base = begin; base < end; base += Ahead) {
    if (is_far) {
      begin_blocks(far_keys, base, min(Ahead, end - base), plain, lane);
    }
    UNROLL_NONE
    for (int ahead = 0; ahead < Ahead; ++ahead) {
      const int block = base + ahead;
      if (Ahead > 1 && block >= end) {
        break;
      }
      const int token = block * CODED_TOKENS;
      float score[2][Queries];
      if (is_far) {
        far_scores(far_keys, block, ahead, first, plain, scaled, lane, score);
      } else {
        const int last = kind == CODED_SINKS ? sizes.sinks - 1 : last_position;
        exact_scores<S, D, Queries>(exact_keys, token + first, last, scaled, score);
      }

      // Far blocks lie before all queries but those that see them near.
      if (HasMask || !is_far || block >= least_far || (HasSinks && token < sizes.sinks)) {
        hide<Queries, HasSinks, HasMask>(
            score, kind, token + first, start, row, first_query, all_queries, mask, sizes);
      }

      const long at = long(token) * apart;
      weigh<Queries, Groups, Coded>(
          state, score, first, coded_values, scales + at, apart, weights);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      if (coded_values) {
        const device uint* from = value_words + long(token + sub) * sizes.value_words;
        threadgroup float4* mine = weights;
        const int group = own * 8 / Group * CODED_TOKENS;
        if (Queries >= 3) {
          mine += group;
        } else {
          mine = (threadgroup float4*)((threadgroup float*)weights + group * Queries);
        }
        add_if_coded<8, ValueWidths, Queries, Groups, Step, Bytes>(
            width, state, from, sizes.value_words, mine, own, sub);
        add_if_coded<6, ValueWidths, Queries, Groups, Step, Bytes>(
            width, state, from, sizes.value_words, mine, own, sub);
        add_if_coded<5, ValueWidths, Queries, Groups, Step, Bytes>(
            width, state, from, sizes.value_words, mine, own, sub);
        add_if_coded<4, ValueWidths, Queries, Groups, Step, Bytes>(
            width, state, from, sizes.value_words, mine, own, sub);
        add_if_coded<3, ValueWidths, Queries, Groups, Step, Bytes>(
            width, state, from, sizes.value_words, mine, own, sub);
        add_if_coded<2, ValueWidths, Queries, Groups, Step, Bytes>(
            width, state, from, sizes.value_words, mine, own, sub);
      } else {
        const bool beside = Coded && kind == CODED_SINKS;
        const int last = beside ? sizes.sinks - 1 : last_position;
        const int tokens = min(CODED_TOKENS, last + 1 - token);
        const device V* all = beside ? sink_values : kind == CODED_NEAR ? near_values : far_values;
        const device V* from = all + long(token) * D + own * 8;
        add_exact<V, D, Queries, Groups>(state, from, tokens, weights, sub);
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  }

  float fields[Queries];
  gather<D, Queries, Groups>(state, own * 8 / Group, lane, fields);
  if (coded_values) {
    from_fields<8, ValueWidths, Queries, Groups, Bytes>(width, state, fields);
    from_fields<6, ValueWidths, Queries, Groups, Bytes>(width, state, fields);
    from_fields<5, ValueWidths, Queries, Groups, Bytes>(width, state, fields);
    from_fields<4, ValueWidths, Queries, Groups, Bytes>(width, state, fields);
    from_fields<3, ValueWidths, Queries, Groups, Bytes>(width, state, fields);
    from_fields<2, ValueWidths, Queries, Groups, Bytes>(width, state, fields);
  }
  UNROLL_ALL
  for (int j = 0; j < Queries; ++j) {
    const int q = first_query + j;
    if (q >= all_queries) {
      continue;
    }
    const long to = long(head * all_queries + q) * sizes.splits + split;
    if (lane < Own) {
      UNROLL_ALL
      for (int k = 0; k < 8; ++k) {
        partial[to * D + lane * 8 + k] = state.output[j][k];
      }
    }
    if (lane == 0) {
      sums[to * 2] = state.highest[j];
      sums[to * 2 + 1] = state.sum[j];
    }
  }
}
