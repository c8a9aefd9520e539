// Which stage follows which, and how each is cut into chunks.
//
//   norms ---> sweep ---> leaders -> contenders ---> residual ---> pack ---> assign ---> mean      compress
//                         \_ for each basis token _/
//   norms ---> sweep ---> leaders -> contenders ---> residual                                      score
//   norms -------------------------------------------------------> pack ---> assign ---> mean      merge
//
// Walk::next() is this picture, with what is computed on the arrows; it runs on one thread. A stage's chunks run on all
// threads of the team (team.h), through the loops of one instruction set (kernels.h).
#include "walk.h"

#include <algorithm>

#include "s1_basis.h"
#include "s2_solve.h"
#include "s4_topk.h"
#include "s5_lists.h"

namespace apet::cpu {

// Chunks per thread: enough that another thread can help, few enough that taking one costs nothing. Where these would
// be longer than a quarter of a usual L2 cache there are more, up to what is cheap to count: what the cache still holds
// of the last pass over X is then whole chunks, which are taken first (team.h).
constexpr int kChunksPerThread = 4;
constexpr int kMostChunksPerThread = 64;
constexpr int64_t kChunkBytes = 256 << 10;
// Rows per chunk of means. With fewer than this, features are cut as well, so that threads share few wide rows.
constexpr int kRowsPerChunk = 8;

Walk::Walk(Call* call, Carver& carver) : call_(call) {
  take_arrays(call->problem, call->kernels, carver, image_);
  const bool merges = call->problem.op != APET_SCORE;
  scratch_bytes_ = merges ? (call->kernels.scratch_bytes(call->problem.dim) + 63) / 64 * 64 : 0;
  scratch_ = carver.take<char>(scratch_bytes_ * call->threads);
  chunk_best_ = carver.take<Candidate>(most_chunks());
}

bool Walk::advance() {
  stage_ = next(stage_);
  if (stage_ == Stage::kDone) return false;
  cut_stage();
  return true;
}

// ---- which stage follows

Stage Walk::next(Stage done) {
  const apet_problem& p = call_->problem;
  switch (done) {
    case Stage::kStart: return next_image();
    case Stage::kNorms:
      if (p.op == APET_MERGE) {
        given_rows();
        return merge_dropped();
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
      choose_rows(image_.input, image_.scores, image_.basis, p.layout, image_.rows, image_.merge);
      if (p.layout == APET_APPEND) append_basis(image_.input, image_.basis, image_.rows);
      return merge_dropped();
    case Stage::kPack: return Stage::kAssign;
    case Stage::kAssign: return average_rows();
    case Stage::kMean: return next_image();
    case Stage::kDone: break;
  }
  return Stage::kDone;
}

// Takes the next image of the call that has tokens and rows, and starts it.
Stage Walk::next_image() {
  const apet_problem& p = call_->problem;
  const int64_t element = element_size(p), extra = appended(p);
  Rows& rows = image_.rows;
  do {
    index_ = call_->next_image.fetch_add(1, std::memory_order_relaxed);
    if (index_ >= p.images) return Stage::kDone;
    const Extent e = p.ragged ? call_->extents[index_] : Extent{0, p.tokens, index_ * (p.keep + extra), p.keep};
    const int64_t offset = p.ragged ? e.token * p.stride_xn : index_ * p.stride_xb;
    Input& in = image_.input;
    in.x = static_cast<const char*>(call_->tensors.x) + offset * element;
    in.stride_xn = p.stride_xn;
    in.tokens = (int32_t)e.tokens;
    in.dim = (int32_t)p.dim;
    in.keep = (int32_t)e.keep;
    in.max_basis = p.basis;
    in.select = p.select;
    in.blend = (float)p.blend;
    in.ridge = p.ridge;
    rows.count = p.op == APET_SCORE ? 0 : (int32_t)(e.keep + extra);
    rows.first_token = e.token;
    rows.indices = p.op == APET_COMPRESS ? call_->tensors.indices + e.row : nullptr;
    if (p.op == APET_SCORE) image_.scores.resid_sq = call_->tensors.residual + index_ * p.tokens;
    else rows.out = static_cast<char*>(call_->tensors.tokens) + e.row * p.dim * element;
  } while (image_.input.tokens == 0 || (rows.count == 0 && p.op != APET_SCORE));  // ragged only
  image_.scores.has_norms = false;
  image_.basis.size = 0;
  image_.merge.target_count = image_.merge.dropped_count = 0;
  return first_stage();
}

// All tokens stay: they are copied. The first basis token is given: it is swept at once. Else the norms come first.
Stage Walk::first_stage() {
  const apet_problem& p = call_->problem;
  const Input& in = image_.input;
  if (p.op == APET_COMPRESS && in.keep == in.tokens && appended(p) == 0) {
    keep_all(in, image_.rows);
    return average_rows();
  }
  if (p.op != APET_MERGE && p.start >= 0) {
    const int32_t start = (int32_t)std::min<int64_t>(p.start, in.tokens - 1);
    call_->kernels.norms(in, image_.scores, start, start + 1);
    if (finite(image_.scores, start)) return add_basis(start);
  }
  return Stage::kNorms;
}

// The best token of the stage's chunks and of best_.
void Walk::find_best() {
  for (int64_t c = 0; c < chunks_; c++) best_ = better(best_, chunk_best_[c]);
}

// s1: best_ is the next basis token, if it may be one.
Stage Walk::pick_best() {
  if (image_.basis.size == image_.input.max_basis || !(best_.pick_value > 0)) return finish_basis();
  return add_basis(best_.token);
}

// s2, then the first candidates for the next basis token.
Stage Walk::add_basis(int32_t token) {
  const Input& in = image_.input;
  if (!add_basis_token(in, image_.scores, image_.basis, token)) return finish_basis();
  if (image_.basis.size == 1) return Stage::kSweep;
  if (image_.basis.size == in.max_basis) return finish_basis();
  least_leader_ = find_leaders(in, image_.scores);
  best_ = {kNeverPicked, -1};
  return image_.scores.candidate_count > 0 ? Stage::kLeaders : finish_basis();
}

// After the leaders: the tokens that may still exceed best_, until there are none.
Stage Walk::list_contenders() {
  find_contenders(image_.input, image_.basis, image_.scores, best_.pick_value);
  return image_.scores.candidate_count > 0 ? Stage::kContenders : pick_best();
}

// The basis is complete: no token may be picked, or M are.
Stage Walk::finish_basis() {
  const Input& in = image_.input;
  const Basis& basis = image_.basis;
  if (call_->problem.op == APET_SCORE) {
    int64_t* out = call_->tensors.basis_indices + index_ * in.max_basis;
    for (int32_t j = 0; j < in.max_basis; j++) out[j] = j < basis.size ? basis.token[j] : -1;
  } else if (in.keep == in.tokens) {  // append: all tokens, then the basis; no residual is needed
    keep_all(in, image_.rows);
    append_basis(in, basis, image_.rows);
    return average_rows();
  }
  return Stage::kResidual;
}

// The rows of the op merge.
void Walk::given_rows() {
  const apet_tensors& t = call_->tensors;
  const int64_t first = index_ * image_.input.keep;
  take_given_rows(image_.input, image_.scores, t.kept + first, t.kept_targets ? t.kept_targets + first : nullptr,
                  image_.rows, image_.merge);
}

// s5, for the dropped tokens. Without targets these are lost.
Stage Walk::merge_dropped() {
  Merge& merge = image_.merge;
  if (merge.target_count == 0) merge.dropped_count = 0;
  if (merge.dropped_count == 0) return average_rows();
  pad_targets(call_->kernels, merge);
  return Stage::kPack;
}

// s5, the means.
Stage Walk::average_rows() {
  group_by_row(image_.rows, image_.merge);
  return Stage::kMean;
}

// ---- how a stage is cut

int64_t Walk::most_chunks() const { return (int64_t)call_->threads * kMostChunksPerThread; }

void Walk::cut_stage() {
  const Merge& merge = image_.merge;
  const int64_t threads = call_->threads, rows = image_.rows.count;
  switch (stage_) {
    case Stage::kNorms:
    case Stage::kSweep:
    case Stage::kResidual:
      backwards_ = !backwards_;
      chunks_ = token_chunks();
      break;
    case Stage::kLeaders:
    case Stage::kContenders: {
      const int64_t groups = image_.scores.candidate_count / call_->kernels.token_group;
      chunks_ = std::clamp<int64_t>(groups, 1, threads * kChunksPerThread);
      break;
    }
    case Stage::kPack:
      width_ = kColumns;
      chunks_ = (merge.target_count + call_->kernels.panel - 1) / call_->kernels.panel * columns();
      break;
    case Stage::kAssign:  // an equal share per thread, in chunks of at most kChunkRows
      chunks_ = (merge.dropped_count + kChunkRows * threads - 1) / (kChunkRows * threads) * threads;
      break;
    case Stage::kMean: {
      const int64_t wanted = threads * kChunksPerThread;
      width_ = rows < kRowsPerChunk * wanted ? kColumns : image_.input.dim;
      chunks_ = std::clamp<int64_t>((wanted + columns() - 1) / columns(), 1, rows) * columns();
      break;
    }
    case Stage::kStart:
    case Stage::kDone: break;
  }
}

int64_t Walk::token_chunks() const {
  const int64_t n = image_.input.tokens;
  const int64_t by_size = n * image_.input.dim * element_size(call_->problem) / kChunkBytes;
  const int64_t by_threads = std::min<int64_t>(n / kTile, (int64_t)call_->threads * kChunksPerThread);
  const int64_t most = std::min<int64_t>(n / call_->kernels.token_group, most_chunks());
  return std::max<int64_t>(1, std::min(most, std::max(by_size, by_threads)));
}

// Cuts rows where what they read (their own tokens and those merged into them) reaches share c of `of`.
int64_t Walk::row_cut(int64_t c, int64_t of) const {
  const int64_t rows = image_.rows.count;
  const int32_t* begin = image_.merge.row_begin;
  const int64_t share = (rows + (int64_t)begin[rows]) * c / of;
  int64_t low = 0, high = rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (middle + begin[middle] < share) low = middle + 1;
    else high = middle;
  }
  return low;
}

void Walk::run(int64_t c, int slot) {
  const Kernels& k = call_->kernels;
  const Input& in = image_.input;
  const Basis& basis = image_.basis;
  Scores& scores = image_.scores;
  const Rows& rows = image_.rows;
  Merge& merge = image_.merge;
  const int64_t d0 = c % columns() * width_, d1 = std::min<int64_t>(in.dim, d0 + width_);
  switch (stage_) {
    case Stage::kNorms: chunk_best_[c] = k.norms(in, scores, token_cut(c), token_cut(c + 1)); break;
    case Stage::kSweep: chunk_best_[c] = k.sweep(in, basis, scores, token_cut(c), token_cut(c + 1)); break;
    case Stage::kLeaders:
    case Stage::kContenders:
      chunk_best_[c] = k.sweep_candidates(in, basis, scores, candidate_cut(c), candidate_cut(c + 1));
      break;
    case Stage::kResidual: k.residual(in, basis, scores, token_cut(c), token_cut(c + 1)); break;
    case Stage::kPack: k.pack(in, rows, merge, c / columns(), d0, d1); break;
    case Stage::kAssign:
      k.assign(in, rows, merge, dropped_cut(c), dropped_cut(c + 1), scratch_ + slot * scratch_bytes_);
      break;
    case Stage::kMean: {
      const int64_t chunk = c / columns(), of = chunks_ / columns();
      k.mean(in, rows, merge, row_cut(chunk, of), row_cut(chunk + 1, of), d0, d1);
      break;
    }
    case Stage::kStart:
    case Stage::kDone: break;
  }
}

}  // namespace apet::cpu
