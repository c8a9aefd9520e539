// Calls of libapet that come one after another on standard input, for a process that cannot load the library itself:
// tests/arm.py runs this program on an emulated processor.
//
// A call: 3 int64, the instruction set, the threads and whether to answer with the plan alone; apet_problem; for each
// member of apet_tensors an int64 of bytes, -1 for NULL, and of inputs the content. The answer: 3 int64, a status,
// and of the plan the instruction set and the threads; then, of APET_OK, the outputs.
//
// Every array ends where the next byte may not be touched, so that its alignment is no more than its elements'.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "apet_testing.h"

namespace {

template <class T>
bool read(T* to, size_t bytes = sizeof(T)) {
  return std::fread(to, 1, bytes, stdin) == bytes;
}
template <class T>
void write(const T* from, size_t bytes = sizeof(T)) {
  std::fwrite(from, 1, bytes, stdout);
}

// Memory of 0xff in front of a page that cannot be touched.
class Array {
 public:
  explicit Array(size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), used = (bytes + page - 1) / page * page;
    size_ = used + page;
    map_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map_ == MAP_FAILED || mprotect(map_ + used, page, PROT_NONE) != 0) std::abort();
    std::memset(map_, 0xff, used);
    data = map_ + used - bytes;
  }
  ~Array() { munmap(map_, size_); }
  Array(const Array&) = delete;
  char* data;

 private:
  char* map_;
  size_t size_;
};

void run(void*, int64_t tasks, apet_task task, void* task_context) {
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < tasks; i++) threads.emplace_back(task, task_context, i, i + 1);
  task(task_context, 0, 1);
  for (std::thread& thread : threads) thread.join();
}

constexpr int kInputs = 6, kTensors = 10;

// Answers the next call; false after the last one.
bool answer() {
  int64_t isa, threads, plan_alone, bytes[kTensors];
  apet_problem problem;
  if (!read(&isa) || !read(&threads) || !read(&plan_alone) || !read(&problem)) return false;
  Array* arrays[kTensors] = {};
  for (int i = 0; i < kTensors; i++) {
    if (!read(&bytes[i])) std::abort();
    if (bytes[i] < 0) continue;
    arrays[i] = new Array((size_t)bytes[i]);
    if (i < kInputs && !read(arrays[i]->data, (size_t)bytes[i])) std::abort();
  }
  const auto data = [&](int i) { return arrays[i] ? arrays[i]->data : nullptr; };
  apet_tensors tensors;
  tensors.x = data(0);
  tensors.cu_seqlens = reinterpret_cast<const int32_t*>(data(1));
  tensors.cu_keep = reinterpret_cast<const int32_t*>(data(2));
  tensors.kept = reinterpret_cast<const int64_t*>(data(3));
  tensors.kept_targets = reinterpret_cast<const uint8_t*>(data(4));
  tensors.weights = reinterpret_cast<const float*>(data(5));
  tensors.tokens = data(6);
  tensors.indices = reinterpret_cast<int64_t*>(data(7));
  tensors.residual = reinterpret_cast<float*>(data(8));
  tensors.basis_indices = reinterpret_cast<int64_t*>(data(9));

  apet_cpu_plan_t plan = {};
  apet_status status = apet_cpu_use_isa((apet_isa)isa);
  if (status == APET_OK) status = apet_cpu_plan(&problem, (int32_t)threads, &plan);
  if (status == APET_OK && !plan_alone) {
    const apet_pool pool = {(int32_t)threads, nullptr, run};
    const Array workspace(plan.workspace_bytes);
    status = apet_cpu_run(&problem, &tensors, threads > 1 ? &pool : nullptr, workspace.data, plan.workspace_bytes);
  }
  const int64_t said[] = {status, plan.isa, plan.images_in_flight * plan.threads_per_image};
  write(said, sizeof said);
  for (int i = 0; i < kTensors; i++) {
    if (i >= kInputs && bytes[i] >= 0 && status == APET_OK) write(arrays[i]->data, (size_t)bytes[i]);
    delete arrays[i];
  }
  std::fflush(stdout);
  return true;
}

}  // namespace

int main() {
  while (answer()) {
  }
  return 0;
}
