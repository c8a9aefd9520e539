// x86-64 with AMX for float16, too: it is multiplied in tiles. The other dtypes use the loops of the instruction set
// before.
#define APET_ISA amx_fp16
#define APET_TILES
#include "loops.h"

bool apet::cpu::amx_fp16_is_right() noexcept { return amx_fp16::product_is_right<amx_fp16::Half>(); }

const apet::cpu::Kernels* apet::cpu::amx_fp16_kernels(apet_dtype dtype) {
  using namespace amx_fp16;
  return dtype == APET_FLOAT16 ? table<InTiles<Widened<Half>>>() : amx_kernels(dtype);
}
