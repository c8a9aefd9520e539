// s5, second half: the rows of the result.
//
//   tokens[j] = (x_j + sum of the dropped tokens that go to j) / (1 + their count)     float32, ascending position
//
// A warp owns a row and kChunks * 32 chunks of it. It scans the targets of all dropped tokens, 256 at a time, and lists
// those that come to its row (by ballot, so in order), then adds them: several in flight, one after the other in the
// sum.
//
//   best [n - K], dropped [n - K] --once a task, from L2/L1--> a queue of the warp    x [its tokens] --once--> tokens
#pragma once
#include "dot.cuh"

namespace apet::cuda {

constexpr int kScan = 8;            // words of 32 dropped tokens that a warp scans at a time
constexpr int kQueue = kScan * 32;  // positions

// Tasks of an image's result: rows x column blocks.
template <class T, int kChunks>
__host__ __device__ constexpr int mean_blocks(int dim) {
  return (chunks_of<T>(dim) + 32 * kChunks - 1) / (32 * kChunks);
}

// Row `row` of the image's result, column block `block`; one warp, with a queue [kQueue] of its own.
template <class T, int kChunks>
__device__ inline void s5_mean(const Call& call, const Image& image, int row, int block, int* queue) {
  constexpr int kSize = Chunk<T>::kSize;
  constexpr int kFlight = kChunks < 4 ? 4 : 2;  // rows in flight: 8 loads of 16 bytes a lane, or what registers allow
  const int lane = threadIdx.x % 32, chunks = chunks_of<T>(call.dim);
  const int chunk0 = block * 32 * kChunks + lane;
  const T* x = static_cast<const T*>(call.at.x) + image.base;
  T* out = static_cast<T*>(call.at.tokens) + (image.row + row) * call.dim;
  const int token = __ldcg(call.row_token + image.row + row), role = __ldcg(call.row_role + image.row + row);
  const T* own_row = x + token * call.stride_xn;
  Chunk<T> own[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; c++)
    if (chunk0 + c * 32 < chunks) own[c] = load_chunk(own_row, chunk0 + c * 32, call.dim, call.whole_in);

  if (role <= kUnder) {  // a basis token over a kept one
    const T* under = x + (int64_t)(kUnder - role) * call.stride_xn;
#pragma unroll
    for (int c = 0; c < kChunks; c++)
      if (chunk0 + c * 32 < chunks) {
        const Chunk<T> below = load_chunk(under, chunk0 + c * 32, call.dim, call.whole_in);
#pragma unroll
        for (int i = 0; i < kSize; i++)
          narrow(own[c].v[i],
                 __fmaf_rn(widen(own[c].v[i]), call.blend, __fmul_rn(widen(below.v[i]), __fsub_rn(1, call.blend))));
      }
  } else if (role >= 0) {
    float sum[kChunks][kSize];
#pragma unroll
    for (int c = 0; c < kChunks; c++)
#pragma unroll
      for (int i = 0; i < kSize; i++) sum[c][i] = chunk0 + c * 32 < chunks ? widen(own[c].v[i]) : 0;
    int received = 0;
    for (int64_t d0 = 0; d0 < image.dropped; d0 += kQueue) {
      int to[kScan], position[kScan];
#pragma unroll
      for (int w = 0; w < kScan; w++) {
        const int64_t d = d0 + w * 32 + lane;
        const bool there = d < image.dropped;
        to[w] = there ? unpack(__ldcg(call.best + image.token + d)) : -1;
        position[w] = there ? __ldcg(call.dropped + image.token + d) : 0;
      }
      int queued = 0;
      __syncwarp();  // the queue of the words before has been read
#pragma unroll
      for (int w = 0; w < kScan; w++) {
        const uint32_t mine = __ballot_sync(kAllLanes, to[w] == role);
        if (to[w] == role) queue[queued + __popc(mine & ((1u << lane) - 1))] = position[w];
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
    if (received > 0) {  // a row that receives nothing is copied bit for bit
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
