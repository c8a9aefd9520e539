#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

// The interfaces of the sanitizers are weak: they exist only if the program is linked with one.
extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* object);
__attribute__((weak)) void __tsan_release(void* object);
__attribute__((weak)) void AnnotateIgnoreReadsBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreReadsEnd(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesEnd(const char* file, int line);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** save, const void* stack, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* saved, const void** stack, size_t* size);
__attribute__((weak)) void __asan_poison_memory_region(void const volatile* memory, size_t bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(void const volatile* memory, size_t bytes);

void simt_switch(void** save, void* load);
}

// Pushes the registers that a call preserves by the System V ABI, changes stacks, and pops them. The floating-point
// control words are the same in all fibers.
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size simt_switch, .-simt_switch
)");

namespace simt {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStack = 256 << 10;  // of virtual memory; a fiber touches two or three pages of it
// So many stacks have a guard page below them. Each needs two more mappings, of the 65530 that Linux allows a process,
// which may load several libraries like this one. With guards for all threads of a full device there would be too few.
constexpr int kGuarded = 2048;
constexpr unsigned kNoOrder = 1;  // __tsan_switch_to_fiber: a switch orders nothing

char* map_stack(void* at) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0);
  void* memory = mmap(at, kStack, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) {
    std::fprintf(stderr, "simt: no memory for the stack of another thread\n");
    std::abort();
  }
  return static_cast<char*>(memory);
}

}  // namespace

Fiber::Fiber() : stack_size_(kStack - kPage) {
  static int stacks = 0;  // one OS thread at a time makes fibers
  guarded_ = stacks++ < kGuarded;
  stack_ = map_stack(nullptr) + kPage;
  guard();
}

void Fiber::guard() {
  if (guarded_) mprotect(stack_ - kPage, kPage, PROT_NONE);
}

Fiber::~Fiber() {
  if (as_tsan_knows_it_ && stack_) __tsan_destroy_fiber(as_tsan_knows_it_);
  if (stack_) munmap(stack_ - kPage, kStack);
}

Fiber::Fiber(std::nullptr_t) : as_tsan_knows_it_(__tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr) {}

Fiber& Fiber::of_host() {
  static thread_local Fiber host(nullptr);  // first asked for by the host itself
  return host;
}

void Fiber::arm(void (*entry)(void*), void* argument) {
  if (__tsan_create_fiber) {
    if (as_tsan_knows_it_) __tsan_destroy_fiber(as_tsan_knows_it_);
    as_tsan_knows_it_ = __tsan_create_fiber(0);
    map_stack(stack_ - kPage);  // new memory, that no earlier thread has written
    guard();
  }
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack_, stack_size_);  // of frames left behind
  as_asan_knows_it_ = nullptr;
  entry_ = entry;
  argument_ = argument;
  // `begin` starts as if called: six registers to pop, its own address, and a return address, which is never used.
  // Tops are staggered, because the same line of a thousand stacks would be in the same few sets of the cache.
  const uintptr_t stagger = reinterpret_cast<uintptr_t>(stack_) / kStack % 61 * 64;
  void** top = reinterpret_cast<void**>(stack_ + stack_size_ - stagger);
  *--top = reinterpret_cast<void*>(+[] { __builtin_trap(); });
  *--top = reinterpret_cast<void*>(&Fiber::begin);
  top -= 6;
  stack_pointer_ = top;
}

namespace {
// The fiber that is being entered, for `begin`. One OS thread at a time runs fibers.
Fiber* entering;
// The stack of the host. AddressSanitizer reports it to the first fiber that is entered from it.
thread_local const void* host_stack;
thread_local size_t host_stack_size;
}  // namespace

void Fiber::begin() {
  Fiber* fiber = entering;
  if (__sanitizer_finish_switch_fiber) {
    const void* stack;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
    if (!host_stack) host_stack = stack, host_stack_size = size;
  }
  fiber->entry_(fiber->argument_);
  __builtin_trap();
}

void Fiber::enter_from(Fiber& from) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&from.as_asan_knows_it_, stack_ ? stack_ : host_stack,
                                   stack_ ? stack_size_ : host_stack_size);
  entering = this;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(as_tsan_knows_it_, kNoOrder);
  simt_switch(&from.stack_pointer_, stack_pointer_);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.as_asan_knows_it_, nullptr, nullptr);
}

Unseen::Unseen() {
  if (AnnotateIgnoreReadsBegin) AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0);
}

Unseen::~Unseen() {
  if (AnnotateIgnoreReadsEnd) AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0);
}

void publish(void* object) {
  if (__tsan_release) __tsan_release(object);
}

void observe(void* object) {
  if (__tsan_acquire) __tsan_acquire(object);
}

void forbid(void* memory, size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(memory, bytes);
}

bool watched_for_races() { return __tsan_create_fiber != nullptr; }

}  // namespace simt
