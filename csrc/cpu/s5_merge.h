// s5: every dropped token to its nearest target, then the means.
//
// Similarity [dropped, targets] is a matrix product that is never stored: a thread holds MR rows x one panel of NR
// targets in registers (AVX-512: 6 x 64 = 24 sums + 4 panel vectors + 1 row value = 29 of 32; AVX2: 6 x 16 = 12 + 2 + 1
// of 16), and a running arg-max in the epilogue. A last panel of one vector takes twice the rows: six sums would wait
// for each other.
//
//   packed   panel 0: [k][NR]  panel 1: [k][NR] ...  last panel: [k][its vectors]     k counts 32-bit units
//   chunk    96 dropped rows x all panels; within it k-blocks of 1024 units, so that a panel's block (256 KB) and the
//            chunk's rows stay in L2; the block's sums are added up in `tile`
//
// A unit is a float, or two bfloat16 that one instruction multiplies and adds. Rows of other types are widened into
// scratch first. Each sum runs over k in order and D alone decides its blocks: neither chunk, panel nor place in them
// changes a bit. Targets stay unnormalised; the arg-max needs 1 / ||t|| only, applied in float32 afterwards.
#pragma once
#include "s1_s3_sweep.h"

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
// Widened rows a thread holds: at most this much, so that they too stay in L2.
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

// Where the panel of targets t0, t0 + 1, ... lies: in `out`, which nobody needs before the means, as far as whole
// panels fit from its first cache line on; the others in the workspace.
template <class E>
static inline float* panel_at(const Image& im, int64_t t0) {
  const int64_t n = units<E>(im.dim), before = -(uintptr_t)im.out % 64;
  const int64_t bytes = im.rows * im.dim * (int64_t)sizeof(typename E::T) - before;
  const int64_t room = bytes < 0 ? 0 : bytes / 4 / n;
  const int64_t fit = room >= padded(im.targets) ? padded(im.targets) : room / NR * NR;
  return t0 < fit ? reinterpret_cast<float*>(im.out + before) + t0 * n : im.packed + (t0 - fit) * n;
}
// What panel_at() may want of the workspace with up to `targets` of them: `out` has a row for each, which holds all of
// it but for a difference in width; lost are a cache line, a panel and the last vector.
template <class E>
static size_t packed_floats(int64_t targets, int64_t dim) {
  const int64_t half_units = 2 * units<E>(dim), wider = half_units - dim * (int64_t)sizeof(typename E::T) / 2;
  const int64_t left = (targets * wider + 32 + half_units - 1) / half_units + NR + W;
  return (size_t)(smaller(left, padded(targets)) * units<E>(dim));
}
template <class E>
static size_t scratch_bytes(int64_t dim) {
  return E::kInPlace ? 0 : (size_t)(chunk_rows<E>(dim) * dim) * 4;
}

// Features [d0, d1) of one panel; d0 is a multiple of kColumns, and so of E::N.
template <class E>
static void pack(const Image& im, int64_t panel, int64_t d0, int64_t d1) {
  using T = typename E::T;
  constexpr int64_t kPerUnit = E::N / W;
  const int64_t width = smaller(NR, padded(im.targets) - panel * NR);
  float* out = panel_at<E>(im, panel * NR);
  for (int64_t v = 0; v < width; v += W) {
    const T* t[W];
    for (int i = 0; i < W; i++) {
      const int64_t target = panel * NR + v + i;
      t[i] = target < im.targets ? row<T>(im, im.row_token[im.target_row[target]]) : nullptr;
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

// tile[R][NR] (+)= rows [R] x panel over `count` units. Rows are bytes: 16-bit ones need not be 4-byte aligned.
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

// Dropped rows of one chunk, as units, with what each has found so far (lane by lane).
struct Chunk {
  int64_t count;
  const char* rows[kChunkRows];
  float last[kChunkRows];  // the unit that an odd last bfloat16 makes with zero
  V best[kChunkRows];
  I best_target[kChunkRows];
  float tile[kChunkRows * NR];
  static_assert(kChunkRows % (2 * MR) == 0, "the last rows of a chunk must have a place in tile");
};

// One panel of `Vectors` vectors, its first target being `t0`, against the chunk.
template <class E, int Vectors>
static void meet(const Image& im, Chunk& chunk, const float* panel, int64_t t0) {
  constexpr int R = rows_of(Vectors);
  const int64_t whole = im.dim / (E::N / W);  // units that lie complete in a row
  const char* a[R];
  for (int64_t k = 0; k < whole; k += kBlockUnits)
    for (int64_t i = 0; i < chunk.count; i += R) {
      for (int r = 0; r < R; r++) a[r] = chunk.rows[smaller(i + r, chunk.count - 1)] + 4 * k;
      multiply<E, Vectors>(a, panel + k * Vectors * W, smaller(kBlockUnits, whole - k), chunk.tile + i * NR, k == 0);
    }
  if (units<E>(im.dim) > whole)
    for (int64_t i = 0; i < chunk.count; i += R) {
      for (int r = 0; r < R; r++) a[r] = reinterpret_cast<const char*>(chunk.last + smaller(i + r, chunk.count - 1));
      multiply<E, Vectors>(a, panel + whole * Vectors * W, 1, chunk.tile + i * NR, whole == 0);
    }
  I lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  for (int64_t i = 0; i < chunk.count; i++)
    for (int v = 0; v < Vectors; v++) {
      const V dot = load(chunk.tile + i * NR + v * W);
      const V similarity = dot * load(im.inv_norm + t0 + v * W) + load(im.out_of_range + t0 + v * W);
      const I wins = similarity > chunk.best[i];  // strictly: a tie stays with the lower target
      chunk.best[i] = wins ? similarity : chunk.best[i];
      chunk.best_target[i] = wins ? lane + (int32_t)(t0 + v * W) : chunk.best_target[i];
    }
}

template <class E>
static void assign(const Image& im, int64_t begin, int64_t end, void* scratch) {
  using T = typename E::T;
  const int64_t step = chunk_rows<E>(im.dim), n_targets = padded(im.targets);
  Chunk chunk;
  for (int64_t i0 = begin; i0 < end; i0 += step) {
    chunk.count = smaller(step, end - i0);
    for (int64_t i = 0; i < chunk.count; i++) {
      const T* x = row<T>(im, im.dropped[i0 + i]);
      chunk.rows[i] = reinterpret_cast<const char*>(x);
      if (E::N > W && im.dim % 2) {
        chunk.last[i] = 0;
        __builtin_memcpy(chunk.last + i, x + im.dim - 1, sizeof(T));
      }
      if (!E::kInPlace) {
        float* wide = static_cast<float*>(scratch) + i * im.dim;
        int64_t d = 0;
        for (; d + W <= im.dim; d += W) store(wide + d, load(x + d));
        if (d < im.dim) store_n(wide + d, load_n(x + d, im.dim - d), im.dim - d);
        chunk.rows[i] = reinterpret_cast<const char*>(wide);
      }
      chunk.best[i] = splat(-__builtin_inff());
      chunk.best_target[i] = I{};
    }
    for (int64_t t0 = 0; t0 < n_targets; t0 += NR) {
      const float* panel = panel_at<E>(im, t0);
      switch (smaller(NR, n_targets - t0) / W) {
#if defined(__AVX512F__)
        case 4: meet<E, 4>(im, chunk, panel, t0); break;
        case 3: meet<E, 3>(im, chunk, panel, t0); break;
#endif
        case 2: meet<E, 2>(im, chunk, panel, t0); break;
        case 1: meet<E, 1>(im, chunk, panel, t0); break;
      }
    }
    for (int64_t i = 0; i < chunk.count; i++) {
      float best = chunk.best[i][0];
      int32_t target = chunk.best_target[i][0];
      for (int l = 1; l < W; l++) {
        const float value = chunk.best[i][l];
        const int32_t other = chunk.best_target[i][l];
        if (value > best || (value == best && other < target)) best = value, target = other;
      }
      im.nearest[i0 + i] = target;
    }
  }
}

// Features [d0, d1) of the rows: (x_j + its dropped tokens, ascending) / (1 + count), in float32; four vectors wide so
// that the sums stay in registers while the rows pass by.
template <class T>
static void mean(const Image& im, int64_t begin, int64_t end, int64_t d0, int64_t d1) {
  constexpr int kWide = 4;
  for (int64_t r = begin; r < end; r++) {
    const T* x = row<T>(im, im.row_token[r]);
    T* out = reinterpret_cast<T*>(im.out) + r * im.dim;
    const int32_t first = im.row_begin[r], last = im.row_begin[r + 1];
    if (im.row_blend[r] >= 0) {
      const T* other = row<T>(im, im.row_blend[r]);
      const V mine = splat(im.blend), rest = splat(1.0f - im.blend);
      for (int64_t d = d0; d < d1; d += W) {
        const int64_t n = smaller(W, d1 - d);
        store_n(out + d, fma(mine, load_n(x + d, n), rest * load_n(other + d, n)), n);
      }
    } else if (first == last) {
      __builtin_memcpy(out + d0, x + d0, (size_t)(d1 - d0) * sizeof(T));
    } else {
      const V count = splat((float)(1 + last - first));
      int64_t d = d0;
      for (; d + kWide * W <= d1; d += kWide * W) {
        V total[kWide];
        for (int v = 0; v < kWide; v++) total[v] = load(x + d + v * W);
        for (int32_t q = first; q < last; q++) {
          const T* dropped = row<T>(im, im.merged[q]) + d;
          for (int v = 0; v < kWide; v++) total[v] = total[v] + load(dropped + v * W);
        }
        for (int v = 0; v < kWide; v++) store(out + d + v * W, total[v] / count);
      }
      for (; d < d1; d += W) {
        const int64_t n = smaller(W, d1 - d);
        V total = load_n(x + d, n);
        for (int32_t q = first; q < last; q++) total = total + load_n(row<T>(im, im.merged[q]) + d, n);
        store_n(out + d, total / count, n);
      }
    }
  }
}
