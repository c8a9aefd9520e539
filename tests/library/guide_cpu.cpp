// The snippet of docs/vendoring.md, extracted by tests/test_library_guide.py, for ctypes.
#include <cstdio>

#include "snippet.cpp"

extern "C" void guide_compress(const float* x, const int64_t* sizes, float* tokens, int64_t* indices, char* wrong,
                               size_t capacity) {
  const std::string said = compress(x, sizes[0], sizes[1], sizes[2], sizes[3], nullptr, tokens, indices);
  std::snprintf(wrong, capacity, "%s", said.c_str());
}
