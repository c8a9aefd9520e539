// x86-64 with AVX-512 BF16: two bfloat16 products a lane. The other dtypes gain nothing here and use avx512's loops.
#define APET_ISA avx512_bf16
#include "loops.h"

const apet::cpu::Kernels* apet::cpu::avx512_bf16_kernels(apet_dtype dtype) {
  return dtype == APET_BFLOAT16 ? avx512_bf16::table<avx512_bf16::Bf16Pairs>() : avx512_kernels(dtype);
}
