// 16-byte chunks of a row, and the dot product that every path uses.
//
//   lane l of a warp takes chunks l, l + 32, l + 64, ... of the row. In float32:
//
//     inside a chunk       fma by fma
//     chunks of a lane     added in ascending order
//     lanes of the warp    an xor-shuffle tree: 16, 8, 4, 2, 1
//
// There are three levels because one sum per lane would exceed the bound on e_sq at M = 1 (docs/algorithm.md,
// "Rounding"). Rows of at most 32 chunks are summed in Wide. The order of the sum therefore follows from D and the
// dtype alone, and not from the row's address or alignment, the rows that share the warp, or how the image is divided.
// norm_sq is computed by the same routine with x on both sides: a copy of a basis token has bitwise ||x||^2 = x.p =
// ||p||^2, and so distance 0.
#pragma once
#include "call.cuh"
#include "wide.cuh"

namespace apet::cuda {

template <class T>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void narrow(float& out, float v) { out = v; }
__device__ __forceinline__ void narrow(__half& out, float v) { out = __float2half_rn(v); }
__device__ __forceinline__ void narrow(__nv_bfloat16& out, float v) { out = __float2bfloat16_rn(v); }

// Loads chunk k of a row of dim elements; zeros past its end. whole: the row consists of whole aligned chunks.
template <class T>
__device__ __forceinline__ Chunk<T> load_chunk(const T* row, int64_t k, int dim, bool whole) {
  if (whole) return reinterpret_cast<const Chunk<T>*>(row)[k];
  Chunk<T> chunk = {};
#pragma unroll
  for (int i = 0; i < Chunk<T>::kSize; i++)
    if (k * Chunk<T>::kSize + i < dim) chunk.v[i] = row[k * Chunk<T>::kSize + i];
  return chunk;
}

template <class T>
__device__ __forceinline__ void store_chunk(T* row, int64_t k, int dim, bool whole, const Chunk<T>& chunk) {
  if (whole) {
    reinterpret_cast<Chunk<T>*>(row)[k] = chunk;
    return;
  }
#pragma unroll
  for (int i = 0; i < Chunk<T>::kSize; i++)
    if (k * Chunk<T>::kSize + i < dim) row[k * Chunk<T>::kSize + i] = chunk.v[i];
}

template <class T>
__host__ __device__ constexpr int chunks_of(int64_t dim) {
  return (int)((dim + Chunk<T>::kSize - 1) / Chunk<T>::kSize);
}

// Rows that a warp takes at once: each chunk of p is widened once for all of them.
constexpr int kRows = 4;

// For rows of at most one chunk per lane: basis tokens may almost span so few features, and small pivots amplify every
// rounding error. So the few products are summed in Wide, which costs more (wide.cuh).
template <class T, bool kSelf, bool kWhole>
__device__ __forceinline__ void narrow_dots(const T* const (&row)[kRows], const T* p, bool p_whole, int dim,
                                            float (&sum)[kRows]) {
  const int k = threadIdx.x % 32;
  const bool has = k < chunks_of<T>(dim);
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    Wide here = 0.0f;
    if (has) {
      const Chunk<T> a = load_chunk(row[r], k, dim, kWhole), b = kSelf ? a : load_chunk(p, k, dim, p_whole);
#pragma unroll
      for (int i = 0; i < Chunk<T>::kSize; i++) here = multiply_add(widen(a.v[i]), widen(b.v[i]), here);
    }
    for (int step = 16; step; step >>= 1) here = here + shuffle_xor(here, step);
    sum[r] = (float)here;
  }
}

// Computes sum[r] = row[r] . p, in every lane; kSelf: row[r] . row[r].
template <class T, bool kSelf, bool kWhole>
__device__ __forceinline__ void dots(const T* const (&row)[kRows], const T* p, bool p_whole, int dim,
                                     float (&sum)[kRows]) {
  if (chunks_of<T>(dim) <= 32) return narrow_dots<T, kSelf, kWhole>(row, p, p_whole, dim, sum);
#pragma unroll
  for (int r = 0; r < kRows; r++) sum[r] = 0;
#pragma unroll(kWhole ? 2 : 1)
  for (int k = threadIdx.x % 32; k < chunks_of<T>(dim); k += 32) {
    float b[Chunk<T>::kSize];
    if constexpr (!kSelf) {
      const Chunk<T> chunk = load_chunk(p, k, dim, p_whole);
#pragma unroll
      for (int i = 0; i < Chunk<T>::kSize; i++) b[i] = widen(chunk.v[i]);
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const Chunk<T> chunk = load_chunk(row[r], k, dim, kWhole);
      float here = 0;
#pragma unroll
      for (int i = 0; i < Chunk<T>::kSize; i++) {
        const float a = widen(chunk.v[i]);
        here = __fmaf_rn(a, kSelf ? a : b[i], here);
      }
      sum[r] = __fadd_rn(sum[r], here);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; r++)
    for (int step = 16; step; step >>= 1) sum[r] = __fadd_rn(sum[r], __shfl_xor_sync(kAllLanes, sum[r], step));
}

}  // namespace apet::cuda
