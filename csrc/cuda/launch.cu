// Chooses the path of a call, cuts it, and enqueues its launches. Nothing here looks at data or waits for the device.
//
// What a device can do is asked of it, once a process: shared memory, occupancy, clusters, cooperative launches. Which
// of the possible paths is taken is one comparison of estimates (docs/cuda.md has the figures and where they come
// from).
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdio>
#include <mutex>

#include "kernels.cuh"

namespace apet::cuda {
namespace {

// ---- the estimate: microseconds, bytes and operations a microsecond. Computed for an H100; only their order decides.
constexpr double kLaunchUs = 2.5, kOverlappedLaunchUs = 1.5;
constexpr double kStepUs[2] = {1.2, 2.0};    // barrier and exchange of a step: cluster, cooperative
constexpr double kListsUs = 2, kFillUs = 1;  // s4; the first bytes from memory
constexpr double kTermUs = 0.01;             // of a token's own algebra: a float64 fma after another, 16 cycles
constexpr double kElementsPerSm = 76e3;  // widened and multiplied: 128 lanes, 2 instructions, 70 % of the issue slots
constexpr double kL2PerSm = 87e3;        // bytes of one SM from L2
constexpr double kL2Share = 40e3, kMemoryShare = 25e3;  // and if all of them read at once
constexpr double kFlopsPerSm[2] = {3.4e6, 0.26e6};      // s5: matrix units at 45 %, float32 fma at 60 %
constexpr int kClusterSizes[] = {4, 8, 16};

constexpr int kMaxDevices = 64, kMaxCluster = 16;
thread_local cudaError_t last_error = cudaSuccess;

// What a device does with the kernels of one dtype.
struct Device {
  bool known;
  int sms, shared;                   // shared memory that a CTA may ask for
  bool overlaps;                     // programmatic dependent launch
  int clusters[2][kMaxCluster + 1];  // [select, fused]: clusters of a size that run at once, 0: none
  int cooperative;                   // CTAs of a cooperative launch that run at once, 0: none
  int merge[2];                      // CTAs of each way of `merge` that run at once
};

const Kernels& kernels_for(apet_dtype dtype) {
  return dtype == APET_FLOAT32 ? kFloat32 : dtype == APET_FLOAT16 ? kFloat16 : kBFloat16;
}

#define APET_TRY(call)                                     \
  do {                                                     \
    if ((last_error = (call)) != cudaSuccess) {            \
      (void)cudaGetLastError(); /* said here, not later */ \
      return APET_CUDA_FAILED;                             \
    }                                                      \
  } while (0)

cudaLaunchConfig_t config_of(unsigned grid, int threads, int shared, cudaStream_t stream,
                             cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = attribute ? 1 : 0;
  return config;
}

cudaLaunchAttribute cluster_of(int size) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = size;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

// Asks the current device, and lets the kernels have all of its shared memory.
apet_status ask(int index, const Kernels& kernels, Device& device) {
  int major, clusters, cooperative;
  APET_TRY(cudaDeviceGetAttribute(&device.sms, cudaDevAttrMultiProcessorCount, index));
  APET_TRY(cudaDeviceGetAttribute(&device.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  APET_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  APET_TRY(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, index));
  APET_TRY(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, index));
  device.overlaps = major >= 9;
  if (clusters) {
    const Kernel kernel[2] = {kernels.cluster, kernels.fused};
    for (int k = 0; k < 2; k++) {
      APET_TRY(cudaFuncSetAttribute(kernel[k], cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared));
      APET_TRY(cudaFuncSetAttribute(kernel[k], cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
      for (int size = 1; size <= kMaxCluster; size++) {
        cudaLaunchAttribute attribute = cluster_of(size);
        const cudaLaunchConfig_t config = config_of(size, kThreads, device.shared, nullptr, &attribute);
        // A size that the device or its partition cannot place is no failure: it has no clusters of that size.
        if (cudaOccupancyMaxActiveClusters(&device.clusters[k][size], kernel[k], &config) != cudaSuccess)
          device.clusters[k][size] = 0, (void)cudaGetLastError();
      }
    }
  }
  int blocks = 0;
  if (cooperative) {
    APET_TRY(cudaFuncSetAttribute(kernels.cooperative, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared));
    APET_TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernels.cooperative, kThreads, device.shared));
  }
  device.cooperative = blocks * device.sms;
  for (int k = 0; k < 2; k++) {
    const Merge& merge = kernels.merge[k];
    if (merge.shared > device.shared) continue;
    APET_TRY(cudaFuncSetAttribute(merge.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, merge.shared));
    APET_TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, merge.kernel, merge.threads, merge.shared));
    device.merge[k] = blocks * device.sms;
  }
  device.known = true;
  return APET_OK;
}

apet_status current_device(apet_dtype dtype, const Device*& device) {
  static Device devices[kMaxDevices][3];
  static std::mutex mutex;
  int index;
  APET_TRY(cudaGetDevice(&index));
  APET_TRY(index < kMaxDevices ? cudaSuccess : cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(mutex);
  Device& entry = devices[index][dtype];
  device = &entry;
  if (entry.known) return APET_OK;
  entry = {};
  return ask(index, kernels_for(dtype), entry);
}

// ---- sizes

int element(const apet_problem& p) { return p.dtype == APET_FLOAT32 ? 4 : 2; }
int basis_of(const apet_problem& p) { return p.op == APET_MERGE ? 0 : p.basis; }
int appended(const apet_problem& p) { return p.op == APET_COMPRESS && p.layout == APET_APPEND ? p.basis : 0; }
int64_t all_tokens(const apet_problem& p) { return p.ragged ? p.total_tokens : p.images * p.tokens; }
int64_t all_rows(const apet_problem& p) {
  if (p.op == APET_SCORE) return 0;
  return (p.ragged ? p.total_keep : p.images * p.keep) + p.images * appended(p);
}
// The longest image and the largest keep, none longer than all of them.
int64_t longest(const apet_problem& p) { return p.ragged ? std::min(p.tokens, p.total_tokens) : p.tokens; }
int64_t most_kept(const apet_problem& p) {
  if (p.op == APET_SCORE) return 0;
  return p.ragged ? std::min({p.keep, p.total_keep, longest(p)}) : p.keep;
}
int64_t most_dropped(const apet_problem& p) {
  return p.ragged ? longest(p) : p.op == APET_MERGE ? p.tokens - 1 : p.tokens - p.keep;
}
bool empty(const apet_problem& p) {
  return p.images == 0 || longest(p) == 0 || (p.op != APET_SCORE && all_rows(p) == 0);
}

// Shared memory of a CTA of the first launch, for what the plan says; too much for 32 bits: INT_MAX.
SharedMap map_of(const apet_problem& p, const apet_cuda_plan_t& plan) {
  SharedMap map = {};
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t at = used;
    used += round_up(bytes, 16);
    return (int32_t)std::min<int64_t>(at, INT_MAX);
  };
  const int64_t m = basis_of(p), words = message_words((int)m) * 4;
  map.work = take(kWorkBytes);
  map.message = take(words);
  map.slots = take(plan.path == APET_CUDA_COOPERATIVE ? 0 : 2 * plan.ctas_per_image * words);
  map.factor = take(m * m * 4);
  map.inverse = take(m * 8);
  map.basis = take(m * 4);
  map.warp_best = take(kWarps * 8);
  map.scan = take(kScanWords * 4);
  map.state = take(plan.state_shared ? plan.slice * (3 + m) * 4 : 0);
  map.candidate = take(plan.basis_shared ? row_pitch(p.dim * element(p)) : 0);
  map.merge = take(plan.path == APET_CUDA_FUSED ? kernels_for(p.dtype).fused_shared : 0);
  map.rows = take(plan.resident * row_pitch(p.dim * element(p)));
  map.total = take(0);
  return map;
}

// Cuts the longest image for plan.path and plan.ctas_per_image; false where the device has too little shared memory.
bool cut(const apet_problem& p, const Device& device, int most_resident, apet_cuda_plan_t& plan) {
  const int64_t pitch = row_pitch(p.dim * element(p));
  plan.slice = (int32_t)((longest(p) + plan.ctas_per_image - 1) / plan.ctas_per_image);
  if (plan.slice > INT_MAX / 2) return false;  // rows are counted in 32 bits
  plan.resident = plan.state_shared = plan.basis_shared = 0;
  const auto fits = [&] { return map_of(p, plan).total <= device.shared; };
  if (!fits()) return false;
  plan.basis_shared = 1;
  plan.basis_shared = fits();
  plan.state_shared = 1;
  plan.state_shared = fits();
  if (plan.basis_shared) {
    int64_t rows = (device.shared - map_of(p, plan).total) / pitch;
    if (most_resident >= 0) rows = std::min<int64_t>(rows, most_resident);
    // A warp's rows lie all in shared memory, or none.
    plan.resident = (int32_t)(rows >= plan.slice ? plan.slice : rows / kRows * kRows);
  }
  plan.first_shared_bytes = map_of(p, plan).total;
  return plan.path != APET_CUDA_FUSED || (plan.resident == plan.slice && plan.state_shared);
}

// ---- the estimate

void choose_tile(const apet_problem& p, const Device& device, int tile, apet_cuda_plan_t& plan) {
  const Kernels& kernels = kernels_for(p.dtype);
  const auto tiles = [&](int64_t side) {
    return p.images * ((most_dropped(p) + side - 1) / side) * ((most_kept(p) + side - 1) / side);
  };
  // The larger tile reads half as much, once there are two of them for every CTA that runs at once.
  const bool large = tile ? tile == kernels.merge[1].tile : tiles(kernels.merge[1].tile) >= 2 * device.merge[1];
  const Merge& merge = kernels.merge[large && device.merge[1] > 0];
  plan.tile = merge.tile;
  plan.second_shared_bytes = merge.shared;
}

double estimate_us(const apet_problem& p, const Device& device, const apet_cuda_plan_t& plan) {
  const double row = (double)p.dim * element(p), slice = plan.slice * row;
  const double rounds = std::ceil((double)p.images / plan.images_in_flight);
  const double busy = (double)std::min<int64_t>(p.images, plan.images_in_flight) * plan.ctas_per_image;
  const auto read = [&](double bytes, double share) {
    return std::max(bytes / kL2PerSm, bytes * busy / (device.sms * share));
  };
  const double sweep = (double)plan.slice * p.dim / kElementsPerSm;
  const double again = read((plan.slice - plan.resident) * row, kL2Share);
  const double step = std::max(sweep, again) + kStepUs[plan.path == APET_CUDA_COOPERATIVE];
  // A thread takes a row through at most M / 2 terms in each of M steps, and as many again for the residual.
  const double algebra = std::ceil((double)plan.slice / kThreads) * basis_of(p) * basis_of(p) * kTermUs;
  double us =
      kLaunchUs + rounds * (kFillUs + read(slice, kMemoryShare) + sweep + basis_of(p) * step + algebra + kListsUs);
  if (p.op == APET_SCORE) return us;
  const double flops = 2.0 * most_dropped(p) * most_kept(p) * p.dim, rate = kFlopsPerSm[p.dtype == APET_FLOAT32];
  if (plan.path == APET_CUDA_FUSED)
    return us + rounds * (std::max(flops / (plan.ctas_per_image * rate), most_kept(p) * row / kL2PerSm) +
                          read(slice, kL2Share) + kStepUs[0]);
  const double tiles =
      p.images * std::ceil((double)most_dropped(p) / plan.tile) * std::ceil((double)most_kept(p) / plan.tile);
  const double waves = std::ceil(tiles / device.sms), tile = 2.0 * plan.tile * plan.tile * p.dim / rate;
  return us + (device.overlaps ? kOverlappedLaunchUs : kLaunchUs) + waves * (tile + kFillUs) + kFillUs +
         p.images * longest(p) * row / (device.sms * kL2Share);
}

// Whether `path` with groups of that many CTAs can run; completes the plan if so.
bool try_path(const apet_problem& p, const Device& device, const apet_cuda_override& override, apet_cuda_path path,
              int group, apet_cuda_plan_t& plan) {
  plan.path = path;
  plan.ctas_per_image = group;
  const bool cooperative = path == APET_CUDA_COOPERATIVE, fused = path == APET_CUDA_FUSED;
  if (group < 1 || (!cooperative && group > kMaxCluster)) return false;
  const int64_t room = cooperative ? device.cooperative / group : device.clusters[fused][group];
  plan.images_in_flight = (int32_t)std::min(p.images, room);
  if (plan.images_in_flight == 0 || (fused && p.op == APET_SCORE)) return false;
  if (!cut(p, device, override.resident, plan)) return false;
  plan.launches = p.op == APET_SCORE || fused ? 1 : 2;
  plan.tile = plan.second_shared_bytes = 0;
  if (plan.launches == 2) choose_tile(p, device, override.tile, plan);
  plan.estimated_us = estimate_us(p, device, plan);
  return true;
}

// Every pointer of the workspace; with a null base it only counts.
size_t carve(const apet_problem& p, const apet_cuda_plan_t& plan, void* base, Call& call) {
  size_t used = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    using Item = std::remove_reference_t<decltype(*pointer)>;
    pointer = base ? reinterpret_cast<Item*>(static_cast<char*>(base) + used) : nullptr;
    used += (size_t)round_up(count * (int64_t)sizeof(Item), 64);
  };
  const int64_t tokens = all_tokens(p), rows = all_rows(p), m = basis_of(p);
  const bool merges = p.op != APET_SCORE, cooperative = plan.path == APET_CUDA_COOPERATIVE;
  take(call.table, merges ? p.images : 0);
  take(call.bounds, plan.path == APET_CUDA_FUSED ? p.images * (plan.ctas_per_image + 1) : 0);
  take(call.norm2, tokens);
  take(call.state, plan.state_shared ? 0 : tokens * (3 + m));
  take(call.rank, merges ? tokens : 0);
  take(call.dropped, merges ? tokens : 0);
  take(call.best, merges ? tokens : 0);
  take(call.row_token, rows);
  take(call.row_role, rows);
  take(call.target, rows);
  take(call.target_scale, rows);
  take(call.ticket, merges ? 1 : 0);
  take(call.done, merges ? p.images : 0);
  take(call.slots, cooperative ? (int64_t)plan.images_in_flight * 2 * plan.ctas_per_image * message_words((int)m) : 0);
  take(call.arrived, cooperative ? plan.images_in_flight : 0);
  return used;
}

constexpr const char* kPaths[] = {"best", "fused", "cluster", "cooperative"};

// The sentence of a plan: its estimate, and that of the other paths, or why they cannot run here.
void explain(const apet_problem& p, const Device& device, bool asked_for, const double (&us)[4],
             apet_cuda_plan_t& plan) {
  int n = std::snprintf(plan.why, sizeof plan.why, "%s%s with %d CTAs an image: %.1f us by estimate",
                        asked_for ? "as asked for, " : "", kPaths[plan.path], plan.ctas_per_image, plan.estimated_us);
  const auto also = [&](const char* words, const char* path, double estimate) {
    if (n < (int)sizeof plan.why) n += std::snprintf(plan.why + n, sizeof plan.why - n, words, path, estimate);
  };
  if (asked_for) return;
  const bool clusters = device.clusters[0][kClusterSizes[0]] > 0;
  if (!clusters) also("; %s: this device places none", "clusters", 0);
  for (const apet_cuda_path path : {APET_CUDA_FUSED, APET_CUDA_CLUSTER, APET_CUDA_COOPERATIVE}) {
    if (path == plan.path || (path == APET_CUDA_FUSED && p.op == APET_SCORE)) continue;
    if (path != APET_CUDA_COOPERATIVE && !clusters) continue;
    if (us[path] > 0) also("; %s: %.1f us", kPaths[path], us[path]);
    else if (path == APET_CUDA_FUSED) also("; %s: a CTA's tokens do not fit its shared memory", kPaths[path], 0);
    else if (path == APET_CUDA_COOPERATIVE) also("; %s: this device places no cooperative launch", kPaths[path], 0);
    else also("; %s: too little shared memory", kPaths[path], 0);
  }
}

// What holds nothing may be null: torch gives empty tensors no memory.
bool has_pointers(const apet_problem& p, const apet_tensors& t) {
  if (!t.x && all_tokens(p) > 0) return false;
  if (p.ragged && p.images > 0 && !(t.cu_seqlens && t.cu_keep)) return false;
  switch (p.op) {
    case APET_COMPRESS: return all_rows(p) == 0 || (t.tokens && t.indices);
    case APET_SCORE: return p.images == 0 || (t.residual && t.basis_indices);
    case APET_MERGE: return all_rows(p) == 0 || (t.tokens && t.kept);
  }
  return false;
}

bool aligned(const void* pointer, std::initializer_list<int64_t> strides, int element_bytes) {
  bool is = (uintptr_t)pointer % 16 == 0;
  for (int64_t stride : strides) is = is && stride * element_bytes % 16 == 0;
  return is;
}

Call call_of(const apet_problem& p, const apet_tensors& tensors, const apet_cuda_plan_t& plan, const Kernels& kernels) {
  Call call = {};
  call.at = tensors;
  call.op = p.op;
  call.layout = p.layout;
  call.select = p.select;
  call.images = (int32_t)p.images;
  call.tokens = (int32_t)longest(p);
  call.dim = (int32_t)p.dim;
  call.keep = (int32_t)most_kept(p);
  call.basis = basis_of(p);
  call.ragged = p.ragged;
  call.appended = appended(p);
  call.start = p.op == APET_MERGE ? -1 : p.start;
  call.stride_xb = p.stride_xb;
  call.stride_xn = p.stride_xn;
  call.total_tokens = p.total_tokens;
  call.total_keep = p.total_keep;
  call.ridge = p.ridge;
  call.blend = (float)p.blend;
  call.whole_in = aligned(tensors.x, {p.dim, p.stride_xn, p.images > 1 && !p.ragged ? p.stride_xb : 0}, element(p));
  call.whole_out = aligned(tensors.tokens, {p.dim}, element(p));
  call.group = plan.ctas_per_image;
  call.groups = plan.images_in_flight;
  call.resident = plan.resident;
  call.state_shared = plan.state_shared;
  call.basis_shared = plan.basis_shared;
  call.pitch = (int32_t)std::min<int64_t>(row_pitch(p.dim * element(p)), INT_MAX);
  call.map = map_of(p, plan);
  if (plan.launches == 2) {
    const Merge& merge = kernels.merge[plan.tile == kernels.merge[1].tile];
    const int64_t down = (most_dropped(p) + plan.tile - 1) / plan.tile,
                  across = (most_kept(p) + plan.tile - 1) / plan.tile;
    const int64_t width = 32 * merge.chunks * (16 / element(p)), blocks = (p.dim + width - 1) / width;
    const int64_t tasks = merge.threads / 32;
    call.tiles = (int32_t)(down * across);
    call.tile_columns = (int32_t)across;
    call.mean_tickets = (int32_t)(((most_kept(p) + call.appended) * blocks + tasks - 1) / tasks);
  }
  return call;
}

}  // namespace
}  // namespace apet::cuda

using namespace apet::cuda;

apet_status apet_cuda_plan(const apet_problem* problem, const apet_cuda_override* override, apet_cuda_plan_t* plan) {
  if (!plan) return APET_NULL_POINTER;
  *plan = {};
  const apet_status status = apet_check(problem);
  if (status != APET_OK) return status;
  const apet_problem& p = *problem;
  const apet_cuda_override wanted = override ? *override : apet_cuda_override{APET_CUDA_BEST, 0, -1, 0};
  if (empty(p)) {
    plan->path = APET_CUDA_COOPERATIVE;
    std::snprintf(plan->why, sizeof plan->why, "there are no tokens, or no rows to fill");
    return APET_OK;
  }
  const Device* device;
  if (const apet_status failed = current_device(p.dtype, device); failed != APET_OK) return failed;
  apet_cuda_plan_t best = {}, next = {};
  double us[4] = {};  // the least estimate of each path, 0: it cannot run
  const auto consider = [&](apet_cuda_path path, int64_t group) {
    if (wanted.path != APET_CUDA_BEST && wanted.path != path) return;
    if (!try_path(p, *device, wanted, path, wanted.ctas_per_image > 0 ? wanted.ctas_per_image : (int)group, next))
      return;
    if (us[path] == 0 || next.estimated_us < us[path]) us[path] = next.estimated_us;
    if (best.launches == 0 || next.estimated_us < best.estimated_us) best = next;
  };
  for (const apet_cuda_path path : {APET_CUDA_FUSED, APET_CUDA_CLUSTER})
    for (const int size : kClusterSizes) consider(path, size);
  // 1, 2, 4, ... images side by side, each with as many CTAs as there are then, or as have rows for a warp.
  const int64_t most = (longest(p) + kRows - 1) / kRows;
  for (int64_t side = 1; side < 2 * p.images && side <= device->cooperative; side *= 2)
    consider(APET_CUDA_COOPERATIVE, std::min(most, device->cooperative / side));
  if (best.launches == 0) {
    std::snprintf(
        plan->why, sizeof plan->why,
        "path %d with %d CTAs an image cannot run here: this device places %d clusters of 8 and %d cooperative "
        "CTAs with %d bytes of shared memory each",
        (int)wanted.path, (int)wanted.ctas_per_image, device->clusters[0][8], device->cooperative, device->shared);
    return APET_NO_CUDA_PATH;
  }
  *plan = best;
  Call none = {};
  plan->workspace_bytes = carve(p, *plan, nullptr, none);
  explain(p, *device, wanted.path != APET_CUDA_BEST || wanted.ctas_per_image > 0, us, *plan);
  return APET_OK;
}

apet_status apet_cuda_run(const apet_problem* problem, const apet_tensors* tensors, const apet_cuda_plan_t* plan,
                          void* workspace, size_t bytes, void* stream_) {
  const apet_status status = apet_check(problem);
  if (status != APET_OK) return status;
  if (!tensors || !plan) return APET_NULL_POINTER;
  const apet_problem& p = *problem;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (!has_pointers(p, *tensors)) return APET_NULL_POINTER;
  if (empty(p)) {  // rows that no image fills
    const int64_t rows = all_rows(p);
    if (rows > 0) {
      APET_TRY(cudaMemsetAsync(tensors->tokens, 0, rows * p.dim * element(p), stream));
      if (p.op == APET_COMPRESS) APET_TRY(cudaMemsetAsync(tensors->indices, 0, rows * sizeof(int64_t), stream));
    }
    return APET_OK;
  }
  const Device* device;
  if (const apet_status failed = current_device(p.dtype, device); failed != APET_OK) return failed;
  const Kernels& kernels = kernels_for(p.dtype);
  Call call = call_of(p, *tensors, *plan, kernels);
  if (!workspace || (uintptr_t)workspace % 64 || carve(p, *plan, workspace, call) > bytes) return APET_SMALL_WORKSPACE;

  const bool cooperative = plan->path == APET_CUDA_COOPERATIVE;
  cudaLaunchAttribute attribute = cluster_of(plan->ctas_per_image);
  if (cooperative) {
    attribute = {};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  // Clusters need not run all at once: one an image, as far as a grid reaches.
  const int64_t groups = cooperative ? plan->images_in_flight : std::min<int64_t>(p.images, INT_MAX / kMaxCluster);
  cudaLaunchConfig_t config =
      config_of((unsigned)(groups * plan->ctas_per_image), kThreads, plan->first_shared_bytes, stream, &attribute);
  const Kernel first = cooperative                     ? kernels.cooperative
                       : plan->path == APET_CUDA_FUSED ? kernels.fused
                                                       : kernels.cluster;
  APET_TRY(cudaLaunchKernelEx(&config, first, call));
  if (plan->launches == 1) return APET_OK;

  const bool large = plan->tile == kernels.merge[1].tile;
  const Merge& merge = kernels.merge[large];
  const double tickets = ((double)call.tiles + call.mean_tickets) * (p.images + 1.0);
  attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config = config_of((unsigned)std::min<double>(tickets, device->merge[large]), merge.threads, merge.shared, stream,
                     device->overlaps ? &attribute : nullptr);
  APET_TRY(cudaLaunchKernelEx(&config, merge.kernel, call));
  return APET_OK;
}

const char* apet_cuda_error(void) { return cudaGetErrorString(last_error); }
