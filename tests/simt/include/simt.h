// SIMT on the CPU: runs CUDA C++ kernels, unchanged, as g++ compiles them.
//
//   kernel.cu --g++, these headers instead of CUDA's--> one fiber for each CUDA thread, one OS thread for all of them
//
// A fiber runs until it must wait: at a barrier, for the lanes of its warp, in a spin loop. Then another one runs. A
// seed decides which, and how many blocks are resident at once, so that a schedule with a fault can be repeated.
// Undefined behaviour ends a launch with a message that names the thread and the place:
//
//   __syncthreads      that not every thread of the block reaches, or that threads reach in different lines
//   *_sync             without the caller in its mask, or with other lanes at another primitive
//   shuffles           from a lane that does not take part
//   deadlocks          at barriers, in warps, spin loops and copies; blocks that cannot start before waiting ones end
//   async copies       that are misaligned, outside of shared memory, or never waited for
//   cluster memory     of a block that has exited
//   grid.sync          in a launch that is not cooperative
//
// Shared memory starts as NaN. Asynchronous copies are done as late as possible (seed 0) or at a random time. A launch
// that may overlap the one before does so. AddressSanitizer and ThreadSanitizer check kernels like any code. For
// ThreadSanitizer, every CUDA thread is a thread. Barriers, __syncwarp, acquire and release order them; shuffles do
// not, as on a GPU.
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

// Those of the running thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace simt {

// Further numbers of the running thread.
struct Thread {
  unsigned lane, cluster_rank, cluster_size;
};
extern Thread self;

// The place of a barrier in the source.
struct Place {
  const char* file;
  int line;
};

// Ends the launch. The message (as printf) becomes the runtime's last_fault().
[[noreturn]] void fault(const char* message, ...) __attribute__((format(printf, 1, 2)));

// ---- barriers. Each returns when all its threads have arrived.
enum class Scope { kBlock, kCluster, kGrid };
void sync_block(Place place);
// Also counts the threads whose flag is set.
unsigned sync_block_count(Place place, bool flag);
void arrive(Scope scope);  // kCluster, kGrid
void wait(Scope scope);    // for the phase that this thread has arrived at

// ---- warps. Every lane of mask passes an operand. When the last one arrives, combine reads all operands, and writes
// the results into them. `ordered`: memory accesses of the lanes before it are visible to all of them after it.
using Combine = void (*)(void* const* operands, uint32_t lanes);
void rendezvous(const char* primitive, uint32_t mask, void* operand, Combine combine, bool ordered);

struct Shuffle {
  uint64_t value;
  int source;  // lane
};
void combine_shuffle(void* const* operands, uint32_t lanes);

// ---- scheduling
// Called by atomic operations: may let others run, depending on the seed.
void maybe_switch();
// Called by a read that may be repeated until another thread has written: lets others run.
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
// Whether the caller must do the copy at once; if not, it is stored for take_landing.
bool lands_now(const Copy& copy);
void close_group();
// Takes the next copy that must be done so that at most `groups` groups are open; false: none.
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
