// The order of the stages of an image.
//
//   norms ---> sweep ---> leaders -> contenders ---> residual ---> pack ---> assign ---> mean      compress
//                         \_ for each basis token _/
//   norms ---> sweep ---> leaders -> contenders ---> residual                                      score
//   norms -------------------------------------------------------> pack ---> assign ---> mean      merge
//
// With a basis in rounds, and with medoid steps (which any basis may have):
//
//   norms ---> pack pool -> pool gram -> pack picks -> round ---> similar ---> mean                compress
//              \_ for each of the rounds _________________/
//          ... pack stale -> products -> nearest -> cluster mean -> mean distance ... similar ---> mean
//              \_ for each medoid step _________________________________________/
//
// Walk::next() implements this graph. It runs on one thread, and also computes what is needed between two stages. The
// chunks of a stage run on all threads of the team (chunks.cpp, team.h).
#include "walk.h"

#include <algorithm>

#include "s1_basis.h"
#include "s1_pool.h"
#include "s2_solve.h"
#include "s4_clusters.h"
#include "s4_topk.h"
#include "s5_lists.h"

namespace apet::cpu {

Walk::Walk(Call* call, Arena& arena) : call_(call) {
  take_arrays(call->problem, call->kernels, arena, image_);
  const bool merges = call->problem.op != APET_SCORE;
  scratch_bytes_ = merges ? call->kernels.scratch_bytes(call->problem.keep, call->problem.dim) : 0;
  if (picks_in_rounds(call->problem, call->problem.keep))
    scratch_bytes_ += call->kernels.round_scratch_bytes(image_.rounds.most);
  scratch_bytes_ = (scratch_bytes_ + 63) / 64 * 64;
  scratch_ = arena.take<char>(scratch_bytes_ * call->threads);
  chunk_best_ = arena.take<Candidate>(most_chunks());
}

bool Walk::advance() {
  stage_ = next(stage_);
  if (stage_ == Stage::kDone) return false;
  cut_stage();
  return true;
}

Stage Walk::next(Stage done) {
  const apet_problem& p = call_->problem;
  switch (done) {
    case Stage::kStart: return next_image();
    case Stage::kNorms:
      if (p.op == APET_MERGE) {
        given_rows();
        return merge_dropped();
      }
      if (picks_in_rounds(p, image_.input.keep)) {
        begin_rounds(image_.input, image_.scores, image_.rounds);
        return open_round();
      }
      [[fallthrough]];
    case Stage::kSweep:
      image_.scores.has_norms = true;
      best_ = {kNeverPicked, -1};
      find_best();
      return pick_best();
    case Stage::kLeaders: find_best(); return best_.pick_value > least_leader_ ? pick_best() : list_contenders();
    case Stage::kContenders: find_best(); return list_contenders();
    case Stage::kResidual:
      if (p.op == APET_SCORE) return next_image();
      choose_rows(image_.input, image_.scores, image_.basis.token, image_.basis.size, p.layout, image_.rows,
                  image_.merge);
      if (p.layout == APET_APPEND) append_basis(image_.input, image_.basis, image_.rows);
      return p.refine > 0 ? begin_medoids(nullptr, 0) : merge_dropped();
    case Stage::kPackPool: return Stage::kPoolGram;
    case Stage::kPoolGram: return make_round();
    case Stage::kPackPicks: return Stage::kRound;
    case Stage::kRound: return open_round();
    case Stage::kPackStale: return Stage::kProducts;
    case Stage::kProducts: image_.centres.stale_count = 0; return compare_centres();
    case Stage::kNearest:
      note_regrouped(image_.merge, image_.centres);
      group_by_row(image_.rows, image_.merge);
      return Stage::kClusterMean;
    case Stage::kClusterMean: return Stage::kMeanDistance;
    case Stage::kMeanDistance:
      steps_left_ = move_centres(image_.input, image_.scores, image_.rows, image_.merge, image_.centres)
                        ? steps_left_ - 1
                        : 0;  // no centre has moved: another step would change nothing
      return compare_centres();
    case Stage::kSimilar: return average_rows();
    case Stage::kPack: return Stage::kAssign;
    case Stage::kAssign: return average_rows();
    case Stage::kMean: return next_image();
    case Stage::kDone: break;
  }
  return Stage::kDone;
}

// Starts the next image of the call that has tokens and rows.
Stage Walk::next_image() {
  const apet_problem& p = call_->problem;
  const int64_t element = element_size(p), appended_rows = appended(p);
  Rows& rows = image_.rows;
  do {
    index_ = call_->next_image.fetch_add(1, std::memory_order_relaxed);
    if (index_ >= p.images) return Stage::kDone;
    const int64_t keep = p.op == APET_SCORE ? 0 : p.keep;  // score ignores the member
    const Extent e = p.ragged ? call_->extents[index_] : Extent{0, p.tokens, index_ * (keep + appended_rows), keep};
    const int64_t offset = p.ragged ? e.token * p.stride_xn : index_ * p.stride_xb;
    Input& in = image_.input;
    in.x = static_cast<const char*>(call_->tensors.x) + offset * element;
    in.stride_xn = p.stride_xn;
    in.tokens = (int32_t)e.tokens;
    in.dim = (int32_t)p.dim;
    in.keep = (int32_t)e.keep;
    in.max_basis = (int32_t)basis_of(p, e.keep);
    in.select = p.select;
    in.blend = (float)p.blend;
    in.ridge = p.ridge;
    const int64_t first = p.ragged ? e.token : index_ * p.tokens;
    image_.scores.weight = p.op == APET_COMPRESS && call_->tensors.weights ? call_->tensors.weights + first : nullptr;
    rows.count = p.op == APET_SCORE ? 0 : (int32_t)(e.keep + appended_rows);
    rows.first_token = e.token;
    rows.indices = p.op == APET_COMPRESS ? call_->tensors.indices + e.row : nullptr;
    if (p.op == APET_SCORE) image_.scores.resid_sq = image_.scores.e_sq = call_->tensors.residual + index_ * p.tokens;
    else rows.out = static_cast<char*>(call_->tensors.tokens) + e.row * p.dim * element;
  } while (image_.input.tokens == 0 || (rows.count == 0 && p.op != APET_SCORE));  // ragged only
  image_.scores.has_norms = false;
  image_.basis.size = 0;
  image_.merge.target_count = image_.merge.dropped_count = 0;
  steps_left_ = p.refine;
  return first_stage();
}

// If all tokens are kept, they are copied. If the caller gives the first basis token, the first sweep computes the
// norms too. Otherwise a pass for the norms comes first.
Stage Walk::first_stage() {
  const apet_problem& p = call_->problem;
  const Input& in = image_.input;
  if (p.op == APET_COMPRESS && in.keep == in.tokens && appended(p) == 0) {
    keep_all(in, image_.rows);
    return average_rows();
  }
  if (p.op != APET_MERGE && p.start >= 0 && !picks_in_rounds(p, in.keep)) {
    const int32_t start = (int32_t)std::min<int64_t>(p.start, in.tokens - 1);
    call_->kernels.norms(in, image_.scores, start, start + 1);
    if (finite(image_.scores, start)) return add_basis(start);
  }
  return Stage::kNorms;
}

// Updates best_ with the best tokens of the stage's chunks.
void Walk::find_best() {
  for (int64_t c = 0; c < chunks_; c++) best_ = better(best_, chunk_best_[c]);
}

// s1: takes best_ as the next basis token, if there may be one more.
Stage Walk::pick_best() {
  if (image_.basis.size == image_.input.max_basis || !(best_.pick_value > 0)) return finish_basis();
  return add_basis(best_.token);
}

// s2, then lists the leaders: the first candidates for the next basis token.
Stage Walk::add_basis(int32_t token) {
  const Input& in = image_.input;
  if (!add_basis_token(in, image_.scores, image_.basis, token)) return finish_basis();
  if (image_.basis.size == 1) return Stage::kSweep;
  if (image_.basis.size == in.max_basis) return finish_basis();
  if (in.tokens <= 2 * kLeaders) return Stage::kSweep;  // the leaders are half of them
  least_leader_ = find_leaders(in, image_.scores);
  best_ = {kNeverPicked, -1};
  return image_.scores.candidate_count > 0 ? Stage::kLeaders : finish_basis();
}

// After the leaders: lists the tokens that may still exceed best_, or picks best_ if there are none.
Stage Walk::list_contenders() {
  find_contenders(image_.input, image_.basis, image_.scores, best_.pick_value);
  return image_.scores.candidate_count > 0 ? Stage::kContenders : pick_best();
}

// The basis is complete: it has M tokens, or no other token may be picked.
Stage Walk::finish_basis() {
  const Input& in = image_.input;
  Basis& basis = image_.basis;
  if (call_->problem.op == APET_SCORE) {
    int64_t* out = call_->tensors.basis_indices + index_ * in.max_basis;
    for (int32_t j = 0; j < in.max_basis; j++) out[j] = j < basis.size ? basis.token[j] : -1;
  } else if (in.keep == in.tokens) {  // append: all tokens, then the basis; no residual is needed
    keep_all(in, image_.rows);
    append_basis(in, basis, image_.rows);
    return average_rows();
  }
  call_->kernels.pack_basis(in, basis);
  return Stage::kResidual;
}

// s1, in rounds: lists the pool of the next round, if there is one.
Stage Walk::open_round() {
  Rounds& rounds = image_.rounds;
  if (rounds.number == kRounds) return finish_rounds();
  const int64_t start = std::min<int64_t>(call_->problem.start, image_.input.tokens - 1);
  list_pool(image_.input, image_.scores, start, rounds, reinterpret_cast<uint32_t*>(image_.merge.merged));  // scratch
  if (rounds.pool_count == 0) return finish_rounds();
  set_factors(rounds.pool_count, rounds.pool);
  return Stage::kPackPool;
}

// Makes the picks of a round, given the residual Gram matrix of its pool.
Stage Walk::make_round() {
  Rounds& rounds = image_.rounds;
  pick_round(image_.input, image_.scores, rounds);
  if (rounds.size == 0) return finish_rounds();  // the pool of another round would be the same
  set_factors(rounds.size, rounds.token + rounds.begin);
  return Stage::kPackPicks;
}

// s4: keeps the basis, whose products are stored already, and the largest residuals of the others.
Stage Walk::finish_rounds() {
  const Rounds& rounds = image_.rounds;
  const int32_t basis_size = rounds.begin + rounds.size;
  rank_by_residual(image_.input, image_.scores);
  choose_rows(image_.input, image_.scores, rounds.token, basis_size, APET_INPLACE, image_.rows, image_.merge);
  return begin_medoids(rounds.token, basis_size);
}

// The kept tokens become centres; the products of the `count` known ones are stored already.
Stage Walk::begin_medoids(const int32_t* known, int32_t count) {
  begin_centres(image_.input, image_.scores, image_.rows, image_.merge, known, count, call_->kernels.vector,
                image_.centres);
  return compare_centres();
}

// Starts the next medoid step or, after the last, s5. Stale products are computed first.
Stage Walk::compare_centres() {
  Merge& merge = image_.merge;
  Centres& centres = image_.centres;
  if (merge.target_count == 0) merge.dropped_count = 0;
  if (merge.dropped_count == 0) return average_rows();
  if (centres.stale_count > 0) {
    pad_stale(centres, call_->kernels.vector);
    set_factors(centres.stale_count, centres.stale_token);
    return Stage::kPackStale;
  }
  return steps_left_ > 0 ? Stage::kNearest : Stage::kSimilar;
}

void Walk::set_factors(int32_t count, const int32_t* token) {
  image_.factors.count = count;
  image_.factors.token = token;
}

// The rows of the op merge are given by the caller.
void Walk::given_rows() {
  const apet_tensors& t = call_->tensors;
  const int64_t first = index_ * image_.input.keep;
  take_given_rows(image_.input, image_.scores, t.kept + first, t.kept_targets ? t.kept_targets + first : nullptr,
                  image_.rows, image_.merge);
}

// s5, for the dropped tokens. Without targets they are lost.
Stage Walk::merge_dropped() {
  Merge& merge = image_.merge;
  if (merge.target_count == 0) merge.dropped_count = 0;
  if (merge.dropped_count == 0) return average_rows();
  pad_targets(call_->kernels, merge);
  set_factors(merge.target_count, merge.target_token);
  return Stage::kPack;
}

// s5, the means.
Stage Walk::average_rows() {
  group_by_row(image_.rows, image_.merge);
  return Stage::kMean;
}

}  // namespace apet::cpu
