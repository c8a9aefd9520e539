// s4: chooses the tokens that stay, exactly K of them, and makes the lists that s5 reads, all ascending by position.
//
// One CTA of the group computes it. rank is e_sq's bits (which ascend with it) + 1, so radix selection finds the K-th
// largest: four passes, each a histogram of 8 bits. One more pass compacts, in order, by counting the flags of lower
// threads. Only counts are added, so the result does not depend on the order in which threads run. The ranks are read
// once from L2, into shared memory that s1 to s3 have finished with, if they fit there.
//
//   rank [N] --> shared --4 passes--> the K-th largest, and how many of that rank stay --1 pass-->
//   row_token, row_role, indices [K]      target_token, inv_norm [T]      dropped [N - K]
//
// The layout "overwrite" selects twice, in the same passes: kept tokens that are not among the K - m largest are
// overwritten by the basis.
#pragma once
#include "s1_s3_sweep.cuh"

namespace apet::cuda {

// Selects every rank above `rank`, and the first `ties` tokens of exactly that rank.
struct Cut {
  uint32_t rank;
  int ties;
};

// The ranks of an image's tokens, in shared memory if they fit. There is no barrier: a thread reads only the ranks that
// it has copied itself, those of tokens threadIdx.x + i kThreads.
struct Ranks {
  const uint32_t* global;
  uint32_t* shared;  // null: they do not fit

  // Called by all threads.
  __device__ Ranks(const Call& call, const Image& image)
      : global(call.rank + image.token),
        shared(image.tokens <= call.map.rank_words ? reinterpret_cast<uint32_t*>(shared_memory() + call.map.ranks)
                                                   : nullptr) {
    if (!shared) return;
#pragma unroll 4
    for (int i = threadIdx.x; i < image.tokens; i += kThreads) shared[i] = __ldcg(global + i);
  }
  __device__ uint32_t operator[](int64_t i) const { return shared ? shared[i] : __ldcg(global + i); }
};

// Counts flags of all threads of the CTA, in order. There are two sets of sums, used in turns, so that one barrier is
// enough: a thread writes a set only after a barrier that follows all reads of it.
struct Counter {
  Key* sums;  // [2][kWarps], of four flags each, 16 bits a flag
  int turn = 0;

  // Called by all threads. before[f]: number of lower threads whose flag[f] is set; total[f]: of all threads.
  template <int kFlags>
  __device__ void count(const bool (&flag)[kFlags], int (&before)[kFlags], int (&total)[kFlags]) {
    static_assert(kFlags <= 4 && kThreads < 1 << 16);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Key* sum = sums + turn * kWarps;
    turn ^= 1;
    Key votes_here = 0, lower = 0, all = 0;
#pragma unroll
    for (int f = 0; f < kFlags; f++) {
      const uint32_t votes = __ballot_sync(kAllLanes, flag[f]);
      before[f] = __popc(votes & ((1u << lane) - 1));
      votes_here |= (Key)__popc(votes) << 16 * f;
    }
    if (lane == 0) sum[warp] = votes_here;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const Key votes = sum[w];
      if (w < warp) lower += votes;
      all += votes;
    }
#pragma unroll
    for (int f = 0; f < kFlags; f++) {
      before[f] += (int)(lower >> 16 * f & 0xffff);
      total[f] = (int)(all >> 16 * f & 0xffff);
    }
  }
};

// Finds the cuts that select wanted[c] of n ranks. They share a histogram until their digits differ.
template <int kCuts>
__device__ inline void find_cuts(const Ranks& rank, int n, const int (&wanted)[kCuts], int* scan, Cut (&cut)[kCuts]) {
  int* histogram = scan;            // [kCuts][256]
  int* found = scan + kCuts * 256;  // [kCuts][2] the digit, and how many of that digit are still wanted
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t prefix[kCuts] = {};
  int needed[kCuts];
#pragma unroll
  for (int c = 0; c < kCuts; c++) needed[c] = wanted[c];
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int d = threadIdx.x; d < kCuts * 256; d += kThreads) histogram[d] = 0;
    __syncthreads();
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t own = rank[i], digit = own >> shift & 255;
#pragma unroll
      for (int c = 0; c < kCuts; c++)
        if ((shift == 24 || own >> (shift + 8) == prefix[c]) && (c == 0 || prefix[c] != prefix[0]))
          atomicAdd(&histogram[c * 256 + digit], 1);
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kCuts; c++)
      if (warp == c) {  // lane l has the digits from 255 - 8 l down
        const int* counts = histogram + (prefix[c] != prefix[0] ? c * 256 : 0);
        const int highest = 255 - 8 * lane;
        int here = 0;
        for (int d = 0; d < 8; d++) here += counts[highest - d];
        int upto = here;
        for (int step = 1; step < 32; step <<= 1) {
          const int lower = __shfl_up_sync(kAllLanes, upto, step);
          if (lane >= step) upto += lower;
        }
        int above = upto - here;
        if (above < needed[c] && needed[c] <= upto) {
          int d = highest;
          while (above + counts[d] < needed[c]) above += counts[d--];
          found[2 * c] = d;
          found[2 * c + 1] = needed[c] - above;
        }
      }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kCuts; c++)
      if (wanted[c] > 0) {
        prefix[c] = prefix[c] << 8 | (uint32_t)found[2 * c];
        needed[c] = found[2 * c + 1];
      }
    __syncthreads();
  }
#pragma unroll
  for (int c = 0; c < kCuts; c++) cut[c] = wanted[c] > 0 ? Cut{prefix[c], needed[c]} : Cut{kHighest, 0};
}

// Writes the entries of a merge target that s5 reads.
__device__ inline void add_target(const Call& call, const Image& image, int number, int position, float norm_sq) {
  call.target_token[image.row + number] = position;
  call.inv_norm[image.row + number] = norm_sq > 0 ? __fdiv_rn(1, __fsqrt_rn(norm_sq)) : 0;
}

// One thread writes the image and the lengths of its lists for s5. Without targets no token is merged.
__device__ inline void write_image(const Call& call, const Image& image, int s, int target_count, int dropped_count) {
  if (threadIdx.x != 0) return;
  call.table[s] = image;
  call.table[s].target_count = target_count;
  call.table[s].dropped_count = target_count > 0 ? dropped_count : 0;
}

// Makes the lists of image s, whose basis is in shared memory. slices > 0: also slice_begin of that many slices.
__device__ inline void s4_topk(const Call& call, const Image& image, int s, int basis_size, int slices) {
  int* scan = reinterpret_cast<int*>(shared_memory() + call.map.scan);
  const int* basis = reinterpret_cast<const int*>(shared_memory() + call.map.basis);
  const Ranks rank(call, image);
  const int n = image.tokens;
  const int overwritten = call.layout == APET_OVERWRITE && image.keep < n ? min(basis_size, image.keep) : 0;
  Cut kept, unreplaced;  // unreplaced: of tokens that are not overwritten
  if (overwritten > 0) {
    Cut cut[2];
    find_cuts<2>(rank, n, {image.keep, image.keep - overwritten}, scan, cut);
    kept = cut[0], unreplaced = cut[1];
  } else {
    Cut cut[1];
    find_cuts<1>(rank, n, {image.keep}, scan, cut);
    kept = unreplaced = cut[0];
  }
  Counter counter{reinterpret_cast<Key*>(scan)};
  const int slice = slices > 0 ? slice_tokens(n, slices) : 0;
  int32_t* slice_begin = slices > 0 ? call.slice_begin + (int64_t)s * (slices + 1) : nullptr;
  int kept_ties = 0, unreplaced_ties = 0, rows = 0, targets = 0, dropped = 0, replaced = 0;  // counts so far
  for (int64_t i0 = 0; i0 < n; i0 += kThreads) {
    const int64_t i = i0 + threadIdx.x;
    const bool inside = i < n;
    const uint32_t i_rank = inside ? rank[i] : 0;
    const bool finite = i_rank != kInfinite;
    const bool tie[2] = {inside && i_rank == kept.rank, inside && i_rank == unreplaced.rank};
    int ties_before[2], ties_here[2];
    counter.count(tie, ties_before, ties_here);
    const bool stays = inside && (i_rank > kept.rank || (tie[0] && kept_ties + ties_before[0] < kept.ties));
    const bool overwrite =
        stays && i_rank <= unreplaced.rank && !(tie[1] && unreplaced_ties + ties_before[1] < unreplaced.ties);
    const bool flag[4] = {stays, stays && !overwrite && finite, inside && !stays && finite, overwrite};
    int before[4], here[4];
    counter.count(flag, before, here);
    if (stays) {
      const int64_t row = image.row + rows + before[0];
      call.tensors.indices[row] = image.first_token + i;
      call.row_token[row] = overwrite ? basis[replaced + before[3]] : (int)i;
      call.row_role[row] = flag[1] ? targets + before[1] : overwrite && call.blend != 1 ? kBlended - (int)i : kCopied;
      if (flag[1]) add_target(call, image, targets + before[1], (int)i, __ldcg(call.norm_sq + image.token + i));
    }
    if (flag[2]) call.dropped[image.token + dropped + before[2]] = (int)i;
    if (inside && slices > 0 && i % slice == 0) slice_begin[i / slice] = dropped + before[2];
    kept_ties += ties_here[0], unreplaced_ties += ties_here[1];
    rows += here[0], targets += here[1], dropped += here[2], replaced += here[3];
  }
  for (int q = threadIdx.x; q <= slices && slices > 0; q += kThreads)
    if ((int64_t)q * slice >= n) slice_begin[q] = dropped;
  for (int j = threadIdx.x; j < image.filled - image.keep; j += kThreads) {
    // If fewer basis tokens were found than asked for, the first one is repeated; without any it is token 0.
    const int position = j < basis_size ? basis[j] : basis_size > 0 ? basis[0] : 0;
    const int64_t row = image.row + image.keep + j;
    call.tensors.indices[row] = image.first_token + position;
    call.row_token[row] = position;
    call.row_role[row] = kCopied;
  }
  write_image(call, image, s, targets, dropped);
}

// Makes the same lists for the op `merge`: rows given by the caller, in any order, repeated or out of range.
__device__ inline void s4_given_rows(const Call& call, const Image& image, int s, int slices) {
  Counter counter{reinterpret_cast<Key*>(shared_memory() + call.map.scan)};
  uint32_t* rank = call.rank + image.token;
  const int n = image.tokens;
  const int slice = slices > 0 ? slice_tokens(n, slices) : 0;
  int32_t* slice_begin = slices > 0 ? call.slice_begin + (int64_t)s * (slices + 1) : nullptr;
  int targets = 0, dropped = 0;  // counts so far
  for (int64_t r0 = 0; r0 < image.keep; r0 += kThreads) {
    const int64_t r = r0 + threadIdx.x;
    int position = 0;
    float norm_sq = 0;
    bool is_target[1] = {false};
    if (r < image.keep) {
      position = (int)min(max(call.tensors.kept[image.row + r], (int64_t)0), (int64_t)n - 1);
      norm_sq = __ldcg(call.norm_sq + image.token + position);
      is_target[0] = norm_sq <= FLT_MAX && (!call.tensors.kept_targets || call.tensors.kept_targets[image.row + r]);
      atomicMax(rank + position, kHighest);  // marks the token; several threads may, if a row is repeated
    }
    int before[1], here[1];
    counter.count(is_target, before, here);
    if (r < image.keep) {
      call.row_token[image.row + r] = position;
      call.row_role[image.row + r] = is_target[0] ? targets + before[0] : kCopied;
      if (is_target[0]) add_target(call, image, targets + before[0], position, norm_sq);
    }
    targets += here[0];
  }
  __syncthreads();  // all rows are marked
  for (int64_t i0 = 0; i0 < n; i0 += kThreads) {
    const int64_t i = i0 + threadIdx.x;
    const uint32_t i_rank = i < n ? __ldcg(rank + i) : kHighest;
    const bool is_dropped[1] = {i_rank < kInfinite};
    int before[1], here[1];
    counter.count(is_dropped, before, here);
    if (is_dropped[0]) call.dropped[image.token + dropped + before[0]] = (int)i;
    if (i < n && slices > 0 && i % slice == 0) slice_begin[i / slice] = dropped + before[0];
    dropped += here[0];
  }
  for (int q = threadIdx.x; q <= slices && slices > 0; q += kThreads)
    if ((int64_t)q * slice >= n) slice_begin[q] = dropped;
  write_image(call, image, s, targets, dropped);
}

}  // namespace apet::cuda
