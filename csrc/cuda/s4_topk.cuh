// s4: which tokens stay, exactly K of them, and the lists that s5 reads, all ascending by position.
//
// One CTA of the group does it. rank is e^2's bits (which ascend with it) + 1, so the K-th largest is found by radix
// selection: four passes, each a histogram of 8 bits; one more pass compacts, in order, by counting flags before each
// thread. What is added is counts, so nothing depends on the order in which threads come.
//
//   rank [n] --4 passes--> the K-th largest, and how many of those equal to it stay --1 pass-->
//   row_token, row_role, indices [K]      target, target_scale [targets]      dropped [n - K]
//
// "overwrite" selects twice: the kept that do not rank among the best K - m are the slots that the basis takes over.
#pragma once
#include "s1_s3_select.cuh"

namespace apet::cuda {

// Takes every rank above key, and the first `ties` of those equal to it.
struct Cut {
  uint32_t key;
  int ties;
};

// before[f]: for how many threads below this one flag[f] holds; total[f]: for how many of the CTA. All threads.
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

// The wanted-th largest of rank[0..n).
__device__ inline Cut cut_at(const uint32_t* rank, int n, int wanted, int* scan) {
  if (wanted <= 0) return {kHighest, 0};
  int* histogram = scan;    // [256]
  int* found = scan + 256;  // digit, and what is still wanted
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int d = threadIdx.x; d < 256; d += kThreads) histogram[d] = 0;
    __syncthreads();
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t key = __ldcg(rank + i);
      if (shift == 24 || key >> (shift + 8) == prefix) atomicAdd(&histogram[key >> shift & 255], 1);
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

// What s5 has to know of a merge target.
__device__ inline void add_target(const Call& call, const Image& image, int ordinal, int position, float norm) {
  call.target[image.row + ordinal] = position;
  call.target_scale[image.row + ordinal] = norm > 0 ? __fdiv_rn(1, __fsqrt_rn(norm)) : 0;
}

// Where there are no targets, the dropped are lost. One thread says so to s5.
__device__ inline void count_lists(const Call& call, const Image& image, int s, int targets, int dropped) {
  if (threadIdx.x != 0) return;
  call.table[s] = image;
  call.table[s].targets = targets;
  call.table[s].dropped = targets > 0 ? dropped : 0;
}

// The lists of image s, whose basis is the m tokens in shared memory. `slices` > 0: also where each of so many slices
// starts among the dropped.
__device__ inline void s4_topk(const Call& call, const Image& image, int s, int m, int slices) {
  int* scan = reinterpret_cast<int*>(shared_memory() + call.map.scan);
  const int* basis = reinterpret_cast<const int*>(shared_memory() + call.map.basis);
  const uint32_t* rank = call.rank + image.token;
  const int n = image.count;
  const int slots = call.layout == APET_OVERWRITE && image.keep < n ? min(m, image.keep) : 0;
  const Cut kept = cut_at(rank, n, image.keep, scan);
  const Cut above = slots > 0 ? cut_at(rank, n, image.keep - slots, scan) : kept;
  const int slice = slices > 0 ? slice_rows(n, slices) : 0;
  int32_t* bounds = slices > 0 ? call.bounds + (int64_t)s * (slices + 1) : nullptr;
  int ties = 0, ties_above = 0, rows = 0, targets = 0, dropped = 0, taken = 0;  // so far
  for (int64_t i0 = 0; i0 < n; i0 += kThreads) {
    const int64_t i = i0 + threadIdx.x;
    const bool inside = i < n;
    const uint32_t key = inside ? __ldcg(rank + i) : 0;
    const bool finite = key != kInfinite;
    const bool tie[2] = {inside && key == kept.key, inside && key == above.key};
    int tied[2], tied_here[2];
    count_before(tie, tied, tied_here, scan);
    const bool stays = inside && (key > kept.key || (tie[0] && ties + tied[0] < kept.ties));
    const bool slot = stays && key <= above.key && !(tie[1] && ties_above + tied[1] < above.ties);
    const bool flag[4] = {stays, stays && !slot && finite, inside && !stays && finite, slot};
    int before[4], here[4];
    count_before(flag, before, here, scan);
    if (stays) {
      const int64_t row = image.row + rows + before[0];
      call.at.indices[row] = image.first + i;
      call.row_token[row] = slot ? basis[taken + before[3]] : (int)i;
      call.row_role[row] = flag[1] ? targets + before[1] : slot && call.blend != 1 ? kUnder - (int)i : kCopied;
      if (flag[1]) add_target(call, image, targets + before[1], (int)i, __ldcg(call.norm2 + image.token + i));
    }
    if (flag[2]) call.dropped[image.token + dropped + before[2]] = (int)i;
    if (inside && slices > 0 && i % slice == 0) bounds[i / slice] = dropped + before[2];
    ties += tied_here[0], ties_above += tied_here[1];
    rows += here[0], targets += here[1], dropped += here[2], taken += here[3];
  }
  for (int q = threadIdx.x; q <= slices && slices > 0; q += kThreads)
    if ((int64_t)q * slice >= n) bounds[q] = dropped;
  for (int j = threadIdx.x; j < image.filled - image.keep; j += kThreads) {
    // A shorter basis repeats its first token, or token 0.
    const int position = j < m ? basis[j] : m > 0 ? basis[0] : 0;
    const int64_t row = image.row + image.keep + j;
    call.at.indices[row] = image.first + position;
    call.row_token[row] = position;
    call.row_role[row] = kCopied;
  }
  count_lists(call, image, s, targets, dropped);
}

// The same lists for the op `merge`: rows given by the caller, in any order, repeated or out of range.
__device__ inline void s4_given_rows(const Call& call, const Image& image, int s, int slices) {
  int* scan = reinterpret_cast<int*>(shared_memory() + call.map.scan);
  uint32_t* rank = call.rank + image.token;
  const int n = image.count;
  const int slice = slices > 0 ? slice_rows(n, slices) : 0;
  int32_t* bounds = slices > 0 ? call.bounds + (int64_t)s * (slices + 1) : nullptr;
  int targets = 0, dropped = 0;
  for (int64_t k0 = 0; k0 < image.keep; k0 += kThreads) {
    const int64_t k = k0 + threadIdx.x;
    int position = 0;
    float norm = 0;
    bool receives[1] = {false};
    if (k < image.keep) {
      position = (int)min(max(call.at.kept[image.row + k], (int64_t)0), (int64_t)n - 1);
      norm = __ldcg(call.norm2 + image.token + position);
      receives[0] = norm <= FLT_MAX && (!call.at.kept_targets || call.at.kept_targets[image.row + k]);
      atomicMax(rank + position, kHighest);  // listed; by several threads, where a row is repeated
    }
    int before[1], here[1];
    count_before(receives, before, here, scan);
    if (k < image.keep) {
      call.row_token[image.row + k] = position;
      call.row_role[image.row + k] = receives[0] ? targets + before[0] : kCopied;
      if (receives[0]) add_target(call, image, targets + before[0], position, norm);
    }
    targets += here[0];
  }
  __syncthreads();  // all are listed
  for (int64_t i0 = 0; i0 < n; i0 += kThreads) {
    const int64_t i = i0 + threadIdx.x;
    const uint32_t key = i < n ? __ldcg(rank + i) : kHighest;
    const bool left[1] = {key < kInfinite};
    int before[1], here[1];
    count_before(left, before, here, scan);
    if (left[0]) call.dropped[image.token + dropped + before[0]] = (int)i;
    if (i < n && slices > 0 && i % slice == 0) bounds[i / slice] = dropped + before[0];
    dropped += here[0];
  }
  for (int q = threadIdx.x; q <= slices && slices > 0; q += kThreads)
    if ((int64_t)q * slice >= n) bounds[q] = dropped;
  count_lists(call, image, s, targets, dropped);
}

}  // namespace apet::cuda
