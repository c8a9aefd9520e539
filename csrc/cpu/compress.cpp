// The CPU backend: takes images through s1..s5 and splits the work among threads.
//
//   (norms) -> sweep -> (lead -> rest) x (m - 1) -> residual -> (s4) -> pack -> assign -> mean       compress
//   (norms) -> sweep -> (lead -> rest) x (m - 1) -> residual                                         score
//    norms  ->                                                          pack -> assign -> mean       merge
//
// Where the first basis token is given, its sweep takes the norms along. A step of s1 then brings up to date who leads
// (s1_s3_sweep.h: the others may wait), and the rest of those that the farthest of these does not rule out.
// Each arrow is Walk::advance(), which runs on one thread; each name is a stage that a team shares (team.h) through
// the loops of one instruction set (kernels.h). A call has one parallel region, whatever the number of images.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "kernels.h"
#include "s4_topk.h"
#include "team.h"

namespace apet::cpu {
namespace {

// ---- the estimate behind the number of threads: only its order of magnitude matters
constexpr double kNsPerByte = 1 / 20.0;  // one thread sweeping tokens from the shared cache
constexpr double kNsPerFlop = 1 / 50.0;  // one thread multiplying in s5
constexpr double kNsPerStage = 1000;     // a team of more than one: last chunk done until next stage open
constexpr double kNsPerThread = 10000;   // less work than this is not worth waking a thread for
// Chunks a thread's slot holds at a stage: enough that another thread can help, few enough that taking one is free.
// Where these would be longer than a quarter of a usual L2 cache, more, up to what costs little to count and to hold:
// what the cache has of the last pass is then whole chunks, taken first (team.h).
constexpr int kChunksPerThread = 4;
constexpr int kMostChunksPerThread = 64;
constexpr int64_t kChunkBytes = 256 << 10;
// Rows of a chunk of means. Where there are fewer for each, rows are cut as well, so that few wide ones can be shared.
constexpr int kRowsPerChunk = 8;
// Tokens that a step of s1 brings up to date first: two groups, so that two threads have work. Simulated, 16 cost more
// reads on every input tried, and four more on random ones.
constexpr int kLeaders = 8;
// So few candidates are all brought up to date: ruling some out would take another stage.
constexpr int kFew = 32;
// More threads than this in one call are left idle: a batch of images has no more to give.
constexpr int kMaxThreads = 256;

struct Extent {  // one ragged image: tokens of x, rows of the output
  int64_t token, tokens, row, keep;
};

// Lays arrays one after the other, each on a cache line of its own; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(size_t count) {
    T* at = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return at;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

struct Call {
  const apet_problem& problem;
  const apet_tensors& tensors;
  const Kernels& kernels;
  const Extent* extents;  // ragged only
  int threads;            // of each team
  std::atomic<int64_t> next_image{0};

  int64_t element() const { return problem.dtype == APET_FLOAT32 ? 4 : 2; }
  bool appends() const { return problem.op == APET_COMPRESS && problem.layout == APET_APPEND; }
  int64_t extra_rows() const { return appends() ? problem.basis : 0; }
};

// One team's walk through its images: a Program of Team.
class Walk {
 public:
  Walk(Call* call, Carver& carver) : call_(call) {
    const apet_problem& p = call->problem;
    const bool basis = p.op != APET_MERGE, merges = p.op != APET_SCORE;
    const int64_t n = p.tokens, rows = merges ? p.keep + call->extra_rows() : 0;
    const int64_t targets = merges ? p.keep + call->kernels.vector : 0;  // padded to a vector
    Image& im = image_;
    im.norm_sq = carver.take<float>(n);
    im.reach = carver.take<float>(n);
    im.energy = p.op == APET_SCORE ? nullptr : carver.take<float>(n);
    im.y = carver.take<float>(basis ? n * p.basis : 0);
    im.met = carver.take<int32_t>(n);
    im.candidates = carver.take<int32_t>(basis ? n : 0);
    im.row_token = carver.take<int32_t>(rows);
    im.row_blend = carver.take<int32_t>(rows);
    im.row_begin = carver.take<int32_t>(rows + 1);
    im.target_row = carver.take<int32_t>(targets);
    im.inv_norm = carver.take<float>(targets);
    im.out_of_range = carver.take<float>(targets);
    im.merged = carver.take<int32_t>(merges ? n : 0);
    im.dropped = carver.take<int32_t>(merges ? n : 0);
    im.nearest = carver.take<int32_t>(merges ? n : 0);
    im.packed = carver.take<float>(merges ? call->kernels.packed_floats(p.keep, p.dim) : 0);
    scratch_bytes_ = merges ? (call->kernels.scratch_bytes(p.dim) + 63) / 64 * 64 : 0;
    scratch_ = carver.take<char>(scratch_bytes_ * call->threads);
    best_ = carver.take<Best>(most_chunks());
  }

  // Opens the first image; false if there is none left.
  bool begin() { return next_image(); }

  int64_t chunks() const { return chunks_; }
  bool backwards() const { return backwards_; }  // of passes over X: every other one
  void run(int64_t chunk, int slot);
  bool advance();

 private:
  enum class Stage { kNorms, kSweep, kLead, kRest, kResidual, kPack, kAssign, kMean };

  int64_t most_chunks() const { return (int64_t)call_->threads * kMostChunksPerThread; }
  bool over_tokens(Stage stage);
  bool next_image();
  bool over_candidates(Stage stage);
  void find_farthest();
  bool next_basis();
  bool add_basis(int32_t token);
  bool lead();
  bool rest();
  bool basis_done();
  void choose_rows();
  void take_given_rows();
  bool merge();
  bool average();
  void add_row(int64_t r, int32_t token, int32_t blend = -1);
  void add_target(int32_t r, float norm_sq);

  bool finite(int64_t token) const { return image_.norm_sq[token] <= __FLT_MAX__; }
  // Where chunk c of n things starts: at a multiple of those that the loops take together.
  int64_t cut(int64_t c, int64_t n, int64_t group) const { return c == chunks_ ? n : n * c / chunks_ / group * group; }
  int64_t token_cut(int64_t c) const { return cut(c, image_.tokens, call_->kernels.row_group); }
  int64_t candidate_cut(int64_t c) const { return cut(c, image_.candidate_count, call_->kernels.row_group); }
  int64_t drop_cut(int64_t c) const { return cut(c, image_.dropped_count, call_->kernels.drop_group); }
  int64_t columns() const { return (image_.dim + width_ - 1) / width_; }
  // Rows are cut where what they read (themselves and what is merged into them) reaches share c of `of`.
  int64_t row_cut(int64_t c, int64_t of) const {
    const int64_t share = (image_.rows + (int64_t)image_.row_begin[image_.rows]) * c / of;
    int64_t low = 0, high = image_.rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (middle + image_.row_begin[middle] < share) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  Call* call_;
  Image image_;
  int64_t index_ = 0;  // of the image in the call
  int64_t* indices_ = nullptr;
  int64_t first_token_ = 0;  // added to indices: ragged images count in the packed x
  Stage stage_ = Stage::kNorms;
  int64_t chunks_ = 0;
  bool backwards_ = false;
  int64_t width_ = kColumns;  // features that pack and mean take at a time
  char* scratch_;
  size_t scratch_bytes_;
  Best* best_;  // by chunk
  Best farthest_;
  float least_;  // no token but the leaders reaches more
};

void Walk::run(int64_t c, int slot) {
  const Kernels& k = call_->kernels;
  const Image& im = image_;
  const int64_t d0 = c % columns() * width_, d1 = std::min<int64_t>(im.dim, d0 + width_);
  switch (stage_) {
    case Stage::kNorms: best_[c] = k.norms(im, token_cut(c), token_cut(c + 1)); break;
    case Stage::kSweep: best_[c] = k.sweep(im, token_cut(c), token_cut(c + 1)); break;
    case Stage::kLead:
    case Stage::kRest: best_[c] = k.step(im, candidate_cut(c), candidate_cut(c + 1)); break;
    case Stage::kResidual: k.residual(im, token_cut(c), token_cut(c + 1)); break;
    case Stage::kPack: k.pack(im, c / columns(), d0, d1); break;
    case Stage::kAssign: k.assign(im, drop_cut(c), drop_cut(c + 1), scratch_ + slot * scratch_bytes_); break;
    case Stage::kMean: {
      const int64_t group = c / columns(), groups = chunks_ / columns();
      k.mean(im, row_cut(group, groups), row_cut(group + 1, groups), d0, d1);
      break;
    }
  }
}

bool Walk::advance() {
  switch (stage_) {
    case Stage::kNorms:
      if (call_->problem.op == APET_MERGE) {
        take_given_rows();
        return merge();
      }
      [[fallthrough]];
    case Stage::kSweep:
      image_.has_norms = true;
      farthest_ = {kNever, -1};
      find_farthest();
      return next_basis();
    case Stage::kLead:
    case Stage::kRest: find_farthest(); return rest();
    case Stage::kResidual:
      if (call_->problem.op == APET_SCORE) return next_image();
      choose_rows();
      return merge();
    case Stage::kPack:
      stage_ = Stage::kAssign;
      // An equal share for each thread, in chunks of at most kChunkRows.
      chunks_ =
          (image_.dropped_count + kChunkRows * call_->threads - 1) / (kChunkRows * call_->threads) * call_->threads;
      return true;
    case Stage::kAssign: return average();
    case Stage::kMean: return next_image();
  }
  return false;
}

bool Walk::over_tokens(Stage stage) {
  stage_ = stage;
  backwards_ = !backwards_;
  const int64_t n = image_.tokens, by_size = n * image_.dim * call_->element() / kChunkBytes;
  const int64_t by_threads = std::min<int64_t>(n / kTile, (int64_t)call_->threads * kChunksPerThread);
  const int64_t most = std::min<int64_t>(n / call_->kernels.row_group, most_chunks());
  chunks_ = std::max<int64_t>(1, std::min(most, std::max(by_size, by_threads)));
  return true;
}

bool Walk::next_image() {
  const apet_problem& p = call_->problem;
  Image& im = image_;
  do {
    index_ = call_->next_image.fetch_add(1, std::memory_order_relaxed);
    if (index_ >= p.images) return false;
    const Extent e =
        p.ragged ? call_->extents[index_] : Extent{0, p.tokens, index_ * (p.keep + call_->extra_rows()), p.keep};
    const int64_t offset = p.ragged ? e.token * p.stride_xn : index_ * p.stride_xb;
    im.x = static_cast<const char*>(call_->tensors.x) + offset * call_->element();
    im.stride_xn = p.stride_xn;
    im.tokens = (int32_t)e.tokens;
    im.dim = (int32_t)p.dim;
    im.keep = (int32_t)e.keep;
    im.max_basis = p.basis;
    im.select = p.select;
    im.ridge = p.ridge;
    im.blend = p.blend;
    im.has_norms = false;
    im.basis_size = 0;
    im.rows = p.op == APET_SCORE ? 0 : (int32_t)(e.keep + call_->extra_rows());
    im.targets = im.dropped_count = 0;
    first_token_ = e.token;
    if (p.op == APET_SCORE) im.energy = call_->tensors.residual + index_ * p.tokens;
    else im.out = static_cast<char*>(call_->tensors.tokens) + e.row * p.dim * call_->element();
    indices_ = p.op == APET_COMPRESS ? call_->tensors.indices + e.row : nullptr;
  } while (im.tokens == 0 || (im.rows == 0 && p.op != APET_SCORE));  // ragged only
  if (p.op == APET_COMPRESS && im.keep == im.tokens && !call_->appends()) {  // x itself, before anything else
    choose_rows();
    return average();
  }
  if (p.op != APET_MERGE && p.start >= 0) {
    const int32_t start = (int32_t)std::min<int64_t>(p.start, im.tokens - 1);
    call_->kernels.norms(im, start, start + 1);
    if (finite(start)) return add_basis(start);
  }
  return over_tokens(Stage::kNorms);
}

bool Walk::over_candidates(Stage stage) {
  stage_ = stage;
  const int64_t groups = image_.candidate_count / call_->kernels.row_group;
  chunks_ = std::clamp<int64_t>(groups, 1, (int64_t)call_->threads * kChunksPerThread);
  return true;
}

// The farthest token of this stage and of what is in farthest_ already; a tie goes to the lower token.
void Walk::find_farthest() {
  for (int64_t c = 0; c < chunks_; c++) {
    const Best best = best_[c];
    if (best.value > farthest_.value || (best.value == farthest_.value && best.token < farthest_.token))
      farthest_ = best;
  }
}

// s1: the farthest token is the next basis token, if it may be one.
bool Walk::next_basis() {
  if (image_.basis_size == image_.max_basis || !(farthest_.value > 0)) return basis_done();
  return add_basis(farthest_.token);
}

// The tokens that led when the last basis token was picked, to be brought up to date first: what they still reach
// rules out most of the others.
bool Walk::lead() {
  Image& im = image_;
  Best leader[kLeaders];
  int32_t count = 0;
  float least = 0;
  for (int32_t block = 0; block < im.tokens; block += kTile) {
    const int32_t end = std::min(im.tokens, block + kTile);
    bool any = false;
    for (int32_t i = block; i < end; i++) any |= im.reach[i] > least;
    for (int32_t i = block; any && i < end; i++) {
      if (!(im.reach[i] > least)) continue;
      int32_t at = count < kLeaders ? count++ : kLeaders - 1;
      for (; at > 0 && leader[at - 1].value < im.reach[i]; at--) leader[at] = leader[at - 1];
      leader[at] = {im.reach[i], i};
      if (count == kLeaders) least = leader[kLeaders - 1].value;
    }
  }
  if (count == 0) return basis_done();
  for (int32_t i = 0; i < count; i++) im.candidates[i] = leader[i].token;
  im.candidate_count = count;
  least_ = least;
  farthest_ = {kNever, -1};
  return over_candidates(Stage::kLead);
}

// Of those that may still be farther (what they reached some basis tokens ago is no less), all if they are few, or else
// those in the upper half of what is possible: these may rule out the others.
bool Walk::rest() {
  Image& im = image_;
  if (stage_ == Stage::kLead && farthest_.value > least_) return next_basis();
  float most = 0;
  im.candidate_count = 0;
  for (int32_t i = 0; i < im.tokens; i++)
    if (im.reach[i] >= farthest_.value && im.reach[i] > 0 && im.met[i] < im.basis_size) {
      im.candidates[im.candidate_count++] = i;
      most = std::max(most, im.reach[i]);
    }
  if (im.candidate_count == 0) return next_basis();
  if (im.candidate_count > kFew) {
    const float least = std::max(0.0f, farthest_.value), half = least + (most - least) / 2;
    im.candidate_count = (int32_t)(std::remove_if(im.candidates, im.candidates + im.candidate_count,
                                                  [&](int32_t i) { return im.reach[i] < half; }) -
                                   im.candidates);
  }
  return over_candidates(Stage::kRest);
}

// s2: the new row of L is the y that the token already has.
bool Walk::add_basis(int32_t p) {
  Image& im = image_;
  const int32_t m = im.basis_size;
  // ||p||^2 + ridge - sum_j l_j^2; below the threshold, p cannot be told from a combination of the earlier ones.
  const double pivot = (double)im.energy[p] + im.ridge;
  const bool dependent = pivot <= 4 * 0x1p-24 * im.norm_sq[p];
  if (m > 0 && im.select == APET_QR && dependent) return basis_done();
  for (int32_t j = 0; j < m; j++) im.factor[m][j] = im.y[(int64_t)j * im.tokens + p];
  im.inv_pivot[m] = dependent ? 0 : 1 / std::sqrt(pivot);
  im.basis[m] = p;
  im.basis_norm_sq[m] = im.norm_sq[p];
  im.basis_size = m + 1;
  im.reach[p] = kNever;
  if (m == 0) return over_tokens(Stage::kSweep);
  return m + 1 == im.max_basis ? basis_done() : lead();
}

bool Walk::basis_done() {
  if (call_->problem.op == APET_SCORE) {
    int64_t* out = call_->tensors.basis_indices + index_ * image_.max_basis;
    for (int32_t j = 0; j < image_.max_basis; j++) out[j] = j < image_.basis_size ? image_.basis[j] : -1;
  } else if (image_.keep == image_.tokens) {  // append: x, then the basis; no residual asked for
    choose_rows();
    return average();
  }
  return over_tokens(Stage::kResidual);
}

void Walk::add_row(int64_t r, int32_t token, int32_t blend) {
  image_.row_token[r] = token;
  image_.row_blend[r] = blend;
}

void Walk::add_target(int32_t r, float norm_sq) {
  image_.target_row[image_.targets] = r;
  image_.inv_norm[image_.targets++] = norm_sq > 0 ? 1 / std::sqrt(norm_sq) : 0;
}

// s4: rows, their sources, merge targets and dropped tokens, all ascending by position.
void Walk::choose_rows() {
  Image& im = image_;
  const apet_layout layout = call_->problem.layout;
  const int64_t n = im.tokens, k = im.keep;
  if (k == n) {
    for (int32_t i = 0; i < n; i++) add_row(i, i), indices_[i] = first_token_ + i;
  } else if (k > 0) {
    uint32_t* key = reinterpret_cast<uint32_t*>(im.merged);  // free until s5
    std::memcpy(key, im.energy, n * sizeof(float));
    const int32_t basis = std::min<int32_t>(im.basis_size, im.keep);
    if (layout == APET_INPLACE)
      for (int32_t j = 0; j < basis; j++) key[im.basis[j]] = UINT32_MAX;
    const int64_t slots = layout == APET_OVERWRITE ? basis : 0;  // the lowest of the kept, given to the basis
    Cut kept = cut_at(key, n, k), above = k > slots ? cut_at(key, n, k - slots) : Cut{UINT32_MAX, 0};
    int32_t r = 0, slot = 0;
    for (int32_t i = 0; i < n; i++) {
      if (!kept.takes(key[i])) {
        if (finite(i)) im.dropped[im.dropped_count++] = i;
        continue;
      }
      indices_[r] = first_token_ + i;
      if (slots == 0 || above.takes(key[i])) {
        add_row(r, i);
        if (finite(i)) add_target(r, im.norm_sq[i]);
      } else {
        add_row(r, im.basis[slot++], im.blend == 1 ? -1 : i);
      }
      r++;
    }
  }
  if (layout == APET_APPEND)
    for (int32_t j = 0; j < im.max_basis; j++) {
      const int32_t token = j < im.basis_size ? im.basis[j] : im.basis_size ? im.basis[0] : 0;
      add_row(k + j, token);
      indices_[k + j] = first_token_ + token;
    }
}

// The rows of merge(): given by the caller, in any order, repeated or out of range.
void Walk::take_given_rows() {
  Image& im = image_;
  const int64_t* kept = call_->tensors.kept + index_ * im.keep;
  const uint8_t* may = call_->tensors.kept_targets ? call_->tensors.kept_targets + index_ * im.keep : nullptr;
  int32_t* listed = im.merged;  // free until the lists are built
  std::fill_n(listed, im.tokens, 0);
  for (int32_t r = 0; r < im.rows; r++) {
    const int32_t token = (int32_t)std::clamp<int64_t>(kept[r], 0, im.tokens - 1);
    add_row(r, token);
    listed[token] = 1;
    if (finite(token) && (!may || may[r])) add_target(r, im.norm_sq[token]);
  }
  for (int32_t i = 0; i < im.tokens; i++)
    if (!listed[i] && finite(i)) im.dropped[im.dropped_count++] = i;
}

// s5, first half: packs the targets for the similarities. Without targets the dropped tokens go nowhere.
bool Walk::merge() {
  Image& im = image_;
  if (im.targets == 0) im.dropped_count = 0;
  if (im.dropped_count == 0) return average();
  std::fill_n(im.out_of_range, im.targets, 0.0f);
  for (int32_t t = im.targets; t % call_->kernels.vector; t++) im.inv_norm[t] = 0, im.out_of_range[t] = kNever;
  stage_ = Stage::kPack;
  width_ = kColumns;
  chunks_ = (im.targets + call_->kernels.panel - 1) / call_->kernels.panel * columns();
  return true;
}

// s5, second half: each row's dropped tokens in ascending order (a counting sort by row), then the means.
bool Walk::average() {
  Image& im = image_;
  int32_t* begin = im.row_begin;
  std::fill_n(begin, im.rows + 1, 0);
  for (int32_t i = 0; i < im.dropped_count; i++) begin[im.target_row[im.nearest[i]] + 1]++;
  for (int32_t r = 0; r < im.rows; r++) begin[r + 1] += begin[r];
  for (int32_t i = 0; i < im.dropped_count; i++) im.merged[begin[im.target_row[im.nearest[i]]]++] = im.dropped[i];
  for (int32_t r = im.rows; r > 0; r--) begin[r] = begin[r - 1];  // the sort moved each start to its end
  begin[0] = 0;
  stage_ = Stage::kMean;
  const int64_t wanted = (int64_t)call_->threads * kChunksPerThread;
  width_ = im.rows < kRowsPerChunk * wanted ? kColumns : im.dim;
  chunks_ = std::clamp<int64_t>((wanted + columns() - 1) / columns(), 1, im.rows) * columns();
  return true;
}

// ---- ragged input: whatever cu_seqlens and cu_keep hold, extents ascend and stay inside
void read_extents(const Call& call, Extent* extents) {
  const apet_problem& p = call.problem;
  const int64_t extra = call.extra_rows(), row_bytes = p.dim * call.element();
  const int32_t *seq = call.tensors.cu_seqlens, *keep = call.tensors.cu_keep;
  char* tokens = static_cast<char*>(call.tensors.tokens);
  int64_t token = 0, row = 0, written = 0;
  const auto blank_until = [&](int64_t end) {  // rows that no image fills
    if (end > written) {
      std::memset(tokens + written * row_bytes, 0, (end - written) * row_bytes);
      std::fill(call.tensors.indices + written, call.tensors.indices + end, int64_t{0});
    }
    written = end;
  };
  for (int64_t s = 0; s < p.images; s++) {
    const int64_t begin = std::clamp<int64_t>(seq[s], token, p.total_tokens);
    token = std::clamp<int64_t>(seq[s + 1], begin, p.total_tokens);
    const int64_t first = std::clamp<int64_t>(keep[s], row, p.total_keep);
    row = std::clamp<int64_t>(keep[s + 1], first, p.total_keep);
    const int64_t n = std::min(token - begin, p.tokens), k = std::min({row - first, p.keep, n});
    extents[s] = {begin, n, first + s * extra, k};
    blank_until(first + s * extra);
    if (n > 0) written += k + extra;
    blank_until(row + (s + 1) * extra);
  }
  blank_until(p.total_keep + p.images * extra);
}

// ---- threads
struct Split {
  int teams, threads;
  double serial_ns, planned_ns;
};

Split split(const apet_problem& p, int32_t available) {
  const double n = p.tokens, d = p.dim, k = p.keep, element = p.dtype == APET_FLOAT32 ? 4 : 2;
  // Norms, first basis token, the others; and two stages for the candidates of each basis token.
  const double sweeps = p.op == APET_MERGE ? 1 : 3, stages = p.op == APET_MERGE ? 5 : 2 * p.basis + 5;
  const double products = 2 * n * p.basis * d + (p.op == APET_SCORE ? 0 : 2 * (n - k) * k * d);
  const double image = sweeps * n * d * element * kNsPerByte + products * kNsPerFlop;
  const double serial = p.images * image;
  const int most = (int)std::clamp<double>(serial / kNsPerThread, 1, std::clamp(available, 1, kMaxThreads));
  // Few large teams leave threads idle between stages, many small ones at the end of the batch.
  Split best = {1, 1, serial, serial};
  for (int teams = 1; teams <= std::min<int64_t>(most, p.images); teams++) {
    const int threads = most / teams;
    const double rounds = std::ceil((double)p.images / teams);
    const double ns = rounds * (image / threads + (threads > 1 ? stages * kNsPerStage : 0));
    if (ns < best.planned_ns) best = {teams, threads, serial, ns};
  }
  return best;
}

size_t workspace_bytes(const apet_problem& p, const Kernels& kernels, const Split& s) {
  const apet_tensors none = {};
  Call call{p, none, kernels, nullptr, s.threads};
  Carver carver(nullptr);
  carver.take<Walk>(s.teams);
  carver.take<Team<Walk>>(s.teams);
  carver.take<Team<Walk>::Counter>(s.teams * s.threads);
  carver.take<Extent>(p.ragged ? p.images : 0);
  for (int t = 0; t < s.teams; t++) Walk(&call, carver);
  return carver.used();
}

struct Region {
  Team<Walk>* teams;
  int threads;
};
void take_part(void* context, int64_t begin, int64_t end) {
  const Region& region = *static_cast<const Region*>(context);
  for (int64_t i = begin; i < end; i++) region.teams[i / region.threads].take_part((int)(i % region.threads));
}

// What holds nothing may be null: torch gives empty tensors no memory.
bool has_pointers(const apet_problem& p, const apet_tensors& t, int64_t rows) {
  if (!t.x && (p.ragged ? p.total_tokens : p.images) > 0) return false;
  if (p.ragged && p.images > 0 && !(t.cu_seqlens && t.cu_keep)) return false;
  switch (p.op) {
    case APET_COMPRESS: return rows == 0 || (t.tokens && t.indices);
    case APET_SCORE: return p.images == 0 || (t.residual && t.basis_indices);
    case APET_MERGE: return rows == 0 || (t.tokens && t.kept);
  }
  return false;
}

}  // namespace
}  // namespace apet::cpu

using namespace apet::cpu;

apet_status apet_cpu_plan(const apet_problem* problem, int32_t threads, apet_cpu_plan_t* plan) {
  if (!plan) return APET_NULL_POINTER;
  const apet_status status = apet_check(problem);
  if (status != APET_OK) return status;
  const Split s = split(*problem, threads);
  const apet_isa isa = isa_in_use();
  const size_t bytes = workspace_bytes(*problem, *kernels_for(problem->dtype, isa), s);
  *plan = {isa, s.teams, s.threads, bytes, {s.serial_ns, s.planned_ns}};
  return APET_OK;
}

apet_status apet_cpu_run(const apet_problem* problem, const apet_tensors* tensors, const apet_pool* pool,
                         void* workspace, size_t bytes) {
  const apet_status status = apet_check(problem);
  if (status != APET_OK) return status;
  if (!tensors || (pool && !pool->run)) return APET_NULL_POINTER;
  const Kernels& kernels = *kernels_for(problem->dtype, isa_in_use());
  const Split s = split(*problem, pool ? pool->threads : 1);
  Call call{*problem, *tensors, kernels, nullptr, s.threads};
  const int64_t extra = problem->images * call.extra_rows();
  const int64_t rows = problem->ragged ? problem->total_keep + extra : problem->images * problem->keep + extra;
  if (!has_pointers(*problem, *tensors, rows)) return APET_NULL_POINTER;
  if (problem->op == APET_SCORE ? problem->images == 0 : rows == 0) return APET_OK;
  if (!workspace || (uintptr_t)workspace % 64 || bytes < workspace_bytes(*problem, kernels, s))
    return APET_SMALL_WORKSPACE;

  Carver carver(workspace);
  Walk* walks = carver.take<Walk>(s.teams);
  Team<Walk>* teams = carver.take<Team<Walk>>(s.teams);
  auto* counters = carver.take<Team<Walk>::Counter>(s.teams * s.threads);
  Extent* extents = carver.take<Extent>(problem->ragged ? problem->images : 0);
  if (problem->ragged) {
    read_extents(call, extents);
    call.extents = extents;
  }
  int working = 0;
  for (int t = 0; t < s.teams; t++) {
    Walk* walk = new (walks + working) Walk(&call, carver);
    if (!walk->begin()) break;
    new (teams + working) Team<Walk>(walk, s.threads, counters + working * s.threads);
    working++;
  }
  Region region{teams, s.threads};
  const int64_t tasks = (int64_t)working * s.threads;
  if (tasks > 1) pool->run(pool->context, tasks, take_part, &region);
  else if (tasks == 1) take_part(&region, 0, 1);
  return APET_OK;
}
