// x86-64 with AMX: bfloat16 is multiplied in tiles. The other dtypes gain nothing here and use the loops of the
// instruction set before. With APET_TILE_TWIN the tiles are plain C++ (tiles.h).
#define APET_ISA amx
#define APET_TILES
#include "loops.h"

bool apet::cpu::tiles_are_right() noexcept {
  using namespace amx;
  const auto a = [](int r, int k) { return (float)((r + 3 * k) % 7 - 3); };
  const auto b = [](int k, int n) { return (float)((5 * k + n) % 9 - 4); };
  const auto high = [](float f) { return (uint16_t)(as_bits(f) >> 16); };  // small integers are whole bfloat16
  uint16_t rows[kTileRows][2 * kTilePairs], pairs[kTilePairs][W][2];
  float sums[kTileRows][W];
  for (int k = 0; k < 2 * kTilePairs; k++) {
    for (int r = 0; r < kTileRows; r++) rows[r][k] = high(a(r, k));
    for (int n = 0; n < W; n++) pairs[k / 2][n][k % 2] = high(b(k, n));
  }
  {
    Tiles tiles(W);
    tiles.zero<0>();
    tiles.load<4>(rows, sizeof rows[0]);
    tiles.load<6>(pairs, sizeof pairs[0]);
    tiles.multiply<0, 4, 6>();
    tiles.store<0>(sums, sizeof sums[0]);
  }
  for (int r = 0; r < kTileRows; r++)
    for (int n = 0; n < W; n++) {
      float expected = 0;  // exact, in any order
      for (int k = 0; k < 2 * kTilePairs; k++) expected += a(r, k) * b(k, n);
      if (sums[r][n] != expected) return false;
    }
  return true;
}

const apet::cpu::Kernels* apet::cpu::amx_kernels(apet_dtype dtype) {
  if (dtype == APET_BFLOAT16) return amx::table<amx::Bf16Tiles>();
#if defined(__AVX512F__)
  return avx512_kernels(dtype);
#else
  return generic_kernels(dtype);
#endif
}
