// Any architecture: four-lane vectors that the compiler maps to whatever there is.
#define APET_ISA generic
#include "loops.h"

const apet::cpu::Kernels* apet::cpu::generic_kernels(apet_dtype dtype) {
  using namespace generic;
  switch (dtype) {
    case APET_FLOAT32: return table<Widened<float>>();
    case APET_FLOAT16: return table<Widened<Half>>();
    case APET_BFLOAT16: return table<Widened<BFloat16>>();
  }
  return nullptr;
}
