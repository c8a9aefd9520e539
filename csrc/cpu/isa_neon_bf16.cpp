// AArch64 with FEAT_BF16: two bfloat16 products a lane. The other dtypes gain nothing here and use neon's loops.
#define APET_ISA neon_bf16
#define APET_NEON
#include "loops.h"

const apet::cpu::Kernels* apet::cpu::neon_bf16_kernels(apet_dtype dtype) {
  return dtype == APET_BFLOAT16 ? neon_bf16::table<neon_bf16::Bf16Pairs>() : neon_kernels(dtype);
}
