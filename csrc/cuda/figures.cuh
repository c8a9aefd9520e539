// The figures of the estimate in plan.cu, for each kind of device: microseconds, and bytes and operations of one SM per
// microsecond. docs/cuda.md explains the formulas. `python -m benchmarks.gpu_figures FOLDER` writes the rows that are
// measured, between the markers.
#pragma once

namespace apet::cuda {

struct Figures {
  int capability;               // 10 * major + minor; the first row is also for devices that have none
  double launch_us;             // a launch of a graph
  double overlapped_launch_us;  // one that begins while the one before ends
  double cluster_step_us;       // barrier and exchange of a step
  double cooperative_step_us;   // the same in a cooperative launch
  double lists_us;              // s4
  double group_us;              // s5_lists, per dropped token
  double fill_us;               // until the first bytes arrive from memory
  double term_us;               // per term of y: a float64 fma that waits for the one before
  double elements_per_sm;       // widened and multiplied
  double l2_per_sm;             // bytes from L2, one SM alone
  double l2_share;              // the same, if all SMs read at once
  double l2_bytes;              // its size
  double memory_share;          // bytes from memory, if all SMs read at once
  double flops_per_sm_16;       // s5 of 16-bit tokens
  double flops_per_sm_32;       // s5 of float32 tokens
};

// clang-format off
constexpr Figures kFigures[] = {
    // figures:begin
    // NVIDIA H100, computed, not measured: terms of 16 cycles; 32 dropped tokens in 50
    // cycles; 128 lanes, 2 instructions, 70 % of the issue slots; matrix
    // units at 45 %, float32 fma at 60 %
    {90, 2.5, 1.5, 1.2, 2.0, 2.0, 0.001, 1.0, 0.01, 76e3, 87e3, 40e3, 50e6, 25e3, 3.4e6, 0.26e6},
    // figures:end
};
// clang-format on

inline const Figures& figures_for(int capability) {
  for (const Figures& figures : kFigures)
    if (figures.capability == capability) return figures;
  return kFigures[0];
}

}  // namespace apet::cuda
