// The CUDA runtime with which launch.cu is linked here: a simulated device, launches that the interpreter runs at once,
// and functions for Python. nvcc compiles the host code, so Call has the layout that the kernels expect.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "machine.h"

extern "C" size_t ptx_call_bytes();  // workspace.cu

namespace {

struct Device {
  int capability, multiprocessors, shared_per_block, shared_per_multiprocessor, largest_cluster;
  bool operator==(const Device& d) const { return !std::memcmp(this, &d, sizeof d); }
};
std::vector<Device> devices;
int current = 0;

struct Host {  // a kernel as registered by the host code
  std::string name;
  int shared = 48 << 10;
  bool large_clusters = false;
};
std::map<const void*, Host> hosts;
std::map<std::string, std::map<std::string, ptx::Kernel>> modules;
std::map<std::string, ptx::Kernel>* module = nullptr;
unsigned seed = 0;
std::string failure, launches;
cudaError_t last_error = cudaSuccess;
bool broken = false;  // a kernel has failed; as on a GPU, all later launches fail

cudaError_t keep(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

int resident(int threads, size_t shared) {
  const Device& d = devices[current];
  return std::min(2048 / threads, (int)(d.shared_per_multiprocessor / (shared + 1024)));
}

// Reads the attributes. Returns the error that a GPU would give.
cudaError_t read(const cudaLaunchConfig_t& config, const void* function, ptx::Launch& launch) {
  const Device& d = devices[current];
  const Host& host = hosts.at(function);
  launch.grid = config.gridDim.x, launch.block = config.blockDim.x, launch.cluster = 1;
  launch.shared = config.dynamicSmemBytes;
  launch.cooperative = launch.dependent = false;
  if (config.gridDim.y != 1 || config.gridDim.z != 1 || config.blockDim.y != 1 || config.blockDim.z != 1 ||
      !launch.grid || !launch.block || launch.block % 32)
    return cudaErrorInvalidConfiguration;
  for (unsigned i = 0; i < config.numAttrs; i++) {
    const cudaLaunchAttribute& a = config.attrs[i];
    if (a.id == cudaLaunchAttributeCooperative) launch.cooperative = a.val.cooperative;
    else if (a.id == cudaLaunchAttributeClusterDimension) launch.cluster = a.val.clusterDim.x;
    else if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      launch.dependent = a.val.programmaticStreamSerializationAllowed;
    else return cudaErrorInvalidValue;
  }
  if ((int)launch.shared > host.shared) return cudaErrorInvalidValue;
  const int each = resident((int)launch.block, launch.shared);
  if (!each) return cudaErrorLaunchOutOfResources;
  if (launch.cooperative && launch.grid > (unsigned)(each * d.multiprocessors))
    return cudaErrorCooperativeLaunchTooLarge;
  if (launch.dependent && d.capability < 90) return cudaErrorNotSupported;
  const bool places = (int)launch.cluster <= std::min(d.largest_cluster, host.large_clusters ? 16 : 8) &&
                      launch.grid % launch.cluster == 0 && launch.cluster <= (unsigned)(each * d.multiprocessors);
  return launch.cluster > 1 && !places ? cudaErrorInvalidClusterSize : cudaSuccess;
}

}  // namespace

extern "C" {

// ---- functions that nvcc's host code calls

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  hosts[host].name = name;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, CUstream_st*) { return cudaErrorNotSupported; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }

const char* cudaGetErrorString(cudaError_t error) {
  static char text[32];
  if (error == cudaErrorLaunchFailure) return failure.c_str();
  std::snprintf(text, sizeof text, "cudaError %d", (int)error);
  return text;
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const Device& d = devices[current];
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = d.multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = d.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = d.capability % 10; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = d.shared_per_block; break;
    case cudaDevAttrClusterLaunch: *value = d.largest_cluster > 0; break;
    default: return keep(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > devices[current].shared_per_block) return keep(cudaErrorInvalidValue);
    hosts.at(function).shared = value;
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    hosts.at(function).large_clusters = value;
  } else {
    return keep(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int threads, size_t shared,
                                                                   unsigned) {
  *count = resident(threads, shared);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* function, const cudaLaunchConfig_t* config) {
  *count = 0;
  ptx::Launch launch;
  if (const cudaError_t error = read(*config, function, launch)) return keep(error);
  *count = resident((int)launch.block, launch.shared) * devices[current].multiprocessors / (int)launch.cluster;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  for (auto& memory : ptx::arrays.all)
    if (memory->bytes == at) std::fill_n(memory->defined.begin(), bytes, 1);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  if (broken) return keep(cudaErrorLaunchFailure);
  ptx::Launch launch;
  if (const cudaError_t error = read(*config, function, launch)) return keep(error);
  const std::string& name = hosts.at(function).name;
  launches += name + "\n";
  try {
    if (!module || !module->count(name)) ptx::fault("no PTX of %s is loaded", name.c_str());
    launch.kernel = &module->at(name);
    if (launch.kernel->parameter_bytes != ptx_call_bytes())
      ptx::fault("%s takes %zu bytes, Call has %zu", name.c_str(), launch.kernel->parameter_bytes, ptx_call_bytes());
    if (launch.block > launch.kernel->threads)
      ptx::fault("%u threads, .maxntid is %u", launch.block, launch.kernel->threads);
    const uint8_t* bytes = static_cast<const uint8_t*>(arguments[0]);
    launch.parameters.assign(bytes, bytes + launch.kernel->parameter_bytes);
    ptx::run(launch, seed);
  } catch (const ptx::Fault& fault) {
    failure = fault.message;
    broken = true;
    return keep(cudaErrorLaunchFailure);
  }
  return cudaSuccess;
}

// ---- for Python

void ptx_device(int capability, int multiprocessors, int shared_per_block, int shared_per_multiprocessor,
                int largest_cluster) {
  const Device device = {capability, multiprocessors, shared_per_block, shared_per_multiprocessor, largest_cluster};
  const auto found = std::find(devices.begin(), devices.end(), device);
  current = (int)(found - devices.begin());
  if (found == devices.end()) devices.push_back(device);
}

// Uses the kernels of a text for later launches. Returns NULL, or the error in the text.
const char* ptx_load(const char* key, const char* text) {
  try {
    if (!modules.count(key)) modules[key] = ptx::parse(text);
    module = &modules.at(key);
    return nullptr;
  } catch (const ptx::Fault& fault) {
    failure = fault.message;
    return failure.c_str();
  }
}
void ptx_forget(const char* key) {
  const auto found = modules.find(key);
  if (found == modules.end()) return;  // it could not be loaded
  if (module == &found->second) module = nullptr;
  for (const auto& [name, kernel] : found->second) ptx::executed.erase(&kernel);
  modules.erase(found);
}

void ptx_begin(unsigned schedule, int truncates) {
  ptx::arrays = {};
  ptx::executed.clear();
  broken = false;
  seed = schedule;
  ptx::matrix = truncates ? ptx::Matrix::kTruncates : ptx::Matrix::kExact;
}
void ptx_array(const char* name, const void* at, int64_t bytes, int writable, const uint8_t* defined) {
  ptx::arrays.add(name, at, bytes, writable, defined);
}
// Bytes of an array that no launch has written.
int64_t ptx_unwritten(const char* name) {
  for (const auto& memory : ptx::arrays.all)
    if (memory->name == name) return std::count(memory->defined.begin(), memory->defined.end(), 0);
  return 0;
}

// Returns the mangled names of the kernels launched since the last call of this function, a line each.
const char* ptx_launches() {
  static std::string text;
  text = std::exchange(launches, "");
  return text.c_str();
}

// Returns "line count" for every instruction of a text: how often it was executed since ptx_begin.
const char* ptx_executed(const char* key) {
  static std::string text;
  text.clear();
  for (const auto& [name, kernel] : modules[key]) {
    const auto found = ptx::executed.find(&kernel);
    for (size_t i = 0; i < kernel.code.size(); i++)
      text += std::to_string(kernel.code[i].line) + " " +
              std::to_string(found == ptx::executed.end() ? 0 : found->second[i]) + "\n";
  }
  return text.c_str();
}
}
