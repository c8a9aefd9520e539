/* apet_testing.h: replaces choices of the library that apet.h describes, for tests and measurements.
 *
 * No program needs it for its results. It is no part of the stable interface: any version may change it. */
#ifndef APET_TESTING_H
#define APET_TESTING_H

#include "apet.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Makes every later call of the process use one instruction set; APET_ISA_BEST restores the default. No other thread
 * may be between apet_cpu_plan and the end of apet_cpu_run, because workspace sizes differ. Returns APET_NO_ISA if the
 * instruction set is missing. */
APET_API apet_status apet_cpu_use_isa(apet_isa isa);

/* Replaces parts of the choice of apet_cuda_plan: every path gives the same bits. */
typedef struct apet_cuda_override {
  apet_cuda_path path;    /* APET_CUDA_BEST: the one with the lowest estimate */
  int32_t ctas_per_image; /* 0: the library chooses */
  int32_t resident;       /* rows of a slice that stay in shared memory, at most; -1: as many as fit */
  int32_t tile;           /* s5 as its own launch: 64, 128 or 256 columns of a tile; 0: the library chooses */
  int32_t tile_rows;      /* the rows of it, 64 or 128 if it has 64 columns; 0: the library chooses */
} apet_cuda_override;

/* apet_cuda_plan with these parts replaced. APET_NO_CUDA_PATH: what is asked for cannot run on this device. */
APET_API apet_status apet_cuda_plan_with(const apet_problem* problem, const apet_cuda_override* override,
                                         apet_cuda_plan_t* plan);

/* What a plan's estimated_us is the sum of (docs/cuda.md), in microseconds; parts that run at once are one term. */
typedef struct apet_cuda_terms {
  double launches_us;
  double barriers_us;  /* of the group, beside the exchanges */
  double memory_us;    /* X from memory, once, and its first bytes */
  double sweeps_us;    /* norms, and X.p of every step, or reading again the rows that are not in shared memory */
  double exchanges_us; /* of the candidates, one a step */
  double algebra_us;   /* terms of y */
  double topk_us;      /* s4 */
  double rounds_us;    /* basis in rounds, and medoid steps */
  double products_us;  /* tiles of s5, or reading their rows */
  double lists_us;     /* dropped tokens grouped by target */
  double means_us;     /* rows of the result */
} apet_cuda_terms;

/* Writes the terms of a plan that apet_cuda_plan_with has made for this problem and device. */
APET_API apet_status apet_cuda_terms_of(const apet_problem* problem, const apet_cuda_plan_t* plan,
                                        apet_cuda_terms* terms);

#ifdef __cplusplus
}
#endif

#endif /* APET_TESTING_H */
