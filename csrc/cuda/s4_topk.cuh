// s4: chooses the tokens that stay, exactly K of them, and makes the lists that s5 reads, all ascending by position.
//
// One CTA of the group computes it. rank is e_sq's bits (which ascend with it) + 1, so radix selection finds the K-th
// largest: four passes, each a histogram of 8 bits. Each warp has consecutive tokens, so it compacts without waiting for
// others once it knows how many tokens of lower warps stay: one pass that counts, one that writes. Only counts are added,
// so the result does not depend on the order in which threads run. The ranks are read once from L2, into shared memory
// that s1 to s3 have finished with, if they fit there.
//
//   rank [N] --> shared --4 passes--> the K-th largest, and the last of that rank that stays --2 passes-->
//   row_token, row_role, indices [K]      target_token, target_norm_sq [T]      dropped [N - K]
//
// The layout "overwrite" selects twice, in the same passes: kept tokens that are not among the K - m largest are
// overwritten by the basis.
#pragma once
#include <climits>

#include "s1_s3_sweep.cuh"

namespace apet::cuda {

// The tokens of a warp, of which it takes 32 at a time; lower warps have lower tokens.
struct Span {
  int begin, count;

  __device__ explicit Span(int n) {
    const int warp = threadIdx.x / 32, each = ((n - 1) / 32 + kWarps) / kWarps * 32;
    begin = min(warp * each, n), count = min(each, n - begin);
  }
};

// The ranks of an image's tokens, in shared memory if they fit. There is no barrier: a thread reads only the ranks that
// it has copied itself, those of tokens begin + lane + 32 i of its warp.
struct Ranks {
  const uint32_t* rank;
  Span own;

  // Called by all threads, after a barrier of the group: the ranks are written by all its CTAs.
  __device__ Ranks(const Call& call, const Image& image) : rank(call.rank + image.token), own(image.tokens) {
    if (image.tokens > call.map.rank_words) return;
    uint32_t* copy = reinterpret_cast<uint32_t*>(shared_memory() + call.map.ranks);
#pragma unroll 8
    for (int k = threadIdx.x % 32; k < own.count; k += 32) copy[own.begin + k] = __ldcg(rank + own.begin + k);
    rank = copy;
  }
  __device__ uint32_t operator[](int i) const { return rank[i]; }
};

template <int kFlags>
struct Flags {
  bool is[kFlags];
};

// Counts, for each flag, the tokens of lower warps that have it. Called by all threads, of which each asks flags_of(i) for
// some tokens of its warp. sums: [kWarps][kFlags], not used by others until the next barrier.
template <int kFlags, class FlagsOf>
__device__ inline void count_lower(const Span& own, int* sums, int (&lower)[kFlags], FlagsOf flags_of) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int count[kFlags] = {};
#pragma unroll 4
  for (int k = lane; k < own.count; k += 32) {
    const Flags<kFlags> flag = flags_of(own.begin + k);
#pragma unroll
    for (int f = 0; f < kFlags; f++) count[f] += flag.is[f];
  }
#pragma unroll
  for (int f = 0; f < kFlags; f++) {
    for (int step = 16; step > 0; step >>= 1) count[f] += __shfl_xor_sync(kAllLanes, count[f], step);
    if (lane == 0) sums[warp * kFlags + f] = count[f];
    lower[f] = 0;
  }
  __syncthreads();  // the sums of all warps are written
  for (int w = 0; w < warp; w++)
#pragma unroll
    for (int f = 0; f < kFlags; f++) lower[f] += sums[w * kFlags + f];
}

// Numbers 32 tokens of a warp: number[f] is that of the lane's token among those with flag f, and lower[f], the number of
// the first of them, is raised by their count.
template <int kFlags>
__device__ __forceinline__ void number_flags(const Flags<kFlags>& flag, int (&lower)[kFlags], int (&number)[kFlags]) {
#pragma unroll
  for (int f = 0; f < kFlags; f++) {
    const uint32_t votes = __ballot_sync(kAllLanes, flag.is[f]);
    number[f] = lower[f] + __popc(votes & ((1u << threadIdx.x % 32) - 1));
    lower[f] += __popc(votes);
  }
}

// Selects every rank above a rank, and tokens of exactly that rank up to a position, by one comparison.
struct Cut {
  uint64_t least;

  Cut() = default;
  __device__ Cut(uint32_t rank, int last) : least((uint64_t)rank << 32 | ~(uint32_t)last) {}
  __device__ bool selects(uint32_t rank, int i) const { return ((uint64_t)rank << 32 | ~(uint32_t)i) >= least; }
};
constexpr int kFound = 2 * 256;            // in the scratch of s4, after the histograms: what find_cuts has found
constexpr int kFoundTie = kFound + 2 * 3;  // and find_tie
static_assert(kFoundTie < kScanWords && 5 * kWarps <= kFound);

// Returns the position of the token of this rank before which there are `before` others. Called by all threads.
__device__ inline int find_tie(const Ranks& rank, uint32_t wanted, int before, int* scan) {
  int lower[1], number[1];
  count_lower<1>(rank.own, scan, lower, [&](int i) { return Flags<1>{rank[i] == wanted}; });
  for (int k = 0; k < rank.own.count; k += 32) {
    const int own = k + threadIdx.x % 32, i = rank.own.begin + own;
    const Flags<1> tie = {own < rank.own.count && rank[i] == wanted};
    number_flags(tie, lower, number);
    if (tie.is[0] && number[0] == before) scan[kFoundTie] = i;
  }
  __syncthreads();
  return scan[kFoundTie];
}

// Finds the cuts that select wanted[c] of n ranks. They share a histogram until their digits differ.
template <int kCuts>
__device__ inline void find_cuts(const Ranks& rank, const int (&wanted)[kCuts], int* scan, Cut (&cut)[kCuts]) {
  constexpr int kAtOnce = 4;   // ranks in registers: a load cannot pass the count before it
  int* histogram = scan;       // [kCuts][256]
  int* found = scan + kFound;  // [kCuts][3] the digit, how many of that digit are still wanted, and how many there are
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t prefix[kCuts] = {};
  int needed[kCuts], ties[kCuts];
#pragma unroll
  for (int c = 0; c < kCuts; c++) needed[c] = wanted[c];
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int d = threadIdx.x; d < kCuts * 256; d += kThreads) histogram[d] = 0;
    __syncthreads();
    for (int k = lane; k < rank.own.count; k += 32 * kAtOnce) {
      uint32_t own[kAtOnce];
#pragma unroll
      for (int b = 0; b < kAtOnce; b++) own[b] = k + 32 * b < rank.own.count ? rank[rank.own.begin + k + 32 * b] : 0;
#pragma unroll
      for (int b = 0; b < kAtOnce; b++)
#pragma unroll
        for (int c = 0; c < kCuts; c++)
          if (k + 32 * b < rank.own.count && (shift == 24 || own[b] >> (shift + 8) == prefix[c]) &&
              (c == 0 || prefix[c] != prefix[0]))
            atomicAdd(&histogram[c * 256 + (own[b] >> shift & 255)], 1);
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
          found[3 * c] = d;
          found[3 * c + 1] = needed[c] - above;
          found[3 * c + 2] = counts[d];
        }
      }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kCuts; c++)
      if (wanted[c] > 0) {
        prefix[c] = prefix[c] << 8 | (uint32_t)found[3 * c];
        needed[c] = found[3 * c + 1];
        ties[c] = found[3 * c + 2];
      }
    __syncthreads();
  }
#pragma unroll
  for (int c = 0; c < kCuts; c++) {
    const bool all = wanted[c] <= 0 || needed[c] == ties[c];  // of that rank
    cut[c] = wanted[c] <= 0 ? Cut(kHighest, -1)
                            : Cut(prefix[c], all ? INT_MAX : find_tie(rank, prefix[c], needed[c] - 1, scan));
  }
}

// Ends the lists of image s, and writes their lengths for s5. Without targets no token is merged. Called by the last warp,
// which knows the lengths. slices > 0: also slice_begin of the slices after the last token.
__device__ inline void end_lists(const Call& call, const Image& image, int s, int slices, int targets, int dropped) {
  const int64_t slice = slices > 0 ? slice_tokens(image.tokens, slices) : 0;
  for (int q = threadIdx.x % 32; q <= slices && slices > 0; q += 32)
    if (q * slice >= image.tokens) call.slice_begin[(int64_t)s * (slices + 1) + q] = dropped;
  if (threadIdx.x != kThreads - 1) return;
  call.table[s] = image;
  call.table[s].target_count = targets;
  call.table[s].dropped_count = targets > 0 ? dropped : 0;
}

// Lists the tokens of image s by its cuts: kept, and with two cuts those that are not overwritten.
template <int kCuts>
__device__ inline void list_tokens(const Call& call, const Image& image, int s, const Ranks& rank,
                                   const Cut (&cut)[kCuts], int* scan, int slices) {
  enum { kStays, kDropped, kTarget, kOverwritten, kMost };
  constexpr int kFlags = kCuts == 1 ? kOverwritten : kMost;
  constexpr int kBatch = 4;  // times 32 tokens, whose norms are read at once
  // inside: false for positions after the warp's last token, which have no flag
  const auto flags_of = [&](int i, bool inside) {
    const uint32_t i_rank = inside ? rank[i] : 0;
    const bool stays = inside && cut[0].selects(i_rank, i), finite = i_rank != kInfinite;
    Flags<kFlags> flag;
    flag.is[kStays] = stays, flag.is[kDropped] = inside && !stays && finite, flag.is[kTarget] = stays && finite;
    if constexpr (kCuts == 2) {
      const bool overwritten = stays && !cut[1].selects(i_rank, i);
      flag.is[kOverwritten] = overwritten, flag.is[kTarget] = flag.is[kTarget] && !overwritten;
    }
    return flag;
  };
  const int* basis = reinterpret_cast<const int*>(shared_memory() + call.map.basis);
  const float* norm_sq = call.norm_sq + image.token;
  int64_t* indices = call.tensors.indices + image.row;
  int32_t *row_token = call.row_token + image.row, *row_role = call.row_role + image.row;
  int32_t *target_token = call.target_token + image.row, *dropped = call.dropped + image.token;
  float* target_norm_sq = call.target_norm_sq + image.row;
  int32_t* slice_begin = call.slice_begin + (int64_t)s * (slices + 1);
  const int slice = slices > 0 ? slice_tokens(image.tokens, slices) : 0;
  const int lane = threadIdx.x % 32;
  int lower[kFlags];
  count_lower(rank.own, scan, lower, [&](int i) { return flags_of(i, true); });
  for (int k = lane; k - lane < rank.own.count; k += 32 * kBatch) {
    Flags<kFlags> flag[kBatch];
    int number[kBatch][kFlags];
    float own_norm_sq[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      const int own = k + 32 * b, i = rank.own.begin + own;
      flag[b] = flags_of(i, own < rank.own.count);
      number_flags(flag[b], lower, number[b]);
      own_norm_sq[b] = flag[b].is[kTarget] ? __ldcg(norm_sq + i) : 0;
    }
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      const int own = k + 32 * b, i = rank.own.begin + own;
      if (flag[b].is[kStays]) {
        const int row = number[b][kStays];
        int token = i, role = flag[b].is[kTarget] ? number[b][kTarget] : kCopied;
        if constexpr (kCuts == 2)
          if (flag[b].is[kOverwritten]) {
            token = basis[number[b][kOverwritten]];
            if (call.blend != 1) role = kBlended - i;
          }
        indices[row] = image.first_token + i;
        row_token[row] = token;
        row_role[row] = role;
      }
      if (flag[b].is[kTarget]) {
        target_token[number[b][kTarget]] = i;
        target_norm_sq[number[b][kTarget]] = own_norm_sq[b];
      }
      if (flag[b].is[kDropped]) dropped[number[b][kDropped]] = i;
      if (slices > 0 && own < rank.own.count && i % slice == 0) slice_begin[i / slice] = number[b][kDropped];
    }
  }
  if (threadIdx.x / 32 == kWarps - 1) end_lists(call, image, s, slices, lower[kTarget], lower[kDropped]);
}

// Makes the lists of image s, whose basis is in shared memory. slices > 0: also slice_begin of that many slices.
__device__ inline void s4_topk(const Call& call, const Image& image, int s, int basis_size, int slices) {
  int* scan = reinterpret_cast<int*>(shared_memory() + call.map.scan);
  const int* basis = reinterpret_cast<const int*>(shared_memory() + call.map.basis);
  const Ranks rank(call, image);
  const int overwritten = call.layout == APET_OVERWRITE && image.keep < image.tokens ? min(basis_size, image.keep) : 0;
  if (overwritten > 0) {
    Cut cut[2];
    find_cuts<2>(rank, {image.keep, image.keep - overwritten}, scan, cut);
    list_tokens<2>(call, image, s, rank, cut, scan, slices);
  } else {
    Cut cut[1];
    find_cuts<1>(rank, {image.keep}, scan, cut);
    list_tokens<1>(call, image, s, rank, cut, scan, slices);
  }
  for (int j = threadIdx.x; j < image.filled - image.keep; j += kThreads) {
    // If fewer basis tokens were found than asked for, the first one is repeated; without any it is token 0.
    const int position = j < basis_size ? basis[j] : basis_size > 0 ? basis[0] : 0;
    const int64_t row = image.row + image.keep + j;
    call.tensors.indices[row] = image.first_token + position;
    call.row_token[row] = position;
    call.row_role[row] = kCopied;
  }
}

// Makes the same lists for the op `merge`: rows given by the caller, in any order, repeated or out of range.
__device__ inline void s4_given_rows(const Call& call, const Image& image, int s, int slices) {
  int* scan = reinterpret_cast<int*>(shared_memory() + call.map.scan);
  uint32_t* rank = call.rank + image.token;
  const int n = image.tokens, lane = threadIdx.x % 32;
  const Span rows(image.keep), tokens(n);
  const auto position_of = [&](int r) {
    return (int)min(max(call.tensors.kept[image.row + r], (int64_t)0), (int64_t)n - 1);
  };
  const auto target_of = [&](int r) {
    return Flags<1>{__ldcg(call.norm_sq + image.token + position_of(r)) <= FLT_MAX &&
                    (!call.tensors.kept_targets || call.tensors.kept_targets[image.row + r])};
  };
  int lower[1], number[1];
  count_lower(rows, scan, lower, [&](int r) {
    atomicMax(rank + position_of(r), kHighest);  // marks the token; several threads may, if a row is repeated
    return target_of(r);
  });  // all rows are marked
  for (int k = 0; k < rows.count; k += 32) {
    const int r = rows.begin + k + lane;
    const bool inside = k + lane < rows.count;
    const Flags<1> target = inside ? target_of(r) : Flags<1>{};
    number_flags(target, lower, number);
    if (!inside) continue;
    const int position = position_of(r);
    call.row_token[image.row + r] = position;
    call.row_role[image.row + r] = target.is[0] ? number[0] : kCopied;
    if (target.is[0]) {
      call.target_token[image.row + number[0]] = position;
      call.target_norm_sq[image.row + number[0]] = __ldcg(call.norm_sq + image.token + position);
    }
  }
  const int targets = lower[0];  // of all rows, in the last warp
  const auto dropped_of = [&](int i) { return Flags<1>{__ldcg(rank + i) < kInfinite}; };
  const int slice = slices > 0 ? slice_tokens(n, slices) : 0;
  count_lower(tokens, scan + kWarps, lower, dropped_of);
  for (int k = 0; k < tokens.count; k += 32) {
    const int i = tokens.begin + k + lane;
    const bool inside = k + lane < tokens.count;
    const Flags<1> dropped = inside ? dropped_of(i) : Flags<1>{};
    number_flags(dropped, lower, number);
    if (dropped.is[0]) call.dropped[image.token + number[0]] = i;
    if (slices > 0 && inside && i % slice == 0) call.slice_begin[(int64_t)s * (slices + 1) + i / slice] = number[0];
  }
  if (threadIdx.x / 32 == kWarps - 1) end_lists(call, image, s, slices, targets, lower[0]);
}

}  // namespace apet::cuda
