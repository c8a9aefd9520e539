// CUDA C++ as g++ compiles it: the qualifiers, built-in variables, vector types, intrinsics and the part of the runtime
// API that this project's kernels and launch code use. simt.h lists the checks.
//
// Not supported, so that kernels do not use them: __shared__ variables (a function returns the dynamic shared memory),
// __threadfence (ThreadSanitizer does not support fences; use acquire and release), __activemask.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

constexpr int warpSize = 32;

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

// ---- vector types

#define SIMT_VECTORS(T, name, bytes)                         \
  struct alignas(2 * bytes) name##2 { T x, y; };             \
  struct alignas(4 * bytes) name##4 { T x, y, z, w; };       \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(int, int, 4)
SIMT_VECTORS(unsigned, uint, 4)
SIMT_VECTORS(float, float, 4)
#undef SIMT_VECTORS
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};

// ---- barriers and warps

#define SIMT_HERE \
  simt::Place { file, line }
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::sync_block(SIMT_HERE);
}
inline int __syncthreads_count(int flag, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return (int)simt::sync_block_count(SIMT_HERE, flag != 0);
}
inline int __syncthreads_or(int flag, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return simt::sync_block_count(SIMT_HERE, flag != 0) != 0;
}
inline int __syncthreads_and(int flag, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return simt::sync_block_count(SIMT_HERE, flag == 0) == 0;
}
#undef SIMT_HERE

namespace simt {
void combine_nothing(void* const*, uint32_t);
void combine_ballot(void* const* operands, uint32_t lanes);  // uint64_t each: a flag, then the ballot
void combine_match(void* const* operands, uint32_t lanes);   // uint64_t each: a value, then the lanes that share it
enum class Reduction { kAdd, kMin, kMax, kAnd, kOr, kXor };
template <Reduction kind, class T>  // T each: a value, then the result
void combine_reduce(void* const* operands, uint32_t lanes);

template <class T>
T shuffle(const char* primitive, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  Shuffle operand = {0, source};
  std::memcpy(&operand.value, &value, sizeof value);
  rendezvous(primitive, mask, &operand, combine_shuffle, false);
  std::memcpy(&value, &operand.value, sizeof value);
  return value;
}
}  // namespace simt

inline void __syncwarp(unsigned mask = ~0u) {
  simt::rendezvous("__syncwarp", mask, nullptr, simt::combine_nothing, true);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = (int)simt::self.lane & ~(width - 1);
  return simt::shuffle("__shfl_sync", mask, value, first | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = (int)simt::self.lane, source = lane ^ lanes;
  return simt::shuffle("__shfl_xor_sync", mask, value, source < (lane & ~(width - 1)) + width ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = (int)simt::self.lane, source = lane - (int)delta;
  return simt::shuffle("__shfl_up_sync", mask, value, source >= (lane & ~(width - 1)) ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = (int)simt::self.lane, source = lane + (int)delta;
  return simt::shuffle("__shfl_down_sync", mask, value, source < (lane & ~(width - 1)) + width ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int flag) {
  uint64_t operand = flag != 0;
  simt::rendezvous("__ballot_sync", mask, &operand, simt::combine_ballot, false);
  return (unsigned)operand;
}
inline int __any_sync(unsigned mask, int flag) { return __ballot_sync(mask, flag) != 0; }
inline int __all_sync(unsigned mask, int flag) { return __ballot_sync(mask, flag == 0) == 0; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  static_assert(std::is_integral_v<T> && sizeof(T) <= 8);
  uint64_t operand = (uint64_t)value;
  simt::rendezvous("__match_any_sync", mask, &operand, simt::combine_match, false);
  return (unsigned)operand;
}
#define SIMT_REDUCE(name, kind)                                                                   \
  template <class T>                                                                              \
  T name(unsigned mask, T value) {                                                                \
    static_assert(std::is_same_v<T, unsigned> || std::is_same_v<T, int>);                         \
    simt::rendezvous(#name, mask, &value, simt::combine_reduce<simt::Reduction::kind, T>, false); \
    return value;                                                                                 \
  }
SIMT_REDUCE(__reduce_add_sync, kAdd)
SIMT_REDUCE(__reduce_min_sync, kMin)
SIMT_REDUCE(__reduce_max_sync, kMax)
SIMT_REDUCE(__reduce_and_sync, kAnd)
SIMT_REDUCE(__reduce_or_sync, kOr)
SIMT_REDUCE(__reduce_xor_sync, kXor)
#undef SIMT_REDUCE

// ---- atomics: relaxed, of the types that CUDA has

namespace simt {
template <class T, class Change>
T change(T* address, Change next) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>);
  maybe_switch();
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, next(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <class T>
struct Same {
  using type = T;
};
}  // namespace simt
#define SIMT_ATOMIC(name, expression)                                     \
  template <class T>                                                      \
  T name(T* address, typename simt::Same<T>::type value) {                \
    return simt::change(address, [=](T old) -> T { return expression; }); \
  }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicSub, old - value)
SIMT_ATOMIC(atomicMax, old > value ? old : value)
SIMT_ATOMIC(atomicMin, old < value ? old : value)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicAnd, old& value)
SIMT_ATOMIC(atomicExch, ((void)old, value))
#undef SIMT_ATOMIC
template <class T>
T atomicCAS(T* address, typename simt::Same<T>::type compare, typename simt::Same<T>::type value) {
  return simt::change(address, [=](T old) { return old == compare ? value : old; });
}

// ---- loads and stores that name a cache: the same memory

#define SIMT_LOAD(name)      \
  template <class T>         \
  T name(const T* address) { \
    return *address;         \
  }
#define SIMT_STORE(name)                                      \
  template <class T>                                          \
  void name(T* address, typename simt::Same<T>::type value) { \
    *address = value;                                         \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldcs)
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)
SIMT_STORE(__stwt)
#undef SIMT_LOAD
#undef SIMT_STORE

// ---- arithmetic. Compiled without contraction: an fma is where one is written.

namespace simt {
template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace simt
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __int_as_float(int a) { return simt::bits_as<float>(a); }
inline float __uint_as_float(unsigned a) { return simt::bits_as<float>(a); }
inline int __float_as_int(float a) { return simt::bits_as<int>(a); }
inline unsigned __float_as_uint(float a) { return simt::bits_as<unsigned>(a); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }
inline int __clz(int a) { return a ? __builtin_clz((unsigned)a) : 32; }
inline int __clzll(long long a) { return a ? __builtin_clzll((unsigned long long)a) : 64; }

inline void cudaGridDependencySynchronize() { simt::wait_for_earlier_launch(); }
inline void cudaTriggerProgrammaticLaunchCompletion() { simt::let_later_launch_start(); }

#include "cuda_host_api.h"
