// An interpreter of compiled PTX, the input of a GPU's assembler: executes its instructions on the CPU, with checks.
//
//   csrc/cuda/*.cu --nvcc--> PTX text --module.cpp--> Kernel: Instructions with operands resolved
//   csrc/cuda/launch.cu, compiled by nvcc, linked with runtime.cpp --> grids, attributes, the bytes of Call
//
// A warp executes one instruction for the lanes that are at it (32 program counters). schedule.cpp draws the order of
// warps from a seed. Undefined behaviour, or an instruction that is not in the tables, ends a launch with a Fault:
//
//   bounds, alignment    of every single array (memory.cpp)
//   undefined values     of registers and memory; they may be copied, every other use is a fault
//   data races           two accesses that are not ordered by barriers, release and acquire (order.h, memory.cpp)
//   barriers             that threads reach at different places, or not at all; warp instructions without all lanes
//   clusters             shared memory of a CTA that has not begun or has ended
//   asynchronous copies  read or left before a wait
//   dependent launches   global memory before griddepcontrol.wait
//   no progress          deadlocks, and loops that wait for a value that no thread writes
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "order.h"

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAll = ~0u;

struct Fault {
  std::string message;
};
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

struct Warp;
struct Instruction;
using Execute = void (*)(Warp&, const Instruction&, uint32_t active);

// The scheduler's action for an instruction.
enum class Flow : uint8_t {
  kPlain,       // executes, and continues
  kBranch,      // to `target`
  kExit,        // the thread ends
  kRendezvous,  // all lanes of the member mask execute it together
  kBarrier,     // of the CTA
  kClusterWait  // for the phase of the cluster's barrier that the lane has arrived at
};

// The effect of an operand without a defined value.
enum class Undefined : uint8_t {
  kFault,
  kPasses,  // its outputs are undefined too
  kOwn,     // its function decides
};

// A register, or a constant, which is a register that is written once: 32 lanes of `width` bytes; predicates (width 0)
// are one mask of 32 bits.
struct Operand {
  uint32_t at = 0;  // offset in Warp::file
  uint16_t number = 0;
  uint8_t width = 0;
  int32_t displacement = 0;  // of an address
};
constexpr int kMostOperands = 16;

struct Instruction {
  Execute execute = nullptr;
  Flow flow = Flow::kPlain;
  Undefined undefined = Undefined::kFault;
  bool unless = false;  // executes if the guard is false
  int8_t outputs = 0, count = 0;
  int8_t members = -1;  // kRendezvous: the operand that has the member mask; -1: all lanes of the warp
  Operand guard;        // number 0: none
  Operand operands[kMostOperands];
  int target = 0;  // of a branch
  int line = 0;    // of the text
  std::string text;
};

struct Kernel {
  std::string name;
  size_t parameter_bytes = 0;
  unsigned threads = 0;  // .maxntid
  std::vector<Instruction> code;
  uint32_t file_bytes = 0;
  uint16_t registers = 1;  // register 0 is none
  struct Constant {
    Operand operand;
    uint64_t value;
  };
  std::vector<Constant> constants;
  std::map<std::string, Operand> specials;  // %tid.x and its like
};

// Returns the kernels of a text by name. A Fault for instructions that are not in the tables.
std::map<std::string, Kernel> parse(const std::string& text);

// An opcode in the tables. signature: widths of the outputs, '=', widths of the inputs; p: predicate;
// a, A: address of 8, of 4 bytes, or a symbol; L: label; '>' before a width: or wider.
struct Opcode {
  std::string signature;
  Execute execute;
  Flow flow = Flow::kPlain;
  Undefined undefined = Undefined::kFault;
  int members = -1;
};
using Opcodes = std::multimap<std::string, Opcode>;
void add_arithmetic(Opcodes&);
void add_conversions(Opcodes&);
void add_memory(Opcodes&);
void add_warp(Opcodes&);

struct Copy {
  uint32_t to;  // in the CTA's shared memory
  uint64_t from;
  uint32_t bytes;  // of 16; the rest is zeros
};

struct Cta;
struct Grid;

struct Warp {
  Cta* cta;
  int number;  // in the launch
  std::vector<uint8_t> file;
  std::vector<uint32_t> defined;  // lanes, by register
  int pc[kLanes] = {};
  uint32_t running = kAll, parked = 0, at_barrier = 0, at_cluster = 0;  // a lane is in one of them, or has ended
  uint32_t after_wait = 0;                                              // griddepcontrol.wait
  bool polled = false;                                                  // others run first
  Order order[kLanes];
  Clock read[kLanes];                             // by relaxed loads, for a fence
  int cluster_phase[kLanes] = {};                 // that the lane has arrived for; 0: it has not arrived
  std::vector<Copy> open[kLanes];                 // not yet in a group
  std::vector<std::vector<Copy>> groups[kLanes];  // oldest first
  const Instruction* now = nullptr;

  template <class T>
  T* lanes(const Operand& operand) {
    return reinterpret_cast<T*>(file.data() + operand.at);
  }
  uint32_t& predicate(const Operand& operand) { return *lanes<uint32_t>(operand); }
  uint64_t integer(const Operand& operand, int lane);
  // The value's low bytes, as many as the register has.
  void set(const Operand& operand, int lane, uint64_t value);
  uint32_t alive() const { return running | parked | at_barrier | at_cluster; }
  int thread(int lane) const { return number * kLanes + lane; }
  [[noreturn]] void fail(int lane, const char* format, ...) __attribute__((format(printf, 3, 4)));
};

template <class F>
inline void each(uint32_t active, F&& f) {
  if (active == kAll) {
    for (int lane = 0; lane < kLanes; lane++) f(lane);
  } else {
    for (uint32_t rest = active; rest; rest &= rest - 1) f(__builtin_ctz(rest));
  }
}

// ---- memory

constexpr uint64_t kSharedWindow = 1ull << 56;  // generic addresses of shared memory
constexpr uint32_t kSharedBase = 1024;          // where the CTA's dynamic shared memory begins
constexpr int kRankShift = 24;                  // rank + 1 in the bits from here on: that CTA's memory, by mapa
constexpr uint64_t kParameterBase = 0;

enum class Space { kGeneric, kGlobal, kShared };

struct Memory {
  std::string name;
  uint64_t base = 0;
  std::vector<uint8_t> own;  // shared memory is its own, arrays are the caller's
  uint8_t* bytes = nullptr;
  size_t size = 0;
  bool writable = true;
  std::vector<uint8_t> defined;  // of every byte
  std::vector<Cell> cells;       // of every 2 bytes, if writable
  Accesses more;
  void forget_accesses();
};

struct Place {
  Memory* memory;
  size_t offset;
  uint8_t* bytes() const { return memory->bytes + offset; }
};
// Returns the array of a lane's access, or a Fault.
Place resolve(Warp& warp, int lane, uint64_t address, size_t size, Space space, bool writes);
// Records an access. A Fault if it is a data race.
void note(Warp& warp, int lane, const Place& place, size_t size, Access access);
bool defined(const Place& place, size_t size);
void set_defined(const Place& place, size_t size, bool defined);
void land(Warp& warp, int lane, const Copy& copy);

// ---- a launch

struct Cta {
  Grid* grid;
  unsigned number, rank;  // in the grid, in the cluster
  bool begun = false;
  int alive = 0;  // threads
  std::vector<std::unique_ptr<Warp>> warps;
  Memory shared;
  int at_barrier = 0;  // threads
  const Instruction* barrier = nullptr;
  Rendezvous rendezvous;
};

struct Cluster {
  std::vector<std::unique_ptr<Cta>> ctas;
  int alive = 0, arrived = 0, phase = 0;
  Rendezvous rendezvous;
  Clock reached;
};

struct Launch {
  const Kernel* kernel;
  unsigned grid, block, cluster;
  size_t shared;
  bool cooperative, dependent;  // dependent: may begin before the launch before it has ended
  std::vector<uint8_t> parameters;
};

struct Grid {
  const Launch* launch;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::map<uint64_t, Clock> flags;  // what release operations published, by address
  uint64_t progress = 0;            // counts the events for which another thread may wait
  uint32_t barrier_words[2] = {};   // of the grid's barrier; %envreg1 and 2 hold the address
  std::vector<uint64_t>* counts = nullptr;
  int warps_per_cta() const { return (int)(launch->block / kLanes); }
};

// Arrays in global memory.
struct Arrays {
  std::vector<std::unique_ptr<Memory>> all;
  Memory* last = nullptr;
  void add(const char* name, const void* at, size_t bytes, bool writable, const uint8_t* defined);
};
extern Arrays arrays;

// Sets how matrix instructions add.
enum class Matrix { kExact, kTruncates };
extern Matrix matrix;

// Counts how often each instruction was executed.
extern std::map<const Kernel*, std::vector<uint64_t>> executed;

void run(const Launch& launch, unsigned seed);
// Returns a cluster of the grid, ready to run. known: the clock with which its threads begin.
std::unique_ptr<Cluster> begin(Grid& grid, int index, const Clock& known);
// Ends the phase of the cluster's barrier if all its threads have arrived.
void complete_phase(Cluster& cluster);

}  // namespace ptx
