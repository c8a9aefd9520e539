// s3: the residual, from the last y of every token.
//
//   w    = L^-T y                                   back substitution, from the last row up
//   e_sq = ||x||^2 - ||y||^2 - ridge ||w||^2        0 if that is within rounding of 0
//
// It takes N M^2 operations and one reading of y. Included by loops.h alone, inside the namespace of its instruction
// set.
#pragma once
#include "s1_s3_sweep.h"
#if defined(APET_TILES)
#include "dot_tiles.h"
#endif

// Not tuned: with fewer basis tokens there is little to multiply, and the sums of dot.h are a little more exact.
constexpr int kLeastInTiles = 4;

// Packs the basis, if its products are computed in tiles.
template <class E>
static void pack_basis(const Input& in, Basis& basis) {
#if defined(APET_TILES)
  if (basis.size >= kLeastInTiles) pack_in_tiles<E>(in, basis);
#else
  (void)in, (void)basis;
#endif
}
// Returns the floats of Basis::packed.
template <class E>
static size_t packed_basis_floats(int64_t basis, int64_t dim) {
#if defined(APET_TILES)
  if (basis >= kLeastInTiles) return (size_t)(((basis + W - 1) / W * W) * chains(dim) * kChainPairs);
#endif
  (void)basis, (void)dim;
  return 0;
}

// Updates tokens [begin, end) with the basis tokens that they do not include yet. In tiles, with all of them again: so
// all tokens have sums of one order, and repeated tokens the same residual.
template <class E>
static inline void complete(const Input& in, const Basis& basis, Scores& s, int64_t begin, int64_t end) {
#if defined(APET_TILES)
  if (basis.size >= kLeastInTiles) {
    Tiles tiles(W);
    for (int64_t t = begin; t < end; t += kTile) {
      const int64_t n = smaller(kTile, end - t);
      for (int64_t i = t; i < t + n; i++) s.resid_sq[i] = s.norm_sq[i], s.steps_done[i] = 0;
      for (int32_t b = 0; b < basis.size; b += W) {
        double dot[W][kTile];
        dots_in_tiles<typename E::T>(tiles, in, basis, b, t, n, dot);
        for (int32_t k = b; k < smaller(b + W, basis.size); k++)
          add_step<true>(in, basis, s, k, Range{}, t, n, dot[k - b]);
      }
    }
    return;
  }
#endif
  add_steps<E, false, true>(in, basis, s, Range{}, begin, end);
}

template <class E>
static void residual(const Input& in, const Basis& basis, Scores& s, int64_t begin, int64_t end) {
  complete<E>(in, basis, s, begin, end);
  const float* weight = s.weight;
  const float rounding = 4.0f * (float)in.max_basis * 0x1p-24f;  // times ||x||^2: the rounding error of float32
  for (int64_t t = begin; t < end; t += kTile) {
    const int64_t n = smaller(kTile, end - t);
    double w[APET_MAX_BASIS][kTile], w_sq[kTile] = {};
    for (int32_t j = basis.size - 1; j >= 0; j--) {
      const float* y_j = s.y + (int64_t)j * in.tokens + t;
      for (int64_t i = 0; i < n; i++) w[j][i] = y_j[i];
      for (int32_t q = j + 1; q < basis.size; q++) {
        const double l = basis.L[q][j];
        for (int64_t i = 0; i < n; i++) w[j][i] -= l * w[q][i];
      }
      for (int64_t i = 0; i < n; i++) {
        w[j][i] *= basis.inv_diag[j];
        w_sq[i] += w[j][i] * w[j][i];
      }
    }
    float norm_sq[kTile], e_sq[kTile];  // e_sq may be the memory of resid_sq: copies let the loop be vectorised
    for (int64_t i = 0; i < n; i++) norm_sq[i] = s.norm_sq[t + i];
    for (int64_t i = 0; i < n; i++) {
      const float difference = (float)(s.resid_sq[t + i] - in.ridge * w_sq[i]);
      e_sq[i] = difference > rounding * norm_sq[i] ? difference : 0.0f;
    }
    if (weight)
      for (int64_t i = 0; i < n; i++) e_sq[i] = weighted(weight, t + i, e_sq[i]);
    for (int64_t i = 0; i < n; i++) s.e_sq[t + i] = norm_sq[i] <= __FLT_MAX__ ? e_sq[i] : __builtin_inff();
  }
}
