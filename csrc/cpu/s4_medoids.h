// s4 and s5 from stored products with the kept tokens, the centres: the nearest centre of a token, the most similar
// one, and the means that a medoid step needs.
//
//   distance    = (||x||^2 - x.c) + (||c||^2 - x.c)         the arg-min gives clusters
//   similarity  = x.c / ||c||                               the arg-max gives merge targets: the bits of s5_assign.h
//   cluster_mean[c] = mean of its cluster                   in float32, as s5_mean.h adds
//   mean_dist_sq[n] = ||x_n - cluster_mean||^2
//
// Each centre has a column of `product`. Columns are not ordered by position, so ties compare positions. Included by
// loops.h alone, inside the namespace of its instruction set.
#pragma once
#include "product.h"
#include "s5_mean.h"

// Writes the products of tokens[begin .. end) with the stale centres, which are packed, into the centres' columns.
template <class E, class Tokens>
static inline void add_products(const Input& in, const Rows& rows, const Factors& stale, Centres& centres,
                                Tokens tokens, int64_t begin, int64_t end, void* scratch) {
  const int64_t step = block_rows<E>(stale.count, in.dim);
  RowBlock block;
  for (int64_t i0 = begin; i0 < end; i0 += step) {
    load_block<E, true>(in, tokens, i0, smaller(step, end - i0), stale.count, scratch, block);
    each_panel<E>(in, rows, stale, [&](auto width, const float* panel, int64_t t0) {
      constexpr int Vectors = decltype(width)::Vectors;
      multiply_panel<E, Vectors>(in, block, panel);
      const int64_t count = smaller(Vectors * W, stale.count - t0);
      for (int64_t i = 0; i < block.count; i++)
        for (int64_t t = 0; t < count; t++)
          centres.product[tokens[i0 + i] * centres.width + centres.stale[t0 + t]] = block.products(i)[t];
    });
  }
}
// Adds the products of all tokens: a centre that moves becomes a dropped token, and needs its products.
template <class E>
static void add_all_products(const Input& in, const Rows& rows, const Factors& stale, Centres& centres, int64_t begin,
                             int64_t end, void* scratch) {
  add_products<E>(in, rows, stale, centres, Range{}, begin, end, scratch);
}
// Adds the products of dropped[begin .. end) only, if no centre will move any more.
template <class E>
static void add_last_products(const Input& in, const Rows& rows, const Factors& stale, Centres& centres,
                              const Merge& merge, int64_t begin, int64_t end, void* scratch) {
  add_products<E>(in, rows, stale, centres, Listed{merge.dropped}, begin, end, scratch);
}

// Returns the number of the centre of largest value(products, column), ties to the lower position; 0 if none has a
// value.
template <class Value>
static inline int32_t best_centre(const Centres& centres, int64_t token, Value value_of) {
  const float* product = centres.product + token * centres.width;
  V best = splat(-__builtin_inff());
  I position = I{} - 1;
  for (int64_t c = 0; c < centres.count; c += W) {
    const V value = value_of(load(product + c), c);
    I other;
    __builtin_memcpy(&other, centres.position + c, sizeof other);
    const I wins = (value > best) | ((value == best) & (other < position));
    best = wins ? value : best;
    position = wins ? other : position;
  }
  float most = -__builtin_inff();
  int32_t at = -1;
  for (int l = 0; l < W; l++)
    if (position[l] >= 0 && (best[l] > most || (best[l] == most && position[l] < at))) most = best[l], at = position[l];
  return at < 0 ? 0 : centres.number[at];
}

// s4: the nearest centre of dropped[begin .. end).
static void nearest_centre(const Scores& s, const Centres& centres, Merge& merge, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const int32_t n = merge.dropped[i];
    const V norm_sq = splat(s.norm_sq[n]);
    merge.target[i] = best_centre(
        centres, n, [&](V dot, int64_t c) { return -((norm_sq - dot) + (load(centres.norm_sq + c) - dot)); });
  }
}

// s5: the most similar centre of dropped[begin .. end).
static void similar(const Centres& centres, Merge& merge, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++)
    merge.target[i] = best_centre(centres, merge.dropped[i], [&](V dot, int64_t c) {
      return dot * load(centres.inv_norm + c) + load(centres.padding + c);
    });
}

// Returns whether the mean of row r's cluster is needed. It is not for one or two tokens (s4_clusters.h), nor if the
// tokens are those of the last step, since the centre is already their medoid.
static inline bool needs_mean(const Rows& rows, const Merge& merge, const Centres& centres, int64_t r) {
  return merge.row_begin[r + 1] - merge.row_begin[r] >= 2 && centres.regrouped[centres.cluster[rows.row_token[r]]];
}

// s4: computes features [d0, d1) of the means of clusters [begin, end).
template <class T>
static void cluster_mean(const Input& in, const Rows& rows, const Merge& merge, Centres& centres, int64_t begin,
                         int64_t end, int64_t d0, int64_t d1) {
  for (int64_t r = begin; r < end; r++) {
    const int32_t first = merge.row_begin[r], last = merge.row_begin[r + 1];
    if (needs_mean(rows, merge, centres, r))
      mean_of(in, row<T>(in, rows.row_token[r]), merge.merged, first, last, d0, d1, centres.cluster_mean + r * in.dim);
  }
}

template <class T>
static inline float dist_sq(const T* x, const float* mean, int64_t dim) {
  V sums[2] = {};
  int64_t d = 0;
  for (; d + 2 * W <= dim; d += 2 * W)
    for (int h = 0; h < 2; h++) {
      const V off = load(x + d + h * W) - load(mean + d + h * W);
      sums[h] = fma(off, off, sums[h]);
    }
  for (int h = 0; d < dim; d += W, h++) {
    const int64_t n = smaller(W, dim - d);
    const V off = load_n(x + d, n) - load_n(mean + d, n);
    sums[h] = fma(off, off, sums[h]);
  }
  Total total{};
  total.add(sums[0]);
  total.add(sums[1]);
  return (float)total.sum();
}

// s4: computes mean_dist_sq of merged[begin .. end), and of the centres whose clusters start there.
template <class T>
static void mean_distance(const Input& in, const Rows& rows, const Merge& merge, Centres& centres, int64_t begin,
                          int64_t end) {
  int32_t r = 0;
  for (int64_t i = begin; i < end; i++) {
    while (merge.row_begin[r + 1] <= i) r++;
    const int32_t first = merge.row_begin[r];
    if (!needs_mean(rows, merge, centres, r)) continue;
    const float* mean = centres.cluster_mean + (int64_t)r * in.dim;
    const int32_t centre = rows.row_token[r], token = merge.merged[i];
    if (i == first) centres.mean_dist_sq[centre] = dist_sq(row<T>(in, centre), mean, in.dim);
    centres.mean_dist_sq[token] = dist_sq(row<T>(in, token), mean, in.dim);
  }
}
