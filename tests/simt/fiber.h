// One fiber for each CUDA thread: a stack and a switch of a few nanoseconds, both known to the sanitizers.
//
// A fiber keeps its stack when it has run and is armed again for the next CUDA thread. ThreadSanitizer sees every
// arming as a new thread, so that nothing orders two CUDA threads but what orders them on a GPU.
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
  // Leaves `from`, the fiber that runs, and goes on in this one.
  void enter_from(Fiber& from);
  // What the operating system runs: it has no stack of ours.
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

// For code of the runtime: allocations and copies that a sanitizer must not take for the kernel's own.
class Unseen {
 public:
  Unseen();
  ~Unseen();
};

// What came before `publish` on an object happens before what follows `observe` on it; for ThreadSanitizer.
void publish(void* object);
void observe(void* object);

// AddressSanitizer's view of memory that is there but must not be touched any more.
void forbid(void* memory, std::size_t bytes);

// Whether this program is linked with ThreadSanitizer.
bool watched_for_races();

}  // namespace simt
