// AArch64 with NEON (its baseline). A separate set, so that `generic` stays portable code.
#define APET_ISA neon
#define APET_NEON
#include "loops.h"

const apet::cpu::Kernels* apet::cpu::neon_kernels(apet_dtype dtype) {
  using namespace neon;
  switch (dtype) {
    case APET_FLOAT32: return table<Widened<float>>();
    case APET_FLOAT16: return table<Widened<Half>>();
    case APET_BFLOAT16: return table<Widened<BFloat16>>();
  }
  return nullptr;
}
