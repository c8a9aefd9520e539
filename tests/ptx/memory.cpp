// Arrays, the array of an address, and the checks of every access.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "machine.h"

namespace ptx {

Arrays arrays;

void fault(const char* format, ...) {
  char text[1024];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  throw Fault{text};
}

void Warp::fail(int lane, const char* format, ...) {
  char text[768];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  const int thread = (number % cta->grid->warps_per_cta()) * kLanes + lane;
  fault("%s: thread %d of block %u, line %d of the PTX, %s", text, thread, cta->number, now ? now->line : 0,
        now ? now->text.c_str() : "");
}

void Memory::forget_accesses() {
  cells.assign(writable ? size / 2 + 1 : 0, {});
  more.clear();
}

void Arrays::add(const char* name, const void* at, size_t bytes, bool writable, const uint8_t* defined) {
  if (!bytes) return;
  auto memory = std::make_unique<Memory>();
  memory->name = name;
  memory->base = reinterpret_cast<uint64_t>(at);
  memory->bytes = static_cast<uint8_t*>(const_cast<void*>(at));
  memory->size = bytes;
  memory->writable = writable;
  memory->defined.assign(bytes, !writable);
  if (defined) memory->defined.assign(defined, defined + bytes);
  memory->forget_accesses();
  all.push_back(std::move(memory));
}

namespace {

Place global(Warp& warp, int lane, uint64_t address, size_t size, bool writes) {
  if (warp.cta->grid->launch->dependent && !(warp.after_wait >> lane & 1))
    warp.fail(lane, "global memory before griddepcontrol.wait");
  const auto holds = [&](const Memory* m) { return address >= m->base && address - m->base < m->size; };
  if (!arrays.last || !holds(arrays.last)) {
    const auto found = std::find_if(arrays.all.begin(), arrays.all.end(), [&](auto& m) { return holds(m.get()); });
    if (found == arrays.all.end()) {
      const Memory* near = nullptr;  // the array that ends, or begins, nearest
      const auto distance = [&](const Memory* m) {
        return address < m->base ? m->base - address : address - m->base - m->size + 1;
      };
      for (const auto& m : arrays.all)
        if (!near || distance(m.get()) < distance(near)) near = m.get();
      const char* side = near && address < near->base ? "before" : "after";
      warp.fail(lane, "out of bounds: %zu bytes at 0x%llx, %lld bytes %s %s", size, (unsigned long long)address,
                near ? (long long)distance(near) : 0, side, near ? near->name.c_str() : "any array");
    }
    arrays.last = found->get();
  }
  Memory& memory = *arrays.last;
  const size_t offset = address - memory.base;
  if (offset + size > memory.size) warp.fail(lane, "out of bounds: the end of %s", memory.name.c_str());
  if (writes && !memory.writable) warp.fail(lane, "a write to %s", memory.name.c_str());
  return {&memory, offset};
}

Place shared(Warp& warp, int lane, uint64_t address, size_t size, bool peers) {
  Cta* cta = warp.cta;
  if (const uint64_t owner = address >> kRankShift) {
    const auto& ctas = cta->grid->clusters[cta->number / cta->grid->launch->cluster]->ctas;
    if (!peers || owner > ctas.size())
      warp.fail(lane, "out of bounds: 0x%llx is not in the CTA's shared memory", (unsigned long long)address);
    cta = ctas[owner - 1].get();
    if (!cta->begun) warp.fail(lane, "shared memory of CTA %u of the cluster, which has not begun", cta->rank);
    if (!cta->alive) warp.fail(lane, "shared memory of CTA %u of the cluster, which has ended", cta->rank);
    address &= (1u << kRankShift) - 1;
  }
  if (address < kSharedBase || address - kSharedBase + size > cta->shared.size)
    warp.fail(lane, "out of bounds: %zu bytes at %lld of %zu of shared memory", size,
              (long long)(address - kSharedBase), cta->shared.size);
  return {&cta->shared, address - kSharedBase};
}

const char* word(Access access) {
  return access == Access::kRead ? "read" : access == Access::kWrite ? "write" : "atomic or ordered access";
}

}  // namespace

Place resolve(Warp& warp, int lane, uint64_t address, size_t size, Space space, bool writes) {
  if (address % size) warp.fail(lane, "misaligned: %zu bytes at 0x%llx", size, (unsigned long long)address);
  const bool window = address >= kSharedWindow && address - kSharedWindow < 1ull << 32;
  if (space == Space::kShared) return shared(warp, lane, address, size, false);
  if (space == Space::kGeneric && window) return shared(warp, lane, address - kSharedWindow, size, true);
  return global(warp, lane, address, size, writes);
}

void note(Warp& warp, int lane, const Place& place, size_t size, Access access) {
  Memory& memory = *place.memory;
  if (!memory.writable) return;
  for (size_t cell = place.offset / 2; cell <= (place.offset + size - 1) / 2; cell++) {
    const Accessors* other = add_access(memory.cells[cell], memory.more, warp.number, lane, warp.order[lane], access);
    if (!other) continue;
    const int warps = warp.cta->grid->warps_per_cta();
    warp.fail(lane, "data race in %s at byte %zu: %s, and an earlier %s of thread %d of block %d", memory.name.c_str(),
              2 * cell, word(access), word(other->access), other->warp % warps * kLanes + __builtin_ctz(other->lanes),
              other->warp / warps);
  }
}

bool defined(const Place& place, size_t size) {
  const uint8_t* flags = place.memory->defined.data() + place.offset;
  return std::all_of(flags, flags + size, [](uint8_t flag) { return flag; });
}

void set_defined(const Place& place, size_t size, bool is) {
  std::memset(place.memory->defined.data() + place.offset, is, size);
}

// The data of an asynchronous copy: read and written now, when the thread waits for it.
void land(Warp& warp, int lane, const Copy& copy) {
  const Place to = resolve(warp, lane, copy.to, 16, Space::kShared, true);
  note(warp, lane, to, 16, Access::kWrite);
  uint8_t data[16] = {};
  bool whole = true;
  if (copy.bytes) {
    const Place from = resolve(warp, lane, copy.from, 16, Space::kGlobal, false);
    note(warp, lane, from, copy.bytes, Access::kRead);
    std::memcpy(data, from.bytes(), copy.bytes);
    whole = defined(from, copy.bytes);
  }
  std::memcpy(to.bytes(), data, 16);
  set_defined(to, 16, whole);
}

}  // namespace ptx
