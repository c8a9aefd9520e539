// SIMT on the CPU: runs CUDA C++ kernels, unchanged, as g++ compiles them.
//
//   kernel.cu --g++, these headers instead of CUDA's--> one fiber for each CUDA thread, one OS thread for all of them
//
// A fiber runs until it has to wait: at a barrier, for the lanes of its warp, in a spin loop. Then another one runs;
// which, and how many blocks are resident at once, is drawn from a seed, so that a schedule that shows a fault shows it
// again. What a GPU leaves undefined ends a launch here, with a message that names the thread and the place:
//
//   __syncthreads      that not every thread of the block reaches, or that threads reach in different lines
//   *_sync             without the caller in its mask, or with other lanes at another primitive
//   shuffles           from a lane that takes no part
//   deadlocks          at barriers, in warps, spin loops and copies; blocks that cannot start before the waiting ones end
//   async copies       that are misaligned, outside of shared memory, or never waited for
//   cluster memory     of a block that has exited
//   grid.sync          in a launch that is not cooperative
//
// Shared memory starts as NaN. Asynchronous copies land as late as they may (seed 0) or at a time drawn for each. A
// launch that may overlap its predecessor does. AddressSanitizer and ThreadSanitizer work on kernels as on any code:
// with the latter every CUDA thread is a thread, ordered by barriers, __syncwarp, and acquire and release alone;
// shuffles order nothing, as on a GPU.
//
// Not modelled: registers, caches, time, weak memory beyond what ThreadSanitizer sees, kernels on several OS threads.
#pragma once
#include <cstdint>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace simt {

// What else it knows about itself.
struct Thread {
  unsigned lane, cluster_rank, cluster_size;
};
extern Thread self;

// Where a barrier stands in the source.
struct Place {
  const char* file;
  int line;
};

// Ends the launch: the message (as printf) is the runtime's last_fault() from then on.
[[noreturn]] void fault(const char* message, ...) __attribute__((format(printf, 1, 2)));

// ---- barriers. Each returns when all threads concerned have come.
enum class Scope { kBlock, kCluster, kGrid };
void sync_block(Place place);
// Also counts the threads whose flag is set.
unsigned sync_block_count(Place place, bool flag);
void arrive(Scope scope);  // kCluster, kGrid
void wait(Scope scope);    // for the phase that this thread has arrived at

// ---- warps. Every lane of mask brings an operand; when the last one comes, combine sees those of all, and writes the
// results into them. `ordered`: what the lanes did before is visible to all of them after.
using Combine = void (*)(void* const* operands, uint32_t lanes);
void meet(const char* primitive, uint32_t mask, void* operand, Combine combine, bool ordered);

struct Shuffle {
  uint64_t value;
  int source;  // lane
};
void combine_shuffle(void* const* operands, uint32_t lanes);

// ---- scheduling
// Of an atomic operation: lets others run, by the seed.
void maybe_switch();
// Of a poll that may be repeated until somebody else has written: lets others run.
void poll(const char* what);

// ---- memory
char* shared_memory();                             // this block's, exactly as large as the launch says
char* shared_of(const void* mine, unsigned rank);  // the same place in the memory of another block of the cluster
void check_shared(const char* what, const void* address, unsigned bytes);  // a fault unless within this block's

// ---- asynchronous copies of this thread, in groups
struct Copy {
  void* to;
  const void* from;
  unsigned bytes;
  bool valid;  // else zeros
};
// Whether the caller is to carry it out at once; if not, it is kept for take_landing.
bool lands_now(const Copy& copy);
void close_group();
// The next copy that has to land so that at most `groups` groups are still on their way; false: none.
bool take_landing(unsigned groups, Copy& copy);

// ---- launches
void wait_for_earlier_launch();  // griddepcontrol.wait
void let_later_launch_start();   // griddepcontrol.launch_dependents

struct Launch {
  dim3 grid, block;
  unsigned cluster = 1;
  size_t shared = 0;
  bool cooperative = false;
  bool overlaps = false;  // programmatic stream serialization: may start before the launch before it has ended
  std::function<void()> body;
};

}  // namespace simt
