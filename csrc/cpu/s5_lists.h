// s5: the lists that are made before and after the similarities.
#pragma once
#include <algorithm>

#include "kernels.h"

namespace apet::cpu {

// Completes the targets to whole vectors, with padding that no token is assigned to.
static void pad_targets(const Kernels& kernels, Merge& merge) {
  std::fill_n(merge.padding, merge.target_count, 0.0f);
  for (int32_t t = merge.target_count; t % kernels.vector; t++) {
    merge.inv_norm[t] = 0;
    merge.padding[t] = -__builtin_inff();
  }
}

// Lists each row's dropped tokens, ascending: a counting sort of `dropped` by row.
static void group_by_row(const Rows& rows, Merge& merge) {
  int32_t* begin = merge.row_begin;
  std::fill_n(begin, rows.count + 1, 0);
  for (int32_t i = 0; i < merge.dropped_count; i++) begin[merge.target_row[merge.target[i]] + 1]++;
  for (int32_t r = 0; r < rows.count; r++) begin[r + 1] += begin[r];
  for (int32_t i = 0; i < merge.dropped_count; i++)
    merge.merged[begin[merge.target_row[merge.target[i]]]++] = merge.dropped[i];
  for (int32_t r = rows.count; r > 0; r--) begin[r] = begin[r - 1];  // the sort has moved each begin to its end
  begin[0] = 0;
}

}  // namespace apet::cpu
