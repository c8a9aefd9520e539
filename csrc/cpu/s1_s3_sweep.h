// s1 to s3 in one sweep: the values of a token x_n that follow from its dot product with basis token p = p_k.
//
//   dot         = x_n . p                                    dot.h: the only pass over the features
//   y[k, n]     = (dot - sum_j L[k, j] y[j, n]) / L[k, k]    s2: forward substitution
//   resid_sq[n] = resid_sq[n] - y[k, n]^2                    s3: ||x||^2 - ||y||^2
//   dist_sq[n]  = min(dist_sq[n], ||x_n - p||^2)             s1, fps
//
// s1 picks the token of largest pick_value, which is dist_sq (fps) or resid_sq (qr), times the token's weight. Both only decrease, so a value
// from some steps ago is an upper bound, and a token whose bound is below the largest up-to-date value cannot be picked
// next: it need not be updated. steps_done[n] counts the basis tokens that token n includes. The first sweep over X
// updates all tokens with the first basis token (and computes the norms, if they are not known yet), each later step
// updates the few tokens that may be picked (s1_basis.h), and the last sweep updates all others, which reads each x_n
// once for all of its basis tokens. Every dot product is computed once, and each token takes its basis tokens in order,
// so the bits are those of a full sweep per step. (In tiles, the last sweep computes all of them again: s3_residual.h.)
//
// Bytes read: 2 N D s (s bytes an element), and at worst N D s more for each step; N (M + 5) words of state. The
// arithmetic per token and basis token is done in double, which costs little compared with the dot products.
//
// Included by loops.h alone, inside the namespace of its instruction set.
#pragma once
#include "dot.h"
#include "weight.h"

// Initialises the state of tokens [t, t + n), before any basis token, from their norms.
static inline void begin_tile(Scores& s, int64_t t, int64_t n, const double* norm) {
  for (int64_t i = 0; i < n; i++) {
    const float norm_sq = (float)norm[i];
    s.norm_sq[t + i] = s.resid_sq[t + i] = norm_sq;
    s.pick_value[t + i] = norm_sq <= __FLT_MAX__ ? __builtin_inff() : kNeverPicked;
    s.steps_done[t + i] = 0;
  }
}

template <class E>
static Candidate norms(const Input& in, Scores& s, int64_t begin, int64_t end) {
  Candidate best = {kNeverPicked, -1};
  const float* weight = s.weight;
  for (int64_t t = begin; t < end; t += kTile) {
    const int64_t n = smaller(kTile, end - t);
    double norm[kTile], no_dots[kTile];
    tile_dots<E, true>(in, Range{}, t, n, nullptr, 0, norm, no_dots);
    begin_tile(s, t, n, norm);
    for (int64_t i = t; i < t + n; i++) {
      const float value = weighted(weight, i, s.norm_sq[i]);
      if (s.pick_value[i] != kNeverPicked && value > best.pick_value) best = {value, (int32_t)i};
    }
  }
  return best;
}

// Updates tokens[begin .. begin + n) with basis token k, given their dot products with it. Last: no token is picked any
// more, so pick_value stays as it is.
template <bool Last, class Tokens>
static inline void add_step(const Input& in, const Basis& basis, Scores& s, int32_t k, Tokens tokens, int64_t begin,
                            int64_t n, const double* dots) {
  const float p_norm_sq = basis.norm_sq[k];
  const float* weight = s.weight;
  float dot[kTile], *y_k = s.y + (int64_t)k * in.tokens;
  double y[kTile];
  for (int64_t i = 0; i < n; i++) dot[i] = (float)dots[i];  // rounded as the norms are: equal rows stay equal
  for (int64_t i = 0; i < n; i++) y[i] = dots[i];
  for (int32_t j = 0; j < k; j++) {
    const double l_j = basis.L[k][j];
    const float* y_j = s.y + (int64_t)j * in.tokens;
    for (int64_t i = 0; i < n; i++) y[i] -= l_j * y_j[tokens[begin + i]];
  }
  for (int64_t i = 0; i < n; i++) {
    const int64_t t = tokens[begin + i];
    y[i] *= basis.inv_diag[k];
    y_k[t] = (float)y[i];
    const float reduced = (float)(s.resid_sq[t] - y[i] * y[i]);
    s.resid_sq[t] = s.steps_done[t] > k ? s.resid_sq[t] : reduced;  // a tile starts at the oldest state of its tokens
  }
  if (Last) return;
  // One loop with the weights and one without: a test in the loop would cost a fifth of the call.
  const auto update = [&](auto weigh) {
    for (int64_t i = 0; i < n; i++) {
      const int64_t t = tokens[begin + i];
      if (in.select == APET_FPS) {
        // Both differences are exact for near tokens, and neither overflows where the distance itself does not.
        const float d = (s.norm_sq[t] - dot[i]) + (p_norm_sq - dot[i]);
        const float dist_sq = weigh(t, d > 0 ? d : 0);
        s.pick_value[t] = dist_sq < s.pick_value[t] ? dist_sq : s.pick_value[t];
      } else {
        s.pick_value[t] = s.pick_value[t] == kNeverPicked ? kNeverPicked : weigh(t, s.resid_sq[t]);
      }
    }
  };
  if (weight) update([&](int64_t t, float value) { return weighted(weight, t, value); });
  else update([](int64_t, float value) { return value; });
}

// Updates tokens[begin .. end) with the basis tokens that they do not include yet; returns the token of largest
// pick_value. First: it also computes their norms, and tokens is a Range. Last: as in add_step().
template <class E, bool First, bool Last, class Tokens>
static inline Candidate add_steps(const Input& in, const Basis& basis, Scores& s, Tokens tokens, int64_t begin,
                                  int64_t end) {
  using T = typename E::T;
  Candidate best = {kNeverPicked, -1};
  const int32_t m = basis.size;
  for (int64_t b = begin; b < end; b += kTile) {
    const int64_t n = smaller(kTile, end - b);
    int32_t k = First ? 0 : m;
    for (int64_t i = b; !First && i < b + n; i++) k = smaller(k, s.steps_done[tokens[i]]);
    for (; k < m; k += kTogether) {
      const int count = smaller(m - k, kTogether);
      const T* p[kTogether];
      for (int j = 0; j < count; j++) p[j] = row<T>(in, basis.token[k + j]);
      double norm[kTile], dot[kTogether][kTile];
      tile_dots<E, First>(in, tokens, b, n, p, count, norm, dot[0]);
      if (First) {
        begin_tile(s, b, n, norm);
        if (b <= basis.token[0] && basis.token[0] < b + n) s.pick_value[basis.token[0]] = kNeverPicked;
      }
      for (int j = 0; j < count; j++) add_step<Last>(in, basis, s, k + j, tokens, b, n, dot[j]);
    }
    for (int64_t i = b; i < b + n; i++) {
      const int32_t t = (int32_t)tokens[i];
      const float value = s.pick_value[t];
      s.steps_done[t] = m;
      if (value > best.pick_value || (value == best.pick_value && t < best.token)) best = {value, t};
    }
  }
  return best;
}

template <class E>
static Candidate sweep(const Input& in, const Basis& basis, Scores& s, int64_t begin, int64_t end) {
  return s.has_norms ? add_steps<E, false, false>(in, basis, s, Range{}, begin, end)
                     : add_steps<E, true, false>(in, basis, s, Range{}, begin, end);
}
template <class E>
static Candidate sweep_candidates(const Input& in, const Basis& basis, Scores& s, int64_t begin, int64_t end) {
  return add_steps<E, false, false>(in, basis, s, Listed{s.candidates}, begin, end);
}
