// The sequence of stages that one team of threads runs for each of its images.
#pragma once
#include <atomic>

#include "workspace.h"

namespace apet::cpu {

// The part of x and of the result that belongs to one ragged image.
struct Extent {
  int64_t token, tokens;  // its first token in x, and N
  int64_t row, keep;      // its first row of the result, and K; the appended rows follow
};

struct Call {
  const apet_problem& problem;
  const apet_tensors& tensors;
  const Kernels& kernels;
  const Extent* extents;  // ragged only
  int threads;            // of each team
  std::atomic<int64_t> next_image{0};
};

enum class Stage {
  kStart,
  kNorms,
  kSweep,
  kLeaders,
  kContenders,
  kResidual,
  kPackPool,
  kPoolGram,
  kPackPicks,
  kRound,
  kPackStale,
  kProducts,
  kNearest,
  kClusterMean,
  kMeanDistance,
  kSimilar,
  kPack,
  kAssign,
  kMean,
  kDone,
};

// The program of a Team (team.h).
class Walk {
 public:
  Walk(Call* call, Arena& arena);

  Stage stage() const { return stage_; }
  int64_t chunks() const { return chunks_; }
  bool backwards() const { return backwards_; }  // every other pass over X

  // Opens the first stage, or the one after a stage whose chunks are all done. False: no image is left.
  bool advance();

  // Runs one chunk of the stage, with the scratch memory of `slot`.
  void run(int64_t chunk, int slot);

 private:
  // Returns the stage after `done`. All other functions that return a Stage are parts of this one.
  Stage next(Stage done);
  Stage next_image();
  Stage first_stage();
  Stage pick_best();
  Stage add_basis(int32_t token);
  Stage list_contenders();
  Stage finish_basis();
  Stage open_round();
  Stage make_round();
  Stage finish_rounds();
  Stage begin_medoids(const int32_t* known, int32_t count);
  Stage compare_centres();
  void given_rows();
  Stage merge_dropped();
  Stage average_rows();
  void find_best();

  void set_factors(int32_t count, const int32_t* token);
  int64_t panels() const { return (image_.factors.count + call_->kernels.panel - 1) / call_->kernels.panel; }
  int64_t most_chunks() const;
  void cut_stage();
  int64_t token_chunks() const;
  int64_t columns() const { return (image_.input.dim + width_ - 1) / width_; }
  // Returns where chunk c of n items starts: at a multiple of `group`, the items that the loops take together.
  int64_t cut(int64_t c, int64_t n, int64_t group) const { return c == chunks_ ? n : n * c / chunks_ / group * group; }
  int64_t token_cut(int64_t c) const { return cut(c, image_.input.tokens, call_->kernels.token_group); }
  int64_t candidate_cut(int64_t c) const {
    return cut(c, image_.scores.candidate_count, call_->kernels.candidate_group);
  }
  int64_t product_cut(int64_t c, int64_t n) const { return cut(c, n, call_->kernels.dropped_group); }
  int64_t product_chunks(int64_t n) const;
  int64_t row_cut(int64_t c, int64_t of) const;

  Call* call_;
  Image image_;
  int64_t index_ = 0;  // of the image in the call
  Stage stage_ = Stage::kStart;
  int64_t chunks_ = 0;
  bool backwards_ = false;
  int64_t width_ = kColumns;  // features per chunk of pack and mean
  char* scratch_;
  size_t scratch_bytes_;
  Candidate* chunk_best_;   // by chunk
  int64_t steps_left_ = 0;  // medoid steps
  Candidate best_;          // the best of the tokens that are up to date
  float least_leader_;      // pick_value of no other token exceeds it
};

}  // namespace apet::cpu
