// s5 of every image, as a launch of its own after s1_s4_group: tiles of s5_assign and tasks of s5_mean.
//
// CTAs draw tickets: image by image, the tiles of image s before the rows of image s - 1.
//
//   ticket   tiles of image 0 | tiles of 1, rows of 0 | tiles of 2, rows of 1 | ... | rows of the last image
//
// Rows wait for all tiles of their image. Those tiles have lower tickets, so they are finished or being computed: the
// launch ends with any number of CTAs, and mostly without waiting.
#pragma once
#include "s5_assign.cuh"
#include "s5_mean.cuh"

namespace apet::cuda {

template <class T, class Tl, int kChunks>
__global__ void __launch_bounds__(Tl::kThreads) s5_merge(const Call call) {
  constexpr int kTasks = Tl::kThreads / 32;  // tasks of s5_mean per ticket: one per warp
  unsigned char* shared = shared_memory();
  Key* shared_ticket = reinterpret_cast<Key*>(shared);
  shared += 16;
  const int thread = threadIdx.x, warp = thread / 32, blocks = mean_blocks<T, kChunks>(call.dim);
  const Key per_image = (Key)call.tiles + call.mean_tickets, end = per_image * ((Key)call.images + 1);
  wait_previous_launch();
  while (true) {
    __syncthreads();  // all threads have finished the previous ticket, which used the same shared memory
    if (thread == 0) *shared_ticket = atomicAdd(call.ticket, (Key)1);
    __syncthreads();
    const Key ticket = *shared_ticket;
    if (ticket >= end) return;
    const int64_t at = (int64_t)(ticket % per_image), s = (int64_t)(ticket / per_image) - (at < call.tiles ? 0 : 1);
    if (s < 0 || s >= call.images) continue;
    const Image image = call.table[s];
    if (at < call.tiles) {
      const int64_t r0 = at / call.tile_columns * Tl::kRows, t0 = at % call.tile_columns * Tl::kColumns;
      if (r0 < image.dropped_count && t0 < image.target_count)
        s5_assign<T, Tl, false>(call, image, nullptr, (int)r0, image.dropped_count, (int)t0, shared);
      __syncthreads();
      if (thread == 0) add_release(call.tiles_done + s, 1);
    } else {
      if (thread == 0)
        while (load_acquire(call.tiles_done + s) < (uint32_t)call.tiles) {
        }
      __syncthreads();
      const int64_t task = (at - call.tiles) * kTasks + warp, row = task / blocks;
      if (row < image.filled)
        s5_mean<T, kChunks>(call, image, (int)row, (int)(task % blocks),
                            reinterpret_cast<int*>(shared) + warp * kQueue);
    }
  }
}

}  // namespace apet::cuda
