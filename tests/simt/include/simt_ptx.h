// The functions of csrc/cuda/ptx.cuh on the CPU, after the PTX manual (ISA 9, sections on the instructions named).
//
// A thread's own reads and writes are done here, in the kernel's code, where the sanitizers check them. The runtime
// exchanges data between lanes.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace simt {

// m8n8 matrices of 16-bit numbers: each lane passes a row of 16 bytes and gets one pair of each matrix.
struct Ldmatrix {
  uint32_t row[4], result[4];
};
void combine_ldmatrix_x4(void* const* operands, uint32_t lanes);

struct Mma {
  const uint32_t *a, *b;
  float* d;
};
void combine_mma_half(void* const* operands, uint32_t lanes);
void combine_mma_bfloat16(void* const* operands, uint32_t lanes);

inline void land(const Copy& copy) {
  if (copy.valid) std::memcpy(copy.to, copy.from, copy.bytes);
  else std::memset(copy.to, 0, copy.bytes);
}

}  // namespace simt

namespace apet::cuda {

inline constexpr bool kHasClusters = true;
#ifdef SIMT_SLOW_FLOAT64
inline constexpr bool kFastFloat64 = false;
#else
inline constexpr bool kFastFloat64 = true;
#endif

inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(simt::shared_memory()); }

// red.release.gpu.add
inline void add_release(uint32_t* counter, uint32_t value) {
  simt::maybe_switch();
  __atomic_fetch_add(counter, value, __ATOMIC_RELEASE);
}

// ld.relaxed.gpu in a loop, then fence.acq_rel.gpu. ThreadSanitizer does not support fences, so the counter is read
// once more, with acquire.
inline void wait_acquire(const uint32_t* counter, uint32_t target) {
  do simt::poll("wait_acquire");
  while ((int32_t)(__atomic_load_n(counter, __ATOMIC_RELAXED) - target) < 0);
  (void)__atomic_load_n(counter, __ATOMIC_ACQUIRE);
}

// cp.async.cg.shared.global 16: both addresses aligned; zeros if not valid.
inline void copy_async_16(void* shared, const void* global, bool valid) {
  simt::check_shared("cp.async", shared, 16);
  if (reinterpret_cast<uintptr_t>(global) % 16) simt::fault("cp.async from %p, which is not a multiple of 16", global);
  const simt::Copy copy = {shared, global, 16, valid};
  if (simt::lands_now(copy)) simt::land(copy);
}

// cp.async.commit_group
inline void copy_async_commit() { simt::close_group(); }

// cp.async.wait_group kPending
template <int kPending>
void copy_async_wait() {
  simt::Copy copy;
  while (simt::take_landing(kPending, copy)) simt::land(copy);
}

// ldmatrix.sync.aligned.m8n8.x4.shared.b16: lane l names row l % 8 of matrix l / 8, and gets of each matrix the
// elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  simt::check_shared("ldmatrix", row, 16);
  simt::Ldmatrix operand;
  std::memcpy(operand.row, row, 16);
  simt::rendezvous("ldmatrix", ~0u, &operand, simt::combine_ldmatrix_x4, false);
  std::memcpy(r, operand.result, 16);
}

// mma.sync.aligned.m16n8k16.row.col.f32.{f16.f16,bf16.bf16}.f32
template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  simt::Mma operand = {a, b, d};
  simt::rendezvous("mma", ~0u, &operand,
                   std::is_same_v<T, __half> ? simt::combine_mma_half : simt::combine_mma_bfloat16, false);
}

// griddepcontrol
inline void wait_previous_launch() { cudaGridDependencySynchronize(); }
inline void allow_next_launch() { cudaTriggerProgrammaticLaunchCompletion(); }

}  // namespace apet::cuda
