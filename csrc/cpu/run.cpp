// The CPU backend's entry points: apet_cpu_plan and apet_cpu_run.
//
// A call is split among teams of threads (plan.h). Each team walks images through the stages (walk.h) and shares the
// chunks of a stage among its threads (team.h). There is one parallel region per call, for any number of images.
#include <algorithm>
#include <cstring>
#include <new>

#include "plan.h"
#include "team.h"
#include "walk.h"

namespace apet::cpu {
namespace {

struct Span {
  int64_t begin, end;
};

// Finds the extents of ragged images, and fills the rows that belong to none of them with zeros and index 0. cu_seqlens
// and cu_keep may hold anything: the span of image s begins at the maximum of cu[0..s] and ends at the maximum of
// cu[0..s + 1], both clamped into [0, total]. So spans ascend, never overlap and stay inside.
void read_extents(const Call& call, Extent* extents) {
  const apet_problem& p = call.problem;
  const int64_t appended_rows = appended(p), row_bytes = p.dim * element_size(p);
  char* tokens = static_cast<char*>(call.tensors.tokens);
  const auto running_extent = [](Span span, const int32_t* cu, int64_t s, int64_t total) {
    const int64_t begin = std::clamp<int64_t>(cu[s], span.end, total);
    return Span{begin, std::clamp<int64_t>(cu[s + 1], begin, total)};
  };
  int64_t filled = 0;  // all rows before this one are filled
  const auto zero_unfilled_rows = [&](int64_t end) {
    if (end <= filled) return;
    std::memset(tokens + filled * row_bytes, 0, (end - filled) * row_bytes);
    std::fill(call.tensors.indices + filled, call.tensors.indices + end, int64_t{0});
    filled = end;
  };
  Span token = {0, 0}, row = {0, 0};
  for (int64_t s = 0; s < p.images; s++) {
    token = running_extent(token, call.tensors.cu_seqlens, s, p.total_tokens);
    row = running_extent(row, call.tensors.cu_keep, s, p.total_keep);
    const int64_t n = std::min(token.end - token.begin, p.tokens), keep = std::min({row.end - row.begin, p.keep, n});
    extents[s] = {token.begin, n, row.begin + s * appended_rows, keep};
    zero_unfilled_rows(extents[s].row);
    if (n > 0) filled += keep + appended_rows;
    zero_unfilled_rows(row.end + (s + 1) * appended_rows);
  }
  zero_unfilled_rows(p.total_keep + p.images * appended_rows);
}

// Lowers bounds of ragged images that none of them can reach, as "no limit" is given by callers: the workspace is laid
// out for them.
apet_problem bounded(apet_problem p) {
  if (p.ragged) {
    p.tokens = std::min(p.tokens, p.total_tokens);
    p.keep = std::min({p.keep, p.total_keep, p.tokens});
  }
  return p;
}

size_t workspace_bytes(const apet_problem& p, const Kernels& kernels, const Split& s) {
  const apet_tensors none = {};
  Call call{p, none, kernels, nullptr, s.threads};
  Arena arena(nullptr);
  arena.take<Walk>(s.teams);
  arena.take<Team<Walk>>(s.teams);
  arena.take<Team<Walk>::Counter>(s.teams * s.threads);
  arena.take<Extent>(p.ragged ? p.images : 0);
  for (int t = 0; t < s.teams; t++) Walk(&call, arena);
  return arena.used();
}

// How the processor rounds, and whether it takes numbers below the smallest normal one for 0. Threads of a pool may have
// other settings than the caller, and no bit must depend on which thread takes a chunk.
#if defined(__x86_64__)
constexpr uint64_t kDefaultRounding = 0x1f80;  // to the nearest; keeps small numbers; no exceptions
uint64_t rounding() { return __builtin_ia32_stmxcsr(); }
void set_rounding(uint64_t value) { __builtin_ia32_ldmxcsr((unsigned)value); }
#elif defined(__aarch64__)
constexpr uint64_t kDefaultRounding = 0;
uint64_t rounding() {
  uint64_t value;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}
void set_rounding(uint64_t value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
#else
constexpr uint64_t kDefaultRounding = 0;
uint64_t rounding() { return kDefaultRounding; }
void set_rounding(uint64_t) {}
#endif

struct Region {
  Team<Walk>* teams;
  int threads;
};
void work(void* context, int64_t begin, int64_t end) {
  const Region& region = *static_cast<const Region*>(context);
  const uint64_t before = rounding();
  set_rounding(kDefaultRounding);
  for (int64_t i = begin; i < end; i++) region.teams[i / region.threads].work((int)(i % region.threads));
  set_rounding(before);
}

}  // namespace
}  // namespace apet::cpu

using namespace apet;
using namespace apet::cpu;

apet_status apet_cpu_plan(const apet_problem* problem, int32_t threads, apet_cpu_plan_t* plan) {
  if (!plan) return APET_NULL_POINTER;
  const apet_status status = apet_check(problem);
  if (status != APET_OK) return status;
  const apet_problem p = bounded(*problem);
  const Split s = split(p, threads);
  const apet_isa isa = isa_in_use();
  const size_t bytes = workspace_bytes(p, *kernels_for(p.dtype, isa), s);
  if (bytes == SIZE_MAX) return APET_TOO_LARGE;
  *plan = {isa, s.teams, s.threads, bytes, {s.serial_ns, s.planned_ns}};
  return APET_OK;
}

apet_status apet_cpu_run(const apet_problem* problem, const apet_tensors* tensors, const apet_pool* pool,
                         void* workspace, size_t bytes) {
  const apet_status status = apet_check(problem);
  if (status != APET_OK) return status;
  if (!tensors || (pool && !pool->run)) return APET_NULL_POINTER;
  const apet_problem p = bounded(*problem);
  if (missing_pointer(p, *tensors)) return APET_NULL_POINTER;
  if (p.op == APET_SCORE ? p.images == 0 : all_rows(p) == 0) return APET_OK;
  const Kernels& kernels = *kernels_for(p.dtype, isa_in_use());
  const Split s = split(p, pool ? pool->threads : 1);
  if (!workspace || (uintptr_t)workspace % 64 || bytes < workspace_bytes(p, kernels, s)) return APET_SMALL_WORKSPACE;

  Call call{p, *tensors, kernels, nullptr, s.threads};
  Arena arena(workspace);
  Walk* walks = arena.take<Walk>(s.teams);
  Team<Walk>* teams = arena.take<Team<Walk>>(s.teams);
  auto* counters = arena.take<Team<Walk>::Counter>(s.teams * s.threads);
  Extent* extents = arena.take<Extent>(p.ragged ? p.images : 0);
  if (p.ragged) {
    read_extents(call, extents);
    call.extents = extents;
  }
  const uint64_t before = rounding();
  set_rounding(kDefaultRounding);  // advance() computes the norm of a given first token
  int working = 0;                 // teams that have an image
  for (int t = 0; t < s.teams; t++) {
    Walk* walk = new (walks + working) Walk(&call, arena);
    if (!walk->advance()) break;
    new (teams + working) Team<Walk>(walk, s.threads, counters + working * s.threads);
    working++;
  }
  set_rounding(before);
  Region region{teams, s.threads};
  const int64_t tasks = (int64_t)working * s.threads;
  if (tasks > 1) pool->run(pool->context, tasks, work, &region);
  else if (tasks == 1) work(&region, 0, 1);
  return APET_OK;
}
