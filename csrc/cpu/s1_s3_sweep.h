// s1-s3. A token that meets a basis token p learns everything that p brings:
//
//   dot_n   = x_n . p                                     the only pass over the features
//   y_mn    = (dot_n - sum_j l_j y_jn) / L_mm             s2: forward substitution, l_j = y_j(p)
//   energy -= y_mn^2                                      s3: ||x||^2 - ||y||^2 so far
//   reach_n = min(reach_n, d^2(x_n, p))  or  energy_n     s1: the largest is the next basis token
//
// Reach only falls. So what it was some basis tokens ago bounds it from above, and a token below the largest reach that
// is up to date cannot be the next one: it may wait. One sweep over X [N, D] brings the first basis token and the norms
// (where the first one is not given, the norms come before), each further step reads the few tokens that may win
// (compress.cpp), and a last sweep takes the others past all that they have not met, which shares one reading of x_n.
//
// Bytes: 2 N D s (s bytes an element) and what the steps read, at worst N D s each; N (M + 5) words of state. A dot
// product is summed in one order, which D and the element type alone decide: kLanes running sums in float32, added
// every kFold vectors to totals in double (so that rounding grows with neither D nor M: about u of the result), then
// the lanes by halves. Norms are dots of a row with itself by the same routine: a repeated token is at distance exactly
// 0. The few operations per token and basis token that are left run in double too, which costs nothing beside the
// products.
//
// Four rows meet all their basis tokens block by block, out of L1. AVX-512 keeps the running sums of 4 rows x 3 basis
// tokens x 2 lanes in its 32 registers, where loads no longer hold up the products; AVX2 has 16, and 4 x 1 x 2.
//
// Included by loops.h alone, inside the namespace of its instruction set, as are vector.h and s5_merge.h.
#pragma once
#include "vector.h"

constexpr int kGroup = 4;
constexpr int kLanes = 2;
constexpr int kFold = 16;
constexpr int kTogether = 16;  // basis tokens: what they and kGroup rows have in a block stays in L1

// Adds x[r] . p[j] over [d0, d1), at most kFold steps, to P totals for each of R rows, and with Norms x[r] . x[r].
template <class E, int R, int P, bool Norms>
static inline void add_dots(const typename E::T* const* x, const typename E::T* const* p, int64_t d0, int64_t d1,
                            Total* norms, Total* products) {
  constexpr int64_t kStep = kLanes * E::N;
  constexpr int kP = P > 0 ? P : 1;
  const int64_t full = d0 + (d1 - d0) / kStep * kStep;
  V xx[R][kLanes] = {}, xp[kP][R][kLanes] = {};
  for (int64_t d = d0; d < full; d += kStep)
#pragma GCC unroll 2
    for (int h = 0; h < kLanes; h++) {
      V pv[kP];
#pragma GCC unroll 4
      for (int j = 0; j < P; j++) pv[j] = E::get(p[j] + d + h * E::N);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const V xv = in_register(E::get(x[r] + d + h * E::N));
        if (Norms) xx[r][h] = E::mad(xv, xv, xx[r][h]);
#pragma GCC unroll 4
        for (int j = 0; j < P; j++) xp[j][r][h] = E::mad(xv, pv[j], xp[j][r][h]);
      }
    }
#pragma GCC unroll 2
  for (int h = 0; h < kLanes; h++) {  // the last, incomplete step
    const int64_t d = full + h * E::N, n = smaller(d1 - d, E::N);
    if (n <= 0) continue;
    V pv[kP];
#pragma GCC unroll 4
    for (int j = 0; j < P; j++) pv[j] = E::get_n(p[j] + d, n);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const V xv = E::get_n(x[r] + d, n);
      if (Norms) xx[r][h] = E::mad(xv, xv, xx[r][h]);
#pragma GCC unroll 4
      for (int j = 0; j < P; j++) xp[j][r][h] = E::mad(xv, pv[j], xp[j][r][h]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    if (Norms) norms[r].add(xx[r][0] + xx[r][1]);
#pragma GCC unroll 4
    for (int j = 0; j < P; j++) products[j * R + r].add(xp[j][r][0] + xp[j][r][1]);
  }
}

// norm[r] = x[r] . x[r] where Norms, and dot[j * kTile + r] = x[r] . p[j], of R rows and at most kTogether basis
// tokens.
template <class E, int R, bool Norms>
static inline void dots(const typename E::T* const* x, const typename E::T* const* p, int count, int64_t dim,
                        double* norm, double* dot) {
  constexpr int64_t kBlock = kFold * kLanes * E::N;
  constexpr int kMost = W == 16 ? 3 : 1;
  Total norms[R], products[kTogether * R];
  for (int r = 0; r < R; r++) norms[r] = Total{};
  for (int i = 0; i < count * R; i++) products[i] = Total{};
  for (int64_t d0 = 0; d0 < dim; d0 += kBlock) {
    const int64_t d1 = smaller(dim, d0 + kBlock);
    int j = 0;
    if (Norms && count == 0) add_dots<E, R, 0, true>(x, p, d0, d1, norms, products);
    if (Norms && count > 0) add_dots<E, R, 1, true>(x, p, d0, d1, norms, products), j = 1;
    for (; j + kMost <= count; j += kMost) add_dots<E, R, kMost, false>(x, p + j, d0, d1, norms, products + j * R);
    for (; j < count; j++) add_dots<E, R, 1, false>(x, p + j, d0, d1, norms, products + j * R);
  }
  for (int r = 0; r < R; r++) {
    if (Norms) norm[r] = norms[r].sum();
    for (int j = 0; j < count; j++) dot[j * kTile + r] = products[j * R + r].sum();
  }
}

template <class T>
static inline const T* row(const Image& im, int64_t token) {
  return reinterpret_cast<const T*>(im.x) + token * im.stride_xn;
}

// The tokens that a loop is over: all of a range, or those that a list has there.
struct Range {
  int64_t operator[](int64_t i) const { return i; }
};
struct Listed {
  const int32_t* token;
  int64_t operator[](int64_t i) const { return token[i]; }
};

// dots() for n <= kTile tokens from tokens[begin] on.
template <class E, bool Norms, class Tokens>
static inline void tile_dots(const Image& im, Tokens tokens, int64_t begin, int64_t n, const typename E::T* const* p,
                             int count, double* norm, double* dot) {
  constexpr int R = Norms && W < 16 ? kGroup / 2 : kGroup;  // two sums a row: only AVX-512 has registers for four
  const typename E::T* x[R];
  int64_t i = 0;
  for (; i + R <= n; i += R) {
    for (int r = 0; r < R; r++) x[r] = row<typename E::T>(im, tokens[begin + i + r]);
    dots<E, R, Norms>(x, p, count, im.dim, norm + i, dot + i);
  }
  for (; i < n; i++) {
    x[0] = row<typename E::T>(im, tokens[begin + i]);
    dots<E, 1, Norms>(x, p, count, im.dim, norm + i, dot + i);
  }
}

// What tokens [t, t + n) start from, given their norms.
static inline void begin_tile(const Image& im, int64_t t, int64_t n, const double* norm) {
  for (int64_t i = 0; i < n; i++) {
    const float norm_sq = (float)norm[i];
    im.norm_sq[t + i] = im.energy[t + i] = norm_sq;
    im.reach[t + i] = norm_sq <= __FLT_MAX__ ? __builtin_inff() : kNever;
    im.met[t + i] = 0;
  }
}

template <class E>
static Best norms(const Image& im, int64_t begin, int64_t end) {
  Best best = {kNever, -1};
  for (int64_t t = begin; t < end; t += kTile) {
    const int64_t n = smaller(kTile, end - t);
    double norm[kTile];
    tile_dots<E, true>(im, Range{}, t, n, nullptr, 0, norm, nullptr);
    begin_tile(im, t, n, norm);
    for (int64_t i = t; i < t + n; i++)
      if (im.reach[i] != kNever && im.norm_sq[i] > best.value) best = {im.norm_sq[i], (int32_t)i};
  }
  return best;
}

// Basis token number j has met tokens[begin .. begin + n), with these dot products; y[i] is the new row of y.
template <class Tokens>
static inline void learn(const Image& im, int32_t j, Tokens tokens, int64_t begin, int64_t n, const double* dots) {
  const float p_norm_sq = im.basis_norm_sq[j];
  float dot[kTile], *y_j = im.y + (int64_t)j * im.tokens;
  double y[kTile];
  for (int64_t i = 0; i < n; i++) dot[i] = (float)dots[i];  // as norms are rounded: equal rows stay equal
  for (int64_t i = 0; i < n; i++) y[i] = dots[i];
  for (int32_t q = 0; q < j; q++) {
    const double l_q = im.factor[j][q];
    const float* y_q = im.y + (int64_t)q * im.tokens;
    for (int64_t i = 0; i < n; i++) y[i] -= l_q * y_q[tokens[begin + i]];
  }
  for (int64_t i = 0; i < n; i++) {
    const int64_t t = tokens[begin + i];
    y[i] *= im.inv_pivot[j];
    y_j[t] = (float)y[i];
    const float less = (float)(im.energy[t] - y[i] * y[i]);
    im.energy[t] = im.met[t] > j ? im.energy[t] : less;  // met by this token alone, while others of its tile waited
  }
  if (im.select == APET_FPS)
    for (int64_t i = 0; i < n; i++) {
      const int64_t t = tokens[begin + i];
      // Both differences are exact for near tokens, and neither overflows where d^2 itself does not.
      const float d = (im.norm_sq[t] - dot[i]) + (p_norm_sq - dot[i]);
      const float d_sq = d > 0 ? d : 0;
      im.reach[t] = d_sq < im.reach[t] ? d_sq : im.reach[t];
    }
  else
    for (int64_t i = 0; i < n; i++) {
      const int64_t t = tokens[begin + i];
      im.reach[t] = im.reach[t] == kNever ? kNever : im.energy[t];
    }
}

// tokens[begin .. end) meet the basis tokens that they have not met; returns the farthest of them. First: these have no
// norms yet, and are a Range.
template <class E, bool First, class Tokens>
static inline Best meet(const Image& im, Tokens tokens, int64_t begin, int64_t end) {
  using T = typename E::T;
  Best best = {kNever, -1};
  const int32_t to = im.basis_size;
  for (int64_t b = begin; b < end; b += kTile) {
    const int64_t n = smaller(kTile, end - b);
    int32_t from = First ? 0 : to;
    for (int64_t i = b; !First && i < b + n; i++) from = smaller(from, im.met[tokens[i]]);
    for (; from < to; from += kTogether) {
      const int count = smaller(to - from, kTogether);
      const T* p[kTogether];
      for (int j = 0; j < count; j++) p[j] = row<T>(im, im.basis[from + j]);
      double norm[kTile], dot[kTogether][kTile];
      tile_dots<E, First>(im, tokens, b, n, p, count, norm, dot[0]);
      if (First) {
        begin_tile(im, b, n, norm);
        if (b <= im.basis[0] && im.basis[0] < b + n) im.reach[im.basis[0]] = kNever;
      }
      for (int j = 0; j < count; j++) learn(im, from + j, tokens, b, n, dot[j]);
    }
    for (int64_t i = b; i < b + n; i++) {
      const int32_t t = (int32_t)tokens[i];
      im.met[t] = to;
      if (im.reach[t] > best.value || (im.reach[t] == best.value && t < best.token)) best = {im.reach[t], t};
    }
  }
  return best;
}

template <class E>
static Best sweep(const Image& im, int64_t begin, int64_t end) {
  return im.has_norms ? meet<E, false>(im, Range{}, begin, end) : meet<E, true>(im, Range{}, begin, end);
}
template <class E>
static Best step(const Image& im, int64_t begin, int64_t end) {
  return meet<E, false>(im, Listed{im.candidates}, begin, end);
}

// e^2 = (||x||^2 - ||y||^2) - ridge ||w||^2 with L^T w = y, from the last row up.
template <class E>
static void residual(const Image& im, int64_t begin, int64_t end) {
  sweep<E>(im, begin, end);
  const float rounding = 4.0f * (float)im.max_basis * 0x1p-24f;  // times ||x||^2: what float32 cannot tell from 0
  for (int64_t t = begin; t < end; t += kTile) {
    const int64_t n = smaller(kTile, end - t);
    double w[APET_MAX_BASIS][kTile], w_sq[kTile] = {};
    for (int32_t m = im.basis_size - 1; m >= 0; m--) {
      const float* y_m = im.y + (int64_t)m * im.tokens + t;
      for (int64_t i = 0; i < n; i++) w[m][i] = y_m[i];
      for (int32_t q = m + 1; q < im.basis_size; q++) {
        const double l = im.factor[q][m];
        for (int64_t i = 0; i < n; i++) w[m][i] -= l * w[q][i];
      }
      for (int64_t i = 0; i < n; i++) {
        w[m][i] *= im.inv_pivot[m];
        w_sq[i] += w[m][i] * w[m][i];
      }
    }
    for (int64_t i = 0; i < n; i++) {
      const float norm_sq = im.norm_sq[t + i], e_sq = (float)(im.energy[t + i] - im.ridge * w_sq[i]);
      const float rounded = e_sq > rounding * norm_sq ? e_sq : 0.0f;
      im.energy[t + i] = norm_sq <= __FLT_MAX__ ? rounded : __builtin_inff();
    }
  }
}
