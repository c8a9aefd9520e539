// The ops on CPU tensors. Outputs and workspace are from torch's allocator, threads from its pool.
#include "torch_ops.h"

namespace {

void in_torchs_pool(void*, int64_t tasks, apet_task task, void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { task(context, begin, end); });
}

constexpr size_t kOnStack = 32768;  // bytes of a workspace that needs no allocation

void run(const apet_problem& p, const apet_tensors& tensors, const Tensor& x) {
  const apet_pool pool = {(int32_t)torch::stable::get_num_threads(), nullptr, in_torchs_pool};
  {
    alignas(64) char workspace[kOnStack];
    const apet_status status = apet_cpu_run(&p, &tensors, &pool, workspace, sizeof workspace);
    if (status != APET_SMALL_WORKSPACE) return check(p, status);
  }
  apet_cpu_plan_t plan;
  check(p, apet_cpu_plan(&p, pool.threads, &plan));
  // 64 spare bytes: the workspace must be aligned whatever allocator torch uses.
  Tensor workspace = empty_beside(x, {(int64_t)plan.workspace_bytes + 64}, aoti_torch_dtype_uint8());
  const uintptr_t address = ((uintptr_t)workspace.mutable_data_ptr() + 63) / 64 * 64;
  check(p, apet_cpu_run(&p, &tensors, &pool, (void*)address, plan.workspace_bytes));
}

}  // namespace

APET_IMPLEMENTS(CPU, m) {
  m.impl("compress", TORCH_BOX(&compress));
  m.impl("compress_varlen", TORCH_BOX(&compress_varlen));
  m.impl("score", TORCH_BOX(&score));
  m.impl("merge", TORCH_BOX(&merge));
}
