// Scores of a block's keys along its deltas: one multiply-accumulate for each delta that is not
// zero, for 64 queries at a time whose running scores stay in registers.
//
// queries: [chunks, D, 64], so that one element of 64 queries lies together.
// begins:  [T + 1]; row t has the deltas begins[t] .. begins[t + 1].
// scores:  [chunks, T, 64].
#include <string.h>

#define LANES 64
typedef float vector __attribute__((vector_size(32)));
typedef float unaligned __attribute__((vector_size(32), aligned(4), may_alias));

void run_scores(int chunks, int D, int T, const float *queries, const int *begins,
                const int *channels, const float *deltas, float *scores) {
  for (int c = 0; c < chunks; ++c) {
    const float *q = queries + (long)c * D * LANES;
    vector a = {0}, b = {0}, e = {0}, f = {0}, g = {0}, h = {0}, i = {0}, j = {0};
    for (int t = 0; t < T; ++t) {
      for (int n = begins[t]; n < begins[t + 1]; ++n) {
        const unaligned *element = (const unaligned *)(q + channels[n] * LANES);
        const vector delta = deltas[n] - (vector){0};
        a += delta * element[0], b += delta * element[1], e += delta * element[2];
        f += delta * element[3], g += delta * element[4], h += delta * element[5];
        i += delta * element[6], j += delta * element[7];
      }
      const vector row[8] = {a, b, e, f, g, h, i, j};
      memcpy(scores + ((long)c * T + t) * LANES, row, sizeof(row));
    }
  }
}
