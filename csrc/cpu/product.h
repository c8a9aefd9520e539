// Products x.t of many tokens x with a few tokens t, as tiles of a matrix product. The caller uses a tile at once:
// s5_assign.h keeps a running arg-max, s1_rounds.h and s4_medoids.h store the products with a basis or with centres.
//
// A thread keeps MR rows x one panel of NR factors in registers:
//
//                 panel 0          panel 1       ...   last panel
//              +---- NR ----+  +---- NR ----+       +- its vectors -+
//   packed     | k = 0      |  | k = 0      |       | k = 0         |     k counts units of 32 bits:
//   factors    | k = 1 ...  |  | k = 1 ...  |       | k = 1 ...     |     a float, or two bfloat16
//              +------------+  +------------+       +---------------+
//   MR rows ->   sums over k     of a row block of 96 tokens, against all panels
//
// AVX-512 and NEON: 6 rows x 4 vectors = 24 sums + 4 panel vectors + 1 row value = 29 of 32 registers; AVX2: 6 x 2 = 12
// + 2 + 1 of 16. A last panel of one vector takes twice as many rows, since six sums are too few to hide the latency of
// fma. k runs in parts of 1024 units, so that a panel's part (at most 256 KB) and the rows of the block stay in L2.
//
// One instruction multiplies and adds a unit. Rows of other types are widened into scratch first. Sums in registers run
// over kChain products and are then added up in `tile`: one sum over all k would be off by several times as much as
// torch.mm where products have one sign (docs/algorithm.md, "Rounding"). Both run over k in order, so neither block,
// panel nor place in them changes a bit, and x.t = t.x.
//
// Included by loops.h alone, inside the namespace of its instruction set.
#pragma once
#include "dot.h"

#if defined(__AVX512F__) || defined(APET_NEON) || defined(APET_TILES)
constexpr int MR = 6, NV = 4;
#elif defined(__AVX2__)
constexpr int MR = 6, NV = 2;
#else
constexpr int MR = 4, NV = 2;
#endif
constexpr int NR = NV * W;
constexpr int rows_of(int vectors) { return vectors == 1 ? 2 * MR : MR; }
constexpr int64_t kPartUnits = 1024;
// Rows of a RowBlock, at most: one pass over the packed factors (in L2 or L3) serves this many tokens.
#if defined(APET_TILES)
constexpr int kBlockRows = 128, kBlockSpan = 160;  // span: with rows in between (product_tiles.h)
#else
constexpr int kBlockRows = 96, kBlockSpan = 96;
#endif
// Rows in scratch, of a thread: about this much, so that they stay in L2 too; twice as much in tiles (block_rows()).
constexpr int64_t kScratchBytes = 512 << 10;

// The units of a row, and of a factor in a panel. In tiles, zeros complete the last one.
template <class E>
static inline int64_t units(int64_t dim) {
  if (E::kTiles) return (dim + 31) / 32 * 16;
  return (dim * W + E::Packed::N - 1) / E::Packed::N;  // so many elements make W units
}
// Rows that share each load of a factor.
template <class E>
constexpr int kRowGroup = E::kTiles ? 32 : MR;
// The bytes of a row in scratch: widened, or copied, completed to whole rows of a tile (64 bytes).
template <class E>
static inline int64_t scratch_row_bytes(int64_t dim) {
  return E::kTiles ? units<E>(dim) * 4 : dim * 4;
}
static inline int64_t padded(int64_t factors) { return (factors + W - 1) / W * W; }
// Returns the rows of a block that is multiplied with so many factors. If these do not fit L2 beside the rows, tiles
// multiply faster than L3 delivers panels, so more rows share a panel.
template <class E>
static inline int64_t block_rows(int64_t factors, int64_t dim) {
  if (E::kInPlace) return kBlockRows;
  const int64_t row = scratch_row_bytes<E>(dim), most = E::kTiles ? 2 * kScratchBytes : kScratchBytes;
  const int64_t wanted = smaller(padded(factors), most) * row;
  const int64_t bytes = wanted < kScratchBytes ? kScratchBytes : smaller(wanted, most);
  const int64_t fit = bytes / row / kRowGroup<E> * kRowGroup<E>;
  return fit < kRowGroup<E> ? kRowGroup<E> : smaller(fit, kBlockRows);
}

// Returns where the panel that starts at factor t0 is stored. Panels fill the result first, from its first cache line
// on (only mean() writes its rows); panels that do not fit are in the workspace, in Factors::packed.
template <class E>
static inline float* panel_at(const Input& in, const Rows& rows, const Factors& factors, int64_t t0) {
  const int64_t n = units<E>(in.dim), before = -(uintptr_t)rows.out % 64;
  const int64_t bytes = (int64_t)sizeof(typename E::T) * rows.count * in.dim - before;
  const int64_t room = bytes < 0 ? 0 : bytes / 4 / n;
  const int64_t fit = room >= padded(factors.count) ? padded(factors.count) : room / NR * NR;
  return t0 < fit ? reinterpret_cast<float*>(rows.out + before) + t0 * n : factors.packed + (t0 - fit) * n;
}
// Returns the floats of the workspace that panel_at() may use for up to `factors` factors. The result has a row for
// each factor, which holds its packed form except for the difference in width; a cache line, a panel and the last
// vector are lost.
template <class E>
static size_t packed_floats(int64_t factors, int64_t dim) {
  const int64_t half_units = 2 * units<E>(dim), wider = half_units - dim * (int64_t)sizeof(typename E::T) / 2;
  const int64_t outside = (factors * wider + 32 + half_units - 1) / half_units + NR + W;
  return (size_t)(smaller(outside, padded(factors)) * units<E>(dim));
}
template <class E>
static size_t scratch_bytes(int64_t factors, int64_t dim) {
  return E::kInPlace ? 0 : (size_t)(block_rows<E>(factors, dim) * scratch_row_bytes<E>(dim));
}

// Returns where unit k of the factors from v on, a vector, is in a panel of `width` factors with `all` units. For tiles
// a panel is a sequence of tiles of 16 units: two vectors side by side over all units, then the next two.
template <class E>
static inline int64_t in_panel(int64_t k, int64_t v, int64_t width, int64_t all) {
  if (!E::kTiles) return k * width + v;
  const int64_t pair = v / (2 * W) * (2 * W), together = smaller(2 * W, width - pair);
  return pair * all + k / 16 * 16 * together + (v - pair) * 16 + k % 16 * W;
}

// Packs features [d0, d1) of the rows row(t), t0 <= t < count, as one panel of `width`; d0 is a multiple of
// kColumns, and d1 too, if features follow.
template <class E, bool Negated, class RowOf>
static inline void pack_panel(RowOf row_of, int64_t t0, int64_t count, int64_t width, int64_t all, int64_t d0,
                              int64_t d1, float* out) {
  using Packed = typename E::Packed;
  constexpr int64_t kPerUnit = Packed::N / W;
  const int64_t next = E::kTiles ? W : width;                // floats from a unit to the next
  const int64_t end = E::kTiles ? (d1 + 31) / 32 * 32 : d1;  // zeros complete a tile
  for (int64_t v = 0; v < width; v += W) {
    const typename E::T* t[W];
    for (int i = 0; i < W; i++) t[i] = t0 + v + i < count ? row_of(t0 + v + i) : nullptr;
    for (int64_t d = d0; d < end; d += Packed::N) {
      const int64_t n = smaller(Packed::N, d1 - d), used = E::kTiles ? W : (n + kPerUnit - 1) / kPerUnit;
      V block[W];
      for (int i = 0; i < W; i++)
        block[i] = !t[i] || n <= 0 ? V{} : n == Packed::N ? Packed::get(t[i] + d) : Packed::get_n(t[i] + d, n);
      transpose(block);
      float* place = out + in_panel<E>(d / kPerUnit, v, width, all);
      for (int64_t i = 0; i < used; i++) store(place + i * next, Negated ? -block[i] : block[i]);
    }
  }
}

// Packs features [d0, d1) of one panel, as pack_panel().
template <class E>
static void pack(const Input& in, const Rows& rows, const Factors& factors, int64_t panel, int64_t d0, int64_t d1) {
  const int64_t t0 = panel * NR, width = smaller(NR, padded(factors.count) - t0);
  const auto row_of = [&](int64_t t) { return row<typename E::T>(in, factors.token[t]); };
  pack_panel<E, false>(row_of, t0, factors.count, width, units<E>(in.dim), d0, d1, panel_at<E>(in, rows, factors, t0));
}

// tile [R, NR] (+)= rows [R] x panel over `count` units. Rows are bytes: 16-bit ones need not be 4-byte aligned.
template <class E, int Vectors>
static inline void multiply(const char* const* rows, const float* panel, int64_t count, float* tile, bool first) {
  constexpr int R = rows_of(Vectors);
  constexpr int64_t kUnits = E::kChain * W / E::Packed::N;
  static_assert(kPartUnits % kUnits == 0, "a part is whole chains");
  for (int64_t k = 0; k < count;) {
    const int64_t end = smaller(count, k + kUnits);
    V acc[R][Vectors] = {};
    for (; k < end; k++) {
      V b[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; v++) b[v] = load(panel + (k * Vectors + v) * W);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const auto a = E::unit(rows[r] + 4 * k);
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; v++) acc[r][v] = E::mad(a, b[v], acc[r][v]);
#if defined(APET_NEON)
        asm volatile("");  // GCC would load the units of all rows first, and then lack registers for the sums
#endif
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; v++) {
        float* t = tile + r * NR + v * W;
        store(t, first ? acc[r][v] : load(t) + acc[r][v]);
      }
    first = false;
  }
}

// The rows of up to kBlockRows tokens, as units, and their products with one panel.
struct RowBlock {
  int64_t count;
  const char* rows[kBlockRows];
  float last[kBlockRows];                                            // of odd D: the last bfloat16 and a zero
  float tile[(kBlockSpan + 2 * MR - 1) / (2 * MR) * (2 * MR) * NR];  // with room for the last, incomplete rows
#if defined(APET_TILES)
  bool far;                           // the factors do not fit L2
  int64_t row_tiles;                  // tiles of rows, from rows[0] on
  int64_t stride, step, tile_stride;  // bytes from a row of a tile to the next, a step to the next, a tile to the next
  int32_t at[kBlockRows];             // the row of `tile` that belongs to a token
  const float* products(int64_t i) const { return tile + at[i] * NR; }
#else
  const float* products(int64_t i) const { return tile + i * NR; }
#endif
};

#if defined(APET_TILES)
#include "product_tiles.h"
#endif

// Collects the rows of tokens[begin .. begin + count) for products with so many factors, widened into scratch if the
// dtype requires it. Gaps: rows of tokens in between may be multiplied too, so that `tile` is read by products() alone.
template <class E, bool Gaps, class Tokens>
static inline void load_block(const Input& in, Tokens tokens, int64_t begin, int64_t count, int64_t factors,
                              void* scratch, RowBlock& block) {
  block.count = count;
#if defined(APET_TILES)
  take_rows<E, Gaps>(in, tokens, begin, count, factors, static_cast<char*>(scratch), block);
#else
  using T = typename E::T;
  (void)factors;
  for (int64_t i = 0; i < count; i++) {
    const T* x = row<T>(in, tokens[begin + i]);
    block.rows[i] = reinterpret_cast<const char*>(x);
    if (E::Packed::N > W && in.dim % 2) {
      block.last[i] = 0;
      __builtin_memcpy(block.last + i, x + in.dim - 1, sizeof(T));
    }
    if (!E::kInPlace) {
      float* wide = static_cast<float*>(scratch) + i * in.dim;
      int64_t d = 0;
      for (; d + W <= in.dim; d += W) store(wide + d, load(x + d));
      if (d < in.dim) store_n(wide + d, load_n(x + d, in.dim - d), in.dim - d);
      block.rows[i] = reinterpret_cast<const char*>(wide);
    }
  }
#endif
}

template <class E, int Vectors>
static inline void multiply_in_vectors(const Input& in, RowBlock& block, const float* panel) {
  constexpr int R = rows_of(Vectors);
  const int64_t whole = in.dim / (E::Packed::N / W);  // units that are complete in a row
  const char* a[R];
  for (int64_t k = 0; k < whole; k += kPartUnits)
    for (int64_t i = 0; i < block.count; i += R) {
      for (int r = 0; r < R; r++) a[r] = block.rows[smaller(i + r, block.count - 1)] + 4 * k;
      multiply<E, Vectors>(a, panel + k * Vectors * W, smaller(kPartUnits, whole - k), block.tile + i * NR, k == 0);
    }
  if (units<E>(in.dim) > whole)
    for (int64_t i = 0; i < block.count; i += R) {
      for (int r = 0; r < R; r++) a[r] = reinterpret_cast<const char*>(block.last + smaller(i + r, block.count - 1));
      multiply<E, Vectors>(a, panel + whole * Vectors * W, 1, block.tile + i * NR, whole == 0);
    }
}

// tile = the block x one panel of `Vectors` vectors.
template <class E, int Vectors>
static inline void multiply_panel(const Input& in, RowBlock& block, const float* panel) {
#if defined(APET_TILES)
  if constexpr (E::kTiles) multiply_in_tiles<E, Vectors>(in, block, panel);
  else
#endif
    multiply_in_vectors<E, Vectors>(in, block, panel);
}

template <int Vectors_>
struct Width {
  static constexpr int Vectors = Vectors_;
};

// Calls use(Width, panel, its first factor) for every panel.
template <class E, class Use>
static inline void each_panel(const Input& in, const Rows& rows, const Factors& factors, Use use) {
  const int64_t count = padded(factors.count);
  for (int64_t t0 = 0; t0 < count; t0 += NR) {
    const float* panel = panel_at<E>(in, rows, factors, t0);
    switch (smaller(NR, count - t0) / W) {
#if defined(__AVX512F__) || defined(APET_NEON) || defined(APET_TILES)
      case 4: use(Width<4>{}, panel, t0); break;
      case 3: use(Width<3>{}, panel, t0); break;
#endif
      case 2: use(Width<2>{}, panel, t0); break;
      case 1: use(Width<1>{}, panel, t0); break;
    }
  }
}
