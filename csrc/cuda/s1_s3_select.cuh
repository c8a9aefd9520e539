// s1 to s3: one pass over the tokens for the norms, then one sweep a basis token (docs/algorithm.md, "One sweep").
//
//   X [n, D] in slices, one a CTA of the group:    CTA 0 | CTA 1 | ... | CTA G-1
//                                                  rows of a slice: resident in shared memory | the rest, read from L2
//
//   step k:  best candidate of the slice --publish--> one barrier of the group --> p, ||p||^2, y(p) = row k of L
//            p's row from L2 -> shared memory        D elements
//            dot = X p                               a warp takes 4 rows at once; bound by widening and fma
//            y_k = (dot - l.y) / sqrt(pivot)         a thread a row
//            distance, or what is left of ||x||^2    -> best candidate for step k + 1
//
// What is done once a token and not once an element is float64: its rounding would add up over the steps, its cost does
// not. y and L are stored as float32.
//
// Global memory is read once (and M times what is not resident, from L2); written are 8 bytes a token.
#pragma once
#include "dot.cuh"
#include "group.cuh"

namespace apet::cuda {

constexpr uint32_t kInfinite = 0x7f800000u + 1;  // the rank of e^2 = inf: tokens whose norm is not finite
constexpr uint32_t kHighest = 0xffffffffu;       // the rank of basis tokens that stay by their own right

// Rows of a slice when an image of n tokens is cut into so many.
__device__ __forceinline__ int slice_rows(int n, int slices) { return (int)(((int64_t)n + slices - 1) / slices); }

// A CTA's part of an image.
template <class T>
struct Slice {
  int64_t base;    // the image's first token in x
  int first;       // position of the slice's first row
  int count;       // rows
  int resident;    // of them in shared memory
  float* norm;     // [count] ||x||^2
  float* measure;  // [count] s1 picks the largest: distance to the basis (fps), ||x||^2 - ||y||^2 (qr); 0: never picked
  float* dot;      // [count] x.p
  float* y;        // [M][count]

  __device__ Slice(const Call& call, const Image& image, int rank, int size) {
    base = image.base;
    const int rows = slice_rows(image.count, size);
    first = (int)min((int64_t)rank * rows, (int64_t)image.count);
    count = min(rows, image.count - first);
    resident = min(call.resident, count);
    float* state = call.state_shared ? reinterpret_cast<float*>(shared_memory() + call.map.state)
                                     : call.state + (image.token + first) * (3 + call.basis);
    norm = state;
    measure = norm + count;
    dot = measure + count;
    y = dot + count;
  }
  // Token n of the image. (Not by a pointer that is kept here: the compiler would not know that it is a global one.)
  __device__ const T* token(const Call& call, int n) const {
    return static_cast<const T*>(call.at.x) + base + n * call.stride_xn;
  }
  __device__ const T* row(const Call& call, int i) const { return token(call, first + i); }
  __device__ T* resident_row(const Call& call, int i) const {
    return reinterpret_cast<T*>(shared_memory() + call.map.rows + i * call.pitch);
  }
};

// What a CTA of `select` and `fused` works on. It lies in shared memory: registers are short, and it is the same for
// all.
template <class T>
struct Work {
  Image image;
  Slice<T> slice;
};
constexpr int kWorkBytes = 128;

// All threads: opens image s.
template <class T>
__device__ inline Work<T>& open_image(const Call& call, int s, int rank, int size) {
  static_assert(sizeof(Work<T>) <= kWorkBytes);
  Work<T>* work = reinterpret_cast<Work<T>*>(shared_memory() + call.map.work);
  if (threadIdx.x < 32) {
    const Image image = find_image(call, s);
    if (threadIdx.x == 0) *work = {image, Slice<T>(call, image, rank, size)};
  }
  __syncthreads();
  return *work;
}

// Fills the resident rows, zeros behind each up to a whole step of s5.
template <class T>
__device__ inline void stage(const Call& call, const Slice<T>& slice) {
  const int chunks = chunks_of<T>(call.dim), padded = (call.pitch - 16) / 16;
  for (int i = threadIdx.x / 32; i < slice.resident; i += kWarps) {
    const T* from = slice.row(call, i);
    Chunk<T>* to = reinterpret_cast<Chunk<T>*>(slice.resident_row(call, i));
    for (int k = threadIdx.x % 32; k < padded; k += 32) {
      if (call.whole_in) copy_async_16(to + k, k < chunks ? from + (int64_t)k * Chunk<T>::kSize : from, k < chunks);
      else to[k] = load_chunk(from, k, call.dim, false);
    }
  }
  copy_async_commit();
  copy_async_wait<0>();
}

// out[i] = x_i . p for the rows of the slice, p's row lying at p; kSelf: ||x_i||^2.
template <class T, bool kSelf>
__device__ __forceinline__ void sweep(const Call& call, const Slice<T>& slice, const T* p, float* out) {
  const int lane = threadIdx.x % 32;
  for (int i0 = threadIdx.x / 32 * kRows; i0 < slice.count; i0 += kWarps * kRows) {
    const T* row[kRows];
    float sum[kRows];
    if (i0 < slice.resident) {  // which is a multiple of kRows, or everything
#pragma unroll
      for (int r = 0; r < kRows; r++) row[r] = slice.resident_row(call, min(i0 + r, slice.resident - 1));
      // Where rows are resident, so is p.
      const T* shared_p = reinterpret_cast<const T*>(shared_memory() + call.map.candidate);
      dots<T, kSelf, true>(row, shared_p, true, call.dim, sum);
    } else {
#pragma unroll
      for (int r = 0; r < kRows; r++) row[r] = slice.row(call, min(i0 + r, slice.count - 1));
      if (call.whole_in) dots<T, kSelf, true>(row, p, true, call.dim, sum);
      else dots<T, kSelf, false>(row, p, call.basis_shared, call.dim, sum);
    }
#pragma unroll
    for (int r = 0; r < kRows; r++)
      if (lane == r && i0 + r < slice.count) out[i0 + r] = sum[r];
  }
}

// The largest of every thread's key, in the message of warp 0, with what the next step wants to know of that token.
template <class T>
__device__ inline void candidate(const Call& call, const Slice<T>& slice, Key best, int m, uint32_t* message) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Key* warp_best = reinterpret_cast<Key*>(shared_memory() + call.map.warp_best);
  best = warp_largest(best);
  if (lane == 0) warp_best[warp] = best;
  __syncthreads();
  if (warp == 0) {
    best = warp_largest(lane < kWarps ? warp_best[lane] : 0);
    const int i = best ? unpack(best) - slice.first : 0;
    if (lane == 0) {
      message[0] = (uint32_t)best;
      message[1] = (uint32_t)(best >> 32);
      message[2] = __float_as_uint(best ? slice.norm[i] : 0);
    }
    for (int j = lane; j < m; j += 32)
      message[3 + j] = __float_as_uint(best ? slice.y[(int64_t)j * slice.count + i] : 0);
  }
  __syncthreads();
}

// Replaces the CTA's message by that of the best candidate of the group.
template <class Group>
__device__ inline void elect(const Group& group, int words, uint32_t* message) {
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    Key mine = 0;
    int from = 0;
    for (int r = lane; r < group.size; r += 32) {
      const Key key = (Key)group.read(r, 1) << 32 | group.read(r, 0);
      if (key > mine) mine = key, from = r;
    }
    const Key best = warp_largest(mine);
    from = __shfl_sync(kAllLanes, from, __ffs(__ballot_sync(kAllLanes, mine == best)) - 1);
    for (int i = lane; i < words; i += 32) message[i] = group.read(from, i);
  }
  __syncthreads();
}

// Runs at most `steps` steps; returns m, the basis tokens found. They, L and 1 / L_jj are in shared memory, y in the
// slice.
template <class T, class Group>
__device__ inline int s1_s2_sweeps(const Call& call, const Image& image, const Slice<T>& slice, Group& group,
                                   int steps) {
  unsigned char* shared = shared_memory();
  uint32_t* message = reinterpret_cast<uint32_t*>(shared + call.map.message);
  float* factor = reinterpret_cast<float*>(shared + call.map.factor);
  double* inverse = reinterpret_cast<double*>(shared + call.map.inverse);  // 1 / L_jj; 0 for a dependent basis token
  int* basis = reinterpret_cast<int*>(shared + call.map.basis);
  T* shared_p = reinterpret_cast<T*>(shared + call.map.candidate);
  const bool fps = call.select == APET_FPS;
  const int thread = threadIdx.x;

  sweep<T, true>(call, slice, nullptr, slice.norm);
  __syncthreads();
  const int64_t start = min(call.start, (int64_t)image.count - 1);
  Key best = 0;
  for (int i = thread; i < slice.count; i += kThreads) {
    const float norm = slice.norm[i];
    const bool finite = norm <= FLT_MAX;  // false for NaN
    call.norm2[image.token + slice.first + i] = norm;
    slice.measure[i] = !finite ? 0 : fps ? INFINITY : norm;
    const float value = slice.first + i == start ? INFINITY : norm;  // `start` is taken whatever its norm
    if (finite && value > 0) best = larger(best, pack(value, slice.first + i));
  }

  for (int m = 0; m < steps; m++) {
    candidate(call, slice, best, m, message);
    group.publish(message, 3 + m);
    group.sync();
    elect(group, 3 + m, message);
    // From here on all threads of the group do the same with the same numbers.
    if ((message[0] | message[1]) == 0) return m;
    const int p = unpack((Key)message[1] << 32 | message[0]);
    const float norm_p = __uint_as_float(message[2]);
    double left = norm_p;
    for (int j = 0; j < m; j++) {
      const double l = __uint_as_float(message[3 + j]);
      left = fma(-l, l, left);
    }
    const double pivot = left + call.ridge;
    const bool dependent = !(pivot > 4 * kUnit * norm_p);
    if (!fps && m > 0 && dependent) return m;
    const double inv = dependent ? 0 : 1 / sqrt(pivot);
    for (int j = thread; j < m; j += kThreads) factor[m * call.basis + j] = __uint_as_float(message[3 + j]);
    if (thread == 0) inverse[m] = inv, basis[m] = p;
    const T* row_p = slice.token(call, p);
    if (call.basis_shared) {
      for (int k = thread; k < chunks_of<T>(call.dim); k += kThreads)
        reinterpret_cast<Chunk<T>*>(shared_p)[k] = load_chunk(row_p, k, call.dim, call.whole_in);
      __syncthreads();
      row_p = shared_p;
    }
    sweep<T, false>(call, slice, row_p, slice.dot);
    __syncthreads();
    best = 0;
    for (int i = thread; i < slice.count; i += kThreads) {
      const float dot = slice.dot[i];
      double rest = dot;
      for (int j = 0; j < m; j++)
        rest = fma(-(double)__uint_as_float(message[3 + j]), (double)slice.y[(int64_t)j * slice.count + i], rest);
      const double y = rest * inv;
      slice.y[(int64_t)m * slice.count + i] = (float)y;
      float measure = slice.measure[i];
      if (fps) {
        const float distance = __fadd_rn(__fsub_rn(slice.norm[i], dot), __fsub_rn(norm_p, dot));
        if (distance < measure) measure = fmaxf(distance, 0);
      } else {
        measure = (float)fma(-y, y, (double)measure);
      }
      if (slice.first + i == p) measure = 0;
      slice.measure[i] = measure;
      if (measure > 0) best = larger(best, pack(measure, slice.first + i));
    }
  }
  return steps;
}

// e^2 = ||x||^2 - ||y||^2 - ridge ||w||^2 of row i, w = L^-T y (which replaces y).
template <class T>
__device__ inline float s3_residual(const Call& call, const Slice<T>& slice, int m, int i) {
  const float* factor = reinterpret_cast<const float*>(shared_memory() + call.map.factor);
  const double* inverse = reinterpret_cast<const double*>(shared_memory() + call.map.inverse);
  const float norm = slice.norm[i];
  if (!(norm <= FLT_MAX)) return INFINITY;
  const int64_t stride = slice.count;
  float* y = slice.y + i;
  double left = norm;
  for (int j = 0; j < m; j++) left = fma(-(double)y[j * stride], (double)y[j * stride], left);
  if (call.ridge > 0) {
    double penalty = 0;
    for (int j = m - 1; j >= 0; j--) {
      double w = y[j * stride];
      for (int k = j + 1; k < m; k++) w = fma(-(double)factor[k * call.basis + j], (double)y[k * stride], w);
      w *= inverse[j];
      y[j * stride] = (float)w;
      penalty = fma(w, w, penalty);
    }
    left = fma(-call.ridge, penalty, left);
  }
  const float e2 = (float)left;
  return e2 > norm * (call.basis * (4 * kUnit)) ? e2 : 0;  // less is rounding
}

// s1 to s3 of an image; returns m. Leaves norm2 and, for s4, rank (or e^2 itself, where the op is `score`).
template <class T, class Group>
__device__ inline int s1_s3_select(const Call& call, const Image& image, const Slice<T>& slice, Group& group, int s) {
  const bool scores = call.op == APET_SCORE;
  // Where every token stays, or none, nothing is asked of the basis, except to be appended.
  const bool asked =
      scores || (call.op == APET_COMPRESS && (call.appended > 0 || (image.keep > 0 && image.keep < image.count)));
  stage(call, slice);
  __syncthreads();
  const int m = s1_s2_sweeps(call, image, slice, group, asked ? call.basis : 0);
  const int* basis = reinterpret_cast<const int*>(shared_memory() + call.map.basis);
  for (int i = threadIdx.x; i < slice.count; i += kThreads) {
    const float e2 = s3_residual(call, slice, m, i);
    const int64_t token = image.token + slice.first + i;
    if (scores) call.at.residual[token] = e2;
    else call.rank[token] = __float_as_uint(e2) + 1;
  }
  __syncthreads();
  if (scores) {
    if (group.rank == 0)
      for (int j = threadIdx.x; j < call.basis; j += kThreads)
        call.at.basis_indices[(int64_t)s * call.basis + j] = j < m ? basis[j] : -1;
  } else if (call.op == APET_COMPRESS && call.layout == APET_INPLACE) {
    for (int j = threadIdx.x; j < m; j += kThreads)  // kept in picking order, before all others
      if (basis[j] >= slice.first && basis[j] < slice.first + slice.count)
        call.rank[image.token + basis[j]] = j < image.keep ? kHighest : 0;
  }
  return m;
}

}  // namespace apet::cuda
