// s5, first half: the merge target of every dropped token, arg max_t x.t / ||t|| (scaling x changes no arg-max).
//
//                 targets (kColumns)                    a warp computes kFragM x kFragN matrix instructions of 16 x 8;
//               +-------+-------+                       steps of 128 bytes of D, three in flight in shared memory
//     dropped   | warp  | warp  |
//     (kRows)   +-------+-------+  -> x.t / ||t||, largest of the row -> target_key -> one atomicMax per row
//               | warp  | warp  |
//               +-------+-------+
//
// The [dropped_count, T] matrix is never stored. A product is summed in float32 over ascending D, in chains (kChain),
// in the hardware's order inside a matrix instruction of 16 elements (16-bit tokens), or fma by fma (float32, IEEE:
// never tf32). Tile sizes therefore do not change a bit of it, and the arg-max is over integers: similarity, then the
// lower target.
#pragma once
#include "dot.cuh"
#include "s1_s3_sweep.cuh"

namespace apet::cuda {

constexpr int kStepBytes = 128;                // bytes of a row per step
constexpr int kBufferPitch = kStepBytes + 16;  // 9 words of 16 bytes: 8 rows of a matrix are in different banks
constexpr int kBuffers = 3;
constexpr int kChain = 128;  // products of a chain; its sum is then added to the total

// kWarpsM x kWarpsN warps, each with 16 kFragM dropped tokens x 8 kFragN targets.
template <int kWarpsM_, int kWarpsN_, int kFragM_, int kFragN_>
struct Tile {
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kFragM = kFragM_, kFragN = kFragN_;
  static constexpr int kRows = kWarpsM * kFragM * 16, kColumns = kWarpsN * kFragN * 8;
  static constexpr int kThreads = kWarpsM * kWarpsN * 32;
  // Buffers, and the lists of a tile: positions of the dropped tokens and of the targets, and inv_norm of the targets.
  template <bool kResident>
  static constexpr int shared_bytes() {
    return kBuffers * ((kResident ? 0 : kRows) + kColumns) * kBufferPitch + (kRows + 2 * kColumns) * 4;
  }
};
using SmallTile = Tile<2, 2, 2, 4>;  // 64 x 64: enough tiles for a small image
// 96 x 128 reads six tenths of the bytes from L2 per product; its two sums per product fill the registers. float32,
// which is limited by arithmetic, uses 64 x 128.
template <class T>
using LargeTile = Tile<2, 4, sizeof(T) == 2 ? 3 : 2, 4>;
// The tile of s1_s5_cluster, for its 12 warps: 96 x 128 (float32, for lack of registers: 96 x 64).
template <class T>
using ClusterTile = Tile<3, 4, 2, sizeof(T) == 2 ? 4 : 2>;

// Returns bits that sort as the floats do; -0 counts as +0, NaN is below all others.
__device__ __forceinline__ uint32_t ordered(float v) {
  if (v != v) return 0;
  const uint32_t bits = __float_as_uint(__fadd_rn(v, 0));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Adds to acc the products over 32 bytes of D. a(i), b(j): the addresses that this lane loads from, in shared memory.
template <class T, class Tl, class RowA, class RowB>
__device__ __forceinline__ void multiply(float (&acc)[Tl::kFragM][Tl::kFragN][4], RowA a, RowB b) {
  if constexpr (sizeof(T) == 2) {
    uint32_t fa[Tl::kFragM][4], fb[Tl::kFragN / 2][4];
#pragma unroll
    for (int i = 0; i < Tl::kFragM; i++) ldmatrix_x4(fa[i], a(i));
#pragma unroll
    for (int j = 0; j < Tl::kFragN / 2; j++) ldmatrix_x4(fb[j], b(j));
#pragma unroll
    for (int i = 0; i < Tl::kFragM; i++)
#pragma unroll
      for (int j = 0; j < Tl::kFragN; j++) {
        const uint32_t pair[2] = {fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]};
        mma_16816<T>(acc[i][j], fa[i], pair);
      }
  } else {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Chunk<T> fa[Tl::kFragM * 2];
#pragma unroll
      for (int i = 0; i < Tl::kFragM * 2; i++) fa[i] = *reinterpret_cast<const Chunk<T>*>(a(i) + 16 * half);
#pragma unroll
      for (int j = 0; j < Tl::kFragN; j++) {
        Chunk<T> fb[2];
#pragma unroll
        for (int c = 0; c < 2; c++) fb[c] = *reinterpret_cast<const Chunk<T>*>(b(j * 2 + c) + 16 * half);
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
          for (int i = 0; i < Tl::kFragM; i++)
#pragma unroll
            for (int c = 0; c < 4; c++) acc[i][j][c] = __fmaf_rn(fa[i * 2 + c / 2].v[k], fb[c % 2].v[k], acc[i][j][c]);
      }
    }
  }
}

// Computes one tile: dropped tokens [r0, r_end) and targets from t0 on, as many as the tile has. Raises their
// target_key. kResident: the dropped tokens are resident rows of `slice`; else they are copied to shared memory like
// the targets.
template <class T, class Tl, bool kResident>
__device__ inline void s5_assign(const Call& call, const Image& image, const Slice<T>* slice, int r0, int r_end, int t0,
                                 unsigned char* shared) {
  constexpr int kBufferRows =
      (kResident ? 0 : Tl::kRows) + Tl::kColumns;  // rows of a buffer: dropped tokens, then targets
  unsigned char* buffers = shared;
  int* dropped = reinterpret_cast<int*>(buffers + kBuffers * kBufferRows * kBufferPitch);  // positions; -1: none
  int* target_token = dropped + Tl::kRows;                                                 // positions; -1: none
  float* inv_norm = reinterpret_cast<float*>(target_token + Tl::kColumns);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const T* x = static_cast<const T*>(call.tensors.x) + image.base;

  __syncthreads();  // all threads have finished the previous tile, which used the same buffers
  for (int r = thread; r < Tl::kRows; r += Tl::kThreads)
    dropped[r] = r0 + r < r_end ? __ldcg(call.dropped + image.token + r0 + r) : -1;
  for (int t = thread; t < Tl::kColumns; t += Tl::kThreads) {
    const bool there = t0 + t < image.target_count;
    target_token[t] = there ? __ldcg(call.target_token + image.row + t0 + t) : -1;
    inv_norm[t] = there ? __ldcg(call.inv_norm + image.row + t0 + t) : 0;
  }
  __syncthreads();

  const int chunks = chunks_of<T>(call.dim);
  const int slabs = (int)round_up((int64_t)chunks * 16, 32) / 32;  // of 32 bytes: one matrix instruction deep
  const int steps = (slabs + kStepBytes / 32 - 1) / (kStepBytes / 32);
  const auto load = [&](int step) {
    if (step < steps) {
      unsigned char* buffer = buffers + step % kBuffers * kBufferRows * kBufferPitch;
      for (int i = thread; i < kBufferRows * (kStepBytes / 16); i += Tl::kThreads) {
        const int r = i / (kStepBytes / 16), k = i % (kStepBytes / 16);
        const int position = kResident || r >= Tl::kRows ? target_token[r - (kResident ? 0 : Tl::kRows)] : dropped[r];
        const int chunk = step * (kStepBytes / 16) + k;
        const bool valid = position >= 0 && chunk < chunks;
        const T* row = x + max(position, 0) * call.stride_xn;
        void* out = buffer + r * kBufferPitch + k * 16;
        if (call.whole_in) copy_async_16(out, valid ? row + (int64_t)chunk * Chunk<T>::kSize : row, valid);
        else *static_cast<Chunk<T>*>(out) = valid ? load_chunk(row, chunk, call.dim, false) : Chunk<T>{};
      }
    }
    copy_async_commit();  // past the end an empty group, so that every step waits for the same count
  };

  // The rows that this lane loads from: those of a matrix (16-bit tokens), or those of its own sums (float32). They are
  // byte offsets from the first row of a buffer, so that one address is enough for all.
  constexpr bool kMatrix = sizeof(T) == 2;
  constexpr int kRowsA = !kResident ? 1 : kMatrix ? Tl::kFragM : Tl::kFragM * 2;
  const int warp_row = warp / Tl::kWarpsN * Tl::kFragM * 16, warp_column = warp % Tl::kWarpsN * Tl::kFragN * 8;
  const unsigned char* a[kRowsA];
#pragma unroll
  for (int i = 0; i < kRowsA; i++) {
    const int r = warp_row + (kMatrix ? i * 16 + lane % 16 : i * 8 + lane / 4);
    if constexpr (kResident)
      a[i] =
          reinterpret_cast<unsigned char*>(slice->resident_row(call, dropped[r] >= 0 ? dropped[r] - slice->first : 0));
    else a[i] = buffers + r * kBufferPitch;
    if (kMatrix) a[i] += lane / 16 * 16;
  }
  const int t = warp_column + (kMatrix ? lane % 8 + lane / 16 * 8 : lane % 4 * 2);
  const unsigned char* b =
      buffers + ((kResident ? 0 : Tl::kRows) + t) * kBufferPitch + (kMatrix ? lane / 8 % 2 * 16 : 0);
  const auto row_a = [&](int i) { return kResident ? a[i] : a[0] + i * (kMatrix ? 16 : 8) * kBufferPitch; };
  const auto row_b = [&](int j) { return b + (kMatrix ? j * 16 : j / 2 * 8 + j % 2) * kBufferPitch; };

  // acc: the sum of the current chain; sum: of the chains before it.
  float acc[Tl::kFragM][Tl::kFragN][4] = {}, sum[Tl::kFragM][Tl::kFragN][4] = {};
  const auto end_chain = [&] {
#pragma unroll
    for (int i = 0; i < Tl::kFragM; i++)
#pragma unroll
      for (int j = 0; j < Tl::kFragN; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
          sum[i][j][c] = __fadd_rn(sum[i][j][c], acc[i][j][c]);
          acc[i][j][c] = 0;
        }
  };
  constexpr int kChainSteps = kChain * (int)sizeof(T) / kStepBytes;
  const bool busy = r0 + warp_row < r_end && t0 + warp_column < image.target_count;
  for (int step = 0; step < kBuffers - 1; step++) load(step);
  for (int step = 0; step < steps; step++) {
    copy_async_wait<kBuffers - 2>();
    __syncthreads();  // this step's rows are there, and all threads have finished the step before
    load(step + kBuffers - 1);
    const int buffer = step % kBuffers * kBufferRows * kBufferPitch;
    if (busy) {
#pragma unroll(kMatrix ? 2 : 1)  // more of them spill on some targets
      for (int k = 0; k < kStepBytes; k += 32)
        // Copied rows end in zeros, which change no sum; what lies behind a resident row may be anything.
        if (!kResident || step * (kStepBytes / 32) + k / 32 < slabs)
          multiply<T, Tl>(
              acc, [&](int i) { return row_a(i) + (kResident ? step * kStepBytes : buffer) + k; },
              [&](int j) { return row_b(j) + buffer + k; });
      if (step % kChainSteps == kChainSteps - 1) end_chain();
    }
  }
  copy_async_wait<0>();
  if (!busy) return;
  end_chain();

  // sum[i][j][c] is row i * 16 + c / 2 * 8 + lane / 4, column j * 8 + lane % 4 * 2 + c % 2 of the warp's part.
#pragma unroll
  for (int i = 0; i < Tl::kFragM; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Key best = 0;
#pragma unroll
      for (int j = 0; j < Tl::kFragN; j++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int t = warp_column + j * 8 + lane % 4 * 2 + c;
          if (target_token[t] >= 0)
            best = larger(best, pack(ordered(__fmul_rn(sum[i][j][half * 2 + c], inv_norm[t])), t0 + t));
        }
      best = larger(best, __shfl_xor_sync(kAllLanes, best, 1));
      best = larger(best, __shfl_xor_sync(kAllLanes, best, 2));
      const int r = warp_row + i * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0 && dropped[r] >= 0) atomicMax(call.target_key + image.token + r0 + r, best);
    }
}

}  // namespace apet::cuda
