/* apet.h: the whole C interface of apet-kernels, free of torch and of C++.
 *
 * ApET (arXiv 2602.19870) keeps, of the N visual tokens of an image, the K that a small basis of M other tokens
 * reconstructs worst, and averages each dropped token into the most similar kept token:
 *
 *   x [N, D] -> s1 basis -> s2 solve -> s3 residual -> s4 top-k -> s5 merge -> tokens [K, D], indices [K]
 *
 * A caller describes the call in an apet_problem (sizes, strides, options: no pointers), asks apet_cpu_plan or
 * apet_cuda_plan for the workspace it needs, and hands pointers and workspace to apet_cpu_run or apet_cuda_run.
 *
 * For every function here:
 *   memory    No function allocates, and none keeps a pointer: arguments may be freed when the call returns, except
 *             the device memory of apet_cuda_run, which the stream still uses.
 *   errors    No function throws, prints, aborts or reads errno: each returns a status, and apet_error_message gives
 *             its text. On a status other than APET_OK nothing has been written, unless the function says so.
 *   threads   Any function may be called from several threads at once. Concurrent calls need outputs and workspaces of
 *             their own; they may share inputs.
 *   units     Strides count elements, sizes of memory bytes. Positions of tokens count from 0.
 *   overlap   Outputs and workspace must not overlap each other or an input.
 *
 * libapet (CMake: apet::cpu) holds everything but the last section, which is libapet_cuda's (apet::cuda). */
#ifndef APET_H
#define APET_H

#include <stddef.h>
#include <stdint.h>

/* The version of this header. MAJOR, or while that is 0 MINOR, goes up whenever a program compiled with an older header
 * would break, and is part of the shared library's name (libapet.so.0.2): see docs/vendoring.md. */
#define APET_VERSION_MAJOR 0
#define APET_VERSION_MINOR 2
#define APET_VERSION_PATCH 0

/* Marks what a shared library exports. Define APET_STATIC, for the static library's sources and its users alike, and
 * compile with -fvisibility=hidden: then a library that links it statically exports none of its symbols. */
#if defined(__GNUC__) && !defined(APET_STATIC)
#define APET_API __attribute__((visibility("default")))
#else
#define APET_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- What a call computes --------------------------------------------------------------------------------------- */

/* Largest basis (M) that is picked one token at a time, by any backend. */
#define APET_MAX_BASIS 64

/* As apet_problem.basis: M is keep, in every image. "None" in messages. */
#define APET_BASIS_KEEP (-1)

/* Most medoid steps. */
#define APET_MAX_REFINE 8

/* Type of x and of the tokens returned. Sums are float32 or wider in every case. */
typedef enum apet_dtype {
  APET_FLOAT32 = 0,  /* IEEE binary32, 4 bytes */
  APET_FLOAT16 = 1,  /* IEEE binary16, 2 bytes */
  APET_BFLOAT16 = 2, /* the upper 2 bytes of a binary32 */
} apet_dtype;

typedef enum apet_op {
  APET_COMPRESS = 0, /* all five stages */
  APET_SCORE = 1,    /* s1 to s3: residuals and basis, for budgets chosen by the caller */
  APET_MERGE = 2,    /* s5: all other tokens are averaged into rows that the caller has chosen */
} apet_op;

/* Which rows come out, and where the basis goes. m <= M is the length that the basis has: s1 stops early where tokens
 * repeat each other. */
typedef enum apet_layout {
  APET_INPLACE = 0,   /* the basis and the K - m largest residuals of the others, each at its own position (the paper's
                         text). K <= m: the first K basis tokens */
  APET_OVERWRITE = 1, /* the K largest residuals, of which the m lowest are overwritten by the basis (the paper's
                         released code). Needs keep > basis, or keep == tokens */
  APET_APPEND = 2,    /* the K largest residuals, then M basis rows after them (the released code for video) */
} apet_layout;

/* What the next basis token is: the one of largest ... */
typedef enum apet_select {
  APET_FPS = 0, /* distance to the basis so far (farthest point sampling) */
  APET_QR = 1,  /* residual so far (column-pivoted QR) */
} apet_select;

/* What a call computes. Zero-initialise it, then set what applies. Members that an op does not use are ignored, but
 * enumerations must hold one of their values. APET_COMPRESS requires blend to be set (1: no blending). */
typedef struct apet_problem {
  apet_op op;
  apet_dtype dtype;
  apet_layout layout; /* compress */
  apet_select select; /* compress, score */
  int32_t basis;      /* compress, score: M, 1..APET_MAX_BASIS. compress with APET_QR and APET_INPLACE: also up to
                         keep (ragged: any number), and APET_BASIS_KEEP. With APET_BASIS_KEEP or more than
                         APET_MAX_BASIS, M of an image is at most its keep, and more than 16 basis tokens are picked
                         in four rounds. APET_QR with APET_BASIS_KEEP is the default of the Python package; APET_FPS
                         with 10 is the paper's rule */
  int32_t ragged;     /* 0: x is [images, tokens, dim]. 1: x is [total_tokens, dim], images of different lengths one
                         after another, cut up by cu_seqlens; compress alone */
  int64_t images;     /* B, or the number of ragged images; 0..2^31-1; 0: nothing is done */
  int64_t tokens;     /* N, 1..2^31-65537. Ragged: the longest image, 0..2^31-1; of a longer one the rest is ignored */
  int64_t dim;        /* D, 1..2^31-1 */
  int64_t keep;       /* compress: K, 1..tokens. Ragged: the largest K of an image, at least 0; none keeps more.
                         merge: rows of `kept` for each image, 1..tokens */
  int64_t stride_xb;  /* of x, from image to image; ragged: ignored */
  int64_t stride_xn;  /* of x, from token to token */
  int64_t stride_xd;  /* of x, from feature to feature: 1, or anything where dim is 1 */
  int64_t start;      /* compress, score: position of the first basis token; -1: the one of largest norm. Ragged: in
                         each image, or its last token if it is shorter; at most total_tokens - 1 */
  double ridge;       /* compress, score: added to the diagonal of s2, so absolute; finite, >= 0; 1e-5 is the paper's */
  double blend;       /* compress: 1. overwrite: 0..1, an overwritten row becomes blend * basis +
                         (1 - blend) * token */
  int64_t total_tokens; /* ragged: T, rows of x, 0..2^31-65537; else 0 */
  int64_t total_keep;   /* ragged: the K of all images together, 0..total_tokens */
  int64_t refine;       /* compress: medoid steps, 0..APET_MAX_REFINE; other than 0 needs APET_INPLACE and basis = keep
                           (ragged: APET_BASIS_KEEP) */
} apet_problem;

/* Where the data is: host memory for apet_cpu_run, device memory for apet_cuda_run. Addresses must be multiples of the
 * element's size; more alignment is not needed and does not change results. Outputs are contiguous. Members that an op
 * does not use are ignored; those that it uses may be NULL only where they have no elements.
 *
 *   compress  reads x, weights, and if ragged cu_seqlens and cu_keep; writes tokens and indices
 *   score     reads x; writes residual and basis_indices
 *   merge     reads x, kept and kept_targets; writes tokens
 *
 * R, the rows of an image's result, is keep (append: keep + basis). Ragged, rows lie one image after another:
 * total_keep of them (append: + images * basis), and those that no image fills are zeros with index 0. */
typedef struct apet_tensors {
  const void* x;               /* [images, tokens, dim], or ragged [total_tokens, dim], of dtype */
  const int32_t* cu_seqlens;   /* [images + 1] first token of each image, and the end; 0 <= ... <= total_tokens,
                                  ascending. With any other values, still nothing outside x is read */
  const int32_t* cu_keep;      /* [images + 1] the same for the K of the images, up to total_keep. With any other
                                  values, still nothing outside the outputs is written */
  const int64_t* kept;         /* [images, keep] positions of the rows, in any order, repeated or not; clamped into
                                  0..tokens-1 */
  const uint8_t* kept_targets; /* [images, keep] not 0: tokens may be merged into this row. NULL: into all */
  const float* weights;        /* [images, tokens], or ragged [total_tokens]: the values by which tokens are picked and
                                  ranked are multiplied by them. Negative values and NaN count as 0. NULL: 1 */
  void* tokens;                /* [images, R, dim], or ragged [rows, dim], of dtype */
  int64_t* indices;       /* [images, R], or ragged [rows]: the row's position in its image, or ragged in the packed
                             x; ascending within an image but for appended rows. An overwritten row's is its own,
                             not the basis token's */
  float* residual;        /* [images, tokens] e^2, the squared distance to its reconstruction from the basis */
  int64_t* basis_indices; /* [images, basis] in picking order; -1 from m on */
} apet_tensors;

/* ---- Errors ----------------------------------------------------------------------------------------------------- */

typedef enum apet_status {
  APET_OK = 0,
  APET_BAD_OP = 1,                   /* op is none of apet_op */
  APET_BAD_DTYPE = 2,                /* dtype is none of apet_dtype */
  APET_BAD_LAYOUT = 3,               /* layout is none of apet_layout */
  APET_BAD_SELECT = 4,               /* select is none of apet_select */
  APET_BAD_IMAGES = 5,               /* images < 0 */
  APET_BAD_DIM = 6,                  /* dim < 1 */
  APET_BAD_TOKENS = 7,               /* tokens < 1 */
  APET_BAD_STRIDE = 8,               /* stride_xd is not 1 */
  APET_BAD_KEEP = 9,                 /* keep is outside 1..tokens */
  APET_BAD_BASIS = 10,               /* basis is neither in its range nor APET_BASIS_KEEP */
  APET_BAD_START = 11,               /* start is neither -1 nor a position */
  APET_BAD_RIDGE = 12,               /* ridge is negative or not finite */
  APET_BAD_BLEND = 13,               /* blend is outside 0..1 */
  APET_BLEND_WITHOUT_OVERWRITE = 14, /* blend is not 1, and layout not overwrite */
  APET_OVERWRITE_NEEDS_MORE = 15,    /* overwrite with keep <= basis, and not all tokens kept */
  APET_BAD_TOTAL_KEEP = 16,          /* total_keep is outside 0..total_tokens */
  APET_BAD_MAX = 17,                 /* ragged: tokens or keep is negative */
  APET_TOO_LARGE = 18,               /* a size is past its limit */
  APET_NULL_POINTER = 19,            /* a pointer that the call needs is NULL */
  APET_SMALL_WORKSPACE = 20,         /* the workspace is NULL, too small, or not 64-byte aligned */
  APET_NO_ISA = 21,                  /* this build or this processor lacks the instruction set */
  APET_CUDA_FAILED = 22,             /* a call of the CUDA runtime failed; apet_cuda_error() has its message */
  APET_NO_CUDA_PATH = 23,            /* no path can run this on the device; the plan's `why` gives the reason */
  APET_RAGGED_NEEDS_COMPRESS = 24,   /* score or merge of ragged images */
  APET_BASIS_NEEDS_QR = 25,          /* APET_BASIS_KEEP, and select not qr */
  APET_BASIS_NEEDS_KEEP = 26,        /* APET_BASIS_KEEP in score */
  APET_BASIS_NEEDS_INPLACE = 27,     /* APET_BASIS_KEEP or more than APET_MAX_BASIS, and layout not inplace */
  APET_BAD_REFINE = 28,              /* refine is outside 0..APET_MAX_REFINE */
  APET_REFINE_NEEDS_INPLACE = 29,    /* refine is not 0, and layout not inplace */
  APET_REFINE_NEEDS_BASIS_KEEP = 30, /* refine is not 0, and basis neither APET_BASIS_KEEP nor keep */
} apet_status;

/* The library's version, e.g. "0.2.0": a string literal. */
APET_API const char* apet_version(void);

/* Checks a problem: APET_OK, or the first error that makes it invalid for every backend. plan and run call it too.
 * problem NULL: APET_NULL_POINTER. */
APET_API apet_status apet_check(const apet_problem* problem);

/* Writes the message for a status, with the problem's offending value, into text: at most `capacity` bytes including
 * the terminating 0, truncated if it is longer; 256 always suffice. Returns the length of the full message without the
 * 0. text may be NULL if capacity is 0; problem may be NULL. */
APET_API size_t apet_error_message(const apet_problem* problem, apet_status status, char* text, size_t capacity);

/* ---- CPU -------------------------------------------------------------------------------------------------------- */

/* Instruction sets of the CPU kernel, each including the ones before it for its architecture. Results of two may differ
 * in their last bits. */
typedef enum apet_isa {
  APET_ISA_GENERIC = 0,     /* the compiler's target */
  APET_ISA_AVX2 = 1,        /* x86-64 with AVX2, FMA and F16C */
  APET_ISA_AVX512 = 2,      /* and AVX-512 F, BW, DQ and VL */
  APET_ISA_AVX512_BF16 = 3, /* and AVX512_BF16: products of bfloat16 tokens */
  APET_ISA_BEST = 4,        /* the last of the others that the build has and the processor runs */
  APET_ISA_NEON = 5,        /* AArch64: ARMv8-A with NEON, its baseline */
  APET_ISA_NEON_BF16 = 6,   /* and FEAT_BF16: products of bfloat16 tokens */
  APET_ISA_AMX = 7,         /* x86-64 with AVX512_BF16 and AMX-BF16: products of bfloat16 tokens, in tiles */
  APET_ISA_AMX_FP16 = 8,    /* and AMX-FP16: products of float16 tokens, too */
} apet_isa;

/* One share of a call's work, given to apet_pool.run. */
typedef void (*apet_task)(void* task_context, int64_t begin, int64_t end);

/* The caller's threads; libapet starts none. */
typedef struct apet_pool {
  int32_t threads; /* how many run() can put to work at once: below 1 counts as 1, above 256 as 256 */
  void* context;   /* passed to run() */
  /* Must call task(task_context, begin, end) over disjoint ranges that cover [0, tasks), from any threads, and return
   * when all of these calls have returned. They may run at once, in any order, or one after the other on one thread: no
   * range waits for one that has not started. apet_cpu_run calls it at most once, on its own thread, with
   * 2 <= tasks <= threads. It must not throw. */
  void (*run)(void* context, int64_t tasks, apet_task task, void* task_context);
} apet_pool;

/* How a call would run. */
typedef struct apet_cpu_plan_t {
  apet_isa isa;              /* in use when the plan was made */
  int32_t images_in_flight;  /* images that are worked on at once */
  int32_t threads_per_image; /* threads that share one image; the product of the two is at most `threads` */
  size_t workspace_bytes;    /* workspace that apet_cpu_run needs, 64-byte aligned; a multiple of 64 */
  double estimated_ns[2];    /* the estimates that were compared: the whole call on one thread, and as planned. Their
                                ratio is meaningful, their size is not */
} apet_cpu_plan_t;

/* Plans a call on at most `threads` threads (1 if it will have no pool), in about a microsecond. Depends on sizes only,
 * so a plan may be kept for later calls of the same problem on as many threads. */
APET_API apet_status apet_cpu_plan(const apet_problem* problem, int32_t threads, apet_cpu_plan_t* plan);

/* Runs a call, and returns when it is done. pool: as many threads as were planned for, or NULL for the calling thread
 * alone. workspace: at least the plan's workspace_bytes, 64-byte aligned, with any contents; may be NULL if the result
 * is empty. The result does not depend on the pool, the batch or the addresses: on one instruction set an image gives
 * the same bits in every call. */
APET_API apet_status apet_cpu_run(const apet_problem* problem, const apet_tensors* tensors, const apet_pool* pool,
                                  void* workspace, size_t workspace_bytes);

/* 1 if this build and this processor have an instruction set, else 0. */
APET_API int apet_cpu_has_isa(apet_isa isa);

/* "generic", "avx2", "avx512", "avx512_bf16", "best", "neon", "neon_bf16", "amx", "amx_fp16", or "unknown":
 * literals. */
APET_API const char* apet_isa_name(apet_isa isa);

/* ---- CUDA: a library of its own, for the calling thread's current device ---------------------------------------- */

/* How the kernels divide the stages of an image. A *group* of CTAs owns an image, whose tokens are divided into one
 * slice per CTA. A basis of more than 16 tokens in rounds and medoid steps are not fused; medoid steps are a launch more,
 * before s5. */
typedef enum apet_cuda_path {
  APET_CUDA_BEST = 0,    /* no plan has it: apet_testing.h */
  APET_CUDA_FUSED = 1,   /* one launch: the group is a cluster, and its slices stay in shared memory from s1 to s5 */
  APET_CUDA_CLUSTER = 2, /* two launches: s1-s4 in clusters, then s5 */
  APET_CUDA_COOPERATIVE = 3, /* two launches: s1-s4 in groups of a cooperative launch, then s5 */
} apet_cuda_path;

/* How a call would run. Pass it to apet_cuda_run unchanged. */
typedef struct apet_cuda_plan_t {
  apet_cuda_path path;
  int32_t launches;            /* score, and an empty call, have fewer than the path; medoid steps are one more */
  int32_t ctas_per_image;      /* CTAs that share an image */
  int32_t images_in_flight;    /* images that are worked on at once */
  int32_t slice;               /* rows of the longest image that a CTA owns */
  int32_t resident;            /* of these, rows that stay in shared memory; the others are read again from L2 */
  int32_t state_shared;        /* 1: y, norms and distances are in shared memory, 0: in the workspace */
  int32_t basis_shared;        /* 1: the basis token of a step is copied to shared memory, 0: its row is too long */
  int32_t tile;                /* s5 as its own launch: columns of a tile, else 0 */
  int32_t first_shared_bytes;  /* shared memory of a CTA of the first launch */
  int32_t second_shared_bytes; /* shared memory of a CTA of s5 as its own launch, else 0 */
  int32_t tile_rows;           /* s5 as its own launch: rows of a tile, else 0 */
  size_t workspace_bytes;      /* device memory that apet_cuda_run needs, 64-byte aligned; a multiple of 64 */
  double estimated_us;         /* computed, not measured: docs/cuda.md */
  char why[256];               /* message: why this path, and why no better one */
} apet_cuda_plan_t;

/* Plans a call on the current device. The first plan of a process, device and dtype queries shared memory, occupancy
 * and clusters, which loads the kernels: plan once before a stream is captured. Enqueues nothing. A plan may be kept
 * for later calls of the same problem on the same device. Always writes *plan.
 * APET_NO_CUDA_PATH: no path can run on this device; plan->why gives the reason.
 * APET_CUDA_FAILED: no device, no driver, or no kernel for it; apet_cuda_error() has the runtime's message. */
APET_API apet_status apet_cuda_plan(const apet_problem* problem, apet_cuda_plan_t* plan);

/* Enqueues a call on `stream` (a cudaStream_t; NULL: the default stream) of the current device, and returns. plan: from
 * apet_cuda_plan, for the same problem and device. Never synchronises; safe under stream capture: a graph replays it
 * with the same pointers. workspace: device memory of the plan's workspace_bytes, with any contents, used by nothing
 * else until the stream has finished this call; later calls on the same stream may use it again. An image gives the
 * same bits on every path and in every call on this device. APET_CUDA_FAILED: one launch may already be enqueued. */
APET_API apet_status apet_cuda_run(const apet_problem* problem, const apet_tensors* tensors,
                                   const apet_cuda_plan_t* plan, void* workspace, size_t workspace_bytes, void* stream);

/* The CUDA runtime's message for the last APET_CUDA_FAILED of the calling thread; a string literal. */
APET_API const char* apet_cuda_error(void);

#ifdef __cplusplus
}
#endif

#endif /* APET_H */
