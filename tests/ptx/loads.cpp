// Loads, stores, atomics, asynchronous copies, and conversions of addresses.
#include <cstring>

#include "machine.h"

namespace ptx {
namespace {

uint64_t address_of(Warp& w, const Operand& operand, int lane) {
  if (!(w.defined[operand.number] >> lane & 1)) w.fail(lane, "an address that is undefined");
  const uint64_t address = w.integer(operand, lane) + (int64_t)operand.displacement;
  return operand.width == 4 ? (uint32_t)address : address;
}

void set_defined(Warp& w, const Operand& operand, int lane, bool is) {
  uint32_t& lanes = w.defined[operand.number];
  lanes = is ? lanes | 1u << lane : lanes & ~(1u << lane);
}

// N values of T from consecutive addresses to as many registers; narrow ones are extended by their type.
template <class T, int N, Space space, Access access>
void load(Warp& w, const Instruction& in, uint32_t active) {
  each(active, [&](int l) {
    const Place place = resolve(w, l, address_of(w, in.operands[N], l), sizeof(T) * N, space, false);
    note(w, l, place, sizeof(T) * N, access);
    for (int i = 0; i < N; i++) {
      T value;
      std::memcpy(&value, place.bytes() + i * sizeof(T), sizeof(T));
      w.set(in.operands[i], l, (uint64_t)value);
      set_defined(w, in.operands[i], l, defined({place.memory, place.offset + i * sizeof(T)}, sizeof(T)));
    }
  });
}

template <class T, int N>
void load_parameter(Warp& w, const Instruction& in, uint32_t active) {
  const auto& parameters = w.cta->grid->launch->parameters;
  each(active, [&](int l) {
    const uint64_t at = address_of(w, in.operands[N], l) - kParameterBase;
    if (at % (sizeof(T) * N) || at >= parameters.size() || at + sizeof(T) * N > parameters.size())
      w.fail(l, "out of bounds: byte %lld of the parameter", (long long)at);
    for (int i = 0; i < N; i++) {
      T value;
      std::memcpy(&value, parameters.data() + at + i * sizeof(T), sizeof(T));
      w.set(in.operands[i], l, (uint64_t)value);
      set_defined(w, in.operands[i], l, true);
    }
  });
}

template <class T, int N, Space space>
void store(Warp& w, const Instruction& in, uint32_t active) {
  w.cta->grid->progress++;
  each(active, [&](int l) {
    const Place place = resolve(w, l, address_of(w, in.operands[0], l), sizeof(T) * N, space, true);
    note(w, l, place, sizeof(T) * N, Access::kWrite);
    for (int i = 0; i < N; i++) {
      const Operand& from = in.operands[1 + i];
      const T value = (T)w.integer(from, l);
      std::memcpy(place.bytes() + i * sizeof(T), &value, sizeof(T));
      ptx::set_defined({place.memory, place.offset + i * sizeof(T)}, sizeof(T), w.defined[from.number] >> l & 1);
    }
  });
}

// ---- acquire, release, and read-modify-write

void release(Warp& w, int lane, const Place& place) {
  auto own = std::make_shared<std::vector<uint32_t>>(*w.order[lane].known);
  (*own)[w.thread(lane)] = w.order[lane].interval++;
  Clock& flag = w.cta->grid->flags[place.memory->base + place.offset];
  flag = latest(flag, own);
}

// kAcquires: orders the lane after what it reads; else a later fence does.
template <Space space, bool kAcquires>
void load_strong(Warp& w, const Instruction& in, uint32_t active) {
  load<uint32_t, 1, space, Access::kStrong>(w, in, active);
  w.polled = true;
  each(active, [&](int l) {
    const Place place = resolve(w, l, address_of(w, in.operands[1], l), 4, space, false);
    const auto flag = w.cta->grid->flags.find(place.memory->base + place.offset);
    if (flag == w.cta->grid->flags.end()) return;
    Clock& reached = kAcquires ? w.order[l].known : w.read[l];
    reached = latest(reached, flag->second);
  });
}

// Acquires only: no kernel has a fence before a relaxed write.
void fence(Warp& w, const Instruction&, uint32_t active) {
  each(active, [&](int l) { w.order[l].known = latest(w.order[l].known, w.read[l]); });
}

// atom has an output, the old value; red has none. The lanes of an instruction access memory one after the other.
template <class T, Space space, auto F, bool kReleases = false>
void modify(Warp& w, const Instruction& in, uint32_t active) {
  w.cta->grid->progress++;
  const int first = in.outputs;
  each(active, [&](int l) {
    const Place place = resolve(w, l, address_of(w, in.operands[first], l), sizeof(T), space, true);
    note(w, l, place, sizeof(T), Access::kStrong);
    if (!defined(place, sizeof(T)))
      w.fail(l, "an atomic operation on an undefined value of %s", place.memory->name.c_str());
    const Operand& by = in.operands[first + 1];
    if (!(w.defined[by.number] >> l & 1)) w.fail(l, "an atomic operation with an undefined value");
    if (kReleases) release(w, l, place);
    T old;
    std::memcpy(&old, place.bytes(), sizeof old);
    const T value = F(old, (T)w.integer(by, l));
    std::memcpy(place.bytes(), &value, sizeof value);
    if (first) {
      w.set(in.operands[0], l, old);
      set_defined(w, in.operands[0], l, true);
    }
  });
}

// ---- asynchronous copies: the target is undefined until the thread waits

void copy_async(Warp& w, const Instruction& in, uint32_t active) {
  each(active, [&](int l) {
    if (w.integer(in.operands[2], l) != 16) w.fail(l, "a copy of other than 16 bytes");
    const Copy copy = {(uint32_t)address_of(w, in.operands[0], l), address_of(w, in.operands[1], l),
                       (uint32_t)w.integer(in.operands[3], l)};
    if (!(w.defined[in.operands[3].number] >> l & 1)) w.fail(l, "a copy of an undefined size");
    if (copy.bytes > 16) w.fail(l, "a copy of %u of 16 bytes", copy.bytes);
    const Place to = resolve(w, l, copy.to, 16, Space::kShared, true);
    note(w, l, to, 16, Access::kWrite);
    ptx::set_defined(to, 16, false);
    std::memset(to.bytes(), 0xff, 16);
    if (copy.bytes) note(w, l, resolve(w, l, copy.from, 16, Space::kGlobal, false), copy.bytes, Access::kRead);
    w.open[l].push_back(copy);
  });
}

void commit_group(Warp& w, const Instruction&, uint32_t active) {
  each(active, [&](int l) {
    w.groups[l].push_back(std::move(w.open[l]));
    w.open[l].clear();
  });
}

void wait_group(Warp& w, const Instruction& in, uint32_t active) {
  each(active, [&](int l) {
    auto& groups = w.groups[l];
    const size_t pending = w.integer(in.operands[0], l);
    const size_t done = groups.size() > pending ? groups.size() - pending : 0;
    for (size_t g = 0; g < done; g++)
      for (const Copy& copy : groups[g]) land(w, l, copy);
    groups.erase(groups.begin(), groups.begin() + (long)done);
  });
}

// ---- addresses

void shared_to_generic(Warp& w, const Instruction& in, uint32_t active) {
  each(active, [&](int l) { w.set(in.operands[0], l, kSharedWindow + (uint32_t)w.integer(in.operands[1], l)); });
}

void generic_to_global(Warp& w, const Instruction& in, uint32_t active) {
  each(active, [&](int l) { w.set(in.operands[0], l, w.integer(in.operands[1], l)); });
}

// The same place in the shared memory of a CTA of the cluster.
void map_rank(Warp& w, const Instruction& in, uint32_t active) {
  each(active, [&](int l) {
    const uint64_t address = w.integer(in.operands[1], l), rank = w.integer(in.operands[2], l);
    if (address < kSharedWindow || (address - kSharedWindow) >> kRankShift)
      w.fail(l, "mapa of 0x%llx, which is not in the CTA's shared memory", (unsigned long long)address);
    if (rank >= w.cta->grid->launch->cluster) w.fail(l, "CTA %llu of the cluster", (unsigned long long)rank);
    w.set(in.operands[0], l, address + ((rank + 1) << kRankShift));
  });
}

constexpr Flow kPlain = Flow::kPlain;
constexpr Undefined kOwn = Undefined::kOwn;

template <class T, Space space>
void add_accesses(Opcodes& t, const std::string& where, const char* type, const std::string& width) {
  const std::string at = space == Space::kShared ? "A" : "a", two = width + width, four = two + two;
  const auto put = [&](const std::string& name, const std::string& signature, Execute execute) {
    t.insert({name, {signature, execute, kPlain, kOwn}});
  };
  const std::string wider = ">" + width;
  for (const std::string& cache :
       space == Space::kGlobal ? std::vector<std::string>{"", ".cg"} : std::vector<std::string>{""}) {
    put("ld" + where + cache + "." + type, wider + "=" + at, load<T, 1, space, Access::kRead>);
    put("ld" + where + cache + ".v2." + type, two + "=" + at, load<T, 2, space, Access::kRead>);
    put("ld" + where + cache + ".v4." + type, four + "=" + at, load<T, 4, space, Access::kRead>);
    put("st" + where + cache + "." + type, "=" + at + wider, store<T, 1, space>);
    put("st" + where + cache + ".v2." + type, "=" + at + two, store<T, 2, space>);
    put("st" + where + cache + ".v4." + type, "=" + at + four, store<T, 4, space>);
  }
}

template <Space space>
void add_space(Opcodes& t, const std::string& where) {
  add_accesses<uint8_t, space>(t, where, "u8", "2");
  add_accesses<uint16_t, space>(t, where, "u16", "2");
  add_accesses<uint32_t, space>(t, where, "u32", "4");
  add_accesses<int32_t, space>(t, where, "s32", "4");
  add_accesses<uint32_t, space>(t, where, "f32", "4");
  add_accesses<uint64_t, space>(t, where, "u64", "8");
  add_accesses<uint64_t, space>(t, where, "f64", "8");
}

}  // namespace

void add_memory(Opcodes& t) {
  add_space<Space::kGeneric>(t, "");
  add_space<Space::kGlobal>(t, ".global");
  add_space<Space::kShared>(t, ".shared");
  for (const char* type : {"u32", "f32"})
    t.insert({std::string("ld.param.") + type, {">4=a", load_parameter<uint32_t, 1>, kPlain, kOwn}});
  for (const char* type : {"u64", "f64"})
    t.insert({std::string("ld.param.") + type, {"8=a", load_parameter<uint64_t, 1>, kPlain, kOwn}});
  t.insert({"ld.param.s32", {">4=a", load_parameter<int32_t, 1>, kPlain, kOwn}});
  t.insert({"ld.param.v2.u32", {"44=a", load_parameter<uint32_t, 2>, kPlain, kOwn}});

  t.insert({"ld.acquire.gpu.u32", {"4=a", load_strong<Space::kGeneric, true>, kPlain, kOwn}});
  t.insert({"ld.relaxed.gpu.global.u32", {"4=a", load_strong<Space::kGlobal, false>, kPlain, kOwn}});
  t.insert({"fence.acq_rel.gpu", {"=", fence}});
  constexpr auto add = [](auto a, auto b) { return a + b; };
  constexpr auto larger = [](auto a, auto b) { return a > b ? a : b; };
  t.insert({"atom.shared.add.u32", {"4=A4", modify<uint32_t, Space::kShared, add>, kPlain, kOwn}});
  t.insert({"atom.global.add.u32", {"4=a4", modify<uint32_t, Space::kGlobal, add>, kPlain, kOwn}});
  t.insert({"atom.global.add.u64", {"8=a8", modify<uint64_t, Space::kGlobal, add>, kPlain, kOwn}});
  t.insert({"atom.global.max.u32", {"4=a4", modify<uint32_t, Space::kGlobal, larger>, kPlain, kOwn}});
  t.insert({"atom.global.max.u64", {"8=a8", modify<uint64_t, Space::kGlobal, larger>, kPlain, kOwn}});
  t.insert({"atom.add.relaxed.gpu.u32", {"4=a4", modify<uint32_t, Space::kGeneric, add>, kPlain, kOwn}});
  t.insert({"atom.add.release.gpu.u32", {"4=a4", modify<uint32_t, Space::kGeneric, add, true>, kPlain, kOwn}});
  t.insert({"red.relaxed.gpu.global.add.u32", {"=a4", modify<uint32_t, Space::kGlobal, add>, kPlain, kOwn}});
  t.insert({"red.release.gpu.global.add.u32", {"=a4", modify<uint32_t, Space::kGlobal, add, true>, kPlain, kOwn}});

  t.insert({"cp.async.cg.shared.global", {"=Aa44", copy_async, kPlain, kOwn}});
  t.insert({"cp.async.commit_group", {"=", commit_group}});
  t.insert({"cp.async.wait_group", {"=4", wait_group}});
  t.insert({"cvta.shared.u64", {"8=8", shared_to_generic}});
  t.insert({"cvta.to.global.u64", {"8=8", generic_to_global}});
  t.insert({"mapa.u64", {"8=84", map_rank}});
}

}  // namespace ptx
