// The initial state of CTAs: registers, constants, special registers, and shared memory.
#include "machine.h"

namespace ptx {

uint64_t Warp::integer(const Operand& operand, int lane) {
  switch (operand.width) {
    case 2: return lanes<uint16_t>(operand)[lane];
    case 4: return lanes<uint32_t>(operand)[lane];
    default: return lanes<uint64_t>(operand)[lane];
  }
}

void Warp::set(const Operand& operand, int lane, uint64_t value) {
  switch (operand.width) {
    case 2: lanes<uint16_t>(operand)[lane] = (uint16_t)value; return;
    case 4: lanes<uint32_t>(operand)[lane] = (uint32_t)value; return;
    default: lanes<uint64_t>(operand)[lane] = value;
  }
}

namespace {

void begin_warp(Warp& warp, Cta& cta, int n, const Clock& known) {
  const Launch& launch = *cta.grid->launch;
  const Kernel& kernel = *launch.kernel;
  warp.cta = &cta;
  warp.number = (int)cta.number * cta.grid->warps_per_cta() + n;
  warp.file.assign(kernel.file_bytes, 0xff);
  warp.defined.assign(kernel.registers, 0);
  warp.defined[0] = kAll;
  for (Order& order : warp.order) order.known = known;
  const auto fill = [&](const Operand& operand, auto value) {
    warp.defined[operand.number] = kAll;
    if (!operand.width) warp.predicate(operand) = value(0) ? kAll : 0;
    else
      for (int l = 0; l < kLanes; l++) warp.set(operand, l, (uint64_t)value(l));
  };
  for (const Kernel::Constant& constant : kernel.constants) fill(constant.operand, [&](int) { return constant.value; });
  const uint64_t barrier = launch.cooperative ? reinterpret_cast<uint64_t>(cta.grid->barrier_words) : 0;
  const std::map<std::string, uint64_t> uniform = {
      {"%ctaid.x", cta.number},
      {"%ctaid.y", 0},
      {"%ctaid.z", 0},
      {"%nctaid.x", launch.grid},
      {"%nctaid.y", 1},
      {"%nctaid.z", 1},
      {"%tid.y", 0},
      {"%tid.z", 0},
      {"%ntid.x", launch.block},
      {"%cluster_ctarank", cta.rank},
      {"%envreg1", barrier >> 32},
      {"%envreg2", barrier & 0xffffffff},
  };
  for (const auto& [name, operand] : kernel.specials)
    if (name == "%tid.x") fill(operand, [&](int l) { return n * kLanes + l; });
    else fill(operand, [at = uniform.at(name)](int) { return at; });
}

}  // namespace

std::unique_ptr<Cluster> begin(Grid& grid, int index, const Clock& known) {
  const Launch& launch = *grid.launch;
  auto cluster = std::make_unique<Cluster>();
  for (unsigned rank = 0; rank < launch.cluster; rank++) {
    cluster->ctas.push_back(std::make_unique<Cta>());
    Cta& cta = *cluster->ctas.back();
    cta.grid = &grid;
    cta.rank = rank;
    cta.number = (unsigned)index * launch.cluster + rank;
    cta.alive = (int)launch.block;
    cluster->alive += cta.alive;
    Memory& shared = cta.shared;
    shared.name = "shared memory of block " + std::to_string(cta.number);
    shared.size = launch.shared;
    shared.own.assign(shared.size, 0xff);
    shared.bytes = shared.own.data();
    shared.base = kSharedWindow + ((uint64_t)(cta.number + 1) << 32);  // names the flags in it; no address
    shared.defined.assign(shared.size, 0);
    shared.forget_accesses();
    for (int n = 0; n < grid.warps_per_cta(); n++) {
      cta.warps.push_back(std::make_unique<Warp>());
      begin_warp(*cta.warps.back(), cta, n, known);
    }
  }
  return cluster;
}

}  // namespace ptx
