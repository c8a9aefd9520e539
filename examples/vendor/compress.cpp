// compress TOKENS.npy KEEP OUT.npy INDICES.npy [THREADS]
//
// Compresses tokens [N, D] or [B, N, D], float32 or float16, to KEEP an image; writes them, and their positions as
// int64.
#include <apet.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include "npy.h"
#include "pool.h"

namespace {

int64_t number(const char* what, const std::string& text) {
  size_t used = 0;
  int64_t value = 0;
  try {
    value = std::stoll(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used == 0 || used != text.size())
    throw std::runtime_error(std::string(what) + " is '" + text + "', not a number");
  return value;
}

void check(const apet_problem& problem, apet_status status) {
  if (status == APET_OK) return;
  char sentence[256];
  apet_error_message(&problem, status, sentence, sizeof sentence);
  throw std::runtime_error(sentence);
}

apet_problem problem_of(const Array& x, int64_t keep) {
  apet_problem p = {};
  p.op = APET_COMPRESS;
  p.dtype = x.descr == "<f4" ? APET_FLOAT32 : APET_FLOAT16;
  p.layout = APET_INPLACE;
  p.select = APET_FPS;
  p.basis = 10;
  p.images = x.shape.size() == 3 ? x.shape[0] : 1;
  p.tokens = *(x.shape.end() - 2);
  p.dim = x.shape.back();
  p.keep = keep;
  p.stride_xb = p.tokens * p.dim, p.stride_xn = p.dim, p.stride_xd = 1;
  p.start = -1;
  p.ridge = 1e-5;
  p.blend = 1;
  return p;
}

void run(const std::string& in, int64_t keep, const std::string& out, const std::string& positions, int64_t threads) {
  const Array x = npy::read(in);
  const size_t dims = x.shape.size();
  if (dims != 2 && dims != 3)
    npy::fail(in, "has " + std::to_string(dims) + " dimensions; [N, D] or [B, N, D] is needed");
  if (threads < 1 || threads > 256)
    throw std::runtime_error("THREADS is " + std::to_string(threads) + ", outside 1..256");
  const apet_problem p = problem_of(x, keep);
  check(p, apet_check(&p));

  Array tokens{x.descr, x.shape, {}}, indices{"<i8", x.shape, {}};
  tokens.shape[dims - 2] = keep;
  indices.shape = {tokens.shape.begin(), tokens.shape.end() - 1};
  tokens.data.resize(p.images * keep * p.dim * (p.dtype == APET_FLOAT32 ? 4 : 2));
  indices.data.resize(p.images * keep * sizeof(int64_t));

  apet_cpu_plan_t plan;
  check(p, apet_cpu_plan(&p, (int32_t)threads, &plan));
  // An engine would keep the workspace, and its threads, from call to call.
  const std::unique_ptr<void, void (*)(void*)> workspace(std::aligned_alloc(64, plan.workspace_bytes), std::free);
  Pool pool((int)threads);
  apet_tensors t = {};
  t.x = x.data.data();
  t.tokens = tokens.data.data();
  t.indices = reinterpret_cast<int64_t*>(indices.data.data());
  check(p, apet_cpu_run(&p, &t, pool.lent(), workspace.get(), plan.workspace_bytes));

  npy::write(out, tokens);
  npy::write(positions, indices);
  std::printf("apet %s, %s: %lld of %lld tokens, %d threads in %d teams\n", apet_version(), apet_isa_name(plan.isa),
              (long long)keep, (long long)p.tokens, plan.threads_per_image * plan.images_in_flight,
              plan.images_in_flight);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5 && argc != 6) {
    std::fprintf(stderr, "usage: compress TOKENS.npy KEEP OUT.npy INDICES.npy [THREADS]\n");
    return 2;
  }
  try {
    run(argv[1], number("KEEP", argv[2]), argv[3], argv[4], argc == 6 ? number("THREADS", argv[5]) : 1);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
