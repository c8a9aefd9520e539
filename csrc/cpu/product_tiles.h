// The products of product.h in tiles of AMX: a row block x one panel, 32 rows x 32 factors at a time.
//
//              +- 16 factors -+- 16 factors -+
//   B          | tile 6       | tile 7       |     16 units of the packed panel, tiles one after the other
//              +--------------+--------------+
//   A 16 rows  | tile 0       | tile 1       |     A: tiles 4 and 5, 16 units of rows: in x, or copied, then
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
static inline void copy_rows(const Input& in, Tokens tokens, int64_t begin, int64_t count, char* scratch) {
  using T = typename E::T;
  constexpr int64_t kSteps = 16;  // of a row before the next row: these tiles stay in L1 until they are complete
  const int64_t bytes = in.dim * (int64_t)sizeof(T), whole = bytes / kTileBytes, tail = bytes - whole * kTileBytes;
  const int64_t row_bytes = scratch_row_bytes<E>(in.dim), steps = row_bytes / kTileBytes;
  for (int64_t i0 = 0; i0 < count; i0 += kTileRows, scratch += kTileRows * row_bytes)
    for (int64_t k0 = 0; k0 < steps; k0 += kSteps)
      for (int64_t i = i0; i < i0 + kTileRows; i++) {
        char* copy = scratch + (i - i0) * kTileBytes;
        int64_t k = k0;
        const int64_t end = smaller(k0 + kSteps, steps);
        if (i < count) {
          const char* from = reinterpret_cast<const char*>(row<T>(in, tokens[begin + i]));
          for (; k < smaller(end, whole); k++)
            __builtin_memcpy(copy + k * kTileSize, from + k * kTileBytes, kTileBytes);
          if (k < end) {
            __builtin_memcpy(copy + k * kTileSize, from + k * kTileBytes, tail);
            __builtin_memset(copy + k * kTileSize + tail, 0, kTileBytes - tail);
            k++;
          }
        }
        for (; k < end; k++) __builtin_memset(copy + k * kTileSize, 0, kTileBytes);
      }
}

// Takes the rows of tokens[begin .. begin + count) for products with so many factors. Few factors are multiplied with
// the rows where they are, in x: if Gaps, with all from the first to the last, unless too many of them are not wanted.
template <class E, bool Gaps, class Tokens>
static inline void take_rows(const Input& in, Tokens tokens, int64_t begin, int64_t count, int64_t factors,
                             char* scratch, RowBlock& block) {
  using T = typename E::T;
  const int64_t last = tokens[begin + count - 1], span = last + 1 - tokens[begin];
  const int64_t tiles = (span + kTileRows - 1) / kTileRows, row_bytes = in.stride_xn * (int64_t)sizeof(T);
  // Whole tiles of rows, which may begin with earlier tokens where later ones do not exist.
  const int64_t first = Gaps ? smaller(tokens[begin], in.tokens - tiles * kTileRows) : tokens[begin];
  const bool few = span == count ? factors <= 4 * NR : Gaps && factors <= NR && span <= count + count / 4;
  const bool in_place = few && in.dim % (2 * kTilePairs) == 0 && tiles * kTileRows <= kBlockSpan && first >= 0 &&
                        first + tiles * kTileRows <= in.tokens;
  for (int64_t i = 0; i < count; i++) block.at[i] = (int32_t)(in_place ? tokens[begin + i] - first : i);
  block.row_tiles = in_place ? tiles : (count + kTileRows - 1) / kTileRows;
  block.stride = in_place ? row_bytes : kTileBytes;
  block.tile_stride = in_place ? kTileRows * row_bytes : kTileRows * scratch_row_bytes<E>(in.dim);
  block.step = in_place ? kTileBytes : kTileSize;
  block.rows[0] = in_place ? reinterpret_cast<const char*>(row<T>(in, first)) : scratch;
  if (!in_place) copy_rows<E>(in, tokens, begin, count, scratch);
  block.far = padded(factors) * scratch_row_bytes<E>(in.dim) > kScratchBytes;
}

// Memory that is fetched into L2 while tiles are multiplied, so many lines with each step.
constexpr int64_t kLine = 64;
struct Ahead {
  uintptr_t next;  // may lie behind the memory's end, where nothing is fetched
  int64_t lines;
  void fetch() {
    for (int64_t i = 0; i < lines; i++, next += kLine) __builtin_prefetch(reinterpret_cast<const char*>(next), 0, 2);
  }
};

// sums [RowTiles 16, ColumnTiles W] (+)= rows x factors over `count` steps.
template <class T, int RowTiles, int ColumnTiles>
static inline void multiply_block(Tiles& tiles, const RowBlock& block, const char* rows, const float* factors,
                                  int64_t count, float* sums, bool first, Ahead& next) {
  constexpr int64_t kFactorTile = kTilePairs * W;  // floats
  tiles.zero<0>();
  tiles.zero<1>();
  tiles.zero<2>();
  tiles.zero<3>();
  for (int64_t k = 0; k < count; k++) {
    const float* b = factors + k * kFactorTile * ColumnTiles;
    const char* a = rows + k * block.step;
    tiles.load_past_l1<4>(a, block.stride);
    tiles.load<6>(b, 4 * W);
    tiles.multiply<T, 0, 4, 6>();
    if (ColumnTiles > 1) {
      tiles.load<7>(b + kFactorTile, 4 * W);
      tiles.multiply<T, 1, 4, 7>();
    }
    if (RowTiles > 1) {
      tiles.load_past_l1<5>(a + block.tile_stride, block.stride);
      tiles.multiply<T, 2, 5, 6>();
      if (ColumnTiles > 1) tiles.multiply<T, 3, 5, 7>();
    }
    next.fetch();
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

// RowBlock::tile = the rows of the block x one panel of `Vectors` vectors.
template <class E, int Vectors>
static inline void multiply_in_tiles(const Input& in, RowBlock& block, const float* panel) {
  using T = typename E::T;
  constexpr int64_t kChainSteps = E::kChain / (2 * kTilePairs);
  const int64_t all = units<E>(in.dim), steps = all / kTilePairs, row_tiles = block.row_tiles;
  Tiles tiles(W);
  for (int t = 0; t < Vectors; t += 2)
    for (int64_t k = 0; k < steps; k += kChainSteps) {
      const bool two_columns = t + 1 < Vectors;
      const int64_t n = smaller(kChainSteps, steps - k), part = n * kTilePairs * W * (two_columns ? 2 : 1);
      const float* factors = panel + in_panel<E>(k * kTilePairs, t * W, Vectors * W, all);
      const int64_t block_steps = (row_tiles + 1) / 2 * n, lines = block.far ? part * 4 / kLine : 0;
      // Behind this part is the next one, or the next panel.
      Ahead next = {reinterpret_cast<uintptr_t>(factors + part), (lines + block_steps - 1) / block_steps};
      for (int64_t i = 0; i < row_tiles; i += 2) {
        const char* rows = block.rows[0] + i * block.tile_stride + k * block.step;
        float* sums = block.tile + i * kTileRows * NR + t * W;
        const bool two_rows = i + 1 < row_tiles;
        if (two_rows && two_columns) multiply_block<T, 2, 2>(tiles, block, rows, factors, n, sums, k == 0, next);
        else if (two_rows) multiply_block<T, 2, 1>(tiles, block, rows, factors, n, sums, k == 0, next);
        else if (two_columns) multiply_block<T, 1, 2>(tiles, block, rows, factors, n, sums, k == 0, next);
        else multiply_block<T, 1, 1>(tiles, block, rows, factors, n, sums, k == 0, next);
      }
    }
}
