// Values that every backend derives from a problem in the same way. Not part of the interface (apet.h).
#pragma once
#include <cstdint>

#include "apet.h"

namespace apet {

inline int64_t element_size(const apet_problem& p) { return p.dtype == APET_FLOAT32 ? 4 : 2; }

// Returns whether images that keep more than a few tokens have their basis picked in rounds.
inline bool in_rounds(const apet_problem& p) { return p.basis == APET_BASIS_KEEP || p.basis > APET_MAX_BASIS; }

// Returns M of an image that keeps `keep` tokens.
inline int64_t basis_of(const apet_problem& p, int64_t keep) {
  return in_rounds(p) && (p.basis == APET_BASIS_KEEP || keep < p.basis) ? keep : p.basis;
}

// Returns the rows that an image's result has after its kept tokens.
inline int64_t appended(const apet_problem& p) {
  return p.op == APET_COMPRESS && p.layout == APET_APPEND ? p.basis : 0;
}

// Tokens of x, and rows of the result, of all images together.
inline int64_t all_tokens(const apet_problem& p) { return p.ragged ? p.total_tokens : p.images * p.tokens; }
inline int64_t all_rows(const apet_problem& p) {
  if (p.op == APET_SCORE) return 0;
  return (p.ragged ? p.total_keep : p.images * p.keep) + p.images * appended(p);
}

// Returns whether a pointer that the call needs is NULL. It may be for an array without elements, since torch allocates
// no memory for empty tensors.
inline bool missing_pointer(const apet_problem& p, const apet_tensors& t) {
  if (!t.x && all_tokens(p) > 0) return true;
  if (p.ragged && p.images > 0 && !(t.cu_seqlens && t.cu_keep)) return true;
  switch (p.op) {
    case APET_COMPRESS: return all_rows(p) > 0 && !(t.tokens && t.indices);
    case APET_SCORE: return p.images > 0 && !(t.residual && t.basis_indices);
    case APET_MERGE: return all_rows(p) > 0 && !(t.tokens && t.kept);
  }
  return true;
}

}  // namespace apet
