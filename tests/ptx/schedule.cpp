// Runs a launch. A seed decides which CTAs are resident, which warp is next, and which of its lanes.
//
//   seed 0   CTAs, warps and lanes in ascending order, each as far as it can
//   others   by seed % 3: warps at random, a few instructions each | whole CTAs by a drawn priority | warps by one
//
// A warp that has polled a flag ends its turn, and comes after all others unless warps run at random. If lanes of a
// warp are at different instructions, the lowest one runs first, so that they converge; any one if warps run at random.
#include <algorithm>
#include <climits>
#include <cstring>
#include <numeric>

#include "machine.h"

namespace ptx {

std::map<const Kernel*, std::vector<uint64_t>> executed;

void complete_phase(Cluster& cluster) {
  if (!cluster.alive || cluster.arrived < cluster.alive) return;
  const Clock reached = cluster.rendezvous.complete();
  cluster.reached = reached;
  cluster.arrived = 0;
  cluster.phase++;
  for (auto& cta : cluster.ctas)
    for (auto& warp : cta->warps) {
      each(warp->at_cluster, [&](int l) {
        warp->order[l].known = latest(warp->order[l].known, reached);
        warp->cluster_phase[l] = 0;
        warp->pc[l]++;
      });
      warp->running |= std::exchange(warp->at_cluster, 0);
    }
}

namespace {

constexpr uint64_t kPatience = 3'000'000;  // instructions of warps without progress that end a launch

class Scheduler {
 public:
  Scheduler(Grid& grid, unsigned seed) : grid_(grid), launch_(*grid.launch), seed_(seed), draw_(seed) {
    const int count = (int)(launch_.grid / launch_.cluster);
    waiting_.resize(count);
    std::iota(waiting_.rbegin(), waiting_.rend(), 0);
    if (seed_) std::shuffle(waiting_.begin(), waiting_.end(), draw_);
    resident_ = launch_.cooperative || !seed_ ? count : 1 + (int)(draw_() % (unsigned)count);
    if (at_random()) resident_ = std::min(count, resident_ + 1);  // so that warps of several CTAs alternate
    known_ = std::make_shared<std::vector<uint32_t>>((size_t)launch_.grid * launch_.block);
    grid_.clusters.resize(count);
  }

  void run() {
    while (true) {
      remove_ended();
      while (!waiting_.empty() && running_clusters_ < resident_) begin_cluster();
      if (warps_.empty()) return;
      Warp* warp = pick();
      if (!warp) deadlock();
      turn(*warp, at_random() ? 1 + (long)(draw_() % 100) : LONG_MAX);
    }
  }

 private:
  bool at_random() const { return seed_ && seed_ % 3 == 0; }

  void begin_cluster() {
    const int index = waiting_.back();
    waiting_.pop_back();
    running_clusters_++;
    grid_.clusters[index] = begin(grid_, index, known_);
    std::vector<Warp*> fresh;
    for (auto& cta : grid_.clusters[index]->ctas)
      for (auto& warp : cta->warps) fresh.push_back(warp.get());
    warps_.insert(warps_.end(), fresh.begin(), fresh.end());
    if (!seed_) return;
    if (seed_ % 3 == 1) {  // all warps of a CTA have its priority
      std::map<const Cta*, uint64_t> priority;
      for (Warp* w : warps_) priority.try_emplace(w->cta, draw_());
      std::stable_sort(warps_.begin(), warps_.end(),
                       [&](Warp* a, Warp* b) { return priority[a->cta] < priority[b->cta]; });
    } else {
      std::shuffle(warps_.begin(), warps_.end(), draw_);
    }
  }

  void remove_ended() {
    for (auto& cluster : grid_.clusters)
      if (cluster && !cluster->alive && cluster->phase >= 0) {
        running_clusters_--;
        cluster->phase = -1;
        for (auto& cta : cluster->ctas) {
          warps_.erase(std::remove_if(warps_.begin(), warps_.end(), [&](Warp* w) { return w->cta == cta.get(); }),
                       warps_.end());
          cta->warps.clear();
          cta->shared = {};
        }
      }
  }

  Warp* pick() {
    for (int again = 0; again < 2; again++) {
      const size_t first = at_random() ? draw_() % warps_.size() : 0;
      for (size_t i = 0; i < warps_.size(); i++) {
        Warp* warp = warps_[(first + i) % warps_.size()];
        if (warp->running && (at_random() || !warp->polled)) return warp;
      }
      for (Warp* warp : warps_) warp->polled = false;
    }
    return nullptr;
  }

  [[noreturn]] void deadlock() {
    for (Warp* warp : warps_)
      if (const uint32_t waits = warp->alive()) {
        const int lane = __builtin_ctz(waits);
        warp->now = &launch_.kernel->code[warp->pc[lane]];
        warp->fail(lane, "deadlock");
      }
    fault("deadlock");
  }

  // Lets a warp execute until it must wait or the budget is used up.
  void turn(Warp& warp, long budget) {
    warp.cta->begun = true;
    warp.polled = false;
    while (warp.running && budget > 0 && !warp.polled) {
      int pc = INT_MAX, others = INT_MAX;
      if (at_random()) {
        int skip = (int)(draw_() % (unsigned)__builtin_popcount(warp.running));
        uint32_t rest = warp.running;
        while (skip--) rest &= rest - 1;
        pc = warp.pc[__builtin_ctz(rest)];
      } else {
        each(warp.running, [&](int l) { pc = std::min(pc, warp.pc[l]); });
      }
      uint32_t group = 0;
      each(warp.running, [&](int l) {
        if (warp.pc[l] == pc) group |= 1u << l;
        else others = std::min(others, warp.pc[l]);
      });
      if (at_random()) others = INT_MAX;
      while (budget-- > 0 && step(warp, group, pc) && !warp.polled && pc < others) {
      }
      each(group & warp.running, [&](int l) { warp.pc[l] = pc; });
    }
  }

  // Executes one instruction for the lanes of a group. False: the group has ended, and its lanes have stored counters.
  bool step(Warp& warp, uint32_t& group, int& pc) {
    const Instruction& in = launch_.kernel->code[pc];
    warp.now = &in;
    (*grid_.counts)[(size_t)pc]++;
    if (grid_.progress != seen_) seen_ = grid_.progress, patience_ = kPatience;
    if (!--patience_) warp.fail(__builtin_ctz(group), "no progress: a loop waits for what nothing writes");
    uint32_t active = group;
    if (in.guard.number) {
      if (group & ~warp.defined[in.guard.number]) warp.fail(__builtin_ctz(group), "a guard that is undefined");
      const uint32_t p = warp.predicate(in.guard);
      active &= in.unless ? ~p : p;
    }
    if (in.flow == Flow::kPlain) {
      if (active) perform(warp, in, active);
      pc++;
      return true;
    }
    if (in.flow == Flow::kBranch && (active == group || !active)) {
      pc = active ? in.target : pc + 1;
      return true;
    }
    // From here on lanes may diverge.
    each(group & ~active, [&](int l) { warp.pc[l] = pc + 1; });
    each(active, [&](int l) { warp.pc[l] = in.flow == Flow::kBranch ? in.target : pc; });
    const uint32_t passed = group & ~active;
    group = 0;
    if (in.flow == Flow::kBranch || !active) return false;
    if (passed && in.flow != Flow::kExit) warp.fail(__builtin_ctz(passed), "a guard on an instruction of all lanes");
    switch (in.flow) {
      case Flow::kExit: end(warp, active); return false;
      case Flow::kBarrier: wait_barrier(warp, in, active); return false;
      case Flow::kClusterWait: wait_cluster(warp, active); return false;
      default: rendezvous(warp, in, active); return false;
    }
  }

  void perform(Warp& warp, const Instruction& in, uint32_t active) {
    uint32_t all = kAll;
    for (int i = in.outputs; i < in.count; i++) all &= warp.defined[in.operands[i].number];
    if (in.undefined == Undefined::kFault && (active & ~all))
      warp.fail(__builtin_ctz(active & ~all), "an operand that is undefined");
    in.execute(warp, in, active);
    if (in.undefined == Undefined::kOwn) return;
    for (int i = 0; i < in.outputs; i++) {
      uint32_t& defined = warp.defined[in.operands[i].number];
      defined = (defined & ~active) | (all & active);
    }
  }

  void rendezvous(Warp& warp, const Instruction& in, uint32_t active) {
    const int first = __builtin_ctz(active);
    uint32_t members = kAll;
    if (in.members >= 0) {
      members = (uint32_t)warp.integer(in.operands[in.members], first);
      each(active, [&](int l) {
        if ((uint32_t)warp.integer(in.operands[in.members], l) != members) warp.fail(l, "lanes give different masks");
        if (!(members >> l & 1)) warp.fail(l, "mask 0x%08x leaves out the lane", members);
      });
    }
    if (members & ~warp.alive()) warp.fail(first, "waits for lanes that have ended");
    warp.running &= ~active;
    warp.parked |= active;
    uint32_t here = 0;
    each(warp.parked, [&](int l) { here |= (uint32_t)(warp.pc[l] == warp.pc[first]) << l; });
    if (members & ~here) return;
    warp.parked &= ~members;
    warp.running |= members;
    perform(warp, in, members);
    each(members, [&](int l) { warp.pc[l]++; });
  }

  void wait_barrier(Warp& warp, const Instruction& in, uint32_t active) {
    Cta& cta = *warp.cta;
    const int first = __builtin_ctz(active);
    perform(warp, in, active);
    if (cta.barrier && cta.barrier != &in)
      warp.fail(first, "divergent barrier: other threads of the block wait at line %d", cta.barrier->line);
    if (cta.alive < (int)launch_.block) warp.fail(first, "divergent barrier: a thread of the block has ended");
    cta.barrier = &in;
    each(active, [&](int l) { cta.rendezvous.arrive(warp.thread(l), warp.order[l]); });
    warp.running &= ~active;
    warp.at_barrier |= active;
    cta.at_barrier += __builtin_popcount(active);
    if (cta.at_barrier < cta.alive) return;
    grid_.progress++;
    const Clock reached = cta.rendezvous.complete();
    cta.barrier = nullptr;
    cta.at_barrier = 0;
    for (auto& w : cta.warps) {
      each(w->at_barrier, [&](int l) {
        w->order[l].known = reached;
        w->pc[l]++;
      });
      w->running |= std::exchange(w->at_barrier, 0);
    }
  }

  void wait_cluster(Warp& warp, uint32_t active) {
    Cluster& cluster = *grid_.clusters[warp.cta->number / launch_.cluster];
    grid_.progress++;
    each(active, [&](int l) {
      if (!warp.cluster_phase[l]) warp.fail(l, "waits at the cluster's barrier without having arrived");
      if (warp.cluster_phase[l] > cluster.phase) {
        warp.running &= ~(1u << l);
        warp.at_cluster |= 1u << l;
      } else {
        warp.order[l].known = latest(warp.order[l].known, cluster.reached);
        warp.cluster_phase[l] = 0;
        warp.pc[l]++;
      }
    });
  }

  void end(Warp& warp, uint32_t active) {
    Cta& cta = *warp.cta;
    Cluster& cluster = *grid_.clusters[cta.number / launch_.cluster];
    each(active, [&](int l) {
      size_t pending = warp.open[l].size();
      for (const auto& group : warp.groups[l]) pending += group.size();
      if (pending) warp.fail(l, "ends with %zu asynchronous copies that it has not waited for", pending);
      if (cta.at_barrier) warp.fail(l, "divergent barrier: ends while threads wait at line %d", cta.barrier->line);
      if (warp.cluster_phase[l]) warp.fail(l, "ends without waiting at the cluster's barrier");
    });
    grid_.progress++;
    warp.running &= ~active;
    cta.alive -= __builtin_popcount(active);
    cluster.alive -= __builtin_popcount(active);
    complete_phase(cluster);
  }

  Grid& grid_;
  const Launch& launch_;
  unsigned seed_;
  std::mt19937 draw_;
  std::vector<int> waiting_;  // clusters that have not begun, the next one last
  int resident_, running_clusters_ = 0;
  Clock known_;
  std::vector<Warp*> warps_;  // of resident CTAs, by priority
  uint64_t seen_ = 0, patience_ = kPatience;
};

}  // namespace

void run(const Launch& launch, unsigned seed) {
  Grid grid;
  grid.launch = &launch;
  std::vector<uint64_t>& counts = executed[launch.kernel];
  counts.resize(launch.kernel->code.size());
  grid.counts = &counts;
  for (auto& memory : arrays.all) memory->forget_accesses();
  const std::vector<uint8_t> zeros(sizeof grid.barrier_words, 1);
  arrays.add("the grid's barrier", grid.barrier_words, sizeof grid.barrier_words, true, zeros.data());
  struct Removed {
    ~Removed() { arrays.all.pop_back(), arrays.last = nullptr; }
  } removed;
  Scheduler(grid, seed).run();
}

}  // namespace ptx
