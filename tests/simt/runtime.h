// What a test program asks of the runtime; simt.h says what it is.
#pragma once
#include <string>

#include "include/simt.h"

namespace simt {

// The GPU that launches ask about and are measured against. The defaults are an H100, with few multiprocessors.
struct Device {
  int capability = 90;  // 10 major + minor
  int multiprocessors = 16;
  int shared_per_block = 227 << 10;
  int shared_per_multiprocessor = 228 << 10;
  int threads_per_multiprocessor = 2048;
  int largest_cluster = 16;  // 0: no clusters
  bool operator==(const Device& d) const {
    return capability == d.capability && multiprocessors == d.multiprocessors &&
           shared_per_block == d.shared_per_block && shared_per_multiprocessor == d.shared_per_multiprocessor &&
           threads_per_multiprocessor == d.threads_per_multiprocessor && largest_cluster == d.largest_cluster;
  }
};
extern Device device;

// How many blocks of a launch fit on one multiprocessor.
int blocks_per_multiprocessor(unsigned threads, size_t shared);

// Schedules are drawn from this from now on. 0: blocks, warps and lanes in ascending order, copies as late as possible.
void set_seed(unsigned seed);

// Appends to a stream; nothing runs before run().
void enqueue(void* stream, Launch launch);
// Runs everything on all streams, those of different streams at once. False: a fault has ended it.
bool run();
// The message of the fault that ended the last run, or "".
const std::string& last_fault();

}  // namespace simt
