/* apet.h: the whole C interface of apet-kernels, free of torch and of C++.
 *
 * ApET (arXiv 2602.19870) keeps, of the N visual tokens of an image, the K that a small basis of M other tokens
 * rebuilds worst, and averages each dropped token into the kept token it resembles most:
 *
 *   x [N, D] -> s1 basis -> s2 solve -> s3 residual -> s4 top-k -> s5 merge -> tokens [K, D], indices [K]
 *
 * A caller describes the call in an apet_problem (sizes, strides, options: no pointers), asks apet_cpu_plan or
 * apet_cuda_plan for the workspace it needs, and hands pointers and workspace to apet_cpu_run or apet_cuda_run. Nothing
 * here allocates, throws, prints or keeps a pointer; every function may be called from several threads at once. Strides
 * count elements. libapet holds everything but the last section, which is libapet_cuda's. */
#ifndef APET_H
#define APET_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define APET_API __attribute__((visibility("default")))
#else
#define APET_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Largest basis (M) of any backend: the factor L of s2 is held on the stack. */
#define APET_MAX_BASIS 64

typedef enum apet_dtype { APET_FLOAT32 = 0, APET_FLOAT16 = 1, APET_BFLOAT16 = 2 } apet_dtype;

/* compress: all five stages. score: s1-s3 only. merge: s5 only, for kept rows chosen elsewhere. */
typedef enum apet_op { APET_COMPRESS = 0, APET_SCORE = 1, APET_MERGE = 2 } apet_op;

/* inplace: the basis and the largest residuals, each at its own position (the paper's text).
 * overwrite: the largest residuals; the lowest of them are overwritten by the basis (the released code).
 * append: the largest residuals, then the basis rows after them (the released code for video). */
typedef enum apet_layout { APET_INPLACE = 0, APET_OVERWRITE = 1, APET_APPEND = 2 } apet_layout;

/* fps: farthest point. qr: largest residual so far (column-pivoted QR). */
typedef enum apet_select { APET_FPS = 0, APET_QR = 1 } apet_select;

/* Instruction sets of the CPU kernel. BEST is whatever the processor offers. */
typedef enum apet_isa {
  APET_ISA_GENERIC = 0,
  APET_ISA_AVX2 = 1,
  APET_ISA_AVX512 = 2,
  APET_ISA_AVX512_BF16 = 3,
  APET_ISA_BEST = 4
} apet_isa;

typedef enum apet_status {
  APET_OK = 0,
  APET_BAD_OP,
  APET_BAD_DTYPE,
  APET_BAD_LAYOUT,
  APET_BAD_SELECT,
  APET_BAD_IMAGES,
  APET_BAD_DIM,
  APET_BAD_TOKENS,
  APET_BAD_STRIDE,
  APET_BAD_KEEP,
  APET_BAD_BASIS,
  APET_BAD_START,
  APET_BAD_RIDGE,
  APET_BAD_BLEND,
  APET_BLEND_WITHOUT_OVERWRITE,
  APET_OVERWRITE_NEEDS_MORE,
  APET_BAD_TOTAL_KEEP,
  APET_BAD_MAX,
  APET_TOO_LARGE,
  APET_NULL_POINTER,
  APET_SMALL_WORKSPACE,
  APET_NO_ISA,
  APET_CUDA_FAILED,
  APET_NO_CUDA_PATH
} apet_status;

/* What a call computes. Zero-initialise it, then set what applies. */
typedef struct apet_problem {
  apet_op op;
  apet_dtype dtype; /* of x and of the tokens returned */
  apet_layout layout;
  apet_select select;
  int32_t basis;     /* M, 1..APET_MAX_BASIS */
  int32_t ragged;    /* 0: x is [images, tokens, dim]. 1: x is [total_tokens, dim], cut up by cu_seqlens */
  int64_t images;    /* B, or the number of ragged images */
  int64_t tokens;    /* N; ragged: the longest image (what lies past it is ignored) */
  int64_t dim;       /* D */
  int64_t keep;      /* K; ragged: the largest keep. merge: rows of `kept` for each image */
  int64_t stride_xb; /* from image to image (unused when ragged) */
  int64_t stride_xn; /* from token to token */
  int64_t stride_xd; /* from feature to feature: must be 1 unless dim is 1 */
  int64_t start;     /* first basis token, or -1: the one of largest norm */
  double ridge;      /* >= 0 */
  double blend;      /* overwrite: blend * basis + (1 - blend) * token; else 1 */
  int64_t total_tokens, total_keep; /* ragged only: T, and the sum of all keeps */
} apet_problem;

/* Where the data lies. Outputs are contiguous. Unused members are NULL.
 *   compress  reads x (ragged: cu_seqlens, cu_keep), writes tokens [B, R, D] and indices [B, R] where R = keep
 *             (append: keep + basis). Ragged: [total_keep (+ images * basis), D], indices into the packed x;
 *             rows that no image fills are zeros with index 0.
 *   score     reads x, writes residual [B, N] (e^2) and basis_indices [B, M] (picking order, padded with -1).
 *   merge     reads x, kept [B, K] (clamped into [0, N)) and kept_targets [B, K] (NULL: all), writes tokens [B, K, D].
 */
typedef struct apet_tensors {
  const void* x;
  const int32_t* cu_seqlens; /* [images + 1]; whatever it holds, nothing outside x is read */
  const int32_t* cu_keep;    /* [images + 1]; whatever it holds, nothing outside the outputs is written */
  const int64_t* kept;
  const uint8_t* kept_targets;
  void* tokens;
  int64_t* indices;
  float* residual;
  int64_t* basis_indices;
} apet_tensors;

/* The caller's threads. run() must call task(task_context, begin, end) over disjoint ranges that cover [0, tasks),
 * and return when all have. The ranges may run at once, in any order, or one after the other on one thread: the
 * kernels never wait for a range that has not started. */
typedef void (*apet_task)(void* task_context, int64_t begin, int64_t end);
typedef struct apet_pool {
  int32_t threads;
  void* context;
  void (*run)(void* context, int64_t tasks, apet_task task, void* task_context);
} apet_pool;

/* How a call would run. */
typedef struct apet_plan {
  apet_isa isa;
  int32_t teams;          /* images in flight at once */
  int32_t threads;        /* threads that share one image */
  size_t workspace_bytes; /* 64-byte aligned workspace that apet_cpu_run wants */
  double estimated_ns[2]; /* the estimate behind teams and threads: whole call on one thread, and as planned */
} apet_plan;

/* "0.1.0" */
APET_API const char* apet_version(void);

/* Refuses what no backend could run. APET_OK, or what is wrong. */
APET_API apet_status apet_check(const apet_problem* problem);

/* Writes the sentence for a status, with the problem's offending value, into text (cut off and terminated at capacity)
 * and returns the length that it has in full. problem may be NULL where the status does not concern one. */
APET_API size_t apet_sentence(const apet_problem* problem, apet_status status, char* text, size_t capacity);

/* Plans a call on at most `threads` threads. */
APET_API apet_status apet_cpu_plan(const apet_problem* problem, int32_t threads, apet_plan* plan);

/* Runs it. pool may be NULL (the calling thread alone). The workspace's contents do not matter. The result does not
 * depend on the pool, the batch, or where the data lies: an image gives the same bits in any call. */
APET_API apet_status apet_cpu_run(const apet_problem* problem, const apet_tensors* tensors, const apet_pool* pool,
                                  void* workspace, size_t workspace_bytes);

/* Whether this build and this processor have an instruction set, and its name. */
APET_API int apet_cpu_has_isa(apet_isa isa);
APET_API const char* apet_isa_name(apet_isa isa);

/* Pins every later call of the process to one instruction set (BEST: unpins). For tests and benchmarks, while no
 * other thread is between apet_cpu_plan and apet_cpu_run: plans differ. APET_NO_ISA where it is missing. */
APET_API apet_status apet_cpu_use_isa(apet_isa isa);

/* ---- CUDA: csrc/cuda, a library of its own (libapet_cuda), for the calling thread's current device ----------------
 */

/* How an image is taken through the stages. A *group* of CTAs owns an image; its rows are cut into one slice a CTA. */
typedef enum apet_cuda_path {
  APET_CUDA_BEST = 0,    /* in a wish: the path of the lowest estimate here */
  APET_CUDA_FUSED = 1,   /* one launch: the group is a cluster, and its slices stay in shared memory from s1 to s5 */
  APET_CUDA_CLUSTER = 2, /* two launches: s1-s4 in clusters, then s5 */
  APET_CUDA_GROUPS = 3   /* two launches: s1-s4 in groups of a cooperative launch, then s5 */
} apet_cuda_path;

/* What a caller would have instead of the rule's choice, for tests and measurements: every path gives the same bits. */
typedef struct apet_cuda_wish {
  apet_cuda_path path;
  int32_t group;    /* CTAs of a group; 0: chosen */
  int32_t resident; /* rows of a slice that stay in shared memory, at most; -1: as many as fit */
  int32_t tile;     /* s5 as its own launch: 64 or 128 rows of a tile; 0: chosen */
} apet_cuda_wish;

/* How a call would run. */
typedef struct apet_gpu_plan {
  apet_cuda_path path;
  int32_t launches;       /* score, and an empty call, have fewer than the path */
  int32_t group;          /* CTAs that share an image */
  int32_t groups;         /* images in flight at once */
  int32_t slice;          /* rows of the longest image that a CTA owns */
  int32_t resident;       /* of which so many stay in shared memory; the others are read again from L2 */
  int32_t state_shared;   /* 1: y, norms and distances lie in shared memory, 0: in the workspace */
  int32_t basis_shared;   /* 1: the basis token of a step is copied to shared memory, 0: its row is too long */
  int32_t tile;           /* s5 as its own launch: rows of a tile, else 0 */
  int32_t select_shared;  /* bytes of shared memory of a CTA of the first launch */
  int32_t merge_shared;   /* and of the second, 0 without one */
  size_t workspace_bytes; /* 64-byte aligned workspace that apet_cuda_run wants */
  double estimated_us;    /* computed, not measured: docs/cuda.md */
  char why[256];          /* a sentence: why this path, and what ruled out a better one */
} apet_gpu_plan;

/* Plans a call on the current device, which it asks for its shared memory, occupancy and clusters (once a process and
 * device). wish may be NULL. APET_NO_CUDA_PATH: nothing here can run it, or not what the wish says; plan->why says why.
 * APET_CUDA_FAILED: no device, no driver, or no kernel for it; apet_cuda_error() has the runtime's words. */
APET_API apet_status apet_cuda_plan(const apet_problem* problem, const apet_cuda_wish* wish, apet_gpu_plan* plan);

/* Enqueues it on `stream` (a cudaStream_t) of the current device. Pointers are device memory; plan is what
 * apet_cuda_plan made of the same problem on this device. Never synchronises, safe under stream capture. The
 * workspace's contents do not matter; it must stay untouched until the launches are done. An image gives the same bits
 * on every path and in any call of this device. */
APET_API apet_status apet_cuda_run(const apet_problem* problem, const apet_tensors* tensors, const apet_gpu_plan* plan,
                                   void* workspace, size_t workspace_bytes, void* stream);

/* The CUDA runtime's words for the last APET_CUDA_FAILED of the calling thread. */
APET_API const char* apet_cuda_error(void);

#ifdef __cplusplus
}
#endif

#endif /* APET_H */
