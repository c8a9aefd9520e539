// __nv_bfloat16: storage, and exact conversions; round to nearest, ties to even.
#pragma once
#include "cuda_runtime.h"

namespace simt {
inline float bfloat16_to_float(uint16_t b) { return bits_as<float>((uint32_t)b << 16); }

inline uint16_t float_to_bfloat16(float f) {
  const uint32_t bits = bits_as<uint32_t>(f);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // NaN, as the hardware's
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
}  // namespace simt

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float f) : bits(simt::float_to_bfloat16(f)) {}
  operator float() const { return simt::bfloat16_to_float(bits); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline float __bfloat162float(__nv_bfloat16 b) { return b; }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16(f); }
inline __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }
inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {b.x, b.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 f) { return {f.x, f.y}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return simt::bits_as<__nv_bfloat16>(bits); }
