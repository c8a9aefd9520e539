// A group of CTAs owns an image: the two ways it can be one, behind the same four functions.
//
//   Cluster      co-scheduled by the hardware; a barrier of its own; messages go straight into every peer's shared
//   memory Cooperative  a slice of a cooperative launch; a counter in global memory; messages lie in L2
//
// Each step of s1 ends with one exchange: every CTA publishes its best candidate (key, ||p||^2, and the y of it, which
// is the next row of L) and after one barrier reads all of them. There are two sets of slots, used in turn: a CTA that
// is ahead publishes into the other one, and cannot be two ahead of anybody, since the barrier between would not have
// opened.
#pragma once
#include <cooperative_groups.h>

#include "call.cuh"

namespace apet::cuda {

struct ClusterGroup {
  int rank, size;
  uint32_t first, stride;  // images first, first + stride, ... are this group's

  __device__ explicit ClusterGroup(const Call& call)
      : size(call.group),
        first(blockIdx.x / call.group),
        stride(gridDim.x / call.group),
        words_(message_words(call.basis)) {
    slots_ = reinterpret_cast<uint32_t*>(shared_memory() + call.map.slots);
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    rank = cooperative_groups::this_cluster().block_rank();
#endif
    sync();  // no peer's shared memory before the peer runs
  }

  // All threads of all CTAs of the group; what they wrote before is visible after.
  __device__ void sync() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#endif
  }

  // All threads: the CTA's message, to be read by everybody after the next sync().
  __device__ void publish(const uint32_t* message, int words) {
    turn_ ^= 1;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
    for (int i = threadIdx.x; i < size * words; i += kThreads)
      cluster.map_shared_rank(slots_, i / words)[(turn_ * size + rank) * words_ + i % words] = message[i % words];
#endif
  }

  __device__ uint32_t read(int from, int word) const { return slots_[(turn_ * size + from) * words_ + word]; }

 private:
  uint32_t* slots_;
  int turn_ = 0, words_;
};

struct CooperativeGroup {
  int rank, size;
  uint32_t first, stride;  // images first, first + stride, ... are this group's

  __device__ explicit CooperativeGroup(const Call& call)
      : rank(blockIdx.x % call.group),
        size(call.group),
        first(blockIdx.x / call.group),
        stride(call.groups),
        words_(message_words(call.basis)) {
    slots_ = call.slots + (int64_t)first * 2 * size * words_;
    arrived_ = call.arrived + first;
    if (rank == 0 && threadIdx.x == 0) *arrived_ = 0;
    cooperative_groups::this_grid().sync();  // once a launch: shows the zero to everybody
  }

  __device__ void sync() {
    __syncthreads();
    if (threadIdx.x == 0) {
      awaited_ += size;
      add_release(arrived_, 1);
      // The counter may wrap: what counts is how far it still has to go.
      while ((int32_t)(load_acquire(arrived_) - awaited_) < 0) {
      }
    }
    __syncthreads();
  }

  __device__ void publish(const uint32_t* message, int words) {
    turn_ ^= 1;
    for (int i = threadIdx.x; i < words; i += kThreads)
      __stcg(slots_ + (int64_t)(turn_ * size + rank) * words_ + i, message[i]);
  }

  __device__ uint32_t read(int from, int word) const {
    return __ldcg(slots_ + (int64_t)(turn_ * size + from) * words_ + word);  // from L2: another SM wrote it
  }

 private:
  uint32_t* slots_;
  uint32_t* arrived_;
  uint32_t awaited_ = 0;
  int words_, turn_ = 0;
};

}  // namespace apet::cuda
