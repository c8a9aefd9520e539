// The limits of the current device, and calls of the CUDA runtime that may fail.
#pragma once
#include <atomic>

#include "kernels.cuh"

namespace apet::cuda {

// How many CTAs and clusters of the kernels of one dtype a device runs at once, if each CTA has all of the shared
// memory that it may have.
struct Device {
  bool known;
  int capability;  // 10 * major + minor
  int sms;
  int shared_bytes;                      // the most shared memory of a CTA
  std::atomic<bool>* overlaps;           // programmatic dependent launch, until one fails
  int s1_s4_clusters[kMaxCluster + 1];   // clusters of each size; 0: none
  int s1_s5_clusters[kMaxCluster + 1];   // clusters of each size; 0: none
  int rounds_clusters[kMaxCluster + 1];  // clusters of s1_s4_rounds and s4_medoids; 0: none
  int cooperative_ctas;                  // CTAs of a cooperative launch of s1_s4_group; 0: none
  int rounds_ctas;                       // CTAs of a cooperative launch of these; 0: none
  int merge_ctas[kMergeTiles];           // CTAs of each of Kernels::s5_merge; 0: none
};

// Returns the current device, queried once per process, device and dtype.
apet_status current_device(apet_dtype dtype, const Device*& device);

// Returns whether a call of the runtime succeeded. If not, apet_cuda_error() has the message.
bool succeeded(cudaError_t result);
#define APET_TRY(call) \
  if (!succeeded(call)) return APET_CUDA_FAILED

// Returns the CTAs of one of Kernels::s5_merge that run at once.
inline int merge_ctas(const apet_problem& p, const Device& device, const MergeKernel& merge) {
  return device.merge_ctas[&merge - kernels_for(p.dtype).s5_merge];
}

inline cudaLaunchConfig_t launch_config(unsigned grid, int threads, int shared_bytes, cudaStream_t stream,
                                        cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = attribute ? 1 : 0;
  return config;
}

inline cudaLaunchAttribute cluster_attribute(int size) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = size;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

}  // namespace apet::cuda
