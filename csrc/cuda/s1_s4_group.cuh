// s1 to s4 of every image: a group of CTAs per image (group.cuh), which takes one image after the other.
#pragma once
#include "s4_topk.cuh"

namespace apet::cuda {

// Zeroes rows of a ragged result that belong to no image, and their indices: the rows after the image's own, and for
// the first image also those before it.
template <class T>
__device__ inline void zero_unfilled_rows(const Call& call, const Image& image, int s, int cta, int ctas) {
  const int64_t lead = s == 0 ? image.row : 0, after = image.row + image.filled;
  const int64_t rows = lead + image.row_end - after;
  const int chunks = chunks_of<T>(call.dim);
  T* tokens = static_cast<T*>(call.tensors.tokens);
  for (int64_t i = (int64_t)cta * kWarps + threadIdx.x / 32; i < rows; i += ctas * kWarps) {
    const int64_t row = i < lead ? i : after + i - lead;
    for (int k = threadIdx.x % 32; k < chunks; k += 32)
      store_chunk(tokens + row * call.dim, k, call.dim, call.whole_out, Chunk<T>{});
    if (threadIdx.x % 32 == 0) call.tensors.indices[row] = 0;
  }
}

// Zeroes the keys that s5_assign raises.
__device__ inline void clear_keys(const Call& call, const Image& image, int cta, int ctas) {
  for (int64_t i = (int64_t)cta * kThreads + threadIdx.x; i < image.tokens; i += ctas * kThreads)
    call.target_key[image.token + i] = 0;
}

// Zeroes the values that s5 raises or counts.
__device__ inline void clear_s5(const Call& call, const Image& image, int s, int cta, int ctas) {
  clear_keys(call, image, cta, ctas);
  if (cta == 0 && threadIdx.x == 0) {
    call.tickets_done[s] = 0;
    if (s == 0) *call.ticket = 0;
  }
}

// s1 to s4 of image s. After the group's next sync() every CTA may read the lists. slices: as in s4_topk.
template <class T, bool kAllResident, class Group>
__device__ inline void s1_s4(const Call& call, const Image& image, const Slice<T>& slice, Group& group, int s,
                             int slices) {
  if (call.op != APET_SCORE) {
    clear_s5(call, image, s, group.cta, group.size);
    if (call.ragged) zero_unfilled_rows<T>(call, image, s, group.cta, group.size);
  }
  const int basis_size = s1_s3_sweep<T, kAllResident>(call, image, slice, group, s);
  if (call.op == APET_SCORE) return;
  group.sync();  // rank and norm_sq of the whole image are written
  if (group.cta != 0) return;
  if (call.op == APET_MERGE) s4_given_rows(call, image, s, slices);
  else s4_topk(call, image, s, basis_size, slices);
}

template <class T, class Group>
__global__ void __launch_bounds__(kThreads, 1) s1_s4_group(const Call call) {
  if constexpr (kHasClusters || std::is_same_v<Group, CooperativeGroup>) {
    Group group(call);
    for (uint32_t s = group.first; s < (uint32_t)call.images; s += group.stride) {
      const auto& [image, slice] = open_image<T>(call, (int)s, group.cta, group.size);
      if (s + group.stride >= (uint32_t)call.images) allow_next_launch();
      s1_s4<T, false>(call, image, slice, group, (int)s, 0);
      __syncthreads();  // s4 has finished with the shared memory that the next image uses
    }
  }
}

}  // namespace apet::cuda
