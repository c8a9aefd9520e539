// s5, between assignment and means: groups the dropped tokens by target, ascending within a group, so that s5_mean
// reads no others.
//
// This is a counting sort. A CTA takes some of the targets; it counts their tokens, and those of all lower targets,
// which lie before them. Then it reads the targets again, kListChunk at a time, and each warp writes the lists of its
// own targets:
//
//   target_key [dropped_count] --count--> count [targets] --prefix--> target_begin
//                              --chunk--> target --32 at a time--> merged
//
// Counts use atomics; list positions use warp ballots, and each target belongs to one warp. So the order of threads
// does not affect a list.
#pragma once
#include "call.cuh"

namespace apet::cuda {

// Targets of a CTA at a time, at most: one part for most images, and several CTAs for thousands of targets.
constexpr int kListTargets = 512;
// Dropped tokens that a CTA reads at once: 8 or 16 loads in flight per thread, in 8 KB, less than the buffers of
// s5_assign.
constexpr int kListChunk = 2048;
constexpr int kListWords = kListTargets + 1 + kListChunk;  // of shared memory

// Returns how many parts of kListTargets the targets of an image make.
__host__ __device__ constexpr int64_t list_parts(int64_t targets) {
  return (targets + kListTargets - 1) / kListTargets;
}

// Makes the lists of targets [t0, t_end), at most kListTargets, by one CTA of kCtaThreads. target_begin: [T + 1] of
// this image, of which it writes the entries of its targets, and with t_end == last also the end of the last list.
// count: [kListWords] words of shared memory.
template <int kCtaThreads>
__device__ inline void s5_lists(const Call& call, const Image& image, int32_t* target_begin, int t0, int t_end,
                                int last, int* count) {
  static_assert(kListTargets % 32 == 0);
  int* lower = count + kListTargets;  // tokens of targets below t0
  int* target = lower + 1;            // [kListChunk] of a chunk's tokens; -1 behind the last token
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, targets = t_end - t0;
  const int n = image.dropped_count;
  const Key* key = call.target_key + image.token;

  __syncthreads();  // all threads have finished with what was in `count`
  for (int t = thread; t <= kListTargets; t += kCtaThreads) count[t] = 0;
  __syncthreads();
  int below = 0;
  // Every key is in a register before the first is counted: behind an atomic, a load would wait for its turn.
  constexpr int kFlight = 8;
  for (int d0 = thread; d0 < n; d0 += kFlight * kCtaThreads) {
    int t[kFlight];
#pragma unroll
    for (int f = 0; f < kFlight; f++) t[f] = unpack(__ldcg(key + min(d0 + f * kCtaThreads, n - 1)));
#pragma unroll
    for (int f = 0; f < kFlight; f++) {
      if (d0 + f * kCtaThreads >= n) break;  // the last key again
      if (t[f] >= t0 && t[f] < t_end) atomicAdd(&count[t[f] - t0], 1);
      else below += t[f] < t0;
    }
  }
  for (int step = 16; step; step >>= 1) below += __shfl_xor_sync(kAllLanes, below, step);
  if (lane == 0) atomicAdd(lower, below);
  __syncthreads();
  if (warp == 0) {  // lane l has the targets from l * kEach on
    constexpr int kEach = kListTargets / 32;
    int here = 0;
    for (int i = 0; i < kEach; i++) here += count[lane * kEach + i];
    int upto = here;
    for (int step = 1; step < 32; step <<= 1) {
      const int before = __shfl_up_sync(kAllLanes, upto, step);
      if (lane >= step) upto += before;
    }
    int begin = *lower + upto - here;
    for (int i = 0; i < kEach; i++) {
      const int t = lane * kEach + i, own = count[t];
      count[t] = begin;
      if (t < targets) target_begin[t0 + t] = begin;
      begin += own;
    }
    if (lane == 31 && t_end == last) target_begin[t_end] = begin;
  }
  __syncthreads();

  // count[t]: where the next token of target t0 + t goes. The warp's own targets are [first, end).
  constexpr int kCtaWarps = kCtaThreads / 32;
  const int first = t0 + targets * warp / kCtaWarps, end = t0 + targets * (warp + 1) / kCtaWarps;
  for (int d0 = 0; d0 < n; d0 += kListChunk) {
    __syncthreads();  // all warps have finished the chunk before
#pragma unroll 8
    for (int i = thread; i < kListChunk; i += kCtaThreads) {
      const Key of = __ldcg(key + min(d0 + i, n - 1));
      target[i] = d0 + i < n ? unpack(of) : -1;
    }
    __syncthreads();
    for (int i0 = 0; i0 < min(kListChunk, n - d0); i0 += 32) {
      const int own = target[i0 + lane];
      for (uint32_t todo = __ballot_sync(kAllLanes, own >= first && own < end); todo != 0;) {
        const int t = __shfl_sync(kAllLanes, own, __ffs((int)todo) - 1);
        const uint32_t group = __ballot_sync(kAllLanes, own == t);
        const int at = count[t - t0];
        __syncwarp();  // all lanes have read the count
        if (own == t) call.merged[image.token + at + __popc(group & ((1u << lane) - 1))] = d0 + i0 + lane;
        if (lane == 0) count[t - t0] = at + __popc(group);
        __syncwarp();
        todo &= ~group;
      }
    }
  }
}

}  // namespace apet::cuda
