// s4 with medoid steps, as a launch of its own after s1_s4_group or s1_s4_rounds: a step replaces every merge target by
// the token of its cluster that is nearest to the cluster's mean. By a group of CTAs per image:
//
//   target_key   = the target that a dropped token is nearest to         tiles of s5_assign, by all CTAs of the group
//   merged       = the tokens of each cluster                            s5_lists, by each CTA for its own targets
//   cluster_mean = (x_t + sum of its tokens) / (1 + their count)         a CTA per target: its warps divide the columns,
//   medoid       = arg min ||x - cluster_mean||^2                        then the tokens of the cluster
//   rank         = the highest of medoids, 0 of other finite tokens      one CTA, which then makes the lists of s4 again
//
// Kept tokens that are no targets (their norm is not finite) stay. In a cluster of two both tokens are equally far from
// the mean, so the lower one is taken, whatever the rounded distances are.
#pragma once
#include "s1_pool.cuh"
#include "s1_s4_group.cuh"
#include "s5_assign.cuh"
#include "s5_lists.cuh"
#include "s5_mean.cuh"

namespace apet::cuda {

// Writes the mean [D] of token `own` and of the `count` tokens that `merged` lists from `begin` on; all warps of the
// CTA share the columns.
template <class T>
__device__ inline void cluster_mean(const Call& call, const Image& image, int own, int begin, int count, float* mean) {
  constexpr int kSize = Chunk<T>::kSize;
  const T* own_row = static_cast<const T*>(call.tensors.x) + image.base + own * call.stride_xn;
  const int chunks = chunks_of<T>(call.dim);
  for (int block = threadIdx.x / 32; block < mean_blocks<T, 1>(call.dim); block += kWarps) {
    const int k = block * 32 + threadIdx.x % 32;
    const Chunk<T> chunk[1] = {k < chunks ? load_chunk(own_row, k, call.dim, call.whole_in) : Chunk<T>{}};
    float sum[1][kSize];
#pragma unroll
    for (int i = 0; i < kSize; i++) sum[0][i] = widen(chunk[0].v[i]);
    add_listed<T, 1>(call, image, begin, count, k, sum);
#pragma unroll
    for (int i = 0; i < kSize; i++)
      if (k * kSize + i < call.dim) mean[k * kSize + i] = __fdiv_rn(sum[0][i], (float)(1 + count));
  }
}

// Returns ||x - mean||^2 of the token at a position, in every lane of the calling warp.
template <class T>
__device__ inline float mean_dist_sq(const Call& call, const Image& image, int position, const float* mean) {
  const T* row = static_cast<const T*>(call.tensors.x) + image.base + position * call.stride_xn;
  float sum = 0;
#pragma unroll 2
  for (int k = threadIdx.x % 32; k < chunks_of<T>(call.dim); k += 32) {
    const Chunk<T> chunk = load_chunk(row, k, call.dim, call.whole_in);
    float here = 0;
#pragma unroll
    for (int i = 0; i < Chunk<T>::kSize; i++) {
      const int d = k * Chunk<T>::kSize + i;
      const float off = d < call.dim ? __fsub_rn(widen(chunk.v[i]), mean[d]) : 0;
      here = __fmaf_rn(off, off, here);
    }
    sum = __fadd_rn(sum, here);
  }
  for (int step = 16; step; step >>= 1) sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, step));
  return sum;
}

// Returns the medoid of the cluster of `target`, whose other tokens are listed from `begin` on. One CTA; mean: [D].
template <class T>
__device__ inline int find_medoid(const Call& call, const Image& image, int target, int begin, int count, float* mean) {
  Key* warp_best = reinterpret_cast<Key*>(shared_memory() + call.map.warp_best);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto listed = [&](int q) {
    return __ldcg(call.dropped + image.token + __ldcg(call.merged + image.token + begin + q));
  };
  if (count == 0) return target;
  if (count == 1) return min(target, listed(0));
  cluster_mean<T>(call, image, target, begin, count, mean);
  __syncthreads();  // the mean is written
  Key best = 0;
  for (int q = warp; q <= count; q += kWarps) {
    const int position = q < count ? listed(q) : target;
    best = larger(best, pack(ordered(-mean_dist_sq<T>(call, image, position, mean)), position));
  }
  if (lane == 0) warp_best[warp] = best;
  __syncthreads();
  best = warp_largest(lane < kWarps ? warp_best[lane] : 0);
  __syncthreads();  // all threads have finished with the mean and the best of the warps
  return unpack(best);
}

// Finds the medoids of the clusters of the image's targets, by all CTAs of the group. All keys must be 0.
template <class T, class Group>
__device__ inline void find_medoids(const Call& call, const Image& image, Group& group, int s) {
  unsigned char* shared = shared_memory() + call.map.s5;
  const int targets = image.target_count, dropped = image.dropped_count;
  const int across = (targets + GroupTile::kColumns - 1) / GroupTile::kColumns;
  const int tiles = (dropped + GroupTile::kRows - 1) / GroupTile::kRows * across;
  for (int tile = group.cta; tile < tiles; tile += group.size)
    s5_assign<T, GroupTile, false, true>(call, image, nullptr, tile / across * GroupTile::kRows, dropped,
                                         tile % across * GroupTile::kColumns, shared);
  group.sync();  // the clusters of all dropped tokens are written

  const int each = (targets + group.size - 1) / group.size, first = min(group.cta * each, targets);
  const int end = min(first + each, targets);
  // T + 1 entries for all CTAs, and one for the end of each but the last.
  int32_t* target_begin = call.target_begin + image.row + (int64_t)s * group.size + group.cta;
  for (int t0 = first; t0 < end; t0 += kListTargets)
    s5_lists<kThreads>(call, image, target_begin, t0, min(t0 + kListTargets, end), end, reinterpret_cast<int*>(shared));
  __syncthreads();  // the lists of all own clusters are written
  float* mean = call.cluster_mean + ((int64_t)group.first * min(group.size, call.keep) + group.cta) * call.dim;
  for (int t = first; t < end; t++) {
    const int begin = target_begin[t], count = target_begin[t + 1] - begin;
    const int medoid = find_medoid<T>(call, image, __ldcg(call.target_token + image.row + t), begin, count, mean);
    if (threadIdx.x == 0) call.medoid[image.row + t] = medoid;
  }
}

// Lists the medoids in place of the targets, by one CTA.
__device__ inline void list_medoids(const Call& call, const Image& image, int s) {
  uint32_t* rank = call.rank + image.token;
  for (int i = threadIdx.x; i < image.tokens; i += kThreads)
    if (__ldcg(rank + i) != kInfinite) rank[i] = 0;
  __syncthreads();
  for (int t = threadIdx.x; t < image.target_count; t += kThreads) rank[__ldcg(call.medoid + image.row + t)] = kHighest;
  __syncthreads();
  s4_topk(call, image, s, 0, 0);
}

template <class T, class Group>
__global__ void __launch_bounds__(kThreads, 1) s4_medoids(const Call call) {
  if constexpr (kHasClusters || std::is_same_v<Group, CooperativeGroup>) {
    Group group(call);
    Image& image = *reinterpret_cast<Image*>(shared_memory() + call.map.work);
    for (uint32_t s = group.first; s < (uint32_t)call.images; s += group.stride) {
      __syncthreads();  // all threads have finished with the image before
      if (threadIdx.x == 0) image = call.table[s];
      __syncthreads();
      if (image.dropped_count == 0) continue;
      for (int step = 0; step < call.refine; step++) {
        find_medoids<T>(call, image, group, (int)s);
        group.sync();  // all medoids are written, and all keys and lists are read
        clear_keys(call, image, group.cta, group.size);
        if (group.cta == 0) list_medoids(call, image, (int)s);
        group.sync();  // the lists are written, and all keys are 0
      }
    }
  }
}

}  // namespace apet::cuda
