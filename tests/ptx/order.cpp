#include "order.h"

#include <algorithm>

namespace ptx {

Clock latest(const Clock& a, const Clock& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  if (std::equal(a->begin(), a->end(), b->begin(), [](uint32_t x, uint32_t y) { return x >= y; })) return a;
  auto joined = std::make_shared<std::vector<uint32_t>>(*a);
  for (size_t i = 0; i < joined->size(); i++) (*joined)[i] = std::max((*joined)[i], (*b)[i]);
  return joined;
}

void Rendezvous::arrive(int thread, Order& order) {
  if (std::find(known_.begin(), known_.end(), order.known) == known_.end()) known_.push_back(order.known);
  own_.emplace_back(thread, order.interval++);
}

Clock Rendezvous::complete() {
  Clock all;
  for (const Clock& known : known_) all = latest(all, known);
  auto reached = std::make_shared<std::vector<uint32_t>>(*all);
  for (const auto& [thread, interval] : own_) (*reached)[thread] = std::max((*reached)[thread], interval);
  known_.clear();
  own_.clear();
  return reached;
}

namespace {

bool ordered(const Accessors& earlier, int warp, int lane, const Order& order) {
  uint32_t lanes = earlier.lanes;
  if (earlier.warp == warp) lanes &= ~(1u << lane);
  for (; lanes; lanes &= lanes - 1)
    if ((*order.known)[earlier.warp * 32 + __builtin_ctz(lanes)] < earlier.interval) return false;
  return true;
}

bool same(const Accessors& a, int warp, const Order& order, Access access) {
  return a.access == access && a.warp == warp && a.interval == order.interval;
}

}  // namespace

const Accessors* add_access(Cell& cell, Accesses& more, int warp, int lane, const Order& order, Access access) {
  const uint32_t bit = 1u << lane;
  if (access != Access::kWrite && same(cell.first, warp, order, access) && cell.first.lanes & bit) return nullptr;
  if (cell.write.lanes && !ordered(cell.write, warp, lane, order)) return &cell.write;
  std::vector<Accessors>* others = cell.more < 0 ? nullptr : &more[cell.more];
  const auto races = [&](const Accessors& a) {
    return a.lanes && a.access != access && !ordered(a, warp, lane, order);
  };
  if (races(cell.first)) return &cell.first;
  if (others)
    for (const Accessors& a : *others)
      if (races(a)) return &a;
  if (access == Access::kWrite) {
    cell.write = {order.interval, bit, (uint16_t)warp, access};
    cell.first = {};
    if (others) others->clear();
    return nullptr;
  }
  // A later access that is ordered after this one is also ordered after those of its kind that this one follows.
  if (same(cell.first, warp, order, access)) {
    cell.first.lanes |= bit;
    return nullptr;
  }
  const Accessors own = {order.interval, bit, (uint16_t)warp, access};
  if (!cell.first.lanes || (cell.first.access == access && ordered(cell.first, warp, lane, order))) {
    cell.first = own;
    return nullptr;
  }
  if (!others) {
    cell.more = (int32_t)more.size();
    more.emplace_back();
    others = &more.back();
  }
  for (Accessors& a : *others)
    if (same(a, warp, order, access)) {
      a.lanes |= bit;
      return nullptr;
    }
  for (Accessors& a : *others)
    if (a.access == access && ordered(a, warp, lane, order)) {
      a = own;
      return nullptr;
    }
  others->push_back(own);
  return nullptr;
}

}  // namespace ptx
