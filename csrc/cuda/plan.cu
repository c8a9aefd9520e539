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

// s4 of an image, by one CTA.
double topk_us(const apet_problem& p, const Figures& f) { return f.lists_us + most_tokens(p) * f.s4_token_us; }

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
    us += kRounds * (topk_us(p, f) + gram + most * (f.pick_us + terms) +
                     std::floor((most - 1) / kGramPicks) * subtract + update + 4 * exchange);
  }
  if (!refines(p)) return us;
  const double kept = (double)std::max<int64_t>(most_kept(p), 1), members = 1 + most_dropped(p) / kept;
  const double clusters = std::ceil(tiles((double)most_dropped(p), kept) / ctas) * product;
  const double means = std::ceil(kept / ctas) * 2 * (f.fill_us + members * row_bytes(p) / f.l2_per_sm);
  const double lists = f.fill_us + most_dropped(p) * f.group_us;
  return us + f.launch_us + p.refine * (clusters + lists + means + topk_us(p, f) + 3 * exchange);
}

// Beside the figures of figures.cuh, which a run on a GPU replaces. All assumed: docs/cuda.md, "Choice of the path".
constexpr double kReadUs = 0.3;        // a read of L2 whose address another read gives
constexpr double kOperandsUs = 0.018;  // ldmatrix, before the matrix instructions of a warp that need its rows
constexpr double kBarrier = 0.4;       // a barrier of the group, as a part of an exchange
constexpr double kGrowing = 0.25;      // the part of a cooperative exchange that grows with the group
constexpr double kCooperativeUs = 1;   // what a cooperative launch takes more than another
constexpr double kPopular = 4;         // dropped tokens of the most popular target, in means of a target

// The time of an exchange, and with a group of `ctas` CTAs.
double exchange_us(const apet_cuda_plan_t& plan, const Device& device, const Figures& f, double ctas) {
  if (plan.path != APET_CUDA_COOPERATIVE) return f.cluster_step_us;
  return f.cooperative_step_us * (1 - kGrowing + kGrowing * ctas / device.sms);  // measured with a CTA on every SM
}

// Operations per us of an SM on which `warps` warps multiply, each 32 rows x 32 columns. A scheduler has a quarter of
// the SM's rate, and a warp that has it alone waits for its operands in between.
double product_rate(const apet_problem& p, const Figures& f, double warps) {
  if (p.dtype == APET_FLOAT32) return f.flops_per_sm_32 * std::min(1.0, warps / 4);
  constexpr double kSlab = 2 * 32 * 32 * 16;  // operations between two waits
  return std::min(f.flops_per_sm_16, warps * kSlab / (4 * kSlab / f.flops_per_sm_16 + kOperandsUs));
}

// Rows of the result, where no reading of X is waited for. A warp reads of each of its tasks, one after the other, the
// role, the list, the numbers and the positions in it, then as many rows at once as a lane keeps loads in flight; before
// that, `ticket` reads. One warp has the most popular target.
double waiting_us(const apet_problem& p, double tasks, int chunks, double ticket) {
  const double dropped = (double)most_dropped(p), mean = dropped / (double)std::max<int64_t>(most_kept(p), 1);
  const auto task = [&](double list) { return kReadUs * (ticket + 4 + std::ceil(list * chunks / kMeanLoads)); };
  return (tasks - 1) * task(mean) + task(std::min(kPopular * (1 + mean), dropped));
}

// s5 in s1_s5_cluster: tiles, lists and means of an image.
template <class Read>
void add_fused(const apet_problem& p, const apet_cuda_plan_t& plan, const Figures& f, double rounds, Read read,
               apet_cuda_terms& t) {
  const bool wide = p.dtype == APET_FLOAT32;
  using T4 = ClusterTile<float>;
  using T2 = ClusterTile<__half>;
  const double rows = wide ? T4::kRows : T2::kRows, columns = wide ? T4::kColumns : T2::kColumns;
  const double warp_rows = 16 * (wide ? T4::kFragM : T2::kFragM), warp_columns = 8 * (wide ? T4::kFragN : T2::kFragN);
  const double dropped = std::ceil((double)most_dropped(p) / plan.ctas_per_image), kept = (double)most_kept(p);
  const double passes = std::ceil(dropped / rows), tiles = passes * std::ceil(kept / columns);
  const double parts = std::ceil(dropped / warp_rows) * std::ceil(kept / warp_columns);
  if (tiles > 0) {
    const double products = 2 * parts * warp_rows * warp_columns * p.dim / product_rate(p, f, parts / tiles);
    t.products_us += rounds * (2 * kReadUs + std::max(products, passes * read(kept * row_bytes(p))));
  }
  t.lists_us += rounds * (f.fill_us + most_dropped(p) * f.group_us);
  const double blocks = std::ceil(row_bytes(p) / 512.0);
  const double waiting = waiting_us(p, std::ceil(std::ceil(kept / plan.ctas_per_image) * blocks / kWarps), 1, 0);
  t.means_us += rounds * std::max(read((double)plan.slice * row_bytes(p)), waiting);
  t.barriers_us += rounds * 2 * kBarrier * f.cluster_step_us;
}

// s5_merge.
void add_merge(const apet_problem& p, const Device& device, const apet_cuda_plan_t& plan, const Figures& f,
               apet_cuda_terms& t) {
  const MergeKernel& merge = merge_kernel_of(p, plan);
  const double row = (double)row_bytes(p), sms = device.sms;
  const double tiles = (double)(p.images * tile_rows(p, merge) * tile_columns(p, merge));
  // An SM has the registers of 256 threads of any tile.
  const double warps = merge.threads / 32, ctas = std::min<double>(merge_ctas(p, device, merge), sms * 8 / warps);
  const double full = std::floor(tiles / sms);
  const double rate = product_rate(p, f, warps * std::clamp(full, 1.0, std::max(1.0, ctas / sms)));
  // A tile on each of `busy` SMs at once.
  const auto wave = [&](double busy) {
    const double bytes = (merge.rows + merge.columns) * row;
    const double reads = std::max(bytes / f.l2_per_sm, bytes * busy / (sms * f.l2_share));
    return busy > 0 ? std::max(2.0 * merge.rows * merge.columns * p.dim / rate, reads) + f.fill_us : 0;
  };
  t.launches_us += *device.overlaps ? f.overlapped_launch_us : f.launch_us;
  t.products_us += full * wave(sms) + wave(std::fmod(tiles, sms));
  t.lists_us += f.fill_us + most_dropped(p) * f.group_us;
  const double from_l2 = f.fill_us + p.images * most_tokens(p) * row / (sms * f.l2_share);
  const double tasks = std::ceil((double)p.images * mean_tasks(p, merge) / (ctas * warps));
  const double ticket = 3.0 / means_of_ticket(p, merge, merge_ctas(p, device, merge));
  t.means_us += std::max(from_l2, waiting_us(p, tasks, merge.chunks, ticket));
}

apet_cuda_terms terms_of(const apet_problem& p, const Device& device, const apet_cuda_plan_t& plan) {
  const Figures& f = figures_for(device.capability);
  const double row = (double)row_bytes(p), slice = plan.slice * row;
  const double rounds = std::ceil((double)p.images / plan.images_in_flight);
  const double busy_ctas = (double)std::min<int64_t>(p.images, plan.images_in_flight) * plan.ctas_per_image;
  const auto read = [&](double bytes, double share) {
    return std::max(bytes / f.l2_per_sm, bytes * busy_ctas / (device.sms * share));
  };
  const auto from_l2 = [&](double bytes) { return read(bytes, f.l2_share); };
  // A warp takes kRows rows at once. The four schedulers have a warp more or less, and the CTA waits for the last one.
  constexpr double kAtOnce = 4 * kRows;
  const double sweep = std::ceil(plan.slice / kAtOnce) * kAtOnce * p.dim / f.elements_per_sm;
  // Rows that are not in shared memory are read again in every step, from memory as far as they exceed L2.
  const double outside = (plan.slice - plan.resident) * row;
  const double beyond_l2 = std::max(0.0, 1 - f.l2_bytes / std::max(1.0, outside * busy_ctas));
  const double reread = std::max(from_l2(outside), read(outside * beyond_l2, f.memory_share));
  const double exchange = exchange_us(plan, device, f, plan.ctas_per_image);
  const double m = basis_of(p), steps = has_rounds(p) ? 0 : rounds * m;
  const bool cooperative = plan.path == APET_CUDA_COOPERATIVE;
  apet_cuda_terms t = {};
  t.launches_us = f.launch_us + (cooperative ? kCooperativeUs : 0);
  // Before the first image all CTAs meet, of a cooperative launch those of all groups; before s4 those of a group.
  t.barriers_us = kBarrier * (exchange_us(plan, device, f, busy_ctas) + (p.op == APET_SCORE ? 0 : rounds * exchange));
  t.memory_us = rounds * (f.fill_us + read(slice, f.memory_share));
  t.sweeps_us = rounds * sweep + steps * std::max(sweep, reread);
  t.exchanges_us = steps * exchange;
  // A thread takes a row through at most M / 2 terms in each of M steps, and as many again for the residual.
  t.algebra_us = steps * std::ceil((double)plan.slice / kThreads) * m * f.term_us;
  t.topk_us = p.op == APET_SCORE ? 0 : rounds * topk_us(p, f);
  if (in_tiles(p)) t.rounds_us = rounds * rounds_us(p, plan, f, exchange, from_l2);
  if (p.op == APET_SCORE) return t;
  if (plan.path == APET_CUDA_FUSED) add_fused(p, plan, f, rounds, from_l2, t);
  else add_merge(p, device, plan, f, t);
  return t;
}

double estimate_us(const apet_problem& p, const Device& device, const apet_cuda_plan_t& plan) {
  const apet_cuda_terms t = terms_of(p, device, plan);
  return t.launches_us + t.barriers_us + t.memory_us + t.sweeps_us + t.exchanges_us + t.algebra_us + t.topk_us +
         t.rounds_us + t.products_us + t.lists_us + t.means_us;
}

// Chooses the tile of s5_merge with the lowest estimate, among those that the override admits. Returns false if the
// device can run none of them.
bool choose_tile(const apet_problem& p, const Device& device, const apet_cuda_override& override,
                 apet_cuda_plan_t& plan) {
  const auto admits = [](int wanted, int has) { return wanted == 0 || wanted == has; };
  const auto& merge = kernels_for(p.dtype).s5_merge;
  apet_cuda_plan_t best = {};
  for (int i = 0; i < kMergeTiles; i++) {
    if (device.merge_ctas[i] == 0 || !admits(override.tile, merge[i].columns)) continue;
    if (!admits(override.tile_rows, merge[i].rows)) continue;
    plan.tile = merge[i].columns;
    plan.tile_rows = merge[i].rows;
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
  plan.tile = plan.tile_rows = plan.second_shared_bytes = 0;
  if (merges) return choose_tile(p, device, override, plan);
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
  const apet_cuda_override none = {APET_CUDA_BEST, 0, -1, 0, 0};
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
        "path %s with %d CTAs an image (0: any) and tile %d x %d (0: any) cannot run here: this device places %d "
        "clusters of 8 and %d cooperative CTAs with %d bytes of shared memory each",
        kPaths[wanted.path], (int)wanted.ctas_per_image, (int)wanted.tile_rows, (int)wanted.tile,
        device->s1_s4_clusters[8], device->cooperative_ctas, device->shared_bytes);
    return APET_NO_CUDA_PATH;
  }
  *plan = best;
  Call none = {};
  plan->workspace_bytes = lay_out_workspace(p, *plan, nullptr, none);
  const MergeKernel& merge = merge_kernel_of(p, *plan);
  const double tiles = plan->second_shared_bytes > 0 ? (double)tile_rows(p, merge) * tile_columns(p, merge) : 0;
  if (plan->workspace_bytes == SIZE_MAX || tiles > INT_MAX) {
    *plan = {};
    return APET_TOO_LARGE;
  }
  const bool overridden = wanted.path != APET_CUDA_BEST || wanted.ctas_per_image > 0 || wanted.resident >= 0 ||
                          wanted.tile > 0 || wanted.tile_rows > 0;
  explain(p, *device, overridden, us, *plan);
  return APET_OK;
}

apet_status apet_cuda_terms_of(const apet_problem* problem, const apet_cuda_plan_t* plan, apet_cuda_terms* terms) {
  if (!plan || !terms) return APET_NULL_POINTER;
  *terms = {};
  const apet_status status = apet_check(problem);
  if (status != APET_OK || plan->launches == 0) return status;
  const Device* device;
  if (const apet_status failed = current_device(problem->dtype, device); failed != APET_OK) return failed;
  *terms = terms_of(*problem, *device, *plan);
  return APET_OK;
}
