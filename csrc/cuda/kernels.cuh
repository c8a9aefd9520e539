// The kernels, put together from the stages:
//
//   select  s1_s3_select, s4        a group of CTAs an image (group.cuh), persistent over images
//   merge   s5_assign, s5_mean      tickets: tiles of dropped x targets, and rows of the result
//   fused   all of it               a cluster an image: its tokens stay in shared memory from s1 to s5
//
// fused calls the same functions as the other two, in one launch; what it saves is the second launch, and reading the
// dropped tokens again.
#pragma once
#include "s4_topk.cuh"
#include "s5_assign.cuh"
#include "s5_mean.cuh"

namespace apet::cuda {

// Rows of ragged results that no image fills hold zeros, and index 0: those after the image's own, and, by the first
// image, those before it.
template <class T>
__device__ inline void blank(const Call& call, const Image& image, int s, int rank, int size) {
  const int64_t lead = s == 0 ? image.row : 0, after = image.row + image.filled;
  const int64_t rows = lead + image.row_end - after;
  const int chunks = chunks_of<T>(call.dim);
  T* tokens = static_cast<T*>(call.at.tokens);
  for (int64_t i = (int64_t)rank * kWarps + threadIdx.x / 32; i < rows; i += size * kWarps) {
    const int64_t row = i < lead ? i : after + i - lead;
    for (int k = threadIdx.x % 32; k < chunks; k += 32)
      store_chunk(tokens + row * call.dim, k, call.dim, call.whole_out, Chunk<T>{});
    if (threadIdx.x % 32 == 0) call.at.indices[row] = 0;
  }
}

// What the image's s5 counts up from zero.
__device__ inline void clear_s5(const Call& call, const Image& image, int s, int rank, int size) {
  for (int64_t i = (int64_t)rank * kThreads + threadIdx.x; i < image.count; i += size * kThreads)
    call.best[image.token + i] = 0;
  if (rank == 0 && threadIdx.x == 0) {
    call.done[s] = 0;
    if (s == 0) *call.ticket = 0;
  }
}

// s1 to s4 of image s; the lists are for everybody after the group's next sync(). slices: of s4_topk's bounds.
template <class T, class Group>
__device__ inline void s1_s4_select(const Call& call, const Image& image, const Slice<T>& slice, Group& group, int s,
                                    int slices) {
  if (call.op != APET_SCORE) {
    clear_s5(call, image, s, group.rank, group.size);
    if (call.ragged) blank<T>(call, image, s, group.rank, group.size);
  }
  const int m = s1_s3_select(call, image, slice, group, s);
  if (call.op == APET_SCORE) return;
  group.sync();  // rank and norm2 of the whole image
  if (group.rank != 0) return;
  if (call.op == APET_MERGE) s4_given_rows(call, image, s, slices);
  else s4_topk(call, image, s, m, slices);
}

template <class T, class Group>
__global__ void __launch_bounds__(kThreads, 1) select(const Call call) {
  if constexpr (kHasClusters || std::is_same_v<Group, CooperativeGroup>) {
    Group group(call);
    for (uint32_t s = group.first; s < (uint32_t)call.images; s += group.stride) {
      const auto& [image, slice] = open_image<T>(call, (int)s, group.rank, group.size);
      if (s + group.stride >= (uint32_t)call.images) allow_next_launch();
      s1_s4_select(call, image, slice, group, (int)s, 0);
      __syncthreads();  // s4 is done with the shared memory that the next image takes
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) fused(const Call call) {
  if constexpr (kHasClusters) {
    ClusterGroup group(call);
    unsigned char* shared = shared_memory() + call.map.merge;
    const int warp = threadIdx.x / 32, blocks = mean_blocks<T, 1>(call.dim);
    for (uint32_t s = group.first; s < (uint32_t)call.images; s += group.stride) {
      Work<T>& work = open_image<T>(call, (int)s, group.rank, group.size);
      const auto& [image, slice] = work;
      s1_s4_select(call, image, slice, group, (int)s, group.size);
      group.sync();  // the lists
      if (threadIdx.x == 0) {
        work.image.targets = __ldcg(&call.table[s].targets);
        work.image.dropped = __ldcg(&call.table[s].dropped);
      }
      __syncthreads();
      if (image.dropped > 0) {
        const int32_t* bounds = call.bounds + (int64_t)s * (group.size + 1) + group.rank;
        const int r_end = __ldcg(bounds + 1);
        for (int r0 = __ldcg(bounds); r0 < r_end; r0 += FusedTile<T>::kRows)
          for (int t0 = 0; t0 < image.targets; t0 += FusedTile<T>::kColumns)
            s5_assign<T, FusedTile<T>, true>(call, image, &slice, r0, r_end, t0, shared);
      }
      group.sync();  // everybody's targets
      const int64_t tasks = (int64_t)image.filled * blocks;
      for (int64_t i = (int64_t)group.rank * kWarps + warp; i < tasks; i += group.size * kWarps)
        s5_mean<T, 1>(call, image, (int)(i / blocks), (int)(i % blocks),
                      reinterpret_cast<int*>(shared) + warp * kQueue);
      __syncthreads();
    }
  }
}

// Tiles and means of all images as tickets, in an order in which nobody waits for a ticket that is not taken: image by
// image, the tiles of image s before the means of image s - 1, so that the tiles that those wait for are mostly done.
template <class T, class Tl, int kChunks>
__global__ void __launch_bounds__(Tl::kThreads) merge(const Call call) {
  constexpr int kTasks = Tl::kThreads / 32;  // means a ticket: one a warp
  unsigned char* shared = shared_memory();
  Key* shared_ticket = reinterpret_cast<Key*>(shared);
  shared += 16;
  const int thread = threadIdx.x, warp = thread / 32, blocks = mean_blocks<T, kChunks>(call.dim);
  const Key turn = (Key)call.tiles + call.mean_tickets, end = turn * ((Key)call.images + 1);
  wait_previous_launch();
  while (true) {
    __syncthreads();  // the ticket before this one is done with shared memory
    if (thread == 0) *shared_ticket = atomicAdd(call.ticket, (Key)1);
    __syncthreads();
    const Key ticket = *shared_ticket;
    if (ticket >= end) return;
    const int64_t at = (int64_t)(ticket % turn), s = (int64_t)(ticket / turn) - (at < call.tiles ? 0 : 1);
    if (s < 0 || s >= call.images) continue;
    const Image image = call.table[s];
    if (at < call.tiles) {
      const int64_t r0 = at / call.tile_columns * Tl::kRows, t0 = at % call.tile_columns * Tl::kColumns;
      if (r0 < image.dropped && t0 < image.targets)
        s5_assign<T, Tl, false>(call, image, nullptr, (int)r0, image.dropped, (int)t0, shared);
      __syncthreads();
      if (thread == 0) add_release(call.done + s, 1);
    } else {
      if (thread == 0)
        while (load_acquire(call.done + s) < (uint32_t)call.tiles) {
        }
      __syncthreads();
      const int64_t task = (at - call.tiles) * kTasks + warp, row = task / blocks;
      if (row < image.filled)
        s5_mean<T, kChunks>(call, image, (int)row, (int)(task % blocks),
                            reinterpret_cast<int*>(shared) + warp * kQueue);
    }
  }
}

// ---- what launch.cu gets of each dtype

using Kernel = void (*)(const Call);

// One way to run s5 as a launch of its own.
struct Merge {
  Kernel kernel;
  int tile, threads, shared;  // rows and columns of a tile; threads, and bytes of shared memory, of a CTA
  int chunks;                 // kChunks
};

struct Kernels {
  Kernel cluster, cooperative, fused;
  int fused_shared;  // bytes that fused needs for s5
  Merge merge[2];    // small, large
};

template <class Tl>
constexpr int merge_shared(bool resident) {
  const int tile = resident ? Tl::template shared_bytes<true>() : Tl::template shared_bytes<false>();
  const int queues = Tl::kThreads / 32 * kQueue * (int)sizeof(int);
  return tile > queues ? tile : queues;
}

template <class T>
constexpr Kernels kernels_of() {
  return {select<T, ClusterGroup>,
          select<T, CooperativeGroup>,
          fused<T>,
          merge_shared<FusedTile<T>>(true),
          {{merge<T, SmallTile, 2>, SmallTile::kRows, SmallTile::kThreads, 16 + merge_shared<SmallTile>(false), 2},
           {merge<T, LargeTile, 4>, LargeTile::kRows, LargeTile::kThreads, 16 + merge_shared<LargeTile>(false), 4}}};
}

extern const Kernels kFloat32, kFloat16, kBFloat16;

}  // namespace apet::cuda
