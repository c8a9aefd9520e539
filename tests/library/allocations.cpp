// Fails if a call of apet.h allocates memory: every op, dtype, layout and selection, ragged or not, with and without a
// pool, on every instruction set; also plans, checks and error messages.
//
// The C library's functions, which operator new also calls, are replaced by ones that count. Prints the number of
// calls. Returns 1 if they have allocated, or if a test allocation is not counted.
#include <apet_testing.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
}

namespace {
long asked = 0;  // not atomic, since the pool below runs its tasks one after the other
}

extern "C" {
void* malloc(size_t bytes) { return asked++, __libc_malloc(bytes); }
void* calloc(size_t count, size_t bytes) { return asked++, __libc_calloc(count, bytes); }
void* realloc(void* old, size_t bytes) { return asked++, __libc_realloc(old, bytes); }
void* memalign(size_t alignment, size_t bytes) { return asked++, __libc_memalign(alignment, bytes); }
void* aligned_alloc(size_t alignment, size_t bytes) { return asked++, __libc_memalign(alignment, bytes); }
int posix_memalign(void** at, size_t alignment, size_t bytes) {
  asked++;
  return (*at = __libc_memalign(alignment, bytes)) ? 0 : 12;
}
}

namespace {

constexpr int64_t kImages = 3, kTokens = 150, kDim = 70, kKeep = 24, kBasis = 10;

void one_after_the_other(void*, int64_t tasks, apet_task task, void* context) {
  for (int64_t i = 0; i < tasks; i++) task(context, i, i + 1);
}

struct Buffers {
  std::vector<char> x, tokens, workspace;
  std::vector<int64_t> indices, kept, basis_indices;
  std::vector<int32_t> cu_seqlens, cu_keep;
  std::vector<float> residual;
  long calls = 0;

  Buffers()
      : x(kImages * kTokens * kDim * 4),
        tokens(kImages * (kKeep + kBasis) * kDim * 4),
        workspace(8 << 20),
        indices(kImages * (kKeep + kBasis)),
        basis_indices(kImages * kBasis),
        residual(kImages * kTokens) {
    uint32_t random = 1;  // small finite numbers in every dtype: no byte has an exponent of many bits
    for (char& byte : x) byte = (char)((random = random * 1664525u + 1013904223u) >> 24 & 0x3f);
    for (int64_t i = 0; i < kImages * kKeep; i++) kept.push_back(i % kKeep * 5);
    for (int32_t i = 0; i <= kImages; i++) {
      cu_seqlens.push_back((int32_t)(i * kTokens));
      cu_keep.push_back((int32_t)(i * kKeep));
    }
  }

  // All steps of one call; false, with a message, on an error.
  bool call(const apet_problem& p, const apet_pool* pool) {
    apet_tensors t = {};
    t.x = x.data(), t.cu_seqlens = cu_seqlens.data(), t.cu_keep = cu_keep.data(), t.kept = kept.data();
    t.tokens = tokens.data(), t.indices = indices.data();
    t.residual = residual.data(), t.basis_indices = basis_indices.data();
    apet_cpu_plan_t plan;
    apet_status status = apet_check(&p);
    if (status == APET_OK) status = apet_cpu_plan(&p, pool ? pool->threads : 1, &plan);
    char* aligned = workspace.data() + (64 - (uintptr_t)workspace.data() % 64);
    if (status == APET_OK) status = apet_cpu_run(&p, &t, pool, aligned, workspace.size() - 64);
    calls++;
    char text[256];
    for (int any = APET_OK; any <= APET_RAGGED_NEEDS_COMPRESS + 1; any++)
      apet_error_message(&p, (apet_status)any, text, sizeof text);
    if (status == APET_OK) return true;
    apet_error_message(&p, status, text, sizeof text);
    std::fprintf(stderr, "%s\n", text);
    return false;
  }
};

bool every_call(Buffers& buffers) {
  const apet_pool pool = {4, nullptr, one_after_the_other};
  for (int isa = APET_ISA_GENERIC; isa <= APET_ISA_AMX; isa++) {
    if (apet_cpu_use_isa((apet_isa)isa) != APET_OK) continue;
    for (int op = APET_COMPRESS; op <= APET_MERGE; op++)
      for (int dtype = APET_FLOAT32; dtype <= APET_BFLOAT16; dtype++)
        for (int layout = APET_INPLACE; layout <= APET_APPEND; layout++)
          for (int select = APET_FPS; select <= APET_QR; select++)
            for (int ragged = 0; ragged <= (op == APET_COMPRESS); ragged++) {
              apet_problem p = {};
              p.op = (apet_op)op, p.dtype = (apet_dtype)dtype;
              p.layout = (apet_layout)layout, p.select = (apet_select)select, p.ragged = ragged;
              p.images = kImages, p.tokens = kTokens, p.dim = kDim, p.keep = kKeep, p.basis = kBasis;
              p.stride_xb = kTokens * kDim, p.stride_xn = kDim, p.stride_xd = 1;
              p.start = -1, p.ridge = 1e-5, p.blend = 1;
              p.total_tokens = ragged ? kImages * kTokens : 0, p.total_keep = ragged ? kImages * kKeep : 0;
              if (!buffers.call(p, nullptr) || !buffers.call(p, &pool)) return false;
            }
  }
  return true;
}

}  // namespace

int main() {
  Buffers buffers;
  const long before = asked;
  if (!every_call(buffers)) return 1;
  const long during = asked - before;
  // Checks that allocations are counted.
  const long then = asked;
  std::string* injected = new std::string(1000, 'x');
  const bool seen = asked >= then + 2;
  delete injected;
  std::printf("%ld calls, %ld allocations%s\n", buffers.calls, during, seen ? "" : "; an injected one goes unnoticed");
  return during != 0 || !seen;
}
