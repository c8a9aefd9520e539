// s4: the kept tokens as centres of clusters, and the token of each cluster that replaces its centre (k-medoids).
//
// Centre c has column c of Centres::product until its image is finished: a centre that moves makes its column stale,
// and only stale columns are computed again.
#pragma once
#include <algorithm>
#include <climits>
#include <cmath>

#include "s4_topk.h"

namespace apet::cpu {

static void set_centre(const Scores& scores, Centres& centres, int32_t c, int32_t token) {
  const bool target = finite(scores, token);
  const float norm_sq = scores.norm_sq[token];
  centres.token[c] = token;
  centres.position[c] = target ? token : INT_MAX;
  centres.norm_sq[c] = target ? norm_sq : __builtin_inff();
  centres.inv_norm[c] = target && norm_sq > 0 ? 1 / std::sqrt(norm_sq) : 0;
  centres.padding[c] = target ? 0.0f : -__builtin_inff();
}

static void make_stale(Centres& centres, int32_t c) {
  if (centres.position[c] == INT_MAX) return;  // nothing is compared with it
  centres.stale[centres.stale_count] = c;
  centres.stale_token[centres.stale_count++] = centres.token[c];
}

// Fills both maps between centres and merge targets, for the loops of s4_medoids.h: number and target_column.
static void number_targets(const Merge& merge, Centres& centres) {
  for (int32_t t = 0; t < merge.target_count; t++) centres.number[merge.target_token[t]] = t;
  for (int32_t c = 0; c < centres.count; c++)
    if (centres.position[c] != INT_MAX) centres.target_column[centres.number[centres.token[c]]] = c;
}

// Completes the stale columns to two vectors by repeating columns: a product with a single vector would take twelve
// rows at a time, which do not fit the first-level cache if rows are a multiple of 4 KB. There is room for K factors.
static void pad_stale(Centres& centres, int32_t vector) {
  for (int32_t& count = centres.stale_count; count % (2 * vector) && count < centres.count; count++) {
    centres.stale[count] = centres.stale[0];
    centres.stale_token[count] = centres.stale_token[0];
  }
}

// Makes the kept tokens centres. The first columns hold the products of the tokens `known` already, which are all kept.
static void begin_centres(const Input& in, const Scores& scores, const Rows& rows, const Merge& merge,
                          const int32_t* known, int32_t known_count, int32_t vector, Centres& centres) {
  int32_t* is_known = merge.merged;  // scratch
  std::fill_n(is_known, in.tokens, 0);
  std::fill_n(centres.cluster, in.tokens, -1);
  centres.count = 0;
  centres.stale_count = 0;
  for (int32_t j = 0; j < known_count; j++) {
    is_known[known[j]] = 1;
    set_centre(scores, centres, centres.count++, known[j]);
  }
  for (int32_t r = 0; r < rows.count; r++) {
    if (is_known[rows.row_token[r]]) continue;
    set_centre(scores, centres, centres.count, rows.row_token[r]);
    make_stale(centres, centres.count++);
  }
  for (int32_t c = centres.count; c % vector; c++) {
    centres.position[c] = INT_MAX;
    centres.norm_sq[c] = __builtin_inff();
    centres.inv_norm[c] = 0;
    centres.padding[c] = -__builtin_inff();
  }
  number_targets(merge, centres);
}

// Marks the clusters whose tokens differ from those of the last step, given the targets of the dropped tokens.
static void note_regrouped(const Merge& merge, Centres& centres) {
  std::fill_n(centres.regrouped, centres.count, uint8_t{0});
  const auto assign_cluster = [&](int32_t token, int32_t c) {
    const int32_t before = centres.cluster[token];
    if (before == c) return;
    centres.regrouped[c] = 1;
    if (before >= 0) centres.regrouped[before] = 1;
    centres.cluster[token] = c;
  };
  for (int32_t i = 0; i < merge.dropped_count; i++)
    assign_cluster(merge.dropped[i], centres.target_column[merge.target[i]]);
  for (int32_t c = 0; c < centres.count; c++) assign_cluster(centres.token[c], c);
}

// Returns the token of row r's cluster that is nearest to its mean, ties to the lower position. In a cluster of two
// tokens both count as equally near, whatever their rounded distances are.
static int32_t medoid(const Rows& rows, const Merge& merge, const Centres& centres, int32_t r) {
  const int32_t first = merge.row_begin[r], last = merge.row_begin[r + 1];
  int32_t best = rows.row_token[r];
  for (int32_t q = first; q < last; q++) {
    const int32_t token = merge.merged[q];
    const float off = last - first < 2 ? 0 : centres.mean_dist_sq[token];
    const float least = last - first < 2 ? 0 : centres.mean_dist_sq[best];
    if (off < least || (off == least && token < best)) best = token;
  }
  return best;
}

// A medoid step, given the clusters as `merged`: moves the centres, and lists rows, targets and dropped tokens again.
// Returns false if no centre has moved.
static bool move_centres(const Input& in, const Scores& scores, Rows& rows, Merge& merge, Centres& centres) {
  int32_t* column = centres.number;  // scratch
  for (int32_t c = 0; c < centres.count; c++) column[centres.token[c]] = c;
  bool moved = false;
  for (int32_t r = 0; r < rows.count; r++) {
    const int32_t c = column[rows.row_token[r]];
    const int32_t token = centres.regrouped[c] ? medoid(rows, merge, centres, r) : centres.token[c];
    if (token == centres.token[c]) continue;
    moved = true;
    set_centre(scores, centres, c, token);
    make_stale(centres, c);
  }
  if (moved) {
    int32_t* is_kept = merge.merged;  // scratch
    std::fill_n(is_kept, in.tokens, 0);
    for (int32_t c = 0; c < centres.count; c++) is_kept[centres.token[c]] = 1;
    merge.target_count = merge.dropped_count = 0;
    int32_t r = 0;
    for (int32_t i = 0; i < in.tokens; i++) {
      if (is_kept[i]) {
        set_row(rows, r, i);
        rows.indices[r] = rows.first_token + i;
        if (finite(scores, i)) add_target(merge, r, i, scores.norm_sq[i]);
        r++;
      } else if (finite(scores, i)) {
        merge.dropped[merge.dropped_count++] = i;
      }
    }
  }
  number_targets(merge, centres);
  return moved;
}

}  // namespace apet::cpu
