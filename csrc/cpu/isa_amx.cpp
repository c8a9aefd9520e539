// x86-64 with AMX: bfloat16 is multiplied in tiles. The other dtypes gain nothing here and use the loops of the
// instruction set before. With APET_TILE_EMULATION the tiles are plain C++ (tiles.h).
#define APET_ISA amx
#define APET_TILES
#include "loops.h"

bool apet::cpu::amx_is_right() noexcept { return amx::product_is_right<amx::BFloat16>(); }

const apet::cpu::Kernels* apet::cpu::amx_kernels(apet_dtype dtype) {
  if (dtype == APET_BFLOAT16) return amx::table<amx::InTiles<amx::Bf16Pairs>>();
#if defined(__AVX512F__)
  return avx512_kernels(dtype);
#else
  return generic_kernels(dtype);
#endif
}
