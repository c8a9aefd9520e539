// The memory layout of csrc/cuda for the interpreter, taken from its headers.
#include "cuda/layout.cuh"
#include "machine.h"

extern "C" {

size_t ptx_call_bytes() { return sizeof(apet::cuda::Call); }

// The arrays of the workspace, with the sizes that call.cuh gives them.
void ptx_workspace(const apet_problem* problem, const apet_cuda_plan_t* plan, void* workspace) {
  using namespace apet::cuda;
  const apet_problem& p = *problem;
  Call call = {};
  lay_out_workspace(p, *plan, workspace, call);
  const int64_t tokens = apet::all_tokens(p), rows = apet::all_rows(p), images = p.images;
  const int64_t groups = plan->images_in_flight, ctas = plan->ctas_per_image;
  const bool merges = p.op != APET_SCORE, cooperative = plan->path == APET_CUDA_COOPERATIVE;
  const auto add = [](const char* name, auto* at, int64_t count) {
    ptx::arrays.add(name, at, (size_t)count * sizeof *at, true, nullptr);
  };
  add("norm_sq", call.norm_sq, tokens);
  if (!plan->state_shared) add("state", call.state, tokens * (3 + basis_of(p)));
  if (plan->path == APET_CUDA_FUSED) add("slice_begin", call.slice_begin, images * (ctas + 1));
  if (merges) {
    add("table", call.table, images);
    add("rank", call.rank, tokens);
    add("dropped", call.dropped, tokens);
    add("target_key", call.target_key, tokens);
    add("row_token", call.row_token, rows);
    add("row_role", call.row_role, rows);
    add("target_token", call.target_token, rows);
    add("target_norm_sq", call.target_norm_sq, rows);
    add("target_begin", call.target_begin, rows + images * (plan->path == APET_CUDA_FUSED || refines(p) ? ctas : 1));
    add("merged", call.merged, tokens);
    add("ticket", call.ticket, 1);
    add("tickets_done", call.tickets_done, images);
  }
  if (refines(p)) {
    add("cluster_mean", call.cluster_mean, groups_of(p, *plan) * std::min(ctas, most_kept(p)) * p.dim);
    add("medoid", call.medoid, rows);
  }
  if (const int64_t most = most_of_round(p), pool = kPool * most, all = groups_of(p, *plan); most > 0) {
    add("y", call.y, tokens * y_width((int)most));
    add("pool", call.pool, all * pool);
    add("gram", call.gram, all * pool * pool);
    add("pool_y", call.pool_y, all * most * pool);
    add("diag", call.diag, all * pool);
    add("L", call.L, all * most * most);
    add("inv_diag", call.inv_diag, all * most);
    add("picks", call.picks, all * kRounds * most);
    add("progress", call.progress, 2 * all);
  }
  if (cooperative) {
    add("slots", call.slots, groups * slot_words((int)ctas, message_words(basis_of(p))));
    add("arrived", call.arrived, groups);
  }
}
}
