// s4: chooses the tokens that stay, exactly K of them, and makes the lists that s5 reads, all ascending by position.
//
//   e_sq [N] -> rank [N] -> cut -> row_token, row_blend, indices [R], target_row, inv_norm [T], dropped [N - K]
//
// A rank is the bits of a non-negative float, which order as the floats do.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "s1_basis.h"

namespace apet::cpu {

// Takes every token of larger rank, and the first `ties` of those that equal it.
struct Cut {
  uint32_t rank;
  int64_t ties;

  // To be called once per token, in ascending order.
  bool takes(uint32_t other) { return other > rank || (other == rank && ties-- > 0); }
};

// Finds the k largest of n ranks, 1 <= k <= n, without sorting: four passes, one for each byte from the top, determine
// the k-th largest rank and how many of those that equal it are above the cut.
static Cut cut_at(const uint32_t* rank, int64_t n, int64_t k) {
  uint32_t prefix = 0;
  int64_t wanted = k;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int32_t count[256] = {};
    const uint32_t known = shift == 24 ? 0 : ~0u << (shift + 8);
    for (int64_t i = 0; i < n; i++)
      if ((rank[i] & known) == prefix) count[rank[i] >> shift & 255]++;
    uint32_t digit = 255;
    while (count[digit] < wanted) wanted -= count[digit--];
    prefix |= digit << shift;
  }
  return {prefix, wanted};
}

// The row starts from `token`; blend_token: the token that it is blended with, or -1.
static void set_row(Rows& rows, int64_t r, int32_t token, int32_t blend_token = -1) {
  rows.row_token[r] = token;
  rows.row_blend[r] = blend_token;
}

static void add_target(Merge& merge, int32_t row, int32_t token, float norm_sq) {
  merge.target_row[merge.target_count] = row;
  merge.target_token[merge.target_count] = token;
  merge.inv_norm[merge.target_count++] = norm_sq > 0 ? 1 / std::sqrt(norm_sq) : 0;
}

// Chooses the K rows of compress, K < N, given the basis [basis_size] in the order it was picked.
static void choose_rows(const Input& in, const Scores& scores, const int32_t* basis, int32_t basis_size,
                        apet_layout layout, Rows& rows, Merge& merge) {
  const int64_t n = in.tokens, k = in.keep;
  if (k == 0) return;
  uint32_t* rank = reinterpret_cast<uint32_t*>(merge.merged);  // scratch
  std::memcpy(rank, scores.e_sq, n * sizeof(float));
  const int32_t placed = std::min(basis_size, in.keep);  // basis tokens that get a row
  if (layout == APET_INPLACE)
    for (int32_t j = 0; j < placed; j++) rank[basis[j]] = UINT32_MAX;
  const int64_t overwritten = layout == APET_OVERWRITE ? placed : 0;  // the lowest of the kept tokens
  Cut kept = cut_at(rank, n, k);
  Cut unreplaced = overwritten == 0 ? kept : k > overwritten ? cut_at(rank, n, k - overwritten) : Cut{UINT32_MAX, 0};
  int32_t r = 0, j = 0;
  for (int32_t i = 0; i < n; i++) {
    if (!kept.takes(rank[i])) {
      if (finite(scores, i)) merge.dropped[merge.dropped_count++] = i;
      continue;
    }
    rows.indices[r] = rows.first_token + i;
    if (overwritten == 0 || unreplaced.takes(rank[i])) {
      set_row(rows, r, i);
      if (finite(scores, i)) add_target(merge, r, i, scores.norm_sq[i]);
    } else {
      set_row(rows, r, basis[j++], in.blend == 1 ? -1 : i);
    }
    r++;
  }
}

// Makes the rows of compress if K = N: all tokens, as they are.
static void keep_all(const Input& in, Rows& rows) {
  for (int32_t i = 0; i < in.tokens; i++) {
    set_row(rows, i, i);
    rows.indices[i] = rows.first_token + i;
  }
}

// Appends the basis to the kept rows. If it has fewer than M tokens, its first one is repeated; if none, token 0 is.
static void append_basis(const Input& in, const Basis& basis, Rows& rows) {
  for (int32_t j = 0; j < in.max_basis; j++) {
    const int32_t token = j < basis.size ? basis.token[j] : basis.size ? basis.token[0] : 0;
    set_row(rows, in.keep + j, token);
    rows.indices[in.keep + j] = rows.first_token + token;
  }
}

// Makes the rows of merge() from kept [K] as the caller gives them: in any order, repeated or out of range;
// kept_targets [K] or null.
static void take_given_rows(const Input& in, const Scores& scores, const int64_t* kept, const uint8_t* kept_targets,
                            Rows& rows, Merge& merge) {
  int32_t* is_kept = merge.merged;  // scratch
  std::fill_n(is_kept, in.tokens, 0);
  for (int32_t r = 0; r < rows.count; r++) {
    const int32_t token = (int32_t)std::clamp<int64_t>(kept[r], 0, in.tokens - 1);
    set_row(rows, r, token);
    is_kept[token] = 1;
    if (finite(scores, token) && (!kept_targets || kept_targets[r])) add_target(merge, r, token, scores.norm_sq[token]);
  }
  for (int32_t i = 0; i < in.tokens; i++)
    if (!is_kept[i] && finite(scores, i)) merge.dropped[merge.dropped_count++] = i;
}

}  // namespace apet::cpu
