// x86-64 with AVX2, FMA and F16C: eight float lanes.
#define APET_ISA avx2
#include "loops.h"

const apet::cpu::Kernels* apet::cpu::avx2_kernels(apet_dtype dtype) {
  using namespace avx2;
  switch (dtype) {
    case APET_FLOAT32: return table<Widened<float>>();
    case APET_FLOAT16: return table<Widened<Half>>();
    case APET_BFLOAT16: return table<Widened<BFloat16>>();
  }
  return nullptr;
}
