// Dot products of tokens with each other, the only pass over the features in s1 to s3.
//
// D and the element type alone decide the order of a sum: kSums running sums in float32 (vectors), added every kFold
// vectors to totals in double, so that rounding grows with neither D nor M (about u of the result); then the lanes of
// the totals, by halves. Squared norms are products of a row with itself by the same routine, so a repeated token is at
// distance exactly 0.
//
//   features    0       kStep                  kBlock = kFold kStep
//   x[0 .. R)   | sum 0 | sum 1 | sum 0 | ...  |    R x P x kSums sums in registers over a block,
//   p[0 .. P)   | sum 0 | sum 1 | sum 0 | ...  |    then added to R x P totals
//
// The rows of a group go block by block through all their basis tokens, out of L1. AVX-512 and NEON keep the sums of 4
// rows x 3 basis tokens x 2 sums in their 32 registers, so that loads do not limit the products. AVX2 has 16 registers
// and keeps the sums of 4 rows x 1 basis token x 2.
//
// Included by loops.h alone, inside the namespace of its instruction set.
#pragma once
#include "elements.h"

constexpr int kGroup = 4;
constexpr int kSums = 2;
constexpr int kTogether = 16;  // basis tokens per call of dots(): their blocks and those of the rows fit L1

// Adds x[r] . p[j] over [d0, d1), at most E::kFold steps, to P totals for each of R rows, and with Norms x[r] . x[r].
template <class E, int R, int P, bool Norms>
static inline void add_dots(const typename E::T* const* x, const typename E::T* const* p, int64_t d0, int64_t d1,
                            Total* norms, Total* products) {
  constexpr int64_t kStep = kSums * E::N;
  constexpr int kP = P > 0 ? P : 1;
  const int64_t full = d0 + (d1 - d0) / kStep * kStep;
  V xx[R][kSums] = {}, xp[kP][R][kSums] = {};
  for (int64_t d = d0; d < full; d += kStep)
#pragma GCC unroll 2
    for (int h = 0; h < kSums; h++) {
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
  for (int h = 0; h < kSums; h++) {  // the last, incomplete step
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

// Computes dot[j * kTile + r] = x[r] . p[j] of R rows and at most kTogether basis tokens, and if Norms
// norm[r] = x[r] . x[r].
template <class E, int R, bool Norms>
static inline void dots(const typename E::T* const* x, const typename E::T* const* p, int count, int64_t dim,
                        double* norm, double* dot) {
  constexpr int64_t kBlock = E::kFold * kSums * E::N;
  constexpr int kMost = kRegisters == 32 ? 3 : 1;
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
static inline const T* row(const Input& in, int64_t token) {
  return reinterpret_cast<const T*>(in.x) + token * in.stride_xn;
}

// The tokens that a loop is over: a range of positions, or a list of them.
struct Range {
  int64_t operator[](int64_t i) const { return i; }
};
struct Listed {
  const int32_t* token;
  int64_t operator[](int64_t i) const { return token[i]; }
};

// Calls dots() for n <= kTile tokens from tokens[begin] on.
template <class E, bool Norms, class Tokens>
static inline void tile_dots(const Input& in, Tokens tokens, int64_t begin, int64_t n, const typename E::T* const* p,
                             int count, double* norm, double* dot) {
  constexpr int R = Norms && kRegisters < 32 ? kGroup / 2 : kGroup;  // with Norms a row has two sums
  const typename E::T* x[R];
  int64_t i = 0;
  for (; i + R <= n; i += R) {
    for (int r = 0; r < R; r++) x[r] = row<typename E::T>(in, tokens[begin + i + r]);
    dots<E, R, Norms>(x, p, count, in.dim, norm + i, dot + i);
  }
  for (; i < n; i++) {
    x[0] = row<typename E::T>(in, tokens[begin + i]);
    dots<E, 1, Norms>(x, p, count, in.dim, norm + i, dot + i);
  }
}
