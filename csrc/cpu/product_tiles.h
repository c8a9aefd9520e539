// The products of product.h in tiles of AMX: a row block x one panel, 32 rows x 32 factors at a time.
//
//              +- 16 factors -+- 16 factors -+
//   B          | tile 6       | tile 7       |     16 units of the packed panel, tiles one after the other
//              +--------------+--------------+
//   A 16 rows  | tile 0       | tile 1       |     A: tiles 4 and 5, 16 units of rows that load_block() has copied,
//     16 rows  | tile 2       | tile 3       |        tiles one after the other, zeros behind the ends of rows
//              +--------------+--------------+
//
// Sums in tiles 0 to 3 run over E::kChain products and are then added up in RowBlock::tile: a chain is 16 sums of 32
// products (tiles.h). Its part of a panel (32 KB for 32 factors) stays in L1 for all rows of the block; rows are read
// past it, from L2. If the panels are farther away, the next part is fetched into L2 in the meantime.
//
// Included by product.h alone, inside the namespace of its instruction set.
#pragma once
#include "tiles.h"

constexpr int64_t kTileSize = kTileRows * kTileBytes;

// Copies the rows of tokens[begin .. begin + count) to scratch, tile by tile, and completes the last tiles with zeros.
template <class E, class Tokens>
static inline void copy_rows(const Input& in, Tokens tokens, int64_t begin, int64_t count, char* scratch,
                             RowBlock& block) {
  using T = typename E::T;
  constexpr int64_t kSteps = 16;  // of a row before the next row: these tiles stay in L1 until they are complete
  const int64_t bytes = in.dim * (int64_t)sizeof(T), whole = bytes / kTileBytes, left = bytes - whole * kTileBytes;
  const int64_t row_bytes = scratch_row_bytes<E>(in.dim), steps = row_bytes / kTileBytes;
  block.rows[0] = scratch;
  for (int64_t i0 = 0; i0 < count; i0 += kTileRows, scratch += kTileRows * row_bytes)
    for (int64_t k0 = 0; k0 < steps; k0 += kSteps)
      for (int64_t i = i0; i < i0 + kTileRows; i++) {
        char* to = scratch + (i - i0) * kTileBytes;
        int64_t k = k0;
        const int64_t end = smaller(k0 + kSteps, steps);
        if (i < count) {
          const char* from = reinterpret_cast<const char*>(row<T>(in, tokens[begin + i]));
          for (; k < smaller(end, whole); k++)
            __builtin_memcpy(to + k * kTileSize, from + k * kTileBytes, kTileBytes);
          if (k < end) {
            __builtin_memcpy(to + k * kTileSize, from + k * kTileBytes, left);
            __builtin_memset(to + k * kTileSize + left, 0, kTileBytes - left);
            k++;
          }
        }
        for (; k < end; k++) __builtin_memset(to + k * kTileSize, 0, kTileBytes);
      }
}

// What a product fetches into L2 in the meantime: so many lines with each of its steps, from `next` on.
struct Ahead {
  const char* next;
  int64_t lines;
};

// sums [RowTiles 16, ColumnTiles W] (+)= rows x factors over `count` steps. The second tile of rows is row_bytes from
// the first.
template <class T, int RowTiles, int ColumnTiles>
static inline void multiply_block(Tiles& tiles, const char* rows, int64_t row_bytes, const float* factors,
                                  int64_t count, float* sums, bool first, Ahead ahead) {
  constexpr int64_t kFactorTile = kTilePairs * W;  // floats
  tiles.zero<0>();
  tiles.zero<1>();
  tiles.zero<2>();
  tiles.zero<3>();
  for (int64_t k = 0; k < count; k++) {
    const float* b = factors + k * kFactorTile * ColumnTiles;
    const char* a = rows + k * kTileSize;
    tiles.load_past_l1<4>(a, kTileBytes);
    tiles.load<6>(b, 4 * W);
    tiles.multiply<T, 0, 4, 6>();
    if (ColumnTiles > 1) {
      tiles.load<7>(b + kFactorTile, 4 * W);
      tiles.multiply<T, 1, 4, 7>();
    }
    if (RowTiles > 1) {
      tiles.load_past_l1<5>(a + row_bytes, kTileBytes);
      tiles.multiply<T, 2, 5, 6>();
      if (ColumnTiles > 1) tiles.multiply<T, 3, 5, 7>();
    }
    for (int64_t i = 0; i < ahead.lines; i++) __builtin_prefetch(ahead.next + (k * ahead.lines + i) * 64, 0, 2);
  }
  if (first) {
    tiles.store<0>(sums, 4 * NR);
    if (ColumnTiles > 1) tiles.store<1>(sums + W, 4 * NR);
    if (RowTiles > 1) tiles.store<2>(sums + kTileRows * NR, 4 * NR);
    if (RowTiles > 1 && ColumnTiles > 1) tiles.store<3>(sums + kTileRows * NR + W, 4 * NR);
    return;
  }
  float added[2][2][kTileRows * W];
  tiles.store<0>(added[0][0], 4 * W);
  if (ColumnTiles > 1) tiles.store<1>(added[0][1], 4 * W);
  if (RowTiles > 1) tiles.store<2>(added[1][0], 4 * W);
  if (RowTiles > 1 && ColumnTiles > 1) tiles.store<3>(added[1][1], 4 * W);
  for (int i = 0; i < RowTiles; i++)
    for (int r = 0; r < kTileRows; r++)
      for (int j = 0; j < ColumnTiles; j++) {
        float* sum = sums + (i * kTileRows + r) * NR + j * W;
        store(sum, load(sum) + load(added[i][j] + r * W));
      }
}

// RowBlock::tile = the copied rows of the block x one panel of `Vectors` vectors.
template <class E, int Vectors>
static inline void multiply_in_tiles(const Input& in, RowBlock& block, const float* panel) {
  using T = typename E::T;
  constexpr int64_t kChainSteps = E::kChain / (2 * kTilePairs);
  const int64_t row_bytes = kTileRows * scratch_row_bytes<E>(in.dim), all = units<E>(in.dim);
  const int64_t steps = all / kTilePairs, row_tiles = (block.count + kTileRows - 1) / kTileRows;
  Tiles tiles(W);
  for (int t = 0; t < Vectors; t += 2)
    for (int64_t k = 0; k < steps; k += kChainSteps) {
      const bool two_columns = t + 1 < Vectors;
      const int64_t n = smaller(kChainSteps, steps - k), part = n * kTilePairs * W * (two_columns ? 2 : 1);
      const float* factors = panel + in_panel<E>(k * kTilePairs, t * W, Vectors * W, all);
      const int64_t pairs = (row_tiles + 1) / 2;
      Ahead ahead = {reinterpret_cast<const char*>(factors + part), 0};  // the panel's next part, or the next panel
      if (block.far) ahead.lines = (part * 4 / 64 + pairs * n - 1) / (pairs * n);
      for (int64_t i = 0; i < row_tiles; i += 2, ahead.next += ahead.lines * n * 64) {
        const char* rows = block.rows[0] + i * row_bytes + k * kTileSize;
        float* sums = block.tile + i * kTileRows * NR + t * W;
        const bool two_rows = i + 1 < row_tiles;
        if (two_rows && two_columns)
          multiply_block<T, 2, 2>(tiles, rows, row_bytes, factors, n, sums, k == 0, ahead);
        else if (two_rows) multiply_block<T, 2, 1>(tiles, rows, row_bytes, factors, n, sums, k == 0, ahead);
        else if (two_columns) multiply_block<T, 1, 2>(tiles, rows, row_bytes, factors, n, sums, k == 0, ahead);
        else multiply_block<T, 1, 1>(tiles, rows, row_bytes, factors, n, sums, k == 0, ahead);
      }
    }
}
