// The scheduler, barriers, warps, copies and launches of simt.h. Compiled without sanitizers: what it does for a kernel
// is not the kernel's own doing.
#include "runtime.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Thread self;
Device device;

namespace {

struct Warp;
struct Block;
struct Grid;

// A CUDA thread, and the fiber that runs it.
struct Lane {
  uint3 thread;
  Thread ids;
  Fiber fiber;
  Warp* warp;
  Block* block;
  unsigned number;        // in the block
  const char* waits_for;  // for the report of a deadlock
  Place at;
  bool arrived[3];  // by Scope: at a barrier, and has not waited there yet
  unsigned arrival[3];
  std::deque<std::pair<unsigned, Copy>> copies;  // on their way, with the number of their group
  unsigned groups_closed;
};

struct Barrier {
  unsigned threads = 0, arrived = 0, phase = 0;
  unsigned flags = 0, count[2] = {};
  Place place = {};
  std::vector<Lane*> waiting;
  char order[2];  // for ThreadSanitizer, of even and odd phases
};

// Lanes of a warp at one primitive, by mask.
struct Meeting {
  uint32_t mask, arrived = 0;
  const char* primitive = nullptr;
  Combine combine = nullptr;
  unsigned phase = 0;
  void* operands[32];
  char order[2];
};

struct Warp {
  Lane* lanes[32] = {};
  uint32_t live = 0, ready = 0;
  uint32_t stepped_back = 0;  // of the ready ones: after the others
  bool queued = false;
  int64_t priority = 0;
  std::vector<std::unique_ptr<Meeting>> meetings;
};

struct Cluster {
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned live_blocks = 0;
};

struct Block {
  Grid* grid;
  Cluster* cluster;
  uint3 index;
  unsigned number;
  unsigned live = 0;
  bool begun = false;
  bool signalled = false;  // let_later_launch_start
  char* shared = nullptr;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Grid {
  Launch launch;
  Grid* before = nullptr;  // on the same stream
  unsigned clusters = 0, running = 0, ended = 0, most_at_once = 0;
  unsigned signalled = 0;      // blocks that have signalled or exited
  std::vector<unsigned> left;  // clusters that have not started, the next one last
  bool begun = false, complete = false;
  Barrier barrier;
  std::vector<Lane*> waiting;  // for this grid, at griddepcontrol.wait of the next
  char host_order, end_order;
  unsigned blocks() const { return clusters * launch.cluster; }
};

enum class Policy { kOldest, kNewest, kRandom, kPriorities };

struct Runtime {
  std::mutex mutex;
  std::vector<std::pair<void*, std::unique_ptr<Grid>>> grids;  // stream and grid, in the order of their launches
  std::vector<std::unique_ptr<Cluster>> clusters;              // resident
  std::vector<std::unique_ptr<Lane>> idle;
  std::deque<Warp*> ready;
  Warp* current = nullptr;
  Lane* running = nullptr;
  bool to_host = false;  // there is something for `run` to do before the next lane runs
  bool failed = false;
  std::string sentence;
  unsigned seed = 0;
  Policy policy = Policy::kOldest;
  std::mt19937 random;
  int64_t lowest_priority = 0;
  size_t resident_threads = 0, resident_shared = 0, resident_blocks = 0;
  size_t polls_in_vain = 0;
};
Runtime runtime;

unsigned draw(unsigned n) { return runtime.random() % n; }

// ---- which lane runs next

void push(Warp& warp, bool last) {
  if (warp.queued) return;
  warp.queued = true;
  // kNewest takes from the back, so that what is to come last goes to the front.
  if (last && runtime.policy == Policy::kNewest) runtime.ready.push_front(&warp);
  else runtime.ready.push_back(&warp);
}

void wake(Lane& lane) {
  lane.warp->ready |= 1u << lane.ids.lane;
  if (lane.warp != runtime.current) push(*lane.warp, false);
}

void wake(std::vector<Lane*>& lanes) {
  for (Lane* lane : lanes) wake(*lane);
  lanes.clear();
}

Warp* take_warp() {
  std::deque<Warp*>& ready = runtime.ready;
  if (ready.empty()) return nullptr;
  size_t i = 0;
  if (runtime.policy == Policy::kNewest) i = ready.size() - 1;
  if (runtime.policy == Policy::kRandom) i = draw(ready.size());
  if (runtime.policy == Policy::kPriorities) {
    for (size_t j = 1; j < ready.size(); j++)
      if (ready[j]->priority > ready[i]->priority) i = j;
    if (draw(64) == 0) ready[i]->priority = draw(1 << 20);
  }
  if (i != 0 && i != ready.size() - 1) std::swap(ready[i], ready.back()), i = ready.size() - 1;
  Warp* warp = ready[i];
  if (i == 0) ready.pop_front();
  else ready.pop_back();
  warp->queued = false;
  return warp;
}

Lane* take_lane() {
  if (!runtime.current || !runtime.current->ready) runtime.current = take_warp();
  Warp* warp = runtime.current;
  if (!warp) return nullptr;
  if (!(warp->ready & ~warp->stepped_back)) warp->stepped_back = 0;
  const uint32_t ready = warp->ready & ~warp->stepped_back;
  unsigned lane;
  if (runtime.policy == Policy::kOldest) {
    lane = __builtin_ctz(ready);
  } else if (runtime.policy == Policy::kNewest) {
    lane = 31 - __builtin_clz(ready);
  } else {
    const unsigned from = draw(32);
    lane = (__builtin_ctz(ready >> from | ready << (-from & 31)) + from) % 32;
  }
  warp->ready &= ~(1u << lane);
  return warp->lanes[lane];
}

// Leaves the running lane, which has arranged for its waking, or the host.
void go_on(Fiber& from) {
  Lane* next = runtime.to_host && runtime.running ? nullptr : take_lane();
  runtime.running = next;
  if (next) {
    const Launch& launch = next->block->grid->launch;
    threadIdx = next->thread, blockIdx = next->block->index;
    blockDim = launch.block, gridDim = launch.grid;
    self = next->ids;
  }
  Fiber& to = next ? next->fiber : Fiber::of_host();
  if (&to != &from) to.enter_from(from);
}

void wait_in(const char* what, Place at = {}) {
  Lane& me = *runtime.running;
  me.waits_for = what;
  me.at = at;
  runtime.polls_in_vain = 0;
  go_on(me.fiber);
}

// The running lane lets all others go first.
void step_back() {
  Lane& me = *runtime.running;
  me.warp->ready |= 1u << me.ids.lane;
  me.warp->stepped_back |= 1u << me.ids.lane;
  me.warp->priority = --runtime.lowest_priority;
  push(*me.warp, true);
  runtime.current = nullptr;
  go_on(me.fiber);
}

std::string name_of(const Lane& lane) {
  return "thread " + std::to_string(lane.number) + " of block " + std::to_string(lane.block->number);
}

std::string place_of(Place place) {
  const char* slash = std::strrchr(place.file, '/');
  return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

std::string deadlock() {
  std::string text = "deadlock:";
  int named = 0;
  const char* last = nullptr;
  for (const auto& cluster : runtime.clusters)
    for (const auto& block : cluster->blocks)
      for (const Warp& warp : block->warps)
        for (unsigned l = 0; l < 32; l++) {
          if (!(warp.live >> l & 1)) continue;
          const Lane& lane = *warp.lanes[l];
          if (lane.waits_for == last || named == 8) continue;
          last = lane.waits_for;
          text += (named++ ? ", " : " ") + name_of(lane) + " waits in " + lane.waits_for;
          if (lane.at.file) text += " at " + place_of(lane.at);
        }
  unsigned left = 0;
  for (const auto& [stream, grid] : runtime.grids) left += grid->left.size() * grid->launch.cluster;
  if (left) text += "; " + std::to_string(left) + " blocks have not started";
  return text;
}

// ---- barriers

void complete(Barrier& barrier) {
  barrier.count[barrier.phase & 1] = barrier.flags;
  barrier.arrived = barrier.flags = 0;
  barrier.phase++;
  wake(barrier.waiting);
}

Barrier& barrier_of(Scope scope) {
  Block& block = *runtime.running->block;
  if (scope == Scope::kCluster) {
    if (device.largest_cluster == 0) fault("a cluster barrier on a device that has no clusters");
    return block.cluster->barrier;
  }
  if (!block.grid->launch.cooperative) fault("grid.sync in a launch that is not cooperative");
  return block.grid->barrier;
}

// ---- the life of a block

void end_meetings_without(Warp& warp) {
  for (auto& meeting : warp.meetings) {
    const uint32_t lanes = meeting->mask & warp.live;
    if (!meeting->arrived || meeting->arrived != lanes) continue;
    meeting->combine(meeting->operands, lanes);
    meeting->arrived = 0;
    meeting->phase++;
    for (unsigned l = 0; l < 32; l++)
      if (lanes >> l & 1) wake(*warp.lanes[l]);
  }
}

void exit_thread(Lane& me) {
  Unseen unseen;
  Block& block = *me.block;
  Grid& grid = *block.grid;
  Barrier& cluster = block.cluster->barrier;
  if (!me.copies.empty())
    fault("%s exits with %zu asynchronous copies that it has not waited for", name_of(me).c_str(), me.copies.size());
  if (block.barrier.arrived)
    fault("divergent barrier: %s exits, others wait at %s", name_of(me).c_str(), place_of(block.barrier.place).c_str());
  if (grid.barrier.arrived) fault("divergent barrier: %s exits, others wait in grid.sync", name_of(me).c_str());
  runtime.polls_in_vain = 0;
  me.warp->live &= ~(1u << me.ids.lane);
  end_meetings_without(*me.warp);
  if (me.arrived[(int)Scope::kCluster] && me.arrival[(int)Scope::kCluster] == cluster.phase) cluster.arrived--;
  cluster.threads--;
  if (cluster.threads && cluster.arrived == cluster.threads) complete(cluster);
  if (--block.live == 0) {
    if (!block.signalled) block.signalled = true, grid.signalled++;
    std::memset(block.shared, 0xff, grid.launch.shared);
    forbid(block.shared, grid.launch.shared);
    block.cluster->live_blocks--;
    runtime.to_host = true;
  }
}

void thread_main(void* argument) {
  Lane& me = *static_cast<Lane*>(argument);
  Grid& grid = *me.block->grid;
  me.block->begun = true;
  observe(&grid.host_order);
  if (!grid.launch.overlaps)
    for (Grid* g = grid.before; g; g = g->before) observe(&g->end_order);
  grid.launch.body();
  publish(&grid.end_order);
  exit_thread(me);
  go_on(me.fiber);
}

void start(Grid& grid, unsigned number) {
  const Launch& launch = grid.launch;
  const dim3 g = launch.grid, b = launch.block;
  const unsigned threads = b.x * b.y * b.z;
  runtime.clusters.push_back(std::make_unique<Cluster>());
  Cluster& cluster = *runtime.clusters.back();
  cluster.live_blocks = launch.cluster;
  cluster.barrier.threads = threads * launch.cluster;
  for (unsigned rank = 0; rank < launch.cluster; rank++) {
    const unsigned n = number * launch.cluster + rank;
    cluster.blocks.push_back(std::make_unique<Block>());
    Block& block = *cluster.blocks.back();
    block.grid = &grid, block.cluster = &cluster, block.number = n;
    block.index = {n % g.x, n / g.x % g.y, n / g.x / g.y};
    block.live = block.barrier.threads = threads;
    block.warps = std::vector<Warp>((threads + 31) / 32);
    void* shared = nullptr;
    if (posix_memalign(&shared, 128, std::max<size_t>(launch.shared, 1))) std::abort();
    block.shared = static_cast<char*>(std::memset(shared, 0xff, launch.shared));
    for (unsigned t = 0; t < threads; t++) {
      if (runtime.idle.empty()) runtime.idle.push_back(std::make_unique<Lane>());
      Lane& lane = *runtime.idle.back().release();
      runtime.idle.pop_back();
      Warp& warp = block.warps[t / 32];
      lane.thread = {t % b.x, t / b.x % b.y, t / b.x / b.y};
      lane.ids = {t % 32, rank, launch.cluster};
      lane.warp = &warp, lane.block = &block, lane.number = t;
      lane.waits_for = "starting", lane.at = {};
      std::fill_n(lane.arrived, 3, false);
      lane.copies.clear(), lane.groups_closed = 0;
      lane.fiber.arm(thread_main, &lane);
      warp.lanes[t % 32] = &lane;
      warp.live |= 1u << (t % 32);
      warp.priority = draw(1 << 20);
      wake(lane);
    }
  }
  grid.running++;
  runtime.polls_in_vain = 0;
  runtime.resident_threads += threads * launch.cluster;
  runtime.resident_shared += launch.shared * launch.cluster;
  runtime.resident_blocks += launch.cluster;
}

void release(Cluster& cluster) {
  for (auto& block : cluster.blocks) {
    const Launch& launch = block->grid->launch;
    for (Warp& warp : block->warps)
      for (Lane* lane : warp.lanes)
        if (lane) runtime.idle.emplace_back(lane);
    std::free(block->shared);
    runtime.resident_threads -= launch.block.x * launch.block.y * launch.block.z;
    runtime.resident_shared -= launch.shared;
    runtime.resident_blocks--;
  }
}

// ---- launches

bool fits(const Grid& grid) {
  const Launch& launch = grid.launch;
  const size_t blocks = launch.cooperative ? grid.blocks() : launch.cluster;
  if (grid.running >= grid.most_at_once) return false;
  if (launch.cooperative && grid.begun) return true;  // it has room for all
  const size_t threads = blocks * launch.block.x * launch.block.y * launch.block.z;
  const size_t n = device.multiprocessors;
  return runtime.resident_threads + threads <= n * device.threads_per_multiprocessor &&
         runtime.resident_shared + blocks * launch.shared <= n * device.shared_per_multiprocessor &&
         runtime.resident_blocks + blocks <= n * 32;
}

bool may_begin(const Grid& grid) {
  const Grid* before = grid.before;
  return !before || before->complete ||
         (grid.launch.overlaps && before->begun && before->signalled == before->blocks());
}

void retire_and_start() {
  runtime.to_host = false;
  auto& clusters = runtime.clusters;
  for (size_t i = 0; i < clusters.size();) {
    if (clusters[i]->live_blocks) {
      i++;
      continue;
    }
    Grid& grid = *clusters[i]->blocks[0]->grid;
    if (runtime.current && runtime.current->lanes[0]->block->cluster == clusters[i].get()) runtime.current = nullptr;
    release(*clusters[i]);
    clusters.erase(clusters.begin() + i);
    grid.running--, grid.ended++;
  }
  for (auto& [stream, grid] : runtime.grids) {
    if (!grid->complete && grid->ended == grid->clusters && (!grid->before || grid->before->complete)) {
      grid->complete = true;
      wake(grid->waiting);
    }
    if (!may_begin(*grid)) continue;
    while (!grid->left.empty() && fits(*grid)) {
      grid->begun = true;
      const unsigned number = grid->left.back();
      grid->left.pop_back();
      start(*grid, number);
    }
  }
}

}  // namespace

void fault(const char* sentence, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, sentence);
  std::vsnprintf(text, sizeof text, sentence, arguments);
  va_end(arguments);
  if (!runtime.running) {
    std::fprintf(stderr, "simt: outside of a kernel: %s\n", text);
    std::abort();
  }
  runtime.failed = true;
  runtime.sentence = text;
  Fiber& from = runtime.running->fiber;
  runtime.running = nullptr;
  Fiber::of_host().enter_from(from);
  __builtin_trap();
}

unsigned sync_block_count(Place place, bool flag) {
  Unseen unseen;
  Lane& me = *runtime.running;
  Block& block = *me.block;
  Barrier& barrier = block.barrier;
  if (block.live < barrier.threads)
    fault("divergent barrier: %s waits at %s, but %u threads of the block have exited", name_of(me).c_str(),
          place_of(place).c_str(), barrier.threads - block.live);
  if (barrier.arrived && (place.line != barrier.place.line || std::strcmp(place.file, barrier.place.file)))
    fault("divergent barrier: %s waits at %s, but %s at %s", name_of(me).c_str(), place_of(place).c_str(),
          name_of(*barrier.waiting[0]).c_str(), place_of(barrier.place).c_str());
  const unsigned phase = barrier.phase & 1;
  barrier.place = place;
  barrier.flags += flag;
  publish(&barrier.order[phase]);
  if (++barrier.arrived == barrier.threads) {
    complete(barrier);
  } else {
    barrier.waiting.push_back(&me);
    wait_in("__syncthreads", place);
  }
  observe(&barrier.order[phase]);
  return barrier.count[phase];
}

void sync_block(Place place) { sync_block_count(place, false); }

void arrive(Scope scope) {
  Unseen unseen;
  Lane& me = *runtime.running;
  Barrier& barrier = barrier_of(scope);
  bool& arrived = me.arrived[(int)scope];
  if (arrived) fault("%s arrives twice at a barrier without waiting", name_of(me).c_str());
  arrived = true;
  me.arrival[(int)scope] = barrier.phase;
  publish(&barrier.order[barrier.phase & 1]);
  if (++barrier.arrived == barrier.threads) complete(barrier);
}

void wait(Scope scope) {
  Unseen unseen;
  Lane& me = *runtime.running;
  Barrier& barrier = barrier_of(scope);
  bool& arrived = me.arrived[(int)scope];
  if (!arrived) fault("%s waits at a barrier where it has not arrived", name_of(me).c_str());
  const unsigned phase = me.arrival[(int)scope];
  if (barrier.phase == phase) {
    barrier.waiting.push_back(&me);
    wait_in(scope == Scope::kGrid ? "grid.sync" : "a cluster barrier");
  }
  arrived = false;
  observe(&barrier.order[phase & 1]);
}

void meet(const char* primitive, uint32_t mask, void* operand, Combine combine, bool ordered) {
  Unseen unseen;
  Lane& me = *runtime.running;
  Warp& warp = *me.warp;
  const uint32_t bit = 1u << me.ids.lane;
  if (!(mask & bit))
    fault("%s calls %s with mask 0x%08x, which leaves out its lane %u", name_of(me).c_str(), primitive, mask,
          me.ids.lane);
  Meeting* meeting = nullptr;
  for (auto& m : warp.meetings)
    if (m->mask == mask) meeting = m.get();
  if (!meeting) {
    warp.meetings.push_back(std::make_unique<Meeting>());
    meeting = warp.meetings.back().get();
    meeting->mask = mask;
  }
  if (meeting->arrived && meeting->primitive != primitive)
    fault("%s calls %s with mask 0x%08x, but other lanes wait in %s with it", name_of(me).c_str(), primitive, mask,
          meeting->primitive);
  const unsigned phase = meeting->phase & 1;
  meeting->primitive = primitive;
  meeting->combine = combine;
  meeting->operands[me.ids.lane] = operand;
  meeting->arrived |= bit;
  if (ordered) publish(&meeting->order[phase]);
  const uint32_t lanes = mask & warp.live;
  if (meeting->arrived == lanes) {
    combine(meeting->operands, lanes);
    meeting->arrived = 0;
    meeting->phase++;
    warp.ready |= lanes & ~bit;
    if (&warp != runtime.current) push(warp, false);
  } else {
    wait_in(primitive);
  }
  if (ordered) observe(&meeting->order[phase]);
}

void combine_shuffle(void* const* operands, uint32_t lanes) {
  uint64_t values[32];
  for (unsigned l = 0; l < 32; l++)
    if (lanes >> l & 1) values[l] = static_cast<const Shuffle*>(operands[l])->value;
  for (unsigned l = 0; l < 32; l++) {
    if (!(lanes >> l & 1)) continue;
    Shuffle& shuffle = *static_cast<Shuffle*>(operands[l]);
    if (!(lanes >> shuffle.source & 1))
      fault("lane %u of block %u shuffles from lane %d, which is not in the mask or has exited", l,
            runtime.running->block->number, shuffle.source);
    shuffle.value = values[shuffle.source];
  }
}

void maybe_switch() {
  runtime.polls_in_vain = 0;
  if (runtime.seed == 0 || draw(4)) return;
  Unseen unseen;
  runtime.running->waits_for = "an atomic operation";
  step_back();
}

void poll(const char* what) {
  Unseen unseen;
  Lane& me = *runtime.running;
  me.waits_for = what;
  me.at = {};
  if (++runtime.polls_in_vain > 1000 + 8 * runtime.resident_threads) fault("%s", deadlock().c_str());
  step_back();
}

char* shared_memory() { return runtime.running->block->shared; }

char* shared_of(const void* mine, unsigned rank) {
  const Block& block = *runtime.running->block;
  const char* address = static_cast<const char*>(mine);
  if (rank >= block.cluster->blocks.size())
    fault("block %u asks for the shared memory of rank %u in a cluster of %zu", block.number, rank,
          block.cluster->blocks.size());
  if (address < block.shared || address > block.shared + block.grid->launch.shared)
    fault("block %u maps an address that is not in its shared memory", block.number);
  const Block& other = *block.cluster->blocks[rank];
  if (!other.begun || !other.live)
    fault("block %u maps the shared memory of block %u, which has %s", block.number, other.number,
          other.begun ? "exited" : "not begun");
  return other.shared + (address - block.shared);
}

void check_shared(const char* what, const void* address, unsigned bytes) {
  const Block& block = *runtime.running->block;
  const char* a = static_cast<const char*>(address);
  if (a < block.shared || a + bytes > block.shared + block.grid->launch.shared)
    fault("%s of %u bytes at an address that is not in the shared memory of block %u", what, bytes, block.number);
  if (reinterpret_cast<uintptr_t>(a) % bytes)
    fault("%s in block %u at a shared address that is not a multiple of %u", what, block.number, bytes);
}

bool lands_now(const Copy& copy) {
  if (runtime.seed && draw(2)) return true;
  Unseen unseen;
  Lane& me = *runtime.running;
  me.copies.emplace_back(me.groups_closed, copy);
  return false;
}

void close_group() { runtime.running->groups_closed++; }

bool take_landing(unsigned groups, Copy& copy) {
  Unseen unseen;
  Lane& me = *runtime.running;
  if (me.copies.empty() || me.copies.front().first + groups >= me.groups_closed) return false;
  copy = me.copies.front().second;
  me.copies.pop_front();
  return true;
}

void wait_for_earlier_launch() {
  Unseen unseen;
  Lane& me = *runtime.running;
  Grid& grid = *me.block->grid;
  if (!grid.launch.overlaps || !grid.before) return;
  if (!grid.before->complete) {
    grid.before->waiting.push_back(&me);
    wait_in("cudaGridDependencySynchronize");
  }
  for (Grid* g = grid.before; g; g = g->before) observe(&g->end_order);
}

void let_later_launch_start() {
  Block& block = *runtime.running->block;
  if (block.signalled) return;
  block.signalled = true;
  if (++block.grid->signalled == block.grid->blocks()) runtime.to_host = true;
}

int blocks_per_multiprocessor(unsigned threads, size_t shared) {
  const size_t by_shared = device.shared_per_multiprocessor / (shared + 1024);  // CUDA keeps 1 KB of each block's
  const size_t by_threads = device.threads_per_multiprocessor / ((threads + 31) / 32 * 32);
  return (int)std::min({by_shared, by_threads, size_t(32)});
}

void set_seed(unsigned seed) {
  constexpr Policy policies[] = {Policy::kNewest, Policy::kRandom, Policy::kPriorities};
  runtime.seed = seed;
  runtime.policy = seed ? policies[seed % 3] : Policy::kOldest;
}

void enqueue(void* stream, Launch launch) {
  std::lock_guard<std::mutex> lock(runtime.mutex);
  auto grid = std::make_unique<Grid>();
  for (auto& [other, earlier] : runtime.grids)
    if (other == stream) grid->before = earlier.get();
  grid->launch = std::move(launch);
  const dim3 g = grid->launch.grid, b = grid->launch.block;
  grid->clusters = g.x * g.y * g.z / grid->launch.cluster;
  grid->barrier.threads = g.x * g.y * g.z * b.x * b.y * b.z;
  runtime.grids.emplace_back(stream, std::move(grid));
}

bool run() {
  std::lock_guard<std::mutex> lock(runtime.mutex);
  Unseen unseen;
  runtime.random.seed(runtime.seed);
  runtime.failed = false;
  runtime.sentence.clear();
  runtime.polls_in_vain = 0;
  for (auto& [stream, grid] : runtime.grids) {
    publish(&grid->host_order);
    for (unsigned i = grid->clusters; i-- > 0;) grid->left.push_back(i);
    grid->most_at_once = grid->clusters;
    if (runtime.seed == 0) continue;
    std::shuffle(grid->left.begin(), grid->left.end(), runtime.random);
    if (!grid->launch.cooperative && draw(2)) grid->most_at_once = 1 + draw(4);
  }
  retire_and_start();
  while (!runtime.failed) {
    go_on(Fiber::of_host());
    if (runtime.failed) break;
    if (runtime.to_host) {
      retire_and_start();
    } else if (runtime.clusters.empty()) {
      break;
    } else {
      runtime.failed = true;
      runtime.sentence = deadlock();
    }
  }
  for (auto& cluster : runtime.clusters) release(*cluster);  // after a fault
  for (auto& [stream, grid] : runtime.grids) observe(&grid->end_order);
  runtime.clusters.clear();
  runtime.ready.clear();
  runtime.grids.clear();
  runtime.current = nullptr;
  runtime.running = nullptr;
  return !runtime.failed;
}

const std::string& last_fault() { return runtime.sentence; }

}  // namespace simt
