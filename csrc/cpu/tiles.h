// Tiles of AMX: eight registers of 16 rows of 64 bytes, and products of two of them in bfloat16 or float16.
//
//   multiply<T, C, A, B>:   C [16, columns] float32 += A [16, 32] B [32, columns],   B as [16][columns] pairs of T
//
// Every sum over the 32 products is made of two sums of 16, of the even and of the odd products, each in order and from
// zero; the total of both is added to C. Subnormal results count as zero, and so do subnormal inputs in bfloat16. This
// is the documented meaning of TDPBF16PS and TDPFP16PS; with APET_TILE_EMULATION it is plain C++ that any processor
// runs, for tests.
//
// Included by product_tiles.h and dot_tiles.h alone, inside the namespace of its instruction set.
#pragma once

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a row
constexpr int kTilePairs = 16;  // of elements in a row of A, and rows of B

#if !defined(APET_TILE_EMULATION)

// The registers of the calling thread. Other code, such as torch's, may use them before and after. The instructions are
// written as text, because the compilers' intrinsics take no template parameter for a register, and GCC's do not
// declare that they read memory.
class Tiles {
 public:
  explicit Tiles(int columns) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; tile++) {
      shape.rows[tile] = kTileRows;
      shape.bytes[tile] = (uint16_t)(tile == 4 || tile == 5 ? kTileBytes : 4 * columns);
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int Tile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
  }
  template <int Tile>
  void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
  }
  // The same, and the first-level cache keeps what it has.
  template <int Tile>
  void load_past_l1(const void* from, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
  }
  template <int Tile>
  void store(void* out, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(out), "r"(stride), "i"(Tile) : "memory");
  }
  template <class T, int C, int A, int B>
  void multiply() {
    if constexpr (__is_same(T, BFloat16)) {
      asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    } else {  // tdpfp16ps %tmmB, %tmmA, %tmmC, which older assemblers do not know
      asm volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" ::"i"(0x7b - 8 * B), "i"(0xc0 + 8 * C + A));
    }
  }
};

#else

class Tiles {
 public:
  explicit Tiles(int columns) : columns_(columns) {}

  template <int Tile>
  void zero() {
    __builtin_memset(tile_[Tile], 0, sizeof tile_[Tile]);
  }
  template <int Tile>
  void load(const void* from, int64_t stride) {
    for (int row = 0; row < kTileRows; row++)
      __builtin_memcpy(tile_[Tile][row], static_cast<const char*>(from) + row * stride, bytes(Tile));
  }
  template <int Tile>
  void load_past_l1(const void* from, int64_t stride) {
    load<Tile>(from, stride);
  }
  template <int Tile>
  void store(void* out, int64_t stride) {
    for (int row = 0; row < kTileRows; row++)
      __builtin_memcpy(static_cast<char*>(out) + row * stride, tile_[Tile][row], bytes(Tile));
  }
  template <class T, int C, int A, int B>
  void multiply() {
    for (int row = 0; row < kTileRows; row++) {
      float even[16] = {}, odd[16] = {};
      for (int k = 0; k < kTilePairs; k++) {
        T a[2];
        __builtin_memcpy(a, &tile_[A][row][k], sizeof a);
        const float a0 = widened(a[0]), a1 = widened(a[1]);
        for (int n = 0; n < columns_; n++) {
          T b[2];
          __builtin_memcpy(b, &tile_[B][k][n], sizeof b);
          even[n] = flush(__builtin_fmaf(a0, widened(b[0]), even[n]));
          odd[n] = flush(__builtin_fmaf(a1, widened(b[1]), odd[n]));
        }
      }
      for (int n = 0; n < columns_; n++) {
        const float sum = flush(as_float(tile_[C][row][n])) + flush(even[n] + odd[n]);
        tile_[C][row][n] = as_bits(flush(sum));
      }
    }
  }

 private:
  size_t bytes(int tile) const { return tile == 4 || tile == 5 ? kTileBytes : 4 * (size_t)columns_; }
  static float widened(BFloat16 b) { return flush(as_float((uint32_t)b.bits << 16)); }
  static float widened(Half h) {
    const uint32_t magnitude = (h.bits & 0x7fffu) << 13, sign = (h.bits & 0x8000u) << 16;
    const uint32_t beyond = magnitude >= 0x7c00u << 13 ? 0x7f800000u : 0;  // infinity and NaN
    return as_float(as_bits(as_float(magnitude) * 0x1p112f) | beyond | sign);
  }
  static float flush(float f) {
    const uint32_t bits = as_bits(f);
    return bits & 0x7f800000u ? f : as_float(bits & 0x80000000u);
  }

  int columns_;
  uint32_t tile_[8][kTileRows][kTileBytes / 4] = {};
};

#endif

// Returns whether a product of T is correct here.
template <class T>
static bool product_is_right() {
  const auto a = [](int r, int k) { return (float)((r + 3 * k) % 7 - 3); };
  const auto b = [](int k, int n) { return (float)((5 * k + n) % 9 - 4); };
  const auto narrow = [](float f) {  // small integers are exact in T
    T narrowed;
    store_n(&narrowed, splat(f), 1);
    return narrowed;
  };
  T rows[kTileRows][2 * kTilePairs], pairs[kTilePairs][W][2];
  float sums[kTileRows][W];
  for (int k = 0; k < 2 * kTilePairs; k++) {
    for (int r = 0; r < kTileRows; r++) rows[r][k] = narrow(a(r, k));
    for (int n = 0; n < W; n++) pairs[k / 2][n][k % 2] = narrow(b(k, n));
  }
  {
    Tiles tiles(W);
    tiles.zero<0>();
    tiles.load<4>(rows, sizeof rows[0]);
    tiles.load<6>(pairs, sizeof pairs[0]);
    tiles.multiply<T, 0, 4, 6>();
    tiles.store<0>(sums, sizeof sums[0]);
  }
  for (int r = 0; r < kTileRows; r++)
    for (int n = 0; n < W; n++) {
      float expected = 0;  // exact, in any order
      for (int k = 0; k < 2 * kTilePairs; k++) expected += a(r, k) * b(k, n);
      if (sums[r][n] != expected) return false;
    }
  return true;
}
