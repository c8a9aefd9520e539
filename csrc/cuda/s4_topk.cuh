// s4: chooses the tokens that stay, exactly K of them, and makes the lists that s5 reads, all ascending by position.
//
// One CTA of the group computes it. rank is e_sq's bits (which ascend with it) + 1, so radix selection finds the K-th
// largest: four passes, each a histogram of 8 bits. One more pass compacts, in order, by counting the flags of lower
// threads. Only counts are added, so the result does not depend on the order in which threads run.
//
//   rank [N] --4 passes--> the K-th largest, and how many of that rank stay --1 pass-->
//   row_token, row_role, indices [K]      target_token, inv_norm [T]      dropped [N - K]
//
// The layout "overwrite" selects twice: kept tokens that are not among the K - m largest are overwritten by the basis.
#pragma once
#include "s1_s3_sweep.cuh"

namespace apet::cuda {

// Selects every rank above `rank`, and the first `ties` tokens of exactly that rank.
struct Cut {
  uint32_t rank;
  int ties;
};

// Called by all threads. before[f]: number of lower threads whose flag[f] is set; total[f]: the number in the whole
// CTA.
template <int kFlags>
__device__ inline void count_before(const bool (&flag)[kFlags], int (&before)[kFlags], int (&total)[kFlags],
                                    int* scan) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int f = 0; f < kFlags; f++) {
    const uint32_t votes = __ballot_sync(kAllLanes, flag[f]);
    before[f] = __popc(votes & ((1u << lane) - 1));
    total[f] = 0;
    if (lane == 0) scan[f * kWarps + warp] = __popc(votes);
  }
  __syncthreads();
#pragma unroll
  for (int f = 0; f < kFlags; f++)
    for (int w = 0; w < kWarps; w++) {
      const int votes = scan[f * kWarps + w];
      if (w < warp) before[f] += votes;
      total[f] += votes;
    }
  __syncthreads();
}

// The cut that selects `wanted` of rank[0..n).
__device__ inline Cut find_cut(const uint32_t* rank, int n, int wanted, int* scan) {
  if (wanted <= 0) return {kHighest, 0};
  int* histogram = scan;    // [256]
  int* found = scan + 256;  // the digit, and how many of that digit are still wanted
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int d = threadIdx.x; d < 256; d += kThreads) histogram[d] = 0;
    __syncthreads();
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t own = __ldcg(rank + i);
      if (shift == 24 || own >> (shift + 8) == prefix) atomicAdd(&histogram[own >> shift & 255], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // lane l has the digits from 255 - 8 l down
      const int highest = 255 - 8 * threadIdx.x;
      int here = 0;
      for (int d = 0; d < 8; d++) here += histogram[highest - d];
      int upto = here;
      for (int step = 1; step < 32; step <<= 1) {
        const int lower = __shfl_up_sync(kAllLanes, upto, step);
        if ((int)threadIdx.x >= step) upto += lower;
      }
      int above = upto - here;
      if (above < wanted && wanted <= upto) {
        int d = highest;
        while (above + histogram[d] < wanted) above += histogram[d--];
        found[0] = d;
        found[1] = wanted - above;
      }
    }
    __syncthreads();
    prefix = prefix << 8 | (uint32_t)found[0];
    wanted = found[1];
    __syncthreads();
  }
  return {prefix, wanted};
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

// The lists of image s, whose basis is in shared memory. slices > 0: also slice_begin of that many slices.
__device__ inline void s4_topk(const Call& call, const Image& image, int s, int basis_size, int slices) {
  int* scan = reinterpret_cast<int*>(shared_memory() + call.map.scan);
  const int* basis = reinterpret_cast<const int*>(shared_memory() + call.map.basis);
  const uint32_t* rank = call.rank + image.token;
  const int n = image.tokens;
  const int overwritten = call.layout == APET_OVERWRITE && image.keep < n ? min(basis_size, image.keep) : 0;
  const Cut kept = find_cut(rank, n, image.keep, scan);
  const Cut own = overwritten > 0 ? find_cut(rank, n, image.keep - overwritten, scan) : kept;  // not overwritten
  const int slice = slices > 0 ? slice_tokens(n, slices) : 0;
  int32_t* slice_begin = slices > 0 ? call.slice_begin + (int64_t)s * (slices + 1) : nullptr;
  int kept_ties = 0, own_ties = 0, rows = 0, targets = 0, dropped = 0, replaced = 0;  // counts so far
  for (int64_t i0 = 0; i0 < n; i0 += kThreads) {
    const int64_t i = i0 + threadIdx.x;
    const bool inside = i < n;
    const uint32_t i_rank = inside ? __ldcg(rank + i) : 0;
    const bool finite = i_rank != kInfinite;
    const bool tie[2] = {inside && i_rank == kept.rank, inside && i_rank == own.rank};
    int ties_before[2], ties_here[2];
    count_before(tie, ties_before, ties_here, scan);
    const bool stays = inside && (i_rank > kept.rank || (tie[0] && kept_ties + ties_before[0] < kept.ties));
    const bool overwrite = stays && i_rank <= own.rank && !(tie[1] && own_ties + ties_before[1] < own.ties);
    const bool flag[4] = {stays, stays && !overwrite && finite, inside && !stays && finite, overwrite};
    int before[4], here[4];
    count_before(flag, before, here, scan);
    if (stays) {
      const int64_t row = image.row + rows + before[0];
      call.tensors.indices[row] = image.first_token + i;
      call.row_token[row] = overwrite ? basis[replaced + before[3]] : (int)i;
      call.row_role[row] = flag[1] ? targets + before[1] : overwrite && call.blend != 1 ? kBlended - (int)i : kCopied;
      if (flag[1]) add_target(call, image, targets + before[1], (int)i, __ldcg(call.norm_sq + image.token + i));
    }
    if (flag[2]) call.dropped[image.token + dropped + before[2]] = (int)i;
    if (inside && slices > 0 && i % slice == 0) slice_begin[i / slice] = dropped + before[2];
    kept_ties += ties_here[0], own_ties += ties_here[1];
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

// The same lists for the op `merge`: rows given by the caller, in any order, repeated or out of range.
__device__ inline void s4_given_rows(const Call& call, const Image& image, int s, int slices) {
  int* scan = reinterpret_cast<int*>(shared_memory() + call.map.scan);
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
    count_before(is_target, before, here, scan);
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
    count_before(is_dropped, before, here, scan);
    if (is_dropped[0]) call.dropped[image.token + dropped + before[0]] = (int)i;
    if (i < n && slices > 0 && i % slice == 0) slice_begin[i / slice] = dropped + before[0];
    dropped += here[0];
  }
  for (int q = threadIdx.x; q <= slices && slices > 0; q += kThreads)
    if ((int64_t)q * slice >= n) slice_begin[q] = dropped;
  write_image(call, image, s, targets, dropped);
}

}  // namespace apet::cuda
