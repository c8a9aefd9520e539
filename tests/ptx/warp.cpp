// Instructions of a whole warp, barriers, and control.
//
// Fragments are those of the PTX manual: 9.7.14.5.8, "Matrix Fragments for mma.m16n8k16 with floating point type", and
// 9.7.14.5.15, "ldmatrix". With groupID = lane / 4 and threadID_in_group = lane % 4, element i of a lane's fragment is
//
//   A [16, 16]  row groupID (i = 0, 1, 4, 5) or groupID + 8, column threadID_in_group * 2 + i % 2 (i < 4) or 8 more
//   B [16, 8]   row threadID_in_group * 2 + i % 2 (i < 2) or 8 more, column groupID
//   C [16, 8]   row groupID (i < 2) or groupID + 8, column threadID_in_group * 2 + i % 2
//
// with two elements of A and B in a register, the even one in its low half.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "machine.h"

namespace ptx {

Matrix matrix = Matrix::kExact;
float half_to_float(uint16_t bits);
float bfloat16_to_float(uint16_t bits);

namespace {

// ---- matrix instructions

// Lanes 8 i to 8 i + 7 have the addresses of the rows of matrix i, of 8 numbers each. A lane gets, of each matrix, row
// groupID, columns 2 threadID_in_group and the next.
void load_matrices(Warp& w, const Instruction& in, uint32_t) {
  uint16_t rows[kLanes][8];
  for (int l = 0; l < kLanes; l++) {
    const Operand& at = in.operands[4];
    const Place place =
        resolve(w, l, (uint32_t)(w.integer(at, l) + (int64_t)at.displacement), 16, Space::kShared, false);
    note(w, l, place, 16, Access::kRead);
    if (!defined(place, 16)) w.fail(l, "a row of a matrix that is undefined");
    std::memcpy(rows[l], place.bytes(), 16);
  }
  for (int l = 0; l < kLanes; l++)
    for (int i = 0; i < 4; i++) std::memcpy(w.lanes<uint32_t>(in.operands[i]) + l, rows[8 * i + l / 4] + l % 4 * 2, 4);
}

// c + sum of a[k] b[k], rounded once.
float exact_sum(const float* a, const float (*b)[8], int column, float c) {
  double sum = c;
  for (int k = 0; k < 16; k++) sum += (double)a[k] * b[k][column];
  return (float)sum;
}

// The same sum by a unit that adds 8 products at a time (M. Fasi et al., "Numerical behavior of NVIDIA tensor cores",
// PeerJ Computer Science 7:e330, 2021): all terms are aligned to the largest, bits below 2^-24 of its leading one are
// cut off, and so is the sum.
float truncated_sum(const float* a, const float (*b)[8], int column, float c) {
  for (int first = 0; first < 16; first += 8) {
    double terms[9] = {c};
    for (int k = 0; k < 8; k++) terms[k + 1] = (double)a[first + k] * b[first + k][column];
    int top = -1000;
    bool finite = true;
    for (double term : terms) {
      finite = finite && std::isfinite(term);
      if (term != 0 && std::isfinite(term)) top = std::max(top, std::ilogb(term));
    }
    double sum = 0;
    for (double term : terms)
      sum += finite && top > -1000 ? std::ldexp(std::trunc(std::ldexp(term, 24 - top)), top - 24) : term;
    if (finite && sum != 0) {
      const int bits = std::max(std::ilogb(sum), -126) - 23;
      sum = std::ldexp(std::trunc(std::ldexp(sum, -bits)), bits);
    }
    c = (float)sum;
  }
  return c;
}

template <auto widen>
void multiply(Warp& w, const Instruction& in, uint32_t) {
  float a[16][16], b[16][8], c[16][8];
  for (int l = 0; l < kLanes; l++) {
    const int group = l / 4, thread = l % 4;
    const auto half = [&](int operand, int i) {
      return widen((uint16_t)(w.lanes<uint32_t>(in.operands[operand + i / 2])[l] >> i % 2 * 16));
    };
    for (int i = 0; i < 8; i++) {
      const int row = i == 0 || i == 1 || i == 4 || i == 5 ? group : group + 8;
      a[row][thread * 2 + i % 2 + (i < 4 ? 0 : 8)] = half(4, i);
    }
    for (int i = 0; i < 4; i++) b[thread * 2 + i % 2 + (i < 2 ? 0 : 8)][group] = half(8, i);
    for (int i = 0; i < 4; i++)
      c[i < 2 ? group : group + 8][thread * 2 + i % 2] = w.lanes<float>(in.operands[10 + i])[l];
  }
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 8; column++)
      c[row][column] = (matrix == Matrix::kExact ? exact_sum : truncated_sum)(a[row], b, column, c[row][column]);
  for (int l = 0; l < kLanes; l++)
    for (int i = 0; i < 4; i++) w.lanes<float>(in.operands[i])[l] = c[i < 2 ? l / 4 : l / 4 + 8][l % 4 * 2 + i % 2];
}

// ---- shuffles and votes

enum class Shuffle { kUp, kButterfly, kIndex };

template <Shuffle kind>
void shuffle(Warp& w, const Instruction& in, uint32_t active) {
  const auto *a = w.lanes<uint32_t>(in.operands[2]), *b = w.lanes<uint32_t>(in.operands[3]),
             *c = w.lanes<uint32_t>(in.operands[4]);
  uint32_t result[kLanes], valid = 0;
  each(active, [&](int l) {
    const int by = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31;
    const int most = (l & segment) | (clamp & ~segment), least = l & segment;
    int from = kind == Shuffle::kUp ? l - by : kind == Shuffle::kButterfly ? l ^ by : least | (by & ~segment);
    const bool inside = kind == Shuffle::kUp ? from >= most : from <= most;
    if (!inside) from = l;
    if (!(active >> from & 1)) w.fail(l, "a shuffle from lane %d, which takes no part", from);
    result[l] = a[from];
    valid |= (uint32_t)inside << l;
  });
  auto* d = w.lanes<uint32_t>(in.operands[0]);
  each(active, [&](int l) { d[l] = result[l]; });
  uint32_t& p = w.predicate(in.operands[1]);
  p = (p & ~active) | valid;
}

void ballot(Warp& w, const Instruction& in, uint32_t active) {
  const uint32_t votes = w.predicate(in.operands[1]) & active;
  auto* d = w.lanes<uint32_t>(in.operands[0]);
  each(active, [&](int l) { d[l] = votes; });
}

void warp_barrier(Warp& w, const Instruction&, uint32_t active) {
  Rendezvous rendezvous;
  each(active, [&](int l) { rendezvous.arrive(w.thread(l), w.order[l]); });
  const Clock reached = rendezvous.complete();
  each(active, [&](int l) { w.order[l].known = reached; });
}

// ---- barriers, launches, control

void cluster_arrive(Warp& w, const Instruction&, uint32_t active) {
  Grid& grid = *w.cta->grid;
  Cluster& cluster = *grid.clusters[w.cta->number / grid.launch->cluster];
  each(active, [&](int l) {
    if (w.cluster_phase[l]) w.fail(l, "a second arrival at the cluster's barrier without a wait");
    w.cluster_phase[l] = cluster.phase + 1;
    cluster.rendezvous.arrive(w.thread(l), w.order[l]);
    cluster.arrived++;
  });
  complete_phase(cluster);
}

void barrier_number(Warp& w, const Instruction& in, uint32_t active) {
  each(active, [&](int l) {
    if (w.integer(in.operands[0], l)) w.fail(l, "a barrier other than number 0");
  });
}

void wait_previous(Warp& w, const Instruction&, uint32_t active) { w.after_wait |= active; }
void nothing(Warp&, const Instruction&, uint32_t) {}
void trap(Warp& w, const Instruction&, uint32_t active) { w.fail(__builtin_ctz(active), "trap"); }

}  // namespace

void add_warp(Opcodes& t) {
  const auto rendezvous = [&](const char* name, const char* signature, Execute execute, int members) {
    t.insert({name, {signature, execute, Flow::kRendezvous, Undefined::kFault, members}});
  };
  rendezvous("ldmatrix.sync.aligned.m8n8.x4.shared.b16", "4444=A", load_matrices, -1);
  rendezvous("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "4444=4444444444", multiply<half_to_float>, -1);
  rendezvous("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "4444=4444444444", multiply<bfloat16_to_float>, -1);
  rendezvous("shfl.sync.up.b32", "4p=4444", shuffle<Shuffle::kUp>, 5);
  rendezvous("shfl.sync.bfly.b32", "4p=4444", shuffle<Shuffle::kButterfly>, 5);
  rendezvous("shfl.sync.idx.b32", "4p=4444", shuffle<Shuffle::kIndex>, 5);
  rendezvous("vote.sync.ballot.b32", "4=p4", ballot, 2);
  rendezvous("bar.warp.sync", "=4", warp_barrier, 0);

  for (const char* name : {"bar.sync", "barrier.sync"}) t.insert({name, {"=4", barrier_number, Flow::kBarrier}});
  t.insert({"barrier.cluster.arrive", {"=", cluster_arrive}});
  t.insert({"barrier.cluster.wait", {"=", nothing, Flow::kClusterWait}});
  t.insert({"griddepcontrol.wait", {"=", wait_previous}});
  t.insert({"griddepcontrol.launch_dependents", {"=", nothing}});
  for (const char* name : {"bra", "bra.uni"}) t.insert({name, {"=L", nothing, Flow::kBranch}});
  for (const char* name : {"ret", "exit"}) t.insert({name, {"=", nothing, Flow::kExit}});
  t.insert({"trap", {"=", trap}});
}

}  // namespace ptx
