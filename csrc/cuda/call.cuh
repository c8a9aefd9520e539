// What a launch gets, by value: sizes, pointers, how the work is cut, and where everything lies.
#pragma once
#include <cfloat>
#include <cstdint>

#include "../apet.h"
#include "ptx.cuh"

namespace apet::cuda {

// 12 warps: one CTA an SM with up to 168 registers a thread (16 warps would spill), and rows enough in flight.
constexpr int kThreads = 384;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kUnit = 0x1p-24f;  // u: float32's unit roundoff

// Packed for an integer arg-max: a larger value first, then the lower position. 0 is nothing.
using Key = unsigned long long;

// One image of the call. The first launch writes the table, later ones read it.
struct Image {
  int64_t base;     // of its first token in x, in elements
  int64_t token;    // its number among all tokens: where its part of every per-token array starts
  int64_t first;    // added to positions in the image to make the indices returned
  int64_t row;      // its first row of the result, and of every per-row array
  int64_t row_end;  // the first row that the next image owns
  int32_t count;    // n, its tokens
  int32_t keep;     // K
  int32_t filled;   // rows that it fills: K, and the appended basis
  int32_t dropped;  // tokens that are merged, and
  int32_t targets;  // rows they may be merged into: found by s4
};

// Offsets into the shared memory of a CTA of `select` and `fused`, in bytes.
struct SharedMap {
  int32_t work;       // the image and the slice in hand (Work)
  int32_t message;    // [3 + M] words: a candidate (group.cuh)
  int32_t slots;      // [2][group][3 + M] words: everybody's; clusters only
  int32_t factor;     // L [M][M] float
  int32_t inverse;    // 1 / L_jj [M] double
  int32_t basis;      // [M] int: positions in the order they were picked
  int32_t warp_best;  // [kWarps] keys
  int32_t scan;       // [kScanWords] words of s4
  int32_t state;      // norm, measure, dot [slice], y [M][slice] floats, if state_shared
  int32_t candidate;  // one row of x
  int32_t merge;      // fused only: s5_assign's buffers, and s5_mean's queues
  int32_t rows;       // [resident] rows of x, `pitch` bytes each
  int32_t total;
};
constexpr int kScanWords = 320;

struct Call {
  apet_tensors at;
  // the problem
  apet_op op;
  apet_layout layout;
  apet_select select;
  int32_t images, tokens, dim, keep, basis, ragged, appended;
  int64_t start;
  int64_t stride_xb, stride_xn, total_tokens, total_keep;
  double ridge;
  float blend;
  int32_t whole_in, whole_out;  // rows of x, and of the result, are whole 16-byte words at multiples of 16 bytes
  // how it is cut
  int32_t group, groups, resident, state_shared, basis_shared;
  int32_t pitch;  // bytes from row to row in shared memory
  SharedMap map;
  int32_t tiles, tile_columns;  // s5 as its own launch: tiles an image at most, of which side by side
  int32_t mean_tickets;         // and tickets of means an image
  // workspace
  Image* table;         // [images]
  int32_t* bounds;      // [images][group + 1]: the first dropped token of every slice; fused only
  float* norm2;         // [all tokens] ||x||^2
  float* state;         // [all tokens][3 + M], unless state_shared
  uint32_t* rank;       // [all tokens] what s4 ranks by
  int32_t* dropped;     // [all tokens] positions, ascending
  Key* best;            // [all tokens] of every dropped token: similarity, and which target
  int32_t* row_token;   // [all rows] the token of a row
  int32_t* row_role;    // [all rows] its number among the targets, or kCopied, or kUnder - the token it is mixed with
  int32_t* target;      // [all rows] positions of the targets
  float* target_scale;  // [all rows] 1 / ||t||, 0 for a zero token
  Key* ticket;          // [1]
  uint32_t* done;       // [images] tiles of s5 that are done
  uint32_t* slots;      // [groups][2][group][3 + M], cooperative launches only
  uint32_t* arrived;    // [groups]
};
constexpr int32_t kCopied = -1, kUnder = -2;

__host__ __device__ constexpr int message_words(int basis) { return 3 + basis; }
__host__ __device__ constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// A row in shared memory: zeros up to whole 32-byte steps of s5, and an odd number of 16-byte words, so that the rows
// of a matrix instruction lie in different banks.
__host__ __device__ constexpr int64_t row_pitch(int64_t row_bytes) { return round_up(row_bytes, 32) + 16; }

__device__ __forceinline__ Key pack(uint32_t value, int position) {
  return (Key)value << 32 | (0xffffffffu - (uint32_t)position);
}
__device__ __forceinline__ int unpack(Key key) { return (int)(0xffffffffu - (uint32_t)key); }
// Of a float >= 0: its bits ascend with it.
__device__ __forceinline__ Key pack(float value, int position) { return pack(__float_as_uint(value), position); }

__device__ __forceinline__ Key larger(Key a, Key b) { return a > b ? a : b; }

__device__ __forceinline__ Key warp_largest(Key key) {
  for (int step = 16; step; step >>= 1) key = larger(key, __shfl_xor_sync(kAllLanes, key, step));
  return key;
}

// Running maxima of cu[0..s] and cu[0..s + 1], clamped into [0, limit]: images never overlap, whatever cu holds. All
// lanes of a warp call it and get the same.
__device__ inline void extent(const int32_t* cu, int s, int64_t limit, int64_t& begin, int64_t& end) {
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

// Image s of the call, as the first launch finds it.
__device__ inline Image find_image(const Call& call, int s) {
  Image image = {};
  if (call.ragged) {
    int64_t begin, end, row, row_end;
    extent(call.at.cu_seqlens, s, call.total_tokens, begin, end);
    extent(call.at.cu_keep, s, call.total_keep, row, row_end);
    image.base = begin * call.stride_xn;
    image.token = image.first = begin;
    image.count = (int32_t)min(end - begin, (int64_t)call.tokens);
    image.keep = (int32_t)min(min(row_end - row, (int64_t)call.keep), (int64_t)image.count);
    image.row = row + (int64_t)s * call.appended;
    image.row_end = (s + 1 == call.images ? call.total_keep : row_end) + (int64_t)(s + 1) * call.appended;
  } else {
    image.base = s * call.stride_xb;
    image.token = (int64_t)s * call.tokens;
    image.count = call.tokens;
    image.keep = call.keep;
    image.row = (int64_t)s * (call.keep + call.appended);
    image.row_end = image.row + call.keep + call.appended;
  }
  image.filled = image.count > 0 ? image.keep + call.appended : 0;
  return image;
}

}  // namespace apet::cuda
