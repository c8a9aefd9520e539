// The loops of one instruction set. Included by its isa_*.cpp alone, with APET_ISA naming the namespace.
#include "kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // from GCC 12's own AVX-512 intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace apet::cpu {
namespace APET_ISA {
#include "s1_rounds.h"
#include "s3_residual.h"
#include "s4_medoids.h"
#include "s5_assign.h"
#include "s5_mean.h"

template <class E>
static constexpr Kernels kernels_of() {
  Kernels k = {};
  k.token_group = E::kTiles ? 16 : kGroup;
  k.candidate_group = kGroup;
  k.dropped_group = kRowGroup<E>;
  k.vector = W;
  k.panel = NR;
  k.block_rows = block_rows<E>;
  k.packed_floats = packed_floats<E>;
  k.scratch_bytes = scratch_bytes<E>;
  k.round_scratch_bytes = round_scratch_bytes;
  k.packed_basis_floats = packed_basis_floats<E>;
  k.norms = norms<E>;
  k.sweep = sweep<E>;
  k.sweep_candidates = sweep_candidates<E>;
  k.pack_basis = pack_basis<E>;
  k.residual = residual<E>;
  k.pack = pack<E>;
  k.pack_y = pack_y;
  k.pool_gram = pool_gram<E>;
  k.round = round<E>;
  k.add_all_products = add_all_products<E>;
  k.add_last_products = add_last_products<E>;
  k.nearest_centre = nearest_centre;
  k.cluster_mean = cluster_mean<typename E::T>;
  k.mean_distance = mean_distance<typename E::T>;
  k.assign = assign<E>;
  k.similar = similar;
  k.mean = mean<typename E::T>;
  return k;
}

template <class E>
static const Kernels* table() {
  static constexpr Kernels kTable = kernels_of<E>();
  return &kTable;
}
}  // namespace APET_ISA
}  // namespace apet::cpu
