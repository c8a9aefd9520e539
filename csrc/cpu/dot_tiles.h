// The dot products of all tokens with a whole basis, in tiles of AMX: 16 tokens x W basis tokens at a time.
//
//                  W basis tokens     A: 32 features of 16 tokens, as they are in x; copied where fewer are left
//                +--------------+     B: the same features of the basis tokens, packed
//   B            | tile 6       |     C: sums over a chain of kChainSteps such products, which are then added to totals
//                +--------------+        in double, chain by chain
//   A 16 tokens  | C            |
//                +--------------+     Four groups of 16 tokens are multiplied at a time (C in tiles 0 to 3).
//
// A sum depends on its two rows and on D alone: a token has the same product beside any other tokens. But it is not
// the one of dot.h, so s3_residual.h uses one of the two for all tokens.
//
// Included by s3_residual.h alone, inside the namespace of its instruction set.
#pragma once
#include "tiles.h"

// 128 products: sums of longer chains would be less exact than those of dot.h.
constexpr int64_t kChainSteps = 4;
constexpr int64_t kChainBytes = kChainSteps * kTileBytes;
constexpr int64_t kChainPairs = kChainSteps * kTilePairs;

static inline int64_t chains(int64_t dim) { return (dim * 2 + kChainBytes - 1) / kChainBytes; }
// Returns where the W basis tokens from j on are in Basis::packed, from a chain on; zeros complete the last chain.
static inline float* basis_at(const Basis& basis, int64_t j, int64_t chain, int64_t dim) {
  return basis.packed + (j * chains(dim) + chain * W) * kChainPairs;
}

// Packs the basis: for every W tokens a tile for each step of each chain.
template <class E>
static inline void pack_in_tiles(const Input& in, Basis& basis) {
  using Packed = typename E::Packed;
  for (int64_t j = 0; j < basis.size; j += W) {
    float* packed = basis_at(basis, j, 0, in.dim);
    for (int64_t d = 0; d < chains(in.dim) * 2 * kChainPairs; d += Packed::N, packed += W * W) {
      const int64_t n = smaller(Packed::N, in.dim - d);
      V block[W] = {};
      for (int64_t i = 0; n > 0 && i < smaller(W, basis.size - j); i++)
        block[i] = Packed::get_n(row<typename E::T>(in, basis.token[j + i]) + d, n);
      transpose(block);
      for (int64_t i = 0; i < W; i++) store(packed + i * W, block[i]);
    }
  }
}

// A chain of the features of 16 tokens.
struct Group {
  const char* rows;
  int64_t stride;
  char copy[kTileRows * kChainBytes];
};

// Takes the 16 tokens from t on, of which `count` exist; zeros stand for the others.
template <class T>
static inline void take_group(const Input& in, int64_t t, int64_t count, int64_t chain, Group& group) {
  const int64_t from = chain * kChainBytes, bytes = smaller(in.dim * (int64_t)sizeof(T) - from, kChainBytes);
  if (count >= kTileRows && bytes == kChainBytes) {
    group.rows = reinterpret_cast<const char*>(row<T>(in, t)) + from;
    group.stride = in.stride_xn * (int64_t)sizeof(T);
    return;
  }
  group.rows = group.copy;
  group.stride = kChainBytes;
  __builtin_memset(group.copy, 0, sizeof group.copy);
  for (int64_t i = 0; i < smaller(count, kTileRows); i++)
    __builtin_memcpy(group.copy + i * kChainBytes, reinterpret_cast<const char*>(row<T>(in, t + i)) + from, bytes);
}

// sums [Groups 16, W] = rows of the groups x factors, over a chain.
template <class T, int Groups>
static inline void multiply_groups(Tiles& tiles, const Group* group, const float* factors, float* sums) {
  tiles.zero<0>();
  tiles.zero<1>();
  tiles.zero<2>();
  tiles.zero<3>();
  for (int64_t k = 0; k < kChainSteps; k++) {
    tiles.load<6>(factors + k * kTilePairs * W, 4 * W);
    tiles.load<4>(group[0].rows + k * kTileBytes, group[0].stride);
    tiles.multiply<T, 0, 4, 6>();
    if (Groups > 1) {
      tiles.load<5>(group[1].rows + k * kTileBytes, group[1].stride);
      tiles.multiply<T, 1, 5, 6>();
    }
    if (Groups > 2) {
      tiles.load<4>(group[2].rows + k * kTileBytes, group[2].stride);
      tiles.multiply<T, 2, 4, 6>();
    }
    if (Groups > 3) {
      tiles.load<5>(group[3].rows + k * kTileBytes, group[3].stride);
      tiles.multiply<T, 3, 5, 6>();
    }
  }
  tiles.store<0>(sums, 4 * W);
  if (Groups > 1) tiles.store<1>(sums + kTileRows * W, 4 * W);
  if (Groups > 2) tiles.store<2>(sums + 2 * kTileRows * W, 4 * W);
  if (Groups > 3) tiles.store<3>(sums + 3 * kTileRows * W, 4 * W);
}

// Computes dot[j][i] of the n <= kTile tokens from t on with the basis tokens b + j, for b a multiple of W and j < W.
template <class T>
static inline void dots_in_tiles(Tiles& tiles, const Input& in, const Basis& basis, int64_t b, int64_t t, int64_t n,
                                 double (*dot)[kTile]) {
  constexpr int kGroups = kTile / kTileRows;
  static_assert(kGroups == 4, "a group for each tile of sums");
  const int64_t groups = (n + kTileRows - 1) / kTileRows;
  const int64_t count = groups * kTileRows * W;
  alignas(64) float sums[kTile * W];
  double totals[kTile * W];
  for (int64_t i = 0; i < count; i++) totals[i] = 0;
  Group group[kGroups];
  for (int64_t chain = 0; chain < chains(in.dim); chain++) {
    for (int64_t g = 0; g < groups; g++) take_group<T>(in, t + g * kTileRows, n - g * kTileRows, chain, group[g]);
    const float* factors = basis_at(basis, b, chain, in.dim);
    switch (groups) {
      case 4: multiply_groups<T, 4>(tiles, group, factors, sums); break;
      case 3: multiply_groups<T, 3>(tiles, group, factors, sums); break;
      case 2: multiply_groups<T, 2>(tiles, group, factors, sums); break;
      case 1: multiply_groups<T, 1>(tiles, group, factors, sums); break;
    }
    for (int64_t i = 0; i < count; i++) totals[i] += sums[i];
  }
  for (int64_t j = 0; j < smaller(W, basis.size - b); j++)
    for (int64_t i = 0; i < n; i++) dot[j][i] = totals[i * W + j];
}
