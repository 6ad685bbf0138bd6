// delta_decode: attention of 1 to 8 queries a row, straight from packed blocks and near keys.
//
// First launch, delta_decode: one threadgroup per split, kv head and row (grid x = threads, y =
// splits, z = rows * kv heads). The blocks of a row, far ones first and then near ones, are divided
// among the splits. All queries that share the kv head are in the threadgroup, `Queries` of them in
// each simdgroup, so that every byte is read once for all of them. Lane i has channels i, i + 32, ...
// of the queries, the held key and the output. Per block:
//
//   1. The mask comes to threadgroup memory, and simdgroup 0 sums up where each token's values begin.
//   2. Slice by slice of `Tile` tokens, the slice's payload words and values (V) come to threadgroup
//      memory, neighbouring threads reading neighbouring words.
//   3. Each simdgroup walks along the tokens with the held key in registers, replacing what the mask
//      says, and sums q.k over the lanes; lane t keeps the score of token t of the slice.
//   4. Online softmax over the slice, float throughout, then the values are added up.
//
// Near blocks go the same way, with full keys in place of payload words. A query sees a block either
// packed (more than `window_blocks` before its own) or near, never both; queries of one step may
// differ, in which case a block is read in both forms.
//
// Reads per token and kv head: D / 8 bytes of mask, the changed values, and the values of V; per
// block a grid of 4 * D bytes (codes) and an offset. Writes Dv + 2 floats per query and split.
//
// Second launch, delta_decode_reduce: one threadgroup per query, thread d adds up element d of the
// splits' outputs.

// What a row's threadgroups need to know, int [rows][8]: position of the first query, packed blocks,
// position of the first near key; the rest is not used.
constant constexpr int ROW_NUMBERS = 8;

// Sizes that are the same for all rows.
struct DecodeSizes {
  int kv_heads;
  int groups;  // query heads to a kv head
  int queries;  // a row, of one head
  int blocks;  // capacity in packed blocks
  int payload;  // capacity of a row's payload in words
  int room;  // capacity in near keys
  int values;  // capacity in values (V)
  int sinks;
  int window_blocks;
  int splits;
  int mask_rows;  // rows of the boolean mask, 1 or one per row
  int mask_columns;
};

// Where values (V) of one token come from: plain, or in MLX's quantized form (words, and a scale and
// bias to every `Group` values).
template <typename V, int Bits, int Group, int D>
inline float staged_value(
    const threadgroup V* values, const threadgroup V*, const threadgroup V*, int token, int d) {
  return float(values[token * D + d]);
}

template <typename V, int Bits, int Group, int D>
inline float staged_value(
    const threadgroup uint* words,
    const threadgroup V* scales,
    const threadgroup V* biases,
    int token,
    int d) {
  uint code = packed_field<Bits>(words[(token * D + d) / (32 / Bits)], uint(d));
  int group = (token * D + d) / Group;
  return float(code) * float(scales[group]) + float(biases[group]);
}

// What a slice needs, brought to threadgroup memory by all threads.
template <typename Element>
inline void stage(
    const device Element* from,
    threadgroup Element* to,
    int count,
    uint thread_index,
    uint threads) {
  for (int i = int(thread_index); i < count; i += int(threads)) {
    to[i] = from[i];
  }
}

template <
    typename T,  // queries and the output
    typename S,  // stored keys
    typename V,  // values, or their scales and biases
    typename Stored,  // V, or uint words of codes
    int Bits,  // of a packed value
    int ValueBits,  // 8, 4, or those of V
    int Group,  // values that share a scale
    int D,
    int Size,  // tokens to a block
    int Tile,  // tokens to a slice; divides Size
    int Queries,  // queries of a simdgroup
    bool HasSinks,
    bool HasMask>
inline void delta_decode(
    const device T* queries,
    const device int* rows,
    const device uint* masks,
    const device uint* payload,
    const device int* offsets,
    const device S* grid,
    const device S* sinks,
    const device S* near,
    const device Stored* values,
    const device V* scales,
    const device V* biases,
    const device bool* mask,
    float scale,
    DecodeSizes sizes,
    device float* partial,
    device float* sums,
    threadgroup uint* mask_words,  // [(Size - 1) * W]
    threadgroup uint* starts,  // [Size + 1]
    threadgroup uint* key_words,  // [Tile * D / 2 + 1]
    threadgroup Stored* staged_values,  // [Tile] tokens
    threadgroup V* value_scales,  // [Tile * D / Group], quantized only
    threadgroup V* value_biases,
    uint thread_index,
    uint threads,
    uint lane,
    uint simdgroup,
    uint split,
    uint head) {
  constexpr int W = (D + 31) / 32;
  constexpr uint per_word = 32 / Bits;
  constexpr int token_size = ValueBits < 16 ? D * ValueBits / 32 : D;  // in elements of `Stored`
  const int row = int(head) / sizes.kv_heads;
  const int kv_head = int(head) % sizes.kv_heads;
  const int start = rows[row * ROW_NUMBERS];
  const int packed_blocks = rows[row * ROW_NUMBERS + 1];
  const int near_first = rows[row * ROW_NUMBERS + 2];
  const int all_queries = sizes.groups * sizes.queries;

  masks += long(head) * sizes.blocks * (Size - 1) * W;
  payload += long(row) * sizes.payload;
  offsets += long(head) * sizes.blocks;
  grid += long(head) * sizes.blocks * 2 * D;
  sinks += long(head) * sizes.sinks * D;
  near += long(head) * sizes.room * D;
  values += long(head) * sizes.values * token_size;
  scales += long(head) * sizes.values * (D / Group);
  biases += long(head) * sizes.values * (D / Group);

  // This simdgroup's queries. Query q of the kv head is step q % queries of head q / queries. A
  // position before the text is padding: it sees key 0, for want of any.
  float query[Queries][W];
  float output[Queries][W];
  float highest[Queries];
  float weights[Queries];
  int position[Queries];
  int far[Queries];  // blocks that the query sees packed
  int place[Queries];  // its row in queries, partial and sums; -1 if there is no such query
  int step[Queries];
  for (int j = 0; j < Queries; ++j) {
    int q = int(simdgroup) * Queries + j;
    bool exists = q < all_queries;
    step[j] = exists ? q % sizes.queries : 0;
    position[j] = max(start + step[j], 0);
    far[j] = max(position[j] / Size - sizes.window_blocks, 0);
    place[j] = exists ? int(head) * all_queries + q : -1;
    highest[j] = -INFINITY;
    weights[j] = 0.0f;
    for (int i = 0; i < W; ++i) {
      int d = 32 * i + int(lane);
      query[j][i] = exists && d < D ? scale * float(queries[long(place[j]) * D + d]) : 0.0f;
      output[j][i] = 0.0f;
    }
  }

  const int first_position = max(start, 0);
  const int last_position = max(start + sizes.queries - 1, 0);
  const int near_block = max(first_position / Size - sizes.window_blocks, 0);
  const int units = packed_blocks + last_position / Size - near_block + 1;
  const int per_split = (units + sizes.splits - 1) / sizes.splits;

  for (int unit = int(split) * per_split; unit < (int(split) + 1) * per_split; ++unit) {
    const bool is_packed = unit < packed_blocks;
    const int block = is_packed ? unit : near_block + unit - packed_blocks;
    // Of the query's own block not all tokens are there yet; of one behind it none.
    const int block_tokens = is_packed ? Size : min(Size, last_position + 1 - block * Size);
    float held[W];
    float low[W];
    float spacing[W];
    const device uint* words = payload;
    if (is_packed) {
      words += offsets[block];
      stage(masks + long(block) * (Size - 1) * W, mask_words, (Size - 1) * W, thread_index, threads);
      for (int i = 0; i < W; ++i) {
        int d = 32 * i + int(lane);
        bool has_grid = Bits < 16 && d < D;
        low[i] = has_grid ? float(grid[block * 2 * D + d]) : 0.0f;
        spacing[i] = has_grid ? float(grid[block * 2 * D + D + d]) : 0.0f;
        held[i] = 0.0f;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (simdgroup == 0) {
        uint total = 0;
        for (int t = int(lane); t < (Size + 31) / 32 * 32; t += 32) {
          uint bits = t == 0 ? uint(D) : 0u;
          if (t > 0 && t < Size) {
            for (int w = 0; w < W; ++w) {
              bits += popcount(mask_words[(t - 1) * W + w]);
            }
          }
          uint before = total + simd_prefix_exclusive_sum(bits);
          if (t < Size) {
            starts[t] = before;
          }
          total += simd_sum(bits);
        }
        if (lane == 0) {
          starts[Size] = total;
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    for (int first = 0; first < block_tokens; first += Tile) {
      const int token = block * Size + first;
      const int tokens = min(Tile, block_tokens - first);
      uint first_word = 0;
      if (is_packed) {
        first_word = starts[first] / per_word;
        uint end_word = (starts[first + Tile] + per_word - 1) / per_word;
        stage(words + first_word, key_words, int(end_word - first_word), thread_index, threads);
      } else {
        const device S* from = near + long(token - near_first) * D;
        stage(from, (threadgroup S*)key_words, tokens * D, thread_index, threads);
      }
      const device Stored* own_values = values + long(token) * token_size;
      stage(own_values, staged_values, tokens * token_size, thread_index, threads);
      if (ValueBits < 16) {
        const int groups = D / Group;
        const long at = long(token) * groups;
        stage(scales + at, value_scales, tokens * groups, thread_index, threads);
        stage(biases + at, value_biases, tokens * groups, thread_index, threads);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);

      float score[Queries];  // of token `lane` of the slice
      for (int j = 0; j < Queries; ++j) {
        score[j] = -INFINITY;
      }
      for (int t = 0; t < tokens; ++t) {
        float key[W];
        uint before = is_packed ? starts[first + t] : 0u;
        for (int i = 0; i < W; ++i) {
          int d = 32 * i + int(lane);
          if (!is_packed) {
            key[i] = d < D ? float(((threadgroup S*)key_words)[t * D + d]) : 0.0f;
            continue;
          }
          bool is_keyframe = first + t == 0;
          uint word = is_keyframe ? 0u : mask_words[(first + t - 1) * W + i];
          if (is_keyframe) {
            word = D - 32 * i >= 32 ? 0xffffffffu : lanes_before(uint(D - 32 * i));
          }
          if ((word >> lane) & 1u) {
            uint index = before + popcount(word & lanes_before(lane));
            uint field = packed_field<Bits>(key_words[index / per_word - first_word], index);
            held[i] = packed_value<S, Bits>(field, low[i], spacing[i]);
          }
          before += popcount(word);
          key[i] = held[i];
          if (HasSinks && token + t < sizes.sinks && d < D) {
            key[i] = float(sinks[(token + t) * D + d]);
          }
        }
        for (int j = 0; j < Queries; ++j) {
          float product = 0.0f;
          for (int i = 0; i < W; ++i) {
            product += query[j][i] * key[i];
          }
          product = simd_sum(product);
          score[j] = int(lane) == t ? product : score[j];
        }
      }

      for (int j = 0; j < Queries; ++j) {
        const int own = token + int(lane);
        bool seen = own <= position[j] && (block < far[j]) == is_packed;
        if (HasMask && seen) {
          int mask_row = (row % sizes.mask_rows) * sizes.queries + step[j];
          seen = mask[long(mask_row) * sizes.mask_columns + own];
        }
        float own_score = seen ? score[j] : -INFINITY;
        float new_highest = max(highest[j], simd_max(own_score));
        // Nothing seen yet leaves -inf, whose differences are NaN.
        float rescale = highest[j] == new_highest ? 1.0f : exp(highest[j] - new_highest);
        float weight = own_score == -INFINITY ? 0.0f : exp(own_score - new_highest);
        weights[j] = weights[j] * rescale + simd_sum(weight);
        highest[j] = new_highest;
        score[j] = weight;
        for (int i = 0; i < W; ++i) {
          output[j][i] *= rescale;
        }
      }
      for (int t = 0; t < tokens; ++t) {
        float value[W];
        for (int i = 0; i < W; ++i) {
          int d = 32 * i + int(lane);
          value[i] = d < D ? staged_value<V, ValueBits, Group, D>(
                                 staged_values, value_scales, value_biases, t, d)
                           : 0.0f;
        }
        for (int j = 0; j < Queries; ++j) {
          float weight = simd_shuffle(score[j], ushort(t));
          for (int i = 0; i < W; ++i) {
            output[j][i] += weight * value[i];
          }
        }
      }
      // Before the next slice, or the next block's mask, takes this one's place.
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }

  for (int j = 0; j < Queries; ++j) {
    if (place[j] < 0) {
      continue;
    }
    long to = long(place[j]) * sizes.splits + split;
    for (int i = 0; i < W; ++i) {
      int d = 32 * i + int(lane);
      if (d < D) {
        partial[to * D + d] = output[j][i];
      }
    }
    if (lane == 0) {
      sums[to * 2] = highest[j];
      sums[to * 2 + 1] = weights[j];
    }
  }
}

// partial [splits][D] and sums [splits][2]: this query's. out [D]: its output.
template <typename T, int D>
inline void delta_decode_reduce(
    const device float* partial, const device float* sums, device T* out, int splits, uint d) {
  if (int(d) >= D) {
    return;
  }
  float highest = -INFINITY;
  for (int s = 0; s < splits; ++s) {
    highest = max(highest, sums[s * 2]);
  }
  float weights = 0.0f;
  float output = 0.0f;
  for (int s = 0; s < splits; ++s) {
    // A split that saw nothing has the highest score -inf and weight 0.
    float rescale = sums[s * 2] == highest ? 1.0f : exp(sums[s * 2] - highest);
    weights += sums[s * 2 + 1] * rescale;
    output += partial[s * D + int(d)] * rescale;
  }
  out[d] = T(output / weights);
}
