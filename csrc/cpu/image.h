// One image on its way through the stages: a struct for what each stage fills. Names and shapes: docs/algorithm.md.
//
// Arrays are in the workspace unless they are outputs; the structs hold pointers to them. A function that takes one of
// these structs as const only reads its arrays.
#pragma once
#include <cstdint>

#include "../apet.h"

namespace apet::cpu {

// The pick_value of a token that must not be picked: it is in the basis, or its norm is not finite.
constexpr float kNeverPicked = -__builtin_inff();

// A token that may be the next basis token.
struct Candidate {
  float pick_value;
  int32_t token;
};

// The image, and what to do with it.
struct Input {
  const char* x;  // [N, D]
  int64_t stride_xn;
  int32_t tokens, dim, keep, max_basis;  // N, D, K, M
  apet_select select;
  float blend;
  double ridge;
};

// s1 to s3, by token.
struct Scores {
  float* norm_sq;       // [N] ||x||^2
  float* pick_value;    // [N] what s1 maximises: dist_sq (fps) or resid_sq (qr)
  float* resid_sq;      // [N] ||x||^2 - ||y||^2; s3 replaces it by e_sq, in place
  float* y;             // [M, N] L^-1 S x
  int32_t* steps_done;  // [N] basis tokens that pick_value, resid_sq and y of this token include: the first so many
  int32_t* candidates;  // [N] tokens that a step of s1 updates
  int32_t candidate_count;
  bool has_norms;  // false: the sweep for the first basis token forms them
};

// s1 and s2, by basis token.
struct Basis {
  int32_t size;                             // m
  int32_t token[APET_MAX_BASIS];            // positions, in the order they were picked
  float norm_sq[APET_MAX_BASIS];            // ||p||^2. Scores::norm_sq[p] may be being written in the first sweep
  float L[APET_MAX_BASIS][APET_MAX_BASIS];  // lower triangle without its diagonal
  double inv_diag[APET_MAX_BASIS];          // 1 / L_jj; 0 for a dependent basis token
};

// s4: the rows of the result.
struct Rows {
  int32_t count;        // R
  int32_t* row_token;   // [R] token that the row starts from
  int32_t* row_blend;   // [R] token that it is blended with, or -1
  int64_t* indices;     // [R] output of compress
  int64_t first_token;  // added to positions in `indices`: ragged images count in the packed x
  char* out;            // [R, D] output. Until the means it holds packed targets (s5_assign.h)
};

// s4 and s5: which tokens are merged into which rows.
struct Merge {
  int32_t dropped_count, target_count;  // T targets
  int32_t* dropped;                     // [N] tokens to merge, ascending
  int32_t* target_row;                  // [T] rows that tokens may be merged into, ascending
  float* inv_norm;                      // [T rounded up to a vector] 1 / ||t||; 0 for a zero vector, and for padding
  float* padding;                       // [T rounded up to a vector] added to similarities: 0, and -inf for padding
  float* packed;                        // targets that rows.out has no room for (s5_assign.h)
  int32_t* target;                      // [N] of dropped[i]: the number of its target
  int32_t* merged;                      // [N] dropped tokens by row, ascending within a row; scratch in s4
  int32_t* row_begin;                   // [R + 1] row r's are merged[row_begin[r] .. row_begin[r + 1])
};

struct Image {
  Input input;
  Scores scores;
  Basis basis;
  Rows rows;
  Merge merge;
};

}  // namespace apet::cpu
