// s5 of every image, as a launch of its own after s1_s4_group: tiles of s5_assign, then s5_lists, then rows of s5_mean.
//
// CTAs draw tickets, image by image:
//
//   ticket  tiles of 0 | lists of 0, tiles of 1, rows of 0 | lists of 1, tiles of 2, rows of 1 | ... | rows of the last
//
// Lists wait for all tiles of their image, rows for all its lists. What a ticket waits for has lower tickets, which are
// finished or running, so any number of CTAs completes the launch.
#pragma once
#include "s5_assign.cuh"
#include "s5_lists.cuh"
#include "s5_mean.cuh"

namespace apet::cuda {

// Two small CTAs, or one large one, have the registers of an SM: with a third the products spill.
template <class T, class Tl, int kChunks>
__global__ void __launch_bounds__(Tl::kThreads, 256 / Tl::kThreads) s5_merge(const Call call) {
  unsigned char* shared = shared_memory();
  Key* shared_ticket = reinterpret_cast<Key*>(shared);
  shared += 16;
  const int thread = threadIdx.x, warp = thread / 32, blocks = mean_blocks<T, kChunks>(call.dim);
  const Key per_image = (Key)call.list_tickets + call.tiles + call.mean_tickets;
  const Key end = per_image * ((Key)call.images + 1);
  const auto wait_until_done = [&](int64_t s, int tickets) {
    if (thread == 0) wait_acquire(call.tickets_done + s, (uint32_t)tickets);
    __syncthreads();
  };
  const auto done = [&](int64_t s) {
    __syncthreads();
    if (thread == 0) add_release(call.tickets_done + s, 1);
  };
  wait_previous_launch();
  while (true) {
    __syncthreads();  // all threads have finished the previous ticket, which used the same shared memory
    if (thread == 0) *shared_ticket = atomicAdd(call.ticket, (Key)1);
    __syncthreads();
    const Key ticket = *shared_ticket;
    if (ticket >= end) return;
    const int64_t round = (int64_t)(ticket / per_image);  // the tiles of this image, and all else of the one before
    int64_t at = (int64_t)(ticket % per_image);
    const bool is_tile = at >= call.list_tickets && at < call.list_tickets + call.tiles;
    const int64_t s = is_tile ? round : round - 1;
    if (s < 0 || s >= call.images) continue;
    const Image image = call.table[s];
    int32_t* target_begin = call.target_begin + image.row + s;
    if (at < call.list_tickets) {
      wait_until_done(s, call.tiles);
      const int t0 = (int)at * kListTargets, t_end = min(t0 + kListTargets, image.target_count);
      if (image.dropped_count > 0 && t0 < t_end)
        s5_lists<Tl::kThreads>(call, image, target_begin, t0, t_end, image.target_count,
                               reinterpret_cast<int*>(shared));
      done(s);
    } else if (is_tile) {
      at -= call.list_tickets;
      const int64_t r0 = at / call.tile_columns * Tl::kRows, t0 = at % call.tile_columns * Tl::kColumns;
      if (r0 < image.dropped_count && t0 < image.target_count)
        s5_assign<T, Tl, false>(call, image, nullptr, (int)r0, image.dropped_count, (int)t0, shared);
      done(s);
    } else {
      wait_until_done(s, call.tiles + call.list_tickets);
      const int64_t first = (at - call.list_tickets - call.tiles) * call.mean_tasks;
      for (int i = warp; i < call.mean_tasks; i += Tl::kThreads / 32) {
        const int64_t task = first + i, row = task / blocks;
        if (row < image.filled) s5_mean<T, kChunks>(call, image, target_begin, (int)row, (int)(task % blocks));
      }
    }
  }
}

}  // namespace apet::cuda
