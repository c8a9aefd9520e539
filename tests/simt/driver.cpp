// Runs one call of apet_cuda_run from a file, for builds with a sanitizer, without Python. Arrays have exactly the
// memory that the call may access. call.py writes the file and reads the results. Prints errors, and then returns 1.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "apet_testing.h"

extern "C" {
void simt_use_device(int capability, int multiprocessors, int shared_per_block, int shared_per_multiprocessor,
                     int largest_cluster);
void simt_use_seed(unsigned seed);
const char* simt_run();
}

namespace {

[[noreturn]] void stop(const char* why) {
  std::fprintf(stderr, "%s\n", why);
  std::exit(1);
}

constexpr int kInputs = 6, kTensors = 10;  // of apet_tensors

void read(void* to, size_t bytes, FILE* file) {
  if (bytes && std::fread(to, 1, bytes, file) != bytes) stop("the case is cut off");
}

// The array of one pointer of apet_tensors; NULL if it is not given.
struct Memory {
  int64_t bytes = -1;
  char* data = nullptr;
  void read_from(FILE* file, bool output) {
    read(&bytes, sizeof bytes, file);
    if (bytes < 0) return;
    // The caller decides the alignment; here it is that of torch's tensors.
    if (posix_memalign(reinterpret_cast<void**>(&data), 64, bytes ? bytes : 1)) stop("no memory");
    if (output) std::memset(data, 0xff, bytes);
    else read(data, bytes, file);
  }
};

void check(const apet_problem& problem, apet_status status) {
  if (status == APET_OK) return;
  char text[512];
  apet_error_message(&problem, status, text, sizeof text);
  std::fprintf(stderr, "%s\n", apet_cuda_error());
  stop(text);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) stop("driver CASE RESULT");
  FILE* file = std::fopen(arguments[1], "rb");
  if (!file) stop("no case");
  int64_t numbers[9];
  apet_problem problem;
  apet_cuda_override override;
  apet_cuda_plan_t plan;
  read(numbers, sizeof numbers, file);
  if (numbers[0] != sizeof problem || numbers[1] != sizeof override || numbers[2] != sizeof plan)
    stop("the structures of call.py are not those of apet.h");
  read(&problem, sizeof problem, file);
  read(&override, sizeof override, file);
  Memory memory[kTensors];
  for (int i = 0; i < kTensors; i++) memory[i].read_from(file, i >= kInputs);
  std::fclose(file);

  simt_use_device((int)numbers[3], (int)numbers[4], (int)numbers[5], (int)numbers[6], (int)numbers[7]);
  simt_use_seed((unsigned)numbers[8]);
  apet_tensors tensors = {};
  tensors.x = memory[0].data;
  tensors.cu_seqlens = reinterpret_cast<const int32_t*>(memory[1].data);
  tensors.cu_keep = reinterpret_cast<const int32_t*>(memory[2].data);
  tensors.kept = reinterpret_cast<const int64_t*>(memory[3].data);
  tensors.kept_targets = reinterpret_cast<const uint8_t*>(memory[4].data);
  tensors.weights = reinterpret_cast<const float*>(memory[5].data);
  tensors.tokens = memory[6].data;
  tensors.indices = reinterpret_cast<int64_t*>(memory[7].data);
  tensors.residual = reinterpret_cast<float*>(memory[8].data);
  tensors.basis_indices = reinterpret_cast<int64_t*>(memory[9].data);
  check(problem, apet_cuda_plan_with(&problem, &override, &plan));
  void* workspace;
  if (posix_memalign(&workspace, 64, plan.workspace_bytes ? plan.workspace_bytes : 1)) stop("no memory");
  std::memset(workspace, 0xff, plan.workspace_bytes);
  check(problem, apet_cuda_run(&problem, &tensors, &plan, workspace, plan.workspace_bytes, nullptr));
  if (const char* fault = simt_run()) stop(fault);
  std::free(workspace);

  FILE* result = std::fopen(arguments[2], "wb");
  for (int i = kInputs; i < kTensors; i++)
    if (memory[i].bytes > 0) std::fwrite(memory[i].data, 1, memory[i].bytes, result);
  std::fclose(result);
  for (Memory& m : memory) std::free(m.data);
  return 0;
}
