// csrc/cuda_torch_binding.cpp on CPU tensors: the same source, with stand-ins for the four parts of it that need a GPU.
// The kernels of a call run before it returns, since torch's CPU allocator may then reuse the workspace.
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "apet_testing.h"
#include "torch_ops.h"

extern "C" const char* simt_run();

namespace {

constexpr int kStream = 0x51;  // what torch would say is the current stream of the device of x
int guards = 0;                // alive

struct Guard {
  explicit Guard(int32_t device) {
    require(device == 0 || device == -1, "the guard is for device ", device);  // the CPU's index
    guards++;
  }
  ~Guard() { guards--; }
};

apet_status plan_guarded(const apet_problem* problem, const apet_cuda_override* override, apet_cuda_plan_t* plan) {
  require(guards == 1, "planned for another device than that of x");
  return apet_cuda_plan_with(problem, override, plan);
}

apet_status run_at_once(const apet_problem* problem, const apet_tensors* tensors, const apet_cuda_plan_t* plan,
                        void* workspace, size_t bytes, void* stream) {
  require(guards == 1, "enqueued on another device than that of x");
  require((intptr_t)stream == kStream, "enqueued on another stream than the current one");
  const apet_status status = apet_cuda_run(problem, tensors, plan, workspace, bytes, stream);
  const char* fault = simt_run();
  require(!fault, fault ? fault : "");
  return status;
}

}  // namespace

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = (void*)(intptr_t)kStream;
  return AOTI_TORCH_SUCCESS;
}

namespace torch::stable::accelerator {
using SimulatedGuard = Guard;
}

#define CUDA CPU
#define DeviceGuard SimulatedGuard
#define apet_cuda_plan_with plan_guarded
#define apet_cuda_run run_at_once
#include "cuda_torch_binding.cpp"
