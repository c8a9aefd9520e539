// Barriers and warp primitives at which CUDA threads wait, and shared memory.
#include <cstring>

#include "state.h"

namespace simt {

void complete(Barrier& barrier) {
  barrier.count[barrier.phase & 1] = barrier.flags;
  barrier.arrived = barrier.flags = 0;
  barrier.phase++;
  wake(barrier.waiting);
}

namespace {

Barrier& barrier_of(Scope scope) {
  Block& block = *runtime.running->block;
  if (scope == Scope::kCluster) {
    if (device.largest_cluster == 0) fault("a cluster barrier on a device that has no clusters");
    return block.cluster->barrier;
  }
  if (!block.grid->launch.cooperative) fault("grid.sync in a launch that is not cooperative");
  return block.grid->barrier;
}

}  // namespace

void end_rendezvous_without(Warp& warp) {
  for (auto& point : warp.points) {
    const uint32_t lanes = point->mask & warp.live;
    if (!point->arrived || point->arrived != lanes) continue;
    point->combine(point->operands, lanes);
    point->arrived = 0;
    point->phase++;
    wake(warp, lanes);
  }
}

unsigned sync_block_count(Place place, bool flag) {
  Unseen unseen;
  Lane& me = *runtime.running;
  Block& block = *me.block;
  Barrier& barrier = block.barrier;
  if (block.live < barrier.threads)
    fault("divergent barrier: %s waits at %s, but %u threads of the block have exited", name_of(me).c_str(),
          place_of(place).c_str(), barrier.threads - block.live);
  if (barrier.arrived && (place.line != barrier.place.line || std::strcmp(place.file, barrier.place.file)))
    fault("divergent barrier: %s waits at %s, but %s at %s", name_of(me).c_str(), place_of(place).c_str(),
          name_of(*barrier.waiting[0]).c_str(), place_of(barrier.place).c_str());
  const unsigned phase = barrier.phase & 1;
  barrier.place = place;
  barrier.flags += flag;
  publish(&barrier.order[phase]);
  if (++barrier.arrived == barrier.threads) {
    complete(barrier);
  } else {
    barrier.waiting.push_back(&me);
    wait_in("__syncthreads", place);
  }
  observe(&barrier.order[phase]);
  return barrier.count[phase];
}

void sync_block(Place place) { sync_block_count(place, false); }

void arrive(Scope scope) {
  Unseen unseen;
  Lane& me = *runtime.running;
  Barrier& barrier = barrier_of(scope);
  bool& arrived = me.arrived[(int)scope];
  if (arrived) fault("%s arrives twice at a barrier without waiting", name_of(me).c_str());
  arrived = true;
  me.arrival[(int)scope] = barrier.phase;
  publish(&barrier.order[barrier.phase & 1]);
  if (++barrier.arrived == barrier.threads) complete(barrier);
}

void wait(Scope scope) {
  Unseen unseen;
  Lane& me = *runtime.running;
  Barrier& barrier = barrier_of(scope);
  bool& arrived = me.arrived[(int)scope];
  if (!arrived) fault("%s waits at a barrier where it has not arrived", name_of(me).c_str());
  const unsigned phase = me.arrival[(int)scope];
  if (barrier.phase == phase) {
    barrier.waiting.push_back(&me);
    wait_in(scope == Scope::kGrid ? "grid.sync" : "a cluster barrier");
  }
  arrived = false;
  observe(&barrier.order[phase & 1]);
}

void rendezvous(const char* primitive, uint32_t mask, void* operand, Combine combine, bool ordered) {
  Unseen unseen;
  Lane& me = *runtime.running;
  Warp& warp = *me.warp;
  const uint32_t bit = 1u << me.ids.lane;
  if (!(mask & bit))
    fault("%s calls %s with mask 0x%08x, which leaves out its lane %u", name_of(me).c_str(), primitive, mask,
          me.ids.lane);
  RendezvousPoint* point = nullptr;
  for (auto& m : warp.points)
    if (m->mask == mask) point = m.get();
  if (!point) {
    warp.points.push_back(std::make_unique<RendezvousPoint>());
    point = warp.points.back().get();
    point->mask = mask;
  }
  if (point->arrived && point->primitive != primitive)
    fault("%s calls %s with mask 0x%08x, but other lanes wait in %s with it", name_of(me).c_str(), primitive, mask,
          point->primitive);
  const unsigned phase = point->phase & 1;
  point->primitive = primitive;
  point->combine = combine;
  point->operands[me.ids.lane] = operand;
  point->arrived |= bit;
  if (ordered) publish(&point->order[phase]);
  const uint32_t lanes = mask & warp.live;
  if (point->arrived == lanes) {
    combine(point->operands, lanes);
    point->arrived = 0;
    point->phase++;
    wake(warp, lanes & ~bit);
  } else {
    wait_in(primitive);
  }
  if (ordered) observe(&point->order[phase]);
}

void combine_shuffle(void* const* operands, uint32_t lanes) {
  uint64_t values[32];
  for (unsigned l = 0; l < 32; l++)
    if (lanes >> l & 1) values[l] = static_cast<const Shuffle*>(operands[l])->value;
  for (unsigned l = 0; l < 32; l++) {
    if (!(lanes >> l & 1)) continue;
    Shuffle& shuffle = *static_cast<Shuffle*>(operands[l]);
    if (!(lanes >> shuffle.source & 1))
      fault("lane %u of block %u shuffles from lane %d, which is not in the mask or has exited", l,
            runtime.running->block->number, shuffle.source);
    shuffle.value = values[shuffle.source];
  }
}

char* shared_memory() { return runtime.running->block->shared; }

char* shared_of(const void* mine, unsigned rank) {
  const Block& block = *runtime.running->block;
  const char* address = static_cast<const char*>(mine);
  if (rank >= block.cluster->blocks.size())
    fault("block %u asks for the shared memory of rank %u in a cluster of %zu", block.number, rank,
          block.cluster->blocks.size());
  if (address < block.shared || address > block.shared + block.grid->launch.shared)
    fault("block %u maps an address that is not in its shared memory", block.number);
  const Block& other = *block.cluster->blocks[rank];
  if (!other.begun || !other.live)
    fault("block %u maps the shared memory of block %u, which has %s", block.number, other.number,
          other.begun ? "exited" : "not begun");
  return other.shared + (address - block.shared);
}

void check_shared(const char* what, const void* address, unsigned bytes) {
  const Block& block = *runtime.running->block;
  const char* a = static_cast<const char*>(address);
  if (a < block.shared || a + bytes > block.shared + block.grid->launch.shared)
    fault("%s of %u bytes at an address that is not in the shared memory of block %u", what, bytes, block.number);
  if (reinterpret_cast<uintptr_t>(a) % bytes)
    fault("%s in block %u at a shared address that is not a multiple of %u", what, block.number, bytes);
}

bool lands_now(const Copy& copy) {
  if (runtime.seed && draw(2)) return true;
  Unseen unseen;
  Lane& me = *runtime.running;
  me.copies.emplace_back(me.groups_closed, copy);
  return false;
}

void close_group() { runtime.running->groups_closed++; }

bool take_landing(unsigned groups, Copy& copy) {
  Unseen unseen;
  Lane& me = *runtime.running;
  if (me.copies.empty() || me.copies.front().first + groups >= me.groups_closed) return false;
  copy = me.copies.front().second;
  me.copies.pop_front();
  return true;
}

}  // namespace simt
