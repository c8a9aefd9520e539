// s5, first half: the merge target of every dropped token, arg max_t x.t / ||t|| (scaling x changes no arg-max). In a
// medoid step of s4, by the same tiles: the nearest target, arg min_t (||x||^2 - x.t) + (||t||^2 - x.t).
//
//     products of a tile (product.cuh) -> x.t / ||t||, or the distance -> largest of the row -> target_key
//                                                                         -> one atomicMax per row
//
// The [dropped_count, T] matrix is never stored. The arg-max is over integers: similarity, then the lower target.
#pragma once
#include "product.cuh"
#include "s1_s3_sweep.cuh"

namespace apet::cuda {

using SmallTile = Tile<2, 2, 2, 4>;  // 64 x 64: enough tiles for a small image
// 128 x 64 reads three quarters of the bytes of 64 x 64 per product, and has the 8 warps that an SM needs even where its
// shared memory has room for one CTA only. For few targets, which fill no more columns. 16-bit tokens only.
using TallTile = Tile<4, 2, 2, 4>;
// 96 x 128 reads six tenths of the bytes from L2 per product; its two sums per product fill the registers. float32,
// which is limited by arithmetic, uses 64 x 128, and has no larger tile.
template <class T>
using LargeTile = Tile<2, 4, sizeof(T) == 2 ? 3 : 2, 4>;
// 128 x 256 reads two thirds of the bytes of 96 x 128. A warp takes its 64 columns in two passes, so a thread has 64 sums
// of chains beside the 128 others. Two chains of all rows are in flight, in 204 KB of shared memory.
using LargestTile = Tile<2, 4, 4, 8, 2>;
// The tile of s1_s5_cluster, for its 12 warps: 96 x 128 (float32, for lack of registers: 96 x 64).
template <class T>
using ClusterTile = Tile<3, 4, 2, sizeof(T) == 2 ? 4 : 2>;

// Returns bits that sort as the floats do; -0 counts as +0, NaN is below all others.
__device__ __forceinline__ uint32_t ordered(float v) {
  if (v != v) return 0;
  const uint32_t bits = __float_as_uint(__fadd_rn(v, 0));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Computes one tile: dropped tokens [r0, r_end) and targets from t0 on, as many as the tile has. Raises their
// target_key. kResident: the dropped tokens are resident rows of `slice`; else they are copied to shared memory like
// the targets. kNearest: by distance, not by similarity.
template <class T, class Tl, bool kResident, bool kNearest = false>
__device__ inline void s5_assign(const Call& call, const Image& image, const Slice<T>* slice, int r0, int r_end, int t0,
                                 unsigned char* shared) {
  int* dropped = reinterpret_cast<int*>(shared + Tl::template kBufferBytes<kResident>);  // positions; -1: none
  int* target_token = dropped + Tl::kRows;                                               // positions; -1: none
  float* target_norm =
      reinterpret_cast<float*>(target_token + Tl::kColumns);  // 1 / ||t||, 0 for a zero vector; or ||t||^2
  const int thread = threadIdx.x, lane = thread % 32;
  const float* norm_sq = call.norm_sq + image.token;

  __syncthreads();  // all threads have finished the previous tile, which used the same lists
  for (int r = thread; r < Tl::kRows; r += Tl::kThreads)
    dropped[r] = r0 + r < r_end ? __ldcg(call.dropped + image.token + r0 + r) : -1;
  for (int t = thread; t < Tl::kColumns; t += Tl::kThreads) {
    const bool there = t0 + t < image.target_count;
    const float t_norm_sq = there ? __ldcg(call.target_norm_sq + image.row + t0 + t) : 0;
    target_token[t] = there ? __ldcg(call.target_token + image.row + t0 + t) : -1;
    target_norm[t] = kNearest || t_norm_sq == 0 ? t_norm_sq : __fdiv_rn(1, __fsqrt_rn(t_norm_sq));
  }
  const Matrix<T> x = {static_cast<const T*>(call.tensors.x) + image.base, call.stride_xn, call.dim,
                       (bool)call.whole_in};
  const auto resident = [&] {
    if constexpr (kResident)
      return [&](int r) { return slice->resident_row(call, dropped[r] >= 0 ? dropped[r] - slice->first : 0); };
    else return Copied{};
  }();
  float sum[Tl::kFragM][Tl::kFragN][4];
  if (!multiply_rows<T, Tl>(x, dropped, r_end - r0, target_token, image.target_count - t0, resident, shared, sum))
    return;

#pragma unroll
  for (int i = 0; i < Tl::kFragM; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = product_row<Tl>(i, half), position = dropped[r];
      const float x_norm_sq = kNearest && position >= 0 ? __ldcg(norm_sq + position) : 0;
      Key best = 0;
#pragma unroll
      for (int j = 0; j < Tl::kFragN; j++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int t = product_column<Tl>(j, c);
          const float product = sum[i][j][half * 2 + c], norm = target_norm[t];
          const float value =
              kNearest ? -__fadd_rn(__fsub_rn(x_norm_sq, product), __fsub_rn(norm, product)) : __fmul_rn(product, norm);
          if (target_token[t] >= 0) best = larger(best, pack(ordered(value), t0 + t));
        }
      best = larger(best, __shfl_xor_sync(kAllLanes, best, 1));
      best = larger(best, __shfl_xor_sync(kAllLanes, best, 2));
      if (lane % 4 == 0 && position >= 0) atomicMax(call.target_key + image.token + r0 + r, best);
    }
}

}  // namespace apet::cuda
