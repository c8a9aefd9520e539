// s5, second half: the rows of the result.
//
//   tokens[r] = (x_r + sum of the dropped tokens whose target is r) / (1 + their count)    float32, ascending position
//
// A task is kChunks * 32 chunks of a row, computed by one warp. It reads the row's own list (s5_lists.cuh), 32 tokens
// at a time, and adds those one after the other, with several loads in flight.
//
//   merged [target_begin[t], target_begin[t + 1])     x [the row's own token and the listed ones] --once--> tokens
#pragma once
#include "dot.cuh"

namespace apet::cuda {

constexpr int kMeanLoads = 8;  // 16-byte loads of a lane in flight, as registers allow

// Returns the number of column blocks of a row, each one warp's task; an image has filled * mean_blocks tasks.
template <class T, int kChunks>
__host__ __device__ constexpr int mean_blocks(int dim) {
  return (chunks_of<T>(dim) + 32 * kChunks - 1) / (32 * kChunks);
}

// Loads chunk k of a row, which has `chunks` of them; past its end the last one again if the rows are whole
// (call.whole_in), so that no load is in a branch. One in a branch is waited for where the branch ends.
template <bool kWhole, class T>
__device__ __forceinline__ Chunk<T> load_some(const T* row, int k, int chunks, int dim) {
  if constexpr (kWhole) return load_chunk(row, min(k, chunks - 1), dim, true);
  else return load_chunk(row, k, dim, false);
}

// Adds to sum the `received` tokens that `merged` lists from `begin` on, in chunks chunk0, chunk0 + 32, ... of their
// rows, by one warp.
template <class T, int kChunks, bool kWhole>
__device__ __forceinline__ void add_rows(const Call& call, const Image& image, int begin, int received, int chunk0,
                                         float (&sum)[kChunks][Chunk<T>::kSize]) {
  constexpr int kFlight = kMeanLoads / kChunks;  // rows in flight
  const int lane = threadIdx.x % 32, chunks = chunks_of<T>(call.dim);
  const T* x = static_cast<const T*>(call.tensors.x) + image.base;
  for (int q0 = 0; q0 < received; q0 += 32) {
    const int listed = min(received - q0, 32);
    const int number = __ldcg(call.merged + image.token + begin + q0 + min(lane, listed - 1));
    const int position = __ldcg(call.dropped + image.token + number);
    for (int q = 0; q < listed; q += kFlight) {
      Chunk<T> added[kFlight][kChunks];
#pragma unroll
      for (int f = 0; f < kFlight; f++) {  // past the end of the list its last token again, which is not added
        const T* from = x + __shfl_sync(kAllLanes, position, min(q + f, listed - 1)) * call.stride_xn;
#pragma unroll
        for (int c = 0; c < kChunks; c++) added[f][c] = load_some<kWhole>(from, chunk0 + c * 32, chunks, call.dim);
      }
#pragma unroll
      for (int f = 0; f < kFlight; f++)
        if (q + f < listed) {
#pragma unroll
          for (int c = 0; c < kChunks; c++)
#pragma unroll
            for (int i = 0; i < Chunk<T>::kSize; i++) sum[c][i] = __fadd_rn(sum[c][i], widen(added[f][c].v[i]));
        }
    }
  }
}

template <class T, int kChunks>
__device__ __forceinline__ void add_listed(const Call& call, const Image& image, int begin, int received, int chunk0,
                                           float (&sum)[kChunks][Chunk<T>::kSize]) {
  if (call.whole_in) add_rows<T, kChunks, true>(call, image, begin, received, chunk0, sum);
  else add_rows<T, kChunks, false>(call, image, begin, received, chunk0, sum);
}

// s5_mean, of rows that are all whole or are read element by element.
template <class T, int kChunks, bool kWhole>
__device__ __forceinline__ void mean_of(const Call& call, const Image& image, const int32_t* target_begin, int row,
                                        int block) {
  constexpr int kSize = Chunk<T>::kSize;
  const int lane = threadIdx.x % 32, chunks = chunks_of<T>(call.dim);
  const int chunk0 = block * 32 * kChunks + lane;
  const T* x = static_cast<const T*>(call.tensors.x) + image.base;
  T* out = static_cast<T*>(call.tensors.tokens) + (image.row + row) * call.dim;
  const int token = __ldcg(call.row_token + image.row + row), role = __ldcg(call.row_role + image.row + row);
  const auto load = [&](int position, int c) {
    return load_some<kWhole>(x + position * call.stride_xn, chunk0 + c * 32, chunks, call.dim);
  };
  Chunk<T> own[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; c++) own[c] = load(token, c);

  if (role <= kBlended) {  // a basis token overwrites a kept one
    Chunk<T> kept[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; c++) kept[c] = load(kBlended - role, c);
#pragma unroll
    for (int c = 0; c < kChunks; c++)
#pragma unroll
      for (int i = 0; i < kSize; i++)
        narrow(own[c].v[i],
               __fmaf_rn(widen(own[c].v[i]), call.blend, __fmul_rn(widen(kept[c].v[i]), __fsub_rn(1, call.blend))));
  } else if (role >= 0) {
    float sum[kChunks][kSize];
#pragma unroll
    for (int c = 0; c < kChunks; c++)
#pragma unroll
      for (int i = 0; i < kSize; i++) sum[c][i] = widen(own[c].v[i]);
    const bool some = image.dropped_count > 0;  // else there are no lists
    const int begin = some ? __ldcg(target_begin + role) : 0;
    const int received = some ? __ldcg(target_begin + role + 1) - begin : 0;
    add_rows<T, kChunks, kWhole>(call, image, begin, received, chunk0, sum);
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

// Computes column block `block` of the image's row `row`, by one warp. target_begin: [T + 1] of this image.
template <class T, int kChunks>
__device__ inline void s5_mean(const Call& call, const Image& image, const int32_t* target_begin, int row, int block) {
  if (call.whole_in) mean_of<T, kChunks, true>(call, image, target_begin, row, block);
  else mean_of<T, kChunks, false>(call, image, target_begin, row, block);
}

}  // namespace apet::cuda
