// s1 to s4 of every image whose basis is picked in rounds: a group of CTAs per image, as in s1_s4_group. Barriers of the
// group separate the stages:
//
//   norms | pool | gram | picks | y, resid_sq, rank | pool | ... | s4      CTAs
//   all     one    all    one     all                 one          one
//           \_ for each of the four rounds ________/
//
// An image of few basis tokens picks them one at a time. s5_merge follows, as after s1_s4_group.
#pragma once
#include "s1_rounds.cuh"
#include "s1_s4_group.cuh"

namespace apet::cuda {

template <class T, class Group>
__global__ void __launch_bounds__(kThreads, 1) s1_s4_rounds(const Call call) {
  if constexpr (kHasClusters || std::is_same_v<Group, CooperativeGroup>) {
    Group group(call);
    for (uint32_t s = group.first; s < (uint32_t)call.images; s += group.stride) {
      const auto& [image, slice] = open_image<T>(call, (int)s, group.cta, group.size);
      if (s + group.stride >= (uint32_t)call.images) allow_next_launch();
      clear_s5(call, image, (int)s, group.cta, group.size);
      if (call.ragged) zero_unfilled_rows<T>(call, image, (int)s, group.cta, group.size);
      // If all tokens stay there are no picks, and s1_s3_sweep makes none.
      if (image.basis > kFewPicks && image.keep < image.tokens) s1_rounds(call, image, slice, group);
      else s1_s3_sweep<T, false>(call, image, slice, group, (int)s);
      group.sync();  // rank and norm_sq of the whole image are written
      if (group.cta == 0) s4_topk(call, image, (int)s, 0, 0);
      __syncthreads();  // s4 has finished with the shared memory that the next image uses
    }
  }
}

}  // namespace apet::cuda
