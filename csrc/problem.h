// What every backend derives from a problem in the same way. Not part of the interface (apet.h).
#pragma once
#include <cstdint>

#include "apet.h"

#if defined(__CUDACC__)
#define APET_HOST_DEVICE __host__ __device__
#else
#define APET_HOST_DEVICE
#endif

namespace apet {

inline int64_t element_size(const apet_problem& p) { return p.dtype == APET_FLOAT32 ? 4 : 2; }

// Rows that an image's result has after its kept tokens.
inline int64_t appended(const apet_problem& p) {
  return p.op == APET_COMPRESS && p.layout == APET_APPEND ? p.basis : 0;
}

// Tokens of x, and rows of the result, of all images together.
inline int64_t all_tokens(const apet_problem& p) { return p.ragged ? p.total_tokens : p.images * p.tokens; }
inline int64_t all_rows(const apet_problem& p) {
  if (p.op == APET_SCORE) return 0;
  return (p.ragged ? p.total_keep : p.images * p.keep) + p.images * appended(p);
}

// Whether a pointer that the call needs is NULL. An array without elements may be: torch gives empty tensors no memory.
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

// ---- ragged images

// One image's part of x and of the result.
struct Extent {
  int64_t token, tokens;  // its first token in x, and N
  int64_t row, keep;      // its first row of the result, and K; the appended rows follow
};

struct Span {
  int64_t begin, end;
};

// Image s, from its spans of x and of the kept rows. cu_seqlens and cu_keep may hold anything: a span begins at the
// maximum of cu[0..s] and ends at the maximum of cu[0..s + 1], both clamped into [0, total]. So spans ascend, never
// overlap, and stay inside. The rows of a span that the image does not fill, up to rows.end + (s + 1) * appended, are
// blank: zeros, and index 0. p: the call's sizes, of which `tokens` and `keep` bound those of an image.
template <class Sizes>
APET_HOST_DEVICE inline Extent ragged_extent(const Sizes& p, int64_t appended, int64_t s, Span tokens, Span rows) {
  int64_t n = tokens.end - tokens.begin, keep = rows.end - rows.begin;
  if (n > p.tokens) n = p.tokens;
  if (keep > p.keep) keep = p.keep;
  if (keep > n) keep = n;
  return {tokens.begin, n, rows.begin + s * appended, keep};
}

}  // namespace apet
