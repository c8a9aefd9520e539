// __half: storage, and exact conversions; round to nearest, ties to even.
#pragma once
#include "cuda_runtime.h"

namespace simt {
inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return bits_as<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, NaN
  // The bits, shifted into a float, are 2^-112 of the value; this is exact, also for subnormal ones.
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(rest << 13) * 0x1p112f));
}

inline uint16_t float_to_half(float f) {
  const uint32_t bits = bits_as<uint32_t>(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return (uint16_t)(0x7fff);          // NaN, as the hardware's
  if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // from 65520 on: inf
  if (rest < 0x38800000) {                                   // subnormal: adding 1/2 leaves it in the low bits
    return (uint16_t)(sign | (bits_as<uint32_t>(bits_as<float>(rest) + 0.5f) - bits_as<uint32_t>(0.5f)));
  }
  return (uint16_t)(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}
}  // namespace simt

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float f) : bits(simt::float_to_half(f)) {}
  operator float() const { return simt::half_to_float(bits); }
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline float __half2float(__half h) { return h; }
inline __half __float2half_rn(float f) { return __half(f); }
inline __half __float2half(float f) { return __half(f); }
inline float2 __half22float2(__half2 h) { return {h.x, h.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 f) { return {f.x, f.y}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(unsigned short bits) { return simt::bits_as<__half>(bits); }
