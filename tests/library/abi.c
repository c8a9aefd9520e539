/* The binary interface of apet.h on LP64, number by number: a change that stops this from compiling, as C11 or C++17, breaks
 * programs that are compiled already. Then APET_VERSION_MINOR (from 1.0 on MAJOR) goes up, and the numbers follow. What
 * is added to apet_status is added here. tests/test_library_abi.py compiles it, and looks that nothing of the header is
 * missing. */
#include "apet.h"

#ifdef __cplusplus
#define HOLDS(what) static_assert(what, "the binary interface has changed: see tests/library/abi.c")
#else
#define HOLDS(what) _Static_assert(what, "the binary interface has changed: see tests/library/abi.c")
#endif
#define SIZE(type, bytes) HOLDS(sizeof(type) == bytes)
#define MEMBER(type, name, at, bytes) HOLDS(offsetof(type, name) == at && sizeof(((type*)0)->name) == bytes)
#define VALUE(name, value) HOLDS((int)name == value)

/* The version whose interface this is. */
VALUE(APET_VERSION_MAJOR, 0);
VALUE(APET_VERSION_MINOR, 2);
VALUE(APET_MAX_BASIS, 64);
VALUE(APET_BASIS_KEEP, -1);
VALUE(APET_MAX_REFINE, 8);

SIZE(apet_problem, 128);
MEMBER(apet_problem, op, 0, 4);
MEMBER(apet_problem, dtype, 4, 4);
MEMBER(apet_problem, layout, 8, 4);
MEMBER(apet_problem, select, 12, 4);
MEMBER(apet_problem, basis, 16, 4);
MEMBER(apet_problem, ragged, 20, 4);
MEMBER(apet_problem, images, 24, 8);
MEMBER(apet_problem, tokens, 32, 8);
MEMBER(apet_problem, dim, 40, 8);
MEMBER(apet_problem, keep, 48, 8);
MEMBER(apet_problem, stride_xb, 56, 8);
MEMBER(apet_problem, stride_xn, 64, 8);
MEMBER(apet_problem, stride_xd, 72, 8);
MEMBER(apet_problem, start, 80, 8);
MEMBER(apet_problem, ridge, 88, 8);
MEMBER(apet_problem, blend, 96, 8);
MEMBER(apet_problem, total_tokens, 104, 8);
MEMBER(apet_problem, total_keep, 112, 8);
MEMBER(apet_problem, refine, 120, 8);

SIZE(apet_tensors, 80);
MEMBER(apet_tensors, x, 0, 8);
MEMBER(apet_tensors, cu_seqlens, 8, 8);
MEMBER(apet_tensors, cu_keep, 16, 8);
MEMBER(apet_tensors, kept, 24, 8);
MEMBER(apet_tensors, kept_targets, 32, 8);
MEMBER(apet_tensors, weights, 40, 8);
MEMBER(apet_tensors, tokens, 48, 8);
MEMBER(apet_tensors, indices, 56, 8);
MEMBER(apet_tensors, residual, 64, 8);
MEMBER(apet_tensors, basis_indices, 72, 8);

SIZE(apet_pool, 24);
MEMBER(apet_pool, threads, 0, 4);
MEMBER(apet_pool, context, 8, 8);
MEMBER(apet_pool, run, 16, 8);

SIZE(apet_cpu_plan_t, 40);
MEMBER(apet_cpu_plan_t, isa, 0, 4);
MEMBER(apet_cpu_plan_t, images_in_flight, 4, 4);
MEMBER(apet_cpu_plan_t, threads_per_image, 8, 4);
MEMBER(apet_cpu_plan_t, workspace_bytes, 16, 8);
MEMBER(apet_cpu_plan_t, estimated_ns, 24, 16);

SIZE(apet_cuda_plan_t, 320);
MEMBER(apet_cuda_plan_t, path, 0, 4);
MEMBER(apet_cuda_plan_t, launches, 4, 4);
MEMBER(apet_cuda_plan_t, ctas_per_image, 8, 4);
MEMBER(apet_cuda_plan_t, images_in_flight, 12, 4);
MEMBER(apet_cuda_plan_t, slice, 16, 4);
MEMBER(apet_cuda_plan_t, resident, 20, 4);
MEMBER(apet_cuda_plan_t, state_shared, 24, 4);
MEMBER(apet_cuda_plan_t, basis_shared, 28, 4);
MEMBER(apet_cuda_plan_t, tile, 32, 4);
MEMBER(apet_cuda_plan_t, first_shared_bytes, 36, 4);
MEMBER(apet_cuda_plan_t, second_shared_bytes, 40, 4);
MEMBER(apet_cuda_plan_t, tile_rows, 44, 4);
MEMBER(apet_cuda_plan_t, workspace_bytes, 48, 8);
MEMBER(apet_cuda_plan_t, estimated_us, 56, 8);
MEMBER(apet_cuda_plan_t, why, 64, 256);

SIZE(apet_dtype, 4);
VALUE(APET_FLOAT32, 0);
VALUE(APET_FLOAT16, 1);
VALUE(APET_BFLOAT16, 2);

SIZE(apet_op, 4);
VALUE(APET_COMPRESS, 0);
VALUE(APET_SCORE, 1);
VALUE(APET_MERGE, 2);

SIZE(apet_layout, 4);
VALUE(APET_INPLACE, 0);
VALUE(APET_OVERWRITE, 1);
VALUE(APET_APPEND, 2);

SIZE(apet_select, 4);
VALUE(APET_FPS, 0);
VALUE(APET_QR, 1);

SIZE(apet_status, 4);
VALUE(APET_OK, 0);
VALUE(APET_BAD_OP, 1);
VALUE(APET_BAD_DTYPE, 2);
VALUE(APET_BAD_LAYOUT, 3);
VALUE(APET_BAD_SELECT, 4);
VALUE(APET_BAD_IMAGES, 5);
VALUE(APET_BAD_DIM, 6);
VALUE(APET_BAD_TOKENS, 7);
VALUE(APET_BAD_STRIDE, 8);
VALUE(APET_BAD_KEEP, 9);
VALUE(APET_BAD_BASIS, 10);
VALUE(APET_BAD_START, 11);
VALUE(APET_BAD_RIDGE, 12);
VALUE(APET_BAD_BLEND, 13);
VALUE(APET_BLEND_WITHOUT_OVERWRITE, 14);
VALUE(APET_OVERWRITE_NEEDS_MORE, 15);
VALUE(APET_BAD_TOTAL_KEEP, 16);
VALUE(APET_BAD_MAX, 17);
VALUE(APET_TOO_LARGE, 18);
VALUE(APET_NULL_POINTER, 19);
VALUE(APET_SMALL_WORKSPACE, 20);
VALUE(APET_NO_ISA, 21);
VALUE(APET_CUDA_FAILED, 22);
VALUE(APET_NO_CUDA_PATH, 23);
VALUE(APET_RAGGED_NEEDS_COMPRESS, 24);
VALUE(APET_BASIS_NEEDS_QR, 25);
VALUE(APET_BASIS_NEEDS_KEEP, 26);
VALUE(APET_BASIS_NEEDS_INPLACE, 27);
VALUE(APET_BAD_REFINE, 28);
VALUE(APET_REFINE_NEEDS_INPLACE, 29);
VALUE(APET_REFINE_NEEDS_BASIS_KEEP, 30);

SIZE(apet_isa, 4);
VALUE(APET_ISA_GENERIC, 0);
VALUE(APET_ISA_AVX2, 1);
VALUE(APET_ISA_AVX512, 2);
VALUE(APET_ISA_AVX512_BF16, 3);
VALUE(APET_ISA_BEST, 4);
VALUE(APET_ISA_NEON, 5);
VALUE(APET_ISA_NEON_BF16, 6);
VALUE(APET_ISA_AMX, 7);
VALUE(APET_ISA_AMX_FP16, 8);

SIZE(apet_cuda_path, 4);
VALUE(APET_CUDA_BEST, 0);
VALUE(APET_CUDA_FUSED, 1);
VALUE(APET_CUDA_CLUSTER, 2);
VALUE(APET_CUDA_COOPERATIVE, 3);

/* Functions, declared once more: a compiler rejects two declarations that differ. */
#ifdef __cplusplus
extern "C" {
#endif
typedef void (*apet_task)(void* task_context, int64_t begin, int64_t end);
const char* apet_version(void);
apet_status apet_check(const apet_problem* problem);
size_t apet_error_message(const apet_problem* problem, apet_status status, char* text, size_t capacity);
apet_status apet_cpu_plan(const apet_problem* problem, int32_t threads, apet_cpu_plan_t* plan);
apet_status apet_cpu_run(const apet_problem* problem, const apet_tensors* tensors, const apet_pool* pool,
                         void* workspace, size_t workspace_bytes);
int apet_cpu_has_isa(apet_isa isa);
const char* apet_isa_name(apet_isa isa);
apet_status apet_cuda_plan(const apet_problem* problem, apet_cuda_plan_t* plan);
apet_status apet_cuda_run(const apet_problem* problem, const apet_tensors* tensors, const apet_cuda_plan_t* plan,
                          void* workspace, size_t workspace_bytes, void* stream);
const char* apet_cuda_error(void);
#ifdef __cplusplus
}
#endif
