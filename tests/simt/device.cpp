// The host's side of CUDA's runtime API on the simulated device, and the functions for Python.
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "include/cuda_host_api.h"
#include "runtime.h"

namespace {

struct KernelAttributes {
  int shared = 48 << 10;  // what a launch may ask for
  bool large_clusters = false;
};

std::mutex mutex;
std::vector<simt::Device> devices = {simt::device};
int current = 0;
std::map<std::pair<int, const void*>, KernelAttributes> attributes;  // by device and kernel
std::vector<std::string> launches;                                   // since they were last counted
cudaError_t last_error = cudaSuccess;
bool refuses_overlaps = false, refuses_large_clusters = false;  // as some drivers do

cudaError_t keep(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidClusterSize: return "cudaErrorInvalidClusterSize";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
  }
  return "unknown";
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? simt::last_fault().c_str() : cudaGetErrorName(error);
}
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const simt::Device& d = simt::device;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = d.multiprocessors; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = d.threads_per_multiprocessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = d.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = d.capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = d.shared_per_multiprocessor; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = d.shared_per_block; break;
    case cudaDevAttrClusterLaunch: *value = d.largest_cluster > 0; break;
    default: return keep(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(mutex);
  launches.push_back("memset of " + std::to_string(bytes) + " bytes");
  simt::Launch set;
  set.body = [=] { std::memset(memory, value, bytes); };
  simt::enqueue(stream, std::move(set));
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return keep(simt::run() ? cudaSuccess : cudaErrorLaunchFailure); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }

namespace simt {

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  std::lock_guard<std::mutex> lock(mutex);
  KernelAttributes& a = attributes[{current, kernel}];
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > device.shared_per_block) return keep(cudaErrorInvalidValue);
    a.shared = value;
  }
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed && refuses_large_clusters)
    return keep(cudaErrorNotSupported);
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) a.large_clusters = value != 0;
  return cudaSuccess;
}

namespace {

// Returns the error that a GPU would give for the launch. The caller must hold the mutex.
cudaError_t check(const void* kernel, const Launch& launch) {
  const dim3 g = launch.grid, b = launch.block;
  const size_t threads = size_t(b.x) * b.y * b.z, blocks = size_t(g.x) * g.y * g.z;
  const KernelAttributes& a = attributes[{current, kernel}];
  if (threads == 0 || threads > 1024 || blocks == 0 || g.x >= 1u << 31 || g.y > 65535 || g.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (launch.shared > (size_t)a.shared) return cudaErrorInvalidValue;
  const int each = blocks_per_multiprocessor(threads, launch.shared);
  if (each == 0) return cudaErrorLaunchOutOfResources;
  if (launch.cooperative && blocks > size_t(each) * device.multiprocessors) return cudaErrorCooperativeLaunchTooLarge;
  if (launch.cluster == 1) return cudaSuccess;
  if (device.largest_cluster == 0) return cudaErrorNotSupported;
  if (launch.cluster == 0 || g.x % launch.cluster || (int)launch.cluster > device.largest_cluster ||
      launch.cluster > (a.large_clusters ? 16u : 8u) || launch.cluster > unsigned(each * device.multiprocessors))
    return cudaErrorInvalidClusterSize;
  return cudaSuccess;
}

cudaError_t read(const cudaLaunchConfig_t& config, Launch& launch) {
  launch.grid = config.gridDim, launch.block = config.blockDim, launch.shared = config.dynamicSmemBytes;
  for (unsigned i = 0; i < config.numAttrs; i++) {
    const cudaLaunchAttributeValue& value = config.attrs[i].val;
    switch (config.attrs[i].id) {
      case cudaLaunchAttributeCooperative: launch.cooperative = value.cooperative; break;
      case cudaLaunchAttributeClusterDimension:
        if (value.clusterDim.y != 1 || value.clusterDim.z != 1) return cudaErrorInvalidClusterSize;
        launch.cluster = value.clusterDim.x;
        break;
      case cudaLaunchAttributeProgrammaticStreamSerialization:
        if (device.capability < 90 || refuses_overlaps) return cudaErrorNotSupported;
        launch.overlaps = value.programmaticStreamSerializationAllowed;
        break;
      default: return cudaErrorInvalidValue;
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, std::function<void()> body) {
  std::lock_guard<std::mutex> lock(mutex);
  Launch launch;
  cudaError_t error = read(config, launch);
  if (error == cudaSuccess) error = check(kernel, launch);
  if (error != cudaSuccess) return keep(error);
  launches.push_back(std::to_string(launch.grid.x * launch.grid.y * launch.grid.z) + " blocks of " +
                     std::to_string(launch.block.x * launch.block.y * launch.block.z) + " threads, " +
                     std::to_string(launch.shared) + " bytes" +
                     (launch.cluster > 1 ? ", clusters of " + std::to_string(launch.cluster) : "") +
                     (launch.cooperative ? ", cooperative" : "") + (launch.overlaps ? ", overlapping" : ""));
  launch.body = std::move(body);
  enqueue(config.stream, std::move(launch));
  return cudaSuccess;
}

cudaError_t resident_blocks(int* count, const void* kernel, int threads, size_t shared) {
  std::lock_guard<std::mutex> lock(mutex);
  *count = shared > (size_t)attributes[{current, kernel}].shared ? 0 : blocks_per_multiprocessor(threads, shared);
  return cudaSuccess;
}

cudaError_t resident_clusters(int* count, const void* kernel, const cudaLaunchConfig_t& config) {
  std::lock_guard<std::mutex> lock(mutex);
  *count = 0;
  Launch launch;
  cudaError_t error = read(config, launch);
  if (error == cudaSuccess) error = check(kernel, launch);
  if (error != cudaSuccess) return keep(error);
  const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
  *count = blocks_per_multiprocessor(threads, launch.shared) * device.multiprocessors / (int)launch.cluster;
  return cudaSuccess;
}

}  // namespace simt

// ---- for ctypes

extern "C" {

// Makes the GPU with these traits the current device. The same traits always give the same device number.
void simt_use_device(int capability, int multiprocessors, int shared_per_block, int shared_per_multiprocessor,
                     int largest_cluster) {
  std::lock_guard<std::mutex> lock(mutex);
  simt::device = {capability, multiprocessors, shared_per_block, shared_per_multiprocessor, 2048, largest_cluster};
  const auto found = std::find(devices.begin(), devices.end(), simt::device);
  current = (int)(found - devices.begin());
  if (found == devices.end()) devices.push_back(simt::device);
}

// Makes the driver refuse overlapping launches, or clusters of more than 8.
void simt_refuse(int overlaps, int large_clusters) {
  std::lock_guard<std::mutex> lock(mutex);
  refuses_overlaps = overlaps, refuses_large_clusters = large_clusters;
}

void simt_use_seed(unsigned seed) { simt::set_seed(seed); }

// Runs all launches. Returns NULL, or the message of the fault that ended them.
const char* simt_run() { return simt::run() ? nullptr : simt::last_fault().c_str(); }

// Returns the launches since the last call of this function, a line each.
const char* simt_launches() {
  static std::string text;
  std::lock_guard<std::mutex> lock(mutex);
  text.clear();
  for (const std::string& launch : launches) text += launch + "\n";
  launches.clear();
  return text.c_str();
}
}
