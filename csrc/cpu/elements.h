// Element policies: how rows of T are multiplied. get() loads N elements, and Packed::get() those of a packed factor.
// unit() broadcasts 32 bits of a row to all lanes. If kTiles, product_tiles.h multiplies in tiles instead.
//
// Included by dot.h alone, inside the namespace of its instruction set.
#pragma once
#include "vector.h"

// Widened: each element is converted to float, and a product is one fma. N elements make a vector. A running sum takes
// kFold vectors in dot.h, kChain products in product.h.
template <class T_>
struct Widened {
  using T = T_;
  using Packed = Widened;
  static constexpr int N = W;
  static constexpr int kFold = 16;
  static constexpr int64_t kChain = 128;
  static constexpr bool kInPlace = sizeof(T) == 4;  // its rows can be multiplied without widening
  static constexpr bool kTiles = false;
  static inline V get(const T* p) { return load(p); }
  static inline V get_n(const T* p, int64_t n) { return load_n(p, n); }
  static inline V unit(const char* p) { return splat_at(p); }
  static inline V mad(V a, V b, V c) { return fma(a, b, c); }
};

// Two 16-bit elements to a 32-bit lane, as they are in memory. An odd last element is paired with zero.
template <class T_>
struct Pairs {
  using T = T_;
  using Packed = Pairs;
  static constexpr int N = 2 * W;
#if defined(__AVX512BW__)
  static inline V get(const T* p) { return (V)_mm512_loadu_si512(p); }
  static inline V get_n(const T* p, int64_t n) { return (V)_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p); }
#else
  static inline V get(const T* p) {
    V pairs;
    __builtin_memcpy(&pairs, p, sizeof pairs);
    return pairs;
  }
  static inline V get_n(const T* p, int64_t n) {
    T full[N] = {};
    for (int64_t i = 0; i < n; i++) full[i] = p[i];
    return get(full);
  }
#endif
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16, multiplied and added by one instruction (float32 accumulation, products exact, subnormal inputs
// count as zero).
struct Bf16Pairs : Pairs<BFloat16> {
  static constexpr int kFold = 16;
  static constexpr int64_t kChain = 128;
  static constexpr bool kInPlace = true;
  static constexpr bool kTiles = false;
  static inline V unit(const char* p) { return splat_at(p); }
  static inline V mad(V a, V b, V c) { return (V)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
};
#elif defined(APET_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
// The same, but each of its two sums is rounded to odd, which is off by twice as much: so chains are shorter
// (docs/cpu.md).
struct Bf16Pairs : Pairs<BFloat16> {
  static constexpr int kFold = 4;
  static constexpr int64_t kChain = 64;
  static constexpr bool kInPlace = true;
  static constexpr bool kTiles = false;
  static inline float32x2_t unit(const char* p) { return float32x2_t{splat_at(p)[0], 0}; }
  static inline V mad(float32x2_t a, V b, V c) {
    return (V)vbfdotq_lane_f32((float32x4_t)c, (bfloat16x8_t)b, (bfloat16x4_t)a, 0);
  }
  static inline V mad(V a, V b, V c) { return (V)vbfdotq_f32((float32x4_t)c, (bfloat16x8_t)a, (bfloat16x8_t)b); }
};
#elif defined(APET_TILES)
// The same in plain C++, for the emulation of the tiles (tiles.h).
struct Bf16Pairs : Pairs<BFloat16> {
  static constexpr int kFold = 16;
  static inline V mad(V a, V b, V c) {
    const U x = (U)a, y = (U)b;
    const V odd = fma((V)(x & 0xffff0000u), (V)(y & 0xffff0000u), c);
    return fma((V)(x << 16), (V)(y << 16), odd);
  }
};
#endif

#if defined(APET_TILES)
// Products with factors in tiles; dot products of pairs, or of widened elements.
template <class Dots>
struct InTiles : Dots {
  using Packed = Pairs<typename Dots::T>;
  static constexpr int64_t kChain = 512;
  static constexpr bool kInPlace = false;
  static constexpr bool kTiles = true;
};
#endif
