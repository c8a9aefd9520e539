// s1-s3 in one sweep: for each basis token p, one pass over X [N, D] does everything that p brings.
//
//   dot_n   = x_n . p                                     the only pass over the features
//   y_mn    = (dot_n - sum_j l_j y_jn) / L_mm             s2: forward substitution, l_j = y_j(p)
//   energy -= y_mn^2                                      s3: ||x||^2 - ||y||^2 so far
//   reach_n = min(reach_n, d^2(x_n, p))  or  energy_n     s1: the largest is the next basis token
//
// Bytes: N D s a step (s bytes an element), M + 1 steps with the norms; N (M + 3) floats of state. A dot product is
// summed in one order, which D and the element type alone decide: kLanes running sums in float32, added every kFold
// vectors to totals in double (so that rounding grows with neither D nor M: about u of the result), then the lanes by
// halves. Norms are dots of a row with itself by the same routine: a repeated token is at distance exactly 0. The few
// operations per token and step that are left run in double too, which costs nothing beside the pass.
//
// Four rows share each load of p: 4 x 2 running sums, 2 x p, 1 x x_n fit the 16 registers of AVX2.
//
// Included by loops.h alone, inside the namespace of its instruction set, as are vector.h and s5_merge.h.
#pragma once
#include "vector.h"

constexpr int kGroup = 4;
constexpr int kBothGroup = W == 16 ? 4 : 2;
constexpr int kLanes = 2;
constexpr int kFold = 16;

// norm[r] = x[r] . x[r] and product[r] = x[r] . p for R rows, or one of them.
template <class E, int R, bool Norms, bool Products>
static inline void dots(const typename E::T* const* x, const typename E::T* p, int64_t dim, double* norm,
                        double* product) {
  constexpr int64_t kStep = kLanes * E::N, kBlock = kFold * kStep;
  Total norms[R], products[R];
  for (int64_t d0 = 0; d0 < dim; d0 += kBlock) {
    const int64_t d1 = smaller(dim, d0 + kBlock), full = d0 + (d1 - d0) / kStep * kStep;
    V xx[R][kLanes] = {}, xp[R][kLanes] = {};
    for (int64_t d = d0; d < full; d += kStep)
      for (int h = 0; h < kLanes; h++) {
        const V pv = Products ? E::get(p + d + h * E::N) : V{};
        for (int r = 0; r < R; r++) {
          const V xv = E::get(x[r] + d + h * E::N);
          if (Norms) xx[r][h] = E::mad(xv, xv, xx[r][h]);
          if (Products) xp[r][h] = E::mad(xv, pv, xp[r][h]);
        }
      }
    for (int h = 0; h < kLanes; h++) {  // the last, incomplete step
      const int64_t d = full + h * E::N, n = smaller(d1 - d, E::N);
      if (n <= 0) break;
      const V pv = Products ? E::get_n(p + d, n) : V{};
      for (int r = 0; r < R; r++) {
        const V xv = E::get_n(x[r] + d, n);
        if (Norms) xx[r][h] = E::mad(xv, xv, xx[r][h]);
        if (Products) xp[r][h] = E::mad(xv, pv, xp[r][h]);
      }
    }
    for (int r = 0; r < R; r++) {
      if (Norms) norms[r].add(xx[r][0] + xx[r][1]);
      if (Products) products[r].add(xp[r][0] + xp[r][1]);
    }
  }
  for (int r = 0; r < R; r++) {
    if (Norms) norm[r] = norms[r].sum();
    if (Products) product[r] = products[r].sum();
  }
}

template <class T>
static inline const T* row(const Image& im, int64_t token) {
  return reinterpret_cast<const T*>(im.x) + token * im.stride_xn;
}

// dots() for tokens [begin, begin + n).
template <class E, bool Norms, bool Products>
static inline void tile_dots(const Image& im, const typename E::T* p, int64_t begin, int64_t n, double* norm,
                             double* product) {
  constexpr int kRows = Norms && Products ? kBothGroup : kGroup;
  const typename E::T* x[kRows];
  int64_t i = 0;
  for (; i + kRows <= n; i += kRows) {
    for (int r = 0; r < kRows; r++) x[r] = row<typename E::T>(im, begin + i + r);
    dots<E, kRows, Norms, Products>(x, p, im.dim, norm + i, product + i);
  }
  for (; i < n; i++) {
    x[0] = row<typename E::T>(im, begin + i);
    dots<E, 1, Norms, Products>(x, p, im.dim, norm + i, product + i);
  }
}

static inline Best farther(Best best, const float* value, int64_t begin, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if (value[i] > best.value) best = {value[i], (int32_t)(begin + i)};
  return best;
}

// What tokens [t, t + n) start from, given their norms.
static inline void begin_tile(const Image& im, int64_t t, int64_t n, const double* norm) {
  for (int64_t i = 0; i < n; i++) {
    const float norm_sq = (float)norm[i];
    im.norm_sq[t + i] = im.energy[t + i] = norm_sq;
    im.reach[t + i] = norm_sq <= __FLT_MAX__ ? __builtin_inff() : kNever;
  }
}

template <class E>
static Best norms(const Image& im, int64_t begin, int64_t end) {
  Best best = {kNever, -1};
  for (int64_t t = begin; t < end; t += kTile) {
    const int64_t n = smaller(kTile, end - t);
    double norm[kTile];
    float finite[kTile];
    tile_dots<E, true, false>(im, nullptr, t, n, norm, norm);
    begin_tile(im, t, n, norm);
    for (int64_t i = 0; i < n; i++) finite[i] = im.reach[t + i] == kNever ? kNever : im.norm_sq[t + i];
    best = farther(best, finite, t, n);
  }
  return best;
}

template <class E>
static Best sweep(const Image& im, int32_t step, int64_t begin, int64_t end) {
  const int32_t p = im.basis[step];
  const typename E::T* const x_p = row<typename E::T>(im, p);
  const float p_norm_sq = im.newest_norm_sq;  // not norm_sq[p], which another thread may be writing just now
  Best best = {kNever, -1};
  for (int64_t t = begin; t < end; t += kTile) {
    const int64_t n = smaller(kTile, end - t);
    float dot[kTile], *energy = im.energy + t, *reach = im.reach + t;
    double y[kTile];
    if (im.has_norms) {
      tile_dots<E, false, true>(im, x_p, t, n, y, y);
    } else {
      double norm[kTile];
      tile_dots<E, true, true>(im, x_p, t, n, norm, y);
      begin_tile(im, t, n, norm);
      if (t <= p && p < t + n) im.reach[p] = kNever;
    }
    for (int64_t i = 0; i < n; i++) dot[i] = (float)y[i];  // as norms are rounded: equal rows stay equal
    for (int32_t j = 0; j < step; j++) {
      const double l_j = im.factor[step][j];
      const float* y_j = im.y + (int64_t)j * im.tokens + t;
      for (int64_t i = 0; i < n; i++) y[i] -= l_j * y_j[i];
    }
    float* y_m = im.y + (int64_t)step * im.tokens + t;
    for (int64_t i = 0; i < n; i++) {
      y[i] *= im.inv_pivot[step];
      y_m[i] = (float)y[i];
      energy[i] = (float)(energy[i] - y[i] * y[i]);
    }
    if (im.select == APET_FPS)
      for (int64_t i = 0; i < n; i++) {
        // Both differences are exact for near tokens, and neither overflows where d^2 itself does not.
        const float d = (im.norm_sq[t + i] - dot[i]) + (p_norm_sq - dot[i]);
        const float d_sq = d > 0 ? d : 0;
        reach[i] = d_sq < reach[i] ? d_sq : reach[i];
      }
    else
      for (int64_t i = 0; i < n; i++) reach[i] = reach[i] == kNever ? kNever : energy[i];
    best = farther(best, reach, t, n);
  }
  return best;
}

// e^2 = (||x||^2 - ||y||^2) - ridge ||w||^2 with L^T w = y, from the last row up.
static void residual(const Image& im, int64_t begin, int64_t end) {
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
