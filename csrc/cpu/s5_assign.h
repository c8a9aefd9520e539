// s5, first half: the merge target of every dropped token, arg max_t x.t / ||t|| (the length of x changes no arg-max).
//
// similarity [dropped, T] is a matrix product (product.h) that is never stored: each tile updates a running arg-max per
// row. Targets stay unnormalised; the arg-max multiplies by 1 / ||t|| in float32.
//
// Included by loops.h alone, inside the namespace of its instruction set.
#pragma once
#include "product.h"

// The best targets so far of the rows of a block, lane by lane.
struct Best {
  V similarity[kBlockRows];
  I target[kBlockRows];
};

// Updates the best targets with the products of a panel of `Vectors` vectors, whose first target is t0.
template <int Vectors>
static inline void take_best(const Merge& merge, const RowBlock& block, Best& best, int64_t t0) {
  I lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  for (int64_t i = 0; i < block.count; i++)
    for (int v = 0; v < Vectors; v++) {
      const V dot = load(block.products(i) + v * W);
      const V similarity = dot * load(merge.inv_norm + t0 + v * W) + load(merge.padding + t0 + v * W);
      const I wins = similarity > best.similarity[i];  // a tie stays with the lower target
      best.similarity[i] = wins ? similarity : best.similarity[i];
      best.target[i] = wins ? lane + (int32_t)(t0 + v * W) : best.target[i];
    }
}

template <class E>
static void assign(const Input& in, const Rows& rows, const Factors& targets, Merge& merge, int64_t begin, int64_t end,
                   void* scratch) {
  const int64_t step = block_rows<E>(targets.count, in.dim);
  RowBlock block;
  Best best;
  for (int64_t i0 = begin; i0 < end; i0 += step) {
    load_block<E, true>(in, Listed{merge.dropped}, i0, smaller(step, end - i0), targets.count, scratch, block);
    for (int64_t i = 0; i < block.count; i++) {
      best.similarity[i] = splat(-__builtin_inff());
      best.target[i] = I{};
    }
    each_panel<E>(in, rows, targets, [&](auto width, const float* panel, int64_t t0) {
      multiply_panel<E, decltype(width)::Vectors>(in, block, panel);
      take_best<decltype(width)::Vectors>(merge, block, best, t0);
    });
    for (int64_t i = 0; i < block.count; i++) {
      float most = best.similarity[i][0];
      int32_t target = best.target[i][0];
      for (int l = 1; l < W; l++) {
        const float value = best.similarity[i][l];
        const int32_t other = best.target[i][l];
        if (value > most || (value == most && other < target)) most = value, target = other;
      }
      merge.target[i0 + i] = target;
    }
  }
}
