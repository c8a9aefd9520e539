// s1 to s5 of every image in one launch: a cluster per image, whose tokens stay in shared memory throughout.
//
// It calls the same functions as s1_s4_group and s5_merge, and saves the second launch and the second reading of the
// dropped tokens: each CTA multiplies those of its own slice with all targets. Then it computes a part of the rows of
// the result. Targets ascend with rows, so a CTA builds exactly the lists of its own rows and needs no barrier of the
// cluster before reading them.
#pragma once
#include <climits>

#include "s1_s4_group.cuh"
#include "s5_assign.cuh"
#include "s5_lists.cuh"
#include "s5_mean.cuh"

namespace apet::cuda {

// The targets among rows [row, row_end) of the image, which ascend: [begin, end). Called by all threads; `shared` is
// scratch.
struct Targets {
  int begin, end;

  __device__ Targets(const Call& call, const Image& image, int row, int row_end, int* shared) {
    int first = INT_MAX, last = -1;
    if (threadIdx.x < 32) {
      for (int r = row + threadIdx.x; r < row_end; r += 32) {
        const int role = __ldcg(call.row_role + image.row + r);
        if (role >= 0) first = min(first, role), last = role;
      }
      for (int step = 16; step; step >>= 1) {
        first = min(first, __shfl_xor_sync(kAllLanes, first, step));
        last = max(last, __shfl_xor_sync(kAllLanes, last, step));
      }
      if (threadIdx.x == 0) shared[0] = first, shared[1] = last + 1;
    }
    __syncthreads();
    begin = shared[0], end = shared[1];
  }
};

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
      const int each = (image.filled + group.size - 1) / group.size, row = min(group.cta * each, image.filled);
      const int row_end = min(row + each, image.filled);
      // T + 1 entries for all CTAs, and one for the end of each but the last.
      int32_t* target_begin = call.target_begin + image.row + (int64_t)s * group.size + group.cta;
      if (image.dropped_count > 0) {
        const Targets own(call, image, row, row_end, reinterpret_cast<int*>(shared));
        for (int t0 = own.begin; t0 < own.end; t0 += kListTargets)
          s5_lists<kThreads>(call, image, target_begin, t0, min(t0 + kListTargets, own.end), own.end,
                             reinterpret_cast<int*>(shared));
        __syncthreads();
      }
      const int64_t tasks = (int64_t)(row_end - row) * blocks;
      for (int64_t i = warp; i < tasks; i += kWarps)
        s5_mean<T, 1>(call, image, target_begin, row + (int)(i / blocks), (int)(i % blocks));
      __syncthreads();
    }
  }
}

}  // namespace apet::cuda
