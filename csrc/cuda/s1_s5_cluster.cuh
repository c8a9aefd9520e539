// s1 to s5 of every image in one launch: a cluster per image, whose tokens stay in shared memory throughout.
//
// It calls the same functions as s1_s4_group and s5_merge, and saves the second launch and the second reading of the
// dropped tokens: each CTA multiplies those of its own slice with all targets.
#pragma once
#include "s1_s4_group.cuh"
#include "s5_assign.cuh"
#include "s5_lists.cuh"
#include "s5_mean.cuh"

namespace apet::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads, 1) s1_s5_cluster(const Call call) {
  if constexpr (kHasClusters) {
    ClusterGroup group(call);
    unsigned char* shared = shared_memory() + call.map.s5;
    const int warp = threadIdx.x / 32, blocks = mean_blocks<T, 1>(call.dim);
    for (uint32_t s = group.first; s < (uint32_t)call.images; s += group.stride) {
      Work<T>& work = open_image<T>(call, (int)s, group.cta, group.size);
      const auto& [image, slice] = work;
      s1_s4<T, true>(call, image, slice, group, (int)s, group.size);
      group.sync();  // the lists are written
      if (threadIdx.x == 0) {
        work.image.target_count = __ldcg(&call.table[s].target_count);
        work.image.dropped_count = __ldcg(&call.table[s].dropped_count);
      }
      __syncthreads();
      if (image.dropped_count > 0) {
        const int32_t* slice_begin = call.slice_begin + (int64_t)s * (group.size + 1) + group.cta;
        const int r_end = __ldcg(slice_begin + 1);
        for (int r0 = __ldcg(slice_begin); r0 < r_end; r0 += ClusterTile<T>::kRows)
          for (int t0 = 0; t0 < image.target_count; t0 += ClusterTile<T>::kColumns)
            s5_assign<T, ClusterTile<T>, true>(call, image, &slice, r0, r_end, t0, shared);
      }
      group.sync();  // the targets of all dropped tokens are written
      int32_t* target_begin = call.target_begin + image.row + s;
      if (image.dropped_count > 0) {
        const int each = min((image.target_count + group.size - 1) / group.size, kListTargets);
        for (int t0 = group.cta * each; t0 < image.target_count; t0 += group.size * each)
          s5_lists<kThreads>(call, image, target_begin, t0, min(t0 + each, image.target_count),
                             reinterpret_cast<int*>(shared));
      }
      group.sync();  // the lists of all targets are written
      const int64_t tasks = (int64_t)image.filled * blocks;
      for (int64_t i = (int64_t)group.cta * kWarps + warp; i < tasks; i += group.size * kWarps)
        s5_mean<T, 1>(call, image, target_begin, (int)(i / blocks), (int)(i % blocks));
      __syncthreads();
    }
  }
}

}  // namespace apet::cuda
