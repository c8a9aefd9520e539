// Calls apet.h without torch, from threads of this program: every pool must give the bits of one thread.
//
// The pools have 1..8 threads; one pool runs its ranges one after the other, backwards, on one thread (as in nested
// parallel regions); in one the threads start late; several calls run at once; on every instruction set.
// tests/test_threads.py builds it with and without ThreadSanitizer. Prints differences and returns 1.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "apet_testing.h"

namespace {

struct Pool {
  int threads;
  bool at_once;  // otherwise one range after the other, the last first
  int delay_us;  // thread i starts i times this later
  static void run(void* context, int64_t tasks, apet_task task, void* task_context) {
    const Pool& pool = *static_cast<Pool*>(context);
    if (!pool.at_once) {
      for (int64_t i = tasks; i-- > 0;) task(task_context, i, i + 1);
      return;
    }
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < tasks; i++)
      threads.emplace_back([=] {
        std::this_thread::sleep_for(std::chrono::microseconds(pool.delay_us * i));
        task(task_context, i, i + 1);
      });
    task(task_context, 0, 1);
    for (std::thread& thread : threads) thread.join();
  }
};

struct Result {
  std::vector<float> tokens;
  std::vector<int64_t> indices;
  bool operator==(const Result& other) const {
    return indices == other.indices && tokens.size() == other.tokens.size() &&
           std::memcmp(tokens.data(), other.tokens.data(), tokens.size() * sizeof(float)) == 0;
  }
};

Result compress(const std::vector<float>& x, int64_t images, int64_t tokens, int64_t dim, int64_t keep, int refine,
                Pool* pool) {
  apet_problem p = {};
  p.op = APET_COMPRESS;
  p.images = images, p.tokens = tokens, p.dim = dim, p.keep = keep, p.basis = 10;
  if (refine >= 0) p.select = APET_QR, p.basis = APET_BASIS_KEEP, p.refine = refine;
  p.stride_xb = tokens * dim, p.stride_xn = dim, p.stride_xd = 1;
  p.start = -1, p.ridge = 1e-5f, p.blend = 1;
  apet_pool threads = {pool ? pool->threads : 1, pool, Pool::run};
  apet_cpu_plan_t plan;
  apet_status status = apet_cpu_plan(&p, threads.threads, &plan);
  Result r{std::vector<float>(images * keep * dim, -1), std::vector<int64_t>(images * keep, -1)};
  std::vector<char> workspace(plan.workspace_bytes + 64, 0x7f);
  apet_tensors t = {};
  t.x = x.data(), t.tokens = r.tokens.data(), t.indices = r.indices.data();
  if (status == APET_OK)
    status = apet_cpu_run(&p, &t, pool ? &threads : nullptr,
                          reinterpret_cast<void*>(((uintptr_t)workspace.data() + 63) / 64 * 64), plan.workspace_bytes);
  if (status != APET_OK) {
    char text[256];
    apet_error_message(&p, status, text, sizeof text);
    std::fprintf(stderr, "%s\n", text);
    std::exit(1);
  }
  return r;
}

// Runs every shape on every pool, with the instruction set in use. Returns how many results differ.
int wrong_results(int rounds) {
  struct Shape {
    int64_t images, tokens, dim, keep;
    int refine;  // of a basis in rounds; -1: of 10, one at a time
  };
  const Shape shapes[] = {{1, 576, 256, 64, -1}, {3, 200, 512, 40, -1}, {9, 70, 300, 20, -1}, {1, 1200, 65, 500, -1},
                          {1, 300, 256, 70, 0},  {3, 200, 33, 40, 2},   {9, 70, 100, 12, 1},  {1, 500, 65, 300, 2}};
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  int wrong = 0;
  for (const Shape& s : shapes) {
    std::vector<float> x(s.images * s.tokens * s.dim);
    for (float& value : x) value = normal(random);
    const auto call = [&](Pool* pool) { return compress(x, s.images, s.tokens, s.dim, s.keep, s.refine, pool); };
    const Result alone = call(nullptr);
    const auto judge = [&](const char* what, const Result& result) {
      if (result == alone) return;
      std::printf("%s differs at %lld x %lld x %lld, keep %lld, refine %d\n", what, (long long)s.images,
                  (long long)s.tokens, (long long)s.dim, (long long)s.keep, s.refine);
      wrong++;
    };
    for (int round = 0; round < rounds; round++) {
      for (int threads = 1; threads <= 8; threads++) {
        Pool pool{threads, true, 0}, late{threads, true, 200}, nested{threads, false, 0};
        judge("a pool", call(&pool));
        judge("a late pool", call(&late));
        judge("a nested pool", call(&nested));
      }
      Result both[2];
      std::thread other([&] {
        Pool pool{2, true, 0};
        both[0] = call(&pool);
      });
      Pool pool{3, true, 0};
      both[1] = call(&pool);
      other.join();
      judge("one of two calls at once", both[0]);
      judge("the other of two calls at once", both[1]);
    }
  }
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 1;
  int wrong = 0;
  for (apet_isa isa :
       {APET_ISA_GENERIC, APET_ISA_AVX2, APET_ISA_AVX512, APET_ISA_AVX512_BF16, APET_ISA_NEON, APET_ISA_NEON_BF16}) {
    if (apet_cpu_use_isa(isa) != APET_OK) continue;
    std::printf("%s\n", apet_isa_name(isa));
    wrong += wrong_results(rounds);
  }
  std::printf("%s\n", wrong ? "wrong" : "every pool gives the same bits");
  return wrong != 0;
}
