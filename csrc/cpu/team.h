// A team of threads that runs a program of stages together, in one parallel region, and cannot deadlock.
//
// A program is a sequence of stages, each cut into chunks. A thread takes chunks until none is left; the thread that
// finishes the last chunk runs the program's serial step (advance) and opens the next stage. A thread waits only for
// chunks that another thread has already taken. So if the pool starts only one of the threads, or one after the other
// (nested parallelism, a busy machine), that one does all the work, and threads that start late find it done.
//
//   slot 0 | chunks 0 1 2 3      A thread starts with the chunks of its own slot, then takes from the other slots. The
//   slot 1 | chunks 4 5 6 7      chunks of a slot cover the same tokens at every pass, so that one thread's cache holds
//                                them; passes run in alternating direction, so that what a cache still holds of the
//                                last pass is read first.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>

namespace apet::cpu {

// Program:
//   int64_t chunks()                      the number of chunks of the open stage
//   bool backwards()                      whether slots start with their last chunk
//   void run(int64_t chunk, int slot)
//   bool advance()                        opens the next stage; runs on one thread; false at the end of the program
template <class Program>
class Team {
 public:
  struct alignas(64) Counter {
    std::atomic<uint64_t> count;
  };

  // counters: one for each thread, uninitialised.
  Team(Program* program, int threads, Counter* counters) : program_(program), threads_(threads), taken_(counters) {
    open(0);
  }

  // To be called once per slot, from any threads, in any order. Returns at the end of the program.
  void work(int slot) {
    uint32_t stage = stage_.load(std::memory_order_acquire);
    while (stage != kOver) {
      for (int i = 0; i < threads_; i++) take_chunks(stage, slot, (slot + i) % threads_);
      stage = next_stage(stage);
    }
  }

 private:
  static constexpr uint32_t kOver = ~0u;
  // Stages are counted through all images of a team. After the last number come 0 and 1 again, as even and odd ones.
  static uint32_t after(uint32_t stage) { return stage == kOver - 2 ? 0 : stage + 1; }

  void open(uint32_t stage) {
    const int64_t chunks = program_->chunks();
    left_.store(chunks, std::memory_order_relaxed);
    chunks_[stage & 1].store(chunks, std::memory_order_release);
    for (int slot = 0; slot < threads_; slot++)
      taken_[slot].count.store((uint64_t)stage << 32, std::memory_order_relaxed);
    stage_.store(stage, std::memory_order_release);
  }

  // Takes chunks of the slot `owner`. A slot's counter holds the stage beside the number of its chunks that are taken,
  // so the exchange of a thread that is still in an earlier stage fails, and it takes nothing. (chunks_ has one entry
  // for even and one for odd stages: while a thread may still read one at stage s, stage s + 1 writes the other, and
  // when s + 2 writes this one the counters have moved on.)
  void take_chunks(uint32_t stage, int slot, int owner) {
    std::atomic<uint64_t>& counter = taken_[owner].count;
    uint64_t taken = counter.load(std::memory_order_acquire);
    while (taken >> 32 == stage) {
      const int64_t chunks = chunks_[stage & 1].load(std::memory_order_acquire), n = (int64_t)(taken & 0xffffffffu);
      const int64_t begin = chunks * owner / threads_, end = chunks * (owner + 1) / threads_;
      if (begin + n >= end) return;
      if (!counter.compare_exchange_weak(taken, taken + 1, std::memory_order_acq_rel)) continue;
      program_->run(program_->backwards() ? end - 1 - n : begin + n, slot);
      if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        if (program_->advance()) open(after(stage));
        else stage_.store(kOver, std::memory_order_release);
        return;
      }
      taken = counter.load(std::memory_order_acquire);
    }
  }

  uint32_t next_stage(uint32_t stage) {
    for (int spins = 0;;) {
      const uint32_t now = stage_.load(std::memory_order_acquire);
      if (now != stage) return now;
      if (spins < 4000) spins++, pause();  // tens of microseconds: stages are about as long
      else std::this_thread::yield();
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  Program* program_;
  int threads_;
  Counter* taken_;
  std::atomic<int64_t> chunks_[2] = {};
  alignas(64) std::atomic<uint32_t> stage_{0};
  alignas(64) std::atomic<int64_t> left_{0};
};

}  // namespace apet::cpu
