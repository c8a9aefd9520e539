// Chooses the CUDA thread that runs next, and ends launches.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Thread self;
Runtime runtime;

unsigned draw(unsigned n) { return runtime.random() % n; }

namespace {

void push(Warp& warp, bool last) {
  if (warp.queued) return;
  warp.queued = true;
  // kNewest takes from the back, so a warp that must run last is put at the front.
  if (last && runtime.policy == Policy::kNewest) runtime.ready.push_front(&warp);
  else runtime.ready.push_back(&warp);
}

Warp* take_warp() {
  std::deque<Warp*>& ready = runtime.ready;
  if (ready.empty()) return nullptr;
  size_t i = 0;
  if (runtime.policy == Policy::kNewest) i = ready.size() - 1;
  if (runtime.policy == Policy::kRandom) i = draw(ready.size());
  if (runtime.policy == Policy::kPriorities) {
    for (size_t j = 1; j < ready.size(); j++)
      if (ready[j]->priority > ready[i]->priority) i = j;
    // Sometimes the first warp gets another priority: faults that depend on a slow warp show when one becomes slow.
    if (draw(64) == 0) ready[i]->priority = draw(1 << 20);
  }
  // Taking from an end is cheap. It changes the order of the others, which only kOldest and kNewest use, and these take
  // from an end anyway.
  if (i != 0 && i != ready.size() - 1) std::swap(ready[i], ready.back()), i = ready.size() - 1;
  Warp* warp = ready[i];
  if (i == 0) ready.pop_front();
  else ready.pop_back();
  warp->queued = false;
  return warp;
}

Lane* take_lane() {
  if (!runtime.current || !runtime.current->ready) runtime.current = take_warp();
  Warp* warp = runtime.current;
  if (!warp) return nullptr;
  if (!(warp->ready & ~warp->stepped_back)) warp->stepped_back = 0;
  const uint32_t ready = warp->ready & ~warp->stepped_back;
  unsigned lane;
  if (runtime.policy == Policy::kOldest) {
    lane = __builtin_ctz(ready);
  } else if (runtime.policy == Policy::kNewest) {
    lane = 31 - __builtin_clz(ready);
  } else {
    const unsigned from = draw(32);
    lane = (__builtin_ctz(ready >> from | ready << (-from & 31)) + from) % 32;
  }
  warp->ready &= ~(1u << lane);
  return warp->lanes[lane];
}

}  // namespace

void wake(Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  if (&warp != runtime.current) push(warp, false);
}

void wake(Lane& lane) { wake(*lane.warp, 1u << lane.ids.lane); }

void wake(std::vector<Lane*>& lanes) {
  for (Lane* lane : lanes) wake(*lane);
  lanes.clear();
}

void go_on(Fiber& from) {
  Lane* next = runtime.to_host && runtime.running ? nullptr : take_lane();
  runtime.running = next;
  if (next) {
    const Launch& launch = next->block->grid->launch;
    threadIdx = next->thread, blockIdx = next->block->index;
    blockDim = launch.block, gridDim = launch.grid;
    self = next->ids;
  }
  Fiber& to = next ? next->fiber : Fiber::of_host();
  if (&to != &from) to.enter_from(from);
}

void wait_in(const char* what, Place at) {
  Lane& me = *runtime.running;
  me.waits_for = what;
  me.at = at;
  runtime.polls_in_vain = 0;
  go_on(me.fiber);
}

std::string name_of(const Lane& lane) {
  return "thread " + std::to_string(lane.number) + " of block " + std::to_string(lane.block->number);
}

std::string place_of(Place place) {
  const char* slash = std::strrchr(place.file, '/');
  return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

std::string deadlock() {
  std::string text = "deadlock:";
  int named = 0;
  const char* last = nullptr;
  for (const auto& cluster : runtime.clusters)
    for (const auto& block : cluster->blocks)
      for (const Warp& warp : block->warps)
        for (unsigned l = 0; l < 32; l++) {
          if (!(warp.live >> l & 1)) continue;
          const Lane& lane = *warp.lanes[l];
          if (lane.waits_for == last || named == 8) continue;
          last = lane.waits_for;
          text += (named++ ? ", " : " ") + name_of(lane) + " waits in " + lane.waits_for;
          if (lane.at.file) text += " at " + place_of(lane.at);
        }
  unsigned left = 0;
  for (const auto& [stream, grid] : runtime.grids) left += grid->left.size() * grid->launch.cluster;
  if (left) text += "; " + std::to_string(left) + " blocks have not started";
  return text;
}

void fault(const char* message, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, message);
  std::vsnprintf(text, sizeof text, message, arguments);
  va_end(arguments);
  if (!runtime.running) {
    std::fprintf(stderr, "simt: outside of a kernel: %s\n", text);
    std::abort();
  }
  runtime.failed = true;
  runtime.message = text;
  Fiber& from = runtime.running->fiber;
  runtime.running = nullptr;
  Fiber::of_host().enter_from(from);
  __builtin_trap();
}

namespace {

// Lets all others run before the running lane.
void step_back() {
  Lane& me = *runtime.running;
  me.warp->ready |= 1u << me.ids.lane;
  me.warp->stepped_back |= 1u << me.ids.lane;
  me.warp->priority = --runtime.lowest_priority;
  push(*me.warp, true);
  runtime.current = nullptr;
  go_on(me.fiber);
}

}  // namespace

void maybe_switch() {
  runtime.polls_in_vain = 0;
  if (runtime.seed == 0 || draw(4)) return;
  Unseen unseen;
  runtime.running->waits_for = "an atomic operation";
  step_back();
}

void poll(const char* what) {
  Unseen unseen;
  Lane& me = *runtime.running;
  me.waits_for = what;
  me.at = {};
  if (++runtime.polls_in_vain > 1000 + 8 * runtime.resident_threads) fault("%s", deadlock().c_str());
  step_back();
}

void set_seed(unsigned seed) {
  constexpr Policy policies[] = {Policy::kNewest, Policy::kRandom, Policy::kPriorities};
  runtime.seed = seed;
  runtime.policy = seed ? policies[seed % 3] : Policy::kOldest;
}

}  // namespace simt
