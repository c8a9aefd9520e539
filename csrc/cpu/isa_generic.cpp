// Any architecture: four-lane vectors, which the compiler maps to the instructions of its target.
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
