// An engine with a vendored copy of apet: a shared library that exports these four functions, and none of apet's.
#include <apet_testing.h>

#define ENGINE_API extern "C" __attribute__((visibility("default")))

ENGINE_API const char* engine_version(void) { return apet_version(); }

ENGINE_API int engine_plan(const apet_problem* problem, int32_t threads, apet_cpu_plan_t* plan) {
  return apet_cpu_plan(problem, threads, plan);
}

ENGINE_API int engine_run(const apet_problem* problem, const apet_tensors* tensors, const apet_pool* pool,
                          void* workspace, size_t bytes) {
  return apet_cpu_run(problem, tensors, pool, workspace, bytes);
}

ENGINE_API int engine_use_isa(int isa) { return apet_cpu_use_isa(static_cast<apet_isa>(isa)); }
