// How each stage is cut into chunks, and what a chunk computes, through the loops of one instruction set (kernels.h).
#include <algorithm>

#include "walk.h"

namespace apet::cpu {

// Chunks per thread: enough for other threads to help, few enough that taking one is cheap. Chunks longer than
// kChunkBytes are divided further, up to kMostChunksPerThread, so that a cache holds whole chunks of the last pass.
constexpr int kChunksPerThread = 4;
constexpr int kMostChunksPerThread = 64;
constexpr int64_t kChunkBytes = 256 << 10;
// Rows per chunk of means. With fewer than this, features are cut as well, so that threads share few wide rows.
constexpr int kRowsPerChunk = 8;

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
      const int64_t groups = image_.scores.candidate_count / call_->kernels.candidate_group;
      chunks_ = std::clamp<int64_t>(groups, 1, threads * kChunksPerThread);
      break;
    }
    case Stage::kPack:
    case Stage::kPackPool:
    case Stage::kPackPicks:
    case Stage::kPackStale:
      width_ = kColumns;
      chunks_ = panels() * columns();
      if ((stage_ == Stage::kPackPool || stage_ == Stage::kPackPicks) && image_.rounds.begin > 0) chunks_ += panels();
      break;
    case Stage::kPoolGram: {  // only the upper triangle: the first rows are longer
      const int64_t groups = image_.rounds.pool_count / call_->kernels.dropped_group;
      chunks_ = std::clamp<int64_t>(groups, 1, threads * kChunksPerThread);
      break;
    }
    case Stage::kRound: chunks_ = product_chunks(image_.input.tokens); break;
    case Stage::kProducts: chunks_ = product_chunks(steps_left_ > 0 ? image_.input.tokens : merge.dropped_count); break;
    case Stage::kAssign: chunks_ = product_chunks(merge.dropped_count); break;
    case Stage::kNearest:
    case Stage::kSimilar:
    case Stage::kMeanDistance:
      chunks_ = std::clamp<int64_t>(merge.dropped_count / kTile, 1, threads * kChunksPerThread);
      break;
    case Stage::kClusterMean:
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

// Returns the number of chunks of n rows: an equal share per thread, in chunks of at most a block of rows.
int64_t Walk::product_chunks(int64_t n) const {
  const int64_t threads = call_->threads;
  const int64_t rows = call_->kernels.block_rows(image_.factors.count, image_.input.dim) * threads;
  return (n + rows - 1) / rows * threads;
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
  const Factors& factors = image_.factors;
  Centres& centres = image_.centres;
  void* scratch = scratch_ + slot * scratch_bytes_;
  const int64_t dropped = merge.dropped_count;
  const int64_t d0 = c % columns() * width_, d1 = std::min<int64_t>(in.dim, d0 + width_);
  switch (stage_) {
    case Stage::kNorms: chunk_best_[c] = k.norms(in, scores, token_cut(c), token_cut(c + 1)); break;
    case Stage::kSweep: chunk_best_[c] = k.sweep(in, basis, scores, token_cut(c), token_cut(c + 1)); break;
    case Stage::kLeaders:
    case Stage::kContenders:
      chunk_best_[c] = k.sweep_candidates(in, basis, scores, candidate_cut(c), candidate_cut(c + 1));
      break;
    case Stage::kResidual: k.residual(in, basis, scores, token_cut(c), token_cut(c + 1)); break;
    case Stage::kPack:
    case Stage::kPackPool:
    case Stage::kPackPicks:
    case Stage::kPackStale:
      if (c < panels() * columns()) k.pack(in, rows, factors, c / columns(), d0, d1);
      else k.pack_y(factors, image_.rounds, c - panels() * columns());
      break;
    case Stage::kPoolGram: {
      const int64_t n = image_.rounds.pool_count;
      k.pool_gram(in, rows, factors, image_.rounds, product_cut(c, n), product_cut(c + 1, n), scratch);
      break;
    }
    case Stage::kRound: {
      const int64_t begin = product_cut(c, in.tokens), end = product_cut(c + 1, in.tokens);
      k.round(in, rows, factors, scores, image_.rounds, centres, begin, end, scratch);
      break;
    }
    case Stage::kProducts: {
      const int64_t n = steps_left_ > 0 ? in.tokens : dropped, begin = product_cut(c, n), end = product_cut(c + 1, n);
      if (steps_left_ > 0) k.add_all_products(in, rows, factors, centres, begin, end, scratch);
      else k.add_last_products(in, rows, factors, centres, merge, begin, end, scratch);
      break;
    }
    case Stage::kNearest: k.nearest_centre(scores, centres, merge, cut(c, dropped, 1), cut(c + 1, dropped, 1)); break;
    case Stage::kSimilar: k.similar(centres, merge, cut(c, dropped, 1), cut(c + 1, dropped, 1)); break;
    case Stage::kMeanDistance:
      k.mean_distance(in, rows, merge, centres, cut(c, dropped, 1), cut(c + 1, dropped, 1));
      break;
    case Stage::kAssign:
      k.assign(in, rows, factors, merge, product_cut(c, dropped), product_cut(c + 1, dropped), scratch);
      break;
    case Stage::kClusterMean: {
      const int64_t chunk = c / columns(), of = chunks_ / columns();
      k.cluster_mean(in, rows, merge, centres, row_cut(chunk, of), row_cut(chunk + 1, of), d0, d1);
      break;
    }
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
