// Queries the current device, and keeps the answers and the last error.
#include <atomic>
#include <mutex>

#include "device.cuh"

namespace apet::cuda {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kPortableCluster = 8;  // every device with clusters has this size
thread_local cudaError_t last_error = cudaSuccess;

// Returns whether a call succeeded that may fail: what it asks for is then left out.
bool supported(cudaError_t result) {
  if (result != cudaSuccess) (void)cudaGetLastError();  // it must not appear again in a later call
  return result == cudaSuccess;
}

// Queries how many clusters of each size run at once.
apet_status query_clusters(Kernel kernel, int shared_bytes, int (&clusters)[kMaxCluster + 1]) {
  APET_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  const bool beyond = supported(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  for (int size = 1; size <= (beyond ? kMaxCluster : kPortableCluster); size++) {
    cudaLaunchAttribute attribute = cluster_attribute(size);
    const cudaLaunchConfig_t config = launch_config(size, kThreads, shared_bytes, nullptr, &attribute);
    // An error for a size that the device or its partition cannot place means that there are no such clusters.
    if (!supported(cudaOccupancyMaxActiveClusters(&clusters[size], kernel, &config))) clusters[size] = 0;
  }
  return APET_OK;
}

// Queries how many CTAs run at once.
apet_status query_ctas(Kernel kernel, int threads, int shared_bytes, int sms, int& ctas) {
  int per_sm;
  APET_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  APET_TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, shared_bytes));
  ctas = per_sm * sms;
  return APET_OK;
}

// Queries the device, and raises the kernels' limit of shared memory to the amount that the device has.
apet_status query_device(int index, const Kernels& kernels, Device& device) {
  int major, minor, clusters, cooperative;
  APET_TRY(cudaDeviceGetAttribute(&device.sms, cudaDevAttrMultiProcessorCount, index));
  APET_TRY(cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  APET_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  APET_TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  APET_TRY(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, index));
  APET_TRY(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, index));
  device.capability = 10 * major + minor;
  *device.overlaps = major >= 9;
  apet_status status = APET_OK;
  if (clusters) {
    status = query_clusters(kernels.s1_s4_cluster, device.shared_bytes, device.s1_s4_clusters);
    if (status != APET_OK) return status;
    status = query_clusters(kernels.s1_s5_cluster, device.shared_bytes, device.s1_s5_clusters);
    if (status != APET_OK) return status;
    status = query_clusters(kernels.rounds_cluster, device.shared_bytes, device.rounds_clusters);
    if (status != APET_OK) return status;
    int clusters_of_medoids[kMaxCluster + 1] = {};
    status = query_clusters(kernels.medoids_cluster, device.shared_bytes, clusters_of_medoids);
    if (status != APET_OK) return status;
    for (int size = 1; size <= kMaxCluster; size++)
      device.rounds_clusters[size] = std::min(device.rounds_clusters[size], clusters_of_medoids[size]);
  }
  if (cooperative) {
    status = query_ctas(kernels.s1_s4_cooperative, kThreads, device.shared_bytes, device.sms, device.cooperative_ctas);
    if (status != APET_OK) return status;
    status = query_ctas(kernels.rounds_cooperative, kThreads, device.shared_bytes, device.sms, device.rounds_ctas);
    if (status != APET_OK) return status;
    int ctas_of_medoids;
    status = query_ctas(kernels.medoids_cooperative, kThreads, device.shared_bytes, device.sms, ctas_of_medoids);
    if (status != APET_OK) return status;
    device.rounds_ctas = std::min(device.rounds_ctas, ctas_of_medoids);
  }
  for (int i = 0; i < kMergeTiles; i++) {
    const MergeKernel& merge = kernels.s5_merge[i];
    if (!merge.kernel || merge.shared_bytes > device.shared_bytes) continue;
    status = query_ctas(merge.kernel, merge.threads, merge.shared_bytes, device.sms, device.merge_ctas[i]);
    if (status != APET_OK) return status;
  }
  device.known = true;
  return APET_OK;
}

}  // namespace

bool succeeded(cudaError_t result) {
  if (result == cudaSuccess) return true;
  last_error = result;
  (void)cudaGetLastError();  // reported here, so it must not appear again in a later call
  return false;
}

apet_status current_device(apet_dtype dtype, const Device*& device) {
  static Device devices[kMaxDevices][3];
  static std::atomic<bool> overlaps[kMaxDevices][3];
  static std::mutex mutex;
  int index;
  APET_TRY(cudaGetDevice(&index));
  APET_TRY(index < kMaxDevices ? cudaSuccess : cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(mutex);
  Device& entry = devices[index][dtype];
  device = &entry;
  if (entry.known) return APET_OK;
  entry = {};
  entry.overlaps = &overlaps[index][dtype];
  return query_device(index, kernels_for(dtype), entry);
}

}  // namespace apet::cuda

const char* apet_cuda_error(void) { return cudaGetErrorString(apet::cuda::last_error); }
