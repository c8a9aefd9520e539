// Enqueues the launches of a planned call. Reads no data and does not wait for the device.
#include "device.cuh"
#include "layout.cuh"

namespace apet::cuda {
namespace {

// Returns whether an address and all strides are multiples of 16 bytes.
bool aligned(const void* pointer, std::initializer_list<int64_t> strides, int64_t element_bytes) {
  bool all_aligned = (uintptr_t)pointer % 16 == 0;
  for (int64_t stride : strides) all_aligned = all_aligned && stride * element_bytes % 16 == 0;
  return all_aligned;
}

// Makes the argument of the kernels, except for the workspace.
Call make_call(const apet_problem& p, const Device& device, const apet_tensors& tensors, const apet_cuda_plan_t& plan) {
  Call call = {};
  call.tensors = tensors;
  if (p.op != APET_COMPRESS) call.tensors.weights = nullptr;  // the other ops ignore them
  call.op = p.op;
  call.layout = p.layout;
  call.select = p.select;
  call.images = (int32_t)p.images;
  call.tokens = (int32_t)most_tokens(p);
  call.dim = (int32_t)p.dim;
  call.keep = (int32_t)most_kept(p);
  call.basis = basis_of(p);
  if (p.op == APET_COMPRESS) {
    call.rounds_basis = !apet::in_rounds(p) ? 0 : p.basis == APET_BASIS_KEEP ? INT_MAX : p.basis;
    call.refine = (int32_t)p.refine;
    call.most = most_of_round(p);
  }
  call.ragged = p.ragged;
  call.appended = (int32_t)appended(p);
  call.start = p.op == APET_MERGE ? -1 : p.start;
  call.stride_xb = p.stride_xb;
  call.stride_xn = p.stride_xn;
  call.total_tokens = p.total_tokens;
  call.total_keep = p.total_keep;
  call.ridge = p.ridge;
  call.blend = (float)p.blend;
  const int64_t stride_xb = p.images > 1 && !p.ragged ? p.stride_xb : 0;
  call.whole_in = aligned(tensors.x, {p.dim, p.stride_xn, stride_xb}, element_size(p));
  call.whole_out = aligned(tensors.tokens, {p.dim}, element_size(p));
  call.ctas_per_image = plan.ctas_per_image;
  call.images_in_flight = plan.images_in_flight;
  call.resident = plan.resident;
  call.state_shared = plan.state_shared;
  call.basis_shared = plan.basis_shared;
  call.pitch = (int32_t)std::min<int64_t>(row_pitch(row_bytes(p)), INT_MAX);
  call.map = shared_map(p, plan);
  if (plan.second_shared_bytes > 0) {
    const MergeKernel& merge = merge_kernel_of(p, plan);
    const int64_t warps = merge.threads / 32, tasks = warps * means_of_ticket(p, merge, merge_ctas(p, device, merge));
    call.tiles = (int32_t)(tile_rows(p, merge) * tile_columns(p, merge));
    call.tile_columns = (int32_t)tile_columns(p, merge);
    call.list_tickets = (int32_t)list_parts(most_kept(p));
    call.mean_tasks = (int32_t)tasks;
    call.mean_tickets = (int32_t)((mean_tasks(p, merge) + tasks - 1) / tasks);
  }
  return call;
}

// Zeroes the result of an empty call.
apet_status zero_result(const apet_problem& p, const apet_tensors& tensors, cudaStream_t stream) {
  const int64_t rows = all_rows(p);
  if (rows == 0) return APET_OK;
  APET_TRY(cudaMemsetAsync(tensors.tokens, 0, rows * row_bytes(p), stream));
  if (p.op == APET_COMPRESS) APET_TRY(cudaMemsetAsync(tensors.indices, 0, rows * sizeof(int64_t), stream));
  return APET_OK;
}

// Launches a kernel of groups, as the plan places them.
apet_status launch_groups(const apet_problem& p, const apet_cuda_plan_t& plan, Kernel kernel, const Call& call,
                          cudaStream_t stream) {
  cudaLaunchAttribute attribute = cluster_attribute(plan.ctas_per_image);
  if (plan.path == APET_CUDA_COOPERATIVE) {
    attribute = {};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  const cudaLaunchConfig_t config =
      launch_config((unsigned)(groups_of(p, plan) * plan.ctas_per_image), kThreads, call.map.total, stream, &attribute);
  APET_TRY(cudaLaunchKernelEx(&config, kernel, call));
  return APET_OK;
}

// Launches s1_s4_group, s1_s4_rounds or s1_s5_cluster.
apet_status launch_first(const apet_problem& p, const apet_cuda_plan_t& plan, const Call& call, cudaStream_t stream) {
  const Kernels& kernels = kernels_for(p.dtype);
  const bool cooperative = plan.path == APET_CUDA_COOPERATIVE;
  const Kernel kernel = plan.path == APET_CUDA_FUSED ? kernels.s1_s5_cluster
                        : has_rounds(p) ? (cooperative ? kernels.rounds_cooperative : kernels.rounds_cluster)
                        : cooperative   ? kernels.s1_s4_cooperative
                                        : kernels.s1_s4_cluster;
  return launch_groups(p, plan, kernel, call, stream);
}

apet_status launch_medoids(const apet_problem& p, const apet_cuda_plan_t& plan, Call call, cudaStream_t stream) {
  const Kernels& kernels = kernels_for(p.dtype);
  call.map = medoids_map(p);
  return launch_groups(p, plan,
                       plan.path == APET_CUDA_COOPERATIVE ? kernels.medoids_cooperative : kernels.medoids_cluster, call,
                       stream);
}

// Launches s5_merge, which may start while the launch before it ends. Where a driver or a capture does not allow that, it
// is an ordinary launch, then and later.
apet_status launch_merge(const apet_problem& p, const Device& device, const apet_cuda_plan_t& plan, const Call& call,
                         cudaStream_t stream) {
  const MergeKernel& merge = merge_kernel_of(p, plan);
  const int ctas = merge_ctas(p, device, merge);
  const double tickets = ((double)call.list_tickets + call.tiles + call.mean_tickets) * (p.images + 1.0);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  const unsigned grid = (unsigned)std::min<double>(tickets, ctas);
  const auto launched = [&](cudaLaunchAttribute* with) {
    const cudaLaunchConfig_t config = launch_config(grid, merge.threads, merge.shared_bytes, stream, with);
    return succeeded(cudaLaunchKernelEx(&config, merge.kernel, call));
  };
  if (*device.overlaps && launched(&attribute)) return APET_OK;
  if (!launched(nullptr)) return APET_CUDA_FAILED;
  *device.overlaps = false;
  return APET_OK;
}

}  // namespace
}  // namespace apet::cuda

using namespace apet::cuda;

apet_status apet_cuda_run(const apet_problem* problem, const apet_tensors* tensors, const apet_cuda_plan_t* plan,
                          void* workspace, size_t bytes, void* stream_) {
  apet_status status = apet_check(problem);
  if (status != APET_OK) return status;
  if (!tensors || !plan) return APET_NULL_POINTER;
  const apet_problem& p = *problem;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (apet::missing_pointer(p, *tensors)) return APET_NULL_POINTER;
  if (empty(p)) return zero_result(p, *tensors, stream);
  const Device* device;
  status = current_device(p.dtype, device);
  if (status != APET_OK) return status;
  Call call = make_call(p, *device, *tensors, *plan);
  if (!workspace || (uintptr_t)workspace % 64) return APET_SMALL_WORKSPACE;
  if (lay_out_workspace(p, *plan, workspace, call) > bytes) return APET_SMALL_WORKSPACE;
  status = launch_first(p, *plan, call, stream);
  if (status == APET_OK && refines(p)) status = launch_medoids(p, *plan, call, stream);
  if (status != APET_OK || plan->second_shared_bytes == 0) return status;
  return launch_merge(p, *device, *plan, call, stream);
}
