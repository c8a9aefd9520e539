// Small wrong kernels for test_simt.py, whose faults the simulation or a sanitizer must find.
#pragma once
#include "selftest_computes.h"

namespace {

// ---- kernels with one fault each

__global__ void skipped_barrier(int*) {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void two_barriers(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void early_exit(int*) {
  if (threadIdx.x == 9) return;
  __syncthreads();
}
__global__ void mask_without_caller(int* out) { out[threadIdx.x] = __shfl_sync(0xffffu, (int)threadIdx.x, 0); }
__global__ void mask_too_wide(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(kAll, (int)threadIdx.x, 1);
  __syncthreads();
}
__global__ void absent_source(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffffu, (int)threadIdx.x, 20);
}
__global__ void different_primitives(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(kAll, 1, 0);
  else out[threadIdx.x] = (int)__ballot_sync(kAll, 1);
}
__global__ void spin_forever(int* data) { wait_acquire(reinterpret_cast<uint32_t*>(data), 1); }
// Waits for a block that may not start before this one ends.
__global__ void wait_for_next_block(int* data) {
  uint32_t* flags = reinterpret_cast<uint32_t*>(data);
  add_release(&flags[blockIdx.x], 1);
  wait_acquire(&flags[(blockIdx.x + 1) % gridDim.x], 1);
}
__global__ void peer_has_exited(int* out) {
  const cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
  if (cluster.block_rank() == 1) return;
  for (int i = 0; i < 50; i++) __syncthreads();
  out[threadIdx.x] = *cluster.map_shared_rank(shared_ints(), 1);
}
__global__ void peer_has_not_begun(int*) {
  const cg::cluster_group cluster = cg::this_cluster();
  atomicAdd(cluster.map_shared_rank(shared_ints(), 1 - cluster.block_rank()), 1);
  cluster.sync();
}
__global__ void cluster_barrier(int*) { cg::this_cluster().sync(); }
__global__ void grid_barrier(int*) { cg::this_grid().sync(); }
__global__ void misaligned_copy(int* data) {
  copy_async_16(shared_ints() + 1, data, true);
  copy_async_commit();
  copy_async_wait<0>();
}
__global__ void copy_outside(int* data) {
  copy_async_16(shared_ints() + 8 * 64, data, true);
  copy_async_commit();
  copy_async_wait<0>();
}
__global__ void copy_without_wait(int* data) {
  copy_async_16(shared_ints() + 4 * threadIdx.x, data + 4 * threadIdx.x, true);
  copy_async_commit();
}
__global__ void copy_wait_too_short(int* data) { copy_rows(data, false, true); }
__global__ void hasty_reader(int* data) { data[64 + threadIdx.x] = data[threadIdx.x]; }
__global__ void unwritten_shared(int* out) { out[threadIdx.x] = shared_ints()[threadIdx.x]; }

// ---- faults that the sanitizers must find

__global__ void past_the_end(int* data) { data[1024 + threadIdx.x] = 1; }
__global__ void past_shared(int* out) { out[threadIdx.x] = shared_ints()[2 * 4 * blockDim.x + threadIdx.x]; }
__global__ void missing_barrier(int* out) {
  int* s = shared_ints();
  s[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}
__global__ void missing_syncwarp(int* out) {
  int* s = shared_ints();
  s[threadIdx.x] = threadIdx.x;
  __shfl_xor_sync(kAll, 0, 1);  // orders nothing
  out[threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void copy_without_barrier(int* data) { copy_rows(data, true, false); }
__global__ void plain_flag(int* data) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    data[1] = 5;
    atomicAdd(&data[0], 1);  // relaxed: publishes nothing
  }
  if (blockIdx.x == 1 && threadIdx.x == 0) {
    wait_acquire(reinterpret_cast<uint32_t*>(data), 1);
    data[2] = data[1];
  }
}

}  // namespace
