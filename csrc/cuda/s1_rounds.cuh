// s1 in rounds: updates every token with the picks of a round. A CTA has the tokens of its slice.
//
//   z        = X_picks X^T - Y_picks^T Y          tiles of product.cuh; stored where y will be
//   y        = L^-1 z                             forward substitution: a warp takes 4 tokens, a lane a pick
//   resid_sq = resid_sq - sum y^2
//
// Products are bitwise those of s5_assign, so a copy of a pick has the products of the pick. y is stored as float32, in
// rows, which the next round multiplies; everything else of a token is Wide.
#pragma once
#include "s1_pool.cuh"

namespace apet::cuda {

// Replaces z of the slice's tokens by y, in columns from `column` on, and reduces pick_value. Its order of sums depends
// on the number of picks alone.
template <class T>
__device__ inline void substitute(const Call& call, const Image& image, const Slice<T>& slice, const Rounds& rounds,
                                  int size, int column) {
  const int lane = threadIdx.x % 32;
  for (int i0 = threadIdx.x / 32 * kRows; i0 < slice.tokens; i0 += kWarps * kRows) {
    // change: of resid_sq. Past the end of the slice its last token is taken again, and not written.
    float* y[kRows];
    Wide change[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      y[r] = rounds.y + (slice.first + min(i0 + r, slice.tokens - 1)) * y_width(rounds.most) + column;
      change[r] = 0.0f;
    }
    for (int j0 = 0; j0 < rounds.columns; j0 += 32) {
      const int j = j0 + lane;
      const bool inside = j < size;
      const float* L = rounds.L + min(j, size - 1);  // of this lane's pick, [earlier picks][most]
      Wide value[kRows];
#pragma unroll
      for (int r = 0; r < kRows; r++) value[r] = inside ? y[r][j] : 0.0f;
      for (int q0 = 0; q0 < j0; q0 += 32) {  // picks of the blocks before, whose y this lane has written
        float y_q[kRows];
#pragma unroll
        for (int r = 0; r < kRows; r++) y_q[r] = y[r][q0 + lane];
#pragma unroll 4
        for (int q = 0; q < 32; q++) {
          const float l = inside ? __ldcg(L + (int64_t)(q0 + q) * rounds.most) : 0;
#pragma unroll
          for (int r = 0; r < kRows; r++) value[r] = multiply_add(-l, __shfl_sync(kAllLanes, y_q[r], q), value[r]);
        }
      }
      const Wide inv_diag = inside ? load_l2(rounds.inv_diag + j) : Wide(0.0f);
      for (int q = 0; q < min(32, size - j0); q++) {  // lane q is complete
        const float l = inside && lane > q ? __ldcg(L + (int64_t)(j0 + q) * rounds.most) : 0;
#pragma unroll
        for (int r = 0; r < kRows; r++)
          value[r] = multiply_add(-l, __shfl_sync(kAllLanes, (float)(value[r] * inv_diag), q), value[r]);
      }
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const Wide y_j = value[r] * inv_diag;
        change[r] = multiply_add(-y_j, y_j, change[r]);
        if (i0 + r < slice.tokens && j < rounds.columns) y[r][j] = (float)y_j;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      for (int step = 16; step; step >>= 1) change[r] = change[r] + shuffle_xor(change[r], step);
      const int i = i0 + r;
      if (lane == r && i < slice.tokens) {
        const float resid_sq = (float)(Wide(slice.pick_value[i]) + change[r]);
        uint32_t* rank = call.rank + image.token + slice.first + i;
        slice.pick_value[i] = resid_sq;
        const float value = weighted(call, image.token + slice.first + i, resid_sq);
        *rank = __ldcg(rank) > 0 && value > 0 ? __float_as_uint(value) : 0;
      }
    }
  }
}

// Updates the slice with picks [begin, begin + size), whose y has the columns from `column` on.
template <class T>
__device__ inline void update_slice(const Call& call, const Image& image, const Slice<T>& slice, const Rounds& rounds,
                                    int begin, int size, int column) {
  for (int r0 = 0; r0 < slice.tokens; r0 += GroupTile::kRows)
    for (int t0 = 0; t0 < size; t0 += GroupTile::kColumns)
      residual_products<T>(
          call, image, rounds, column, slice.tokens - r0, size - t0, [&](int r) { return slice.first + r0 + r; },
          [&](int t) { return __ldcg(rounds.picks + begin + t0 + t); },
          [&](int r, int t, float value) {
            rounds.y[(slice.first + r0 + r) * y_width(rounds.most) + column + t0 + t] = value;
          });
  __syncthreads();  // z of the slice is written
  substitute(call, image, slice, rounds, size, column);
}

// s1 to s3 of an image whose basis is picked in rounds. Writes norm_sq and, for s4, rank.
template <class T, class Group>
__device__ inline void s1_rounds(const Call& call, const Image& image, const Slice<T>& slice, Group& group) {
  static_assert(sizeof(Rounds) <= kRoundsBytes);
  Rounds& rounds = *reinterpret_cast<Rounds*>(shared_memory() + call.map.rounds);
  if (threadIdx.x == 0) rounds = Rounds(call, image, group.first);
  slice_dots<T, true, false>(call, slice, nullptr, slice.norm_sq);
  __syncthreads();
  uint32_t* rank = call.rank + image.token + slice.first;
  for (int i = threadIdx.x; i < slice.tokens; i += kThreads) {
    const float norm_sq = slice.norm_sq[i];
    const bool finite = norm_sq <= FLT_MAX;
    call.norm_sq[image.token + slice.first + i] = norm_sq;
    slice.pick_value[i] = norm_sq;
    const float value = weighted(call, image.token + slice.first + i, norm_sq);
    rank[i] = !finite ? 0 : slice.first + i == first_pick(call, image, norm_sq) ? kHighest : __float_as_uint(value);
  }
  int begin = 0;
  for (int t = 0; t < kRounds; t++) {
    const int64_t basis = image.basis;
    const int wanted = (int)((t + 1) * basis / kRounds - t * basis / kRounds), column = t * rounds.columns;
    group.sync();  // the ranks of the whole image are written
    if (group.cta == 0) list_pool(call, image, rounds, kPool * wanted);
    group.sync();  // the pool is listed
    const int count = __ldcg(rounds.progress);
    if (count == 0) break;
    pool_gram<T>(call, image, rounds, count, column, group.cta, group.size);
    group.sync();  // its residual Gram matrix is written
    int size = 0;
    while (true) {
      const int end = min(size + kGramPicks, wanted);
      if (group.cta == 0) {
        const int64_t start = min(max(call.start, (int64_t)0), (int64_t)image.tokens - 1);
        const float norm_sq = __ldcg(call.norm_sq + image.token + start);
        make_picks(call, image, rounds, count, begin, size, end, t == 0 ? first_pick(call, image, norm_sq) : -1);
      }
      group.sync();  // the picks are made
      size = __ldcg(rounds.progress + 1);
      if (size < end || end == wanted) break;
      update_gram(rounds, count, size - kGramPicks, group.cta, group.size);
      group.sync();  // the products of the picks are subtracted from gram
    }
    if (size == 0) break;  // the pool of another round would be the same
    update_slice(call, image, slice, rounds, begin, size, column);
    begin += size;
  }
  __syncthreads();  // pick_value of the slice is written
  for (int i = threadIdx.x; i < slice.tokens; i += kThreads) {
    const float norm_sq = slice.norm_sq[i];
    const float above = above_rounding(slice.pick_value[i], norm_sq, image.basis);
    const float e_sq = norm_sq <= FLT_MAX ? weighted(call, image.token + slice.first + i, above) : INFINITY;
    rank[i] = __float_as_uint(e_sq) + 1;
  }
  __syncthreads();
  for (int j = threadIdx.x; j < begin; j += kThreads) {
    const int i = __ldcg(rounds.picks + j) - slice.first;
    if (i >= 0 && i < slice.tokens) rank[i] = kHighest;
  }
}

}  // namespace apet::cuda
