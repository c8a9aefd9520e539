// x86-64 with AVX-512 F, BW, DQ and VL: sixteen float lanes.
#define APET_ISA avx512
#include "loops.h"

const apet::cpu::Kernels* apet::cpu::avx512_kernels(apet_dtype dtype) {
  using namespace avx512;
  switch (dtype) {
    case APET_FLOAT32: return table<Widened<float>>();
    case APET_FLOAT16: return table<Widened<Half>>();
    case APET_BFLOAT16: return table<Widened<BFloat16>>();
  }
  return nullptr;
}
