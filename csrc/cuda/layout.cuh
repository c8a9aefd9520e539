// The memory layout of a call: the sizes of a problem, the shared memory of a CTA, and the workspace.
#pragma once
#include <algorithm>
#include <climits>
#include <initializer_list>

#include "../problem.h"
#include "kernels.cuh"

namespace apet::cuda {

// ---- sizes

// The largest N, K and dropped_count of an image, none larger than those of all images together.
inline int64_t most_tokens(const apet_problem& p) { return p.ragged ? std::min(p.tokens, p.total_tokens) : p.tokens; }
inline int64_t most_kept(const apet_problem& p) {
  if (p.op == APET_SCORE) return 0;
  return p.ragged ? std::min({p.keep, p.total_keep, most_tokens(p)}) : p.keep;
}
inline int64_t most_dropped(const apet_problem& p) {
  return p.ragged ? most_tokens(p) : p.op == APET_MERGE ? p.tokens - 1 : p.tokens - p.keep;
}
// The largest M of an image, and the most basis tokens that an image picks one at a time.
inline int most_basis(const apet_problem& p) { return p.op == APET_MERGE ? 0 : (int)apet::basis_of(p, most_kept(p)); }
inline int basis_of(const apet_problem& p) {
  const int most = most_basis(p);
  return p.op == APET_COMPRESS && apet::in_rounds(p) ? std::min(most, kFewPicks) : most;
}
// The most picks of a round; 0: no image has rounds, and s1_s4_rounds is not launched.
inline int most_of_round(const apet_problem& p) {
  return p.op == APET_COMPRESS && apet::in_rounds(p) && most_basis(p) > kFewPicks ? most_picks(most_basis(p)) : 0;
}
inline bool has_rounds(const apet_problem& p) { return most_of_round(p) > 0; }
// Whether s4_medoids is launched.
inline bool refines(const apet_problem& p) { return p.op == APET_COMPRESS && p.refine > 0; }
inline bool empty(const apet_problem& p) {
  return p.images == 0 || most_tokens(p) == 0 || (p.op != APET_SCORE && all_rows(p) == 0);
}
// The planned s5_merge, and the most rows and columns of tiles that an image has.
inline const MergeKernel& merge_kernel_of(const apet_problem& p, const apet_cuda_plan_t& plan) {
  const auto& merge = kernels_for(p.dtype).s5_merge;
  for (const MergeKernel& tile : merge)
    if (tile.kernel && tile.columns == plan.tile && tile.rows == plan.tile_rows) return tile;
  return merge[0];
}
inline int64_t tile_rows(const apet_problem& p, const MergeKernel& merge) {
  return (most_dropped(p) + merge.rows - 1) / merge.rows;
}
inline int64_t tile_columns(const apet_problem& p, const MergeKernel& merge) {
  return (most_kept(p) + merge.columns - 1) / merge.columns;
}
// Tasks of s5_mean of an image.
inline int64_t mean_tasks(const apet_problem& p, const MergeKernel& merge) {
  const int64_t block = 32 * merge.chunks * (16 / element_size(p));
  return (most_kept(p) + appended(p)) * ((p.dim + block - 1) / block);
}
// Tasks that a warp of s5_merge takes with one ticket, if `ctas` CTAs run: few of many, since a ticket costs three reads
// of L2, and one if there are no more than warps.
constexpr int kMeansOfTicket = 4;
inline int64_t means_of_ticket(const apet_problem& p, const MergeKernel& merge, int64_t ctas) {
  const double each = (double)p.images * mean_tasks(p, merge) / (ctas * (merge.threads / 32));
  return std::clamp<int64_t>((int64_t)std::min<double>(each, kMeansOfTicket), 1, kMeansOfTicket);
}
inline int64_t row_bytes(const apet_problem& p) { return p.dim * element_size(p); }
// The groups of the launches before s5_merge. Not all clusters must run at once: there is one per image, up to the
// largest grid.
inline int64_t groups_of(const apet_problem& p, const apet_cuda_plan_t& plan) {
  return plan.path == APET_CUDA_COOPERATIVE ? plan.images_in_flight
                                            : std::min<int64_t>(p.images, INT_MAX / kMaxCluster);
}

// ---- the shared memory of a CTA of a launch before s5_merge

// Gives out offsets. One beyond 32 bits becomes INT_MAX.
struct Offsets {
  int64_t used = 0;

  int32_t take(int64_t bytes) {
    const int64_t at = used;
    used += round_up(bytes, 16);
    return (int32_t)std::min<int64_t>(at, INT_MAX);
  }
};

// Lays out shared memory for the plan's path, ctas_per_image, slice, resident, state_shared and basis_shared.
inline SharedMap shared_map(const apet_problem& p, const apet_cuda_plan_t& plan) {
  SharedMap map = {};
  Offsets offsets;
  const auto take = [&](int64_t bytes) { return offsets.take(bytes); };
  const int64_t m = basis_of(p), message_bytes = message_words((int)m) * 4;
  map.work = take(kWorkBytes);
  map.message = take(message_bytes);
  map.slots = take(plan.path == APET_CUDA_COOPERATIVE ? 0 : 2 * plan.ctas_per_image * message_bytes);
  map.L = take(m * m * 4);
  map.inv_diag = take(m * 8);
  map.basis = take(m * 4);
  map.warp_best = take(kWarps * 8);
  map.scan = take(kScanWords * 4);
  map.state = take(plan.state_shared ? plan.slice * (3 + m) * 4 : 0);
  map.p_row = take(plan.basis_shared ? row_pitch(row_bytes(p)) : 0);
  const Kernels& kernels = kernels_for(p.dtype);
  const bool fused = plan.path == APET_CUDA_FUSED, rounds = has_rounds(p);
  map.s5 = take(fused ? kernels.s1_s5_shared_bytes : rounds ? kernels.group_shared_bytes : 0);
  map.rounds = take(rounds ? kRoundsBytes : 0);
  map.resident = take(plan.resident * row_pitch(row_bytes(p)));
  map.total = take(0);
  const bool in_s5 = fused || rounds;  // the resident rows are read again, or there are none
  map.ranks = in_s5 ? map.s5 : map.resident;
  map.rank_words = (in_s5 ? map.rounds - map.s5 : map.total - map.resident) / 4;
  return map;
}

// Lays out shared memory for s4_medoids.
inline SharedMap medoids_map(const apet_problem& p) {
  SharedMap map = {};
  Offsets offsets;
  map.work = offsets.take(kWorkBytes);
  map.warp_best = offsets.take(kWarps * 8);
  map.scan = offsets.take(kScanWords * 4);
  map.s5 = map.ranks = offsets.take(kernels_for(p.dtype).group_shared_bytes);
  map.total = offsets.take(0);
  map.rank_words = (map.total - map.s5) / 4;
  return map;
}

// Divides the longest image between the CTAs of a group, and decides which parts of a slice are in shared memory: the
// basis token of a step, then y and the distances, then as many rows as fit. Returns false if shared memory is too
// small for the plan's path.
inline bool divide_image(const apet_problem& p, int shared_bytes, int most_resident, apet_cuda_plan_t& plan) {
  plan.slice = (int32_t)((most_tokens(p) + plan.ctas_per_image - 1) / plan.ctas_per_image);
  if (plan.slice > INT_MAX / 2) return false;  // kernels count rows in 32 bits
  plan.resident = plan.state_shared = plan.basis_shared = 0;
  const auto fits = [&] { return shared_map(p, plan).total <= shared_bytes; };
  if (!fits() || (refines(p) && medoids_map(p).total > shared_bytes)) return false;
  plan.basis_shared = 1;
  plan.basis_shared = fits();
  plan.state_shared = 1;
  plan.state_shared = fits();
  // s1_s4_rounds copies tiles of rows, and its sweeps are of few basis tokens: it keeps no row.
  if (plan.basis_shared && !has_rounds(p)) {
    int64_t rows = (shared_bytes - shared_map(p, plan).total) / row_pitch(row_bytes(p));
    if (most_resident >= 0) rows = std::min<int64_t>(rows, most_resident);
    // The rows that a warp takes at once are all resident, or none.
    plan.resident = (int32_t)(rows >= plan.slice ? plan.slice : rows / kRows * kRows);
  }
  plan.first_shared_bytes = shared_map(p, plan).total;
  return plan.path != APET_CUDA_FUSED || (plan.resident == plan.slice && plan.state_shared);
}

// ---- the workspace

// Writes the pointers of the workspace at `base` into the call, and returns its bytes, or SIZE_MAX if they are beyond
// what any device addresses. base may be null, to count only.
inline size_t lay_out_workspace(const apet_problem& p, const apet_cuda_plan_t& plan, void* base, Call& call) {
  constexpr double kMost = 1e18;  // bytes
  size_t used = 0;
  double exact = 0;  // `used`, which wraps
  const auto take = [&](auto*& pointer, std::initializer_list<int64_t> count) {
    using Item = std::remove_reference_t<decltype(*pointer)>;
    pointer = base ? reinterpret_cast<Item*>(static_cast<char*>(base) + used) : nullptr;
    size_t bytes = sizeof(Item);
    double exact_bytes = sizeof(Item);
    for (int64_t extent : count) {
      bytes *= (size_t)extent;
      exact_bytes *= (double)extent;
    }
    used += (bytes + 63) / 64 * 64;
    exact += exact_bytes + 63;
  };
  const int64_t tokens = all_tokens(p), rows = all_rows(p), m = basis_of(p);
  const int64_t in_flight = plan.images_in_flight, ctas = plan.ctas_per_image, groups = groups_of(p, plan);
  const bool merges = p.op != APET_SCORE, cooperative = plan.path == APET_CUDA_COOPERATIVE;
  take(call.table, {merges ? p.images : 0});
  take(call.slice_begin, {plan.path == APET_CUDA_FUSED ? p.images * (ctas + 1) : 0});
  take(call.norm_sq, {tokens});
  take(call.state, {plan.state_shared ? 0 : tokens, 3 + m});
  take(call.rank, {merges ? tokens : 0});
  take(call.dropped, {merges ? tokens : 0});
  take(call.target_key, {merges ? tokens : 0});
  take(call.row_token, {rows});
  take(call.row_role, {rows});
  take(call.target_token, {rows});
  take(call.target_norm_sq, {rows});
  take(call.target_begin, {merges ? rows + p.images * (plan.path == APET_CUDA_FUSED || refines(p) ? ctas : 1) : 0});
  take(call.merged, {merges ? tokens : 0});
  take(call.ticket, {merges ? 1 : 0});
  take(call.tickets_done, {merges ? p.images : 0});
  take(call.slots, {cooperative ? in_flight * slot_words((int)ctas, message_words((int)m)) : 0});
  take(call.arrived, {cooperative ? in_flight : 0});
  const int64_t most = most_of_round(p), pool = kPool * most;
  take(call.y, {tokens, y_width((int)most)});
  take(call.pool, {groups, pool});
  take(call.gram, {groups, pool, pool});
  take(call.pool_y, {groups, most, pool});
  take(call.diag, {groups, pool});
  take(call.L, {groups, most, most});
  take(call.inv_diag, {groups, most});
  take(call.picks, {groups, kRounds, most});
  take(call.progress, {most > 0 ? 2 * groups : 0});
  take(call.cluster_mean, {refines(p) ? groups : 0, std::min(ctas, most_kept(p)), p.dim});
  take(call.medoid, {refines(p) ? rows : 0});
  return exact > kMost ? SIZE_MAX : used;
}

}  // namespace apet::cuda
