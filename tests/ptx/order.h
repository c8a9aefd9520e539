// The happens-before relation: vector clocks of all threads of a launch, and the accesses of every cell of memory.
//
// The clock of a thread holds, for every other thread, the last interval of that thread that happens before. Barriers
// and release operations end an interval. After a barrier all its threads share a clock, until one changes.
#pragma once
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace ptx {

using Clock = std::shared_ptr<const std::vector<uint32_t>>;  // [threads of the launch] last interval known
Clock latest(const Clock& a, const Clock& b);                // a and b joined; either may be null

// Of one thread.
struct Order {
  Clock known;
  uint32_t interval = 1;
};

// A barrier's threads: their clocks are joined, and all continue with the result.
class Rendezvous {
 public:
  void arrive(int thread, Order& order);
  Clock complete();  // and starts again

 private:
  std::vector<Clock> known_;
  std::vector<std::pair<int, uint32_t>> own_;
};

enum class Access : uint8_t {
  kNone,
  kRead,
  kWrite,
  kStrong,  // acquire, release, atomic: no race among themselves
};

// Lanes of a warp that made the same access in the same interval.
struct Accessors {
  uint32_t interval = 0, lanes = 0;
  uint16_t warp = 0;
  Access access = Access::kNone;
};

// The last write, and all reads and atomic accesses since.
struct Cell {
  Accessors write, first;
  int32_t more = -1;  // index in Accesses
};
using Accesses = std::vector<std::vector<Accessors>>;

// Adds the access of a lane. Returns an earlier one that it is a race with, or null.
const Accessors* add_access(Cell& cell, Accesses& more, int warp, int lane, const Order& order, Access access);

}  // namespace ptx
