// Times each chunk of a call, and each serial step between the stages: runs csrc/cpu/walk.cpp on this thread, one chunk
// after the other. benchmarks/threads.py simulates teams of many threads from these times.
//
//   apet_chunks FILE DTYPE IMAGES TOKENS DIM KEEP THREADS ROUNDS
//
//     compress by a team of THREADS, the tokens [IMAGES, TOKENS, DIM] of an apet_dtype from FILE. Prints a line for each
//     stage: the number of its image, its name, then nanoseconds that the thread computed, the least of all rounds: in
//     the serial step that opens it, and in each of its chunks. The stage "done" has no chunks.
//
//   apet_chunks barrier THREADS ROUNDS
//
//     Prints the nanoseconds of a stage with one empty chunk for each of THREADS threads, the least of all rounds.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "cpu/plan.h"
#include "cpu/team.h"
#include "cpu/walk.h"

using namespace apet;
using namespace apet::cpu;

namespace {

constexpr const char* kNames[] = {
    "start",         "norms",      "sweep", "leaders",    "contenders", "residual", "pack pool",
    "pool gram",     "pack picks", "round", "pack stale", "products",   "nearest",  "cluster mean",
    "mean distance", "similar",    "pack",  "assign",     "mean",       "done",
};
static_assert(sizeof kNames / sizeof *kNames == (size_t)Stage::kDone + 1, "a name for each stage");

struct Times {
  int64_t image;
  std::string name;
  std::vector<int64_t> ns;  // of the serial step before the stage, then of its chunks
};

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// The CPU time of this thread, so that other processes do not count.
int64_t computed() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// The time that computed() itself adds to a difference of two.
int64_t clock_cost() {
  int64_t least = INT64_MAX;
  for (int i = 0; i < 1000; i++) {
    const int64_t begin = computed();
    least = std::min(least, computed() - begin);
  }
  return least;
}

int fail(const char* message) {
  std::fprintf(stderr, "apet_chunks: %s\n", message);
  return 1;
}

char* aligned(std::vector<char>& bytes) { return reinterpret_cast<char*>(((uintptr_t)bytes.data() + 63) / 64 * 64); }

// Every stage of a call, timed once.
std::vector<Times> walk_once(const apet_problem& p, const apet_tensors& tensors, int threads, int64_t cost) {
  const auto since = [cost](int64_t begin) { return std::max<int64_t>(computed() - begin - cost, 0); };
  Call call{p, tensors, *kernels_for(p.dtype, isa_in_use()), nullptr, threads};
  Arena count(nullptr);
  Walk(&call, count);
  std::vector<char> workspace(count.used() + 64);
  Arena arena(aligned(workspace));
  Walk walk(&call, arena);
  std::vector<Times> found;
  for (bool open = true; open;) {
    const int64_t begin = computed();
    open = walk.advance();
    const int64_t serial = since(begin), chunks = open ? walk.chunks() : 0;
    found.push_back({call.next_image - 1, kNames[(int)walk.stage()], {serial}});
    for (int64_t i = 0; i < chunks; i++) {
      const int64_t c = walk.backwards() ? chunks - 1 - i : i, from = computed();
      walk.run(c, (int)(c * threads / chunks));
      found.back().ns.push_back(since(from));
    }
    if (open && walk.backwards()) std::reverse(found.back().ns.begin() + 1, found.back().ns.end());
  }
  return found;
}

int time_chunks(char** words) {
  apet_problem p = {};
  p.op = APET_COMPRESS;
  p.dtype = (apet_dtype)std::atoi(words[1]);
  p.images = std::atoll(words[2]), p.tokens = std::atoll(words[3]), p.dim = std::atoll(words[4]);
  p.keep = std::atoll(words[5]), p.basis = 10;
  p.stride_xb = p.tokens * p.dim, p.stride_xn = p.dim, p.stride_xd = 1;
  p.start = -1, p.ridge = 1e-5, p.blend = 1;
  const int threads = std::atoi(words[6]), rounds = std::atoi(words[7]);
  char text[256];
  if (const apet_status status = apet_check(&p); status != APET_OK) {
    apet_error_message(&p, status, text, sizeof text);
    return fail(text);
  }
  if (threads < 1 || rounds < 1) return fail("THREADS and ROUNDS must be at least 1");
  const int64_t element = element_size(p);
  std::vector<char> x(p.images * p.tokens * p.dim * element + 64), out(p.images * p.keep * p.dim * element + 64);
  std::vector<int64_t> indices(p.images * p.keep);
  std::ifstream file(words[0], std::ios::binary);
  if (!file.read(aligned(x), (std::streamsize)x.size() - 64)) return fail("FILE holds fewer tokens than that");
  apet_tensors tensors = {};
  tensors.x = aligned(x), tensors.tokens = aligned(out), tensors.indices = indices.data();
  const int64_t cost = clock_cost();
  std::vector<Times> least = walk_once(p, tensors, threads, cost);
  for (int r = 1; r < rounds; r++) {
    const std::vector<Times> again = walk_once(p, tensors, threads, cost);
    for (size_t s = 0; s < least.size(); s++)
      for (size_t i = 0; i < least[s].ns.size(); i++) least[s].ns[i] = std::min(least[s].ns[i], again[s].ns[i]);
  }
  for (const Times& stage : least) {
    std::printf("%lld\t%s", (long long)stage.image, stage.name.c_str());
    for (const int64_t ns : stage.ns) std::printf("\t%lld", (long long)ns);
    std::printf("\n");
  }
  return 0;
}

struct Empty {
  int64_t threads, left;
  int64_t chunks() const { return threads; }
  bool backwards() const { return false; }
  void run(int64_t, int) {}
  bool advance() { return --left > 0; }
};

int time_barrier(int threads, int rounds) {
  constexpr int kStages = 10000;
  if (threads < 1 || rounds < 1) return fail("THREADS and ROUNDS must be at least 1");
  double least = 0;
  for (int r = 0; r < rounds; r++) {
    Empty program{threads, kStages};
    std::vector<Team<Empty>::Counter> counters(threads);
    Team<Empty> team(&program, threads, counters.data());
    std::vector<std::thread> others;
    for (int t = 1; t < threads; t++) others.emplace_back([&team, t] { team.work(t); });
    const int64_t begin = now();
    team.work(0);
    for (std::thread& other : others) other.join();
    const double ns = (double)(now() - begin) / kStages;
    least = r == 0 ? ns : std::min(least, ns);
  }
  std::printf("%.0f\n", least);
  return 0;
}

}  // namespace

int main(int count, char** words) {
  if (count == 9) return time_chunks(words + 1);
  if (count == 4 && !std::strcmp(words[1], "barrier")) return time_barrier(std::atoi(words[2]), std::atoi(words[3]));
  return fail("its arguments are at the head of benchmarks/chunks.cpp");
}
