// The figures of the estimate in plan.cu, for each kind of device: microseconds, and bytes and operations of one SM per
// microsecond. docs/cuda.md explains the formulas. `python -m benchmarks.gpu_figures FOLDER` writes the rows that are
// measured, between the markers.
#pragma once

namespace apet::cuda {

struct Figures {
  int capability;                 // 10 * major + minor
  double launch_us;               // a launch of a graph
  double overlapped_launch_us;    // one that begins while the one before ends
  double cluster_step_us;         // barrier and exchange of a step
  double cooperative_step_us;     // the same in a cooperative launch of one group on all SMs
  double lists_us;                // s4
  double s4_token_us;             // s4, more per token of an image
  double group_us;                // s5_lists, per dropped token
  double fill_us;                 // until the first bytes arrive from memory
  double term_us;                 // per term of y: an fma in Wide that waits for the one before
  double elements_per_sm;         // widened and multiplied
  double l2_per_sm;               // bytes from L2, one SM alone
  double l2_share;                // the same, if all SMs read at once
  double l2_bytes;                // its size
  double memory_share;            // bytes from memory, if all SMs read at once
  double flops_per_sm_16;         // s5 of 16-bit tokens, by mma.sync
  double flops_per_sm_32;         // s5 of float32 tokens
  double triton_flops_per_sm_16;  // s5 of 16-bit tokens in Triton, by wgmma or tcgen05 where there are
  double pick_us;                 // s1_s4_rounds, per pick: two barriers of the CTA, a maximum and a root; assumed
};

// clang-format off
constexpr Figures kFigures[] = {
    // figures:begin
    // NVIDIA H100, computed, not measured: terms of 16 cycles; 32 dropped tokens in 50
    // cycles; 128 lanes, 2 instructions, 70 % of the issue slots; matrix
    // units at 45 % by mma.sync and 65 % by wgmma, float32 fma at 60 %
    {90, 2.5, 1.5, 1.2, 2.9, 2.0, 0.00078, 0.001, 1.0, 0.01, 76e3, 87e3, 40e3, 50e6, 25e3, 3.4e6, 0.26e6, 4.9e6, 0.7},
    // NVIDIA A100, computed, not measured: as the H100's, by its clock, lanes, L2 and
    // memory; mma.sync at 70 %
    {80, 2.5, 2.5, 1.2, 2.9, 2.0, 0.00078, 0.0013, 1.0, 0.011, 32e3, 72e3, 33e3, 40e6, 18.6e3, 2.0e6, 0.11e6, 2.0e6, 0.7},
    // NVIDIA RTX 3090, computed, not measured: likewise; terms in two floats, 40 cycles
    {86, 2.5, 2.5, 1.2, 2.9, 2.0, 0.00078, 0.001, 1.0, 0.024, 76e3, 87e3, 40e3, 6e6, 11.2e3, 0.61e6, 0.26e6, 0.61e6, 0.7},
    // NVIDIA RTX 4090, computed, not measured: likewise
    {89, 2.5, 2.5, 1.2, 2.9, 2.0, 0.00078, 0.001, 1.0, 0.016, 113e3, 129e3, 59e3, 72e6, 7.8e3, 0.9e6, 0.39e6, 0.9e6, 0.7},
    // NVIDIA B200, computed, not measured: as the H100's; tcgen05 at 65 %, mma.sync as fast
    // as the H100's in a cycle
    {100, 2.5, 1.5, 1.2, 2.9, 2.0, 0.00078, 0.001, 1.0, 0.009, 83e3, 95e3, 44e3, 126e6, 51e3, 3.6e6, 0.28e6, 9.9e6, 0.7},
    // NVIDIA B300, computed, not measured: as the B200's; terms in two floats, 40 cycles,
    // as in code for sm_103a
    {103, 2.5, 1.5, 1.2, 2.9, 2.0, 0.00078, 0.001, 1.0, 0.022, 83e3, 95e3, 44e3, 126e6, 51e3, 3.6e6, 0.28e6, 9.9e6, 0.7},
    // NVIDIA RTX 5090, computed, not measured: as the RTX 4090's
    {120, 2.5, 1.5, 1.2, 2.9, 2.0, 0.00078, 0.001, 1.0, 0.017, 108e3, 123e3, 57e3, 96e6, 10.4e3, 0.86e6, 0.37e6, 0.86e6, 0.7},
    // figures:end
};
// clang-format on

// Returns the row of the capability; else of the nearest lower one of its generation, e.g. 120 for 121; else the first.
inline const Figures& figures_for(int capability) {
  const Figures* found = nullptr;
  for (const Figures& figures : kFigures)
    if (figures.capability / 10 == capability / 10 && figures.capability <= capability &&
        (!found || figures.capability > found->capability))
      found = &figures;
  return found ? *found : kFigures[0];
}

}  // namespace apet::cuda
