// s5, first half: the merge target of every dropped token, arg max_t x.t / ||t|| (the length of x changes no arg-max).
//
// similarity [dropped, T] is a matrix product that is never stored. A thread keeps MR rows x one panel of NR targets in
// registers, and a running arg-max per row:
//
//                 panel 0          panel 1       ...   last panel
//              +---- NR ----+  +---- NR ----+       +- its vectors -+
//   packed     | k = 0      |  | k = 0      |       | k = 0         |     k counts units of 32 bits:
//              | k = 1 ...  |  | k = 1 ...  |       | k = 1 ...     |     a float, or two bfloat16
//              +------------+  +------------+       +---------------+
//   MR rows ->   sums over k     of a chunk of 96 dropped tokens, against all panels
//
// AVX-512: 6 x 64 = 24 sums + 4 panel vectors + 1 row value = 29 of 32 registers; AVX2: 6 x 16 = 12 + 2 + 1 of 16. A last
// panel of one vector takes twice the rows: six sums would wait for each other. k runs in blocks of 1024 units, so that
// a panel's block (256 KB) and the chunk's rows stay in L2; the blocks' sums are added up in `tile`.
//
// One instruction multiplies and adds a unit. Rows of other types are widened into scratch first. Each sum runs over k
// in order and D alone decides its blocks: neither chunk, panel nor place in them changes a bit. Targets stay
// unnormalised; the arg-max multiplies by 1 / ||t|| in float32.
//
// Included by loops.h alone, inside the namespace of its instruction set.
#pragma once
#include "dot.h"

#if defined(__AVX512F__)
constexpr int MR = 6, NV = 4;
#elif defined(__AVX2__)
constexpr int MR = 6, NV = 2;
#else
constexpr int MR = 4, NV = 2;
#endif
constexpr int NR = NV * W;
constexpr int rows_of(int vectors) { return vectors == 1 ? 2 * MR : MR; }
constexpr int64_t kBlockUnits = 1024;
// Widened rows per thread: at most this much, so that they stay in L2 too.
constexpr int64_t kWidenedBytes = 512 << 10;

template <class E>
static inline int64_t units(int64_t dim) {
  return (dim * W + E::N - 1) / E::N;  // E::N elements make W units
}
template <class E>
static inline int64_t chunk_rows(int64_t dim) {
  if (E::kInPlace) return kChunkRows;
  const int64_t fit = kWidenedBytes / 4 / dim / MR * MR;
  return fit < MR ? MR : smaller(fit, kChunkRows);
}
static inline int64_t padded(int64_t targets) { return (targets + W - 1) / W * W; }

// Where the panel of targets t0, t0 + 1, ... is. The result is not written before the means, so whole panels are kept
// there from its first cache line on, as far as they fit, and the others in the workspace.
template <class E>
static inline float* panel_at(const Input& in, const Rows& rows, const Merge& merge, int64_t t0) {
  const int64_t n = units<E>(in.dim), before = -(uintptr_t)rows.out % 64;
  const int64_t bytes = (int64_t)sizeof(typename E::T) * rows.count * in.dim - before;
  const int64_t room = bytes < 0 ? 0 : bytes / 4 / n;
  const int64_t fit = room >= padded(merge.target_count) ? padded(merge.target_count) : room / NR * NR;
  return t0 < fit ? reinterpret_cast<float*>(rows.out + before) + t0 * n : merge.packed + (t0 - fit) * n;
}
// Floats of the workspace that panel_at() may use for up to `targets` targets. The result has a row for each, which
// holds its packed form except for the difference in width; a cache line, a panel and the last vector are lost.
template <class E>
static size_t packed_floats(int64_t targets, int64_t dim) {
  const int64_t half_units = 2 * units<E>(dim), wider = half_units - dim * (int64_t)sizeof(typename E::T) / 2;
  const int64_t outside = (targets * wider + 32 + half_units - 1) / half_units + NR + W;
  return (size_t)(smaller(outside, padded(targets)) * units<E>(dim));
}
template <class E>
static size_t scratch_bytes(int64_t dim) {
  return E::kInPlace ? 0 : (size_t)(chunk_rows<E>(dim) * dim) * 4;
}

// Features [d0, d1) of one panel; d0 is a multiple of kColumns, and so of E::N.
template <class E>
static void pack(const Input& in, const Rows& rows, Merge& merge, int64_t panel, int64_t d0, int64_t d1) {
  using T = typename E::T;
  constexpr int64_t kPerUnit = E::N / W;
  const int64_t width = smaller(NR, padded(merge.target_count) - panel * NR);
  float* out = panel_at<E>(in, rows, merge, panel * NR);
  for (int64_t v = 0; v < width; v += W) {
    const T* t[W];
    for (int i = 0; i < W; i++) {
      const int64_t target = panel * NR + v + i;
      t[i] = target < merge.target_count ? row<T>(in, rows.row_token[merge.target_row[target]]) : nullptr;
    }
    for (int64_t d = d0; d < d1; d += E::N) {
      const int64_t n = smaller(E::N, d1 - d), k = d / kPerUnit;
      V block[W];
      for (int i = 0; i < W; i++) block[i] = !t[i] ? V{} : n == E::N ? E::get(t[i] + d) : E::get_n(t[i] + d, n);
      transpose(block);
      for (int64_t i = 0; i < (n + kPerUnit - 1) / kPerUnit; i++) store(out + (k + i) * width + v, block[i]);
    }
  }
}

// tile [R, NR] (+)= rows [R] x panel over `count` units. Rows are bytes: 16-bit ones need not be 4-byte aligned.
template <class E, int Vectors>
static inline void multiply(const char* const* rows, const float* panel, int64_t count, float* tile, bool first) {
  constexpr int R = rows_of(Vectors);
  V acc[R][Vectors] = {};
  for (int64_t k = 0; k < count; k++) {
    V b[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; v++) b[v] = load(panel + (k * Vectors + v) * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      float unit;
      __builtin_memcpy(&unit, rows[r] + 4 * k, 4);
      const V a = splat(unit);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; v++) acc[r][v] = E::mad(a, b[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; v++) {
      float* t = tile + r * NR + v * W;
      store(t, first ? acc[r][v] : load(t) + acc[r][v]);
    }
}

// The rows of up to kChunkRows dropped tokens, as units, and their best targets so far, lane by lane.
struct Chunk {
  int64_t count;
  const char* rows[kChunkRows];
  float last[kChunkRows];  // of odd D: the last bfloat16 and a zero
  V similarity[kChunkRows];
  I target[kChunkRows];
  float tile[kChunkRows * NR];
  static_assert(kChunkRows % (2 * MR) == 0, "the tile has room for the last, incomplete rows of a chunk");
};

// Multiplies the chunk by one panel of `Vectors` vectors, whose first target is t0, and updates its best targets.
template <class E, int Vectors>
static void assign_panel(const Input& in, const Merge& merge, Chunk& chunk, const float* panel, int64_t t0) {
  constexpr int R = rows_of(Vectors);
  const int64_t whole = in.dim / (E::N / W);  // units that are complete in a row
  const char* a[R];
  for (int64_t k = 0; k < whole; k += kBlockUnits)
    for (int64_t i = 0; i < chunk.count; i += R) {
      for (int r = 0; r < R; r++) a[r] = chunk.rows[smaller(i + r, chunk.count - 1)] + 4 * k;
      multiply<E, Vectors>(a, panel + k * Vectors * W, smaller(kBlockUnits, whole - k), chunk.tile + i * NR, k == 0);
    }
  if (units<E>(in.dim) > whole)
    for (int64_t i = 0; i < chunk.count; i += R) {
      for (int r = 0; r < R; r++) a[r] = reinterpret_cast<const char*>(chunk.last + smaller(i + r, chunk.count - 1));
      multiply<E, Vectors>(a, panel + whole * Vectors * W, 1, chunk.tile + i * NR, whole == 0);
    }
  I lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  for (int64_t i = 0; i < chunk.count; i++)
    for (int v = 0; v < Vectors; v++) {
      const V dot = load(chunk.tile + i * NR + v * W);
      const V similarity = dot * load(merge.inv_norm + t0 + v * W) + load(merge.padding + t0 + v * W);
      const I wins = similarity > chunk.similarity[i];  // a tie stays with the lower target
      chunk.similarity[i] = wins ? similarity : chunk.similarity[i];
      chunk.target[i] = wins ? lane + (int32_t)(t0 + v * W) : chunk.target[i];
    }
}

template <class E>
static void assign(const Input& in, const Rows& rows, Merge& merge, int64_t begin, int64_t end, void* scratch) {
  using T = typename E::T;
  const int64_t step = chunk_rows<E>(in.dim), targets = padded(merge.target_count);
  Chunk chunk;
  for (int64_t i0 = begin; i0 < end; i0 += step) {
    chunk.count = smaller(step, end - i0);
    for (int64_t i = 0; i < chunk.count; i++) {
      const T* x = row<T>(in, merge.dropped[i0 + i]);
      chunk.rows[i] = reinterpret_cast<const char*>(x);
      if (E::N > W && in.dim % 2) {
        chunk.last[i] = 0;
        __builtin_memcpy(chunk.last + i, x + in.dim - 1, sizeof(T));
      }
      if (!E::kInPlace) {
        float* wide = static_cast<float*>(scratch) + i * in.dim;
        int64_t d = 0;
        for (; d + W <= in.dim; d += W) store(wide + d, load(x + d));
        if (d < in.dim) store_n(wide + d, load_n(x + d, in.dim - d), in.dim - d);
        chunk.rows[i] = reinterpret_cast<const char*>(wide);
      }
      chunk.similarity[i] = splat(-__builtin_inff());
      chunk.target[i] = I{};
    }
    for (int64_t t0 = 0; t0 < targets; t0 += NR) {
      const float* panel = panel_at<E>(in, rows, merge, t0);
      switch (smaller(NR, targets - t0) / W) {
#if defined(__AVX512F__)
        case 4: assign_panel<E, 4>(in, merge, chunk, panel, t0); break;
        case 3: assign_panel<E, 3>(in, merge, chunk, panel, t0); break;
#endif
        case 2: assign_panel<E, 2>(in, merge, chunk, panel, t0); break;
        case 1: assign_panel<E, 1>(in, merge, chunk, panel, t0); break;
      }
    }
    for (int64_t i = 0; i < chunk.count; i++) {
      float best = chunk.similarity[i][0];
      int32_t target = chunk.target[i][0];
      for (int l = 1; l < W; l++) {
        const float value = chunk.similarity[i][l];
        const int32_t other = chunk.target[i][l];
        if (value > best || (value == best && other < target)) best = value, target = other;
      }
      merge.target[i0 + i] = target;
    }
  }
}
