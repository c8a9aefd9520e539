// Where the arrays of an image are in the workspace.
#pragma once
#include "../problem.h"
#include "kernels.h"

namespace apet::cpu {

// Lays arrays one after the other, each from a cache line on; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(size_t count) {
    T* array = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return array;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// The arrays that the op needs, for the longest image.
inline void take_arrays(const apet_problem& p, const Kernels& kernels, Carver& carver, Image& image) {
  const bool picks = p.op != APET_MERGE, merges = p.op != APET_SCORE;
  const int64_t n = p.tokens, rows = merges ? p.keep + appended(p) : 0;
  const int64_t targets = merges ? p.keep + kernels.vector : 0;  // padded to a vector
  Scores& scores = image.scores;
  scores.norm_sq = carver.take<float>(n);
  scores.pick_value = carver.take<float>(n);
  scores.resid_sq = p.op == APET_SCORE ? nullptr : carver.take<float>(n);
  scores.y = carver.take<float>(picks ? n * p.basis : 0);
  scores.steps_done = carver.take<int32_t>(n);
  scores.candidates = carver.take<int32_t>(picks ? n : 0);
  image.rows.row_token = carver.take<int32_t>(rows);
  image.rows.row_blend = carver.take<int32_t>(rows);
  Merge& merge = image.merge;
  merge.row_begin = carver.take<int32_t>(rows + 1);
  merge.target_row = carver.take<int32_t>(targets);
  merge.inv_norm = carver.take<float>(targets);
  merge.padding = carver.take<float>(targets);
  merge.merged = carver.take<int32_t>(merges ? n : 0);
  merge.dropped = carver.take<int32_t>(merges ? n : 0);
  merge.target = carver.take<int32_t>(merges ? n : 0);
  merge.packed = carver.take<float>(merges ? kernels.packed_floats(p.keep, p.dim) : 0);
}

}  // namespace apet::cpu
