// s1 in rounds: updates every token with the picks of a round.
//
//   products  = x_n . p                     of the new picks p: one matrix product, one reading of X
//   z         = products - y_products       sum_j y_j(p) y_j(x_n) over the picks of earlier rounds: also a product
//   y         = L^-1 z                      forward substitution in the round, on the tokens of a block side by side
//   resid_sq  = resid_sq - sum y^2          the remaining part of ||x||^2
//
// Before that it computes the residual Gram matrix of a pool of candidates, products minus y_products, from which
// s1_pool.h makes the picks. The sums of y are float32, in the order of the picks.
//
// A round of b picks takes 2 N b D operations, and N b (2 M + b) for y. Included by loops.h alone, inside the namespace
// of its instruction set.
#pragma once
#include "product.h"
#include "weight.h"

// Packs y of one panel of factors, negated, for the picks of earlier rounds.
static void pack_y(const Factors& factors, Rounds& rounds, int64_t panel) {
  const auto row_of = [&](int64_t t) { return rounds.y + (int64_t)factors.token[t] * rounds.width; };
  const int64_t t0 = panel * NR, width = smaller(NR, padded(factors.count) - t0);
  pack_panel<Widened<float>, true>(row_of, t0, factors.count, width, rounds.begin, 0, rounds.begin,
                                   rounds.packed_y + t0 * rounds.begin);
}

// Subtracts from tile the y_products of the tokens of a block with the factors of a panel: sums of y_j(x_n) y_j(p) over
// the picks of earlier rounds.
template <int Vectors, class Tokens>
static inline void subtract_y_products(const Rounds& rounds, Tokens tokens, int64_t begin, int64_t t0,
                                       RowBlock& block) {
  constexpr int R = rows_of(Vectors);
  const char* a[R];
  for (int64_t k = 0; k < rounds.begin; k += kPartUnits)
    for (int64_t i = 0; i < block.count; i += R) {
      for (int r = 0; r < R; r++)
        a[r] = reinterpret_cast<const char*>(rounds.y + tokens[begin + smaller(i + r, block.count - 1)] * rounds.width +
                                             k);
      multiply<Widened<float>, Vectors>(a, rounds.packed_y + t0 * rounds.begin + k * Vectors * W,
                                        smaller(kPartUnits, rounds.begin - k), block.tile + i * NR, false);
    }
}

// Computes rows [begin, end) of the residual Gram matrix of the pool, which is packed: only the upper triangle.
template <class E>
static void pool_gram(const Input& in, const Rows& rows, const Factors& pool, Rounds& rounds, int64_t begin,
                      int64_t end, void* scratch) {
  const int64_t step = block_rows<E>(pool.count, in.dim);
  const Listed tokens{pool.token};
  RowBlock block;
  for (int64_t i0 = begin; i0 < end; i0 += step) {
    load_block<E, false>(in, tokens, i0, smaller(step, end - i0), pool.count, scratch, block);
    each_panel<E>(in, rows, pool, [&](auto width, const float* panel, int64_t t0) {
      constexpr int Vectors = decltype(width)::Vectors;
      if (t0 + Vectors * W <= i0) return;
      multiply_panel<E, Vectors>(in, block, panel);
      subtract_y_products<Vectors>(rounds, tokens, i0, t0, block);
      const int64_t count = smaller(Vectors * W, pool.count - t0);
      for (int64_t i = 0; i < block.count; i++)
        __builtin_memcpy(rounds.gram + (i0 + i) * pool.count + t0, block.tile + i * NR, count * sizeof(float));
    });
  }
}

static size_t round_scratch_bytes(int64_t picks) { return (size_t)(picks * kBlockRows) * 4; }

// Replaces z [size, kBlockRows] of a block's tokens by their y, and writes the sums of the squares of y into sum_sq.
static inline void substitute(const Rounds& rounds, float* z, float* sum_sq) {
  // Vectors of tokens at a time: their independent sums hide the latency of fma.
  constexpr int kTokens = kBlockRows % (6 * W) == 0 ? 6 : 4;
  static_assert(kBlockRows % (kTokens * W) == 0, "a block is whole groups of vectors");
  for (int64_t i = 0; i < kBlockRows; i += kTokens * W) {
    V sum[kTokens] = {};
    for (int64_t j = 0; j < rounds.size; j++) {
      float* z_j = z + j * kBlockRows + i;
      V y[kTokens];
      for (int v = 0; v < kTokens; v++) y[v] = load(z_j + v * W);
      for (int64_t q = 0; q < j; q++) {
        const V l = splat(-rounds.L[j * rounds.most + q]);
        const float* y_q = z + q * kBlockRows + i;
        for (int v = 0; v < kTokens; v++) y[v] = fma(l, load(y_q + v * W), y[v]);
      }
      const V inv_diag = splat(rounds.inv_diag[j]);
      for (int v = 0; v < kTokens; v++) {
        y[v] = y[v] * inv_diag;
        store(z_j + v * W, y[v]);
        sum[v] = fma(y[v], y[v], sum[v]);
      }
    }
    for (int v = 0; v < kTokens; v++) store(sum_sq + i + v * W, sum[v]);
  }
}

// Updates tokens [begin, end) with the picks of this round, which are packed.
template <class E>
static void round(const Input& in, const Rows& rows, const Factors& picks, Scores& s, Rounds& rounds, Centres& centres,
                  int64_t begin, int64_t end, void* scratch) {
  const int64_t step = block_rows<E>(picks.count, in.dim);
  float* z = static_cast<float*>(scratch);  // [size, kBlockRows]
  void* wide = z + rounds.size * kBlockRows;
  // The last block may have fewer tokens than substitute() computes with.
  __builtin_memset(z, 0, round_scratch_bytes(rounds.size));
  RowBlock block;
  float sum_sq[kBlockRows];
  for (int64_t i0 = begin; i0 < end; i0 += step) {
    load_block<E, false>(in, Range{}, i0, smaller(step, end - i0), picks.count, wide, block);
    each_panel<E>(in, rows, picks, [&](auto width, const float* panel, int64_t t0) {
      constexpr int Vectors = decltype(width)::Vectors;
      multiply_panel<E, Vectors>(in, block, panel);
      for (int64_t i = 0; i < block.count; i++)
        for (int v = 0; v < Vectors; v++)
          store(centres.product + (i0 + i) * centres.width + rounds.begin + t0 + v * W,
                load(block.tile + i * NR + v * W));
      subtract_y_products<Vectors>(rounds, Range{}, i0, t0, block);
      const int64_t count = smaller(Vectors * W, picks.count - t0);
      for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < block.count; i++) z[(t0 + t) * kBlockRows + i] = block.tile[i * NR + t];
    });
    substitute(rounds, z, sum_sq);
    for (int64_t i = 0; i < block.count; i++) {
      const int64_t n = i0 + i;
      float* y = rounds.y + n * rounds.width + rounds.begin;
      for (int64_t j = 0; j < rounds.size; j++) y[j] = z[j * kBlockRows + i];
      s.resid_sq[n] = s.resid_sq[n] - sum_sq[i];
      s.pick_value[n] = s.pick_value[n] == kNeverPicked ? kNeverPicked : weighted(s.weight, n, s.resid_sq[n]);
    }
  }
}
