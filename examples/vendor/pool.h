// A thread pool, which apet uses through the interface apet_pool.
#pragma once

#include <apet.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
 public:
  // The thread that calls apet works too, so one thread less is started.
  explicit Pool(int threads) : lent_{threads, this, run} {
    for (int i = 1; i < threads; i++) threads_.emplace_back([this] { serve(); });
  }
  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      over_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  const apet_pool* lent() const { return &lent_; }

 private:
  // One call at a time. apet never starts more tasks than threads, so a lock for each task is cheap enough.
  static void run(void* pool, int64_t tasks, apet_task task, void* context) {
    Pool& p = *static_cast<Pool*>(pool);
    const std::lock_guard<std::mutex> one(p.one_call_);
    std::unique_lock<std::mutex> lock(p.mutex_);
    p.task_ = task, p.context_ = context;
    p.next_ = 0, p.tasks_ = p.unfinished_ = tasks;
    p.wake_.notify_all();
    p.work(lock);
    p.done_.wait(lock, [&] { return p.unfinished_ == 0; });
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return over_ || next_ < tasks_; });
      if (over_) return;
      work(lock);
    }
  }

  void work(std::unique_lock<std::mutex>& lock) {
    while (next_ < tasks_) {
      const int64_t i = next_++;
      lock.unlock();
      task_(context_, i, i + 1);
      lock.lock();
      if (--unfinished_ == 0) done_.notify_one();
    }
  }

  const apet_pool lent_;
  std::mutex one_call_, mutex_;
  std::condition_variable wake_, done_;
  // The tasks of the call, protected by mutex_.
  apet_task task_ = nullptr;
  void* context_ = nullptr;
  int64_t next_ = 0, tasks_ = 0, unfinished_ = 0;
  bool over_ = false;
  std::vector<std::thread> threads_;
};
