// Small kernels for test_simt.py: what SIMT has to compute, and faults that it has to find.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <simt_ptx.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace cg = cooperative_groups;
using namespace apet::cuda;

namespace {

constexpr unsigned kAll = ~0u;
__device__ int* shared_ints() { return reinterpret_cast<int*>(shared_memory()); }
__device__ int global_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

// ---- right

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

// One of each primitive, folded into a number for each lane.
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

// Every block adds into every other block of its cluster; a split barrier between.
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

// Rounds of neighbours' sums through global memory, a barrier of the grid between.
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

// As many threads as a device holds at once, all of them alive at one barrier.
__global__ void full_device(int* data) {
  atomicAdd(&data[threadIdx.x], 1);
  cg::this_grid().sync();
}

// The last block to take a ticket adds up what the others have left.
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
    while (load_acquire(&words[1]) + 1 < ticket_count) {
    }
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

// out[16][8] = a[16][16] b[16][8] of 16-bit numbers that stand in data: a, then b transposed, both rows of 16.
template <class T>
__device__ void multiply(int* data) {
  int* s = shared_ints();
  for (int i = threadIdx.x; i < 24 * 8; i += 32) s[i] = data[i];
  __syncwarp();
  const int lane = threadIdx.x;
  uint32_t a[4], b[4];
  const unsigned char* rows = shared_memory();
  ldmatrix_x4(a, rows + (lane % 16) * 32 + lane / 16 * 16);
  // Twice the two matrices of b: what the upper lanes name is not used.
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

// ---- wrong, each in one way

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
__global__ void spin_forever(int* data) {
  while (load_acquire(reinterpret_cast<uint32_t*>(data)) == 0) {
  }
}
// Waits for a block that may have to wait for this one to end.
__global__ void wait_for_next_block(int* data) {
  uint32_t* flags = reinterpret_cast<uint32_t*>(data);
  add_release(&flags[blockIdx.x], 1);
  while (load_acquire(&flags[(blockIdx.x + 1) % gridDim.x]) == 0) {
  }
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

// ---- wrong in ways that the sanitizers have to find

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
    while (load_acquire(reinterpret_cast<uint32_t*>(data)) == 0) {
    }
    data[2] = data[1];
  }
}

// ---- the table

struct Case {
  const char* name;
  void (*kernel)(int*);
  unsigned blocks, threads, cluster;
  bool cooperative;
  void (*second)(int*);  // launched after it, overlapping
};
#define CASE(kernel, ...) {#kernel, kernel, __VA_ARGS__, nullptr}
const Case kCases[] = {
    CASE(barriers, 2, 256, 1, false),
    CASE(warps, 2, 96, 1, false),
    CASE(clusters, 8, 64, 4, false),
    CASE(grids, 6, 32, 1, true),
    CASE(full_device, 32, 1024, 1, true),
    CASE(tickets, 9, 32, 1, false),
    CASE(copies, 1, 64, 1, false),
    CASE(multiply_half, 1, 32, 1, false),
    CASE(multiply_bfloat16, 1, 32, 1, false),
    {"overlap", slow_writer, 1, 64, 1, false, waiting_reader},
    CASE(skipped_barrier, 1, 64, 1, false),
    CASE(two_barriers, 1, 64, 1, false),
    CASE(early_exit, 1, 64, 1, false),
    CASE(mask_without_caller, 1, 32, 1, false),
    CASE(mask_too_wide, 1, 64, 1, false),
    CASE(absent_source, 1, 32, 1, false),
    CASE(different_primitives, 1, 32, 1, false),
    CASE(spin_forever, 2, 32, 1, false),
    CASE(wait_for_next_block, 6, 32, 1, false),
    CASE(peer_has_exited, 2, 32, 2, false),
    CASE(peer_has_not_begun, 2, 32, 2, false),
    CASE(cluster_barrier, 2, 32, 2, false),
    CASE(grid_barrier, 2, 32, 1, false),
    CASE(misaligned_copy, 1, 32, 1, false),
    CASE(copy_outside, 1, 32, 1, false),
    CASE(copy_without_wait, 1, 32, 1, false),
    CASE(copy_wait_too_short, 1, 64, 1, false),
    {"overlap_without_wait", slow_writer, 1, 64, 1, false, hasty_reader},
    CASE(unwritten_shared, 1, 32, 1, false),
    CASE(past_the_end, 1, 32, 1, false),
    CASE(past_shared, 1, 64, 1, false),
    CASE(missing_barrier, 1, 64, 1, false),
    CASE(missing_syncwarp, 1, 32, 1, false),
    CASE(copy_without_barrier, 1, 64, 1, false),
    CASE(plain_flag, 2, 32, 1, true),
};

cudaError_t launch(const Case& c, void (*kernel)(int*), bool overlapping, int* data) {
  cudaLaunchAttribute attributes[3];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {c.cluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = c.cooperative;
  attributes[2].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[2].val.programmaticStreamSerializationAllowed = overlapping;
  cudaLaunchConfig_t config = {};
  config.gridDim = c.blocks;
  config.blockDim = c.threads;
  config.dynamicSmemBytes = 32 * c.threads;
  config.attrs = attributes;
  config.numAttrs = 3;
  return cudaLaunchKernelEx(&config, kernel, data);
}

}  // namespace

extern "C" {

// Runs a case on data [1024]; NULL, or what went wrong.
const char* selftest(const char* name, int* data) {
  for (const Case& c : kCases) {
    if (std::strcmp(c.name, name)) continue;
    cudaError_t error = launch(c, c.kernel, false, data);
    if (error == cudaSuccess && c.second) error = launch(c, c.second, true, data);
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  return "no such case";
}

// n numbers from 16 bits to float, or back.
void selftest_half(__half* narrow, float* wide, int n, int back) {
  for (int i = 0; i < n; i++) {
    if (back) narrow[i] = __float2half_rn(wide[i]);
    else wide[i] = __half2float(narrow[i]);
  }
}
void selftest_bfloat16(__nv_bfloat16* narrow, float* wide, int n, int back) {
  for (int i = 0; i < n; i++) {
    if (back) narrow[i] = __float2bfloat16_rn(wide[i]);
    else wide[i] = __bfloat162float(narrow[i]);
  }
}

void simt_use_seed(unsigned seed);
}

// For the sanitizers: name of the case, seed.
int main(int, char** arguments) {
  int* data = static_cast<int*>(std::calloc(1024, sizeof(int)));
  simt_use_seed((unsigned)std::atoi(arguments[2]));
  const char* fault = selftest(arguments[1], data);
  std::printf("%s\n", fault ? fault : "no fault");
  std::free(data);
  return fault != nullptr;
}
