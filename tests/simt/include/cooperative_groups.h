// The groups that kernels of this project synchronise: block, cluster, grid.
#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {

struct thread_block {
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const { simt::sync_block({file, line}); }
};
inline thread_block this_thread_block() { return {}; }

struct cluster_group {
  struct arrival_token {};
  arrival_token barrier_arrive() const {
    simt::arrive(simt::Scope::kCluster);
    return {};
  }
  void barrier_wait(arrival_token&&) const { simt::wait(simt::Scope::kCluster); }
  void barrier_wait() const { simt::wait(simt::Scope::kCluster); }
  void sync() const { barrier_wait(barrier_arrive()); }
  unsigned block_rank() const { return simt::self.cluster_rank; }
  unsigned num_blocks() const { return simt::self.cluster_size; }
  template <class T>
  T* map_shared_rank(T* mine, unsigned rank) const {
    return reinterpret_cast<T*>(simt::shared_of(mine, rank));
  }
};
inline cluster_group this_cluster() { return {}; }

struct grid_group {
  void sync() const {
    simt::arrive(simt::Scope::kGrid);
    simt::wait(simt::Scope::kGrid);
  }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
