// The snippet of docs/vendoring.md, extracted by tests/test_library_guide.py, for ctypes and the simulated GPU.
#include <cstdio>
#include <cstdlib>

#include "snippet.cpp"

namespace {
void* workspace;  // of the last call, whose launches are still queued when it returns
void* scratch(size_t bytes, cudaStream_t) {
  std::free(workspace);
  return workspace = std::aligned_alloc(64, bytes);
}
}  // namespace

extern "C" void guide_compress(const void* x, const int64_t* sizes, void* tokens, int64_t* indices, char* wrong,
                               size_t capacity) {
  const std::string said =
      compress(x, sizes[0], sizes[1], sizes[2], sizes[3], tokens, indices, scratch, /*stream=*/nullptr);
  std::snprintf(wrong, capacity, "%s", said.c_str());
}
