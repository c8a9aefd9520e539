// The runtime's state, shared by its three parts: the threads (run by schedule.cpp), what they wait for (sync.cpp), and
// their launches (launch.cpp). It is compiled without sanitizers, which must check the kernels alone.
#pragma once
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "runtime.h"

namespace simt {

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

// The lanes of a warp that wait at one primitive, by mask.
struct RendezvousPoint {
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
  std::vector<std::unique_ptr<RendezvousPoint>> points;
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

// The choice among the ready warps: the one that has waited longest, or shortest (so that one block runs as far as it
// can before the next begins), any, or the one of highest priority, drawn for each.
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
  std::string message;
  unsigned seed = 0;
  Policy policy = Policy::kOldest;
  std::mt19937 random;
  int64_t lowest_priority = 0;
  size_t resident_threads = 0, resident_shared = 0, resident_blocks = 0;
  size_t polls_in_vain = 0;
};
extern Runtime runtime;

// ---- schedule.cpp

// A number below n.
unsigned draw(unsigned n);
// Makes lanes ready to run.
void wake(Warp& warp, uint32_t lanes);
void wake(Lane& lane);
void wake(std::vector<Lane*>& lanes);
// Leaves the running lane, which another lane will wake, or the host.
void go_on(Fiber& from);
// Makes the running lane wait until others wake it. `what`: for the report of a deadlock.
void wait_in(const char* what, Place at = {});
// Returns "deadlock: ", and the waiting threads with what each waits for.
std::string deadlock();
std::string name_of(const Lane& lane);
std::string place_of(Place place);

// ---- sync.cpp

void complete(Barrier& barrier);
// A lane of the warp has exited: lanes that waited only for it continue.
void end_rendezvous_without(Warp& warp);

}  // namespace simt
