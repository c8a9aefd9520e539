// Wide: a number with about twice the digits of float32, for what is computed once per token (s1_s3_sweep.cuh), and for
// dot products of so few features that a basis may almost span them (dot.cuh).
//
//   float64     where it takes at most twice the time of float32: sm_80, sm_90, sm_100
//   TwoFloat    on other GPUs, which have float64 in one lane of 64: there 12 warps would take 192 cycles for an fma
//
// The compiler's target decides, so a GPU has one of them, and the same bits in every call.
#pragma once
#include <type_traits>

#include "call.cuh"

namespace apet::cuda {

// hi + lo. A sum leaves in lo what hi could not hold (Knuth's exact sum, Dekker's exact product by fma), as compensated
// summation does: after n terms the error is about n u^2 of the sum of all magnitudes.
struct TwoFloat {
  float hi, lo;

  TwoFloat() = default;
  __device__ TwoFloat(float value, float below = 0) : hi(value), lo(below) {}
  __device__ explicit TwoFloat(double value) : hi((float)value), lo((float)(value - (float)value)) {}
  __device__ explicit operator float() const { return __fadd_rn(hi, lo); }
  __device__ TwoFloat operator-() const { return {-hi, -lo}; }
};

// The exact sum of two floats, in two.
__device__ __forceinline__ TwoFloat exact_sum(float a, float b) {
  const float sum = __fadd_rn(a, b), from_b = __fsub_rn(sum, a);
  return {sum, __fadd_rn(__fsub_rn(a, __fsub_rn(sum, from_b)), __fsub_rn(b, from_b))};
}

__device__ __forceinline__ TwoFloat operator+(TwoFloat a, TwoFloat b) {
  const TwoFloat sum = exact_sum(a.hi, b.hi);
  return {sum.hi, __fadd_rn(__fadd_rn(a.lo, b.lo), sum.lo)};
}
__device__ __forceinline__ TwoFloat operator*(TwoFloat a, TwoFloat b) {
  const float product = __fmul_rn(a.hi, b.hi);
  return {product, __fmaf_rn(a.hi, b.lo, __fmaf_rn(a.lo, b.hi, __fmaf_rn(a.hi, b.hi, -product)))};
}
__device__ __forceinline__ bool operator>(TwoFloat a, float b) { return __fadd_rn(__fsub_rn(a.hi, b), a.lo) > 0; }

// a b + c
__device__ __forceinline__ TwoFloat multiply_add(float a, float b, TwoFloat c) {
  const float product = __fmul_rn(a, b);
  return c + TwoFloat(product, __fmaf_rn(a, b, -product));
}
__device__ __forceinline__ TwoFloat multiply_add(TwoFloat a, TwoFloat b, TwoFloat c) { return c + a * b; }
__device__ __forceinline__ double multiply_add(float a, float b, double c) { return fma((double)a, (double)b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// 1 / sqrt(a): one step of Newton's method makes 24 digits 48.
__device__ __forceinline__ TwoFloat inverse_root(TwoFloat a) {
  const float start = __fdiv_rn(1, __fsqrt_rn((float)a));
  const TwoFloat root = a * TwoFloat(start);
  const float defect = __fmaf_rn(-root.lo, start, __fmaf_rn(-root.hi, start, 1));
  return exact_sum(start, __fmul_rn(__fmul_rn(start, defect), 0.5f));
}
__device__ __forceinline__ double inverse_root(double a) { return 1 / sqrt(a); }

__device__ __forceinline__ TwoFloat shuffle_xor(TwoFloat a, int step) {
  return {__shfl_xor_sync(kAllLanes, a.hi, step), __shfl_xor_sync(0xffffffffu, a.lo, step)};
}
__device__ __forceinline__ double shuffle_xor(double a, int step) { return __shfl_xor_sync(kAllLanes, a, step); }

// Loads what another SM has written.
__device__ __forceinline__ TwoFloat load_l2(const TwoFloat* at) {
  const float2 both = __ldcg(reinterpret_cast<const float2*>(at));
  return {both.x, both.y};
}
__device__ __forceinline__ double load_l2(const double* at) { return __ldcg(at); }

using Wide = std::conditional_t<kFastFloat64, double, TwoFloat>;
static_assert(sizeof(Wide) == 8);

}  // namespace apet::cuda
