// s5, second half: the rows of the result.
//
//   tokens[r] = (x_r + sum of the dropped tokens whose target is r) / (1 + their count)    float32, ascending position
//
// A task is kChunks * 32 chunks of a row, computed by one warp. The warp scans the targets of all dropped tokens, 256
// at a time, lists those of its row (by ballot, so in order), and adds them: several loads in flight, one addition
// after the other.
//
//   target_key, dropped [dropped_count] --once per task, from L2/L1--> the warp's queue
//   x [the row's own token and the queued ones] --once--> tokens
#pragma once
#include "dot.cuh"

namespace apet::cuda {

constexpr int kScan = 8;            // words of 32 dropped tokens that a warp scans at a time
constexpr int kQueue = kScan * 32;  // positions

// Column blocks of a row: an image has filled * mean_blocks tasks.
template <class T, int kChunks>
__host__ __device__ constexpr int mean_blocks(int dim) {
  return (chunks_of<T>(dim) + 32 * kChunks - 1) / (32 * kChunks);
}

// Computes column block `block` of the image's row `row` with one warp, which has its own queue [kQueue].
template <class T, int kChunks>
__device__ inline void s5_mean(const Call& call, const Image& image, int row, int block, int* queue) {
  constexpr int kSize = Chunk<T>::kSize;
  constexpr int kFlight = kChunks < 4 ? 4 : 2;  // rows in flight: 8 loads of 16 bytes per lane, or as registers allow
  const int lane = threadIdx.x % 32, chunks = chunks_of<T>(call.dim);
  const int chunk0 = block * 32 * kChunks + lane;
  const T* x = static_cast<const T*>(call.tensors.x) + image.base;
  T* out = static_cast<T*>(call.tensors.tokens) + (image.row + row) * call.dim;
  const int token = __ldcg(call.row_token + image.row + row), role = __ldcg(call.row_role + image.row + row);
  const T* own_row = x + token * call.stride_xn;
  Chunk<T> own[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; c++)
    if (chunk0 + c * 32 < chunks) own[c] = load_chunk(own_row, chunk0 + c * 32, call.dim, call.whole_in);

  if (role <= kBlended) {  // a basis token overwrites a kept one
    const T* blend_row = x + (int64_t)(kBlended - role) * call.stride_xn;
#pragma unroll
    for (int c = 0; c < kChunks; c++)
      if (chunk0 + c * 32 < chunks) {
        const Chunk<T> kept = load_chunk(blend_row, chunk0 + c * 32, call.dim, call.whole_in);
#pragma unroll
        for (int i = 0; i < kSize; i++)
          narrow(own[c].v[i],
                 __fmaf_rn(widen(own[c].v[i]), call.blend, __fmul_rn(widen(kept.v[i]), __fsub_rn(1, call.blend))));
      }
  } else if (role >= 0) {
    float sum[kChunks][kSize];
#pragma unroll
    for (int c = 0; c < kChunks; c++)
#pragma unroll
      for (int i = 0; i < kSize; i++) sum[c][i] = chunk0 + c * 32 < chunks ? widen(own[c].v[i]) : 0;
    int received = 0;
    for (int64_t d0 = 0; d0 < image.dropped_count; d0 += kQueue) {
      int target[kScan], position[kScan];
#pragma unroll
      for (int w = 0; w < kScan; w++) {
        const int64_t d = d0 + w * 32 + lane;
        const bool there = d < image.dropped_count;
        target[w] = there ? unpack(__ldcg(call.target_key + image.token + d)) : -1;
        position[w] = there ? __ldcg(call.dropped + image.token + d) : 0;
      }
      int queued = 0;
      __syncwarp();  // all lanes have read the queue of the previous words
#pragma unroll
      for (int w = 0; w < kScan; w++) {
        const uint32_t mine = __ballot_sync(kAllLanes, target[w] == role);
        if (target[w] == role) queue[queued + __popc(mine & ((1u << lane) - 1))] = position[w];
        queued += __popc(mine);
      }
      __syncwarp();
      for (int q = 0; q < queued; q += kFlight) {
        Chunk<T> added[kFlight][kChunks];
#pragma unroll
        for (int f = 0; f < kFlight; f++)
          if (q + f < queued) {
            const T* from = x + queue[q + f] * call.stride_xn;
#pragma unroll
            for (int c = 0; c < kChunks; c++)
              if (chunk0 + c * 32 < chunks) added[f][c] = load_chunk(from, chunk0 + c * 32, call.dim, call.whole_in);
          }
#pragma unroll
        for (int f = 0; f < kFlight; f++)
          if (q + f < queued) {
#pragma unroll
            for (int c = 0; c < kChunks; c++)
              if (chunk0 + c * 32 < chunks) {
#pragma unroll
                for (int i = 0; i < kSize; i++) sum[c][i] = __fadd_rn(sum[c][i], widen(added[f][c].v[i]));
              }
          }
      }
      received += queued;
    }
    if (received > 0) {  // a row that receives no token is copied bit for bit
#pragma unroll
      for (int c = 0; c < kChunks; c++)
#pragma unroll
        for (int i = 0; i < kSize; i++) narrow(own[c].v[i], __fdiv_rn(sum[c][i], (float)(1 + received)));
    }
  }
#pragma unroll
  for (int c = 0; c < kChunks; c++)
    if (chunk0 + c * 32 < chunks) store_chunk(out, chunk0 + c * 32, call.dim, call.whole_out, own[c]);
}

}  // namespace apet::cuda
