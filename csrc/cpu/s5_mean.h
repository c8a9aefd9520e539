// s5, second half: the rows of the result.
//
//   out[r] = (x_r + sum of the dropped tokens merged into it) / (1 + their count)      float32, ascending position
//
// A row without merged tokens is copied bit for bit; one with row_blend is blend * x[row_token] + (1 - blend) *
// x[row_blend]. Four vectors of features are computed at a time, so that their sums stay in registers while the dropped
// tokens are read.
//
// Included by loops.h alone, inside the namespace of its instruction set.
#pragma once
#include "dot.h"

// out = (x + sum of the tokens merged[first .. last)) / (1 + their count), features [d0, d1).
template <class T, class Out>
static inline void mean_of(const Input& in, const T* x, const int32_t* merged, int32_t first, int32_t last, int64_t d0,
                           int64_t d1, Out* out) {
  constexpr int kWide = 4;
  const V count = splat((float)(1 + last - first));
  int64_t d = d0;
  for (; d + kWide * W <= d1; d += kWide * W) {
    V total[kWide];
    for (int v = 0; v < kWide; v++) total[v] = load(x + d + v * W);
    for (int32_t q = first; q < last; q++) {
      const T* dropped = row<T>(in, merged[q]) + d;
      for (int v = 0; v < kWide; v++) total[v] = total[v] + load(dropped + v * W);
    }
    for (int v = 0; v < kWide; v++) store(out + d + v * W, total[v] / count);
  }
  for (; d < d1; d += W) {
    const int64_t n = smaller(W, d1 - d);
    V total = load_n(x + d, n);
    for (int32_t q = first; q < last; q++) total = total + load_n(row<T>(in, merged[q]) + d, n);
    store_n(out + d, total / count, n);
  }
}

// Computes features [d0, d1) of rows [begin, end).
template <class T>
static void mean(const Input& in, const Rows& rows, const Merge& merge, int64_t begin, int64_t end, int64_t d0,
                 int64_t d1) {
  for (int64_t r = begin; r < end; r++) {
    const T* x = row<T>(in, rows.row_token[r]);
    T* out = reinterpret_cast<T*>(rows.out) + r * in.dim;
    const int32_t first = merge.row_begin[r], last = merge.row_begin[r + 1];
    if (rows.row_blend[r] >= 0) {
      const T* other = row<T>(in, rows.row_blend[r]);
      const V blend = splat(in.blend), complement = splat(1.0f - in.blend);
      for (int64_t d = d0; d < d1; d += W) {
        const int64_t n = smaller(W, d1 - d);
        store_n(out + d, fma(blend, load_n(x + d, n), complement * load_n(other + d, n)), n);
      }
    } else if (first == last) {
      __builtin_memcpy(out + d0, x + d0, (size_t)(d1 - d0) * sizeof(T));
    } else {
      mean_of(in, x, merge.merged, first, last, d0, d1, out);
    }
  }
}
