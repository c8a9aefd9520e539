// What the drivers (compress.cpp) and the loops over tokens (s1_s3_sweep.h, s5_merge.h) agree on.
//
// The loops are compiled once per instruction set, each in its own namespace, and reached through a Kernels table.
// Nothing inline may live here: the linker would keep one copy, perhaps one that this processor cannot run.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../apet.h"

namespace apet::cpu {

// Tokens whose reach, energy and y are updated together: their dots wait on the stack in between.
constexpr int kTile = 64;
// A similarity chunk: this many dropped tokens meet every packed target before the next chunk starts, so that
// one pass over the packed targets (L2, L3) serves 96 tokens.
constexpr int kChunkRows = 96;

// Features that pack() and mean() take at a time: rows are cut there so that threads share wide rows too, in pieces
// long enough (1 KB of bfloat16) to stream.
constexpr int kColumns = 512;

// A token nobody may pick: already in the basis, or its norm is not finite.
constexpr float kNever = -__builtin_inff();

struct Best {
  float value;
  int32_t token;
};

// One image on its way through the stages. Arrays lie in the workspace unless they are outputs.
struct Image {
  const char* x;  // [N, D]
  int64_t stride_xn;
  int32_t tokens, dim, keep, max_basis;  // N, D, K, M
  apet_select select;
  double ridge;

  // s1-s3, per token
  bool has_norms;  // else the first sweep brings them
  float* norm_sq;  // [N] ||x||^2
  float* reach;    // [N] what the next basis token is the largest of: d^2 to the basis (fps), ||x||^2 - ||y||^2 (qr)
  float* energy;   // [N] ||x||^2 - ||y||^2, in the end e^2
  float* y;        // [M, N] L^-1 S x
  int32_t* met;    // [N] basis tokens that the three above know of
  int32_t* candidates;  // [N] those that a step reads
  int32_t candidate_count;
  // s1-s3, per basis token
  int32_t basis[APET_MAX_BASIS];
  int32_t basis_size;                            // m
  float basis_norm_sq[APET_MAX_BASIS];           // ||p||^2; norm_sq[p] may be on its way in the first sweep
  float factor[APET_MAX_BASIS][APET_MAX_BASIS];  // L, lower triangle
  double inv_pivot[APET_MAX_BASIS];              // 1 / L_mm, or 0 where the token depends on the earlier ones

  // s4: rows of the output, their sources, and who is merged
  int32_t rows;         // R
  int32_t* row_token;   // [R] what the row starts from
  int32_t* row_blend;   // [R] the token that row_token is blended with, or -1
  int32_t* row_begin;   // [R + 1] its dropped tokens: merged[row_begin[r] .. row_begin[r + 1]), ascending
  int32_t* merged;      // [N]
  int32_t* target_row;  // [T] rows that tokens may be merged into, ascending
  int32_t targets;      // T
  int32_t* dropped;     // [N] tokens to be merged, ascending
  int32_t dropped_count;
  float blend;

  // s5
  float* packed;        // targets, in panels (Kernels::packed_floats)
  float* inv_norm;      // [T rounded up to a vector] 1 / ||t||, 0 for a zero token
  float* out_of_range;  // [T rounded up to a vector] 0, and -inf for padding, added to every similarity
  int32_t* nearest;     // [N] for dropped[i]: the t of its target
  char* out;            // [R, D]
};

// The dtype- and instruction-set-specific loops. Ranges are half-open; any cut of the work gives the same bits.
struct Kernels {
  int32_t row_group;   // tokens that share one load of a basis token, and dropped tokens that share one of a target:
  int32_t drop_group;  // cuts of the work fall on multiples
  int32_t vector;      // float lanes of a vector: target arrays are padded to a multiple
  int32_t panel;       // targets in a packed panel
  // Floats that the packed form of `targets` targets takes, and bytes of scratch a thread needs in assign().
  size_t (*packed_floats)(int64_t targets, int64_t dim);
  size_t (*scratch_bytes)(int64_t dim);
  // s1: norm_sq, reach and energy of tokens [begin, end); returns the largest finite norm.
  Best (*norms)(const Image&, int64_t begin, int64_t end);
  // s1-s3: takes tokens [begin, end) past the basis tokens that they have not met, with norms() if !has_norms; returns
  // the farthest of them.
  Best (*sweep)(const Image&, int64_t begin, int64_t end);
  // The same for candidates[begin .. end).
  Best (*step)(const Image&, int64_t begin, int64_t end);
  // s3: sweep(), then energy becomes e^2.
  void (*residual)(const Image&, int64_t begin, int64_t end);
  // s5: packs features [d0, d1) of one panel of targets.
  void (*pack)(const Image&, int64_t panel, int64_t d0, int64_t d1);
  // s5: nearest target of dropped[begin .. end).
  void (*assign)(const Image&, int64_t begin, int64_t end, void* scratch);
  // s5: features [d0, d1) of output rows [begin, end).
  void (*mean)(const Image&, int64_t begin, int64_t end, int64_t d0, int64_t d1);
};

// Tables by dtype, defined by those instruction-set files that the build has.
const Kernels* generic_kernels(apet_dtype);
const Kernels* avx2_kernels(apet_dtype);
const Kernels* avx512_kernels(apet_dtype);
const Kernels* avx512_bf16_kernels(apet_dtype);  // bfloat16 alone; other dtypes take avx512's

// isa.cpp: the table for a dtype on the instruction set in use.
apet_isa isa_in_use();
const Kernels* kernels_for(apet_dtype, apet_isa);

}  // namespace apet::cpu
