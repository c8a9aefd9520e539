// The loops of one instruction set. Included by its isa_*.cpp alone, with APET_ISA naming the namespace.
#include "kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // from GCC 12's own AVX-512 intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace apet::cpu {
namespace APET_ISA {
#include "s1_s3_sweep.h"
#include "s5_merge.h"

template <class E>
static const Kernels* table() {
  static constexpr Kernels kTable = {
      kGroup,   MR,      W,           NR,      packed_floats<E>, scratch_bytes<E>,   norms<E>,
      sweep<E>, step<E>, residual<E>, pack<E>, assign<E>,        mean<typename E::T>};
  return &kTable;
}
}  // namespace APET_ISA
}  // namespace apet::cpu
