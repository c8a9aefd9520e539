// s1 in rounds: the candidates of a round, their residual Gram matrix, and the picks among them.
//
//   pool  = the 2 b unpicked tokens of largest resid_sq, ascending       one CTA: the radix selection of s4
//   gram  = X_pool X_pool^T - Y_pool^T Y_pool                            the group: tiles of product.cuh
//   picks = b steps of its pivoted Cholesky factorisation                one CTA: a thread per candidate
//   gram -= products of the last 32 picks, if more follow                the group
//
// Between the steps rank holds what the pool is selected by: the bits of resid_sq times the weight, or 0 for a token that must not be
// picked. Such a token is never a candidate again, since resid_sq only falls.
#pragma once
#include "product.cuh"
#include "s4_topk.cuh"

namespace apet::cuda {

// The tile of s1_s4_rounds and s4_medoids, for their 12 warps: 48 x 64. Slices and pools are small, and with 96 rows these
// kernels, which hold products of tokens and of y at once, would spill on sm_120.
using GroupTile = Tile<3, 4, 1, 2>;

// The arrays of a group for the rounds of one image, and their sizes. In shared memory, as Work is.
struct Rounds {
  int most;           // picks of a round of the call, at most: lengths of rows
  int columns;        // of y, of a round of this image
  int32_t* pool;      // [kPool most]
  Wide* gram;         // [kPool most][kPool most]
  float* pool_y;      // [most][kPool most]
  Wide* diag;         // [kPool most]
  float* L;           // [most][most] by column: row q has the entries of column q
  Wide* inv_diag;     // [most]
  int32_t* picks;     // [kRounds most]
  int32_t* progress;  // [2]
  float* y;           // [tokens][y_width(most)] of this image

  __device__ Rounds(const Call& call, const Image& image, int64_t group)
      : most(call.most),
        columns(round_columns(most_picks(image.basis))),
        pool(call.pool + group * kPool * most),
        gram(reinterpret_cast<Wide*>(call.gram) + group * kPool * most * kPool * most),
        pool_y(call.pool_y + group * most * kPool * most),
        diag(reinterpret_cast<Wide*>(call.diag) + group * kPool * most),
        L(call.L + group * most * most),
        inv_diag(reinterpret_cast<Wide*>(call.inv_diag) + group * most),
        picks(call.picks + group * kRounds * most),
        progress(call.progress + 2 * group),
        y(call.y + image.token * y_width(most)) {}
};
constexpr int kRoundsBytes = 96;

// A pick reads the picks before it since gram was last updated, so at most as many. An entry of gram has the same sum in
// the same order, whatever their number.
constexpr int kGramPicks = 32;

// Returns the position of the token that is picked first, or -1.
__device__ __forceinline__ int first_pick(const Call& call, const Image& image, float norm_sq_of_start) {
  return call.start >= 0 && norm_sq_of_start <= FLT_MAX ? (int)min(call.start, (int64_t)image.tokens - 1) : -1;
}

// Lists the pool: `wanted` tokens of largest rank, ties to the lower position, or as many as have a rank. One CTA.
__device__ inline void list_pool(const Call& call, const Image& image, const Rounds& rounds, int wanted) {
  int* scan = reinterpret_cast<int*>(shared_memory() + call.map.scan);
  const Ranks rank(call, image);
  Cut cut[1];
  find_cuts<1>(rank, {wanted}, scan, cut);
  const auto taken_of = [&](int i) {
    const uint32_t i_rank = rank[i];
    return Flags<1>{i_rank > 0 && cut[0].selects(i_rank, i)};
  };
  int lower[1], number[1];
  count_lower(rank.own, scan, lower, taken_of);
  for (int k = 0; k < rank.own.count; k += 32) {
    const int own = k + threadIdx.x % 32, i = rank.own.begin + own;
    const Flags<1> taken = own < rank.own.count ? taken_of(i) : Flags<1>{};
    number_flags(taken, lower, number);
    if (taken.is[0]) rounds.pool[number[0]] = i;
  }
  if (threadIdx.x == kThreads - 1) rounds.progress[0] = lower[0];  // of all warps
}

// Computes a tile of x_i.x_j - y_i.y_j, y of the first `earlier` columns, for tokens row_of(r), r < rows, and
// column_of(t), t < columns, of the image; passes each value to store(r, t, value).
template <class T, class RowOf, class ColumnOf, class Store>
__device__ inline void residual_products(const Call& call, const Image& image, const Rounds& rounds, int earlier,
                                         int rows, int columns, RowOf row_of, ColumnOf column_of, Store store) {
  using Tl = GroupTile;
  unsigned char* buffers = shared_memory() + call.map.s5;
  int* row = reinterpret_cast<int*>(buffers + Tl::kBufferBytes<false>);  // positions; -1: none
  int* column = row + Tl::kRows;
  rows = min(rows, Tl::kRows), columns = min(columns, Tl::kColumns);
  __syncthreads();  // all threads have finished the previous tile, which used the same lists
  for (int r = threadIdx.x; r < Tl::kRows; r += kThreads) row[r] = r < rows ? row_of(r) : -1;
  for (int t = threadIdx.x; t < Tl::kColumns; t += kThreads) column[t] = t < columns ? column_of(t) : -1;
  const Matrix<T> x = {static_cast<const T*>(call.tensors.x) + image.base, call.stride_xn, call.dim,
                       (bool)call.whole_in};
  const Matrix<float> y = {rounds.y, y_width(rounds.most), earlier, true};
  float product[Tl::kFragM][Tl::kFragN][4], y_product[Tl::kFragM][Tl::kFragN][4];
  multiply_rows<T, Tl>(x, row, rows, column, columns, Copied{}, buffers, product);
  if (!multiply_rows<float, Tl>(y, row, rows, column, columns, Copied{}, buffers, y_product)) return;
#pragma unroll
  for (int i = 0; i < Tl::kFragM; i++)
#pragma unroll
    for (int j = 0; j < Tl::kFragN; j++)
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const int r = product_row<Tl>(i, c / 2), t = product_column<Tl>(j, c % 2);
        if (r < rows && t < columns) store(r, t, __fsub_rn(product[i][j][c], y_product[i][j][c]));
      }
}

// Computes the residual Gram matrix of the pool, by all CTAs of the group. earlier: columns of y of the rounds before.
template <class T>
__device__ inline void pool_gram(const Call& call, const Image& image, const Rounds& rounds, int count, int earlier,
                                 int cta, int ctas) {
  const int across = (count + GroupTile::kColumns - 1) / GroupTile::kColumns;
  const int tiles = (count + GroupTile::kRows - 1) / GroupTile::kRows * across;
  for (int tile = cta; tile < tiles; tile += ctas) {
    const int r0 = tile / across * GroupTile::kRows, t0 = tile % across * GroupTile::kColumns;
    residual_products<T>(
        call, image, rounds, earlier, count - r0, count - t0, [&](int r) { return __ldcg(rounds.pool + r0 + r); },
        [&](int t) { return __ldcg(rounds.pool + t0 + t); },
        [&](int r, int t, float value) { rounds.gram[(int64_t)(r0 + r) * kPool * rounds.most + t0 + t] = value; });
  }
}

// Makes picks [made, end) of a round among the pool of `count` candidates, and gives them rank 0: pivoted Cholesky
// factorisation of gram, from which the products of the picks before `made` are subtracted. It ends at a candidate that
// depends on the picks, except for `first`, which is picked first if it is a position. begin: picks of the rounds
// before. One CTA.
__device__ inline void make_picks(const Call& call, const Image& image, const Rounds& rounds, int count, int begin,
                                  int made, int end, int first) {
  Key* warp_best = reinterpret_cast<Key*>(shared_memory() + call.map.warp_best);
  const int thread = threadIdx.x;
  const int64_t width = (int64_t)kPool * rounds.most;
  if (made == 0)
    for (int i = thread; i < count; i += kThreads) rounds.diag[i] = load_l2(rounds.gram + i * width + i);
  int k = made;
  for (; k < end; k++) {
    Key best = 0;
    for (int i = thread; i < count; i += kThreads) {
      const int candidate = __ldcg(rounds.pool + i);
      const bool is_first = k == 0 && candidate == first;
      const float value = is_first ? INFINITY : weighted(call, image.token + candidate, (float)rounds.diag[i]);
      if (value > 0) best = larger(best, pack(value, i));
    }
    best = warp_largest(best);
    if (thread % 32 == 0) warp_best[thread / 32] = best;
    __syncthreads();  // the best of each warp, and pool_y of all picks so far, are written
    best = warp_largest(thread % 32 < kWarps ? warp_best[thread % 32] : 0);
    if (best == 0) break;
    const int p = unpack(best), token = __ldcg(rounds.pool + p);
    const float p_norm_sq = __ldcg(call.norm_sq + image.token + token);
    const Wide pivot = rounds.diag[p] + Wide(call.ridge);
    const bool independent = pivot > 4 * kUnit * max(begin, 1) * p_norm_sq;
    if (!independent && !(k == 0 && token == first)) break;
    const Wide inv_diag = independent ? inverse_root(pivot) : Wide(0.0f);
    __syncthreads();  // all threads have read the diagonal and the best of the warps
    for (int j = thread; j < k; j += kThreads) rounds.L[(int64_t)j * rounds.most + k] = rounds.pool_y[j * width + p];
    for (int i = thread; i < count; i += kThreads) {
      Wide numerator = load_l2(rounds.gram + p * width + i);
#pragma unroll 4
      for (int j = made; j < k; j++)
        numerator = multiply_add(-rounds.pool_y[j * width + p], rounds.pool_y[j * width + i], numerator);
      const Wide y = numerator * inv_diag;
      rounds.pool_y[k * width + i] = (float)y;
      rounds.diag[i] = i == p ? Wide(-1.0f) : multiply_add(-y, y, rounds.diag[i]);
    }
    if (thread == 0) {
      rounds.inv_diag[k] = inv_diag;
      rounds.picks[begin + k] = token;
      call.rank[image.token + token] = 0;
    }
  }
  if (thread == 0) rounds.progress[1] = k;
}

// Subtracts from gram the products of picks [made, made + kGramPicks) of the round, by all CTAs of the group. A warp takes
// kRows rows of 32 columns at once.
__device__ inline void update_gram(const Rounds& rounds, int count, int made, int cta, int ctas) {
  const int64_t width = (int64_t)kPool * rounds.most;
  const float* pool_y = rounds.pool_y + made * width;
  const int across = (count + 31) / 32, parts = (count + kRows - 1) / kRows * across;
  for (int part = cta * kWarps + threadIdx.x / 32; part < parts; part += ctas * kWarps) {
    const int p0 = part / across * kRows, i = part % across * 32 + threadIdx.x % 32;
    if (i >= count) continue;
    // Past the last row it is taken again, and not written.
    int p[kRows];
    Wide value[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      p[r] = min(p0 + r, count - 1);
      value[r] = load_l2(rounds.gram + p[r] * width + i);
    }
#pragma unroll 4
    for (int j = 0; j < kGramPicks; j++) {
      const float y = __ldcg(pool_y + j * width + i);
#pragma unroll
      for (int r = 0; r < kRows; r++) value[r] = multiply_add(-__ldcg(pool_y + j * width + p[r]), y, value[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; r++)
      if (p0 + r < count) rounds.gram[p[r] * width + i] = value[r];
  }
}

}  // namespace apet::cuda
