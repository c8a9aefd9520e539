// Plans a call from its sizes: estimates the time of every path that the device can run, and chooses by the estimates.
// docs/cuda.md explains the formulas of the estimate and the source of its figures.
#include <cmath>
#include <cstdio>

#include "../apet_testing.h"
#include "device.cuh"
#include "figures.cuh"
#include "layout.cuh"

namespace apet::cuda {
namespace {

// The cluster sizes that are considered.
constexpr int kClusterSizes[] = {4, 8, 16};

// Whether the call launches s1_s4_rounds or s4_medoids.
bool in_tiles(const apet_problem& p) { return has_rounds(p) || refines(p); }

// The CTAs of a cooperative launch, of all images in flight. It starts only when all of them fit at once, so a kernel
// of another stream on a single SM would delay it. So a sixteenth of the CTAs is left free, unless the caller sets
// ctas_per_image.
int64_t cooperative_ctas(const apet_problem& p, const Device& device, const apet_cuda_override& override) {
  const int ctas = in_tiles(p) ? std::min(device.cooperative_ctas, device.rounds_ctas) : device.cooperative_ctas;
  return ctas - (override.ctas_per_image > 0 ? 0 : ctas / 16);
}

// The cost by which plans are compared: cooperative launches are penalised by 10 %, because they wait for free SMs.
double cost(const apet_cuda_plan_t& plan) { return plan.estimated_us * (plan.path == APET_CUDA_COOPERATIVE ? 1.1 : 1); }

// The rounds and the medoid steps of an image, less its norms and s4. read(bytes): the time of a CTA to read from L2.
template <class Read>
double rounds_us(const apet_problem& p, const apet_cuda_plan_t& plan, const Figures& f, double exchange, Read read) {
  using Tl = GroupTile;
  const double rate = p.dtype == APET_FLOAT32 ? f.flops_per_sm_32 : f.flops_per_sm_16, ctas = plan.ctas_per_image;
  const auto tile = [&](double dim, double bytes, double flops) {
    return std::max(2.0 * Tl::kRows * Tl::kColumns * dim / flops, read((Tl::kRows + Tl::kColumns) * bytes));
  };
  const auto tiles = [](double rows, double columns) {
    return std::ceil(rows / Tl::kRows) * std::ceil(columns / Tl::kColumns);
  };
  const double product = f.fill_us + tile((double)p.dim, (double)row_bytes(p), rate);
  double us = 0;
  if (const double most = most_of_round(p); most > 0) {
    const double pool = kPool * most, earlier = (kRounds - 1) / 2.0 * most;
    const double residual = product + f.fill_us + tile(earlier, 4 * earlier, f.flops_per_sm_32);
    const double gram = std::ceil(tiles(pool, pool) / ctas) * residual;
    // A pick reads gram, and y of the picks since its update, of the whole pool.
    const double terms = std::min<double>(most, kGramPicks) / 2 *
                             std::max(std::ceil(pool / kThreads) * f.term_us, 4 * pool / f.l2_per_sm) +
                         8 * pool / f.l2_per_sm;
    // In an update of gram a warp takes kRows rows of 32 columns at once through kGramPicks terms.
    const double turns = std::ceil(std::ceil(pool / kRows) * std::ceil(pool / 32) / (ctas * kWarps));
    const double subtract = 2 * exchange + turns * (read(kWarps * 32 * (5.0 * kGramPicks + 16 * kRows)) + f.fill_us +
                                                    kGramPicks * kRows * f.term_us);
    // A warp takes kRows tokens through the triangle of L, 32 picks at a time.
    const double triangle = std::ceil(most / 32) * (most / 2 + 16) * f.term_us;
    const double update =
        tiles(plan.slice, most) * residual + std::ceil(plan.slice / (kWarps * kRows * 1.0)) * triangle;
    us += kRounds * (f.lists_us + gram + most * (f.pick_us + terms) + std::floor((most - 1) / kGramPicks) * subtract +
                     update + 4 * exchange);
  }
  if (!refines(p)) return us;
  const double kept = (double)std::max<int64_t>(most_kept(p), 1), members = 1 + most_dropped(p) / kept;
  const double clusters = std::ceil(tiles((double)most_dropped(p), kept) / ctas) * product;
  const double means = std::ceil(kept / ctas) * 2 * (f.fill_us + members * row_bytes(p) / f.l2_per_sm);
  const double lists = f.fill_us + most_dropped(p) * f.group_us;
  return us + f.launch_us + p.refine * (clusters + lists + means + f.lists_us + 3 * exchange);
}

// Returns the estimated time of a call by this plan, with the formulas of docs/cuda.md ("Choice of the path").
double estimate_us(const apet_problem& p, const Device& device, const apet_cuda_plan_t& plan) {
  const Figures& f = figures_for(device.capability);
  const double row = (double)row_bytes(p), slice = plan.slice * row;
  const double rounds = std::ceil((double)p.images / plan.images_in_flight);
  const double busy_ctas = (double)std::min<int64_t>(p.images, plan.images_in_flight) * plan.ctas_per_image;
  const auto read = [&](double bytes, double share) {
    return std::max(bytes / f.l2_per_sm, bytes * busy_ctas / (device.sms * share));
  };
  const double sweep = (double)plan.slice * p.dim / f.elements_per_sm;
  // Rows that are not in shared memory are read again in every step, from memory as far as they exceed L2.
  const double outside = (plan.slice - plan.resident) * row;
  const double beyond_l2 = std::max(0.0, 1 - f.l2_bytes / std::max(1.0, outside * busy_ctas));
  const double reread = std::max(read(outside, f.l2_share), read(outside * beyond_l2, f.memory_share));
  const double exchange = plan.path == APET_CUDA_COOPERATIVE ? f.cooperative_step_us : f.cluster_step_us;
  const double step = std::max(sweep, reread) + exchange;
  // A thread takes a row through at most M / 2 terms in each of M steps, and as many again for the residual.
  const double algebra = std::ceil((double)plan.slice / kThreads) * basis_of(p) * basis_of(p) * f.term_us;
  const double steps = has_rounds(p) ? 0 : basis_of(p) * step + algebra;
  double us = f.launch_us + rounds * (f.fill_us + read(slice, f.memory_share) + sweep + steps + f.lists_us);
  if (in_tiles(p))
    us += rounds * rounds_us(p, plan, f, exchange, [&](double bytes) { return read(bytes, f.l2_share); });
  if (p.op == APET_SCORE) return us;
  const double flops = 2.0 * most_dropped(p) * most_kept(p) * p.dim;
  const double rate = p.dtype == APET_FLOAT32 ? f.flops_per_sm_32 : f.flops_per_sm_16;
  const double lists = f.fill_us + most_dropped(p) * f.group_us;
  if (plan.path == APET_CUDA_FUSED)
    return us + rounds * (std::max(flops / (plan.ctas_per_image * rate), read(most_kept(p) * row, f.l2_share)) + lists +
                          read(slice, f.l2_share) + f.cluster_step_us);
  const MergeKernel& merge = merge_kernel_of(p, plan);
  const double tiles = (double)(p.images * tile_rows(p, merge) * tile_columns(p, merge));
  // A tile on each of `busy` SMs at once.
  const auto wave = [&](double busy) {
    const double bytes = (merge.rows + merge.columns) * row;
    const double reads = std::max(bytes / f.l2_per_sm, bytes * busy / (device.sms * f.l2_share));
    return busy > 0 ? std::max(2.0 * merge.rows * merge.columns * p.dim / rate, reads) + f.fill_us : 0;
  };
  return us + (device.overlaps ? f.overlapped_launch_us : f.launch_us) +
         std::floor(tiles / device.sms) * wave(device.sms) + wave(std::fmod(tiles, device.sms)) + lists + f.fill_us +
         p.images * most_tokens(p) * row / (device.sms * f.l2_share);
}

// Chooses the tile of s5_merge with the lower estimate; with columns != 0 that one. Returns false if the device cannot
// run it.
bool choose_tile(const apet_problem& p, const Device& device, int columns, apet_cuda_plan_t& plan) {
  const auto& merge = kernels_for(p.dtype).s5_merge;
  apet_cuda_plan_t best = {};
  for (int i = 0; i < kMergeTiles; i++) {
    if (device.merge_ctas[i] == 0 || (columns && columns != merge[i].columns)) continue;
    plan.tile = merge[i].columns;
    plan.second_shared_bytes = merge[i].shared_bytes;
    plan.estimated_us = estimate_us(p, device, plan);
    if (best.launches == 0 || plan.estimated_us < best.estimated_us) best = plan;
  }
  plan = best;
  return best.launches > 0;
}

bool may_be_fused(const apet_problem& p) { return p.op != APET_SCORE && !in_tiles(p); }

// Returns whether the device can run `path` with that many CTAs per image; if it can, completes the plan.
bool try_path(const apet_problem& p, const Device& device, const apet_cuda_override& override, apet_cuda_path path,
              int ctas_per_image, apet_cuda_plan_t& plan) {
  plan.path = path;
  plan.ctas_per_image = ctas_per_image;
  const bool cooperative = path == APET_CUDA_COOPERATIVE, fused = path == APET_CUDA_FUSED;
  if (ctas_per_image < 1 || (!cooperative && ctas_per_image > kMaxCluster)) return false;
  const int64_t room = cooperative ? cooperative_ctas(p, device, override) / ctas_per_image
                       : fused     ? device.s1_s5_clusters[ctas_per_image]
                       : in_tiles(p)
                           ? std::min(device.s1_s4_clusters[ctas_per_image], device.rounds_clusters[ctas_per_image])
                           : device.s1_s4_clusters[ctas_per_image];
  plan.images_in_flight = (int32_t)std::min(p.images, room);
  if (plan.images_in_flight == 0 || (fused && !may_be_fused(p))) return false;
  if (!divide_image(p, device.shared_bytes, override.resident, plan)) return false;
  const bool merges = p.op != APET_SCORE && !fused;
  plan.launches = 1 + refines(p) + merges;
  plan.tile = plan.second_shared_bytes = 0;
  if (merges) return choose_tile(p, device, override.tile, plan);
  plan.estimated_us = estimate_us(p, device, plan);
  return true;
}

constexpr const char* kPaths[] = {"best", "fused", "cluster", "cooperative"};

// Writes plan.why: the plan's estimate, and those of the other paths or why the device cannot run them. us: the lowest
// estimate of each path, 0 if the device cannot run it.
void explain(const apet_problem& p, const Device& device, bool overridden, const double (&us)[4],
             apet_cuda_plan_t& plan) {
  int n = std::snprintf(plan.why, sizeof plan.why, "%s%s with %d CTAs an image: %.1f us by estimate",
                        overridden ? "as asked for, " : "", kPaths[plan.path], plan.ctas_per_image, plan.estimated_us);
  const auto append = [&](const char* format, const char* path, double estimate) {
    if (n < (int)sizeof plan.why) n += std::snprintf(plan.why + n, sizeof plan.why - n, format, path, estimate);
  };
  if (overridden) return;
  const bool clusters = device.s1_s4_clusters[kClusterSizes[0]] > 0;
  if (!clusters) append("; %s: this device places none", "clusters", 0);
  for (const apet_cuda_path path : {APET_CUDA_FUSED, APET_CUDA_CLUSTER, APET_CUDA_COOPERATIVE}) {
    if (path == plan.path || (path == APET_CUDA_FUSED && !may_be_fused(p))) continue;
    if (path != APET_CUDA_COOPERATIVE && !clusters) continue;
    if (us[path] > 0) append("; %s: %.1f us", kPaths[path], us[path]);
    else if (path == APET_CUDA_FUSED) append("; %s: a CTA's tokens do not fit its shared memory", kPaths[path], 0);
    else if (path == APET_CUDA_COOPERATIVE) append("; %s: this device places no cooperative launch", kPaths[path], 0);
    else append("; %s: too little shared memory", kPaths[path], 0);
  }
}

}  // namespace
}  // namespace apet::cuda

using namespace apet::cuda;

apet_status apet_cuda_plan(const apet_problem* problem, apet_cuda_plan_t* plan) {
  const apet_cuda_override none = {APET_CUDA_BEST, 0, -1, 0};
  return apet_cuda_plan_with(problem, &none, plan);
}

apet_status apet_cuda_plan_with(const apet_problem* problem, const apet_cuda_override* override,
                                apet_cuda_plan_t* plan) {
  if (!plan || !override) return APET_NULL_POINTER;
  *plan = {};
  const apet_status status = apet_check(problem);
  if (status != APET_OK) return status;
  const apet_problem& p = *problem;
  const apet_cuda_override& wanted = *override;
  if (empty(p)) {
    plan->path = APET_CUDA_COOPERATIVE;
    std::snprintf(plan->why, sizeof plan->why, "there are no tokens, or no rows to fill");
    return APET_OK;
  }
  const Device* device;
  if (const apet_status failed = current_device(p.dtype, device); failed != APET_OK) return failed;
  apet_cuda_plan_t best = {}, next = {};
  double us[4] = {};  // the lowest estimate of each path; 0: the device cannot run it
  const auto consider = [&](apet_cuda_path path, int64_t ctas_per_image) {
    if (wanted.path != APET_CUDA_BEST && wanted.path != path) return;
    if (wanted.ctas_per_image > 0) ctas_per_image = wanted.ctas_per_image;
    if (!try_path(p, *device, wanted, path, (int)ctas_per_image, next)) return;
    if (us[path] == 0 || next.estimated_us < us[path]) us[path] = next.estimated_us;
    if (best.launches == 0 || cost(next) < cost(best)) best = next;
  };
  for (const apet_cuda_path path : {APET_CUDA_FUSED, APET_CUDA_CLUSTER})
    for (const int size : kClusterSizes) consider(path, size);
  // 1, 2, 4, ... images in flight share all CTAs, but an image has no more CTAs than there are rows for one warp each.
  const int64_t rows = has_rounds(p) ? GroupTile::kFragM * 16 : kRows;
  const int64_t most = (most_tokens(p) + rows - 1) / rows;
  const int64_t ctas = cooperative_ctas(p, *device, wanted);
  for (int64_t in_flight = 1; in_flight < 2 * p.images && in_flight <= ctas; in_flight *= 2)
    consider(APET_CUDA_COOPERATIVE, std::min(most, ctas / in_flight));
  if (best.launches == 0) {
    std::snprintf(
        plan->why, sizeof plan->why,
        "path %s with %d CTAs an image (0: any) and tile %d (0: any) cannot run here: this device places %d clusters "
        "of 8 and %d cooperative CTAs with %d bytes of shared memory each",
        kPaths[wanted.path], (int)wanted.ctas_per_image, (int)wanted.tile, device->s1_s4_clusters[8],
        device->cooperative_ctas, device->shared_bytes);
    return APET_NO_CUDA_PATH;
  }
  *plan = best;
  Call none = {};
  plan->workspace_bytes = lay_out_workspace(p, *plan, nullptr, none);
  const bool overridden =
      wanted.path != APET_CUDA_BEST || wanted.ctas_per_image > 0 || wanted.resident >= 0 || wanted.tile > 0;
  explain(p, *device, overridden, us, *plan);
  return APET_OK;
}
