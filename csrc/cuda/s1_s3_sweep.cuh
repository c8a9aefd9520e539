// s1 to s3: one pass over the tokens for the norms, then one sweep per basis token (docs/algorithm.md, "One sweep").
//
//   X [N, D] in slices, one per CTA of the group:    CTA 0 | CTA 1 | ... | CTA G-1
//                                                    rows of a slice: resident in shared memory | others, read from L2
//
//   step k:  best candidate of the slice --publish--> one barrier of the group --> p, ||p||^2, y(p) = row k of L
//            p's row from L2 -> shared memory         D elements
//            dot = X p                                a warp takes 4 rows at once; bound by widening and fma
//            y_k = (dot - l.y) / sqrt(pivot)          a thread per row
//            pick_value: dist_sq or resid_sq          -> best candidate for step k + 1
//
// Values that are computed once per token, not once per element, are Wide (wide.cuh): float32 rounding errors would add
// up over the steps. y and L are stored as float32.
//
// Global memory is read once (and rows that are not resident M more times, from L2); 8 bytes are written per token.
#pragma once
#include "dot.cuh"
#include "group.cuh"

namespace apet::cuda {

constexpr uint32_t kInfinite = 0x7f800000u + 1;  // the rank of e_sq = inf: tokens whose norm is not finite
constexpr uint32_t kHighest = 0xffffffffu;       // the rank of tokens that stay whatever their e_sq is

// Returns the tokens of a slice if an image of n tokens is divided into `slices` of them.
__device__ __forceinline__ int slice_tokens(int n, int slices) { return (int)(((int64_t)n + slices - 1) / slices); }

// A CTA's part of an image.
template <class T>
struct Slice {
  int64_t base;       // offset of the image's first token in x, in elements
  int first;          // position of the slice's first token
  int tokens;         // tokens of the slice
  int resident;       // how many of them are in shared memory
  float* norm_sq;     // [tokens]
  float* pick_value;  // [tokens] dist_sq (fps) or resid_sq (qr); 0 for a token that must not be picked
  float* dot;         // [tokens] x.p
  float* y;           // [M][tokens]

  __device__ Slice(const Call& call, const Image& image, int cta, int ctas) {
    base = image.base;
    const int each = slice_tokens(image.tokens, ctas);
    first = (int)min((int64_t)cta * each, (int64_t)image.tokens);
    tokens = min(each, image.tokens - first);
    resident = min(call.resident, tokens);
    float* state = call.state_shared ? reinterpret_cast<float*>(shared_memory() + call.map.state)
                                     : call.state + (image.token + first) * (3 + call.basis);
    norm_sq = state;
    pick_value = norm_sq + tokens;
    dot = pick_value + tokens;
    y = dot + tokens;
  }
  // Row of x at a position in the image. (The pointer is not stored in Slice: the compiler would no longer know that it
  // points to global memory.)
  __device__ const T* x_row(const Call& call, int position) const {
    return static_cast<const T*>(call.tensors.x) + base + position * call.stride_xn;
  }
  // Row of the slice's token i.
  __device__ const T* row(const Call& call, int i) const { return x_row(call, first + i); }
  __device__ T* resident_row(const Call& call, int i) const {
    return reinterpret_cast<T*>(shared_memory() + call.map.resident + i * call.pitch);
  }
};

// The image and slice that a CTA works on. It is in shared memory: it is the same for all threads, and registers are
// scarce.
template <class T>
struct Work {
  Image image;
  Slice<T> slice;
};
constexpr int kWorkBytes = 128;

// Called by all threads: prepares image s.
template <class T>
__device__ inline Work<T>& open_image(const Call& call, int s, int cta, int ctas) {
  static_assert(sizeof(Work<T>) <= kWorkBytes);
  Work<T>* work = reinterpret_cast<Work<T>*>(shared_memory() + call.map.work);
  if (threadIdx.x < 32) {
    const Image image = find_image(call, s);
    if (threadIdx.x == 0) *work = {image, Slice<T>(call, image, cta, ctas)};
  }
  __syncthreads();
  return *work;
}

// Fills the resident rows; zeros follow each row up to a whole step of s5.
template <class T>
__device__ inline void load_resident_rows(const Call& call, const Slice<T>& slice) {
  const int chunks = chunks_of<T>(call.dim), padded = (call.pitch - 16) / 16;
  for (int i = threadIdx.x / 32; i < slice.resident; i += kWarps) {
    const T* from = slice.row(call, i);
    Chunk<T>* out = reinterpret_cast<Chunk<T>*>(slice.resident_row(call, i));
    for (int k = threadIdx.x % 32; k < padded; k += 32) {
      if (call.whole_in) copy_async_16(out + k, k < chunks ? from + (int64_t)k * Chunk<T>::kSize : from, k < chunks);
      else out[k] = load_chunk(from, k, call.dim, false);
    }
  }
  copy_async_commit();
  copy_async_wait<0>();
}

// Computes out[i] = x_i . p for the tokens of the slice, p_row being p's row; kSelf: ||x_i||^2. kAllResident: the plan
// keeps every row of every slice in shared memory.
template <class T, bool kSelf, bool kAllResident>
__device__ __forceinline__ void slice_dots(const Call& call, const Slice<T>& slice, const T* p_row, float* out) {
  const int lane = threadIdx.x % 32;
  for (int i0 = threadIdx.x / 32 * kRows; i0 < slice.tokens; i0 += kWarps * kRows) {
    const T* row[kRows];
    float sum[kRows];
    if (kAllResident || i0 < slice.resident) {  // which is a multiple of kRows, or all of the slice
#pragma unroll
      for (int r = 0; r < kRows; r++) row[r] = slice.resident_row(call, min(i0 + r, slice.resident - 1));
      // Rows are resident only if p's row is in shared memory too.
      const T* shared_p_row = reinterpret_cast<const T*>(shared_memory() + call.map.p_row);
      dots<T, kSelf, true>(row, shared_p_row, true, call.dim, sum);
    } else {
#pragma unroll
      for (int r = 0; r < kRows; r++) row[r] = slice.row(call, min(i0 + r, slice.tokens - 1));
      if (call.whole_in) dots<T, kSelf, true>(row, p_row, true, call.dim, sum);
      else dots<T, kSelf, false>(row, p_row, call.basis_shared, call.dim, sum);
    }
#pragma unroll
    for (int r = 0; r < kRows; r++)
      if (lane == r && i0 + r < slice.tokens) out[i0 + r] = sum[r];
  }
}

// Writes the CTA's best candidate, the largest of its threads' keys, into message: key, norm_sq, and the first y_count
// values of its y.
template <class T>
__device__ inline void find_candidate(const Call& call, const Slice<T>& slice, Key best, int y_count,
                                      uint32_t* message) {
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
      message[2] = __float_as_uint(best ? slice.norm_sq[i] : 0);
    }
    for (int j = lane; j < y_count; j += 32)
      message[3 + j] = __float_as_uint(best ? slice.y[(int64_t)j * slice.tokens + i] : 0);
  }
  __syncthreads();
}

// Replaces the CTA's message by that of the group's best candidate.
template <class Group>
__device__ inline void elect_candidate(const Group& group, int words, uint32_t* message) {
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    constexpr int kFlight = 4;  // keys that a lane loads at once; past the end the last one again
    Key mine = 0;
    int from = 0;
    for (int r0 = lane; r0 < group.size; r0 += 32 * kFlight) {
      Key key[kFlight];
#pragma unroll
      for (int f = 0; f < kFlight; f++) key[f] = group.read_key(min(r0 + 32 * f, group.size - 1));
#pragma unroll
      for (int f = 0; f < kFlight; f++)
        if (key[f] > mine) mine = key[f], from = min(r0 + 32 * f, group.size - 1);
    }
    const Key best = warp_largest(mine);
    from = __shfl_sync(kAllLanes, from, __ffs(__ballot_sync(kAllLanes, mine == best)) - 1);
    for (int i = lane; i < words; i += 32) message[i] = group.read(from, i);
  }
  __syncthreads();
}

// s2 of basis token k, whose row of L is the message's y, by one warp: returns 1 / L_kk, or 0 if the token depends on
// the earlier ones.
__device__ inline Wide invert_pivot(const Call& call, const uint32_t* message, int k) {
  const float p_norm_sq = __uint_as_float(message[2]);
  Wide p_resid_sq = p_norm_sq;
  for (int j = 0; j < k; j++) {
    const float l = __uint_as_float(message[3 + j]);
    p_resid_sq = multiply_add(-l, l, p_resid_sq);
  }
  const Wide pivot = p_resid_sq + Wide(call.ridge);
  return pivot > 4 * kUnit * p_norm_sq ? inverse_root(pivot) : Wide(0.0f);
}

// Runs at most `steps` steps; returns the number of basis tokens found. Afterwards the basis, L and inv_diag are in
// shared memory, and y is in the slice.
template <class T, bool kAllResident, class Group>
__device__ inline int s1_s2_steps(const Call& call, const Image& image, const Slice<T>& slice, Group& group,
                                  int steps) {
  unsigned char* shared = shared_memory();
  uint32_t* message = reinterpret_cast<uint32_t*>(shared + call.map.message);
  float* L = reinterpret_cast<float*>(shared + call.map.L);
  Wide* inv_diag = reinterpret_cast<Wide*>(shared + call.map.inv_diag);
  int* basis = reinterpret_cast<int*>(shared + call.map.basis);
  T* shared_p_row = reinterpret_cast<T*>(shared + call.map.p_row);
  const bool fps = call.select == APET_FPS;
  const int thread = threadIdx.x;

  slice_dots<T, true, kAllResident>(call, slice, nullptr, slice.norm_sq);
  __syncthreads();
  const int64_t start = min(call.start, (int64_t)image.tokens - 1);
  Key best = 0;
  for (int i = thread; i < slice.tokens; i += kThreads) {
    const float norm_sq = slice.norm_sq[i];
    const bool finite = norm_sq <= FLT_MAX;  // false for NaN
    call.norm_sq[image.token + slice.first + i] = norm_sq;
    slice.pick_value[i] = !finite ? 0 : fps ? INFINITY : norm_sq;
    // `start` is taken whatever its norm is
    const float value = slice.first + i == start ? INFINITY : weighted(call, image.token + slice.first + i, norm_sq);
    if (finite && value > 0) best = larger(best, pack(value, slice.first + i));
  }

  for (int k = 0; k < steps; k++) {
    find_candidate(call, slice, best, k, message);
    group.publish(message, 3 + k);
    group.sync();
    elect_candidate(group, 3 + k, message);
    // From here on all threads of the group compute with the same candidate.
    if ((message[0] | message[1]) == 0) return k;
    const int p = unpack((Key)message[1] << 32 | message[0]);
    const float p_norm_sq = __uint_as_float(message[2]);
    const T* p_row = slice.x_row(call, p);
    // While the other warps copy the row, one computes the pivot.
    if (thread < 32) {
      const Wide inv_diag_k = invert_pivot(call, message, k);
      if (thread == 0) inv_diag[k] = inv_diag_k, basis[k] = p;
    } else if (call.basis_shared) {
      for (int c = thread - 32; c < chunks_of<T>(call.dim); c += kThreads - 32)
        reinterpret_cast<Chunk<T>*>(shared_p_row)[c] = load_chunk(p_row, c, call.dim, call.whole_in);
    }
    __syncthreads();
    const Wide inv_diag_k = inv_diag[k];
    if (!fps && k > 0 && (float)inv_diag_k == 0) return k;  // p depends on the others
    for (int j = thread; j < k; j += kThreads) L[k * call.basis + j] = __uint_as_float(message[3 + j]);
    if (call.basis_shared) p_row = shared_p_row;
    slice_dots<T, false, kAllResident>(call, slice, p_row, slice.dot);
    __syncthreads();
    best = 0;
    for (int i = thread; i < slice.tokens; i += kThreads) {
      const float dot = slice.dot[i];
      Wide numerator = dot;
      for (int j = 0; j < k; j++)
        numerator = multiply_add(-__uint_as_float(message[3 + j]), slice.y[(int64_t)j * slice.tokens + i], numerator);
      const Wide y = numerator * inv_diag_k;
      slice.y[(int64_t)k * slice.tokens + i] = (float)y;
      float value = slice.pick_value[i];
      if (fps) {
        const float distance = __fadd_rn(__fsub_rn(slice.norm_sq[i], dot), __fsub_rn(p_norm_sq, dot));
        if (distance < value) value = fmaxf(distance, 0);
      } else {
        value = (float)multiply_add(-y, y, Wide(value));
      }
      if (slice.first + i == p) value = 0;
      slice.pick_value[i] = value;
      value = weighted(call, image.token + slice.first + i, value);
      if (value > 0) best = larger(best, pack(value, slice.first + i));
    }
  }
  return steps;
}

// Returns e_sq, or 0 if it is no more than the rounding of M steps.
__device__ __forceinline__ float above_rounding(float e_sq, float norm_sq, int basis) {
  return e_sq > norm_sq * (basis * (4 * kUnit)) ? e_sq : 0;
}

// Returns e_sq = ||x||^2 - ||y||^2 - ridge ||w||^2 of the slice's token i, w = L^-T y (which overwrites y), times the
// token's weight.
template <class T>
__device__ inline float s3_residual(const Call& call, const Image& image, const Slice<T>& slice, int basis_size,
                                    int i) {
  const float* L = reinterpret_cast<const float*>(shared_memory() + call.map.L);
  const Wide* inv_diag = reinterpret_cast<const Wide*>(shared_memory() + call.map.inv_diag);
  const float norm_sq = slice.norm_sq[i];
  if (!(norm_sq <= FLT_MAX)) return INFINITY;
  const int64_t stride = slice.tokens;
  float* y = slice.y + i;
  Wide resid_sq = norm_sq;
  for (int j = 0; j < basis_size; j++) resid_sq = multiply_add(-y[j * stride], y[j * stride], resid_sq);
  if (call.ridge > 0) {
    Wide w_sq = 0.0f;
    for (int j = basis_size - 1; j >= 0; j--) {
      Wide w = y[j * stride];
      for (int k = j + 1; k < basis_size; k++) w = multiply_add(-L[k * call.basis + j], y[k * stride], w);
      w = w * inv_diag[j];
      y[j * stride] = (float)w;
      w_sq = multiply_add(w, w, w_sq);
    }
    resid_sq = multiply_add(Wide(-call.ridge), w_sq, resid_sq);
  }
  return weighted(call, image.token + slice.first + i, above_rounding((float)resid_sq, norm_sq, image.basis));
}

// s1 to s3 of an image; returns the number of basis tokens. Writes norm_sq and, for s4, rank (for the op `score`, the
// residuals themselves).
template <class T, bool kAllResident, class Group>
__device__ inline int s1_s3_sweep(const Call& call, const Image& image, const Slice<T>& slice, Group& group, int s) {
  const bool scores = call.op == APET_SCORE;
  // If all tokens stay, or none, the basis is needed only if it is appended.
  const bool needs_basis =
      scores || (call.op == APET_COMPRESS && (call.appended > 0 || (image.keep > 0 && image.keep < image.tokens)));
  load_resident_rows(call, slice);
  __syncthreads();
  const int basis_size = s1_s2_steps<T, kAllResident>(call, image, slice, group, needs_basis ? image.basis : 0);
  const int* basis = reinterpret_cast<const int*>(shared_memory() + call.map.basis);
  for (int i = threadIdx.x; i < slice.tokens; i += kThreads) {
    const float e_sq = s3_residual(call, image, slice, basis_size, i);
    const int64_t token = image.token + slice.first + i;
    if (scores) call.tensors.residual[token] = e_sq;
    else call.rank[token] = __float_as_uint(e_sq) + 1;
  }
  __syncthreads();
  if (scores) {
    if (group.cta == 0)
      for (int j = threadIdx.x; j < call.basis; j += kThreads)
        call.tensors.basis_indices[(int64_t)s * call.basis + j] = j < basis_size ? basis[j] : -1;
  } else if (call.op == APET_COMPRESS && call.layout == APET_INPLACE) {
    for (int j = threadIdx.x; j < basis_size; j += kThreads)  // the first K basis tokens are kept before all others
      if (basis[j] >= slice.first && basis[j] < slice.first + slice.tokens)
        call.rank[image.token + basis[j]] = j < image.keep ? kHighest : 0;
  }
  return basis_size;
}

}  // namespace apet::cuda
