// The ops on CUDA tensors, as torch.ops.apet._cuda_*: apet_kernels/dispatch.py chooses the calls that run here. Outputs
// and workspace are from torch's allocator; the kernels run on its current stream, and nothing here synchronises.
#include <torch/csrc/stable/accelerator.h>

#include "apet_testing.h"
#include "cuda/figures.cuh"
#include "torch_ops.h"

namespace {

// The path that apet_kernels.testing forces on the calls of this thread; by default none.
constexpr apet_cuda_override kNone = {APET_CUDA_BEST, 0, -1, 0, 0};
thread_local apet_cuda_override forced = kNone;

void check_cuda(const apet_problem& problem, const apet_cuda_plan_t& plan, apet_status status) {
  require(status != APET_CUDA_FAILED, "a call of the CUDA runtime failed: ", apet_cuda_error());
  require(status != APET_NO_CUDA_PATH, plan.why);
  check(problem, status);
}

apet_cuda_plan_t plan_for(const apet_problem& p, const apet_cuda_override& override = forced) {
  apet_cuda_plan_t plan = {};
  check_cuda(p, plan, apet_cuda_plan_with(&p, &override, &plan));
  return plan;
}

void run(const apet_problem& p, const apet_tensors& tensors, const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const apet_cuda_plan_t plan = plan_for(p);
  // Freed as soon as this returns, which is before the kernels run: torch's allocator hands it out again on this stream
  // only, behind them. It aligns to 512 bytes.
  Tensor workspace = empty_beside(x, {(int64_t)plan.workspace_bytes}, aoti_torch_dtype_uint8());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  check_cuda(p, plan, apet_cuda_run(&p, &tensors, &plan, workspace.mutable_data_ptr(), plan.workspace_bytes, stream));
}

constexpr const char* kPaths[] = {"best", "fused", "cluster", "cooperative"};  // in the order of apet_cuda_path

// Forces a path on the later calls of this thread. The first argument is any tensor on a GPU: its device selects this
// implementation.
void override_plans(const Tensor&, std::string path, int64_t ctas_per_image, int64_t resident, int64_t tile,
                    int64_t tile_rows) {
  for (int i = 0; i < 4; i++) {
    if (path != kPaths[i]) continue;
    forced = {(apet_cuda_path)i, (int32_t)ctas_per_image, (int32_t)resident, (int32_t)tile, (int32_t)tile_rows};
    return;
  }
  require(false, "path='", path, "' is none of best, fused, cluster, cooperative");
}

// Returns how compress would run, for apet_kernels.plan, in the order of the schema in apet_kernels/ops.py.
std::tuple<std::string, std::string, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double>
plan(const Tensor& x, int64_t keep, std::optional<int64_t> basis, std::string layout, std::string select, int64_t start,
     double ridge, double blend, int64_t refine) {
  const apet_problem p = compress_problem(readable(x), keep, basis, layout, select, start, ridge, blend, refine);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const apet_cuda_plan_t g = plan_for(p);
  return {g.why,      kPaths[g.path], g.launches,  g.ctas_per_image,           g.images_in_flight, g.slice,
          g.resident, g.tile,         g.tile_rows, (int64_t)g.workspace_bytes, g.estimated_us};
}

// Returns the estimate in us of `compress` by the paper's rule, of one image of `tokens` tokens as in like [*, D].
double estimate(const Tensor& like, int64_t tokens, int64_t keep) {
  apet_problem p = problem_of(APET_COMPRESS, like, true);
  p.ragged = 0;
  p.images = 1;
  p.tokens = tokens;
  p.keep = keep;
  set_basis(p, 10, "fps", -1, 1e-5, keep);
  check(p, apet_check(&p));
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  return plan_for(p, kNone).estimated_us;
}

// Returns the figures of the estimate for a compute capability, 10 * major + minor, without the first member.
std::tuple<double, double, double, double, double, double, double, double, double, double, double, double, double,
           double, double, double, double, double>
figures(const Tensor&, int64_t capability) {
  const auto& [row, launch, overlapped, cluster, cooperative, lists, s4_token, group, fill, term, elements, l2,
               l2_share, l2_bytes, memory, flops_16, flops_32, triton_16, pick] =
      apet::cuda::figures_for((int)capability);
  return {launch,   overlapped, cluster,  cooperative, lists,  s4_token, group,    fill,      term,
          elements, l2,         l2_share, l2_bytes,    memory, flops_16, flops_32, triton_16, pick};
}

}  // namespace

APET_IMPLEMENTS(CUDA, m) {
  m.impl("_cuda_compress", TORCH_BOX(&compress));
  m.impl("_cuda_compress_varlen", TORCH_BOX(&compress_varlen));
  m.impl("_cuda_score", TORCH_BOX(&score));
  m.impl("_cuda_merge", TORCH_BOX(&merge));
  m.impl("_cuda_plan", TORCH_BOX(&plan));
  m.impl("_cuda_override", TORCH_BOX(&override_plans));
  m.impl("_cuda_estimate", TORCH_BOX(&estimate));
  m.impl("_cuda_figures", TORCH_BOX(&figures));
}
