// A group: the CTAs that share an image. There are two kinds, with the same interface:
//
//                       placed by                           barrier                     candidates are exchanged in
//   ClusterGroup        the hardware, as one cluster        the cluster's               every CTA's shared memory
//   CooperativeGroup    a cooperative launch, all at once   a counter in global memory  L2
//
// Each step of s1 ends with one exchange: every CTA publishes its best candidate (key, norm_sq and y, which becomes the
// next row of L), and after one barrier reads those of all CTAs. There are two sets of slots, used in turns. A CTA that
// is one step ahead writes the other set; it cannot be two steps ahead, because that takes another barrier.
//
// The keys of a set lie side by side at the front: every CTA reads all keys, but the other words of the winning CTA
// only.
//
//   slots   [2][size] keys, [2][size] (norm_sq, y)
#pragma once
#include <cooperative_groups.h>

#include "call.cuh"

namespace apet::cuda {

// Returns the words of an image's slots, a multiple of a key.
__host__ __device__ constexpr int64_t slot_words(int size, int words) { return round_up(2 * (int64_t)size * words, 2); }
// Returns where word i of a CTA's message of `words` lies in the slots.
__device__ __forceinline__ int64_t slot_word(int turn, int size, int cta, int words, int i) {
  const int slot = turn * size + cta;
  return i < 2 ? 2 * slot + i : 4 * size + (int64_t)slot * (words - 2) + i - 2;
}

struct ClusterGroup {
  int cta, size;           // this CTA's number in the group, and their count
  uint32_t first, stride;  // the group takes images first, first + stride, ...

  __device__ explicit ClusterGroup(const Call& call)
      : size(call.ctas_per_image),
        first(blockIdx.x / call.ctas_per_image),
        stride(gridDim.x / call.ctas_per_image),
        words_(message_words(call.basis)) {
    slots_ = reinterpret_cast<uint32_t*>(shared_memory() + call.map.slots);
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    cta = cooperative_groups::this_cluster().block_rank();
#endif
    sync();  // shared memory of another CTA may be used only once that CTA runs
  }

  // Barrier of all threads of the group. What they wrote before it is visible after it.
  __device__ void sync() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#endif
  }

  // Called by all threads of the CTA: publishes its message, which every CTA of the group can read after the next
  // sync().
  __device__ void publish(const uint32_t* message, int words) {
    turn_ ^= 1;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
    for (int i = threadIdx.x; i < size * words; i += kThreads)
      cluster.map_shared_rank(slots_, i / words)[slot_word(turn_, size, cta, words_, i % words)] = message[i % words];
#endif
  }

  __device__ Key read_key(int from) const { return reinterpret_cast<const Key*>(slots_)[turn_ * size + from]; }
  __device__ uint32_t read(int from, int word) const { return slots_[slot_word(turn_, size, from, words_, word)]; }

 private:
  uint32_t* slots_;
  int turn_ = 0, words_;
};

struct CooperativeGroup {
  int cta, size;           // this CTA's number in the group, and their count
  uint32_t first, stride;  // the group takes images first, first + stride, ...

  __device__ explicit CooperativeGroup(const Call& call)
      : cta(blockIdx.x % call.ctas_per_image),
        size(call.ctas_per_image),
        first(blockIdx.x / call.ctas_per_image),
        stride(call.images_in_flight),
        words_(message_words(call.basis)) {
    slots_ = call.slots + (int64_t)first * slot_words(size, words_);
    arrived_ = call.arrived + first;
    if (cta == 0 && threadIdx.x == 0) *arrived_ = 0;
    cooperative_groups::this_grid().sync();  // once per launch: makes the zero visible
  }

  __device__ void sync() {
    __syncthreads();
    if (threadIdx.x == 0) {
      awaited_ += size;
      add_release(arrived_, 1);
      wait_acquire(arrived_, awaited_);
    }
    __syncthreads();
  }

  __device__ void publish(const uint32_t* message, int words) {
    turn_ ^= 1;
    for (int i = threadIdx.x; i < words; i += kThreads)
      __stcg(slots_ + slot_word(turn_, size, cta, words_, i), message[i]);
  }

  // From L2: another SM wrote it.
  __device__ Key read_key(int from) const { return __ldcg(reinterpret_cast<const Key*>(slots_) + turn_ * size + from); }
  __device__ uint32_t read(int from, int word) const {
    return __ldcg(slots_ + slot_word(turn_, size, from, words_, word));
  }

 private:
  uint32_t* slots_;
  uint32_t* arrived_;
  uint32_t awaited_ = 0;
  int words_, turn_ = 0;
};

}  // namespace apet::cuda
