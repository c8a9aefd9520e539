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
Call make_call(const apet_problem& p, const apet_tensors& tensors, const apet_cuda_plan_t& plan) {
  Call call = {};
  call.tensors = tensors;
  call.op = p.op;
  call.layout = p.layout;
  call.select = p.select;
  call.images = (int32_t)p.images;
  call.tokens = (int32_t)most_tokens(p);
  call.dim = (int32_t)p.dim;
  call.keep = (int32_t)most_kept(p);
  call.basis = basis_of(p);
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
  if (plan.launches == 2) {
    const MergeKernel& merge = merge_kernel_of(p, plan);
    const int64_t block = 32 * merge.chunks * (16 / element_size(p)), blocks = (p.dim + block - 1) / block;
    const int64_t tasks = merge.threads / 32;
    call.tiles = (int32_t)(tile_rows(p, merge) * tile_columns(p, merge));
    call.tile_columns = (int32_t)tile_columns(p, merge);
    call.list_tickets = (int32_t)list_parts(most_kept(p));
    call.mean_tickets = (int32_t)(((most_kept(p) + call.appended) * blocks + tasks - 1) / tasks);
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

// Launches s1_s4_group or s1_s5_cluster.
apet_status launch_first(const apet_problem& p, const apet_cuda_plan_t& plan, const Call& call, cudaStream_t stream) {
  const Kernels& kernels = kernels_for(p.dtype);
  Kernel kernel = plan.path == APET_CUDA_FUSED ? kernels.s1_s5_cluster : kernels.s1_s4_cluster;
  cudaLaunchAttribute attribute = cluster_attribute(plan.ctas_per_image);
  // Not all clusters must run at once: there is one per image, up to the largest grid.
  int64_t groups = std::min<int64_t>(p.images, INT_MAX / kMaxCluster);
  if (plan.path == APET_CUDA_COOPERATIVE) {
    kernel = kernels.s1_s4_cooperative;
    attribute = {};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    groups = plan.images_in_flight;
  }
  const cudaLaunchConfig_t config =
      launch_config((unsigned)(groups * plan.ctas_per_image), kThreads, plan.first_shared_bytes, stream, &attribute);
  APET_TRY(cudaLaunchKernelEx(&config, kernel, call));
  return APET_OK;
}

// Launches s5_merge, which may start while the first launch ends.
apet_status launch_second(const apet_problem& p, const Device& device, const apet_cuda_plan_t& plan, const Call& call,
                          cudaStream_t stream) {
  const MergeKernel& merge = merge_kernel_of(p, plan);
  const int ctas = device.merge_ctas[&merge - kernels_for(p.dtype).s5_merge];
  const double tickets = ((double)call.list_tickets + call.tiles + call.mean_tickets) * (p.images + 1.0);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config = launch_config((unsigned)std::min<double>(tickets, ctas), merge.threads,
                                                  merge.shared_bytes, stream, device.overlaps ? &attribute : nullptr);
  APET_TRY(cudaLaunchKernelEx(&config, merge.kernel, call));
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
  Call call = make_call(p, *tensors, *plan);
  if (!workspace || (uintptr_t)workspace % 64) return APET_SMALL_WORKSPACE;
  if (lay_out_workspace(p, *plan, workspace, call) > bytes) return APET_SMALL_WORKSPACE;
  status = launch_first(p, *plan, call, stream);
  if (status != APET_OK || plan->launches == 1) return status;
  return launch_second(p, *device, *plan, call, stream);
}
