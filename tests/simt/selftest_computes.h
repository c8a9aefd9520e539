// Small right kernels for test_simt.py, whose results the simulation must compute.
#pragma once
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <simt_ptx.h>

namespace cg = cooperative_groups;
using namespace apet::cuda;

namespace {

constexpr unsigned kAll = ~0u;
__device__ int* shared_ints() { return reinterpret_cast<int*>(shared_memory()); }
__device__ int global_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

// The sum of 0..255 by a tree over shared memory, in every thread.
__global__ void barriers(int* out) {
  int* s = shared_ints();
  const int t = threadIdx.x;
  s[t] = t;
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half) s[t] += s[t + half];
  }
  __syncthreads();
  out[global_thread()] =
      s[0] + __syncthreads_count(t % 3 == 0) + 1000 * __syncthreads_or(t == 7) + 2000 * __syncthreads_and(t < 200);
}

// One of each primitive, combined into a number for each lane.
__global__ void warps(int* out) {
  const int t = threadIdx.x, lane = t % 32;
  int v = __shfl_sync(kAll, t, 5);
  v = 3 * v + __shfl_sync(kAll, t, lane + 1, 8);
  v = 3 * v + __shfl_xor_sync(kAll, t, 9);
  v = 3 * v + __shfl_up_sync(kAll, t, 3);
  v = 3 * v + __shfl_down_sync(kAll, t, 4, 16);
  v = 3 * v + (int)(__ballot_sync(kAll, lane % 5 == 0) >> (lane % 7));
  v = 3 * v + (int)__match_any_sync(kAll, lane / 3);
  v = 3 * v + __reduce_add_sync(kAll, t) + __reduce_max_sync(kAll, t ^ 21) + __reduce_min_sync(kAll, -t);
  v = 3 * v + 2 * __any_sync(kAll, lane == 31) + __all_sync(kAll, lane < 31);
  if (lane < 12) v = 3 * v + __shfl_xor_sync(0xfffu, v, 1);  // some lanes by themselves
  __syncwarp();
  out[global_thread()] = v;
}

// Every block adds into every other block of its cluster, with a split barrier in between.
__global__ void clusters(int* out) {
  const cg::cluster_group cluster = cg::this_cluster();
  int* mine = shared_ints();
  if (threadIdx.x == 0) mine[0] = 100 * blockIdx.x;
  cluster.sync();
  if (threadIdx.x < cluster.num_blocks())
    atomicAdd(cluster.map_shared_rank(mine, threadIdx.x), 1 + (int)cluster.block_rank());
  auto token = cluster.barrier_arrive();
  const int rank = (int)cluster.block_rank();
  cluster.barrier_wait(std::move(token));
  out[global_thread()] = mine[0] + 10000 * rank;
  cluster.sync();
}

// Rounds of neighbours' sums through global memory, with a barrier of the grid in between.
__global__ void grids(int* data) {
  const int n = gridDim.x * blockDim.x, i = global_thread();
  data[i] = i;
  for (int round = 0; round < 4; round++) {
    cg::this_grid().sync();
    const int sum = data[i] + data[(i + 1) % n];
    cg::this_grid().sync();
    data[i] = sum;
  }
}

// As many threads as a device holds at once, all of them waiting at one barrier.
__global__ void full_device(int* data) {
  atomicAdd(&data[threadIdx.x], 1);
  cg::this_grid().sync();
}

// The last block to take a ticket adds up the results of the others.
__global__ void tickets(int* data) {
  uint32_t* words = reinterpret_cast<uint32_t*>(data);
  const unsigned ticket_count = gridDim.x;
  int* s = shared_ints();
  if (threadIdx.x == 0) s[0] = (int)atomicAdd(&words[0], 1u);
  __syncthreads();
  const unsigned ticket = s[0];
  if (ticket + 1 < ticket_count) {
    if (threadIdx.x == 0) {
      words[2 + ticket] = 10 + ticket;
      add_release(&words[1], 1);
    }
  } else if (threadIdx.x == 0) {
    wait_acquire(&words[1], ticket_count - 1);
    unsigned sum = 0;
    for (unsigned i = 0; i + 1 < ticket_count; i++) sum += words[2 + i];
    words[2 + ticket] = sum;
  }
}

__device__ void copy_rows(int* data, bool wait, bool barrier) {
  int* s = shared_ints();
  for (int group = 0; group < 2; group++) {
    copy_async_16(s + 4 * (group * blockDim.x + threadIdx.x), data + 4 * (group * blockDim.x + threadIdx.x),
                  threadIdx.x != 3);
    copy_async_commit();
  }
  if (wait) copy_async_wait<0>();
  else copy_async_wait<1>();
  if (barrier) __syncthreads();
  const int other = blockDim.x - 1 - threadIdx.x;
  int sum = 0;
  for (int i = 0; i < 4; i++) sum += s[4 * other + i] - s[4 * (blockDim.x + other) + i];
  if (!wait) copy_async_wait<0>();
  __syncthreads();
  data[8 * blockDim.x + threadIdx.x] = sum;
}
__global__ void copies(int* data) { copy_rows(data, true, true); }

// out[16][8] = a[16][16] b[16][8] of 16-bit numbers. data holds a, then b transposed, both in rows of 16.
template <class T>
__device__ void multiply(int* data) {
  int* s = shared_ints();
  for (int i = threadIdx.x; i < 24 * 8; i += 32) s[i] = data[i];
  __syncwarp();
  const int lane = threadIdx.x;
  uint32_t a[4], b[4];
  const unsigned char* rows = shared_memory();
  ldmatrix_x4(a, rows + (lane % 16) * 32 + lane / 16 * 16);
  // The two matrices of b are given twice, since the rows of the upper lanes are not used.
  ldmatrix_x4(b, rows + (16 + lane % 8) * 32 + lane / 8 % 2 * 16);
  float d[4] = {};
  const uint32_t pair[2] = {b[0], b[1]};
  mma_16816<T>(d, a, pair);
  float* out = reinterpret_cast<float*>(data + 192);
  for (int i = 0; i < 4; i++) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}
__global__ void multiply_half(int* data) { multiply<__half>(data); }
__global__ void multiply_bfloat16(int* data) { multiply<__nv_bfloat16>(data); }

// Launched after `slow_writer`, which it may overlap.
__global__ void slow_writer(int* data) {
  allow_next_launch();
  for (int i = 0; i < 8; i++) __syncthreads();
  data[threadIdx.x] = 7;
}
__global__ void waiting_reader(int* data) {
  wait_previous_launch();
  data[64 + threadIdx.x] = data[threadIdx.x];
}

}  // namespace
