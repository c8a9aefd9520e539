// The interface of the runtime for test programs; simt.h describes the runtime.
#pragma once
#include <string>

#include "include/simt.h"

namespace simt {

// The simulated GPU, whose limits launches are checked against. The defaults are an H100 with few multiprocessors.
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

// The number of blocks of a launch that fit on one multiprocessor.
int blocks_per_multiprocessor(unsigned threads, size_t shared);

// Sets the seed of later schedules. 0: blocks, warps and lanes in ascending order, copies as late as possible.
void set_seed(unsigned seed);

// Appends to a stream; launches run in run().
void enqueue(void* stream, Launch launch);
// Runs the launches of all streams, those of different streams at once. False: a fault has ended them.
bool run();
// The message of the fault that ended the last run, or "".
const std::string& last_fault();

}  // namespace simt
