// The argument of every kernel, passed by value: sizes, pointers, the division of the work, and the layout of memory.
// Quantities have the names of docs/algorithm.md ("Names").
#pragma once
#include <cfloat>
#include <cstdint>

#include "../apet.h"
#include "ptx.cuh"

namespace apet::cuda {

// 12 warps: one CTA per SM with up to 168 registers per thread (16 warps would spill), and enough rows in flight.
constexpr int kThreads = 384;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kUnit = 0x1p-24f;  // u: float32's unit roundoff

// Constants of a basis that is picked in rounds. They belong to the algorithm: other values give other tokens
// (docs/algorithm.md).
constexpr int kRounds = 4;
constexpr int kPool = 2;       // candidates for each pick of a round
constexpr int kFewPicks = 16;  // up to this many basis tokens are picked one at a time

// A value and a position in one integer: the maximum is the larger value, then the lower position. 0: none.
using Key = unsigned long long;

// One image of the call. The first launch writes the table of images, later ones read it.
struct Image {
  int64_t base;           // offset of its first token in x, in elements
  int64_t token;          // index of its first token in every per-token array
  int64_t first_token;    // added to positions in the image to give indices
  int64_t row;            // its first row of the result, and index in every per-row array
  int64_t row_end;        // first row of the next image
  int32_t tokens;         // N
  int32_t keep;           // K
  int32_t filled;         // rows that it fills: K and the appended ones
  int32_t basis;          // M
  int32_t dropped_count;  // tokens to merge, written by s4
  int32_t target_count;   // rows that they may be merged into, written by s4
};

// Offsets into the dynamic shared memory of a CTA of s1_s4_group, s1_s4_rounds and s1_s5_cluster, in bytes.
struct SharedMap {
  int32_t work;       // the image and the slice that the CTA works on (Work)
  int32_t message;    // [3 + M] words: a candidate (group.cuh)
  int32_t slots;      // [2][ctas_per_image][3 + M] words: the candidates of all CTAs; clusters only
  int32_t L;          // [M][M] float
  int32_t inv_diag;   // [M] Wide
  int32_t basis;      // [M] int
  int32_t warp_best;  // [kWarps] keys
  int32_t scan;       // [kScanWords] words, scratch of s4
  int32_t state;      // norm_sq, pick_value, dot [slice], y [M][slice] float, if state_shared
  int32_t p_row;      // the row of x of the newest basis token, if basis_shared
  int32_t s5;         // not in s1_s4_group: buffers of product.cuh, and the counts of s5_lists
  int32_t rounds;     // s1_s4_rounds only: the arrays of the rounds (Rounds)
  int32_t ranks;      // [rank_words] the ranks that s4 reads, in memory that s1 to s3 do not need any more
  int32_t rank_words;
  int32_t resident;  // [resident] rows of x, `pitch` bytes apart
  int32_t total;
};
constexpr int kScanWords = 2 * 256 + 2 * 3 + 1;

struct Call {
  apet_tensors tensors;
  // the problem
  apet_op op;
  apet_layout layout;
  apet_select select;
  int32_t images, tokens, dim, keep, ragged, appended;
  int32_t basis;         // M, or with rounds the most basis tokens that an image picks one at a time
  int32_t rounds_basis;  // M of an image is its keep, or this if less; 0: M is `basis`
  int32_t refine;
  int64_t start;
  int64_t stride_xb, stride_xn, total_tokens, total_keep;
  double ridge;
  float blend;
  int32_t whole_in, whole_out;  // rows of x, and of the result, are whole 16-byte words at multiples of 16 bytes
  // the plan
  int32_t ctas_per_image, images_in_flight, resident, state_shared, basis_shared;
  int32_t pitch;  // bytes between rows in shared memory
  SharedMap map;
  int32_t tiles, tile_columns;  // s5_merge: tiles of an image at most, and how many of them lie side by side
  int32_t list_tickets;         // s5_merge: tickets of an image that group its dropped tokens
  int32_t mean_tickets;         // s5_merge: tickets of an image that compute rows of the result
  int32_t mean_tasks;           // s5_merge: tasks of s5_mean in such a ticket
  int32_t most;                 // s1_s4_rounds: the most picks of a round; 0: no image has rounds
  // the workspace
  Image* table;  // [images]
  // [images][ctas_per_image + 1] where each slice's tokens start in `dropped`; s1_s5_cluster only
  int32_t* slice_begin;
  float* norm_sq;      // [all tokens]
  float* state;        // [all tokens][3 + M], unless state_shared
  uint32_t* rank;      // [all tokens]
  int32_t* dropped;    // [all tokens]
  Key* target_key;     // [all tokens] for every dropped token: largest similarity, and the target that has it
  int32_t* row_token;  // [all rows]
  int32_t* row_role;   // [all rows] row_target if the row is one; kBlended - row_blend if it is blended; else kCopied
  int32_t* target_token;   // [all rows]
  float* target_norm_sq;   // [all rows]
  int32_t* target_begin;   // [all rows + images] where each target's tokens begin in `merged`: T + 1 of each image, and
                           // in s1_s5_cluster and medoid steps T + ctas_per_image
  int32_t* merged;         // [all tokens] numbers of dropped tokens, grouped by target
  Key* ticket;             // [1] the next ticket of s5_merge
  uint32_t* tickets_done;  // [images] tickets of s5_merge before those of the rows that are finished
  uint32_t* slots;         // [images_in_flight][2][ctas_per_image][3 + M], cooperative launches only
  uint32_t* arrived;       // [images_in_flight] arrivals at the group's barriers, cooperative launches only
  // of s1_s4_rounds. groups: of the launch. Empty if no image has rounds:
  float* y;           // [all tokens][y_width(most)] rows of y, by round
  int32_t* pool;      // [groups][kPool most] candidates, ascending
  Key* gram;          // [groups][kPool most][kPool most] Wide: residual Gram matrix of the pool
  float* pool_y;      // [groups][most][kPool most]
  Key* diag;          // [groups][kPool most] Wide: the diagonal of gram, after the picks so far
  float* L;           // [groups][most][most] columns of this round's L, below the diagonal
  Key* inv_diag;      // [groups][most] Wide
  int32_t* picks;     // [groups][kRounds most] basis tokens, in the order they are picked
  int32_t* progress;  // [groups][2] tokens of the pool, and picks among it
  // Empty without medoid steps:
  float* cluster_mean;  // [groups][min(ctas_per_image, K)][D] the mean that a CTA works with
  int32_t* medoid;      // [all rows] the medoid of each target's cluster
};
constexpr int32_t kCopied = -1, kBlended = -2;

__host__ __device__ constexpr int message_words(int basis) { return 3 + basis; }
// Returns the most picks of a round of an image with M basis tokens.
__host__ __device__ constexpr int most_picks(int basis) { return basis / kRounds + (basis % kRounds > 0); }
__host__ __device__ constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
// The picks of a round have so many columns in a row of y: whole 16-byte words, filled up by zeros.
__host__ __device__ constexpr int round_columns(int most) { return (int)round_up(most, 4); }
__host__ __device__ constexpr int64_t y_width(int most) { return (int64_t)kRounds * round_columns(most); }
// Bytes of a row in shared memory: zeros pad it to whole 32-byte steps of s5, and an odd number of 16-byte words places
// the rows of a matrix instruction in different banks.
__host__ __device__ constexpr int64_t row_pitch(int64_t row_bytes) { return round_up(row_bytes, 32) + 16; }

__device__ __forceinline__ Key pack(uint32_t value, int position) {
  return (Key)value << 32 | (0xffffffffu - (uint32_t)position);
}
__device__ __forceinline__ int unpack(Key key) { return (int)(0xffffffffu - (uint32_t)key); }
// value >= 0: the bits of such floats sort as integers.
__device__ __forceinline__ Key pack(float value, int position) { return pack(__float_as_uint(value), position); }

__device__ __forceinline__ Key larger(Key a, Key b) { return a > b ? a : b; }

// Returns the value of a token, given by its index in per-token arrays, times its weight, at most FLT_MAX; an infinite
// value, such as a distance beyond float32, counts as FLT_MAX. A negative weight and NaN count as 0, inf as FLT_MAX.
__device__ __forceinline__ float weighted(const Call& call, int64_t token, float value) {
  if (!call.tensors.weights) return value;
  const float weight = call.tensors.weights[token];
  return fminf(__fmul_rn(fminf(value, FLT_MAX), weight > 0 ? fminf(weight, FLT_MAX) : 0), FLT_MAX);
}

__device__ __forceinline__ Key warp_largest(Key key) {
  for (int step = 16; step; step >>= 1) key = larger(key, __shfl_xor_sync(kAllLanes, key, step));
  return key;
}

// Returns the running maxima of cu[0..s] and cu[0..s + 1], clamped into [0, limit]: images never overlap, whatever cu
// holds. All lanes of a warp must call it, and get the same result.
__device__ inline void running_extent(const int32_t* cu, int s, int64_t limit, int64_t& begin, int64_t& end) {
  int32_t lower = 0, upper = 0;
  for (int64_t j = threadIdx.x % 32; j <= (int64_t)s + 1; j += 32) {
    const int32_t entry = cu[j];
    upper = max(upper, entry);
    if (j <= s) lower = max(lower, entry);
  }
  for (int step = 16; step; step >>= 1) {
    lower = max(lower, __shfl_xor_sync(kAllLanes, lower, step));
    upper = max(upper, __shfl_xor_sync(kAllLanes, upper, step));
  }
  begin = min((int64_t)lower, limit);
  end = min((int64_t)upper, limit);
}

// Returns image s of the call, without the counts that s4 writes.
__device__ inline Image find_image(const Call& call, int s) {
  Image image = {};
  if (call.ragged) {
    int64_t begin, end, row, row_end;
    running_extent(call.tensors.cu_seqlens, s, call.total_tokens, begin, end);
    running_extent(call.tensors.cu_keep, s, call.total_keep, row, row_end);
    image.base = begin * call.stride_xn;
    image.token = image.first_token = begin;
    image.tokens = (int32_t)min(end - begin, (int64_t)call.tokens);
    image.keep = (int32_t)min(min(row_end - row, (int64_t)call.keep), (int64_t)image.tokens);
    image.row = row + (int64_t)s * call.appended;
    image.row_end = (s + 1 == call.images ? call.total_keep : row_end) + (int64_t)(s + 1) * call.appended;
  } else {
    image.base = s * call.stride_xb;
    image.token = (int64_t)s * call.tokens;
    image.tokens = call.tokens;
    image.keep = call.keep;
    image.row = (int64_t)s * (call.keep + call.appended);
    image.row_end = image.row + call.keep + call.appended;
  }
  image.filled = image.tokens > 0 ? image.keep + call.appended : 0;
  image.basis = call.rounds_basis > 0 ? min(call.rounds_basis, image.keep) : call.basis;
  return image;
}

}  // namespace apet::cuda
