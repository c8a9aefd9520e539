/* apet.h: the whole C interface of apet-kernels, free of torch and of C++.
 *
 * ApET (arXiv 2602.19870) keeps, of the N visual tokens of an image, the K that a small basis of M other tokens
 * rebuilds worst, and averages each dropped token into the kept token it resembles most:
 *
 *   x [N, D] -> s1 basis -> s2 solve -> s3 residual -> s4 top-k -> s5 merge -> tokens [K, D], indices [K]
 *
 * A caller describes the call in an apet_problem (sizes, strides, options: no pointers), asks apet_cpu_plan or
 * apet_cuda_plan for the workspace it needs, and hands pointers and workspace to apet_cpu_run or apet_cuda_run.
 *
 * For every function here:
 *   memory    Nothing allocates, and nothing keeps a pointer: what is passed in may go when the call returns, but for
 *             the device memory of apet_cuda_run, which the stream still uses.
 *   errors    Nothing throws, prints, aborts or reads errno: a status comes back, and apet_sentence puts it in words.
 *             On a status other than APET_OK nothing has been written, unless the function says so.
 *   threads   Any function may be called from several threads at once, apet_cpu_use_isa excepted (see there). Calls
 *             that run at once need outputs and workspaces of their own; inputs they may share.
 *   units     Strides count elements, sizes of memory bytes. Positions of tokens count from 0.
 *   overlap   Outputs and workspace must not overlap each other or an input.
 *
 * libapet (CMake: apet::cpu) holds everything but the last section, which is libapet_cuda's (apet::cuda). */
#ifndef APET_H
#define APET_H

#include <stddef.h>
#include <stdint.h>

/* The version of this header. MAJOR, or while that is 0 MINOR, goes up whenever a program compiled with an older header
 * would break, and is part of the shared library's name (libapet.so.0.1): see docs/vendoring.md. */
#define APET_VERSION_MAJOR 0
#define APET_VERSION_MINOR 1
#define APET_VERSION_PATCH 0

/* Before what a shared library exports. With APET_STATIC, which a static library's users and sources define alike, and
 * -fvisibility=hidden, nothing of it is exported by what it is linked into. */
#if defined(__GNUC__) && !defined(APET_STATIC)
#define APET_API __attribute__((visibility("default")))
#else
#define APET_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- What a call computes --------------------------------------------------------------------------------------- */

/* Largest basis (M) of any backend. */
#define APET_MAX_BASIS 64

/* Of x and of the tokens returned. Sums are float32 or wider, whatever it is. */
typedef enum apet_dtype {
  APET_FLOAT32 = 0,  /* IEEE binary32, 4 bytes */
  APET_FLOAT16 = 1,  /* IEEE binary16, 2 bytes */
  APET_BFLOAT16 = 2, /* the upper 2 bytes of a binary32 */
} apet_dtype;

typedef enum apet_op {
  APET_COMPRESS = 0, /* all five stages */
  APET_SCORE = 1,    /* s1 to s3: residuals and basis, for budgets chosen by the caller */
  APET_MERGE = 2,    /* s5: everything else is averaged into rows that the caller has chosen */
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

/* What a call computes. Zero-initialise it, then set what applies. Of members that do not name an op, that op asks only
 * that enumerations hold one of their values. Who compresses has to set blend: 0 is not its neutral value. */
typedef struct apet_problem {
  apet_op op;
  apet_dtype dtype;
  apet_layout layout; /* compress */
  apet_select select; /* compress, score */
  int32_t basis;      /* compress, score: M, 1..APET_MAX_BASIS; 10 is the paper's */
  int32_t ragged;     /* 0: x is [images, tokens, dim]. 1: x is [total_tokens, dim], images of different lengths one
                         after another, cut up by cu_seqlens; compress alone */
  int64_t images;     /* B, or the number of ragged images; 0..2^31-1; 0: nothing is done */
  int64_t tokens;     /* N, 1..2^31-1. Ragged: the longest image, 0..2^31-1; of a longer one the rest is ignored */
  int64_t dim;        /* D, 1..2^31-1 */
  int64_t keep;       /* compress: K, 1..tokens. Ragged: the largest K of an image, at least 0; none keeps more.
                         merge: rows of `kept` for each image, 1..tokens */
  int64_t stride_xb;  /* of x, from image to image; ragged: ignored */
  int64_t stride_xn;  /* of x, from token to token */
  int64_t stride_xd;  /* of x, from feature to feature: 1, or anything where dim is 1 */
  int64_t start;      /* compress, score: position of the first basis token; -1: the one of largest norm. Ragged: in
                         each image, or its last token if it is shorter; at most total_tokens - 1 */
  double ridge;       /* compress, score: added to the diagonal of s2, so absolute; finite, >= 0; 1e-5 is the paper's */
  double blend;       /* compress: 1. overwrite: 0..1, a slot becomes blend * basis + (1 - blend) * token */
  int64_t total_tokens; /* ragged: T, rows of x, 0..2^31-1; else 0 */
  int64_t total_keep;   /* ragged: the K of all images together, 0..total_tokens */
} apet_problem;

/* Where the data lies: host memory for apet_cpu_run, device memory for apet_cuda_run. Addresses are multiples of the
 * element's size; nothing more is needed, and results do not depend on it. Outputs are contiguous. What an op does not
 * name is ignored; what it names may be NULL only where it has no elements.
 *
 *   compress  reads x, and if ragged cu_seqlens and cu_keep; writes tokens and indices
 *   score     reads x; writes residual and basis_indices
 *   merge     reads x, kept and kept_targets; writes tokens
 *
 * R, the rows of an image's result, is keep (append: keep + basis). Ragged, rows lie one image after another:
 * total_keep of them (append: + images * basis), and those that no image fills are zeros with index 0. */
typedef struct apet_tensors {
  const void* x;               /* [images, tokens, dim], or ragged [total_tokens, dim], of dtype */
  const int32_t* cu_seqlens;   /* [images + 1] first token of each image, and the end; 0 <= ... <= total_tokens,
                                  ascending. Whatever it holds, nothing outside x is read */
  const int32_t* cu_keep;      /* [images + 1] the same for the K of the images, up to total_keep. Whatever it holds,
                                  nothing outside the outputs is written */
  const int64_t* kept;         /* [images, keep] positions of the rows, in any order, repeated or not; clamped into
                                  0..tokens-1 */
  const uint8_t* kept_targets; /* [images, keep] not 0: tokens may be merged into this row. NULL: into all */
  void* tokens;                /* [images, R, dim], or ragged [rows, dim], of dtype */
  int64_t* indices;       /* [images, R], or ragged [rows]: the row's position in its image, or ragged in the packed
                             x; ascending within an image but for appended rows. An overwritten row's is its own,
                             not the basis token's */
  float* residual;        /* [images, tokens] e^2, the squared distance to what the basis rebuilds */
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
  APET_BAD_BASIS = 10,               /* basis is outside 1..APET_MAX_BASIS */
  APET_BAD_START = 11,               /* start is neither -1 nor a position */
  APET_BAD_RIDGE = 12,               /* ridge is negative or not finite */
  APET_BAD_BLEND = 13,               /* blend is outside 0..1 */
  APET_BLEND_WITHOUT_OVERWRITE = 14, /* blend is not 1, and layout not overwrite */
  APET_OVERWRITE_NEEDS_MORE = 15,    /* overwrite with keep <= basis, and not all tokens kept */
  APET_BAD_TOTAL_KEEP = 16,          /* total_keep is outside 0..total_tokens */
  APET_BAD_MAX = 17,                 /* ragged: tokens or keep is negative */
  APET_TOO_LARGE = 18,               /* a size is past 2^31-1 */
  APET_NULL_POINTER = 19,            /* something that the call needs is NULL */
  APET_SMALL_WORKSPACE = 20,         /* the workspace is NULL, too small, or not 64-byte aligned */
  APET_NO_ISA = 21,                  /* this build or this processor lacks the instruction set */
  APET_CUDA_FAILED = 22,             /* the CUDA runtime refused; apet_cuda_error() has its words */
  APET_NO_CUDA_PATH = 23,            /* no path can run this on the device; the plan's `why` says why */
  APET_RAGGED_NEEDS_COMPRESS = 24,   /* score or merge of ragged images */
} apet_status;

/* The library's version, e.g. "0.1.0": a literal that lives as long as the library. */
APET_API const char* apet_version(void);

/* Refuses what no backend could run: APET_OK, or what is wrong. plan and run ask it too. problem NULL:
 * APET_NULL_POINTER. */
APET_API apet_status apet_check(const apet_problem* problem);

/* Writes the sentence for a status, with the problem's offending value, into text: at most `capacity` bytes with the
 * final 0, cut off where they do not suffice; 256 always do. Returns the length that the sentence has in full, without
 * the 0. text may be NULL if capacity is 0, and problem if none is at hand. */
APET_API size_t apet_sentence(const apet_problem* problem, apet_status status, char* text, size_t capacity);

/* ---- CPU -------------------------------------------------------------------------------------------------------- */

/* Instruction sets of the CPU kernel, each including the ones before it. Results of two differ in their last bits. */
typedef enum apet_isa {
  APET_ISA_GENERIC = 0,     /* whatever the compiler was told to compile for */
  APET_ISA_AVX2 = 1,        /* x86-64 with AVX2, FMA and F16C */
  APET_ISA_AVX512 = 2,      /* and AVX-512 F, BW, DQ and VL */
  APET_ISA_AVX512_BF16 = 3, /* and AVX512_BF16: products of bfloat16 tokens */
  APET_ISA_BEST = 4,        /* the last of these that the build has and the processor runs */
} apet_isa;

/* One share of a call's work, given to apet_pool.run. */
typedef void (*apet_task)(void* task_context, int64_t begin, int64_t end);

/* The caller's threads; libapet has none. */
typedef struct apet_pool {
  int32_t threads; /* how many run() can put to work at once: below 1 counts as 1, above 256 as 256 */
  void* context;   /* handed to run() as it is */
  /* Must call task(task_context, begin, end) over disjoint ranges that cover [0, tasks), from any threads, and return
   * when all of these calls have. They may happen at once, in any order, or one after the other on one thread: nothing
   * waits for a range that has not started. A call uses it once at most, on the thread that makes the call, with
   * 2 <= tasks <= threads. It must not throw. */
  void (*run)(void* context, int64_t tasks, apet_task task, void* task_context);
} apet_pool;

/* How a call would run. */
typedef struct apet_plan {
  apet_isa isa;           /* in use when the plan was made */
  int32_t teams;          /* images in flight at once */
  int32_t threads;        /* threads that share one image; teams * threads is at most what was asked for */
  size_t workspace_bytes; /* 64-byte aligned workspace that apet_cpu_run wants; a multiple of 64 */
  double estimated_ns[2]; /* the estimate behind teams and threads: whole call on one thread, and as planned. Good for
                             comparing, not for predicting */
} apet_plan;

/* Plans a call on at most `threads` threads, 1 if it will have no pool. A microsecond or so; looks at sizes alone, so a
 * plan may be kept for later calls of the same problem on as many threads. */
APET_API apet_status apet_cpu_plan(const apet_problem* problem, int32_t threads, apet_plan* plan);

/* Runs it, and returns when it is done. pool: as many threads as were planned for, or NULL for the calling thread
 * alone. workspace: 64-byte aligned, of at least the plan's workspace_bytes, whatever it holds; NULL where nothing is
 * to be done. The result does not depend on the pool, the batch, or where the data lies: an image gives the same bits
 * in any call on an instruction set. */
APET_API apet_status apet_cpu_run(const apet_problem* problem, const apet_tensors* tensors, const apet_pool* pool,
                                  void* workspace, size_t workspace_bytes);

/* 1 if this build and this processor have an instruction set, else 0. */
APET_API int apet_cpu_has_isa(apet_isa isa);

/* "generic", "avx2", "avx512", "avx512_bf16", "best", or "unknown": literals. */
APET_API const char* apet_isa_name(apet_isa isa);

/* Pins every later call of the process to one instruction set; APET_ISA_BEST, as at the start: unpins. For tests and
 * benchmarks, while no other thread is between apet_cpu_plan and the end of apet_cpu_run: plans differ. APET_NO_ISA
 * where it is missing. */
APET_API apet_status apet_cpu_use_isa(apet_isa isa);

/* ---- CUDA: a library of its own, for the calling thread's current device ---------------------------------------- */

/* How an image is taken through the stages. A *group* of CTAs owns an image; its rows are cut into one slice a CTA. */
typedef enum apet_cuda_path {
  APET_CUDA_BEST = 0,    /* in a wish: the path of the lowest estimate here */
  APET_CUDA_FUSED = 1,   /* one launch: the group is a cluster, and its slices stay in shared memory from s1 to s5 */
  APET_CUDA_CLUSTER = 2, /* two launches: s1-s4 in clusters, then s5 */
  APET_CUDA_GROUPS = 3,  /* two launches: s1-s4 in groups of a cooperative launch, then s5 */
} apet_cuda_path;

/* What a caller would have instead of the rule's choice, for tests and measurements: every path gives the same bits. */
typedef struct apet_cuda_wish {
  apet_cuda_path path;
  int32_t group;    /* CTAs of a group; 0: chosen */
  int32_t resident; /* rows of a slice that stay in shared memory, at most; -1: as many as fit */
  int32_t tile;     /* s5 as its own launch: 64 or 128 rows of a tile; 0: chosen */
} apet_cuda_wish;

/* How a call would run. To be read, and handed to apet_cuda_run as it is. */
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
  size_t workspace_bytes; /* 64-byte aligned device memory that apet_cuda_run wants; a multiple of 64 */
  double estimated_us;    /* computed, not measured: docs/cuda.md */
  char why[256];          /* a sentence: why this path, and what ruled out a better one */
} apet_gpu_plan;

/* Plans a call on the current device, which it asks for its shared memory, occupancy and clusters (once a process,
 * device and dtype; that first time loads the kernels, so plan once before a stream is captured). Enqueues nothing. A
 * plan may be kept for later calls of the same problem on the same device. wish may be NULL. Always writes *plan.
 * APET_NO_CUDA_PATH: nothing here can run it, or not what the wish says; plan->why says why. APET_CUDA_FAILED: no
 * device, no driver, or no kernel for it; apet_cuda_error() has the runtime's words. */
APET_API apet_status apet_cuda_plan(const apet_problem* problem, const apet_cuda_wish* wish, apet_gpu_plan* plan);

/* Enqueues it on `stream` (a cudaStream_t; NULL: the default stream) of the current device, and returns. plan: what
 * apet_cuda_plan made of the same problem on this device. Never synchronises, safe under stream capture: a graph
 * replays it with the same pointers. workspace: device memory as the plan says, whatever it holds, untouched by
 * anything but this call until the stream is past it; later calls on the same stream may use it again. An image gives
 * the same bits on every path and in any call of this device. APET_CUDA_FAILED: one launch may already be enqueued. */
APET_API apet_status apet_cuda_run(const apet_problem* problem, const apet_tensors* tensors, const apet_gpu_plan* plan,
                                   void* workspace, size_t workspace_bytes, void* stream);

/* The CUDA runtime's words for the last APET_CUDA_FAILED of the calling thread; a literal. */
APET_API const char* apet_cuda_error(void);

#ifdef __cplusplus
}
#endif

#endif /* APET_H */
