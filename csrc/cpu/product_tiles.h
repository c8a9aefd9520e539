// The products of product.h in tiles of AMX: a row block x one panel, 32 rows x 32 factors at a time.
//
//              +- 16 factors -+- 16 factors -+
//   B          | tile 6       | tile 7       |     16 units of the packed panel, as they lie there
//              +--------------+--------------+
//   A 16 rows  | tile 0       | tile 1       |     A: tiles 4 and 5, 16 units of rows that load_block() has copied
//     16 rows  | tile 2       | tile 3       |        one after the other, zeros behind their ends
//              +--------------+--------------+
//
// Sums in tiles 0 to 3 run over E::kChain products and are then added up in RowBlock::tile: a chain is 16 sums of 32
// products (tiles.h). Its part of a panel (32 KB for 32 factors) stays in L1 for all rows of the block.
//
// Included by product.h alone, inside the namespace of its instruction set.
#pragma once
#include "tiles.h"

// Copies the rows of tokens[begin .. begin + count) to scratch, and completes the last tile of rows with zeros.
template <class E, class Tokens>
static inline void copy_rows(const Input& in, Tokens tokens, int64_t begin, int64_t count, char* scratch,
                             RowBlock& block) {
  using T = typename E::T;
  const int64_t bytes = scratch_row_bytes<E>(in.dim), used = in.dim * (int64_t)sizeof(T);
  for (int64_t i = 0; i < count; i++) {
    block.rows[i] = scratch + i * bytes;
    __builtin_memcpy(scratch + i * bytes, row<T>(in, tokens[begin + i]), used);
    __builtin_memset(scratch + i * bytes + used, 0, bytes - used);
  }
  const int64_t empty = (kTileRows - count % kTileRows) % kTileRows;
  __builtin_memset(scratch + count * bytes, 0, empty * bytes);
}

// sums [RowTiles 16, ColumnTiles Columns] (+)= rows x factors over `count` units.
template <class T, int RowTiles, int ColumnTiles, int Columns>
static inline void multiply_block(Tiles& tiles, const char* rows, int64_t row_bytes, const float* panel,
                                  int64_t panel_width, int64_t count, float* sums, bool first) {
  tiles.zero<0>();
  tiles.zero<1>();
  tiles.zero<2>();
  tiles.zero<3>();
  float last[kTilePairs * ColumnTiles * Columns];
  for (int64_t k = 0; k < count; k += kTilePairs) {
    const float* b = panel + k * panel_width;
    int64_t width = panel_width;
    if (count - k < kTilePairs) {  // the panel ends here, and zeros complete the tile
      width = ColumnTiles * Columns;
      __builtin_memset(last, 0, sizeof last);
      for (int64_t i = 0; i < count - k; i++) __builtin_memcpy(last + i * width, b + i * panel_width, 4 * width);
      b = last;
    }
    tiles.load<4>(rows + 4 * k, row_bytes);
    tiles.load<6>(b, 4 * width);
    tiles.multiply<T, 0, 4, 6>();
    if (ColumnTiles > 1) {
      tiles.load<7>(b + Columns, 4 * width);
      tiles.multiply<T, 1, 4, 7>();
    }
    if (RowTiles > 1) {
      tiles.load<5>(rows + kTileRows * row_bytes + 4 * k, row_bytes);
      tiles.multiply<T, 2, 5, 6>();
      if (ColumnTiles > 1) tiles.multiply<T, 3, 5, 7>();
    }
  }
  float added[2][2][kTileRows * Columns];
  tiles.store<0>(added[0][0], 4 * Columns);
  if (ColumnTiles > 1) tiles.store<1>(added[0][1], 4 * Columns);
  if (RowTiles > 1) tiles.store<2>(added[1][0], 4 * Columns);
  if (RowTiles > 1 && ColumnTiles > 1) tiles.store<3>(added[1][1], 4 * Columns);
  for (int i = 0; i < RowTiles; i++)
    for (int r = 0; r < kTileRows; r++)
      for (int j = 0; j < ColumnTiles; j++)
        for (int v = 0; v < Columns; v += W) {
          float* sum = sums + (i * kTileRows + r) * NR + j * Columns + v;
          const V more = load(added[i][j] + r * Columns + v);
          store(sum, first ? more : load(sum) + more);
        }
}

// RowBlock::tile = the copied rows of the block x one panel of `Vectors` vectors.
template <class E, int Vectors>
static inline void multiply_in_tiles(const Input& in, RowBlock& block, const float* panel) {
  constexpr int Width = Vectors * W, Columns = W;
  using T = typename E::T;
  constexpr int64_t kUnits = E::kChain * W / E::Packed::N;
  static_assert(kUnits % kTilePairs == 0, "a chain is whole tiles");
  const int64_t bytes = scratch_row_bytes<E>(in.dim), count = units<E>(in.dim);
  const int64_t row_tiles = (block.count + kTileRows - 1) / kTileRows;
  Tiles tiles(Columns);
  for (int64_t k = 0; k < count; k += kUnits)
    for (int t = 0; t < Width; t += 2 * Columns)
      for (int64_t i = 0; i < row_tiles; i += 2) {
        const char* rows = block.rows[0] + i * kTileRows * bytes + 4 * k;
        const float* factors = panel + k * Width + t;
        float* sums = block.tile + i * kTileRows * NR + t;
        const int64_t n = smaller(kUnits, count - k);
        const bool two_rows = i + 1 < row_tiles, two_columns = t + Columns < Width;
        if (two_rows && two_columns)
          multiply_block<T, 2, 2, Columns>(tiles, rows, bytes, factors, Width, n, sums, k == 0);
        else if (two_rows) multiply_block<T, 2, 1, Columns>(tiles, rows, bytes, factors, Width, n, sums, k == 0);
        else if (two_columns) multiply_block<T, 1, 2, Columns>(tiles, rows, bytes, factors, Width, n, sums, k == 0);
        else multiply_block<T, 1, 1, Columns>(tiles, rows, bytes, factors, Width, n, sums, k == 0);
      }
}
