// One fiber for each CUDA thread, with a stack and a switch of a few nanoseconds, which the sanitizers support.
//
// A fiber keeps its stack when it has run, and is armed again for the next CUDA thread. ThreadSanitizer sees every
// arming as a new thread, so that two CUDA threads are ordered only by what orders them on a GPU.
#pragma once
#include <cstddef>

namespace simt {

class Fiber {
 public:
  Fiber();  // of a stack of its own
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next switch to this fiber call entry(argument), which must never return.
  void arm(void (*entry)(void*), void* argument);
  // Leaves `from`, the running fiber, and continues in this one.
  void enter_from(Fiber& from);
  // The fiber of the host's thread, which uses the stack of the operating system.
  static Fiber& of_host();

 private:
  explicit Fiber(std::nullptr_t);
  static void begin();
  void guard();

  void* stack_pointer_ = nullptr;
  char* stack_ = nullptr;  // lowest address that may be used; below lies a page that may not, if it is guarded
  std::size_t stack_size_ = 0;
  bool guarded_ = false;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  void* as_tsan_knows_it_ = nullptr;
  void* as_asan_knows_it_ = nullptr;
};

// Allocations and copies of the runtime, which the sanitizers must not attribute to the kernel.
class Unseen {
 public:
  Unseen();
  ~Unseen();
};

// For ThreadSanitizer: all before `publish` on an object happens before all after `observe` on it.
void publish(void* object);
void observe(void* object);

// For AddressSanitizer: memory that exists but must not be accessed any more.
void forbid(void* memory, std::size_t bytes);

// Whether this program is linked with ThreadSanitizer.
bool watched_for_races();

}  // namespace simt
