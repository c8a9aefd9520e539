// The kernels, each named by the stages that it spans, as the host sees them: one table per dtype.
//
//   path          first launch                          second launch
//   fused         s1_s5_cluster
//   cluster       s1_s4_group<T, ClusterGroup>          s5_merge
//   cooperative   s1_s4_group<T, CooperativeGroup>      s5_merge
//
// A basis in rounds takes s1_s4_rounds in place of s1_s4_group, and medoid steps take a launch of s4_medoids between the
// two. Neither is fused.
#pragma once
#include <algorithm>

#include "s1_s4_group.cuh"
#include "s1_s4_rounds.cuh"
#include "s1_s5_cluster.cuh"
#include "s4_medoids.cuh"
#include "s5_merge.cuh"

namespace apet::cuda {

constexpr int kMaxCluster = 16;

using Kernel = void (*)(const Call);

// s5_merge with one of its tiles.
struct MergeKernel {
  Kernel kernel;      // null: this dtype does not have the tile
  int rows, columns;  // of a tile
  int threads;        // of a CTA
  int shared_bytes;   // of a CTA
  int chunks;         // kChunks
};

constexpr int kMergeTiles = 4;

struct Kernels {
  Kernel s1_s4_cluster, s1_s4_cooperative, s1_s5_cluster;
  Kernel rounds_cluster, rounds_cooperative, medoids_cluster, medoids_cooperative;
  int s1_s5_shared_bytes;             // what s1_s5_cluster needs for s5
  int group_shared_bytes;             // what s1_s4_rounds and s4_medoids need for products and lists
  MergeKernel s5_merge[kMergeTiles];  // with the small tile, the tall, the large and the largest one
};

template <class Tl>
constexpr int s5_shared_bytes(bool resident) {
  const int tile = resident ? Tl::template shared_bytes<true>() : Tl::template shared_bytes<false>();
  return std::max(tile, kListWords * (int)sizeof(int));
}

template <class T, class Tl, int kChunks>
constexpr MergeKernel merge_kernel() {
  return {s5_merge<T, Tl, kChunks>, Tl::kRows, Tl::kColumns, Tl::kThreads, 16 + s5_shared_bytes<Tl>(false), kChunks};
}

// The tiles that only 16-bit tokens have.
template <class T, class Tl, int kChunks>
constexpr MergeKernel merge_kernel_16() {
  if constexpr (sizeof(T) == 2) return merge_kernel<T, Tl, kChunks>();
  else return {};
}

template <class T>
constexpr Kernels kernels_of() {
  return {s1_s4_group<T, ClusterGroup>,
          s1_s4_group<T, CooperativeGroup>,
          s1_s5_cluster<T>,
          s1_s4_rounds<T, ClusterGroup>,
          s1_s4_rounds<T, CooperativeGroup>,
          s4_medoids<T, ClusterGroup>,
          s4_medoids<T, CooperativeGroup>,
          s5_shared_bytes<ClusterTile<T>>(true),
          s5_shared_bytes<GroupTile>(false),
          {merge_kernel<T, SmallTile, 2>(), merge_kernel_16<T, TallTile, 4>(), merge_kernel<T, LargeTile<T>, 4>(),
           merge_kernel_16<T, LargestTile, 4>()}};
}

extern const Kernels kFloat32, kFloat16, kBFloat16;

inline const Kernels& kernels_for(apet_dtype dtype) {
  return dtype == APET_FLOAT32 ? kFloat32 : dtype == APET_FLOAT16 ? kFloat16 : kBFloat16;
}

}  // namespace apet::cuda
