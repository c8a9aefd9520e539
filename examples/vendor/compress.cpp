// compress TOKENS N D KEEP OUT INDICES [THREADS]
//
// Compresses images of N tokens with D features each to KEEP tokens per image. TOKENS holds raw float32, one image
// after another. OUT receives the tokens as raw float32 [images, KEEP, D], INDICES their positions as int64 [images,
// KEEP].
#include <apet.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "pool.h"

namespace {

using File = std::unique_ptr<FILE, int (*)(FILE*)>;

File open(const std::string& path, const char* mode) {
  File file(std::fopen(path.c_str(), mode), std::fclose);
  if (!file) throw std::runtime_error(path + " cannot be opened");
  return file;
}

// All float32 of a file; their number must be a multiple of `unit`.
std::vector<float> read(const std::string& path, int64_t unit) {
  const File file = open(path, "rb");
  std::vector<float> values;
  float buffer[4096];
  size_t count;
  while ((count = std::fread(buffer, 1, sizeof buffer, file.get())) == sizeof buffer)
    values.insert(values.end(), buffer, buffer + 4096);
  values.insert(values.end(), buffer, buffer + count / sizeof(float));
  if (count % sizeof(float) != 0 || values.size() % unit != 0)
    throw std::runtime_error(path + " does not hold whole images of " + std::to_string(unit) + " float32");
  return values;
}

template <class T>
void write(const std::string& path, const std::vector<T>& values) {
  File file = open(path, "wb");
  const size_t written = std::fwrite(values.data(), sizeof(T), values.size(), file.get());
  if (std::fclose(file.release()) != 0 || written != values.size())
    throw std::runtime_error(path + " cannot be written");
}

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
  char message[256];
  apet_error_message(&problem, status, message, sizeof message);
  throw std::runtime_error(message);
}

void run(char** arguments, int64_t threads) {
  if (threads < 1 || threads > 256)
    throw std::runtime_error("THREADS is " + std::to_string(threads) + ", outside 1..256");
  apet_problem p = {};  // compress, float32, inplace
  p.images = 1;         // for apet_check; the size of the file determines the number
  p.tokens = number("N", arguments[2]);
  p.dim = number("D", arguments[3]);
  p.keep = number("KEEP", arguments[4]);
  p.select = APET_QR, p.basis = APET_BASIS_KEEP, p.start = -1, p.ridge = 1e-5, p.blend = 1;
  p.stride_xd = 1;
  check(p, apet_check(&p));
  p.stride_xn = p.dim, p.stride_xb = p.tokens * p.dim;

  const std::vector<float> x = read(arguments[1], p.stride_xb);
  p.images = (int64_t)x.size() / p.stride_xb;
  std::vector<float> tokens(p.images * p.keep * p.dim);
  std::vector<int64_t> indices(p.images * p.keep);

  apet_cpu_plan_t plan;
  check(p, apet_cpu_plan(&p, (int32_t)threads, &plan));
  // An engine would keep the workspace and the threads from call to call.
  const std::unique_ptr<void, void (*)(void*)> workspace(std::aligned_alloc(64, plan.workspace_bytes), std::free);
  Pool pool((int)threads);
  apet_tensors t = {};
  t.x = x.data();
  t.tokens = tokens.data();
  t.indices = indices.data();
  check(p, apet_cpu_run(&p, &t, pool.lent(), workspace.get(), plan.workspace_bytes));

  write(arguments[5], tokens);
  write(arguments[6], indices);
  std::printf("apet %s, %s: %lld of %lld tokens, %lld images, %d at once on %d threads each\n", apet_version(),
              apet_isa_name(plan.isa), (long long)p.keep, (long long)p.tokens, (long long)p.images,
              plan.images_in_flight, plan.threads_per_image);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7 && argc != 8) {
    std::fprintf(stderr, "usage: compress TOKENS N D KEEP OUT INDICES [THREADS]\n");
    return 2;
  }
  try {
    run(argv, argc == 8 ? number("THREADS", argv[7]) : 1);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
