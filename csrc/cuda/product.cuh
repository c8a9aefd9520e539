// Tiles of dot products of rows with rows: by matrix instructions (16-bit elements), or fma by fma (float32, IEEE: never
// tf32).
//
//                 columns (kColumns)                    a warp computes kFragM x kFragN matrix instructions of 16 x 8;
//               +-------+-------+                       steps of kStepBytes of a row, kBuffers in flight in shared memory
//     rows      | warp  | warp  |
//     (kRows)   +-------+-------+  -> products, in registers
//               | warp  | warp  |
//               +-------+-------+
//
// A product is summed in float32 over the ascending elements of the rows, in chains (kChain), in the hardware's order
// inside a matrix instruction of 16 elements. Tile sizes therefore do not change a bit of it.
//
// Each product has two sums in registers: that of its chain, and that of the chains before. For a tile that is too large
// for so many, kPasses > 1: a step is a whole chain, and a warp multiplies one part of its columns after the other, so
// that only one part has sums of its chain. In return the rows are read from shared memory in each pass.
#pragma once
#include <type_traits>

#include "dot.cuh"

namespace apet::cuda {

constexpr int kChain = 128;  // products of a chain; its sum is then added to the total

// kWarpsM x kWarpsN warps, each with 16 kFragM rows x 8 kFragN columns, which it takes in kPasses passes.
template <int kWarpsM_, int kWarpsN_, int kFragM_, int kFragN_, int kPasses_ = 1>
struct Tile {
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kFragM = kFragM_, kFragN = kFragN_, kPasses = kPasses_;
  static constexpr int kPassN = kFragN / kPasses;              // matrix instructions of a pass across the columns
  static constexpr int kStepBytes = kPasses == 1 ? 128 : 256;  // bytes of a row per step
  // 9 or 17 words of 16 bytes: 8 rows of a matrix are in different banks.
  static constexpr int kBufferPitch = kStepBytes + 16;
  static constexpr int kBuffers = kPasses == 1 ? 3 : 2;
  static constexpr int kRows = kWarpsM * kFragM * 16, kColumns = kWarpsN * kFragN * 8;
  static constexpr int kThreads = kWarpsM * kWarpsN * 32;
  template <bool kResident>
  static constexpr int kBufferBytes = kBuffers * ((kResident ? 0 : kRows) + kColumns) * kBufferPitch;
  // Buffers, and the lists of a tile: its rows, its columns, and a value of each column.
  template <bool kResident>
  static constexpr int shared_bytes() {
    return kBufferBytes<kResident> + (kRows + 2 * kColumns) * 4;
  }
};

// Adds to acc the products over 32 bytes of D. a(i), b(j): the addresses that this lane loads from, in shared memory.
template <class T, int kFragM, int kFragN, class RowA, class RowB>
__device__ __forceinline__ void multiply(float (&acc)[kFragM][kFragN][4], RowA a, RowB b) {
  if constexpr (sizeof(T) == 2) {
    uint32_t fa[kFragM][4], fb[kFragN / 2][4];
#pragma unroll
    for (int i = 0; i < kFragM; i++) ldmatrix_x4(fa[i], a(i));
#pragma unroll
    for (int j = 0; j < kFragN / 2; j++) ldmatrix_x4(fb[j], b(j));
#pragma unroll
    for (int i = 0; i < kFragM; i++)
#pragma unroll
      for (int j = 0; j < kFragN; j++) {
        const uint32_t pair[2] = {fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]};
        mma_16816<T>(acc[i][j], fa[i], pair);
      }
  } else {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Chunk<T> fa[kFragM * 2];
#pragma unroll
      for (int i = 0; i < kFragM * 2; i++) fa[i] = *reinterpret_cast<const Chunk<T>*>(a(i) + 16 * half);
#pragma unroll
      for (int j = 0; j < kFragN; j++) {
        Chunk<T> fb[2];
#pragma unroll
        for (int c = 0; c < 2; c++) fb[c] = *reinterpret_cast<const Chunk<T>*>(b(j * 2 + c) + 16 * half);
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
          for (int i = 0; i < kFragM; i++)
#pragma unroll
            for (int c = 0; c < 4; c++) acc[i][j][c] = __fmaf_rn(fa[i * 2 + c / 2].v[k], fb[c % 2].v[k], acc[i][j][c]);
      }
    }
  }
}

// Rows in global memory, by number.
template <class T>
struct Matrix {
  const T* first;
  int64_t stride;  // in elements
  int dim;         // elements of a row
  bool whole;      // rows are whole 16-byte words at multiples of 16 bytes

  __device__ const T* row(int number) const { return first + number * stride; }
};

// In place of a function that returns the address of a row in shared memory: all rows are copied there.
struct Copied {};

// Computes sum, the products of rows row[r], r < rows, with rows column[t], t < columns, of a matrix. Both lists are in
// shared memory, as long as the tile; -1: there is no row. resident(r): where row[r] is in shared memory, padded by
// zeros to whole steps; if Copied, the rows are copied to `buffers` as the columns are. Called by all threads, between
// two barriers of which it contains the first. Returns false if the thread's warp has none of the products.
template <class T, class Tl, class Resident>
__device__ __forceinline__ bool multiply_rows(const Matrix<T>& from, const int* row, int rows, const int* column,
                                              int columns, Resident resident, unsigned char* buffers,
                                              float (&sum)[Tl::kFragM][Tl::kFragN][4]) {
  constexpr bool kResident = !std::is_same_v<Resident, Copied>;
  constexpr int kBufferRows = (kResident ? 0 : Tl::kRows) + Tl::kColumns;  // rows of a buffer: rows, then columns
  constexpr int kStepBytes = Tl::kStepBytes, kBufferPitch = Tl::kBufferPitch, kBuffers = Tl::kBuffers;
  constexpr int kChainSteps = kChain * (int)sizeof(T) / kStepBytes;
  static_assert(Tl::kPasses == 1 || kChainSteps == 1);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  __syncthreads();  // both lists are written, and all threads have finished with what was in the buffers
  const int chunks = chunks_of<T>(from.dim);
  const int slabs = (int)round_up((int64_t)chunks * 16, 32) / 32;  // of 32 bytes: one matrix instruction deep
  const int steps = (slabs + kStepBytes / 32 - 1) / (kStepBytes / 32);
  const auto load = [&](int step) {
    if (step < steps) {
      unsigned char* buffer = buffers + step % kBuffers * kBufferRows * kBufferPitch;
      for (int i = thread; i < kBufferRows * (kStepBytes / 16); i += Tl::kThreads) {
        const int r = i / (kStepBytes / 16), k = i % (kStepBytes / 16);
        const int number = kResident || r >= Tl::kRows ? column[r - (kResident ? 0 : Tl::kRows)] : row[r];
        const int chunk = step * (kStepBytes / 16) + k;
        const bool valid = number >= 0 && chunk < chunks;
        const T* first = from.row(max(number, 0));
        void* out = buffer + r * kBufferPitch + k * 16;
        if (from.whole) copy_async_16(out, valid ? first + (int64_t)chunk * Chunk<T>::kSize : first, valid);
        else *static_cast<Chunk<T>*>(out) = valid ? load_chunk(first, chunk, from.dim, false) : Chunk<T>{};
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
    if constexpr (kResident) a[i] = reinterpret_cast<const unsigned char*>(resident(r));
    else a[i] = buffers + r * kBufferPitch;
    if (kMatrix) a[i] += lane / 16 * 16;
  }
  const int t = warp_column + (kMatrix ? lane % 8 + lane / 16 * 8 : lane % 4 * 2);
  const unsigned char* b =
      buffers + ((kResident ? 0 : Tl::kRows) + t) * kBufferPitch + (kMatrix ? lane / 8 % 2 * 16 : 0);
  const auto row_a = [&](int i) { return kResident ? a[i] : a[0] + i * (kMatrix ? 16 : 8) * kBufferPitch; };
  const auto row_b = [&](int j) { return b + (kMatrix ? j * 16 : j / 2 * 8 + j % 2) * kBufferPitch; };

  // The sum of the current chain, of the columns of a pass; sum: of the chains before it, of all columns.
  float acc[Tl::kFragM][Tl::kPassN][4] = {};
#pragma unroll
  for (int i = 0; i < Tl::kFragM; i++)
#pragma unroll
    for (int j = 0; j < Tl::kFragN; j++)
#pragma unroll
      for (int c = 0; c < 4; c++) sum[i][j][c] = 0;
  const auto end_chain = [&](int first) {  // of the columns from `first` on
#pragma unroll
    for (int i = 0; i < Tl::kFragM; i++)
#pragma unroll
      for (int j = 0; j < Tl::kPassN; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
          sum[i][first + j][c] = __fadd_rn(sum[i][first + j][c], acc[i][j][c]);
          acc[i][j][c] = 0;
        }
  };
  const bool busy = warp_row < rows && warp_column < columns;
  for (int step = 0; step < kBuffers - 1; step++) load(step);
  for (int step = 0; step < steps; step++) {
    copy_async_wait<kBuffers - 2>();
    __syncthreads();  // this step's rows are there, and all threads have finished the step before
    load(step + kBuffers - 1);
    const int buffer = step % kBuffers * kBufferRows * kBufferPitch;
    if (busy) {
#pragma unroll
      for (int first = 0; first < Tl::kFragN; first += Tl::kPassN) {
#pragma unroll(kMatrix ? 2 : 1)  // more of them spill on some targets
        for (int k = 0; k < kStepBytes; k += 32)
          // Copied rows end in zeros, which change no sum; what lies behind a resident row may be anything.
          if (!kResident || step * (kStepBytes / 32) + k / 32 < slabs)
            multiply<T>(
                acc, [&](int i) { return row_a(i) + (kResident ? step * kStepBytes : buffer) + k; },
                [&](int j) { return row_b((kMatrix ? first / 2 : first * 2) + j) + buffer + k; });
        if (step % kChainSteps == kChainSteps - 1) end_chain(first);
      }
    }
  }
  copy_async_wait<0>();
  if (busy && kChainSteps > 1) end_chain(0);
  return busy;
}

// The place of sum[i][j][half * 2 + c] in the tile.
template <class Tl>
__device__ __forceinline__ int product_row(int i, int half) {
  return threadIdx.x / 32 / Tl::kWarpsN * Tl::kFragM * 16 + i * 16 + half * 8 + threadIdx.x % 32 / 4;
}
template <class Tl>
__device__ __forceinline__ int product_column(int j, int c) {
  return threadIdx.x / 32 % Tl::kWarpsN * Tl::kFragN * 8 + j * 8 + threadIdx.x % 4 * 2 + c;
}

}  // namespace apet::cuda
