// Divides a call among threads, by an estimate of its time. Only the order of magnitude of the estimate matters.
#pragma once
#include <algorithm>
#include <cmath>

#include "../problem.h"

namespace apet::cpu {

constexpr double kNsPerByte = 1 / 20.0;  // one thread that sweeps tokens from the shared cache
constexpr double kNsPerFlop = 1 / 50.0;  // one thread that multiplies in s5
constexpr double kNsPerStage = 1000;     // from the last chunk of a stage to the next stage, with several threads
constexpr double kNsPerThread = 10000;   // less work than this is not worth waking a thread
// More threads than this in one call stay idle: a batch of images cannot use more.
constexpr int kMaxThreads = 256;

// A team of threads takes one image at a time through the stages.
struct Split {
  int teams, threads;  // images in flight, threads of each team
  double serial_ns, planned_ns;
};

inline Split split(const apet_problem& p, int32_t available) {
  const double n = p.tokens, d = p.dim, k = p.keep;
  // Readings of the tokens: norms, the first basis token, all others; and two stages for the candidates of each basis
  // token. In rounds, each round takes one reading and four stages, and so does each medoid step.
  const bool rounds = p.op != APET_MERGE && in_rounds(p);
  const double steps = p.op == APET_COMPRESS ? p.refine : 0, m = p.op == APET_MERGE ? 0 : basis_of(p, p.keep);
  const double sweeps = (p.op == APET_MERGE ? 1 : rounds ? 5 : 3) + 3 * steps;
  const double stages = (rounds ? 16 : 2 * m) + 5 + 5 * steps;
  const double products = 2 * n * m * d + (p.op == APET_SCORE ? 0 : 2 * (n - k) * k * d) * (1 + steps - rounds);
  const double image = sweeps * n * d * element_size(p) * kNsPerByte + products * kNsPerFlop;
  const double serial = p.images * image;
  const int most = (int)std::clamp<double>(serial / kNsPerThread, 1, std::clamp(available, 1, kMaxThreads));
  // Few large teams leave threads idle between stages, many small ones at the end of the batch.
  Split best = {1, 1, serial, serial};
  for (int teams = 1; teams <= std::min<int64_t>(most, p.images); teams++) {
    const int threads = most / teams;
    const double waves = std::ceil((double)p.images / teams);
    const double ns = waves * (image / threads + (threads > 1 ? stages * kNsPerStage : 0));
    if (ns < best.planned_ns) best = {teams, threads, serial, ns};
  }
  return best;
}

}  // namespace apet::cpu
