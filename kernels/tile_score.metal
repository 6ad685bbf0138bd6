// tile_score: which tiles each block of a prompt's queries looks at.
//
// Grid: one threadgroup per block of queries (y, the last one first, since it scores the most) and
// kv head of a row (z). The rows to score are the means of `Pooled` neighbouring queries of all heads
// that share the kv head, 8 * Rows of them in a simdgroup's registers; `Splits` simdgroups have the
// same rows and take turns with the tiles.
//
//   1. Scores = pieces * queries, 8x8 matrices straight from device memory. Of each row and tile
//      what is kept is log2 of the sum of 2^score, in `logs`; the near tiles' keys are scored one by
//      one, as far as each row sees them, and only their sum is kept.
//   2. A row's whole sum makes its logs shares. A tile's share is the largest of any row.
//   3. The list: the first tile, and the largest others until `mass` is reached. The smallest share
//      that is needed is found bit by bit, since positive floats order as their bits do; of equal
//      shares the earlier count.
//
// Products of matrices per tile and 8 rows: Pieces * D / 64, Pieces / (Pooled * Size) of what
// attention takes for it, 1/16 of one of its two products at 16, 4 and 64. mlx_delta/method/tiles.py
// specifies it.

// What is the same for all threadgroups.
struct ScoreSizes {
  int groups;  // query heads to a kv head
  int queries;  // of a head
  int start;  // position of the first query
  int window_blocks;
  int room;  // far tiles at most
};

// Eight rows of keys, [8][D], converted where their type is not that of the queries' matrices.
template <typename S>
inline void load_keys(
    thread simdgroup_matrix<S, 8, 8>& keys, const device S* from, int row, ushort) {
  simdgroup_load(keys, from, row);
}

template <typename S, typename T>
inline void load_keys(
    thread simdgroup_matrix<S, 8, 8>& keys, const device T* from, int row, ushort lane) {
  from += matrix_row(lane) * row + matrix_column(lane);
  keys.thread_elements()[0] = S(from[0]);
  keys.thread_elements()[1] = S(from[1]);
}

// Scores of Pieces rows of keys with the queries of a simdgroup.
template <typename T, typename S, int D, int Pieces, int Rows>
inline void score(
    const device T* keys,
    thread simdgroup_matrix<S, 8, 8> (&query)[Rows][D / 8],
    thread simdgroup_matrix<float, 8, 8> (&scores)[Rows][Pieces / 8],
    ushort lane) {
  TILES_UNROLL
  for (int f = 0; f < Rows; ++f) {
    TILES_UNROLL
    for (int k = 0; k < Pieces / 8; ++k) {
      scores[f][k] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
  TILES_UNROLL
  for (int d = 0; d < D / 8; ++d) {
    TILES_UNROLL
    for (int k = 0; k < Pieces / 8; ++k) {
      simdgroup_matrix<S, 8, 8> key;
      load_keys(key, keys + 8 * k * D + 8 * d, D, lane);
      TILES_UNROLL
      for (int f = 0; f < Rows; ++f) {
        simdgroup_multiply_accumulate(scores[f][k], key, query[f][d], scores[f][k]);
      }
    }
  }
}

// log2 of the sum of 2^score over the rows of some matrices, for a lane's two columns.
template <int Matrices>
inline float2 log_of_sum(thread const float2 (&scores)[Matrices]) {
  float2 top = scores[0];
  TILES_UNROLL
  for (int k = 1; k < Matrices; ++k) {
    top = max(top, scores[k]);
  }
  top = over_rows_max(top);
  float2 sum = float2(0.0f);
  TILES_UNROLL
  for (int k = 0; k < Matrices; ++k) {
    sum += float2(fast::exp2(scores[k].x - top.x), fast::exp2(scores[k].y - top.y));
  }
  sum = over_rows_sum(sum);
  return top + float2(fast::log2(sum.x), fast::log2(sum.y));
}

// Adds 2^log to a sum that is kept as sum * 2^top. It starts at 2^TILES_HIDDEN, which is nothing.
inline void add_log(float2 log, thread float2& top, thread float2& sum) {
  const float2 higher = max(top, log);
  sum = sum * float2(fast::exp2(top.x - higher.x), fast::exp2(top.y - higher.y)) +
      float2(fast::exp2(log.x - higher.x), fast::exp2(log.y - higher.y));
  top = higher;
}

// The sum of all shares but the first whose bits are `least` or more. sums: [Simdgroups], not the
// ones of the call before.
template <int Simdgroups>
inline float sum_of_shares(
    const device float* shares,
    int far,
    uint least,
    threadgroup float* sums,
    ushort thread_index,
    ushort lane,
    ushort simdgroup) {
  float sum = 0.0f;
  for (int tile = thread_index; tile < far; tile += 32 * Simdgroups) {
    const float share = shares[tile];
    sum += tile > 0 && as_type<uint>(share) >= least ? share : 0.0f;
  }
  sum = simd_sum(sum);
  if (lane == 0) {
    sums[simdgroup] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum = 0.0f;
  for (int s = 0; s < Simdgroups; ++s) {
    sum += sums[s];
  }
  return sum;
}

// The list of the tiles that reach `mass`. Every thread reads the shares that it wrote itself, but
// for the last part. sums: [2 * Simdgroups].
template <int Simdgroups>
inline void choose_tiles(
    const device float* shares,
    int far,
    float near_share,
    float mass,
    device int* list,
    device int* count,
    threadgroup float* sums,
    ushort thread_index,
    ushort lane,
    ushort simdgroup) {
  threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
  const float need = mass - (near_share + (far > 0 ? shares[0] : 0.0f));
  uint least = 0;
  for (int bit = 29; bit >= 0; --bit) {  // a share is 1 at most
    const uint candidate = least | (1u << bit);
    const float sum = sum_of_shares<Simdgroups>(
        shares, far, candidate, sums + bit % 2 * Simdgroups, thread_index, lane, simdgroup);
    least = sum >= need ? candidate : least;
  }
  const float larger = sum_of_shares<Simdgroups>(
      shares, far, least + 1, sums + Simdgroups, thread_index, lane, simdgroup);
  if (simdgroup > 0) {
    return;
  }
  // Of those that are equal to the least; if that is 0, all there are do not reach the mass.
  const float equal = least == 0 ? float(far) : ceil((need - larger) / as_type<float>(least));
  int listed = 0;
  int equals = 0;
  for (int first = 0; first < far; first += 32) {
    const int tile = first + int(lane);
    const uint bits = tile < far ? as_type<uint>(shares[tile]) : 0u;
    const bool is_equal = tile > 0 && tile < far && bits == least;
    const int before = equals + simd_prefix_exclusive_sum(is_equal ? 1 : 0);
    bool chosen = tile < far && (tile == 0 || bits > least);
    chosen = chosen || (is_equal && float(before) < max(equal, 1.0f));
    const int place = listed + simd_prefix_exclusive_sum(chosen ? 1 : 0);
    if (chosen) {
      list[place] = tile;
    }
    listed += simd_sum(chosen ? 1 : 0);
    equals += simd_sum(is_equal ? 1 : 0);
  }
  if (lane == 0) {
    *count = listed;
  }
}

// queries: of this head's group, [groups][queries][D]. near: this head's keys, [room][D]; packed,
// bias and spread: this head's. logs: this block's, [room][rows], rows a multiple of 8 * Rows.
// shares [room + 1], list [room] and count: this block's. far_logs and near_logs: [Splits * rows];
// sums: [2 * Simdgroups].
template <
    typename T,
    typename S,  // of packed keys, in which scores are computed
    int D,  // a multiple of 8
    int Size,  // tokens to a block
    int Pieces,  // packed rows of a tile, a multiple of 8 that divides Size
    int Pooled,  // queries to a row to score; divides Size
    int Rows,  // matrices of rows to a simdgroup
    int Groups,  // of 8 * Rows rows
    int Splits,
    int Simdgroups>
inline void tile_score(
    const device T* queries,
    const device T* near,
    const device S* packed,
    const device float* bias,
    const device float* spread,
    float factor,  // on scores, with log2(e)
    float mass,
    ScoreSizes sizes,
    device float* logs,
    device float* shares,
    device int* list,
    device int* count,
    threadgroup float* far_logs,
    threadgroup float* near_logs,
    threadgroup float* sums,
    ushort thread_index,
    ushort lane,
    ushort simdgroup,
    int block) {
  constexpr int all_rows = Groups * 8 * Rows;
  constexpr int Matrices = Pieces / 8;
  constexpr int per_head = Size / Pooled;
  const int rows = sizes.groups * per_head;  // that there are
  const int far = max(block - sizes.window_blocks, 0);
  const ushort row = matrix_row(lane);
  const ushort column = matrix_column(lane);

  for (int item = simdgroup; item < Groups * Splits; item += Simdgroups) {
    const int first_row = item / Splits * 8 * Rows;
    const int split = item % Splits;
    simdgroup_matrix<S, 8, 8> query[Rows][D / 8];
    int2 position[Rows];  // of the last query that a row is of
    float2 square[Rows];
    TILES_UNROLL
    for (int f = 0; f < Rows; ++f) {
      square[f] = float2(0.0f);
      TILES_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int r = first_row + 8 * f + column + e;
        const int first = block * Size + r % per_head * Pooled;
        position[f][e] = first + Pooled - 1;
        const long place = long(r / per_head) * sizes.queries + first - sizes.start;
        const device T* own = queries + place * D + row;
        TILES_UNROLL
        for (int d = 0; d < D / 8; ++d) {
          float mean = 0.0f;
          if (r < rows) {
            for (int p = 0; p < Pooled; ++p) {
              mean += float(own[p * D + 8 * d]);
            }
            mean /= float(Pooled);
          }
          query[f][d].thread_elements()[e] = S(mean);
          square[f][e] += mean * mean;
        }
      }
      square[f] = over_rows_sum(square[f]) * (factor * factor);
    }

    float2 top[2][Rows];  // far and near
    float2 sum[2][Rows];
    TILES_UNROLL
    for (int f = 0; f < Rows; ++f) {
      top[0][f] = top[1][f] = float2(TILES_HIDDEN);
      sum[0][f] = sum[1][f] = float2(1.0f);
    }
    simdgroup_matrix<float, 8, 8> scores[Rows][Matrices];
    for (int tile = split; tile < far; tile += Splits) {
      score<S, S, D, Pieces, Rows>(packed + long(tile) * Pieces * D, query, scores, lane);
      TILES_UNROLL
      for (int f = 0; f < Rows; ++f) {
        float2 own[Matrices];
        TILES_UNROLL
        for (int k = 0; k < Matrices; ++k) {
          const int piece = tile * Pieces + 8 * k + row;
          const float2 more = bias[piece] + square[f] * spread[piece];
          own[k].x = fma(scores[f][k].thread_elements()[0], factor, more.x);
          own[k].y = fma(scores[f][k].thread_elements()[1], factor, more.y);
        }
        const float2 log = log_of_sum<Matrices>(own);
        if (row == 0) {
          device float* to = logs + long(tile) * all_rows + first_row + 8 * f + column;
          to[0] = log.x;
          to[1] = log.y;
        }
        add_log(log, top[0][f], sum[0][f]);
      }
    }
    for (int first = far * Size + split * Pieces; first < (block + 1) * Size;
         first += Splits * Pieces) {
      score<T, S, D, Pieces, Rows>(near + long(first) * D, query, scores, lane);
      TILES_UNROLL
      for (int f = 0; f < Rows; ++f) {
        float2 own[Matrices];
        TILES_UNROLL
        for (int k = 0; k < Matrices; ++k) {
          const int key = first + 8 * k + row;
          TILES_UNROLL
          for (int e = 0; e < 2; ++e) {
            own[k][e] = key <= position[f][e] ? scores[f][k].thread_elements()[e] * factor
                                              : TILES_HIDDEN;
          }
        }
        add_log(log_of_sum<Matrices>(own), top[1][f], sum[1][f]);
      }
    }
    if (row == 0) {
      TILES_UNROLL
      for (int f = 0; f < Rows; ++f) {
        TILES_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int at = split * all_rows + first_row + 8 * f + column + e;
          far_logs[at] = top[0][f][e] + fast::log2(sum[0][f][e]);
          near_logs[at] = top[1][f][e] + fast::log2(sum[1][f][e]);
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);

  // A row's whole sum takes the place of its first log, the share of the near tiles that of theirs.
  for (int r = thread_index; r < rows; r += 32 * Simdgroups) {
    float top = TILES_HIDDEN;
    for (int s = 0; s < Splits; ++s) {
      top = max(top, max(far_logs[s * all_rows + r], near_logs[s * all_rows + r]));
    }
    float far_sum = 0.0f;
    float near_sum = 0.0f;
    for (int s = 0; s < Splits; ++s) {
      far_sum += fast::exp2(far_logs[s * all_rows + r] - top);
      near_sum += fast::exp2(near_logs[s * all_rows + r] - top);
    }
    far_logs[r] = top + fast::log2(far_sum + near_sum);
    near_logs[r] = near_sum / (far_sum + near_sum);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float near_most = 0.0f;
  for (int r = lane; r < rows; r += 32) {
    near_most = max(near_most, near_logs[r]);
  }
  near_most = simd_max(near_most);
  float sum = 0.0f;
  for (int tile = simdgroup; tile < far; tile += Simdgroups) {
    float most = TILES_HIDDEN;
    for (int r = lane; r < rows; r += 32) {
      most = max(most, logs[long(tile) * all_rows + r] - far_logs[r]);
    }
    most = fast::exp2(simd_max(most));
    sum += most;
    if (lane == 0) {
      shares[tile] = most;
    }
  }
  if (lane == 0) {
    sums[simdgroup] = sum;
  }
  threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
  float total = near_most;
  for (int s = 0; s < Simdgroups; ++s) {
    total += sums[s];
  }
  for (int tile = thread_index; tile < sizes.room; tile += 32 * Simdgroups) {
    shares[tile] = tile < far ? shares[tile] / total : 0.0f;
  }
  if (thread_index == 0) {
    shares[sizes.room] = near_most / total;
  }
  choose_tiles<Simdgroups>(
      shares, far, near_most / total, mass, list, count, sums, thread_index, lane, simdgroup);
}
