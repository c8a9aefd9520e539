// Starts and ends blocks and launches.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "state.h"

namespace simt {

Device device;

namespace {

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
  end_rendezvous_without(*me.warp);
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
  runtime.message.clear();
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
      runtime.message = deadlock();
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

const std::string& last_fault() { return runtime.message; }

}  // namespace simt
