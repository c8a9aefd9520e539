// Tiles of AMX: eight registers of 16 rows of 64 bytes, and products of two of them in bfloat16.
//
//   multiply<C, A, B>:   C [16, columns] float32 += A [16, 32] B [32, columns],   B as [16][columns] pairs of bfloat16
//
// Every sum over the 32 products is made of two sums of 16, of the even and of the odd products, each in order and from
// zero; the total of both is added to C. Subnormal inputs and results count as zero. This is the documented meaning of
// TDPBF16PS; with APET_TILE_TWIN it is plain C++ that any processor runs, for tests.
//
// Included by product_tiles.h alone, inside the namespace of its instruction set.
#pragma once

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a row
constexpr int kTilePairs = 16;  // of bfloat16 in a row of A, and rows of B

#if !defined(APET_TILE_TWIN)

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
  template <int Tile>
  void store(void* out, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(out), "r"(stride), "i"(Tile) : "memory");
  }
  template <int C, int A, int B>
  void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
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
  void store(void* out, int64_t stride) {
    for (int row = 0; row < kTileRows; row++)
      __builtin_memcpy(static_cast<char*>(out) + row * stride, tile_[Tile][row], bytes(Tile));
  }
  template <int C, int A, int B>
  void multiply() {
    for (int row = 0; row < kTileRows; row++) {
      float even[16] = {}, odd[16] = {};
      for (int k = 0; k < kTilePairs; k++) {
        const uint32_t a = tile_[A][row][k];
        for (int n = 0; n < columns_; n++) {
          const uint32_t b = tile_[B][k][n];
          even[n] = flush(even[n] + flush(value(a << 16) * value(b << 16)));
          odd[n] = flush(odd[n] + flush(value(a & 0xffff0000u) * value(b & 0xffff0000u)));
        }
      }
      for (int n = 0; n < columns_; n++) {
        const float sum = value(tile_[C][row][n]) + flush(even[n] + odd[n]);
        tile_[C][row][n] = as_bits(flush(sum));
      }
    }
  }

 private:
  size_t bytes(int tile) const { return tile == 4 || tile == 5 ? kTileBytes : 4 * (size_t)columns_; }
  static float value(uint32_t bits) { return flush(as_float(bits)); }
  static float flush(float f) {
    const uint32_t bits = as_bits(f);
    return bits & 0x7f800000u ? f : as_float(bits & 0x80000000u);
  }

  int columns_;
  uint32_t tile_[8][kTileRows][kTileBytes / 4] = {};
};

#endif
