// Runs the small kernels of test_simt.py by their names.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "selftest_computes.h"
#include "selftest_faults.h"

namespace {

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

// Runs a case on data [1024]. Returns NULL, or the message of the fault.
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

// For the sanitizers; arguments: name of the case, seed.
int main(int, char** arguments) {
  int* data = static_cast<int*>(std::calloc(1024, sizeof(int)));
  simt_use_seed((unsigned)std::atoi(arguments[2]));
  const char* fault = selftest(arguments[1], data);
  std::printf("%s\n", fault ? fault : "no fault");
  std::free(data);
  return fault != nullptr;
}
