// Lays out the arrays of an image in the workspace.
#pragma once
#include <algorithm>

#include "../problem.h"
#include "kernels.h"

namespace apet::cpu {

// Lays arrays one after the other, each from a cache line on; with a null base it only counts. A sum beyond size_t
// becomes SIZE_MAX.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(size_t count) {
    T* array = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    size_t bytes;
    if (__builtin_mul_overflow(count, sizeof(T), &bytes) || __builtin_add_overflow(bytes, (size_t)63, &bytes) ||
        __builtin_add_overflow(used_, bytes / 64 * 64, &used_))
      used_ = SIZE_MAX;
    return array;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Returns whether an image that keeps `keep` tokens has its basis picked in rounds.
inline bool picks_in_rounds(const apet_problem& p, int64_t keep) {
  return p.op == APET_COMPRESS && in_rounds(p) && basis_of(p, keep) > kFewPicks;
}
inline bool has_medoids(const apet_problem& p) { return p.op == APET_COMPRESS && p.refine > 0; }

inline void take_rounds(int64_t n, int64_t basis, int64_t vector, Arena& arena, Rounds& rounds) {
  const int64_t most = (basis + kRounds - 1) / kRounds, pool = kPool * most;
  rounds.most = (int32_t)most;
  rounds.width = (int32_t)((basis + vector - 1) / vector * vector);
  rounds.pool = arena.take<int32_t>(pool);
  rounds.token = arena.take<int32_t>(basis);
  rounds.y = arena.take<float>(n * rounds.width);
  rounds.packed_y = arena.take<float>((pool + vector) * basis);
  rounds.gram = arena.take<float>(pool * pool);
  rounds.diag = arena.take<double>(pool);
  rounds.column = arena.take<double>(pool);
  rounds.pool_y = arena.take<float>(most * pool);
  rounds.L = arena.take<float>(most * most);
  rounds.inv_diag = arena.take<float>(most);
}

inline void take_centres(const apet_problem& p, int64_t vector, Arena& arena, Centres& centres) {
  const int64_t padded = (p.keep + vector - 1) / vector * vector;
  centres.width = (int32_t)(padded + vector);  // a round stores whole vectors from any column on
  centres.product = arena.take<float>(p.tokens * centres.width);
  centres.token = arena.take<int32_t>(padded);
  centres.position = arena.take<int32_t>(padded);
  centres.norm_sq = arena.take<float>(padded);
  centres.inv_norm = arena.take<float>(padded);
  centres.padding = arena.take<float>(padded);
  centres.number = arena.take<int32_t>(p.tokens);
  centres.stale = arena.take<int32_t>(padded + 2 * vector);
  centres.stale_token = arena.take<int32_t>(padded + 2 * vector);
  centres.target_column = arena.take<int32_t>(p.keep);
  centres.cluster = arena.take<int32_t>(p.tokens);
  centres.regrouped = arena.take<uint8_t>(p.keep);
  centres.cluster_mean = arena.take<float>(has_medoids(p) ? p.keep * p.dim : 0);
  centres.mean_dist_sq = arena.take<float>(has_medoids(p) ? p.tokens : 0);
}

// Takes the arrays that the op needs, for the longest image.
inline void take_arrays(const apet_problem& p, const Kernels& kernels, Arena& arena, Image& image) {
  const bool picks = p.op != APET_MERGE, merges = p.op != APET_SCORE;
  const int64_t n = p.tokens, rows = merges ? p.keep + appended(p) : 0;
  const int64_t targets = merges ? p.keep + kernels.vector : 0;  // padded to a vector
  const bool rounds = picks_in_rounds(p, p.keep);
  Scores& scores = image.scores;
  scores.norm_sq = arena.take<float>(n);
  scores.pick_value = arena.take<float>(n);
  scores.resid_sq = scores.e_sq = p.op == APET_SCORE ? nullptr : arena.take<float>(n);
  const int64_t basis = !picks ? 0 : in_rounds(p) ? std::min<int64_t>(kFewPicks, p.keep) : p.basis;
  scores.y = arena.take<float>(n * basis);
  image.basis.packed = arena.take<float>(kernels.packed_basis_floats(basis, p.dim));
  scores.steps_done = arena.take<int32_t>(n);
  scores.candidates = arena.take<int32_t>(picks ? n : 0);
  image.rows.row_token = arena.take<int32_t>(rows);
  image.rows.row_blend = arena.take<int32_t>(rows);
  Merge& merge = image.merge;
  merge.row_begin = arena.take<int32_t>(rows + 1);
  merge.target_row = arena.take<int32_t>(targets);
  merge.target_token = arena.take<int32_t>(targets);
  merge.inv_norm = arena.take<float>(targets);
  merge.padding = arena.take<float>(targets);
  merge.merged = arena.take<int32_t>(merges ? n : 0);
  merge.dropped = arena.take<int32_t>(merges ? n : 0);
  merge.target = arena.take<int32_t>(merges ? n : 0);
  image.factors.packed = arena.take<float>(merges ? kernels.packed_floats(p.keep, p.dim) : 0);
  if (rounds) take_rounds(n, basis_of(p, p.keep), kernels.vector, arena, image.rounds);
  if (rounds || has_medoids(p)) take_centres(p, kernels.vector, arena, image.centres);
}

}  // namespace apet::cpu
