// tile_attention: a prompt's attention, of each block of queries over the tiles of a list.
//
// Grid: x = parts of a block's rows, y = blocks of queries (the last one first, since its list is
// the longest), z = rows * kv heads. The rows of a block are its queries of all heads that share
// the kv head, and so its list: row r is query r % Size of head r / Size. A threadgroup has 8 *
// Rows * Simdgroups of them, a simdgroup 8 * Rows.
//
// Keys come in strips of `Keys`: first the block's own tile, of which each query sees the part up to
// itself, then the near ones, then those of the list. Every strip goes through threadgroup memory,
// in rows as it lies in device memory, a little apart (16 bytes), so that the eight rows of a matrix
// lie in different banks. Per strip:
//
//   1. Values are fetched to registers, while scores = keys * queries, 8x8 matrices, are computed
//      from threadgroup memory; then they are put there.
//   2. Online softmax in powers of two: the factor on scores and log2(e) are one number, which comes
//      in with the subtraction. A row's reference is raised, and its output rescaled, only where a
//      score is more than 2^8 times above it: after the first strips hardly ever. Sums stay in
//      their lanes until the end.
//   3. The next strip's keys are fetched, while output += weights * values; then they are put.
//
// Two barriers a strip. No lane waits for device memory before it has computed with what is there.
// Sums and outputs are float; weights are rounded to the inputs' type, as those of a product are.
//
// Reads D + Dv elements a key for each part of a block; per simdgroup and strip
// Rows * Keys * (D + Dv) / 64 products of matrices, for Keys * (D + Dv) / 64 loads of one.

// What is the same for all threadgroups.
struct TileSizes {
  int groups;  // query heads to a kv head
  int queries;  // of a head
  int start;  // position of the first query
  int window_blocks;
  int listed_from;  // the first block that has a list
  int lists;  // how many blocks have one; others look at all tiles
  int list_room;
};

// Four neighbours, wherever they lie: a vector would want more alignment than a slice has.
template <typename T>
struct Quad {
  T e[4];
};

constant constexpr int QUAD = 4;

// How far apart rows of D elements lie in threadgroup memory.
template <typename T, int D>
constexpr int strip_row() {
  return D + 16 / int(sizeof(T));
}

template <int Keys, int D, int Threads>
constexpr int strip_quads() {
  return (Keys * D / QUAD + Threads - 1) / Threads;
}

// Brings this thread's part of a strip [Keys][D] to its registers; of keys past the first `left`
// zeros, since nothing may be known of what lies there.
template <typename T, int Keys, int D, int Threads>
inline void strip_fetch(
    const device T* from, int left, thread vec<T, 4>* quads, int thread_index) {
  const int end = min(left, Keys) * (D / QUAD);
  TILES_UNROLL
  for (int i = 0; i < strip_quads<Keys, D, Threads>(); ++i) {
    const int quad = i * Threads + thread_index;
    vec<T, 4> four = vec<T, 4>(T(0));
    if (quad < end) {
      const Quad<T> read = ((const device Quad<T>*)from)[quad];
      four = vec<T, 4>(read.e[0], read.e[1], read.e[2], read.e[3]);
    }
    quads[i] = four;
  }
}

template <typename T, int Keys, int D, int Threads>
inline void strip_put(
    const thread vec<T, 4>* quads, threadgroup vec<T, 4>* strip, int thread_index) {
  constexpr int row = D / QUAD;
  TILES_UNROLL
  for (int i = 0; i < strip_quads<Keys, D, Threads>(); ++i) {
    const int quad = i * Threads + thread_index;
    if (quad < Keys * row) {
      strip[quad / row * (strip_row<T, D>() / QUAD) + quad % row] = quads[i];
    }
  }
}

// The transpose of a matrix of weights, [keys][queries] to [queries][keys], in the inputs' type:
// two of 16 bits go as one word.
template <typename T>
inline vec<T, 2> to_weights(float2 x, ushort lane) {
  const ushort row = matrix_row(lane);
  const ushort first = lane_of(matrix_column(lane), row);
  const ushort second = lane_of(matrix_column(lane) + 1, row);
  const uint pair = as_type<uint>(vec<T, 2>(T(x.x), T(x.y)));
  const uint a = simd_shuffle(pair, first);
  const uint b = simd_shuffle(pair, second);
  return as_type<vec<T, 2>>(
      row & 1 ? (a >> 16) | (b & 0xffff0000u) : (a & 0xffffu) | (b << 16));
}

template <>
inline vec<float, 2> to_weights<float>(float2 x, ushort lane) {
  const ushort row = matrix_row(lane);
  const float2 a = simd_shuffle(x, lane_of(matrix_column(lane), row));
  const float2 b = simd_shuffle(x, lane_of(matrix_column(lane) + 1, row));
  return row & 1 ? float2(a.y, b.y) : float2(a.x, b.x);
}

// Raises the references `top` of a matrix row of queries to `most`, where that is so much higher
// that weights might get too large, and rescales what was added up under the old ones.
template <int Dv>
inline void rescale(
    float2 most,
    thread float2& top,
    thread float2& sum,
    thread simdgroup_matrix<float, 8, 8>* output,
    ushort lane) {
  constexpr float room = 8.0f;  // a weight is at most 2^8, which is exact in half too
  if (!simd_any(most.x > top.x + room || most.y > top.y + room)) {
    return;
  }
  const float2 higher = max(top, most);
  const float2 shrink = float2(fast::exp2(top.x - higher.x), fast::exp2(top.y - higher.y));
  top = higher;
  sum *= shrink;
  const float own = column_to_row(shrink, lane);
  TILES_UNROLL
  for (int v = 0; v < Dv / 8; ++v) {
    output[v].thread_elements()[0] *= own;
    output[v].thread_elements()[1] *= own;
  }
}

// keys and values of the near and far tiles: [room][D], this head's. lists and counts: this head's,
// [lists][list_room] and [lists]. queries and out: this head's group, [groups][queries][D].
template <
    typename T,
    int D,  // of queries and keys, a multiple of 8
    int Dv,  // of values
    int Size,  // tokens to a block, a multiple of 8
    int Keys,  // to a strip; divides Size
    int Rows,  // matrices of queries to a simdgroup
    int Simdgroups>
inline void tile_attention(
    const device T* queries,
    const device T* near,
    const device T* far,
    const device T* values,
    const device int* lists,
    const device int* counts,
    float factor,  // on scores, with log2(e)
    TileSizes sizes,
    device T* out,
    threadgroup vec<T, 4>* key_quads,  // [Keys * strip_row<T, D>() / 4]
    threadgroup vec<T, 4>* value_quads,  // [Keys * strip_row<T, Dv>() / 4]
    ushort thread_index,
    ushort lane,
    ushort simdgroup,
    int part,
    int block) {
  constexpr int Threads = 32 * Simdgroups;
  constexpr int key_row = strip_row<T, D>();
  constexpr int value_row = strip_row<T, Dv>();
  constexpr int per_tile = Size / Keys;
  const threadgroup T* key_strip = (const threadgroup T*)key_quads;
  const threadgroup T* value_strip = (const threadgroup T*)value_quads;
  const ushort row = matrix_row(lane);
  const ushort column = matrix_column(lane);
  const int end = sizes.start + sizes.queries;  // no key lies there or behind

  // Where the queries of a row are: of scores this lane has those of two columns, of outputs those
  // of one row. A block at either end of the text has rows without a query: they compute with
  // zeros, and nothing is written for them.
  const int first_row = (part * Simdgroups + int(simdgroup)) * 8 * Rows;
  int2 position[Rows];
  int place[Rows];  // of this lane's output among the group's; -1: there is no such query
  int last = -1;  // position of the last query of this simdgroup
  simdgroup_matrix<T, 8, 8> query[Rows][D / 8];
  simdgroup_matrix<float, 8, 8> output[Rows][Dv / 8];
  float2 top[Rows];
  float2 sum[Rows];
  TILES_UNROLL
  for (int f = 0; f < Rows; ++f) {
    top[f] = float2(TILES_HIDDEN);
    sum[f] = float2(0.0f);
    TILES_UNROLL
    for (int v = 0; v < Dv / 8; ++v) {
      output[f][v] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    TILES_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int r = first_row + 8 * f + column + e;
      position[f][e] = block * Size + r % Size;
      const int step = position[f][e] - sizes.start;
      const bool exists = r < sizes.groups * Size && step >= 0 && step < sizes.queries;
      last = exists ? max(last, position[f][e]) : last;
      const device T* own = queries + (long(r / Size) * sizes.queries + step) * D + row;
      TILES_UNROLL
      for (int d = 0; d < D / 8; ++d) {
        query[f][d].thread_elements()[e] = exists ? own[8 * d] : T(0);
      }
    }
    const int r = first_row + 8 * f + row;
    const int step = block * Size + r % Size - sizes.start;
    const bool exists = r < sizes.groups * Size && step >= 0 && step < sizes.queries;
    place[f] = exists ? r / Size * sizes.queries + step : -1;
  }
  last = simd_max(last);

  const int border = max(block - sizes.window_blocks, 0);
  const int listed = block - sizes.listed_from;
  const bool has_list = listed >= 0 && listed < sizes.lists;
  const device int* list = lists + (has_list ? long(listed) * sizes.list_room : 0);
  const int near_tiles = block - border + 1;
  const int tiles = near_tiles + (has_list ? counts[listed] : border);

  // The block that tile t is of: its own, those before it that are near, then far ones.
  int tile = 0;
  int key_block = block;
  vec<T, 4> fetched_keys[strip_quads<Keys, D, Threads>()];
  vec<T, 4> fetched_values[strip_quads<Keys, Dv, Threads>()];
  const device T* from = near + long(key_block) * Size * D;
  strip_fetch<T, Keys, D, Threads>(from, end - key_block * Size, fetched_keys, thread_index);
  strip_put<T, Keys, D, Threads>(fetched_keys, key_quads, thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int strip = 0; strip < tiles * per_tile; ++strip) {
    const int first = key_block * Size + strip % per_tile * Keys;
    const bool looks = first <= last;  // or all of it lies behind the queries of this simdgroup
    strip_fetch<T, Keys, Dv, Threads>(
        values + long(first) * Dv, end - first, fetched_values, thread_index);
    simdgroup_matrix<float, 8, 8> scores[Rows][Keys / 8];
    if (looks) {
      TILES_UNROLL
      for (int f = 0; f < Rows; ++f) {
        TILES_UNROLL
        for (int k = 0; k < Keys / 8; ++k) {
          scores[f][k] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
      }
      TILES_UNROLL
      for (int d = 0; d < D / 8; ++d) {
        TILES_UNROLL
        for (int k = 0; k < Keys / 8; ++k) {
          simdgroup_matrix<T, 8, 8> key;
          simdgroup_load(key, key_strip + 8 * k * key_row + 8 * d, key_row);
          TILES_UNROLL
          for (int f = 0; f < Rows; ++f) {
            simdgroup_multiply_accumulate(scores[f][k], key, query[f][d], scores[f][k]);
          }
        }
      }
    }
    strip_put<T, Keys, Dv, Threads>(fetched_values, value_quads, thread_index);

    simdgroup_matrix<T, 8, 8> weights[Rows][Keys / 8];
    if (looks) {
      TILES_UNROLL
      for (int f = 0; f < Rows; ++f) {
        float2 most = float2(TILES_HIDDEN);
        TILES_UNROLL
        for (int k = 0; k < Keys / 8; ++k) {
          if (tile == 0) {
            const int key = first + 8 * k + row;
            TILES_UNROLL
            for (int e = 0; e < 2; ++e) {
              if (key > position[f][e]) {
                scores[f][k].thread_elements()[e] = TILES_HIDDEN;
              }
            }
          }
          most.x = max(most.x, scores[f][k].thread_elements()[0]);
          most.y = max(most.y, scores[f][k].thread_elements()[1]);
        }
        most = over_rows_max(most) * factor;
        rescale<Dv>(most, top[f], sum[f], output[f], lane);
        TILES_UNROLL
        for (int k = 0; k < Keys / 8; ++k) {
          const float2 weight = float2(
              fast::exp2(fma(scores[f][k].thread_elements()[0], factor, -top[f].x)),
              fast::exp2(fma(scores[f][k].thread_elements()[1], factor, -top[f].y)));
          sum[f] += weight;
          const vec<T, 2> turned = to_weights<T>(weight, lane);
          weights[f][k].thread_elements()[0] = turned.x;
          weights[f][k].thread_elements()[1] = turned.y;
        }
      }
    }
    // The values are there, and no simdgroup reads these keys any more.
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const bool more = strip + 1 < tiles * per_tile;
    if (more) {
      const int inside = (strip + 1) % per_tile;
      if (inside == 0) {
        ++tile;
        const int other = tile - near_tiles;
        key_block = other < 0 ? block - tile : has_list ? list[other] : other;
      }
      const int next = key_block * Size + inside * Keys;
      from = (tile < near_tiles ? near : far) + long(next) * D;
      strip_fetch<T, Keys, D, Threads>(from, end - next, fetched_keys, thread_index);
    }
    if (looks) {
      TILES_UNROLL
      for (int k = 0; k < Keys / 8; ++k) {
        TILES_UNROLL
        for (int v = 0; v < Dv / 8; ++v) {
          simdgroup_matrix<T, 8, 8> value;
          simdgroup_load(value, value_strip + 8 * k * value_row + 8 * v, value_row);
          TILES_UNROLL
          for (int f = 0; f < Rows; ++f) {
            simdgroup_multiply_accumulate(output[f][v], weights[f][k], value, output[f][v]);
          }
        }
      }
    }
    if (more) {
      strip_put<T, Keys, D, Threads>(fetched_keys, key_quads, thread_index);
    }
    // The next keys are there, and no simdgroup reads these values any more.
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  TILES_UNROLL
  for (int f = 0; f < Rows; ++f) {
    const float share = 1.0f / column_to_row(over_rows_sum(sum[f]), lane);
    if (place[f] >= 0) {
      device T* to = out + long(place[f]) * Dv + column;
      TILES_UNROLL
      for (int v = 0; v < Dv / 8; ++v) {
        to[8 * v] = T(output[f][v].thread_elements()[0] * share);
        to[8 * v + 1] = T(output[f][v].thread_elements()[1] * share);
      }
    }
  }
}
